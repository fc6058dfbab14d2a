package ledger

import (
	"errors"
	"fmt"

	"holdfast/contract"
)

// contractStore makes the record of a contract's store what the header says. A store is made once and stays, also when its
// contract is cancelled: what is in it belongs to the account, and locations keep what is listed. Its keys are those of the
// header that made it: a device that was let in later cannot have the locations listen to somebody else.
func (b *batch) contractStore(id contract.ID, was, h *contract.Header) error {
	old, is := was.Store, h.Store
	switch {
	case old == is:
		return nil
	case old == contract.Store{}:
		return b.addStore(&Store{Contract: id, FrontEnd: is.FrontEnd, Recovery: is.Recovery, Limit: is.Limit})
	case is == contract.Store{}:
		return errors.New("a revision cannot drop the contract's store")
	case old.FrontEnd != is.FrontEnd || old.Recovery != is.Recovery:
		return errors.New("the keys of the contract's store cannot change")
	case is.Limit < old.Limit:
		return fmt.Errorf("the contract's store has %d bytes on a location, and can only grow", old.Limit)
	}
	s, err := get[Store](&b.State, StoreKey(id))
	if err != nil {
		return fmt.Errorf("store of %v: %w", id, err)
	}
	s.Limit = is.Limit
	if err := s.valid(); err != nil {
		return err
	}
	set(b, StoreKey(id), s)
	return nil
}
