package api

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"holdfast/identity"
	"holdfast/store"
)

// shelf is a store with its quota, which can be opened again.
type shelf struct {
	t    *testing.T
	home string
	root string // of dir
	dir  *store.Dir
	q    Quota
	v    *Validator
}

func newShelf(t *testing.T, q Quota) *shelf {
	s := &shelf{t: t, home: filepath.Join(t.TempDir(), "ledger"), q: q}
	s.root = filepath.Join(t.TempDir(), "blobs")
	s.dir = store.NewDir(s.root, 1<<20)
	s.open()
	t.Cleanup(func() { s.v.used.close() })
	return s
}

func (s *shelf) open() {
	s.t.Helper()
	u, err := openUsage(s.home, s.dir, s.q, identity.AccountID{0xee})
	if err != nil {
		s.t.Fatal(err)
	}
	s.v = &Validator{cfg: ValidatorConfig{Blobs: s.dir}, used: u, log: slog.New(slog.DiscardHandler)}
}

func (s *shelf) restart() {
	s.t.Helper()
	if err := s.v.used.close(); err != nil {
		s.t.Fatal(err)
	}
	s.open()
}

// blobOf is n bytes that no other name has, and their digest.
func blobOf(name string, n int) ([]byte, store.Digest) {
	b := bytes.Repeat([]byte{'.'}, n)
	copy(b, name)
	return b, sha256.Sum256(b)
}

func (s *shelf) put(account byte, name string, n int, announced bool) error {
	b, d := blobOf(name, n)
	size := int64(-1)
	if announced {
		size = int64(n)
	}
	return s.v.store(context.Background(), identity.AccountID{account}, d, size, bytes.NewReader(b))
}

func (s *shelf) must(account byte, name string, n int) {
	s.t.Helper()
	if err := s.put(account, name, n, true); err != nil {
		s.t.Fatal(err)
	}
}

// refused says that a blob is refused for the reason that want names, whether its size was announced or not.
func (s *shelf) refused(account byte, name string, n int, want string) {
	s.t.Helper()
	for _, announced := range []bool{true, false} {
		if err := s.put(account, name, n, announced); !errors.Is(err, errQuota) || !strings.Contains(err.Error(), want) {
			s.t.Errorf("%s of %d bytes, announced %v: %v", name, n, announced, err)
		}
	}
	_, d := blobOf(name, n)
	if have, err := s.dir.Has(context.Background(), d); err != nil || have {
		s.t.Errorf("%s is stored: %v", name, err)
	}
}

func TestQuotas(t *testing.T) {
	const full, grids = "the account stores", "the grid's store is full"
	s := newShelf(t, Quota{AccountBytes: 10_000, AccountBlobs: 4, Bytes: 32_000, Blobs: 16})
	s.must(1, "a", 6000)
	s.refused(1, "b", 4001, full)
	s.must(1, "c", 3000)
	s.must(1, "a", 6000) // what is there costs nothing
	s.must(2, "a", 6000)
	if err := s.put(1, "lie", 10, true); err != nil { // the control of what follows
		t.Fatal(err)
	}
	_, d := blobOf("other", 500)
	lie, _ := blobOf("lie2", 500)
	for range 100 { // what fails is given back
		if err := s.v.store(t.Context(), identity.AccountID{1}, d, 500, bytes.NewReader(lie)); !errors.Is(err, store.ErrDigest) {
			t.Fatal(err)
		}
		if err := s.v.store(t.Context(), identity.AccountID{1}, d, 500, io.MultiReader(bytes.NewReader(lie), errReader{})); err == nil || errors.Is(err, errQuota) {
			t.Fatal(err)
		}
	}
	s.must(1, "d", 990)
	check := func(when string) {
		t.Helper()
		if a := *s.v.used.by[identity.AccountID{1}]; a != (used{10_000, 4}) {
			t.Errorf("%s: the account has %+v", when, a)
		}
		if u := s.v.used; u.bytes != 10_000 || u.blobs != 4 || len(u.by) != 1 {
			t.Errorf("%s: the store has %d bytes in %d blobs of %d accounts", when, u.bytes, u.blobs, len(u.by))
		}
		s.refused(1, "e", 1, full)
	}
	check("at first")
	s.restart()
	check("after a restart")
	s.restart()
	check("after another")

	// An operator who removes a blob gives its account room.
	_, d = blobOf("c", 3000)
	if err := s.dir.Remove(d); err != nil {
		t.Fatal(err)
	}
	s.restart()
	s.must(1, "f", 3000)
	s.restart()
	check("in place of what was removed")

	// An account costs nothing: many of them fill the store, up to what is the grid's alone.
	s.must(2, "g", 10_000)
	s.must(3, "h", 9_900)
	s.refused(4, "i", 101, grids)
	s.must(4, "j", 100)
	s.refused(5, "k", 1, grids)
	s.must(0xee, "l", 2000) // the grid's own
	s.refused(0xee, "m", 1, "its operator must")
	s.restart()
	s.refused(5, "k", 1, grids)
}

func TestQuotaOfBlobs(t *testing.T) {
	s := newShelf(t, Quota{AccountBytes: 1 << 20, AccountBlobs: 3, Bytes: 1 << 20, Blobs: 32})
	for _, n := range []string{"a", "b", "c"} {
		s.must(1, n, 10)
	}
	s.refused(1, "d", 10, "in 3 blobs")
	s.must(2, "e", 10)
	for i := range 26 {
		s.must(byte(10+i), "x"+string(rune('a'+i)), 10)
	}
	s.refused(90, "f", 10, "store is full")
}

// Blobs that were stored before anybody counted are the store's, and nobody's.
func TestBlobsThatNobodyPaysFor(t *testing.T) {
	s := newShelf(t, Quota{AccountBytes: 1000, Bytes: 3200})
	b, d := blobOf("old", 2500)
	if err := s.dir.Put(t.Context(), d, bytes.NewReader(b)); err != nil {
		t.Fatal(err)
	}
	s.must(1, "a", 600) // the control: it was not counted yet
	s.restart()
	s.refused(2, "b", 600, "store is full")
}

// What was seen damaged is looked at again before it is removed, and costs what it did.
func TestOneBadReadLosesNothing(t *testing.T) {
	s := newShelf(t, Quota{AccountBlobs: 1})
	s.must(1, "a", 100)
	b, d := blobOf("a", 100)
	for _, damage := range []bool{false, true} {
		name := map[bool]string{false: "a copy that is whole", true: "one that is damaged"}[damage]
		if damage {
			if err := os.WriteFile(filepath.Join(s.root, d.String()[:2], d.String()), b[1:], 0o600); err != nil {
				t.Fatal(err)
			}
		}
		s.v.damaged = map[store.Digest]bool{d: true}
		lie, _ := blobOf("lie", 100)
		err := s.v.store(t.Context(), identity.AccountID{1}, d, 100, bytes.NewReader(lie))
		if have, _ := s.dir.Has(t.Context(), d); have == damage || damage != errors.Is(err, store.ErrDigest) {
			t.Errorf("%s: the store has it: %v, %v", name, have, err)
		}
	}
	s.v.damaged = map[store.Digest]bool{d: true}
	s.must(1, "a", 100)
	if u := s.v.used; u.bytes != 100 || u.blobs != 1 || *u.by[identity.AccountID{1}] != (used{100, 1}) {
		t.Errorf("%d bytes, %d blobs, %+v", u.bytes, u.blobs, u.by)
	}
}

type errReader struct{}

func (errReader) Read([]byte) (int, error) { return 0, errors.New("cable pulled") }

func TestTwoUploadsOfOneBlobCostOnce(t *testing.T) {
	s := newShelf(t, Quota{})
	b, d := blobOf("both", 100)
	pr, pw := io.Pipe()
	first := make(chan error)
	go func() { first <- s.v.store(t.Context(), identity.AccountID{1}, d, 100, pr) }()
	if _, err := pw.Write(b[:50]); err != nil {
		t.Fatal(err)
	}
	if err := s.v.store(t.Context(), identity.AccountID{2}, d, 100, bytes.NewReader(b)); err != nil {
		t.Fatal(err)
	}
	pw.Write(b[50:])
	pw.Close()
	if err := <-first; err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if u := s.v.used; u.bytes != 100 || u.blobs != 1 || u.by[identity.AccountID{1}] != nil || *u.by[identity.AccountID{2}] != (used{100, 1}) {
			t.Errorf("%d bytes, %d blobs, %+v", u.bytes, u.blobs, u.by)
		}
		s.restart()
	}
}

func TestWhoStoredWhatSurvivesACrash(t *testing.T) {
	s := newShelf(t, Quota{})
	s.must(1, "a", 10)
	s.must(2, "b", 20)
	path := filepath.Join(s.home, storedFile)
	whole, err := os.ReadFile(path)
	if err != nil || len(whole) != len(storedFormat)+2*recordSize {
		t.Fatalf("%d bytes, %v", len(whole), err)
	}
	for n := range len(whole) + 1 { // a crash leaves any beginning
		all, err := decodeStored(whole[:n])
		if want := max(0, n-len(storedFormat)) / recordSize; err != nil || len(all) != want {
			t.Fatalf("the first %d bytes: %d records, %v", n, len(all), err)
		}
	}
	if err := os.WriteFile(path, whole[:len(whole)-1], 0o600); err != nil {
		t.Fatal(err)
	}
	s.restart()
	if u := s.v.used; u.bytes != 30 || len(u.by) != 1 || u.by[identity.AccountID{1}].bytes != 10 {
		t.Errorf("after a crash: %d bytes, %+v", u.bytes, u.by)
	}
	s.must(3, "c", 30)
	s.restart()
	if len(s.v.used.by) != 2 || s.v.used.by[identity.AccountID{3}].bytes != 30 {
		t.Errorf("what came after a crash: %+v", s.v.used.by)
	}
	// Damage is no crash.
	whole[len(storedFormat)+3] ^= 1
	if err := os.WriteFile(path, whole, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := openUsage(s.home, s.dir, Quota{}, identity.AccountID{}); err == nil || !strings.Contains(err.Error(), "record 0 is damaged") || !strings.Contains(err.Error(), path) {
		t.Errorf("a damaged file: %v", err)
	}
	if _, err := decodeStored([]byte("holdfast stored 2\n")); err == nil {
		t.Error("another version is read")
	}
}

// A validator that starts before its dispersed store is open: what is written down counts until the store can tell.
func TestQuotasBeforeTheStoreIsOpen(t *testing.T) {
	s := newShelf(t, Quota{AccountBytes: 1000, Bytes: 32_000})
	s.must(1, "a", 900)
	if err := s.v.used.close(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(s.home, storedFile)
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	u, err := openUsage(s.home, store.NewMoving(store.NewDir(t.TempDir(), 1<<20), 1<<20, true), s.q, identity.AccountID{0xee})
	if err != nil {
		t.Fatal(err)
	}
	if a := u.by[identity.AccountID{1}]; a == nil || *a != (used{900, 1}) || u.bytes != 900 {
		t.Errorf("the account has %+v, the store %d bytes", a, u.bytes)
	}
	if err := u.close(); err != nil {
		t.Fatal(err)
	}
	if after, err := os.ReadFile(path); err != nil || !bytes.Equal(after, before) {
		t.Errorf("what was written down changed: %v", err)
	}
	s.open() // and the true store is believed
}

func TestStoredVector(t *testing.T) {
	r := record{identity.AccountID{1}, store.Digest{2}, 3}
	const want = "010000000000000000000000000000000000000000000000000000000000000002000000000000000000000000000000000000000000000000000000000000000000000000000003bd389bb3"
	if got := hex.EncodeToString(r.encode()); got != want {
		t.Errorf("the record is %s", got)
	}
}

func FuzzStored(f *testing.F) {
	r := record{identity.AccountID{1}, store.Digest{2}, 3}.encode()
	f.Add([]byte(storedFormat + string(r) + string(r)))
	f.Add([]byte(storedFormat + string(r[:9])))
	f.Fuzz(func(t *testing.T, b []byte) {
		all, err := decodeStored(b)
		if err != nil || len(all) == 0 {
			return
		}
		again := []byte(storedFormat)
		for _, r := range all {
			again = append(again, r.encode()...)
		}
		if !bytes.HasPrefix(b, again) {
			t.Errorf("%x is read as %x", b, again)
		}
	})
}
