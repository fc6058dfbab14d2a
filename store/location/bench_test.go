package location

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"holdfast/disperse"
)

// A location over TLS on this machine, against the same bytes through plain TLS connections. TMPDIR says which disk:
//
//	TMPDIR=/dev/shm go test -run - -bench . ./store/location

const benchWorkers = 8

var benchSizes = []struct {
	name string
	size int
}{{"1KiB", 1 << 10}, {"256KiB", 256 << 10}, {"4MiB", 4 << 20}}

// distinct makes each shard another one, at little cost beside its name's.
func distinct(b []byte, i int64) Name {
	binary.BigEndian.PutUint64(b, uint64(i))
	n, _ := disperse.NameOf(b)
	return n
}

// eight runs f for b.N numbers in benchWorkers goroutines.
func eight(b *testing.B, f func(worker int, i int64)) {
	var next atomic.Int64
	var wg sync.WaitGroup
	b.ReportAllocs()
	b.ResetTimer()
	for w := range benchWorkers {
		wg.Go(func() {
			for i := next.Add(1); i <= int64(b.N); i = next.Add(1) {
				f(w, i)
			}
		})
	}
	wg.Wait()
	b.StopTimer()
}

func benchServer(b *testing.B) *Client {
	s := serve(b, ServerConfig{Path: b.TempDir(), Stores: []Store{{Name: "s", Keys: []Key{keyOf(Seed{1}, everything)}}}, Scrub: -1})
	c := s.client(b, Seed{1})
	announced(b, c, 1)
	return c
}

func BenchmarkPut(b *testing.B) {
	for _, size := range benchSizes {
		b.Run(size.name, func(b *testing.B) {
			c := benchServer(b)
			var bufs [benchWorkers][]byte
			names := make([][]Name, benchWorkers)
			for w := range bufs {
				bufs[w] = make([]byte, size.size)
				names[w] = nil
			}
			// Names are the front end's work, made before; a shard's bytes are then set again.
			all := make([]Name, b.N+1)
			for i := 1; i <= b.N; i++ {
				all[i] = distinct(bufs[0], int64(i))
			}
			b.SetBytes(int64(size.size))
			eight(b, func(w int, i int64) {
				binary.BigEndian.PutUint64(bufs[w], uint64(i))
				if err := c.Put(context.Background(), all[i], bufs[w], time.Time{}); err != nil {
					b.Error(err)
				}
			})
		})
	}
}

func BenchmarkGet(b *testing.B) {
	for _, size := range benchSizes {
		b.Run(size.name, func(b *testing.B) {
			c := benchServer(b)
			var names [64]Name
			buf := make([]byte, size.size)
			for i := range names {
				names[i] = distinct(buf, int64(i))
				good(b, "put", c.Put(context.Background(), names[i], buf, time.Time{}))
			}
			var bufs [benchWorkers][]byte
			for w := range bufs {
				bufs[w] = make([]byte, size.size)
			}
			b.SetBytes(int64(size.size))
			eight(b, func(w int, i int64) {
				if err := c.Get(context.Background(), names[i%64], 0, bufs[w]); err != nil {
					b.Error(err)
				}
			})
		})
	}
}

// BenchmarkEight has eight callers at one location, in this process and over TLS.
func BenchmarkEight(b *testing.B) {
	places := map[string]func(b *testing.B) Location{
		"dir": func(b *testing.B) Location {
			d := open(b, Config{Path: b.TempDir(), Trusted: true})
			b.Cleanup(func() { d.Close() })
			return announced(b, d.As(everything), 1)
		},
		"tls": func(b *testing.B) Location { return benchServer(b) },
	}
	for _, where := range []string{"dir", "tls"} {
		for _, size := range []int{2 << 10, 1 << 20} {
			run := func(what string, f func(l Location, n Name, p []byte, i int64) error) {
				b.Run(fmt.Sprintf("%s/%s %d", where, what, size), func(b *testing.B) {
					l := places[where](b)
					first := make([]byte, size)
					names := make([]Name, b.N+1)
					if what == "get" {
						names = names[:min(len(names), 64)]
					}
					for i := range names {
						names[i] = distinct(first, int64(i))
						if what == "get" {
							good(b, "put", l.Put(context.Background(), names[i], first, time.Time{}))
						}
					}
					var bufs [benchWorkers][]byte
					for w := range bufs {
						bufs[w] = make([]byte, size)
					}
					b.SetBytes(int64(size))
					eight(b, func(w int, i int64) {
						i %= int64(len(names))
						binary.BigEndian.PutUint64(bufs[w], uint64(i))
						if err := f(l, names[i], bufs[w], i); err != nil && !errors.Is(err, ErrOldHead) {
							b.Error(err)
						}
					})
				})
			}
			run("put", func(l Location, n Name, p []byte, _ int64) error {
				return l.Put(context.Background(), n, p, time.Time{})
			})
			run("get", func(l Location, n Name, p []byte, _ int64) error { return l.Get(context.Background(), n, 0, p) })
			var head [1000]byte
			run("append", func(l Location, n Name, p []byte, i int64) error {
				return l.Append(context.Background(), n, p, uint64(i), head[:])
			})
		}
	}
}

// BenchmarkPlain sends as many bytes through TLS, and takes an answer of 16.
func BenchmarkPlain(b *testing.B) {
	for _, size := range benchSizes {
		b.Run(size.name, func(b *testing.B) {
			cert := certOf(b, Seed{2})
			cfg := tlsConfig(cert, func(Pin) bool { return true })
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				b.Fatal(err)
			}
			defer l.Close()
			go func() {
				for {
					raw, err := l.Accept()
					if err != nil {
						return
					}
					go func() {
						t := tls.Server(raw, cfg)
						defer t.Close()
						p := make([]byte, size.size)
						for {
							if _, err := io.ReadFull(t, p); err != nil {
								return
							}
							t.Write(p[:frameSize])
						}
					}()
				}
			}()
			var conns [benchWorkers]*tls.Conn
			var bufs [benchWorkers][]byte
			for w := range conns {
				raw, err := net.Dial("tcp", l.Addr().String())
				if err != nil {
					b.Fatal(err)
				}
				conns[w] = tls.Client(raw, cfg)
				defer conns[w].Close()
				bufs[w] = make([]byte, size.size)
				good(b, "handshake", conns[w].Handshake())
			}
			b.SetBytes(int64(size.size))
			eight(b, func(w int, i int64) {
				var answer [frameSize]byte
				conns[w].Write(bufs[w])
				if _, err := io.ReadFull(conns[w], answer[:]); err != nil {
					b.Error(err)
				}
			})
		})
	}
}

// BenchmarkSix puts the shards of objects into six directories of one disk at once, as a front end on one machine does.
func BenchmarkSix(b *testing.B) {
	for _, size := range []int{1200, 20 << 10, 64 << 10, 256 << 10} {
		b.Run(fmt.Sprintf("%dB", size), func(b *testing.B) {
			root := b.TempDir()
			var six [6]Location
			for i := range six {
				d := open(b, Config{Path: fmt.Sprintf("%s/%d", root, i)})
				defer d.Close()
				six[i] = announced(b, d.As(everything), 1)
			}
			names := make([]Name, b.N+1)
			buf := make([]byte, size)
			for i := 1; i <= b.N; i++ {
				names[i] = distinct(buf, int64(i))
			}
			var bufs [benchWorkers][]byte
			for w := range bufs {
				bufs[w] = make([]byte, size)
			}
			b.SetBytes(int64(6 * size))
			eight(b, func(w int, i int64) {
				binary.BigEndian.PutUint64(bufs[w], uint64(i))
				var wg sync.WaitGroup
				for _, l := range six {
					wg.Go(func() {
						if err := l.Put(context.Background(), names[i], bufs[w], time.Time{}); err != nil {
							b.Error(err)
						}
					})
				}
				wg.Wait()
			})
		})
	}
}
