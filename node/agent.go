// Package node is the agent on a machine that runs workloads. It reads from the ledger what belongs here, compares it
// with what runs, and acts: overlay networks, volumes, sandboxes, and the routes that its Origin serves to gateways. It
// is the only translator between a contract's words and those of the rooms below.
//
// It pulls; nothing is pushed to it and nothing reaches it from outside the grid: it dials validators and gateways, and its
// firewall drops the rest. What it starts outlives it: sandboxes, their watchdogs and volume servers go on when the
// agent dies, and the next agent adopts them. On disk it keeps sealed blobs, encrypted volumes, shards of stores, and its
// key, nothing else. The location that keeps the shards listens in the system network, where validators and nodes are.
package node

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"holdfast/api"
	"holdfast/contract"
	"holdfast/gateway"
	"holdfast/identity"
	"holdfast/internal/canonical"
	"holdfast/ledger"
	"holdfast/overlay"
	"holdfast/reconcile"
	"holdfast/sandbox"
	"holdfast/seal"
	"holdfast/store"
	"holdfast/store/location"
	"holdfast/volume"

	"golang.org/x/sync/errgroup"
)

// Config of an Agent.
type Config struct {
	Client *api.Client
	Keys   *Keys
	Data   string // on disk: sealed blobs, volume images
	Run    string // on tmpfs: everything that must not reach a disk
	Runsc  string // path of holdfast-runsc
	Self   string // path of holdfast, for shims and volume servers
	Cgroup string // parent of the workloads' cgroups
	Log    *slog.Logger
}

// maxSealedBlob bounds a blob that a node keeps.
const maxSealedBlob = 4 << 30

// Agent runs what the ledger assigns to this node.
type Agent struct {
	cfg     Config
	log     *slog.Logger
	client  *api.Client
	ledger  api.Reader // client
	blobs   *store.Dir
	runner  *sandbox.Runner
	volumes *volume.Manager
	fronts  *fronts
	savers  *savers
	origin  *gateway.Origin
	lease   *lease
	view    *reconcile.Loop
	upkeep  *reconcile.Loop
	beat    chan struct{}
	ownTLS  *tls.Config
	handler http.Handler
	nonce   sync.Mutex // one transaction of this node at a time

	// Of the view's loop alone.
	locating bool // the location was started
	without  int  // stores that it has no room for

	unpacking sync.RWMutex // held for reading from the first layer until the controller keeps the image

	// Of the upkeep's loop alone.
	buried time.Time              // when images of retired volumes were last looked for
	handed map[*ContractView]bool // whose keys were handed on, of the view that was seen last

	mu       sync.Mutex
	pruned   time.Time
	placed   bool // every workload has had its controller once
	current  *View
	location *location.Server // nil while it does not run
	bodies   map[contract.RevisionID]*opened
	coming   map[store.Digest]*coming
	control  map[contract.WorkloadID]*controller
	wanted   map[contract.WorkloadID]*Workload
	meshes   map[string]*mesh
	releases map[contract.WorkloadID]*Workload // last wanted form, for what release must undo

	group    *errgroup.Group
	groupCtx context.Context
}

// opened is a body that was verified against its header's commitments.
type opened struct {
	keys  *contract.Keys
	body  *contract.Body
	certs map[string]*tls.Config // by host; guarded by Agent.mu
	bars  map[string]*bar        // of services, as they were read last; nil: they never were. Of the view's loop alone
}

// mesh is a running overlay network.
type mesh struct {
	net    *overlay.Network
	cancel context.CancelFunc
	done   chan struct{}
}

// New makes an Agent; nothing happens before Run.
func New(cfg Config) (*Agent, error) {
	// What is absent would silently mean less: no cgroup, no limits.
	for name, v := range map[string]string{"data": cfg.Data, "run": cfg.Run, "runsc": cfg.Runsc, "self": cfg.Self, "cgroup": cfg.Cgroup} {
		if !filepath.IsAbs(v) || (name == "cgroup" && filepath.Clean(v) == "/") {
			return nil, fmt.Errorf("node: %s %q is not an absolute path", name, v)
		}
	}
	if cfg.Keys == nil {
		return nil, errors.New("node: no keys")
	}
	a := &Agent{
		pruned: time.Now(), // what was unpacked before this start may be about to be used again
		cfg:    cfg, log: cfg.Log, client: cfg.Client, ledger: cfg.Client,
		blobs:  store.NewDir(filepath.Join(cfg.Data, "blobs"), maxSealedBlob),
		lease:  &lease{path: filepath.Join(cfg.Run, "lease")},
		beat:   make(chan struct{}, 1),
		bodies: map[contract.RevisionID]*opened{}, coming: map[store.Digest]*coming{},
		control: map[contract.WorkloadID]*controller{}, wanted: map[contract.WorkloadID]*Workload{},
		meshes: map[string]*mesh{}, releases: map[contract.WorkloadID]*Workload{},
	}
	if a.log == nil {
		a.log = slog.New(slog.DiscardHandler)
	}
	var err error
	if a.runner, err = sandbox.New(sandbox.Config{
		Runsc: cfg.Runsc, Self: []string{cfg.Self, "run", "shim"}, Dir: filepath.Join(cfg.Run, "sandbox"),
		Cgroup: cfg.Cgroup, Lease: a.lease.path, Log: a.log,
	}); err != nil {
		return nil, err
	}
	if a.volumes, err = volume.New(volume.Config{
		Self: []string{cfg.Self, "run", "volume"}, Dir: filepath.Join(cfg.Data, "volumes"), Run: filepath.Join(cfg.Run, "volumes"), Log: a.log,
	}); err != nil {
		return nil, err
	}
	a.savers = &savers{agent: a, all: map[contract.VolumeID]*saver{}}
	a.fronts = &fronts{
		self: cfg.Self, dir: filepath.Join(cfg.Run, "fronts"), log: a.log, all: map[string]*front{}, taken: map[string]bool{}, wake: a.wakeAll,
		bound: func(id string, pid int, limits *contract.Service) error {
			// GOMEMLIMIT holds its heap to what the contract says; its database, on tmpfs, has as much again.
			return a.runner.Bound(id, pid, int64(limits.CPUMilli), 2*int64(limits.Memory), int64(limits.Pids))
		},
		unbound: func(id string) { a.runner.Unbound(id) },
		note: func(id, text string) {
			if err := a.runner.Note(id, text); err != nil {
				a.log.Warn("note in the log", "error", err)
			}
		},
	}
	if a.origin, err = gateway.NewOrigin(gateway.OriginConfig{Certificate: cfg.Keys.TLS, Log: a.log}); err != nil {
		return nil, err
	}
	a.ownTLS = &tls.Config{Certificates: []tls.Certificate{cfg.Keys.TLS}, MinVersion: tls.VersionTLS13}
	a.handler = a.logHandler()
	a.view = reconcile.New(reconcile.Config{Name: "view", Resync: 10 * time.Second, Max: 3 * time.Second, Log: a.log, Step: a.reconcile})
	a.upkeep = reconcile.New(reconcile.Config{Name: "upkeep", Resync: 10 * time.Second, Max: 3 * time.Second, Log: a.log, Step: a.keepUp})
	return a, nil
}

// Run keeps the node as the ledger says until ctx ends. Workloads go on; only what lives in this process ends.
func (a *Agent) Run(ctx context.Context) error {
	for _, d := range []string{a.cfg.Run, a.cfg.Data} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return fmt.Errorf("node directory: %w", err)
		}
	}
	if err := onTmpfs(a.cfg.Run); err != nil {
		return err
	}
	if err := a.lease.open(); err != nil {
		return err
	}
	defer a.lease.close()
	if err := errors.Join(a.blobs.Sweep(), a.volumes.Sweep(), os.RemoveAll(a.fronts.dir), os.RemoveAll(filepath.Join(a.cfg.Run, "savers"))); err != nil { // what an agent that was killed left half made
		return err
	}
	// Closed before anything else is opened; the reconciled rules follow with the first view.
	if err := (overlay.Firewall{Log: a.log}).Apply(); err != nil {
		return fmt.Errorf("firewall: %w", err)
	}
	g, gctx := errgroup.WithContext(ctx)
	a.group, a.groupCtx = g, gctx
	g.Go(func() error { return a.view.Run(gctx) })
	g.Go(func() error { return a.upkeep.Run(gctx) })
	g.Go(func() error { return a.client.Follow(gctx, a.view.Wake) })
	g.Go(func() error { return a.heartbeats(gctx) })
	g.Go(func() error { return a.origin.Run(gctx) })
	g.Go(func() error { return a.events(gctx) })
	err := g.Wait()
	if ctx.Err() != nil {
		return nil // asked to stop
	}
	return err
}

// events wakes the controller of a workload whose sandbox changed.
func (a *Agent) events(ctx context.Context) error {
	for range a.runner.Watch(ctx) {
		a.mu.Lock()
		for _, c := range a.control {
			c.loop.Wake()
		}
		a.mu.Unlock()
	}
	return ctx.Err()
}

// changed is called when a workload's report changed.
func (a *Agent) changed() {
	select {
	case a.beat <- struct{}{}:
	default:
	}
	a.setServices()
	a.mu.Lock()
	for _, c := range a.control { // somebody may wait for it
		c.loop.Wake()
	}
	a.mu.Unlock()
}

// heartbeats tells the validators that this node lives and what it sees, and renews the lease when they heard it.
func (a *Agent) heartbeats(ctx context.Context) error {
	g := a.client.Genesis()
	every := min(time.Second, g.Lease/4)
	t := time.NewTicker(every)
	defer t.Stop()
	failing, full, cut := false, false, 0
	for {
		sent := bootTime()
		h := &ledger.Heartbeat{Grid: a.client.Grid(), Node: a.cfg.Keys.ID, Sequence: uint64(time.Now().UnixNano()), Workloads: a.reports(), Stored: a.stored()}
		if n := fit(h, ledger.MaxHeartbeat); n != cut {
			a.log.Warn("more workloads than a heartbeat holds", "not reported", n)
			cut = n
		}
		h.Sign(a.cfg.Keys.Session)
		hctx, cancel := context.WithTimeout(ctx, every+time.Second)
		err := a.client.Heartbeat(hctx, h.Encode())
		cancel()
		if err == nil {
			// Counted from before it was sent: the validator's lease began later than that.
			// A lease that cannot be written ends what has volumes and nothing else; it is tried again with the next one.
			lerr := a.lease.renew(sent + g.Lease - g.Margin)
			if (lerr != nil) != full {
				if full = lerr != nil; full {
					a.log.Error("the lease cannot be renewed", "error", lerr)
				} else {
					a.log.Info("the lease is renewed")
					a.wakeAll()
				}
			}
		}
		if (err != nil) != failing && ctx.Err() == nil {
			failing = err != nil
			if failing {
				a.log.Warn("the ledger does not hear this node", "error", err)
			} else {
				a.log.Info("the ledger hears this node")
				a.wakeAll()
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-t.C:
		case <-a.beat:
			// A change is told at once, but not more often than this.
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(50 * time.Millisecond):
			}
		}
	}
}

func (a *Agent) wakeAll() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, c := range a.control {
		c.loop.Wake()
	}
}

func (a *Agent) reports() []ledger.Report {
	a.mu.Lock()
	defer a.mu.Unlock()
	var out []ledger.Report
	for id := range a.wanted {
		if c := a.control[id]; c != nil {
			if r, _ := c.status(); r.Workload == id {
				out = append(out, r)
			}
		}
	}
	slices.SortFunc(out, func(x, y ledger.Report) int { return slices.Compare(x.Workload[:], y.Workload[:]) })
	return out
}

// reconcile reads the view and sets the Spec of everything below. Each part has a loop of its own; what cannot be done
// yet for one contract does not hold up another.
func (a *Agent) reconcile(ctx context.Context) (time.Duration, error) {
	v, err := ReadView(ctx, a.client, a.client.Grid(), a.cfg.Keys.ID)
	if err != nil {
		return 0, err
	}
	set, err := a.client.Validators(ctx)
	if err != nil {
		return 0, err
	}
	v.Validators = set.Members
	var errs []error
	// A contract that cannot be read now goes on as it was read last.
	for id, err := range v.Unread {
		errs = append(errs, fmt.Errorf("%v: %w", id, err))
		for _, old := range a.contracts(id) {
			same := *old
			same.Missing = nil // who they are now is not known
			v.Contracts = append(v.Contracts, &same)
			delete(v.Unread, id)
		}
	}
	running, err := a.runner.List(ctx)
	if err != nil {
		return 0, err
	}
	s, err := a.specs(ctx, v, adoptable(running))
	errs = append(errs, err)
	a.settle(v, s)
	if err := a.setMeshes(s); err != nil {
		errs = append(errs, err)
	}
	fw := overlay.Firewall{Egress: len(s.egress) > 0, Log: a.log}
	var members []netip.Addr
	for _, p := range s.meshes[0].Peers {
		members = append(members, p.Addrs[0].Addr())
	}
	fw.Access = []overlay.Access{{Interface: s.meshes[0].Name, Sources: members}}
	if v.Self.Storage > 0 {
		fw.Access[0].Ports = []uint16{PortLocation}
	}
	if err := fw.Apply(); err != nil {
		errs = append(errs, fmt.Errorf("firewall: %w", err))
	}
	errs = append(errs, a.setLocation(v))
	a.fronts.follow(Places(v.Grid, v.Nodes))
	a.setWorkloads(s.workloads, adoptable(running))
	a.setEdges(v)
	a.setServices()
	a.upkeep.Wake()
	return 0, errors.Join(errs...)
}

// keepUp does what waits for others, for the ledger or for a disk, and what no workload waits for: a contract of which it does
// not come off holds up none.
func (a *Agent) keepUp(ctx context.Context) (time.Duration, error) {
	a.mu.Lock()
	v, bodies, placed := a.current, a.bodies, a.placed
	a.mu.Unlock()
	if !placed {
		return 0, nil
	}
	handed := map[*ContractView]bool{}
	var errs []error
	for _, c := range v.Contracts {
		if handed[c] = a.handed[c]; handed[c] || len(c.Missing) == 0 || bodies[c.Revision] == nil {
			continue
		}
		err := a.handOn(ctx, c, bodies[c.Revision].keys)
		if handed[c] = err == nil; err != nil {
			errs = append(errs, fmt.Errorf("contract %s: %w", c.Record.Name, err))
		}
	}
	a.handed = handed
	errs = append(errs, a.sweep(ctx))
	if err := errors.Join(errs...); err != nil {
		return 0, err
	}
	return 0, a.prune(ctx, 10*time.Minute)
}

// settle makes v the view that others here go by. Bodies of revisions that are no longer here are forgotten, and with them
// their keys and secrets.
func (a *Agent) settle(v *View, s *specs) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.current, a.bodies = v, s.opened
}

// contract is one as it was read last, at its current revision, or nil.
func (a *Agent) contract(id contract.ID) *ContractView {
	if all := a.contracts(id); len(all) > 0 {
		return all[0]
	}
	return nil
}

// contracts is one as it was read last, at its current revision first.
func (a *Agent) contracts(id contract.ID) (out []*ContractView) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.current == nil {
		return nil
	}
	for _, c := range a.current.Contracts {
		if c.Record.ID == id {
			out = append(out, c)
		}
	}
	return out
}

// specs is all that a view asks of this node.
type specs struct {
	workloads map[contract.WorkloadID]*Workload
	meshes    []Mesh // the first one is the system network
	egress    map[string]map[netip.Addr][]overlay.Egress
	opened    map[contract.RevisionID]*opened
	kept      map[string]bool // networks that stay as they are
}

// specs opens the contracts and translates them. It changes nothing that runs. Of a contract that cannot be opened or read
// what runs goes on and nothing new starts.
func (a *Agent) specs(ctx context.Context, v *View, adopted map[contract.WorkloadID]*Workload) (*specs, error) {
	s := &specs{
		workloads: map[contract.WorkloadID]*Workload{}, meshes: []Mesh{systemMesh(v)}, egress: map[string]map[netip.Addr][]overlay.Egress{},
		opened: map[contract.RevisionID]*opened{}, kept: map[string]bool{},
	}
	a.fetchBodies(ctx, v)
	var errs []error
	for _, c := range v.Contracts {
		o, err := a.open(ctx, c)
		if err != nil {
			errs = append(errs, fmt.Errorf("contract %s: %w", c.Record.Name, err))
			a.keep(v, c, s, adopted, err)
			continue
		}
		s.opened[c.Revision] = o
		if err := a.judge(ctx, c, o); err != nil {
			errs = append(errs, fmt.Errorf("contract %s: %w", c.Record.Name, err))
		}
		for _, m := range contractMeshes(v, c, o.keys, o.body) {
			// Two revisions of a contract share its networks.
			if !slices.ContainsFunc(s.meshes, func(x Mesh) bool { return x.Network == m.Network }) {
				s.meshes = append(s.meshes, m)
			}
		}
		for _, w := range workloads(v, c, o, s.meshes) {
			s.workloads[w.ID] = w
		}
	}
	for id, w := range adopted {
		if _, unread := v.Unread[w.Contract]; unread {
			w.Keep = "the ledger's records of it cannot be read"
			s.workloads[id], s.kept[w.Network] = w, true
		}
	}
	for _, w := range s.workloads {
		if rules := egressRules(w.Process); len(rules) > 0 {
			if s.egress[w.Network] == nil {
				s.egress[w.Network] = map[netip.Addr][]overlay.Egress{}
			}
			s.egress[w.Network][w.Address] = rules
		}
	}
	return s, errors.Join(errs...)
}

// open returns the keys and body of a contract's current revision, fetched, verified against all three commitments.
func (a *Agent) open(ctx context.Context, c *ContractView) (*opened, error) {
	a.mu.Lock()
	o := a.bodies[c.Revision]
	a.mu.Unlock()
	if o != nil {
		return o, nil
	}
	if c.Envelope == nil {
		return nil, errNoEnvelope
	}
	keys, err := c.Envelope.Open(a.cfg.Keys.Open)
	if err != nil {
		return nil, &failure{"the envelope does not open with this node's key", err}
	}
	// Until the body is open, errors quote nothing that is sealed.
	sealed, err := a.fetched(ctx, c.Header.SealedBody)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errNoBody, err)
	}
	defer sealed.Close()
	raw, err := io.ReadAll(io.LimitReader(sealed, contract.MaxBody+1<<10))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errNoBody, err)
	}
	if err := complete(c.Header, keys); err != nil {
		return nil, err
	}
	body, err := contract.Open(c.Header, keys, raw)
	if errors.Is(err, contract.ErrBody) {
		return nil, err
	} else if err != nil {
		return nil, &failure{"the body is not a valid one", err}
	}
	return &opened{keys: keys, body: body, certs: map[string]*tls.Config{}}, nil
}

// complete refuses keys that lack one which the header asks for. Read from a map, a missing key is 32 zero bytes, which
// everybody knows.
func complete(h *contract.Header, k *contract.Keys) error {
	if k.Body == [32]byte{} || k.Salt == [32]byte{} {
		return fmt.Errorf("%w: the envelope has no key for it", contract.ErrBody)
	}
	for _, v := range h.Volumes {
		if k.Volumes[v.Name] == [32]byte{} {
			return fmt.Errorf("%w: the envelope has no key for volume %q", contract.ErrBody, v.Name)
		}
	}
	for _, n := range h.Networks {
		if k.Networks[n] == [32]byte{} {
			return fmt.Errorf("%w: the envelope has no key for network %q", contract.ErrBody, n)
		}
	}
	return nil
}

// coming is a sealed body that is being fetched, or was.
type coming struct {
	done chan struct{}
	late bool  // the view goes on without it; guarded by Agent.mu
	err  error // how it ended, once done is closed
}

// How long a view waits for all its new bodies together, and how long one has to come.
const (
	patience = 500 * time.Millisecond
	bodyTime = time.Minute
)

// fetchBodies fetches the bodies that a view needs and this node does not have, each by itself. Those that it asks for the first time
// it waits for a moment; what comes after that wakes the view.
func (a *Agent) fetchBodies(ctx context.Context, v *View) {
	var first []*coming
	wanted := map[store.Digest]bool{}
	for _, c := range v.Contracts {
		d := store.Digest(c.Header.SealedBody)
		wanted[d] = true
		a.mu.Lock()
		opened, old := a.bodies[c.Revision] != nil, a.coming[d]
		a.mu.Unlock()
		if opened || c.Envelope == nil || old != nil && !closed(old.done) {
			continue
		}
		if have, err := a.blobs.Has(ctx, d); have || err != nil {
			continue // whoever opens it sees what is wrong
		}
		f := &coming{done: make(chan struct{}), late: old != nil}
		if old == nil {
			first = append(first, f)
		}
		a.mu.Lock()
		a.coming[d] = f
		a.mu.Unlock()
		a.group.Go(func() error {
			ctx, cancel := context.WithTimeout(a.groupCtx, bodyTime)
			defer cancel()
			r, err := a.fetch(ctx, d)
			if err == nil {
				r.Close()
			}
			a.mu.Lock()
			f.err = err
			close(f.done)
			late := f.late
			a.mu.Unlock()
			if err == nil && late {
				a.view.Wake()
			}
			return nil
		})
	}
	over := time.After(patience)
	for _, f := range first {
		select {
		case <-f.done:
			continue
		case <-over:
		case <-ctx.Done():
		}
		break
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, f := range first {
		f.late = true
	}
	maps.DeleteFunc(a.coming, func(d store.Digest, f *coming) bool { return !wanted[d] && closed(f.done) })
}

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// fetched is a sealed body that fetchBodies has brought to the disk.
func (a *Agent) fetched(ctx context.Context, d store.Digest) (io.ReadCloser, error) {
	have, err := a.blobs.Has(ctx, d)
	if err != nil {
		return nil, err
	}
	if have {
		r, _, err := a.blobs.Open(ctx, d)
		return r, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if f := a.coming[d]; f != nil && f.err != nil {
		return nil, f.err
	}
	return nil, errors.New("it has not come yet")
}

// fetch returns a sealed blob from disk, or from the grid through disk.
func (a *Agent) fetch(ctx context.Context, d store.Digest) (io.ReadCloser, error) {
	if have, err := a.blobs.Has(ctx, d); err != nil {
		return nil, err
	} else if !have {
		r, _, err := a.client.OpenBlob(ctx, d)
		if err != nil {
			return nil, err
		}
		err = a.blobs.Put(ctx, d, r)
		r.Close()
		if err != nil {
			return nil, err
		}
	}
	r, _, err := a.blobs.Open(ctx, d)
	return r, err
}

// imageBlobs gives the sandbox the plaintext blobs of an image: fetched sealed, opened on the way, verified by it.
func (a *Agent) imageBlobs(img *contract.Image) sandbox.Blobs {
	return imageBlobs{a, img}
}

type imageBlobs struct {
	agent *Agent
	image *contract.Image
}

// Open implements sandbox.Blobs.
func (b imageBlobs) Open(ctx context.Context, digest string) (io.ReadCloser, error) {
	i := slices.IndexFunc(b.image.Blobs, func(x contract.Blob) bool { return x.Digest == digest })
	if i < 0 {
		return nil, fmt.Errorf("blob %s is not part of the contract", digest)
	}
	blob := &b.image.Blobs[i]
	r, err := b.agent.fetch(ctx, blob.Sealed)
	if err != nil {
		return nil, fmt.Errorf("blob %s: %w", digest, err)
	}
	plain, err := seal.NewReader(r, blob.Key)
	if err != nil {
		r.Close()
		return nil, fmt.Errorf("blob %s: %w", digest, err)
	}
	return struct {
		io.Reader
		io.Closer
	}{plain, r}, nil
}

// keep leaves the workloads of a contract whose revision cannot be opened as they are: those that this agent knows, and
// those that one before it has left running.
func (a *Agent) keep(v *View, c *ContractView, s *specs, adopted map[contract.WorkloadID]*Workload, why error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, n := range c.Networks {
		s.kept[meshName(n)] = true
	}
	for _, as := range c.Assignments {
		if as.Node != a.cfg.Keys.ID || !c.has(&as) {
			continue
		}
		w := &Workload{
			ID: as.Workload, Contract: c.Record.ID, Service: as.Service, Replica: as.Replica, Epoch: as.Epoch,
			Revision: c.Header.Revision, Fenced: as.Fenced, Process: &contract.Process{}, Keep: public(why),
		}
		if old := a.wanted[as.Workload]; old != nil && old.Epoch == as.Epoch {
			same := *old
			w = &same
		} else if old := adopted[as.Workload]; old != nil && old.Epoch == as.Epoch {
			same := *old
			same.Keep, same.Fenced = public(why), as.Fenced
			w = &same
		}
		w.Held = held(v, &as)
		s.workloads[w.ID] = w
	}
}

// held says why the ledger does not want an assigned workload to run now, or "".
func held(v *View, as *ledger.Assignment) string {
	if as.Reason != "" && !v.Self.Up {
		// A node that is back finds its volume's workload held until the ledger has seen it up.
		return "the ledger has not heard this node for a lease"
	}
	return as.Reason
}

// workloads are those of one contract that are assigned here.
func workloads(v *View, c *ContractView, o *opened, ms []Mesh) []*Workload {
	var out []*Workload
	for _, as := range c.Assignments {
		if as.Node != v.Self.ID || !c.has(&as) {
			continue
		}
		i := slices.IndexFunc(c.Header.Services, func(s contract.Service) bool { return s.Name == as.Service })
		if i < 0 {
			continue
		}
		s, p := &c.Header.Services[i], &o.body.Services[i]
		w := &Workload{
			ID: as.Workload, Contract: c.Record.ID, Name: fmt.Sprintf("%s/%s-%d", c.Record.Name, as.Service, as.Replica),
			Service: as.Service, Replica: as.Replica, Epoch: as.Epoch, Revision: c.Header.Revision, Fenced: as.Fenced,
			Process: p, Limits: *s, Held: held(v, &as), Barred: o.bars[as.Service], Old: as.Old, Trial: trialOf(c, &as, s),
		}
		for _, name := range s.Volumes {
			if rec := c.Volumes[name]; rec != nil {
				v := WorkVolume{ID: rec.ID, Name: name, Size: int64(rec.Size), Created: rec.Created, Restore: rec.Restore(), Key: o.keys.Volumes[name], Sequence: rec.Sequence, Snapshot: rec.Snapshot, From: rec.From}
				if slices.ContainsFunc(c.Header.Volumes, func(x contract.Volume) bool { return x.Name == name && x.Store != contract.Store{} }) {
					v.Store = o.keys.VolumeStore(name)
				}
				w.Volumes = append(w.Volumes, v)
			}
		}
		if len(s.Networks) > 0 {
			id := contract.NetworkOf(c.Record.ID, s.Networks[0])
			for j := range ms {
				if ms[j].Network == [32]byte(id) {
					w.Network, w.Resolver, w.Address = ms[j].Name, ms[j].Self, overlay.Addr(id, as.Workload)
				}
			}
		}
		w.Instance = instance(w)
		out = append(out, w)
	}
	return out
}

// instance names the sandbox of a workload. Everything that a running sandbox cannot change is in the name.
func instance(w *Workload) string {
	type part struct {
		Process *contract.Process `cbor:"1,keyasint"`
		Limits  contract.Service  `cbor:"2,keyasint"`
		Address []byte            `cbor:"3,keyasint"`
	}
	p := *w.Process
	p.DependsOn, p.Egress = nil, nil // need no restart
	l := w.Limits
	l.Replicas, l.Placement, l.Egress, l.Update = 0, contract.Placement{}, false, contract.Update{}
	d := canonical.Digest("holdfast/instance/v1", canonical.Encode(part{&p, l, w.Address.AsSlice()}))
	return fmt.Sprintf("%x-%d-%x", w.ID[:6], w.Epoch, d[:4])
}

func egressRules(p *contract.Process) []overlay.Egress {
	var out []overlay.Egress
	for _, e := range p.Egress {
		if pre, err := netip.ParsePrefix(e.Prefix); err == nil {
			out = append(out, overlay.Egress{Prefix: pre, Proto: e.Proto, Port: e.Port})
		}
	}
	return out
}

// handOn seals the keys for eligible nodes that have no envelope yet, so that the ledger can move work to them while
// the owner sleeps.
func (a *Agent) handOn(ctx context.Context, c *ContractView, keys *contract.Keys) error {
	var es []contract.Envelope
	for _, n := range c.Missing {
		if len(es) == 16 {
			break // the rest follows with the next view
		}
		e, err := contract.SealEnvelope(c.Revision, contract.RecipientNode, n.ID, &n.Sealing, keys)
		if err != nil {
			return err
		}
		es = append(es, *e)
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	return a.act(ctx, ledger.KindEnvelopePut, &ledger.EnvelopePut{Envelopes: es})
}

func (a *Agent) volumeCreated(ctx context.Context, id contract.VolumeID) error {
	rec, err := api.Get[ledger.Volume](ctx, a.client, ledger.VolumeKey(id))
	if err != nil {
		return err
	}
	if rec.Created {
		return nil
	}
	return a.act(ctx, ledger.KindVolumeCreated, &ledger.VolumeCreated{Volume: id})
}

func (a *Agent) act(ctx context.Context, kind ledger.Kind, payload any) error {
	a.nonce.Lock()
	defer a.nonce.Unlock()
	_, err := a.client.Act(ctx, kind, ledger.Actor{Node: true, ID: a.cfg.Keys.ID}, payload, a.cfg.Keys.Sign)
	return err
}

// prune frees the memory that layers of images take which nothing here uses, if that was last done so long ago.
func (a *Agent) prune(ctx context.Context, every time.Duration) error {
	// While one unpacks, its first layers are nobody's yet.
	if !a.unpacking.TryLock() {
		return nil
	}
	defer a.unpacking.Unlock()
	var keep []sandbox.Image
	a.mu.Lock()
	if time.Since(a.pruned) < every {
		a.mu.Unlock()
		return nil
	}
	a.pruned = time.Now()
	for _, c := range a.control {
		if img, ok := c.inUse(); ok {
			keep = append(keep, img)
		}
	}
	a.mu.Unlock()
	return a.runner.Prune(ctx, keep)
}

// setMeshes starts, changes and ends overlay networks.
func (a *Agent) setMeshes(s *specs) error {
	var errs []error
	names, egress := maps.Clone(s.kept), s.egress
	for i := range s.meshes {
		m := &s.meshes[i]
		names[m.Name] = true
		a.mu.Lock()
		run := a.meshes[m.Name]
		a.mu.Unlock()
		if run == nil {
			n, err := overlay.New(overlay.Config{
				Network: m.Network, Name: m.Name, Port: m.Port, PrivateKey: a.cfg.Keys.WireGuard, Self: m.Self,
				Dir: a.netDir(), InMain: m.Name == systemName, Log: a.log,
			})
			if err != nil {
				errs = append(errs, err)
				continue
			}
			ctx, cancel := context.WithCancel(a.groupCtx)
			run = &mesh{n, cancel, make(chan struct{})}
			errs = append(errs, set(n, m, egress[m.Name]))
			a.group.Go(func() error { a.runMesh(ctx, m.Name, run); return nil })
			a.mu.Lock()
			a.meshes[m.Name] = run
			a.mu.Unlock()
			continue
		}
		errs = append(errs, set(run.net, m, egress[m.Name]))
	}
	a.mu.Lock()
	var gone []string
	for name := range a.meshes {
		if !names[name] && !a.inUse(name) {
			gone = append(gone, name)
		}
	}
	a.mu.Unlock()
	left, err := overlay.List(a.netDir())
	if err != nil {
		errs = append(errs, err)
	}
	for _, name := range left { // of an agent before this one
		if !names[name] && !slices.Contains(gone, name) && !a.networkUsed(name) {
			gone = append(gone, name)
		}
	}
	for _, name := range gone {
		a.mu.Lock()
		run := a.meshes[name]
		delete(a.meshes, name)
		a.mu.Unlock()
		if run != nil {
			run.cancel()
			<-run.done
		}
		if err := overlay.Destroy(a.groupCtx, a.netDir(), name); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func set(n *overlay.Network, m *Mesh, egress map[netip.Addr][]overlay.Egress) error {
	n.SetNames(m.Names)
	return errors.Join(n.SetPeers(m.Peers, m.Own...), n.SetEgress(egress))
}

func (a *Agent) netDir() string { return filepath.Join(a.cfg.Run, "net") }

// inUse reports whether a workload that is still being ended is on the network. a.mu is held.
func (a *Agent) inUse(name string) bool {
	for _, w := range a.releases {
		if w.Network == name {
			return true
		}
	}
	return false
}

func (a *Agent) networkUsed(name string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.inUse(name) || a.meshes[name] != nil
}

func (a *Agent) runMesh(ctx context.Context, name string, m *mesh) {
	defer close(m.done)
	for wait := 100 * time.Millisecond; ctx.Err() == nil; wait = min(2*wait, 5*time.Second) {
		err := m.net.Run(ctx)
		if ctx.Err() != nil {
			return
		}
		a.log.Warn("network ended, starting it again", "network", name, "error", err)
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
}

func (a *Agent) network(name string) *overlay.Network {
	a.mu.Lock()
	defer a.mu.Unlock()
	if m := a.meshes[name]; m != nil {
		return m.net
	}
	return nil
}

// setWorkloads gives every workload its controller and every controller its Spec.
func (a *Agent) setWorkloads(want, adopted map[contract.WorkloadID]*Workload) {
	a.mu.Lock()
	defer a.mu.Unlock()
	// Sandboxes of an agent before this one, whose workload is no longer here, need a controller that ends them and what
	// is around them.
	for id, w := range adopted {
		if _, ok := want[id]; !ok {
			want[id] = nil
		}
		if a.releases[id] == nil {
			a.releases[id] = w
		}
	}
	for id := range a.control {
		if _, ok := want[id]; !ok {
			want[id] = nil
		}
	}
	for id, w := range want {
		c := a.control[id]
		if c == nil {
			c = a.newController(id)
			a.control[id] = c
			ctx, cancel := context.WithCancel(a.groupCtx)
			c.done = cancel
			a.group.Go(func() error { defer cancel(); c.loop.Run(ctx); return nil })
		}
		if w != nil {
			a.releases[id] = w
		}
		c.set(w)
	}
	maps.DeleteFunc(want, func(_ contract.WorkloadID, w *Workload) bool { return w == nil })
	a.wanted, a.placed = want, true
}

// forget ends the controller of a workload of which nothing is left here, unless it has come back.
func (a *Agent) forget(c *controller) {
	a.mu.Lock()
	defer a.mu.Unlock()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.want == nil && a.control[c.id] == c && a.releases[c.id] == nil {
		delete(a.control, c.id)
		c.done()
	}
}

// sweep closes the volumes and detaches from the networks what belongs to no workload here: an agent that was killed
// between opening them and starting the sandbox has left them, and the workload did not come back to it.
func (a *Agent) sweep(ctx context.Context) error {
	open, err := a.volumes.List(ctx)
	if err != nil {
		return err
	}
	all, err := a.runner.List(ctx)
	if err != nil {
		return err
	}
	volumes, places := map[string]bool{}, map[string]bool{}
	uses := func(w *Workload) {
		places[attachmentID(w.ID)] = true
		for _, v := range w.Volumes {
			volumes[volumeName(v.ID)] = true
		}
	}
	for i := range all { // one of an old revision may use what the new one does not
		if w := adopt(&all[i]); w != nil {
			uses(w)
		}
	}
	a.mu.Lock()
	for _, w := range a.releases {
		uses(w)
	}
	nets := map[string]*overlay.Network{}
	for name, m := range a.meshes {
		nets[name] = m.net
	}
	a.mu.Unlock()
	var errs []error
	for _, v := range open {
		if !volumes[v.ID] {
			a.log.Info("closing a volume that no workload uses", "volume", v.ID)
			errs = append(errs, a.volumes.Close(ctx, v.ID))
		}
	}
	for _, n := range nets {
		list, err := n.Attachments()
		errs = append(errs, err)
		for _, at := range list {
			if !places[at.ID] {
				errs = append(errs, n.Detach(ctx, at.ID))
			}
		}
	}
	errs = append(errs, a.bury(ctx, a.client, volumes, time.Minute))
	return errors.Join(errs...)
}

// release undoes what start did around the sandbox: network and volumes. w is the Spec that keeps the workload here
// without running, or nil when it has gone.
func (a *Agent) release(ctx context.Context, id contract.WorkloadID, w *Workload) error {
	a.mu.Lock()
	last := a.releases[id]
	a.mu.Unlock()
	if last == nil {
		return nil
	}
	if net := a.network(last.Network); net != nil {
		if err := net.Detach(ctx, attachmentID(id)); err != nil {
			return err
		}
	}
	for _, v := range last.Volumes {
		a.savers.finish(ctx, v.ID, a.lease.ok())
		if err := a.volumes.Close(ctx, volumeName(v.ID)); err != nil {
			return err
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.wanted[id] == nil {
		delete(a.releases, id)
		a.view.Wake() // its network may go now
	}
	return nil
}

// waitsFor says which dependency of w is not met, or "".
func (a *Agent) waitsFor(ctx context.Context, w *Workload) string {
	if len(w.Process.DependsOn) == 0 {
		return ""
	}
	reports := a.reportsOf(ctx, w)
	for _, d := range w.Process.DependsOn {
		ok := slices.ContainsFunc(reports, func(r ledger.Report) bool {
			if r.Service != d.Service || r.Revision != w.Revision && !w.Old {
				return false
			}
			switch d.Condition {
			case contract.Healthy:
				return r.State == ledger.StateRunning && r.Healthy
			case contract.Completed:
				return r.State == ledger.StateExited && r.ExitCode == 0
			default:
				return r.State == ledger.StateRunning || r.State == ledger.StateStarting || r.State == ledger.StateExited
			}
		})
		if !ok {
			return fmt.Sprintf("%s: %s", d.Service, d.Condition)
		}
	}
	return ""
}

// reportsOf are the reports of all workloads of w's contract: the own ones, and those that other nodes signed.
func (a *Agent) reportsOf(ctx context.Context, w *Workload) []ledger.Report {
	var out []ledger.Report
	for _, r := range a.reports() {
		if r.Contract == w.Contract {
			out = append(out, r)
		}
	}
	a.mu.Lock()
	v := a.current
	a.mu.Unlock()
	if v == nil {
		return out
	}
	c := a.contract(w.Contract)
	beats, err := a.client.Reports(ctx, v.Nodes)
	if err != nil {
		return out // the next try comes soon
	}
	for _, h := range beats {
		i := slices.IndexFunc(v.Nodes, func(n *ledger.Node) bool { return n.ID == h.Node })
		if h.Node == a.cfg.Keys.ID || i < 0 || !v.Nodes[i].Up {
			continue
		}
		for _, r := range h.Workloads {
			if r.Contract == w.Contract && c != nil && assignedTo(c, h.Node, &r) {
				out = append(out, r)
			}
		}
	}
	return out
}

// assignedTo reports whether a node may speak of a workload: only of one that the ledger gave it, in that epoch, by its
// name. Another node's word on a dependency would start what must wait.
func assignedTo(c *ContractView, node identity.NodeID, r *ledger.Report) bool {
	return slices.ContainsFunc(c.Assignments, func(a ledger.Assignment) bool {
		return a.Workload == r.Workload && a.Node == node && a.Epoch == r.Epoch && a.Service == r.Service && a.Replica == r.Replica
	})
}

// setEdges tells the Origin which gateways to dial.
func (a *Agent) setEdges(v *View) {
	var edges []gateway.EdgeInfo
	for _, g := range v.Gateways {
		edges = append(edges, gateway.EdgeInfo{Addr: g.Address, SPKI: gateway.SPKI(g.ID), TunnelName: TunnelName(v.Grid)})
	}
	a.origin.SetEdges(edges)
}

// setServices tells the Origin what to serve: the hosts whose workload runs here, and the node's own log service.
func (a *Agent) setServices() {
	a.mu.Lock()
	v := a.current
	if v == nil {
		a.mu.Unlock()
		return
	}
	services := []gateway.Service{{Host: ServiceName(a.cfg.Keys.ID), TLS: a.ownTLS, Handler: a.handler}}
	for _, c := range v.Contracts {
		o := a.bodies[c.Revision]
		if o == nil {
			continue
		}
		for _, r := range c.Header.Routes {
			for id, w := range a.wanted {
				ctl := a.control[id]
				if w.Contract != c.Record.ID || w.Old != c.Old || w.Service != r.Service || ctl == nil {
					continue
				}
				if _, serving := ctl.status(); !serving {
					continue
				}
				cert, err := o.certificate(r.Host)
				if err != nil {
					a.log.Warn("route is not served", "host", r.Host, "error", err)
					continue
				}
				target := netip.AddrPortFrom(w.Address, r.Port)
				name := w.Network
				services = append(services, gateway.Service{
					Host: r.Host, Workload: gateway.WorkloadID(w.ID), Epoch: w.Epoch, TLS: cert,
					Dial: func(ctx context.Context) (net.Conn, error) { return a.dial(ctx, name, target) },
				})
			}
		}
	}
	a.mu.Unlock()
	if err := a.origin.SetServices(services); err != nil {
		a.log.Warn("services", "error", err)
	}
}

// dial connects to a workload from inside its network. A workload that has just started may not listen yet: refused
// connections are tried again for a moment.
func (a *Agent) dial(ctx context.Context, network string, to netip.AddrPort) (net.Conn, error) {
	var err error
	for range 20 {
		n := a.network(network)
		if n == nil {
			return nil, fmt.Errorf("network %s is not up", network)
		}
		var c net.Conn
		if c, err = n.Dial(ctx, to); err == nil {
			return c, nil
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
	return nil, err
}

// certificate is the TLS configuration of a host, made once: the Origin compares it to see whether anything changed.
func (o *opened) certificate(host string) (*tls.Config, error) {
	if c := o.certs[host]; c != nil {
		return c, nil
	}
	for i := range o.body.Certificates {
		c := &o.body.Certificates[i]
		if c.Host != host {
			continue
		}
		key, err := x509.ParsePKCS8PrivateKey(c.Key)
		if err != nil {
			return nil, fmt.Errorf("certificate key for %q: %w", host, err)
		}
		o.certs[host] = &tls.Config{Certificates: []tls.Certificate{{Certificate: c.Chain, PrivateKey: key}}, MinVersion: tls.VersionTLS12}
		return o.certs[host], nil
	}
	return nil, fmt.Errorf("no certificate for %q in the contract", host)
}

var _ http.Handler = (*logService)(nil)

// stopGrace bounds the graces of all when the machine goes down.
const stopGrace = 15 * time.Second

// Stop ends every workload as its contract asks, and closes the volumes, before the machine goes down. Run must have
// returned.
func (a *Agent) Stop(ctx context.Context) error {
	all, err := a.runner.List(ctx)
	if err != nil {
		return err
	}
	// A grace may be longer than the machine has: the volumes must still be closed in order.
	grace, cancel := context.WithTimeout(ctx, stopGrace)
	defer cancel()
	var g errgroup.Group
	for _, s := range all {
		g.Go(func() error {
			if err := a.runner.Stop(grace, s.ID); err == nil || ctx.Err() != nil {
				return err
			}
			return a.runner.Kill(ctx, s.ID)
		})
	}
	errs := []error{g.Wait(), a.fronts.stopAll(grace)}
	open, err := a.volumes.List(ctx)
	if err != nil {
		return errors.Join(append(errs, err)...)
	}
	for _, v := range open {
		errs = append(errs, a.volumes.Close(ctx, v.ID))
	}
	return errors.Join(errs...)
}
