// Package holdfast_test holds the repository to its own rules: who may import whom (the table in ARCHITECTURE.md), which
// room has which dependency (the tables in docs/dependencies.md), what the program may execute, and the house style as
// far as it can be decided. It parses the sources and asks no tool, so that the test cache sees what they say. Each rule
// is tried on a source that breaks it.
package holdfast_test

import (
	"bytes"
	"fmt"
	"go/ast"
	"go/parser"
	"go/printer"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// source is one Go file.
type source struct {
	path   string // from the root, with slashes
	module string // directory of its go.mod; "" is the root
	test   bool
	fset   *token.FileSet
	*ast.File
}

func (s *source) room() string { return path.Dir(s.path) }

func (s *source) at(p token.Pos) string {
	return fmt.Sprintf("%s:%d", s.path, s.fset.Position(p).Line)
}

// text is an expression as gofmt writes it.
func (s *source) text(n ast.Node) string {
	var b bytes.Buffer
	printer.Fprint(&b, s.fset, n)
	return b.String()
}

// imported returns the path of a package by the name that the file gives it, "" if it does not import it.
func (s *source) imported(name string) string {
	for _, i := range s.Imports {
		p, _ := strconv.Unquote(i.Path.Value)
		if i.Name != nil && i.Name.Name == name || i.Name == nil && path.Base(p) == name {
			return p
		}
	}
	return ""
}

func parse(t testing.TB, name, text string) *source {
	t.Helper()
	fset := token.NewFileSet()
	f, err := parser.ParseFile(fset, name, text, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	return &source{path: name, test: strings.HasSuffix(name, "_test.go"), fset: fset, File: f}
}

// repository is all Go files, and the go.mod files by directory.
func repository(t testing.TB) (files []*source, modules map[string]string) {
	t.Helper()
	modules = map[string]string{}
	err := filepath.WalkDir(".", func(p string, d fs.DirEntry, err error) error {
		name := d.Name()
		switch {
		case err != nil:
			return err
		case d.IsDir() && p != "." && (name[0] == '.' || name == "testdata" || p == "bin" || name == "out"):
			return fs.SkipDir
		case name == "go.mod":
			b, err := os.ReadFile(p)
			modules[strings.Trim(path.Dir(filepath.ToSlash(p)), ".")] = string(b)
			return err
		case strings.HasSuffix(name, ".go"):
			b, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			files = append(files, parse(t, filepath.ToSlash(p), string(b)))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		for dir := range modules {
			if strings.HasPrefix(f.path, dir+"/") && len(dir) > len(f.module) {
				f.module = dir
			}
		}
	}
	if len(files) < 50 || len(modules) < 3 || modules[""] == "" {
		t.Fatalf("found %d files and modules %v: this is not the repository", len(files), slices.Collect(maps.Keys(modules)))
	}
	return files, modules
}

// rows are the rows of the first Markdown table after a heading whose first column has that name. Cells in backquotes
// lose these.
func rows(t testing.TB, text, first string) [][]string {
	t.Helper()
	var out [][]string
	in := false
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if !strings.HasPrefix(line, "|") {
			in = false
			continue
		}
		var cells []string
		for c := range strings.SplitSeq(strings.Trim(line, "|"), "|") {
			cells = append(cells, strings.TrimSpace(c))
		}
		switch {
		case cells[0] == first:
			in = true
		case in && !strings.HasPrefix(cells[0], "---"):
			out = append(out, cells)
		}
	}
	if len(out) == 0 {
		t.Fatalf("no table that begins with %q", first)
	}
	return out
}

var quoted = regexp.MustCompile("`([^`]+)`")

// names are the words of a cell that are in backquotes.
func names(cell string) []string {
	var out []string
	for _, m := range quoted.FindAllStringSubmatch(cell, -1) {
		out = append(out, m[1])
	}
	return out
}

func read(t testing.TB, name string) string {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// rule is what a rule finds wrong, in order.
type rule func([]*source) []string

// holds checks a rule on the repository, and that it finds what is planted: each planted source, together with the
// repository, must give exactly one more finding, that has the text.
func holds(t *testing.T, files []*source, check rule, planted ...[3]string) {
	t.Helper()
	clean := check(files)
	for _, x := range clean {
		t.Error(x)
	}
	for _, p := range planted {
		got := slices.DeleteFunc(check(append(slices.Clone(files), parse(t, p[0], p[1]))), func(x string) bool { return slices.Contains(clean, x) })
		if len(got) != 1 || !strings.Contains(got[0], p[2]) {
			t.Errorf("control: planted in %s:\n%s\nfound %q, want one finding with %q", p[0], p[1], got, p[2])
		}
	}
}

// room is a row of the table of directions.
type room struct {
	may, tests []string
	all        bool // its tests may import every room
	depth      int
}

func directions(t testing.TB) map[string]room {
	text := read(t, "ARCHITECTURE.md")
	out := map[string]room{}
	for _, r := range rows(t, text, "room") {
		name := names(r[0])
		if len(name) != 1 {
			t.Fatalf("ARCHITECTURE.md: row %q", r)
		}
		x := out[name[0]]
		if n, err := strconv.Atoi(r[1]); err == nil && len(r) == 3 { // the table of rooms
			x.depth = n
		} else {
			x.may, x.tests, x.all = names(r[1]), names(r[2]), r[2] == "every room"
		}
		out[name[0]] = x
	}
	return out
}

// imports of rooms by rooms.
func imports(table map[string]room) rule {
	return func(files []*source) (bad []string) {
		for _, f := range files {
			if f.module != "" || f.room() == "." {
				continue
			}
			r, ok := table[f.room()]
			if !ok {
				bad = append(bad, fmt.Sprintf("%s: room %s is not in the table of ARCHITECTURE.md", f.path, f.room()))
				continue
			}
			for _, i := range f.Imports {
				p, _ := strconv.Unquote(i.Path.Value)
				to, ours := strings.CutPrefix(p, "holdfast/")
				if !ours || slices.Contains(r.may, to) || f.test && (r.all || slices.Contains(r.tests, to) || to == f.room()) {
					continue
				}
				bad = append(bad, fmt.Sprintf("%s: %s may not import %s", f.at(i.Pos()), f.room(), to))
			}
		}
		return bad
	}
}

func TestDirections(t *testing.T) {
	files, _ := repository(t)
	table := directions(t)
	holds(t, files, imports(table),
		[3]string{"ledger/planted.go", "package ledger\nimport _ \"holdfast/node\"", "ledger may not import node"},
		[3]string{"overlay/planted.go", "package overlay\nimport _ \"holdfast/contract\"", "overlay may not import contract"},
		[3]string{"node/planted.go", "package node\nimport _ \"holdfast/api/apitest\"", "node may not import api/apitest"},
		[3]string{"contract/planted_test.go", "package contract\nimport _ \"holdfast/node\"", "contract may not import node"},
		[3]string{"attic/planted.go", "package attic", "room attic is not in the table"},
	)
	have := map[string]bool{}
	graph := map[string][]string{}
	for _, f := range files {
		if f.module != "" {
			continue
		}
		have[f.room()] = true
		if f.test {
			continue
		}
		for _, i := range f.Imports {
			p, _ := strconv.Unquote(i.Path.Value)
			if to, ours := strings.CutPrefix(p, "holdfast/"); ours {
				graph[f.room()] = append(graph[f.room()], to)
			}
		}
	}
	var depth func(name string, above []string) int
	depth = func(name string, above []string) (n int) {
		if slices.Contains(above, name) {
			t.Fatalf("rooms import each other: %s", strings.Join(append(above, name), " → "))
		}
		for _, to := range graph[name] {
			n = max(n, depth(to, append(slices.Clone(above), name))+1)
		}
		return n
	}
	for name, r := range table {
		if !have[name] {
			t.Errorf("ARCHITECTURE.md: there is no room %s", name)
			continue
		}
		if d := depth(name, nil); d != r.depth {
			t.Errorf("ARCHITECTURE.md: %s has depth %d, it is %d", name, r.depth, d)
		}
		for _, to := range r.may {
			if !slices.Contains(graph[name], to) {
				t.Errorf("ARCHITECTURE.md: %s may import %s, and does not", name, to)
			}
		}
	}
}

// requirement is a row of docs/dependencies.md.
type requirement struct {
	version     string
	rooms, test []string // who may import it, and whose tests do
}

// listed reads the tables of docs/dependencies.md, by module.
func listed(t testing.TB) map[string]map[string]requirement {
	out := map[string]map[string]requirement{}
	dir := ""
	text := read(t, "docs/dependencies.md")
	for part := range strings.SplitSeq(text, "\n## ") {
		head, _, _ := strings.Cut(part, "\n")
		mod := names(head)
		if len(mod) != 1 || path.Base(mod[0]) != "go.mod" {
			continue
		}
		dir = strings.Trim(path.Dir(mod[0]), ".")
		out[dir] = map[string]requirement{}
		for _, r := range rows(t, part, "module") {
			if len(r) != 5 || len(names(r[0])) != 1 {
				t.Fatalf("docs/dependencies.md: row %q", r)
			}
			q := requirement{version: r[1]}
			for c := range strings.SplitSeq(r[4], ",") {
				if strings.Contains(c, "tests of") {
					q.test = append(q.test, names(c)...)
				} else {
					q.rooms = append(q.rooms, names(c)...)
				}
			}
			out[dir][names(r[0])[0]] = q
		}
	}
	return out
}

var required = regexp.MustCompile(`(?m)^(?:require)?\s+(\S+\.\S+/\S+|\S+\.\S+) (v\S+)(.*)$`)

// direct are the requirements of a go.mod that its own sources have.
func direct(mod string) map[string]string {
	out := map[string]string{}
	for _, m := range required.FindAllStringSubmatch(mod, -1) {
		if !strings.Contains(m[3], "// indirect") {
			out[m[1]] = m[2]
		}
	}
	return out
}

// foreign are imports of dependencies by rooms that the list does not name.
func foreign(list map[string]map[string]requirement) rule {
	return func(files []*source) (bad []string) {
		for _, f := range files {
			for _, i := range f.Imports {
				p, _ := strconv.Unquote(i.Path.Value)
				first, _, _ := strings.Cut(p, "/")
				if !strings.Contains(first, ".") {
					continue // the standard library, or ours
				}
				mod := ""
				for m := range list[f.module] {
					if (p == m || strings.HasPrefix(p, m+"/")) && len(m) > len(mod) {
						mod = m
					}
				}
				q := list[f.module][mod]
				switch {
				case mod == "":
					bad = append(bad, fmt.Sprintf("%s: %s is not in docs/dependencies.md", f.at(i.Pos()), p))
				case !f.test && !slices.Contains(q.rooms, f.room()): // tests may use whatever is listed
					bad = append(bad, fmt.Sprintf("%s: %s may not import %s", f.at(i.Pos()), f.room(), mod))
				}
			}
		}
		return bad
	}
}

func TestDependencies(t *testing.T) {
	if _, err := os.Stat("docs/dependencies.md"); os.IsNotExist(err) {
		t.Skip("docs/dependencies.md is not written yet")
	}
	files, modules := repository(t)
	list := listed(t)
	holds(t, files, foreign(list),
		[3]string{"ledger/planted.go", "package ledger\nimport _ \"github.com/cometbft/cometbft/types\"", "ledger may not import github.com/cometbft/cometbft"},
		[3]string{"deploy/planted.go", "package deploy\nimport _ \"github.com/compose-spec/compose-go/v2/types\"", "deploy may not import github.com/compose-spec/compose-go/v2"},
		[3]string{"sandbox/planted.go", "package sandbox\nimport _ \"gvisor.dev/gvisor/runsc/cli\"", "gvisor.dev/gvisor/runsc/cli is not in docs/dependencies.md"},
		[3]string{"node/planted.go", "package node\nimport _ \"golang.zx2c4.com/wireguard/device\"", "node may not import golang.zx2c4.com/wireguard"},
		[3]string{"gateway/planted.go", "package gateway\nimport _ \"github.com/google/nftables\"", "gateway may not import github.com/google/nftables"},
		[3]string{"contract/planted.go", "package contract\nimport _ \"github.com/fxamacker/cbor/v2\"", "contract may not import github.com/fxamacker/cbor/v2"},
		[3]string{"identity/planted_test.go", "package identity\nimport _ \"example.com/new\"", "example.com/new is not in docs/dependencies.md"},
	)
	for dir, reqs := range list {
		for m, q := range reqs {
			for _, r := range append(slices.Clone(q.rooms), q.test...) {
				if !slices.ContainsFunc(files, func(f *source) bool {
					return f.module == dir && f.room() == r && (!f.test || slices.Contains(q.test, r)) && slices.ContainsFunc(f.Imports, func(i *ast.ImportSpec) bool {
						p, _ := strconv.Unquote(i.Path.Value)
						return p == m || strings.HasPrefix(p, m+"/")
					})
				}) {
					t.Errorf("docs/dependencies.md: %s does not import %s any more", r, m)
				}
			}
		}
	}
	for dir, mod := range modules {
		have := direct(mod)
		for m, v := range have {
			switch q, ok := list[dir][m]; {
			case !ok:
				t.Errorf("docs/dependencies.md: %s of %s is not there", m, path.Join(dir, "go.mod"))
			case q.version != v:
				t.Errorf("docs/dependencies.md: %s of %s is %s, it says %s", m, path.Join(dir, "go.mod"), v, q.version)
			}
		}
		for m, q := range list[dir] {
			if have[m] == "" && (len(q.rooms)+len(q.test) > 0 || !strings.Contains(mod, m+" "+q.version)) { // a tool is required as an indirect one
				t.Errorf("docs/dependencies.md: %s %s is no direct requirement of %s", m, q.version, path.Join(dir, "go.mod"))
			}
		}
	}
	if got := direct("require (\n\tgithub.com/a/b v1.0.0\n\tc.org/d v0.0.0-2020 // indirect\n)\nrequire e.org/f v2.0.0\n"); len(got) != 2 || got["github.com/a/b"] != "v1.0.0" || got["e.org/f"] != "v2.0.0" {
		t.Errorf("control: %v", got)
	}
}

// outside are directories whose code is not part of the program: tools, tests' own programs, measurements, examples.
var outside = []string{"bench/", "tools/", "examples/", "runsc/", "internal/lab/", "internal/testimage/", "volume/gen/"}

func program(f *source) bool {
	return !f.test && !slices.ContainsFunc(outside, func(dir string) bool { return strings.HasPrefix(f.path, dir) })
}

// What executes a program, by package.
var executors = map[string][]string{
	"os/exec":               {"Command", "CommandContext", "Cmd"},
	"os":                    {"StartProcess"},
	"syscall":               {"ForkExec", "StartProcess", "Exec"},
	"golang.org/x/sys/unix": {"Exec"},
}

// executes are the places where the program executes something, and what: holdfast itself or holdfast-runsc. Where it
// comes from is in origins.
var executes = map[string]string{
	"cmd/holdfast/up.go o.Binary":     "self",
	"internal/box/box.go self[0]":     "self", // box.Plan.Self
	"internal/pid1/pid1.go d.Args[0]": "self", // box.Spec.Args, or machine's
	"internal/vm/qemu.go s.QEMU":      "qemu", // image run alone: a machine for tests
	"node/bucket.go f.self":           "self", // node.Config.Self
	"sandbox/sandbox.go argv[0]":      "self", // sandbox.Config.Self
	"sandbox/sandbox.go r.cfg.Runsc":  "runsc",
	"sandbox/shim.go s.cfg.Runsc[0]":  "runsc", // written by sandbox.go from sandbox.Config.Runsc
	"volume/volume.go m.cfg.Self[0]":  "self",
}

// origins are all values that the fields which name a program get: Self and Binary are holdfast, Runsc is
// holdfast-runsc, Args of a box.Spec is a daemon inside a box, Binaries what the box sees.
var origins = map[string]bool{
	"internal/box/init.go Args = s.Args":                                                   true,
	"machine/machine.go Args = nodeArgs(o)":                                                true,
	"cmd/holdfast/image_run.go QEMU = exec.LookPath(f.qemu)":                               true, // --qemu, the user's own word
	"cmd/holdfast/up.go Binary = os.Executable()":                                          true,
	"cmd/holdfast/up.go Binary = o.Binary":                                                 true,
	"cmd/holdfast/up.go Runsc = o.Runsc":                                                   true,
	"cmd/holdfast/up.go Runsc = filepath.Abs(o.Runsc)":                                     true,
	"cmd/holdfast/up.go Runsc = filepath.Join(filepath.Dir(o.Binary), \"holdfast-runsc\")": true,
	"cmd/holdfast/up.go &Runsc":                                                            true, // --runsc, the user's own word
	"cmd/holdfast/image.go Runsc = runsc":                                                  true, // put into an image, not executed
	"cmd/holdfast/run.go &Runsc":                                                           true, // --runsc of a daemon
	"cmd/holdfast/run.go Runsc = c.Runsc":                                                  true,
	"cmd/holdfast/run.go Self = self":                                                      true, // os.Executable, checked below
	"internal/grid/grid.go Self = []string{g.Binary, \"run\", \"init\"}":                   true,
	"internal/grid/grid.go Args = []string{\"/bin/holdfast\", \"run\", role, \"--config\", \"/etc/holdfast/config.json\"}": true,
	"internal/grid/grid.go Binaries = all":                                                           true, // /bin/holdfast and, for nodes, /bin/holdfast-runsc
	"internal/grid/grid.go Binaries = map[string]string{\"/bin/holdfast\": g.Binary}":                true,
	"internal/grid/grid.go Runsc = \"/bin/holdfast-runsc\"":                                          true,
	"node/agent.go Runsc = cfg.Runsc":                                                                true,
	"node/agent.go Self = []string{cfg.Self, \"run\", \"shim\"}":                                     true,
	"node/agent.go Self = []string{cfg.Self, \"run\", \"volume\"}":                                   true,
	"sandbox/sandbox.go Runsc = slices.Concat([]string{r.cfg.Runsc}, r.flags(b), networkFlags(oci))": true,
}

// execution finds what executes a program and is not listed, and what is listed and not there.
func execution(files []*source) (bad []string) {
	seen := map[string]bool{}
	for _, f := range files {
		if !program(f) {
			continue
		}
		for _, i := range f.Imports {
			if p, _ := strconv.Unquote(i.Path.Value); executors[p] != nil && i.Name != nil && i.Name.Name == "." {
				bad = append(bad, fmt.Sprintf("%s: a dot import hides what is executed", f.at(i.Pos())))
			}
		}
		pointed := map[ast.Expr]bool{}
		ast.Inspect(f.File, func(n ast.Node) bool {
			if star, ok := n.(*ast.StarExpr); ok {
				pointed[star.X] = true
			}
			sel, ok := n.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			pkg, ok := sel.X.(*ast.Ident)
			if !ok || !slices.Contains(executors[f.imported(pkg.Name)], sel.Sel.Name) {
				return true
			}
			if pointed[sel] {
				return true // *exec.Cmd: a type
			}
			what := executed(f, sel)
			key := f.path + " " + what
			if executes[key] == "" {
				bad = append(bad, fmt.Sprintf("%s: it executes %s with %s.%s: the program executes no other program but itself and holdfast-runsc", f.at(sel.Pos()), what, pkg.Name, sel.Sel.Name))
			}
			seen[key] = true
			return true
		})
	}
	for k := range executes {
		if !seen[k] {
			bad = append(bad, "repo_test.go: "+k+" is listed, and not executed any more")
		}
	}
	slices.Sort(bad)
	return bad
}

// executed is the program's name in a call of an executor, or the executor itself where it is no call.
func executed(f *source, sel *ast.SelectorExpr) (what string) {
	what = "something"
	ast.Inspect(f.File, func(n ast.Node) bool {
		if call, ok := n.(*ast.CallExpr); ok && call.Fun == sel {
			i := 0
			if sel.Sel.Name == "CommandContext" {
				i = 1
			}
			if len(call.Args) > i {
				what = f.text(call.Args[i])
			}
		}
		return true
	})
	return what
}

// provenance finds values of fields that name a program and are not listed.
func provenance(files []*source) (bad []string) {
	found := map[string]bool{}
	for _, f := range files {
		if !program(f) {
			continue
		}
		say := func(p token.Pos, what string) {
			key := f.path + " " + what
			found[key] = true
			if !origins[key] {
				bad = append(bad, fmt.Sprintf("%s: %s: where does that program come from?", f.at(p), what))
			}
		}
		ast.Inspect(f.File, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.CompositeLit:
				kind := ""
				if n.Type != nil {
					kind = f.text(n.Type)
				}
				for _, e := range n.Elts {
					kv, ok := e.(*ast.KeyValueExpr)
					if !ok {
						continue
					}
					if k, ok := kv.Key.(*ast.Ident); ok && isProgram(k.Name, kind, f.room()) {
						say(kv.Pos(), k.Name+" = "+f.text(kv.Value))
					}
				}
			case *ast.AssignStmt:
				for i, l := range n.Lhs {
					sel, ok := l.(*ast.SelectorExpr)
					if !ok || !slices.Contains([]string{"Runsc", "Binary", "Binaries", "QEMU"}, sel.Sel.Name) {
						continue
					}
					say(n.Pos(), sel.Sel.Name+" = "+f.text(n.Rhs[min(i, len(n.Rhs)-1)]))
				}
			case *ast.UnaryExpr:
				if sel, ok := n.X.(*ast.SelectorExpr); ok && n.Op == token.AND && slices.Contains([]string{"Runsc", "Binary", "QEMU"}, sel.Sel.Name) {
					say(n.Pos(), "&"+sel.Sel.Name)
				}
			}
			return true
		})
	}
	for k := range origins {
		if !found[k] {
			bad = append(bad, "repo_test.go: "+k+" is listed, and not there any more")
		}
	}
	slices.Sort(bad)
	return bad
}

// isProgram says whether a field of a composite literal names a program. Self and Args are fields of other types too.
func isProgram(field, kind, room string) bool {
	switch field {
	case "Runsc", "Binary", "Binaries", "QEMU":
		return true
	case "Self":
		return slices.Contains([]string{"box.Plan", "sandbox.Config", "volume.Config", "node.Config", "Plan", "Config"}, kind) && room != "overlay"
	case "Args":
		return kind == "box.Spec" || kind == "Spec" && room == "internal/box" || kind == "pid1.Daemon"
	}
	return false
}

func TestNothingElseIsExecuted(t *testing.T) {
	files, _ := repository(t)
	const exec = "package %s\nimport \"os/exec\"\nfunc f() { exec.Command(%s) }"
	holds(t, files, execution,
		[3]string{"volume/planted.go", fmt.Sprintf(exec, "volume", `"mkfs.ext4"`), `it executes "mkfs.ext4"`},
		[3]string{"contract/planted.go", fmt.Sprintf(exec, "contract", `"sh", "-c", "true"`), `it executes "sh"`},
		[3]string{"node/planted.go", "package node\nimport x \"os/exec\"\nfunc f() { x.CommandContext(nil, \"ip\") }", `it executes "ip"`},
		[3]string{"node/planted.go", "package node\nimport \"os/exec\"\nvar c = exec.Cmd{Path: \"/bin/ip\"}", "it executes something with exec.Cmd"},
		[3]string{"node/planted.go", "package node\nimport \"os/exec\"\nvar f = exec.Command", "it executes something with exec.Command"},
		[3]string{"overlay/planted.go", "package overlay\nimport \"syscall\"\nfunc f() { syscall.ForkExec(\"/sbin/nft\", nil, nil) }", `it executes "/sbin/nft"`},
		[3]string{"store/planted.go", "package store\nimport \"os\"\nfunc f() { os.StartProcess(\"/bin/cp\", nil, nil) }", `it executes "/bin/cp"`},
		[3]string{"sandbox/planted.go", "package sandbox\nimport \"golang.org/x/sys/unix\"\nfunc f() { unix.Exec(\"/bin/sh\", nil, nil) }", `it executes "/bin/sh"`},
		[3]string{"node/planted.go", "package node\nimport . \"os/exec\"", "a dot import hides"},
	)
	holds(t, files, provenance,
		[3]string{"machine/planted.go", "package machine\nimport \"holdfast/internal/pid1\"\nvar d = pid1.Daemon{Args: []string{\"/bin/sh\"}}", `Args = []string{"/bin/sh"}`},
		[3]string{"cmd/holdfast/planted.go", "package main\nimport \"holdfast/internal/vm\"\nvar s = vm.Spec{QEMU: \"/bin/sh\"}", `QEMU = "/bin/sh"`},
		[3]string{"node/planted.go", "package node\nimport \"holdfast/sandbox\"\nvar c = sandbox.Config{Runsc: \"/usr/bin/runc\"}", `Runsc = "/usr/bin/runc"`},
		[3]string{"node/planted.go", "package node\nimport \"holdfast/volume\"\nvar c = volume.Config{Self: []string{\"/bin/sh\"}}", `Self = []string{"/bin/sh"}`},
		[3]string{"internal/grid/planted.go", "package grid\nimport \"holdfast/internal/box\"\nvar c = box.Spec{Args: []string{\"/bin/sh\"}}", `Args = []string{"/bin/sh"}`},
		[3]string{"internal/grid/planted.go", "package grid\nfunc f(g *Grid) { g.Binary = \"/bin/sh\" }", `Binary = "/bin/sh"`},
		[3]string{"cmd/holdfast/planted.go", "package main\nfunc f(g *T, p func(*string)) { p(&g.Binary) }", "&Binary"},
	)
	// The one local variable of the list: what runNode calls self is the program.
	if !regexp.MustCompile(`self, err := os\.Executable\(\)`).MatchString(read(t, "cmd/holdfast/run.go")) {
		t.Error("cmd/holdfast/run.go: self is not os.Executable")
	}
}

// comments finds packages that do not say what they do.
func comments(files []*source) (bad []string) {
	said := map[string]string{}
	name := map[string]string{}
	for _, f := range files {
		if f.test && f.room() != "." {
			continue
		}
		dir := f.room()
		name[dir] = f.Name.Name
		if f.Doc != nil {
			said[dir] += f.Doc.Text()
		}
	}
	for dir, n := range name {
		begin := "Package " + n + " "
		if n == "main" {
			begin = "Command " + path.Base(dir) + " "
			if dir == "runsc" {
				begin = "Command holdfast-runsc "
			}
		}
		text := said[dir]
		switch {
		case text == "":
			bad = append(bad, dir+": the package has no comment")
		case !strings.HasPrefix(text, begin):
			bad = append(bad, fmt.Sprintf("%s: the package comment begins with %.20q, not with %q", dir, text, begin))
		case len(strings.Fields(text)) < 8:
			bad = append(bad, fmt.Sprintf("%s: the package comment does not say what it does: %q", dir, text))
		}
	}
	slices.Sort(bad)
	return bad
}

func TestPackageComments(t *testing.T) {
	files, _ := repository(t)
	holds(t, files, comments,
		[3]string{"attic/a.go", "package attic", "attic: the package has no comment"},
		[3]string{"attic/a.go", "// Attic keeps what nobody needs any more, for as long as there is room.\npackage attic", "begins with"},
		[3]string{"attic/a.go", "// Package attic is the attic.\npackage attic", "does not say what it does"},
		[3]string{"cmd/attic/main.go", "// Package main keeps what nobody needs any more, for as long as there is room.\npackage main", `not with "Command attic "`},
	)
}

// mutable finds init functions, and package variables that are written, or made to be.
func mutable(files []*source) (bad []string) {
	type variable struct{ dir, name string }
	vars := map[variable]bool{}
	for _, f := range files {
		if !program(f) {
			continue
		}
		for _, d := range f.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil && fn.Name.Name == "init" {
				bad = append(bad, f.at(fn.Pos())+": an init function")
			}
			g, ok := d.(*ast.GenDecl)
			if !ok || g.Tok != token.VAR {
				continue
			}
			for _, s := range g.Specs {
				v := s.(*ast.ValueSpec)
				for i, n := range v.Names {
					if n.Name == "_" {
						continue
					}
					vars[variable{f.room(), n.Name}] = true
					var value ast.Expr
					if i < len(v.Values) {
						value = v.Values[i]
					}
					if why := changing(f, v.Type, value); why != "" {
						bad = append(bad, fmt.Sprintf("%s: package variable %s is %s", f.at(n.Pos()), n.Name, why))
					}
				}
			}
		}
	}
	for _, f := range files {
		if !program(f) {
			continue
		}
		written := func(e ast.Expr, how string) {
			id := root(e)
			// An identifier that the parser resolved within the file to something else is another variable.
			if id == nil || !vars[variable{f.room(), id.Name}] {
				return
			}
			if id.Obj != nil {
				if spec, ok := id.Obj.Decl.(*ast.ValueSpec); !ok || !topLevel(f, spec) {
					return
				}
			}
			bad = append(bad, fmt.Sprintf("%s: package variable %s is %s", f.at(e.Pos()), id.Name, how))
		}
		ast.Inspect(f.File, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.AssignStmt:
				for _, l := range n.Lhs {
					if n.Tok != token.DEFINE {
						written(l, "written")
					}
				}
			case *ast.IncDecStmt:
				written(n.X, "written")
			case *ast.UnaryExpr:
				if n.Op == token.AND {
					written(n.X, "pointed to")
				}
			case *ast.RangeStmt:
				if n.Tok == token.ASSIGN {
					written(n.Key, "written")
				}
			case *ast.CallExpr:
				if id, ok := n.Fun.(*ast.Ident); ok && len(n.Args) > 0 && slices.Contains([]string{"delete", "clear", "copy"}, id.Name) {
					written(n.Args[0], "written")
				}
			}
			return true
		})
	}
	slices.Sort(bad)
	return bad
}

// changing says what makes a variable one that is there to change.
func changing(f *source, kind, value ast.Expr) string {
	if kind != nil {
		switch text := f.text(kind); {
		case strings.HasPrefix(text, "chan "), strings.HasPrefix(text, "map[") && value == nil, strings.HasPrefix(text, "*"):
			return "a " + text
		case strings.HasPrefix(text, "sync.") && text != "sync.Pool", strings.HasPrefix(text, "atomic."):
			return "a " + text
		}
	}
	switch v := value.(type) {
	case *ast.CompositeLit:
		if _, isMap := v.Type.(*ast.MapType); isMap && len(v.Elts) == 0 {
			return "an empty map"
		}
		if text := f.text(v.Type); strings.HasPrefix(text, "sync.") && text != "sync.Pool" || strings.HasPrefix(text, "atomic.") {
			return "a " + text
		}
	case *ast.CallExpr:
		if id, ok := v.Fun.(*ast.Ident); ok && (id.Name == "make" || id.Name == "new") {
			return "made with " + id.Name
		}
	case *ast.UnaryExpr:
		if v.Op == token.AND {
			return "a pointer"
		}
	}
	return ""
}

// root is the variable of x, x.f, x[i], *x.
func root(e ast.Expr) *ast.Ident {
	for {
		switch x := e.(type) {
		case *ast.Ident:
			return x
		case *ast.SelectorExpr:
			e = x.X
		case *ast.IndexExpr:
			e = x.X
		case *ast.StarExpr:
			e = x.X
		case *ast.ParenExpr:
			e = x.X
		default:
			return nil
		}
	}
}

func topLevel(f *source, spec *ast.ValueSpec) bool {
	for _, d := range f.Decls {
		if g, ok := d.(*ast.GenDecl); ok && g.Tok == token.VAR && slices.Contains(g.Specs, ast.Spec(spec)) {
			return true
		}
	}
	return false
}

func TestNoMutableGlobals(t *testing.T) {
	files, _ := repository(t)
	holds(t, files, mutable,
		[3]string{"ca/planted.go", "package ca\nfunc init() {}", "an init function"},
		[3]string{"ca/planted.go", "package ca\nvar count int\nfunc f() { count++ }", "package variable count is written"},
		[3]string{"ca/planted.go", "package ca\nvar table = []int{1, 2}\nfunc f() { table[0] = 3 }", "package variable table is written"},
		[3]string{"ca/planted.go", "package ca\nvar x struct{ n int }\nfunc f() *int { return &x.n }", "package variable x is pointed to"},
		[3]string{"ca/planted.go", "package ca\nvar cache = map[string]int{}", "package variable cache is an empty map"},
		[3]string{"ca/planted.go", "package ca\nvar jobs = make(chan int)", "made with make"},
		[3]string{"ca/planted.go", "package ca\nimport \"sync\"\nvar mu sync.Mutex", "a sync.Mutex"},
		[3]string{"ca/planted.go", "package ca\nvar t = map[int]int{1: 2}\nfunc f() { delete(t, 1) }", "package variable t is written"},
	)
	// What looks alike and is not.
	ok := parse(t, "ca/planted.go", "package ca\nimport \"errors\"\nvar (\n\tErrX = errors.New(\"x\")\n\ttable = []int{1}\n)\nfunc f() int { table := []int{2}; table[0] = 3; var ErrX int; ErrX++; return table[0] }")
	if got := mutable([]*source{ok}); len(got) > 0 {
		t.Errorf("control: %v", got)
	}
}

// surroundings finds readers of flags and environment beside the program's own.
func surroundings(files []*source) (bad []string) {
	for _, f := range files {
		if !program(f) || f.room() == "cmd/holdfast" {
			continue
		}
		for _, i := range f.Imports {
			if p, _ := strconv.Unquote(i.Path.Value); p == "flag" || p == "C" || p == "plugin" {
				bad = append(bad, fmt.Sprintf("%s: %s imports %s", f.at(i.Pos()), f.room(), p))
			}
		}
		ast.Inspect(f.File, func(n ast.Node) bool {
			sel, ok := n.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			if id, ok := sel.X.(*ast.Ident); ok && f.imported(id.Name) == "os" && slices.Contains([]string{"Getenv", "LookupEnv", "Environ", "ExpandEnv", "Args", "Exit"}, sel.Sel.Name) {
				bad = append(bad, fmt.Sprintf("%s: os.%s: cmd/holdfast alone reads flags and environment, and ends the process", f.at(sel.Pos()), sel.Sel.Name))
			}
			return true
		})
	}
	return bad
}

func TestOnlyTheProgramReadsItsSurroundings(t *testing.T) {
	files, _ := repository(t)
	holds(t, files, surroundings,
		[3]string{"node/planted.go", "package node\nimport \"os\"\nvar d = os.Getenv(\"DEBUG\")", "os.Getenv"},
		[3]string{"store/planted.go", "package store\nimport \"flag\"\nvar d = flag.Bool(\"d\", false, \"\")", "store imports flag"},
		[3]string{"seal/planted.go", "package seal\nimport \"os\"\nfunc f() { os.Exit(1) }", "os.Exit"},
	)
}

// deterministic are the rooms whose answers every validator must find alike. Time, randomness, disk and network come in
// as arguments.
var deterministic = []string{"schedule", "ledger", "internal/canonical"}

func clockless(files []*source) (bad []string) {
	forbidden := map[string][]string{
		"time": {"Now", "Since", "Until", "After", "AfterFunc", "Sleep", "NewTimer", "NewTicker", "Tick"},
		"net":  {"Dial", "DialTimeout", "Listen", "LookupHost", "LookupIP", "Dialer", "Resolver"},
	}
	for _, f := range files {
		if !slices.Contains(deterministic, f.room()) || f.test {
			continue
		}
		for _, i := range f.Imports {
			p, _ := strconv.Unquote(i.Path.Value)
			if slices.Contains([]string{"os", "crypto/rand", "math/rand", "math/rand/v2", "net/http", "math"}, p) {
				bad = append(bad, fmt.Sprintf("%s: %s is deterministic and imports %s", f.at(i.Pos()), f.room(), p))
			}
		}
		ast.Inspect(f.File, func(n ast.Node) bool {
			if sel, ok := n.(*ast.SelectorExpr); ok {
				if id, ok := sel.X.(*ast.Ident); ok && slices.Contains(forbidden[f.imported(id.Name)], sel.Sel.Name) {
					bad = append(bad, fmt.Sprintf("%s: %s is deterministic and uses %s.%s", f.at(sel.Pos()), f.room(), id.Name, sel.Sel.Name))
				}
			}
			if b, ok := n.(*ast.Ident); ok && (b.Name == "float64" || b.Name == "float32") {
				bad = append(bad, fmt.Sprintf("%s: %s is deterministic and computes with %s", f.at(b.Pos()), f.room(), b.Name))
			}
			return true
		})
	}
	return bad
}

func TestDeterministicRooms(t *testing.T) {
	files, _ := repository(t)
	holds(t, files, clockless,
		[3]string{"schedule/planted.go", "package schedule\nimport \"math/rand/v2\"\nvar n = rand.N(3)", "imports math/rand/v2"},
		[3]string{"ledger/planted.go", "package ledger\nimport \"time\"\nfunc f() time.Time { return time.Now() }", "uses time.Now"},
		[3]string{"ledger/planted.go", "package ledger\nimport \"net\"\nfunc f() { net.Dial(\"tcp\", \"\") }", "uses net.Dial"},
		[3]string{"schedule/planted.go", "package schedule\nfunc f(a int) bool { return float64(a) > 0.3 }", "computes with float64"},
	)
}

var (
	mention = regexp.MustCompile(`\b(docs/[a-z0-9/_-]+\.md)\b`)
	link    = regexp.MustCompile(`\]\(([^)#:]+)(#[^)]*)?\)`)
)

// TestLinks follows what comments and documents refer to.
func TestLinks(t *testing.T) {
	files, _ := repository(t)
	broken := func(where, to string) bool {
		_, err := os.Stat(filepath.FromSlash(path.Join(where, to)))
		return err != nil
	}
	for _, f := range files {
		for _, g := range f.Comments {
			for _, m := range mention.FindAllStringSubmatch(g.Text(), -1) {
				if broken(".", m[1]) {
					t.Errorf("%s: %s is not there", f.at(g.Pos()), m[1])
				}
			}
		}
	}
	n := 0
	err := filepath.WalkDir(".", func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() && p != "." && d.Name()[0] == '.' {
			return errorOr(err, fs.SkipDir)
		}
		if filepath.Ext(p) != ".md" {
			return nil
		}
		for _, m := range link.FindAllStringSubmatch(read(t, p), -1) {
			n++
			if broken(path.Dir(filepath.ToSlash(p)), m[1]) {
				t.Errorf("%s: a link to %s leads nowhere", p, m[1])
			}
		}
		return nil
	})
	if err != nil || n < 5 {
		t.Errorf("%d links, %v", n, err)
	}
	if !broken(".", "docs/no-such-file.md") || broken("docs", "../README.md") {
		t.Error("control: a link that leads nowhere is not found, or one that leads somewhere is")
	}
}

var named = regexp.MustCompile("`([a-z][a-z0-9/]*)\\.(Test[A-Za-z0-9]+)(?:/([^`]+))?`")

// unknownTests are tests that a document names and that are not there. A part of a test is named by words in its source.
func unknownTests(files []*source, text string) (bad []string) {
	have, texts := map[string]bool{}, map[string]string{}
	for _, f := range files {
		if !f.test {
			continue
		}
		for _, d := range f.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil {
				have[f.room()+"."+fn.Name.Name] = true
			}
		}
		ast.Inspect(f.File, func(n ast.Node) bool {
			if l, ok := n.(*ast.BasicLit); ok && l.Kind == token.STRING {
				if v, err := strconv.Unquote(l.Value); err == nil {
					texts[f.room()] += "\n" + v
				}
			}
			return true
		})
	}
	for _, m := range named.FindAllStringSubmatch(text, -1) {
		if !have[m[1]+"."+m[2]] {
			bad = append(bad, fmt.Sprintf("%s.%s is not there", m[1], m[2]))
		} else if m[3] != "" && !strings.Contains(texts[m[1]], m[3]) {
			bad = append(bad, fmt.Sprintf("%s.%s has no part %q", m[1], m[2], m[3]))
		}
	}
	return bad
}

// TestClaimsHaveTheirTests holds documents to the tests that they name.
func TestClaimsHaveTheirTests(t *testing.T) {
	files, _ := repository(t)
	for _, doc := range []string{"ARCHITECTURE.md", "docs/threat-model.md"} {
		text := read(t, doc)
		if n := len(named.FindAllString(text, -1)); n < 10 {
			t.Errorf("%s names %d tests", doc, n)
		}
		for _, x := range unknownTests(files, text) {
			t.Errorf("%s: %s", doc, x)
		}
	}
	got := unknownTests(files, "`ledger.TestNothing` `ledger.TestLostNode` `internal/lab.TestGrid/1 scans find nothing` `internal/lab.TestGrid/9 the moon`")
	if len(got) != 2 || got[0] != "ledger.TestNothing is not there" || got[1] != `internal/lab.TestGrid has no part "9 the moon"` {
		t.Errorf("control: %q", got)
	}
}

func errorOr(err, otherwise error) error {
	if err != nil {
		return err
	}
	return otherwise
}
