package node

import (
	"context"
	"fmt"
	"slices"

	"holdfast/api"
	"holdfast/contract"
)

// The ledger cannot read bodies: a node holds what it starts to the bounds of the account's policy, as it is now. What runs
// goes on when they become tighter, or a signature is taken back; it is not started again.

// bar is why a workload must not start: fixed words, and what is for its owner's eyes.
type bar struct{ words, detail string }

// What a report says of a workload that must not start. Everybody can read reports: they quote no image.
const (
	barRegistry = "its image is of no registry that the account's policy allows"
	barSigner   = "its image lacks a signature that the account's policy asks for"
	barUnread   = "the signatures of its image cannot be read now"
)

// judge finds out which services of an opened revision must not start. What cannot be read now is as it was read last, or
// bars all.
func (a *Agent) judge(ctx context.Context, c *ContractView, o *opened) error {
	signed, err := api.Signed(ctx, a.ledger, &c.Bounds, o.body)
	if err != nil && o.bars != nil {
		return fmt.Errorf("signatures of images: %w", err)
	}
	o.bars = map[string]*bar{}
	for i := range o.body.Services {
		p := &o.body.Services[i]
		out := p.Outside(&c.Bounds, signed)
		if len(out) == 0 {
			continue
		}
		b := &bar{barSigner, out[0].Text}
		switch {
		case slices.ContainsFunc(out, func(x contract.Breach) bool { return x.Bound == contract.BoundRegistries }):
			b.words = barRegistry
		case err != nil:
			b = &bar{barUnread, err.Error()}
		}
		o.bars[p.Name] = b
	}
	if err != nil {
		return fmt.Errorf("signatures of images: %w", err)
	}
	return nil
}
