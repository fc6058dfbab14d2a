package ledger

import (
	"testing"

	"holdfast/identity"
)

// Signatures are not signed themselves: whoever passes a transaction on can take some off it. What is left is refused, and
// must not use up the nonce of the whole.
func TestTakingSignaturesOffEndsNothing(t *testing.T) {
	x := newGrid(t, "lab")
	a, b := identity.NewKey([32]byte{31}), identity.NewKey([32]byte{32})
	tx := NewTx(x.g.GridID(), KindAccountCreate, Actor{}, 0, &AccountCreate{
		Devices: []identity.Device{{Name: "a", Key: a.Public()}, {Name: "b", Key: b.Public()}},
		Policy: identity.Policy{Rules: []identity.Rule{
			{Act: identity.ActDefault, Threshold: 2}, {Act: identity.ActCreate, Threshold: 1}, // one may begin, both must change
		}},
		Sealing: x.open.Public(),
	})
	tx.Sign(a)
	tx.Sign(b)
	x.must(tx)
	x.acct = identity.AccountID(tx.ID())
	h := x.header("app")
	x.must(x.deploy(h, a))
	next := *h
	next.Revision, next.Contract, next.Previous, next.SealedSize = 2, h.ContractID(), h.RevisionID(), 101
	whole := x.deploy(&next, a, b)
	for _, s := range whole.Signatures {
		less := *whole
		less.Signatures = []TxSignature{s}
		x.refused("one signature of two", &less, "needs 2 signatures")
	}
	stolen := x.tx(KindContractCancel, Actor{ID: x.acct}, &ContractCancel{}, a) // nonsense, by one stolen device
	x.refused("nonsense by one of two", stolen, "not on the ledger")
	x.must(whole)
}
