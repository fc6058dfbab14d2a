package main

import (
	"context"
	"fmt"
	"io"

	"holdfast/deploy"

	"github.com/spf13/cobra"
)

func (a *app) storePhraseCmd() *cobra.Command {
	var yes bool
	cmd := &cobra.Command{
		Use: "store-phrase NAME", Short: "Show the recovery phrase of the store of a contract's buckets", Args: asUsed,
		Long:    "Shows 24 words that open everything in the contract's buckets, and undo deletes there. They derive from your account's root:\nwho has your key file needs no copy of them. They are for restoring the store without the grid.",
		Example: "  holdfast contract store-phrase photos\n  holdfast contract store-phrase photos --yes > phrase",
	}
	cmd.RunE = a.withUser(func(ctx context.Context, w io.Writer, u *deploy.User, args []string) error {
		phrase, err := u.StorePhrase(ctx, args[0])
		if err != nil {
			return err
		}
		if !yes {
			if err := confirm(cmd, "show the words that open all buckets of "+args[0]+"?"); err != nil {
				return err
			}
		}
		if a.json {
			return printJSON(w, struct {
				Phrase string `json:"phrase"`
			}{phrase})
		}
		_, err = fmt.Fprintln(w, phrase)
		return err
	})
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return cmd
}
