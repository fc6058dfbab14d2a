package store

import (
	"cmp"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/cockroachdb/pebble/v2"

	"holdfast/disperse"
	"holdfast/store/location"
)

// docs/formats/store-log.md has the bytes of blocks and heads, and what follows from them.

const (
	blockMagic = "HFB\x01"
	blockFixed = 32
	headMagic  = "HFH\x01"

	maxLogPlaces = 24       // of a block, so that a head fits
	maxChange    = 12 << 20 // operations and bodies of one Update
	// Shards up to 64 KiB lie in the locations' logs: blocks that are not much larger are the cheapest to write and to read.
	blockPerShard = 44 << 10
	blockLeast    = 64 << 10
)

// ref is what finds a block: its segment's record, and where in the log it is.
type ref struct {
	sequence uint64         // of the block
	epoch    location.Epoch // of the front end that wrote it
	head     uint64         // the sequence of the head that went with it
	record   record
}

func (r *ref) append(b []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, r.sequence)
	b = binary.BigEndian.AppendUint64(b, uint64(r.epoch))
	b = binary.BigEndian.AppendUint64(b, r.head)
	return appendRecord(b, &r.record)
}

var errRef = errors.New("not a reference to a block")

func parseRef(b []byte) (*ref, error) {
	if len(b) < 24 {
		return nil, errRef
	}
	be := binary.BigEndian
	r := &ref{sequence: be.Uint64(b), epoch: location.Epoch(be.Uint64(b[8:])), head: be.Uint64(b[16:])}
	var err error
	if r.record, err = parseRecord(b[24:]); err != nil {
		return nil, fmt.Errorf("%w: %w", errRef, err)
	}
	return r, nil
}

// snapshotRef finds a snapshot: the record of the segment that lists the others.
type snapshotRef struct {
	sequence uint64 // of the last block that it covers
	record   record
}

// block is what a group of changes becomes: a segment of the class with the smallest k.
type block struct {
	sequence uint64
	epoch    location.Epoch
	prev     *ref // nil: it is the first
	ops      []byte
	bodies   []byte
}

func (b *block) append(p []byte) []byte {
	be := binary.BigEndian
	start := len(p)
	p = append(p, blockMagic...)
	p = be.AppendUint32(p, 0)
	p = be.AppendUint64(p, b.sequence)
	p = be.AppendUint64(p, uint64(b.epoch))
	p = be.AppendUint32(p, uint32(len(b.ops)))
	p = be.AppendUint32(p, 0)
	if b.prev != nil {
		p = b.prev.append(p)
	}
	be.PutUint32(p[start+28:], uint32(len(p)-start-blockFixed))
	return append(append(p, b.ops...), b.bodies...)
}

var errBlock = errors.New("not a block of the log")

// parseBlock reads what append wrote; its parts lie in p.
func parseBlock(p []byte) (b block, err error) {
	be := binary.BigEndian
	if len(p) < blockFixed || string(p[:4]) != blockMagic || be.Uint32(p[4:]) != 0 {
		return b, errBlock
	}
	b.sequence, b.epoch = be.Uint64(p[8:]), location.Epoch(be.Uint64(p[16:]))
	ops, prev := int64(be.Uint32(p[24:])), int64(be.Uint32(p[28:]))
	p = p[blockFixed:]
	if ops+prev > int64(len(p)) {
		return b, errBlock
	}
	if prev > 0 {
		if b.prev, err = parseRef(p[:prev]); err != nil {
			return b, err
		}
	}
	b.ops, b.bodies = p[prev:prev+ops], p[prev+ops:]
	return b, nil
}

// body is a small body of a block.
func (b *block) body(p spot) ([]byte, error) {
	if uint64(p.off)+uint64(p.n) > uint64(len(b.bodies)) {
		return nil, fmt.Errorf("block %d has no %d bytes at %d: %w", b.sequence, p.n, p.off, errBlock)
	}
	return b.bodies[p.off:][:p.n], nil
}

// head is the end of the log, as locations are told. It has the block before the last too: of the last one alone fewer
// than k shards may be there.
type head struct {
	epoch    location.Epoch
	sequence uint64 // of heads, within the epoch
	key      KeyEpoch
	places   map[uint16]disperse.Place // what the members in the references are called
	last     *ref
	before   *ref // nil: there is none
	snapshot *snapshotRef
}

func (h *head) append(b []byte) []byte {
	be := binary.BigEndian
	b = append(b, headMagic...)
	b = be.AppendUint64(b, uint64(h.epoch))
	b = be.AppendUint64(b, h.sequence)
	b = be.AppendUint32(b, uint32(h.key))
	b = be.AppendUint16(b, uint16(len(h.places)))
	indexes := make([]uint16, 0, len(h.places))
	for i := range h.places {
		indexes = append(indexes, i)
	}
	slices.Sort(indexes)
	for _, i := range indexes {
		p := h.places[i]
		b = append(be.AppendUint16(b, i), p[:]...)
	}
	part := func(there bool, f func([]byte) []byte) {
		at := len(b)
		b = be.AppendUint16(b, 0)
		if there {
			b = f(b)
		}
		be.PutUint16(b[at:], uint16(len(b)-at-2))
	}
	part(h.last != nil, func(b []byte) []byte { return h.last.append(b) })
	part(h.before != nil, func(b []byte) []byte { return h.before.append(b) })
	part(h.snapshot != nil, func(b []byte) []byte {
		return appendRecord(be.AppendUint64(b, h.snapshot.sequence), &h.snapshot.record)
	})
	return b
}

var errHead = errors.New("not a head of this store")

func parseHead(b []byte) (*head, error) {
	be := binary.BigEndian
	if len(b) < 26 || string(b[:4]) != headMagic {
		return nil, errHead
	}
	h := &head{epoch: location.Epoch(be.Uint64(b[4:])), sequence: be.Uint64(b[12:]), key: KeyEpoch(be.Uint32(b[20:])), places: map[uint16]disperse.Place{}}
	n := int(be.Uint16(b[24:]))
	if b = b[26:]; len(b) < 18*n {
		return nil, errHead
	}
	for ; n > 0; n-- {
		h.places[be.Uint16(b)] = disperse.Place(b[2:18])
		b = b[18:]
	}
	part := func() []byte {
		if len(b) < 2 || len(b)-2 < int(be.Uint16(b)) {
			b = nil
			return nil
		}
		p := b[2:][:be.Uint16(b)]
		b = b[2+len(p):]
		return p
	}
	var err error
	if h.last, err = parseRef(part()); err != nil {
		return nil, err
	}
	if p := part(); len(p) > 0 {
		if h.before, err = parseRef(p); err != nil {
			return nil, err
		}
	}
	if p := part(); len(p) > 8 {
		h.snapshot = &snapshotRef{sequence: be.Uint64(p)}
		if h.snapshot.record, err = parseRecord(p[8:]); err != nil {
			return nil, err
		}
	}
	if len(b) > 0 {
		return nil, errHead
	}
	return h, nil
}

// sign is a head with the code that only holders of the store's keys can make.
func (k *Keys) sign(h *head) []byte {
	b := h.append(make([]byte, 0, 2048))
	m := hmac.New(sha256.New, k.heads[:])
	m.Write(b)
	return m.Sum(b)
}

// verify reads a head that sign made. What a location says beside it must agree.
func (k *Keys) verify(l location.Head) (*head, error) {
	n := len(l.Bytes) - sha256.Size
	if n < 0 {
		return nil, errHead
	}
	m := hmac.New(sha256.New, k.heads[:])
	m.Write(l.Bytes[:n])
	if !hmac.Equal(m.Sum(nil), l.Bytes[n:]) {
		return nil, errHead
	}
	h, err := parseHead(l.Bytes[:n])
	if err != nil {
		return nil, err
	}
	if h.epoch != l.Epoch || h.sequence != l.Sequence {
		return nil, fmt.Errorf("%w: it is of epoch %d, %d, and kept as that of %d, %d", errHead, h.epoch, h.sequence, l.Epoch, l.Sequence)
	}
	return h, nil
}

// group is the changes that become one block.
type group struct {
	sequence uint64        // of the block that it becomes, if it changes anything
	batch    *pebble.Batch // what changes read: the database, the group before that is not in it yet, and this one
	ops      []byte
	bodies   []byte
	live     live
	kept     []disperse.ID
	waiters  []*waiter
	taken    chan struct{} // closed when no more changes are taken; nil if nobody waits for that
}

// waiter is one Update that waits for its group.
type waiter struct {
	err   error // of f
	done  chan error
	timer *time.Timer
}

func (s *Store) newGroup(spare *group) *group {
	g := cmp.Or(spare, &group{})
	*g = group{sequence: s.sequence + 1, ops: g.ops[:0], bodies: g.bodies[:0], kept: g.kept[:0], waiters: g.waiters[:0]}
	if s.flying != nil && len(s.flying.ops) > 0 {
		g.sequence = s.flying.sequence + 1
	}
	return g
}

// reads makes the group's batch, if it is not there. Call it with mu held.
func (s *Store) reads(g *group) error {
	if g.batch != nil {
		return nil
	}
	g.batch = s.db.NewIndexedBatch()
	if s.flying != nil {
		if err := applyOps(g.batch, s.flying.ops); err != nil {
			return err
		}
	}
	return applyOps(g.batch, g.ops)
}

func (s *Store) full(g *group) bool {
	return len(g.ops)+len(g.bodies) >= max(blockLeast, s.scheme.K*blockPerShard)
}

func (s *Store) waiter() *waiter {
	if w, ok := s.waiters.Get().(*waiter); ok {
		w.err = nil
		w.timer.Reset(s.cfg.Timeout)
		return w
	}
	return &waiter{done: make(chan error, 1), timer: time.NewTimer(s.cfg.Timeout)}
}

// update runs f in the group that forms, and waits until the group is durable: also when f fails, since what made it fail
// may be a change that is not durable yet.
func (s *Store) update(ctx context.Context, f func(*tx) error) error {
	w := s.waiter()
	// Of one that was given up the log may still write to done: it is not used again.
	busy := func() error {
		w.timer.Stop()
		return fmt.Errorf("update: %w", errors.Join(ErrBusy, ctx.Err()))
	}
	again := func(err error) error {
		err = cmp.Or(err, w.err)
		w.timer.Stop()
		s.waiters.Put(w)
		return err
	}
	for {
		full, joined, err := s.join(w, f)
		if err != nil || full == nil && !joined {
			return again(err)
		}
		if joined {
			break
		}
		select {
		case <-full:
		case <-w.timer.C:
			if !s.moves(w.timer) {
				return busy()
			}
		case <-ctx.Done():
			return busy()
		}
	}
	for {
		select {
		case err := <-w.done:
			return again(err)
		case <-w.timer.C:
			if !s.moves(w.timer) {
				return busy()
			}
		case <-ctx.Done():
			return busy()
		}
	}
}

// moves says whether the log went on within the time that an Update waits, or a quorum of locations did something while it
// was their turn, and has the timer wait for what is left of it: a long queue is no reason to give up.
func (s *Store) moves(t *time.Timer) bool {
	last := s.moved.Load()
	if !s.insisting.Load() {
		last = max(last, s.alive().UnixNano())
	}
	left := s.cfg.Timeout - time.Duration(time.Now().UnixNano()-last)
	if left <= 0 {
		return false
	}
	t.Reset(left)
	return true
}

// join runs f in the group that forms. If that is full it returns what says that the next one forms. One that neither
// changed anything nor saw what is not durable has not joined.
func (s *Store) join(w *waiter, f func(*tx) error) (full <-chan struct{}, joined bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.dead != nil {
		return nil, false, s.dead
	}
	g := s.forming
	if s.full(g) {
		if g.taken == nil {
			g.taken = make(chan struct{})
		}
		return g.taken, false, nil
	}
	if err := s.reads(g); err != nil {
		return nil, false, fmt.Errorf("update: %w", err)
	}
	w.err = s.run(g, f)
	if len(g.ops) == 0 && s.flying == nil {
		return nil, false, nil
	}
	g.waiters = append(g.waiters, w)
	select {
	case s.wake <- struct{}{}:
	default:
	}
	return nil, true, nil
}

var errPanic = errors.New("f panicked")

// run leaves nothing of f in the group if it fails.
func (s *Store) run(g *group, f func(*tx) error) (err error) {
	was := *g
	err = errPanic
	t := &tx{view: view{r: g.batch}, s: s, g: g}
	defer func() {
		t.close()
		switch {
		case err == nil:
			for _, id := range g.kept {
				s.pending.Delete(id)
			}
		case len(g.ops) > len(was.ops):
			*g = was
			g.batch = nil
			was.batch.Close()
		}
		g.kept = g.kept[:0]
	}()
	if err := f(t); err != nil {
		return err
	}
	if n := len(g.ops) + len(g.bodies) - len(was.ops) - len(was.bodies); n > maxChange {
		return fmt.Errorf("update of %d bytes, at most %d", n, maxChange)
	}
	return t.err
}

// runLog makes blocks of groups, one at a time, until the store is closed, another front end has it, or its database is
// damaged.
func (s *Store) runLog() {
	for {
		select {
		case <-s.life.Done():
			s.end(errClosed)
			return
		case <-s.sound.Done():
			s.end(context.Cause(s.sound))
			return
		case <-s.wake:
		}
		g := s.take()
		var err error
		if len(g.ops) > 0 {
			err = s.write(g)
		}
		if err != nil {
			s.end(err)
			return
		}
		s.mu.Lock()
		s.flying = nil
		if len(s.forming.waiters) > 0 {
			select {
			case s.wake <- struct{}{}:
			default:
			}
		}
		s.mu.Unlock()
		for i, w := range g.waiters {
			w.done <- nil
			g.waiters[i] = nil
		}
		if cap(g.ops)+cap(g.bodies) < 4<<20 {
			s.spare = g
		}
	}
}

// take ends the group that forms, and begins the next.
func (s *Store) take() *group {
	s.mu.Lock()
	defer s.mu.Unlock()
	g := s.forming
	if g.live.bodies > 0 {
		g.live.total = uint64(len(g.bodies))
		g.ops = appendOp(g.ops, opSet, sequenceKey(tableLive, g.sequence), g.live.append(nil))
	}
	if g.batch != nil {
		if err := g.batch.Close(); err != nil {
			s.log.Error("close a batch", "error", err)
		}
		g.batch = nil
	}
	if g.taken != nil {
		close(g.taken)
		g.taken = nil // end closes those that are left
	}
	s.flying = g
	s.forming = s.newGroup(s.spare)
	s.spare = nil
	return g
}

// end answers all that wait and all that will come.
func (s *Store) end(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dead = err
	for _, g := range []*group{s.flying, s.forming} {
		if g == nil {
			continue
		}
		for _, w := range g.waiters {
			w.done <- err
		}
		if g.taken != nil {
			close(g.taken)
		}
		g.waiters, g.taken = nil, nil
	}
}

// write makes a group durable and then visible. It tries for ever: what its callers were told is that it may happen yet.
func (s *Store) write(g *group) error {
	if err := s.seal(); err != nil {
		return err
	}
	b := block{sequence: g.sequence, epoch: s.epoch, prev: s.last, ops: g.ops, bodies: g.bodies}
	s.plain = b.append(s.plain[:0])
	defer func() {
		clear(s.plain)
		if cap(s.plain) > 4<<20 {
			s.plain = nil
		}
	}()
	r := &ref{sequence: g.sequence, epoch: s.epoch}
	err := s.insist("write a block", func() error {
		coder, err := s.coder(s.scheme)
		if err != nil {
			return err
		}
		s.heads++
		r.head = s.heads
		var durable int
		r.record, durable, err = s.put(s.life, coder, disperse.NewID(), s.plain, &headBytes{s.heads, func(made *record) []byte {
			now := *r
			now.record = *made
			return s.keys().sign(s.head(&now, s.last))
		}})
		if err == nil && durable < quorum(s.scheme) && !s.cfg.DegradedWrites {
			err = ErrBusy
		}
		return err
	})
	if err != nil {
		return err
	}
	n := int64(len(s.plain))
	if err := s.apply(g.ops, r); err != nil {
		return err
	}
	s.before, s.last, s.sequence = s.last, r, g.sequence
	s.moved.Store(time.Now().UnixNano())
	if s.logged.Add(n) > max(s.cfg.Snapshot, s.snapshotSize.Load()/snapshotShare) || s.blocks.Add(1) > snapshotBlocks {
		s.wantSnapshot()
	}
	return nil
}

// insist repeats what locations have to do until they have, the store is closed, or another front end has it.
func (s *Store) insist(what string, f func() error) error {
	defer s.insisting.Store(false)
	for pause := 20 * time.Millisecond; ; pause = min(2*pause, time.Second) {
		err := f()
		s.insisting.Store(true)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, ErrOld):
			s.lose()
			return ErrOld
		case s.life.Err() != nil:
			return errClosed
		}
		s.log.Warn(what+" again", "error", err)
		select {
		case <-s.life.Done():
		case <-time.After(pause):
		}
	}
}

// head is what locations are told when last is the log's last block.
func (s *Store) head(last, before *ref) *head {
	h := &head{epoch: s.epoch, sequence: s.heads, key: s.keys().Epoch, places: map[uint16]disperse.Place{}, last: last, before: before, snapshot: s.snapshot.Load()}
	add := func(r *record) {
		for _, i := range r.members() {
			h.places[i] = s.placeOf(i)
		}
	}
	add(&last.record)
	if before != nil {
		add(&before.record)
	}
	if h.snapshot != nil {
		add(&h.snapshot.record)
	}
	return h
}

// seal tells locations, before this front end's first block, where the log ends that it goes on from: so that a block which
// an earlier one left unfinished is decided once.
func (s *Store) seal() error {
	if s.sealed || s.last == nil {
		s.sealed = true
		return nil
	}
	patience := askLate
	err := s.insist("seal the log", func() error {
		// A place that is silent is waited for only if it does not go without.
		ctx, cancel := context.WithTimeout(s.life, patience)
		defer cancel()
		patience = min(2*patience, lateLimit)
		if err := s.mend(ctx, s.last); err != nil {
			return err
		}
		s.heads++
		return s.putHeads(s.life, s.heads, s.keys().sign(s.head(s.last, s.before)))
	})
	s.sealed = err == nil
	return err
}

// apply makes a block's changes visible, and says in the same batch that they are in.
func (s *Store) apply(ops []byte, r *ref) error {
	b := s.db.NewBatchWithSize(len(ops) + 2048)
	defer b.Close()
	err := applyOps(b, ops)
	err = errors.Join(err, b.Set(sequenceKey(tableBlock, r.sequence), appendRecord(nil, &r.record), nil))
	err = errors.Join(err, b.Set(ownKey(tableApplied), r.append(nil), nil))
	err = errors.Join(err, s.noteBlock(b, r))
	if err == nil {
		err = b.Commit(pebble.NoSync)
	}
	if err != nil {
		return fmt.Errorf("apply block %d: %w", r.sequence, err)
	}
	return nil
}

// blockCacheSize bounds the plain blocks that are kept for the bodies in them.
const blockCacheSize = 32 << 20

// blockCache keeps the blocks that were read last.
type blockCache struct {
	mu     sync.Mutex
	limit  int
	size   int
	blocks map[uint64]*cachedBlock
	tick   uint64
}

type cachedBlock struct {
	block
	size int
	used uint64
}

func (c *blockCache) get(seq uint64) (*block, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	b, ok := c.blocks[seq]
	if !ok {
		return nil, false
	}
	c.tick++
	b.used = c.tick
	return &b.block, true
}

func (c *blockCache) put(b *block, size int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.blocks == nil {
		c.blocks = map[uint64]*cachedBlock{}
	}
	if _, ok := c.blocks[b.sequence]; ok || size > c.limit/4 {
		return
	}
	c.tick++
	c.blocks[b.sequence] = &cachedBlock{*b, size, c.tick}
	c.size += size
	for c.size > c.limit {
		// Of a few at random, the one that was used longest ago.
		var worst uint64
		seen := 0
		for seq, b := range c.blocks {
			if seen == 0 || b.used < c.blocks[worst].used {
				worst = seq
			}
			if seen++; seen == 8 {
				break
			}
		}
		c.size -= c.blocks[worst].size
		delete(c.blocks, worst)
	}
}

// body appends a small body to dst.
func (s *Store) body(ctx context.Context, dst []byte, p spot) ([]byte, error) {
	b, ok := s.cache.get(p.sequence)
	if !ok {
		var err error
		if b, err = s.readBlock(ctx, p.sequence); err != nil {
			return dst, err
		}
	}
	body, err := b.body(p)
	return append(dst, body...), err
}

func (s *Store) readBlock(ctx context.Context, seq uint64) (*block, error) {
	if err := s.enter(); err != nil {
		return nil, err
	}
	defer s.leave()
	v := view{r: s.db}
	row, ok, err := v.get(sequenceKey(tableBlock, seq))
	if err == nil && !ok {
		err = fmt.Errorf("it is not in the metadata: %w", ErrLost)
	}
	if err != nil {
		return nil, fmt.Errorf("block %d: %w", seq, err)
	}
	r, err := parseRecord(row)
	if err != nil {
		return nil, fmt.Errorf("block %d: %w", seq, err)
	}
	plain, err := s.get(ctx, nil, &r)
	if err != nil {
		return nil, fmt.Errorf("block %d: %w", seq, err)
	}
	b, err := parseBlock(plain)
	if err == nil && b.sequence != seq {
		err = errBlock
	}
	if err != nil {
		return nil, fmt.Errorf("block %d: %w", seq, err)
	}
	s.cache.put(&b, len(plain))
	return &b, nil
}
