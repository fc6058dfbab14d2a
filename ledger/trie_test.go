package ledger

import (
	"encoding/hex"
	"fmt"
	"maps"
	"math/rand/v2"
	"testing"

	"holdfast/internal/canonical"
)

func TestTreeRootsAreFrozen(t *testing.T) {
	var n *trieNode
	if n.root() != ([32]byte{}) {
		t.Fatal("the empty tree's root is not zero")
	}
	for _, k := range []string{"a", "b", "c", "d", "e"} {
		n = n.put(k, []byte("value of "+k))
	}
	r := n.root()
	const want = "a405ae7b8f8f19d18d2e6f642da1e88019fc23da39c9d495adf78a63d68ec61a"
	if got := hex.EncodeToString(r[:]); got != want {
		t.Errorf("root changed: %s", got)
	}
}

func TestTreeDependsOnContentOnly(t *testing.T) {
	for seed := range uint64(50) {
		r := rand.New(rand.NewPCG(seed, 2))
		model := map[string][]byte{}
		var n, before *trieNode
		saved := map[string][]byte{}
		for i := range 400 {
			if i == 200 {
				before, saved = n, maps.Clone(model)
			}
			k := fmt.Sprint(r.IntN(120))
			if r.IntN(3) == 0 {
				delete(model, k)
				n = n.del(k)
			} else {
				v := fmt.Append(nil, r.IntN(50))
				model[k] = v
				n = n.put(k, v)
			}
		}
		var fresh *trieNode
		for k, v := range model {
			fresh = fresh.put(k, v)
		}
		if fresh.root() != n.root() {
			t.Fatalf("seed %d: the root depends on the history", seed)
		}
		var old *trieNode
		for k, v := range saved {
			old = old.put(k, v)
		}
		if before.root() != old.root() {
			t.Fatalf("seed %d: an older version changed", seed)
		}
		// Changes lead from the old to the new.
		n.changes(before, func(k string, v []byte) bool {
			if v == nil {
				delete(saved, k)
			} else {
				saved[k] = v
			}
			return true
		})
		if !maps.EqualFunc(saved, model, func(a, b []byte) bool { return string(a) == string(b) }) {
			t.Fatalf("seed %d: changes do not lead to the new state", seed)
		}
	}
}

func TestProofs(t *testing.T) {
	var n *trieNode
	for i := range 300 {
		n = n.put(fmt.Sprint("key", i), fmt.Append(nil, "value", i))
	}
	root := n.root()
	prove := func(k string) ([]byte, []byte) {
		v, p := n.prove(k)
		return v, canonical.Encode(p)
	}
	for i := range 600 {
		k := fmt.Sprint("key", i)
		v, p := prove(k)
		if (v != nil) != (i < 300) {
			t.Fatalf("%s: present is %v", k, v != nil)
		}
		if err := VerifyProof(root, k, v, p); err != nil {
			t.Fatalf("control: %v", err)
		}
	}
	v, p := prove("key7")
	av, ap := prove("absent")
	_, p8 := prove("key8")
	other := n.put("key9", []byte("x")).root()
	for name, err := range map[string]error{
		"another value":                      VerifyProof(root, "key7", []byte("value8"), p),
		"a present key said to be absent":    VerifyProof(root, "key7", nil, p),
		"… with the proof of an absent one":  VerifyProof(root, "key7", nil, ap),
		"an absent key said to be present":   VerifyProof(root, "absent", v, ap),
		"… with the proof of a present one":  VerifyProof(root, "absent", v, p),
		"the proof of another key":           VerifyProof(root, "key7", v, p8),
		"another root":                       VerifyProof(other, "key7", v, p),
		"a truncated proof":                  VerifyProof(root, "key7", v, p[:len(p)-1]),
		"no proof":                           VerifyProof(root, "key7", v, nil),
		"an empty value for an absent key":   VerifyProof(root, "absent", []byte{}, ap),
		"a shortened path":                   VerifyProof(root, "key7", v, shorten(t, p)),
		"an absence ended by the key itself": VerifyProof(root, "key7", nil, selfLeaf(t, n, "key7")),
	} {
		if err == nil {
			t.Errorf("%s was accepted", name)
		}
	}
	if av != nil {
		t.Error("absent has a value")
	}
}

func shorten(t *testing.T, raw []byte) []byte {
	var p Proof
	if err := canonical.Decode(raw, MaxProof, &p); err != nil {
		t.Fatal(err)
	}
	p.Siblings = p.Siblings[:len(p.Siblings)-1]
	return canonical.Encode(&p)
}

// selfLeaf claims absence with the key's own leaf as the other one.
func selfLeaf(t *testing.T, n *trieNode, key string) []byte {
	_, p := n.prove(key)
	for _, m := range []*trieNode{n} {
		for m != nil && !m.leaf {
			m = m.left
		}
		if m == nil {
			t.Skip("no leaf on the left")
		}
		p.Key, p.Value = m.keyHash[:], make([]byte, 32)
	}
	return canonical.Encode(p)
}

func FuzzVerifyProof(f *testing.F) {
	var n *trieNode
	for i := range 20 {
		n = n.put(fmt.Sprint(i), fmt.Append(nil, i))
	}
	_, p := n.prove("3")
	f.Add("3", []byte("3"), canonical.Encode(p))
	_, p = n.prove("x")
	f.Add("x", []byte{}, canonical.Encode(p))
	root := n.root()
	f.Fuzz(func(t *testing.T, key string, value, proof []byte) {
		if len(value) == 0 {
			value = nil
		}
		if VerifyProof(root, key, value, proof) != nil {
			return
		}
		if have, ok := n.get(key); ok != (value != nil) || string(have) != string(value) {
			t.Fatalf("proved %q = %q, it is %q (%v)", key, value, have, ok)
		}
	})
}
