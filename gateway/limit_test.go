package gateway

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

// TestStrangersCannotExhaustTheOrigin plays strangers who ask a slow workload for more than it can do at once: the agent's
// descriptors are bounded, who is too many is told so, and another workload of the same node answers.
func TestStrangersCannotExhaustTheOrigin(t *testing.T) {
	g := newGrid(t)
	n := g.node(1)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	var open atomic.Int64
	var accepting sync.WaitGroup
	accepting.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			open.Add(1)
			accepting.Go(func() { io.Copy(io.Discard, c); c.Close() }) // never answers
		}
	})
	t.Cleanup(func() { l.Close(); accepting.Wait() })
	g.ledger.route("slow.test", Server{n.id, id(9), 1})
	g.ledger.route("quick.test", Server{n.id, id(8), 1})
	check(t, n.SetServices([]Service{
		{Host: "slow.test", Workload: id(9), Epoch: 1, TLS: g.ca.leaf(t, "slow.test"), Dial: func(ctx context.Context) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", l.Addr().String())
		}},
		{Host: "quick.test", Workload: id(8), Epoch: 1, TLS: g.ca.leaf(t, "quick.test"),
			Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "quick") })},
	}))
	g.edge.Update()
	g.await("routes", func() bool { return g.edge.Status().Hosts["slow.test"] > 0 && g.edge.Status().Hosts["quick.test"] > 0 })
	client := func() *http.Client {
		tr := &http.Transport{ForceAttemptHTTP2: true, MaxConnsPerHost: 1, TLSClientConfig: &tls.Config{RootCAs: g.ca.pool},
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return new(net.Dialer).DialContext(ctx, "tcp", g.addr) }}
		t.Cleanup(tr.CloseIdleConnections)
		return &http.Client{Transport: tr}
	}
	ctx, cancel := context.WithCancel(t.Context())
	var asking sync.WaitGroup
	var refused atomic.Int64
	const conns, per = 8, 200
	for range conns {
		c := client()
		for range per {
			asking.Go(func() {
				req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://slow.test/", nil)
				if err != nil {
					return
				}
				r, err := c.Do(req)
				if err != nil {
					return
				}
				body, _ := io.ReadAll(r.Body)
				r.Body.Close()
				if r.StatusCode == http.StatusServiceUnavailable && strings.Contains(string(body), "try again") {
					refused.Add(1)
				}
			})
		}
	}
	g.await("the refusal of the rest", func() bool { return refused.Load() >= conns*per-maxServiceRequests && open.Load() == maxServiceRequests })
	r, err := client().Get("https://quick.test/")
	check(t, err)
	body, err := io.ReadAll(r.Body)
	r.Body.Close()
	if check(t, err); string(body) != "quick" {
		t.Errorf("another workload of the node answers %q", body)
	}
	if n := open.Load(); n > maxServiceRequests {
		t.Errorf("%d connections to one workload, at most %d are meant", n, maxServiceRequests)
	}
	cancel()
	asking.Wait()
	g.await("the end of all requests", func() bool { return n.atWork.Load() == 0 })
}
