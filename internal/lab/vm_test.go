package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"holdfast/internal/box"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

const booted = `
name: store
services:
  db:
    image: oci:img
    cpus: 1.5
    mem_limit: 96m
    environment: {SECRET: ` + envMarker + `}
    volumes: [data:/data]
    x-holdfast: {placement: {nodes: [vm-1]}}
volumes:
  data:
    x-holdfast: {size: 64MiB}
x-holdfast:
  routes:
    - {host: db.localhost, service: db, port: 8080}
`

// TestBootedNode boots the image of a node in an emulated machine. Validator and gateway are processes in boxes, and there
// is no other node.
func TestBootedNode(t *testing.T) {
	if testing.Short() {
		t.Skip("a machine that boots takes minutes")
	}
	l := New(t, "--nodes", "0")
	m := &bootable{l: l, image: filepath.Join(l.App, "image"), disk: filepath.Join(l.App, "vm", "disk.img"), said: filepath.Join(l.App, "console")}
	if err := os.Mkdir(filepath.Dir(m.disk), 0o700); err != nil {
		t.Fatal(err)
	}
	l.Run("image", "build", "--out", m.image)
	m.lan = l.Attacker(1, 13)
	t.Cleanup(func() {
		m.cut()
		if m.knocks != nil {
			m.knocks.cancel()
			m.knocks.group.Wait()
		}
		if t.Failed() {
			t.Logf("the machine's console:\n%s", m.console())
		}
	})
	for _, part := range []struct {
		name string
		f    func(*testing.T, *Lab, *bootable)
	}{
		{"the image holds two programs and no shell", twoPrograms},
		{"a machine asks, and is admitted by its ID", admitted},
		{"a workload runs on it", runsOnIt},
		{"scans find nothing", scansOfIt},
		{"its disk shows nothing", diskOfIt},
		{"it survives a hard power cut", powerCut},
		{"its memory is bounded", boundedMemory},
		{"it never answered anybody", neverAnswered},
		{"its kernel had nothing to complain of", quietKernel},
	} {
		if !t.Run(part.name, func(t *testing.T) {
			was := l.T
			l.T = t
			defer func() { l.T = was }()
			part.f(t, l, m)
		}) {
			break // the rest needs it
		}
	}
}

// bootable is a machine that image run boots.
type bootable struct {
	l                 *Lab
	image, disk, said string
	run               *exec.Cmd
	lan               box.Box
	knocks            *knocks
}

func (m *bootable) boot() {
	m.l.T.Helper()
	out, err := os.OpenFile(m.said, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		m.l.T.Fatal(err)
	}
	defer out.Close()
	m.run = exec.Command(m.l.bin, "--dir", m.l.Dir, "image", "run", m.image, "--qemu", "--disk", m.disk, "--size", "1GiB")
	m.run.Stdout, m.run.Stderr = out, out
	if err := m.run.Start(); err != nil {
		m.l.T.Fatal(err)
	}
}

// cut pulls the plug: image run is killed, and QEMU dies with it in the middle of whatever it does.
func (m *bootable) cut() {
	if m.run == nil {
		return
	}
	m.run.Process.Kill()
	m.run.Wait()
	m.run = nil
	m.l.Until("QEMU's end", func() bool { return !running(m.disk) })
}

// running says whether a process has a word on its command line.
func running(word string) bool {
	all, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, p := range all {
		if b, err := os.ReadFile(p); err == nil && strings.Contains(string(b), "qemu") && strings.Contains(string(b), word) {
			return true
		}
	}
	return false
}

func (m *bootable) console() string {
	b, _ := os.ReadFile(m.said)
	return string(b)
}

func twoPrograms(t *testing.T, l *Lab, m *bootable) {
	type report struct {
		Executables []struct{ Path string }
		Problems    []string
	}
	show := func(path string) (r report, err error) {
		out, err := l.Try("image", "show", path, "--json")
		if e := json.Unmarshal([]byte(out), &r); e != nil {
			t.Fatalf("%v: %s", e, out)
		}
		return r, err
	}
	r, err := show(m.image)
	if err != nil || len(r.Problems) > 0 {
		t.Fatalf("%v: %v", err, r.Problems)
	}
	var paths []string
	for _, e := range r.Executables {
		paths = append(paths, strings.TrimPrefix(e.Path, "/"))
	}
	slices.Sort(paths)
	if want := []string{"bin/holdfast", "bin/holdfast-runsc"}; !slices.Equal(paths, want) {
		t.Errorf("executables %v, want %v", paths, want)
	}
	// The control: a busybox under an innocent name, in an archive behind the image's, which a kernel unpacks too.
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatal(err)
	}
	initramfs, err := os.ReadFile(filepath.Join(m.image, "initramfs"))
	if err != nil {
		t.Fatal(err)
	}
	planted := filepath.Join(l.App, "planted")
	if err := os.WriteFile(planted, append(initramfs, newc("lib/modules/loop2.ko", 0o100444, busybox)...), 0o600); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(planted)
	if r, err := show(planted); err == nil || len(r.Executables) != 3 || !strings.Contains(strings.Join(r.Problems, "\n"), "loop2.ko") {
		t.Errorf("control: the planted busybox is not found: %v, %+v", err, r.Problems)
	}
}

// newc is a cpio archive of one file (the kernel's Documentation/driver-api/early-userspace/buffer-format.rst).
func newc(name string, mode int, data []byte) []byte {
	var b bytes.Buffer
	add := func(name string, mode int, data []byte) {
		fmt.Fprintf(&b, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00", 1, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0, name)
		b.Write(make([]byte, -b.Len()&3))
		b.Write(data)
		b.Write(make([]byte, -b.Len()&3))
	}
	add(name, mode, data)
	add("TRAILER!!!", 0, nil)
	return b.Bytes()
}

var nodeID = regexp.MustCompile(`node=(node1[a-z0-9]{50,})`)

func admitted(t *testing.T, l *Lab, m *bootable) {
	m.knocks = knock(m.lan, l.Topology().Addresses(box.Uplink{Segment: 1, Host: 14})[1].Addr())
	m.boot()
	var id string
	l.Within(2*time.Minute, "the machine's ID on its console", func() bool {
		if x := nodeID.FindStringSubmatch(m.console()); x != nil && strings.Contains(m.console(), "waits to be approved") {
			id = x[1]
		}
		return id != ""
	})
	l.Until("its wish", func() bool { return strings.Contains(l.Run("node", "list", "--pending", "--json"), id) })
	if strings.Contains(l.Run("node", "list"), id) {
		t.Fatal("it is a node before anybody admitted it")
	}
	if out, err := l.Try("node", "approve", "vm-1", "--yes"); err == nil {
		t.Errorf("it was admitted by a name that anybody can claim: %s", out)
	}
	l.Run("node", "approve", id, "--yes")
	l.Until("the ledger's hearing it", func() bool { return l.node("vm-1").State == "up" })
}

func runsOnIt(t *testing.T, l *Lab, m *bootable) {
	path := filepath.Join(l.App, "booted.yaml")
	if err := os.WriteFile(path, []byte(booted), 0o600); err != nil {
		t.Fatal(err)
	}
	l.Run("deploy", path, "--yes", "--wait", "--timeout", "150s")
	if got := l.Get("db.localhost", "/"); !strings.Contains(got, "hello from db-0") {
		t.Fatalf("through the gateway: %q", got)
	}
	if got := l.Get("db.localhost", "/env"); !strings.Contains(got, envMarker) {
		t.Errorf("environment: %q", got)
	}
	if out, err := l.Curl("db.localhost", "/file?path=/data/x", "--data-binary", dataMarker); err != nil {
		t.Fatalf("write to the volume: %v %s", err, out)
	}
	if w := l.Workload("store/db-0"); w.Node != "vm-1" || w.State != "running" {
		t.Errorf("%+v", w)
	}
	if strings.Contains(m.console(), envMarker) || strings.Contains(m.console(), dataMarker) {
		t.Error("the console, which the farmer reads, shows what belongs to the workload")
	}
}

// addresses of the machine, as the ledger has them.
func (m *bootable) addresses() (out []netip.Addr) {
	m.l.T.Helper()
	var nodes []struct {
		Name      string
		Endpoints []string
	}
	if err := json.Unmarshal([]byte(m.l.Run("node", "list", "--json")), &nodes); err != nil {
		m.l.T.Fatal(err)
	}
	for _, n := range nodes {
		for _, e := range n.Endpoints {
			out = append(out, netip.MustParseAddr(e))
		}
	}
	if len(out) != 2 {
		m.l.T.Fatalf("nodes %+v: want one with an IPv6 and an IPv4 address", nodes)
	}
	return out
}

func scansOfIt(t *testing.T, l *Lab, m *bootable) {
	outside := l.Box("outside")
	planted := []uint16{22, 1723, 60001}
	plant(t, outside, planted...)
	var controls errgroup.Group
	for _, p := range l.Topology().Addresses(box.Uplink{Segment: 12, Host: 2}) {
		for _, udp := range []bool{false, true} {
			controls.Go(func() error {
				_, missing, err := scanFor(m.lan, p.Addr(), udp, fast/4, planted)
				if len(missing) > 0 {
					t.Errorf("control (%v, UDP: %v): %v are not found", p.Addr(), udp, missing)
				}
				return err
			})
		}
	}
	if err := controls.Wait(); err != nil {
		t.Fatal(err)
	}
	for _, a := range m.addresses() {
		for _, udp := range []bool{false, true} {
			// An emulated machine takes few packets a second; those that did not reach it prove nothing.
			for pace := fast / 4; ; pace /= 2 {
				before := l.arrived()
				got, _, err := scanFor(m.lan, a, udp, pace, nil)
				if err != nil {
					t.Fatal(err)
				}
				if len(got) > 0 {
					t.Errorf("the machine (%v, UDP: %v) answers: %v", a, udp, got)
				}
				if n := l.arrived() - before; n >= 65000 {
					break
				} else if pace < 1000 {
					t.Fatalf("the machine (%v, UDP: %v): only %d of 65536 probes reached it", a, udp, n)
				}
			}
		}
		// And by the tool that everybody has, with the ports that it knows.
		if out := nmap(t, m.lan, a); regexp.MustCompile(`(?m)^\d+/tcp +open|closed`).MatchString(out) {
			t.Errorf("nmap finds: %s", out)
		}
	}
	for _, p := range l.Topology().Addresses(box.Uplink{Segment: 12, Host: 2}) {
		if out := nmap(t, m.lan, p.Addr()); !regexp.MustCompile(`(?m)^22/tcp +open`).MatchString(out) || !regexp.MustCompile(`(?m)^1723/tcp +open`).MatchString(out) {
			t.Errorf("control: nmap does not find what is there: %s", out)
		}
	}
}

func nmap(t *testing.T, from box.Box, target netip.Addr) string {
	t.Helper()
	args := []string{"nmap", "-n", "-Pn", "-sS", "--min-rate", "500", "--max-retries", "2"}
	if target.Is6() {
		args = append(args, "-6")
	}
	out, err := In(from, append(args, target.String())...)
	if err != nil || !strings.Contains(out, "Nmap done") {
		t.Fatalf("nmap of %v: %v: %s", target, err, out)
	}
	return out
}

// arrived counts the packets that the emulated machine has taken from its cable.
func (l *Lab) arrived() int {
	l.T.Helper()
	var links []struct {
		Stats64 struct{ TX struct{ Packets int } }
	}
	out, err := In(l.Box("internet"), "ip", "-j", "-s", "link", "show", "t1-14")
	if err == nil {
		err = json.Unmarshal([]byte(out), &links)
	}
	if err != nil || len(links) != 1 {
		l.T.Fatalf("the machine's cable: %v: %s", err, out)
	}
	return links[0].Stats64.TX.Packets
}

func boundedMemory(t *testing.T, l *Lab, m *bootable) {
	was := len(m.console())
	l.Curl("db.localhost", "/alloc?mib=110", "--max-time", "100")
	l.Within(30*time.Second, "its end for want of memory", func() bool {
		return strings.Contains(m.console()[was:], `reason="out of memory"`)
	})
}

func diskOfIt(t *testing.T, l *Lab, m *bootable) {
	// What the guest has written is in the file, but for what it still has in memory.
	b, err := os.ReadFile(m.disk)
	if err != nil {
		t.Fatal(err)
	}
	for _, marker := range []string{envMarker, dataMarker} {
		for form, want := range Forms(marker) {
			if bytes.Contains(b, want) {
				t.Errorf("the machine's disk shows %q, %s", marker, form)
			}
		}
	}
	// The controls: it is this disk, it has been written to, and the node's name for the grid's genesis is found in the clear.
	if !bytes.Contains(b, []byte("genesis")) {
		t.Error("control: the disk shows nothing at all")
	}
}

func powerCut(t *testing.T, l *Lab, m *bootable) {
	if out, err := l.Curl("db.localhost", "/file?path=/data/y", "--data-binary", "just before the cut"); err != nil {
		t.Fatalf("write to the volume: %v %s", err, out)
	}
	was := l.Workload("store/db-0")
	m.cut()
	l.Until("the ledger's missing it", func() bool { return l.node("vm-1").State == "down" })
	m.boot()
	l.Within(2*time.Minute, "the workload after the power cut", func() bool { return strings.Contains(l.Get("db.localhost", "/"), "hello from db-0") })
	for path, want := range map[string]string{"/data/x": dataMarker, "/data/y": "just before the cut"} {
		if got := l.Get("db.localhost", "/file?path="+path); got != want {
			t.Errorf("%s after the power cut: %q, want %q", path, got, want)
		}
	}
	if w := l.Workload("store/db-0"); w.Node != "vm-1" || w.Epoch != was.Epoch {
		t.Errorf("was %+v, is %+v: a volume's workload waits for its node", was, w)
	}
}

var complaint = regexp.MustCompile(`(?m)^\[ *[0-9.]+\] .*`)

func quietKernel(t *testing.T, l *Lab, m *bootable) {
	for _, line := range complaint.FindAllString(m.console(), -1) {
		if !strings.Contains(line, "Memory cgroup out of memory") {
			t.Errorf("the kernel says: %s", line)
		}
	}
}

// knocks is a stranger on the farm's LAN who tries to connect all the time, from before the machine is switched on: a machine
// that is shut only after its cable is up refuses some of it, which is an answer.
type knocks struct {
	cancel         func()
	group          errgroup.Group
	tried, dropped int
	answers        []string
}

func knock(from box.Box, to netip.Addr) *knocks {
	ctx, cancel := context.WithCancel(context.Background())
	k := &knocks{cancel: cancel}
	k.group.Go(func() error {
		return box.Within(from.NetNS(), func() error {
			for port := uint16(1); ctx.Err() == nil; port = port%1024 + 1 {
				k.tried++
				c, err := net.DialTimeout("tcp", netip.AddrPortFrom(to, port).String(), 150*time.Millisecond)
				switch timeout := (net.Error)(nil); {
				case err == nil:
					c.Close()
					k.answers = append(k.answers, fmt.Sprintf("port %d is open", port))
				case errors.Is(err, unix.ECONNREFUSED):
					k.answers = append(k.answers, fmt.Sprintf("port %d refuses", port))
				case errors.As(err, &timeout) && timeout.Timeout():
					k.dropped++
				}
			}
			return nil
		})
	})
	return k
}

func neverAnswered(t *testing.T, l *Lab, m *bootable) {
	m.knocks.cancel()
	if err := m.knocks.group.Wait(); err != nil {
		t.Fatal(err)
	}
	if len(m.knocks.answers) > 0 || m.knocks.dropped < 20 {
		t.Errorf("of %d knocks %d were dropped, and answered: %v", m.knocks.tried, m.knocks.dropped, m.knocks.answers)
	}
	// The control: a machine that is not shut answers the same knock.
	k := knock(m.lan, l.Topology().Addresses(box.Uplink{Segment: 12, Host: 2})[1].Addr())
	time.Sleep(time.Second)
	k.cancel()
	k.group.Wait()
	if len(k.answers) == 0 {
		t.Errorf("control: %d knocks at a machine that is not shut, and no answer", k.tried)
	}
}
