package sandbox

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"iter"
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

// ociSpec is the runtime specification of a sandbox.
func (r *Runner) ociSpec(b, rootfs string, s *Spec) (*specs.Spec, error) {
	caps, err := capabilities(s.CapAdd, s.CapDrop)
	if err != nil {
		return nil, err
	}
	args := s.Args
	if len(args) == 0 {
		args = slices.Concat(s.Image.Entrypoint, s.Image.Cmd)
	}
	if len(args) == 0 {
		return nil, errors.New("neither the image nor the spec names a command")
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
	u, home, err := resolveUser(rootfs, user)
	if err != nil {
		return nil, err
	}
	base := []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=" + home}
	if s.Hostname != "" {
		base = append(base, "HOSTNAME="+s.Hostname)
	}
	env := environment(base, s.Image.Env, s.Env)
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
	if s.Pids > 0 {
		// gVisor's kernel counts the workload's processes and threads against this, for each user.
		spec.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NPROC", Hard: uint64(s.Pids), Soft: uint64(s.Pids)}}
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
			return nil, fmt.Errorf("mount at %q: want an absolute path below /", m.Target)
		}
		om := specs.Mount{Destination: filepath.Clean(m.Target), Type: "bind", Source: m.Source, Options: []string{"rbind", "nosuid", "nodev"}}
		if m.Tmpfs {
			size := m.Size
			if size <= 0 {
				size = 64 << 20
			}
			om = specs.Mount{Destination: om.Destination, Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "nodev", "mode=1777", fmt.Sprintf("size=%d", size)}}
		} else if !filepath.IsAbs(m.Source) {
			return nil, fmt.Errorf("mount at %q: source %q is not an absolute path", m.Target, m.Source)
		}
		if m.ReadOnly {
			om.Options = append(om.Options, "ro")
		}
		spec.Mounts = append(spec.Mounts, om)
	}
	for i, f := range s.Files {
		src, err := placeFile(b, i, &f)
		if err != nil {
			return nil, err
		}
		spec.Mounts = append(spec.Mounts, specs.Mount{Destination: filepath.Clean(f.Path), Type: "bind", Source: src, Options: []string{"bind", "ro", "nosuid", "nodev"}})
	}
	if r.cfg.Cgroup != "" {
		spec.Linux.CgroupsPath = filepath.Join(r.cfg.Cgroup, s.ID)
		spec.Linux.Resources = resources(s)
	}
	return spec, nil
}

// The machine's own limit stands behind the one that gVisor's kernel keeps, for a workload that has got around that one or
// has the right to (CAP_SYS_ADMIN). A task of the workload may need several of the machine, and gVisor has some of its own; when
// the machine refuses one, gVisor ends, so that a workload within its limit must not get there.
const (
	hostTasks    = 192
	tasksPerTask = 4
)

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
		n := s.Pids*tasksPerTask + hostTasks
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

// environment lays each of its layers over those before.
func environment(layers ...[]string) []string {
	var out []string
	at := map[string]int{}
	for _, e := range slices.Concat(layers...) {
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

// resolveUser reads a "user[:group]" of an image, by name or number, with the groups that the image puts the user in
// unless one is given, and finds the home directory.
func resolveUser(rootfs, s string) (u specs.User, home string, err error) {
	root, err := os.OpenRoot(rootfs) // no symbolic link of the image leads out of it
	if err != nil {
		return u, "", fmt.Errorf("user %q: %w", s, err)
	}
	defer root.Close()
	name, group, hasGroup := strings.Cut(s, ":")
	if name == "" {
		name = "0"
	}
	home = "/"
	number := func(s string) (uint32, error) {
		n, err := strconv.ParseUint(s, 10, 31)
		return uint32(n), err
	}
	uid, err := number(name)
	byName := err != nil
	var account []string
	for p := range accounts(root, "etc/passwd") {
		if len(p) >= 7 && (byName && p[0] == name || !byName && p[2] == name) {
			account = p
			break
		}
	}
	switch {
	case account != nil:
		u.UID, err = number(account[2])
		if err == nil {
			u.GID, err = number(account[3])
		}
		if err != nil {
			return u, "", fmt.Errorf("user %q: %w", name, err)
		}
		if strings.HasPrefix(account[5], "/") {
			home = account[5]
		}
	case byName:
		return u, "", fmt.Errorf("user %q is not in the image's /etc/passwd", name)
	default:
		u.UID = uid
	}
	if hasGroup {
		if u.GID, err = number(group); err == nil {
			return u, home, nil
		}
		for p := range accounts(root, "etc/group") {
			if len(p) >= 3 && p[0] == group {
				if u.GID, err = number(p[2]); err != nil {
					return u, "", fmt.Errorf("group %q: %w", group, err)
				}
				return u, home, nil
			}
		}
		return u, "", fmt.Errorf("group %q is not in the image's /etc/group", group)
	}
	if account == nil {
		return u, home, nil
	}
	for p := range accounts(root, "etc/group") {
		if len(p) < 4 || !slices.Contains(strings.Split(p[3], ","), account[0]) {
			continue
		}
		if gid, err := number(p[2]); err == nil && gid != u.GID && len(u.AdditionalGids) < maxGroups {
			u.AdditionalGids = append(u.AdditionalGids, gid)
		}
	}
	return u, home, nil
}

// maxGroups bounds the groups of a user.
const maxGroups = 64

// accounts reads the lines of an image's /etc/passwd or /etc/group; one that is not a file has none.
func accounts(root *os.Root, name string) iter.Seq[[]string] {
	return func(yield func([]string) bool) {
		f, err := root.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
		if err != nil {
			return
		}
		defer f.Close()
		if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
			return
		}
		for sc := bufio.NewScanner(io.LimitReader(f, maxAccounts)); sc.Scan(); {
			if !yield(strings.Split(sc.Text(), ":")) {
				return
			}
		}
	}
}

// mountRoot lays the layers of an image over each other. The upper directory takes the mount points that the image does
// not have; what the workload writes stays in gVisor's memory, above all of this.
func mountRoot(dir, b string, img Image) error {
	if len(img.Layers) == 0 {
		return errors.New("image has no layers")
	}
	// By file descriptor, since the kernel takes only a page of options and 127 layers have long names.
	var open []*os.File
	defer func() {
		for _, f := range open {
			f.Close()
		}
	}()
	name := func(p string) (string, error) {
		f, err := os.OpenFile(p, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
		if err != nil {
			return "", err
		}
		open = append(open, f)
		return "/proc/self/fd/" + strconv.Itoa(int(f.Fd())), nil
	}
	var names []string // the image's last layer is the top
	for _, l := range slices.Backward(img.Layers) {
		if _, err := digestHex("sha256:" + l); err != nil {
			return fmt.Errorf("layer: %w", err)
		}
		n, err := name(filepath.Join(dir, "layers", l))
		if err != nil {
			return fmt.Errorf("layer: %w", err)
		}
		names = append(names, n)
	}
	upper, err := name(filepath.Join(b, "upper"))
	if err != nil {
		return err
	}
	work, err := name(filepath.Join(b, "work"))
	if err != nil {
		return err
	}
	options := "lowerdir=" + strings.Join(names, ":") + ",upperdir=" + upper + ",workdir=" + work
	if err := unix.Mount("overlay", filepath.Join(b, "rootfs"), "overlay", unix.MS_NODEV, options); err != nil {
		return fmt.Errorf("mount root of %d layers: %w", len(names), err)
	}
	return nil
}
