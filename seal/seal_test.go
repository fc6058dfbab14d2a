package seal

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"testing"
)

func sealed(t testing.TB, key [32]byte, plain []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := NewWriter(&b, key)
	if err != nil {
		t.Fatal(err)
	}
	for len(plain) > 0 { // in odd pieces
		n := min(len(plain), 10_007)
		if _, err := w.Write(plain[:n]); err != nil {
			t.Fatal(err)
		}
		plain = plain[n:]
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func opened(key [32]byte, b []byte) ([]byte, error) {
	r, err := NewReader(bytes.NewReader(b), key)
	if err != nil {
		return nil, err
	}
	return io.ReadAll(r)
}

func TestRoundTrip(t *testing.T) {
	key := [32]byte{1}
	for _, n := range []int{0, 1, chunk - 1, chunk, chunk + 1, 3 * chunk, 3*chunk + 7} {
		plain := bytes.Repeat([]byte{7}, n)
		b := sealed(t, key, plain)
		if int64(len(b)) != Size(int64(n)) {
			t.Errorf("%d bytes are sealed to %d, Size says %d", n, len(b), Size(int64(n)))
		}
		if got, err := opened(key, b); err != nil || !bytes.Equal(got, plain) {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
	sum := sha256.Sum256(sealed(t, BlobKey([32]byte{9}, "sha256:00"), bytes.Repeat([]byte("vector"), 20_000)))
	if got := hex.EncodeToString(sum[:]); got != "d7af2904cdecf8e5ab3c20228ca5ece16c67531b7afea10a9e51eb6a3a9835c9" {
		t.Errorf("the format changed: %s", got)
	}
}

func TestEveryChangeIsNoticed(t *testing.T) {
	key := [32]byte{1}
	plain := bytes.Repeat([]byte("0123456789abcdef"), 3*chunk/16)
	good := sealed(t, key, plain)
	one := chunk + tag
	h := len(magic)
	cut := func(n int) []byte { return bytes.Clone(good[:n]) }
	swapped := bytes.Clone(good)
	copy(swapped[h:], good[h+one:h+2*one])
	copy(swapped[h+one:], good[h:h+one])
	short := sealed(t, key, plain[:2*chunk])
	for name, b := range map[string][]byte{
		"a flipped bit":                func() []byte { b := bytes.Clone(good); b[h+one+5] ^= 1; return b }(),
		"a flipped bit in the last":    func() []byte { b := bytes.Clone(good); b[len(b)-1] ^= 1; return b }(),
		"cut at a chunk":               cut(h + 2*one),
		"cut within a chunk":           cut(h + one + 100),
		"cut to the head":              cut(h),
		"empty":                        {},
		"chunks swapped":               swapped,
		"a chunk left out":             append(cut(h+one), good[h+2*one:]...),
		"a chunk twice":                append(cut(h+one), good[h:]...),
		"a byte more":                  append(bytes.Clone(good), 0),
		"the end of another stream":    append(cut(h+one), short[h+one:]...)[:h+one+10],
		"another stream's last chunks": append(bytes.Clone(good), short[h+one:]...),
	} {
		if got, err := opened(key, b); !errors.Is(err, ErrSealed) {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
	}
	if _, err := opened([32]byte{2}, good); !errors.Is(err, ErrSealed) {
		t.Errorf("another key: %v", err)
	}
	if BlobKey([32]byte{1}, "a") == BlobKey([32]byte{1}, "b") || BlobKey([32]byte{1}, "a") == BlobKey([32]byte{2}, "a") {
		t.Error("two blobs or two holders share a key")
	}
}

func FuzzOpen(f *testing.F) {
	key := [32]byte{1}
	f.Add(sealed(f, key, []byte("hello")))
	f.Fuzz(func(t *testing.T, b []byte) {
		if got, err := opened(key, b); err == nil && !bytes.Equal(sealed(t, key, got), b) {
			t.Fatal("bytes open that nobody sealed")
		}
	})
}

func BenchmarkSeal(b *testing.B) {
	buf := make([]byte, 1<<20)
	b.SetBytes(1 << 20)
	for b.Loop() {
		w, _ := NewWriter(io.Discard, [32]byte{1})
		w.Write(buf)
		w.Close()
	}
}
