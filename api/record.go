package api

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"time"

	"holdfast/contract"
	"holdfast/identity"
	"holdfast/internal/canonical"
	"holdfast/ledger"
	"holdfast/ledger/comet"
)

// Limits of a record.
const (
	MaxRecord       = 256 << 20
	maxRecordBlocks = 1 << 16
)

const recordLabel = "holdfast contract record"

// Record is all that a ledger has of one contract, so that whoever has the grid's genesis verifies it alone and for ever: each
// transaction about it as it was signed, the headers and commits of their blocks, and records of the state after them that
// show that nothing is missing. Its format is docs/formats/record.md.
type Record struct {
	Label    string           `cbor:"1,keyasint"`
	Version  uint8            `cbor:"2,keyasint"`
	Genesis  []byte           `cbor:"3,keyasint"`
	Contract contract.ID      `cbor:"4,keyasint"`
	Blocks   []comet.Archived `cbor:"5,keyasint"`           // the last one has no transactions and proves Entries
	Entries  []comet.Entry    `cbor:"6,keyasint"`           // sorted by key
	Bodies   [][]byte         `cbor:"7,keyasint,omitempty"` // sealed, of all revisions in their order
}

// Verified is what a record shows.
type Verified struct {
	Grid     identity.GridID
	Contract *ledger.Contract
	Height   int64 // of the state that it was verified against
	Time     time.Time
	Deeds    []ledger.Deed
	Bodies   int
}

// ErrIncomplete is returned by ExportContract when the server does not keep all that happened to a contract.
var ErrIncomplete = errors.New("the server does not keep the whole history")

// ExportContract makes the record of a contract, and verifies it. body gives the sealed body of a revision, nil leaves all out.
func (c *Client) ExportContract(ctx context.Context, id contract.ID, body func(*contract.Header) ([]byte, error)) ([]byte, *Verified, error) {
	r := &Record{Label: recordLabel, Version: 1, Genesis: c.genesis.Encode(), Contract: id}
	last := int64(0)
	for try := 0; ; try++ {
		since, blocks, err := c.comet.Archive(ctx, ledger.HistoryKey(id), last)
		if err != nil {
			return nil, nil, err
		}
		r.Blocks = append(r.Blocks, blocks...)
		heads, err := comet.VerifyArchive(ptr(CometGenesis(c.genesis)), r.Blocks, time.Now())
		if err != nil {
			return nil, nil, err
		}
		if len(heads) > 0 {
			last = heads[len(heads)-1].Height
		}
		keys, err := r.keys()
		if err != nil {
			return nil, nil, err
		}
		head, entries, err := c.comet.Prove(ctx, last, keys...)
		if err != nil {
			return nil, nil, fmt.Errorf("%v: %w", id, err)
		}
		is, err := ledger.Decode[ledger.History](entries[slices.Index(keys, ledger.HistoryKey(id))].Value)
		if err != nil {
			return nil, nil, fmt.Errorf("history of %v: %w", id, err)
		}
		n := uint64(0)
		for i := range r.Blocks {
			n += uint64(len(r.Blocks[i].Txs))
		}
		if n < is.Count && try < 3 { // one more came meanwhile
			continue
		}
		if n != is.Count {
			return nil, nil, fmt.Errorf("%v: %w: it has %d of %d transactions, and keeps all since height %d; ask another validator", id, ErrIncomplete, n, is.Count, since)
		}
		r.Blocks, r.Entries = append(r.Blocks, head), entries
		break
	}
	v, err := r.verify(c.genesis, time.Now())
	if err != nil {
		return nil, nil, err
	}
	if body != nil {
		for i := range v.Deeds {
			if v.Deeds[i].Header == nil {
				continue
			}
			b, err := body(v.Deeds[i].Header)
			if err != nil {
				return nil, nil, err
			}
			r.Bodies = append(r.Bodies, b)
		}
		v.Bodies = len(r.Bodies)
	}
	raw := canonical.Encode(r)
	if len(raw) > MaxRecord {
		return nil, nil, fmt.Errorf("record of %v: %d bytes, at most %d are allowed: leave the bodies out", id, len(raw), MaxRecord)
	}
	return raw, v, nil
}

// keys are the names of the records that prove this one, sorted.
func (r *Record) keys() ([]string, error) {
	keys := []string{ledger.ContractKey(r.Contract), ledger.HistoryKey(r.Contract)}
	for _, b := range r.Blocks {
		for _, x := range b.Txs {
			tx, err := ledger.DecodeTx(x.Tx)
			if err != nil {
				return nil, err
			}
			keys = append(keys, ledger.ActorKey(tx.Actor))
		}
	}
	slices.Sort(keys)
	return slices.Compact(keys), nil
}

// VerifyRecord checks a record with nothing but the genesis of its grid, and asks nobody. With a nil genesis it takes the
// record's own: then it shows no more than what the grid of that ID says. The time is that of whoever verifies: headers of
// the future are refused.
func VerifyRecord(raw []byte, genesis *ledger.Genesis, now time.Time) (*Verified, error) {
	var r Record
	if err := canonical.Decode(raw, MaxRecord, &r); err != nil {
		return nil, fmt.Errorf("record: %w", err)
	}
	if r.Label != recordLabel || r.Version != 1 {
		return nil, fmt.Errorf("record: it is a %.40q of version %d", r.Label, r.Version)
	}
	own, err := ledger.DecodeGenesis(r.Genesis)
	if err != nil {
		return nil, fmt.Errorf("record: %w", err)
	}
	if genesis != nil && own.GridID() != genesis.GridID() {
		return nil, fmt.Errorf("record: it is of %v, not of %v", own.GridID(), genesis.GridID())
	}
	return r.verify(own, now)
}

func (r *Record) verify(g *ledger.Genesis, now time.Time) (*Verified, error) {
	if len(r.Blocks) == 0 || len(r.Blocks) > maxRecordBlocks {
		return nil, fmt.Errorf("record: %d blocks", len(r.Blocks))
	}
	heads, err := comet.VerifyArchive(ptr(CometGenesis(g)), r.Blocks, now)
	if err != nil {
		return nil, fmt.Errorf("record: %w", err)
	}
	end := len(heads) - 1
	if len(r.Blocks[end].Hashes) > 0 {
		return nil, errors.New("record: nothing comes after its last transaction")
	}
	want, err := r.keys()
	if err != nil {
		return nil, fmt.Errorf("record: %w", err)
	}
	if len(r.Entries) != len(want) {
		return nil, fmt.Errorf("record: %d records of the ledger, it needs %d", len(r.Entries), len(want))
	}
	values := map[string][]byte{}
	for i, e := range r.Entries {
		if string(e.Key) != want[i] {
			return nil, fmt.Errorf("record: %q in place of %q", e.Key, want[i])
		}
		if err := ledger.VerifyProof(heads[end].Root, want[i], e.Value, e.Proof); err != nil {
			return nil, fmt.Errorf("record: %w", err)
		}
		values[want[i]] = e.Value
	}
	var done []ledger.Executed
	for i, b := range r.Blocks {
		for _, x := range b.Txs {
			done = append(done, ledger.Executed{Height: heads[i].Height, Tx: x.Tx})
		}
	}
	v := &Verified{Grid: g.GridID(), Height: heads[end].Height - 1, Time: heads[end].Time, Bodies: len(r.Bodies)}
	if v.Deeds, err = ledger.VerifyHistory(v.Grid, r.Contract, done, func(key string) ([]byte, error) {
		b, ok := values[key]
		if !ok {
			return nil, ledger.ErrAbsent
		}
		return b, nil
	}); err != nil {
		return nil, fmt.Errorf("record: %w", err)
	}
	if v.Contract, err = ledger.Decode[ledger.Contract](values[ledger.ContractKey(r.Contract)]); err != nil {
		return nil, fmt.Errorf("record: %w", err)
	}
	return v, r.verifyBodies(v.Deeds)
}

// verifyBodies checks that the bodies are those of all revisions here, in their order, if there are any.
func (r *Record) verifyBodies(deeds []ledger.Deed) error {
	if len(r.Bodies) == 0 {
		return nil
	}
	n := 0
	for _, d := range deeds {
		if d.Header == nil {
			continue
		}
		if n == len(r.Bodies) {
			return fmt.Errorf("record: %d bodies, there are more revisions", n)
		}
		if b := r.Bodies[n]; uint64(len(b)) != uint64(d.Header.SealedSize) || sha256.Sum256(b) != d.Header.SealedBody {
			return fmt.Errorf("record: the body of revision %d is another", d.Header.Revision)
		}
		n++
	}
	if n != len(r.Bodies) {
		return fmt.Errorf("record: %d bodies of %d revisions", len(r.Bodies), n)
	}
	return nil
}

func ptr[T any](v T) *T { return &v }
