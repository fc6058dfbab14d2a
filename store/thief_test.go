package store

import (
	"bytes"
	"errors"
	"fmt"
	"testing"
	"time"

	"holdfast/disperse"
	"holdfast/store/location"
)

// A thief has the front end's credential, or all its keys. He deletes every shard, tries to purge them, fills what he can, and
// says at every location that the log is another: rubbish if he has the credential alone, a log that he signed himself if he
// has the keys. The front end is fenced off and its disk is lost. With the phrase everything is brought back.
func TestWhatAThiefOfTheFrontEndDeletesIsBroughtBack(t *testing.T) {
	for _, keys := range []bool{false, true} {
		t.Run(fmt.Sprint("with the keys: ", keys), func(t *testing.T) {
			ctx := t.Context()
			b := newBed(t, 4, 6)
			s := b.opened()
			want := map[string][]byte{}
			for i := range 12 {
				key := fmt.Sprint(i)
				want[key] = noise(1000)
				if i%3 == 0 {
					want[key] = noise(150_000)
				}
				if err := putObject(ctx, s, key, want[key]); err != nil {
					t.Fatal(err)
				}
				if i == 6 {
					if err := s.Snapshot(ctx); err != nil {
						t.Fatal(err)
					}
				}
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
			began := time.Now().Add(-time.Second)
			stolen := location.Read | location.Write | location.Delete
			thief := b.config()
			for i, d := range b.dirs {
				l := d.As(stolen)
				thief.Members[i].Location = l
				st, err := l.Status(ctx)
				if err != nil {
					t.Fatal(err)
				}
				// Without an epoch of his own he can do nothing, and with one the front end knows.
				if err := l.PutHead(ctx, 1<<63, []byte("x")); !errors.Is(err, location.ErrEpoch) {
					t.Errorf("a head under nobody's epoch: %v", err)
				}
				for e := range location.Epoch(3) {
					if err := l.Announce(ctx, st.Epoch+1+e, location.Holder{6, 6, 6}); err != nil {
						t.Fatal(err)
					}
					if err := l.PutHead(ctx, 1<<63, []byte("this is the end of the log, and has nothing to do with a signature")); err != nil {
						t.Fatal(err)
					}
				}
				for from := (disperse.Name{}); ; {
					page, next, err := l.List(ctx, from, location.Live)
					if err != nil {
						t.Fatal(err)
					}
					for _, x := range page {
						if err := l.Delete(ctx, x.Name); err != nil {
							t.Fatal(err)
						}
						if err := l.Purge(ctx, x.Name); !errors.Is(err, location.ErrRights) {
							t.Errorf("the thief purges: %v", err)
						}
						if err := l.Undelete(ctx, x.Name); !errors.Is(err, location.ErrRights) {
							t.Errorf("the thief undeletes: %v", err)
						}
					}
					if from = next; next == (disperse.Name{}) {
						break
					}
				}
			}
			if err := set(ctx, s, "a", "b"); !errors.Is(err, ErrOld) {
				t.Errorf("the front end that was fenced off: %v", err)
			}
			s.Close()
			head, _ := b.dirs[0].As(stolen).Head(ctx)
			if keys {
				// He begins a store of his own under the same keys, of which heads are all right.
				for i := range thief.Members {
					thief.Members[i].Location = &past{thief.Members[i].Location, location.Head{}, false}
				}
				thief.Dir += "-thief"
				own, err := Open(ctx, thief)
				if err != nil {
					t.Fatal(err)
				}
				if err := set(ctx, own, "the thief", "was here"); err != nil {
					t.Fatal(err)
				}
				own.Close()
				head, _ = b.dirs[0].As(stolen).Head(ctx)
				r := b.restored()
				if got := value(t, r, "the thief"); got != "was here" {
					t.Errorf("control: a restore takes the newest log: %q", got)
				}
				r.Close()
			} else if r, err := b.restore(); err == nil {
				t.Errorf("control: before anything is undone it is restored, %+v", r.Recovery())
			}
			if keys {
				// Who chose the log sees that there are two, and when each was written.
				ends, err := Ends(ctx, thief.Keys, b.config().Members)
				if err != nil || len(ends) < 2 || ends[len(ends)-1].Epoch >= head.Epoch || ends[len(ends)-1].Locations != 6 {
					t.Fatalf("%+v, %v", ends, err)
				}
				if first, his := ends[len(ends)-1], ends[len(ends)-2]; his.Epoch != head.Epoch || his.Wrote.Before(began) || first.Wrote.IsZero() || first.Wrote.After(his.Wrote) {
					t.Errorf("began %v: %+v", began, ends)
				}
			}
			for _, d := range b.dirs {
				if n, err := Undelete(ctx, d.As(location.Read|location.Recover), began, nil); err != nil || n == 0 {
					t.Fatal(n, err)
				}
			}
			if keys {
				was := b.change
				b.change = func(c *Config) {
					if was != nil {
						was(c)
					}
					c.Before = head.Epoch
				}
			}
			r := b.restored()
			check(r)
			if value(t, r, "the thief") != "-" {
				t.Error("the thief is still here")
			}
			if !keys && len(r.Recovery().Forged) != 6 {
				t.Errorf("%+v", r.Recovery())
			}
			if err := putObject(ctx, r, "after", noise(10)); err != nil {
				t.Fatal(err)
			}
			r.Close()
			b.change = nil
			r = b.restored()
			check(r)
			if value(t, r, "after") == "-" {
				t.Error("what was written afterwards is lost")
			}
		})
	}
}
