package location

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	mrand "math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"holdfast/disperse"
)

func copyDir(t testing.TB, from, to string) {
	t.Helper()
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
}

// TestAPowerCutLosesNothingAcknowledged cuts the log of a directory at every length behind what was acknowledged, and
// spoils what lies there: pages reach a disk in any order.
func TestAPowerCutLosesNothingAcknowledged(t *testing.T) {
	root := t.TempDir()
	base := filepath.Join(root, "base")
	d := open(t, Config{Path: base})
	a := announced(t, d.As(everything), 2)
	n, b := shardOf(t, 1000)
	gone, c := shardOf(t, 500)
	good(t, "put", a.Put(t.Context(), n, b, time.Time{}))
	good(t, "put", a.Put(t.Context(), gone, c, time.Time{}))
	good(t, "delete", a.Delete(t.Context(), gone))
	good(t, "head", a.PutHead(t.Context(), 5, []byte("five")))
	acked := d.current.size
	m, e := shardOf(t, 900)
	good(t, "put", a.Put(t.Context(), m, e, time.Time{}))
	good(t, "head", a.PutHead(t.Context(), 6, []byte("six")))
	size := d.current.size
	d.Close()
	log := segmentPath(base, 1)
	whole, err := os.ReadFile(log)
	if err != nil || int64(len(whole)) != size {
		t.Fatal(len(whole), size, err)
	}
	check := func(what string, bytesOf []byte) {
		t.Helper()
		dir := filepath.Join(root, "cut")
		defer os.RemoveAll(dir)
		copyDir(t, base, dir)
		good(t, "write", os.WriteFile(segmentPath(dir, 1), bytesOf, 0o600))
		for range 2 { // and again, after what was mended
			d := open(t, Config{Path: dir})
			a := announced(t, d.As(everything), 2)
			has(t, a, n, b)
			if i, err := a.Stat(t.Context(), gone); err != nil || i.Deleted.IsZero() {
				t.Errorf("%s: the delete is lost: %+v %v", what, i, err)
			}
			if h, err := a.Head(t.Context()); err != nil || h.Sequence < 5 {
				t.Errorf("%s: head %+v %v", what, h, err)
			}
			if err := a.Get(t.Context(), m, 0, make([]byte, len(e))); err == nil {
				has(t, a, m, e)
			} else if !errors.Is(err, ErrAbsent) {
				t.Errorf("%s: half a shard is there: %v", what, err)
			}
			x, y := shardOf(t, 700)
			good(t, "put", a.Put(t.Context(), x, y, time.Time{}))
			d.Close()
			d = open(t, Config{Path: dir})
			has(t, d.As(Read), x, y)
			d.Close()
		}
	}
	for cut := acked; cut <= size; cut += 1 + mrand.Int64N(20) {
		check(fmt.Sprintf("cut at %d of %d", cut-acked, size-acked), whole[:cut])
	}
	for range 60 {
		spoilt := bytes.Clone(whole)
		from := acked + mrand.Int64N(size-acked)
		clear(spoilt[from:min(from+1+mrand.Int64N(600), size)])
		if bytes.Equal(spoilt[acked+recordHead:acked+recordHead+900], e) {
			continue // the shard is whole
		}
		// What is behind a hole may count or not; nothing before it may be lost, nothing half may be served.
		dir := filepath.Join(root, "cut")
		copyDir(t, base, dir)
		good(t, "write", os.WriteFile(segmentPath(dir, 1), spoilt, 0o600))
		d := open(t, Config{Path: dir})
		has(t, d.As(Read), n, b)
		if err := d.As(Read).Get(t.Context(), m, 0, make([]byte, len(e))); err == nil {
			t.Error("a shard with a hole is served")
		}
		d.Close()
		os.RemoveAll(dir)
	}
}

// TestAHeadIsNeverThereWithoutItsShard spoils what an append wrote, wherever it may be torn: the shard alone may be
// there, the head alone never.
func TestNothingIsAcknowledgedBeforeItIsSynced(t *testing.T) {
	d := open(t, Config{Path: t.TempDir(), Segment: 1 << 20})
	defer d.Close()
	a := announced(t, d.As(everything), 1)
	var mu sync.Mutex
	synced := map[string]int64{}
	d.sync = func(f *os.File) error {
		st, err := f.Stat() // what came before is covered
		if err == nil {
			err = datasync(f)
		}
		mu.Lock()
		synced[f.Name()] = st.Size()
		mu.Unlock()
		return err
	}
	check := func(what string) {
		t.Helper()
		filepath.Walk(d.cfg.Path, func(path string, info os.FileInfo, err error) error {
			if err != nil || !info.Mode().IsRegular() || info.Size() <= segmentHead {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			if synced[path] != info.Size() {
				t.Errorf("%s: %s has %d bytes, of which %d are synced", what, path, info.Size(), synced[path])
			}
			return nil
		})
	}
	for i, size := range []int{100, 3000, 300 << 10, 60 << 10, 100 << 10, 64 << 10} {
		n, b := shardOf(t, size)
		good(t, "put", a.Put(t.Context(), n, b, time.Time{}))
		check("put")
		m, c := shardOf(t, size)
		good(t, "append", a.Append(t.Context(), m, c, uint64(2*i+1), []byte("head")))
		check("append")
		good(t, "delete", a.Delete(t.Context(), n))
		check("delete")
		good(t, "head", a.PutHead(t.Context(), uint64(2*i+2), []byte("head")))
		check("head")
	}
	good(t, "announce", a.Announce(t.Context(), 2, Holder{2}))
	check("announce")
}

func TestAHeadIsNeverThereWithoutItsShard(t *testing.T) {
	root := t.TempDir()
	base := filepath.Join(root, "base")
	d := open(t, Config{Path: base})
	a := announced(t, d.As(everything), 2)
	n, b := shardOf(t, 1000)
	good(t, "append", a.Append(t.Context(), n, b, 5, []byte("five")))
	acked := d.current.size
	m, c := shardOf(t, 9000)
	good(t, "append", a.Append(t.Context(), m, c, 6, bytes.Repeat([]byte("six"), 1000)))
	size := d.current.size
	d.Close()
	whole, err := os.ReadFile(segmentPath(base, 1))
	good(t, "read", err)
	both, shardOnly, neither := 0, 0, 0
	for i := range 200 {
		torn := bytes.Clone(whole)
		from := acked + mrand.Int64N(size-acked)
		switch i % 4 {
		case 0:
			torn = torn[:from]
		case 1: // the page of the shard's record was not written, the rest was
			from = acked
			fallthrough
		default:
			clear(torn[from:min(from+1+mrand.Int64N(3000), size)])
		}
		dir := filepath.Join(root, "cut")
		copyDir(t, base, dir)
		good(t, "write", os.WriteFile(segmentPath(dir, 1), torn, 0o600))
		d := open(t, Config{Path: dir})
		x := d.As(everything)
		has(t, x, n, b)
		h, err := x.Head(t.Context())
		good(t, "head", err)
		p := make([]byte, len(c))
		err = x.Get(t.Context(), m, 0, p)
		whole := err == nil && bytes.Equal(p, c)
		switch {
		case h.Sequence == 6 && whole:
			both++
		case h.Sequence == 5 && whole:
			shardOnly++
		case h.Sequence == 5 && errors.Is(err, ErrAbsent):
			neither++
		default:
			t.Errorf("head %d, shard: %v", h.Sequence, err)
		}
		d.Close()
		os.RemoveAll(dir)
	}
	if shardOnly == 0 || neither == 0 {
		t.Errorf("control: %d with both, %d with the shard, %d with neither", both, shardOnly, neither)
	}
}

// TestRotInWhatWasSyncedCostsNothingElse: records behind it count, since a later batch says that they were synced.
func TestRotInWhatWasSyncedCostsNothingElse(t *testing.T) {
	cfg := Config{Path: t.TempDir()}
	d := open(t, cfg)
	a := announced(t, d.As(everything), 1)
	n, b := shardOf(t, 1000)
	good(t, "append", a.Append(t.Context(), n, b, 1, []byte("one")))
	m, c := shardOf(t, 1000)
	good(t, "put", a.Put(t.Context(), m, c, time.Time{}))
	flip(t, d, n, 500)
	d.Close()
	d = open(t, cfg)
	defer d.Close()
	x := d.As(everything)
	wants(t, "get", x.Get(t.Context(), n, 0, make([]byte, 1)), ErrRotten)
	has(t, x, m, c)
	if h, err := x.Head(t.Context()); err != nil || h.Sequence != 1 {
		t.Errorf("head %+v %v", h, err)
	}
}

// TestGroups counts syncs: changes that come while one is under way share the next.
func TestGroups(t *testing.T) {
	d := open(t, Config{Path: t.TempDir()})
	defer d.Close()
	a := announced(t, d.As(everything), 1)
	var wg sync.WaitGroup
	batches := map[uint64]bool{}
	d.mu.Lock() // the first one to come leads, and waits here
	for i := range 50 {
		n, b := shardOf(t, 100)
		wg.Go(func() {
			if err := a.Append(t.Context(), n, b, uint64(i+1), []byte("h")); err != nil && !errors.Is(err, ErrOldHead) {
				t.Errorf("append: %v", err)
			}
		})
	}
	time.Sleep(500 * time.Millisecond) // a busy machine is slow to bring them here
	d.mu.Unlock()
	wg.Wait()
	_, _, err := d.current.each(func(r record, off int64) error {
		if !r.joined {
			batches[uint64(off)] = true
		}
		return nil
	})
	if err != nil || len(batches) > 25 {
		t.Errorf("50 appends at once took %d batches, %v", len(batches), err)
	}
	if h, err := a.Head(t.Context()); err != nil || h.Sequence != 50 {
		t.Errorf("head %+v %v", h, err)
	}
}

// TestARottenHeadOfARecordCostsThatRecordAlone flips bits in the log. Shards hold what looks like records, which a
// reader that searches for the next one must not take for such.
func TestARottenHeadOfARecordCostsThatRecordAlone(t *testing.T) {
	path := t.TempDir()
	d := open(t, Config{Path: path})
	a := announced(t, d.As(everything), 1)
	var names []Name
	data := map[Name][]byte{}
	forged := record{kind: kindEpoch, size: 16, epoch: 1 << 40, time: 1 << 60, crc: checksum(make([]byte, 16))}
	for i := range 20 {
		_, b := shardOf(t, 4000)
		for off := 0; off+recordHead+16 < len(b); off += 128 {
			forged.write(checksum(b[:16]), b[off:]) // the salt is not known outside
		}
		b[0] = byte(i)
		n, _ := disperse.NameOf(b)
		good(t, "put", a.Put(t.Context(), n, b, time.Time{}))
		names, data[n] = append(names, n), b
	}
	victim, _ := d.find(names[10])
	d.Close()
	f, err := os.OpenFile(segmentPath(path, 1), os.O_RDWR, 0)
	good(t, "open", err)
	f.WriteAt([]byte("rot"), victim.pos.offset()+20)
	f.Close()
	d = open(t, Config{Path: path})
	defer d.Close()
	if d.epoch != 1 {
		t.Errorf("epoch %d comes from a shard", d.epoch)
	}
	for i, n := range names {
		if i == 10 {
			wants(t, "the victim", d.As(Read).Get(t.Context(), n, 0, nil), ErrAbsent)
			continue
		}
		has(t, d.As(Read), n, data[n])
	}
}

// TestCompaction lets shards come and go until segments are rewritten many times, and compares with a map.
func TestCompaction(t *testing.T) {
	cl := newClock()
	cfg := Config{Path: t.TempDir(), Segment: 64 << 10, Hold: time.Hour, Now: cl.Now}
	d := open(t, cfg)
	a := announced(t, d.As(everything), 1)
	live, held := map[Name][]byte{}, map[Name][]byte{}
	var locked []Name
	rng := mrand.New(mrand.NewPCG(1, 2))
	pick := func(m map[Name][]byte) (n Name, ok bool) {
		for n := range m {
			return n, true
		}
		return n, false
	}
	deletedAt := map[Name]time.Time{}
	end := cl.Now().Add(1000 * 24 * time.Hour)
	for i := range 6000 {
		switch k := rng.IntN(100); {
		case k < 45:
			size := rng.IntN(3000)
			if k == 0 {
				size = embedLimit + rng.IntN(1000)
			}
			n, b := shardOf(t, size)
			live[n] = b
			var until time.Time
			if k == 1 && len(locked) < 20 {
				locked, until = append(locked, n), end
			}
			good(t, "put", a.Put(t.Context(), n, b, until))
		case k < 85:
			n, ok := pick(live)
			if !ok {
				continue
			}
			if err := a.Delete(t.Context(), n); errors.Is(err, ErrLocked) {
				continue
			} else if err != nil {
				t.Fatal(err)
			}
			held[n], deletedAt[n] = live[n], cl.Now()
			delete(live, n)
		case k < 88:
			if n, ok := pick(held); ok {
				good(t, "undelete", a.Undelete(t.Context(), n))
				live[n] = held[n]
				delete(held, n)
			}
		case k < 90:
			if n, ok := pick(held); ok {
				good(t, "purge", a.Purge(t.Context(), n))
				delete(held, n)
			}
		default:
			good(t, "head", a.PutHead(t.Context(), uint64(i+1), []byte(fmt.Sprint(i))))
		}
		cl.Add(20 * time.Second)
		if i%200 != 199 {
			continue
		}
		for n := range held {
			if cl.Now().Sub(deletedAt[n]) >= cfg.Hold {
				delete(held, n)
			}
		}
		good(t, "sweep", d.Sweep(t.Context()))
		if i%1000 == 999 {
			good(t, "close", d.Close())
			d = open(t, cfg)
			a = announced(t, d.As(everything), 1)
		}
		if got := list(t, a, Live); len(got) != len(live) {
			t.Fatalf("step %d: %d live, want %d", i, len(got), len(live))
		}
		if got := list(t, a, Held); len(got) != len(held) {
			t.Fatalf("step %d: %d held, want %d", i, len(got), len(held))
		}
		for n, b := range live {
			has(t, a, n, b)
		}
		for _, n := range locked {
			wants(t, "delete", a.Delete(t.Context(), n), ErrLocked)
		}
		if t.Failed() {
			t.FailNow()
		}
	}
	var size, wanted int64
	for _, s := range d.segments {
		size += s.size
	}
	for _, b := range live {
		wanted += int64(len(b)) + recordHead
	}
	if d.current.id < 20 || len(d.segments) >= int(d.current.id) {
		t.Errorf("control: %d segments of %d were made: nothing was compacted", len(d.segments), d.current.id)
	}
	if size > 3*wanted+4*cfg.Segment {
		t.Errorf("the log has %d bytes for %d", size, wanted)
	}
	if h, _ := a.Head(t.Context()); h.Sequence < 5900 {
		t.Errorf("head %+v", h)
	}
}

// TestReadersDuringCompaction reads while segments go.
func TestReadersDuringCompaction(t *testing.T) {
	d := open(t, Config{Path: t.TempDir(), Segment: 64 << 10})
	defer d.Close()
	a := announced(t, d.As(everything), 1)
	var keep []Name
	data := map[Name][]byte{}
	var bury []Name
	for i := range 600 {
		n, b := shardOf(t, 1000)
		good(t, "put", a.Put(t.Context(), n, b, time.Time{}))
		if i%4 == 0 {
			keep, data[n] = append(keep, n), b
		} else {
			bury = append(bury, n)
		}
	}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					n := keep[mrand.IntN(len(keep))]
					has(t, a, n, data[n])
				}
			}
		})
	}
	for i, n := range bury {
		good(t, "delete", a.Delete(t.Context(), n))
		good(t, "purge", a.Purge(t.Context(), n))
		if i%50 == 0 {
			good(t, "sweep", d.Sweep(t.Context()))
		}
	}
	good(t, "sweep", d.Sweep(t.Context()))
	close(stop)
	wg.Wait()
	if len(d.segments) > 8 {
		t.Errorf("control: %d segments are left", len(d.segments))
	}
}

func TestADirectoryBelongsToOneProcess(t *testing.T) {
	path := t.TempDir()
	d := open(t, Config{Path: path})
	if _, err := Open(Config{Path: path}); err == nil {
		t.Error("opened twice")
	}
	d.Close()
	open(t, Config{Path: path}).Close()
}

// TestAFileThatIsMissingIsRot: and one that no record speaks of goes.
func TestAFileThatIsMissingIsRot(t *testing.T) {
	cfg := Config{Path: t.TempDir()}
	d := open(t, cfg)
	a := announced(t, d.As(everything), 1)
	n, b := shardOf(t, 100<<10)
	m, c := shardOf(t, 100<<10)
	good(t, "put", a.Put(t.Context(), n, b, time.Time{}))
	good(t, "put", a.Put(t.Context(), m, c, time.Time{}))
	files := filesOf(t, d)
	e, _ := d.find(n)
	good(t, "remove", os.Remove(d.filePath(e.file)))
	good(t, "orphan", os.WriteFile(files[0]+"0", b, 0o600))
	d.Close()
	d = open(t, cfg)
	defer d.Close()
	wants(t, "get", d.As(Read).Get(t.Context(), n, 0, nil), ErrRotten)
	has(t, d.As(Read), m, c)
	if got := filesOf(t, d); len(got) != 1 {
		t.Errorf("files: %v", got)
	}
}

// TestADirectoryThatWasRemovedAcknowledgesNothing: the files that are open take bytes that nobody finds again.
func TestADirectoryThatWasRemovedAcknowledgesNothing(t *testing.T) {
	for _, size := range []int{100, 100 << 10} {
		cfg := Config{Path: t.TempDir()}
		d := open(t, cfg)
		defer d.Close()
		a := announced(t, d.As(everything), 1)
		n, b := shardOf(t, size)
		good(t, "put", a.Put(t.Context(), n, b, time.Time{}))
		good(t, "remove", os.RemoveAll(cfg.Path))
		m, c := shardOf(t, size)
		if err := a.Put(t.Context(), m, c, time.Time{}); err == nil {
			t.Errorf("%d bytes were acknowledged", size)
		}
		small, c := shardOf(t, 100)
		wants(t, "put", a.Put(t.Context(), small, c, time.Time{}), ErrBroken)
		wants(t, "delete", a.Delete(t.Context(), n), ErrBroken)
	}
}

// TestFullDisk fills a small tmpfs. Reads and deletes go on, and nothing is spoilt.
func TestFullDisk(t *testing.T) {
	path := t.TempDir()
	if err := syscall.Mount("tmpfs", path, "tmpfs", 0, "size=24m"); err != nil {
		t.Skipf("mount a tmpfs: %v", err)
	}
	defer syscall.Unmount(path, 2 /* detach */)
	cfg := Config{Path: filepath.Join(path, "d"), Segment: 4 << 20}
	d := open(t, cfg)
	a := announced(t, d.As(everything), 1)
	data := map[Name][]byte{}
	var full int
	for i := 0; full < 200; i++ {
		size := 30 << 10
		if i%20 == 0 {
			size = 300 << 10
		}
		if full > 50 {
			size = 100
		}
		n, b := shardOf(t, size)
		switch err := a.Put(t.Context(), n, b, time.Time{}); {
		case err == nil:
			data[n] = b
		case errors.Is(err, ErrFull):
			full++
			wants(t, "what did not fit", a.Get(t.Context(), n, 0, nil), ErrAbsent)
		default:
			t.Fatalf("put: %v", err)
		}
	}
	for range 2 {
		if got := list(t, a, Live); len(got) != len(data) {
			t.Errorf("%d shards, want %d", len(got), len(data))
		}
		for n, b := range data {
			has(t, a, n, b)
		}
		good(t, "close", d.Close())
		d = open(t, cfg)
		a = announced(t, d.As(everything), 1)
	}
	good(t, "head", a.PutHead(t.Context(), 1, []byte("head")))
	m, c := shardOf(t, 300<<10)
	wants(t, "append", a.Append(t.Context(), m, c, 2, []byte("two")), ErrFull)
	wants(t, "what did not fit", a.Get(t.Context(), m, 0, nil), ErrAbsent)
	if h, err := a.Head(t.Context()); err != nil || h.Sequence != 1 {
		t.Errorf("head without its shard: %+v %v", h, err)
	}
	// To make room, it needs some.
	for n := range data {
		good(t, "delete", a.Delete(t.Context(), n))
		good(t, "purge", a.Purge(t.Context(), n))
		delete(data, n)
		if len(data) < 100 {
			break
		}
	}
	good(t, "sweep", d.Sweep(t.Context()))
	n, b := shardOf(t, 300<<10)
	good(t, "put after deletes", a.Put(t.Context(), n, b, time.Time{}))
	data[n] = b
	good(t, "close", d.Close())
	d = open(t, cfg)
	defer d.Close()
	for n, b := range data {
		has(t, d.As(Read), n, b)
	}
}

// TestScrubKeepsItsPace: and finds what somebody changed who mended the checksums, too.
func TestScrub(t *testing.T) {
	d := open(t, Config{Path: t.TempDir()})
	defer d.Close()
	a := announced(t, d.As(everything), 1)
	for range 4 {
		n, b := shardOf(t, 256<<10)
		good(t, "put", a.Put(t.Context(), n, b, time.Time{}))
	}
	// Swap two files: each is whole by its checksums, and of another name.
	files := filesOf(t, d)
	good(t, "swap", errors.Join(os.Rename(files[0], files[0]+"x"), os.Rename(files[1], files[0]), os.Rename(files[0]+"x", files[1])))
	begin := time.Now()
	s, err := d.Scrub(t.Context(), 2<<20)
	if took := time.Since(begin); err != nil || s.Shards != 4 || s.Rotten != 2 || took < 400*time.Millisecond || took > 2*time.Second {
		t.Errorf("scrub of 1 MiB at 2 MiB/s took %v: %+v %v", took, s, err)
	}
	if st, _ := a.Status(t.Context()); st.Rotten != 2 || st.Scrubbed.IsZero() {
		t.Errorf("status %+v", st)
	}
}

// FuzzLog opens a log of any bytes behind a good begin: it opens or fails, and what it serves has its checksum.
func FuzzLog(f *testing.F) {
	seed := f.TempDir()
	d := open(f, Config{Path: seed})
	a := announced(f, d.As(everything), 1)
	n, b := shardSeeded(1, 300)
	good(f, "put", a.Put(f.Context(), n, b, time.Time{}))
	good(f, "delete", a.Delete(f.Context(), n))
	good(f, "head", a.PutHead(f.Context(), 1, []byte("h")))
	d.Close()
	whole, err := os.ReadFile(segmentPath(seed, 1))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(whole[segmentHead:])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, in []byte) {
		path, err := os.MkdirTemp("/dev/shm", "holdfast-location-*") // a disk's syncs are most of the time
		if err != nil {
			path = t.TempDir()
		}
		defer os.RemoveAll(path)
		good(t, "mkdir", os.Mkdir(filepath.Join(path, "log"), 0o700))
		// Records are sealed again, so that the search goes beyond checksums.
		log := append(bytes.Clone(whole[:segmentHead]), in...)
		for off := segmentHead; off+recordHead <= len(log); {
			r := record{kind: log[off+4], size: uint32(log[off+11]) | uint32(log[off+10])<<8, name: Name(log[off+64:])}
			copy(log[off:], sealed(log[:segmentHead], log[off:off+recordHead]))
			off += int(r.length())
		}
		good(t, "write", os.WriteFile(segmentPath(path, 1), log, 0o600))
		d, err := Open(Config{Path: path})
		if err != nil {
			return
		}
		shards, size := d.shards, d.bytes
		for _, n := range list(t, d.As(Read), Live) {
			i, _ := d.As(Read).Stat(t.Context(), n)
			if err := d.As(Read).Get(t.Context(), n, 0, make([]byte, i.Size)); err != nil && !errors.Is(err, ErrRotten) {
				t.Errorf("get: %v", err)
			}
		}
		d.Close()
		d = open(t, Config{Path: path})
		defer d.Close()
		if d.shards != shards || d.bytes != size || shards < 0 || size < 0 {
			t.Errorf("%d shards of %d bytes, before %d of %d", d.shards, d.bytes, shards, size)
		}
	})
}

// sealed is the fixed part of a record with the right checksum.
func sealed(head, b []byte) []byte {
	out := bytes.Clone(b)
	binary.BigEndian.PutUint32(out, crc32.Update(checksum(head[16:]), castagnoli, out[4:]))
	return out
}
