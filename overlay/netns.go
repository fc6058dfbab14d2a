package overlay

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// within runs f in the network namespace at path, or in that of the process if path is empty.
//
// The thread that entered is never given back: its goroutine ends locked to it, and so the thread ends too. The first
// thread of the process is not used, because it cannot end and its namespace is what others see as that of the process.
func within(path string, f func() error) error {
	if path == "" {
		return f()
	}
	done := make(chan error, 1)
	go enter(done, func() error {
		ns, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open namespace %s: %w", path, err)
		}
		defer unix.Close(ns)
		if err := unix.Setns(ns, unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter namespace %s: %w", path, err)
		}
		return f()
	})
	return <-done
}

// enter runs f on a thread that ends with it.
func enter(done chan<- error, f func() error) {
	runtime.LockOSThread()
	if unix.Gettid() == unix.Getpid() {
		// Held while another goroutine, which cannot get this thread, does the work.
		inner := make(chan error)
		go enter(inner, f)
		err := <-inner
		runtime.UnlockOSThread()
		done <- err
		return
	}
	done <- f()
}

// makeNamespace makes a network namespace and names it by a bind mount at path; setup runs in it before it has the name.
// One that exists is left alone.
func makeNamespace(path string, setup func() error) error {
	if isNamespace(path) {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("namespace %s: %w", path, err)
	}
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDONLY, 0o600)
	if err != nil {
		return fmt.Errorf("namespace %s: %w", path, err)
	}
	file.Close()
	done := make(chan error, 1)
	go enter(done, func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make namespace %s: %w", path, err)
		}
		if err := setup(); err != nil {
			return fmt.Errorf("set up namespace %s: %w", path, err)
		}
		if err := unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("name namespace %s: %w", path, err)
		}
		return nil
	})
	return <-done
}

// removeNamespace takes the name away. The kernel ends the namespace with its last process.
func removeNamespace(path string) error {
	for isNamespace(path) {
		if err := unix.Unmount(path, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("remove namespace %s: %w", path, err)
		}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove namespace: %w", err)
	}
	return nil
}

func isNamespace(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && st.Type == unix.NSFS_MAGIC
}

// quiet prepares a new namespace: nothing configures itself in it.
func quiet() error {
	for _, key := range []string{
		"ipv6/conf/all/accept_ra", "ipv6/conf/default/accept_ra",
		"ipv6/conf/all/accept_redirects", "ipv6/conf/default/accept_redirects",
		"ipv6/conf/all/accept_dad", "ipv6/conf/default/accept_dad",
		"ipv4/conf/all/send_redirects", "ipv4/conf/default/send_redirects",
		"ipv4/conf/all/accept_redirects", "ipv4/conf/default/accept_redirects",
		"ipv6/conf/all/disable_ipv6", "ipv6/conf/default/disable_ipv6",
	} {
		if err := sysctl(key, "0"); err != nil {
			return err
		}
	}
	// No link-local addresses of the kernel's own making: what a namespace has is what this package gave it.
	if err := sysctl("ipv6/conf/default/addr_gen_mode", "1"); err != nil {
		return err
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	return netlink.LinkSetUp(lo)
}

// sysctl sets a network parameter of the thread's namespace.
func sysctl(key, value string) error {
	if err := os.WriteFile("/proc/sys/net/"+key, []byte(value), 0o644); err != nil {
		return fmt.Errorf("set %s: %w", key, err)
	}
	return nil
}

// dump lists kernel objects until a listing was not disturbed by a change, for one that was may lack something.
func dump[T any](list func() ([]T, error)) (all []T, err error) {
	for range 100 {
		if all, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return all, err
}
