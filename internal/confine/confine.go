// Package confine takes from the process that calls it what it does not need: its user, its capabilities, the file system
// but for one directory, programs, other processes, and all of the network but TCP to given ports. What is taken cannot be
// had back. It is for parts of holdfast that read what strangers write, and that are no sandboxes because they hold keys
// and speak for their node: a hole in such a part is to be a hole in nothing else.
//
// Layers, each with its own reason (docs/threat-model.md): chroot and an own user are old and whole; Landlock holds the same
// for whoever gets around them, and the ports; seccomp takes the kernel's wide and rarely needed parts away.
package confine

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"syscall"

	"github.com/elastic/go-seccomp-bpf"
	"github.com/landlock-lsm/go-landlock/landlock"
	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/psx"
)

// Policy is what is left.
type Policy struct {
	User int    // and group; it has to be able to use Dir
	Dir  string // becomes the root of the file system
	// Ports that TCP can connect to. Kernels before 6.7 (Landlock ABI 4) do not hold this; Self says what holds.
	Connect []uint16
	// The kernel forgets who is to die with his parent when a user changes: so the process asks for it anew.
	EndWithParent bool
}

// Held is what the kernel does not hold of a policy, in words; empty: all is held.
type Held struct{ Lacks []string }

// landlockNet is the first ABI with rules for TCP (Linux 6.7).
const landlockNet = 4

// Self confines the calling process, all its threads. Its file descriptors stay. It needs root; after an error the process
// may be confined in part, and must end.
func Self(p Policy) (*Held, error) {
	if p.User <= 0 {
		return nil, errors.New("confine: a user other than root is needed")
	}
	held := &Held{}
	abi, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	switch {
	case errno != 0:
		held.Lacks = append(held.Lacks, "the kernel has no Landlock")
	case abi < landlockNet:
		held.Lacks = append(held.Lacks, "the kernel's Landlock knows no TCP: what it can connect to is not held")
	}
	for _, step := range []struct {
		what string
		do   func() error
	}{
		{"core dumps", func() error { return unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}) }},
		{"bounding set", dropBounding},
		{"no new privileges", func() error { return everyThread(unix.PR_SET_NO_NEW_PRIVS, 1) }},
		{"Landlock", func() error { return restrict(p) }},
		{"root directory", func() error { return errors.Join(unix.Chroot(p.Dir), os.Chdir("/")) }}, // from here on there is no /proc
		{"groups", func() error { return syscall.Setgroups(nil) }},
		{"group", func() error { return syscall.Setresgid(p.User, p.User, p.User) }},
		{"user", func() error { return syscall.Setresuid(p.User, p.User, p.User) }}, // takes all capabilities with it
		{"end with the parent", func() error {
			if !p.EndWithParent {
				return nil
			}
			return unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0) // a thread's, and Go keeps its threads
		}},
		{"dumpable", func() error { return unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0) }},
		{"seccomp", func() error { return load(denied()...) }},
	} {
		if err := step.do(); err != nil {
			return nil, fmt.Errorf("confine: %s: %w", step.what, err)
		}
	}
	return held, nil
}

// NoMoreListeners takes away that the process can open sockets for others to reach, of any kind.
func NoMoreListeners() error {
	if err := load(names(syscall.EACCES, "bind", "listen")); err != nil {
		return fmt.Errorf("confine: listeners: %w", err)
	}
	return nil
}

// everyThread is prctl on all threads: what it sets is a thread's.
func everyThread(option, arg uintptr) error {
	if _, _, errno := psx.Syscall6(unix.SYS_PRCTL, option, arg, 0, 0, 0, 0); errno != 0 {
		return errno
	}
	return nil
}

// dropBounding empties the set of capabilities that a program could ever have again.
func dropBounding() error {
	for c := uintptr(0); c <= 63; c++ {
		if have, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, c, 0, 0, 0); err != nil || have == 0 {
			continue // the kernel does not know it, or it is gone
		}
		if err := everyThread(unix.PR_CAPBSET_DROP, c); err != nil {
			return err
		}
	}
	return nil
}

func restrict(p Policy) error {
	rules := []landlock.Rule{landlock.RWDirs(p.Dir)}
	for _, port := range p.Connect {
		rules = append(rules, landlock.ConnectTCP(port))
	}
	return landlock.V6.BestEffort().Restrict(rules...)
}

// load adds a filter to all threads.
func load(groups ...seccomp.SyscallGroup) error {
	if runtime.GOARCH != "amd64" {
		return fmt.Errorf("no filter for %s", runtime.GOARCH)
	}
	return seccomp.LoadFilter(seccomp.Filter{
		NoNewPrivs: true, Flag: seccomp.FilterFlagTSync,
		Policy: seccomp.Policy{DefaultAction: seccomp.ActionAllow, Syscalls: groups},
	})
}

func fails(e syscall.Errno) seccomp.Action { return seccomp.ActionErrno | seccomp.Action(e) }

func names(e syscall.Errno, list ...string) seccomp.SyscallGroup {
	return seccomp.SyscallGroup{Action: fails(e), Names: list}
}

// denied is what a part of holdfast never needs. A list of what is allowed would have to follow Go's runtime and the kernel.
func denied() []seccomp.SyscallGroup {
	group := func(e syscall.Errno, name string, all ...[]seccomp.Condition) seccomp.SyscallGroup {
		g := seccomp.SyscallGroup{Action: fails(e)}
		for _, c := range all {
			g.NamesWithCondtions = append(g.NamesWithCondtions, seccomp.NameWithConditions{Name: name, Conditions: c})
		}
		return g
	}
	is := func(arg uint32, op seccomp.Operation, v uint64) seccomp.Condition {
		return seccomp.Condition{Argument: arg, Operation: op, Value: v}
	}
	var spaces [][]seccomp.Condition
	for _, f := range []uint64{unix.CLONE_NEWUSER, unix.CLONE_NEWNS, unix.CLONE_NEWNET, unix.CLONE_NEWPID, unix.CLONE_NEWIPC, unix.CLONE_NEWUTS, unix.CLONE_NEWCGROUP} {
		spaces = append(spaces, []seccomp.Condition{is(0, seccomp.BitsSet, f)})
	}
	return []seccomp.SyscallGroup{
		// Programs, and other processes.
		names(syscall.EPERM, "execve", "execveat", "ptrace", "process_vm_readv", "process_vm_writev", "kcmp", "pidfd_open", "pidfd_getfd", "pidfd_send_signal", "process_madvise"),
		// Namespaces and the file tree. Without clone3 the C library and Go use clone, whose flags can be read.
		names(syscall.EPERM, "unshare", "setns", "mount", "umount2", "pivot_root", "chroot", "open_tree", "move_mount", "fsopen", "fsconfig", "fsmount", "fspick", "mount_setattr", "mknod", "mknodat"),
		names(syscall.ENOSYS, "clone3"),
		group(syscall.EPERM, "clone", spaces...),
		// Wide parts of the kernel.
		names(syscall.EPERM, "io_uring_setup", "io_uring_enter", "io_uring_register", "bpf", "userfaultfd", "perf_event_open", "add_key", "request_key", "keyctl", "init_module", "finit_module", "delete_module",
			"kexec_load", "kexec_file_load", "reboot", "swapon", "swapoff", "quotactl", "acct", "syslog", "iopl", "ioperm", "modify_ldt", "personality", "settimeofday", "clock_settime", "clock_adjtime", "adjtimex",
			"sethostname", "setdomainname", "name_to_handle_at", "open_by_handle_at", "vmsplice", "memfd_secret", "landlock_create_ruleset", "fanotify_init", "lookup_dcookie", "nfsservctl"),
		// Sockets: TCP and those of the machine. MPTCP would go by the name of TCP past Landlock.
		group(syscall.EACCES, "socket",
			[]seccomp.Condition{is(0, seccomp.NotEqual, unix.AF_UNIX), is(0, seccomp.NotEqual, unix.AF_INET), is(0, seccomp.NotEqual, unix.AF_INET6)},
			[]seccomp.Condition{is(1, seccomp.BitsSet, 2)}, // SOCK_DGRAM, SOCK_RAW, SOCK_DCCP, SOCK_PACKET; SOCK_STREAM is 1
			[]seccomp.Condition{is(1, seccomp.BitsSet, 4)}, // SOCK_RDM, SOCK_SEQPACKET
			[]seccomp.Condition{is(1, seccomp.BitsSet, 8)},
			[]seccomp.Condition{is(2, seccomp.NotEqual, 0), is(2, seccomp.NotEqual, unix.IPPROTO_TCP)},
		),
		names(syscall.EACCES, "socketpair"),
	}
}
