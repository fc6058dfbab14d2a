// Package schedule decides which node runs which workload. It is pure: the same nodes and workloads, in the same order,
// give the same decisions on every validator. It keeps what runs where it runs, and moves only for a cause: a node that
// is down, a placement that no longer allows the node, or a limit that no longer fits.
package schedule

import (
	"cmp"
	"fmt"
	"slices"
)

// Node is a machine as the ledger sees it. The order of a slice of nodes is the order of their registration, which
// breaks ties: unlike a hash, a farmer cannot grind it.
type Node struct {
	ID       [32]byte
	Name     string
	Farm     string
	Up       bool
	CPUMilli int64 // free for workloads that are not in the call
	Memory   int64 // bytes, likewise
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
	p := placer{nodes: slices.Clone(nodes), load: make([]int, len(nodes)), farms: map[string]map[string]int{}, hosts: map[string]map[string]int{}}
	out := make([]Decision, len(work))
	done := make([]bool, len(work))
	// What stays takes its room first, so that a newcomer cannot push it out.
	for i, w := range work {
		home := w.Current
		if w.Pinned != ([32]byte{}) {
			home = w.Pinned
		}
		n := p.find(home)
		if n < 0 {
			continue
		}
		if w.Pinned != ([32]byte{}) && !p.nodes[n].Up {
			out[i] = Decision{Node: home, Reason: fmt.Sprintf("volume on %s", p.nodes[n].Name)}
			done[i] = true
			p.take(n, w)
			continue
		}
		if why := p.refuse(n, w); why == "" {
			out[i] = Decision{Node: home}
			done[i] = true
			p.take(n, w)
		} else if w.Pinned != ([32]byte{}) {
			out[i] = Decision{Reason: fmt.Sprintf("volume on %s: %s", p.nodes[n].Name, why)}
			done[i] = true
		}
	}
	for i, w := range work {
		if !done[i] {
			out[i] = p.choose(w)
		}
	}
	return out
}

type placer struct {
	nodes []Node
	load  []int                     // this contract's workloads by node
	farms map[string]map[string]int // service → farm → replicas
	hosts map[string]map[string]int // service → node → replicas
}

func (p *placer) find(id [32]byte) int {
	if id == ([32]byte{}) {
		return -1
	}
	return slices.IndexFunc(p.nodes, func(n Node) bool { return n.ID == id })
}

// refuse says why node n cannot have w, or "".
func (p *placer) refuse(n int, w Workload) string {
	d := &p.nodes[n]
	switch {
	case !d.Up:
		return "node is down"
	case len(w.Farms) > 0 && !slices.Contains(w.Farms, d.Farm):
		return "farm is not allowed"
	case len(w.Nodes) > 0 && !slices.Contains(w.Nodes, d.Name):
		return "node is not allowed"
	case w.Spread == "farm" && p.farms[w.Service][d.Farm] > 0:
		return "another replica is on that farm"
	case (w.Spread == "node" || w.Spread == "farm") && p.hosts[w.Service][d.Name] > 0:
		return "another replica is on that node"
	case d.CPUMilli < w.CPUMilli:
		return "not enough CPU"
	case d.Memory < w.Memory:
		return "not enough memory"
	}
	return ""
}

func (p *placer) take(n int, w Workload) {
	d := &p.nodes[n]
	d.CPUMilli -= w.CPUMilli
	d.Memory -= w.Memory
	p.load[n]++
	for m, key := range map[*map[string]map[string]int]string{&p.farms: d.Farm, &p.hosts: d.Name} {
		if (*m)[w.Service] == nil {
			(*m)[w.Service] = map[string]int{}
		}
		(*m)[w.Service][key]++
	}
}

// choose takes the best of the nodes that can have w: fewest replicas of the same service on its farm, then fewest
// workloads of the contract, then most free memory, then the one that registered first.
func (p *placer) choose(w Workload) Decision {
	best, reasons := -1, map[string]int{}
	for n := range p.nodes {
		if why := p.refuse(n, w); why != "" {
			reasons[why]++
			continue
		}
		if best < 0 || p.better(n, best, w) {
			best = n
		}
	}
	if best < 0 {
		return Decision{Reason: "no node: " + explain(reasons, len(p.nodes))}
	}
	p.take(best, w)
	return Decision{Node: p.nodes[best].ID}
}

func (p *placer) better(a, b int, w Workload) bool {
	na, nb := &p.nodes[a], &p.nodes[b]
	return cmp.Or(
		cmp.Compare(p.farms[w.Service][na.Farm], p.farms[w.Service][nb.Farm]),
		cmp.Compare(p.load[a], p.load[b]),
		cmp.Compare(nb.Memory, na.Memory),
	) < 0
}

// explain counts reasons in a fixed order, so that every validator writes the same words.
func explain(reasons map[string]int, nodes int) string {
	if nodes == 0 {
		return "the grid has none"
	}
	keys := make([]string, 0, len(reasons))
	for k := range reasons {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	s := ""
	for i, k := range keys {
		if i > 0 {
			s += ", "
		}
		s += fmt.Sprintf("%d: %s", reasons[k], k)
	}
	return s
}
