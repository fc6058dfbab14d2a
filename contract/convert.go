package contract

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math"
	"net/netip"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/compose-spec/compose-go/v2/types"
	units "github.com/docker/go-units"
	"go.yaml.in/yaml/v3"
)

// extension is "x-holdfast" at the top of a file or of a service.
type extension struct {
	Routes []struct {
		Host    string `yaml:"host"`
		Service string `yaml:"service"`
		Port    string `yaml:"port"` // a number, also from a variable
	} `yaml:"routes"`
	Placement *struct {
		Spread string   `yaml:"spread"`
		Farms  []string `yaml:"farms"`
		Nodes  []string `yaml:"nodes"`
	} `yaml:"placement"`
	Egress   []string `yaml:"egress"`
	Deadline string   `yaml:"deadline"`
}

func (l *composer) extension(n *yaml.Node) (*extension, error) {
	var x extension
	if n == nil {
		return &x, nil
	}
	if err := n.Decode(&x); err != nil {
		return nil, at(n, "x-holdfast: %v", err)
	}
	return &x, nil
}

// line is where a service's key stands, for errors of the second pass.
func (l *composer) line(service string, keys ...string) *yaml.Node {
	all := child(l.root, "services")
	n := child(all, service)
	if n == nil {
		return l.root
	}
	for i := 0; all != nil && i < len(all.Content); i += 2 {
		if all.Content[i].Value == service && len(keys) == 0 {
			return all.Content[i]
		}
	}
	for _, k := range keys {
		if c := child(n, k); c != nil {
			n = c
		}
	}
	return n
}

// convert turns what compose-go made of the tree into header and body.
func (l *composer) convert(p *types.Project) error {
	h, b := &l.doc.Header, &l.doc.Body
	b.Version, b.Source = Version, l.raw
	h.Version, h.Name = Version, l.doc.Name
	top, err := l.extension(child(l.root, "x-holdfast"))
	if err != nil {
		return err
	}
	if len(p.Services) == 0 {
		return errors.New("it has no services")
	}
	networks, owner := map[string]bool{}, map[string]string{}
	for _, name := range slices.Sorted(maps.Keys(p.Services)) {
		s := p.Services[name]
		sh, sb, err := l.service(p, &s, top)
		if err != nil {
			return err
		}
		for _, v := range sh.Volumes {
			if other, taken := owner[v]; taken {
				return at(l.line(name, "volumes"), "service %s: volume %s is used by %s already: a volume belongs to one service; give each its own", name, v, other)
			}
			owner[v] = name
		}
		networks[sh.Networks[0]] = true
		h.Services = append(h.Services, *sh)
		b.Services = append(b.Services, *sb)
		l.doc.Images[name] = s.Image
	}
	if err := l.buckets(top); err != nil {
		return err
	}
	h.Networks = slices.Sorted(maps.Keys(networks))
	for _, name := range slices.Sorted(maps.Keys(p.Volumes)) {
		if owner[name] == "" {
			l.doc.Notes = append(l.doc.Notes, fmt.Sprintf("volume %s is used by no service and left out", name))
			continue
		}
		size, err := l.volumeSize(name)
		if err != nil {
			return err
		}
		v := Volume{Name: name, Size: size}
		n := child(child(child(child(l.root, "volumes"), name), "x-holdfast"), "snapshots")
		switch {
		case n == nil || n.Value == "true":
			v.Store.Limit = VolumeStore(size)
		case n.Value != "false":
			return at(n, "volume %s: snapshots is true or false", name)
		}
		h.Volumes = append(h.Volumes, v)
	}
	if err := l.routes(top); err != nil {
		return err
	}
	if err := l.dependencies(); err != nil {
		return err
	}
	return l.rehearse()
}

// rehearse validates what would be signed, with stand-ins for what only signing sets.
func (l *composer) rehearse() error {
	h := l.doc.Header
	h.Grid[0], h.Account[0], h.Revision, h.SealedSize = 1, 1, 1, overhead+1
	if h.Store != (Store{}) {
		h.Store.FrontEnd[0], h.Store.Recovery[0] = 1, 2
	}
	h.Volumes = slices.Clone(h.Volumes)
	for i := range h.Volumes {
		if s := &h.Volumes[i].Store; *s != (Store{}) {
			s.FrontEnd[0], s.Recovery[0] = 1, 2
		}
	}
	for i := range h.Services {
		s, p := &h.Services[i], &l.doc.Body.Services[i]
		if p.FrontEnd != nil {
			continue // it has no keys yet; the rest is of this package
		}
		if err := s.validate(&h); err != nil {
			return at(l.line(s.Name), "service %s: %v", s.Name, err)
		}
		if err := p.validate(&h, s); err != nil {
			return at(l.line(s.Name), "service %s: %v", s.Name, err)
		}
	}
	if err := h.Validate(); err != nil {
		return err
	}
	if n := len(h.Encode()); n > MaxHeader-512 { // IDs, sizes and commitments come with the signature
		return fmt.Errorf("the contract's public header has %d bytes, at most %d are allowed", n, MaxHeader-512)
	}
	_, err := l.doc.Body.encode()
	return err
}

func (l *composer) volumeSize(name string) (uint64, error) {
	n := child(child(child(child(l.root, "volumes"), name), "x-holdfast"), "size")
	if n == nil {
		return DefaultVolumeSize, nil
	}
	size, err := units.RAMInBytes(n.Value)
	if err != nil || size <= 0 || size > MaxVolumeSize {
		return 0, at(n, "volume %s: size %q: write it like 1GiB, at most %s", name, n.Value, units.BytesSize(MaxVolumeSize))
	}
	return uint64(size), nil
}

func (l *composer) routes(top *extension) error {
	h := &l.doc.Header
	for i, r := range top.Routes {
		n := items(child(child(l.root, "x-holdfast"), "routes"))[i]
		if _, ok := h.Service(r.Service); !ok {
			return at(n, "route %s leads to service %q, which is not there", r.Host, r.Service)
		}
		if err := validHost(r.Host); err != nil {
			return at(n, "%v", err)
		}
		port, err := strconv.ParseUint(r.Port, 10, 16)
		if err != nil || port == 0 {
			return at(n, "route %s: port %q: write the number of the port that %s listens on", r.Host, r.Port, r.Service)
		}
		if slices.ContainsFunc(h.Routes, func(x Route) bool { return x.Host == r.Host }) {
			return at(n, "host %s has two routes", r.Host)
		}
		h.Routes = append(h.Routes, Route{r.Host, r.Service, uint16(port)})
	}
	slices.SortFunc(h.Routes, func(a, b Route) int { return strings.Compare(a.Host, b.Host) })
	switch {
	case len(l.published) == 0:
	case len(top.Routes) > 0:
		l.note(l.published[0].node, "ports open nothing: x-holdfast.routes says what is reached from outside")
	case len(l.published) > 1:
		return at(l.published[1].node, "%d ports are published: ports open nothing here; say under x-holdfast.routes which host name leads to which", len(l.published))
	default:
		p := l.published[0]
		host := p.service + "-" + l.doc.Name + ".localhost"
		if p.service == l.doc.Name {
			host = p.service + ".localhost"
		}
		host = strings.ReplaceAll(host, "_", "-")
		if validHost(host) != nil {
			return at(p.node, "port %d of %s opens nothing: say under x-holdfast.routes which host name leads to it", p.port, p.service)
		}
		h.Routes = []Route{{host, p.service, p.port}}
		l.note(p.node, "port %d of %s opens nothing; it became the route https://%s (x-holdfast.routes changes the name)", p.port, p.service, host)
	}
	return nil
}

func (l *composer) dependencies() error {
	for i := range l.doc.Body.Services {
		s := &l.doc.Body.Services[i]
		for _, d := range s.DependsOn {
			j := slices.IndexFunc(l.doc.Body.Services, func(o Process) bool { return o.Name == d.Service })
			n := l.line(s.Name, "depends_on", d.Service)
			switch {
			case j < 0:
				return at(n, "service %s depends on %q, which is not there", s.Name, d.Service)
			case d.Condition == Healthy && l.doc.Body.Services[j].Health == nil:
				return at(n, "service %s waits until %s is healthy, but that has no healthcheck: add one, or use service_started", s.Name, d.Service)
			case d.Condition == Completed && l.doc.Body.Services[j].Restart != "no" && l.doc.Body.Services[j].Restart != "on-failure":
				return at(n, "service %s waits until %s has completed, but that is started again and again: give it restart: \"no\" or on-failure", s.Name, d.Service)
			}
		}
	}
	return nil
}

func (l *composer) service(p *types.Project, s *types.ServiceConfig, top *extension) (*Service, *Process, error) {
	if s.Image == "" {
		return nil, nil, at(l.line(s.Name), "service %s has no image", s.Name)
	}
	x, err := l.extension(child(child(child(l.root, "services"), s.Name), "x-holdfast"))
	if err != nil {
		return nil, nil, err
	}
	h := &Service{Name: s.Name, Replicas: 1, CPUMilli: DefaultCPUMilli, Memory: DefaultMemory, Pids: DefaultPids}
	b := &Process{
		Name: s.Name, Image: Image{Reference: s.Image}, WorkingDir: s.WorkingDir, User: s.User, ReadOnly: s.ReadOnly, Hostname: s.Hostname,
		Labels: s.Labels, Restart: "always",
	}
	for _, f := range []func() error{
		func() error { return l.command(s, b) },
		func() error { return l.resources(s, h) },
		func() error { return l.placement(h, x, top) },
		func() error { return l.update(s, h, x) },
		func() error { return l.environment(s, b) },
		func() error { return l.egress(s, h, b) },
		func() error { return l.mounts(s, h, b) },
		func() error { return l.files(p, s, b) },
		func() error { return l.health(s, b) },
		func() error { return l.restart(s, b) },
		func() error { return l.stop(s, b) },
		func() error { return l.capabilities(s, b) },
		func() error { return l.networks(s, h, b) },
		func() error { return l.expose(s, b) },
	} {
		if err := f(); err != nil {
			return nil, nil, err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(s.DependsOn)) {
		if d := s.DependsOn[name]; d.Required || p.Services[name].Name != "" {
			b.DependsOn = append(b.DependsOn, Dependency{name, d.Condition})
		}
	}
	return h, b, nil
}

// command keeps to Compose: an entrypoint drops the image's command, and an empty one the image's entrypoint.
func (l *composer) command(s *types.ServiceConfig, b *Process) error {
	entry, cmd := []string(s.Entrypoint), []string(s.Command)
	empty := func(args []string) bool { return len(args) == 0 || len(args) == 1 && args[0] == "" }
	switch {
	case entry != nil && empty(entry) && empty(cmd):
		return at(l.line(s.Name, "entrypoint"), "service %s: an empty entrypoint needs a command", s.Name)
	case entry != nil && empty(entry):
		entry, cmd = cmd, nil
	case entry == nil && cmd != nil && len(cmd) == 0:
		return at(l.line(s.Name, "command"), "service %s: an empty command cannot be had: write the entrypoint out", s.Name)
	case len(cmd) == 0:
		cmd = nil
	}
	b.Entrypoint, b.Command = entry, cmd
	return nil
}

func (l *composer) resources(s *types.ServiceConfig, h *Service) error {
	n := s.GetScale()
	if n < 0 || n > MaxReplicas {
		return at(l.line(s.Name, "deploy", "replicas"), "service %s: %d replicas, 0 to %d are allowed", s.Name, n, MaxReplicas)
	}
	h.Replicas = uint16(n)
	cpus, mem, pids := float64(s.CPUS), cmp.Or(int64(s.MemLimit), int64(s.MemReservation)), s.PidsLimit
	if s.Deploy != nil {
		if s.Deploy.Mode != "" && s.Deploy.Mode != "replicated" {
			return at(l.line(s.Name, "deploy", "mode"), "service %s: deploy mode %q cannot be had: say how many replicas", s.Name, s.Deploy.Mode)
		}
		for _, r := range []*types.Resource{s.Deploy.Resources.Reservations, s.Deploy.Resources.Limits} { // a limit goes before a reservation
			if r != nil {
				cpus, mem, pids = cmp.Or(float64(r.NanoCPUs), cpus), cmp.Or(int64(r.MemoryBytes), mem), cmp.Or(r.Pids, pids)
			}
		}
	}
	where := func(key, short string) *yaml.Node {
		for _, of := range []string{"limits", "reservations"} {
			if n := child(child(child(l.line(s.Name, "deploy"), "resources"), of), key); n != nil {
				return n
			}
		}
		return l.line(s.Name, short)
	}
	switch {
	case math.IsNaN(cpus) || cpus < 0 || cpus > MaxCPUMilli/1000:
		return at(where("cpus", "cpus"), "service %s: %v cores, up to %d are allowed", s.Name, cpus, MaxCPUMilli/1000)
	case mem != 0 && (mem < MinMemory || mem > MaxMemory):
		return at(where("memory", "mem_limit"), "service %s: memory of %s, %s to %s are allowed", s.Name, bytesText(uint64(max(mem, 0))), bytesText(MinMemory), bytesText(MaxMemory))
	case pids < 0 || pids > MaxPids:
		return at(where("pids", "pids_limit"), "service %s: %d processes, 1 to %d are allowed", s.Name, pids, MaxPids)
	}
	if cpus > 0 {
		h.CPUMilli = uint32(max(math.Round(cpus*1000), 1))
	}
	if mem > 0 {
		h.Memory = uint64(mem)
	}
	if pids > 0 {
		h.Pids = uint32(pids)
	}
	return nil
}

// update reads deploy.update_config, and the deadline that Compose does not know.
func (l *composer) update(s *types.ServiceConfig, h *Service, x *extension) error {
	seconds := func(d time.Duration, n *yaml.Node, what string) (uint32, error) {
		if d < 0 || d > maxUpdateTime {
			return 0, at(n, "service %s: %s of %v: up to %v is allowed", s.Name, what, d, maxUpdateTime)
		}
		return uint32((d + time.Second - 1) / time.Second), nil
	}
	var err error
	if x.Deadline != "" {
		n := l.line(s.Name, "x-holdfast", "deadline")
		d, perr := time.ParseDuration(x.Deadline)
		if perr != nil || d < time.Second {
			return at(n, "service %s: deadline %q: write a time as 90s or 10m", s.Name, x.Deadline)
		}
		if h.Update.Deadline, err = seconds(d, n, "deadline"); err != nil {
			return err
		}
	}
	if s.Deploy == nil || s.Deploy.UpdateConfig == nil {
		return nil
	}
	c := s.Deploy.UpdateConfig
	line := func(key string) *yaml.Node { return l.line(s.Name, "deploy", "update_config", key) }
	if c.Parallelism != nil {
		h.Update.Parallel = uint16(min(*c.Parallelism, MaxReplicas))
		if *c.Parallelism == 0 {
			h.Update.Parallel = MaxReplicas
		}
	}
	switch c.FailureAction {
	case "", "rollback":
	case OnFailurePause, OnFailureContinue:
		h.Update.Action = c.FailureAction
	default:
		return at(line("failure_action"), "service %s: failure_action %q: it can be rollback, pause or continue", s.Name, c.FailureAction)
	}
	if c.Order != "" && c.Order != "stop-first" {
		return at(line("order"), "service %s: order %q cannot be had: a replica has one address, and ends before the next one begins; leave it out", s.Name, c.Order)
	}
	h.Update.Monitor, err = seconds(time.Duration(c.Monitor), line("monitor"), "monitor")
	return err
}

func (l *composer) placement(h *Service, x, top *extension) error {
	p := cmp.Or(x.Placement, top.Placement)
	if p != nil {
		farms, nodes := slices.Clone(p.Farms), slices.Clone(p.Nodes)
		slices.Sort(farms)
		slices.Sort(nodes)
		h.Placement = Placement{p.Spread, slices.Compact(farms), slices.Compact(nodes)}
	}
	return nil
}

// String is the form that ParseEgress reads.
func (e Egress) String() string {
	host, bits, _ := strings.Cut(e.Prefix, "/")
	if strings.Contains(host, ":") {
		host = "[" + host + "]"
	}
	s := e.Proto + "://" + host + "/" + bits
	if e.Port > 0 {
		s += ":" + strconv.Itoa(int(e.Port))
	}
	return s
}

// ParseEgress reads "tcp://203.0.113.0/24:443", "udp://[2001:db8::]/32:53" or "tcp://[::]/0" (any port).
func ParseEgress(s string) (Egress, error) {
	bad := fmt.Errorf("egress %q: write it like tcp://203.0.113.0/24:443 or udp://[2001:db8::]/32:53", s)
	proto, rest, ok := strings.Cut(s, "://")
	if !ok || proto != "tcp" && proto != "udp" {
		return Egress{}, bad
	}
	host, tail := rest, ""
	if inner, ok := strings.CutPrefix(rest, "["); ok {
		if host, tail, ok = strings.Cut(inner, "]"); !ok || !strings.Contains(host, ":") {
			return Egress{}, bad
		}
	} else if i := strings.IndexAny(rest, "/:"); i >= 0 {
		host, tail = rest[:i], rest[i:]
	}
	a, err := netip.ParseAddr(host)
	if err != nil || a.Zone() != "" || a.Is4In6() {
		return Egress{}, bad
	}
	e, bits := Egress{Proto: proto}, a.BitLen()
	tail, port, hasPort := strings.Cut(tail, ":")
	if t, ok := strings.CutPrefix(tail, "/"); ok {
		if bits, err = strconv.Atoi(t); err != nil {
			return Egress{}, bad
		}
	} else if tail != "" {
		return Egress{}, bad
	}
	pre, err := a.Prefix(bits)
	if err != nil {
		return Egress{}, bad
	}
	e.Prefix = pre.String()
	if hasPort {
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil || n == 0 {
			return Egress{}, bad
		}
		e.Port = uint16(n)
	}
	return e, nil
}

func (l *composer) egress(s *types.ServiceConfig, h *Service, b *Process) error {
	for _, n := range items(child(l.line(s.Name, "x-holdfast"), "egress")) {
		e, err := ParseEgress(n.Value)
		if err != nil {
			return at(n, "service %s: %v", s.Name, err)
		}
		b.Egress = append(b.Egress, e)
	}
	slices.SortFunc(b.Egress, func(x, y Egress) int { return strings.Compare(x.String(), y.String()) })
	b.Egress = slices.Compact(b.Egress)
	h.Egress = len(b.Egress) > 0
	return nil
}

func (l *composer) environment(s *types.ServiceConfig, b *Process) error {
	env := map[string]string{}
	for _, f := range s.EnvFiles {
		n := l.line(s.Name, "env_file")
		raw, err := l.read(f.Path)
		if errors.Is(err, fs.ErrNotExist) && !bool(f.Required) {
			continue
		} else if err != nil {
			return at(n, "service %s: env_file: %v", s.Name, err)
		}
		vars, err := l.vars.envFile(raw)
		if err != nil {
			return at(n, "service %s: env_file %s: %v", s.Name, f.Path, err)
		}
		maps.Copy(env, vars)
	}
	for k, v := range s.Environment {
		if v == nil { // a name without a value takes it from the user's environment
			val, ok := l.vars.lookup(k)
			if !ok {
				continue
			}
			v = &val
		}
		env[k] = *v
	}
	for _, k := range slices.Sorted(maps.Keys(env)) {
		if k == "" || strings.ContainsAny(k, "=\x00") {
			return at(l.line(s.Name, "environment"), "service %s: environment: %q is no name", s.Name, k)
		}
		if err := text("the value of "+k, env[k]); err != nil {
			return at(l.line(s.Name, "environment"), "service %s: environment: %v", s.Name, err)
		}
		b.Environment = append(b.Environment, k+"="+env[k])
	}
	return nil
}

func (l *composer) mounts(s *types.ServiceConfig, h *Service, b *Process) error {
	for _, v := range s.Volumes {
		n := l.line(s.Name, "volumes")
		target := path.Clean(v.Target)
		switch v.Type {
		case types.VolumeTypeVolume:
			if v.Source == "" {
				return at(n, "service %s: the volume at %s has no name: name it, so that its data has an owner", s.Name, v.Target)
			}
			b.Mounts = append(b.Mounts, Mount{v.Source, target, v.ReadOnly})
			if !slices.Contains(h.Volumes, v.Source) {
				h.Volumes = append(h.Volumes, v.Source)
			}
		case types.VolumeTypeTmpfs:
			t := Tmpfs{Target: target}
			if v.Tmpfs != nil && v.Tmpfs.Size > 0 {
				t.Size = uint64(v.Tmpfs.Size)
			}
			b.Tmpfs = append(b.Tmpfs, t)
		default:
			return at(n, "service %s: a mount of type %q cannot be had: use a named volume for data, and configs or secrets for files", s.Name, v.Type)
		}
	}
	for _, t := range s.Tmpfs {
		target, opts, _ := strings.Cut(t, ":")
		m := Tmpfs{Target: path.Clean(target)}
		for o := range strings.SplitSeq(opts, ",") {
			v, ok := strings.CutPrefix(o, "size=")
			if !ok && o != "" && o != "rw" && o != "mode=1777" && o != "nosuid" && o != "nodev" {
				return at(l.line(s.Name, "tmpfs"), "service %s: tmpfs %s: the option %q cannot be had: the only one is size", s.Name, target, o)
			} else if !ok {
				continue
			}
			n, err := units.RAMInBytes(v)
			if err != nil || n <= 0 {
				return at(l.line(s.Name, "tmpfs"), "service %s: tmpfs %s: size %q: write it like 64m", s.Name, target, v)
			}
			m.Size = uint64(n)
		}
		b.Tmpfs = append(b.Tmpfs, m)
	}
	slices.Sort(h.Volumes)
	slices.SortFunc(b.Mounts, func(x, y Mount) int { return strings.Compare(x.Target, y.Target) })
	slices.SortFunc(b.Tmpfs, func(x, y Tmpfs) int { return strings.Compare(x.Target, y.Target) })
	return nil
}

// object is the content of a config or secret.
func (l *composer) object(o types.FileObjectConfig) ([]byte, error) {
	switch {
	case o.File != "":
		return l.read(o.File)
	case o.Environment != "":
		v, ok := l.vars.lookup(o.Environment)
		if !ok {
			return nil, fmt.Errorf("it takes the variable %s, which is not set", o.Environment)
		}
		return []byte(v), nil
	case o.Content != "":
		return []byte(o.Content), nil
	}
	return nil, errors.New("it has neither file nor environment nor content")
}

func (l *composer) files(p *types.Project, s *types.ServiceConfig, b *Process) error {
	put := func(kind string, ref types.FileReferenceConfig, o types.FileObjectConfig, ok bool) error {
		n, secret := l.line(s.Name, kind+"s"), kind == "secret"
		if !ok {
			return at(n, "service %s: %s %q is not there", s.Name, kind, ref.Source)
		}
		data, err := l.object(o)
		if err != nil {
			return at(n, "service %s: %s %s: %v", s.Name, kind, ref.Source, err)
		}
		if l.data += len(data); l.data > MaxBody {
			return at(n, "service %s: %s %s: the files of all services have more than %d bytes", s.Name, kind, ref.Source, MaxBody)
		}
		dir := "/"
		if secret {
			dir = "/run/secrets"
		}
		target := cmp.Or(ref.Target, ref.Source)
		if !path.IsAbs(target) {
			target = path.Join(dir, target)
		}
		f := File{Target: path.Clean(target), Data: data, Mode: 0o444, Secret: secret}
		if ref.Mode != nil {
			if *ref.Mode < 0 || *ref.Mode > 0o777 {
				return at(n, "service %s: %s %s: mode %#o, up to 0777 is allowed", s.Name, kind, ref.Source, int64(*ref.Mode))
			}
			f.Mode = uint32(*ref.Mode)
		}
		for _, id := range []struct {
			text string
			to   *uint32
		}{{ref.UID, &f.UID}, {ref.GID, &f.GID}} {
			if id.text == "" {
				continue
			}
			v, err := strconv.ParseUint(id.text, 10, 31)
			if err != nil {
				return at(n, "service %s: owner %q of %s is not a number", s.Name, id.text, ref.Source)
			}
			*id.to = uint32(v)
		}
		b.Files = append(b.Files, f)
		return nil
	}
	for _, c := range s.Configs {
		o, ok := p.Configs[c.Source]
		if err := put("config", types.FileReferenceConfig(c), types.FileObjectConfig(o), ok); err != nil {
			return err
		}
	}
	for _, c := range s.Secrets {
		o, ok := p.Secrets[c.Source]
		if err := put("secret", types.FileReferenceConfig(c), types.FileObjectConfig(o), ok); err != nil {
			return err
		}
	}
	slices.SortStableFunc(b.Files, func(x, y File) int { return strings.Compare(x.Target, y.Target) })
	return nil
}

func (l *composer) health(s *types.ServiceConfig, b *Process) error {
	c := s.HealthCheck
	if c == nil || c.Disable || len(c.Test) > 0 && c.Test[0] == "NONE" {
		return nil
	}
	h := &Healthcheck{}
	switch {
	case len(c.Test) >= 2 && c.Test[0] == "CMD":
		h.Test = c.Test[1:]
	case len(c.Test) == 2 && c.Test[0] == "CMD-SHELL":
		h.Test = []string{"/bin/sh", "-c", c.Test[1]}
	default:
		return at(l.line(s.Name, "healthcheck"), "service %s: healthcheck: test must be [CMD, …], [CMD-SHELL, …] or NONE", s.Name)
	}
	for _, d := range []struct {
		key  string
		from *types.Duration
		to   *time.Duration
	}{{"interval", c.Interval, &h.Interval}, {"timeout", c.Timeout, &h.Timeout}, {"start_period", c.StartPeriod, &h.StartPeriod}} {
		if d.from == nil {
			continue
		}
		if *d.to = time.Duration(*d.from); *d.to < 0 || *d.to > maxInterval {
			return at(l.line(s.Name, "healthcheck", d.key), "service %s: healthcheck: %s of %v, up to %v is allowed", s.Name, d.key, *d.to, maxInterval)
		}
	}
	if c.Retries != nil {
		h.Retries = uint32(min(*c.Retries, math.MaxUint32))
	}
	b.Health = h
	return nil
}

func (l *composer) restart(s *types.ServiceConfig, b *Process) error {
	r := s.Restart
	n := l.line(s.Name, "restart")
	if s.Deploy != nil && s.Deploy.RestartPolicy != nil && r == "" {
		p := s.Deploy.RestartPolicy
		n = l.line(s.Name, "deploy", "restart_policy")
		var ok bool
		if r, ok = map[string]string{"none": "no", "on-failure": "on-failure", "any": "always", "": "always"}[p.Condition]; !ok {
			return at(n, "service %s: restart_policy condition %q: it can be none, on-failure or any", s.Name, p.Condition)
		}
		if p.MaxAttempts != nil && *p.MaxAttempts > 0 {
			if r != "on-failure" {
				return at(n, "service %s: max_attempts needs the condition on-failure", s.Name)
			}
			b.MaxRetries = uint32(min(*p.MaxAttempts, math.MaxUint32))
		}
	}
	if tries, ok := strings.CutPrefix(r, "on-failure:"); ok {
		v, err := strconv.ParseUint(tries, 10, 32)
		if err != nil {
			return at(n, "service %s: restart %q: write it like on-failure:3", s.Name, r)
		}
		r, b.MaxRetries = "on-failure", uint32(v)
	}
	switch r {
	case "": // what is deployed is meant to run
	case "no", "always", "on-failure", "unless-stopped":
		b.Restart = r
	default:
		return at(n, "service %s: restart %q: it can be no, always, on-failure, on-failure:N or unless-stopped", s.Name, r)
	}
	return nil
}

func (l *composer) stop(s *types.ServiceConfig, b *Process) error {
	if d := s.StopGracePeriod; d != nil {
		if b.StopGrace = time.Duration(*d); b.StopGrace < 0 || b.StopGrace > maxGrace {
			return at(l.line(s.Name, "stop_grace_period"), "service %s: stop_grace_period of %v, up to %v is allowed", s.Name, b.StopGrace, maxGrace)
		}
	}
	if sig := strings.ToUpper(s.StopSignal); sig != "" {
		b.StopSignal = "SIG" + strings.TrimPrefix(sig, "SIG")
		if err := validSignal(b.StopSignal); err != nil {
			return at(l.line(s.Name, "stop_signal"), "service %s: %v", s.Name, err)
		}
	}
	return nil
}

func (l *composer) capabilities(s *types.ServiceConfig, b *Process) error {
	for _, c := range []struct {
		key  string
		from []string
		to   *[]string
	}{{"cap_add", s.CapAdd, &b.CapAdd}, {"cap_drop", s.CapDrop, &b.CapDrop}} {
		for _, name := range c.from {
			name = strings.TrimPrefix(strings.ToUpper(name), "CAP_")
			if err := validCap(name, c.key == "cap_drop"); err != nil {
				return at(l.line(s.Name, c.key), "service %s: %s: %v", s.Name, c.key, err)
			}
			*c.to = append(*c.to, name)
		}
		slices.Sort(*c.to)
		*c.to = slices.Compact(*c.to)
	}
	return nil
}

func (l *composer) networks(s *types.ServiceConfig, h *Service, b *Process) error {
	if len(s.Networks) > 1 {
		return at(l.line(s.Name, "networks"), "service %s is on %d networks: a workload is on one; put the services that talk to each other on the same", s.Name, len(s.Networks))
	}
	h.Networks = []string{"default"}
	for name, c := range s.Networks {
		h.Networks = []string{name}
		if c != nil {
			b.Aliases = slices.Clone(c.Aliases)
			slices.Sort(b.Aliases)
			b.Aliases = slices.Compact(b.Aliases)
		}
	}
	return nil
}

func (l *composer) expose(s *types.ServiceConfig, b *Process) error {
	for _, e := range s.Expose {
		n, err := strconv.ParseUint(strings.TrimSuffix(e, "/tcp"), 10, 16)
		if err != nil || n == 0 {
			return at(l.line(s.Name, "expose"), "service %s: expose %q is not a TCP port", s.Name, e)
		}
		b.Expose = append(b.Expose, uint16(n))
	}
	slices.Sort(b.Expose)
	b.Expose = slices.Compact(b.Expose)
	return nil
}
