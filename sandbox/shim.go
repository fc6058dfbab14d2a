package sandbox

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Bounds of a sandbox's logs: two files, and lines that are longer are cut into several.
const (
	maxLog  = 2 << 20
	maxLine = 16 << 10
)

// Shim runs one sandbox to its end. It is the body of a process of its own, which inherits the bundle's lock as file
// descriptor 3. SIGTERM asks it to stop the workload.
func Shim(ctx context.Context, bundle string) error {
	unix.CloseOnExec(3) // runsc must not hold the lock
	// Secrets pass through this process: no core dump, no ptrace by others of the same user.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("shim: %w", err)
	}
	var cfg shimFile
	if err := readJSON(filepath.Join(bundle, "shim.json"), &cfg); err != nil {
		return fmt.Errorf("shim: %w", err)
	}
	s := &shim{cfg: cfg, bundle: bundle, st: statusFile{PID: os.Getpid(), State: "starting"}}
	stop := make(chan os.Signal, 4)
	signal.Notify(stop, unix.SIGTERM, unix.SIGINT)
	if err := s.save(); err != nil {
		return fmt.Errorf("shim: %w", err)
	}
	return s.run(ctx, stop)
}

type shim struct {
	cfg    shimFile
	bundle string
	mu     sync.Mutex
	st     statusFile
}

func (s *shim) save() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return writeJSON(filepath.Join(s.bundle, "status.json"), s.st)
}

func (s *shim) run(ctx context.Context, stop <-chan os.Signal) error {
	log, err := openLog(s.cfg.Logs)
	if err != nil {
		return fmt.Errorf("shim: %w", err)
	}
	defer log.close()
	pidFile := filepath.Join(s.bundle, "pid")
	argv := append(append([]string{}, s.cfg.Runsc...), "run", "--bundle", s.bundle, "--pid-file", pidFile, s.cfg.ID)
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Env = []string{"PATH=/bin"}
	cmd.Dir = "/"
	out, err := cmd.StdoutPipe()
	if err != nil {
		return fmt.Errorf("shim: %w", err)
	}
	errs, err := cmd.StderrPipe()
	if err != nil {
		return fmt.Errorf("shim: %w", err)
	}
	// A group of its own: a signal to the shim's group must reach the workload through Stop only.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return s.end(-1, fmt.Sprintf("start runsc: %v", err))
	}
	var pumps sync.WaitGroup
	var lastErr tailWriter
	pumps.Go(func() { log.copy(out, nil) })
	pumps.Go(func() { log.copy(errs, &lastErr) })
	done := make(chan error, 1)
	go func() {
		pumps.Wait()
		done <- cmd.Wait()
	}()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	reason := ""
	var kill <-chan time.Time
	started := false
	for {
		select {
		case err := <-done:
			return s.finish(err, started, reason, lastErr.String())
		case <-tick.C:
			if !started {
				if b, err := os.ReadFile(pidFile); err == nil && len(b) > 0 {
					started = true
					s.mu.Lock()
					s.st.State, s.st.Started = Running, time.Now()
					s.mu.Unlock()
					if err := s.save(); err != nil {
						return fmt.Errorf("shim: %w", err)
					}
					tick.Reset(200 * time.Millisecond)
				} else {
					tick.Reset(5 * time.Millisecond)
				}
			}
			if s.cfg.Fenced && reason == "" && s.expired() {
				// Whoever is assigned next may begin after lease and margin: no grace.
				reason = "its lease ended"
				s.command(10*time.Second, "kill", "--all", s.cfg.ID, "KILL")
				kill = time.After(time.Second)
			}
		case <-stop:
			if reason != "" {
				break
			}
			reason = "stopped"
			sig := strings.TrimPrefix(s.cfg.Signal, "SIG")
			if sig == "" {
				sig = "TERM"
			}
			s.command(5*time.Second, "kill", s.cfg.ID, sig)
			kill = time.After(s.cfg.Grace)
		case <-kill:
			s.command(10*time.Second, "kill", "--all", s.cfg.ID, "KILL")
			s.command(10*time.Second, "delete", "--force", s.cfg.ID)
			kill = time.After(5 * time.Second)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (s *shim) expired() bool {
	b, err := os.ReadFile(s.cfg.Lease)
	if err != nil || len(b) != 8 {
		return true
	}
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return true
	}
	return ts.Nano() >= int64(binary.LittleEndian.Uint64(b))
}

// command runs runsc with a time-out; the container may be gone, so that an error says nothing.
func (s *shim) command(limit time.Duration, args ...string) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, s.cfg.Runsc[0], append(append([]string{}, s.cfg.Runsc[1:]...), args...)...)
	cmd.Env = []string{"PATH=/bin"}
	cmd.WaitDelay = time.Second
	_ = cmd.Run()
}

func (s *shim) finish(err error, started bool, reason, said string) error {
	code := 0
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		if code = exit.ExitCode(); code < 0 {
			code = 128 + int(exit.Sys().(syscall.WaitStatus).Signal())
		}
	} else if err != nil {
		code, reason = -1, err.Error()
	}
	oom := s.outOfMemory()
	s.command(20*time.Second, "delete", "--force", s.cfg.ID)
	if f, err := os.Create(filepath.Join(s.bundle, "deleted")); err == nil {
		f.Close()
	}
	if !started && reason == "" {
		reason = fmt.Sprintf("runsc: exit code %d: %s", code, said)
	}
	s.mu.Lock()
	s.st.OOM = oom
	s.mu.Unlock()
	return s.end(code, reason)
}

func (s *shim) end(code int, reason string) error {
	s.mu.Lock()
	s.st.State, s.st.ExitCode, s.st.Reason, s.st.Finished = Exited, code, reason, time.Now()
	s.mu.Unlock()
	return s.save()
}

// outOfMemory asks the cgroup whether the kernel killed for want of memory.
func (s *shim) outOfMemory() bool {
	if s.cfg.Cgroup == "" {
		return false
	}
	for _, f := range []string{"/sys/fs/cgroup/memory" + s.cfg.Cgroup + "/memory.oom_control", "/sys/fs/cgroup" + s.cfg.Cgroup + "/memory.events"} {
		b, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(b)) {
			if n, ok := strings.CutPrefix(strings.TrimSpace(line), "oom_kill "); ok && n != "0" {
				return true
			}
		}
	}
	return false
}

// logFile is the bounded log of one sandbox.
type logFile struct {
	dir  string
	mu   sync.Mutex
	f    *os.File
	size int64
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

// copy writes lines until r ends. It never stops reading: a full log must not block the workload.
func (l *logFile) copy(r io.Reader, also *tailWriter) {
	br := bufio.NewReaderSize(r, maxLine)
	for {
		line, err := br.ReadSlice('\n')
		if len(line) > 0 {
			if also != nil {
				also.Write(line)
			}
			l.write(line)
		}
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			return
		}
	}
}

func (l *logFile) write(line []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.size+int64(len(line))+1 > maxLog {
		os.Rename(filepath.Join(l.dir, "log"), filepath.Join(l.dir, "log.1"))
		if f, err := os.OpenFile(filepath.Join(l.dir, "log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600); err == nil {
			l.f.Close()
			l.f, l.size = f, 0
		}
	}
	n, _ := l.f.Write(line)
	l.size += int64(n)
	if len(line) > 0 && line[len(line)-1] != '\n' {
		n, _ = l.f.Write([]byte{'\n'})
		l.size += int64(n)
	}
}

// tailWriter keeps the last bytes written, for a message.
type tailWriter struct {
	mu sync.Mutex
	b  []byte
}

func (t *tailWriter) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.b = append(t.b, p...); len(t.b) > 1000 {
		t.b = t.b[len(t.b)-1000:]
	}
	return len(p), nil
}

func (t *tailWriter) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.TrimSpace(string(t.b))
}
