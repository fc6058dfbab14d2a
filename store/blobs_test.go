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
