package store

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	mrand "math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"holdfast/disperse"
	"holdfast/store/location"
)

// evil is a location that does something else where a test wants it to.
type evil struct {
	location.Location
	put     func(ctx context.Context, n location.Name, b []byte) error // before; nil goes on
	get     func(ctx context.Context, n location.Name, off int64, p []byte) error
	stat    func(n location.Name) (location.Info, error)
	prove   func(n location.Name, leaves []int) (location.Proof, error)
	list    func(ctx context.Context, from location.Name, which location.Which) ([]location.Info, location.Name, error)
	status  func(*location.Status)
	del     func(ctx context.Context) error
	puts    atomic.Int64
	enabled atomic.Bool
}

func (e *evil) Status(ctx context.Context) (location.Status, error) {
	st, err := e.Location.Status(ctx)
	if e.status != nil && e.enabled.Load() {
		e.status(&st)
	}
	return st, err
}

func (e *evil) Delete(ctx context.Context, n location.Name) error {
	if e.del != nil && e.enabled.Load() {
		if err := e.del(ctx); err != nil {
			return err
		}
	}
	return e.Location.Delete(ctx, n)
}

func (e *evil) Put(ctx context.Context, n location.Name, b []byte, until time.Time) error {
	e.puts.Add(1)
	if e.put != nil && e.enabled.Load() {
		if err := e.put(ctx, n, b); err != nil {
			return err
		}
	}
	return e.Location.Put(ctx, n, b, until)
}

func (e *evil) Append(ctx context.Context, n location.Name, b []byte, seq uint64, signed []byte) error {
	e.puts.Add(1)
	if e.put != nil && e.enabled.Load() {
		if err := e.put(ctx, n, b); err != nil {
			return err
		}
	}
	return e.Location.Append(ctx, n, b, seq, signed)
}

func (e *evil) Get(ctx context.Context, n location.Name, off int64, p []byte) error {
	if e.get != nil && e.enabled.Load() {
		return e.get(ctx, n, off, p)
	}
	return e.Location.Get(ctx, n, off, p)
}

func (e *evil) Stat(ctx context.Context, n location.Name) (location.Info, error) {
	if e.stat != nil && e.enabled.Load() {
		return e.stat(n)
	}
	return e.Location.Stat(ctx, n)
}

func (e *evil) Prove(ctx context.Context, n location.Name, leaves []int) (location.Proof, error) {
	if e.prove != nil && e.enabled.Load() {
		return e.prove(n, leaves)
	}
	return e.Location.Prove(ctx, n, leaves)
}

func (e *evil) List(ctx context.Context, from location.Name, which location.Which) ([]location.Info, location.Name, error) {
	if e.list != nil && e.enabled.Load() {
		return e.list(ctx, from, which)
	}
	return e.Location.List(ctx, from, which)
}

// evilBed is a store of scheme k/n over m members, each of which can turn evil.
func evilBed(t testing.TB, k, n, m int, change func(*Config)) (*bed, []*evil, *Store) {
	t.Helper()
	b := newBed(t, k, m)
	b.scheme = disperse.Scheme{K: k, N: n}
	evils := make([]*evil, m)
	b.change = func(c *Config) {
		c.Upkeep = Upkeep{RepairAfter: time.Nanosecond, Grace: time.Nanosecond, OrphanAge: time.Nanosecond}
		for i := range c.Members {
			evils[i] = &evil{Location: c.Members[i].Location}
			c.Members[i].Location = evils[i]
		}
		if change != nil {
			change(c)
		}
	}
	return b, evils, b.opened()
}

func noise(n int) []byte {
	b := make([]byte, n)
	rand.Read(b)
	return b
}

// keep writes a body and makes it part of the store, under a key.
func keep(t testing.TB, s *Store, key, class string, p []byte) Body {
	t.Helper()
	b, err := s.Write(t.Context(), class, bytes.NewReader(p), int64(len(p)))
	if err != nil {
		t.Fatal(err)
	}
	v, _ := b.MarshalBinary()
	if err := s.Update(t.Context(), func(tx Tx) error { tx.Set([]byte(key), v); tx.Keep(b); return nil }); err != nil {
		t.Fatal(err)
	}
	return b
}

func same(t testing.TB, s *Store, b Body, want []byte) {
	t.Helper()
	if got, err := readBody(t.Context(), s, b); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%d bytes of %d, %v", len(got), len(want), err)
	}
}

func recordOf(t testing.TB, s *Store, b Body) *record {
	t.Helper()
	r, _, _, err := s.find(b.Segments[0].ID)
	if err != nil || r == nil {
		t.Fatal(r, err)
	}
	return r
}

func statusOf(t testing.TB, s *Store) Status {
	t.Helper()
	st, err := s.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return st
}

// repairAll repairs until nothing more can be done.
func repairAll(t testing.TB, s *Store) (sum Repaired) {
	t.Helper()
	for range 5 {
		got, err := s.Repair(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		sum.add(&got)
	}
	return sum
}

// really says whether all n shards of a body's first segment are at their locations, by their bytes.
func really(t testing.TB, b *bed, s *Store, body Body) (whole int) {
	t.Helper()
	r := recordOf(t, s, body)
	c, err := s.coder(r.Scheme)
	if err != nil {
		t.Fatal(err)
	}
	for i, x := range r.Members {
		p := make([]byte, shardSize(c, r))
		l := b.dirs[s.placeOf(x)[0]-1].As(everything)
		if l.Get(t.Context(), r.Names[i], 0, p) == nil {
			if n, err := disperse.NameOf(p); err == nil && n == r.Names[i] {
				whole++
			}
		}
	}
	return whole
}

func TestPlacement(t *testing.T) {
	farms := func(n ...int) (all []Member) {
		for f, n := range n {
			for range n {
				all = append(all, Member{Farm: fmt.Sprint(f)})
			}
		}
		return all
	}
	for _, c := range []struct {
		name    string
		scheme  disperse.Scheme
		members []Member
		advice  string // empty: it is taken
	}{
		{"4/6 on six farms", disperse.Scheme{K: 4, N: 6}, farms(1, 1, 1, 1, 1, 1), ""},
		{"4/6 on seven farms", disperse.Scheme{K: 4, N: 6}, farms(1, 1, 1, 1, 1, 1, 1), ""},
		{"4/6 on three farms of two: writes stop with the first", disperse.Scheme{K: 4, N: 6}, farms(2, 2, 2), "add locations on other farms"},
		{"4/6 on four farms of two: six are left", disperse.Scheme{K: 4, N: 6}, farms(2, 2, 2, 2), ""},
		{"4/6 on two farms: each gets three, and writes stop", disperse.Scheme{K: 4, N: 6}, farms(5, 5), ""},
		{"3/6 on two farms: each gets three, which are enough to read", disperse.Scheme{K: 3, N: 6}, farms(5, 5), "add farms"},
		{"4/6 on one farm", disperse.Scheme{K: 4, N: 6}, farms(6), "add farms"},
		{"4/6 on five", disperse.Scheme{K: 4, N: 6}, farms(1, 1, 1, 1, 1), "add locations"},
		{"2/3 on three farms: writes need all three", disperse.Scheme{K: 2, N: 3}, farms(1, 1, 1), "add locations on other farms"},
		{"1/3: each farm can read alone", disperse.Scheme{K: 1, N: 3}, farms(1, 1, 1), "larger k"},
		{"16/20 on twenty farms", disperse.Scheme{K: 16, N: 20}, farms(1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1), ""},
	} {
		err := Placement(c.scheme, c.members)
		if (err == nil) != (c.advice == "") || err != nil && !strings.Contains(err.Error(), c.advice) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	b := newBed(t, 4, 6)
	b.change = func(c *Config) {
		c.Fragile = false
		c.Members[1].Farm = c.Members[0].Farm
	}
	if s, err := Open(t.Context(), b.config()); err == nil || !strings.Contains(err.Error(), "add locations on other farms") {
		t.Errorf("a store whose writes end with a farm: %v", err)
		s.Close()
	}
}

func TestNoFarmGetsMoreThanItsShare(t *testing.T) {
	_, _, s := evilBed(t, 4, 6, 12, func(c *Config) {
		for i := range c.Members {
			c.Members[i].Farm = fmt.Sprint(i / 3)
		}
	})
	got := map[*member]int{}
	for round := range 400 {
		if round == 200 {
			s.all[3].suspect.Store(true)
		}
		chosen, spares, err := s.choose(s.cfg.Scheme, round%2 == 0)
		if err != nil || len(chosen) != 6 {
			t.Fatal(len(chosen), err)
		}
		farms, seen := map[string]int{}, map[*member]bool{}
		for _, m := range chosen {
			farms[m.Farm]++
			seen[m] = true
			got[m]++
		}
		for f, n := range farms {
			if n > 2 {
				t.Fatalf("farm %s got %d", f, n)
			}
		}
		if len(seen) != 6 || round >= 200 && seen[s.all[3]] || len(spares) > 6 {
			t.Fatalf("round %d: %d different, %d spares, the liar too: %v", round, len(seen), len(spares), seen[s.all[3]])
		}
	}
	for _, m := range s.all {
		if got[m] == 0 {
			t.Errorf("location %v got nothing", m.ID)
		}
	}
}

// Any d−k shards are deleted, or have bits flipped by their location, or on its disk: what was written is read. Repair
// brings n back, and status says so before and after.
func TestLossUpToTheMargin(t *testing.T) {
	for _, how := range []string{"deleted", "flipped by the location", "flipped on the disk"} {
		t.Run(how, func(t *testing.T) {
			if how == "flipped on the disk" && os.Getenv(tlsVariable) != "" {
				t.Skip("the disk is another's")
			}
			ctx := t.Context()
			b, evils, s := evilBed(t, 4, 6, 6, nil)
			for x := range 6 {
				for y := range x {
					want := noise(300_000 + mrand.IntN(400_000)) // shards have files of their own
					body := keep(t, s, fmt.Sprint(x, y), "", want)
					r := recordOf(t, s, body)
					for _, i := range []int{x, y} {
						at := int(s.placeOf(r.Members[i])[0] - 1)
						l := b.dirs[at].As(everything)
						if err := l.Announce(ctx, s.epoch, s.holder); err != nil {
							t.Fatal(err)
						}
						switch how {
						case "deleted":
							if err := errors.Join(l.Delete(ctx, r.Names[i]), l.Purge(ctx, r.Names[i])); err != nil {
								t.Fatal(err)
							}
						case "flipped by the location":
							evils[at].get = func(ctx context.Context, n location.Name, off int64, p []byte) error {
								err := evils[at].Location.Get(ctx, n, off, p)
								p[mrand.IntN(len(p))] ^= 1 << mrand.IntN(8)
								return err
							}
							evils[at].enabled.Store(true)
						default:
							flipOnDisk(t, filepath.Join(filepath.Dir(b.frontAt), fmt.Sprint("location-", at)))
						}
					}
					same(t, s, body, want)
					if how == "deleted" {
						if _, err := s.Scrub(ctx, 0); err != nil {
							t.Fatal(err)
						}
						if st := statusOf(t, s); st.Degraded != 1 || st.Durable[b.scheme][4] != 1 || st.Queue != 1 {
							t.Fatalf("before: %+v", st)
						}
					}
					for _, e := range evils {
						e.enabled.Store(false)
					}
					for _, d := range b.dirs { // locations look at their own disks
						if _, err := d.Scrub(ctx, 1<<40); err != nil {
							t.Fatal(err)
						}
					}
					if _, err := s.Scrub(ctx, 0); err != nil {
						t.Fatal(err)
					}
					repairAll(t, s)
					if st := statusOf(t, s); st.Degraded != 0 || st.Queue != 0 {
						t.Fatalf("after: %+v", st)
					}
					if n := really(t, b, s, body); n != 6 {
						t.Fatalf("%d shards are whole after the repair", n)
					}
				}
			}
		})
	}
}

// flipOnDisk flips a bit of the newest file of a location.
func flipOnDisk(t testing.TB, dir string) {
	var newest string
	filepath.Walk(filepath.Join(dir, "files"), func(path string, info os.FileInfo, err error) error {
		if err == nil && info.Mode().IsRegular() && path > newest {
			newest = path
		}
		return err
	})
	b, err := os.ReadFile(newest)
	if err != nil {
		t.Fatal(err)
	}
	b[mrand.IntN(len(b))] ^= 1 << mrand.IntN(8)
	if err := os.WriteFile(newest, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestBeyondTheMarginIsLostAndSaysSo(t *testing.T) {
	ctx := t.Context()
	b, _, s := evilBed(t, 4, 6, 6, nil)
	body := keep(t, s, "a", "", noise(300_000))
	r := recordOf(t, s, body)
	for i := range 3 {
		l := b.dirs[s.placeOf(r.Members[i])[0]-1].As(everything)
		l.Announce(ctx, s.epoch, s.holder)
		if err := l.Delete(ctx, r.Names[i]); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := readBody(ctx, s, body); !errors.Is(err, ErrLost) {
		t.Errorf("read: %v", err)
	}
	if _, err := s.Scrub(ctx, 0); err != nil {
		t.Fatal(err)
	}
	if got := repairAll(t, s); got.Lost == 0 || got.Shards > 0 {
		t.Errorf("repair: %+v", got)
	}
	if st := statusOf(t, s); st.Lost != 1 {
		t.Errorf("%+v", st)
	}
}

func TestAMemberThatAnswersAfterFiveSeconds(t *testing.T) {
	b, evils, s := evilBed(t, 4, 6, 6, nil)
	slow := evils[2]
	wait := func(ctx context.Context) error {
		select {
		case <-time.After(5 * time.Second):
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	slow.put = func(ctx context.Context, _ location.Name, _ []byte) error { return wait(ctx) }
	slow.get = func(ctx context.Context, n location.Name, off int64, p []byte) error {
		if err := wait(ctx); err != nil {
			return err
		}
		return slow.Location.Get(ctx, n, off, p)
	}
	first := noise(300_000)
	old := keep(t, s, "old", "", first)
	slow.enabled.Store(true)
	begin := time.Now()
	var bodies []Body
	var wants [][]byte
	for i := range 8 {
		wants = append(wants, noise(200_000))
		bodies = append(bodies, keep(t, s, fmt.Sprint(i), "", wants[i]))
	}
	for i, x := range bodies {
		same(t, s, x, wants[i])
	}
	same(t, s, old, first)
	if took := time.Since(begin); took > 4*time.Second {
		t.Errorf("8 writes and 9 reads took %v", took)
	}
	if st := statusOf(t, s); st.Degraded < 8 || st.Lost > 0 {
		t.Errorf("while it is slow: %+v", st)
	}
	slow.enabled.Store(false)
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		s.probe(t.Context())
		repairAll(t, s)
		if st := statusOf(t, s); st.Degraded == 0 {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("after it is back: %+v", st)
		}
	}
	for _, x := range bodies {
		if n := really(t, b, s, x); n != 6 {
			t.Errorf("%d shards", n)
		}
	}
}

// A location gives an old valid shard instead of the one that was asked for, or one of another index.
func TestAnotherValidShardIsNotTaken(t *testing.T) {
	ctx := t.Context()
	b, evils, s := evilBed(t, 4, 6, 6, nil)
	one, two := noise(200_000), noise(200_000)
	first, second := keep(t, s, "1", "", one), keep(t, s, "2", "", two)
	old, now := recordOf(t, s, first), recordOf(t, s, second)
	for _, from := range []int{0, 1} {
		i := from // of the new record
		at := int(s.placeOf(now.Members[i])[0] - 1)
		evils[at].get = func(ctx context.Context, n location.Name, off int64, p []byte) error {
			if n == now.Names[i] {
				for j, m := range old.Members {
					if int(s.placeOf(m)[0]-1) == at {
						return evils[at].Location.Get(ctx, old.Names[j], off, p)
					}
				}
			}
			return evils[at].Location.Get(ctx, n, off, p)
		}
		evils[at].enabled.Store(true)
	}
	same(t, s, second, two)
	same(t, s, first, one)
	if st := statusOf(t, s); st.Members[0].Lies+st.Members[1].Lies+st.Members[2].Lies+st.Members[3].Lies+st.Members[4].Lies+st.Members[5].Lies != 2 {
		t.Errorf("two locations lied: %+v", st.Members)
	}
	// While they lie nothing helps, but when they are repaired they are.
	if _, err := s.Repair(ctx); err != nil {
		t.Fatal(err)
	}
	for _, e := range evils {
		e.enabled.Store(false)
	}
	repairAll(t, s)
	if n := really(t, b, s, second); n != 6 {
		t.Errorf("%d shards", n)
	}
}

// A location says that it has a shard, and has other bytes. It is written again, in its place, since there is no spare.
func TestWrongBytesAreReplaced(t *testing.T) {
	b, evils, s := evilBed(t, 4, 6, 6, nil)
	want := noise(200_000)
	body := keep(t, s, "a", "", want)
	r := recordOf(t, s, body)
	at := int(s.placeOf(r.Members[0])[0] - 1)
	var mended atomic.Bool
	evils[at].get = func(ctx context.Context, n location.Name, off int64, p []byte) error {
		err := evils[at].Location.Get(ctx, n, off, p)
		if n == r.Names[0] && !mended.Load() {
			p[0]++
		}
		return err
	}
	evils[at].put = func(_ context.Context, n location.Name, _ []byte) error {
		if n == r.Names[0] {
			mended.Store(true)
		}
		return nil
	}
	evils[at].enabled.Store(true)
	same(t, s, body, want)
	repairAll(t, s)
	if n := really(t, b, s, body); n != 6 || !mended.Load() {
		t.Errorf("%d shards, written again: %v", n, mended.Load())
	}
	if st := statusOf(t, s); st.Degraded != 0 || st.Queue != 0 {
		t.Errorf("%+v", st)
	}
}

// A location that has thrown its shards away, and says in stats, lists and audits that it has them: the audit finds it, and
// a spare location gets what it had.
func TestALiarIsFoundByAnAudit(t *testing.T) {
	ctx := t.Context()
	b, evils, s := evilBed(t, 4, 6, 7, nil)
	var bodies []Body
	var wants [][]byte
	for i := range 6 {
		wants = append(wants, noise(200_000))
		bodies = append(bodies, keep(t, s, fmt.Sprint(i), "", wants[i]))
	}
	if got, err := s.Audit(ctx, 50); err != nil || got.Failed > 0 || got.Passed != 50 {
		t.Fatalf("honest locations: %+v, %v", got, err)
	}
	liar := evils[4]
	infos, _, err := b.dirs[4].As(everything).List(ctx, location.Name{}, location.Live)
	if err != nil || len(infos) == 0 {
		t.Fatal(infos, err)
	}
	said := map[location.Name]location.Info{}
	l := b.dirs[4].As(everything)
	l.Announce(ctx, s.epoch, s.holder)
	for _, i := range infos {
		said[i.Name] = i
		if err := errors.Join(l.Delete(ctx, i.Name), l.Purge(ctx, i.Name)); err != nil {
			t.Fatal(err)
		}
	}
	liar.stat = func(n location.Name) (location.Info, error) {
		if i, ok := said[n]; ok {
			return i, nil
		}
		return liar.Location.Stat(ctx, n)
	}
	liar.list = func(context.Context, location.Name, location.Which) ([]location.Info, location.Name, error) {
		return infos, location.Name{}, nil
	}
	liar.get = func(_ context.Context, _ location.Name, _ int64, p []byte) error { rand.Read(p); return nil }
	liar.prove = func(n location.Name, leaves []int) (p location.Proof, err error) {
		p.Size = said[n].Size
		for _, i := range leaves {
			data := noise(int(min(p.Size-int64(i)*disperse.LeafSize, disperse.LeafSize)))
			p.Leaves = append(p.Leaves, location.Leaf{Data: data, Path: noise(32 * 4)})
		}
		return p, nil
	}
	liar.enabled.Store(true)
	if got, err := s.Scrub(ctx, 0); err != nil || got.Missing > 0 {
		t.Fatalf("a scrub asks what locations say: %+v, %v", got, err)
	}
	failed := 0
	for range 20 {
		got, err := s.Audit(ctx, 50)
		if err != nil {
			t.Fatal(err)
		}
		failed += got.Failed
		repairAll(t, s)
	}
	if failed == 0 {
		t.Fatal("no audit failed")
	}
	st := statusOf(t, s)
	for _, m := range st.Members {
		if m.ID == (disperse.Place{5}) {
			if m.Audits.Failed == 0 || m.Audits.Shard == (disperse.Name{}) || m.Lies == 0 {
				t.Errorf("what is recorded of the liar: %+v", m)
			}
		} else if m.Audits.Failed > 0 || m.Audits.Passed == 0 {
			t.Errorf("what is recorded of %v: %+v", m.ID, m.Audits)
		}
	}
	for i, x := range bodies {
		same(t, s, x, wants[i])
		if n := really(t, b, s, x); n != 6 {
			t.Errorf("body %d has %d shards: %+v", i, n, recordOf(t, s, x))
			for _, m := range s.all {
				t.Logf("%v: suspect %v, usable %v, wanted %v, %v", m.index, m.suspect.Load(), m.usable(), m.wanted(), m.why)
			}
		}
	}
}

func TestAFullMemberIsLeftOut(t *testing.T) {
	b, evils, s := evilBed(t, 4, 6, 7, nil)
	full := evils[3]
	full.put = func(context.Context, location.Name, []byte) error { return location.ErrFull }
	full.enabled.Store(true)
	var last Body
	for i := range 12 {
		last = keep(t, s, fmt.Sprint(i), "", noise(100_000))
		if n := really(t, b, s, last); n != 6 {
			t.Fatalf("body %d has %d shards", i, n)
		}
	}
	if n := full.puts.Load(); n > 2 {
		t.Errorf("the full location was asked %d times", n)
	}
	if st := statusOf(t, s); st.Degraded > 1 { // a block that was under way keeps its place
		t.Errorf("%+v", st)
	}
}

func TestAMemberVanishesWithinAWrite(t *testing.T) {
	b, evils, s := evilBed(t, 4, 6, 6, nil)
	gone := evils[1]
	var n atomic.Int64
	gone.put = func(context.Context, location.Name, []byte) error {
		if n.Add(1) > 2 {
			return errFault
		}
		return nil
	}
	gone.enabled.Store(true)
	want := noise(21 << 20)
	body := keep(t, s, "a", "", want)
	same(t, s, body, want)
	if st := statusOf(t, s); st.Degraded == 0 || st.Lost > 0 {
		t.Errorf("%+v", st)
	}
	gone.enabled.Store(false)
	s.probe(t.Context())
	repairAll(t, s)
	if st := statusOf(t, s); st.Degraded != 0 {
		t.Errorf("later: %+v", st)
	}
	if n := really(t, b, s, body); n != 6 {
		t.Errorf("%d shards", n)
	}
}

func TestTheLossOfAFarmStopsNoWrite(t *testing.T) {
	for lost := range 6 {
		b, _, s := evilBed(t, 4, 6, 6, func(c *Config) { c.Fragile = false })
		want := noise(300_000)
		before := keep(t, s, "before", "", want)
		b.faults[lost].set(silent, nil)
		for i := range 5 {
			w := noise(150_000)
			same(t, s, keep(t, s, fmt.Sprint(i), "", w), w)
			if err := putObject(t.Context(), s, fmt.Sprint("small ", i), w[:2000]); err != nil {
				t.Fatal(err)
			}
		}
		same(t, s, before, want)
	}
}

func TestWithoutAQuorumAWriteIsBusyAndLeavesNothing(t *testing.T) {
	ctx := t.Context()
	for _, degraded := range []bool{false, true} {
		b, _, s := evilBed(t, 4, 6, 6, func(c *Config) { c.DegradedWrites = degraded })
		keep(t, s, "first", "", noise(10))
		had := shardsAt(t, b)
		b.faults[0].set(mute, nil)
		b.faults[5].set(mute, nil)
		body, err := s.Write(ctx, "", bytes.NewReader(noise(200_000)), 200_000)
		if degraded {
			if err != nil || recordOf(t, s, body).left() != 4 {
				t.Errorf("degraded writes: %v", err)
			}
			continue
		}
		if !errors.Is(err, ErrBusy) {
			t.Fatalf("four of six: %v", err)
		}
		eventually(t, func() bool { return shardsAt(t, b) == had })
	}
}

func eventually(t testing.TB, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !f(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it did not come to that")
		}
	}
}

func shardsAt(t testing.TB, b *bed) (n int) {
	t.Helper()
	for _, d := range b.dirs {
		all, _, err := d.As(everything).List(t.Context(), location.Name{}, location.Live)
		if err != nil {
			t.Fatal(err)
		}
		n += len(all)
	}
	return n
}

func TestASpareTakesTheShardOfOneThatFails(t *testing.T) {
	b, evils, s := evilBed(t, 4, 6, 8, nil)
	evils[2].put = func(context.Context, location.Name, []byte) error { return errFault }
	evils[2].enabled.Store(true)
	for i := range 10 {
		body := keep(t, s, fmt.Sprint(i), "", noise(100_000))
		if r := recordOf(t, s, body); r.left() != 6 || really(t, b, s, body) != 6 {
			t.Errorf("body %d: %d of 6 are durable", i, r.left())
		}
	}
}

// A member that is left out, because it did not answer, is asked when there is no quorum without it.
func TestOneThatIsLeftOutIsAskedWhenItIsNeeded(t *testing.T) {
	_, evils, s := evilBed(t, 4, 6, 6, nil)
	fails := func(context.Context, location.Name, []byte) error { return errFault }
	evils[5].put, evils[0].put = fails, fails
	evils[5].enabled.Store(true)
	for i := range 3 {
		keep(t, s, fmt.Sprint(i), "", noise(100_000))
	}
	if s.all[5].usable() {
		t.Fatal("it is not left out")
	}
	evils[5].enabled.Store(false)
	evils[0].enabled.Store(true)
	want := noise(100_000)
	body, err := s.Write(t.Context(), "", bytes.NewReader(want), -1)
	if err != nil {
		t.Fatal(err)
	}
	same(t, s, body, want)
}

// Classes have schemes of their own.
func TestClasses(t *testing.T) {
	b, _, s := evilBed(t, 4, 6, 20, func(c *Config) { c.Classes = map[string]disperse.Scheme{"16/20": {K: 16, N: 20}} })
	want := noise(3 << 20)
	wide, usual := keep(t, s, "a", "16/20", want), keep(t, s, "b", classStandard, want)
	same(t, s, wide, want)
	same(t, s, usual, want)
	if n, m := really(t, b, s, wide), really(t, b, s, usual); n != 20 || m != 6 {
		t.Errorf("%d and %d shards", n, m)
	}
	if _, err := s.Write(t.Context(), "GLACIER", bytes.NewReader(want), -1); !errors.Is(err, ErrClass) {
		t.Errorf("an unknown class: %v", err)
	}
	if st := statusOf(t, s); len(st.Durable) != 2 {
		t.Errorf("%+v", st.Durable)
	}
}

func TestDrainAndRemove(t *testing.T) {
	ctx := t.Context()
	b, _, s := evilBed(t, 4, 6, 7, func(c *Config) { c.Fragile = false })
	var bodies []Body
	var wants [][]byte
	for i := range 10 {
		wants = append(wants, noise(50_000*(i+1)))
		bodies = append(bodies, keep(t, s, fmt.Sprint(i), "", wants[i]))
	}
	gone := disperse.Place{3}
	if err := s.Remove(ctx, gone); !errors.Is(err, ErrNeeded) {
		t.Errorf("remove one in use: %v", err)
	}
	if err := s.Drain(ctx, disperse.Place{99}); !errors.Is(err, ErrMember) {
		t.Errorf("drain a stranger: %v", err)
	}
	if err := s.Drain(ctx, gone); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(ctx, gone); !errors.Is(err, ErrNeeded) {
		t.Errorf("remove one that is not empty: %v", err)
	}
	for _, other := range []byte{1, 7} {
		if err := s.Drain(ctx, disperse.Place{other}); !errors.Is(err, ErrNeeded) {
			t.Errorf("drain one more than can go: %v", err)
		}
	}
	if err := s.Snapshot(ctx); err != nil { // what nothing else refers to can be moved
		t.Fatal(err)
	}
	for i := range 4 { // the last blocks move when others are behind them
		if err := set(ctx, s, "x", fmt.Sprint(i)); err != nil {
			t.Fatal(err)
		}
	}
	repairAll(t, s)
	if err := s.Remove(ctx, gone); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() bool {
		if err := s.Collect(ctx); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Scrub(ctx, 0); err != nil {
			t.Fatal(err)
		}
		all, _, err := b.dirs[2].As(everything).List(ctx, location.Name{}, location.Live)
		return err == nil && len(all) == 0
	})
	for i, x := range bodies {
		same(t, s, x, wants[i])
	}
	// The store goes on without it, also from nothing but the locations.
	s.Close()
	was := b.change
	b.change = func(c *Config) {
		was(c)
		c.Members = append(c.Members[:2:2], c.Members[3:]...)
	}
	s = b.restored()
	for i := range bodies {
		if got, err := getObject(ctx, s, fmt.Sprint(i)); err != nil || !bytes.Equal(got, wants[i]) {
			t.Errorf("restored: object %d: %v", i, err)
		}
	}
}

func TestAReadGoesOnWhileItsBodyIsDropped(t *testing.T) {
	ctx := t.Context()
	b, _, s := evilBed(t, 4, 6, 6, nil)
	want := noise(20 << 20)
	body := keep(t, s, "a", "", want)
	r, err := s.Read(ctx, body, 0, body.Size)
	if err != nil {
		t.Fatal(err)
	}
	head := make([]byte, 1000)
	if _, err := io.ReadFull(r, head); err != nil {
		t.Fatal(err)
	}
	if err := s.Update(ctx, func(tx Tx) error { tx.Drop(body); tx.Delete([]byte("a")); return nil }); err != nil {
		t.Fatal(err)
	}
	time.Sleep(5 * time.Millisecond)
	if err := s.Collect(ctx); err != nil {
		t.Fatal(err)
	}
	rest, err := io.ReadAll(r)
	if err != nil || !bytes.Equal(append(head, rest...), want) {
		t.Fatalf("%d bytes, %v", len(rest), err)
	}
	r.Close()
	time.Sleep(5 * time.Millisecond)
	if err := s.Collect(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := readBody(ctx, s, body); !errors.Is(err, ErrLost) {
		t.Errorf("after that: %v", err)
	}
	if st := statusOf(t, s); st.Segments != 0 || st.Garbage != 0 {
		t.Errorf("%+v", st)
	}
	for _, d := range b.dirs {
		if st, _ := d.As(everything).Status(ctx); st.Held < 5 {
			t.Errorf("a location holds %d deleted shards", st.Held)
		}
	}
}

func TestRangesAndSizes(t *testing.T) {
	ctx := t.Context()
	_, _, s := evilBed(t, 4, 6, 6, nil)
	for _, n := range []int{0, 1, 100, smallBody - 1, smallBody, smallBody + 1, 1 << 20, segmentSize, segmentSize + 1, 3*segmentSize - 7, 10 << 20} {
		want := noise(n)
		for _, hint := range []int64{int64(n), -1, int64(n) + 5, int64(n) / 2} {
			body, err := s.Write(ctx, "", io.MultiReader(bytes.NewReader(want[:n/3]), bytes.NewReader(want[n/3:])), hint)
			if err != nil || body.Size != int64(n) {
				t.Fatalf("%d bytes, hint %d: %d, %v", n, hint, body.Size, err)
			}
			same(t, s, body, want) // before it is kept
			var p Body
			v, _ := body.MarshalBinary()
			if err := p.UnmarshalBinary(v); err != nil {
				t.Fatal(err)
			}
			if err := s.Update(ctx, func(tx Tx) error { tx.Keep(p); return nil }); err != nil {
				t.Fatal(err)
			}
			for range 5 {
				off := mrand.Int64N(int64(n) + 1)
				m := mrand.Int64N(int64(n) - off + 1)
				r, err := s.Read(ctx, p, off, m)
				if err != nil {
					t.Fatal(err)
				}
				got, err := io.ReadAll(r)
				if err != nil || !bytes.Equal(got, want[off:off+m]) {
					t.Fatalf("%d of %d at %d: %d bytes, %v", m, n, off, len(got), err)
				}
				var to bytes.Buffer
				r2, err := s.Read(ctx, p, off, m)
				if err != nil {
					t.Fatal(err)
				}
				if w, err := r2.(io.WriterTo).WriteTo(&to); err != nil || w != m || !bytes.Equal(to.Bytes(), want[off:off+m]) {
					t.Fatalf("%d of %d at %d: wrote %d, %v", m, n, off, w, err)
				}
				r.Close()
				r2.Close()
			}
		}
	}
	if len(s.running.at) > 0 || s.reading.free != readMemory || s.fetching.free != fetchMemory || s.writing.free != writeMemory || s.putting.free != flyingMemory {
		t.Errorf("what is left: %d reads, memory %d %d %d %d", len(s.running.at), s.reading.free, s.fetching.free, s.writing.free, s.putting.free)
	}
}

func TestDiscardAndSweep(t *testing.T) {
	ctx := t.Context()
	b, _, s := evilBed(t, 4, 6, 6, nil)
	want := noise(300_000)
	kept := keep(t, s, "a", "", want)
	had := shardsAt(t, b)
	body, err := s.Write(ctx, "", bytes.NewReader(noise(9<<20)), -1)
	if err != nil {
		t.Fatal(err)
	}
	s.Discard(body)
	eventually(t, func() bool { return shardsAt(t, b) == had })
	// A front end that dies leaves shards that nothing names.
	if body, err = s.Write(ctx, "", bytes.NewReader(noise(300_000)), -1); err != nil {
		t.Fatal(err)
	}
	if got, err := s.Scrub(ctx, 0); err != nil || got.Orphans > 0 {
		t.Errorf("a body that is not kept yet is no orphan: %+v, %v", got, err)
	}
	s.pending.Delete(body.Segments[0].ID)
	var removed int64
	for range 3 {
		got, err := s.Scrub(ctx, 0)
		if err != nil {
			t.Fatal(err)
		}
		if got.Missing > 0 {
			t.Errorf("%+v", got)
		}
		removed += got.Removed
		time.Sleep(2 * time.Millisecond)
	}
	if removed != 6 || shardsAt(t, b) != had {
		t.Errorf("%d orphans were removed, %d shards are there, not %d", removed, shardsAt(t, b), had)
	}
	same(t, s, kept, want)
}

func TestSecretClass(t *testing.T) {
	ctx := t.Context()
	b, evils, s := evilBed(t, 4, 6, 6, nil)
	want := noise(150_000)
	body := keep(t, s, "a", classSecret, want)
	small := keep(t, s, "b", classSecret, []byte("a small secret"))
	same(t, s, body, want)
	same(t, s, small, []byte("a small secret"))
	r := recordOf(t, s, small)
	if !r.Secret || len(body.Segments) != 3 {
		t.Errorf("%d segments, secret %v", len(body.Segments), r.Secret)
	}
	// Wrong bytes and lost shards, up to the margin, and repaired.
	at := int(s.placeOf(r.Members[0])[0] - 1)
	evils[at].get = func(ctx context.Context, n location.Name, off int64, p []byte) error { rand.Read(p); return nil }
	evils[at].enabled.Store(true)
	l := b.dirs[s.placeOf(r.Members[3])[0]-1].As(everything)
	l.Announce(ctx, s.epoch, s.holder)
	if err := l.Delete(ctx, r.Names[3]); err != nil {
		t.Fatal(err)
	}
	same(t, s, small, []byte("a small secret"))
	evils[at].enabled.Store(false)
	repairAll(t, s)
	if n := really(t, b, s, small); n != 6 {
		t.Errorf("%d shards", n)
	}
	// k−1 shards decide nothing.
	r = recordOf(t, s, small)
	shards := make([][]byte, 6)
	c, _ := s.coder(r.Scheme)
	for i := range 3 {
		shards[i] = make([]byte, shardSize(c, r))
		if err := s.memberAt(r.Members[i]).Location.Get(ctx, r.Names[i], 0, shards[i]); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.decode(nil, c, r, shards); !errors.Is(err, disperse.ErrFew) {
		t.Errorf("k−1 shards: %v", err)
	}
}

func TestRotation(t *testing.T) {
	ctx := t.Context()
	b, _, s := evilBed(t, 4, 6, 6, nil)
	want := noise(300_000)
	body := keep(t, s, "a", "", want)
	if err := putObject(ctx, s, "small", want[:3000]); err != nil {
		t.Fatal(err)
	}
	s.Close()
	was := b.change
	b.change = func(c *Config) {
		was(c)
		c.Keys, _ = b.root.Keys(1)
	}
	s = b.opened()
	if st := statusOf(t, s); st.Old < 2 {
		t.Errorf("before: %d are under the old key", st.Old)
	}
	names := recordOf(t, s, body).Names
	n, left, err := s.Rewrap(ctx, nil)
	if err != nil || n < 2 || left > 0 {
		t.Fatal(n, left, err)
	}
	if now := recordOf(t, s, body).Names; !slices.Equal(now, names) {
		t.Errorf("shards %v became %v: rotation writes no data", names, now)
	}
	if st := statusOf(t, s); st.Old > 0 {
		t.Errorf("after: %d are under the old key", st.Old)
	}
	delete(s.keys().stores, 0)
	s.cache.blocks = nil
	same(t, s, body, want)
	if got, err := getObject(ctx, s, "small"); err != nil || !bytes.Equal(got, want[:3000]) {
		t.Errorf("small: %v", err)
	}
}

func TestRetainIsKeptByLocations(t *testing.T) {
	ctx := t.Context()
	b, _, s := evilBed(t, 4, 6, 6, nil)
	body := keep(t, s, "a", "", noise(300_000))
	if err := s.Retain(ctx, body, time.Now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	if err := s.Update(ctx, func(tx Tx) error { tx.Drop(body); return nil }); err != nil {
		t.Fatal(err)
	}
	r := recordOf(t, s, body)
	time.Sleep(2 * time.Millisecond)
	if err := s.Collect(ctx); err != nil {
		t.Fatal(err)
	}
	for i, x := range r.Members {
		l := b.dirs[s.placeOf(x)[0]-1].As(everything)
		if st, err := l.Stat(ctx, r.Names[i]); err != nil || !st.Deleted.IsZero() {
			t.Errorf("shard %d: %+v, %v", i, st, err)
		}
	}
}

// What locations have contains no plaintext, no name and no marker. The control is the same search over a plain copy.
func TestLocationsShowNothing(t *testing.T) {
	ctx := t.Context()
	b, _, s := evilBed(t, 4, 6, 6, nil)
	marker := "MARKER-" + fmt.Sprintf("%x", noise(8))
	text := []byte(strings.Repeat("the quick brown fox and "+marker+" ", 20_000))
	name := "bucket/a-name-" + marker
	plain := t.TempDir()
	for i, n := range []int{200, 30_000, 200_000, len(text)} {
		key := fmt.Sprint(name, i)
		keep(t, s, key, "", text[:n])
		if err := os.WriteFile(filepath.Join(plain, strings.ReplaceAll(key, "/", "_")), text[:n], 0o600); err != nil {
			t.Fatal(err)
		}
	}
	keep(t, s, name+"secret", classSecret, text[:5000])
	if err := s.Snapshot(ctx); err != nil {
		t.Fatal(err)
	}
	look := func(dirs ...string) (found int) {
		for _, dir := range dirs {
			filepath.Walk(dir, func(path string, info os.FileInfo, err error) error {
				if err != nil || !info.Mode().IsRegular() {
					return err
				}
				p, err := os.ReadFile(path)
				if err != nil {
					return err
				}
				for _, what := range []string{marker, "quick brown fox", "a-name-"} {
					if bytes.Contains(p, []byte(what)) || strings.Contains(path, what) {
						found++
					}
				}
				return nil
			})
		}
		return found
	}
	if look(plain) < 12 {
		t.Fatal("the search does not find what is there")
	}
	// Nor does a location hide it: without dispersal and encryption the same search finds it there, in its log and its files.
	bare := filepath.Join(t.TempDir(), "bare")
	d, err := location.Open(location.Config{Path: bare, Trusted: true})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	l := d.As(everything)
	err = l.Announce(ctx, 1, location.Holder{1})
	for i, p := range [][]byte{text[:30_000], text[:300_000]} {
		err = errors.Join(err, l.Put(ctx, location.Name{byte(i)}, p, time.Time{}))
	}
	if err := errors.Join(err, l.PutHead(ctx, 1, []byte(name))); err != nil {
		t.Fatal(err)
	}
	if n := look(bare); n < 5 {
		t.Errorf("control: %d finds at a location that has it plain", n)
	}
	var all []string
	for i := range 6 {
		all = append(all, filepath.Join(filepath.Dir(b.frontAt), fmt.Sprint("location-", i)))
	}
	if n := look(all...); n > 0 {
		t.Errorf("%d finds at the locations", n)
	}
	// All shards together, without the store's key, open nothing.
	other, err := NewRoot().Keys(0)
	if err != nil {
		t.Fatal(err)
	}
	real := s.keys()
	r, _, _, err := s.find(keep(t, s, "last", "", text[:100_000]).Segments[0].ID)
	if err != nil {
		t.Fatal(err)
	}
	s2 := &Store{log: s.log, life: s.life, places: places{indexes: s.indexes, all: s.all}}
	s2.ring.Store(other)
	s2.upkeep.init()
	if _, err := s2.get(ctx, nil, r); !errors.Is(err, disperse.ErrAuth) {
		t.Errorf("all shards and another key: %v", err)
	}
	if _, err := s.get(ctx, nil, r); err != nil || s.keys() != real {
		t.Errorf("all shards and the key: %v", err)
	}
}

func TestManyAtOnce(t *testing.T) {
	ctx := t.Context()
	_, _, s := evilBed(t, 4, 6, 6, nil)
	var wg sync.WaitGroup
	for i := range 24 {
		wg.Go(func() {
			want := noise(6 << 20)
			key := fmt.Sprint(i)
			if err := putObject(ctx, s, key, want); err != nil {
				t.Error(err)
				return
			}
			for range 2 {
				if got, err := getObject(ctx, s, key); err != nil || !bytes.Equal(got, want) {
					t.Errorf("%s: %d bytes, %v", key, len(got), err)
				}
			}
		})
	}
	wg.Wait()
}

func FuzzParseRecord(f *testing.F) {
	r := record{ID: disperse.ID{1}, Size: 70000, Scheme: disperse.Scheme{K: 2, N: 3}, Key: 4, Members: []uint16{1, 2, 9}, Names: make([]disperse.Name, 3)}
	f.Add(appendRecord(nil, &r))
	r.Secret, r.Size = true, 9
	r.setDurable(1, false)
	f.Add(appendRecord(nil, &r))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := parseRecord(b)
		if err != nil {
			return
		}
		if out := appendRecord(nil, &r); !bytes.Equal(out, b) {
			t.Errorf("%x became %x", b, out)
		}
		if len(r.Members) != r.Scheme.N || len(r.Names) != r.Scheme.N || r.left() > r.Scheme.N {
			t.Errorf("%+v", r)
		}
	})
}

func TestRecordIsFrozen(t *testing.T) {
	r := record{ID: disperse.ID{1, 2, 3}, Size: 0x01020304 % disperse.MaxSegment, Scheme: disperse.Scheme{K: 2, N: 3}, Key: 7, Members: []uint16{1, 2, 0x309}}
	for i := range 3 {
		r.Names = append(r.Names, disperse.Name{byte(i + 1), 31: 0xff})
		r.Wrap[i] = byte(0xa0 + i)
	}
	r.setDurable(1, false)
	const want = "010102030000000000000000000000000000020304020300000007a0a1a200000000000000000000000000000000000000000000000000000000000000000000000000000000000000000002000000000000000000000000000000000101000000000000000000000000000000000000000000000000000000000000ff000202000000000000000000000000000000000000000000000000000000000000ff030903000000000000000000000000000000000000000000000000000000000000ff"
	if got := fmt.Sprintf("%x", appendRecord(nil, &r)); got != want {
		t.Errorf("record is\n%s", got)
	}
	for _, b := range [][]byte{nil, {1}, appendRecord(nil, &r)[:190], append(appendRecord(nil, &r), 0), append([]byte{3}, appendRecord(nil, &r)[1:]...)} {
		if _, err := parseRecord(b); err == nil {
			t.Errorf("%x is taken", b)
		}
	}
}

// A store that runs repairs by itself what a write left undone, and collects what was dropped.
func TestRunDoesIt(t *testing.T) {
	b, evils, s := evilBed(t, 4, 6, 6, func(c *Config) {
		c.Upkeep.Collect, c.Upkeep.Audit, c.Upkeep.Scrub = 20*time.Millisecond, 20*time.Millisecond, 20*time.Millisecond
	})
	evils[0].put = func(context.Context, location.Name, []byte) error { return errFault }
	evils[0].enabled.Store(true)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { s.Run(ctx); close(done) }()
	want := noise(200_000)
	body, dropped := keep(t, s, "a", "", want), keep(t, s, "b", "", want)
	if err := s.Update(ctx, func(tx Tx) error { tx.Drop(dropped); return nil }); err != nil {
		t.Fatal(err)
	}
	if st := statusOf(t, s); st.Degraded == 0 {
		t.Errorf("while a location fails: %+v", st)
	}
	evils[0].enabled.Store(false)
	eventually(t, func() bool {
		st := statusOf(t, s)
		return st.Degraded == 0 && st.Garbage == 0 && st.Members[0].Audits.Passed > 0
	})
	if n := really(t, b, s, body); n != 6 {
		t.Errorf("%d shards", n)
	}
	cancel()
	<-done
}
