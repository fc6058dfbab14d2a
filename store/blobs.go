// Package store keeps bytes under their digest. What it keeps is sealed before it comes here (package seal): a place
// that stores learns sizes and nothing else. In this version a place is a directory; the dispersed store takes its place
// behind the same interface.
package store

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// Digest is the SHA-256 of the stored bytes.
type Digest [32]byte

// String is the digest in hexadecimal.
func (d Digest) String() string { return hex.EncodeToString(d[:]) }

// ParseDigest reads the hexadecimal form.
func ParseDigest(s string) (Digest, error) {
	var d Digest
	if len(s) != 64 {
		return d, fmt.Errorf("digest of %d characters, 64 are needed", len(s))
	}
	if _, err := hex.Decode(d[:], []byte(s)); err != nil {
		return d, fmt.Errorf("digest %q: %w", s, err)
	}
	return d, nil
}

// Errors of a store.
var (
	ErrAbsent = errors.New("blob is not there")
	ErrDigest = errors.New("bytes do not have the digest that they are stored under")
	ErrTooBig = errors.New("blob is larger than allowed")
)

// Blobs is what the grid needs of a place that keeps blobs.
type Blobs interface {
	Has(ctx context.Context, d Digest) (bool, error)
	// Put stores exactly the bytes with that digest, durably, or nothing.
	Put(ctx context.Context, d Digest, r io.Reader) error
	// Open returns the blob and its size. The reader fails at its end if the bytes on disk have changed.
	Open(ctx context.Context, d Digest) (io.ReadCloser, int64, error)
	// Remove deletes a blob, if it is there.
	Remove(d Digest) error
	// Each calls f for every blob, in no order, until f fails.
	Each(f func(d Digest, size int64) error) error
}

// Dir keeps blobs as files of a directory. The directory belongs to one process at a time.
type Dir struct {
	root  string
	limit int64
}

// NewDir keeps blobs of at most limit bytes under root, which is made on the first Put.
func NewDir(root string, limit int64) *Dir { return &Dir{root, limit} }

func (s *Dir) path(d Digest) string {
	h := d.String()
	return filepath.Join(s.root, h[:2], h)
}

// Has implements Blobs.
func (s *Dir) Has(_ context.Context, d Digest) (bool, error) {
	_, err := os.Stat(s.path(d))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// Put implements Blobs. A blob that is there already is not written again.
func (s *Dir) Put(ctx context.Context, d Digest, r io.Reader) error {
	if have, err := s.Has(ctx, d); err != nil || have {
		return err
	}
	dir := filepath.Dir(s.path(d))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("put %v: %w", d, err)
	}
	f, err := os.CreateTemp(dir, putting+"*")
	if err != nil {
		return fmt.Errorf("put %v: %w", d, err)
	}
	defer os.Remove(f.Name())
	defer f.Close()
	h := sha256.New()
	n, err := io.Copy(io.MultiWriter(f, h), io.LimitReader(r, s.limit+1))
	switch {
	case err != nil:
		return fmt.Errorf("put %v: %w", d, err)
	case n > s.limit:
		return fmt.Errorf("put %v: %w: at most %d bytes", d, ErrTooBig, s.limit)
	case Digest(h.Sum(nil)) != d:
		return fmt.Errorf("put %v: %w", d, ErrDigest)
	}
	if err := errors.Join(f.Sync(), f.Close(), os.Rename(f.Name(), s.path(d)), SyncDir(dir)); err != nil {
		return fmt.Errorf("put %v: %w", d, err)
	}
	return nil
}

// putting is how the name of a blob begins that is not whole yet.
const putting = ".put-"

// Sweep removes what a process that was killed has left half written. It must not run beside a Put.
func (s *Dir) Sweep() error {
	left, err := filepath.Glob(filepath.Join(s.root, "??", putting+"*"))
	if err != nil {
		return fmt.Errorf("sweep blobs: %w", err)
	}
	for _, f := range left {
		if err := os.Remove(f); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("sweep blobs: %w", err)
		}
	}
	return nil
}

// SyncDir makes the names in a directory durable.
func SyncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

// Open implements Blobs.
func (s *Dir) Open(_ context.Context, d Digest) (io.ReadCloser, int64, error) {
	f, err := os.Open(s.path(d))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, 0, fmt.Errorf("%v: %w", d, ErrAbsent)
	} else if err != nil {
		return nil, 0, err
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return Verify(f, d), st.Size(), nil
}

// Each implements Blobs.
func (s *Dir) Each(f func(d Digest, size int64) error) error {
	err := filepath.WalkDir(s.root, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		d, err := ParseDigest(e.Name())
		if err != nil {
			return nil // not a blob yet, or somebody else's
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		return f(d, info.Size())
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// Remove implements Blobs.
func (s *Dir) Remove(d Digest) error {
	if err := os.Remove(s.path(d)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove %v: %w", d, err)
	}
	return nil
}

// Verify passes r through and fails instead of ending if its bytes do not have digest d.
func Verify(r io.ReadCloser, d Digest) io.ReadCloser {
	return &verifier{r, d, sha256.New()}
}

type verifier struct {
	io.ReadCloser
	want Digest
	h    interface {
		io.Writer
		Sum([]byte) []byte
	}
}

func (v *verifier) Read(p []byte) (int, error) {
	n, err := v.ReadCloser.Read(p)
	v.h.Write(p[:n])
	if errors.Is(err, io.EOF) && Digest(v.h.Sum(nil)) != v.want {
		return n, fmt.Errorf("%v: %w", v.want, ErrDigest)
	}
	return n, err
}
