package store

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"holdfast/disperse"
	"holdfast/store/location"
)

const tableQueue = 'd' // d−k + 128, ID: queueRow. What has fewest shards to lose comes first.

// queueRow is why a segment is looked at.
type queueRow struct {
	block uint64 // its sequence, 0: it is not a block, or nobody knows
	deep  bool   // somebody gave wrong bytes: what locations say of shards is not enough
}

func queueKey(margin int, id disperse.ID) []byte {
	return append(ownKey(tableQueue, byte(min(max(margin+128, 0), 255))), id[:]...)
}

func (q queueRow) append(b []byte) []byte {
	deep := byte(0)
	if q.deep {
		deep = 1
	}
	return binary.BigEndian.AppendUint64(append(b, deep), q.block)
}

func parseQueue(key, value []byte) (id disperse.ID, q queueRow, err error) {
	if len(key) != 17 || len(value) != 9 {
		return id, q, fmt.Errorf("queue of repairs: %w", errRow)
	}
	return disperse.ID(key[1:]), queueRow{binary.BigEndian.Uint64(value[1:]), value[0] == 1}, nil
}

// Upkeep is how often a store does what it does by itself. Zero values are the defaults.
type Upkeep struct {
	RepairAfter time.Duration // how long a location may be silent before its shards are made anew elsewhere; 0 means 10 min
	RepairRate  int           // bytes a second that repair makes; 0 means no bound
	Collect     time.Duration // between two collections of what was dropped; 0 means 1 min
	Grace       time.Duration // how long what was dropped stays at least; 0 means 1 min
	Scrub       time.Duration // between two comparisons of all records with all locations; 0 means 6 h
	Rate        int           // shards a second that a scrub looks at; 0 means 50,000
	Audit       time.Duration // between two rounds of challenges; 0 means 1 min
	OrphanAge   time.Duration // how long a shard is known that nothing refers to before it is removed; 0 means 12 h
}

func (u Upkeep) defaults() Upkeep {
	for _, d := range []struct {
		v *time.Duration
		d time.Duration
	}{{&u.RepairAfter, 10 * time.Minute}, {&u.Collect, time.Minute}, {&u.Grace, time.Minute}, {&u.Scrub, 6 * time.Hour}, {&u.Audit, time.Minute}, {&u.OrphanAge, 12 * time.Hour}} {
		if *d.v == 0 {
			*d.v = d.d
		}
	}
	if u.Rate == 0 {
		u.Rate = 50_000
	}
	return u
}

const maxNoticed = 4096

// upkeepState is what upkeep remembers, until the process ends.
type upkeepState struct {
	mu        sync.Mutex
	noticed   map[disperse.ID]bool // reads found something wrong; true: deep
	orphans   map[orphan]time.Time // when they were first seen
	wake      chan struct{}
	repairing sync.Mutex
	scrubbing sync.Mutex
	slowest   time.Duration // how long a scrub waits for one location at most, beyond what its pace allows
}

func (u *upkeepState) init() {
	u.noticed, u.orphans, u.wake = map[disperse.ID]bool{}, map[orphan]time.Time{}, make(chan struct{}, 1)
	u.slowest = 2 * time.Minute
}

func (s *Store) wakeRepair() {
	select {
	case s.upkeep.wake <- struct{}{}:
	default:
	}
}

// notice has a segment looked at. What it forgets when there is too much the scrub finds.
func (s *Store) notice(id disperse.ID, deep bool) {
	u := &s.upkeep
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(u.noticed) < maxNoticed {
		u.noticed[id] = u.noticed[id] || deep
		s.wakeRepair()
	}
}

// runRepair repairs until ctx ends, at most a twentieth of the time where there is nothing to be done.
func (s *Store) runRepair(ctx context.Context) {
	pause := time.Second
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.life.Done():
			return
		case <-time.After(30 * time.Second):
		case <-s.upkeep.wake:
		}
		begin := time.Now()
		_, err := s.Repair(ctx)
		s.say("repair", err)
		pause = max(time.Second, min(20*time.Since(begin), time.Minute))
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}

// Repaired is what a round of repair did.
type Repaired struct {
	Looked   int   // segments in the queue that could have been repaired
	Whole    int   // that have all their shards now
	Shards   int   // that were made
	Bytes    int64 // of these
	Lost     int   // segments of which fewer than k shards are left
	Deferred int   // segments whose locations are silent, or that have nowhere to go
}

func (r *Repaired) add(o *Repaired) {
	r.Looked += o.Looked
	r.Whole += o.Whole
	r.Shards += o.Shards
	r.Bytes += o.Bytes
	r.Lost += o.Lost
	r.Deferred += o.Deferred
}

// Repair goes through the queue once, the most endangered first, and brings segments back to n shards where it can.
func (s *Store) Repair(ctx context.Context) (Repaired, error) {
	return s.RepairAt(ctx, s.cfg.Upkeep.RepairRate, nil)
}

// RepairAt is Repair that makes so many bytes a second, 0 is no bound. seen, if it is not nil, hears how far it is.
func (s *Store) RepairAt(ctx context.Context, rate int, seen func(Repaired)) (Repaired, error) {
	ctx, end, err := s.begin(ctx)
	if err != nil {
		return Repaired{}, err
	}
	defer end()
	s.upkeep.repairing.Lock()
	defer s.upkeep.repairing.Unlock()
	var sum Repaired
	if err := s.enqueueNoticed(ctx); err != nil {
		return sum, err
	}
	pace := pacer{rate: rate, begin: time.Now()}
	const page, workers = 64, 4
	for from := ownKey(tableQueue); from != nil; {
		var keys, values [][]byte
		err := s.view(ctx, func(v *view) error {
			c := v.scan(from, ownKey(tableQueue+1), 2)
			from = nil
			for c.Next() {
				if len(keys) == page {
					from = append(ownKey(tableQueue), c.Key()...)
					break
				}
				keys, values = append(keys, bytes.Clone(c.Key())), append(values, bytes.Clone(c.Value()))
			}
			return c.Close()
		})
		if err != nil {
			return sum, fmt.Errorf("queue of repairs: %w", err)
		}
		cases := make([]repairCase, len(keys))
		var wg sync.WaitGroup
		turns := make(chan struct{}, workers)
		for i := range keys {
			c := &cases[i]
			c.key = keys[i]
			if c.id, c.row, err = parseQueue(keys[i], values[i]); err != nil {
				return sum, err
			}
			turns <- struct{}{}
			wg.Go(func() {
				c.err = s.repairOne(ctx, c)
				<-turns
			})
		}
		wg.Wait()
		if err := s.settle(ctx, cases); err != nil {
			return sum, err
		}
		for i := range cases {
			sum.add(&cases[i].did)
			s.say("repair", cases[i].err)
			if err := pace.did(ctx, int(cases[i].did.Bytes)); err != nil {
				return sum, err
			}
		}
		if seen != nil {
			seen(sum)
		}
	}
	return sum, ctx.Err()
}

// enqueueNoticed makes durable what reads found.
func (s *Store) enqueueNoticed(ctx context.Context) error {
	u := &s.upkeep
	u.mu.Lock()
	noticed := u.noticed
	u.noticed = map[disperse.ID]bool{}
	u.mu.Unlock()
	if len(noticed) == 0 {
		return nil
	}
	rows := map[disperse.ID]uint64{}
	for id := range noticed {
		rows[id] = 0
	}
	// Segments have rows of their own; of blocks it is not known which.
	blocks := false
	err := s.view(ctx, func(v *view) error {
		for id := range rows {
			_, ok, err := v.get(idKey(tableSegment, id))
			if err != nil {
				return err
			}
			blocks = blocks || !ok
		}
		if !blocks {
			return nil
		}
		c := v.scan(ownKey(tableBlock), ownKey(tableBlock+1), 2)
		for c.Next() {
			if r, err := parseRecord(c.Value()); err == nil {
				if _, ok := rows[r.ID]; ok {
					rows[r.ID] = binary.BigEndian.Uint64(c.Key())
				}
			}
		}
		return c.Close()
	})
	if err != nil {
		return err
	}
	return s.update(ctx, func(t *tx) error {
		for id, seq := range rows {
			t.set(queueKey(0, id), queueRow{seq, noticed[id]}.append(nil))
		}
		return nil
	})
}

// A repairCase is one entry of the queue, and what comes of it.
type repairCase struct {
	key  []byte // of the queue
	id   disperse.ID
	row  queueRow
	at   []byte // key of the record
	was  []byte // what was there
	made *record
	old  []landing // shards that are elsewhere now
	done bool      // the entry goes
	did  Repaired
	err  error
}

func (c *repairCase) value(r *record) []byte {
	if c.row.block == 0 {
		return appendRecord([]byte{inSegment}, r)
	}
	return appendRecord(nil, r)
}

// settle puts into the metadata what repairs did, if what they repaired is still there.
func (s *Store) settle(ctx context.Context, cases []repairCase) error {
	change := slices.ContainsFunc(cases, func(c repairCase) bool { return c.done || c.made != nil })
	if !change {
		return nil
	}
	err := s.update(ctx, func(t *tx) error {
		s.noteMembers(t)
		// One that was dropped, or that somebody else has changed, is looked at again. What was made is for the sweep to find.
		for i := range cases {
			c := &cases[i]
			if c.made == nil && !c.done {
				continue
			}
			if c.was != nil {
				now, _, err := t.get(c.at)
				if err != nil {
					return err
				}
				if !bytes.Equal(now, c.was) {
					c.made, c.old, c.done = nil, nil, false
					continue
				}
			}
			t.delete(append(ownKey(tableQueue), c.key...))
		}
		for i := range cases {
			c := &cases[i]
			if c.made == nil {
				continue
			}
			t.set(c.at, c.value(c.made))
			if !c.done {
				t.set(queueKey(c.made.left()-c.made.Scheme.K, c.id), c.row.append(nil))
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("note repairs: %w", err)
	}
	for i := range cases {
		for _, o := range cases[i].old {
			if o.by.usable() {
				s.remove(ctx, o.by, o.name)
			}
		}
	}
	return nil
}

// lookUp finds the record of an entry of the queue.
func (s *Store) lookUp(c *repairCase) (*record, error) {
	if err := s.enter(); err != nil {
		return nil, err
	}
	defer s.leave()
	v := view{r: s.db}
	c.at = idKey(tableSegment, c.id)
	if c.row.block > 0 {
		c.at = sequenceKey(tableBlock, c.row.block)
	}
	b, ok, err := v.get(c.at)
	if err != nil || !ok {
		return nil, err
	}
	c.was = b
	if c.row.block == 0 {
		if b[0] != inSegment {
			return nil, nil
		}
		b = b[1:]
	}
	r, err := parseRecord(b)
	if err != nil || r.ID != c.id {
		return nil, err
	}
	if b, _, err = v.get(idKey(tableHad, c.id)); err == nil {
		r.had, err = parseHoldings(b)
	}
	return &r, err
}

// seen is what is known of a shard.
type seen uint8

const (
	good     seen = iota
	missing       // its location is there, and has it not
	wrong         // its location has other bytes under its name, or says that it has the right ones
	noAnswer      // its location does not answer
)

// repairOne looks at a segment and does what can be done.
func (s *Store) repairOne(ctx context.Context, c *repairCase) error {
	r, err := s.lookUp(c)
	if err != nil {
		return err
	}
	if r == nil {
		c.done = true
		return nil
	}
	members := make([]*member, r.Scheme.N)
	for i, x := range r.Members {
		members[i] = s.memberAt(x)
	}
	if !c.row.deep && !s.worth(r, members) {
		c.did.Deferred++
		return nil
	}
	c.did.Looked++
	coder, err := s.coder(r.Scheme)
	if err != nil {
		return err
	}
	size := shardSize(coder, r)
	states := s.look(ctx, r, members, size, c.row.deep)
	d := 0
	for _, st := range states {
		if st == good {
			d++
		}
	}
	now := *r
	for i, st := range states {
		if st != noAnswer {
			now.setDurable(i, st == good)
		}
	}
	movable, err := s.movable(c)
	if err != nil {
		return err
	}
	jobs, held := s.plan(r, members, states, d, movable)
	if held {
		s.wantSnapshot()
	}
	if len(jobs) > 0 && d < r.Scheme.K {
		c.did.Lost++
		s.log.Error("a segment has too few shards", "segment", r.ID, "shards", d, "needed", r.Scheme.K)
		jobs = nil
	}
	if len(jobs) > 0 {
		err = s.noteMoves(ctx, c, r, jobs)
	}
	if len(jobs) > 0 && err == nil {
		err = s.rebuild(ctx, coder, r, &now, c, members, states, jobs)
	}
	whole := now.left() == r.Scheme.N
	for i, x := range now.Members {
		whole = whole && (State(s.memberAt(x).state.Load()) == Active || x != r.Members[i])
	}
	if whole {
		c.done = true
		c.did.Whole++
	}
	if now.left() < r.Scheme.N && err == nil {
		c.did.Deferred++
	}
	if v := c.value(&now); !bytes.Equal(v, c.was) {
		c.made = &now
	}
	return err
}

// worth says, without asking anybody, whether anything can have changed for a segment.
func (s *Store) worth(r *record, members []*member) bool {
	after := s.cfg.Upkeep.defaults().RepairAfter
	for i, m := range members {
		moves := State(m.state.Load()) != Active || m.Location == nil || m.downFor() > after || m.suspect.Load()
		if (moves || !r.durable(i)) && (m.usable() || moves && s.target(r, i) != nil) {
			return true
		}
	}
	return r.left() == r.Scheme.N
}

// movable says whether a segment's shards may change places. Heads and blocks name the blocks since the snapshot, and the
// snapshot, as they were: who restores the store finds them nowhere else. So a snapshot comes first.
func (s *Store) movable(c *repairCase) (bool, error) {
	if err := s.enter(); err != nil {
		return false, err
	}
	defer s.leave()
	v := view{r: s.db}
	b, ok, err := v.get(ownKey(tableSnapshot))
	if err != nil || !ok {
		return c.row.block == 0, err
	}
	snap, err := parseSnapshotRow(b)
	if err != nil || c.row.block == 0 {
		return !slices.Contains(snap.segments, c.id), err
	}
	last, err := readApplied(s.db)
	return last != nil && c.row.block <= snap.sequence && c.row.block+2 < last.sequence, err
}

// noteMoves makes durable who will have been sent which shard, before it is.
func (s *Store) noteMoves(ctx context.Context, c *repairCase, r *record, jobs []job) error {
	var more []holding
	for _, j := range jobs {
		if j.moves {
			more = append(more, holding{uint8(j.shard), r.Members[j.shard]}, holding{uint8(j.shard), j.to.index})
		}
	}
	if len(more) == 0 {
		return nil
	}
	return s.update(ctx, func(t *tx) error {
		s.noteMembers(t)
		if _, ok, err := t.get(c.at); err != nil || !ok {
			return err // it was dropped
		}
		return addHoldings(t, c.id, more)
	})
}

// look asks where shards should be whether they are.
func (s *Store) look(ctx context.Context, r *record, members []*member, size int, deep bool) []seen {
	states := make([]seen, r.Scheme.N)
	var wg sync.WaitGroup
	for i, m := range members {
		if !m.usable() {
			states[i] = noAnswer
			continue
		}
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, lateLimit)
			defer cancel()
			states[i] = s.lookAt(ctx, m, r.Names[i], size, deep || m.suspect.Load())
		})
	}
	wg.Wait()
	return states
}

func (s *Store) lookAt(ctx context.Context, m *member, n disperse.Name, size int, deep bool) seen {
	begin := time.Now()
	info, err := m.Location.Stat(ctx, n)
	m.answered(err, time.Since(begin))
	switch {
	case gone(err):
		return missing
	case err != nil:
		return noAnswer
	case info.Rotten || !info.Deleted.IsZero() || info.Size != int64(size):
		return missing
	case !deep:
		return good
	}
	b := s.buffers.get(size)
	defer s.buffers.put(b)
	if err := m.Location.Get(ctx, n, 0, b); gone(err) {
		return missing
	} else if err != nil {
		return noAnswer
	}
	if name, err := disperse.NameOf(b); err != nil || name != n {
		m.lied(n)
		return wrong
	}
	return good
}

// A job brings a shard to a member.
type job struct {
	shard int
	to    *member
	moves bool // it is another member than before
}

// plan decides what is made where. What is gone is made again where it was, if that place is good for new shards; what is
// at a place that ends, lies or has been silent for long goes to a spare one, at once if one more loss would be the end. held
// says that something would, if it could be moved.
func (s *Store) plan(r *record, members []*member, states []seen, d int, movable bool) (jobs []job, held bool) {
	after := s.cfg.Upkeep.defaults().RepairAfter
	next := *r
	next.Members = slices.Clone(r.Members)
	for i, m := range members {
		ends := State(m.state.Load()) != Active || m.Location == nil
		move, here := ends, false
		switch states[i] {
		case good:
		case missing:
			here = !ends
			move = move || !m.wanted()
		case wrong:
			here, move = !ends, true
		case noAnswer:
			move = move || m.downFor() > after || d <= r.Scheme.K && m.downFor() > 0
		}
		if move {
			if to := s.target(&next, i); to != nil && movable {
				next.Members[i] = to.index
				jobs = append(jobs, job{i, to, true})
				continue
			} else if to != nil {
				held = true
			}
		}
		if here && m.usable() {
			jobs = append(jobs, job{i, m, false})
		}
	}
	return jobs, held
}

// target is a member that a segment's shard i can go to, nil if there is none.
func (s *Store) target(r *record, i int) *member {
	all := s.members()
	turn := int(s.turn.Add(1))
	for j := range all {
		if m := all[(turn+j)%len(all)]; m.wanted() && s.fits(r, i, m) {
			return m
		}
	}
	return nil
}

// rebuild makes shards from k good ones and brings them to their places. now is the record as it becomes.
func (s *Store) rebuild(ctx context.Context, coder *disperse.Coder, r, now *record, c *repairCase, members []*member, states []seen, jobs []job) error {
	k, size := r.Scheme.K, shardSize(coder, r)
	shards, have := make([][]byte, r.Scheme.N), 0
	defer func() {
		for _, b := range shards {
			s.buffers.put(b)
		}
	}()
	moving := func(i int) bool { return slices.ContainsFunc(jobs, func(j job) bool { return j.shard == i }) }
	// Shards that only move come last: what is read is not made.
	order := make([]int, 0, r.Scheme.N)
	for i := range shards {
		if states[i] == good && !moving(i) {
			order = append(order, i)
		}
	}
	for i := range shards {
		if states[i] == good && moving(i) {
			order = append(order, i)
		}
	}
	var why []error
	for _, i := range order {
		if have == k {
			break
		}
		b := s.buffers.get(size)
		err := members[i].Location.Get(ctx, r.Names[i], 0, b)
		if err == nil {
			var n disperse.Name
			if n, err = disperse.NameOf(b); err == nil && n != r.Names[i] {
				members[i].lied(r.Names[i])
				s.notice(r.ID, true)
				err = location.ErrName
			}
		}
		if err != nil {
			s.buffers.put(b)
			now.setDurable(i, !gone(err) && !errors.Is(err, location.ErrName) && now.durable(i))
			why = append(why, fmt.Errorf("location %v: %w", members[i].ID, err))
			continue
		}
		shards[i] = b
		have++
	}
	if have < k {
		return fmt.Errorf("repair segment %v: %d shards could be read: %w", r.ID, have, errors.Join(append(why, ErrBusy)...))
	}
	now.Members, now.Names = slices.Clone(r.Members), slices.Clone(r.Names)
	var lack []int
	var at []disperse.Place
	made := map[int][]byte{}
	names := map[int]disperse.Name{}
	for _, j := range jobs {
		if b := shards[j.shard]; b != nil { // it was read, and only moves
			b = bytes.Clone(b)
			n, err := disperse.Restamp(&s.keys().shards, b, j.to.ID)
			if err != nil {
				return fmt.Errorf("repair segment %v: %w", r.ID, err)
			}
			made[j.shard], names[j.shard] = b, n
			continue
		}
		lack, at = append(lack, j.shard), append(at, j.to.ID)
	}
	fresh, called, err := coder.Reconstruct(r.ID, &s.keys().shards, shards, lack, at)
	if err != nil {
		return fmt.Errorf("repair: %w", err)
	}
	for x, i := range lack {
		made[i], names[i] = fresh[x], called[x]
	}
	for _, j := range jobs {
		i := j.shard
		if !j.moves && names[i] != r.Names[i] {
			if !r.Secret { // of a secret's shard the salt is new
				return fmt.Errorf("repair segment %v: shard %d has another name than before", r.ID, i)
			}
		}
		if states[i] == wrong && !j.moves {
			s.remove(ctx, j.to, r.Names[i])
		}
		begin := time.Now()
		sendCtx, cancel := context.WithTimeout(ctx, lateLimit)
		err := s.sendShard(sendCtx, j.to, names[i], made[i], nil, nil)
		cancel()
		j.to.answered(err, time.Since(begin))
		if err != nil {
			why = append(why, fmt.Errorf("location %v: %w", j.to.ID, err))
			continue
		}
		if j.moves && states[i] != missing {
			c.old = append(c.old, landing{shard: i, name: r.Names[i], by: members[i]})
		}
		now.Members[i], now.Names[i] = j.to.index, names[i]
		now.setDurable(i, true)
		c.did.Shards++
		c.did.Bytes += int64(size)
	}
	if len(why) > 0 {
		s.log.Info("repair goes on later", "segment", r.ID, "error", errors.Join(why...))
	}
	return nil
}

// mend brings a block's shards to the places that should have them, and fails if fewer than a quorum have them then.
func (s *Store) mend(ctx context.Context, b *ref) error {
	r := &b.record
	coder, err := s.coder(r.Scheme)
	if err != nil {
		return err
	}
	members := make([]*member, r.Scheme.N)
	for i, x := range r.Members {
		members[i] = s.memberAt(x)
	}
	size := shardSize(coder, r)
	states := s.look(ctx, r, members, size, false)
	var jobs []job
	d := 0
	for i, st := range states {
		if st == good {
			d++
		} else if st != noAnswer {
			jobs = append(jobs, job{i, members[i], false})
		}
	}
	now := *r
	c := repairCase{id: r.ID}
	if len(jobs) > 0 {
		if err := s.rebuild(ctx, coder, r, &now, &c, members, states, jobs); err != nil {
			return err
		}
	}
	d += c.did.Shards
	least := quorum(r.Scheme)
	if s.cfg.DegradedWrites {
		least = r.Scheme.K
	}
	if d < least {
		return fmt.Errorf("block %d has %d shards, needs %d: %w", b.sequence, d, least, ErrBusy)
	}
	return nil
}
