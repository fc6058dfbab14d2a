package comet

import (
	"errors"
	"fmt"

	cmtproto "github.com/cometbft/cometbft/proto/tendermint/types"
	"github.com/cometbft/cometbft/types"

	"holdfast/internal/canonical"
)

// Paths of the API. All are POST with a body in deterministic CBOR, and so is the answer.
const (
	pathRead   = "/v1/read"
	pathWatch  = "/v1/watch"
	pathTx     = "/v1/tx"
	pathHeader = "/v1/header"

	contentType = "application/cbor"
)

// Limits of bodies in bytes.
const (
	maxRequest  = 512 << 10 // read
	maxSmall    = 1 << 10   // watch, header
	maxAnswer   = 16 << 20  // what a client accepts: validators of a whole chain come beside the values
	maxProblem  = 4 << 10
	maxReadSize = 4<<20 + 256<<10 // values and proofs of one answer: the largest record of a ledger with its proof
)

// readRequest asks for keys.
type readRequest struct {
	Keys       [][]byte `cbor:"1,keyasint"`
	MinHeight  int64    `cbor:"2,keyasint"` // of the state; the server waits for it for a while
	Validators []byte   `cbor:"3,keyasint"` // hash of the validator set that the client knows
}

func (r *readRequest) check() error {
	if len(r.Keys) > MaxKeys {
		return fmt.Errorf("%d keys, at most %d are allowed", len(r.Keys), MaxKeys)
	}
	seen := make(map[string]bool, len(r.Keys))
	for _, k := range r.Keys {
		if len(k) == 0 || len(k) > MaxKey {
			return fmt.Errorf("key of %d bytes, from 1 to %d are allowed", len(k), MaxKey)
		}
		// A few bytes must not be answered by a large record each time that they repeat.
		if seen[string(k)] {
			return fmt.Errorf("key %q is asked for twice", k)
		}
		seen[string(k)] = true
	}
	if len(r.Validators) > 64 {
		return errors.New("hash of the validator set is too long")
	}
	return nil
}

// head is a signed header, and its validator set when the client does not have it. Both are CometBFT's protobuf.
type head struct {
	Signed     []byte `cbor:"1,keyasint"` // tendermint.types.SignedHeader
	Validators []byte `cbor:"2,keyasint"` // tendermint.types.ValidatorSet, or empty
}

// readAnswer has one entry for each key asked for, of the state that the header proves: that of height less one.
type readAnswer struct {
	Head    head    `cbor:"1,keyasint"`
	Entries []entry `cbor:"2,keyasint"`
}

type entry struct {
	Present bool   `cbor:"1,keyasint"`
	Value   []byte `cbor:"2,keyasint"`
	Proof   []byte `cbor:"3,keyasint"`
}

// watchRequest waits for a provable state that differs from the one after height After.
type watchRequest struct {
	After int64 `cbor:"1,keyasint"`
}

type watchAnswer struct {
	Height int64 `cbor:"1,keyasint"`
}

// headerRequest asks for a header, the newest when Height is 0.
type headerRequest struct {
	Height     int64  `cbor:"1,keyasint"`
	Validators []byte `cbor:"2,keyasint"`
}

// txAnswer answers a transaction, which is the whole body of its request.
type txAnswer struct {
	Height int64  `cbor:"1,keyasint"`
	Code   uint32 `cbor:"2,keyasint"`
	Log    string `cbor:"3,keyasint"`
}

// problem is the body of every answer whose status is not 200.
type problem struct {
	Kind    string `cbor:"1,keyasint"`
	Message string `cbor:"2,keyasint"`
}

// Kinds of problems.
const (
	kindRequest = "request" // the request is malformed
	kindRefused = "refused" // the transaction is
	kindBehind  = "behind"  // the server has not reached the height
	kindGone    = "gone"    // the server no longer has the height
	kindPending = "pending" // the transaction waits; ask again
	kindBusy    = "busy"
	kindLarge   = "large" // the answer would be; ask for fewer keys
)

func encodeHead(sh *types.SignedHeader, set *types.ValidatorSet, known []byte) (head, error) {
	b, err := sh.ToProto().Marshal()
	if err != nil {
		return head{}, fmt.Errorf("encode header %d: %w", sh.Height, err)
	}
	h := head{Signed: b}
	if string(known) == string(sh.ValidatorsHash) {
		return h, nil
	}
	p, err := set.ToProto()
	if err != nil {
		return head{}, fmt.Errorf("encode validators of height %d: %w", sh.Height, err)
	}
	if h.Validators, err = p.Marshal(); err != nil {
		return head{}, fmt.Errorf("encode validators of height %d: %w", sh.Height, err)
	}
	return h, nil
}

// decodeHead reads a head; the set is nil when it is not in there.
func decodeHead(h head) (*types.SignedHeader, *types.ValidatorSet, error) {
	var p cmtproto.SignedHeader
	if err := p.Unmarshal(h.Signed); err != nil {
		return nil, nil, fmt.Errorf("decode header: %w", err)
	}
	sh, err := types.SignedHeaderFromProto(&p)
	if err != nil {
		return nil, nil, fmt.Errorf("decode header: %w", err)
	}
	if sh.Header == nil || sh.Commit == nil {
		return nil, nil, errors.New("decode header: header or commit is missing")
	}
	if len(h.Validators) == 0 {
		return sh, nil, nil
	}
	var vp cmtproto.ValidatorSet
	if err := vp.Unmarshal(h.Validators); err != nil {
		return nil, nil, fmt.Errorf("decode validators: %w", err)
	}
	if len(vp.Validators) > types.MaxVotesCount {
		return nil, nil, fmt.Errorf("decode validators: %d of them", len(vp.Validators))
	}
	set, err := types.ValidatorSetFromProto(&vp)
	if err != nil {
		return nil, nil, fmt.Errorf("decode validators: %w", err)
	}
	return sh, set, nil
}

func decode(b []byte, limit int, v any) error { return canonical.Decode(b, limit, v) }
