// Package box runs one role of a grid (a validator, a node, a gateway) on this machine as if it had a machine of its own:
// new PID, mount, network, UTS and IPC namespaces, a root file system that shows nothing of the host but what it is
// given, and a small init that starts the role's daemon, starts it again when it dies, and reaps what it leaves. When
// init dies the kernel ends everything inside, with its mounts and interfaces: nothing can leak.
//
// Inside, the root is a tmpfs:
//
//	/bin/…                    the given binaries, read-only
//	/data                     the given directory of the host, the only thing that lasts
//	/etc/holdfast/config.json the role's configuration
//	/dev /proc /sys /run /tmp as on a small machine; /dev has no disks, but loop devices, fuse and tun
//
// A box is known by the process ID of its init and that process's start time, so that a supervisor that comes later
// finds it again and never touches another process.
package box

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Spec is a box as it should be.
type Spec struct {
	Name     string            // host name, unique in the grid
	Args     []string          // the daemon; none is a box that only holds namespaces
	Env      []string          //
	Binaries map[string]string // path inside → path on the host, read-only
	Data     string            // directory on the host
	Config   string            // file on the host
	Log      string            // file on the host that the daemon's output is appended to
	Cgroup   string            // parent of all cgroups of the box, as in /proc/self/cgroup
	Uplink   *Uplink           // nil: no interface but the loopback
	Grace    time.Duration     // for the daemon to end when asked to; 0 means 30 s
}

// Uplink is the box's place in a Topology.
type Uplink struct {
	Segment int
	Host    int // 2 to 13
}

// Box is a running box.
type Box struct {
	Name  string
	PID   int    // of init
	Start uint64 // of that process, in clock ticks since boot (proc(5), stat, field 22)
}

// maxLog is the size beyond which a log is moved to LOG.1 when a box starts.
const maxLog = 16 << 20

// Alive reports whether the box's init is that very process.
func (b Box) Alive() bool {
	s, err := startTime(b.PID)
	return err == nil && b.PID > 1 && s == b.Start
}

func startTime(pid int) (uint64, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// The second field is the name in parentheses and may hold anything.
	_, rest, ok := strings.Cut(string(raw[strings.LastIndexByte(string(raw), ')'):]), " ")
	f := strings.Fields(rest)
	if !ok || len(f) < 20 || f[0] == "Z" {
		return 0, fmt.Errorf("process %d: %w", pid, os.ErrProcessDone)
	}
	return strconv.ParseUint(f[19], 10, 64)
}

// initSpec is what init is told through file descriptor 3.
type initSpec struct {
	Spec
	Addrs    []netip.Prefix
	Gateways []netip.Addr
}

// Start makes a box. self is the argv prefix that runs Init. The topology's router must run when the spec has an uplink.
func Start(self []string, s Spec, top *Topology) (Box, error) {
	b, err := start(self, s, top)
	if err != nil {
		return b, fmt.Errorf("start %s: %w", s.Name, err)
	}
	return b, nil
}

func start(self []string, s Spec, top *Topology) (Box, error) {
	in := initSpec{Spec: s}
	if s.Uplink != nil {
		in.Addrs, in.Gateways = top.Addresses(*s.Uplink), top.Gateways(s.Uplink.Segment)
	}
	if s.Cgroup != "" {
		if err := makeCgroups(s.Cgroup); err != nil {
			return Box{}, err
		}
	}
	raw, err := json.Marshal(in)
	if err != nil {
		return Box{}, err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return Box{}, err
	}
	defer r.Close()
	defer w.Close()
	logTo, err := openLog(s.Log)
	if err != nil {
		return Box{}, err
	}
	defer logTo.Close()
	cmd := exec.Command(self[0], self[1:]...)
	cmd.Dir, cmd.Env = "/", []string{"PATH=/bin"}
	cmd.Stdout, cmd.Stderr = logTo, logTo
	cmd.ExtraFiles = []*os.File{r}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid:     true, // it outlives this process and its terminal
		Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
	}
	if err := cmd.Start(); err != nil {
		return Box{}, err
	}
	go cmd.Wait() // reaped here while this process lives
	b := Box{Name: s.Name, PID: cmd.Process.Pid}
	if b.Start, err = startTime(b.PID); err != nil {
		return b, err
	}
	fail := func(err error) (Box, error) { return b, errors.Join(err, b.Kill(s.Cgroup)) }
	if s.Cgroup != "" {
		if err := joinCgroups(s.Cgroup, b.PID); err != nil {
			return fail(err)
		}
	}
	if s.Uplink != nil {
		if err := top.attach(*s.Uplink, b.PID); err != nil {
			return fail(err)
		}
	}
	// Init waits for this: the interface is there before anything runs.
	if _, err := w.Write(raw); err != nil {
		return fail(err)
	}
	return b, nil
}

func openLog(path string) (*os.File, error) {
	if path == "" {
		return os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	}
	if st, err := os.Stat(path); err == nil && st.Size() > maxLog {
		if err := os.Rename(path, path+".1"); err != nil {
			return nil, err
		}
	}
	return os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
}

// Stop asks init to end its daemon and itself, and kills what has not ended after the grace.
func (b Box) Stop(ctx context.Context, cgroup string, grace time.Duration) error {
	if !b.Alive() {
		return b.Kill(cgroup)
	}
	unix.Kill(b.PID, unix.SIGTERM)
	end := time.Now().Add(grace)
	for b.Alive() && time.Now().Before(end) && ctx.Err() == nil {
		time.Sleep(20 * time.Millisecond)
	}
	return b.Kill(cgroup)
}

// Kill ends everything in the box at once, as pulling a machine's plug, and removes its cgroups.
func (b Box) Kill(cgroup string) error {
	if b.Alive() {
		unfreeze(cgroup) // a frozen process does not die
		if err := unix.Kill(b.PID, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("kill %s: %w", b.Name, err)
		}
	}
	// Init is the last to go: when it is gone its PID namespace is empty.
	for end := time.Now().Add(15 * time.Second); b.Alive(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			return fmt.Errorf("kill %s: process %d does not end", b.Name, b.PID)
		}
	}
	if cgroup != "" {
		removeCgroups(cgroup)
	}
	return nil
}

// NetNS is the path of the box's network namespace as seen from the host.
func (b Box) NetNS() string { return fmt.Sprintf("/proc/%d/ns/net", b.PID) }

// Controllers of cgroup version 1 that a box's processes are put into. runsc makes groups in all others by itself.
func hierarchies() []string {
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		return []string{"/sys/fs/cgroup"}
	}
	var out []string
	for _, c := range []string{"memory", "pids", "freezer"} {
		if _, err := os.Stat(filepath.Join("/sys/fs/cgroup", c, "cgroup.procs")); err == nil {
			out = append(out, filepath.Join("/sys/fs/cgroup", c))
		}
	}
	return out
}

func makeCgroups(group string) error {
	for _, h := range hierarchies() {
		if err := os.MkdirAll(filepath.Join(h, group, "box"), 0o755); err != nil {
			return fmt.Errorf("cgroup: %w", err)
		}
	}
	return nil
}

// joinCgroups puts init into the group "box" below: with version 2 a group that has children holds no processes itself.
func joinCgroups(group string, pid int) error {
	for _, h := range hierarchies() {
		if err := os.WriteFile(filepath.Join(h, group, "box", "cgroup.procs"), []byte(strconv.Itoa(pid)), 0o644); err != nil {
			return fmt.Errorf("cgroup: %w", err)
		}
	}
	return nil
}

// RemoveCgroups removes what is left of a grid's groups.
func RemoveCgroups(group string) { removeCgroups(group) }

// removeCgroups removes a group and all below it, in every hierarchy.
func removeCgroups(group string) {
	roots, _ := filepath.Glob("/sys/fs/cgroup/*")
	for _, h := range append(roots, "/sys/fs/cgroup") {
		top := filepath.Join(h, group)
		if _, err := os.Stat(top); err != nil {
			continue
		}
		var dirs []string
		filepath.WalkDir(top, func(p string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, p)
			}
			return nil
		})
		for i := len(dirs) - 1; i >= 0; i-- {
			for range 100 { // the last process may still be leaving
				if err := os.Remove(dirs[i]); !errors.Is(err, unix.EBUSY) {
					break
				}
				time.Sleep(5 * time.Millisecond)
			}
		}
	}
}

// Freeze stops all processes of a box where they are, as a machine that hangs.
func Freeze(cgroup string) error {
	if err := setFreezer(cgroup, true); err != nil {
		return fmt.Errorf("freeze: %w", err)
	}
	return nil
}

// Thaw lets them go on.
func Thaw(cgroup string) error {
	if err := setFreezer(cgroup, false); err != nil {
		return fmt.Errorf("thaw: %w", err)
	}
	return nil
}

func unfreeze(cgroup string) {
	if cgroup != "" {
		setFreezer(cgroup, false)
	}
}

func setFreezer(cgroup string, frozen bool) error {
	v1 := filepath.Join("/sys/fs/cgroup/freezer", cgroup, "freezer.state")
	if _, err := os.Stat(v1); err == nil {
		state := map[bool]string{true: "FROZEN", false: "THAWED"}[frozen]
		if err := os.WriteFile(v1, []byte(state), 0o644); err != nil {
			return err
		}
		for end := time.Now().Add(5 * time.Second); frozen && time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
			if b, err := os.ReadFile(v1); err == nil && strings.TrimSpace(string(b)) == state {
				return nil
			}
			os.WriteFile(v1, []byte(state), 0o644) // what forked meanwhile needs asking again
		}
		return nil
	}
	return os.WriteFile(filepath.Join("/sys/fs/cgroup", cgroup, "cgroup.freeze"), []byte(map[bool]string{true: "1", false: "0"}[frozen]), 0o644)
}
