package store

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"math"
	mrand "math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"holdfast/store/location"
)

func TestUpdateHappensAsAWholeOrNot(t *testing.T) {
	ctx := t.Context()
	s := newBed(t, 4, 6).opened()
	if err := set(ctx, s, "a", "1", "b", "2"); err != nil {
		t.Fatal(err)
	}
	body, err := s.Write(ctx, "", bytes.NewReader([]byte("body")), 4)
	if err != nil {
		t.Fatal(err)
	}
	wrong := errors.New("f says no")
	for name, f := range map[string]func(Tx) error{
		"f fails": func(t Tx) error {
			t.Set([]byte("a"), []byte("9"))
			t.Delete([]byte("b"))
			t.Keep(body)
			return wrong
		},
		"a body is dropped that is not there": func(t Tx) error {
			t.Set([]byte("a"), []byte("9"))
			t.Drop(body)
			return nil
		},
		"a body is kept twice": func(t Tx) error {
			t.Set([]byte("a"), []byte("9"))
			t.Keep(body)
			t.Keep(body)
			return nil
		},
		"it is too large": func(t Tx) error {
			t.Set([]byte("a"), make([]byte, maxChange))
			return nil
		},
	} {
		if err := s.Update(ctx, f); err == nil || name == "f fails" && !errors.Is(err, wrong) {
			t.Errorf("%s: %v", name, err)
		}
		if a, b := value(t, s, "a"), value(t, s, "b"); a != "1" || b != "2" {
			t.Errorf("%s: then a is %.10q and b is %q", name, a, b)
		}
	}
	func() {
		defer func() {
			if recover() == nil {
				t.Error("a panic was swallowed")
			}
		}()
		s.Update(ctx, func(t Tx) error {
			t.Set([]byte("a"), []byte("9"))
			panic("f panics")
		})
	}()
	// The body is still pending, and can be kept now.
	if err := s.Update(ctx, func(t Tx) error { t.Keep(body); t.Set([]byte("c"), []byte("3")); return nil }); err != nil {
		t.Fatal(err)
	}
	if got, err := readBody(ctx, s, body); err != nil || string(got) != "body" {
		t.Errorf("body %q, %v", got, err)
	}
	if a, c := value(t, s, "a"), value(t, s, "c"); a != "1" || c != "3" {
		t.Errorf("after a panic: a is %q, c is %q", a, c)
	}
}

func TestATxReadsWhatItWrote(t *testing.T) {
	ctx := t.Context()
	s := newBed(t, 2, 3).opened()
	if err := set(ctx, s, "a", "1", "c", "3", "d", "4"); err != nil {
		t.Fatal(err)
	}
	list := func(r Reader, from, to string) (out string) {
		var end []byte
		if to != "" {
			end = []byte(to)
		}
		c := r.Scan([]byte(from), end)
		for c.Next() {
			out += string(c.Key()) + string(c.Value()) + " "
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		return out
	}
	err := s.Update(ctx, func(tx Tx) error {
		tx.Set([]byte("b"), []byte("2"))
		tx.Delete([]byte("c"))
		tx.Set([]byte("d"), nil)
		if got := list(tx, "", ""); got != "a1 b2 d " {
			t.Errorf("inside: %q", got)
		}
		if v, ok, err := tx.Get([]byte("d")); !ok || err != nil || v == nil || len(v) > 0 {
			t.Errorf("an empty value: %v %v %v", v, ok, err)
		}
		if _, ok, _ := tx.Get([]byte("c")); ok {
			t.Error("a deleted key is there")
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	err = s.View(ctx, func(r Reader) error {
		if got := list(r, "a", "b"); got != "a1 " {
			t.Errorf("a to b: %q", got)
		}
		c := r.Scan([]byte("a"), nil)
		if !c.Seek([]byte("aa")) || string(c.Key()) != "b" || !c.Next() || string(c.Key()) != "d" || c.Next() {
			t.Error("seek")
		}
		return c.Close()
	})
	if err != nil {
		t.Fatal(err)
	}
}

// Concurrent changes see each other in some order, and share blocks.
func TestConcurrentUpdatesShareBlocks(t *testing.T) {
	ctx := t.Context()
	b := newBed(t, 4, 6)
	slow := func(context.Context, string) error { time.Sleep(3 * time.Millisecond); return nil }
	s := b.opened()
	for _, f := range b.faults {
		f.set(slow, nil)
	}
	const callers, each = 16, 20
	var wg sync.WaitGroup
	var bad atomic.Int32
	for range callers {
		wg.Go(func() {
			for range each {
				err := s.Update(ctx, func(t Tx) error {
					v, _, err := t.Get([]byte("count"))
					n := 0
					if len(v) > 0 {
						fmt.Sscan(string(v), &n)
					}
					t.Set([]byte("count"), []byte(fmt.Sprint(n+1)))
					return err
				})
				if err != nil {
					bad.Add(1)
				}
			}
		})
	}
	wg.Wait()
	if got := value(t, s, "count"); got != fmt.Sprint(callers*each) || bad.Load() > 0 {
		t.Errorf("count is %s after %d changes, %d failed", got, callers*each, bad.Load())
	}
	if n := s.sequence; n > callers*each/4 {
		t.Errorf("%d changes took %d blocks", callers*each, n)
	} else {
		t.Logf("%d changes took %d blocks", callers*each, n)
	}
}

// What f saw when it failed may not be durable: its error waits for that.
func TestAFailureWaitsForWhatItSaw(t *testing.T) {
	ctx := t.Context()
	b := newBed(t, 4, 6)
	s := b.opened()
	gate := make(chan struct{})
	for _, f := range b.faults {
		f.set(func(ctx context.Context, op string) error {
			if op == "append" || op == "put" {
				<-gate
			}
			return nil
		}, nil)
	}
	first := make(chan error, 1)
	go func() { first <- set(ctx, s, "name", "taken") }()
	for taken := false; !taken; time.Sleep(time.Millisecond) {
		s.mu.Lock()
		taken = s.flying != nil
		s.mu.Unlock()
	}
	exists := errors.New("exists")
	second := make(chan error, 1)
	go func() {
		second <- s.Update(ctx, func(t Tx) error {
			if _, ok, _ := t.Get([]byte("name")); ok {
				return exists
			}
			return nil
		})
	}()
	select {
	case err := <-second:
		t.Fatalf("answered %v while the change it saw was on its way", err)
	case <-time.After(50 * time.Millisecond):
	}
	if got := value(t, s, "name"); got != "-" {
		t.Errorf("a view shows %q, which is not durable", got)
	}
	close(gate)
	if err := <-first; err != nil {
		t.Error(err)
	}
	if err := <-second; !errors.Is(err, exists) {
		t.Errorf("got %v", err)
	}
}

func TestWithoutAQuorumUpdatesAreBusyAndHappenOnce(t *testing.T) {
	ctx := t.Context()
	b := newBed(t, 4, 6)
	b.change = func(c *Config) { c.Timeout = 300 * time.Millisecond }
	s := b.opened()
	add := func() error {
		return s.Update(ctx, func(t Tx) error {
			v, _, _ := t.Get([]byte("n"))
			t.Set([]byte("n"), append(v, 'x'))
			return nil
		})
	}
	if err := add(); err != nil {
		t.Fatal(err)
	}
	b.faults[0].set(mute, nil)
	if err := add(); err != nil {
		t.Fatalf("with five of six: %v", err)
	}
	b.faults[1].set(mute, nil)
	if err := add(); !errors.Is(err, ErrBusy) {
		t.Fatalf("with four of six: %v", err)
	}
	if err := add(); !errors.Is(err, ErrBusy) {
		t.Fatalf("again: %v", err)
	}
	if got := value(t, s, "n"); got != "xx" {
		t.Errorf("visible without a quorum: %q", got)
	}
	b.faults[1].set(nil, nil)
	deadline := time.Now().Add(5 * time.Second)
	for value(t, s, "n") != "xxxx" && time.Now().Before(deadline) {
		time.Sleep(10 * time.Millisecond)
	}
	if err := add(); err != nil {
		t.Fatal(err)
	}
	if got := value(t, s, "n"); got != "xxxxx" {
		t.Errorf("five changes left %q", got)
	}
	b.faults[0].set(nil, nil)
	s.Close()
	if got := value(t, b.restored(), "n"); got != "xxxxx" {
		t.Errorf("restored: %q", got)
	}
}

func TestEverythingAcknowledgedIsThereAgain(t *testing.T) {
	ctx := t.Context()
	for name, again := range map[string]func(*bed) *Store{
		"with the database":    (*bed).opened,
		"without the database": (*bed).restored,
	} {
		t.Run(name, func(t *testing.T) {
			b := newBed(t, 4, 6)
			s := b.open()
			bodies := map[string][]byte{}
			for i := range 300 {
				body := make([]byte, mrand.IntN(3000))
				rand.Read(body)
				key := fmt.Sprint("object", mrand.IntN(200))
				bodies[key] = body
				if err := putObject(ctx, s, key, body); err != nil {
					t.Fatal(err)
				}
				if i == 150 {
					if err := s.Snapshot(ctx); err != nil {
						t.Fatal(err)
					}
				}
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			s = again(b)
			for key, body := range bodies {
				if got, err := getObject(ctx, s, key); err != nil || !bytes.Equal(got, body) {
					t.Fatalf("%s: %d bytes of %d, %v", key, len(got), len(body), err)
				}
			}
			if err := set(ctx, s, "more", "1"); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestOldFrontEndIsRefused(t *testing.T) {
	ctx := t.Context()
	b := newBed(t, 4, 6)
	b.change = func(c *Config) { c.Heartbeat = 20 * time.Millisecond }
	old := b.opened()
	if err := set(ctx, old, "a", "old"); err != nil {
		t.Fatal(err)
	}
	s := b.restored()
	if err := set(ctx, s, "a", "new"); err != nil {
		t.Fatal(err)
	}
	if err := set(ctx, old, "a", "late"); !errors.Is(err, ErrOld) {
		t.Errorf("the old one's write: %v", err)
	}
	if err := old.View(ctx, func(Reader) error { return nil }); !errors.Is(err, ErrOld) {
		t.Errorf("the old one's read: %v", err)
	}
	// One that writes nothing notices by its heartbeat.
	third := b.restored()
	run, stop := context.WithCancel(ctx)
	done := make(chan error)
	go func() { s.runHeartbeat(run); done <- nil }()
	deadline := time.Now().Add(5 * time.Second)
	for !s.old.Load() && time.Now().Before(deadline) {
		time.Sleep(5 * time.Millisecond)
	}
	if err := s.View(ctx, func(Reader) error { return nil }); !errors.Is(err, ErrOld) {
		t.Errorf("an idle one's read: %v", err)
	}
	stop()
	<-done
	if got := value(t, third, "a"); got != "new" {
		t.Errorf("a is %q", got)
	}
}

func TestStartsThatAreRefused(t *testing.T) {
	ctx := t.Context()
	b := newBed(t, 4, 6)
	if _, err := b.restore(); !errors.Is(err, ErrNoStore) {
		t.Errorf("nothing to restore: %v", err)
	}
	s := b.open()
	if err := set(ctx, s, "a", "1"); err != nil {
		t.Fatal(err)
	}
	s.Close()

	right, front := b.root, b.frontAt
	b.root = NewRoot()
	if _, err := b.restore(); !errors.Is(err, ErrKeys) {
		t.Errorf("wrong phrase: %v", err)
	}
	b.root, b.frontAt = right, front
	if s, err := Open(ctx, b.config()); err != nil || s.Close() != nil {
		t.Errorf("control: %v", err)
	}
	b.root = NewRoot()
	if _, err := Open(ctx, b.config()); !errors.Is(err, ErrKeys) {
		t.Errorf("another store's keys: %v", err)
	}
	b.root = right
	other := newBed(t, 4, 6)
	if err := other.open().Close(); err != nil {
		t.Fatal(err)
	}
	b.frontAt = other.frontAt
	if _, err := Open(ctx, b.config()); !errors.Is(err, ErrKeys) {
		t.Errorf("another store's database: %v", err)
	}
	b.frontAt = front
	was := b.dirs
	b.dirs = newBed(t, 4, 6).dirs
	if _, err := Open(ctx, b.config()); !errors.Is(err, ErrRollback) {
		t.Errorf("locations that know nothing of it: %v", err)
	}
	b.dirs = was
	b.frontAt += "-other"
	if _, err := Open(ctx, b.config()); !errors.Is(err, ErrExists) {
		t.Errorf("a new store where one is: %v", err)
	}
	b.change = func(c *Config) { c.Timeout = 500 * time.Millisecond }
	for _, f := range b.faults[:3] {
		f.set(silent, nil)
	}
	if _, err := b.restore(); !errors.Is(err, ErrBusy) {
		t.Errorf("three of six locations: %v", err)
	}
	b.faults[0].set(nil, nil)
	r := b.restored()
	if got := value(t, r, "a"); got != "1" || len(r.Recovery().Silent) != 2 {
		t.Errorf("four of six locations: %q, %+v", got, r.Recovery())
	}
}

// A location shows the head of a moment ago, as one that was restored from a backup does.
type past struct {
	location.Location
	head  location.Head
	empty bool // it has no shard any more
}

func (p *past) Stat(ctx context.Context, n location.Name) (location.Info, error) {
	if p.empty {
		return location.Info{}, location.ErrAbsent
	}
	return p.Location.Stat(ctx, n)
}

func (p *past) Get(ctx context.Context, n location.Name, off int64, b []byte) error {
	if p.empty {
		return location.ErrAbsent
	}
	return p.Location.Get(ctx, n, off, b)
}

func (p *past) Head(context.Context) (location.Head, error) { return p.head, nil }

func TestOldHeadsAreNoticed(t *testing.T) {
	ctx := t.Context()
	b := newBed(t, 4, 6)
	s := b.open()
	heads := make([]location.Head, 6)
	for i := range 5 {
		if i == 2 {
			for j, d := range b.dirs {
				heads[j], _ = d.As(everything).Head(ctx)
			}
		}
		if err := set(ctx, s, "a", fmt.Sprint(i)); err != nil {
			t.Fatal(err)
		}
	}
	s.Close()
	back := func(which ...int) {
		b.change = func(c *Config) {
			for _, i := range which {
				c.Members[i].Location = &past{c.Members[i].Location, heads[i], false}
			}
		}
	}
	back(1, 4)
	r := b.restored()
	if got := value(t, r, "a"); got != "4" || len(r.Recovery().Rolled) != 2 {
		t.Errorf("two of six went back: a is %q, %+v", got, r.Recovery())
	}
	r.Close()
	b.change = func(c *Config) {
		c.Members[2].Location = &past{c.Members[2].Location, location.Head{Epoch: 99, Sequence: 1, Bytes: []byte("forged, of an epoch to come, and long enough for a code")}, false}
	}
	r = b.restored()
	if got := value(t, r, "a"); got != "4" || len(r.Recovery().Forged) != 1 {
		t.Errorf("a forged head: a is %q, %+v", got, r.Recovery())
	}
}

func TestNextEpoch(t *testing.T) {
	for name, c := range map[string]struct {
		known []location.Epoch
		want  location.Epoch
	}{
		"a new store":                          {[]location.Epoch{0, 0, 0}, 1},
		"one more than the highest":            {[]location.Epoch{3, 4, 2}, 5},
		"nobody answers":                       {nil, 1},
		"one leaps away":                       {[]location.Epoch{3, 4, 1 << 60}, 5},
		"one says that there are none left":    {[]location.Epoch{3, math.MaxUint64, 3}, 4},
		"one is new in a store that is old":    {[]location.Epoch{1 << 33, 1 << 33, 0}, 1<<33 + 1},
		"most were led astray, as far as goes": {[]location.Epoch{1 << 32, 1 << 32, 7}, 1<<32 + 1},
	} {
		if got := nextEpoch(c.known); got != c.want {
			t.Errorf("%s: %d, not %d", name, got, c.want)
		}
	}
}

// liar says what suits it.
type liar struct {
	location.Location
	epoch location.Epoch
	has   bool
}

func (l *liar) Status(ctx context.Context) (location.Status, error) {
	s, err := l.Location.Status(ctx)
	if l.epoch != 0 {
		s.Epoch = l.epoch
	}
	return s, err
}

func (l *liar) Stat(ctx context.Context, n location.Name) (location.Info, error) {
	if l.has {
		return location.Info{Name: n, Size: 100}, nil
	}
	return l.Location.Stat(ctx, n)
}

func TestLiarsDoNotKeepAStoreFromStarting(t *testing.T) {
	ctx := t.Context()
	b := newBed(t, 4, 6)
	s := b.open()
	if err := set(ctx, s, "a", "1"); err != nil {
		t.Fatal(err)
	}
	s.Close()
	b.change = func(c *Config) {
		c.Members[3].Location = &liar{Location: c.Members[3].Location, epoch: math.MaxUint64}
		c.Members[5].Location = &liar{Location: c.Members[5].Location, epoch: 1 << 50}
	}
	s = b.restored()
	if got := value(t, s, "a"); got != "1" || s.Recovery().Epoch != 2 {
		t.Errorf("a is %q, %+v", got, s.Recovery())
	}
	s.Close()

	// Three have the last block, a fourth says so too.
	b.change = func(c *Config) { c.Timeout = 200 * time.Millisecond }
	s = b.restored()
	if err := set(ctx, s, "a", "1"); err != nil {
		t.Fatal(err)
	}
	for _, f := range b.faults[3:] {
		f.set(mute, nil)
	}
	if err := set(ctx, s, "a", "2"); !errors.Is(err, ErrBusy) {
		t.Fatal(err)
	}
	s.Close()
	for _, f := range b.faults {
		f.set(nil, nil)
	}
	b.change = func(c *Config) {
		c.Members[3].Location = &liar{Location: c.Members[3].Location, has: true}
	}
	if _, err := b.restore(); !errors.Is(err, ErrRollback) {
		t.Errorf("four say that they have what three have: %v", err)
	}
	was := b.change
	b.change = func(c *Config) { was(c); c.AcceptLoss = true }
	if got := value(t, b.restored(), "a"); got != "1" {
		t.Errorf("a is %q", got)
	}
}

// The last block was acknowledged by five. Two of them are as they were three blocks ago: three shards are left, as of a block
// that was never acknowledged. It must not be taken for one.
func TestAnAcknowledgedBlockIsNotDroppedSilently(t *testing.T) {
	ctx := t.Context()
	b := newBed(t, 4, 6)
	s := b.open()
	var heads [6]location.Head
	for i := range 4 {
		if i == 1 {
			for j, d := range b.dirs {
				heads[j], _ = d.As(everything).Head(ctx)
			}
		}
		if i == 3 {
			b.faults[5].set(mute, nil)
		}
		if err := set(ctx, s, "a", fmt.Sprint(i)); err != nil {
			t.Fatal(err)
		}
	}
	s.Close()
	b.faults[5].set(nil, nil)
	b.change = func(c *Config) {
		for i := 3; i < 5; i++ {
			c.Members[i].Location = &past{c.Members[i].Location, heads[i], true}
		}
	}
	if s, err := b.restore(); !errors.Is(err, ErrRollback) {
		t.Fatalf("got %v, a is %s", err, value(t, s, "a"))
	}
	b.change = nil
	if got := value(t, b.restored(), "a"); got != "3" {
		t.Errorf("when they are back a is %s", got)
	}
}

// Who restores by the phrase does not know how often keys were changed. Who has an old file of keys only cannot go on.
func TestKeysOfALaterEpoch(t *testing.T) {
	ctx := t.Context()
	b := newBed(t, 4, 6)
	later, err := b.root.Keys(3)
	if err != nil {
		t.Fatal(err)
	}
	b.change = func(c *Config) { c.Keys = later }
	s := b.open()
	if err := set(ctx, s, "a", "1"); err != nil {
		t.Fatal(err)
	}
	s.Close()
	b.change = nil
	r := b.restored()
	if got := value(t, r, "a"); got != "1" || r.Keys().Epoch != 3 {
		t.Errorf("a is %q under keys of epoch %d", got, r.Keys().Epoch)
	}
	r.Close()
	old, err := b.root.Keys(0)
	if err != nil {
		t.Fatal(err)
	}
	if old, err = parseKeys(old.marshal()); err != nil {
		t.Fatal(err)
	}
	b.change = func(c *Config) { c.Keys = old }
	if _, err := b.restore(); err == nil || !strings.Contains(err.Error(), "phrase") {
		t.Errorf("keys of an earlier epoch: %v", err)
	}
}

// A location is so late with a block that it has the next one before. It gets the shard all the same.
func TestALateShardArrivesBehindTheNextBlock(t *testing.T) {
	ctx := t.Context()
	b := newBed(t, 4, 6)
	s := b.opened()
	if err := set(ctx, s, "a", "0"); err != nil {
		t.Fatal(err)
	}
	gate := make(chan struct{})
	var first atomic.Bool
	b.faults[5].set(func(_ context.Context, op string) error {
		if op == "append" && !first.Swap(true) {
			<-gate
		}
		return nil
	}, nil)
	if err := set(ctx, s, "a", "1"); err != nil {
		t.Fatal(err)
	}
	late := s.last.record
	if err := set(ctx, s, "a", "2"); err != nil {
		t.Fatal(err)
	}
	for i := range late.members() {
		if late.durable(i) {
			continue
		}
		l := s.memberAt(late.members()[i]).Location
		if _, err := l.Stat(ctx, late.name(i)); !errors.Is(err, location.ErrAbsent) {
			t.Errorf("control: the late shard: %v", err)
		}
		close(gate)
		for end := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
			if _, err := l.Stat(ctx, late.name(i)); err == nil {
				return
			} else if time.Now().After(end) {
				t.Fatal(err)
			}
		}
	}
	t.Error("no shard was late")
}
