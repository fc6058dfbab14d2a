// Package schedule decides which node runs which workload. It is pure: the same nodes and workloads, in the same order,
// give the same decisions on every validator. It keeps what runs where it runs, and moves only for a cause: a node that
// is down, a placement that no longer allows the node, or a limit that no longer fits.
package schedule

import (
	"cmp"
	"fmt"
	"slices"
)

// What a workload costs its node beside its own limits, which cover what is inside the sandbox: the shim that watches it
// and keeps its logs, and what runsc and the mesh hold for it.
const (
	OverheadCPUMilli = 10
	OverheadMemory   = 32 << 20
)

// MaxWorkloads is how many one node gets, however large it is: its heartbeat reports them all, and one that is too long is
// not heard (a test of ledger/ compares).
const MaxWorkloads = 512

// Node is a machine as the ledger sees it. The order of a slice of nodes is the order of their registration, which
// breaks ties: unlike a hash, a farmer cannot grind it.
type Node struct {
	ID        [32]byte
	Name      string
	Farm      string
	Up        bool
	CPUMilli  int64 // free for workloads that are not in the call
	Memory    int64 // bytes, likewise
	Workloads int64 // how many more it can have, likewise
}

// Take charges the node for n workloads of these limits; a negative n gives their room back.
func (d *Node) Take(cpuMilli, memory, n int64) {
	d.CPUMilli -= n * (cpuMilli + OverheadCPUMilli)
	d.Memory -= n * (memory + OverheadMemory)
	d.Workloads -= n
}

// Workload is one replica to place.
type Workload struct {
	ID       [32]byte
	Service  string
	CPUMilli int64
	Memory   int64
	Spread   string   // "farm", "node" or ""
	Farms    []string // allowed; empty allows all
	Nodes    []string // allowed; empty allows all
	Pinned   [32]byte // where its volume is; zero is nowhere yet
	Saved    bool     // what is on its volume can be had elsewhere, when that node is down
	Volume   string   // the pinned volume's name, for the reason
	Current  [32]byte // where it is assigned; zero is nowhere
}

// Decision says where a workload belongs. Node is zero when no node can have it now. Reason is set when it does not run.
type Decision struct {
	Node   [32]byte
	Reason string
}

// Place decides for all workloads of one contract at once.
func Place(nodes []Node, work []Workload) []Decision {
	p := placer{nodes: slices.Clone(nodes), load: make([]int, len(nodes)), farms: map[[2]string]int{}, hosts: map[[2]string]int{}}
	out := make([]Decision, len(work))
	done := make([]bool, len(work))
	// What stays takes its room first, so that a newcomer cannot push it out.
	for i := range work {
		w := &work[i]
		pinned := w.Pinned != [32]byte{}
		home := w.Current
		if pinned {
			home = w.Pinned
		}
		n := p.find(home)
		if n < 0 {
			if pinned && !w.Saved { // never elsewhere: it would come back empty
				out[i], done[i] = Decision{Reason: "volume on a node that is not there"}, true
			}
			continue
		}
		why := p.refuse(n, w)
		switch {
		case pinned && !p.nodes[n].Up && w.Saved: // below
		case pinned && !p.nodes[n].Up:
			out[i], done[i] = Decision{Node: home, Reason: fmt.Sprintf("volume on %s", p.nodes[n].Name)}, true
			p.take(n, w)
		case why == fits:
			out[i], done[i] = Decision{Node: home}, true
			p.take(n, w)
		case pinned:
			out[i], done[i] = Decision{Reason: fmt.Sprintf("volume on %s: %v", p.nodes[n].Name, why)}, true
		}
	}
	for i := range work {
		if done[i] {
			continue
		}
		w := &work[i]
		out[i] = p.choose(w)
		if n := p.find(w.Pinned); n >= 0 && out[i].Node == [32]byte{} { // its node may come back first
			out[i] = Decision{Node: w.Pinned, Reason: fmt.Sprintf("volume on %s", p.nodes[n].Name)}
			p.take(n, w)
		}
	}
	return out
}

type placer struct {
	nodes []Node
	load  []int             // this contract's workloads by node
	farms map[[2]string]int // service and farm → replicas
	hosts map[[2]string]int // service and node → replicas
}

func (p *placer) find(id [32]byte) int {
	if id == ([32]byte{}) {
		return -1
	}
	return slices.IndexFunc(p.nodes, func(n Node) bool { return n.ID == id })
}

// refusal is why a node cannot have a workload.
type refusal int

// In the order of their words, in which every validator writes them.
const (
	farmTaken refusal = iota
	nodeTaken
	farmForbidden
	full
	down
	nodeForbidden
	noCPU
	noMemory
	fits // it can
)

func (r refusal) String() string {
	return [...]string{
		"another replica is on that farm", "another replica is on that node", "farm is not allowed", "node has all the workloads that it can have",
		"node is down", "node is not allowed", "not enough CPU", "not enough memory", "it fits",
	}[r]
}

// refuse says why node n cannot have w.
func (p *placer) refuse(n int, w *Workload) refusal {
	d := &p.nodes[n]
	switch {
	case !d.Up:
		return down
	case len(w.Farms) > 0 && !slices.Contains(w.Farms, d.Farm):
		return farmForbidden
	case len(w.Nodes) > 0 && !slices.Contains(w.Nodes, d.Name):
		return nodeForbidden
	case w.Spread == "farm" && p.farms[[2]string{w.Service, d.Farm}] > 0:
		return farmTaken
	case (w.Spread == "node" || w.Spread == "farm") && p.hosts[[2]string{w.Service, d.Name}] > 0:
		return nodeTaken
	case d.Workloads < 1:
		return full
	case d.CPUMilli < w.CPUMilli+OverheadCPUMilli:
		return noCPU
	case d.Memory < w.Memory+OverheadMemory:
		return noMemory
	}
	return fits
}

func (p *placer) take(n int, w *Workload) {
	d := &p.nodes[n]
	d.Take(w.CPUMilli, w.Memory, 1)
	p.load[n]++
	p.farms[[2]string{w.Service, d.Farm}]++
	p.hosts[[2]string{w.Service, d.Name}]++
}

// choose takes the best of the nodes that can have w: fewest replicas of the same service on its farm, then fewest
// workloads of the contract, then most free memory, then the one that registered first.
func (p *placer) choose(w *Workload) Decision {
	best := -1
	var reasons [fits]int
	for n := range p.nodes {
		if why := p.refuse(n, w); why != fits {
			reasons[why]++
			continue
		}
		if best < 0 || p.better(n, best, w) {
			best = n
		}
	}
	if best < 0 {
		return Decision{Reason: "no node: " + explain(reasons[:])}
	}
	p.take(best, w)
	return Decision{Node: p.nodes[best].ID}
}

func (p *placer) better(a, b int, w *Workload) bool {
	na, nb := &p.nodes[a], &p.nodes[b]
	return cmp.Or(
		cmp.Compare(p.farms[[2]string{w.Service, na.Farm}], p.farms[[2]string{w.Service, nb.Farm}]),
		cmp.Compare(p.load[a], p.load[b]),
		cmp.Compare(nb.Memory, na.Memory),
	) < 0
}

// explain counts reasons.
func explain(reasons []int) string {
	s := ""
	for why, n := range reasons {
		if n == 0 {
			continue
		}
		if s != "" {
			s += ", "
		}
		s += fmt.Sprintf("%d: %v", n, refusal(why))
	}
	if s == "" {
		return "the grid has none"
	}
	return s
}
