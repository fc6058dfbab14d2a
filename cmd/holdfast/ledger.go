package main

import (
	"fmt"
	"time"

	"holdfast/contract"
	"holdfast/identity"
	"holdfast/ledger"

	"github.com/spf13/cobra"
)

const oneValidator = "one validator: its operator could rewrite history"

func (a *app) ledgerCmd() *cobra.Command {
	cmd := group(&cobra.Command{Use: "ledger", Short: "Look at the ledger, and verify a copy of it"})
	cmd.AddCommand(&cobra.Command{
		Use: "show", Short: "Show the grid's ledger as this machine has verified it", Args: asUsed, Example: "  holdfast ledger show\n  holdfast ledger show --json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, _, err := a.connect()
			if err != nil {
				return err
			}
			defer c.Close()
			v, err := c.Read(cmd.Context(), ledger.GridKey, ledger.NodesKey, ledger.ContractsKey)
			if err != nil {
				return err
			}
			g := c.Genesis()
			set, err := c.Validators(cmd.Context())
			if err != nil {
				return err
			}
			out := struct {
				Grid       identity.GridID    `json:"grid"`
				Name       string             `json:"name"`
				Height     int64              `json:"height"`
				Time       time.Time          `json:"time"`
				Validators []ledger.Validator `json:"validators"`
				Contracts  int                `json:"contracts"`
				Nodes      int                `json:"nodes"`
				Warning    string             `json:"warning,omitempty"`
			}{c.Grid(), g.Name, v.Height, v.Time, set.Members, count[contract.ID](v.Value(ledger.ContractsKey)), count[identity.NodeID](v.Value(ledger.NodesKey)), ""}
			if len(set.Members) == 1 {
				out.Warning = oneValidator
			}
			if a.json {
				return printJSON(cmd.OutOrStdout(), out)
			}
			rows := [][]string{{"grid", out.Grid.String()}, {"name", out.Name}, {"height", fmt.Sprint(out.Height)}, {"time", out.Time.UTC().Format(time.RFC3339)}, {"nodes", fmt.Sprint(out.Nodes)}, {"contracts", fmt.Sprint(out.Contracts)}}
			for _, x := range out.Validators {
				rows = append(rows, []string{"validator", fmt.Sprintf("%s, power %d, %s", x.Name, x.Power, x.Address)})
			}
			if out.Warning != "" {
				rows = append(rows, []string{"warning", out.Warning})
			}
			table(cmd.OutOrStdout(), rows...)
			return nil
		},
	})
	cmd.AddCommand(a.ledgerVerifyCmd())
	return cmd
}

func count[T any](raw []byte, ok bool) int {
	if !ok {
		return 0
	}
	l, err := ledger.Decode[[]T](raw)
	if err != nil {
		return 0
	}
	return len(*l)
}
