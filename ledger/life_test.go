package ledger

import (
	"fmt"
	"testing"
	"time"

	"holdfast/contract"
	"holdfast/identity"
)

func (x *grid) state(h *contract.Header, to string) *Tx {
	return x.tx(KindContractState, Actor{ID: x.acct}, &ContractState{h.ContractID(), to}, x.owner)
}

func (x *grid) cancel(h *contract.Header) *Tx {
	return x.tx(KindContractCancel, Actor{ID: x.acct}, &ContractCancel{h.ContractID()}, x.owner)
}

// What is cancelled goes on for a while, can be taken back, and keeps its data for a while more.
func TestCancellingIsSlow(t *testing.T) {
	x := newGrid(t, "lab")
	h := x.header("db", withVolume)
	x.must(x.deploy(h))
	vol := VolumeKey(contract.VolumeOf(h.ContractID(), "data"))
	node := x.assigned(h)[0].Node
	x.must(x.cancel(h))
	if c := x.contract(h); c.State != Cancelling || len(x.assigned(h)) != 1 {
		t.Fatalf("it ended at once: %+v", c)
	}
	x.refused("a revision of what ends", x.deploy(x.next(h)), "is cancelling")
	x.refused("a pause of what ends", x.state(h, Paused), "cannot become")
	x.must(x.state(h, Active))
	x.pass(time.Minute)
	if c := x.contract(h); c.State != Active || c.Due != 0 {
		t.Fatalf("it was taken back: %+v", c)
	}
	x.ends(x.cancel(h))
	c := x.contract(h)
	if _, ok := x.s.tree.get(RouteKey("db.localhost")); c.State != Cancelled || len(x.assigned(h)) != 0 || ok {
		t.Fatalf("%+v", c)
	}
	// Its name and its host can be another's by then.
	squat := x.header("db", func(h *contract.Header) { h.SealedSize++ })
	x.must(x.deploy(squat))
	x.refused("back, where another has the name", x.state(h, Active), "another contract")
	x.ends(x.cancel(squat))
	x.must(x.state(h, Active))
	if c := x.contract(h); c.State != Active || len(x.assigned(h)) != 1 || x.assigned(h)[0].Node != node || x.assigned(h)[0].Epoch < 2 {
		t.Fatalf("%+v %+v", c, x.assigned(h))
	}
	if used, err := get[Quota](x.s, AccountUsedKey(x.acct)); err != nil || *used != (Quota{1, 1, 1, 1, 512 << 20}) {
		t.Errorf("usage %+v, %v", used, err)
	}
	x.ends(x.cancel(h))
	x.pass(59 * time.Minute)
	if _, ok := x.s.tree.get(vol); !ok {
		t.Fatal("its volume went early")
	}
	x.pass(2 * time.Minute)
	if _, ok := x.s.tree.get(vol); ok || x.contract(h).State != Retired {
		t.Fatal("its time is over")
	}
	x.refused("back from the dead", x.state(h, Active), "cannot become")
	if left := entries[contract.ID](t, x.s, AccountWorkKey(x.acct)); len(left) != 0 {
		t.Errorf("the account still lists %v", left)
	}
	if _, ok := x.s.tree.get(duesKey); ok {
		t.Error("something is still due")
	}
}

func TestPause(t *testing.T) {
	x := newGrid(t, "lab")
	h := x.header("db", withVolume)
	x.must(x.deploy(h))
	was := x.assigned(h)[0]
	x.must(x.state(h, Paused))
	if c := x.contract(h); c.State != Paused || len(x.assigned(h)) != 0 {
		t.Fatalf("%+v", c)
	}
	x.refused("paused twice", x.state(h, Paused), "cannot become")
	n := x.next(h)
	x.must(x.deploy(n)) // a paused one can be mended
	if len(x.assigned(h)) != 0 {
		t.Fatal("a revision set it to work")
	}
	x.must(x.state(h, Active))
	if now := x.assigned(h); len(now) != 1 || now[0].Node != was.Node || now[0].Epoch != was.Epoch+1 {
		t.Errorf("%+v, it was %+v", now, was)
	}
	if _, ok := x.s.tree.get(RouteKey("db.localhost")); !ok {
		t.Error("its route went")
	}
}

// Pausing and cancelling need whom the contract says.
func TestTheEndNeedsConsent(t *testing.T) {
	x := newGrid(t, "lab")
	other := x.person(1)
	h := x.header("app", approvals(approval("ops", 1, ones(other), identity.ActCancel, identity.ActPause)))
	x.must(x.deploy(h))
	for i, step := range []struct {
		tx   func() *Tx
		want string
	}{
		{func() *Tx { return x.state(h, Paused) }, Paused},
		{func() *Tx { return x.state(h, Active) }, Active},
		{func() *Tx { return x.cancel(h) }, Cancelling},
		{func() *Tx { return x.state(h, Active) }, Active},
	} {
		was := x.contract(h).State
		tx := step.tx()
		x.must(tx)
		if got := x.contract(h).State; got != was {
			t.Fatalf("%d: %s without consent", i, got)
		}
		p, err := get[Proposal](x.s, ProposalKey(ProposalID(tx.ID())))
		if err != nil || p.Contract != h.ContractID() {
			t.Fatalf("%+v, %v", p, err)
		}
		x.must(x.consent(other, p.ID))
		if got := x.contract(h).State; got != step.want {
			t.Fatalf("%d: %s, want %s", i, got, step.want)
		}
	}
}

// However much is due at once, and however long the ledger stood still, each block does a part, and all is done.
func TestWhatIsDueIsDone(t *testing.T) {
	x := newGrid(t, "lab")
	var all []*contract.Header
	for i := range 3 * maxDue / 2 {
		h := x.header(fmt.Sprint("app-", i), func(h *contract.Header) { h.Services[0].CPUMilli, h.Services[0].Memory = 1, 16<<20 })
		x.must(x.deploy(h))
		all = append(all, h)
	}
	for _, h := range all {
		x.change(func(b *batch) {
			c, err := get[Contract](&b.State, ContractKey(h.ContractID()))
			if err != nil {
				t.Fatal(err)
			}
			if err := b.become(c, Cancelling, time.Hour); err != nil {
				t.Fatal(err)
			}
		})
	}
	count := func() (n int) {
		for _, h := range all {
			if x.contract(h).State == Cancelled {
				n++
			}
		}
		return n
	}
	x.pass(59 * time.Minute)
	if n := count(); n != 0 {
		t.Fatalf("%d ended early", n)
	}
	x.pass(30 * 24 * time.Hour)
	for range 100 {
		was := count()
		x.pass(time.Second)
		if n := count(); n > was+maxDue {
			t.Fatalf("%d ended in one block", n-was)
		}
	}
	if n := count(); n != len(all) {
		t.Fatalf("%d of %d ended", n, len(all))
	}
}
