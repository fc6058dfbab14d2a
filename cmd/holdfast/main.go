// Command holdfast is a private cloud on machines that nobody has to trust: the daemons of a grid, and the commands that
// its users deploy, watch and reach their workloads with. This package is the only reader of flags, environment and
// configuration files; what the commands do is done by the packages beside it.
//
// It exits with 0 when it did what was asked, 1 when it could not, 2 when the command line is wrong, and 130 when it was
// interrupted. What was asked for goes to standard output, everything else to standard error; with --json both speak
// JSON.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"

	"holdfast/ledger/comet"
	"holdfast/machine"
	"holdfast/overlay"

	"github.com/spf13/cobra"
)

// version is set when a release is built.
var version = "dev"

// Exit codes.
const (
	exitFailed      = 1
	exitUsage       = 2
	exitInterrupted = 130
)

func main() {
	// A kernel starts /init; a box's first process is started as "run init".
	if os.Getpid() == 1 && os.Args[0] == "/init" {
		machine.Run(machine.Config{Version: version, Shut: overlay.Firewall{}.Apply})
		os.Exit(exitFailed) // a kernel panic, which starts the machine again too
	}
	os.Exit(run(os.Args[1:]))
}

func run(args []string) int {
	// The first signal asks to end, the second one insists.
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop)
	a := &app{}
	cmd := newRoot(a)
	cmd.SetArgs(args)
	err := cmd.ExecuteContext(ctx)
	switch {
	case err == nil:
		return 0
	case errors.Is(err, context.Canceled) && ctx.Err() != nil:
		err = errors.New("interrupted")
		a.complain(os.Stderr, args, err, exitInterrupted)
		return exitInterrupted
	case errors.As(err, new(usageError)):
		a.complain(os.Stderr, args, err, exitUsage)
		return exitUsage
	}
	a.complain(os.Stderr, args, err, exitFailed)
	return exitFailed
}

// complain says what went wrong. Parts of it may come from other machines.
func (a *app) complain(w io.Writer, args []string, err error, code int) {
	text := err.Error()
	if errors.Is(err, comet.ErrUnavailable) || errors.Is(err, comet.ErrStale) {
		text += "\nis the grid up? " + a.self("up") + " starts it, holdfast doctor says what it needs"
	}
	var lines []string
	for l := range strings.Lines(text) {
		lines = append(lines, printable([]byte(strings.TrimSuffix(l, "\n"))))
	}
	text = strings.Join(lines, "\n")
	if a.json || slices.Contains(args, "--json") { // a line that is wrong before --json was not read so far
		printJSON(w, struct {
			Error string `json:"error"`
			Code  int    `json:"code"`
		}{text, code})
		return
	}
	fmt.Fprintln(w, "holdfast:", text)
}

// usageError is a command line that is wrong.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

// wrong is the usageError of a command.
func wrong(cmd *cobra.Command, err error) error {
	return usageError{fmt.Errorf("%w (see %s --help)", err, cmd.CommandPath())}
}

// app is what the commands share.
type app struct {
	dir  string
	json bool
}

// Groups of commands in the help.
const (
	groupUse  = "use"
	groupGrid = "grid"
	groupLook = "look"
)

func newRoot(a *app) *cobra.Command {
	root := group(&cobra.Command{
		Use:           "holdfast",
		Short:         "A private cloud on machines that nobody has to trust",
		Long:          "holdfast runs workloads on hardware that belongs to others, without its owners being able to read the data,\nchange what runs, or dial in. Deployments are signed contracts on a ledger; nodes pull what is assigned to them.",
		SilenceErrors: true, SilenceUsage: true,
		Example: "  holdfast up --detach                             # a whole grid on this machine\n  holdfast deploy compose.yaml --wait              # a Compose file as a signed contract\n  holdfast status\n  holdfast lab kill node-2                         # and watch it heal",
	})
	root.PersistentFlags().StringVar(&a.dir, "dir", defaultDir(), "the grid's `directory` on the user's side (HOLDFAST_DIR)")
	root.PersistentFlags().BoolVar(&a.json, "json", false, "print JSON for machines")
	root.AddGroup(&cobra.Group{ID: groupUse, Title: "What you run:"}, &cobra.Group{ID: groupLook, Title: "What there is:"}, &cobra.Group{ID: groupGrid, Title: "A grid:"})
	for id, cmds := range map[string][]*cobra.Command{
		groupUse:  {a.planCmd(), a.deployCmd(), a.logsCmd(), a.contractCmd(), a.volumeCmd(), a.templateCmd(), a.accountCmd(), a.caCmd(), a.restoreCmd()},
		groupLook: {a.statusCmd(), a.farmCmd(), a.nodeCmd(), a.storeCmd(), a.locationCmd(), a.validatorCmd(), a.ledgerCmd()},
		groupGrid: {a.upCmd(), a.downCmd(), a.doctorCmd(), a.labCmd(), a.imageCmd(), a.runCmd()},
	} {
		for _, c := range cmds {
			c.GroupID = id
			root.AddCommand(c)
		}
	}
	root.AddCommand(a.versionCmd())
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	for _, c := range root.Commands() {
		switch c.Name() {
		case "help":
			c.Example = "  holdfast help deploy"
			c.Args = func(cmd *cobra.Command, args []string) error {
				if _, rest, err := root.Find(args); err != nil || len(rest) > 0 {
					return fmt.Errorf("unknown command %q", strings.Join(args, " "))
				}
				return nil
			}
		case "completion":
			group(c)
			for _, shell := range c.Commands() {
				shell.Example = "  holdfast completion " + shell.Name() + " > FILE"
			}
		}
	}
	root.SetFlagErrorFunc(wrong)
	strict(root)
	return root
}

// group makes a command that is only there for its subcommands: alone it shows help, and a word that it does not know is
// an error.
func group(c *cobra.Command) *cobra.Command {
	c.DisableFlagsInUseLine, c.SuggestionsMinimumDistance = true, 2
	c.Args = func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return nil
		}
		err := fmt.Errorf("unknown command %q for %q", args[0], cmd.CommandPath())
		if s := cmd.SuggestionsFor(args[0]); len(s) > 0 {
			err = fmt.Errorf("%w: did you mean %s?", err, strings.Join(s, " or "))
		}
		return err
	}
	c.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
	return c
}

// asUsed accepts the arguments that a command's Use names; those in brackets may be left out.
func asUsed(cmd *cobra.Command, args []string) error {
	names := strings.Fields(cmd.Use)[1:]
	if len(args) > len(names) {
		return fmt.Errorf("unexpected argument %q", args[len(names)])
	}
	if rest := names[len(args):]; len(rest) > 0 && !strings.HasPrefix(rest[0], "[") {
		return fmt.Errorf("%s is missing", rest[0])
	}
	return nil
}

// strict makes wrong arguments a usageError everywhere.
func strict(c *cobra.Command) {
	if check := c.Args; check != nil {
		c.Args = func(cmd *cobra.Command, args []string) error {
			if err := check(cmd, args); err != nil {
				return wrong(cmd, err)
			}
			return nil
		}
	}
	for _, sub := range c.Commands() {
		strict(sub)
	}
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

// self is a command as the user would type it to mean the same grid.
func (a *app) self(args string) string {
	if a.dir == "" || a.dir == defaultDir() {
		return "holdfast " + args
	}
	return "holdfast --dir " + a.dir + " " + args
}

// noGrid is the error of commands that need a grid in a directory where there is none; nil if there is one.
func (a *app) noGrid() error {
	if _, err := os.Stat(filepath.Join(a.dir, "genesis")); errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("there is no grid in %s: start one with holdfast up, or name another with --dir", a.dir)
	}
	return nil
}

func (a *app) versionCmd() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version", Args: asUsed, Example: "  holdfast version\n  holdfast version --json",
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
			fmt.Fprintln(cmd.OutOrStdout(), strings.Join(slices.DeleteFunc([]string{"holdfast", v.Version, v.Revision, v.Go}, func(s string) bool { return s == "" }), " "))
			return nil
		},
	}
}
