package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"holdfast/api"
	"holdfast/ledger"

	"github.com/spf13/cobra"
)

func (a *app) ledgerVerifyCmd() *cobra.Command {
	var genesis string
	cmd := &cobra.Command{
		Use: "verify [DIRECTORY]", Short: "Check a validator's copy of the ledger by executing it again", Args: asUsed,
		Long:    "Reads the ledger in a validator's directory: every block, its hash and the signatures of its commit, and, when all blocks\nfrom the first are there, executes them and compares the result with what the validator has. It changes nothing. The\nvalidator must not run; of one that does, take a copy. Without DIRECTORY it is that of the validator of the grid in --dir.",
		Example: "  holdfast down && holdfast ledger verify\n  holdfast ledger verify /data --genesis genesis --json",
		RunE: func(cmd *cobra.Command, args []string) error {
			dir := filepath.Join(a.dir, "data", "validator")
			if len(args) > 0 {
				dir = args[0]
			}
			home := filepath.Join(dir, "ledger")
			if _, err := os.Stat(home); err != nil {
				return fmt.Errorf("%s is no validator's directory: %w", dir, errors.Unwrap(err))
			}
			if genesis == "" {
				genesis = filepath.Join(dir, "genesis")
				if _, err := os.Stat(genesis); errors.Is(err, fs.ErrNotExist) {
					genesis = filepath.Join(a.dir, "genesis")
				}
			}
			b, err := readAtMost(genesis, ledger.MaxGenesis)
			if err != nil {
				return err
			}
			g, err := ledger.DecodeGenesis(b)
			if err != nil {
				return fmt.Errorf("%s: %w", genesis, err)
			}
			pr := newProgress(cmd.ErrOrStderr())
			defer pr.done()
			begin, said := time.Now(), time.Time{}
			c, err := api.VerifyLedger(cmd.Context(), g, home, func(h, last int64) {
				if now := time.Now(); now.Sub(begin) > 2*time.Second && now.Sub(said) > time.Second {
					said = now
					pr.say("block %d of %d", h, last)
				}
			})
			pr.done()
			if err != nil {
				return fmt.Errorf("%s: %w", home, err)
			}
			out := struct {
				Grid     string `json:"grid"`
				First    int64  `json:"first"`
				Last     int64  `json:"last"`
				State    int64  `json:"state"`
				Root     string `json:"root"`
				Replayed bool   `json:"replayed"`
				Rows     int64  `json:"rows"`
			}{g.GridID().String(), c.First, c.Last, c.State, fmt.Sprintf("%x", c.Root), c.Replayed, c.Rows}
			if a.json {
				return printJSON(cmd.OutOrStdout(), out)
			}
			how := "executed again from the genesis, with the same result"
			if !c.Replayed {
				how = "not executed: the blocks before are gone"
			}
			table(cmd.OutOrStdout(), []string{"grid", out.Grid}, []string{"blocks", fmt.Sprintf("%d to %d, hashes and commits are right", c.First, c.Last)},
				[]string{"state", fmt.Sprintf("of block %d, %s", c.State, how)}, []string{"root", out.Root})
			return nil
		},
	}
	cmd.Flags().StringVar(&genesis, "genesis", "", "the grid's genesis `file`; else DIRECTORY/genesis, or the one in --dir")
	return cmd
}
