package store

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"holdfast/disperse"
	"holdfast/store/location"
)

// record is what metadata keeps of a segment: enough to find and to open it. Its slices do not change.
type record struct {
	ID      disperse.ID
	Size    uint32 // plain bytes
	Scheme  disperse.Scheme
	Secret  bool // it was split, not encoded
	Key     KeyEpoch
	Wrap    disperse.Wrap
	Late    [disperse.MaxN / 8]byte // bits of shards that were not durable when put returned
	Members []uint16                // who has a shard, by the store's index of members
	Names   []disperse.Name

	had []holding // who was sent a shard once; a row of its own
}

func (r *record) id() disperse.ID          { return r.ID }
func (r *record) size() int                { return int(r.Size) }
func (r *record) scheme() disperse.Scheme  { return r.Scheme }
func (r *record) members() []uint16        { return r.Members }
func (r *record) name(i int) disperse.Name { return r.Names[i] }
func (r *record) durable(i int) bool       { return r.Late[i/8]>>(i%8)&1 == 0 }

func (r *record) setDurable(i int, yes bool) {
	r.Late[i/8] &^= 1 << (i % 8)
	if !yes {
		r.Late[i/8] |= 1 << (i % 8)
	}
}

// left is how many shards are durable.
func (r *record) left() (d int) {
	for i := range r.Scheme.N {
		if r.durable(i) {
			d++
		}
	}
	return d
}

const (
	recordSegment = 1 // first byte: the version, of a segment or of a secret
	recordSecret  = 2
	recordFixed   = 1 + 16 + 4 + 2 + 4 + 48 + 16
	recordShard   = 2 + 32
)

func appendRecord(b []byte, r *record) []byte {
	be := binary.BigEndian
	form := byte(recordSegment)
	if r.Secret {
		form = recordSecret
	}
	b = slices.Grow(b, recordFixed+recordShard*len(r.Members))
	b = append(append(b, form), r.ID[:]...)
	b = be.AppendUint32(b, r.Size)
	b = append(b, byte(r.Scheme.K), byte(r.Scheme.N))
	b = be.AppendUint32(b, uint32(r.Key))
	b = append(append(b, r.Wrap[:]...), r.Late[:]...)
	for i := range r.Members {
		b = append(be.AppendUint16(b, r.Members[i]), r.Names[i][:]...)
	}
	return b
}

var errRecord = errors.New("not a record of a segment")

func parseRecord(b []byte) (r record, err error) {
	be := binary.BigEndian
	if len(b) < recordFixed || b[0] != recordSegment && b[0] != recordSecret {
		return r, errRecord
	}
	r = record{
		ID: disperse.ID(b[1:17]), Size: be.Uint32(b[17:]), Scheme: disperse.Scheme{K: int(b[21]), N: int(b[22])}, Secret: b[0] == recordSecret,
		Key: KeyEpoch(be.Uint32(b[23:])), Wrap: disperse.Wrap(b[27:75]), Late: [16]byte(b[75:91]),
	}
	b = b[recordFixed:]
	if err := r.Scheme.Check(); err != nil || len(b) != recordShard*r.Scheme.N || r.Size > disperse.MaxSegment || r.Secret && r.Size > disperse.MaxSecret {
		return r, errRecord
	}
	r.Members, r.Names = make([]uint16, 0, r.Scheme.N), make([]disperse.Name, 0, r.Scheme.N)
	for ; len(b) > 0; b = b[recordShard:] {
		r.Members = append(r.Members, be.Uint16(b))
		r.Names = append(r.Names, disperse.Name(b[2:recordShard]))
	}
	return r, nil
}

// headBytes is what goes with the shards of a block, once its record is known.
type headBytes struct {
	sequence uint64
	sign     func(*record) []byte
}

// A flight is the shards of a segment on their way. Each is sent by a goroutine of its own, some of which outlive put.
type flight struct {
	s      *Store
	e      *disperse.Encoded
	head   *headBytes
	signed []byte
	ctx    context.Context
	cancel context.CancelFunc
	refs   atomic.Int32 // who reads the shards
	size   int          // of all shards
	held   atomic.Bool  // of the memory for those who are late
	waste  atomic.Bool  // put has given up: what arrives is removed
	landed chan landing
}

// A landing is the end of one send.
type landing struct {
	shard int
	name  disperse.Name
	by    *member
	err   error
	at    time.Duration // after the send began
}

func (f *flight) release() {
	if f.refs.Add(-1) == 0 {
		f.e.Release()
		f.cancel()
		if f.held.Load() {
			f.s.late.give(f.size)
		}
	}
}

// leave lets the shards that are still on their way arrive, if there are not too many of them. Repair brings the others.
func (f *flight) leave() {
	if !f.s.late.try(f.size) {
		f.cancel()
		return
	}
	f.held.Store(true)
	time.AfterFunc(lateLimit, f.cancel)
}

// send brings a shard to a member. shard stays as it is until the flight is over.
func (f *flight) send(i int, n disperse.Name, shard []byte, m *member) {
	f.refs.Add(1)
	f.s.spawn(func() {
		begin := time.Now()
		err := f.s.sendShard(f.ctx, m, n, shard, f.head, f.signed)
		took := time.Since(begin)
		m.answered(err, took)
		f.landed <- landing{i, n, m, err, took} // it has room for all
		if err == nil && f.waste.Load() && f.head == nil {
			f.s.remove(f.ctx, m, n)
		}
		f.release()
	})
}

// sendShard puts one shard, and announces the epoch where a location has forgotten it.
func (s *Store) sendShard(ctx context.Context, m *member, n disperse.Name, shard []byte, h *headBytes, signed []byte) error {
	do := func() error {
		if h == nil {
			return m.Location.Put(ctx, n, shard, time.Time{})
		}
		err := m.Location.Append(ctx, n, shard, h.sequence, signed)
		if errors.Is(err, location.ErrOldHead) { // it was late, and the next block was faster
			err = m.Location.Put(ctx, n, shard, time.Time{})
		}
		return err
	}
	return s.announced(ctx, m, do)
}

// announced runs do, and once more if the member has to hear the epoch first.
func (s *Store) announced(ctx context.Context, m *member, do func() error) error {
	err := do()
	if errors.Is(err, location.ErrEpoch) {
		if err = m.Location.Announce(ctx, s.epoch, s.holder); err == nil {
			err = do()
		}
	}
	return err
}

// remove deletes a shard that nothing refers to. One that it cannot remove the sweep finds.
func (s *Store) remove(ctx context.Context, m *member, n disperse.Name) error {
	err := s.announced(ctx, m, func() error { return m.Location.Delete(ctx, n) })
	if errors.Is(err, location.ErrAbsent) {
		return nil
	}
	return err
}

// put disperses a segment, and returns when all n locations have it, or when the hedge limit is over and a quorum has. What
// is still under way then goes on. If a location fails, a spare one gets its shard, but not of a block, whose head names
// where its shards are.
func (s *Store) put(ctx context.Context, coder *disperse.Coder, id disperse.ID, plain []byte, h *headBytes) (r record, durable int, err error) {
	return s.putAs(ctx, coder, id, plain, h, false)
}

func (s *Store) putAs(ctx context.Context, coder *disperse.Coder, id disperse.ID, plain []byte, h *headBytes, secret bool) (r record, durable int, err error) {
	c := coder.Scheme()
	chosen, spares, err := s.choose(c, h != nil)
	if err != nil {
		return r, 0, err
	}
	at := make([]disperse.Place, c.N)
	r = record{ID: id, Size: uint32(len(plain)), Scheme: c, Key: s.keys().Epoch, Secret: secret, Members: make([]uint16, c.N)}
	for i, m := range chosen {
		at[i], r.Members[i] = m.ID, m.index
		r.setDurable(i, false)
	}
	e, err := s.encode(coder, &r, at, plain)
	if err != nil {
		return r, 0, err
	}
	r.Names, r.Wrap = slices.Clone(e.Names), e.Wrap
	f := &flight{s: s, e: e, head: h, landed: make(chan landing, c.N+len(spares)), size: c.N * len(e.Shards[0])}
	f.refs.Store(1)
	f.ctx, f.cancel = context.WithCancel(s.life)
	defer f.release()
	if h != nil {
		f.signed = h.sign(&r)
	}
	// A member that does not answer is left out, unless there is no quorum without it.
	up := 0
	for _, m := range chosen {
		if m.usable() {
			up++
		}
	}
	least := quorum(c)
	running, begin, gaveUp := 0, time.Now(), false
	var unsent []int
	for i, m := range chosen {
		if m.usable() || up < least {
			f.send(i, r.Names[i], e.Shards[i], m)
			running++
		} else {
			unsent = append(unsent, i)
		}
	}
	if s.cfg.DegradedWrites {
		least = c.K
	}
	// Those that did not answer may do so again.
	ask := func() {
		if durable+running < least {
			for _, i := range unsent {
				f.send(i, r.Names[i], e.Shards[i], chosen[i])
				running++
			}
			unsent = nil
		}
	}
	ask()
	// spare sends a shard elsewhere; it is another one then, since a shard says whose it is.
	spare := func(i int) {
		for h == nil && len(spares) > 0 {
			j := slices.IndexFunc(spares, func(m *member) bool { return s.fits(&r, i, m) })
			if j < 0 {
				return
			}
			m := spares[j]
			spares = slices.Delete(spares, j, j+1)
			b := bytes.Clone(e.Shards[i])
			n, err := disperse.Restamp(&s.keys().shards, b, m.ID)
			if err != nil {
				continue
			}
			r.had = append(r.had, holding{uint8(i), r.Members[i]}, holding{uint8(i), m.index})
			r.Members[i], r.Names[i] = m.index, n
			f.send(i, n, b, m)
			running++
			return
		}
	}
	hedge, over := time.NewTimer(s.putTimes.limit(putFloor, putCeiling)), false
	defer hedge.Stop()
	stall := time.NewTimer(lateLimit)
	defer stall.Stop()
	var why []error
	var waste []landing
	for running > 0 && !gaveUp && !(over && durable >= least) {
		select {
		case l := <-f.landed:
			running--
			switch {
			case l.err != nil:
				why = append(why, fmt.Errorf("location %v: %w", l.by.ID, l.err))
				if r.Members[l.shard] == l.by.index {
					spare(l.shard)
				}
				ask()
			case r.durable(l.shard):
				waste = append(waste, l)
			default:
				// A late one and its spare are both whole; the first one counts.
				if r.Members[l.shard] != l.by.index {
					r.Members[l.shard], r.Names[l.shard] = l.by.index, l.name
				}
				r.setDurable(l.shard, true)
				if durable++; durable == least {
					s.putTimes.add(time.Since(begin))
				}
			}
		case <-hedge.C:
			over = true
			for i := range c.N {
				if !r.durable(i) {
					s.memberAt(r.Members[i]).missed()
				}
			}
			for i := range c.N {
				if !r.durable(i) && durable < least {
					spare(i)
				}
			}
		case <-stall.C:
			// Where there is a long way, or a long queue, it takes long: that is not the end as long as something arrives.
			still := stalled(begin, func(see func(*member)) {
				for i, x := range r.Members {
					if !r.durable(i) {
						see(s.memberAt(x))
					}
				}
			})
			if still < lateLimit {
				stall.Reset(lateLimit - still)
				continue
			}
			why = append(why, errLate)
			gaveUp = true
			f.cancel()
		case <-ctx.Done():
			why = append(why, ctx.Err())
			gaveUp = true
		}
	}
	if running > 0 {
		f.leave()
	}
	for _, l := range waste {
		s.spawn(func() { s.remove(s.life, l.by, l.name) })
	}
	if durable >= least {
		return r, durable, nil
	}
	f.waste.Store(true)
	if h == nil {
		s.abandon([]record{r})
	}
	if s.fenced(c) {
		return r, durable, fmt.Errorf("segment %v: %w", id, ErrOld)
	}
	return r, durable, fmt.Errorf("segment %v: %d of %d shards are durable: %w", id, durable, c.N, errors.Join(append(why, ErrBusy)...))
}

func (s *Store) encode(coder *disperse.Coder, r *record, at []disperse.Place, plain []byte) (*disperse.Encoded, error) {
	if r.Secret {
		return coder.Split(r.ID, &s.keys().shards, at, plain)
	}
	key, err := s.keys().store(r.Key)
	if err != nil {
		return nil, err
	}
	return coder.Encode(r.ID, key, &s.keys().shards, at, plain)
}

// shardSize is the size of each shard of a segment.
func shardSize(coder *disperse.Coder, r *record) int {
	if r.Secret {
		return coder.SecretShardSize(int(r.Size))
	}
	return coder.ShardSize(int(r.Size))
}

// A fetch is the end of one request for a shard.
type fetch struct {
	shard int
	b     []byte
	by    *member
	err   error
}

// get appends a segment to dst. It asks the k locations that answer fastest, and others when these take long, fail, or do
// not have what they should. Requests that were not waited for are given up, and Close waits for them.
func (s *Store) get(ctx context.Context, dst []byte, r *record) ([]byte, error) {
	if err := s.enter(); err != nil {
		return dst, err
	}
	defer s.leave()
	coder, err := s.coder(r.Scheme)
	if err != nil {
		return dst, err
	}
	k, size := r.Scheme.K, shardSize(coder, r)
	order := s.order(r)
	shards, came := make([][]byte, r.Scheme.N), make(chan fetch, r.Scheme.N)
	defer func() {
		for _, b := range shards {
			s.buffers.put(b)
		}
	}()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(s.life, cancel)()
	running, have := 0, 0
	var won atomic.Bool
	next := func() {
		if len(order) == 0 {
			return
		}
		i := order[0]
		order = order[1:]
		m := s.memberAt(r.Members[i])
		if m.Location == nil {
			came <- fetch{i, nil, m, location.ErrAbsent}
			running++
			return
		}
		running++
		s.spawn(func() {
			b := s.buffers.get(size)
			begin := time.Now()
			err := m.Location.Get(ctx, r.Names[i], 0, b)
			if ctx.Err() == nil {
				m.read(err, time.Since(begin), size)
			} else if won.Load() {
				m.lost(time.Since(begin), size)
			}
			came <- fetch{i, b, m, err}
		})
	}
	for range k {
		next()
	}
	var why []error
	silent := 0
	begin := time.Now()
	hedge := time.NewTimer(s.getTimes.limit(getFloor, getCeiling))
	defer hedge.Stop()
	stall := time.NewTimer(lateLimit)
	defer stall.Stop()
	for {
		for have < k && running > 0 {
			select {
			case f := <-came:
				running--
				if f.err == nil {
					shards[f.shard] = f.b
					have++
					continue
				}
				s.buffers.put(f.b)
				why = append(why, fmt.Errorf("location %v: %w", f.by.ID, f.err))
				if gone(f.err) {
					s.notice(r.ID, false)
				} else {
					silent++
				}
				next()
			case <-hedge.C:
				for range running {
					next()
				}
			case <-stall.C:
				still := stalled(begin, func(see func(*member)) {
					for _, x := range r.Members {
						see(s.memberAt(x))
					}
				})
				if still < lateLimit {
					stall.Reset(lateLimit - still)
					continue
				}
				return dst, fmt.Errorf("segment %v: %d of %d shards came in time: %w", r.ID, have, k, errors.Join(append(why, ErrBusy, errLate)...))
			case <-ctx.Done():
				return dst, fmt.Errorf("segment %v: %d of %d shards came in time: %w", r.ID, have, k, errors.Join(append(why, ErrBusy, ctx.Err())...))
			}
		}
		if have < k {
			n, err := s.search(ctx, r, size, shards)
			if have += n; have < k {
				end := ErrLost
				if have+silent >= k {
					end = ErrBusy
				}
				return dst, fmt.Errorf("segment %v: %d shards, %d are needed: %w", r.ID, have, k, errors.Join(append(why, err, end)...))
			}
		}
		won.Store(true)
		s.getTimes.add(time.Since(begin))
		out, err := s.decode(dst, coder, r, shards)
		if err == nil || !errors.Is(err, disperse.ErrAuth) {
			return out, err
		}
		// Somebody lies, or rot was not seen: the names say who.
		bad := 0
		for i, b := range shards {
			if b == nil {
				continue
			}
			if n, err := disperse.NameOf(b); err != nil || n != r.Names[i] {
				m := s.memberAt(r.Members[i])
				m.lied(r.Names[i])
				s.log.Warn("a location gave other bytes", "location", m.ID, "segment", r.ID, "shard", i)
				s.notice(r.ID, true)
				s.buffers.put(b)
				shards[i] = nil
				bad++
			}
		}
		if bad == 0 {
			return dst, fmt.Errorf("segment %v, whose shards all have their names: %w", r.ID, err)
		}
		have -= bad
		for range bad {
			next()
		}
	}
}

// gone says of an error that the shard is not there, while the location is.
func gone(err error) bool {
	return errors.Is(err, location.ErrAbsent) || errors.Is(err, location.ErrRotten) || errors.Is(err, location.ErrSize)
}

func (s *Store) decode(dst []byte, coder *disperse.Coder, r *record, shards [][]byte) ([]byte, error) {
	if r.Secret {
		out, err := coder.Join(dst, r.ID, &s.keys().shards, shards)
		if err == nil && len(out)-len(dst) != int(r.Size) {
			return dst, fmt.Errorf("secret %v: %d bytes, not %d: %w", r.ID, len(out)-len(dst), r.Size, disperse.ErrAuth)
		}
		return out, err
	}
	key, err := s.keys().store(r.Key)
	if err != nil {
		return dst, err
	}
	return coder.Decode(dst, r.ID, key, r.Wrap, int(r.Size), shards)
}

// search asks every location for shards that are not where the record says: it may be older than a repair, or its index of
// members than the metadata. It returns how many it found.
func (s *Store) search(ctx context.Context, r *record, size int, shards [][]byte) (n int, err error) {
	var errs []error
	for i := range shards {
		for _, m := range s.members() {
			if shards[i] != nil || m.index == r.Members[i] && m.indexed {
				continue
			}
			b := s.buffers.get(size)
			if err := m.Location.Get(ctx, r.Names[i], 0, b); err != nil {
				s.buffers.put(b)
				if !gone(err) {
					errs = append(errs, fmt.Errorf("location %v: %w", m.ID, err))
				}
				continue
			}
			if name, err := disperse.NameOf(b); err != nil || name != r.Names[i] {
				s.buffers.put(b)
				continue
			}
			shards[i] = b
			n++
		}
	}
	return n, errors.Join(errs...)
}

// order is in which order shards are asked for: of members that answer, fast ones first, and data before parity, which
// costs a decoding.
func (s *Store) order(r *record) []int {
	type at struct{ i, speed int }
	all := make([]at, r.Scheme.N)
	for i := range all {
		m := s.memberAt(r.Members[i])
		speed := m.speed()
		switch {
		case m.Location == nil:
			speed = 1000
		case !m.usable():
			speed = 900
		case !r.durable(i):
			speed += 500
		}
		all[i] = at{i, speed}
	}
	slices.SortStableFunc(all, func(a, b at) int { return cmp.Compare(a.speed, b.speed) })
	out := make([]int, len(all))
	for j, a := range all {
		out[j] = a.i
	}
	return out
}

// buffers keeps memory for shards and segments, by size: eight sizes between two powers of two.
type buffers struct{ sizes [8 * 32]sync.Pool }

// sizeClass is the class that has room for n bytes, and its size.
func sizeClass(n int) (class, size int) {
	n = max(n, 1<<12)
	e := bits.Len(uint(n - 1))
	step := max(1<<e>>4, 1)
	size = (n + step - 1) / step * step
	return e*8 + (size/step - 8) - 1, size
}

func (p *buffers) get(n int) []byte {
	class, size := sizeClass(n)
	if b, ok := p.sizes[class].Get().(*[]byte); ok {
		return (*b)[:n]
	}
	return make([]byte, n, size)
}

func (p *buffers) put(b []byte) {
	if class, size := sizeClass(cap(b)); size == cap(b) {
		p.sizes[class].Put(&b)
	}
}
