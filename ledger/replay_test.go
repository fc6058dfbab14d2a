package ledger

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"holdfast/contract"
	"holdfast/identity"
)

// Blocks of chance: contracts that come, change and go, transactions that are refused, nodes that come and go, halts. Whoever
// computes them again gets the same states, whether he has seen all or was restarted with the records in another order; and
// no workload moves without a cause.
func TestTheSameBlocksMakeTheSameStates(t *testing.T) {
	seeds := uint64(100)
	if testing.Short() {
		seeds = 10
	}
	base := newGrid(t, "lab")
	moves := 0
	for seed := range seeds {
		r := rand.New(rand.NewPCG(seed, 2))
		blocks := chance(base, r)
		a, b := base.s, base.s
		var restarted *State
		for i, blk := range blocks {
			before := a
			var ra, rb []Result
			a, ra = a.Apply(blk)
			b, rb = b.Apply(blk)
			if a.Root() != b.Root() || a.clock != b.clock || !slices.Equal(ra, rb) {
				t.Fatalf("seed %d, block %d: two validators have %x and %x, %+v and %+v", seed, i, a.Root(), b.Root(), ra, rb)
			}
			if restarted != nil {
				if restarted, _ = restarted.Apply(blk); restarted.Root() != a.Root() || restarted.clock != a.clock || !slices.Equal(restarted.fleet, a.fleet) {
					t.Fatalf("seed %d, block %d: the one that was restarted has %x, not %x", seed, i, restarted.Root(), a.Root())
				}
			}
			if restarted == nil && r.IntN(4) == 0 {
				all := maps.Collect(a.Changes(nil))
				keys := slices.Sorted(maps.Keys(all))
				r.Shuffle(len(keys), func(i, j int) { keys[i], keys[j] = keys[j], keys[i] })
				var err error
				if restarted, err = Load(func(yield func(string, []byte) bool) {
					for _, k := range keys {
						if !yield(k, all[k]) {
							return
						}
					}
				}); err != nil {
					t.Fatal(err)
				}
			}
			moves += causes(t, before, a, fmt.Sprintf("seed %d, block %d", seed, i))
		}
	}
	if moves == 0 {
		t.Error("nothing ever moved")
	}
}

// causes checks that what was on a node that is up, in a contract that was not revised, is where it was, with its epoch, and
// that the epochs of what moved grew. It counts what moved because of nodes.
func causes(t *testing.T, before, after *State, at string) (moved int) {
	t.Helper()
	up := map[identity.NodeID]bool{}
	for _, n := range after.fleet {
		up[n.ID] = n.Up
	}
	for _, id := range entries[contract.ID](t, before, ContractsKey) {
		was, err1 := get[Assignments](before, AssignmentsKey(id))
		is, err2 := get[Assignments](after, AssignmentsKey(id))
		if err1 != nil || err2 != nil {
			t.Fatalf("%s: %v %v", at, err1, err2)
		}
		for _, w := range was.Current {
			i := slices.IndexFunc(is.Current, func(a Assignment) bool { return a.Workload == w.Workload })
			if i < 0 {
				if is.Floor < w.Epoch {
					t.Fatalf("%s: epoch %d of a workload that is gone is forgotten: %d", at, w.Epoch, is.Floor)
				}
				continue
			}
			switch n := is.Current[i]; {
			case n.Node == w.Node && n.Epoch == w.Epoch:
			case was.Revision != is.Revision && (n.Epoch > w.Epoch || n.Epoch == w.Epoch && n.Node.IsZero()): // even several revisions in one block
			case n.Node.IsZero() && n.Epoch == w.Epoch && !up[w.Node]:
			case n.Node != w.Node && n.Epoch == w.Epoch+1 && (w.Node.IsZero() || !up[w.Node]):
				moved++
			default:
				t.Fatalf("%s: %+v became %+v without a cause", at, w, n)
			}
		}
	}
	return moved
}

// chance makes blocks that follow base, which stays as it is.
func chance(base *grid, r *rand.Rand) (out []Block) {
	x := *base
	x.nonce = maps.Clone(base.nonce)
	live := map[string]*contract.Header{}
	farms := entries[identity.FarmID](x.t, x.s, FarmsKey)
	nodes := 3
	for range 9 {
		var txs [][]byte
		at, try := x.at, x.s
		send := func(tx *Tx) bool {
			txs = append(txs, tx.Encode())
			var res []Result
			try, res = try.Apply(Block{Height: x.h + 1, Time: at, Txs: txs[len(txs)-1:]})
			if n, err := get[uint64](try, NonceKey(tx.Actor)); err == nil {
				x.nonce[tx.Actor] = *n
			}
			return res[0].Code == CodeOK
		}
		for range r.IntN(4) {
			name := fmt.Sprint("c", r.IntN(6))
			h := live[name]
			switch k := r.IntN(6); {
			case k == 0 && nodes < 6:
				a := x.admission(farms[r.IntN(3)], 100+int(r.IntN(100)))
				a.Name, a.CPUMilli, a.Memory = fmt.Sprint("more-", nodes), uint32(1000+r.IntN(4000)), uint64(1+r.IntN(4))<<30
				a.Proof = x.nodes[len(x.nodes)-1].Sign(NodeAdmitPurpose, a.ProofBytes(x.g.GridID()))
				if send(x.tx(KindNodeAdmit, Actor{ID: x.g.GridAccount()}, a, x.admin)) {
					nodes++
				}
			case h == nil:
				h = x.header(name, func(h *contract.Header) {
					h.SealedSize += uint32(r.IntN(1 << 20)) // its own ID, should the name have been there before
					s := &h.Services[0]
					s.Replicas, s.CPUMilli, s.Memory = uint16(1+r.IntN(4)), uint32(100+r.IntN(1500)), uint64(64+r.IntN(2000))<<20
					s.Placement.Spread = []string{"", "", "node", "farm"}[r.IntN(4)]
					if r.IntN(4) == 0 {
						h.Volumes = []contract.Volume{{Name: "data", Size: 1 << 20}}
						s.Replicas, s.Volumes = 1, []string{"data"}
					}
				})
				if send(x.deploy(h)) {
					live[name] = h
				}
			case k == 1:
				if send(x.tx(KindContractCancel, Actor{ID: x.acct}, &ContractCancel{h.ContractID()}, x.owner)) {
					delete(live, name)
				}
			case k == 2: // refused
				send(x.deploy(h))
			default:
				n := *h
				n.Services = slices.Clone(h.Services)
				n.Revision, n.Contract, n.Previous = h.Revision+1, h.ContractID(), h.RevisionID()
				if s := &n.Services[0]; len(s.Volumes) == 0 {
					s.Replicas = uint16(r.IntN(5))
				}
				n.Services[0].CPUMilli = uint32(100 + r.IntN(1500))
				if send(x.deploy(&n)) {
					live[name] = &n
				}
			}
		}
		heard := Bitmap{}
		for i := range nodes {
			if r.IntN(5) > 0 {
				heard = heard.With(i)
			}
		}
		blk := Block{Height: x.h + 1, Time: at, Txs: txs, Heard: []Heard{{Power: 2, Nodes: heard}, {Power: 1, Nodes: Bitmap{}}}}
		if r.IntN(10) == 0 {
			blk.Heard = nil
		}
		if r.IntN(3) > 0 {
			blk.Heard = blk.Heard[:min(1, len(blk.Heard))]
		}
		x.s, _ = x.s.Apply(blk)
		x.h++
		x.at = x.at.Add(time.Duration(1+r.IntN(8)) * time.Second)
		out = append(out, blk)
	}
	return out
}
