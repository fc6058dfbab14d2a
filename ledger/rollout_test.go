package ledger

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"holdfast/contract"
	"holdfast/identity"
	"holdfast/schedule"
)

func nodeOf(k *identity.PrivateKey) identity.NodeID {
	pub := k.Public()
	return pub.Node()
}

// where is the index of the node that a workload is on.
func (x *grid) where(a Assignment) int {
	return slices.IndexFunc(x.nodes, func(k *identity.PrivateKey) bool { return nodeOf(k) == a.Node })
}

// says is a report by the node that the workload is on, or by another key.
func (x *grid) says(h *contract.Header, a Assignment, reason string, by ...*identity.PrivateKey) *Tx {
	x.t.Helper()
	key := x.nodes[x.where(a)]
	if len(by) > 0 {
		key = by[0]
	}
	return x.tx(KindWorkloadReport, Actor{true, nodeOf(key)}, &WorkloadReport{
		Contract: h.ContractID(), Workload: a.Workload, Epoch: a.Epoch, Revision: h.RevisionID(), Ready: reason == "", Reason: reason,
	}, key)
}

// ready has every workload of the revision reported as ready, as the ledger replaces them, and says how many there were at a
// time.
func (x *grid) ready(h *contract.Header) (steps []int) {
	x.t.Helper()
	for range 100 {
		var open []Assignment
		for _, a := range x.assigned(h) {
			if !a.Old && !a.Ready && !a.Node.IsZero() {
				open = append(open, a)
			}
		}
		if len(open) == 0 {
			return steps
		}
		steps = append(steps, len(open))
		x.must(x.says(h, open[0], ""))
		if !x.contract(h).Trial.On() {
			return steps
		}
	}
	x.t.Fatal("it never ends")
	return nil
}

func replicas(n int, f ...func(*contract.Service)) func(*contract.Header) {
	return func(h *contract.Header) {
		h.Services = slices.Clone(h.Services)
		h.Services[0].Replicas = uint16(n)
		for _, g := range f {
			g(&h.Services[0])
		}
	}
}

func (x *grid) old(h *contract.Header) (n int) {
	for _, a := range x.assigned(h) {
		if a.Old {
			n++
		}
	}
	return n
}

func (x *grid) used() Quota {
	x.t.Helper()
	q, err := get[Quota](x.s, AccountUsedKey(x.acct))
	if err != nil {
		x.t.Fatal(err)
	}
	return *q
}

// sound checks that what is left on nodes is what their workloads leave.
func (x *grid) sound() {
	x.t.Helper()
	var want, have NodeUsed
	for _, id := range entries[contract.ID](x.t, x.s, ContractsKey) {
		c, err := get[Contract](x.s, ContractKey(id))
		if err != nil {
			x.t.Fatal(err)
		}
		as, err := orZero(get[Assignments](x.s, AssignmentsKey(id)))
		if err != nil {
			x.t.Fatal(err)
		}
		h, err := x.s.header(c.Current)
		if err != nil {
			x.t.Fatal(err)
		}
		var from *contract.Header
		if !as.From.IsZero() {
			if from, err = x.s.header(as.From); err != nil {
				x.t.Fatal(err)
			}
		}
		for i := range as.Current {
			if cpu, memory, ok := takes(&as.Current[i], h, from); ok && !as.Current[i].Node.IsZero() {
				want.Workloads++
				want.CPUMilli += cpu
				want.Memory += memory
			}
		}
	}
	for _, id := range entries[identity.NodeID](x.t, x.s, NodesKey) {
		u, err := orZero(get[NodeUsed](x.s, NodeUsedKey(id)))
		if err != nil {
			x.t.Fatal(err)
		}
		have.Workloads += u.Workloads
		have.CPUMilli += u.CPUMilli - u.Workloads*int64(schedule.OverheadCPUMilli)
		have.Memory += u.Memory - u.Workloads*int64(schedule.OverheadMemory)
	}
	if want != have {
		x.t.Errorf("the nodes' room: %+v is taken, workloads take %+v", have, want)
	}
}

// A revision takes the place of a good one a quarter of its replicas at a time, and is good when all are ready.
func TestARevisionIsRolledOut(t *testing.T) {
	x := newGrid(t, "lab")
	h := x.header("web", replicas(6))
	x.must(x.deploy(h))
	if c := x.contract(h); !c.Trial.On() || !c.Good.IsZero() {
		t.Fatalf("%+v", c)
	}
	x.ready(h)
	if c := x.contract(h); c.Trial.On() || c.Good != h.RevisionID() {
		t.Fatalf("%+v", c)
	}
	n := x.next(h)
	x.must(x.deploy(n))
	if got := x.old(h); got != 4 {
		t.Fatalf("%d of 6 stay at first, 4 should", got)
	}
	x.sound()
	if steps := x.ready(n); !slices.Equal(steps, []int{2, 2, 2, 2, 2, 1}) {
		t.Errorf("in steps of %v", steps)
	}
	c := x.contract(h)
	if c.Trial.On() || c.Good != n.RevisionID() || x.old(h) != 0 || c.Revision != 2 {
		t.Fatalf("%+v", c)
	}
	for _, a := range x.assigned(h) {
		if a.Epoch != 1 {
			t.Errorf("%+v moved", a)
		}
	}
	x.sound()
	// Scaling leaves the body as it is: nothing of it is on trial.
	m := x.next(n, replicas(8))
	m.SealedBody = n.SealedBody
	x.must(x.deploy(m))
	if c := x.contract(h); c.Trial.On() || c.Good != m.RevisionID() {
		t.Errorf("%+v", c)
	}
	x.pass(time.Hour)
	if c := x.contract(h); c.Current != m.RevisionID() {
		t.Errorf("time undid what is good: %+v", c)
	}
}

// What fails goes back by itself, with its routes, networks and quota, and moves nothing; the next revision follows on it.
func TestAFailingRevisionIsUndone(t *testing.T) {
	x := newGrid(t, "lab")
	h := x.header("web", replicas(4))
	x.must(x.deploy(h))
	x.ready(h)
	before := x.used()
	bad := x.next(h, replicas(4, func(s *contract.Service) { s.Memory *= 2; s.Networks = []string{"other"} }), func(h *contract.Header) {
		h.Networks = []string{"other"}
		h.Routes = []contract.Route{{Host: "new.localhost", Service: h.Services[0].Name, Port: 80}}
	})
	x.must(x.deploy(bad))
	if x.old(h) != 3 {
		t.Fatalf("%d stay", x.old(h))
	}
	// What the one before takes is kept until then: nobody else can have it.
	if _, err := get[Route](x.s, RouteKey("web.localhost")); err != nil {
		t.Errorf("the old route: %v", err)
	}
	if _, err := get[Network](x.s, NetworkKey(contract.NetworkOf(h.ContractID(), h.Networks[0]))); err != nil {
		t.Errorf("the old network: %v", err)
	}
	x.sound()
	first := x.assigned(h)[slices.IndexFunc(x.assigned(h), func(a Assignment) bool { return !a.Old })]
	x.must(x.says(bad, first, "exit code 1"))
	c := x.contract(h)
	if c.Current != h.RevisionID() || c.Revision != 1 || c.Newest() != 2 || c.Trial.On() || x.old(h) != 0 {
		t.Fatalf("%+v", c)
	}
	if f := c.Failures; len(f) != 1 || f[0].Number != 2 || f[0].Reason != "exit code 1" || f[0].Undone != bad.RevisionID() || f[0].Node != first.Node {
		t.Errorf("%+v", f)
	}
	if _, err := get[Route](x.s, RouteKey("new.localhost")); err == nil {
		t.Error("its route stayed")
	}
	if _, err := get[Network](x.s, NetworkKey(contract.NetworkOf(h.ContractID(), "other"))); err == nil {
		t.Error("its network stayed")
	}
	if got := x.used(); got != before {
		t.Errorf("used %+v, before %+v", got, before)
	}
	for _, a := range x.assigned(h) {
		if a.Epoch != 1 || a.Node.IsZero() {
			t.Errorf("%+v moved", a)
		}
	}
	x.sound()
	// Its number is used up, and what follows follows on what is good.
	n := x.next(h)
	x.refused("the number of what was undone", x.deploy(n), "the newest 2")
	n.Revision = 3
	x.must(x.deploy(n))
	x.ready(n)
	if c := x.contract(h); c.Revision != 3 || c.Good != n.RevisionID() || c.Latest != 0 || c.Newest() != 3 {
		t.Errorf("%+v", c)
	}
}

// A revision that is not ready in time is undone too; one that stands still has its time when it goes on.
func TestTimeUndoesARevision(t *testing.T) {
	x := newGrid(t, "lab")
	h := x.header("web", replicas(1, func(s *contract.Service) { s.Update.Deadline = 60 }))
	x.must(x.deploy(h))
	x.ready(h)
	n := x.next(h)
	x.must(x.deploy(n))
	x.pass(50 * time.Second)
	if c := x.contract(h); c.Current != n.RevisionID() {
		t.Fatalf("it had a minute: %+v", c)
	}
	x.must(x.state(h, Paused))
	x.pass(10 * time.Minute)
	x.must(x.state(h, Active))
	x.block(x.all())
	if c := x.contract(h); c.Current != n.RevisionID() || !c.Trial.On() {
		t.Fatalf("undone while it stood still: %+v", c)
	}
	x.pass(2 * time.Minute)
	c := x.contract(h)
	if c.Current != h.RevisionID() || len(c.Failures) != 1 || c.Failures[0].Reason != "not ready within 1m0s" {
		t.Fatalf("%+v", c)
	}
}

// The first revision, and one after another that was never good, have nothing to go back to.
func TestNothingToGoBackTo(t *testing.T) {
	x := newGrid(t, "lab")
	h := x.header("web")
	x.must(x.deploy(h))
	x.must(x.says(h, x.assigned(h)[0], "exit code 1"))
	x.pass(time.Hour)
	if c := x.contract(h); c.Current != h.RevisionID() || !c.Trial.On() {
		t.Fatalf("%+v", c)
	}
	n := x.next(h)
	x.must(x.deploy(n))
	if x.old(h) != 0 {
		t.Error("it keeps what never worked")
	}
	x.ready(n)
	// A revision on top of one on trial goes back to the last good one, not to that.
	a, b := x.next(n), new(contract.Header)
	x.must(x.deploy(a))
	*b = *x.next(a)
	x.must(x.deploy(b))
	x.must(x.says(b, x.assigned(h)[0], "health check failed"))
	if c := x.contract(h); c.Current != n.RevisionID() || c.Revision != 2 || c.Newest() != 4 {
		t.Errorf("%+v", c)
	}
}

// What a header says of failures is done: stand still, or go on.
func TestFailureActions(t *testing.T) {
	x := newGrid(t, "lab")
	set := func(action string) func(*contract.Header) {
		return replicas(3, func(s *contract.Service) { s.Update = contract.Update{Parallel: 1, Action: action} })
	}
	h := x.header("web", set(contract.OnFailurePause))
	x.must(x.deploy(h))
	x.ready(h)
	n := x.next(h)
	x.must(x.deploy(n))
	x.must(x.says(n, x.assigned(h)[0], "exit code 1"))
	x.pass(time.Hour)
	if c := x.contract(h); c.Current != n.RevisionID() || c.Trial.Stuck == nil || x.old(h) != 2 || len(c.Failures) != 0 {
		t.Fatalf("%+v, %d old", c, x.old(h))
	}
	m := x.next(n, set(contract.OnFailureContinue))
	x.must(x.deploy(m))
	x.must(x.says(m, x.assigned(h)[0], "exit code 1"))
	x.must(x.says(m, x.assigned(h)[1], ""))
	x.must(x.says(m, x.assigned(h)[2], ""))
	if c := x.contract(h); c.Current != m.RevisionID() || c.Trial.On() || c.Good != h.RevisionID() {
		t.Errorf("%+v", c)
	}
	x.sound()
}

// What runs is not given up for a revision that there is no room for.
func TestARevisionWithoutRoom(t *testing.T) {
	x := newGrid(t, "lab")
	h := x.header("web", replicas(3, func(s *contract.Service) { s.Memory = 5 << 30; s.Placement.Spread = "node" }))
	x.must(x.deploy(h))
	x.ready(h)
	n := x.next(h, replicas(3, func(s *contract.Service) { s.Memory = 20 << 30; s.Placement.Spread = "node" }))
	x.must(x.deploy(n))
	for _, a := range x.assigned(h) {
		if !a.Old || a.Node.IsZero() || a.Epoch != 1 {
			t.Fatalf("%+v", a)
		}
	}
	x.sound()
	x.pass(11 * time.Minute)
	c := x.contract(h)
	if c.Current != h.RevisionID() || len(c.Failures) != 1 || c.Failures[0].Reason != "not ready within 10m0s: there is no room for it" {
		t.Fatalf("%+v", c)
	}
	x.sound()
}

// A node that is lost meanwhile has its work go on elsewhere, in the revision that it ran, and a word on the old epoch counts
// no more.
func TestANodeIsLostInARollout(t *testing.T) {
	x := newGrid(t, "lab")
	h := x.header("web", replicas(3, func(s *contract.Service) { s.Placement.Spread = "" }))
	x.must(x.deploy(h))
	x.ready(h)
	n := x.next(h)
	x.must(x.deploy(n))
	was := x.assigned(h)
	lost := x.where(was[2])
	for range 8 {
		x.block(x.all(lost))
	}
	now := x.assigned(h)
	if now[2].Node == was[2].Node || now[2].Epoch != 2 || !now[2].Old {
		t.Fatalf("%+v, it was %+v", now[2], was[2])
	}
	x.sound()
	x.must(x.says(n, now[0], ""))
	x.must(x.says(n, now[1], ""))
	now = x.assigned(h)
	if now[2].Old {
		t.Fatal("it was not replaced")
	}
	x.refused("from where it was", x.says(n, was[2], ""), "to report on")
	// What was ready is not, where it comes to.
	lost = x.where(now[0])
	for range 8 {
		x.block(x.all(lost))
	}
	if now = x.assigned(h); now[0].Epoch != 2 || now[0].Ready {
		t.Fatalf("%+v", now[0])
	}
	x.ready(n)
	if c := x.contract(h); c.Good != n.RevisionID() {
		t.Errorf("%+v", c)
	}
}

// Only the node that has the workload now has a word on it, once, about the revision that is on trial.
func TestReportsAreJudged(t *testing.T) {
	x := newGrid(t, "lab")
	h := x.header("web", replicas(4, func(s *contract.Service) { s.Update.Parallel = 1 }))
	x.must(x.deploy(h))
	x.ready(h)
	n := x.next(h)
	x.must(x.deploy(n))
	as := x.assigned(h)
	other := x.nodes[slices.IndexFunc(x.nodes, func(k *identity.PrivateKey) bool { return nodeOf(k) != as[0].Node })]
	x.refused("another node's", x.says(n, as[0], "exit code 1", other), "to report on")
	x.refused("an account's", x.tx(KindWorkloadReport, Actor{ID: x.acct}, &WorkloadReport{Contract: h.ContractID(), Workload: as[0].Workload, Epoch: 1, Revision: n.RevisionID(), Ready: true}, x.owner), "only a node")
	x.refused("about what still runs the one before", x.says(n, as[3], "exit code 1"), "to report on")
	x.refused("about the revision before", x.says(h, as[0], "exit code 1"), "not on trial")
	later := as[0]
	later.Epoch++
	x.refused("of another epoch", x.says(n, later, "exit code 1"), "to report on")
	for _, bad := range []string{"two\nlines", "\x1b[31mred", string(make([]byte, MaxReason+1)), "ü"} {
		x.refused(fmt.Sprintf("%q", bad), x.says(n, as[0], bad), "letters")
	}
	x.must(x.says(n, as[0], ""))
	x.refused("twice", x.says(n, as[0], "exit code 1"), "was reported")
	x.ready(n)
	x.refused("when all is said", x.says(n, as[0], "exit code 1"), "not on trial")
}

// A store that a revision brought goes with it; one that was there grows when the revision is good.
func TestARevisionsStore(t *testing.T) {
	x := newGrid(t, "lab")
	h := x.header("web")
	x.must(x.deploy(h))
	x.ready(h)
	n := x.next(h, withStore(1, 2, aStore))
	x.must(x.deploy(n))
	if _, err := get[Store](x.s, StoreKey(h.ContractID())); err != nil {
		t.Fatal(err)
	}
	fail := func(h *contract.Header) {
		t.Helper()
		as := x.assigned(h)
		x.must(x.says(h, as[slices.IndexFunc(as, func(a Assignment) bool { return !a.Old })], "exit code 1"))
	}
	fail(n)
	if _, err := get[Store](x.s, StoreKey(h.ContractID())); err == nil || x.used().Storage != 0 {
		t.Fatalf("it stayed, %+v", x.used())
	}
	n = x.next(h, withStore(1, 2, aStore))
	n.Revision = 3
	x.must(x.deploy(n))
	x.ready(n)
	m := x.next(n)
	m.Store.Limit *= 2
	x.must(x.deploy(m))
	limit := func() uint64 {
		t.Helper()
		s, err := get[Store](x.s, StoreKey(h.ContractID()))
		if err != nil {
			t.Fatal(err)
		}
		return s.Limit
	}
	if limit() != aStore || x.used().Storage != 2*aStore {
		t.Errorf("%d bytes, billed %+v", limit(), x.used())
	}
	fail(m)
	if limit() != aStore || x.used().Storage != aStore {
		t.Errorf("%d bytes, billed %+v", limit(), x.used())
	}
	m.Revision = 5
	x.must(x.deploy(m))
	x.ready(m)
	if limit() != 2*aStore || x.used().Storage != 2*aStore {
		t.Errorf("%d bytes, billed %+v", limit(), x.used())
	}
}

// Going back needs nobody's signature, and no room that another could have taken meanwhile.
func TestUndoNeedsNobody(t *testing.T) {
	x := newGrid(t, "lab")
	boss := x.person(1)
	h := x.header("web", approvals(approval("code", 1, ones(boss), identity.ActRevise)))
	x.must(x.deploy(h))
	x.ready(h)
	n := x.next(h)
	tx := x.deploy(n)
	x.must(tx)
	if x.contract(h).Current != h.RevisionID() {
		t.Fatal("it came without consent")
	}
	x.must(x.consent(boss, ProposalID(tx.ID())))
	if x.contract(h).Current != n.RevisionID() {
		t.Fatal("it did not come")
	}
	squat := x.header("other", func(h *contract.Header) { h.Routes[0].Host = "web.localhost" })
	x.refused("the host of what it may go back to", x.deploy(squat), "belongs to another")
	x.must(x.says(n, x.assigned(h)[0], "exit code 1"))
	if x.contract(h).Current != h.RevisionID() {
		t.Fatal("it did not go back")
	}
}
