package store

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"time"

	"holdfast/disperse"
	"holdfast/store/location"
)

// Status is a store as a whole.
type Status struct {
	Segments, Blocks int64 // a block has many small bodies
	Small            int64 // bodies that lie in blocks
	Bytes            int64 // plain, of segments and blocks
	// Durable counts segments and blocks of each scheme by how many durable shards they have.
	Durable  map[disperse.Scheme]map[int]int64
	Degraded int64 // that have fewer than n
	Lost     int64 // that have fewer than k
	Old      int64 // sealed under the store key of an earlier epoch
	Queue    int64 // segments to be looked at
	Garbage  int64 // dropped, not removed yet
	Members  []MemberStatus
}

// MemberStatus is a place that a store uses, or used.
type MemberStatus struct {
	ID      disperse.Place
	Farm    string
	State   State
	Known   bool // it is in the configuration
	Shards  int64
	Answers bool
	Why     string        // it does not answer
	Down    time.Duration // since when not
	Full    bool
	Lies    int64 // wrong bytes and proofs since the start
	Audits  AuditRecord
	Status  location.Status // what it says of itself
}

// Status counts what there is. It reads all records.
func (s *Store) Status(ctx context.Context) (Status, error) {
	ctx, end, err := s.begin(ctx)
	if err != nil {
		return Status{}, err
	}
	defer end()
	st := Status{Durable: map[disperse.Scheme]map[int]int64{}}
	shards := map[uint16]int64{}
	audits := map[uint16]AuditRecord{}
	err = s.view(ctx, func(v *view) error {
		err := s.eachRecord(v, func(key []byte, block uint64, r *record) error {
			if key[1] == tableGarbage {
				return nil
			}
			if block > 0 {
				st.Blocks++
			} else {
				st.Segments++
			}
			d := r.left()
			if st.Durable[r.Scheme] == nil {
				st.Durable[r.Scheme] = map[int]int64{}
			}
			st.Durable[r.Scheme][d]++
			if d < r.Scheme.N {
				st.Degraded++
			}
			if d < r.Scheme.K {
				st.Lost++
			}
			if r.Key < s.keys().Epoch && !r.Secret {
				st.Old++
			}
			st.Bytes += int64(r.Size)
			for _, i := range r.Members {
				shards[i]++
			}
			return nil
		})
		if err != nil {
			return err
		}
		for table, n := range map[byte]*int64{tableGarbage: &st.Garbage, tableQueue: &st.Queue, tableSegment: &st.Small} {
			c := v.scan(ownKey(table), ownKey(table+1), 2)
			for c.Next() {
				*n++
			}
			if err := c.Close(); err != nil {
				return err
			}
		}
		st.Small -= st.Segments
		c := v.scan(ownKey(tableAudit), ownKey(tableAudit+1), 2)
		for c.Next() {
			a, err := parseAudit(c.Value())
			if err != nil || len(c.Key()) != 2 {
				return errors.Join(err, c.Close(), errRow)
			}
			audits[binary.BigEndian.Uint16(c.Key())] = a
		}
		return c.Close()
	})
	if err != nil {
		return st, fmt.Errorf("status: %w", err)
	}
	s.members()
	s.placing.RLock()
	var all []*member
	all = append(all, s.all...)
	for _, m := range s.indexes {
		if m.Location == nil {
			all = append(all, m)
		}
	}
	s.placing.RUnlock()
	st.Members = make([]MemberStatus, len(all))
	var wg sync.WaitGroup
	for i, m := range all {
		x := &st.Members[i]
		*x = MemberStatus{ID: m.ID, Farm: m.Farm, State: State(m.state.Load()), Known: m.Location != nil, Shards: shards[m.index], Lies: m.lies.Load(), Audits: audits[m.index]}
		if !x.Known {
			continue
		}
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
			defer cancel()
			said, err := m.Location.Status(ctx)
			if x.Status = said; err != nil {
				x.Why, x.Down = err.Error(), m.downFor()
				return
			}
			x.Answers = true
			m.mu.Lock()
			defer m.mu.Unlock()
			x.Full = time.Now().Before(m.full)
		})
	}
	wg.Wait()
	return st, nil
}
