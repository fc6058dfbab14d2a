package sandbox

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"holdfast/internal/testimage"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// image unpacks an image of the test server's binary and other entries.
func (l *lab) image(entries ...testimage.Entry) Image {
	l.t.Helper()
	bin, err := os.ReadFile(filepath.Join(l.cfg.Dir, "layers", l.img.Layers[0], "server"))
	if err != nil {
		l.t.Fatal(err)
	}
	entries = append([]testimage.Entry{{Header: tar.Header{Name: "server"}, Data: bin}}, entries...)
	img := testimage.New(ocispec.ImageConfig{Entrypoint: []string{"/server"}}, testimage.Layer(entries...))
	out, err := l.Unpack(l.t.Context(), "owner", img, img.Manifest)
	if err != nil {
		l.t.Fatal(err)
	}
	return out
}

// found names the files under dirs and the processes that show the marker, leaving out the file system of skip.
func found(t *testing.T, marker, skip string, dirs ...string) []string {
	t.Helper()
	var hidden unix.Stat_t
	if err := unix.Stat(skip, &hidden); err != nil {
		t.Fatal(err)
	}
	var out []string
	has := func(p string) {
		if b, err := os.ReadFile(p); err == nil && bytes.Contains(b, []byte(marker)) {
			out = append(out, p)
		}
	}
	for _, d := range dirs {
		filepath.WalkDir(d, func(p string, e fs.DirEntry, err error) error {
			if err != nil {
				return nil
			}
			var st unix.Stat_t
			if unix.Lstat(p, &st) != nil || st.Dev == hidden.Dev {
				if e.IsDir() {
					return fs.SkipDir
				}
				return nil
			}
			// What has not changed lately was not written by this test.
			if e.Type().IsRegular() && st.Size < 64<<20 && time.Since(time.Unix(st.Ctim.Unix())) < time.Minute {
				has(p)
			}
			return nil
		})
	}
	for _, kind := range []string{"cmdline", "environ"} {
		procs, _ := filepath.Glob("/proc/[0-9]*/" + kind)
		for _, p := range procs {
			has(p)
		}
	}
	return out
}

func TestSecretsAreNowhereButInTheSandbox(t *testing.T) {
	l := newLab(t)
	// Joined here, so that neither this program nor its arguments contain it.
	marker := strings.Join([]string{"kX9", "marker", strconv.Itoa(os.Getpid())}, "~")
	l.start("s", func(s *Spec) {
		s.Env = []string{"PASSWORD=" + marker}
		s.Files = []File{{Path: "/run/deep/down/secret", Mode: 0o400, UID: 1000, GID: 1000, Data: []byte(marker)}}
	})
	if code, out := l.exec("s", "/server", "cat", "/run/deep/down/secret"); code != 0 || out != marker {
		t.Fatalf("control: the workload does not see its secret: %d %q", code, out)
	}
	if _, out := l.exec("s", "/server", "cat", "/proc/self/environ"); !strings.Contains(out, marker) {
		t.Fatalf("control: a command does not see the workload's environment: %q", out)
	}
	// A health check with a password in its arguments, while it runs.
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		l.Exec(ctx, "s", ExecSpec{Args: []string{"/server", "sleep", marker}})
	}()
	l.until("the command", func() bool {
		m, _ := filepath.Glob(filepath.Join(l.bundle("s"), "exec-*", "pid"))
		return len(m) > 0
	})
	places := []string{"/tmp", "/var/tmp", "/var/log", "/var/lib", "/run", "/dev/shm", "/home", "/etc"}
	if got := found(t, marker, l.cfg.Dir, places...); len(got) > 0 {
		t.Errorf("the secret is in %v", got)
	}
	cancel()
	<-done
	planted := filepath.Join(t.TempDir(), "planted")
	if err := os.WriteFile(planted, []byte(marker), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := found(t, marker, l.cfg.Dir, places...); !slices.Contains(got, planted) {
		t.Errorf("control: the planted secret was not found, only %v", got)
	}
	for dir, want := range map[string]fs.FileMode{"bundles": 0o700, "bundles/s": 0o700, "logs": 0o700} {
		if st, err := os.Stat(filepath.Join(l.cfg.Dir, dir)); err != nil || st.Mode().Perm() != want {
			t.Errorf("%s: others can look into it: %v %v", dir, st, err)
		}
	}
	var where unix.Statfs_t
	if err := unix.Statfs(l.bundle("s"), &where); err != nil || where.Type != unix.TMPFS_MAGIC {
		t.Errorf("the bundle is not on tmpfs: %x %v", where.Type, err)
	}
}

func TestFilesHaveTheirOwnerAndMode(t *testing.T) {
	l := newLab(t)
	l.start("s", func(s *Spec) {
		s.User = "1000:1000"
		s.Files = []File{{Path: "/mine", Mode: 0o400, UID: 1000, GID: 1000, Data: []byte("mine")}, {Path: "/roots", Mode: 0o400, Data: []byte("roots")}}
	})
	if code, out := l.exec("s", "/server", "cat", "/mine"); code != 0 || out != "mine" {
		t.Errorf("its own secret: %d %q", code, out)
	}
	if code, out := l.exec("s", "/server", "cat", "/roots"); code == 0 {
		t.Errorf("another's secret: %q", out)
	}
	if code, _ := l.exec("s", "/server", "write", "/mine"); code == 0 {
		t.Error("a file from outside was written")
	}
}

func TestMountPointsOfAHostileImageStayInside(t *testing.T) {
	l := newLab(t)
	host := t.TempDir()
	victim := filepath.Join(host, "victim")
	if err := os.WriteFile(victim, []byte("machine"), 0o644); err != nil {
		t.Fatal(err)
	}
	up := strings.Repeat("../", 20)
	img := l.image(entry("etc", tar.TypeSymlink, up+host), entry("data", tar.TypeSymlink, host), entry("hosts", tar.TypeSymlink, up+victim[1:]))
	err := l.Start(t.Context(), Spec{ID: "evil", Image: img, NetNS: l.netns, StopGrace: time.Second, Args: []string{"/server", "sleep"},
		Files:  []File{{Path: "/etc/resolv.conf", Mode: 0o644, Data: []byte("x")}, {Path: "/hosts", Mode: 0o644, Data: []byte("x")}},
		Mounts: []Mount{{Target: "/data/deep", Tmpfs: true}}})
	t.Logf("start: %v", err)
	if left, _ := os.ReadDir(host); len(left) != 1 {
		t.Errorf("the machine's directory got %v", left)
	}
	if b, err := os.ReadFile(victim); err != nil || string(b) != "machine" {
		t.Errorf("the machine's file: %q %v", b, err)
	}
	if _, out := l.exec("evil", "/server", "cat", victim); strings.Contains(out, "machine") {
		t.Error("the sandbox reads the machine's file")
	}
}

func TestSetUserIDGivesNothing(t *testing.T) {
	l := newLab(t)
	bin, err := os.ReadFile(filepath.Join(l.cfg.Dir, "layers", l.img.Layers[0], "server"))
	if err != nil {
		t.Fatal(err)
	}
	img := l.image(testimage.Entry{Header: tar.Header{Name: "su", Mode: 0o4755}, Data: bin})
	l.start("u", func(s *Spec) { s.Image, s.User, s.Args = img, "1000", []string{"/server", "sleep"} })
	st, err := os.Stat(filepath.Join(l.cfg.Dir, "layers", img.Layers[0], "su"))
	if err != nil || st.Mode()&fs.ModeSetuid == 0 {
		t.Fatalf("control: %v %v", st, err)
	}
	_, out := l.exec("u", "/su", "status")
	if !strings.Contains(out, "Uid:\t1000\t1000\t1000\t1000") || !strings.Contains(out, "CapEff:\t0000000000000000") {
		t.Errorf("a set-user-ID program of root became %s", out)
	}
}

func TestTamperedImageStartsNothing(t *testing.T) {
	l := newLab(t)
	var layer string
	for d, b := range l.blobs.Blobs {
		if len(b) > 1<<20 {
			layer = d
		}
	}
	changed := bytes.Clone(l.blobs.Blobs[layer])
	changed[len(changed)/2] ^= 1
	if err := l.Prune(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Unpack(t.Context(), "owner", liar{l.blobs, layer, changed}, l.blobs.Manifest); !errors.Is(err, ErrImage) {
		t.Fatalf("tampered layer: %v", err)
	}
	if left, _ := filepath.Glob(filepath.Join(l.cfg.Dir, "layers", "*")); len(left) > 0 {
		t.Errorf("left %v", left)
	}
	if err := l.Start(t.Context(), Spec{ID: "x", Image: l.img, NetNS: l.netns}); err == nil {
		t.Error("a sandbox started without its layer")
	}
	if left := l.leftovers(); len(left) > 0 {
		t.Errorf("left %v", left)
	}
	if img, err := l.Unpack(t.Context(), "owner", l.blobs, l.blobs.Manifest); err != nil {
		t.Errorf("control: %v", err)
	} else {
		l.img = img
		l.start("x")
	}
}

func TestLogsAreBoundedAndDated(t *testing.T) {
	l := newLab(t)
	l.start("loud", func(s *Spec) { s.Args = []string{"/server", "flood", "6"} })
	l.until("the end", func() bool { return l.state("loud").State == Exited })
	if s := l.state("loud"); s.FinishedAt.Sub(s.StartedAt) < time.Second {
		t.Errorf("6 MiB were logged in %v: nothing holds up who floods", s.FinishedAt.Sub(s.StartedAt))
	}
	var size int64
	files, _ := filepath.Glob(filepath.Join(l.cfg.Dir, "logs", "loud", "*"))
	for _, f := range files {
		if st, err := os.Stat(f); err == nil {
			size += st.Size()
		}
	}
	if size > 2*maxLog || size < maxLog/2 {
		t.Errorf("6 MiB of output left %d bytes in %v", size, files)
	}
	var out strings.Builder
	if err := l.Logs(t.Context(), "loud", false, 3, &out); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if len(lines) != 3 || !strings.HasSuffix(lines[2], " flooded") {
		t.Fatalf("the last three lines are %q", lines)
	}
	if _, err := time.Parse(logTime, lines[2][:len(logTime)]); err != nil {
		t.Error(err)
	}
	// Logs outlive the sandbox, but not without bound.
	if err := l.Stop(t.Context(), "loud"); err != nil {
		t.Fatal(err)
	}
	if err := l.Logs(t.Context(), "loud", false, 3, &out); err != nil {
		t.Errorf("after the stop: %v", err)
	}
	for i := range keptLogs + 3 {
		if err := os.MkdirAll(filepath.Join(l.cfg.Dir, "logs", "old-"+strconv.Itoa(i)), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Stop(t.Context(), "loud"); err != nil {
		t.Fatal(err)
	}
	if left, _ := filepath.Glob(filepath.Join(l.cfg.Dir, "logs", "*")); len(left) != keptLogs {
		t.Errorf("%d logs are kept", len(left))
	}
	if err := l.Remove(t.Context(), "loud"); err != nil {
		t.Fatal(err)
	}
	if err := l.Logs(t.Context(), "loud", false, 3, &out); err == nil {
		t.Error("removed, but its logs are there")
	}
}

func TestWhoIgnoresTheStopSignalIsEnded(t *testing.T) {
	l := newLab(t)
	l.start("deaf", func(s *Spec) { s.Args, s.StopGrace = []string{"/server", "stubborn"}, 300*time.Millisecond })
	l.until("the trap", func() bool {
		var out strings.Builder
		l.Logs(t.Context(), "deaf", false, 1, &out)
		return strings.Contains(out.String(), "ignoring")
	})
	begin := time.Now()
	if err := l.Stop(t.Context(), "deaf"); err != nil {
		t.Fatal(err)
	}
	if d := time.Since(begin); d < 300*time.Millisecond || d > 3*time.Second {
		t.Errorf("stopped after %v with a grace of 300 ms", d)
	}
	if left := l.leftovers(); len(left) > 0 {
		t.Errorf("left %v", left)
	}
}

func TestACommandThatHangsIsKilled(t *testing.T) {
	l := newLab(t)
	l.start("s")
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	begin := time.Now()
	if _, _, err := l.Exec(ctx, "s", ExecSpec{Args: []string{"/server", "sleep"}}); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("%v", err)
	}
	if d := time.Since(begin); d > 3*time.Second {
		t.Errorf("it took %v", d)
	}
	l.until("the end of the command", func() bool {
		_, out := l.exec("s", "/server", "list", "/proc")
		n := 0
		for line := range strings.Lines(out) {
			if _, err := strconv.Atoi(strings.TrimSpace(line)); err == nil {
				n++
			}
		}
		return n == 2 // the workload and the one that asks
	})
	if l.state("s").State != Running {
		t.Error("the workload ended with it")
	}
	if left, _ := filepath.Glob(filepath.Join(l.bundle("s"), "exec-*")); len(left) > 0 {
		t.Errorf("left %v", left)
	}
}

func TestWhatAVolumeWasGivenSurvivesTheKill(t *testing.T) {
	l := newLab(t)
	dir := filepath.Join(t.TempDir(), "volume")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	l.start("v", func(s *Spec) {
		s.Mounts = []Mount{{Source: dir, Target: "/data/deep"}, {Source: dir, Target: "/view", ReadOnly: true}, {Tmpfs: true, Size: 1 << 20, Target: "/scratch"}}
	})
	if code, out := l.exec("v", "/server", "write", "/data/deep/file"); code != 0 {
		t.Fatal(out)
	}
	if code, _ := l.exec("v", "/server", "write", "/view/other"); code == 0 {
		t.Error("a read-only mount was written")
	}
	if code, out := l.exec("v", "/server", "fill", "/scratch/x", "2"); code == 0 {
		t.Errorf("2 MiB in a tmpfs of 1: %s", out)
	}
	var st statusFile
	if err := readJSON(filepath.Join(l.bundle("v"), "status.json"), &st); err != nil {
		t.Fatal(err)
	}
	unix.Kill(st.PID, unix.SIGKILL) // no sync, no orderly end
	l.until("the end of all its processes", func() bool { return len(l.processes()) == 0 })
	if b, err := os.ReadFile(filepath.Join(dir, "file")); err != nil || string(b) != "x" {
		t.Errorf("on the volume: %q %v", b, err)
	}
	if err := l.Stop(t.Context(), "v"); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "file")); err != nil {
		t.Errorf("the stop took what is on the volume along: %v", err)
	}
}

func TestStartSaysWhyNot(t *testing.T) {
	l := newLab(t)
	for why, f := range map[string]func(*Spec){
		"/nope: no such file":    func(s *Spec) { s.Args = []string{"/nope"} },
		"is not in the image's":  func(s *Spec) { s.User = "nobody-here" },
		"capability ALL":         func(s *Spec) { s.CapAdd = []string{"ALL"} },
		"not an absolute path":   func(s *Spec) { s.Mounts = []Mount{{Source: "data", Target: "/data"}} },
		"want an absolute path":  func(s *Spec) { s.Files = []File{{Path: "/"}} },
		"no such file or direct": func(s *Spec) { s.NetNS = "/nowhere" },
		"want 1 to 63 of a-z":    func(s *Spec) { s.ID = "../up" },
		"image has no layers":    func(s *Spec) { s.Image.Layers = nil },
		"is not a sha256 digest": func(s *Spec) { s.Image.Layers = []string{"../../../../../etc"} },
		"its lease ended":        func(s *Spec) { s.Fenced = true },
	} {
		s := Spec{ID: "bad", Image: l.img, NetNS: l.netns}
		f(&s)
		if err := l.Start(t.Context(), s); err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("want %q, got %v", why, err)
		}
		l.Stop(t.Context(), "bad")
	}
	if left := l.leftovers(); len(left) > 0 {
		t.Errorf("left %v", left)
	}
}

// leftovers names all that the lab's sandboxes still hold on the machine.
func (l *lab) leftovers() []string {
	l.t.Helper()
	var out []string
	add := func(pattern string) {
		m, _ := filepath.Glob(pattern)
		out = append(out, m...)
	}
	add(filepath.Join(l.cfg.Dir, "bundles", "*"))
	add(filepath.Join(l.cfg.Dir, "runsc", "*.state"))
	add(filepath.Join(l.cfg.Dir, "runsc", "*.lock"))
	add("/sys/fs/cgroup/*" + l.cfg.Cgroup + "/*/cgroup.procs")
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		l.t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, l.cfg.Dir) {
			out = append(out, line)
		}
	}
	return append(out, l.processes()...)
}

// processes are those of the lab's shims, runsc, and gVisor.
func (l *lab) processes() []string {
	var out []string
	all, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, p := range all {
		if b, err := os.ReadFile(p); err == nil && bytes.Contains(b, []byte(l.cfg.Dir)) && !strings.Contains(string(b), "\x00agent\x00") {
			out = append(out, p+" "+strings.ReplaceAll(string(b), "\x00", " "))
		}
	}
	return out
}

func TestAKilledShimTakesItsSandboxAlong(t *testing.T) {
	l := newLab(t)
	l.start("a")
	if n := len(l.processes()); n < 4 {
		t.Fatalf("control: %d processes", n)
	}
	var st statusFile
	if err := readJSON(filepath.Join(l.bundle("a"), "status.json"), &st); err != nil {
		t.Fatal(err)
	}
	unix.Kill(st.PID, unix.SIGKILL)
	l.until("the end of all its processes", func() bool { return len(l.processes()) == 0 })
	if s := l.state("a"); s.State != Exited || s.Reason == "" {
		t.Errorf("%+v", s)
	}
	if err := l.Stop(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	if left := l.leftovers(); len(left) > 0 {
		t.Errorf("left %v", left)
	}
}

func (l *lab) lease(d time.Duration) {
	l.t.Helper()
	var ts unix.Timespec
	unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts)
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		l.t.Fatal(err)
	}
	id, err := hex.DecodeString(strings.ReplaceAll(strings.TrimSpace(string(boot)), "-", ""))
	if err != nil {
		l.t.Fatal(err)
	}
	if err := os.WriteFile(l.cfg.Lease+".new", append(binary.LittleEndian.AppendUint64(nil, uint64(ts.Nano()+int64(d))), id...), 0o600); err != nil {
		l.t.Fatal(err)
	}
	if err := os.Rename(l.cfg.Lease+".new", l.cfg.Lease); err != nil {
		l.t.Fatal(err)
	}
}

func TestAnUnreadableLeaseIsAnEndedOne(t *testing.T) {
	l := newLab(t)
	for name, spoil := range map[string]func() error{
		"missing": func() error { return os.Remove(l.cfg.Lease) },
		"short":   func() error { return os.WriteFile(l.cfg.Lease, []byte{1, 2, 3}, 0o600) },
		"long":    func() error { return os.WriteFile(l.cfg.Lease, make([]byte, LeaseSize+1), 0o600) },
		"of another boot": func() error {
			b, err := os.ReadFile(l.cfg.Lease)
			if err != nil {
				return err
			}
			b[8] ^= 1
			return os.WriteFile(l.cfg.Lease, b, 0o600)
		},
	} {
		l.lease(time.Hour)
		id := "f-" + strings.ReplaceAll(name, " ", "-")
		l.start(id, func(s *Spec) { s.Fenced = true })
		begin := time.Now()
		if err := spoil(); err != nil {
			t.Fatal(err)
		}
		l.until("the fence", func() bool { return l.state(id).State == Exited })
		if d := l.state(id).FinishedAt.Sub(begin); d > time.Second {
			t.Errorf("%s lease: ended after %v", name, d)
		}
	}
}

func TestTheFenceDoesNotWaitForAGrace(t *testing.T) {
	l := newLab(t)
	l.lease(time.Hour)
	l.start("deaf", func(s *Spec) { s.Args, s.StopGrace, s.Fenced = []string{"/server", "stubborn"}, time.Minute, true })
	l.until("the trap", func() bool {
		var out strings.Builder
		l.Logs(t.Context(), "deaf", false, 1, &out)
		return strings.Contains(out.String(), "ignoring")
	})
	stopped := make(chan error, 1)
	go func() { stopped <- l.Stop(t.Context(), "deaf") }()
	select {
	case err := <-stopped:
		t.Fatalf("control: it did not use its grace: %v", err)
	case <-time.After(300 * time.Millisecond):
	}
	l.lease(0)
	select {
	case err := <-stopped:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(3 * time.Second):
		t.Error("its lease has ended, and it uses the rest of its grace")
	}
}

// What was cancelled or moved away has no grace, whatever its contract asks; a stop that is under way makes room.
func TestKillDoesNotWaitForAGrace(t *testing.T) {
	l := newLab(t)
	l.start("deaf", func(s *Spec) { s.Args, s.StopGrace = []string{"/server", "stubborn"}, 1000*time.Hour })
	var sh shimFile
	if err := readJSON(filepath.Join(l.bundle("deaf"), "shim.json"), &sh); err != nil || sh.Grace != MaxGrace {
		t.Errorf("a grace of 1000 h became %v: %v", sh.Grace, err)
	}
	l.until("the trap", func() bool {
		var out strings.Builder
		l.Logs(t.Context(), "deaf", false, 1, &out)
		return strings.Contains(out.String(), "ignoring")
	})
	ctx, cancel := context.WithCancel(t.Context())
	stopped := make(chan error, 1)
	go func() { stopped <- l.Stop(ctx, "deaf") }()
	select {
	case err := <-stopped:
		t.Fatalf("control: it did not use its grace: %v", err)
	case <-time.After(300 * time.Millisecond):
	}
	cancel()
	if err := <-stopped; err == nil {
		t.Fatal("control: the stop had an end of its own")
	}
	begin := time.Now()
	if err := l.Kill(t.Context(), "deaf"); err != nil {
		t.Fatal(err)
	}
	if d := time.Since(begin); d > 3*time.Second {
		t.Errorf("killed after %v", d)
	}
	if left := l.leftovers(); len(left) > 0 {
		t.Errorf("left %v", left)
	}
}

// agentMode is the body of the process that TestAKilledAgentLeaksNothing kills: it starts sandboxes until it is killed.
func agentMode(file string) error {
	var in struct {
		Config Config
		Specs  []Spec
	}
	if err := readJSON(file, &in); err != nil {
		return err
	}
	r, err := New(in.Config)
	if err != nil {
		return err
	}
	for {
		for _, s := range in.Specs {
			if err := r.Start(context.Background(), s); err != nil {
				return err
			}
			fmt.Println("started", s.ID)
		}
		for _, s := range in.Specs[1:] { // the first one stays
			if err := r.Stop(context.Background(), s.ID); err != nil {
				return err
			}
		}
	}
}

func TestAKilledAgentLeaksNothing(t *testing.T) {
	l := newLab(t)
	var in struct {
		Config Config
		Specs  []Spec
	}
	in.Config = l.cfg
	in.Config.Log = nil
	for _, id := range []string{"stays", "comes-and-goes"} {
		in.Specs = append(in.Specs, Spec{ID: id, Image: l.img, NetNS: l.netns, StopGrace: time.Second})
	}
	raw, err := json.Marshal(in)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(l.cfg.Dir, "agent.json")
	if err := os.WriteFile(file, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	rounds := 12
	if testing.Short() {
		rounds = 3
	}
	began := time.Time{}
	for i := range rounds {
		cmd := exec.Command(l.cfg.Self[0], "agent", file)
		cmd.Stderr = os.Stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// Spread over a start (about 130 ms) and what follows, densely where most happens.
		time.Sleep(time.Duration(i*i*5+i*7) * time.Millisecond)
		cmd.Process.Kill()
		cmd.Wait()
		r, err := New(l.cfg)
		if err != nil {
			t.Fatal(err)
		}
		l.Runner = r
		// What was asked for before the kill goes on or is gone; nothing is in between for long.
		l.until("a settled state", func() bool {
			all, err := r.List(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			for _, s := range all {
				if s.State != Running && s.Reason == "its shim was killed" {
					if err := r.Stop(t.Context(), s.ID); err != nil {
						t.Fatal(err)
					}
					return false
				}
				if s.State == Running && s.StartedAt.IsZero() {
					return false
				}
			}
			return true
		})
		if s := l.state("stays"); s.State == Running {
			if !began.IsZero() && !s.StartedAt.Equal(began) {
				t.Errorf("round %d: it was started again at %v, it ran since %v", i, s.StartedAt, began)
			}
			began = s.StartedAt
			if code, out := l.exec("stays", "/server", "print", "alive"); code != 0 || out != "alive\n" {
				t.Errorf("round %d: adopted, but %d %q", i, code, out)
			}
		} else if !began.IsZero() {
			t.Errorf("round %d: it ran since %v and is gone: %+v", i, began, s)
		}
	}
	if began.IsZero() {
		t.Error("no round was long enough to start anything")
	}
	for _, s := range in.Specs {
		if err := l.Stop(t.Context(), s.ID); err != nil {
			t.Fatal(err)
		}
	}
	if left := l.leftovers(); len(left) > 0 {
		t.Errorf("left %v", left)
	}
}
