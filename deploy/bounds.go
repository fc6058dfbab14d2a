package deploy

import (
	"context"
	"fmt"
	"strings"

	"holdfast/api"
	"holdfast/contract"
	"holdfast/identity"
	"holdfast/ledger"
)

// OutsideError refuses what leaves the bounds of its account's policy. The ledger would refuse the header, and nodes the rest.
type OutsideError []contract.Breach

func (e OutsideError) Error() string {
	texts := make([]string, len(e))
	for i := range e {
		texts[i] = e[i].Text
	}
	return "out of the bounds of the account's policy:\n  " + strings.Join(texts, "\n  ")
}

// outside finds where a revision leaves the bounds of an account's policy, as it is now.
func (u *User) outside(ctx context.Context, account identity.AccountID, h *contract.Header, b *contract.Body) ([]contract.Breach, error) {
	a, err := api.Get[identity.Account](ctx, u.Client, ledger.AccountKey(account))
	if err != nil {
		return nil, fmt.Errorf("%v: %w", account, err)
	}
	bounds := &a.Policy.Bounds
	signed, err := api.Signed(ctx, u.Client, bounds, b)
	if err != nil {
		return nil, fmt.Errorf("signatures of images: %w", err)
	}
	return append(h.Outside(bounds), b.Outside(bounds, signed)...), nil
}

// SignImage puts the account's signature on an image, by the digest of its manifest for linux/amd64, or takes it back.
func (u *User) SignImage(ctx context.Context, manifest [32]byte, revoke bool) (*ledger.Proposal, error) {
	return u.propose(ctx, ledger.KindImageSign, &ledger.ImageSign{Digest: manifest, Revoke: revoke})
}

// ImageSignatures are those of an account, in the order in which they were made.
func (u *User) ImageSignatures(ctx context.Context, account identity.AccountID) ([]*ledger.ImageSignature, error) {
	return api.List[[]byte, ledger.ImageSignature](ctx, u.Client, ledger.ImageSignaturesKey(account), func(d []byte) string {
		var digest [32]byte
		copy(digest[:], d)
		return ledger.ImageSignatureKey(account, digest)
	})
}
