package contract

import (
	"encoding/hex"
	"fmt"
	"slices"
	"strings"

	"holdfast/identity"
)

// Breach is where a contract leaves the bounds of its account's policy.
type Breach struct {
	Bound string `json:"bound"` // the bound's name in the policy: "farms", "spread", "noEgress", "routes", "registries", "signers"
	Of    string `json:"of"`    // the service, or the route's host
	Text  string `json:"text"`  // what is wrong and what to do; of a body it quotes what is sealed
}

// Names of bounds.
const (
	BoundFarms      = "farms"
	BoundSpread     = "spread"
	BoundEgress     = "noEgress"
	BoundRoutes     = "routes"
	BoundRegistries = "registries"
	BoundSigners    = "signers"
)

// Outside are the header's breaches, in its own order.
func (h *Header) Outside(b *identity.Bounds) []Breach {
	var out []Breach
	for i := range h.Services {
		s := &h.Services[i]
		add := func(bound, format string, args ...any) {
			out = append(out, Breach{bound, s.Name, fmt.Sprintf("service %s: ", s.Name) + fmt.Sprintf(format, args...)})
		}
		if len(b.Farms) > 0 {
			if len(s.Placement.Farms) == 0 {
				add(BoundFarms, "it may run on any farm, and the account's policy allows %s: add placement.farms", strings.Join(b.Farms, ", "))
			}
			for _, f := range s.Placement.Farms {
				if !slices.Contains(b.Farms, f) {
					add(BoundFarms, "farm %s is not one that the account's policy allows (%s): take it out of placement.farms", f, strings.Join(b.Farms, ", "))
				}
			}
		}
		if b.Spread && s.Replicas > 1 && s.Placement.Spread != "farm" {
			add(BoundSpread, "it has %d replicas, and the account's policy wants them on different farms: add placement.spread: farm", s.Replicas)
		}
		if b.NoEgress && s.Egress {
			add(BoundEgress, "the account's policy allows no egress: take it out")
		}
	}
	if len(b.Routes) > 0 {
		for _, r := range h.Routes {
			if !slices.ContainsFunc(b.Routes, func(d string) bool { return r.Host == d || strings.HasSuffix(r.Host, "."+d) }) {
				out = append(out, Breach{BoundRoutes, r.Host, fmt.Sprintf("route %s is not below what the account's policy allows (%s): choose another host", r.Host, strings.Join(b.Routes, ", "))})
			}
		}
	}
	return out
}

// Outside are the body's breaches, service by service. signed says whether an account's signature on an image is there.
func (b *Body) Outside(bounds *identity.Bounds, signed func(identity.AccountID, [32]byte) bool) []Breach {
	var out []Breach
	for i := range b.Services {
		out = append(out, b.Services[i].Outside(bounds, signed)...)
	}
	return out
}

// Outside are the breaches of one service. A front end has no image: it is the node's own program.
func (p *Process) Outside(b *identity.Bounds, signed func(identity.AccountID, [32]byte) bool) []Breach {
	var out []Breach
	if p.FrontEnd != nil {
		return nil
	}
	add := func(bound, format string, args ...any) {
		out = append(out, Breach{bound, p.Name, fmt.Sprintf("service %s: ", p.Name) + fmt.Sprintf(format, args...)})
	}
	if len(b.Registries) > 0 {
		repo, err := Repository(p.Image.Reference)
		switch {
		case err != nil:
			add(BoundRegistries, "%v: the account's policy allows images of %s", err, strings.Join(b.Registries, ", "))
		case !slices.ContainsFunc(b.Registries, func(r string) bool { return repo == r || strings.HasPrefix(repo, r+"/") }):
			add(BoundRegistries, "image %s is of %s, and the account's policy allows %s: push it there, or use another", p.Image.Reference, repo, strings.Join(b.Registries, ", "))
		}
	}
	if len(b.Signers) > 0 {
		digest, err := p.Image.Digest()
		for _, id := range b.Signers {
			if err != nil || !signed(id, digest) {
				add(BoundSigners, "image %s has no signature of %v, which the account's policy asks for: that account runs holdfast image sign %s", p.Image.Reference, id, p.Image.Manifest)
			}
		}
	}
	return out
}

// Digest is that of the image's manifest.
func (i *Image) Digest() ([32]byte, error) { return ParseDigest(i.Manifest) }

// ParseDigest reads "sha256:…".
func ParseDigest(s string) ([32]byte, error) {
	if err := validDigest(s); err != nil {
		return [32]byte{}, err
	}
	b, err := hex.DecodeString(s[len("sha256:"):])
	if err != nil {
		return [32]byte{}, fmt.Errorf("%q: %w", s, err)
	}
	return [32]byte(b), nil
}

// maxReference bounds an image's reference that is compared with bounds.
const maxReference = 512

// Repository is what a reference to an image names, without tag and digest: HOST[:PORT]/PATH. What every client of Docker's
// registry leaves out is put in. What it does not know for sure, it refuses.
func Repository(ref string) (string, error) {
	refuse := func(why string) (string, error) { return "", fmt.Errorf("image %q: %s", ref, why) }
	if len(ref) > maxReference {
		return "", fmt.Errorf("an image's reference of %d bytes, at most %d are allowed", len(ref), maxReference)
	}
	if strings.HasPrefix(ref, "oci:") {
		return refuse("it is a directory of whoever deployed, and of no registry")
	}
	name := ref
	if at := strings.LastIndexByte(name, '@'); at >= 0 {
		if err := validDigest(name[at+1:]); err != nil {
			return refuse("what is behind @ is no digest")
		}
		name = name[:at]
	}
	if colon := strings.LastIndexByte(name, ':'); colon > strings.LastIndexByte(name, '/') {
		if !tag(name[colon+1:]) {
			return refuse("what is behind : is no tag")
		}
		name = name[:colon]
	}
	host, path, deep := strings.Cut(name, "/")
	if !deep || !strings.ContainsAny(host, ".:") && host != "localhost" {
		host, path = "docker.io", name
	}
	host = strings.ToLower(host)
	if host == "index.docker.io" {
		host = "docker.io"
	}
	if host == "docker.io" && !strings.Contains(path, "/") {
		path = "library/" + path
	}
	if repo := host + "/" + path; identity.IsRegistry(repo) {
		return repo, nil
	}
	return refuse("it is no name of an image that registries know")
}

func tag(s string) bool {
	for i, c := range []byte(s) {
		word := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '_'
		if !word && (i == 0 || c != '.' && c != '-') {
			return false
		}
	}
	return len(s) > 0 && len(s) <= 128
}
