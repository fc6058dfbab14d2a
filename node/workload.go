package node

import (
	"context"
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
	"holdfast/volume"
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
	Fenced   bool
	Held     string // why the ledger says that it does not run now; "" runs
	Process  *contract.Process
	Limits   contract.Service
	Keys     *contract.Keys
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
	Key     [32]byte
}

// observed is what the pure decision needs to know.
type observed struct {
	instances  map[string]sandbox.Status // of this workload, by sandbox ID
	leaseOK    bool
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
	case have && cur.State == sandbox.Running && o.unhealthy:
		s.stop = append(s.stop, w.Instance)
		s.state, s.reason, s.start, s.restart = ledger.StateFailed, "health check failed", true, true
	case have && cur.State == sandbox.Running:
		s.state = ledger.StateRunning
	case have:
		s.reason = fmt.Sprintf("exit code %d", cur.ExitCode)
		if cur.OOM {
			s.reason = "out of memory"
		}
		if !again(w.Process.Restart, cur.ExitCode, o.restarts, w.Process.MaxRetries) {
			s.state = ledger.StateExited
			break
		}
		s.state = ledger.StateFailed
		if wait := backoff(o.restarts, cur.FinishedAt.Sub(cur.StartedAt)) - o.now.Sub(cur.FinishedAt); wait > 0 {
			s.again = wait
			break
		}
		s.stop, s.start, s.restart = append(s.stop, w.Instance), true, true
	case o.dependency != "":
		s.state, s.reason, s.again = ledger.StateWaiting, o.dependency, 300*time.Millisecond
	default:
		s.state, s.start = ledger.StateStarting, true
	}
	return s
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
	imageOf string // manifest that image was unpacked from

	// Only the loop's goroutine touches these.
	restarts uint32
	health   *prober
}

func (a *Agent) newController(id contract.WorkloadID) *controller {
	c := &controller{agent: a, id: id, log: a.log.With("workload", id.Short())}
	c.loop = reconcile.New(reconcile.Config{Name: "workload " + id.Short(), Resync: 5 * time.Second, Max: 5 * time.Second, Log: c.log, Step: c.step})
	return c
}

func (c *controller) set(w *Workload) {
	c.mu.Lock()
	c.want = w
	c.mu.Unlock()
	c.loop.Wake()
}

func (c *controller) status() (ledger.Report, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.report, c.serving
}

// label names the workload in its sandbox's labels, so that a restarted agent knows its own.
const label = "workload"

func (c *controller) step(ctx context.Context) (time.Duration, error) {
	c.mu.Lock()
	w := c.want
	c.mu.Unlock()
	all, err := c.agent.runner.List(ctx)
	if err != nil {
		return 0, err
	}
	o := observed{instances: map[string]sandbox.Status{}, leaseOK: c.agent.lease.ok(), restarts: c.restarts, now: time.Now()}
	for _, s := range all {
		if s.Labels[label] == c.id.String() {
			o.instances[s.ID] = s
		}
	}
	if w != nil {
		if _, have := o.instances[w.Instance]; !have && w.Held == "" {
			o.dependency = c.agent.waitsFor(ctx, w)
		}
		if c.health != nil && c.health.instance == w.Instance {
			o.unhealthy = c.health.failed()
		}
	}
	s := decide(w, o)
	if s.start && w != nil {
		// What takes long and disturbs nobody comes before the stop of what runs.
		if err := c.prepare(ctx, w); err != nil {
			c.say(w, ledger.StateWaiting, err.Error(), false)
			return 0, err
		}
	}
	for _, id := range s.stop {
		c.stopHealth()
		c.say(w, s.state, s.reason, false)
		if err := c.agent.runner.Stop(ctx, id); err != nil {
			return 0, err
		}
		c.log.Info("stopped", "instance", id, "reason", s.reason)
	}
	if w == nil || w.Held != "" || (w.Fenced && !o.leaseOK) {
		c.stopHealth()
		if w != nil {
			c.say(w, s.state, s.reason, false)
		}
		return s.again, c.agent.release(ctx, c.id, w)
	}
	if s.start {
		if s.restart {
			c.restarts++
		}
		if err := c.start(ctx, w); err != nil {
			c.say(w, ledger.StateFailed, err.Error(), false)
			return 0, err
		}
		c.log.Info("started", "name", w.Name, "instance", w.Instance, "epoch", w.Epoch)
		s.state, s.reason = ledger.StateRunning, ""
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
		c.sayExit(w, s.state, s.reason, cur.ExitCode)
		return s.again, nil
	}
	c.say(w, s.state, s.reason, healthy)
	return s.again, nil
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
	if len(reason) > 200 {
		reason = reason[:200]
	}
	r := ledger.Report{
		Workload: w.ID, Contract: w.Contract, Service: w.Service, Replica: w.Replica, Epoch: w.Epoch, Revision: w.Revision,
		State: state, Reason: strings.ToValidUTF8(reason, "?"), Restarts: c.restarts, Healthy: healthy, ExitCode: int32(code),
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
	if img, ok := c.inUse(); ok && img.Manifest == w.Process.Image.Manifest {
		return nil
	}
	img, err := c.agent.runner.Unpack(ctx, c.agent.imageBlobs(&w.Process.Image), w.Process.Image.Manifest)
	if err != nil {
		return fmt.Errorf("image %s: %w", w.Process.Image.Reference, err)
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
	spec := sandbox.Spec{
		ID: w.Instance, Image: c.image, Args: arguments(w.Process, c.image), Env: w.Process.Environment, Cwd: w.Process.WorkingDir,
		User: w.Process.User, Hostname: hostname(w), ReadOnly: w.Process.ReadOnly, CapAdd: w.Process.CapAdd, CapDrop: w.Process.CapDrop,
		CPUMilli: int64(w.Limits.CPUMilli), MemoryBytes: int64(w.Limits.Memory), Pids: int64(w.Limits.Pids),
		StopSignal: w.Process.StopSignal, StopGrace: w.Process.StopGrace, Fenced: w.Fenced,
		Labels: map[string]string{label: w.ID.String()},
	}
	mounts := map[string]string{}
	for _, v := range w.Volumes {
		dir, err := c.agent.volumes.Open(ctx, volume.Spec{ID: volumeName(v.ID), Size: v.Size, Key: v.Key, Create: !v.Created})
		if err != nil {
			return fmt.Errorf("volume %s: %w", v.Name, err)
		}
		if !v.Created {
			// Before the first byte of data: from now on an absent disk is a loss, on the ledger.
			if err := c.agent.volumeCreated(ctx, v.ID); err != nil {
				return fmt.Errorf("volume %s: %w", v.Name, err)
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
		return fmt.Errorf("network %s is not up yet", w.Network)
	}
	// A sandbox takes the addresses of its namespace with it: every start needs a fresh one.
	err := net.Detach(ctx, attachmentID(w.ID))
	if err != nil {
		return err
	}
	if spec.NetNS, err = net.Attach(ctx, overlay.Attachment{ID: attachmentID(w.ID), Addr: w.Address}); err != nil {
		return err
	}
	return c.agent.runner.Start(ctx, spec)
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
	ok       bool
	failures uint32
	retries  uint32
	grace    time.Time
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

// startProber probes often until the first success, then at the interval. Failures within the start period do not
// count.
func (c *controller) startProber(ctx context.Context, w *Workload) *prober {
	h := w.Process.Health
	or := func(d, otherwise time.Duration) time.Duration {
		if d > 0 {
			return d
		}
		return otherwise
	}
	interval, timeout := or(h.Interval, 30*time.Second), or(h.Timeout, 30*time.Second)
	p := &prober{instance: w.Instance, done: make(chan struct{}), retries: h.Retries, grace: time.Now().Add(h.StartPeriod)}
	if p.retries == 0 {
		p.retries = 3
	}
	ctx, p.cancel = context.WithCancel(ctx)
	go func() {
		defer close(p.done)
		wait := min(interval, 250*time.Millisecond)
		for {
			pctx, cancel := context.WithTimeout(ctx, timeout)
			code, _, err := c.agent.runner.Exec(pctx, w.Instance, sandbox.ExecSpec{Args: h.Test})
			cancel()
			if ctx.Err() != nil {
				return
			}
			p.mu.Lock()
			was := p.ok
			switch {
			case err == nil && code == 0:
				p.ok, p.failures = true, 0
			case p.ok || time.Now().After(p.grace):
				if p.failures++; p.failures >= p.retries {
					p.ok = false
				}
			}
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

var errNoEnvelope = errors.New("no envelope for this node yet: another holder or the owner must seal one")
