package gateway

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Routes is what an Edge knows of the ledger. Lookup answers at once, from the newest verified state that it has, and
// keeps answering from it while the ledger cannot be reached. It must not call the Edge.
type Routes interface {
	Lookup(host string) (Route, bool)
}

// A Route says who may serve a host: workloads on nodes, or one TCP address to which bytes are passed.
type Route struct {
	Servers []Server
	Forward string
}

// A Server is a workload that the ledger assigned to a node in an epoch.
type Server struct {
	Node     NodeID
	Workload WorkloadID
	Epoch    uint64
}

// Limits bound what strangers and nodes can make an Edge hold. Zero values mean the defaults. A connection whose client
// does not read makes the Edge hold 64 KiB; all connections of one tunnel may hold 32 MiB beyond that.
type Limits struct {
	Connections   int           // public connections; 0 means 16384
	PerClient     int           // public connections of one IPv4 address or IPv6 /64; 0 means 512
	Tunnels       int           // tunnels; 0 means 16384
	TunnelStreams int           // open streams of one tunnel; 0 means 2048, which is also the most
	Claims        int           // claims of one tunnel; 0 means 4096, which is also the most
	Hello         int           // bytes of a ClientHello; 0 means 16 KiB
	HelloTime     time.Duration // to send a ClientHello, and for a tunnel's handshake; 0 means 5s
	OriginTime    time.Duration // for an Origin's first byte, before another is tried; 0 means 5s
	IdleTime      time.Duration // of a connection without a byte in either direction; 0 means 10m
	LingerTime    time.Duration // for a client to close after its Origin has; 0 means 30s
	KeepAlive     time.Duration // between signs of life on a tunnel, which is dead after four; 0 means 1s
}

// EdgeConfig configures an Edge.
type EdgeConfig struct {
	Listener    net.Listener    // the public port; Run closes it
	Certificate tls.Certificate // of the tunnel end; Origins pin its key
	TunnelName  string          // the server name by which Origins ask for the tunnel
	Routes      Routes
	// Authorize names the ledger's node with this key. As with Routes, it answers at once and must not call the Edge.
	Authorize func(SPKI) (node NodeID, ok bool)                        // the ledger's node with this key
	Dial      func(ctx context.Context, addr string) (net.Conn, error) // for Route.Forward; nil dials TCP
	Limits    Limits
	Log       *slog.Logger // nil discards
}

// withDefaults fills in zero values.
func (l Limits) withDefaults() Limits {
	l.Connections = cmp.Or(l.Connections, 16384)
	l.PerClient = cmp.Or(l.PerClient, 512)
	l.Tunnels = cmp.Or(l.Tunnels, 16384)
	l.TunnelStreams = min(cmp.Or(l.TunnelStreams, maxTunnelStreams), maxTunnelStreams)
	l.Claims = min(cmp.Or(l.Claims, maxClaims), maxClaims)
	l.Hello = cmp.Or(l.Hello, 16<<10)
	l.HelloTime = cmp.Or(l.HelloTime, 5*time.Second)
	l.OriginTime = cmp.Or(l.OriginTime, 5*time.Second)
	l.IdleTime = cmp.Or(l.IdleTime, 10*time.Minute)
	l.LingerTime = cmp.Or(l.LingerTime, 30*time.Second)
	l.KeepAlive = cmp.Or(l.KeepAlive, time.Second)
	return l
}

// An Edge is the public end of the gateway.
type Edge struct {
	cfg    EdgeConfig
	limits Limits
	tls    *tls.Config
	log    *slog.Logger
	tap    io.Writer // tests: a copy of all that is passed on, as the Edge's operator could make
	ending sync.WaitGroup

	mu      sync.Mutex
	conns   map[net.Conn]struct{} // everything accepted and not yet closed
	public  int                   // of those, which count against the limits
	clients map[netip.Prefix]int
	tunnels map[*tunnel]struct{}
	offers  map[string][]offer // by host
	flows   map[*flow]struct{}
	// newest is the highest epoch that the ledger named for a workload. It only grows, so that an older view of the
	// ledger cannot bring a superseded workload back.
	newest map[WorkloadID]uint64

	count struct {
		accepted, overLimit, badHello, helloTimeout, unknownHost, noOrigin, originRetry, badTunnel, refusedClaim, superseded,
		bytesIn, bytesOut atomic.Uint64
	}
}

// A tunnel is one Origin's connection.
type tunnel struct {
	session *session
	node    NodeID
	spki    SPKI
	since   time.Time
	verdict chan struct{} // one token: send the newest verdict

	list    claimList // guarded by Edge.mu, like all below
	refused []refusedClaim
	judged  bool
}

// An offer is a claim in force.
type offer struct {
	tunnel *tunnel
	claim  Claim
}

// A flow is one client's connection that is being passed on.
type flow struct {
	host    string
	node    NodeID
	claim   Claim
	forward string
	client  *meteredConn
	stream  *stream
}

// NewEdge checks the configuration.
func NewEdge(cfg EdgeConfig) (*Edge, error) {
	switch {
	case cfg.Listener == nil:
		return nil, errors.New("gateway edge: no listener")
	case len(cfg.Certificate.Certificate) == 0:
		return nil, errors.New("gateway edge: no certificate")
	case cfg.TunnelName == "" || normalHost(cfg.TunnelName) != cfg.TunnelName:
		return nil, fmt.Errorf("gateway edge: bad tunnel name %q", cfg.TunnelName)
	case cfg.Routes == nil || cfg.Authorize == nil:
		return nil, errors.New("gateway edge: no routes or no authorization")
	}
	if cfg.Dial == nil {
		cfg.Dial = func(ctx context.Context, addr string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", addr)
		}
	}
	e := &Edge{
		cfg:     cfg,
		limits:  cfg.Limits.withDefaults(),
		tls:     tunnelTLS(cfg.Certificate),
		log:     cmp.Or(cfg.Log, slog.New(slog.DiscardHandler)),
		conns:   make(map[net.Conn]struct{}),
		clients: make(map[netip.Prefix]int),
		tunnels: make(map[*tunnel]struct{}),
		offers:  make(map[string][]offer),
		flows:   make(map[*flow]struct{}),
		newest:  make(map[WorkloadID]uint64),
	}
	e.tls.ClientAuth = tls.RequireAnyClientCert
	e.tls.VerifyConnection = func(state tls.ConnectionState) error {
		key, err := peerSPKI(state)
		if err != nil {
			return err
		}
		if _, ok := cfg.Authorize(key); !ok {
			return fmt.Errorf("no node has the key %v", key)
		}
		return nil
	}
	return e, nil
}

// Run serves until ctx ends or the listener breaks. It closes the listener and everything accepted from it.
func (e *Edge) Run(ctx context.Context) error {
	var all sync.WaitGroup
	defer e.ending.Wait()
	defer all.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	all.Go(func() {
		<-ctx.Done()
		e.cfg.Listener.Close()
		e.mu.Lock()
		defer e.mu.Unlock()
		for conn := range e.conns {
			conn.Close()
		}
	})
	var pause time.Duration
	for {
		conn, err := e.cfg.Listener.Accept()
		if ctx.Err() != nil {
			if err == nil {
				conn.Close()
			}
			return nil
		}
		if errors.Is(err, net.ErrClosed) {
			return fmt.Errorf("gateway edge: %w", err)
		}
		if err != nil { // out of descriptors, or a client gone before he was accepted
			pause = min(max(5*time.Millisecond, 2*pause), time.Second)
			e.log.Warn("accept", "err", err, "pause", pause)
			select {
			case <-ctx.Done():
			case <-time.After(pause):
			}
			continue
		}
		pause = 0
		e.count.accepted.Add(1)
		client, release, ok := e.admit(ctx, conn)
		if !ok {
			e.count.overLimit.Add(1)
			abort(conn)
			continue
		}
		all.Go(func() {
			defer func() {
				conn.Close()
				release()
				e.mu.Lock()
				delete(e.conns, conn)
				e.mu.Unlock()
			}()
			e.serve(ctx, conn, client, release)
		})
	}
}

// abort closes a connection without waiting for its peer.
func abort(conn net.Conn) {
	if tcp, ok := conn.(interface{ SetLinger(int) error }); ok {
		_ = tcp.SetLinger(0)
	}
	conn.Close()
}

// admit counts a connection against the limits. release undoes that, once.
func (e *Edge) admit(ctx context.Context, conn net.Conn) (client netip.AddrPort, release func(), ok bool) {
	client = addrPort(conn.RemoteAddr())
	origin := clientPrefix(client.Addr())
	e.mu.Lock()
	defer e.mu.Unlock()
	if ctx.Err() != nil || e.public >= e.limits.Connections || e.clients[origin] >= e.limits.PerClient {
		return client, nil, false
	}
	e.public++
	e.clients[origin]++
	e.conns[conn] = struct{}{}
	var once sync.Once
	return client, func() {
		once.Do(func() {
			e.mu.Lock()
			defer e.mu.Unlock()
			e.public--
			if e.clients[origin]--; e.clients[origin] == 0 {
				delete(e.clients, origin)
			}
		})
	}, true
}

// addrPort returns a peer's address, or the unspecified one where a listener is not of IP.
func addrPort(a net.Addr) netip.AddrPort {
	ap, err := netip.ParseAddrPort(a.String())
	if err != nil {
		return netip.AddrPortFrom(netip.IPv4Unspecified(), 0)
	}
	return netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port())
}

// clientPrefix is what counts as one client: an IPv6 subscriber has at least a /64 to himself.
func clientPrefix(a netip.Addr) netip.Prefix {
	bits := 32
	if a.Is6() {
		bits = 64
	}
	p, _ := a.Prefix(bits) // cannot fail: the address is valid and has no zone
	return p
}

// serve handles one public connection.
func (e *Edge) serve(ctx context.Context, conn net.Conn, client netip.AddrPort, release func()) {
	conn.SetDeadline(time.Now().Add(e.limits.HelloTime))
	h, err := readHello(conn, e.limits.Hello)
	if err != nil {
		switch {
		case errors.Is(err, errHello):
			e.count.badHello.Add(1)
			conn.Write(alert(alertDecode))
		case isTimeout(err):
			e.count.helloTimeout.Add(1)
		}
		return
	}
	host := h.host()
	if host == e.cfg.TunnelName {
		e.serveTunnel(ctx, conn, h, release)
		return
	}
	conn.SetDeadline(time.Time{})
	e.pass(ctx, conn, client, host, h.raw)
}

func isTimeout(err error) bool {
	var timeout net.Error
	return errors.As(err, &timeout) && timeout.Timeout()
}

// refuse says goodbye in TLS.
func refuse(conn net.Conn, code byte) {
	conn.SetWriteDeadline(time.Now().Add(time.Second))
	conn.Write(alert(code))
}

// A replayConn gives the bytes that were read for the hello once more.
type replayConn struct {
	net.Conn
	first []byte
}

func (c *replayConn) Read(p []byte) (int, error) {
	if len(c.first) > 0 {
		n := copy(p, c.first)
		c.first = c.first[n:]
		return n, nil
	}
	c.first = nil
	return c.Conn.Read(p)
}

// serveTunnel ends a tunnel's TLS, takes the Origin's claims and keeps the session until it dies.
func (e *Edge) serveTunnel(ctx context.Context, conn net.Conn, h hello, release func()) {
	if !slices.Contains(h.alpn, ALPN) {
		e.count.badTunnel.Add(1)
		refuse(conn, alertProtocol)
		return
	}
	secure := tls.Server(&replayConn{conn, h.raw}, e.tls)
	if err := secure.HandshakeContext(ctx); err != nil {
		e.count.badTunnel.Add(1)
		e.log.Info("tunnel refused", "addr", conn.RemoteAddr(), "err", err)
		return
	}
	conn.SetDeadline(time.Time{})
	key, err := peerSPKI(secure.ConnectionState())
	if err != nil {
		return // VerifyConnection has seen to it
	}
	t := &tunnel{
		session: newSession(secure, e.limits.KeepAlive, nil),
		spki:    key,
		since:   time.Now(),
		verdict: make(chan struct{}, 1),
	}
	e.mu.Lock()
	node, ok := e.cfg.Authorize(key)
	if ok = ok && len(e.tunnels) < e.limits.Tunnels; ok {
		t.node = node
		e.tunnels[t] = struct{}{}
		e.crowd(node)
	}
	e.mu.Unlock()
	if !ok {
		e.count.badTunnel.Add(1)
		return
	}
	release() // a node is no stranger: many may share one address, and strangers cannot use up its place
	e.log.Info("tunnel up", "node", node, "addr", conn.RemoteAddr())

	var control sync.WaitGroup
	control.Go(func() { t.session.close(e.readClaims(t)) })
	control.Go(func() { e.writeVerdicts(t) })
	err = t.session.run()
	e.mu.Lock()
	delete(e.tunnels, t)
	e.withdraw(t)
	e.mu.Unlock()
	control.Wait()
	e.log.Info("tunnel down", "node", node, "addr", conn.RemoteAddr(), "err", err)
}

// maxNodeTunnels is how many tunnels of one node may live side by side: a new one, and what is left of those before it.
const maxNodeTunnels = 4

// crowd ends the oldest tunnels of a node that has too many. With mu held.
func (e *Edge) crowd(node NodeID) {
	var own []*tunnel
	for t := range e.tunnels {
		if t.node == node {
			own = append(own, t)
		}
	}
	slices.SortFunc(own, func(a, b *tunnel) int { return b.since.Compare(a.since) })
	for i, t := range own {
		if i >= maxNodeTunnels {
			t.session.close(errors.New("tunnel: replaced by newer ones"))
		}
	}
}

// readClaims takes claim lists until the tunnel breaks.
func (e *Edge) readClaims(t *tunnel) error {
	for {
		message, err := readMessage(t.session.control)
		if err != nil {
			return err
		}
		list, err := decodeClaims(message)
		if err != nil {
			return err
		}
		e.mu.Lock()
		if _, live := e.tunnels[t]; !live || t.list.serial >= list.serial {
			e.mu.Unlock()
			return errors.New("tunnel: serial of claims does not grow")
		}
		e.withdraw(t)
		t.list, t.judged = list, false
		e.judge(t)
		e.mu.Unlock()
	}
}

// writeVerdicts sends the newest verdict whenever there is one.
func (e *Edge) writeVerdicts(t *tunnel) {
	for {
		select {
		case <-t.session.die:
			return
		case <-t.verdict:
		}
		e.mu.Lock()
		v := verdict{serial: t.list.serial, refused: t.refused}
		e.mu.Unlock()
		if err := writeMessage(t.session.control, v.encode()); err != nil {
			return
		}
	}
}

// judge holds a tunnel's claims against the ledger and puts those that it bears out in force. With mu held.
func (e *Edge) judge(t *tunnel) {
	e.withdraw(t)
	var refused []refusedClaim
	seen := make(map[Claim]bool, len(t.list.claims))
	for i, c := range t.list.claims {
		why := e.verify(t.node, c)
		switch {
		case i >= e.limits.Claims:
			why = reasonLimit
		case seen[c]:
			why = reasonTwice
		}
		seen[c] = true
		if why != reasonNone {
			refused = append(refused, refusedClaim{uint16(i), why})
			continue
		}
		e.offers[c.Host] = append(e.offers[c.Host], offer{t, c})
	}
	if !t.judged || !slices.Equal(refused, t.refused) {
		e.count.refusedClaim.Add(uint64(len(refused)))
		t.judged, t.refused = true, refused
		poke(t.verdict)
	}
}

// withdraw takes a tunnel's offers back. With mu held.
func (e *Edge) withdraw(t *tunnel) {
	for _, c := range t.list.claims {
		e.dropOffers(c.Host, t)
	}
}

func (e *Edge) dropOffers(host string, t *tunnel) {
	left := slices.DeleteFunc(e.offers[host], func(o offer) bool { return o.tunnel == t })
	if len(left) == 0 {
		delete(e.offers, host)
	} else {
		e.offers[host] = left
	}
}

// verify says whether the ledger names this workload, in this epoch, on this node, for this host. With mu held.
func (e *Edge) verify(node NodeID, c Claim) reason {
	route, ok := e.lookup(c.Host)
	if !ok {
		return reasonHost
	}
	if c.Epoch < e.newest[c.Workload] {
		return reasonEpoch
	}
	for _, s := range route.Servers {
		if s.Node == node && s.Workload == c.Workload && s.Epoch == c.Epoch {
			return reasonNone
		}
	}
	return reasonNode
}

// lookup asks the ledger and remembers the epochs that it names. With mu held.
func (e *Edge) lookup(host string) (Route, bool) {
	if host == "" || host == e.cfg.TunnelName {
		return Route{}, false
	}
	route, ok := e.cfg.Routes.Lookup(host)
	for _, s := range route.Servers {
		e.newest[s.Workload] = max(e.newest[s.Workload], s.Epoch)
	}
	return route, ok
}

// Update rechecks everything that is open against Routes and Authorize. Call it whenever either has changed.
func (e *Edge) Update() {
	e.mu.Lock()
	defer e.mu.Unlock()
	for t := range e.tunnels {
		if node, ok := e.cfg.Authorize(t.spki); !ok || node != t.node {
			e.withdraw(t)
			t.session.close(errors.New("tunnel: the node's key is no longer on the ledger"))
			continue
		}
		e.judge(t)
	}
	e.cut()
}

// cut ends the flows whose server the ledger no longer names. With mu held.
func (e *Edge) cut() {
	for f := range e.flows {
		if f.forward != "" {
			if route, ok := e.lookup(f.host); ok && route.Forward == f.forward {
				continue
			}
		} else if e.verify(f.node, f.claim) == reasonNone {
			continue
		}
		e.count.superseded.Add(1)
		delete(e.flows, f)
		abort(f.client.Conn)
		if st := f.stream; st != nil {
			e.ending.Go(func() { st.reset(resetSuperseded) })
		}
	}
}

// maxTries is how many Origins one client is offered to.
const maxTries = 3

// pass finds who serves the host and passes bytes on.
func (e *Edge) pass(ctx context.Context, conn net.Conn, client netip.AddrPort, host string, first []byte) {
	metered := &meteredConn{Conn: conn, in: &e.count.bytesIn, out: &e.count.bytesOut, tap: e.tap}
	metered.saw(first)
	e.mu.Lock()
	route, ok := e.lookup(host)
	e.mu.Unlock()
	switch {
	case !ok:
		e.count.unknownHost.Add(1)
		refuse(conn, alertName)
		return
	case route.Forward != "":
		e.passForward(ctx, metered, host, route.Forward, first)
		return
	}
	var tried []*tunnel
	for range maxTries {
		f := e.choose(host, metered, client, tried)
		if f == nil {
			break
		}
		if len(tried) > 0 {
			e.count.originRetry.Add(1)
		}
		tried = append(tried, f.tunnel)
		done := e.passStream(f, first)
		e.mu.Lock()
		delete(e.flows, f.flow)
		e.mu.Unlock()
		if done {
			return
		}
	}
	e.count.noOrigin.Add(1)
	refuse(conn, alertInternal)
}

// A choice is a flow with the tunnel that was chosen for it.
type choice struct {
	*flow
	tunnel *tunnel
	header streamHeader
}

// choose picks the Origin with the fewest streams of those not yet tried, any of several equals; of one node's tunnels
// the newest.
func (e *Edge) choose(host string, conn *meteredConn, client netip.AddrPort, tried []*tunnel) *choice {
	e.mu.Lock()
	defer e.mu.Unlock()
	newest := make(map[NodeID]time.Time)
	offers := make([]offer, 0, len(e.offers[host]))
	for _, o := range e.offers[host] {
		if slices.Contains(tried, o.tunnel) || e.verify(o.tunnel.node, o.claim) != reasonNone {
			continue
		}
		offers = append(offers, o)
		if o.tunnel.since.After(newest[o.tunnel.node]) {
			newest[o.tunnel.node] = o.tunnel.since
		}
	}
	var best []offer
	fewest := 0
	for _, o := range offers {
		if o.tunnel.since.Before(newest[o.tunnel.node]) {
			continue
		}
		switch n := o.tunnel.session.count(); {
		case n >= e.limits.TunnelStreams:
		case len(best) == 0 || n < fewest:
			best, fewest = append(best[:0], o), n
		case n == fewest:
			best = append(best, o)
		}
	}
	if len(best) == 0 {
		return nil
	}
	o := best[rand.IntN(len(best))]
	f := &flow{host: host, node: o.tunnel.node, claim: o.claim, client: conn}
	// From here on Update cuts it: no stream can slip between the choice and the ledger's next word.
	e.flows[f] = struct{}{}
	return &choice{f, o.tunnel, streamHeader{o.claim, client}}
}

// passStream opens a stream and passes bytes until both directions have ended. It reports false when another Origin may
// be tried, for then nothing came back and nothing was read of the client beyond his hello.
func (e *Edge) passStream(c *choice, first []byte) (done bool) {
	st, err := c.tunnel.session.open(c.header, e.limits.TunnelStreams)
	if err != nil {
		return false
	}
	e.mu.Lock()
	c.stream = st
	_, live := e.flows[c.flow]
	e.mu.Unlock()
	if !live {
		st.reset(resetSuperseded)
		return true
	}
	st.SetDeadline(time.Now().Add(e.limits.OriginTime))
	answer := getBlock()
	defer blocks.Put(answer)
	n := 0
	if _, err = st.Write(first); err == nil {
		n, err = st.Read(answer.buf[:])
	}
	if err != nil {
		st.reset(resetAborted)
		e.mu.Lock()
		defer e.mu.Unlock()
		_, live := e.flows[c.flow]
		return !live
	}
	st.SetDeadline(time.Time{})
	if _, err := c.client.Write(answer.buf[:n]); err != nil {
		st.reset(resetAborted)
		return true
	}
	relay(c.client, st, e.limits)
	return true
}

// passForward passes bytes to a fixed address.
func (e *Edge) passForward(ctx context.Context, client *meteredConn, host, addr string, first []byte) {
	dial, cancel := context.WithTimeout(ctx, e.limits.OriginTime)
	defer cancel()
	conn, err := e.cfg.Dial(dial, addr)
	if err != nil {
		e.count.noOrigin.Add(1)
		e.log.Warn("forward", "host", host, "err", err)
		refuse(client.Conn, alertInternal)
		return
	}
	defer conn.Close()
	f := &flow{host: host, forward: addr, client: client}
	e.mu.Lock()
	e.flows[f] = struct{}{}
	e.mu.Unlock()
	defer func() {
		e.mu.Lock()
		delete(e.flows, f)
		e.mu.Unlock()
	}()
	if _, err := conn.Write(first); err != nil {
		return
	}
	relay(client, forwardConn{conn}, e.limits)
}

// A far end is what a client is joined to.
type farEnd interface {
	io.ReaderFrom
	io.WriterTo
	CloseWrite() error
	Close() error
	reset(resetCode)
}

// A forwardConn is a TCP connection as a far end.
type forwardConn struct{ net.Conn }

func (c forwardConn) reset(resetCode) { abort(c.Conn) }

func (c forwardConn) CloseWrite() error { return closeWrite(c.Conn) }

func (c forwardConn) ReadFrom(r io.Reader) (int64, error) { return copyBlocks(c.Conn, r) }

func (c forwardConn) WriteTo(w io.Writer) (int64, error) { return copyBlocks(w, c.Conn) }

// copyBlocks is io.Copy with a shared buffer, and without the short cuts by which io.Copy would get round a meter.
func copyBlocks(w io.Writer, r io.Reader) (total int64, err error) {
	b := getBlock()
	defer blocks.Put(b)
	for {
		n, err := r.Read(b.buf[:])
		if n > 0 {
			if _, err := w.Write(b.buf[:n]); err != nil {
				return total, err
			}
			total += int64(n)
		}
		if err == io.EOF {
			return total, nil
		}
		if err != nil {
			return total, err
		}
	}
}

func closeWrite(conn net.Conn) error {
	if half, ok := conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return conn.Close()
}

// relay joins a client to a far end until both directions have ended, one has broken, or nothing moves. Each direction
// ends by itself.
func relay(client *meteredConn, far farEnd, limits Limits) {
	var (
		both sync.WaitGroup
		idle = make(chan struct{})
		end  sync.Once
	)
	stop := func() {
		end.Do(func() {
			abort(client.Conn)
			far.reset(resetAborted)
		})
	}
	both.Go(func() {
		if _, err := far.ReadFrom(client); err != nil {
			// The far end reading no more is no reason to lose what it still says.
			if !errors.Is(err, resetStop) {
				stop()
				return
			}
			// Closing with bytes unread would break the connection under the answer's last bytes.
			client.SetReadDeadline(time.Now().Add(limits.LingerTime))
			io.Copy(io.Discard, client.Conn)
			return
		}
		far.CloseWrite()
	})
	both.Go(func() {
		if _, err := far.WriteTo(client); err != nil {
			stop()
			return
		}
		client.lingering.Store(true)
		closeWrite(client.Conn)
	})
	go func() {
		both.Wait()
		close(idle)
	}()
	tick := time.NewTicker(min(limits.LingerTime, limits.IdleTime) / 2)
	defer tick.Stop()
	var quiet time.Duration
	for last := client.moved.Load(); ; {
		select {
		case <-idle:
			client.Close()
			far.Close()
			return
		case <-tick.C:
		}
		// Ticks without a byte are added up: a clock that jumps cuts nobody off.
		if moved := client.moved.Load(); moved != last {
			last, quiet = moved, 0
			continue
		}
		quiet += min(limits.LingerTime, limits.IdleTime) / 2
		if quiet >= limits.IdleTime || client.lingering.Load() && quiet >= limits.LingerTime {
			stop()
		}
	}
}

// A meteredConn counts what a client sends and gets.
type meteredConn struct {
	net.Conn
	in, out   *atomic.Uint64
	moved     atomic.Uint64 // grows whenever a byte moves
	lingering atomic.Bool   // the client has everything that he will get
	tap       io.Writer
}

func (c *meteredConn) saw(p []byte) {
	c.moved.Add(1)
	c.in.Add(uint64(len(p)))
	if c.tap != nil {
		c.tap.Write(p)
	}
}

func (c *meteredConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n > 0 {
		c.saw(p[:n])
	}
	return n, err
}

func (c *meteredConn) Write(p []byte) (int, error) {
	if c.tap != nil {
		c.tap.Write(p)
	}
	n, err := c.Conn.Write(p)
	c.out.Add(uint64(n))
	c.moved.Add(1)
	return n, err
}

// EdgeStatus is what an Edge sees, for people and JSON.
type EdgeStatus struct {
	Connections int            `json:"connections"`
	Hosts       map[string]int `json:"hosts"` // how many Origins serve a host now
	Tunnels     []TunnelStatus `json:"tunnels"`
	Counters    EdgeCounters   `json:"counters"`
}

// TunnelStatus is one tunnel as the Edge sees it.
type TunnelStatus struct {
	Node    NodeID    `json:"node"`
	Addr    string    `json:"addr"`
	Since   time.Time `json:"since"`
	Streams int       `json:"streams"`
	Claims  int       `json:"claims"`
	Refused []Refusal `json:"refused,omitempty"`
}

// EdgeCounters only grow while an Edge runs.
type EdgeCounters struct {
	Accepted     uint64 `json:"accepted"`
	OverLimit    uint64 `json:"over_limit"`
	BadHello     uint64 `json:"bad_hello"`
	HelloTimeout uint64 `json:"hello_timeout"`
	UnknownHost  uint64 `json:"unknown_host"`
	NoOrigin     uint64 `json:"no_origin"`
	OriginRetry  uint64 `json:"origin_retry"`
	BadTunnel    uint64 `json:"bad_tunnel"`
	RefusedClaim uint64 `json:"refused_claim"`
	Superseded   uint64 `json:"superseded"` // connections cut because the ledger no longer names their server
	BytesIn      uint64 `json:"bytes_in"`   // from clients
	BytesOut     uint64 `json:"bytes_out"`  // to clients
}

// Status tells what the Edge sees now.
func (e *Edge) Status() EdgeStatus {
	c := &e.count
	s := EdgeStatus{
		Hosts: make(map[string]int),
		Counters: EdgeCounters{
			Accepted:     c.accepted.Load(),
			OverLimit:    c.overLimit.Load(),
			BadHello:     c.badHello.Load(),
			HelloTimeout: c.helloTimeout.Load(),
			UnknownHost:  c.unknownHost.Load(),
			NoOrigin:     c.noOrigin.Load(),
			OriginRetry:  c.originRetry.Load(),
			BadTunnel:    c.badTunnel.Load(),
			RefusedClaim: c.refusedClaim.Load(),
			Superseded:   c.superseded.Load(),
			BytesIn:      c.bytesIn.Load(),
			BytesOut:     c.bytesOut.Load(),
		},
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	s.Connections = e.public
	for host, offers := range e.offers {
		s.Hosts[host] = len(offers)
	}
	for t := range e.tunnels {
		ts := TunnelStatus{
			Node:    t.node,
			Addr:    t.session.conn.RemoteAddr().String(),
			Since:   t.since,
			Streams: t.session.count(),
			Claims:  len(t.list.claims),
		}
		for _, r := range t.refused {
			ts.Refused = append(ts.Refused, Refusal{t.list.claims[r.index], r.reason.String()})
		}
		s.Tunnels = append(s.Tunnels, ts)
	}
	slices.SortFunc(s.Tunnels, func(a, b TunnelStatus) int {
		return cmp.Or(slices.Compare(a.Node[:], b.Node[:]), a.Since.Compare(b.Since))
	})
	return s
}
