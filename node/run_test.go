package node

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"holdfast/api"
	"holdfast/api/apitest"
	"holdfast/contract"
	"holdfast/identity"
	"holdfast/ledger"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A whole Agent over a real ledger. A tenant fills the tmpfs while it runs: the node stays up and keeps its lease. It finds
// what an agent before it has left half made, and a sandbox of a workload that the ledger does not know.
func TestAnAgentRunsOnAFullTmpfs(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	const inside = "HOLDFAST_TEST_NETNS"
	if os.Getenv(inside) == "" {
		// Its firewall is for a whole machine: it gets a network of its own.
		cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
		cmd.Env = append(os.Environ(), inside+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET, Pdeathsig: unix.SIGKILL}
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS") {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		t.Fatal(err)
	}
	g := apitest.Start(t, nil)
	client := g.Client(nil)
	a := agent(t)
	a.lease.close()
	cfg := a.cfg
	cfg.Client, cfg.Run = client, filepath.Join(tmpfs(t, "4m"), "run")
	next, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	admin, key := ledger.Actor{ID: g.Genesis.GridAccount()}, g.Admin.DeviceKey()
	farm, err := client.Act(g.Context(), ledger.KindFarmAdmit, admin, &ledger.FarmAdmit{Name: "farm-1", Owner: g.Genesis.GridAccount()}, key)
	if err != nil {
		t.Fatal(err)
	}
	adm, err := cfg.Keys.Admission(client.Grid(), identity.FarmID(farm.ID()), "node-1", nil, Offer{CPUMilli: 1000, Memory: 1 << 30})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.Act(g.Context(), ledger.KindNodeAdmit, admin, adm, key); err != nil {
		t.Fatal(err)
	}
	left := []string{filepath.Join(cfg.Data, "blobs", "ab", ".put-1"), filepath.Join(cfg.Data, "volumes", ".new-x.img")}
	for _, f := range left {
		if err := os.MkdirAll(filepath.Dir(f), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(f, []byte("half"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	sandboxFor(t, next, &Workload{ID: contract.WorkloadID{9}, Contract: contract.ID{9}, Instance: "of-a-cancelled-contract", Epoch: 1})

	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- next.Run(ctx) }()
	until := func(what string, f func() bool) {
		t.Helper()
		for end := time.Now().Add(20 * time.Second); !f(); time.Sleep(20 * time.Millisecond) {
			select {
			case err := <-done:
				t.Fatalf("the agent ended: %v", err)
			default:
			}
			if time.Now().After(end) {
				t.Fatalf("%s did not come", what)
			}
		}
	}
	until("the lease", next.lease.ok)
	until("the end of what was cancelled", func() bool { return len(next.instances(t)) == 0 })
	until("the end of its controller", func() bool { next.mu.Lock(); defer next.mu.Unlock(); return len(next.control) == 0 })
	for _, f := range left {
		if _, err := os.Stat(f); err == nil {
			t.Errorf("%s is left", f)
		}
	}
	if err := os.WriteFile(filepath.Join(cfg.Run, "..", "image"), make([]byte, 8<<20), 0o600); err == nil {
		t.Fatal("control: the tmpfs is not full")
	}
	was := next.lease.deadline.Load()
	until("two more leases", func() bool { return next.lease.deadline.Load() > was+int64(2*time.Second) })
	g.Until(client, "the node being up", func(ctx context.Context) (bool, error) {
		rec, err := api.Get[ledger.Node](ctx, client, ledger.NodeKey(cfg.Keys.ID))
		return err == nil && rec.Up, err
	})
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
