package contract

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/compose-spec/compose-go/v2/loader"
	"github.com/compose-spec/compose-go/v2/template"
	"github.com/compose-spec/compose-go/v2/types"
	"go.yaml.in/yaml/v3"
	"golang.org/x/sys/unix"
)

// Limits of a Compose file and of the files that it names.
const (
	MaxCompose     = 256 << 10
	MaxComposeFile = 1 << 20 // a secret, a config or an env_file
	maxNodes       = 50_000  // of the YAML tree, with aliases followed
	maxNesting     = 32
	maxText        = 4 << 20 // of all its texts, with aliases and variables followed
	maxLine        = 8 << 10 // of a command that is split like a shell would
)

// What a service gets that asks for nothing.
const (
	DefaultCPUMilli   = 500
	DefaultMemory     = 512 << 20
	DefaultPids       = 512
	DefaultVolumeSize = 1 << 30
	DefaultTmpfs      = 64 << 20
	DefaultInterval   = 30 * time.Second // of a healthcheck, and its time-out
	DefaultRetries    = 3
)

// Input is a Compose file.
type Input struct {
	Path         string            // of the file; its directory is the project's
	Env          map[string]string // for ${VARIABLES}; a file .env beside the Compose file stands behind it
	OutsideFiles bool              // secrets, configs and env_files may lie outside the project's directory
	Set          map[string]string // values of the file's parameters
	Template     *Origin           // the file is Raw, not at Path, and names no other; Env is not looked at
	Raw          []byte
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
	if in.Template != nil {
		l := &composer{Input: in, dir: ".", raw: in.Raw}
		l.Env, l.Path = nil, in.Template.String()
		doc, err := l.load(ctx)
		if err != nil {
			return nil, fmt.Errorf("template %s: %w", in.Template.Name+"@"+in.Template.Version, err)
		}
		return doc, nil
	}
	f, err := os.Open(in.Path)
	if err != nil {
		return nil, err
	}
	raw, err := io.ReadAll(io.LimitReader(f, MaxCompose+1))
	f.Close()
	if err != nil {
		return nil, err
	}
	if len(raw) > MaxCompose {
		return nil, fmt.Errorf("%s: more than %d bytes; texts can be files under configs and secrets", in.Path, MaxCompose)
	}
	l := &composer{Input: in, dir: filepath.Dir(in.Path), raw: raw}
	doc, err := l.load(ctx)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", in.Path, err)
	}
	return doc, nil
}

// clip shortens what an error quotes of a file.
func clip(s string) string {
	const most = 500
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "") + "…"
}

type composer struct {
	Input
	dir       string
	raw       []byte
	vars      *variables
	values    map[string]string // of the file's parameters
	root      *yaml.Node
	doc       *Document
	published []publish
	data      int // bytes of configs and secrets so far
}

// publish is an entry of "ports".
type publish struct {
	service string
	port    uint16
	node    *yaml.Node
}

func (l *composer) load(ctx context.Context) (doc *Document, err error) {
	// The parsers below are not ours; a file that makes one panic is a bad file.
	defer func() {
		if p := recover(); p != nil {
			doc, err = nil, fmt.Errorf("the file cannot be read: %v", p)
		}
	}()
	l.doc = &Document{Images: map[string]string{}}
	l.vars = &variables{env: l.Env, room: maxText, taken: map[string]bool{}, unset: map[string]int{}}
	switch raw, err := l.read(".env"); {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, errIrregular): // some keep a directory of that name
	case err != nil:
		return nil, fmt.Errorf(".env: %w", err)
	default:
		file, err := l.vars.envFile(raw)
		if err != nil {
			return nil, fmt.Errorf(".env: %w", err)
		}
		l.vars.file = file
	}
	if l.root, err = (&reader{vars: l.vars, parts: maxNodes, begin: l.parameters}).read(l.raw); err != nil {
		return nil, err
	}
	if err := l.check(); err != nil {
		return nil, err
	}
	l.doc.Name = l.projectName()
	model, err := value(l.root)
	if err != nil {
		return nil, err
	}
	dict := model.(map[string]any)
	delete(dict, "version") // says nothing since Compose v2, but compose-go would say so
	dropExtensions(dict)
	p, err := loader.LoadWithContext(ctx, types.ConfigDetails{
		WorkingDir: l.dir, ConfigFiles: []types.ConfigFile{{Filename: l.Path, Config: dict}},
	}, func(o *loader.Options) {
		o.SkipExtends, o.SkipInclude, o.SkipResolveEnvironment, o.SkipResolveLabels, o.ResolvePaths = true, true, true, true, false
		// The tree has no variables left. What stays of this step makes numbers of strings that stand for one.
		o.Interpolate.Substitute = func(s string, _ template.Mapping) (string, error) { return s, nil }
		o.SetProjectName(l.doc.Name, true)
	})
	if err != nil {
		return nil, l.locate(err)
	}
	if err := l.convert(p); err != nil {
		return nil, err
	}
	if err := l.origin(); err != nil {
		return nil, err
	}
	l.doc.Notes = append(l.doc.Notes, l.vars.notes()...)
	return l.doc, nil
}

// dropExtensions leaves out what compose-go need not look at: the authors' own keys, and ours, which is read from the tree.
func dropExtensions(dict map[string]any) {
	own := func(m map[string]any) {
		maps.DeleteFunc(m, func(k string, _ any) bool { return strings.HasPrefix(k, "x-") })
	}
	own(dict)
	for _, section := range dict {
		if all, ok := section.(map[string]any); ok {
			for _, v := range all {
				if m, ok := v.(map[string]any); ok {
					own(m)
				}
			}
		}
	}
}

// projectName is the file's own name, or its directory's.
func (l *composer) projectName() string {
	if n := child(l.root, "name"); n != nil && n.Value != "" {
		return n.Value
	}
	if abs, err := filepath.Abs(l.dir); err == nil {
		if n := strings.Trim(strings.ReplaceAll(loader.NormalizeProjectName(filepath.Base(abs)), "_", "-"), "-"); n != "" {
			return n[:min(len(n), maxName)]
		}
	}
	return "app"
}

var errIrregular = errors.New("not a regular file")

// read reads a file of the project, and nothing outside it unless the user allows that.
func (l *composer) read(name string) ([]byte, error) {
	if l.Template != nil {
		if name == ".env" {
			return nil, fs.ErrNotExist
		}
		return nil, fmt.Errorf("%s: a template is one file and names no other: put it inline, as content", name)
	}
	var f *os.File
	// Opened without waiting: a pipe has nobody at its other end.
	if l.OutsideFiles {
		if !filepath.IsAbs(name) {
			name = filepath.Join(l.dir, name)
		}
		var err error
		if f, err = os.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0); err != nil {
			return nil, err
		}
	} else {
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
		f, err = root.OpenFile(filepath.Clean(rel), os.O_RDONLY|unix.O_NONBLOCK, 0)
		var pe *fs.PathError
		if errors.As(err, &pe) && !errors.As(err, new(unix.Errno)) {
			return nil, fmt.Errorf("%s lies outside the Compose file's directory: such a file is sent to the grid only with --outside-files", name)
		} else if err != nil {
			return nil, err
		}
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil {
		return nil, err
	} else if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is %w", name, errIrregular)
	}
	b, err := io.ReadAll(io.LimitReader(f, MaxComposeFile+1))
	if err != nil {
		return nil, err
	}
	if len(b) > MaxComposeFile {
		return nil, fmt.Errorf("%s has more than %d bytes", name, MaxComposeFile)
	}
	return b, nil
}

// located are the ways in which compose-go says what an error is about: a path, or a service.
var located = regexp.MustCompile(`\b(?:services|volumes|networks|configs|secrets)[.\[][^\s:'"` + "`" + `]+|service "([^"]+)"`)

// locate puts the line to an error of compose-go.
func (l *composer) locate(err error) error {
	msg := strings.ReplaceAll(strings.TrimSpace(err.Error()), ": invalid compose project", "")
	for _, noise := range []string{"validating " + l.Path + ": ", "error while interpolating ", "decoding failed due to the following error(s):\n\n"} {
		msg = strings.TrimPrefix(msg, noise)
	}
	msg = clip(msg)
	m := located.FindStringSubmatch(msg)
	if m == nil {
		return errors.New(msg)
	}
	if m[1] != "" {
		return at(l.line(m[1]), "%s", msg)
	}
	n, path := l.root, strings.Split(strings.NewReplacer("[", ".", "]", "").Replace(m[0]), ".")
	for i := 0; i < len(path); i++ {
		if list := items(n); list != nil {
			if x, err := strconv.Atoi(path[i]); err == nil && x >= 0 && x < len(list) {
				n = list[x]
			}
			continue
		}
		for j := i; j < len(path); j++ { // a key may have dots itself
			if c := child(n, strings.Join(path[i:j+1], ".")); c != nil {
				n, i = c, j
				break
			}
		}
	}
	return at(n, "%s", msg)
}

// supported are the keys of each section; everything else is refused, since what is silently left out is a surprise.
func supported(section string) []string {
	return map[string][]string{
		"file":         {"name", "services", "volumes", "networks", "configs", "secrets", "x-holdfast"},
		"service":      {"image", "command", "entrypoint", "environment", "env_file", "expose", "ports", "volumes", "tmpfs", "configs", "secrets", "depends_on", "healthcheck", "restart", "deploy", "scale", "mem_limit", "cpus", "pids_limit", "mem_reservation", "user", "working_dir", "read_only", "cap_add", "cap_drop", "stop_grace_period", "stop_signal", "networks", "labels", "hostname", "x-holdfast"},
		"deploy":       {"replicas", "resources", "mode", "restart_policy", "update_config"},
		"update":       {"parallelism", "failure_action", "monitor", "order"},
		"resources":    {"limits", "reservations"},
		"limits":       {"cpus", "memory", "pids"},
		"policy":       {"condition", "max_attempts"},
		"healthcheck":  {"test", "interval", "timeout", "retries", "start_period", "disable"},
		"dependency":   {"condition", "required"},
		"env_file":     {"path", "required"},
		"port":         {"target", "published", "protocol", "host_ip", "mode", "name", "app_protocol"},
		"grant":        {"source", "target", "uid", "gid", "mode"},
		"member":       {"aliases"},
		"mount":        {"type", "source", "target", "read_only", "volume", "tmpfs"},
		"mount volume": {},
		"mount tmpfs":  {"size"},
		"volume":       {"driver", "x-holdfast"},
		"network":      {"driver"},
		"config":       {"file", "content", "environment"},
		"secret":       {"file", "environment"},
		"x file":       {"routes", "placement", "buckets", "storage", "approvals", "parameters"},
		"parameter":    {"type", "about", "default", "example", "choices", "pattern", "min", "max"},
		"approval":     {"need", "of", "acts"},
		"bucket":       {"versioning"},
		"x svc":        {"placement", "egress", "buckets", "deadline"},
		"x vol":        {"size", "snapshots"},
		"route":        {"host", "service", "port"},
		"place":        {"spread", "farms", "nodes"},
	}[section]
}

// noEffect are keys that change nothing here; whoever wrote them is told.
func noEffect(key string) string {
	return map[string]string{
		"version":         "Compose files have no version any more",
		"container_name":  "workloads are named by contract, service and replica",
		"init":            "the sandbox reaps processes itself",
		"pull_policy":     "images are pinned to digests when planned",
		"attach":          "holdfast logs shows what a workload writes",
		"develop":         "it is for developing only",
		"rollback_config": "a rollback replaces at once what does not work",
		"delay":           "the next one follows when the one before is ready; restarts back off by themselves",
		"window":          "restarts back off by themselves",
		"restart":         "a dependency delays the first start only",
		"labels":          "nothing reads them; labels of the service are kept",
		"name":            "what a contract uses is its own, named by its key",
		"internal":        "networks reach nothing outside; x-holdfast.egress of a service opens that",
		"attachable":      "nothing but the contract's workloads joins a network",
		"enable_ipv4":     "networks are IPv6",
		"enable_ipv6":     "networks are IPv6",
		"nocopy":          "a new volume is always empty",
	}[key]
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
		"cpu_shares":          "set cpus under deploy.resources.limits",
		"cpu_quota":           "set cpus under deploy.resources.limits",
		"cpu_period":          "set cpus under deploy.resources.limits",
		"cpuset":              "set cpus under deploy.resources.limits",
		"memswap_limit":       "a workload has no swap; set memory under deploy.resources.limits",
		"mem_swappiness":      "a workload has no swap; leave it out",
		"oom_kill_disable":    "set memory under deploy.resources.limits",
		"oom_score_adj":       "set memory under deploy.resources.limits",
		"devices":             "a workload sees no device of the machine; leave it out",
		"device_cgroup_rules": "a workload sees no device of the machine; leave it out",
		"generic_resources":   "a workload sees no device of the machine; leave it out",
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
		"dns_search":          "names resolve inside the overlay; leave it out",
		"dns_opt":             "names resolve inside the overlay; leave it out",
		"extra_hosts":         "names resolve inside the overlay; use a network alias",
		"domainname":          "set hostname",
		"mac_address":         "addresses derive from the contract and cannot be chosen; leave it out",
		"ipv4_address":        "addresses derive from the contract and cannot be chosen; leave it out",
		"ipv6_address":        "addresses derive from the contract and cannot be chosen; leave it out",
		"link_local_ips":      "addresses derive from the contract and cannot be chosen; leave it out",
		"ipam":                "addresses derive from the contract and cannot be chosen; leave it out",
		"logging":             "holdfast logs shows what a workload writes; leave it out",
		"profiles":            "write one file for each profile",
		"ulimits":             "limits are those of deploy.resources; leave it out",
		"shm_size":            "mount a tmpfs at /dev/shm with the size",
		"platform":            "nodes are linux/amd64; leave it out",
		"tty":                 "nobody can attach; leave it out",
		"stdin_open":          "nobody can attach; leave it out",
		"group_add":           "set user as uid:gid",
		"label_file":          "write labels",
		"annotations":         "write labels",
		"start_interval":      "a workload is probed often until it first answers; leave it out",
		"external":            "everything that a contract uses belongs to it; leave it out",
		"driver_opts":         "volumes and networks are holdfast's own; leave it out",
		"template_driver":     "write the file out, or use ${VARIABLES} in content",
		"subpath":             "mount the whole volume",
		"format":              "the file has KEY=value lines; leave it out",
		"placement":           "say it under x-holdfast.placement: spread, farms, nodes",
		"max_failure_ratio":   "one that fails is enough; leave it out, or set failure_action to continue",
		"endpoint_mode":       "a service name resolves to all its workloads; leave it out",
		"post_start":          "do it in the image's entrypoint",
		"pre_stop":            "do it when the stop signal comes",
		"pre_start":           "do it in the image's entrypoint, or in a service that others depend on with service_completed_successfully",
		"jobs":                "write a service with restart: \"no\"",
		"provider":            "write a service with an image",
		"models":              "write a service with an image",
	}[key]
}

// allow refuses the keys of a section that are not supported, and notes those that have no effect here.
func (l *composer) allow(n *yaml.Node, section, what string, ignored ...string) error {
	ok := supported(section)
	if strings.HasSuffix(what, "x-holdfast") || section == "place" {
		if err := shape(n, yaml.MappingNode, what); err != nil {
			return err
		}
	}
	return pairs(n, func(k, v *yaml.Node) error {
		if slices.Contains(ok, k.Value) || strings.HasPrefix(k.Value, "x-") && k.Value != "x-holdfast" {
			return nil
		}
		if slices.Contains(ignored, k.Value) {
			l.note(k, "%s: %s has no effect: %s", what, k.Value, noEffect(k.Value))
			return nil
		}
		if v.Value == "false" && slices.Contains([]string{"privileged", "tty", "stdin_open", "external", "oom_kill_disable"}, k.Value) {
			return nil
		}
		if hint := instead(k.Value); hint != "" {
			return at(k, "%s: %q cannot be had: %s", what, k.Value, hint)
		}
		if len(ok) == 0 {
			return at(k, "%s: %q is not supported: leave it out", what, k.Value)
		}
		return at(k, "%s: %q is not supported; it can have %s", what, k.Value, strings.Join(ok, ", "))
	})
}

// shape refuses a value of x-holdfast that is of another kind; an absent or empty one is none.
func shape(n *yaml.Node, kind yaml.Kind, what string) error {
	if n == nil || n.Kind == kind || n.Tag == "!!null" {
		return nil
	}
	return at(n, "%s: it must be a %s", what, map[yaml.Kind]string{yaml.SequenceNode: "list", yaml.MappingNode: "mapping"}[kind])
}

func (l *composer) note(n *yaml.Node, format string, args ...any) {
	l.doc.Notes = append(l.doc.Notes, fmt.Sprintf("line %d: %s", n.Line, fmt.Sprintf(format, args...)))
}

// check walks the file as it was written, where lines are known.
func (l *composer) check() error {
	if err := l.allow(l.root, "file", "the file", "version"); err != nil {
		return err
	}
	if n := child(l.root, "name"); n != nil {
		if err := validContractName(n.Value); err != nil {
			return at(n, "name: %v", err)
		}
	}
	x := child(l.root, "x-holdfast")
	if err := l.allow(x, "x file", "x-holdfast"); err != nil {
		return err
	}
	if err := shape(child(x, "routes"), yaml.SequenceNode, "x-holdfast.routes"); err != nil {
		return err
	}
	for _, e := range items(child(x, "routes")) {
		if err := errors.Join(shape(e, yaml.MappingNode, "x-holdfast.routes"), l.allow(e, "route", "x-holdfast.routes")); err != nil {
			return err
		}
	}
	if err := l.checkPlacement(child(x, "placement"), "x-holdfast.placement"); err != nil {
		return err
	}
	if err := errors.Join(l.checkBuckets(x), l.approvals(x)); err != nil {
		return err
	}
	for _, s := range []struct {
		section, kind string
		drivers       []string
		ignored       []string
	}{
		{"volumes", "volume", []string{"local"}, []string{"name", "labels"}},
		{"networks", "network", []string{"bridge", "overlay"}, []string{"name", "labels", "internal", "attachable", "enable_ipv4", "enable_ipv6"}},
		{"configs", "config", nil, []string{"name", "labels"}},
		{"secrets", "secret", nil, []string{"name", "labels"}},
	} {
		if err := few(child(l.root, s.section), 4*MaxServices, s.section); err != nil {
			return err
		}
		if err := pairs(child(l.root, s.section), func(k, v *yaml.Node) error {
			what := s.kind + " " + k.Value
			if s.drivers != nil {
				if err := validName(s.kind, k.Value); err != nil {
					return at(k, "%v", err)
				}
			} else if v.Kind != yaml.MappingNode {
				return at(k, "%s has neither file nor environment nor content", what)
			}
			if err := l.allow(v, s.kind, what, s.ignored...); err != nil {
				return err
			}
			if d := child(v, "driver"); d != nil && d.Value != "" && !slices.Contains(s.drivers, d.Value) {
				return at(d, "%s: the driver %q cannot be had: leave it out", what, d.Value)
			}
			return l.allow(child(v, "x-holdfast"), "x vol", what+": x-holdfast")
		}); err != nil {
			return err
		}
	}
	if err := few(child(l.root, "services"), MaxServices, "services"); err != nil {
		return err
	}
	return pairs(child(l.root, "services"), l.checkService)
}

// few refuses a section with too many entries.
func few(n *yaml.Node, most int, what string) error {
	if n != nil && n.Kind == yaml.MappingNode && len(n.Content)/2 > most {
		return at(n, "%d %s, at most %d are allowed", len(n.Content)/2, what, most)
	}
	return nil
}

func (l *composer) checkPlacement(p *yaml.Node, what string) error {
	if err := l.allow(p, "place", what); err != nil {
		return err
	}
	if s := child(p, "spread"); s != nil && s.Value != "" && s.Value != "farm" && s.Value != "node" {
		return at(s, "%s: spread %q: it can be farm or node", what, s.Value)
	}
	for _, kind := range []string{"farm", "node"} {
		list := child(p, kind+"s")
		if err := shape(list, yaml.SequenceNode, what+"."+kind+"s"); err != nil {
			return err
		}
		for _, e := range items(list) {
			if err := validName(kind, e.Value); err != nil {
				return at(e, "%s: %v", what, err)
			}
		}
	}
	return nil
}

func (l *composer) checkService(name, s *yaml.Node) error {
	what := "service " + name.Value
	if err := validName("service", name.Value); err != nil {
		return at(name, "%v", err)
	}
	if n := child(s, "network_mode"); n != nil && n.Value == "none" {
		return at(n, "%s: \"network_mode\" cannot be had: a workload reaches its own contract only; leave it out, and give the service a network of its own", what)
	}
	if err := l.allow(s, "service", what, "container_name", "init", "pull_policy", "attach", "develop"); err != nil {
		return err
	}
	for _, key := range []string{"command", "entrypoint"} {
		if n := child(s, key); n != nil && len(n.Value) > maxLine {
			return at(n, "%s: %s has %d bytes in one line: write it as a list", what, key, len(n.Value))
		}
	}
	d := child(s, "deploy")
	r := child(d, "resources")
	x := child(s, "x-holdfast")
	for _, sub := range []struct {
		n             *yaml.Node
		section, what string
		ignored       []string
	}{
		{d, "deploy", what + ": deploy", []string{"rollback_config", "labels"}},
		{child(d, "update_config"), "update", what + ": deploy.update_config", []string{"delay"}},
		{child(d, "restart_policy"), "policy", what + ": deploy.restart_policy", []string{"delay", "window"}},
		{r, "resources", what + ": deploy.resources", nil},
		{child(r, "limits"), "limits", what + ": deploy.resources.limits", nil},
		{child(r, "reservations"), "limits", what + ": deploy.resources.reservations", nil},
		{child(s, "healthcheck"), "healthcheck", what + ": healthcheck", nil},
		{x, "x svc", what + ": x-holdfast", nil},
	} {
		if err := l.allow(sub.n, sub.section, sub.what, sub.ignored...); err != nil {
			return err
		}
	}
	if err := l.checkPlacement(child(x, "placement"), what+": x-holdfast.placement"); err != nil {
		return err
	}
	for _, key := range []string{"egress", "buckets"} {
		if err := shape(child(x, key), yaml.SequenceNode, what+": x-holdfast."+key); err != nil {
			return err
		}
	}
	for _, sub := range [][2]string{{"env_file", "env_file"}, {"configs", "grant"}, {"secrets", "grant"}} {
		for _, e := range items(child(s, sub[0])) {
			if err := l.allow(e, sub[1], what+": "+sub[0]); err != nil {
				return err
			}
		}
	}
	for _, sub := range [][2]string{{"networks", "member"}, {"depends_on", "dependency"}} {
		if err := pairs(child(s, sub[0]), func(k, v *yaml.Node) error {
			return l.allow(v, sub[1], what+": "+sub[0]+" "+k.Value, "restart")
		}); err != nil {
			return err
		}
	}
	for _, m := range items(child(s, "volumes")) {
		if err := l.checkMount(what, m); err != nil {
			return err
		}
	}
	for _, e := range items(child(s, "ports")) {
		if err := l.checkPort(what, name.Value, e); err != nil {
			return err
		}
	}
	return nil
}

func (l *composer) checkMount(what string, m *yaml.Node) error {
	const useful = "use a named volume for data, and configs or secrets for files"
	if m.Kind == yaml.ScalarNode {
		src, rest, named := strings.Cut(m.Value, ":")
		if strings.HasPrefix(src, ".") || strings.HasPrefix(src, "~") || strings.HasPrefix(src, "/") && named || strings.Contains(m.Value, `\`) {
			return at(m, "%s: %q is a path of your machine, which no node sees: %s", what, m.Value, useful)
		}
		if len(src) == 1 && named { // read as the drive of a machine with Windows
			return at(m, "%s: %q: in this form the name of a volume has at least two letters", what, m.Value)
		}
		if _, mode, ok := strings.Cut(rest, ":"); ok && mode != "ro" && mode != "rw" {
			return at(m, "%s: %q: the only options of a volume are ro and rw", what, m.Value)
		}
		return nil
	}
	if t := child(m, "type"); t != nil && t.Value == "bind" {
		return at(t, "%s: a bind mount is a path of your machine, which no node sees: %s", what, useful)
	} else if t != nil && t.Value != "volume" && t.Value != "tmpfs" {
		return at(t, "%s: a mount of type %q cannot be had: %s", what, t.Value, useful)
	}
	if err := l.allow(m, "mount", what+": volumes"); err != nil {
		return err
	}
	if err := l.allow(child(m, "volume"), "mount volume", what+": volumes", "nocopy", "labels"); err != nil {
		return err
	}
	return l.allow(child(m, "tmpfs"), "mount tmpfs", what+": volumes")
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
		if err := l.allow(e, "port", what+": ports"); err != nil {
			return err
		}
		if t := child(e, "target"); t != nil {
			target = t.Value
		}
		if p := child(e, "protocol"); p != nil {
			proto = p.Value
		}
	}
	if proto != "tcp" {
		return at(e, "%s: port %s/%s cannot be had: only HTTP over TCP is reached from outside, through a gateway; leave it out", what, target, proto)
	}
	n, err := strconv.ParseUint(target, 10, 16)
	if err != nil || n == 0 {
		return at(e, "%s: port %q: name one port, and where it leads under x-holdfast.routes", what, target)
	}
	l.published = append(l.published, publish{service, uint16(n), e})
	return nil
}
