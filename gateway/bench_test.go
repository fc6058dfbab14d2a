package gateway

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"
)

// Each benchmark runs direct (the same server, TLS 1.3 on loopback) and through an Edge and an Origin.

func benchServers(b *testing.B, handler http.Handler) map[string]func() *http.Client {
	g := newGrid(b)
	n := g.node(1)
	g.serve(n, "app.test", 7, 1, handler)
	direct := httptest.NewUnstartedServer(handler)
	direct.TLS = g.ca.leaf(b, "app.test")
	direct.TLS.MinVersion = tls.VersionTLS13
	direct.StartTLS()
	b.Cleanup(direct.Close)
	return map[string]func() *http.Client{
		"direct": func() *http.Client {
			c := g.client(false)
			c.Transport.(*http.Transport).DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, "tcp", direct.Listener.Addr().String())
			}
			return c
		},
		"tunnel": func() *http.Client { return g.client(false) },
	}
}

func BenchmarkRequests(b *testing.B) {
	clients := benchServers(b, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "ok") }))
	for _, way := range []string{"direct", "tunnel"} {
		b.Run(way, func(b *testing.B) {
			c := clients[way]()
			var (
				mu   sync.Mutex
				took []time.Duration
			)
			b.SetParallelism(16)
			b.RunParallel(func(pb *testing.PB) {
				var own []time.Duration
				for pb.Next() {
					start := time.Now()
					get(b, c, "https://app.test/")
					own = append(own, time.Since(start))
				}
				mu.Lock()
				took = append(took, own...)
				mu.Unlock()
			})
			slices.Sort(took)
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "req/s")
			b.ReportMetric(float64(took[len(took)*99/100].Microseconds())/1000, "p99-ms")
		})
	}
}

func BenchmarkBulk(b *testing.B) {
	const size = 64 << 20
	clients := benchServers(b, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", strconv.Itoa(size))
		block := make([]byte, 128<<10)
		for range size / len(block) {
			w.Write(block)
		}
	}))
	for _, way := range []string{"direct", "tunnel"} {
		b.Run(way, func(b *testing.B) {
			c := clients[way]()
			b.SetBytes(size)
			for b.Loop() {
				r, err := c.Get("https://app.test/")
				check(b, err)
				io.Copy(io.Discard, r.Body)
				r.Body.Close()
			}
		})
	}
}

// BenchmarkIdleTunnel reports what both ends of an idle tunnel hold, and of that what the multiplexer does.
func BenchmarkIdleTunnel(b *testing.B) {
	held := func(n int, open func() func()) float64 {
		var before, after runtime.MemStats
		runtime.GC()
		runtime.GC()
		runtime.ReadMemStats(&before)
		var stop []func()
		for range n {
			stop = append(stop, open())
		}
		runtime.GC()
		runtime.GC()
		runtime.ReadMemStats(&after)
		for _, f := range stop {
			f()
		}
		return float64(after.HeapInuse+after.StackInuse) - float64(before.HeapInuse+before.StackInuse)
	}
	const n = 100
	g := newGrid(b)
	tunnels := 0
	whole := held(n, func() func() {
		tunnels++
		o := g.node(byte(tunnels))
		g.await("tunnel", func() bool { s := o.Status(); return len(s.Edges) == 1 && s.Edges[0].Connected })
		return o.stop
	})
	mux := held(n, func() func() {
		near, _ := net.Pipe()
		s := newSession(near, time.Hour, nil)
		done := make(chan struct{})
		go func() { s.run(); close(done) }()
		return func() { s.close(nil); <-done }
	})
	b.ReportMetric(whole/n/2/1024, "KiB/end")
	b.ReportMetric(mux/n/1024, "KiB/mux")
}
