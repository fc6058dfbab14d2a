// Package pid1 is what a process 1 of holdfast does, in a box and on a machine of its own: it starts one daemon, starts it
// again when it dies, and reaps what others leave behind. It decides nothing else.
package pid1

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Pauses before a daemon that died starts again, and how long it must live for the next pause to be the first again.
const (
	FirstWait = 100 * time.Millisecond
	LastWait  = 5 * time.Second
	Stable    = 10 * time.Second
)

// Daemon is what a process 1 is there for. It is used by one goroutine.
type Daemon struct {
	Args  []string         // the program and its arguments; none starts nothing, and only reaps
	Env   []string         // all of its environment
	Grace time.Duration    // for it to end when it is asked to
	Term  <-chan os.Signal // asks for the end, twice insists; nil never does
	Check func() error     // called every second: an error ends everything; nil checks nothing

	child chan os.Signal
	pid   int // 0 while it does not run
	began time.Time
	wait  time.Duration
}

// Start starts the daemon for the first time, and begins to listen for what ends.
func (d *Daemon) Start() error {
	d.wait, d.child = FirstWait, make(chan os.Signal, 64)
	signal.Notify(d.child, unix.SIGCHLD)
	return d.start()
}

func (d *Daemon) start() error {
	if len(d.Args) == 0 {
		return nil
	}
	pid, err := syscall.ForkExec(d.Args[0], d.Args, &syscall.ProcAttr{
		Dir: "/", Env: d.Env, Files: []uintptr{0, 1, 2}, Sys: &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return fmt.Errorf("start %s: %w", d.Args[0], err)
	}
	d.pid, d.began = pid, time.Now()
	return nil
}

// reap collects what has ended, and says whether the daemon is among it.
func (d *Daemon) reap() (ended bool) {
	for {
		var ws unix.WaitStatus
		pid, err := unix.Wait4(-1, &ws, unix.WNOHANG, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if pid <= 0 || err != nil {
			return ended
		}
		if pid != d.pid {
			continue
		}
		d.pid, ended = 0, true
		how := fmt.Sprintf("with exit code %d", ws.ExitStatus())
		if ws.Signaled() {
			how = fmt.Sprintf("by signal %d", ws.Signal())
		}
		fmt.Fprintf(os.Stderr, "init: the daemon ended %s\n", how)
	}
}

// Run starts the daemon again when it dies, and reaps everything, until the end is asked for or Check finds a reason.
func (d *Daemon) Run() error {
	defer signal.Stop(d.child)
	var restart, deadline <-chan time.Time
	ending := false
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-d.Term:
			if ending || d.pid == 0 {
				return nil
			}
			ending, deadline = true, time.After(d.Grace)
			unix.Kill(d.pid, unix.SIGTERM)
		case <-deadline:
			return nil
		case <-restart:
			restart = nil
			if err := d.start(); err != nil {
				fmt.Fprintf(os.Stderr, "init: %v\n", err)
				restart = time.After(LastWait)
			}
		case <-d.child:
		case <-tick.C:
			if d.Check != nil {
				if err := d.Check(); err != nil {
					return err
				}
			}
		}
		if !d.reap() {
			continue
		}
		if ending {
			return nil
		}
		if time.Since(d.began) > Stable {
			d.wait = FirstWait
		}
		restart = time.After(d.wait)
		d.wait = min(2*d.wait, LastWait)
	}
}
