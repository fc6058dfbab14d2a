package gateway

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"
)

// recorder is an Edge operator who keeps everything.
type recorder struct {
	mu  sync.Mutex
	all bytes.Buffer
}

func (r *recorder) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.all.Write(p)
}

func (r *recorder) saw(marker string) (bool, int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return bytes.Contains(r.all.Bytes(), []byte(marker)), r.all.Len()
}

func TestTheEdgesOperatorReadsNothing(t *testing.T) {
	g := newGrid(t)
	tap := new(recorder)
	g.edge.tap = tap
	n := g.node(1)
	const marker = "MARKER-4711-in-clear"
	g.serve(n, "app.test", 7, 1, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-M", marker)
		io.WriteString(w, marker+r.URL.Path)
	}))
	for _, h2 := range []bool{false, true} {
		_, body := get(t, g.client(h2), "https://app.test/"+marker)
		if !strings.Contains(body, marker) {
			t.Fatalf("the client does not get the marker: %q", body)
		}
	}
	if saw, n := tap.saw(marker); saw || n < 2000 {
		t.Fatalf("marker seen: %v, in %d bytes", saw, n)
	}
	// The control: the same tap on a link whose ends speak in clear behind a ClientHello.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	defer l.Close()
	go func() {
		if conn, err := l.Accept(); err == nil {
			io.Copy(conn, conn)
			conn.Close()
		}
	}()
	g.ledger.forward("plain.test", l.Addr().String())
	conn, err := net.Dial("tcp", g.addr)
	check(t, err)
	defer conn.Close()
	conn.Write(helloBytes(t, "plain.test"))
	io.WriteString(conn, marker)
	conn.(*net.TCPConn).CloseWrite()
	io.ReadAll(conn)
	if saw, _ := tap.saw(marker); !saw {
		t.Fatal("the tap does not see a marker that is there")
	}
}

func TestOriginRefusesAnEdgeWithAnotherKey(t *testing.T) {
	g := newGrid(t)
	n := g.node(1)
	wrong := g.key
	wrong[0] ^= 1
	n.SetEdges([]EdgeInfo{{g.addr, wrong, tunnelName}})
	g.await("refusal", func() bool {
		s := n.Status()
		return len(s.Edges) == 1 && strings.Contains(s.Edges[0].Error, "edge shows the key")
	})
	if n.Status().Edges[0].Connected || len(n.Status().Edges[0].Error) == 0 {
		t.Fatalf("status %+v", n.Status())
	}
	n.SetEdges([]EdgeInfo{{g.addr, g.key, tunnelName}})
	g.await("tunnel with the right key", func() bool { s := n.Status(); return len(s.Edges) == 1 && s.Edges[0].Connected })
}

func TestEdgeRefusesAKeyThatTheLedgerDoesNotList(t *testing.T) {
	g := newGrid(t)
	cert, key := identity(t)
	o, err := NewOrigin(OriginConfig{Certificate: cert})
	check(t, err)
	o.SetEdges([]EdgeInfo{{g.addr, g.key, tunnelName}})
	t.Cleanup(run(t, o.Run))
	g.await("refusal", func() bool { return g.edge.Status().Counters.BadTunnel > 1 })
	if s := g.edge.Status(); len(s.Tunnels) != 0 || o.Status().Edges[0].Connected {
		t.Fatalf("a stranger has a tunnel: %+v", s)
	}
	g.ledger.admit(key, id(1))
	g.await("tunnel of the listed key", func() bool { return len(g.edge.Status().Tunnels) == 1 && o.Status().Edges[0].Connected })
	g.ledger.mu.Lock()
	delete(g.ledger.nodes, key)
	g.ledger.mu.Unlock()
	g.edge.Update()
	g.await("end of the tunnel whose key was taken off the ledger", func() bool { return len(g.edge.Status().Tunnels) == 0 })
}

func TestTunnelsWithoutTheHybridKeyExchangeAreRefused(t *testing.T) {
	g := newGrid(t)
	cert, key := identity(t)
	g.ledger.admit(key, id(1))
	shake := func(change func(*tls.Config)) error {
		c := tunnelTLS(cert)
		c.ServerName, c.InsecureSkipVerify = tunnelName, true
		change(c)
		conn, err := tls.Dial("tcp", g.addr, c)
		if err != nil {
			return err
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(5 * time.Second))
		s := newSession(conn, time.Second, nil)
		go s.run()
		defer s.close(nil)
		list, _ := claimList{serial: 1}.encode()
		if err := writeMessage(s.control, list); err != nil {
			return err
		}
		_, err = readMessage(s.control) // the Edge's verdict shows that it took the tunnel
		return err
	}
	for name, change := range map[string]func(*tls.Config){
		"X25519":         func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.X25519} },
		"P-256":          func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.CurveP256} },
		"P-256 + ML-KEM": func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.SecP256r1MLKEM768} },
		"TLS 1.2":        func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 },
		"no certificate": func(c *tls.Config) { c.Certificates = nil },
		"no protocol":    func(c *tls.Config) { c.NextProtos = nil },
		"other protocol": func(c *tls.Config) { c.NextProtos = []string{"h2"} },
	} {
		if err := shake(change); err == nil {
			t.Errorf("%s: the Edge takes the tunnel", name)
		}
	}
	if err := shake(func(*tls.Config) {}); err != nil {
		t.Errorf("control: %v", err)
	}
	// And the other way round: an Edge that would do with less is left.
	for name, curve := range map[string]tls.CurveID{"X25519": tls.X25519, "X25519MLKEM768": tls.X25519MLKEM768} {
		f := newFakeEdge(t, func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{curve} })
		o := f.origin(t)
		if good := curve == tls.X25519MLKEM768; good {
			f.session(t)
		} else {
			g.await(name, func() bool { s := o.Status(); return len(s.Edges) == 1 && s.Edges[0].Error != "" })
		}
	}
}

// fakeEdge has an Edge's key and does with it what it likes.
type fakeEdge struct {
	l        net.Listener
	key      SPKI
	sessions chan *session
}

func newFakeEdge(t *testing.T, change func(*tls.Config)) *fakeEdge {
	t.Helper()
	cert, key := identity(t)
	c := tunnelTLS(cert)
	c.ClientAuth = tls.RequireAnyClientCert
	change(c)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	f := &fakeEdge{l, key, make(chan *session, 16)}
	var all sync.WaitGroup
	all.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			all.Go(func() {
				defer conn.Close()
				secure := tls.Server(conn, c)
				conn.SetDeadline(time.Now().Add(5 * time.Second))
				if secure.Handshake() != nil {
					return
				}
				conn.SetDeadline(time.Time{})
				s := newSession(secure, 200*time.Millisecond, nil)
				f.sessions <- s
				s.run()
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		for {
			select {
			case s := <-f.sessions:
				s.close(nil)
				continue
			default:
			}
			break
		}
		all.Wait()
	})
	return f
}

func (f *fakeEdge) origin(t *testing.T) *Origin {
	t.Helper()
	cert, _ := identity(t)
	o, err := NewOrigin(OriginConfig{Certificate: cert, KeepAlive: 200 * time.Millisecond})
	check(t, err)
	o.SetEdges([]EdgeInfo{{f.l.Addr().String(), f.key, tunnelName}})
	t.Cleanup(run(t, o.Run))
	return o
}

func (f *fakeEdge) session(t *testing.T) *session {
	t.Helper()
	select {
	case s := <-f.sessions:
		t.Cleanup(func() { s.close(nil) })
		return s
	case <-time.After(10 * time.Second):
		t.Fatal("no tunnel within 10s")
		return nil
	}
}

func TestOriginServesOnlyWhatItWasAskedToServe(t *testing.T) {
	leakCheck(t)
	ca := newAuthority(t)
	f := newFakeEdge(t, func(*tls.Config) {})
	o := f.origin(t)
	good := Claim{"app.test", id(7), 3}
	check(t, o.SetServices([]Service{
		{Host: "app.test", Workload: id(7), Epoch: 3, TLS: ca.leaf(t, "app.test"), Handler: echo},
		{Host: "other.test", Workload: id(8), Epoch: 1, TLS: ca.leaf(t, "other.test"), Handler: echo},
	}))
	s := f.session(t)
	ask := func(c Claim, sni, host string) (string, error) {
		st, err := s.open(streamHeader{c, addrPort(&net.TCPAddr{IP: net.IPv4(192, 0, 2, 9), Port: 4242})}, 10)
		if err != nil {
			return "", err
		}
		defer st.Close()
		st.SetDeadline(time.Now().Add(5 * time.Second))
		// This client takes any certificate: the Origin alone must tell the names apart.
		conn := tls.Client(st, &tls.Config{InsecureSkipVerify: true, ServerName: sni})
		fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: %s\r\nX-Forwarded-For: 6.6.6.6\r\nConnection: close\r\n\r\n", host)
		r, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			return "", err
		}
		io.Copy(io.Discard, r.Body)
		r.Body.Close()
		return r.Status, nil
	}
	for name, x := range map[string]struct {
		claim     Claim
		sni, host string
		status    string
	}{
		"what is served":                         {good, "app.test", "app.test", "200 OK"},
		"a host with a port":                     {good, "app.test", "app.test:8443", "200 OK"},
		"a lower epoch":                          {Claim{"app.test", id(7), 2}, "app.test", "app.test", ""},
		"a higher epoch":                         {Claim{"app.test", id(7), 4}, "app.test", "app.test", ""},
		"another workload":                       {Claim{"app.test", id(8), 3}, "app.test", "app.test", ""},
		"a host that is not served":              {Claim{"x.test", id(7), 3}, "x.test", "x.test", ""},
		"a server name that is not the stream's": {good, "other.test", "other.test", ""},
		"a Host that is not the server name":     {good, "app.test", "other.test", "421 Misdirected Request"},
		"no Host":                                {good, "app.test", "", "421 Misdirected Request"},
	} {
		if status, err := ask(x.claim, x.sni, x.host); status != x.status {
			t.Errorf("%s: got %q, %v; want %q", name, status, err, x.status)
		}
	}
	// A service that is withdrawn loses its open connections.
	st, err := s.open(streamHeader{good, addrPort(&net.TCPAddr{IP: net.IPv4(192, 0, 2, 9), Port: 1})}, 10)
	check(t, err)
	conn := tls.Client(st, &tls.Config{RootCAs: ca.pool, ServerName: "app.test"})
	check(t, conn.Handshake())
	check(t, o.SetServices(nil))
	st.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, resetSuperseded) {
		t.Errorf("got %v, want the stream cut", err)
	}
}

func TestOriginSurvivesAnEdgeThatSpeaksNonsense(t *testing.T) {
	leakCheck(t)
	f := newFakeEdge(t, func(*tls.Config) {})
	header, _ := streamHeader{Claim{"a.test", id(1), 1}, addrPort(&net.TCPAddr{IP: net.IPv4(1, 1, 1, 1), Port: 1})}.encode()
	frame := func(kind, flags byte, size int, stream uint32, payload []byte) []byte {
		b := []byte{kind, flags, byte(size >> 8), byte(size)}
		return append(binary.BigEndian.AppendUint32(b, stream), payload...)
	}
	service := Service{Host: "a.test", Workload: id(1), Epoch: 1, TLS: newAuthority(t).leaf(t, "a.test"), Handler: echo}
	many := []byte{}
	for i := range maxPeerStreams + 1 {
		many = append(many, frame(frameOpen, 0, len(header), uint32(i+1), header)...)
	}
	for name, bytes := range map[string][]byte{
		"too many streams":          many,
		"unknown frame":             frame(99, 0, 0, 1, nil),
		"flags":                     frame(framePing, 1, 0, 0, nil),
		"huge frame":                frame(frameData, 0, 65535, 1, nil),
		"bad header":                frame(frameOpen, 0, 3, 1, []byte{1, 2, 3}),
		"open of the control":       frame(frameOpen, 0, len(header), 0, header),
		"end of the control":        frame(frameFin, 0, 0, 0, nil),
		"reset of the control":      frame(frameReset, 0, 1, 0, []byte{1}),
		"credit beyond the window":  frame(frameWindow, 0, 4, 0, []byte{0x7f, 0xff, 0xff, 0xff}),
		"huge control message":      frame(frameData, 0, 4, 0, []byte{0xff, 0xff, 0xff, 0xff}),
		"control message of zeroes": frame(frameData, 0, 5, 0, []byte{0, 0, 0, 1, 0}),
	} {
		o := f.origin(t) // a fresh one for each, or its pauses between tries would add up
		check(t, o.SetServices([]Service{service}))
		s := f.session(t)
		s.writing.Lock()
		s.conn.Write(bytes)
		s.writing.Unlock()
		select {
		case <-s.die:
		case <-time.After(5 * time.Second):
			t.Errorf("%s: the tunnel lives on", name)
			s.close(nil)
		}
		f.session(t) // and the Origin comes back
		o.SetEdges(nil)
	}
}

func TestANodeCannotTakeAnothersHost(t *testing.T) {
	g := newGrid(t)
	good, thief := g.node(1), g.node(2)
	g.serve(good, "app.test", 7, 1, echo)
	get(t, g.client(false), "https://app.test/")
	check(t, thief.SetServices([]Service{{Host: "app.test", Workload: id(7), Epoch: 1, TLS: g.ca.leaf(t, "app.test"),
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "stolen") })},
		{Host: "nobody.test", Workload: id(9), Epoch: 1, TLS: g.ca.leaf(t, "nobody.test"), Handler: echo},
		{Host: tunnelName, Workload: id(9), Epoch: 1, TLS: g.ca.leaf(t, tunnelName), Handler: echo},
	}))
	g.await("refusal", func() bool { s := thief.Status(); return len(s.Edges) == 1 && len(s.Edges[0].Refused) == 3 })
	for range 20 {
		if _, body := get(t, g.client(false), "https://app.test/"); body == "stolen" {
			t.Fatal("the thief was asked")
		}
	}
	// The control: once the ledger says so, the same announcement is in force, without a new one.
	g.ledger.route("app.test", Server{thief.id, id(7), 1})
	g.edge.Update()
	g.await("the new node", func() bool {
		_, body := get(t, g.client(false), "https://app.test/")
		return body == "stolen"
	})
	if r := good.Status().Edges[0].Refused; len(r) > 1 {
		t.Errorf("refused %+v", r)
	}
}

func TestALateNodeLosesItsOldEpoch(t *testing.T) {
	g := newGrid(t)
	old, fresh := g.node(1), g.node(2)
	hold := make(chan struct{})
	defer close(hold)
	g.serve(old, "app.test", 7, 4, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "old")
		w.(http.Flusher).Flush()
		if r.URL.Path == "/hold" {
			select {
			case <-hold:
			case <-r.Context().Done():
			}
		}
	}))
	open, err := g.client(false).Get("https://app.test/hold")
	check(t, err)
	defer open.Body.Close()
	io.ReadFull(open.Body, make([]byte, 3))

	// The ledger moves the workload. The old node knows nothing of it and goes on claiming.
	up := g.serve(fresh, "app.test", 7, 5, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "new") }))
	done := make(chan error, 1)
	go func() { _, err := open.Body.Read(make([]byte, 1)); done <- err }()
	select {
	case err := <-done:
		if err == nil || err == io.EOF {
			t.Errorf("the old stream ended as if complete: %v", err)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("the old stream goes on")
	}
	c := g.client(false)
	for range 20 {
		if _, body := get(t, c, "https://app.test/"); body != "new" {
			t.Fatalf("got %q", body)
		}
		c.CloseIdleConnections()
	}
	if g.edge.Status().Counters.Superseded != 1 {
		t.Errorf("superseded is %d", g.edge.Status().Counters.Superseded)
	}
	g.await("refusal", func() bool {
		r := old.Status().Edges[0].Refused
		return len(r) == 1 && strings.Contains(r[0].Reason, "superseded")
	})
	// An older view of the ledger does not bring the old epoch back.
	g.ledger.route("app.test", Server{old.id, id(7), 4})
	g.edge.Update()
	if _, err := c.Get("https://app.test/"); err == nil {
		t.Error("an older view of the ledger was believed")
	}
	g.ledger.route("app.test", Server{fresh.id, id(7), 5})
	g.edge.Update()
	if _, body := get(t, c, "https://app.test/"); body != "new" {
		t.Errorf("got %q", body)
	}
	_ = up
}

func TestUnknownHostsAreTurnedAwayInTLS(t *testing.T) {
	g := newGrid(t)
	g.ledger.route("down.test", Server{id(1), id(7), 1})
	for host, want := range map[string]string{
		"who.test": "unrecognized name", "down.test": "internal error", "": "unrecognized name", tunnelName: "no application protocol",
	} {
		_, err := tls.Dial("tcp", g.addr, &tls.Config{ServerName: host, InsecureSkipVerify: true})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want %q", host, err, want)
		}
	}
	if c := g.edge.Status().Counters; c.UnknownHost != 2 || c.NoOrigin != 1 {
		t.Errorf("counters %+v", c)
	}
}

func TestHellosThatAreSlowHugeOrNoneAreDropped(t *testing.T) {
	g := newGrid(t, func(c *EdgeConfig) { c.Limits.HelloTime = 300 * time.Millisecond })
	n := g.node(1)
	g.serve(n, "app.test", 7, 1, echo)
	raw := helloBytes(t, "app.test")
	giant := []byte{22, 3, 1, 0x40, 0, 1, 0, 0xff, 0}
	giant = append(giant, make([]byte, 1<<20)...)
	for name, send := range map[string]func(net.Conn){
		"one byte now and then": func(c net.Conn) {
			for i := range raw {
				if _, err := c.Write(raw[i : i+1]); err != nil {
					return
				}
				time.Sleep(10 * time.Millisecond)
			}
		},
		"nothing":     func(net.Conn) {},
		"a giant":     func(c net.Conn) { c.Write(giant) },
		"plain HTTP":  func(c net.Conn) { io.WriteString(c, "GET / HTTP/1.1\r\nHost: app.test\r\n\r\n") },
		"zero bytes":  func(c net.Conn) { c.Write(make([]byte, 4096)) },
		"half of one": func(c net.Conn) { c.Write(raw[:len(raw)/2]) },
	} {
		t.Run(name, func(t *testing.T) {
			conn, err := net.Dial("tcp", g.addr)
			check(t, err)
			defer conn.Close()
			start := time.Now()
			sent := make(chan struct{})
			go func() { defer close(sent); send(conn) }()
			conn.SetReadDeadline(time.Now().Add(5 * time.Second))
			b, err := io.ReadAll(conn)
			if isTimeout(err) || len(b) > 7 {
				t.Errorf("after %v: %x, %v", time.Since(start), b, err)
			}
			conn.Close()
			<-sent
		})
	}
	// In pieces but in time is right.
	conn, err := net.Dial("tcp", g.addr)
	check(t, err)
	defer conn.Close()
	for i := 0; i < len(raw); i += 100 {
		conn.Write(raw[i:min(i+100, len(raw))])
	}
	conn.SetReadDeadline(time.Now().Add(5 * time.Second))
	b := make([]byte, 1)
	if _, err := conn.Read(b); err != nil || b[0] != recordHandshake {
		t.Errorf("control: got %x, %v", b, err)
	}
}

func TestOneStrangerCannotExhaustTheEdge(t *testing.T) {
	g := newGrid(t, func(c *EdgeConfig) { c.Limits.PerClient, c.Limits.Connections = 8, 20 })
	n := g.node(1) // its tunnel came from the same address and must not count
	g.serve(n, "app.test", 7, 1, echo)
	held := func(from string, want int) (conns []net.Conn) {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
		for range want + 20 {
			conn, err := d.Dial("tcp", g.addr)
			if err == nil {
				conns = append(conns, conn)
			}
		}
		return conns
	}
	var all []net.Conn
	defer func() {
		for _, c := range all {
			c.Close()
		}
	}()
	all = append(all, held("127.0.0.1", 8)...)
	g.await("a full client", func() bool { s := g.edge.Status(); return s.Connections == 8 && s.Counters.OverLimit == 20 })
	// Another client is served meanwhile.
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP("127.0.0.2")}}
	conn, err := tls.DialWithDialer(&d, "tcp", g.addr, &tls.Config{RootCAs: g.ca.pool, ServerName: "app.test"})
	check(t, err)
	conn.Close()
	g.await("its end", func() bool { return g.edge.Status().Connections == 8 })
	all = append(all, held("127.0.0.3", 8)...)
	all = append(all, held("127.0.0.4", 8)...)
	g.await("a full Edge", func() bool { return g.edge.Status().Connections == 20 })
	for _, c := range all {
		c.Close()
	}
	g.await("room again", func() bool { return g.edge.Status().Connections == 0 })
	get(t, g.client(false), "https://app.test/")
}

func TestAClientCannotSpeakForTheGateway(t *testing.T) {
	g := newGrid(t)
	n := g.node(1)
	g.serve(n, "app.test", 7, 1, echo)
	spoofs := []string{"X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Forwarded-Port", "Forwarded", "X-Real-Ip",
		"X_Forwarded_For", "X-Forwarded_For", "X_real_ip", "X-Forwarded-Prefix", "Proxy"}
	for _, h2 := range []bool{false, true} {
		r, err := http.NewRequest("GET", "https://app.test/", nil)
		check(t, err)
		for _, name := range spoofs {
			r.Header[name] = []string{"6.6.6.6"}
		}
		r.Header.Set("X-Kept", "yes")
		r.Header.Set("Connection", "X-Forwarded-For, X-Kept2")
		if h2 {
			r.Header.Del("Connection")
		}
		resp, err := g.client(h2).Do(r)
		check(t, err)
		resp.Body.Close()
		if got := resp.Header.Get("X-Seen-X-Forwarded-For"); got != "127.0.0.1" {
			t.Errorf("h2=%v: the workload sees %q", h2, got)
		}
		seen := strings.Join(resp.Header.Values("X-All"), " ")
		if !strings.Contains(seen, "X-Kept") {
			t.Errorf("h2=%v: an honest header is gone: %s", h2, seen)
		}
		for _, name := range spoofs[3:] {
			for _, s := range strings.Fields(seen) {
				if strings.EqualFold(s, name) {
					t.Errorf("h2=%v: %s came through", h2, name)
				}
			}
		}
	}
}

func TestSmuggledRequestsAreRefused(t *testing.T) {
	g := newGrid(t)
	n := g.node(1)
	var mu sync.Mutex
	var paths []string
	g.serve(n, "app.test", 7, 1, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		mu.Lock()
		paths = append(paths, r.URL.Path)
		mu.Unlock()
	}))
	for name, request := range map[string]string{
		"two lengths":           "POST /a HTTP/1.1\r\nHost: app.test\r\nContent-Length: 4\r\nContent-Length: 40\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: app.test\r\n\r\n",
		"length and chunks":     "POST /a HTTP/1.1\r\nHost: app.test\r\nContent-Length: 50\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: app.test\r\n\r\n",
		"space before colon":    "POST /a HTTP/1.1\r\nHost: app.test\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: app.test\r\n\r\n",
		"two hosts":             "GET /smuggled HTTP/1.1\r\nHost: app.test\r\nHost: other.test\r\n\r\n",
		"absolute form":         "GET https://other.test/smuggled HTTP/1.1\r\nHost: app.test\r\n\r\n",
		"a proxy's method":      "CONNECT app.test:443 HTTP/1.1\r\nHost: app.test\r\n\r\n",
		"a header without end":  "GET /smuggled HTTP/1.1\r\nHost: app.test\r\nX: " + strings.Repeat("a", 200<<10) + "\r\n\r\n",
		"another host by port":  "GET /smuggled HTTP/1.1\r\nHost: other.test:443\r\n\r\n",
		"a host with user info": "GET /smuggled HTTP/1.1\r\nHost: app.test@other.test\r\n\r\n",
	} {
		conn := g.dial("app.test")
		go io.WriteString(conn, request)
		r, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err == nil && r.StatusCode < 400 {
			t.Errorf("%s: got %v", name, r.Status)
		}
		conn.Close()
	}
	conn := g.dial("app.test")
	io.WriteString(conn, "GET /fine HTTP/1.1\r\nHost: app.test\r\n\r\n")
	if r, err := http.ReadResponse(bufio.NewReader(conn), nil); err != nil || r.StatusCode != 200 {
		t.Errorf("control: %v, %v", r, err)
	}
	mu.Lock()
	defer mu.Unlock()
	for _, p := range paths {
		if p == "/smuggled" {
			t.Error("a smuggled request reached the workload")
		}
	}
}

// fakeOrigin is a node whose program was changed.
func (g *grid) fakeOrigin(n byte, onOpen func(*stream), claims ...Claim) *session {
	g.t.Helper()
	cert, key := identity(g.t)
	g.ledger.admit(key, id(n))
	c := tunnelTLS(cert)
	c.ServerName, c.InsecureSkipVerify = tunnelName, true
	conn, err := tls.Dial("tcp", g.addr, c)
	check(g.t, err)
	s := newSession(conn, 100*time.Millisecond, onOpen)
	done := make(chan struct{})
	go func() { s.run(); close(done) }()
	g.t.Cleanup(func() { s.close(nil); <-done })
	message, err := claimList{1, claims}.encode()
	check(g.t, err)
	check(g.t, writeMessage(s.control, message))
	return s
}

func TestAnotherOriginIsTriedWhenOneIsDumb(t *testing.T) {
	for name, dumb := range map[string]func(*stream){
		"resets":         func(st *stream) { st.reset(resetNotServed) },
		"hangs up":       func(st *stream) { st.Close() },
		"never answers":  func(st *stream) {},
		"breaks tunnels": func(st *stream) { st.session.conn.(*tls.Conn).NetConn().Close() },
	} {
		t.Run(name, func(t *testing.T) {
			g := newGrid(t, func(c *EdgeConfig) { c.Limits.OriginTime = 300 * time.Millisecond })
			n := g.node(1)
			up := g.serve(n, "app.test", 7, 1, echo)
			_ = up
			g.ledger.route("app.test", Server{n.id, id(7), 1}, Server{id(2), id(8), 1})
			g.edge.Update()
			g.fakeOrigin(2, dumb, Claim{"app.test", id(8), 1})
			g.await("both", func() bool { return g.edge.Status().Hosts["app.test"] == 2 })
			for i := 0; i < 40 && g.edge.Status().Counters.OriginRetry == 0 && g.edge.Status().Hosts["app.test"] == 2; i++ {
				c := g.client(false)
				if _, body := get(t, c, "https://app.test/"); body != "hello from /" {
					t.Fatalf("got %q", body)
				}
				c.CloseIdleConnections()
			}
			if g.edge.Status().Counters.OriginRetry == 0 {
				t.Error("the dumb Origin was never asked")
			}
		})
	}
}

func TestAnOriginThatBreaksTheProtocolLosesItsTunnel(t *testing.T) {
	g := newGrid(t)
	g.ledger.route("app.test", Server{id(2), id(8), 1})
	header, _ := streamHeader{Claim{"a.test", id(1), 1}, addrPort(&net.TCPAddr{IP: net.IPv4(1, 1, 1, 1), Port: 1})}.encode()
	for name, act := range map[string]func(*session){
		"opens a stream": func(s *session) { s.send(frameOpen, 5, header) },
		"repeats itself": func(s *session) {
			m, _ := claimList{serial: 1}.encode()
			writeMessage(s.control, m)
		},
	} {
		s := g.fakeOrigin(2, func(*stream) {}, Claim{"app.test", id(8), 1})
		g.await("its claim", func() bool { return g.edge.Status().Hosts["app.test"] == 1 })
		act(s)
		select {
		case <-s.die:
		case <-time.After(5 * time.Second):
			t.Errorf("%s: the tunnel lives on", name)
			s.close(nil)
		}
		g.await("the tunnel's end", func() bool { return g.edge.Status().Hosts["app.test"] == 0 })
	}
}

func TestASilentOriginIsDeadSoon(t *testing.T) {
	g := newGrid(t, func(c *EdgeConfig) { c.Limits.KeepAlive = 50 * time.Millisecond })
	cert, key := identity(t)
	g.ledger.admit(key, id(1))
	c := tunnelTLS(cert)
	c.ServerName, c.InsecureSkipVerify = tunnelName, true
	conn, err := tls.Dial("tcp", g.addr, c) // a paused process: its kernel takes bytes, nobody answers
	check(t, err)
	defer conn.Close()
	g.await("tunnel", func() bool { return len(g.edge.Status().Tunnels) == 1 })
	start := time.Now()
	g.await("its death", func() bool { return len(g.edge.Status().Tunnels) == 0 })
	t.Logf("dead after %v", time.Since(start))
}

func TestAClientWhoDoesNotReadDelaysNobody(t *testing.T) {
	g := newGrid(t)
	n := g.node(1)
	g.serve(n, "app.test", 7, 1, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/endless" {
			b := make([]byte, 64<<10)
			for {
				if _, err := w.Write(b); err != nil {
					return
				}
			}
		}
		w.Write(make([]byte, 1<<20))
	}))
	for range 40 {
		conn := g.dial("app.test")
		io.WriteString(conn, "GET /endless HTTP/1.1\r\nHost: app.test\r\n\r\n")
		conn.Read(make([]byte, 1))
	}
	c := g.client(true)
	start := time.Now()
	for range 10 {
		if _, body := get(t, c, "https://app.test/"); len(body) != 1<<20 {
			t.Fatalf("got %d bytes", len(body))
		}
	}
	t.Logf("10 MiB beside 40 clients that do not read: %v", time.Since(start))
}

func TestIdleConnectionsEnd(t *testing.T) {
	g := newGrid(t, func(c *EdgeConfig) {
		c.Limits.IdleTime, c.Limits.LingerTime = 300*time.Millisecond, 100*time.Millisecond
	})
	n := g.node(1)
	g.serve(n, "app.test", 7, 1, echo)
	conn := g.dial("app.test")
	start := time.Now()
	if _, err := conn.Read(make([]byte, 1)); err == nil || isTimeout(err) {
		t.Fatalf("got %v", err)
	}
	if d := time.Since(start); d < 200*time.Millisecond || d > 5*time.Second {
		t.Errorf("cut after %v", d)
	}
	g.await("streams end", func() bool { return g.edge.Status().Tunnels[0].Streams == 0 })
}

func TestAClientThatVanishesFreesTheWorkload(t *testing.T) {
	g := newGrid(t)
	n := g.node(1)
	gone := make(chan struct{}, 1)
	g.serve(n, "app.test", 7, 1, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b := make([]byte, 64<<10)
		for {
			if _, err := w.Write(b); err != nil {
				gone <- struct{}{}
				return
			}
		}
	}))
	conn := g.dial("app.test")
	io.WriteString(conn, "GET / HTTP/1.1\r\nHost: app.test\r\n\r\n")
	conn.Read(make([]byte, 1))
	abort(conn.NetConn())
	select {
	case <-gone: // without a reset the writer would wait for credit for ever
	case <-time.After(10 * time.Second):
		t.Fatal("the workload still writes")
	}
}

// pipe is two sessions joined by TCP.
func pipe(t testing.TB, onOpen func(*stream)) *session {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	defer l.Close()
	a, err := net.Dial("tcp", l.Addr().String())
	check(t, err)
	b, err := l.Accept()
	check(t, err)
	edge, origin := newSession(a, time.Second, nil), newSession(b, time.Second, onOpen)
	var both sync.WaitGroup
	both.Go(func() { edge.run() })
	both.Go(func() { origin.run() })
	t.Cleanup(func() { edge.close(nil); origin.close(nil); both.Wait() })
	return edge
}

var anyHeader = streamHeader{Claim{"a.test", id(1), 1}, addrPort(&net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 1})}

func TestAWindowIsNotOverfilled(t *testing.T) {
	leakCheck(t)
	header, _ := anyHeader.encode()
	send := func(frames int) error {
		b := append([]byte{frameOpen, 0, 0, byte(len(header)), 0, 0, 0, 1}, header...)
		for range frames {
			b = append(append(b, frameData, 0, maxPayload>>8, maxPayload&0xff, 0, 0, 0, 1), make([]byte, maxPayload)...)
		}
		var s *session
		s = newSession(&scriptConn{in: bytes.NewReader(b), out: io.Discard}, time.Hour, func(*stream) { <-s.die })
		return s.run()
	}
	if err := send(firstWindow/maxPayload + 1); !strings.Contains(err.Error(), "exceeds its window") {
		t.Errorf("got %v", err)
	}
	if err := send(firstWindow / maxPayload); !errors.Is(err, io.EOF) {
		t.Errorf("control: %v", err)
	}
}

func TestASenderIsStoppedWhenNobodyReads(t *testing.T) {
	leakCheck(t)
	s := pipe(t, func(st *stream) {
		st.Read(make([]byte, 1)) // all that came: nothing is unread
		st.Close()
	})
	st, err := s.open(anyHeader, 10)
	check(t, err)
	st.Write([]byte("x"))
	io.ReadAll(st)
	st.SetWriteDeadline(time.Now().Add(5 * time.Second))
	for err == nil {
		_, err = st.Write(make([]byte, 10000))
	}
	if !errors.Is(err, resetStop) {
		t.Errorf("the sender ends with %v", err)
	}
}

func TestStreamsEndEachDirectionByItself(t *testing.T) {
	leakCheck(t)
	s := pipe(t, func(st *stream) {
		all, _ := io.ReadAll(st)
		st.Write(bytes.ToUpper(all))
		st.Close()
	})
	st, err := s.open(anyHeader, 10)
	check(t, err)
	io.WriteString(st, "abc")
	check(t, st.CloseWrite())
	if _, err := st.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
		t.Errorf("write behind the end: %v", err)
	}
	got, err := io.ReadAll(st)
	if string(got) != "ABC" || err != nil {
		t.Errorf("got %q, %v", got, err)
	}
	if s.count() != 0 {
		t.Errorf("%d streams are left", s.count())
	}
}

func TestCloseDeliversWhatWasWrittenEvenToOneWhoStillSends(t *testing.T) {
	leakCheck(t)
	answer := make([]byte, 1<<20)
	rand.Read(answer)
	s := pipe(t, func(st *stream) {
		st.Read(make([]byte, 10))
		st.Write(answer)
		st.Close()
	})
	for range 20 {
		st, err := s.open(anyHeader, 10)
		check(t, err)
		stopped := make(chan error, 1)
		go func() {
			for {
				if _, err := st.Write(make([]byte, 10000)); err != nil {
					stopped <- err
					return
				}
			}
		}()
		got, err := io.ReadAll(st)
		if err != nil || !bytes.Equal(got, answer) {
			t.Fatalf("%d bytes, %v", len(got), err)
		}
		if err := <-stopped; !errors.Is(err, resetStop) {
			t.Fatalf("the sender ends with %v", err)
		}
		st.Close()
	}
}

func TestDeadlinesWakeReadersAndWriters(t *testing.T) {
	leakCheck(t)
	s := pipe(t, func(st *stream) {})
	st, err := s.open(anyHeader, 10)
	check(t, err)
	for name, act := range map[string]func() error{
		"read":  func() error { _, err := st.Read(make([]byte, 1)); return err },
		"write": func() error { _, err := st.Write(make([]byte, 1<<20)); return err },
	} {
		done := make(chan error, 1)
		go func() { done <- act() }()
		st.SetDeadline(time.Now().Add(20 * time.Millisecond)) // perhaps while it waits already
		if err := <-done; !isTimeout(err) {
			t.Errorf("%s ends with %v", name, err)
		}
		st.SetDeadline(time.Time{})
	}
}

func TestManyStreamsCarryEveryByte(t *testing.T) {
	leakCheck(t)
	s := pipe(t, func(st *stream) {
		io.Copy(st, st) // WriteTo or ReadFrom
		st.Close()
	})
	var all sync.WaitGroup
	for i := range 32 {
		all.Go(func() {
			st, err := s.open(anyHeader, 100)
			if err != nil {
				t.Error(err)
				return
			}
			body := make([]byte, 300_000+i*7919)
			rand.Read(body)
			go func() {
				for rest := body; len(rest) > 0; {
					n := min(len(rest), 1+(i*i*37)%40000)
					if _, err := st.Write(rest[:n]); err != nil {
						t.Error(err)
						return
					}
					rest = rest[n:]
				}
				st.CloseWrite()
			}()
			got, err := io.ReadAll(st)
			if err != nil || !bytes.Equal(got, body) {
				t.Errorf("stream %d: %d bytes, %v", i, len(got), err)
			}
		})
	}
	all.Wait()
	if got := s.spare.Load(); got != spareWindow {
		t.Errorf("spare window is %d, want %d", got, spareWindow)
	}
}

func FuzzFrames(f *testing.F) {
	header, _ := anyHeader.encode()
	open := append([]byte{frameOpen, 0, 0, byte(len(header)), 0, 0, 0, 1}, header...)
	f.Add(open, true)
	f.Add(append(open, frameData, 0, 0, 3, 0, 0, 0, 1, 'a', 'b', 'c', frameFin, 0, 0, 0, 0, 0, 0, 1), true)
	f.Add([]byte{frameData, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 1}, false)
	f.Fuzz(func(t *testing.T, b []byte, origin bool) {
		var onOpen func(*stream)
		if origin {
			onOpen = func(st *stream) { io.Copy(io.Discard, st); st.Close() }
		}
		s := newSession(&scriptConn{in: bytes.NewReader(b), out: io.Discard}, time.Hour, onOpen)
		if err := s.run(); err == nil {
			t.Fatal("a session ends without a reason")
		}
	})
}
