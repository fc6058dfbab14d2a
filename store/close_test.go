package store

import (
	"bytes"
	"context"
	"errors"
	"io"
	"sync/atomic"
	"testing"
	"time"

	"holdfast/store/location"
)

// A location that is slow, and does not care for contexts, is asked by reads and writes that go on without it. When Close
// has returned nobody asks it any more: its directory may be closed.
func TestCloseWaitsForEveryRequest(t *testing.T) {
	ctx := t.Context()
	var inside atomic.Int64
	b, evils, s := evilBed(t, 4, 6, 6, nil)
	want := noise(300_000)
	body := keep(t, s, "a", "", want)
	wait := func(d time.Duration) {
		inside.Add(1)
		time.Sleep(d)
		inside.Add(-1)
	}
	// Those who have the first data, which are asked first.
	slow := func(r *record) {
		for _, x := range r.Members[:2] {
			e := evils[s.placeOf(x)[0]-1]
			e.get = func(ctx context.Context, n location.Name, off int64, p []byte) error {
				wait(400 * time.Millisecond)
				return e.Location.Get(ctx, n, off, p)
			}
			e.put = func(context.Context, location.Name, []byte) error { wait(400 * time.Millisecond); return nil }
			e.enabled.Store(true)
		}
	}
	r := recordOf(t, s, body)
	slow(r)
	same(t, s, body, want)
	if inside.Load() == 0 {
		t.Fatal("no request was left behind")
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if n := inside.Load(); n > 0 {
		t.Errorf("%d reads are under way at locations of a store that is closed", n)
	}

	s = b.opened()
	slow(r)
	// Two are late: five of six are what a write waits for.
	evils[s.placeOf(r.Members[1])[0]-1].enabled.Store(false)
	if _, err := s.Write(ctx, "", bytes.NewReader(want), int64(len(want))); err != nil {
		t.Fatal(err)
	}
	if inside.Load() == 0 {
		t.Fatal("no request was left behind")
	}
	s.Close()
	if n := inside.Load(); n > 0 {
		t.Errorf("%d writes are under way at locations of a store that is closed", n)
	}
}

// Close waits neither for who sends a body nor for who reads one, and what they do then fails.
func TestCloseDoesNotWaitForClients(t *testing.T) {
	ctx := t.Context()
	s := newBed(t, 4, 6).open()
	defer s.Close()
	body := keep(t, s, "a", "", noise(20<<20))
	reader, err := s.Read(ctx, body, 0, body.Size)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	from, to := io.Pipe()
	done := make(chan error, 1)
	go func() {
		_, err := s.Write(ctx, "", from, 20<<20)
		done <- err
	}()
	if _, err := to.Write(noise(3 << 20)); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	s.Close()
	if took := time.Since(begin); took > 2*time.Second {
		t.Errorf("the end took %v", took)
	}
	if _, err := io.Copy(io.Discard, reader); !errors.Is(err, ErrBusy) && !errors.Is(err, context.Canceled) {
		t.Errorf("a read that goes on: %v", err)
	}
	go to.Write(noise(17 << 20))
	select {
	case err := <-done:
		if !errors.Is(err, ErrBusy) {
			t.Errorf("a write that goes on: %v", err)
		}
	case <-time.After(5 * time.Second):
		t.Error("a write goes on for ever")
	}
	for name, f := range map[string]func() error{
		"repair":  func() error { _, err := s.Repair(ctx); return err },
		"scrub":   func() error { _, err := s.Scrub(ctx, 0); return err },
		"audit":   func() error { _, err := s.Audit(ctx, 1); return err },
		"collect": func() error { return s.Collect(ctx) },
		"rewrap":  func() error { _, _, err := s.Rewrap(ctx, nil); return err },
		"status":  func() error { _, err := s.Status(ctx); return err },
		"retain":  func() error { return s.Retain(ctx, body, time.Now()) },
		"run":     func() error { return s.Run(ctx) },
		"write":   func() error { _, err := s.Write(ctx, "", bytes.NewReader(noise(10)), 10); return err },
		"read":    func() error { _, err := s.Read(ctx, body, 0, 10); return err },
	} {
		if err := f(); !errors.Is(err, ErrBusy) {
			t.Errorf("%s of a store that is closed: %v", name, err)
		}
	}
}

// Changes wait for a block that is under way and for the group behind it, which is full: all are told when the store is closed.
func TestCloseAnswersAQueueOfChanges(t *testing.T) {
	ctx := t.Context()
	_, evils, s := evilBed(t, 4, 6, 6, nil)
	for _, e := range evils {
		e.put = func(context.Context, location.Name, []byte) error { time.Sleep(200 * time.Millisecond); return nil }
		e.enabled.Store(true)
	}
	done := make(chan error, 12)
	for i := range cap(done) {
		go func() { done <- set(ctx, s, string(rune('a'+i)), string(make([]byte, 300_000))) }()
	}
	time.Sleep(300 * time.Millisecond)
	s.Close()
	busy := 0
	for range cap(done) {
		if err := <-done; errors.Is(err, ErrBusy) {
			busy++
		} else if err != nil {
			t.Error(err)
		}
	}
	if busy == 0 {
		t.Error("nobody waited")
	}
}
