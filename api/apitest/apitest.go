// Package apitest runs a grid of one validator inside a test: the real ledger, consensus and API on loopback, with no
// gateway and no machines. Nodes are made up by the test, which speaks for them. It is only imported by tests.
package apitest

import (
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"holdfast/api"
	"holdfast/identity"
	"holdfast/ledger"
	"holdfast/ledger/comet"
	"holdfast/store"
)

// Grid is a grid that runs until its test ends.
type Grid struct {
	T       testing.TB
	Genesis *ledger.Genesis
	Admin   *identity.KeyFile // of the grid's account
	Cert    tls.Certificate   // the validator's: who has it can play the validator
	Blobs   string            // directory
	Stored  <-chan error      // what became of each upload that reached the store
	BlobMax int64             // bytes of one blob
	Data    string            // directory of the validator, with its ledger
	Stop    func()            // ends the validator before the test does
}

// Key is a key file made from one byte.
func Key(seed byte) *identity.KeyFile {
	return &identity.KeyFile{Device: [32]byte{seed, 1}, Root: [32]byte{seed, 2}}
}

// Start runs a grid. edit may be nil.
func Start(t testing.TB, edit func(*api.ValidatorConfig)) *Grid {
	t.Helper()
	dir := t.TempDir()
	stored := make(chan error, 64)
	g := &Grid{T: t, Admin: Key(1), Blobs: filepath.Join(dir, "blobs"), BlobMax: 1 << 20, Stored: stored}
	home := filepath.Join(dir, "ledger")
	keys, err := comet.MakeKeys(home)
	if err != nil {
		t.Fatal(err)
	}
	if g.Cert, err = comet.LoadCertificate(filepath.Join(dir, "tls.pem"), "holdfast validator"); err != nil {
		t.Fatal(err)
	}
	pin, err := comet.PinOf(g.Cert)
	if err != nil {
		t.Fatal(err)
	}
	open, err := g.Admin.OpeningKey()
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g.Genesis = &ledger.Genesis{
		Version: 1, Name: "test", Time: time.Now().Add(-time.Minute).Unix(), Policy: identity.SingleDevice(), Sealing: open.Public(),
		Devices:    []identity.Device{{Name: "admin", Key: g.Admin.DeviceKey().Public()}},
		Validators: []ledger.Validator{{Name: "validator", Key: keys.Public, Power: 10, TLS: pin, Address: l.Addr().String()}},
		Lease:      5 * time.Second, Margin: time.Second,
		Delays: ledger.Delays{Cancel: 2 * time.Second, Policy: time.Second, Retain: 20 * time.Second},
	}
	cfg := api.ValidatorConfig{
		Genesis: g.Genesis, Home: home, P2P: freeAddr(t), API: l, TLS: g.Cert,
		Blobs: told{store.NewDir(g.Blobs, g.BlobMax), stored},
	}
	if testing.Verbose() {
		cfg.Log = slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
	}
	if edit != nil {
		edit(&cfg)
	}
	v, err := api.NewValidator(cfg)
	if err != nil {
		l.Close()
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- v.Run(ctx) }()
	g.Data, g.Stop = dir, sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("validator: %v", err)
		}
	})
	t.Cleanup(g.Stop)
	select {
	case <-v.Ready():
	case err := <-done:
		done <- nil
		t.Fatalf("validator: %v", err)
	case <-time.After(30 * time.Second):
		t.Fatal("the validator is not ready after 30 s")
	}
	return g
}

// freeAddr finds a port for consensus, which cannot be told to take a listener.
func freeAddr(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// told says what became of each Put.
type told struct {
	store.Blobs
	done chan<- error
}

func (b told) Put(ctx context.Context, d store.Digest, r io.Reader) error {
	err := b.Blobs.Put(ctx, d, r)
	b.done <- err
	return err
}

// Addr is where the validator's API listens.
func (g *Grid) Addr() string { return g.Genesis.Validators[0].Address }

// Context ends with the test, or after half a minute.
func (g *Grid) Context() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	g.T.Cleanup(cancel)
	return ctx
}

// Client reads the grid. edit may be nil.
func (g *Grid) Client(edit func(*api.ClientConfig)) *api.Client {
	g.T.Helper()
	cfg := api.ClientConfig{Genesis: g.Genesis}
	if edit != nil {
		edit(&cfg)
	}
	c, err := api.NewClient(cfg)
	if err != nil {
		g.T.Fatal(err)
	}
	g.T.Cleanup(c.Close)
	return c
}

// Account puts an account with one device on the ledger.
func (g *Grid) Account(c *api.Client, keys *identity.KeyFile) identity.AccountID {
	g.T.Helper()
	tx := NewAccount(g.Genesis.GridID(), keys)
	if _, err := c.Submit(g.Context(), tx); err != nil {
		g.T.Fatal(err)
	}
	id := identity.AccountID(tx.ID())
	g.Until(c, "the account", func(ctx context.Context) (bool, error) {
		_, err := api.Get[identity.Account](ctx, c, ledger.AccountKey(id))
		return err == nil, err
	})
	return id
}

// NewAccount is the signed transaction that makes an account with one device.
func NewAccount(grid identity.GridID, keys *identity.KeyFile) *ledger.Tx {
	open, err := keys.OpeningKey()
	if err != nil {
		panic(err) // derived from 32 bytes, which cannot fail
	}
	k := keys.DeviceKey()
	tx := ledger.NewTx(grid, ledger.KindAccountCreate, ledger.Actor{}, 0, &ledger.AccountCreate{
		Devices: []identity.Device{{Name: "laptop", Key: k.Public()}}, Policy: identity.SingleDevice(), Sealing: open.Public(),
	})
	tx.Sign(k)
	return tx
}

// Node is a machine that a test speaks for.
type Node struct {
	ID      identity.NodeID
	Name    string
	Key     *identity.PrivateKey
	Open    *identity.OpeningKey
	Session ed25519.PrivateKey
	TLS     tls.Certificate
	grid    identity.GridID
	beat    uint64
}

// Node admits a node, on a farm of its own, which keeps shards too, and whose keys are made from one byte.
func (g *Grid) Node(c *api.Client, name string, seed byte) *Node {
	g.T.Helper()
	admin, key := ledger.Actor{ID: g.Genesis.GridAccount()}, g.Admin.DeviceKey()
	farm, err := c.Act(g.Context(), ledger.KindFarmAdmit, admin, &ledger.FarmAdmit{Name: "farm-of-" + name, Owner: g.Genesis.GridAccount()}, key)
	if err != nil {
		g.T.Fatal(err)
	}
	open, err := identity.NewOpeningKey([32]byte{seed, 3})
	if err != nil {
		g.T.Fatal(err)
	}
	n := &Node{Name: name, Key: identity.NewKey([32]byte{seed, 4}), Open: open, Session: ed25519.NewKeyFromSeed(append([]byte{seed, 5}, make([]byte, 30)...)), grid: c.Grid()}
	n.TLS, err = comet.LoadCertificate(filepath.Join(g.T.TempDir(), "tls.pem"), name)
	if err != nil {
		g.T.Fatal(err)
	}
	pin, err := comet.PinOf(n.TLS)
	if err != nil {
		g.T.Fatal(err)
	}
	pub := n.Key.Public()
	n.ID = pub.Node()
	a := &ledger.NodeAdmit{
		Farm: identity.FarmID(farm.ID()), Name: name, Key: pub, Sealing: open.Public(), Session: [32]byte(n.Session.Public().(ed25519.PublicKey)),
		WireGuard: sha256.Sum256([]byte{seed, 6}), TLS: pin, Endpoints: []string{"2001:db8::1"}, CPUMilli: 4000, Memory: 8 << 30,
		Storage: 1 << 40, Location: sha256.Sum256([]byte{seed, 7}),
	}
	a.Proof = n.Key.Sign(ledger.NodeAdmitPurpose, a.ProofBytes(c.Grid()))
	if _, err := c.Act(g.Context(), ledger.KindNodeAdmit, admin, a, key); err != nil {
		g.T.Fatal(err)
	}
	return n
}

// Heartbeat is the node's next one, signed by its session key.
func (n *Node) Heartbeat(reports ...ledger.Report) *ledger.Heartbeat {
	n.beat = max(n.beat+1, uint64(time.Now().UnixNano()))
	h := &ledger.Heartbeat{Grid: n.grid, Node: n.ID, Sequence: n.beat, Workloads: reports}
	h.Sign(n.Session)
	return h
}

// Until follows the ledger until f is content.
func (g *Grid) Until(c *api.Client, what string, f func(context.Context) (bool, error)) {
	g.T.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	for height := int64(0); ; {
		ok, err := f(ctx)
		if err == nil && ok {
			return
		}
		h, werr := c.Watch(ctx, height)
		if ctx.Err() != nil {
			g.T.Fatalf("%s did not come within half a minute: %v", what, errors.Join(err, werr))
		}
		height = h
	}
}

// Up waits until the ledger counts a node as up.
func (g *Grid) Up(c *api.Client, n *Node) {
	g.T.Helper()
	g.Until(c, fmt.Sprintf("%s being up", n.Name), func(ctx context.Context) (bool, error) {
		rec, err := api.Get[ledger.Node](ctx, c, ledger.NodeKey(n.ID))
		return err == nil && rec.Up, err
	})
}
