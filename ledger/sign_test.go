package ledger

import (
	"testing"
	"time"

	"holdfast/contract"
	"holdfast/identity"
)

// bounded gives the owner's account bounds, after their time.
func (x *grid) bounded(b identity.Bounds) {
	x.t.Helper()
	x.must(x.tx(KindAccountPolicy, Actor{ID: x.acct}, &AccountPolicy{identity.Policy{Rules: identity.SingleDevice().Rules, Bounds: b}}, x.owner))
	x.pass(x.g.Delays.Policy)
	if a, err := get[identity.Account](x.s, AccountKey(x.acct)); err != nil || a.Policy.Bounds.IsZero() != b.IsZero() {
		x.t.Fatalf("the policy did not come: %+v, %v", a, err)
	}
}

// A client that checks nothing has the only key that a contract needs. What its header says beyond the bounds is refused.
func TestTheLedgerHoldsHeadersToBounds(t *testing.T) {
	x := newGrid(t, "lab")
	before := x.header("before", func(h *contract.Header) { h.Services[0].Egress = true })
	x.must(x.deploy(before))
	paused := x.header("paused")
	x.must(x.deploy(paused))
	x.must(x.state(paused, Paused))
	ended, ending := x.header("ended"), x.header("ending")
	x.must(x.deploy(ended))
	x.ends(x.cancel(ended))
	x.bounded(identity.Bounds{Farms: []string{"farm-1", "farm-2"}, Spread: true, NoEgress: true, Routes: []string{"apps.localhost"}})
	good := func(h *contract.Header) {
		h.Services[0].Placement.Farms, h.Routes[0].Host = []string{"farm-1"}, h.Name+".apps.localhost"
	}
	for name, tc := range map[string]struct {
		f    func(*contract.Header)
		want string
	}{
		"any farm":         {func(h *contract.Header) { h.Services[0].Placement.Farms = nil }, "add placement.farms"},
		"another farm":     {func(h *contract.Header) { h.Services[0].Placement.Farms = []string{"farm-1", "farm-3"} }, "farm farm-3"},
		"not spread":       {func(h *contract.Header) { h.Services[0].Replicas = 2 }, "placement.spread"},
		"egress":           {func(h *contract.Header) { h.Services[0].Egress = true }, "no egress"},
		"another's domain": {func(h *contract.Header) { h.Routes[0].Host = "bank.localhost" }, "bank.localhost"},
	} {
		x.refused(name, x.deploy(x.header("app", good, tc.f)), tc.want)
	}
	h := x.header("app", good)
	x.must(x.deploy(h)) // the control
	// However small a revision is.
	x.refused("a scaling", x.deploy(x.next(h, func(n *contract.Header) { n.SealedBody = h.SealedBody; n.Services[0].Replicas = 2 })), "placement.spread")
	x.refused("a routing", x.deploy(x.next(h, func(n *contract.Header) {
		n.SealedBody, n.Routes = h.SealedBody, []contract.Route{{Host: "x.localhost", Service: "web", Port: 80}}
	})), "x.localhost")
	// What ran goes on, and can change only into what is within.
	if c := x.contract(before); c.State != Active || len(x.assigned(before)) != 1 {
		t.Errorf("what ran before does not go on: %+v", c)
	}
	x.refused("the next revision of what ran before", x.deploy(x.next(before)), "no egress")
	x.must(x.deploy(x.next(before, good, func(n *contract.Header) { n.Services[0].Egress = false })))
	// What stands still does not come back as it was; what is about to end can be kept from that.
	x.refused("a pause that ends", x.state(paused, Active), "add placement.farms")
	x.refused("an end that is taken back", x.state(ended, Active), "add placement.farms")
	x.bounded(identity.Bounds{})
	x.must(x.state(paused, Active))
	x.must(x.state(ended, Active))
	x.must(x.deploy(ending))
	x.must(x.cancel(ending))
	x.change(func(b *batch) {
		a, err := get[identity.Account](&b.State, AccountKey(x.acct))
		if err != nil {
			t.Fatal(err)
		}
		a.Policy.Bounds = identity.Bounds{Farms: []string{"farm-1"}}
		set(b, AccountKey(a.ID), a)
	})
	x.must(x.state(ending, Active))
}

// A proposal is judged by the bounds of the time when it comes true.
func TestBoundsOfAProposalAreThoseOfItsEnd(t *testing.T) {
	x := newGrid(t, "lab")
	other := x.person(1)
	h := x.header("app", func(h *contract.Header) { h.Services[0].Egress = true }, approvals(approval("code", 1, ones(other))))
	tx := x.deploy(h)
	x.must(tx)
	x.bounded(identity.Bounds{NoEgress: true})
	x.refused("consent to what was within", x.consent(other, ProposalID(tx.ID())), "no egress")
	if !x.absent(h) {
		t.Fatal("it came true")
	}
	x.bounded(identity.Bounds{})
	x.must(x.consent(other, ProposalID(tx.ID())))
	if x.absent(h) {
		t.Error("control: it does not come true without the bound")
	}
}

// Whoever wants the bounds away needs what every rule needs, and waits.
func TestBoundsAreNotTakenAwayByOneDevice(t *testing.T) {
	x := newGrid(t, "lab")
	second := identity.NewKey([32]byte{41})
	p := x.person(1, second)
	me := Actor{ID: p.id}
	tight := identity.Policy{Rules: []identity.Rule{{Act: identity.ActDefault, Threshold: 1}, {Act: identity.ActPolicy, Threshold: 2}}, Bounds: identity.Bounds{NoEgress: true, Signers: []identity.AccountID{p.id}}}
	loose := tight
	loose.Bounds = identity.Bounds{}
	set := func(pol identity.Policy, keys ...*identity.PrivateKey) *Tx {
		return x.tx(KindAccountPolicy, me, &AccountPolicy{pol}, keys...)
	}
	unknown := tight
	unknown.Bounds.Signers = []identity.AccountID{{7}}
	x.refused("a signer that is no account", set(unknown, p.key), "not on the ledger")
	unsorted := tight
	unsorted.Bounds.Routes = []string{"b", "a"}
	x.refused("bounds that are not in order", set(unsorted, p.key), "not sorted")
	x.must(set(tight, p.key))
	x.pass(x.g.Delays.Policy)
	egress := x.header("app", func(h *contract.Header) { h.Account, h.Services[0].Egress = p.id, true })
	deploy := func() *Tx { return x.tx(KindContractSubmit, me, &ContractSubmit{Header: egress.Encode()}, p.key) }
	x.refused("egress", deploy(), "no egress")
	x.refused("one device loosens them", set(loose, p.key), `"change-policy" needs 2`)
	x.must(set(loose, p.key, second))
	x.refused("before the time is over", deploy(), "no egress")
	x.pass(x.g.Delays.Policy + time.Second)
	x.must(deploy()) // the control
}

func TestImageSignatures(t *testing.T) {
	x := newGrid(t, "lab")
	second := identity.NewKey([32]byte{41})
	review, other := x.person(1, second), x.person(2)
	me := Actor{ID: review.id}
	sign := func(d byte, revoke bool, keys ...*identity.PrivateKey) *Tx {
		return x.tx(KindImageSign, me, &ImageSign{[32]byte{d}, revoke}, keys...)
	}
	has := func(who identity.AccountID, d byte) bool {
		s, err := get[ImageSignature](x.s, ImageSignatureKey(who, [32]byte{d}))
		return err == nil && s.Account == who && s.Digest == [32]byte{d} && s.Time == x.at.Unix()
	}
	x.must(sign(1, false, review.key))
	if !has(review.id, 1) || has(review.id, 2) || has(other.id, 1) {
		t.Error("the signature is not there, or another is")
	}
	x.refused("once more", sign(1, false, review.key), "already")
	x.refused("nothing", sign(0, false, review.key), "missing")
	x.refused("by another's key", sign(2, false, other.key), "not a key of the actor")
	x.refused("taking back what is not there", sign(2, true, review.key), "no signature")
	x.refused("another's, taken back", x.tx(KindImageSign, Actor{ID: other.id}, &ImageSign{[32]byte{1}, true}, other.key), "no signature")
	forged := sign(3, false, review.key)
	forged.Grid[0]++
	forged.Signatures = nil
	forged.Sign(review.key)
	x.refused("for another grid", forged, "this is")
	x.must(sign(1, true, review.key))
	if has(review.id, 1) || len(entries[[]byte](t, x.s, ImageSignaturesKey(review.id))) != 0 {
		t.Error("it is there after it was taken back")
	}
	x.must(sign(1, false, review.key)) // it can be given again
	// Who may sign is the policy's affair: two of two here, and another account has a say.
	x.must(x.tx(KindAccountPolicy, me, &AccountPolicy{identity.Policy{
		Rules:     []identity.Rule{{Act: identity.ActDefault, Threshold: 1}, {Act: identity.ActSignImage, Threshold: 2}},
		Approvals: []identity.Approval{approval("legal", 1, ones(other), identity.ActSignImage)},
	}}, review.key))
	x.pass(x.g.Delays.Policy)
	x.refused("one of two", sign(4, false, review.key), `"sign-image" needs 2`)
	x.refused("one of two takes back", sign(1, true, review.key), `"sign-image" needs 2`)
	tx := sign(4, false, review.key, second)
	x.must(tx)
	if has(review.id, 4) {
		t.Fatal("it is there without the other's say")
	}
	x.must(x.consent(other, ProposalID(tx.ID())))
	if !has(review.id, 4) {
		t.Error("control: with it, it is not")
	}
	// Accounts cost nothing: what each can have is bounded.
	for i := range maxImageSignatures {
		x.must(x.tx(KindImageSign, Actor{ID: other.id}, &ImageSign{[32]byte{5, byte(i), byte(i >> 8)}, false}, other.key))
	}
	x.refused("one too many", x.tx(KindImageSign, Actor{ID: other.id}, &ImageSign{[32]byte{6}, false}, other.key), "more are not allowed")
	x.must(x.tx(KindImageSign, Actor{ID: other.id}, &ImageSign{[32]byte{5}, true}, other.key))
	x.must(x.tx(KindImageSign, Actor{ID: other.id}, &ImageSign{[32]byte{6}, false}, other.key))
}
