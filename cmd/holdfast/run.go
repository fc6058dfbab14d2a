package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"time"

	"holdfast/api"
	"holdfast/gateway"
	"holdfast/internal/box"
	"holdfast/internal/grid"
	"holdfast/ledger"
	"holdfast/ledger/comet"
	"holdfast/node"
	"holdfast/reconcile"
	"holdfast/sandbox"
	"holdfast/store"
	"holdfast/volume"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

func (a *app) runCmd() *cobra.Command {
	cmd := &cobra.Command{Use: "run", Short: "Run one daemon of a grid", Long: "The daemons of a grid. holdfast up writes their configurations and runs them on one machine; on separate machines\neach is run by itself with a configuration of the same form."}
	var config string
	daemon := func(use, short string, f func(ctx context.Context, config string) error) *cobra.Command {
		c := &cobra.Command{
			Use: use, Short: short, Args: cobra.NoArgs, Example: "  holdfast run " + use + " --config /etc/holdfast/config.json",
			RunE: func(cmd *cobra.Command, _ []string) error {
				if config == "" {
					return errors.New("run " + use + " needs --config FILE")
				}
				// Keys are in these processes' memory: no core dump, no ptrace by others of the same user.
				if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
					return err
				}
				return f(cmd.Context(), config)
			},
		}
		c.Flags().StringVar(&config, "config", "", "configuration `file`")
		return c
	}
	hidden := func(use string, args cobra.PositionalArgs, f func(ctx context.Context, args []string) error) *cobra.Command {
		return &cobra.Command{Use: use, Hidden: true, Args: args, RunE: func(cmd *cobra.Command, args []string) error { return f(cmd.Context(), args) }}
	}
	cmd.AddCommand(
		daemon("validator", "Take part in consensus and serve the ledger", runValidator),
		daemon("node", "Run the workloads that the ledger assigns to this node", runNode),
		daemon("gateway", "Serve the public end: pass connections on to nodes that dialled out", runGateway),
		hidden("init", cobra.NoArgs, func(context.Context, []string) error { return box.Init() }),
		// A shim and a volume server outlive the agent and its signals; they handle their own.
		hidden("shim DIR", cobra.ExactArgs(1), func(_ context.Context, args []string) error {
			return sandbox.Shim(context.Background(), args[0])
		}),
		hidden("volume", cobra.NoArgs, func(context.Context, []string) error { return volume.Serve(context.Background(), os.Stdin) }),
	)
	return cmd
}

func logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelInfo}))
}

func readConfig(path string, v any) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	d := json.NewDecoder(f)
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

func readGenesis(path string) (*ledger.Genesis, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	return ledger.DecodeGenesis(b)
}

// maxStore bounds one blob of a validator's store.
const maxStore = api.MaxBlob

func runValidator(ctx context.Context, config string) error {
	var c grid.ValidatorConfig
	if err := readConfig(config, &c); err != nil {
		return err
	}
	g, err := readGenesis(c.Genesis)
	if err != nil {
		return err
	}
	cert, err := comet.LoadCertificate(filepath.Join(c.Data, "tls.pem"), "holdfast validator")
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", c.API)
	if err != nil {
		return err
	}
	v, err := api.NewValidator(api.ValidatorConfig{
		Genesis: g, Home: filepath.Join(c.Data, "ledger"), P2P: c.P2P, Peers: c.Peers, API: l, TLS: cert,
		Blobs: store.NewDir(filepath.Join(c.Data, "blobs"), maxStore), Log: logger(),
	})
	if err != nil {
		l.Close()
		return err
	}
	return v.Run(ctx)
}

func runGateway(ctx context.Context, config string) error {
	var c grid.GatewayConfig
	if err := readConfig(config, &c); err != nil {
		return err
	}
	g, err := readGenesis(c.Genesis)
	if err != nil {
		return err
	}
	cert, err := comet.LoadCertificate(c.Key, "holdfast gateway")
	if err != nil {
		return err
	}
	client, err := api.NewClient(api.ClientConfig{Genesis: g, Trust: filepath.Join(c.Data, "trust"), Log: logger()})
	if err != nil {
		return err
	}
	defer client.Close()
	table := node.NewEdgeTable(g)
	l, err := net.Listen("tcp", c.Listen)
	if err != nil {
		return err
	}
	edge, err := gateway.NewEdge(gateway.EdgeConfig{Listener: l, Certificate: cert, TunnelName: node.TunnelName(client.Grid()), Routes: table, Authorize: table.Authorize, Log: logger()})
	if err != nil {
		l.Close()
		return err
	}
	loop := reconcile.New(reconcile.Config{Name: "routes", Resync: 5 * time.Second, Max: 2 * time.Second, Log: logger(), Step: func(ctx context.Context) (time.Duration, error) {
		if err := table.Refresh(ctx, client); err != nil {
			return 0, err
		}
		edge.Update()
		return 0, nil
	}})
	eg, ctx := errgroup.WithContext(ctx)
	eg.Go(func() error { return edge.Run(ctx) })
	eg.Go(func() error { return loop.Run(ctx) })
	eg.Go(func() error { return client.Follow(ctx, loop.Wake) })
	return ended(ctx, eg.Wait())
}

// ended makes the end that was asked for no error.
func ended(ctx context.Context, err error) error {
	if errors.Is(err, context.Canceled) && ctx.Err() != nil {
		return nil
	}
	return err
}

func runNode(ctx context.Context, config string) error {
	var c grid.NodeConfig
	if err := readConfig(config, &c); err != nil {
		return err
	}
	g, err := readGenesis(c.Genesis)
	if err != nil {
		return err
	}
	keys, err := node.LoadKeys(c.Key)
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	client, err := api.NewClient(api.ClientConfig{Genesis: g, Trust: filepath.Join(c.Data, "trust"), Log: logger()})
	if err != nil {
		return err
	}
	defer client.Close()
	a, err := node.New(node.Config{Client: client, Keys: keys, Data: c.Data, Run: c.Run, Runsc: c.Runsc, Self: self, Cgroup: c.Cgroup, Log: logger()})
	if err != nil {
		return err
	}
	if err := a.Run(ctx); err != nil {
		return err
	}
	// Asked to end: the machine goes down. (An agent that is replaced is killed; what it started goes on.)
	stop, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	return a.Stop(stop)
}
