package ledger

import (
	"errors"
	"fmt"
	"strings"

	"holdfast/contract"
	"holdfast/identity"
)

// ImageSignature is an account's word for an image: the transaction that put it here was signed, for this grid, as the
// account's policy asks for. Nodes and clients believe the record's proof, and need no key. It is gone when it is taken back.
type ImageSignature struct {
	Account identity.AccountID `cbor:"1,keyasint" json:"account"`
	Digest  [32]byte           `cbor:"2,keyasint" json:"-"`    // of the image's manifest for linux/amd64, which names all of the rest
	Time    int64              `cbor:"3,keyasint" json:"time"` // block time, Unix seconds
}

// How many images an account vouches for at most, without and with a quota of its own.
const (
	maxImageSignatures    = 256
	maxOwnImageSignatures = 16384
)

func (b *batch) imageSign(who *signers, p *ImageSign) error {
	if who.account == nil {
		return errors.New("only an account can do this")
	}
	id := who.account.ID
	if err := who.allowed(id, identity.ActSignImage); err != nil {
		return err
	}
	key := ImageSignatureKey(id, p.Digest)
	_, have := b.tree.get(key)
	if p.Revoke {
		if !have {
			return fmt.Errorf("there is no signature of sha256:%x: %w", p.Digest, ErrAbsent)
		}
		b.del(key)
		return errors.Join(drop(b, ImageSignaturesKey(id), p.Digest[:]), who.agreed(identity.ActSignImage))
	}
	if have {
		return fmt.Errorf("the account has signed sha256:%x already", p.Digest)
	}
	if p.Digest == ([32]byte{}) {
		return errors.New("the image's digest is missing")
	}
	most := maxImageSignatures
	if _, own := b.tree.get(QuotaKey(id)); own {
		most = maxOwnImageSignatures
	}
	n, _, err := items(&b.State, ImageSignaturesKey(id))
	if err != nil {
		return err
	}
	if n >= most {
		return fmt.Errorf("the account has signed %d images, more are not allowed: revoke those that are not used any more", n)
	}
	set(b, key, &ImageSignature{Account: id, Digest: p.Digest, Time: b.clock.Time / 1000})
	return errors.Join(push(b, ImageSignaturesKey(id), p.Digest[:]), who.agreed(identity.ActSignImage))
}

// within refuses a header that leaves its account's bounds.
func within(a *identity.Account, h *contract.Header) error {
	all := h.Outside(&a.Policy.Bounds)
	if len(all) == 0 {
		return nil
	}
	texts := make([]string, len(all))
	for i := range all {
		texts[i] = all[i].Text
	}
	if n := len(texts); n > maxTexts {
		texts = append(texts[:maxTexts], fmt.Sprintf("and %d more", n-maxTexts))
	}
	return errors.New(strings.Join(texts, "; "))
}

// maxTexts is how many reasons a refusal lists.
const maxTexts = 8
