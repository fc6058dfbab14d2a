package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"holdfast/internal/box"
	"holdfast/overlay"

	"github.com/spf13/cobra"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// check is one thing that a machine must have.
type check struct {
	Name    string `json:"name"`
	OK      bool   `json:"ok"`
	Problem string `json:"problem,omitempty"`
	Mend    string `json:"mend,omitempty"` // how to get it
}

// What a grid of three nodes with a small contract needs.
const (
	needMemory = 3 << 30
	needDisk   = 4 << 30
	needFiles  = 4096
	needKernel = "5.12" // open_tree and mount_setattr
)

// host is the machine as doctor looks at it.
type host struct {
	root   string // before /dev, /proc and /sys
	uid    int
	arch   string
	self   string // path of holdfast
	dir    string // the grid's
	listen string // address that leads to the gateway
	memory uint64
	files  uint64                       // open files that a process may have
	free   func(string) (uint64, error) // bytes on the disk of a directory
	try    func() trial                 // makes what a box is made of
}

// trial is what came of making it.
type trial struct{ namespaces, overlayfs, links, tun, firewall error }

func (a *app) doctorCmd() *cobra.Command {
	var listen string
	cmd := &cobra.Command{
		Use: "doctor", Short: "Say what this machine lacks to run a grid, and how to get it", Args: asUsed,
		Long:    "Looks at this machine, and makes for a moment what a grid is made of: namespaces, links between them, a firewall, an\noverlay file system. Nothing of it stays. It fails when something is missing.",
		Example: "  holdfast doctor\n  holdfast doctor --json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			h, err := a.host(listen)
			if err != nil {
				return err
			}
			all := examine(h)
			bad := 0
			for _, c := range all {
				if !c.OK {
					bad++
				}
			}
			if a.json {
				err = printJSON(cmd.OutOrStdout(), all)
			} else {
				showChecks(cmd.OutOrStdout(), all)
			}
			if err == nil && bad > 0 {
				err = fmt.Errorf("%d of %d checks failed", bad, len(all))
			}
			return err
		},
	}
	cmd.Flags().StringVar(&listen, "listen", "", "`address` that up will listen on (default 127.0.0.1:8443, or what the grid has)")
	return cmd
}

func showChecks(w io.Writer, all []check) {
	for _, c := range all {
		if c.OK {
			fmt.Fprintf(w, "%s  %s\n", paint(w, green, "ok  "), c.Name)
			continue
		}
		fmt.Fprintf(w, "%s  %s: %s\n      %s\n", paint(w, red, "miss"), c.Name, c.Problem, c.Mend)
	}
}

// host looks at this machine.
func (a *app) host(listen string) (host, error) {
	dir, err := filepath.Abs(a.dir)
	if err != nil {
		return host{}, err
	}
	self, err := os.Executable()
	if err != nil {
		return host{}, err
	}
	if listen == "" {
		if listen = listenOf(dir); listen == "" {
			listen = "127.0.0.1:8443"
		}
	}
	var mem unix.Sysinfo_t
	if err := unix.Sysinfo(&mem); err != nil {
		return host{}, fmt.Errorf("memory: %w", err)
	}
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		return host{}, fmt.Errorf("open files: %w", err)
	}
	free := func(dir string) (uint64, error) {
		var st unix.Statfs_t
		err := unix.Statfs(dir, &st)
		return st.Bavail * uint64(st.Bsize), err
	}
	return host{
		uid: os.Geteuid(), arch: runtime.GOARCH, self: self, dir: dir, listen: listen,
		memory: uint64(mem.Totalram) * uint64(mem.Unit), files: files.Max, free: free, try: attempt,
	}, nil
}

// examine compares a machine with what a grid needs. It changes nothing that stays.
func examine(h host) []check {
	var out []check
	add := func(name string, err error, mend string) {
		c := check{Name: name, OK: err == nil}
		if err != nil {
			c.Problem, c.Mend = err.Error(), mend
		}
		out = append(out, c)
	}
	var root error
	if h.uid != 0 {
		root = fmt.Errorf("this is user %d", h.uid)
	}
	add("root", root, "up makes namespaces and mounts: run it and doctor as root")
	var arch error
	if h.arch != "amd64" {
		arch = fmt.Errorf("this is %s", h.arch)
	}
	add("x86-64", arch, "images run on linux/amd64 only in this version: use another machine")
	add("kernel "+needKernel, kernel(h.root), "boot a newer kernel; Debian 12 has 6.1")
	add("holdfast-runsc beside holdfast", executable(filepath.Join(filepath.Dir(h.self), "holdfast-runsc")), "make build makes it; or up --runsc PATH")
	add("FUSE", openable(h.root+"/dev/fuse"), "load the module: modprobe fuse")
	add("loop devices", openable(h.root+"/dev/loop-control"), "load the module: modprobe loop")
	for _, f := range []string{"ext4", "overlay", "tmpfs"} {
		add(f+" file system", fileSystem(h.root, f), "load the module: modprobe "+f)
	}
	for _, c := range []string{"memory", "cpu", "pids", "freezer"} {
		add("control group: "+c, controller(h.root+"/sys/fs/cgroup", c), "mount cgroup version 2 at /sys/fs/cgroup (or version 1 with this controller), writable; if it is there and "+c+" is not, take cgroup_disable="+c+" off the kernel's command line")
	}
	var t trial
	if h.uid == 0 {
		t = h.try()
	} else {
		no := errors.New("it cannot be tried without root")
		t = trial{no, no, no, no, no}
	}
	add("namespaces", t.namespaces, "the kernel needs CONFIG_NET_NS, CONFIG_PID_NS, CONFIG_UTS_NS and CONFIG_IPC_NS, and sysctl user.max_net_namespaces above 0; a container must be privileged")
	add("overlay mounts", t.overlayfs, "load the module: modprobe overlay; a container must be privileged")
	add("veth and bridges", t.links, "load the modules: modprobe veth bridge")
	add("TUN", t.tun, "load the module: modprobe tun")
	add("nf_tables with NAT", t.firewall, "load the modules: modprobe nf_tables nft_masq nft_ct")
	add("memory", atLeast(h.memory, needMemory), "use fewer --nodes, or a larger machine")
	at := h.dir
	for at != "/" {
		if _, err := os.Stat(at); err == nil {
			break
		}
		at = filepath.Dir(at)
	}
	free, err := h.free(at)
	if err == nil {
		err = atLeast(free, needDisk)
	}
	add("disk at "+at, err, "free some, or choose another --dir")
	var files error
	if h.files < needFiles {
		files = fmt.Errorf("a process may open %d, a grid needs %d", h.files, needFiles)
	}
	add("open files", files, "raise the limit: ulimit -Hn 65536")
	add("listening on "+h.listen, listenable(h.listen, h.dir), "end what listens there, or choose another address with up --listen")
	return out
}

func atLeast(have, need uint64) error {
	if have < need {
		return fmt.Errorf("%.1f GiB, a grid needs %d GiB", float64(have)/(1<<30), need>>30)
	}
	return nil
}

// kernel checks the release, as "6.1.0-18-amd64".
func kernel(root string) error {
	b, err := os.ReadFile(root + "/proc/sys/kernel/osrelease")
	if err != nil {
		return err
	}
	var have, need [2]int
	if _, err := fmt.Sscanf(string(b), "%d.%d", &have[0], &have[1]); err != nil {
		return fmt.Errorf("release %q: %w", strings.TrimSpace(string(b)), err)
	}
	if _, err := fmt.Sscanf(needKernel, "%d.%d", &need[0], &need[1]); err != nil {
		return err
	}
	if have[0] < need[0] || have[0] == need[0] && have[1] < need[1] {
		return fmt.Errorf("this is %s", strings.TrimSpace(string(b)))
	}
	return nil
}

func executable(path string) error {
	st, err := os.Stat(path)
	if err != nil {
		return err
	}
	if !st.Mode().IsRegular() || st.Mode()&0o111 == 0 {
		return fmt.Errorf("%s is no program (mode %v)", path, st.Mode())
	}
	return nil
}

func openable(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return f.Close()
}

func fileSystem(root, name string) error {
	b, err := os.ReadFile(root + "/proc/filesystems")
	if err != nil {
		return err
	}
	if !strings.Contains(string(b), "\t"+name+"\n") {
		return errors.New("the kernel does not have it, or not yet")
	}
	return nil
}

// controller checks that groups with a controller can be made, in version 2 or in version 1.
func controller(at, name string) error {
	if b, err := os.ReadFile(filepath.Join(at, "cgroup.controllers")); err == nil {
		// In version 2 every group can be frozen.
		if name != "freezer" && !strings.Contains(" "+strings.TrimSpace(string(b))+" ", " "+name+" ") {
			return fmt.Errorf("version 2 at %s has only: %s", at, strings.TrimSpace(string(b)))
		}
	} else {
		at = filepath.Join(at, name)
		if _, err := os.Stat(filepath.Join(at, "cgroup.procs")); err != nil {
			return err
		}
	}
	dir, err := os.MkdirTemp(at, "holdfast-doctor-")
	if err != nil {
		return err
	}
	return os.Remove(dir)
}

// listenable checks an address. The grid itself may have it.
func listenable(addr, dir string) error {
	l, err := net.Listen("tcp", addr)
	if err == nil {
		return l.Close()
	}
	if errors.Is(err, unix.EADDRINUSE) && box.Supervisor(dir) > 0 && listenOf(dir) == addr {
		return nil
	}
	return err
}

// attempt makes namespaces on a thread that ends with them, and in these what a box is made of.
func attempt() trial {
	done := make(chan trial)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// The first thread cannot end. It is held while another goroutine, which cannot get it, does the work.
			t := attempt()
			runtime.UnlockOSThread()
			done <- t
			return
		}
		// Locked for ever: the thread, and all that is made here, end with this goroutine.
		var t trial
		defer func() { done <- t }()
		if err := unix.Unshare(unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC); err != nil {
			no := errors.New("it cannot be tried without namespaces")
			t = trial{err, no, no, no, no}
			return
		}
		_, t.namespaces = os.Stat("/proc/self/ns/pid")
		t.overlayfs = tryOverlay()
		t.links = errors.Join(netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "hf0"}, PeerName: "hf1"}),
			netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "hf2"}}))
		t.tun = tryTUN()
		t.firewall = overlay.Firewall{Main: fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()), Egress: true}.Apply()
	}()
	return <-done
}

// tryOverlay mounts one over a tmpfs, as a sandbox's root is.
func tryOverlay() error {
	dir, err := os.MkdirTemp("", "holdfast-doctor-")
	if err != nil {
		return err
	}
	defer os.Remove(dir)
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("private mounts: %w", err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
		return fmt.Errorf("mount tmpfs: %w", err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	for _, d := range []string{"lower", "upper", "work", "root"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o700); err != nil {
			return err
		}
	}
	opts := fmt.Sprintf("lowerdir=%[1]s/lower,upperdir=%[1]s/upper,workdir=%[1]s/work", dir)
	if err := unix.Mount("overlay", filepath.Join(dir, "root"), "overlay", 0, opts); err != nil {
		return fmt.Errorf("mount overlay: %w", err)
	}
	return unix.Unmount(filepath.Join(dir, "root"), unix.MNT_DETACH)
}

func tryTUN() error {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open /dev/net/tun: %w", err)
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq("hf3")
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
		return fmt.Errorf("make a TUN interface: %w", err)
	}
	return nil
}
