package node

import (
	"testing"

	"holdfast/contract"
	"holdfast/identity"
	"holdfast/ledger"
	"holdfast/overlay"
)

// What overlay refuses late nodes by comes from the ledger: the epoch of each assignment, of peers and of this node.
func TestMeshCarriesEpochs(t *testing.T) {
	id := contract.ID{1}
	self, other := &ledger.Node{ID: identity.NodeID{1}, WireGuard: [32]byte{1}}, &ledger.Node{ID: identity.NodeID{2}, WireGuard: [32]byte{2}}
	net := contract.NetworkOf(id, "default")
	here, there := contract.WorkloadOf(id, "web", 0), contract.WorkloadOf(id, "web", 1)
	c := &ContractView{
		Record: &ledger.Contract{ID: id, Name: "app"}, Networks: map[string]*ledger.Network{"default": {ID: net, Index: 5}},
		Header: &contract.Header{Networks: []string{"default"}, Services: []contract.Service{{Name: "web", Networks: []string{"default"}}}},
		Assignments: []ledger.Assignment{
			{Workload: here, Service: "web", Node: self.ID, Epoch: 3}, {Workload: there, Service: "web", Replica: 1, Node: other.ID, Epoch: 4},
		},
	}
	ms := contractMeshes(&View{Self: self, Nodes: []*ledger.Node{self, other}}, c, &contract.Keys{Networks: map[string][32]byte{"default": {7}}}, &contract.Body{})
	if len(ms) != 1 || len(ms[0].Peers) != 1 || len(ms[0].Peers[0].Addrs) != 2 || len(ms[0].Own) != 1 {
		t.Fatalf("%+v", ms)
	}
	if want := (overlay.Address{Prefix: host(overlay.Addr(net, here)), Epoch: 3}); ms[0].Own[0] != want {
		t.Errorf("own workload: %v, want %v", ms[0].Own[0], want)
	}
	if want := (overlay.Address{Prefix: host(overlay.Addr(net, there)), Epoch: 4}); ms[0].Peers[0].Addrs[0] != want {
		t.Errorf("the peer's workload: %v, want %v", ms[0].Peers[0].Addrs[0], want)
	}
	if want := (overlay.Address{Prefix: host(overlay.Addr(net, other.ID))}); ms[0].Peers[0].Addrs[1] != want {
		t.Errorf("the peer: %v, want %v", ms[0].Peers[0].Addrs[1], want)
	}
}
