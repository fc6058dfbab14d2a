package node

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"holdfast/api"
	"holdfast/api/apitest"
	"holdfast/contract"
	"holdfast/identity"
	"holdfast/internal/testimage"
	"holdfast/ledger"
	"holdfast/sandbox"
	"holdfast/seal"
	"holdfast/store"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// stuck are blobs of which one never comes.
type stuck struct {
	store.Blobs
	never atomic.Pointer[store.Digest]
}

func (s *stuck) Open(ctx context.Context, d store.Digest) (io.ReadCloser, int64, error) {
	if n := s.never.Load(); n != nil && *n == d {
		<-ctx.Done()
		return nil, 0, ctx.Err()
	}
	return s.Blobs.Open(ctx, d)
}

// alone runs the rest of a test as root in a network and mounts of its own, since an agent is for a whole machine. It reports
// whether this is the process that does.
func alone(t *testing.T) bool {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	const inside = "HOLDFAST_TEST_ALONE"
	if os.Getenv(inside) == "" {
		cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
		cmd.Env = append(os.Environ(), inside+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS, Pdeathsig: unix.SIGKILL}
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS") {
			t.Fatalf("%v\n%s", err, out)
		}
		return false
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		t.Fatal(err)
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		t.Fatal(err)
	}
	return true
}

// neighbours are contracts of one account on one node, over a real ledger and in real sandboxes.
type neighbours struct {
	*apitest.Grid
	*Agent
	t     *testing.T
	owner identity.AccountID
	key   *identity.PrivateKey
	blobs *store.Dir
	image contract.Image
}

// put stores a blob, sealed, as a client does.
func (x *neighbours) put(plain []byte) contract.Blob {
	x.t.Helper()
	return putSealed(x.t, x.blobs, plain)
}

func putSealed(t *testing.T, to *store.Dir, plain []byte) contract.Blob {
	t.Helper()
	digest := testimage.Digest(plain)
	b := contract.Blob{Digest: digest, Size: uint64(len(plain)), Key: seal.BlobKey([32]byte{1}, digest)}
	var sealed bytes.Buffer
	w, err := seal.NewWriter(&sealed, b.Key)
	if err == nil {
		_, err = w.Write(plain)
	}
	if err == nil {
		err = w.Close()
	}
	b.Sealed = sha256.Sum256(sealed.Bytes())
	if err == nil {
		err = to.Put(t.Context(), b.Sealed, &sealed)
	}
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// deploy puts a contract of one workload on the ledger. before sees it as it will be, ahead of its submission.
func (x *neighbours) deploy(name string, edit func(*contract.Header, *contract.Process), before func(*contract.Header, *contract.Keys)) contract.WorkloadID {
	x.t.Helper()
	h := &contract.Header{
		Version: 1, Grid: x.client.Grid(), Account: x.owner, Name: name, Revision: 1, Networks: []string{"default"},
		Services: []contract.Service{{Name: "web", Replicas: 1, CPUMilli: 100, Memory: 64 << 20, Pids: 100, Networks: []string{"default"}}},
	}
	b := &contract.Body{Version: 1, Services: []contract.Process{{Name: "web", Image: x.image}}}
	if edit != nil {
		edit(h, &b.Services[0])
	}
	keys := contract.NewKeys(h, nil)
	sealed, err := contract.Seal(h, keys, b)
	if err == nil {
		err = x.blobs.Put(x.t.Context(), h.SealedBody, bytes.NewReader(sealed))
	}
	if err != nil {
		x.t.Fatal(err)
	}
	if before != nil {
		before(h, keys)
	}
	to := x.cfg.Keys.Open.Public()
	e, err := contract.SealEnvelope(h.RevisionID(), contract.RecipientNode, x.cfg.Keys.ID, &to, keys)
	if err == nil {
		_, err = x.client.Act(x.Context(), ledger.KindContractSubmit, ledger.Actor{ID: x.owner}, &ledger.ContractSubmit{Header: h.Encode(), Envelopes: []contract.Envelope{*e}}, x.key)
	}
	if err != nil {
		x.t.Fatalf("%s: %v", name, err)
	}
	return contract.WorkloadOf(h.ContractID(), "web", 0)
}

// spoil flips a bit of a blob in a directory of them.
func spoil(t *testing.T, dir string, d [32]byte) {
	t.Helper()
	sum := fmt.Sprintf("%x", d)
	path := filepath.Join(dir, sum[:2], sum)
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	raw[len(raw)/2] ^= 1
	if err := os.WriteFile(path, raw, 0o600); err != nil {
		t.Fatal(err)
	}
}

func (x *neighbours) report(id contract.WorkloadID) (ledger.Report, *Workload) {
	x.mu.Lock()
	c, w := x.control[id], x.wanted[id]
	x.mu.Unlock()
	if c == nil {
		return ledger.Report{}, w
	}
	r, _ := c.status()
	return r, w
}

// ask asks a workload over its network, as the node's Origin does for a route.
func (x *neighbours) ask(id contract.WorkloadID) (string, error) {
	_, w := x.report(id)
	if w == nil {
		return "", fmt.Errorf("%v is not wanted", id)
	}
	ctx, cancel := context.WithTimeout(x.t.Context(), 20*time.Second)
	defer cancel()
	conn, err := x.dial(ctx, w.Network, netip.AddrPortFrom(w.Address, 8080))
	if err != nil {
		return "", err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	fmt.Fprint(conn, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return "", err
	}
	b, err := io.ReadAll(resp.Body)
	return string(b), err
}

func (x *neighbours) until(what string, f func() bool) {
	x.t.Helper()
	for end := time.Now().Add(60 * time.Second); !f(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			x.t.Fatalf("%s did not come", what)
		}
	}
}

func (x *neighbours) sandbox(id contract.WorkloadID) (out sandbox.Status) {
	all, err := x.runner.List(x.t.Context())
	if err != nil {
		x.t.Fatal(err)
	}
	for _, s := range all {
		if s.Labels[label] == id.String() && s.State == sandbox.Running {
			out = s
		}
	}
	return out
}

// A peer's oldest complaint: one contract that fails takes others with it. Here a healthy one has for neighbours one whose image
// was changed, one that ends again and again, one whose envelope does not open, one whose body is not stored, one whose body
// never comes, and one whose volume cannot be opened. It answers all the time; and what comes after them all is started.
func TestOneContractsFailureIsNotAnothers(t *testing.T) {
	if !alone(t) {
		return
	}
	runsc, err := filepath.Abs("../bin/holdfast-runsc")
	if err == nil {
		_, err = os.Stat(runsc)
	}
	if err != nil {
		t.Fatalf("%v: run make build first", err)
	}
	x := &neighbours{t: t}
	slow := &stuck{}
	dir := t.TempDir()
	x.blobs = store.NewDir(dir, 64<<20)
	slow.Blobs = x.blobs
	x.Grid = apitest.Start(t, func(cfg *api.ValidatorConfig) { cfg.Blobs = slow })
	a := agent(t)
	a.lease.close()
	cfg := a.cfg
	cfg.Client, cfg.Runsc, cfg.Run = x.Grid.Client(nil), runsc, filepath.Join(tmpfs(t, "256m"), "run")
	cfg.Cgroup = fmt.Sprintf("/holdfast-apart-%d", os.Getpid())
	if x.Agent, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	client, admin, key := cfg.Client, ledger.Actor{ID: x.Genesis.GridAccount()}, x.Admin.DeviceKey()
	farm, err := client.Act(x.Context(), ledger.KindFarmAdmit, admin, &ledger.FarmAdmit{Name: "farm-1", Owner: x.Genesis.GridAccount()}, key)
	if err != nil {
		t.Fatal(err)
	}
	adm, err := cfg.Keys.Admission(client.Grid(), identity.FarmID(farm.ID()), "node-1", nil, Offer{CPUMilli: 4000, Memory: 4 << 30})
	if err == nil {
		_, err = client.Act(x.Context(), ledger.KindNodeAdmit, admin, adm, key)
	}
	if err != nil {
		t.Fatal(err)
	}
	second := x.Node(client, "node-2", 9) // it never comes up, and is to have everybody's keys
	user := apitest.Key(7)
	x.owner, x.key = x.Account(client, user), user.DeviceKey()
	img, err := testimage.Server(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	x.image = contract.Image{Reference: "registry.example/server:1", Manifest: img.Manifest}
	for _, b := range img.Blobs {
		x.image.Blobs = append(x.image.Blobs, x.put(b))
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- x.Agent.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		end, stop := context.WithTimeout(context.Background(), time.Minute)
		defer stop()
		all, _ := x.runner.List(end)
		for _, s := range all {
			if err := x.runner.Kill(end, s.ID); err != nil {
				t.Error(err)
			}
		}
		if err := x.Agent.Stop(end); err != nil {
			t.Error(err)
		}
	})

	good := x.deploy("good", nil, nil)
	x.until("the healthy one", func() bool { _, err := x.ask(good); return err == nil })
	first := x.sandbox(good)
	var asked, failed atomic.Int64
	asking, enough := context.WithCancel(t.Context())
	quiet := make(chan struct{})
	go func() {
		defer close(quiet)
		for asking.Err() == nil {
			if text, err := x.ask(good); err != nil || !strings.Contains(text, "hello from") {
				failed.Add(1)
				t.Errorf("the healthy one does not answer: %q, %v", text, err)
			}
			asked.Add(1)
			time.Sleep(20 * time.Millisecond)
		}
	}()
	defer func() { enough(); <-quiet }()

	other := x.image
	layer := testimage.Layer(testimage.Entry{Header: tar.Header{Name: "marker"}, Data: []byte("of the tampered image alone")})
	more, err := testimage.Server(t.TempDir(), layer)
	if err != nil {
		t.Fatal(err)
	}
	other.Manifest, other.Blobs = more.Manifest, nil
	for _, b := range more.Blobs {
		other.Blobs = append(other.Blobs, x.put(b))
	}
	tampered := x.deploy("tampered", func(_ *contract.Header, p *contract.Process) { p.Image = other }, func(*contract.Header, *contract.Keys) {
		for _, b := range other.Blobs {
			if b.Digest == testimage.Digest(layer) {
				spoil(t, dir, b.Sealed)
			}
		}
	})
	loops := x.deploy("loops", func(_ *contract.Header, p *contract.Process) { p.Command = []string{"print", "gone"} }, nil)
	shut := x.deploy("shut", nil, func(_ *contract.Header, k *contract.Keys) { k.Body[0]++ })
	nobody := x.deploy("nobody", nil, func(h *contract.Header, _ *contract.Keys) {
		sum := fmt.Sprintf("%x", h.SealedBody)
		if err := os.Remove(filepath.Join(dir, sum[:2], sum)); err != nil {
			t.Fatal(err)
		}
	})
	disk := x.deploy("disk", func(h *contract.Header, p *contract.Process) {
		h.Services[0].Volumes, h.Volumes = []string{"data"}, []contract.Volume{{Name: "data", Size: 1 << 30}}
		p.Mounts = []contract.Mount{{Volume: "data", Target: "/data"}}
	}, func(h *contract.Header, _ *contract.Keys) {
		image := filepath.Join(cfg.Data, "volumes", volumeName(contract.VolumeOf(h.ContractID(), "data"))+".img")
		if err := os.MkdirAll(filepath.Join(image, "in the way"), 0o700); err != nil {
			t.Fatal(err)
		}
	})
	hangs := x.deploy("hangs", nil, func(h *contract.Header, _ *contract.Keys) {
		d := store.Digest(h.SealedBody)
		slow.never.Store(&d)
	})
	late := x.deploy("late", nil, nil)
	x.until("the one that came last", func() bool { _, err := x.ask(late); return err == nil })
	for name, want := range map[contract.WorkloadID]struct {
		what, state, reason string
	}{
		tampered: {"tampered", ledger.StateWaiting, imageRefused},
		shut:     {"shut", ledger.StateWaiting, contract.ErrBody.Error()},
		nobody:   {"nobody", ledger.StateWaiting, errNoBody.Error()},
		hangs:    {"hangs", ledger.StateWaiting, errNoBody.Error()},
		disk:     {"disk", ledger.StateFailed, "its volume cannot be opened"},
	} {
		x.until(want.what+" being seen", func() bool {
			r, _ := x.report(name)
			return r.State == want.state && r.Reason == want.reason
		})
	}
	x.until("three ends of the one that loops", func() bool { r, _ := x.report(loops); return r.Restarts >= 3 })
	var rev contract.RevisionID
	again := x.deploy("again", nil, func(h *contract.Header, _ *contract.Keys) { rev = h.RevisionID() })
	x.until("the one that came after all that", func() bool { _, err := x.ask(again); return err == nil })
	x.Until(client, "the keys of the last one, handed on", func(ctx context.Context) (bool, error) {
		_, err := api.Get[contract.Envelope](ctx, client, ledger.EnvelopeKey(rev, contract.RecipientNode, second.ID))
		return err == nil, err
	})
	enough()
	<-quiet
	if asked.Load() < 10 || failed.Load() > 0 {
		t.Errorf("%d of %d answers failed", failed.Load(), asked.Load())
	}
	if now := x.sandbox(good); now.ID == "" || now.ID != first.ID || !now.StartedAt.Equal(first.StartedAt) {
		t.Errorf("the healthy one was %+v, it is %+v", first, now)
	}
	if r, _ := x.report(good); r.Restarts != 0 || r.State != ledger.StateRunning {
		t.Errorf("the healthy one says %+v", r)
	}
}

// A machine was off, and somebody had its disk: a bit of an image's sealed blobs is another. Whichever it is, the workload is
// not started from it.
func TestARestartReadsTheWholeImageAgain(t *testing.T) {
	layer := testimage.Layer(testimage.Entry{Header: tar.Header{Name: "server"}, Data: bytes.Repeat([]byte("program "), 1000)})
	img := testimage.New(ocispec.ImageConfig{Cmd: []string{"/server"}}, layer)
	parts := map[string]string{testimage.Digest(layer): "the layer", img.Manifest: "the manifest"}
	for digest := range img.Blobs {
		name := parts[digest]
		if name == "" {
			name = "the configuration"
		}
		t.Run(name, func(t *testing.T) {
			a := agent(t)
			var image contract.Image
			d := deploy(t, a, func(_ *contract.Header, b *contract.Body) {
				image = contract.Image{Reference: "registry.example/app", Manifest: img.Manifest}
				for _, raw := range img.Blobs {
					image.Blobs = append(image.Blobs, putSealed(t, a.blobs, raw))
				}
				b.Services[0].Image = image
			})
			w := workloadOf(t, a, d)
			start := func() error {
				next := agent(t) // its tmpfs is empty
				next.cfg.Data, next.blobs = a.cfg.Data, a.blobs
				c := next.newController(w.ID)
				c.want = w
				return c.prepare(t.Context(), w)
			}
			if err := start(); err != nil {
				t.Fatalf("control: %v", err)
			}
			for _, b := range image.Blobs {
				if b.Digest == digest {
					spoil(t, filepath.Join(a.cfg.Data, "blobs"), b.Sealed)
				}
			}
			if err := start(); err == nil || public(err) != imageRefused {
				t.Errorf("%v", err)
			}
		})
	}
}
