package ledger

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"holdfast/contract"
	"holdfast/identity"
	"holdfast/schedule"
)

// A revision is on trial until the nodes that run it have said of every workload that it is ready. It takes the place of
// one that was good before step by step: so many replicas of a service at a time as its header allows. When one fails, or
// not all are ready in time, the contract goes back to what was good, by itself; for that nobody's signature is needed, since
// that was signed and agreed to. Until then the contract keeps what both take.

// Trial is a revision that is not known to be good yet; the zero Trial is none.
type Trial struct {
	From  contract.RevisionID `cbor:"1,keyasint,omitzero" json:"from,omitzero"`    // the last good one; zero: there is none to go back to, and all is replaced at once
	Until int64               `cbor:"2,keyasint" json:"until"`                     // Unix milliseconds: when it must be ready
	Stuck *Failure            `cbor:"3,keyasint,omitempty" json:"stuck,omitempty"` // what failed, where the header says that the trial then stands still
}

// Failure is what a node said of a workload, or that time was over.
type Failure struct {
	Number  uint32              `cbor:"1,keyasint" json:"number"` // of the revision
	Service string              `cbor:"2,keyasint" json:"service"`
	Replica uint16              `cbor:"3,keyasint,omitempty" json:"replica"`
	Node    identity.NodeID     `cbor:"4,keyasint,omitzero" json:"node,omitzero"`
	Reason  string              `cbor:"5,keyasint" json:"reason"`
	Time    int64               `cbor:"6,keyasint" json:"time"` // Unix seconds
	Undone  contract.RevisionID `cbor:"7,keyasint" json:"undone"`
}

// Where says in words what failed.
func (f *Failure) Where() string { return fmt.Sprintf("%s-%d: %s", f.Service, f.Replica, f.Reason) }

// maxFailures bounds how many failures a contract's record lists, and MaxReason the words of each, in bytes.
const (
	maxFailures = 8
	MaxReason   = 200
)

// On says whether a revision is on trial.
func (t Trial) On() bool { return t.Until != 0 }

// Newest is the number of the newest revision, which may be one that was undone.
func (c *Contract) Newest() uint32 { return max(c.Latest, c.Revision) }

// First is the number of the oldest revision that the record lists.
func (c *Contract) First() uint32 { return c.Newest() + 1 - uint32(len(c.Revisions)) }

// Number is that of a revision, or 0 of one that the record does not list.
func (c *Contract) Number(rev contract.RevisionID) uint32 {
	if i := slices.Index(c.Revisions, rev); i >= 0 {
		return c.First() + uint32(i)
	}
	return 0
}

// Undone is why a revision was undone, or nil.
func (c *Contract) Undone(rev contract.RevisionID) *Failure {
	if i := slices.IndexFunc(c.Failures, func(f Failure) bool { return f.Undone == rev }); i >= 0 {
		return &c.Failures[i]
	}
	return nil
}

// WorkloadReport is a node's word that a workload of a revision on trial is ready, or has failed.
type WorkloadReport struct {
	Contract contract.ID         `cbor:"1,keyasint"`
	Workload contract.WorkloadID `cbor:"2,keyasint"`
	Epoch    uint64              `cbor:"3,keyasint"`
	Revision contract.RevisionID `cbor:"4,keyasint"`
	Ready    bool                `cbor:"5,keyasint,omitempty"`
	Reason   string              `cbor:"6,keyasint,omitempty"` // fixed words; none when it is ready
}

// begin puts a contract's new revision on trial, while c is still as it was. The first one can go back to nothing, and one
// that leaves the sealed body as it is is as good as the one before.
func (b *batch) begin(c *Contract, h *contract.Header, act identity.Act) error {
	from := c.Trial.From
	switch {
	case c.Trial.On(): // one that was never good is followed by the next
	case h.Revision == 1:
	case c.Good == c.Current && act != identity.ActRevise:
		c.Good = h.RevisionID() // the body is the same
		return nil
	case c.Good == c.Current:
		from = c.Good
	}
	c.Trial = Trial{From: from, Until: b.clock.Time + h.Deadline().Milliseconds()}
	if from.IsZero() {
		return nil // time brings nothing
	}
	return b.remind(c.Trial.Until, dueTrial, c.ID)
}

// held is what a contract takes: its revision, and, while that is on trial, what it would go back to. Of networks and routes that
// is both, of what is counted the more.
func (b *batch) held(c *Contract) (*contract.Header, Quota, error) {
	h, err := b.header(c.Current)
	if err != nil {
		return nil, Quota{}, err
	}
	if c.Trial.From.IsZero() {
		return h, usage(h), nil
	}
	from, err := b.header(c.Trial.From)
	if err != nil {
		return nil, Quota{}, err
	}
	return together(from, h), usage(h).max(usage(from)), nil
}

// together is h with what from has beside it: networks and routes.
func together(from, h *contract.Header) *contract.Header {
	x := *h
	x.Networks, x.Routes = slices.Clone(h.Networks), slices.Clone(h.Routes)
	for _, n := range from.Networks {
		if !slices.Contains(x.Networks, n) {
			x.Networks = append(x.Networks, n)
		}
	}
	for _, r := range from.Routes {
		if !slices.ContainsFunc(x.Routes, func(o contract.Route) bool { return o.Host == r.Host }) {
			x.Routes = append(x.Routes, r)
		}
	}
	return &x
}

// workloadReport takes a node's word on a workload of a revision on trial.
func (b *batch) workloadReport(who *signers, p *WorkloadReport) error {
	if who.node == nil {
		return errors.New("only a node can do this")
	}
	c, err := get[Contract](&b.State, ContractKey(p.Contract))
	if err != nil {
		return fmt.Errorf("%v: %w", p.Contract, err)
	}
	as, err := get[Assignments](&b.State, AssignmentsKey(p.Contract))
	if err != nil {
		return fmt.Errorf("assignments of %v: %w", p.Contract, err)
	}
	i := slices.IndexFunc(as.Current, func(a Assignment) bool { return a.Workload == p.Workload })
	switch {
	case !c.Trial.On() || !c.Runs() || p.Revision != c.Current || as.Revision != c.Current:
		return fmt.Errorf("%v is not on trial", p.Revision)
	case i < 0 || as.Current[i].Node != who.node.ID || as.Current[i].Epoch != p.Epoch || as.Current[i].Old:
		return fmt.Errorf("%v is not %s's to report on, in epoch %d", p.Workload, who.node.Name, p.Epoch)
	case as.Current[i].Ready || as.Current[i].Failed:
		return errors.New("it was reported")
	case p.Ready == (p.Reason != "") || len(p.Reason) > MaxReason || strings.ContainsFunc(p.Reason, func(r rune) bool { return r < ' ' || r > '~' }):
		return fmt.Errorf("a report is that it is ready, or why it is not, in up to %d letters", MaxReason)
	}
	a := &as.Current[i]
	a.Ready, a.Failed = p.Ready, !p.Ready
	set(b, AssignmentsKey(c.ID), as)
	if p.Ready {
		return b.goOn(c)
	}
	return b.failed(c, a, p.Reason)
}

// failed does what the header says of a workload that failed.
func (b *batch) failed(c *Contract, a *Assignment, reason string) error {
	h, err := b.header(c.Current)
	if err != nil {
		return err
	}
	f := &Failure{Number: c.Revision, Service: a.Service, Replica: a.Replica, Node: a.Node, Reason: reason, Time: b.clock.Time / 1000, Undone: c.Current}
	action := ""
	if s, ok := h.Service(a.Service); ok {
		action = s.Update.Action
	}
	switch {
	case c.Trial.From.IsZero(): // there is nothing to go back to
		return nil
	case action == contract.OnFailureContinue:
		return b.goOn(c)
	case action == contract.OnFailurePause:
		c.Trial.Stuck = f
		set(b, ContractKey(c.ID), c)
		return nil
	}
	return b.undo(c, f)
}

// undo goes back to the revision that was good.
func (b *batch) undo(c *Contract, f *Failure) error {
	held, had, err := b.held(c)
	if err != nil {
		return err
	}
	c.Latest, c.Current = c.Newest(), c.Trial.From
	c.Failures = append(c.Failures, *f)
	c.Failures = c.Failures[max(0, len(c.Failures)-maxFailures):]
	return b.endTrial(c, held, had)
}

// endTrial ends a trial with the revision that is now the current one: what it does not take, and was held beside it, is free again.
func (b *batch) endTrial(c *Contract, held *contract.Header, had Quota) error {
	h, err := b.header(c.Current)
	if err != nil {
		return err
	}
	c.Revision, c.Trial = h.Revision, Trial{}
	for _, err := range []error{
		b.bill(c.Account, had, usage(h)), b.networks(c.ID, held, h), b.routes(c.ID, held.Routes, h.Routes), b.settleStore(c.ID, h),
	} {
		if err != nil {
			return err
		}
	}
	set(b, ContractKey(c.ID), c)
	return b.settle(c.ID)
}

// goOn follows a report: the next workloads are replaced, or the trial ends.
func (b *batch) goOn(c *Contract) error {
	if done, err := b.concluded(c); done || err != nil {
		return err
	}
	return b.settle(c.ID)
}

// concluded ends a trial of which nothing is open: every workload was replaced and reported on.
func (b *batch) concluded(c *Contract) (bool, error) {
	as, err := orZero(get[Assignments](&b.State, AssignmentsKey(c.ID)))
	if err != nil {
		return false, fmt.Errorf("assignments of %v: %w", c.ID, err)
	}
	good := true
	for _, a := range as.Current {
		if a.Old || !a.Ready && !a.Failed {
			return false, nil
		}
		good = good && a.Ready
	}
	if !c.Runs() || !good && c.Trial.From.IsZero() { // who has nothing to go back to may still become good
		return true, nil
	}
	held, had, err := b.held(c)
	if err != nil {
		return false, err
	}
	if good {
		c.Good = c.Current
	}
	return true, b.endTrial(c, held, had)
}

// trialDue looks at a trial whose time is over.
func (b *batch) trialDue(id contract.ID) error {
	c, err := get[Contract](&b.State, ContractKey(id))
	if err != nil {
		return err
	}
	if !c.Trial.On() || b.clock.Time < c.Trial.Until || c.Trial.From.IsZero() || c.Trial.Stuck != nil {
		return nil
	}
	h, err := b.header(c.Current)
	if err != nil {
		return err
	}
	if !c.Runs() { // it stands still, and its time with it
		c.Trial.Until = b.clock.Time + h.Deadline().Milliseconds()
		set(b, ContractKey(id), c)
		return b.remind(c.Trial.Until, dueTrial, id)
	}
	as, err := get[Assignments](&b.State, AssignmentsKey(id))
	if err != nil {
		return err
	}
	i := slices.IndexFunc(as.Current, func(a Assignment) bool { return !a.Old && !a.Ready && !a.Failed })
	if i < 0 { // they are ready, and the next ones have no room
		i = slices.IndexFunc(as.Current, func(a Assignment) bool { return a.Old })
	}
	if i < 0 {
		return nil
	}
	a := &as.Current[i]
	reason := fmt.Sprintf("not ready within %v", h.Deadline())
	if a.Reason != "" {
		reason += ": " + a.Reason
	} else if a.Old {
		reason += ": there is no room for it"
	}
	a.Failed = true
	set(b, AssignmentsKey(id), as)
	if err := b.failed(c, a, reason); err != nil || !c.Trial.On() || c.Trial.Stuck != nil {
		return err
	}
	// It goes on all the same, and the others have as long.
	c.Trial.Until = b.clock.Time + h.Deadline().Milliseconds()
	set(b, ContractKey(id), c)
	return b.remind(c.Trial.Until, dueTrial, id)
}

// trial is what place needs to know of one.
type trial struct {
	from  *contract.Header // nil: nothing is kept
	stuck bool
}

// had is the service that the revision before ran a workload of; there is none where nothing is kept.
func had(from *contract.Header, a *Assignment) (*contract.Service, bool) {
	if from == nil {
		return nil, false
	}
	s, ok := from.Service(a.Service)
	return s, ok && a.Replica < s.Replicas
}

// allows reports whether the revision before may run a service on a node: where it may not, the new one takes its place.
func (t *trial) allows(fleet []schedule.Node, service string, node identity.NodeID) bool {
	s, ok := t.from.Service(service)
	i := slices.IndexFunc(fleet, func(n schedule.Node) bool { return n.ID == node })
	return ok && i >= 0 && s.Placement.Allows(fleet[i].Farm, fleet[i].Name)
}

// takes is what a workload takes of its node. One that was replaced and may come back keeps the room for it.
func takes(a *Assignment, h, from *contract.Header) (cpu, memory int64, ok bool) {
	old, kept := had(from, a)
	if kept && a.Old {
		return int64(old.CPUMilli), int64(old.Memory), true
	}
	s, ok := h.Service(a.Service)
	switch {
	case !ok:
		return 0, 0, false
	case kept:
		return int64(max(old.CPUMilli, s.CPUMilli)), int64(max(old.Memory, s.Memory)), true
	}
	return int64(s.CPUMilli), int64(s.Memory), true
}

// carry is what a workload has of its last assignment in the next: whether it still runs the revision before, and what was
// said of it.
func (t *trial) carry(a *Assignment, old *Assignments, last *Assignment, rev, from contract.RevisionID) {
	switch _, kept := had(t.from, a); {
	case old.Revision == rev:
		a.Old, a.Ready, a.Failed = last.Old && kept, last.Ready, last.Failed
	case !kept:
	case last.Old && old.From == from, old.Revision == from:
		a.Old = true
	}
}

// advance takes the next replicas of each service out of the revision before, as many as may be without a ready one.
// It returns those.
func (t *trial) advance(h *contract.Header, out []Assignment) []int {
	if t.from == nil || t.stuck {
		return nil
	}
	var next []int
	for i := range h.Services {
		s := &h.Services[i]
		room := s.Unavailable()
		for j := range out {
			if _, kept := had(t.from, &out[j]); kept && out[j].Service == s.Name && !out[j].Old && !out[j].Ready && !out[j].Failed {
				room--
			}
		}
		for j := range out {
			if room > 0 && out[j].Service == s.Name && out[j].Old {
				out[j].Old = false
				next = append(next, j)
				room--
			}
		}
	}
	return next
}
