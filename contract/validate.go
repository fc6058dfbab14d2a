package contract

import (
	"errors"
	"fmt"
	"net/netip"
	"path"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"holdfast/identity"
)

// Bounds of one service.
const (
	MinMemory   = 16 << 20
	MaxMemory   = 1 << 40
	MaxCPUMilli = 1 << 20
	MaxPids     = 1 << 20
	maxName     = 63
	maxHost     = 253
)

func validName(kind, s string) error {
	if len(s) == 0 || len(s) > maxName {
		return fmt.Errorf("%s name of %d bytes, 1 to %d are allowed", kind, len(s), maxName)
	}
	for i, c := range []byte(s) {
		inner := i > 0 && i < len(s)-1
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && (!inner || (c != '-' && c != '_')) {
			return fmt.Errorf("%s name %q: only a-z, 0-9 and inner - and _ are allowed", kind, s)
		}
	}
	return nil
}

func validContractName(s string) error {
	if err := validName("contract", s); err != nil {
		return err
	}
	if strings.Contains(s, "_") {
		return fmt.Errorf("contract name %q is part of host names: use - instead of _", s)
	}
	return nil
}

func validHost(h string) error {
	if len(h) == 0 || len(h) > maxHost {
		return fmt.Errorf("host name of %d bytes, 1 to %d are allowed", len(h), maxHost)
	}
	labels := strings.Split(h, ".")
	digits := true
	for _, l := range labels {
		if len(l) == 0 || len(l) > 63 || l[0] == '-' || l[len(l)-1] == '-' {
			return fmt.Errorf("host %q is not a host name", h)
		}
		for _, c := range []byte(l) {
			if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
				return fmt.Errorf("host %q: only a-z, 0-9, hyphens and dots are allowed", h)
			}
		}
	}
	for _, c := range []byte(labels[len(labels)-1]) {
		digits = digits && c >= '0' && c <= '9'
	}
	if digits {
		return fmt.Errorf("host %q is an address, a name is needed", h)
	}
	if strings.HasSuffix(h, ".holdfast") {
		return fmt.Errorf("host %q: names under .holdfast belong to the grid", h)
	}
	return nil
}

// names checks a list of names: valid, sorted, none twice. The order is part of the encoding, so that one set of names
// has one encoding.
func names(kind string, list []string, limit int) error {
	if len(list) > limit {
		return fmt.Errorf("%d %ss, at most %d are allowed", len(list), kind, limit)
	}
	for i, s := range list {
		if err := validName(kind, s); err != nil {
			return err
		}
		if i > 0 && list[i-1] >= s {
			return fmt.Errorf("%s names are not sorted, or %q is there twice", kind, s)
		}
	}
	return nil
}

// Validate checks everything that a header says by itself. It is cheap: validators call it on whatever comes in.
func (h *Header) Validate() error {
	if h.Version != Version {
		return fmt.Errorf("version %d is not known, this program knows %d", h.Version, Version)
	}
	if h.Grid.IsZero() || h.Account.IsZero() {
		return errors.New("grid or account is missing")
	}
	if err := validContractName(h.Name); err != nil {
		return err
	}
	first := h.Revision == 1
	switch {
	case h.Revision == 0:
		return errors.New("revisions begin with 1")
	case first && (!h.Contract.IsZero() || !h.Previous.IsZero()):
		return errors.New("revision 1 has no contract and no previous revision: it makes them")
	case !first && (h.Contract.IsZero() || h.Previous.IsZero()):
		return fmt.Errorf("revision %d names no contract or no previous revision", h.Revision)
	case h.SealedSize <= overhead || h.SealedSize > MaxBody+overhead:
		return fmt.Errorf("sealed body of %d bytes, %d to %d are allowed", h.SealedSize, overhead+1, MaxBody+overhead)
	case len(h.Services) == 0 || len(h.Services) > MaxServices:
		return fmt.Errorf("%d services, 1 to %d are allowed", len(h.Services), MaxServices)
	case len(h.Volumes) > MaxVolumes:
		return fmt.Errorf("%d volumes, at most %d are allowed", len(h.Volumes), MaxVolumes)
	case len(h.Routes) > MaxRoutes:
		return fmt.Errorf("%d routes, at most %d are allowed", len(h.Routes), MaxRoutes)
	}
	if err := names("network", h.Networks, MaxNetworks); err != nil {
		return err
	}
	if err := validApprovals(h.Approvals); err != nil {
		return err
	}
	volumes := make([]string, len(h.Volumes))
	for i, v := range h.Volumes {
		volumes[i] = v.Name
		if v.Size == 0 || v.Size > MaxVolumeSize {
			return fmt.Errorf("volume %q has %d bytes, 1 to %d are allowed", v.Name, v.Size, int64(MaxVolumeSize))
		}
		if v.Store != (Store{}) {
			if err := v.Store.valid(); err != nil {
				return fmt.Errorf("volume %q: %w", v.Name, err)
			}
		}
	}
	if err := names("volume", volumes, MaxVolumes); err != nil {
		return err
	}
	services := make([]string, len(h.Services))
	owner, joined := map[string]string{}, map[string]bool{}
	total := 0
	for i := range h.Services {
		s := &h.Services[i]
		services[i] = s.Name
		total += int(s.Replicas)
		if err := s.validate(h); err != nil {
			return fmt.Errorf("service %q: %w", s.Name, err)
		}
		for _, v := range s.Volumes {
			if other, taken := owner[v]; taken {
				return fmt.Errorf("volume %q is used by services %q and %q: a volume belongs to one service", v, other, s.Name)
			}
			owner[v] = s.Name
		}
		joined[s.Networks[0]] = true
	}
	for _, v := range volumes {
		if owner[v] == "" {
			return fmt.Errorf("volume %q is used by no service", v)
		}
	}
	for _, n := range h.Networks {
		if !joined[n] {
			return fmt.Errorf("network %q is used by no service", n)
		}
	}
	if err := names("service", services, MaxServices); err != nil {
		return err
	}
	if h.Store != (Store{}) {
		if err := h.Store.validate(h); err != nil {
			return err
		}
	}
	if total > MaxWorkloads {
		return fmt.Errorf("%d replicas in all, at most %d are allowed", total, MaxWorkloads)
	}
	for i, r := range h.Routes {
		if err := validHost(r.Host); err != nil {
			return err
		}
		if i > 0 && h.Routes[i-1].Host >= r.Host {
			return fmt.Errorf("routes are not sorted by host, or %q is there twice", r.Host)
		}
		if !slices.Contains(services, r.Service) {
			return fmt.Errorf("route %q leads to service %q, which is not there", r.Host, r.Service)
		}
		if r.Port == 0 {
			return fmt.Errorf("route %q has no port", r.Host)
		}
	}
	return nil
}

func (s *Service) validate(h *Header) error {
	if err := validName("service", s.Name); err != nil {
		return err
	}
	switch {
	case s.Replicas > MaxReplicas:
		return fmt.Errorf("%d replicas, at most %d are allowed", s.Replicas, MaxReplicas)
	case s.Memory < MinMemory || s.Memory > MaxMemory:
		return fmt.Errorf("memory of %d bytes, %d to %d are allowed", s.Memory, MinMemory, int64(MaxMemory))
	case s.CPUMilli == 0 || s.CPUMilli > MaxCPUMilli:
		return fmt.Errorf("%d thousandths of a core, 1 to %d are allowed", s.CPUMilli, MaxCPUMilli)
	case s.Pids == 0 || s.Pids > MaxPids:
		return fmt.Errorf("%d processes, 1 to %d are allowed", s.Pids, MaxPids)
	case len(s.Volumes) > 0 && s.Replicas > 1:
		return fmt.Errorf("it has a volume and %d replicas: a volume belongs to one replica", s.Replicas)
	case len(s.Networks) != 1:
		return fmt.Errorf("it is on %d networks, exactly one is needed", len(s.Networks))
	case !slices.Contains(h.Networks, s.Networks[0]):
		return fmt.Errorf("network %q is not there", s.Networks[0])
	}
	if err := names("volume", s.Volumes, MaxVolumes); err != nil {
		return err
	}
	for _, v := range s.Volumes {
		if !slices.ContainsFunc(h.Volumes, func(x Volume) bool { return x.Name == v }) {
			return fmt.Errorf("volume %q is not there", v)
		}
	}
	switch u := &s.Update; {
	case u.Parallel > MaxReplicas:
		return fmt.Errorf("%d replicas updated at a time, up to %d are allowed", u.Parallel, MaxReplicas)
	case u.Action != "" && u.Action != OnFailurePause && u.Action != OnFailureContinue:
		return fmt.Errorf("failure action %q: pause or continue, or nothing for a rollback", u.Action)
	case max(u.Monitor, u.Deadline) > uint32(maxUpdateTime/time.Second):
		return fmt.Errorf("an update that takes %v, up to %v are allowed", time.Duration(max(u.Monitor, u.Deadline))*time.Second, maxUpdateTime)
	}
	p := &s.Placement
	if p.Spread != "" && p.Spread != "farm" && p.Spread != "node" {
		return fmt.Errorf("spread %q: farm or node", p.Spread)
	}
	if err := names("farm", p.Farms, MaxConstraints); err != nil {
		return err
	}
	return names("node", p.Nodes, MaxConstraints)
}

// sorted checks that a list has each entry once, in order, so that one set has one encoding and a plan shows all of it.
func sorted[T any](kind string, list []T, key func(T) string) error {
	for i := range list {
		if i > 0 && key(list[i-1]) >= key(list[i]) {
			return fmt.Errorf("%s entries are not sorted, or %q is there twice", kind, key(list[i]))
		}
	}
	return nil
}

func itself(s string) string { return s }

// text refuses what no argument of a process, or no encoding, can hold.
func text(kind string, list ...string) error {
	for _, s := range list {
		if strings.ContainsRune(s, 0) {
			return fmt.Errorf("%s holds a zero byte", kind)
		}
		if !utf8.ValidString(s) {
			return fmt.Errorf("%s is not UTF-8 text", kind)
		}
	}
	return nil
}

func validDigest(d string) error {
	hex, ok := strings.CutPrefix(d, "sha256:")
	if !ok || len(hex) != 64 || strings.Trim(hex, "0123456789abcdef") != "" {
		return fmt.Errorf("%q is not a sha256 digest", d)
	}
	return nil
}

func (i *Image) validate() error {
	if err := validDigest(i.Manifest); err != nil {
		return err
	}
	have := map[string]bool{}
	for _, b := range i.Blobs {
		if err := validDigest(b.Digest); err != nil {
			return err
		}
		if have[b.Digest] {
			return fmt.Errorf("blob %s is there twice", b.Digest)
		}
		have[b.Digest] = true
	}
	if !have[i.Manifest] {
		return errors.New("its manifest is not among its blobs")
	}
	return nil
}

// validTarget says where a mount may lie: not over what the node itself puts into every sandbox.
func validTarget(t string) error {
	switch {
	case !path.IsAbs(t) || path.Clean(t) != t || t == "/" || text("", t) != nil:
		return fmt.Errorf("path %q is not a clean absolute path", t)
	case t == "/etc/hosts" || t == "/etc/resolv.conf" || t == "/etc/hostname":
		return fmt.Errorf("%s is written by the node", t)
	}
	for _, d := range []string{"/proc", "/sys", "/dev"} {
		if (t == d || strings.HasPrefix(t, d+"/")) && t != "/dev/shm" {
			return fmt.Errorf("nothing can be mounted at %s: %s is the sandbox's own", t, d)
		}
	}
	return nil
}

// validCap accepts the capabilities that mean something in a sandbox (package sandbox has the same list), named without
// CAP_.
func validCap(c string, drop bool) error {
	switch c {
	case "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "NET_BIND_SERVICE", "SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT",
		"NET_RAW", "NET_ADMIN", "MKNOD", "SYS_PTRACE", "SYS_NICE", "SYS_ADMIN", "SYS_TIME", "SYS_RESOURCE", "AUDIT_WRITE", "IPC_LOCK",
		"LEASE", "DAC_READ_SEARCH", "LINUX_IMMUTABLE":
		return nil
	case "ALL":
		if !drop {
			return errors.New("capability ALL cannot be added: name those that are needed")
		}
		return nil
	}
	return fmt.Errorf("capability %q is not known in a sandbox", c)
}

// validSignal accepts what ends a process or tells it something.
func validSignal(s string) error {
	switch s {
	case "", "SIGTERM", "SIGINT", "SIGQUIT", "SIGKILL", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGWINCH", "SIGABRT", "SIGALRM", "SIGPWR":
		return nil
	}
	return fmt.Errorf("stop signal %q is not known: write a name like SIGTERM, SIGINT or SIGQUIT", s)
}

// Bounds of times in a body.
const (
	maxGrace    = time.Hour
	maxInterval = 24 * time.Hour
)

// validate checks everything of a process but its image.
func (p *Process) validate(h *Header, s *Service) error {
	if (len(p.Egress) > 0) != s.Egress {
		return errors.New("egress in body and header differ")
	}
	if err := p.validateFrontEnd(h); err != nil {
		return err
	}
	if len(p.Buckets) > MaxBuckets || len(p.Buckets) > 0 && (h.Store == Store{} || p.FrontEnd != nil) {
		return errors.New("it has buckets, and the contract has no store for them")
	}
	if err := sorted("bucket", p.Buckets, itself); err != nil {
		return err
	}
	if err := errors.Join(
		text("entrypoint", p.Entrypoint...), text("command", p.Command...), text("user", p.User), text("image", p.Image.Reference), text("environment", p.Environment...),
		sorted("capability", p.CapAdd, itself), sorted("capability", p.CapDrop, itself), validSignal(p.StopSignal),
	); err != nil {
		return err
	}
	for _, e := range p.Environment {
		if k, _, ok := strings.Cut(e, "="); !ok || k == "" {
			return errors.New("an environment entry is not KEY=value")
		}
	}
	if err := sorted("environment", p.Environment, func(e string) string { k, _, _ := strings.Cut(e, "="); return k }); err != nil {
		return err
	}
	if w := p.WorkingDir; w != "" && (!path.IsAbs(w) || path.Clean(w) != w || text("", w) != nil) {
		return fmt.Errorf("working directory %q is not a clean absolute path", w)
	}
	for k, v := range p.Labels {
		if err := text("label", k, v); err != nil {
			return err
		}
	}
	for _, c := range p.CapAdd {
		if err := validCap(c, false); err != nil {
			return err
		}
	}
	for _, c := range p.CapDrop {
		if err := validCap(c, true); err != nil {
			return err
		}
	}
	if err := p.validateMounts(s); err != nil {
		return err
	}
	if c := p.Health; c != nil {
		if len(c.Test) == 0 {
			return errors.New("healthcheck has no command")
		}
		if err := text("healthcheck", c.Test...); err != nil {
			return err
		}
		for _, d := range []time.Duration{c.Interval, c.Timeout, c.StartPeriod} {
			if d < 0 || d > maxInterval {
				return fmt.Errorf("healthcheck time of %v, 0 to %v are allowed", d, maxInterval)
			}
		}
	}
	for _, d := range p.DependsOn {
		if _, ok := h.Service(d.Service); !ok || d.Service == p.Name {
			return fmt.Errorf("it depends on %q, which is not there", d.Service)
		}
		if d.Condition != Started && d.Condition != Healthy && d.Condition != Completed {
			return fmt.Errorf("condition %q is not known", d.Condition)
		}
	}
	if err := sorted("dependency", p.DependsOn, func(d Dependency) string { return d.Service }); err != nil {
		return err
	}
	switch p.Restart {
	case "", "always", "on-failure", "no", "unless-stopped":
	default:
		return fmt.Errorf("restart %q: it can be no, always, on-failure or unless-stopped", p.Restart)
	}
	if p.MaxRetries > 0 && p.Restart != "on-failure" {
		return fmt.Errorf("restart %q with a number of retries: only on-failure has one", p.Restart)
	}
	if p.StopGrace < 0 || p.StopGrace > maxGrace {
		return fmt.Errorf("stop grace of %v, 0 to %v are allowed", p.StopGrace, maxGrace)
	}
	for _, e := range p.Egress {
		pre, err := netip.ParsePrefix(e.Prefix)
		if err != nil || pre.Masked().String() != e.Prefix || pre.Addr().Is4In6() || e.Proto != "tcp" && e.Proto != "udp" {
			return fmt.Errorf("egress %s %q is not a protocol and a prefix", e.Proto, e.Prefix)
		}
	}
	if err := sorted("egress", p.Egress, Egress.String); err != nil {
		return err
	}
	for i, x := range p.Expose {
		if x == 0 || i > 0 && p.Expose[i-1] >= x {
			return errors.New("exposed ports are not sorted, or one is there twice or 0")
		}
	}
	if p.Hostname != "" {
		if err := validAlias(p.Hostname); err != nil {
			return err
		}
	}
	for _, a := range p.Aliases {
		if err := validAlias(a); err != nil {
			return err
		}
	}
	return sorted("alias", p.Aliases, itself)
}

// validAlias accepts what can be resolved inside a network: a name like a service's, or a host name.
func validAlias(a string) error {
	if validName("alias", a) == nil {
		return nil
	}
	return validHost(a)
}

func (p *Process) validateMounts(s *Service) error {
	if n := len(p.Mounts) + len(p.Tmpfs) + len(p.Files); n > MaxMounts {
		return fmt.Errorf("%d volumes, tmpfs, configs and secrets, at most %d are allowed", n, MaxMounts)
	}
	taken := map[string]bool{}
	target := func(t string) error {
		if taken[t] {
			return fmt.Errorf("two things are mounted at %s", t)
		}
		taken[t] = true
		return validTarget(t)
	}
	mounted := map[string]bool{}
	for _, m := range p.Mounts {
		if !slices.Contains(s.Volumes, m.Volume) {
			return fmt.Errorf("mount of volume %q, which the header does not give it", m.Volume)
		}
		mounted[m.Volume] = true
		if err := target(m.Target); err != nil {
			return err
		}
	}
	for _, v := range s.Volumes {
		if !mounted[v] {
			return fmt.Errorf("volume %q is not mounted", v)
		}
	}
	for _, t := range p.Tmpfs {
		if err := target(t.Target); err != nil {
			return err
		}
		if t.Size > MaxMemory {
			return fmt.Errorf("tmpfs %s of %d bytes, at most %d are allowed", t.Target, t.Size, int64(MaxMemory))
		}
	}
	for _, f := range p.Files {
		if err := target(f.Target); err != nil {
			return err
		}
		if f.Mode&^0o777 != 0 {
			return fmt.Errorf("file %s has mode %#o", f.Target, f.Mode)
		}
	}
	return errors.Join(
		sorted("volume", p.Mounts, func(m Mount) string { return m.Target }),
		sorted("tmpfs", p.Tmpfs, func(t Tmpfs) string { return t.Target }),
		sorted("file", p.Files, func(f File) string { return f.Target }),
	)
}

// ParseWorkloadID reads the text form of a WorkloadID.
func ParseWorkloadID(s string) (WorkloadID, error) { return identity.ParseID[workloadKind](s) }

// ParseID reads the text form of a contract's ID.
func ParseID(s string) (ID, error) { return identity.ParseID[contractKind](s) }
