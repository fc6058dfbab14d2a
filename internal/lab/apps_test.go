package lab

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"holdfast/store"

	"golang.org/x/sys/unix"
)

// example deploys one of the examples as its users do.
func (l *Lab) example(name string) {
	l.T.Helper()
	path, err := filepath.Abs("../../examples/" + name + "/compose.yaml")
	if err != nil {
		l.T.Fatal(err)
	}
	l.Run("deploy", path, "--yes", "--wait", "--timeout", "150s")
}

// shims are the processes that keep sandboxes, on all nodes, by their IDs on the host.
func (l *Lab) shims() map[int]bool {
	out := map[int]bool{}
	for n := 1; n <= 3; n++ {
		for _, pid := range Processes(l.Box(fmt.Sprintf("node-%d", n)), "/bin/holdfast run shim") {
			out[pid] = true
		}
	}
	return out
}

func pocketBase(t *testing.T, l *Lab) {
	others := l.shims()
	l.example("pocketbase")
	if got := l.Get("pocketbase.localhost", "/"); !strings.Contains(got, "PocketBase is running on holdfast") {
		t.Errorf("the page: %q", got)
	}
	var health struct {
		Code    int
		Message string
	}
	got := l.Get("pocketbase.localhost", "/api/health")
	if err := json.Unmarshal([]byte(got), &health); err != nil || health.Code != http.StatusOK {
		t.Errorf("the API: %q", got)
	}
	// Its own setting, written to SQLite on the volume, is there after the sandbox died.
	sign := func() string { return l.Get("pocketbase.localhost", "/api/collections/users/auth-methods") }
	before := sign()
	if !strings.Contains(before, "password") {
		t.Fatalf("its database: %q", before)
	}
	register := func(email string) (string, error) {
		return l.Curl("pocketbase.localhost", "/api/collections/users/records", "-H", "Content-Type: application/json",
			"--data", fmt.Sprintf(`{"email":%q,"password":"marker-pass","passwordConfirm":"marker-pass"}`, email))
	}
	if out, err := register("somebody@example.org"); err != nil {
		t.Fatalf("register: %v %s", err, out)
	}
	for pid := range l.shims() {
		if !others[pid] {
			unix.Kill(pid, unix.SIGKILL)
		}
	}
	l.Until("the restart", func() bool { return l.Workload("pocketbase/pocketbase-0").Restarts > 0 })
	l.Until("PocketBase again", func() bool { return strings.Contains(l.Get("pocketbase.localhost", "/api/health"), "200") })
	login, err := l.Curl("pocketbase.localhost", "/api/collections/users/auth-with-password", "-H", "Content-Type: application/json",
		"--data", `{"identity":"somebody@example.org","password":"marker-pass"}`)
	if err != nil || !strings.Contains(login, `"token"`) {
		t.Errorf("the account is gone: %v %q", err, login)
	}
	if _, err := l.Curl("pocketbase.localhost", "/api/collections/users/auth-with-password", "-H", "Content-Type: application/json",
		"--data", `{"identity":"somebody@example.org","password":"another"}`); err == nil {
		t.Error("control: any password opens it")
	}
	l.Run("contract", "cancel", "pocketbase", "--yes")
}

func reader(t *testing.T, l *Lab) {
	l.example("reader")
	if got := l.Get("reader.localhost", "/"); !strings.Contains(got, "Miniflux") || !strings.Contains(got, `name="password"`) {
		t.Fatalf("the login page: %q", got)
	}
	app, db := l.Workload("reader/app-0"), l.Workload("reader/db-0")
	if app.Node == db.Node {
		t.Fatalf("Miniflux and PostgreSQL are both on %s: nothing would cross the wire", app.Node)
	}
	captured := l.Capture()
	password, err := os.ReadFile("../../examples/reader/secrets/admin-password")
	if err != nil {
		t.Fatal(err)
	}
	user := []string{"--user", "admin:" + strings.TrimSpace(string(password))}
	if out, err := l.Curl("reader.localhost", "/v1/categories", append(user, "--data", `{"title":"`+wireMarker+`"}`)...); err != nil {
		t.Fatalf("a new category: %v %s", err, out)
	}
	for range 5 {
		out, err := l.Curl("reader.localhost", "/v1/categories", user...)
		if err != nil || !strings.Contains(out, wireMarker) {
			t.Fatalf("content from PostgreSQL: %v %q", err, out)
		}
	}
	l.hidden(captured)
	l.Run("contract", "cancel", "reader", "--yes")
}

// tampered plays a validator's operator who gives out a layer that he has changed.
func tampered(t *testing.T, l *Lab) {
	l.image("img2")
	// On a node that is down nothing is fetched before the layer is changed.
	path := filepath.Join(l.App, "bent.yaml")
	compose := strings.ReplaceAll(strings.ReplaceAll(stateless, "free", "bent"), "oci:img", "oci:img2")
	compose = strings.Replace(compose, "    healthcheck:", "    x-holdfast: {placement: {nodes: [node-3]}}\n    healthcheck:", 1)
	if err := os.WriteFile(path, []byte(compose), 0o600); err != nil {
		t.Fatal(err)
	}
	l.Run("lab", "cut", "node-3")
	l.Until("the cut", func() bool { return l.node("node-3").State == "down" })
	l.Run("deploy", path, "--yes")
	// What lies in the validator's directory is given out before what is in the store.
	dir := filepath.Join(l.Dir, "data", "validator", "blobs")
	own := store.NewDir(dir, 1<<30)
	good := map[string][]byte{}
	for _, d := range l.layers("bent") {
		r, _, err := l.client().OpenBlob(t.Context(), d)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r)
		r.Close()
		if err != nil {
			t.Fatal(err)
		}
		if err := own.Put(t.Context(), d, bytes.NewReader(b)); err != nil {
			t.Fatal(err)
		}
		for _, p := range files(dir) {
			if strings.HasSuffix(p, d.String()) {
				good[p] = b
			}
		}
	}
	if len(good) == 0 {
		t.Fatal("the contract has no layers")
	}
	bend := func() {
		for p, b := range good {
			bad := slices.Clone(b)
			bad[len(bad)/2] ^= 1
			if err := os.WriteFile(p, bad, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	bend()
	said := len(l.nodeLogs("node-3"))
	l.Run("lab", "resume", "node-3")
	l.Until("the refusal", func() bool {
		bend() // the validator would put the true ones in their place
		return strings.Contains(l.nodeLogs("node-3")[said:], "digest")
	})
	if w := l.Workload("bent/web-0"); w.State == "running" || l.Get("bent.localhost", "/") != "" {
		t.Errorf("it runs: %+v", w)
	}
	// The control: with the true bytes the same contract starts.
	for p := range good {
		os.Remove(p)
	}
	l.Until("the start", func() bool { return strings.Contains(l.Get("bent.localhost", "/"), "hello") })
	l.Run("contract", "cancel", "bent", "--yes")
}
