package node

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"holdfast/contract"
	"holdfast/disperse"
	"holdfast/overlay"
	"holdfast/sandbox"

	"golang.org/x/sys/unix"
)

// The front end of a contract's buckets is a process of this program, holdfast run s3 --front, and no sandbox: it keeps the
// store's keys, and dials the locations in the system network. It confines itself (package confine) to its directory, a user
// of its own and the locations' port, before it reads what a location or a workload says, and has limits. It gets the listener at the workload's address as descriptor
// 3 and Front as JSON on its standard input, so that no secret is in its arguments, in its environment or on a disk; more
// Fronts follow there when locations come. Its database is on tmpfs and goes with it: every start takes the store over from
// the locations. It ends with its input, so that none outlives the agent.

// ContractScheme is that of the stores of contracts.
func ContractScheme() disperse.Scheme { return disperse.Scheme{K: contract.StoreK, N: contract.StoreN} }

// Front is what a front end is told.
type Front struct {
	Dir      string   // on tmpfs
	User     int      // whom Dir belongs to: it confines itself to both (package confine); 0: it does not
	Ports    []uint16 // of locations: nothing else can be dialled
	FrontEnd contract.FrontEnd
	Places   []Place
}

// FrontTaken is what a front end says on its standard output when another one has its store: it is not to start again.
const FrontTaken = "taken"

// reasonTaken is the reason of a front end that said so, and of one that is therefore not started.
const reasonTaken = "another front end has its store now"

// fronts are the front ends that run here. They look like sandboxes to a controller.
type fronts struct {
	self, dir string
	log       *slog.Logger
	wake      func()                                                   // is called when one has ended
	note      func(id, text string)                                    // a line of its log
	bound     func(id string, pid int, limits *contract.Service) error // puts a process into a group with limits
	unbound   func(id string)

	mu     sync.Mutex
	places []Place
	all    map[string]*front // by instance
	taken  map[string]bool   // instances that are not started again
}

type front struct {
	user   int
	status sandbox.Status // guarded by fronts.mu
	input  *os.File       // guarded by fronts.mu
	pid    *os.Process
	done   chan struct{}
}

func (f *fronts) list() []sandbox.Status {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []sandbox.Status
	for _, x := range f.all {
		out = append(out, x.status)
	}
	return out
}

func (f *fronts) has(id string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.all[id] != nil
}

// follow tells all front ends which locations there are.
func (f *fronts) follow(places []Place) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if slices.Equal(places, f.places) {
		return
	}
	f.places = places
	for id, x := range f.all {
		if x.status.State != sandbox.Running {
			continue
		}
		if err := x.tell(Front{Places: places}); err != nil {
			f.log.Warn("front end does not read of locations, and is ended", "instance", id, "error", err) // half a message is none
			x.pid.Kill()
		}
	}
}

// start runs one. l is its listener, which it gets.
func (f *fronts) start(id string, labels map[string]string, fe *contract.FrontEnd, limits *contract.Service, l net.Listener) error {
	defer l.Close()
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.taken[id] {
		return &failure{reasonTaken, errors.New("the ledger assigns this workload anew when this node has it no more")}
	}
	listener, err := l.(*net.TCPListener).File()
	if err != nil {
		return err
	}
	defer listener.Close()
	dir, user := filepath.Join(f.dir, id), f.user()
	if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(dir, 0o700), os.Chown(dir, user, user)); err != nil {
		return err
	}
	cmd := exec.Command(f.self, "run", "s3", "--front")
	cmd.Env = []string{"PATH=/bin", fmt.Sprintf("GOMEMLIMIT=%d", limits.Memory)}
	cmd.Dir = "/"
	cmd.ExtraFiles = []*os.File{listener}
	// A group of its own: a signal to the agent's group does not reach it. The kernel ends it with the agent. The network is
	// the node's: it dials the locations.
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setpgid: true, Pdeathsig: unix.SIGKILL, Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWNS,
	}
	in, input, err := os.Pipe()
	if err != nil {
		return err
	}
	defer in.Close()
	cmd.Stdin = in
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	errs, err := cmd.StderrPipe()
	if err != nil {
		return err
	}
	x := &front{user: user, input: input, done: make(chan struct{})}
	x.status = sandbox.Status{ID: id, State: sandbox.Running, StartedAt: time.Now(), Labels: labels}
	started := make(chan error, 1)
	go f.run(id, x, cmd, out, errs, started)
	if err := <-started; err != nil {
		input.Close()
		return err
	}
	x.pid = cmd.Process
	f.all[id] = x
	// Until it is told it does nothing: it is bounded first.
	err = f.bound(id, x.pid.Pid, limits)
	if err == nil {
		err = x.tell(Front{Dir: dir, User: user, Ports: []uint16{PortLocation}, FrontEnd: *fe, Places: f.places})
	}
	if err != nil {
		x.pid.Kill()
	}
	return err
}

// firstFrontUser is the first of the users that front ends run as. Nothing else on a node has one of these.
const firstFrontUser = 748_000

// user is one that no front end has, so that none can touch another. Call it with mu held.
func (f *fronts) user() int {
	for u := firstFrontUser; ; u++ {
		taken := false
		for _, x := range f.all {
			taken = taken || x.user == u
		}
		if !taken {
			return u
		}
	}
}

// tell writes to a front end's input. One that does not read holds nobody up for long.
func (x *front) tell(m Front) error {
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if err := x.input.SetWriteDeadline(time.Now().Add(2 * time.Second)); err != nil {
		return err
	}
	_, err = x.input.Write(append(b, '\n'))
	return err
}

// run is there until the process has ended. "Parent died" goes by the thread that forked, so that this one stays.
func (f *fronts) run(id string, x *front, cmd *exec.Cmd, out, errs io.Reader, started chan<- error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer close(x.done)
	err := cmd.Start()
	started <- err
	if err != nil {
		return
	}
	var pumps sync.WaitGroup
	taken := false
	pumps.Go(func() {
		lines(out, func(s string) { taken = taken || s == FrontTaken })
	})
	pumps.Go(func() { lines(errs, func(s string) { f.note(id, s) }) })
	pumps.Wait()
	err = cmd.Wait()
	f.mu.Lock()
	s := &x.status
	s.State, s.FinishedAt = sandbox.Exited, time.Now()
	if taken {
		f.taken[id], s.Reason = true, reasonTaken
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		if s.ExitCode = exit.ExitCode(); s.ExitCode < 0 {
			s.ExitCode = 128 + int(exit.Sys().(syscall.WaitStatus).Signal())
		}
	} else if err != nil {
		s.ExitCode = -1
	}
	f.mu.Unlock()
	f.wake()
}

// lines hands on each line, of which only the beginning is kept.
func lines(r io.Reader, each func(string)) {
	b := bufio.NewReaderSize(r, 16<<10)
	for {
		line, long, err := b.ReadLine()
		if err != nil {
			return
		}
		each(strings.ToValidUTF8(string(line), "?"))
		for long && err == nil {
			_, long, err = b.ReadLine()
		}
	}
}

// frontGrace is what a front end has to end what is under way.
const frontGrace = 10 * time.Second

// stop ends one and forgets it and its directory.
func (f *fronts) stop(ctx context.Context, id string, now bool) error {
	f.mu.Lock()
	x := f.all[id]
	f.mu.Unlock()
	if x == nil {
		return nil
	}
	grace := frontGrace
	if now {
		grace = 0
	}
	x.pid.Signal(unix.SIGTERM)
	select {
	case <-x.done:
	case <-ctx.Done():
	case <-time.After(grace):
	}
	x.pid.Kill()
	<-x.done
	x.input.Close()
	f.mu.Lock()
	delete(f.all, id)
	f.mu.Unlock()
	f.unbound(id)
	return os.RemoveAll(filepath.Join(f.dir, id))
}

// stopAll ends all.
func (f *fronts) stopAll(ctx context.Context) error {
	var errs []error
	for _, s := range f.list() {
		errs = append(errs, f.stop(ctx, s.ID, false))
	}
	return errors.Join(errs...)
}

// startFront joins the network and runs the front end there.
func (c *controller) startFront(ctx context.Context, w *Workload) error {
	net := c.agent.network(w.Network)
	if net == nil {
		return &failure{notUp, fmt.Errorf("network %s is not up yet", w.Network)}
	}
	path, err := net.Attach(ctx, overlay.Attachment{ID: attachmentID(w.ID), Addr: w.Address})
	if err != nil {
		return &failure{notUp, err}
	}
	l, err := overlay.ListenAt(ctx, path, netip.AddrPortFrom(w.Address, contract.PortS3))
	if err != nil {
		return &failure{notUp, err}
	}
	if err := c.agent.fronts.start(w.Instance, labels(w), w.Process.FrontEnd, &w.Limits, l); err != nil {
		var f *failure
		if errors.As(err, &f) {
			return err
		}
		return &failure{notStarted, err}
	}
	return nil
}

// answers asks a front end for anything: whatever it says over HTTP, it is there.
func (a *Agent) answers(ctx context.Context, w *Workload) bool {
	client := http.Client{
		Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			n := a.network(w.Network)
			if n == nil {
				return nil, errors.New("its network is not up")
			}
			return n.Dial(ctx, netip.AddrPortFrom(w.Address, contract.PortS3))
		}},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+contract.FrontEndService+"/", nil)
	if err != nil {
		return false
	}
	resp, err := client.Do(r)
	if err != nil {
		return false
	}
	resp.Body.Close()
	return true
}
