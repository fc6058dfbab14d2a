package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"holdfast/api"
	"holdfast/gateway"
	"holdfast/identity"
	"holdfast/internal/box"
	"holdfast/internal/grid"
	"holdfast/ledger"
	"holdfast/ledger/comet"
	"holdfast/node"
	"holdfast/overlay"
	"holdfast/reconcile"
	"holdfast/sandbox"
	"holdfast/store"
	"holdfast/volume"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// setting is a flag that overrides one field of a daemon's configuration.
type setting struct {
	flag, usage string
	to          *string
	optional    bool
}

// daemon makes the command of one daemon. Its configuration is a file, or flags, or a file and flags that override it.
func daemon[C any](use, short string, settings func(*C) []setting, f func(context.Context, *C) error) *cobra.Command {
	var file string
	var given C
	c := &cobra.Command{
		Use: use, Short: short, Args: asUsed, Example: "  holdfast run " + use + " --config /etc/holdfast/config.json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			// Keys are in these processes' memory: no core dump, no ptrace by others of the same user.
			if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
				return err
			}
			var cfg C
			if file != "" {
				if err := readConfig(file, &cfg); err != nil {
					return err
				}
			}
			from := settings(&given)
			var missing []string
			for i, x := range settings(&cfg) {
				if cmd.Flags().Changed(x.flag) {
					*x.to = *from[i].to
				}
				if *x.to == "" && !x.optional {
					missing = append(missing, "--"+x.flag)
				}
			}
			if len(missing) > 0 {
				return wrong(cmd, fmt.Errorf("neither --config nor a flag gives %s", strings.Join(missing, ", ")))
			}
			return f(cmd.Context(), &cfg)
		},
	}
	c.Flags().StringVar(&file, "config", "", "configuration `file`, in JSON")
	for _, x := range settings(&given) {
		c.Flags().StringVar(x.to, x.flag, "", x.usage)
	}
	return c
}

const (
	genesisUsage = "`file` with the grid's genesis"
	nameUsage    = "`name`, for people"
)

func (a *app) runCmd() *cobra.Command {
	cmd := group(&cobra.Command{Use: "run", Short: "Run one daemon of a grid", Long: "The daemons of a grid. holdfast up writes their configurations and runs them on one machine; on separate machines\neach is run by itself with a configuration of the same form. Flags override the configuration."})
	hidden := func(use, short string, f func(ctx context.Context, args []string) error) *cobra.Command {
		return &cobra.Command{Use: use, Short: short, Hidden: true, Args: asUsed, RunE: func(cmd *cobra.Command, args []string) error { return f(cmd.Context(), args) }}
	}
	cmd.AddCommand(
		daemon("validator", "Take part in consensus and serve the ledger", func(c *grid.ValidatorConfig) []setting {
			return []setting{
				{"name", nameUsage, &c.Name, true}, {"genesis", genesisUsage, &c.Genesis, false}, {"data", "`directory` of its keys, the chain and blobs", &c.Data, false},
				{"p2p", "`address` that consensus listens on", &c.P2P, false}, {"api", "`address` that the ledger API listens on", &c.API, false},
			}
		}, runValidator),
		daemon("node", "Run the workloads that the ledger assigns to this node", func(c *grid.NodeConfig) []setting {
			return []setting{
				{"name", nameUsage, &c.Name, true}, {"genesis", genesisUsage, &c.Genesis, false}, {"data", "`directory` on disk: sealed blobs and encrypted volumes", &c.Data, false},
				{"run", "`directory` on tmpfs: all that must not reach a disk", &c.Run, false}, {"key", "`file` with the node's key, made when there is none", &c.Key, false},
				{"runsc", "`path` of holdfast-runsc", &c.Runsc, false}, {"cgroup", "parent `group` of the workloads' cgroups", &c.Cgroup, false},
				{"grid", "`ID` of the grid that the genesis must be of", &c.Grid, true},
				{"from", "`addresses` (host:port,…) of validators or gateways that have the genesis, when the file is not there", &c.From, true},
				{"farm", "`ID` of the farm that this machine asks to be admitted to", &c.Farm, true},
			}
		}, runNode),
		daemon("gateway", "Serve the public end: pass connections on to nodes that dialled out", func(c *grid.GatewayConfig) []setting {
			return []setting{
				{"name", nameUsage, &c.Name, true}, {"genesis", genesisUsage, &c.Genesis, false}, {"data", "`directory` of what it trusts", &c.Data, false},
				{"key", "`file` with its TLS key, made when there is none", &c.Key, false}, {"listen", "public `address`", &c.Listen, false},
			}
		}, runGateway),
		a.s3Cmd(),
		a.runLocationCmd(),
		hidden("init", "Process 1 of a box", func(context.Context, []string) error { return box.Init() }),
		// A shim and a volume server outlive the agent and its signals; they handle their own.
		hidden("shim DIR", "The process around one sandbox", func(_ context.Context, args []string) error {
			return sandbox.Shim(context.Background(), args[0])
		}),
		hidden("volume", "The process behind one volume", func(context.Context, []string) error { return volume.Serve(context.Background(), os.Stdin) }),
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

func runValidator(ctx context.Context, c *grid.ValidatorConfig) error {
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
	blobs := store.NewDir(filepath.Join(c.Data, "blobs"), maxStore)
	if err := blobs.Sweep(); err != nil {
		l.Close()
		return err
	}
	cfg := api.ValidatorConfig{
		Genesis: g, Home: filepath.Join(c.Data, "ledger"), P2P: c.P2P, Peers: c.Peers, API: l, TLS: cert, Blobs: blobs, Quota: c.Quota, Log: logger(),
	}
	client, err := api.NewClient(api.ClientConfig{Genesis: g, Trust: filepath.Join(c.Data, "trust"), Log: logger()})
	if err != nil {
		l.Close()
		return err
	}
	defer client.Close()
	own, err := gridStore(client, c.Data, blobs)
	if err != nil {
		l.Close()
		return err
	}
	if own != nil {
		cfg.Blobs, cfg.Where = own.Blobs(), own.Where
	}
	v, err := api.NewValidator(cfg)
	if err != nil {
		l.Close()
		return err
	}
	if own == nil {
		return v.Run(ctx)
	}
	eg, ctx := errgroup.WithContext(ctx)
	eg.Go(func() error { return v.Run(ctx) })
	eg.Go(func() error { return ended(ctx, own.Run(ctx)) })
	return eg.Wait()
}

// gridStore is the validator's part in the grid's own store, nil if it has no keys for it: then blobs lie in its directory.
func gridStore(client *api.Client, data string, blobs *store.Dir) (*node.GridStore, error) {
	keys, err := store.LoadKeys(filepath.Join(data, grid.StoreKeysFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	b, err := os.ReadFile(filepath.Join(data, grid.NetworkKeyFile))
	if err != nil {
		return nil, err
	}
	if len(b) != 32 {
		return nil, fmt.Errorf("%s holds %d bytes, a key has 32", grid.NetworkKeyFile, len(b))
	}
	return node.NewGridStore(node.GridStoreConfig{
		Client: client, WireGuard: [32]byte(b), Keys: keys, Dir: filepath.Join(data, "store"), Blobs: blobs, Limit: maxStore, Log: logger(),
	})
}

func runGateway(ctx context.Context, c *grid.GatewayConfig) error {
	g, err := readGenesis(c.Genesis)
	if err != nil {
		return err
	}
	cert, err := comet.LoadCertificate(c.Key, "holdfast gateway")
	if err != nil {
		return err
	}
	client, err := api.NewClient(api.ClientConfig{Genesis: g, Certificate: &cert, Trust: filepath.Join(c.Data, "trust"), Log: logger()})
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
		err := table.Refresh(ctx, client) // what it could read takes effect
		edge.Update()
		return 0, err
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

func runNode(ctx context.Context, c *grid.NodeConfig) error {
	o, err := readOrigin(c)
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
	// A machine that waits for the network, or to be approved, is as shut as one that runs. Nothing is dialled before.
	if err := (overlay.Firewall{Log: logger()}).Apply(); err != nil {
		return err
	}
	g, err := o.fetch(ctx, c.Genesis)
	if err != nil {
		return ended(ctx, err)
	}
	client, err := api.NewClient(api.ClientConfig{Genesis: g, Certificate: &keys.TLS, Trust: filepath.Join(c.Data, "trust"), Log: logger()})
	if err != nil {
		return err
	}
	defer client.Close()
	a, err := node.New(node.Config{Client: client, Keys: keys, Data: c.Data, Run: c.Run, Runsc: c.Runsc, Self: self, Cgroup: c.Cgroup, Log: logger()})
	if err != nil {
		return err
	}
	if c.Farm != "" {
		err = node.Join(ctx, node.JoinConfig{Client: client, Keys: keys, Farm: o.farm, Name: c.Name, Storage: c.Storage, Log: logger()})
	}
	if err == nil {
		err = a.Run(ctx)
	}
	if err := ended(ctx, err); err != nil {
		return err
	}
	// Asked to end: the machine goes down. (An agent that is replaced is killed; what it started goes on.)
	stop, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	return a.Stop(stop)
}

// origin is what a machine knows of its grid.
type origin struct {
	genesis *ledger.Genesis // nil: it is not here yet
	grid    identity.GridID
	from    []string
	farm    identity.FarmID
}

// readOrigin reads what is here, and dials nothing.
func readOrigin(c *grid.NodeConfig) (o origin, err error) {
	if c.Grid != "" {
		if err := o.grid.UnmarshalText([]byte(c.Grid)); err != nil {
			return o, fmt.Errorf("--grid: %w", err)
		}
	}
	if c.Farm != "" {
		if err := o.farm.UnmarshalText([]byte(c.Farm)); err != nil {
			return o, fmt.Errorf("--farm: %w", err)
		}
	}
	for _, a := range strings.FieldsFunc(c.From, func(r rune) bool { return r == ',' }) {
		if host, port, err := net.SplitHostPort(a); err != nil || host == "" || port == "" {
			return o, fmt.Errorf("--from: %q is not host:port", a)
		}
		o.from = append(o.from, a)
	}
	o.genesis, err = readGenesis(c.Genesis)
	switch {
	case errors.Is(err, fs.ErrNotExist) && c.Grid != "" && len(o.from) > 0:
		return o, nil
	case err != nil:
		return o, err
	case c.Grid != "" && o.genesis.GridID() != o.grid:
		return o, fmt.Errorf("%s is the genesis of %v, and this machine is to be of %v: remove the file, or mend --grid", c.Genesis, o.genesis.GridID(), o.grid)
	}
	return o, nil
}

// fetch gets the genesis if it is not here, however long that takes: the network may come later. The file is whole, and
// that of the grid, or not there.
func (o origin) fetch(ctx context.Context, path string) (*ledger.Genesis, error) {
	if o.genesis != nil {
		return o.genesis, nil
	}
	var last string
	for wait := 250 * time.Millisecond; ; wait = min(2*wait, 10*time.Second) {
		g, err := api.FetchGenesis(ctx, o.grid, o.from)
		if err == nil {
			logger().Info("the grid's genesis is here", "grid", o.grid, "name", g.Name)
			return g, writeGenesis(path, g)
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if err.Error() != last {
			last = err.Error()
			logger().Warn("the grid's genesis is not here yet", "error", err)
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(wait):
		}
	}
}

func writeGenesis(path string, g *ledger.Genesis) error {
	tmp, err := os.CreateTemp(filepath.Dir(path), ".genesis-*")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.Write(g.Encode())
	if err := errors.Join(err, tmp.Chmod(0o644), tmp.Sync(), tmp.Close()); err != nil {
		return fmt.Errorf("write genesis %s: %w", path, err)
	}
	return errors.Join(os.Rename(tmp.Name(), path), store.SyncDir(filepath.Dir(path)))
}
