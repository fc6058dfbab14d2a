package box

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"holdfast/internal/pid1"
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
//	lock              held by the supervisor, whose process ID and start time are in it
//	boxes/NAME.json   the Box that runs and the digest of its Spec
//	lab/NAME          a Wanted
//	lab/NAME.is       the Wanted that was put into effect
type Plan struct {
	Dir      string
	Self     []string // argv prefix that runs Init
	Segments []int
	Boxes    []Spec // they start together; the first stops when all others have
	Log      *slog.Logger
	Router   string // name of the box that is the internet; "" means "internet"
	Cgroup   string // parent of all cgroups, this grid's alone; "" leaves boxes without one as they are
}

// digestOf tells whether a box that runs is still the one that is planned.
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

// seen is a box as it is. None of it is remembered: whoever changed it, the next comparison sees it.
type seen struct {
	alive, frozen, cut bool
	digest             string
}

// plan compares. It is pure. A box that is wanted cut starts without its cable.
func plan(names []string, digest map[string]string, want map[string]Wanted, have map[string]seen) []action {
	var out []action
	for _, n := range names {
		s, w := have[n], want[n]
		if w == Down {
			if s.alive {
				out = append(out, action{n, "kill"})
			}
			continue
		}
		if s.alive && s.digest != digest[n] {
			out = append(out, action{n, "kill"})
			s.alive = false
		}
		if !s.alive {
			out = append(out, action{n, "start"})
			s = seen{alive: true, cut: w == Cut}
		}
		if s.frozen && w != Paused {
			out = append(out, action{n, "thaw"})
		}
		if s.cut && w != Cut {
			out = append(out, action{n, "join"})
		}
		if !s.cut && w == Cut {
			out = append(out, action{n, "cut"})
		}
		if !s.frozen && w == Paused {
			out = append(out, action{n, "freeze"})
		}
	}
	for _, n := range slices.Sorted(maps.Keys(have)) { // boxes that the plan no longer has
		if have[n].alive && !slices.Contains(names, n) {
			out = append(out, action{n, "kill"})
		}
	}
	return out
}

// Supervise starts, adopts and keeps the boxes of a plan until ctx ends, and then stops them. When it is killed they live
// on, and the next Supervise of the same directory adopts those that are still as planned. ready is called when all run
// for the first time. What the dead have left behind is removed first: of this grid, and of others that nobody can adopt.
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
	l, err := lockDir(ctx, p.Dir)
	if err != nil {
		return err
	}
	defer l.release()
	if err := l.sign(); err != nil {
		return err
	}
	s := &supervisor{Plan: p, specs: map[string]Spec{}, digests: map[string]string{}, told: map[string]Wanted{}, paces: map[string]*pace{}}
	for _, b := range p.Boxes {
		if b.Cgroup == "" && p.Cgroup != "" {
			b.Cgroup = p.Cgroup + "/" + b.Name
		}
		s.names = append(s.names, b.Name)
		// Taken once: a program that is being built anew is no reason to end boxes in the middle of it.
		s.specs[b.Name], s.digests[b.Name] = b, digestOf(b)
	}
	if err := register(p.Dir, p.Cgroup); err != nil {
		return err
	}
	if err := s.sweep(); err != nil {
		return err
	}
	if err := Sweep(p.Log); err != nil {
		p.Log.Warn("leftovers of other grids stay", "error", err)
	}
	t := time.NewTicker(200 * time.Millisecond)
	defer t.Stop()
	logs := time.NewTicker(time.Minute)
	defer logs.Stop()
	said := ""
	for {
		err := s.once()
		if err == nil {
			said = ""
			if ready != nil {
				ready()
				ready = nil
			}
		} else if err.Error() != said {
			said = err.Error()
			p.Log.Error("will try again", "error", err)
		}
		select {
		case <-ctx.Done():
			return stopRecords(context.WithoutCancel(ctx), p.Dir)
		case <-t.C:
		case <-logs.C:
			for _, b := range s.specs {
				if err := rotate(b.Log, maxLog); err != nil {
					p.Log.Error("a log goes on growing", "error", err)
				}
			}
		}
	}
}

type supervisor struct {
	Plan
	names   []string
	specs   map[string]Spec
	digests map[string]string
	told    map[string]Wanted // written to lab/NAME.is
	paces   map[string]*pace
	mu      sync.Mutex // guards told and paces
}

// pace keeps a box that ends as soon as it starts from taking the machine.
type pace struct {
	last time.Time
	wait time.Duration
	err  error // of the last start
}

// next says whether a box may start now.
func (p *pace) next(now time.Time) bool {
	if now.Before(p.last.Add(p.wait)) {
		return false
	}
	if p.last.IsZero() || now.Sub(p.last) > pid1.Stable+p.wait {
		p.wait = 0
	} else {
		p.wait = min(max(2*p.wait, pid1.FirstWait), pid1.LastWait)
	}
	p.last = now
	return true
}

// sweep ends what runs in this grid's cgroups and is no box that is known, and removes what dead boxes left.
func (s *supervisor) sweep() error {
	if s.Cgroup == "" {
		return nil
	}
	have, err := records(s.Dir)
	if err != nil {
		return err
	}
	for _, n := range machine.children(s.Cgroup) {
		group := s.Cgroup + "/" + n
		if slices.ContainsFunc(slices.Collect(maps.Values(have)), func(r record) bool { return r.Cgroup == group && r.Box.Alive() }) {
			continue
		}
		if err := machine.end(group); err != nil {
			return fmt.Errorf("sweep: %w", err)
		}
	}
	return nil
}

// once compares and acts. A box that makes trouble does not keep the others waiting.
func (s *supervisor) once() error {
	have, err := records(s.Dir)
	if err != nil {
		return err
	}
	top, err := s.internet(have)
	if err != nil {
		return err
	}
	unplugged, err := top.unplugged()
	if err != nil {
		return fmt.Errorf("cables: %w", err)
	}
	want, obs := map[string]Wanted{}, map[string]seen{}
	for _, n := range s.names {
		want[n] = Asked(s.Dir, n)
	}
	for n, r := range have {
		if !r.Router {
			obs[n] = seen{r.Box.Alive(), machine.frozen(r.Cgroup), r.Uplink != nil && unplugged[vethName(*r.Uplink)], r.Digest}
		}
	}
	todo := map[string][]action{}
	for _, a := range plan(s.names, s.digests, want, obs) {
		todo[a.name] = append(todo[a.name], a)
	}
	errs := make([]error, len(s.names))
	var all sync.WaitGroup
	for i, n := range s.names {
		all.Go(func() { errs[i] = s.bring(top, n, todo[n], want[n], have[n]) })
	}
	for n, list := range todo {
		if !slices.Contains(s.names, n) {
			all.Go(func() {
				for _, a := range list {
					if err := s.act(top, a, Up, have[n]); err != nil {
						s.Log.Error("a box that is no longer planned", "error", err)
					}
				}
			})
		}
	}
	all.Wait()
	return errors.Join(errs...)
}

// bring puts into effect what is wanted of one box, and then says so.
func (s *supervisor) bring(top *Topology, name string, todo []action, want Wanted, have record) error {
	for _, a := range todo {
		if err := s.act(top, a, want, have); err != nil {
			return err
		}
	}
	s.mu.Lock()
	was, known := s.told[name]
	s.told[name] = want
	s.mu.Unlock()
	if known && was == want {
		return nil
	}
	return writeFile(filepath.Join(s.Dir, "lab", name+".is"), []byte(want))
}

// internet starts the router and what it lacks.
func (s *supervisor) internet(have map[string]record) (*Topology, error) {
	top := &Topology{Router: have[s.Router].Box}
	if !top.Router.Alive() {
		// Without the internet every cable hangs in the air: all boxes start anew.
		for n, r := range have {
			if err := r.Box.Kill(r.Cgroup); err != nil {
				return nil, err
			}
			forget(s.Dir, n)
			delete(have, n)
		}
		spec := Spec{Name: s.Router}
		if s.Cgroup != "" {
			spec.Cgroup = s.Cgroup + "/" + s.Router
		}
		s.Log.Info("start", "box", s.Router)
		b, err := start(s.Self, spec, nil, true, func(b Box) error {
			return remember(s.Dir, record{Box: b, Cgroup: spec.Cgroup, Router: true})
		})
		if err != nil {
			return nil, err
		}
		top.Router = b
	}
	if err := top.Prepare(s.Segments); err != nil {
		return nil, fmt.Errorf("internet: %w", err)
	}
	return top, nil
}

func (s *supervisor) act(top *Topology, a action, want Wanted, have record) error {
	spec := s.specs[a.name]
	switch a.do {
	case "start":
		s.mu.Lock()
		p := s.paces[a.name]
		if p == nil {
			p = &pace{}
			s.paces[a.name] = p
		}
		now := p.next(time.Now())
		s.mu.Unlock()
		if !now && p.err != nil {
			return p.err // the same words until the next try: said once
		}
		if !now {
			return fmt.Errorf("%s ends soon after it starts: its log is %s", a.name, spec.Log)
		}
		s.Log.Info(a.do, "box", a.name)
		if err := have.Box.Kill(spec.Cgroup); err != nil { // what it left, if anything
			return err
		}
		_, p.err = start(s.Self, spec, top, want != Cut, func(b Box) error {
			return remember(s.Dir, record{Box: b, Digest: s.digests[a.name], Cgroup: spec.Cgroup, Grace: spec.Grace, Uplink: spec.Uplink, Last: a.name == s.names[0]})
		})
		return p.err
	case "kill":
		s.Log.Info(a.do, "box", a.name)
		if err := have.Box.Kill(have.Cgroup); err != nil {
			return err
		}
		if have.Uplink != nil {
			if err := top.detach(*have.Uplink); err != nil {
				return fmt.Errorf("kill %s: %w", a.name, err)
			}
		}
		s.mu.Lock()
		delete(s.paces, a.name)
		s.mu.Unlock()
		forget(s.Dir, a.name)
		return nil
	}
	s.Log.Info(a.do, "box", a.name)
	var err error
	switch a.do {
	case "freeze":
		err = machine.freeze(spec.Cgroup)
	case "thaw":
		err = machine.thaw(spec.Cgroup)
	case "cut", "join":
		if spec.Uplink != nil {
			err = top.setLink(*spec.Uplink, a.do == "join")
		}
	default:
		err = errors.New("no such action")
	}
	if err != nil {
		return fmt.Errorf("%s %s: %w", a.do, a.name, err)
	}
	return nil
}
