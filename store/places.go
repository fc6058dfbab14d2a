package store

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2"

	"holdfast/disperse"
	"holdfast/store/location"
)

const tableMember = 'm' // INDEX: what it is called, its state and its farm

// How long a write and a read wait before they go on without who is late: twice what they took of late, between these.
const (
	putFloor   = 250 * time.Millisecond
	putCeiling = 3 * time.Second
	getFloor   = 15 * time.Millisecond
	getCeiling = 2 * time.Second
	lateLimit  = 20 * time.Second // how long who is late is waited for, and how long a place may do nothing at all
)

// A State is what a member is for.
type State uint8

const (
	Active   State = iota
	Draining       // gets nothing new, and what it has goes elsewhere
	Removed        // has nothing
)

func (s State) String() string { return []string{"active", "draining", "removed"}[min(s, Removed)] }

// member is a place, and what this front end has seen of it.
type member struct {
	Member
	index   uint16 // valid if indexed; both are guarded by placing
	indexed bool
	state   atomic.Uint32 // State

	gets    atomic.Int64 // ns a MiB, of late
	alive   atomic.Int64 // when it last did what it was asked, ns since 1970
	fenced  atomic.Bool
	suspect atomic.Bool // it gave wrong bytes or proofs since the start
	lies    atomic.Int64

	mu    sync.Mutex
	fails int
	shut  time.Time // not asked before, unless it has to be; zero: it answers
	down  time.Time // since when it does not answer
	full  time.Time // it is not tried with new shards before
	why   error
}

// usable says whether a member answers, as far as is known.
func (m *member) usable() bool {
	if m.Location == nil {
		return false
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.shut.IsZero() || time.Now().After(m.shut)
}

// wanted says whether new shards go there.
func (m *member) wanted() bool {
	if !m.usable() || State(m.state.Load()) != Active || m.suspect.Load() {
		return false
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.full.IsZero() || time.Now().After(m.full)
}

// downFor is since how long it has not answered.
func (m *member) downFor() time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.down.IsZero() {
		return 0
	}
	return time.Since(m.down)
}

// answered takes note of how a write went. What a location says no to it has answered.
func (m *member) answered(err error, _ time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case err == nil:
		m.alive.Store(time.Now().UnixNano())
		m.fenced.Store(false)
		m.full = time.Time{}
	case errors.Is(err, location.ErrFull), errors.Is(err, location.ErrQuota):
		m.full = time.Now().Add(30 * time.Second)
	case errors.Is(err, location.ErrFenced):
		m.fenced.Store(true)
	case errors.Is(err, location.ErrOldHead), errors.Is(err, location.ErrLocked), gone(err):
	case errors.Is(err, context.Canceled):
		return
	default:
		m.fail(err)
		return
	}
	m.fails, m.shut, m.down, m.why = 0, time.Time{}, time.Time{}, nil
}

// fail closes the circuit after the second failure, for longer each time. Call it with mu held.
func (m *member) fail(err error) {
	if !m.shut.IsZero() && time.Now().Before(m.shut) {
		return // many requests at once fail for one reason
	}
	m.fails++
	m.why = err
	if m.down.IsZero() {
		m.down = time.Now()
	}
	if m.fails > 1 {
		m.shut = time.Now().Add(min(time.Second<<min(m.fails-2, 5), 30*time.Second))
	}
}

var (
	errLate = errors.New("it does not answer in time")
	errDown = errors.New("it is said not to answer")
)

// downFor is how long what Member.Down says is believed.
const downFor = 5 * time.Second

// missed says that a write went on without the member.
func (m *member) missed() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.fail(errLate)
}

// read takes note of how a read of so many bytes went.
func (m *member) read(err error, took time.Duration, n int) {
	if err != nil {
		m.answered(err, took)
		return
	}
	m.alive.Store(time.Now().UnixNano())
	each := int64(took) * (1 << 20) / int64(max(n, 64<<10))
	m.gets.Store((m.gets.Load()*7 + each) / 8)
}

// lost takes note of a read that was given up after so long, since others were faster.
func (m *member) lost(took time.Duration, n int) {
	each := int64(took) * (1 << 20) / int64(max(n, 64<<10))
	if now := m.gets.Load(); each > now {
		m.gets.Store((now*7 + each) / 8)
	}
}

// alive is when a quorum of the members last did something, all of it.
func (s *Store) alive() time.Time {
	all := s.used()
	at := make([]int64, len(all))
	for i, m := range all {
		at[i] = m.alive.Load()
	}
	slices.Sort(at)
	return time.Unix(0, at[len(at)-min(quorum(s.scheme), len(at))])
}

// stalled is the time since when nothing came from any of the members, or since a begin if that is later.
func stalled(begin time.Time, members func(func(*member))) time.Duration {
	last := begin.UnixNano()
	members(func(m *member) { last = max(last, m.alive.Load()) })
	return time.Duration(time.Now().UnixNano() - last)
}

// speed is in which order members are asked: the logarithm, to base 4, of what they take. All that are fast are the same:
// parity instead of data costs more than it could save.
func (m *member) speed() int {
	return logFour(m.gets.Load() / int64(8*time.Millisecond))
}

func logFour(n int64) (l int) {
	for ; n > 0; n >>= 2 {
		l++
	}
	return l
}

// lied says that a member gave bytes or a proof that were not what it should have.
func (m *member) lied(disperse.Name) {
	m.lies.Add(1)
	m.suspect.Store(true)
}

// durations are how long things took of late.
type durations struct {
	mu    sync.Mutex
	last  [128]time.Duration
	n     int
	bound atomic.Int64 // twice the 99th of a hundred
}

func (d *durations) add(t time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.last[d.n%len(d.last)] = t
	if d.n++; d.n%32 == 0 {
		all := d.last
		n := min(d.n, len(all))
		slices.Sort(all[:n])
		d.bound.Store(int64(2 * all[n*99/100]))
	}
}

func (d *durations) limit(floor, ceiling time.Duration) time.Duration {
	return min(max(time.Duration(d.bound.Load()), floor), ceiling)
}

// places is who keeps shards, and what is done about them.
type places struct {
	placing sync.RWMutex
	all     []*member          // of the configuration, and what was added since
	indexes map[uint16]*member // those that records name; of some nothing but the name is known
	rows    bool               // the metadata knows all indexes
	turn    atomic.Uint32

	changing sync.Mutex // one change of members at a time

	putTimes, getTimes durations
	buffers            buffers
	writing, putting   memory
	reading, fetching  memory
	late               memory       // shards on their way to those who are late
	active             atomic.Int64 // bodies that are being written
	running            reads

	upkeep upkeepState
}

// Placement says whether segments of a scheme can be spread over members so that the loss of a farm neither stops writes
// nor tells its owner anything, and what to do if not.
func Placement(c disperse.Scheme, members []Member) error {
	if err := c.Check(); err != nil {
		return err
	}
	farms := map[string]int{}
	for _, m := range members {
		farms[m.Farm]++
	}
	if len(members) < c.N {
		return fmt.Errorf("scheme %v needs %d locations, there are %d: add locations or take a smaller n", c, c.N, len(members))
	}
	most, largest := spread(c.N, farms), 0
	for _, n := range farms {
		largest = max(largest, n)
	}
	if most >= c.K {
		return fmt.Errorf("scheme %v over %d farms gives one farm %d shards, and %d are enough to read: add farms or take a larger k", c, len(farms), most, c.K)
	}
	if q := quorum(c); len(members)-largest < q {
		return fmt.Errorf("scheme %v needs %d locations for a write, and without its largest farm there are %d: add locations on other farms, or take a larger n−k", c, q, len(members)-largest)
	}
	return nil
}

// spread is how many of n shards one farm gets at most, as even as the farms' locations allow.
func spread(n int, farms map[string]int) (most int) {
	for most = 1; ; most++ {
		room := 0
		for _, m := range farms {
			room += min(m, most)
		}
		if room >= n || most > n {
			return most
		}
	}
}

func (s *Store) openPlaces() error {
	s.indexes = map[uint16]*member{}
	seen := map[disperse.Place]bool{}
	for _, m := range s.cfg.Members {
		if seen[m.ID] || m.Location == nil {
			return fmt.Errorf("location %v is named twice, or is none", m.ID)
		}
		seen[m.ID] = true
		x := &member{Member: m}
		if m.Down {
			x.fails, x.why, x.down, x.shut = 2, errDown, time.Now(), time.Now().Add(downFor)
		}
		s.all = append(s.all, x)
	}
	schemes := []disperse.Scheme{s.cfg.Scheme}
	for _, c := range s.cfg.Classes {
		schemes = append(schemes, c)
	}
	for _, c := range schemes {
		if err := Placement(c, s.cfg.Members); err != nil && (!s.cfg.Fragile || len(s.all) < c.N) {
			return err
		}
	}
	s.putting.init(flyingMemory, s.alive)
	s.writing.init(writeMemory, s.putting.progress)
	s.fetching.init(fetchMemory, s.alive)
	s.reading.init(readMemory, s.fetching.progress)
	s.late.init(lateMemory, nil)
	s.upkeep.init()
	return nil
}

// placesRecovered reads what the metadata says of members.
func (s *Store) placesRecovered() error {
	v := view{r: s.db}
	defer v.close()
	c := v.scan(ownKey(tableMember), ownKey(tableMember+1), 2)
	for c.Next() {
		i, m, err := parseMember(c.Key(), c.Value())
		if err != nil {
			return err
		}
		s.learn(i, m.ID)
		known := s.memberAt(i)
		known.state.Store(uint32(m.state))
		if known.Location == nil {
			known.Farm = m.farm
			if m.state != Removed {
				s.log.Warn("a location that the store knows is not in the configuration", "location", m.ID, "farm", m.farm)
			}
		}
	}
	// One that was removed is no member, whoever names it: nothing would wait for it, and a quorum must not either.
	s.placing.Lock()
	s.all = slices.DeleteFunc(slices.Clone(s.all), func(m *member) bool { return State(m.state.Load()) == Removed })
	none := len(s.all) == 0
	s.placing.Unlock()
	if none {
		return errors.Join(c.Close(), errors.New("all locations of the configuration were removed from the store"))
	}
	return c.Close()
}

type memberRow struct {
	ID    disperse.Place
	state State
	farm  string
}

func (r memberRow) append(b []byte) []byte {
	return append(append(append(b, r.ID[:]...), byte(r.state)), r.farm...)
}

func parseMember(key, value []byte) (i uint16, r memberRow, err error) {
	if len(key) != 2 || len(value) < 17 || value[16] > byte(Removed) {
		return 0, r, fmt.Errorf("member %x: %w", key, errRow)
	}
	return binary.BigEndian.Uint16(key), memberRow{disperse.Place(value), State(value[16]), string(value[17:])}, nil
}

func memberKey(i uint16) []byte { return binary.BigEndian.AppendUint16(ownKey(tableMember), i) }

// learn says what a place is called in records.
func (s *Store) learn(i uint16, p disperse.Place) {
	s.placing.Lock()
	defer s.placing.Unlock()
	if old := s.indexes[i]; old != nil && old.ID != p {
		old.indexed = false
	}
	for _, m := range s.all {
		if m.ID == p {
			if m.indexed && m.index != i {
				delete(s.indexes, m.index)
			}
			m.index, m.indexed = i, true
			s.indexes[i] = m
			return
		}
	}
	if old := s.indexes[i]; old == nil || old.ID != p {
		s.indexes[i] = &member{Member: Member{ID: p}, index: i, indexed: true}
	}
}

func (s *Store) placeOf(i uint16) disperse.Place { return s.memberAt(i).ID }

// memberAt is the member that records call i; of one that nobody knows there is no location.
func (s *Store) memberAt(i uint16) *member {
	s.placing.RLock()
	defer s.placing.RUnlock()
	if m := s.indexes[i]; m != nil {
		return m
	}
	return &member{index: i, indexed: true}
}

// members are those of the configuration, all of which have an index.
func (s *Store) members() []*member {
	s.placing.RLock()
	last := s.all[len(s.all)-1]
	done := last.indexed
	s.placing.RUnlock()
	if !done {
		s.placing.Lock()
		next := uint16(0)
		for i := range s.indexes {
			next = max(next, i+1)
		}
		for _, m := range s.all {
			if !m.indexed {
				m.index, m.indexed = next, true
				s.indexes[next] = m
				next++
			}
		}
		s.placing.Unlock()
	}
	return s.used()
}

// used are the members as they are now. Who adds one or takes one away makes another slice.
func (s *Store) used() []*member {
	s.placing.RLock()
	defer s.placing.RUnlock()
	return s.all
}

// noteMembers has the metadata know what indexes mean, with the first change that needs them.
func (s *Store) noteMembers(t *tx) {
	if s.rows {
		return
	}
	v, all := view{r: s.db}, true
	for _, m := range s.members() {
		if _, ok, err := v.get(memberKey(m.index)); err != nil {
			t.fail(err)
		} else if !ok {
			t.set(memberKey(m.index), memberRow{m.ID, State(m.state.Load()), m.Farm}.append(nil))
			all = false
		}
	}
	s.rows = all
}

// fenced says whether too few locations are left that have not heard of another front end.
func (s *Store) fenced(c disperse.Scheme) bool {
	n, all := 0, s.used()
	for _, m := range all {
		if m.fenced.Load() {
			n++
		}
	}
	return n > len(all)-quorum(c)
}

// choose picks who gets a segment's shards: one each, farms evenly, those that answer and have room first. The order, by
// which data and parity are told apart, turns. spares are the others that would do. Blocks stay with the same ones, so that
// a head need not name many.
func (s *Store) choose(c disperse.Scheme, block bool) (chosen, spares []*member, err error) {
	all := s.members()
	turn := int(s.turn.Add(1))
	type candidate struct {
		m    *member
		rank int
	}
	list := make([]candidate, 0, len(all))
	off := 0
	if !block {
		off = turn
	}
	for j := range all {
		m := all[(j+off)%len(all)]
		rank := 0
		switch {
		case State(m.state.Load()) == Removed:
			continue
		case m.wanted():
		case State(m.state.Load()) == Draining:
			rank = 3
		case m.suspect.Load():
			rank = 1
		default:
			rank = 2
		}
		list = append(list, candidate{m, rank})
	}
	if len(list) < c.N {
		return nil, nil, fmt.Errorf("%d locations for scheme %v: %w", len(list), c, ErrBusy)
	}
	slices.SortStableFunc(list, func(a, b candidate) int { return cmp.Compare(a.rank, b.rank) })
	// Round after round each farm may get one more.
	taken := make(map[string]int, len(list))
	chosen = make([]*member, 0, c.N)
	farms := map[string]int{}
	for _, x := range list {
		farms[x.m.Farm]++
	}
	most := spread(c.N, farms)
	rest := list[:0:0]
	for _, x := range list {
		if len(chosen) < c.N && taken[x.m.Farm] < most {
			taken[x.m.Farm]++
			chosen = append(chosen, x.m)
		} else {
			rest = append(rest, x)
		}
	}
	for _, x := range rest {
		if x.rank == 0 {
			spares = append(spares, x.m)
		}
	}
	if len(chosen) < c.N {
		return nil, nil, fmt.Errorf("%d locations for scheme %v: %w", len(chosen), c, ErrBusy)
	}
	n := turn % c.N
	chosen = append(append(make([]*member, 0, c.N), chosen[n:]...), chosen[:n]...)
	return chosen, spares, nil
}

const tableHad = 'h' // ID: holdings, of a segment whose shards have moved

// A holding is a shard that a member was sent, and may keep, whatever it says: it gets no other one of that segment, or fewer
// than k places would have k shards in time.
type holding struct {
	shard  uint8
	member uint16
}

func appendHoldings(b []byte, all []holding) []byte {
	for _, h := range all {
		b = binary.BigEndian.AppendUint16(append(b, h.shard), h.member)
	}
	return b
}

func parseHoldings(b []byte) (all []holding, err error) {
	if len(b)%3 != 0 {
		return nil, fmt.Errorf("holdings: %w", errRow)
	}
	for ; len(b) > 0; b = b[3:] {
		all = append(all, holding{b[0], binary.BigEndian.Uint16(b[1:])})
	}
	return all, nil
}

// addHoldings is a row with more holdings in it, each once.
func addHoldings(t *tx, id disperse.ID, more []holding) error {
	key := idKey(tableHad, id)
	b, _, err := t.get(key)
	if err != nil {
		return err
	}
	all, err := parseHoldings(b)
	if err != nil {
		return err
	}
	was := len(all)
	for _, h := range more {
		if !slices.Contains(all, h) {
			all = append(all, h)
		}
	}
	if len(all) > was {
		t.set(key, appendHoldings(nil, all))
	}
	return nil
}

// fits says whether a segment's shard i can go to m: m has none, had no other, and its farm not as many as it may have.
func (s *Store) fits(r *record, i int, m *member) bool {
	farms, there := map[string]int{}, 0
	for _, x := range s.members() {
		if State(x.state.Load()) == Active {
			farms[x.Farm]++
		}
	}
	for _, h := range r.had {
		if h.member == m.index && int(h.shard) != i {
			return false
		}
	}
	for j, x := range r.Members {
		if x == m.index {
			return false
		}
		if j != i && s.memberAt(x).Farm == m.Farm {
			there++
		}
	}
	return there < spread(r.Scheme.N, farms)
}

// kept is called in the change that makes a segment part of the store.
func (s *Store) kept(t *tx, id disperse.ID, r *record) {
	s.noteMembers(t)
	if len(r.had) > 0 {
		if err := addHoldings(t, id, r.had); err != nil {
			t.fail(err)
		}
	}
	if d := r.left(); d < r.Scheme.N {
		t.set(queueKey(d-r.Scheme.K, id), queueRow{}.append(nil))
		s.wakeRepair()
	}
}

// noteBlock is the same for a block, in the batch that applies it.
func (s *Store) noteBlock(b *pebble.Batch, r *ref) error {
	d := r.record.left()
	if d == r.record.Scheme.N {
		return nil
	}
	s.wakeRepair()
	return b.Set(queueKey(d-r.record.Scheme.K, r.record.ID), queueRow{block: r.sequence}.append(nil), nil)
}

// abandon removes the shards of segments that nothing will refer to.
func (s *Store) abandon(all []record) {
	if len(all) == 0 || s.enter() != nil {
		return
	}
	defer s.leave()
	all = slices.Clone(all)
	s.spawn(func() {
		ctx, cancel := context.WithTimeout(s.life, lateLimit)
		defer cancel()
		for i := range all {
			s.removeAll(ctx, &all[i])
		}
	})
}

// removeAll deletes a segment's shards wherever a location answers.
func (s *Store) removeAll(ctx context.Context, r *record) {
	var wg sync.WaitGroup
	for i, x := range r.Members {
		if m := s.memberAt(x); m.usable() {
			wg.Go(func() {
				begin := time.Now()
				m.answered(s.remove(ctx, m, r.Names[i]), time.Since(begin))
			})
		}
	}
	wg.Wait()
}

// probe asks members that did not answer whether they do again, so that no user's request has to find out.
func (s *Store) probe(ctx context.Context) {
	var wg sync.WaitGroup
	for _, m := range s.members() {
		m.mu.Lock()
		ask := m.fails > 0
		m.mu.Unlock()
		if !ask {
			continue
		}
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
			defer cancel()
			begin := time.Now()
			_, err := m.Location.Status(ctx)
			m.answered(err, time.Since(begin))
			if err == nil {
				s.wakeRepair()
			}
		})
	}
	wg.Wait()
}

// runPlaces does what the store does for its segments until ctx ends.
func (s *Store) runPlaces(ctx context.Context) {
	var wg sync.WaitGroup
	every := func(d time.Duration, f func(context.Context)) {
		wg.Go(func() {
			for {
				select {
				case <-ctx.Done():
					return
				case <-s.life.Done():
					return
				case <-time.After(d - d/8 + rand.N(d/4)):
				}
				f(ctx)
			}
		})
	}
	u := s.cfg.Upkeep.defaults()
	every(time.Second, s.probe)
	every(u.Collect, func(ctx context.Context) { s.say("collect garbage", s.Collect(ctx)) })
	every(u.Scrub, func(ctx context.Context) { _, err := s.Scrub(ctx, u.Rate); s.say("scrub", err) })
	every(u.Audit, func(ctx context.Context) { _, err := s.Audit(ctx, 16); s.say("audit", err) })
	wg.Go(func() { s.runRepair(ctx) })
	wg.Wait()
}

// say logs what went wrong where nobody waits for an answer.
func (s *Store) say(what string, err error) {
	if err != nil && s.life.Err() == nil && !errors.Is(err, context.Canceled) {
		s.log.Warn(what, "error", err)
	}
}
