package node

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"holdfast/api"
	"holdfast/api/apitest"
	"holdfast/contract"
	"holdfast/ledger"
)

// The image of a volume stays while its contract can come back, and goes with the record that the ledger retires.
func TestVolumesOfRetiredContractsGo(t *testing.T) {
	g := apitest.Start(t, func(c *api.ValidatorConfig) {
		c.Genesis.Delays = ledger.Delays{Cancel: time.Second, Retain: 3 * time.Second}
	})
	client := g.Client(nil)
	keys := apitest.Key(7)
	acct := g.Account(client, keys)
	a := agent(t)
	me := ledger.Actor{ID: acct}
	submit := func(name string) *contract.Header {
		t.Helper()
		h := &contract.Header{
			Version: 1, Grid: client.Grid(), Account: acct, Name: name, Revision: 1, SealedSize: 100, Networks: []string{"default"}, Volumes: []contract.Volume{{Name: "data", Size: 1 << 20}},
			Services: []contract.Service{{Name: "db", Replicas: 1, CPUMilli: 100, Memory: 64 << 20, Pids: 100, Networks: []string{"default"}, Volumes: []string{"data"}}},
		}
		if _, err := client.Act(g.Context(), ledger.KindContractSubmit, me, &ledger.ContractSubmit{Header: h.Encode()}, keys.DeviceKey()); err != nil {
			t.Fatal(err)
		}
		return h
	}
	if err := os.MkdirAll(filepath.Join(a.cfg.Data, "volumes"), 0o700); err != nil {
		t.Fatal(err)
	}
	image := func(id contract.VolumeID) string {
		return filepath.Join(a.cfg.Data, "volumes", volumeName(id)+".img")
	}
	disk := func(id contract.VolumeID) contract.VolumeID {
		t.Helper()
		if err := a.noteVolume(id); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(image(id), []byte("disk"), 0o600); err != nil {
			t.Fatal(err)
		}
		return id
	}
	stays, goes := submit("stays"), submit("goes")
	kept, gone := disk(contract.VolumeOf(stays.ContractID(), "data")), disk(contract.VolumeOf(goes.ContractID(), "data"))
	used := disk(contract.VolumeID{1}) // the ledger does not know it, and a workload here uses it
	there := func(id contract.VolumeID) bool { _, err := os.Stat(image(id)); return err == nil }
	bury := func() {
		t.Helper()
		if err := a.bury(g.Context(), client, map[string]bool{volumeName(used): true}, 0); err != nil {
			t.Fatal(err)
		}
	}
	until := func(state string) {
		t.Helper()
		g.Until(client, state, func(ctx context.Context) (bool, error) {
			c, err := api.Get[ledger.Contract](ctx, client, ledger.ContractKey(goes.ContractID()))
			return err == nil && c.State == state, err
		})
	}
	if bury(); !there(kept) || !there(gone) || !there(used) {
		t.Fatal("a volume of the ledger's is removed")
	}
	if _, err := client.Act(g.Context(), ledger.KindContractCancel, me, &ledger.ContractCancel{Contract: goes.ContractID()}, keys.DeviceKey()); err != nil {
		t.Fatal(err)
	}
	until(ledger.Cancelled)
	if bury(); !there(gone) {
		t.Fatal("it went while its contract can come back")
	}
	until(ledger.Retired)
	if bury(); there(gone) || !there(kept) || !there(used) {
		t.Errorf("the retired one's is there: %v; the other's: %v; the used one: %v", there(gone), there(kept), there(used))
	}
	if left, err := os.ReadDir(a.volumeIDs()); err != nil || len(left) != 2 {
		t.Errorf("%d are noted, %v", len(left), err)
	}
}
