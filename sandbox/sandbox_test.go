package sandbox

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"holdfast/internal/testimage"

	"golang.org/x/sys/unix"
)

// TestMain plays the shim when a Runner of a test starts this binary as one.
func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == "shim" {
		code := 0
		if err := Shim(context.Background(), os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
		syscall.Exit(code) // os.Exit sleeps for a second under the race detector
	}
	if len(os.Args) == 3 && os.Args[1] == "agent" {
		if err := agentMode(os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	if len(os.Args) == 3 && os.Args[1] == "box" {
		if err := boxMode(os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

type lab struct {
	*Runner
	t     testing.TB
	img   Image
	blobs *testimage.Image
	netns string
}

// server is the image of the test server, built once.
var server = sync.OnceValues(func() (*testimage.Image, error) {
	dir, err := os.MkdirTemp("", "server-*")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	return testimage.Server(dir)
})

func newLab(t testing.TB) *lab {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	runsc, err := filepath.Abs("../bin/holdfast-runsc")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(runsc); err != nil {
		t.Fatalf("%v: run make build first", err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=700"); err != nil {
		t.Fatal(err)
	}
	group := fmt.Sprintf("/holdfast-test-%d-%d", os.Getpid(), time.Now().UnixNano()%1e6)
	r, err := New(Config{Runsc: runsc, Self: []string{self, "shim"}, Dir: filepath.Join(dir, "s"), Cgroup: group, Lease: filepath.Join(dir, "lease")})
	if err != nil {
		t.Fatal(err)
	}
	// A namespace with nothing but a loopback, as an overlay makes it.
	name := "hfsb" + strconv.Itoa(os.Getpid())
	for _, args := range [][]string{{"netns", "add", name}, {"-n", name, "link", "set", "lo", "up"}} {
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
			t.Fatalf("ip %v: %v: %s", args, err, out)
		}
	}
	t.Cleanup(func() { exec.Command("ip", "netns", "del", name).Run() })
	l := &lab{Runner: r, t: t, netns: "/var/run/netns/" + name}
	t.Cleanup(func() {
		all, _ := r.List(context.Background())
		for _, s := range all {
			if err := r.Stop(context.Background(), s.ID); err != nil {
				t.Error(err)
			}
		}
		unix.Unmount(dir, unix.MNT_DETACH)
		machine.remove(group)
	})
	if l.blobs, err = server(); err != nil {
		t.Fatal(err)
	}
	if l.img, err = r.Unpack(t.Context(), "owner", l.blobs, l.blobs.Manifest); err != nil {
		t.Fatal(err)
	}
	return l
}

func (l *lab) start(id string, f ...func(*Spec)) {
	l.t.Helper()
	s := Spec{ID: id, Image: l.img, NetNS: l.netns, Hostname: "box", Labels: map[string]string{"a": "b"}, StopGrace: 2 * time.Second}
	for _, g := range f {
		g(&s)
	}
	if err := l.Start(l.t.Context(), s); err != nil {
		l.t.Fatal(err)
	}
}

func (l *lab) exec(id string, args ...string) (int, string) {
	l.t.Helper()
	ctx, cancel := context.WithTimeout(l.t.Context(), 10*time.Second)
	defer cancel()
	code, out, err := l.Exec(ctx, id, ExecSpec{Args: args})
	if err != nil {
		l.t.Fatal(err)
	}
	return code, string(out)
}

func (l *lab) until(what string, f func() bool) {
	l.t.Helper()
	for end := time.Now().Add(20 * time.Second); !f(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			l.t.Fatalf("%s did not come", what)
		}
	}
}

func (l *lab) state(id string) Status {
	all, err := l.List(l.t.Context())
	if err != nil {
		l.t.Fatal(err)
	}
	for _, s := range all {
		if s.ID == id {
			return s
		}
	}
	return Status{}
}

func TestLife(t *testing.T) {
	l := newLab(t)
	begin := time.Now()
	l.start("w-1", func(s *Spec) {
		s.Env = []string{"SECRET=marker-in-env"}
		s.Files = []File{{Path: "/run/secrets/pw", Mode: 0o400, Data: []byte("marker-in-file")}, {Path: "/etc/hosts", Mode: 0o644, Data: []byte("::1 localhost\n")}}
	})
	t.Logf("start to running: %v", time.Since(begin))
	l.until("health", func() bool { c, _ := l.exec("w-1", "/server", "health"); return c == 0 })
	t.Logf("start to healthy: %v", time.Since(begin))
	if s := l.state("w-1"); s.State != Running || s.Labels["a"] != "b" {
		t.Fatalf("%+v", s)
	}
	var logs strings.Builder
	if err := l.Logs(t.Context(), "w-1", false, 10, &logs); err != nil || !strings.Contains(logs.String(), "listening on 8080") || !strings.Contains(logs.String(), "greeting: image") {
		t.Fatalf("logs: %q %v", logs.String(), err)
	}
	l.start("w-1", func(s *Spec) { // again: nothing happens
		s.Env = []string{"SECRET=marker-in-env"}
		s.Files = []File{{Path: "/run/secrets/pw", Mode: 0o400, Data: []byte("marker-in-file")}, {Path: "/etc/hosts", Mode: 0o644, Data: []byte("::1 localhost\n")}}
	})
	if err := l.Stop(t.Context(), "w-1"); err != nil {
		t.Fatal(err)
	}
	logs.Reset()
	if err := l.Logs(t.Context(), "w-1", false, 10, &logs); err != nil || !strings.Contains(logs.String(), "terminated") {
		t.Errorf("it was not asked to stop before it was ended: %q %v", logs.String(), err)
	}
	if s := l.state("w-1"); s.ID != "" {
		t.Errorf("stopped, but %+v", s)
	}
	if err := l.Stop(t.Context(), "w-1"); err != nil {
		t.Errorf("stopping what is stopped: %v", err)
	}
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || strings.Contains(string(b), l.cfg.Dir+"/bundles/w-1") {
		t.Errorf("a mount is left: %v", err)
	}
}

func TestNotesAreInTheLog(t *testing.T) {
	r := runner(t)
	read := func() string {
		var out strings.Builder
		if err := r.Logs(t.Context(), "w", false, 100, &out); err != nil {
			t.Fatal(err)
		}
		return out.String()
	}
	if err := r.Note("w", "image\nrefused: \xff "+strings.Repeat("x", 10_000)); err != nil {
		t.Fatal(err)
	}
	if s := read(); strings.Count(s, "\n") != 1 || !strings.Contains(s, "Z holdfast: image refused: ? x") || len(s) > 4100 {
		t.Errorf("%d bytes: %.100q", len(s), s)
	}
	for range 2000 {
		if err := r.Note("w", strings.Repeat("x", 4000)); err != nil {
			t.Fatal(err)
		}
	}
	if st, err := os.Stat(filepath.Join(r.cfg.Dir, "logs", "w", "log")); err != nil || st.Size() > maxLog+5000 {
		t.Errorf("notes grow without bound: %v %v", st.Size(), err)
	}
	if err := r.Note("../w", "x"); err == nil {
		t.Error("a note outside")
	}
}

func TestMemoryAndCPULimitsBite(t *testing.T) {
	l := newLab(t)
	spin := func(id string) int {
		_, out := l.exec(id, "/server", "spin", "1000")
		n, err := strconv.Atoi(strings.TrimSpace(out))
		if err != nil {
			t.Fatalf("%s: %q", id, out)
		}
		return n
	}
	l.start("free")
	l.start("bound", func(s *Spec) { s.CPUMilli, s.MemoryBytes = 200, 96<<20 })
	if free, bound := spin("free"), spin("bound"); bound*2 > free {
		t.Errorf("a fifth of a core did %d rounds, a whole one %d", bound, free)
	}
	if code, out := l.exec("free", "/server", "alloc", "256"); code != 0 {
		t.Errorf("control: 256 MiB without a limit: %d %s", code, out)
	}
	if code, out := l.exec("bound", "/server", "alloc", "8"); code != 0 {
		t.Errorf("control: 8 MiB of 96: %d %s", code, out)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if code, out, err := l.Exec(ctx, "bound", ExecSpec{Args: []string{"/server", "alloc", "256"}}); err == nil && code == 0 {
		t.Errorf("256 MiB were given to a workload of 96: %s", out)
	}
	l.until("the end of what took too much", func() bool { return l.state("bound").State == Exited })
	if s := l.state("bound"); !s.OOM || s.Reason != "out of memory" {
		t.Errorf("out of memory, but %+v", s)
	}
	// Files in the root are memory too.
	l.start("files", func(s *Spec) { s.MemoryBytes = 96 << 20; s.Args = []string{"/server", "sleep"} })
	l.Exec(ctx, "files", ExecSpec{Args: []string{"/server", "fill", "/big", "256"}})
	l.until("the end of what wrote too much", func() bool { return l.state("files").State == Exited })
	if s := l.state("free"); s.State != Running {
		t.Errorf("a neighbour suffered: %+v", s)
	}
}

func TestProcessLimitBites(t *testing.T) {
	l := newLab(t)
	forked := func(id string, n int) int {
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		_, out, _ := l.Exec(ctx, id, ExecSpec{Args: []string{"/server", "fork", strconv.Itoa(n)}})
		got, _ := strconv.Atoi(strings.Fields(string(out) + " 0")[0])
		return got
	}
	l.start("free")
	l.start("bound", func(s *Spec) { s.Pids = 60 })
	if n := forked("free", 80); n != 80 {
		t.Errorf("control: without a limit %d of 80 processes came up", n)
	}
	if n := forked("bound", 80); n >= 60 || n < 3 {
		t.Errorf("under a limit of 60, %d of 80 processes came up", n)
	}
	if s := l.state("bound"); s.State != Running {
		t.Errorf("a fork that is refused ended the sandbox: %+v", s)
	}
	// Who may get around gVisor's limit meets the machine's.
	l.start("strong", func(s *Spec) { s.Pids, s.CapAdd = 10, []string{"SYS_RESOURCE"} })
	limit := 10*tasksPerTask + hostTasks
	if n := forked("strong", 400); n >= 400 {
		t.Errorf("%d processes came up where the machine allows %d tasks", n, limit)
	}
	if s := l.state("free"); s.State != Running {
		t.Errorf("a neighbour suffered: %+v", s)
	}
}

func TestNothingToGain(t *testing.T) {
	l := newLab(t)
	l.start("plain")
	l.start("none", func(s *Spec) { s.CapDrop = []string{"ALL"} })
	l.start("more", func(s *Spec) { s.CapAdd = []string{"NET_RAW"} })
	l.start("user", func(s *Spec) { s.User = "user" })
	l.start("fixed", func(s *Spec) { s.ReadOnly = true })
	field := func(id, name string) string {
		_, out := l.exec(id, "/server", "status")
		for line := range strings.Lines(out) {
			if v, ok := strings.CutPrefix(line, name+":"); ok {
				return strings.TrimSpace(v)
			}
		}
		return ""
	}
	const netRaw = 1 << 13
	bits := func(id string) uint64 {
		n, err := strconv.ParseUint(field(id, "CapEff"), 16, 64)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	if c := bits("plain"); c&netRaw != 0 || c == 0 || c>>21&1 != 0 {
		t.Errorf("default capabilities %x", c)
	}
	if n := field("plain", "NoNewPrivs"); n != "1" {
		t.Errorf("NoNewPrivs is %q", n)
	}
	if c := bits("none"); c != 0 {
		t.Errorf("dropped all, has %x", c)
	}
	if c := bits("more"); c&netRaw == 0 {
		t.Errorf("added NET_RAW, has %x", c)
	}
	if c := bits("user"); c != 0 || !strings.HasPrefix(field("user", "Uid"), "1000") {
		t.Errorf("a user has %x, UID %s", c, field("user", "Uid"))
	}
	if code, _ := l.exec("fixed", "/server", "write", "/x"); code == 0 {
		t.Error("the read-only root was written")
	}
	if code, out := l.exec("plain", "/server", "write", "/x"); code != 0 {
		t.Errorf("control: %s", out)
	}
}

func TestFenceEndsWithTheLease(t *testing.T) {
	l := newLab(t)
	l.lease(time.Hour)
	l.start("fenced", func(s *Spec) { s.Fenced = true })
	l.start("free")
	time.Sleep(500 * time.Millisecond) // the control: with a lease it goes on
	if s := l.state("fenced"); s.State != Running {
		t.Fatalf("ended within its lease: %+v", s)
	}
	l.lease(300 * time.Millisecond)
	begin := time.Now()
	l.until("the fence", func() bool { return l.state("fenced").State == Exited })
	if d := l.state("fenced").FinishedAt.Sub(begin); d < 250*time.Millisecond || d > 1300*time.Millisecond {
		t.Errorf("ended %v after the lease was cut to 300 ms", d)
	}
	if s := l.state("fenced"); s.Reason != "its lease ended" {
		t.Errorf("%+v", s)
	}
	if s := l.state("free"); s.State != Running {
		t.Errorf("the unfenced one ended too: %+v", s)
	}
}

func TestAnotherRunnerAdopts(t *testing.T) {
	l := newLab(t)
	l.start("a")
	l.start("ends", func(s *Spec) { s.Args = []string{"/server", "fail"} })
	begin := l.state("a").StartedAt
	r2, err := New(l.cfg)
	if err != nil {
		t.Fatal(err)
	}
	l.Runner = r2
	l.until("the end", func() bool { return l.state("ends").State == Exited })
	if s := l.state("ends"); s.ExitCode != 3 {
		t.Errorf("%+v", s)
	}
	if s := l.state("a"); s.State != Running || !s.StartedAt.Equal(begin) {
		t.Errorf("not adopted: %+v", s)
	}
	// The shim is killed: the sandbox counts as ended, and Stop leaves nothing of it.
	var st statusFile
	if err := readJSON(filepath.Join(l.bundle("a"), "status.json"), &st); err != nil {
		t.Fatal(err)
	}
	unix.Kill(st.PID, unix.SIGKILL)
	l.until("the news of the shim's death", func() bool { return l.state("a").State == Exited })
	if err := l.Stop(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	left, _ := filepath.Glob("/sys/fs/cgroup/*" + l.cfg.Cgroup + "/a")
	if len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	// A bundle that an agent left half made is no sandbox, and is swept with its mount.
	for _, d := range []string{"rootfs", "upper", "work"} {
		if err := os.MkdirAll(filepath.Join(l.bundle("half"), d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := mountRoot(l.cfg.Dir, l.bundle("half"), l.img); err != nil {
		t.Fatal(err)
	}
	if left := l.leftovers(); !strings.Contains(strings.Join(left, ""), "bundles/half/rootfs") {
		t.Fatalf("control: %v", left)
	}
	if s := l.state("half"); s.ID != "" {
		t.Errorf("half made, but %+v", s)
	}
	if left := strings.Join(l.leftovers(), "\n"); strings.Contains(left, "half") {
		t.Errorf("left %v", left)
	}
	l.start("half")
}
