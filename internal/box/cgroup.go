package box

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// cgroups is where a machine's control groups are mounted: one hierarchy for each controller in version 1, one for all in
// version 2.
type cgroups string

const machine cgroups = "/sys/fs/cgroup"

// settle is how long processes get to freeze or to end.
const settle = 15 * time.Second

func (c cgroups) v2() bool {
	_, err := os.Stat(filepath.Join(string(c), "cgroup.controllers"))
	return err == nil
}

// all are the hierarchies: a sandbox's runtime makes groups in every one.
func (c cgroups) all() []string {
	if c.v2() {
		return []string{string(c)}
	}
	var out []string
	found, _ := filepath.Glob(filepath.Join(string(c), "*", "cgroup.procs"))
	for _, p := range found {
		out = append(out, filepath.Dir(p))
	}
	return out
}

// joined are those that a box's processes are put into; the others are only for who sets limits there.
func (c cgroups) joined() []string {
	if c.v2() {
		return []string{string(c)}
	}
	var out []string
	for _, k := range []string{"memory", "pids", "freezer"} {
		if _, err := os.Stat(filepath.Join(string(c), k, "cgroup.procs")); err == nil {
			out = append(out, filepath.Join(string(c), k))
		}
	}
	return out
}

// proper keeps a wrong group from meaning the machine's root.
func proper(group string) error {
	if len(group) < 2 || group[0] != '/' || filepath.Clean(group) != group {
		return fmt.Errorf("cgroup %q: not a path below the root", group)
	}
	return nil
}

// enter makes a group and puts a process into its child "box": with version 2 a group that has children holds no
// processes itself.
func (c cgroups) enter(group string, pid int) error {
	if err := proper(group); err != nil {
		return err
	}
	for _, h := range c.joined() {
		dir := filepath.Join(h, group, "box")
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("cgroup: %w", err)
		}
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0o644); err != nil {
			return fmt.Errorf("cgroup: %w", err)
		}
	}
	return nil
}

// children names the groups right below a group.
func (c cgroups) children(group string) []string {
	if proper(group) != nil {
		return nil
	}
	seen := map[string]bool{}
	var out []string
	for _, h := range c.all() {
		list, _ := os.ReadDir(filepath.Join(h, group))
		for _, e := range list {
			if e.IsDir() && !seen[e.Name()] {
				seen[e.Name()] = true
				out = append(out, e.Name())
			}
		}
	}
	return out
}

// dirs are the directories of a group and of all below it, parents first.
func (c cgroups) dirs(group string) []string {
	if proper(group) != nil {
		return nil
	}
	var out []string
	for _, h := range c.all() {
		filepath.WalkDir(filepath.Join(h, group), func(p string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				out = append(out, p)
			}
			return nil
		})
	}
	return out
}

// procs are the processes in a group and below.
func (c cgroups) procs(group string) []int {
	seen := map[int]bool{}
	var out []int
	for _, d := range c.dirs(group) {
		b, _ := os.ReadFile(filepath.Join(d, "cgroup.procs"))
		for line := range strings.Lines(string(b)) {
			if pid, err := strconv.Atoi(strings.TrimSpace(line)); err == nil && pid > 0 && !seen[pid] {
				seen[pid] = true
				out = append(out, pid)
			}
		}
	}
	return out
}

// holds says whether a process is in a group or below.
func holds(group string, pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return false
	}
	for s := bufio.NewScanner(bytes.NewReader(b)); s.Scan(); {
		if f := strings.SplitN(s.Text(), ":", 3); len(f) == 3 && (f[2] == group || strings.HasPrefix(f[2], group+"/")) {
			return true
		}
	}
	return false
}

// signal sends every process of a group a SIGKILL. A process ID that has come to mean another since is let be.
func (c cgroups) signal(group string) (n int) {
	for _, pid := range c.procs(group) {
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			continue
		}
		if holds(group, pid) {
			unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
			n++
		}
		unix.Close(fd)
	}
	return n
}

// end kills everything in a group and removes it. What is frozen dies without having run again.
func (c cgroups) end(group string) error {
	if err := proper(group); err != nil {
		return err
	}
	for end := time.Now().Add(settle); ; time.Sleep(5 * time.Millisecond) {
		n := c.signal(group)
		if err := c.thawAll(group); err != nil {
			return err
		}
		if n == 0 {
			break
		}
		if time.Now().After(end) {
			return fmt.Errorf("cgroup %s: %d processes do not end", group, n)
		}
	}
	return c.remove(group)
}

// remove removes a group and all below it, in every hierarchy.
func (c cgroups) remove(group string) error {
	dirs := c.dirs(group)
	end := time.Now().Add(2 * time.Second)
	var errs []error
	for i := len(dirs) - 1; i >= 0; i-- {
		err := os.Remove(dirs[i])
		for errors.Is(err, unix.EBUSY) && time.Now().Before(end) { // the last process may still be leaving
			time.Sleep(5 * time.Millisecond)
			err = os.Remove(dirs[i])
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("cgroup: %w", err))
		}
	}
	return errors.Join(errs...)
}

// freezer is the file that freezes a group, what is written to it, and the file and the word that tell that all froze.
func (c cgroups) freezer(group string) (file, freeze, thaw, watch, word string) {
	if c.v2() {
		dir := filepath.Join(string(c), group)
		return filepath.Join(dir, "cgroup.freeze"), "1", "0", filepath.Join(dir, "cgroup.events"), "frozen 1"
	}
	f := filepath.Join(string(c), "freezer", group, "freezer.state")
	return f, "FROZEN", "THAWED", f, "FROZEN"
}

// freeze stops a group and all below it.
func (c cgroups) freeze(group string) error {
	if err := proper(group); err != nil {
		return err
	}
	file, word, _, watch, want := c.freezer(group)
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(2 * time.Millisecond) {
		if err := os.WriteFile(file, []byte(word), 0o644); err != nil { // again: version 1 may have missed who was forking
			return fmt.Errorf("freeze: %w", err)
		}
		b, err := os.ReadFile(watch)
		if err != nil {
			return fmt.Errorf("freeze: %w", err)
		}
		// Version 1 counts who waits in the kernel, for a file system whose server is frozen say, as not frozen yet.
		// He cannot return from there without freezing.
		if strings.Contains(string(b), want) || time.Now().After(end) {
			return nil
		}
	}
}

// thaw undoes freeze.
func (c cgroups) thaw(group string) error {
	if err := proper(group); err != nil {
		return err
	}
	file, _, word, _, _ := c.freezer(group)
	if err := os.WriteFile(file, []byte(word), 0o644); err != nil {
		return fmt.Errorf("thaw: %w", err)
	}
	return nil
}

// thawAll thaws a group and what was frozen below it by others, if it is there.
func (c cgroups) thawAll(group string) error {
	for _, d := range c.dirs(group) {
		if !c.v2() && !strings.HasPrefix(d, filepath.Join(string(c), "freezer")) {
			continue
		}
		rel, err := filepath.Rel(c.freezerRoot(), d)
		if err != nil {
			return err
		}
		if err := c.thaw("/" + rel); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

func (c cgroups) freezerRoot() string {
	if c.v2() {
		return string(c)
	}
	return filepath.Join(string(c), "freezer")
}

// frozen says whether a group is, or is to be.
func (c cgroups) frozen(group string) bool {
	if proper(group) != nil {
		return false
	}
	file, _, thawed, _, _ := c.freezer(group)
	b, err := os.ReadFile(file)
	return err == nil && strings.TrimSpace(string(b)) != thawed
}
