package comet

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"holdfast/internal/canonical"
)

// Errors that a caller may want to tell apart. Those from ErrProof on say that a server lies, or is broken.
var (
	ErrRefused     = errors.New("transaction refused")
	ErrUnavailable = errors.New("ledger is unavailable")
	ErrTooLarge    = errors.New("answer is too large") // of a Read; one of fewer keys may not be
	ErrProof       = errors.New("answer is not proven")
	ErrRollback    = errors.New("server is behind what was seen before")
	ErrFork        = errors.New("chain is forked")
	ErrStale       = errors.New("head of the chain is too old")
)

func trimRefused(err error) string { return strings.TrimPrefix(err.Error(), ErrRefused.Error()+": ") }

// Committed is what became of a transaction, and at which height.
type Committed struct {
	Height int64
	Result
}

// Server is how a client reaches one validator's API.
type Server struct {
	Dial func(ctx context.Context) (net.Conn, error) // required
	Name string                                      // TLS server name; empty means "ledger"
	Pins []Pin                                       // the server's key must be one of these; at least one
}

// ClientConfig is a client's configuration.
type ClientConfig struct {
	Servers []Server   // at least one; the next is tried when one fails or lies
	Genesis Genesis    // State may be empty
	Trust   TrustStore // keeps the newest header over restarts; nil keeps it as long as the Client
	Verify  Verifier   // required
	// Certificate says who the client is, to servers that keep places for it; nil is a stranger.
	Certificate   *tls.Certificate
	MaxAge        time.Duration // an older head is refused as stale; 0 means 30s
	MaxClockDrift time.Duration // a head further in the future is refused; 0 means 10s
	TrustPeriod   time.Duration // how long a header, or the genesis, vouches for later ones; 0 means for ever
	Log           *slog.Logger  // nil discards
}

// Client reads the ledger and submits to it, through servers that it does not trust. It is safe for concurrent use.
type Client struct {
	c     ClientConfig
	log   *slog.Logger
	chain *chain
	now   func() time.Time

	load    sync.Once
	loadErr error

	mu      sync.Mutex
	current int // index of the server in use
	servers []*server
}

// server is one server and its connections.
type server struct {
	name string
	pin  Pin // its first
	http *http.Transport

	mu      sync.Mutex
	checked bool // its chain holds the header that was trusted when it was first asked
}

// NewClient checks a configuration. It dials nothing and reads nothing.
func NewClient(c ClientConfig) (*Client, error) {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Verify == nil {
		return nil, errors.New("ledger client has no verifier")
	}
	if len(c.Servers) == 0 {
		return nil, errors.New("ledger client has no servers")
	}
	c.MaxAge = or(c.MaxAge, 30*time.Second)
	if err := c.Genesis.check(); err != nil {
		return nil, err
	}
	ch, err := newChain(&c.Genesis, &c)
	if err != nil {
		return nil, err
	}
	cl := &Client{c: c, log: c.Log, chain: ch, now: time.Now}
	for i, s := range c.Servers {
		if s.Dial == nil || len(s.Pins) == 0 {
			return nil, fmt.Errorf("ledger server %d has no way to it or no pin", i)
		}
		if s.Name == "" {
			s.Name = "ledger"
		}
		cl.servers = append(cl.servers, newServer(s, c.Certificate))
	}
	return cl, nil
}

func newServer(s Server, own *tls.Certificate) *server {
	pins := slices.Clone(s.Pins)
	conf := &tls.Config{
		MinVersion:       tls.VersionTLS13,
		ServerName:       s.Name,
		CurvePreferences: []tls.CurveID{tls.X25519MLKEM768},
		NextProtos:       []string{"h2"},
		// The pin says who the server is; names and authorities do not matter.
		InsecureSkipVerify: true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			if len(cs.PeerCertificates) == 0 {
				return errors.New("server has no certificate")
			}
			return checkPin(cs.PeerCertificates[0], pins)
		},
	}
	if own != nil {
		conf.Certificates = []tls.Certificate{*own}
	}
	var only http.Protocols
	only.SetHTTP2(true)
	return &server{name: s.Name, pin: pins[0], http: &http.Transport{
		DialTLSContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
			defer cancel()
			raw, err := s.Dial(ctx)
			if err != nil {
				return nil, err
			}
			c := tls.Client(raw, conf)
			if err := c.HandshakeContext(ctx); err != nil {
				raw.Close()
				return nil, fmt.Errorf("TLS with ledger server %s: %w", s.Name, err)
			}
			return c, nil
		},
		Protocols:          &only,
		ForceAttemptHTTP2:  true,
		DisableCompression: true,
		IdleConnTimeout:    90 * time.Second,
		HTTP2:              &http.HTTP2Config{SendPingTimeout: 5 * time.Second, PingTimeout: 5 * time.Second},
	}}
}

func checkPin(c *x509.Certificate, pins []Pin) error {
	if p := Pin(sha256.Sum256(c.RawSubjectPublicKeyInfo)); !slices.Contains(pins, p) {
		return fmt.Errorf("server's key %x is not the pinned one", p[:8])
	}
	return nil
}

// Close saves the newest header and closes idle connections.
func (c *Client) Close() error {
	c.mu.Lock()
	for _, s := range c.servers {
		s.http.CloseIdleConnections()
	}
	c.mu.Unlock()
	return c.chain.flush()
}

// View is the proven values of some keys at one height.
type View struct {
	Height int64     // of the state
	Time   time.Time // of the header that proves it

	values map[string][]byte // nil for absent
}

// Value returns the value of a key, and whether it is present. It panics on a key that was not asked for: to take that
// for absent would be wrong.
func (v View) Value(key string) ([]byte, bool) {
	b, ok := v.values[key]
	if !ok {
		panic(fmt.Sprintf("comet: key %q is not in the view", key))
	}
	return b, b != nil
}

// Read returns the values of at most MaxKeys keys at the newest provable height.
func (c *Client) Read(ctx context.Context, keys ...string) (View, error) {
	return c.ReadAt(ctx, 0, keys...)
}

// ReadAt is Read at minHeight or above: after a Submit that returned this height it shows what was submitted.
func (c *Client) ReadAt(ctx context.Context, minHeight int64, keys ...string) (View, error) {
	r := readRequest{MinHeight: minHeight}
	asked := make(map[string]bool, len(keys))
	for _, k := range keys {
		if !asked[k] { // a server refuses to say the same twice
			r.Keys = append(r.Keys, []byte(k))
		}
		asked[k] = true
	}
	if err := r.check(); err != nil {
		return View{}, fmt.Errorf("read ledger: %w", err)
	}
	var out View
	err := c.each(ctx, func(ctx context.Context, s *server) (err error) {
		out, err = c.read(ctx, s, r)
		return err
	})
	if err != nil {
		return View{}, fmt.Errorf("read ledger: %w", err)
	}
	return out, nil
}

func (c *Client) read(ctx context.Context, s *server, r readRequest) (View, error) {
	v, _, _, err := c.prove(ctx, s, r)
	return v, err
}

// prove is read, with the header and the proofs that it rests on.
func (c *Client) prove(ctx context.Context, s *server, r readRequest) (View, *block, []entry, error) {
	base := c.chain.trusted()
	r.MinHeight = max(r.MinHeight, base.Height-1) // a server a block behind catches up while we wait
	r.Validators = base.ValidatorsHash
	var a readAnswer
	if err := s.call(ctx, pathRead, canonical.Encode(r), maxAnswer, &a); err != nil {
		return View{}, nil, nil, err
	}
	b, err := c.accept(ctx, s, base, a.Head)
	if err != nil {
		return View{}, nil, nil, err
	}
	v := View{Height: b.Height - 1, Time: b.Time, values: make(map[string][]byte, len(r.Keys))}
	if v.Height < r.MinHeight {
		return View{}, nil, nil, fmt.Errorf("%w: state of height %d, wanted %d", ErrRollback, v.Height, r.MinHeight)
	}
	if len(a.Entries) != len(r.Keys) {
		return View{}, nil, nil, fmt.Errorf("%w: %d entries for %d keys", ErrProof, len(a.Entries), len(r.Keys))
	}
	if len(b.AppHash) != 32 {
		return View{}, nil, nil, fmt.Errorf("%w: app hash of %d bytes", ErrProof, len(b.AppHash))
	}
	for i, k := range r.Keys {
		e := a.Entries[i]
		value := []byte(nil)
		if e.Present {
			value = append([]byte{}, e.Value...)
		}
		if err := c.c.Verify([32]byte(b.AppHash), string(k), value, e.Proof); err != nil {
			return View{}, nil, nil, fmt.Errorf("%w: key %q at height %d: %w", ErrProof, k, v.Height, err)
		}
		v.values[string(k)] = value
	}
	return v, b, a.Entries, nil
}

// accept verifies a head and that it is fresh.
func (c *Client) accept(ctx context.Context, s *server, base *block, h head) (*block, error) {
	b, err := newBlock(h, base)
	if err != nil {
		return nil, err
	}
	now := c.now()
	if err := c.chain.verify(ctx, base, b, now, func(ctx context.Context, height int64) (*block, error) {
		return c.fetch(ctx, s, height, base)
	}); err != nil {
		return nil, err
	}
	if ahead := b.Time.Sub(now); ahead > c.chain.drift {
		return nil, fmt.Errorf("%w: header %d is %v in the future", ErrProof, b.Height, ahead.Round(time.Second))
	}
	if age := now.Sub(b.Time); age > c.c.MaxAge {
		return nil, fmt.Errorf("%w: header %d is %v old", ErrStale, b.Height, age.Round(time.Second))
	}
	return b, nil
}

func newBlock(h head, base *block) (*block, error) {
	sh, set, err := decodeHead(h)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrProof, err)
	}
	if set == nil && bytes.Equal(sh.ValidatorsHash, base.ValidatorsHash) {
		set = base.set
	}
	return &block{SignedHeader: sh, set: set}, nil
}

// fetch gets a header, unverified.
func (c *Client) fetch(ctx context.Context, s *server, height int64, base *block) (*block, error) {
	var h head
	if err := s.call(ctx, pathHeader, canonical.Encode(headerRequest{Height: height, Validators: base.ValidatorsHash}), maxAnswer, &h); err != nil {
		return nil, err
	}
	b, err := newBlock(h, base)
	if err != nil {
		return nil, err
	}
	if height != 0 && b.Height != height {
		return nil, fmt.Errorf("%w: header %d, wanted %d", ErrProof, b.Height, height)
	}
	return b, nil
}

// Head advances to the newest header without reading anything, and returns its height and time.
func (c *Client) Head(ctx context.Context) (height int64, at time.Time, err error) {
	v, err := c.Read(ctx)
	if err != nil {
		return 0, time.Time{}, err
	}
	return v.Height + 1, v.Time, nil
}

// Watch returns a height at or above that of the next change after the state of a height, or the same height when for
// about 25 s there was none. It is a hint: only a Read proves.
func (c *Client) Watch(ctx context.Context, after int64) (int64, error) {
	var a watchAnswer
	err := c.each(ctx, func(ctx context.Context, s *server) error {
		return s.call(ctx, pathWatch, canonical.Encode(watchRequest{After: after}), maxProblem, &a)
	})
	if err != nil {
		return 0, fmt.Errorf("watch ledger: %w", err)
	}
	return max(a.Height, after), nil
}

// Submit sends a transaction and returns when it is committed, with a code other than 0 when the block that it is in
// found it bad. To send the same bytes again is safe and returns what became of them. A transaction that no block takes
// is ErrRefused. The answer is one server's word; ReadAt the height proves what the transaction did.
func (c *Client) Submit(ctx context.Context, tx []byte) (Committed, error) {
	if len(tx) == 0 || len(tx) > MaxTx {
		return Committed{}, fmt.Errorf("submit transaction: %w: it has %d bytes, from 1 to %d are allowed", ErrRefused, len(tx), MaxTx)
	}
	var a txAnswer
	for {
		err := c.each(ctx, func(ctx context.Context, s *server) error {
			return s.call(ctx, pathTx, tx, 8<<10, &a)
		})
		var p *Problem
		if errors.As(err, &p) && p.Kind == kindPending && ctx.Err() == nil {
			continue
		}
		if err != nil {
			return Committed{}, fmt.Errorf("submit transaction: %w", err)
		}
		return Committed{Height: a.Height, Result: Result{Code: a.Code, Log: a.Log}}, nil
	}
}

// Do sends a request for one of Config.Handlers over the pinned connection to the server in use. The URL's scheme and
// host do not matter. The answer is that server's word.
func (c *Client) Do(r *http.Request) (*http.Response, error) {
	s, i := c.inUse()
	resp, err := s.do(r)
	if err != nil && r.Context().Err() == nil {
		c.moveOn(i)
	}
	return resp, err
}

// DoAt is Do to the server whose first pin this is, and no other.
func (c *Client) DoAt(pin Pin, r *http.Request) (*http.Response, error) {
	c.mu.Lock()
	i := slices.IndexFunc(c.servers, func(s *server) bool { return s.pin == pin })
	var s *server
	if i >= 0 {
		s = c.servers[i]
	}
	c.mu.Unlock()
	if s == nil {
		return nil, fmt.Errorf("ledger server %x: %w: it is none of this client's", pin[:8], ErrUnavailable)
	}
	return s.do(r)
}

// SetServers replaces the servers. One that was there, by its first pin, keeps its connections.
func (c *Client) SetServers(ss []Server) error {
	if len(ss) == 0 {
		return errors.New("ledger client has no servers")
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	used := c.servers[c.current].pin
	next := make([]*server, len(ss))
	for i, s := range ss {
		if s.Dial == nil || len(s.Pins) == 0 {
			return fmt.Errorf("ledger server %d has no way to it or no pin", i)
		}
		if j := slices.IndexFunc(c.servers, func(o *server) bool { return o.pin == s.Pins[0] }); j >= 0 {
			next[i] = c.servers[j]
			continue
		}
		if s.Name == "" {
			s.Name = "ledger"
		}
		next[i] = newServer(s, c.c.Certificate)
	}
	for _, s := range c.servers {
		if !slices.Contains(next, s) {
			s.http.CloseIdleConnections()
		}
	}
	c.servers, c.current = next, max(0, slices.IndexFunc(next, func(s *server) bool { return s.pin == used }))
	return nil
}

func (c *Client) inUse() (*server, int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.servers[c.current], c.current
}

func (c *Client) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.servers)
}

// moveOn takes the next server if the one that failed is still in use.
func (c *Client) moveOn(failed int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.current == failed {
		c.current = (failed + 1) % len(c.servers)
	}
}

// each tries f on the server in use and then on the others.
func (c *Client) each(ctx context.Context, f func(context.Context, *server) error) error {
	c.load.Do(func() { c.loadErr = c.chain.load() })
	if c.loadErr != nil {
		return c.loadErr
	}
	var errs []error
	for range c.count() {
		s, i := c.inUse()
		err := c.compare(ctx, s)
		if err == nil {
			err = f(ctx, s)
		}
		if err == nil {
			return nil
		}
		var p *Problem
		if errors.As(err, &p) && (p.Kind == kindRefused || p.Kind == kindRequest || p.Kind == kindLarge || p.Kind == kindPending) {
			return err // another server says the same
		}
		if ctx.Err() != nil {
			return errors.Join(append(errs, context.Cause(ctx))...)
		}
		s.mu.Lock()
		s.checked = false
		s.mu.Unlock()
		if c.count() > 1 {
			c.log.Warn("ledger server failed", "server", s.name, "index", i, "error", err)
		}
		errs = append(errs, err)
		c.moveOn(i)
	}
	return errors.Join(errs...)
}

// compare asks a server that was not asked before, or failed, for the header that is trusted, and so finds a fork that
// a higher header would hide.
func (c *Client) compare(ctx context.Context, s *server) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.checked {
		return nil
	}
	base := c.chain.trusted()
	if base.Height > 0 {
		b, err := c.fetch(ctx, s, base.Height, base)
		var p *Problem
		switch {
		case errors.As(err, &p) && p.Kind == kindGone: // too old to be kept
		case errors.As(err, &p) && p.Kind == kindBehind:
			return fmt.Errorf("%w: %w", ErrRollback, err)
		case err != nil:
			return err
		case !bytes.Equal(b.Hash(), base.Hash()):
			return c.chain.fork(b)
		}
	}
	s.checked = true
	return nil
}

// Problem is a server's answer that is not a success.
type Problem struct {
	Status  int
	Kind    string // see docs/formats/ledger-api.md
	Message string
}

func (p *Problem) Error() string { return p.Message }

// Is makes a Problem one of the errors above.
func (p *Problem) Is(target error) bool {
	switch target {
	case ErrRefused:
		return p.Kind == kindRefused
	case ErrTooLarge:
		return p.Kind == kindLarge
	case ErrUnavailable:
		return p.Kind == kindBehind || p.Kind == kindBusy || p.Kind == kindPending
	}
	return false
}

func (s *server) do(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.URL.Scheme, r.URL.Host, r.Host = "https", s.name, s.name
	resp, err := s.http.RoundTrip(r)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return resp, nil
}

func (s *server) call(ctx context.Context, path string, body []byte, limit int, out any) error {
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://ledger"+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	r.Header.Set("Content-Type", contentType)
	resp, err := s.do(r)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		b, err := io.ReadAll(io.LimitReader(resp.Body, maxProblem))
		var p problem
		if err != nil || decode(b, maxProblem, &p) != nil {
			return fmt.Errorf("%w: server answers with status %d", ErrUnavailable, resp.StatusCode)
		}
		return &Problem{Status: resp.StatusCode, Kind: p.Kind, Message: p.Message}
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, int64(limit)+1))
	if err != nil {
		return fmt.Errorf("%w: read answer: %w", ErrUnavailable, err)
	}
	if err := decode(b, limit, out); err != nil {
		return fmt.Errorf("%w: decode answer: %w", ErrProof, err)
	}
	return nil
}
