package api

import (
	"context"
	"slices"

	"holdfast/contract"
	"holdfast/identity"
	"holdfast/ledger"
)

// Signed reads which images of a body have which of the signatures that bounds ask for. What it returns says of no other that
// it is there, and after an error of none.
func Signed(ctx context.Context, r Reader, b *identity.Bounds, body *contract.Body) (func(identity.AccountID, [32]byte) bool, error) {
	type pair struct {
		by identity.AccountID
		of [32]byte
	}
	var pairs []pair
	var keys []string
	for i := range body.Services {
		digest, err := body.Services[i].Image.Digest()
		if err != nil {
			continue // a front end has none; of any other it is a breach
		}
		for _, id := range b.Signers {
			if p := (pair{id, digest}); !slices.Contains(pairs, p) {
				pairs, keys = append(pairs, p), append(keys, ledger.ImageSignatureKey(id, digest))
			}
		}
	}
	all, err := GetAll[ledger.ImageSignature](ctx, r, keys)
	if err != nil {
		return func(identity.AccountID, [32]byte) bool { return false }, err
	}
	return func(by identity.AccountID, of [32]byte) bool {
		i := slices.Index(pairs, pair{by, of})
		return i >= 0 && all[i] != nil && all[i].Account == by && all[i].Digest == of
	}, nil
}
