package main

import (
	"fmt"
	"strings"
	"time"

	"holdfast/contract"
	"holdfast/identity"
	"holdfast/ledger"

	"github.com/spf13/cobra"
)

func (a *app) nodeCmd() *cobra.Command {
	cmd := group(&cobra.Command{Use: "node", Short: "Look at nodes"})
	cmd.AddCommand(&cobra.Command{
		Use: "list", Short: "List the grid's nodes", Args: asUsed, Example: "  holdfast node list\n  holdfast node list --json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, _, err := a.connect()
			if err != nil {
				return err
			}
			defer c.Close()
			nodes, err := c.Nodes(cmd.Context())
			if err != nil {
				return err
			}
			w := cmd.OutOrStdout()
			if a.json {
				if nodes == nil {
					nodes = []*ledger.Node{}
				}
				return printJSON(w, nodes)
			}
			rows := [][]string{{"NAME", "FARM", "STATE", "CORES", "MEMORY", "ENDPOINT", "ID"}}
			for _, n := range nodes {
				rows = append(rows, []string{n.Name, n.FarmName, stateColour(w, upDown(n.Up)), fmt.Sprintf("%.1f", float64(n.CPUMilli)/1000), mib(int64(n.Memory)), strings.Join(n.Endpoints, " "), n.ID.String()})
			}
			table(w, rows...)
			return nil
		},
	})
	return cmd
}

func upDown(up bool) string {
	if up {
		return "up"
	}
	return "down"
}

const oneValidator = "one validator: its operator could rewrite history"

func (a *app) ledgerCmd() *cobra.Command {
	cmd := group(&cobra.Command{Use: "ledger", Short: "Look at the ledger"})
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
			out := struct {
				Grid       identity.GridID    `json:"grid"`
				Name       string             `json:"name"`
				Height     int64              `json:"height"`
				Time       time.Time          `json:"time"`
				Validators []ledger.Validator `json:"validators"`
				Contracts  int                `json:"contracts"`
				Nodes      int                `json:"nodes"`
				Warning    string             `json:"warning,omitempty"`
			}{c.Grid(), g.Name, v.Height, v.Time, g.Validators, count[contract.ID](v.Value(ledger.ContractsKey)), count[identity.NodeID](v.Value(ledger.NodesKey)), ""}
			if len(g.Validators) == 1 {
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
