package store

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"holdfast/disperse"
)

const (
	smallBody    = 64 << 10 // bodies up to this lie in blocks
	segmentSize  = 2 << 20
	leastSegment = 1 << 20  // when many bodies are written at once
	inFlight     = 3        // segments of a body
	writeMemory  = 64 << 20 // plain bytes of all bodies that are being written
	flyingMemory = 32 << 20 // of these, those that are being put; each has a half more or so in shards
	readMemory   = 128 << 20
	fetchMemory  = 32 << 20 // of shards that are being fetched
	lateMemory   = 64 << 20 // of shards whose segments are durable without them

	classStandard = "STANDARD"
	classSecret   = "SHAMIR" // each byte is shared: what k−1 locations have says nothing, whatever is computed on
)

var errBody = errors.New("not a body")

// MarshalBinary is what metadata keeps of a body.
func (b Body) MarshalBinary() ([]byte, error) {
	out := binary.AppendUvarint(nil, uint64(b.Size))
	for _, p := range b.Segments {
		out = binary.BigEndian.AppendUint32(append(out, p.ID[:]...), p.Size)
	}
	return out, nil
}

// UnmarshalBinary reads what MarshalBinary gave.
func (b *Body) UnmarshalBinary(p []byte) error {
	size, n := binary.Uvarint(p)
	if n <= 0 || (len(p)-n)%20 != 0 || int64(size) < 0 {
		return errBody
	}
	out := Body{Size: int64(size)}
	sum := uint64(0)
	for p = p[n:]; len(p) > 0; p = p[20:] {
		piece := Piece{disperse.ID(p[:16]), binary.BigEndian.Uint32(p[16:])}
		out.Segments = append(out.Segments, piece)
		sum += uint64(piece.Size)
	}
	if sum != size {
		return errBody
	}
	*b = out
	return nil
}

// memory bounds what is held of something, first come, first served.
type memory struct {
	mu      sync.Mutex
	free    int
	waiting []*claim
	moved   time.Time // when some was given back
	size    int
	last    func() time.Time // when something happened that will have some given back; nil: nobody knows
}

type claim struct {
	n    int
	done chan struct{}
}

func (m *memory) init(n int, last func() time.Time) { m.free, m.size, m.last = n, n, last }

// progress is when something last happened that those who wait wait for: the zero time if nothing is held.
func (m *memory) progress() (t time.Time) {
	m.mu.Lock()
	if m.free < m.size {
		t = m.moved
	}
	m.mu.Unlock()
	if t.IsZero() || m.last == nil {
		return t
	}
	if l := m.last(); l.After(t) {
		return l
	}
	return t
}

// try takes n bytes if they are there and nobody waits.
func (m *memory) try(n int) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.waiting) > 0 || m.free < n {
		return false
	}
	if m.free == m.size {
		m.moved = time.Now()
	}
	m.free -= n
	return true
}

// take waits until n bytes are there, which are at most what there is of all. It gives up when for so long nothing was given
// back at all: a long queue is no reason.
func (m *memory) take(ctx context.Context, n int, most time.Duration) error {
	if m.try(n) {
		return nil
	}
	c := &claim{n, make(chan struct{})}
	m.mu.Lock()
	m.waiting = append(m.waiting, c)
	m.grant()
	m.mu.Unlock()
	t := time.NewTimer(most)
	defer t.Stop()
	for waits := true; waits; {
		select {
		case <-c.done:
			return nil
		case <-ctx.Done():
			waits = false
		case <-t.C:
			still := time.Since(m.progress())
			if waits = still < most; waits {
				t.Reset(most - still)
			}
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	select {
	case <-c.done:
		return nil
	default:
	}
	for i, x := range m.waiting {
		if x == c {
			m.waiting = append(m.waiting[:i], m.waiting[i+1:]...)
			break
		}
	}
	m.grant()
	return fmt.Errorf("too many bodies at once: %w", errors.Join(ErrBusy, ctx.Err()))
}

func (m *memory) give(n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.free += n
	m.moved = time.Now()
	m.grant()
}

func (m *memory) grant() {
	for len(m.waiting) > 0 && m.free >= m.waiting[0].n {
		m.free -= m.waiting[0].n
		close(m.waiting[0].done)
		m.waiting = m.waiting[1:]
	}
}

// scheme is that of a class.
func (s *Store) classOf(class string) (c disperse.Scheme, secret bool, err error) {
	switch class {
	case "", classStandard:
		return s.cfg.Scheme, false, nil
	}
	c, ok := s.cfg.Classes[class]
	if class == classSecret {
		if !ok {
			c = s.cfg.Scheme
		}
		if c.K < 2 {
			return c, true, fmt.Errorf("class %s with scheme %v: %w", class, c, ErrClass)
		}
		return c, true, nil
	}
	if !ok {
		return c, false, fmt.Errorf("class %.80q: %w", class, ErrClass)
	}
	return c, false, nil
}

// segmentLength is how long the next segments of a body are of which so much is to come, -1 if nobody knows: as even as can
// be, and shorter when many bodies are written.
func (s *Store) segmentLength(left int64) int {
	most := min(max(writeMemory/2/max(s.active.Load(), 1), leastSegment), segmentSize)
	if left > 0 {
		n := (left + most - 1) / most
		return int(min((left+n-1)/n, most))
	}
	return int(most)
}

// A writer brings a body's segments to their places, several at once.
type writer struct {
	s      *Store
	coder  *disperse.Coder
	secret bool
	body   Body
	slots  chan struct{}
	wg     sync.WaitGroup
	mu     sync.Mutex
	err    error
}

func (w *writer) fail(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		w.err = err
	}
}

func (w *writer) failed() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err
}

// Write implements Objects. A size that is wrong costs time only.
func (s *Store) Write(ctx context.Context, class string, r io.Reader, size int64) (Body, error) {
	c, secret, err := s.classOf(class)
	if err != nil {
		return Body{}, err
	}
	if s.old.Load() {
		return Body{}, ErrOld
	}
	if s.life.Err() != nil {
		return Body{}, errClosed
	}
	if size >= 0 && size <= smallBody && !secret {
		// The usual small body needs no memory but its own.
		b := make([]byte, size, size+1)
		n, err := io.ReadFull(r, b)
		if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
			return Body{}, err
		}
		if b = b[:n]; err != nil {
			return s.small(b), nil
		}
		more := b[n : n+1]
		switch _, err := io.ReadFull(r, more); err {
		case io.EOF:
			return s.small(b), nil
		case nil:
			r, size = io.MultiReader(newReader(b), newReader(append([]byte(nil), more...)), r), -1
		default:
			return Body{}, err
		}
	}
	coder, err := s.coder(c)
	if err != nil {
		return Body{}, err
	}
	s.active.Add(1)
	defer s.active.Add(-1)
	w := &writer{s: s, coder: coder, secret: secret, slots: make(chan struct{}, inFlight)}
	w.fail(w.run(ctx, r, size))
	w.wg.Wait()
	if err := w.failed(); err != nil {
		s.Discard(w.body)
		return Body{}, err
	}
	return w.body, nil
}

func newReader(b []byte) io.Reader { r := rest(b); return &r }

// rest is a reader of what is left of a slice.
type rest []byte

func (r *rest) Read(p []byte) (int, error) {
	if len(*r) == 0 {
		return 0, io.EOF
	}
	n := copy(p, *r)
	*r = (*r)[n:]
	return n, nil
}

// small takes over a body that will lie in a block.
func (s *Store) small(b []byte) Body {
	if len(b) == 0 {
		return Body{}
	}
	id := disperse.NewID()
	s.pending.Store(id, &pendingPiece{small: b})
	return Body{int64(len(b)), []Piece{{id, uint32(len(b))}}}
}

func (w *writer) run(ctx context.Context, r io.Reader, size int64) error {
	s := w.s
	for {
		most := s.segmentLength(size - w.body.Size)
		if w.secret {
			most = disperse.MaxSecret
		}
		if err := s.writing.take(ctx, most, s.cfg.Timeout); err != nil {
			return err
		}
		b := s.buffers.get(most)
		free := func() {
			s.buffers.put(b)
			s.writing.give(most)
		}
		n, err := io.ReadFull(r, b)
		end := err == io.EOF || err == io.ErrUnexpectedEOF
		switch {
		case err != nil && !end:
			free()
			return err
		case n == 0:
			free()
			return nil
		case end && len(w.body.Segments) == 0 && n <= smallBody && !w.secret:
			w.body = s.small(append(make([]byte, 0, n), b[:n]...))
			free()
			return nil
		}
		if !end && size >= 0 && w.body.Size+int64(n) == size {
			// Whether this is the last one is worth knowing: it can do without a goroutine.
			var one [1]byte
			switch _, err := io.ReadFull(r, one[:]); err {
			case io.EOF:
				end = true
			case nil:
				r = io.MultiReader(newReader(one[:]), r)
			default:
				free()
				return err
			}
		}
		id := disperse.NewID()
		w.body.Segments = append(w.body.Segments, Piece{id, uint32(n)})
		w.body.Size += int64(n)
		put := func() {
			defer free()
			ctx, end, err := s.begin(ctx) // Close does not wait for who sends the bytes
			if err != nil {
				w.fail(err)
				return
			}
			defer end()
			if err := s.putting.take(ctx, n, s.cfg.Timeout); err != nil {
				w.fail(err)
				return
			}
			defer s.putting.give(n)
			rec, _, err := s.putAs(ctx, w.coder, id, b[:n], nil, w.secret)
			if err != nil {
				w.fail(err)
				return
			}
			s.pending.Store(id, &pendingPiece{record: &rec})
		}
		if end {
			put()
			return nil
		}
		w.slots <- struct{}{}
		w.wg.Go(func() {
			put()
			<-w.slots
		})
		if err := w.failed(); err != nil {
			return err
		}
	}
}

// Discard implements Objects.
func (s *Store) Discard(b Body) {
	var all []record
	for _, p := range b.Segments {
		if v, ok := s.pending.LoadAndDelete(p.ID); ok {
			if r := v.(*pendingPiece).record; r != nil {
				all = append(all, *r)
			}
		}
	}
	s.abandon(all)
}

// reads are the reads that are under way, by when they began.
type reads struct {
	mu sync.Mutex
	at map[*bodyReader]time.Time
}

func (r *reads) begin(b *bodyReader) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.at == nil {
		r.at = map[*bodyReader]time.Time{}
	}
	r.at[b] = time.Now()
}

func (r *reads) end(b *bodyReader) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.at, b)
}

// oldest is when the read began that is under way for longest, but for those that were given up without a Close.
func (r *reads) oldest() time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	first := now
	for _, t := range r.at {
		if t.Before(first) && now.Sub(t) < longestRead {
			first = t
		}
	}
	return first
}

const longestRead = 6 * time.Hour

// Read implements Objects. What it returns is also an io.WriterTo.
func (s *Store) Read(ctx context.Context, b Body, off, n int64) (io.ReadCloser, error) {
	if s.old.Load() {
		return nil, ErrOld
	}
	if off < 0 || n < 0 || off > b.Size || n > b.Size-off {
		return nil, fmt.Errorf("read %d bytes at %d of a body of %d: %w", n, off, b.Size, io.ErrUnexpectedEOF)
	}
	r := &bodyReader{s: s, left: n, skip: off, pieces: b.Segments}
	for len(r.pieces) > 0 && r.skip >= int64(r.pieces[0].Size) {
		r.skip -= int64(r.pieces[0].Size)
		r.pieces = r.pieces[1:]
	}
	for i, upTo := 0, -r.skip; i < len(r.pieces); i++ {
		if upTo += int64(r.pieces[i].Size); upTo >= n {
			r.pieces = r.pieces[:i+1]
		}
	}
	r.ctx, r.cancel = context.WithCancel(ctx)
	s.running.begin(r)
	if err := r.fill(); err != nil {
		r.Close()
		return nil, err
	}
	return r, nil
}

// A bodyReader has one segment in plain, and up to readAhead that are on their way.
type bodyReader struct {
	ctx    context.Context
	cancel context.CancelFunc
	s      *Store
	pieces []Piece // not asked for
	left   int64   // bytes that are not in now, nor were
	skip   int64   // of the next segment
	now    []byte  // not read yet; in plain
	plain  *plain
	ahead  []*plain
}

const readAhead = 2

// plain is a segment that is here, or on its way.
type plain struct {
	b    []byte
	size int // of memory that was taken
	err  error
	done chan struct{}
}

func (r *bodyReader) free(p *plain) {
	if p != nil && p.size > 0 {
		r.s.buffers.put(p.b)
		r.s.reading.give(p.size)
		p.b, p.size = nil, 0
	}
}

// want begins to fetch the next segment. What is not needed now is left for later when memory is short.
func (r *bodyReader) want(now, here bool) bool {
	p, next := r.pieces[0], &plain{done: make(chan struct{})}
	if p.Size > smallBody {
		size := int(p.Size) + disperse.Overhead
		if !now && !r.s.reading.try(size) {
			return false
		}
		if now {
			if next.err = r.s.reading.take(r.ctx, size, r.s.cfg.Timeout); next.err != nil {
				size = 0
			}
		}
		next.size = size
	}
	r.pieces, r.ahead = r.pieces[1:], append(r.ahead, next)
	fetch := func(ctx context.Context) {
		defer close(next.done)
		if next.err != nil {
			return
		}
		if next.size > 0 {
			if next.err = r.s.fetching.take(ctx, next.size, r.s.cfg.Timeout); next.err != nil {
				return
			}
			defer r.s.fetching.give(next.size)
			next.b = r.s.buffers.get(next.size)[:0]
		}
		next.b, next.err = r.s.piece(ctx, next.b, p)
		if next.err == nil && len(next.b) != int(p.Size) {
			next.err = fmt.Errorf("segment %v has %d bytes, not %d: %w", p.ID, len(next.b), p.Size, errRow)
		}
	}
	if here && next.size == 0 {
		fetch(r.ctx)
		return true
	}
	ctx, end, err := r.s.begin(r.ctx)
	if err != nil {
		next.err = cmp.Or(next.err, err)
		close(next.done)
		return true
	}
	run := func() {
		defer end()
		fetch(ctx)
	}
	if here {
		run()
	} else {
		go run()
	}
	return true
}

// fill makes the next segment the one that is read.
func (r *bodyReader) fill() error {
	r.free(r.plain)
	r.plain = nil
	if r.left == 0 {
		return nil
	}
	if len(r.ahead) == 0 {
		if len(r.pieces) == 0 {
			return io.ErrUnexpectedEOF
		}
		r.want(true, len(r.pieces) == 1)
	}
	for len(r.ahead) <= readAhead && len(r.pieces) > 0 && r.want(false, false) {
	}
	r.plain, r.ahead = r.ahead[0], r.ahead[1:]
	<-r.plain.done
	if r.plain.err != nil {
		return r.plain.err
	}
	b := r.plain.b[r.skip:]
	r.now = b[:min(int64(len(b)), r.left)]
	r.left -= int64(len(r.now))
	r.skip = 0
	return nil
}

func (r *bodyReader) Read(p []byte) (int, error) {
	for len(r.now) == 0 && len(p) > 0 {
		if r.left == 0 {
			r.fill()
			return 0, io.EOF
		}
		if err := r.fill(); err != nil {
			return 0, err
		}
	}
	n := copy(p, r.now)
	r.now = r.now[n:]
	return n, nil
}

func (r *bodyReader) WriteTo(w io.Writer) (n int64, err error) {
	for {
		if len(r.now) > 0 {
			m, err := w.Write(r.now)
			n += int64(m)
			r.now = r.now[m:]
			if err != nil {
				return n, err
			}
		}
		left := r.left
		if err := r.fill(); err != nil || left == 0 {
			return n, err
		}
	}
}

// Close lets go of the body: until then what it reads stays, even if it is dropped.
func (r *bodyReader) Close() error {
	r.cancel()
	for _, p := range append(r.ahead, r.plain) {
		if p != nil {
			<-p.done
			r.free(p)
		}
	}
	r.ahead, r.plain, r.now, r.pieces, r.left = nil, nil, nil, nil, 0
	r.s.running.end(r)
	return nil
}

// piece appends a segment of a body, or a small body, to dst.
func (s *Store) piece(ctx context.Context, dst []byte, p Piece) ([]byte, error) {
	r, at, small, err := s.find(p.ID)
	switch {
	case err != nil:
		return dst, err
	case small != nil:
		return append(dst, small...), nil
	case r == nil && at.n != p.Size, r != nil && r.Size != p.Size:
		return dst, fmt.Errorf("segment %v: %w", p.ID, errRow)
	case r == nil:
		return s.body(ctx, dst, at)
	}
	return s.get(ctx, dst, r)
}

// find says where a piece is: a segment, a spot in a block, or in memory, since no block has it yet. What was dropped is
// there until nobody can read it any more.
func (s *Store) find(id disperse.ID) (r *record, at spot, small []byte, err error) {
	if err := s.enter(); err != nil {
		return nil, at, nil, err
	}
	defer s.leave()
	v := view{r: s.db}
	row, ok, err := v.get(idKey(tableSegment, id))
	if err == nil && !ok {
		if row, ok, err = v.get(idKey(tableGarbage, id)); len(row) > 8 {
			row = row[8:]
		}
	}
	if err != nil {
		return nil, at, nil, err
	}
	if !ok {
		if v, there := s.pending.Load(id); there {
			p := v.(*pendingPiece)
			return p.record, at, p.small, nil
		}
		return nil, at, nil, fmt.Errorf("segment %v is not in the metadata: %w", id, ErrLost)
	}
	if at, ok := parseSpot(row); ok {
		return nil, at, nil, nil
	}
	if len(row) == 0 || row[0] != inSegment {
		return nil, at, nil, fmt.Errorf("segment %v: %w", id, errRow)
	}
	rec, err := parseRecord(row[1:])
	if err != nil {
		return nil, at, nil, fmt.Errorf("segment %v: %w", id, err)
	}
	return &rec, at, nil, nil
}
