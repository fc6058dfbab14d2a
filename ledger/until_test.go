package ledger

import (
	"strings"
	"testing"
	"time"

	"holdfast/contract"
)

// What a mempool refuses never comes into a block, and its nonce stays good: only its time ends it.
func TestATransactionEndsInTime(t *testing.T) {
	x := newGrid(t, "lab")
	squat := x.header("squat", func(h *contract.Header) { h.Routes[0].Host = "app.localhost" })
	x.must(x.deploy(squat))
	given := x.tx(KindFarmAdmit, Actor{ID: x.g.GridAccount()}, &FarmAdmit{Name: "late", Owner: x.acct}, x.admin)
	taken := x.tx(KindFarmAdmit, Actor{ID: x.g.GridAccount()}, &FarmAdmit{Name: "farm-1", Owner: x.acct}, x.admin)
	if err := x.s.Check(taken.Encode()); err == nil || !strings.Contains(err.Error(), "exists") {
		t.Fatalf("what is refused at the mempool: %v", err)
	}
	if err := x.s.Check(given.Encode()); err != nil {
		t.Fatalf("control: %v", err)
	}
	x.at = x.at.Add(time.Hour)
	x.block([]int{0, 1, 2})
	for name, tx := range map[string]*Tx{"one that would do": given, "one that was refused": taken} {
		root := x.s.Root()
		if r := x.submit(tx); r.Code != CodeNonce || !strings.Contains(r.Log, "its time is over") || x.s.Root() != root {
			t.Errorf("%s, an hour later: %+v", name, r)
		}
	}
	far := NewTx(x.g.GridID(), KindFarmAdmit, Actor{ID: x.g.GridAccount()}, given.Nonce, &FarmAdmit{Name: "late", Owner: x.acct})
	for _, tc := range []struct {
		name, want string
		until      time.Time
	}{
		{"for ever", "more than 168h0m0s are not allowed", time.Unix(1<<62, 0)},
		{"for a little more than is allowed", "more than 168h0m0s are not allowed", x.at.Add(MaxTxLife + 3*time.Second)},
		{"without a time", "its time is over", time.Unix(0, 0)},
		{"before all times", "its time is over", time.Unix(-1<<62, 0)},
		{"as long as is allowed", "", x.at.Add(MaxTxLife)},
	} {
		tx := *far
		tx.Until = tc.until.Unix()
		tx.Sign(x.admin)
		if tc.want == "" {
			x.must(&tx)
		} else {
			x.refused(tc.name, &tx, tc.want)
		}
	}
	changed := *given // the time is signed
	changed.Nonce++
	changed.Until += 7200
	x.refused("with its time changed", &changed, "does not verify")
}
