package contract

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/internal/canonical"

	"golang.org/x/sys/unix"
)

// Hostile inputs are tried in a process of their own, one after the other; the kernel says how large it was at most since it
// was last asked to forget. Set, this variable makes the test's program that process.
const hostileEnv = "HOLDFAST_TEST_HOSTILE"

// An empty process of this test has some 25 MiB.
const hostileLimit = 96 // MiB

func TestMain(m *testing.M) {
	if os.Getenv(hostileEnv) == "" {
		os.Exit(m.Run())
	}
	for _, name := range hostileNames() {
		start := time.Now()
		debug.FreeOSMemory()
		if err := os.WriteFile("/proc/self/clear_refs", []byte("5"), 0); err != nil {
			panic(err)
		}
		said := fmt.Sprint(hostile(name))
		status, _ := os.ReadFile("/proc/self/status")
		for line := range strings.Lines(string(status)) {
			if f := strings.Fields(line); f[0] == "VmHWM:" {
				json.NewEncoder(os.Stdout).Encode([]string{name, f[1], time.Since(start).Round(time.Millisecond).String(), said})
			}
		}
	}
	os.Exit(0)
}

func hostileNames() []string {
	return slices.Concat(slices.Sorted(maps.Keys(hostileFiles())), slices.Sorted(maps.Keys(hostileBytes())))
}

// hostile runs one input, and returns what came of it.
func hostile(name string) error {
	if f, ok := hostileFiles()[name]; ok {
		dir, err := os.MkdirTemp(".", "input")
		if err != nil {
			return err
		}
		for n, text := range f {
			if err := os.WriteFile(filepath.Join(dir, n), []byte(text), 0o600); err != nil {
				return err
			}
		}
		_, err = Load(context.Background(), Input{Path: filepath.Join(dir, "compose.yaml"), Env: map[string]string{"LONG": strings.Repeat("x", 2000)}})
		return err
	}
	b, decode := hostileBytes()[name]()
	return decode(b)
}

// hostileFiles are directories of Compose files that are meant to do harm.
var hostileFiles = sync.OnceValue(func() map[string]map[string]string {
	only := func(s string) map[string]string { return map[string]string{"compose.yaml": s} }
	fill := func(head, part string, size int) string {
		return head + strings.Repeat(part, (size-len(head))/len(part))
	}
	laughs := func(item func(i int) string) string {
		var b strings.Builder
		b.WriteString("x-0: &a0 [a, a, a, a, a, a, a, a, a]\n")
		for i := 1; i < 12; i++ {
			b.WriteString(item(i))
		}
		return b.String() + web("")
	}
	long := strings.Repeat("x", 100<<10)
	out := map[string]map[string]string{
		"a billion laughs": only(laughs(func(i int) string {
			return fmt.Sprintf("x-%d: &a%d [%s]\n", i, i, strings.TrimSuffix(strings.Repeat(fmt.Sprintf("*a%d, ", i-1), 9), ", "))
		})),
		"a billion laughs of merges": only("x-m0: &m0 {k: v}\n" + laughs(func(i int) string {
			return fmt.Sprintf("x-m%d: &m%d {<<: [%s], k%d: v}\n", i, i, strings.TrimSuffix(strings.Repeat(fmt.Sprintf("*m%d, ", i-1), 9), ", "), i)
		})),
		"merges that merge themselves":            only("x-a: &a {<<: [*a, *a, *a]}\n" + web("")),
		"a list that holds itself":                only("x-a: &a [*a, *a]\n" + web("")),
		"one long text many times":                only("x-a: &a " + long + "\nx-b: [" + fill("*a", ", *a", 100<<10) + "]\n" + web("")),
		"one long key many times":                 only("x-a: &a\n  ? " + long + "\n  : 1\nx-b: [" + fill("*a", ", *a", 100<<10) + "]\n" + web("")),
		"one long environment in many services":   only("x-a: &a {image: x, environment: {A: " + long + "}}\nservices:\n" + services(5000, ": *a")),
		"too many services":                       only("services:\n" + services(9000, ": {image: x}")),
		"too many configs":                        only(web("") + "configs:\n" + services(9000, ": {content: x}")),
		"as many services as there can be":        only("services:\n" + services(64, ": {image: x, labels: ["+strings.Repeat("a,", 100)+"a]}")),
		"lists a little too deep":                 only("x-a: " + strings.Repeat("[", 40) + strings.Repeat("]", 40) + "\n" + web("")),
		"lists as deep as they go":                only("x-a: " + strings.Repeat("[", 9000) + strings.Repeat("]", 9000) + "\n" + web("")),
		"lists deeper than any parser goes":       only("x-a: " + strings.Repeat("[", 200<<10)),
		"mappings as deep as they go":             only(deepMap(600) + web("")),
		"a list of nothing but commas and words":  only(fill("x-a: [a", ",a", MaxCompose-100) + "]\n" + web("")),
		"a list of empty lists":                   only(fill("x-a: [[]", ",[]", MaxCompose-100) + "]\n" + web("")),
		"a list of comments":                      only(web("") + fill("x-a:\n", "- #\n", MaxCompose-100)),
		"anchors and nothing else":                only(web("") + fill("x-a:\n", "- &a a\n", MaxCompose-100)),
		"a file that is too large":                only(fill(web(""), "#\n", MaxCompose+10)),
		"a file of zeros":                         only(string(make([]byte, MaxCompose))),
		"a long line":                             only(web("command: '" + strings.Repeat("x ", 100<<10) + "'")),
		"a variable many times":                   only(web("command: '" + strings.Repeat("$LONG", 40<<10) + "'")),
		"a variable in variables":                 only(web("user: '" + strings.Repeat("${A:-", 30<<10) + strings.Repeat("}", 30<<10) + "'")),
		"one long word":                           only(web("command: '" + strings.Repeat("x", 250<<10) + "'")),
		"variables with defaults in a row":        only(web("user: '" + strings.Repeat("${A:-x}", 30<<10) + "'")),
		"variables that are not closed":           only(web("command: '" + strings.Repeat("${A:-x", 30<<10) + "'")),
		"many ports":                              only(web("ports:\n" + strings.Repeat("  - 1-65535\n", 1000))),
		"many ports, published":                   only(web("ports:\n" + strings.Repeat("  - {target: 80, published: 1-65535}\n", 2000))),
		"many exposed ranges":                     only(web("expose:\n" + strings.Repeat("  - 1-65535\n", 5000))),
		"many dependencies in a circle":           only(circle(60)),
		"a command that no shell ends":            only(web(`command: "\"` + strings.Repeat(`\\\"`, 20<<10) + `"`)),
		"an env_file that doubles itself":         {"compose.yaml": web("env_file: a.env"), "a.env": doubling()},
		"a .env that doubles itself":              {"compose.yaml": web(""), ".env": doubling()},
		"an env_file with many lines":             {"compose.yaml": web("env_file: a.env"), "a.env": lines(90_000)},
		"an env_file that is too large":           {"compose.yaml": web("env_file: a.env"), "a.env": strings.Repeat("#\n", MaxComposeFile)},
		"an env_file of quotes":                   {"compose.yaml": web("env_file: a.env"), "a.env": strings.Repeat("A=''\n", MaxComposeFile/6)},
		"an env_file of one quote":                {"compose.yaml": web("env_file: a.env"), "a.env": "A=\"" + strings.Repeat("\\", MaxComposeFile-10)},
		"an env_file with variables in a row":     {"compose.yaml": web("env_file: a.env"), "a.env": "A=" + strings.Repeat("${B:-x}", 100<<10)},
		"the same large secret in many services":  {"compose.yaml": "secrets: {s: {file: s}}\nservices:\n" + services(60, ": {image: x, secrets: [s]}"), "s": strings.Repeat("s", MaxComposeFile)},
		"a secret that is too large":              {"compose.yaml": web("secrets: [s]") + "secrets: {s: {file: s}}\n", "s": strings.Repeat("s", MaxComposeFile+1)},
		"a secret that is a directory":            {"compose.yaml": web("secrets: [s]") + "secrets: {s: {file: .}}\n"},
		"a thousand configs in one service":       only(web("configs: ["+strings.TrimSuffix(configs(1000, "", ", "), ", ")+"]") + "configs:\n" + configs(1000, "  ", ": {content: x}\n")),
		"routes enough to fill the public header": only(web("") + "x-holdfast:\n  routes:\n" + routes(5000)),
	}
	return out
})

func services(n int, rest string) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "  s%d%s\n", i, rest)
	}
	return b.String()
}

func configs(n int, head, rest string) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "%sc%d%s", head, i, rest)
	}
	return b.String()
}

func routes(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "    - {host: h%d.localhost, service: web, port: 1}\n", i)
	}
	return b.String()
}

func circle(n int) string {
	var b strings.Builder
	b.WriteString("services:\n")
	for i := range n {
		fmt.Fprintf(&b, "  s%d: {image: x, depends_on: [s%d]}\n", i, (i+1)%n)
	}
	return b.String()
}

func deepMap(n int) string {
	var b strings.Builder
	for i := range n {
		b.WriteString(strings.Repeat(" ", i) + "x-a:\n")
	}
	return b.String()
}

func doubling() string {
	var b strings.Builder
	b.WriteString("A0=xxxxxxxxxxxxxxxx\n")
	for i := 1; i < 40; i++ {
		fmt.Fprintf(&b, "A%d=$A%d$A%d\n", i, i-1, i-1)
	}
	return b.String()
}

func lines(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "A%d=1\n", i)
	}
	return b.String()
}

// hostileBytes are headers and bodies of bytes that nobody encodes.
func hostileBytes() map[string]func() ([]byte, func([]byte) error) {
	type input = func() ([]byte, func([]byte) error)
	header := func(f func() []byte) input {
		return func() ([]byte, func([]byte) error) {
			return f(), func(b []byte) error { _, err := DecodeHeader(b); return err }
		}
	}
	body := func(f func() []byte) input {
		return func() ([]byte, func([]byte) error) {
			return f(), func(b []byte) error { _, err := decodeBody(b); return err }
		}
	}
	is := func(b ...byte) func() []byte { return func() []byte { return b } }
	many := func(n int, b ...byte) func() []byte { return func() []byte { return bytes.Repeat(b, n) } }
	array := func(n int) []byte { return binary.BigEndian.AppendUint32([]byte{0x9a}, uint32(n)) }
	services := func(key byte, n int) func() []byte { // n empty services
		return func() []byte { return append(append([]byte{0xa1, key}, array(n)...), bytes.Repeat([]byte{0xa0}, n)...) }
	}
	blobs := func(n, each int) func() []byte { // services that have each so many empty blobs
		return func() []byte {
			b := append([]byte{0xa1, 0x02}, array(n)...)
			for range n {
				b = append(b, 0xa1, 0x02, 0xa1, 0x03)
				b = append(append(b, array(each)...), bytes.Repeat([]byte{0xa0}, each)...)
			}
			return b
		}
	}
	return map[string]input{
		"nothing":                             func() ([]byte, func([]byte) error) { return nil, func([]byte) error { return nil } },
		"a header of nothing":                 header(is()),
		"a header that is too large":          header(many(MaxHeader+1, 0)),
		"a header of as many lists as it can": header(many(MaxHeader, 0x81)),
		"a header that promises a long list":  header(is(0xa1, 0x08, 0x9b, 0, 0, 0, 1, 0, 0, 0, 0)),
		"a header that promises a long text":  header(is(0xa1, 0x04, 0x7b, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff)),
		"a header of empty services":          header(services(0x08, 60_000)),
		"a body of nothing":                   body(is()),
		"a body that is too large":            body(many(MaxBody+1, 0)),
		"a body of as many lists as it can":   body(many(MaxBody, 0x81)),
		"a body that promises a long list":    body(is(0xa1, 0x02, 0x9b, 0, 0, 0, 1, 0, 0, 0, 0)),
		"a body that promises long bytes":     body(is(0xa1, 0x04, 0x5b, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff)),
		"a body of empty services":            body(services(0x02, 60_000)),
		"a body of too many empty services":   body(services(0x02, 65_536)),
		"a body of empty blobs":               body(blobs(1, 60_000)),
		"a body of many lists of empty blobs": body(blobs(128, 65_000)),
	}
}

// Whatever a stranger writes into a Compose file, a header or a body: the answer is an error, soon, and in bounded memory.
func TestHostileInputTakesLittleMemory(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), self, "-test.run=^$")
	cmd.Dir = t.TempDir()
	cmd.Env = append(os.Environ(), hostileEnv+"=1")
	out, err := cmd.Output()
	if err != nil {
		var exit *exec.ExitError
		errors.As(err, &exit)
		t.Fatalf("%v behind %.300s: %.2000s", err, out[max(len(out)-300, 0):], exit.Stderr)
	}
	results := map[string][]string{}
	for line := range bytes.Lines(out) {
		var r []string
		if err := json.Unmarshal(line, &r); err != nil {
			t.Fatalf("%v: %.300s", err, line)
		}
		results[r[0]] = r
	}
	for _, name := range hostileNames() {
		t.Run(name, func(t *testing.T) {
			r := results[name]
			if r == nil {
				t.Fatal("it was not tried")
			}
			kib, err := strconv.Atoi(r[1])
			if err != nil {
				t.Fatal(err)
			}
			said := r[3]
			t.Logf("%d MiB, %s: %.200s", kib>>10, r[2], said)
			if kib>>10 > hostileLimit*memoryFactor {
				t.Errorf("it took %d MiB, at most %d are allowed", kib>>10, hostileLimit*memoryFactor)
			}
			if said == "<nil>" && !harmless(name) {
				t.Error("it was accepted")
			}
			if len(said) > 1000 || strings.Contains(said, "the file cannot be read: ") {
				t.Errorf("no clear error: %d bytes, %.300s", len(said), said)
			}
		})
	}
}

// harmless inputs are only large.
func harmless(name string) bool {
	switch name {
	case "nothing", "as many services as there can be", "variables with defaults in a row", "an env_file with variables in a row", "anchors and nothing else", "an env_file of quotes":
		return true
	}
	return false
}

// A pipe beside the Compose file holds up nobody.
func TestPipesAreNotWaitedFor(t *testing.T) {
	path := project(t, web("secrets: [s]")+"secrets: {s: {file: pipe}}\n", nil)
	if err := unix.Mkfifo(filepath.Join(filepath.Dir(path), "pipe"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(filepath.Dir(path), ".env"), 0o700); err != nil { // as some name it; it holds no variables
		t.Fatal(err)
	}
	for _, outside := range []bool{false, true} {
		if _, err := Load(t.Context(), Input{Path: path, OutsideFiles: outside}); err == nil || !strings.Contains(err.Error(), "not a regular file") {
			t.Errorf("outside %v: %v", outside, err)
		}
	}
}

// Every prefix of a header and of a body is an error, and so is every byte more.
func TestTruncatedIsRefused(t *testing.T) {
	h, _, b := vectorContract()
	raw := h.Encode()
	for i := range raw {
		if _, err := DecodeHeader(raw[:i]); err == nil {
			t.Fatalf("the first %d bytes of a header are one", i)
		}
	}
	if _, err := DecodeHeader(append(bytes.Clone(raw), 0)); err == nil {
		t.Fatal("a header with a byte more is one")
	}
	plain := canonical.Encode(b)
	for i := range plain {
		if _, err := decodeBody(plain[:i]); err == nil {
			t.Fatalf("the first %d bytes of a body are one", i)
		}
	}
	if _, err := decodeBody(append(bytes.Clone(plain), 0)); err == nil {
		t.Fatal("a body with a byte more is one")
	}
	if _, err := DecodeHeader(raw); err != nil {
		t.Fatal(err)
	}
	if _, err := decodeBody(plain); err != nil {
		t.Fatal(err)
	}
}
