package ledger

import (
	"testing"

	"holdfast/contract"
	"holdfast/identity"
)

func TestAGridsOwnStore(t *testing.T) {
	ok := Store{FrontEnd: [32]byte{1}, Recovery: [32]byte{2}, Limit: 1}
	for _, x := range []struct {
		name string
		s    Store
		ok   bool
	}{
		{"none", Store{}, true},
		{"two keys and a limit", ok, true},
		{"no front end", Store{Recovery: [32]byte{2}, Limit: 1}, false},
		{"no recovery", Store{FrontEnd: [32]byte{1}, Limit: 1}, false},
		{"one key for both", Store{FrontEnd: [32]byte{1}, Recovery: [32]byte{1}, Limit: 1}, false},
		{"no limit", Store{FrontEnd: [32]byte{1}, Recovery: [32]byte{2}}, false},
		{"more than there is", Store{FrontEnd: [32]byte{1}, Recovery: [32]byte{2}, Limit: MaxStorage + 1}, false},
		{"of a contract", Store{Contract: contract.ID{1}, FrontEnd: [32]byte{1}, Recovery: [32]byte{2}, Limit: 1}, false},
	} {
		g := *newGrid(t, "lab").g
		g.Store = x.s
		_, err := DecodeGenesis(g.Encode())
		if (err == nil) != x.ok {
			t.Errorf("%s: %v", x.name, err)
		}
		if !x.ok {
			continue
		}
		s, err := New(&g)
		if err != nil {
			t.Fatalf("%s: %v", x.name, err)
		}
		ids := entries[contract.ID](t, s, StoresKey)
		if got, _ := get[Store](s, StoreKey(contract.ID{})); x.s == (Store{}) != (got == nil) || got != nil && *got != x.s || (len(ids) == 1) != (got != nil) {
			t.Errorf("%s: %+v in %v", x.name, got, ids)
		}
	}
}

// A location tells stores apart by their keys: who takes another's shuts it out everywhere.
func TestAStoresKeysAreItsOwn(t *testing.T) {
	x := newGrid(t, "lab")
	x.change(func(b *batch) {
		add := func(id byte, front, recovery byte) error {
			try := *b
			err := try.addStore(&Store{Contract: contract.ID{id}, FrontEnd: [32]byte{front}, Recovery: [32]byte{recovery}, Limit: 1})
			if err == nil {
				*b = try
			}
			return err
		}
		if err := add(1, 1, 2); err != nil {
			t.Fatal(err)
		}
		for name, err := range map[string]error{
			"the same contract": add(1, 3, 4), "another's front end": add(2, 1, 3), "another's recovery": add(2, 3, 2), "the other way round": add(2, 2, 3), "no key": add(2, 0, 3),
		} {
			if err == nil {
				t.Errorf("%s is taken", name)
			}
		}
		if err := add(2, 3, 4); err != nil {
			t.Errorf("control: %v", err)
		}
	})
	if ids := entries[contract.ID](t, x.s, StoresKey); len(ids) != 2 {
		t.Errorf("stores %v", ids)
	}
}

func TestNodesOfferStorage(t *testing.T) {
	x := newGrid(t, "lab")
	farm := entries[identity.FarmID](t, x.s, FarmsKey)[0]
	admit := func(f func(*NodeAdmit)) *Tx {
		a := x.admission(farm, 60)
		a.Storage, a.Location = 1<<30, [32]byte{4, 60}
		f(a)
		a.Proof = x.nodes[len(x.nodes)-1].Sign(NodeAdmitPurpose, a.ProofBytes(x.g.GridID()))
		return x.tx(KindNodeAdmit, Actor{ID: x.g.GridAccount()}, a, x.admin)
	}
	x.refused("storage without a key", admit(func(a *NodeAdmit) { a.Location = [32]byte{} }), "both")
	x.refused("a key without storage", admit(func(a *NodeAdmit) { a.Storage = 0 }), "both")
	x.refused("more than there is", admit(func(a *NodeAdmit) { a.Storage = MaxStorage + 1 }), "at most")
	x.must(admit(func(a *NodeAdmit) { a.CPUMilli, a.Memory = 0, 0 }))
	id := entries[identity.NodeID](t, x.s, NodesKey)[3]
	n, err := get[Node](x.s, NodeKey(id))
	if err != nil || n.Storage != 1<<30 || n.Location != [32]byte{4, 60} {
		t.Fatalf("%+v %v", n, err)
	}
	x.refused("another's location key", func() *Tx {
		a := x.admission(farm, 61)
		a.Storage, a.Location = 1, [32]byte{4, 60}
		a.Proof = x.nodes[len(x.nodes)-1].Sign(NodeAdmitPurpose, a.ProofBytes(x.g.GridID()))
		return x.tx(KindNodeAdmit, Actor{ID: x.g.GridAccount()}, a, x.admin)
	}(), "location key")

	// It keeps shards and nothing else: nothing is placed there, and it gets no keys.
	x.block([]int{0, 1, 2, 3})
	here := func(h *contract.Header) { h.Services[0].Placement.Nodes = []string{n.Name} }
	h := x.header("app", here)
	x.must(x.deploy(h))
	as, err := get[Assignments](x.s, AssignmentsKey(h.ContractID()))
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range as.Current {
		if a.Node == id {
			t.Errorf("%s is on a machine that only keeps shards", a.Service)
		}
	}
	if Eligible(h, n) {
		t.Error("a machine that only keeps shards would get keys")
	}
	if n.CPUMilli, n.Memory = 4000, 8<<30; !Eligible(h, n) {
		t.Error("control: one that runs workloads is not eligible")
	}
}

func TestAValidatorsNetworkKeyIsItsOwn(t *testing.T) {
	x := newGrid(t, "lab")
	g := *x.g
	g.Validators = []Validator{{Name: "a", Key: []byte("a"), Power: 1, WireGuard: [32]byte{1}}, {Name: "b", Key: []byte("b"), Power: 1, WireGuard: [32]byte{2}, Endpoints: []string{"2001:db8::1"}}}
	if _, err := DecodeGenesis(g.Encode()); err != nil {
		t.Fatal(err)
	}
	g.Validators[1].WireGuard = [32]byte{1}
	if _, err := DecodeGenesis(g.Encode()); err == nil {
		t.Error("two validators have one key")
	}
	g.Validators[1].WireGuard, g.Validators[1].Endpoints = [32]byte{2}, []string{"host"}
	if _, err := DecodeGenesis(g.Encode()); err == nil {
		t.Error("an endpoint is no address")
	}
	x.s.birth.Validators[0].WireGuard = [32]byte{77}
	farm := entries[identity.FarmID](t, x.s, FarmsKey)[0]
	a := x.admission(farm, 62)
	a.WireGuard = [32]byte{77}
	a.Proof = x.nodes[len(x.nodes)-1].Sign(NodeAdmitPurpose, a.ProofBytes(x.g.GridID()))
	x.refused("a validator's", x.tx(KindNodeAdmit, Actor{ID: x.g.GridAccount()}, a, x.admin), "a validator has")
}
