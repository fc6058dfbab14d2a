package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"holdfast/contract"
	"holdfast/deploy"
	"holdfast/ledger"

	"github.com/spf13/cobra"
)

// withUser is the body of a command that acts as the user.
func (a *app) withUser(f func(ctx context.Context, w io.Writer, u *deploy.User, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		u, _, err := a.user(cmd.Context())
		if err != nil {
			return err
		}
		defer u.Client.Close()
		return f(cmd.Context(), cmd.OutOrStdout(), u, args)
	}
}

func (a *app) contractCmd() *cobra.Command {
	cmd := group(&cobra.Command{Use: "contract", Short: "Look at contracts, approve, pause and end them"})
	cmd.AddCommand(
		&cobra.Command{
			Use: "list", Short: "List the account's contracts", Args: asUsed, Example: "  holdfast contract list\n  holdfast contract list --json",
			RunE: a.withUser(a.contractList),
		},
		a.contractShowCmd(),
		&cobra.Command{
			Use: "history NAME", Short: "List a contract's revisions", Args: asUsed, Example: "  holdfast contract history reader",
			RunE: a.withUser(a.contractHistory),
		},
		a.contractDiffCmd(), a.contractRollbackCmd(),
		a.contractExportCmd(), a.contractVerifyCmd(),
		a.storePhraseCmd(),
		a.contractProposalsCmd(), a.contractApproveCmd(), a.contractWithdrawCmd(),
		a.contractStateCmd("pause", "Stop a contract's workloads, and keep all else", ledger.Paused, "pause", nil),
		a.contractStateCmd("resume", "Set a paused contract to work again", ledger.Active, "resume", func(c *ledger.Contract) bool { return c.State == ledger.Paused }),
		a.contractStateCmd("restore", "Take back that a contract was cancelled", ledger.Active, "restore", func(c *ledger.Contract) bool { return c.State == ledger.Cancelling || c.State == ledger.Cancelled }),
		a.contractCancelCmd(),
	)
	return cmd
}

func (a *app) contractList(ctx context.Context, w io.Writer, u *deploy.User, _ []string) error {
	all, err := u.Contracts(ctx)
	if err != nil {
		return err
	}
	if a.json {
		if all == nil {
			all = []*ledger.Contract{}
		}
		return printJSON(w, all)
	}
	if len(all) == 0 {
		fmt.Fprintln(w, "no contracts yet: holdfast deploy FILE makes one")
		return nil
	}
	rows := [][]string{{"NAME", "REVISION", "STATE", "ID"}}
	for _, c := range all {
		rows = append(rows, []string{c.Name, fmt.Sprint(c.Revision), stateColour(w, c.State), c.ID.String()})
	}
	table(w, rows...)
	return nil
}

func (a *app) contractShowCmd() *cobra.Command {
	var body bool
	cmd := &cobra.Command{
		Use: "show NAME[@REVISION]", Short: "Show what the ledger has of a contract, and with --body what is sealed", Args: asUsed,
		Long:    "Shows the header of the current revision, which everybody can read on the ledger. With --body it opens the sealed body\nwith your key and prints the Compose file that was deployed. A contract is named by its name or its ID.",
		Example: "  holdfast contract show reader\n  holdfast contract show reader@3\n  holdfast contract show reader --body > compose.yaml",
	}
	cmd.RunE = a.withUser(func(ctx context.Context, w io.Writer, u *deploy.User, args []string) error {
		c, rev, err := a.revisionOf(ctx, cmd, u, args[0])
		if err != nil {
			return err
		}
		if body {
			return a.contractBody(ctx, w, u, c, rev)
		}
		h, err := u.Header(ctx, rev)
		if err != nil {
			return err
		}
		if a.json {
			return printJSON(w, struct {
				Contract *ledger.Contract `json:"contract"`
				Header   *contract.Header `json:"header"`
			}{c, h})
		}
		showHeader(w, c, h)
		return nil
	})
	cmd.Flags().BoolVar(&body, "body", false, "print the Compose file that was deployed")
	return cmd
}

func (a *app) contractBody(ctx context.Context, w io.Writer, u *deploy.User, c *ledger.Contract, rev contract.RevisionID) error {
	cur, err := u.Open(ctx, c, rev)
	if err != nil {
		return err
	}
	if a.json {
		return printJSON(w, struct {
			Source string `json:"source"`
		}{string(cur.Body.Source)})
	}
	_, err = w.Write(cur.Body.Source)
	return err
}

func showHeader(w io.Writer, c *ledger.Contract, h *contract.Header) {
	table(w, []string{"contract", c.Name}, []string{"id", c.ID.String()}, []string{"state", stateColour(w, c.State)}, []string{"account", c.Account.String()},
		[]string{"revision", fmt.Sprintf("%d, of %s", h.Revision, time.Unix(c.Times[h.Revision-c.First()], 0).UTC().Format(time.RFC3339))},
		[]string{"", h.RevisionID().String()}, []string{"body", fmt.Sprintf("%d bytes, sealed", h.SealedSize)})
	if t := trialText(c, h); t != "" {
		fmt.Fprintln(w, t)
	}
	fmt.Fprintln(w)
	rows := [][]string{{"SERVICE", "REPLICAS", "CORES", "MEMORY", "VOLUMES", "EGRESS", "PLACEMENT"}}
	for _, s := range h.Services {
		var where []string
		if s.Placement.Spread != "" {
			where = append(where, "one a "+s.Placement.Spread)
		}
		if len(s.Placement.Farms) > 0 {
			where = append(where, "on "+strings.Join(s.Placement.Farms, ", "))
		}
		if len(s.Placement.Nodes) > 0 {
			where = append(where, "on "+strings.Join(s.Placement.Nodes, ", "))
		}
		egress := "no"
		if s.Egress {
			egress = "yes"
		}
		rows = append(rows, []string{s.Name, fmt.Sprint(s.Replicas), fmt.Sprintf("%.1f", float64(s.CPUMilli)/1000), mib(int64(s.Memory)), or(strings.Join(s.Volumes, ", "), "-"), egress, or(strings.Join(where, "; "), "anywhere")})
	}
	table(w, rows...)
	if len(h.Volumes) > 0 {
		rows = [][]string{{"VOLUME", "SIZE"}}
		for _, v := range h.Volumes {
			rows = append(rows, []string{v.Name, mib(int64(v.Size))})
		}
		fmt.Fprintln(w)
		table(w, rows...)
	}
	if len(h.Routes) > 0 {
		rows = [][]string{{"ROUTE", "SERVICE", "PORT"}}
		for _, r := range h.Routes {
			rows = append(rows, []string{r.Host, r.Service, fmt.Sprint(r.Port)})
		}
		fmt.Fprintln(w)
		table(w, rows...)
	}
}

// trialText says what the ledger thinks of a revision, where it is not simply good.
func trialText(c *ledger.Contract, h *contract.Header) string {
	rev := h.RevisionID()
	switch f := c.Undone(rev); {
	case f != nil:
		return "rolled back: " + f.Where()
	case rev != c.Current || !c.Trial.On():
		return ""
	case c.Trial.Stuck != nil:
		return "on trial, and stands still: " + c.Trial.Stuck.Where()
	case c.Trial.From.IsZero():
		return "on trial: it was not ready everywhere yet, and there is none to go back to"
	}
	return fmt.Sprintf("on trial until %s, else revision %d comes back", stamp(time.UnixMilli(c.Trial.Until)), c.Number(c.Trial.From))
}

func or(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}

func (a *app) contractHistory(ctx context.Context, w io.Writer, u *deploy.User, args []string) error {
	c, err := u.Find(ctx, args[0])
	if err != nil {
		return err
	}
	type row struct {
		Revision int                 `json:"revision"`
		ID       contract.RevisionID `json:"id"`
		Time     time.Time           `json:"time"`
		Current  bool                `json:"current"`
		Good     bool                `json:"good"`            // the last one that was ready everywhere
		Undone   *ledger.Failure     `json:"undone,omitzero"` // why it was rolled back
	}
	all := []row{}
	first := int(c.First()) // the ledger lists the newest ones
	for i, r := range c.Revisions {
		all = append(all, row{first + i, r, time.Unix(c.Times[i], 0).UTC(), r == c.Current, r == c.Good, c.Undone(r)})
	}
	if a.json {
		return printJSON(w, all)
	}
	rows := [][]string{{"REVISION", "TIME", "ID", "STATE"}}
	for _, r := range all {
		state := ""
		switch {
		case r.Undone != nil:
			state = "rolled back: " + r.Undone.Where()
		case r.Current && c.Trial.On():
			state = "current, on trial"
		case r.Current:
			state = "current"
		}
		rows = append(rows, []string{fmt.Sprint(r.Revision), r.Time.Format(time.RFC3339), r.ID.String(), state})
	}
	table(w, rows...)
	return nil
}
