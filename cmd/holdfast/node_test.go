package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"holdfast/api"
	"holdfast/api/apitest"
	"holdfast/gateway"
	"holdfast/identity"
	"holdfast/internal/grid"
	"holdfast/ledger"
	"holdfast/ledger/comet"
	"holdfast/node"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

func TestAnIDThatBeginsLikeAnotherIsRefused(t *testing.T) {
	one, like, other := identity.NodeID{1, 2, 3, 4, 5, 6}, identity.NodeID{1, 2, 3, 4, 5, 7}, identity.NodeID{9}
	if one.Short() != like.Short() {
		t.Fatal("control: they do not begin alike")
	}
	asks := func(ids ...identity.NodeID) (out []wish) {
		for _, id := range ids {
			out = append(out, wish{ID: id, Name: "x"})
		}
		return out
	}
	nodes := func(ids ...identity.NodeID) (out []*ledger.Node) {
		for _, id := range ids {
			out = append(out, &ledger.Node{ID: id, Name: "n"})
		}
		return out
	}
	for _, x := range []struct {
		name   string
		id     string
		nodes  []*ledger.Node
		asking []wish
		want   identity.NodeID // zero: none
		err    string
	}{
		{"one that asks", one.Short(), nodes(other), asks(one, other), one, ""},
		{"one that is a node", other.Short(), nodes(other), asks(one), other, ""},
		{"none", like.String(), nodes(other), asks(one), identity.NodeID{}, ""},
		{"two that ask", one.Short(), nil, asks(one, other, like), identity.NodeID{}, "more than one"},
		{"one that asks like a node", one.Short(), nodes(like), asks(one), identity.NodeID{}, one.String() + " asks as x"},
		{"the whole ID of one of them", one.String(), nodes(like), asks(one, like), one, ""},
	} {
		n, w, err := find(x.id, x.nodes, x.asking)
		var got identity.NodeID
		if n != nil {
			got = n.ID
		}
		if w != nil {
			got = w.ID
		}
		if got != x.want || (err == nil) != (x.err == "") || err != nil && !strings.Contains(err.Error(), x.err) {
			t.Errorf("%s: %v %v", x.name, got, err)
		}
	}
}

// alone runs the test once more, in a process with a network and mounts of its own, and reports whether this is that one.
func alone(t *testing.T) bool {
	t.Helper()
	const inside = "HOLDFAST_TEST_NETNS"
	if os.Getenv(inside) != "" {
		lo, err := netlink.LinkByName("lo")
		if err := errors.Join(err, netlink.LinkSetUp(lo), unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")); err != nil {
			t.Fatal(err)
		}
		return true
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS, Pdeathsig: unix.SIGKILL}
	if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS") {
		t.Fatalf("%v\n%s", err, out)
	}
	return false
}

// neighbour is somebody on the cable of this process's network, which has 10.9.9.1 there. It tries to connect, from a
// network of its own.
func neighbour(t *testing.T) (try func(addr string) error) {
	t.Helper()
	type request struct {
		addr string
		err  chan error
	}
	ready, requests := make(chan int), make(chan request)
	t.Cleanup(func() { close(requests) })
	go func() {
		runtime.LockOSThread() // and it ends with its thread
		if unix.Unshare(unix.CLONE_NEWNET) != nil {
			close(ready)
			return
		}
		ready <- unix.Gettid()
		for r := range requests {
			c, err := net.DialTimeout("tcp", r.addr, 500*time.Millisecond)
			if err == nil {
				c.Close()
			}
			r.err <- err
		}
	}()
	tid, ok := <-ready
	if !ok {
		t.Fatal("no network for the neighbour")
	}
	fd, err := unix.Open(fmt.Sprintf("/proc/self/task/%d/ns/net", tid), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "eth0", PeerNamespace: netlink.NsFd(fd)}); err != nil {
		t.Fatal(err)
	}
	far, err := netlink.NewHandleAt(netns.NsHandle(fd))
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	near, err := netlink.NewHandle()
	if err != nil {
		t.Fatal(err)
	}
	defer near.Close()
	for i, h := range []*netlink.Handle{near, far} {
		l, err := h.LinkByName("eth0")
		if err != nil {
			t.Fatal(err)
		}
		a, err := netlink.ParseAddr(fmt.Sprintf("10.9.9.%d/24", i+1))
		if err := errors.Join(err, h.AddrAdd(l, a), h.LinkSetUp(l)); err != nil {
			t.Fatal(err)
		}
	}
	return func(addr string) error {
		r := request{addr, make(chan error, 1)}
		requests <- r
		return <-r.err
	}
}

// A machine that knows a grid ID, an address and a farm becomes a node. Somebody on its cable tries to connect before it
// has the genesis, while it waits to be approved, and when it is a node.
func TestAMachineIsShutBeforeItAsks(t *testing.T) {
	if !alone(t) {
		return
	}
	g := apitest.Start(t, nil)
	c := g.Client(nil)
	farm, err := c.Act(g.Context(), ledger.KindFarmAdmit, ledger.Actor{ID: g.Genesis.GridAccount()}, &ledger.FarmAdmit{Name: "farm-1", Owner: g.Genesis.GridAccount()}, g.Admin.DeviceKey())
	if err != nil {
		t.Fatal(err)
	}
	try := neighbour(t)
	open, err := net.Listen("tcp", "10.9.9.1:0") // a planted listener
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	shut := func(when string) {
		t.Helper()
		if err := try(open.Addr().String()); !os.IsTimeout(err) {
			t.Errorf("%s: a connection from the cable ends with %v", when, err)
		}
	}
	for limit := time.Now().Add(20 * time.Second); ; {
		err := try(open.Addr().String())
		if err == nil {
			break
		}
		if time.Now().After(limit) {
			t.Fatalf("control: %v", err)
		}
	}
	// The first address tries the machine when it is dialled, and knows no genesis.
	first, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	dialled := make(chan struct{})
	go func() {
		defer close(dialled)
		conn, err := first.Accept()
		if err != nil {
			return
		}
		shut("when it dials for the first time")
		conn.Close()
		first.Close()
	}()
	// The second one is a gateway's public port.
	table := node.NewEdgeTable(g.Genesis)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	edge, err := gateway.NewEdge(gateway.EdgeConfig{Listener: l, Certificate: edgeCertificate(t), TunnelName: node.TunnelName(c.Grid()), Routes: table, Authorize: table.Authorize})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	edged := make(chan error, 1)
	go func() { edged <- edge.Run(ctx) }()

	dir := t.TempDir()
	cfg := &grid.NodeConfig{
		Name: "new", Genesis: filepath.Join(dir, "genesis"), Data: dir, Run: filepath.Join(dir, "run"), Key: filepath.Join(dir, "node.key"),
		Runsc: "/bin/holdfast-runsc", Cgroup: "/holdfast-test",
		Grid: c.Grid().String(), From: first.Addr().String() + "," + l.Addr().String(), Farm: identity.FarmID(farm.ID()).String(),
	}
	if err := errors.Join(os.Mkdir(cfg.Run, 0o700), unix.Mount("none", cfg.Run, "tmpfs", 0, "")); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(cfg.Run, unix.MNT_DETACH)
	done := make(chan error, 1)
	go func() { done <- runNode(ctx, cfg) }()
	<-dialled
	var asks []*ledger.NodeAdmit
	for end := time.Now().Add(20 * time.Second); len(asks) == 0; time.Sleep(20 * time.Millisecond) {
		if asks, err = c.Pending(g.Context()); err != nil || time.Now().After(end) {
			t.Fatalf("it does not ask: %v", err)
		}
	}
	shut("while it waits")
	if got, err := readGenesis(cfg.Genesis); err != nil || got.GridID() != c.Grid() {
		t.Errorf("the genesis on its disk: %v", err)
	}
	if _, err := c.Act(g.Context(), ledger.KindNodeAdmit, ledger.Actor{ID: g.Genesis.GridAccount()}, asks[0], g.Admin.DeviceKey()); err != nil {
		t.Fatal(err)
	}
	g.Until(c, "the node being up", func(ctx context.Context) (bool, error) {
		rec, err := api.Get[ledger.Node](ctx, c, ledger.NodeKey(asks[0].Key.Node()))
		return err == nil && rec.Up, err
	})
	shut("when it is a node")
	cancel()
	if err := <-done; err != nil {
		t.Errorf("asked to end: %v", err)
	}
	if err := <-edged; err != nil {
		t.Error(err)
	}

	// A file of another grid is not overwritten, and not believed.
	for name, x := range map[string]struct {
		edit func(*grid.NodeConfig)
		err  string
	}{
		"a genesis of another grid":     {func(c *grid.NodeConfig) { c.Grid = identity.GridID{1}.String() }, "is the genesis of " + c.Grid().String()},
		"a grid ID with a typo":         {func(c *grid.NodeConfig) { c.Grid = "grid1qqqq" }, "--grid: "},
		"another kind of ID":            {func(c *grid.NodeConfig) { c.Grid = c.Farm }, "a grid identifier is needed"},
		"a farm that is none":           {func(c *grid.NodeConfig) { c.Farm = "farm-1" }, "--farm: "},
		"an address without a port":     {func(c *grid.NodeConfig) { c.From = "2001:db8::1" }, "is not host:port"},
		"nowhere to get a genesis from": {func(c *grid.NodeConfig) { c.Genesis, c.From = "/nowhere/genesis", "" }, "/nowhere/genesis: no such file"},
		"a genesis without its grid":    {func(c *grid.NodeConfig) { c.Genesis, c.Grid = "/nowhere/genesis", "" }, "/nowhere/genesis: no such file"},
	} {
		bad := *cfg
		x.edit(&bad)
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		if err := runNode(ctx, &bad); err == nil || !strings.Contains(err.Error(), x.err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func edgeCertificate(t *testing.T) tls.Certificate {
	t.Helper()
	cert, err := comet.LoadCertificate(filepath.Join(t.TempDir(), "edge"), "edge")
	if err != nil {
		t.Fatal(err)
	}
	return cert
}
