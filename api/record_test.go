package api_test

import (
	"bytes"
	"crypto/sha256"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
	"time"

	"holdfast/api"
	"holdfast/api/apitest"
	"holdfast/contract"
	"holdfast/internal/canonical"
	"holdfast/ledger"
)

// recorded is a contract that was revised, whose disk was made, and that was cancelled, with another one beside it.
type recorded struct {
	*apitest.Grid
	client *api.Client
	id     contract.ID
	bodies map[[32]byte][]byte
}

func newRecorded(t *testing.T) *recorded {
	g := apitest.Start(t, nil)
	r := &recorded{Grid: g, client: g.Client(nil), bodies: map[[32]byte][]byte{}}
	keys := apitest.Key(7)
	account := g.Account(r.client, keys)
	n := g.Node(r.client, "node-1", 11)
	if err := r.client.Heartbeat(g.Context(), n.Heartbeat().Encode()); err != nil {
		t.Fatal(err)
	}
	g.Up(r.client, n)
	actor := ledger.Actor{ID: account}
	submit := func(h *contract.Header) *contract.Header {
		t.Helper()
		body := &contract.Body{Version: 1}
		k := contract.NewKeys(h, nil)
		sealed, err := contract.Seal(h, k, body)
		if err != nil {
			t.Fatal(err)
		}
		r.bodies[h.SealedBody] = sealed
		pub := n.Open.Public()
		e, err := contract.SealEnvelope(h.RevisionID(), contract.RecipientNode, n.ID, &pub, k)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.client.Act(g.Context(), ledger.KindContractSubmit, actor, &ledger.ContractSubmit{Header: h.Encode(), Envelopes: []contract.Envelope{*e}}, keys.DeviceKey()); err != nil {
			t.Fatal(err)
		}
		return h
	}
	header := func(name string) *contract.Header {
		return &contract.Header{
			Version: 1, Grid: r.client.Grid(), Account: account, Name: name, Revision: 1, Networks: []string{"default"},
			Services: []contract.Service{{Name: "web", Replicas: 1, CPUMilli: 500, Memory: 64 << 20, Pids: 100, Networks: []string{"default"}, Volumes: []string{"data"}}},
			Volumes:  []contract.Volume{{Name: "data", Size: 1 << 30}},
		}
	}
	submit(header("other"))
	first := submit(header("app"))
	r.id = first.ContractID()
	if _, err := r.client.Act(g.Context(), ledger.KindVolumeCreated, ledger.Actor{Node: true, ID: n.ID}, &ledger.VolumeCreated{Volume: contract.VolumeOf(r.id, "data")}, n.Key); err != nil {
		t.Fatal(err)
	}
	next := *first
	next.Revision, next.Contract, next.Previous = 2, r.id, first.RevisionID()
	submit(&next)
	if _, err := r.client.Act(g.Context(), ledger.KindContractCancel, actor, &ledger.ContractCancel{Contract: r.id}, keys.DeviceKey()); err != nil {
		t.Fatal(err)
	}
	return r
}

func (r *recorded) body(h *contract.Header) ([]byte, error) {
	b, ok := r.bodies[h.SealedBody]
	if !ok {
		return nil, fmt.Errorf("no body of revision %d", h.Revision)
	}
	return b, nil
}

// A record convinces whoever has the genesis, and nobody can change a bit of it, leave something out of it, or pass it off as
// that of another grid or contract.
func TestARecordIsVerifiedWithTheGenesisAlone(t *testing.T) {
	r := newRecorded(t)
	raw, v, err := r.client.ExportContract(r.Context(), r.id, r.body)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	again, err := api.VerifyRecord(raw, r.Genesis, now)
	if err != nil {
		t.Fatal(err)
	}
	var kinds []string
	for _, d := range again.Deeds {
		kinds = append(kinds, string(d.Kind))
	}
	if got, want := strings.Join(kinds, " "), "contract.submit volume.created contract.submit contract.cancel"; got != want || len(v.Deeds) != len(again.Deeds) {
		t.Fatalf("%s, want %s", got, want)
	}
	if again.Contract.ID != r.id || again.Bodies != 2 || again.Contract.Revision != 2 {
		t.Errorf("%+v", again)
	}
	verify := func(b []byte) error { _, err := api.VerifyRecord(b, r.Genesis, now); return err }
	n := 400
	if os.Getenv("HOLDFAST_LONG") != "" {
		n = len(raw)
	}
	for i := range n {
		at := i
		if n < len(raw) {
			at = rand.IntN(len(raw))
		}
		bit := byte(1) << rand.IntN(8)
		b := bytes.Clone(raw)
		b[at] ^= bit
		if verify(b) == nil {
			t.Fatalf("bit %#x of byte %d of %d was flipped and nobody saw it", bit, at, len(raw))
		}
		if _, err := api.VerifyRecord(b, nil, now); err == nil {
			t.Fatalf("bit %#x of byte %d of %d was flipped and nobody saw it who has no genesis", bit, at, len(raw))
		}
	}

	change := func(f func(*api.Record)) []byte {
		var x api.Record
		if err := canonical.Decode(raw, api.MaxRecord, &x); err != nil {
			t.Fatal(err)
		}
		f(&x)
		return canonical.Encode(&x)
	}
	if err := verify(change(func(*api.Record) {})); err != nil {
		t.Fatal("control:", err)
	}
	other := *r.Genesis
	other.Name = "other"
	for name, b := range map[string][]byte{
		"without a block":           change(func(x *api.Record) { x.Blocks = append(x.Blocks[:1:1], x.Blocks[2:]...) }),
		"without the end":           change(func(x *api.Record) { x.Blocks = x.Blocks[:len(x.Blocks)-1] }),
		"without the last deed":     change(func(x *api.Record) { x.Blocks = append(x.Blocks[:len(x.Blocks)-2], x.Blocks[len(x.Blocks)-1]) }),
		"of another contract":       change(func(x *api.Record) { x.Contract[0] ^= 1 }),
		"of another grid":           change(func(x *api.Record) { x.Genesis = other.Encode() }),
		"without the node's record": change(func(x *api.Record) { x.Entries = x.Entries[:len(x.Entries)-1] }),
		"with a record too many":    change(func(x *api.Record) { x.Entries = append(x.Entries, x.Entries[0]) }),
		"with an older contract":    change(func(x *api.Record) { x.Entries[1].Value = x.Entries[2].Value }),
		"with one body":             change(func(x *api.Record) { x.Bodies = x.Bodies[:1] }),
		"with bodies that changed":  change(func(x *api.Record) { x.Bodies[0], x.Bodies[1] = x.Bodies[1], x.Bodies[0] }),
		"with a body too many":      change(func(x *api.Record) { x.Bodies = append(x.Bodies, x.Bodies[1]) }),
		"nothing":                   nil,
	} {
		if verify(b) == nil {
			t.Errorf("%s: it is believed", name)
		}
	}
	if err := verify(change(func(x *api.Record) { x.Bodies = nil })); err != nil {
		t.Errorf("bodies may be left out: %v", err)
	}
	if _, err := api.VerifyRecord(raw, &other, now); err == nil || !strings.Contains(err.Error(), "not of") {
		t.Errorf("with another genesis: %v", err)
	}
	if _, err := api.VerifyRecord(raw, r.Genesis, now.Add(-time.Hour)); err == nil {
		t.Error("a record of the future is believed")
	}
	if _, _, err := r.client.ExportContract(r.Context(), contract.ID{1}, nil); err == nil {
		t.Error("a contract that there is not was exported")
	}
	if *writeRecord {
		if err := os.WriteFile(frozenRecord, raw, 0o644); err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: %x, grid %v", frozenRecord, sha256.Sum256(raw), r.client.Grid())
	}
}

var writeRecord = flag.Bool("write-record", false, "make the frozen record anew")

const frozenRecord = "testdata/record"

// The frozen record is one that a grid of one validator made: whoever reads the format today reads it for ever.
func TestTheFrozenRecordStillVerifies(t *testing.T) {
	raw, err := os.ReadFile(frozenRecord)
	if err != nil {
		t.Fatal(err)
	}
	v, err := api.VerifyRecord(raw, nil, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	const digest = "1d20bb237ea0007676895cb67a82c25a1217a44729eee9142f28666154d7cd88"
	const grid = "grid1dz383ytem0ew77x2ll2hswp6p88pj6k47hmw80rh0rvjdy624khsg7u6uh"
	if got := fmt.Sprintf("%x", sha256.Sum256(raw)); got != digest || v.Grid.String() != grid {
		t.Errorf("%s of %v", got, v.Grid)
	}
	if len(v.Deeds) != 4 || v.Contract.Name != "app" || v.Contract.State != ledger.Cancelled || v.Bodies != 2 || v.Deeds[3].Kind != ledger.KindContractCancel {
		t.Errorf("%+v", v)
	}
}

func FuzzRecord(f *testing.F) {
	raw, err := os.ReadFile(frozenRecord)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw)
	f.Add(raw[:100])
	f.Fuzz(func(t *testing.T, b []byte) {
		v, err := api.VerifyRecord(b, nil, time.Now())
		if err == nil && !bytes.Equal(b, raw) && v.Contract == nil {
			t.Error("a record of nothing is believed")
		}
	})
}
