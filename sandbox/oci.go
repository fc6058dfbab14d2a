package sandbox

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// defaultCaps is what a process that is root in its sandbox may do without asking. They act on gVisor's kernel, not on
// the machine's; NET_RAW and MKNOD are left out, since few programs need them.
func defaultCaps() []string {
	return []string{"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_NET_BIND_SERVICE", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_CHROOT"}
}

// knownCaps are those that a contract may add. The rest say nothing inside gVisor, or are refused by it.
func knownCaps() []string {
	return append(defaultCaps(), "CAP_NET_RAW", "CAP_NET_ADMIN", "CAP_MKNOD", "CAP_SYS_PTRACE", "CAP_SYS_NICE", "CAP_SYS_ADMIN", "CAP_SYS_TIME", "CAP_SYS_RESOURCE", "CAP_AUDIT_WRITE", "CAP_IPC_LOCK", "CAP_LEASE", "CAP_DAC_READ_SEARCH", "CAP_LINUX_IMMUTABLE")
}

func capabilities(add, drop []string) ([]string, error) {
	caps := defaultCaps()
	name := func(s string) string {
		s = strings.ToUpper(s)
		if !strings.HasPrefix(s, "CAP_") {
			s = "CAP_" + s
		}
		return s
	}
	for _, d := range drop {
		if strings.EqualFold(d, "all") {
			caps = nil
			continue
		}
		caps = slices.DeleteFunc(caps, func(c string) bool { return c == name(d) })
	}
	for _, a := range add {
		switch {
		case strings.EqualFold(a, "all"):
			return nil, errors.New("capability ALL cannot be added: name those that are needed")
		case !slices.Contains(knownCaps(), name(a)):
			return nil, fmt.Errorf("capability %q is not known", a)
		case !slices.Contains(caps, name(a)):
			caps = append(caps, name(a))
		}
	}
	slices.Sort(caps)
	return caps, nil
}

// ociSpec is the runtime specification of a sandbox, and its user as "uid:gid".
func (r *Runner) ociSpec(b, rootfs string, s *Spec) (*specs.Spec, string, error) {
	caps, err := capabilities(s.CapAdd, s.CapDrop)
	if err != nil {
		return nil, "", err
	}
	args := s.Args
	if len(args) == 0 {
		args = slices.Concat(s.Image.Entrypoint, s.Image.Cmd)
	}
	if len(args) == 0 {
		return nil, "", errors.New("neither the image nor the spec names a command")
	}
	cwd := s.Cwd
	if cwd == "" {
		cwd = s.Image.WorkingDir
	}
	if cwd == "" {
		cwd = "/"
	}
	user := s.User
	if user == "" {
		user = s.Image.User
	}
	u, err := resolveUser(rootfs, user)
	if err != nil {
		return nil, "", err
	}
	env := environment(s.Image.Env, s.Env)
	spec := &specs.Spec{
		Version: "1.1.0",
		Root:    &specs.Root{Path: rootfs, Readonly: s.ReadOnly},
		Process: &specs.Process{
			Args: args, Env: env, Cwd: cwd, User: u, NoNewPrivileges: true,
			Capabilities: &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps},
		},
		Hostname: s.Hostname,
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc"},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "mode=755", "size=65536k"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"}},
			{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=65536k"}},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
		},
		Linux: &specs.Linux{
			Namespaces: []specs.LinuxNamespace{{Type: specs.PIDNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace}, {Type: specs.MountNamespace}},
		},
	}
	if u.UID != 0 {
		spec.Process.Capabilities.Effective, spec.Process.Capabilities.Permitted = nil, nil
	}
	if s.NetNS != "" {
		spec.Linux.Namespaces = append(spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.NetworkNamespace, Path: s.NetNS})
	} else {
		spec.Linux.Namespaces = append(spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.NetworkNamespace})
	}
	for _, m := range s.Mounts {
		if !filepath.IsAbs(m.Target) || filepath.Clean(m.Target) == "/" {
			return nil, "", fmt.Errorf("mount at %q: want an absolute path below /", m.Target)
		}
		om := specs.Mount{Destination: filepath.Clean(m.Target), Type: "bind", Source: m.Source, Options: []string{"rbind", "nosuid", "nodev"}}
		if m.Tmpfs {
			size := m.Size
			if size <= 0 {
				size = 64 << 20
			}
			om = specs.Mount{Destination: om.Destination, Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "nodev", "mode=1777", fmt.Sprintf("size=%d", size)}}
		} else if !filepath.IsAbs(m.Source) {
			return nil, "", fmt.Errorf("mount at %q: source %q is not an absolute path", m.Target, m.Source)
		}
		if m.ReadOnly {
			om.Options = append(om.Options, "ro")
		}
		spec.Mounts = append(spec.Mounts, om)
	}
	for i, f := range s.Files {
		src, err := placeFile(b, i, &f)
		if err != nil {
			return nil, "", err
		}
		spec.Mounts = append(spec.Mounts, specs.Mount{Destination: filepath.Clean(f.Path), Type: "bind", Source: src, Options: []string{"bind", "ro", "nosuid", "nodev"}})
	}
	if r.cfg.Cgroup != "" {
		spec.Linux.CgroupsPath = filepath.Join(r.cfg.Cgroup, s.ID)
		spec.Linux.Resources = resources(s)
	}
	return spec, fmt.Sprintf("%d:%d", u.UID, u.GID), nil
}

// hostTasks is what gVisor's own threads may need beside the workload's, one task of the machine each.
const hostTasks = 192

func resources(s *Spec) *specs.LinuxResources {
	res := &specs.LinuxResources{}
	if s.MemoryBytes > 0 {
		res.Memory = &specs.LinuxMemory{Limit: &s.MemoryBytes}
	}
	if s.CPUMilli > 0 {
		period := uint64(100_000)
		quota := max(s.CPUMilli*int64(period)/1000, 1000)
		res.CPU = &specs.LinuxCPU{Period: &period, Quota: &quota}
	}
	if s.Pids > 0 {
		n := s.Pids + hostTasks
		res.Pids = &specs.LinuxPids{Limit: n}
	}
	return res
}

// placeFile writes a file into the bundle, from where it is mounted.
func placeFile(b string, i int, f *File) (string, error) {
	if !filepath.IsAbs(f.Path) || filepath.Clean(f.Path) == "/" {
		return "", fmt.Errorf("file at %q: want an absolute path below /", f.Path)
	}
	dir := filepath.Join(b, "files")
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return "", err
	}
	p := filepath.Join(dir, strconv.Itoa(i))
	err := os.WriteFile(p, f.Data, 0o600)
	if err == nil {
		err = os.Chown(p, f.UID, f.GID)
	}
	if err == nil {
		err = os.Chmod(p, os.FileMode(f.Mode&0o777))
	}
	if err != nil {
		return "", fmt.Errorf("file at %q: %w", f.Path, err)
	}
	return p, nil
}

// environment lays over on top of base, and gives a PATH where neither does.
func environment(base, over []string) []string {
	var out []string
	at := map[string]int{}
	for _, e := range append([]string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}, slices.Concat(base, over)...) {
		k, _, _ := strings.Cut(e, "=")
		if i, ok := at[k]; ok {
			out[i] = e
			continue
		}
		at[k] = len(out)
		out = append(out, e)
	}
	return out
}

// maxAccounts bounds /etc/passwd and /etc/group of an image.
const maxAccounts = 1 << 20

// resolveUser reads a "user[:group]" of an image, by name or number.
func resolveUser(rootfs, s string) (specs.User, error) {
	var u specs.User
	if s == "" {
		return u, nil
	}
	root, err := os.OpenRoot(rootfs) // no symbolic link of the image leads out of it
	if err != nil {
		return u, fmt.Errorf("user %q: %w", s, err)
	}
	defer root.Close()
	name, group, hasGroup := strings.Cut(s, ":")
	find := func(file, name string, by int) []string {
		f, err := root.OpenFile(file, os.O_RDONLY|unix.O_NONBLOCK, 0)
		if err != nil {
			return nil
		}
		defer f.Close()
		if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
			return nil
		}
		sc := bufio.NewScanner(io.LimitReader(f, maxAccounts))
		for sc.Scan() {
			if p := strings.Split(sc.Text(), ":"); len(p) > 3 && p[by] == name {
				return p
			}
		}
		return nil
	}
	number := func(s string) (uint32, error) {
		n, err := strconv.ParseUint(s, 10, 31)
		return uint32(n), err
	}
	if u.UID, err = number(name); err != nil {
		p := find("etc/passwd", name, 0)
		if p == nil {
			return u, fmt.Errorf("user %q is not in the image's /etc/passwd", name)
		}
		if u.UID, err = number(p[2]); err != nil {
			return u, fmt.Errorf("user %q: %w", name, err)
		}
		if u.GID, err = number(p[3]); err != nil {
			return u, fmt.Errorf("user %q: %w", name, err)
		}
	} else if p := find("etc/passwd", name, 2); p != nil {
		u.GID, _ = number(p[3])
	}
	if hasGroup {
		if u.GID, err = number(group); err != nil {
			p := find("etc/group", group, 0)
			if p == nil {
				return u, fmt.Errorf("group %q is not in the image's /etc/group", group)
			}
			if u.GID, err = number(p[2]); err != nil {
				return u, fmt.Errorf("group %q: %w", group, err)
			}
		}
	}
	return u, nil
}

// mountRoot lays the layers of an image over each other. The upper directory takes the mount points that the image does
// not have; what the workload writes stays in gVisor's memory, above all of this.
func mountRoot(dir, b string, img Image) error {
	if len(img.Layers) == 0 {
		return errors.New("image has no layers")
	}
	fd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return fmt.Errorf("overlay: %w", err)
	}
	defer unix.Close(fd)
	var lower []string // the image's last layer is the top
	for _, l := range slices.Backward(img.Layers) {
		lower = append(lower, filepath.Join(dir, "layers", l))
	}
	// One by one where the kernel can (6.8 and later), so that the list may be longer than an option string.
	for i, l := range lower {
		if err = unix.FsconfigSetString(fd, "lowerdir+", l); err != nil && i == 0 {
			err = unix.FsconfigSetString(fd, "lowerdir", strings.Join(lower, ":"))
			break
		}
	}
	err = errors.Join(err, unix.FsconfigSetString(fd, "upperdir", filepath.Join(b, "upper")), unix.FsconfigSetString(fd, "workdir", filepath.Join(b, "work")))
	if err == nil {
		err = unix.FsconfigCreate(fd)
	}
	if err != nil {
		return fmt.Errorf("overlay: %w", err)
	}
	m, err := unix.Fsmount(fd, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NODEV)
	if err != nil {
		return fmt.Errorf("overlay: %w", err)
	}
	defer unix.Close(m)
	if err := unix.MoveMount(m, "", unix.AT_FDCWD, filepath.Join(b, "rootfs"), unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("overlay: %w", err)
	}
	return nil
}
