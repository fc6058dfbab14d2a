package node

import (
	"context"
	"crypto/ecdh"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"holdfast/api"
	"holdfast/disperse"
	"holdfast/overlay"
	"holdfast/reconcile"
	"holdfast/store"
	"holdfast/store/location"

	"golang.org/x/sync/errgroup"
)

// GridScheme is that of the grid's own store: of six shards on six farms any four restore a blob.
func GridScheme() disperse.Scheme { return disperse.Scheme{K: 4, N: 6} }

// GridStoreConfig configures a GridStore.
type GridStoreConfig struct {
	Client    *api.Client
	WireGuard [32]byte // X25519 private key that the genesis has the public one of
	Keys      *store.Keys
	Dir       string // of the store's database
	Blobs     *store.Dir
	Limit     int64        // of one blob
	Log       *slog.Logger // nil discards
}

// GridStore is the validator's part in the grid's own store: a member of the system network that offers nothing there, and
// the store's front end. It keeps the grid's blobs: in a directory, until there are locations on enough farms, and then in
// the store.
type GridStore struct {
	cfg   GridStoreConfig
	log   *slog.Logger
	cert  tls.Certificate
	net   *overlay.Network
	key   [32]byte // public, of the system network
	blobs *store.Moving
	loop  *reconcile.Loop
	move  *reconcile.Loop

	// The loop's alone.
	open *store.Store // nil while it is not
	stop func() error // ends it

	ended atomic.Bool // the open one, by itself

	mu   sync.Mutex
	have []Place // the locations that the open store uses
	why  string  // it is not open
	bad  int     // damaged blobs that cannot be moved
	down int     // of have, those that the ledger does not hear
}

// begunFile is in a store's directory when the store has been used: its blobs may be there and nowhere else.
const begunFile = "begun"

// NewGridStore checks the configuration and reads whether the store has been used before.
func NewGridStore(cfg GridStoreConfig) (*GridStore, error) {
	g := &GridStore{cfg: cfg, log: cfg.Log, why: "the grid has just started"}
	if g.log == nil {
		g.log = slog.New(slog.DiscardHandler)
	}
	private, err := ecdh.X25519().NewPrivateKey(cfg.WireGuard[:])
	if err != nil {
		return nil, fmt.Errorf("grid store: network key: %w", err)
	}
	g.key = [32]byte(private.PublicKey().Bytes())
	if g.cert, err = location.Certificate(cfg.Keys.TLS()); err != nil {
		return nil, fmt.Errorf("grid store: %w", err)
	}
	id := SystemNetwork(cfg.Client.Grid())
	if g.net, err = overlay.New(overlay.Config{Network: id, Name: systemName, Port: basePort, PrivateKey: cfg.WireGuard, Self: overlay.Addr(id, g.key), InMain: true, Log: g.log}); err != nil {
		return nil, fmt.Errorf("grid store: %w", err)
	}
	begun, err := g.begun()
	if err != nil {
		return nil, fmt.Errorf("grid store: %w", err)
	}
	g.blobs = store.NewMoving(cfg.Blobs, cfg.Limit, begun)
	g.loop = reconcile.New(reconcile.Config{Name: "grid store", Resync: 10 * time.Second, Max: 5 * time.Second, Log: g.log, Step: g.step})
	g.move = reconcile.New(reconcile.Config{Name: "blobs", Resync: 30 * time.Second, Log: g.log, Step: g.moveBlobs})
	return g, nil
}

func (g *GridStore) begun() (bool, error) {
	_, err := os.Stat(filepath.Join(g.cfg.Dir, begunFile))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// Blobs are the grid's, wherever they are.
func (g *GridStore) Blobs() store.Blobs { return g.blobs }

// Where says where blobs are.
func (g *GridStore) Where() api.BlobPlace {
	left, err := g.blobs.Left()
	g.mu.Lock()
	defer g.mu.Unlock()
	p := api.BlobPlace{Waiting: left}
	if g.why != "" {
		p.Reason = g.why
		return p
	}
	if err != nil {
		p.Reason = err.Error()
	} else if g.bad > 0 {
		p.Reason = fmt.Sprintf("%d blobs in the directory are damaged", g.bad)
	} else if g.down > 0 {
		p.Reason = fmt.Sprintf("%d of %d locations are down", g.down, len(g.have))
	}
	p.Scheme, p.Locations, p.Farms = GridScheme().String(), len(g.have), len(farms(g.have))
	return p
}

func farms(places []Place) map[string]bool {
	out := map[string]bool{}
	for _, p := range places {
		out[p.Farm] = true
	}
	return out
}

// Run takes part in the system network and keeps the store open until ctx ends.
func (g *GridStore) Run(ctx context.Context) error {
	eg, ctx := errgroup.WithContext(ctx)
	eg.Go(func() error { g.runNetwork(ctx); return ctx.Err() })
	eg.Go(func() error { return g.cfg.Client.Follow(ctx, g.loop.Wake) })
	eg.Go(func() error { return g.move.Run(ctx) })
	eg.Go(func() error {
		err := g.loop.Run(ctx)
		return errors.Join(err, g.shut())
	})
	return eg.Wait()
}

// runNetwork keeps the tunnel up. A validator that cannot have one (it may not make interfaces) works without the store.
func (g *GridStore) runNetwork(ctx context.Context) {
	said := ""
	for wait := 100 * time.Millisecond; ctx.Err() == nil; wait = min(2*wait, 10*time.Second) {
		err := g.net.Run(ctx)
		if ctx.Err() != nil {
			return
		}
		if text := fmt.Sprint(err); text != said {
			said = text
			g.log.Warn("the system network is not here, trying again", "error", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
}

// step makes peers and locations those of the ledger, and opens the store when it can be.
func (g *GridStore) step(ctx context.Context) (time.Duration, error) {
	nodes, err := g.cfg.Client.Nodes(ctx)
	if err != nil {
		return 0, err
	}
	set, err := g.cfg.Client.Validators(ctx)
	if err != nil {
		return 0, err
	}
	peers := systemPeers(g.cfg.Client.Grid(), nodes, set.Members, g.key)
	// Before anybody can send: nothing of this machine is for the network's members.
	if err := (overlay.Guest{Interface: systemName}).Apply(); err != nil {
		return 0, err
	}
	if err := g.net.SetPeers(peers); err != nil {
		return 0, err
	}
	places := Places(g.cfg.Client.Grid(), nodes)
	if g.ended.Swap(false) {
		if err := g.shut(); err != nil {
			g.log.Warn("shut the grid's store", "error", err)
		}
	}
	if g.open == nil {
		return g.begin(ctx, places)
	}
	return 0, g.follow(ctx, places)
}

// begin opens the store, as soon as it could be written. A directory that knows of none may have been lost: the locations
// are asked. A new store begins with locations that are all up, on as many farms as it has shards.
func (g *GridStore) begin(ctx context.Context, places []Place) (time.Duration, error) {
	begun, err := g.begun()
	if err != nil {
		return 0, err
	}
	up := slices.DeleteFunc(slices.Clone(places), func(p Place) bool { return !p.Up })
	if why := wanting(len(farms(up)), false); why != "" {
		g.say(nil, why)
		return 0, nil
	}
	use, restore := places, !begun
	st, err := g.start(ctx, use, restore)
	switch {
	case restore && errors.Is(err, store.ErrNoStore):
		if why := wanting(len(farms(up)), true); why != "" {
			g.say(nil, why)
			return 0, nil
		}
		use, restore = up, false
		st, err = g.start(ctx, use, restore)
	case errors.Is(err, store.ErrExists), errors.Is(err, store.ErrDamaged):
		restore = true
		st, err = g.start(ctx, use, restore)
	}
	if err != nil {
		g.say(nil, err.Error())
		return 0, err
	}
	if err := writeFile(filepath.Join(g.cfg.Dir, begunFile)); err != nil {
		return 0, errors.Join(err, g.shut())
	}
	g.blobs.Use(st)
	g.say(use, "")
	g.log.Info("the grid's store is open", "scheme", GridScheme(), "locations", len(use), "farms", len(farms(use)), "restored", restore)
	g.move.Wake()
	return 0, nil
}

// wanting says why so many farms, whose locations are up, do not do for the store.
func wanting(farms int, fresh bool) string {
	need := GridScheme().K + 1
	if fresh {
		need = GridScheme().N
	}
	if farms >= need {
		return ""
	}
	return fmt.Sprintf("%d farms have a location that is up, %d are needed", farms, need)
}

func (g *GridStore) start(ctx context.Context, places []Place, restore bool) (*store.Store, error) {
	var members []store.Member
	shut := func() (err error) {
		for _, m := range members {
			err = errors.Join(err, m.Location.(io.Closer).Close())
		}
		return err
	}
	for _, p := range places {
		m, err := p.Member(g.cert, g.dial)
		if err != nil {
			return nil, errors.Join(err, shut())
		}
		members = append(members, m)
	}
	st, err := store.Open(ctx, store.Config{Dir: g.cfg.Dir, Keys: g.cfg.Keys, Members: members, Scheme: GridScheme(), Restore: restore, Log: g.log})
	if err != nil {
		return nil, errors.Join(err, shut())
	}
	life, cancel := context.WithCancel(context.WithoutCancel(ctx))
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := st.Run(life); err != nil {
			g.log.Error("the grid's store ends", "error", err)
			g.ended.Store(true)
			g.loop.Wake()
		}
	}()
	g.open = st
	g.stop = func() error {
		cancel()
		<-done
		return errors.Join(st.Close(), shut())
	}
	return st, nil
}

// shut ends the store's work, if it is open.
func (g *GridStore) shut() error {
	if g.open == nil {
		return nil
	}
	g.blobs.Use(nil)
	err := g.stop()
	g.open, g.stop = nil, nil
	return err
}

// follow adds locations that have come since. Those that left stay members, and show as absent.
func (g *GridStore) follow(ctx context.Context, places []Place) error {
	g.mu.Lock()
	have := slices.Clone(g.have)
	g.mu.Unlock()
	var errs []error
	for _, p := range places {
		if !p.Up || slices.ContainsFunc(have, func(h Place) bool { return h.ID == p.ID }) {
			continue
		}
		m, err := p.Member(g.cert, g.dial)
		if err == nil {
			if err = g.open.Add(ctx, m); errors.Is(err, store.ErrMemberThere) {
				err = nil
			} else if err != nil {
				m.Location.(io.Closer).Close()
			}
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("location %s: %w", p.Node, err))
			continue
		}
		have = append(have, p)
	}
	g.say(have, "")
	down := 0
	for _, h := range have {
		if !slices.ContainsFunc(places, func(p Place) bool { return p.ID == h.ID && p.Up }) {
			down++
		}
	}
	g.mu.Lock()
	g.down = down
	g.mu.Unlock()
	return errors.Join(errs...)
}

func (g *GridStore) say(have []Place, why string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.have, g.why = have, strings.TrimSpace(why)
}

func (g *GridStore) dial(ctx context.Context, addr string) (net.Conn, error) {
	to, err := netip.ParseAddrPort(addr)
	if err != nil {
		return nil, err
	}
	return g.net.Dial(ctx, to)
}

func (g *GridStore) moveBlobs(ctx context.Context) (time.Duration, error) {
	damaged, err := g.blobs.Move(ctx)
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.bad != len(damaged) {
		g.bad = len(damaged)
		g.log.Error("blobs in the directory are damaged and stay there", "blobs", damaged)
	}
	if errors.Is(err, store.ErrBusy) && g.why != "" {
		return 0, nil // it says so by itself
	}
	return 0, err
}

func writeFile(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close(), store.SyncDir(filepath.Dir(path)))
}
