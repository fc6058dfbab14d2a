package identity

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Bounds say what an account's contracts may look like, whoever signs them. The zero value bounds nothing. The ledger holds
// headers to them; bodies, which it cannot read, are held to them by the clients of those who sign and by the nodes.
type Bounds struct {
	// Of headers.
	Farms    []string `cbor:"1,keyasint,omitempty" json:"farms,omitempty"`    // names, sorted: every service's placement lies within; none: any farm
	Spread   bool     `cbor:"2,keyasint,omitempty" json:"spread,omitempty"`   // no two replicas of a service share a farm
	NoEgress bool     `cbor:"3,keyasint,omitempty" json:"noEgress,omitempty"` // no workload opens connections to the internet
	Routes   []string `cbor:"4,keyasint,omitempty" json:"routes,omitempty"`   // domains, sorted: every route's host is one or below one; none: any host
	// Of bodies.
	Registries []string    `cbor:"5,keyasint,omitempty" json:"registries,omitempty"` // HOST[:PORT][/PATH], sorted: every image's reference lies below one; none: any
	Signers    []AccountID `cbor:"6,keyasint,omitempty" json:"signers,omitempty"`    // sorted: every image has a signature of each
}

// Limits of an account's bounds.
const (
	MaxBounds  = 64 // farms, routes, registries, of each
	MaxSigners = 8

	maxRegistry = 512
)

// IsZero reports whether nothing is bounded.
func (b Bounds) IsZero() bool {
	return len(b.Farms) == 0 && !b.Spread && !b.NoEgress && len(b.Routes) == 0 && !b.OfBodies()
}

// OfBodies reports whether something of a body is bounded.
func (b *Bounds) OfBodies() bool { return len(b.Registries) > 0 || len(b.Signers) > 0 }

// Words are the bounds for people, one a line.
func (b *Bounds) Words() []string {
	var out []string
	if len(b.Farms) > 0 {
		out = append(out, "runs only on farms "+strings.Join(b.Farms, ", "))
	}
	if b.Spread {
		out = append(out, "a service with replicas has no two on a farm")
	}
	if b.NoEgress {
		out = append(out, "no egress")
	}
	if len(b.Routes) > 0 {
		out = append(out, "routes only at or below "+strings.Join(b.Routes, ", "))
	}
	if len(b.Registries) > 0 {
		out = append(out, "images only from "+strings.Join(b.Registries, ", "))
	}
	for _, id := range b.Signers {
		out = append(out, "images only with a signature of "+id.String())
	}
	return out
}

func (b *Bounds) validate() error {
	for _, l := range []struct {
		what  string
		all   []string
		valid func(string) bool
		is    string
	}{
		{"farms", b.Farms, func(s string) bool { return len(s) <= MaxName && label(s) }, "a farm's name"},
		{"routes", b.Routes, domain, "a domain in lower case, without a dot at either end"},
		{"registries", b.Registries, IsRegistry, "HOST[:PORT][/PATH] in lower case, with a dot, a port or localhost in HOST: docker.io/library"},
	} {
		if len(l.all) > MaxBounds {
			return fmt.Errorf("bounds: %d %s, at most %d are allowed", len(l.all), l.what, MaxBounds)
		}
		for i, s := range l.all {
			if !l.valid(s) {
				return fmt.Errorf("bounds: %s: %q is not %s", l.what, s, l.is)
			}
			if i > 0 && l.all[i-1] >= s {
				return fmt.Errorf("bounds: %s are not sorted, or %q is there twice", l.what, s)
			}
		}
	}
	if len(b.Signers) > MaxSigners {
		return fmt.Errorf("bounds: %d signers, at most %d are allowed", len(b.Signers), MaxSigners)
	}
	for i, id := range b.Signers {
		if id.IsZero() {
			return errors.New("bounds: a signer is no account")
		}
		if i > 0 && bytes.Compare(b.Signers[i-1][:], id[:]) >= 0 {
			return fmt.Errorf("bounds: signers are not sorted by their bytes, or %v is there twice", id)
		}
	}
	return nil
}

// Sort puts lists into the order in which they are signed, each entry once.
func (b *Bounds) Sort() {
	for _, l := range []*[]string{&b.Farms, &b.Routes, &b.Registries} {
		slices.Sort(*l)
		*l = slices.Compact(*l)
	}
	slices.SortFunc(b.Signers, func(x, y AccountID) int { return bytes.Compare(x[:], y[:]) })
	b.Signers = slices.Compact(b.Signers)
}

// label is 1 to 63 of a-z, 0-9 and inner hyphens.
func label(s string) bool {
	for i, c := range []byte(s) {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && (c != '-' || i == 0 || i == len(s)-1) {
			return false
		}
	}
	return len(s) > 0 && len(s) <= 63
}

func domain(s string) bool {
	return len(s) <= 253 && !slices.ContainsFunc(strings.Split(s, "."), func(l string) bool { return !label(l) })
}

// IsRegistry reports whether s is HOST[:PORT][/PATH], as bounds have it and whole names of images are compared with it.
func IsRegistry(s string) bool {
	if len(s) > maxRegistry {
		return false
	}
	host, path, deep := strings.Cut(s, "/")
	name, port, ported := strings.Cut(host, ":")
	if !domain(name) || ported && !digits(port) || !ported && name != "localhost" && !strings.Contains(name, ".") {
		return false
	}
	return !deep || !slices.ContainsFunc(strings.Split(path, "/"), func(p string) bool { return !segment(p) })
}

func digits(s string) bool {
	for _, c := range []byte(s) {
		if c < '0' || c > '9' {
			return false
		}
	}
	return len(s) > 0 && len(s) <= 5
}

// segment is one of an image's path: it begins and ends with one of a-z, 0-9, and has no two dots in a row.
func segment(s string) bool {
	for i, c := range []byte(s) {
		word := c >= 'a' && c <= 'z' || c >= '0' && c <= '9'
		if !word && (i == 0 || i == len(s)-1 || c != '-' && c != '_' && c != '.') {
			return false
		}
	}
	return s != "" && !strings.Contains(s, "..")
}
