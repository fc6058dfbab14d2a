package disperse

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"testing"
)

// GF(2⁸) modulo x⁸+x⁴+x³+x²+1, as the format has it and apart from the library.
func gfMul(a, b byte) (p byte) {
	for ; b > 0; b >>= 1 {
		if b&1 != 0 {
			p ^= a
		}
		a = a<<1 ^ 0x1d*(a>>7)
	}
	return p
}

// gfInv is a²⁵⁴.
func gfInv(a byte) byte {
	r := byte(1)
	for range 7 {
		a = gfMul(a, a)
		r = gfMul(r, a)
	}
	return r
}

// interpolate is the value at x of the polynomial through the points.
func interpolate(x byte, at, values []byte) (y byte) {
	for i := range at {
		l := values[i]
		for j := range at {
			if j != i {
				l = gfMul(l, gfMul(x^at[j], gfInv(at[i]^at[j])))
			}
		}
		y ^= l
	}
	return y
}

// The shares are Shamir's: values of one polynomial of degree below k, at k, k+1, …, whose value at 0 is the secret. So are
// the payloads of a segment, at 0, 1, …, but there all values are the ciphertext's.
func TestSharesArePointsOfAPolynomial(t *testing.T) {
	for _, s := range []Scheme{{1, 3}, {2, 3}, {4, 6}, {16, 20}, {100, 128}} {
		c := newCoder(t, s)
		rows := make([][]byte, s.K+s.N)
		for i := range rows {
			rows[i] = make([]byte, ShareSize)
			seeded(byte(i)).Read(rows[i])
		}
		if err := c.shamir.Encode(rows); err != nil {
			t.Fatal(err)
		}
		at, values := make([]byte, s.K), make([]byte, s.K)
		r := rand.New(seeded(9))
		for range 4 {
			for b := range min(ShareSize, 1+1000/(s.K*s.K)) {
				for i, j := range r.Perm(s.N)[:s.K] {
					at[i], values[i] = byte(s.K+j), rows[s.K+j][b]
				}
				if got := interpolate(0, at, values); got != rows[0][b] {
					t.Fatalf("%v: byte %d of the secret is %x, from shares %v %x", s, b, rows[0][b], at, got)
				}
			}
		}
	}
}

// Exhaustively, in the field itself: whatever the secret, k−1 shares take each value for exactly one choice of the random
// coefficients. So they say nothing, to anybody. k shares are the control: they take one value a secret only.
func TestFewerThanKSharesDecideNothing(t *testing.T) {
	for _, s := range []Scheme{{2, 3}, {2, 128}, {3, 4}, {3, 5}} {
		c := newCoder(t, s)
		all := 1 << (8 * (s.K - 1)) // choices of coefficients, each a column
		rows := make([][]byte, s.K+s.N)
		for i := range rows {
			rows[i] = make([]byte, all)
		}
		for x := range all {
			rows[1][x] = byte(x)
			if s.K == 3 {
				rows[2][x] = byte(x >> 8)
			}
		}
		secrets := 256
		if s.K == 3 {
			secrets = 16
		}
		seen := make([]int, all)
		for secret := range secrets {
			for x := range rows[0] {
				rows[0][x] = byte(secret * 256 / secrets)
			}
			if err := c.shamir.Encode(rows); err != nil {
				t.Fatal(err)
			}
			stamp := secret + 1
			for i := range s.N {
				for j := range i + 1 {
					if s.K == 2 && j > 0 || s.K == 3 && j == i {
						continue
					}
					clear(seen)
					for x := range all {
						v := int(rows[s.K+i][x])
						if s.K == 3 {
							v |= int(rows[s.K+j][x]) << 8
						}
						if seen[v] == stamp {
							t.Fatalf("%v: secret %d: shares %d and %d are %x for two choices", s, secret, i, j, v)
						}
						seen[v] = stamp
					}
				}
			}
			at := []byte{byte(s.K), byte(s.K + 1), byte(s.K + 2)}[:s.K]
			for x := 0; x < all; x += 251 {
				values := []byte{rows[s.K][x], rows[s.K+1][x], rows[s.K+2][x]}[:s.K]
				if interpolate(0, at, values) != rows[0][x] {
					t.Fatalf("control, %v: k shares give another secret", s)
				}
			}
		}
	}
}

// chi is the chi-square statistic of bytes against evenness: about 255 ± 23 for random ones.
func chi(counts *[256]int) (x float64) {
	n := 0
	for _, c := range counts {
		n += c
	}
	for _, c := range counts {
		d := float64(c) - float64(n)/256
		x += d * d / (float64(n) / 256)
	}
	return x
}

// The real thing: what k−1 locations hold of the key's secret and of a shared secret is even, in each share and in
// each sum of them that would open it with one share more, whatever the secret. The same counts over k shares are not.
func TestSharesAreEven(t *testing.T) {
	const limit = 255 + 6*23
	s := Scheme{4, 6}
	c := newCoder(t, s)
	key, mac, places := testKeys(s)
	c.rand = &fixed{seeded(11), 32 + 32, ShareSize}
	zero := make([]byte, 6000)
	for _, x := range []struct {
		what   string
		shares func() [][]byte
		body   int // bytes of each share that are of a constant secret
	}{
		{"a segment's", func() [][]byte {
			e, err := c.Encode(NewID(), key, mac, places, nil)
			if err != nil {
				t.Fatal(err)
			}
			out := make([][]byte, s.N)
			for i, b := range e.Shards {
				out[i] = b[c.ShareOffset(0):][:ShareSize]
			}
			return out
		}, ShareSize},
		{"a secret's", func() [][]byte {
			e, err := newCoder(t, s).Split(NewID(), mac, places, zero)
			if err != nil {
				t.Fatal(err)
			}
			return e.Shards
		}, 6000},
	} {
		var single [6][256]int
		// What k−1 shares give with a fourth value of zero: the fourth share, or a coefficient that were not random. The last
		// is the control: all k.
		var sums [5][256]int
		var weights [5][4]byte
		for j, last := range []byte{7, 1, 2, 3, 7} {
			for i := range 4 {
				unit := make([]byte, 4)
				unit[i] = 1
				weights[j][i] = interpolate(0, []byte{4, 5, 6, last}, unit)
			}
			if j < 4 {
				weights[j][3] = 0
			}
		}
		rounds := 300_000 / x.body
		for range rounds {
			sh := x.shares()
			for b := 4; b < x.body; b++ {
				for i := range sh {
					single[i][sh[i][b]]++
				}
				for j, w := range weights {
					sums[j][gfMul(w[0], sh[0][b])^gfMul(w[1], sh[1][b])^gfMul(w[2], sh[2][b])^gfMul(w[3], sh[3][b])]++
				}
			}
		}
		for i := range single {
			if v := chi(&single[i]); v > limit {
				t.Errorf("%s share %d is not even: %.0f", x.what, i, v)
			}
		}
		for j := range 4 {
			if v := chi(&sums[j]); v > limit {
				t.Errorf("%s k-1 shares together are not even, sum %d: %.0f", x.what, j, v)
			}
		}
		if v := chi(&sums[4]); v < 100*limit {
			t.Errorf("control: %s k shares together look even: %.0f", x.what, v)
		}
	}
}

// fixed is randomness in which the secret that wraps a segment's key is always zero.
type fixed struct {
	r       *rand.ChaCha8
	from, n int // where in what Encode asks for
}

func (f *fixed) Read(b []byte) (int, error) {
	f.r.Read(b)
	if len(b) > f.from+f.n {
		clear(b[f.from : f.from+f.n])
	}
	return len(b), nil
}

// With k−1 true shares and the store key each secret is as good as any other: there is a last share that leads to it. Only
// one of them opens the wrap.
func TestKMinusOneSharesOpenNothing(t *testing.T) {
	x := encode(t, Scheme{4, 6}, 5000)
	if _, err := x.decode(x.some(0b000111)); !errors.Is(err, ErrFew) {
		t.Error(err)
	}
	r := rand.New(seeded(21))
	off := x.c.ShareOffset(5000)
	var want [ShareSize]byte // a secret that somebody wishes for
	seeded(22).Read(want[:])
	forged := x.some(0b001111)
	for b := range ShareSize {
		at, values := []byte{0, 4, 5, 6}, []byte{want[b], x.Shards[0][off+b], x.Shards[1][off+b], x.Shards[2][off+b]}
		forged[3][off+b] = interpolate(7, at, values)
	}
	w := x.c.begin()
	for i := range 4 {
		w.rows[4+i] = forged[i][off : off+ShareSize]
	}
	w.rows[0], w.want[0] = w.secret[:0], true
	if err := x.c.shamir.ReconstructSome(w.rows, w.want); err != nil || w.secret != want {
		t.Errorf("there is no share that leads to a secret of choice: %v", err)
	}
	if _, err := x.decode(forged); !errors.Is(err, ErrAuth) {
		t.Errorf("a secret of choice opens the wrap: %v", err)
	}
	for range 1000 {
		for b := range ShareSize {
			forged[3][off+b] = byte(r.Uint32())
		}
		if _, err := x.decode(forged); !errors.Is(err, ErrAuth) {
			t.Fatalf("a guessed share opens the wrap: %v", err)
		}
	}
	if got, err := x.decode(x.some(0b001111)); err != nil || !bytes.Equal(got, x.plain) {
		t.Errorf("control: %v", err)
	}
}

func TestSecrets(t *testing.T) {
	for _, s := range []Scheme{{2, 2}, {2, 3}, {4, 6}, {16, 20}, {128, 128}} {
		c := newCoder(t, s)
		_, mac, places := testKeys(s)
		for _, size := range []int{0, 1, 220, 221, 5000, MaxSecret} {
			if s.K == 128 && size > 5000 {
				continue
			}
			secret, id := bytesOf(3, size), NewID()
			e, err := c.Split(id, mac, places, secret)
			if err != nil {
				t.Fatal(err)
			}
			r := rand.New(seeded(2))
			for range 4 {
				shards := make([][]byte, s.N)
				for _, i := range r.Perm(s.N)[:s.K] {
					shards[i] = e.Shards[i]
				}
				got, err := c.Join([]byte("x"), id, mac, shards)
				if err != nil || !bytes.Equal(got[1:], secret) {
					t.Fatalf("%v, %d bytes: %v", s, size, err)
				}
				for i := range shards {
					if shards[i] != nil {
						shards[i] = nil
						break
					}
				}
				if _, err := c.Join(nil, id, mac, shards); !errors.Is(err, ErrFew) {
					t.Errorf("%v, from k-1: %v", s, err)
				}
			}
			e.Release()
		}
	}
}

func TestNothingElseJoins(t *testing.T) {
	s := Scheme{3, 5}
	c := newCoder(t, s)
	key, mac, places := testKeys(s)
	id, secret := NewID(), []byte("to be or not")
	e, err := c.Split(id, mac, places, secret)
	if err != nil {
		t.Fatal(err)
	}
	other, err := c.Split(NewID(), mac, places, secret)
	if err != nil {
		t.Fatal(err)
	}
	// Whoever knows the secret knows by what to change his share so that another comes out, its digest too. The MAC holds
	// him off, and nothing else.
	known := bytes.Clone(e.Shards[0])
	known[4] ^= 0x20
	stamped := bytes.Clone(known)
	newStamper(mac, new(Tree)).stamp(stamped)
	clone := func(f func(sh [][]byte)) [][]byte {
		out := make([][]byte, 5)
		for i, b := range e.Shards {
			out[i] = bytes.Clone(b)
		}
		f(out)
		return out
	}
	segment, err := c.Encode(id, key, mac, places, nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, x := range map[string]struct {
		id     ID
		mac    Key
		shards [][]byte
	}{
		"a share that was changed":                 {id, *mac, clone(func(sh [][]byte) { sh[0] = known })},
		"a share that the store itself made wrong": {id, *mac, clone(func(sh [][]byte) { sh[0] = stamped })},
		"another secret's share":                   {id, *mac, clone(func(sh [][]byte) { sh[1] = other.Shards[1] })},
		"a share twice":                            {id, *mac, clone(func(sh [][]byte) { sh[1] = sh[0] })},
		"another ID":                               {NewID(), *mac, e.Shards},
		"another key":                              {id, *key, e.Shards},
		"a segment":                                {id, *mac, segment.Shards},
	} {
		if got, err := c.Join(nil, x.id, &x.mac, x.shards); !errors.Is(err, ErrAuth) || got != nil {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	if _, err := c.Decode(nil, id, key, e.Wrap, 8, e.Shards); !errors.Is(err, ErrAuth) {
		t.Errorf("a secret is taken for a segment: %v", err)
	}
	if got, err := c.Join(nil, id, mac, e.Shards); err != nil || !bytes.Equal(got, secret) {
		t.Errorf("control: %v", err)
	}
	// A length that its digest confirms and that cannot be.
	big := newCoder(t, s)
	size := secretSize(0)
	rows := make([][]byte, 8)
	made := make([][]byte, 5)
	for i := range rows {
		if i < 3 {
			rows[i] = make([]byte, size)
			continue
		}
		made[i-3] = make([]byte, size+trailerSize)
		rows[i] = made[i-3][:size]
		trailer(made[i-3][size:]).fill(kindSecret, s, i-3, id, size, places[i-3])
	}
	binary.BigEndian.PutUint32(rows[0], 1<<31)
	digest(rows[0])
	if err := big.shamir.Encode(rows); err != nil {
		t.Fatal(err)
	}
	for _, b := range made {
		newStamper(mac, new(Tree)).stamp(b)
	}
	if _, err := big.Join(nil, id, mac, made); !errors.Is(err, ErrAuth) {
		t.Errorf("a length beyond what is there: %v", err)
	}
}

// digest ends a row as Split does.
func digest(row []byte) {
	sum := sha256.Sum256(row[:len(row)-sha256.Size])
	copy(row[len(row)-sha256.Size:], sum[:])
}

// Names must not let anybody try secrets: who has k−1 shards and all names can compute the payload that a guess asks for,
// and not its name, for each shard has salt.
func TestNamesOfSharesTellNothing(t *testing.T) {
	s := Scheme{2, 3}
	c := newCoder(t, s)
	_, mac, places := testKeys(s)
	id := NewID()
	e, err := c.Split(id, mac, places, []byte("1234"))
	if err != nil {
		t.Fatal(err)
	}
	size := secretSize(4)
	first := make([]byte, size)
	binary.BigEndian.PutUint32(first, 4)
	copy(first[4:], "1234")
	digest(first)
	guess := bytes.Clone(e.Shards[0])
	for b := range size {
		guess[b] = interpolate(3, []byte{0, 2}, []byte{first[b], e.Shards[0][b]})
	}
	if !bytes.Equal(guess[:size], e.Shards[1][:size]) {
		t.Fatal("control: the right guess and a share do not give the other")
	}
	trailer(guess[size:]).fill(kindSecret, s, 1, id, size, places[1])
	newStamper(mac, new(Tree)).stamp(guess) // not even the MAC's key helps
	if n, _ := NameOf(guess); n == e.Names[1] {
		t.Error("a guess of the secret is confirmed by the name of a shard that was not seen")
	}
}

func TestASecretIsRepaired(t *testing.T) {
	s := Scheme{3, 5}
	c := newCoder(t, s)
	_, mac, places := testKeys(s)
	id, secret := NewID(), bytesOf(4, 3000)
	e, err := c.Split(id, mac, places, secret)
	if err != nil {
		t.Fatal(err)
	}
	have := [][]byte{nil, e.Shards[1], nil, e.Shards[3], e.Shards[4]}
	made, names, err := c.Reconstruct(id, mac, have, []int{0, 2}, []Place{{9}, {8}})
	if err != nil {
		t.Fatal(err)
	}
	size := secretSize(3000)
	for j, i := range []int{0, 2} {
		if n, _ := NameOf(made[j]); n != names[j] || !bytes.Equal(made[j][:size], e.Shards[i][:size]) || bytes.Equal(trailer(made[j][size:]).share(), make([]byte, 32)) {
			t.Errorf("share %d is another, or has no salt", i)
		}
	}
	got, err := c.Join(nil, id, mac, [][]byte{made[0], nil, made[1], nil, e.Shards[4]})
	if err != nil || !bytes.Equal(got, secret) {
		t.Error(err)
	}
}
