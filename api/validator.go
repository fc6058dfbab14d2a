// Package api is the grid's API: what a validator serves, and the client that everybody else reads the grid with. Every
// record that the client returns was proved against a block header that the validators signed (package ledger/comet);
// what is not on the ledger (reports of nodes, blobs) is verified against keys and digests that are.
//
// Paths beside those of ledger/comet, all over TLS 1.3 with the validator's key pinned by the genesis:
//
//	POST /v1/heartbeat      a node's heartbeat (ledger.Heartbeat), signed by its session key
//	GET  /v1/reports        the latest heartbeat of every node, as it was signed: CBOR array of byte strings
//	HEAD,GET /v1/blob/HEX   a sealed blob, by SHA-256
//	PUT  /v1/blob/HEX       stores one; signed by a device of an account (package access)
//	GET  /v1/store          where blobs are: BlobPlace in CBOR, the validator's own word
//	GET  /v1/genesis        the genesis document, whose digest is the grid's ID
//	POST /v1/node/pending   a machine asks to be admitted (ledger.NodeAdmit), signed by the key that it would have as a node
//	GET  /v1/node/pending   who asks: CBOR array of byte strings
package api

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"sync"
	"syscall"
	"time"

	"holdfast/access"
	"holdfast/identity"
	"holdfast/ledger"
	"holdfast/ledger/comet"
	"holdfast/store"
)

// MaxBlob bounds one sealed blob: a layer of an image.
const MaxBlob = 4 << 30

// ValidatorConfig is what a validator needs.
type ValidatorConfig struct {
	Genesis  *ledger.Genesis
	Home     string       // its keys and its copy of the ledger
	P2P      string       // host:port of consensus
	Peers    []comet.Peer // other validators
	API      net.Listener
	TLS      tls.Certificate
	Blobs    store.Blobs
	Where    func() BlobPlace // nil: nothing is known of them
	Quota    Quota
	Timeouts comet.Timeouts // zero is the lab's
	Idle     time.Duration  // how long a request or an answer may stand still; 0 means 30 s
	Log      *slog.Logger
}

// Validator takes part in consensus and serves the API.
type Validator struct {
	cfg     ValidatorConfig
	genesis []byte // encoded
	pin     comet.Pin
	ears    *ledger.Ears
	comet   *comet.Validator
	used    *usage // of the store, while it runs
	pending pending
	log     *slog.Logger

	repair sync.Mutex

	mu       sync.Mutex
	nodes    string // the lists of the ledger that members was made from
	gateways string
	members  map[comet.Pin]bool    // the keys of the certificates of nodes and gateways
	damaged  map[store.Digest]bool // blobs whose bytes were seen not to have their digest
}

// NewValidator checks the configuration; nothing happens before Run.
func NewValidator(cfg ValidatorConfig) (*Validator, error) {
	if cfg.Idle <= 0 {
		cfg.Idle = 30 * time.Second
	}
	v := &Validator{cfg: cfg, genesis: cfg.Genesis.Encode(), log: cfg.Log, damaged: map[store.Digest]bool{}}
	if v.log == nil {
		v.log = slog.New(slog.DiscardHandler)
	}
	var err error
	if v.pin, err = comet.PinOf(cfg.TLS); err != nil {
		return nil, fmt.Errorf("validator certificate: %w", err)
	}
	v.comet, err = comet.New(comet.Config{
		Home: cfg.Home, Genesis: CometGenesis(cfg.Genesis), P2P: cfg.P2P, Peers: cfg.Peers, API: cfg.API, TLS: cfg.TLS,
		Machine: replicated(), Archive: archived,
		Timeouts: cfg.Timeouts,
		Extend: func(int64) []byte {
			if s := v.state(); s != nil {
				return v.ears.Extension(s, time.Now())
			}
			return nil
		},
		VerifyExtension: wellFormed,
		Handlers: map[string]http.Handler{
			"POST /v1/heartbeat":    http.HandlerFunc(v.heartbeat),
			"GET /v1/reports":       http.HandlerFunc(v.reports),
			"GET /v1/blob/{digest}": http.HandlerFunc(v.getBlob), // and HEAD
			"PUT /v1/blob/{digest}": http.HandlerFunc(v.putBlob),
			"GET /v1/store":         http.HandlerFunc(v.blobPlace),
			"GET /v1/genesis":       http.HandlerFunc(v.serveGenesis),
			"POST /v1/node/pending": http.HandlerFunc(v.announce),
			"GET /v1/node/pending":  http.HandlerFunc(v.listPending),
		},
		Known: v.known,
		Log:   v.log,
	})
	if err != nil {
		return nil, err
	}
	return v, nil
}

// VerifyLedger checks the chain and the state of a validator that does not run, in its home or a copy: blocks, commits and
// hashes, and that executing all blocks again makes what is there. It changes nothing.
func VerifyLedger(ctx context.Context, g *ledger.Genesis, home string, progress func(height, last int64)) (*comet.Checked, error) {
	return comet.VerifyHome(ctx, &comet.Config{
		Home: home, Genesis: CometGenesis(g), Machine: replicated(), Archive: archived, VerifyExtension: wellFormed,
	}, progress)
}

// replicated is the machine that validators replicate.
func replicated() comet.Machine {
	return comet.Machine{
		Genesis: func(g comet.Genesis) (comet.State, error) {
			doc, err := ledger.DecodeGenesis(g.State)
			if err != nil {
				return nil, err
			}
			s, err := ledger.New(doc)
			return machine{s}, err
		},
		Load: func(_ int64, all iter.Seq2[string, []byte]) (comet.State, error) {
			s, err := ledger.Load(all)
			return machine{s}, err
		},
	}
}

// archived is the name under which a transaction is kept: that of the history that it is in.
func archived(s comet.State, i int) []string {
	if id, ok := s.(machine).About(i); ok {
		return []string{ledger.HistoryKey(id)}
	}
	return nil
}

func wellFormed(extension []byte) error { _, err := ledger.DecodeExtension(extension); return err }

// Run takes part until ctx ends.
func (v *Validator) Run(ctx context.Context) (err error) {
	if v.used, err = openUsage(v.cfg.Home, v.cfg.Blobs, v.cfg.Quota, v.cfg.Genesis.GridAccount()); err != nil {
		v.cfg.API.Close()
		return err
	}
	defer func() { err = errors.Join(err, v.used.close()) }()
	v.ears = ledger.NewEars(v.cfg.Genesis, time.Now())
	return v.comet.Run(ctx)
}

// known says whether a key is that of a node's or a gateway's certificate: these have places of their own, which
// strangers cannot take.
func (v *Validator) known(p comet.Pin) bool {
	s := v.state()
	if s == nil {
		return false
	}
	nodes, _ := s.Get(ledger.NodesKey)
	gateways, _ := s.Get(ledger.GatewaysKey)
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.members == nil || string(nodes) != v.nodes || string(gateways) != v.gateways {
		v.members, v.nodes, v.gateways = map[comet.Pin]bool{}, string(nodes), string(gateways)
		for _, n := range records[identity.NodeID, ledger.Node](s, nodes, ledger.NodeKey) {
			v.members[n.TLS] = true
		}
		for _, g := range records[identity.GatewayID, ledger.Gateway](s, gateways, ledger.GatewayKey) {
			v.members[comet.Pin(g.ID)] = true
		}
	}
	return v.members[p]
}

// records reads those records of a list that can be read.
func records[ID, T any](s *ledger.State, list []byte, key func(ID) string) []*T {
	if list == nil {
		return nil
	}
	ids, err := ledger.Decode[[]ID](list)
	if err != nil {
		return nil
	}
	var out []*T
	for _, id := range *ids {
		raw, _ := s.Get(key(id))
		if x, err := ledger.Decode[T](raw); err == nil {
			out = append(out, x)
		}
	}
	return out
}

// Ready is closed when the API answers.
func (v *Validator) Ready() <-chan struct{} { return v.comet.Ready() }

func (v *Validator) state() *ledger.State {
	if s, _ := v.comet.State(); s != nil {
		return s.(machine).State
	}
	return nil
}

// CometGenesis is the chain that belongs to a grid's genesis. Its name begins with the grid's ID, so that no vote of one
// grid counts in another.
func CometGenesis(g *ledger.Genesis) comet.Genesis {
	out := comet.Genesis{Chain: g.GridID().String()[:comet.MaxChain], Time: time.Unix(g.Time, 0).UTC(), State: g.Encode()}
	out.Validators = members(g.Validators)
	return out
}

func members(vs []ledger.Validator) []comet.Member {
	out := make([]comet.Member, len(vs))
	for i := range vs {
		out[i] = comet.Member{Key: vs[i].Key, Power: vs[i].Power}
	}
	return out
}

// machine makes a ledger.State what comet replicates.
type machine struct{ *ledger.State }

func (m machine) Apply(b comet.Block) (comet.State, []comet.Result) {
	in := ledger.Block{Height: b.Height, Time: b.Time, Txs: b.Txs}
	for _, h := range b.Heard {
		nodes, err := ledger.DecodeExtension(h.Data)
		if err != nil {
			nodes = nil // malformed extensions were refused when they were voted; what cannot be read says nothing
		}
		in.Heard = append(in.Heard, ledger.Heard{Power: h.Power, Nodes: nodes})
	}
	for _, a := range b.Offenders {
		if len(a) == 20 {
			in.Offenders = append(in.Offenders, [20]byte(a))
		}
	}
	next, res := m.State.Apply(in)
	out := make([]comet.Result, len(res))
	for i, r := range res {
		out[i] = comet.Result{Code: r.Code, Log: r.Log}
	}
	return machine{next}, out
}

// Validators is the set that the ledger decided on.
func (m machine) Validators() []comet.Member { return members(m.State.Validators().Members) }

func (m machine) Changes(since comet.State) iter.Seq2[string, []byte] {
	if since == nil {
		return m.State.Changes(nil)
	}
	return m.State.Changes(since.(machine).State)
}

// body reads a request's body as long as some of it comes now and then: who stands still holds nothing here for long.
func (v *Validator) body(w http.ResponseWriter, r *http.Request) io.ReadCloser {
	return struct {
		io.Reader
		io.Closer
	}{&timed{rc: http.NewResponseController(w), idle: v.cfg.Idle, r: r.Body}, r.Body}
}

// timed gives every read or write a deadline of its own.
type timed struct {
	rc   *http.ResponseController
	idle time.Duration
	r    io.Reader
	w    io.Writer
}

func (t *timed) Read(p []byte) (int, error) {
	if err := t.rc.SetReadDeadline(time.Now().Add(t.idle)); err != nil {
		return 0, err
	}
	return t.r.Read(p)
}

func (t *timed) Write(p []byte) (int, error) {
	if err := t.rc.SetWriteDeadline(time.Now().Add(t.idle)); err != nil {
		return 0, err
	}
	return t.w.Write(p)
}

// What a request holds of the validator's memory beside its body: an open file with its buffers, and no more than
// maxReportHeld for the reports, which are held once for all who read them at the same time.
const (
	streamHeld    = 64 << 10
	maxReportHeld = 8 << 20
)

// hold takes memory for a request, or says that there is none.
func (v *Validator) hold(w http.ResponseWriter, r *http.Request, n int) (release func(), ok bool) {
	release, err := v.comet.Hold(r.Context(), n)
	if err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
	}
	return release, err == nil
}

// small reads a body of at most limit bytes, for which memory is held until release.
func (v *Validator) small(w http.ResponseWriter, r *http.Request, limit int64) (raw []byte, release func(), ok bool) {
	size := limit
	if r.ContentLength >= 0 {
		size = min(size, r.ContentLength)
	}
	if release, ok = v.hold(w, r, int(size)); !ok {
		return nil, nil, false
	}
	raw, err := io.ReadAll(http.MaxBytesReader(w, v.body(w, r), limit))
	if err != nil {
		release()
		http.Error(w, err.Error(), http.StatusBadRequest)
		return nil, nil, false
	}
	return raw, release, true
}

func (v *Validator) heartbeat(w http.ResponseWriter, r *http.Request) {
	raw, release, ok := v.small(w, r, ledger.MaxHeartbeat)
	if !ok {
		return
	}
	defer release()
	s := v.state()
	if s == nil {
		http.Error(w, "the ledger is not ready", http.StatusServiceUnavailable)
		return
	}
	if err := v.ears.Hear(s, raw, time.Now()); err != nil {
		http.Error(w, err.Error(), http.StatusForbidden)
		return
	}
	w.Header().Set(setHeader, strconv.FormatInt(s.Validators().Height, 10))
	w.WriteHeader(http.StatusNoContent)
}

func (v *Validator) reports(w http.ResponseWriter, r *http.Request) {
	v.sendAll(w, r, v.ears.Reports())
}

// sendAll answers with a CBOR array of byte strings, which others may be reading too.
func (v *Validator) sendAll(w http.ResponseWriter, r *http.Request, all [][]byte) {
	// Piece by piece: nothing is copied for the one who asks.
	parts, size := []io.Reader{bytes.NewReader(cborHead(0x80, len(all)))}, 0
	for _, raw := range all {
		parts = append(parts, bytes.NewReader(cborHead(0x40, len(raw))), bytes.NewReader(raw))
		size += len(raw)
	}
	release, ok := v.hold(w, r, min(streamHeld+size, maxReportHeld))
	if !ok {
		return
	}
	defer release()
	w.Header().Set("Content-Type", "application/cbor")
	v.send(w, io.MultiReader(parts...))
}

// cborHead begins an array (0x80) or a byte string (0x40) of n, in the shortest form.
func cborHead(major byte, n int) []byte {
	switch {
	case n < 24:
		return []byte{major | byte(n)}
	case n < 1<<8:
		return []byte{major | 24, byte(n)}
	case n < 1<<16:
		return binary.BigEndian.AppendUint16([]byte{major | 25}, uint16(n))
	}
	return binary.BigEndian.AppendUint32([]byte{major | 26}, uint32(n))
}

// send writes an answer as long as the client takes some of it now and then.
func (v *Validator) send(w http.ResponseWriter, r io.Reader) error {
	_, err := io.Copy(&timed{rc: http.NewResponseController(w), idle: v.cfg.Idle, w: w}, r)
	return err
}

func (v *Validator) digest(w http.ResponseWriter, r *http.Request) (store.Digest, bool) {
	d, err := store.ParseDigest(r.PathValue("digest"))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
	}
	return d, err == nil
}

// getBlob gives sealed bytes to whoever knows their digest: they are of no use without the key, and the digest is in a
// sealed body or, for a body, on the ledger.
func (v *Validator) getBlob(w http.ResponseWriter, r *http.Request) {
	d, ok := v.digest(w, r)
	if !ok {
		return
	}
	release, ok := v.hold(w, r, streamHeld)
	if !ok {
		return
	}
	defer release()
	if r.Method == http.MethodHead && v.isDamaged(d) {
		http.Error(w, "the copy here is damaged: store it again", http.StatusNotFound) // whoever has it then does
		return
	}
	body, size, err := v.cfg.Blobs.Open(r.Context(), d)
	if err != nil {
		code := http.StatusInternalServerError
		switch {
		case errors.Is(err, store.ErrAbsent):
			code = http.StatusNotFound
		case errors.Is(err, store.ErrBusy):
			code = http.StatusServiceUnavailable
		}
		http.Error(w, err.Error(), code)
		return
	}
	defer body.Close()
	w.Header().Set("Content-Length", strconv.FormatInt(size, 10))
	w.Header().Set("Content-Type", "application/octet-stream")
	if r.Method == http.MethodHead {
		return
	}
	err = v.send(w, body)
	if errors.Is(err, store.ErrDigest) {
		// All bytes are sent, as they are. The client finds out by itself, as it must anyway, and can say what is wrong;
		// an answer that breaks off looks like trouble on the way.
		v.log.Error("a blob on this disk is damaged", "digest", d, "error", err)
		v.mu.Lock()
		v.damaged[d] = true
		v.mu.Unlock()
		return
	}
	if err != nil {
		v.log.Warn("send blob", "digest", d, "error", err)
		panic(http.ErrAbortHandler) // the client must not take a part for the whole
	}
}

func (v *Validator) putBlob(w http.ResponseWriter, r *http.Request) {
	d, ok := v.digest(w, r)
	if !ok {
		return
	}
	account, _, err := access.Verify(r, v.pin, time.Now(), v.account)
	if err != nil {
		http.Error(w, err.Error(), http.StatusForbidden)
		return
	}
	if r.ContentLength > MaxBlob {
		http.Error(w, fmt.Sprintf("%v: at most %d bytes", store.ErrTooBig, int64(MaxBlob)), http.StatusRequestEntityTooLarge)
		return
	}
	release, ok := v.hold(w, r, streamHeld)
	if !ok {
		return
	}
	defer release()
	if err := v.store(r.Context(), account.ID, d, r.ContentLength, http.MaxBytesReader(w, v.body(w, r), MaxBlob+1)); err != nil {
		code := http.StatusInternalServerError
		switch {
		case errors.Is(err, syscall.ENOSPC):
			code, err = http.StatusInsufficientStorage, errors.New("the disk of the grid's store is full; its operator must make room there")
		case errors.Is(err, store.ErrBusy):
			code, err = http.StatusServiceUnavailable, fmt.Errorf("%w: try again when holdfast status shows more nodes up", err)
		case errors.Is(err, errQuota):
			code = http.StatusInsufficientStorage
		case errors.Is(err, store.ErrDigest):
			code = http.StatusBadRequest
		case errors.Is(err, store.ErrTooBig):
			code = http.StatusRequestEntityTooLarge
		}
		http.Error(w, err.Error(), code)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// store puts a blob at an account's cost, unless it is there.
func (v *Validator) store(ctx context.Context, id identity.AccountID, d store.Digest, size int64, r io.Reader) error {
	have, err := v.cfg.Blobs.Has(ctx, d)
	if err != nil {
		return err
	}
	if have && v.isDamaged(d) {
		if have, err = v.intact(ctx, d); err != nil {
			return err
		}
	}
	if have || v.used.paid(d) { // it is there, or was until it was found damaged
		return v.cfg.Blobs.Put(ctx, d, r)
	}
	up, err := v.used.begin(id, size)
	if err != nil {
		return fmt.Errorf("put %v: %w", d, err)
	}
	if err := v.cfg.Blobs.Put(ctx, d, up.meter(r)); err != nil {
		up.drop()
		return err
	}
	return up.done(d)
}

func (v *Validator) isDamaged(d store.Digest) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.damaged[d]
}

// intact reads a blob that was seen damaged once more, and removes it if it is: one bad read is no reason to lose the
// only copy.
func (v *Validator) intact(ctx context.Context, d store.Digest) (bool, error) {
	v.repair.Lock() // two who store it must not remove what the other has just repaired
	defer v.repair.Unlock()
	if !v.isDamaged(d) {
		return v.cfg.Blobs.Has(ctx, d)
	}
	body, _, err := v.cfg.Blobs.Open(ctx, d)
	if errors.Is(err, store.ErrAbsent) {
		return false, nil
	} else if err != nil {
		return false, err
	}
	_, err = io.Copy(io.Discard, body)
	body.Close()
	ok := err == nil
	if errors.Is(err, store.ErrDigest) {
		v.log.Warn("a damaged blob is stored again", "digest", d)
		err = v.cfg.Blobs.Remove(d)
	}
	if err != nil {
		return false, err
	}
	v.mu.Lock()
	delete(v.damaged, d)
	v.mu.Unlock()
	return ok, nil
}

func (v *Validator) account(id identity.AccountID) (*identity.Account, error) {
	s := v.state()
	if s == nil {
		return nil, errors.New("the ledger is not ready")
	}
	raw, _ := s.Get(ledger.AccountKey(id))
	if raw == nil {
		return nil, ledger.ErrAbsent
	}
	return ledger.Decode[identity.Account](raw)
}
