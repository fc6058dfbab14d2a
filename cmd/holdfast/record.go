package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"holdfast/api"
	"holdfast/contract"
	"holdfast/identity"
	"holdfast/ledger"

	"github.com/spf13/cobra"
)

func (a *app) contractExportCmd() *cobra.Command {
	var out string
	var bodies bool
	cmd := &cobra.Command{
		Use: "export NAME", Short: "Write all that the ledger has of a contract to a file that proves itself", Args: asUsed,
		Long:    "Writes every transaction about a contract as it was signed, with the headers and commits that show that it is in the chain\nand records that show that nothing is missing. Whoever has the grid's genesis verifies the file alone, without the grid.\nWith --bodies the sealed bodies are in it too; what opens them is not.",
		Example: "  holdfast contract export reader -o reader.record\n  holdfast contract export reader -o reader.record --bodies\n  holdfast contract verify reader.record",
		RunE: func(cmd *cobra.Command, args []string) error {
			if out == "" {
				return wrong(cmd, errors.New("-o FILE is missing"))
			}
			ctx := cmd.Context()
			u, _, err := a.user(ctx)
			if err != nil {
				return err
			}
			defer u.Client.Close()
			c, err := u.Find(ctx, args[0])
			if err != nil {
				return err
			}
			body := func(h *contract.Header) ([]byte, error) { return u.SealedBody(ctx, h) }
			if !bodies {
				body = nil
			}
			raw, v, err := u.Client.ExportContract(ctx, c.ID, body)
			if err != nil {
				return err
			}
			if err := writeNew(out, raw); err != nil {
				return err
			}
			return a.showRecord(cmd.OutOrStdout(), v, false)
		},
	}
	cmd.Flags().StringVarP(&out, "output", "o", "", "the `file` to write; it must not be there")
	cmd.Flags().BoolVar(&bodies, "bodies", false, "with the sealed bodies of all revisions")
	return cmd
}

// writeNew writes a file that is not there yet, whole or not at all.
func writeNew(path string, b []byte) error {
	t, err := os.CreateTemp(filepath.Dir(path), ".record-*")
	if err != nil {
		return err
	}
	defer os.Remove(t.Name())
	_, err = t.Write(b)
	if err = errors.Join(err, t.Chmod(0o644), t.Sync(), t.Close()); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return os.Link(t.Name(), path)
}

func (a *app) contractVerifyCmd() *cobra.Command {
	var genesis string
	cmd := &cobra.Command{
		Use: "verify FILE", Short: "Check what contract export wrote, with the grid's genesis alone", Args: asUsed,
		Long:    "Checks each signature, the order and number of transactions, and that validators signed the blocks that they are in. It asks\nno grid. Without --genesis it takes the one in --dir, and if there is none that of the file: then compare the grid's ID with\none that you got elsewhere.",
		Example: "  holdfast contract verify reader.record\n  holdfast contract verify reader.record --genesis genesis --json",
		RunE: func(cmd *cobra.Command, args []string) error {
			own := filepath.Join(a.dir, "genesis")
			if genesis == "" {
				if _, err := os.Stat(own); err == nil {
					genesis = own
				}
			}
			var g *ledger.Genesis
			if genesis != "" {
				b, err := readAtMost(genesis, ledger.MaxGenesis)
				if err != nil {
					return err
				}
				if g, err = ledger.DecodeGenesis(b); err != nil {
					return fmt.Errorf("%s: %w", genesis, err)
				}
			}
			raw, err := readAtMost(args[0], api.MaxRecord)
			if err != nil {
				return err
			}
			v, err := api.VerifyRecord(raw, g, time.Now())
			if err != nil {
				return fmt.Errorf("%s: %w", args[0], err)
			}
			return a.showRecord(cmd.OutOrStdout(), v, g == nil)
		},
	}
	cmd.Flags().StringVar(&genesis, "genesis", "", "the grid's genesis `file`")
	return cmd
}

func readAtMost(path string, most int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, most+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > most {
		return nil, fmt.Errorf("%s: more than %d bytes", path, most)
	}
	return b, nil
}

const ownGenesis = "the genesis is the file's own: compare the grid's ID"

func (a *app) showRecord(w io.Writer, v *api.Verified, own bool) error {
	type deed struct {
		Height   int64               `json:"height"`
		Kind     ledger.Kind         `json:"kind"`
		Revision uint32              `json:"revision,omitempty"`
		By       string              `json:"by"`
		Nonce    uint64              `json:"nonce"`
		Signers  []identity.DeviceID `json:"signers"`
	}
	out := struct {
		Grid     identity.GridID `json:"grid"`
		Contract contract.ID     `json:"contract"`
		Name     string          `json:"name"`
		State    string          `json:"state"`
		Height   int64           `json:"height"`
		Time     time.Time       `json:"time"`
		Deeds    []deed          `json:"deeds"`
		Bodies   int             `json:"bodies"`
		Warning  string          `json:"warning,omitempty"`
	}{Grid: v.Grid, Contract: v.Contract.ID, Name: v.Contract.Name, State: v.Contract.State, Height: v.Height, Time: v.Time.UTC(), Deeds: []deed{}, Bodies: v.Bodies}
	if own {
		out.Warning = ownGenesis
	}
	rows := [][]string{{"HEIGHT", "DEED", "REVISION", "BY", "NONCE"}}
	for _, d := range v.Deeds {
		x := deed{Height: d.Height, Kind: d.Kind, By: identity.AccountID(d.Actor.ID).String(), Nonce: d.Nonce, Signers: d.Signers}
		short := identity.AccountID(d.Actor.ID).Short()
		if d.Actor.Node {
			x.By, short = identity.NodeID(d.Actor.ID).String(), identity.NodeID(d.Actor.ID).Short()
		}
		revision := "-"
		if d.Header != nil {
			x.Revision = d.Header.Revision
			revision = fmt.Sprint(x.Revision)
		}
		out.Deeds = append(out.Deeds, x)
		rows = append(rows, []string{fmt.Sprint(d.Height), string(d.Kind), revision, short, fmt.Sprint(d.Nonce)})
	}
	if a.json {
		return printJSON(w, out)
	}
	table(w, []string{"contract", out.Name}, []string{"id", out.Contract.String()}, []string{"grid", out.Grid.String()}, []string{"state", stateColour(w, out.State)},
		[]string{"verified", fmt.Sprintf("%d transactions, all that there are up to block %d of %s", len(out.Deeds), out.Height, out.Time.Format(time.RFC3339))},
		[]string{"bodies", fmt.Sprintf("%d, sealed", out.Bodies)})
	if own {
		fmt.Fprintln(w, paint(w, yellow, "warning"), "", ownGenesis)
	}
	fmt.Fprintln(w)
	table(w, rows...)
	return nil
}
