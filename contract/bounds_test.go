package contract

import (
	"slices"
	"strings"
	"testing"

	"holdfast/identity"
)

func TestRepository(t *testing.T) {
	digest := "@sha256:" + strings.Repeat("0a", 32)
	for ref, want := range map[string]string{
		"nginx":                                 "docker.io/library/nginx",
		"nginx:1.27":                            "docker.io/library/nginx",
		"nginx" + digest:                        "docker.io/library/nginx",
		"index.docker.io/library/nginx":         "docker.io/library/nginx",
		"docker.io/nginx":                       "docker.io/library/nginx",
		"team/app":                              "docker.io/team/app",
		"localhost/app":                         "localhost/app",
		"localhost:5000/app:1" + digest:         "localhost:5000/app",
		"Registry.Example.com/a/b_c/d.e-f":      "registry.example.com/a/b_c/d.e-f",
		"registry.example.com:443/app":          "registry.example.com:443/app",
		"registry.example.com.evil/app":         "registry.example.com.evil/app",
		"":                                      "",
		"oci:app":                               "",
		"registry.example.com/../evil/app":      "",
		"registry.example.com/./app":            "",
		"registry.example.com//app":             "",
		"registry.example.com/app/":             "",
		"registry.example.com@evil.example/app": "",
		"evil.example/app@registry.example.com": "",
		"registry.example.com/App":              "",
		"registry.example.com\x00.evil/app":     "",
		"registry.example.com\t/app":            "",
		"registry.example.com%2f/app":           "",
		"https://registry.example.com/app":      "",
		"registry.example.com:/app":             "",
		"nginx:":                                "",
		"nginx:a b":                             "",
		"nginx@sha256:00":                       "",
		"registry.example.com/" + strings.Repeat("a/", 256) + "a": "",
	} {
		got, err := Repository(ref)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%.80q: %q, %v, want %q", ref, got, err, want)
		}
	}
}

// Whatever a reference is, it is below a registry by whole segments or not at all.
func FuzzRepository(f *testing.F) {
	for _, s := range []string{"nginx", "registry.example.com/team/app:1", "registry.example.com.evil/team", "a.b/../c", "oci:x", "x@sha256:" + strings.Repeat("0", 64)} {
		f.Add(s)
	}
	b := &identity.Bounds{Registries: []string{"registry.example.com/team"}}
	f.Fuzz(func(t *testing.T, ref string) {
		p := &Process{Name: "web", Image: Image{Reference: ref}}
		repo, err := Repository(ref)
		inside := len(p.Outside(b, nil)) == 0
		parts := strings.Split(repo, "/")
		if err != nil && inside || inside != (len(parts) >= 2 && parts[0] == "registry.example.com" && parts[1] == "team") {
			t.Fatalf("%q is %q, %v: inside %v", ref, repo, err, inside)
		}
		if err == nil && (strings.Contains(repo, "..") || slices.Contains(parts, "") || len(parts) < 2) {
			t.Fatalf("%q is %q", ref, repo)
		}
	})
}

func TestOutsideOfBounds(t *testing.T) {
	a, c := identity.AccountID{1}, identity.AccountID{2}
	header := func(f func(*Header)) *Header {
		h := &Header{
			Services: []Service{{Name: "web", Replicas: 2, Placement: Placement{Spread: "farm", Farms: []string{"north"}}}, {Name: "db", Replicas: 1, Placement: Placement{Farms: []string{"south", "north"}}}},
			Routes:   []Route{{Host: "shop.example.com", Service: "web"}},
		}
		f(h)
		return h
	}
	all := &identity.Bounds{Farms: []string{"north", "south"}, Spread: true, NoEgress: true, Routes: []string{"example.com"}}
	for _, tc := range []struct {
		name string
		f    func(*Header)
		want []string
	}{
		{"within", func(*Header) {}, nil},
		{"no placement", func(h *Header) { h.Services[1].Placement.Farms = nil }, []string{BoundFarms}},
		{"another farm beside", func(h *Header) { h.Services[1].Placement.Farms = []string{"north", "evil"} }, []string{BoundFarms}},
		{"a node of any farm", func(h *Header) { h.Services[1].Placement = Placement{Nodes: []string{"node-1"}} }, []string{BoundFarms}},
		{"not spread", func(h *Header) { h.Services[0].Placement.Spread = "node" }, []string{BoundSpread}},
		{"egress", func(h *Header) { h.Services[1].Egress = true }, []string{BoundEgress}},
		{"the domain itself", func(h *Header) { h.Routes[0].Host = "example.com" }, nil},
		{"a host that only ends like it", func(h *Header) { h.Routes[0].Host = "evilexample.com" }, []string{BoundRoutes}},
		{"a host that begins like it", func(h *Header) { h.Routes[0].Host = "example.com.evil" }, []string{BoundRoutes}},
		{"all at once", func(h *Header) {
			h.Services[0] = Service{Name: "web", Replicas: 2, Egress: true}
			h.Routes[0].Host = "x.localhost"
		}, []string{BoundFarms, BoundSpread, BoundEgress, BoundRoutes}},
	} {
		var got []string
		for _, x := range header(tc.f).Outside(all) {
			got = append(got, x.Bound)
			if x.Text == "" || x.Of == "" {
				t.Errorf("%s: %+v", tc.name, x)
			}
		}
		if !slices.Equal(got, tc.want) {
			t.Errorf("%s: %v, want %v", tc.name, got, tc.want)
		}
		if got := header(tc.f).Outside(&identity.Bounds{}); got != nil {
			t.Errorf("%s: without bounds: %v", tc.name, got)
		}
	}
	digest := [32]byte{0xab}
	manifest := "sha256:ab" + strings.Repeat("00", 31)
	img := func(ref string) *Body {
		return &Body{Services: []Process{{Name: "web", Image: Image{Reference: ref, Manifest: manifest}}, {Name: "store", FrontEnd: &FrontEnd{}}}}
	}
	both := &identity.Bounds{Registries: []string{"registry.example.com"}, Signers: []identity.AccountID{a, c}}
	by := func(who ...identity.AccountID) func(identity.AccountID, [32]byte) bool {
		return func(id identity.AccountID, d [32]byte) bool { return d == digest && slices.Contains(who, id) }
	}
	for _, tc := range []struct {
		name   string
		body   *Body
		signed func(identity.AccountID, [32]byte) bool
		want   []string
	}{
		{"within", img("registry.example.com/app:1"), by(a, c), nil},
		{"one of two signatures", img("registry.example.com/app:1"), by(a), []string{BoundSigners}},
		{"another's signature", img("registry.example.com/app:1"), by(a, identity.AccountID{3}), []string{BoundSigners}},
		{"a name that only begins like it", img("registry.example.com.evil/app"), by(a, c), []string{BoundRegistries}},
		{"the same host with a port", img("registry.example.com:5000/app"), by(a, c), []string{BoundRegistries}},
		{"a directory", img("oci:app"), by(a, c), []string{BoundRegistries}},
		{"a digest that is none", &Body{Services: []Process{{Name: "web", Image: Image{Reference: "registry.example.com/app", Manifest: "sha256:ab"}}}}, by(a, c), []string{BoundSigners, BoundSigners}},
	} {
		var got []string
		for _, x := range tc.body.Outside(both, tc.signed) {
			got = append(got, x.Bound)
		}
		if !slices.Equal(got, tc.want) {
			t.Errorf("%s: %v, want %v", tc.name, got, tc.want)
		}
	}
}
