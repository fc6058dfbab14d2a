package ledger

import (
	"crypto/ed25519"
	"fmt"
	"maps"
	"strings"
	"testing"
	"time"

	"holdfast/contract"
	"holdfast/identity"
)

// grid is a ledger with an owner, three farms and a node on each, all up.
type grid struct {
	t     testing.TB
	g     *Genesis
	s     *State
	at    time.Time
	h     int64
	admin *identity.PrivateKey
	owner *identity.PrivateKey
	acct  identity.AccountID
	open  *identity.OpeningKey
	nodes []*identity.PrivateKey
	nonce map[Actor]uint64
}

func newGrid(t testing.TB, name string) *grid {
	t.Helper()
	x := &grid{t: t, at: time.Unix(1_800_000_000, 0), admin: identity.NewKey([32]byte{1}), owner: identity.NewKey([32]byte{2}), nonce: map[Actor]uint64{}}
	x.open, _ = identity.NewOpeningKey([32]byte{3})
	x.g = &Genesis{
		Version: 1, Name: name, Time: x.at.Unix(), Devices: []identity.Device{{Name: "admin", Key: x.admin.Public()}}, Policy: identity.SingleDevice(),
		Sealing: x.open.Public(), Validators: []Validator{{Name: "v", Key: []byte("key"), Power: 10}}, Lease: 5 * time.Second, Margin: time.Second,
		Delays: Delays{Cancel: 5 * time.Second, Retain: time.Hour, Policy: 10 * time.Second, Proposal: 10 * time.Minute},
	}
	if _, err := DecodeGenesis(x.g.Encode()); err != nil {
		t.Fatal(err)
	}
	var err error
	if x.s, err = New(x.g); err != nil {
		t.Fatal(err)
	}
	tx := NewTx(x.g.GridID(), KindAccountCreate, Actor{}, 0, &AccountCreate{
		Devices: []identity.Device{{Name: "laptop", Key: x.owner.Public()}}, Policy: identity.SingleDevice(), Sealing: x.open.Public()})
	tx.Sign(x.owner)
	x.acct = identity.AccountID(tx.ID())
	x.must(tx)
	for i := range 3 {
		f := x.tx(KindFarmAdmit, Actor{ID: x.g.GridAccount()}, &FarmAdmit{Name: fmt.Sprint("farm-", i+1), Owner: x.g.GridAccount()}, x.admin)
		x.must(f)
		x.must(x.tx(KindNodeAdmit, Actor{ID: x.g.GridAccount()}, x.admission(identity.FarmID(f.ID()), i), x.admin))
	}
	x.block([]int{0, 1, 2})
	return x
}

func (x *grid) admission(farm identity.FarmID, i int) *NodeAdmit {
	k := identity.NewKey([32]byte{10, byte(i)})
	x.nodes = append(x.nodes, k)
	a := &NodeAdmit{
		Farm: farm, Name: fmt.Sprint("node-", i+1), Key: k.Public(), Sealing: x.open.Public(), CPUMilli: 4000, Memory: 8 << 30, Endpoints: []string{"2001:db8::1"},
		WireGuard: [32]byte{1, byte(i)}, TLS: [32]byte{2, byte(i)}, Session: [32]byte{3, byte(i)},
	}
	a.Proof = k.Sign(NodeAdmitPurpose, a.ProofBytes(x.g.GridID()))
	return a
}

func (x *grid) tx(kind Kind, a Actor, payload any, keys ...*identity.PrivateKey) *Tx {
	tx := NewTx(x.g.GridID(), kind, a, x.nonce[a]+1, payload)
	tx.Until = x.at.Add(time.Minute).Unix()
	for _, k := range keys {
		tx.Sign(k)
	}
	return tx
}

func (x *grid) submit(tx *Tx) Result {
	x.h++
	x.at = x.at.Add(time.Second)
	next, res := x.s.Apply(Block{Height: x.h, Time: x.at, Txs: [][]byte{tx.Encode()}})
	if check := x.s.Check(tx.Encode()); (check == nil) != (res[0].Code == CodeOK) {
		x.t.Errorf("check says %v, the block says %+v", check, res[0])
	}
	x.s = next
	if n, err := get[uint64](x.s, NonceKey(tx.Actor)); err == nil {
		x.nonce[tx.Actor] = *n
	}
	return res[0]
}

// entries is a list that can be read.
func entries[T any](t testing.TB, s *State, key string) []T {
	t.Helper()
	l, err := list[T](s, key)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func (x *grid) must(tx *Tx) {
	x.t.Helper()
	if r := x.submit(tx); r.Code != CodeOK {
		x.t.Fatalf("%s: %s", tx.Kind, r.Log)
	}
}

// ends cancels a contract, and waits until it is.
func (x *grid) ends(tx *Tx) {
	x.t.Helper()
	x.must(tx)
	x.pass(5 * time.Second)
}

// pass is an empty block, some time later, in which validators say nothing.
func (x *grid) pass(d time.Duration) {
	x.h++
	x.at = x.at.Add(d)
	x.s, _ = x.s.Apply(Block{Height: x.h, Time: x.at})
}

func (x *grid) refused(name string, tx *Tx, want string) {
	x.t.Helper()
	kept := x.s.tree
	r := x.submit(tx)
	if n, ok := x.s.tree.get(NonceKey(tx.Actor)); ok && r.Code == CodeRefused {
		kept = kept.put(NonceKey(tx.Actor), n)
	}
	if r.Code == CodeOK || !strings.Contains(r.Log, want) {
		x.t.Errorf("%s: %d %q, want a refusal with %q", name, r.Code, r.Log, want)
	}
	if x.s.tree.root() != kept.root() {
		x.t.Errorf("%s: it was refused and changed more than a nonce", name)
	}
}

// block is an empty block in which the validator has heard these nodes.
func (x *grid) block(heard []int, gap ...time.Duration) {
	x.h++
	d := time.Second
	if len(gap) > 0 {
		d = gap[0]
	}
	x.at = x.at.Add(d)
	m := Bitmap{}
	for _, i := range heard {
		m = m.With(i)
	}
	x.s, _ = x.s.Apply(Block{Height: x.h, Time: x.at, Heard: []Heard{{Power: 10, Nodes: m}}})
}

func (x *grid) header(name string, f ...func(*contract.Header)) *contract.Header {
	h := &contract.Header{
		Version: 1, Grid: x.g.GridID(), Account: x.acct, Name: name, Revision: 1, SealedSize: 100, Networks: []string{"default"},
		Services: []contract.Service{{Name: "web", Replicas: 1, CPUMilli: 500, Memory: 64 << 20, Pids: 100, Networks: []string{"default"}}},
		Routes:   []contract.Route{{Host: name + ".localhost", Service: "web", Port: 80}},
	}
	for _, g := range f {
		g(h)
	}
	return h
}

func (x *grid) deploy(h *contract.Header, keys ...*identity.PrivateKey) *Tx {
	if len(keys) == 0 {
		keys = []*identity.PrivateKey{x.owner}
	}
	return x.tx(KindContractSubmit, Actor{ID: x.acct}, &ContractSubmit{Header: h.Encode()}, keys...)
}

func (x *grid) assigned(h *contract.Header) []Assignment {
	x.t.Helper()
	as, err := get[Assignments](x.s, AssignmentsKey(h.ContractID()))
	if err != nil {
		x.t.Fatal(err)
	}
	return as.Current
}

func withVolume(h *contract.Header) {
	s := contract.Store{FrontEnd: contract.VolumeOf(contract.ID{}, h.Name), Recovery: [32]byte{1}, Limit: contract.VolumeStore(1 << 30)}
	s.Recovery = contract.VolumeOf(contract.ID{1}, h.Name)
	h.Volumes = []contract.Volume{{Name: "data", Size: 1 << 30, Store: s}}
	h.Services[0].Volumes = []string{"data"}
}

func TestTransactionsOfOthersAreRefused(t *testing.T) {
	x := newGrid(t, "lab")
	h := x.header("app")
	stranger := identity.NewKey([32]byte{99})

	other := newGrid(t, "other")
	x.refused("a transaction of another grid", NewTxSigned(other.g.GridID(), KindContractSubmit, Actor{ID: x.acct}, 1, &ContractSubmit{Header: h.Encode()}, x.owner), "transaction is for grid1")
	x.refused("a header of another grid", x.deploy(other.header("app")), "header is for grid1")
	x.refused("signed by a stranger", x.deploy(h, stranger), "not a key of the actor")
	x.refused("signed by a node's key", x.deploy(h, x.nodes[0]), "not a key of the actor")
	x.refused("without a signature", x.tx(KindContractSubmit, Actor{ID: x.acct}, &ContractSubmit{Header: h.Encode()}), "0 signatures")
	x.refused("for an account that signed nothing", x.tx(KindContractSubmit, Actor{ID: x.g.GridAccount()}, &ContractSubmit{Header: h.Encode()}, x.admin), "only acct1")

	good := x.deploy(h)
	resigned := *good // the stranger puts his signature under the owner's key
	resigned.Signatures = []TxSignature{{good.Signatures[0].Key, stranger.Sign(txPurpose, good.signBytes())}}
	x.refused("re-signed", &resigned, "does not verify")
	changed := *good // and the owner's signature over another payload
	h2 := x.header("evil")
	changed.Payload = NewTx(x.g.GridID(), KindContractSubmit, Actor{}, 0, &ContractSubmit{Header: h2.Encode()}).Payload
	x.refused("payload changed", &changed, "does not verify")
	kind := *good
	kind.Kind = KindContractCancel
	x.refused("kind changed", &kind, "does not verify")
	nonce := *good
	nonce.Nonce++
	x.refused("nonce changed", &nonce, "does not verify")

	x.must(good) // the control
	x.refused("replayed", good, fmt.Sprintf("nonce %d, the next one is %d", good.Nonce, good.Nonce+1))
	x.refused("a nonce from the future", NewTxSigned(x.g.GridID(), KindContractCancel, Actor{ID: x.acct}, 99, &ContractCancel{h.ContractID()}, x.owner), "nonce 99")

	x.refused("a farm admitted by a user", x.tx(KindFarmAdmit, Actor{ID: x.acct}, &FarmAdmit{Name: "mine", Owner: x.acct}, x.owner), "only acct1")
	x.refused("a gateway admitted by a user", x.tx(KindGatewayAdmit, Actor{ID: x.acct}, &GatewayAdmit{Name: "gw", Address: "x:1"}, x.owner), "only acct1")
	farms := entries[identity.FarmID](t, x.s, FarmsKey)
	adm := x.admission(farms[0], 7)
	adm.Proof = stranger.Sign(NodeAdmitPurpose, adm.ProofBytes(x.g.GridID()))
	x.refused("a node that did not agree", x.tx(KindNodeAdmit, Actor{ID: x.g.GridAccount()}, adm, x.admin), "does not verify")
	x.refused("a node admitted by who does not own the farm", x.tx(KindNodeAdmit, Actor{ID: x.acct}, x.admission(farms[0], 8), x.owner), "only acct1")
}

func NewTxSigned(grid identity.GridID, kind Kind, a Actor, nonce uint64, payload any, k *identity.PrivateKey) *Tx {
	tx := NewTx(grid, kind, a, nonce, payload)
	tx.Until = 1_800_000_000 + 1000 // soon after newGrid's time
	tx.Sign(k)
	return tx
}

func TestPolicyOfTwo(t *testing.T) {
	x := newGrid(t, "lab")
	a, b := identity.NewKey([32]byte{21}), identity.NewKey([32]byte{22})
	create := func(keys ...*identity.PrivateKey) *Tx {
		tx := NewTx(x.g.GridID(), KindAccountCreate, Actor{}, 0, &AccountCreate{
			Devices: []identity.Device{{Name: "a", Key: a.Public()}, {Name: "b", Key: b.Public()}},
			Policy:  identity.Policy{Rules: []identity.Rule{{Act: identity.ActDefault, Threshold: 2}}}, Sealing: x.open.Public()})
		for _, k := range keys {
			tx.Sign(k)
		}
		return tx
	}
	x.refused("an account with a device that did not sign", create(a), "each device signs")
	tx := create(a, b)
	x.must(tx)
	x.refused("the same account again", tx, "exists")
	x.acct = identity.AccountID(tx.ID())
	h := x.header("app")
	x.refused("one of two", x.deploy(h, a), "needs 2 signatures")
	x.refused("the same one twice", x.deploy(h, a, a), "signed twice")
	x.must(x.deploy(h, a, b))
}

func TestLifeOfAContract(t *testing.T) {
	x := newGrid(t, "lab")
	h := x.header("app", withVolume)
	x.must(x.deploy(h))
	as := x.assigned(h)
	if len(as) != 1 || as[0].Epoch != 1 || as[0].Node.IsZero() || !as[0].Fenced {
		t.Fatalf("first assignment: %+v", as)
	}
	next := *h
	next.Revision, next.Contract, next.Previous = 2, h.ContractID(), h.RevisionID()
	next.Routes = []contract.Route{{Host: "new.localhost", Service: "web", Port: 80}}
	x.refused("a second contract of that name", x.deploy(x.header("app", func(h *contract.Header) { h.SealedSize++ })), "already")
	x.refused("a host of another contract", x.deploy(x.header("thief", func(h *contract.Header) { h.Routes[0].Host = "app.localhost" })), "belongs to another")
	wrong := next
	wrong.Previous = contract.RevisionID{7}
	x.refused("a revision of something else", x.deploy(&wrong), "plan again")
	grown := next
	grown.Volumes = []contract.Volume{{Name: "data", Size: 2 << 30}}
	x.refused("a volume that changes its size", x.deploy(&grown), "cannot change")
	x.must(x.deploy(&next))
	if as := x.assigned(h); as[0].Epoch != 1 {
		t.Errorf("a revision moved the workload: %+v", as)
	}
	if got := entries[string](t, x.s, RoutesKey); len(got) != 1 || got[0] != "new.localhost" {
		t.Errorf("routes: %v", got)
	}
	x.ends(x.tx(KindContractCancel, Actor{ID: x.acct}, &ContractCancel{h.ContractID()}, x.owner))
	if as := x.assigned(h); len(as) != 0 {
		t.Errorf("cancelled, but assigned: %+v", as)
	}
	c, err := get[Contract](x.s, ContractKey(h.ContractID()))
	if err != nil || c.State != Cancelled || len(c.Revisions) != 2 {
		t.Errorf("the record of a cancelled contract is gone: %+v %v", c, err)
	}
	x.refused("cancelled twice", x.tx(KindContractCancel, Actor{ID: x.acct}, &ContractCancel{h.ContractID()}, x.owner), "is cancelled")
	x.must(x.deploy(x.header("app", func(h *contract.Header) { h.SealedSize++ }))) // the name is free again
}

func TestLostNode(t *testing.T) {
	x := newGrid(t, "lab")
	stateless, stateful := x.header("web"), x.header("db", withVolume)
	x.must(x.deploy(stateless))
	x.must(x.deploy(stateful))
	x.block([]int{0, 1, 2})
	x.created(stateful)
	a, b := x.assigned(stateless)[0], x.assigned(stateful)[0]
	// Every node is lost in turn, so that both workloads lose theirs.
	for lost := range 3 {
		id := x.nodes[lost].Public()
		had := x.assigned(stateless)[0]
		var others []int
		for i := range 3 {
			if i != lost {
				others = append(others, i)
			}
		}
		x.block(others)
		now, vol := x.assigned(stateless)[0], x.assigned(stateful)[0]
		if had.Node == id.Node() {
			if now.Node == had.Node || now.Epoch != had.Epoch+1 {
				t.Errorf("lost its node, but: %+v", now)
			}
		} else if now != had {
			t.Errorf("another node was lost, but: %+v → %+v", had, now)
		}
		if b.Node == id.Node() {
			if vol.Node != b.Node || vol.Epoch != b.Epoch || !strings.HasPrefix(vol.Reason, "volume on node-") {
				t.Errorf("nothing of the volume is elsewhere, but: %+v", vol)
			}
		}
		x.block([]int{0, 1, 2})
		if vol := x.assigned(stateful)[0]; vol.Node != b.Node || vol.Reason != "" || vol.Epoch != b.Epoch {
			t.Errorf("its node is back, but: %+v", vol)
		}
		if back := x.assigned(stateless)[0]; back != now {
			t.Errorf("it moved back without a cause: %+v → %+v", now, back)
		}
	}
	_ = a
}

func TestSilenceOfTheLedgerIsNotTheNodes(t *testing.T) {
	x := newGrid(t, "lab")
	h := x.header("web")
	x.must(x.deploy(h))
	had := x.assigned(h)
	x.block(nil, time.Minute) // nothing was heard while there was no ledger to hear it
	if got := x.assigned(h); got[0] != had[0] {
		t.Fatalf("moved after a halt of the ledger: %+v", got[0])
	}
	x.block(nil, 3*time.Second)
	if got := x.assigned(h); got[0] != had[0] {
		t.Fatalf("moved within the extended lease: %+v", got[0])
	}
	x.block([]int{1, 2}, 4*time.Second) // the control: after one more lease silence counts
	if got := x.assigned(h); got[0].Node == had[0].Node {
		t.Fatal("a node that stays silent keeps its work")
	}
}

func TestOneThirdIsNotEnough(t *testing.T) {
	x := newGrid(t, "lab")
	all := Bitmap{}.With(0).With(1).With(2)
	apply := func(heard ...Heard) {
		x.h++
		x.at = x.at.Add(time.Second)
		x.s, _ = x.s.Apply(Block{Height: x.h, Time: x.at, Heard: heard})
	}
	up := func() bool {
		k := x.nodes[0].Public()
		n, err := get[Node](x.s, NodeKey(k.Node()))
		if err != nil {
			t.Fatal(err)
		}
		return n.Up
	}
	deaf := Bitmap{}.With(1).With(2)
	apply(Heard{1, deaf}, Heard{1, deaf}, Heard{1, all})
	if !up() {
		t.Error("two of three took a node down: more than 2/3 is needed")
	}
	apply(Heard{1, deaf}, Heard{1, nil}, Heard{1, nil}, Heard{1, nil})
	if !up() {
		t.Error("the silent ones were counted as not having heard it")
	}
	apply(Heard{1, deaf}, Heard{1, deaf}, Heard{1, deaf}, Heard{1, all})
	if up() {
		t.Error("three of four did not take it down")
	}
}

func TestEnvelopes(t *testing.T) {
	x := newGrid(t, "lab")
	h := x.header("app", func(h *contract.Header) { h.Services[0].Placement.Farms = []string{"farm-1", "farm-2"} })
	rev := h.RevisionID()
	var ids []identity.NodeID
	for _, k := range x.nodes {
		p := k.Public()
		ids = append(ids, p.Node())
	}
	env := func(kind string, to [32]byte) contract.Envelope {
		return contract.Envelope{Revision: rev, Kind: kind, Recipient: to, Sealed: []byte("sealed")}
	}
	x.must(x.tx(KindContractSubmit, Actor{ID: x.acct}, &ContractSubmit{h.Encode(), []contract.Envelope{env("account", x.acct), env("node", ids[0])}}, x.owner))
	put := func(k int, es ...contract.Envelope) *Tx {
		return x.tx(KindEnvelopePut, Actor{Node: true, ID: ids[k]}, &EnvelopePut{es}, x.nodes[k])
	}
	x.refused("by a node that holds none", put(1, env("node", ids[1])), "holds no envelope")
	x.refused("for a node that the placement excludes", put(0, env("node", ids[2])), "does not allow")
	x.refused("replacing the owner's", put(0, env("account", x.acct)), "nothing else")
	x.refused("replacing its own", put(0, env("node", ids[0])), "nothing else")
	x.refused("for another account", x.tx(KindEnvelopePut, Actor{ID: x.acct}, &EnvelopePut{[]contract.Envelope{env("account", [32]byte{9})}}, x.owner), "another account")
	x.must(put(0, env("node", ids[1])))
	if _, ok := x.s.tree.get(EnvelopeKey(rev, "node", ids[1])); !ok {
		t.Error("the handed on envelope is not there")
	}
}

func TestStateSurvivesALoad(t *testing.T) {
	x := newGrid(t, "lab")
	disk := map[string][]byte{}
	var last *State
	save := func() {
		for k, v := range x.s.Changes(last) {
			if v == nil {
				delete(disk, k)
			} else {
				disk[k] = v
			}
		}
		last = x.s
	}
	save()
	h := x.header("app", withVolume)
	x.must(x.deploy(h))
	save()
	x.ends(x.tx(KindContractCancel, Actor{ID: x.acct}, &ContractCancel{h.ContractID()}, x.owner))
	x.block([]int{1, 2})
	save()
	got, err := Load(maps.All(disk))
	if err != nil {
		t.Fatal(err)
	}
	if got.Root() != x.s.Root() || got.clock != x.s.clock {
		t.Fatalf("loaded state differs: %+v %+v", got.clock, x.s.clock)
	}
}

func TestHeartbeats(t *testing.T) {
	x := newGrid(t, "lab")
	now := time.Unix(5000, 0)
	sess := sessionKey(x, 0)
	pub := x.nodes[0].Public()
	beat := func(seq uint64, f ...func(*Heartbeat)) []byte {
		h := &Heartbeat{Grid: x.g.GridID(), Node: pub.Node(), Sequence: uint64(now.UnixNano()) + seq}
		for _, g := range f {
			g(h)
		}
		h.Sign(sess)
		return h.Encode()
	}
	e := NewEars(x.g, now.Add(-time.Hour))
	if err := e.Hear(x.s, beat(5), now); err != nil {
		t.Fatalf("control: %v", err)
	}
	for name, raw := range map[string][]byte{
		"replayed":        beat(5),
		"older":           beat(4),
		"of another grid": beat(6, func(h *Heartbeat) { h.Grid[0]++ }),
		"of another node": beat(6, func(h *Heartbeat) { p := x.nodes[1].Public(); h.Node = p.Node() }),
		"garbage":         []byte("garbage"),
		"altered":         append(beat(6)[:len(beat(6))-1], 0),
	} {
		if err := e.Hear(x.s, raw, now); err == nil {
			t.Errorf("a heartbeat %s was heard", name)
		}
	}
	bits := func(at time.Time) Bitmap {
		m, err := DecodeExtension(e.Extension(x.s, at))
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	if m := bits(now.Add(5 * time.Second)); !m.Has(0) || m.Has(1) {
		t.Errorf("within lease and margin: %b", m)
	}
	if m := bits(now.Add(7 * time.Second)); m.Has(0) || m == nil {
		t.Errorf("after lease and margin: %b", m)
	}
	// A validator that has just started takes nobody for down.
	if m, _ := DecodeExtension(NewEars(x.g, now).Extension(x.s, now.Add(time.Second))); !m.Has(0) || !m.Has(1) {
		t.Errorf("just started, but says %b", m)
	}
}

func FuzzTx(f *testing.F) {
	k := identity.NewKey([32]byte{1})
	f.Add(NewTxSigned(identity.GridID{1}, KindContractCancel, Actor{ID: [32]byte{1}}, 1, &ContractCancel{}, k).Encode())
	x := newGrid(&testing.T{}, "lab")
	f.Add(x.deploy(x.header("app")).Encode())
	f.Fuzz(func(t *testing.T, raw []byte) {
		next, res := x.s.Apply(Block{Height: 100, Time: x.at, Txs: [][]byte{raw}})
		if res[0].Code == CodeOK {
			return
		}
		kept := x.s.tree
		if tx, err := DecodeTx(raw); err == nil && res[0].Code == CodeRefused {
			if n, ok := next.tree.get(NonceKey(tx.Actor)); ok {
				kept = kept.put(NonceKey(tx.Actor), n)
			}
		}
		if next.tree.root() != kept.root() {
			t.Fatal("a refused transaction changed more than a nonce")
		}
	})
}

func BenchmarkApply(b *testing.B) {
	x := newGrid(&testing.T{}, "lab")
	raw := x.deploy(x.header("app")).Encode()
	b.ReportAllocs()
	for b.Loop() {
		x.s.Apply(Block{Height: 100, Time: x.at, Txs: [][]byte{raw}})
	}
}

// sessionKey gives node i a session key by its own transaction.
func sessionKey(x *grid, i int) ed25519.PrivateKey {
	k := ed25519.NewKeyFromSeed(make([]byte, 32))
	p := x.nodes[i].Public()
	x.must(x.tx(KindNodeUpdate, Actor{Node: true, ID: p.Node()}, &NodeUpdate{Session: [32]byte(k.Public().(ed25519.PublicKey)), Endpoints: []string{"2001:db8::1"}}, x.nodes[i]))
	return k
}
