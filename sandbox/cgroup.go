package sandbox

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// cgroups is where a machine's control groups are mounted: one hierarchy for each controller in version 1, one for all in
// version 2.
type cgroups string

const machine cgroups = "/sys/fs/cgroup"

func (c cgroups) v2() bool {
	_, err := os.Stat(filepath.Join(string(c), "cgroup.controllers"))
	return err == nil
}

func (c cgroups) roots() []string {
	if c.v2() {
		return []string{string(c)}
	}
	var out []string
	for _, k := range []string{"cpu", "cpuacct", "cpuset", "memory", "pids", "devices", "freezer", "blkio", "systemd"} {
		if _, err := os.Stat(filepath.Join(string(c), k, "cgroup.procs")); err == nil {
			out = append(out, filepath.Join(string(c), k))
		}
	}
	return out
}

// make makes the group that holds a sandbox's memory, with its limit, before runsc does: what runsc finds it neither changes
// nor removes, so that the counters can still be read when the sandbox has gone. With version 1 the other controllers are
// runsc's; with version 2 all are in this group, and so all limits are set here.
func (c cgroups) make(group string, res *specs.LinuxResources) error {
	dir := filepath.Join(string(c), "memory", group)
	if c.v2() {
		dir = filepath.Join(string(c), group)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("cgroup: %w", err)
	}
	set := func(file, value string) error {
		if err := os.WriteFile(filepath.Join(dir, file), []byte(value), 0o644); err != nil {
			return fmt.Errorf("cgroup: %w", err)
		}
		return nil
	}
	var limit string
	if res.Memory != nil && res.Memory.Limit != nil {
		limit = strconv.FormatInt(*res.Memory.Limit, 10)
	}
	if !c.v2() {
		if limit == "" {
			return nil
		}
		return set("memory.limit_in_bytes", limit)
	}
	// A group has the controllers that its parent hands on.
	for at := string(c); at != dir; {
		if err := os.WriteFile(filepath.Join(at, "cgroup.subtree_control"), []byte("+cpu +memory +pids"), 0o644); err != nil {
			return fmt.Errorf("cgroup: hand controllers on: %w", err)
		}
		rest, err := filepath.Rel(at, dir)
		if err != nil {
			return fmt.Errorf("cgroup: %w", err)
		}
		first, _, _ := strings.Cut(rest, "/")
		at = filepath.Join(at, first)
	}
	// All of it ends together: gVisor without one of its processes is no sandbox.
	errs := []error{set("memory.oom.group", "1")}
	if limit != "" {
		errs = append(errs, set("memory.max", limit))
		if err := set("memory.swap.max", "0"); !errors.Is(err, os.ErrNotExist) { // not there without swap
			errs = append(errs, err)
		}
	}
	if res.CPU != nil && res.CPU.Quota != nil && res.CPU.Period != nil {
		errs = append(errs, set("cpu.max", fmt.Sprintf("%d %d", *res.CPU.Quota, *res.CPU.Period)))
	}
	if res.Pids != nil {
		errs = append(errs, set("pids.max", strconv.FormatInt(res.Pids.Limit, 10)))
	}
	return errors.Join(errs...)
}

// join makes a group with these limits, and puts a process in it.
func (c cgroups) join(group string, res *specs.LinuxResources, pid int) error {
	if err := c.make(group, res); err != nil {
		return err
	}
	dirs := []string{filepath.Join(string(c), group)}
	if !c.v2() {
		dirs = nil
		for _, x := range []struct {
			controller string
			files      map[string]int64
		}{
			{"memory", nil}, {"pids", map[string]int64{"pids.max": res.Pids.Limit}},
			{"cpu", map[string]int64{"cpu.cfs_period_us": int64(*res.CPU.Period), "cpu.cfs_quota_us": *res.CPU.Quota}},
		} {
			dir := filepath.Join(string(c), x.controller, group)
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return fmt.Errorf("cgroup: %w", err)
			}
			for file, v := range x.files {
				if err := os.WriteFile(filepath.Join(dir, file), strconv.AppendInt(nil, v, 10), 0o644); err != nil {
					return fmt.Errorf("cgroup: %w", err)
				}
			}
			dirs = append(dirs, dir)
		}
	}
	for _, dir := range dirs {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), strconv.AppendInt(nil, int64(pid), 10), 0o644); err != nil {
			return fmt.Errorf("cgroup: %w", err)
		}
	}
	return nil
}

// Bound puts a process that is no sandbox into a group of its own with limits: thousandths of a core, bytes, processes. Its
// child processes are in it too. Unbound removes the group, when it has ended.
func (r *Runner) Bound(id string, pid int, cpuMilli, memory, pids int64) error {
	if r.cfg.Cgroup == "" {
		return nil
	}
	quota, period := cpuMilli*100, uint64(100_000) // microseconds
	return machine.join(filepath.Join(r.cfg.Cgroup, id), &specs.LinuxResources{
		Memory: &specs.LinuxMemory{Limit: &memory}, CPU: &specs.LinuxCPU{Quota: &quota, Period: &period}, Pids: &specs.LinuxPids{Limit: pids},
	}, pid)
}

// Unbound kills what is left in a process's group, and removes it.
func (r *Runner) Unbound(id string) {
	if r.cfg.Cgroup != "" {
		machine.remove(filepath.Join(r.cfg.Cgroup, id))
	}
}

// remove removes a sandbox's groups, and kills what is still in them: nothing is to outlive its sandbox.
func (c cgroups) remove(group string) {
	for _, r := range c.roots() {
		dir := filepath.Join(r, group)
		for range 100 {
			if err := os.Remove(dir); err == nil || !errors.Is(err, unix.EBUSY) {
				break
			}
			procs, _ := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
			for p := range strings.FieldsSeq(string(procs)) {
				if pid, err := strconv.Atoi(p); err == nil && pid > 1 {
					unix.Kill(pid, unix.SIGKILL)
				}
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
}

// outOfMemory asks a group whether the kernel killed in it for want of memory.
func (c cgroups) outOfMemory(group string) bool {
	file := filepath.Join(string(c), "memory", group, "memory.oom_control")
	if c.v2() {
		file = filepath.Join(string(c), group, "memory.events")
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(b)) {
		if n, ok := strings.CutPrefix(strings.TrimSpace(line), "oom_kill "); ok && n != "0" {
			return true
		}
	}
	return false
}
