package disperse

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"io"
	"math/bits"
	"slices"
	"sync"

	"github.com/klauspost/reedsolomon"
)

// A Coder makes shards of a scheme and reads them. It is for any number of goroutines at once.
type Coder struct {
	scheme Scheme
	data   reedsolomon.Encoder // k data, n−k parity: the payloads of a segment
	// k data, n parity: Shamir's scheme over GF(2⁸). The code's symbols are values of a polynomial of degree below k at 0, 1,
	// 2, …: that at 0 is the secret, k−1 are random, and the shares are the n parity symbols.
	shamir  reedsolomon.Encoder
	rand    io.Reader     // nil is the system's
	work    sync.Pool     // *work
	buffers [32]sync.Pool // *buffer, by the length of their size
}

// NewCoder returns a coder of the scheme.
func NewCoder(s Scheme) (*Coder, error) {
	if err := s.Check(); err != nil {
		return nil, err
	}
	opts := []reedsolomon.Option{reedsolomon.WithMaxGoroutines(1), reedsolomon.WithInversionCache(subsets(s) <= 10_000)}
	c := &Coder{scheme: s}
	var err error
	if c.data, err = reedsolomon.New(s.K, s.N-s.K, opts...); err != nil {
		return nil, fmt.Errorf("code of scheme %v: %w", s, err)
	}
	if c.shamir, err = reedsolomon.New(s.K, s.N, opts...); err != nil {
		return nil, fmt.Errorf("shares of scheme %v: %w", s, err)
	}
	return c, nil
}

// subsets is how many sets of k shards there are, each a matrix in the code's cache; or some number beyond 10,000.
func subsets(s Scheme) int {
	c := 1
	for i := 1; i <= s.N-s.K && c <= 10_000; i++ {
		c = c * (s.K + i) / i
	}
	return c
}

// Scheme is what NewCoder was told.
func (c *Coder) Scheme() Scheme { return c.scheme }

// payload is how many bytes of a shard are of the code: a multiple of 64, which the code's kernels like.
func (c *Coder) payload(length int) int {
	return ((padded(length)+Overhead+c.scheme.K-1)/c.scheme.K + 63) &^ 63
}

// ShardSize is the size of each shard of a segment of so many bytes.
func (c *Coder) ShardSize(length int) int { return c.payload(length) + trailerSize }

// ShareOffset is where the ShareSize bytes of a shard begin that Rewrap needs.
func (c *Coder) ShareOffset(length int) int { return c.payload(length) + offShare }

// work is the memory of one call. It holds secrets until wipe.
type work struct {
	random []byte   // keys and the polynomials' rows
	rows   [][]byte // of the code of shares: k+n
	cut    [][]byte // of the code of payloads: n
	want   []bool
	info   []byte
	tree   Tree
	secret [32]byte
	key    [32]byte
	nonce  [12]byte // always zero: each key seals one message, the same one if it comes again
}

func (c *Coder) begin() *work {
	w, _ := c.work.Get().(*work)
	if w == nil {
		k, n := c.scheme.K, c.scheme.N
		w = &work{random: make([]byte, 64+k*ShareSize), rows: make([][]byte, k+n), cut: make([][]byte, n), want: make([]bool, k+n), info: make([]byte, 0, 64)}
	}
	return w
}

func (c *Coder) end(w *work) {
	clear(w.random)
	clear(w.rows)
	clear(w.cut)
	clear(w.want)
	clear(w.secret[:])
	clear(w.key[:])
	c.work.Put(w)
}

func (c *Coder) read(b []byte) error {
	if c.rand == nil {
		rand.Read(b) // never fails
		return nil
	}
	_, err := io.ReadFull(c.rand, b)
	return err
}

const labelWrap = "holdfast segment wrap v1"

// wrapper seals segment keys under the shared secret and a store key together. Either alone is as good as nothing: to who
// lacks the store key the extraction is a PRF under it, to who lacks the secret it extracts from 256 uniform bits. The wrap
// binds the segment to its ID and scheme, and the segment's own sealing its length: neither needs data beside.
func (c *Coder) wrapper(w *work, id ID, key *Key) (cipher.AEAD, error) {
	w.info = append(append(append(w.info[:0], labelWrap...), id[:]...), byte(c.scheme.K), byte(c.scheme.N))
	kek, err := hkdf.Key(sha256.New, w.secret[:], key[:], string(w.info), 32)
	if err != nil {
		return nil, fmt.Errorf("derive key: %w", err)
	}
	defer clear(kek)
	return aead(kek)
}

func aead(key []byte) (cipher.AEAD, error) {
	b, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(b)
}

// Encoded is a segment's shards, which may be sent and read until Release.
type Encoded struct {
	Shards [][]byte
	Names  []Name
	Wrap   Wrap // of a segment's key; zero after Split

	c   *Coder
	buf *buffer
}

type buffer struct{ b []byte }

// Release gives the shards' memory back. They hold the shares of a secret side by side, which nobody else shall see.
func (e *Encoded) Release() {
	if e.buf == nil {
		return
	}
	for _, s := range e.Shards {
		if _, t, err := trailerOf(s); err != nil || t[offKind] == kindSecret {
			clear(s)
		} else {
			clear(t.share())
		}
	}
	e.c.buffers[bits.Len(uint(cap(e.buf.b)))].Put(e.buf)
	e.Shards, e.buf = nil, nil
}

// encoded is n empty shards.
func (c *Coder) encoded(size int) *Encoded {
	n := c.scheme.N
	buf, _ := c.buffers[bits.Len(uint(n*size))].Get().(*buffer)
	if buf == nil || cap(buf.b) < n*size {
		buf = &buffer{make([]byte, n*size)}
	}
	e := &Encoded{Shards: make([][]byte, n), Names: make([]Name, n), c: c, buf: buf}
	for i := range e.Shards {
		e.Shards[i] = buf.b[: n*size : n*size][i*size : (i+1)*size : (i+1)*size]
	}
	return e
}

func (c *Coder) placed(id ID, places []Place) error {
	if len(places) != c.scheme.N {
		return fmt.Errorf("segment %v: %d places for %d shards", id, len(places), c.scheme.N)
	}
	for i, p := range places {
		if slices.Contains(places[:i], p) {
			return fmt.Errorf("segment %v: two shards for place %v", id, p)
		}
	}
	return nil
}

// Encode makes the shards of a segment, each for another place, under the store key of an epoch and the store's key of
// MACs. The ID must be new.
func (c *Coder) Encode(id ID, key, mac *Key, places []Place, plain []byte) (*Encoded, error) {
	if len(plain) > MaxSegment {
		return nil, fmt.Errorf("segment %v: %d bytes, at most %d", id, len(plain), MaxSegment)
	}
	if err := c.placed(id, places); err != nil {
		return nil, err
	}
	w := c.begin()
	defer c.end(w)
	if err := c.read(w.random); err != nil {
		return nil, fmt.Errorf("segment %v: randomness: %w", id, err)
	}
	e := c.encoded(c.ShardSize(len(plain)))
	if err := c.encode(e, w, id, key, places, plain); err != nil {
		e.Release()
		return nil, fmt.Errorf("segment %v: %w", id, err)
	}
	m := newStamper(mac, &w.tree)
	for i, s := range e.Shards {
		e.Names[i] = m.stamp(s)
	}
	return e, nil
}

func (c *Coder) encode(e *Encoded, w *work, id ID, key *Key, places []Place, plain []byte) error {
	k, size := c.scheme.K, c.payload(len(plain))
	segment, padding, rows := w.random[:32], w.random[32:64], w.random[64:]
	// The ciphertext is sealed to where the first payload begins, filled up to k payloads, and taken apart from behind.
	all := e.buf.b[:k*size]
	a, err := aead(segment)
	if err != nil {
		return err
	}
	sealed := a.Seal(all[:0], w.nonce[:], plain, nil)
	// What is behind the ciphertext shall look like it, so that its end cannot be seen.
	if err := stream(padding, all[len(sealed):]); err != nil {
		return err
	}
	for i := k - 1; i > 0; i-- {
		copy(e.Shards[i], all[i*size:(i+1)*size])
	}
	for i, s := range e.Shards {
		w.cut[i] = s[:size]
		trailer(s[size:]).fill(kindSegment, c.scheme, i, id, size, places[i])
	}
	if err := c.data.Encode(w.cut); err != nil {
		return fmt.Errorf("code: %w", err)
	}
	for i := range k {
		w.rows[i] = rows[i*ShareSize : (i+1)*ShareSize]
	}
	for i, s := range e.Shards {
		w.rows[k+i] = trailer(s[size:]).share()
	}
	if err := c.shamir.Encode(w.rows); err != nil {
		return fmt.Errorf("share: %w", err)
	}
	copy(w.secret[:], w.rows[0])
	a, err = c.wrapper(w, id, key)
	if err != nil {
		return err
	}
	copy(e.Wrap[:], a.Seal(w.info[:0], w.nonce[:], segment, nil))
	return nil
}

// stream fills b with AES-CTR's bytes.
func stream(key, b []byte) error {
	a, err := aes.NewCipher(key)
	if err != nil {
		return err
	}
	clear(b)
	cipher.NewCTR(a, make([]byte, aes.BlockSize)).XORKeyStream(b, b)
	return nil
}

// Decode appends a segment of length bytes to dst. shards[i] is shard i, or nil; any k are enough. What it returns is what
// was encoded: the segment is authentic as a whole. Shards are not checked one by one, that is by their names: after
// ErrAuth leave out those that have another.
func (c *Coder) Decode(dst []byte, id ID, key *Key, wrap Wrap, length int, shards [][]byte) ([]byte, error) {
	k, n := c.scheme.K, c.scheme.N
	if length < 0 || length > MaxSegment || len(shards) != n {
		return nil, fmt.Errorf("segment %v: %d bytes from %d shards, at most %d from %d", id, length, len(shards), MaxSegment, n)
	}
	size, have := c.payload(length), 0
	w := c.begin()
	defer c.end(w)
	for i, s := range shards {
		if s == nil || have == k {
			continue
		}
		payload, t, err := trailerOf(s)
		if err != nil || len(payload) != size || t.stamp() != (Stamp{c.scheme, i, id, Place(t[offPlace:offShare]), false}) {
			return nil, fmt.Errorf("segment %v: shard %d is not of it: %w", id, i, ErrAuth)
		}
		w.cut[i], w.rows[k+i] = payload, t.share()
		have++
	}
	if have < k {
		return nil, fmt.Errorf("segment %v: %d of %d: %w", id, have, k, ErrFew)
	}
	a, err := c.open(w, id, key, wrap)
	if err != nil {
		return nil, err
	}
	end := length + Overhead
	count := (end + size - 1) / size // payloads that the ciphertext reaches into
	whole := true
	for i := range count {
		whole = whole && w.cut[i] != nil
	}
	if whole {
		dst = slices.Grow(dst, end)
		at := dst[len(dst) : len(dst)+end]
		for i := range count {
			copy(at[i*size:], w.cut[i])
		}
	} else {
		dst = slices.Grow(dst, count*size)
		at := dst[len(dst) : len(dst)+count*size]
		clear(w.want)
		for i := range count {
			if here := at[i*size : (i+1)*size : (i+1)*size]; w.cut[i] != nil {
				copy(here, w.cut[i])
			} else {
				w.cut[i], w.want[i] = here[:0], true
			}
		}
		if err := c.data.ReconstructSome(w.cut, w.want[:n]); err != nil {
			return nil, fmt.Errorf("segment %v: code: %w", id, err)
		}
	}
	at := dst[len(dst) : len(dst)+end]
	if _, err := a.Open(at[:0], w.nonce[:], at, nil); err != nil {
		return nil, fmt.Errorf("segment %v: %w", id, ErrAuth)
	}
	return dst[:len(dst)+length], nil
}

// open is the cipher of a segment, from the k shares in rows.
func (c *Coder) open(w *work, id ID, key *Key, wrap Wrap) (cipher.AEAD, error) {
	segment, err := c.unwrap(w, id, key, wrap)
	if err != nil {
		return nil, err
	}
	return aead(segment)
}

func (c *Coder) unwrap(w *work, id ID, key *Key, wrap Wrap) ([]byte, error) {
	w.rows[0], w.want[0] = w.secret[:0], true
	if err := c.shamir.ReconstructSome(w.rows, w.want); err != nil {
		return nil, fmt.Errorf("segment %v: share: %w", id, err)
	}
	a, err := c.wrapper(w, id, key)
	if err != nil {
		return nil, err
	}
	copy(w.info[:cap(w.info)], wrap[:])
	segment, err := a.Open(w.key[:0], w.nonce[:], w.info[:len(wrap)], nil)
	if err != nil {
		return nil, fmt.Errorf("segment %v: wrap: %w", id, ErrAuth)
	}
	return segment, nil
}

// Rewrap seals a segment's key anew, for another store key. shares[i] is that of shard i, or nil.
func (c *Coder) Rewrap(id ID, old, key *Key, wrap Wrap, shares [][]byte) (Wrap, error) {
	k, have := c.scheme.K, 0
	if len(shares) != c.scheme.N {
		return Wrap{}, fmt.Errorf("segment %v: %d shares of %d", id, len(shares), c.scheme.N)
	}
	w := c.begin()
	defer c.end(w)
	for i, s := range shares {
		if s == nil || have == k {
			continue
		}
		if len(s) != ShareSize {
			return Wrap{}, fmt.Errorf("segment %v: share of %d bytes: %w", id, len(s), ErrAuth)
		}
		w.rows[k+i] = s
		have++
	}
	if have < k {
		return Wrap{}, fmt.Errorf("segment %v: %d of %d shares: %w", id, have, k, ErrFew)
	}
	segment, err := c.unwrap(w, id, old, wrap)
	if err != nil {
		return Wrap{}, err
	}
	a, err := c.wrapper(w, id, key)
	if err != nil {
		return Wrap{}, err
	}
	return Wrap(a.Seal(w.info[:0], w.nonce[:], segment, nil)), nil
}

// Reconstruct makes the missing shards of a segment or of a secret, for the places given, from any k that the store made:
// the first k of shards are checked by their MACs, so that no location's rot or lie is stamped anew. shards[i] is shard i,
// or nil. A segment's shard is again what it was, if its place is.
func (c *Coder) Reconstruct(id ID, mac *Key, shards [][]byte, missing []int, places []Place) ([][]byte, []Name, error) {
	k, n := c.scheme.K, c.scheme.N
	if len(shards) != n || len(missing) != len(places) {
		return nil, nil, fmt.Errorf("segment %v: %d shards of %d, %d places for %d", id, len(shards), n, len(places), len(missing))
	}
	for i, x := range missing {
		if x < 0 || x >= n || shards[x] != nil || slices.Contains(missing[:i], x) {
			return nil, nil, fmt.Errorf("segment %v: shard %d is not one that is missing", id, x)
		}
	}
	w := c.begin()
	defer c.end(w)
	var first trailer
	m, size, have := newStamper(mac, &w.tree), 0, 0
	for i, s := range shards {
		if s == nil || have == k {
			continue
		}
		payload, t, err := m.check(s)
		if err != nil {
			return nil, nil, fmt.Errorf("segment %v: shard %d: %w", id, i, err)
		}
		if first == nil {
			first, size = t, len(payload)
		}
		if t.stamp() != (Stamp{c.scheme, i, id, Place(t[offPlace:offShare]), first[offKind] == kindSecret}) || len(payload) != size {
			return nil, nil, fmt.Errorf("segment %v: shard %d is not of it: %w", id, i, ErrAuth)
		}
		w.cut[i], w.rows[k+i] = payload, t.share()
		have++
	}
	if have < k {
		return nil, nil, fmt.Errorf("segment %v: %d of %d: %w", id, have, k, ErrFew)
	}
	made, names := make([][]byte, len(missing)), make([]Name, len(missing))
	for j, i := range missing {
		s := make([]byte, size+trailerSize)
		t := trailer(s[size:])
		t.fill(first[offKind], c.scheme, i, id, size, places[j])
		made[j], w.cut[i], w.rows[k+i], w.want[k+i] = s, s[:0:size], t.share()[:0], true
	}
	if err := c.fill(w, first[offKind]); err != nil {
		return nil, nil, fmt.Errorf("segment %v: %w", id, err)
	}
	for j, s := range made {
		if first[offKind] == kindSecret {
			if err := c.read(trailer(s[size:]).share()); err != nil {
				return nil, nil, fmt.Errorf("segment %v: randomness: %w", id, err)
			}
		}
		names[j] = m.stamp(s)
	}
	return made, names, nil
}

// fill computes the payloads and shares that are wanted.
func (c *Coder) fill(w *work, kind byte) error {
	k := c.scheme.K
	if kind == kindSecret {
		copy(w.rows[k:], w.cut) // the payloads are the shares
	} else if err := c.data.ReconstructSome(w.cut, w.want[k:]); err != nil {
		return fmt.Errorf("code: %w", err)
	}
	if err := c.shamir.ReconstructSome(w.rows, w.want); err != nil {
		return fmt.Errorf("share: %w", err)
	}
	return nil
}
