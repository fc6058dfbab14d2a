package deploy

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"log"
	"net/http"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"holdfast/contract"
	"holdfast/seal"
	"holdfast/store"

	gcrregistry "github.com/google/go-containerregistry/pkg/registry"
)

var logNothing = log.New(io.Discard, "", 0)

func registryHandler() http.Handler { return gcrregistry.New(gcrregistry.Logger(logNothing)) }

func contextWithCancel(t *testing.T) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	return ctx, cancel
}

// memory is a Place.
type memory struct {
	blobs map[store.Digest][]byte
	asked int
	fail  func(d store.Digest) error // before a blob is stored
	read  int64                      // bytes to read of a blob before it fails
}

func (m *memory) HasBlob(_ context.Context, d store.Digest) (bool, error) {
	m.asked++
	_, ok := m.blobs[d]
	return ok, nil
}

func (m *memory) Put(_ context.Context, d store.Digest, size int64, r io.Reader) error {
	if m.fail != nil {
		if err := m.fail(d); err != nil {
			io.CopyN(io.Discard, r, m.read)
			return err
		}
	}
	b, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	if sha256.Sum256(b) != d || int64(len(b)) != size {
		return errors.New("other bytes than announced")
	}
	if m.blobs == nil {
		m.blobs = map[store.Digest][]byte{}
	}
	m.blobs[d] = b
	return nil
}

// counted counts how often a source's blobs are read.
func counted(s *Source, n *int) *Source {
	c := *s
	c.Blobs = slices.Clone(s.Blobs)
	for i := range c.Blobs {
		open := c.Blobs[i].Open
		c.Blobs[i].Open = func(ctx context.Context) (io.ReadCloser, error) { *n++; return open(ctx) }
	}
	return &c
}

func find1(t testing.TB, dir string) *Source {
	t.Helper()
	s, err := Resolve(t.Context(), "oci:"+dir, "")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// What a place gets is sealed, and opens to the image with the keys that the contract's body carries.
func TestBlobsArePushedSealed(t *testing.T) {
	img := newImage("one")
	s := find1(t, write(t, img))
	place, secret := &memory{}, [32]byte{1}
	var done int64
	got, err := Push(t.Context(), s, secret, place, nil, func(n int64) { done += n })
	if err != nil {
		t.Fatal(err)
	}
	var total int64
	for _, b := range s.Blobs {
		total += b.Size
	}
	if got.Manifest != img.Manifest || len(got.Blobs) != len(img.Blobs) || len(place.blobs) != len(img.Blobs) || done != total {
		t.Fatalf("%+v, %d stored, %d of %d bytes", got, len(place.blobs), done, total)
	}
	for _, b := range got.Blobs {
		sealed := place.blobs[b.Sealed]
		if bytes.Contains(sealed, []byte(marker)) || bytes.Contains(sealed, img.Blobs[b.Digest][:8]) {
			t.Errorf("%s is stored in the clear", b.Digest)
		}
		r, err := seal.NewReader(bytes.NewReader(sealed), b.Key)
		if err != nil {
			t.Fatal(err)
		}
		plain, err := io.ReadAll(r)
		if err != nil || !bytes.Equal(plain, img.Blobs[b.Digest]) || uint64(len(plain)) != b.Size {
			t.Errorf("%s opens to %d bytes: %v", b.Digest, len(plain), err)
		}
	}
	// The control: the marker was there to be seen.
	if !slices.ContainsFunc(s.Blobs, func(b SourceBlob) bool { return bytes.Contains(img.Blobs[b.Digest], []byte(marker)) }) {
		t.Error("no layer has the marker")
	}
	// Another holder's blobs have other names and other keys: a place cannot tell that they are the same image.
	other, err := Push(t.Context(), s, [32]byte{2}, place, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := range other.Blobs {
		if other.Blobs[i].Sealed == got.Blobs[i].Sealed || other.Blobs[i].Key == got.Blobs[i].Key {
			t.Error("two holders seal a blob alike")
		}
	}
}

func TestPushingTwiceStoresOnce(t *testing.T) {
	img := newImage("one")
	place, secret, reads := &memory{}, [32]byte{1}, 0
	s := counted(find1(t, write(t, img)), &reads)
	first, err := Push(t.Context(), s, secret, place, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	place.fail = func(store.Digest) error { return errors.New("stored again") }
	again, err := Push(t.Context(), s, secret, place, nil, nil)
	if err != nil || !slices.Equal(again.Blobs, first.Blobs) {
		t.Fatalf("%+v %v", again, err)
	}
	known := map[string]contract.Blob{}
	for _, b := range first.Blobs {
		known[b.Digest] = b
	}
	reads = 0
	again, err = Push(t.Context(), s, secret, place, known, nil)
	if err != nil || !slices.Equal(again.Blobs, first.Blobs) || reads != 0 {
		t.Fatalf("what is known was read %d times: %v", reads, err)
	}
	// What is known of another holder, or has gone from the place, is pushed like new.
	place.fail = nil
	other, err := Push(t.Context(), s, [32]byte{2}, place, known, nil)
	if err != nil || other.Blobs[0].Sealed == first.Blobs[0].Sealed || reads == 0 {
		t.Errorf("%v, read %d times", err, reads)
	}
	delete(place.blobs, first.Blobs[2].Sealed)
	if _, err := Push(t.Context(), s, secret, place, known, nil); err != nil || place.blobs[first.Blobs[2].Sealed] == nil {
		t.Errorf("a blob that the place has lost: %v", err)
	}
}

// The disk's owner, or a build that runs meanwhile, changes a layer after the plan: it is not pushed.
func TestATamperedLayerIsNotPushed(t *testing.T) {
	img := newImage("one")
	for _, tc := range []struct {
		name   string
		tamper func(b []byte) []byte
	}{
		{"a flipped bit", func(b []byte) []byte { b[700] ^= 1; return b }},
		{"cut", func(b []byte) []byte { return b[:len(b)-512] }},
		{"longer", func(b []byte) []byte { return append(b, 0) }},
		{"empty", func([]byte) []byte { return nil }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := write(t, img)
			s := find1(t, dir)
			l := s.Blobs[3]
			place := &memory{}
			overwrite(t, blobPath(dir, l.Digest), tc.tamper(slices.Clone(img.Blobs[l.Digest])))
			got, err := Push(t.Context(), s, [32]byte{1}, place, nil, nil)
			if !errors.Is(err, ErrDigest) || !strings.Contains(err.Error(), l.Digest) || got != nil {
				t.Errorf("%v", err)
			}
			if len(place.blobs) != 3 {
				t.Errorf("%d blobs are stored, three came before it", len(place.blobs))
			}
		})
	}
	t.Run("gone", func(t *testing.T) {
		dir := write(t, img)
		s := find1(t, dir)
		overwrite(t, blobPath(dir, s.Blobs[3].Digest), nil)
		if err := os.Remove(blobPath(dir, s.Blobs[3].Digest)); err != nil {
			t.Fatal(err)
		}
		if _, err := Push(t.Context(), s, [32]byte{1}, &memory{}, nil, nil); err == nil || !strings.Contains(err.Error(), "is not in the layout") {
			t.Errorf("%v", err)
		}
	})
	// Between the pass that hashes and the one that sends: what arrives has another digest than announced, and is not kept.
	t.Run("between the two passes", func(t *testing.T) {
		s := find1(t, write(t, img))
		passes, place := 0, &memory{}
		l := &s.Blobs[3]
		good := img.Blobs[l.Digest]
		l.Open = func(context.Context) (io.ReadCloser, error) {
			b := slices.Clone(good)
			if passes++; passes == 2 {
				b[700] ^= 1
			}
			return io.NopCloser(bytes.NewReader(b)), nil
		}
		if _, err := Push(t.Context(), s, [32]byte{1}, place, nil, nil); !errors.Is(err, ErrDigest) || passes != 2 || len(place.blobs) != 3 {
			t.Errorf("%v after %d passes, %d stored", err, passes, len(place.blobs))
		}
	})
}

// A place that fails in the middle of a blob leaves nobody behind that seals on.
func TestAPlaceThatFails(t *testing.T) {
	big := slices.Repeat([]byte("0123456789abcdef"), 1<<16)
	img := newImage(string(big))
	for _, read := range []int64{0, 100_000, 1 << 30} {
		s := find1(t, write(t, img))
		before := runtime.NumGoroutine()
		gone := errors.New("the place is gone")
		place := &memory{read: read, fail: func(store.Digest) error { return gone }}
		if _, err := Push(t.Context(), s, [32]byte{1}, place, nil, nil); !errors.Is(err, gone) {
			t.Errorf("%v", err)
		}
		for deadline := time.Now().Add(10 * time.Second); runtime.NumGoroutine() > before; runtime.Gosched() {
			if time.Now().After(deadline) {
				t.Fatalf("%d goroutines, there were %d", runtime.NumGoroutine(), before)
			}
		}
	}
}

func BenchmarkPush(b *testing.B) {
	img := newImage(string(slices.Repeat([]byte("0123456789abcdef"), 1<<20)))
	s := find1(b, write(b, img))
	var total int64
	for _, x := range s.Blobs {
		total += x.Size
	}
	full := &memory{}
	first, err := Push(b.Context(), s, [32]byte{1}, full, nil, nil)
	if err != nil {
		b.Fatal(err)
	}
	known := map[string]contract.Blob{}
	for _, x := range first.Blobs {
		known[x.Digest] = x
	}
	for name, f := range map[string]func() error{
		"new":    func() error { _, err := Push(b.Context(), s, [32]byte{1}, &memory{}, nil, nil); return err },
		"stored": func() error { _, err := Push(b.Context(), s, [32]byte{1}, full, nil, nil); return err },
		"known":  func() error { _, err := Push(b.Context(), s, [32]byte{1}, full, known, nil); return err },
	} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(total)
			for b.Loop() {
				if err := f(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
