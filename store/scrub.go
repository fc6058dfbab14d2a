package store

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"holdfast/disperse"
	"holdfast/store/location"
)

// orphan is a shard that no record names.
type orphan struct {
	member uint16
	name   disperse.Name
}

const (
	scrubPass  = 200_000 // shards of one walk, so that memory is bounded
	maxOrphans = 500_000 // of all members, each its part
	maxUnknown = 4 * scrubPass
)

// Scrubbed is what a scrub found.
type Scrubbed struct {
	Shards  int64 // that records name, at locations that answered
	Missing int64 // of these, not there or rotten: they are in the queue of repairs
	Orphans int64 // shards that no record names
	Removed int64 // of these, that are known as such for long enough
	Silent  int   // locations that could not be asked
}

// expected is a shard that a record names.
type expected struct {
	id     disperse.ID
	block  uint64 // 0: it is not of a block
	member uint16
	shard  uint8
	size   uint32
}

// Scrub compares all records with what locations have: their lists say what is missing, what is rotten, and what nothing
// refers to. Whether what they list is there is for audits to find. rate is how many shards a second it looks at.
func (s *Store) Scrub(ctx context.Context, rate int) (Scrubbed, error) {
	return s.ScrubAt(ctx, rate, nil)
}

// ScrubAt is Scrub whose progress seen hears, if it is not nil: how many shards of about so many it has looked at.
func (s *Store) ScrubAt(ctx context.Context, rate int, seen func(done, about int64)) (sum Scrubbed, err error) {
	ctx, end, err := s.begin(ctx)
	if err != nil {
		return sum, err
	}
	defer end()
	s.upkeep.scrubbing.Lock()
	defer s.upkeep.scrubbing.Unlock()
	// What locations say they have does not count: it may be anything.
	total := int64(0)
	err = s.view(ctx, func(v *view) error {
		return s.eachRecord(v, func(_ []byte, _ uint64, r *record) error { total += int64(r.Scheme.N); return nil })
	})
	if err != nil {
		return sum, fmt.Errorf("scrub: %w", err)
	}
	// Names are digests: their first bits part them evenly.
	passes := min(total/scrubPass+1, 1<<16)
	found := map[orphan]bool{}
	pace := pacer{rate: rate, begin: time.Now()}
	if seen != nil {
		pace.seen = func(done int) { seen(int64(done), total) }
	}
	for p := range passes {
		lo, hi := p<<16/passes, (p+1)<<16/passes
		if err := s.scrubPart(ctx, uint32(lo), uint32(hi), &sum, found, &pace); err != nil {
			return sum, fmt.Errorf("scrub: %w", err)
		}
	}
	return sum, s.sweep(ctx, found, &sum)
}

// pacer keeps a walk to a rate.
type pacer struct {
	rate  int
	done  int
	begin time.Time
	seen  func(done int) // nil is nothing
}

func (p *pacer) did(ctx context.Context, n int) error {
	p.done += n
	if p.seen != nil {
		p.seen(p.done)
	}
	if p.rate <= 0 {
		return ctx.Err()
	}
	ahead := time.Duration(float64(p.done)/float64(p.rate)*float64(time.Second)) - time.Since(p.begin)
	if ahead < time.Millisecond {
		return ctx.Err()
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(ahead):
		return nil
	}
}

// eachRecord calls f for every segment and block there is, those that were dropped and not removed too.
func (s *Store) eachRecord(v *view, f func(key []byte, block uint64, r *record) error) error {
	return s.eachFrom(v, nil, f)
}

// eachFrom is eachRecord from a key on that an earlier f had; nil is the first.
func (s *Store) eachFrom(v *view, from []byte, f func(key []byte, block uint64, r *record) error) error {
	for _, table := range []byte{tableSegment, tableBlock, tableGarbage} {
		begin := ownKey(table)
		if from != nil {
			if from[1] != table {
				continue
			}
			begin, from = from, nil
		}
		c := v.scan(begin, ownKey(table+1), 0)
		for c.Next() {
			b, block := c.Value(), uint64(0)
			switch table {
			case tableBlock:
				block = binary.BigEndian.Uint64(c.Key()[2:])
			case tableGarbage:
				b = b[min(8, len(b)):]
				fallthrough
			case tableSegment:
				if len(b) == 0 || b[0] != inSegment {
					continue
				}
				b = b[1:]
			}
			r, err := parseRecord(b)
			if err == nil {
				err = f(c.Key(), block, &r)
			}
			if err != nil {
				c.Close()
				return err
			}
		}
		if err := c.Close(); err != nil {
			return err
		}
	}
	return nil
}

func prefix(n disperse.Name) uint32 { return uint32(n[0])<<8 | uint32(n[1]) }

func (s *Store) scrubPart(ctx context.Context, lo, hi uint32, sum *Scrubbed, found map[orphan]bool, pace *pacer) error {
	want := map[disperse.Name]expected{}
	err := s.view(ctx, func(v *view) error {
		return s.eachRecord(v, func(key []byte, block uint64, r *record) error {
			coder, err := s.coder(r.Scheme)
			if err != nil {
				return err
			}
			size := shardSize(coder, r)
			for i, n := range r.Names {
				if p := prefix(n); p >= lo && p < hi {
					e := expected{r.ID, block, r.Members[i], uint8(i), uint32(size)}
					if key[1] == tableGarbage {
						e.size = 0 // it may be missing
					}
					want[n] = e
				}
			}
			return nil
		})
	})
	if err != nil {
		return err
	}
	s.pending.Range(func(_, v any) bool {
		if r := v.(*pendingPiece).record; r != nil {
			for i, n := range r.Names {
				want[n] = expected{id: r.ID, member: r.Members[i]}
			}
		}
		return true
	})
	listed := map[uint16]bool{}
	for _, m := range s.members() {
		ok, err := s.scrubMember(ctx, m, lo, hi, want, sum, found, pace)
		if err != nil {
			return err
		}
		if listed[m.index] = ok; !ok && lo == 0 {
			sum.Silent++
		}
	}
	// What is left no list had.
	bad := map[disperse.ID][]expected{}
	for n, e := range want {
		if e.size == 0 || !listed[e.member] {
			continue
		}
		sum.Shards++
		if s.lookAt(ctx, s.memberAt(e.member), n, int(e.size), false) == missing {
			bad[e.id] = append(bad[e.id], e)
		}
	}
	return s.condemn(ctx, bad, false, sum)
}

// scrubMember takes from want what a member lists. It says whether it listed everything: who takes too long over it, or names
// far more than a store has, is left for audits to find.
func (s *Store) scrubMember(ctx context.Context, m *member, lo, hi uint32, want map[disperse.Name]expected, sum *Scrubbed, found map[orphan]bool, pace *pacer) (bool, error) {
	from := disperse.Name{byte(lo >> 8), byte(lo)}
	left, unknown, remembered := s.upkeep.slowest, 0, 0
	for o := range found {
		if o.member == m.index {
			remembered++
		}
	}
	for {
		begin := time.Now()
		one, cancel := context.WithTimeout(ctx, left)
		page, next, err := m.Location.List(one, from, location.Live)
		cancel()
		if left -= time.Since(begin); err != nil || left <= 0 || unknown > maxUnknown {
			s.log.Warn("a location does not list all that it has", "location", m.ID, "unknown", unknown, "error", err)
			return false, ctx.Err()
		}
		for _, info := range page {
			if p := prefix(info.Name); p < lo || p >= hi {
				continue
			}
			e, ok := want[info.Name]
			switch {
			case !ok:
				if unknown++; remembered < maxOrphans/len(s.used()) {
					found[orphan{m.index, info.Name}] = true
					remembered++
				}
			case e.member != m.index: // never an orphan: rather is the index wrong
			case info.Rotten || e.size > 0 && info.Size != int64(e.size):
				continue // stays in want
			default:
				if e.size > 0 {
					sum.Shards++
				}
				delete(want, info.Name)
			}
		}
		if err := pace.did(ctx, len(page)); err != nil {
			return false, err
		}
		if next == (disperse.Name{}) || prefix(next) >= hi || bytes.Compare(next[:], from[:]) <= 0 {
			return true, nil
		}
		from = next
	}
}

// Verified is what reading all shards found.
type Verified struct {
	Shards, Bytes int64 // that were read
	Bad           int64 // missing, or other bytes than their names say: they are in the queue of repairs
	Silent        int64 // whose locations did not answer
}

// Verify reads every shard that records name, rate bytes a second at most (0 is no bound), and checks it against its name:
// nothing that locations say is believed. seen, if it is not nil, hears how far it is.
func (s *Store) Verify(ctx context.Context, rate int, seen func(Verified)) (sum Verified, err error) {
	ctx, end, err := s.begin(ctx)
	if err != nil {
		return sum, err
	}
	defer end()
	s.upkeep.scrubbing.Lock()
	defer s.upkeep.scrubbing.Unlock()
	type entry struct {
		block uint64
		r     record
	}
	pace := pacer{rate: rate, begin: time.Now()}
	for from, more := []byte(nil), true; more; {
		var page []entry
		more = false
		full := errors.New("the page is full")
		err := s.view(ctx, func(v *view) error {
			return s.eachFrom(v, from, func(key []byte, block uint64, r *record) error {
				switch {
				case key[1] == tableGarbage:
					return nil
				case len(page) == 256:
					from, more = bytes.Clone(key), true
					return full
				}
				page = append(page, entry{block, *r})
				return nil
			})
		})
		if err != nil && !errors.Is(err, full) {
			return sum, fmt.Errorf("verify: %w", err)
		}
		bad := map[disperse.ID][]expected{}
		for i := range page {
			r := &page[i].r
			coder, err := s.coder(r.Scheme)
			if err != nil {
				return sum, fmt.Errorf("verify: %w", err)
			}
			members := make([]*member, r.Scheme.N)
			for j, x := range r.Members {
				members[j] = s.memberAt(x)
			}
			size := shardSize(coder, r)
			for j, st := range s.look(ctx, r, members, size, true) {
				switch {
				case st == noAnswer:
					sum.Silent++
					continue
				case st != good && s.still(r, j):
					bad[r.ID] = append(bad[r.ID], expected{r.ID, page[i].block, r.Members[j], uint8(j), uint32(size)})
				}
				sum.Shards++
				sum.Bytes += int64(size)
			}
			if seen != nil {
				seen(sum)
			}
			if err := pace.did(ctx, size*r.Scheme.N); err != nil {
				return sum, err
			}
		}
		var found Scrubbed
		if err := s.condemn(ctx, bad, true, &found); err != nil {
			return sum, fmt.Errorf("verify: %w", err)
		}
		sum.Bad += found.Missing
	}
	return sum, nil
}

// condemn notes that shards are not durable, and queues their segments. deep: what locations say of them is not enough.
func (s *Store) condemn(ctx context.Context, bad map[disperse.ID][]expected, deep bool, sum *Scrubbed) error {
	if len(bad) == 0 {
		return nil
	}
	left := make([]disperse.ID, 0, len(bad))
	for id := range bad {
		left = append(left, id)
	}
	for len(left) > 0 {
		page := left[:min(len(left), 256)]
		left = left[len(page):]
		err := s.update(ctx, func(t *tx) error {
			for _, id := range page {
				c := repairCase{id: id, row: queueRow{block: bad[id][0].block, deep: deep}}
				key := idKey(tableSegment, id)
				if c.row.block > 0 {
					key = sequenceKey(tableBlock, c.row.block)
				}
				b, ok, err := t.get(key)
				if err != nil {
					return err
				}
				if ok && c.row.block == 0 {
					ok = b[0] == inSegment
					b = b[1:]
				}
				if !ok {
					continue
				}
				r, err := parseRecord(b)
				if err != nil || r.ID != id {
					return err
				}
				was := r.left()
				for _, e := range bad[id] {
					if r.Members[e.shard] == e.member {
						r.setDurable(int(e.shard), false)
					}
				}
				if was < r.Scheme.N {
					t.delete(queueKey(was-r.Scheme.K, id))
				}
				t.set(key, c.value(&r))
				t.set(queueKey(r.left()-r.Scheme.K, id), c.row.append(nil))
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	for _, all := range bad {
		sum.Missing += int64(len(all))
	}
	s.log.Warn("shards are missing", "shards", sum.Missing, "segments", len(bad))
	s.wakeRepair()
	return nil
}

// sweep removes what was an orphan in every scrub for long enough: a write that is under way has no record yet.
func (s *Store) sweep(ctx context.Context, found map[orphan]bool, sum *Scrubbed) error {
	u := &s.upkeep
	age := s.cfg.Upkeep.defaults().OrphanAge
	now := time.Now()
	var old []orphan
	u.mu.Lock()
	for o := range u.orphans {
		if !found[o] {
			delete(u.orphans, o)
		}
	}
	for o := range found {
		sum.Orphans++
		if first, ok := u.orphans[o]; !ok {
			u.orphans[o] = now
		} else if now.Sub(first) >= age {
			old = append(old, o)
		}
	}
	u.mu.Unlock()
	by := map[uint16][]orphan{}
	for _, o := range old {
		by[o.member] = append(by[o.member], o)
	}
	var wg sync.WaitGroup
	var removed atomic.Int64
	for i, all := range by {
		wg.Go(func() { // none waits for another, nor for ever
			ctx, cancel := context.WithTimeout(ctx, u.slowest)
			defer cancel()
			for _, o := range all {
				m, begin := s.memberAt(i), time.Now()
				if !m.usable() || ctx.Err() != nil {
					return
				}
				err := s.remove(ctx, m, o.name)
				m.answered(err, time.Since(begin))
				if err == nil {
					removed.Add(1)
				}
			}
		})
	}
	wg.Wait()
	sum.Removed += removed.Load()
	return ctx.Err()
}
