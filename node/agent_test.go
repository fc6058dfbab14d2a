package node

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"holdfast/api"
	"holdfast/contract"
	"holdfast/identity"
	"holdfast/internal/canonical"
	"holdfast/ledger"
	"holdfast/sandbox"
	"holdfast/volume"

	"golang.org/x/sys/unix"
)

// TestMain plays the volume server and the shim that an Agent of a test starts.
func TestMain(m *testing.M) {
	if len(os.Args) == 4 && os.Args[1] == "run" && os.Args[2] == "shim" {
		if err := sandbox.Shim(context.Background(), os.Args[3]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			syscall.Exit(1)
		}
		syscall.Exit(0)
	}
	if len(os.Args) == 3 && os.Args[1] == "run" && os.Args[2] == "volume" {
		if err := volume.Serve(context.Background(), os.Stdin); err != nil {
			fmt.Fprintln(os.Stderr, err)
			syscall.Exit(1)
		}
		syscall.Exit(0)
	}
	os.Exit(m.Run())
}

// agent is one without a ledger: whatever it has to fetch is not to be had, and a test that makes it try fails.
func agent(t *testing.T) *Agent {
	t.Helper()
	keys, err := DeriveKeys([identity.SeedSize]byte{7})
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	a, err := New(Config{Keys: keys, Data: filepath.Join(dir, "data"), Run: filepath.Join(dir, "run"), Runsc: "/bin/false", Self: self, Cgroup: "/holdfast-node-test"})
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{a.cfg.Data, a.cfg.Run} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := a.lease.open(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(a.lease.close)
	if err := a.lease.renew(bootTime() + time.Hour); err != nil {
		t.Fatal(err)
	}
	a.groupCtx = t.Context()
	return a
}

// deployed is a contract of one workload with a volume, assigned to an Agent's node, with its sealed body on the disk.
type deployed struct {
	*ContractView
	keys   *contract.Keys
	body   *contract.Body
	sealed []byte
}

func deploy(t *testing.T, a *Agent, edit func(*contract.Header, *contract.Body)) *deployed {
	t.Helper()
	manifest := "sha256:" + strings.Repeat("4d", 32)
	h := &contract.Header{
		Version: 1, Grid: identity.GridID{1}, Account: identity.AccountID{2}, Name: "shop", Revision: 1,
		Services: []contract.Service{{Name: "web", Replicas: 1, CPUMilli: 250, Memory: 128 << 20, Pids: 100, Networks: []string{"default"}, Volumes: []string{"data"}}},
		Volumes:  []contract.Volume{{Name: "data", Size: 64 << 20}}, Networks: []string{"default"},
	}
	img := contract.Image{Reference: "registry.example/marker-in-image:1", Manifest: manifest, Blobs: []contract.Blob{{Digest: manifest, Size: 1, Sealed: sha256.Sum256([]byte("not sealed at all")), Key: [32]byte{1}}}}
	b := &contract.Body{Version: 1, Services: []contract.Process{{Name: "web", Image: img, Environment: []string{"SECRET=marker"}, Mounts: []contract.Mount{{Volume: "data", Target: "/data"}}}}}
	if edit != nil {
		edit(h, b)
	}
	d := &deployed{body: b, keys: contract.NewKeys(h, nil)}
	var err error
	if d.sealed, err = contract.Seal(h, d.keys, b); err != nil {
		t.Fatal(err)
	}
	d.ContractView = &ContractView{Header: h}
	d.settle(t, a)
	return d
}

// settle makes the rest of the view agree with the header, and keeps the sealed body on the node's disk.
func (d *deployed) settle(t *testing.T, a *Agent) {
	t.Helper()
	h := d.Header
	id := h.ContractID()
	d.Record, d.Revision = &ledger.Contract{ID: id, Account: h.Account, Name: h.Name}, h.RevisionID()
	d.Networks = map[string]*ledger.Network{"default": {ID: contract.NetworkOf(id, "default"), Name: "default", Index: 5}}
	d.Volumes = map[string]*ledger.Volume{"data": {ID: contract.VolumeOf(id, "data"), Size: 64 << 20, Created: true}}
	d.Assignments = []ledger.Assignment{{Workload: contract.WorkloadOf(id, "web", 0), Service: "web", Node: a.cfg.Keys.ID, Epoch: 3, Fenced: true}}
	if err := a.blobs.Put(t.Context(), h.SealedBody, bytes.NewReader(d.sealed)); err != nil {
		t.Fatal(err)
	}
	d.give(t, a, d.keys)
}

// give seals keys into the node's envelope.
func (d *deployed) give(t *testing.T, a *Agent, k *contract.Keys) {
	t.Helper()
	var err error
	to := a.cfg.Keys.Open.Public()
	if d.Envelope, err = contract.SealEnvelope(d.Revision, contract.RecipientNode, a.cfg.Keys.ID, &to, k); err != nil {
		t.Fatal(err)
	}
}

func (d *deployed) view(a *Agent) *View {
	self := &ledger.Node{ID: a.cfg.Keys.ID, Name: "node-1", Up: true}
	return &View{Grid: d.Header.Grid, Self: self, Nodes: []*ledger.Node{self}, Contracts: []*ContractView{d.ContractView}, Unread: map[contract.ID]error{}}
}

func (d *deployed) workload() contract.WorkloadID { return d.Assignments[0].Workload }

// sandboxes plays running sandboxes: bundles whose shim is a process that sleeps.
type fake struct {
	id  string
	cmd *exec.Cmd
}

func sandboxFor(t *testing.T, a *Agent, w *Workload) *fake {
	t.Helper()
	dir := filepath.Join(a.cfg.Run, "sandbox", "bundles", w.Instance)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := unix.FcntlFlock(lock.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK}); err != nil {
		t.Fatal(err)
	}
	f := &fake{w.Instance, exec.Command("/bin/sh", "-c", `trap "" TERM; echo ready; exec sleep 1000`)} // it uses its whole grace
	f.cmd.ExtraFiles = []*os.File{lock}
	out, err := f.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := f.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 6)); err != nil {
		t.Fatal(err)
	}
	go f.cmd.Wait()
	t.Cleanup(func() { f.cmd.Process.Kill() })
	for name, v := range map[string]any{
		"shim.json":   map[string]any{"ID": w.Instance, "Grace": time.Minute, "Labels": labels(w)},
		"status.json": map[string]any{"PID": f.cmd.Process.Pid, "State": sandbox.Running, "Started": time.Now()},
	} {
		b, _ := json.Marshal(v)
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

func (a *Agent) instances(t *testing.T) (out []string) {
	t.Helper()
	all, err := a.runner.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range all {
		if s.State == sandbox.Running {
			out = append(out, s.ID)
		}
	}
	return out
}

func adoptedBy(t *testing.T, a *Agent) map[contract.WorkloadID]*Workload {
	t.Helper()
	all, err := a.runner.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return adoptable(all)
}

// Whoever keeps a body, hands on an envelope or writes a header changes something. Nothing starts.
func TestTamperedBodyStartsNothing(t *testing.T) {
	resealed := func(h *contract.Header, sealed []byte) {
		h.SealedBody, h.SealedSize = sha256.Sum256(sealed), uint32(len(sealed))
	}
	without := func(k *contract.Keys, f func(*contract.Keys)) *contract.Keys {
		c := *k
		c.Volumes, c.Networks = maps.Clone(k.Volumes), maps.Clone(k.Networks)
		f(&c)
		return &c
	}
	for name, tc := range map[string]struct {
		tamper func(t *testing.T, a *Agent, d *deployed)
		want   string // "" starts
	}{
		"the control: untampered": {func(*testing.T, *Agent, *deployed) {}, ""},
		"one bit flipped on the node's disk": {func(t *testing.T, a *Agent, d *deployed) {
			bad := bytes.Clone(d.sealed)
			bad[len(bad)/2] ^= 1
			sum := fmt.Sprintf("%x", d.Header.SealedBody)
			if err := os.WriteFile(filepath.Join(a.cfg.Data, "blobs", sum[:2], sum), bad, 0o600); err != nil {
				t.Fatal(err)
			}
		}, "bytes do not have the digest"},
		"one bit flipped, under a hash that fits": {func(t *testing.T, a *Agent, d *deployed) {
			d.sealed = bytes.Clone(d.sealed)
			d.sealed[len(d.sealed)/2] ^= 1
			resealed(d.Header, d.sealed)
			d.settle(t, a)
		}, "does not decrypt"},
		"sealed under another key": {func(t *testing.T, a *Agent, d *deployed) {
			h := *d.Header
			var err error
			if d.sealed, err = contract.Seal(&h, contract.NewKeys(&h, nil), d.body); err != nil {
				t.Fatal(err)
			}
			resealed(d.Header, d.sealed)
			d.settle(t, a)
		}, "does not decrypt"},
		"another key opens it differently": {func(t *testing.T, a *Agent, d *deployed) {
			_, other := d.ambiguous(t)
			d.settle(t, a)
			d.give(t, a, other)
		}, "other keys"},
		"another key opens it differently, and the header names that key": {func(t *testing.T, a *Agent, d *deployed) {
			h, other := d.ambiguous(t)
			d.Header.KeyCommitment = h.KeyCommitment
			d.settle(t, a)
			d.give(t, a, other)
		}, "another plaintext"},
		"no key for its volume": {func(t *testing.T, a *Agent, d *deployed) {
			d.keys = without(d.keys, func(k *contract.Keys) { delete(k.Volumes, "data") })
			h := *d.Header
			d.sealed = must(contract.Seal(&h, d.keys, d.body))
			d.Header = &h
			d.settle(t, a)
		}, `no key for volume "data"`},
		"a key of zeros for its volume": {func(t *testing.T, a *Agent, d *deployed) {
			d.keys = without(d.keys, func(k *contract.Keys) { k.Volumes["data"] = [32]byte{} })
			h := *d.Header
			d.sealed = must(contract.Seal(&h, d.keys, d.body))
			d.Header = &h
			d.settle(t, a)
		}, `no key for volume "data"`},
		"a secret of zeros for its network": {func(t *testing.T, a *Agent, d *deployed) {
			d.keys = without(d.keys, func(k *contract.Keys) { k.Networks["default"] = [32]byte{} })
			h := *d.Header
			d.sealed = must(contract.Seal(&h, d.keys, d.body))
			d.Header = &h
			d.settle(t, a)
		}, `no key for network "default"`},
		"another node's envelope": {func(t *testing.T, a *Agent, d *deployed) {
			other, err := DeriveKeys([identity.SeedSize]byte{8})
			if err != nil {
				t.Fatal(err)
			}
			to := other.Open.Public()
			if d.Envelope, err = contract.SealEnvelope(d.Revision, contract.RecipientNode, other.ID, &to, d.keys); err != nil {
				t.Fatal(err)
			}
		}, "does not open with this node's key"},
	} {
		t.Run(name, func(t *testing.T) {
			a := agent(t)
			d := deploy(t, a, nil)
			tc.tamper(t, a, d)
			s, err := a.specs(t.Context(), d.view(a), nil)
			w := s.workloads[d.workload()]
			if w == nil {
				t.Fatal("the assigned workload is not reported at all")
			}
			starts := decide(w, observed{leaseOK: true}).start
			if tc.want == "" {
				if err != nil || !starts || w.Volumes[0].Key != d.keys.Volumes["data"] {
					t.Errorf("it does not start: %v, %+v", err, w)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want %q", err, tc.want)
			}
			if starts || len(s.opened) != 0 || len(s.meshes) != 1 {
				t.Errorf("it starts: %+v, %d bodies, %d networks", w, len(s.opened), len(s.meshes))
			}
			// The controller itself, over a runner that would be seen to begin.
			c := a.newController(w.ID)
			c.want = w
			if _, err := c.step(t.Context()); err != nil {
				t.Error(err)
			}
			for _, dir := range []string{"bundles", "layers"} {
				if left, _ := os.ReadDir(filepath.Join(a.cfg.Run, "sandbox", dir)); len(left) > 0 {
					t.Errorf("%s: %v", dir, left)
				}
			}
			if r, _ := c.status(); r.State != ledger.StateWaiting || r.Reason == "" || strings.Contains(r.Reason, "marker") {
				t.Errorf("reported %+v", r)
			}
		})
	}
}

func must(b []byte, err error) []byte {
	if err != nil {
		panic(err)
	}
	return b
}

// ambiguous seals the body so that a second set of keys opens it too, to something else, and returns those keys and a header
// that commits to them. The own header commits to the first keys and their body.
func (d *deployed) ambiguous(t *testing.T) (*contract.Header, *contract.Keys) {
	t.Helper()
	// Room in the body for a block that nobody reads.
	d.body.Source = bytes.Repeat([]byte("#"), 64)
	plain := canonical.Encode(d.body)
	other := contract.NewKeys(d.Header, d.keys)
	h := *d.Header
	must(contract.Seal(&h, other, d.body))
	free := (bytes.Index(plain, d.body.Source) + 15) / 16
	sealed := twoKeys(t, d.keys.Body, other.Body, []byte("holdfast/body/v1"), plain, free)
	// The control: the cipher opens it under both.
	first, second := openGCM(t, d.keys.Body, sealed), openGCM(t, other.Body, sealed)
	if bytes.Equal(first, second) {
		t.Fatal("control: both keys open the same")
	}
	d.sealed = sealed
	d.Header.SealedBody, d.Header.SealedSize = sha256.Sum256(sealed), uint32(len(sealed))
	d.Header.BodyCommitment = canonical.Digest("holdfast/body-commitment/v1", d.keys.Salt[:], first)
	d.Header.KeyCommitment = canonical.Digest("holdfast/key-commitment/v1", canonical.Encode(d.keys))
	if _, err := contract.Open(d.Header, d.keys, sealed); err != nil {
		t.Fatalf("control: the body that was meant does not open: %v", err)
	}
	return &h, other
}

// Somebody's contract has grown records that nobody can read. The others of the node do not suffer, and what runs of the bad
// one goes on.
func TestABadContractHoldsUpNoOther(t *testing.T) {
	a := agent(t)
	good := deploy(t, a, nil)
	bad := deploy(t, a, func(h *contract.Header, _ *contract.Body) { h.Name = "bad" })
	r := records{}
	self := &ledger.Node{ID: a.cfg.Keys.ID, Name: "node-1", Up: true, Key: a.cfg.Keys.Sign.Public(), Sealing: a.cfg.Keys.Open.Public()}
	r.put(ledger.NodesKey, []identity.NodeID{self.ID})
	r.put(ledger.NodeKey(self.ID), self)
	r.put(ledger.NodeWorkKey(self.ID), []contract.ID{bad.Record.ID, good.Record.ID})
	r.put(ledger.AccountKey(good.Header.Account), &identity.Account{ID: good.Header.Account})
	for _, d := range []*deployed{good, bad} {
		r.put(ledger.ContractKey(d.Record.ID), d.Record)
		r.put(ledger.AssignmentsKey(d.Record.ID), &ledger.Assignments{Revision: d.Revision, Current: d.Assignments})
		r[ledger.RevisionKey(d.Revision)] = d.Header.Encode()
	}
	read := func() *View {
		t.Helper()
		v, err := ReadView(t.Context(), r, good.Header.Grid, self.ID)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	if v := read(); len(v.Contracts) != 2 || len(v.Unread) != 0 {
		t.Fatalf("control: %d contracts, %v", len(v.Contracts), v.Unread)
	}
	for what, f := range map[string]func(){
		"assignments that do not decode": func() { r[ledger.AssignmentsKey(bad.Record.ID)] = []byte{0xff} },
		"no contract record":             func() { r[ledger.ContractKey(bad.Record.ID)] = nil },
		"another's header":               func() { r[ledger.RevisionKey(bad.Revision)] = good.Header.Encode() },
		"an answer that is too long":     func() { r[ledger.ContractKey(bad.Record.ID)] = tooLong },
	} {
		saved := maps.Clone(r)
		f()
		v := read()
		if len(v.Contracts) != 1 || v.Contracts[0].Record.ID != good.Record.ID || v.Unread[bad.Record.ID] == nil {
			t.Errorf("%s: %d contracts, %v", what, len(v.Contracts), v.Unread)
		}
		r = saved
	}
	// What runs of it is not stopped, even by an agent that has never read it.
	w := workloadOf(t, a, bad)
	sandboxFor(t, a, w)
	v := good.view(a)
	v.Unread[bad.Record.ID] = errors.New("record")
	s, _ := a.specs(t.Context(), v, adoptedBy(t, a))
	kept := s.workloads[bad.workload()]
	if kept == nil || kept.Instance != w.Instance || !s.kept[w.Network] {
		t.Fatalf("it is not kept: %+v, networks %v", kept, s.kept)
	}
	c := a.newController(kept.ID)
	c.want = kept
	if _, err := c.step(t.Context()); err != nil {
		t.Error(err)
	}
	if !slices.Contains(a.instances(t), w.Instance) {
		t.Error("it was stopped")
	}
}

// workloadOf is a contract's workload as it is when the body opens.
func workloadOf(t *testing.T, a *Agent, d *deployed) *Workload {
	t.Helper()
	s, err := a.specs(t.Context(), d.view(a), nil)
	if err != nil {
		t.Fatal(err)
	}
	return s.workloads[d.workload()]
}

// records is a ledger of bytes.
type records map[string][]byte

var tooLong = []byte("too long")

func (r records) put(key string, v any) { r[key] = canonical.Encode(v) }

// Read implements api.Reader.
func (r records) Read(_ context.Context, keys ...string) (api.View, error) {
	var v api.View
	values := map[string][]byte{}
	for _, k := range keys {
		if values[k] = r[k]; bytes.Equal(r[k], tooLong) {
			return v, errors.New("answer of more than 4 MiB")
		}
	}
	// Only a light client makes views; here they are forged.
	f := reflect.ValueOf(&v).Elem().FieldByName("values")
	*(*map[string][]byte)(unsafe.Pointer(f.UnsafeAddr())) = values
	return v, nil
}

// The agent was killed, and the one after it cannot open the contract: a bit of the body on its disk is wrong.
func TestARestartedAgentKeepsWhatItCannotOpen(t *testing.T) {
	a := agent(t)
	d := deploy(t, a, nil)
	w := workloadOf(t, a, d)
	old := *w
	old.Instance, old.Epoch = "of-an-old-epoch", 2
	sandboxFor(t, a, w)
	sandboxFor(t, a, &old)
	d.Envelope = nil
	next := agent(t)
	next.cfg.Run, next.runner, next.blobs = a.cfg.Run, a.runner, a.blobs
	if got := next.instances(t); len(got) != 2 {
		t.Fatalf("control: %v run", got)
	}
	s, err := next.specs(t.Context(), d.view(next), adoptedBy(t, next))
	if !errors.Is(err, errNoEnvelope) {
		t.Fatal(err)
	}
	c := next.newController(d.workload())
	c.want = s.workloads[d.workload()]
	if _, err := c.step(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := next.instances(t); !slices.Equal(got, []string{w.Instance}) {
		t.Errorf("of what should run, %v does", got)
	}
	if r, _ := c.status(); r.State != ledger.StateRunning || r.Epoch != 3 {
		t.Errorf("reported %+v", r)
	}
	if !s.kept[w.Network] {
		t.Errorf("its network %s is not kept: %v", w.Network, s.kept)
	}
	// Its lease and the ledger still have their say.
	v := d.view(next)
	d.Assignments[0].Reason = "volume on node-2"
	if s, _ = next.specs(t.Context(), v, adoptedBy(t, next)); s.workloads[d.workload()].Held == "" {
		t.Error("the ledger does not hold it")
	}
}

func TestNothingIsKeptOfWhatHasGone(t *testing.T) {
	a := agent(t)
	d := deploy(t, a, nil)
	v := d.view(a)
	s, err := a.specs(t.Context(), v, nil)
	if err != nil {
		t.Fatal(err)
	}
	a.settle(v, s)
	if len(a.bodies) != 1 || a.contract(d.Record.ID) == nil {
		t.Fatal("control: the body is not kept while it is wanted")
	}
	v.Contracts = nil
	if s, err = a.specs(t.Context(), v, nil); err != nil {
		t.Fatal(err)
	}
	a.settle(v, s)
	if len(a.bodies) != 0 {
		t.Error("the keys and secrets of what was cancelled stay in memory")
	}
	// And its controller ends.
	c := a.newController(d.workload())
	c.want = &Workload{ID: d.workload(), Process: &contract.Process{}}
	ctx, cancel := context.WithCancel(t.Context())
	c.done = cancel
	a.control[c.id] = c
	if a.forget(c); ctx.Err() != nil {
		t.Error("a controller that is wanted was ended")
	}
	c.want = nil
	if _, err := c.step(t.Context()); err != nil || ctx.Err() == nil || len(a.control) != 0 {
		t.Errorf("the controller of what has gone stays: %v", err)
	}
}

// A report is public. The image does not open, and the error quotes the contract's sealed part.
func TestReportsQuoteNothingThatIsSealed(t *testing.T) {
	a := agent(t)
	d := deploy(t, a, nil)
	w := workloadOf(t, a, d)
	if err := a.blobs.Put(t.Context(), w.Process.Image.Blobs[0].Sealed, strings.NewReader("not sealed at all")); err != nil {
		t.Fatal(err)
	}
	c := a.newController(w.ID)
	c.want = w
	_, err := c.step(t.Context())
	if err == nil || !strings.Contains(detail(err), "marker-in-image") {
		t.Fatalf("control: the error quotes nothing: %v", detail(err))
	}
	r, _ := c.status()
	if r.State != ledger.StateWaiting || r.Reason != "image refused: it is malformed, or has another digest" {
		t.Errorf("reported %+v", r)
	}
	if strings.Contains(err.Error(), "marker") {
		t.Errorf("the node's log says %q", err)
	}
	var log strings.Builder
	if err := a.runner.Logs(t.Context(), w.Instance, false, 10, &log); err != nil || !strings.Contains(log.String(), "marker-in-image") {
		t.Errorf("its owner's log: %q %v", log.String(), err)
	}
}

// An agent is killed after it has opened a volume, and the workload does not come back to the node.
func TestVolumesOfNobodyAreClosed(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	a := agent(t)
	id := func(b byte) contract.VolumeID { return contract.VolumeID{b} }
	for b := byte(1); b <= 3; b++ {
		if _, err := a.volumes.Open(t.Context(), volume.Spec{ID: volumeName(id(b)), Size: 64 << 20, Key: [32]byte{b}, Create: true}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { a.volumes.Close(context.Background(), volumeName(id(b))) })
	}
	wanted := &Workload{ID: contract.WorkloadID{1}, Volumes: []WorkVolume{{ID: id(1)}}}
	a.releases[wanted.ID] = wanted
	// One whose revision dropped the volume, but which is not stopped yet.
	sandboxFor(t, a, &Workload{ID: contract.WorkloadID{2}, Instance: "old-revision", Volumes: []WorkVolume{{ID: id(2)}}})
	if err := a.sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	for b, want := range map[byte]bool{1: true, 2: true, 3: false} {
		if got := a.volumes.Serving(volumeName(id(b))); got != want {
			t.Errorf("volume %d: open %v", b, got)
		}
	}
}

// The server of a volume dies under a running workload, which from then on reads and writes nothing.
func TestADeadVolumeServerIsNoticed(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	a := agent(t)
	d := deploy(t, a, nil)
	w := workloadOf(t, a, d)
	v := w.Volumes[0]
	if _, err := a.volumes.Open(t.Context(), volume.Spec{ID: volumeName(v.ID), Size: v.Size, Key: v.Key, Create: true}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.volumes.Close(context.Background(), volumeName(v.ID)) })
	sandboxFor(t, a, w)
	c := a.newController(w.ID)
	c.want, c.imageOf, c.image.Manifest = w, w.Process.Image.Manifest, w.Process.Image.Manifest
	if _, err := c.step(t.Context()); err != nil || len(a.instances(t)) != 1 {
		t.Fatalf("control: %v, running %v", err, a.instances(t))
	}
	b, err := os.ReadFile(filepath.Join(a.cfg.Run, "volumes", volumeName(v.ID), "status.json"))
	if err != nil {
		t.Fatal(err)
	}
	var server struct{ PID int }
	if err := json.Unmarshal(b, &server); err != nil {
		t.Fatal(err)
	}
	unix.Kill(server.PID, unix.SIGKILL)
	for end := time.Now().Add(5 * time.Second); a.volumes.Serving(volumeName(v.ID)) && time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
	}
	// There is no network here, so that the start itself does not come off; all before it does.
	begin := time.Now()
	if _, err := c.step(t.Context()); err == nil || public(err) != notUp {
		t.Errorf("step: %v", err)
	}
	if got := a.instances(t); len(got) != 0 {
		t.Errorf("it goes on without its disk: %v", got)
	}
	if d := time.Since(begin); d > 10*time.Second {
		t.Errorf("it had a grace of %v, in which it could do nothing", d)
	}
	if !a.volumes.Serving(volumeName(v.ID)) {
		t.Error("the volume was not opened again")
	}
}

// A new revision takes an old one's place, whose contract asked for a long grace. Meanwhile the contract is cancelled, or the
// ledger gives the workload another epoch.
func TestACancellationCutsAGraceShort(t *testing.T) {
	for name, then := range map[string]func(w *Workload) *Workload{
		"cancelled": func(*Workload) *Workload { return nil },
		"moved":     func(w *Workload) *Workload { m := *w; m.Epoch++; m.Instance += "-moved"; return &m },
	} {
		a := agent(t)
		d := deploy(t, a, nil)
		w := workloadOf(t, a, d)
		old := *w
		old.Instance, old.Volumes = "old-revision", nil
		sandboxFor(t, a, &old)
		c := a.newController(w.ID)
		c.want, c.imageOf, c.image.Manifest = w, w.Process.Image.Manifest, w.Process.Image.Manifest
		done := make(chan struct{})
		go func() { defer close(done); c.step(t.Context()) }()
		inGrace := func() bool { c.mu.Lock(); defer c.mu.Unlock(); return c.hurry != nil }
		for end := time.Now().Add(5 * time.Second); !inGrace(); time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%s: control: the old one has no grace", name)
			}
		}
		same := *w
		c.set(&same)
		select {
		case <-done:
			t.Fatalf("%s: control: its grace ended by itself", name)
		case <-time.After(200 * time.Millisecond):
		}
		c.set(then(w))
		select {
		case <-done:
		case <-time.After(10 * time.Second):
			t.Fatalf("%s: it uses the rest of its grace", name)
		}
		if got := a.instances(t); len(got) != 0 {
			t.Errorf("%s: %v run", name, got)
		}
	}
}

func TestNewRefusesWhatIsAbsent(t *testing.T) {
	keys, err := DeriveKeys([identity.SeedSize]byte{7})
	if err != nil {
		t.Fatal(err)
	}
	full := Config{Keys: keys, Data: "/d", Run: "/r", Runsc: "/b", Self: "/s", Cgroup: "/c"}
	if _, err := New(full); err != nil {
		t.Fatalf("control: %v", err)
	}
	for what, f := range map[string]func(*Config){
		"cgroup": func(c *Config) { c.Cgroup = "" }, "cgroup \"/\"": func(c *Config) { c.Cgroup = "/" }, "run": func(c *Config) { c.Run = "" },
		"data": func(c *Config) { c.Data = "rel" }, "runsc": func(c *Config) { c.Runsc = "" }, "self": func(c *Config) { c.Self = "" }, "keys": func(c *Config) { c.Keys = nil },
	} {
		c := full
		f(&c)
		if _, err := New(c); err == nil || !strings.Contains(err.Error(), what) {
			t.Errorf("without %s: %v", what, err)
		}
	}
}
