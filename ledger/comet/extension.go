package comet

import (
	"errors"
	"fmt"

	abci "github.com/cometbft/cometbft/abci/types"
	"github.com/cometbft/cometbft/crypto"
	cmtproto "github.com/cometbft/cometbft/proto/tendermint/types"
	"github.com/cometbft/cometbft/types"

	"holdfast/internal/canonical"
)

// extended is transaction 0 of each block after the first: the vote extensions of the block before. Its votes are in
// the order of the validator set, one for each validator whose precommit is in the block's last commit, so that a
// proposer can neither add, repeat nor leave out one.
type extended struct {
	Version uint8    `cbor:"1,keyasint"` // 1
	Height  int64    `cbor:"2,keyasint"` // of the votes: the block's less one
	Round   int32    `cbor:"3,keyasint"`
	Votes   []spoken `cbor:"4,keyasint"`
}

type spoken struct {
	Data      []byte `cbor:"1,keyasint"`
	Signature []byte `cbor:"2,keyasint"` // over CometBFT's canonical vote extension
}

const maxExtended = 4 << 20

// extend builds the transaction from what CometBFT collected at the height before.
func extend(height int64, ec abci.ExtendedCommitInfo) []byte {
	x := extended{Version: 1, Height: height - 1, Round: ec.Round}
	for _, v := range ec.Votes {
		if v.BlockIdFlag == cmtproto.BlockIDFlagCommit {
			x.Votes = append(x.Votes, spoken{Data: v.VoteExtension, Signature: v.ExtensionSignature})
		}
	}
	return canonical.Encode(x)
}

// heard pairs the extensions of a block with the validators that voted for the block before. It checks no signature:
// that was done before the block was accepted.
func heard(height int64, tx []byte, last abci.CommitInfo) ([]Heard, *extended, error) {
	var x extended
	if err := canonical.Decode(tx, maxExtended, &x); err != nil {
		return nil, nil, fmt.Errorf("decode extended commit: %w", err)
	}
	switch {
	case x.Version != 1:
		return nil, nil, fmt.Errorf("extended commit of version %d", x.Version)
	case x.Height != height-1:
		return nil, nil, fmt.Errorf("extended commit of height %d in block %d", x.Height, height)
	case x.Round != last.Round:
		return nil, nil, fmt.Errorf("extended commit of round %d, the commit is of round %d", x.Round, last.Round)
	}
	out := make([]Heard, 0, len(last.Votes))
	n := 0
	for _, v := range last.Votes {
		h := Heard{Validator: v.Validator.Address, Power: v.Validator.Power}
		if v.BlockIdFlag == cmtproto.BlockIDFlagCommit {
			if n == len(x.Votes) {
				return nil, nil, errors.New("extended commit lacks a vote that is in the commit")
			}
			if len(x.Votes[n].Data) > MaxExtension {
				return nil, nil, fmt.Errorf("vote extension of %d bytes", len(x.Votes[n].Data))
			}
			h.Data = x.Votes[n].Data
			n++
		}
		out = append(out, h)
	}
	if n != len(x.Votes) {
		return nil, nil, errors.New("extended commit has more votes than the commit")
	}
	return out, &x, nil
}

// verifyExtended says whether tx may be transaction 0 of a proposal: every extension is signed for this chain, height
// and round by the validator whose place it takes, well formed, and together they are more than 2/3 of the power.
func verifyExtended(chain string, height int64, tx []byte, last abci.CommitInfo, key func(address []byte) (crypto.PubKey, bool), wellFormed func([]byte) error) error {
	hs, x, err := heard(height, tx, last)
	if err != nil {
		return err
	}
	var voted, total int64
	n := 0
	for i, v := range last.Votes {
		total += v.Validator.Power
		if v.BlockIdFlag != cmtproto.BlockIDFlagCommit {
			continue
		}
		pub, ok := key(v.Validator.Address)
		if !ok {
			return fmt.Errorf("vote extension of unknown validator %X", v.Validator.Address)
		}
		msg := types.VoteExtensionSignBytes(chain, &cmtproto.Vote{Height: x.Height, Round: x.Round, Extension: x.Votes[n].Data})
		if !pub.VerifySignature(msg, x.Votes[n].Signature) {
			return fmt.Errorf("vote extension of validator %X is not signed by it", v.Validator.Address)
		}
		if wellFormed != nil && len(hs[i].Data) > 0 {
			if err := wellFormed(hs[i].Data); err != nil {
				return fmt.Errorf("vote extension of validator %X: %w", v.Validator.Address, err)
			}
		}
		voted += v.Validator.Power
		n++
	}
	if voted*3 <= total*2 { // CometBFT bounds the total by 2^60
		return fmt.Errorf("extended commit has power %d of %d", voted, total)
	}
	return nil
}
