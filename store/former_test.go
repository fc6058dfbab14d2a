package store

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"holdfast/disperse"
	"holdfast/store/location"
)

// Locations come and go, drain and come back, fail in the middle of writes and of repairs, and the front end dies and is
// restored: a location that was ever sent a shard of a segment is never sent another one of it. Two would count twice towards
// the k that nobody but the store shall have.
func TestALocationNeverGetsTwoShardsOfASegment(t *testing.T) {
	ctx := t.Context()
	var mu sync.Mutex
	sent := map[disperse.ID]map[int]map[int]bool{} // segment, location: shards
	moved, twice := 0, 0
	var mac *disperse.Key
	watch := func(at int) func(context.Context, location.Name, []byte) error {
		return func(_ context.Context, _ location.Name, b []byte) error {
			mu.Lock()
			defer mu.Unlock()
			st, err := disperse.Check(mac, b)
			if err != nil {
				t.Errorf("location %d got what is no shard: %v", at, err)
				return nil
			}
			if sent[st.ID] == nil {
				sent[st.ID] = map[int]map[int]bool{}
			}
			has := sent[st.ID][at]
			if has == nil {
				has = map[int]bool{}
				sent[st.ID][at] = has
			}
			if has[st.Index] = true; len(has) > 1 {
				twice++
			}
			return nil
		}
	}
	b, evils, s := evilBed(t, 3, 5, 8, nil)
	mac = &s.keys().shards
	begin := func() {
		for i, e := range evils {
			e.put = watch(i)
			e.enabled.Store(true)
		}
	}
	begin()
	var bodies []Body
	var wants [][]byte
	for i := range 6 {
		wants = append(wants, noise(100_000))
		bodies = append(bodies, keep(t, s, fmt.Sprint(i), "", wants[i]))
	}
	settle := func() {
		for range 3 {
			if _, err := s.Repair(ctx); err != nil {
				t.Fatal(err)
			}
		}
	}
	for round := range 24 {
		off := rand.IntN(8)
		switch round % 4 {
		case 0, 1: // it is silent, and comes back
			b.faults[off].set(silent, nil)
			for range 2 {
				if err := putObject(ctx, s, "x", noise(70_000)); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := s.Scrub(ctx, 0); err != nil {
				t.Fatal(err)
			}
			for i := range bodies {
				s.notice(bodies[i].Segments[0].ID, true)
			}
			settle()
			b.faults[off].set(nil, nil)
			for range 3 {
				s.probe(ctx)
			}
		case 2:
			if err := s.Drain(ctx, disperse.Place{byte(off + 1)}); err != nil {
				t.Fatal(err)
			}
			// It takes what it is sent, and says that it did not.
			b.faults[(off+1)%8].set(nil, func(_ context.Context, op string) error {
				if op == "put" {
					return errFault
				}
				return nil
			})
			settle()
			b.faults[(off+1)%8].set(nil, nil)
			if err := s.Undrain(ctx, disperse.Place{byte(off + 1)}); err != nil {
				t.Fatal(err)
			}
		default:
			bodies = append(bodies, keep(t, s, fmt.Sprint("later", round), "", noise(100_000)))
			wants = append(wants, nil)
			s.Close()
			if rand.IntN(2) == 0 {
				s = b.restored()
			} else {
				s = b.opened()
			}
			begin()
		}
		for _, m := range s.all { // what was done to them is over
			m.suspect.Store(false)
			m.answered(nil, time.Millisecond)
		}
	}
	for i, x := range bodies {
		if wants[i] != nil {
			same(t, s, x, wants[i])
		}
	}
	for _, at := range sent {
		moved += max(len(at)-5, 0)
	}
	if moved < 10 {
		t.Errorf("only %d shards moved", moved)
	}
	if twice > 0 {
		t.Errorf("%d times a location was sent a second shard of a segment; %d moved", twice, moved)
	}
}

// Three locations are drained and what they had is moved, while the front end takes no snapshot. Its disk is lost then: what
// heads, blocks and the snapshot say of places is still true. With the next snapshot the rest moves, and it can be lost again.
func TestAStoreWhoseShardsMovedIsRestored(t *testing.T) {
	for _, what := range []string{"the blocks", "the snapshot"} {
		t.Run(what, func(t *testing.T) { movedAndRestored(t, what == "the snapshot") })
	}
}

func movedAndRestored(t *testing.T, snapshot bool) {
	ctx := t.Context()
	b, _, s := evilBed(t, 3, 5, 9, nil)
	want := map[string][]byte{}
	put := func(n int) {
		for range n {
			key := fmt.Sprint("key", len(want))
			want[key] = noise(2000)
			if len(want)%5 == 0 {
				want[key] = noise(100_000)
			}
			if err := putObject(ctx, s, key, want[key]); err != nil {
				t.Fatal(err)
			}
		}
	}
	put(10)
	if err := s.Snapshot(ctx); err != nil {
		t.Fatal(err)
	}
	put(10)
	// Of what would be read by a restore fewer than k shards would be where they were.
	gone := s.last.record.Members[:3]
	if snapshot {
		gone = s.snapshot.Load().record.Members[:3]
	}
	move := func() {
		for range 4 {
			if _, err := s.Repair(ctx); err != nil {
				t.Fatal(err)
			}
		}
		for range 2 { // what nothing refers to is removed
			if _, err := s.Scrub(ctx, 0); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, i := range gone {
		if err := s.Drain(ctx, s.placeOf(i)); err != nil {
			t.Fatal(err)
		}
	}
	shards := func() (n int64) {
		for _, m := range statusOf(t, s).Members {
			if m.State == Draining {
				n += m.Shards
			}
		}
		return n
	}
	before := shards()
	move()
	if now := shards(); now == 0 || now >= before {
		t.Errorf("%d shards were at the locations that are drained, then %d", before, now)
	}
	check := func(s *Store) {
		t.Helper()
		for key, w := range want {
			if got, err := getObject(ctx, s, key); err != nil || !bytes.Equal(got, w) {
				t.Fatalf("%s: %d bytes, %v", key, len(got), err)
			}
		}
	}
	check(s)
	s.Close()
	s = b.restored()
	check(s)
	for range 2 {
		if err := s.Snapshot(ctx); err != nil {
			t.Fatal(err)
		}
		put(5)
		move()
	}
	s.Close()
	s = b.restored()
	check(s)
}

// Locations of four farms are lost one after another, and what they had is made elsewhere: no farm gets more than its share.
func TestRepairGivesNoFarmMoreThanItsShare(t *testing.T) {
	ctx := t.Context()
	b, _, s := evilBed(t, 4, 6, 12, func(c *Config) {
		for i := range c.Members {
			c.Members[i].Farm = fmt.Sprint(i / 3)
		}
	})
	var bodies []Body
	for i := range 12 {
		bodies = append(bodies, keep(t, s, fmt.Sprint(i), "", noise(80_000)))
	}
	moved := 0
	was := map[disperse.ID][]uint16{}
	for _, off := range []int{0, 4, 8, 1} {
		b.faults[off].set(silent, nil)
		for i := range bodies {
			s.notice(bodies[i].Segments[0].ID, true)
		}
		for range 3 { // it is known as silent after the first
			if _, err := s.Repair(ctx); err != nil {
				t.Fatal(err)
			}
			for i := range bodies {
				s.notice(bodies[i].Segments[0].ID, true)
			}
		}
		for _, x := range bodies {
			r := recordOf(t, s, x)
			farms := map[string]int{}
			for _, i := range r.Members {
				farms[s.memberAt(i).Farm]++
			}
			for f, n := range farms {
				if n > 2 {
					t.Errorf("farm %s has %d shards of a segment", f, n)
				}
			}
			if old := was[r.ID]; old != nil && !slices.Equal(old, r.Members) {
				moved++
			}
			was[r.ID] = r.Members
		}
	}
	if moved < 5 {
		t.Errorf("only %d segments were repaired elsewhere", moved)
	}
}
