package schedule

import (
	"math/rand/v2"
	"slices"
	"testing"
)

func id(b byte) [32]byte { return [32]byte{b} }

// grid is three farms with one node each, and a second node on farm a.
func grid() []Node {
	return []Node{
		{ID: id(1), Name: "a1", Farm: "a", Up: true, CPUMilli: 4000, Memory: 8 << 30, Workloads: MaxWorkloads},
		{ID: id(2), Name: "b1", Farm: "b", Up: true, CPUMilli: 4000, Memory: 8 << 30, Workloads: MaxWorkloads},
		{ID: id(3), Name: "c1", Farm: "c", Up: true, CPUMilli: 4000, Memory: 8 << 30, Workloads: MaxWorkloads},
		{ID: id(4), Name: "a2", Farm: "a", Up: true, CPUMilli: 4000, Memory: 8 << 30, Workloads: MaxWorkloads},
	}
}

func TestPlace(t *testing.T) {
	w := func(n byte, service string, f ...func(*Workload)) Workload {
		w := Workload{ID: id(100 + n), Service: service, CPUMilli: 1000, Memory: 1 << 30}
		for _, g := range f {
			g(&w)
		}
		return w
	}
	at := func(n byte) func(*Workload) { return func(w *Workload) { w.Current = id(n) } }
	pin := func(n byte) func(*Workload) { return func(w *Workload) { w.Pinned, w.Volume = id(n), "data" } }
	saved := func(w *Workload) { w.Saved = true }
	spread := func(s string) func(*Workload) { return func(w *Workload) { w.Spread = s } }
	down := func(names ...string) []Node {
		g := grid()
		for i := range g {
			g[i].Up = !slices.Contains(names, g[i].Name)
		}
		return g
	}
	for _, tc := range []struct {
		name  string
		nodes []Node
		work  []Workload
		want  []byte // node, 0 for none
		why   []string
	}{
		{"the first that registered gets the first workload", grid(), []Workload{w(1, "web")}, []byte{1}, []string{""}},
		{"services of a contract go apart", grid(), []Workload{w(1, "app"), w(2, "db"), w(3, "web")}, []byte{1, 2, 3}, nil},
		{"what runs stays where it is", grid(), []Workload{w(1, "web", at(3))}, []byte{3}, nil},
		{"a lost node's workload moves", down("c1"), []Workload{w(1, "web", at(3))}, []byte{1}, nil},
		{"a volume's workload waits for its node", down("b1"), []Workload{w(1, "db", at(2), pin(2))}, []byte{2}, []string{"volume on b1"}},
		{"a volume's workload returns to its node", grid(), []Workload{w(1, "db", pin(2))}, []byte{2}, []string{""}},
		{"spread over farms", grid(), []Workload{w(1, "web", spread("farm")), w(2, "web", spread("farm")), w(3, "web", spread("farm"))}, []byte{1, 2, 3}, nil},
		{"no fourth farm", grid(), []Workload{w(1, "web", spread("farm")), w(2, "web", spread("farm")), w(3, "web", spread("farm")), w(4, "web", spread("farm"))}, []byte{1, 2, 3, 0}, []string{"", "", "", "no node: 4: another replica is on that farm"}},
		{"spread over nodes uses both of a farm", grid(), []Workload{w(1, "web", spread("node")), w(2, "web", spread("node")), w(3, "web", spread("node")), w(4, "web", spread("node"))}, []byte{1, 2, 3, 4}, nil},
		{"a farm that the owner does not allow is not used", grid(), []Workload{w(1, "web", func(w *Workload) { w.Farms = []string{"c"} })}, []byte{3}, nil},
		{"a node by name", grid(), []Workload{w(1, "web", func(w *Workload) { w.Nodes = []string{"a2"} })}, []byte{4}, nil},
		{"a placement that no longer allows the node moves it", grid(), []Workload{w(1, "web", at(1), func(w *Workload) { w.Farms = []string{"b"} })}, []byte{2}, nil},
		{"what does not fit is not placed", grid(), []Workload{w(1, "big", func(w *Workload) { w.Memory = 100 << 30 })}, []byte{0}, []string{"no node: 4: not enough memory"}},
		{"one that stays is not pushed out by one that comes", []Node{{ID: id(1), Name: "a1", Up: true, CPUMilli: 1100, Memory: 1<<30 + OverheadMemory, Workloads: 9}},
			[]Workload{w(1, "new"), w(2, "old", at(1))}, []byte{0, 1}, nil},
		{"what it fills to the last byte leaves nothing for its shim", []Node{{ID: id(1), Name: "a1", Up: true, CPUMilli: 2000, Memory: 1<<30 + OverheadMemory - 1, Workloads: 9}},
			[]Workload{w(1, "web")}, []byte{0}, []string{"no node: 1: not enough memory"}},
		{"the shim needs time on a core too", []Node{{ID: id(1), Name: "a1", Up: true, CPUMilli: 1000 + OverheadCPUMilli - 1, Memory: 8 << 30, Workloads: 9}},
			[]Workload{w(1, "web")}, []byte{0}, []string{"no node: 1: not enough CPU"}},
		{"a node gets no more than its heartbeat reports", []Node{{ID: id(1), Name: "a1", Up: true, CPUMilli: 1 << 20, Memory: 8 << 40, Workloads: 2}},
			[]Workload{w(1, "a"), w(2, "b"), w(3, "c")}, []byte{1, 1, 0}, []string{"", "", "no node: 1: node has all the workloads that it can have"}},
		{"a volume never moves, not even from a node that nobody knows", grid(), []Workload{w(1, "db", pin(77))}, []byte{0}, []string{"volume on a node that is not there"}},
		{"a volume that was saved follows its workload", down("b1"), []Workload{w(1, "db", at(2), pin(2), saved)}, []byte{1}, []string{""}},
		{"a volume that was saved stays while its node is up", grid(), []Workload{w(1, "db", at(2), pin(2), saved)}, []byte{2}, []string{""}},
		{"a volume that was saved waits where no other node may have it", down("b1"), []Workload{w(1, "db", at(2), pin(2), saved, func(w *Workload) { w.Farms = []string{"b"} })}, []byte{2}, []string{"volume on b1"}},
		{"an empty grid places nothing", nil, []Workload{w(1, "web")}, []byte{0}, []string{"no node: the grid has none"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for i, d := range Place(tc.nodes, tc.work) {
				want := [32]byte{}
				if tc.want[i] != 0 {
					want = id(tc.want[i])
				}
				if d.Node != want {
					t.Errorf("workload %d is on %d, not on %d (%s)", i, d.Node[0], tc.want[i], d.Reason)
				}
				if tc.why != nil && d.Reason != tc.why[i] {
					t.Errorf("workload %d: reason %q, not %q", i, d.Reason, tc.why[i])
				}
			}
		})
	}
}

// Whatever comes, no node is given more than it has, spreads hold, and a second run moves nothing.
func TestPlaceKeepsItsRules(t *testing.T) {
	for seed := range uint64(300) {
		r := rand.New(rand.NewPCG(seed, 1))
		var nodes []Node
		for i := range 1 + r.IntN(8) {
			nodes = append(nodes, Node{ID: id(byte(i + 1)), Name: string(rune('a' + i)), Farm: string(rune('A' + r.IntN(4))), Up: r.IntN(4) > 0, CPUMilli: int64(r.IntN(8000)), Memory: int64(r.IntN(8<<10)) << 20, Workloads: int64(r.IntN(6))})
		}
		var work []Workload
		for i := range r.IntN(20) {
			w := Workload{ID: id(byte(100 + i)), Service: []string{"x", "y", "z"}[r.IntN(3)], CPUMilli: int64(1 + r.IntN(2000)), Memory: int64(16+r.IntN(512)) << 20}
			w.Spread = map[string]string{"x": "farm", "y": "node"}[w.Service]
			if r.IntN(3) == 0 {
				w.Current = nodes[r.IntN(len(nodes))].ID
			}
			work = append(work, w)
		}
		first := Place(nodes, work)
		cpu, mem, count, farms := map[[32]byte]int64{}, map[[32]byte]int64{}, map[[32]byte]int64{}, map[string]int{}
		for i, d := range first {
			if d.Node == ([32]byte{}) {
				if d.Reason == "" {
					t.Fatalf("seed %d: not placed without a reason", seed)
				}
				continue
			}
			n := nodes[slices.IndexFunc(nodes, func(n Node) bool { return n.ID == d.Node })]
			cpu[n.ID] += work[i].CPUMilli + OverheadCPUMilli
			mem[n.ID] += work[i].Memory + OverheadMemory
			count[n.ID]++
			if !n.Up || cpu[n.ID] > n.CPUMilli || mem[n.ID] > n.Memory || count[n.ID] > n.Workloads {
				t.Fatalf("seed %d: workload %d on a node that is down or full", seed, i)
			}
			if work[i].Spread == "farm" {
				farms[work[i].Service+n.Farm]++
			}
			work[i].Current = d.Node
		}
		for i, d := range Place(nodes, work) {
			if first[i].Node != ([32]byte{}) && d.Node != first[i].Node {
				t.Fatalf("seed %d: workload %d moved without a cause", seed, i)
			}
		}
	}
}
