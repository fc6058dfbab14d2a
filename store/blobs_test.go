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
)

func TestDir(t *testing.T) {
	ctx := context.Background()
	root := filepath.Join(t.TempDir(), "blobs")
	s := NewDir(root, 1<<10)
	data := []byte("sealed bytes")
	d := Digest(sha256.Sum256(data))
	if _, _, err := s.Open(ctx, d); !errors.Is(err, ErrAbsent) {
		t.Fatalf("open before put: %v", err)
	}
	if err := s.Put(ctx, d, bytes.NewReader([]byte("other bytes"))); !errors.Is(err, ErrDigest) {
		t.Fatalf("bytes of another digest: %v", err)
	}
	if err := s.Put(ctx, d, bytes.NewReader(make([]byte, 2<<10))); !errors.Is(err, ErrTooBig) {
		t.Fatalf("too many bytes: %v", err)
	}
	if have, _ := s.Has(ctx, d); have {
		t.Fatal("a refused put left the blob")
	}
	for range 2 { // idempotent
		if err := s.Put(ctx, d, bytes.NewReader(data)); err != nil {
			t.Fatal(err)
		}
	}
	r, n, err := s.Open(ctx, d)
	if err != nil || n != int64(len(data)) {
		t.Fatalf("open: %d %v", n, err)
	}
	if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, data) {
		t.Fatalf("read: %q %v", got, err)
	}
	r.Close()
	// The disk's owner changes a byte.
	if err := os.WriteFile(s.path(d), []byte("sealed bytez"), 0o600); err != nil {
		t.Fatal(err)
	}
	r, _, err = s.Open(ctx, d)
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
