package disperse

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"math/rand/v2"
	"strings"
	"testing"
)

// rootByHand is RFC 9162's tree, written from its definition, with the format's tags.
func rootByHand(b []byte) Name {
	var tree func(b []byte) []byte
	tree = func(b []byte) []byte {
		n := (len(b) + LeafSize - 1) / LeafSize
		if n <= 1 {
			h := sha256.Sum256(append([]byte{0}, b...))
			return h[:]
		}
		k := 1
		for 2*k < n {
			k *= 2
		}
		h := sha256.Sum256(append(append([]byte{1}, tree(b[:k*LeafSize])...), tree(b[k*LeafSize:])...))
		return h[:]
	}
	top := make([]byte, 32)
	if len(b) > 0 {
		top = tree(b)
	}
	n := len(b)
	return sha256.Sum256(append([]byte{2, 0, 0, 0, 0, byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)}, top...))
}

func treeOf(t testing.TB, b []byte) *Tree {
	t.Helper()
	tree := new(Tree)
	r := rand.New(seeded(1))
	for p := b; len(p) > 0; {
		n := min(len(p), r.IntN(3*LeafSize))
		if m, err := tree.Write(p[:n]); m != n || err != nil {
			t.Fatal(err)
		}
		p = p[n:]
	}
	return tree
}

func TestNames(t *testing.T) {
	for _, n := range []int{0, 1, LeafSize - 1, LeafSize, LeafSize + 1, 2 * LeafSize, 3*LeafSize + 5, 7 * LeafSize, 8 * LeafSize, 9*LeafSize - 1, 100*LeafSize + 7} {
		b := bytesOf(1, n)
		tree := treeOf(t, b)
		got, err := NameOf(b)
		if want := rootByHand(b); err != nil || got != want || tree.Name() != want || tree.Name() != want || tree.Size() != int64(n) {
			t.Errorf("%d bytes: %v, want %v", n, got, want)
		}
		tree.Reset()
		if n, _ := NameOf(nil); tree.Name() != n {
			t.Error("a tree that was reset is not empty")
		}
		if back, err := ParseName(got.String()); err != nil || back != got {
			t.Error(err)
		}
	}
	if _, err := NameOf(make([]byte, MaxShard+1)); err == nil {
		t.Error("a shard beyond the limit has a name")
	}
	name := rootByHand(nil).String()
	for _, bad := range []string{"", name[1:], name + "0", strings.ToUpper(name), "g" + name[1:]} {
		if _, err := ParseName(bad); err == nil {
			t.Errorf("%q is taken for a name", bad)
		}
	}
}

func TestEveryRangeIsProved(t *testing.T) {
	for _, leaves := range []int{1, 2, 3, 5, 8, 13} {
		for _, last := range []int{1, LeafSize} {
			b := bytesOf(2, (leaves-1)*LeafSize+last)
			tree := treeOf(t, b)
			name := tree.Name()
			for first := range leaves {
				for count := 1; first+count <= leaves; count++ {
					data := b[first*LeafSize : min(len(b), (first+count)*LeafSize)]
					proof, err := tree.Prove(first, count)
					if err != nil || count == leaves && len(proof) > 0 {
						t.Fatal(err)
					}
					if err := Verify(name, int64(len(b)), first, data, proof); err != nil {
						t.Fatalf("%d leaves, %d from %d: %v", leaves, count, first, err)
					}
					if leaves > 5 && count > 2 {
						continue
					}
					bad := func(what string, name Name, size int64, first int, data, proof []byte) {
						if err := Verify(name, size, first, data, proof); !errors.Is(err, ErrProof) {
							t.Errorf("%d leaves, %d from %d: %s: %v", leaves, count, first, what, err)
						}
					}
					flip := func(b []byte, i int) []byte { b = bytes.Clone(b); b[i] ^= 1; return b }
					bad("a changed first byte", name, int64(len(b)), first, flip(data, 0), proof)
					bad("a changed last byte", name, int64(len(b)), first, flip(data, len(data)-1), proof)
					bad("a byte less", name, int64(len(b)), first, data[:len(data)-1], proof)
					bad("a byte more", name, int64(len(b)), first, append(bytes.Clone(data), 0), proof)
					bad("the leaf before", name, int64(len(b)), first-1, data, proof)
					bad("the leaf behind", name, int64(len(b)), first+1, data, proof)
					bad("another size", name, int64(len(b))+1, first, data, proof)
					bad("a size of as many leaves less", name, int64(len(b))-1, first, data, proof)
					bad("no data", name, int64(len(b)), first, nil, proof)
					bad("a longer proof", name, int64(len(b)), first, data, append(bytes.Clone(proof), make([]byte, 32)...))
					if len(proof) > 0 {
						bad("a shorter proof", name, int64(len(b)), first, data, proof[:len(proof)-1])
						bad("another proof", name, int64(len(b)), first, data, flip(proof, 5))
						bad("no proof", name, int64(len(b)), first, data, nil)
					}
					bad("another name", rootByHand(data[1:]), int64(len(b)), first, data, proof)
				}
			}
			for _, x := range [][2]int{{-1, 1}, {0, 0}, {0, leaves + 1}, {leaves, 1}, {1, leaves}, {1, 1 << 62}} {
				if _, err := tree.Prove(x[0], x[1]); err == nil {
					t.Errorf("%d leaves: %v is proved", leaves, x)
				}
			}
		}
	}
	empty := rootByHand(nil)
	if err := Verify(empty, 0, 0, nil, nil); err != nil {
		t.Error(err)
	}
	// An inner node, given as if it were a leaf, does not stand for its subtree.
	b := bytesOf(3, 2*LeafSize)
	h0, h1 := sha256.Sum256(append([]byte{0}, b[:LeafSize]...)), sha256.Sum256(append([]byte{0}, b[LeafSize:]...))
	if err := Verify(rootByHand(b), 64, 0, append(h0[:], h1[:]...), nil); !errors.Is(err, ErrProof) {
		t.Errorf("an inner node is taken for a leaf: %v", err)
	}
}

// FuzzVerify looks for data that a name proves and that are not its shard's. The data are a piece of the shard, perhaps with
// other bytes behind, so that what the fuzzer keeps is small.
func FuzzVerify(f *testing.F) {
	b := bytesOf(5, 5*LeafSize+100)
	tree := treeOf(f, b)
	name := tree.Name()
	for first := range 6 {
		proof, err := tree.Prove(first, 1)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(int64(len(b)), first, first*LeafSize, LeafSize, []byte(nil), proof)
	}
	f.Add(int64(len(b)), 0, 0, len(b), []byte(nil), []byte(nil))
	f.Add(int64(1)<<62, 1<<40, 0, 0, []byte{1}, []byte{2})
	f.Add(int64(-1), -1, 0, 0, []byte(nil), []byte(nil))
	f.Fuzz(func(t *testing.T, size int64, first, from, n int, more, proof []byte) {
		from = max(0, min(from, len(b)))
		n = max(0, min(n, len(b)-from))
		data := append(bytes.Clone(b[from:from+n]), more...)
		if err := Verify(name, size, first, data, proof); err == nil && (size != int64(len(b)) || !bytes.Equal(data, b[first*LeafSize:min(len(b), first*LeafSize+len(data))])) {
			t.Fatal("other data are proved")
		}
	})
}
