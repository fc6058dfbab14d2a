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
	"slices"
	"strings"
	"syscall"
	"time"

	"holdfast/api"
	"holdfast/identity"
	"holdfast/internal/box"
	"holdfast/internal/grid"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
)

func (a *app) upCmd() *cobra.Command {
	var o grid.Options
	var detach bool
	cmd := &cobra.Command{
		Use: "up", Short: "Run a whole grid on this machine", Args: asUsed,
		Long:    "Runs one validator, nodes on three farms, a gateway, and on three more farms a machine each that only keeps shards, all in\nnamespaces of their own with a little internet between them, until it is interrupted. Started again with the same --dir, everything is back: killed, it adopts what goes on.\nOne validator means that its operator could rewrite history; a grid that matters has at least four.",
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
			if o.Runsc, err = filepath.Abs(o.Runsc); err != nil { // boxes and the detached process have another directory
				return err
			}
			if _, err := os.Stat(o.Runsc); err != nil {
				return fmt.Errorf("holdfast-runsc is not there: %w (make build makes it beside holdfast)", err)
			}
			if err := a.ours(); err != nil {
				return err
			}
			if detach {
				return a.detach(cmd, o)
			}
			return a.up(cmd.Context(), cmd, o)
		},
	}
	f := cmd.Flags()
	f.IntVar(&o.Nodes, "nodes", -1, "how many `nodes`; with 0 all are machines of their own (default 3, or what the grid has)")
	f.StringVar(&o.Listen, "listen", "", "`address` on this machine that leads to the gateway (default 127.0.0.1:8443, or what the grid has)")
	f.StringVar(&o.Runsc, "runsc", "", "`path` of holdfast-runsc (default beside holdfast)")
	f.DurationVar(&o.Delay, "delay", 0, "how long a cancelled contract of a new grid goes on, and a new policy waits; its data stays ten times as long (default 1m)")
	f.BoolVar(&detach, "detach", false, "leave the grid running in the background")
	return cmd
}

// ours refuses a directory that holds other things: down --data would remove them.
func (a *app) ours() error {
	list, err := os.ReadDir(a.dir)
	if errors.Is(err, os.ErrNotExist) || a.noGrid() == nil {
		return nil
	} else if err != nil {
		return err
	}
	known := []string{"boxes", "ca", "client.json", "config", "data", "grid.key", "lab", "lock", "log", "ready", "trust", "user.key"}
	for _, e := range list {
		if !slices.Contains(known, e.Name()) && !strings.HasPrefix(e.Name(), ".new-") {
			return fmt.Errorf("%s holds %s, which is no grid's: name a directory of its own with --dir", a.dir, e.Name())
		}
	}
	return nil
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
		if _, err := g.WaitUp(bctx); err != nil && ctx.Err() == nil {
			log.Warn("not all of the grid is up", "error", err)
		}
		if ctx.Err() == nil {
			if err := os.WriteFile(filepath.Join(a.dir, "ready"), fmt.Appendln(nil, os.Getpid()), 0o600); err != nil {
				return err
			}
			return a.welcome(ctx, cmd.OutOrStdout(), g)
		}
		return nil
	})
	err = eg.Wait()
	os.Remove(filepath.Join(a.dir, "ready"))
	return err
}

func (a *app) welcome(ctx context.Context, w io.Writer, g *grid.Grid) error {
	key := filepath.Join(g.Dir, "user.key")
	place := &api.BlobPlace{Reason: "it does not say"}
	if c, _, err := grid.Connect(g.Dir); err == nil {
		if p, err := c.BlobPlace(ctx); err == nil {
			place = p
		}
		c.Close()
	}
	if a.json {
		return printJSON(w, struct {
			Grid      identity.GridID `json:"grid"`
			Dir       string          `json:"dir"`
			Nodes     int             `json:"nodes"`
			Locations int             `json:"locations"` // machines that only keep shards
			Farms     int             `json:"farms"`
			Gateway   string          `json:"gateway"`
			Key       string          `json:"key"` // of the user, in the clear
			Blobs     *api.BlobPlace  `json:"blobs"`
			Warning   string          `json:"warning"`
		}{g.Genesis.GridID(), g.Dir, g.Nodes, g.Locations(), g.Farms(), g.Listen, key, place, oneValidator})
	}
	more := ""
	if n := g.Locations(); n > 0 {
		more = fmt.Sprintf(" and %d machines that only keep shards", n)
	}
	fmt.Fprintf(w, "grid %s is up: %d nodes%s on %d farms, one validator (its operator could rewrite history), one gateway at https://%s\n", g.Genesis.GridID().Short(), g.Nodes, more, g.Farms(), g.Listen)
	fmt.Fprintf(w, "blobs are in the %v\n", place)
	fmt.Fprintf(w, "your key is in %s, in the clear: whoever reads it acts as you\n", key)
	fmt.Fprintf(w, "deploy something:  %s\nlook:              %s\nstop:              %s\n", a.self("deploy examples/pocketbase/compose.yaml --wait"), a.self("status"), a.self("down"))
	return nil
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
			if !a.json {
				fmt.Fprintf(cmd.OutOrStdout(), "the grid in %s is up already (process %d)\n", dir, pid)
				return nil
			}
			return a.welcomeTo(cmd.Context(), cmd.OutOrStdout(), dir, o)
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
	if o.Nodes >= 0 {
		args = append(args, "--nodes", fmt.Sprint(o.Nodes))
	}
	if o.Listen != "" {
		args = append(args, "--listen", o.Listen)
	}
	if o.Delay > 0 {
		args = append(args, "--delay", o.Delay.String())
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
			return a.welcomeTo(cmd.Context(), cmd.OutOrStdout(), dir, o)
		}
	}
}

// welcomeTo tells of a grid that another process runs.
func (a *app) welcomeTo(ctx context.Context, w io.Writer, dir string, o grid.Options) error {
	g, err := grid.Layout(grid.Options{Dir: dir, Nodes: o.Nodes, Listen: listenOf(dir), Binary: o.Binary, Runsc: o.Runsc})
	if err != nil {
		return err
	}
	return a.welcome(ctx, w, g)
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
		Use: "down", Short: "End the grid on this machine", Args: asUsed,
		Long:    "Ends all processes of the grid in --dir, with their namespaces, mounts, interfaces and cgroups. Workloads are asked to\nstop first. The data stays, and up brings everything back; --data removes it too.",
		Example: "  holdfast down\n  holdfast down --data                             # and lose everything in it",
		RunE: func(cmd *cobra.Command, _ []string) error {
			dir, err := filepath.Abs(a.dir)
			if err != nil {
				return err
			}
			found := a.noGrid() == nil
			if found {
				if os.Geteuid() != 0 {
					return errors.New("down ends processes of root: run it as root")
				}
				p := newProgress(cmd.ErrOrStderr())
				p.say("stopping the grid")
				err = grid.Down(cmd.Context(), dir, data)
				p.done()
				if err != nil {
					return err
				}
			}
			if a.json {
				return printJSON(cmd.OutOrStdout(), struct {
					Dir     string `json:"dir"`
					Found   bool   `json:"found"`
					Removed bool   `json:"removed"`
				}{dir, found, found && data})
			}
			if !found {
				fmt.Fprintf(cmd.OutOrStdout(), "there is no grid in %s\n", dir)
			} else if data {
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
	cmd := group(&cobra.Command{Use: "lab", Short: "Play faults on a grid made by up", Long: "Faults on the grid that up runs on this machine, to watch it heal. NODE is a node, or \"validator\" or \"gateway\"."})
	fault := func(verb, short, state string, want box.Wanted) *cobra.Command {
		return &cobra.Command{
			Use: verb + " NODE", Short: short, Args: asUsed, Example: "  holdfast lab " + verb + " node-2",
			ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
				return a.machines(), cobra.ShellCompDirectiveNoFileComp
			},
			RunE: func(cmd *cobra.Command, args []string) error {
				if err := a.noGrid(); err != nil {
					return err
				}
				if all := a.machines(); !slices.Contains(all, args[0]) {
					return fmt.Errorf("the grid in %s has no %q: it has %s", a.dir, args[0], strings.Join(all, ", "))
				}
				if err := grid.Lab(cmd.Context(), a.dir, args[0], want); err != nil {
					return err
				}
				if a.json {
					return printJSON(cmd.OutOrStdout(), struct {
						Name  string `json:"name"`
						State string `json:"state"`
					}{args[0], or(string(want), "up")})
				}
				fmt.Fprintf(cmd.OutOrStdout(), "%s: %s\n", args[0], state)
				return nil
			},
		}
	}
	cmd.AddCommand(
		fault("kill", "Kill everything on a machine and keep it down", "killed, stays down until lab resume", box.Down),
		fault("pause", "Freeze a machine", "paused until lab resume", box.Paused),
		fault("cut", "Pull a machine's network cable", "cable pulled until lab resume", box.Cut),
		fault("resume", "Undo kill, pause and cut", "running", box.Up),
	)
	return cmd
}

// machines are those of the grid that up runs.
func (a *app) machines() []string {
	files, err := filepath.Glob(filepath.Join(a.dir, "config", "*.json"))
	if err != nil {
		return nil
	}
	for i, f := range files {
		files[i] = strings.TrimSuffix(filepath.Base(f), ".json")
	}
	return files
}
