// Package disperse turns a segment into n shards of which any k give it back. It encrypts the segment under a random key,
// cuts the ciphertext by a Reed–Solomon code, and wraps the key under a secret that is shared among the shards with the same
// k, together with a key that no location has: Krawczyk's construction. Secrets can be shared whole (Split). Shards have
// names by which anybody finds rot in them and proves ranges of them, and a MAC that only the store can make.
//
// It is pure but for randomness: it knows no location, no file and no clock, and decides nowhere who gets which shard. The
// bytes and the claims are in docs/formats/shard.md.
package disperse

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/bits"
	"strconv"
	"strings"
)

const (
	// MaxSegment bounds the plain bytes of a segment.
	MaxSegment = 16 << 20
	// MaxSecret bounds what Split takes.
	MaxSecret = 64 << 10
	// MaxN bounds the shards of a segment: those of a secret are k more symbols of a code with at most 256.
	MaxN = 128
	// Overhead is what Decode needs in dst beyond the segment's length to work without a buffer of its own.
	Overhead = 16
)

var (
	// ErrAuth is returned when shards, wrap, keys or what is known of the segment do not belong together. A shard that does
	// not have its name is to be left out; if all have theirs, the key or the record is another's.
	ErrAuth = errors.New("not authentic")
	// ErrFew is returned when fewer than k shards are given.
	ErrFew = errors.New("fewer than k shards")
)

// A Scheme says that any K of N shards give a segment back.
type Scheme struct{ K, N int }

// ParseScheme reads the form that String writes, such as "4/6".
func ParseScheme(s string) (Scheme, error) {
	a, b, _ := strings.Cut(s, "/")
	k, err1 := strconv.Atoi(a)
	n, err2 := strconv.Atoi(b)
	c := Scheme{k, n}
	if err1 != nil || err2 != nil || c.String() != s {
		return Scheme{}, fmt.Errorf("scheme %.20q: not of the form 4/6", s)
	}
	return c, c.Check()
}

func (s Scheme) String() string { return fmt.Sprintf("%d/%d", s.K, s.N) }

// Check says whether there can be such a scheme.
func (s Scheme) Check() error {
	if s.K < 1 || s.K > s.N || s.N > MaxN {
		return fmt.Errorf("scheme %v: not 1 ≤ k ≤ n ≤ %d", s, MaxN)
	}
	return nil
}

// MarshalText implements encoding.TextMarshaler.
func (s Scheme) MarshalText() ([]byte, error) { return []byte(s.String()), s.Check() }

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *Scheme) UnmarshalText(b []byte) (err error) {
	*s, err = ParseScheme(string(b))
	return err
}

// An ID is a segment's, and only ever one encoding's: what is encoded again gets another.
type ID [16]byte

func (i ID) String() string { return hex.EncodeToString(i[:]) }

// NewID returns an ID that nothing has.
func NewID() (i ID) {
	rand.Read(i[:]) // never fails
	return i
}

// A Place is who keeps a shard.
type Place [16]byte

func (p Place) String() string { return hex.EncodeToString(p[:]) }

// A Key is a secret of the store's: the one that an epoch's segments are sealed under, or the one of its shards' MACs. No
// form of printing shows it.
type Key [32]byte

const hidden = "[key]"

func (Key) String() string { return hidden }

// Format implements fmt.Formatter.
func (Key) Format(f fmt.State, _ rune) { io.WriteString(f, hidden) }

// LogValue implements slog.LogValuer.
func (Key) LogValue() slog.Value { return slog.StringValue(hidden) }

// MarshalText keeps encodings from showing the key.
func (Key) MarshalText() ([]byte, error) { return []byte(hidden), nil }

// A Wrap is a segment's key, sealed. It is the caller's to keep; with fewer than k shards it opens for nobody.
type Wrap [48]byte

// minPadded is what the shortest segments are taken for.
const minPadded = 256

// padded is the length that a segment is taken for: the mantissa keeps about log2 log2 n bits, so that a length tells
// little and costs at most 12 % (Padmé).
func padded(n int) int {
	n = max(n, minPadded)
	e := bits.Len(uint(n)) - 1
	low := e - bits.Len(uint(e))
	return (n + 1<<low - 1) >> low << low
}
