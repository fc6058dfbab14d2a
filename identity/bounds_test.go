package identity

import (
	"fmt"
	"reflect"
	"strings"
	"testing"

	"holdfast/internal/canonical"
)

func TestBoundsAreValidated(t *testing.T) {
	many := make([]string, MaxBounds+1)
	for i := range many {
		many[i] = fmt.Sprintf("f%03d", i)
	}
	for _, tc := range []struct {
		name string
		b    Bounds
		want string // "" is good
	}{
		{"none", Bounds{}, ""},
		{"all", Bounds{[]string{"a", "b"}, true, true, []string{"example.com", "localhost"}, []string{"docker.io/library", "localhost:5000", "registry.example.com/team/app"}, []AccountID{{1}, {2}}}, ""},
		{"farms that are not sorted", Bounds{Farms: []string{"b", "a"}}, "not sorted"},
		{"a farm twice", Bounds{Farms: []string{"a", "a"}}, "twice"},
		{"no farm's name", Bounds{Farms: []string{"A"}}, "farm's name"},
		{"an empty name", Bounds{Farms: []string{""}}, "farm's name"},
		{"too many", Bounds{Farms: many}, "at most 64"},
		{"a domain with a dot before it", Bounds{Routes: []string{".example.com"}}, "domain"},
		{"all domains", Bounds{Routes: []string{""}}, "domain"},
		{"a wildcard", Bounds{Routes: []string{"*.example.com"}}, "domain"},
		{"upper case", Bounds{Routes: []string{"Example.com"}}, "domain"},
		{"a path without a host", Bounds{Registries: []string{"library"}}, "docker.io/library"},
		{"a slash at the end", Bounds{Registries: []string{"docker.io/"}}, "HOST"},
		{"a way up", Bounds{Registries: []string{"docker.io/library/.."}}, "HOST"},
		{"dots in a row", Bounds{Registries: []string{"docker.io/a..b"}}, "HOST"},
		{"a scheme", Bounds{Registries: []string{"https://docker.io"}}, "HOST"},
		{"a tag", Bounds{Registries: []string{"docker.io/library/nginx:1"}}, "HOST"},
		{"a user", Bounds{Registries: []string{"docker.io@evil.example"}}, "HOST"},
		{"no port", Bounds{Registries: []string{"localhost:"}}, "HOST"},
		{"a signer that is nobody", Bounds{Signers: []AccountID{{}}}, "no account"},
		{"signers that are not sorted", Bounds{Signers: []AccountID{{2}, {1}}}, "not sorted"},
		{"too many signers", Bounds{Signers: make([]AccountID, MaxSigners+1)}, "at most 8"},
	} {
		p := SingleDevice()
		p.Bounds = tc.b
		a := &Account{Devices: []Device{{Name: "d", Key: PublicKey{}}}, Policy: p}
		if err := a.Validate(); (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q", tc.name, err, tc.want)
		}
		var again Policy
		if err := canonical.Decode(canonical.Encode(&p), 1<<20, &again); err != nil || !reflect.DeepEqual(again, p) {
			t.Errorf("%s: encoded and decoded it is %+v, %v", tc.name, again, err)
		}
	}
	mixed := Bounds{Farms: []string{"b", "a", "b"}, Signers: []AccountID{{2}, {1}, {2}}}
	if mixed.Sort(); !reflect.DeepEqual(mixed, Bounds{Farms: []string{"a", "b"}, Signers: []AccountID{{1}, {2}}}) {
		t.Errorf("sorted: %+v", mixed)
	}
	// What was signed before there were bounds is what it was.
	if b := canonical.Encode(SingleDevice()); len(b) != len(canonical.Encode(struct {
		Rules []Rule `cbor:"1,keyasint"`
	}{SingleDevice().Rules})) {
		t.Errorf("a policy without bounds has become %x", b)
	}
}
