package disperse

import "encoding/binary"

// blocks2 goes on with the SHA-256 of two messages over n > 0 blocks of 64 bytes each.
//
//go:noescape
func blocks2(s, t *[8]uint32, p, q *byte, n int)

// cpuid is what the processor says of itself; leaves have no subleaf but 0.
func cpuid(leaf uint32) (bx, cx uint32)

var lanes = hasLanes()

// hasLanes says whether blocks2 runs here: it needs SHA, SSSE3 and SSE4.1.
func hasLanes() bool {
	_, basic := cpuid(1)
	extended, _ := cpuid(7)
	return basic&(1<<9) != 0 && basic&(1<<19) != 0 && extended&(1<<29) != 0
}

// leaves2 makes the hashes of two whole leaves in less time than one after the other takes. It needs lanes.
func leaves2(l, m *[32]byte, p, q *[LeafSize]byte) {
	s := [8]uint32{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19}
	t := s
	// The tag before a leaf moves its bytes by one against the blocks.
	const first = 63
	var a, b [64]byte
	a[0], b[0] = tagLeaf, tagLeaf
	copy(a[1:], p[:first])
	copy(b[1:], q[:first])
	blocks2(&s, &t, &a[0], &b[0], 1)
	blocks2(&s, &t, &p[first], &q[first], LeafSize/64-1)
	a, b = [64]byte{p[LeafSize-1], 0x80}, [64]byte{q[LeafSize-1], 0x80}
	binary.BigEndian.PutUint64(a[56:], (1+LeafSize)*8)
	binary.BigEndian.PutUint64(b[56:], (1+LeafSize)*8)
	blocks2(&s, &t, &a[0], &b[0], 1)
	for i := range s {
		binary.BigEndian.PutUint32(l[4*i:], s[i])
		binary.BigEndian.PutUint32(m[4*i:], t[i])
	}
}
