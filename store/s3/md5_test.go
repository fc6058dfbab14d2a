package s3

import (
	"bytes"
	"crypto/md5"
	"math/rand/v2"
	"sync"
	"testing"
)

func TestLanes(t *testing.T) {
	if !hasMD5x8 {
		t.Skip("the processor has no AVX2")
	}
	var s lanes
	noise := make([]byte, 3*laneMemory)
	rand.NewChaCha8([32]byte{3}).Read(noise)
	for _, bodies := range []int{1, 2, 3, 8, 20, mostLanes + 5} {
		var wg sync.WaitGroup
		for i := range bodies {
			wg.Go(func() {
				r := rand.New(rand.NewPCG(uint64(bodies), uint64(i)))
				h, end := s.hash()
				defer end()
				want := md5.New()
				for range 20 {
					off := r.IntN(len(noise))
					p := noise[off:][:r.IntN(len(noise)-off)>>r.IntN(20)]
					h.Write(p)
					want.Write(p)
					if r.IntN(4) == 0 && !bytes.Equal(h.Sum(nil), want.Sum(nil)) {
						t.Errorf("%d bodies: other sum in the middle", bodies)
						return
					}
				}
				if got := h.Sum([]byte("x")); !bytes.Equal(got, want.Sum([]byte("x"))) {
					t.Errorf("%d bodies: %x, not %x", bodies, got, want.Sum(nil))
				}
				h.Reset()
				if !bytes.Equal(h.Sum(nil), md5.New().Sum(nil)) {
					t.Errorf("%d bodies: other sum of nothing", bodies)
				}
			})
		}
		wg.Wait()
		if len(s.open) > 0 || len(s.free) > mostLanes {
			t.Fatalf("%d bodies: %d lanes are open, %d free", bodies, len(s.open), len(s.free))
		}
	}
}

// BenchmarkLanes is of eight bodies at once; MB/s are of all.
func BenchmarkLanes(b *testing.B) {
	p := make([]byte, 64<<10)
	for _, bodies := range []int{1, 2, 8} {
		b.Run(string(rune('0'+bodies)), func(b *testing.B) {
			var s lanes
			var all []interface{ Write([]byte) (int, error) }
			for range bodies {
				h, end := s.hash()
				defer end()
				all = append(all, h)
			}
			b.SetBytes(int64(bodies * len(p)))
			for b.Loop() {
				for _, h := range all {
					h.Write(p)
				}
			}
		})
	}
	b.Run("package", func(b *testing.B) {
		h := md5.New()
		b.SetBytes(int64(len(p)))
		for b.Loop() {
			h.Write(p)
		}
	})
}
