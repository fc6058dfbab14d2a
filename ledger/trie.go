package ledger

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"iter"

	"holdfast/internal/canonical"
)

// The state's Merkle tree is a sparse binary tree over the SHA-256 of the keys, in which a subtree that holds a single
// key is that key's leaf (as in Diem's Jellyfish tree). Its shape, and so its root, depends only on what it holds, never
// on the order of writes. Nodes are immutable: a new version shares all that did not change.
//
//	leaf  = SHA-256(0x00 | SHA-256(key) | SHA-256(value))
//	inner = SHA-256(0x01 | left | right)
//	empty = 32 zero bytes

// trieNode is an inner node (left or right set) or a leaf. A nil *trieNode is the empty tree.
type trieNode struct {
	hash        [32]byte
	left, right *trieNode
	key         string
	keyHash     [32]byte
	value       []byte
	leaf        bool
}

func newLeaf(key string, kh [32]byte, value []byte) *trieNode {
	return &trieNode{hash: leafHash(kh, sha256.Sum256(value)), key: key, keyHash: kh, value: value, leaf: true}
}

func newInner(l, r *trieNode) *trieNode {
	return &trieNode{hash: innerHash(l.root(), r.root()), left: l, right: r}
}

func leafHash(kh, vh [32]byte) [32]byte {
	var b [65]byte
	copy(b[1:], kh[:])
	copy(b[33:], vh[:])
	return sha256.Sum256(b[:])
}

func innerHash(l, r [32]byte) [32]byte {
	var b [65]byte
	b[0] = 1
	copy(b[1:], l[:])
	copy(b[33:], r[:])
	return sha256.Sum256(b[:])
}

func (n *trieNode) root() [32]byte {
	if n == nil {
		return [32]byte{}
	}
	return n.hash
}

func bit(h *[32]byte, i int) byte { return h[i/8] >> (7 - i%8) & 1 }

func (n *trieNode) get(key string) ([]byte, bool) {
	kh := sha256.Sum256([]byte(key))
	for d := 0; n != nil; d++ {
		if n.leaf {
			if n.keyHash != kh {
				return nil, false
			}
			return n.value, true
		}
		if bit(&kh, d) == 0 {
			n = n.left
		} else {
			n = n.right
		}
	}
	return nil, false
}

// put returns the tree with key set.
func (n *trieNode) put(key string, value []byte) *trieNode {
	kh := sha256.Sum256([]byte(key))
	return n.insert(newLeaf(key, kh, value), 0)
}

func (n *trieNode) insert(l *trieNode, d int) *trieNode {
	switch {
	case n == nil:
		return l
	case n.leaf && n.keyHash == l.keyHash:
		return l
	case n.leaf:
		// Two keys meet: push both down until their paths part.
		if b := bit(&l.keyHash, d); b == bit(&n.keyHash, d) {
			sub := n.insert(l, d+1)
			if b == 0 {
				return newInner(sub, nil)
			}
			return newInner(nil, sub)
		} else if b == 0 {
			return newInner(l, n)
		}
		return newInner(n, l)
	case bit(&l.keyHash, d) == 0:
		return newInner(n.left.insert(l, d+1), n.right)
	default:
		return newInner(n.left, n.right.insert(l, d+1))
	}
}

// del returns the tree without key.
func (n *trieNode) del(key string) *trieNode {
	kh := sha256.Sum256([]byte(key))
	return n.remove(&kh, 0)
}

func (n *trieNode) remove(kh *[32]byte, d int) *trieNode {
	switch {
	case n == nil:
		return nil
	case n.leaf:
		if n.keyHash == *kh {
			return nil
		}
		return n
	}
	l, r := n.left, n.right
	if bit(kh, d) == 0 {
		l = l.remove(kh, d+1)
	} else {
		r = r.remove(kh, d+1)
	}
	switch { // a single leaf moves up, so that the shape stays canonical
	case l == nil && r == nil:
		return nil
	case l == nil && r.leaf:
		return r
	case r == nil && l.leaf:
		return l
	case l == n.left && r == n.right:
		return n
	}
	return newInner(l, r)
}

// all yields every key and value, in the order of the keys' hashes.
func (n *trieNode) all() iter.Seq2[string, []byte] {
	return func(yield func(string, []byte) bool) { n.walk(yield) }
}

func (n *trieNode) walk(yield func(string, []byte) bool) bool {
	if n == nil {
		return true
	}
	if n.leaf {
		return yield(n.key, n.value)
	}
	return n.left.walk(yield) && n.right.walk(yield)
}

// changes yields what turns old into n: set keys with their value, deleted ones with nil.
func (n *trieNode) changes(old *trieNode, yield func(string, []byte) bool) bool {
	if n == old || n.root() == old.root() {
		return true
	}
	if (n == nil || n.leaf) || (old == nil || old.leaf) {
		// One side is a single leaf or empty: compare as sets; the other side is small or wholly new.
		for k := range old.all() {
			if _, ok := n.get2(k); !ok && !yield(k, nil) {
				return false
			}
		}
		for k, v := range n.all() {
			if ov, ok := old.get2(k); (!ok || string(ov) != string(v)) && !yield(k, v) {
				return false
			}
		}
		return true
	}
	return n.left.changes(old.left, yield) && n.right.changes(old.right, yield)
}

// get2 finds key in a subtree, whatever its depth.
func (n *trieNode) get2(key string) ([]byte, bool) {
	for k, v := range n.all() {
		if k == key {
			return v, true
		}
	}
	return nil, false
}

// MaxProof bounds an encoded Proof: at most 256 siblings of 32 bytes.
const MaxProof = 12 << 10

// Proof shows that a root holds a key with a value, or does not hold it.
type Proof struct {
	Siblings [][]byte `cbor:"1,keyasint,omitempty"` // from the root down; empty bytes stand for an empty subtree
	Key      []byte   `cbor:"2,keyasint,omitempty"` // where another key's leaf ends the path: the hash of that key …
	Value    []byte   `cbor:"3,keyasint,omitempty"` // … and of its value
}

// prove returns the value, nil if absent, and the proof.
func (n *trieNode) prove(key string) ([]byte, *Proof) {
	kh := sha256.Sum256([]byte(key))
	p := &Proof{}
	for d := 0; n != nil; d++ {
		if n.leaf {
			if n.keyHash == kh {
				return n.value, p
			}
			vh := sha256.Sum256(n.value)
			p.Key, p.Value = n.keyHash[:], vh[:]
			return nil, p
		}
		next, sibling := n.left, n.right
		if bit(&kh, d) == 1 {
			next, sibling = n.right, n.left
		}
		var s []byte
		if sibling != nil {
			s = sibling.hash[:]
		}
		p.Siblings = append(p.Siblings, s)
		n = next
	}
	return nil, p
}

// ErrProof is returned for a proof that does not show what is claimed.
var ErrProof = errors.New("proof does not hold")

// VerifyProof checks that the state with this root holds value under key; a nil value means that it holds none.
func VerifyProof(root [32]byte, key string, value, proof []byte) error {
	var p Proof
	if err := canonical.Decode(proof, MaxProof, &p); err != nil {
		return fmt.Errorf("proof of %q: %w", key, err)
	}
	if len(p.Siblings) > 256 {
		return fmt.Errorf("proof of %q: %w: %d siblings", key, ErrProof, len(p.Siblings))
	}
	kh := sha256.Sum256([]byte(key))
	var h [32]byte
	switch {
	case value != nil && (len(p.Key) > 0 || len(p.Value) > 0):
		return fmt.Errorf("proof of %q: %w: it is one of absence", key, ErrProof)
	case value != nil:
		h = leafHash(kh, sha256.Sum256(value))
	case len(p.Key) == 32 && len(p.Value) == 32:
		other := [32]byte(p.Key)
		if other == kh {
			return fmt.Errorf("proof of %q: %w: the key is present", key, ErrProof)
		}
		for d := range p.Siblings { // the other leaf must lie where the key would
			if bit(&other, d) != bit(&kh, d) {
				return fmt.Errorf("proof of %q: %w: the leaf is elsewhere", key, ErrProof)
			}
		}
		h = leafHash(other, [32]byte(p.Value))
	case len(p.Key) != 0 || len(p.Value) != 0:
		return fmt.Errorf("proof of %q: %w: malformed leaf", key, ErrProof)
	}
	for d := len(p.Siblings) - 1; d >= 0; d-- {
		var s [32]byte
		switch len(p.Siblings[d]) {
		case 0:
		case 32:
			copy(s[:], p.Siblings[d])
		default:
			return fmt.Errorf("proof of %q: %w: sibling of %d bytes", key, ErrProof, len(p.Siblings[d]))
		}
		if bit(&kh, d) == 0 {
			h = innerHash(h, s)
		} else {
			h = innerHash(s, h)
		}
	}
	if h != root {
		return fmt.Errorf("proof of %q: %w", key, ErrProof)
	}
	return nil
}
