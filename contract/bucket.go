package contract

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	units "github.com/docker/go-units"
	"go.yaml.in/yaml/v3"
)

// A contract with buckets has one service more, which no image makes: the front end of its store. Its name in the contract's
// network is that of the service, and it speaks S3 on PortS3.
const (
	FrontEndService = "s3"
	PortS3          = 9000
)

// A contract's store is dispersed StoreK of StoreN, one shard a farm.
const (
	StoreK = 4
	StoreN = 6
)

// Limits of a contract's store, and what it gets that asks for nothing.
const (
	MaxBuckets     = 32
	MaxStore       = 1 << 50
	MinStore       = 256 << 20 // a snapshot of the log, and the log until the next one
	DefaultStore   = 1 << 30
	maxFrontKeys   = 64 << 10
	frontCPUMilli  = 500
	frontEndMemory = 512 << 20
)

// Store is what the grid must know of a contract's dispersed store, so that locations keep it: who may use it and how much
// it takes. Both pins are SHA-256 of the SubjectPublicKeyInfo of a key.
type Store struct {
	FrontEnd [32]byte `cbor:"1,keyasint" json:"-"`     // reads, writes and deletes
	Recovery [32]byte `cbor:"2,keyasint" json:"-"`     // undoes deletes; only the account has its key
	Limit    uint64   `cbor:"3,keyasint" json:"limit"` // bytes on one location
}

// FrontEnd is how the front end of the contract's store runs. It is of a Process without an image.
type FrontEnd struct {
	Store   [32]byte `cbor:"1,keyasint"` // the store's root derives from the account's and from this, which is random
	Keys    []byte   `cbor:"2,keyasint"` // of the front end (package store), which derive from that root
	Access  string   `cbor:"3,keyasint"` // of the services that name a bucket
	Secret  string   `cbor:"4,keyasint"`
	Buckets []Bucket `cbor:"5,keyasint"` // sorted by name
}

// Bucket is one that the front end makes when it is not there.
type Bucket struct {
	Name       string `cbor:"1,keyasint"`
	Versioning bool   `cbor:"2,keyasint,omitempty"`
}

func (s *Store) valid() error {
	switch {
	case s.FrontEnd == [32]byte{} || s.Recovery == [32]byte{} || s.FrontEnd == s.Recovery:
		return errors.New("store: a key is missing, or one is for both uses")
	case s.Limit < MinStore || s.Limit > MaxStore:
		return fmt.Errorf("store: %d bytes on a location, %d to %d are allowed", s.Limit, MinStore, int64(MaxStore))
	}
	return nil
}

func (s *Store) validate(h *Header) error {
	if err := s.valid(); err != nil {
		return err
	}
	switch f, ok := h.Service(FrontEndService); {
	case !ok:
		return fmt.Errorf("store: there is no service %q, its front end", FrontEndService)
	case f.Replicas != 1 || len(f.Volumes) > 0 || f.Egress:
		return fmt.Errorf("store: its front end has one replica, no volume and no egress")
	}
	return nil
}

func validBucket(name string) error {
	if err := validName("bucket", name); err != nil {
		return err
	}
	if len(name) < 3 || strings.Contains(name, "_") || strings.HasPrefix(name, "xn--") {
		return fmt.Errorf("bucket name %q: 3 to %d of a-z, 0-9 and inner - are allowed", name, maxName)
	}
	return nil
}

func (f *FrontEnd) validate() error {
	if f.Store == [32]byte{} || len(f.Keys) == 0 || len(f.Keys) > maxFrontKeys {
		return errors.New("its store's keys are missing")
	}
	for _, s := range []string{f.Access, f.Secret} {
		if len(s) < 16 || len(s) > 64 || strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' }) {
			return errors.New("its access key or secret is not 16 to 64 printable characters")
		}
	}
	if len(f.Buckets) == 0 || len(f.Buckets) > MaxBuckets {
		return fmt.Errorf("%d buckets, 1 to %d are allowed", len(f.Buckets), MaxBuckets)
	}
	for _, b := range f.Buckets {
		if err := validBucket(b.Name); err != nil {
			return err
		}
	}
	return sorted("bucket", f.Buckets, func(b Bucket) string { return b.Name })
}

// validateFrontEnd checks that p is the front end of the store exactly if the header says so, and that it is nothing else.
func (p *Process) validateFrontEnd(h *Header) error {
	if isFront := h.Store != (Store{}) && p.Name == FrontEndService; isFront != (p.FrontEnd != nil) {
		return errors.New("body and header differ in whether it is the front end of a store")
	}
	if p.FrontEnd == nil {
		return nil
	}
	if len(p.Image.Blobs) > 0 || p.Image.Manifest != "" || p.Entrypoint != nil || p.Command != nil || len(p.Mounts)+len(p.Tmpfs)+len(p.Files) > 0 || len(p.DependsOn) > 0 || len(p.Environment) > 0 {
		return errors.New("the front end of a store is the grid's own program, and has no image and nothing of one")
	}
	return p.FrontEnd.validate()
}

// FrontEnd is the contract's, or nil.
func (b *Body) FrontEnd() *FrontEnd {
	for i := range b.Services {
		if f := b.Services[i].FrontEnd; f != nil {
			return f
		}
	}
	return nil
}

// reserved says whether a service that has buckets gets the variable from the grid.
func reserved(name string) bool {
	switch name {
	case "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_REGION":
		return true
	}
	return strings.HasPrefix(name, "HOLDFAST_BUCKET_")
}

// Bind gives a document with buckets the keys of its store: those of the revision before, or new ones. Services that name a
// bucket get them as their environment.
func (d *Document) Bind(s Store, f FrontEnd) {
	s.Limit = d.Header.Store.Limit
	d.Header.Store = s
	for i := range d.Body.Services {
		p := &d.Body.Services[i]
		if p.FrontEnd != nil {
			f.Buckets = p.FrontEnd.Buckets
			p.FrontEnd = &f
		}
		if len(p.Buckets) == 0 {
			continue
		}
		env := slices.DeleteFunc(slices.Clone(p.Environment), func(e string) bool { k, _, _ := strings.Cut(e, "="); return reserved(k) })
		env = append(env,
			"AWS_ACCESS_KEY_ID="+f.Access, "AWS_SECRET_ACCESS_KEY="+f.Secret, "AWS_REGION=us-east-1",
			fmt.Sprintf("AWS_ENDPOINT_URL_S3=http://%s:%d", FrontEndService, PortS3),
		)
		for _, b := range p.Buckets {
			env = append(env, "HOLDFAST_BUCKET_"+strings.ToUpper(strings.ReplaceAll(b, "-", "_"))+"="+b)
		}
		slices.SortFunc(env, func(a, b string) int {
			x, _, _ := strings.Cut(a, "=")
			y, _, _ := strings.Cut(b, "=")
			return strings.Compare(x, y)
		})
		p.Environment = env
	}
}

// checkBuckets walks x-holdfast.buckets and storage at the top of the file.
func (l *composer) checkBuckets(x *yaml.Node) error {
	all := child(x, "buckets")
	if err := shape(all, yaml.MappingNode, "x-holdfast.buckets"); err != nil {
		return err
	}
	if err := few(all, MaxBuckets, "buckets"); err != nil {
		return err
	}
	if n := child(x, "storage"); n != nil && (all == nil || len(all.Content) == 0) {
		return at(n, "x-holdfast.storage is of buckets, and there are none: name them under x-holdfast.buckets")
	}
	return pairs(all, func(k, v *yaml.Node) error {
		if err := validBucket(k.Value); err != nil {
			return at(k, "%v", err)
		}
		what := "bucket " + k.Value
		if err := shape(v, yaml.MappingNode, what); err != nil {
			return err
		}
		if err := l.allow(v, "bucket", what); err != nil {
			return err
		}
		if n := child(v, "versioning"); n != nil && n.Value != "true" && n.Value != "false" {
			return at(n, "%s: versioning is true or false", what)
		}
		return nil
	})
}

// buckets adds the front end to a contract that has buckets.
func (l *composer) buckets(top *extension) error {
	x := child(l.root, "x-holdfast")
	declared := map[string]Bucket{}
	if err := pairs(child(x, "buckets"), func(k, v *yaml.Node) error {
		n := child(v, "versioning")
		declared[k.Value] = Bucket{k.Value, n != nil && n.Value == "true"}
		return nil
	}); err != nil {
		return err
	}
	h, b := &l.doc.Header, &l.doc.Body
	network, first := "", ""
	used := map[string]bool{}
	for i := range h.Services {
		s, p := &h.Services[i], &b.Services[i]
		list := child(l.line(s.Name, "x-holdfast"), "buckets")
		for _, n := range items(list) {
			if _, ok := declared[n.Value]; !ok {
				return at(n, "service %s: bucket %q is not there: name it under x-holdfast.buckets at the top of the file", s.Name, n.Value)
			}
			p.Buckets = append(p.Buckets, n.Value)
			used[n.Value] = true
		}
		slices.Sort(p.Buckets)
		p.Buckets = slices.Compact(p.Buckets)
		if len(declared) > 0 {
			if s.Name == FrontEndService {
				return at(l.line(s.Name), "service %s: that is the name of the contract's buckets: give the service another", s.Name)
			}
			if slices.Contains(p.Aliases, FrontEndService) {
				return at(l.line(s.Name, "networks"), "service %s: the alias %s is the name of the contract's buckets: leave it out", s.Name, FrontEndService)
			}
		}
		if len(p.Buckets) == 0 {
			continue
		}
		if first != "" && network != s.Networks[0] {
			return at(l.line(s.Name, "networks"), "services %s and %s have buckets and are on two networks, %s and %s: put them on one", first, s.Name, network, s.Networks[0])
		}
		network, first = s.Networks[0], s.Name
		for _, e := range p.Environment {
			if k, _, _ := strings.Cut(e, "="); reserved(k) {
				return at(l.line(s.Name, "environment"), "service %s: environment: %s comes with x-holdfast.buckets: leave it out", s.Name, k)
			}
		}
		if !slices.ContainsFunc(p.DependsOn, func(d Dependency) bool { return d.Service == FrontEndService }) {
			p.DependsOn = append(p.DependsOn, Dependency{FrontEndService, Healthy})
			slices.SortFunc(p.DependsOn, func(a, b Dependency) int { return strings.Compare(a.Service, b.Service) })
		}
	}
	if len(declared) == 0 {
		return nil
	}
	if first == "" {
		return at(child(x, "buckets"), "no service has a bucket: name them under x-holdfast.buckets of those that use them")
	}
	f := &FrontEnd{}
	for _, name := range slices.Sorted(maps.Keys(declared)) {
		if !used[name] {
			l.doc.Notes = append(l.doc.Notes, fmt.Sprintf("bucket %s is used by no service", name))
		}
		f.Buckets = append(f.Buckets, declared[name])
	}
	h.Store.Limit = DefaultStore
	if n := child(x, "storage"); n != nil {
		size, err := units.RAMInBytes(n.Value)
		if err != nil || size < MinStore || size > MaxStore {
			return at(n, "x-holdfast.storage %q: write what a location keeps at most like 4GiB, at least %s", n.Value, units.BytesSize(MinStore))
		}
		h.Store.Limit = uint64(size)
	}
	s := Service{Name: FrontEndService, Replicas: 1, CPUMilli: frontCPUMilli, Memory: frontEndMemory, Pids: DefaultPids, Networks: []string{network}}
	if err := l.placement(&s, &extension{}, top); err != nil {
		return err
	}
	h.Services = append(h.Services, s)
	slices.SortFunc(h.Services, func(a, b Service) int { return strings.Compare(a.Name, b.Name) })
	// The node asks it itself. A store that is taken over needs time.
	health := &Healthcheck{Test: []string{"GET", "/"}, Interval: 10 * time.Second, Timeout: 10 * time.Second, StartPeriod: time.Hour}
	b.Services = append(b.Services, Process{Name: FrontEndService, FrontEnd: f, Restart: "always", Health: health})
	slices.SortFunc(b.Services, func(a, b Process) int { return strings.Compare(a.Name, b.Name) })
	return nil
}
