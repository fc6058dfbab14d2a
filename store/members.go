package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"holdfast/disperse"
)

var (
	// ErrMember is returned for a location that the store does not have.
	ErrMember = errors.New("not a location of this store")
	// ErrMemberThere is returned for a location that the store has already.
	ErrMemberThere = errors.New("the store has this location already")
	// ErrNeeded is returned for a location that the store cannot do without.
	ErrNeeded = errors.New("the store needs this location")
)

// A location is added by naming it in the configuration, or while the store runs. One that shall go is drained, and removed
// when it is empty. Who added one or removed it changes the configuration too: the store knows where nobody is.

// Add has a location be used from now on. It must answer, and keep no other store's log.
func (s *Store) Add(ctx context.Context, x Member) error {
	ctx, end, err := s.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	s.changing.Lock()
	defer s.changing.Unlock()
	for _, m := range s.members() {
		if m.ID == x.ID {
			return fmt.Errorf("add location %v: it is %v: %w", x.ID, State(m.state.Load()), ErrMemberThere)
		}
	}
	if x.Location == nil || x.Farm == "" {
		return fmt.Errorf("add location %v: it has no farm, or is none", x.ID)
	}
	hd, err := x.Location.Head(ctx)
	if err == nil && hd.Epoch > 0 {
		if _, bad := s.keys().verify(hd); bad != nil {
			err = fmt.Errorf("%w: %w", bad, ErrKeys)
		}
	}
	if err == nil {
		err = x.Location.Announce(ctx, s.epoch, s.holder)
	}
	if err != nil {
		return fmt.Errorf("add location %v: %w", x.ID, err)
	}
	// What it is called is durable before anything names it. One that was here before is called as it was.
	s.placing.Lock()
	m := &member{Member: x, indexed: true}
	for i, old := range s.indexes {
		if old.ID == x.ID {
			m.index = i
			break
		}
		m.index = max(m.index, i+1)
	}
	if old := s.indexes[m.index]; old == nil {
		s.indexes[m.index] = &member{Member: Member{ID: x.ID, Farm: x.Farm}, index: m.index, indexed: true}
	}
	s.placing.Unlock()
	if err := s.setState(ctx, m, Active); err != nil {
		return fmt.Errorf("add location %v: %w", x.ID, err)
	}
	s.placing.Lock()
	s.indexes[m.index] = m
	s.all = append(slices.Clip(s.all), m)
	s.placing.Unlock()
	s.wakeRepair()
	return nil
}

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
	s.changing.Lock()
	defer s.changing.Unlock()
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
	s.changing.Lock()
	defer s.changing.Unlock()
	m, err := s.memberOf(id)
	if err == nil && State(m.state.Load()) == Removed {
		err = fmt.Errorf("undrain location %v: it was removed, add it again: %w", id, ErrMember)
	}
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
			return s.eachFrom(v, from, func(key []byte, block uint64, r *record) error {
				if key[1] == tableGarbage {
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

// StateOf is what a location is for.
func (s *Store) StateOf(id disperse.Place) (State, error) {
	m, err := s.memberOf(id)
	if err != nil {
		return 0, err
	}
	return State(m.state.Load()), nil
}

// Held is how many segments have a shard at a location, and what the location is for.
func (s *Store) Held(ctx context.Context, id disperse.Place) (n int, st State, err error) {
	m, err := s.memberOf(id)
	if err != nil {
		return 0, 0, err
	}
	err = s.view(ctx, func(v *view) error {
		return s.eachRecord(v, func(key []byte, _ uint64, r *record) error {
			if key[1] != tableGarbage && slices.Contains(r.Members, m.index) {
				n++
			}
			return nil
		})
	})
	return n, State(m.state.Load()), err
}

// Remove lets go of a location that has been drained. It is refused as long as a segment has a shard there, and until the
// newest snapshot names it no more.
func (s *Store) Remove(ctx context.Context, id disperse.Place) error {
	ctx, end, err := s.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	s.changing.Lock()
	defer s.changing.Unlock()
	m, err := s.memberOf(id)
	if err != nil {
		return err
	}
	if State(m.state.Load()) == Active {
		return fmt.Errorf("remove location %v: drain it first: %w", id, ErrNeeded)
	}
	// Two snapshots: the first one's blocks replace those that heads name.
	for range 2 {
		n, _, err := s.Held(ctx, id)
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
	if err := s.setState(ctx, m, Removed); err != nil {
		return fmt.Errorf("remove location %v: %w", id, err)
	}
	s.placing.Lock()
	defer s.placing.Unlock()
	s.all = slices.DeleteFunc(slices.Clone(s.all), func(x *member) bool { return x == m })
	return nil
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
