package store

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"holdfast/disperse"
	"holdfast/store/location"
)

// another opens one more location of a bed, which its store does not have.
func another(t *testing.T, b *bed) Member {
	t.Helper()
	i := len(b.dirs)
	d, err := newSite(filepath.Join(filepath.Dir(b.frontAt), fmt.Sprint("location-", i)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	b.dirs, b.faults = append(b.dirs, d), append(b.faults, &faulty{})
	return Member{ID: disperse.Place{byte(i + 1)}, Farm: fmt.Sprint("farm", i), Location: &through{d.As(everything), b.faults[i]}}
}

func TestALostLocationIsReplacedWhileTheStoreRuns(t *testing.T) {
	ctx := t.Context()
	b := newBed(t, 4, 6)
	s := b.opened()
	var bodies []Body
	var wants [][]byte
	for i := range 10 {
		wants = append(wants, noise(40_000*(i+1)))
		bodies = append(bodies, keep(t, s, fmt.Sprint(i), "", wants[i]))
	}
	x := another(t, b)
	if err := s.Add(ctx, x); err != nil {
		t.Fatal(err)
	}
	if err := s.Add(ctx, x); !errors.Is(err, ErrMemberThere) {
		t.Errorf("add it twice: %v", err)
	}
	lost := disperse.Place{2}
	b.dirs[1].Close()
	if err := s.Drain(ctx, lost); err != nil {
		t.Fatal(err)
	}
	if err := s.Snapshot(ctx); err != nil {
		t.Fatal(err)
	}
	for i := range 4 {
		if err := set(ctx, s, "x", fmt.Sprint(i)); err != nil {
			t.Fatal(err)
		}
	}
	repairAll(t, s)
	if err := s.Remove(ctx, lost); err != nil {
		t.Fatal(err)
	}
	for _, m := range statusOf(t, s).Members {
		if m.ID == lost || m.State != Active {
			t.Errorf("afterwards %v is %v", m.ID, m.State)
		}
		if m.ID == x.ID && m.Shards == 0 {
			t.Error("the new one has nothing")
		}
	}
	if st := statusOf(t, s); st.Degraded > 0 {
		t.Errorf("%d segments are degraded", st.Degraded)
	}
	// Neither needs the lost one: a start with the new membership, and a restore.
	s.Close()
	b.change = func(c *Config) { c.Members = append(c.Members[:1:1], c.Members[2:]...) }
	for name, open := range map[string]func() *Store{"start": b.open, "restore": b.restored} {
		s = open()
		for i, x := range bodies {
			same(t, s, x, wants[i])
		}
		for _, m := range statusOf(t, s).Members {
			if m.ID == x.ID && (m.State != Active || m.Shards == 0) {
				t.Errorf("%s: the new one is %v with %d shards", name, m.State, m.Shards)
			}
		}
		s.Close()
	}
}

func TestALocationComesBackAfterItWasRemoved(t *testing.T) {
	ctx := t.Context()
	b := newBed(t, 4, 6)
	s := b.opened()
	x := another(t, b)
	for round := range 2 {
		if err := s.Add(ctx, x); err != nil {
			t.Fatal(round, err)
		}
		if err := s.Drain(ctx, x.ID); err != nil {
			t.Fatal(round, err)
		}
		if err := s.Remove(ctx, x.ID); err != nil {
			t.Fatal(round, err)
		}
	}
	if err := s.Undrain(ctx, x.ID); !errors.Is(err, ErrMember) {
		t.Errorf("undrain one that was removed: %v", err)
	}
}

func TestALocationOfAnotherStoreIsNotAdded(t *testing.T) {
	ctx := t.Context()
	other := newBed(t, 2, 3)
	if err := set(ctx, other.opened(), "a", "b"); err != nil {
		t.Fatal(err)
	}
	b := newBed(t, 2, 3)
	s := b.opened()
	if err := s.Add(ctx, Member{ID: disperse.Place{9}, Farm: "f", Location: other.dirs[0].As(everything)}); !errors.Is(err, ErrKeys) {
		t.Errorf("a location with another store's log: %v", err)
	}
	if err := s.Add(ctx, Member{ID: disperse.Place{9}, Farm: "f", Location: other.dirs[0].As(location.Read)}); !errors.Is(err, ErrKeys) && !errors.Is(err, location.ErrRights) {
		t.Errorf("a location that may not be written: %v", err)
	}
}

func TestKeysRotateWhileTheStoreRuns(t *testing.T) {
	ctx := t.Context()
	b := newBed(t, 4, 6)
	s := b.opened()
	want := noise(300_000)
	old := keep(t, s, "old", "", want)
	next, err := b.root.Keys(1)
	if err != nil {
		t.Fatal(err)
	}
	strange, err := NewRoot().Keys(1)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Rotate(strange); !errors.Is(err, ErrKeys) {
		t.Errorf("another store's keys: %v", err)
	}
	if err := s.Rotate(next); err != nil {
		t.Fatal(err)
	}
	if first, _ := b.root.Keys(0); !errors.Is(s.Rotate(first), ErrKeys) {
		t.Error("keys went back")
	}
	young := keep(t, s, "young", "", want)
	if r := recordOf(t, s, young); r.Key != 1 {
		t.Errorf("a new segment is under the key of epoch %d", r.Key)
	}
	heard := 0
	if _, left, err := s.Rewrap(ctx, func(changed, _ int) { heard = changed }); err != nil || left > 0 || heard == 0 {
		t.Fatal(left, heard, err)
	}
	if err := s.Snapshot(ctx); err != nil {
		t.Fatal(err)
	}
	if st := statusOf(t, s); st.Old > 0 {
		t.Errorf("%d are under the old key", st.Old)
	}
	// The phrase alone finds out which epoch it is.
	s.Close()
	s = b.restored()
	if got := s.Keys().Epoch; got != 1 {
		t.Errorf("restored with keys of epoch %d", got)
	}
	same(t, s, old, want)
	same(t, s, young, want)
}

func TestVerifyBelievesNobody(t *testing.T) {
	ctx := t.Context()
	b := newBed(t, 4, 6)
	s := b.opened()
	want := noise(400_000)
	body := keep(t, s, "a", "", want)
	sum, err := s.Verify(ctx, 0, nil)
	if err != nil || sum.Bad > 0 || sum.Shards < 6 || sum.Bytes < 600_000 {
		t.Fatalf("of what is well: %+v, %v", sum, err)
	}
	// Two of its shards' files are changed under their locations, which do not know of it.
	changed := 0
	for i := range 2 {
		err := filepath.Walk(filepath.Join(filepath.Dir(b.frontAt), fmt.Sprint("location-", i)), func(p string, st os.FileInfo, err error) error {
			if err != nil || st.IsDir() || st.Size() < 90_000 || st.Size() > 1<<20 || changed > i {
				return err
			}
			raw, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			raw[len(raw)/2] ^= 1
			changed++
			return os.WriteFile(p, raw, 0o600)
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if changed != 2 {
		t.Fatalf("%d shards were changed", changed)
	}
	if got, err := s.Scrub(ctx, 0); err != nil || got.Missing != 0 {
		t.Errorf("control: a scrub of lists finds %d, %v", got.Missing, err)
	}
	if sum, err = s.Verify(ctx, 0, nil); err != nil || sum.Bad != 2 {
		t.Fatalf("of two changed: %+v, %v", sum, err)
	}
	if st := statusOf(t, s); st.Degraded != 1 {
		t.Errorf("%d segments are degraded", st.Degraded)
	}
	repairAll(t, s)
	if sum, err = s.Verify(ctx, 0, nil); err != nil || sum.Bad > 0 {
		t.Errorf("after repair: %+v, %v", sum, err)
	}
	same(t, s, body, want)
	begin := time.Now()
	if _, err := s.Verify(ctx, int(sum.Bytes), nil); err != nil || time.Since(begin) < 700*time.Millisecond {
		t.Errorf("at its size a second it took %v, %v", time.Since(begin), err)
	}
}
