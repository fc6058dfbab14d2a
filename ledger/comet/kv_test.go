package comet

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"

	"holdfast/internal/canonical"
)

// kv is a small machine: a transaction "id:key=value|good" sets a key once, "id:key|good" deletes it, and |bad stands
// for a signature that does not verify. What validators heard is kept under "heard/" and their address.
type kv struct{ m map[string][]byte }

func kvMachine() Machine {
	return Machine{
		Genesis: func(g Genesis) (State, error) {
			return &kv{map[string][]byte{"genesis": append([]byte{}, g.State...)}}, nil
		},
		Load: func(_ int64, all iter.Seq2[string, []byte]) (State, error) {
			s := &kv{map[string][]byte{}}
			last := ""
			for k, v := range all {
				if k <= last {
					return nil, fmt.Errorf("key %q after %q", k, last)
				}
				last = k
				s.m[k] = v
			}
			return s, nil
		},
	}
}

type kvLeaf struct {
	Key  []byte   `cbor:"1,keyasint"`
	Hash [32]byte `cbor:"2,keyasint"`
}

func (s *kv) leaves() []byte {
	var out []kvLeaf
	for _, k := range slices.Sorted(maps.Keys(s.m)) {
		out = append(out, kvLeaf{[]byte(k), sha256.Sum256(s.m[k])})
	}
	return canonical.Encode(out)
}

func (s *kv) Root() [32]byte { return sha256.Sum256(s.leaves()) }

func (s *kv) Get(key string) (value, proof []byte) { return s.m[key], s.leaves() }

func kvVerify(root [32]byte, key string, value, proof []byte) error {
	if sha256.Sum256(proof) != root {
		return errors.New("proof does not lead to the root")
	}
	var ls []kvLeaf
	if err := canonical.Decode(proof, 1<<20, &ls); err != nil {
		return err
	}
	for _, l := range ls {
		if string(l.Key) == key {
			if value == nil || l.Hash != sha256.Sum256(value) {
				return errors.New("key has another value")
			}
			return nil
		}
	}
	if value != nil {
		return errors.New("key is absent")
	}
	return nil
}

func kvParse(tx []byte) (id, key string, value []byte, err error) {
	body, ok := bytes.CutSuffix(tx, []byte("|good"))
	if !ok {
		return "", "", nil, errors.New("signature is bad")
	}
	id, rest, ok := strings.Cut(string(body), ":")
	if !ok || id == "" {
		return "", "", nil, errors.New("transaction has no id")
	}
	key, v, set := strings.Cut(rest, "=")
	if set {
		value = []byte(v)
	}
	return id, key, value, nil
}

func (s *kv) Verify(tx []byte) error { _, _, _, err := kvParse(tx); return err }

func (s *kv) Check(tx []byte) error {
	id, key, _, err := kvParse(tx)
	if err == nil && s.m["tx/"+id] != nil {
		err = errors.New("transaction was used before")
	}
	if err == nil && key == "forbidden" {
		err = errors.New("key is forbidden")
	}
	return err
}

func (s *kv) Apply(b Block) (State, []Result) {
	n := &kv{maps.Clone(s.m)}
	var out []Result
	for _, tx := range b.Txs {
		if err := n.Check(tx); err != nil {
			out = append(out, Result{Code: 2, Log: err.Error()})
			continue
		}
		id, key, value, _ := kvParse(tx)
		n.m["tx/"+id] = []byte{1}
		if key == "late" { // passes Check, fails in the block
			out = append(out, Result{Code: 3, Log: "too late"})
			continue
		}
		if value == nil {
			delete(n.m, key)
		} else {
			n.m[key] = value
		}
		out = append(out, Result{})
	}
	for _, h := range b.Heard {
		if len(h.Data) > 0 {
			n.m["heard/"+string(h.Validator)] = h.Data
		}
	}
	return n, out
}

func (s *kv) Changes(since State) iter.Seq2[string, []byte] {
	old := map[string][]byte{}
	if since != nil {
		old = since.(*kv).m
	}
	return func(yield func(string, []byte) bool) {
		for k, v := range s.m {
			if o, ok := old[k]; (!ok || !bytes.Equal(o, v)) && !yield(k, v) {
				return
			}
		}
		for k := range old {
			if _, ok := s.m[k]; !ok && !yield(k, nil) {
				return
			}
		}
	}
}
