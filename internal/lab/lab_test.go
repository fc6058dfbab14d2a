package lab

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"holdfast/internal/box"

	"golang.org/x/sys/unix"
)

// Markers that must show up nowhere but where they belong.
const (
	envMarker  = "kZ4-marker-in-the-environment"
	fileMarker = "kZ4-marker-in-a-secret-file"
	dataMarker = "kZ4-marker-in-a-volume"
	wireMarker = "kZ4-marker-on-the-wire"
)

const stateful = `
name: store
services:
  web:
    image: oci:img
    environment: {GREETING: web}
    healthcheck: {test: [CMD, /server, health], interval: 2s}
    x-holdfast: {placement: {nodes: [node-1]}}
  db:
    image: oci:img
    environment: {SECRET: ` + envMarker + `}
    secrets: [pw]
    volumes: [data:/data]
    healthcheck: {test: [CMD, /server, health], interval: 2s}
    x-holdfast: {placement: {nodes: [node-2]}}
secrets:
  pw: {file: pw}
volumes:
  data:
    x-holdfast: {size: 64MiB}
x-holdfast:
  routes:
    - {host: web.localhost, service: web, port: 8080}
    - {host: db.localhost, service: db, port: 8080}
`

const stateless = `
name: free
services:
  web:
    image: oci:img
    environment: {GREETING: free}
    healthcheck: {test: [CMD, /server, health], interval: 2s}
x-holdfast:
  routes: [{host: free.localhost, service: web, port: 8080}]
`

func TestGrid(t *testing.T) {
	if testing.Short() {
		t.Skip("a whole grid takes minutes")
	}
	l := New(t)
	if err := os.WriteFile(filepath.Join(l.App, "pw"), []byte(fileMarker), 0o600); err != nil {
		t.Fatal(err)
	}
	l.Deploy("store", stateful)
	l.Deploy("free", stateless)
	if out, err := l.Curl("db.localhost", "/file?path=/data/x", "--data-binary", dataMarker); err != nil {
		t.Fatalf("write to the volume: %v %s", err, out)
	}
	for _, part := range []struct {
		name string
		f    func(*testing.T, *Lab)
	}{
		{"what runs sees what it was given", sees},
		{"deploying again changes nothing", again},
		{"a bad revision is rolled back", rolledBack},
		{"blobs are dispersed", dispersed},
		{"1 scans find nothing", scans},
		{"2 the wire shows nothing", wire},
		{"3 a workload reaches its own contract only", reach},
		{"5 a node's disk shows nothing", disk},
		{"5 with the key file it shows everything", keyOpens},
		{"6 a workload that ends starts again", endedWorkload},
		{"6 a killed agent moves and restarts nothing", killedAgent},
		{"6 a paused node wakes late", pausedNode},
		{"6 a lost node's work moves, and a volume's waits", lostNode},
		{"a volume follows its workload", volumeFollows},
		{"6 validator and gateway come back", killedServers},
		{"6 everything at once", everything},
		{"blobs outlive a farm and the validator's directory", blobsOutlive},
		{"a bucket outlives the node that serves it", bucketOutlives},
		{"4 a tampered image starts nothing", tampered},
		{"PocketBase keeps what it is told", pocketBase},
		{"2 the reader is served from nodes that nobody can listen to", reader},
		{"logs reach the owner and nobody else", logs},
		{"a cancelled contract ends", cancelled},
	} {
		if !t.Run(part.name, func(t *testing.T) {
			was := l.T
			l.T = t
			defer func() { l.T = was }()
			part.f(t, l)
		}) && t.Failed() {
			continue
		}
	}
}

func sees(t *testing.T, l *Lab) {
	if got := l.Get("db.localhost", "/env"); !strings.Contains(got, envMarker) {
		t.Errorf("environment: %q", got)
	}
	if got := l.Get("db.localhost", "/file?path=/run/secrets/pw"); got != fileMarker {
		t.Errorf("secret: %q", got)
	}
	if got := l.Get("db.localhost", "/file?path=/data/x"); got != dataMarker {
		t.Errorf("volume: %q", got)
	}
	if got := l.Get("web.localhost", "/get?url=http://db:8080/"); !strings.Contains(got, "hello from db-0") {
		t.Errorf("over the mesh, by name: %q", got)
	}
	if got := l.Get("web.localhost", "/get?url=http://db.store.internal:8080/"); !strings.Contains(got, "hello from db-0") {
		t.Errorf("over the mesh, by full name: %q", got)
	}
}

func again(t *testing.T, l *Lab) {
	if out := l.Run("deploy", filepath.Join(l.App, "free.yaml"), "--yes"); !strings.Contains(out, "nothing changes") {
		t.Errorf("%s", out)
	}
}

// wire moves a marker between nodes and through the gateway.
func wire(t *testing.T, l *Lab) {
	captured := l.Capture()
	if out, err := l.Curl("db.localhost", "/file?path=/tmp/wire", "--data-binary", strings.Repeat(wireMarker+" ", 200)); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	for range 5 { // between nodes over the mesh, and through the gateway to the user
		if got := l.Get("web.localhost", "/get?url=http://db:8080/file?path=/tmp/wire"); !strings.Contains(got, wireMarker) {
			t.Fatalf("the marker was not sent: %q", got)
		}
	}
	l.hidden(captured)
}

func reach(t *testing.T, l *Lab) {
	top := l.Topology()
	node := top.Addresses(box.Uplink{Segment: 1, Host: 2})
	lan := l.Attacker(1, 12)
	err := box.Within(lan.NetNS(), func() error { // somebody who would answer
		ln, err := net.Listen("tcp", "[::]:80")
		if err != nil {
			return err
		}
		t.Cleanup(func() { ln.Close() })
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	dial := func(network, addr string) bool {
		_, err := l.Curl("web.localhost", "/dial?net="+network+"&addr="+addr)
		return err == nil
	}
	if !dial("tcp", "db:8080") {
		t.Error("control: it does not reach its own contract")
	}
	other := strings.TrimSpace(l.Get("free.localhost", "/lookup?name=web"))
	if !strings.HasPrefix(other, "fd") {
		t.Fatalf("the other contract's address: %q", other)
	}
	lanAddrs := top.Addresses(box.Uplink{Segment: 1, Host: 12})
	validator := top.Addresses(box.Uplink{Segment: 11, Host: 2})
	for name, addr := range map[string]string{
		"another contract's workload": "[" + other + "]:8080",
		"its node, IPv6":              netip.AddrPortFrom(node[0].Addr(), 22).String(),
		"its node, IPv4":              netip.AddrPortFrom(node[1].Addr(), 22).String(),
		"the farm's LAN, IPv6":        netip.AddrPortFrom(lanAddrs[0].Addr(), 80).String(),
		"the farm's LAN, IPv4":        netip.AddrPortFrom(lanAddrs[1].Addr(), 80).String(),
		"the ledger":                  netip.AddrPortFrom(validator[0].Addr(), 8441).String(),
		"a location":                  l.location("location-1").String(),
		"a metadata service":          "169.254.169.254:80",
	} {
		if dial("tcp", addr) {
			t.Errorf("it reaches %s at %s", name, addr)
		}
	}
	if got := l.Get("web.localhost", "/lookup?name=web.free.internal"); got != "" {
		t.Errorf("it resolves a name of another contract: %q", got)
	}
}

func disk(t *testing.T, l *Lab) {
	unix.Sync()
	nodes, _ := filepath.Glob(filepath.Join(l.Dir, "data", "*"))
	if len(nodes) < 5 {
		t.Fatalf("data directories: %v", nodes)
	}
	for _, dir := range nodes {
		for _, m := range []string{envMarker, fileMarker, dataMarker, "BEGIN PRIVATE KEY"} {
			found, err := Search(dir, m)
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range found {
				if m == "BEGIN PRIVATE KEY" && (strings.HasSuffix(f, "tls.pem") || strings.HasSuffix(f, "gateway.key")) {
					continue // the server's own TLS key
				}
				t.Errorf("%s: %s", m, f)
			}
		}
	}
	// The control: the same search finds each of them on the user's side.
	for m, where := range map[string]string{envMarker: l.App, fileMarker: l.App, "BEGIN PRIVATE KEY": filepath.Join(l.Dir, "ca")} {
		if found, err := Search(where, m); err != nil || len(found) == 0 {
			t.Errorf("control: %s is not found in %s: %v", m, where, err)
		}
	}
	key, err := os.ReadFile(filepath.Join(l.Dir, "ca", "ca.key"))
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range nodes {
		if found, _ := Search(dir, strings.TrimSpace(strings.Split(string(key), "\n")[1])); len(found) > 0 {
			t.Errorf("the CA's key: %v", found)
		}
	}
}

func endedWorkload(t *testing.T, l *Lab) {
	before := l.Workload("free/web-0")
	l.Get("free.localhost", "/exit?code=7")
	l.Until("the restart", func() bool { return strings.Contains(l.Get("free.localhost", "/"), "hello") })
	l.Until("the count", func() bool { return l.Workload("free/web-0").Restarts > before.Restarts })
	if after := l.Workload("free/web-0"); after.Node != before.Node || after.Epoch != before.Epoch {
		t.Errorf("it moved: %+v → %+v", before, after)
	}
}

func killedAgent(t *testing.T, l *Lab) {
	b := l.Box("node-1")
	agent := Processes(b, "/bin/holdfast run node")
	boots := Processes(b, "/bin/holdfast run shim")
	if len(agent) != 1 || len(boots) == 0 {
		t.Fatalf("agent %v, sandboxes %v", agent, boots)
	}
	before, err := l.Status()
	if err != nil {
		t.Fatal(err)
	}
	unix.Kill(agent[0], unix.SIGKILL)
	l.Until("a new agent", func() bool {
		now := Processes(b, "/bin/holdfast run node")
		return len(now) == 1 && now[0] != agent[0]
	})
	l.Until("an answer", func() bool { return strings.Contains(l.Get("web.localhost", "/get?url=http://db:8080/"), "hello") })
	if now := Processes(b, "/bin/holdfast run shim"); !slices.Equal(now, boots) {
		t.Errorf("sandboxes changed: %v → %v", boots, now)
	}
	after, err := l.Status()
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range before.Workloads {
		for _, x := range after.Workloads {
			if w.Name == x.Name && (w.Node != x.Node || w.Epoch != x.Epoch) {
				t.Errorf("%s moved: %+v → %+v", w.Name, w, x)
			}
		}
	}
}

func lostNode(t *testing.T, l *Lab) {
	was := l.Workload("free/web-0")
	l.Run("lab", "kill", was.Node)
	l.Until("the stateless workload elsewhere", func() bool {
		w := l.Workload("free/web-0")
		return w.Node != was.Node && w.Epoch > was.Epoch && strings.Contains(l.Get("free.localhost", "/"), "hello")
	})
	l.Run("lab", "resume", was.Node)
	// And the one with a volume waits for its node, and comes back with its data.
	db := l.Workload("store/db-0")
	l.Run("lab", "kill", db.Node)
	l.Until("the wait", func() bool { return l.Workload("store/db-0").Reason == "volume on "+db.Node })
	if w := l.Workload("store/db-0"); w.Node != db.Node {
		t.Errorf("it left its volume: %+v", w)
	}
	if _, err := l.Curl("db.localhost", "/", "--max-time", "2"); err == nil {
		t.Error("it answers without its node")
	}
	l.Run("lab", "resume", db.Node)
	l.Until("the data", func() bool { return l.Get("db.localhost", "/file?path=/data/x") == dataMarker })
}

func pausedNode(t *testing.T, l *Lab) {
	was := l.Workload("free/web-0")
	l.Run("lab", "pause", was.Node)
	l.Until("the move", func() bool {
		w := l.Workload("free/web-0")
		return w.Node != was.Node && w.Epoch == was.Epoch+1 && strings.Contains(l.Get("free.localhost", "/"), "hello")
	})
	l.Run("lab", "resume", was.Node)
	// It wakes with its old epoch: it ends what is no longer its own, and the new one goes on undisturbed.
	l.Until("the end of the old one", func() bool {
		w := l.Workload("free/web-0")
		out := l.nodeLogs(was.Node)
		return w.Node != was.Node && strings.Contains(out, "stopped")
	})
	for range 10 {
		if !strings.Contains(l.Get("free.localhost", "/"), "hello") {
			t.Error("the new one does not answer")
		}
	}
	if w := l.Workload("free/web-0"); w.Epoch != was.Epoch+1 {
		t.Errorf("it moved again: %+v", w)
	}
	l.Until("the node", func() bool {
		s, err := l.Status()
		return err == nil && slices.ContainsFunc(s.Nodes, func(n Node) bool { return n.Name == was.Node && n.State == "up" })
	})
}

func (l *Lab) nodeLogs(node string) string {
	b, _ := os.ReadFile(filepath.Join(l.Dir, "log", node+".log"))
	return string(b)
}

func killedServers(t *testing.T, l *Lab) {
	before := l.Workload("free/web-0")
	for _, name := range []string{"validator", "gateway"} {
		daemons := Processes(l.Box(name), "/bin/holdfast run "+name)
		if len(daemons) != 1 {
			t.Fatalf("%s: %v", name, daemons)
		}
		unix.Kill(daemons[0], unix.SIGKILL)
		l.Until("an answer after "+name+" died", func() bool { return strings.Contains(l.Get("free.localhost", "/"), "hello") })
		l.Until("the ledger", func() bool { _, err := l.Try("ledger", "show"); return err == nil })
	}
	if after := l.Workload("free/web-0"); after.Node != before.Node || after.Epoch != before.Epoch {
		t.Errorf("it moved: %+v → %+v", before, after)
	}
}

func everything(t *testing.T, l *Lab) {
	pid := box.Supervisor(l.Dir)
	all, err := box.Running(l.Dir)
	if err != nil || pid == 0 {
		t.Fatalf("%v %d", err, pid)
	}
	unix.Kill(pid, unix.SIGKILL)
	for _, b := range all {
		unix.Kill(b.PID, unix.SIGKILL)
	}
	l.Until("the end of all", func() bool { r, err := box.Running(l.Dir); return err == nil && len(r) == 0 })
	l.Run("up", "--detach")
	l.Until("the stateless workload", func() bool { return strings.Contains(l.Get("free.localhost", "/"), "hello") })
	l.Until("the data", func() bool { return l.Get("db.localhost", "/file?path=/data/x") == dataMarker })
	l.Until("the mesh", func() bool {
		return strings.Contains(l.Get("web.localhost", "/get?url=http://db:8080/"), "hello from db-0")
	})
}

func logs(t *testing.T, l *Lab) {
	if out := l.Run("logs", "free"); !strings.Contains(out, "listening on 8080") {
		t.Errorf("logs: %q", out)
	}
	// A stranger with a key of his own, who knows the workload's ID.
	key := filepath.Join(l.Dir, "user.key")
	if err := os.Rename(key, key+".kept"); err != nil {
		t.Fatal(err)
	}
	defer os.Rename(key+".kept", key)
	b, err := os.ReadFile(filepath.Join(l.Dir, "grid.key")) // another account's
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(key, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := l.Try("logs", "free"); err == nil {
		t.Errorf("a stranger reads logs: %q", out)
	}
}

func cancelled(t *testing.T, l *Lab) {
	l.Run("contract", "cancel", "free", "--yes")
	l.Until("the end", func() bool { return l.Workload("free/web-0").Name == "" && l.Get("free.localhost", "/") == "" })
	for n := 1; n <= 3; n++ {
		node := "node-" + strconv.Itoa(n)
		want := 0
		if w := l.Workload("store/web-0"); w.Node == node {
			want++
		}
		if w := l.Workload("store/db-0"); w.Node == node {
			want++
		}
		l.Until(fmt.Sprintf("%d sandboxes on %s", want, node), func() bool { return len(Processes(l.Box(node), "/bin/holdfast run shim")) == want })
	}
	if out := l.Run("contract", "history", "free"); !strings.Contains(out, "rev1") {
		t.Errorf("its history is gone: %q", out)
	}
}
