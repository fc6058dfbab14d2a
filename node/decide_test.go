package node

import (
	"net/netip"
	"reflect"
	"slices"
	"testing"
	"time"

	"holdfast/contract"
	"holdfast/identity"
	"holdfast/ledger"
	"holdfast/overlay"
	"holdfast/sandbox"
	"holdfast/store/location"
)

func TestDecide(t *testing.T) {
	now := time.Unix(1000, 0)
	work := func(f ...func(*Workload)) *Workload {
		w := &Workload{Instance: "new", Process: &contract.Process{}}
		for _, g := range f {
			g(w)
		}
		return w
	}
	ended := func(code int, ran, ago time.Duration) sandbox.Status {
		return sandbox.Status{ID: "new", State: sandbox.Exited, ExitCode: code, StartedAt: now.Add(-ago - ran), FinishedAt: now.Add(-ago)}
	}
	running := sandbox.Status{ID: "new", State: sandbox.Running}
	old := sandbox.Status{ID: "old", State: sandbox.Running}
	is := func(s ...sandbox.Status) map[string]sandbox.Status {
		m := map[string]sandbox.Status{}
		for _, x := range s {
			m[x.ID] = x
		}
		return m
	}
	policy := func(p string) func(*Workload) { return func(w *Workload) { w.Process.Restart = p } }
	fenced := func(w *Workload) { w.Fenced = true }
	kept := func(w *Workload) { w.Keep = "the contract cannot be opened" }
	because := func(why string) sandbox.Status {
		s := ended(0, time.Minute, time.Hour)
		s.Reason = why
		return s
	}
	barred := func(w *Workload) { w.Barred = &bar{barSigner, ""} }
	of := func(epoch uint64) sandbox.Status {
		return sandbox.Status{ID: "old", State: sandbox.Running, Labels: labels(&Workload{Epoch: epoch})}
	}
	held := func(w *Workload) { w.Held = "volume on node-2" }
	for _, tc := range []struct {
		name  string
		want  *Workload
		o     observed
		stop  []string
		start bool
		state string
	}{
		{"what is assigned starts", work(), observed{leaseOK: true}, nil, true, ledger.StateStarting},
		{"what runs is left alone", work(), observed{leaseOK: true, instances: is(running)}, nil, false, ledger.StateRunning},
		{"what is no longer assigned stops", nil, observed{instances: is(running, old)}, []string{"new", "old"}, false, ""},
		{"a new revision takes the old one's place", work(), observed{leaseOK: true, instances: is(old)}, []string{"old"}, true, ledger.StateStarting},
		{"what the ledger holds does not run", work(held), observed{leaseOK: true, instances: is(running)}, []string{"new"}, false, ledger.StateWaiting},
		{"without a lease what has a volume stops", work(fenced), observed{instances: is(running)}, []string{"new"}, false, ledger.StateWaiting},
		{"without a lease what has a volume does not start", work(fenced), observed{}, nil, false, ledger.StateWaiting},
		{"without a lease what has none goes on", work(), observed{instances: is(running)}, nil, false, ledger.StateRunning},
		{"a dependency delays the start", work(), observed{leaseOK: true, dependency: "db: service_healthy"}, nil, false, ledger.StateWaiting},
		{"a dependency does not stop what runs", work(), observed{leaseOK: true, dependency: "db", instances: is(running)}, nil, false, ledger.StateRunning},
		{"what ends is started again", work(), observed{leaseOK: true, now: now, instances: is(ended(1, time.Minute, 0))}, []string{"new"}, true, ledger.StateFailed},
		{"what dies young waits", work(), observed{leaseOK: true, now: now, restarts: 5, instances: is(ended(1, time.Second, 0))}, nil, false, ledger.StateFailed},
		{"and is started when it has waited", work(), observed{leaseOK: true, now: now, restarts: 5, instances: is(ended(1, time.Second, time.Minute))}, []string{"new"}, true, ledger.StateFailed},
		{"restart no stays ended", work(policy("no")), observed{leaseOK: true, now: now, instances: is(ended(0, time.Second, time.Hour))}, nil, false, ledger.StateExited},
		{"on-failure stays ended after success", work(policy("on-failure")), observed{leaseOK: true, now: now, instances: is(ended(0, time.Second, time.Hour))}, nil, false, ledger.StateExited},
		{"on-failure starts again after failure", work(policy("on-failure")), observed{leaseOK: true, now: now, instances: is(ended(2, time.Second, time.Hour))}, []string{"new"}, true, ledger.StateFailed},
		{"what is unhealthy is started again", work(), observed{leaseOK: true, unhealthy: true, instances: is(running)}, []string{"new"}, true, ledger.StateFailed},
		{"a volume whose server died is opened anew", work(), observed{leaseOK: true, volumeLost: true, instances: is(running)}, []string{"new"}, true, ledger.StateFailed},
		{"and without a lease it is not", work(fenced), observed{volumeLost: true, instances: is(running)}, []string{"new"}, false, ledger.StateWaiting},
		{"what cannot be opened goes on", work(kept), observed{leaseOK: true, volumeLost: true, instances: is(running, old)}, []string{"old"}, false, ledger.StateRunning},
		{"what cannot be opened is not started", work(kept), observed{leaseOK: true}, nil, false, ledger.StateWaiting},
		{"what cannot be opened is not started again", work(kept), observed{leaseOK: true, now: now, instances: is(ended(1, time.Minute, time.Hour))}, nil, false, ledger.StateWaiting},
		{"what cannot be opened ends with its lease", work(kept, fenced), observed{instances: is(running)}, []string{"new"}, false, ledger.StateWaiting},
		{"a watchdog's end is not the process's", work(policy("no")), observed{leaseOK: true, now: now, instances: is(because(sandbox.ReasonLease))}, []string{"new"}, true, ledger.StateFailed},
		{"what is out of bounds is not started", work(barred), observed{leaseOK: true}, nil, false, ledger.StateWaiting},
		{"what is out of bounds now goes on", work(barred), observed{leaseOK: true, instances: is(running)}, nil, false, ledger.StateRunning},
		{"and is not started again", work(barred), observed{leaseOK: true, now: now, instances: is(ended(1, time.Minute, time.Hour))}, nil, false, ledger.StateWaiting},
		{"nor after its health check failed, which is no end then", work(barred), observed{leaseOK: true, unhealthy: true, instances: is(running)}, nil, false, ledger.StateRunning},
		{"without its volume it ends", work(barred), observed{leaseOK: true, volumeLost: true, instances: is(running)}, []string{"new"}, false, ledger.StateWaiting},
		{"out of bounds it takes no revision's place", work(barred), observed{leaseOK: true, instances: is(of(0))}, nil, false, ledger.StateWaiting},
		{"whatever it depends on", work(barred), observed{leaseOK: true, dependency: "db", instances: is(of(0))}, nil, false, ledger.StateWaiting},
		{"but what is of an old epoch ends", work(barred, func(w *Workload) { w.Epoch = 1 }), observed{leaseOK: true, instances: is(of(0))}, []string{"old"}, false, ledger.StateWaiting},
		{"and what has no lease", work(barred, fenced), observed{instances: is(running)}, []string{"new"}, false, ledger.StateWaiting},
		{"and what the ledger holds", work(barred, held), observed{leaseOK: true, instances: is(running)}, []string{"new"}, false, ledger.StateWaiting},
		{"a job that is done is done", work(barred, policy("no")), observed{leaseOK: true, now: now, instances: is(ended(0, time.Second, time.Hour))}, nil, false, ledger.StateExited},
		{"nor is its shim's death", work(policy("on-failure")), observed{leaseOK: true, now: now, instances: is(because(sandbox.ReasonShim))}, []string{"new"}, true, ledger.StateFailed},
	} {
		s := decide(tc.want, tc.o)
		if !slices.Equal(s.stop, tc.stop) || s.start != tc.start || s.state != tc.state {
			t.Errorf("%s: stop %v, start %v, state %q (%s)", tc.name, s.stop, s.start, s.state, s.reason)
		}
	}
}

func TestInstanceNamesEverythingThatNeedsARestart(t *testing.T) {
	base := func() *Workload {
		return &Workload{Epoch: 1, Address: netip.MustParseAddr("fd00::1"), Process: &contract.Process{Environment: []string{"A=1"}, DependsOn: []contract.Dependency{{Service: "db"}}}, Limits: contract.Service{Memory: 1, Replicas: 1}}
	}
	name := instance(base())
	for what, f := range map[string]func(*Workload){
		"environment": func(w *Workload) { w.Process.Environment = []string{"A=2"} },
		"image":       func(w *Workload) { w.Process.Image.Manifest = "sha256:1" },
		"a file":      func(w *Workload) { w.Process.Files = []contract.File{{Target: "/x"}} },
		"memory":      func(w *Workload) { w.Limits.Memory = 2 },
		"epoch":       func(w *Workload) { w.Epoch = 2 },
		"address":     func(w *Workload) { w.Address = netip.MustParseAddr("fd00::2") },
	} {
		w := base()
		f(w)
		if instance(w) == name {
			t.Errorf("%s changes and the sandbox would go on as it was", what)
		}
	}
	for what, f := range map[string]func(*Workload){
		"replicas":     func(w *Workload) { w.Limits.Replicas = 5 },
		"placement":    func(w *Workload) { w.Limits.Placement.Spread = "farm" },
		"dependencies": func(w *Workload) { w.Process.DependsOn = nil },
		"egress":       func(w *Workload) { w.Process.Egress, w.Limits.Egress = []contract.Egress{{Proto: "tcp"}}, true },
		"revision":     func(w *Workload) { w.Revision = 9 },
	} {
		w := base()
		f(w)
		if instance(w) != name {
			t.Errorf("%s changes and the workload would restart for nothing", what)
		}
	}
}

// The ledger refuses networks whose prefix is taken; it computes it by itself, so that it need not know the overlay.
func TestLedgerAndOverlayAgreeOnPrefixes(t *testing.T) {
	id := contract.NetworkOf(contract.ID{1}, "default")
	if got, want := ledger.NetworkPrefix(id), overlay.Prefix(id).Addr().As16(); string(got[:]) != string(want[1:6]) {
		t.Errorf("ledger %x, overlay %x", got, want[1:6])
	}
}

func TestPreSharedKeysAreOfThePair(t *testing.T) {
	a, b, c := [32]byte{1}, [32]byte{2}, [32]byte{3}
	k := preShared([32]byte{9}, a, b)
	if k != preShared([32]byte{9}, b, a) {
		t.Error("the two ends have different keys")
	}
	if k == preShared([32]byte{9}, a, c) || k == preShared([32]byte{8}, a, b) {
		t.Error("another pair or another network has the same key")
	}
}

func TestKeysDeriveFromOneSeed(t *testing.T) {
	file := t.TempDir() + "/node.key"
	a, err := LoadKeys(file)
	if err != nil {
		t.Fatal(err)
	}
	b, err := LoadKeys(file)
	if err != nil || a.ID != b.ID || a.WireGuard != b.WireGuard {
		t.Fatalf("loaded again it is another node: %v", err)
	}
	adm, err := a.Admission(identity.GridID{1}, identity.FarmID{2}, "node-1", nil, Offer{CPUMilli: 1, Memory: 1})
	if err != nil {
		t.Fatal(err)
	}
	pub := a.Sign.Public()
	if err := pub.Verify(ledger.NodeAdmitPurpose, adm.ProofBytes(identity.GridID{1}), &adm.Proof); err != nil {
		t.Errorf("control: %v", err)
	}
	if err := pub.Verify(ledger.NodeAdmitPurpose, adm.ProofBytes(identity.GridID{2}), &adm.Proof); err == nil {
		t.Error("the proof holds for another grid")
	}
}

func TestMeshNamesOnlyWhatRuns(t *testing.T) {
	id := contract.ID{1}
	self, other := &ledger.Node{ID: identity.NodeID{1}, WireGuard: [32]byte{1}, Endpoints: []string{"2001:db8::1"}}, &ledger.Node{ID: identity.NodeID{2}, WireGuard: [32]byte{2}, Endpoints: []string{"2001:db8::2"}}
	net := contract.NetworkOf(id, "default")
	h := &contract.Header{Networks: []string{"default"}, Services: []contract.Service{{Name: "db", Networks: []string{"default"}}, {Name: "web", Networks: []string{"default"}}}}
	as := func(service string, r uint16, n identity.NodeID, reason string) ledger.Assignment {
		return ledger.Assignment{Workload: contract.WorkloadOf(id, service, int(r)), Service: service, Replica: r, Node: n, Reason: reason}
	}
	c := &ContractView{
		Record: &ledger.Contract{ID: id, Name: "app"}, Header: h, Networks: map[string]*ledger.Network{"default": {ID: net, Index: 5}},
		Assignments: []ledger.Assignment{as("web", 0, self.ID, ""), as("db", 0, other.ID, ""), as("db", 1, other.ID, "volume on node-2"), as("db", 2, identity.NodeID{}, "no node")},
	}
	body := &contract.Body{Services: []contract.Process{{Name: "db", Aliases: []string{"database"}}, {Name: "web"}}}
	ms := contractMeshes(&View{Self: self, Nodes: []*ledger.Node{self, other}}, c, &contract.Keys{Networks: map[string][32]byte{"default": {7}}}, body)
	if len(ms) != 1 || ms[0].Port != basePort+5 || len(ms[0].Peers) != 1 {
		t.Fatalf("%+v", ms)
	}
	p := ms[0].Peers[0]
	if p.PublicKey != other.WireGuard || p.Endpoint.String() != "[2001:db8::2]:30005" || p.PresharedKey != preShared([32]byte{7}, self.WireGuard, other.WireGuard) || len(p.Addrs) != 3 {
		t.Errorf("%+v", p)
	}
	want := []netip.Addr{overlay.Addr(net, contract.WorkloadOf(id, "db", 0))}
	for _, n := range []string{"db", "database", "db.app.internal", "database.app.internal"} {
		if !reflect.DeepEqual(ms[0].Names[n], want) {
			t.Errorf("%s resolves to %v", n, ms[0].Names[n])
		}
	}
	if got := contractMeshes(&View{Self: &ledger.Node{ID: identity.NodeID{3}}, Nodes: []*ledger.Node{self, other}}, c, &contract.Keys{}, body); len(got) != 0 {
		t.Errorf("a node without a workload joins: %+v", got)
	}
}

// Reports are public, and what runsc says quotes the command and the image.
func TestAnEndIsToldInFixedWords(t *testing.T) {
	began := time.Unix(1, 0)
	for _, tc := range []struct {
		s    sandbox.Status
		want string
	}{
		{sandbox.Status{StartedAt: began, ExitCode: 3}, "exit code 3"},
		{sandbox.Status{StartedAt: began, ExitCode: 137, Reason: sandbox.ReasonLease}, "its lease ended"},
		{sandbox.Status{StartedAt: began, ExitCode: -1, Reason: sandbox.ReasonShim}, "its shim was killed"},
		{sandbox.Status{StartedAt: began, OOM: true, Reason: "out of memory"}, "out of memory"},
		{sandbox.Status{StartedAt: began, ExitCode: 128, Reason: "runsc: /app/secret-name: no such file"}, "exit code 128"},
		{sandbox.Status{ExitCode: 128, Reason: "runsc: /app/secret-name: no such file"}, notStarted},
	} {
		tc.s.ID, tc.s.State = "i", sandbox.Exited
		s := decide(&Workload{Instance: "i", Process: &contract.Process{Restart: "no"}}, observed{leaseOK: true, instances: map[string]sandbox.Status{"i": tc.s}})
		if s.reason != tc.want {
			t.Errorf("%+v: %q, want %q", tc.s, s.reason, tc.want)
		}
	}
}

func TestWhatHasNoRightToRunHasNoGrace(t *testing.T) {
	at := func(epoch uint64) *sandbox.Status {
		return &sandbox.Status{Labels: labels(&Workload{ID: contract.WorkloadID{1}, Epoch: epoch})}
	}
	for _, tc := range []struct {
		name  string
		w     *Workload
		s     *sandbox.Status
		lease bool
		want  bool
	}{
		{"a new revision", &Workload{Epoch: 2}, at(2), true, false},
		{"the ledger holds it", &Workload{Epoch: 2, Held: "x", Fenced: true}, at(2), true, false},
		{"cancelled or moved away", nil, at(2), true, true},
		{"came back in another epoch", &Workload{Epoch: 3}, at(2), true, true},
		{"no lease, and a volume", &Workload{Epoch: 2, Fenced: true}, at(2), false, true},
		{"no lease, and none", &Workload{Epoch: 2}, at(2), false, false},
		{"of nobody knows which epoch", &Workload{Epoch: 2}, &sandbox.Status{}, true, true},
	} {
		if got := urgent(tc.w, tc.s, tc.lease); got != tc.want {
			t.Errorf("%s: at once %v", tc.name, got)
		}
	}
}

// Each health check costs work outside the workload's limits.
func TestHealthChecksHaveAPace(t *testing.T) {
	for _, tc := range []struct{ interval, timeout, wantInterval, wantTimeout time.Duration }{
		{1, 1, time.Second, time.Second},
		{0, 0, contract.DefaultInterval, contract.DefaultInterval},
		{-1, -1, contract.DefaultInterval, contract.DefaultInterval},
		{5 * time.Second, 2 * time.Second, 5 * time.Second, 2 * time.Second},
	} {
		if i, to := pace(&contract.Healthcheck{Interval: tc.interval, Timeout: tc.timeout}); i != tc.wantInterval || to != tc.wantTimeout {
			t.Errorf("%v and %v became %v and %v", tc.interval, tc.timeout, i, to)
		}
	}
}

// A farmer's node signs reports of workloads that are not its own.
func TestOnlyTheAssignedNodeSpeaksOfAWorkload(t *testing.T) {
	id := contract.ID{1}
	c := &ContractView{Assignments: []ledger.Assignment{
		{Workload: contract.WorkloadOf(id, "db", 0), Service: "db", Node: identity.NodeID{1}, Epoch: 7},
		{Workload: contract.WorkloadOf(id, "web", 0), Service: "web", Node: identity.NodeID{2}, Epoch: 7},
	}}
	good := ledger.Report{Workload: contract.WorkloadOf(id, "db", 0), Contract: id, Service: "db", Epoch: 7, State: ledger.StateRunning, Healthy: true}
	if !assignedTo(c, identity.NodeID{1}, &good) {
		t.Fatal("control: the assigned node does not count")
	}
	for what, f := range map[string]func(r *ledger.Report) identity.NodeID{
		"another node":     func(*ledger.Report) identity.NodeID { return identity.NodeID{2} },
		"an epoch before":  func(r *ledger.Report) identity.NodeID { r.Epoch = 6; return identity.NodeID{1} },
		"an epoch to come": func(r *ledger.Report) identity.NodeID { r.Epoch = 8; return identity.NodeID{1} },
		"its own workload by a wrong name": func(r *ledger.Report) identity.NodeID {
			r.Workload = contract.WorkloadOf(id, "web", 0)
			return identity.NodeID{2}
		},
		"a replica that is not there": func(r *ledger.Report) identity.NodeID { r.Replica = 1; return identity.NodeID{1} },
		"no workload":                 func(r *ledger.Report) identity.NodeID { r.Workload = contract.WorkloadID{}; return identity.NodeID{} },
	} {
		r := good
		if from := f(&r); assignedTo(c, from, &r) {
			t.Errorf("%s is believed", what)
		}
	}
}

func TestWhenTheGridsStoreOpens(t *testing.T) {
	for _, c := range []struct {
		farms        int
		opens, fresh bool
	}{{0, false, false}, {4, false, false}, {5, true, false}, {6, true, true}, {9, true, true}} {
		if opens, fresh := wanting(c.farms, false) == "", wanting(c.farms, true) == ""; opens != c.opens || fresh != c.fresh {
			t.Errorf("%d farms: opens %v, begins %v", c.farms, opens, fresh)
		}
	}
	if n := len(farms([]Place{{Farm: "a"}, {Farm: "b"}, {Farm: "a"}})); n != 2 {
		t.Errorf("three locations on two farms are %d farms", n)
	}
}

func TestANodePromisesNoMoreThanItOffers(t *testing.T) {
	id := func(b byte) contract.ID { return contract.ID{b} }
	stores := []*ledger.Store{{FrontEnd: [32]byte{1}, Recovery: [32]byte{2}, Limit: 60}, {Contract: id(1), FrontEnd: [32]byte{3}, Recovery: [32]byte{4}, Limit: 60}, {Contract: id(2), FrontEnd: [32]byte{5}, Recovery: [32]byte{6}, Limit: 60}}
	got, without := hostedStores(identity.GridID{7}, &ledger.Node{Storage: 100}, stores)
	if len(got) != 2 || got[0].Quota.Bytes != 60 || got[1].Quota.Bytes != 40 || !slices.Equal(without, []contract.ID{id(2)}) {
		t.Errorf("%+v, without %v", got, without)
	}
	if got[0].Name != "grid" || got[1].Name == got[0].Name {
		t.Errorf("%q and %q", got[0].Name, got[1].Name)
	}
	for _, k := range got[0].Keys {
		if k.Pin == [32]byte{1} && k.Rights&location.Recover != 0 || k.Pin == [32]byte{2} && k.Rights != location.Recover {
			t.Errorf("the rights of %v: %v", k.Pin, k.Rights)
		}
	}
}

// The key of a volume's store is good on the node that the ledger has the volume on, and follows it; no other key is bound.
func TestAVolumesStoreIsGoodFromItsNode(t *testing.T) {
	grid := identity.GridID{7}
	s := &ledger.Store{Contract: contract.ID{1}, Volume: contract.VolumeID{2}, Node: identity.NodeID{3}, FrontEnd: [32]byte{3}, Recovery: [32]byte{4}, Limit: 10}
	of := func() location.Store {
		got, _ := hostedStores(grid, &ledger.Node{Storage: 100}, []*ledger.Store{{Contract: contract.ID{1}, FrontEnd: [32]byte{5}, Recovery: [32]byte{6}, Limit: 10}, s})
		if len(got) != 2 || got[0].Name == got[1].Name || got[0].Keys[0].From.IsValid() {
			t.Fatalf("%+v", got)
		}
		return got[1]
	}
	here := of()
	if k := here.Keys[0]; k.From != overlay.Addr(SystemNetwork(grid), s.Node) || k.Rights&location.Write == 0 || here.Keys[1].From.IsValid() {
		t.Errorf("%+v", here)
	}
	s.Node = identity.NodeID{4}
	if there := of(); there.Keys[0].From == here.Keys[0].From || there.Name != here.Name {
		t.Errorf("it moved: %+v", there)
	}
}

// What a validator's key in the genesis makes of it: a member that nodes know, at an address that no node has.
func TestTheSystemNetworkHasValidators(t *testing.T) {
	nodes := []*ledger.Node{{ID: identity.NodeID{1}, WireGuard: [32]byte{1}, Endpoints: []string{"2001:db8::1"}}, {ID: identity.NodeID{2}, WireGuard: [32]byte{2}}}
	validators := []ledger.Validator{{Name: "a"}, {Name: "b", WireGuard: [32]byte{9}, Endpoints: []string{"2001:db8::9"}}}
	fromNode, fromValidator := systemPeers(identity.GridID{7}, nodes, validators, [32]byte{1}), systemPeers(identity.GridID{7}, nodes, validators, [32]byte{9})
	if len(fromNode) != 2 || len(fromValidator) != 2 || fromNode[1].PublicKey != [32]byte{9} || fromNode[1].Endpoint.Port() != basePort {
		t.Errorf("a node has %+v, the validator %+v", fromNode, fromValidator)
	}
	seen := map[netip.Prefix]bool{}
	for _, p := range append(fromNode[:2:2], fromValidator[0]) {
		if seen[p.Addrs[0].Prefix] {
			t.Errorf("%v is taken twice", p.Addrs[0].Prefix)
		}
		seen[p.Addrs[0].Prefix] = true
	}
}
