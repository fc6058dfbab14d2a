package contract

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

// project writes a Compose file and the files beside it, and returns its path.
func project(t testing.TB, compose string, files map[string]string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "app")
	for name, text := range files {
		name = filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(dir, "compose.yaml")
	if err := os.WriteFile(name, []byte(compose), 0o644); err != nil {
		t.Fatal(err)
	}
	return name
}

func load(t testing.TB, compose string, files map[string]string) *Document {
	t.Helper()
	d, err := Load(t.Context(), Input{Path: project(t, compose, files), Env: map[string]string{"FROM_USER": "u", "PORT": "8080", "N": "3"}})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// web is a Compose file with one service, of which the keys are given.
func web(keys string) string {
	s := "services:\n  web:\n    image: example/web\n"
	if keys != "" {
		s += indent(4, keys)
	}
	return s
}

func indent(n int, s string) string {
	s = strings.TrimRight(strings.TrimLeft(s, "\n"), "\n\t ")
	var out strings.Builder
	for _, line := range strings.Split(s, "\n") {
		out.WriteString(strings.Repeat(" ", n) + strings.TrimPrefix(line, "\t") + "\n")
	}
	return out.String()
}

// The names are the specification of what works of Compose.
func TestSupported(t *testing.T) {
	files := map[string]string{
		"app.env":  "FROM_FILE=file\nBOTH=file\n# a comment\nQUOTED=\"two words\"\nexport EXPORTED=1\nCHAIN=${FROM_FILE}-$FROM_USER\nFROM_USER\n",
		"conf/ngx": "server {}\n", "key": "s3cret", ".env": "DOTENV=dot\nFROM_USER=never\n",
	}
	body := func(want any, got func(p *Process) any) func(*testing.T, *Document) {
		return func(t *testing.T, d *Document) {
			if g := got(&d.Body.Services[0]); !reflect.DeepEqual(g, want) {
				t.Errorf("got %#v, want %#v", g, want)
			}
		}
	}
	head := func(want any, got func(s *Service) any) func(*testing.T, *Document) {
		return func(t *testing.T, d *Document) {
			if g := got(&d.Header.Services[0]); !reflect.DeepEqual(g, want) {
				t.Errorf("got %#v, want %#v", g, want)
			}
		}
	}
	noted := func(want string) func(*testing.T, *Document) {
		return func(t *testing.T, d *Document) {
			if !slices.ContainsFunc(d.Notes, func(n string) bool { return strings.Contains(n, want) }) {
				t.Errorf("no note says %q: %q", want, d.Notes)
			}
		}
	}
	env := func(p *Process) any { return p.Environment }
	cmd := func(p *Process) any { return [][]string{p.Entrypoint, p.Command} }
	for _, tc := range []struct {
		name, compose string
		check         func(*testing.T, *Document)
	}{
		{"image is a reference that is pinned later", web(""), func(t *testing.T, d *Document) {
			if d.Images["web"] != "example/web" || d.Body.Services[0].Image.Reference != "example/web" {
				t.Errorf("%+v", d.Images)
			}
		}},
		{"a service that asks for nothing gets the defaults", web(""), head(Service{Name: "web", Replicas: 1, CPUMilli: DefaultCPUMilli, Memory: DefaultMemory, Pids: DefaultPids, Networks: []string{"default"}}, func(s *Service) any { return *s })},
		{"what is deployed is started again and again", web(""), body("always", func(p *Process) any { return p.Restart })},
		{"name of the file is the contract's", "name: shop\n" + web(""), func(t *testing.T, d *Document) {
			if d.Name != "shop" || d.Header.Name != "shop" {
				t.Errorf("%q %q", d.Name, d.Header.Name)
			}
		}},
		{"without a name the directory's is taken", web(""), func(t *testing.T, d *Document) {
			if d.Name != "app" {
				t.Errorf("%q", d.Name)
			}
		}},
		{"command as a list", web(`command: [serve, --port, "80"]`), body([][]string{nil, {"serve", "--port", "80"}}, cmd)},
		{"command as a line is split like a shell would", web(`command: serve --name "two words"`), body([][]string{nil, {"serve", "--name", "two words"}}, cmd)},
		{"entrypoint as a list", web(`entrypoint: [/bin/app, -v]`), body([][]string{{"/bin/app", "-v"}, nil}, cmd)},
		{"entrypoint as a line", web(`entrypoint: /bin/app -v`), body([][]string{{"/bin/app", "-v"}, nil}, cmd)},
		{"an empty entrypoint drops the image's", web("entrypoint: []\ncommand: [/bin/app]"), body([][]string{{"/bin/app"}, nil}, cmd)},
		{"an entrypoint of one empty word too", web("entrypoint: ['']\ncommand: [/bin/app]"), body([][]string{{"/bin/app"}, nil}, cmd)},
		{"an empty command behind an entrypoint is none", web("entrypoint: [/bin/app]\ncommand: []"), body([][]string{{"/bin/app"}, nil}, cmd)},
		{"environment as a mapping", web("environment: {B: two, A: 1, C: true, D: '', E: 1.5}"), body([]string{"A=1", "B=two", "C=true", "D=", "E=1.5"}, env)},
		{"environment as a list", web("environment: [B=two, A=x=y]"), body([]string{"A=x=y", "B=two"}, env)},
		{"environment without a value is the user's", web("environment: [FROM_USER, NOT_SET, DOTENV]"), body([]string{"DOTENV=dot", "FROM_USER=u"}, env)},
		{"what comes from the user's environment is said", web("environment: [FROM_USER]"), noted("from your environment: FROM_USER")},
		{"env_file as one path", web("env_file: app.env"), body([]string{"BOTH=file", "CHAIN=file-u", "EXPORTED=1", "FROM_FILE=file", "FROM_USER=u", "QUOTED=two words"}, env)},
		{"environment goes before env_file", web("env_file: [./app.env]\nenvironment: {BOTH: here}"), body("BOTH=here", func(p *Process) any { return p.Environment[0] })},
		{"env_file that is not required may be absent", web("env_file:\n  - {path: none.env, required: false}\n  - path: app.env"), body(6, func(p *Process) any { return len(p.Environment) })},
		{"expose", web("expose: [3000, '80', 443/tcp]"), body([]uint16{80, 443, 3000}, func(p *Process) any { return p.Expose })},
		{"user", web("user: '1000:100'"), body("1000:100", func(p *Process) any { return p.User })},
		{"working_dir", web("working_dir: /srv"), body("/srv", func(p *Process) any { return p.WorkingDir })},
		{"read_only", web("read_only: true"), body(true, func(p *Process) any { return p.ReadOnly })},
		{"cap_add and cap_drop in any spelling", web("cap_add: [net_admin, CAP_SYS_PTRACE]\ncap_drop: [ALL]"), body([][]string{{"NET_ADMIN", "SYS_PTRACE"}, {"ALL"}}, func(p *Process) any { return [][]string{p.CapAdd, p.CapDrop} })},
		{"stop_grace_period and stop_signal", web("stop_grace_period: 1m30s\nstop_signal: int"), body([]any{90 * time.Second, "SIGINT"}, func(p *Process) any { return []any{p.StopGrace, p.StopSignal} })},
		{"labels as a mapping", web("labels: {com.example.a: x, b: ''}"), body(map[string]string{"com.example.a": "x", "b": ""}, func(p *Process) any { return p.Labels })},
		{"labels as a list", web("labels: [a=x, b]"), body(map[string]string{"a": "x", "b": ""}, func(p *Process) any { return p.Labels })},
		{"hostname", web("hostname: front"), body("front", func(p *Process) any { return p.Hostname })},

		{"a named volume", web("volumes: [data:/var/lib/data]") + "volumes: {data: }\n", func(t *testing.T, d *Document) {
			want := []Volume{{"data", DefaultVolumeSize, Store{Limit: 512 << 20}}}
			if !reflect.DeepEqual(d.Header.Volumes, want) || !reflect.DeepEqual(d.Header.Services[0].Volumes, []string{"data"}) || !reflect.DeepEqual(d.Body.Services[0].Mounts, []Mount{{"data", "/var/lib/data", false}}) {
				t.Errorf("%+v %+v", d.Header, d.Body.Services[0].Mounts)
			}
		}},
		{"a volume read-only, and in the long form", web("volumes:\n  - bb:/b:ro\n  - {type: volume, source: a, target: /a/, read_only: true}") + "volumes: {a: , bb: }\n", body([]Mount{{"a", "/a", true}, {"bb", "/b", true}}, func(p *Process) any { return p.Mounts })},
		{"a volume without snapshots", web("volumes: [data:/d]") + "volumes:\n  data:\n    x-holdfast: {snapshots: false}\n", func(t *testing.T, d *Document) {
			if v := d.Header.Volumes[0]; v.Store != (Store{}) {
				t.Errorf("%+v", v)
			}
		}},
		{"x-holdfast.size of a volume", web("volumes: [data:/d]") + "volumes:\n  data:\n    x-holdfast: {size: 4GiB}\n", func(t *testing.T, d *Document) {
			if d.Header.Volumes[0].Size != 4<<30 {
				t.Errorf("%+v", d.Header.Volumes)
			}
		}},
		{"a volume that no service uses is left out and said", web("") + "volumes: {spare: }\n", noted("volume spare is used by no service")},
		{"tmpfs short, with a size, and as a volume", web("tmpfs: [/tmp, '/run:size=16m,mode=1777']\nvolumes:\n  - {type: tmpfs, target: /cache, tmpfs: {size: 1048576}}"), body([]Tmpfs{{"/cache", 1 << 20}, {"/run", 16 << 20}, {"/tmp", 0}}, func(p *Process) any { return p.Tmpfs })},
		{"tmpfs at /dev/shm stands for shm_size", web("tmpfs: ['/dev/shm:size=256m']"), body([]Tmpfs{{"/dev/shm", 256 << 20}}, func(p *Process) any { return p.Tmpfs })},
		{"configs: file, content, environment", web("configs:\n  - a\n  - {source: b, target: /etc/b, mode: 0440, uid: '5', gid: '6'}\n  - {source: c, target: sub/c}") + "configs:\n  a: {file: conf/ngx}\n  b: {content: 'x=${PORT}'}\n  c: {environment: FROM_USER}\n", body([]File{
			{"/a", []byte("server {}\n"), 0o444, 0, 0, false}, {"/etc/b", []byte("x=8080"), 0o440, 5, 6, false}, {"/sub/c", []byte("u"), 0o444, 0, 0, false},
		}, func(p *Process) any { return p.Files })},
		{"secrets: file and environment, below /run/secrets", web("secrets:\n  - a\n  - {source: b, target: other}\n  - {source: b, target: /key}") + "secrets:\n  a: {file: ./key}\n  b: {environment: FROM_USER}\n", body([]File{
			{"/key", []byte("u"), 0o444, 0, 0, true}, {"/run/secrets/a", []byte("s3cret"), 0o444, 0, 0, true}, {"/run/secrets/other", []byte("u"), 0o444, 0, 0, true},
		}, func(p *Process) any { return p.Files })},

		{"depends_on as a list waits for the start", web("depends_on: [db]") + "  db: {image: db}\n", func(t *testing.T, d *Document) {
			if want := []Dependency{{"db", Started}}; !reflect.DeepEqual(d.Body.Services[1].DependsOn, want) {
				t.Errorf("%+v", d.Body.Services[1].DependsOn)
			}
		}},
		{"depends_on with each condition", web("depends_on:\n  db: {condition: service_healthy}\n  job: {condition: service_completed_successfully}\n  other: {condition: service_started}") +
			"  db: {image: db, healthcheck: {test: [CMD, ok]}}\n  job: {image: job, restart: 'no'}\n  other: {image: other}\n", func(t *testing.T, d *Document) {
			if want := []Dependency{{"db", Healthy}, {"job", Completed}, {"other", Started}}; !reflect.DeepEqual(d.Body.Services[3].DependsOn, want) {
				t.Errorf("%+v", d.Body.Services[3].DependsOn)
			}
		}},
		{"healthcheck as a command", web("healthcheck: {test: [CMD, curl, -f, localhost], interval: 5s, timeout: 2s, start_period: 1m, retries: 7}"), body(
			&Healthcheck{[]string{"curl", "-f", "localhost"}, 5 * time.Second, 2 * time.Second, time.Minute, 7}, func(p *Process) any { return p.Health })},
		{"healthcheck in a shell", web("healthcheck: {test: [CMD-SHELL, 'curl -f localhost || exit 1']}"), body([]string{"/bin/sh", "-c", "curl -f localhost || exit 1"}, func(p *Process) any { return p.Health.Test })},
		{"healthcheck as a line is one in a shell", web("healthcheck: {test: curl -f localhost}"), body([]string{"/bin/sh", "-c", "curl -f localhost"}, func(p *Process) any { return p.Health.Test })},
		{"healthcheck NONE", web("healthcheck: {test: [NONE]}"), body((*Healthcheck)(nil), func(p *Process) any { return p.Health })},
		{"healthcheck disabled", web("healthcheck: {disable: true}"), body((*Healthcheck)(nil), func(p *Process) any { return p.Health })},
		{"restart no", web("restart: no"), body("no", func(p *Process) any { return p.Restart })},
		{"restart unless-stopped", web("restart: unless-stopped"), body("unless-stopped", func(p *Process) any { return p.Restart })},
		{"restart on-failure with a number", web("restart: on-failure:4"), body([]any{"on-failure", uint32(4)}, func(p *Process) any { return []any{p.Restart, p.MaxRetries} })},
		{"deploy.restart_policy", web("deploy: {restart_policy: {condition: on-failure, max_attempts: 2}}"), body([]any{"on-failure", uint32(2)}, func(p *Process) any { return []any{p.Restart, p.MaxRetries} })},

		{"deploy.replicas", web("deploy: {replicas: 3}"), head(uint16(3), func(s *Service) any { return s.Replicas })},
		{"deploy.replicas of 0 stops a service", web("deploy: {replicas: 0}"), head(uint16(0), func(s *Service) any { return s.Replicas })},
		{"scale", web("scale: 2"), head(uint16(2), func(s *Service) any { return s.Replicas })},
		{"deploy.resources.limits", web("deploy: {resources: {limits: {cpus: '1.5', memory: 256M, pids: 64}}}"), head([]any{uint32(1500), uint64(256 << 20), uint32(64)}, func(s *Service) any { return []any{s.CPUMilli, s.Memory, s.Pids} })},
		{"deploy.resources.reservations stand in for limits", web("deploy: {resources: {reservations: {cpus: '0.25', memory: 64M}}}"), head([]any{uint32(250), uint64(64 << 20)}, func(s *Service) any { return []any{s.CPUMilli, s.Memory} })},
		{"a limit goes before a reservation", web("deploy: {resources: {limits: {memory: 1G}, reservations: {cpus: '0.29', memory: 64M}}}"), head([]any{uint32(290), uint64(1 << 30)}, func(s *Service) any { return []any{s.CPUMilli, s.Memory} })},
		{"mem_limit, cpus and pids_limit", web("mem_limit: 64m\ncpus: 0.5\npids_limit: 10"), head([]any{uint32(500), uint64(64 << 20), uint32(10)}, func(s *Service) any { return []any{s.CPUMilli, s.Memory, s.Pids} })},

		{"networks: services on the same one meet", web("networks: [back]") + "networks: {back: }\n", head([]string{"back"}, func(s *Service) any { return s.Networks })},
		{"networks with aliases", web("networks: {back: {aliases: [www, site.example]}}") + "networks: {back: {driver: overlay}}\n", body([]string{"site.example", "www"}, func(p *Process) any { return p.Aliases })},
		{"a network that no service is on is not made", web("") + "networks: {spare: }\n", func(t *testing.T, d *Document) {
			if !slices.Equal(d.Header.Networks, []string{"default"}) {
				t.Errorf("%v", d.Header.Networks)
			}
		}},

		{"x-holdfast.routes lead host names to ports", web("") + "x-holdfast:\n  routes:\n    - {host: www.localhost, service: web, port: 8080}\n    - {host: '${HOST:-a.localhost}', service: web, port: '${PORT}'}\n", func(t *testing.T, d *Document) {
			if want := []Route{{"a.localhost", "web", 8080}, {"www.localhost", "web", 8080}}; !reflect.DeepEqual(d.Header.Routes, want) {
				t.Errorf("%+v", d.Header.Routes)
			}
		}},
		{"how a service is updated", web("deploy: {update_config: {parallelism: 0, failure_action: continue, monitor: 1500ms, order: stop-first, delay: 2s}}\nx-holdfast: {deadline: 5m}"), head(Update{MaxReplicas, "continue", 2, 300}, func(s *Service) any { return s.Update })},
		{"an update as usual", web("deploy: {update_config: {failure_action: rollback}}"), head(Update{}, func(s *Service) any { return s.Update })},
		{"x-holdfast.placement of the file", web("") + "x-holdfast: {placement: {spread: farm, farms: [b, a, b], nodes: [n1]}}\n", head(Placement{"farm", []string{"a", "b"}, []string{"n1"}}, func(s *Service) any { return s.Placement })},
		{"x-holdfast.placement of a service takes its place", web("x-holdfast: {placement: {spread: node}}") + "x-holdfast: {placement: {farms: [a]}}\n", head(Placement{Spread: "node"}, func(s *Service) any { return s.Placement })},
		{"x-holdfast.egress", web("x-holdfast: {egress: ['udp://[2001:db8::1]/32:53', tcp://203.0.113.9, 'tcp://0.0.0.0/0:443', 'tcp://203.0.113.9/32']}"), func(t *testing.T, d *Document) {
			want := []Egress{{"0.0.0.0/0", "tcp", 443}, {"203.0.113.9/32", "tcp", 0}, {"2001:db8::/32", "udp", 53}}
			if !reflect.DeepEqual(d.Body.Services[0].Egress, want) || !d.Header.Services[0].Egress {
				t.Errorf("%+v", d.Body.Services[0].Egress)
			}
		}},
		{"ports: the one HTTP port becomes a proposed route", web("ports: ['127.0.0.1:${PORT}:80']"), func(t *testing.T, d *Document) {
			if want := []Route{{"web-app.localhost", "web", 80}}; !reflect.DeepEqual(d.Header.Routes, want) {
				t.Errorf("%+v", d.Header.Routes)
			}
		}},
		{"ports: it is said that they open nothing", web("ports: ['8080:80']"), noted("line 4: port 80 of web opens nothing; it became the route https://web-app.localhost")},
		{"ports: a service named like its contract has the short name", "name: web\n" + web("ports: [80]"), func(t *testing.T, d *Document) {
			if d.Header.Routes[0].Host != "web.localhost" {
				t.Errorf("%+v", d.Header.Routes)
			}
		}},
		{"ports in the long form", web("ports: [{target: 80, published: '8080', protocol: tcp}]"), func(t *testing.T, d *Document) {
			if d.Header.Routes[0].Port != 80 {
				t.Errorf("%+v", d.Header.Routes)
			}
		}},
		{"ports: routes that are written go before", web("ports: ['80:80', '443:443']") + "x-holdfast: {routes: [{host: a.localhost, service: web, port: 80}]}\n", func(t *testing.T, d *Document) {
			noted("ports open nothing: x-holdfast.routes says")(t, d)
			if len(d.Header.Routes) != 1 || d.Header.Routes[0].Host != "a.localhost" {
				t.Errorf("%+v", d.Header.Routes)
			}
		}},

		{"variables: value, default, alternative, and a dollar", web(`environment: ["A=$PORT", "B=${NONE:-d}", "C=${PORT:+set}", "D=$$PORT", "E=${NONE:-${PORT}}", "F=${DOTENV}", "G=a${NONE-}b", "H=cost: 5$", "I=${FROM_USER}"]`),
			body([]string{"A=8080", "B=d", "C=set", "D=$PORT", "E=8080", "F=dot", "G=ab", "H=cost: 5$", "I=u"}, env)},
		{"variables stand for numbers too", web("deploy: {replicas: '${N}'}\nread_only: '${NONE:-true}'"), head(uint16(3), func(s *Service) any { return s.Replicas })},
		{"a version in a variable is no number", web("environment: {V: '${NONE:-1.10}'}"), body([]string{"V=1.10"}, env)},
		{"a variable that is not set is said", web("environment: {A: $NOPE}"), noted("line 4: the variable NOPE is not set: it is empty")},
		{"anchors and merges", "x-base: &base\n  environment: {A: base}\n  user: '5'\n" + "services:\n  web:\n    <<: *base\n    image: example/web\n    user: '6'\n", body([]any{[]string{"A=base"}, "6"}, func(p *Process) any { return []any{p.Environment, p.User} })},
		{"other x- keys are the author's own", "x-anything: {privileged: true}\n" + web("x-mine: [1]"), head("web", func(s *Service) any { return s.Name })},
		{"keys without an effect are said: version", "version: '3.8'\n" + web(""), noted("line 1: the file: version has no effect")},
		{"keys without an effect are said: container_name and init", web("container_name: x1\ninit: true"), noted("line 5: service web: init has no effect")},
		{"keys without an effect are said: name of a volume", web("volumes: [data:/d]") + "volumes: {data: {name: x}}\n", noted("volume data: name has no effect")},
		{"keys without an effect are said: nocopy", web("volumes: [{type: volume, source: data, target: /d, volume: {nocopy: true}}]") + "volumes: {data: }\n", noted("nocopy has no effect: a new volume is always empty")},
		{"privileged: false says nothing", web("privileged: false"), head("web", func(s *Service) any { return s.Name })},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := load(t, tc.compose, files)
			tc.check(t, d)
			// What was read is what can be signed, opened, and compared without a difference.
			h, b := signable(t, d)
			k := NewKeys(h, nil)
			sealed, err := Seal(h, k, b)
			if err != nil {
				t.Fatal(err)
			}
			again, err := DecodeHeader(h.Encode())
			if err != nil {
				t.Fatal(err)
			}
			opened, err := Open(again, k, sealed)
			if err != nil {
				t.Fatal(err)
			}
			if p := Diff(again, opened, h, b); !p.Empty() {
				t.Errorf("the same file is a change:\n%s", p.Text())
			}
		})
	}
}

// signable sets what only a signer knows.
func signable(t testing.TB, d *Document) (*Header, *Body) {
	t.Helper()
	h, b := d.Header, d.Body
	h.Grid, h.Account, h.Revision = [32]byte{1}, [32]byte{2}, 1
	b.Services = slices.Clone(b.Services)
	for i := range b.Services {
		m := "sha256:" + strings.Repeat(fmt.Sprint(i%10), 64)
		if b.Services[i].FrontEnd != nil {
			continue
		}
		b.Services[i].Image = Image{Reference: b.Services[i].Image.Reference, Manifest: m, Blobs: []Blob{{Digest: m, Size: 1}}}
	}
	h.Volumes = slices.Clone(h.Volumes)
	for i := range h.Volumes {
		if s := &h.Volumes[i].Store; *s != (Store{}) {
			s.FrontEnd[0], s.Recovery[0] = 6, 7
		}
	}
	if h.Store != (Store{}) {
		bound := *d
		bound.Header, bound.Body = h, b
		bound.Bind(Store{FrontEnd: [32]byte{3}, Recovery: [32]byte{4}}, FrontEnd{Store: [32]byte{5}, Keys: []byte("k"), Access: "access-key-of-16", Secret: "secret-key-of-16"})
		h, b = bound.Header, bound.Body
	}
	return &h, &b
}

func TestExamplesLoad(t *testing.T) {
	for _, name := range []string{"pocketbase", "reader"} {
		path := "../examples/" + name + "/compose.yaml"
		d, err := Load(t.Context(), Input{Path: path})
		if err != nil {
			t.Fatal(err)
		}
		if len(d.Notes) > 0 || d.Name != name {
			t.Errorf("%s: %s, notes %q", name, d.Name, d.Notes)
		}
	}
}

// docs/compose.md says what is true: its example loads, and no key that is supported is missing.
func TestTheDocumentFollowsTheCode(t *testing.T) {
	raw, err := os.ReadFile("../docs/compose.md")
	if err != nil {
		t.Fatal(err)
	}
	doc := string(raw)
	blocks := strings.Split(doc, "```yaml\n")
	if len(blocks) != 5 {
		t.Fatalf("%d examples", len(blocks)-1)
	}
	block := func(i int) string { s, _, _ := strings.Cut(blocks[i], "```"); return s }
	d := load(t, block(1), map[string]string{"secrets/db-url": "x"})
	if d.Name != "shop" || len(d.Header.Services) != 2 || len(d.Header.Routes) != 1 || len(d.Notes) != 0 {
		t.Errorf("%+v", d.Header)
	}
	d = load(t, "services:\n  web:\n    image: x\n"+block(3)+block(2), nil)
	if p := d.Header.Services[0].Placement; p.Spread != "node" || len(d.Body.Services[0].Egress) != 3 || len(d.Header.Routes) != 1 {
		t.Errorf("%+v", d.Header)
	}
	for _, section := range []string{"file", "service", "healthcheck", "x file", "x svc", "x vol", "limits"} {
		for _, key := range supported(section) {
			if !strings.Contains(doc, "`"+key) && !strings.Contains(doc, "."+key) && !strings.Contains(doc, key+":") {
				t.Errorf("%s is not in docs/compose.md", key)
			}
		}
	}
	for _, n := range []string{"256 KiB", "50000 parts", "4 MiB of text", "32 levels"} {
		if !strings.Contains(doc, n) {
			t.Errorf("docs/compose.md does not say %q", n)
		}
	}
	if MaxCompose != 256<<10 || maxNodes != 50000 || maxText != 4<<20 || maxNesting != 32 || MaxComposeFile != 1<<20 || MaxBody != 8<<20 {
		t.Error("docs/compose.md has other limits")
	}
}
