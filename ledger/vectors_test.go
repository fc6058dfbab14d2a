package ledger

import (
	"bufio"
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"holdfast/contract"
	"holdfast/identity"
	"holdfast/internal/canonical"
)

// vectors collects named bytes in their order.
type vectors struct {
	bytes.Buffer
}

func (v *vectors) add(name string, b []byte) { fmt.Fprintf(v, "%s %x\n", name, b) }

// sum adds a digest, for what is long.
func (v *vectors) sum(name string, b []byte) {
	d := sha256.Sum256(b)
	fmt.Fprintf(v, "%s sha256 %x\n", name, d)
}

// life is a grid in which every kind of transaction happens once, with what it signed and all that it left.
func life(t *testing.T) (*vectors, *State) {
	v := &vectors{}
	at := time.Unix(1_800_000_000, 0)
	key := func(b byte) *identity.PrivateKey { return identity.NewKey([32]byte{'v', b}) }
	open, err := identity.NewOpeningKey([32]byte{'v', 9})
	if err != nil {
		t.Fatal(err)
	}
	admin, user, machine := key(1), key(2), key(3)
	g := &Genesis{
		Version: 1, Name: "vectors", Time: at.Unix(), Devices: []identity.Device{{Name: "admin", Key: admin.Public()}}, Policy: identity.SingleDevice(),
		Sealing: open.Public(), Lease: 5 * time.Second, Margin: time.Second,
		Validators: []Validator{{Name: "v", Key: []byte("a validator's key"), Power: 10, TLS: [32]byte{4}, Address: "[2001:db8::1]:7447"}},
	}
	v.add("genesis", g.Encode())
	id := g.GridID()
	v.add("genesis.grid", id[:])
	fmt.Fprintf(v, "genesis.grid.text %v\n", id)
	account := g.GridAccount()
	v.add("genesis.account", account[:])
	limited := *g
	limited.Limits = Limits{Account: Quota{1, 2, 3, 4, 5}, Shared: Quota{5, 6, 7, 8, 9}}
	v.sum("genesis.limits", limited.Encode())
	stored := *g
	stored.Validators = []Validator{g.Validators[0]}
	stored.Validators[0].WireGuard, stored.Validators[0].Endpoints = [32]byte{6}, []string{"2001:db8::1"}
	stored.Store = Store{FrontEnd: [32]byte{7}, Recovery: [32]byte{8}, Limit: 1 << 40}
	v.sum("genesis.store", stored.Encode())
	begun, err := New(&stored)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{StoreKey(contract.ID{}), StoresKey} {
		b, _ := begun.tree.get(name)
		v.add("store."+hex.EncodeToString([]byte(name)), b)
	}
	where := &NodeAdmit{Name: "location-1", Endpoints: []string{"2001:db8::5"}, Storage: 1 << 40, Location: [32]byte{9}}
	v.sum("node.admit.location", where.ProofBytes(id))
	v.sum("node.location", canonical.Encode(&Node{Name: "location-1", Storage: 1 << 40, Location: [32]byte{9}}))

	s, err := New(g)
	if err != nil {
		t.Fatal(err)
	}
	height := int64(0)
	show := func(a Actor, nonce uint64, kind Kind, payload any, k *identity.PrivateKey) *Tx {
		tx := NewTx(id, kind, a, nonce, payload)
		if tx.Until = at.Add(time.Minute).Unix(); kind == KindAccountCreate {
			tx.Nonce, tx.Until = 0, 0
		}
		v.add("tx."+string(kind)+".signed", tx.signBytes())
		txID := tx.ID()
		v.add("tx."+string(kind)+".id", txID[:])
		tx.Sign(k)
		v.sum("tx."+string(kind), tx.Encode())
		return tx
	}
	apply := func(kind Kind, a Actor, payload any, k *identity.PrivateKey) [32]byte {
		t.Helper()
		nonce, err := orZero(get[uint64](s, NonceKey(a)))
		if err != nil {
			t.Fatal(err)
		}
		tx := show(a, *nonce+1, kind, payload, k)
		height++
		at = at.Add(time.Second)
		next, res := s.Apply(Block{Height: height, Time: at, Txs: [][]byte{tx.Encode()}, Heard: []Heard{{Power: 10, Nodes: Bitmap{1}}}})
		if res[0].Code != CodeOK {
			t.Fatalf("%s: %s", kind, res[0].Log)
		}
		s = next
		return tx.ID()
	}
	boss := Actor{ID: account}
	owner := Actor{ID: apply(KindAccountCreate, Actor{}, &AccountCreate{Devices: []identity.Device{{Name: "laptop", Key: user.Public()}}, Policy: identity.SingleDevice(), Sealing: open.Public()}, user)}
	apply(KindAccountQuota, boss, &AccountQuota{owner.ID, Quota{1024, 8192, 2048, 2048, 0}}, admin)
	farm := identity.FarmID(apply(KindFarmAdmit, boss, &FarmAdmit{Name: "farm-1", Owner: account}, admin))
	session := ed25519.NewKeyFromSeed(slices.Repeat([]byte{7}, 32))
	admit := &NodeAdmit{
		Farm: farm, Name: "node-1", Key: machine.Public(), Sealing: open.Public(), WireGuard: [32]byte{1}, TLS: [32]byte{2}, Session: [32]byte{3},
		Endpoints: []string{"2001:db8::5"}, CPUMilli: 4000, Memory: 8 << 30,
	}
	admit.Proof = machine.Sign(NodeAdmitPurpose, admit.ProofBytes(id))
	apply(KindNodeAdmit, boss, admit, admin)
	nodeKey := machine.Public()
	node := nodeKey.Node()
	apply(KindNodeUpdate, Actor{true, node}, &NodeUpdate{[32]byte(session.Public().(ed25519.PublicKey)), []string{"2001:db8::6"}}, machine)
	apply(KindGatewayAdmit, boss, &GatewayAdmit{Name: "gateway", TLS: [32]byte{5}, Address: "[2001:db8::2]:443"}, admin)
	h := &contract.Header{
		Version: 1, Grid: id, Account: owner.ID, Name: "app", Revision: 1, SealedSize: 100, Networks: []string{"default"}, Volumes: []contract.Volume{{Name: "data", Size: 1 << 30}},
		Services: []contract.Service{{Name: "db", Replicas: 1, CPUMilli: 500, Memory: 64 << 20, Pids: 100, Networks: []string{"default"}, Volumes: []string{"data"}}},
		Routes:   []contract.Route{{Host: "app.localhost", Service: "db", Port: 80}},
	}
	env := func(kind string, to [32]byte) contract.Envelope {
		return contract.Envelope{Revision: h.RevisionID(), Kind: kind, Recipient: to, Sealed: []byte("sealed for " + kind)}
	}
	apply(KindContractSubmit, owner, &ContractSubmit{h.Encode(), []contract.Envelope{env("account", owner.ID)}}, user)
	apply(KindEnvelopePut, owner, &EnvelopePut{[]contract.Envelope{env("node", node)}}, user)
	apply(KindVolumeCreated, Actor{true, node}, &VolumeCreated{contract.VolumeOf(h.ContractID(), "data")}, machine)
	show(Actor{true, node}, 9, KindVolumeSaved, &VolumeSaved{contract.VolumeOf(h.ContractID(), "data"), 3, [32]byte{4}}, machine) // it would need a store
	show(owner, 9, KindVolumeRestore, &VolumeRestore{contract.VolumeOf(h.ContractID(), "data"), [32]byte{4}}, user)
	v.add("store.volume", canonical.Encode(&Store{Contract: contract.ID{1}, FrontEnd: [32]byte{7}, Recovery: [32]byte{8}, Limit: 1 << 29, Volume: contract.VolumeID{2}, Node: node}))
	v.add("volume.saved", canonical.Encode(&Volume{ID: contract.VolumeID{2}, Contract: contract.ID{1}, Name: "data", Size: 1 << 30, Node: node, Created: true, Sequence: 3, Snapshot: [32]byte{4}}))
	apply(KindWorkloadReport, Actor{true, node}, &WorkloadReport{
		Contract: h.ContractID(), Workload: contract.WorkloadOf(h.ContractID(), h.Services[0].Name, 0), Epoch: 1, Revision: h.RevisionID(), Ready: true,
	}, machine)
	live := s
	tried := *must(get[Contract](live, ContractKey(h.ContractID())))
	tried.Trial = Trial{From: contract.RevisionID{1}, Until: 2, Stuck: &Failure{3, "web", 4, node, "exit code 1", 5, contract.RevisionID{6}}}
	tried.Latest, tried.Failures = 7, []Failure{*tried.Trial.Stuck}
	v.add("contract.trial", canonical.Encode(&tried))
	v.add("assignment.trial", canonical.Encode(&Assignments{From: contract.RevisionID{1}, Current: []Assignment{{Old: true, Ready: true, Failed: true}}}))
	apply(KindContractCancel, owner, &ContractCancel{h.ContractID()}, user)
	apply(KindContractState, owner, &ContractState{h.ContractID(), Active}, user)
	apply(KindContractCancel, owner, &ContractCancel{h.ContractID()}, user)
	apply(KindTemplate, owner, &TemplatePublish{"blog", "1.0", [32]byte{9}, 100}, user)
	raw, _ := s.tree.get(TemplateKey(owner.ID, "blog", "1.0"))
	v.add("record.template", raw)
	say := []identity.Approval{{Name: "audit", Need: 2, Parties: []identity.Party{{Account: account, Weight: 2}, {Account: owner.ID, Weight: 1}}, Acts: []identity.Act{identity.ActCreate}}}
	if err := identity.ValidateApprovals(say); err != nil {
		t.Fatal(err)
	}
	apply(KindAccountPolicy, owner, &AccountPolicy{identity.Policy{Rules: identity.SingleDevice().Rules, Approvals: say}}, user)
	h2 := *h
	h2.Name, h2.Routes, h2.Approvals = "other", nil, say
	proposed := ProposalID(apply(KindContractSubmit, owner, &ContractSubmit{h2.Encode(), nil}, user))
	for _, key := range []string{ProposalKey(proposed), ProposalsKey(owner.ID), openKey, duesKey} {
		raw, _ := s.tree.get(key)
		v.add("record."+hex.EncodeToString([]byte(key)), raw)
	}
	apply(KindConsent, boss, &Consent{proposed}, admin)
	dropped := ProposalID(apply(KindAccountPolicy, owner, &AccountPolicy{identity.SingleDevice()}, user))
	apply(KindWithdraw, owner, &Withdraw{dropped}, user)
	v.add("root.cancelled", func() []byte { r := s.Root(); return r[:] }())
	apply(KindImageSign, owner, &ImageSign{Digest: [32]byte{9}}, user)
	raw, _ = s.tree.get(ImageSignatureKey(owner.ID, [32]byte{9}))
	v.add("record.image-signature", raw)
	v.add("image.revoke", canonical.Encode(&ImageSign{[32]byte{9}, true}))
	bounded := identity.Policy{Rules: identity.SingleDevice().Rules, Bounds: identity.Bounds{
		Farms: []string{"farm-1"}, Spread: true, NoEgress: true, Routes: []string{"example.com"}, Registries: []string{"docker.io/library"}, Signers: []identity.AccountID{owner.ID},
	}}
	v.add("policy.bounds", canonical.Encode(&bounded))

	beat := &Heartbeat{Grid: id, Node: node, Sequence: 1_800_000_000_000_000_001, Workloads: []Report{{
		Workload: contract.WorkloadOf(h.ContractID(), "db", 0), Contract: h.ContractID(), Service: "db", Epoch: 1, Revision: 1, State: StateFailed, Reason: "out of memory",
		Restarts: 2, Healthy: true, ExitCode: -9,
	}}}
	beat.Sign(session)
	v.add("heartbeat", beat.Encode())
	ears := NewEars(g, at)
	if err := ears.Hear(live, beat.Encode(), time.Unix(1_800_000_000, 0)); err != nil {
		t.Fatal(err)
	}
	v.add("extension", ears.Extension(live, time.Unix(1_800_000_001, 0)))

	// Records in the order of their names.
	records := maps.Collect(live.tree.all())
	for _, k := range slices.Sorted(maps.Keys(records)) {
		name := "record." + hex.EncodeToString([]byte(k))
		if len(records[k]) > 512 {
			v.sum(name, records[k])
		} else {
			v.add(name, records[k])
		}
	}
	root := live.Root()
	v.add("root", root[:])
	_, p := live.Get(ContractsKey)
	v.add("proof.present", p)
	for _, absent := range []string{"no such record", RouteKey("nobody.localhost")} {
		_, p := live.Get(absent)
		v.add("proof.absent."+hex.EncodeToString([]byte(absent)), p)
	}
	return v, live
}

// What is signed, hashed and kept is for ever: these bytes do not change. Whoever changes a format on purpose puts the new
// ones, which the test writes, into testdata/vectors.txt.
func TestVectorsAreFrozen(t *testing.T) {
	got, _ := life(t)
	want, err := os.ReadFile("testdata/vectors.txt")
	if err != nil {
		t.Error(err)
	}
	if bytes.Equal(got.Bytes(), want) {
		return
	}
	frozen := map[string]bool{}
	for l := range strings.Lines(string(want)) {
		frozen[l] = true
	}
	for l := range strings.Lines(got.String()) {
		if !frozen[l] {
			t.Errorf("not frozen: %.200s", strings.TrimSpace(l))
		}
	}
	out := t.ArtifactDir() + "/vectors.txt"
	if err := os.WriteFile(out, got.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Errorf("vectors differ (with -artifacts they are kept in %s)", out)
}

// The frozen proofs hold for the frozen root, and for no other.
func TestFrozenProofsHold(t *testing.T) {
	f, err := os.Open("testdata/vectors.txt")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	v := map[string][]byte{}
	r := bufio.NewScanner(f)
	r.Buffer(nil, 1<<20)
	for r.Scan() {
		if p := strings.Fields(r.Text()); len(p) == 2 {
			v[p[0]], _ = hex.DecodeString(p[1])
		}
	}
	root := [32]byte(v["root"])
	key := func(s string) string { return hex.EncodeToString([]byte(s)) }
	proofs := map[string][]byte{ContractsKey: v["record."+key(ContractsKey)], "no such record": nil, RouteKey("nobody.localhost"): nil}
	for name, value := range proofs {
		proof := v["proof.absent."+key(name)]
		if value != nil {
			proof = v["proof.present"]
		}
		if err := VerifyProof(root, name, value, proof); err != nil {
			t.Errorf("%q: %v", name, err)
		}
		if VerifyProof([32]byte(v["root.cancelled"]), name, value, proof) == nil {
			t.Errorf("%q is proved for another root", name)
		}
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
