// Package machine is process 1 of a machine that runs a node and nothing else: no shell, no login, no other program. Started by
// the kernel out of an initramfs that it never leaves, it mounts what a node needs, loads the modules that the image lists
// and then no more, takes the one disk that is the node's, shuts the network before a cable is used, asks for addresses,
// and starts the node, again when it dies. The serial console is written and never read.
//
// It has no configuration but the kernel's command line (Order), and decides nothing about workloads. What fails is said on
// the console, and the machine starts again: there is nothing to drop into.
//
// The disk holds one ext4 file system labelled "holdfast" at /data. A disk that is empty (its first and last MiB are zero)
// is given one; a disk with anything else on it is left alone.
package machine

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	"holdfast/internal/pid1"

	"golang.org/x/sys/unix"
)

// Config is what the program around a machine gives it.
type Config struct {
	Version string
	Shut    func() error // drops whatever comes in uninvited; called before a cable is used
}

// Paths of a machine. /etc/resolv.conf leads to names.
const (
	data    = "/data"
	names   = "/run/machine/resolv.conf"
	modules = "/lib/modules"
	work    = "/work" // cgroup of the workloads
)

// pause is how long a failure stays on the console before the machine starts again.
const pause = 10 * time.Second

// Run is the whole life of a machine. It returns only if the machine cannot even start again.
func Run(cfg Config) {
	err := run(cfg)
	fmt.Fprintf(os.Stderr, "machine: %v\nmachine: starting again in %v\n", err, pause)
	unix.Sync()
	time.Sleep(pause)
	unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
}

func run(cfg Config) error {
	os.Clearenv() // the kernel passes on what it does not know of its command line
	if err := mounts(); err != nil {
		return err
	}
	if err := console(); err != nil {
		return fmt.Errorf("console: %w", err)
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	line, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	o, err := parseOrder(string(line))
	if err != nil {
		return err
	}
	log.Info("holdfast as process 1", "version", cfg.Version, "name", o.Name, "farm", o.Farm, "grid", o.Grid)
	if err := loadModules(modules); err != nil {
		return err
	}
	if err := settle(o.Name); err != nil {
		return err
	}
	disk, err := takeDisk(log)
	if err != nil {
		return fmt.Errorf("disk: %w", err)
	}
	log.Info("disk", "device", disk, "on", data)
	if err := cfg.Shut(); err != nil {
		return err
	}
	if err := connect(context.Background(), log); err != nil {
		return fmt.Errorf("network: %w", err)
	}
	d := &pid1.Daemon{Args: nodeArgs(o), Env: []string{"PATH=/bin", "HOME=/run"}}
	if err := d.Start(); err != nil {
		return err
	}
	return d.Run()
}

// nodeArgs is the command that runs the node.
func nodeArgs(o Order) []string {
	return []string{
		"/bin/holdfast", "run", "node", "--name", o.Name, "--grid", o.Grid, "--from", o.From, "--farm", o.Farm,
		"--genesis", filepath.Join(data, "genesis"), "--data", data, "--key", filepath.Join(data, "node.key"),
		"--run", "/run/holdfast", "--runsc", "/bin/holdfast-runsc", "--cgroup", work,
	}
}

// mounts makes the file systems of a machine. The root becomes read-only, and a mount that has a parent: gVisor changes its
// root with pivot_root, which the kernel's first root refuses.
func mounts() error {
	// Dangling until there are names; the root cannot be written later.
	if err := os.Symlink(names, "/etc/resolv.conf"); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	const root = "/mnt"
	if err := os.MkdirAll(root, 0o755); err != nil {
		return err
	}
	if err := unix.Mount("/", root, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("root: %w", err)
	}
	if err := unix.Mount("", root, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV, ""); err != nil {
		return fmt.Errorf("root: %w", err)
	}
	if err := os.Chdir(root); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("root: %w", err)
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	for _, m := range []struct {
		dir, kind, opts string
		flags           uintptr
	}{
		{"/proc", "proc", "", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC},
		{"/sys", "sysfs", "", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC | unix.MS_RDONLY},
		{"/sys/fs/cgroup", "cgroup2", "", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC},
		{"/dev", "devtmpfs", "mode=755", unix.MS_NOSUID | unix.MS_NOEXEC},
		{"/dev/pts", "devpts", "newinstance,ptmxmode=0666,mode=620", unix.MS_NOSUID | unix.MS_NOEXEC},
		{"/dev/shm", "tmpfs", "mode=1777", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC},
		{"/run", "tmpfs", "mode=700,size=80%", unix.MS_NOSUID | unix.MS_NODEV}, // images run from here
		{"/tmp", "tmpfs", "mode=1777,size=64m", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC},
	} {
		if strings.HasPrefix(m.dir, "/dev/") {
			if err := os.MkdirAll(m.dir, 0o755); err != nil {
				return err
			}
		}
		if err := unix.Mount(m.kind, m.dir, m.kind, m.flags, m.opts); err != nil {
			return fmt.Errorf("mount %s: %w", m.dir, err)
		}
	}
	return os.MkdirAll(filepath.Dir(names), 0o700)
}

// console makes the console what everything here writes to, and nothing what it reads from.
func console() error {
	for fd, open := range []struct {
		path string
		mode int
	}{{"/dev/null", unix.O_RDONLY}, {"/dev/console", unix.O_WRONLY}, {"/dev/console", unix.O_WRONLY}} {
		f, err := unix.Open(open.path, open.mode|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("%s: %w", open.path, err)
		}
		if err := unix.Dup3(f, fd, 0); err != nil {
			return err
		}
		if err := unix.Close(f); err != nil {
			return err
		}
	}
	return nil
}

// settle sets what the kernel leaves open: whoever sits at the machine has no key that does anything, and nobody loads
// another kernel, a module, or finds memory in a core dump.
func settle(name string) error {
	// Control-Alt-Delete becomes a signal, which nobody listens to.
	signal.Ignore(unix.SIGINT)
	if err := unix.Reboot(unix.LINUX_REBOOT_CMD_CAD_OFF); err != nil {
		return fmt.Errorf("control-alt-delete: %w", err)
	}
	for _, s := range [][2]string{
		{"kernel/sysrq", "0"}, {"kernel/core_pattern", ""}, {"kernel/kexec_load_disabled", "1"}, {"kernel/modules_disabled", "1"},
		{"kernel/dmesg_restrict", "1"}, {"kernel/kptr_restrict", "2"}, {"kernel/unprivileged_bpf_disabled", "1"},
	} {
		if err := os.WriteFile("/proc/sys/"+s[0], []byte(s[1]+"\n"), 0o644); err != nil {
			return err
		}
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("no core dumps: %w", err)
	}
	if err := unix.Sethostname([]byte(name)); err != nil {
		return fmt.Errorf("host name: %w", err)
	}
	return nil
}
