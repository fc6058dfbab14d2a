package volume

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// Extent is the unit of snapshots, in bytes.
const Extent = 256 << 10

// region is how many extents one mark of the tracking file covers: 16 MiB.
const region = 64

// A CutID names one moment of one image, at random.
type CutID [16]byte

// set is a set of extents.
type set []uint64

func newSet(n int) set       { return make(set, (n+63)/64) }
func (s set) add(i int)      { s[i/64] |= 1 << (i % 64) }
func (s set) remove(i int)   { s[i/64] &^= 1 << (i % 64) }
func (s set) has(i int) bool { return s[i/64]>>(i%64)&1 == 1 }

func (s set) addRange(a, b int) {
	for i := a; i < b; i++ {
		s.add(i)
	}
}

func (s set) addAll(o set) {
	for i := range s {
		s[i] |= o[i]
	}
}

func (s set) len() (n int) {
	for _, w := range s {
		n += bits.OnesCount64(w)
	}
	return n
}

// next is the first member from i on, or -1.
func (s set) next(i int) int {
	for w := i / 64; w < len(s); w++ {
		x := s[w]
		if w == i/64 {
			x &= ^uint64(0) << (i % 64)
		}
		if x != 0 {
			return w*64 + bits.TrailingZeros64(x)
		}
	}
	return -1
}

// The tracking file lies beside the image and says which extents may differ from a snapshot. It never says too little:
// an extent's region is marked in it, and the mark is synced, before the first write to the extent is issued.
//
// It has two halves of the same form, of which one is valid (docs/formats/volume.md). A half that is damaged, or of another
// image, is none; without a valid half everything may differ.
const (
	trackHeader = 128
	trackCuts   = 64 // records of cuts in a half
	trackCut    = 32

	// Neither value is what a lost sector reads as. Whatever is not clean is dirty.
	markClean = 0x5a
	markDirty = 0xa5
)

var trackMagic = [8]byte{'H', 'F', 'D', 'I', 'R', 'T', 'Y', 1}

// base is what a half of the tracking file is relative to: the cut of a snapshot that is at its place.
type base struct {
	cut      CutID
	sequence uint64
}

// half is one half of a tracking file.
type half struct {
	id         [32]byte // SHA-256 of the volume's ID
	size       int64
	generation uint64
	closed     int64 // the image's mtime if nobody has it open, else 0
	base       base  // sequence 0: everything is dirty
	dirty      set   // exact, when the half was written
	marks      []bool
	cuts       []CutID // since
}

// halfSize is the size of a half with n extents: header, cuts and marks by whole sectors, then one bit an extent and a
// checksum.
func halfSize(n int) int {
	return up(trackHeader+trackCuts*trackCut) + up(regions(n)) + up(len(newSet(n))*8+32)
}

func up(n int) int      { return (n + Sector - 1) / Sector * Sector }
func regions(n int) int { return (n + region - 1) / region }
func marksAt() int      { return up(trackHeader + trackCuts*trackCut) }
func dirtyAt(n int) int { return marksAt() + up(regions(n)) }

func (h *half) encode() []byte {
	n := int(h.size / Extent)
	b := make([]byte, halfSize(n))
	copy(b, trackMagic[:])
	copy(b[8:], h.id[:])
	binary.LittleEndian.PutUint64(b[40:], uint64(h.size))
	binary.LittleEndian.PutUint64(b[48:], Extent)
	binary.LittleEndian.PutUint64(b[56:], h.generation)
	binary.LittleEndian.PutUint64(b[64:], uint64(h.closed))
	binary.LittleEndian.PutUint64(b[72:], h.base.sequence)
	copy(b[80:], h.base.cut[:])
	for i := range regions(n) {
		b[marksAt()+i] = markClean
	}
	at := dirtyAt(n)
	for i, w := range h.dirty {
		binary.LittleEndian.PutUint64(b[at+8*i:], w)
	}
	sum := sha256.Sum256(slices.Concat(b[:trackHeader], b[at:at+8*len(h.dirty)]))
	copy(b[at+8*len(h.dirty):], sum[:])
	return b
}

// decodeHalf reads a half of the tracking file of an image of that ID and size.
func decodeHalf(b []byte, id [32]byte, size int64) (*half, error) {
	n := int(size / Extent)
	if len(b) != halfSize(n) || !bytes.Equal(b[:8], trackMagic[:]) {
		return nil, ErrFormat
	}
	h := &half{
		id: [32]byte(b[8:40]), size: int64(binary.LittleEndian.Uint64(b[40:])), generation: binary.LittleEndian.Uint64(b[56:]),
		closed: int64(binary.LittleEndian.Uint64(b[64:])), base: base{CutID(b[80:96]), binary.LittleEndian.Uint64(b[72:])},
		dirty: newSet(n), marks: make([]bool, regions(n)),
	}
	at := dirtyAt(n)
	end := at + 8*len(h.dirty)
	if sum := sha256.Sum256(slices.Concat(b[:trackHeader], b[at:end])); !bytes.Equal(sum[:], b[end:end+32]) {
		return nil, fmt.Errorf("%w: checksum", ErrFormat)
	}
	if h.id != id || h.size != size || binary.LittleEndian.Uint64(b[48:]) != Extent {
		return nil, fmt.Errorf("%w: of another volume", ErrFormat)
	}
	for i := range h.dirty {
		h.dirty[i] = binary.LittleEndian.Uint64(b[at+8*i:])
	}
	for r := range h.marks {
		h.marks[r] = b[marksAt()+r] != markClean
	}
	for i := range trackCuts {
		if c := b[trackHeader+i*trackCut:][:trackCut]; bytes.Equal(c[16:], cutCheck(CutID(c), h.generation)) {
			h.cuts = append(h.cuts, CutID(c))
		}
	}
	return h, nil
}

// cutCheck binds a record of a cut to a generation, so that none of an earlier one is believed.
func cutCheck(id CutID, generation uint64) []byte {
	sum := sha256.Sum256(binary.LittleEndian.AppendUint64(id[:], generation))
	return sum[:16]
}

// tracked is a disk whose changes are known, and of which a cut can be taken.
type tracked struct {
	*disk
	id   [32]byte
	copy int64 // bytes that a cut may take on disk

	// gate is held for reading by each write, and for writing at the moment at which a cut begins or ends.
	gate sync.RWMutex
	cut  *cut // under gate

	mu     sync.Mutex // short
	dirty  set        // since the base, or since the cut while there is one
	saved  []bool     // by region: the file says that it is dirty; changed under file, too
	wanted []bool     // by region: it shall say so
	base   base
	cuts   []CutID // of which dirty, with what a cut holds, is a superset too

	file sync.Mutex // the tracking file is being changed; before mu
	f    interface {
		io.WriterAt
		Sync() error
		Close() error
	}
	gen    uint64 // of the valid half, which is number gen%2
	rec    int    // next record of a cut
	broken error
}

// track opens the tracking file of an image, or begins one that says that everything is dirty.
func track(d *disk, path, id string, copies int64) (*tracked, error) {
	n := int(d.size / Extent)
	t := &tracked{disk: d, id: sha256.Sum256([]byte(id)), copy: copies, dirty: newSet(n), saved: make([]bool, regions(n)), wanted: make([]bool, regions(n))}
	h, err := readTrack(path, t.id, d)
	switch {
	case err == nil:
		t.base, t.cuts, t.dirty, t.gen = h.base, h.cuts, h.dirty, h.generation
		for r, m := range h.marks {
			if m {
				t.dirty.addRange(r*region, min((r+1)*region, n))
			}
		}
	case errors.Is(err, os.ErrNotExist), errors.Is(err, ErrFormat):
		if err := writeTrack(path, &half{id: t.id, size: d.size, generation: 1, dirty: newSet(n)}); err != nil {
			return nil, err
		}
		t.gen = 1
	default:
		return nil, err
	}
	if t.base.sequence == 0 {
		t.dirty.addRange(0, n)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	t.f = dataFile{f}
	// What is read is written back: the exact set, and that the image is open.
	if err := t.rewrite(t.base, t.cuts, 0); err != nil {
		t.f.Close()
		return nil, err
	}
	return t, nil
}

// dataFile is a file whose size does not change.
type dataFile struct{ *os.File }

// Sync makes what was written last.
func (f dataFile) Sync() error { return unix.Fdatasync(int(f.Fd())) }

// readTrack is the valid half of a tracking file.
func readTrack(path string, id [32]byte, d *disk) (*half, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	best, err := decodeTrack(b, id, d.size)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if best.closed != 0 {
		// Somebody who does not track has had the image since: an older program, or what puts back a copy.
		st, err := d.f.Stat()
		if err != nil {
			return nil, err
		}
		if st.ModTime().UnixNano() != best.closed {
			return nil, fmt.Errorf("%s: %w: the image changed since", path, ErrFormat)
		}
	}
	return best, nil
}

// decodeTrack is the valid half of a tracking file.
func decodeTrack(b []byte, id [32]byte, size int64) (*half, error) {
	n := halfSize(int(size / Extent))
	if len(b) != 2*n {
		return nil, fmt.Errorf("%w: %d bytes", ErrFormat, len(b))
	}
	var best *half
	for i := range 2 {
		h, err := decodeHalf(b[i*n:][:n], id, size)
		if err == nil && h.generation%2 == uint64(i) && (best == nil || h.generation > best.generation) {
			best = h
		}
	}
	if best == nil {
		return nil, fmt.Errorf("%w: neither half is valid", ErrFormat)
	}
	return best, nil
}

// writeTrack makes a tracking file. All of its blocks are written, so that no later sync has to wait for a journal.
func writeTrack(path string, h *half) error {
	size := halfSize(int(h.size / Extent))
	b := make([]byte, 2*size)
	copy(b[int(h.generation%2)*size:], h.encode())
	f, err := os.OpenFile(path+".new", os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	if _, err = f.Write(b); err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return errors.Join(os.Rename(path+".new", path), syncDir(filepath.Dir(path)))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// untrack removes a tracking file for good. It comes before an image of the same name: nothing must say of a new image that
// it is as clean as the one before.
func untrack(path string) error {
	if err := os.Remove(path); errors.Is(err, os.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

// rewrite makes the other half the valid one, with what is dirty now.
func (t *tracked) rewrite(b base, cuts []CutID, closed int64) error {
	t.file.Lock()
	defer t.file.Unlock()
	t.mu.Lock()
	h := &half{id: t.id, size: t.size, generation: t.gen + 1, closed: closed, base: b, dirty: slices.Clone(t.dirty)}
	if t.cut != nil && b == t.base {
		h.dirty.addAll(t.cut.was)
	}
	// From here on whoever writes waits for the new half, to mark it there. Who has passed is in the set.
	clear(t.saved)
	t.mu.Unlock()
	if t.broken != nil {
		return t.broken
	}
	// Which half is valid is not known before all of this is done.
	t.broken = errors.New("tracking file: it could not be written before")
	raw := h.encode()
	for i, c := range cuts {
		putCut(raw[trackHeader+i*trackCut:], c, h.generation)
	}
	size := int64(halfSize(int(t.size / Extent)))
	at := int64(h.generation%2) * size
	if err := t.put(raw, at); err != nil {
		return err
	}
	// The other half gets no marks any more: it must be gone before this one gets its first.
	if err := t.put(make([]byte, trackHeader), size-at); err != nil {
		return err
	}
	t.broken = nil
	t.mu.Lock()
	t.gen, t.rec, t.base, t.cuts = h.generation, len(cuts), b, slices.Clone(cuts)
	t.mu.Unlock()
	return nil
}

// put writes to the tracking file for good.
func (t *tracked) put(b []byte, at int64) error {
	if _, err := t.f.WriteAt(b, at); err != nil {
		return fmt.Errorf("tracking file: %w", err)
	}
	if err := t.f.Sync(); err != nil {
		return fmt.Errorf("tracking file: %w", err)
	}
	return nil
}

// at is where the valid half is.
func (t *tracked) at() int64 { return int64(t.gen%2) * int64(halfSize(int(t.size/Extent))) }

func putCut(b []byte, id CutID, generation uint64) {
	copy(b, id[:])
	copy(b[16:trackCut], cutCheck(id, generation))
}

// mark puts extents into the set, and their regions into the file. One sync does for all who wait for the one before.
func (t *tracked) mark(a, b int) error {
	if t.marked(a, b) {
		return nil
	}
	t.mu.Lock()
	for r := a / region; r <= (b-1)/region; r++ {
		t.wanted[r] = true
	}
	t.mu.Unlock()
	t.file.Lock()
	defer t.file.Unlock()
	if t.marked(a, b) {
		return nil
	}
	if t.broken != nil {
		return t.broken
	}
	t.mu.Lock()
	next, raw := slices.Clone(t.saved), make([]byte, len(t.saved))
	for r := range next {
		if next[r] = next[r] || t.wanted[r]; next[r] {
			raw[r] = markDirty
		} else {
			raw[r] = markClean
		}
	}
	clear(t.wanted)
	t.mu.Unlock()
	if err := t.put(raw, t.at()+int64(marksAt())); err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.saved = next // only who has t.file changes it
	return nil
}

// marked puts extents into the set, and reports whether the file has their regions.
func (t *tracked) marked(a, b int) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.dirty.addRange(a, b)
	return !slices.Contains(t.saved[a/region:(b-1)/region+1], false)
}

// change does a change of a range, after it is marked and after what a cut still needs of it is copied.
func (t *tracked) change(off, n int64, do func() error) error {
	if n <= 0 || off < 0 || off+n > t.size {
		return unix.EINVAL
	}
	a, b := int(off/Extent), int((off+n-1)/Extent)+1
	for {
		if err := t.mark(a, b); err != nil {
			return err
		}
		t.gate.RLock()
		// Between the mark and the gate a cut may have begun, whose end cleans the file.
		if t.marked(a, b) {
			break
		}
		t.gate.RUnlock()
	}
	defer t.gate.RUnlock()
	if t.cut != nil {
		for i := a; i < b; i++ {
			t.cut.preserve(i)
		}
	}
	return do()
}

// WriteAt writes whole sectors.
func (t *tracked) WriteAt(p []byte, off int64) (n int, err error) {
	if len(p) == 0 {
		return 0, t.bounds(p, off)
	}
	err = t.change(off, int64(len(p)), func() (err error) {
		n, err = t.disk.WriteAt(p, off)
		return err
	})
	return n, err
}

// Discard makes a range of whole sectors a hole, a piece at a time: nobody waits for the copies of a large one.
func (t *tracked) Discard(off, n int64) error {
	if n == 0 || off < 0 || n < 0 || off > t.size-n {
		return t.disk.Discard(off, n)
	}
	for end := off + n; off < end; {
		next := min(end, (off/Extent+16)*Extent)
		if err := t.change(off, next-off, func() error { return t.disk.Discard(off, next-off) }); err != nil {
			return err
		}
		off = next
	}
	return nil
}

// Dirty is how many bytes may differ from the last snapshot.
func (t *tracked) Dirty() int64 {
	t.gate.RLock()
	defer t.gate.RUnlock()
	t.mu.Lock()
	defer t.mu.Unlock()
	all := slices.Clone(t.dirty)
	if t.cut != nil {
		all.addAll(t.cut.was)
	}
	return int64(all.len()) * Extent
}

// close syncs the image and writes down exactly what is dirty. Nobody may write any more.
func (t *tracked) close() error {
	err := t.Sync()
	if err == nil {
		var st os.FileInfo
		if st, err = t.disk.f.Stat(); err == nil {
			err = t.rewrite(t.base, t.cuts, st.ModTime().UnixNano())
		}
	}
	return errors.Join(err, t.f.Close())
}

func newCutID() (id CutID) {
	rand.Read(id[:])
	return id
}
