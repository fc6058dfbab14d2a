package ledger

import (
	"errors"
	"fmt"

	"holdfast/contract"
)

// contractStore makes the record of a contract's store what the header says. A store is made once and stays, also when its
// contract is cancelled: what is in it belongs to the account, and locations keep what is listed. Its keys are those of the
// header that made it: a device that was let in later cannot have the locations listen to somebody else. While a revision is
// on trial that may be undone, a store that was there does not grow yet.
func (b *batch) contractStore(c *Contract, was, h *contract.Header) error {
	old, is := was.Store, h.Store
	switch {
	case old == is:
		return nil
	case old == contract.Store{}:
		return b.addStore(&Store{Contract: c.ID, FrontEnd: is.FrontEnd, Recovery: is.Recovery, Limit: is.Limit})
	case is == contract.Store{}:
		return errors.New("a revision cannot drop the contract's store")
	case old.FrontEnd != is.FrontEnd || old.Recovery != is.Recovery:
		return errors.New("the keys of the contract's store cannot change")
	case is.Limit < old.Limit:
		return fmt.Errorf("the contract's store has %d bytes on a location, and can only grow", old.Limit)
	case !c.Trial.From.IsZero():
		return (&Store{Contract: c.ID, FrontEnd: is.FrontEnd, Recovery: is.Recovery, Limit: is.Limit}).valid()
	}
	return b.settleStore(c.ID, h)
}

// settleStore makes the record of a contract's store what the revision says that stays: what one brought that was undone
// goes.
func (b *batch) settleStore(id contract.ID, h *contract.Header) error {
	s, err := get[Store](&b.State, StoreKey(id))
	switch {
	case errors.Is(err, ErrAbsent):
		return nil
	case err != nil:
		return fmt.Errorf("store of %v: %w", id, err)
	case h.Store == contract.Store{}:
		return b.dropStore(s)
	case s.Limit == h.Store.Limit:
		return nil
	}
	s.Limit = h.Store.Limit
	if err := s.valid(); err != nil {
		return err
	}
	set(b, StoreKey(id), s)
	return nil
}
