package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// check is one thing that a machine must have.
type check struct {
	Name string `json:"name"`
	OK   bool   `json:"ok"`
	Note string `json:"note,omitempty"` // what is wrong and how to mend it
}

func (a *app) doctorCmd() *cobra.Command {
	return &cobra.Command{
		Use: "doctor", Short: "Say what this machine lacks to run a grid, and how to get it", Args: cobra.NoArgs, Example: "  holdfast doctor",
		RunE: func(cmd *cobra.Command, _ []string) error {
			all := examine()
			bad := 0
			for _, c := range all {
				if !c.OK {
					bad++
				}
			}
			w := cmd.OutOrStdout()
			if a.json {
				if err := printJSON(w, all); err != nil {
					return err
				}
			} else {
				for _, c := range all {
					mark := paint(w, "32", "ok  ")
					if !c.OK {
						mark = paint(w, "31", "miss")
					}
					fmt.Fprintf(w, "%s  %s\n", mark, c.Name)
					if c.Note != "" {
						fmt.Fprintf(w, "      %s\n", c.Note)
					}
				}
			}
			if bad > 0 {
				return fmt.Errorf("%d of %d checks failed", bad, len(all))
			}
			return nil
		},
	}
}

func examine() []check {
	var out []check
	add := func(name string, err error, mend string) {
		c := check{Name: name, OK: err == nil}
		if err != nil {
			c.Note = err.Error() + ": " + mend
		}
		out = append(out, c)
	}
	exists := func(p string) error { _, err := os.Stat(p); return err }
	var root error
	if os.Geteuid() != 0 {
		root = errors.New("not root")
	}
	add("root", root, "up makes namespaces and mounts; run it as root")
	self, err := os.Executable()
	if err == nil {
		err = exists(filepath.Join(filepath.Dir(self), "holdfast-runsc"))
	}
	add("holdfast-runsc beside holdfast", err, "make build makes it")
	add("FUSE", exists("/dev/fuse"), "load the module: modprobe fuse")
	add("TUN", exists("/dev/net/tun"), "load the module: modprobe tun")
	add("loop devices", exists("/dev/loop-control"), "load the module: modprobe loop")
	fs, ferr := os.ReadFile("/proc/filesystems")
	for _, f := range []string{"ext4", "overlay", "fuse", "tmpfs"} {
		err := ferr
		if err == nil && !strings.Contains(string(fs), "\t"+f+"\n") {
			err = errors.New("the kernel has no " + f)
		}
		add(f+" file system", err, "load the module: modprobe "+f)
	}
	err = exists("/sys/fs/cgroup/cgroup.controllers")
	if err != nil {
		err = exists("/sys/fs/cgroup/memory/cgroup.procs")
	}
	add("control groups", err, "mount cgroup version 2 at /sys/fs/cgroup")
	add("network namespaces", exists("/proc/self/ns/net"), "the kernel needs CONFIG_NET_NS")
	var mem unix.Sysinfo_t
	err = unix.Sysinfo(&mem)
	if err == nil && uint64(mem.Totalram)*uint64(mem.Unit) < 3<<30 {
		err = errors.New("less than 3 GiB of memory")
	}
	add("memory", err, "use fewer --nodes, or a larger machine")
	var disk unix.Statfs_t
	home := defaultDir()
	for home != "/" && exists(home) != nil {
		home = filepath.Dir(home)
	}
	if err = unix.Statfs(home, &disk); err == nil && uint64(disk.Bavail)*uint64(disk.Bsize) < 4<<30 {
		err = fmt.Errorf("less than 4 GiB free at %s", home)
	}
	add("disk", err, "free some, or choose another --dir")
	return out
}
