package ledger

import (
	"fmt"
	"testing"

	"holdfast/contract"
	"holdfast/identity"
)

func TestTemplates(t *testing.T) {
	x := newGrid(t, "lab")
	other := x.person(1)
	publish := func(p person, name, version string, f ...func(*TemplatePublish)) *Tx {
		pub := &TemplatePublish{name, version, [32]byte{1}, 100}
		for _, g := range f {
			g(pub)
		}
		return x.tx(KindTemplate, Actor{ID: p.id}, pub, p.key)
	}
	me := person{x.acct, x.owner}
	x.must(publish(me, "blog", "1.0"))
	x.must(publish(me, "blog", "1.1"))
	x.must(publish(other, "blog", "1.0")) // a name is the account's
	x.refused("a version that is there", publish(me, "blog", "1.0", func(p *TemplatePublish) { p.Digest[0]++ }), "never changed")
	x.refused("no name", publish(me, "", "1"), "name")
	x.refused("a path", publish(me, "../x", "1"), "name")
	x.refused("no version", publish(me, "blog", ""), "version")
	x.refused("an odd version", publish(me, "blog", "v 1"), "version")
	x.refused("nothing in it", publish(me, "blog", "2", func(p *TemplatePublish) { p.Size = 0 }), "0 bytes")
	x.refused("too much", publish(me, "blog", "2", func(p *TemplatePublish) { p.Size = contract.MaxCompose + 1 }), "bytes")
	x.refused("another's key", x.tx(KindTemplate, Actor{ID: x.acct}, &TemplatePublish{"blog", "2", [32]byte{}, 1}, other.key), "not a key of the actor")
	got, err := get[Template](x.s, TemplateKey(x.acct, "blog", "1.0"))
	if err != nil || got.Digest != ([32]byte{1}) || got.Account != x.acct {
		t.Errorf("%+v, %v", got, err)
	}
	if all := entries[string](t, x.s, TemplatesKey(x.acct)); len(all) != 2 || all[1] != "blog@1.1" {
		t.Errorf("%v", all)
	}
	// Accounts cost nothing: what each can have is bounded.
	for i := 1; i < maxTemplates; i++ {
		x.must(publish(other, "blog", fmt.Sprint("2.", i)))
	}
	x.refused("one too many", publish(other, "blog", "3"), "more are not allowed")
	// Others can have a say in it.
	x.must(x.tx(KindAccountPolicy, Actor{ID: x.acct}, &AccountPolicy{identity.Policy{Rules: identity.SingleDevice().Rules, Approvals: []identity.Approval{approval("review", 1, ones(other), identity.ActPublish)}}}, x.owner))
	x.pass(x.g.Delays.Policy)
	tx := publish(me, "blog", "4")
	x.must(tx)
	if _, err := get[Template](x.s, TemplateKey(x.acct, "blog", "4")); err == nil {
		t.Fatal("published without a review")
	}
	x.must(x.consent(other, ProposalID(tx.ID())))
	if _, err := get[Template](x.s, TemplateKey(x.acct, "blog", "4")); err != nil {
		t.Fatal(err)
	}
}
