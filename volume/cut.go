package volume

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// Errors of a cut.
var (
	ErrBehind = errors.New("the volume changed faster than the snapshot was taken")
	ErrBusy   = errors.New("another snapshot of the volume is being taken")
)

// cut is the disk as it was at one moment: all writes that had returned by then, and none after. It is what a disk holds
// that loses its power, without any reordering. A write to an extent that is still to be read copies it first, as it is on
// disk, to a file without a name, which ends with the process.
type cut struct {
	t    *tracked
	id   CutID
	full bool // every extent is in it, not only what is dirty
	size int  // extents in it
	was  set  // what was dirty when it began

	mu     sync.Mutex
	owed   set         // to be read from the image
	slots  map[int]int // to be read from a slot of the copies; -1 is a hole
	free   []int
	used   int // slots that were ever used
	copies *os.File
	lost   error
	copied int // extents, for tests and figures
	read   int // extents of the image that the reader read

	stripes [64]sync.Mutex // of the extents
}

// begin takes a cut. It is of what may differ from one of the bases that are known here, or else of everything.
func (t *tracked) begin(from CutID) (*cut, error) {
	t.gate.RLock()
	busy := t.cut != nil
	t.gate.RUnlock()
	if busy { // asked again below, when nothing can come in between
		return nil, ErrBusy
	}
	c := &cut{t: t, id: newCutID(), slots: map[int]int{}}
	if err := t.record(c.id); err != nil {
		return nil, err
	}
	t.mu.Lock()
	c.full = t.base.sequence == 0 || from != t.base.cut && !slices.Contains(t.cuts, from)
	t.mu.Unlock()
	var err error
	if c.copies, err = os.OpenFile(filepath.Dir(t.disk.f.Name()), unix.O_TMPFILE|os.O_RDWR, 0o600); err != nil {
		return nil, fmt.Errorf("copies: %w", err)
	}
	n := int(t.size / Extent)
	fresh := newSet(n)
	t.gate.Lock()
	defer t.gate.Unlock()
	if t.cut != nil {
		c.copies.Close()
		return nil, ErrBusy
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	c.was, t.dirty = t.dirty, fresh
	c.owed = slices.Clone(c.was)
	if c.full {
		c.owed.addRange(0, n)
	}
	c.size = c.owed.len()
	t.cut = c
	return c, nil
}

// record writes down that a cut is about to be. What is dirty in the file is then a superset of what differs from it, too:
// if the snapshot gets to its place and its end is not heard of here, the next one still knows what to read.
func (t *tracked) record(id CutID) error {
	t.file.Lock()
	defer t.file.Unlock()
	if t.broken != nil {
		return t.broken
	}
	var b [trackCut]byte
	putCut(b[:], id, t.gen)
	if err := t.put(b[:], t.at()+trackHeader+int64(t.rec%trackCuts)*trackCut); err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.rec++
	if t.cuts = append(t.cuts, id); len(t.cuts) > trackCuts {
		t.cuts = slices.Delete(t.cuts, 0, 1)
	}
	return nil
}

// done ends a cut whose snapshot is at its place: it is the new base.
func (c *cut) done(sequence uint64) error {
	err := c.t.rewrite(base{c.id, sequence}, nil, 0)
	if err != nil {
		return errors.Join(err, c.abort())
	}
	return c.end(false)
}

// abort ends a cut whose snapshot may not be at its place.
func (c *cut) abort() error { return c.end(true) }

func (c *cut) end(undo bool) error {
	t := c.t
	t.gate.Lock()
	defer t.gate.Unlock()
	if t.cut != c {
		return nil
	}
	if undo {
		t.mu.Lock()
		t.dirty.addAll(c.was)
		t.mu.Unlock()
	}
	t.cut = nil
	return c.copies.Close()
}

// raw are buffers for an extent.
var raw = sync.Pool{New: func() any { return new([Extent]byte) }}

// preserve copies an extent that is owed. Without room the cut is lost, and the write goes on.
func (c *cut) preserve(i int) {
	s := &c.stripes[i%len(c.stripes)]
	s.Lock()
	defer s.Unlock()
	c.mu.Lock()
	owed := c.owed.has(i) && c.lost == nil
	c.mu.Unlock()
	if !owed {
		return
	}
	slot, err := -1, error(nil)
	if !c.t.hole(i) {
		slot, err = c.store(i)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil {
		c.lost = err
		return
	}
	c.slots[i] = slot
	c.owed.remove(i)
	c.copied++
}

func (c *cut) store(i int) (int, error) {
	slot, ok := 0, false
	c.mu.Lock()
	if n := len(c.free); n > 0 {
		slot, c.free, ok = c.free[n-1], c.free[:n-1], true
	} else if int64(c.used+1)*Extent <= c.t.copy {
		slot, ok = c.used, true
		c.used++
	}
	c.mu.Unlock()
	if !ok {
		return 0, ErrBehind
	}
	b := raw.Get().(*[Extent]byte)
	defer raw.Put(b)
	if _, err := c.t.disk.f.ReadAt(b[:], Sector+int64(i)*Extent); err != nil {
		return 0, err
	}
	_, err := c.copies.WriteAt(b[:], int64(slot)*Extent)
	return slot, err
}

// hole reports whether an extent of the image was never written.
func (d *disk) hole(i int) bool {
	at := Sector + int64(i)*Extent
	next, err := unix.Seek(int(d.f.Fd()), at, unix.SEEK_DATA)
	return errors.Is(err, unix.ENXIO) || err == nil && next >= at+Extent
}

// next reads one more extent of the cut into b, which has an extent's size, and reports which it is and whether it is
// zero. What was copied comes first: its room is needed. The end is io.EOF.
func (c *cut) next(b []byte) (i int, zero bool, err error) {
	c.mu.Lock()
	i, err = -1, c.lost
	for i = range c.slots {
		break
	}
	if len(c.slots) == 0 {
		i = c.owed.next(0)
	}
	c.mu.Unlock()
	if err != nil {
		return 0, false, err
	}
	if i < 0 {
		return 0, false, io.EOF
	}
	s := &c.stripes[i%len(c.stripes)]
	s.Lock()
	defer s.Unlock()
	c.mu.Lock()
	slot, copied := c.slots[i]
	err = c.lost
	c.mu.Unlock()
	switch {
	case err != nil:
		return 0, false, err
	case copied && slot < 0, !copied && c.t.hole(i):
		zero = true
	case copied:
		_, err = c.copies.ReadAt(b, int64(slot)*Extent)
	default:
		_, err = c.t.disk.f.ReadAt(b, Sector+int64(i)*Extent)
	}
	if err != nil {
		return 0, false, fmt.Errorf("read extent %d: %w", i, err)
	}
	c.mu.Lock()
	if copied {
		delete(c.slots, i)
		if slot >= 0 {
			c.free = append(c.free, slot)
		}
	} else {
		c.owed.remove(i)
		c.read++
	}
	c.mu.Unlock()
	if !zero {
		c.t.decrypt(b, int64(i)*Extent)
		zero = isZero(b)
	}
	return i, zero, nil
}
