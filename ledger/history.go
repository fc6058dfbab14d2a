package ledger

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"holdfast/contract"
	"holdfast/identity"
	"holdfast/internal/canonical"
)

// History is what happened to a contract: how many transactions about it were executed, and a digest over all of them in
// their order. Who is given the transactions and a proof of this record knows that none is missing and none was made up.
type History struct {
	Count  uint64   `cbor:"1,keyasint" json:"count"`
	Digest [32]byte `cbor:"2,keyasint" json:"-"`
}

// HistoryKey names a contract's History.
func HistoryKey(id contract.ID) string { return "history/" + string(id[:]) }

// After is the history with one more transaction, signatures and all, of the block of a height.
func (h History) After(height int64, raw []byte) History {
	sum := sha256.Sum256(raw)
	return History{h.Count + 1, canonical.Digest("holdfast/history/v1", h.Digest[:], binary.BigEndian.AppendUint64(nil, uint64(height)), sum[:])}
}

// ActorKey names the record that has the keys of an actor.
func ActorKey(a Actor) string {
	if a.Node {
		return NodeKey(identity.NodeID(a.ID))
	}
	return AccountKey(identity.AccountID(a.ID))
}

// about says which contract a transaction is about, if it is about one. What the payload does not say, the records do.
type about struct {
	revision func(contract.RevisionID) (contract.ID, error)
	volume   func(contract.VolumeID) (contract.ID, error)
	proposal func(ProposalID) (contract.ID, bool, error) // false: it is about none
}

func (a about) of(tx *Tx) (id contract.ID, ok bool, err error) {
	switch tx.Kind {
	case KindContractSubmit:
		p, err := Payload[ContractSubmit](tx)
		if err != nil {
			return id, false, err
		}
		h, err := contract.DecodeHeader(p.Header)
		if err != nil {
			return id, false, err
		}
		return h.ContractID(), true, nil
	case KindContractCancel:
		p, err := Payload[ContractCancel](tx)
		if err != nil {
			return id, false, err
		}
		return p.Contract, true, nil
	case KindContractState:
		p, err := Payload[ContractState](tx)
		if err != nil {
			return id, false, err
		}
		return p.Contract, true, nil
	case KindConsent:
		p, err := Payload[Consent](tx)
		if err != nil {
			return id, false, err
		}
		return a.proposal(p.Proposal)
	case KindWithdraw:
		p, err := Payload[Withdraw](tx)
		if err != nil {
			return id, false, err
		}
		return a.proposal(p.Proposal)
	case KindEnvelopePut:
		p, err := Payload[EnvelopePut](tx)
		if err != nil {
			return id, false, err
		}
		if len(p.Envelopes) == 0 {
			return id, false, errors.New("no envelopes")
		}
		id, err = a.revision(p.Envelopes[0].Revision)
		return id, err == nil, err
	case KindWorkloadReport:
		p, err := Payload[WorkloadReport](tx)
		if err != nil {
			return id, false, err
		}
		return p.Contract, true, nil
	case KindVolumeCreated:
		p, err := Payload[VolumeCreated](tx)
		if err != nil {
			return id, false, err
		}
		id, err = a.volume(p.Volume)
		return id, err == nil, err
	case KindVolumeSaved:
		p, err := Payload[VolumeSaved](tx)
		if err != nil {
			return id, false, err
		}
		id, err = a.volume(p.Volume)
		return id, err == nil, err
	case KindVolumeRestore:
		p, err := Payload[VolumeRestore](tx)
		if err != nil {
			return id, false, err
		}
		id, err = a.volume(p.Volume)
		return id, err == nil, err
	}
	return id, false, nil
}

// about looks into the records.
func (s *State) about() about {
	return about{
		revision: func(rev contract.RevisionID) (contract.ID, error) {
			raw, ok := s.tree.get(RevisionKey(rev))
			if !ok {
				return contract.ID{}, fmt.Errorf("%v: %w", rev, ErrAbsent)
			}
			h, err := contract.DecodeHeader(raw)
			if err != nil {
				return contract.ID{}, err
			}
			return h.ContractID(), nil
		},
		volume: func(id contract.VolumeID) (contract.ID, error) {
			v, err := get[Volume](s, VolumeKey(id))
			if err != nil {
				return contract.ID{}, fmt.Errorf("%v: %w", id, err)
			}
			return v.Contract, nil
		},
		proposal: func(id ProposalID) (contract.ID, bool, error) {
			p, err := get[Proposal](s, ProposalKey(id))
			if err != nil {
				return contract.ID{}, false, fmt.Errorf("%v: %w", id, err)
			}
			tx, err := p.Transaction()
			if err != nil {
				return contract.ID{}, false, err
			}
			return s.about().of(tx)
		},
	}
}

// told is that a transaction of the last block was executed and is about a contract.
type told struct {
	index    int
	contract contract.ID
}

// record adds an executed transaction to the history of the contract that it is about.
func (b *batch) record(id contract.ID, raw []byte) error {
	h, err := orZero(get[History](&b.State, HistoryKey(id)))
	if err != nil {
		return fmt.Errorf("history of %v: %w", id, err)
	}
	next := h.After(b.height, raw)
	set(b, HistoryKey(id), &next)
	return nil
}

// About says which contract the transaction of that index was about, in the block that made this state: one that was
// executed and is in the contract's History.
func (s *State) About(index int) (contract.ID, bool) {
	for _, t := range s.told {
		if t.index == index {
			return t.contract, true
		}
	}
	return contract.ID{}, false
}

// Executed is a transaction and the height of the block that executed it.
type Executed struct {
	Height int64
	Tx     []byte
}

// Deed is an executed transaction that was verified.
type Deed struct {
	Height  int64               `json:"height"`
	Kind    Kind                `json:"kind"`
	Actor   Actor               `json:"-"`
	Nonce   uint64              `json:"nonce"`
	Signers []identity.DeviceID `json:"signers"`
	Header  *contract.Header    `json:"-"` // of contract.submit
}

// ErrHistory is returned for transactions that are not a contract's history.
var ErrHistory = errors.New("not the contract's history")

// VerifyHistory checks that these are the transactions about a contract, all of them, in their order: grid, signatures, nonces, and the digest in the contract's History. A record of the ledger that it needs is asked of
// proved, which must have verified it. It needs no clock and no State.
func VerifyHistory(grid identity.GridID, id contract.ID, all []Executed, proved func(key string) ([]byte, error)) ([]Deed, error) {
	s := &State{sigs: newSignatures()}
	headers := map[contract.RevisionID]contract.ID{}
	volumes := map[contract.VolumeID]contract.ID{}
	proposals := map[ProposalID]contract.ID{}
	where := about{
		revision: func(r contract.RevisionID) (contract.ID, error) { return known(headers, r) },
		volume:   func(v contract.VolumeID) (contract.ID, error) { return known(volumes, v) },
		proposal: func(p ProposalID) (contract.ID, bool, error) {
			id, err := known(proposals, p)
			return id, err == nil, err
		},
	}
	nonces := map[Actor]uint64{}
	var digest History
	var out []Deed
	for i, x := range all {
		wrong := func(err error) error { return fmt.Errorf("%w: transaction %d: %w", ErrHistory, i, err) }
		tx, err := DecodeTx(x.Tx)
		if err != nil {
			return nil, wrong(err)
		}
		if tx.Grid != grid {
			return nil, wrong(fmt.Errorf("it is for %v", tx.Grid))
		}
		if last, ok := nonces[tx.Actor]; ok && tx.Nonce <= last {
			return nil, wrong(fmt.Errorf("nonce %d after %d", tx.Nonce, last))
		}
		nonces[tx.Actor] = tx.Nonce
		key := ActorKey(tx.Actor)
		if _, ok := s.tree.get(key); !ok {
			raw, err := proved(key)
			if err != nil {
				return nil, wrong(err)
			}
			s.tree = s.tree.put(key, raw)
		}
		who, err := s.signers(tx)
		if err != nil {
			return nil, wrong(err)
		}
		d := Deed{Height: x.Height, Kind: tx.Kind, Actor: tx.Actor, Nonce: tx.Nonce, Signers: who.devices}
		if tx.Kind == KindContractSubmit {
			p, err := Payload[ContractSubmit](tx)
			if err != nil {
				return nil, wrong(err)
			}
			if d.Header, err = contract.DecodeHeader(p.Header); err != nil {
				return nil, wrong(err)
			}
			headers[d.Header.RevisionID()] = d.Header.ContractID()
			for _, v := range d.Header.Volumes {
				volumes[contract.VolumeOf(d.Header.ContractID(), v.Name)] = d.Header.ContractID()
			}
		}
		switch of, ok, err := where.of(tx); {
		case err != nil:
			return nil, wrong(err)
		case !ok || of != id:
			return nil, wrong(fmt.Errorf("%s is not about %v", tx.Kind, id))
		}
		proposals[ProposalID(tx.ID())] = id // should it have been no more than that
		digest = digest.After(x.Height, x.Tx)
		out = append(out, d)
	}
	raw, err := proved(HistoryKey(id))
	if err != nil {
		return nil, fmt.Errorf("history of %v: %w", id, err)
	}
	is, err := Decode[History](raw)
	if err != nil {
		return nil, fmt.Errorf("history of %v: %w", id, err)
	}
	if digest != *is {
		return nil, fmt.Errorf("%w: %d transactions of another digest, the ledger has %d", ErrHistory, digest.Count, is.Count)
	}
	raw, err = proved(ContractKey(id))
	if err != nil {
		return nil, fmt.Errorf("%v: %w", id, err)
	}
	c, err := Decode[Contract](raw)
	if err != nil {
		return nil, fmt.Errorf("%v: %w", id, err)
	}
	if c.ID != id {
		return nil, fmt.Errorf("%w: the record of %v is of %v", ErrHistory, id, c.ID)
	}
	for _, r := range c.Revisions {
		if !slices.ContainsFunc(out, func(d Deed) bool { return d.Header != nil && d.Header.RevisionID() == r }) {
			return nil, fmt.Errorf("%w: nothing submitted %v", ErrHistory, r)
		}
	}
	return out, nil
}

func known[K comparable](m map[K]contract.ID, k K) (contract.ID, error) {
	id, ok := m[k]
	if !ok {
		return contract.ID{}, fmt.Errorf("%v: %w", k, ErrAbsent)
	}
	return id, nil
}
