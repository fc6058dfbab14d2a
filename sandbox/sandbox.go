// Package sandbox runs one workload from an OCI image in gVisor (runsc, systrap), bounded in memory, CPU and processes,
// with no capability that it was not given and no way to gain one. It knows nothing of contracts, ledgers or networks:
// it is handed a network namespace and directories.
//
// Everything lies under Config.Dir, which must be on tmpfs: unpacked layers, bundles with environment and secrets,
// runsc's state, logs. Nothing is written anywhere else, so that a disk never sees it.
//
//	layers/HEX        one unpacked layer, by the SHA-256 of its tar (diffID)
//	bundles/ID        one sandbox: spec.json, config.json, files/, rootfs (overlay of the layers), status.json, lock, logs of shim
//	                  and runsc
//	runsc/            runsc's own state
//	logs/ID/          what it wrote, the newest in "log", older in "log.1"
//
// Each sandbox has a shim, a process of its own that outlives the caller: it runs runsc, keeps the logs, records the end,
// and is the watchdog that ends a fenced workload when the lease file's deadline passes. The shim holds a lock on
// bundles/ID/lock (an open file description's) as long as it lives: whoever asks whether a sandbox is alive asks the lock, never a process ID.
package sandbox

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Config of a Runner.
type Config struct {
	Runsc  string   // path of holdfast-runsc
	Self   []string // argv prefix of a shim; the bundle's directory is appended
	Dir    string   // on tmpfs
	Cgroup string   // parent of the sandboxes' cgroups, as in /proc/self/cgroup; "" sets no limits
	Lease  string   // file that says until when Fenced workloads run, see LeaseSize
	Image  int64    // bytes that one image may unpack to; 0 means 8 GiB
	Layers int64    // bytes that all unpacked layers may take; 0 means half of what Dir's file system holds
	Log    *slog.Logger
}

// Spec is a workload as it should run.
type Spec struct {
	ID          string // [a-z0-9-]{1,63}
	Image       Image
	Args        []string // empty runs the image's entrypoint and command
	Env         []string // KEY=value, over the image's
	Cwd         string   // "" is the image's, or /
	User        string   // name or ID, with or without :group; "" is the image's
	Hostname    string
	ReadOnly    bool     // the root file system
	CapAdd      []string // on top of the default set, "NET_BIND_SERVICE" or with CAP_
	CapDrop     []string // "ALL" drops all
	NetNS       string   // path of a network namespace, whose interfaces become the sandbox's; "" gives a loopback alone
	Mounts      []Mount
	Files       []File
	CPUMilli    int64 // thousandths of a core; 0 is unlimited
	MemoryBytes int64 // 0 is unlimited
	Pids        int64 // 0 is unlimited
	StopSignal  string
	StopGrace   time.Duration // between the stop signal and the end; 0 means 10 s, MaxGrace is the most
	Fenced      bool          // ends when the lease does
	Labels      map[string]string
}

// Mount is a directory of the machine or a tmpfs inside the sandbox.
type Mount struct {
	Source   string
	Tmpfs    bool
	Size     int64 // of a tmpfs; 0 means 64 MiB
	Target   string
	ReadOnly bool
}

// File is put into the sandbox; its bytes never touch a disk.
type File struct {
	Path     string
	Mode     uint32
	UID, GID int
	Data     []byte
}

// States of a sandbox.
const (
	Running = "running"
	Exited  = "exited"
)

// Status is a sandbox as it is.
type Status struct {
	ID         string
	State      string
	ExitCode   int
	OOM        bool   // ended for want of memory
	Reason     string // why it ended, when not by itself
	StartedAt  time.Time
	FinishedAt time.Time
	Labels     map[string]string
}

// Runner runs sandboxes under one directory.
type Runner struct {
	cfg Config
	log *slog.Logger
	mu  sync.Mutex
	ids map[string]*idLock // one change of a sandbox at a time

	layers struct {
		sync.Mutex
		known bool
		used  int64 // bytes of all layers, those that are just being unpacked too
	}
}

// MaxGrace bounds Spec.StopGrace.
const MaxGrace = 5 * time.Minute

type idLock struct {
	sync.Mutex
	users int
}

var idForm = regexp.MustCompile(`^[a-z0-9-]{1,63}$`)

// New checks the configuration; nothing happens before the first call.
func New(cfg Config) (*Runner, error) {
	if !filepath.IsAbs(cfg.Dir) {
		return nil, fmt.Errorf("sandbox: directory %q is not an absolute path", cfg.Dir)
	}
	if cfg.Image == 0 {
		cfg.Image = 8 << 30
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Runner{cfg: cfg, log: cfg.Log, ids: map[string]*idLock{}}, nil
}

// lock serialises the changes of one sandbox or layer.
func (r *Runner) lock(id string) (unlock func()) {
	r.mu.Lock()
	m := r.ids[id]
	if m == nil {
		m = &idLock{}
		r.ids[id] = m
	}
	m.users++
	r.mu.Unlock()
	m.Lock()
	return func() { r.unlock(id, m) }
}

// tryLock is lock for whoever rather goes on than waits.
func (r *Runner) tryLock(id string) (unlock func(), ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ids[id] != nil {
		return nil, false
	}
	m := &idLock{users: 1}
	m.Lock()
	r.ids[id] = m
	return func() { r.unlock(id, m) }, true
}

func (r *Runner) unlock(id string, m *idLock) {
	m.Unlock()
	r.mu.Lock()
	defer r.mu.Unlock()
	if m.users--; m.users == 0 {
		delete(r.ids, id)
	}
}

func (r *Runner) bundle(id string) string { return filepath.Join(r.cfg.Dir, "bundles", id) }

// statusFile is what the shim writes.
type statusFile struct {
	PID      int
	State    string // "starting", Running, Exited
	ExitCode int
	OOM      bool
	Reason   string
	Started  time.Time
	Finished time.Time
}

// shimFile is what a shim must know beside config.json.
type shimFile struct {
	ID     string
	Runsc  []string // argv prefix with global flags
	State  string   // runsc's own directory
	Lease  string
	Grace  time.Duration
	Signal string
	Fenced bool
	Logs   string
	Cgroup string
	Labels map[string]string
}

// Start runs a sandbox. It returns when the sandbox runs, or with the reason why it does not; one whose first process could
// not be started stays listed as Exited until Stop or the next Start. A sandbox that runs with the same Spec is left as it
// is.
func (r *Runner) Start(ctx context.Context, s Spec) error {
	if !idForm.MatchString(s.ID) {
		return fmt.Errorf("sandbox ID %q: want 1 to 63 of a-z, 0-9 and -", s.ID)
	}
	defer r.lock(s.ID)()
	b := r.bundle(s.ID)
	if alive(b) {
		var old Spec
		if readJSON(filepath.Join(b, "spec.json"), &old) == nil && sameSpec(&old, &s) {
			return r.await(ctx, b)
		}
		return fmt.Errorf("sandbox %s runs with another spec", s.ID)
	}
	if err := r.clean(ctx, s.ID); err != nil {
		return fmt.Errorf("sandbox %s: %w", s.ID, err)
	}
	if err := r.create(b, &s); err != nil {
		return errors.Join(fmt.Errorf("sandbox %s: %w", s.ID, err), r.clean(context.WithoutCancel(ctx), s.ID))
	}
	if err := r.await(ctx, b); err != nil {
		return fmt.Errorf("sandbox %s: %w", s.ID, err)
	}
	return nil
}

func sameSpec(a, b *Spec) bool {
	x, _ := json.Marshal(a)
	y, _ := json.Marshal(b)
	return bytes.Equal(x, y)
}

// create writes the bundle and starts the shim. The lock comes first and shim.json last before the shim itself: what has a
// free lock and no shim.json never ran, and is swept.
func (r *Runner) create(b string, s *Spec) error {
	for _, d := range []string{filepath.Join(b, "rootfs"), filepath.Join(b, "upper"), filepath.Join(b, "work"), filepath.Join(r.cfg.Dir, "runsc"), filepath.Join(r.cfg.Dir, "logs", s.ID)} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return err
		}
	}
	lock, err := os.OpenFile(filepath.Join(b, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := unix.FcntlFlock(lock.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK}); err != nil {
		return fmt.Errorf("lock: %w", err)
	}
	rootfs := filepath.Join(b, "rootfs")
	if err := os.Chmod(filepath.Join(b, "upper"), 0o755); err != nil { // it is the sandbox's /
		return err
	}
	if err := mountRoot(r.cfg.Dir, b, s.Image); err != nil {
		return err
	}
	oci, err := r.ociSpec(b, rootfs, s)
	if err != nil {
		return err
	}
	shim := shimFile{
		ID: s.ID, Runsc: slices.Concat([]string{r.cfg.Runsc}, r.flags(b), networkFlags(oci)), State: filepath.Join(r.cfg.Dir, "runsc"), Lease: r.cfg.Lease, Grace: s.StopGrace, Signal: s.StopSignal,
		Fenced: s.Fenced, Logs: filepath.Join(r.cfg.Dir, "logs", s.ID), Labels: s.Labels,
	}
	if shim.Grace <= 0 {
		shim.Grace = 10 * time.Second
	}
	shim.Grace = min(shim.Grace, MaxGrace)
	if r.cfg.Cgroup != "" {
		shim.Cgroup = filepath.Join(r.cfg.Cgroup, s.ID)
		if err := machine.make(shim.Cgroup, oci.Linux.Resources); err != nil {
			return err
		}
	}
	for name, v := range map[string]any{"config.json": oci, "spec.json": s} {
		if err := writeJSON(filepath.Join(b, name), v); err != nil {
			return err
		}
	}
	if err := writeJSON(filepath.Join(b, "shim.json"), shim); err != nil {
		return err
	}
	said, err := os.OpenFile(filepath.Join(b, "shim.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer said.Close()
	// The shim inherits the lock with the open file; it is free only when the shim is gone.
	argv := append(slices.Clone(r.cfg.Self), b)
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=/bin"}
	cmd.Stderr = said
	cmd.ExtraFiles = []*os.File{lock}
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start shim: %w", err)
	}
	go cmd.Wait() // reaped here while this process lives, by init after it
	return nil
}

// flags are runsc's global flags. What is not here is at its default: no access to the machine's sockets, pipes and
// devices, no set-user-ID, no debug logs, and a root that only this sandbox changes (--file-access=exclusive). Mounts stay
// shared with the machine, so that what a workload has written to a volume survives the sandbox's being killed.
func (r *Runner) flags(bundle string) []string {
	f := []string{
		"--root=" + filepath.Join(r.cfg.Dir, "runsc"), "--platform=systrap", "--overlay2=root:memory", "--host-settings=ignore",
		"--log=" + filepath.Join(bundle, "runsc.log"), "--log-format=json",
	}
	if r.cfg.Cgroup == "" {
		f = append(f, "--ignore-cgroups")
	}
	return f
}

// networkFlags are those of runsc's global flags that differ between sandboxes.
func networkFlags(spec *specs.Spec) []string {
	network := "--network=none"
	for _, n := range spec.Linux.Namespaces {
		if n.Type == specs.NetworkNamespace && n.Path != "" {
			network = "--network=sandbox"
		}
	}
	if slices.Contains(spec.Process.Capabilities.Bounding, "CAP_NET_RAW") {
		return []string{network, "--net-raw"} // whoever made the namespace pins what may leave it
	}
	return []string{network}
}

// await returns when the shim says that the sandbox runs or has ended.
func (r *Runner) await(ctx context.Context, b string) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute) // a small machine that starts many at once is slow
	defer cancel()
	for {
		var st statusFile
		err := readJSON(filepath.Join(b, "status.json"), &st)
		switch {
		case err == nil && st.State == Running:
			return nil
		case err == nil && st.State == Exited && st.Started.IsZero():
			return fmt.Errorf("it did not start: %s", st.Reason)
		case err == nil && st.State == Exited:
			return nil // it ran, and has ended already: List tells
		case !alive(b):
			said, _ := os.ReadFile(filepath.Join(b, "shim.log"))
			return fmt.Errorf("its shim died: %.1000s", bytes.TrimSpace(said))
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("it does not start: %w", ctx.Err())
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// alive reports whether the bundle's shim lives. It asks for the lock's holder and never takes the lock, not even for a
// moment, in which somebody else would be refused it.
func alive(b string) bool {
	f, err := os.Open(filepath.Join(b, "lock"))
	if err != nil {
		return false
	}
	defer f.Close()
	l := unix.Flock_t{Type: unix.F_RDLCK}
	return unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &l) == nil && l.Type != unix.F_UNLCK
}

// Stop ends a sandbox and removes all of it but its logs, which are kept for a while. A sandbox that is not there is
// stopped. When ctx ends first, the sandbox has been asked to end and uses its grace.
func (r *Runner) Stop(ctx context.Context, id string) error { return r.stop(ctx, id, unix.SIGTERM) }

// Kill is Stop without a grace, for what has no right to run any longer.
func (r *Runner) Kill(ctx context.Context, id string) error { return r.stop(ctx, id, atOnce) }

func (r *Runner) stop(ctx context.Context, id string, sig unix.Signal) error {
	if !idForm.MatchString(id) {
		return fmt.Errorf("sandbox ID %q: want 1 to 63 of a-z, 0-9 and -", id)
	}
	defer r.lock(id)()
	if err := r.end(ctx, id, sig); err != nil {
		return fmt.Errorf("stop sandbox %s: %w", id, err)
	}
	if err := r.clean(ctx, id); err != nil {
		return fmt.Errorf("stop sandbox %s: %w", id, err)
	}
	return r.pruneLogs()
}

// Remove is Stop, and removes the logs too.
func (r *Runner) Remove(ctx context.Context, id string) error {
	if err := r.Stop(ctx, id); err != nil {
		return err
	}
	defer r.lock(id)()
	if err := os.RemoveAll(filepath.Join(r.cfg.Dir, "logs", id)); err != nil {
		return fmt.Errorf("remove logs of %s: %w", id, err)
	}
	return nil
}

// end asks the shim to stop the sandbox, and returns when the shim is gone. A shim that does not obey is killed; the
// kernel then kills what it runs.
func (r *Runner) end(ctx context.Context, id string, sig unix.Signal) error {
	b := r.bundle(id)
	var sh shimFile
	if err := readJSON(filepath.Join(b, "shim.json"), &sh); err != nil {
		return nil // it never had a shim
	}
	asked := false
	limit := time.Now().Add(sh.Grace + 15*time.Second)
	if sig == atOnce {
		limit = time.Now().Add(15 * time.Second)
	}
	for alive(b) {
		switch late := time.Now().After(limit); {
		case late && signalShim(b, unix.SIGKILL):
			r.log.Warn("shim did not stop, killed it", "id", id)
			limit = time.Now().Add(5 * time.Second)
		case late:
			return errors.New("its shim cannot be found")
		case !asked:
			asked = signalShim(b, sig) // it has to say its process ID first
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
	}
	return nil
}

// signalShim signals the process that holds the bundle's lock, and no other that got its number after it.
func signalShim(b string, sig unix.Signal) bool {
	var st statusFile
	if readJSON(filepath.Join(b, "status.json"), &st) != nil || st.PID <= 0 {
		return false
	}
	fd, err := unix.PidfdOpen(st.PID, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	return alive(b) && unix.PidfdSendSignal(fd, sig, nil, 0) == nil
}

// clean removes what a dead or half-made sandbox has left.
func (r *Runner) clean(ctx context.Context, id string) error {
	b := r.bundle(id)
	if _, err := os.Stat(b); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	// runsc deletes the container in the end; if it was killed, it is still there.
	state := stateFile(filepath.Join(r.cfg.Dir, "runsc"), id)
	if _, err := os.Stat(state); err == nil {
		if out, err := r.runsc(ctx, b, 20*time.Second, "delete", "--force", id); err != nil {
			r.log.Warn("delete container", "id", id, "error", err, "output", out)
		}
	}
	for _, f := range []string{state, strings.TrimSuffix(state, "state") + "lock"} {
		if err := removeIfThere(f); err != nil {
			return err
		}
	}
	if r.cfg.Cgroup != "" {
		machine.remove(filepath.Join(r.cfg.Cgroup, id))
	}
	for {
		err := unix.Unmount(filepath.Join(b, "rootfs"), unix.MNT_DETACH)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
			break // no longer a mount
		}
		if err != nil {
			return fmt.Errorf("unmount root: %w", err)
		}
	}
	if err := os.RemoveAll(b); err != nil {
		return err
	}
	// runsc keeps an empty network namespace mounted for its file servers. Whoever starts next makes it anew.
	if left, err := os.ReadDir(filepath.Join(r.cfg.Dir, "bundles")); err == nil && len(left) == 0 {
		for unix.Unmount(filepath.Join(r.cfg.Dir, "runsc", "null-netns"), unix.MNT_DETACH) == nil {
		}
	}
	return nil
}

// keptLogs is how many stopped sandboxes keep their logs.
const keptLogs = 16

// pruneLogs removes the oldest logs of sandboxes that are gone.
func (r *Runner) pruneLogs() error {
	type gone struct {
		id   string
		when time.Time
	}
	var all []gone
	entries, err := os.ReadDir(filepath.Join(r.cfg.Dir, "logs"))
	if err != nil {
		return nil // nothing ever ran
	}
	for _, e := range entries {
		if _, err := os.Stat(r.bundle(e.Name())); err == nil {
			continue
		}
		g := gone{id: e.Name()}
		if st, err := os.Stat(filepath.Join(r.cfg.Dir, "logs", e.Name(), "log")); err == nil {
			g.when = st.ModTime()
		}
		all = append(all, g)
	}
	slices.SortFunc(all, func(a, b gone) int { return b.when.Compare(a.when) })
	for _, g := range all[min(len(all), keptLogs):] {
		unlock, ok := r.tryLock(g.id)
		if !ok {
			continue // it is just being started or stopped
		}
		err := os.RemoveAll(filepath.Join(r.cfg.Dir, "logs", g.id))
		unlock()
		if err != nil {
			return fmt.Errorf("remove logs of %s: %w", g.id, err)
		}
	}
	return nil
}

// runsc runs one command with a time-out and returns what it said.
func (r *Runner) runsc(ctx context.Context, bundle string, limit time.Duration, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, r.cfg.Runsc, append(r.flags(bundle), args...)...)
	cmd.Env = []string{"PATH=/bin"}
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

// List returns every sandbox, also those that a Runner before this one started.
func (r *Runner) List(ctx context.Context) ([]Status, error) {
	entries, err := os.ReadDir(filepath.Join(r.cfg.Dir, "bundles"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("list sandboxes: %w", err)
	}
	var out []Status
	for _, e := range entries {
		if st, ok := r.status(e.Name()); ok {
			out = append(out, st)
		} else if err := r.sweep(ctx, e.Name()); err != nil {
			r.log.Warn("sweep half-made sandbox", "id", e.Name(), "error", err)
		}
	}
	return out, nil
}

// sweep removes what a caller that was killed left half made.
func (r *Runner) sweep(ctx context.Context, id string) error {
	unlock, ok := r.tryLock(id)
	if !ok {
		return nil // it is just being started or stopped
	}
	defer unlock()
	b := r.bundle(id)
	if _, err := os.Stat(filepath.Join(b, "shim.json")); err == nil || alive(b) {
		return nil
	}
	return r.clean(ctx, id)
}

func (r *Runner) status(id string) (Status, bool) {
	b := r.bundle(id)
	var sh shimFile
	var st statusFile
	if readJSON(filepath.Join(b, "shim.json"), &sh) != nil {
		return Status{}, false // half made: Start or Stop cleans it
	}
	live := alive(b)
	err := readJSON(filepath.Join(b, "status.json"), &st) // after the lock: a shim that ended has written it
	out := Status{ID: id, State: Running, ExitCode: st.ExitCode, OOM: st.OOM, Reason: st.Reason, StartedAt: st.Started, FinishedAt: st.Finished, Labels: sh.Labels}
	if !live {
		out.State = Exited
		if err != nil || st.State != Exited {
			out.ExitCode, out.Reason = -1, ReasonShim
		}
	}
	return out, true
}

// ExecSpec is a command inside a sandbox.
type ExecSpec struct {
	Args []string
	User string // "" is the workload's own
	Cwd  string
}

// maxOutput bounds what Exec returns.
const maxOutput = 64 << 10

// maxExec bounds a command whose context has no deadline.
const maxExec = 10 * time.Minute

// Exec runs a command inside a running sandbox, with the workload's environment and no more rights than it, and returns
// its exit code and the beginning of its output. When ctx ends first the command is killed.
func (r *Runner) Exec(ctx context.Context, id string, x ExecSpec) (int, []byte, error) {
	code, out, err := r.exec(ctx, id, x)
	if err != nil {
		return 0, out, fmt.Errorf("exec in %s: %w", id, err)
	}
	return code, out, nil
}

func (r *Runner) exec(ctx context.Context, id string, x ExecSpec) (int, []byte, error) {
	if !idForm.MatchString(id) || len(x.Args) == 0 {
		return 0, nil, errors.New("want an ID and a command")
	}
	b := r.bundle(id)
	var spec specs.Spec
	if err := readJSON(filepath.Join(b, "config.json"), &spec); err != nil {
		return 0, nil, err
	}
	p := spec.Process
	p.Args = x.Args
	if x.Cwd != "" {
		p.Cwd = x.Cwd
	}
	if x.User != "" {
		u, _, err := resolveUser(spec.Root.Path, x.User)
		if err != nil {
			return 0, nil, err
		}
		p.User = u
		if u.UID != 0 {
			p.Capabilities.Effective, p.Capabilities.Permitted = nil, nil
		}
	}
	// By file, since an argument list is public on the machine, and health checks carry passwords.
	dir, err := os.MkdirTemp(b, "exec-*")
	if err != nil {
		return 0, nil, err
	}
	defer os.RemoveAll(dir)
	if err := writeJSON(filepath.Join(dir, "process.json"), p); err != nil {
		return 0, nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, maxExec)
	defer cancel()
	pidFile := filepath.Join(dir, "pid")
	cmd := exec.CommandContext(ctx, r.cfg.Runsc, slices.Concat(r.flags(b), networkFlags(&spec), []string{"exec", "--process", filepath.Join(dir, "process.json"), "--internal-pid-file", pidFile, id})...)
	cmd.Env = []string{"PATH=/bin"}
	cmd.WaitDelay = time.Second
	cmd.Cancel = func() error {
		// Killing runsc would leave the command behind in the sandbox.
		if pid, err := os.ReadFile(pidFile); err == nil && len(pid) > 0 {
			if _, err := r.runsc(context.WithoutCancel(ctx), b, 5*time.Second, "kill", "--pgid", string(pid), id, "KILL"); err == nil {
				return nil
			}
			r.runsc(context.WithoutCancel(ctx), b, 5*time.Second, "kill", "--pid", string(pid), id, "KILL")
			return nil
		}
		return cmd.Process.Kill()
	}
	out := &limited{limit: maxOutput}
	cmd.Stdout, cmd.Stderr = out, out
	err = cmd.Run()
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return 0, out.Bytes(), ctx.Err()
	case errors.As(err, &exit) && exit.Exited():
		return exit.ExitCode(), out.Bytes(), nil
	case err != nil:
		return 0, out.Bytes(), err
	}
	return 0, out.Bytes(), nil
}

// limited keeps the first bytes and swallows the rest.
type limited struct {
	bytes.Buffer
	limit int
}

func (l *limited) Write(p []byte) (int, error) {
	if room := l.limit - l.Len(); room > 0 {
		l.Buffer.Write(p[:min(room, len(p))])
	}
	return len(p), nil
}

// Watch sends the ID of a sandbox whenever its state has changed, until ctx ends.
func (r *Runner) Watch(ctx context.Context) <-chan string {
	out := make(chan string)
	go func() {
		defer close(out)
		t := time.NewTicker(100 * time.Millisecond)
		defer t.Stop()
		last := map[string]Status{}
		for {
			all, err := r.List(ctx)
			if err == nil {
				now := map[string]Status{}
				for _, s := range all {
					now[s.ID] = s
					if old, ok := last[s.ID]; ok && reflect.DeepEqual(old, s) {
						continue
					}
					select {
					case out <- s.ID:
					case <-ctx.Done():
						return
					}
				}
				for id := range last {
					if _, ok := now[id]; !ok {
						select {
						case out <- id:
						case <-ctx.Done():
							return
						}
					}
				}
				last = now
			}
			select {
			case <-ctx.Done():
				return
			case <-t.C:
			}
		}
	}()
	return out
}

// Logs writes the last lines that a sandbox wrote, oldest first, and with follow those that come, until ctx ends or the
// sandbox has been gone for a second.
func (r *Runner) Logs(ctx context.Context, id string, follow bool, tail int, w io.Writer) error {
	if !idForm.MatchString(id) {
		return fmt.Errorf("sandbox ID %q: want 1 to 63 of a-z, 0-9 and -", id)
	}
	dir := filepath.Join(r.cfg.Dir, "logs", id)
	f, err := os.Open(filepath.Join(dir, "log"))
	if err != nil {
		return fmt.Errorf("logs of %s: %w", id, err)
	}
	defer func() { f.Close() }()
	var lines []string
	keep := func(rd io.Reader) {
		s := bufio.NewScanner(rd)
		s.Buffer(nil, maxLine+128)
		for s.Scan() {
			if lines = append(lines, s.Text()); len(lines) > tail {
				lines = lines[1:]
			}
		}
	}
	if old, err := os.Open(filepath.Join(dir, "log.1")); err == nil {
		keep(old)
		old.Close()
	}
	keep(f)
	for _, l := range lines {
		if _, err := fmt.Fprintln(w, l); err != nil {
			return err
		}
	}
	gone := 0
	for follow {
		n, err := io.Copy(w, f)
		if err != nil {
			return err
		}
		if n == 0 {
			// A rotated log goes on in a new file.
			if a, err := os.Stat(filepath.Join(dir, "log")); err == nil {
				if b, err := f.Stat(); err == nil && !os.SameFile(a, b) {
					if next, err := os.Open(filepath.Join(dir, "log")); err == nil {
						f.Close()
						f = next
						continue
					}
				}
			}
			if gone++; alive(r.bundle(id)) {
				gone = 0
			} else if gone > 10 {
				return nil
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
	return nil
}

// Note adds to a sandbox's log what its owner is to know and a status should not say. The sandbox need not exist.
func (r *Runner) Note(id, text string) error {
	if !idForm.MatchString(id) {
		return fmt.Errorf("sandbox ID %q: want 1 to 63 of a-z, 0-9 and -", id)
	}
	dir := filepath.Join(r.cfg.Dir, "logs", id)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("note on %s: %w", id, err)
	}
	f, err := os.OpenFile(filepath.Join(dir, "log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("note on %s: %w", id, err)
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || st.Size() > maxLog {
		return err // its shim begins a new one with the next line
	}
	// One line, in one write: the shim appends to the same file.
	text = strings.Join(strings.Fields(strings.ToValidUTF8(text, "?")), " ")
	if _, err := fmt.Fprintf(f, "%sholdfast: %.4000s\n", time.Now().UTC().Format(logTime), text); err != nil {
		return fmt.Errorf("note on %s: %w", id, err)
	}
	return nil
}

func readJSON(path string, v any) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	return json.Unmarshal(b, v)
}

// writeJSON writes a file that others never see half written.
func writeJSON(path string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	tmp := path + ".tmp" + strconv.Itoa(os.Getpid())
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}
