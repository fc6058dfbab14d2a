package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// TestEveryCommandIsExplained walks the tree of commands, and plants one that is not.
func TestEveryCommandIsExplained(t *testing.T) {
	root := newRoot(&app{})
	if got := unexplained(root); len(got) > 0 {
		t.Errorf("%s", strings.Join(got, "\n"))
	}
	planted := &cobra.Command{Use: "planted FILE", RunE: func(*cobra.Command, []string) error { return nil }}
	planted.Flags().Bool("quietly", false, "")
	root.AddCommand(planted)
	want := []string{"holdfast planted: no example", "holdfast planted: no short text", "holdfast planted: --quietly has no usage", "holdfast planted: no check of its arguments"}
	got := unexplained(root)
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("control: a planted command is found to lack %q, want %q", got, want)
	}
}

// bareFlag is the line of a flag without usage: nothing follows its name and type.
var bareFlag = regexp.MustCompile(`^ *(?:-\w, )?--([a-z0-9-]+)(?: \S+)?\s*$`)

func unexplained(c *cobra.Command) (out []string) {
	say := func(format string, args ...any) { out = append(out, c.CommandPath()+": "+fmt.Sprintf(format, args...)) }
	if c.Short == "" {
		say("no short text")
	}
	if strings.HasSuffix(c.Short, ".") {
		say("the short text ends with a period")
	}
	leaf := !c.HasSubCommands()
	if leaf && !c.Hidden && !strings.Contains(c.Example, c.CommandPath()) {
		say("no example")
	}
	if leaf && c.Args == nil {
		say("no check of its arguments")
	}
	if !c.Runnable() {
		say("it does nothing")
	}
	for line := range strings.Lines(c.LocalFlags().FlagUsages()) { // "  -y, --yes   do not ask"
		if m := bareFlag.FindStringSubmatch(line); m != nil {
			say("--%s has no usage", m[1])
		}
	}
	for _, sub := range c.Commands() {
		if sub.Name() == "completion" {
			continue // cobra's own, but for the examples
		}
		out = append(out, unexplained(sub)...)
	}
	return out
}

// TestNames holds the commands to those of the design.
func TestNames(t *testing.T) {
	root := newRoot(&app{})
	for _, path := range []string{
		"up", "down", "doctor", "status", "plan", "deploy", "logs", "ca", "version", "completion bash", "completion zsh", "completion fish",
		"run validator", "run node", "run gateway", "contract list", "contract show", "contract history", "contract cancel", "contract diff", "contract rollback", "contract proposals", "contract approve", "contract withdraw", "contract pause", "contract resume", "contract restore", "volume list", "volume snapshots", "volume restore", "template list", "template show", "template publish", "account show", "account create", "account policy", "node list", "ledger show", "image build", "image show", "image run",
		"lab kill", "lab pause", "lab resume", "lab cut",
		"run s3", "run location", "store status", "store scrub", "store audit", "store repair", "store rotate", "store user list", "store user add", "store user rotate", "store user remove",
		"store policy list", "store policy show", "store policy set", "store policy remove", "location list", "location add", "location drain", "location undrain", "location remove", "restore store",
	} {
		c, rest, err := root.Find(strings.Fields(path))
		if err != nil || len(rest) > 0 || c.CommandPath() != "holdfast "+path {
			t.Errorf("holdfast %s is not there: %v", path, err)
		}
	}
}

// A machine that has everything, in a directory.
func fullHost(t *testing.T) host {
	t.Helper()
	dir := t.TempDir()
	for name, text := range map[string]string{
		"dev/fuse": "", "dev/loop-control": "", "proc/sys/kernel/osrelease": "6.1.0-18-amd64\n", "proc/filesystems": "nodev\ttmpfs\nnodev\toverlay\n\text4\n",
		"sys/fs/cgroup/cgroup.controllers": "cpuset cpu io memory pids\n", "bin/holdfast-runsc": "#!",
	} {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return host{
		root: dir, arch: "amd64", self: filepath.Join(dir, "bin", "holdfast"), dir: filepath.Join(dir, "no", "grid"), listen: "127.0.0.1:0", memory: 8 << 30, files: 1 << 16,
		free: func(string) (uint64, error) { return 100 << 30, nil }, try: func() trial { return trial{} },
	}
}

func TestDoctor(t *testing.T) {
	missing := func(h host) []string {
		var out []string
		for _, c := range examine(h) {
			if c.OK {
				if c.Problem != "" || c.Mend != "" {
					t.Errorf("%s is ok, and it says %q", c.Name, c.Problem)
				}
				continue
			}
			if c.Problem == "" || c.Mend == "" {
				t.Errorf("%s is missing, and it does not say why or how to get it: %+v", c.Name, c)
			}
			out = append(out, c.Name)
		}
		return out
	}
	if got := missing(fullHost(t)); len(got) > 0 {
		t.Fatalf("a machine that has everything lacks %v", got)
	}
	rm := func(names ...string) func(*host) {
		return func(h *host) {
			for _, n := range names {
				if err := os.RemoveAll(filepath.Join(h.root, n)); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	write := func(name, text string) func(*host) {
		return func(h *host) {
			p := filepath.Join(h.root, name)
			if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	no := errors.New("operation not permitted")
	for _, x := range []struct {
		name  string
		spoil func(*host)
		want  []string
	}{
		{"a user", func(h *host) { h.uid = 1000 }, []string{"root", "namespaces", "overlay mounts", "veth and bridges", "TUN", "nf_tables with NAT"}},
		{"another architecture", func(h *host) { h.arch = "arm64" }, []string{"x86-64"}},
		{"an old kernel", write("proc/sys/kernel/osrelease", "5.10.0-28-amd64\n"), []string{"kernel 5.12"}},
		{"a kernel of the next age", write("proc/sys/kernel/osrelease", "10.0.1\n"), nil},
		{"no runsc", rm("bin/holdfast-runsc"), []string{"holdfast-runsc beside holdfast"}},
		{"a runsc that is no program", write("bin/holdfast-runsc", ""), nil}, // the mode stays
		{"no FUSE", rm("dev/fuse"), []string{"FUSE"}},
		{"no loop devices", rm("dev/loop-control"), []string{"loop devices"}},
		{"no ext4", write("proc/filesystems", "nodev\ttmpfs\nnodev\toverlay\n"), []string{"ext4 file system"}},
		{"no overlay", write("proc/filesystems", "nodev\ttmpfs\n\text4\n"), []string{"overlay file system"}},
		{"version 2 without pids", write("sys/fs/cgroup/cgroup.controllers", "cpu memory\n"), []string{"control group: pids"}},
		{"no control groups", rm("sys/fs/cgroup"), []string{"control group: memory", "control group: cpu", "control group: pids", "control group: freezer"}},
		{"version 1", func(h *host) {
			rm("sys/fs/cgroup/cgroup.controllers")(h)
			for _, c := range []string{"memory", "cpu", "pids", "freezer"} {
				write("sys/fs/cgroup/"+c+"/cgroup.procs", "")(h)
			}
		}, nil},
		{"version 1 without the freezer", func(h *host) {
			rm("sys/fs/cgroup/cgroup.controllers")(h)
			for _, c := range []string{"memory", "cpu", "pids"} {
				write("sys/fs/cgroup/"+c+"/cgroup.procs", "")(h)
			}
		}, []string{"control group: freezer"}},
		{"no namespaces", func(h *host) { h.try = func() trial { return trial{no, no, no, no, no} } }, []string{"namespaces", "overlay mounts", "veth and bridges", "TUN", "nf_tables with NAT"}},
		{"no overlay mounts", func(h *host) { h.try = func() trial { return trial{overlayfs: no} } }, []string{"overlay mounts"}},
		{"no veth", func(h *host) { h.try = func() trial { return trial{links: no} } }, []string{"veth and bridges"}},
		{"no TUN", func(h *host) { h.try = func() trial { return trial{tun: no} } }, []string{"TUN"}},
		{"no nf_tables", func(h *host) { h.try = func() trial { return trial{firewall: no} } }, []string{"nf_tables with NAT"}},
		{"little memory", func(h *host) { h.memory = 1 << 30 }, []string{"memory"}},
		{"few open files", func(h *host) { h.files = 1024 }, []string{"open files"}},
		{"an address that is none", func(h *host) { h.listen = "nowhere" }, []string{"listening on nowhere"}},
	} {
		h := fullHost(t)
		x.spoil(&h)
		if got := missing(h); !slices.Equal(got, x.want) {
			t.Errorf("%s: it lacks %q, want %q", x.name, got, x.want)
		}
	}
	full := fullHost(t)
	full.free = func(dir string) (uint64, error) {
		if dir != full.root {
			t.Errorf("asked for the disk of %s, the grid's first directory that is there is %s", dir, full.root)
		}
		return 1 << 20, nil
	}
	if got := missing(full); !slices.Equal(got, []string{"disk at " + full.root}) {
		t.Errorf("a full disk: it lacks %q", got)
	}
}

// TestDoctorLeavesNothing tries the real thing where that is allowed.
func TestDoctorLeavesNothing(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	spaces := func() string {
		var out []string
		for _, ns := range []string{"net", "mnt", "uts", "ipc"} {
			to, err := os.Readlink("/proc/self/ns/" + ns)
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, to)
		}
		return strings.Join(out, " ")
	}
	before := spaces()
	for range 20 { // also when it begins on the first thread, which cannot end
		if tr := attempt(); tr.namespaces != nil {
			t.Fatalf("control: nothing was tried: %v", tr.namespaces)
		}
	}
	if now := spaces(); now != before {
		t.Errorf("the process is elsewhere: %s → %s", before, now)
	}
	if b, err := os.ReadFile("/proc/self/mountinfo"); err != nil || bytes.Contains(b, []byte("holdfast-doctor-")) {
		t.Errorf("mounts: %v\n%s", err, b)
	}
	if b, err := os.ReadFile("/proc/self/net/dev"); err != nil || regexp.MustCompile(`\bhf[0-3]:`).Match(b) {
		t.Errorf("interfaces: %v\n%s", err, b)
	}
	if left, _ := filepath.Glob(filepath.Join(os.TempDir(), "holdfast-doctor-*")); len(left) > 0 {
		t.Errorf("doctor left %v", left)
	}
}

func TestPrintable(t *testing.T) {
	for in, want := range map[string]string{
		"plain text\twith a tab":   "plain text\twith a tab",
		"\x1b[31mred\x1b[0m":       "[31mred[0m",
		"bell\a, title\x1b]0;x\a":  "bell, title]0;x",
		"over\rwritten\b":          "overwritten",
		"c1 \u009b31m":             "c1 31m",
		"turned \u202eround\u2066": "turned round",
		"grüße 世界 🙂":               "grüße 世界 🙂",
		"two\nlines":               "twolines",
	} {
		if got := printable([]byte(in)); got != want {
			t.Errorf("%q shows as %q, want %q", in, got, want)
		}
	}
}

func TestErrorsCannotSpeakToTheTerminal(t *testing.T) {
	var b bytes.Buffer
	(&app{}).complain(&b, nil, errors.New("node says \x1b[2J\nsecond line"), 1)
	if got := b.String(); got != "holdfast: node says [2J\nsecond line\n" {
		t.Errorf("%q", got)
	}
}

func TestTable(t *testing.T) {
	var b strings.Builder
	table(&b, []string{"NAME", "STATE", "REASON"}, []string{"grüße", "\x1b[32mup\x1b[0m", ""}, []string{"x", "\x1b[31mfailed\x1b[0m", "out of memory"})
	want := "NAME   STATE   REASON\ngrüße  \x1b[32mup\x1b[0m\nx      \x1b[31mfailed\x1b[0m  out of memory\n"
	if b.String() != want {
		t.Errorf("got\n%q\nwant\n%q", b.String(), want)
	}
}

func TestLinesStayWhole(t *testing.T) {
	var b bytes.Buffer
	w := &lineWriter{w: &b}
	one, two := w.of("web-0", "web-0 | "), w.of("web-1", "web-1 | ")
	io.WriteString(one, "hel")
	io.WriteString(two, "first\nsec")
	io.WriteString(one, "lo\n")
	io.WriteString(one, "\x1b[2Jno end")
	one.Close()
	two.Close()
	if got := b.String(); got != "web-1 | first\nweb-0 | hello\nweb-0 | [2Jno end\nweb-1 | sec\n" {
		t.Errorf("%q", got)
	}
	b.Reset()
	long := w.of("", "")
	for range 3 {
		io.WriteString(long, strings.Repeat("x", maxLine/2+1))
	}
	if n := bytes.IndexByte(b.Bytes(), '\n'); n != maxLine {
		t.Errorf("a line without end is cut at %d, want %d", n, maxLine)
	}
	b.Reset()
	js := (&lineWriter{w: &b, json: true}).of("web-0", "")
	io.WriteString(js, "a \"line\"\n")
	var got struct{ Workload, Line string }
	if err := json.Unmarshal(b.Bytes(), &got); err != nil || got.Workload != "web-0" || got.Line != `a "line"` {
		t.Errorf("%s: %+v %v", b.Bytes(), got, err)
	}
}

func TestProgressWithoutATerminal(t *testing.T) {
	var b bytes.Buffer
	p := newProgress(&b)
	for _, s := range []string{"one", "one", "two"} {
		p.say("%s", s)
	}
	p.done()
	if b.String() != "one\ntwo\n" {
		t.Errorf("%q", b.String())
	}
}

// terminalPair is a pseudo-terminal of 40 columns: the end of the person, and the end of the program.
func terminalPair(t *testing.T) (person, program *os.File) {
	t.Helper()
	m, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("no pseudo-terminals: %v", err)
	}
	t.Cleanup(func() { m.Close() })
	if err := unix.IoctlSetPointerInt(int(m.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(m.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	s, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	if err := unix.IoctlSetWinsize(int(s.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: 40}); err != nil {
		t.Fatal(err)
	}
	return m, s
}

func TestProgressOnATerminal(t *testing.T) {
	person, program := terminalPair(t)
	p := newProgress(program)
	p.say("short")
	p.say("%s", strings.Repeat("long ", 20))
	p.done()
	program.WriteString("end\n")
	got, err := until(person, "end")
	if err != nil {
		t.Fatal(err)
	}
	want := "\r\x1b[Kshort\r\x1b[K" + strings.Repeat("long ", 20)[:38] + "…\r\x1b[Kend"
	if got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

// until reads what a terminal shows up to a text.
func until(f *os.File, end string) (string, error) {
	var out []byte
	b := make([]byte, 4096)
	if err := f.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		return "", err
	}
	for {
		if i := bytes.Index(out, []byte(end)); i >= 0 {
			return string(out[:i+len(end)]), nil
		}
		n, err := f.Read(b)
		if err != nil {
			return "", fmt.Errorf("terminal: %w after %q", err, out)
		}
		out = append(out, b[:n]...)
	}
}

// TestColours runs the program on a terminal, in a file, and where no colours are wanted.
func TestColours(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	program := func(out *os.File, env ...string) *exec.Cmd {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		t.Cleanup(cancel)
		cmd := exec.CommandContext(ctx, self, "doctor", "--listen", "127.0.0.1:0")
		cmd.Args[0], cmd.Stdout, cmd.Env = "holdfast", out, append(os.Environ(), append([]string{"HOLDFAST_DIR=" + t.TempDir(), "NO_COLOR="}, env...)...)
		return cmd
	}
	for name, x := range map[string]struct {
		env  []string
		want bool
	}{"on a terminal": {[]string{"TERM=xterm"}, true}, "on a terminal with NO_COLOR": {[]string{"TERM=xterm", "NO_COLOR=1"}, false}, "on one that cannot": {[]string{"TERM=dumb"}, false}} {
		person, tty := terminalPair(t)
		cmd := program(tty, x.env...)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		got, err := until(person, "listening on")
		if err != nil || strings.Contains(got, "\x1b[") != x.want {
			t.Errorf("%s: colours should be %v: %q %v", name, x.want, got, err)
		}
		cmd.Wait()
	}
	f, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	program(f, "TERM=xterm").Run()
	b, err := os.ReadFile(f.Name())
	if err != nil || !bytes.Contains(b, []byte("listening on")) || bytes.Contains(b, []byte("\x1b[")) {
		t.Errorf("in a file: %q %v", b, err)
	}
}

// TestInterruptedQuestion interrupts while a passphrase is asked for: the terminal shows again what is typed.
func TestInterruptedQuestion(t *testing.T) {
	person, tty := terminalPair(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	echo := func() bool {
		s, err := unix.IoctlGetTermios(int(tty.Fd()), unix.TCGETS)
		if err != nil {
			t.Fatal(err)
		}
		return s.Lflag&unix.ECHO != 0
	}
	if !echo() {
		t.Fatal("control: a new terminal does not echo")
	}
	cmd := exec.Command(self, "question")
	cmd.Args[0], cmd.Stdin, cmd.Stderr, cmd.Stdout = "holdfast-asks", tty, tty, tty
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := until(person, "secret?"); err != nil {
		t.Fatal(err)
	}
	for echo() {
		time.Sleep(time.Millisecond) // the question comes before the silence
	}
	if err := cmd.Process.Signal(unix.SIGINT); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil || cmd.ProcessState.ExitCode() != exitInterrupted {
		t.Errorf("it ends with %v", err)
	}
	if !echo() {
		t.Error("the terminal does not show what is typed any more")
	}
}
