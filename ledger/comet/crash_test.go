package comet

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"holdfast/internal/canonical"
)

// childEnv makes the test binary a validator that its parent kills.
const childEnv = "HOLDFAST_COMET_TEST_CHILD"

type childConfig struct {
	Home, P2P, API string
	Genesis        Genesis
}

func TestMain(m *testing.M) {
	if file := os.Getenv(childEnv); file != "" {
		if err := child(file); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

func child(file string) error {
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	var c childConfig
	if err := json.Unmarshal(b, &c); err != nil {
		return err
	}
	cert, err := LoadCertificate(filepath.Join(c.Home, "api.pem"), "ledger")
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", c.API)
	if err != nil {
		return err
	}
	v, err := New(Config{Home: c.Home, Genesis: c.Genesis, Machine: kvMachine(), P2P: c.P2P, API: l, TLS: cert,
		Extend: func(h int64) []byte { return strconv.AppendInt(nil, h, 10) },
		Log:    slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelError}))})
	if err != nil {
		return err
	}
	return v.Run(context.Background())
}

func TestKilledUnderLoadKeepsEveryAcknowledgedTransaction(t *testing.T) {
	g := newGrid(t, 1, nil)
	g.addrs[0] = freeAddr(t)
	c := childConfig{Home: g.configs[0].Home, P2P: g.configs[0].P2P, API: g.addrs[0], Genesis: g.genesis}
	file := filepath.Join(t.TempDir(), "child.json")
	b, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	var said bytes.Buffer
	start := func() *exec.Cmd {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), childEnv+"="+file)
		cmd.Stderr = &said
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		return cmd
	}
	cl := g.client(nil)
	ctx := within(t, 90*time.Second)

	var mu sync.Mutex
	acked := map[string]int64{}
	load, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := 0; load.Err() == nil; i++ {
				// The same bytes until there is an answer: each id is used once.
				id := fmt.Sprintf("w%d-%d", w, i)
				tx := []byte(id + ":" + id + "=v|good")
				for load.Err() == nil {
					r, err := cl.Submit(load, tx)
					if err == nil && r.Code == 0 {
						mu.Lock()
						acked[id] = r.Height
						mu.Unlock()
						break
					}
					if err == nil || errors.Is(err, ErrRefused) {
						t.Errorf("%s: code %d %q, %v", id, r.Code, r.Log, err)
						return
					}
					select {
					case <-time.After(10 * time.Millisecond):
					case <-load.Done():
					}
				}
			}
		})
	}
	count := func() int { mu.Lock(); defer mu.Unlock(); return len(acked) }
	for kill := range 5 {
		cmd := start()
		had := count()
		for count() < had+20 && ctx.Err() == nil {
			time.Sleep(5 * time.Millisecond)
		}
		time.Sleep(time.Duration(rand.IntN(30)) * time.Millisecond)
		cmd.Process.Kill()
		cmd.Wait()
		if ctx.Err() != nil {
			t.Fatalf("after kill %d no progress:\n%s", kill, &said)
		}
	}
	cmd := start()
	defer func() { cmd.Process.Kill(); cmd.Wait() }()
	had := count()
	for count() < had+5 && ctx.Err() == nil {
		time.Sleep(5 * time.Millisecond)
	}
	stop()
	wg.Wait()
	var keys []string
	var newest int64
	for k, h := range acked {
		keys = append(keys, k)
		newest = max(newest, h)
	}
	lost := 0
	for len(keys) > 0 {
		n := min(len(keys), 16)
		v, err := cl.ReadAt(ctx, newest, keys[:n]...)
		if err != nil {
			t.Fatal(err)
		}
		for _, k := range keys[:n] {
			if _, ok := v.Value(k); !ok {
				lost++
			}
		}
		keys = keys[n:]
	}
	t.Logf("%d transactions acknowledged over 5 kills", len(acked))
	if lost > 0 || len(acked) < 100 {
		t.Errorf("%d of %d acknowledged transactions are lost", lost, len(acked))
	}
	cmd.Process.Kill()
	cmd.Wait() // nobody writes to it any more
	if said.Len() > 0 {
		t.Errorf("the validators complained:\n%s", &said)
	}
}

// stragglers are goroutines of CometBFT and its libraries that end by themselves after its stop, or never.
var stragglers = []string{
	"cometbft/libs/autofile.OpenAutoFile", // the consensus log's signal handler and ticker are never stopped
}

func TestRunLeavesNothingBehind(t *testing.T) {
	cycle := func() {
		g := newGrid(t, 1, nil)
		v := g.start(0)
		await(t, v, 10*time.Second)
		c := g.client(nil)
		if _, err := c.Submit(within(t, 10*time.Second), []byte("1:a=1|good")); err != nil {
			t.Fatal(err)
		}
		g.stop(0)
		c.Close()
		for _, addr := range []string{g.addrs[0], g.configs[0].P2P} {
			if c, err := net.Dial("tcp", addr); err == nil {
				c.Close()
				t.Errorf("%s is still open", addr)
			}
		}
	}
	cycle() // what is started once and for all
	before := stacks()
	cycle()
	deadline := time.Now().Add(5 * time.Second)
	for {
		left := map[string]string{}
		for id, s := range stacks() {
			if _, ok := before[id]; !ok && !known(s) {
				left[id] = s
			}
		}
		if len(left) == 0 {
			return
		}
		if time.Now().After(deadline) {
			for _, s := range left {
				t.Errorf("left behind:\n%s", s)
			}
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func known(stack string) bool {
	for _, s := range stragglers {
		if strings.Contains(stack, s) {
			return true
		}
	}
	return strings.Contains(stack, "TestRunLeavesNothingBehind") || strings.Contains(stack, "testing.(*T).Run")
}

// stacks returns the goroutines by their number.
func stacks() map[string]string {
	b := make([]byte, 4<<20)
	b = b[:runtime.Stack(b, true)]
	out := map[string]string{}
	for s := range strings.SplitSeq(string(b), "\n\n") {
		id, _, _ := strings.Cut(s, " [")
		out[id] = s
	}
	return out
}

func TestAPIHoldsItsLimits(t *testing.T) {
	g := newGrid(t, 1, nil)
	await(t, g.start(0), 10*time.Second)
	ctx := within(t, 30*time.Second)
	c := g.client(nil)
	post := func(path string, body []byte) (int, problem) {
		t.Helper()
		r, _ := http.NewRequestWithContext(ctx, "POST", path, bytes.NewReader(body))
		resp, err := c.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, _ := io.ReadAll(resp.Body)
		var p problem
		if resp.StatusCode != 200 {
			if err := canonical.Decode(b, maxProblem, &p); err != nil && resp.StatusCode != 404 && resp.StatusCode != 405 {
				t.Errorf("%s answers %d with %q", path, resp.StatusCode, b)
			}
		}
		return resp.StatusCode, p
	}
	many := readRequest{}
	for i := range MaxKeys + 1 {
		many.Keys = append(many.Keys, strconv.AppendInt(nil, int64(i), 10))
	}
	for name, c := range map[string]struct {
		path string
		body []byte
		want int
	}{
		"control: as many keys as are allowed": {pathRead, canonical.Encode(readRequest{Keys: many.Keys[:MaxKeys]}), 200},
		"a key too many":                       {pathRead, canonical.Encode(many), 400},
		"a key too long":                       {pathRead, canonical.Encode(readRequest{Keys: [][]byte{make([]byte, MaxKey+1)}}), 400},
		"a key twice":                          {pathRead, canonical.Encode(readRequest{Keys: [][]byte{{1}, {2}, {1}}}), 400},
		"a watch with more than a height":      {pathWatch, make([]byte, maxSmall+1), 413},
		"an empty key":                         {pathRead, canonical.Encode(readRequest{Keys: [][]byte{{}}}), 400},
		"not CBOR":                             {pathRead, []byte("{}"), 400},
		"deeply nested CBOR":                   {pathRead, bytes.Repeat([]byte{0x81}, 100_000), 400},
		"a huge body":                          {pathRead, make([]byte, maxRequest+1), 413},
		"a huge transaction":                   {pathTx, make([]byte, MaxTx+1), 413},
		"an empty transaction":                 {pathTx, nil, 422},
		"the wake as a transaction":            {pathTx, []byte(wake), 422},
		"a header before the first":            {pathHeader, canonical.Encode(headerRequest{Height: -1}), 400},
		"a path that is not there":             {"/status", nil, 404},
		"CometBFT's own":                       {"/broadcast_tx_commit", nil, 404},
	} {
		if got, p := post(c.path, c.body); got != c.want {
			t.Errorf("%s: status %d %q, want %d", name, got, p.Message, c.want)
		}
	}
	// Rate: far more requests at once than a connection may send.
	var wg sync.WaitGroup
	var mu sync.Mutex
	got := map[int]int{}
	began := time.Now()
	for range 64 {
		wg.Go(func() {
			for range 60 {
				s, _ := post(pathWatch, []byte("x"))
				mu.Lock()
				got[s]++
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	// A busy machine may take them no faster than the rate lets them in: TestARateIsHeld has the clock of its own.
	quick := float64(got[400]+got[429]) > burstPerConn+ratePerConn*time.Since(began).Seconds()
	if got[400] < burstPerConn/2 || quick && got[429] == 0 {
		t.Errorf("statuses of a burst: %v", got)
	}
	// Only TLS 1.3 with HTTP/2.
	for name, conf := range map[string]*tls.Config{
		"TLS 1.2":                {MaxVersion: tls.VersionTLS12, NextProtos: []string{"h2"}},
		"classical key exchange": {NextProtos: []string{"h2"}, CurvePreferences: []tls.CurveID{tls.X25519}},
	} {
		conf.InsecureSkipVerify = true
		if conn, err := tls.Dial("tcp", g.addrs[0], conf); err == nil {
			conn.Close()
			t.Errorf("%s was accepted", name)
		}
	}
	conn, err := tls.Dial("tcp", g.addrs[0], &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
	if err != nil {
		t.Fatalf("control: TLS 1.3 with HTTP/2: %v", err)
	}
	conn.Close()
	conn, err = tls.Dial("tcp", g.addrs[0], &tls.Config{InsecureSkipVerify: true})
	if err == nil {
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(5 * time.Second))
		fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: ledger\r\nContent-Length: 0\r\n\r\n", pathRead)
		if b, _ := io.ReadAll(conn); bytes.Contains(b, []byte("HTTP/1.1")) {
			t.Errorf("HTTP/1.1 was answered: %q", b)
		}
	}
}

func TestStrangersDoNotJoinConsensus(t *testing.T) {
	// 0 is the only validator and knows 2. Both 1 and 2 know 0 and would follow its chain.
	g := newGrid(t, 3, func(i int, c *Config) {
		if i == 0 {
			c.Peers = c.Peers[1:]
		} else {
			c.Peers = c.Peers[:1]
		}
	})
	g.genesis.Validators = g.genesis.Validators[:1]
	var vs []*Validator
	for i := range 3 {
		g.configs[i].Genesis.Validators = g.genesis.Validators
		vs = append(vs, g.start(i))
	}
	ctx := within(t, 30*time.Second)
	r, err := g.client(func(c *ClientConfig) { c.Servers = c.Servers[:1] }).Submit(ctx, []byte("1:a=1|good"))
	if err != nil {
		t.Fatal(err)
	}
	for h := int64(0); h < r.Height+2; _, h = vs[2].State() {
		if ctx.Err() != nil {
			t.Fatalf("control: the peer is at height %d and does not follow", h)
		}
		time.Sleep(10 * time.Millisecond)
	}
	if _, h := vs[1].State(); h != 0 {
		t.Errorf("a stranger was given the chain up to height %d", h)
	}
}
