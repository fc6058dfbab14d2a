package main

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"strings"

	"holdfast/contract"
	"holdfast/deploy"
	"holdfast/ledger"

	"github.com/spf13/cobra"
)

// revisionOf reads NAME@REVISION; without a revision it is the current one.
func (a *app) revisionOf(ctx context.Context, cmd *cobra.Command, u *deploy.User, arg string) (*ledger.Contract, contract.RevisionID, error) {
	name, number, at := strings.Cut(arg, "@")
	c, err := u.Find(ctx, name)
	if err != nil || !at {
		if c != nil {
			return c, c.Current, err
		}
		return nil, contract.RevisionID{}, err
	}
	n, err := parseRevision(cmd, number)
	if err != nil {
		return nil, contract.RevisionID{}, err
	}
	rev, err := deploy.Revision(c, n)
	return c, rev, err
}

func parseRevision(cmd *cobra.Command, s string) (int, error) {
	n, err := strconv.ParseUint(s, 10, 31)
	if err != nil {
		return 0, wrong(cmd, fmt.Errorf("%q is no number of a revision", s))
	}
	return int(n), nil
}

func (a *app) contractDiffCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use: "diff NAME [FROM [TO]]", Short: "Show what changed between revisions", Args: cobra.RangeArgs(1, 3),
		Long:    "Opens both revisions with your key and shows what changed from one to the other. Without FROM it is what the current one\nchanged; without TO, up to the current one. FROM 0 shows all as new.",
		Example: "  holdfast contract diff reader\n  holdfast contract diff reader 3\n  holdfast contract diff reader 3 5 --json",
	}
	cmd.RunE = a.withUser(func(ctx context.Context, w io.Writer, u *deploy.User, args []string) error {
		c, err := u.Find(ctx, args[0])
		if err != nil {
			return err
		}
		from, to := int(c.Revision)-1, int(c.Revision)
		if len(args) > 1 {
			if from, err = parseRevision(cmd, args[1]); err != nil {
				return err
			}
		}
		if len(args) > 2 {
			if to, err = parseRevision(cmd, args[2]); err != nil {
				return err
			}
			if to == 0 {
				return wrong(cmd, fmt.Errorf("there is no revision 0 to compare with"))
			}
		}
		plan, err := u.Difference(ctx, c, from, to)
		if err != nil {
			return err
		}
		if a.json {
			return printJSON(w, struct {
				From int           `json:"from"`
				To   int           `json:"to"`
				Plan contract.Plan `json:"plan"`
			}{from, to, *plan})
		}
		fmt.Fprintf(w, "revision %d to %d of %s\n", from, to, c.Name)
		fmt.Fprint(w, plan.Text())
		return nil
	})
	return cmd
}

func (a *app) contractRollbackCmd() *cobra.Command {
	var yes, dry bool
	cmd := &cobra.Command{
		Use: "rollback NAME REVISION", Short: "Make an earlier revision the contract's next", Args: asUsed,
		Long:    "A revision is never changed: this makes a new one of what an earlier one was, shows what that changes, asks, and signs it.\nWhat others have a say in is proposed. Data in volumes and buckets stays as it is.",
		Example: "  holdfast contract history reader\n  holdfast contract rollback reader 3 --dry-run\n  holdfast contract rollback reader 3",
	}
	cmd.RunE = a.withUser(func(ctx context.Context, w io.Writer, u *deploy.User, args []string) error {
		n, err := parseRevision(cmd, args[1])
		if err != nil {
			return err
		}
		c, err := u.Find(ctx, args[0])
		if err != nil {
			return err
		}
		p, err := u.ProposeRollback(ctx, c, n)
		if err != nil {
			return err
		}
		if dry {
			return a.showPlan(w, p)
		}
		pr := newProgress(cmd.ErrOrStderr())
		defer pr.done()
		if _, err := a.submit(cmd, u, p, yes, pr); err != nil {
			return a.unlessProposed(w, err)
		}
		if a.json {
			if c, err = u.Find(ctx, c.ID.String()); err != nil {
				return err
			}
			return printJSON(w, c)
		}
		return nil
	})
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	cmd.Flags().BoolVar(&dry, "dry-run", false, "show what it would change, and change nothing")
	return cmd
}
