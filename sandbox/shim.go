package sandbox

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Bounds of a sandbox's logs: two files, and longer lines are cut into several.
const (
	maxLog  = 2 << 20
	maxLine = 16 << 10
)

// Shim runs one sandbox to its end. It is the body of a process of its own, which inherits the bundle's lock as file
// descriptor 3. SIGTERM or the end of ctx asks it to stop the workload, SIGUSR1 to end it at once. When it is killed itself, the kernel kills runsc and
// with it the sandbox: a fenced workload never runs without its watchdog.
func Shim(ctx context.Context, bundle string) error {
	unix.CloseOnExec(3) // runsc must not hold the lock
	// Secrets pass through this process: no ptrace by others of the same user, and no core dumps, neither its own nor those
	// of the sandbox, which would put the workload's memory on a disk.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("shim: %w", err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("shim: %w", err)
	}
	var cfg shimFile
	if err := readJSON(filepath.Join(bundle, "shim.json"), &cfg); err != nil {
		return fmt.Errorf("shim: %w", err)
	}
	s := &shim{cfg: cfg, bundle: bundle, st: statusFile{PID: os.Getpid(), State: "starting"}, sandbox: -1}
	stop := make(chan os.Signal, 4)
	signal.Notify(stop, unix.SIGTERM, unix.SIGINT, atOnce)
	if err := s.save(); err != nil {
		return fmt.Errorf("shim: %w", err)
	}
	if err := s.run(ctx, stop); err != nil {
		return fmt.Errorf("shim: %w", err)
	}
	return nil
}

// Reasons of a Status that say nothing of what ran. Any other reason may quote the image or the command.
const (
	ReasonLease   = "its lease ended"
	ReasonStopped = "stopped"
	ReasonMemory  = "out of memory"
	ReasonShim    = "its shim was killed"
)

// LeaseSize is that of a lease file: the deadline in nanoseconds of CLOCK_BOOTTIME, 8 little-endian bytes, and the boot that
// it is of, 16 bytes (/proc/sys/kernel/random/boot_id without its dashes). It is written in place.
const LeaseSize = 24

// atOnce is the signal that ends a sandbox without a grace.
const atOnce = unix.SIGUSR1

// A shim is used by one goroutine.
type shim struct {
	cfg     shimFile
	bundle  string
	st      statusFile
	runsc   *exec.Cmd
	sandbox int // pidfd of gVisor's kernel once it is there, else -1
}

func (s *shim) save() error { return writeJSON(filepath.Join(s.bundle, "status.json"), s.st) }

func (s *shim) run(ctx context.Context, stop <-chan os.Signal) error {
	// The kernel's "parent died" goes by the thread that forked, so that this one must live as long as the process.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if s.cfg.Fenced && s.expired() {
		return s.end(-1, ReasonLease)
	}
	log, err := openLog(s.cfg.Logs)
	if err != nil {
		return err
	}
	defer log.close()
	pidFile := filepath.Join(s.bundle, "pid")
	cmd := exec.Command(s.cfg.Runsc[0], append(slices.Clone(s.cfg.Runsc[1:]), "run", "--bundle", s.bundle, "--pid-file", pidFile, s.cfg.ID)...)
	cmd.Env = []string{"PATH=/bin"}
	cmd.Dir = "/"
	var pipes []*os.File
	for _, to := range []*io.Writer{&cmd.Stdout, &cmd.Stderr} {
		r, w, err := os.Pipe()
		if err != nil {
			return err
		}
		defer r.Close()
		defer w.Close()
		pipes = append(pipes, r, w)
		*to = w
	}
	// A group of its own: a signal to the shim's group must reach the workload through Stop only.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: unix.SIGKILL}
	if err := cmd.Start(); err != nil {
		return s.end(-1, fmt.Sprintf("start runsc: %v", err))
	}
	s.runsc = cmd
	var pumps sync.WaitGroup
	for i := 0; i < len(pipes); i += 2 {
		pipes[i+1].Close()
		pumps.Go(func() { log.copy(pipes[i]) })
	}
	done := make(chan error, 1)
	go func() {
		err := cmd.Wait()
		// What was written last is read to its end, but a stray process that holds the pipe does not keep us.
		late := time.AfterFunc(2*time.Second, func() {
			for _, p := range pipes {
				p.Close()
			}
		})
		pumps.Wait()
		late.Stop()
		done <- err
	}()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	reason := ""
	var kill <-chan time.Time
	ask := func() {
		if reason != "" {
			return
		}
		reason = ReasonStopped
		if s.st.Started.IsZero() {
			s.kill() // there is nothing yet that could end in an orderly way
			kill = time.After(time.Second)
			return
		}
		sig := strings.TrimPrefix(s.cfg.Signal, "SIG")
		if sig == "" {
			sig = "TERM"
		}
		kill = time.After(s.cfg.Grace)
		// Beside the loop, so that a runsc that hangs holds up neither the end of the grace nor the fence.
		go s.command(min(s.cfg.Grace, 10*time.Second), "kill", s.cfg.ID, sig)
	}
	ended := ctx.Done() // a context that ends with SIGTERM does no harm: it asks for the same
	for {
		select {
		case err := <-done:
			return s.finish(err, reason)
		case <-tick.C:
			if s.sandbox < 0 {
				s.find(pidFile)
			} else if s.st.Started.IsZero() && s.runs() {
				s.st.State, s.st.Started = Running, time.Now()
				if err := s.save(); err != nil {
					return err
				}
				tick.Reset(100 * time.Millisecond)
			}
			if s.cfg.Fenced && reason != ReasonLease && s.expired() {
				// Whoever is assigned next may begin after lease and margin: no grace.
				reason = ReasonLease
				s.kill()
				kill = time.After(time.Second)
			}
		case sig := <-stop:
			if sig == atOnce {
				reason = cmp.Or(reason, ReasonStopped)
				s.kill()
				kill = time.After(time.Second)
			} else {
				ask()
			}
		case <-ended:
			ended = nil
			ask()
		case <-kill:
			s.kill()
			kill = time.After(time.Second)
		}
	}
}

// find takes hold of the sandbox's process when runsc has named it. The process is there then: only runsc reaps it.
func (s *shim) find(pidFile string) {
	b, err := os.ReadFile(pidFile)
	if err != nil {
		return
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || pid <= 1 {
		return
	}
	if fd, err := unix.PidfdOpen(pid, 0); err == nil {
		s.sandbox = fd
	}
}

// runs reports whether the workload's first process has begun, by the state that runsc keeps (OCI's words).
func (s *shim) runs() bool {
	var state struct{ Status string }
	return readJSON(s.state(), &state) == nil && state.Status == "running"
}

func (s *shim) state() string { return stateFile(s.cfg.State, s.cfg.ID) }

// stateFile is where runsc keeps what it knows of a container.
func stateFile(dir, id string) string { return filepath.Join(dir, id+"_sandbox:"+id+".state") }

// kill ends the sandbox at once by ending gVisor's kernel, the parent of all that runs in it. It executes nothing and asks
// nobody, so that it works on a machine that has no memory left, and whatever the workload does.
func (s *shim) kill() {
	if s.sandbox >= 0 {
		if err := unix.PidfdSendSignal(s.sandbox, unix.SIGKILL, nil, 0); err == nil {
			return
		}
	}
	s.runsc.Process.Kill() // its children are killed with it
}

// expired asks twice before it says so: the first answer may be a deadline that was just being written.
func (s *shim) expired() bool {
	for range 2 {
		if !s.ended() {
			return false
		}
	}
	return true
}

func (s *shim) ended() bool {
	b, err := os.ReadFile(s.cfg.Lease)
	if err != nil || len(b) != LeaseSize {
		return true
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil || strings.ReplaceAll(strings.TrimSpace(string(boot)), "-", "") != hex.EncodeToString(b[8:]) {
		return true // of a boot before this one, whose clock was another
	}
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return true
	}
	return ts.Nano() >= int64(binary.LittleEndian.Uint64(b))
}

// command runs runsc with a time-out; the container may be gone, so that an error says nothing. It uses the configuration
// only, so that it may run beside the loop.
func (s *shim) command(limit time.Duration, args ...string) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, s.cfg.Runsc[0], append(append([]string{}, s.cfg.Runsc[1:]...), args...)...)
	cmd.Env = []string{"PATH=/bin"}
	cmd.WaitDelay = time.Second
	_ = cmd.Run()
}

func (s *shim) finish(err error, reason string) error {
	code := 0
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		if code = exit.ExitCode(); code < 0 {
			code = 128 + int(exit.Sys().(syscall.WaitStatus).Signal())
		}
	} else if err != nil {
		code, reason = -1, err.Error()
	}
	s.st.OOM = s.cfg.Cgroup != "" && machine.outOfMemory(s.cfg.Cgroup)
	// runsc deletes in the end what it has run, unless it was killed or could not.
	if _, err := os.Stat(s.state()); err == nil {
		s.command(20*time.Second, "delete", "--force", s.cfg.ID)
	}
	if said := s.complaint(); reason == "" && s.st.OOM {
		reason = ReasonMemory
	} else if reason == "" && said != "" {
		reason = "runsc: " + said
	} else if reason == "" && s.st.Started.IsZero() {
		reason = fmt.Sprintf("runsc: exit code %d", code)
	}
	return s.end(code, reason)
}

// complaint is the last error in runsc's log: why it could not start the workload, or lost it.
func (s *shim) complaint() string {
	f, err := os.Open(filepath.Join(s.bundle, "runsc.log"))
	if err != nil {
		return ""
	}
	defer f.Close()
	last := ""
	for sc := bufio.NewScanner(io.LimitReader(f, maxLog)); sc.Scan(); {
		var l struct{ Msg, Level string }
		if json.Unmarshal(sc.Bytes(), &l) == nil && l.Level == "error" {
			last = l.Msg
		}
	}
	return fmt.Sprintf("%.1000s", last)
}

func (s *shim) end(code int, reason string) error {
	s.st.State, s.st.ExitCode, s.st.Reason, s.st.Finished = Exited, code, reason, time.Now()
	return s.save()
}

// logFile is the bounded log of one sandbox.
type logFile struct {
	dir  string
	mu   sync.Mutex
	f    *os.File
	size int64
	line []byte
}

func openLog(dir string) (*logFile, error) {
	f, err := os.OpenFile(filepath.Join(dir, "log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	return &logFile{dir: dir, f: f, size: st.Size()}, nil
}

func (l *logFile) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.f.Close()
}

// logRate bounds the bytes a second that each stream may write. Above it the workload waits: what it writes costs work
// here, outside its limits.
const logRate = 4 << 20

// copy writes lines until r ends. It never stops reading: a full log does not block the workload.
func (l *logFile) copy(r io.Reader) {
	br := bufio.NewReaderSize(r, maxLine)
	begin, sum := time.Now(), 0
	for {
		line, err := br.ReadSlice('\n')
		if len(line) > 0 {
			l.write(line)
		}
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			return
		}
		if sum += len(line) + len(logTime); sum >= logRate/4 {
			time.Sleep(time.Second/4 - time.Since(begin))
			begin, sum = time.Now(), 0
		}
	}
}

// logTime is how each line begins, in UTC.
const logTime = "2006-01-02T15:04:05.000Z "

func (l *logFile) write(line []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.line = append(time.Now().UTC().AppendFormat(l.line[:0], logTime), bytes.TrimSuffix(line, []byte{'\n'})...)
	l.line = append(l.line, '\n')
	if l.size+int64(len(l.line)) > maxLog {
		os.Rename(filepath.Join(l.dir, "log"), filepath.Join(l.dir, "log.1"))
		if f, err := os.OpenFile(filepath.Join(l.dir, "log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600); err == nil {
			l.f.Close()
			l.f, l.size = f, 0
		} else {
			return // rather lose a line than grow without bound
		}
	}
	n, _ := l.f.Write(l.line)
	l.size += int64(n)
}
