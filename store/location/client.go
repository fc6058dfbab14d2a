package location

import (
	"cmp"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// ClientConfig configures a Client.
type ClientConfig struct {
	Addr        string // host:port
	Pin         Pin    // of the location's key
	Certificate tls.Certificate
	Conns       int                                                      // at most; 0 means 16
	Dial        func(ctx context.Context, addr string) (net.Conn, error) // nil dials TCP
}

// Client is a Location elsewhere. It may be used by many at once; each request has a connection to itself.
type Client struct {
	cfg    ClientConfig
	tls    *tls.Config
	places chan struct{}
	front  atomic.Pointer[front] // nil before Announce

	mu     sync.Mutex
	idle   []*link // the last is the warmest
	closed bool
}

var _ Location = (*Client)(nil)

// link is a connection to a location.
type link struct {
	raw  net.Conn
	t    net.Conn // TLS over it
	used bool     // it has answered before: it may have been closed since
	at   time.Time
	buf  [16 << 10]byte // a request with a small body
	head [frameSize]byte
}

// NewClient checks the configuration; it dials when it is used.
func NewClient(cfg ClientConfig) (*Client, error) {
	if cfg.Addr == "" || len(cfg.Certificate.Certificate) == 0 {
		return nil, errors.New("client of a location: neither address nor certificate")
	}
	cfg.Conns = cmp.Or(cfg.Conns, 16)
	if cfg.Dial == nil {
		cfg.Dial = func(ctx context.Context, addr string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", addr)
		}
	}
	return &Client{cfg: cfg, tls: tlsConfig(cfg.Certificate, func(p Pin) bool { return p == cfg.Pin }), places: make(chan struct{}, cfg.Conns)}, nil
}

// Close closes the connections that are idle, and those that are not when their requests have ended.
func (c *Client) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	for _, l := range c.idle {
		l.raw.Close()
	}
	c.idle = nil
	return nil
}

// take returns a connection: an idle one, unless fresh asks for a new one.
func (c *Client) take(ctx context.Context, fresh bool) (*link, error) {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil, net.ErrClosed
	}
	for !fresh && len(c.idle) > 0 {
		l := c.idle[len(c.idle)-1]
		c.idle = c.idle[:len(c.idle)-1]
		if time.Since(l.at) < idleTime/2 {
			c.mu.Unlock()
			return l, nil
		}
		l.raw.Close()
	}
	c.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, handshakeTime)
	defer cancel()
	raw, err := c.cfg.Dial(ctx, c.cfg.Addr)
	if err != nil {
		return nil, err
	}
	t := tls.Client(newWire(raw), c.tls)
	if err := t.HandshakeContext(ctx); err != nil {
		raw.Close()
		return nil, err
	}
	return &link{raw: raw, t: t}, nil
}

func (c *Client) give(l *link) {
	l.used, l.at = true, time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		l.raw.Close()
		return
	}
	c.idle = append(c.idle, l)
}

// answer is what came back: the last frame's value, and the body, in the caller's buffer if there was one.
type answer struct {
	value uint64
	body  []byte
}

// do makes a request. into, if it is not nil, takes the answer's body, which must fill it. Every request may be made
// twice, so that a connection which the location has closed meanwhile is no error.
func (c *Client) do(ctx context.Context, r request, into []byte, body ...[]byte) (answer, error) {
	if err := ctx.Err(); err != nil {
		return answer{}, err
	}
	select {
	case c.places <- struct{}{}:
	default:
		select {
		case c.places <- struct{}{}:
		case <-ctx.Done():
			return answer{}, ctx.Err()
		}
	}
	defer func() { <-c.places }()
	for fresh := false; ; fresh = true {
		l, err := c.take(ctx, fresh)
		if err != nil {
			return answer{}, fmt.Errorf("location %s: %w", c.cfg.Addr, err)
		}
		again := l.used
		a, err := l.ask(ctx, r, into, body...)
		var of *remote
		if err == nil || errors.As(err, &of) {
			c.give(l)
			return a, err
		}
		l.raw.Close()
		switch {
		case ctx.Err() != nil:
			return a, ctx.Err()
		case !again || errors.Is(err, errWire):
			return a, fmt.Errorf("location %s: %w", c.cfg.Addr, err)
		}
	}
}

func (l *link) ask(ctx context.Context, r request, into []byte, body ...[]byte) (a answer, err error) {
	size := 0
	for _, b := range body {
		size += len(b)
	}
	l.raw.SetDeadline(time.Now().Add(deadlineFor(int64(size + len(into)))))
	if ctx.Done() != nil {
		stop := context.AfterFunc(ctx, func() { l.raw.SetDeadline(time.Unix(1, 0)) })
		defer func() {
			if !stop() && err == nil {
				err = ctx.Err() // its deadline is not to be trusted any more
			}
		}()
	}
	r.size = uint32(size)
	r.put(l.buf[:])
	n := requestSize
	for _, b := range body {
		m := copy(l.buf[n:], b)
		if n += m; m == len(b) {
			continue
		}
		if _, err = l.t.Write(l.buf[:n]); err == nil {
			_, err = l.t.Write(b[m:])
		}
		if n = 0; err != nil {
			return a, err
		}
	}
	if _, err = l.t.Write(l.buf[:n]); err != nil {
		return a, err
	}
	have := 0
	for {
		if _, err = io.ReadFull(l.t, l.head[:]); err != nil {
			return a, err
		}
		f, err := parseFrame(l.head[:])
		if err != nil {
			return a, err
		}
		p := []byte(nil)
		switch {
		case f.status != 0 || into == nil && !f.more:
			p = make([]byte, f.size)
		case into == nil || int(f.size) > len(into)-have || f.more && f.size == 0:
			return a, errWire
		default:
			p = into[have:][:f.size]
			have += len(p)
		}
		if _, err := io.ReadFull(l.t, p); err != nil {
			return a, err
		}
		switch {
		case f.status != 0:
			return a, failureOf(f.status, p)
		case f.more:
			continue
		case into != nil && have != len(into):
			return a, errWire
		}
		return answer{f.value, p}, nil
	}
}

// simple makes a request whose answer says nothing.
func (c *Client) simple(ctx context.Context, op string, r request, body []byte) error {
	r.front = c.as()
	_, err := c.do(ctx, r, nil, body)
	return named(op, r.name, err)
}

// as is who writes.
func (c *Client) as() front {
	if f := c.front.Load(); f != nil {
		return *f
	}
	return front{}
}

// Announce implements Location.
func (c *Client) Announce(ctx context.Context, e Epoch, h Holder) error {
	if _, err := c.do(ctx, request{op: opAnnounce, front: front{epoch: e}}, nil, h[:]); err != nil {
		return fmt.Errorf("announce epoch %d: %w", e, err)
	}
	c.front.Store(&front{e, h})
	return nil
}

// Put implements Location.
func (c *Client) Put(ctx context.Context, n Name, shard []byte, retain time.Time) error {
	if len(shard) > MaxShard {
		return named("put", n, ErrSize)
	}
	return c.simple(ctx, "put", request{op: opPut, name: n, a: ms(retain)}, shard)
}

// Get implements Location.
func (c *Client) Get(ctx context.Context, n Name, off int64, p []byte) error {
	if off < 0 || off > MaxShard || len(p) > MaxShard {
		return named("get", n, ErrSize)
	}
	if p == nil {
		p = []byte{}
	}
	_, err := c.do(ctx, request{op: opGet, name: n, a: uint64(off), b: uint64(len(p))}, p)
	return named("get", n, err)
}

// Stat implements Location.
func (c *Client) Stat(ctx context.Context, n Name) (Info, error) {
	a, err := c.do(ctx, request{op: opStat, name: n}, nil)
	if err != nil {
		return Info{}, named("stat", n, err)
	}
	infos, err := parseInfos(a.body)
	if err != nil || len(infos) != 1 || infos[0].Name != n {
		return Info{}, named("stat", n, errWire)
	}
	return infos[0], nil
}

// List implements Location. Names come in order, whatever the location says.
func (c *Client) List(ctx context.Context, from Name, which Which) (page []Info, next Name, err error) {
	a, err := c.do(ctx, request{op: opList, name: from, a: uint64(which)}, nil)
	if err == nil {
		page, next, err = parsePage(from, a)
	}
	if err != nil {
		return nil, Name{}, fmt.Errorf("list: %w", err)
	}
	return page, next, nil
}

// Delete implements Location.
func (c *Client) Delete(ctx context.Context, n Name) error {
	return c.simple(ctx, "delete", request{op: opDelete, name: n}, nil)
}

// Undelete implements Location.
func (c *Client) Undelete(ctx context.Context, n Name) error {
	return c.simple(ctx, "undelete", request{op: opUndelete, name: n}, nil)
}

// Purge implements Location.
func (c *Client) Purge(ctx context.Context, n Name) error {
	return c.simple(ctx, "purge", request{op: opPurge, name: n}, nil)
}

// Retain implements Location.
func (c *Client) Retain(ctx context.Context, n Name, until time.Time) error {
	return c.simple(ctx, "retain", request{op: opRetain, name: n, a: ms(until)}, nil)
}

// PutHead implements Location.
func (c *Client) PutHead(ctx context.Context, sequence uint64, signed []byte) error {
	f := c.as()
	err := ErrSize
	if len(signed) <= MaxHead {
		_, err = c.do(ctx, request{op: opPutHead, front: f, a: sequence}, nil, signed)
	}
	if err != nil {
		return fmt.Errorf("put head %d of epoch %d: %w", sequence, f.epoch, err)
	}
	return nil
}

// Append implements Location.
func (c *Client) Append(ctx context.Context, n Name, shard []byte, sequence uint64, signed []byte) error {
	f := c.as()
	err := ErrSize
	if len(signed) <= MaxHead && len(shard) <= MaxShard {
		_, err = c.do(ctx, request{op: opAppend, front: f, name: n, a: sequence, b: uint64(len(signed))}, nil, signed, shard)
	}
	return appended(n, f.epoch, sequence, err)
}

// Head implements Location.
func (c *Client) Head(ctx context.Context) (Head, error) {
	a, err := c.do(ctx, request{op: opHead}, nil)
	if err == nil && (len(a.body) < 8 || len(a.body) > 8+MaxHead) {
		err = errWire
	}
	if err != nil {
		return Head{}, fmt.Errorf("head: %w", err)
	}
	return Head{Epoch(binary.BigEndian.Uint64(a.body)), a.value, a.body[8:]}, nil
}

// Earlier implements Location.
func (c *Client) Earlier(ctx context.Context) (all []Head, err error) {
	a, err := c.do(ctx, request{op: opEarlier}, nil)
	if err == nil {
		all, err = parseHeads(a.body)
	}
	if err != nil {
		return nil, fmt.Errorf("earlier heads: %w", err)
	}
	return all, nil
}

// Prove implements Location.
func (c *Client) Prove(ctx context.Context, n Name, leaves []int) (p Proof, err error) {
	if len(leaves) == 0 || len(leaves) > MaxLeaves {
		return p, named("prove", n, ErrSize)
	}
	body := make([]byte, 0, 4*len(leaves))
	for _, l := range leaves {
		body = binary.BigEndian.AppendUint32(body, uint32(max(l, -1)))
	}
	a, err := c.do(ctx, request{op: opProve, name: n}, nil, body)
	if err == nil {
		p, err = parseProof(a.value, a.body)
	}
	return p, named("prove", n, err)
}

// Status implements Location.
func (c *Client) Status(ctx context.Context) (s Status, err error) {
	a, err := c.do(ctx, request{op: opStatus}, nil)
	if err == nil {
		s, err = parseStatus(a.body)
	}
	if err != nil {
		return s, fmt.Errorf("status: %w", err)
	}
	return s, nil
}
