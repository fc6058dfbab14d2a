package disperse

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash"
)

// A shard is its payload and, behind that, its trailer.
const (
	// ShareSize is how many bytes of a shard share the secret that wraps the segment's key.
	ShareSize   = 32
	trailerSize = 108

	magic = "HFS\x01"

	offKind  = 4 // of the trailer
	offK     = 5
	offN     = 6
	offIndex = 7
	offID    = 8
	offSize  = 24 // of the payload
	offPlace = 28
	offShare = 44
	offMAC   = 76
)

const (
	kindSegment = 0 // the payload is a symbol of the Reed–Solomon code over the ciphertext
	kindSecret  = 1 // the payload is a share of the secret itself, the share is salt
)

// A Stamp is what a shard says of itself.
type Stamp struct {
	Scheme Scheme
	Index  int
	ID     ID
	Place  Place
	Secret bool // made by Split
}

// A trailer is a shard's last bytes, of a form that holds.
type trailer []byte

// trailerOf is the trailer of a shard that has one, and the payload. Nothing of it is authentic.
func trailerOf(shard []byte) (payload []byte, t trailer, err error) {
	n := len(shard) - trailerSize
	if n < 1 || len(shard) > MaxShard {
		return nil, nil, fmt.Errorf("shard of %d bytes: %w", len(shard), ErrAuth)
	}
	t = trailer(shard[n:])
	s := Scheme{int(t[offK]), int(t[offN])}
	if string(t[:len(magic)]) != magic || t[offKind] > kindSecret || s.Check() != nil || int(t[offIndex]) >= s.N || binary.BigEndian.Uint32(t[offSize:]) != uint32(n) {
		return nil, nil, fmt.Errorf("shard of %d bytes without a trailer: %w", len(shard), ErrAuth)
	}
	return shard[:n], t, nil
}

func (t trailer) stamp() Stamp {
	return Stamp{Scheme{int(t[offK]), int(t[offN])}, int(t[offIndex]), ID(t[offID:offSize]), Place(t[offPlace:offShare]), t[offKind] == kindSecret}
}

func (t trailer) share() []byte { return t[offShare:offMAC:offMAC] }

func (t trailer) fill(kind byte, s Scheme, index int, id ID, size int, place Place) {
	copy(t, magic)
	t[offKind], t[offK], t[offN], t[offIndex] = kind, byte(s.K), byte(s.N), byte(index)
	copy(t[offID:], id[:])
	binary.BigEndian.PutUint32(t[offSize:], uint32(size))
	copy(t[offPlace:], place[:])
}

// A stamper makes MACs and names of shards, one after another.
type stamper struct {
	tree *Tree
	h    hash.Hash
	sum  [sha256.Size]byte
}

func newStamper(mac *Key, t *Tree) *stamper {
	return &stamper{tree: t, h: hmac.New(sha256.New, mac[:])}
}

// mac leaves the MAC of a shard in sum, and the payload in the tree. It covers the trailer before it and commits the payload
// by the hashes of its whole leaves, which the name needs as well, and the bytes that are left.
func (m *stamper) mac(payload []byte, t trailer) {
	m.tree.Reset()
	m.tree.Write(payload) // not beyond MaxShard
	m.h.Reset()
	m.h.Write(t[:offMAC])
	rest := len(payload) % LeafSize
	if rest == 0 {
		m.tree.close()
	}
	for i := range len(payload) / LeafSize {
		m.h.Write(m.tree.leaves[i][:])
	}
	m.h.Write(payload[len(payload)-rest:])
	m.h.Sum(m.sum[:0])
}

// stamp puts the MAC into a shard whose other bytes are there, and names it.
func (m *stamper) stamp(shard []byte) Name {
	n := len(shard) - trailerSize
	t := trailer(shard[n:])
	m.mac(shard[:n], t)
	copy(t[offMAC:], m.sum[:])
	m.tree.Write(t)
	return m.tree.Name()
}

// check is the payload and the trailer of a shard that the MAC's key made.
func (m *stamper) check(shard []byte) ([]byte, trailer, error) {
	payload, t, err := trailerOf(shard)
	if err != nil {
		return nil, nil, err
	}
	if m.mac(payload, t); !hmac.Equal(m.sum[:], t[offMAC:]) {
		return nil, nil, fmt.Errorf("MAC of a shard of %d bytes: %w", len(shard), ErrAuth)
	}
	return payload, t, nil
}

// Check reads and authenticates a shard by its MAC, for who does not know its name. Whether it is the shard that was asked
// for, the caller sees in the stamp.
func Check(mac *Key, shard []byte) (Stamp, error) {
	_, t, err := newStamper(mac, new(Tree)).check(shard)
	if err != nil {
		return Stamp{}, err
	}
	return t.stamp(), nil
}

// Restamp makes a shard that of another place, in its own bytes, and returns its name there.
func Restamp(mac *Key, shard []byte, place Place) (Name, error) {
	m := newStamper(mac, new(Tree))
	_, t, err := m.check(shard)
	if err != nil {
		return Name{}, err
	}
	copy(t[offPlace:], place[:])
	return m.stamp(shard), nil
}
