package ledger

import (
	"testing"
	"time"

	"holdfast/contract"
	"holdfast/identity"
	"holdfast/schedule"
)

// A stranger makes accounts and revisions without end. What all strangers leave on the ledger in an hour is bounded; accounts
// that the grid knows, and what leaves nothing, do not wait for them.
func TestWhatStrangersLeaveIsBounded(t *testing.T) {
	x := newGrid(t, "lab")
	known := x.person(1)
	x.must(x.tx(KindAccountQuota, Actor{ID: x.g.GridAccount()}, &AccountQuota{known.id, OwnQuota()}, x.admin))
	h := x.header("app")
	x.must(x.deploy(h))
	x.must(x.tx(KindImageSign, Actor{ID: x.acct}, &ImageSign{[32]byte{1}, false}, x.owner))
	used, err := get[growth](x.s, growthKey)
	if err != nil || used.Bytes == 0 || used.Hour != x.at.UnixMilli()/hour {
		t.Fatalf("%+v %v", used, err)
	}
	most := DefaultLimits().Growth
	x.change(func(b *batch) { set(b, growthKey, &growth{used.Hour, most - 5000}) })
	small := x.next(h, func(n *contract.Header) { n.SealedBody = h.SealedBody; n.Services[0].Replicas = 2 })
	x.must(x.deploy(small)) // the control: there is room for one
	create := NewTx(x.g.GridID(), KindAccountCreate, Actor{}, 0, &AccountCreate{
		Devices: []identity.Device{{Name: "device", Key: identity.NewKey([32]byte{55}).Public()}}, Policy: identity.SingleDevice(), Sealing: x.open.Public(),
	})
	create.Sign(identity.NewKey([32]byte{55}))
	x.refused("an account more", create, "try later")
	x.refused("a revision more", x.deploy(x.next(small)), "try later")
	other := x.header("other", func(h *contract.Header) { h.Account = known.id })
	x.must(x.tx(KindContractSubmit, Actor{ID: known.id}, &ContractSubmit{Header: other.Encode()}, known.key)) // whatever strangers do
	x.refused("a signature more", x.tx(KindImageSign, Actor{ID: x.acct}, &ImageSign{[32]byte{2}, false}, x.owner), "try later")
	x.must(x.tx(KindImageSign, Actor{ID: x.acct}, &ImageSign{[32]byte{1}, true}, x.owner))
	x.must(x.state(small, Paused))
	x.must(x.state(small, Active))
	x.must(x.cancel(small)) // nobody is growth from leaving
	x.pass(time.Hour)
	x.must(create)
	if used, err := get[growth](x.s, growthKey); err != nil || used.Bytes != len(create.Encode()) {
		t.Errorf("the next hour begins with %+v, %v", used, err)
	}
}

func TestAFarmsNodesAreBounded(t *testing.T) {
	x := newGrid(t, "lab")
	farms := entries[identity.FarmID](t, x.s, FarmsKey)
	for range maxFarmNodes - 1 {
		x.s.fleet = append(x.s.fleet, schedule.Node{Name: "one of many", Farm: "farm-1"})
	}
	admin := Actor{ID: x.g.GridAccount()}
	x.refused("one more", x.tx(KindNodeAdmit, admin, x.admission(farms[0], 30), x.admin), "farm farm-1 has 16384 nodes")
	x.must(x.tx(KindNodeAdmit, admin, x.admission(farms[1], 31), x.admin)) // the control: of another farm
}
