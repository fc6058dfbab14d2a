package store

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// TestBlobs is the suite of what every place of blobs does.
func TestBlobs(t *testing.T) {
	for name, open := range map[string]func(t *testing.T) Blobs{
		"a directory":           func(t *testing.T) Blobs { return NewDir(filepath.Join(t.TempDir(), "blobs"), 200<<10) },
		"a dispersed store":     func(t *testing.T) Blobs { return NewBodies(newBed(t, 2, 3).opened(), 200<<10) },
		"moving, without store": func(t *testing.T) Blobs { return NewMoving(NewDir(t.TempDir(), 200<<10), 200<<10, false) },
		"moving, its store open": func(t *testing.T) Blobs {
			m := NewMoving(NewDir(t.TempDir(), 200<<10), 200<<10, true)
			m.Use(newBed(t, 2, 3).opened())
			return m
		},
	} {
		t.Run(name, func(t *testing.T) { suite(t, open(t)) })
	}
}

func suite(t *testing.T, s Blobs) {
	ctx := t.Context()
	for _, size := range []int{0, 12, 64 << 10, 200 << 10} { // none, in a block, at its edge, in segments
		data := bytes.Repeat([]byte{byte(size >> 8)}, size)
		d := Digest(sha256.Sum256(data))
		if _, _, err := s.Open(ctx, d); !errors.Is(err, ErrAbsent) {
			t.Fatalf("%d bytes: open before put: %v", size, err)
		}
		for _, other := range [][]byte{append([]byte("x"), data[:max(size-1, 0)]...), append(bytes.Clone(data), 0)} {
			if err := s.Put(ctx, d, bytes.NewReader(other)); !errors.Is(err, ErrDigest) && !errors.Is(err, ErrTooBig) {
				t.Errorf("%d bytes of another digest: %v", size, err)
			}
		}
		if have, err := s.Has(ctx, d); have || err != nil {
			t.Fatalf("a refused put left the blob, %v", err)
		}
		errs := make(chan error)
		for range 4 { // idempotent, also at once
			go func() { errs <- s.Put(ctx, d, bytes.NewReader(data)) }()
		}
		for range 4 {
			if err := <-errs; err != nil {
				t.Fatal(err)
			}
		}
		r, n, err := s.Open(ctx, d)
		if err != nil || n != int64(size) {
			t.Fatalf("open: %d %v", n, err)
		}
		if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, data) {
			t.Errorf("read %d bytes: %v", len(got), err)
		}
		r.Close()
	}
	big := make([]byte, 200<<10+1)
	if err := s.Put(ctx, Digest(sha256.Sum256(big)), bytes.NewReader(big)); !errors.Is(err, ErrTooBig) {
		t.Errorf("too many bytes: %v", err)
	}
	total := int64(0)
	var all []Digest
	if err := s.Each(func(d Digest, n int64) error { all, total = append(all, d), total+n; return nil }); err != nil || len(all) != 4 || total != 264<<10+12 {
		t.Fatalf("each: %d of %d bytes, %v", len(all), total, err)
	}
	for _, d := range all {
		for range 2 {
			if err := s.Remove(d); err != nil {
				t.Fatal(err)
			}
		}
		if have, err := s.Has(ctx, d); have || err != nil {
			t.Errorf("it is there after it was removed: %v", err)
		}
	}
}

// TestMovingGoesOverToTheStore: what came before is moved when it can be read back; nothing is said to be absent that may
// be in a store that is not open.
func TestMovingGoesOverToTheStore(t *testing.T) {
	ctx := t.Context()
	dir := NewDir(filepath.Join(t.TempDir(), "blobs"), 1<<20)
	m := NewMoving(dir, 1<<20, false)
	m.patience = time.Millisecond
	put := func(n int) Digest {
		data := bytes.Repeat([]byte{byte(n)}, n)
		d := Digest(sha256.Sum256(data))
		if err := m.Put(ctx, d, bytes.NewReader(data)); err != nil {
			t.Fatal(err)
		}
		return d
	}
	read := func(d Digest) error {
		r, _, err := m.Open(ctx, d)
		if err != nil {
			return err
		}
		defer r.Close()
		_, err = io.Copy(io.Discard, r)
		return err
	}
	small, large, bad := put(100), put(300<<10), put(200)
	if damaged, err := m.Move(ctx); err != nil || len(damaged) > 0 {
		t.Fatalf("there is no store: %v %v", damaged, err)
	}
	if err := os.WriteFile(dir.path(bad), []byte("rot"), 0o600); err != nil {
		t.Fatal(err)
	}
	bed := newBed(t, 2, 3)
	s := bed.opened()
	m.Use(s)
	if read(small) != nil || read(large) != nil {
		t.Error("what is not moved yet cannot be read")
	}
	// It cannot be read back: it stays.
	for _, f := range bed.faults {
		f.set(func(_ context.Context, op string) error {
			if op == "get" {
				return errFault
			}
			return nil
		}, nil)
	}
	if _, err := m.Move(ctx); err == nil {
		t.Error("what cannot be read back is moved")
	}
	if n, err := m.Left(); n != 3 && n != 2 || err != nil { // a small body is read from the block in memory
		t.Errorf("%d are left, %v", n, err)
	}
	if have, _ := dir.Has(ctx, large); !have {
		t.Error("it is gone")
	}
	for _, f := range bed.faults {
		f.set(nil, nil)
	}
	damaged, err := m.Move(ctx)
	if err != nil || len(damaged) != 1 || damaged[0] != bad {
		t.Fatalf("%v %v", damaged, err)
	}
	if n, err := m.Left(); n != 1 || err != nil {
		t.Errorf("%d are left, %v", n, err)
	}
	if read(small) != nil || read(large) != nil {
		t.Error("what was moved cannot be read")
	}

	m.Use(nil)
	for what, err := range map[string]error{"open": read(small), "remove": m.Remove(small), "each": m.Each(func(Digest, int64) error { return nil })} {
		if !errors.Is(err, ErrBusy) {
			t.Errorf("%s while the store is not open: %v", what, err)
		}
	}
	if _, err := m.Has(ctx, small); !errors.Is(err, ErrBusy) {
		t.Errorf("has while the store is not open: %v", err)
	}
	m.patience = time.Minute
	waited := make(chan error, 1)
	go func() { waited <- read(small) }()
	late := put(400)
	if err := read(late); err != nil {
		t.Errorf("what comes meanwhile: %v", err)
	}
	m.Use(s)
	if err := <-waited; err != nil {
		t.Errorf("who waited for the store: %v", err)
	}
	if _, err := m.Move(ctx); err != nil {
		t.Fatal(err)
	}
	if n, err := m.Left(); n != 1 || err != nil || read(late) != nil {
		t.Errorf("%d are left, %v", n, err)
	}
}

// TestDirTellsWhatChanged: its disk's owner changes a byte.
func TestDirTellsWhatChanged(t *testing.T) {
	ctx := context.Background()
	root := filepath.Join(t.TempDir(), "blobs")
	s := NewDir(root, 1<<10)
	data := []byte("sealed bytes")
	d := Digest(sha256.Sum256(data))
	if err := s.Put(ctx, d, bytes.NewReader(data)); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(s.path(d), []byte("sealed bytez"), 0o600); err != nil {
		t.Fatal(err)
	}
	r, _, err := s.Open(ctx, d)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := io.ReadAll(r); !errors.Is(err, ErrDigest) {
		t.Fatalf("changed bytes: %v", err)
	}
	var left int
	filepath.Walk(root, func(_ string, fi os.FileInfo, _ error) error {
		if !fi.IsDir() {
			left++
		}
		return nil
	})
	if left != 1 {
		t.Errorf("%d files are left, 1 is the blob", left)
	}
}

// A reader that never ends stands for a process that is killed in the middle of a Put.
func TestSweepRemovesWhatIsHalfWritten(t *testing.T) {
	root := filepath.Join(t.TempDir(), "blobs")
	s := NewDir(root, 1<<10)
	if err := s.Sweep(); err != nil {
		t.Fatalf("there is nothing yet: %v", err)
	}
	data := []byte("whole")
	d := Digest(sha256.Sum256(data))
	if err := s.Put(t.Context(), d, bytes.NewReader(data)); err != nil {
		t.Fatal(err)
	}
	half := Digest{1}
	r, w := io.Pipe()
	done := make(chan error, 1)
	go func() { done <- s.Put(t.Context(), half, r) }()
	w.Write([]byte("half"))
	files := func() (out []string) {
		filepath.Walk(root, func(p string, fi os.FileInfo, _ error) error {
			if fi != nil && !fi.IsDir() {
				out = append(out, p)
			}
			return nil
		})
		return out
	}
	if got := files(); len(got) != 2 {
		t.Fatalf("control: %v", got)
	}
	if err := NewDir(root, 1<<10).Sweep(); err != nil {
		t.Fatal(err)
	}
	if got := files(); len(got) != 1 || got[0] != s.path(d) {
		t.Errorf("left %v", got)
	}
	w.Close()
	if err := <-done; err == nil {
		t.Error("half a blob was put")
	}
}
