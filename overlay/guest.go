package overlay

import (
	"fmt"

	"github.com/google/nftables"
)

// A Guest is a machine that is no node and takes part in a system network: what comes to it by that network is answers to
// what it asked, and nothing goes through it. What else its network does is not holdfast's business.
type Guest struct {
	Main      string // its namespace; empty means that of this process
	Interface string // Config.Name of the Network
}

// Apply replaces the rules in one step.
func (g Guest) Apply() error {
	err := within(g.Main, func() error {
		return replaceTable(func(r *ruleset) error {
			rule := r.chain("input", nftables.ChainTypeFilter, nftables.ChainHookInput, nftables.ChainPriorityFilter, nftables.ChainPolicyAccept)
			rule(iif(g.Interface), answers(), accept())
			rule(iif(g.Interface), drop())
			rule = r.chain("forward", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter, nftables.ChainPolicyAccept)
			rule(iif(g.Interface), drop())
			rule(oif(g.Interface), drop())
			return nil
		})
	})
	if err != nil {
		return fmt.Errorf("firewall of a guest: %w", err)
	}
	return nil
}
