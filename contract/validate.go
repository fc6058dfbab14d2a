package contract

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

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

// Validate checks everything that a header says by itself.
func (h *Header) Validate() error {
	if h.Version != Version {
		return fmt.Errorf("version %d is not known, this program knows %d", h.Version, Version)
	}
	if h.Grid.IsZero() || h.Account.IsZero() {
		return errors.New("grid or account is missing")
	}
	if err := validName("contract", h.Name); err != nil {
		return err
	}
	if strings.Contains(h.Name, "_") {
		return fmt.Errorf("contract name %q is part of host names: use - instead of _", h.Name)
	}
	first := h.Revision == 1
	switch {
	case h.Revision == 0:
		return errors.New("revisions begin with 1")
	case first && (!h.Contract.IsZero() || !h.Previous.IsZero()):
		return errors.New("revision 1 has no contract and no previous revision: it makes them")
	case !first && (h.Contract.IsZero() || h.Previous.IsZero()):
		return fmt.Errorf("revision %d names no contract or no previous revision", h.Revision)
	case h.SealedSize == 0 || h.SealedSize > MaxBody+64:
		return fmt.Errorf("sealed body of %d bytes", h.SealedSize)
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
	volumes := make([]string, len(h.Volumes))
	for i, v := range h.Volumes {
		volumes[i] = v.Name
		if v.Size == 0 || v.Size > MaxVolumeSize {
			return fmt.Errorf("volume %q has %d bytes, 1 to %d are allowed", v.Name, v.Size, int64(MaxVolumeSize))
		}
	}
	if err := names("volume", volumes, MaxVolumes); err != nil {
		return err
	}
	services := make([]string, len(h.Services))
	owner := map[string]string{}
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
	}
	if err := names("service", services, MaxServices); err != nil {
		return err
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
	case len(s.Networks) > 1:
		return fmt.Errorf("it is on %d networks, one is allowed", len(s.Networks))
	}
	for kind, list := range map[string][2][]string{"network": {s.Networks, h.Networks}} {
		if err := names(kind, list[0], MaxNetworks); err != nil {
			return err
		}
		for _, n := range list[0] {
			if !slices.Contains(list[1], n) {
				return fmt.Errorf("%s %q is not there", kind, n)
			}
		}
	}
	if err := names("volume", s.Volumes, MaxVolumes); err != nil {
		return err
	}
	for _, v := range s.Volumes {
		if !slices.ContainsFunc(h.Volumes, func(x Volume) bool { return x.Name == v }) {
			return fmt.Errorf("volume %q is not there", v)
		}
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

func (p *Process) validate(h *Header, s *Service) error {
	digest := func(d string) error {
		hex, ok := strings.CutPrefix(d, "sha256:")
		if !ok || len(hex) != 64 || strings.Trim(hex, "0123456789abcdef") != "" {
			return fmt.Errorf("%q is not a sha256 digest", d)
		}
		return nil
	}
	if err := digest(p.Image.Manifest); err != nil {
		return fmt.Errorf("image: %w", err)
	}
	for _, b := range p.Image.Blobs {
		if err := digest(b.Digest); err != nil {
			return fmt.Errorf("image: %w", err)
		}
	}
	if !slices.ContainsFunc(p.Image.Blobs, func(b Blob) bool { return b.Digest == p.Image.Manifest }) {
		return errors.New("image: its manifest is not among its blobs")
	}
	target := func(t string) error {
		if !path.IsAbs(t) || path.Clean(t) != t || t == "/" || strings.ContainsRune(t, 0) {
			return fmt.Errorf("path %q is not a clean absolute path", t)
		}
		return nil
	}
	for _, m := range p.Mounts {
		if !slices.Contains(s.Volumes, m.Volume) {
			return fmt.Errorf("mount of volume %q, which the header does not give it", m.Volume)
		}
		if err := target(m.Target); err != nil {
			return err
		}
	}
	for _, t := range p.Tmpfs {
		if err := target(t.Target); err != nil {
			return err
		}
	}
	for _, f := range p.Files {
		if err := target(f.Target); err != nil {
			return err
		}
		if f.Mode&^0o777 != 0 {
			return fmt.Errorf("file %q has mode %#o", f.Target, f.Mode)
		}
	}
	for _, e := range p.Environment {
		if k, _, ok := strings.Cut(e, "="); !ok || k == "" || strings.ContainsRune(e, 0) {
			return errors.New("an environment entry is not KEY=value")
		}
	}
	for _, d := range p.DependsOn {
		if _, ok := h.Service(d.Service); !ok {
			return fmt.Errorf("it depends on %q, which is not there", d.Service)
		}
		if d.Condition != Started && d.Condition != Healthy && d.Condition != Completed {
			return fmt.Errorf("condition %q is not known", d.Condition)
		}
	}
	return nil
}

// ParseWorkloadID reads the text form of a WorkloadID.
func ParseWorkloadID(s string) (WorkloadID, error) { return identity.ParseID[workloadKind](s) }

// ParseID reads the text form of a contract's ID.
func ParseID(s string) (ID, error) { return identity.ParseID[contractKind](s) }
