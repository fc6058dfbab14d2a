package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"holdfast/store/location"
)

// Many write to locations that take one shard after another, slowly: the last in the queue waits for many times the store's
// timeout. Nobody is refused while something moves. When nothing moves everybody is, after the timeout.
func TestSlownessAloneFailsNothing(t *testing.T) {
	ctx := t.Context()
	_, evils, s := evilBed(t, 4, 6, 6, func(c *Config) { c.Timeout = 1500 * time.Millisecond })
	var stuck atomic.Bool
	for _, e := range evils {
		var one sync.Mutex
		slow := func(ctx context.Context) error {
			one.Lock()
			defer one.Unlock()
			for time.Sleep(20 * time.Millisecond); stuck.Load(); time.Sleep(20 * time.Millisecond) {
				if err := ctx.Err(); err != nil {
					return err
				}
			}
			return nil
		}
		e.put = func(ctx context.Context, _ location.Name, _ []byte) error { return slow(ctx) }
		e.get = func(ctx context.Context, n location.Name, off int64, p []byte) error {
			if err := slow(ctx); err != nil {
				return err
			}
			return e.Location.Get(ctx, n, off, p)
		}
		e.enabled.Store(true)
	}
	begin := time.Now()
	const writers, size = 48, 3 << 20
	var wg sync.WaitGroup
	var worst atomic.Int64
	for i := range writers {
		wg.Go(func() {
			begin := time.Now()
			want := bytes.Repeat([]byte{byte(i)}, size)
			key := fmt.Sprint(i)
			if err := putObject(ctx, s, key, want); err != nil {
				t.Error("write:", err)
			} else if got, err := getObject(ctx, s, key); err != nil || !bytes.Equal(got, want) {
				t.Error("read:", len(got), err)
			}
			worst.Store(max(worst.Load(), int64(time.Since(begin))))
		})
	}
	wg.Wait()
	if took := time.Since(begin); time.Duration(worst.Load()) < 2*s.cfg.Timeout {
		t.Errorf("nobody waited for long: all took %v", took)
	}
	stuck.Store(true)
	begin = time.Now()
	err := set(ctx, s, "a", "b")
	if took := time.Since(begin); !errors.Is(err, ErrBusy) || took > 3*s.cfg.Timeout {
		t.Errorf("when nothing moves: %v after %v", err, took)
	}
}

func TestMemoryIsGivenToWhoWaitsAsLongAsSomeComesBack(t *testing.T) {
	var m memory
	m.init(10, nil)
	ctx := t.Context()
	if err := m.take(ctx, 10, time.Hour); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 20)
	for range 20 {
		go func() {
			err := m.take(ctx, 10, 200*time.Millisecond)
			if err == nil {
				time.Sleep(50 * time.Millisecond)
				m.give(10)
			}
			done <- err
		}()
	}
	time.Sleep(50 * time.Millisecond)
	m.give(10)
	for range 20 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	if err := m.take(ctx, 10, time.Hour); err != nil {
		t.Fatal(err)
	}
	if err := m.take(ctx, 1, 50*time.Millisecond); !errors.Is(err, ErrBusy) {
		t.Errorf("when nothing comes back: %v", err)
	}
}

// A location that takes long over every shard holds up what is sent to it, and not the writes. What is sent to it and not
// there yet is bounded, however much is written meanwhile.
func TestALateLocationHoldsLittleMemory(t *testing.T) {
	ctx := t.Context()
	_, evils, s := evilBed(t, 4, 6, 6, nil)
	var inside, most atomic.Int64
	late := evils[3]
	late.put = func(ctx context.Context, _ location.Name, b []byte) error {
		n := inside.Add(int64(len(b)))
		for was := most.Load(); n > was && !most.CompareAndSwap(was, n); was = most.Load() {
		}
		defer inside.Add(-int64(len(b)))
		select {
		case <-time.After(4 * time.Second):
		case <-ctx.Done():
		}
		return ctx.Err()
	}
	late.enabled.Store(true)
	want := noise(1 << 20)
	var wg sync.WaitGroup
	end := time.Now().Add(6 * time.Second)
	written := atomic.Int64{}
	for range 16 {
		wg.Go(func() {
			for time.Now().Before(end) {
				m := s.all[3]
				m.mu.Lock() // it is never known as one that does not answer
				m.fails, m.shut = 0, time.Time{}
				m.mu.Unlock()
				b, err := s.Write(ctx, "", bytes.NewReader(want), int64(len(want)))
				if err != nil {
					t.Error(err)
					return
				}
				written.Add(b.Size)
				s.Discard(b)
			}
		})
	}
	wg.Wait()
	t.Logf("%d MiB were written; %d KiB of shards were under way to the late location", written.Load()>>20, most.Load()>>10)
	// Each of its shards holds the five others.
	if n := most.Load() * 6; n > lateMemory+flyingMemory*3/2+8<<20 {
		t.Errorf("%d MiB were held for it", n>>20)
	}
}

// What is known of the members changes while a write looks at them. It asks them all the same when it needs them.
func TestAWriteThatFindsAllMembersLateAsksThem(t *testing.T) {
	_, _, s := evilBed(t, 4, 6, 6, nil)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			for _, m := range s.all {
				m.missed()
				m.missed()
			}
			for _, m := range s.all {
				m.answered(nil, 0)
			}
		}
	})
	for i := range 300 {
		if _, err := s.Write(t.Context(), "", bytes.NewReader(noise(70_000)), 70_000); err != nil {
			t.Fatalf("write %d: %v", i, err)
		}
	}
	close(stop)
	wg.Wait()
}

// Each change is a block of its own, and each block takes a while: the last waits for several times the timeout.
func TestAnUpdateWaitsInALongQueue(t *testing.T) {
	ctx := t.Context()
	_, evils, s := evilBed(t, 4, 6, 6, func(c *Config) { c.Timeout = time.Second })
	for _, e := range evils {
		e.put = func(context.Context, location.Name, []byte) error { time.Sleep(250 * time.Millisecond); return nil }
		e.enabled.Store(true)
	}
	begin := time.Now()
	var wg sync.WaitGroup
	for i := range 12 {
		wg.Go(func() {
			if err := set(ctx, s, fmt.Sprint(i), string(make([]byte, 300_000))); err != nil {
				t.Errorf("change %d after %v: %v", i, time.Since(begin), err)
			}
		})
	}
	wg.Wait()
	if took := time.Since(begin); took < 2*s.cfg.Timeout {
		t.Errorf("all took %v: nobody waited", took)
	}
}

// A location whose cable is out when a front end starts: it takes none of the time that who writes first has.
func TestASilentPlaceHoldsUpNoStart(t *testing.T) {
	b := newBed(t, 4, 6)
	s := b.open()
	if err := set(t.Context(), s, "a", "b"); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	b.faults[2].set(func(ctx context.Context, _ string) error { <-ctx.Done(); return ctx.Err() }, nil)
	for name, start := range map[string]func() *Store{"opened": b.open, "restored": b.restored} {
		s := start()
		if err := set(t.Context(), s, "a", name); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if got := value(t, s, "a"); got != name {
			t.Errorf("%s: %q", name, got)
		}
		s.Close()
	}
}
