package location

import (
	"context"
	"fmt"
	"io"
	"slices"
	"time"

	"holdfast/disperse"
)

// As is the directory for one who has these rights.
func (d *Dir) As(r Rights) *Session { return &Session{d: d, rights: r} }

// A Session is a Location in this process. It is used by one goroutine until it has announced itself.
type Session struct {
	d      *Dir
	rights Rights
	front
}

var _ Location = (*Session)(nil)

func (s *Session) may(r Rights) error {
	if s.rights&r == 0 {
		return fmt.Errorf("%v: %w", r, ErrRights)
	}
	return nil
}

func named(op string, n Name, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s shard %v: %w", op, n, err)
}

// Announce implements Location.
func (s *Session) Announce(_ context.Context, e Epoch, h Holder) error {
	err := s.may(Write)
	if err == nil {
		err = s.d.announce(e, h)
	}
	if err != nil {
		return fmt.Errorf("announce epoch %d: %w", e, err)
	}
	s.front = front{e, h}
	return nil
}

func (d *Dir) announce(e Epoch, h Holder) error {
	return d.commit(&change{body: h[:], decide: func() (*record, error) {
		switch {
		case e == d.epoch && h == d.holder && e != 0:
			return nil, nil
		case e <= d.epoch:
			return nil, fmt.Errorf("epoch %d is announced: %w", d.epoch, ErrFenced)
		case e-d.epoch > maxLeap:
			return nil, fmt.Errorf("epoch %d is announced, that is too far from it: %w", d.epoch, ErrSize)
		}
		return &record{kind: kindEpoch, epoch: e}, nil
	}})
}

// Put implements Location.
func (s *Session) Put(_ context.Context, n Name, shard []byte, retain time.Time) error {
	err := s.may(Write)
	if err == nil {
		err = s.d.put(s.front, n, int64(len(shard)), (*bytesReader)(&shard), retain, nil)
	}
	return named("put", n, err)
}

// bytesReader reads a slice.
type bytesReader []byte

func (b *bytesReader) Read(p []byte) (int, error) {
	n := copy(p, *b)
	*b = (*b)[n:]
	return n, nil // it has as many as are asked for
}

// Get implements Location.
func (s *Session) Get(_ context.Context, n Name, off int64, p []byte) error {
	err := s.may(Read)
	if err == nil {
		var f shard
		if err = f.open(s.d, n, false, false); err == nil {
			err = f.readAt(p, off)
			f.close()
		}
	}
	return named("get", n, err)
}

// Stat implements Location.
func (s *Session) Stat(_ context.Context, n Name) (Info, error) {
	if err := s.may(Read); err != nil {
		return Info{}, named("stat", n, err)
	}
	s.d.mu.RLock()
	defer s.d.mu.RUnlock()
	e, ok := s.d.find(n)
	if !ok {
		return Info{}, named("stat", n, ErrAbsent)
	}
	return s.d.info(n, e), nil
}

func (d *Dir) info(n Name, e entry) Info {
	_, bad := d.rotten[n]
	return Info{Name: n, Size: int64(e.size), Put: milli(e.put), Retain: milli(e.retain), Deleted: milli(e.deleted), Rotten: bad}
}

// milli is a time, 0 the zero one.
func milli(ms int64) time.Time {
	if ms == 0 {
		return time.Time{}
	}
	return time.UnixMilli(ms).UTC()
}

// List implements Location. A page is short of MaxPage at the end, or when few shards are of the kind that was asked for.
func (s *Session) List(_ context.Context, from Name, which Which) (page []Info, next Name, err error) {
	if err := s.may(Read); err != nil {
		return nil, next, fmt.Errorf("list: %w", err)
	}
	d := s.d
	d.mu.RLock()
	defer d.mu.RUnlock()
	var names []Name
	add := func(n Name) {
		if slices.Compare(n[:], from[:]) >= 0 {
			names = append(names, n)
		}
	}
	walk := func(f func(n Name, e entry) bool) {
		for b := bucketOf(from); b < len(d.index) && len(names) <= MaxPage; b++ {
			for n, e := range d.index[b] {
				if f(n, e) {
					add(n)
				}
			}
		}
	}
	few := func(set map[Name]struct{}) {
		if len(set) > 4*MaxPage {
			walk(func(n Name, _ entry) bool { _, ok := set[n]; return ok })
			return
		}
		for n := range set {
			add(n)
		}
	}
	switch which {
	case Live:
		walk(func(_ Name, e entry) bool { return e.deleted == 0 })
	case Held:
		few(d.held)
	case Rotten:
		few(d.rotten)
	default:
		return nil, next, fmt.Errorf("list: of kind %d: %w", which, ErrSize)
	}
	slices.SortFunc(names, func(a, b Name) int { return slices.Compare(a[:], b[:]) })
	if len(names) > MaxPage {
		next, names = names[MaxPage], names[:MaxPage]
	}
	for _, n := range names {
		e, _ := d.find(n)
		page = append(page, d.info(n, e))
	}
	return page, next, nil
}

// Delete implements Location.
func (s *Session) Delete(_ context.Context, n Name) error {
	err := s.may(Delete)
	if err == nil {
		err = s.d.commit(&change{name: n, decide: func() (*record, error) {
			if err := s.d.fenced(s.front); err != nil {
				return nil, err
			}
			return s.d.changed(n, func(e *entry) error {
				now := s.d.now()
				if e.deleted == 0 && e.retain > now {
					return fmt.Errorf("until %v: %w", milli(e.retain), ErrLocked)
				}
				if e.deleted == 0 {
					e.deleted = now
				}
				return nil
			})
		}})
	}
	return named("delete", n, err)
}

// Undelete implements Location.
func (s *Session) Undelete(_ context.Context, n Name) error {
	err := s.may(Recover)
	if err == nil {
		err = s.d.commit(&change{name: n, decide: func() (*record, error) {
			return s.d.changed(n, func(e *entry) error { e.deleted = 0; return nil })
		}})
	}
	return named("undelete", n, err)
}

// Purge implements Location.
func (s *Session) Purge(_ context.Context, n Name) error {
	err := s.may(Recover)
	if err == nil {
		err = s.d.commit(s.d.removal(n, 0))
	}
	return named("purge", n, err)
}

// Retain implements Location.
func (s *Session) Retain(_ context.Context, n Name, until time.Time) error {
	err := s.may(Write)
	if err == nil {
		s.d.mu.Lock()
		var ms int64
		ms, err = s.d.retention(until)
		s.d.mu.Unlock()
		if err == nil {
			err = s.d.state(s.front, n, nil, func(e *entry) error { e.retain = max(e.retain, ms); return nil })
		}
	}
	return named("retain", n, err)
}

// PutHead implements Location.
func (s *Session) PutHead(_ context.Context, sequence uint64, signed []byte) error {
	err := s.may(Write)
	if err == nil && len(signed) > MaxHead {
		err = ErrSize
	}
	if err == nil {
		err = s.d.commit(&change{head: headBody(s.epoch, sequence, signed), by: s.holder})
	}
	if err != nil {
		return fmt.Errorf("put head %d of epoch %d: %w", sequence, s.epoch, err)
	}
	return nil
}

// Append implements Location.
func (s *Session) Append(_ context.Context, n Name, shard []byte, sequence uint64, signed []byte) error {
	return s.append(n, int64(len(shard)), (*bytesReader)(&shard), sequence, signed)
}

func (s *Session) append(n Name, size int64, r io.Reader, sequence uint64, signed []byte) error {
	err := s.may(Write)
	if err == nil && len(signed) > MaxHead {
		err = ErrSize
	}
	if err == nil {
		err = s.d.put(s.front, n, size, r, time.Time{}, headBody(s.epoch, sequence, signed))
	}
	return appended(n, s.epoch, sequence, err)
}

func appended(n Name, e Epoch, sequence uint64, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("append shard %v and head %d of epoch %d: %w", n, sequence, e, err)
}

// Head implements Location.
func (s *Session) Head(context.Context) (Head, error) {
	if err := s.may(Read); err != nil {
		return Head{}, fmt.Errorf("head: %w", err)
	}
	s.d.mu.RLock()
	defer s.d.mu.RUnlock()
	h := s.d.head
	h.Bytes = slices.Clone(h.Bytes)
	return h, nil
}

// Earlier implements Location.
func (s *Session) Earlier(context.Context) ([]Head, error) {
	if err := s.may(Read); err != nil {
		return nil, fmt.Errorf("earlier heads: %w", err)
	}
	s.d.mu.Lock()
	defer s.d.mu.Unlock()
	s.d.now()
	s.d.forget()
	var out []Head
	for _, h := range slices.Backward(s.d.earlier) {
		h.Bytes = slices.Clone(h.Bytes)
		out = append(out, h.Head)
	}
	return out, nil
}

// Prove implements Location. The whole shard is read each time: nothing is kept that could answer instead of it.
func (s *Session) Prove(_ context.Context, n Name, leaves []int) (Proof, error) {
	err := s.may(Read)
	var p Proof
	if err == nil {
		p, err = s.d.prove(n, leaves)
	}
	return p, named("prove", n, err)
}

func (d *Dir) prove(n Name, leaves []int) (Proof, error) {
	if len(leaves) == 0 || len(leaves) > MaxLeaves {
		return Proof{}, fmt.Errorf("%d leaves, at most %d: %w", len(leaves), MaxLeaves, ErrSize)
	}
	var f shard
	if err := f.open(d, n, false, true); err != nil {
		return Proof{}, err
	}
	defer f.close()
	t, err := d.hash(&f, nil)
	if err != nil {
		return Proof{}, err
	}
	defer d.trees.Put(t)
	p := Proof{Size: t.Size()}
	for _, l := range leaves {
		if l < 0 || l >= disperse.Leaves(p.Size) {
			return Proof{}, fmt.Errorf("leaf %d of %d: %w", l, disperse.Leaves(p.Size), ErrSize)
		}
		off := int64(l) * disperse.LeafSize
		data := make([]byte, min(disperse.LeafSize, p.Size-off))
		if err := f.readAt(data, off); err != nil {
			return Proof{}, err
		}
		path, err := t.Prove(l, 1)
		if err != nil {
			return Proof{}, err
		}
		p.Leaves = append(p.Leaves, Leaf{data, path})
	}
	return p, nil
}

// hash reads a shard into a tree, which the caller puts back. Each piece waits for pace.
func (d *Dir) hash(f *shard, pace func(n int) error) (*disperse.Tree, error) {
	t := d.trees.Get().(*disperse.Tree)
	t.Reset()
	b := d.pieces.Get().(*[]byte)
	defer d.pieces.Put(b)
	for off := int64(0); off < int64(f.e.size); {
		p := (*b)[:min(pieceSize, int64(f.e.size)-off)]
		err := f.readAt(p, off)
		if err == nil {
			_, err = t.Write(p)
		}
		if err == nil && pace != nil {
			err = pace(len(p))
		}
		if err != nil {
			d.trees.Put(t)
			return nil, err
		}
		off += int64(len(p))
	}
	if t.Name() != f.n {
		d.trees.Put(t)
		return nil, f.rot()
	}
	return t, nil
}

// Status implements Location.
func (s *Session) Status(context.Context) (Status, error) {
	if s.rights == 0 {
		return Status{}, fmt.Errorf("status: %w", ErrRights)
	}
	d := s.d
	d.mu.Lock()
	defer d.mu.Unlock()
	return Status{
		Epoch: d.epoch, Shards: d.shards, Bytes: d.bytes, Held: int64(len(d.held)), Rotten: int64(len(d.rotten)), Quota: d.cfg.Quota, Hold: d.cfg.Hold,
		Time: milli(d.now()), Scrubbed: d.scrubbed,
	}, nil
}
