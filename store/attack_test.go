package store

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"holdfast/disperse"
	"holdfast/store/location"
)

// Twelve locations keep a store of scheme 4/6. The last block was acknowledged by five of them; two of these went back in time,
// and the three others are silent, with one more. What the eight that answer know is not enough: one more block may have been
// acknowledged than they say, and a start says so instead of losing it.
func TestNobodyStartsWithoutOneWhoKnowsTheLastBlock(t *testing.T) {
	ctx := t.Context()
	b := newBed(t, 4, 12)
	b.scheme = disperse.Scheme{K: 4, N: 6}
	s := b.open()
	if err := set(ctx, s, "a", "0"); err != nil {
		t.Fatal(err)
	}
	var heads [12]location.Head
	for i, d := range b.dirs {
		heads[i], _ = d.As(everything).Head(ctx)
	}
	if err := set(ctx, s, "a", "1"); err != nil {
		t.Fatal(err)
	}
	if err := set(ctx, s, "a", "2"); err != nil {
		t.Fatal(err)
	}
	s.Close()
	var have, rest []int
	for i, d := range b.dirs {
		if h, _ := d.As(everything).Head(ctx); h.Sequence != heads[i].Sequence {
			have = append(have, i)
		} else {
			rest = append(rest, i)
		}
	}
	if len(have) != 6 {
		t.Fatalf("%d have the block", len(have))
	}
	for _, i := range append(have[3:6:6], rest[0]) {
		b.faults[i].set(silent, nil)
	}
	b.change = func(c *Config) {
		for _, i := range have[:3] {
			c.Members[i].Location = &past{c.Members[i].Location, heads[i], true}
		}
	}
	if r, err := b.restore(); err == nil {
		t.Errorf("it starts, and a is %q: %+v", value(t, r, "a"), r.Recovery())
		r.Close()
	} else if !errors.Is(err, ErrBusy) && !errors.Is(err, ErrRollback) {
		t.Error(err)
	}
	for _, f := range b.faults {
		f.set(nil, nil)
	}
	b.change = nil
	if got := value(t, b.restored(), "a"); got != "2" {
		t.Errorf("control: when all answer a is %q", got)
	}
}

// A location that has the head of a block had the block: who says that he has not has lost it, or lies, and does not count as
// one to whom it never came.
func TestAHeadWithoutItsBlockIsNoWitnessThatThereWasNone(t *testing.T) {
	ctx := t.Context()
	b := newBed(t, 4, 6)
	s := b.open()
	if err := set(ctx, s, "a", "1"); err != nil {
		t.Fatal(err)
	}
	b.faults[5].set(mute, nil)
	if err := set(ctx, s, "a", "2"); err != nil {
		t.Fatal(err)
	}
	s.Close()
	b.faults[5].set(nil, nil)
	b.change = func(c *Config) {
		for _, i := range []int{1, 3} {
			h, err := b.dirs[i].As(everything).Head(ctx)
			if err != nil {
				t.Fatal(err)
			}
			c.Members[i].Location = &past{c.Members[i].Location, h, true}
		}
	}
	if r, err := b.restore(); !errors.Is(err, ErrRollback) {
		t.Errorf("five acknowledged it, two of them say that they have it not: %v", err)
		if err == nil {
			t.Errorf("a is %q", value(t, r, "a"))
			r.Close()
		}
	}
	b.change = nil
	if got := value(t, b.restored(), "a"); got != "2" {
		t.Errorf("control: a is %q", got)
	}
}

// A location says that it has any number of shards, lists names without end, slowly, and takes its time over every deletion: a
// scrub ends all the same, and finds what another location lacks.
func TestALocationCannotKeepAScrubFromEnding(t *testing.T) {
	for _, how := range []string{"says that it has very many", "lists without end", "lists slowly", "deletes slowly"} {
		t.Run(how, func(t *testing.T) {
			ctx := t.Context()
			b, evils, s := evilBed(t, 4, 6, 6, nil)
			body := keep(t, s, "a", "", noise(100_000))
			r := recordOf(t, s, body)
			lost := 0
			for s.placeOf(r.Members[lost])[0] == 1 {
				lost++
			}
			l := b.dirs[s.placeOf(r.Members[lost])[0]-1].As(everything)
			l.Announce(ctx, s.epoch, s.holder)
			if err := l.Delete(ctx, r.Names[lost]); err != nil {
				t.Fatal(err)
			}
			evil := evils[0]
			names := uint64(0)
			page := func(from location.Name) (page []location.Info, next location.Name) {
				at := binary.BigEndian.Uint64(from[:8])
				for range location.MaxPage {
					var n location.Name
					at++
					binary.BigEndian.PutUint64(n[:], at)
					page = append(page, location.Info{Name: n, Size: 100})
				}
				names += location.MaxPage
				binary.BigEndian.PutUint64(next[:], at+1)
				return page, next
			}
			wait := func(ctx context.Context, d time.Duration) error {
				select {
				case <-time.After(d):
					return nil
				case <-ctx.Done():
					return ctx.Err()
				}
			}
			switch how {
			case "says that it has very many":
				evil.status = func(st *location.Status) { st.Shards = 1 << 62 }
			case "lists without end":
				evil.list = func(_ context.Context, from location.Name, _ location.Which) ([]location.Info, location.Name, error) {
					p, next := page(from)
					return p, next, nil
				}
			case "lists slowly":
				evil.list = func(ctx context.Context, from location.Name, _ location.Which) ([]location.Info, location.Name, error) {
					err := wait(ctx, time.Second)
					p, next := page(from)
					return p[:1], next, err
				}
			default:
				evil.list = func(_ context.Context, from location.Name, _ location.Which) ([]location.Info, location.Name, error) {
					p, _ := page(location.Name{})
					return p, location.Name{}, nil
				}
				evil.del = func(ctx context.Context) error { return wait(ctx, time.Second) }
			}
			evil.enabled.Store(true)
			s.upkeep.slowest = 4 * time.Second
			begin := time.Now()
			for range 2 {
				got, err := s.Scrub(ctx, 0)
				if err != nil {
					t.Fatal(err)
				}
				if lost < 6 && got.Missing != 1 {
					t.Errorf("%+v", got)
				}
				lost = 6
			}
			if took := time.Since(begin); took > 20*time.Second {
				t.Errorf("two scrubs took %v", took)
			}
			s.upkeep.mu.Lock()
			n := len(s.upkeep.orphans)
			s.upkeep.mu.Unlock()
			if n > maxOrphans/6+1 {
				t.Errorf("%d orphans of %d names are remembered for one location", n, names)
			}
		})
	}
}

// A location gives a wrong share when keys rotate, or a wrong shard: the others' do, and it is known for it.
func TestALiarDoesNotStopTheRotationOfKeys(t *testing.T) {
	ctx := t.Context()
	_, evils, s := evilBed(t, 4, 6, 6, nil)
	want := noise(100_000)
	body := keep(t, s, "a", "", want)
	r := recordOf(t, s, body)
	liar := evils[s.placeOf(r.Members[s.order(r)[0]])[0]-1]
	liar.get = func(ctx context.Context, n location.Name, off int64, p []byte) error {
		err := liar.Location.Get(ctx, n, off, p)
		p[len(p)-1] ^= 1
		p[0] ^= 1
		return err
	}
	liar.enabled.Store(true)
	keys, err := s.keys().root.Keys(1)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Rotate(keys); err != nil {
		t.Fatal(err)
	}
	if _, left, err := s.Rewrap(ctx, nil); err != nil || left > 0 {
		t.Errorf("%d are left: %v", left, err)
	}
	if now := recordOf(t, s, body); now.Key != 1 {
		t.Errorf("the segment is under the key of epoch %d", now.Key)
	}
	same(t, s, body, want)
	lies := int64(0)
	for _, m := range statusOf(t, s).Members {
		lies += m.Lies
	}
	if lies == 0 {
		t.Error("nobody is known to have lied")
	}
}

// After a rotation the heads at the locations, and the log that they lead to, are under the new key.
func TestAfterARotationHeadsNameNoOldWrap(t *testing.T) {
	ctx := t.Context()
	b, _, s := evilBed(t, 4, 6, 6, nil)
	for i := range 5 {
		keep(t, s, fmt.Sprint(i), "", noise(100_000))
	}
	if err := s.Snapshot(ctx); err != nil {
		t.Fatal(err)
	}
	old := func() (n int) {
		for _, d := range b.dirs {
			l, err := d.As(everything).Head(ctx)
			if err != nil {
				t.Fatal(err)
			}
			h, err := s.keys().verify(l)
			if err != nil {
				t.Fatal(err)
			}
			if h.last.record.Key == 0 || h.before.record.Key == 0 || h.snapshot.record.Key == 0 {
				n++
			}
		}
		return n
	}
	keys, err := s.keys().root.Keys(1)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Rotate(keys); err != nil {
		t.Fatal(err)
	}
	if old() != 6 {
		t.Error("control: before, heads name what is under the old key")
	}
	if _, left, err := s.Rewrap(ctx, nil); err != nil || left > 0 {
		t.Fatal(left, err)
	}
	if n := old(); n > 0 {
		t.Errorf("%d heads name what is under the old key", n)
	}
}

// A location that has thrown its shards away does not answer challenges, nor reads, and everything else: that counts as failed.
// One that is silent altogether has failed nothing.
func TestWhoAnswersAllButChallengesFailsThem(t *testing.T) {
	ctx := t.Context()
	_, evils, s := evilBed(t, 4, 6, 6, nil)
	for i := range 3 {
		keep(t, s, fmt.Sprint(i), "", noise(100_000))
	}
	mute := evils[2]
	var honest atomic.Bool
	mute.prove = func(location.Name, []int) (location.Proof, error) { return location.Proof{}, location.ErrBusy }
	mute.get = func(ctx context.Context, n location.Name, off int64, p []byte) error {
		if honest.Load() {
			return mute.Location.Get(ctx, n, off, p)
		}
		return location.ErrBusy
	}
	mute.enabled.Store(true)
	honest.Store(true)
	got, err := s.Audit(ctx, 60)
	if err != nil || got.Failed > 0 || got.Silent > 0 {
		t.Errorf("one that gives its shards instead of proofs: %+v, %v", got, err)
	}
	honest.Store(false)
	if got, err = s.Audit(ctx, 60); err != nil || got.Failed == 0 {
		t.Errorf("one that gives neither: %+v, %v", got, err)
	}
}

// A location that is slow, and not so slow that it fails, is asked last after a few reads.
func TestWhoLosesRacesIsAskedLast(t *testing.T) {
	_, evils, s := evilBed(t, 4, 6, 6, nil)
	want := noise(200_000)
	body := keep(t, s, "a", "", want)
	r := recordOf(t, s, body)
	slow := evils[s.placeOf(r.Members[0])[0]-1]
	var asked atomic.Int64
	slow.get = func(ctx context.Context, n location.Name, off int64, p []byte) error {
		asked.Add(1)
		select {
		case <-time.After(300 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
		return slow.Location.Get(ctx, n, off, p)
	}
	slow.enabled.Store(true)
	begin := time.Now()
	same(t, s, body, want)
	if took := time.Since(begin); asked.Load() == 0 || took > 250*time.Millisecond {
		t.Errorf("the first read asked it %d times and took %v", asked.Load(), took)
	}
	for range 20 {
		same(t, s, body, want)
	}
	asked.Store(0)
	for range 20 {
		same(t, s, body, want)
	}
	if n := asked.Load(); n > 10 {
		t.Errorf("it was asked for data %d times of 20", n)
	}
}
