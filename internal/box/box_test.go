package box

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestMain plays init and the daemon inside boxes.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "init":
			if err := Init(); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			os.Exit(0)
		case "daemon":
			playDaemon()
			os.Exit(0)
		case "orphan":
			time.Sleep(time.Hour)
		case "supervise":
			ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
			defer stop()
			if err := Supervise(ctx, testPlan(os.Args[2]), nil); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			os.Exit(0)
		}
	}
	os.Exit(m.Run())
}

// playDaemon listens on 80, writes what it sees, and counts its starts.
func playDaemon() {
	var seen []string
	filepath.WalkDir("/", func(p string, d os.DirEntry, err error) error {
		if strings.HasPrefix(p, "/proc/") || strings.HasPrefix(p, "/sys/") || strings.HasPrefix(p, "/dev/") {
			return filepath.SkipDir
		}
		seen = append(seen, p)
		return nil
	})
	os.WriteFile("/data/seen", []byte(strings.Join(seen, "\n")), 0o644)
	f, _ := os.OpenFile("/data/starts", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	fmt.Fprintln(f, os.Getpid())
	f.Close()
	if _, err := os.Stat("/data/orphan"); err != nil {
		c := exec.Command("/bin/daemon", "orphan")
		c.SysProcAttr = &unix.SysProcAttr{Setsid: true}
		c.Start()
		os.WriteFile("/data/orphan", fmt.Append(nil, c.Process.Pid), 0o644)
		// A group of its own below the box's, as runsc makes for a sandbox.
		if b, err := os.ReadFile("/etc/holdfast/config.json"); err == nil {
			g := filepath.Join("/sys/fs/cgroup/freezer", strings.TrimSpace(string(b)), "work")
			os.MkdirAll(g, 0o755)
			os.WriteFile(filepath.Join(g, "cgroup.procs"), fmt.Append(nil, c.Process.Pid), 0o644)
		}
	}
	l, err := net.Listen("tcp", ":80")
	if err != nil {
		fmt.Println(err)
		return
	}
	term := make(chan os.Signal, 1)
	signal.Notify(term, unix.SIGTERM)
	go func() { <-term; os.WriteFile("/data/terminated", nil, 0o644); os.Exit(0) }()
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		fmt.Fprint(c, "hello")
		c.Close()
	}
}

func testPlan(dir string) Plan {
	self, _ := os.Executable()
	id := filepath.Base(dir)
	bins := map[string]string{"/bin/daemon": self}
	if out, err := exec.Command("ldd", self).Output(); err == nil { // a test with the race detector is not static
		for f := range strings.FieldsSeq(string(out)) {
			if strings.HasPrefix(f, "/") {
				bins[f] = f
			}
		}
	}
	p := Plan{Dir: dir, Self: []string{self, "init"}, Segments: []int{1, 2}, Cgroup: "/hfbox-" + id}
	for i, name := range []string{"one", "two"} {
		d := filepath.Join(dir, "data-"+name)
		os.MkdirAll(d, 0o755)
		cg := p.Cgroup + "/" + name
		cfg := filepath.Join(dir, name+".cfg")
		os.WriteFile(cfg, []byte(cg), 0o600)
		p.Boxes = append(p.Boxes, Spec{
			Name: name, Args: []string{"/bin/daemon", "daemon"}, Binaries: bins, Data: d, Config: cfg,
			Log: filepath.Join(dir, "log", name), Cgroup: cg, Uplink: &Uplink{Segment: i + 1, Host: 2}, Grace: 5 * time.Second,
		})
	}
	return p
}

func until(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !f(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s did not come", what)
		}
	}
}

type grid struct {
	t   *testing.T
	dir string
	sup *exec.Cmd
}

func newGrid(t *testing.T) *grid {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	dir, err := os.MkdirTemp("", "hfbox")
	if err != nil {
		t.Fatal(err)
	}
	g := &grid{t: t, dir: dir}
	t.Cleanup(func() {
		if t.Failed() {
			for _, n := range []string{"one", "two"} {
				b, _ := os.ReadFile(filepath.Join(dir, "log", n))
				t.Logf("log of %s: %s", n, b)
			}
		}
		if err := StopAll(context.Background(), dir); err != nil {
			t.Error(err)
		}
		os.RemoveAll(dir)
	})
	g.supervise()
	return g
}

func (g *grid) supervise() {
	self, _ := os.Executable()
	g.sup = exec.Command(self, "supervise", g.dir)
	g.sup.Stderr = os.Stderr
	if err := g.sup.Start(); err != nil {
		g.t.Fatal(err)
	}
	go g.sup.Wait()
}

func (g *grid) running() map[string]Box {
	r, err := Running(g.dir)
	if err != nil {
		g.t.Fatal(err)
	}
	return r
}

// say asks box name's daemon from the other box's namespace.
func (g *grid) say(from string, to netip.Addr) string {
	b, ok := g.running()[from]
	if !ok {
		return ""
	}
	ctx, cancel := context.WithTimeout(g.t.Context(), 300*time.Millisecond)
	defer cancel()
	c, err := DialIn(ctx, b.NetNS(), netip.AddrPortFrom(to, 80).String())
	if err != nil {
		return ""
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(300 * time.Millisecond))
	buf := make([]byte, 5)
	n, _ := c.Read(buf)
	return string(buf[:n])
}

func (g *grid) file(box, name string) string {
	b, _ := os.ReadFile(filepath.Join(g.dir, "data-"+box, name))
	return string(b)
}

func TestBoxes(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "secret-of-the-host")
	if err := os.WriteFile(secret, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	g := newGrid(t)
	two6, two4 := addr6(2, 2), addr4(2, 2)
	until(t, "a word from one box to another", func() bool { return g.say("one", two6) == "hello" && g.say("one", two4) == "hello" })

	t.Run("a box sees nothing of the host but what it is given", func(t *testing.T) {
		for line := range strings.Lines(g.file("one", "seen")) {
			p := strings.TrimSpace(line)
			ok := p == "/"
			for _, want := range []string{"/bin", "/data", "/dev", "/etc", "/proc", "/run", "/sys", "/tmp", "/lib", "/lib64"} {
				ok = ok || p == want || (want == "/data" || want == "/bin" || strings.HasPrefix(want, "/lib") || want == "/etc") && strings.HasPrefix(p, want+"/")
			}
			if !ok || strings.Contains(p, "secret-of-the-host") {
				t.Errorf("it sees %s", p)
			}
		}
		if _, err := os.Stat(secret); err != nil {
			t.Errorf("control: %v", err)
		}
	})
	t.Run("a machine that is plugged in costs nobody the router", func(t *testing.T) {
		top := &Topology{Router: g.running()["internet"]}
		taken := map[Uplink]bool{}
		for range 12 {
			u, err := top.Free(1)
			if err != nil {
				t.Fatal(err)
			}
			if taken[u] || u.Host == 2 {
				t.Fatalf("%+v is free, and somebody has it", u)
			}
			taken[u] = true
			f, err := top.Tap(u)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if g.say("one", two4) != "hello" {
				t.Fatalf("with a cable to %+v the neighbours do not find their router", u)
			}
		}
		if u, err := top.Free(1); err == nil {
			t.Errorf("the segment is full, and %+v is free", u)
		}
	})
	t.Run("the host has no route into the grid", func(t *testing.T) {
		c, err := net.DialTimeout("tcp", netip.AddrPortFrom(two4, 80).String(), 300*time.Millisecond)
		if err == nil {
			// Something on the way may answer for anybody: only the box's own word counts.
			defer c.Close()
			c.SetDeadline(time.Now().Add(300 * time.Millisecond))
			buf := make([]byte, 5)
			if n, _ := c.Read(buf); string(buf[:n]) == "hello" {
				t.Error("it has")
			}
		}
	})
	t.Run("a killed daemon starts again and its orphans live", func(t *testing.T) {
		b := g.running()["one"]
		child := childOf(t, b.PID, "daemon")
		orphan := childOf(t, b.PID, "orphan")
		unix.Kill(child, unix.SIGKILL)
		until(t, "a second start", func() bool {
			return strings.Count(g.file("one", "starts"), "\n") >= 2 && g.say("two", addr6(1, 2)) == "hello"
		})
		if g.running()["one"] != b {
			t.Error("the box started anew")
		}
		if childOf(t, b.PID, "orphan") != orphan {
			t.Error("the orphan died with the daemon")
		}
	})
	t.Run("paused is silent, resumed goes on", func(t *testing.T) {
		b := g.running()["two"]
		orphan := childOf(t, b.PID, "orphan")
		Ask(g.dir, "two", Paused)
		until(t, "silence", func() bool { return g.say("one", two6) == "" })
		state, _ := os.ReadFile("/sys/fs/cgroup/freezer" + "/hfbox-" + filepath.Base(g.dir) + "/two/work/freezer.state")
		if s := strings.TrimSpace(string(state)); s != "FROZEN" {
			t.Errorf("process %d in a group of its own is %s", orphan, s)
		}
		Ask(g.dir, "two", Up)
		until(t, "a word", func() bool { return g.say("one", two6) == "hello" })
		if g.running()["two"] != b {
			t.Error("the box started anew")
		}
	})
	t.Run("cut is unreachable, joined is back", func(t *testing.T) {
		Ask(g.dir, "two", Cut)
		until(t, "silence", func() bool { return g.say("one", two6) == "" })
		Ask(g.dir, "two", Up)
		until(t, "a word", func() bool { return g.say("one", two6) == "hello" })
	})
	t.Run("a second supervisor is refused", func(t *testing.T) {
		err := Supervise(t.Context(), testPlan(g.dir), nil)
		if err == nil || !strings.Contains(err.Error(), fmt.Sprint(g.sup.Process.Pid)) {
			t.Errorf("%v", err)
		}
	})
	t.Run("boxes outlive their supervisor, and the next one adopts them", func(t *testing.T) {
		was := g.running()
		g.sup.Process.Kill()
		until(t, "the end of the supervisor", func() bool { return Supervisor(g.dir) == 0 })
		if g.say("one", two6) != "hello" {
			t.Error("a box died with the supervisor")
		}
		g.supervise()
		until(t, "the next supervisor", func() bool { return Supervisor(g.dir) == g.sup.Process.Pid })
		time.Sleep(300 * time.Millisecond)
		if got := g.running(); !reflect.DeepEqual(got, was) {
			t.Errorf("not adopted: %v, were %v", got, was)
		}
	})
	t.Run("a lost box starts again", func(t *testing.T) {
		b := g.running()["two"]
		unix.Kill(b.PID, unix.SIGKILL)
		until(t, "the box", func() bool { n, ok := g.running()["two"]; return ok && n != b && g.say("one", two6) == "hello" })
	})
	t.Run("a killed box stays down and leaves nothing", func(t *testing.T) {
		b := g.running()["two"]
		Ask(g.dir, "two", Down)
		until(t, "the end", func() bool { _, ok := g.running()["two"]; return !ok && !b.Alive() })
		time.Sleep(500 * time.Millisecond)
		if _, ok := g.running()["two"]; ok {
			t.Error("it came back")
		}
		if left, _ := filepath.Glob("/sys/fs/cgroup/*/hfbox-" + filepath.Base(g.dir) + "/two"); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
		Ask(g.dir, "two", Up)
		until(t, "a word", func() bool { return g.say("one", two6) == "hello" })
	})
	t.Run("stop asks first and leaves nothing", func(t *testing.T) {
		if err := StopAll(t.Context(), g.dir); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(filepath.Join(g.dir, "data-one", "terminated")); err != nil {
			t.Error("the daemon was not asked to end")
		}
		if r := g.running(); len(r) > 0 {
			t.Errorf("alive: %v", r)
		}
		if left, _ := filepath.Glob("/sys/fs/cgroup/*/hfbox-" + filepath.Base(g.dir)); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
		after, _ := os.ReadFile("/proc/self/mountinfo")
		if strings.Contains(string(after), g.dir) {
			t.Errorf("mounts are left:\n%s", after)
		}
	})
}

// childOf finds a process of the box by its first argument.
func childOf(t *testing.T, initPID int, arg string) int {
	t.Helper()
	ns, _ := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", initPID))
	all, _ := filepath.Glob("/proc/[0-9]*")
	for _, p := range all {
		n, _ := os.Readlink(p + "/ns/pid")
		cmd, _ := os.ReadFile(p + "/cmdline")
		if n == ns && strings.Contains(string(cmd), "\x00"+arg+"\x00") {
			var pid int
			fmt.Sscan(filepath.Base(p), &pid)
			return pid
		}
	}
	t.Errorf("no process %q in the box", arg)
	return 0
}

func TestPlan(t *testing.T) {
	d := map[string]string{"a": "1"}
	for _, tc := range []struct {
		name string
		want Wanted
		have seen
		out  []action
	}{
		{"what is missing starts", Up, seen{}, []action{{"a", "start"}}},
		{"what runs is left alone", Up, seen{alive: true, digest: "1"}, nil},
		{"a changed spec starts anew", Up, seen{alive: true, digest: "0"}, []action{{"a", "kill"}, {"a", "start"}}},
		{"down is killed", Down, seen{alive: true, digest: "1"}, []action{{"a", "kill"}}},
		{"down stays down", Down, seen{}, nil},
		{"paused", Paused, seen{alive: true, digest: "1"}, []action{{"a", "freeze"}}},
		{"resumed", Up, seen{alive: true, frozen: true, digest: "1"}, []action{{"a", "thaw"}}},
		{"from paused to cut", Cut, seen{alive: true, frozen: true, digest: "1"}, []action{{"a", "thaw"}, {"a", "cut"}}},
		{"a new one that is asked to be cut starts without its cable", Cut, seen{}, []action{{"a", "start"}}},
		{"a new one that is asked to be paused", Paused, seen{}, []action{{"a", "start"}, {"a", "freeze"}}},
		{"a cable that came loose is plugged in", Up, seen{alive: true, cut: true, digest: "1"}, []action{{"a", "join"}}},
	} {
		if got := plan([]string{"a"}, d, map[string]Wanted{"a": tc.want}, map[string]seen{"a": tc.have}); !reflect.DeepEqual(got, tc.out) {
			t.Errorf("%s: %v", tc.name, got)
		}
	}
	if got := plan(nil, nil, nil, map[string]seen{"x": {alive: true}}); !reflect.DeepEqual(got, []action{{"x", "kill"}}) {
		t.Errorf("a box that is no longer planned: %v", got)
	}
}

// left says what is left of a grid's cgroups and interfaces.
func left(dir string) []string {
	out, _ := filepath.Glob("/sys/fs/cgroup/*/hfbox-" + filepath.Base(dir))
	more, _ := filepath.Glob("/sys/fs/cgroup/hfbox-" + filepath.Base(dir))
	return append(out, more...)
}

func TestAGridWhoseDirectoryIsGoneIsSweptAndOthersAreNot(t *testing.T) {
	lost, other := newGrid(t), newGrid(t)
	for _, g := range []*grid{lost, other} {
		until(t, "both boxes", func() bool { return g.say("one", addr6(2, 2)) == "hello" && g.say("two", addr6(1, 2)) == "hello" })
	}
	was := other.running()
	boxes := lost.running()
	lost.sup.Process.Kill()
	until(t, "the end of the supervisor", func() bool { return Supervisor(lost.dir) == 0 })
	// Boxes that the next supervisor could adopt are left alone.
	if err := Sweep(slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	if got := lost.running(); !reflect.DeepEqual(got, boxes) {
		t.Fatalf("boxes that could be adopted were swept: %v", got)
	}
	if err := os.RemoveAll(filepath.Join(lost.dir, "boxes")); err != nil {
		t.Fatal(err)
	}
	if err := Sweep(slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	for n, b := range boxes {
		if b.Alive() {
			t.Errorf("%s is alive", n)
		}
	}
	if l := left(lost.dir); len(l) > 0 {
		t.Errorf("left: %v", l)
	}
	if got := other.running(); !reflect.DeepEqual(got, was) {
		t.Errorf("another grid's boxes: %v, were %v", got, was)
	}
}

func TestABoxThatCannotBeginSaysWhyAndLeavesNothing(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	self, _ := os.Executable()
	dir := t.TempDir()
	for name, tc := range map[string]struct {
		spec Spec
		want string
	}{
		"no such program":   {Spec{Args: []string{"/bin/nothing"}}, "/bin/nothing"},
		"no such directory": {Spec{Args: []string{"/bin/daemon"}, Data: filepath.Join(dir, "absent")}, "absent"},
		"no internet":       {Spec{Uplink: &Uplink{1, 2}}, "internet"},
		"no such host":      {Spec{Uplink: &Uplink{1, 99}}, "no host 99"},
	} {
		s := tc.spec
		s.Name, s.Cgroup = "broken", "/hfbox-"+filepath.Base(dir)+"/broken"
		b, err := Start([]string{self, "init"}, s, nil)
		if err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v", name, err)
		}
		if b.Alive() {
			t.Errorf("%s: it runs", name)
		}
	}
	if err := machine.end("/hfbox-" + filepath.Base(dir)); err != nil {
		t.Error(err)
	}
	if l := left(dir); len(l) > 0 {
		t.Errorf("left: %v", l)
	}
}

func TestALogThatGrowsIsMovedWhileItIsWritten(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	log, err := openLog(path)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	for _, step := range []struct{ write, old, now string }{
		{"first\n", "", "first\n"},
		{"beyond the limit\n", "first\nbeyond the limit\n", ""},
		{"next\n", "first\nbeyond the limit\n", "next\n"},
	} {
		fmt.Fprint(log, step.write)
		if err := rotate(path, 16); err != nil {
			t.Fatal(err)
		}
		old, _ := os.ReadFile(path + ".1")
		now, _ := os.ReadFile(path)
		if string(old) != step.old || string(now) != step.now {
			t.Errorf("after %q: %q and %q", step.write, old, now)
		}
	}
	if err := rotate(filepath.Join(t.TempDir(), "absent"), 16); err != nil {
		t.Error(err)
	}
}
