package comet

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"sync"

	"github.com/cockroachdb/pebble/v2"
	dbm "github.com/cometbft/cometbft-db"
)

// disk is the one database of a replica. CometBFT's stores and the machine's keys live in it under different prefixes,
// so that one write-ahead log orders them all: a write of the machine that is not synced itself is made durable by
// CometBFT's next synced write, and never outlives a write that came before it.
//
// After close every operation returns errClosed: goroutines of CometBFT that outlive its stop find a closed database,
// not a crash.
type disk struct {
	db *pebble.DB

	mu     sync.Mutex
	idle   sync.Cond // signalled when active drops to 0
	active int       // operations and iterators under way
	closed bool
}

var (
	errClosed   = errors.New("database is closed")
	errKeyEmpty = errors.New("key is empty")
	errNilValue = errors.New("value is nil")
)

// Prefixes of the tables.
const (
	tableBlocks   = "b/"
	tableState    = "s/"
	tableEvidence = "e/"
	tableMachine  = "m/"
)

// openDisk opens the database in a directory and holds its lock, which keeps a second process out.
func openDisk(dir string, log *slog.Logger) (*disk, error) {
	cache := pebble.NewCache(16 << 20)
	defer cache.Unref()
	db, err := pebble.Open(dir, &pebble.Options{
		Cache:              cache,
		FormatMajorVersion: pebble.FormatNewest,
		MemTableSize:       8 << 20,
		MaxOpenFiles:       256,
		Logger:             pebbleLog{log},
	})
	if err != nil {
		return nil, fmt.Errorf("open database %s: %w", dir, err)
	}
	d := &disk{db: db}
	d.idle.L = &d.mu
	return d, nil
}

// openDiskToRead opens a database that nobody has open, and writes nothing.
func openDiskToRead(dir string) (*disk, error) {
	db, err := pebble.Open(dir, &pebble.Options{ReadOnly: true, FormatMajorVersion: pebble.FormatNewest, ErrorIfNotExists: true, Logger: pebbleLog{slog.New(slog.DiscardHandler)}})
	if err != nil {
		return nil, fmt.Errorf("open database %s: %w", dir, err)
	}
	d := &disk{db: db}
	d.idle.L = &d.mu
	return d, nil
}

func (d *disk) enter() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return errClosed
	}
	d.active++
	return nil
}

func (d *disk) leave() {
	d.mu.Lock()
	if d.active--; d.active == 0 {
		d.idle.Broadcast()
	}
	d.mu.Unlock()
}

// close waits for what is under way and refuses what comes later.
func (d *disk) close() error {
	d.mu.Lock()
	if d.closed {
		d.mu.Unlock()
		return nil
	}
	d.closed = true
	for d.active > 0 {
		d.idle.Wait()
	}
	d.mu.Unlock()
	return d.db.Close()
}

func (d *disk) table(prefix string) *table { return &table{disk: d, prefix: []byte(prefix)} }

// table is the part of a disk under a prefix, as CometBFT's database interface.
type table struct {
	disk   *disk
	prefix []byte
}

// lateTable is a table for CometBFT, whose block store panics on every error. Some of its goroutines go on for a moment after it
// has stopped and said so: what they ask a closed database for is not there.
type lateTable struct{ *table }

func (t lateTable) Get(k []byte) ([]byte, error) {
	v, err := t.table.Get(k)
	if errors.Is(err, errClosed) {
		return nil, nil
	}
	return v, err
}

func (t lateTable) Has(k []byte) (bool, error) {
	v, err := t.Get(k)
	return v != nil, err
}

func (t *table) key(k []byte) []byte {
	out := make([]byte, 0, len(t.prefix)+len(k))
	return append(append(out, t.prefix...), k...)
}

// end is the first key after the table: prefixes end in '/'.
func (t *table) end() []byte {
	out := bytes.Clone(t.prefix)
	out[len(out)-1]++
	return out
}

// Get returns the value of a key, nil when it is absent.
func (t *table) Get(k []byte) ([]byte, error) {
	if len(k) == 0 {
		return nil, errKeyEmpty
	}
	if err := t.disk.enter(); err != nil {
		return nil, err
	}
	defer t.disk.leave()
	v, c, err := t.disk.db.Get(t.key(k))
	if errors.Is(err, pebble.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer c.Close()
	out := make([]byte, len(v)) // never nil: nil means absent
	copy(out, v)
	return out, nil
}

// Has says whether a key is present.
func (t *table) Has(k []byte) (bool, error) {
	v, err := t.Get(k)
	return v != nil, err
}

// Set writes a key.
func (t *table) Set(k, v []byte) error { return t.set(k, v, pebble.NoSync) }

// SetSync writes a key and everything before it to stable storage.
func (t *table) SetSync(k, v []byte) error { return t.set(k, v, pebble.Sync) }

func (t *table) set(k, v []byte, o *pebble.WriteOptions) error {
	switch {
	case len(k) == 0:
		return errKeyEmpty
	case v == nil:
		return errNilValue
	}
	if err := t.disk.enter(); err != nil {
		return err
	}
	defer t.disk.leave()
	return t.disk.db.Set(t.key(k), v, o)
}

// Delete removes a key.
func (t *table) Delete(k []byte) error { return t.delete(k, pebble.NoSync) }

// DeleteSync removes a key from stable storage.
func (t *table) DeleteSync(k []byte) error { return t.delete(k, pebble.Sync) }

func (t *table) delete(k []byte, o *pebble.WriteOptions) error {
	if len(k) == 0 {
		return errKeyEmpty
	}
	if err := t.disk.enter(); err != nil {
		return err
	}
	defer t.disk.leave()
	return t.disk.db.Delete(t.key(k), o)
}

// Iterator walks [start, end) upwards.
func (t *table) Iterator(start, end []byte) (dbm.Iterator, error) {
	return t.iterator(start, end, false)
}

// ReverseIterator walks [start, end) downwards.
func (t *table) ReverseIterator(start, end []byte) (dbm.Iterator, error) {
	return t.iterator(start, end, true)
}

func (t *table) iterator(start, end []byte, reverse bool) (*iterator, error) {
	if start != nil && len(start) == 0 || end != nil && len(end) == 0 {
		return nil, errKeyEmpty
	}
	if err := t.disk.enter(); err != nil {
		return nil, err
	}
	o := pebble.IterOptions{LowerBound: t.prefix, UpperBound: t.end()}
	if start != nil {
		o.LowerBound = t.key(start)
	}
	if end != nil {
		o.UpperBound = t.key(end)
	}
	it, err := t.disk.db.NewIter(&o)
	if err != nil {
		t.disk.leave()
		return nil, err
	}
	if reverse {
		it.Last()
	} else {
		it.First()
	}
	return &iterator{table: t, it: it, start: start, end: end, reverse: reverse}, nil
}

// Close does nothing: the tables of a disk are closed together, by the disk.
func (t *table) Close() error { return nil }

// NewBatch starts an atomic write.
func (t *table) NewBatch() dbm.Batch { return t.batch() }

func (t *table) batch() *batch {
	if t.disk.enter() != nil {
		return &batch{table: t}
	}
	return &batch{table: t, b: t.disk.db.NewBatch()}
}

// Print does nothing.
func (t *table) Print() error { return nil }

// Stats returns nothing.
func (t *table) Stats() map[string]string { return nil }

// Compact does nothing: Pebble compacts by itself.
func (t *table) Compact(_, _ []byte) error { return nil }

type iterator struct {
	table      *table
	it         *pebble.Iterator
	start, end []byte
	reverse    bool
	done       bool
}

func (i *iterator) Domain() (start, end []byte) { return i.start, i.end }
func (i *iterator) Valid() bool                 { return !i.done && i.it.Valid() }
func (i *iterator) Error() error                { return i.it.Error() }

func (i *iterator) Next() {
	if !i.Valid() {
		panic("comet: Next on an iterator at its end")
	}
	if i.reverse {
		i.it.Prev()
	} else {
		i.it.Next()
	}
}

func (i *iterator) Key() []byte {
	if !i.Valid() {
		panic("comet: Key of an iterator at its end")
	}
	return bytes.Clone(i.it.Key()[len(i.table.prefix):])
}

func (i *iterator) Value() []byte {
	if !i.Valid() {
		panic("comet: Value of an iterator at its end")
	}
	return append([]byte{}, i.it.Value()...)
}

func (i *iterator) Close() error {
	if i.done {
		return nil
	}
	i.done = true
	defer i.table.disk.leave()
	return i.it.Close()
}

// batch keeps the disk open until it is written or closed.
type batch struct {
	table *table
	b     *pebble.Batch // nil once written or closed
}

func (b *batch) Set(k, v []byte) error {
	switch {
	case len(k) == 0:
		return errKeyEmpty
	case v == nil:
		return errNilValue
	case b.b == nil:
		return errClosed
	}
	return b.b.Set(b.table.key(k), v, nil)
}

func (b *batch) Delete(k []byte) error {
	switch {
	case len(k) == 0:
		return errKeyEmpty
	case b.b == nil:
		return errClosed
	}
	return b.b.Delete(b.table.key(k), nil)
}

func (b *batch) Write() error     { return b.commit(pebble.NoSync) }
func (b *batch) WriteSync() error { return b.commit(pebble.Sync) }

func (b *batch) commit(o *pebble.WriteOptions) error {
	if b.b == nil {
		return errClosed
	}
	if err := b.b.Commit(o); err != nil {
		return err
	}
	return b.Close()
}

func (b *batch) Close() error {
	if b.b == nil {
		return nil
	}
	err := b.b.Close()
	b.b = nil
	b.table.disk.leave()
	return err
}

// pebbleLog passes on what is worth reading and drops the news of each flush.
type pebbleLog struct{ log *slog.Logger }

func (l pebbleLog) Infof(string, ...any)      {}
func (l pebbleLog) Errorf(f string, a ...any) { l.log.Error(fmt.Sprintf(f, a...)) }
func (l pebbleLog) Fatalf(f string, a ...any) { panic("comet: " + fmt.Sprintf(f, a...)) }
