// Command holdfast is a private cloud on machines that nobody has to trust: the daemons of a grid, and the commands that
// its users deploy, watch and reach their workloads with. This package is the only reader of flags, environment and
// configuration files; what the commands do is done by the packages beside it.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"syscall"

	"github.com/spf13/cobra"
)

// version is set when a release is built.
var version = "dev"

func main() { os.Exit(run(os.Args[1:])) }

func run(args []string) int {
	// The first signal asks to end, the second one insists.
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop)
	cmd := newRoot()
	cmd.SetArgs(args)
	err := cmd.ExecuteContext(ctx)
	switch {
	case err == nil:
		return 0
	case errors.Is(err, context.Canceled) && ctx.Err() != nil:
		fmt.Fprintln(os.Stderr, "holdfast: interrupted")
		return 130
	}
	fmt.Fprintln(os.Stderr, "holdfast:", err)
	return 1
}

// app is what the commands share.
type app struct {
	dir  string
	json bool
}

func newRoot() *cobra.Command {
	a := &app{}
	root := &cobra.Command{
		Use:           "holdfast",
		Short:         "A private cloud on machines that nobody has to trust",
		Long:          "holdfast runs workloads on hardware that belongs to others, without its owners being able to read the data,\nchange what runs, or dial in. Deployments are signed contracts on a ledger; nodes pull what is assigned to them.",
		SilenceErrors: true, SilenceUsage: true,
		Example: "  holdfast up --detach                             # a whole grid on this machine\n  holdfast deploy compose.yaml --wait              # a Compose file as a signed contract\n  holdfast status\n  holdfast lab kill node-2                         # and watch it heal",
	}
	root.PersistentFlags().StringVar(&a.dir, "dir", defaultDir(), "the grid's `directory` on the user's side (HOLDFAST_DIR)")
	root.PersistentFlags().BoolVar(&a.json, "json", false, "print JSON for machines")
	root.AddCommand(a.upCmd(), a.downCmd(), a.doctorCmd(), a.statusCmd(), a.planCmd(), a.deployCmd(), a.logsCmd(), a.caCmd(), a.contractCmd(), a.nodeCmd(), a.ledgerCmd(), a.labCmd(), a.runCmd(), versionCmd(a))
	return root
}

func defaultDir() string {
	if d := os.Getenv("HOLDFAST_DIR"); d != "" {
		return d
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "holdfast-grid"
	}
	return filepath.Join(home, ".holdfast")
}

func versionCmd(a *app) *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			v := struct {
				Version  string `json:"version"`
				Revision string `json:"revision,omitempty"`
				Go       string `json:"go"`
			}{Version: version}
			if bi, ok := debug.ReadBuildInfo(); ok {
				v.Go = bi.GoVersion
				for _, s := range bi.Settings {
					if s.Key == "vcs.revision" {
						v.Revision = s.Value
					}
				}
			}
			if a.json {
				return printJSON(cmd.OutOrStdout(), v)
			}
			fmt.Fprintf(cmd.OutOrStdout(), "holdfast %s %s %s\n", v.Version, v.Revision, v.Go)
			return nil
		},
	}
}
