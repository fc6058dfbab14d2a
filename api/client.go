package api

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"holdfast/access"
	"holdfast/identity"
	"holdfast/internal/canonical"
	"holdfast/ledger"
	"holdfast/ledger/comet"
	"holdfast/store"
)

// ClientConfig says which grid, and how to reach its validators.
type ClientConfig struct {
	Genesis *ledger.Genesis
	// Dial connects to one validator's API. Nil dials the address in the genesis.
	Dial func(ctx context.Context, v *ledger.Validator) (net.Conn, error)
	// Certificate says who the client is: validators keep places for the nodes and gateways of the ledger. Nil is a stranger.
	Certificate *tls.Certificate
	Trust       string // file that remembers the newest header; "" forgets it with the client
	Log         *slog.Logger
}

// Client reads and changes one grid. It is safe for concurrent use.
type Client struct {
	genesis *ledger.Genesis
	grid    identity.GridID
	comet   *comet.Client
	log     *slog.Logger

	cfg     ClientConfig
	mu      sync.Mutex
	set     *ledger.Validators          // as it was last proved; at first that of the genesis
	beating map[comet.Pin]chan struct{} // heartbeats under way, by validator
	beats   sync.WaitGroup
	ctx     context.Context // of these
	cancel  func()
}

// LedgerName is the TLS server name of a grid's ledger API, also behind gateways.
func LedgerName(grid identity.GridID) string { return "ledger." + grid.Short() + ".holdfast" }

// NewClient checks the configuration and dials nothing.
func NewClient(cfg ClientConfig) (*Client, error) {
	c := &Client{genesis: cfg.Genesis, grid: cfg.Genesis.GridID(), log: cfg.Log, cfg: cfg, beating: map[comet.Pin]chan struct{}{}}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	cc := comet.ClientConfig{Genesis: CometGenesis(cfg.Genesis), Verify: ledger.VerifyProof, Certificate: cfg.Certificate, Log: cfg.Log}
	if cfg.Trust != "" {
		cc.Trust = comet.FileTrust(cfg.Trust)
	}
	c.set = &ledger.Validators{Members: cfg.Genesis.Validators}
	cc.Servers = c.servers(c.set)
	var err error
	if c.comet, err = comet.NewClient(cc); err != nil {
		return nil, err
	}
	return c, nil
}

// servers are those of a set. c.mu is held, or c is not shared yet.
func (c *Client) servers(set *ledger.Validators) (out []comet.Server) {
	for i := range set.Members {
		v := &set.Members[i]
		dial := func(ctx context.Context) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "tcp", v.Address)
		}
		if c.cfg.Dial != nil {
			dial = func(ctx context.Context) (net.Conn, error) { return c.cfg.Dial(ctx, v) }
		}
		if c.beating[v.TLS] == nil {
			c.beating[v.TLS] = make(chan struct{}, maxBeats)
		}
		out = append(out, comet.Server{Dial: dial, Name: LedgerName(c.grid), Pins: []comet.Pin{v.TLS}})
	}
	return out
}

// Validators is the set of now, proved. From then on the client asks these, and counts heartbeats by them.
func (c *Client) Validators(ctx context.Context) (*ledger.Validators, error) {
	v, err := c.comet.Read(ctx, ledger.ValidatorsKey)
	if err != nil {
		return nil, err
	}
	raw, ok := v.Value(ledger.ValidatorsKey)
	set, err := ledger.ValidatorsOf(c.genesis, raw, ok)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if set.Height > c.set.Height {
		if err := c.comet.SetServers(c.servers(set)); err != nil {
			return nil, err
		}
		c.set = set
	}
	return c.set, nil
}

func (c *Client) known() *ledger.Validators {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.set
}

// Close ends heartbeats that are still on their way, and closes idle connections.
func (c *Client) Close() {
	c.cancel()
	c.beats.Wait()
	c.comet.Close()
}

// Grid is the grid's ID.
func (c *Client) Grid() identity.GridID { return c.grid }

// Genesis is the grid's genesis document.
func (c *Client) Genesis() *ledger.Genesis { return c.genesis }

// Read returns proved records.
func (c *Client) Read(ctx context.Context, keys ...string) (comet.View, error) {
	return c.comet.Read(ctx, keys...)
}

// Watch returns when the ledger has changed after a height, or after some 25 s anyway.
func (c *Client) Watch(ctx context.Context, after int64) (int64, error) {
	return c.comet.Watch(ctx, after)
}

// pace bounds how often Follow asks: a server that says "changed" without end must not keep a client busy.
const pace = 20 * time.Millisecond

// Follow calls changed whenever the ledger has changed, until ctx ends.
func (c *Client) Follow(ctx context.Context, changed func()) error {
	height := int64(0)
	for {
		h, err := c.comet.Watch(ctx, height)
		wait := pace
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil:
			wait = 500 * time.Millisecond
		case h != height:
			height = h
			changed()
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
		}
	}
}

// A View holds records that are proved at one height.
type View = comet.View

// Reader reads proved records.
type Reader interface {
	Read(ctx context.Context, keys ...string) (View, error)
}

// Get reads one record; ledger.ErrAbsent says that it is proved not to be there.
func Get[T any](ctx context.Context, r Reader, key string) (*T, error) {
	v, err := r.Read(ctx, key)
	if err != nil {
		return nil, err
	}
	raw, ok := v.Value(key)
	if !ok {
		return nil, ledger.ErrAbsent
	}
	return ledger.Decode[T](raw)
}

// maxKeys is how many keys one read asks for.
const maxKeys = 64

// GetAll reads the records of many keys, in their order; those that are absent are nil.
func GetAll[T any](ctx context.Context, r Reader, keys []string) ([]*T, error) {
	out := make([]*T, 0, len(keys))
	most := maxKeys
	for len(keys) > 0 {
		n := min(len(keys), most)
		v, err := r.Read(ctx, keys[:n]...)
		if errors.Is(err, comet.ErrTooLarge) && n > 1 {
			most = n / 2
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, k := range keys[:n] {
			raw, ok := v.Value(k)
			if !ok {
				out = append(out, nil)
				continue
			}
			rec, err := ledger.Decode[T](raw)
			if err != nil {
				return nil, err
			}
			out = append(out, rec)
		}
		keys = keys[n:]
	}
	return out, nil
}

// List reads a list and the records that it names; a record that went meanwhile is left out.
func List[ID, T any](ctx context.Context, r Reader, listKey string, key func(ID) string) ([]*T, error) {
	ids, err := Get[[]ID](ctx, r, listKey)
	if errors.Is(err, ledger.ErrAbsent) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	keys := make([]string, len(*ids))
	for i, id := range *ids {
		keys[i] = key(id)
	}
	all, err := GetAll[T](ctx, r, keys)
	if err != nil {
		return nil, err
	}
	out := all[:0]
	for _, x := range all {
		if x != nil {
			out = append(out, x)
		}
	}
	return out, nil
}

// Nodes reads all nodes, in order of registration.
func (c *Client) Nodes(ctx context.Context) ([]*ledger.Node, error) {
	return List[identity.NodeID, ledger.Node](ctx, c, ledger.NodesKey, ledger.NodeKey)
}

// ErrRefused is returned for a transaction that the ledger did not accept.
var ErrRefused = comet.ErrRefused

// ErrUnavailable says that the ledger did not answer, now.
var ErrUnavailable = comet.ErrUnavailable

// Submit sends a signed transaction and waits until it is in a block. It returns the height.
func (c *Client) Submit(ctx context.Context, tx *ledger.Tx) (int64, error) {
	done, err := c.comet.Submit(ctx, tx.Encode())
	if err != nil {
		return 0, err
	}
	if done.Code != ledger.CodeOK {
		return 0, fmt.Errorf("%w: %s", ErrRefused, done.Log)
	}
	return done.Height, nil
}

// Next is the nonce of an actor's next transaction.
func (c *Client) Next(ctx context.Context, a ledger.Actor) (uint64, error) {
	n, err := Get[uint64](ctx, c, ledger.NonceKey(a))
	if errors.Is(err, ledger.ErrAbsent) {
		return 1, nil
	} else if err != nil {
		return 0, err
	}
	return *n + 1, nil
}

// txLife is how long what Act signs is good for: long enough for a ledger that is slow, and short enough that what seems to
// have failed does not come true when nobody thinks of it any more.
const txLife = 5 * time.Minute

// Act signs a transaction of an actor with its next nonce and submits it. When it returns, the ledger has proved to this
// client that the nonce is used: one server's word is not enough.
func (c *Client) Act(ctx context.Context, kind ledger.Kind, a ledger.Actor, payload any, keys ...*identity.PrivateKey) (*ledger.Tx, error) {
	n, err := c.Next(ctx, a)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", kind, err)
	}
	tx := ledger.NewTx(c.grid, kind, a, n, payload)
	tx.Until = time.Now().Add(txLife).Unix()
	for _, k := range keys {
		tx.Sign(k)
	}
	h, err := c.Submit(ctx, tx)
	if err != nil {
		return nil, err
	}
	v, err := c.comet.ReadAt(ctx, h, ledger.NonceKey(a)) // and the next Read shows it
	if err != nil {
		return nil, fmt.Errorf("%s was committed at %d, reading it back: %w", kind, h, err)
	}
	raw, _ := v.Value(ledger.NonceKey(a))
	if used, err := ledger.Decode[uint64](raw); err != nil || *used < n {
		return nil, fmt.Errorf("%s: the server says that it was committed at %d, and it is not on the ledger", kind, h)
	}
	return tx, nil
}

// setHeader is the height that made the set of validators by which a validator takes a heartbeat; absent it is 0, the genesis's.
const setHeader = "Holdfast-Validators"

// maxBeats bounds the heartbeats on their way to one validator: one that hangs does not gather them without end.
const maxBeats = 8

// Heartbeat sends one to every validator, and returns when validators of two thirds of the power have heard it: then
// more than a third that are honest have, and the ledger does not take the node for dead. The others hear it too, unless
// it takes longer than a lease; a heartbeat that too few have heard is an error, and must not renew a lease.
func (c *Client) Heartbeat(ctx context.Context, raw []byte) error {
	type answer struct {
		power int64
		err   error
	}
	set := c.known()
	vs := set.Members
	answers := make(chan answer, len(vs))
	newer := make(chan struct{}, 1) // somebody knows a newer set: the next heartbeat goes by it
	total := int64(0)
	for i := range vs {
		v := &vs[i]
		total += v.Power
		c.mu.Lock()
		beating := c.beating[v.TLS]
		c.mu.Unlock()
		select {
		case beating <- struct{}{}:
		default:
			answers <- answer{0, fmt.Errorf("validator %s: %w: %d heartbeats are on their way", v.Name, comet.ErrUnavailable, maxBeats)}
			continue
		}
		c.beats.Go(func() {
			defer func() { <-beating }()
			bctx, cancel := context.WithTimeout(c.ctx, max(c.genesis.Lease, time.Second))
			defer cancel()
			resp, err := c.doAt(bctx, v.TLS, http.MethodPost, "/v1/heartbeat", bytes.NewReader(raw), nil)
			if err != nil {
				answers <- answer{0, fmt.Errorf("validator %s: %w", v.Name, err)}
				return
			}
			resp.Body.Close()
			if at, _ := strconv.ParseInt(resp.Header.Get(setHeader), 10, 64); at != set.Height {
				// By another set the node may be dead already: it must not count by this one that it lives.
				answers <- answer{0, fmt.Errorf("validator %s: its set of validators is of height %d, the one known here of %d", v.Name, at, set.Height)}
				if at > set.Height {
					select {
					case newer <- struct{}{}:
					default:
					}
				}
				return
			}
			answers <- answer{v.Power, nil}
		})
	}
	var heard int64
	var errs []error
	for range vs {
		select {
		case a := <-answers:
			if a.err != nil {
				errs = append(errs, a.err)
			}
			if heard += a.power; 3*heard >= 2*total {
				return nil
			}
		case <-ctx.Done():
			return fmt.Errorf("heartbeat: heard by %d of %d of the power: %w", heard, total, errors.Join(append(errs, ctx.Err())...))
		}
	}
	select {
	case <-newer:
		if _, err := c.Validators(ctx); err != nil {
			errs = append(errs, err)
		}
	default:
	}
	return fmt.Errorf("heartbeat: heard by %d of %d of the power: %w", heard, total, errors.Join(errs...))
}

// Reports returns what each node last said of its workloads, as far as it verifies against the nodes' session keys.
func (c *Client) Reports(ctx context.Context, nodes []*ledger.Node) ([]*ledger.Heartbeat, error) {
	resp, err := c.do(ctx, http.MethodGet, "/v1/reports", nil, nil)
	if err != nil {
		return nil, fmt.Errorf("reports: %w", err)
	}
	defer resp.Body.Close()
	limit := int64(64<<20) + 1
	b, err := io.ReadAll(io.LimitReader(resp.Body, limit))
	if err != nil {
		return nil, fmt.Errorf("reports: %w", err)
	}
	var raw [][]byte
	if err := canonical.Decode(b, int(limit), &raw); err != nil {
		return nil, fmt.Errorf("reports: %w", err)
	}
	byID := map[identity.NodeID]*ledger.Node{}
	for _, n := range nodes {
		byID[n.ID] = n
	}
	var out []*ledger.Heartbeat
	for _, r := range raw {
		h, err := ledger.DecodeHeartbeat(r)
		if err != nil {
			c.log.Warn("a node's report does not count", "error", err)
			continue
		}
		n, ok := byID[h.Node]
		if !ok {
			continue // a node that the caller's view does not have yet
		}
		if err := h.Verify(c.grid, n); err != nil {
			// One node that changed its session key, or one lie, must not hide what the others say.
			c.log.Warn("a node's report does not count", "node", n.Name, "error", err)
			continue
		}
		out = append(out, h)
	}
	return out, nil
}

// keeper is the one validator that keeps blobs in this version: the first of the set.
func (c *Client) keeper() comet.Pin { return c.known().Members[0].TLS }

// HasBlob reports whether the grid holds a blob.
func (c *Client) HasBlob(ctx context.Context, d store.Digest) (bool, error) {
	resp, err := c.doAt(ctx, c.keeper(), http.MethodHead, "/v1/blob/"+d.String(), nil, nil)
	if errors.Is(err, store.ErrAbsent) {
		return false, nil
	} else if err != nil {
		return false, err
	}
	return true, resp.Body.Close()
}

// OpenBlob fetches a blob; the reader fails at its end if the bytes do not have the digest.
func (c *Client) OpenBlob(ctx context.Context, d store.Digest) (io.ReadCloser, int64, error) {
	resp, err := c.doAt(ctx, c.keeper(), http.MethodGet, "/v1/blob/"+d.String(), nil, nil)
	if err != nil {
		return nil, 0, err
	}
	return &blob{store.Verify(&cable{resp.Body}, d), d}, resp.ContentLength, nil
}

// blob says what became of a blob that does not come as it should.
type blob struct {
	io.ReadCloser
	digest store.Digest
}

func (b *blob) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	switch {
	case errors.Is(err, store.ErrDigest):
		err = fmt.Errorf("blob %v: the grid's copy is damaged: %w", b.digest, store.ErrDigest)
	case err != nil && !errors.Is(err, io.EOF):
		err = fmt.Errorf("blob %v: %w", b.digest, err)
	}
	return n, err
}

// cable tells what breaks on the way from what is wrong with the bytes: only the former is worth another try.
type cable struct{ io.ReadCloser }

func (c *cable) Read(p []byte) (int, error) {
	n, err := c.ReadCloser.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		err = fmt.Errorf("%w: %w", comet.ErrUnavailable, err)
	}
	return n, err
}

// PutBlob stores a blob in the name of an account.
func (c *Client) PutBlob(ctx context.Context, d store.Digest, size int64, r io.Reader, account identity.AccountID, key *identity.PrivateKey) error {
	keeper := c.keeper()
	resp, err := c.doAt(ctx, keeper, http.MethodPut, "/v1/blob/"+d.String(), r, func(req *http.Request) {
		req.ContentLength = size
		access.Sign(req, keeper, account, key, time.Now())
	})
	if err != nil {
		return fmt.Errorf("put blob: %w", err)
	}
	return resp.Body.Close()
}

func (c *Client) do(ctx context.Context, method, path string, body io.Reader, prepare func(*http.Request)) (*http.Response, error) {
	return c.doAt(ctx, comet.Pin{}, method, path, body, prepare)
}

// doAt asks one validator, or with no pin the one in use.
func (c *Client) doAt(ctx context.Context, pin comet.Pin, method, path string, body io.Reader, prepare func(*http.Request)) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, "https://"+LedgerName(c.grid)+path, body)
	if err != nil {
		return nil, err
	}
	if prepare != nil {
		prepare(req)
	}
	var resp *http.Response
	if pin == (comet.Pin{}) {
		resp, err = c.comet.Do(req)
	} else {
		resp, err = c.comet.DoAt(pin, req)
	}
	if err != nil {
		return nil, err
	}
	if resp.StatusCode/100 == 2 {
		return resp, nil
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusNotFound {
		return nil, fmt.Errorf("%s: %w", path, store.ErrAbsent)
	}
	msg, _ := io.ReadAll(io.LimitReader(resp.Body, 4<<10))
	return nil, fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, strings.TrimSpace(string(msg)))
}
