package contract

import (
	"errors"
	"slices"
	"strings"
	"testing"
)

const bucketed = `
services:
  web:
    image: example/web
    environment: {A: "1"}
    x-holdfast: {buckets: [up-loads, avatars]}
    networks: [inner]
  batch:
    image: example/batch
    networks: [inner]
  other:
    image: example/other
networks: {inner: }
x-holdfast:
  buckets:
    up-loads:
    avatars: {versioning: true}
    idle: {}
  storage: 256MiB
  placement: {farms: [farm-2]}
`

// bound is a contract with buckets as it is signed.
func bound(t *testing.T) (*Header, *Keys, *Body) {
	t.Helper()
	h, b := signable(t, load(t, bucketed, nil))
	return h, NewKeys(h, nil), b
}

func TestBucketsMakeAFrontEnd(t *testing.T) {
	d := load(t, bucketed, nil)
	s, ok := d.Header.Service(FrontEndService)
	if !ok || s.Replicas != 1 || !slices.Equal(s.Networks, []string{"inner"}) || !slices.Equal(s.Placement.Farms, []string{"farm-2"}) || d.Header.Store.Limit != 256<<20 {
		t.Fatalf("%+v %+v", s, d.Header.Store)
	}
	if f := d.Body.FrontEnd(); f == nil || !slices.Equal(f.Buckets, []Bucket{{"avatars", true}, {"idle", false}, {"up-loads", false}}) {
		t.Errorf("%+v", f)
	}
	if !slices.Contains(d.Notes, "bucket idle is used by no service") {
		t.Errorf("notes %q", d.Notes)
	}
	h, _, b := bound(t)
	for i, p := range b.Services {
		if p.Name != h.Services[i].Name {
			t.Fatalf("service %d is %s and %s", i, h.Services[i].Name, p.Name)
		}
		has := slices.ContainsFunc(p.Environment, func(e string) bool { return strings.HasPrefix(e, "AWS_") || strings.Contains(e, "BUCKET") })
		waits := slices.Contains(p.DependsOn, Dependency{FrontEndService, Healthy})
		if want := p.Name == "web"; has != want || waits != want {
			t.Errorf("%s: environment %q, waits %v", p.Name, p.Environment, waits)
		}
	}
	user := b.Services[slices.IndexFunc(b.Services, func(p Process) bool { return p.Name == "web" })]
	want := []string{
		"A=1", "AWS_ACCESS_KEY_ID=access-key-of-16", "AWS_ENDPOINT_URL_S3=http://s3:9000", "AWS_REGION=us-east-1", "AWS_SECRET_ACCESS_KEY=secret-key-of-16",
		"HOLDFAST_BUCKET_AVATARS=avatars", "HOLDFAST_BUCKET_UP_LOADS=up-loads",
	}
	if !slices.Equal(user.Environment, want) {
		t.Errorf("%q", user.Environment)
	}
	text := Diff(nil, nil, h, b).Text()
	for _, line := range []string{"bucket avatars: with versions", "bucket idle: without versions", "storage on each location: 256 MiB", "buckets: avatars, up-loads"} {
		if !strings.Contains(text, line) {
			t.Errorf("the plan does not say %q:\n%s", line, text)
		}
	}
	if strings.Contains(text, "secret-key-of-16") || strings.Contains(text, "access-key-of-16") {
		t.Errorf("the plan shows credentials:\n%s", text)
	}
	if plain := load(t, web("")+"x-holdfast: {buckets: {}}\n", nil); plain.Header.Store != (Store{}) || len(plain.Header.Services) != 1 {
		t.Errorf("no bucket makes a store: %+v", plain.Header)
	}
}

// A body that runs the front end where the header says nothing of a store, or the other way round, does not start.
func TestAStoreInHeaderAndBody(t *testing.T) {
	for _, x := range []struct {
		name   string
		change func(h *Header, b *Body)
		want   string
	}{
		{"as it was signed", func(*Header, *Body) {}, ""},
		{"no key", func(h *Header, _ *Body) { h.Store.FrontEnd = [32]byte{} }, "a key is missing"},
		{"one key for both", func(h *Header, _ *Body) { h.Store.Recovery = h.Store.FrontEnd }, "one is for both uses"},
		{"no limit", func(h *Header, _ *Body) { h.Store.Limit = 0 }, "0 bytes on a location"},
		{"no header for it", func(h *Header, _ *Body) { h.Store = Store{} }, "differ in whether it is the front end"},
		{"no body for it", func(_ *Header, b *Body) { front(b).FrontEnd = nil }, "image"},
		{"an image is the front end", func(_ *Header, b *Body) { front(b).FrontEnd = nil; front(b).Image = b.Services[0].Image }, "differ in whether it is the front end"},
		{"another service is a front end too", func(_ *Header, b *Body) { b.Services[0].FrontEnd = front(b).FrontEnd }, "differ in whether it is the front end"},
		{"two of it", func(h *Header, _ *Body) { s, _ := h.Service("s3"); s.Replicas = 2 }, "one replica"},
		{"none of it", func(h *Header, _ *Body) { s, _ := h.Service("s3"); s.Replicas = 0 }, "one replica"},
		{"with egress", func(h *Header, _ *Body) { s, _ := h.Service("s3"); s.Egress = true }, "no egress"},
		{"a command", func(_ *Header, b *Body) { front(b).Command = []string{"sh"} }, "no image and nothing of one"},
		{"an environment", func(_ *Header, b *Body) { front(b).Environment = []string{"A=1"} }, "no image and nothing of one"},
		{"no keys", func(_ *Header, b *Body) { front(b).FrontEnd.Keys = nil }, "keys are missing"},
		{"a short secret", func(_ *Header, b *Body) { front(b).FrontEnd.Secret = "short" }, "16 to 64 printable"},
		{"a secret with a line", func(_ *Header, b *Body) { front(b).FrontEnd.Secret = "secret-key-\nof-16" }, "16 to 64 printable"},
		{"no bucket", func(_ *Header, b *Body) { front(b).FrontEnd.Buckets = nil }, "0 buckets"},
		{"a bucket twice", func(_ *Header, b *Body) { f := front(b).FrontEnd; f.Buckets[1] = f.Buckets[0] }, "is there twice"},
		{"a bucket that is a path", func(_ *Header, b *Body) { front(b).FrontEnd.Buckets[0].Name = "../x" }, "bucket name"},
	} {
		h, k, b := bound(t)
		x.change(h, b)
		sealed, err := Seal(h, k, b)
		if err == nil {
			err = h.Validate()
		}
		if err == nil {
			_, err = Open(h, k, sealed)
		}
		if (err == nil) != (x.want == "") || err != nil && !strings.Contains(err.Error(), x.want) {
			t.Errorf("%s: %v", x.name, err)
		}
	}
	if err := (&Store{FrontEnd: [32]byte{1}, Recovery: [32]byte{2}, Limit: MinStore}).validate(&Header{}); err == nil {
		t.Error("a store without its front end")
	}
	if h, k, b := bound(t); true {
		b.Services[0].Buckets = []string{"x"}
		h.Store, front(b).FrontEnd = Store{}, nil
		sealed, err := Seal(h, k, b)
		if _, err2 := Open(h, k, sealed); errors.Join(err, err2) == nil {
			t.Error("buckets without a store")
		}
	}
}

func front(b *Body) *Process {
	return &b.Services[slices.IndexFunc(b.Services, func(p Process) bool { return p.Name == FrontEndService })]
}
