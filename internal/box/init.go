package box

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"

	"holdfast/internal/pid1"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Init is process 1 of a box. It returns only when it could not begin, or when the box is to end.
func Init() error {
	// What is dropped here is dropped by this thread alone, and by what it starts.
	runtime.LockOSThread()
	if os.Getpid() != 1 {
		return errors.New("init: this is not process 1 of a namespace; it is started by holdfast itself")
	}
	unix.CloseOnExec(3)
	unix.CloseOnExec(4)
	order, say := os.NewFile(3, "order"), os.NewFile(4, "say")
	var s initSpec
	d, err := begin(order, &s)
	if err != nil {
		fmt.Fprint(say, err)
		return fmt.Errorf("init: %w", err)
	}
	if _, err := say.WriteString(begun); err != nil {
		return fmt.Errorf("init: %w", err)
	}
	say.Close()
	return d.Run()
}

// begin does everything up to the daemon's first start.
func begin(order io.ReadCloser, s *initSpec) (*pid1.Daemon, error) {
	if err := closeInherited(); err != nil {
		return nil, err
	}
	if err := json.NewDecoder(order).Decode(s); err != nil {
		return nil, fmt.Errorf("read order: %w", err)
	}
	order.Close()
	term := make(chan os.Signal, 8)
	signal.Notify(term, unix.SIGTERM, unix.SIGINT)
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return nil, fmt.Errorf("no core dumps: %w", err)
	}
	if err := buildRoot(&s.Spec); err != nil {
		return nil, fmt.Errorf("root: %w", err)
	}
	if err := unix.Sethostname([]byte(s.Name)); err != nil {
		return nil, fmt.Errorf("host name: %w", err)
	}
	if err := uplink(s); err != nil {
		return nil, fmt.Errorf("network: %w", err)
	}
	for _, c := range dropped {
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err != nil && !errors.Is(err, unix.EINVAL) { // a newer one than the kernel
			return nil, fmt.Errorf("drop capability %d: %w", c, err)
		}
	}
	d := &pid1.Daemon{Args: s.Args, Env: append([]string{"PATH=/bin", "HOME=/run"}, s.Env...), Grace: s.Grace, Term: term}
	if d.Grace <= 0 {
		d.Grace = defaultGrace
	}
	if s.Uplink != nil {
		d.Check = uplinked
	}
	return d, d.Start()
}

// uplinked says whether the box still has its cable.
func uplinked() error {
	if _, err := netlink.LinkByName("eth0"); errors.As(err, &netlink.LinkNotFoundError{}) {
		return errors.New("init: eth0 is gone: the grid's internet has ended")
	}
	return nil
}

// dropped are capabilities that reach the host past the box's namespaces and that no machine's daemon needs: device nodes
// of its disks, its files by handle, its modules, memory, clock, kernel log, audit and power.
var dropped = []uintptr{
	unix.CAP_MKNOD, unix.CAP_DAC_READ_SEARCH, unix.CAP_SYS_MODULE, unix.CAP_SYS_RAWIO, unix.CAP_SYS_TIME, unix.CAP_SYSLOG,
	unix.CAP_SYS_BOOT, unix.CAP_SYS_PACCT, unix.CAP_SYS_TTY_CONFIG, unix.CAP_WAKE_ALARM, unix.CAP_BLOCK_SUSPEND,
	unix.CAP_AUDIT_CONTROL, unix.CAP_AUDIT_READ, unix.CAP_AUDIT_WRITE, unix.CAP_MAC_ADMIN, unix.CAP_MAC_OVERRIDE,
	unix.CAP_LINUX_IMMUTABLE, unix.CAP_PERFMON, unix.CAP_BPF,
}

// closeInherited closes what the starter's own starter left open: a directory of the host among it would be a way out.
// Go marks all that it opens itself.
func closeInherited() error {
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return fmt.Errorf("open files: %w", err)
	}
	for _, e := range list {
		fd, err := strconv.Atoi(e.Name())
		if err != nil || fd <= 2 {
			continue
		}
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil && flags&unix.FD_CLOEXEC == 0 {
			unix.Close(fd)
		}
	}
	return nil
}

// buildRoot makes the box's root file system and moves into it. After this nothing of the host can be named.
func buildRoot(s *Spec) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("private: %w", err)
	}
	// Taken before the new root hides them, whatever path they have.
	type bind struct {
		fd     int
		target string
		ro     bool
	}
	var binds []bind
	take := func(source, target string, ro, recursive bool) error {
		flags := uint(unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC)
		if recursive {
			flags |= unix.AT_RECURSIVE
		}
		fd, err := unix.OpenTree(unix.AT_FDCWD, source, flags)
		if err != nil {
			return fmt.Errorf("%s: %w", source, err)
		}
		binds = append(binds, bind{fd, target, ro})
		return nil
	}
	for inside, outside := range s.Binaries {
		if err := take(outside, inside, true, false); err != nil {
			return err
		}
	}
	if s.Data != "" {
		if err := take(s.Data, "/data", false, false); err != nil {
			return err
		}
	}
	if s.Config != "" {
		if err := take(s.Config, "/etc/holdfast/config.json", true, false); err != nil {
			return err
		}
	}
	if s.Cgroup != "" {
		if err := take("/sys/fs/cgroup", "/sys/fs/cgroup", false, true); err != nil {
			return err
		}
	}
	const root = "/mnt"
	if err := unix.Mount("tmpfs", root, "tmpfs", unix.MS_NOSUID, "mode=755,size=64m"); err != nil {
		return fmt.Errorf("tmpfs: %w", err)
	}
	for _, m := range []struct {
		dir, kind, opts string
		flags           uintptr
	}{
		{"/proc", "proc", "", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC},
		{"/sys", "sysfs", "", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC | unix.MS_RDONLY},
		{"/dev", "tmpfs", "mode=755,size=1m", unix.MS_NOSUID | unix.MS_NOEXEC},
		{"/dev/pts", "devpts", "newinstance,ptmxmode=0666,mode=620", unix.MS_NOSUID | unix.MS_NOEXEC},
		{"/dev/shm", "tmpfs", "mode=1777", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC},
		{"/run", "tmpfs", "mode=700", unix.MS_NOSUID},
		{"/tmp", "tmpfs", "mode=1777,size=256m", unix.MS_NOSUID | unix.MS_NODEV},
	} {
		if err := os.MkdirAll(root+m.dir, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.kind, root+m.dir, m.kind, m.flags, m.opts); err != nil {
			return fmt.Errorf("%s: %w", m.dir, err)
		}
	}
	if err := devices(root + "/dev"); err != nil {
		return err
	}
	for _, b := range binds {
		if err := place(root, b.target, b.fd); err != nil {
			return err
		}
		attr := &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV}
		if b.ro {
			attr.Attr_set |= unix.MOUNT_ATTR_RDONLY
		}
		if err := unix.MountSetattr(unix.AT_FDCWD, root+b.target, 0, attr); err != nil {
			return fmt.Errorf("%s: %w", b.target, err)
		}
	}
	old := root + "/old"
	if err := os.Mkdir(old, 0o700); err != nil {
		return err
	}
	if err := unix.PivotRoot(root, old); err != nil {
		return fmt.Errorf("pivot: %w", err)
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	if err := unix.Unmount("/old", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("leave the old root: %w", err)
	}
	return os.Remove("/old")
}

// place puts a taken mount at a path below root; a file needs a file to be mounted on.
func place(root, target string, fd int) error {
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	at := root + target
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		if err := os.MkdirAll(at, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	} else {
		if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
			return err
		}
		f, err := os.Create(at)
		if err != nil {
			return err
		}
		f.Close()
	}
	if err := unix.MoveMount(fd, "", unix.AT_FDCWD, at, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("%s: %w", target, err)
	}
	return nil
}

// loops is how many loop devices a box sees, of those that all boxes and the host share.
const loops = 256

func devices(dir string) error {
	type dev struct {
		name         string
		mode         uint32
		major, minor uint32
	}
	all := []dev{
		{"null", 0o666, 1, 3}, {"zero", 0o666, 1, 5}, {"full", 0o666, 1, 7}, {"random", 0o666, 1, 8}, {"urandom", 0o666, 1, 9},
		{"tty", 0o666, 5, 0}, {"fuse", 0o600, 10, 229}, {"net/tun", 0o600, 10, 200}, {"loop-control", 0o600, 10, 237},
	}
	for _, d := range all {
		p := filepath.Join(dir, d.name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			return err
		}
		if err := unix.Mknod(p, unix.S_IFCHR|d.mode, int(unix.Mkdev(d.major, d.minor))); err != nil {
			return fmt.Errorf("/dev/%s: %w", d.name, err)
		}
		if err := os.Chmod(p, os.FileMode(d.mode)); err != nil {
			return err
		}
	}
	for i := range loops {
		if err := unix.Mknod(fmt.Sprintf("%s/loop%d", dir, i), unix.S_IFBLK|0o600, int(unix.Mkdev(7, uint32(i)))); err != nil {
			return fmt.Errorf("/dev/loop%d: %w", i, err)
		}
	}
	for name, to := range map[string]string{"ptmx": "pts/ptmx", "fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2"} {
		if err := os.Symlink(to, filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	return nil
}

// uplink brings up the loopback and eth0, which the starter has put into this namespace.
func uplink(s *initSpec) error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	if s.Uplink == nil {
		return nil
	}
	// No duplicate address detection: addresses are given, and a second of waiting is a second of being down.
	for _, f := range []string{"accept_dad", "dad_transmits", "accept_ra", "autoconf"} {
		if err := os.WriteFile("/proc/sys/net/ipv6/conf/eth0/"+f, []byte("0"), 0o644); err != nil {
			return err
		}
	}
	eth, err := netlink.LinkByName("eth0")
	if err != nil {
		return err
	}
	for _, a := range s.Addrs {
		addr := &netlink.Addr{IPNet: &net.IPNet{IP: a.Addr().AsSlice(), Mask: net.CIDRMask(a.Bits(), a.Addr().BitLen())}}
		if a.Addr().Is6() {
			addr.Flags = unix.IFA_F_NODAD
		}
		if err := netlink.AddrAdd(eth, addr); err != nil {
			return fmt.Errorf("address %v: %w", a, err)
		}
	}
	if err := netlink.LinkSetUp(eth); err != nil {
		return err
	}
	for _, g := range s.Gateways {
		if err := netlink.RouteAdd(&netlink.Route{LinkIndex: eth.Attrs().Index, Gw: g.AsSlice()}); err != nil {
			return fmt.Errorf("route via %v: %w", g, err)
		}
	}
	return nil
}
