package node

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"holdfast/contract"
	"holdfast/ledger"
	"holdfast/overlay"
	"holdfast/reconcile"
	"holdfast/sandbox"
	"holdfast/seal"
	"holdfast/store"
	"holdfast/volume"

	"golang.org/x/sys/unix"
)

// Workload is one workload as this node should have it: the Spec of its controller.
type Workload struct {
	ID       contract.WorkloadID
	Contract contract.ID
	Name     string // contract/service-replica, for people
	Service  string
	Replica  uint16
	Epoch    uint64
	Revision uint32
	Old      bool   // it is of the revision before, and will be replaced
	Trial    *Trial // nil: the ledger does not wait to hear of it
	Fenced   bool
	Held     string // why the ledger says that it does not run now; "" runs
	Barred   *bar   // why no start of it is within the bounds of its account's policy; what runs goes on. nil: it may start
	Keep     string // why no more is known of it than what runs, which goes on and is not started again; "" all is known
	Process  *contract.Process
	Limits   contract.Service
	Volumes  []WorkVolume
	Network  string // Mesh.Name
	Address  netip.Addr
	Resolver netip.Addr
	Instance string // sandbox ID: changes when anything that needs a restart does
}

// WorkVolume is a volume of a workload.
type WorkVolume struct {
	ID      contract.VolumeID
	Name    string
	Size    int64
	Created bool // its disk exists
	Restore bool // its disk is to be made from a snapshot
	Key     [32]byte

	Store    [32]byte // what the store of its snapshots derives from; zero: it has none
	Sequence uint64   // of the newest snapshot that the ledger knows of; 0: of none
	Snapshot [32]byte // its digest
	From     [32]byte // digest of the snapshot that it is to be restored from; zero: the newest
}

// observed is what the pure decision needs to know.
type observed struct {
	instances  map[string]sandbox.Status // of this workload, by sandbox ID
	leaseOK    bool
	volumeLost bool   // the server of one of its volumes is gone
	dependency string // what it waits for; "" for nothing
	restarts   uint32
	unhealthy  bool // the health check failed often enough
	now        time.Time
}

// step is what to do next with a workload.
type step struct {
	stop    []string // sandboxes to end and clean
	start   bool
	restart bool // start after an exit: counts
	again   time.Duration
	state   string
	reason  string
}

// decide compares. It is pure.
func decide(w *Workload, o observed) step {
	var s step
	for id := range o.instances {
		if w == nil || id != w.Instance {
			s.stop = append(s.stop, id)
		}
	}
	slices.Sort(s.stop)
	if w == nil {
		return s
	}
	cur, have := o.instances[w.Instance]
	switch {
	case w.Held != "":
		if have {
			s.stop = append(s.stop, w.Instance)
		}
		s.state, s.reason = ledger.StateWaiting, w.Held
	case w.Fenced && !o.leaseOK:
		if have {
			s.stop = append(s.stop, w.Instance)
		}
		s.state, s.reason, s.again = ledger.StateWaiting, "no lease: the ledger does not hear this node", 500*time.Millisecond
	case w.Keep != "" && (!have || cur.State != sandbox.Running):
		s.state, s.reason = ledger.StateWaiting, w.Keep
	case have && cur.State == sandbox.Running && o.volumeLost && w.Keep == "":
		s.stop = append(s.stop, w.Instance)
		s.state, s.reason, s.start, s.restart = ledger.StateFailed, "its volume failed", true, true
	case have && cur.State == sandbox.Running && o.unhealthy && w.Barred == nil: // else its end would be for good
		s.stop = append(s.stop, w.Instance)
		s.state, s.reason, s.start, s.restart = ledger.StateFailed, "health check failed", true, true
	case have && cur.State == sandbox.Running:
		s.state = ledger.StateRunning
	case have:
		s.reason = ending(&cur)
		if !broken(&cur) && !again(w.Process.Restart, cur.ExitCode, o.restarts, w.Process.MaxRetries) {
			s.state = ledger.StateExited
			break
		}
		s.state = ledger.StateFailed
		if wait := backoff(o.restarts, cur.FinishedAt.Sub(cur.StartedAt)) - o.now.Sub(cur.FinishedAt); wait > 0 {
			s.again = wait
			break
		}
		s.stop, s.start, s.restart = append(s.stop, w.Instance), true, true
	case o.dependency != "" && w.Barred == nil:
		s.state, s.reason, s.again = ledger.StateWaiting, "a dependency is not met", 300*time.Millisecond
	default:
		s.state, s.start = ledger.StateStarting, true
	}
	switch {
	case w.Barred == nil:
	case s.state == ledger.StateRunning:
		s.reason = "it is not started again: " + w.Barred.words
	case s.start:
		s.start, s.restart, s.state, s.reason = false, false, ledger.StateWaiting, w.Barred.words
		// What nothing takes the place of goes on, be it of the revision before.
		s.stop = slices.DeleteFunc(s.stop, func(id string) bool {
			st := o.instances[id]
			old := adopt(&st)
			return id == w.Instance && !o.volumeLost || id != w.Instance && st.State == sandbox.Running && old != nil && old.Epoch == w.Epoch
		})
	}
	return s
}

// ending says in fixed words why a sandbox ended. What runsc says quotes the image and the command.
func ending(s *sandbox.Status) string {
	switch {
	case s.OOM:
		return sandbox.ReasonMemory
	case s.Reason == sandbox.ReasonLease, s.Reason == sandbox.ReasonShim, s.Reason == sandbox.ReasonStopped, s.Reason == reasonTaken:
		return s.Reason
	case s.StartedAt.IsZero():
		return notStarted
	}
	return fmt.Sprintf("exit code %d", s.ExitCode)
}

// broken reports whether it was not the process's own end: its restart policy has no say in that.
func broken(s *sandbox.Status) bool {
	return s.Reason == sandbox.ReasonLease || s.Reason == sandbox.ReasonShim
}

// urgent reports whether a sandbox has no right to its grace: its workload was cancelled or is another node's, or another
// epoch's, or may be soon.
func urgent(w *Workload, s *sandbox.Status, leaseOK bool) bool {
	if w == nil || (w.Fenced && !leaseOK) {
		return true
	}
	old := adopt(s)
	return old == nil || old.Epoch < w.Epoch
}

// again says whether a process that ended is started again.
func again(policy string, code int, restarts, limit uint32) bool {
	switch policy {
	case "no":
		return false
	case "on-failure":
		return code != 0 && (limit == 0 || restarts < limit)
	default: // "always", "unless-stopped": nobody stops a single workload here
		return true
	}
}

// backoff is the wait before a restart: at once for what ran for a while, growing for what dies young.
func backoff(restarts uint32, ran time.Duration) time.Duration {
	if ran > 10*time.Second || restarts == 0 {
		return 0
	}
	return min(250*time.Millisecond<<min(restarts-1, 7), 30*time.Second)
}

// controller keeps one workload as it should be.
type controller struct {
	agent *Agent
	id    contract.WorkloadID
	loop  *reconcile.Loop
	log   *slog.Logger

	mu      sync.Mutex
	want    *Workload
	report  ledger.Report
	serving bool // routes may lead here

	image   sandbox.Image
	imageOf string          // manifest that image was unpacked from
	hurry   func(*Workload) // while a sandbox uses its grace: tells that something else is wanted

	done context.CancelFunc // ends loop

	// Only the loop's goroutine touches these.
	restarts uint32
	health   *prober
	noted    string // what the log was told last
	watch    watch
}

func (a *Agent) newController(id contract.WorkloadID) *controller {
	c := &controller{agent: a, id: id, log: a.log.With("workload", id.Short())}
	c.loop = reconcile.New(reconcile.Config{Name: "workload " + id.Short(), Resync: 5 * time.Second, Max: 5 * time.Second, Log: c.log, Step: c.step})
	return c
}

func (c *controller) set(w *Workload) {
	c.mu.Lock()
	c.want = w
	if c.hurry != nil {
		c.hurry(w)
	}
	c.mu.Unlock()
	c.loop.Wake()
}

func (c *controller) status() (ledger.Report, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.report, c.serving
}

// Labels of a sandbox: its workload, and as JSON what a restarted agent must know of it without the ledger and the body.
const (
	label     = "workload"
	specLabel = "spec"
)

// labelled is what is in specLabel.
type labelled struct {
	Contract contract.ID
	Name     string
	Service  string
	Replica  uint16
	Epoch    uint64
	Revision uint32
	Fenced   bool
	Network  string
	Volumes  []contract.VolumeID
}

func labels(w *Workload) map[string]string {
	l := labelled{w.Contract, w.Name, w.Service, w.Replica, w.Epoch, w.Revision, w.Fenced, w.Network, nil}
	for _, v := range w.Volumes {
		l.Volumes = append(l.Volumes, v.ID)
	}
	b, err := json.Marshal(l)
	if err != nil {
		panic(err) // texts and numbers
	}
	return map[string]string{label: w.ID.String(), specLabel: string(b)}
}

// adopt is the Workload that a sandbox was started for, as far as its labels tell; nil when they tell nothing.
func adopt(s *sandbox.Status) *Workload {
	id, err := contract.ParseWorkloadID(s.Labels[label])
	if err != nil {
		return nil
	}
	var l labelled
	if err := json.Unmarshal([]byte(s.Labels[specLabel]), &l); err != nil {
		return nil
	}
	w := &Workload{
		ID: id, Contract: l.Contract, Name: l.Name, Service: l.Service, Replica: l.Replica, Epoch: l.Epoch, Revision: l.Revision,
		Fenced: l.Fenced, Network: l.Network, Process: &contract.Process{}, Instance: s.ID,
	}
	for _, v := range l.Volumes {
		w.Volumes = append(w.Volumes, WorkVolume{ID: v, Created: true})
	}
	return w
}

// adoptable are the workloads of the sandboxes that are here. Of several of one workload it is the one that runs, in the
// newest epoch, started last.
func adoptable(all []sandbox.Status) map[contract.WorkloadID]*Workload {
	out, best := map[contract.WorkloadID]*Workload{}, map[contract.WorkloadID]*sandbox.Status{}
	for i := range all {
		s := &all[i]
		w := adopt(s)
		if w == nil {
			continue
		}
		if b := best[w.ID]; b != nil {
			worse := cmp.Or(
				cmp.Compare(running(s), running(b)), cmp.Compare(w.Epoch, out[w.ID].Epoch), s.StartedAt.Compare(b.StartedAt),
			) < 0
			if worse {
				continue
			}
		}
		out[w.ID], best[w.ID] = w, s
	}
	return out
}

func running(s *sandbox.Status) int {
	if s.State == sandbox.Running {
		return 1
	}
	return 0
}

func (c *controller) step(ctx context.Context) (time.Duration, error) {
	c.mu.Lock()
	w := c.want
	c.mu.Unlock()
	again, err := c.keep(ctx, w)
	look, err2 := c.observe(ctx, w, err)
	if look > 0 && (again == 0 || look < again) {
		again = look
	}
	return again, errors.Join(err, err2)
}

// keep does what is next for w.
func (c *controller) keep(ctx context.Context, w *Workload) (time.Duration, error) {
	all, err := c.agent.runner.List(ctx)
	if err != nil {
		return 0, err
	}
	o := observed{instances: map[string]sandbox.Status{}, leaseOK: c.agent.lease.ok(), restarts: c.restarts, now: time.Now()}
	for _, s := range append(all, c.agent.fronts.list()...) {
		if s.Labels[label] == c.id.String() {
			o.instances[s.ID] = s
		}
	}
	if w != nil {
		if _, have := o.instances[w.Instance]; !have && w.Held == "" {
			o.dependency = c.agent.waitsFor(ctx, w)
		}
		if cur, have := o.instances[w.Instance]; have {
			o.volumeLost = c.lost(&cur)
		}
		if c.health != nil && c.health.instance == w.Instance {
			o.unhealthy = c.health.failed()
		}
	}
	s := decide(w, o)
	if o.dependency != "" && s.state == ledger.StateWaiting {
		c.note(w, "waits for "+o.dependency)
	}
	if w != nil && w.Barred != nil && s.state == ledger.StateWaiting && s.reason == w.Barred.words {
		c.note(w, w.Barred.detail)
	}
	if s.start && w != nil {
		// What takes long and disturbs nobody comes before the stop of what runs.
		if err := c.prepare(ctx, w); err != nil {
			c.note(w, detail(err))
			c.say(w, ledger.StateWaiting, public(err), false)
			return 0, err
		}
	}
	for _, id := range s.stop {
		c.stopHealth()
		c.say(w, s.state, s.reason, false)
		st := o.instances[id]
		if err := c.end(ctx, &st, urgent(w, &st, o.leaseOK) || c.lost(&st)); err != nil {
			return 0, err
		}
		c.log.Info("stopped", "instance", id, "reason", s.reason)
	}
	if w == nil || w.Held != "" || (w.Fenced && !o.leaseOK) {
		c.stopHealth()
		if w != nil {
			c.say(w, s.state, s.reason, false)
		}
		if err := c.agent.release(ctx, c.id, w); err != nil {
			return 0, err
		}
		if w == nil {
			c.agent.forget(c)
		}
		return s.again, nil
	}
	if s.start {
		if s.restart {
			c.restarts++
		}
		if err := c.start(ctx, w); err != nil {
			c.note(w, detail(err))
			c.say(w, ledger.StateFailed, public(err), false)
			return 0, err
		}
		c.log.Info("started", "name", w.Name, "instance", w.Instance, "epoch", w.Epoch)
		s.state, s.reason = ledger.StateRunning, ""
	}
	if s.state == ledger.StateRunning && w.Keep == "" {
		for i := range w.Volumes {
			v := w.Volumes[i]
			v.Restore = false // it runs
			c.agent.savers.begin(&v, w.Epoch)
		}
	}
	healthy := false
	if s.state == ledger.StateRunning && w.Process.Health != nil {
		if c.health == nil || c.health.instance != w.Instance {
			c.stopHealth()
			c.health = c.startProber(ctx, w)
		}
		if healthy = c.health.passed(); !healthy {
			s.state, s.reason = ledger.StateStarting, "health check has not passed yet"
		}
	}
	if cur, ok := o.instances[w.Instance]; ok && cur.State != sandbox.Running && !s.start {
		if cur.Reason != "" && cur.Reason != s.reason {
			c.note(w, cur.Reason)
		}
		c.sayExit(w, s.state, s.reason, cur.ExitCode)
		return s.again, nil
	}
	c.say(w, s.state, s.reason, healthy)
	return s.again, nil
}

// lost reports whether a sandbox has a volume whose server is gone: it can neither go on nor end in an orderly way.
func (c *controller) lost(s *sandbox.Status) bool {
	w := adopt(s)
	return w != nil && slices.ContainsFunc(w.Volumes, func(v WorkVolume) bool { return !c.agent.volumes.Serving(volumeName(v.ID)) })
}

// restored waits until a volume's disk is made from its snapshots, unless something else is wanted meanwhile.
func (c *controller) restored(ctx context.Context, w *Workload, v *WorkVolume) error {
	c.say(w, ledger.StateStarting, "its volume is restored", false)
	ctx, done := c.unless(ctx, func(now *Workload) bool { return now == nil || now.Epoch != w.Epoch || now.Held != "" })
	defer done()
	c.agent.savers.leave(ctx, v.ID, w.Epoch)
	x := c.agent.savers.begin(v, w.Epoch)
	if x == nil {
		return &failure{notRestored, errors.New("it has no store")}
	}
	return x.waitReady(ctx)
}

// unless is a context that ends too when another Spec comes that ends it.
func (c *controller) unless(ctx context.Context, ends func(*Workload) bool) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	hurry := func(w *Workload) {
		if ends(w) {
			cancel()
		}
	}
	c.mu.Lock()
	c.hurry = hurry
	hurry(c.want)
	c.mu.Unlock()
	return ctx, func() {
		c.mu.Lock()
		c.hurry = nil
		c.mu.Unlock()
		cancel()
	}
}

// end ends one sandbox. A cancellation or a move that comes meanwhile cuts its grace short.
func (c *controller) end(ctx context.Context, s *sandbox.Status, now bool) error {
	if c.agent.fronts.has(s.ID) {
		return c.agent.fronts.stop(ctx, s.ID, now)
	}
	if now {
		return c.agent.runner.Kill(ctx, s.ID)
	}
	sctx, done := c.unless(ctx, func(w *Workload) bool { return urgent(w, s, true) })
	defer done()
	err := c.agent.runner.Stop(sctx, s.ID)
	if sctx.Err() != nil && ctx.Err() == nil {
		return c.agent.runner.Kill(ctx, s.ID)
	}
	return err
}

// note tells the workload's log, once, what its owner needs to know and nobody else may.
func (c *controller) note(w *Workload, text string) {
	if w == nil || w.Instance == "" || text == c.noted {
		return
	}
	c.noted = text
	if err := c.agent.runner.Note(w.Instance, text); err != nil {
		c.log.Warn("note in the log", "error", err)
	}
}

func (c *controller) say(w *Workload, state, reason string, healthy bool) {
	c.publish(w, state, reason, healthy, 0)
}

func (c *controller) sayExit(w *Workload, state, reason string, code int) {
	c.publish(w, state, reason, false, code)
}

func (c *controller) publish(w *Workload, state, reason string, healthy bool, code int) {
	if w == nil {
		return
	}
	reason = reason[:min(len(reason), ledger.MaxReason)]
	if state == ledger.StateFailed {
		c.watch.why = reason
	}
	r := ledger.Report{
		Workload: w.ID, Contract: w.Contract, Service: w.Service, Replica: w.Replica, Epoch: w.Epoch, Revision: w.Revision,
		State: state, Reason: strings.ToValidUTF8(reason, "?"), Restarts: c.restarts, Healthy: healthy, ExitCode: int32(code),
	}
	if len(w.Volumes) > 0 {
		r.Saved, r.Unsaved = c.agent.savers.saved(w.Volumes)
	}
	c.mu.Lock()
	changed := c.report != r
	c.report, c.serving = r, state == ledger.StateRunning
	c.mu.Unlock()
	if changed {
		c.agent.changed()
	}
}

// prepare fetches and unpacks the image. Every layer is verified; a mismatch is an error and nothing is started.
func (c *controller) prepare(ctx context.Context, w *Workload) error {
	if w.Process.FrontEnd != nil {
		return nil // it has none
	}
	if img, ok := c.inUse(); ok && img.Manifest == w.Process.Image.Manifest {
		return nil
	}
	err := c.unpack(ctx, w)
	if errors.Is(err, sandbox.ErrFull) || errors.Is(err, unix.ENOSPC) {
		// What nothing uses makes room for the next try.
		err = errors.Join(err, c.agent.prune(ctx, time.Second))
	}
	if err != nil {
		return &failure{imageWords(err), fmt.Errorf("image %s: %w", w.Process.Image.Reference, err)}
	}
	return nil
}

func (c *controller) unpack(ctx context.Context, w *Workload) error {
	c.agent.unpacking.RLock()
	defer c.agent.unpacking.RUnlock()
	img, err := c.agent.runner.Unpack(ctx, w.Contract.String(), c.agent.imageBlobs(&w.Process.Image), w.Process.Image.Manifest)
	if err != nil {
		return err
	}
	c.mu.Lock()
	c.image, c.imageOf = img, w.Process.Image.Manifest
	c.mu.Unlock()
	return nil
}

// inUse is the image that the workload runs or is about to run.
func (c *controller) inUse() (sandbox.Image, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.image, c.imageOf != "" && c.want != nil
}

// start opens volumes, joins the network and runs the sandbox. Each part is idempotent.
func (c *controller) start(ctx context.Context, w *Workload) error {
	if w.Process.FrontEnd != nil {
		return c.startFront(ctx, w)
	}
	spec := sandbox.Spec{
		ID: w.Instance, Image: c.image, Args: arguments(w.Process, c.image), Env: w.Process.Environment, Cwd: w.Process.WorkingDir,
		User: w.Process.User, Hostname: hostname(w), ReadOnly: w.Process.ReadOnly, CapAdd: w.Process.CapAdd, CapDrop: w.Process.CapDrop,
		CPUMilli: int64(w.Limits.CPUMilli), MemoryBytes: int64(w.Limits.Memory), Pids: int64(w.Limits.Pids),
		StopSignal: w.Process.StopSignal, StopGrace: w.Process.StopGrace, Fenced: w.Fenced,
		Labels: labels(w),
	}
	mounts := map[string]string{}
	for i := range w.Volumes {
		v := &w.Volumes[i]
		if v.Restore {
			if err := c.restored(ctx, w, v); err != nil {
				return err
			}
		}
		dir, err := c.agent.openVolume(ctx, v)
		if err != nil {
			return &failure{volumeWords(err), fmt.Errorf("volume %s: %w", v.Name, err)}
		}
		if !v.Created {
			// Before the first byte of data: from now on an absent disk is a loss, on the ledger.
			if err := c.agent.volumeCreated(ctx, v.ID); err != nil {
				return &failure{"the ledger does not take the volume yet", fmt.Errorf("volume %s: %w", v.Name, err)}
			}
		}
		mounts[v.Name] = dir
	}
	for _, m := range w.Process.Mounts {
		spec.Mounts = append(spec.Mounts, sandbox.Mount{Source: mounts[m.Volume], Target: m.Target, ReadOnly: m.ReadOnly})
	}
	for _, t := range w.Process.Tmpfs {
		spec.Mounts = append(spec.Mounts, sandbox.Mount{Tmpfs: true, Size: int64(t.Size), Target: t.Target})
	}
	for _, f := range w.Process.Files {
		spec.Files = append(spec.Files, sandbox.File{Path: f.Target, Mode: f.Mode, UID: int(f.UID), GID: int(f.GID), Data: f.Data})
	}
	spec.Files = append(spec.Files, nameFiles(w)...)
	net := c.agent.network(w.Network)
	if net == nil {
		return &failure{notUp, fmt.Errorf("network %s is not up yet", w.Network)}
	}
	// A sandbox takes the addresses of its namespace with it: every start needs a fresh one.
	err := net.Detach(ctx, attachmentID(w.ID))
	if err == nil {
		spec.NetNS, err = net.Attach(ctx, overlay.Attachment{ID: attachmentID(w.ID), Addr: w.Address})
	}
	if err != nil {
		return &failure{notUp, err}
	}
	if err := c.agent.runner.Start(ctx, spec); err != nil {
		return &failure{notStarted, err}
	}
	return nil
}

// failure is an error with two faces. words are fixed and go to the ledger's reports and the node's log, where everybody or
// the farm's owner reads them; detail may quote what is sealed, and goes to the workload's log, which is its owner's.
type failure struct {
	words  string
	detail error
}

func (f *failure) Error() string { return f.words }
func (f *failure) Unwrap() error { return f.detail }

// public is what a report says of an error: fixed words, whatever the error quotes.
func public(err error) string {
	var f *failure
	switch {
	case errors.As(err, &f):
		return f.words
	case errors.Is(err, errNoEnvelope):
		return errNoEnvelope.Error()
	case errors.Is(err, contract.ErrBody):
		return contract.ErrBody.Error()
	case errors.Is(err, errNoBody):
		return errNoBody.Error()
	}
	return "the contract cannot be opened"
}

// detail is all that is known of an error.
func detail(err error) string {
	var f *failure
	if errors.As(err, &f) {
		return f.words + ": " + f.detail.Error()
	}
	return err.Error()
}

const (
	imageRefused = "image refused: it is malformed, or has another digest"

	notStarted = "it could not be started: its log says why"
	notUp      = "its network is not up yet"
)

func imageWords(err error) string {
	switch {
	case errors.Is(err, sandbox.ErrImage), errors.Is(err, store.ErrDigest), errors.Is(err, seal.ErrSealed):
		return imageRefused
	case errors.Is(err, sandbox.ErrFull), errors.Is(err, unix.ENOSPC):
		return "no room for the image"
	}
	return "the image cannot be had"
}

func volumeWords(err error) string {
	for _, known := range []error{volume.ErrLost, volume.ErrKey, volume.ErrFormat} {
		if errors.Is(err, known) {
			return known.Error()
		}
	}
	return "its volume cannot be opened"
}

func volumeName(id contract.VolumeID) string     { return id.Short() + "-" + fmt.Sprintf("%x", id[:8]) }
func attachmentID(id contract.WorkloadID) string { return fmt.Sprintf("%x", id[:10]) }
func hostname(w *Workload) string {
	if w.Process.Hostname != "" {
		return w.Process.Hostname
	}
	return fmt.Sprintf("%s-%d", w.Service, w.Replica)
}

// arguments follows OCI and Compose: an entrypoint of the contract replaces the image's and drops its command.
func arguments(p *contract.Process, img sandbox.Image) []string {
	entry, cmd := img.Entrypoint, img.Cmd
	if p.Entrypoint != nil {
		entry, cmd = p.Entrypoint, nil
	}
	if p.Command != nil {
		cmd = p.Command
	}
	return slices.Concat(entry, cmd)
}

func nameFiles(w *Workload) []sandbox.File {
	host := hostname(w)
	return []sandbox.File{
		{Path: "/etc/resolv.conf", Mode: 0o644, Data: []byte("nameserver " + w.Resolver.String() + "\noptions ndots:0\n")},
		{Path: "/etc/hosts", Mode: 0o644, Data: []byte("127.0.0.1 localhost\n::1 localhost\n" + w.Address.String() + " " + host + "\n")},
		{Path: "/etc/hostname", Mode: 0o644, Data: []byte(host + "\n")},
	}
}

// prober runs a health check beside the loop.
type prober struct {
	instance string
	cancel   context.CancelFunc
	done     chan struct{}
	mu       sync.Mutex
	verdict
}

// verdict is what a row of health checks says. A check that fails counts if the one before that counted is an interval ago:
// until the first success checks run more often, so that one who starts fast is used soon, and one who starts slowly has
// the time that its contract gives it.
type verdict struct {
	ok       bool
	failures uint32
	retries  uint32
	interval time.Duration
	last     time.Time // when a check counted last; at first, the end of the start period
}

// add takes the result of one check.
func (v *verdict) add(now time.Time, passed bool) {
	switch {
	case passed:
		v.ok, v.failures, v.last = true, 0, now
	case now.Sub(v.last) >= v.interval:
		v.last = now
		if v.failures++; v.failures >= v.retries {
			v.ok = false
		}
	}
}

func (p *prober) passed() bool { p.mu.Lock(); defer p.mu.Unlock(); return p.ok }
func (p *prober) failed() bool { p.mu.Lock(); defer p.mu.Unlock(); return p.failures >= p.retries }

func (c *controller) stopHealth() {
	if c.health != nil {
		c.health.cancel()
		<-c.health.done
		c.health = nil
	}
}

// pace is how often a health check runs and how long it may. Each run costs work outside the workload's limits: no
// contract makes it run without a pause.
func pace(h *contract.Healthcheck) (interval, timeout time.Duration) {
	of := func(d time.Duration) time.Duration {
		if d <= 0 {
			return contract.DefaultInterval
		}
		return max(d, time.Second)
	}
	return of(h.Interval), of(h.Timeout)
}

// startProber probes often until the first success, then at the interval.
func (c *controller) startProber(ctx context.Context, w *Workload) *prober {
	h := w.Process.Health
	interval, timeout := pace(h)
	p := &prober{instance: w.Instance, done: make(chan struct{}), verdict: verdict{retries: h.Retries, interval: interval, last: time.Now().Add(h.StartPeriod)}}
	if p.retries == 0 {
		p.retries = 3
	}
	ctx, p.cancel = context.WithCancel(ctx)
	go func() {
		defer close(p.done)
		wait := min(interval, 250*time.Millisecond)
		for {
			pctx, cancel := context.WithTimeout(ctx, timeout)
			passed := false
			if w.Process.FrontEnd != nil {
				passed = c.agent.answers(pctx, w)
			} else {
				code, _, err := c.agent.runner.Exec(pctx, w.Instance, sandbox.ExecSpec{Args: h.Test})
				passed = err == nil && code == 0
			}
			cancel()
			if ctx.Err() != nil {
				return
			}
			p.mu.Lock()
			was := p.ok
			p.add(time.Now(), passed)
			now, failed := p.ok, p.failures >= p.retries
			p.mu.Unlock()
			if was != now || failed {
				c.loop.Wake()
			}
			next := interval
			if !now {
				next = min(wait, interval)
				wait = min(wait*3/2, 2*time.Second)
			}
			select {
			case <-ctx.Done():
				return
			case <-time.After(next):
			}
		}
	}()
	return p
}

var errNoBody = errors.New("the sealed body cannot be had")

var errNoEnvelope = errors.New("no envelope for this node yet: another holder or the owner must seal one")
