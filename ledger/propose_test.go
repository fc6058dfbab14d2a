package ledger

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"holdfast/contract"
	"holdfast/identity"
)

// person is an account with a device of its own.
type person struct {
	id  identity.AccountID
	key *identity.PrivateKey
}

func (x *grid) person(seed byte, devices ...*identity.PrivateKey) person {
	x.t.Helper()
	p := person{key: identity.NewKey([32]byte{99, seed})}
	c := &AccountCreate{Policy: identity.SingleDevice(), Sealing: x.open.Public()}
	for i, k := range append([]*identity.PrivateKey{p.key}, devices...) {
		c.Devices = append(c.Devices, identity.Device{Name: fmt.Sprint("device-", i), Key: k.Public()})
	}
	tx := NewTx(x.g.GridID(), KindAccountCreate, Actor{}, 0, c)
	for _, k := range append([]*identity.PrivateKey{p.key}, devices...) {
		tx.Sign(k)
	}
	x.must(tx)
	p.id = identity.AccountID(tx.ID())
	return p
}

func (x *grid) consent(p person, to ProposalID) *Tx {
	return x.tx(KindConsent, Actor{ID: p.id}, &Consent{to}, p.key)
}

func (x *grid) opened(a identity.AccountID) []ProposalID {
	x.t.Helper()
	return entries[ProposalID](x.t, x.s, ProposalsKey(a))
}

func (x *grid) contract(h *contract.Header) *Contract {
	x.t.Helper()
	c, err := get[Contract](x.s, ContractKey(h.ContractID()))
	if err != nil {
		x.t.Fatal(err)
	}
	return c
}

func (x *grid) absent(h *contract.Header) bool {
	_, ok := x.s.tree.get(ContractKey(h.ContractID()))
	return !ok
}

func (x *grid) next(h *contract.Header, f ...func(*contract.Header)) *contract.Header {
	n := *h
	n.Services = slices.Clone(h.Services)
	n.Revision, n.Contract, n.Previous = h.Revision+1, h.ContractID(), h.RevisionID()
	n.SealedBody[0]++
	for _, g := range f {
		g(&n)
	}
	return &n
}

func approvals(all ...identity.Approval) func(*contract.Header) {
	return func(h *contract.Header) { h.Approvals = all }
}

func approval(name string, need uint16, weights map[identity.AccountID]uint16, acts ...identity.Act) identity.Approval {
	a := identity.Approval{Name: name, Need: need, Acts: acts}
	for id, w := range weights {
		a.Parties = append(a.Parties, identity.Party{Account: id, Weight: w})
	}
	slices.SortFunc(a.Parties, func(p, q identity.Party) int { return slices.Compare(p.Account[:], q.Account[:]) })
	return a
}

func ones(ps ...person) map[identity.AccountID]uint16 {
	m := map[identity.AccountID]uint16{}
	for _, p := range ps {
		m[p.id] = 1
	}
	return m
}

// A contract with three approvals is nothing before each has its weight, whoever else consents or does not.
func TestApprovals(t *testing.T) {
	x := newGrid(t, "lab")
	coder, lawyer, boss, cfo, clerk, stranger := x.person(1), x.person(2), x.person(3), x.person(4), x.person(5), x.person(6)
	h := x.header("app", approvals(
		approval("budget", 3, map[identity.AccountID]uint16{boss.id: 2, cfo.id: 1, clerk.id: 1}),
		approval("code", 1, map[identity.AccountID]uint16{coder.id: 1, clerk.id: 1}),
		approval("legal", 1, ones(lawyer)),
	))
	tx := x.deploy(h)
	tx.Payload = NewTx(tx.Grid, tx.Kind, tx.Actor, tx.Nonce, &ContractSubmit{Header: h.Encode(), Envelopes: []contract.Envelope{
		{Revision: h.RevisionID(), Kind: contract.RecipientAccount, Recipient: lawyer.id, Sealed: []byte("sealed")},
	}}).Payload
	tx.Signatures = nil
	tx.Sign(x.owner)
	x.must(tx)
	id := ProposalID(tx.ID())
	if got := x.opened(x.acct); !x.absent(h) || len(got) != 1 || got[0] != id {
		t.Fatalf("it is there without consent, or not proposed: %v", got)
	}
	if asked := entries[ProposalID](t, x.s, AskedKey(cfo.id)); len(asked) != 1 || asked[0] != id {
		t.Errorf("who has a say is asked %v", asked)
	}
	x.refused("a stranger's consent", x.consent(stranger, id), "has no say")
	x.refused("the proposer's own", x.tx(KindConsent, Actor{ID: x.acct}, &Consent{id}, x.owner), "by that")
	x.refused("what is not there", x.consent(boss, ProposalID{1}), "not on the ledger")
	x.must(x.consent(boss, id)) // 2 of 3
	x.refused("twice", x.consent(boss, id), "already")
	x.must(x.consent(coder, id))
	x.refused("code has enough, cfo and clerk have a say in budget: a stranger still has none", x.consent(stranger, id), "has no say")
	x.must(x.consent(lawyer, id))
	if !x.absent(h) {
		t.Fatal("budget has 2 of 3")
	}
	x.must(x.consent(cfo, id)) // the clerk is not needed
	if c := x.contract(h); c.State != Active || len(x.assigned(h)) != 1 || len(x.opened(x.acct)) != 0 {
		t.Errorf("%+v", c)
	}
	if _, ok := x.s.tree.get(EnvelopeKey(h.RevisionID(), contract.RecipientAccount, lawyer.id)); !ok {
		t.Error("who had a say has no envelope")
	}
	if asked := entries[ProposalID](t, x.s, AskedKey(clerk.id)); len(asked) != 0 {
		t.Errorf("after the fact the clerk is asked %v", asked)
	}
	x.refused("after the fact", x.consent(clerk, id), "not on the ledger")
	x.refused("an envelope for a stranger", x.tx(KindEnvelopePut, Actor{ID: x.acct}, &EnvelopePut{[]contract.Envelope{
		{Revision: h.RevisionID(), Kind: contract.RecipientAccount, Recipient: stranger.id, Sealed: []byte("sealed")},
	}}, x.owner), "another account")
	x.refused("a party that is no account", x.deploy(x.header("other", approvals(approval("x", 1, map[identity.AccountID]uint16{{7}: 1})))), "not on the ledger")
}

// Whoever has the owner's key, and no other, cannot take the others' say away, whatever it is a say in.
func TestNobodyDropsHisCoSigners(t *testing.T) {
	for name, acts := range map[string][]identity.Act{"of all": nil, "of cancelling": {identity.ActCancel}, "of creating and revising": {identity.ActCreate, identity.ActRevise}} {
		for what, change := range map[string]func(*contract.Header, *identity.Approval){
			"dropped":  func(h *contract.Header, _ *identity.Approval) { h.Approvals = nil },
			"narrowed": func(h *contract.Header, a *identity.Approval) { a.Acts = []identity.Act{identity.ActScale} },
			"replaced": func(h *contract.Header, a *identity.Approval) {
				a.Need, a.Parties = 1, []identity.Party{{Account: h.Account, Weight: 1}}
			},
			"lightened": func(h *contract.Header, a *identity.Approval) {
				a.Parties = append(slices.Clone(a.Parties), identity.Party{Account: h.Account, Weight: 1})
			},
		} {
			x := newGrid(t, "lab")
			other, third := x.person(1), x.person(2)
			h := x.header("app", approvals(approval("two", 2, ones(other, third), acts...)))
			tx := x.deploy(h)
			x.must(tx)
			if x.absent(h) {
				x.must(x.consent(other, ProposalID(tx.ID())))
				x.must(x.consent(third, ProposalID(tx.ID())))
			}
			n := x.next(h, func(n *contract.Header) {
				a := n.Approvals[0]
				n.Approvals = []identity.Approval{a}
				change(n, &a)
				if len(n.Approvals) > 0 {
					n.Approvals[0] = a
				}
			})
			tx = x.deploy(n)
			if r := x.submit(tx); r.Code != CodeOK {
				t.Fatalf("%s, %s: %s", name, what, r.Log)
			}
			if c := x.contract(h); c.Revision != 1 {
				t.Errorf("%s: %s by the owner's key alone", name, what)
			}
			if len(x.opened(x.acct)) == 1 { // control: with their consent it goes
				x.must(x.consent(other, ProposalID(tx.ID())))
				x.must(x.consent(third, ProposalID(tx.ID())))
			}
			if c := x.contract(h); c.Revision != 2 {
				t.Errorf("%s: %s with all consent did not come true", name, what)
			}
		}
	}
}

// Scaling and routing are acts of their own only while the body stays.
func TestActsOfARevision(t *testing.T) {
	x := newGrid(t, "lab")
	other := x.person(1)
	h := x.header("app", approvals(approval("code", 1, ones(other), identity.ActCreate, identity.ActRevise)))
	tx := x.deploy(h)
	x.must(tx)
	x.must(x.consent(other, ProposalID(tx.ID())))
	same := func(n *contract.Header) { n.SealedBody = h.SealedBody }
	scaled := x.next(h, same, func(n *contract.Header) { n.Services[0].Replicas = 2 })
	x.must(x.deploy(scaled))
	if c := x.contract(h); c.Revision != 2 || len(x.assigned(h)) != 2 {
		t.Fatalf("scaling needs no consent here: %+v", c)
	}
	routed := x.next(scaled, same, func(n *contract.Header) { n.Routes = []contract.Route{{Host: "b.localhost", Service: "web", Port: 80}} })
	x.must(x.deploy(routed))
	if c := x.contract(h); c.Revision != 3 {
		t.Fatalf("routing needs no consent here: %+v", c)
	}
	for name, n := range map[string]*contract.Header{
		"scale with another body":  x.next(routed, func(n *contract.Header) { n.Services[0].Replicas = 3 }),
		"scale with other limits":  x.next(routed, same, func(n *contract.Header) { n.Services[0].Replicas = 3; n.Services[0].Memory++ }),
		"routes and replicas":      x.next(routed, same, func(n *contract.Header) { n.Routes = nil; n.Services[0].Replicas = 3 }),
		"scale, and one more key":  x.next(routed, same, func(n *contract.Header) { n.Services[0].Replicas = 3; n.KeyCommitment[0]++ }),
		"route, and egress opened": x.next(routed, same, func(n *contract.Header) { n.Routes = nil; n.Services[0].Egress = true }),
	} {
		tx := x.deploy(n)
		x.must(tx)
		if c := x.contract(h); c.Revision != 3 {
			t.Errorf("%s is taken for a small change", name)
		}
		x.must(x.tx(KindWithdraw, Actor{ID: x.acct}, &Withdraw{ProposalID(tx.ID())}, x.owner))
	}
}

// Whoever may only scale spends a nonce with a scaling that is refused, takes back what he proposed, and spends none with
// what he may not do.
func TestWhoMayOnlyScale(t *testing.T) {
	x := newGrid(t, "lab")
	second := identity.NewKey([32]byte{41})
	p := x.person(1, second)
	other := x.person(2)
	me := Actor{ID: p.id}
	submit := func(h *contract.Header, keys ...*identity.PrivateKey) *Tx {
		return x.tx(KindContractSubmit, me, &ContractSubmit{Header: h.Encode()}, keys...)
	}
	x.must(x.tx(KindAccountPolicy, me, &AccountPolicy{identity.Policy{Rules: []identity.Rule{
		{Act: identity.ActDefault, Threshold: 2}, {Act: identity.ActScale, Threshold: 1},
	}}}, p.key))
	x.pass(10 * time.Second)
	h := x.header("app", func(h *contract.Header) { h.Account = p.id }, approvals(approval("ops", 1, ones(other), identity.ActScale)))
	x.must(submit(h, p.key, second))
	scaled := func(n uint16) *contract.Header {
		return x.next(h, func(n *contract.Header) { n.SealedBody = h.SealedBody }, func(s *contract.Header) { s.Services[0].Replicas = n })
	}
	last := x.nonce[me]
	x.refused("a revision by one device", submit(x.next(h), p.key), `"revise" needs 2`)
	if x.nonce[me] != last {
		t.Error("what one device may not do has spent a nonce")
	}
	stale := scaled(2)
	stale.Previous[0]++
	x.refused("a scaling of something else", submit(stale, p.key), "plan again")
	if x.nonce[me] != last+1 {
		t.Error("a refused scaling can come true later")
	}
	tx := submit(scaled(2), p.key)
	x.must(tx)
	x.must(x.tx(KindWithdraw, me, &Withdraw{ProposalID(tx.ID())}, p.key))
	tx = submit(scaled(2), p.key)
	x.must(tx)
	x.must(x.consent(other, ProposalID(tx.ID())))
	if c := x.contract(h); c.Revision != 2 {
		t.Errorf("%+v", c)
	}
}

// What is proposed is judged when it comes true, by the policy and the contract of then.
func TestProposalsAreJudgedWhenTheyComeTrue(t *testing.T) {
	x := newGrid(t, "lab")
	other, third := x.person(1), x.person(2)
	h := x.header("app", approvals(approval("code", 1, ones(other), identity.ActCreate, identity.ActRevise)))
	tx := x.deploy(h)
	x.must(tx)
	x.must(x.consent(other, ProposalID(tx.ID())))
	late := x.deploy(x.next(h))
	x.must(late)
	// A revision that comes first makes it stale.
	first := x.next(h, func(n *contract.Header) { n.SealedBody = h.SealedBody; n.Services[0].Replicas = 2 })
	x.must(x.deploy(first))
	x.refused("consent to a stale one", x.consent(other, ProposalID(late.ID())), "plan again")
	// A stricter policy asks more of what was proposed before it.
	again := x.deploy(x.next(first))
	x.must(again)
	x.must(x.tx(KindAccountPolicy, Actor{ID: x.acct}, &AccountPolicy{identity.Policy{Rules: identity.SingleDevice().Rules, Approvals: []identity.Approval{approval("audit", 1, ones(third))}}}, x.owner))
	x.pass(10 * time.Second)
	x.must(x.consent(other, ProposalID(again.ID())))
	if c := x.contract(h); c.Revision != 2 {
		t.Fatal("the policy of its time counts")
	}
	x.must(x.consent(third, ProposalID(again.ID())))
	if c := x.contract(h); c.Revision != 3 {
		t.Fatal("all have consented")
	}
	// One that nobody takes up ends.
	x.must(x.deploy(x.next(x.next(first))))
	left := len(x.opened(x.acct))
	x.pass(20 * time.Minute)
	if now := len(x.opened(x.acct)); left != 2 || now != 0 {
		t.Errorf("%d are open, and %d after their time", left, now)
	}
}

// A policy is changed by what all its rules ask for, and takes effect late enough to be seen and taken back.
func TestPolicyChanges(t *testing.T) {
	x := newGrid(t, "lab")
	second, third := identity.NewKey([32]byte{31}), identity.NewKey([32]byte{32})
	p := x.person(1, second, third)
	me := Actor{ID: p.id}
	policy := func() identity.Policy {
		t.Helper()
		a, err := get[identity.Account](x.s, AccountKey(p.id))
		if err != nil {
			t.Fatal(err)
		}
		return a.Policy
	}
	change := func(pol identity.Policy, keys ...*identity.PrivateKey) *Tx {
		return x.tx(KindAccountPolicy, me, &AccountPolicy{pol}, keys...)
	}
	strict := identity.Policy{Rules: []identity.Rule{{Act: identity.ActDefault, Threshold: 1}, {Act: identity.ActCancel, Threshold: 2}, {Act: identity.ActApprove, Threshold: 2}}}
	tx := change(strict, p.key)
	x.must(tx)
	if got := policy(); len(got.Rules) != 1 {
		t.Fatal("it took effect at once")
	}
	x.pass(10 * time.Second)
	if got := policy(); len(got.Rules) != 3 || len(x.opened(p.id)) != 0 {
		t.Fatalf("%+v", got)
	}
	// A thief of one device gets at nothing that two are needed for, and not at the policy.
	x.refused("by one device", change(identity.SingleDevice(), p.key), `"change-policy" needs 2`)
	x.refused("a rule nobody can satisfy", change(identity.Policy{Rules: []identity.Rule{{Act: identity.ActDefault, Threshold: 4}}}, p.key, second), "needs 4 signatures of 3")
	// Two devices decide, and can take it back in time.
	tx = change(identity.SingleDevice(), p.key, second)
	x.must(tx)
	x.refused("withdrawn by one device", x.tx(KindWithdraw, me, &Withdraw{ProposalID(tx.ID())}, third), "signatures that proposing needs")
	x.must(x.tx(KindWithdraw, me, &Withdraw{ProposalID(tx.ID())}, second, third))
	x.pass(time.Minute)
	if got := policy(); len(got.Rules) != 3 {
		t.Fatal("it was taken back")
	}
	// An approval that is of one act has a say in the policy too: else it could be taken out.
	other := x.person(2)
	held := strict
	held.Approvals = []identity.Approval{approval("watch", 1, ones(other), identity.ActCancel)}
	x.must(change(held, p.key, second))
	x.pass(10 * time.Second)
	tx = change(strict, p.key, second, third)
	x.must(tx)
	x.pass(30 * time.Second)
	if got := policy(); len(got.Approvals) != 1 {
		t.Fatal("the account took its co-signer out alone")
	}
	x.must(x.consent(other, ProposalID(tx.ID())))
	if got := policy(); len(got.Approvals) != 1 {
		t.Fatal("it took effect at once")
	}
	x.pass(10 * time.Second)
	if got := policy(); len(got.Approvals) != 0 {
		t.Fatal("all consented, and its time has come")
	}
}

// Accounts cost nothing: proposals of many leave room for those that the grid knows.
func TestProposalsAreBounded(t *testing.T) {
	x := newGrid(t, "lab")
	other := x.person(1)
	say := approvals(approval("code", 1, ones(other)))
	n := 0
	propose := func(a identity.AccountID) Result {
		n++
		h := x.header(fmt.Sprint("app-", n), say, func(h *contract.Header) { h.Account = a })
		return x.submit(x.tx(KindContractSubmit, Actor{ID: a}, &ContractSubmit{Header: h.Encode()}, x.owner))
	}
	var full int
	for _, a := range x.accounts(maxSharedProposals/MaxAccountProposals + 1) {
		for range MaxAccountProposals + 1 {
			if r := propose(a); r.Code != CodeOK {
				full++
			}
		}
	}
	if want := maxSharedProposals/MaxAccountProposals + MaxAccountProposals + 1; full != want {
		t.Errorf("%d were refused, %d are beyond", full, want)
	}
	x.must(x.tx(KindAccountQuota, Actor{ID: x.g.GridAccount()}, &AccountQuota{x.acct, OwnQuota()}, x.admin))
	if r := propose(x.acct); r.Code != CodeOK {
		t.Errorf("an account that the grid knows: %s", r.Log)
	}
	x.pass(20 * time.Minute)
	x.pass(time.Second)
	x.pass(time.Second)
	if r := propose(x.accounts(1)[0]); r.Code != CodeOK {
		t.Errorf("after their time: %s", r.Log)
	}
}
