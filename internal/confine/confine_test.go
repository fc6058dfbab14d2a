package confine

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// thief is a process that does all that a hole in a part of holdfast would let a stranger try, confined or not.
type thief struct {
	Confine bool
	Dir     string // its own
	Policy  Policy
	Other   string // a directory of its neighbour
	Allowed string // an address that it may dial
	Denied  string
	Victim  int // a process
}

const asThief = "HOLDFAST_TEST_THIEF"

func TestMain(m *testing.M) {
	if raw := os.Getenv(asThief); raw != "" {
		if err := steal(raw); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	switch role := os.Getenv(asFamily); role {
	case "":
		os.Exit(m.Run())
	case "parent":
		runtime.LockOSThread() // it is the thread whose death counts
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), asFamily+"=child")
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
		if err := cmd.Start(); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		cmd.Wait()
	case "child":
		dir := os.Getenv("HOLDFAST_TEST_DIR")
		if _, err := Self(Policy{User: 748_002, Dir: dir, EndWithParent: os.Getenv("HOLDFAST_TEST_END") != ""}); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println("confined")
		time.Sleep(time.Minute)
	}
	os.Exit(0)
}

const asFamily = "HOLDFAST_TEST_FAMILY"

// A confined process ends with its parent, if that is asked for. Changing its user has the kernel forget what the parent had
// set: the control.
func TestItEndsWithItsParent(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	for _, asked := range []bool{true, false} {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), asFamily+"=parent", "HOLDFAST_TEST_DIR="+t.TempDir())
		if asked {
			cmd.Env = append(cmd.Env, "HOLDFAST_TEST_END=1")
		}
		out, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer out.Close()
		cmd.Stdout, cmd.Stderr = w, w
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		w.Close()
		said := make([]byte, 200)
		n, err := out.Read(said)
		if err != nil || string(said[:n]) != "confined\n" {
			t.Fatalf("%q, %v", said[:n], err)
		}
		children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", cmd.Process.Pid, cmd.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		child, err := strconv.Atoi(strings.TrimSpace(string(children)))
		if err != nil {
			t.Fatalf("%q: %v", children, err)
		}
		defer unix.Kill(child, unix.SIGKILL)
		cmd.Process.Kill()
		cmd.Wait()
		gone := false
		for begin := time.Now(); !gone && time.Since(begin) < 2*time.Second; time.Sleep(10 * time.Millisecond) {
			b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", child))
			gone = err != nil || strings.Contains(string(b), ") Z ")
		}
		if gone != asked {
			t.Errorf("asked %v: it ended %v", asked, gone)
		}
	}
}

func steal(raw string) error {
	var th thief
	if err := json.Unmarshal([]byte(raw), &th); err != nil {
		return err
	}
	inherited, err := net.FileListener(os.NewFile(3, "listener"))
	if err != nil {
		return err
	}
	busy := make(chan struct{}) // threads from before: they are held too
	for range 4 {
		go func() {
			var b [1]byte
			r, w, _ := os.Pipe()
			go func() { <-busy; w.Close() }()
			syscall.Read(int(r.Fd()), b[:])
		}()
	}
	own := filepath.Join(th.Dir, "own")
	if th.Confine {
		held, err := Self(th.Policy)
		if err != nil {
			return err
		}
		if len(held.Lacks) > 0 {
			fmt.Fprintln(os.Stderr, "lacks:", held.Lacks)
		}
		own = "/own"
	}
	local, err := net.Listen("unix", own+".sock")
	if err != nil {
		return fmt.Errorf("a socket of its own: %w", err)
	}
	defer local.Close()
	if th.Confine {
		if err := NoMoreListeners(); err != nil {
			return err
		}
	}
	listen := func(network string) error {
		l, err := net.Listen(network, "[::1]:0")
		if err == nil {
			l.Close()
		}
		return err
	}
	dial := func(addr string) error {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			c.Close()
		}
		return err
	}
	socket := func(domain, kind, proto int) error {
		fd, err := unix.Socket(domain, kind, proto)
		if err == nil {
			unix.Close(fd)
		}
		return err
	}
	call := func(nr uintptr, args ...uintptr) error {
		var a [6]uintptr
		copy(a[:], args)
		r, _, errno := unix.Syscall6(nr, a[0], a[1], a[2], a[3], a[4], a[5])
		if errno != 0 {
			return errno
		}
		if nr != unix.SYS_UNSHARE {
			unix.Close(int(r))
		}
		return nil
	}
	read := func(path string) error { _, err := os.ReadFile(path); return err }
	got := map[string]error{
		"needs: write and read its own": os.WriteFile(own, []byte("x"), 0o600),
		"needs: dial what it may":       dial(th.Allowed),
		"needs: serve what it was given": func() error {
			go dial(inherited.Addr().String())
			c, err := inherited.Accept()
			if err == nil {
				c.Close()
			}
			return err
		}(),
		"needs: its own socket": func() error {
			c, err := net.Dial("unix", own+".sock")
			if err == nil {
				c.Close()
			}
			return err
		}(),
		"read the machine's files":     read("/etc/passwd"),
		"read a neighbour's":           read(filepath.Join(th.Other, "secret")),
		"go up and read a neighbour's": read(strings.Repeat("../", 20) + th.Other + "/secret"),
		"write elsewhere":              os.WriteFile("/tmp/holdfast-confine-test", nil, 0o600),
		"read a process's memory":      read(fmt.Sprintf("/proc/%d/maps", th.Victim)),
		"run a program":                run(th.Confine, own),
		"signal a process":             unix.Kill(th.Victim, 0),
		"trace a process": func() error {
			err := unix.PtraceSeize(th.Victim)
			if err == nil {
				unix.PtraceDetach(th.Victim)
			}
			return err
		}(),
		"be root again": syscall.Setresuid(0, 0, 0),
		"listen on TCP": listen("tcp"),
		"listen on a socket of the machine": func() error {
			l, err := net.Listen("unix", own+"-2.sock")
			if err == nil {
				l.Close()
			}
			return err
		}(),
		"listen on UDP":          func() error { return socket(unix.AF_INET6, unix.SOCK_DGRAM, 0) }(),
		"listen on MPTCP":        socket(unix.AF_INET6, unix.SOCK_STREAM, unix.IPPROTO_MPTCP),
		"raw sockets":            socket(unix.AF_INET6, unix.SOCK_RAW, unix.IPPROTO_ICMPV6),
		"packet sockets":         socket(unix.AF_PACKET, unix.SOCK_RAW, 0),
		"netlink":                socket(unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_ROUTE),
		"vsock":                  socket(unix.AF_VSOCK, unix.SOCK_STREAM, 0),
		"dial elsewhere":         dial(th.Denied),
		"a namespace of its own": call(unix.SYS_UNSHARE, unix.CLONE_NEWIPC),
		"a user namespace": func() error {
			cmd := exec.Command("/bin/true")
			cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUTS}
			return cmd.Run()
		}(),
		"io_uring": func() error {
			var params [120]byte
			return call(unix.SYS_IO_URING_SETUP, 1, uintptr(ptr(&params[0])))
		}(),
		"mount": func() error {
			err := unix.Mount("none", th.Dir, "tmpfs", 0, "")
			if err == nil {
				unix.Unmount(th.Dir, 0)
			}
			return err
		}(),
	}
	out := map[string]string{}
	for what, err := range got {
		out[what] = ""
		if err != nil {
			out[what] = err.Error()
		}
	}
	close(busy)
	return json.NewEncoder(os.Stdout).Encode(out)
}

// run runs a program. Where there is none to be found, what matters is that the kernel would not have run it.
func run(confined bool, own string) error {
	if !confined {
		return exec.Command("/bin/true").Run()
	}
	if err := os.WriteFile(own+".sh", []byte("#!/none\n"), 0o700); err != nil {
		return nil
	}
	if err := unix.Exec(own+".sh", nil, nil); err != unix.EPERM {
		return nil
	}
	return unix.EPERM
}

// A process that confines itself can do what it needs and nothing of what a stranger in it would like to. Not confined, the
// same process can do all of it: the control.
func TestSelf(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	const user = 748_001
	dir, other := t.TempDir(), t.TempDir()
	for p := dir; p != "/"; p = filepath.Dir(p) { // of tests, and readable by others: only the confinement is to hold
		os.Chmod(p, 0o777)
	}
	if err := os.WriteFile(filepath.Join(other, "secret"), []byte("secret"), 0o666); err != nil {
		t.Fatal(err)
	}
	os.Chmod(other, 0o777)
	serve := func() (string, uint16) {
		l, err := net.Listen("tcp", "[::1]:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				c.Close()
			}
		}()
		return l.Addr().String(), uint16(l.Addr().(*net.TCPAddr).Port)
	}
	allowed, port := serve()
	denied, _ := serve()
	victim := exec.Command("/bin/sleep", "600") // of the same user, who could do all to it
	victim.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: user, Gid: user}, Pdeathsig: unix.SIGKILL}
	if err := victim.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { victim.Process.Kill(); victim.Wait() })
	run := func(confine bool) map[string]string {
		t.Helper()
		l, err := net.Listen("tcp", "[::1]:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		dir := filepath.Join(dir, fmt.Sprint("confined-", confine))
		if err := errors.Join(os.Mkdir(dir, 0o700), os.Chown(dir, user, user)); err != nil {
			t.Fatal(err)
		}
		may := []uint16{port, uint16(l.Addr().(*net.TCPAddr).Port)}
		raw, err := json.Marshal(thief{confine, dir, Policy{User: user, Dir: dir, Connect: may}, other, allowed, denied, victim.Process.Pid})
		if err != nil {
			t.Fatal(err)
		}
		f, err := l.(*net.TCPListener).File()
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), asThief+"="+string(raw))
		cmd.ExtraFiles = []*os.File{f}
		var errs strings.Builder
		cmd.Stderr = &errs
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("confined %v: %v\n%s", confine, err, errs.String())
		}
		if errs.Len() > 0 {
			t.Log(errs.String())
		}
		var got map[string]string
		if err := json.Unmarshal(out, &got); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return got
	}
	free, held := run(false), run(true)
	for what, err := range free {
		if err != "" && what != "vsock" && what != "io_uring" { // the kernel may have none
			t.Errorf("control: not confined, it cannot %s: %s", what, err)
		}
	}
	for what, err := range held {
		if need := strings.HasPrefix(what, "needs: "); need != (err == "") {
			t.Errorf("confined: %s: %q", what, err)
		}
	}
	if len(held) < 25 {
		t.Errorf("only %d things were tried", len(held))
	}
}

func ptr[T any](p *T) unsafe.Pointer { return unsafe.Pointer(p) }
