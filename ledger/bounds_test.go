package ledger

import (
	"bytes"
	"crypto/ed25519"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"holdfast/contract"
	"holdfast/identity"
	"holdfast/internal/canonical"
	"holdfast/schedule"
)

// change writes records by hand, as many transactions would have.
func (x *grid) change(f func(*batch)) {
	x.t.Helper()
	b := &batch{State: *x.s}
	f(b)
	var err error
	if b.fleet, err = readFleet(&b.State); err != nil {
		x.t.Fatal(err)
	}
	x.s = &b.State
}

// submitAs is a contract.submit whose signatures were checked already.
func submitAs(b *batch, h *contract.Header) error {
	a, err := get[identity.Account](&b.State, AccountKey(h.Account))
	if err != nil {
		return err
	}
	who := &signers{account: a, devices: []identity.DeviceID{identity.DeviceID(a.Devices[0].Key.Digest())}}
	return b.contractSubmit(&Tx{Grid: h.Grid}, who, &ContractSubmit{Header: h.Encode()})
}

// accounts makes n accounts of the owner's key.
func (x *grid) accounts(n int) []identity.AccountID {
	own, err := get[identity.Account](x.s, AccountKey(x.acct))
	if err != nil {
		x.t.Fatal(err)
	}
	var out []identity.AccountID
	x.change(func(b *batch) {
		for i := range n {
			a := *own
			a.ID = identity.AccountID{77, byte(i), byte(i >> 8)}
			set(b, AccountKey(a.ID), &a)
			out = append(out, a.ID)
		}
	})
	return out
}

// fleet makes the grid one of n nodes more, all up.
func (x *grid) fleet(n int, cpu uint32, memory uint64) {
	x.change(func(b *batch) {
		for i := range n {
			at := len(entries[identity.NodeID](x.t, &b.State, NodesKey))
			node := &Node{ID: identity.NodeID{88, byte(i)}, Name: fmt.Sprint("big-", i), FarmName: fmt.Sprint("farm-", i%7), CPUMilli: cpu, Memory: memory, Index: uint32(at), Up: true}
			set(b, NodeKey(node.ID), node)
			if err := push(b, NodesKey, node.ID); err != nil {
				x.t.Fatal(err)
			}
		}
	})
}

func (x *grid) all(but ...int) (out []int) {
	for i := range x.s.fleet {
		if !slices.Contains(but, i) {
			out = append(out, i)
		}
	}
	return out
}

// many is a header of n services with these replicas, cpu and memory each.
func (x *grid) many(name string, n, replicas int, cpu uint32, memory uint64, f ...func(*contract.Header)) *contract.Header {
	return x.header(name, append([]func(*contract.Header){func(h *contract.Header) {
		h.Services, h.Routes = nil, nil
		for i := range n {
			h.Services = append(h.Services, contract.Service{Name: fmt.Sprintf("s%02d", i), Replicas: uint16(replicas), CPUMilli: cpu, Memory: memory, Pids: 10, Networks: []string{"default"}})
		}
	}}, f...)...)
}

func successor(h *contract.Header, f func(*contract.Header)) *contract.Header {
	next := *h
	next.Services = slices.Clone(h.Services)
	next.Revision, next.Contract, next.Previous = h.Revision+1, h.ContractID(), h.RevisionID()
	f(&next)
	return &next
}

// push and drop write what canonical would of the list after the same change.
func TestListsAreWhatCanonicalWrites(t *testing.T) {
	x := newGrid(t, "lab")
	b := &batch{State: *x.s}
	r := rand.New(rand.NewPCG(1, 1))
	var hosts []string
	for i := range 3000 {
		if r.IntN(3) > 0 || len(hosts) == 0 {
			host := strings.Repeat("h", r.IntN(70)) + fmt.Sprint(i)
			hosts = append(hosts, host)
			if err := push(b, "l", host); err != nil {
				t.Fatal(err)
			}
		} else {
			j := r.IntN(len(hosts))
			if err := drop(b, "l", hosts[j], "not there"); err != nil {
				t.Fatal(err)
			}
			hosts = slices.Delete(hosts, j, j+1)
		}
		if raw, _ := b.tree.get("l"); !bytes.Equal(raw, canonical.Encode(hosts)) {
			t.Fatalf("after %d changes: not the list's encoding", i)
		}
	}
	for _, n := range []int{23, 24, 255, 256, maxList - 1} {
		nums := make([]uint16, n)
		for i := range nums {
			nums[i] = uint16(i)
		}
		set(b, "n", &nums)
		if err := push(b, "n", uint16(7)); err != nil {
			t.Fatalf("%d and one: %v", n, err)
		}
		if got, err := list[uint16](&b.State, "n"); err != nil || len(got) != n+1 || got[n] != 7 {
			t.Fatalf("%d and one: %d entries, %v", n, len(got), err)
		}
		if err := drop(b, "n", uint16(n)); n < maxList-1 && err != nil {
			t.Fatal(err)
		}
	}
	if err := push(b, "n", uint16(7)); !errors.Is(err, ErrFull) {
		t.Errorf("an entry more than canonical reads: %v", err)
	}
}

// A stranger fills the list of all routes, or of all contracts, with the longest names there are. The list never becomes one
// that nobody can read, and what others have in it stays.
func TestAFullListRefusesAndKeepsWhatItHas(t *testing.T) {
	x := newGrid(t, "lab")
	victim := x.header("victim")
	x.must(x.deploy(victim))
	label := strings.Repeat("a", 60)
	hosts := []string{"victim.localhost"}
	for size := 0; size < maxRecord-1000; size += 248 {
		hosts = append(hosts, fmt.Sprintf("%s.%s.%s.%s%08d", label, label, label, label[:55], len(hosts)))
	}
	x.change(func(b *batch) { set(b, RoutesKey, &hosts) })
	long := func(name string, n int) *contract.Header {
		return x.header(name, func(h *contract.Header) {
			h.Routes = nil
			for i := range n {
				h.Routes = append(h.Routes, contract.Route{Host: fmt.Sprintf("%s.%s.%s.%s%s%02d", label, label, label, label[:50], name, i), Service: "web", Port: 80})
			}
		})
	}
	x.refused("more than fit", x.deploy(long("stranger", 64)), ErrFull.Error())
	x.must(x.deploy(long("control", 1)))
	got := entries[string](t, x.s, RoutesKey)
	if len(got) != len(hosts)+1 || got[0] != "victim.localhost" {
		t.Fatalf("the list has %d hosts and begins with %q", len(got), got[0])
	}
	contracts := make([]contract.ID, maxList)
	x.change(func(b *batch) { set(b, ContractsKey, &contracts) })
	x.refused("a contract too many", x.deploy(x.header("app")), ErrFull.Error())
	contracts = contracts[1:]
	x.change(func(b *batch) { set(b, ContractsKey, &contracts) })
	x.must(x.deploy(x.header("app", func(h *contract.Header) { h.Routes = nil })))
}

func TestAnUnreadableRecordIsNotAnAbsentOne(t *testing.T) {
	x := newGrid(t, "lab")
	h := x.header("app")
	x.must(x.deploy(h))
	good := x.s
	for name, key := range map[string]string{
		"contracts": ContractsKey, "routes": RoutesKey, "the account's contracts": AccountWorkKey(x.acct), "the account's usage": AccountUsedKey(x.acct),
		"the contract's assignments": AssignmentsKey(h.ContractID()),
	} {
		b := &batch{State: *good}
		b.tree = b.tree.put(key, []byte{0xff})
		x.s = &b.State
		tx := x.deploy(x.header("other"))
		if name == "the contract's assignments" {
			tx = x.tx(KindContractCancel, Actor{ID: x.acct}, &ContractCancel{h.ContractID()}, x.owner)
		}
		x.refused("with unreadable "+name, tx, "")
		if raw, _ := x.s.tree.get(key); !bytes.Equal(raw, []byte{0xff}) {
			t.Errorf("%s: written anew", name)
		}
		x.s, x.nonce[tx.Actor] = good, tx.Nonce-1
	}
	x.must(x.deploy(x.header("control")))
}

// A contract's records do not grow with its revisions, and epochs do not shrink.
func TestARevisedContractStaysSmall(t *testing.T) {
	x := newGrid(t, "lab")
	h := x.many("app", 8, 1, 1, 16<<20)
	x.must(x.deploy(h))
	first, _ := x.s.Get(AssignmentsKey(h.ContractID()))
	highest := map[contract.WorkloadID]uint64{}
	for i := range 30 {
		h = successor(h, func(n *contract.Header) {
			for j := range n.Services { // half of the names come back again and again, the others never
				n.Services[j].Name = fmt.Sprintf("s%02d-%02d", j, (i*(j%2)*100+i%3)%100)
			}
		})
		x.must(x.deploy(h))
		for _, a := range x.assigned(h) {
			if a.Epoch < highest[a.Workload] || a.Epoch == 0 {
				t.Fatalf("revision %d: epoch of %s is %d, was %d", h.Revision, a.Service, a.Epoch, highest[a.Workload])
			}
			highest[a.Workload] = a.Epoch
		}
		if dropped := i > 0 && x.assigned(h)[0].Epoch <= 1; dropped {
			t.Fatalf("revision %d: a workload that was dropped has its first epoch again", h.Revision)
		}
	}
	if raw, _ := x.s.Get(AssignmentsKey(h.ContractID())); len(raw) > len(first)+200 {
		t.Errorf("assignments grew from %d to %d bytes", len(first), len(raw))
	}
	id := h.ContractID()
	x.change(func(b *batch) {
		c, _ := get[Contract](&b.State, ContractKey(id))
		for len(c.Revisions) < MaxRevisions {
			c.Revisions, c.Times = append(c.Revisions, c.Current), append(c.Times, 1)
		}
		c.Revision = 1 << 20
		h.Revision = c.Revision
		c.Current = h.RevisionID()
		b.tree = b.tree.put(RevisionKey(c.Current), h.Encode())
		set(b, ContractKey(id), c)
	})
	next := successor(h, func(*contract.Header) {})
	next.Contract = id
	x.must(x.deploy(next))
	c, err := get[Contract](x.s, ContractKey(id))
	if err != nil || len(c.Revisions) != MaxRevisions || len(c.Times) != MaxRevisions || c.Revisions[MaxRevisions-1] != next.RevisionID() || c.Revision != 1<<20+1 {
		t.Fatalf("%d revisions are listed, the current one is %d: %v", len(c.Revisions), c.Revision, err)
	}
	x.ends(x.tx(KindContractCancel, Actor{ID: x.acct}, &ContractCancel{id}, x.owner))
}

// A node that changes touches its own contracts and those that wait, and nothing else: what is wrong on purpose in another
// one stays.
func TestANodeTouchesItsOwnContractsOnly(t *testing.T) {
	x := newGrid(t, "lab")
	on := func(node string) *contract.Header {
		h := x.header("on-"+node, func(h *contract.Header) { h.Services[0].Placement.Nodes = []string{node} })
		x.must(x.deploy(h))
		return h
	}
	a, b := on("node-1"), on("node-2")
	mark := func(h *contract.Header) {
		x.change(func(b *batch) {
			as, _ := get[Assignments](&b.State, AssignmentsKey(h.ContractID()))
			as.Current[0].Reason = "mark"
			set(b, AssignmentsKey(h.ContractID()), as)
		})
	}
	mark(a)
	mark(b)
	x.block([]int{0, 2})
	if r := x.assigned(a)[0].Reason; r != "mark" {
		t.Errorf("node-2 went, and the contract on node-1 was assigned anew: %q", r)
	}
	if r := x.assigned(b)[0].Reason; r == "mark" {
		t.Error("its own node went, and nothing happened")
	}
	x.block([]int{0, 1, 2})
	if as := x.assigned(b)[0]; as.Node.IsZero() || as.Reason != "" || as.Epoch != 2 {
		t.Errorf("its node is back: %+v", as)
	}
	if r := x.assigned(a)[0].Reason; r != "mark" {
		t.Errorf("node-2 came back, and the contract on node-1 was assigned anew: %q", r)
	}
}

// Room that comes is given to those who waited, the longest waiting first, so many a block.
func TestWhoWaitsGetsRoomThatComes(t *testing.T) {
	x := newGrid(t, "lab")
	big := x.many("big", 1, 3, 3500, 7<<30)
	x.must(x.deploy(big))
	accts := x.accounts(2)
	var wait []*contract.Header
	x.change(func(b *batch) {
		for i := range maxRetry + 10 {
			h := x.many(fmt.Sprint("w", i), 1, 1, 100, 100<<20, func(h *contract.Header) { h.Account, h.Services[0].CPUMilli = accts[i%2], 600 })
			if i >= 12 {
				h.Services[0].CPUMilli = 5000 // fits on none
			}
			wait = append(wait, h)
			if err := submitAs(b, h); err != nil {
				t.Fatal(err)
			}
		}
	})
	placed := func() (n int) {
		for _, h := range wait {
			if !x.assigned(h)[0].Node.IsZero() {
				n++
			}
		}
		return n
	}
	if n := placed(); n != 0 {
		t.Fatalf("%d are placed where no room is", n)
	}
	root := x.s.Root()
	x.block([]int{0, 1, 2})
	if x.s.Root() != root {
		t.Error("nothing changed, and the state did")
	}
	x.ends(x.tx(KindContractCancel, Actor{ID: x.acct}, &ContractCancel{big.ContractID()}, x.owner))
	if n := placed(); n != 12 {
		t.Errorf("the big one went, and %d of 12 are placed", n)
	}
	left, err := get[uint64](x.s, retryKey)
	if err != nil || *left != 10 {
		t.Errorf("in one block more than %d were tried: %v left, %v", maxRetry, left, err)
	}
	if got := entries[contract.ID](t, x.s, WaitingKey); got[0] != wait[maxRetry].ContractID() || len(got) != maxRetry+10-12 {
		t.Errorf("the next one to try is not the one that waited longest, or %d wait", len(got))
	}
	x.block([]int{0, 1, 2})
	if _, err := get[uint64](x.s, retryKey); !errors.Is(err, ErrAbsent) {
		t.Error("all were tried, and it does not end")
	}
	root = x.s.Root()
	x.block([]int{0, 1, 2})
	if x.s.Root() != root {
		t.Error("it does not come to rest")
	}
}

// flapping is a grid whose node 3 has all the workloads that it can, of 500 contracts with 20 workloads each; where wait is
// true as many wait for room.
func flapping(t testing.TB, wait bool) *grid {
	x := newGrid(t, "lab")
	x.fleet(30, 1<<22, 1<<42)
	accts := x.accounts(10)
	own := OwnQuota()
	x.change(func(b *batch) {
		for _, a := range accts {
			set(b, QuotaKey(a), &own)
		}
		for i := range 500 {
			h := x.many(fmt.Sprint("c", i), 20, 1, 10, 16<<20, func(h *contract.Header) {
				h.Account = accts[i%5]
				h.Services[0].Placement.Nodes = []string{"big-0"} // each has one workload there
			})
			if err := submitAs(b, h); err != nil {
				t.Fatal(err)
			}
			if wait {
				h := x.many(fmt.Sprint("w", i), 20, 1, 1<<20, 1<<40, func(h *contract.Header) { h.Account = accts[5+i%5] })
				for j := range h.Services {
					h.Services[j].Placement.Farms = []string{"nowhere"}
				}
				if err := submitAs(b, h); err != nil {
					t.Fatal(err)
				}
			}
		}
	})
	return x
}

// The bound is generous, for a busy machine: BenchmarkNodeFlap measures. When every contract looked at every other it was
// minutes.
func TestANodeFlapIsNotSlow(t *testing.T) {
	x := flapping(t, true)
	if n := len(entries[contract.ID](t, x.s, NodeWorkKey(identity.NodeID{88, 0}))); n != 500 {
		t.Fatalf("%d contracts are on the node", n)
	}
	before := x.s
	start := time.Now()
	x.block(x.all(3))
	x.block(x.all())
	if d := time.Since(start); d > time.Minute {
		t.Errorf("two blocks took %v", d)
	}
	moved := 0
	for _, id := range entries[contract.ID](t, x.s, ContractsKey) {
		was, _ := get[Assignments](before, AssignmentsKey(id))
		is, _ := get[Assignments](x.s, AssignmentsKey(id))
		for i := range was.Current {
			if was.Current[i].Node != (identity.NodeID{88, 0}) && is.Current[i].Node != was.Current[i].Node {
				moved++
			}
		}
	}
	if moved > 0 {
		t.Errorf("%d workloads of other nodes moved", moved)
	}
}

func BenchmarkNodeFlap(b *testing.B) {
	for _, wait := range []bool{false, true} {
		b.Run(fmt.Sprintf("waiting=%v", wait), func(b *testing.B) {
			x := flapping(b, wait)
			for b.Loop() {
				x.block(x.all(3))
				x.block(x.all())
			}
		})
	}
}

// What is kept at hand of the nodes is what the records say, whatever happened, and a validator that starts anew goes on as
// the others.
func TestTheFleetAtHandIsTheRecords(t *testing.T) {
	x := newGrid(t, "lab")
	r := rand.New(rand.NewPCG(3, 4))
	live := map[string]*contract.Header{}
	for i := range 120 {
		name := fmt.Sprint("c", r.IntN(8))
		h := live[name]
		switch k := r.IntN(5); {
		case h == nil:
			h = x.many(name, 1+r.IntN(3), 1+r.IntN(3), uint32(100+r.IntN(2000)), uint64(16+r.IntN(2000))<<20, func(h *contract.Header) { h.SealedSize += uint32(i) })
			x.must(x.deploy(h))
			live[name] = h
		case k == 0:
			x.ends(x.tx(KindContractCancel, Actor{ID: x.acct}, &ContractCancel{h.ContractID()}, x.owner))
			delete(live, name)
		case k < 3:
			id := h.ContractID()
			h = successor(h, func(n *contract.Header) { n.Services[0].Replicas = uint16(r.IntN(4)) })
			h.Contract = id
			x.must(x.deploy(h))
			live[name] = h
		default:
			x.block(x.all(r.IntN(6)))
		}
		want, err := readFleet(x.s)
		if err != nil || !slices.Equal(want, x.s.fleet) {
			t.Fatalf("step %d: at hand %+v, in records %+v, %v", i, x.s.fleet, want, err)
		}
		used := schedule.Node{}
		n := 0
		for _, id := range entries[contract.ID](t, x.s, ContractsKey) {
			as, err := get[Assignments](x.s, AssignmentsKey(id))
			if err != nil {
				t.Fatal(err)
			}
			h, err := x.s.header(as.Revision)
			if err != nil {
				t.Fatal(err)
			}
			for _, a := range as.Current {
				if s, _ := h.Service(a.Service); !a.Node.IsZero() {
					used.Take(int64(s.CPUMilli), int64(s.Memory), -1)
					n++
				}
			}
		}
		for _, f := range want {
			used.CPUMilli, used.Memory, used.Workloads = used.CPUMilli+f.CPUMilli, used.Memory+f.Memory, used.Workloads+f.Workloads
		}
		if used.CPUMilli != 3*4000 || used.Memory != 3*8<<30 || used.Workloads != 3*schedule.MaxWorkloads {
			t.Fatalf("step %d: what is used and what is free are %+v", i, used)
		}
	}
	again, err := Load(maps.All(maps.Collect(x.s.Changes(nil))))
	if err != nil {
		t.Fatal(err)
	}
	blk := Block{Height: x.h + 1, Time: x.at.Add(time.Second), Txs: [][]byte{x.deploy(x.many("last", 2, 2, 900, 1<<30)).Encode()}, Heard: []Heard{{Power: 10, Nodes: Bitmap{}.With(1)}}}
	a, _ := x.s.Apply(blk)
	b, _ := again.Apply(blk)
	if a.Root() != b.Root() {
		t.Error("a validator that started anew computes another state")
	}
}

func TestKeysBelongToOneMachine(t *testing.T) {
	x := newGrid(t, "lab")
	x.change(func(b *batch) {
		g, _ := b.Genesis()
		g.Validators[0].TLS = [32]byte{9, 9}
		set(b, genesisKey, g)
	})
	admin := Actor{ID: x.g.GridAccount()}
	farm := entries[identity.FarmID](t, x.s, FarmsKey)[0]
	admit := func(i int, f func(*NodeAdmit)) *Tx {
		a := x.admission(farm, i)
		f(a)
		a.Proof = x.nodes[len(x.nodes)-1].Sign(NodeAdmitPurpose, a.ProofBytes(x.g.GridID()))
		x.nodes = x.nodes[:len(x.nodes)-1]
		return x.tx(KindNodeAdmit, admin, a, x.admin)
	}
	gw := func(tls [32]byte) *Tx {
		return x.tx(KindGatewayAdmit, admin, &GatewayAdmit{Name: "gw", TLS: tls, Address: "gw:443"}, x.admin)
	}
	x.must(gw([32]byte{4}))
	x.refused("WireGuard key of another", admit(50, func(a *NodeAdmit) { a.WireGuard = [32]byte{1, 0} }), "WireGuard key")
	x.refused("TLS key of another", admit(50, func(a *NodeAdmit) { a.TLS = [32]byte{2, 0} }), "TLS key")
	x.refused("TLS key of a gateway", admit(50, func(a *NodeAdmit) { a.TLS = [32]byte{4} }), "a gateway has")
	x.refused("TLS key of a validator", admit(50, func(a *NodeAdmit) { a.TLS = [32]byte{9, 9} }), "a validator has")
	x.refused("session key of another", admit(50, func(a *NodeAdmit) { a.Session = [32]byte{3, 0} }), "session key")
	x.refused("no WireGuard key", admit(50, func(a *NodeAdmit) { a.WireGuard = [32]byte{} }), "missing")
	x.refused("a gateway with a node's TLS key", gw([32]byte{2, 0}), "another node has")
	x.refused("a gateway with a validator's TLS key", gw([32]byte{9, 9}), "a validator has")
	x.refused("a gateway without one", gw([32]byte{}), "missing")
	x.must(admit(50, func(*NodeAdmit) {}))
	update := func(i int, session [32]byte) *Tx {
		p := x.nodes[i].Public()
		return x.tx(KindNodeUpdate, Actor{Node: true, ID: p.Node()}, &NodeUpdate{Session: session}, x.nodes[i])
	}
	x.refused("an update to the session key of another", update(0, [32]byte{3, 1}), "session key")
	x.must(update(0, [32]byte{3, 0})) // its own again
	x.must(update(0, [32]byte{5}))
	x.must(update(1, [32]byte{3, 0})) // nobody's any more
}

// What was refused in a block is not executed later, by whoever kept it.
func TestARefusedTransactionIsSpent(t *testing.T) {
	x := newGrid(t, "lab")
	squatter := x.accounts(1)[0]
	squat := x.header("squat", func(h *contract.Header) { h.Account, h.Routes[0].Host = squatter, "app.localhost" })
	x.change(func(b *batch) {
		if err := submitAs(b, squat); err != nil {
			t.Fatal(err)
		}
	})
	deploy := x.deploy(x.header("app"))
	x.refused("a host of another", deploy, "belongs to another")
	x.ends(x.tx(KindContractCancel, Actor{ID: squatter}, &ContractCancel{squat.ContractID()}, x.owner))
	x.pass(365 * 24 * time.Hour)
	x.refused("the same bytes a year later", deploy, "nonce")
	x.must(x.deploy(x.header("app")))
}

// One stolen device of two cannot use up its account's nonces.
func TestANonceIsSpentByThePolicyOnly(t *testing.T) {
	x := newGrid(t, "lab")
	a, b := identity.NewKey([32]byte{21}), identity.NewKey([32]byte{22})
	tx := NewTx(x.g.GridID(), KindAccountCreate, Actor{}, 0, &AccountCreate{
		Devices: []identity.Device{{Name: "a", Key: a.Public()}, {Name: "b", Key: b.Public()}},
		Policy:  identity.Policy{Rules: []identity.Rule{{Act: identity.ActDefault, Threshold: 2}}}, Sealing: x.open.Public()})
	tx.Sign(a)
	tx.Sign(b)
	x.must(tx)
	x.acct = identity.AccountID(tx.ID())
	h := x.header("app")
	both := x.deploy(h, a, b)
	x.refused("by the thief", x.deploy(x.header("thief"), a), "needs 2 signatures")
	x.refused("by the thief, again", x.tx(KindContractCancel, Actor{ID: x.acct}, &ContractCancel{}, a), "")
	x.must(both)
}

func TestNetworksComeBack(t *testing.T) {
	x := newGrid(t, "lab")
	nets := func(n int, tag string) func(*contract.Header) {
		return func(h *contract.Header) {
			h.Networks, h.Services, h.Routes = nil, nil, nil
			for i := range n {
				name := fmt.Sprint(tag, i)
				h.Networks = append(h.Networks, name)
				h.Services = append(h.Services, contract.Service{Name: name, Replicas: 1, CPUMilli: 1, Memory: 16 << 20, Pids: 1, Networks: []string{name}})
			}
		}
	}
	index := func(h *contract.Header, name string) int {
		n, err := get[Network](x.s, NetworkKey(contract.NetworkOf(h.ContractID(), name)))
		if err != nil {
			t.Fatalf("network %s: %v", name, err)
		}
		return int(n.Index)
	}
	g, _ := get[Grid](x.s, GridKey)
	first := int(g.NextNetwork)
	x.change(func(b *batch) {
		g, _ := get[Grid](&b.State, GridKey)
		g.NextNetwork = maxNetwork - 4
		set(b, GridKey, g)
	})
	h := x.header("a", nets(3, "n"))
	x.must(x.deploy(h))
	other := x.header("b", nets(1, "n"))
	x.must(x.deploy(other))
	x.refused("with none left", x.deploy(x.header("c", nets(1, "n"))), "no room for another network")
	id := h.ContractID()
	h2 := successor(h, nets(2, "n")) // one is dropped
	h2.Contract = id
	x.must(x.deploy(h2))
	c := x.header("c", nets(1, "n"))
	x.must(x.deploy(c))
	if got := index(c, "n0"); got != maxNetwork-2 {
		t.Errorf("the network that a revision dropped had %d, the next one has %d", maxNetwork-2, got)
	}
	x.ends(x.tx(KindContractCancel, Actor{ID: x.acct}, &ContractCancel{id}, x.owner))
	d := x.header("d", nets(2, "n"))
	x.must(x.deploy(d))
	if a, b := index(d, "n0"), index(d, "n1"); a != maxNetwork-4 || b != maxNetwork-3 {
		t.Errorf("indexes %d and %d: not those of the cancelled contract", a, b)
	}
	if index(other, "n0") != maxNetwork-1 || first == 0 {
		t.Error("a network lost its index, or one has 0, which is the system network's")
	}
	x.refused("with none left again", x.deploy(x.header("e", nets(1, "n"))), "no room for another network")
}

func TestQuotas(t *testing.T) {
	for name, full := range map[string]AccountUsed{ // each full in one thing alone
		"contracts": {Contracts: MaxAccountContracts, Workloads: 1, Networks: 1, Hosts: 1},
		"workloads": {Contracts: 1, Workloads: MaxAccountWorkloads, Networks: 1, Hosts: 1},
		"networks":  {Contracts: 1, Workloads: 1, Networks: MaxAccountNetworks, Hosts: 1},
		"hosts":     {Contracts: 1, Workloads: 1, Networks: 1, Hosts: MaxAccountHosts},
	} {
		x := newGrid(t, "lab")
		h := x.header("app")
		x.must(x.deploy(h))
		if u, err := get[AccountUsed](x.s, AccountUsedKey(x.acct)); err != nil || *u != (AccountUsed{1, 1, 1, 1, 0}) {
			t.Fatalf("after one contract: %+v, %v", u, err)
		}
		x.change(func(b *batch) { set(b, AccountUsedKey(x.acct), &full) })
		x.refused("with all its "+name, x.deploy(x.header("more")), fmt.Sprintf("%s, at most", name))
		next := successor(h, func(h *contract.Header) { h.SealedSize++ })
		x.must(x.deploy(next)) // nothing more is nothing more
		x.ends(x.tx(KindContractCancel, Actor{ID: x.acct}, &ContractCancel{h.ContractID()}, x.owner))
		x.must(x.deploy(x.header("more")))
	}
}

// A node gets no more than fits into its heartbeat, however large it is.
func TestAFullNodeIsHeard(t *testing.T) {
	h := &Heartbeat{Grid: identity.GridID{1}, Node: identity.NodeID{1}, Sequence: 1 << 62, Signature: make([]byte, ed25519.SignatureSize)}
	for range schedule.MaxWorkloads {
		h.Workloads = append(h.Workloads, Report{Service: strings.Repeat("s", 63), Replica: 1 << 15, Epoch: 1 << 62, Revision: 1 << 31, State: StateStarting, Restarts: 1 << 31, Healthy: true, ExitCode: -1 << 31, Reason: strings.Repeat("r", 200)})
	}
	if n := len(h.Encode()); n > MaxHeartbeat {
		t.Errorf("a full node's heartbeat has %d bytes, and %d are heard", n, MaxHeartbeat)
	}
	x := newGrid(t, "lab")
	x.fleet(1, 1<<30, 1<<44)
	accts := x.accounts(8)
	placed := 0
	x.change(func(b *batch) {
		for i := range schedule.MaxWorkloads/64 + 1 {
			h := x.many(fmt.Sprint("c", i), 64, 1, 1, 16<<20, func(h *contract.Header) {
				h.Account = accts[i%8]
				for j := range h.Services {
					h.Services[j].Placement.Nodes = []string{"big-0"}
				}
			})
			if err := submitAs(b, h); err != nil {
				t.Fatal(err)
			}
			as, _ := get[Assignments](&b.State, AssignmentsKey(h.ContractID()))
			for _, a := range as.Current {
				if !a.Node.IsZero() {
					placed++
				}
			}
		}
	})
	if placed != schedule.MaxWorkloads {
		t.Errorf("%d workloads are on one node, %d may be", placed, schedule.MaxWorkloads)
	}
}

// A recorded heartbeat does not keep a dead node up, and a clock that was wrong once does not shut its node out.
func TestHeartbeatsOfAnotherTimeAreNotHeard(t *testing.T) {
	x := newGrid(t, "lab")
	sess := sessionKey(x, 0)
	pub := x.nodes[0].Public()
	day := time.Unix(1_800_000_000, 0)
	beat := func(at time.Time) []byte {
		h := &Heartbeat{Grid: x.g.GridID(), Node: pub.Node(), Sequence: uint64(at.UnixNano())}
		h.Sign(sess)
		return h.Encode()
	}
	e := NewEars(x.g, day)
	old := beat(day)
	if err := e.Hear(x.s, old, day); err != nil {
		t.Fatalf("control: %v", err)
	}
	for off, want := range map[time.Duration]error{
		x.g.Lease: nil, -x.g.Lease: nil, x.g.Lease + time.Millisecond: ErrClock, -x.g.Lease - time.Millisecond: ErrClock,
		10 * 365 * 24 * time.Hour: ErrClock, -10 * 365 * 24 * time.Hour: ErrClock,
	} {
		if err := NewEars(x.g, day).Hear(x.s, beat(day.Add(off)), day); !errors.Is(err, want) {
			t.Errorf("a clock that is off by %v: %v, want %v", off, err, want)
		}
	}
	for _, seq := range []uint64{0, 1 << 63, 1<<64 - 1} {
		h := &Heartbeat{Grid: x.g.GridID(), Node: pub.Node(), Sequence: seq}
		h.Sign(sess)
		if err := NewEars(x.g, day).Hear(x.s, h.Encode(), day); !errors.Is(err, ErrClock) {
			t.Errorf("sequence %d: %v", seq, err)
		}
	}
	month := day.Add(30 * 24 * time.Hour) // the validator restarted, the node is gone, and somebody kept what it said
	e = NewEars(x.g, month)
	now := month.Add(time.Minute)
	if err := e.Hear(x.s, old, now); !errors.Is(err, ErrClock) {
		t.Errorf("a month old: %v", err)
	}
	if m, _ := DecodeExtension(e.Extension(x.s, now)); m.Has(0) {
		t.Error("a validator says that a dead node lives")
	}
}
