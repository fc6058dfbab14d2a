package disperse

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"math/bits"
)

// LeafSize is how much of a shard one leaf of its tree covers; only the last leaf may be shorter.
const LeafSize = 4096

// MaxShard bounds what a Tree takes: the largest shard there can be, that of a whole segment with K = 1, rounded up.
const MaxShard = MaxSegment + LeafSize

// A Name is what a shard is called and found by: the root of its Merkle tree, which also commits its length.
type Name [32]byte

func (n Name) String() string { return hex.EncodeToString(n[:]) }

// ParseName reads the form that String writes.
func ParseName(s string) (n Name, err error) {
	if len(s) != 2*len(n) {
		return n, fmt.Errorf("shard name %.80q: not %d hexadecimal digits", s, 2*len(n))
	}
	if _, err = hex.Decode(n[:], []byte(s)); err != nil || n.String() != s {
		return Name{}, fmt.Errorf("shard name %q: not in lower case hexadecimal", s)
	}
	return n, nil
}

// ErrProof is returned for bytes that are not those of the named shard at that place.
var ErrProof = errors.New("proof does not lead to the name")

// First bytes of what is hashed: a leaf, an inner node and a root never have an input in common.
const (
	tagLeaf = 0
	tagNode = 1
	tagRoot = 2
)

// A Tree takes a shard as a stream and keeps 32 bytes for each leaf of 4096, so that it can prove ranges of it. The zero
// value is empty and ready. Its shape is that of RFC 9162: the left subtree is the largest power of two below the number
// of leaves.
type Tree struct {
	h      hash.Hash
	tag    [1]byte // tagLeaf, where a hash can see it
	leaves [][32]byte
	size   int64 // of all that was written
}

// Write takes more of the shard. It fails, with nothing taken, beyond MaxShard.
func (t *Tree) Write(p []byte) (int, error) {
	if t.size+int64(len(p)) > MaxShard {
		return 0, fmt.Errorf("tree of a shard: %d bytes, at most %d", t.size+int64(len(p)), MaxShard)
	}
	if t.h == nil {
		t.h = sha256.New()
	}
	n := len(p)
	for len(p) > 0 {
		if t.size%LeafSize == 0 {
			t.close()
			for lanes && len(p) >= 2*LeafSize {
				l := len(t.leaves)
				t.leaves = append(t.leaves, [32]byte{}, [32]byte{})
				leaves2(&t.leaves[l], &t.leaves[l+1], (*[LeafSize]byte)(p), (*[LeafSize]byte)(p[LeafSize:]))
				t.size += 2 * LeafSize
				p = p[2*LeafSize:]
			}
			if len(p) == 0 {
				break
			}
			t.h.Reset()
			t.h.Write(t.tag[:])
		}
		m := min(len(p), LeafSize-int(t.size%LeafSize))
		t.h.Write(p[:m])
		t.size += int64(m)
		p = p[m:]
	}
	return n, nil
}

// close adds the leaf that is being written, if it is not there yet.
func (t *Tree) close() {
	if n := len(t.leaves); n < Leaves(t.size) {
		t.leaves = append(t.leaves, [32]byte{})
		t.h.Sum(t.leaves[n][:0])
	}
}

// Reset empties the tree and keeps its memory.
func (t *Tree) Reset() { t.leaves, t.size = t.leaves[:0], 0 }

// Size is how many bytes were written.
func (t *Tree) Size() int64 { return t.size }

// Leaves is how many leaves a shard of that size has.
func Leaves(size int64) int { return int((size + LeafSize - 1) / LeafSize) }

// Name is the name of a shard that consists of what was written so far. It ends the stream: the last leaf is complete.
func (t *Tree) Name() Name {
	t.close()
	if len(t.leaves) == 0 {
		return rootOf(0, [32]byte{})
	}
	return rootOf(t.size, t.sum(0, len(t.leaves)))
}

// NameOf is the name of a shard.
func NameOf(shard []byte) (Name, error) {
	var t Tree
	if _, err := t.Write(shard); err != nil {
		return Name{}, err
	}
	return t.Name(), nil
}

// sum is the hash of the subtree over leaves [lo, hi).
func (t *Tree) sum(lo, hi int) [32]byte {
	if hi-lo == 1 {
		return t.leaves[lo]
	}
	mid := split(lo, hi)
	return node(t.sum(lo, mid), t.sum(mid, hi))
}

// Prove is the proof of leaves [first, first+count), hashes of 32 bytes one after another: those of the largest subtrees
// beside the range, from left to right. It is empty for the whole shard.
func (t *Tree) Prove(first, count int) ([]byte, error) {
	t.close()
	if first < 0 || count < 1 || count > len(t.leaves) || first > len(t.leaves)-count {
		return nil, fmt.Errorf("prove leaves %d and %d more: the shard has %d", first, count, len(t.leaves))
	}
	var proof []byte
	var walk func(lo, hi int)
	walk = func(lo, hi int) {
		if hi <= first || lo >= first+count {
			d := t.sum(lo, hi)
			proof = append(proof, d[:]...)
		} else if hi-lo > 1 {
			mid := split(lo, hi)
			walk(lo, mid)
			walk(mid, hi)
		}
	}
	walk(0, len(t.leaves))
	return proof, nil
}

// Verify says whether data is what the shard of that name and size has from leaf first on. Data are whole leaves, but for
// the shard's last. Nothing in the arguments but the name need be trusted.
func Verify(name Name, size int64, first int, data, proof []byte) error {
	if size < 0 || size > MaxShard || first < 0 || first > Leaves(size) {
		return fmt.Errorf("shard %v: leaf %d of %d bytes: %w", name, first, size, ErrProof)
	}
	leaves, begin := Leaves(size), int64(first)*LeafSize
	count := Leaves(int64(len(data)))
	if end := begin + int64(len(data)); size > 0 && count == 0 || end > size || end < size && len(data)%LeafSize != 0 {
		return fmt.Errorf("shard %v: %d bytes from leaf %d of %d: %w", name, len(data), first, leaves, ErrProof)
	}
	h := sha256.New()
	var root [32]byte
	ok := true
	if leaves > 0 {
		var walk func(lo, hi int) [32]byte
		walk = func(lo, hi int) (d [32]byte) {
			switch {
			case hi <= first || lo >= first+count:
				if len(proof) < len(d) {
					ok = false
					return d
				}
				copy(d[:], proof)
				proof = proof[len(d):]
				return d
			case hi-lo == 1:
				return leaf(h, data[(lo-first)*LeafSize:min((lo-first+1)*LeafSize, len(data))])
			}
			mid := split(lo, hi)
			l := walk(lo, mid)
			return node(l, walk(mid, hi))
		}
		root = walk(0, leaves)
	}
	if !ok || len(proof) > 0 || rootOf(size, root) != name {
		return fmt.Errorf("shard %v: leaves %d to %d: %w", name, first, first+count, ErrProof)
	}
	return nil
}

func split(lo, hi int) int { return lo + 1<<(bits.Len(uint(hi-lo-1))-1) }

func leaf(h hash.Hash, data []byte) (d [32]byte) {
	h.Reset()
	h.Write([]byte{tagLeaf})
	h.Write(data)
	h.Sum(d[:0])
	return d
}

func node(l, r [32]byte) [32]byte {
	var b [65]byte
	b[0] = tagNode
	copy(b[1:], l[:])
	copy(b[33:], r[:])
	return sha256.Sum256(b[:])
}

func rootOf(size int64, top [32]byte) Name {
	var b [41]byte
	b[0] = tagRoot
	binary.BigEndian.PutUint64(b[1:], uint64(size))
	copy(b[9:], top[:])
	return sha256.Sum256(b[:])
}
