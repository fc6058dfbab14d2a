// Package grid lays out a whole grid on one machine: keys, genesis, one configuration for each daemon, and the boxes that
// they run in (package box). It decides nothing at run time: the daemons are those of any grid, and what it writes could
// be written by hand for separate machines.
//
//	DIR/genesis              the genesis document; its digest is the grid's ID
//	DIR/client.json          how a user's commands reach the grid
//	DIR/user.key grid.key    the user's and the grid account's keys (0600)
//	DIR/ca/                  the user's certificate authority
//	DIR/config/NAME.json     a daemon's configuration
//	DIR/data/NAME/           a daemon's data, the only host directory that its box sees
//	DIR/boxes lab log lock   the supervisor's
package grid

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"holdfast/api"
	"holdfast/identity"
	"holdfast/internal/box"
	"holdfast/ledger"
	"holdfast/ledger/comet"
	"holdfast/node"
	"holdfast/store"
	"holdfast/store/location"

	"golang.org/x/sys/unix"
)

// Segments of a grid's little internet. Farms have 1 to maxFarms: workloads run on the first three, and the others only
// keep shards of stores, one machine each, so that a store of 4/6 goes on without any one farm.
const (
	nodeFarms        = 3
	storageFarms     = 3
	maxFarms         = nodeFarms + storageFarms
	segmentGateway   = 10
	segmentValidator = 11
	segmentOutside   = 12
)

// Ports, all in the boxes' own networks.
const (
	PortLedger  = 8441
	PortP2P     = 26656
	PortGateway = 443
)

// Options of a grid.
type Options struct {
	Dir    string
	Nodes  int    // negative means 3, or what the directory has; with 0 all nodes are machines of their own
	Listen string // address on the host that leads to the gateway; "" means 127.0.0.1:8443
	Binary string // path of holdfast
	Runsc  string // path of holdfast-runsc
	Lease  time.Duration
	Delay  time.Duration // of what can be taken back, in a new grid; 0 means a minute
}

// Grid is a laid out grid.
type Grid struct {
	Options
	ID      string // short, from the directory; names cgroups
	Genesis *ledger.Genesis
	Plan    box.Plan
}

// Client is DIR/client.json.
type Client struct {
	Gateway string             `json:"gateway"` // host:port
	Account identity.AccountID `json:"account"`
}

// ValidatorConfig configures "holdfast run validator".
type ValidatorConfig struct {
	Name    string       `json:"name"`
	Genesis string       `json:"genesis"`
	Data    string       `json:"data"`
	P2P     string       `json:"p2p"`
	API     string       `json:"api"`
	Peers   []comet.Peer `json:"peers,omitempty"`
	Quota   api.Quota    `json:"quota,omitzero"`
}

// NodeConfig configures "holdfast run node".
type NodeConfig struct {
	Name    string `json:"name"`
	Genesis string `json:"genesis"`
	Data    string `json:"data"`
	Run     string `json:"run"`
	Key     string `json:"key"`
	Runsc   string `json:"runsc"`
	Cgroup  string `json:"cgroup"`

	Grid string `json:"grid,omitempty"` // ID of the grid that Genesis must be of
	From string `json:"from,omitempty"` // host:port,…: where to get Genesis when it is not there
	Farm string `json:"farm,omitempty"` // ID of the farm that the machine asks to be admitted to

	Storage uint64 `json:"storage,omitempty"` // bytes that it offers to stores when it asks
}

// GatewayConfig configures "holdfast run gateway".
type GatewayConfig struct {
	Name    string `json:"name"`
	Genesis string `json:"genesis"`
	Data    string `json:"data"`
	Key     string `json:"key"`
	Listen  string `json:"listen"`
}

func nodeName(i int) string { return fmt.Sprintf("node-%d", i+1) }

func locationName(i int) string { return fmt.Sprintf("location-%d", i+1) }

// Locations is how many machines only keep shards. Fewer than three nodes are no grid that could lose a farm.
func (g *Grid) Locations() int {
	if g.Nodes < nodeFarms || g.Genesis.Store == (ledger.Store{}) {
		return 0
	}
	return storageFarms
}

// Farms is how many farms there are.
func (g *Grid) Farms() int {
	if g.Locations() > 0 {
		return maxFarms
	}
	return nodeFarms
}

func uplink(segment, host int) *box.Uplink { return &box.Uplink{Segment: segment, Host: host} }

// Layout reads the grid of a directory, and makes one when there is none. It is idempotent.
func Layout(o Options) (*Grid, error) {
	if o.Listen == "" {
		o.Listen = "127.0.0.1:8443"
	}
	abs, err := filepath.Abs(o.Dir)
	if err != nil {
		return nil, err
	}
	o.Dir = abs
	sum := sha256.Sum256([]byte(abs))
	g := &Grid{Options: o, ID: hex.EncodeToString(sum[:4])}
	for _, d := range []string{"config", "data", "log", "lab", "boxes"} {
		if err := os.MkdirAll(filepath.Join(o.Dir, d), 0o700); err != nil {
			return nil, err
		}
	}
	if g.Nodes < 0 {
		g.Nodes = 3
		if _, err := os.Stat(filepath.Join(g.Dir, "genesis")); err == nil {
			g.Nodes = g.existing()
		}
	}
	if g.Nodes > 30 {
		return nil, fmt.Errorf("%d nodes: up to 30 fit on one machine", g.Nodes)
	}
	if err := g.genesis(); err != nil {
		return nil, fmt.Errorf("lay out %s: %w", o.Dir, err)
	}
	if err := g.boxes(); err != nil {
		return nil, fmt.Errorf("lay out %s: %w", o.Dir, err)
	}
	return g, nil
}

// existing counts the nodes that the directory has.
func (g *Grid) existing() int {
	n := 0
	for ; ; n++ {
		if _, err := os.Stat(filepath.Join(g.Dir, "data", nodeName(n))); err != nil {
			return n
		}
	}
}

func (g *Grid) data(name string) string { return filepath.Join(g.Dir, "data", name) }

// genesis makes keys and the genesis document, once.
func (g *Grid) genesis() error {
	path := filepath.Join(g.Dir, "genesis")
	b, err := os.ReadFile(path)
	if err == nil {
		if g.Genesis, err = ledger.DecodeGenesis(b); err != nil {
			return err
		}
		return g.keepStoreKeys()
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	home := filepath.Join(g.data("validator"), "ledger")
	if err := os.MkdirAll(home, 0o700); err != nil {
		return err
	}
	keys, err := comet.MakeKeys(home)
	if err != nil {
		return err
	}
	cert, err := comet.LoadCertificate(filepath.Join(g.data("validator"), "tls.pem"), "holdfast validator")
	if err != nil {
		return err
	}
	pin, err := comet.PinOf(cert)
	if err != nil {
		return err
	}
	admin, err := makeKey(filepath.Join(g.Dir, "grid.key"))
	if err != nil {
		return err
	}
	open, err := admin.OpeningKey()
	if err != nil {
		return err
	}
	lease := g.Lease
	if lease == 0 {
		lease = 5 * time.Second
	}
	delay := cmp.Or(g.Delay, time.Minute)
	var top box.Topology
	addr := top.Addresses(*uplink(segmentValidator, 2))[0].Addr()
	wg, err := g.networkKey()
	if err != nil {
		return err
	}
	own, err := g.store(admin)
	if err != nil {
		return fmt.Errorf("the grid's store: %w", err)
	}
	g.Genesis = &ledger.Genesis{
		Version: 1, Name: "grid-" + g.ID, Time: time.Now().Unix(), Policy: identity.SingleDevice(), Sealing: open.Public(),
		Devices: []identity.Device{{Name: "up", Key: admin.DeviceKey().Public()}},
		Validators: []ledger.Validator{{
			Name: "validator", Key: keys.Public, Power: 10, TLS: pin, Address: netip.AddrPortFrom(addr, PortLedger).String(),
			WireGuard: wg, Endpoints: underlay(uplink(segmentValidator, 2)),
		}},
		Lease: lease, Margin: lease / 5, Store: *own, Delays: ledger.Delays{Cancel: delay, Policy: delay, Retain: 10 * delay},
	}
	return writeFile(path, g.Genesis.Encode(), 0o644)
}

// networkKey makes the validator's key in the system network, and returns the public one.
func (g *Grid) networkKey() (public [32]byte, err error) {
	path := filepath.Join(g.data("validator"), NetworkKeyFile)
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		b = make([]byte, 32)
		rand.Read(b)
		err = writeFile(path, b, 0o600)
	}
	if err != nil {
		return public, err
	}
	k, err := ecdh.X25519().NewPrivateKey(b)
	if err != nil {
		return public, fmt.Errorf("%s: %w", path, err)
	}
	return [32]byte(k.PublicKey().Bytes()), nil
}

// store makes the keys of the grid's own store, and what its locations are told of it. The store's root is derived from
// the grid account's, so that who has that has no second thing to keep; the validator gets what a front end needs.
func (g *Grid) store(admin *identity.KeyFile) (*ledger.Store, error) {
	root := StoreRoot(admin)
	keys, err := root.Keys(0)
	if err != nil {
		return nil, err
	}
	s := &ledger.Store{Limit: g.storage() / 2} // what is left is for stores of contracts
	for _, x := range []struct {
		seed location.Seed
		pin  *[32]byte
	}{{keys.TLS(), &s.FrontEnd}, {root.Recovery(), &s.Recovery}} {
		pin, err := location.PinOf(x.seed)
		if err != nil {
			return nil, err
		}
		*x.pin = pin
	}
	return s, store.SaveKeys(filepath.Join(g.data("validator"), StoreKeysFile), keys)
}

// keepStoreKeys makes the validator's keys of the grid's store again when they are gone.
func (g *Grid) keepStoreKeys() error {
	if g.Genesis.Store == (ledger.Store{}) {
		return nil
	}
	_, err := os.Stat(filepath.Join(g.data("validator"), StoreKeysFile))
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	admin, err := identity.ReadKeyFile(filepath.Join(g.Dir, "grid.key"), "")
	if err != nil {
		return err
	}
	s, err := g.store(admin)
	if err == nil && (s.FrontEnd != g.Genesis.Store.FrontEnd || s.Recovery != g.Genesis.Store.Recovery) {
		err = errors.New("grid.key is not of this grid: its store has other keys")
	}
	return err
}

// Files in a validator's data directory, of the grid's own store.
const (
	NetworkKeyFile = "wireguard.key"
	StoreKeysFile  = "store.keys"
)

// StoreRoot is the root of the grid's own store.
func StoreRoot(admin *identity.KeyFile) store.Root {
	return store.Root(identity.Derive(admin.Root[:], "holdfast/grid/store/v1"))
}

// storage is what each machine offers to stores: a share of half of what is free on the disk, which they all are on.
func (g *Grid) storage() uint64 {
	const least = 1 << 30
	var st unix.Statfs_t
	if err := unix.Statfs(g.Dir, &st); err != nil {
		return least
	}
	return max(least, st.Bavail*uint64(st.Bsize)/2/uint64(max(g.Nodes, nodeFarms)+storageFarms))
}

func underlay(u *box.Uplink) (out []string) {
	var top box.Topology
	for _, p := range top.Addresses(*u) {
		out = append(out, p.Addr().String())
	}
	return out
}

func makeKey(path string) (*identity.KeyFile, error) {
	k, err := identity.ReadKeyFile(path, "")
	if err == nil || !errors.Is(err, fs.ErrNotExist) {
		return k, err
	}
	k = &identity.KeyFile{}
	rand.Read(k.Device[:])
	rand.Read(k.Root[:])
	return k, identity.WriteKeyFile(path, k, "")
}

func writeFile(path string, b []byte, mode os.FileMode) error {
	tmp, err := os.CreateTemp(filepath.Dir(path), ".new-*")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.Write(b)
	return errors.Join(err, tmp.Chmod(mode), tmp.Sync(), tmp.Close(), os.Rename(tmp.Name(), path))
}

// boxes writes the daemons' configurations and plans their boxes.
func (g *Grid) boxes() error {
	root := "/holdfast-" + g.ID
	g.Plan = box.Plan{Dir: g.Dir, Self: []string{g.Binary, "run", "init"}, Cgroup: root, Segments: []int{segmentGateway, segmentValidator, segmentOutside}}
	for f := range g.Farms() {
		g.Plan.Segments = append(g.Plan.Segments, f+1)
	}
	add := func(name, role string, cfg any, link *box.Uplink, bins map[string]string) error {
		if err := os.MkdirAll(g.data(name), 0o700); err != nil {
			return err
		}
		gen, err := os.ReadFile(filepath.Join(g.Dir, "genesis"))
		if err != nil {
			return err
		}
		if err := writeFile(filepath.Join(g.data(name), "genesis"), gen, 0o644); err != nil {
			return err
		}
		b, err := json.MarshalIndent(cfg, "", "  ")
		if err != nil {
			return err
		}
		path := filepath.Join(g.Dir, "config", name+".json")
		if err := writeFile(path, b, 0o600); err != nil {
			return err
		}
		all := map[string]string{"/bin/holdfast": g.Binary}
		for k, v := range bins {
			all[k] = v
		}
		g.Plan.Boxes = append(g.Plan.Boxes, box.Spec{
			Name: name, Args: []string{"/bin/holdfast", "run", role, "--config", "/etc/holdfast/config.json"}, Binaries: all, Data: g.data(name), Config: path,
			Log: filepath.Join(g.Dir, "log", name+".log"), Cgroup: root + "/" + name, Uplink: link, Grace: 40 * time.Second,
		})
		return nil
	}
	any := func(port int) string { return fmt.Sprintf("[::]:%d", port) }
	if err := add("validator", "validator", ValidatorConfig{Name: "validator", Genesis: "/data/genesis", Data: "/data", P2P: any(PortP2P), API: any(PortLedger)}, uplink(segmentValidator, 2), nil); err != nil {
		return err
	}
	if err := add("gateway", "gateway", GatewayConfig{Name: "gateway", Genesis: "/data/genesis", Data: "/data", Key: "/data/gateway.key", Listen: any(PortGateway)}, uplink(segmentGateway, 2), nil); err != nil {
		return err
	}
	for _, m := range g.machines() {
		cfg := NodeConfig{Name: m.name, Genesis: "/data/genesis", Data: "/data", Run: "/run/holdfast", Key: "/data/node.key", Runsc: "/bin/holdfast-runsc", Cgroup: root + "/" + m.name + "/work"}
		if err := add(m.name, "node", cfg, m.link, map[string]string{"/bin/holdfast-runsc": g.Runsc}); err != nil {
			return err
		}
	}
	// The stranger's machine: nothing runs on it but what a test starts there.
	g.Plan.Boxes = append(g.Plan.Boxes, box.Spec{Name: "outside", Uplink: uplink(segmentOutside, 2), Binaries: map[string]string{"/bin/holdfast": g.Binary}})
	return nil
}

// machine is one that runs a node daemon.
type machine struct {
	name  string
	farm  int // from 0
	link  *box.Uplink
	offer node.Offer
}

// machines are the nodes, and then those that only keep shards: a node that offers nothing else.
func (g *Grid) machines() (out []machine) {
	storage := uint64(0)
	if g.Genesis.Store != (ledger.Store{}) {
		storage = g.storage()
	}
	cpu, mem := capacity(g.Nodes)
	for i := range g.Nodes {
		f := i % nodeFarms
		out = append(out, machine{nodeName(i), f, uplink(f+1, 2+i/nodeFarms), node.Offer{CPUMilli: cpu, Memory: mem, Storage: storage}})
	}
	for i := range g.Locations() {
		f := nodeFarms + i
		out = append(out, machine{locationName(i), f, uplink(f+1, 2), node.Offer{Storage: storage}})
	}
	return out
}

// GatewayAddr is where nodes and strangers find the gateway.
func (g *Grid) GatewayAddr() string {
	var top box.Topology
	return netip.AddrPortFrom(top.Addresses(*uplink(segmentGateway, 2))[0].Addr(), PortGateway).String()
}

// Forward leads the host's listening address to the gateway's public port until ctx ends.
func (g *Grid) Forward(ctx context.Context, l net.Listener) error {
	return box.Forward(ctx, l, func() string {
		r, err := box.Running(g.Dir)
		if err != nil {
			return ""
		}
		return r["internet"].NetNS()
	}, g.GatewayAddr())
}

// Dial connects to the ledger's API from the user's side: through the gateway, as from anywhere.
func Dial(gateway string) func(context.Context, *ledger.Validator) (net.Conn, error) {
	return func(ctx context.Context, _ *ledger.Validator) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", gateway)
	}
}

// Connect makes the user's client of the grid in dir.
func Connect(dir string) (*api.Client, *Client, error) {
	b, err := os.ReadFile(filepath.Join(dir, "genesis"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, fmt.Errorf("there is no grid in %s: start one with holdfast up, or name another with --dir", dir)
	} else if err != nil {
		return nil, nil, err
	}
	gen, err := ledger.DecodeGenesis(b)
	if err != nil {
		return nil, nil, err
	}
	c := &Client{}
	if b, err = os.ReadFile(filepath.Join(dir, "client.json")); err != nil {
		return nil, nil, fmt.Errorf("the grid in %s was never up: %w", dir, err)
	}
	if err := json.Unmarshal(b, c); err != nil {
		return nil, nil, fmt.Errorf("client.json: %w", err)
	}
	cl, err := api.NewClient(api.ClientConfig{Genesis: gen, Dial: Dial(c.Gateway), Trust: filepath.Join(dir, "trust")})
	return cl, c, err
}

// Bootstrap brings the ledger to what the grid needs: the user's account, farms, nodes and the gateway. Each step is done
// once, whenever it was interrupted.
func (g *Grid) Bootstrap(ctx context.Context, say func(string)) error {
	c, err := api.NewClient(api.ClientConfig{Genesis: g.Genesis, Dial: Dial(g.Listen), Trust: filepath.Join(g.Dir, "trust")})
	if err != nil {
		return err
	}
	defer c.Close()
	for { // until the ledger answers
		if _, err = c.Read(ctx, ledger.GridKey); err == nil {
			break
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the ledger does not answer: %w", errors.Join(ctx.Err(), err))
		case <-time.After(100 * time.Millisecond):
		}
	}
	admin, err := makeKey(filepath.Join(g.Dir, "grid.key"))
	if err != nil {
		return err
	}
	user, err := makeKey(filepath.Join(g.Dir, "user.key"))
	if err != nil {
		return err
	}
	account, err := g.account(ctx, c, user, say)
	if err != nil {
		return err
	}
	gridActor := ledger.Actor{ID: g.Genesis.GridAccount()}
	// What strangers may have together, they may use up; the grid's own user does not depend on it.
	if _, err := api.Get[ledger.Quota](ctx, c, ledger.QuotaKey(account)); errors.Is(err, ledger.ErrAbsent) {
		if _, err := c.Act(ctx, ledger.KindAccountQuota, gridActor, &ledger.AccountQuota{Account: account, Quota: ledger.OwnQuota()}, admin.DeviceKey()); err != nil {
			return err
		}
	} else if err != nil {
		return err
	}
	farms, err := api.List[identity.FarmID, ledger.Farm](ctx, c, ledger.FarmsKey, ledger.FarmKey)
	if err != nil {
		return err
	}
	ids := make([]identity.FarmID, g.Farms())
	for f := range ids {
		name := farmName(f)
		if i := slices.IndexFunc(farms, func(x *ledger.Farm) bool { return x.Name == name }); i >= 0 {
			ids[f] = farms[i].ID
			continue
		}
		say("admitting " + name)
		tx, err := c.Act(ctx, ledger.KindFarmAdmit, gridActor, &ledger.FarmAdmit{Name: name, Owner: g.Genesis.GridAccount()}, admin.DeviceKey())
		if err != nil {
			return err
		}
		ids[f] = identity.FarmID(tx.ID())
	}
	nodes, err := c.Nodes(ctx)
	if err != nil {
		return err
	}
	for _, m := range g.machines() {
		if slices.ContainsFunc(nodes, func(x *ledger.Node) bool { return x.Name == m.name }) {
			continue
		}
		say("admitting " + m.name)
		keys, err := node.LoadKeys(filepath.Join(g.data(m.name), "node.key"))
		if err != nil {
			return err
		}
		a, err := keys.Admission(c.Grid(), ids[m.farm], m.name, underlay(m.link), m.offer)
		if err != nil {
			return err
		}
		if _, err := c.Act(ctx, ledger.KindNodeAdmit, gridActor, a, admin.DeviceKey()); err != nil {
			return err
		}
	}
	gws, err := api.List[identity.GatewayID, ledger.Gateway](ctx, c, ledger.GatewaysKey, ledger.GatewayKey)
	if err != nil {
		return err
	}
	if len(gws) == 0 {
		say("admitting gateway")
		cert, err := comet.LoadCertificate(filepath.Join(g.data("gateway"), "gateway.key"), "holdfast gateway")
		if err != nil {
			return err
		}
		pin, err := comet.PinOf(cert)
		if err != nil {
			return err
		}
		if _, err := c.Act(ctx, ledger.KindGatewayAdmit, gridActor, &ledger.GatewayAdmit{Name: "gateway", TLS: pin, Address: g.GatewayAddr()}, admin.DeviceKey()); err != nil {
			return err
		}
	}
	return nil
}

// account creates the user's account and writes client.json.
func (g *Grid) account(ctx context.Context, c *api.Client, user *identity.KeyFile, say func(string)) (identity.AccountID, error) {
	return createAccount(ctx, c, user, "up", g.Dir, g.Listen, say)
}

// createAccount makes the account of a key, if there is none yet, and writes client.json.
func createAccount(ctx context.Context, c *api.Client, user *identity.KeyFile, device, dir, gateway string, say func(string)) (identity.AccountID, error) {
	open, err := user.OpeningKey()
	if err != nil {
		return identity.AccountID{}, err
	}
	k := user.DeviceKey()
	tx := ledger.NewTx(c.Grid(), ledger.KindAccountCreate, ledger.Actor{}, 0, &ledger.AccountCreate{
		Devices: []identity.Device{{Name: device, Key: k.Public()}}, Policy: identity.SingleDevice(), Sealing: open.Public(),
	})
	tx.Sign(k)
	id := identity.AccountID(tx.ID()) // the same whenever it is made from the same key
	if _, err := api.Get[identity.Account](ctx, c, ledger.AccountKey(id)); errors.Is(err, ledger.ErrAbsent) {
		say("creating account " + id.Short())
		if _, err := c.Submit(ctx, tx); err != nil {
			return id, err
		}
	} else if err != nil {
		return id, err
	}
	b, err := json.MarshalIndent(Client{Gateway: gateway, Account: id}, "", "  ")
	if err != nil {
		return id, err
	}
	return id, writeFile(filepath.Join(dir, "client.json"), b, 0o644)
}

// Join makes a key and an account of its own in dir, on a grid that another runs. Interrupted, it goes on with the same key.
func Join(ctx context.Context, dir string, genesis []byte, gateway string) (identity.AccountID, error) {
	gen, err := ledger.DecodeGenesis(genesis)
	if err != nil {
		return identity.AccountID{}, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return identity.AccountID{}, err
	}
	if old, err := os.ReadFile(filepath.Join(dir, "genesis")); err == nil && !bytes.Equal(old, genesis) {
		return identity.AccountID{}, fmt.Errorf("%s is of another grid: name another directory with --dir", dir)
	}
	c, err := api.NewClient(api.ClientConfig{Genesis: gen, Dial: Dial(gateway), Trust: filepath.Join(dir, "trust")})
	if err != nil {
		return identity.AccountID{}, err
	}
	defer c.Close()
	user, err := makeKey(filepath.Join(dir, "user.key"))
	if err != nil {
		return identity.AccountID{}, err
	}
	if err := writeFile(filepath.Join(dir, "genesis"), genesis, 0o644); err != nil {
		return identity.AccountID{}, err
	}
	return createAccount(ctx, c, user, "first", dir, gateway, func(string) {})
}

// capacity is what one of n nodes on this machine offers: an equal share of memory, and all cores, since they are shared.
func capacity(n int) (cpuMilli uint32, memory uint64) {
	return 8000, memoryOf() / uint64(n+1)
}

func memoryOf() uint64 {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 4 << 30
	}
	var kib uint64
	if _, err := fmt.Sscanf(string(b), "MemTotal: %d kB", &kib); err != nil {
		return 4 << 30
	}
	return kib << 10
}

// WaitUp returns when the ledger has heard all nodes, and the grid's store is open if there is one.
func (g *Grid) WaitUp(ctx context.Context) (*api.BlobPlace, error) {
	c, _, err := Connect(g.Dir)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	all := g.machines()
	for {
		nodes, err := c.Nodes(ctx)
		up, missed := 0, false
		for _, n := range nodes {
			asked := box.Asked(g.Dir, n.Name)
			missed = missed || asked != box.Up
			if n.Up || asked != box.Up {
				up++
			}
		}
		var place *api.BlobPlace
		if err == nil && up >= len(all) {
			if place, err = c.BlobPlace(ctx); err == nil && (place.Scheme != "" || missed || g.Locations() == 0) {
				return place, nil
			}
		}
		select {
		case <-ctx.Done():
			why := fmt.Errorf("%d of %d nodes are up", up, len(all))
			if place != nil {
				why = fmt.Errorf("blobs are in the %v", place)
			}
			return place, errors.Join(why, err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// Down ends everything that a grid runs, and with data removes its directory.
func Down(ctx context.Context, dir string, data bool) error {
	if err := box.StopAll(ctx, dir); err != nil {
		return err
	}
	if data {
		return os.RemoveAll(dir)
	}
	return nil
}

// Lab asks for a fault of a box and returns when it has come about.
func Lab(ctx context.Context, dir, name string, want box.Wanted) error {
	cfg := filepath.Join(dir, "config", name+".json")
	if _, err := os.Stat(cfg); err != nil {
		return fmt.Errorf("the grid in %s has no %q", dir, name)
	}
	if box.Supervisor(dir) == 0 {
		return fmt.Errorf("the grid in %s is not up", dir)
	}
	if err := box.Ask(dir, name, want); err != nil {
		return err
	}
	return box.Await(ctx, dir, name, want)
}

// Segment is where a farm of a grid on one machine is.
func Segment(farm string) (int, error) {
	for f := range maxFarms {
		if farm == farmName(f) {
			return f + 1, nil
		}
	}
	return 0, fmt.Errorf("farm %q is not on this machine", farm)
}

func farmName(i int) string { return fmt.Sprintf("farm-%d", i+1) }
