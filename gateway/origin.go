package gateway

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// A Service is what an Origin serves for one host with one workload. Several services may share a host: replicas.
type Service struct {
	Host     string
	Workload WorkloadID
	Epoch    uint64

	// TLS ends the client's connection: Certificates or GetCertificate must be set. MinVersion 0 means TLS 1.3.
	TLS *tls.Config

	// Dial connects to the workload, which speaks HTTP/1.1. Handler, when set, answers instead.
	Dial    func(ctx context.Context) (net.Conn, error)
	Handler http.Handler
}

func (s Service) claim() Claim { return Claim{normalHost(s.Host), s.Workload, s.Epoch} }

func (s Service) validate() error {
	switch {
	case normalHost(s.Host) == "":
		return fmt.Errorf("serve %q: bad host", s.Host)
	case s.TLS == nil || len(s.TLS.Certificates) == 0 && s.TLS.GetCertificate == nil && s.TLS.GetConfigForClient == nil:
		return fmt.Errorf("serve %q: no certificate", s.Host)
	case s.Dial == nil && s.Handler == nil:
		return fmt.Errorf("serve %q: neither a workload nor a handler", s.Host)
	}
	return nil
}

// EdgeInfo is an Edge as the ledger lists it.
type EdgeInfo struct {
	Addr       string // host:port of the public port
	SPKI       SPKI   // of the Edge's tunnel certificate
	TunnelName string
}

// OriginConfig configures an Origin.
type OriginConfig struct {
	Certificate tls.Certificate                                          // whose key the ledger lists for this node
	Dial        func(ctx context.Context, addr string) (net.Conn, error) // to Edges; nil dials TCP
	KeepAlive   time.Duration                                            // as Limits.KeepAlive; 0 means 1s
	Log         *slog.Logger                                             // nil discards
}

// Times of an Origin. A client that takes longer is slow on purpose; a workload that takes longer is not answering.
const (
	handshakeTime  = 10 * time.Second // a client's TLS, and its request's header
	clientIdleTime = 2 * time.Minute
	dialTime       = 5 * time.Second
	// upstreamIdleTime is below the shortest that common servers keep an idle connection, so that a request does not
	// meet one that is just being closed.
	upstreamIdleTime = 4 * time.Second
	maxRequestHeader = 64 << 10
	firstBackoff     = 50 * time.Millisecond
	maxBackoff       = time.Second // a gateway that restarts has its tunnels back within it
)

// Requests at work at once, each of which may hold a connection to a workload and with it a descriptor of the agent. From
// half of a limit on, only who has few gets more: one client address cannot use up a service, nor one service the Origin.
const (
	maxServiceRequests = 1024
	maxOriginRequests  = 8192
	fewRequests        = 16
)

// An Origin is the inside end of the gateway. It listens on nothing.
type Origin struct {
	cfg    OriginConfig
	log    *slog.Logger
	conns  chan net.Conn // to the HTTP server
	wake   chan struct{} // one token: edges changed
	copies copyPool

	mu       sync.Mutex
	busy     int        // connections handed to the HTTP server, and requests at work
	requests int        // of those, which count against the limit
	quiet    *sync.Cond // on mu: busy is 0
	edges    []EdgeInfo
	links    map[EdgeInfo]*link
	services map[Claim]*served
	list     claimList
}

// A served is a Service at work.
type served struct {
	claim     Claim
	source    *tls.Config // the Service's, to see whether it changed
	tls       atomic.Pointer[tls.Config]
	service   atomic.Pointer[Service]
	transport *http.Transport
	proxy     *httputil.ReverseProxy
	conns     map[*stream]struct{} // guarded by Origin.mu, like all below
	requests  int
	clients   map[netip.Prefix]int // requests
}

// A link keeps the tunnel to one Edge.
type link struct {
	origin *Origin
	edge   EdgeInfo
	cancel context.CancelFunc
	claims chan struct{} // one token: the list changed

	session *session // guarded by Origin.mu, like all below
	since   time.Time
	sent    claimList
	acked   bool // the newest list
	refused []Refusal
	err     error
}

// NewOrigin checks the configuration.
func NewOrigin(cfg OriginConfig) (*Origin, error) {
	if len(cfg.Certificate.Certificate) == 0 {
		return nil, errors.New("gateway origin: no certificate")
	}
	cfg.KeepAlive = cmp.Or(cfg.KeepAlive, time.Second)
	if cfg.Dial == nil {
		cfg.Dial = func(ctx context.Context, addr string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", addr)
		}
	}
	o := &Origin{
		cfg:      cfg,
		log:      cmp.Or(cfg.Log, slog.New(slog.DiscardHandler)),
		conns:    make(chan net.Conn),
		wake:     make(chan struct{}, 1),
		links:    make(map[EdgeInfo]*link),
		services: make(map[Claim]*served),
		list:     claimList{serial: 1},
	}
	o.quiet = sync.NewCond(&o.mu)
	return o, nil
}

// enter counts a request, for which Run waits until it leaves, and says whether it may be served.
func (o *Origin) enter(s *served, client netip.Prefix) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.busy++
	switch {
	case o.requests >= maxOriginRequests, s.requests >= maxServiceRequests,
		o.requests >= maxOriginRequests/2 && s.requests >= fewRequests,
		s.requests >= maxServiceRequests/2 && s.clients[client] >= fewRequests:
		return false
	}
	o.requests++
	s.requests++
	s.clients[client]++
	return true
}

func (o *Origin) leave(s *served, client netip.Prefix, was bool) {
	defer o.done()
	if !was {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.requests--
	s.requests--
	if s.clients[client]--; s.clients[client] == 0 {
		delete(s.clients, client)
	}
}

// done ends something that Run waits for.
func (o *Origin) done() {
	o.mu.Lock()
	if o.busy--; o.busy == 0 {
		o.quiet.Broadcast()
	}
	o.mu.Unlock()
}

// SetEdges replaces the list of Edges. It may be called at any time.
func (o *Origin) SetEdges(edges []EdgeInfo) {
	o.mu.Lock()
	o.edges = slices.Clone(edges)
	o.mu.Unlock()
	poke(o.wake)
}

// SetServices replaces what is served and announces it. Connections of a service that is no longer listed, in this
// epoch, are cut. Services that cannot be served are left out and named in the error, and so are those that are too many,
// the same ones each time. It may be called at any time.
func (o *Origin) SetServices(services []Service) error {
	var errs []error
	wanted := make(map[Claim]Service, len(services))
	for _, s := range services {
		if err := s.validate(); err != nil {
			errs = append(errs, err)
		} else {
			wanted[s.claim()] = s
		}
	}
	if excess := excessClaims(slices.Collect(maps.Keys(wanted))); len(excess) > 0 {
		errs = append(errs, fmt.Errorf("serve %q and %d more: a node serves %d", excess[0].Host, len(excess)-1, maxClaims))
		for _, c := range excess {
			delete(wanted, c)
		}
	}
	o.mu.Lock()
	changed := false
	var cut []*stream
	for claim, have := range o.services {
		if _, ok := wanted[claim]; !ok {
			changed = true
			delete(o.services, claim)
			have.transport.CloseIdleConnections()
			for st := range have.conns {
				cut = append(cut, st)
			}
		}
	}
	for claim, s := range wanted {
		have, ok := o.services[claim]
		if !ok {
			changed = true
			have = o.newServed(claim)
			o.services[claim] = have
		}
		have.update(s)
	}
	if changed {
		o.list = claimList{serial: o.list.serial + 1}
		for claim := range o.services {
			o.list.claims = append(o.list.claims, claim)
		}
		slices.SortFunc(o.list.claims, func(a, b Claim) int {
			return cmp.Or(strings.Compare(a.Host, b.Host), slices.Compare(a.Workload[:], b.Workload[:]), cmp.Compare(a.Epoch, b.Epoch))
		})
		for _, l := range o.links {
			l.acked = false
			poke(l.claims)
		}
	}
	o.mu.Unlock()
	// Each reset may wait for its tunnel; a service that ended must not wait for one that is stuck.
	for _, st := range cut {
		go st.reset(resetSuperseded)
	}
	return errors.Join(errs...)
}

// excessClaims says which of too many claims have no room. Every workload has its first before any has its second, and so
// on, so that one with many hosts takes no other's only one.
func excessClaims(claims []Claim) []Claim {
	if len(claims) <= maxClaims {
		return nil
	}
	slices.SortFunc(claims, func(a, b Claim) int {
		return cmp.Or(slices.Compare(a.Workload[:], b.Workload[:]), strings.Compare(a.Host, b.Host), cmp.Compare(a.Epoch, b.Epoch))
	})
	rank := make(map[Claim]int, len(claims))
	for i, c := range claims {
		if i > 0 && claims[i-1].Workload == c.Workload {
			rank[c] = rank[claims[i-1]] + 1
		}
	}
	slices.SortStableFunc(claims, func(a, b Claim) int { return cmp.Compare(rank[a], rank[b]) })
	return claims[maxClaims:]
}

func (o *Origin) newServed(claim Claim) *served {
	s := &served{claim: claim, conns: make(map[*stream]struct{}), clients: make(map[netip.Prefix]int)}
	s.transport = &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			ctx, cancel := context.WithTimeout(ctx, dialTime)
			defer cancel()
			return s.service.Load().Dial(ctx)
		},
		DisableCompression:     true,               // bodies pass as they are
		MaxConnsPerHost:        maxServiceRequests, // a dial outlives the client who gave up
		MaxIdleConnsPerHost:    128,
		IdleConnTimeout:        upstreamIdleTime,
		ExpectContinueTimeout:  time.Second,
		MaxResponseHeaderBytes: maxRequestHeader,
		WriteBufferSize:        32 << 10,
		ReadBufferSize:         32 << 10,
	}
	s.proxy = &httputil.ReverseProxy{
		Transport:    s.transport,
		Rewrite:      s.rewrite,
		BufferPool:   &o.copies,
		ErrorLog:     slog.NewLogLogger(o.log.Handler(), slog.LevelDebug),
		ErrorHandler: o.badGateway,
	}
	return s
}

// update takes a Service's newest form. With Origin.mu held.
func (s *served) update(service Service) {
	s.service.Store(&service)
	if s.source == service.TLS {
		return // tickets of the clients stay good
	}
	s.source = service.TLS
	config := service.TLS.Clone()
	config.MinVersion = cmp.Or(config.MinVersion, tls.VersionTLS13)
	config.NextProtos = []string{"h2", "http/1.1"}
	choose := config.GetConfigForClient
	// The Edge says for which host a stream is; the client's own word, which the Edge cannot forge, must be the same.
	config.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) {
		if normalHost(h.ServerName) != s.claim.Host {
			return nil, fmt.Errorf("client asks for %q on a stream for %q", h.ServerName, s.claim.Host)
		}
		if choose == nil {
			return nil, nil
		}
		chosen, err := choose(h)
		if chosen != nil {
			chosen = chosen.Clone()
			chosen.NextProtos = config.NextProtos
		}
		return chosen, err
	}
	s.tls.Store(config)
}

// Run keeps a tunnel to every Edge and serves what comes through them, until ctx ends.
func (o *Origin) Run(ctx context.Context) error {
	var links sync.WaitGroup
	server := &http.Server{
		Handler:           http.HandlerFunc(o.serveHTTP),
		ReadHeaderTimeout: handshakeTime,
		IdleTimeout:       clientIdleTime,
		MaxHeaderBytes:    maxRequestHeader,
		ErrorLog:          slog.NewLogLogger(o.log.Handler(), slog.LevelDebug),
		ConnContext:       connContext,
	}
	served := make(chan struct{})
	listener := &streamListener{conns: o.conns, closed: make(chan struct{})}
	go func() {
		defer close(served)
		_ = server.Serve(listener) // ends with Close below, by no other way
	}()
	defer func() {
		server.Close()
		<-served
		o.mu.Lock()
		defer o.mu.Unlock()
		for o.busy > 0 {
			o.quiet.Wait()
		}
		for _, s := range o.services {
			s.transport.CloseIdleConnections()
		}
	}()
	defer links.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for {
		o.mu.Lock()
		for edge, l := range o.links {
			if !slices.Contains(o.edges, edge) {
				l.cancel()
				delete(o.links, edge)
			}
		}
		for _, edge := range o.edges {
			if o.links[edge] == nil {
				own, stop := context.WithCancel(ctx)
				l := &link{origin: o, edge: edge, cancel: stop, claims: make(chan struct{}, 1)}
				o.links[edge] = l
				links.Go(func() { l.run(own) })
			}
		}
		o.mu.Unlock()
		select {
		case <-ctx.Done():
			o.mu.Lock()
			clear(o.links)
			o.mu.Unlock()
			return nil
		case <-o.wake:
		}
	}
}

// run connects, serves, and connects again.
func (l *link) run(ctx context.Context) {
	backoff := firstBackoff
	for {
		start := time.Now()
		err := l.connect(ctx)
		if ctx.Err() != nil {
			return
		}
		l.origin.mu.Lock()
		l.err, l.session, l.acked = err, nil, false
		l.origin.mu.Unlock()
		l.origin.log.Info("tunnel down", "edge", l.edge.Addr, "err", err)
		if time.Since(start) > 2*maxBackoff {
			backoff = firstBackoff
		}
		// Jitter spreads the nodes of a gateway that came back.
		timer := time.NewTimer(backoff/2 + rand.N(backoff/2))
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
		backoff = min(2*backoff, maxBackoff)
	}
}

// connect holds one tunnel until it breaks and returns why.
func (l *link) connect(ctx context.Context) error {
	o := l.origin
	dial, cancel := context.WithTimeout(ctx, handshakeTime)
	defer cancel()
	conn, err := o.cfg.Dial(dial, l.edge.Addr)
	if err != nil {
		return fmt.Errorf("dial edge %v: %w", l.edge.Addr, err)
	}
	defer conn.Close()
	config := tunnelTLS(o.cfg.Certificate)
	config.ServerName = l.edge.TunnelName
	config.InsecureSkipVerify = true // by a certificate authority; the key itself is pinned
	config.VerifyConnection = func(state tls.ConnectionState) error {
		key, err := peerSPKI(state)
		if err != nil {
			return err
		}
		if key != l.edge.SPKI {
			return fmt.Errorf("edge shows the key %v, the ledger says %v", key, l.edge.SPKI)
		}
		return nil
	}
	secure := tls.Client(conn, config)
	if err := secure.HandshakeContext(dial); err != nil {
		return fmt.Errorf("shake hands with edge %v: %w", l.edge.Addr, err)
	}
	s := newSession(secure, o.cfg.KeepAlive, o.accept)
	stop := context.AfterFunc(ctx, func() { s.close(ctx.Err()) })
	defer stop()
	var control sync.WaitGroup
	control.Go(func() { s.close(l.readVerdicts(s)) })
	control.Go(func() { s.close(l.writeClaims(s)) })
	err = s.run()
	control.Wait()
	return err
}

// writeClaims sends the list of claims, and again whenever it changes.
func (l *link) writeClaims(s *session) error {
	for serial := uint64(0); ; {
		l.origin.mu.Lock()
		list := l.origin.list
		l.sent = list
		l.origin.mu.Unlock()
		if list.serial != serial { // a token may be left of a list that was sent already
			serial = list.serial
			message, err := list.encode()
			if err != nil {
				return err
			}
			if err := writeMessage(s.control, message); err != nil {
				return err
			}
		}
		select {
		case <-s.die:
			return nil
		case <-l.claims:
		}
	}
}

// readVerdicts takes the Edge's answers.
func (l *link) readVerdicts(s *session) error {
	for {
		message, err := readMessage(s.control)
		if err != nil {
			return err
		}
		v, err := decodeVerdict(message)
		if err != nil {
			return err
		}
		l.origin.mu.Lock()
		if v.serial == l.sent.serial {
			if l.session != s {
				l.session, l.since, l.err = s, time.Now(), nil
				l.origin.log.Info("tunnel up", "edge", l.edge.Addr)
			}
			l.acked = l.sent.serial == l.origin.list.serial
			l.refused = nil
			for _, r := range v.refused {
				if int(r.index) < len(l.sent.claims) {
					l.refused = append(l.refused, Refusal{l.sent.claims[r.index], r.reason.String()})
				}
			}
		}
		l.origin.mu.Unlock()
	}
}

// A clientConn is a stream at the HTTP server.
type clientConn struct {
	*stream
	served *served
	end    func()
}

func (c *clientConn) Close() error {
	err := c.stream.Close()
	c.end()
	return err
}

// accept takes a stream that an Edge opened: it must be for a service that is served now, in its epoch.
func (o *Origin) accept(st *stream) {
	o.mu.Lock()
	s, ok := o.services[st.header.claim]
	if ok {
		s.conns[st] = struct{}{}
		o.busy++
	}
	o.mu.Unlock()
	if !ok {
		st.reset(resetNotServed)
		return
	}
	var once sync.Once
	conn := &clientConn{st, s, func() {
		once.Do(func() {
			o.mu.Lock()
			delete(s.conns, st)
			o.mu.Unlock()
			o.done()
		})
	}}
	select {
	case o.conns <- tls.Server(conn, s.tls.Load()):
	case <-st.session.die:
		conn.Close()
	}
}

// A streamListener gives streams to an HTTP server. It is no socket.
type streamListener struct {
	conns  chan net.Conn
	once   sync.Once
	closed chan struct{}
}

func (l *streamListener) Accept() (net.Conn, error) {
	select {
	case conn := <-l.conns:
		return conn, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *streamListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *streamListener) Addr() net.Addr { return &net.TCPAddr{} }

type servedKey struct{}

func connContext(ctx context.Context, conn net.Conn) context.Context {
	return context.WithValue(ctx, servedKey{}, conn.(*tls.Conn).NetConn().(*clientConn).served)
}

// serveHTTP answers one request.
func (o *Origin) serveHTTP(w http.ResponseWriter, r *http.Request) {
	s := r.Context().Value(servedKey{}).(*served)
	addr, _ := netip.ParseAddrPort(r.RemoteAddr) // the client's, as the Edge tells it
	client := clientPrefix(addr.Addr())
	admitted := o.enter(s, client)
	defer o.leave(s, client, admitted)
	if !admitted {
		w.Header().Set("Retry-After", "1")
		plain(w, http.StatusServiceUnavailable, "the gateway works, but "+s.claim.Host+" is answering as many requests as it can: try again in a moment")
		return
	}
	host := r.Host
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	switch {
	case normalHost(host) != s.claim.Host:
		// A client may ask for any host on a connection; only the one it proved to mean is served on it.
		plain(w, http.StatusMisdirectedRequest, "this connection is for "+s.claim.Host+" and for no other host")
		return
	case r.Method == http.MethodConnect:
		plain(w, http.StatusMethodNotAllowed, "no proxy here")
		return
	}
	if handler := s.service.Load().Handler; handler != nil {
		cleanHeader(r.Header)
		handler.ServeHTTP(w, r)
		return
	}
	s.proxy.ServeHTTP(w, r)
}

func plain(w http.ResponseWriter, code int, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(code)
	fmt.Fprintf(w, "%d %s: %s\n", code, http.StatusText(code), text)
}

// rewrite makes the request that the workload sees.
func (s *served) rewrite(r *httputil.ProxyRequest) {
	cleanHeader(r.Out.Header)
	r.Out.URL.Scheme = "http"
	r.Out.URL.Host = s.claim.Host // names the pool; Service.Dial knows the way
	r.Out.Host = r.In.Host
	// As sent, not as net/url would put it: the workload parses it itself.
	r.Out.URL.RawQuery = r.In.URL.RawQuery
	client, _, _ := net.SplitHostPort(r.In.RemoteAddr)
	r.Out.Header.Set("X-Forwarded-For", client)
	r.Out.Header.Set("X-Forwarded-Host", r.In.Host)
	r.Out.Header.Set("X-Forwarded-Proto", "https")
	if _, ok := r.Out.Header["User-Agent"]; !ok {
		r.Out.Header.Set("User-Agent", "") // or net/http adds its own
	}
}

// cleanHeader removes what would let a client say who he is in the gateway's name. Names count with "_" for "-", since
// many servers make the two one.
func cleanHeader(h http.Header) {
	for name := range h {
		switch plain := strings.ToLower(strings.ReplaceAll(name, "_", "-")); {
		case strings.HasPrefix(plain, "x-forwarded"), plain == "forwarded", plain == "x-real-ip", plain == "x-client-ip",
			plain == "true-client-ip", plain == "x-original-host", plain == "x-host", plain == "via-proxy", plain == "proxy":
			delete(h, name)
		}
	}
}

// badGateway answers for a workload that did not.
func (o *Origin) badGateway(w http.ResponseWriter, r *http.Request, err error) {
	s := r.Context().Value(servedKey{}).(*served)
	o.log.Debug("workload does not answer", "host", s.claim.Host, "workload", s.claim.Workload, "err", err)
	plain(w, http.StatusBadGateway, "the gateway works, but the application behind "+s.claim.Host+" is not answering")
}

// A copyPool lends buffers to the reverse proxies.
type copyPool struct{ pool sync.Pool }

func (p *copyPool) Get() []byte {
	if b, ok := p.pool.Get().(*[32 << 10]byte); ok {
		return b[:]
	}
	return new([32 << 10]byte)[:]
}

func (p *copyPool) Put(b []byte) { p.pool.Put((*[32 << 10]byte)(b)) }

// OriginStatus is what an Origin sees, for people and JSON.
type OriginStatus struct {
	Edges    []EdgeLink `json:"edges"`
	Services []Claim    `json:"services"`
}

// EdgeLink is an Origin's tunnel to one Edge.
type EdgeLink struct {
	Addr      string    `json:"addr"`
	Connected bool      `json:"connected"` // and the newest list of claims acknowledged
	Since     time.Time `json:"since"`
	Streams   int       `json:"streams"`
	Refused   []Refusal `json:"refused,omitempty"`
	Error     string    `json:"error,omitempty"` // why it is not connected
}

// Status tells what the Origin sees now.
func (o *Origin) Status() OriginStatus {
	o.mu.Lock()
	defer o.mu.Unlock()
	status := OriginStatus{Services: slices.Clone(o.list.claims)}
	for _, l := range o.links {
		e := EdgeLink{Addr: l.edge.Addr, Connected: l.session != nil && l.acked}
		if l.session != nil {
			e.Since, e.Streams, e.Refused = l.since, l.session.count(), slices.Clone(l.refused)
		} else if l.err != nil {
			e.Error = l.err.Error()
		}
		status.Edges = append(status.Edges, e)
	}
	slices.SortFunc(status.Edges, func(a, b EdgeLink) int { return strings.Compare(a.Addr, b.Addr) })
	return status
}
