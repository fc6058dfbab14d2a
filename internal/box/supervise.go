package box

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Wanted is what somebody asks of a box. The zero value is a box that runs.
type Wanted string

// What a lab can ask.
const (
	Up     Wanted = ""
	Down   Wanted = "down"   // killed, and kept down
	Paused Wanted = "paused" // frozen
	Cut    Wanted = "cut"    // runs, with its cable pulled
)

// Plan is a set of boxes that Supervise keeps. Its directory holds what must outlive a supervisor:
//
//	lock              held by the supervisor; its process ID is in it
//	boxes/NAME.json   the Box that runs and the digest of its Spec
//	lab/NAME          a Wanted
type Plan struct {
	Dir      string
	Self     []string // argv prefix that runs Init
	Segments []int
	Boxes    []Spec // in the order in which they start; they stop in the reverse order
	Log      *slog.Logger
	Router   string // name of the box that is the internet; "" means "internet"
	Cgroup   string // parent of all cgroups
}

// ErrLocked is returned when another supervisor has the directory.
var ErrLocked = errors.New("another process supervises this grid")

type record struct {
	Box    Box
	Digest string
	Cgroup string
	Grace  time.Duration
}

func digestOf(s Spec) string {
	b, _ := json.Marshal(s)
	for _, p := range slices.Sorted(maps.Keys(s.Binaries)) { // a box whose programs were built anew starts anew
		if st, err := os.Stat(s.Binaries[p]); err == nil {
			b = fmt.Appendf(b, "%s %d %d", p, st.Size(), st.ModTime().UnixNano())
		}
	}
	if cfg, err := os.ReadFile(s.Config); err == nil {
		b = append(b, cfg...)
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:8])
}

// action is one thing to do with one box.
type action struct {
	name string
	do   string // "start", "kill", "freeze", "thaw", "cut", "join"
}

type seen struct {
	alive  bool
	digest string
	state  Wanted // the last one that was put into effect
}

// plan compares. It is pure.
func plan(names []string, digest map[string]string, want map[string]Wanted, have map[string]seen) []action {
	var out []action
	for _, n := range names {
		s, w := have[n], want[n]
		switch {
		case w == Down:
			if s.alive {
				out = append(out, action{n, "kill"})
			}
			continue
		case s.alive && s.digest != digest[n]:
			out = append(out, action{n, "kill"}, action{n, "start"})
			s.state = Up
		case !s.alive:
			out = append(out, action{n, "start"})
			s.state = Up
		}
		if s.state == w {
			continue
		}
		switch s.state {
		case Paused:
			out = append(out, action{n, "thaw"})
		case Cut:
			out = append(out, action{n, "join"})
		}
		switch w {
		case Paused:
			out = append(out, action{n, "freeze"})
		case Cut:
			out = append(out, action{n, "cut"})
		}
	}
	for n, s := range have { // boxes that the plan no longer has
		if s.alive && !slices.Contains(names, n) {
			out = append(out, action{n, "kill"})
		}
	}
	return out
}

// Supervise starts, adopts and keeps the boxes of a plan until ctx ends, and then stops them in order. When it is killed
// they live on, and the next Supervise of the same directory adopts them. ready is called when all run for the first time.
func Supervise(ctx context.Context, p Plan, ready func()) error {
	if p.Log == nil {
		p.Log = slog.New(slog.DiscardHandler)
	}
	if p.Router == "" {
		p.Router = "internet"
	}
	for _, d := range []string{"boxes", "lab", "log"} {
		if err := os.MkdirAll(filepath.Join(p.Dir, d), 0o700); err != nil {
			return fmt.Errorf("supervise: %w", err)
		}
	}
	lock, err := lockDir(p.Dir)
	if err != nil {
		return err
	}
	defer lock.Close()
	s := &supervisor{Plan: p, state: map[string]Wanted{}, told: map[string]bool{}}
	t := time.NewTicker(200 * time.Millisecond)
	defer t.Stop()
	told := ""
	for {
		err := s.once()
		if err != nil && err.Error() != told {
			told = err.Error()
			p.Log.Error("will try again", "error", err)
		} else if err == nil {
			told = ""
			if ready != nil {
				ready()
				ready = nil
			}
		}
		select {
		case <-ctx.Done():
			return s.stopAll()
		case <-t.C:
		}
	}
}

func lockDir(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("supervise: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		b, _ := os.ReadFile(f.Name())
		f.Close()
		return nil, fmt.Errorf("%w: %s has process %s", ErrLocked, dir, strings.TrimSpace(string(b)))
	}
	if err := errors.Join(f.Truncate(0), func() error { _, err := fmt.Fprintln(f, os.Getpid()); return err }()); err != nil {
		f.Close()
		return nil, fmt.Errorf("supervise: %w", err)
	}
	return f, nil
}

type supervisor struct {
	Plan
	state map[string]Wanted // put into effect by this process
	told  map[string]bool   // written to lab/NAME.is by this process
}

func (s *supervisor) router() Spec { return Spec{Name: s.Router} }

func (s *supervisor) once() error {
	have, err := records(s.Dir)
	if err != nil {
		return err
	}
	top := &Topology{Router: have[s.Router].Box}
	if !top.Router.Alive() {
		// Without the internet every cable hangs in the air: all boxes start anew.
		for n, r := range have {
			if err := r.Box.Kill(r.Cgroup); err != nil {
				return err
			}
			forget(s.Dir, n)
		}
		have = map[string]record{}
		b, err := Start(s.Self, s.router(), nil)
		if err != nil {
			return err
		}
		top.Router = b
		if err := remember(s.Dir, record{Box: b}); err != nil {
			return err
		}
		clear(s.state)
	}
	if err := top.Prepare(s.Segments); err != nil {
		return err
	}
	names, digests, want, obs := []string{}, map[string]string{}, map[string]Wanted{}, map[string]seen{}
	specs := map[string]Spec{}
	for _, b := range s.Boxes {
		names, specs[b.Name] = append(names, b.Name), b
		digests[b.Name] = digestOf(b)
		want[b.Name] = Asked(s.Dir, b.Name)
	}
	for n, r := range have {
		if n != s.Router {
			st, known := s.state[n]
			if !known { // of a supervisor before this one: put into effect again what is asked
				st = "unknown"
				if want[n] == Up {
					unfreeze(r.Cgroup)
					top.Join(linkOf(specs[n]))
					st = Up
				}
			}
			obs[n] = seen{r.Box.Alive(), r.Digest, st}
		}
	}
	for _, a := range plan(names, digests, want, obs) {
		if err := s.act(top, a, specs[a.name], have[a.name], digests[a.name]); err != nil {
			return err
		}
	}
	for _, n := range names {
		if s.state[n] != want[n] || !s.told[n] {
			s.state[n], s.told[n] = want[n], true
			if err := os.WriteFile(filepath.Join(s.Dir, "lab", n+".is"), []byte(want[n]), 0o600); err != nil {
				return err
			}
		}
	}
	return nil
}

func linkOf(s Spec) Uplink {
	if s.Uplink == nil {
		return Uplink{}
	}
	return *s.Uplink
}

func (s *supervisor) act(top *Topology, a action, spec Spec, have record, digest string) error {
	s.Log.Info(a.do, "box", a.name)
	switch a.do {
	case "start":
		b, err := Start(s.Self, spec, top)
		if err != nil {
			return err
		}
		return remember(s.Dir, record{b, digest, spec.Cgroup, spec.Grace})
	case "kill":
		if err := have.Box.Kill(have.Cgroup); err != nil {
			return err
		}
		forget(s.Dir, a.name)
		return nil
	case "freeze":
		return Freeze(spec.Cgroup)
	case "thaw":
		return Thaw(spec.Cgroup)
	case "cut":
		return top.Cut(linkOf(spec))
	case "join":
		return top.Join(linkOf(spec))
	}
	return fmt.Errorf("action %q is not known", a.do)
}

// stopAll ends the boxes: those that started last first, all but the first at the same time.
func (s *supervisor) stopAll() error {
	have, err := records(s.Dir)
	if err != nil {
		return err
	}
	var order []string
	for _, b := range s.Boxes {
		order = append(order, b.Name)
	}
	return stopRecords(s.Dir, have, order)
}

func stopRecords(dir string, have map[string]record, order []string) error {
	first := ""
	if len(order) > 0 {
		first = order[0]
	}
	var mu sync.Mutex
	var errs []error
	stop := func(n string, r record) {
		grace := r.Grace
		if grace <= 0 {
			grace = 30 * time.Second
		}
		unfreeze(r.Cgroup)
		err := r.Box.Stop(context.Background(), r.Cgroup, grace+time.Second)
		mu.Lock()
		defer mu.Unlock()
		if err != nil {
			errs = append(errs, err)
			return
		}
		forget(dir, n)
	}
	var all sync.WaitGroup
	for n, r := range have {
		if n != first && r.Digest != "" {
			all.Go(func() { stop(n, r) })
		}
	}
	all.Wait()
	if r, ok := have[first]; ok {
		stop(first, r)
	}
	for n, r := range have { // the router, which has no digest
		if r.Digest == "" {
			stop(n, r)
		}
	}
	return errors.Join(errs...)
}

func records(dir string) (map[string]record, error) {
	files, err := os.ReadDir(filepath.Join(dir, "boxes"))
	if errors.Is(err, fs.ErrNotExist) {
		return map[string]record{}, nil
	} else if err != nil {
		return nil, fmt.Errorf("boxes: %w", err)
	}
	out := map[string]record{}
	for _, f := range files {
		name, ok := strings.CutSuffix(f.Name(), ".json")
		if !ok {
			continue
		}
		var r record
		b, err := os.ReadFile(filepath.Join(dir, "boxes", f.Name()))
		if err == nil {
			err = json.Unmarshal(b, &r)
		}
		if err != nil {
			return nil, fmt.Errorf("box %s: %w", name, err)
		}
		out[name] = r
	}
	return out, nil
}

func remember(dir string, r record) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	p := filepath.Join(dir, "boxes", r.Box.Name+".json")
	if err := os.WriteFile(p+".tmp", b, 0o600); err != nil {
		return err
	}
	return os.Rename(p+".tmp", p)
}

func forget(dir, name string) { os.Remove(filepath.Join(dir, "boxes", name+".json")) }

// Running returns the boxes of a grid that are alive.
func Running(dir string) (map[string]Box, error) {
	have, err := records(dir)
	if err != nil {
		return nil, err
	}
	out := map[string]Box{}
	for n, r := range have {
		if r.Box.Alive() {
			out[n] = r.Box
		}
	}
	return out, nil
}

// Supervisor returns the process that supervises a grid, 0 when there is none.
func Supervisor(dir string) int {
	f, err := os.Open(filepath.Join(dir, "lock"))
	if err != nil {
		return 0
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB); !errors.Is(err, unix.EWOULDBLOCK) {
		return 0
	}
	var pid int
	fmt.Fscan(f, &pid)
	return pid
}

// Ask says what a box of a grid should be. The supervisor puts it into effect, also one that starts later.
func Ask(dir, name string, w Wanted) error {
	p := filepath.Join(dir, "lab", name)
	if w == Up {
		if err := os.Remove(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("lab: %w", err)
		}
		return nil
	}
	if err := os.WriteFile(p+".tmp", []byte(w), 0o600); err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	return os.Rename(p+".tmp", p)
}

// Await returns when the supervisor has put into effect what was asked.
func Await(ctx context.Context, dir, name string, w Wanted) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for {
		if b, err := os.ReadFile(filepath.Join(dir, "lab", name+".is")); err == nil && Wanted(b) == w {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s is not %q yet: %w", name, w, ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Asked is what Ask said last.
func Asked(dir, name string) Wanted {
	b, err := os.ReadFile(filepath.Join(dir, "lab", name))
	if err != nil {
		return Up
	}
	return Wanted(strings.TrimSpace(string(b)))
}

// StopAll ends the supervisor of a grid and everything that it started, alive or not. It keeps the data.
func StopAll(ctx context.Context, dir string) error {
	if pid := Supervisor(dir); pid > 0 {
		unix.Kill(pid, unix.SIGTERM)
		for end := time.Now().Add(90 * time.Second); Supervisor(dir) == pid; time.Sleep(20 * time.Millisecond) {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if time.Now().After(end) {
				unix.Kill(pid, unix.SIGKILL)
			}
		}
	}
	have, err := records(dir)
	if err != nil {
		return err
	}
	return stopRecords(dir, have, nil)
}
