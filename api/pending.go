package api

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"time"

	"holdfast/identity"
	"holdfast/internal/canonical"
	"holdfast/ledger"
	"holdfast/ledger/comet"
)

// Bounds of the machines that ask to become nodes. Anybody can ask, as often and under as many keys as he likes.
const (
	maxPending       = 256
	maxPendingFarm   = 32
	maxPendingSource = 8               // one machine, or one network of IPv6
	maxPendingSite   = 16              // what one site is given: a /48, or 256 addresses of IPv4
	maxPendingWide   = 24              // what a provider has: fewer than a farm's places, so that they take more than one
	pendingLife      = 5 * time.Minute // machines ask again all the time

	maxPendingList = maxPending * (ledger.MaxNodeAdmit + 8) // bytes of all
)

// pending is the machines that ask to become nodes, in memory only. It is a notice board, no authority: a farm's owner
// compares a machine's ID with its console. Who is on it stays there as long as he asks, whoever else comes: what is full
// refuses the newcomer.
type pending struct {
	mu    sync.Mutex
	all   map[identity.NodeID]wish
	swept time.Time

	proofs sync.Mutex // strangers get one core for all of theirs
}

// wish is what one machine asks.
type wish struct {
	raw  []byte
	farm identity.FarmID
	from netip.Prefix // who said it last: who repeats what others said does so at his own cost
	at   time.Time
}

// refusal is why a wish is not kept, with what HTTP calls it.
type refusal struct {
	status int
	error
}

func refused(status int, format string, args ...any) error {
	return refusal{status, fmt.Errorf(format, args...)}
}

// add keeps a wish that came from an address at now, in place of what the same machine asked before. known says whether
// the ledger has a record.
func (b *pending) add(grid identity.GridID, known func(key string) bool, raw []byte, from netip.Prefix, now time.Time) error {
	p, err := ledger.DecodeNodeAdmit(raw)
	if err != nil {
		return refusal{http.StatusBadRequest, err}
	}
	id := p.Key.Node()
	if !known(ledger.FarmKey(p.Farm)) {
		return refused(http.StatusForbidden, "%v: %w", p.Farm, ledger.ErrAbsent)
	}
	if known(ledger.NodeKey(id)) {
		return nil // approved a moment ago; there is nothing more to ask
	}
	w := wish{raw, p.Farm, from, now}
	keep := func(write bool) error {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.sweep(known, now)
		if err := b.room(id, w); err != nil || !write {
			return err
		}
		if b.all == nil {
			b.all = map[identity.NodeID]wish{}
		}
		b.all[id] = w
		return nil
	}
	if err := keep(false); err != nil { // a proof costs a fifth of a millisecond, this next to nothing
		return err
	}
	b.proofs.Lock()
	err = p.Check(grid)
	b.proofs.Unlock()
	if err != nil {
		return refusal{http.StatusForbidden, err}
	}
	return keep(true)
}

// room says whether there is a place for a wish.
func (b *pending) room(id identity.NodeID, w wish) error {
	all, ofFarm := 0, 0
	nets := networks(w.from)
	var ofNet [len(nets)]int
	for other, o := range b.all {
		if other == id {
			continue
		}
		all++
		if o.farm == w.farm {
			ofFarm++
		}
		for i, n := range nets {
			if n == o.from || n.Contains(o.from.Addr()) {
				ofNet[i]++
			}
		}
	}
	for i, most := range [len(nets)]int{maxPendingSource, maxPendingSite, maxPendingWide} {
		if ofNet[i] >= most {
			return refused(http.StatusTooManyRequests, "%d machines of %v wait for approval, and no more can", ofNet[i], nets[i])
		}
	}
	switch {
	case ofFarm >= maxPendingFarm:
		return refused(http.StatusTooManyRequests, "%d machines wait to be admitted to %v, and no more can", ofFarm, w.farm)
	case all >= maxPending:
		return refused(http.StatusTooManyRequests, "%d machines wait to be admitted, and no more can", all)
	}
	return nil
}

// sweep forgets the machines that do not ask any more, and those that the ledger has admitted.
func (b *pending) sweep(known func(key string) bool, now time.Time) {
	if now.Sub(b.swept) < time.Second { // it costs a look at the ledger for each
		return
	}
	b.swept = now
	for id, w := range b.all {
		if now.Sub(w.at) > pendingLife || known(ledger.NodeKey(id)) {
			delete(b.all, id)
		}
	}
}

// list is what the machines that wait at now have said.
func (b *pending) list(known func(key string) bool, now time.Time) [][]byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.sweep(known, now)
	out := make([][]byte, 0, len(b.all))
	for _, w := range b.all {
		out = append(out, w.raw)
	}
	return out
}

// source is where a request comes from, as far as an address tells: one machine, or one network of IPv6.
func source(r *http.Request) netip.Prefix {
	ap, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return netip.Prefix{}
	}
	ip, bits := ap.Addr().Unmap().WithZone(""), 32
	if ip.Is6() {
		bits = 64
	}
	p, _ := ip.Prefix(bits)
	return p
}

// networks are those that a source is in, the narrowest first: who has one address of the widest may have all of them.
func networks(from netip.Prefix) (nets [3]netip.Prefix) {
	bits := [2]int{24, 16}
	if from.Addr().Is6() {
		bits = [2]int{48, 32}
	}
	nets[0] = from
	for i, n := range bits {
		nets[i+1], _ = from.Addr().Prefix(n)
	}
	return nets
}

func (v *Validator) announce(w http.ResponseWriter, r *http.Request) {
	raw, release, ok := v.small(w, r, ledger.MaxNodeAdmit)
	if !ok {
		return
	}
	defer release()
	s := v.state()
	if s == nil {
		http.Error(w, "the ledger is not ready", http.StatusServiceUnavailable)
		return
	}
	if err := v.pending.add(v.cfg.Genesis.GridID(), has(s), raw, source(r), time.Now()); err != nil {
		code := http.StatusInternalServerError
		if x, ok := errors.AsType[refusal](err); ok {
			code = x.status
		}
		http.Error(w, err.Error(), code)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

func (v *Validator) listPending(w http.ResponseWriter, r *http.Request) {
	s := v.state()
	if s == nil {
		http.Error(w, "the ledger is not ready", http.StatusServiceUnavailable)
		return
	}
	v.sendAll(w, r, v.pending.list(has(s), time.Now()))
}

func has(s *ledger.State) func(string) bool {
	return func(key string) bool { v, _ := s.Get(key); return v != nil }
}

// askTime is how long one validator may take to answer what all are asked.
const askTime = 5 * time.Second

// all asks every validator at once and is content when one answers well. f is given answers of at most limit bytes; its
// calls do not overlap.
func (c *Client) all(ctx context.Context, method, path string, body []byte, limit int64, f func(answer []byte) error) error {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	ask := func(pin comet.Pin) ([]byte, error) {
		resp, err := c.doAt(ctx, pin, method, path, bytes.NewReader(body), nil)
		if err != nil {
			return nil, err
		}
		defer resp.Body.Close()
		return io.ReadAll(io.LimitReader(resp.Body, limit+1))
	}
	var mu sync.Mutex
	errs := make(chan error)
	vs := c.known().Members
	for _, v := range vs {
		go func() {
			b, err := ask(v.TLS)
			if err == nil {
				mu.Lock()
				err = f(b)
				mu.Unlock()
			}
			if err != nil {
				err = fmt.Errorf("validator %s: %w", v.Name, err)
			}
			errs <- err
		}()
	}
	var bad []error
	for range vs {
		if err := <-errs; err != nil {
			bad = append(bad, err)
		}
	}
	if len(bad) < len(vs) {
		return nil
	}
	return errors.Join(bad...)
}

// Announce tells the validators that a machine asks to be admitted. They remember it for some minutes; one that does is
// enough.
func (c *Client) Announce(ctx context.Context, a *ledger.NodeAdmit) error {
	if err := c.all(ctx, http.MethodPost, "/v1/node/pending", a.Encode(), 0, func([]byte) error { return nil }); err != nil {
		return fmt.Errorf("announce %v: %w", a.Key.Node(), err)
	}
	return nil
}

// Pending returns the machines that ask to be admitted, by name and ID. Each agrees by its own signature to what is said of
// it, and that is all: anybody can run a machine that asks.
func (c *Client) Pending(ctx context.Context) ([]*ledger.NodeAdmit, error) {
	byID := map[identity.NodeID]*ledger.NodeAdmit{}
	if err := c.all(ctx, http.MethodGet, "/v1/node/pending", nil, maxPendingList, func(b []byte) error { return decodePending(b, c.grid, byID) }); err != nil {
		return nil, fmt.Errorf("machines that wait for approval: %w", err)
	}
	return slices.SortedFunc(maps.Values(byID), func(x, y *ledger.NodeAdmit) int {
		a, b := x.Key.Node(), y.Key.Node()
		return cmp.Or(cmp.Compare(x.Name, y.Name), bytes.Compare(a[:], b[:]))
	}), nil
}

// decodePending adds to byID what verifies of a validator's answer. What does not, a validator that does its work would
// not have kept.
func decodePending(b []byte, grid identity.GridID, byID map[identity.NodeID]*ledger.NodeAdmit) error {
	var raws [][]byte
	if err := canonical.Decode(b, maxPendingList, &raws); err != nil {
		return err
	}
	if len(raws) > maxPending {
		return fmt.Errorf("%d machines, at most %d are allowed", len(raws), maxPending)
	}
	for _, raw := range raws {
		p, err := ledger.DecodeNodeAdmit(raw)
		if err != nil {
			return err
		}
		id := p.Key.Node()
		if byID[id] != nil {
			continue
		}
		if err := p.Check(grid); err != nil {
			return err
		}
		byID[id] = p
	}
	return nil
}
