package contract

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"
	"unicode"
)

// Plan is the difference between what a contract says now and what it would say.
type Plan struct {
	Create  bool     `json:"create"`
	Changes []Change `json:"changes"`
}

// Change is one difference. Old is empty for what is new, New for what goes.
type Change struct {
	Service  string `json:"service,omitempty"` // empty: of the contract
	What     string `json:"what"`
	Old      string `json:"old,omitempty"`
	New      string `json:"new,omitempty"`
	Restarts bool   `json:"restarts,omitempty"` // the service's workloads start anew
}

// Empty reports whether nothing would change.
func (p Plan) Empty() bool { return !p.Create && len(p.Changes) == 0 }

// Text is the plan for people: + is new, - goes, ~ changes.
func (p Plan) Text() string {
	var b strings.Builder
	if p.Create {
		b.WriteString("a new contract\n")
	} else if len(p.Changes) == 0 {
		return "nothing changes\n"
	}
	last := ""
	for _, c := range p.Changes {
		if c.Service != last && c.Service != "" {
			fmt.Fprintf(&b, "  service %s\n", c.Service)
		}
		last = c.Service
		indent := "  "
		if c.Service != "" {
			indent = "    "
		}
		note := ""
		if c.Restarts && !p.Create {
			note = "   (restarts)"
		}
		what, was, is := visible(c.What), visible(c.Old), visible(c.New)
		switch {
		case was == "":
			fmt.Fprintf(&b, "%s+ %s: %s%s\n", indent, what, is, note)
		case is == "":
			fmt.Fprintf(&b, "%s- %s: %s%s\n", indent, what, was, note)
		default:
			fmt.Fprintf(&b, "%s~ %s: %s → %s%s\n", indent, what, was, is, note)
		}
	}
	return b.String()
}

// visible takes out what would move a terminal's cursor, end a line or turn the direction of writing: a file must not be
// able to hide in the plan what it asks for.
func visible(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsGraphic(r) {
			return r
		}
		return unicode.ReplacementChar
	}, s)
}

// Diff compares. A nil old is a contract that does not exist yet. Keys, salts, certificates and where blobs lie are not
// differences: they are made anew whenever something is signed.
func Diff(oldHeader *Header, oldBody *Body, newHeader *Header, newBody *Body) Plan {
	p := Plan{Create: oldHeader == nil, Changes: []Change{}}
	was, is := facts(oldHeader, oldBody), facts(newHeader, newBody)
	for _, svc := range union(maps.Keys(was), maps.Keys(is)) {
		a, b := was[svc], is[svc]
		for _, k := range union(maps.Keys(a), maps.Keys(b)) {
			x, y := a[k], b[k]
			if x == y {
				continue
			}
			p.Changes = append(p.Changes, Change{svc, k, x.shown(), y.shownAs(x), svc != "" && b != nil && !quiet(k)})
		}
	}
	return p
}

// quiet are facts of a service that change without a restart.
func quiet(what string) bool {
	return slices.Contains([]string{"replicas", "placement", "egress", "depends on", "restart", "exposed ports"}, what)
}

// fact is a value, and what of it may be shown.
type fact struct {
	value string
	show  string
}

func (f fact) shown() string { return f.show }

// shownAs tells apart two values that show the same.
func (f fact) shownAs(old fact) string {
	if f.show != "" && f.show == old.show {
		return f.show + " (changed)"
	}
	return f.show
}

func union(a, b func(yield func(string) bool)) []string {
	var out []string
	for k := range a {
		out = append(out, k)
	}
	for k := range b {
		out = append(out, k)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// facts are everything that a plan compares, by service ("" is the contract) and name.
func facts(h *Header, b *Body) map[string]map[string]fact {
	out := map[string]map[string]fact{}
	if h == nil || b == nil {
		return out
	}
	add := func(svc, what, value string) {
		if value == "" {
			return
		}
		if out[svc] == nil {
			out[svc] = map[string]fact{}
		}
		out[svc][what] = fact{value, value}
	}
	hide := func(svc, what string, value []byte, show string) {
		if out[svc] == nil {
			out[svc] = map[string]fact{}
		}
		sum := sha256.Sum256(value)
		out[svc][what] = fact{hex.EncodeToString(sum[:]), show}
	}
	for _, r := range h.Routes {
		add("", "route "+r.Host, fmt.Sprintf("%s port %d", r.Service, r.Port))
	}
	for _, v := range h.Volumes {
		add("", "volume "+v.Name, bytesText(v.Size))
	}
	for i := range h.Services {
		s, p := &h.Services[i], &b.Services[i]
		add(s.Name, "image", imageText(&p.Image))
		add(s.Name, "replicas", fmt.Sprint(s.Replicas))
		add(s.Name, "limits", fmt.Sprintf("%.3g cores, %s, %d processes", float64(s.CPUMilli)/1000, bytesText(s.Memory), s.Pids))
		add(s.Name, "placement", placementText(&s.Placement))
		add(s.Name, "network", strings.Join(s.Networks, ", "))
		add(s.Name, "entrypoint", quoted(p.Entrypoint))
		add(s.Name, "command", quoted(p.Command))
		add(s.Name, "working directory", p.WorkingDir)
		add(s.Name, "user", p.User)
		add(s.Name, "host name", p.Hostname)
		if p.ReadOnly {
			add(s.Name, "root file system", "read-only")
		}
		add(s.Name, "capabilities added", strings.Join(p.CapAdd, ", "))
		add(s.Name, "capabilities dropped", strings.Join(p.CapDrop, ", "))
		add(s.Name, "stop signal", p.StopSignal)
		if p.StopGrace > 0 {
			add(s.Name, "stop grace", p.StopGrace.String())
		}
		add(s.Name, "restart", restartText(p))
		add(s.Name, "aliases", strings.Join(p.Aliases, ", "))
		for _, m := range p.Mounts {
			mode := ""
			if m.ReadOnly {
				mode = ", read-only"
			}
			add(s.Name, "mount "+m.Target, "volume "+m.Volume+mode)
		}
		for _, t := range p.Tmpfs {
			add(s.Name, "tmpfs "+t.Target, bytesText(max(t.Size, 1)))
		}
		for _, f := range p.Files {
			kind := "config"
			if f.Secret {
				kind = "secret"
			}
			hide(s.Name, kind+" "+f.Target, fmt.Appendf(nil, "%o %d %d %s", f.Mode, f.UID, f.GID, f.Data), fmt.Sprintf("%d bytes, mode %#o", len(f.Data), f.Mode))
		}
		for _, e := range p.Environment {
			k, v, _ := strings.Cut(e, "=")
			if secretName(k) || strings.Contains(v, "://") && strings.Contains(v, "@") {
				hide(s.Name, "environment "+k, []byte(v), "(hidden)")
				continue
			}
			add(s.Name, "environment "+k, fmt.Sprintf("%q", v))
		}
		if p.Health != nil {
			add(s.Name, "healthcheck", fmt.Sprintf("%s every %v, time-out %v, %d retries, start period %v", quoted(p.Health.Test), p.Health.Interval, p.Health.Timeout, p.Health.Retries, p.Health.StartPeriod))
		}
		var deps, out, ports []string
		for _, d := range p.DependsOn {
			deps = append(deps, d.Service+" ("+d.Condition+")")
		}
		add(s.Name, "depends on", strings.Join(deps, ", "))
		for _, e := range p.Egress {
			t := e.Proto + " " + e.Prefix
			if e.Port > 0 {
				t += fmt.Sprintf(" port %d", e.Port)
			}
			out = append(out, t)
		}
		add(s.Name, "egress", strings.Join(out, ", "))
		for _, x := range p.Expose {
			ports = append(ports, fmt.Sprint(x))
		}
		add(s.Name, "exposed ports", strings.Join(ports, ", "))
		for _, k := range slices.Sorted(maps.Keys(p.Labels)) {
			add(s.Name, "label "+k, fmt.Sprintf("%q", p.Labels[k]))
		}
	}
	return out
}

// secretName guesses from a variable's name whether its value must not be shown.
func secretName(k string) bool {
	k = strings.ToUpper(k)
	for _, w := range []string{"PASS", "SECRET", "TOKEN", "KEY", "CREDENTIAL", "PRIVATE", "DSN"} {
		if strings.Contains(k, w) {
			return true
		}
	}
	return false
}

func imageText(i *Image) string {
	d := strings.TrimPrefix(i.Manifest, "sha256:")
	if len(d) > 12 {
		d = d[:12]
	}
	return i.Reference + " @ " + d
}

func placementText(p *Placement) string {
	var out []string
	if p.Spread != "" {
		out = append(out, "one a "+p.Spread)
	}
	if len(p.Farms) > 0 {
		out = append(out, "farms "+strings.Join(p.Farms, ", "))
	}
	if len(p.Nodes) > 0 {
		out = append(out, "nodes "+strings.Join(p.Nodes, ", "))
	}
	return strings.Join(out, "; ")
}

func restartText(p *Process) string {
	if p.MaxRetries > 0 {
		return fmt.Sprintf("%s, at most %d times", p.Restart, p.MaxRetries)
	}
	return p.Restart
}

func quoted(args []string) string {
	if args == nil {
		return ""
	}
	q := make([]string, len(args))
	for i, a := range args {
		q[i] = a
		if a == "" || strings.ContainsAny(a, " \t\n\"'") {
			q[i] = fmt.Sprintf("%q", a)
		}
	}
	return "[" + strings.Join(q, " ") + "]"
}

func bytesText(n uint64) string {
	for _, u := range []struct {
		name string
		size uint64
	}{{"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}} {
		if n >= u.size && n%u.size == 0 {
			return fmt.Sprintf("%d %s", n/u.size, u.name)
		}
		if n >= 10*u.size {
			return fmt.Sprintf("%.1f %s", float64(n)/float64(u.size), u.name)
		}
	}
	return fmt.Sprintf("%d bytes", n)
}
