package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	"holdfast/disperse"
)

var (
	// ErrMember is returned for a location that the store does not have.
	ErrMember = errors.New("not a location of this store")
	// ErrNeeded is returned for a location that the store cannot do without.
	ErrNeeded = errors.New("the store needs this location")
)

// A location is added by naming it in the configuration. One that shall go is drained, and removed when it is empty: then
// the configuration need not name it any more.

func (s *Store) memberOf(id disperse.Place) (*member, error) {
	s.members()
	s.placing.RLock()
	defer s.placing.RUnlock()
	for _, m := range s.indexes {
		if m.ID == id {
			return m, nil
		}
	}
	return nil, fmt.Errorf("location %v: %w", id, ErrMember)
}

// setState makes a member's state durable, and then uses it.
func (s *Store) setState(ctx context.Context, m *member, st State) error {
	err := s.update(ctx, func(t *tx) error {
		s.noteMembers(t)
		t.set(memberKey(m.index), memberRow{m.ID, st, m.Farm}.append(nil))
		return nil
	})
	if err == nil {
		m.state.Store(uint32(st))
	}
	return err
}

// Drain has a location get nothing new, and what it has made elsewhere; the queue of repairs does it. Of a location that is
// lost it does the same. It is refused where the others are too few.
func (s *Store) Drain(ctx context.Context, id disperse.Place) error {
	ctx, end, err := s.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	m, err := s.memberOf(id)
	if err != nil {
		return err
	}
	var rest []Member
	for _, x := range s.members() {
		if x != m && State(x.state.Load()) == Active {
			rest = append(rest, x.Member)
		}
	}
	schemes := []disperse.Scheme{s.cfg.Scheme}
	for _, c := range s.cfg.Classes {
		schemes = append(schemes, c)
	}
	for _, c := range schemes {
		if err := Placement(c, rest); err != nil && (!s.cfg.Fragile || len(rest) < c.N) {
			return fmt.Errorf("drain location %v: %w: without it, %w", id, ErrNeeded, err)
		}
	}
	if err := s.setState(ctx, m, Draining); err != nil {
		return fmt.Errorf("drain location %v: %w", id, err)
	}
	return s.enqueueAll(ctx, m)
}

// Undrain has a location be used again.
func (s *Store) Undrain(ctx context.Context, id disperse.Place) error {
	m, err := s.memberOf(id)
	if err == nil {
		err = s.setState(ctx, m, Active)
	}
	return err
}

// enqueueAll queues what has a shard at a member.
func (s *Store) enqueueAll(ctx context.Context, m *member) error {
	type entry struct {
		id     disperse.ID
		block  uint64
		margin int
	}
	for from := []byte(nil); ; {
		var page []entry
		next := []byte(nil)
		full := errors.New("the page is full")
		err := s.view(ctx, func(v *view) error {
			return s.eachRecord(v, func(key []byte, block uint64, r *record) error {
				if key[1] == tableGarbage || from != nil && compareKeys(key, from) < 0 {
					return nil
				}
				if len(page) == 1000 {
					next = bytes.Clone(key)
					return full
				}
				for _, i := range r.Members {
					if i == m.index {
						page = append(page, entry{r.ID, block, r.left() - r.Scheme.K})
					}
				}
				return nil
			})
		})
		if err != nil && !errors.Is(err, full) {
			return err
		}
		if len(page) > 0 {
			err := s.update(ctx, func(t *tx) error {
				for _, e := range page {
					t.set(queueKey(e.margin, e.id), queueRow{block: e.block}.append(nil))
				}
				return nil
			})
			if err != nil {
				return fmt.Errorf("queue what location %v has: %w", m.ID, err)
			}
			s.wakeRepair()
		}
		if from = next; from == nil {
			return nil
		}
	}
}

// compareKeys compares keys as eachRecord goes through them: segments, then blocks.
func compareKeys(a, b []byte) int {
	if a[1] != b[1] {
		if a[1] == tableSegment {
			return -1
		}
		return 1
	}
	return bytes.Compare(a, b)
}

// Remove lets go of a location that has been drained. It is refused as long as a segment has a shard there, and until the
// newest snapshot names it no more.
func (s *Store) Remove(ctx context.Context, id disperse.Place) error {
	ctx, end, err := s.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	m, err := s.memberOf(id)
	if err != nil {
		return err
	}
	if State(m.state.Load()) == Active {
		return fmt.Errorf("remove location %v: drain it first: %w", id, ErrNeeded)
	}
	count := func() (n int, err error) {
		err = s.view(ctx, func(v *view) error {
			return s.eachRecord(v, func(key []byte, _ uint64, r *record) error {
				for _, i := range r.Members {
					if i == m.index && key[1] != tableGarbage {
						n++
					}
				}
				return nil
			})
		})
		return n, err
	}
	// Two snapshots: the first one's blocks replace those that heads name.
	for range 2 {
		n, err := count()
		if err != nil {
			return fmt.Errorf("remove location %v: %w", id, err)
		}
		if n > 0 {
			return fmt.Errorf("remove location %v: %d segments have a shard there: %w", id, n, ErrNeeded)
		}
		if err := s.Snapshot(ctx); err != nil {
			return fmt.Errorf("remove location %v: %w", id, err)
		}
	}
	return s.setState(ctx, m, Removed)
}

// Retain locks the shards of a body at their locations until a time: nobody who has the front end's keys can delete them.
func (s *Store) Retain(ctx context.Context, b Body, until time.Time) error {
	ctx, end, err := s.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	seen := map[uint64]bool{}
	for _, p := range b.Segments {
		r, at, small, err := s.find(p.ID)
		if err != nil {
			return fmt.Errorf("retain: %w", err)
		}
		if small != nil {
			return fmt.Errorf("retain segment %v: it is not kept yet", p.ID)
		}
		if r == nil {
			if seen[at.sequence] {
				continue
			}
			seen[at.sequence] = true
			var row []byte
			var ok bool
			err := s.view(ctx, func(v *view) (err error) {
				row, ok, err = v.get(sequenceKey(tableBlock, at.sequence))
				return err
			})
			if err != nil || !ok {
				return fmt.Errorf("retain block %d: %w", at.sequence, errors.Join(err, errRow))
			}
			rec, err := parseRecord(row)
			if err != nil {
				return fmt.Errorf("retain block %d: %w", at.sequence, err)
			}
			r = &rec
		}
		if err := s.retain(ctx, r, until); err != nil {
			return err
		}
	}
	return nil
}

func (s *Store) retain(ctx context.Context, r *record, until time.Time) error {
	done := 0
	var why []error
	for i, x := range r.Members {
		m := s.memberAt(x)
		if !m.usable() {
			continue
		}
		err := s.announced(ctx, m, func() error { return m.Location.Retain(ctx, r.Names[i], until) })
		if err != nil {
			why = append(why, fmt.Errorf("location %v: %w", m.ID, err))
			continue
		}
		done++
	}
	if done < quorum(r.Scheme) {
		return fmt.Errorf("retain segment %v: %d shards are locked: %w", r.ID, done, errors.Join(append(why, ErrBusy)...))
	}
	return nil
}
