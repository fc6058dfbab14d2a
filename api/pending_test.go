package api

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"holdfast/identity"
	"holdfast/internal/canonical"
	"holdfast/ledger"
)

// asker is a machine that asks, made from a number.
func asker(grid identity.GridID, farm identity.FarmID, n int, edit func(*ledger.NodeAdmit)) *ledger.NodeAdmit {
	k := identity.NewKey([32]byte{byte(n), byte(n >> 8), 1})
	a := &ledger.NodeAdmit{Farm: farm, Name: fmt.Sprint("node-", n), Key: k.Public(), Endpoints: []string{"2001:db8::1"}, CPUMilli: 1000, Memory: 1 << 30}
	if edit != nil {
		edit(a)
	}
	a.Proof = k.Sign(ledger.NodeAdmitPurpose, a.ProofBytes(grid))
	return a
}

// board is a pending with a ledger and a clock of the test's.
type board struct {
	pending
	grid   identity.GridID
	ledger map[string]bool
	now    time.Time
}

func newBoard(farms ...identity.FarmID) *board {
	b := &board{grid: identity.GridID{1}, ledger: map[string]bool{}, now: time.Unix(1_800_000_000, 0)}
	for _, f := range farms {
		b.ledger[ledger.FarmKey(f)] = true
	}
	return b
}

func (b *board) known(key string) bool { return b.ledger[key] }

func (b *board) ask(a *ledger.NodeAdmit, from string) (status int, err error) {
	err = b.add(b.grid, b.known, a.Encode(), netip.MustParsePrefix(from), b.now)
	if x, ok := errors.AsType[refusal](err); ok {
		return x.status, err
	}
	return http.StatusNoContent, err
}

func (b *board) names() []string {
	var out []string
	for _, raw := range b.list(b.known, b.now) {
		a, err := ledger.DecodeNodeAdmit(raw)
		if err != nil {
			panic(err) // it was decoded before it was kept
		}
		out = append(out, a.Name)
	}
	slices.Sort(out)
	return out
}

// sources are addresses that look like those of different networks' customers.
func sources(i int) string { return fmt.Sprintf("2001:%x::/64", i) }

func TestNobodyIsPushedOffTheBoard(t *testing.T) {
	var farms []identity.FarmID
	for i := range 2 * maxPending / maxPendingFarm {
		farms = append(farms, identity.FarmID{byte(i + 1)})
	}
	for _, x := range []struct {
		name string
		farm func(i int) identity.FarmID
		from func(i int) string
		most int
		why  string
	}{
		{"one source", func(i int) identity.FarmID { return farms[i%len(farms)] }, func(int) string { return sources(7) }, maxPendingSource, "8 machines of 2001:7::/64 wait"},
		{"one site with many networks", func(i int) identity.FarmID { return farms[i%len(farms)] }, func(i int) string { return fmt.Sprintf("2001:db8:7:%x::/64", i) }, 16, "16 machines of 2001:db8:7::/48 wait"},
		{"one provider with many sites", func(i int) identity.FarmID { return farms[i%len(farms)] }, func(i int) string { return fmt.Sprintf("2001:db8:%x::/64", i) }, 24, "24 machines of 2001:db8::/32 wait"},
		{"neighbours of IPv4", func(i int) identity.FarmID { return farms[i%len(farms)] }, func(i int) string { return fmt.Sprintf("203.0.113.%d/32", i) }, 16, "16 machines of 203.0.113.0/24 wait"},
		{"many networks of IPv4", func(i int) identity.FarmID { return farms[i%len(farms)] }, func(i int) string { return fmt.Sprintf("203.0.%d.1/32", i) }, 24, "24 machines of 203.0.0.0/16 wait"},
		{"one farm", func(int) identity.FarmID { return farms[3] }, sources, maxPendingFarm, "32 machines wait to be admitted to farm1"},
		{"all", func(i int) identity.FarmID { return farms[i%len(farms)] }, sources, maxPending, "256 machines wait to be admitted, "},
	} {
		t.Run(x.name, func(t *testing.T) {
			b := newBoard(farms...)
			first := asker(b.grid, x.farm(0), 0, nil)
			for i := range x.most {
				if _, err := b.ask(asker(b.grid, x.farm(i), i, nil), x.from(i)); err != nil {
					t.Fatalf("control: machine %d: %v", i, err)
				}
			}
			before := b.names()
			for i := x.most; i < x.most+3; i++ {
				if status, err := b.ask(asker(b.grid, x.farm(i), i, nil), x.from(i)); status != http.StatusTooManyRequests || !strings.Contains(err.Error(), x.why) {
					t.Errorf("machine %d: %d %v", i, status, err)
				}
			}
			if _, err := b.ask(first, x.from(0)); err != nil {
				t.Errorf("who waits already says it again: %v", err)
			}
			if got := b.names(); len(before) != x.most || !slices.Equal(got, before) {
				t.Errorf("%d machines wait, before %d", len(got), len(before))
			}
			// Room comes when one is admitted, and when all are silent.
			b.ledger[ledger.NodeKey(first.Key.Node())] = true
			b.now = b.now.Add(2 * time.Second)
			if _, err := b.ask(asker(b.grid, x.farm(0), 1000, nil), x.from(0)); err != nil {
				t.Errorf("after one was admitted: %v", err)
			}
			b.now = b.now.Add(pendingLife + time.Second)
			if got := b.names(); len(got) != 0 {
				t.Errorf("after %v of silence there are %q", pendingLife, got)
			}
		})
	}
}

// A stranger repeats what machines said that are gone, to use up the places of their address.
func TestWhoRepeatsAWishDoesSoAtHisOwnCost(t *testing.T) {
	farm := identity.FarmID{1}
	b := newBoard(farm)
	mine, theirs := sources(1), sources(2)
	for i := range maxPendingSource {
		if _, err := b.ask(asker(b.grid, farm, i, nil), mine); err != nil {
			t.Fatal(err)
		}
	}
	if status, err := b.ask(asker(b.grid, farm, 50, nil), mine); status != http.StatusTooManyRequests {
		t.Fatalf("control: %d %v", status, err)
	}
	b.now = b.now.Add(pendingLife - time.Second)
	for i := range maxPendingSource {
		if _, err := b.ask(asker(b.grid, farm, i, nil), theirs); err != nil {
			t.Fatal(err)
		}
	}
	b.now = b.now.Add(2 * time.Second)
	for i := range maxPendingSource {
		if _, err := b.ask(asker(b.grid, farm, 100+i, nil), mine); err != nil {
			t.Errorf("a new machine: %v", err)
		}
	}
	if status, err := b.ask(asker(b.grid, farm, 200, nil), theirs); status != http.StatusTooManyRequests {
		t.Errorf("the stranger has places left: %d %v", status, err)
	}
}

func TestAWishIsWhatTheMachineSaidLast(t *testing.T) {
	farm := identity.FarmID{1}
	b := newBoard(farm)
	for _, ep := range []string{"2001:db8::1", "2001:db8::2"} {
		if _, err := b.ask(asker(b.grid, farm, 1, func(a *ledger.NodeAdmit) { a.Endpoints = []string{ep} }), sources(1)); err != nil {
			t.Fatal(err)
		}
		b.now = b.now.Add(pendingLife - time.Second) // it does not go while it asks
	}
	all := b.list(b.known, b.now)
	if len(all) != 1 {
		t.Fatalf("%d wishes", len(all))
	}
	if a, err := ledger.DecodeNodeAdmit(all[0]); err != nil || a.Endpoints[0] != "2001:db8::2" {
		t.Errorf("%v %v", a, err)
	}
}

func FuzzPending(f *testing.F) {
	grid := identity.GridID{1}
	good := asker(grid, identity.FarmID{1}, 1, nil)
	f.Add(canonical.Encode([][]byte{good.Encode()}))
	f.Add(good.Encode())
	f.Add(canonical.Encode([][]byte{asker(identity.GridID{2}, identity.FarmID{1}, 1, nil).Encode()}))
	f.Fuzz(func(t *testing.T, b []byte) {
		byID := map[identity.NodeID]*ledger.NodeAdmit{}
		decodePending(b, grid, byID)
		for id, a := range byID {
			if id != a.Key.Node() || a.Check(grid) != nil {
				t.Errorf("%v does not verify", id)
			}
		}
		if a, err := ledger.DecodeNodeAdmit(b); err == nil && string(a.Encode()) != string(b) {
			t.Error("one wish, two encodings")
		}
		x := newBoard(identity.FarmID{1})
		if x.add(grid, x.known, b, netip.Prefix{}, x.now) == nil && len(x.all) != 1 {
			t.Errorf("%d wishes are kept of one", len(x.all))
		}
	})
}
