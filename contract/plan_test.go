package contract

import (
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"holdfast/internal/canonical"
)

const planned = `
name: shop
services:
  web:
    image: example/web:1
    command: [serve, --token, t0ken, --api-key=k3y, "two words"]
    environment: {COLOUR: blue, DB_PASSWORD: hunter2, DATABASE_URL: 'postgres://u:pw@db/x', EMPTY: }
    configs: [{source: conf, target: /etc/web.conf}]
    secrets: [cert]
    depends_on: {db: {condition: service_healthy}}
    deploy: {replicas: 2, resources: {limits: {cpus: '0.5', memory: 64M, pids: 50}}}
    x-holdfast: {placement: {spread: farm}, egress: ['tcp://203.0.113.0/24:443']}
  db:
    image: example/db:1
    volumes: ['data:/data']
    tmpfs: [/tmp]
    healthcheck: {test: pg_isready, interval: 5s}
    user: '5'
volumes: {data: {x-holdfast: {size: 4GiB}}}
configs: {conf: {content: 'listen 80'}}
secrets: {cert: {environment: FROM_USER}}
x-holdfast:
  routes: [{host: shop.localhost, service: web, port: 80}]
`

func plans(t *testing.T, compose string) (*Header, *Body) {
	t.Helper()
	return signable(t, load(t, compose, nil))
}

func TestAPlanIsReadable(t *testing.T) {
	h, b := plans(t, planned)
	want := `a new contract
  + route shop.localhost: web port 80
  + volume data: 4 GiB
  service db
    + healthcheck: [/bin/sh -c pg_isready]
    + healthcheck times: every 5s, time-out 30s, 3 retries
    + image: example/db:1 @ 000000000000
    + limits: 0.5 cores, 512 MiB, 512 processes
    + mount /data: volume data
    + network: default
    + replicas: 1
    + restart: always
    + tmpfs /tmp: 64 MiB
    + user: 5
  service web
    + command: [serve --token (hidden) --api-key=(hidden) "two words"]
    + config /etc/web.conf: 9 bytes, mode 0444
    + depends on: db (service_healthy)
    + egress: tcp://203.0.113.0/24:443
    + environment COLOUR: "blue"
    + environment DATABASE_URL: (hidden)
    + environment DB_PASSWORD: (hidden)
    + image: example/web:1 @ 111111111111
    + limits: 0.5 cores, 64 MiB, 50 processes
    + network: default
    + placement: one a farm
    + replicas: 2
    + restart: always
    + secret /run/secrets/cert: 1 bytes, mode 0444
`
	if got := Diff(nil, nil, h, b).Text(); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	changed := strings.NewReplacer("COLOUR: blue", "COLOUR: red", "hunter2", "hunter3", "u:pw@", "u:px@", "replicas: 2", "replicas: 3", "    user: '5'\n", "", "t0ken", "t1ken",
		"listen 80", "listen 81", "spread: farm", "spread: node", "shop.localhost", "www.localhost", "[/tmp]", "['/tmp:size=1m']").Replace(planned)
	h2, b2 := plans(t, changed)
	want = `  - route shop.localhost: web port 80
  + route www.localhost: web port 80
  service db
    ~ tmpfs /tmp: 64 MiB → 1 MiB   (restarts)
    - user: 5   (restarts)
  service web
    ~ command: [serve --token (hidden) --api-key=(hidden) "two words"] → [serve --token (hidden) --api-key=(hidden) "two words"] (changed)   (restarts)
    ~ config /etc/web.conf: 9 bytes, mode 0444 → 9 bytes, mode 0444 (changed)   (restarts)
    ~ environment COLOUR: "blue" → "red"   (restarts)
    ~ environment DATABASE_URL: (hidden) → (hidden) (changed)   (restarts)
    ~ environment DB_PASSWORD: (hidden) → (hidden) (changed)   (restarts)
    ~ placement: one a farm → one a node
    ~ replicas: 2 → 3
`
	if got := Diff(h, b, h2, b2).Text(); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if got := Diff(h, b, h, b); !got.Empty() || got.Text() != "nothing changes\n" {
		t.Errorf("%s", got.Text())
	}
	raw, err := json.Marshal(Diff(h, b, h, b))
	if err != nil || string(raw) != `{"create":false,"changes":[]}` {
		t.Errorf("%s %v", raw, err)
	}
}

// A service that comes or goes is no restart.
func TestAPlanOfServicesThatComeAndGo(t *testing.T) {
	h, b := plans(t, "name: a\nservices:\n  one: {image: x}\n")
	h2, b2 := plans(t, "name: a\nservices:\n  two: {image: x}\n")
	for _, c := range Diff(h, b, h2, b2).Changes {
		if c.Restarts || c.Service != "one" && c.Service != "two" || c.Service == "one" && c.New != "" || c.Service == "two" && c.Old != "" {
			t.Errorf("%+v", c)
		}
	}
}

// Secrets are nowhere in what a plan says, as text or as JSON; the control shows that they were in the contract.
func TestAPlanHidesSecrets(t *testing.T) {
	const secret = "xyzzy-secret-value"
	file := fmt.Sprintf(`
services:
  web:
    image: x
    command: [run, --password, %[1]s, --token=%[1]s, "--db=postgres://u:%[1]s@h/d"]
    entrypoint: [/bin/x, PASSWORD=%[1]s]
    healthcheck: {test: [CMD, check, --secret, %[1]s]}
    environment:
      DB_PASSWORD: %[1]s
      API_TOKEN: %[1]s
      aws_secret_access_key: %[1]s
      SENTRY_DSN: %[1]s
      URL: https://user:%[1]s@host/
      PEM: "-----BEGIN PRIVATE KEY-----\n%[1]s"
    configs: [{source: c, target: /c}]
    secrets: [s]
configs: {c: {content: %[1]s}}
secrets: {s: {environment: S}}
`, secret)
	path := project(t, file, nil)
	d, err := Load(t.Context(), Input{Path: path, Env: map[string]string{"S": secret}})
	if err != nil {
		t.Fatal(err)
	}
	h, b := signable(t, d)
	if n := strings.Count(string(canonical.Encode(b.Services)), secret); n < 13 {
		t.Fatalf("the control: the contract holds the secret %d times", n)
	}
	h2, b2 := plans(t, web(""))
	for name, p := range map[string]Plan{"new": Diff(nil, nil, h, b), "gone": Diff(h, b, h2, b2), "come": Diff(h2, b2, h, b)} {
		raw, err := json.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(raw), secret) || strings.Contains(p.Text(), secret) {
			t.Errorf("%s: the plan shows it:\n%s", name, p.Text())
		}
	}
}

// Whoever approves must see every change: each field of the contract is changed in turn, and each shows.
func TestAPlanShowsEveryChange(t *testing.T) {
	type both struct {
		H Header `cbor:"1,keyasint"`
		B Body   `cbor:"2,keyasint"`
	}
	h, _, b := vectorContract()
	raw := canonical.Encode(both{*h, *b})
	fresh := func() *both {
		var c both
		if err := canonical.Decode(raw, 1<<20, &c); err != nil {
			t.Fatal(err)
		}
		return &c
	}
	// What every revision makes anew, or what is no choice of the author's.
	silent := []string{
		"Header.Version", "Header.Grid", "Header.Account", "Header.Name", "Header.Revision", "Header.Contract", "Header.Previous", "Header.SealedBody", "Header.SealedSize",
		"Header.BodyCommitment", "Header.KeyCommitment", "Header.Networks", "Body.Version", "Body.Certificates", "Body.Source", "Image.Blobs", "Service.Egress", "Service.Volumes", "Process.Name",
	}
	seen := map[string]bool{}
	// leaves calls f for each leaf below v with its field's name.
	var leaves func(v reflect.Value, name string, f func(name string, v reflect.Value))
	leaves = func(v reflect.Value, name string, f func(string, reflect.Value)) {
		switch v.Kind() {
		case reflect.Pointer:
			if !v.IsNil() {
				leaves(v.Elem(), name, f)
			}
		case reflect.Struct:
			for i := range v.NumField() {
				n := v.Type().Name() + "." + v.Type().Field(i).Name
				if !slices.Contains(silent, n) {
					leaves(v.Field(i), n, f)
				}
			}
		case reflect.Slice:
			if v.Len() > 0 && v.Index(0).Kind() != reflect.Uint8 {
				for i := range v.Len() {
					leaves(v.Index(i), name, f)
				}
				return
			}
			fallthrough
		default:
			if !v.IsZero() {
				f(name, v)
			}
		}
	}
	count := 0
	c := fresh()
	leaves(reflect.ValueOf(c).Elem(), "", func(string, reflect.Value) { count++ })
	for i := range count {
		c, at, field := fresh(), 0, ""
		leaves(reflect.ValueOf(c).Elem(), "", func(name string, v reflect.Value) {
			if at++; at != i+1 {
				return
			}
			field = name
			switch v.Kind() {
			case reflect.String:
				v.SetString(v.String() + "x")
			case reflect.Bool:
				v.SetBool(!v.Bool())
			case reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
				v.SetUint(v.Uint() + 1)
			case reflect.Int64:
				v.SetInt(v.Int() + int64(time.Second))
			case reflect.Slice: // bytes
				v.SetBytes(append(v.Bytes(), 'x'))
			case reflect.Map:
				v.SetMapIndex(reflect.ValueOf("k"), reflect.ValueOf("changed"))
			default:
				t.Fatalf("%s is a %v", name, v.Kind())
			}
		})
		seen[field] = true
		if Diff(h, b, &c.H, &c.B).Empty() {
			t.Errorf("a change of %s does not show", field)
		}
		if Diff(&c.H, &c.B, h, b).Empty() {
			t.Errorf("taking back a change of %s does not show", field)
		}
	}
	if len(seen) < 50 {
		t.Errorf("only %d fields were changed", len(seen))
	}
	if c := fresh(); !Diff(h, b, &c.H, &c.B).Empty() {
		t.Error("the control: what is the same shows")
	}
}

// What is shown rounded or cut is compared exactly.
func TestAPlanComparesWhatItDoesNotShow(t *testing.T) {
	h, b := plans(t, web(""))
	same := func(f func(h *Header, b *Body)) Plan {
		h2, b2 := *h, *b
		h2.Services, b2.Services = slices.Clone(h.Services), slices.Clone(b.Services)
		f(&h2, &b2)
		return Diff(h, b, &h2, &b2)
	}
	for name, f := range map[string]func(h *Header, b *Body){
		"a byte of memory":          func(h *Header, _ *Body) { h.Services[0].Memory++ },
		"the end of a digest":       func(_ *Header, b *Body) { m := &b.Services[0].Image.Manifest; *m = (*m)[:70] + "f" },
		"arguments that show alike": func(_ *Header, b *Body) { b.Services[0].Command = []string{"(hidden)"} },
	} {
		p := same(f)
		if len(p.Changes) != 1 {
			t.Errorf("%s: %+v", name, p)
		} else if c := p.Changes[0]; c.Old == c.New {
			t.Errorf("%s: it shows as %q → %q", name, c.Old, c.New)
		}
	}
}

// Package node restarts what is not among these (its TestInstanceNamesEverythingThatNeedsARestart).
func TestAPlanSaysWhatRestarts(t *testing.T) {
	base := web("") + "  db: {image: db}\n"
	for _, tc := range []struct {
		name, compose string
		restarts      bool
	}{
		{"replicas", web("scale: 2"), false},
		{"placement", web("x-holdfast: {placement: {spread: farm}}"), false},
		{"egress", web("x-holdfast: {egress: ['tcp://0.0.0.0/0']}"), false},
		{"dependencies", web("depends_on: [db]"), false},
		{"environment", web("environment: {A: b}"), true},
		{"memory", web("mem_limit: 64m"), true},
		{"image", strings.Replace(web(""), "example/web", "example/web:2", 1), true},
		{"restart policy", web("restart: 'no'"), true},
		{"a file", web("configs: [c]") + "  db: {image: db}\nconfigs: {c: {content: x}}\n", true},
	} {
		compose := tc.compose
		if !strings.Contains(compose, "db: {image: db}") {
			compose += "  db: {image: db}\n"
		}
		h, b := plans(t, base)
		h2, b2 := plans(t, compose)
		p := Diff(h, b, h2, b2)
		if len(p.Changes) == 0 {
			t.Errorf("%s: no change", tc.name)
		}
		for _, c := range p.Changes {
			if c.Restarts != tc.restarts {
				t.Errorf("%s: %+v", tc.name, c)
			}
		}
	}
}

func TestSizesReadWell(t *testing.T) {
	for n, want := range map[uint64]string{0: "0 bytes", 1: "1 bytes", 1 << 10: "1 KiB", 1<<20 + 1: "1024.0 KiB", 64 << 20: "64 MiB", 100_000_000: "95.4 MiB", 1 << 30: "1 GiB", 1536 << 20: "1536 MiB", 5 << 10: "5 KiB", 5000: "5000 bytes"} {
		if got := bytesText(n); got != want {
			t.Errorf("%d: %s, want %s", n, got, want)
		}
	}
}
