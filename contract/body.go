package contract

import (
	"fmt"
	"slices"
	"time"

	"holdfast/internal/canonical"
)

// Body is the sealed part of a revision: everything that a farm's owner, a validator or a gateway need not know.
type Body struct {
	Version      uint8         `cbor:"1,keyasint"`
	Services     []Process     `cbor:"2,keyasint"` // as the header's services, same order and names
	Certificates []Certificate `cbor:"3,keyasint,omitempty"`
	Source       []byte        `cbor:"4,keyasint,omitempty"` // the Compose file as it was given, for people
	Template     *Origin       `cbor:"5,keyasint,omitempty"` // that Source is, if it is one
}

// Process is how one service runs.
type Process struct {
	Name        string            `cbor:"1,keyasint"`
	Image       Image             `cbor:"2,keyasint"`
	Entrypoint  []string          `cbor:"3,keyasint,omitempty"` // nil: the image's
	Command     []string          `cbor:"4,keyasint,omitempty"` // nil: the image's, unless Entrypoint is set
	Environment []string          `cbor:"5,keyasint,omitempty"` // KEY=value, sorted by key
	WorkingDir  string            `cbor:"6,keyasint,omitempty"`
	User        string            `cbor:"7,keyasint,omitempty"`
	ReadOnly    bool              `cbor:"8,keyasint,omitempty"`
	CapAdd      []string          `cbor:"9,keyasint,omitempty"`  // without CAP_
	CapDrop     []string          `cbor:"10,keyasint,omitempty"` // or ALL
	Mounts      []Mount           `cbor:"11,keyasint,omitempty"`
	Tmpfs       []Tmpfs           `cbor:"12,keyasint,omitempty"`
	Files       []File            `cbor:"13,keyasint,omitempty"`
	Health      *Healthcheck      `cbor:"14,keyasint,omitempty"`
	DependsOn   []Dependency      `cbor:"15,keyasint,omitempty"`
	Restart     string            `cbor:"16,keyasint,omitempty"` // "always" (also ""), "on-failure", "no", "unless-stopped"
	MaxRetries  uint32            `cbor:"17,keyasint,omitempty"` // of on-failure; 0 is no limit
	StopSignal  string            `cbor:"18,keyasint,omitempty"` // "SIGTERM" (also ""), …
	StopGrace   time.Duration     `cbor:"19,keyasint,omitempty"` // 0 is 10 s
	Labels      map[string]string `cbor:"20,keyasint,omitempty"`
	Egress      []Egress          `cbor:"21,keyasint,omitempty"`
	Expose      []uint16          `cbor:"22,keyasint,omitempty"`
	Hostname    string            `cbor:"23,keyasint,omitempty"`
	Aliases     []string          `cbor:"24,keyasint,omitempty"` // further names on its networks
	FrontEnd    *FrontEnd         `cbor:"25,keyasint,omitempty"` // of the contract's store; nil: an image runs
	Buckets     []string          `cbor:"26,keyasint,omitempty"` // that it gets, in its environment
}

// Image names an OCI image by digest, and where each of its blobs lies sealed.
type Image struct {
	Reference string `cbor:"1,keyasint"` // as the user wrote it
	Manifest  string `cbor:"2,keyasint"` // "sha256:…" of the linux/amd64 manifest
	Blobs     []Blob `cbor:"3,keyasint"` // manifest, config and layers
}

// Blob is one content-addressed piece of an image, kept sealed by the grid.
type Blob struct {
	Digest string   `cbor:"1,keyasint"` // of the plaintext, "sha256:…"
	Size   uint64   `cbor:"2,keyasint"` // of the plaintext
	Sealed [32]byte `cbor:"3,keyasint"` // SHA-256 of the sealed blob: its name in the grid
	Key    [32]byte `cbor:"4,keyasint"` // opens it (package seal); used for this blob alone
}

// Mount puts a volume at a path.
type Mount struct {
	Volume   string `cbor:"1,keyasint"`
	Target   string `cbor:"2,keyasint"`
	ReadOnly bool   `cbor:"3,keyasint,omitempty"`
}

// Tmpfs is a file system in memory.
type Tmpfs struct {
	Target string `cbor:"1,keyasint"`
	Size   uint64 `cbor:"2,keyasint,omitempty"` // bytes; 0 is 64 MiB
}

// File is a config or a secret.
type File struct {
	Target string `cbor:"1,keyasint"`
	Data   []byte `cbor:"2,keyasint"`
	Mode   uint32 `cbor:"3,keyasint"`
	UID    uint32 `cbor:"4,keyasint,omitempty"`
	GID    uint32 `cbor:"5,keyasint,omitempty"`
	Secret bool   `cbor:"6,keyasint,omitempty"`
}

// Healthcheck is a command inside the sandbox: exit code 0 is healthy.
type Healthcheck struct {
	Test        []string      `cbor:"1,keyasint"` // argv; a CMD-SHELL becomes /bin/sh -c
	Interval    time.Duration `cbor:"2,keyasint,omitempty"`
	Timeout     time.Duration `cbor:"3,keyasint,omitempty"`
	StartPeriod time.Duration `cbor:"4,keyasint,omitempty"`
	Retries     uint32        `cbor:"5,keyasint,omitempty"`
}

// Conditions of a Dependency.
const (
	Started   = "service_started"
	Healthy   = "service_healthy"
	Completed = "service_completed_successfully"
)

// Dependency delays a service's start until another has reached a condition.
type Dependency struct {
	Service   string `cbor:"1,keyasint"`
	Condition string `cbor:"2,keyasint"`
}

// Egress allows a service's workloads to open connections to a part of the internet.
type Egress struct {
	Prefix string `cbor:"1,keyasint"`           // CIDR
	Proto  string `cbor:"2,keyasint"`           // "tcp" or "udp"
	Port   uint16 `cbor:"3,keyasint,omitempty"` // 0 is any
}

// Certificate is a leaf that the user's own CA issued for a route's host.
type Certificate struct {
	Host  string   `cbor:"1,keyasint"`
	Chain [][]byte `cbor:"2,keyasint"` // DER, leaf first
	Key   []byte   `cbor:"3,keyasint"` // PKCS #8 DER
}

// encode is the plaintext of a sealed body.
func (b *Body) encode() ([]byte, error) {
	plain := canonical.Encode(b)
	if len(plain) > MaxBody {
		return nil, fmt.Errorf("contract body has %d bytes, at most %d are allowed", len(plain), MaxBody)
	}
	if countItems(plain) > MaxItems {
		return nil, fmt.Errorf("contract body has more than %d entries", MaxItems)
	}
	return plain, nil
}

func decodeBody(plain []byte) (*Body, error) {
	if len(plain) <= MaxBody && countItems(plain) > MaxItems {
		return nil, fmt.Errorf("contract body has more than %d entries", MaxItems)
	}
	var b Body
	if err := canonical.Decode(plain, MaxBody, &b); err != nil {
		return nil, fmt.Errorf("contract body: %w", err)
	}
	return &b, nil
}

// countItems is the number of CBOR data items of well-formed bytes, up to one more than MaxItems. An empty map of one byte
// becomes a struct of hundreds when it is decoded, so that the length of an encoding does not bound what it takes.
func countItems(b []byte) int {
	n := 0
	for len(b) > 0 && n <= MaxItems {
		n++
		major, info := b[0]>>5, b[0]&31
		size := 0 // of the head's argument
		if info >= 24 && info <= 27 {
			size = 1 << (info - 24)
		}
		if len(b) <= size {
			return n
		}
		arg := uint64(info)
		if size > 0 {
			arg = 0
			for _, c := range b[1 : 1+size] {
				arg = arg<<8 | uint64(c)
			}
		}
		b = b[1+size:]
		if major == 2 || major == 3 { // strings: their bytes are no items
			b = b[min(arg, uint64(len(b))):]
		}
	}
	return n
}

// Validate checks that the body fits its header: the grid placed and bounded what the header says, so that a body which
// says otherwise must not start. Lists are sorted and name nothing twice, so that a plan shows all that there is.
func (b *Body) Validate(h *Header) error {
	if o := b.Template; o != nil {
		if err := o.valid(); err != nil {
			return fmt.Errorf("template: %w", err)
		}
	}
	if b.Version != Version {
		return fmt.Errorf("version %d is not known, this program knows %d", b.Version, Version)
	}
	if len(b.Services) != len(h.Services) {
		return fmt.Errorf("%d services, the header has %d", len(b.Services), len(h.Services))
	}
	for i := range b.Services {
		p, s := &b.Services[i], &h.Services[i]
		if p.Name != s.Name {
			return fmt.Errorf("service %d is %q, in the header it is %q", i, p.Name, s.Name)
		}
		if p.FrontEnd == nil {
			if err := p.Image.validate(); err != nil {
				return fmt.Errorf("service %q: image: %w", p.Name, err)
			}
		}
		if err := p.validate(h, s); err != nil {
			return fmt.Errorf("service %q: %w", p.Name, err)
		}
	}
	for i, c := range b.Certificates {
		if !slices.ContainsFunc(h.Routes, func(r Route) bool { return r.Host == c.Host }) {
			return fmt.Errorf("certificate for %q, which is no route", c.Host)
		}
		if i > 0 && b.Certificates[i-1].Host >= c.Host {
			return fmt.Errorf("certificates are not sorted by host, or %q is there twice", c.Host)
		}
		if len(c.Chain) == 0 || len(c.Key) == 0 {
			return fmt.Errorf("certificate for %q has no chain or no key", c.Host)
		}
	}
	return nil
}
