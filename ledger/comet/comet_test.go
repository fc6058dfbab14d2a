package comet

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// grid is some validators on loopback.
type grid struct {
	t       testing.TB
	genesis Genesis
	configs []Config
	addrs   []string // of the APIs
	stops   []func() error
}

// freeAddr finds a port for consensus, which cannot be told to take a listener. On this address no connection that a test
// makes in the meantime takes it for its own end.
func freeAddr(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.2:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// newGrid prepares n validators of power 1; start runs them.
func newGrid(t testing.TB, n int, edit func(i int, c *Config)) *grid {
	t.Helper()
	g := &grid{t: t, genesis: Genesis{Chain: "grid-" + strconv.Itoa(os.Getpid()), Time: time.Now().Add(-time.Minute), State: []byte("first")}}
	var peers []Peer
	for i := range n {
		home := filepath.Join(t.TempDir(), "v"+strconv.Itoa(i))
		k, err := MakeKeys(home)
		if err != nil {
			t.Fatal(err)
		}
		g.genesis.Validators = append(g.genesis.Validators, Member{Key: k.Public, Power: 1})
		peers = append(peers, Peer{ID: k.Peer, Addr: freeAddr(t)})
		cert, err := LoadCertificate(filepath.Join(home, "api.pem"), "ledger")
		if err != nil {
			t.Fatal(err)
		}
		g.configs = append(g.configs, Config{Home: home, TLS: cert, Machine: kvMachine()})
	}
	for i := range n {
		c := &g.configs[i]
		c.Genesis = g.genesis
		c.P2P = peers[i].Addr
		c.Peers = append(slices.Clone(peers[:i]), peers[i+1:]...)
		if testing.Verbose() {
			c.Log = slog.New(slog.NewTextHandler(t.Output(), nil)).With("validator", i)
		}
		if edit != nil {
			edit(i, c)
		}
	}
	g.addrs = make([]string, n)
	g.stops = make([]func() error, n)
	t.Cleanup(func() {
		for i := range g.stops {
			g.stop(i)
		}
	})
	return g
}

// start runs validator i and returns it at once.
func (g *grid) start(i int) *Validator {
	g.t.Helper()
	at := g.addrs[i]
	if at == "" {
		at = "127.0.0.1:0"
	}
	l, err := net.Listen("tcp", at)
	if err != nil {
		g.t.Fatal(err)
	}
	g.addrs[i] = l.Addr().String()
	c := g.configs[i]
	c.API = l
	v, err := New(c)
	if err != nil {
		g.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- v.Run(ctx) }()
	g.stops[i] = func() error {
		cancel()
		select {
		case err := <-done:
			return err
		case <-time.After(20 * time.Second):
			return errors.New("validator does not stop")
		}
	}
	return v
}

func (g *grid) stop(i int) {
	g.t.Helper()
	if g.stops[i] == nil {
		return
	}
	if err := g.stops[i](); err != nil {
		g.t.Errorf("validator %d: %v", i, err)
	}
	g.stops[i] = nil
}

func (g *grid) server(i int) Server {
	g.t.Helper()
	pin, err := PinOf(g.configs[i].TLS)
	if err != nil {
		g.t.Fatal(err)
	}
	addr := g.addrs[i]
	return Server{Pins: []Pin{pin}, Dial: func(ctx context.Context) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", addr)
	}}
}

func (g *grid) client(edit func(*ClientConfig)) *Client {
	g.t.Helper()
	c := ClientConfig{Genesis: g.genesis, Verify: kvVerify}
	for i := range g.addrs {
		if g.addrs[i] != "" {
			c.Servers = append(c.Servers, g.server(i))
		}
	}
	if edit != nil {
		edit(&c)
	}
	cl, err := NewClient(c)
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { cl.Close() })
	return cl
}

func within(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

func await(t testing.TB, v *Validator, d time.Duration) {
	t.Helper()
	select {
	case <-v.Ready():
	case <-time.After(d):
		t.Fatalf("validator is not ready after %v", d)
	}
}

func TestOneValidatorFromSubmitToProvenRead(t *testing.T) {
	g := newGrid(t, 1, func(_ int, c *Config) {
		c.Extend = func(h int64) []byte {
			if h == 3 {
				return []byte("heard at 3")
			}
			return nil
		}
		c.Handlers = map[string]http.Handler{"GET /v1/status": http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprint(w, "status")
		})}
	})
	began := time.Now()
	v := g.start(0)
	await(t, v, 10*time.Second)
	t.Logf("ready after %v", time.Since(began))
	c := g.client(nil)
	ctx := within(t, 30*time.Second)

	view, err := c.Read(ctx, "genesis", "a")
	if err != nil {
		t.Fatal(err)
	}
	if b, ok := view.Value("genesis"); !ok || string(b) != "first" {
		t.Fatalf("genesis is %q, %v", b, ok)
	}
	if _, ok := view.Value("a"); ok {
		t.Fatal("a key that nobody wrote is present")
	}
	var submits, reads []time.Duration
	for i := range 50 {
		start := time.Now()
		r, err := c.Submit(ctx, fmt.Appendf(nil, "t%d:a=%d|good", i, i))
		if err != nil || r.Code != 0 {
			t.Fatal(r, err)
		}
		submits = append(submits, time.Since(start))
		start = time.Now()
		view, err := c.ReadAt(ctx, r.Height, "a")
		if err != nil {
			t.Fatal(err)
		}
		reads = append(reads, time.Since(start))
		if b, _ := view.Value("a"); string(b) != strconv.Itoa(i) {
			t.Fatalf("read %q after %d was committed", b, i)
		}
	}
	slices.Sort(submits)
	slices.Sort(reads)
	t.Logf("submit: median %v, 90%% %v; proven read after it: median %v, 90%% %v", submits[25], submits[45], reads[25], reads[45])

	for name, step := range map[string]struct {
		tx      string
		refused bool
		code    uint32
	}{
		"a bad signature is refused":                    {"x1:a=1|bad", true, 0},
		"a rule of the machine refuses":                 {"x2:forbidden=1|good", true, 0},
		"the same bytes again give the first answer":    {"t7:a=7|good", false, 0},
		"a used id in another transaction is refused":   {"t7:a=8|good", true, 0},
		"a transaction that fails in its block is told": {"x3:late=1|good", false, 3},
		"and so when it is sent again":                  {"x3:late=1|good", false, 3},
		"an empty value is written":                     {"x4:empty=|good", false, 0},
	} {
		r, err := c.Submit(ctx, []byte(step.tx))
		if errors.Is(err, ErrRefused) != step.refused || err != nil && !step.refused || r.Code != step.code {
			t.Errorf("%s: %+v, %v", name, r, err)
		}
	}
	last, err := c.Submit(ctx, []byte("x5:last=1|good"))
	if err != nil {
		t.Fatal(err)
	}
	view, err = c.ReadAt(ctx, last.Height, "empty", "nothing")
	if err != nil {
		t.Fatal(err)
	}
	if b, ok := view.Value("empty"); !ok || b == nil || len(b) != 0 {
		t.Errorf("an empty value reads as %v, %v", b, ok)
	}
	heard := "heard/" + string(v.app.genesisAddress(0))
	view, err = c.Read(ctx, heard)
	if err != nil {
		t.Fatal(err)
	}
	if b, _ := view.Value(heard); string(b) != "heard at 3" {
		t.Errorf("heard %q", b)
	}
	req, _ := http.NewRequestWithContext(ctx, "GET", "/v1/status", nil)
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	var buf bytes.Buffer
	buf.ReadFrom(resp.Body)
	resp.Body.Close()
	if buf.String() != "status" {
		t.Errorf("status is %q", &buf)
	}

	// It stops and starts again with everything.
	g.stop(0)
	began = time.Now()
	v = g.start(0)
	await(t, v, 10*time.Second)
	t.Logf("ready again after %v", time.Since(began))
	view, err = c.Read(ctx, "a", "genesis")
	if err != nil {
		t.Fatal(err)
	}
	if b, _ := view.Value("a"); string(b) != "49" {
		t.Errorf("after a restart a is %q", b)
	}
	if r, err := c.Submit(ctx, []byte("t7:a=7|good")); err != nil || r.Code != 0 {
		t.Errorf("after a restart the same bytes again: %+v, %v", r, err)
	}
}

func (a *app) genesisAddress(i int) []byte {
	set, _ := a.genesis.validators()
	return set.Validators[i].Address
}

func TestWatchWakesOnAChangeAndNotOnEmptyBlocks(t *testing.T) {
	g := newGrid(t, 1, func(_ int, c *Config) { c.Timeouts.Idle = 20 * time.Millisecond })
	v := g.start(0)
	await(t, v, 10*time.Second)
	c := g.client(nil)
	ctx := within(t, 20*time.Second)
	view, err := c.Read(ctx, "a")
	if err != nil {
		t.Fatal(err)
	}
	woke := make(chan int64, 1)
	go func() {
		h, err := c.Watch(ctx, view.Height)
		if err != nil {
			t.Error(err)
		}
		woke <- h
	}()
	// Some empty blocks go by.
	for _, h := v.State(); h < view.Height+10; _, h = v.State() {
		time.Sleep(10 * time.Millisecond)
	}
	select {
	case h := <-woke:
		t.Fatalf("woke at height %d without a change", h)
	default:
	}
	r, err := c.Submit(ctx, []byte("w:a=1|good"))
	if err != nil {
		t.Fatal(err)
	}
	if h := <-woke; h < r.Height {
		t.Fatalf("woke at height %d before the change at %d", h, r.Height)
	}
}

func TestFourValidatorsOutliveOneAndItCatchesUp(t *testing.T) {
	g := newGrid(t, 4, func(i int, c *Config) {
		c.Extend = func(int64) []byte { return []byte{'v', byte('0' + i)} }
	})
	var vs []*Validator
	for i := range 4 {
		vs = append(vs, g.start(i))
	}
	for _, v := range vs {
		await(t, v, 20*time.Second)
	}
	c := g.client(nil)
	ctx := within(t, 60*time.Second)
	var took []time.Duration
	put := func(id string) int64 {
		t.Helper()
		start := time.Now()
		r, err := c.Submit(ctx, []byte(id+":"+id+"=1|good"))
		if err != nil || r.Code != 0 {
			t.Fatal(r, err)
		}
		took = append(took, time.Since(start))
		return r.Height
	}
	for i := range 10 {
		put("a" + strconv.Itoa(i))
	}
	slices.Sort(took)
	t.Logf("submit to four: median %v, slowest %v", took[5], took[9])
	g.stop(0) // the one that the client uses
	h := put("while-down")
	view, err := c.ReadAt(ctx, h, "while-down")
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := view.Value("while-down"); !ok {
		t.Fatal("written with one validator down and not there")
	}
	v := g.start(0)
	await(t, v, 20*time.Second)
	only := g.client(func(c *ClientConfig) { c.Servers = c.Servers[:1] })
	view, err = only.ReadAt(ctx, h, "while-down", "a0")
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := view.Value("while-down"); !ok {
		t.Fatal("the restarted validator lacks what it missed")
	}
	h = put("after")
	for i := range 4 {
		key := "heard/" + string(v.app.genesisAddress(i))
		view, err := c.ReadAt(ctx, h, key)
		if err != nil {
			t.Fatal(err)
		}
		if b, _ := view.Value(key); !strings.HasPrefix(string(b), "v") {
			t.Errorf("validator %d was heard as %q", i, b)
		}
	}
}
