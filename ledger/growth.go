package ledger

import (
	"errors"
	"fmt"

	"holdfast/identity"
)

// growth is how many bytes of transactions accounts without a quota of their own had executed, in the hour that Hour counts since
// 1970. What they leave (accounts, revisions, envelopes) stays in every validator's memory for good, and an account costs
// nothing, so that neither a bound on each nor a price stops a stranger: how fast all of them grow together does.
type growth struct {
	Hour  int64 `cbor:"1,keyasint"`
	Bytes int   `cbor:"2,keyasint"`
}

const hour = 3600 * 1000 // milliseconds

// leaves reports whether a transaction of an account leaves more than it found.
func leaves(tx *Tx) bool {
	switch tx.Kind {
	case KindAccountCreate, KindContractSubmit, KindEnvelopePut, KindTemplate:
		return true
	case KindImageSign:
		p, err := Payload[ImageSign](tx)
		return err == nil && !p.Revoke
	}
	return false
}

// grows counts an executed transaction of n bytes, if it is of somebody whom the grid gave no quota.
func (b *batch) grows(tx *Tx, n int) error {
	if tx.Actor.Node || !leaves(tx) {
		return nil
	}
	id := identity.AccountID(tx.Actor.ID)
	if _, own := b.tree.get(QuotaKey(id)); own || id == b.grid().Account {
		return nil
	}
	g, err := b.Genesis()
	if err != nil {
		return err
	}
	k, err := get[growth](&b.State, growthKey)
	switch {
	case errors.Is(err, ErrAbsent):
		k = &growth{}
	case err != nil:
		return fmt.Errorf("what strangers leave: %w", err)
	}
	if now := b.clock.Time / hour; k.Hour != now {
		*k = growth{Hour: now}
	}
	k.Bytes += n
	if most := g.Limits.orDefault().Growth; k.Bytes > most {
		return fmt.Errorf("accounts without a quota of their own have put %d bytes on the ledger in this hour, more are not allowed: ask the grid for a quota, or try later", most)
	}
	set(b, growthKey, k)
	return nil
}
