package sandbox

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestGroupsOfVersion2 sees what is written; that the kernel takes it is internal/lab.TestBootedNode's to see, since a
// machine with version 1 has no controllers left for version 2.
func TestGroupsOfVersion2(t *testing.T) {
	root := t.TempDir()
	c := cgroups(root)
	if c.v2() {
		t.Fatal("an empty directory is version 2")
	}
	if err := os.WriteFile(filepath.Join(root, "cgroup.controllers"), []byte("cpu memory pids\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	full := resources(&Spec{MemoryBytes: 64 << 20, CPUMilli: 250, Pids: 10})
	if err := c.make("/work/a", full); err != nil {
		t.Fatal(err)
	}
	if err := c.make("/work/b", resources(&Spec{})); err != nil {
		t.Fatal(err)
	}
	for file, want := range map[string]string{
		"cgroup.subtree_control": "+cpu +memory +pids", "work/cgroup.subtree_control": "+cpu +memory +pids", "work/a/cgroup.subtree_control": "",
		"work/a/memory.max": "67108864", "work/a/memory.swap.max": "0", "work/a/memory.oom.group": "1", "work/a/cpu.max": "25000 100000", "work/a/pids.max": "232",
		"work/b/memory.max": "", "work/b/cpu.max": "", "work/b/pids.max": "", "work/b/memory.oom.group": "1",
	} {
		if got, _ := os.ReadFile(filepath.Join(root, file)); string(got) != want {
			t.Errorf("%s: %q, want %q", file, got, want)
		}
	}
	for events, want := range map[string]bool{"low 0\noom 0\noom_kill 0\noom_group_kill 0\n": false, "oom 3\noom_kill 2\n": true, "": false} {
		if err := os.WriteFile(filepath.Join(root, "work/a/memory.events"), []byte(events), 0o644); err != nil {
			t.Fatal(err)
		}
		if got := c.outOfMemory("/work/a"); got != want {
			t.Errorf("%q: %v", strings.ReplaceAll(events, "\n", " "), got)
		}
	}
	if c.outOfMemory("/work/absent") {
		t.Error("a group that is not there ran out of memory")
	}
}

// A process that is no sandbox is held by the kernel to its limits, and ends with its group.
func TestAProcessIsBounded(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	r := &Runner{cfg: Config{Cgroup: fmt.Sprintf("/holdfast-bound-%d", os.Getpid())}}
	cmd := exec.Command("/bin/sleep", "600")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() { cmd.Process.Kill(); machine.remove(r.cfg.Cgroup) })
	if err := r.Bound("x", cmd.Process.Pid, 250, 64<<20, 10); err != nil {
		t.Fatal(err)
	}
	in, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	controllers, limits := []string{"memory", "cpu", "pids"}, map[string]string{"memory/memory.limit_in_bytes": "67108864", "cpu/cpu.cfs_quota_us": "25000", "pids/pids.max": "10"}
	if machine.v2() {
		controllers, limits = []string{""}, map[string]string{"memory.max": "67108864", "cpu.max": "25000 100000", "pids.max": "10"}
	}
	for _, c := range controllers {
		found := false
		for line := range strings.Lines(string(in)) {
			_, rest, _ := strings.Cut(strings.TrimSpace(line), ":")
			list, group, _ := strings.Cut(rest, ":")
			found = found || strings.Contains(","+list+",", ","+c+",") && group == r.cfg.Cgroup+"/x"
		}
		if !found {
			t.Errorf("it is not in a group of %q:\n%s", c, in)
		}
	}
	for file, want := range limits {
		controller, name := "", file
		if !machine.v2() {
			controller, name, _ = strings.Cut(file, "/")
		}
		if got, err := os.ReadFile(filepath.Join(string(machine), controller, r.cfg.Cgroup, "x", name)); err != nil || strings.TrimSpace(string(got)) != want {
			t.Errorf("%s: %q, %v", file, got, err)
		}
	}
	r.Unbound("x")
	if err := <-ended; err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("its group is gone, and it ended with %v", err)
	}
}
