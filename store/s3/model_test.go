package s3

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"slices"
	"sort"
	"sync"
	"time"

	"holdfast/disperse"
	"holdfast/store"
)

// model is store.Objects in memory: what this package may ask of a store, and what it must not do. Bodies that are kept
// twice, dropped without having been kept, or read when they are gone are errors.
type model struct {
	mu     sync.RWMutex
	keys   []string // sorted
	values map[string][]byte
	piece  int // bytes of a segment
	small  map[disperse.ID][]byte
	kept   map[disperse.ID]bool
	held   map[disperse.ID]time.Time

	fail func() error // of the next Update, before it happens; nil for none
}

func newModel() *model {
	return &model{values: map[string][]byte{}, piece: 1 << 20, small: map[disperse.ID][]byte{}, kept: map[disperse.ID]bool{}, held: map[disperse.ID]time.Time{}}
}

func (m *model) Write(_ context.Context, class string, r io.Reader, size int64) (body store.Body, err error) {
	if class != "" && class != "STANDARD" && class != "SHAMIR" {
		return body, fmt.Errorf("write: class %s: %w", class, store.ErrClass)
	}
	for {
		most := int64(m.piece)
		if size >= 0 { // a store that knows the size need not look for the end
			most = min(most, size-body.Size)
		}
		b, err := io.ReadAll(io.LimitReader(r, most))
		if err != nil {
			m.Discard(body)
			return store.Body{}, fmt.Errorf("write: %w", err)
		}
		if len(b) == 0 {
			break
		}
		p := store.Piece{Size: uint32(len(b))}
		rand.Read(p.ID[:])
		m.mu.Lock()
		m.small[p.ID] = b
		m.mu.Unlock()
		body.Segments, body.Size = append(body.Segments, p), body.Size+int64(len(b))
	}
	if size >= 0 && body.Size != size {
		m.Discard(body)
		return store.Body{}, io.ErrUnexpectedEOF
	}
	return body, nil
}

func (m *model) Discard(b store.Body) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, p := range b.Segments {
		if !m.kept[p.ID] {
			delete(m.small, p.ID)
		}
	}
}

func (m *model) Read(_ context.Context, b store.Body, off, n int64) (io.ReadCloser, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	var all []io.Reader
	for _, p := range b.Segments {
		d, ok := m.small[p.ID]
		if !ok || len(d) != int(p.Size) {
			return nil, fmt.Errorf("read segment %x: %w", p.ID, store.ErrLost)
		}
		from, to := min(max(off, 0), int64(len(d))), min(max(off+n, 0), int64(len(d)))
		all = append(all, bytes.NewReader(d[from:to]))
		off -= int64(len(d))
	}
	return io.NopCloser(io.MultiReader(all...)), nil
}

func (m *model) Retain(_ context.Context, b store.Body, until time.Time) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.fail != nil {
		if err := m.fail(); err != nil {
			return err
		}
	}
	for _, p := range b.Segments {
		if !m.kept[p.ID] {
			return fmt.Errorf("retain segment %x: it is not kept", p.ID)
		}
		if until.After(m.held[p.ID]) {
			m.held[p.ID] = until
		}
	}
	return nil
}

func (m *model) View(_ context.Context, f func(store.Reader) error) error {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return f(modelReader{m})
}

func (m *model) Update(_ context.Context, f func(store.Tx) error) (err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.fail != nil {
		if err := m.fail(); err != nil {
			return err
		}
	}
	t := &modelTx{modelReader: modelReader{m}}
	err = errors.Join(f(t), t.err)
	if err != nil {
		for _, undo := range slices.Backward(t.undo) {
			undo()
		}
	}
	return err
}

type modelReader struct{ m *model }

func (r modelReader) Get(key []byte) ([]byte, bool, error) {
	v, ok := r.m.values[string(key)]
	return bytes.Clone(v), ok, nil
}

func (r modelReader) Scan(from, to []byte) store.Cursor {
	return &modelCursor{m: r.m, at: -1, from: string(from), to: string(to)}
}

type modelCursor struct {
	m        *model
	at       int
	from, to string
}

func (c *modelCursor) ok() bool { return c.at < len(c.m.keys) && (c.to == "" || c.m.keys[c.at] < c.to) }

func (c *modelCursor) Next() bool {
	if c.at < 0 {
		return c.Seek([]byte(c.from))
	}
	c.at++
	return c.ok()
}

func (c *modelCursor) Seek(key []byte) bool {
	c.at = sort.SearchStrings(c.m.keys, max(string(key), c.from))
	return c.ok()
}

func (c *modelCursor) Key() []byte   { return []byte(c.m.keys[c.at]) }
func (c *modelCursor) Value() []byte { return c.m.values[c.m.keys[c.at]] }
func (c *modelCursor) Close() error  { return nil }

type modelTx struct {
	modelReader
	undo []func()
	err  error
}

func (t *modelTx) put(key string, v []byte, there bool) {
	m := t.m
	old, had := m.values[key]
	t.undo = append(t.undo, func() { m.set(key, old, had) })
	m.set(key, v, there)
}

func (m *model) set(key string, v []byte, there bool) {
	i, found := slices.BinarySearch(m.keys, key)
	switch {
	case there && !found:
		m.keys = slices.Insert(m.keys, i, key)
	case !there && found:
		m.keys = slices.Delete(m.keys, i, i+1)
	}
	if there {
		m.values[key] = v
	} else {
		delete(m.values, key)
	}
}

func (t *modelTx) Set(key, value []byte) { t.put(string(key), bytes.Clone(value), true) }
func (t *modelTx) Delete(key []byte)     { t.put(string(key), nil, false) }

func (t *modelTx) Keep(b store.Body) {
	for _, p := range b.Segments {
		if _, there := t.m.small[p.ID]; !there || t.m.kept[p.ID] {
			t.err = fmt.Errorf("keep segment %x: it is not there, or was kept", p.ID)
			return
		}
		t.m.kept[p.ID] = true
		t.undo = append(t.undo, func() { delete(t.m.kept, p.ID) })
	}
}

func (t *modelTx) Drop(b store.Body) {
	for _, p := range b.Segments {
		d := t.m.small[p.ID]
		if !t.m.kept[p.ID] {
			t.err = fmt.Errorf("drop segment %x: it is not kept", p.ID)
			return
		}
		delete(t.m.kept, p.ID)
		delete(t.m.small, p.ID)
		t.undo = append(t.undo, func() { t.m.kept[p.ID], t.m.small[p.ID] = true, d })
	}
}
