package node

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// lease is until when this node may run what has volumes, on CLOCK_BOOTTIME, which goes on while the machine sleeps. The
// file tells the watchdogs outside the agent.
type lease struct {
	path     string
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

// open takes over the deadline that an agent before this one has left.
func (l *lease) open() error {
	if b, err := os.ReadFile(l.path); err == nil && len(b) == 8 {
		l.deadline.Store(int64(binary.LittleEndian.Uint64(b)))
		return nil
	}
	return l.write(0)
}

func (l *lease) ok() bool { return int64(bootTime()) < l.deadline.Load() }

// renew moves the deadline; it never moves back.
func (l *lease) renew(deadline time.Duration) error {
	if int64(deadline) <= l.deadline.Load() {
		return nil
	}
	l.deadline.Store(int64(deadline))
	return l.write(int64(deadline))
}

func (l *lease) write(v int64) error {
	tmp, err := os.CreateTemp(filepath.Dir(l.path), ".lease-*")
	if err != nil {
		return fmt.Errorf("lease: %w", err)
	}
	defer os.Remove(tmp.Name())
	b := binary.LittleEndian.AppendUint64(nil, uint64(v))
	if _, err := tmp.Write(b); err != nil {
		tmp.Close()
		return fmt.Errorf("lease: %w", err)
	}
	if err := tmp.Close(); err != nil {
		return fmt.Errorf("lease: %w", err)
	}
	return os.Rename(tmp.Name(), l.path)
}
