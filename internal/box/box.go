// Package box runs one role of a grid (a validator, a node, a gateway) on this machine as if it had a machine of its own:
// new PID, mount, network, UTS and IPC namespaces, a root file system that shows nothing of the host but what it is
// given, and a small init that starts the role's daemon, starts it again when it dies, and reaps what it leaves. When
// init dies the kernel ends everything inside, with its mounts and interfaces: nothing can leak.
//
// A box shows what a machine of its own would show, and takes away the privileges that reach past that: making device
// nodes, opening files by handle, loading modules, setting the clock. It is not a wall against its own root, who shares
// the kernel and its settings with the host. Workloads have their own wall inside it.
//
// Inside, the root is a tmpfs:
//
//	/bin/…                    the given binaries, read-only
//	/data                     the given directory of the host, the only thing that lasts
//	/etc/holdfast/config.json the role's configuration
//	/dev /proc /sys /run /tmp as on a small machine; /dev has no disks, but loop devices, fuse and tun;
//	                          /sys/fs/cgroup is the host's
//
// A box is known by the process ID of its init and that process's start time, so that a supervisor that comes later
// finds it again and never touches another process.
package box

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
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
	Log      string            // file on the host that the daemon's output is appended to; "" discards it
	Cgroup   string            // parent of all cgroups of the box, as in /proc/self/cgroup; "" makes none
	Uplink   *Uplink           // nil: no interface but the loopback
	Grace    time.Duration     // for the daemon to end when asked to; 0 means 30 s
}

// defaultGrace is a Spec's zero Grace.
const defaultGrace = 30 * time.Second

// Uplink is the box's place in a Topology.
type Uplink struct {
	Segment int
	Host    int // 2 to 14; 1 is the router
}

func (u Uplink) valid() error {
	if u.Segment < 0 || u.Segment >= Segments || u.Host < 2 || u.Host > 14 {
		return fmt.Errorf("segment %d has no host %d", u.Segment, u.Host)
	}
	return nil
}

// Box is a running box.
type Box struct {
	Name  string
	PID   int    // of init
	Start uint64 // of that process, in clock ticks since boot (proc(5), stat, field 22)
}

// stat reads the state of a process and when it started.
func stat(pid int) (state string, start uint64, err error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return "", 0, err
	}
	// The second field is the name in parentheses and may hold anything.
	f := bytes.Fields(raw[bytes.LastIndexByte(raw, ')')+1:])
	if len(f) < 20 {
		return "", 0, fmt.Errorf("process %d: %w", pid, os.ErrProcessDone)
	}
	start, err = strconv.ParseUint(string(f[19]), 10, 64)
	return string(f[0]), start, err
}

// open returns a descriptor of that very process, also when it has ended and nobody has asked how.
func (b Box) open() (int, error) {
	if b.PID <= 1 {
		return -1, os.ErrProcessDone
	}
	fd, err := unix.PidfdOpen(b.PID, 0)
	if err != nil {
		return -1, err
	}
	if _, start, err := stat(b.PID); err != nil || start != b.Start {
		unix.Close(fd)
		return -1, os.ErrProcessDone
	}
	return fd, nil
}

// ended waits until a process has ended with all its threads: for an init, that is when its namespace is empty. Its
// state "Z" in /proc is not enough, which the first thread shows while another still ends the rest.
func ended(pidfd int, wait time.Duration) bool {
	for end := time.Now().Add(wait); ; {
		ms := max(0, int(time.Until(end).Milliseconds()))
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, ms)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return n > 0
	}
}

// Alive reports whether the box's init is that very process.
func (b Box) Alive() bool {
	fd, err := b.open()
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	return !ended(fd, 0)
}

// initSpec is what init is told through file descriptor 3.
type initSpec struct {
	Spec
	Addrs    []netip.Prefix
	Gateways []netip.Addr
}

// begun is what init says through file descriptor 4 when its daemon runs; anything else is what went wrong.
const begun = "begun"

// Start makes a box. self is the argv prefix that runs Init. The topology's router must run when the spec has an uplink.
// It returns when the daemon runs. A box that is attached to a topology ends with it.
func Start(self []string, s Spec, top *Topology) (Box, error) {
	return start(self, s, top, true, func(Box) error { return nil })
}

// start makes a box whose cable is plugged in or not. remember is called before anything runs in the box but an init
// that waits and ends when this process does: a box of which nobody knows is never left behind.
func start(self []string, s Spec, top *Topology, plugged bool, remember func(Box) error) (Box, error) {
	b, err := launch(self, s, top, plugged, remember)
	if err != nil {
		if b.PID > 0 {
			err = errors.Join(err, b.Kill(s.Cgroup))
		}
		return Box{}, fmt.Errorf("start %s: %w", s.Name, err)
	}
	return b, nil
}

func launch(self []string, s Spec, top *Topology, plugged bool, remember func(Box) error) (b Box, err error) {
	in := initSpec{Spec: s}
	if s.Uplink != nil {
		if err := s.Uplink.valid(); err != nil {
			return b, err
		}
		in.Addrs, in.Gateways = top.Addresses(*s.Uplink), top.Gateways(s.Uplink.Segment)
	}
	order, err := json.Marshal(in)
	if err != nil {
		return b, err
	}
	orderR, orderW, err := os.Pipe()
	if err != nil {
		return b, err
	}
	defer orderR.Close()
	defer orderW.Close()
	sayR, sayW, err := os.Pipe()
	if err != nil {
		return b, err
	}
	defer sayR.Close()
	defer sayW.Close()
	log, err := openLog(s.Log)
	if err != nil {
		return b, err
	}
	defer log.Close()
	cmd := exec.Command(self[0], self[1:]...)
	cmd.Dir, cmd.Env = "/", []string{"PATH=/bin"}
	cmd.Stdout, cmd.Stderr = log, log
	cmd.ExtraFiles = []*os.File{orderR, sayW}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid:     true, // it outlives this process and its terminal
		Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
	}
	if err := cmd.Start(); err != nil {
		return b, err
	}
	pid := cmd.Process.Pid
	_, began, err := stat(pid)
	go cmd.Wait() // reaped here while this process lives
	if err != nil {
		return b, err
	}
	b = Box{Name: s.Name, PID: pid, Start: began}
	if s.Cgroup != "" {
		if err := machine.enter(s.Cgroup, pid); err != nil {
			return b, err
		}
	}
	if s.Uplink != nil {
		if err := top.attach(*s.Uplink, b, plugged); err != nil {
			return b, err
		}
	}
	if err := remember(b); err != nil {
		return b, err
	}
	sayW.Close()
	// Init waits for its order: everything is there before anything runs.
	if _, err := orderW.Write(order); err != nil {
		return b, err
	}
	orderW.Close()
	if err := sayR.SetReadDeadline(time.Now().Add(settle)); err != nil {
		return b, err
	}
	said, err := io.ReadAll(io.LimitReader(sayR, 4096))
	switch {
	case err != nil:
		return b, fmt.Errorf("init: %w", err)
	case len(said) == 0:
		return b, errors.New("init ended without a word")
	case string(said) != begun:
		return b, errors.New(strings.TrimSpace(string(said)))
	}
	return b, nil
}

func openLog(path string) (*os.File, error) {
	if path == "" {
		return os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	}
	return os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
}

// maxLog is the size beyond which a log is moved to LOG.1.
const maxLog = 16 << 20

// rotate keeps a log that is being written from growing without end. The writer appends, so it goes on at the new end;
// what it writes during the copy is lost.
func rotate(path string, limit int64) error {
	st, err := os.Stat(path)
	if err != nil || st.Size() <= limit {
		return nil // also where there is none
	}
	from, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("rotate log: %w", err)
	}
	defer from.Close()
	to, err := os.OpenFile(path+".1", os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("rotate log: %w", err)
	}
	_, err = io.Copy(to, io.LimitReader(from, 2*limit))
	if err = errors.Join(err, to.Close(), from.Truncate(0)); err != nil {
		return fmt.Errorf("rotate log: %w", err)
	}
	return nil
}

// Stop asks init to end its daemon and itself, and kills what has not ended after the grace.
func (b Box) Stop(ctx context.Context, cgroup string, grace time.Duration) error {
	if fd, err := b.open(); err == nil {
		unix.PidfdSendSignal(fd, unix.SIGTERM, nil, 0)
		for end := time.Now().Add(grace); !ended(fd, 50*time.Millisecond) && time.Now().Before(end) && ctx.Err() == nil; {
		}
		unix.Close(fd)
	}
	return b.Kill(cgroup)
}

// Kill ends everything in the box at once, as pulling a machine's plug, and removes its cgroups. When it returns, no
// process of the box is left.
func (b Box) Kill(cgroup string) error {
	fd, err := b.open()
	if err == nil {
		defer unix.Close(fd)
		if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("kill %s: %w", b.Name, err)
		}
	}
	if cgroup != "" {
		if err := machine.end(cgroup); err != nil {
			return fmt.Errorf("kill %s: %w", b.Name, err)
		}
	}
	if err == nil && !ended(fd, settle) {
		return fmt.Errorf("kill %s: process %d does not end", b.Name, b.PID)
	}
	return nil
}

// NetNS is the path of the box's network namespace as seen from the host.
func (b Box) NetNS() string { return fmt.Sprintf("/proc/%d/ns/net", b.PID) }
