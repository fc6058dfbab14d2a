package store

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/bloom"
	"github.com/cockroachdb/pebble/v2/sstable"

	"holdfast/disperse"
)

// Keys of the metadata begin with whose they are. The store's own tables have a letter more.
const (
	own  = 0
	user = 1

	tableApplied  = 'a' // the last block that is in here: ref
	tableBlock    = 'b' // SEQUENCE: record
	tableGarbage  = 'g' // ID: when it was let go, and what tableSegment said
	tableIdentity = 'i' // whose the database is
	tableLive     = 'l' // SEQUENCE: live
	tableSnapshot = 'n' // the newest snapshot, and the segments that it consists of
	tableSegment  = 's' // ID: a record, or where in a block it is
)

// First byte of what tableSegment says.
const (
	inSegment = 'o' // a record follows
	inBlock   = 'b' // a spot follows
)

// spot is where in a block a small body is, counted from the block's first body.
type spot struct {
	sequence uint64
	off, n   uint32
}

func (p spot) append(b []byte) []byte {
	b = binary.BigEndian.AppendUint64(append(b, inBlock), p.sequence)
	return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(b, p.off), p.n)
}

func parseSpot(b []byte) (p spot, ok bool) {
	if len(b) != 17 || b[0] != inBlock {
		return p, false
	}
	return spot{binary.BigEndian.Uint64(b[1:]), binary.BigEndian.Uint32(b[9:]), binary.BigEndian.Uint32(b[13:])}, true
}

// live is what of a block's bodies is still referred to, and what there was.
type live struct{ bodies, bytes, total uint64 }

func (l live) append(b []byte) []byte {
	return binary.AppendUvarint(binary.AppendUvarint(binary.AppendUvarint(b, l.bodies), l.bytes), l.total)
}

func parseLive(b []byte) (l live, ok bool) {
	for _, v := range []*uint64{&l.bodies, &l.bytes, &l.total} {
		x, n := binary.Uvarint(b)
		if n <= 0 {
			return l, false
		}
		*v, b = x, b[n:]
	}
	return l, len(b) == 0
}

func ownKey(table byte, rest ...byte) []byte { return append([]byte{own, table}, rest...) }

func idKey(table byte, id disperse.ID) []byte { return ownKey(table, id[:]...) }

func sequenceKey(table byte, seq uint64) []byte {
	return binary.BigEndian.AppendUint64([]byte{own, table}, seq)
}

var errRow = errors.New("metadata has a row that is not in its format")

// The log is the truth: the database need not survive more than the process.
// spoilt is told of a damage that Pebble meets in its files, maybe while it works by itself.
func databaseOptions(cache *pebble.Cache, memory int64, log *slog.Logger, spoilt func(error)) *pebble.Options {
	o := &pebble.Options{
		Cache:                       cache,
		FormatMajorVersion:          pebble.FormatNewest,
		MemTableSize:                uint64(memory / 8),
		MemTableStopWritesThreshold: 4,
		L0CompactionThreshold:       4,
		L0StopWritesThreshold:       24,
		Logger:                      databaseLog{log},
		EventListener:               &pebble.EventListener{DataCorruption: func(i pebble.DataCorruptionInfo) { spoilt(i.Details) }},
	}
	for i := range o.Levels {
		o.Levels[i].FilterPolicy = bloom.FilterPolicy(10)
		o.Levels[i].FilterType = pebble.TableFilter
		o.Levels[i].BlockSize = 8 << 10
		o.Levels[i].Compression = func() *sstable.CompressionProfile { return sstable.NoCompression } // much of it is keys, names and digests
	}
	return o
}

// databaseLog passes on what is worth reading.
type databaseLog struct{ log *slog.Logger }

func (l databaseLog) Infof(string, ...any) {}
func (l databaseLog) Errorf(format string, a ...any) {
	l.log.Error("metadata: " + fmt.Sprintf(format, a...))
}
func (l databaseLog) Fatalf(format string, a ...any) { panic("metadata: " + fmt.Sprintf(format, a...)) }

// view reads the metadata. Its keys are whole ones; reader is what a user sees of it.
type view struct {
	r    pebble.Reader
	open []*cursor // so that none outlives the view
}

func (v *view) get(key []byte) ([]byte, bool, error) {
	b, c, err := v.r.Get(key)
	if errors.Is(err, pebble.ErrNotFound) {
		return nil, false, nil
	} else if err != nil {
		return nil, false, fmt.Errorf("metadata: %w", err)
	}
	b = bytes.Clone(b)
	if b == nil {
		b = []byte{}
	}
	return b, true, c.Close()
}

// scan walks whole keys, of which the first skip bytes are not shown.
func (v *view) scan(from, to []byte, skip int) *cursor {
	it, err := v.r.NewIter(&pebble.IterOptions{LowerBound: from, UpperBound: to})
	c := &cursor{it: it, err: err, skip: skip, prefix: from[:skip]}
	v.open = append(v.open, c)
	return c
}

func (v *view) close() {
	for _, c := range v.open {
		c.Close()
	}
	v.open = v.open[:0]
}

type cursor struct {
	it      *pebble.Iterator
	prefix  []byte
	skip    int
	started bool
	err     error
}

func (c *cursor) Next() bool {
	if c.it == nil {
		return false
	}
	if !c.started {
		c.started = true
		return c.it.First()
	}
	return c.it.Next()
}

func (c *cursor) Seek(key []byte) bool {
	if c.it == nil {
		return false
	}
	c.started = true
	return c.it.SeekGE(append(bytes.Clone(c.prefix), key...))
}

func (c *cursor) Key() []byte   { return c.it.Key()[c.skip:] }
func (c *cursor) Value() []byte { return c.it.Value() }

func (c *cursor) Close() error {
	if c.it != nil {
		c.err = errors.Join(c.err, c.it.Close())
		c.it = nil
	}
	return c.err
}

func userKey(key []byte) []byte {
	return append(append(make([]byte, 0, 1+len(key)), user), key...)
}

// reader is a user's view.
type reader struct{ v *view }

func (r reader) Get(key []byte) ([]byte, bool, error) { return r.v.get(userKey(key)) }

// Scan implements Reader. A nil to is the end.
func (r reader) Scan(from, to []byte) Cursor {
	end := []byte{user + 1}
	if to != nil {
		end = userKey(to)
	}
	return r.v.scan(userKey(from), end, 1)
}

// View implements Objects.
func (s *Store) View(ctx context.Context, f func(Reader) error) error {
	return s.view(ctx, func(v *view) error { return f(reader{v}) })
}

func (s *Store) view(ctx context.Context, f func(*view) error) error {
	if s.old.Load() {
		return ErrOld
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := s.enter(); err != nil {
		return err
	}
	defer s.leave()
	snap := s.db.NewSnapshot()
	defer snap.Close()
	v := &view{r: snap}
	defer v.close()
	return f(v)
}

// tx is a change under way. What goes wrong in it is remembered, and undoes it.
type tx struct {
	view
	s   *Store
	g   *group
	err error
}

func (t *tx) fail(err error) {
	if t.err == nil {
		t.err = err
	}
}

func (t *tx) get(key []byte) ([]byte, bool, error) {
	b, ok, err := t.view.get(key)
	if err != nil {
		t.fail(err)
	}
	return b, ok, err
}

func (t *tx) set(key, value []byte) {
	t.g.ops = appendOp(t.g.ops, opSet, key, value)
	if err := t.g.batch.Set(key, value, nil); err != nil {
		t.fail(err)
	}
}

func (t *tx) delete(key []byte) {
	t.g.ops = appendOp(t.g.ops, opDelete, key, nil)
	if err := t.g.batch.Delete(key, nil); err != nil {
		t.fail(err)
	}
}

// keep makes a pending piece part of the store.
func (t *tx) keep(p Piece) {
	v, ok := t.s.pending.Load(p.ID)
	piece, _ := v.(*pendingPiece)
	if !ok || piece.by == t {
		t.fail(fmt.Errorf("keep segment %v: it is not there, or was kept", p.ID))
		return
	}
	piece.by = t
	if piece.record != nil {
		t.set(idKey(tableSegment, p.ID), appendRecord([]byte{inSegment}, piece.record))
		t.s.kept(t, p.ID, piece.record)
	} else {
		t.embed(p.ID, piece.small)
	}
	t.g.kept = append(t.g.kept, p.ID)
}

// embed puts a small body into the block that this change will be in.
func (t *tx) embed(id disperse.ID, body []byte) {
	at := spot{t.g.sequence, uint32(len(t.g.bodies)), uint32(len(body))}
	t.g.bodies = append(t.g.bodies, body...)
	t.g.live.bodies++
	t.g.live.bytes += uint64(len(body))
	t.set(idKey(tableSegment, id), at.append(nil))
}

// drop moves a piece to the garbage, where a read that knows it still finds it. The collector removes it in time.
func (t *tx) drop(id disperse.ID, now time.Time) {
	key := idKey(tableSegment, id)
	v, ok, err := t.get(key)
	if err != nil {
		return
	}
	if !ok {
		t.fail(fmt.Errorf("drop segment %v: it is not there", id))
		return
	}
	t.delete(key)
	t.garbage(id, v, now)
}

func (t *tx) garbage(id disperse.ID, where []byte, now time.Time) {
	t.set(idKey(tableGarbage, id), append(binary.BigEndian.AppendUint64(nil, uint64(now.UnixMilli())), where...))
}

// release says that a body in a block is not referred to any more. A block without any goes with the next snapshot.
func (t *tx) release(p spot) {
	key := sequenceKey(tableLive, p.sequence)
	v, ok, err := t.get(key)
	if err != nil {
		return
	}
	l, whole := parseLive(v)
	if !ok || !whole || l.bodies == 0 || l.bytes < uint64(p.n) {
		t.fail(fmt.Errorf("release of block %d: %w", p.sequence, errRow))
		return
	}
	l.bodies, l.bytes = l.bodies-1, l.bytes-uint64(p.n)
	t.set(key, l.append(nil))
}

// userTx is a user's tx.
type userTx struct {
	reader
	t *tx
}

func (u userTx) Get(key []byte) ([]byte, bool, error) { return u.t.get(userKey(key)) }
func (u userTx) Set(key, value []byte)                { u.t.set(userKey(key), value) }
func (u userTx) Delete(key []byte)                    { u.t.delete(userKey(key)) }

func (u userTx) Keep(b Body) {
	for _, p := range b.Segments {
		u.t.keep(p)
	}
}

func (u userTx) Drop(b Body) {
	now := time.Now()
	for _, p := range b.Segments {
		u.t.drop(p.ID, now)
	}
}

// Update implements Objects.
func (s *Store) Update(ctx context.Context, f func(Tx) error) error {
	return s.update(ctx, func(t *tx) error { return f(userTx{reader{&t.view}, t}) })
}

// Operations of a block, one after another: kind, key, and of a set the value, each with its length.
const (
	opSet    = 1
	opDelete = 2
)

func appendOp(b []byte, kind byte, key, value []byte) []byte {
	b = binary.AppendUvarint(append(b, kind), uint64(len(key)))
	b = append(b, key...)
	if kind == opSet {
		b = append(binary.AppendUvarint(b, uint64(len(value))), value...)
	}
	return b
}

// eachOp reads what appendOp wrote.
func eachOp(b []byte, f func(kind byte, key, value []byte) error) error {
	take := func() (p []byte, ok bool) {
		n, m := binary.Uvarint(b)
		if m <= 0 || n > uint64(len(b)-m) {
			return nil, false
		}
		p, b = b[m:m+int(n)], b[m+int(n):]
		return p, true
	}
	for len(b) > 0 {
		kind := b[0]
		b = b[1:]
		key, ok := take()
		var value []byte
		if ok && kind == opSet {
			value, ok = take()
		}
		if !ok || kind != opSet && kind != opDelete || len(key) == 0 {
			return fmt.Errorf("operations of a block: %w", io.ErrUnexpectedEOF)
		}
		if err := f(kind, key, value); err != nil {
			return err
		}
	}
	return nil
}

func applyOps(to *pebble.Batch, ops []byte) error {
	return eachOp(ops, func(kind byte, key, value []byte) error {
		if kind == opDelete {
			return to.Delete(key, nil)
		}
		return to.Set(key, value, nil)
	})
}
