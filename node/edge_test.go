package node

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"testing"

	"holdfast/api"
	"holdfast/contract"
	"holdfast/gateway"
	"holdfast/identity"
	"holdfast/ledger"
	"holdfast/overlay"
)

// A gateway goes on for everybody when one contract has grown records that nobody can read, and takes no node for another
// that shows its key or has its name.
func TestABadContractClosesNoOthersRoutes(t *testing.T) {
	good, bad, node := contract.ID{1}, contract.ID{2}, &ledger.Node{ID: identity.NodeID{1}, TLS: [32]byte{1}}
	r := records{}
	nodes := []*ledger.Node{node, {ID: identity.NodeID{2}, TLS: [32]byte{2}}}
	put := func() {
		var ids []identity.NodeID
		for _, n := range nodes {
			ids = append(ids, n.ID)
			r.put(ledger.NodeKey(n.ID), n)
		}
		r.put(ledger.NodesKey, ids)
	}
	put()
	assign := func(id contract.ID, epoch uint64) {
		r.put(ledger.AssignmentsKey(id), &ledger.Assignments{Current: []ledger.Assignment{
			{Workload: contract.WorkloadOf(id, "web", 0), Service: "web", Node: node.ID, Epoch: epoch},
		}})
	}
	r.put(ledger.RoutesKey, []string{"bad.test", "good.test"})
	r.put(ledger.RouteKey("bad.test"), &ledger.Route{Host: "bad.test", Contract: bad, Service: "web"})
	r.put(ledger.RouteKey("good.test"), &ledger.Route{Host: "good.test", Contract: good, Service: "web"})
	assign(bad, 1)
	assign(good, 1)
	g := &ledger.Genesis{Validators: []ledger.Validator{{Address: "[2001:db8::1]:443"}}}
	table := NewEdgeTable(g)
	epoch := func(host string) uint64 {
		route, ok := table.Lookup(host)
		if !ok || len(route.Servers) != 1 {
			return 0
		}
		return route.Servers[0].Epoch
	}
	if err := table.read(t.Context(), r, g); err != nil || epoch("bad.test") != 1 || epoch("good.test") != 1 {
		t.Fatalf("control: %v, epochs %d and %d", err, epoch("bad.test"), epoch("good.test"))
	}
	saved := maps.Clone(r)
	last := uint64(1)
	for what, raw := range map[string][]byte{"does not decode": {0xff}, "is too long to be answered": tooLong} {
		r[ledger.AssignmentsKey(bad)] = raw
		last++
		assign(good, last)
		if err := table.read(t.Context(), r, g); err == nil {
			t.Errorf("a record that %s is not told of", what)
		}
		if epoch("good.test") != last {
			t.Errorf("a record that %s keeps another contract at epoch %d, which is in %d", what, epoch("good.test"), last)
		}
		if epoch("bad.test") != 1 {
			t.Errorf("a record that %s takes what was known of its contract", what)
		}
		// A gateway that has never read it serves the others.
		fresh := NewEdgeTable(g)
		if fresh.read(t.Context(), r, g); len(fresh.current.Load().routes) != 4 { // the ledger, two nodes, the good one
			t.Errorf("a record that %s leaves a new gateway with %v", what, fresh.current.Load().routes)
		}
	}
	// A ledger that cannot be reached is no bad contract: what was read last stays, all of it.
	before := table.current.Load()
	if err := table.read(t.Context(), unreachable{saved, ledger.AssignmentsKey(good)}, g); !errors.Is(err, api.ErrUnavailable) || table.current.Load() != before {
		t.Errorf("half a table: %v", err)
	}
	if route, _ := table.Lookup(api.LedgerName(g.GridID())); route.Forward != g.Validators[0].Address {
		t.Errorf("the ledger is not behind its name: %+v", route)
	}

	// One who came later shows the first one's key, another shares the beginning of its ID and so the name.
	thief, namesake := &ledger.Node{ID: identity.NodeID{3}, TLS: node.TLS}, &ledger.Node{ID: node.ID, TLS: [32]byte{4}}
	namesake.ID[31]++
	if ServiceName(namesake.ID) != ServiceName(node.ID) {
		t.Fatal("control: the names differ")
	}
	r, nodes = saved, append(nodes, thief, namesake)
	put()
	if err := table.read(t.Context(), r, g); err != nil {
		t.Fatal(err)
	}
	if id, ok := table.Authorize(node.TLS); !ok || id != gateway.NodeID(node.ID) {
		t.Errorf("the first one's key is %v's", id)
	}
	if route, _ := table.Lookup(ServiceName(node.ID)); len(route.Servers) != 1 || route.Servers[0].Node != gateway.NodeID(node.ID) {
		t.Errorf("the first one's name leads to %+v", route)
	}
	if id, ok := table.Authorize(namesake.TLS); !ok || id != gateway.NodeID(namesake.ID) {
		t.Errorf("control: a later one's own key is %v's", id)
	}
}

// unreachable is a ledger that goes away at a key.
type unreachable struct {
	records
	at string
}

func (u unreachable) Read(ctx context.Context, keys ...string) (api.View, error) {
	if keys[0] == u.at {
		return api.View{}, fmt.Errorf("%w: gone", api.ErrUnavailable)
	}
	return u.records.Read(ctx, keys...)
}

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
		t.Errorf("own workload: %#v, want %#v", ms[0].Own[0], want)
	}
	if want := (overlay.Address{Prefix: host(overlay.Addr(net, there)), Epoch: 4}); ms[0].Peers[0].Addrs[0] != want {
		t.Errorf("the peer's workload: %#v, want %#v", ms[0].Peers[0].Addrs[0], want)
	}
	if want := (overlay.Address{Prefix: host(overlay.Addr(net, other.ID))}); ms[0].Peers[0].Addrs[1] != want {
		t.Errorf("the peer: %#v, want %#v", ms[0].Peers[0].Addrs[1], want)
	}
}
