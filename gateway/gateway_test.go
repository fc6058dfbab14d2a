package gateway

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
)

const tunnelName = "tunnel.test"

// ledger plays the ledger: routes and keys that a test changes.
type ledger struct {
	mu     sync.Mutex
	routes map[string]Route
	nodes  map[SPKI]NodeID
}

func newLedger() *ledger {
	return &ledger{routes: make(map[string]Route), nodes: make(map[SPKI]NodeID)}
}

func (l *ledger) Lookup(host string) (Route, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	r, ok := l.routes[host]
	return r, ok
}

func (l *ledger) authorize(key SPKI) (NodeID, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	n, ok := l.nodes[key]
	return n, ok
}

func (l *ledger) route(host string, servers ...Server) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.routes[host] = Route{Servers: servers}
}

func (l *ledger) forward(host, addr string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.routes[host] = Route{Forward: addr}
}

func (l *ledger) admit(key SPKI, node NodeID) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.nodes[key] = node
}

func id(b byte) (x [32]byte) {
	for i := range x {
		x[i] = b
	}
	return x
}

// identity is a tunnel key.
func identity(t testing.TB) (tls.Certificate, SPKI) {
	t.Helper()
	public, private, err := ed25519.GenerateKey(rand.Reader)
	check(t, err)
	cert, err := SelfSigned(private)
	check(t, err)
	key, err := SPKIOf(public)
	check(t, err)
	return cert, key
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// authority issues leaves to hosts, as the user's CA does.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pool *x509.CertPool
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	check(t, err)
	cert, err := x509.ParseCertificate(der)
	check(t, err)
	pool := x509.NewCertPool()
	pool.AddCert(cert)
	return &authority{cert, key, pool}
}

func (a *authority) leaf(t testing.TB, hosts ...string) *tls.Config {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		DNSNames: hosts, KeyUsage: x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), a.key)
	check(t, err)
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
}

// grid is one Edge with what it needs.
type grid struct {
	t      testing.TB
	ledger *ledger
	ca     *authority
	cert   tls.Certificate
	key    SPKI
	edge   *Edge
	addr   string
	stop   func()
}

// leakCheck fails the test when goroutines of this package are left at its end.
func leakCheck(t testing.TB) {
	t.Helper()
	t.Cleanup(func() {
		if t.Failed() {
			return
		}
		var left string
		for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
			buf := make([]byte, 1<<20)
			left = ""
			for _, g := range strings.Split(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
				if strings.Contains(g, "holdfast/gateway.") && !strings.Contains(g, "testing.tRunner") && !strings.Contains(g, "leakCheck") {
					left += g + "\n\n"
				}
			}
			if left == "" {
				return
			}
		}
		t.Errorf("goroutines left behind:\n%s", left)
	})
}

func newGrid(t testing.TB, change ...func(*EdgeConfig)) *grid {
	t.Helper()
	leakCheck(t)
	g := &grid{t: t, ledger: newLedger(), ca: newAuthority(t)}
	g.cert, g.key = identity(t)
	g.start("127.0.0.1:0", change...)
	t.Cleanup(func() { g.stop() })
	return g
}

func (g *grid) start(addr string, change ...func(*EdgeConfig)) {
	g.t.Helper()
	l, err := net.Listen("tcp", addr)
	check(g.t, err)
	cfg := EdgeConfig{
		Listener: l, Certificate: g.cert, TunnelName: tunnelName, Routes: g.ledger, Authorize: g.ledger.authorize,
		Limits: Limits{KeepAlive: 500 * time.Millisecond},
	}
	for _, c := range change {
		c(&cfg)
	}
	e, err := NewEdge(cfg)
	check(g.t, err)
	g.edge, g.addr = e, l.Addr().String()
	g.stop = run(g.t, e.Run)
}

// run starts what blocks and returns what stops it and waits.
func run(t testing.TB, f func(context.Context) error) func() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	var once sync.Once
	return func() {
		once.Do(func() {
			cancel()
			select {
			case err := <-done:
				if err != nil {
					t.Errorf("run: %v", err)
				}
			case <-time.After(10 * time.Second):
				buf := make([]byte, 1<<20)
				t.Errorf("run does not return\n%s", buf[:runtime.Stack(buf, true)])
			}
		})
	}
}

// node is one Origin.
type node struct {
	*Origin
	id   NodeID
	key  SPKI
	stop func()
}

// node starts an Origin whose key the ledger lists.
func (g *grid) node(n byte, change ...func(*OriginConfig)) *node {
	g.t.Helper()
	cert, key := identity(g.t)
	g.ledger.admit(key, id(n))
	cfg := OriginConfig{Certificate: cert, KeepAlive: 500 * time.Millisecond}
	for _, c := range change {
		c(&cfg)
	}
	o, err := NewOrigin(cfg)
	check(g.t, err)
	o.SetEdges([]EdgeInfo{{g.addr, g.key, tunnelName}})
	x := &node{o, id(n), key, run(g.t, o.Run)}
	g.t.Cleanup(x.stop)
	return x
}

// serve assigns host to workload w on the node and serves it with handler as the workload.
func (g *grid) serve(n *node, host string, w byte, epoch uint64, handler http.Handler) *httptest.Server {
	g.t.Helper()
	up := httptest.NewServer(handler)
	g.t.Cleanup(up.Close)
	g.ledger.route(host, Server{n.id, id(w), epoch})
	check(g.t, n.SetServices([]Service{g.service(host, w, epoch, up)}))
	g.edge.Update()
	g.await("route "+host, func() bool { return g.edge.Status().Hosts[host] > 0 })
	return up
}

func (g *grid) service(host string, w byte, epoch uint64, up *httptest.Server) Service {
	return Service{Host: host, Workload: id(w), Epoch: epoch, TLS: g.ca.leaf(g.t, host), Dial: func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", up.Listener.Addr().String())
	}}
}

func (g *grid) await(what string, ok func() bool) {
	g.t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			g.t.Fatalf("%s: not within 10s; edge %+v", what, g.edge.Status())
		}
	}
}

// client is a browser that finds every host at the Edge.
func (g *grid) client(h2 bool) *http.Client {
	tr := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", g.addr)
		},
		TLSClientConfig:     &tls.Config{RootCAs: g.ca.pool},
		ForceAttemptHTTP2:   h2,
		MaxIdleConnsPerHost: 256,
	}
	g.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: 20 * time.Second}
}

func (g *grid) dial(host string) *tls.Conn {
	g.t.Helper()
	conn, err := tls.Dial("tcp", g.addr, &tls.Config{RootCAs: g.ca.pool, ServerName: host})
	check(g.t, err)
	g.t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	return conn
}

func get(t testing.TB, c *http.Client, url string) (*http.Response, string) {
	t.Helper()
	r, err := c.Get(url)
	check(t, err)
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	check(t, err)
	return r, string(b)
}

// echo tells what it was asked.
var echo = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("X-Seen-Host", r.Host)
	for _, name := range []string{"X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "Forwarded", "X-Real-Ip"} {
		w.Header().Set("X-Seen-"+name, strings.Join(r.Header.Values(name), "|"))
	}
	for name := range r.Header {
		w.Header().Add("X-All", name)
	}
	body, _ := io.ReadAll(r.Body)
	w.Write(body)
	fmt.Fprintf(w, "hello from %s", r.URL.Path)
})

func TestServesThroughTheTunnel(t *testing.T) {
	g := newGrid(t)
	n := g.node(1)
	g.serve(n, "app.test", 7, 1, echo)
	for _, h2 := range []bool{false, true} {
		t.Run(fmt.Sprintf("h2=%v", h2), func(t *testing.T) {
			r, body := get(t, g.client(h2), "https://app.test/x?a;b=%zz")
			if body != "hello from /x" || r.StatusCode != 200 {
				t.Fatalf("got %d %q", r.StatusCode, body)
			}
			if want := map[bool]int{false: 1, true: 2}[h2]; r.ProtoMajor != want {
				t.Errorf("HTTP/%d, want HTTP/%d", r.ProtoMajor, want)
			}
			if r.TLS.Version != tls.VersionTLS13 || r.TLS.CurveID != tls.X25519MLKEM768 {
				t.Errorf("client got %x with %v", r.TLS.Version, r.TLS.CurveID)
			}
			for name, want := range map[string]string{
				"X-Seen-Host": "app.test", "X-Seen-X-Forwarded-For": "127.0.0.1", "X-Seen-X-Forwarded-Proto": "https",
				"X-Seen-X-Forwarded-Host": "app.test",
			} {
				if got := r.Header.Get(name); got != want {
					t.Errorf("%s is %q, want %q", name, got, want)
				}
			}
		})
	}
	if s := n.Status(); len(s.Edges) != 1 || !s.Edges[0].Connected {
		t.Errorf("origin status %+v", s)
	}
}

func TestBigBodiesBothWaysAtOnce(t *testing.T) {
	g := newGrid(t)
	n := g.node(1)
	g.serve(n, "app.test", 7, 1, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.NewResponseController(w).EnableFullDuplex()
		io.Copy(w, r.Body)
	}))
	body := make([]byte, 24<<20)
	rand.Read(body)
	for _, h2 := range []bool{false, true} {
		c := g.client(h2)
		r, err := c.Post("https://app.test/", "application/octet-stream", bytes.NewReader(body))
		check(t, err)
		got, err := io.ReadAll(r.Body)
		check(t, err)
		r.Body.Close()
		if !bytes.Equal(got, body) {
			t.Fatalf("h2=%v: %d bytes came back changed", h2, len(got))
		}
	}
}

func TestManyClientsAtOnce(t *testing.T) {
	g := newGrid(t)
	n := g.node(1)
	g.serve(n, "app.test", 7, 1, echo)
	var all sync.WaitGroup
	for i := range 50 {
		all.Go(func() {
			body := make([]byte, 64<<10+i*1000)
			rand.Read(body)
			c := g.client(i%2 == 0)
			for range 3 {
				r, err := c.Post("https://app.test/p", "x/y", bytes.NewReader(body))
				if err != nil {
					t.Error(err)
					return
				}
				got, err := io.ReadAll(r.Body)
				r.Body.Close()
				if err != nil || string(got) != string(body)+"hello from /p" {
					t.Errorf("%d bytes, %v", len(got), err)
				}
			}
			c.CloseIdleConnections()
		})
	}
	all.Wait()
	g.await("streams end", func() bool { return g.edge.Status().Tunnels[0].Streams == 0 })
}

func TestWebSocketUpgrade(t *testing.T) {
	g := newGrid(t)
	n := g.node(1)
	g.serve(n, "app.test", 7, 1, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") != "websocket" {
			http.Error(w, "no upgrade", 400)
			return
		}
		conn, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		defer conn.Close()
		io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
		io.Copy(conn, rw)
	}))
	conn := g.dial("app.test")
	io.WriteString(conn, "GET /ws HTTP/1.1\r\nHost: app.test\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: x\r\nSec-WebSocket-Version: 13\r\n\r\n")
	r := bufio.NewReader(conn)
	resp, err := http.ReadResponse(r, nil)
	check(t, err)
	if resp.StatusCode != 101 {
		t.Fatalf("got %v", resp.Status)
	}
	for i := range 3 {
		fmt.Fprintf(conn, "frame %d\n", i)
		line, err := r.ReadString('\n')
		check(t, err)
		if line != fmt.Sprintf("frame %d\n", i) {
			t.Fatalf("got %q", line)
		}
	}
}

func TestServerSentEventsAreNotHeldBack(t *testing.T) {
	g := newGrid(t)
	n := g.node(1)
	next := make(chan string)
	g.serve(n, "app.test", 7, 1, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		w.(http.Flusher).Flush()
		for {
			select {
			case s := <-next:
				fmt.Fprintf(w, "data: %s\n\n", s)
				w.(http.Flusher).Flush()
			case <-r.Context().Done():
				close(next)
				return
			}
		}
	}))
	r, err := g.client(true).Get("https://app.test/events")
	check(t, err)
	lines := bufio.NewReader(r.Body)
	for _, s := range []string{"one", "two"} {
		next <- s // the second is only sent when the first has arrived
		line, err := lines.ReadString('\n')
		check(t, err)
		if line != "data: "+s+"\n" {
			t.Fatalf("got %q", line)
		}
		lines.ReadString('\n')
	}
	r.Body.Close()
	select {
	case <-next: // the workload learns that the client left
	case <-time.After(10 * time.Second):
		t.Fatal("the workload was not told that the client left")
	}
}

func TestAWorkloadThatDoesNotAnswerIsSaidPlainly(t *testing.T) {
	g := newGrid(t)
	n := g.node(1)
	up := g.serve(n, "app.test", 7, 1, echo)
	up.Close()
	r, body := get(t, g.client(false), "https://app.test/")
	if r.StatusCode != 502 || !strings.Contains(body, "application behind app.test is not answering") {
		t.Fatalf("got %d %q", r.StatusCode, body)
	}
}

func TestAHandlerServesWithoutAWorkload(t *testing.T) {
	g := newGrid(t)
	n := g.node(1)
	g.ledger.route("in.test", Server{n.id, id(7), 1})
	check(t, n.SetServices([]Service{{Host: "in.test", Workload: id(7), Epoch: 1, TLS: g.ca.leaf(t, "in.test"),
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(w, "%s %q", r.RemoteAddr, r.Header.Get("X-Forwarded-For"))
		})}}))
	g.await("route", func() bool { g.edge.Update(); return g.edge.Status().Hosts["in.test"] == 1 })
	r, err := http.NewRequest("GET", "https://in.test/", nil)
	check(t, err)
	r.Header.Set("X-Forwarded-For", "1.2.3.4")
	resp, err := g.client(true).Do(r)
	check(t, err)
	defer resp.Body.Close()
	body, _ := io.ReadAll(resp.Body)
	if !strings.HasPrefix(string(body), "127.0.0.1:") || !strings.HasSuffix(string(body), ` ""`) {
		t.Fatalf("got %q", body)
	}
}

func TestForwardPassesBytesAndKeepsHalfCloses(t *testing.T) {
	g := newGrid(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	defer l.Close()
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		all, _ := io.ReadAll(conn) // ends only if the client's half-close comes through
		fmt.Fprintf(conn, "got %d bytes", len(all))
	}()
	g.ledger.forward("ledger.test", l.Addr().String())
	raw := helloBytes(t, "ledger.test")
	conn, err := net.Dial("tcp", g.addr)
	check(t, err)
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	conn.Write(raw)
	conn.Write([]byte("more"))
	conn.(*net.TCPConn).CloseWrite()
	answer, err := io.ReadAll(conn)
	check(t, err)
	if want := fmt.Sprintf("got %d bytes", len(raw)+4); string(answer) != want {
		t.Fatalf("got %q, want %q", answer, want)
	}
}

// helloBytes is what a Go client sends first.
func helloBytes(t testing.TB, host string) []byte {
	t.Helper()
	var b bytes.Buffer
	c := tls.Client(&scriptConn{out: &b}, &tls.Config{ServerName: host})
	c.Handshake()
	return b.Bytes()
}

// scriptConn is a connection whose input and output are given.
type scriptConn struct {
	net.Conn
	in  io.Reader
	out io.Writer
}

func (c *scriptConn) Read(p []byte) (int, error) {
	if c.in == nil {
		return 0, io.EOF
	}
	return c.in.Read(p)
}
func (c *scriptConn) Write(p []byte) (int, error)     { return c.out.Write(p) }
func (c *scriptConn) Close() error                    { return nil }
func (c *scriptConn) SetDeadline(time.Time) error     { return nil }
func (c *scriptConn) SetReadDeadline(time.Time) error { return nil }
func (c *scriptConn) SetWriteDeadline(time.Time) error {
	return nil
}
func (c *scriptConn) LocalAddr() net.Addr  { return &net.TCPAddr{} }
func (c *scriptConn) RemoteAddr() net.Addr { return &net.TCPAddr{} }

func TestReconnectsAfterTheEdgeRestarts(t *testing.T) {
	g := newGrid(t)
	n := g.node(1)
	g.serve(n, "app.test", 7, 1, echo)
	c := g.client(false)
	get(t, c, "https://app.test/")
	g.stop()
	c.CloseIdleConnections()
	g.start(g.addr)
	start := time.Now()
	g.await("tunnel", func() bool { return g.edge.Status().Hosts["app.test"] == 1 })
	took := time.Since(start)
	t.Logf("back after %v", took)
	if _, body := get(t, c, "https://app.test/y"); body != "hello from /y" {
		t.Fatalf("got %q", body)
	}
	if took > 3*time.Second {
		t.Errorf("back only after %v", took)
	}
}

func TestOriginListensOnNothing(t *testing.T) {
	before := listening(t)
	g := newGrid(t)
	n := g.node(1)
	up := g.serve(n, "app.test", 7, 1, echo)
	get(t, g.client(false), "https://app.test/")
	after := listening(t)
	// The control: the scan sees the two that the test itself opened.
	for _, addr := range []string{g.addr, up.Listener.Addr().String()} {
		_, port, _ := net.SplitHostPort(addr)
		var p int
		fmt.Sscan(port, &p)
		if !after[p] {
			t.Errorf("the scan does not see port %d", p)
		}
		delete(after, p)
	}
	for p := range after {
		if !before[p] {
			t.Errorf("port %d is open", p)
		}
	}
}

// listening returns the TCP and UDP ports that sockets of this process listen on.
func listening(t *testing.T) map[int]bool {
	t.Helper()
	own := make(map[string]bool)
	fds, err := os.ReadDir("/proc/self/fd")
	check(t, err)
	for _, fd := range fds {
		target, _ := os.Readlink("/proc/self/fd/" + fd.Name())
		if rest, ok := strings.CutPrefix(target, "socket:["); ok {
			own[strings.TrimSuffix(rest, "]")] = true
		}
	}
	ports := make(map[int]bool)
	for table, state := range map[string]string{"tcp": "0A", "tcp6": "0A", "udp": "07", "udp6": "07"} {
		b, err := os.ReadFile("/proc/self/net/" + table)
		if err != nil {
			continue // no IPv6 here
		}
		for _, line := range strings.Split(string(b), "\n")[1:] {
			f := strings.Fields(line)
			if len(f) < 10 || f[3] != state || !own[f[9]] {
				continue
			}
			var port int
			fmt.Sscanf(f[1][strings.LastIndex(f[1], ":")+1:], "%X", &port)
			ports[port] = true
		}
	}
	return ports
}
