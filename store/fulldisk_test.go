package store

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// The front end's disk fills up, with what it writes and what others do. Changes are busy then, since the database waits for
// space; reads go on, and so do changes when there is space. Nothing that was acknowledged is lost, on that disk or without it.
func TestTheFrontEndsDiskIsFull(t *testing.T) {
	ctx := t.Context()
	b := newBed(t, 4, 6)
	b.change = func(c *Config) { c.Timeout = 2 * time.Second }
	b.frontAt = filepath.Join(t.TempDir(), "front")
	if err := os.Mkdir(b.frontAt, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", b.frontAt, "tmpfs", 0, "size=160m"); err != nil {
		t.Skipf("mount a tmpfs: %v", err)
	}
	at := b.frontAt
	t.Cleanup(func() { syscall.Unmount(at, 2 /* detach */) })
	s := b.open()
	acked := map[string][]byte{}
	put := func(key string) error {
		body := noise(3000)
		err := putObject(ctx, s, key, body)
		if err == nil {
			err = set(ctx, s, "large"+key, string(noise(300_000))) // metadata alone is on that disk
		}
		if err == nil {
			acked[key] = body
		}
		return err
	}
	for i := range 20 {
		if err := put(fmt.Sprint("before", i)); err != nil {
			t.Fatal(err)
		}
	}
	ballast := filepath.Join(b.frontAt, "ballast")
	f, err := os.Create(ballast)
	if err != nil {
		t.Fatal(err)
	}
	var last error
	for i := range 300 {
		f.Write(make([]byte, 1<<20))
		if last = put(fmt.Sprint("filling", i)); last != nil {
			break
		}
	}
	if !errors.Is(last, ErrBusy) {
		t.Fatalf("on a full disk: %v", last)
	}
	for f.Sync(); err == nil; _, err = f.Write(make([]byte, 1<<20)) {
	}
	f.Close()
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("control: the disk is not full: %v", err)
	}
	if err := put("full"); !errors.Is(err, ErrBusy) {
		t.Errorf("on a disk with no byte left: %v", err)
	}
	check := func(s *Store) {
		t.Helper()
		for key, want := range acked {
			if got, err := getObject(ctx, s, key); err != nil || !bytes.Equal(got, want) {
				t.Fatalf("%s: %d bytes, %v", key, len(got), err)
			}
		}
	}
	check(s)
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(10 * time.Second); put("after") != nil; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("with space again it does not go on")
		}
	}
	check(s)
	s.Close()
	s = b.open()
	check(s)
	s.Close()
	check(b.restored())
}
