package reconcile

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func TestLoop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var made []time.Duration
		start := time.Now()
		fail := 3
		l := New(Config{Name: "test", Resync: time.Minute, Min: time.Second, Max: 4 * time.Second, Step: func(context.Context) (time.Duration, error) {
			mu.Lock()
			defer mu.Unlock()
			made = append(made, time.Since(start))
			if fail > 0 {
				fail--
				return 0, errors.New("not yet")
			}
			return 0, nil
		}})
		seen := func() []time.Duration {
			synctest.Wait()
			mu.Lock()
			defer mu.Unlock()
			return slices.Clone(made)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- l.Run(ctx) }()
		calls := seen()
		if len(calls) != 1 || calls[0] != 0 {
			t.Fatalf("the first step is not at once: %v", calls)
		}
		time.Sleep(20 * time.Second)
		calls = seen()
		if len(calls) != 4 {
			t.Fatalf("three failures and a success make four calls: %v", calls)
		}
		if gap := calls[3] - calls[2]; gap < 2*time.Second || gap > 6*time.Second {
			t.Errorf("the third wait is %v, not around 4 s", gap)
		}
		time.Sleep(2 * time.Minute)
		calls = seen()
		if n := len(calls); n < 5 || n > 7 {
			t.Errorf("resync did not come once a minute: %v", calls)
		}
		n := len(calls)
		l.Wake()
		l.Wake()
		if d := len(seen()) - n; d < 1 || d > 2 {
			t.Errorf("two wakes made %d calls", d)
		}
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
}
