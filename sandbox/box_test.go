package sandbox

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"holdfast/internal/testimage"

	"golang.org/x/sys/unix"
)

// boxed is what a node's box gives to the sandboxes in it: process 1, a root on tmpfs with two programs, /proc, /sys, few
// devices, and nothing of the machine's files.
type boxed struct {
	Runsc, Self, Root string
	Dir, Cgroup       string
	Image             *testimage.Image
}

func boxMode(file string) error {
	var in boxed
	if err := readJSON(file, &in); err != nil {
		return err
	}
	if os.Getpid() != 1 {
		return fmt.Errorf("process %d", os.Getpid())
	}
	mount := func(source, target, kind string, flags uintptr) error {
		target = filepath.Join(in.Root, target)
		if err := os.MkdirAll(target, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(source, target, kind, flags, ""); err != nil {
			return fmt.Errorf("mount %s: %w", target, err)
		}
		return nil
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	for _, m := range []struct {
		source, target, kind string
		flags                uintptr
	}{
		{"tmpfs", "/", "tmpfs", 0}, {"proc", "/proc", "proc", 0}, {"sysfs", "/sys", "sysfs", 0}, {"/sys/fs/cgroup", "/sys/fs/cgroup", "", unix.MS_BIND | unix.MS_REC},
		{"tmpfs", "/run", "tmpfs", 0}, {"tmpfs", "/tmp", "tmpfs", 0}, {"tmpfs", "/dev", "tmpfs", 0},
	} {
		if err := mount(m.source, m.target, m.kind, m.flags); err != nil {
			return err
		}
	}
	// The test's own program may want its libraries; holdfast does not.
	for _, d := range []string{"/lib", "/lib64", "/usr/lib"} {
		if _, err := os.Stat(d); err == nil {
			if err := mount(d, d, "", unix.MS_BIND|unix.MS_REC); err != nil {
				return err
			}
		}
	}
	for name, minor := range map[string]uint32{"null": 3, "zero": 5, "random": 8, "urandom": 9} {
		if err := unix.Mknod(filepath.Join(in.Root, "dev", name), unix.S_IFCHR|0o666, int(unix.Mkdev(1, minor))); err != nil {
			return err
		}
	}
	for source, target := range map[string]string{in.Runsc: "holdfast-runsc", in.Self: "self"} {
		p := filepath.Join(in.Root, "bin", target)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(p, nil, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(source, p, "", unix.MS_BIND, ""); err != nil {
			return err
		}
	}
	if err := os.Chdir(in.Root); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return err
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}

	ctx := context.Background()
	r, err := New(Config{Runsc: "/bin/holdfast-runsc", Self: []string{"/bin/self", "shim"}, Dir: in.Dir, Cgroup: in.Cgroup})
	if err != nil {
		return err
	}
	img, err := r.Unpack(ctx, "owner", in.Image, in.Image.Manifest)
	if err != nil {
		return err
	}
	begin := time.Now()
	if err := r.Start(ctx, Spec{ID: "w", Image: img, MemoryBytes: 128 << 20, CPUMilli: 500, Pids: 100}); err != nil {
		return err
	}
	took := time.Since(begin)
	code, out, err := r.Exec(ctx, "w", ExecSpec{Args: []string{"/server", "health"}})
	for end := time.Now().Add(5 * time.Second); err == nil && code != 0 && time.Now().Before(end); {
		code, out, err = r.Exec(ctx, "w", ExecSpec{Args: []string{"/server", "health"}})
	}
	if err != nil || code != 0 {
		return fmt.Errorf("health: %d %s %v", code, out, err)
	}
	fmt.Println("healthy", took)
	select {} // until the test kills the box
}

func TestInABox(t *testing.T) {
	l := newLab(t)
	in := boxed{Runsc: l.cfg.Runsc, Self: l.cfg.Self[0], Root: t.TempDir(), Dir: fmt.Sprintf("/run/hf-box-%d", os.Getpid()), Cgroup: l.cfg.Cgroup + "-box", Image: l.blobs}
	raw, err := json.Marshal(in)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(l.cfg.Dir, "box.json")
	if err := os.WriteFile(file, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(l.cfg.Self[0], "box", file)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC, Pdeathsig: unix.SIGKILL}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var said bytes.Buffer
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill() })
	time.AfterFunc(20*time.Second, func() { cmd.Process.Kill() })
	line, _ := bufio.NewReader(out).ReadString('\n')
	if !strings.HasPrefix(line, "healthy") {
		cmd.Process.Kill()
		cmd.Wait()
		t.Fatalf("%s%s", line, said.Bytes())
	}
	t.Logf("in a box: %s", line)
	inside := func() (n int) {
		all, _ := filepath.Glob("/proc/[0-9]*/cmdline")
		for _, p := range all {
			if b, err := os.ReadFile(p); err == nil && bytes.Contains(b, []byte(in.Dir)) {
				n++
			}
		}
		return n
	}
	if n := inside(); n < 4 {
		t.Fatalf("control: %d processes", n)
	}
	if b, err := os.ReadFile("/sys/fs/cgroup/memory" + in.Cgroup + "/w/memory.limit_in_bytes"); err == nil && strings.TrimSpace(string(b)) != "134217728" {
		t.Errorf("memory limit %s", b)
	}
	// The machine is switched off: nothing of the box goes on.
	cmd.Process.Kill()
	cmd.Wait()
	l.until("the end of all in the box", func() bool { return inside() == 0 })
	machine.remove(in.Cgroup + "/w")
	machine.remove(in.Cgroup)
	if left, _ := filepath.Glob("/sys/fs/cgroup/*" + in.Cgroup); len(left) > 0 {
		t.Errorf("left %v", left)
	}
}
