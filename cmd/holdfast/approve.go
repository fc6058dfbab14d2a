package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"holdfast/api"
	"holdfast/deploy"
	"holdfast/identity"
	"holdfast/ledger"

	"github.com/spf13/cobra"
)

// lacking says what a proposal waits for.
func lacking(p *ledger.Proposal) string {
	if len(p.Missing) == 0 {
		return "comes true at " + when(p.Ripe)
	}
	given := append([]identity.AccountID{p.Account}, p.Consented...)
	var out []string
	for _, a := range p.Missing {
		var left []string
		for _, q := range a.Parties {
			if !slices.Contains(given, q.Account) {
				left = append(left, q.Account.Short())
			}
		}
		out = append(out, fmt.Sprintf("%s has %d of %d, of %s", a.Name, a.Given(given), a.Need, strings.Join(left, ", ")))
	}
	return "waits for consent: " + strings.Join(out, "; ")
}

func when(ms int64) string { return time.UnixMilli(ms).UTC().Format(time.RFC3339) }

// proposed tells the user that what he asked for is not done yet.
func (a *app) proposed(w io.Writer, p *ledger.Proposal) error {
	if a.json {
		return printJSON(w, struct {
			Proposal *ledger.Proposal `json:"proposal"`
		}{p})
	}
	fmt.Fprintf(w, "proposed as %s\n%s\n", p.ID, lacking(p))
	if len(p.Missing) > 0 {
		fmt.Fprintf(w, "they consent with holdfast contract approve, until %s\n", when(p.Until))
	} else {
		fmt.Fprintf(w, "until then %s takes it back\n", a.self("contract withdraw "+p.ID.String()))
	}
	return nil
}

func (a *app) contractProposalsCmd() *cobra.Command {
	return &cobra.Command{
		Use: "proposals", Short: "List what you proposed, and what waits for your consent", Args: asUsed,
		Example: "  holdfast contract proposals\n  holdfast contract proposals --json",
		RunE: a.withUser(func(ctx context.Context, w io.Writer, u *deploy.User, _ []string) error {
			own, asked, err := u.Proposals(ctx)
			if err != nil {
				return err
			}
			if a.json {
				return printJSON(w, struct {
					Own   []*ledger.Proposal `json:"own"`
					Asked []*ledger.Proposal `json:"asked"`
				}{orEmpty(own), orEmpty(asked)})
			}
			if len(own)+len(asked) == 0 {
				fmt.Fprintln(w, "nothing is proposed")
				return nil
			}
			rows := [][]string{{"PROPOSAL", "WHAT", "BY", "UNTIL", "STATE"}}
			for _, p := range append(slices.Clone(own), asked...) {
				by := p.Account.Short()
				if p.Account == u.Account {
					by = "you"
				}
				state := lacking(p)
				if p.Account != u.Account && !slices.Contains(p.Consented, u.Account) && slices.ContainsFunc(p.Missing, func(m identity.Approval) bool { return m.Has(u.Account) }) {
					state = "waits for you"
				}
				rows = append(rows, []string{p.ID.String(), string(p.Kind), by, when(p.Until), state})
			}
			table(w, rows...)
			return nil
		}),
	}
}

func orEmpty[T any](s []T) []T {
	if s == nil {
		return []T{}
	}
	return s
}

// parseProposal reads an argument.
func parseProposal(cmd *cobra.Command, s string) (id ledger.ProposalID, err error) {
	if err := id.UnmarshalText([]byte(s)); err != nil {
		return id, wrong(cmd, err)
	}
	return id, nil
}

func (a *app) contractApproveCmd() *cobra.Command {
	var yes, dry bool
	cmd := &cobra.Command{
		Use: "approve PROPOSAL", Short: "Show what is proposed, and consent to it", Args: asUsed,
		Long:    "Opens what is proposed with your key, recomputes what its header commits to, shows what it changes, asks, and gives your\nconsent. The one that is enough puts it into effect.",
		Example: "  holdfast contract proposals\n  holdfast contract approve prop1…\n  holdfast contract approve prop1… --dry-run       # look at it only",
	}
	cmd.RunE = a.withUser(func(ctx context.Context, w io.Writer, u *deploy.User, args []string) error {
		id, err := parseProposal(cmd, args[0])
		if err != nil {
			return err
		}
		r, err := u.Review(ctx, id)
		if err != nil {
			return err
		}
		if !a.json || !yes && !dry {
			out := w
			if a.json { // standard output is for the end
				out = cmd.ErrOrStderr()
			}
			if err := a.showReview(ctx, out, u, r); err != nil {
				return err
			}
		}
		if dry {
			var out error
			if len(r.Breaches) > 0 {
				out = deploy.OutsideError(r.Breaches)
			}
			if a.json {
				return errors.Join(printJSON(w, r.Proposal), out)
			}
			return out
		}
		if len(r.Breaches) > 0 {
			return deploy.OutsideError(r.Breaches)
		}
		if !yes {
			if err := confirm(cmd, "consent to this?"); err != nil {
				return err
			}
		}
		left, err := u.Consent(ctx, r)
		if err != nil {
			return err
		}
		if a.json {
			return printJSON(w, struct {
				Proposal ledger.ProposalID `json:"proposal"`
				Done     bool              `json:"done"`
				Left     *ledger.Proposal  `json:"left,omitempty"`
			}{id, left == nil, left})
		}
		if left == nil {
			fmt.Fprintln(w, "that was enough: it is in effect")
			return nil
		}
		fmt.Fprintln(w, "you have consented; it", lacking(left))
		return nil
	})
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	cmd.Flags().BoolVar(&dry, "dry-run", false, "show it, and consent to nothing")
	return cmd
}

// showReview says what a proposal does.
func (a *app) showReview(ctx context.Context, w io.Writer, u *deploy.User, r *deploy.Review) error {
	p := r.Proposal
	fmt.Fprintf(w, "%s proposes %s\n", p.Account, p.Kind)
	fmt.Fprintf(w, "it %s\n", lacking(p))
	switch r.Tx.Kind {
	case ledger.KindContractSubmit:
		fmt.Fprintf(w, "revision %d of %s; its body is the one that the header commits to\n", r.Header.Revision, r.Header.Name)
		if r.Blind {
			fmt.Fprintln(w, "note: you have no key to the current revision, so that all is shown as new")
		}
		fmt.Fprint(w, r.Plan.Text())
		return nil
	case ledger.KindTemplate:
		s, err := ledger.Payload[ledger.TemplatePublish](r.Tx)
		if err != nil {
			return err
		}
		fmt.Fprintf(w, "template %s@%s, %d bytes, sha256 %x\n", s.Name, s.Version, s.Size, s.Digest)
		raw, err := u.TemplateDocument(ctx, s.Digest)
		if err != nil {
			return err
		}
		showText(w, raw)
		return nil
	case ledger.KindContractCancel, ledger.KindContractState:
		what := "the end of"
		if r.Tx.Kind == ledger.KindContractState {
			s, err := ledger.Payload[ledger.ContractState](r.Tx)
			if err != nil {
				return err
			}
			what = map[string]string{ledger.Paused: "a pause of", ledger.Active: "that it works again:"}[s.State]
		}
		fmt.Fprintf(w, "%s %s\n", what, p.Contract)
		return nil
	case ledger.KindVolumeRestore:
		s, err := ledger.Payload[ledger.VolumeRestore](r.Tx)
		if err != nil {
			return err
		}
		v, err := api.Get[ledger.Volume](ctx, u.Client, ledger.VolumeKey(s.Volume))
		if err != nil {
			return fmt.Errorf("%v: %w", s.Volume, err)
		}
		fmt.Fprintf(w, "volume %s of %s is put back to snapshot %x: what was written since is not in it any more\n", v.Name, p.Contract, s.Snapshot)
		return nil
	case ledger.KindAccountPolicy:
		s, err := ledger.Payload[ledger.AccountPolicy](r.Tx)
		if err != nil {
			return err
		}
		acct, err := api.Get[identity.Account](ctx, u.Client, ledger.AccountKey(p.Account))
		if err != nil {
			return fmt.Errorf("%v: %w", p.Account, err)
		}
		showBounds(w, &acct.Policy.Bounds, &s.Policy.Bounds)
		fmt.Fprintln(w, "its policy would be:")
		return printJSON(w, s.Policy)
	case ledger.KindImageSign:
		s, err := ledger.Payload[ledger.ImageSign](r.Tx)
		if err != nil {
			return err
		}
		text := "its signature on image sha256:%x\n"
		if s.Revoke {
			text = "to take back " + text
		}
		fmt.Fprintf(w, text, s.Digest)
		return nil
	}
	return fmt.Errorf("this program cannot show a %s: use a newer one", r.Tx.Kind)
}

func (a *app) contractWithdrawCmd() *cobra.Command {
	return &cobra.Command{
		Use: "withdraw PROPOSAL", Short: "Take back what you proposed", Args: asUsed, Example: "  holdfast contract withdraw prop1…",
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := parseProposal(cmd, args[0])
			if err != nil {
				return err
			}
			return a.withUser(func(ctx context.Context, w io.Writer, u *deploy.User, _ []string) error {
				if err := u.Withdraw(ctx, id); err != nil {
					return err
				}
				if a.json {
					return printJSON(w, struct {
						Withdrawn ledger.ProposalID `json:"withdrawn"`
					}{id})
				}
				fmt.Fprintf(w, "%s is withdrawn\n", id.Short())
				return nil
			})(cmd, args)
		},
	}
}

// contractStateCmd is a command that changes a contract's state. from says which contracts it is for.
func (a *app) contractStateCmd(verb, short, to, example string, from func(*ledger.Contract) bool) *cobra.Command {
	return &cobra.Command{
		Use: verb + " NAME", Short: short, Args: asUsed, Example: "  holdfast contract " + example + " reader",
		RunE: a.withUser(func(ctx context.Context, w io.Writer, u *deploy.User, args []string) error {
			c, err := u.Find(ctx, args[0])
			if err != nil {
				return err
			}
			switch {
			case c.State == to:
				return a.showState(w, c)
			case from != nil && !from(c):
				return fmt.Errorf("%s is %s: there is nothing to %s", c.Name, c.State, verb)
			}
			p, err := u.SetState(ctx, c.ID, to)
			if err != nil {
				return err
			}
			return a.changed(ctx, w, u, c, p)
		}),
	}
}

// changed shows a contract after an act on it, or that the act is proposed.
func (a *app) changed(ctx context.Context, w io.Writer, u *deploy.User, c *ledger.Contract, p *ledger.Proposal) error {
	if p != nil {
		return a.proposed(w, p)
	}
	c, err := u.Find(ctx, c.ID.String())
	if err != nil {
		return err
	}
	return a.showState(w, c)
}

// showState says what a contract's state means.
func (a *app) showState(w io.Writer, c *ledger.Contract) error {
	if a.json {
		return printJSON(w, c)
	}
	text := map[string]string{
		ledger.Active: "is active", ledger.Paused: "is paused: its workloads stand still, all else is kept", ledger.Retired: "is retired, for good",
		ledger.Cancelling: "is cancelled: it goes on until " + when(c.Due) + ", and " + a.self("contract restore "+c.Name) + " takes that back",
		ledger.Cancelled:  "has ended: its data is kept until " + when(c.Due) + ", and " + a.self("contract restore "+c.ID.String()) + " brings it back",
	}[c.State]
	fmt.Fprintf(w, "%s %s\n", c.Name, text)
	return nil
}

func (a *app) contractCancelCmd() *cobra.Command {
	var yes bool
	cmd := &cobra.Command{
		Use: "cancel NAME", Short: "End a contract, after a while in which it can be taken back", Args: asUsed,
		Long:    "The contract goes on for a while (a day, or what the grid says), in which holdfast contract restore takes it back. Then its\nworkloads stop, and its name and hosts are free. Its data is kept for a longer while, in which it can be brought back too.",
		Example: "  holdfast contract cancel reader                  # asks for the contract's name\n  holdfast contract cancel reader --yes\n  holdfast contract restore reader",
	}
	cmd.RunE = a.withUser(func(ctx context.Context, w io.Writer, u *deploy.User, args []string) error {
		c, err := u.Find(ctx, args[0])
		if err != nil {
			return err
		}
		if c.State != ledger.Active && c.State != ledger.Paused {
			return a.showState(w, c)
		}
		if !yes {
			if err := typed(cmd, c.Name+" would end.", c.Name); err != nil {
				return err
			}
		}
		p, err := u.Cancel(ctx, c.ID)
		if err != nil {
			return err
		}
		return a.changed(ctx, w, u, c, p)
	})
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return cmd
}
