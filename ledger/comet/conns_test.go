package comet

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"holdfast/internal/canonical"
)

// wire is an HTTP/2 connection of an adversary: it sends what it likes and takes no answer's body.
type wire struct {
	net.Conn
	f    *http2.Framer
	next uint32
	gone chan struct{} // closed when the server has closed it
}

// connect opens one from a local address, and returns when the server has begun to speak, which is after the handshake.
func connect(t *testing.T, addr, from string, cert *tls.Certificate) (*wire, error) {
	t.Helper()
	d := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}, Timeout: 10 * time.Second}
	raw, err := d.Dial("tcp", addr)
	if err != nil {
		return nil, err
	}
	conf := &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}}
	if cert != nil {
		conf.Certificates = []tls.Certificate{*cert}
	}
	w := &wire{Conn: tls.Client(raw, conf), next: 1, gone: make(chan struct{})}
	t.Cleanup(func() { w.Close(); <-w.gone })
	w.Write([]byte(http2.ClientPreface))
	w.f = http2.NewFramer(w, w)
	w.f.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0})
	w.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := w.f.ReadFrame(); err != nil {
		close(w.gone)
		return nil, err
	}
	w.SetReadDeadline(time.Time{})
	go func() {
		defer close(w.gone)
		for {
			if _, err := w.f.ReadFrame(); err != nil {
				return
			}
		}
	}()
	return w, nil
}

// ask sends a request.
func (w *wire) ask(path string, body []byte) {
	var b bytes.Buffer
	e := hpack.NewEncoder(&b)
	for _, kv := range [][2]string{{":method", "POST"}, {":scheme", "https"}, {":authority", "x"}, {":path", path}} {
		e.WriteField(hpack.HeaderField{Name: kv[0], Value: kv[1]})
	}
	w.f.WriteHeaders(http2.HeadersFrameParam{StreamID: w.next, BlockFragment: b.Bytes(), EndHeaders: true})
	w.f.WriteData(w.next, true, body)
	w.next += 2
}

// until waits for something that the server is about to do.
func until(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(15 * time.Second); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not after 15 s", what)
		}
	}
}

func open(ws []*wire) int {
	n := 0
	for _, w := range ws {
		select {
		case <-w.gone:
		default:
			n++
		}
	}
	return n
}

func (s *conns) count() (strangers, friends int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.strangers.open), len(s.friends.open)
}

func TestStrangersTakeNoPlaceOfANode(t *testing.T) {
	const places = 12
	cert, err := LoadCertificate(filepath.Join(t.TempDir(), "node.pem"), "node")
	if err != nil {
		t.Fatal(err)
	}
	pin, err := PinOf(cert)
	if err != nil {
		t.Fatal(err)
	}
	g := newGrid(t, 1, func(_ int, c *Config) {
		c.Conns, c.Known = places, func(p Pin) bool { return p == pin }
	})
	v := g.start(0)
	await(t, v, 10*time.Second)
	ctx := within(t, 60*time.Second)
	// member is a client that counts how often it had to connect.
	member := func(from string, own *tls.Certificate) (*Client, *atomic.Int32) {
		dials := new(atomic.Int32)
		c := g.client(func(c *ClientConfig) {
			c.Certificate = own
			c.Servers[0].Dial = func(ctx context.Context) (net.Conn, error) {
				dials.Add(1)
				return (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}).DialContext(ctx, "tcp", g.addrs[0])
			}
		})
		if _, err := c.Read(ctx, "a"); err != nil {
			t.Fatal(err)
		}
		return c, dials
	}
	// All but one come from one address, as behind a gateway.
	node, nodeDials := member("127.0.0.2", &cert)
	stranger, strangerDials := member("127.0.0.2", nil)
	elsewhere, elsewhereDials := member("127.0.0.3", nil)
	if s, f := v.conns.count(); s != 2 || f != 1 {
		t.Fatalf("%d strangers and %d who are known", s, f)
	}

	// The adversary opens far more than there are places, and keeps each busy.
	watch := canonical.Encode(watchRequest{After: 1 << 40})
	var held []*wire
	flood := func(n int, own *tls.Certificate, busy bool) {
		t.Helper()
		for range n {
			w, err := connect(t, g.addrs[0], "127.0.0.2", own)
			if err != nil {
				continue
			}
			if busy {
				w.ask(pathWatch, watch)
			}
			held = append(held, w)
		}
	}
	flood(4*places, nil, true)
	until(t, "only as many strangers as there are places", func() bool { s, _ := v.conns.count(); return s <= places })
	if len(held) != 4*places {
		t.Errorf("%d of %d newcomers were let in", len(held), 4*places)
	}
	until(t, "the adversary's own connections give way", func() bool { return open(held) <= places })
	for _, x := range []struct {
		name  string
		c     *Client
		dials *atomic.Int32
		lost  bool
	}{
		{"a node", node, nodeDials, false},
		{"a client of another address", elsewhere, elsewhereDials, false},
		{"control: a stranger of the same address is", stranger, strangerDials, true},
	} {
		if _, err := x.c.Read(ctx, "a"); err != nil {
			t.Errorf("%s is locked out: %v", x.name, err)
		}
		if n := x.dials.Load(); (n > 1) != x.lost {
			t.Errorf("%s: connected %d times", x.name, n)
		}
	}
	if c, _ := member("127.0.0.2", nil); c == nil {
		t.Error("a newcomer is locked out")
	}

	// Whoever shows the node's certificate and has not its key is nobody; whoever has a key of his own is a stranger.
	other, err := LoadCertificate(filepath.Join(t.TempDir(), "other.pem"), "node")
	if err != nil {
		t.Fatal(err)
	}
	flood(2*perKnown, &tls.Certificate{Certificate: cert.Certificate, PrivateKey: other.PrivateKey}, false)
	flood(2*perKnown, &other, false)
	if _, f := v.conns.count(); f != 1 {
		t.Errorf("%d connections count as the node's", f)
	}
	if _, err := node.Read(ctx, "a"); err != nil || nodeDials.Load() != 1 {
		t.Errorf("the node lost its connection to a thief of its certificate: %v", err)
	}
	// The control, with the key: the node itself has a few places and no more.
	flood(3*perKnown, &cert, true)
	until(t, "a node has a few places", func() bool { _, f := v.conns.count(); return f == perKnown })
}

func TestAnswersThatNobodyTakesAreBounded(t *testing.T) {
	g := newGrid(t, 1, nil)
	v := g.start(0)
	await(t, v, 10*time.Second)
	ctx := within(t, 90*time.Second)
	c := g.client(nil)
	const size = 400 << 10
	var keys []string
	var height int64
	for i := range 12 {
		k := fmt.Sprintf("k%d", i)
		r, err := c.Submit(ctx, slices.Concat([]byte("t"+k+":"+k+"="), bytes.Repeat([]byte{'x'}, size), []byte("|good")))
		if err != nil {
			t.Fatal(err)
		}
		keys, height = append(keys, k), r.Height
	}
	if _, err := c.ReadAt(ctx, height, keys...); !errors.Is(err, ErrTooLarge) || errors.Is(err, ErrUnavailable) {
		t.Errorf("%d keys of %d bytes: %v", len(keys), size, err)
	}
	half := keys[:8]
	if view, err := c.ReadAt(ctx, height, slices.Concat(half, half)...); err != nil || len(view.values) != len(half) {
		t.Errorf("control: fewer keys, some of them twice: %v", err)
	}

	r := readRequest{Validators: []byte{}}
	for _, k := range half {
		r.Keys = append(r.Keys, []byte(k))
	}
	body := canonical.Encode(r)
	heap := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	held := func() int {
		v.conns.mu.Lock()
		defer v.conns.mu.Unlock()
		return v.conns.strangers.held
	}
	before := heap()
	const conns, streams = 16, 10 // 500 MiB
	var ws []*wire
	for range conns {
		w, err := connect(t, g.addrs[0], "127.0.0.2", nil)
		if err != nil {
			t.Fatal(err)
		}
		ws = append(ws, w)
		for range streams {
			w.ask(pathRead, body)
		}
	}
	until(t, "the answers are as many as may be", func() bool { return held() > maxHeld-len(half)*size-(1<<20) })
	if n := heap(); n > before+2*maxHeld {
		t.Errorf("the heap grew by %d MiB", (n-before)>>20)
	}
	if n := held(); n > maxHeld {
		t.Errorf("%d bytes are held", n)
	}
	// Others get their answers meanwhile, and who takes none loses his place to them.
	for range 20 {
		_, err := c.Read(ctx, half...)
		for try := 0; err != nil && try < 3; try++ { // on a busy machine he too looks like one who takes none, for a moment
			_, err = c.Read(ctx, half...)
		}
		if err != nil {
			t.Fatalf("locked out by answers that nobody takes: %v", err)
		}
	}
	if n := open(ws); n == conns {
		t.Error("nobody gave way")
	}
	for _, w := range ws {
		w.Close()
	}
	until(t, "what was held is given back", func() bool { return held() == 0 })
	if s, _ := v.conns.count(); s > 1 {
		until(t, "the places too", func() bool { s, _ := v.conns.count(); return s <= 1 })
	}
}

// A handler beside the ledger's own shares the room, and says so in words.
func TestHandlersShareTheRoom(t *testing.T) {
	var v *Validator
	g := newGrid(t, 1, func(_ int, c *Config) {
		c.Handlers = map[string]http.Handler{"GET /hold/{n}": http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			n := peerHeld
			if r.PathValue("n") == "more" {
				n++
			}
			release, err := v.Hold(r.Context(), n)
			if err != nil {
				http.Error(w, err.Error(), http.StatusServiceUnavailable)
				return
			}
			release()
		})}
	})
	v = g.start(0)
	await(t, v, 10*time.Second)
	c := g.client(nil)
	for n, want := range map[string]int{"all": 200, "more": 503} {
		r, _ := http.NewRequestWithContext(within(t, 10*time.Second), "GET", "/hold/"+n, strings.NewReader(""))
		resp, err := c.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		if resp.Body.Close(); resp.StatusCode != want {
			t.Errorf("%s: %s", n, resp.Status)
		}
	}
}

// Requests that only wait cost memory too: so many at once, and whoever has the most of them gives way.
func TestRequestsThatWaitAreBounded(t *testing.T) {
	const most = 60
	g := newGrid(t, 1, nil)
	v := g.start(0)
	await(t, v, 10*time.Second)
	v.conns.mu.Lock()
	v.conns.asks = most
	v.conns.mu.Unlock()
	ctx := within(t, 30*time.Second)
	asked := func() int {
		v.conns.mu.Lock()
		defer v.conns.mu.Unlock()
		return v.conns.strangers.asked
	}
	watch := canonical.Encode(watchRequest{After: 1 << 40})
	var ws []*wire
	wait := func(n int) {
		t.Helper()
		w, err := connect(t, g.addrs[0], "127.0.0.2", nil)
		if err != nil {
			t.Fatal(err)
		}
		ws = append(ws, w)
		for range n {
			w.ask(pathWatch, watch)
		}
	}
	// The control: fewer.
	wait(most / 2)
	until(t, "requests that are few wait", func() bool { return asked() == most/2 })
	// One connection alone has more refused, and keeps those that it has.
	for range most {
		ws[0].ask(pathWatch, watch)
	}
	until(t, "as many as may be", func() bool { return asked() == most })
	if open(ws) != 1 {
		t.Fatal("a connection was closed with nobody who needs its room")
	}
	// Another client needs one place. The one who has them all gives way.
	c := g.client(nil)
	if _, err := c.Read(ctx, "a"); err != nil {
		t.Fatalf("locked out by requests that wait: %v", err)
	}
	<-ws[0].gone
	for range 8 {
		wait(most / 3)
		if n := asked(); n > most {
			t.Errorf("%d requests are under way", n)
		}
		if _, err := c.Read(ctx, "a"); err != nil {
			t.Errorf("locked out by requests of many connections: %v", err)
		}
	}
	for _, w := range ws {
		w.Close()
	}
	until(t, "what was asked is over", func() bool { return asked() == 0 })
}

func TestARateIsHeld(t *testing.T) {
	at := time.Unix(1, 0)
	b := bucket{tokens: burstPerConn, at: at}
	taken := func(now time.Time) (n int) {
		for b.take(now) {
			n++
		}
		return n
	}
	for _, x := range []struct {
		after time.Duration
		want  int
	}{{0, burstPerConn}, {0, 0}, {time.Second, ratePerConn}, {1100 * time.Millisecond, ratePerConn / 10}, {time.Hour, burstPerConn}} {
		if n := taken(at.Add(x.after)); n < x.want-1 || n > x.want {
			t.Errorf("after %v: %d requests, want %d", x.after, n, x.want)
		}
	}
}
