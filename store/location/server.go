package location

import (
	"cmp"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"sync"
	"time"
)

// Limits of a server. Strangers have only the places of handshakes; the places of a key are its own.
const (
	maxHandshakes = 128
	handshakeTime = 10 * time.Second
	idleTime      = 2 * time.Minute
	graceTime     = 5 * time.Second
	maxProofs     = 4 // challenges of one store at work at once
)

// Key is one that may connect.
type Key struct {
	Pin    Pin
	Rights Rights
	From   netip.Addr // the one address that it is good from, where addresses can be trusted; zero: any
}

// Store is one that keeps shards here.
type Store struct {
	Name  string // names its directory
	Keys  []Key
	Quota Quota
	Hold  time.Duration // as in Config; 0 is the server's
}

// ServerConfig configures a Server.
type ServerConfig struct {
	Listener    net.Listener // closed by Run
	Certificate tls.Certificate
	Path        string // each store has a directory in it
	Stores      []Store
	Hold        time.Duration // as in Config
	MaxRetain   time.Duration
	Scrub       int64            // bytes a second, of each store
	Conns       int              // connections of one key; 0 means 64
	Now         func() time.Time // nil is time.Now
	Log         *slog.Logger     // nil discards
}

var storeName = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,62}$`)

// client is a key that may connect.
type client struct {
	pin    Pin
	store  string
	rights Rights
	from   netip.Addr
	conns  map[*conn]struct{}
}

// comes reports whether a connection comes from where the key is good.
func (c *client) comes(from net.Addr) bool {
	if c.from == (netip.Addr{}) {
		return true
	}
	ap, err := netip.ParseAddrPort(from.String())
	return err == nil && ap.Addr().Unmap() == c.from
}

// hosted is a store whose directory is open.
type hosted struct {
	dir  *Dir
	busy sync.WaitGroup // connections; Add under Server.mu, as long as a client names the store
	stop func()         // ends the directory's own work, and waits for it
}

// Server serves the directories of several stores over TLS. Strangers' handshakes fail; they learn the server's
// certificate.
type Server struct {
	cfg ServerConfig
	log *slog.Logger

	setting sync.Mutex      // held while the stores change
	life    context.Context // while Run runs; guarded by setting

	mu      sync.Mutex
	stores  map[string]*hosted
	clients map[Pin]*client
	hello   map[*conn]struct{}   // in their handshake
	from    map[netip.Prefix]int // of these
	ending  bool
}

// conn is one connection. All but raw is guarded by Server.mu.
type conn struct {
	raw  net.Conn
	from netip.Prefix
	at   time.Time // of its acceptance, or of the end of its last request
	busy bool
}

// NewServer checks the configuration.
func NewServer(cfg ServerConfig) (*Server, error) {
	s := &Server{
		cfg: cfg, log: cmp.Or(cfg.Log, slog.New(slog.DiscardHandler)), clients: map[Pin]*client{}, hello: map[*conn]struct{}{}, from: map[netip.Prefix]int{},
		stores: map[string]*hosted{},
	}
	s.cfg.Conns = cmp.Or(cfg.Conns, 64)
	if cfg.Listener == nil || len(cfg.Certificate.Certificate) == 0 {
		return nil, errors.New("location: neither listener nor certificate")
	}
	clients, err := clientsOf(cfg.Stores)
	if err != nil {
		return nil, err
	}
	s.clients = clients
	return s, nil
}

// clientsOf are the keys of stores.
func clientsOf(stores []Store) (map[Pin]*client, error) {
	out, names := map[Pin]*client{}, map[string]bool{}
	for _, st := range stores {
		if !storeName.MatchString(st.Name) || names[st.Name] {
			return nil, fmt.Errorf("location: store %q: not a name, or there twice", st.Name)
		}
		names[st.Name] = true
		for _, k := range st.Keys {
			if out[k.Pin] != nil {
				return nil, fmt.Errorf("location: store %s: key %v is there twice", st.Name, k.Pin)
			}
			out[k.Pin] = &client{pin: k.Pin, store: st.Name, rights: k.Rights, from: k.From, conns: map[*conn]struct{}{}}
		}
	}
	return out, nil
}

// SetStores says which stores are served from now on. Connections of keys that are as they were notice nothing; those of
// others end. The directory of a store that is not named any more stays as it is, and is served again when it is named.
// A store whose directory cannot be opened is left out and named in the error.
func (s *Server) SetStores(stores []Store) error {
	clients, err := clientsOf(stores)
	if err != nil {
		return err
	}
	s.setting.Lock()
	defer s.setting.Unlock()
	s.cfg.Stores = stores
	if s.life == nil {
		s.mu.Lock()
		s.clients = clients
		s.mu.Unlock()
		return nil
	}
	var errs []error
	wanted := map[string]bool{}
	for _, st := range stores {
		wanted[st.Name] = true
		if h := s.stores[st.Name]; h != nil {
			h.dir.mu.Lock()
			h.dir.cfg.Quota = st.Quota
			h.dir.mu.Unlock()
			continue
		}
		h, err := s.host(st)
		if err != nil {
			errs = append(errs, err)
			for _, k := range st.Keys {
				delete(clients, k.Pin)
			}
			continue
		}
		s.mu.Lock()
		s.stores[st.Name] = h
		s.mu.Unlock()
	}
	s.mu.Lock()
	for pin, was := range s.clients {
		if is := clients[pin]; is != nil && is.store == was.store && is.rights == was.rights && is.from == was.from {
			clients[pin] = was
			continue
		}
		for c := range was.conns {
			c.raw.Close()
		}
	}
	s.clients = clients
	var gone []*hosted
	for name, h := range s.stores {
		if !wanted[name] {
			gone = append(gone, h)
			delete(s.stores, name)
		}
	}
	s.mu.Unlock()
	for _, h := range gone {
		h.busy.Wait()
		h.stop()
	}
	return errors.Join(errs...)
}

// Used is how many bytes all stores keep here, held ones included.
func (s *Server) Used() (n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, h := range s.stores {
		h.dir.mu.RLock()
		n += h.dir.bytes
		h.dir.mu.RUnlock()
	}
	return n
}

// host opens a store's directory. s.setting is held.
func (s *Server) host(st Store) (*hosted, error) {
	root := filepath.Join(s.cfg.Path, "stores")
	d, err := Open(Config{
		Path: filepath.Join(root, st.Name), Quota: st.Quota, Hold: cmp.Or(st.Hold, s.cfg.Hold), MaxRetain: s.cfg.MaxRetain, Scrub: s.cfg.Scrub, Now: s.cfg.Now, Log: s.cfg.Log,
	})
	if err == nil {
		if err = syncDir(root); err != nil {
			d.Close()
		}
	}
	if err != nil {
		return nil, fmt.Errorf("location %s: store %s: %w", s.cfg.Path, st.Name, err)
	}
	ctx, cancel := context.WithCancel(s.life)
	done := make(chan struct{})
	go func() {
		defer close(done)
		d.Run(ctx)
	}()
	return &hosted{dir: d, stop: func() {
		cancel()
		<-done
		d.Close()
	}}, nil
}

// Run serves until ctx ends. Requests that are under way then have a few seconds.
func (s *Server) Run(ctx context.Context) error {
	defer s.cfg.Listener.Close()
	if err := os.MkdirAll(filepath.Join(s.cfg.Path, "stores"), 0o700); err != nil {
		return fmt.Errorf("location %s: %w", s.cfg.Path, err)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s.setting.Lock()
	s.life = ctx
	s.setting.Unlock()
	defer func() {
		s.setting.Lock()
		defer s.setting.Unlock()
		for _, h := range s.stores {
			h.stop()
		}
		s.stores, s.life = map[string]*hosted{}, nil
	}()
	if err := s.SetStores(s.cfg.Stores); err != nil {
		return err
	}
	var serve sync.WaitGroup
	stop := context.AfterFunc(ctx, func() { s.cfg.Listener.Close() })
	defer stop()
	err := s.accept(ctx, &serve)
	cancel()
	s.end(&serve)
	return err
}

func (s *Server) accept(ctx context.Context, serve *sync.WaitGroup) error {
	cfg := tlsConfig(s.cfg.Certificate, s.knows)
	wait := 5 * time.Millisecond
	for {
		raw, err := s.cfg.Listener.Accept()
		switch {
		case ctx.Err() != nil:
			if raw != nil {
				raw.Close()
			}
			return nil
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("accept: %w", err)
		case err != nil: // descriptors ran out, most likely
			time.Sleep(wait)
			wait = min(2*wait, time.Second)
			continue
		}
		wait = 5 * time.Millisecond
		c := &conn{raw: raw, from: place(raw.RemoteAddr()), at: time.Now()}
		s.greet(c)
		serve.Go(func() {
			defer raw.Close()
			s.serve(ctx, c, cfg)
		})
	}
}

func (s *Server) knows(p Pin) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.clients[p] != nil
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

// greet gives a newcomer a place. When there is none the oldest goes of those places that have the most: to refuse the
// newcomer would let whoever says nothing lock out the others.
func (s *Server) greet(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ending {
		c.raw.Close()
	}
	if len(s.hello) >= maxHandshakes {
		var out *conn
		for q := range s.hello {
			if out == nil || s.from[q.from] > s.from[out.from] || s.from[q.from] == s.from[out.from] && q.at.Before(out.at) {
				out = q
			}
		}
		s.forget(out)
		out.raw.Close()
	}
	s.hello[c] = struct{}{}
	s.from[c.from]++
}

// forget ends the handshake's claim to a place.
func (s *Server) forget(c *conn) {
	if _, ok := s.hello[c]; !ok {
		return
	}
	delete(s.hello, c)
	if s.from[c.from]--; s.from[c.from] == 0 {
		delete(s.from, c.from)
	}
}

// welcome moves a connection to those of its key; the idlest of these goes when there are too many. False: all are busy,
// or the key may not connect any more.
func (s *Server) welcome(c *conn, cl *client) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.forget(c)
	if s.clients[cl.pin] != cl {
		return false
	}
	if len(cl.conns) >= s.cfg.Conns {
		var out *conn
		for q := range cl.conns {
			if !q.busy && (out == nil || q.at.Before(out.at)) {
				out = q
			}
		}
		if out == nil {
			return false
		}
		delete(cl.conns, out)
		out.raw.Close()
	}
	c.at = time.Now()
	cl.conns[c] = struct{}{}
	return !s.ending
}

// work marks the begin and the end of a request; false when the server ends.
func (s *Server) work(c *conn, busy bool) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	c.busy, c.at = busy, time.Now()
	return !s.ending
}

// end closes what is idle, waits for the rest, and closes that.
func (s *Server) end(serve *sync.WaitGroup) {
	closeAll := func(busy bool) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.ending = true
		for c := range s.hello {
			c.raw.Close()
		}
		for _, cl := range s.clients {
			for c := range cl.conns {
				if busy || !c.busy {
					c.raw.Close()
				}
			}
		}
	}
	closeAll(false)
	t := time.AfterFunc(graceTime, func() { closeAll(true) })
	serve.Wait()
	t.Stop()
}

func (s *Server) serve(ctx context.Context, c *conn, cfg *tls.Config) {
	w := newWire(c.raw)
	t := tls.Server(w, cfg)
	c.raw.SetDeadline(time.Now().Add(handshakeTime))
	err := t.HandshakeContext(ctx)
	if err != nil {
		w.w.Flush() // the alert
	}
	s.mu.Lock()
	var cl *client
	var h *hosted
	if err == nil {
		if cl = s.clients[pinOf(t.ConnectionState())]; cl != nil && cl.comes(c.raw.RemoteAddr()) {
			h = s.stores[cl.store]
		}
	}
	if h != nil {
		h.busy.Add(1)
		defer h.busy.Done()
	} else {
		s.forget(c)
	}
	s.mu.Unlock()
	if h == nil {
		s.log.Debug("handshake", "from", c.raw.RemoteAddr(), "error", err)
		return
	}
	if !s.welcome(c, cl) {
		return
	}
	defer func() {
		s.mu.Lock()
		delete(cl.conns, c)
		s.mu.Unlock()
	}()
	if err := (&handler{s: s, d: h.dir, rights: cl.rights, t: t, w: w, c: c}).run(); err != nil && !errors.Is(err, io.EOF) {
		s.log.Debug("connection ended", "from", c.raw.RemoteAddr(), "error", err)
	}
}

// handler answers the requests of one connection.
type handler struct {
	s      *Server
	d      *Dir
	rights Rights
	t      net.Conn // TLS
	w      *wire    // below it
	c      *conn
	head   [requestSize]byte
}

func (h *handler) run() error {
	for {
		// Idle until the first byte comes; the rest of the request's head is not far.
		h.c.raw.SetDeadline(time.Now().Add(idleTime))
		if _, err := io.ReadFull(h.t, h.head[:]); err != nil {
			return err
		}
		r, err := parseRequest(h.head[:])
		if err != nil {
			return err
		}
		if !h.s.work(h.c, true) {
			return nil
		}
		h.c.raw.SetDeadline(time.Now().Add(deadlineFor(int64(r.size) + int64(min(r.b, MaxShard)))))
		if err := h.answer(r); err != nil {
			return err
		}
		if err := h.w.w.Flush(); err != nil {
			return err
		}
		if !h.s.work(h.c, false) {
			return nil
		}
	}
}

// body counts what is left of a request's body.
type body struct {
	r    io.Reader
	left int64
}

func (b *body) Read(p []byte) (int, error) {
	if b.left == 0 {
		return 0, io.EOF
	}
	n, err := b.r.Read(p[:min(int64(len(p)), b.left)])
	b.left -= int64(n)
	return n, err
}

// answer answers one request. Its error ends the connection.
func (h *handler) answer(r request) error {
	s := &Session{d: h.d, rights: h.rights, front: r.front}
	ctx := context.Background() // what was begun is done; the deadline bounds the transfer
	if r.op == opPut || r.op == opAppend {
		b := &body{h.t, int64(r.size)}
		err := s.may(Write)
		switch {
		case err != nil:
		case r.op == opPut:
			err = h.d.put(r.front, r.name, b.left, b, until(r.a), nil)
		default:
			signed := make([]byte, r.b)
			if _, err := io.ReadFull(b, signed); err != nil {
				return err
			}
			err = s.append(r.name, b.left, b, r.a, signed)
		}
		if b.left > 0 { // refused before it was read
			if err := discard(b, b.left); err != nil {
				return err
			}
		}
		return h.reply(0, nil, err)
	}
	if r.op == opGet {
		return h.get(s, r)
	}
	in := make([]byte, r.size)
	if _, err := io.ReadFull(h.t, in); err != nil {
		return err
	}
	var err error
	var out []byte
	var value uint64
	switch r.op {
	case opAnnounce:
		err = s.Announce(ctx, r.epoch, Holder(in))
	case opStat:
		var i Info
		if i, err = s.Stat(ctx, r.name); err == nil {
			out = appendInfo(nil, i)
		}
	case opList:
		var page []Info
		var next Name
		page, next, err = s.List(ctx, r.name, Which(min(r.a, 255)))
		for _, i := range page {
			out = appendInfo(out, i)
		}
		if next != (Name{}) { // it goes on there
			value = 1
			out = append(out, next[:]...)
		}
	case opDelete:
		err = s.Delete(ctx, r.name)
	case opUndelete:
		err = s.Undelete(ctx, r.name)
	case opPurge:
		err = s.Purge(ctx, r.name)
	case opRetain:
		err = s.Retain(ctx, r.name, until(r.a))
	case opPutHead:
		err = s.PutHead(ctx, r.a, in)
	case opHead:
		var hd Head
		if hd, err = s.Head(ctx); err == nil {
			value = hd.Sequence
			out = append(binary.BigEndian.AppendUint64(nil, uint64(hd.Epoch)), hd.Bytes...)
		}
	case opEarlier:
		var all []Head
		if all, err = s.Earlier(ctx); err == nil {
			out = appendHeads(nil, all)
		}
	case opProve:
		leaves := make([]int, len(in)/4)
		for i := range leaves {
			leaves[i] = int(binary.BigEndian.Uint32(in[4*i:]))
		}
		h.d.proofs <- struct{}{}
		var p Proof
		p, err = s.Prove(ctx, r.name, leaves)
		<-h.d.proofs
		value, out = uint64(p.Size), appendProof(nil, p)
	case opStatus:
		var st Status
		if st, err = s.Status(ctx); err == nil {
			out = appendStatus(nil, st)
		}
	}
	return h.reply(value, out, err)
}

// reply writes the only or last frame.
func (h *handler) reply(value uint64, out []byte, err error) error {
	f := frame{value: value}
	if err != nil {
		var text string
		f.status, text = statusOf(err)
		f.value, out = 0, []byte(text)
		if f.status == statusBusy && !errors.Is(err, ErrBusy) {
			h.s.log.Warn("a request went wrong", "error", err)
		}
	}
	f.size = uint32(len(out))
	b := make([]byte, frameSize, frameSize+len(out))
	f.put(b)
	_, err = h.t.Write(append(b, out...))
	return err
}

// get answers in pieces.
func (h *handler) get(s *Session, r request) error {
	if err := s.may(Read); err != nil {
		return h.reply(0, nil, err)
	}
	if r.a > MaxShard || r.b > MaxShard {
		return h.reply(0, nil, ErrSize)
	}
	var f shard
	if err := f.open(h.d, r.name, false, false); err != nil {
		return h.reply(0, nil, err)
	}
	defer f.close()
	if int64(r.a+r.b) > int64(f.e.size) {
		return h.reply(0, nil, ErrSize)
	}
	buf := h.d.pieces.Get().(*[]byte)
	defer h.d.pieces.Put(buf)
	for off, left := int64(r.a), int64(r.b); ; {
		n := min(left, pieceSize-frameSize)
		p := (*buf)[:frameSize+n]
		if err := f.readAt(p[frameSize:], off); err != nil {
			return h.reply(0, nil, err)
		}
		off, left = off+n, left-n
		frame{more: left > 0, size: uint32(n)}.put(p)
		if _, err := h.t.Write(p); err != nil || left == 0 {
			return err
		}
	}
}
