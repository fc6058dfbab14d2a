package node

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"holdfast/sandbox"

	"golang.org/x/sys/unix"
)

// lease is until when this node may run what has volumes, on CLOCK_BOOTTIME, which goes on while the machine sleeps. The
// file tells the watchdogs outside the agent (sandbox.LeaseSize says its form). It has its page of memory from the
// beginning and is written in place: a tmpfs that tenants have filled does not end the leases of all.
type lease struct {
	path     string
	boot     [16]byte
	file     *os.File
	deadline atomic.Int64
}

// bootTime is CLOCK_BOOTTIME.
func bootTime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic(err) // only a wrong clock ID can fail
	}
	return time.Duration(ts.Nano())
}

// bootID names this run of the machine's kernel: CLOCK_BOOTTIME begins anew with the next.
func bootID() ([16]byte, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return [16]byte{}, fmt.Errorf("boot ID: %w", err)
	}
	id, err := hex.DecodeString(strings.ReplaceAll(strings.TrimSpace(string(b)), "-", ""))
	if err != nil || len(id) != 16 {
		return [16]byte{}, fmt.Errorf("boot ID: %q is none", b)
	}
	return [16]byte(id), nil
}

// open takes over the deadline that an agent before this one has left, if it was of this boot.
func (l *lease) open() error {
	var err error
	if l.boot, err = bootID(); err != nil {
		return fmt.Errorf("lease: %w", err)
	}
	if b, err := os.ReadFile(l.path); err != nil || len(b) != sandbox.LeaseSize || [16]byte(b[8:]) != l.boot {
		if err := l.create(); err != nil {
			return fmt.Errorf("lease: %w", err)
		}
	} else {
		l.deadline.Store(int64(binary.LittleEndian.Uint64(b)))
	}
	if l.file, err = os.OpenFile(l.path, os.O_WRONLY, 0); err != nil {
		return fmt.Errorf("lease: %w", err)
	}
	return nil
}

// create puts a lease that has ended in the place of whatever is there.
func (l *lease) create() error {
	tmp := l.path + ".new" // one name: what a killed agent left is written over
	if err := os.WriteFile(tmp, append(make([]byte, 8), l.boot[:]...), 0o600); err != nil {
		if rerr := os.Remove(tmp); rerr != nil && !errors.Is(rerr, fs.ErrNotExist) {
			err = errors.Join(err, rerr)
		}
		return err
	}
	return os.Rename(tmp, l.path)
}

func (l *lease) close() {
	if l.file != nil {
		l.file.Close()
	}
}

func (l *lease) ok() bool { return int64(bootTime()) < l.deadline.Load() }

// renew moves the deadline; it never moves back. This agent believes only what its watchdogs can read.
func (l *lease) renew(deadline time.Duration) error {
	if int64(deadline) <= l.deadline.Load() {
		return nil
	}
	if _, err := l.file.WriteAt(binary.LittleEndian.AppendUint64(nil, uint64(deadline)), 0); err != nil {
		return fmt.Errorf("lease: %w", err)
	}
	l.deadline.Store(int64(deadline))
	return nil
}

// onTmpfs refuses a directory on a disk: what lies there would outlive the boot, and the machine.
func onTmpfs(dir string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("node directory %s: %w", dir, err)
	}
	if st.Type != unix.TMPFS_MAGIC && st.Type != unix.RAMFS_MAGIC {
		return fmt.Errorf("node directory %s is not on a tmpfs: unpacked images, secrets and leases would reach a disk", dir)
	}
	return nil
}
