package node

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"testing"
)

// twoKeys makes bytes that AES-256-GCM opens under both keys with a nonce of zeros: under the first one to plain, but for its
// block number free, which is chosen so that both tags agree. (The tag is linear in the blocks, and does not commit to a key.)
func twoKeys(t *testing.T, k1, k2 [32]byte, label, plain []byte, free int) []byte {
	t.Helper()
	type key struct {
		b       cipher.Block
		h, mask field
	}
	newKey := func(k [32]byte) (out key) {
		var err error
		if out.b, err = aes.NewCipher(k[:]); err != nil {
			t.Fatal(err)
		}
		var h, m [16]byte
		out.b.Encrypt(h[:], h[:])
		m[15] = 1
		out.b.Encrypt(m[:], m[:])
		out.h, out.mask = toField(h[:]), toField(m[:])
		return out
	}
	a, b := newKey(k1), newKey(k2)
	c := make([]byte, len(plain))
	cipher.NewCTR(a.b, append(make([]byte, 15), 2)).XORKeyStream(c, plain)
	pad := func(b []byte) []byte { return append(bytes.Clone(b), make([]byte, (16-len(b)%16)%16)...) }
	all := append(pad(label), pad(c)...)
	all = binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(all, uint64(len(label))*8), uint64(len(c))*8)
	at, n := len(pad(label))/16+free, len(all)/16
	var sum, diff field
	p1, p2 := a.h, b.h
	for i := n - 1; i >= 0; i-- {
		if d := p1.add(p2); i == at {
			diff = d
		} else {
			sum = sum.add(toField(all[i*16:]).mul(d))
		}
		p1, p2 = p1.mul(a.h), p2.mul(b.h)
	}
	x := sum.add(a.mask).add(b.mask).mul(diff.inverse()).bytes()
	copy(c[free*16:], x)
	copy(all[at*16:], x)
	var tag field
	for i := range n {
		tag = tag.add(toField(all[i*16:])).mul(a.h)
	}
	return append(c, tag.add(a.mask).bytes()...)
}

func openGCM(t *testing.T, k [32]byte, sealed []byte) []byte {
	t.Helper()
	b, err := aes.NewCipher(k[:])
	if err != nil {
		t.Fatal(err)
	}
	g, err := cipher.NewGCM(b)
	if err != nil {
		t.Fatal(err)
	}
	p, err := g.Open(nil, make([]byte, 12), sealed, []byte("holdfast/body/v1"))
	if err != nil {
		t.Fatalf("control: the adversary's bytes do not open: %v", err)
	}
	return p
}

// field is an element of GCM's: the first bit of the first byte is the coefficient of 1.
type field struct{ hi, lo uint64 }

func toField(b []byte) field {
	return field{binary.BigEndian.Uint64(b), binary.BigEndian.Uint64(b[8:])}
}
func (x field) add(y field) field { return field{x.hi ^ y.hi, x.lo ^ y.lo} }
func (x field) bytes() []byte {
	return binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, x.hi), x.lo)
}

func (x field) mul(y field) (z field) {
	for i := range 128 {
		word := x.hi
		if i >= 64 {
			word = x.lo
		}
		if word>>(63-i%64)&1 == 1 {
			z = z.add(y)
		}
		carry := y.lo & 1
		y = field{y.hi >> 1, y.lo>>1 | y.hi<<63}
		y.hi ^= carry * (0xe1 << 56)
	}
	return z
}

// inverse is x to the power of 2^128-2.
func (x field) inverse() field {
	z, sq := field{hi: 1 << 63}, x
	for range 127 {
		sq = sq.mul(sq)
		z = z.mul(sq)
	}
	return z
}
