// Command deploy measures what a user waits for, on a grid of its own on this machine: from deploy to the first good
// answer, from a crash or a lost node to the next one, a transaction to its block, and requests through the gateway. It
// prints one JSON object a line. Times are of this machine at this moment; compare ratios and medians.
package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"holdfast/identity"
	"holdfast/internal/grid"
	"holdfast/internal/testimage"
	"holdfast/ledger"
)

func main() {
	quick := flag.Bool("quick", false, "fewer rounds: under a minute")
	flag.Parse()
	if err := run(*quick); err != nil {
		log.Fatal(err)
	}
}

// line is one result. Ratio is above 1 where holdfast is better than the peer.
type line struct {
	Bench     string  `json:"bench"`
	Case      string  `json:"case"`
	Value     float64 `json:"value"`
	Unit      string  `json:"unit"`
	Peer      string  `json:"peer,omitempty"`
	PeerValue float64 `json:"peer_value,omitempty"`
	Ratio     float64 `json:"ratio,omitempty"`
}

func say(c string, v float64, unit string) {
	json.NewEncoder(os.Stdout).Encode(line{Bench: "deploy", Case: c, Value: v, Unit: unit})
}

type bench struct {
	dir, app, bin, listen string
	client                *http.Client
}

func run(quick bool) error {
	bin, err := filepath.Abs("bin/holdfast")
	if err != nil {
		return err
	}
	top, err := os.MkdirTemp("", "hfbench")
	if err != nil {
		return err
	}
	defer os.RemoveAll(top)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	b := &bench{dir: filepath.Join(top, "grid"), app: filepath.Join(top, "app"), bin: bin, listen: ln.Addr().String()}
	ln.Close()
	img, err := testimage.Server(top)
	if err != nil {
		return err
	}
	if err := img.WriteLayout(filepath.Join(b.app, "img")); err != nil {
		return err
	}
	if _, err := b.holdfast("up", "--detach", "--listen", b.listen); err != nil {
		return err
	}
	defer b.holdfast("down", "--data")
	root, err := b.holdfast("ca")
	if err != nil {
		return err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM([]byte(root))
	b.client = &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: pool}, MaxIdleConnsPerHost: 64,
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, network, b.listen)
		},
	}}
	rounds := 10
	if quick {
		rounds = 3
	}
	for _, f := range []func(int) error{b.commits, b.deploys, b.crashes, b.requests, b.losses} {
		if err := f(rounds); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) holdfast(args ...string) (string, error) {
	cmd := exec.Command(b.bin, append([]string{"--dir", b.dir}, args...)...)
	cmd.Dir = b.app
	if args[0] == "down" {
		cmd.Dir = "/"
	}
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("holdfast %s: %w: %s", strings.Join(args, " "), err, errs.String())
	}
	return out.String(), nil
}

func median(d []time.Duration) float64 {
	slices.Sort(d)
	return d[len(d)/2].Seconds()
}

// commits measures transactions that create accounts, which anybody may: on a ledger that is idle, and one right after
// another, where each meets the block that proves the one before.
func (b *bench) commits(rounds int) error {
	c, _, err := grid.Connect(b.dir)
	if err != nil {
		return err
	}
	defer c.Close()
	ctx := context.Background()
	open, err := identity.GenerateOpeningKey()
	if err != nil {
		return err
	}
	commit := func() (time.Duration, error) {
		k := identity.GenerateKey()
		tx := ledger.NewTx(c.Grid(), ledger.KindAccountCreate, ledger.Actor{}, 0, &ledger.AccountCreate{
			Devices: []identity.Device{{Name: "bench", Key: k.Public()}}, Policy: identity.SingleDevice(), Sealing: open.Public()})
		tx.Sign(k)
		begin := time.Now()
		_, err := c.Submit(ctx, tx)
		return time.Since(begin), err
	}
	for _, pace := range []struct {
		name string
		wait time.Duration
	}{{"ledger commit", 60 * time.Millisecond}, {"ledger commit, one right after another", 0}} {
		var all []time.Duration
		for range 10 * rounds {
			time.Sleep(pace.wait)
			d, err := commit()
			if err != nil {
				return err
			}
			all = append(all, d)
		}
		say(pace.name, 1000*median(all), "ms")
	}
	return nil
}

func (b *bench) compose(n int) error {
	return os.WriteFile(filepath.Join(b.app, "app.yaml"), fmt.Appendf(nil, `
name: bench
services:
  web:
    image: oci:img
    environment: {GREETING: "round-%d"}
    cpus: 2
x-holdfast:
  routes: [{host: bench.localhost, service: web, port: 8080}]
`, n), 0o600)
}

// answer waits until the route answers with a text, and returns how long that took.
func (b *bench) answer(begin time.Time, want string) (time.Duration, error) {
	for time.Since(begin) < time.Minute {
		r, err := b.client.Get("https://bench.localhost/")
		if err == nil {
			body, _ := io.ReadAll(r.Body)
			r.Body.Close()
			if r.StatusCode == 200 && strings.Contains(string(body), want) {
				return time.Since(begin), nil
			}
		}
		time.Sleep(5 * time.Millisecond)
	}
	return 0, errors.New("no good answer within a minute")
}

// deploys measures from the command's start to the first good answer of the new revision. The first round brings the
// image; the others find its layers on the node.
func (b *bench) deploys(rounds int) error {
	var all []time.Duration
	for n := range rounds + 1 {
		if err := b.compose(n); err != nil {
			return err
		}
		begin := time.Now()
		failed := make(chan error, 1)
		go func() { _, err := b.holdfast("deploy", filepath.Join(b.app, "app.yaml"), "--yes"); failed <- err }()
		d, err := b.answer(begin, fmt.Sprintf("round-%d", n))
		if err = errors.Join(err, <-failed); err != nil {
			return err
		}
		if n == 0 {
			say("first deploy to first good answer", d.Seconds(), "s")
			continue
		}
		all = append(all, d)
	}
	say("deploy to first good answer, layers on the node", median(all), "s")
	return nil
}

func (b *bench) crashes(rounds int) error {
	var all []time.Duration
	for range min(rounds, 5) {
		begin := time.Now()
		if r, err := b.client.Get("https://bench.localhost/exit?code=1"); err == nil {
			r.Body.Close()
		}
		d, err := b.answer(begin, "hello")
		if err != nil {
			return err
		}
		all = append(all, d)
		if len(all) == 2 && rounds < 10 {
			break
		}
		time.Sleep(11 * time.Second) // what ran for ten seconds restarts at once
	}
	say("crash to first good answer", median(all), "s")
	return nil
}

func (b *bench) losses(rounds int) error {
	var all []time.Duration
	for range max(rounds/5, 1) {
		out, err := b.holdfast("status", "--json")
		if err != nil {
			return err
		}
		var s struct{ Workloads []struct{ Node string } }
		if err := json.Unmarshal([]byte(out), &s); err != nil || len(s.Workloads) == 0 {
			return fmt.Errorf("status: %v", err)
		}
		node := s.Workloads[0].Node
		begin := time.Now()
		if _, err := b.holdfast("lab", "kill", node); err != nil {
			return err
		}
		d, err := b.answer(begin, "hello")
		if err != nil {
			return err
		}
		all = append(all, d)
		if _, err := b.holdfast("lab", "resume", node); err != nil {
			return err
		}
		time.Sleep(3 * time.Second)
	}
	say("node loss to first good answer", median(all), "s")
	return nil
}

// requests measures through Edge and Origin beside the same server outside all of it, on loopback without TLS.
func (b *bench) requests(rounds int) error {
	bin, err := testimage.ServerBinary(b.app)
	if err != nil {
		return err
	}
	path := filepath.Join(b.app, "direct")
	if err := os.WriteFile(path, bin, 0o755); err != nil {
		return err
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	_, port, _ := net.SplitHostPort(ln.Addr().String())
	ln.Close()
	cmd := exec.Command(path)
	cmd.Env = []string{"PORT=" + port}
	if err := cmd.Start(); err != nil {
		return err
	}
	defer func() { cmd.Process.Kill(); cmd.Wait() }()
	direct := "http://127.0.0.1:" + port + "/"
	for range 100 {
		if r, err := http.Get(direct); err == nil {
			r.Body.Close()
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	span := time.Duration(rounds) * 500 * time.Millisecond
	plain := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 64}}
	pr, pl := load(plain, direct, span)
	hr, hl := load(b.client, "https://bench.localhost/", span)
	e := json.NewEncoder(os.Stdout)
	e.Encode(line{"deploy", "requests through Edge, Origin and gVisor, c16", hr, "1/s", "the same server on loopback, no TLS, no sandbox", pr, hr / pr})
	e.Encode(line{"deploy", "p99 through Edge, Origin and gVisor, c16", 1000 * hl.Seconds(), "ms", "the same server on loopback, no TLS, no sandbox", 1000 * pl.Seconds(), pl.Seconds() / hl.Seconds()})
	return nil
}

// load returns requests a second and the 99th percentile of the latency.
func load(c *http.Client, url string, span time.Duration) (float64, time.Duration) {
	var mu sync.Mutex
	var all []time.Duration
	var wg sync.WaitGroup
	begin := time.Now()
	for range 16 {
		wg.Go(func() {
			var mine []time.Duration
			for time.Since(begin) < span {
				t := time.Now()
				r, err := c.Get(url)
				if err != nil {
					continue
				}
				io.Copy(io.Discard, r.Body)
				r.Body.Close()
				mine = append(mine, time.Since(t))
			}
			mu.Lock()
			all = append(all, mine...)
			mu.Unlock()
		})
	}
	wg.Wait()
	if len(all) == 0 {
		return 0, 0
	}
	slices.Sort(all)
	return float64(len(all)) / span.Seconds(), all[len(all)*99/100]
}
