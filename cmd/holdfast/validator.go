package main

import (
	"fmt"

	"github.com/spf13/cobra"
)

func (a *app) validatorCmd() *cobra.Command {
	cmd := group(&cobra.Command{Use: "validator", Short: "Look at validators"})
	cmd.AddCommand(a.validatorListCmd())
	return cmd
}

func (a *app) validatorListCmd() *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "List the grid's validators", Args: asUsed,
		Long:    "Lists the validators that the ledger names now, as this machine has verified it, with the IDs of their consensus keys.",
		Example: "  holdfast validator list\n  holdfast validator list --json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, _, err := a.connect()
			if err != nil {
				return err
			}
			defer c.Close()
			set, err := c.Validators(cmd.Context())
			if err != nil {
				return err
			}
			type validator struct {
				ID      string `json:"id"`
				Name    string `json:"name"`
				Power   int64  `json:"power"`
				Address string `json:"address"`
			}
			out := struct {
				Height     int64       `json:"height"` // of the block that made the set; 0 is the genesis
				Validators []validator `json:"validators"`
				Warning    string      `json:"warning,omitempty"`
			}{Height: set.Height}
			rows := [][]string{{"NAME", "POWER", "ADDRESS", "ID"}}
			for i := range set.Members {
				v := &set.Members[i]
				out.Validators = append(out.Validators, validator{v.ID().String(), v.Name, v.Power, v.Address})
				rows = append(rows, []string{v.Name, fmt.Sprint(v.Power), v.Address, v.ID().String()})
			}
			if len(set.Members) == 1 {
				out.Warning = oneValidator
			}
			if a.json {
				return printJSON(cmd.OutOrStdout(), out)
			}
			table(cmd.OutOrStdout(), rows...)
			if out.Warning != "" {
				_, err = fmt.Fprintln(cmd.OutOrStdout(), "warning: "+out.Warning)
			}
			return err
		},
	}
}
