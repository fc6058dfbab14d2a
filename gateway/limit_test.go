package gateway

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

// A crowd is many who ask for one host, from one address.
type crowd struct {
	clients []*http.Client
	refused atomic.Int64
	asking  sync.WaitGroup
}

func (g *grid) crowd(from string, conns int) *crowd {
	c := new(crowd)
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
	for range conns {
		tr := &http.Transport{ForceAttemptHTTP2: true, MaxConnsPerHost: 1, TLSClientConfig: &tls.Config{RootCAs: g.ca.pool},
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return dialer.DialContext(ctx, "tcp", g.addr)
			}}
		g.t.Cleanup(tr.CloseIdleConnections)
		c.clients = append(c.clients, &http.Client{Transport: tr})
	}
	return c
}

// ask asks many times on each connection and does not wait for the answers.
func (c *crowd) ask(ctx context.Context, url string, per int) {
	for _, client := range c.clients {
		for range per {
			c.asking.Go(func() {
				req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
				if err != nil {
					return
				}
				r, err := client.Do(req)
				if err != nil {
					return
				}
				body, _ := io.ReadAll(r.Body)
				r.Body.Close()
				if r.StatusCode == http.StatusServiceUnavailable && strings.Contains(string(body), "try again") {
					c.refused.Add(1)
				}
			})
		}
	}
}

func (n *node) atWork() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.requests
}

// TestStrangersCannotExhaustTheOrigin plays strangers who ask a slow workload for more than it can do at once: the agent's
// descriptors are bounded, who is too many is told so, and others still come through to it and to the node's other workloads.
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
	ctx, cancel := context.WithCancel(t.Context())
	const conns, per = 4, 200

	// One address gets half of a service.
	one := g.crowd("127.0.0.2", conns)
	one.ask(ctx, "https://slow.test/", per)
	const half = maxServiceRequests / 2
	g.await("the refusal of one address", func() bool { return one.refused.Load() >= conns*per-half && open.Load() >= half })
	if n := open.Load(); n != half {
		t.Errorf("%d requests of one address are at work, %d are meant", n, half)
	}
	// Others get little each, and are many.
	others := g.crowd("127.0.0.3", 1)
	others.ask(ctx, "https://slow.test/", fewRequests)
	g.await("another address", func() bool { return open.Load() == half+fewRequests })
	if n := others.refused.Load(); n > 0 {
		t.Errorf("%d requests of another address are refused", n)
	}
	for i := range (half - fewRequests) / fewRequests {
		g.crowd(fmt.Sprintf("127.0.1.%d", i+1), 1).ask(ctx, "https://slow.test/", fewRequests)
	}
	g.await("a full service", func() bool { return open.Load() == maxServiceRequests })
	last := g.crowd("127.0.0.4", 1)
	last.ask(ctx, "https://slow.test/", 1)
	g.await("the refusal of everybody", func() bool { return last.refused.Load() == 1 })

	if _, body := get(t, g.client(true), "https://quick.test/"); body != "quick" {
		t.Errorf("another workload of the node answers %q", body)
	}
	if n := open.Load(); n > maxServiceRequests {
		t.Errorf("%d connections to one workload, at most %d are meant", n, maxServiceRequests)
	}
	cancel()
	g.await("the end of all requests", func() bool { return n.atWork() == 0 })
	one.asking.Wait()
	if _, body := get(t, g.client(true), "https://quick.test/"); body != "quick" {
		t.Errorf("afterwards it answers %q", body)
	}
}

// TestClientsWhoGiveUpLeaveNoDialsBehind plays one who asks and takes back, again and again: a dial outlives its request, and
// all dials together stay within the limit.
func TestClientsWhoGiveUpLeaveNoDialsBehind(t *testing.T) {
	g := newGrid(t)
	n := g.node(1)
	var dialing atomic.Int64
	release := make(chan struct{})
	g.ledger.route("slow.test", Server{n.id, id(9), 1})
	check(t, n.SetServices([]Service{{Host: "slow.test", Workload: id(9), Epoch: 1, TLS: g.ca.leaf(t, "slow.test"), Dial: func(context.Context) (net.Conn, error) {
		dialing.Add(1)
		<-release
		return nil, errors.New("no answer")
	}}}))
	g.edge.Update()
	g.await("route", func() bool { return g.edge.Status().Hosts["slow.test"] > 0 })
	c := g.crowd("127.0.0.2", 4)
	for wave := range 3 {
		ctx, cancel := context.WithCancel(t.Context())
		c.ask(ctx, "https://slow.test/", 180)
		g.await("a wave of requests", func() bool { return n.atWork() == maxServiceRequests/2 })
		if wave == 0 {
			g.await("control: the dials of a wave", func() bool { return dialing.Load() == maxServiceRequests/2 })
		}
		cancel()
		c.asking.Wait()
		g.await("their end", func() bool { return n.atWork() == 0 })
	}
	if n := dialing.Load(); n > maxServiceRequests {
		t.Errorf("%d dials to one workload, at most %d are meant", n, maxServiceRequests)
	}
	close(release)
}

// TestNoServiceUsesUpTheOrigin: beyond half of what an Origin serves at once, a service with many requests gets no more, and
// beyond all of it nobody does.
func TestNoServiceUsesUpTheOrigin(t *testing.T) {
	cert, _ := identity(t)
	o, err := NewOrigin(OriginConfig{Certificate: cert})
	check(t, err)
	client := func(i int) netip.Prefix {
		return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), 32)
	}
	var all []func()
	enter := func(s *served, i int) bool {
		ok := o.enter(s, client(i))
		all = append(all, func() { o.leave(s, client(i), ok) })
		return ok
	}
	service := func() *served { return o.newServed(Claim{Host: "a.test", Workload: id(1), Epoch: 1}) }
	asked, last := 0, service()
	for o.requests < maxOriginRequests/2 {
		busy := service()
		for range maxServiceRequests {
			if asked++; !enter(busy, asked) {
				t.Fatalf("request %d is refused", asked)
			}
		}
	}
	for o.requests < maxOriginRequests {
		last = service()
		for range fewRequests {
			if asked++; !enter(last, asked) {
				t.Fatalf("request %d, to a quiet service, is refused", asked)
			}
		}
		if asked++; o.requests < maxOriginRequests && enter(last, asked) {
			t.Fatal("a service with many requests gets more than half of what the Origin serves")
		}
	}
	if asked++; enter(service(), asked) {
		t.Error("a full Origin takes one more")
	}
	for _, f := range all {
		f()
	}
	if o.requests != 0 || o.busy != 0 || last.requests != 0 || len(last.clients) != 0 {
		t.Errorf("left behind: %d requests, %d busy, %+v", o.requests, o.busy, last.clients)
	}
}

// TestManyHostsTakeNoOthersOnlyOne plays a tenant whose workload has more hosts than a node can claim: the others on the node
// are served as before, and always the same ones.
func TestManyHostsTakeNoOthersOnlyOne(t *testing.T) {
	cert, _ := identity(t)
	o, err := NewOrigin(OriginConfig{Certificate: cert})
	check(t, err)
	config := &tls.Config{Certificates: []tls.Certificate{cert}}
	service := func(w byte, host string) Service {
		return Service{Host: host, Workload: id(w), Epoch: 1, TLS: config, Handler: http.NotFoundHandler()}
	}
	var honest, all []Service
	for w := byte(100); w < 200; w++ { // after the greedy one, however they are sorted
		honest = append(honest, service(w, fmt.Sprintf("z%d.test", w)))
	}
	for i := range maxClaims + 100 {
		all = append(all, service(1, fmt.Sprintf("a%d.test", i)))
	}
	all = append(all, honest...)
	var before claimList
	for range 5 {
		rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
		if err := o.SetServices(all); err == nil {
			t.Error("nobody is told that there are too many")
		}
		if len(o.list.claims) != maxClaims {
			t.Fatalf("%d claims, %d have room", len(o.list.claims), maxClaims)
		}
		for _, s := range honest {
			if !slices.Contains(o.list.claims, s.claim()) {
				t.Fatalf("%s is served no more", s.Host)
			}
		}
		if before.serial != 0 && o.list.serial != before.serial {
			t.Fatal("others are served than before")
		}
		before = o.list
		if _, err := o.list.encode(); err != nil {
			t.Fatal(err)
		}
	}
	check(t, o.SetServices(honest))
	if len(o.list.claims) != len(honest) {
		t.Errorf("control: %d claims", len(o.list.claims))
	}
}
