package location

import (
	"bytes"
	"cmp"
	"crypto/subtle"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"holdfast/disperse"
)

const (
	embedLimit = 64 << 10  // larger shards have a file of their own
	blockSize  = 64 << 10  // what one checksum covers in such a file
	pieceSize  = 256 << 10 // what is read or written at once; a multiple of blockSize
	headFixed  = 16
	fanOut     = 4096 // files of a directory
)

// Config configures a Dir.
type Config struct {
	Path      string
	Quota     Quota
	Hold      time.Duration // of deletes; 0 means 24h
	MaxRetain time.Duration // the longest lock from now on; 0 means ten years
	Segment   int64         // bytes of a segment of the log; 0 means 128 MiB
	Scrub     int64         // bytes a second that Run checks; 0 means 8 MiB, less turns it off
	// Trusted says that Put's caller has computed the name from the very bytes: they are not hashed again.
	Trusted bool
	Now     func() time.Time // nil is time.Now
	Log     *slog.Logger     // nil discards
}

// entry is what the log says of a shard.
type entry struct {
	size, crc       uint32
	pos             position // of its newest kindShard or kindFile
	file            uint64   // 0: it is in the log
	put             int64
	retain, deleted int64 // 0: not
}

// earlierHead is the last head of an epoch, which another has replaced: what a thief of the store's credential says is the end
// of the log is not the end of it.
type earlierHead struct {
	Head
	at  int64 // when it was replaced
	pos position
}

// Dir keeps the shards of one store in a directory, which belongs to it alone.
type Dir struct {
	cfg   Config
	log   *slog.Logger
	lock  *os.File
	files *os.File // the directory of files

	mu       sync.RWMutex
	index    [4096]map[Name]entry // by the first bits, so that lists are in order
	held     map[Name]struct{}
	rotten   map[Name]struct{}
	segments map[uint32]*segment
	current  *segment
	shards   int64
	bytes    int64
	pending  Quota // of puts that are under way
	nextFile uint64
	seen     int64 // the largest time
	written  int64 // the time of the newest record
	epoch    Epoch
	holder   Holder
	epochPos position
	head     Head
	headPos  position
	earlier  []earlierHead // the oldest first
	broken   error
	scrubbed time.Time

	queue    []*change // guarded by mu
	flushing bool
	young    Head                // the head, with what the flushing change will do to it
	out      []byte              // the flushing change's
	names    map[Name]struct{}   // the flushing change's
	dirty    map[string]struct{} // directories of files to sync; guarded by mu

	sweeping sync.Mutex
	pieces   sync.Pool // *[]byte of pieceSize
	small    sync.Pool // *[]byte of embedLimit
	trees    sync.Pool // *disperse.Tree
	proofs   chan struct{}
	sync     func(*os.File) error // datasync, but in tests
}

// A change becomes one record, if decide wants it when its turn comes, and a head behind it if there is one.
type change struct {
	// decide is called with mu held and no other change of that name in the same batch. A nil record is no change.
	decide func() (*record, error)
	name   Name
	body   []byte
	head   []byte // the body of a kindHead
	by     Holder // of that
	fills  bool   // it is refused when the disk is full
	bad    bool   // the body is known to be rotten, and must not get a checksum that says otherwise

	rec  *record
	then *record // of the head
	err  error
	done chan bool // true: lead the next batch
}

// Open opens a directory, or makes it. It reads the log; what a crash left unfinished is removed.
func Open(cfg Config) (*Dir, error) {
	cfg.Hold = cmp.Or(cfg.Hold, 24*time.Hour)
	cfg.MaxRetain = cmp.Or(cfg.MaxRetain, 3653*24*time.Hour)
	cfg.Segment = min(cmp.Or(cfg.Segment, 128<<20), 2<<30)
	cfg.Scrub = cmp.Or(cfg.Scrub, 8<<20)
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	d := &Dir{
		cfg: cfg, log: cmp.Or(cfg.Log, slog.New(slog.DiscardHandler)), held: map[Name]struct{}{}, rotten: map[Name]struct{}{}, segments: map[uint32]*segment{},
		proofs: make(chan struct{}, maxProofs), sync: datasync, names: map[Name]struct{}{}, dirty: map[string]struct{}{}, nextFile: 1,
		pieces: sync.Pool{New: func() any { b := make([]byte, pieceSize); return &b }},
		small:  sync.Pool{New: func() any { b := make([]byte, embedLimit); return &b }},
		trees:  sync.Pool{New: func() any { return new(disperse.Tree) }},
	}
	for i := range d.index {
		d.index[i] = map[Name]entry{}
	}
	if err := d.open(); err != nil {
		d.Close()
		return nil, fmt.Errorf("open location %s: %w", cfg.Path, err)
	}
	return d, nil
}

func (d *Dir) open() error {
	for _, sub := range []string{"log", "files"} {
		if err := os.MkdirAll(filepath.Join(d.cfg.Path, sub), 0o700); err != nil {
			return err
		}
	}
	var err error
	if d.lock, err = os.OpenFile(filepath.Join(d.cfg.Path, "lock"), os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return err
	}
	if err := syscall.Flock(int(d.lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return fmt.Errorf("another process has it: %w", err)
	}
	if err := syncDir(d.cfg.Path); err != nil {
		return err
	}
	if d.files, err = os.Open(filepath.Join(d.cfg.Path, "files")); err != nil {
		return err
	}
	names, err := readDir(filepath.Join(d.cfg.Path, "log"))
	if err != nil {
		return err
	}
	slices.Sort(names)
	for i, n := range names {
		id, err := strconv.ParseUint(n, 16, 32)
		if err != nil || len(n) != 8 {
			return fmt.Errorf("log has a file %q", n)
		}
		if err := d.replay(uint32(id), i == len(names)-1); err != nil {
			return err
		}
	}
	if d.current == nil {
		if d.current, err = newSegment(d.cfg.Path, uint32(len(names)+1)); err != nil {
			return err
		}
		d.segments[d.current.id] = d.current
	}
	return d.tidy()
}

// doubt is a record behind something wrong, before it is known whether that was synced.
type doubt struct {
	r    record
	off  int64
	body []byte
	bad  bool // the body is
}

// replay applies a segment. Only the last one can have an end that is not whole, since a batch is synced before the next.
func (d *Dir) replay(id uint32, last bool) error {
	s, err := openSegment(d.cfg.Path, id)
	if err != nil {
		return err
	}
	if s == nil {
		if !last {
			return fmt.Errorf("segment %08x has no beginning", id)
		}
		return os.Remove(segmentPath(d.cfg.Path, id))
	}
	d.segments[id], d.current = s, s
	// A batch is synced before the next one is written. So what is wrong in the last batch was never acknowledged, and goes
	// with all that follows it in there; what is wrong before the last batch is rot.
	var doubtful []doubt
	torn, before := int64(-1), int64(segmentHead) // where the doubt begins; the end of the record before
	buf := make([]byte, embedLimit)
	end, skipped, err := s.each(func(r record, off int64) error {
		if !r.joined {
			d.believe(id, doubtful)
			doubtful, torn = doubtful[:0], -1
		}
		if off != before && r.joined && torn < 0 {
			torn = before
		}
		before = off + r.length()
		var p []byte
		bad := false
		if last && r.body() > 0 || r.kind == kindHead || r.kind == kindEpoch || r.kind == kindEarlier {
			p = buf[:r.body()]
			switch err := s.read(off, p, r.crc); {
			case errors.Is(err, ErrRotten):
				bad = true
				if torn < 0 {
					torn = off
				}
			case err != nil:
				return err
			}
		}
		if torn >= 0 {
			if r.kind == kindShard || bad {
				p = nil
			}
			doubtful = append(doubtful, doubt{r, off, slices.Clone(p), bad})
			return nil
		}
		d.apply(&r, p, at(id, off))
		return nil
	})
	if err != nil {
		return err
	}
	if !last {
		d.believe(id, doubtful)
	} else if torn >= 0 {
		end = torn
	}
	if skipped > 0 {
		d.log.Warn("part of the log is unreadable", "segment", id, "bytes", skipped)
	}
	if last && end < s.size {
		if err := errors.Join(s.f.Truncate(end), datasync(s.f)); err != nil {
			return err
		}
	}
	s.size = end
	return nil
}

// believe applies records that were synced, though something before them is wrong.
func (d *Dir) believe(id uint32, all []doubt) {
	for _, x := range all {
		d.apply(&x.r, x.body, at(id, x.off))
		if x.bad && x.r.kind == kindShard {
			d.rotten[x.r.name] = struct{}{}
		}
	}
}

// tidy removes files that no record speaks of, and finds those that are missing.
func (d *Dir) tidy() error {
	known := map[uint64]Name{}
	for _, bucket := range d.index {
		for n, e := range bucket {
			if e.file != 0 {
				known[e.file] = n
			}
		}
	}
	root := filepath.Join(d.cfg.Path, "files")
	dirs, err := readDir(root)
	if err != nil {
		return err
	}
	for _, sub := range dirs {
		files, err := readDir(filepath.Join(root, sub))
		if err != nil {
			return err
		}
		for _, f := range files {
			id, err := strconv.ParseUint(f, 16, 64)
			if _, ok := known[id]; ok && err == nil {
				delete(known, id)
			} else if err := os.Remove(filepath.Join(root, sub, f)); err != nil {
				return err
			}
			d.nextFile = max(d.nextFile, id+1)
		}
	}
	for _, n := range known {
		d.rotten[n] = struct{}{}
	}
	return nil
}

// Close ends the use of the directory. Nothing may be under way.
func (d *Dir) Close() error {
	var errs []error
	for _, s := range d.segments {
		errs = append(errs, s.f.Close())
	}
	if d.files != nil {
		errs = append(errs, d.files.Close())
	}
	if d.lock != nil {
		errs = append(errs, d.lock.Close())
	}
	return errors.Join(errs...)
}

func bucketOf(n Name) int { return int(n[0])<<4 | int(n[1])>>4 }

func (d *Dir) find(n Name) (entry, bool) {
	e, ok := d.index[bucketOf(n)][n]
	return e, ok
}

// now is the location's time in milliseconds, which never goes back, not over restarts either.
func (d *Dir) now() int64 {
	d.seen = max(d.seen, d.cfg.Now().UnixMilli())
	return d.seen
}

func (d *Dir) filePath(id uint64) string {
	return filepath.Join(d.cfg.Path, "files", string(appendName(nil, id)))
}

const nameSize = 8 + 1 + 16

// appendName appends the name of a file below files.
func appendName(b []byte, id uint64) []byte {
	return appendHex(append(appendHex(b, id/fanOut, 8), '/'), id, 16)
}

func appendHex(b []byte, v uint64, digits int) []byte {
	for i := digits - 1; i >= 0; i-- {
		b = append(b, "0123456789abcdef"[v>>(4*i)&15])
	}
	return b
}

// apply is the meaning of a record, at work and when the log is read. It returns the file that is not needed any more.
func (d *Dir) apply(r *record, body []byte, pos position) (unused uint64) {
	d.seen, d.written = max(d.seen, r.time), max(d.written, r.time)
	d.epoch = max(d.epoch, r.epoch)
	bucket := d.index[bucketOf(r.name)]
	old, had := bucket[r.name]
	dead := func(pos position, n int64) {
		if s := d.segments[pos.segment()]; s != nil && pos != 0 {
			s.dead += n
		}
	}
	drop := func() {
		if !had {
			return
		}
		was := record{kind: kindShard, size: old.size}
		if old.file != 0 {
			was.kind = kindFile
		}
		dead(old.pos, was.length())
		d.shards--
		d.bytes -= int64(old.size)
		if old.file != r.file {
			unused = old.file
		}
	}
	switch r.kind {
	case kindShard, kindFile:
		drop()
		bucket[r.name] = entry{r.size, r.crc, pos, r.file, r.put, r.retain, r.deleted}
		d.shards++
		d.bytes += int64(r.size)
		d.nextFile = max(d.nextFile, r.file+1)
		if r.file == 0 || old.file != r.file {
			delete(d.rotten, r.name)
		}
	case kindState:
		if had {
			old.retain, old.deleted = r.retain, r.deleted
			bucket[r.name] = old
		}
	case kindGone:
		drop()
		delete(bucket, r.name)
		delete(d.rotten, r.name)
	case kindHead:
		if len(body) >= headFixed {
			h := headOf(body)
			if d.head.Epoch != 0 && h.Epoch != d.head.Epoch {
				d.keepHead(earlierHead{d.head, r.time, d.headPos})
				d.head.Bytes = nil
			} else {
				d.headDies(d.headPos, d.head)
			}
			d.head = Head{h.Epoch, h.Sequence, append(d.head.Bytes[:0], h.Bytes...)}
			d.headPos = pos
		}
	case kindEarlier:
		if len(body) >= headFixed {
			h := headOf(body)
			d.keepHead(earlierHead{Head{h.Epoch, h.Sequence, slices.Clone(h.Bytes)}, r.deleted, pos})
		}
	case kindEpoch:
		if len(body) == len(d.holder) {
			dead(d.epochPos, (&record{kind: kindEpoch, size: uint32(len(body))}).length())
			d.holder, d.epochPos = Holder(body), pos
		}
	}
	if e, ok := bucket[r.name]; ok && e.deleted != 0 {
		d.held[r.name] = struct{}{}
	} else {
		delete(d.held, r.name)
	}
	return unused
}

// keepHead keeps an earlier head as long as deletes are held. When there are many the oldest stay: whoever announces one epoch
// after another drives nothing out. One that a compaction moves takes its own place.
func (d *Dir) keepHead(h earlierHead) {
	d.forget()
	for i := range d.earlier {
		if d.earlier[i].Epoch == h.Epoch && d.earlier[i].Sequence == h.Sequence {
			d.earlier[i].pos = h.pos
			return
		}
	}
	if len(d.earlier) < MaxHeads && d.seen-h.at < d.cfg.Hold.Milliseconds() {
		i, _ := slices.BinarySearchFunc(d.earlier, h.at, func(e earlierHead, at int64) int { return cmp.Compare(e.at, at+1) })
		d.earlier = slices.Insert(d.earlier, i, h)
	} else {
		d.headDies(h.pos, h.Head)
	}
}

// forget lets go of earlier heads whose hold is over. Call it with mu held.
func (d *Dir) forget() {
	d.earlier = slices.DeleteFunc(d.earlier, func(h earlierHead) bool {
		over := d.seen-h.at >= d.cfg.Hold.Milliseconds()
		if over {
			d.headDies(h.pos, h.Head)
		}
		return over
	})
}

// headDies notes that a head's record says nothing any more.
func (d *Dir) headDies(pos position, h Head) {
	if s := d.segments[pos.segment()]; s != nil && pos != 0 {
		s.dead += (&record{kind: kindHead, size: uint32(headFixed + len(h.Bytes))}).length()
	}
}

// commit makes changes durable. Whoever finds nobody writing leads: he writes what is queued, and hands on.
func (d *Dir) commit(changes ...*change) error {
	d.mu.Lock()
	for _, c := range changes {
		c.done = make(chan bool, 1)
	}
	d.queue = append(d.queue, changes...)
	lead := !d.flushing
	d.flushing = true
	d.mu.Unlock()
	if lead {
		d.flush()
	}
	var errs []error
	for _, c := range changes {
		for <-c.done {
			d.flush()
		}
		if c.err != nil {
			errs = append(errs, c.err)
		}
	}
	return errors.Join(errs...)
}

// flush writes one batch, and makes the first of the next one lead.
func (d *Dir) flush() {
	full := d.prepare()
	d.mu.Lock()
	batch, dirs := d.decide(full)
	d.mu.Unlock()

	var err error
	if len(d.out) > 0 {
		for dir := range dirs {
			err = errors.Join(err, syncDir(dir))
		}
		err = errors.Join(err, d.write())
	}
	if err != nil && !errors.Is(err, ErrFull) {
		err = fmt.Errorf("%w: %v", ErrBroken, err)
	}

	d.mu.Lock()
	var unused []uint64
	pos := at(d.current.id, d.current.size)
	for _, c := range batch {
		switch {
		case c.rec == nil && c.then == nil:
			continue
		case err != nil:
			c.err = err
			continue
		}
		if c.rec != nil {
			if f := d.apply(c.rec, c.body, pos); f != 0 {
				unused = append(unused, f)
			}
			if c.bad {
				d.rotten[c.name] = struct{}{}
			}
			pos += position(c.rec.length())
		}
		if c.then != nil {
			d.apply(c.then, c.head, pos)
			pos += position(c.then.length())
		}
	}
	if err == nil {
		d.current.size += int64(len(d.out))
	} else if errors.Is(err, ErrBroken) && d.broken == nil {
		d.broken = err
		d.log.Error("the location cannot write any more", "dir", d.cfg.Path, "error", err)
	}
	d.queue = d.queue[len(batch):]
	var next *change
	if len(d.queue) > 0 {
		next = d.queue[0]
	} else {
		d.flushing, d.queue = false, nil
	}
	if cap(d.out) > 2*maxBatch {
		d.out = nil
	}
	d.mu.Unlock()
	for _, f := range unused {
		os.Remove(d.filePath(f)) // tidy does it otherwise
	}
	for _, c := range batch {
		c.done <- false
	}
	if next != nil {
		next.done <- true
	}
}

// prepare makes room for a batch; it says whether there is none for shards.
func (d *Dir) prepare() (full error) {
	s := d.current
	if s.size >= d.cfg.Segment {
		next, err := newSegment(d.cfg.Path, s.id+1)
		if err == nil {
			d.mu.Lock()
			d.segments[next.id], d.current = next, next
			d.mu.Unlock()
			return nil
		}
		full = err
	} else {
		full = s.room()
	}
	if isFull(full) {
		return ErrFull
	}
	return full
}

// decide takes the changes of the next batch from the queue and lays their records out.
func (d *Dir) decide(full error) (batch []*change, dirs map[string]struct{}) {
	clear(d.names)
	d.out = d.out[:0]
	d.young = d.head
	now := d.now()
	heads := false
	for _, c := range d.queue {
		// Heads of one batch know of each other; what else has no name, like a head that a compaction moves, does not.
		_, twice := d.names[c.name]
		if c.head != nil {
			_, moved := d.names[Name{}]
			twice = twice || moved
		} else if c.name == (Name{}) {
			twice = twice || heads
		}
		heads = heads || c.head != nil
		if twice || len(d.out) > 0 && len(d.out)+2*recordHead+len(c.body)+len(c.head) > maxBatch {
			break
		}
		if c.decide != nil {
			d.names[c.name] = struct{}{}
		}
		batch = append(batch, c)
		switch {
		case d.broken != nil:
			c.err = d.broken
		case c.fills && full != nil:
			c.err = full
		default:
			if c.head != nil {
				c.then, c.err = d.follows(c.head, c.by)
			}
			if c.err == nil && c.decide != nil {
				c.rec, c.err = c.decide()
			}
			if c.err != nil {
				c.then = nil
			}
		}
		if c.rec != nil {
			d.lay(c.rec, c.body, now, c.bad)
		}
		if c.then != nil {
			d.lay(c.then, c.head, now, false)
			d.young = headOf(c.head)
		}
	}
	if len(d.out) > 0 {
		dirs, d.dirty = d.dirty, map[string]struct{}{}
	}
	return batch, dirs
}

// lay adds a record to the batch. A body that is known to be rotten gets a checksum that says so.
func (d *Dir) lay(r *record, body []byte, now int64, bad bool) {
	r.time, r.joined = now, len(d.out) > 0
	if r.kind != kindEpoch {
		r.epoch = max(r.epoch, d.epoch)
	}
	if r.kind != kindFile {
		r.size, r.crc = uint32(len(body)), checksum(body)
	}
	if bad {
		r.crc = ^r.crc
	}
	if r.kind == kindState || r.kind == kindGone {
		d.current.soft += r.length()
	}
	n, end := len(d.out), len(d.out)+int(r.length())
	d.out = slices.Grow(d.out, end-n)[:end]
	clear(d.out[end-recordAlign:])
	r.write(d.current.salt, d.out[n:])
	copy(d.out[n+recordHead:], body)
}

// headBody is the body of a head's record.
func headBody(e Epoch, sequence uint64, signed []byte) []byte {
	b := make([]byte, 0, headFixed+len(signed))
	b = binary.BigEndian.AppendUint64(b, uint64(e))
	return append(binary.BigEndian.AppendUint64(b, sequence), signed...)
}

// headOf reads what headBody wrote; it shares the bytes.
func headOf(b []byte) Head {
	return Head{Epoch(binary.BigEndian.Uint64(b)), binary.BigEndian.Uint64(b[8:]), b[headFixed:]}
}

// follows decides whether a head comes after the one that is there. Call it with mu held; a nil record is no change.
func (d *Dir) follows(body []byte, by Holder) (*record, error) {
	h, was := headOf(body), &d.young
	if err := d.fenced(front{h.Epoch, by}); err != nil {
		return nil, err
	}
	switch {
	case was.Epoch != h.Epoch || was.Sequence < h.Sequence:
		return &record{kind: kindHead}, nil
	case was.Sequence == h.Sequence && bytes.Equal(was.Bytes, h.Bytes):
		return nil, nil // said again
	}
	return nil, fmt.Errorf("sequence %d is there: %w", was.Sequence, ErrOldHead)
}

// write appends the batch and syncs. When there is no space for it, nothing of it stays. A file that somebody removed takes
// bytes and keeps none.
func (d *Dir) write() error {
	s := d.current
	_, err := s.f.WriteAt(d.out, s.size)
	if err == nil {
		err = d.sync(s.f)
	}
	var st syscall.Stat_t
	if err == nil {
		if err = syscall.Fstat(int(s.f.Fd()), &st); err == nil && st.Nlink == 0 {
			err = fmt.Errorf("%s was removed", s.f.Name())
		}
	}
	if isFull(err) {
		if err := errors.Join(s.f.Truncate(s.size), datasync(s.f)); err != nil {
			return err
		}
		s.allocated = 0
		return ErrFull
	}
	return err
}

// fenced refuses all but the newest front end. Call it with mu held, when the change is decided.
func (d *Dir) fenced(by front) error {
	e := by.epoch
	switch {
	case e < d.epoch && e > 0:
		return fmt.Errorf("epoch %d, the newest is %d: %w", e, d.epoch, ErrFenced)
	case e != d.epoch || e == 0:
		return fmt.Errorf("epoch %d, the newest is %d: %w", e, d.epoch, ErrEpoch)
	case subtle.ConstantTimeCompare(by.holder[:], d.holder[:]) != 1:
		return fmt.Errorf("epoch %d is another's: %w", e, ErrFenced)
	}
	return nil
}

// retention checks and rounds a lock.
func (d *Dir) retention(until time.Time) (int64, error) {
	if until.IsZero() {
		return 0, nil
	}
	ms := until.UnixMilli()
	if ms < 0 || ms > d.now()+d.cfg.MaxRetain.Milliseconds() {
		return 0, fmt.Errorf("lock until %v: at most for %v: %w", until.UTC(), d.cfg.MaxRetain, ErrSize)
	}
	return ms, nil
}

// put stores a shard that comes from r, and a head after it if there is one.
func (d *Dir) put(by front, n Name, size int64, r io.Reader, until time.Time, head []byte) error {
	if size < 0 || size > MaxShard {
		return ErrSize
	}
	d.mu.Lock()
	err := d.fenced(by)
	retain := int64(0)
	if err == nil {
		retain, err = d.retention(until)
	}
	old, had := d.find(n)
	_, bad := d.rotten[n]
	there := had && old.deleted == 0 && !bad && int64(old.size) == size
	var want Quota
	if err == nil && !there {
		if !had {
			want = Quota{size, 1}
		}
		q := d.cfg.Quota
		if q.Bytes > 0 && want.Bytes > 0 && d.bytes+d.pending.Bytes+size > q.Bytes || q.Shards > 0 && want.Shards > 0 && d.shards+d.pending.Shards+1 > q.Shards {
			err = ErrQuota
		} else {
			d.pending.Bytes += want.Bytes
			d.pending.Shards += want.Shards
		}
	}
	d.mu.Unlock()
	if err != nil {
		return err
	}
	if there {
		if retain <= old.retain && head == nil {
			return nil
		}
		return d.state(by, n, head, func(e *entry) error { e.retain = max(e.retain, retain); return nil })
	}
	defer func() {
		d.mu.Lock()
		d.pending.Bytes -= want.Bytes
		d.pending.Shards -= want.Shards
		d.mu.Unlock()
	}()
	c := &change{name: n, fills: true, head: head, by: by.holder}
	var file uint64
	if size <= embedLimit {
		if b, ok := r.(*bytesReader); ok {
			c.body = *b
		} else {
			b := d.small.Get().(*[]byte)
			defer d.small.Put(b)
			c.body = (*b)[:size]
			if _, err := io.ReadFull(r, c.body); err != nil {
				return fmt.Errorf("receive: %w", err)
			}
		}
		if err := d.check(n, c.body); err != nil {
			return err
		}
	} else if file, err = d.writeFile(n, size, r); err != nil {
		return err
	}
	used := false
	c.decide = func() (*record, error) {
		if err := d.fenced(by); err != nil {
			return nil, err
		}
		e, had := d.find(n)
		if _, bad := d.rotten[n]; had && e.deleted == 0 && !bad && e.retain >= retain {
			return nil, nil // another was faster
		}
		used = true
		rec := &record{kind: kindShard, name: n, put: d.seen, retain: max(e.retain, retain)}
		if file != 0 {
			rec.kind, rec.file, rec.size = kindFile, file, uint32(size)
		}
		return rec, nil
	}
	err = d.commit(c)
	// A file whose record may be there after all, because the sync is what went wrong, is left to the next start.
	if file != 0 && (!used || errors.Is(err, ErrFull)) {
		os.Remove(d.filePath(file))
	}
	return err
}

// check says whether a shard has its name.
func (d *Dir) check(n Name, shard []byte) error {
	if d.cfg.Trusted {
		return nil
	}
	t := d.trees.Get().(*disperse.Tree)
	defer d.trees.Put(t)
	t.Reset()
	if _, err := t.Write(shard); err != nil || t.Name() != n {
		return ErrName
	}
	return nil
}

// writeFile writes a shard into a file of its own: its bytes, a checksum for each block, and one of these.
func (d *Dir) writeFile(n Name, size int64, r io.Reader) (id uint64, err error) {
	d.mu.Lock()
	id = d.nextFile
	d.nextFile++
	d.mu.Unlock()
	path := d.filePath(id)
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, os.ErrNotExist) {
		if err = os.Mkdir(filepath.Dir(path), 0o700); err == nil || errors.Is(err, os.ErrExist) {
			if err = syncDir(filepath.Join(d.cfg.Path, "files")); err == nil {
				f, err = os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
			}
		}
	}
	if isFull(err) {
		return 0, ErrFull
	} else if err != nil {
		return 0, err
	}
	err = d.fill(f, n, size, r)
	if err == nil {
		err = d.sync(f)
	}
	if err := errors.Join(err, f.Close()); err != nil {
		os.Remove(path)
		if isFull(err) {
			return 0, ErrFull
		}
		return 0, err
	}
	d.mu.Lock()
	d.dirty[filepath.Dir(path)] = struct{}{}
	d.mu.Unlock()
	return id, nil
}

func (d *Dir) fill(f *os.File, n Name, size int64, r io.Reader) error {
	var t *disperse.Tree
	if !d.cfg.Trusted {
		t = d.trees.Get().(*disperse.Tree)
		defer d.trees.Put(t)
		t.Reset()
	}
	whole, memory := r.(*bytesReader)
	b, piece := []byte(nil), size
	if memory {
		b = *whole
	} else {
		buf := d.pieces.Get().(*[]byte)
		defer d.pieces.Put(buf)
		b, piece = *buf, pieceSize
	}
	sums := make([]byte, 0, 4*(blocks(size)+1))
	for left := size; left > 0; {
		p := b[:min(left, piece)]
		if !memory {
			if _, err := io.ReadFull(r, p); err != nil {
				return fmt.Errorf("receive: %w", err)
			}
		}
		left -= int64(len(p))
		if t != nil {
			if _, err := t.Write(p); err != nil {
				return err
			}
		}
		if _, err := f.Write(p); err != nil {
			return err
		}
		for block := range slices.Chunk(p, blockSize) {
			sums = binary.BigEndian.AppendUint32(sums, checksum(block))
		}
	}
	if t != nil && t.Name() != n {
		return ErrName
	}
	_, err := f.Write(binary.BigEndian.AppendUint32(sums, checksum(sums)))
	return err
}

func blocks(size int64) int64 { return (size + blockSize - 1) / blockSize }

// state changes what is known of a shard that is there.
func (d *Dir) state(by front, n Name, head []byte, f func(e *entry) error) error {
	return d.commit(&change{name: n, head: head, by: by.holder, decide: func() (*record, error) {
		if err := d.fenced(by); err != nil {
			return nil, err
		}
		return d.changed(n, func(e *entry) error {
			if e.deleted != 0 {
				return ErrAbsent
			}
			return f(e)
		})
	}})
}

// changed is the record of a change of an entry, nil if it changes nothing.
func (d *Dir) changed(n Name, f func(e *entry) error) (*record, error) {
	e, ok := d.find(n)
	if !ok {
		return nil, ErrAbsent
	}
	was := e
	if err := f(&e); err != nil || e == was {
		return nil, err
	}
	return &record{kind: kindState, name: n, retain: e.retain, deleted: e.deleted}, nil
}

// shard is one that is open for reading.
type shard struct {
	d    *Dir
	n    Name
	e    entry
	fd   int    // of its file; -1: in the log
	sums []byte // of a file that is read with its checksums
}

// open finds a shard that can be read. Held ones only scrub reads. With checks, all that is read is compared with its
// checksums.
func (s *shard) open(d *Dir, n Name, held, checks bool) error {
	d.mu.RLock()
	e, ok := d.find(n)
	_, bad := d.rotten[n]
	d.mu.RUnlock()
	switch {
	case !ok || e.deleted != 0 && !held:
		return ErrAbsent
	case bad:
		return ErrRotten
	}
	*s = shard{d: d, n: n, e: e, fd: -1}
	if checks {
		s.sums = make([]byte, 4*(blocks(int64(e.size))+1))
	}
	if e.file == 0 {
		return nil
	}
	var name [nameSize]byte
	fd, err := syscall.Openat(int(d.files.Fd()), string(appendName(name[:0], e.file)), syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if errors.Is(err, os.ErrNotExist) {
		return s.missing()
	} else if err != nil {
		return os.NewSyscallError("openat", err)
	}
	s.fd = fd
	if !checks {
		return nil
	}
	err = s.pread(s.sums, int64(e.size))
	if body, sum := s.sums[:len(s.sums)-4], s.sums[len(s.sums)-4:]; err == nil && checksum(body) != binary.BigEndian.Uint32(sum) {
		err = s.rot()
	}
	if err != nil {
		s.close()
	}
	return err
}

func (s *shard) close() {
	if s.fd >= 0 {
		syscall.Close(s.fd)
	}
}

// pread fills p from the file.
func (s *shard) pread(p []byte, off int64) error {
	for len(p) > 0 {
		n, err := syscall.Pread(s.fd, p, off)
		switch {
		case err == syscall.EINTR:
			continue
		case err != nil:
			return s.failed(os.NewSyscallError("pread", err))
		case n == 0:
			return s.rot() // it was cut
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// failed is an error of the disk: of one that says that it cannot read its own, the shard is rotten.
func (s *shard) failed(err error) error {
	if errors.Is(err, syscall.EIO) {
		return s.rot()
	}
	return err
}

// missing decides between a shard whose file is gone and one that was removed, or moved, a moment ago.
func (s *shard) missing() error {
	s.d.mu.RLock()
	e, ok := s.d.find(s.n)
	s.d.mu.RUnlock()
	if !ok || e.file != s.e.file {
		return ErrAbsent
	}
	return s.rot()
}

// rot notes that the shard is not what it was.
func (s *shard) rot() error {
	s.d.mu.Lock()
	defer s.d.mu.Unlock()
	if e, ok := s.d.find(s.n); ok && e.file == s.e.file && e.crc == s.e.crc {
		if _, known := s.d.rotten[s.n]; !known {
			s.d.rotten[s.n] = struct{}{}
			s.d.log.Warn("a shard is rotten", "shard", s.n, "size", e.size)
		}
	}
	return ErrRotten
}

// readAt fills p with bytes from off on.
func (s *shard) readAt(p []byte, off int64) error {
	if off < 0 || off > int64(s.e.size) || int64(len(p)) > int64(s.e.size)-off {
		return ErrSize
	}
	if len(p) == 0 {
		return nil
	}
	if s.fd < 0 {
		return s.readLog(p, off)
	}
	if s.sums == nil {
		return s.pread(p, off)
	}
	b := []byte(nil)
	for len(p) > 0 {
		first := off / blockSize
		begin := first * blockSize
		end := min(begin+blockSize, int64(s.e.size))
		if off != begin || int64(len(p)) < end-begin { // part of a block
			if b == nil {
				buf := s.d.small.Get().(*[]byte)
				defer s.d.small.Put(buf)
				b = *buf
			}
			q := b[:end-begin]
			if err := s.readBlocks(q, first); err != nil {
				return err
			}
			n := copy(p, q[off-begin:])
			p, off = p[n:], off+int64(n)
			continue
		}
		n := int64(len(p)) / blockSize * blockSize
		if off+int64(len(p)) == int64(s.e.size) {
			n = int64(len(p))
		}
		if err := s.readBlocks(p[:n], first); err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	return nil
}

// readBlocks fills p with whole blocks.
func (s *shard) readBlocks(p []byte, first int64) error {
	if err := s.pread(p, first*blockSize); err != nil {
		return err
	}
	for block := range slices.Chunk(p, blockSize) {
		if checksum(block) != binary.BigEndian.Uint32(s.sums[4*first:]) {
			return s.rot()
		}
		first++
	}
	return nil
}

func (s *shard) readLog(p []byte, off int64) error {
	q := p
	if s.sums != nil && len(p) < int(s.e.size) {
		buf := s.d.small.Get().(*[]byte)
		defer s.d.small.Put(buf)
		q = (*buf)[:s.e.size]
	}
	for range 8 {
		s.d.mu.RLock()
		seg := s.d.segments[s.e.pos.segment()]
		s.d.mu.RUnlock()
		moved := seg == nil
		if !moved {
			seg.mu.RLock()
			if moved = seg.gone; !moved {
				var err error
				if s.sums != nil {
					err = seg.read(s.e.pos.offset(), q, s.e.crc)
				} else if _, err = seg.f.ReadAt(q, s.e.pos.offset()+recordHead+off); errors.Is(err, io.EOF) {
					err = ErrRotten
				}
				seg.mu.RUnlock()
				if errors.Is(err, ErrRotten) {
					return s.rot()
				} else if err != nil {
					return s.failed(err)
				}
				if len(q) > len(p) {
					copy(p, q[off:])
				}
				return nil
			}
			seg.mu.RUnlock()
		}
		// Compaction has moved it.
		s.d.mu.RLock()
		e, ok := s.d.find(s.n)
		s.d.mu.RUnlock()
		if !ok || e.file != 0 || e.size != s.e.size {
			return ErrAbsent
		}
		s.e = e
	}
	return ErrBusy
}
