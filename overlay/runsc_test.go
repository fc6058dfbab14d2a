package overlay

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestInSandbox is what TestSandboxReachesPeer runs inside gVisor: look up the peer, fetch, echo, answer a call.
func TestInSandbox(t *testing.T) {
	server, peer := os.Getenv("HF_OVERLAY_DNS"), os.Getenv("HF_OVERLAY_PEER")
	if server == "" {
		t.Skip("runs only as a child of TestSandboxReachesPeer")
	}
	var got []netip.Addr
	var err error
	if !soon(10*time.Second, func() bool {
		got, err = lookup("", netip.MustParseAddr(server), "db")
		return err == nil && len(got) == 1
	}) {
		t.Fatalf("db: %v, %v", got, err)
	}
	if got[0].String() != peer {
		t.Fatalf("db is %v, want %s", got, peer)
	}
	c, err := greet("", netip.AddrPortFrom(got[0], 80), "hi", 10*time.Second)
	must(t, err)
	big := strings.Repeat("0123456789abcdef", 1<<16)
	go io.WriteString(c, big)
	back := make([]byte, len(big))
	_, err = io.ReadFull(c, back)
	must(t, err)
	if string(back) != big {
		t.Fatal("the echo differs")
	}
	l, err := net.Listen("tcp6", "[::]:81")
	must(t, err)
	fmt.Println("sandbox is listening")
	for range 2 {
		in, err := l.Accept()
		must(t, err)
		io.WriteString(in, "from the sandbox")
		must(t, in.(*net.TCPConn).CloseWrite())
		io.Copy(io.Discard, in) // the caller may be slow: it has read all when it closes
		in.Close()
	}
}

func TestSandboxReachesPeer(t *testing.T) {
	runsc, err := filepath.Abs("../bin/holdfast-runsc")
	must(t, err)
	if _, err := os.Stat(runsc); err != nil {
		t.Skip("holdfast-runsc is not built")
	}
	l := newLab(t, 2)
	var ms []*member
	for _, b := range l.boxes {
		must(t, Firewall{Main: b.ns}.Apply())
		ms = append(ms, b.join("gvisor", 30030))
	}
	ns, addr := ms[0].attach("w")
	pb, b := ms[1].attach("peer")
	mesh(t, ms...)
	ms[0].SetNames(map[string][]netip.Addr{"db": {b}})
	listen(t, pb, netip.AddrPortFrom(b, 80), "hi")

	exe, err := os.Executable()
	must(t, err)
	bundle := t.TempDir()
	spec, err := json.Marshal(map[string]any{
		"ociVersion": "1.0.0",
		"process": map[string]any{
			"user": map[string]any{"uid": 0, "gid": 0}, "cwd": "/",
			"args": []string{exe, "-test.run=^TestInSandbox$", "-test.v"},
			"env":  []string{"HF_OVERLAY_DNS=" + ms[0].cfg.Self.String(), "HF_OVERLAY_PEER=" + b.String(), "PATH=/bin"},
		},
		"root":   map[string]any{"path": "/", "readonly": true},
		"mounts": []any{map[string]any{"destination": "/proc", "type": "proc"}},
		"linux":  map[string]any{"namespaces": []any{map[string]any{"type": "network", "path": ns}, map[string]any{"type": "pid"}, map[string]any{"type": "mount"}, map[string]any{"type": "ipc"}, map[string]any{"type": "uts"}}},
	})
	must(t, err)
	must(t, os.WriteFile(filepath.Join(bundle, "config.json"), spec, 0o600))
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	root := t.TempDir()
	t.Cleanup(func() { removeNamespace(filepath.Join(root, "null-netns")) }) // runsc leaves it mounted
	c := exec.CommandContext(ctx, runsc, "--root="+root, "--network=sandbox", "--platform=systrap", "--ignore-cgroups", "run", "--bundle="+bundle, "hfov")
	t.Cleanup(func() { exec.Command(runsc, "--root="+root, "delete", "--force", "hfov").Run() })
	out, err := c.StdoutPipe()
	must(t, err)
	c.Stderr = c.Stdout
	must(t, c.Start())
	seen, buf := "", make([]byte, 4096)
	for !strings.Contains(seen, "sandbox is listening") {
		n, err := out.Read(buf)
		seen += string(buf[:n])
		if err != nil {
			c.Wait()
			t.Fatalf("sandbox: %v\n%s", err, seen)
		}
	}
	at := netip.AddrPortFrom(addr, 81)
	for name, call := range map[string]func() (net.Conn, error){
		"its node": func() (net.Conn, error) { return ms[0].Dial(ctx, at) },
		"a peer":   func() (net.Conn, error) { return dial(pb, at, 5*time.Second) },
	} {
		conn, err := call()
		if err != nil {
			t.Fatalf("from %s: %v", name, err)
		}
		got, _ := io.ReadAll(conn)
		if string(got) != "from the sandbox" {
			t.Errorf("from %s: %q", name, got)
		}
		conn.Close()
	}
	rest, _ := io.ReadAll(out)
	if err := c.Wait(); err != nil {
		t.Errorf("sandbox: %v\n%s%s", err, seen, rest)
	}
}
