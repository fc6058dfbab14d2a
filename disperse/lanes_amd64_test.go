package disperse

import (
	"crypto/sha256"
	"math/rand/v2"
	"testing"
)

func TestTwoLeavesAtOnceAreTwoLeaves(t *testing.T) {
	if !lanes {
		t.Skip("the processor has no SHA instructions")
	}
	r := rand.NewChaCha8([32]byte{7})
	b := make([]byte, 2*LeafSize+16)
	h := sha256.New()
	for i := range 200 {
		r.Read(b)
		if i == 0 {
			clear(b)
		}
		off := i % 16 // the instructions must not care where the bytes lie
		p, q := b[off:off+LeafSize], b[off+LeafSize:off+2*LeafSize]
		if i%3 == 0 {
			q = p
		}
		// Neighbours stay what they are.
		got := [4][32]byte{{1}, {}, {}, {2}}
		leaves2(&got[1], &got[2], (*[LeafSize]byte)(p), (*[LeafSize]byte)(q))
		if want := [4][32]byte{{1}, leaf(h, p), leaf(h, q), {2}}; got != want {
			t.Fatalf("leaves %d: %x, not %x", i, got, want)
		}
	}
}

func BenchmarkLeaves(b *testing.B) {
	p := make([]byte, 512<<10)
	for _, two := range []bool{false, true} {
		name := "one"
		if two {
			name = "two"
		}
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(p)))
			h := sha256.New()
			for b.Loop() {
				for i := 0; i < len(p); i += 2 * LeafSize {
					if two {
						var l, m [32]byte
						leaves2(&l, &m, (*[LeafSize]byte)(p[i:]), (*[LeafSize]byte)(p[i+LeafSize:]))
					} else {
						leaf(h, p[i:i+LeafSize])
						leaf(h, p[i+LeafSize:i+2*LeafSize])
					}
				}
			}
		})
	}
}
