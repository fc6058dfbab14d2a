package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"holdfast/internal/box"
	"holdfast/internal/grid"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
)

func (a *app) upCmd() *cobra.Command {
	var o grid.Options
	var detach bool
	cmd := &cobra.Command{
		Use: "up", Short: "Run a whole grid on this machine", Args: cobra.NoArgs,
		Long:    "Runs one validator, nodes on three farms and a gateway, each in namespaces of its own with a little internet between\nthem, until it is interrupted. Started again with the same --dir, everything is back: killed, it adopts what goes on.\nOne validator means that its operator could rewrite history; a grid that matters has at least four.",
		Example: "  holdfast up                                      # in the foreground\n  holdfast up --detach                             # returns when the grid is up\n  holdfast up --dir /srv/grid --nodes 5 --listen 127.0.0.1:9443",
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.Dir = a.dir
			if os.Geteuid() != 0 {
				return errors.New("up makes namespaces and mounts: run it as root (holdfast doctor tells what else is needed)")
			}
			var err error
			if o.Binary, err = os.Executable(); err != nil {
				return err
			}
			if o.Runsc == "" {
				o.Runsc = filepath.Join(filepath.Dir(o.Binary), "holdfast-runsc")
			}
			if _, err := os.Stat(o.Runsc); err != nil {
				return fmt.Errorf("holdfast-runsc is not beside holdfast: %w (make build makes it)", err)
			}
			if detach {
				return a.detach(cmd, o)
			}
			return a.up(cmd.Context(), cmd, o)
		},
	}
	f := cmd.Flags()
	f.IntVar(&o.Nodes, "nodes", 0, "how many `nodes`; 0 means 3, or what the grid has")
	f.StringVar(&o.Listen, "listen", "", "`address` on this machine that leads to the gateway (default 127.0.0.1:8443, or what the grid has)")
	f.StringVar(&o.Runsc, "runsc", "", "`path` of holdfast-runsc (default beside holdfast)")
	f.BoolVar(&detach, "detach", false, "leave the grid running in the background")
	return cmd
}

// up supervises in this process.
func (a *app) up(ctx context.Context, cmd *cobra.Command, o grid.Options) error {
	if o.Listen == "" {
		if _, c, err := grid.Connect(a.dir); err == nil {
			o.Listen = c.Gateway
		}
	}
	g, err := grid.Layout(o)
	if err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), nil))
	g.Plan.Log = log
	l, err := net.Listen("tcp", g.Listen)
	if err != nil {
		if pid := box.Supervisor(a.dir); pid > 0 {
			return fmt.Errorf("the grid in %s is up already (process %d)", a.dir, pid)
		}
		return fmt.Errorf("listen for the gateway: %w (choose another with --listen)", err)
	}
	eg, ctx := errgroup.WithContext(ctx)
	up := make(chan struct{})
	eg.Go(func() error {
		defer l.Close()
		return box.Supervise(ctx, g.Plan, func() { close(up) })
	})
	eg.Go(func() error { return ended(ctx, g.Forward(ctx, l)) })
	eg.Go(func() error {
		select {
		case <-up:
		case <-ctx.Done():
			return nil
		}
		bctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
		defer cancel()
		if err := g.Bootstrap(bctx, func(s string) { log.Info(s) }); err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("begin the ledger: %w", err)
		}
		if err := g.WaitUp(bctx); err != nil && ctx.Err() == nil {
			log.Warn("not all nodes are up", "error", err)
		}
		if ctx.Err() == nil {
			if err := os.WriteFile(filepath.Join(a.dir, "ready"), fmt.Appendln(nil, os.Getpid()), 0o600); err != nil {
				return err
			}
			a.welcome(cmd.OutOrStdout(), g)
		}
		return nil
	})
	err = eg.Wait()
	os.Remove(filepath.Join(a.dir, "ready"))
	return err
}

func (a *app) welcome(w io.Writer, g *grid.Grid) {
	fmt.Fprintf(w, "grid %s is up: %d nodes on %d farms, one validator (its operator could rewrite history), one gateway at https://%s\n", g.Genesis.GridID().Short(), g.Nodes, grid.Farms, g.Listen)
	fmt.Fprintf(w, "your key is in %s, in the clear: whoever reads it acts as you\n", filepath.Join(g.Dir, "user.key"))
	fmt.Fprintf(w, "deploy something:  holdfast deploy examples/pocketbase/compose.yaml --wait\nlook:              holdfast status\nstop:              holdfast down\n")
}

// detach starts up in the background and returns when it is ready.
func (a *app) detach(cmd *cobra.Command, o grid.Options) error {
	dir, err := filepath.Abs(a.dir)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(dir, "log"), 0o700); err != nil {
		return err
	}
	ready := filepath.Join(dir, "ready")
	if pid := box.Supervisor(dir); pid > 0 {
		if _, err := os.Stat(ready); err == nil {
			fmt.Fprintf(cmd.OutOrStdout(), "the grid in %s is up already (process %d)\n", dir, pid)
			return nil
		}
		return fmt.Errorf("the grid in %s is just coming up or going down (process %d): try again in a moment", dir, pid)
	}
	os.Remove(ready)
	logPath := filepath.Join(dir, "log", "up.log")
	log, err := os.OpenFile(logPath, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	args := []string{"up", "--dir", dir, "--runsc", o.Runsc}
	if o.Nodes > 0 {
		args = append(args, "--nodes", fmt.Sprint(o.Nodes))
	}
	if o.Listen != "" {
		args = append(args, "--listen", o.Listen)
	}
	child := exec.Command(o.Binary, args...)
	child.Dir, child.Stdout, child.Stderr = "/", log, log
	child.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := child.Start(); err != nil {
		return err
	}
	died := make(chan error, 1)
	go func() { died <- child.Wait() }()
	p := newProgress(cmd.ErrOrStderr())
	defer p.done()
	p.say("starting the grid")
	deadline := time.After(2 * time.Minute)
	for {
		select {
		case err := <-died:
			return fmt.Errorf("the grid did not come up: %w; the end of %s:\n%s", err, logPath, tail(logPath, 15))
		case <-deadline:
			return fmt.Errorf("the grid is not up after two minutes (it goes on trying; holdfast down ends it); the end of %s:\n%s", logPath, tail(logPath, 15))
		case <-cmd.Context().Done():
			return cmd.Context().Err()
		case <-time.After(50 * time.Millisecond):
		}
		if _, err := os.Stat(ready); err == nil {
			p.done()
			g, err := grid.Layout(grid.Options{Dir: dir, Nodes: o.Nodes, Listen: listenOf(dir), Binary: o.Binary, Runsc: o.Runsc})
			if err != nil {
				return err
			}
			a.welcome(cmd.OutOrStdout(), g)
			return nil
		}
	}
}

func listenOf(dir string) string {
	if _, c, err := grid.Connect(dir); err == nil {
		return c.Gateway
	}
	return ""
}

// tail is the last lines of a file.
func tail(path string, n int) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	at := len(b)
	for i := len(b) - 2; i >= 0 && n > 0; i-- {
		if b[i] == '\n' {
			n--
		}
		at = i
	}
	return string(b[at:])
}

func (a *app) downCmd() *cobra.Command {
	var data bool
	cmd := &cobra.Command{
		Use: "down", Short: "End the grid on this machine", Args: cobra.NoArgs,
		Long:    "Ends all processes of the grid in --dir, with their namespaces, mounts, interfaces and cgroups. Workloads are asked to\nstop first. The data stays, and up brings everything back; --data removes it too.",
		Example: "  holdfast down\n  holdfast down --data                             # and lose everything in it",
		RunE: func(cmd *cobra.Command, _ []string) error {
			dir, err := filepath.Abs(a.dir)
			if err != nil {
				return err
			}
			if _, err := os.Stat(filepath.Join(dir, "genesis")); errors.Is(err, os.ErrNotExist) {
				fmt.Fprintf(cmd.OutOrStdout(), "there is no grid in %s\n", dir)
				return nil
			}
			p := newProgress(cmd.ErrOrStderr())
			p.say("stopping the grid")
			err = grid.Down(cmd.Context(), dir, data)
			p.done()
			if err != nil {
				return err
			}
			if data {
				fmt.Fprintf(cmd.OutOrStdout(), "the grid is down, and %s is removed\n", dir)
			} else {
				fmt.Fprintf(cmd.OutOrStdout(), "the grid is down; its data stays in %s\n", dir)
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&data, "data", false, "remove all data as well: keys, ledger, volumes")
	return cmd
}

func (a *app) labCmd() *cobra.Command {
	cmd := &cobra.Command{Use: "lab", Short: "Play faults on a grid made by up", Long: "Faults on the grid that up runs on this machine, to watch it heal."}
	fault := func(verb, short string, want box.Wanted) *cobra.Command {
		return &cobra.Command{
			Use: verb + " NAME", Short: short, Args: cobra.ExactArgs(1), Example: "  holdfast lab " + verb + " node-2",
			RunE: func(cmd *cobra.Command, args []string) error {
				if err := grid.Lab(cmd.Context(), a.dir, args[0], want); err != nil {
					return err
				}
				fmt.Fprintf(cmd.OutOrStdout(), "%s: %s\n", args[0], map[box.Wanted]string{box.Up: "running", box.Down: "killed, stays down until lab resume", box.Paused: "paused until lab resume", box.Cut: "cable pulled until lab resume"}[want])
				return nil
			},
		}
	}
	cmd.AddCommand(
		fault("kill", "Kill everything on a machine and keep it down", box.Down),
		fault("pause", "Freeze a machine", box.Paused),
		fault("cut", "Pull a machine's network cable", box.Cut),
		fault("resume", "Undo kill, pause and cut", box.Up),
	)
	return cmd
}
