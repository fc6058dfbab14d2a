// Package lab runs whole grids for tests, on this machine, with the programs that users run: bin/holdfast up and the
// commands beside it, and the static test server as the workload. It is only imported by tests.
package lab

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"holdfast/internal/box"
	"holdfast/internal/testimage"

	"golang.org/x/sys/unix"
)

// Lab is a grid that runs.
type Lab struct {
	T      testing.TB
	Dir    string // the grid's, as in --dir
	App    string // where Compose files and the test image are
	Listen string
	bin    string
}

// New starts a grid, with more arguments of up, and ends it, with everything in it, when the test ends.
func New(t testing.TB, up ...string) *Lab {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	bin, err := filepath.Abs("../../bin/holdfast")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(bin); err != nil {
		t.Fatalf("%v: run make build first", err)
	}
	// A short path: names of sockets and mounts derive from it.
	top, err := os.MkdirTemp("", "hflab")
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := &Lab{T: t, Dir: filepath.Join(top, "grid"), App: filepath.Join(top, "app"), Listen: ln.Addr().String(), bin: bin}
	ln.Close()
	t.Cleanup(func() {
		if t.Failed() {
			l.dump()
		}
		if out, err := l.Try("down", "--data"); err != nil {
			t.Errorf("down: %v: %s", err, out)
		}
		os.RemoveAll(top)
	})
	img, err := testimage.Server(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if err := img.WriteLayout(filepath.Join(l.App, "img")); err != nil {
		t.Fatal(err)
	}
	l.Run(append([]string{"up", "--detach", "--listen", l.Listen, "--delay", "1s"}, up...)...)
	return l
}

// dump shows what a failed test leaves behind.
func (l *Lab) dump() {
	if out, err := l.Try("status"); err == nil {
		l.T.Logf("status:\n%s", out)
	}
	logs, _ := filepath.Glob(filepath.Join(l.Dir, "log", "*.log"))
	size := map[string]int64{}
	for _, p := range logs {
		b, _ := os.ReadFile(p)
		size[p] = int64(len(b))
		if len(b) > 4000 {
			b = b[len(b)-4000:]
		}
		l.T.Logf("the end of %s:\n%s", filepath.Base(p), b)
	}
	// Asked with SIGQUIT, a daemon writes its goroutines to its log and ends.
	boxes, _ := box.Running(l.Dir)
	for name, b := range boxes {
		p := filepath.Join(l.Dir, "log", name+".log")
		for _, role := range []string{"node", "validator", "gateway"} {
			for _, pid := range Processes(b, "/bin/holdfast run "+role) {
				unix.Kill(pid, unix.SIGQUIT)
				for range 50 {
					if err := unix.Kill(pid, 0); err != nil {
						break
					}
					time.Sleep(20 * time.Millisecond)
				}
				raw, _ := os.ReadFile(p)
				l.T.Logf("goroutines of %s:\n%s", name, raw[min(size[p], int64(len(raw))):])
			}
		}
	}
}

// Try runs a holdfast command and returns what it said.
func (l *Lab) Try(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, l.bin, append([]string{"--dir", l.Dir}, args...)...)
	cmd.Dir = l.App
	if _, err := os.Stat(l.App); err != nil {
		cmd.Dir = "/"
	}
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("holdfast %s: %w: %s", strings.Join(args, " "), err, errs.String())
	}
	return out.String(), nil
}

// Run is Try that must succeed.
func (l *Lab) Run(args ...string) string {
	l.T.Helper()
	out, err := l.Try(args...)
	if err != nil {
		l.T.Fatal(err)
	}
	return out
}

// Deploy writes a Compose file and deploys it.
func (l *Lab) Deploy(name, compose string) {
	l.T.Helper()
	path := filepath.Join(l.App, name+".yaml")
	if err := os.WriteFile(path, []byte(compose), 0o600); err != nil {
		l.T.Fatal(err)
	}
	l.Run("deploy", path, "--yes", "--wait", "--timeout", "90s")
}

// Workload is one of status's.
type Workload struct {
	Name, ID, Node, State, Reason string
	Epoch                         uint64
	Restarts                      int
	Saved                         *time.Time
	Unsaved                       string
}

// Node is one of status's.
type Node struct{ ID, Name, Farm, State, Lease string }

// Status is what holdfast status --json says.
type Status struct {
	Nodes     []Node
	Workloads []Workload
	Contracts []struct{ ID, Name, State string }
	Routes    []struct{ Host, URL, State string }
	Blobs     struct {
		Scheme                    string
		Locations, Farms, Waiting int
		Reason                    string
	}
}

// Status asks the grid.
func (l *Lab) Status() (Status, error) {
	var s Status
	out, err := l.Try("status", "--json")
	if err != nil {
		return s, err
	}
	return s, json.Unmarshal([]byte(out), &s)
}

// Workload returns one by name, "contract/service-replica".
func (l *Lab) Workload(name string) Workload {
	s, err := l.Status()
	if err != nil {
		return Workload{}
	}
	for _, w := range s.Workloads {
		if w.Name == name {
			return w
		}
	}
	return Workload{}
}

// Until polls until f is true, for a minute at most.
func (l *Lab) Until(what string, f func() bool) {
	l.T.Helper()
	l.Within(time.Minute, what, f)
}

// Within polls until f is true, for so long at most.
func (l *Lab) Within(limit time.Duration, what string, f func() bool) {
	l.T.Helper()
	for end := time.Now().Add(limit); !f(); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(end) {
			l.T.Fatalf("%s did not come within %v", what, limit)
		}
	}
}

// Get asks a route through the gateway, with the user's CA; "" when it does not answer well.
func (l *Lab) Get(host, path string) string {
	out, _ := l.Curl(host, path)
	return out
}

// Curl asks a route with further arguments of curl.
func (l *Lab) Curl(host, path string, args ...string) (string, error) {
	ca := filepath.Join(l.App, "ca.pem")
	if _, err := os.Stat(ca); errors.Is(err, fs.ErrNotExist) {
		if err := os.WriteFile(ca, []byte(l.Run("ca")), 0o644); err != nil {
			return "", err
		}
	}
	_, port, _ := net.SplitHostPort(l.Listen)
	args = append([]string{"-sS", "--fail", "--max-time", "10", "--cacert", ca, "--connect-to", host + ":443:127.0.0.1:" + port}, args...)
	cmd := exec.Command("curl", append(args, "https://"+host+path)...)
	out, err := cmd.Output()
	return string(out), err
}

// Box is one of the grid's machines.
func (l *Lab) Box(name string) box.Box {
	l.T.Helper()
	all, err := box.Running(l.Dir)
	if err != nil {
		l.T.Fatal(err)
	}
	b, ok := all[name]
	if !ok {
		l.T.Fatalf("box %s does not run", name)
	}
	return b
}

// Topology is the grid's little internet.
func (l *Lab) Topology() *box.Topology { return &box.Topology{Router: l.Box("internet")} }

// Attacker puts a machine of a stranger on a segment, and takes it away when the test ends.
func (l *Lab) Attacker(segment, host int) box.Box {
	l.T.Helper()
	b, err := box.Start([]string{l.bin, "run", "init"}, box.Spec{Name: "attacker", Uplink: &box.Uplink{Segment: segment, Host: host}}, l.Topology())
	if err != nil {
		l.T.Fatal(err)
	}
	l.T.Cleanup(func() { b.Kill("") })
	l.Until("the attacker's address", func() bool {
		out, err := In(b, "ip", "-6", "route", "show", "default")
		return err == nil && strings.Contains(out, "via")
	})
	return b
}

// In runs a program of the host in a box's network.
func In(b box.Box, args ...string) (string, error) {
	cmd := exec.Command("nsenter", append([]string{"--net=" + b.NetNS()}, args...)...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// Processes lists the processes of a box whose command line holds a text, by their IDs on the host.
func Processes(b box.Box, text string) []int {
	ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", b.PID))
	if err != nil {
		return nil
	}
	var out []int
	all, _ := filepath.Glob("/proc/[0-9]*")
	for _, p := range all {
		if n, err := os.Readlink(p + "/ns/pid"); err != nil || n != ns {
			continue
		}
		cmd, _ := os.ReadFile(p + "/cmdline")
		if strings.Contains(strings.ReplaceAll(string(cmd), "\x00", " "), text) {
			pid, _ := strconv.Atoi(filepath.Base(p))
			out = append(out, pid)
		}
	}
	return out
}

// Forms are the shapes in which a marker might lie somewhere.
func Forms(m string) map[string][]byte {
	var wide, back []byte
	for i := range m {
		wide = append(wide, m[i], 0)
		back = append(back, m[len(m)-1-i])
	}
	b64 := base64.StdEncoding.EncodeToString([]byte(m))
	return map[string][]byte{"plain": []byte(m), "hex": []byte(hex.EncodeToString([]byte(m))), "base64": []byte(b64[:len(b64)/4*4-4]), "utf-16": wide, "reversed": back}
}

// Search looks for a marker in every file under a directory, and returns where it is.
func Search(dir, marker string) ([]string, error) {
	var found []string
	forms := Forms(marker)
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		for form, want := range forms {
			if bytes.Contains(b, want) {
				found = append(found, form+" in "+p)
			}
		}
		return nil
	})
	return found, err
}

// node returns one of status's nodes by name.
func (l *Lab) node(name string) Node {
	s, err := l.Status()
	if err != nil {
		return Node{}
	}
	for _, n := range s.Nodes {
		if n.Name == name {
			return n
		}
	}
	return Node{}
}
