package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"holdfast/disperse"
	"holdfast/store/location"
)

// bed is a store's locations, each a directory behind a wrapper that fails as a test wants.
type bed struct {
	t       testing.TB
	root    Root
	dirs    []site
	faults  []*faulty
	scheme  disperse.Scheme
	frontAt string
	change  func(*Config)
}

const everything = location.Read | location.Write | location.Delete | location.Recover

// onDiskVariable has locations be on a disk, where there is more room.
const onDiskVariable = "HOLDFAST_STORE_ON_DISK"

// inMemory is a directory that is faster than a disk, where there is one.
func inMemory(t testing.TB) string {
	if os.Getenv(onDiskVariable) != "" {
		return t.TempDir()
	}
	dir, err := os.MkdirTemp("/dev/shm", "holdfast-store-*")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

var newBedScheme = disperse.Scheme{K: 4, N: 6}

func newBed(t testing.TB, k, n int) *bed {
	t.Helper()
	b := &bed{t: t, root: NewRoot(), scheme: disperse.Scheme{K: k, N: n}}
	at := inMemory(t)
	b.frontAt = filepath.Join(at, "front")
	for i := range n {
		d, err := newSite(filepath.Join(at, fmt.Sprint("location-", i)))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { d.Close() })
		b.dirs = append(b.dirs, d)
		b.faults = append(b.faults, &faulty{})
	}
	return b
}

// config is of a front end of its own, with its own sessions at the locations.
func (b *bed) config() Config {
	keys, err := b.root.Keys(0)
	if err != nil {
		b.t.Fatal(err)
	}
	c := Config{Dir: b.frontAt, Keys: keys, Scheme: b.scheme, Timeout: 5 * time.Second, Fragile: true}
	if testing.Verbose() {
		c.Log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	}
	for i, d := range b.dirs {
		c.Members = append(c.Members, Member{ID: disperse.Place{byte(i + 1)}, Farm: fmt.Sprint("farm", i), Location: &through{d.As(everything), b.faults[i]}})
	}
	if b.change != nil {
		b.change(&c)
	}
	return c
}

func (b *bed) open() *Store {
	b.t.Helper()
	s, err := Open(b.t.Context(), b.config())
	if err != nil {
		b.t.Fatal(err)
	}
	return s
}

func (b *bed) opened() *Store {
	b.t.Helper()
	s := b.open()
	b.t.Cleanup(func() { s.Close() })
	return s
}

// restore is the start of a new front end of which nothing but the phrase and the locations are left.
func (b *bed) restore() (*Store, error) {
	b.frontAt = filepath.Join(filepath.Dir(b.frontAt), fmt.Sprint("front-", time.Now().UnixNano()))
	c := b.config()
	c.Restore = true
	return Open(b.t.Context(), c)
}

func (b *bed) restored() *Store {
	b.t.Helper()
	s, err := b.restore()
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { s.Close() })
	return s
}

var errFault = errors.New("a fault of the test")

// faulty says what goes wrong at a location: before an operation has its effect, or after. nil does not fail.
type faulty struct {
	mu            sync.Mutex
	before, after func(ctx context.Context, op string) error
	count         map[string]int
}

func (f *faulty) set(before, after func(ctx context.Context, op string) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.before, f.after = before, after
}

func (f *faulty) run(ctx context.Context, op string, do func() error) error {
	f.mu.Lock()
	before, after := f.before, f.after
	if f.count == nil {
		f.count = map[string]int{}
	}
	f.count[op]++
	f.mu.Unlock()
	if before != nil {
		if err := before(ctx, op); err != nil {
			return err
		}
	}
	if err := do(); err != nil {
		return err
	}
	if after != nil {
		return after(ctx, op)
	}
	return nil
}

// silent is a location that cannot be reached.
func silent(context.Context, string) error { return errFault }

// mute does not take writes.
func mute(_ context.Context, op string) error {
	if op == "put" || op == "append" || op == "head" {
		return errFault
	}
	return nil
}

// through is a location with faults.
type through struct {
	location.Location
	f *faulty
}

func (l *through) Announce(ctx context.Context, e location.Epoch, h location.Holder) error {
	return l.f.run(ctx, "announce", func() error { return l.Location.Announce(ctx, e, h) })
}
func (l *through) Put(ctx context.Context, n location.Name, b []byte, until time.Time) error {
	return l.f.run(ctx, "put", func() error { return l.Location.Put(ctx, n, b, until) })
}
func (l *through) Get(ctx context.Context, n location.Name, off int64, p []byte) error {
	return l.f.run(ctx, "get", func() error { return l.Location.Get(ctx, n, off, p) })
}
func (l *through) Stat(ctx context.Context, n location.Name) (i location.Info, err error) {
	err = l.f.run(ctx, "stat", func() (err error) { i, err = l.Location.Stat(ctx, n); return err })
	return i, err
}
func (l *through) PutHead(ctx context.Context, seq uint64, b []byte) error {
	return l.f.run(ctx, "head", func() error { return l.Location.PutHead(ctx, seq, b) })
}
func (l *through) Append(ctx context.Context, n location.Name, b []byte, seq uint64, signed []byte) error {
	return l.f.run(ctx, "append", func() error { return l.Location.Append(ctx, n, b, seq, signed) })
}
func (l *through) Head(ctx context.Context) (h location.Head, err error) {
	err = l.f.run(ctx, "gethead", func() (err error) { h, err = l.Location.Head(ctx); return err })
	return h, err
}
func (l *through) Status(ctx context.Context) (st location.Status, err error) {
	err = l.f.run(ctx, "status", func() (err error) { st, err = l.Location.Status(ctx); return err })
	return st, err
}

// values and bodies as tests write them.

func set(ctx context.Context, s *Store, pairs ...string) error {
	return s.Update(ctx, func(t Tx) error {
		for i := 0; i < len(pairs); i += 2 {
			t.Set([]byte(pairs[i]), []byte(pairs[i+1]))
		}
		return nil
	})
}

func value(t testing.TB, s *Store, key string) string {
	t.Helper()
	out := "-"
	err := s.View(context.Background(), func(r Reader) error {
		v, ok, err := r.Get([]byte(key))
		if ok {
			out = string(v)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// putObject keeps a body under a key, as the layer above does.
func putObject(ctx context.Context, s *Store, key string, body []byte) error {
	b, err := s.Write(ctx, "", bytes.NewReader(body), int64(len(body)))
	if err != nil {
		return err
	}
	v, err := b.MarshalBinary()
	if err != nil {
		return err
	}
	return s.Update(ctx, func(t Tx) error {
		t.Set([]byte(key), v)
		t.Keep(b)
		return nil
	})
}

func getObject(ctx context.Context, s *Store, key string) ([]byte, error) {
	var b Body
	err := s.View(ctx, func(r Reader) error {
		v, ok, err := r.Get([]byte(key))
		if err != nil {
			return err
		}
		if !ok {
			return errAbsentObject
		}
		return b.UnmarshalBinary(v)
	})
	if err != nil {
		return nil, err
	}
	return readBody(ctx, s, b)
}

var errAbsentObject = errors.New("no such object")

func readBody(ctx context.Context, s *Store, b Body) ([]byte, error) {
	r, err := s.Read(ctx, b, 0, b.Size)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	var out bytes.Buffer
	_, err = out.ReadFrom(r)
	return out.Bytes(), err
}
