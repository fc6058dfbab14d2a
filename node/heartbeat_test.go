package node

import (
	"crypto/ed25519"
	"encoding/binary"
	"slices"
	"strings"
	"testing"

	"holdfast/contract"
	"holdfast/identity"
	"holdfast/ledger"
)

// A tenant with many workloads, all of which say much, does not make the node fall silent.
func TestAFullNodesHeartbeatIsHeard(t *testing.T) {
	pub, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	beat := func(n int, reason string) *ledger.Heartbeat {
		h := &ledger.Heartbeat{Grid: identity.GridID{1}, Node: identity.NodeID{2}, Sequence: 1 << 60}
		for i := range n {
			r := ledger.Report{Contract: contract.ID{1}, Service: strings.Repeat("s", 63), Replica: uint16(i), Epoch: 1 << 40, Revision: 1 << 30, State: ledger.StateWaiting, Reason: reason, Restarts: 1 << 30, ExitCode: -1}
			binary.BigEndian.PutUint32(r.Workload[:], uint32(i))
			h.Workloads = append(h.Workloads, r)
		}
		return h
	}
	long := strings.Repeat("ä", 100) + "."
	for _, tc := range []struct {
		name    string
		n       int
		reason  int // bytes left of each
		dropped bool
	}{
		{"few say all", 100, len(long), false},
		{"more say it short", 1100, 32, false},
		{"many give no reasons", 1400, 0, false},
		{"too many lose the last", 3000, 0, true},
	} {
		h := beat(tc.n, long)
		h.Sign(key)
		if _, err := ledger.DecodeHeartbeat(h.Encode()); (err != nil) != (tc.n > 1000) {
			t.Fatalf("control: %s uncut: %v", tc.name, err)
		}
		h = beat(tc.n, long)
		dropped := fit(h, ledger.MaxHeartbeat)
		h.Sign(key)
		got, err := ledger.DecodeHeartbeat(h.Encode())
		if err != nil {
			t.Errorf("%s: %v", tc.name, err)
			continue
		}
		if err := got.Verify(h.Grid, &ledger.Node{ID: h.Node, Session: [32]byte(pub)}); err != nil {
			t.Errorf("%s: %v", tc.name, err)
		}
		if len(got.Workloads)+dropped != tc.n || (dropped > 0) != tc.dropped {
			t.Errorf("%s: %d of %d are told", tc.name, len(got.Workloads), tc.n)
		}
		if slices.ContainsFunc(got.Workloads, func(r ledger.Report) bool { return len(r.Reason) != tc.reason }) {
			t.Errorf("%s: reasons of %d bytes", tc.name, len(got.Workloads[0].Reason))
		}
	}
}
