package ledger

import (
	"errors"
	"fmt"

	"holdfast/contract"
	"holdfast/identity"
)

// Store is a dispersed store that the grid's locations keep: who may use it, and how much of each location. Locations
// serve the stores that are listed, and no others.
type Store struct {
	Contract contract.ID `cbor:"1,keyasint" json:"contract"` // whose it is; zero: the grid's own
	FrontEnd [32]byte    `cbor:"2,keyasint" json:"-"`        // SHA-256 of the SubjectPublicKeyInfo of the key that reads, writes and deletes
	Recovery [32]byte    `cbor:"3,keyasint" json:"-"`        // of the key that undoes deletes, which only the holder of the phrase has
	Limit    uint64      `cbor:"4,keyasint" json:"limit"`    // bytes on one location

	Volume contract.VolumeID `cbor:"5,keyasint,omitzero" json:"volume,omitzero"` // whose snapshots are kept; zero: it is of buckets
	Node   identity.NodeID   `cbor:"6,keyasint,omitzero" json:"node,omitzero"`   // the one machine that FrontEnd is good on; zero: any
}

// ID names the store among all: that of its volume, or of its contract.
func (s *Store) ID() contract.ID {
	if !s.Volume.IsZero() {
		return contract.ID(s.Volume)
	}
	return s.Contract
}

func (s *Store) valid() error {
	switch {
	case s.FrontEnd == [32]byte{} || s.Recovery == [32]byte{}:
		return errors.New("store: a key is missing")
	case s.FrontEnd == s.Recovery:
		return errors.New("store: one key is for both uses")
	case s.Limit == 0 || s.Limit > MaxStorage:
		return fmt.Errorf("store: limit of %d bytes, 1 to %d are allowed", s.Limit, uint64(MaxStorage))
	}
	return nil
}

// addStore makes a store that was not there. Its keys belong to it alone: a location tells stores apart by the keys that
// come, so that who had another's in a store of his own would shut that one out.
func (b *batch) addStore(s *Store) error {
	if err := s.valid(); err != nil {
		return err
	}
	id := s.ID()
	if _, taken := b.tree.get(StoreKey(id)); taken {
		return fmt.Errorf("a store of %v exists", id)
	}
	for _, k := range [][32]byte{s.FrontEnd, s.Recovery} {
		if _, taken := b.tree.get(storeKeyKey(k)); taken {
			return errors.New("another store has this key")
		}
		set(b, storeKeyKey(k), &id)
	}
	set(b, StoreKey(id), s)
	return push(b, StoresKey, id)
}

// dropStore removes a store that is there: locations serve it no more.
func (b *batch) dropStore(s *Store) error {
	for _, k := range []string{StoreKey(s.ID()), storeKeyKey(s.FrontEnd), storeKeyKey(s.Recovery)} {
		b.del(k)
	}
	return drop(b, StoresKey, s.ID())
}

func storeKeyKey(k [32]byte) string { return "store-key/" + string(k[:]) }
