package contract

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"net/netip"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/compose-spec/compose-go/v2/dotenv"
	"github.com/compose-spec/compose-go/v2/loader"
	"github.com/compose-spec/compose-go/v2/types"
	units "github.com/docker/go-units"
	"go.yaml.in/yaml/v3"
)

// Limits of a Compose file and of the files that it names.
const (
	MaxCompose     = 1 << 20
	MaxComposeFile = 1 << 20 // a secret, a config or an env_file
	maxNodes       = 50_000  // of the YAML tree, with aliases followed
	maxNesting     = 32
)

// What a service gets that asks for nothing.
const (
	DefaultCPUMilli   = 500
	DefaultMemory     = 512 << 20
	DefaultPids       = 512
	DefaultVolumeSize = 1 << 30
)

// Input is a Compose file.
type Input struct {
	Path         string            // of the file; its directory is the project's
	Env          map[string]string // for ${VARIABLES}
	OutsideFiles bool              // secrets, configs and env_files may lie outside the project's directory
}

// Document is what a Compose file asks for, before its images are found and it is signed.
type Document struct {
	Name   string
	Header Header            // services, volumes, networks and routes; the rest is set when it is signed
	Body   Body              // images by reference only
	Notes  []string          // what the author should know
	Images map[string]string // service → image reference
}

// Load reads a Compose file. What it asks for and cannot have is an error with file and line and what to write instead.
func Load(ctx context.Context, in Input) (*Document, error) {
	raw, err := readLimited(in.Path, MaxCompose)
	if err != nil {
		return nil, err
	}
	l := &composer{Input: in, file: filepath.Base(in.Path), dir: filepath.Dir(in.Path), raw: raw}
	doc, err := l.load(ctx)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", in.Path, err)
	}
	return doc, nil
}

func readLimited(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("%s has more than %d bytes", path, limit)
	}
	return b, nil
}

type composer struct {
	Input
	file, dir string
	raw       []byte
	root      *yaml.Node
	doc       *Document
	published []publish
}

// publish is an entry of "ports".
type publish struct {
	service string
	port    uint16
	line    int
}

// extension is "x-holdfast" at the top of a file or of a service.
type extension struct {
	Routes []struct {
		Host    string `yaml:"host"`
		Service string `yaml:"service"`
		Port    uint16 `yaml:"port"`
	} `yaml:"routes"`
	Placement *struct {
		Spread string   `yaml:"spread"`
		Farms  []string `yaml:"farms"`
		Nodes  []string `yaml:"nodes"`
	} `yaml:"placement"`
	Egress []string `yaml:"egress"`
}

func (l *composer) load(ctx context.Context) (doc *Document, err error) {
	// The parsers below are not ours; a file that makes one panic is a bad file.
	defer func() {
		if p := recover(); p != nil {
			doc, err = nil, fmt.Errorf("the file cannot be read: %v", p)
		}
	}()
	var tree yaml.Node
	if err := yaml.Unmarshal(l.raw, &tree); err != nil {
		return nil, err
	}
	if len(tree.Content) != 1 || tree.Content[0].Kind != yaml.MappingNode {
		return nil, errors.New("it is not a Compose file: the top is no mapping")
	}
	l.root = tree.Content[0]
	budget := maxNodes
	if err := measure(l.root, 0, &budget); err != nil {
		return nil, err
	}
	if err := l.check(); err != nil {
		return nil, err
	}
	p, err := loader.LoadWithContext(ctx, types.ConfigDetails{
		WorkingDir: l.dir, Environment: l.Env, ConfigFiles: []types.ConfigFile{{Filename: l.Path, Content: l.raw}},
	}, func(o *loader.Options) {
		o.SkipExtends, o.SkipInclude, o.SkipResolveEnvironment, o.ResolvePaths = true, true, true, false
		o.MaxNodeVisits = 2 * maxNodes
		o.SetProjectName(l.projectName(), true)
	})
	if err != nil {
		return nil, err
	}
	return l.convert(p)
}

// projectName is the file's own name, or its directory's.
func (l *composer) projectName() string {
	if n := child(l.root, "name"); n != nil && n.Kind == yaml.ScalarNode && n.Value != "" {
		return n.Value
	}
	abs, err := filepath.Abs(l.dir)
	if err != nil {
		return "app"
	}
	return loader.NormalizeProjectName(filepath.Base(abs))
}

// measure refuses trees that are deep, or that grow large when aliases are followed.
func measure(n *yaml.Node, depth int, budget *int) error {
	if *budget--; *budget < 0 {
		return fmt.Errorf("it has more than %d parts when its aliases are followed", maxNodes)
	}
	if depth > maxNesting {
		return fmt.Errorf("line %d: nested more than %d levels deep", n.Line, maxNesting)
	}
	if n.Kind == yaml.AliasNode {
		return measure(n.Alias, depth+1, budget)
	}
	for _, c := range n.Content {
		if err := measure(c, depth+1, budget); err != nil {
			return err
		}
	}
	return nil
}

// child returns the value of a key of a mapping, nil when absent.
func child(n *yaml.Node, key string) *yaml.Node {
	for n != nil && n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	if n == nil || n.Kind != yaml.MappingNode {
		return nil
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == key {
			return n.Content[i+1]
		}
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == "<<" {
			m := n.Content[i+1]
			if m.Kind == yaml.SequenceNode {
				for _, x := range m.Content {
					if c := child(x, key); c != nil {
						return c
					}
				}
			} else if c := child(m, key); c != nil {
				return c
			}
		}
	}
	return nil
}

// pairs calls f for each key of a mapping.
func pairs(n *yaml.Node, f func(key, value *yaml.Node) error) error {
	for n != nil && n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	if n == nil || n.Kind != yaml.MappingNode {
		return nil
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, v := n.Content[i], n.Content[i+1]
		if k.Value == "<<" {
			list := []*yaml.Node{v}
			if v.Kind == yaml.SequenceNode {
				list = v.Content
			}
			for _, m := range list {
				if err := pairs(m, f); err != nil {
					return err
				}
			}
			continue
		}
		if err := f(k, v); err != nil {
			return err
		}
	}
	return nil
}

func at(n *yaml.Node, format string, args ...any) error {
	return fmt.Errorf("line %d: %s", n.Line, fmt.Sprintf(format, args...))
}

// supported are the keys of each section; everything else is refused, since what is silently left out is a surprise.
func supported(section string) []string {
	return map[string][]string{
		"file":    {"name", "version", "services", "volumes", "networks", "configs", "secrets", "x-holdfast"},
		"service": {"image", "command", "entrypoint", "environment", "env_file", "expose", "ports", "volumes", "tmpfs", "configs", "secrets", "depends_on", "healthcheck", "restart", "deploy", "scale", "mem_limit", "cpus", "pids_limit", "mem_reservation", "user", "working_dir", "read_only", "cap_add", "cap_drop", "stop_grace_period", "stop_signal", "networks", "labels", "hostname", "init", "container_name", "x-holdfast"},
		"deploy":  {"replicas", "resources", "labels", "mode", "restart_policy", "update_config"},
		"volume":  {"name", "labels", "x-holdfast", "driver"},
		"network": {"name", "labels", "driver", "internal", "enable_ipv6", "x-holdfast"},
		"config":  {"file", "content", "environment", "name"},
		"secret":  {"file", "environment", "name"},
		"mount":   {"type", "source", "target", "read_only", "volume", "tmpfs"},
		"x file":  {"routes", "placement"},
		"x svc":   {"placement", "egress"},
		"x vol":   {"size"},
		"route":   {"host", "service", "port"},
		"place":   {"spread", "farms", "nodes"},
	}[section]
}

// instead says what to write in place of keys that people use and that cannot be had.
func instead(key string) string {
	return map[string]string{
		"privileged":          "a workload is never privileged; add single capabilities with cap_add",
		"network_mode":        "workloads see their overlay network only; reach others by service name, the outside with x-holdfast.egress",
		"pid":                 "a sandbox has its own processes only; leave it out",
		"ipc":                 "a sandbox has its own IPC; leave it out",
		"uts":                 "a sandbox has its own host name; set hostname",
		"userns_mode":         "a sandbox is never mapped to the machine's users; leave it out",
		"cgroup_parent":       "set limits under deploy.resources",
		"cgroup":              "set limits under deploy.resources",
		"devices":             "a workload sees no device of the machine; leave it out",
		"device_cgroup_rules": "a workload sees no device of the machine; leave it out",
		"gpus":                "a workload sees no device of the machine; leave it out",
		"security_opt":        "every workload runs in gVisor with no new privileges; leave it out",
		"sysctls":             "set them in the image or the application; leave it out",
		"build":               "build the image and name it under image: a registry reference, or oci:PATH of an OCI layout",
		"extends":             "write the service out, or use YAML anchors",
		"include":             "write it in one file",
		"links":               "services find each other by name; leave it out",
		"external_links":      "services find each other by name; leave it out",
		"volumes_from":        "name the volumes under volumes",
		"runtime":             "every workload runs in gVisor; leave it out",
		"dns":                 "names resolve inside the overlay; leave it out",
		"extra_hosts":         "names resolve inside the overlay; use a network alias",
		"logging":             "holdfast logs shows what a workload writes; leave it out",
		"profiles":            "write one file for each profile",
		"ulimits":             "limits are those of deploy.resources; leave it out",
		"shm_size":            "mount a tmpfs at /dev/shm with the size",
		"platform":            "nodes are linux/amd64; leave it out",
		"tty":                 "nobody can attach; leave it out",
		"stdin_open":          "nobody can attach; leave it out",
		"group_add":           "set user as uid:gid",
	}[key]
}

func allow(n *yaml.Node, section, what string) error {
	ok := supported(section)
	return pairs(n, func(k, _ *yaml.Node) error {
		if slices.Contains(ok, k.Value) || strings.HasPrefix(k.Value, "x-") && k.Value != "x-holdfast" {
			return nil
		}
		if hint := instead(k.Value); hint != "" {
			return at(k, "%s: %q cannot be had: %s", what, k.Value, hint)
		}
		return at(k, "%s: %q is not supported; it can have %s", what, k.Value, strings.Join(ok, ", "))
	})
}

// check walks the file as it was written, where lines are known.
func (l *composer) check() error {
	if err := allow(l.root, "file", "the file"); err != nil {
		return err
	}
	x := child(l.root, "x-holdfast")
	if err := allow(x, "x file", "x-holdfast"); err != nil {
		return err
	}
	if r := child(x, "routes"); r != nil {
		for _, e := range r.Content {
			if err := allow(e, "route", "x-holdfast.routes"); err != nil {
				return err
			}
		}
	}
	if err := allow(child(x, "placement"), "place", "x-holdfast.placement"); err != nil {
		return err
	}
	for section, kind := range map[string]string{"volumes": "volume", "networks": "network", "configs": "config", "secrets": "secret"} {
		err := pairs(child(l.root, section), func(k, v *yaml.Node) error {
			if child(v, "external") != nil {
				return at(k, "%s %s: %q cannot be had: everything that a contract uses belongs to it", kind, k.Value, "external")
			}
			return allow(v, kind, kind+" "+k.Value)
		})
		if err != nil {
			return err
		}
	}
	err := pairs(child(l.root, "volumes"), func(k, v *yaml.Node) error {
		return allow(child(v, "x-holdfast"), "x vol", "volume "+k.Value+": x-holdfast")
	})
	if err != nil {
		return err
	}
	return pairs(child(l.root, "services"), l.checkService)
}

func (l *composer) checkService(name, s *yaml.Node) error {
	what := "service " + name.Value
	if n := child(s, "network_mode"); n != nil && n.Value == "none" {
		return at(n, "%s: leave networks out and x-holdfast.egress too: a workload reaches its own contract only", what)
	}
	if err := allow(s, "service", what); err != nil {
		return err
	}
	if err := allow(child(s, "deploy"), "deploy", what+": deploy"); err != nil {
		return err
	}
	x := child(s, "x-holdfast")
	if err := allow(x, "x svc", what+": x-holdfast"); err != nil {
		return err
	}
	if err := allow(child(x, "placement"), "place", what+": x-holdfast.placement"); err != nil {
		return err
	}
	if v := child(s, "volumes"); v != nil {
		for _, m := range v.Content {
			if m.Kind == yaml.ScalarNode {
				src, _, _ := strings.Cut(m.Value, ":")
				if strings.HasPrefix(src, ".") || strings.HasPrefix(src, "/") && strings.Contains(m.Value, ":") || strings.HasPrefix(src, "~") {
					return at(m, "%s: %q is a path of your machine, which no node sees: use a named volume, or configs for files", what, m.Value)
				}
				continue
			}
			if t := child(m, "type"); t != nil && t.Value != "volume" && t.Value != "tmpfs" {
				return at(t, "%s: a mount of type %q cannot be had: use a named volume, or configs for files", what, t.Value)
			}
			if err := allow(m, "mount", what+": volumes"); err != nil {
				return err
			}
		}
	}
	if p := child(s, "ports"); p != nil {
		for _, e := range p.Content {
			if err := l.checkPort(what, name.Value, e); err != nil {
				return err
			}
		}
	}
	return nil
}

func (l *composer) checkPort(what, service string, e *yaml.Node) error {
	target, proto := "", "tcp"
	if e.Kind == yaml.ScalarNode {
		s := e.Value
		if a, b, ok := strings.Cut(s, "/"); ok {
			s, proto = a, b
		}
		target = s[strings.LastIndexByte(s, ':')+1:]
	} else {
		if t := child(e, "target"); t != nil {
			target = t.Value
		}
		if p := child(e, "protocol"); p != nil {
			proto = p.Value
		}
	}
	if proto != "tcp" {
		return at(e, "%s: port %s: only HTTP over TCP is reached from outside, through a gateway: leave UDP ports out", what, target)
	}
	n, err := strconv.ParseUint(target, 10, 16)
	if err != nil || n == 0 {
		return at(e, "%s: port %q: name one port, and where it leads under x-holdfast.routes", what, e.Value)
	}
	l.published = append(l.published, publish{service, uint16(n), e.Line})
	return nil
}

// line is where a service's key stands, for errors of the second pass.
func (l *composer) line(service string, keys ...string) *yaml.Node {
	n := child(child(l.root, "services"), service)
	for _, k := range keys {
		if c := child(n, k); c != nil {
			n = c
		}
	}
	if n == nil {
		return l.root
	}
	return n
}

func (l *composer) convert(p *types.Project) (*Document, error) {
	l.doc = &Document{Name: p.Name, Images: map[string]string{}}
	l.doc.Body.Version, l.doc.Body.Source = Version, l.raw
	l.doc.Header.Version, l.doc.Header.Name = Version, p.Name
	var top extension
	if err := l.extension(child(l.root, "x-holdfast"), &top); err != nil {
		return nil, err
	}
	if len(p.Services) == 0 {
		return nil, errors.New("it has no services")
	}
	used := map[string]bool{}
	for _, name := range slices.Sorted(maps.Keys(p.Services)) {
		s := p.Services[name]
		h, b, err := l.service(p, &s, &top)
		if err != nil {
			return nil, err
		}
		for _, v := range h.Volumes {
			used["v "+v] = true
		}
		for _, n := range h.Networks {
			used["n "+n] = true
		}
		l.doc.Header.Services = append(l.doc.Header.Services, *h)
		l.doc.Body.Services = append(l.doc.Body.Services, *b)
		l.doc.Images[name] = s.Image
	}
	for _, name := range slices.Sorted(maps.Keys(p.Volumes)) {
		if !used["v "+name] {
			l.doc.Notes = append(l.doc.Notes, fmt.Sprintf("volume %s is used by no service and left out", name))
			continue
		}
		size, err := l.volumeSize(name)
		if err != nil {
			return nil, err
		}
		l.doc.Header.Volumes = append(l.doc.Header.Volumes, Volume{name, size})
	}
	for k := range used {
		if n, ok := strings.CutPrefix(k, "n "); ok {
			l.doc.Header.Networks = append(l.doc.Header.Networks, n)
		}
	}
	slices.Sort(l.doc.Header.Networks)
	if err := l.routes(&top); err != nil {
		return nil, err
	}
	if err := l.dependencies(); err != nil {
		return nil, err
	}
	return l.doc, l.rehearse()
}

// rehearse validates what would be signed, with stand-ins for what only signing sets.
func (l *composer) rehearse() error {
	h := l.doc.Header
	h.Grid[0], h.Account[0], h.Revision, h.SealedSize = 1, 1, 1, 1
	return h.Validate()
}

func (l *composer) extension(n *yaml.Node, x *extension) error {
	if n == nil {
		return nil
	}
	if err := n.Decode(x); err != nil {
		return at(n, "x-holdfast: %v", err)
	}
	return nil
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
		n := child(child(l.root, "x-holdfast"), "routes").Content[i]
		if _, ok := h.Service(r.Service); !ok {
			return at(n, "route %s leads to service %q, which is not there", r.Host, r.Service)
		}
		if err := validHost(r.Host); err != nil {
			return at(n, "%v", err)
		}
		if r.Port == 0 {
			return at(n, "route %s has no port", r.Host)
		}
		if slices.ContainsFunc(h.Routes, func(x Route) bool { return x.Host == r.Host }) {
			return at(n, "host %s has two routes", r.Host)
		}
		h.Routes = append(h.Routes, Route{r.Host, r.Service, r.Port})
	}
	switch {
	case len(l.published) == 0:
	case len(top.Routes) > 0:
		l.doc.Notes = append(l.doc.Notes, "ports open nothing: x-holdfast.routes says what is reached from outside")
	case len(l.published) > 1:
		return fmt.Errorf("line %d: %d ports are published: ports open nothing here; say under x-holdfast.routes which host name leads to which", l.published[1].line, len(l.published))
	default:
		p := l.published[0]
		host := p.service + "-" + l.doc.Name + ".localhost"
		if p.service == l.doc.Name {
			host = p.service + ".localhost"
		}
		host = strings.ReplaceAll(host, "_", "-")
		h.Routes = append(h.Routes, Route{host, p.service, p.port})
		l.doc.Notes = append(l.doc.Notes, fmt.Sprintf("port %d of %s opens nothing; it became the route https://%s (x-holdfast.routes changes the name)", p.port, p.service, host))
	}
	slices.SortFunc(h.Routes, func(a, b Route) int { return strings.Compare(a.Host, b.Host) })
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
	var x extension
	if err := l.extension(child(child(child(l.root, "services"), s.Name), "x-holdfast"), &x); err != nil {
		return nil, nil, err
	}
	h := &Service{Name: s.Name, Replicas: 1, CPUMilli: DefaultCPUMilli, Memory: DefaultMemory, Pids: DefaultPids}
	b := &Process{
		Name: s.Name, Image: Image{Reference: s.Image}, Entrypoint: s.Entrypoint, Command: s.Command, WorkingDir: s.WorkingDir, User: s.User,
		ReadOnly: s.ReadOnly, CapAdd: s.CapAdd, CapDrop: s.CapDrop, StopSignal: s.StopSignal, Labels: s.Labels, Hostname: s.Hostname, Restart: "always",
	}
	if s.StopGracePeriod != nil {
		b.StopGrace = time.Duration(*s.StopGracePeriod)
	}
	steps := []func() error{
		func() error { return l.resources(s, h) },
		func() error { return l.placement(s, h, &x, top) },
		func() error { return l.environment(s, b) },
		func() error { return l.mounts(s, h, b) },
		func() error { return l.files(p, s, b) },
		func() error { return l.health(s, b) },
		func() error { return l.restart(s, b) },
		func() error { return l.networks(s, h, b) },
	}
	for _, f := range steps {
		if err := f(); err != nil {
			return nil, nil, err
		}
	}
	for _, e := range s.Expose {
		n, err := strconv.ParseUint(strings.TrimSuffix(e, "/tcp"), 10, 16)
		if err != nil {
			return nil, nil, at(l.line(s.Name, "expose"), "service %s: expose %q is not a TCP port", s.Name, e)
		}
		b.Expose = append(b.Expose, uint16(n))
	}
	for _, name := range slices.Sorted(maps.Keys(s.DependsOn)) {
		if d := s.DependsOn[name]; d.Required || p.Services[name].Name != "" {
			b.DependsOn = append(b.DependsOn, Dependency{name, d.Condition})
		}
	}
	return h, b, nil
}

func (l *composer) resources(s *types.ServiceConfig, h *Service) error {
	n := s.GetScale()
	if n < 0 || n > MaxReplicas {
		return at(l.line(s.Name, "deploy", "replicas"), "service %s: %d replicas, 0 to %d are allowed", s.Name, n, MaxReplicas)
	}
	h.Replicas = uint16(n)
	cpus, mem, pids := float64(s.CPUS), int64(s.MemLimit), s.PidsLimit
	if s.Deploy != nil {
		if s.Deploy.Mode != "" && s.Deploy.Mode != "replicated" {
			return at(l.line(s.Name, "deploy", "mode"), "service %s: deploy mode %q cannot be had: say how many replicas", s.Name, s.Deploy.Mode)
		}
		for _, r := range []*types.Resource{s.Deploy.Resources.Reservations, s.Deploy.Resources.Limits} { // a limit goes before a reservation
			if r == nil {
				continue
			}
			if len(r.Devices) > 0 || len(r.GenericResources) > 0 {
				return at(l.line(s.Name, "deploy", "resources"), "service %s: %s", s.Name, instead("devices"))
			}
			if r.NanoCPUs > 0 {
				cpus = float64(r.NanoCPUs)
			}
			if r.MemoryBytes > 0 {
				mem = int64(r.MemoryBytes)
			}
			if r.Pids > 0 {
				pids = r.Pids
			}
		}
	}
	if math.IsNaN(cpus) || cpus < 0 || cpus > MaxCPUMilli/1000 || mem < 0 || pids < 0 || pids > MaxPids {
		return at(l.line(s.Name), "service %s: resources out of range", s.Name)
	}
	if cpus > 0 {
		h.CPUMilli = uint32(max(cpus*1000, 1))
	}
	if mem > 0 {
		h.Memory = uint64(mem)
	}
	if pids > 0 {
		h.Pids = uint32(pids)
	}
	return nil
}

func (l *composer) placement(s *types.ServiceConfig, h *Service, x, top *extension) error {
	p := x.Placement
	if p == nil {
		p = top.Placement
	}
	if p != nil {
		farms, nodes := slices.Clone(p.Farms), slices.Clone(p.Nodes)
		slices.Sort(farms)
		slices.Sort(nodes)
		h.Placement = Placement{p.Spread, slices.Compact(farms), slices.Compact(nodes)}
	}
	h.Egress = len(x.Egress) > 0
	return nil
}

// ParseEgress reads "tcp://203.0.113.0/24:443", "udp://[2001:db8::]/32:53" or "tcp://[::]/0" (any port).
func ParseEgress(s string) (Egress, error) {
	bad := fmt.Errorf("egress %q: write it like tcp://203.0.113.0/24:443 or udp://[2001:db8::]/32:53", s)
	proto, rest, ok := strings.Cut(s, "://")
	if !ok || proto != "tcp" && proto != "udp" {
		return Egress{}, bad
	}
	e := Egress{Proto: proto}
	host := rest
	var tail string
	if strings.HasPrefix(rest, "[") {
		i := strings.IndexByte(rest, ']')
		if i < 0 {
			return Egress{}, bad
		}
		host, tail = rest[1:i], rest[i+1:]
	} else if i := strings.IndexAny(rest, "/:"); i >= 0 {
		host, tail = rest[:i], rest[i:]
	}
	a, err := netip.ParseAddr(host)
	if err != nil || a.Zone() != "" {
		return Egress{}, bad
	}
	bits := a.BitLen()
	if t, ok := strings.CutPrefix(tail, "/"); ok {
		num, port, _ := strings.Cut(t, ":")
		if bits, err = strconv.Atoi(num); err != nil {
			return Egress{}, bad
		}
		tail = ""
		if strings.Contains(t, ":") {
			tail = ":" + port
		}
	}
	pre, err := a.Prefix(bits)
	if err != nil {
		return Egress{}, bad
	}
	e.Prefix = pre.String()
	if t, ok := strings.CutPrefix(tail, ":"); ok {
		n, err := strconv.ParseUint(t, 10, 16)
		if err != nil || n == 0 {
			return Egress{}, bad
		}
		e.Port = uint16(n)
	} else if tail != "" {
		return Egress{}, bad
	}
	return e, nil
}

func (l *composer) environment(s *types.ServiceConfig, b *Process) error {
	env := map[string]string{}
	for _, f := range s.EnvFiles {
		raw, err := l.read(f.Path)
		if errors.Is(err, os.ErrNotExist) && !bool(f.Required) {
			continue
		} else if err != nil {
			return at(l.line(s.Name, "env_file"), "service %s: env_file: %v", s.Name, err)
		}
		vars, err := dotenv.ParseWithLookup(bytes.NewReader(raw), func(k string) (string, bool) { v, ok := l.Env[k]; return v, ok })
		if err != nil {
			return at(l.line(s.Name, "env_file"), "service %s: env_file %s: %v", s.Name, f.Path, err)
		}
		maps.Copy(env, vars)
	}
	for k, v := range s.Environment {
		if v == nil { // a name without a value takes it from the user's environment
			val, ok := l.Env[k]
			if !ok {
				continue
			}
			v = &val
		}
		env[k] = *v
	}
	for _, k := range slices.Sorted(maps.Keys(env)) {
		b.Environment = append(b.Environment, k+"="+env[k])
	}
	for _, e := range l.egressOf(s.Name) {
		x, err := ParseEgress(e.Value)
		if err != nil {
			return at(e, "service %s: %v", s.Name, err)
		}
		b.Egress = append(b.Egress, x)
	}
	return nil
}

func (l *composer) egressOf(service string) []*yaml.Node {
	n := child(child(child(child(l.root, "services"), service), "x-holdfast"), "egress")
	if n == nil {
		return nil
	}
	return n.Content
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
			return at(n, "service %s: a mount of type %q cannot be had: use a named volume, or configs for files", s.Name, v.Type)
		}
	}
	for _, t := range s.Tmpfs {
		target, opts, _ := strings.Cut(t, ":")
		m := Tmpfs{Target: path.Clean(target)}
		for o := range strings.SplitSeq(opts, ",") {
			if v, ok := strings.CutPrefix(o, "size="); ok {
				n, err := units.RAMInBytes(v)
				if err != nil || n <= 0 {
					return at(l.line(s.Name, "tmpfs"), "service %s: tmpfs size %q", s.Name, v)
				}
				m.Size = uint64(n)
			}
		}
		b.Tmpfs = append(b.Tmpfs, m)
	}
	slices.Sort(h.Volumes)
	return nil
}

// read reads a file of the project, and nothing outside it unless the user allows that.
func (l *composer) read(name string) ([]byte, error) {
	if l.OutsideFiles {
		if !filepath.IsAbs(name) {
			name = filepath.Join(l.dir, name)
		}
		return readLimited(name, MaxComposeFile)
	}
	rel := name
	if filepath.IsAbs(name) {
		abs, err := filepath.Abs(l.dir)
		if err != nil {
			return nil, err
		}
		if rel, err = filepath.Rel(abs, name); err != nil {
			return nil, err
		}
	}
	root, err := os.OpenRoot(l.dir) // no symbolic link leads out
	if err != nil {
		return nil, err
	}
	defer root.Close()
	f, err := root.Open(filepath.Clean(rel))
	if errors.Is(err, os.ErrNotExist) {
		return nil, err
	} else if err != nil {
		return nil, fmt.Errorf("%w: a file outside the Compose file's directory is sent to the grid only with --outside-files", err)
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", name)
	}
	b, err := io.ReadAll(io.LimitReader(f, MaxComposeFile+1))
	if err == nil && len(b) > MaxComposeFile {
		err = fmt.Errorf("%s has more than %d bytes", name, MaxComposeFile)
	}
	return b, err
}

func (l *composer) object(kind, name string, o types.FileObjectConfig) ([]byte, error) {
	switch {
	case o.File != "":
		return l.read(o.File)
	case o.Environment != "":
		v, ok := l.Env[o.Environment]
		if !ok {
			return nil, fmt.Errorf("%s %s takes the variable %s, which is not set", kind, name, o.Environment)
		}
		return []byte(v), nil
	case o.Content != "":
		return []byte(o.Content), nil
	}
	return nil, fmt.Errorf("%s %s has neither file nor environment nor content", kind, name)
}

func (l *composer) files(p *types.Project, s *types.ServiceConfig, b *Process) error {
	put := func(section, source, target, uid, gid string, mode *types.FileMode, o types.FileObjectConfig, ok bool, secret bool) error {
		n := l.line(s.Name, section)
		if !ok {
			return at(n, "service %s: %s %q is not there", s.Name, strings.TrimSuffix(section, "s"), source)
		}
		data, err := l.object(strings.TrimSuffix(section, "s"), source, o)
		if err != nil {
			return at(n, "service %s: %v", s.Name, err)
		}
		if target == "" {
			target = "/" + source
			if secret {
				target = "/run/secrets/" + source
			}
		} else if !path.IsAbs(target) && secret {
			target = "/run/secrets/" + target
		}
		f := File{Target: path.Clean(target), Data: data, Mode: 0o444, Secret: secret}
		if mode != nil {
			f.Mode = uint32(*mode) & 0o777
		}
		for _, id := range []struct {
			text string
			to   *uint32
		}{{uid, &f.UID}, {gid, &f.GID}} {
			if id.text == "" {
				continue
			}
			v, err := strconv.ParseUint(id.text, 10, 31)
			if err != nil {
				return at(n, "service %s: owner %q of %s is not a number", s.Name, id.text, source)
			}
			*id.to = uint32(v)
		}
		b.Files = append(b.Files, f)
		return nil
	}
	for _, c := range s.Configs {
		o, ok := p.Configs[c.Source]
		if err := put("configs", c.Source, c.Target, c.UID, c.GID, c.Mode, types.FileObjectConfig(o), ok, false); err != nil {
			return err
		}
	}
	for _, c := range s.Secrets {
		o, ok := p.Secrets[c.Source]
		if err := put("secrets", c.Source, c.Target, c.UID, c.GID, c.Mode, types.FileObjectConfig(o), ok, true); err != nil {
			return err
		}
	}
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
		from *types.Duration
		to   *time.Duration
	}{{c.Interval, &h.Interval}, {c.Timeout, &h.Timeout}, {c.StartPeriod, &h.StartPeriod}} {
		if d.from != nil {
			*d.to = time.Duration(*d.from)
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
	if s.Deploy != nil && s.Deploy.RestartPolicy != nil && r == "" {
		p := s.Deploy.RestartPolicy
		r = map[string]string{"none": "no", "on-failure": "on-failure", "any": "always", "": "always"}[p.Condition]
		if p.MaxAttempts != nil {
			b.MaxRetries = uint32(min(*p.MaxAttempts, math.MaxUint32))
		}
	}
	if n, ok := strings.CutPrefix(r, "on-failure:"); ok {
		v, err := strconv.ParseUint(n, 10, 32)
		if err != nil {
			return at(l.line(s.Name, "restart"), "service %s: restart %q", s.Name, r)
		}
		r, b.MaxRetries = "on-failure", uint32(v)
	}
	switch r {
	case "": // what is deployed is meant to run
	case "no", "always", "on-failure", "unless-stopped":
		b.Restart = r
	default:
		return at(l.line(s.Name, "restart"), "service %s: restart %q: it can be no, always, on-failure, on-failure:N or unless-stopped", s.Name, r)
	}
	return nil
}

func (l *composer) networks(s *types.ServiceConfig, h *Service, b *Process) error {
	if len(s.Networks) > 1 {
		return at(l.line(s.Name, "networks"), "service %s is on %d networks: a workload is on one; put the services that talk to each other on the same", s.Name, len(s.Networks))
	}
	for name, c := range s.Networks {
		h.Networks = []string{name}
		if c != nil {
			if c.Ipv4Address != "" || c.Ipv6Address != "" || c.MacAddress != "" {
				return at(l.line(s.Name, "networks"), "service %s: addresses derive from the contract and cannot be chosen", s.Name)
			}
			b.Aliases = slices.Clone(c.Aliases)
			slices.Sort(b.Aliases)
		}
	}
	if len(h.Networks) == 0 {
		h.Networks = []string{"default"}
	}
	return nil
}
