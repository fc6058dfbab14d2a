package ledger

import (
	"bytes"
	"errors"
	"fmt"
	"slices"

	"holdfast/contract"
	"holdfast/identity"
	"holdfast/internal/canonical"
	"holdfast/schedule"
)

// What is assigned changes for a cause only: a contract's own transaction, a node that changed between up and down, or room
// that came for a contract that had none. Each cause reaches the contracts that it concerns and no others, so that the work
// of a block does not grow with the contracts of the grid.

// maxRetry bounds how many contracts that wait for room are tried again in one block. The others follow in the next blocks.
const maxRetry = 64

// readFleet reads all nodes, in order of registration, with the room that is left on them.
func readFleet(s *State) ([]schedule.Node, error) {
	ids, err := list[identity.NodeID](s, NodesKey)
	if err != nil {
		return nil, err
	}
	out := make([]schedule.Node, len(ids))
	for i, id := range ids {
		n, err := get[Node](s, NodeKey(id))
		if err != nil {
			return nil, fmt.Errorf("%v: %w", id, err)
		}
		u, err := orZero(get[NodeUsed](s, NodeUsedKey(id)))
		if err != nil {
			return nil, fmt.Errorf("room on %v: %w", id, err)
		}
		out[i] = schedule.Node{
			ID: id, Name: n.Name, Farm: n.FarmName, Up: n.Up,
			CPUMilli: int64(n.CPUMilli) - u.CPUMilli, Memory: memoryOf(n) - u.Memory, Workloads: schedule.MaxWorkloads - u.Workloads,
		}
	}
	return out, nil
}

// memoryOf is a node's memory, below what could overflow: the farmer says how much there is.
func memoryOf(n *Node) int64 { return int64(min(n.Memory, 1<<62)) }

// orZero takes an absent record for an empty one, and no other.
func orZero[T any](v *T, err error) (*T, error) {
	if errors.Is(err, ErrAbsent) {
		return new(T), nil
	}
	return v, err
}

// header reads a revision's header.
func (s *State) header(rev contract.RevisionID) (*contract.Header, error) {
	raw, ok := s.tree.get(RevisionKey(rev))
	if !ok {
		return nil, fmt.Errorf("%v: %w", rev, ErrAbsent)
	}
	return contract.DecodeHeader(raw)
}

// move assigns a contract anew outside of its own transactions. When its records cannot be read it stays as it is, and no
// other contract is held up.
func (b *batch) move(id contract.ID) {
	try := *b
	if _, err := try.assign(id); err == nil {
		b.tree, b.fleet = try.tree, try.fleet
	}
}

// assign recomputes the assignments of one contract from committed state. It reports whether it left room for others.
func (b *batch) assign(id contract.ID) (freed bool, err error) {
	c, err := get[Contract](&b.State, ContractKey(id))
	if err != nil {
		return false, fmt.Errorf("%v: %w", id, err)
	}
	old, err := orZero(get[Assignments](&b.State, AssignmentsKey(id)))
	if err != nil {
		return false, fmt.Errorf("assignments of %v: %w", id, err)
	}
	if !c.Runs() && len(old.Current) == 0 {
		return false, nil
	}
	h, err := b.header(c.Current)
	if err != nil {
		return false, err
	}
	was := h
	if old.Revision != c.Current && len(old.Current) > 0 {
		if was, err = b.header(old.Revision); err != nil {
			return false, err
		}
	}
	t := &trial{stuck: c.Trial.Stuck != nil}
	if !c.Trial.From.IsZero() {
		if t.from, err = b.header(c.Trial.From); err != nil {
			return false, err
		}
	}
	wasFrom := t.from
	if old.From != c.Trial.From {
		wasFrom = nil
		if !old.From.IsZero() {
			if wasFrom, err = b.header(old.From); err != nil {
				return false, err
			}
		}
	}
	fleet := slices.Clone(b.fleet)
	charge(fleet, was, wasFrom, old.Current, -1)
	next := &Assignments{Revision: c.Current, Floor: old.Floor, From: c.Trial.From}
	if c.Runs() {
		if next.Current, err = b.place(fleet, c, h, old, t); err != nil {
			return false, err
		}
	}
	charge(fleet, h, t.from, next.Current, 1)
	for _, a := range old.Current {
		if !slices.ContainsFunc(next.Current, func(n Assignment) bool { return n.Workload == a.Workload }) {
			next.Floor = max(next.Floor, a.Epoch)
		}
	}
	if freed, err = b.account(id, old, next, fleet); err != nil {
		return false, err
	}
	if !bytes.Equal(canonical.Encode(old), canonical.Encode(next)) {
		set(b, AssignmentsKey(id), next)
	}
	return freed, nil
}

// charge takes from the fleet what assigned workloads use; sign -1 gives it back.
func charge(fleet []schedule.Node, h, from *contract.Header, as []Assignment, sign int64) {
	for i := range as {
		n := slices.IndexFunc(fleet, func(n schedule.Node) bool { return n.ID == as[i].Node })
		cpu, memory, ok := takes(&as[i], h, from)
		if n < 0 || !ok {
			continue
		}
		fleet[n].Take(cpu, memory, sign)
	}
}

func (b *batch) place(fleet []schedule.Node, c *Contract, h *contract.Header, old *Assignments, t *trial) ([]Assignment, error) {
	id := c.ID
	var work []schedule.Workload
	var out []Assignment
	for i := range h.Services {
		s := &h.Services[i]
		for r := range int(s.Replicas) {
			a := Assignment{Workload: contract.WorkloadOf(id, s.Name, r), Service: s.Name, Replica: uint16(r), Epoch: old.Floor, Fenced: len(s.Volumes) > 0}
			w := schedule.Workload{ID: a.Workload, Service: s.Name, Spread: s.Placement.Spread, Farms: s.Placement.Farms, Nodes: s.Placement.Nodes}
			if j := slices.IndexFunc(old.Current, func(o Assignment) bool { return o.Workload == a.Workload }); j >= 0 {
				last := &old.Current[j]
				a.Epoch, a.Node, a.Height, a.Reason = last.Epoch, last.Node, last.Height, last.Reason
				t.carry(&a, old, last, c.Current, c.Trial.From)
				w.Current = a.Node
			}
			stuck := false
			for _, name := range s.Volumes {
				v, err := get[Volume](&b.State, VolumeKey(contract.VolumeOf(id, name)))
				if err != nil {
					return nil, fmt.Errorf("volume %q: %w", name, err)
				}
				if !v.Node.IsZero() {
					w.Pinned, w.Volume = v.Node, name
					stuck = stuck || v.Created && v.Sequence == 0 // on its disk alone
				}
			}
			w.Saved = !stuck
			work, out = append(work, w), append(out, a)
		}
	}
	decide := func() []schedule.Decision {
		for i := range work {
			work[i].CPUMilli, work[i].Memory, _ = takes(&out[i], h, t.from)
		}
		return schedule.Place(fleet, work)
	}
	stepped := t.advance(h, out)
	decided := decide()
	if slices.ContainsFunc(stepped, func(i int) bool { return decided[i].Reason != "" && out[i].Reason == "" }) {
		// What runs is not given up for what has no room.
		for _, i := range stepped {
			out[i].Old = true
		}
		decided = decide()
	}
	for i, d := range decided {
		a := &out[i]
		if node := identity.NodeID(d.Node); node != a.Node || d.Reason != a.Reason {
			if node != a.Node && !node.IsZero() {
				a.Epoch++
				a.Ready, a.Failed = false, false
				a.Old = a.Old && t.allows(fleet, a.Service, node)
			}
			a.Node, a.Reason, a.Height = node, d.Reason, b.height
		}
		if a.Node.IsZero() {
			continue
		}
		s, _ := h.Service(a.Service)
		for _, name := range s.Volumes {
			v, err := get[Volume](&b.State, VolumeKey(contract.VolumeOf(id, name)))
			if err == nil {
				err = b.settleVolume(v, a.Node)
			}
			if err != nil {
				return nil, fmt.Errorf("volume %q: %w", name, err)
			}
		}
	}
	return out, nil
}

// account writes what follows from a contract's new assignments: the room left on each node, the list of contracts with a
// workload on it, which makes a node's view complete, and whether the contract waits for room.
func (b *batch) account(id contract.ID, old, next *Assignments, fleet []schedule.Node) (freed bool, err error) {
	for i := range fleet { // in a fixed order
		n, was := &fleet[i], &b.fleet[i]
		node := identity.NodeID(n.ID)
		if *n != *was {
			u, err := orZero(get[NodeUsed](&b.State, NodeUsedKey(node)))
			if err != nil {
				return false, fmt.Errorf("room on %v: %w", node, err)
			}
			u.CPUMilli += was.CPUMilli - n.CPUMilli
			u.Memory += was.Memory - n.Memory
			u.Workloads += was.Workloads - n.Workloads
			set(b, NodeUsedKey(node), u)
			freed = freed || n.CPUMilli > was.CPUMilli || n.Memory > was.Memory || n.Workloads > was.Workloads
		}
		switch had, has := old.on(node), next.on(node); {
		case has && !had:
			err = push(b, NodeWorkKey(node), id)
		case had && !has:
			err = drop(b, NodeWorkKey(node), id)
		}
		if err != nil {
			return false, err
		}
	}
	b.fleet = fleet
	switch waited, waits := old.on(identity.NodeID{}), next.on(identity.NodeID{}); {
	case waits && !waited:
		err = push(b, WaitingKey, id)
	case waited && !waits:
		err = drop(b, WaitingKey, id)
	}
	return freed, err
}

// on reports whether a workload is on node; the zero node is none.
func (a *Assignments) on(node identity.NodeID) bool {
	return slices.ContainsFunc(a.Current, func(x Assignment) bool { return x.Node == node })
}

// more says that room came: all that wait get another try.
func (b *batch) more() {
	n, _, err := items(&b.State, WaitingKey)
	if err == nil && n > 0 {
		left := uint64(n)
		set(b, retryKey, &left)
	}
}

// retry tries those that wait for room and were not tried since it came, the longest waiting first. Who still waits then
// goes to the end.
func (b *batch) retry() {
	left, err := get[uint64](&b.State, retryKey)
	if err != nil || *left == 0 {
		return
	}
	ids, err := list[contract.ID](&b.State, WaitingKey)
	if err != nil {
		return
	}
	n := min(int(*left), maxRetry, len(ids))
	*left = min(*left, uint64(len(ids))) - uint64(n)
	if *left > 0 {
		set(b, retryKey, left)
	} else {
		b.del(retryKey)
	}
	for _, id := range ids[:n] {
		b.move(id)
	}
	var wait []contract.ID
	for _, id := range ids[:n] {
		if as, err := get[Assignments](&b.State, AssignmentsKey(id)); err == nil && as.on(identity.NodeID{}) {
			wait = append(wait, id)
		}
	}
	try := *b
	if drop(&try, WaitingKey, wait...) == nil && push(&try, WaitingKey, wait...) == nil {
		b.tree = try.tree
	}
}
