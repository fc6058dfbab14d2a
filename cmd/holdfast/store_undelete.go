package main

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"holdfast/store/control"
	"holdfast/store/s3"
)

func (a *app) storeUndeleteCmd() *cobra.Command {
	var since moment
	var yes bool
	cmd := a.frontCmd(&cobra.Command{
		Use: "undelete", Short: "Undo what users deleted and replaced since a time",
		Long: "Brings back what was deleted or replaced through S3 since a time: buckets, objects, all their versions. A front end keeps\nit for 24 hours, where no user of S3 finds it. What was written over an object since goes where that was; what was written\nsince and replaced nothing stays.\n\n" +
			"Change the stolen secret first: holdfast store user rotate. Against a thief of the front end's own keys there is\nholdfast restore store --since, which needs the phrase.",
		Example: "  holdfast store undelete --dir store --since 3h\n  holdfast store undelete --dir store --since 2026-11-26T08:00:00Z --yes",
	}, func(cmd *cobra.Command, c *control.Client, _ []string) error {
		if since.IsZero() {
			return wrong(cmd, errors.New("--since is missing"))
		}
		if !yes {
			if err := confirm(cmd, fmt.Sprintf("bring back everything that was deleted or replaced since %s, by whomever?", stamp(since.Time))); err != nil {
				return err
			}
		}
		got, err := c.Undelete(cmd.Context(), since.Time)
		if err != nil {
			return err
		}
		if a.json {
			return printJSON(cmd.OutOrStdout(), got)
		}
		showUndeleted(cmd.OutOrStdout(), got)
		return nil
	})
	cmd.Flags().Var(&since, "since", sinceUsage)
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return cmd
}

func showUndeleted(w io.Writer, u s3.Undeleted) {
	fmt.Fprintf(w, "back: %s, %s; %s gone\n", some(u.Buckets, "bucket"), some(u.Versions, "version")+" of objects", some(u.Markers, "delete marker"))
	if len(u.Kept) > 0 {
		fmt.Fprintf(w, "not back, since what was made anew in their place is kept: %s\n", printable([]byte(strings.Join(u.Kept, " "))))
	}
}
