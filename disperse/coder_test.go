package disperse

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
)

// seeded is randomness that comes again.
func seeded(n byte) *rand.ChaCha8 { return rand.NewChaCha8([32]byte{n}) }

// bytesOf is what a seed gives.
func bytesOf(seed byte, n int) []byte {
	b := make([]byte, n)
	seeded(seed).Read(b)
	return b
}

func newCoder(t testing.TB, s Scheme) *Coder {
	t.Helper()
	c, err := NewCoder(s)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// case of a segment: its shards are clones that a test may change.
type segment struct {
	*Encoded
	c        *Coder
	id       ID
	key, mac *Key
	places   []Place
	plain    []byte
}

func encode(t testing.TB, s Scheme, size int) *segment {
	t.Helper()
	x := &segment{c: newCoder(t, s), id: NewID(), plain: bytesOf(7, size)}
	x.key, x.mac, x.places = testKeys(s)
	e, err := x.c.Encode(x.id, x.key, x.mac, x.places, x.plain)
	if err != nil {
		t.Fatal(err)
	}
	x.Encoded = &Encoded{Names: e.Names, Wrap: e.Wrap}
	for _, s := range e.Shards {
		x.Shards = append(x.Shards, bytes.Clone(s))
	}
	e.Release()
	return x
}

func (x *segment) decode(shards [][]byte) ([]byte, error) {
	return x.c.Decode(nil, x.id, x.key, x.Wrap, len(x.plain), shards)
}

// some is a copy of the shards with those whose bit is not set missing.
func (x *segment) some(mask uint) [][]byte {
	out := make([][]byte, len(x.Shards))
	for i, s := range x.Shards {
		if mask>>i&1 != 0 {
			out[i] = bytes.Clone(s)
		}
	}
	return out
}

func TestAnyKShardsAreEnough(t *testing.T) {
	for _, s := range []Scheme{{1, 1}, {1, 3}, {2, 2}, {2, 3}, {4, 6}, {16, 20}, {3, 128}, {128, 128}} {
		for _, size := range []int{0, 1, 255, 256, 4095, 70_000} {
			x := encode(t, s, size)
			r := rand.New(seeded(1))
			for range 8 {
				keep := r.Perm(s.N)[:s.K]
				shards := make([][]byte, s.N)
				for _, i := range keep {
					shards[i] = x.Shards[i]
				}
				got, err := x.decode(shards)
				if err != nil || !bytes.Equal(got, x.plain) {
					t.Fatalf("%v, %d bytes, from %v: %v", s, size, keep, err)
				}
			}
			for i, b := range x.Shards {
				if len(b) != x.c.ShardSize(size) || size > 0 && bytes.Contains(b, x.plain[:min(size, 16)]) && size >= 16 {
					t.Fatalf("%v, %d bytes: shard %d has %d", s, size, i, len(b))
				}
			}
		}
	}
	x := encode(t, Scheme{4, 6}, 100_000)
	for mask := range uint(64) {
		got, err := x.decode(x.some(mask))
		switch n := len(slices.DeleteFunc(x.some(mask), func(b []byte) bool { return b == nil })); {
		case n < 4 && !errors.Is(err, ErrFew):
			t.Errorf("%06b: %v", mask, err)
		case n >= 4 && (err != nil || !bytes.Equal(got, x.plain)):
			t.Errorf("%06b: %v", mask, err)
		}
	}
	whole := encode(t, Scheme{1, 2}, MaxSegment)
	if got, err := whole.decode([][]byte{nil, whole.Shards[1]}); err != nil || !bytes.Equal(got, whole.plain) || len(whole.Shards[1]) > MaxShard {
		t.Errorf("the largest shard: %d bytes, %v", len(whole.Shards[1]), err)
	}
}

func TestDecodeAppendsAndNeedsNoMoreRoom(t *testing.T) {
	x := encode(t, Scheme{4, 6}, 100_000)
	dst := append(make([]byte, 0, 5+len(x.plain)+Overhead), "begin"...)
	got, err := x.c.Decode(dst, x.id, x.key, x.Wrap, len(x.plain), x.Shards)
	if err != nil || string(got[:5]) != "begin" || !bytes.Equal(got[5:], x.plain) || &got[0] != &dst[0] {
		t.Errorf("it is elsewhere, or not whole: %v", err)
	}
}

func TestEncodeRefuses(t *testing.T) {
	c := newCoder(t, Scheme{4, 6})
	key, mac, places := testKeys(Scheme{4, 6})
	twice := slices.Clone(places)
	twice[5] = twice[0]
	for name, f := range map[string]func() (*Encoded, error){
		"a segment that is too long": func() (*Encoded, error) { return c.Encode(ID{}, key, mac, places, make([]byte, MaxSegment+1)) },
		"too few places":             func() (*Encoded, error) { return c.Encode(ID{}, key, mac, places[:5], nil) },
		"two shards for one place":   func() (*Encoded, error) { return c.Encode(ID{}, key, mac, twice, nil) },
		"two shares for one place":   func() (*Encoded, error) { return c.Split(ID{}, mac, twice, nil) },
		"a secret that is too long":  func() (*Encoded, error) { return c.Split(ID{}, mac, places, make([]byte, MaxSecret+1)) },
		"a secret shared one of n": func() (*Encoded, error) {
			return newCoder(t, Scheme{1, 6}).Split(ID{}, mac, places, nil)
		},
	} {
		if _, err := f(); err == nil {
			t.Errorf("%s is taken", name)
		}
	}
	broken := newCoder(t, Scheme{4, 6})
	broken.rand = strings.NewReader("not enough")
	if _, err := broken.Encode(ID{}, key, mac, places, nil); err == nil {
		t.Error("it encodes without randomness")
	}
	if _, err := broken.Split(ID{}, mac, places, nil); err == nil {
		t.Error("it shares without randomness")
	}
}

// What the front end keeps and what it is told must belong together.
func TestNothingElseDecodes(t *testing.T) {
	x, other := encode(t, Scheme{4, 6}, 10_000), encode(t, Scheme{4, 6}, 10_000)
	same := newCoder(t, Scheme{4, 6})
	flipped := x.Wrap
	flipped[40] ^= 1
	id := x.id
	id[15] ^= 1
	swapped := x.some(63)
	swapped[0], swapped[1] = swapped[1], swapped[0]
	foreign := x.some(63)
	foreign[2] = other.Shards[2]
	twice := x.some(63)
	twice[3] = bytes.Clone(twice[2])
	for _, c := range []struct {
		name   string
		id     ID
		key    Key
		wrap   Wrap
		length int
		shards [][]byte
		says   string
	}{
		{"another store key", x.id, Key{9}, x.Wrap, 10_000, x.Shards, "wrap"},
		{"no store key", x.id, Key{}, x.Wrap, 10_000, x.Shards, "wrap"},
		{"a wrap with a bit flipped", x.id, *x.key, flipped, 10_000, x.Shards, "wrap"},
		{"another segment's wrap", x.id, *x.key, other.Wrap, 10_000, x.Shards, "wrap"},
		{"another ID", id, *x.key, x.Wrap, 10_000, x.Shards, "shard 0 is not of it"},
		{"a shorter length of the same shard size", x.id, *x.key, x.Wrap, 9_999, x.Shards, ""},
		{"a longer length of the same shard size", x.id, *x.key, x.Wrap, 10_001, x.Shards, ""},
		{"a length of another shard size", x.id, *x.key, x.Wrap, 20_000, x.Shards, "shard 0 is not of it"},
		{"two shards in each other's place", x.id, *x.key, x.Wrap, 10_000, swapped, "shard 0 is not of it"},
		{"a shard of another segment", x.id, *x.key, x.Wrap, 10_000, foreign, "shard 2 is not of it"},
		{"one shard twice", x.id, *x.key, x.Wrap, 10_000, twice, "shard 3 is not of it"},
	} {
		got, err := same.Decode(nil, c.id, &c.key, c.wrap, c.length, c.shards)
		if !errors.Is(err, ErrAuth) || got != nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %d bytes, %v", c.name, len(got), err)
		}
	}
	for _, n := range []int{-1, MaxSegment + 1} {
		if _, err := same.Decode(nil, x.id, x.key, x.Wrap, n, x.Shards); err == nil {
			t.Errorf("a length of %d is taken", n)
		}
	}
	if _, err := newCoder(t, Scheme{4, 7}).Decode(nil, x.id, x.key, x.Wrap, 10_000, append(slices.Clone(x.Shards), nil)); !errors.Is(err, ErrAuth) {
		t.Errorf("another scheme: %v", err)
	}
	if got, err := same.Decode(nil, x.id, x.key, x.Wrap, 10_000, x.Shards); err != nil || !bytes.Equal(got, x.plain) {
		t.Errorf("control: %v", err)
	}
}

func TestFlippedBitsAreNamedAndTheRestDecodes(t *testing.T) {
	for _, s := range []Scheme{{4, 6}, {16, 20}} {
		x := encode(t, s, 90_001)
		r := rand.New(seeded(3))
		for round := range 60 {
			shards := x.some(1<<s.N - 1)
			bad := r.Perm(s.N)[:1+r.IntN(s.N-s.K)]
			for _, i := range bad {
				for range 1 + r.IntN(4) {
					at := r.IntN(len(shards[i]) * 8)
					shards[i][at/8] ^= 1 << (at % 8)
				}
				if r.IntN(10) == 0 {
					shards[i] = shards[i][:r.IntN(len(shards[i]))]
				}
			}
			// As they are: the right bytes or none.
			if got, err := x.decode(shards); err == nil && !bytes.Equal(got, x.plain) || err != nil && !errors.Is(err, ErrAuth) {
				t.Fatalf("%v, round %d, %v: other bytes, or %v", s, round, bad, err)
			}
			for i, b := range shards {
				n, err := NameOf(b)
				if (n == x.Names[i]) == slices.Contains(bad, i) && !bytes.Equal(b, x.Shards[i]) {
					t.Fatalf("%v, round %d: shard %d has the name %v, %v", s, round, i, n, err)
				}
				if n != x.Names[i] {
					shards[i] = nil
				}
			}
			if got, err := x.decode(shards); err != nil || !bytes.Equal(got, x.plain) {
				t.Fatalf("%v, round %d, without %v: %v", s, round, bad, err)
			}
		}
	}
}

func TestNoLocationForgesAShard(t *testing.T) {
	x := encode(t, Scheme{4, 6}, 30_000) // two leaves a shard
	for i, b := range x.Shards {
		want := Stamp{x.c.scheme, i, x.id, x.places[i], false}
		if s, err := Check(x.mac, b); err != nil || s != want {
			t.Fatalf("control: %v, %v", s, err)
		}
	}
	size := len(x.Shards[1]) - trailerSize
	change := func(at int, p ...byte) func([]byte) {
		return func(b []byte) { copy(b[size+at:], p) }
	}
	// Who has other keys makes a MAC with them.
	under := func(key []byte, f func([]byte)) func([]byte) {
		return func(b []byte) {
			f(b)
			newStamper((*Key)(key), new(Tree)).stamp(b)
		}
	}
	none := func([]byte) {}
	cases := map[string]func([]byte){
		"another index":                    change(offIndex, 2),
		"an index that is none":            change(offIndex, 6),
		"another k":                        change(offK, 3),
		"another n":                        change(offN, 7),
		"another kind":                     change(offKind, kindSecret),
		"a kind that is none":              change(offKind, 9),
		"another version":                  change(3, 2),
		"another ID":                       change(offID, 0x55, 0x55),
		"another place":                    change(offPlace, x.places[2][:]...),
		"another share":                    change(offShare, 1, 2, 3),
		"another shard's share":            change(offShare, x.Shards[2][size+offShare:size+offMAC]...),
		"another shard's payload":          func(b []byte) { copy(b, x.Shards[2][:size]) },
		"another shard's MAC":              change(offMAC, x.Shards[2][size+offMAC:]...),
		"a MAC under no key":               under(make([]byte, 32), none),
		"a MAC under the store key":        under(x.key[:], none),
		"another place, MAC under a guess": under(make([]byte, 32), change(offPlace, x.places[2][:]...)),
		"a plain hash where the MAC is":    func(b []byte) { h := sha256.Sum256(b[:size+offMAC]); copy(b[size+offMAC:], h[:]) },
		"a first bit of the payload":       func(b []byte) { b[0] ^= 0x80 },
		"a last bit of the payload":        func(b []byte) { b[size-1] ^= 1 },
		"another size":                     change(offSize, 0, 0, 1, 1),
		"a HMAC of what is there in one hash": func(b []byte) {
			h := hmac.New(sha256.New, nil)
			h.Write(b[:size+offMAC])
			copy(b[size+offMAC:], h.Sum(nil))
		},
	}
	for name, f := range cases {
		b := bytes.Clone(x.Shards[1])
		f(b)
		if s, err := Check(x.mac, b); !errors.Is(err, ErrAuth) {
			t.Errorf("%s: %v, %v", name, s, err)
		}
		if _, err := Restamp(x.mac, b, Place{1}); !errors.Is(err, ErrAuth) {
			t.Errorf("%s, stamped for another place: %v", name, err)
		}
		shards := x.some(0b110100)
		shards[1] = b
		if _, _, err := x.c.Reconstruct(x.id, x.mac, shards, []int{0}, x.places[:1]); !errors.Is(err, ErrAuth) {
			t.Errorf("%s, rebuilt from: %v", name, err)
		}
	}
	// Each bit of the trailer, each byte of the payload.
	b := bytes.Clone(x.Shards[1])
	for i := range len(b) * 8 {
		if i/8 < size && i%8 != 0 {
			continue
		}
		b[i/8] ^= 1 << (i % 8)
		if _, err := Check(x.mac, b); !errors.Is(err, ErrAuth) {
			t.Fatalf("bit %d is not covered: %v", i, err)
		}
		b[i/8] ^= 1 << (i % 8)
	}
	for n := range b {
		if _, err := Check(x.mac, b[:n]); !errors.Is(err, ErrAuth) {
			t.Fatalf("the first %d bytes are taken: %v", n, err)
		}
	}
}

func TestReconstruct(t *testing.T) {
	x := encode(t, Scheme{4, 6}, 50_000)
	for mask := range uint(64) {
		have, missing, places := x.some(mask), []int(nil), []Place(nil)
		for i, b := range have {
			if b == nil {
				missing = append([]int{i}, missing...) // any order
				places = append([]Place{x.places[i]}, places...)
			}
		}
		made, names, err := x.c.Reconstruct(x.id, x.mac, have, missing, places)
		if len(missing) > 2 {
			if !errors.Is(err, ErrFew) {
				t.Errorf("%06b: %v", mask, err)
			}
			continue
		}
		if err != nil {
			t.Fatalf("%06b: %v", mask, err)
		}
		for j, i := range missing {
			if !bytes.Equal(made[j], x.Shards[i]) || names[j] != x.Names[i] {
				t.Errorf("%06b: shard %d is another", mask, i)
			}
		}
	}
	// At a new place it is another shard, that decodes; and it is moved there without its fellows as well.
	have := x.some(0b111010)
	made, names, err := x.c.Reconstruct(x.id, x.mac, have, []int{0}, []Place{{77}})
	if err != nil || names[0] == x.Names[0] {
		t.Fatal(err)
	}
	if s, err := Check(x.mac, made[0]); err != nil || s.Place != (Place{77}) {
		t.Errorf("%v, %v", s, err)
	}
	have[0], have[1] = made[0], nil
	if got, err := x.decode(have); err != nil || !bytes.Equal(got, x.plain) {
		t.Error(err)
	}
	moved := bytes.Clone(x.Shards[0])
	if n, err := Restamp(x.mac, moved, Place{77}); err != nil || n != names[0] || !bytes.Equal(moved, made[0]) {
		t.Errorf("a shard that moved is not the one that was made there: %v", err)
	}
	other := encode(t, Scheme{4, 6}, 50_000)
	mixed := x.some(0b011110)
	mixed[3] = other.Shards[3]
	swapped := x.some(0b011110)
	swapped[3], swapped[4] = swapped[4], swapped[3]
	for _, c := range []struct {
		name    string
		id      ID
		mac     Key
		shards  [][]byte
		missing []int
		places  []Place
	}{
		{"another segment's shard", x.id, *x.mac, mixed, []int{0}, x.places[:1]},
		{"shards in each other's place", x.id, *x.mac, swapped, []int{0}, x.places[:1]},
		{"another ID", other.id, *x.mac, x.some(0b011110), []int{0}, x.places[:1]},
		{"another key of MACs", x.id, *x.key, x.some(0b011110), []int{0}, x.places[:1]},
		{"a shard that is there", x.id, *x.mac, x.some(0b011110), []int{1}, x.places[:1]},
		{"one shard twice", x.id, *x.mac, x.some(0b011110), []int{0, 0}, x.places[:2]},
		{"an index that is none", x.id, *x.mac, x.some(0b011110), []int{6}, x.places[:1]},
		{"a place that is not given", x.id, *x.mac, x.some(0b011110), []int{0}, nil},
		{"too few shards in the list", x.id, *x.mac, x.some(0b011110)[:5], []int{0}, x.places[:1]},
	} {
		if made, _, err := x.c.Reconstruct(c.id, &c.mac, c.shards, c.missing, c.places); err == nil || made != nil {
			t.Errorf("%s is rebuilt", c.name)
		}
	}
}

func TestRewrap(t *testing.T) {
	x := encode(t, Scheme{4, 6}, 50_000)
	next := &Key{9}
	shares := func(mask uint) [][]byte {
		out := x.some(mask)
		for i, b := range out {
			if b != nil {
				at := x.c.ShareOffset(len(x.plain))
				out[i] = b[at : at+ShareSize]
			}
		}
		return out
	}
	w, err := x.c.Rewrap(x.id, x.key, next, x.Wrap, shares(0b110110))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := x.c.Decode(nil, x.id, next, w, len(x.plain), x.Shards); err != nil || !bytes.Equal(got, x.plain) {
		t.Errorf("under the new key: %v", err)
	}
	if _, err := x.c.Decode(nil, x.id, x.key, w, len(x.plain), x.Shards); !errors.Is(err, ErrAuth) {
		t.Errorf("the old key opens the new wrap: %v", err)
	}
	if back, err := x.c.Rewrap(x.id, next, x.key, w, shares(0b001111)); err != nil || back != x.Wrap {
		t.Errorf("and back: %v", err)
	}
	wrong := shares(0b001111)
	wrong[2] = make([]byte, ShareSize)
	short := shares(0b001111)
	short[2] = short[2][:31]
	if _, err := x.c.Rewrap(NewID(), x.key, next, x.Wrap, shares(0b001111)); !errors.Is(err, ErrAuth) {
		t.Errorf("another ID: %v", err)
	}
	if _, err := newCoder(t, Scheme{4, 5}).Rewrap(x.id, x.key, next, x.Wrap, shares(0b001111)[:5]); !errors.Is(err, ErrAuth) {
		t.Errorf("another scheme: %v", err)
	}
	for _, c := range []struct {
		name   string
		old    Key
		shares [][]byte
		want   error
	}{
		{"k-1 shares", *x.key, shares(0b000111), ErrFew},
		{"another key", Key{8}, shares(0b001111), ErrAuth},
		{"a wrong share", *x.key, wrong, ErrAuth},
		{"a share that is too short", *x.key, short, ErrAuth},
	} {
		if _, err := x.c.Rewrap(x.id, &c.old, next, x.Wrap, c.shares); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

// All n locations have no byte of a marker, and neither the length; with encryption off the same search finds it.
func TestShardsShowNothing(t *testing.T) {
	marker := []byte("the marker that nobody may see!!")
	s := Scheme{4, 6}
	c := newCoder(t, s)
	key, mac, places := testKeys(s)
	plain := bytes.Repeat(marker, 3000)
	id := NewID()
	e, err := c.Encode(id, key, mac, places, plain)
	if err != nil {
		t.Fatal(err)
	}
	found := func(shards [][]byte) (n int) {
		for _, b := range shards {
			for i := range len(marker) - 8 {
				n += bytes.Count(b, marker[i:i+8])
			}
		}
		return n
	}
	if n := found(e.Shards); n > 0 {
		t.Errorf("the marker is there %d times", n)
	}
	size := c.payload(len(plain))
	open := make([][]byte, s.N)
	for i := range open {
		open[i] = make([]byte, size)
		if i < s.K {
			copy(open[i], plain[min(i*size, len(plain)):])
		}
	}
	if c.data.Encode(open); found(open) < 1000 {
		t.Error("control: the search does not find the marker where nothing is encrypted")
	}
	for _, b := range e.Shards {
		for _, k := range [][]byte{key[:], mac[:]} {
			if bytes.Contains(b, k[:8]) {
				t.Error("a shard has a key")
			}
		}
	}
	// The same segment again has nothing in common with itself, and one as long as its neighbours looks like them.
	f, err := c.Encode(NewID(), key, mac, places, plain)
	if err != nil {
		t.Fatal(err)
	}
	for i := range e.Shards {
		same := 0
		for j, b := range e.Shards[i][:size] {
			if f.Shards[i][j] == b {
				same++
			}
		}
		if same > size/100 {
			t.Errorf("shard %d has %d of %d bytes in common with that of the same segment again", i, same, size)
		}
	}
	// What is behind the ciphertext is as random as it: no zeros tell its end.
	short, err := c.Encode(NewID(), key, mac, places, make([]byte, 70_000))
	if err != nil {
		t.Fatal(err)
	}
	size = c.payload(70_000)
	for i, b := range short.Shards {
		if zeros := bytes.Count(b[:size], []byte{0}); zeros > size/128 {
			t.Errorf("shard %d of zeros has %d zeros in %d", i, zeros, size)
		}
	}
}

func TestReleasedMemoryHoldsNoSecret(t *testing.T) {
	s := Scheme{4, 6}
	c := newCoder(t, s)
	key, mac, places := testKeys(s)
	plain := bytes.Repeat([]byte("plain text "), 9000)
	e, err := c.Encode(NewID(), key, mac, places, plain)
	if err != nil {
		t.Fatal(err)
	}
	all := e.buf.b[:cap(e.buf.b)]
	shares := [][]byte{}
	for _, b := range e.Shards {
		shares = append(shares, bytes.Clone(b[c.ShareOffset(len(plain)):][:ShareSize]))
	}
	if bytes.Contains(all, []byte("plain text ")) {
		t.Error("the shards' memory holds plain text")
	}
	if !bytes.Contains(all, shares[3]) {
		t.Error("control: a share is not found where it is")
	}
	if _, err := c.Decode(nil, ID(trailer(e.Shards[0][c.payload(len(plain)):])[offID:offSize]), key, e.Wrap, len(plain), e.Shards); err != nil {
		t.Fatal(err)
	}
	e.Release()
	e.Release() // twice is once
	if a, b := c.encoded(c.ShardSize(len(plain))), c.encoded(c.ShardSize(len(plain))); &a.Shards[0][0] == &b.Shards[0][0] {
		t.Error("two segments share memory")
	}
	for i, b := range shares {
		if bytes.Contains(all, b) {
			t.Errorf("share %d is left", i)
		}
	}
	secret := bytesOf(5, 1000)
	e, err = c.Split(NewID(), mac, places, secret)
	if err != nil {
		t.Fatal(err)
	}
	all = e.buf.b[:cap(e.buf.b)]
	e.Release()
	if len(bytes.Trim(all[:6*(secretSize(1000)+trailerSize)], "\x00")) > 0 {
		t.Error("shares of a secret are left")
	}
	w := c.begin()
	for name, b := range map[string][]byte{"randomness": w.random, "secret": w.secret[:], "key": w.key[:]} {
		if len(bytes.Trim(b, "\x00")) > 0 {
			t.Errorf("%s is left", name)
		}
	}
	// A segment that is not authentic leaves nothing of itself where it would have been.
	x := encode(t, s, 5000)
	bad := x.some(63)
	bad[0][10] ^= 1
	dst := make([]byte, 0, 6000)
	if _, err := x.c.Decode(dst, x.id, x.key, x.Wrap, 5000, bad); !errors.Is(err, ErrAuth) {
		t.Fatal(err)
	}
	for i := 0; i+16 < 5000; i += 16 {
		if bytes.Contains(dst[:cap(dst)], x.plain[i:i+16]) {
			t.Fatalf("plain bytes at %d are left of a segment that is not authentic", i)
		}
	}
}

// Many goroutines use one coder, and none sees another's bytes.
func TestACoderIsForManyAtOnce(t *testing.T) {
	s := Scheme{4, 6}
	c := newCoder(t, s)
	key, mac, places := testKeys(s)
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			r := rand.New(seeded(byte(g)))
			dst := make([]byte, 0, 1<<17)
			for range 30 {
				plain := bytes.Repeat([]byte{byte(g + 1)}, r.IntN(1<<16))
				id := NewID()
				e, err := c.Encode(id, key, mac, places, plain)
				if err != nil {
					t.Error(err)
					return
				}
				shards := slices.Clone(e.Shards)
				for _, i := range r.Perm(6)[:2] {
					shards[i] = nil
				}
				got, err := c.Decode(dst, id, key, e.Wrap, len(plain), shards)
				if err != nil || !bytes.Equal(got, plain) {
					t.Errorf("goroutine %d reads other bytes: %v", g, err)
				}
				for i, b := range e.Shards {
					if n, _ := NameOf(b); n != e.Names[i] {
						t.Errorf("goroutine %d: shard %d changed before it was released", g, i)
					}
				}
				e.Release()
			}
		})
	}
	wg.Wait()
}

func TestMemoryOfMatricesIsBounded(t *testing.T) {
	for _, x := range []struct {
		s    Scheme
		keep bool
	}{{Scheme{4, 6}, true}, {Scheme{16, 20}, true}, {Scheme{10, 20}, false}, {Scheme{64, 128}, false}, {Scheme{1, 128}, true}, {Scheme{128, 128}, true}} {
		if n := subsets(x.s); (n <= 10_000) != x.keep || n < 1 {
			t.Errorf("%v: %d", x.s, n)
		}
	}
	if n := subsets(Scheme{16, 20}); n != 4845 {
		t.Error(n)
	}
}

// frozen is a segment that is the same in every process: the fuzzer has several.
func frozen(t testing.TB) *segment {
	s := Scheme{2, 3}
	x := &segment{c: newCoder(t, s), id: ID{1}, plain: bytesOf(7, 100)}
	x.key, x.mac, x.places = testKeys(s)
	x.c.rand = seeded(1)
	var err error
	if x.Encoded, err = x.c.Encode(x.id, x.key, x.mac, x.places, x.plain); err != nil {
		t.Fatal(err)
	}
	x.c.rand = nil
	return x
}

// FuzzDecode gives a reader shards that k locations and more have made up, or changed.
func FuzzDecode(f *testing.F) {
	x := frozen(f)
	f.Add(x.Shards[0], x.Shards[1], x.Shards[2], 100)
	f.Add(x.Shards[0][:10], []byte{}, x.Shards[2], 100)
	f.Add(x.Shards[1], x.Shards[0], []byte(magic), 1<<24)
	f.Add(bytes.Repeat([]byte{0xff}, 300), bytes.Repeat([]byte{0}, 300), []byte(nil), -1)
	f.Fuzz(func(t *testing.T, a, b, c []byte, length int) {
		shards := [][]byte{a, b, c}
		for i := range shards {
			if len(shards[i]) == 0 {
				shards[i] = nil
			}
		}
		got, err := x.c.Decode(nil, x.id, x.key, x.Wrap, length, shards)
		if err == nil && !bytes.Equal(got, x.plain) {
			t.Fatal("other bytes were taken for authentic")
		}
		for i, s := range shards {
			if st, err := Check(x.mac, s); err == nil && (!bytes.Equal(s, x.Shards[st.Index]) || st.ID != x.id) {
				t.Fatalf("shard %d was forged", i)
			}
		}
		if _, err := x.c.Join(nil, x.id, x.mac, shards); err == nil {
			t.Fatal("a secret was made up")
		}
		if i := slices.IndexFunc(shards, func(s []byte) bool { return s == nil }); i >= 0 {
			if made, _, err := x.c.Reconstruct(x.id, x.mac, shards, []int{i}, x.places[i:i+1]); err == nil && !bytes.Equal(made[0], x.Shards[i]) {
				t.Fatal("a shard was rebuilt from others' lies")
			}
		}
	})
}

// What a hostile shard makes a reader allocate is bounded by the length that its own record has, not by the shard.
func TestHostileShardsCostNoMemory(t *testing.T) {
	x := encode(t, Scheme{2, 3}, 1000)
	big := make([]byte, MaxShard)
	trailer(big[MaxShard-trailerSize:]).fill(kindSegment, x.c.scheme, 0, x.id, MaxShard-trailerSize, x.places[0])
	r := testing.Benchmark(func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := x.decode([][]byte{big, x.Shards[1], x.Shards[2]}); !errors.Is(err, ErrAuth) {
				b.Fatal(err)
			}
		}
	})
	if r.AllocedBytesPerOp() > 4096 {
		t.Errorf("a shard of %d bytes where one of %d is due costs %d bytes", len(big), len(x.Shards[0]), r.AllocedBytesPerOp())
	}
}
