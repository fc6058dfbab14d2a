package ledger

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"slices"

	"holdfast/identity"
	"holdfast/internal/canonical"
)

// Limits of the set of validators.
const (
	MaxValidators     = 150
	MaxValidatorPower = 1_000_000 // of one that joins
)

// ValidatorID is the SHA-256 of a validator's consensus key. Its first 20 bytes are the validator's address in consensus.
type ValidatorID [32]byte

// String is the ID as people write it.
func (id ValidatorID) String() string { return hex.EncodeToString(id[:]) }

// ID identifies the validator.
func (v *Validator) ID() ValidatorID { return sha256.Sum256(v.Key) }

// Validators is the set that takes part in consensus. What a block makes of it votes from the second block after that on.
type Validators struct {
	Members []Validator `cbor:"1,keyasint"` // in the order in which they came
	Height  int64       `cbor:"2,keyasint"` // of the block that made it
}

// ValidatorsOf reads the record at ValidatorsKey, as a View returns it. While it is absent, its proven absence says that the
// validators are those of the genesis.
func ValidatorsOf(g *Genesis, raw []byte, present bool) (*Validators, error) {
	if !present {
		return &Validators{Members: g.Validators}, nil
	}
	v, err := Decode[Validators](raw)
	if err != nil {
		return nil, fmt.Errorf("validators: %w", err)
	}
	if len(v.Members) == 0 || len(v.Members) > MaxValidators {
		return nil, fmt.Errorf("validators: %d of them", len(v.Members))
	}
	return v, nil
}

func readSet(s *State) ([]Validator, int64, error) {
	if s.birth == nil {
		return nil, 0, nil
	}
	raw, ok := s.tree.get(ValidatorsKey)
	v, err := ValidatorsOf(s.birth, raw, ok)
	if err != nil {
		return nil, 0, err
	}
	return v.Members, v.Height, nil
}

// Validators is the set that this state decided on. It is not to be changed.
func (s *State) Validators() *Validators { return &Validators{s.set, s.setAt} }

// ValidatorJoin makes a machine a validator.
type ValidatorJoin struct {
	Validator Validator `cbor:"1,keyasint"`
	Proof     []byte    `cbor:"2,keyasint"` // by the consensus key, ML-DSA-65 without a context, over JoinBytes
}

// ValidatorLeave ends a validator's part in consensus, for good: its key does not come back.
type ValidatorLeave struct {
	Validator ValidatorID `cbor:"1,keyasint"`
}

// JoinBytes is what a validator's consensus key signs to join a grid. The key signs votes too, without a context. Those begin
// with their length as a varint; these begin with "h", which would be 104, and are 58 bytes: no vote is a proof, no proof a vote.
func JoinBytes(grid identity.GridID, v *Validator) []byte {
	d := canonical.Digest("holdfast/validator-join/v1", grid[:], canonical.Encode(v))
	return append([]byte("holdfast/validator-join/v1"), d[:]...)
}

// Check checks what needs no state: form, and the proof that the key's holder agrees.
func (p *ValidatorJoin) Check(grid identity.GridID) error {
	v := &p.Validator
	if err := validName(v.Name); err != nil {
		return err
	}
	if v.Power < 1 || v.Power > MaxValidatorPower {
		return fmt.Errorf("power %d, 1 to %d are allowed", v.Power, MaxValidatorPower)
	}
	if host, port, err := net.SplitHostPort(v.Address); err != nil || host == "" || port == "" || len(v.Address) > 256 {
		return fmt.Errorf("address %q is not host:port", v.Address)
	}
	if v.TLS == ([32]byte{}) {
		return fmt.Errorf("%s key is missing", useTLS)
	}
	if err := validEndpoints(v.Endpoints); err != nil {
		return err
	}
	if err := identity.VerifyMLDSA(v.Key, JoinBytes(grid, v), p.Proof); err != nil {
		return fmt.Errorf("proof that validator %q has its key: %w", v.Name, err)
	}
	return nil
}

// validatorHas looks through the validators of the genesis, whom clients know for ever, and those of now.
func (b *batch) validatorHas(what func(*Validator) bool) bool {
	for _, set := range [][]Validator{b.birthSet(), b.set} {
		for i := range set {
			if what(&set[i]) {
				return true
			}
		}
	}
	return false
}

func (b *batch) birthSet() []Validator {
	if b.birth == nil {
		return nil
	}
	return b.birth.Validators
}

func (b *batch) validatorJoin(tx *Tx, who *signers, p *ValidatorJoin) error {
	if err := who.allowed(b.grid().Account, identity.ActValidators); err != nil {
		return err
	}
	if err := p.Check(tx.Grid); err != nil {
		return err
	}
	v := p.Validator
	id := v.ID()
	if len(b.set) >= MaxValidators {
		return fmt.Errorf("there are %d validators, more are not allowed", len(b.set))
	}
	if slices.ContainsFunc(b.set, func(o Validator) bool { return o.Name == v.Name }) {
		return fmt.Errorf("there is a validator %q already", v.Name)
	}
	if slices.ContainsFunc(b.set, func(o Validator) bool { return o.ID() == id }) {
		return fmt.Errorf("validator %q has a key that is one already", v.Name)
	}
	// Votes of its former time can still be shown as evidence, and could be taken for votes of now.
	if _, gone := b.tree.get(goneKey(id)); gone {
		return fmt.Errorf("validator %q has the key of one that left, and no key comes back: make a new one", v.Name)
	}
	if err := b.freeTLS(v.TLS); err != nil {
		return err
	}
	if v.WireGuard != ([32]byte{}) {
		if _, taken := b.tree.get(nodeKeyKey(useWireGuard, v.WireGuard)); taken {
			return fmt.Errorf("a node has this %s key", useWireGuard)
		}
		if b.validatorHas(func(o *Validator) bool { return o.WireGuard == v.WireGuard }) {
			return fmt.Errorf("a validator has this %s key", useWireGuard)
		}
	}
	if err := b.changeSet(append(slices.Clone(b.set), v)); err != nil {
		return err
	}
	return who.agreed(identity.ActValidators)
}

func (b *batch) validatorLeave(who *signers, p *ValidatorLeave) error {
	if err := who.allowed(b.grid().Account, identity.ActValidators); err != nil {
		return err
	}
	if err := b.part(p.Validator); err != nil {
		return err
	}
	return who.agreed(identity.ActValidators)
}

// part takes a validator out of the set.
func (b *batch) part(id ValidatorID) error {
	i := slices.IndexFunc(b.set, func(v Validator) bool { return v.ID() == id })
	if i < 0 {
		return fmt.Errorf("validator %v: %w", id, ErrAbsent)
	}
	if len(b.set) == 1 {
		return errors.New("it is the only validator: without one the ledger ends; another joins first")
	}
	if err := b.changeSet(slices.Delete(slices.Clone(b.set), i, i+1)); err != nil {
		return err
	}
	set(b, goneKey(id), &b.height)
	return nil
}

// expel takes out a validator of which there is proof that it lied. What the bound on changes forbids in this block stays: a set
// that such a one could stop is not saved by leaving clients behind.
func (b *batch) expel(address [20]byte) {
	i := slices.IndexFunc(b.set, func(v Validator) bool { id := v.ID(); return [20]byte(id[:20]) == address })
	if i < 0 {
		return // it left before
	}
	try := *b
	if try.part(b.set[i].ID()) == nil {
		*b = try
	}
}

// changeSet replaces the set, as far as one block may.
func (b *batch) changeSet(next []Validator) error {
	total, come, gone := int64(0), int64(0), int64(0)
	for i := range b.began {
		total += b.began[i].Power
	}
	come, gone = moved(next, b.began), moved(b.began, next)
	// More than 2/3 of the new set sign a header after the change. Were all who came among them, the others, who are of the old
	// set, have more than 2/3·(total-gone+come) - come. That is at least 1/3 of the old set, which a light client wants, when:
	if come > total || 2*gone > total-come {
		return fmt.Errorf("power %d comes and %d goes of %d in one block: what comes and twice what goes must not be more than that, so that clients can follow; do it in steps",
			come, gone, total)
	}
	b.set, b.setAt = next, b.height
	set(b, ValidatorsKey, &Validators{Members: next, Height: b.height})
	return nil
}

// moved is the power of those in a that are not in b.
func moved(a, b []Validator) (power int64) {
	for i := range a {
		id := a[i].ID()
		if !slices.ContainsFunc(b, func(v Validator) bool { return v.ID() == id }) {
			power += a[i].Power
		}
	}
	return power
}
