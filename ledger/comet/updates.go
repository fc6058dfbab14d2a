package comet

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"slices"

	abci "github.com/cometbft/cometbft/abci/types"
	"github.com/cometbft/cometbft/crypto/encoding"
	"github.com/cometbft/cometbft/crypto/mldsa65"
)

// updates is what changes in the set between two states, as CometBFT takes it. CometBFT stops the chain over an update that it
// cannot use, so that what a machine must not decide is an error here.
func updates(old, next State) ([]abci.ValidatorUpdate, error) {
	was, ok := old.(Elector)
	is, also := next.(Elector)
	if !ok || !also {
		return nil, nil
	}
	before, after := was.Validators(), is.Validators()
	if slices.EqualFunc(before, after, func(a, b Member) bool { return a.Power == b.Power && bytes.Equal(a.Key, b.Key) }) {
		return nil, nil
	}
	if len(after) == 0 || len(after) > maxSet {
		return nil, fmt.Errorf("the state names %d validators, 1 to %d are allowed", len(after), maxSet)
	}
	power := map[string]int64{}
	for _, m := range before {
		power[string(m.Key)] = 0
	}
	for _, m := range after {
		if power[string(m.Key)] > 0 || m.Power < 1 {
			return nil, errors.New("the state names a validator twice, or without power")
		}
		power[string(m.Key)] = m.Power
	}
	for _, m := range before {
		if power[string(m.Key)] == m.Power {
			delete(power, string(m.Key))
		}
	}
	var out []abci.ValidatorUpdate
	keys := make([]string, 0, len(power))
	for k := range power {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, cmp.Compare)
	for _, k := range keys {
		pub, err := mldsa65.NewPubKeyFromBytes([]byte(k))
		if err != nil {
			return nil, fmt.Errorf("the state names a validator whose key is none: %w", err)
		}
		pk, err := encoding.PubKeyToProto(pub)
		if err != nil {
			return nil, err
		}
		out = append(out, abci.ValidatorUpdate{PubKey: pk, Power: power[k]})
	}
	return out, nil
}
