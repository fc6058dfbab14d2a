package ledger

import (
	"fmt"
	"testing"

	"holdfast/contract"
	"holdfast/identity"
)

// withStore gives a header buckets.
func withStore(front, recovery byte, limit uint64) func(*contract.Header) {
	return func(h *contract.Header) {
		h.Store = contract.Store{FrontEnd: [32]byte{front}, Recovery: [32]byte{recovery}, Limit: limit}
		if _, ok := h.Service(contract.FrontEndService); !ok {
			s := contract.Service{Name: contract.FrontEndService, Replicas: 1, CPUMilli: 100, Memory: 64 << 20, Pids: 100, Networks: []string{"default"}}
			h.Services = append([]contract.Service{s}, h.Services...)
		}
	}
}

const aStore = contract.MinStore

func TestAContractsStore(t *testing.T) {
	x := newGrid(t, "lab")
	h := x.header("app", withStore(1, 2, aStore))
	x.must(x.deploy(h))
	is := func(id contract.ID, want Store) {
		t.Helper()
		s, err := get[Store](x.s, StoreKey(id))
		if err != nil || *s != want {
			t.Fatalf("%+v %v, want %+v", s, err, want)
		}
	}
	id := h.ContractID()
	rec := Store{Contract: id, FrontEnd: [32]byte{1}, Recovery: [32]byte{2}, Limit: aStore}
	is(id, rec)
	if ids := entries[contract.ID](t, x.s, StoresKey); len(ids) != 1 || ids[0] != id {
		t.Fatalf("stores %v", ids)
	}
	x.refused("another's front end", x.deploy(x.header("two", withStore(1, 3, aStore))), "another store has this key")
	x.refused("another's key for recovery", x.deploy(x.header("two", withStore(3, 2, aStore))), "another store has this key")
	x.refused("a revision drops it", x.deploy(successor(h, func(h *contract.Header) { h.Store = contract.Store{} })), "cannot drop")
	x.refused("a revision has other keys", x.deploy(successor(h, withStore(7, 2, aStore))), "keys of the contract's store cannot change")
	x.refused("a revision has another key for recovery", x.deploy(successor(h, withStore(1, 7, aStore))), "keys of the contract's store cannot change")
	more := successor(h, withStore(1, 2, 3*aStore))
	x.must(x.deploy(more))
	rec.Limit = 3 * aStore
	is(id, rec)
	x.refused("it shrinks", x.deploy(successor(more, withStore(1, 2, aStore))), "can only grow")
	same := successor(more, func(h *contract.Header) { h.Routes = nil })
	x.must(x.deploy(same))
	is(id, rec)
	plain := x.header("plain")
	x.must(x.deploy(plain))
	x.must(x.deploy(successor(plain, withStore(5, 6, aStore)))) // buckets may come later
	is(plain.ContractID(), Store{Contract: plain.ContractID(), FrontEnd: [32]byte{5}, Recovery: [32]byte{6}, Limit: aStore})

	// The objects of a cancelled contract are its account's, and are kept.
	x.ends(x.tx(KindContractCancel, Actor{ID: x.acct}, &ContractCancel{id}, x.owner))
	is(id, rec)
	if ids := entries[contract.ID](t, x.s, StoresKey); len(ids) != 2 {
		t.Errorf("stores %v", ids)
	}
	x.refused("a contract that takes a cancelled one's over", x.deploy(x.header("app", withStore(1, 2, 2*aStore))), "another store has this key")
}

// Locations have so much room. Who deploys and cancels again and again gets no more of it than one who does not cancel.
func TestStorageIsOfAQuota(t *testing.T) {
	x := newGrid(t, "lab")
	x.must(x.tx(KindAccountQuota, Actor{ID: x.g.GridAccount()}, &AccountQuota{x.acct, Quota{9, 99, 99, 99, 3 * aStore}}, x.admin))
	x.refused("more than the quota", x.deploy(x.header("big", withStore(90, 91, 4*aStore))), "bytes of storage")
	for i := range byte(3) {
		h := x.header("app", withStore(2*i+1, 2*i+2, aStore))
		x.must(x.deploy(h))
		x.ends(x.tx(KindContractCancel, Actor{ID: x.acct}, &ContractCancel{h.ContractID()}, x.owner))
	}
	x.refused("a fourth after three that were cancelled", x.deploy(x.header("app", withStore(60, 61, aStore))), "bytes of storage")
	x.must(x.deploy(x.header("app")))
	x.refused("a quota below zero", x.tx(KindAccountQuota, Actor{ID: x.g.GridAccount()}, &AccountQuota{x.acct, Quota{Storage: -1}}, x.admin), "a quota of")
	if _, err := get[identity.Account](x.s, AccountKey(x.acct)); err != nil {
		t.Fatal(err)
	}
	// Strangers have what the grid leaves to them together.
	strangers := x.accounts(20)
	refused := false
	for i, a := range strangers {
		x.acct = a
		if r := x.submit(x.deploy(x.header(fmt.Sprint("s", i), withStore(byte(100+2*i), byte(101+2*i), MaxAccountStorage)))); r.Code != CodeOK {
			refused = true
			if i != int(DefaultLimits().Shared.Storage/MaxAccountStorage) {
				t.Errorf("stranger %d is refused: %s", i, r.Log)
			}
			break
		}
	}
	if !refused {
		t.Error("twenty accounts of a stranger each have the most that one may")
	}
}
