package ledger

import (
	"fmt"
	"strings"
	"testing"

	"holdfast/contract"
	"holdfast/identity"
)

// AccountUsed is what a Quota counts.
type AccountUsed = Quota

// A stranger makes as many accounts as he likes. Together they get what the grid leaves to strangers, and no more.
func TestManyAccountsShareOneQuota(t *testing.T) {
	small := Quota{Contracts: 6, Workloads: 30, Networks: 9, Hosts: 9}
	for _, tc := range []struct {
		what string
		edit func(h *contract.Header, i int)
	}{
		{"contracts", func(*contract.Header, int) {}},
		{"workloads", func(h *contract.Header, _ int) { h.Services[0].Replicas = 7 }},
		{"networks", func(h *contract.Header, _ int) {
			h.Networks = []string{"a", "b", "c"}
			h.Services = nil
			for _, n := range h.Networks {
				h.Services = append(h.Services, contract.Service{Name: n, CPUMilli: 1, Memory: 16 << 20, Pids: 1, Networks: []string{n}})
			}
			h.Routes = nil
		}},
		{"hosts", func(h *contract.Header, i int) {
			h.Routes = nil
			for j := range 4 {
				h.Routes = append(h.Routes, contract.Route{Host: fmt.Sprintf("h%d.x%d.test", j, i), Service: "web", Port: 1})
			}
		}},
	} {
		t.Run(tc.what, func(t *testing.T) {
			x := newGrid(t, "lab")
			x.change(func(b *batch) {
				g := *x.g // the grid's ID stays that of newGrid
				g.Limits = Limits{Shared: small}
				set(b, genesisKey, &g)
				b.birth = &g
			})
			known := x.acct
			x.must(x.deploy(x.header("before")))
			strangers := x.accounts(8)
			refusal := ""
			deployed := map[identity.AccountID]*contract.Header{}
			for i, a := range strangers {
				x.acct = a
				h := x.header(fmt.Sprintf("c%d", i))
				tc.edit(h, i)
				if r := x.submit(x.deploy(h)); r.Code != CodeOK {
					refusal = r.Log
					break
				}
				deployed[a] = h
			}
			if !strings.Contains(refusal, tc.what) || !strings.Contains(refusal, "ask the grid for a quota") {
				t.Fatalf("eight accounts of a stranger: %q", refusal)
			}
			last := x.acct // the account that was refused
			x.acct = known
			more := x.header("more")
			tc.edit(more, 99)
			x.refused("the one whom the grid does not know yet", x.deploy(more), "ask the grid for a quota")
			x.refused("a quota that the account gives itself", x.tx(KindAccountQuota, Actor{ID: known}, &AccountQuota{known, Quota{9, 99, 99, 99, 0}}, x.owner), "only acct1")
			give := func(a identity.AccountID, q Quota) *Tx {
				return x.tx(KindAccountQuota, Actor{ID: x.g.GridAccount()}, &AccountQuota{a, q}, x.admin)
			}
			x.refused("a quota for nobody", give(identity.AccountID{9}, small), "not on the ledger")
			x.refused("a quota below zero", give(known, Quota{Hosts: -1}), "a quota of")
			before, _ := get[Quota](x.s, SharedKey)
			x.must(give(known, Quota{9, 99, 99, 99, 0}))
			if after, err := get[Quota](x.s, SharedKey); err != nil || *after != before.plus(Quota{1, 1, 1, 1, 0}, -1) {
				t.Errorf("what is shared was %+v and is %+v, %v", *before, after, err)
			}
			x.must(x.deploy(more)) // whatever strangers do
			x.must(give(known, Quota{}))
			x.refused("above a quota that shrank", x.deploy(x.header("third")), "the account would have")
			less := successor(more, func(h *contract.Header) { h.Routes = nil })
			x.must(x.deploy(less)) // less is always allowed

			// Who leaves makes room for others.
			x.acct = strangers[0]
			x.ends(x.tx(KindContractCancel, Actor{ID: x.acct}, &ContractCancel{deployed[x.acct].ContractID()}, x.owner))
			x.acct = last
			h := x.header("late")
			tc.edit(h, 50)
			x.must(x.deploy(h))
			x.ends(x.tx(KindContractCancel, Actor{ID: x.acct}, &ContractCancel{h.ContractID()}, x.owner))
			for a, h := range deployed {
				if a != strangers[0] {
					x.ends(x.tx(KindContractCancel, Actor{ID: a}, &ContractCancel{h.ContractID()}, x.owner))
				}
			}
			if all, err := get[Quota](x.s, SharedKey); err != nil || *all != (Quota{}) {
				t.Errorf("all have gone, and what is shared is %+v, %v", all, err)
			}
		})
	}
}
