package store

import (
	"bytes"
	"fmt"
	"io"
	"sync/atomic"
	"syscall"
	"testing"
)

// cpu reports what a core would do: on a machine with other work the wall clock says little.
func cpu(b *testing.B, size int) func() {
	now := func() int64 {
		var u syscall.Rusage
		syscall.Getrusage(syscall.RUSAGE_SELF, &u)
		return u.Utime.Nano() + u.Stime.Nano()
	}
	begin := now()
	return func() {
		b.ReportMetric(float64(size)*float64(b.N)*1e3/float64(now()-begin), "MB/cpu-s")
	}
}

// BenchmarkBodies writes and reads bodies on six directories in memory, where there is any, by eight callers at once.
//
//	go test ./store -run '^$' -bench Bodies -benchmem
func BenchmarkBodies(b *testing.B) {
	for _, size := range []int{4 << 10, 1 << 20, 10 << 20} {
		s := newBed(b, 4, 6).opened()
		body := noise(size)
		var n atomic.Int64
		bodies := make([]Body, 0, 64)
		for i := range 16 {
			bodies = append(bodies, keep(b, s, fmt.Sprint("read", i), "", body))
		}
		b.Run(fmt.Sprintf("%dKiB/write", size>>10), func(b *testing.B) {
			b.SetBytes(int64(size))
			b.ReportAllocs()
			b.SetParallelism(4)
			defer cpu(b, size)()
			b.RunParallel(func(p *testing.PB) {
				for p.Next() {
					made, err := s.Write(b.Context(), "", bytes.NewReader(body), int64(size))
					if err != nil {
						b.Error(err)
						return
					}
					key := []byte(fmt.Sprint("key", n.Add(1)%64))
					v, _ := made.MarshalBinary()
					err = s.Update(b.Context(), func(t Tx) error {
						old, ok, err := t.Get(key)
						if err != nil {
							return err
						}
						var was Body
						if ok && was.UnmarshalBinary(old) == nil {
							t.Drop(was)
						}
						t.Set(key, v)
						t.Keep(made)
						return nil
					})
					if err != nil {
						b.Error(err)
						return
					}
				}
			})
		})
		b.Run(fmt.Sprintf("%dKiB/read", size>>10), func(b *testing.B) {
			b.SetBytes(int64(size))
			b.ReportAllocs()
			b.SetParallelism(4)
			defer cpu(b, size)()
			b.RunParallel(func(p *testing.PB) {
				for i := 0; p.Next(); i++ {
					x := bodies[i%len(bodies)]
					r, err := s.Read(b.Context(), x, 0, x.Size)
					if err == nil {
						_, err = io.Copy(io.Discard, r)
						r.Close()
					}
					if err != nil {
						b.Error(err)
						return
					}
				}
			})
		})
	}
}
