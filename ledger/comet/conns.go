package comet

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"
)

// What strangers together may use, and the same again for those who are known by their certificates: so strangers take
// nothing from nodes, whatever they do among themselves.
const (
	maxConns = 1024     // connections of strangers
	perKnown = 4        // connections of one who is known
	maxWork  = 8        // answers being made: each takes at most a few times maxReadSize
	maxTxs   = 256      // transactions under way
	maxAsked = 8192     // requests under way, those that only wait included: each costs some 14 KiB
	maxHeld  = 64 << 20 // bytes of requests that are not answered yet and of answers that are not taken yet
	peerHeld = 16 << 20 // of these, on one connection
	heldWait = 5 * time.Second
	// heldYoung is how long bytes may be held though others wait for the room.
	heldYoung = time.Second
	// askAgain is how often a key that is not known is looked up again: a node may be admitted while it is connected.
	askAgain = time.Second
)

// conns is the open connections and what is held for them.
type conns struct {
	max   int            // strangers
	asks  int            // requests under way in each share
	known func(Pin) bool // may be nil

	mu        sync.Mutex
	strangers share
	friends   share
	from      map[netip.Prefix]int   // connections of strangers
	keys      map[Pin]map[*peer]bool // connections of those who are known
}

// share is what one class of clients uses.
type share struct {
	work, txs chan struct{}
	open      map[*peer]bool
	asked     int // requests under way
	held      int
	holds     map[*hold]bool
	freed     chan struct{} // closed, and replaced, when bytes are given back
}

// hold is bytes that are in memory for a client until it takes or sends the rest.
type hold struct {
	p     *peer
	share *share
	n     int
	at    time.Time
}

func newShare() share {
	return share{work: make(chan struct{}, maxWork), txs: make(chan struct{}, maxTxs), open: map[*peer]bool{}, holds: map[*hold]bool{}, freed: make(chan struct{})}
}

func newConns(limit int, known func(Pin) bool) *conns {
	if limit <= 0 {
		limit = maxConns
	}
	return &conns{max: limit, asks: maxAsked, known: known, strangers: newShare(), friends: newShare(), from: map[netip.Prefix]int{}, keys: map[Pin]map[*peer]bool{}}
}

// peer is one connection. What follows the bucket is guarded by conns.mu.
type peer struct {
	net.Conn
	all  *conns
	from netip.Prefix
	rate bucket

	share  *share
	pin    *Pin      // nil for a stranger
	asked  time.Time // when its key was last looked up
	closed bool
	busy   bool      // requests are under way
	asks   int       // how many
	at     time.Time // of its newest request, or of the end of the last
	held   int
}

// place is where a connection comes from, as far as an address tells: one machine, or one network of IPv6.
func place(a net.Addr) netip.Prefix {
	ap, err := netip.ParseAddrPort(a.String())
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

// listener makes every connection a peer. When there is no place for another stranger, one goes: of the address that
// has the most, the one that has asked for nothing for the longest. To refuse the newcomer instead would let whoever
// came first lock out everybody.
type listener struct {
	net.Listener
	all *conns
}

func (l *listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	now := time.Now()
	p := &peer{Conn: c, all: l.all, from: place(c.RemoteAddr()), at: now, rate: bucket{tokens: burstPerConn, at: now}}
	l.all.add(p)
	return p, nil
}

func (s *conns) add(p *peer) {
	s.mu.Lock()
	p.share = &s.strangers
	s.strangers.open[p] = true
	s.from[p.from]++
	var out *peer
	if len(s.strangers.open) > s.max {
		for q := range s.strangers.open {
			if q != p && (out == nil || s.before(q, out)) {
				out = q
			}
		}
	}
	s.mu.Unlock()
	if out != nil {
		out.Close()
	}
}

// before says whether a is to go before b.
func (s *conns) before(a, b *peer) bool {
	if x, y := s.from[a.from], s.from[b.from]; a.pin == nil && b.pin == nil && x != y {
		return x > y
	}
	if a.busy != b.busy {
		return b.busy
	}
	return a.at.Before(b.at)
}

// Close gives the place back.
func (p *peer) Close() error {
	p.all.mu.Lock()
	if !p.closed {
		p.closed = true
		p.all.leave(p)
		p.share.asked -= p.asks // they are ending: nobody else has to give way for them
	}
	p.all.mu.Unlock()
	return p.Conn.Close()
}

// leave takes a connection out of its share; what is held for it stays held until its requests have ended.
func (s *conns) leave(p *peer) {
	delete(p.share.open, p)
	if p.pin != nil {
		if delete(s.keys[*p.pin], p); len(s.keys[*p.pin]) == 0 {
			delete(s.keys, *p.pin)
		}
	} else if s.from[p.from]--; s.from[p.from] == 0 {
		delete(s.from, p.from)
	}
}

// peerOf is the peer below a TLS connection.
func peerOf(c net.Conn) (*tls.Conn, *peer) {
	t, ok := c.(*tls.Conn)
	if !ok {
		return nil, nil
	}
	p, _ := t.NetConn().(*peer)
	return t, p
}

// state is told by the server when requests begin and end on a connection, the first time after the handshake: only
// then is it proved that the client has the key of the certificate that it showed.
func (s *conns) state(c net.Conn, st http.ConnState) {
	if st != http.StateActive && st != http.StateIdle {
		return
	}
	t, p := peerOf(c)
	if p == nil {
		return
	}
	now := time.Now()
	s.mu.Lock()
	p.busy, p.at = st == http.StateActive, now
	ask := s.known != nil && p.pin == nil && now.Sub(p.asked) > askAgain
	if ask {
		p.asked = now
	}
	s.mu.Unlock()
	if !ask {
		return
	}
	cs := t.ConnectionState()
	if !cs.HandshakeComplete || len(cs.PeerCertificates) == 0 {
		return
	}
	pin := Pin(sha256.Sum256(cs.PeerCertificates[0].RawSubjectPublicKeyInfo))
	if s.known(pin) {
		s.befriend(p, pin)
	}
}

// befriend moves a connection to those who are known. A key has few of them; its idlest goes.
func (s *conns) befriend(p *peer, pin Pin) {
	s.mu.Lock()
	if p.closed || p.pin != nil {
		s.mu.Unlock()
		return
	}
	s.leave(p)
	s.strangers.asked -= p.asks
	s.friends.asked += p.asks
	p.pin, p.share = &pin, &s.friends
	s.friends.open[p] = true
	mine := s.keys[pin]
	if mine == nil {
		mine = map[*peer]bool{}
		s.keys[pin] = mine
	}
	mine[p] = true
	var out *peer
	if len(mine) > perKnown {
		for q := range mine {
			if q != p && (out == nil || s.before(q, out)) {
				out = q
			}
		}
	}
	s.mu.Unlock()
	if out != nil {
		out.Close()
	}
}

// shareOf is what the client of a request may use.
func (s *conns) shareOf(p *peer) *share {
	if p == nil {
		return &s.strangers
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return p.share
}

func crowded(format string, args ...any) error {
	return &failure{http.StatusServiceUnavailable, kindBusy, fmt.Errorf(format, args...)}
}

// hold takes n bytes of the memory for requests and answers. When there is no room, the connection goes that has held
// the most for the longest: an answer that nobody takes costs its own client and not the others.
func (s *conns) hold(ctx context.Context, p *peer, n int) (release func(), err error) {
	t := time.NewTimer(heldWait)
	defer t.Stop()
	for {
		now := time.Now()
		s.mu.Lock()
		sh := p.share
		switch {
		case p.closed:
			s.mu.Unlock()
			return nil, net.ErrClosed
		case p.held+n > peerHeld:
			s.mu.Unlock()
			return nil, crowded("answers on this connection are not taken")
		case sh.held+n <= maxHeld:
			h := &hold{p, sh, n, now}
			sh.holds[h] = true
			sh.held += n
			p.held += n
			s.mu.Unlock()
			return sync.OnceFunc(func() { s.release(h) }), nil
		}
		var out *hold
		for h := range sh.holds {
			if now.Sub(h.at) >= heldYoung && (out == nil || float64(h.n)*now.Sub(h.at).Seconds() > float64(out.n)*now.Sub(out.at).Seconds()) {
				out = h
			}
		}
		freed := sh.freed
		s.mu.Unlock()
		if out != nil {
			out.p.Close()
		}
		select {
		case <-freed:
		case <-time.After(heldYoung / 4): // what was young grows old
		case <-t.C:
			return nil, crowded("the server holds as many answers as it can")
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (s *conns) release(h *hold) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(h.share.holds, h)
	h.share.held -= h.n
	h.p.held -= h.n
	close(h.share.freed)
	h.share.freed = make(chan struct{})
}

type peerKey struct{}

// Hold takes n bytes of the memory that a validator has for requests and answers, for a request of one of
// Config.Handlers with this context, until release. The error is for the client: it is asked to come back.
func (v *Validator) Hold(ctx context.Context, n int) (release func(), err error) {
	p, ok := ctx.Value(peerKey{}).(*peer)
	if !ok {
		return nil, errors.New("not a request of this server")
	}
	return v.conns.hold(ctx, p, n)
}

// bucket bounds the rate of requests on one connection.
type bucket struct {
	mu     sync.Mutex
	tokens float64
	at     time.Time
}

func (b *bucket) take(now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.tokens = min(burstPerConn, b.tokens+now.Sub(b.at).Seconds()*ratePerConn)
	b.at = now
	if b.tokens < 1 {
		return false
	}
	b.tokens--
	return true
}

// begin counts a request. When there are too many, the connection goes that has the most of them; to refuse all that
// come later would let who waits for nothing lock out everybody.
func (s *conns) begin(p *peer) error {
	s.mu.Lock()
	if p.closed {
		s.mu.Unlock()
		return net.ErrClosed
	}
	var out *peer
	if p.share.asked >= s.asks {
		out = p
		for q := range p.share.open {
			if q.asks > out.asks {
				out = q
			}
		}
	}
	if out == p {
		s.mu.Unlock()
		return crowded("too many requests are under way, most of them on this connection")
	}
	p.asks++
	p.share.asked++
	s.mu.Unlock()
	if out != nil {
		out.Close() // and with it end its requests
	}
	return nil
}

func (s *conns) end(p *peer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p.closed {
		return
	}
	p.asks--
	p.share.asked--
}

func (s *conns) limit(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p, _ := r.Context().Value(peerKey{}).(*peer)
		if p == nil {
			refuse(w, crowded("not a connection of this server"))
			return
		}
		if !p.rate.take(time.Now()) {
			refuse(w, &failure{http.StatusTooManyRequests, kindBusy, errors.New("too many requests on this connection")})
			return
		}
		if err := s.begin(p); err != nil {
			refuse(w, err)
			return
		}
		defer s.end(p)
		h.ServeHTTP(w, r)
	})
}
