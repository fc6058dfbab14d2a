package main

import (
	"holdfast/api"
	"holdfast/identity"
	"holdfast/ledger"

	"github.com/spf13/cobra"
)

func (a *app) farmCmd() *cobra.Command {
	cmd := group(&cobra.Command{Use: "farm", Short: "Look at farms"})
	cmd.AddCommand(a.farmListCmd())
	return cmd
}

func (a *app) farmListCmd() *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "List the grid's farms", Args: asUsed,
		Long:    "Lists the grid's farms, with the IDs that new machines are told: holdfast.farm= on a kernel's command line, or --farm of\nholdfast run node. Machines of a farm are admitted by its owner.",
		Example: "  holdfast farm list\n  holdfast farm list --json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, _, err := a.connect()
			if err != nil {
				return err
			}
			defer c.Close()
			farms, err := api.List[identity.FarmID, ledger.Farm](cmd.Context(), c, ledger.FarmsKey, ledger.FarmKey)
			if err != nil {
				return err
			}
			if a.json {
				if farms == nil {
					farms = []*ledger.Farm{}
				}
				return printJSON(cmd.OutOrStdout(), farms)
			}
			rows := [][]string{{"NAME", "OWNER", "ID"}}
			for _, f := range farms {
				rows = append(rows, []string{f.Name, f.Owner.String(), f.ID.String()})
			}
			table(cmd.OutOrStdout(), rows...)
			return nil
		},
	}
}
