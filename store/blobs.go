// Package store keeps bytes: blobs under their digest, and objects. What blobs hold is sealed before it comes here (package
// seal): a place that stores learns sizes and nothing else. A blob lies in a directory (Dir), or as the body of an object in
// a dispersed store (Bodies); Moving begins with the one and goes over to the other.
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
	"sync"
	"time"
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

// Bodies keeps blobs in a dispersed store, which it shares with nobody.
type Bodies struct {
	objects Objects
	limit   int64
}

// NewBodies keeps blobs of at most limit bytes.
func NewBodies(o Objects, limit int64) *Bodies { return &Bodies{o, limit} }

// blobPrefix is how the key of a blob begins; its digest follows. The value is its Body.
const blobPrefix = "blob/"

func blobKey(d Digest) []byte { return append([]byte(blobPrefix), d[:]...) }

func (s *Bodies) find(ctx context.Context, d Digest) (b Body, err error) {
	err = s.objects.View(ctx, func(r Reader) error {
		v, ok, err := r.Get(blobKey(d))
		if err == nil && !ok {
			err = ErrAbsent
		}
		if err == nil {
			err = b.UnmarshalBinary(v)
		}
		return err
	})
	if err != nil {
		err = fmt.Errorf("%v: %w", d, err)
	}
	return b, err
}

// Has implements Blobs.
func (s *Bodies) Has(ctx context.Context, d Digest) (bool, error) {
	_, err := s.find(ctx, d)
	if errors.Is(err, ErrAbsent) {
		return false, nil
	}
	return err == nil, err
}

// Put implements Blobs. A blob that is there already is not written again.
func (s *Bodies) Put(ctx context.Context, d Digest, r io.Reader) error {
	if have, err := s.Has(ctx, d); err != nil || have {
		return err
	}
	b, err := s.objects.Write(ctx, "", Verify(io.NopCloser(&bounded{r, s.limit}), d), -1)
	if err != nil {
		return fmt.Errorf("put %v: %w", d, err)
	}
	v, err := b.MarshalBinary()
	if err == nil {
		err = s.objects.Update(ctx, func(t Tx) error {
			switch _, have, err := t.Get(blobKey(d)); {
			case err != nil:
				return err
			case have:
				return errThere
			}
			t.Set(blobKey(d), v)
			t.Keep(b)
			return nil
		})
	}
	if err != nil && !errors.Is(err, ErrBusy) { // else it may be kept yet
		s.objects.Discard(b)
	}
	if err != nil && !errors.Is(err, errThere) {
		return fmt.Errorf("put %v: %w", d, err)
	}
	return nil
}

// bounded fails instead of giving more than so many bytes.
type bounded struct {
	r    io.Reader
	left int64
}

func (b *bounded) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	if b.left -= int64(n); b.left < 0 {
		return 0, ErrTooBig
	}
	return n, err
}

// errThere says that another has put the same blob meanwhile.
var errThere = errors.New("blob is there")

// Open implements Blobs.
func (s *Bodies) Open(ctx context.Context, d Digest) (io.ReadCloser, int64, error) {
	b, err := s.find(ctx, d)
	if err != nil {
		return nil, 0, err
	}
	r, err := s.objects.Read(ctx, b, 0, b.Size)
	if err != nil {
		return nil, 0, fmt.Errorf("%v: %w", d, err)
	}
	return Verify(r, d), b.Size, nil
}

// Remove implements Blobs.
func (s *Bodies) Remove(d Digest) error {
	err := s.objects.Update(context.Background(), func(t Tx) error {
		v, ok, err := t.Get(blobKey(d))
		if err != nil || !ok {
			return err
		}
		var b Body
		if err := b.UnmarshalBinary(v); err != nil {
			return err
		}
		t.Delete(blobKey(d))
		t.Drop(b)
		return nil
	})
	if err != nil {
		return fmt.Errorf("remove %v: %w", d, err)
	}
	return nil
}

// Each implements Blobs.
func (s *Bodies) Each(f func(d Digest, size int64) error) error {
	return s.objects.View(context.Background(), func(r Reader) (err error) {
		c := r.Scan([]byte(blobPrefix), []byte(blobPrefix[:len(blobPrefix)-1]+"0"))
		defer func() { err = errors.Join(err, c.Close()) }()
		for c.Next() {
			var b Body
			if len(c.Key()) != len(blobPrefix)+len(Digest{}) {
				return fmt.Errorf("key %q is no blob's", c.Key())
			}
			if err := b.UnmarshalBinary(c.Value()); err != nil {
				return err
			}
			if err := f(Digest(c.Key()[len(blobPrefix):]), b.Size); err != nil {
				return err
			}
		}
		return nil
	})
}

// Moving keeps blobs in a directory as long as there is no dispersed store, and moves them there when there is. Once that
// has begun, a blob that is not in the directory may be in the store: while the store is not open nobody can tell. Who asks
// waits for it a while, and then gets ErrBusy.
type Moving struct {
	dir      *Dir
	limit    int64
	patience time.Duration
	moving   sync.Mutex

	mu    sync.Mutex
	begun bool
	to    *Bodies       // nil: it is not open
	open  chan struct{} // closed while it is
}

// NewMoving begins with a directory. begun says that a store has been used before.
func NewMoving(dir *Dir, limit int64, begun bool) *Moving {
	return &Moving{dir: dir, limit: limit, begun: begun, patience: 15 * time.Second, open: make(chan struct{})}
}

// Use makes o the store from now on; nil says that it is not open.
func (m *Moving) Use(o Objects) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.to != nil {
		m.open = make(chan struct{})
	}
	if m.to = nil; o != nil {
		m.to, m.begun = NewBodies(o, m.limit), true
		close(m.open)
	}
}

// now is the store, nil if there never was one.
func (m *Moving) now() (*Bodies, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.to == nil && m.begun {
		return nil, fmt.Errorf("the dispersed store is not open: %w", ErrBusy)
	}
	return m.to, nil
}

// soon is now, or a little later.
func (m *Moving) soon(ctx context.Context) (*Bodies, error) {
	to, err := m.now()
	if err == nil {
		return to, nil
	}
	m.mu.Lock()
	open := m.open
	m.mu.Unlock()
	select {
	case <-open:
	case <-ctx.Done():
	case <-time.After(m.patience):
	}
	return m.now()
}

// Move brings what is in the directory into the store, and removes it there when it was read back. It returns what could
// not be moved because it is damaged.
func (m *Moving) Move(ctx context.Context) (damaged []Digest, err error) {
	m.moving.Lock()
	defer m.moving.Unlock()
	to, err := m.now()
	if err != nil || to == nil {
		return nil, err
	}
	var all []Digest
	if err := m.dir.Each(func(d Digest, _ int64) error { all = append(all, d); return nil }); err != nil {
		return nil, fmt.Errorf("move blobs: %w", err)
	}
	for _, d := range all {
		err := move(ctx, m.dir, to, d)
		if errors.Is(err, ErrDigest) {
			damaged = append(damaged, d)
			continue
		}
		if err != nil {
			return damaged, fmt.Errorf("move blob %w", err)
		}
	}
	return damaged, nil
}

func move(ctx context.Context, from *Dir, to *Bodies, d Digest) error {
	r, _, err := from.Open(ctx, d)
	if errors.Is(err, ErrAbsent) {
		return nil
	} else if err != nil {
		return err
	}
	err = to.Put(ctx, d, r)
	r.Close()
	if err != nil {
		return err
	}
	if r, _, err = to.Open(ctx, d); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, r)
	r.Close()
	if err != nil {
		return err
	}
	return from.Remove(d)
}

// Left counts the blobs that lie in the directory.
func (m *Moving) Left() (n int, err error) {
	err = m.dir.Each(func(Digest, int64) error { n++; return nil })
	return n, err
}

// Has implements Blobs.
func (m *Moving) Has(ctx context.Context, d Digest) (bool, error) {
	if have, err := m.dir.Has(ctx, d); err != nil || have {
		return have, err
	}
	to, err := m.soon(ctx)
	if err != nil || to == nil {
		return false, err
	}
	return to.Has(ctx, d)
}

// Put implements Blobs. As long as the store is not open, what comes lies in the directory.
func (m *Moving) Put(ctx context.Context, d Digest, r io.Reader) error {
	if to, err := m.now(); err == nil && to != nil {
		return to.Put(ctx, d, r)
	}
	return m.dir.Put(ctx, d, r)
}

// Open implements Blobs. The directory is asked first: a blob leaves it only when it is in the store.
func (m *Moving) Open(ctx context.Context, d Digest) (io.ReadCloser, int64, error) {
	r, n, err := m.dir.Open(ctx, d)
	if !errors.Is(err, ErrAbsent) {
		return r, n, err
	}
	to, busy := m.soon(ctx)
	switch {
	case busy != nil:
		return nil, 0, fmt.Errorf("%v: %w", d, busy)
	case to == nil:
		return nil, 0, err
	}
	return to.Open(ctx, d)
}

// Remove implements Blobs.
func (m *Moving) Remove(d Digest) error {
	m.moving.Lock() // what is on its way would come again
	defer m.moving.Unlock()
	to, err := m.now()
	if err == nil {
		err = m.dir.Remove(d)
	}
	if err == nil && to != nil {
		err = to.Remove(d)
	}
	return err
}

// Each implements Blobs. When it has called f for those in the directory and cannot tell the others, it returns ErrBusy.
func (m *Moving) Each(f func(d Digest, size int64) error) error {
	seen := map[Digest]bool{}
	if err := m.dir.Each(func(d Digest, n int64) error { seen[d] = true; return f(d, n) }); err != nil {
		return err
	}
	to, err := m.now()
	if err != nil || to == nil {
		return err
	}
	return to.Each(func(d Digest, n int64) error {
		if seen[d] {
			return nil
		}
		return f(d, n)
	})
}
