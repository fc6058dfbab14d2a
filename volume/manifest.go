package volume

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"regexp"
	"time"
)

// ErrSnapshot is what is not the snapshot that it should be: another's bytes, changed ones, or none of this format.
var ErrSnapshot = errors.New("not what was written as this snapshot")

// A Digest names a snapshot: it is the SHA-256 of its sealed manifest.
type Digest [32]byte

func (d Digest) String() string { return hex.EncodeToString(d[:]) }

// Snapshot is a volume at one moment, at a place.
type Snapshot struct {
	Sequence uint64 // from 1, without gaps
	Time     time.Time
	Digest   Digest
}

// Limits of what is read from a place.
const (
	pageExtents = 4096 // names in a page: 1 GiB of the disk
	maxHistory  = 1024 // earlier snapshots that a manifest names
	maxPages    = 64   // of the largest volume
	manifestMin = 32 + 8 + 8 + 8 + 32 + 16 + 8 + 4 + 4
	maxManifest = sealedMore + saltSize + manifestMin + 32*maxPages + 48*maxHistory
)

// Kinds of what lies at a place. Each is sealed on its own: 4 bytes "HFVS", version, kind, then for a manifest a salt, then
// AES-256-GCM with a nonce of zeros under a key that is used once.
const (
	kindExtent   = 1
	kindPage     = 2
	kindManifest = 3

	headSize   = 8
	saltSize   = 32
	sealedMore = headSize + 16
)

func head(kind uint16) []byte {
	b := append(make([]byte, 0, headSize), "HFVS"...)
	b = binary.LittleEndian.AppendUint16(b, 1)
	return binary.LittleEndian.AppendUint16(b, kind)
}

// keys of the snapshots of one volume.
type keys struct {
	id   [32]byte // SHA-256 of the volume's ID
	root [32]byte
	name [32]byte
}

func snapshotKeys(key [32]byte, id string) *keys {
	k := &keys{id: sha256.Sum256([]byte(id))}
	k.root = [32]byte(derive(key, "holdfast/volume/snapshot/v1", k.id[:], 32))
	k.name = [32]byte(derive(k.root, "holdfast/volume/snapshot/name/v1", nil, 32))
	return k
}

// check shows a server that the other side has its volume's key.
func (k *keys) check() [32]byte {
	return [32]byte(derive(k.root, "holdfast/volume/snapshot/check/v1", nil, 32))
}

// A pieceName is the keyed hash of the content of an extent or of a page: equal content has one name within a volume, and
// unrelated ones in two volumes. Zero is content that is zero, which is nowhere.
type pieceName [32]byte

func (k *keys) nameOf(kind uint16, plain []byte) pieceName {
	h := hmac.New(sha256.New, k.name[:])
	h.Write(head(kind))
	h.Write(plain)
	return pieceName(h.Sum(nil))
}

// place is how a piece is called where it lies.
func (n pieceName) place(kind uint16) string {
	return map[uint16]string{kindExtent: "x-", kindPage: "p-"}[kind] + hex.EncodeToString(n[:])
}

func (d Digest) place() string { return "m-" + d.String() }

var placeForm = regexp.MustCompile(`^[xpm]-[0-9a-f]{64}$`)

// sealer is the cipher of a key that seals one thing.
func (k *keys) sealer(label string, info []byte) cipher.AEAD {
	b, err := aes.NewCipher(derive(k.root, label, info, 32))
	if err != nil {
		panic(err) // the key has its length
	}
	a, err := cipher.NewGCM(b)
	if err != nil {
		panic(err)
	}
	return a
}

var nonce [12]byte

// sealPiece seals an extent or a page. The key and the additional data are those of its name, and so of its content: the
// same bytes are sealed to the same bytes.
func (k *keys) sealPiece(kind uint16, name pieceName, plain []byte) []byte {
	h := head(kind)
	out := make([]byte, headSize, headSize+len(plain)+16)
	copy(out, h)
	return k.sealer("holdfast/volume/snapshot/piece/v1", append(h, name[:]...)).Seal(out, nonce[:], plain, append(h, name[:]...))
}

// openPiece opens what is sealed, which must be size bytes of that name. It may use sealed for the answer.
func (k *keys) openPiece(kind uint16, name pieceName, sealed []byte, size int) ([]byte, error) {
	h := head(kind)
	if len(sealed) != sealedMore+size || !bytes.Equal(sealed[:headSize], h) {
		return nil, ErrSnapshot
	}
	plain, err := k.sealer("holdfast/volume/snapshot/piece/v1", append(h, name[:]...)).Open(sealed[headSize:headSize], nonce[:], sealed[headSize:], append(h, name[:]...))
	if err != nil {
		return nil, ErrSnapshot
	}
	// The tag says that a holder of the key sealed it under this name; the name says that he sealed this.
	if got := k.nameOf(kind, plain); !hmac.Equal(got[:], name[:]) {
		return nil, ErrSnapshot
	}
	return plain, nil
}

// page is the names of extents in their order, up to pageExtents.
type page []pieceName

func (p page) encode() []byte {
	b := make([]byte, 0, len(p)*32)
	for _, n := range p {
		b = append(b, n[:]...)
	}
	return b
}

func decodePage(b []byte) page {
	p := make(page, len(b)/32)
	for i := range p {
		p[i] = pieceName(b[i*32:])
	}
	return p
}

func (p page) empty() bool {
	for _, n := range p {
		if n != (pieceName{}) {
			return false
		}
	}
	return true
}

// pages is how many pages a volume of a size has, and pageLen how many extents are in one.
func pages(size int64) int { return int((size/Extent + pageExtents - 1) / pageExtents) }
func pageLen(size int64, p int) int {
	return min(pageExtents, int(size/Extent)-p*pageExtents)
}

// manifest is all that is known of a snapshot but the names of its extents, which are in its pages.
type manifest struct {
	sequence uint64
	epoch    uint64 // of the writer
	time     time.Time
	parent   Digest // zero of the first
	cut      CutID
	size     int64
	pages    []pieceName // zero: its extents are all zero
	history  []Snapshot  // which earlier ones are kept, ascending
}

func (m *manifest) encode(id [32]byte) []byte {
	b := append(make([]byte, 0, manifestMin+32*len(m.pages)+48*len(m.history)), id[:]...)
	b = binary.LittleEndian.AppendUint64(b, m.sequence)
	b = binary.LittleEndian.AppendUint64(b, m.epoch)
	b = binary.LittleEndian.AppendUint64(b, uint64(m.time.UnixNano()))
	b = append(b, m.parent[:]...)
	b = append(b, m.cut[:]...)
	b = binary.LittleEndian.AppendUint64(b, uint64(m.size))
	b = binary.LittleEndian.AppendUint32(b, Extent)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(m.history)))
	for _, p := range m.pages {
		b = append(b, p[:]...)
	}
	for _, s := range m.history {
		b = binary.LittleEndian.AppendUint64(b, s.Sequence)
		b = binary.LittleEndian.AppendUint64(b, uint64(s.Time.UnixNano()))
		b = append(b, s.Digest[:]...)
	}
	return b
}

// decodeManifest reads what was sealed; it has one encoding.
func decodeManifest(b []byte, id [32]byte) (*manifest, error) {
	bad := func(what string) (*manifest, error) { return nil, fmt.Errorf("%w: %s", ErrSnapshot, what) }
	if len(b) < manifestMin {
		return bad("too short")
	}
	if [32]byte(b) != id {
		return bad("of another volume")
	}
	u := func(at int) uint64 { return binary.LittleEndian.Uint64(b[at:]) }
	m := &manifest{sequence: u(32), epoch: u(40), time: time.Unix(0, int64(u(48))).UTC(), parent: Digest(b[56:]), cut: CutID(b[88:]), size: int64(u(104))}
	history := int(binary.LittleEndian.Uint32(b[116:]))
	switch {
	case m.sequence == 0 || m.sequence > math.MaxInt64 || u(48) > math.MaxInt64:
		return bad("sequence or time")
	case (m.sequence == 1) != (m.parent == Digest{}):
		return bad("parent")
	case m.size <= 0 || RoundUp(m.size) != m.size || binary.LittleEndian.Uint32(b[112:]) != Extent:
		return bad("size")
	case history > maxHistory || len(b) != manifestMin+32*pages(m.size)+48*history:
		return bad("length")
	}
	at := manifestMin
	for range pages(m.size) {
		m.pages = append(m.pages, pieceName(b[at:]))
		at += 32
	}
	last := uint64(0)
	for range history {
		s := Snapshot{u(at), time.Unix(0, int64(u(at+8))).UTC(), Digest(b[at+16:])}
		if s.Sequence <= last || s.Sequence >= m.sequence || u(at+8) > math.MaxInt64 {
			return bad("history")
		}
		last = s.Sequence
		m.history = append(m.history, s)
		at += 48
	}
	return m, nil
}

// seal seals a manifest under a key of its own.
func (m *manifest) seal(k *keys) ([]byte, Digest) {
	out := append(head(kindManifest), make([]byte, saltSize)...)
	rand.Read(out[headSize:])
	return m.sealWith(k, out)
}

func (m *manifest) sealWith(k *keys, head []byte) ([]byte, Digest) {
	aad := bytes.Clone(head)
	out := k.sealer("holdfast/volume/snapshot/manifest/v1", aad).Seal(head, nonce[:], m.encode(k.id), aad)
	return out, sha256.Sum256(out)
}

// openManifest opens the manifest with that digest.
func openManifest(k *keys, digest Digest, sealed []byte) (*manifest, error) {
	if len(sealed) < sealedMore+saltSize || len(sealed) > maxManifest || !bytes.Equal(sealed[:headSize], head(kindManifest)) {
		return nil, ErrSnapshot
	}
	if sha256.Sum256(sealed) != digest {
		return nil, fmt.Errorf("%w: digest", ErrSnapshot)
	}
	aad := sealed[:headSize+saltSize]
	plain, err := k.sealer("holdfast/volume/snapshot/manifest/v1", aad).Open(nil, nonce[:], sealed[len(aad):], aad)
	if err != nil {
		return nil, fmt.Errorf("%w: it does not open with the volume's key", ErrSnapshot)
	}
	return decodeManifest(plain, k.id)
}

func (m *manifest) snapshot(d Digest) Snapshot { return Snapshot{m.sequence, m.time, d} }
