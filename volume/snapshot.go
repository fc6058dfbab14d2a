package volume

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Errors of snapshots.
var (
	ErrFenced     = errors.New("the place knows a higher epoch: another writes this volume's snapshots now")
	ErrMoved      = errors.New("another snapshot became the newest meanwhile")
	ErrRolledBack = errors.New("the place's newest snapshot is older than one that is known")
	ErrNone       = errors.New("there is no snapshot")
)

// Place is where the snapshots of one volume lie. It sees sealed bytes and names that say nothing, and is not trusted: what
// it answers is checked. What it must do for nothing to be lost is what each method says. A call that returned an error may
// have had its effect, but has none later on. Absent is fs.ErrNotExist. Package placetest tries what each says.
type Place interface {
	// Put keeps data under a name when it returns. The same name comes with the same data only.
	Put(ctx context.Context, name string, data []byte) error
	// Get returns what is under a name, and fails if that is more than limit bytes.
	Get(ctx context.Context, name string, limit int) ([]byte, error)
	// List yields the names with a prefix, in any order.
	List(ctx context.Context, prefix string) iter.Seq2[string, error]
	// Delete removes a name, unless a higher epoch is known: then it is ErrFenced.
	Delete(ctx context.Context, epoch uint64, name string) error
	// Fence makes an epoch known. From when it returns, Fence, Delete and Commit of lower ones are ErrFenced.
	Fence(ctx context.Context, epoch uint64) error
	// Newest is the name of the newest manifest, "" if there is none.
	Newest(ctx context.Context) (string, error)
	// Commit makes a manifest the newest, unless a higher epoch is known (ErrFenced) or the newest is not old (ErrMoved).
	Commit(ctx context.Context, epoch uint64, old, new string) error
}

// Writer says how a snapshot is taken.
type Writer struct {
	Epoch uint64    // of whoever runs the volume's workload; only grows
	Keep  Retention // of the earlier snapshots
	Floor Snapshot  // the newest that is known from elsewhere; the place must have it or a later one. Zero: none is known
	Flush bool      // write out first what the file system holds in memory, synced or not; writers go on
	Moved bool      // the place is another than before: it may know less than the volume does
	Full  bool      // read everything and put what is not there: when Verify found something missing
}

// Taken is a snapshot that is at its place.
type Taken struct {
	Snapshot
	Unchanged bool          // nothing was written since the last one, which this is
	Extents   int           // that were read
	Put       int64         // bytes that were put, sealed
	Took      time.Duration // from the cut on
}

// Snapshot takes a snapshot of an open volume, whose workload goes on. The server takes the cut and reads it; hashing, sealing
// and what waits for the place are here. A snapshot that is given up, by ctx or by an error, changes nothing but what
// Collect removes.
func (m *Manager) Snapshot(ctx context.Context, s Spec, p Place, w Writer) (Taken, error) {
	if !idForm.MatchString(s.ID) {
		return Taken{}, fmt.Errorf("volume ID %q: want 1 to 64 of a-z, 0-9 and -", s.ID)
	}
	defer m.lock(snapshots + s.ID)()
	t, err := m.snapshot(ctx, s, p, w)
	if err != nil {
		return Taken{}, fmt.Errorf("snapshot of volume %s: %w", s.ID, err)
	}
	return t, nil
}

// snapshots begins the name of the lock for what changes a place. Opening and closing go on meanwhile.
const snapshots = "snapshots/"

// newest reads the newest manifest of a place; it is nil if there is none.
func newest(ctx context.Context, p Place, k *keys, floor Snapshot) (*manifest, Digest, error) {
	name, err := p.Newest(ctx)
	if err != nil {
		return nil, Digest{}, fmt.Errorf("newest snapshot: %w", err)
	}
	if name == "" {
		if floor.Sequence > 0 {
			return nil, Digest{}, fmt.Errorf("%w: there is none, and %d is known", ErrRolledBack, floor.Sequence)
		}
		return nil, Digest{}, nil
	}
	if !placeForm.MatchString(name) || name[0] != 'm' {
		return nil, Digest{}, fmt.Errorf("newest snapshot: %w: its name is %.80q", ErrSnapshot, name)
	}
	digest := digestOf(name)
	man, err := load(ctx, p, k, digest)
	if err != nil {
		return nil, Digest{}, err
	}
	if man.sequence < floor.Sequence || man.sequence == floor.Sequence && floor.Digest != (Digest{}) && digest != floor.Digest {
		return nil, Digest{}, fmt.Errorf("%w: it is %d (%v), and %d (%v) is known", ErrRolledBack, man.sequence, digest, floor.Sequence, floor.Digest)
	}
	return man, digest, nil
}

func load(ctx context.Context, p Place, k *keys, d Digest) (*manifest, error) {
	b, err := p.Get(ctx, d.place(), maxManifest)
	if err != nil {
		return nil, fmt.Errorf("manifest %v: %w", d, err)
	}
	man, err := openManifest(k, d, b)
	if err != nil {
		return nil, fmt.Errorf("manifest %v: %w", d, err)
	}
	return man, nil
}

// superseded is ErrFenced if a place that forgot its fence has a snapshot of a higher epoch.
func superseded(man *manifest, epoch uint64) error {
	if man != nil && man.epoch > epoch {
		return fmt.Errorf("epoch %d: snapshot %d is of epoch %d: %w", epoch, man.sequence, man.epoch, ErrFenced)
	}
	return nil
}

// pick reads the manifest that is asked for.
func pick(ctx context.Context, p Place, k *keys, f From) (*manifest, Digest, error) {
	if f.Digest != (Digest{}) { // whatever the newest is
		man, err := load(ctx, p, k, f.Digest)
		return man, f.Digest, err
	}
	man, digest, err := newest(ctx, p, k, f.Floor)
	if err == nil && man == nil {
		err = ErrNone
	}
	return man, digest, err
}

// page reads page i of a snapshot.
func (man *manifest) page(ctx context.Context, p Place, k *keys, i int) (page, error) {
	n := pageLen(man.size, i)
	name := man.pages[i]
	if name == (pieceName{}) {
		return make(page, n), nil
	}
	b, err := p.Get(ctx, name.place(kindPage), sealedMore+32*n)
	if err == nil {
		b, err = k.openPiece(kindPage, name, b, 32*n)
	}
	if err != nil {
		return nil, fmt.Errorf("page %d (%s) of snapshot %d: %w", i, name.place(kindPage), man.sequence, err)
	}
	return decodePage(b), nil
}

// lost reports whether an error says that something is absent or changed, rather than out of reach.
func lost(err error) bool { return errors.Is(err, fs.ErrNotExist) || errors.Is(err, ErrSnapshot) }

func (m *Manager) snapshot(ctx context.Context, s Spec, p Place, w Writer) (Taken, error) {
	if s.Key == [32]byte{} {
		return Taken{}, errors.New("its key is all zeros")
	}
	k := snapshotKeys(s.Key, s.ID)
	if err := p.Fence(ctx, w.Epoch); err != nil {
		return Taken{}, fmt.Errorf("epoch %d: %w", w.Epoch, err)
	}
	parent, parentDigest, err := newest(ctx, p, k, w.Floor)
	if err == nil {
		err = superseded(parent, w.Epoch)
	}
	if err != nil {
		return Taken{}, err
	}
	// The parent's pages are where an incremental snapshot begins. Without one of them everything is read again.
	var from CutID
	var before []page
	if parent != nil && !w.Full {
		from = parent.cut
		for i := range parent.pages {
			pg, err := parent.page(ctx, p, k, i)
			if lost(err) {
				m.log.Warn("a full snapshot follows", "volume", s.ID, "error", err)
				from, before = CutID{}, nil
				break
			} else if err != nil {
				return Taken{}, err
			}
			before = append(before, pg)
		}
	}
	if w.Flush {
		if err := flush(filepath.Join(m.run(s.ID), "mnt")); err != nil {
			return Taken{}, fmt.Errorf("flush: %w", err)
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	begin := time.Now()
	a, err := ask(ctx, m.run(s.ID), request{Op: "cut", Base: from, Check: k.check()})
	if err != nil {
		return Taken{}, err
	}
	defer a.close()
	next := &manifest{sequence: 1, epoch: w.Epoch, time: begin, cut: a.first.Cut, size: a.first.Size}
	if parent != nil {
		next.sequence, next.parent = parent.sequence+1, parentDigest
		next.history = w.Keep.Keep(append(parent.history, parent.snapshot(parentDigest)))
		if parent.size != next.size {
			return Taken{}, fmt.Errorf("%w: snapshot %d has %d bytes, the volume %d", ErrSnapshot, parent.sequence, parent.size, next.size)
		}
	}
	if a.first.Sequence >= next.sequence && !w.Moved {
		return Taken{}, fmt.Errorf("%w: it is %d, and the volume has put %d there", ErrRolledBack, next.sequence-1, a.first.Sequence)
	}
	if parent != nil && !a.first.Full && a.first.Extents == 0 {
		return Taken{Snapshot: parent.snapshot(parentDigest), Unchanged: true, Took: time.Since(begin)}, nil
	}
	u := &upload{k: k, p: p, known: map[pieceName]bool{}}
	for i := range pages(next.size) {
		pg := make(page, pageLen(next.size, i))
		if !a.first.Full {
			copy(pg, before[i])
			for _, n := range pg {
				u.known[n] = true
			}
		}
		u.pages = append(u.pages, pg)
	}
	if a.first.Full { // what an earlier try put, and what earlier snapshots have
		for name, err := range p.List(ctx, "x-") {
			if err != nil {
				return Taken{}, fmt.Errorf("list extents: %w", err)
			}
			if placeForm.MatchString(name) && len(u.known) < int(next.size/Extent)*4 {
				u.known[pieceName(digestOf(name))] = true
			}
		}
	}
	count, err := u.extents(ctx, a, m.cfg.Uploads)
	if err == nil && count != a.first.Extents {
		err = fmt.Errorf("%d extents of %d came", count, a.first.Extents)
	}
	if err != nil {
		return Taken{}, err
	}
	for i, pg := range u.pages {
		name := pieceName{}
		if !pg.empty() {
			plain := pg.encode()
			name = k.nameOf(kindPage, plain)
			if parent == nil || a.first.Full || name != parent.pages[i] {
				if err := u.put(ctx, name.place(kindPage), k.sealPiece(kindPage, name, plain)); err != nil {
					return Taken{}, err
				}
			}
		}
		next.pages = append(next.pages, name)
	}
	sealed, digest := next.seal(k)
	if err := u.put(ctx, digest.place(), sealed); err != nil {
		return Taken{}, err
	}
	old := ""
	if parent != nil {
		old = parentDigest.place()
	}
	if err := p.Commit(ctx, w.Epoch, old, digest.place()); err != nil {
		// It may have happened.
		if now, again := p.Newest(ctx); again != nil || now != digest.place() {
			return Taken{}, fmt.Errorf("commit snapshot %d: %w", next.sequence, err)
		}
	}
	// If this is not heard, the next snapshot finds by the cut's ID what it follows.
	if _, err := a.say(request{Done: next.sequence}); err != nil {
		m.log.Warn("the volume's server did not hear of its snapshot", "volume", s.ID, "error", err)
	}
	next.time = time.Unix(0, next.time.UnixNano()).UTC()
	return Taken{Snapshot: next.snapshot(digest), Extents: count, Put: u.bytes, Took: time.Since(begin)}, nil
}

// digestOf is what a name of placeForm names.
func digestOf(name string) (d Digest) {
	hex.Decode(d[:], []byte(name[2:]))
	return d
}

func flush(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return unix.Syncfs(int(d.Fd()))
}

// upload is a snapshot on its way.
type upload struct {
	k *keys
	p Place

	mu    sync.Mutex
	known map[pieceName]bool // that are at the place
	pages []page
	bytes int64
}

func (u *upload) put(ctx context.Context, name string, sealed []byte) error {
	if err := u.p.Put(ctx, name, sealed); err != nil {
		return fmt.Errorf("put %s: %w", name, err)
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.bytes += int64(len(sealed))
	return nil
}

// extents puts the extents of a cut that the place does not have, and their names into the pages. It holds a few of them.
func (u *upload) extents(ctx context.Context, a *asked, workers int) (count int, err error) {
	type extent struct {
		i int
		b *[Extent]byte
	}
	work := make(chan extent)
	return count, parallel(ctx, workers, work, func(ctx context.Context, send func(extent) error) error {
		for {
			b := raw.Get().(*[Extent]byte)
			i, zero, err := a.next(b[:])
			if errors.Is(err, io.EOF) {
				return nil
			} else if err != nil {
				return err
			}
			count++
			if zero {
				raw.Put(b)
				u.name(i, pieceName{})
			} else if err := send(extent{i, b}); err != nil {
				return err
			}
		}
	}, func(ctx context.Context, e extent) error {
		defer raw.Put(e.b)
		name := u.k.nameOf(kindExtent, e.b[:])
		u.mu.Lock()
		known := u.known[name]
		u.mu.Unlock()
		if !known {
			if err := u.put(ctx, name.place(kindExtent), u.k.sealPiece(kindExtent, name, e.b[:])); err != nil {
				return err
			}
		}
		u.name(e.i, name)
		return nil
	})
}

func (u *upload) name(i int, n pieceName) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.pages[i/pageExtents][i%pageExtents] = n
	u.known[n] = true
}

// parallel lets workers do what a feeder sends. It returns the first error, after all have ended.
func parallel[T any](ctx context.Context, workers int, work chan T, feed func(context.Context, func(T) error) error, do func(context.Context, T) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var all sync.WaitGroup
	for range workers {
		all.Go(func() {
			for x := range work {
				if ctx.Err() != nil {
					continue
				}
				if err := do(ctx, x); err != nil {
					cancel(err)
				}
			}
		})
	}
	err := feed(ctx, func(x T) error {
		select {
		case work <- x:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	})
	if err != nil {
		cancel(err)
	}
	close(work)
	all.Wait()
	return context.Cause(ctx)
}

// From says what is restored.
type From struct {
	Epoch  uint64   // of the new writer; what an older one still uploads is not committed any more
	Digest Digest   // which snapshot; zero: the newest
	Floor  Snapshot // as in Writer
}

// Restore makes the image of a volume, which must be absent, from a snapshot. Everything is checked before the image gets
// its name: there is a whole one or none. What is missing or wrong is named by the error.
func (m *Manager) Restore(ctx context.Context, s Spec, p Place, f From) (Snapshot, error) {
	if !idForm.MatchString(s.ID) {
		return Snapshot{}, fmt.Errorf("volume ID %q: want 1 to 64 of a-z, 0-9 and -", s.ID)
	}
	defer m.lock(snapshots + s.ID)()
	defer m.lock(s.ID)()
	snap, err := m.restore(ctx, s, p, f)
	if err != nil {
		return Snapshot{}, fmt.Errorf("restore volume %s: %w", s.ID, err)
	}
	return snap, nil
}

func (m *Manager) restore(ctx context.Context, s Spec, p Place, f From) (Snapshot, error) {
	if s.Key == [32]byte{} {
		return Snapshot{}, errors.New("its key is all zeros")
	}
	image := m.image(s.ID)
	if _, err := os.Lstat(image); !errors.Is(err, fs.ErrNotExist) {
		return Snapshot{}, errors.Join(fmt.Errorf("%s: %w", image, fs.ErrExist), err)
	}
	// The volume's lock keeps others from making an image at the same time, and Sweep from removing this one.
	run := m.run(s.ID)
	if !alive(run) {
		if err := m.clean(s.ID); err != nil { // what a dead server left, a mount too
			return Snapshot{}, err
		}
	}
	for _, d := range []string{m.cfg.Dir, run} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return Snapshot{}, err
		}
	}
	lock, err := lockRun(run)
	if err != nil {
		return Snapshot{}, err
	}
	defer func() {
		os.RemoveAll(run)
		lock.Close()
	}()
	k := snapshotKeys(s.Key, s.ID)
	if err := p.Fence(ctx, f.Epoch); err != nil {
		return Snapshot{}, fmt.Errorf("epoch %d: %w", f.Epoch, err)
	}
	man, digest, err := pick(ctx, p, k, f)
	if err == nil {
		err = superseded(man, f.Epoch)
	}
	if err != nil {
		return Snapshot{}, err
	}
	// Nothing may say of the new image what is true of an earlier one.
	if err := untrack(tracking(image)); err != nil {
		return Snapshot{}, err
	}
	if err := makeImage(image, s.ID, man.size, s.Key, func(d *disk) error {
		return man.fetch(ctx, p, k, m.cfg.Uploads, func(i int, b []byte) error { return d.fill(b, int64(i)*Extent) })
	}); err != nil {
		return Snapshot{}, err
	}
	st, err := os.Stat(image)
	if err == nil {
		err = writeTrack(tracking(image), &half{id: k.id, size: man.size, generation: 1, closed: st.ModTime().UnixNano(), base: base{man.cut, man.sequence}, dirty: newSet(int(man.size / Extent))})
	}
	if err != nil { // the image is good; its next snapshot reads all of it
		m.log.Warn("restored volume without a tracking file", "volume", s.ID, "error", err)
	}
	return man.snapshot(digest), nil
}

// fill writes what of an extent is not zero: the rest stays a hole.
func (d *disk) fill(b []byte, off int64) error {
	for len(b) > 0 {
		n := 0
		for n < len(b) && !bytes.Equal(b[n:n+Sector], zero[:]) {
			n += Sector
		}
		if n > 0 {
			if _, err := d.WriteAt(b[:n], off); err != nil {
				return err
			}
		} else {
			n = Sector
		}
		b, off = b[n:], off+int64(n)
	}
	return nil
}

// fetch reads and checks all extents of a snapshot that are not zero, a few at a time.
func (man *manifest) fetch(ctx context.Context, p Place, k *keys, workers int, do func(i int, b []byte) error) error {
	type extent struct {
		i    int
		name pieceName
	}
	return parallel(ctx, workers, make(chan extent), func(ctx context.Context, send func(extent) error) error {
		for n := range man.pages {
			pg, err := man.page(ctx, p, k, n)
			if err != nil {
				return err
			}
			for j, name := range pg {
				if name == (pieceName{}) {
					continue
				}
				if err := send(extent{n*pageExtents + j, name}); err != nil {
					return err
				}
			}
		}
		return nil
	}, func(ctx context.Context, e extent) error {
		b, err := p.Get(ctx, e.name.place(kindExtent), sealedMore+Extent)
		if err == nil {
			b, err = k.openPiece(kindExtent, e.name, b, Extent)
		}
		if err != nil {
			return fmt.Errorf("extent %d (%s) of snapshot %d: %w", e.i, e.name.place(kindExtent), man.sequence, err)
		}
		return do(e.i, b)
	})
}

// Verify reads and checks everything of a snapshot, as Restore does, and makes nothing of it.
func Verify(ctx context.Context, s Spec, p Place, f From) (Snapshot, error) {
	k := snapshotKeys(s.Key, s.ID)
	man, digest, err := pick(ctx, p, k, f)
	if err == nil {
		err = man.fetch(ctx, p, k, 4, func(int, []byte) error { return nil })
	}
	if err != nil {
		return Snapshot{}, fmt.Errorf("verify volume %s: %w", s.ID, err)
	}
	return man.snapshot(digest), nil
}

// Snapshots returns the snapshots that are kept, oldest first. The newest vouches for the others.
func Snapshots(ctx context.Context, s Spec, p Place, floor Snapshot) ([]Snapshot, error) {
	man, digest, err := newest(ctx, p, snapshotKeys(s.Key, s.ID), floor)
	if err != nil {
		return nil, fmt.Errorf("snapshots of volume %s: %w", s.ID, err)
	}
	if man == nil {
		return nil, nil
	}
	return append(man.history, man.snapshot(digest)), nil
}

// Collected is what Collect did.
type Collected struct {
	Snapshots int // that are kept
	Kept      int // pieces and manifests
	Removed   int
}

// Collect removes from a place what no snapshot that is kept needs. No snapshot of this Manager is under way meanwhile; one of
// an older epoch is refused from now on, and one of a newer epoch makes the place refuse what this would still remove.
// If something is missing of a snapshot that is kept, so that what it needs is not known, nothing is removed.
func (m *Manager) Collect(ctx context.Context, s Spec, p Place, w Writer) (Collected, error) {
	defer m.lock(snapshots + s.ID)()
	c, err := collect(ctx, s, p, w)
	if err != nil {
		return c, fmt.Errorf("collect snapshots of volume %s: %w", s.ID, err)
	}
	return c, nil
}

func collect(ctx context.Context, s Spec, p Place, w Writer) (c Collected, err error) {
	k := snapshotKeys(s.Key, s.ID)
	if err := p.Fence(ctx, w.Epoch); err != nil {
		return c, fmt.Errorf("epoch %d: %w", w.Epoch, err)
	}
	man, digest, err := newest(ctx, p, k, w.Floor)
	if err == nil {
		err = superseded(man, w.Epoch)
	}
	if err != nil || man == nil {
		return c, err
	}
	need := map[[32]byte]bool{} // digests and keyed hashes do not meet
	mark := func(man *manifest, d Digest) error {
		need[d] = true
		for i, name := range man.pages {
			if name == (pieceName{}) || need[name] {
				continue
			}
			pg, err := man.page(ctx, p, k, i)
			if err != nil {
				return err
			}
			need[name] = true
			for _, n := range pg {
				need[n] = true
			}
		}
		c.Snapshots++
		return nil
	}
	if err := mark(man, digest); err != nil {
		return c, err
	}
	for _, old := range man.history {
		m, err := load(ctx, p, k, old.Digest)
		if err != nil {
			return c, err
		}
		if err := mark(m, old.Digest); err != nil {
			return c, err
		}
	}
	for _, prefix := range []string{"m-", "p-", "x-"} {
		for name, err := range p.List(ctx, prefix) {
			if err != nil {
				return c, fmt.Errorf("list: %w", err)
			}
			if !placeForm.MatchString(name) || !strings.HasPrefix(name, prefix) {
				continue // not ours
			}
			if need[digestOf(name)] {
				c.Kept++
				continue
			}
			if err := p.Delete(ctx, w.Epoch, name); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return c, fmt.Errorf("delete %s: %w", name, err)
			}
			c.Removed++
		}
	}
	return c, nil
}

// Dirty is how many bytes of an open volume may differ from its last snapshot, in whole extents.
func (m *Manager) Dirty(ctx context.Context, id string) (int64, error) {
	a, err := ask(ctx, m.run(id), request{Op: "dirty"})
	if err != nil {
		return 0, fmt.Errorf("volume %s: %w", id, err)
	}
	defer a.close()
	return a.first.Dirty, nil
}
