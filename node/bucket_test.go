package node

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/contract"
	"holdfast/disperse"
	"holdfast/ledger"
	"holdfast/sandbox"
)

// theFronts runs a script in place of front ends.
type theFronts struct {
	*testing.T
	*fronts
	mu      sync.Mutex
	lines   []string
	limited []string // instances that have limits
	woken   chan struct{}
}

func newFronts(t *testing.T, script string) *theFronts {
	t.Helper()
	dir := t.TempDir()
	self := filepath.Join(dir, "front")
	if err := os.WriteFile(self, []byte("#!/bin/sh\n"+script), 0o700); err != nil {
		t.Fatal(err)
	}
	x := &theFronts{T: t, woken: make(chan struct{}, 10)}
	x.fronts = &fronts{
		self: self, dir: filepath.Join(dir, "fronts"), log: slog.New(slog.DiscardHandler), all: map[string]*front{}, taken: map[string]bool{},
		wake: func() { x.woken <- struct{}{} },
		bound: func(id string, pid int, limits *contract.Service) error {
			x.mu.Lock()
			defer x.mu.Unlock()
			if strings.Contains(strings.Join(x.lines, ""), "{") || pid <= 0 || limits.Memory == 0 {
				return fmt.Errorf("bounded after it was told, or not: process %d, limits %+v", pid, limits)
			}
			x.limited = append(x.limited, id)
			return nil
		},
		unbound: func(id string) {
			x.mu.Lock()
			defer x.mu.Unlock()
			x.limited = slices.DeleteFunc(x.limited, func(s string) bool { return s == id })
		},
		note: func(_, text string) { x.mu.Lock(); defer x.mu.Unlock(); x.lines = append(x.lines, text) },
	}
	t.Cleanup(func() { x.stopAll(context.Background()) })
	return x
}

func (x *theFronts) begin(id string) error {
	x.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		x.Fatal(err)
	}
	fe := &contract.FrontEnd{Store: [32]byte{7}, Keys: []byte("the-keys"), Access: "access-key-of-16", Secret: "THE-SECRET-KEY-OF-IT"}
	return x.start(id, map[string]string{label: "w"}, fe, &contract.Service{Memory: 64 << 20}, l)
}

func (x *theFronts) logged(text string) {
	x.Helper()
	for begin := time.Now(); time.Since(begin) < 20*time.Second; time.Sleep(10 * time.Millisecond) {
		x.mu.Lock()
		all := strings.Join(x.lines, "\n")
		x.mu.Unlock()
		if strings.Contains(all, text) {
			return
		}
	}
	x.Fatalf("its log does not say %q: %q", text, x.lines)
}

func (x *theFronts) end(id string) sandbox.Status {
	x.Helper()
	select {
	case <-x.woken:
	case <-time.After(20 * time.Second):
		x.Fatal("it does not end")
	}
	for _, s := range x.list() {
		if s.ID == id {
			return s
		}
	}
	x.Fatalf("%s is not there: %+v", id, x.list())
	return sandbox.Status{}
}

func TestAFrontEndIsTold(t *testing.T) {
	x := newFronts(t, `echo "args $*" >&2; env >&2; while read -r line; do echo "$line" >&2; done; echo gone >&2`)
	place := Place{ID: disperse.Place{1}, Node: "n", Farm: "f", Up: true}
	x.follow([]Place{place})
	if err := x.begin("a"); err != nil {
		t.Fatal(err)
	}
	x.logged(`"Node":"n"`)
	x.logged("THE-SECRET-KEY-OF-IT") // on its input, as the control
	for _, l := range x.lines {
		if !strings.HasPrefix(l, "{") && (strings.Contains(l, "THE-SECRET") || strings.Contains(l, "the-keys")) {
			t.Errorf("a secret in arguments or environment: %q", l)
		}
	}
	x.follow([]Place{place, {Node: "later"}})
	x.logged(`"Node":"later"`)
	if !slices.Equal(x.limited, []string{"a"}) {
		t.Errorf("%v have limits", x.limited)
	}
	if got := x.list(); len(got) != 1 || got[0].State != sandbox.Running || got[0].Labels[label] != "w" {
		t.Errorf("%+v", got)
	}
	found := false
	filepath.WalkDir(x.dir, func(p string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			b, _ := os.ReadFile(p)
			found = found || bytes.Contains(b, []byte("THE-SECRET"))
		}
		return nil
	})
	if found {
		t.Error("a secret is in a file")
	}
	if err := x.stop(t.Context(), "a", false); err != nil || x.has("a") {
		t.Errorf("%v, there: %v", err, x.has("a"))
	}
	if _, err := os.Stat(filepath.Join(x.dir, "a")); err == nil {
		t.Error("its directory is still there")
	}
}

// Who was cut off and has lost its store to another takes it back from nobody.
func TestAFrontEndThatLostItsStoreStaysAway(t *testing.T) {
	x := newFronts(t, "read -r line; echo "+FrontTaken+"; exit 1")
	if err := x.begin("a"); err != nil {
		t.Fatal(err)
	}
	if s := x.end("a"); s.State != sandbox.Exited || s.Reason != reasonTaken || s.ExitCode != 1 {
		t.Errorf("%+v", s)
	}
	if err := x.stop(t.Context(), "a", true); err != nil {
		t.Fatal(err)
	}
	var f *failure
	if err := x.begin("a"); !errors.As(err, &f) || f.words != reasonTaken {
		t.Fatalf("%v", err)
	}
	if err := x.begin("b"); err != nil { // another assignment
		t.Fatal(err)
	}
}

func TestAFrontEndThatEndsIsStartedAgain(t *testing.T) {
	x := newFronts(t, "read -r line; exit 3")
	if err := x.begin("a"); err != nil {
		t.Fatal(err)
	}
	s := x.end("a")
	w := &Workload{Instance: "a", Process: &contract.Process{Restart: "always", FrontEnd: &contract.FrontEnd{}}}
	d := decide(w, observed{instances: map[string]sandbox.Status{"a": s}, leaseOK: true, now: time.Now()})
	if s.ExitCode != 3 || !d.start || len(d.stop) != 1 || d.state != ledger.StateFailed || d.reason != "exit code 3" {
		t.Errorf("%+v %+v", s, d)
	}
	if err := x.stop(t.Context(), "a", false); err != nil {
		t.Fatal(err)
	}
	if err := x.begin("a"); err != nil {
		t.Fatal(err)
	}
}

// One that hangs is killed after its grace, and holds up nobody who tells it of locations.
func TestAFrontEndThatHangs(t *testing.T) {
	x := newFronts(t, "trap '' TERM; read -r line; echo here >&2; exec sleep 1000")
	if err := x.begin("a"); err != nil {
		t.Fatal(err)
	}
	x.logged("here")
	begin := time.Now()
	if err := x.stop(t.Context(), "a", true); err != nil || time.Since(begin) > 5*time.Second {
		t.Errorf("%v after %v", err, time.Since(begin))
	}
	if err := x.begin("b"); err != nil {
		t.Fatal(err)
	}
	var many []Place
	for i := range 500 {
		many = append(many, Place{Node: fmt.Sprint("node-", i)})
	}
	begin = time.Now()
	x.follow(many)
	if time.Since(begin) > 10*time.Second {
		t.Errorf("told after %v", time.Since(begin))
	}
	<-x.woken // of a
	if s := x.end("b"); s.State != sandbox.Exited || s.ExitCode != 128+9 {
		t.Errorf("%+v", s)
	}
}

// What a front end is told comes out as it went in.
func TestFrontRoundTrip(t *testing.T) {
	in := Front{Dir: "/d", FrontEnd: contract.FrontEnd{Store: [32]byte{1}, Keys: []byte{1, 2}, Access: "a", Secret: "s", Buckets: []contract.Bucket{{Name: "b", Versioning: true}}}, Places: []Place{{ID: disperse.Place{5}, Node: "n", Farm: "f", Pin: [32]byte{6}, Up: true}}}
	b, err := json.Marshal(in)
	if err != nil {
		t.Fatal(err)
	}
	var out Front
	if err := json.Unmarshal(b, &out); err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(out) != fmt.Sprint(in) {
		t.Errorf("%+v\n%+v", in, out)
	}
}
