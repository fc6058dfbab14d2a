package contract

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"holdfast/internal/canonical"
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
		c.Service, c.What, c.Old, c.New = visible(c.Service), visible(c.What), visible(c.Old), visible(c.New)
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
		switch {
		case c.Old == "":
			fmt.Fprintf(&b, "%s+ %s: %s%s\n", indent, c.What, c.New, note)
		case c.New == "":
			fmt.Fprintf(&b, "%s- %s: %s%s\n", indent, c.What, c.Old, note)
		default:
			fmt.Fprintf(&b, "%s~ %s: %s → %s%s\n", indent, c.What, c.Old, c.New, note)
		}
	}
	return b.String()
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
			restarts := svc != "" && a != nil && b != nil && !quiet(k)
			p.Changes = append(p.Changes, Change{svc, k, x.show, y.shownAs(x), restarts})
		}
	}
	return p
}

// quiet are facts of a service that change without a restart. Package node decides; its instance names hold the rest.
func quiet(what string) bool {
	return slices.Contains([]string{"replicas", "placement", "egress", "depends on"}, what)
}

// visible writes out what would move a terminal's cursor, end a line or turn the direction of writing: a file must not be
// able to hide in the plan what it asks for.
func visible(s string) string {
	var b strings.Builder
	for _, r := range s {
		if unicode.IsPrint(r) && r != utf8.RuneError {
			b.WriteRune(r)
			continue
		}
		q := strconv.QuoteRune(r)
		b.WriteString(q[1 : len(q)-1])
	}
	return b.String()
}

// fact is a value, and what of it may be shown.
type fact struct {
	value string
	show  string
}

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
	put := func(svc, what string, f fact) {
		if out[svc] == nil {
			out[svc] = map[string]fact{}
		}
		out[svc][what] = f
	}
	// exact is what is compared, where what is shown is rounded or cut.
	add := func(svc, what, show string, exact ...any) {
		switch {
		case show == "":
		case len(exact) == 0:
			put(svc, what, fact{show, show})
		default:
			put(svc, what, fact{fmt.Sprint(exact...), show})
		}
	}
	hide := func(svc, what string, value []byte, show string) {
		sum := sha256.Sum256(value)
		put(svc, what, fact{hex.EncodeToString(sum[:]), show})
	}
	for _, r := range h.Routes {
		add("", "route "+r.Host, fmt.Sprintf("%s port %d", r.Service, r.Port))
	}
	if b.Template != nil {
		add("", "template", b.Template.String())
		for _, v := range b.Template.Values {
			add("", "parameter "+v.Name, strconv.Quote(v.Text))
		}
	}
	for i := range h.Approvals {
		a := &h.Approvals[i]
		add("", "approval "+a.Name, a.String(), hex.EncodeToString(canonical.Encode(a)))
	}
	if h.Store != (Store{}) {
		add("", "storage on each location", bytesText(h.Store.Limit), h.Store.Limit)
	}
	for _, v := range h.Volumes {
		kept := ""
		if v.Store == (Store{}) {
			kept = ", without snapshots"
		}
		add("", "volume "+v.Name, bytesText(v.Size)+kept, v.Size, kept)
	}
	for i := range h.Services {
		s, p := &h.Services[i], &b.Services[i]
		if p.FrontEnd == nil {
			add(s.Name, "image", imageText(&p.Image), p.Image.Reference, " ", p.Image.Manifest)
		} else {
			add(s.Name, "program", "the front end of the contract's buckets")
			for _, k := range p.FrontEnd.Buckets {
				kind := "without versions"
				if k.Versioning {
					kind = "with versions"
				}
				add("", "bucket "+k.Name, kind)
			}
		}
		add(s.Name, "buckets", strings.Join(p.Buckets, ", "))
		add(s.Name, "replicas", fmt.Sprint(s.Replicas))
		add(s.Name, "limits", fmt.Sprintf("%.3g cores, %s, %d processes", float64(s.CPUMilli)/1000, bytesText(s.Memory), s.Pids), s.CPUMilli, s.Memory, s.Pids)
		add(s.Name, "placement", placementText(&s.Placement))
		add(s.Name, "update", updateText(s))
		add(s.Name, "network", strings.Join(s.Networks, ", "))
		args := func(what string, list []string) {
			if len(list) > 0 {
				hide(s.Name, what, []byte(strings.Join(list, "\x00")), quoted(list))
			}
		}
		args("entrypoint", p.Entrypoint)
		args("command", p.Command)
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
			add(s.Name, "tmpfs "+t.Target, bytesText(cmp.Or(t.Size, DefaultTmpfs)), cmp.Or(t.Size, DefaultTmpfs))
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
			if secretName(k) || secretValue(v) {
				hide(s.Name, "environment "+k, []byte(v), "(hidden)")
				continue
			}
			add(s.Name, "environment "+k, fmt.Sprintf("%q", v))
		}
		if c := p.Health; c != nil {
			args("healthcheck", c.Test)
			add(s.Name, "healthcheck times", healthText(c))
		}
		var deps, out, ports []string
		for _, d := range p.DependsOn {
			deps = append(deps, d.Service+" ("+d.Condition+")")
		}
		add(s.Name, "depends on", strings.Join(deps, ", "))
		for _, e := range p.Egress {
			out = append(out, e.String())
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

// userinfo is a password in a URL.
var userinfo = regexp.MustCompile(`://[^/\s@]*:[^/\s@]+@`)

// secretValue guesses from a value whether it must not be shown.
func secretValue(v string) bool {
	return userinfo.MatchString(v) || strings.Contains(v, "PRIVATE KEY-----")
}

func imageText(i *Image) string {
	d := strings.TrimPrefix(i.Manifest, "sha256:")
	if len(d) > 12 {
		d = d[:12]
	}
	return i.Reference + " @ " + d
}

// updateText is how a service is updated, where it is not as usual.
func updateText(s *Service) string {
	u := &s.Update
	if *u == (Update{}) {
		return ""
	}
	out := []string{fmt.Sprintf("%d at a time", s.Unavailable()), "what fails is rolled back"}
	switch u.Action {
	case OnFailurePause:
		out[1] = "what fails stops it"
	case OnFailureContinue:
		out[1] = "what fails does not stop it"
	}
	if u.Monitor > 0 {
		out = append(out, "watched for "+s.Monitored().String())
	}
	if u.Deadline > 0 {
		out = append(out, fmt.Sprintf("ready within %v", time.Duration(u.Deadline)*time.Second))
	}
	return strings.Join(out, ", ")
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

// quoted shows arguments, without the values of those that are named like secrets.
func quoted(args []string) string {
	q := make([]string, len(args))
	hide := false
	for i, a := range args {
		name, v, assigned := strings.Cut(a, "=")
		switch {
		case hide && !strings.HasPrefix(a, "-"):
			a = "(hidden)"
		case assigned && v != "" && !strings.ContainsAny(name, " \t\n") && secretName(name):
			a = name + "=(hidden)"
		case secretValue(a):
			a = "(hidden)"
		case a == "" || strings.ContainsAny(a, " \t\n\"'"):
			a = strconv.Quote(a)
		}
		hide = strings.HasPrefix(args[i], "-") && !assigned && secretName(name)
		q[i] = a
	}
	return "[" + strings.Join(q, " ") + "]"
}

// healthText shows the defaults where a check says nothing.
func healthText(c *Healthcheck) string {
	s := fmt.Sprintf("every %v, time-out %v, %d retries", cmp.Or(c.Interval, DefaultInterval), cmp.Or(c.Timeout, DefaultInterval), cmp.Or(c.Retries, DefaultRetries))
	if c.StartPeriod > 0 {
		s += fmt.Sprintf(", start period %v", c.StartPeriod)
	}
	return s
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
