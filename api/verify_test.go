package api_test

import (
	"errors"
	"strings"
	"testing"

	"holdfast/api"
	"holdfast/api/apitest"
	"holdfast/ledger"
	"holdfast/ledger/comet"
)

// What a real ledger did, executed again, gives what it has, while it does not run.
func TestVerifyLedger(t *testing.T) {
	r := newRecorded(t)
	home := r.Data + "/ledger"
	if _, err := api.VerifyLedger(t.Context(), r.Genesis, home, nil); err == nil || !strings.Contains(err.Error(), "lock") {
		t.Errorf("of one that runs: %v", err)
	}
	r.Stop()
	c, err := api.VerifyLedger(t.Context(), r.Genesis, home, nil)
	if err != nil || !c.Replayed || c.State < 8 {
		t.Fatalf("%+v, %v", c, err)
	}
	other := apitest.Start(t, nil)
	if _, err := api.VerifyLedger(t.Context(), other.Genesis, home, nil); !errors.Is(err, comet.ErrDamaged) {
		t.Errorf("by another genesis: %v", err)
	}
	lenient := *r.Genesis
	lenient.Limits.Account = ledger.Quota{Contracts: 1}
	if _, err := api.VerifyLedger(t.Context(), &lenient, home, nil); !errors.Is(err, comet.ErrDamaged) {
		t.Errorf("by other rules: %v", err)
	}
}
