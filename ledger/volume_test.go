package ledger

import (
	"strings"
	"testing"

	"holdfast/contract"
	"holdfast/identity"
)

// created has the node of a contract's volume say that its disk is there.
func (x *grid) created(h *contract.Header) {
	x.t.Helper()
	n := x.where(x.assigned(h)[0])
	pub := x.nodes[n].Public()
	x.must(x.tx(KindVolumeCreated, Actor{Node: true, ID: pub.Node()}, &VolumeCreated{contract.VolumeOf(h.ContractID(), "data")}, x.nodes[n]))
}

func (x *grid) saved(h *contract.Header, by int, sequence uint64) *Tx {
	pub := x.nodes[by].Public()
	return x.tx(KindVolumeSaved, Actor{Node: true, ID: pub.Node()}, &VolumeSaved{contract.VolumeOf(h.ContractID(), "data"), sequence, [32]byte{byte(sequence)}}, x.nodes[by])
}

func (x *grid) volume(h *contract.Header) (*Volume, *Store) {
	x.t.Helper()
	id := contract.VolumeOf(h.ContractID(), "data")
	v, err := get[Volume](x.s, VolumeKey(id))
	if err != nil {
		x.t.Fatal(err)
	}
	s, err := get[Store](x.s, StoreKey(contract.ID(id)))
	if err != nil {
		x.t.Fatal(err)
	}
	return v, s
}

func TestVolumeIsReportedByItsNode(t *testing.T) {
	x := newGrid(t, "lab")
	h := x.header("db", withVolume)
	x.must(x.deploy(h))
	vid := contract.VolumeOf(h.ContractID(), "data")
	on := x.where(x.assigned(h)[0])
	x.refused("a snapshot of what was never made", x.saved(h, on, 1), "no disk yet")
	for i, k := range x.nodes {
		p := k.Public()
		tx := x.tx(KindVolumeCreated, Actor{Node: true, ID: p.Node()}, &VolumeCreated{vid}, k)
		if i == on {
			x.must(tx)
		} else {
			x.refused("by another node", tx, "on another node")
			x.refused("a snapshot by another node", x.saved(h, i, 1), "on another node")
		}
	}
	x.refused("by its owner", x.tx(KindVolumeSaved, Actor{ID: x.acct}, &VolumeSaved{vid, 1, [32]byte{1}}, x.owner), "on another node")
	x.must(x.saved(h, on, 7))
	x.refused("the same again", x.saved(h, on, 7), "the ledger knows of 7")
	x.refused("an older one", x.saved(h, on, 3), "the ledger knows of 7")
	x.must(x.saved(h, on, 8))
	if v, s := x.volume(h); !v.Created || nodeOf(x.nodes[on]) != v.Node || v.Sequence != 8 || v.Snapshot != [32]byte{8} || s.Node != v.Node {
		t.Errorf("%+v %+v", v, s)
	}
}

// A volume of which there is a snapshot follows its workload, and with it the right to use its store.
func TestASavedVolumeFollowsItsWorkload(t *testing.T) {
	x := newGrid(t, "lab")
	h := x.header("db", withVolume)
	x.must(x.deploy(h))
	x.created(h)
	all := []int{0, 1, 2}
	without := func(lost int) []int { return []int{(lost + 1) % 3, (lost + 2) % 3} }
	was := x.assigned(h)[0]
	first := x.where(was)
	x.block(without(first))
	if a := x.assigned(h)[0]; a.Node != was.Node || !strings.HasPrefix(a.Reason, "volume on ") {
		t.Fatalf("what is on its disk alone moved: %+v", a)
	}
	x.block(all)
	x.must(x.saved(h, first, 1))
	x.block(without(first))
	now := x.assigned(h)[0]
	if now.Node == was.Node || now.Epoch != was.Epoch+1 || now.Reason != "" {
		t.Fatalf("lost its node: %+v → %+v", was, now)
	}
	if v, s := x.volume(h); v.Node != now.Node || v.Created || !v.Restore() || v.Sequence != 1 || s.Node != now.Node {
		t.Errorf("%+v %+v", v, s)
	}
	// The first one is back: it has no say any more, and the volume stays where it is going.
	x.block(all)
	x.refused("a snapshot by the node that was lost", x.saved(h, first, 2), "on another node")
	if a := x.assigned(h)[0]; a != now {
		t.Errorf("it moved back: %+v", a)
	}
	second := x.where(now)
	x.refused("a snapshot before it is restored", x.saved(h, second, 2), "no disk yet")
	// The second is lost before it has restored anything: the third does it.
	x.block(without(second))
	if a := x.assigned(h)[0]; a.Node == now.Node || a.Epoch != now.Epoch+1 {
		t.Errorf("lost its second node: %+v", a)
	}
	x.created(h)
	if v, _ := x.volume(h); v.Restore() || !v.Created {
		t.Errorf("%+v", v)
	}
	x.block(nil) // all are lost: it waits, and is not given up
	if a := x.assigned(h)[0]; a.Node.IsZero() || !strings.HasPrefix(a.Reason, "volume on ") {
		t.Errorf("all nodes are lost: %+v", a)
	}
}

// A volume that nothing was ever written to moves like a workload without one.
func TestAVolumeThatWasNeverMadeMoves(t *testing.T) {
	x := newGrid(t, "lab")
	h := x.header("db", withVolume)
	x.must(x.deploy(h))
	was := x.assigned(h)[0]
	first := x.where(was)
	x.block([]int{(first + 1) % 3, (first + 2) % 3})
	if a := x.assigned(h)[0]; a.Node == was.Node || a.Reason != "" {
		t.Errorf("%+v", a)
	}
	if v, _ := x.volume(h); v.Restore() {
		t.Errorf("there is nothing to restore: %+v", v)
	}
}

func TestStoreOfAVolume(t *testing.T) {
	x := newGrid(t, "lab")
	h := x.header("db", withVolume)
	x.must(x.deploy(h))
	next := func(f func(*contract.Volume)) *contract.Header {
		n := *h
		n.Revision, n.Contract, n.Previous, n.SealedSize = 2, h.ContractID(), h.RevisionID(), 101
		n.Volumes = append([]contract.Volume{}, h.Volumes...)
		f(&n.Volumes[0])
		return &n
	}
	x.refused("without its store", x.deploy(next(func(v *contract.Volume) { v.Store = contract.Store{} })), "cannot drop")
	x.refused("another front end", x.deploy(next(func(v *contract.Volume) { v.Store.FrontEnd[5]++ })), "cannot change")
	x.refused("another key that undoes deletes", x.deploy(next(func(v *contract.Volume) { v.Store.Recovery[5]++ })), "cannot change")
	x.refused("a larger one", x.deploy(next(func(v *contract.Volume) { v.Store.Limit++ })), "cannot change")
	thief := x.header("thief", withVolume)
	thief.Volumes[0].Store.FrontEnd = h.Volumes[0].Store.FrontEnd
	x.refused("the key of another's", x.deploy(thief), "another store has this key")
	used, err := get[Quota](x.s, AccountUsedKey(x.acct))
	if err != nil || used.Storage != int(contract.VolumeStore(1<<30)) {
		t.Errorf("billed: %+v %v", used, err)
	}
	// A volume from before there were snapshots gets its store with a revision.
	old := x.header("old", withVolume)
	store := old.Volumes[0].Store
	old.Volumes[0].Store = contract.Store{}
	x.must(x.deploy(old))
	x.created(old)
	n := *old
	n.Revision, n.Contract, n.Previous, n.SealedSize = 2, old.ContractID(), old.RevisionID(), 101
	n.Volumes = []contract.Volume{{Name: "data", Size: 1 << 30, Store: store}}
	x.refused("a snapshot without a store", x.saved(old, x.where(x.assigned(old)[0]), 1), "no store")
	x.must(x.deploy(&n))
	if v, s := x.volume(old); s.Node != v.Node || s.Node.IsZero() || s.Contract != old.ContractID() {
		t.Errorf("%+v %+v", v, s)
	}
	// What is retired is gone, and its keys are free.
	x.ends(x.tx(KindContractCancel, Actor{ID: x.acct}, &ContractCancel{h.ContractID()}, x.owner))
	x.volume(h) // which can be taken back until it is
	x.pass(2 * x.g.Delays.Retain)
	for _, key := range []string{VolumeKey(contract.VolumeOf(h.ContractID(), "data")), StoreKey(contract.ID(contract.VolumeOf(h.ContractID(), "data"))), storeKeyKey(h.Volumes[0].Store.FrontEnd)} {
		if _, have := x.s.tree.get(key); have {
			t.Errorf("%q is left", key[:8])
		}
	}
}

// An owner has a volume put back: its workload gets a new epoch, in which its node makes the disk anew.
func TestAVolumeIsPutBack(t *testing.T) {
	x := newGrid(t, "lab")
	h := x.header("db", withVolume)
	x.must(x.deploy(h))
	back := func(digest byte) *Tx {
		return x.tx(KindVolumeRestore, Actor{ID: x.acct}, &VolumeRestore{contract.VolumeOf(h.ContractID(), "data"), [32]byte{digest}}, x.owner)
	}
	x.refused("before there is a snapshot", back(1), "no snapshot of volume")
	x.created(h)
	node := x.where(x.assigned(h)[0])
	x.must(x.saved(h, node, 3))
	other := x.person(1)
	x.refused("by somebody else", x.tx(KindVolumeRestore, Actor{ID: other.id}, &VolumeRestore{contract.VolumeOf(h.ContractID(), "data"), [32]byte{1}}, other.key), "")
	x.refused("to nothing", back(0), "no snapshot is named")
	was := x.assigned(h)[0]
	x.must(back(7))
	now := x.assigned(h)[0]
	if v, _ := x.volume(h); v.Created || !v.Restore() || v.From != [32]byte{7} || v.Sequence != 3 || now.Epoch != was.Epoch+1 || now.Node != was.Node {
		t.Errorf("%+v, %+v → %+v", v, was, now)
	}
	// Should the node be lost before it has, the next one does what was asked.
	x.block([]int{(node + 1) % 3, (node + 2) % 3})
	if v, _ := x.volume(h); v.Node == was.Node || v.From != [32]byte{7} || !v.Restore() {
		t.Errorf("%+v", v)
	}
	x.created(h)
	if v, _ := x.volume(h); v.From != [32]byte{} || v.Restore() {
		t.Errorf("%+v", v)
	}
}

func TestPuttingBackNeedsConsent(t *testing.T) {
	x := newGrid(t, "lab")
	friend := x.person(1)
	board := approval("board", 1, map[identity.AccountID]uint16{friend.id: 1}, identity.ActRevise)
	h := x.header("db", withVolume, approvals(board))
	x.must(x.deploy(h))
	x.created(h)
	x.must(x.saved(h, x.where(x.assigned(h)[0]), 3))
	epoch := x.assigned(h)[0].Epoch
	tx := x.tx(KindVolumeRestore, Actor{ID: x.acct}, &VolumeRestore{contract.VolumeOf(h.ContractID(), "data"), [32]byte{7}}, x.owner)
	x.must(tx)
	if v, _ := x.volume(h); v.From != [32]byte{} || x.assigned(h)[0].Epoch != epoch {
		t.Fatalf("without consent: %+v", v)
	}
	x.must(x.consent(friend, ProposalID(tx.ID())))
	if v, _ := x.volume(h); v.From != [32]byte{7} || x.assigned(h)[0].Epoch != epoch+1 {
		t.Errorf("with consent: %+v", v)
	}
}
