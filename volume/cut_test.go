package volume

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// raw block tests: no server, no ext4.
func rawDisk(t testing.TB, dir string, copies int64) *tracked {
	t.Helper()
	p := filepath.Join(dir, "v.img")
	if _, err := os.Stat(p); err != nil {
		if err := createImage(p, "v", 64<<20, [32]byte{1}); err != nil {
			t.Fatal(err)
		}
	}
	d, err := openImage(p, "v", [32]byte{1})
	if err != nil {
		t.Fatal(err)
	}
	tr, err := track(d, filepath.Join(dir, "v.dirty"), "v", copies)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.f.Close() })
	return tr
}

// crash forgets a disk without a word, as the death of its process does.
func (t *tracked) crash() { t.f.Close(); t.disk.f.Close() }

// powerless is a tracking file of which only what was synced is there when the power is gone.
type powerless struct {
	data, synced []byte
	watch        func() // at each sync
}

func (p *powerless) WriteAt(b []byte, at int64) (int, error) { return copy(p.data[at:], b), nil }
func (p *powerless) Sync() error {
	p.synced = bytes.Clone(p.data)
	if p.watch != nil {
		p.watch()
	}
	return nil
}
func (p *powerless) Close() error { return nil }

// TestNoWriteComesBeforeItsMark loses the power after, and looks within, every change of a random history. What the
// tracking file says by then is never too little.
func TestNoWriteComesBeforeItsMark(t *testing.T) {
	dir := t.TempDir()
	d := rawDisk(t, dir, 64<<20)
	path := filepath.Join(dir, "v.dirty")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	file := &powerless{data: b, synced: bytes.Clone(b)}
	d.f = file
	rnd := rand.New(rand.NewPCG(1, 2))
	n := int(d.size / Extent)
	since := map[CutID]set{} // what changed since each cut that a snapshot might be of
	says := func() (*half, set) {
		h, err := decodeTrack(file.synced, d.id, d.size)
		if err != nil {
			return nil, nil
		}
		s := slices.Clone(h.dirty)
		for r, m := range h.marks {
			if m {
				s.addRange(r*region, min((r+1)*region, n))
			}
		}
		return h, s
	}
	check := func(step int) {
		h, s := says()
		if h == nil || h.base.sequence == 0 {
			return // everything is dirty
		}
		for _, c := range append(slices.Clone(h.cuts), h.base.cut) {
			for i := range n {
				if since[c] != nil && since[c].has(i) && !s.has(i) {
					t.Fatalf("step %d: extent %d changed since cut %x, and the file does not know", step, i, c[:2])
				}
			}
		}
	}
	var open *cut
	exact := 0
	for step := range 800 {
		switch k := rnd.IntN(10); {
		case k < 7:
			off := rnd.Int64N(d.size/Sector) * Sector
			size := min(Sector*(1+rnd.Int64N(80)), d.size-off)
			before, after := make([]byte, Sector), make([]byte, Sector)
			d.disk.f.ReadAt(before, Sector+off)
			file.watch = func() {
				d.disk.f.ReadAt(after, Sector+off)
				if !bytes.Equal(before, after) {
					t.Fatalf("step %d: it was written before it was marked", step)
				}
			}
			if k == 0 {
				err = d.Discard(off, size)
			} else {
				_, err = d.WriteAt(bytes.Repeat([]byte{byte(step), byte(step >> 8)}, int(size/2)), off)
			}
			if err != nil {
				t.Fatal(err)
			}
			file.watch = nil
			for _, s := range since {
				s.addRange(int(off/Extent), int((off+size-1)/Extent)+1)
			}
		case k == 7 && open == nil:
			if open, err = d.begin(CutID{}); err != nil {
				t.Fatal(err)
			}
			since[open.id] = newSet(n)
		case k == 8 && open != nil:
			if rnd.IntN(2) == 0 {
				err = open.done(uint64(step + 1))
			} else {
				err = open.abort()
			}
			if err != nil {
				t.Fatal(err)
			}
			open = nil
		}
		check(step)
		if _, s := says(); s != nil && s.len() < n {
			exact++
		}
	}
	if exact < 100 {
		t.Errorf("the file knew something in %d of 800 steps: the test tests little", exact)
	}
}

// TestNobodyPassesAMarkThatIsNotSynced: the second writer to a region waits for the sync of the first one's mark.
func TestNobodyPassesAMarkThatIsNotSynced(t *testing.T) {
	dir := t.TempDir()
	d := rawDisk(t, dir, 1<<20)
	b, err := os.ReadFile(filepath.Join(dir, "v.dirty"))
	if err != nil {
		t.Fatal(err)
	}
	in, release := make(chan bool), make(chan bool)
	var once sync.Once
	d.f = &powerless{data: b, watch: func() { once.Do(func() { close(in); <-release }) }}
	done := make(chan error, 2)
	write := func(i int64) {
		_, err := d.WriteAt(bytes.Repeat([]byte{7}, Sector), i*Extent)
		done <- err
	}
	go write(40)
	<-in
	go write(41)
	select {
	case err := <-done:
		t.Errorf("a write did not wait: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	close(release)
	for range 2 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// writer writes its own sectors, all over the disk, one after the other.
type writer struct {
	id            int
	issued, acked atomic.Int64
}

const ownSectors = 300

// where is what write number k of a writer changes: its own sectors are those with a number that is id modulo 4.
func (w *writer) where(k int64, size int64) (off int64, discard bool) {
	r := rand.New(rand.NewPCG(uint64(w.id), uint64(k)))
	slot := r.Int64N(ownSectors)
	stride := size / Sector / ownSectors / 4 * 4
	return (slot*stride + int64(w.id)) * Sector, r.IntN(7) == 0
}

func (w *writer) run(d *tracked, stop chan struct{}, slowest *atomic.Int64) error {
	b := make([]byte, Sector)
	for {
		select {
		case <-stop:
			return nil
		default:
		}
		k := w.issued.Add(1)
		off, discard := w.where(k, d.size)
		begin := time.Now()
		var err error
		if discard {
			err = d.Discard(off, Sector)
		} else {
			for i := 0; i < Sector; i += 8 {
				binary.LittleEndian.PutUint64(b[i:], uint64(k)<<8|uint64(w.id))
			}
			_, err = d.WriteAt(b, off)
		}
		if err != nil {
			return err
		}
		if took := int64(time.Since(begin)); took > slowest.Load() {
			slowest.Store(took)
		}
		w.acked.Store(k)
	}
}

// judge finds a number of writes from low to high after which the writer's sectors are as in the image.
func (w *writer) judge(img []byte, low, high int64) error {
	size := int64(len(img))
	model := map[int64]uint64{}
	wrong := map[int64]bool{} // sectors that are not as the model has them
	look := func(off int64) {
		if got := binary.LittleEndian.Uint64(img[off:]); got != model[off] && (model[off] != 0 || got != 0) {
			wrong[off] = true
		} else {
			delete(wrong, off)
		}
	}
	for s := range int64(ownSectors) {
		off := (s*(size/Sector/ownSectors/4*4) + int64(w.id)) * Sector
		model[off] = 0
		look(off)
	}
	for k := int64(0); ; k++ {
		if k >= low && len(wrong) == 0 {
			return nil
		}
		if k == high {
			return fmt.Errorf("writer %d: it is no state between write %d and %d: %d sectors are wrong at the end", w.id, low, high, len(wrong))
		}
		off, discard := w.where(k+1, size)
		model[off] = uint64(k+1)<<8 | uint64(w.id)
		if discard {
			model[off] = 0
		}
		look(off)
	}
}

// TestACutIsTheDiskAtOneMoment takes cuts of a disk that four writers change without a pause, and builds a copy from nothing
// but the cuts. It is always a state that the disk was in between begin and end of the cut, for each writer a prefix
// of its writes. In between the process dies, and some cuts are given up.
func TestACutIsTheDiskAtOneMoment(t *testing.T) {
	dir := t.TempDir()
	writers := []*writer{{id: 0}, {id: 1}, {id: 2}, {id: 3}}
	var replica []byte
	var from CutID
	var slowest atomic.Int64
	var pause time.Duration
	copied, read, partial := 0, 0, 0
	rnd := rand.New(rand.NewPCG(3, 4))
	rounds := 16
	if testing.Short() {
		rounds = 8
	}
	for round := range rounds {
		d := rawDisk(t, dir, 64<<20)
		if replica == nil {
			// Writers own their sectors from the beginning.
			if err := d.Discard(0, d.size); err != nil {
				t.Fatal(err)
			}
			replica = make([]byte, d.size)
		}
		stop := make(chan struct{})
		var all sync.WaitGroup
		for _, w := range writers {
			all.Go(func() {
				if err := w.run(d, stop, &slowest); err != nil {
					t.Error(err)
				}
			})
		}
		time.Sleep(time.Duration(rnd.IntN(8)) * time.Millisecond)
		var low, high [4]int64
		for i, w := range writers {
			low[i] = w.acked.Load()
		}
		begin := time.Now()
		c, err := d.begin(from)
		pause = max(pause, time.Since(begin))
		for i, w := range writers {
			high[i] = w.issued.Load()
		}
		if err != nil {
			t.Fatal(err)
		}
		if !c.full {
			partial++
		}
		next := bytes.Clone(replica)
		b := make([]byte, Extent)
		count := 0
		for {
			i, zero, err := c.next(b)
			if errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Fatal(err)
			}
			count++
			if zero {
				clear(b)
			}
			copy(next[i*Extent:], b)
			if rnd.IntN(20) == 0 {
				time.Sleep(time.Millisecond)
			}
		}
		if count != c.size {
			t.Errorf("round %d: %d extents of %d", round, count, c.size)
		}
		for i, w := range writers {
			if err := w.judge(next, low[i], high[i]); err != nil {
				t.Errorf("round %d: %v", round, err)
			}
		}
		copied, read = copied+c.copied, read+c.read
		switch rnd.IntN(4) {
		case 0: // the snapshot did not get there
			err = c.abort()
		case 1: // it did, and nobody heard of it
			replica, from = next, c.id
			if rnd.IntN(2) == 0 {
				err = c.abort()
			}
		default:
			replica, from = next, c.id
			err = c.done(uint64(round + 1))
		}
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(rnd.IntN(5)) * time.Millisecond)
		close(stop)
		all.Wait()
		if rnd.IntN(2) == 0 {
			d.crash()
		} else {
			if d.cut != nil {
				if err := d.cut.abort(); err != nil {
					t.Fatal(err)
				}
			}
			if err := d.close(); err != nil {
				t.Fatal(err)
			}
			d.disk.f.Close()
		}
		if t.Failed() {
			return
		}
	}
	t.Logf("%d extents copied before a write, %d read from the image; %d of %d cuts were of a part; begin took at most %v, a write %v", copied, read, partial, rounds, pause, time.Duration(slowest.Load()))
	if copied == 0 || read == 0 || partial == 0 {
		t.Error("the test tests nothing")
	}
}

// TestNoChangeSlipsBetweenTwoCuts takes one cut after the other while every extent is written once. What the cuts gave is in
// the end what is on the disk: no change was under way when a cut began and belongs to neither it nor the next.
func TestNoChangeSlipsBetweenTwoCuts(t *testing.T) {
	dir := t.TempDir()
	p := filepath.Join(dir, "v.img")
	if err := createImage(p, "v", 1<<30, [32]byte{1}); err != nil {
		t.Fatal(err)
	}
	d := rawDisk(t, dir, 1<<30)
	n := int(d.size / Extent)
	replica := make([]uint64, n) // first bytes of each extent
	b := make([]byte, Extent)
	var from CutID
	cuts := 0
	take := func() {
		c, err := d.begin(from)
		if err != nil {
			t.Fatal(err)
		}
		for {
			i, zero, err := c.next(b)
			if errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Fatal(err)
			}
			if replica[i] = 0; !zero {
				replica[i] = binary.LittleEndian.Uint64(b)
			}
		}
		cuts++
		from = c.id
		if err := c.done(uint64(cuts)); err != nil {
			t.Fatal(err)
		}
	}
	take()
	order := rand.New(rand.NewPCG(8, 8)).Perm(n)
	var next atomic.Int64
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			b := make([]byte, Extent)
			for {
				k := next.Add(1) - 1
				if k >= int64(n) {
					return
				}
				i := order[k]
				binary.LittleEndian.PutUint64(b, uint64(i+1))
				if _, err := d.WriteAt(b[:Sector<<(k%7)], int64(i)*Extent); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for next.Load() < int64(n) {
		take()
	}
	all.Wait()
	take()
	for i := range n {
		if replica[i] != uint64(i+1) {
			t.Fatalf("extent %d: the cuts have %d", i, replica[i])
		}
	}
	if t.Logf("%d cuts", cuts); cuts < 5 {
		t.Error("the test tests little")
	}
}

// TestACutWaitsForWhatIsUnderWay holds a change up in its middle: it would belong to neither side.
func TestACutWaitsForWhatIsUnderWay(t *testing.T) {
	d := rawDisk(t, t.TempDir(), 1<<20)
	in, release := make(chan bool), make(chan bool)
	changed := make(chan error, 1)
	go func() {
		changed <- d.change(0, Sector, func() error {
			close(in)
			<-release
			_, err := d.disk.WriteAt(bytes.Repeat([]byte{7}, Sector), 0)
			return err
		})
	}()
	<-in
	began := make(chan *cut, 1)
	go func() {
		c, err := d.begin(CutID{})
		if err != nil {
			t.Error(err)
		}
		began <- c
	}()
	select {
	case <-began:
		t.Fatal("a cut began within a change")
	case <-time.After(100 * time.Millisecond):
	}
	close(release)
	c := <-began
	b := make([]byte, Extent)
	if i, _, err := c.next(b); err != nil || i != 0 || b[0] != 7 || <-changed != nil {
		t.Errorf("extent %d begins with %d: %v", i, b[0], err)
	}
}

// TestOnlyWhatChangedIsRead counts.
func TestOnlyWhatChangedIsRead(t *testing.T) {
	dir := t.TempDir()
	d := rawDisk(t, dir, 64<<20)
	drain := func(c *cut) (n int) {
		b := make([]byte, Extent)
		for {
			if _, _, err := c.next(b); errors.Is(err, io.EOF) {
				return n
			} else if err != nil {
				t.Fatal(err)
			}
			n++
		}
	}
	c, err := d.begin(CutID{})
	if err != nil || !c.full || drain(c) != 256 {
		t.Fatalf("the first cut is of everything: %v", err)
	}
	if _, err := d.begin(CutID{}); !errors.Is(err, ErrBusy) {
		t.Errorf("a second cut at once: %v", err)
	}
	if err := c.done(1); err != nil {
		t.Fatal(err)
	}
	base := c.id
	write := func(at ...int64) {
		for _, i := range at {
			if _, err := d.WriteAt(make([]byte, Sector), i*Extent+Sector); err != nil {
				t.Fatal(err)
			}
		}
	}
	write(3, 7, 200)
	if d.Dirty() != 3*Extent {
		t.Errorf("%d bytes are dirty", d.Dirty())
	}
	// A clean end keeps the exact set, a crash whole regions.
	if err := d.close(); err != nil {
		t.Fatal(err)
	}
	d = rawDisk(t, dir, 64<<20)
	if d.Dirty() != 3*Extent {
		t.Errorf("%d bytes are dirty after a clean end", d.Dirty())
	}
	if c, err = d.begin(base); err != nil || c.full || drain(c) != 3 {
		t.Errorf("the second cut is of 3 extents: %v", err)
	}
	if err := c.abort(); err != nil {
		t.Fatal(err)
	}
	// Its snapshot may have got to its place all the same, and is what the next one follows, whoever died in between.
	unheard := c.id
	if c, err = d.begin(unheard); err != nil || c.full || drain(c) != 3 {
		t.Errorf("a cut from one whose end was not heard of: %v", err)
	}
	d.crash()
	d = rawDisk(t, dir, 64<<20)
	if c, err = d.begin(unheard); err != nil || c.full || drain(c) != 3 {
		t.Errorf("... after a crash: %v", err)
	}
	if err := c.abort(); err != nil {
		t.Fatal(err)
	}
	write(100)
	d.crash()
	d = rawDisk(t, dir, 64<<20)
	if d.Dirty() != (64+3)*Extent {
		t.Errorf("%d bytes are dirty after a crash", d.Dirty())
	}
	if c, err = d.begin(CutID{1}); err != nil || !c.full {
		t.Errorf("a cut from a base that nobody knows: %v", err)
	}
	if err := c.abort(); err != nil {
		t.Fatal(err)
	}
	// Somebody else had the image.
	if err := d.close(); err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	if err := os.Chtimes(filepath.Join(dir, "v.img"), now, now); err != nil {
		t.Fatal(err)
	}
	if d = rawDisk(t, dir, 64<<20); d.Dirty() != 64<<20 {
		t.Errorf("%d bytes are dirty after another had the image", d.Dirty())
	}
}

// TestADamagedTrackingFileMeansEverything turns every byte of a tracking file.
func TestADamagedTrackingFileMeansEverything(t *testing.T) {
	dir := t.TempDir()
	d := rawDisk(t, dir, 1<<20)
	c, err := d.begin(CutID{})
	if err == nil {
		err = c.done(1)
	}
	if err == nil {
		_, err = d.WriteAt(make([]byte, Sector), 5*Extent)
	}
	if err == nil {
		_, err = d.begin(CutID{})
	}
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "v.dirty")
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	h, err := readTrack(path, d.id, d.disk)
	if err != nil || !h.marks[0] || len(h.cuts) != 1 {
		t.Fatalf("control: %+v %v", h, err)
	}
	look := func(what string, b []byte) {
		got, err := decodeTrack(b, d.id, d.size)
		if errors.Is(err, ErrFormat) {
			return
		}
		if err != nil || !got.marks[0] || got.base != h.base || len(got.cuts) > 1 || len(got.cuts) == 1 && got.cuts[0] != h.cuts[0] {
			t.Fatalf("%s: base %v, marks %v, cuts %x, %v", what, got.base, got.marks, got.cuts, err)
		}
	}
	for i := range good {
		b := bytes.Clone(good)
		b[i] ^= 1 << (i % 8)
		look(fmt.Sprintf("byte %d", i), b)
	}
	for i := 0; i < len(good); i += 512 {
		b := bytes.Clone(good)
		clear(b[i : i+512])
		look(fmt.Sprintf("sector at %d", i), b)
		look(fmt.Sprintf("cut off at %d", i), good[:i])
	}
}

// TestACutThatFallsBehindIsGivenUp lets no write wait for room.
func TestACutThatFallsBehindIsGivenUp(t *testing.T) {
	d := rawDisk(t, t.TempDir(), 2*Extent)
	all := bytes.Repeat([]byte{7}, 1<<20)
	for off := int64(0); off < 8<<20; off += 1 << 20 {
		if _, err := d.WriteAt(all, off); err != nil {
			t.Fatal(err)
		}
	}
	c, err := d.begin(CutID{})
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, Extent)
	for i := range int64(6) { // room is given back when it is read
		if _, err := d.WriteAt(all[:Sector], i*Extent); err != nil {
			t.Fatal(err)
		}
		if got, _, err := c.next(b); err != nil || got != int(i) || !bytes.Equal(b, all[:Extent]) {
			t.Fatalf("extent %d %v", got, err)
		}
	}
	for i := range int64(3) {
		if _, err := d.WriteAt(all[:Sector], (10+i)*Extent); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, err := c.next(b); !errors.Is(err, ErrBehind) {
		t.Fatalf("a cut without room: %v", err)
	}
	if st, err := c.copies.Stat(); err != nil || st.Size() > 2*Extent {
		t.Errorf("the copies take %d bytes: %v", st.Size(), err)
	}
	if err := c.abort(); err != nil {
		t.Fatal(err)
	}
	if d.Dirty() != 64<<20 {
		t.Errorf("%d bytes are dirty", d.Dirty())
	}
}
