package store

import (
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
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

// BenchmarkUpkeep reads all shards and checks them, and makes those of a location anew that lost all. Beside it is what any
// that reads and writes them has to do: reading the same files, and copying the files that were lost.
//
//	HOLDFAST_STORE_ON_DISK=1 go test ./store -run '^$' -bench Upkeep -benchtime 3x
func BenchmarkUpkeep(b *testing.B) {
	bed := newBed(b, 4, 6)
	bed.change = func(c *Config) { c.Upkeep = Upkeep{RepairAfter: time.Nanosecond, Grace: time.Nanosecond} }
	s := bed.opened()
	const total, each = 256 << 20, 8 << 20
	for i := range total / each {
		keep(b, s, fmt.Sprint("body", i), "", noise(each))
	}
	place := filepath.Join(filepath.Dir(bed.frontAt), "location-0")
	shards := func(top string) (out []string, size int64) {
		filepath.WalkDir(top, func(p string, d fs.DirEntry, err error) error {
			if err == nil && d.Type().IsRegular() {
				if st, err := d.Info(); err == nil && st.Size() > 64<<10 {
					out, size = append(out, p), size+st.Size()
				}
			}
			return nil
		})
		return out, size
	}
	_, all := shards(filepath.Dir(bed.frontAt))
	lost, one := shards(place)
	cold := func(top string) { // the kernel reads from the disk, where there is one
		files, _ := shards(top)
		for _, p := range files {
			if f, err := os.Open(p); err == nil {
				unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
				f.Close()
			}
		}
	}
	b.Run("verify", func(b *testing.B) {
		b.SetBytes(all)
		for range b.N {
			b.StopTimer()
			cold(filepath.Dir(bed.frontAt))
			b.StartTimer()
			if sum, err := s.Verify(b.Context(), 0, nil); err != nil || sum.Bad > 0 {
				b.Fatalf("%+v %v", sum, err)
			}
		}
	})
	b.Run("verify/limit", func(b *testing.B) {
		b.SetBytes(all)
		buf := make([]byte, 1<<20)
		for range b.N {
			b.StopTimer()
			cold(filepath.Dir(bed.frontAt))
			b.StartTimer()
			files, _ := shards(filepath.Dir(bed.frontAt))
			for _, p := range files {
				f, err := os.Open(p)
				if err != nil {
					b.Fatal(err)
				}
				io.CopyBuffer(io.Discard, struct{ io.Reader }{f}, buf)
				f.Close()
			}
		}
	})
	b.Run("repair", func(b *testing.B) {
		b.SetBytes(one)
		for range b.N {
			b.StopTimer()
			for _, p := range lost {
				os.Remove(p)
			}
			if _, err := s.Verify(b.Context(), 0, nil); err != nil {
				b.Fatal(err)
			}
			cold(filepath.Dir(bed.frontAt))
			b.StartTimer()
			did, err := s.RepairAt(b.Context(), 0, nil)
			if err != nil || did.Shards == 0 {
				b.Fatalf("%+v %v", did, err)
			}
			b.StopTimer()
			lost, _ = shards(place)
			b.StartTimer()
		}
	})
	b.Run("repair/limit", func(b *testing.B) { // four shards are read for one that is written and synced
		b.SetBytes(one)
		to := filepath.Join(b.TempDir(), "copy")
		for range b.N {
			b.StopTimer()
			cold(filepath.Dir(bed.frontAt))
			b.StartTimer()
			for i := range 5 {
				files, _ := shards(filepath.Join(filepath.Dir(bed.frontAt), fmt.Sprint("location-", i)))
				for _, p := range files {
					from, err := os.Open(p)
					if err != nil {
						b.Fatal(err)
					}
					if i > 0 {
						io.Copy(io.Discard, struct{ io.Reader }{from})
					} else if f, err := os.Create(to); err == nil {
						io.Copy(struct{ io.Writer }{f}, struct{ io.Reader }{from})
						f.Sync()
						f.Close()
					}
					from.Close()
				}
			}
		}
	})
}
