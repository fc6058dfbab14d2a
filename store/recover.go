package store

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2"

	"holdfast/disperse"
	"holdfast/store/location"
)

// Errors of a start.
var (
	// ErrKeys is returned when locations keep the log of a store that these keys did not sign.
	ErrKeys = errors.New("the locations keep another store, or the phrase is wrong")
	// ErrNoStore is returned when there is nothing to restore.
	ErrNoStore = errors.New("the locations keep no store")
	// ErrExists is returned when a store would begin where one is.
	ErrExists = errors.New("the locations keep a store already")
	// ErrRollback is returned when locations say less than they once did, and the end of the log cannot be told.
	ErrRollback = errors.New("the log may have lost its end")
)

// Recovery tells what a start found.
type Recovery struct {
	Epoch    location.Epoch // of this front end
	From     location.Epoch // of the front end whose head was taken; 0: the store is new
	Head     uint64         // its sequence
	Block    uint64         // the last block of the log
	Replayed uint64         // how many blocks the database lacked
	Snapshot uint64         // the block that the snapshot covers which was read, 0 if none was
	Dropped  bool           // a block was left unfinished, by which nobody was told that it is durable
	Silent   []disperse.Place
	Forged   []disperse.Place // their head is not signed by this store
	Rolled   []disperse.Place // they had acknowledged more than they know now
}

// Recovery is what the start found.
func (s *Store) Recovery() Recovery { return s.recovery }

// Keys are those that the store is run with: those of the configuration, or of a later epoch if the phrase was there to derive
// them. Who restored a store saves them.
func (s *Store) Keys() *Keys { return s.keys() }

// keys change when they are rotated, to those of a later epoch.
func (s *Store) keys() *Keys { return s.ring.Load() }

// answer is what a location says at the start.
type answer struct {
	Member
	status location.Status
	head   location.Head
	before []location.Head // of earlier epochs, the newest first
	signed *head           // nil: none, or forged
	err    error
	rolled bool
}

func (a *answer) older(epoch location.Epoch, seq uint64) bool {
	return a.head.Epoch < epoch || a.head.Epoch == epoch && a.head.Sequence < seq
}

// ask calls f for every member at once. Who does not answer in time has not answered, and so has who is late when a quorum
// has long answered: one place that is silent keeps nobody waiting.
func (s *Store) ask(ctx context.Context, f func(context.Context, *answer) error) []*answer {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.Timeout)
	defer cancel()
	members := s.used()
	all := make([]*answer, len(members))
	var wg sync.WaitGroup
	var answered, due atomic.Int64
	for _, m := range members {
		if !m.Down {
			due.Add(1)
		}
	}
	for i, m := range members {
		all[i] = &answer{Member: m.Member}
		wg.Go(func() {
			all[i].err = f(ctx, all[i])
			if all[i].err == nil && answered.Add(1) == int64(quorum(s.scheme)) {
				time.AfterFunc(askLate, cancel)
			}
			if !m.Down && due.Add(-1) == 0 && answered.Load() >= int64(quorum(s.scheme)) {
				cancel()
			}
		})
	}
	wg.Wait()
	return all
}

// askLate is how long who is late is waited for when a quorum has answered.
const askLate = 2 * time.Second

// recover finds the end of the log, and brings the database there.
func (s *Store) recover(ctx context.Context) error {
	all, err := s.takeOver(ctx)
	if err != nil {
		return err
	}
	known, err := s.identified()
	if err != nil {
		return err
	}
	var local *ref
	if known {
		if local, err = readApplied(s.db); err != nil {
			return err
		}
	}
	best, err := s.newest(all, known)
	if err != nil {
		return err
	}
	if best == nil && local != nil {
		return fmt.Errorf("the database has block %d, the locations have no log: %w", local.sequence, ErrRollback)
	} else if best == nil {
		return s.identify()
	}
	if best.key > s.keys().Epoch {
		keys, err := s.keys().raise(best.key)
		if err != nil {
			return err
		}
		s.ring.Store(keys)
	}
	for i, p := range best.places {
		s.learn(i, p)
	}
	s.last, s.before = best.last, best.before
	s.snapshot.Store(best.snapshot)
	if err := s.decide(ctx, all, best); err != nil {
		return err
	}
	if s.last != nil {
		if err := s.catchUp(ctx, local); err != nil {
			return err
		}
		s.sequence = s.last.sequence
	} else if local != nil {
		return fmt.Errorf("the database has block %d, the log none: %w", local.sequence, ErrRollback)
	}
	if err := s.identify(); err != nil {
		return err
	}
	r := &s.recovery
	r.From, r.Head, r.Block = best.epoch, best.sequence, s.sequence
	s.log.Info("the log goes on", "epoch", s.epoch, "from", r.From, "head", r.Head, "block", r.Block, "replayed", r.Replayed,
		"silent", len(r.Silent), "forged", len(r.Forged), "rolled back", len(r.Rolled))
	return nil
}

// takeOver announces an epoch that is newer than all that are known, at enough locations that an older front end has no
// quorum left. Only then what they say of the log is final.
func (s *Store) takeOver(ctx context.Context) ([]*answer, error) {
	// With fewer an older front end could still write, one that starts now could do so too, or a block not be read.
	m := len(s.cfg.Members)
	least := max(s.scheme.K, m-quorum(s.scheme)+1, m/2+1)
	if !s.cfg.AcceptLoss {
		// Of those that acknowledged the last block n−k may say that they know of none: one more has to answer.
		least = max(least, m-quorum(s.scheme)+s.scheme.N-s.scheme.K+1)
	}
	var why []error
	for range 5 {
		all := s.ask(ctx, func(ctx context.Context, a *answer) (err error) {
			a.status, err = a.Location.Status(ctx)
			return err
		})
		var known []location.Epoch
		for _, a := range all {
			if a.err == nil {
				known = append(known, a.status.Epoch)
			}
		}
		s.epoch = nextEpoch(known)
		all = s.ask(ctx, func(ctx context.Context, a *answer) (err error) {
			if err := a.Location.Announce(ctx, s.epoch, s.holder); err != nil {
				return err
			}
			if a.head, err = a.Location.Head(ctx); err == nil {
				a.before, err = a.Location.Earlier(ctx)
			}
			return err
		})
		n, fenced := 0, false
		why = []error{ErrBusy}
		for _, a := range all {
			if a.err == nil {
				n++
				continue
			}
			fenced = fenced || errors.Is(a.err, location.ErrFenced)
			why = append(why, fmt.Errorf("location %v: %w", a.ID, a.err))
		}
		if n >= least {
			s.recovery.Epoch = s.epoch
			return all, nil
		}
		if !fenced {
			return nil, fmt.Errorf("%d of %d locations answer, %d are needed: %w", n, m, least, errors.Join(why...))
		}
	}
	return nil, fmt.Errorf("take the store over: others do so too: %w", errors.Join(why...))
}

// epochLeap is how far a location lets an epoch grow at once.
const epochLeap = 1 << 32

// nextEpoch is the epoch that most locations take, the highest of those. One that lies must not use up all epochs there are.
func nextEpoch(known []location.Epoch) (best location.Epoch) {
	most := -1
	for _, e := range append(known, 0) {
		if e == math.MaxUint64 {
			continue
		}
		n := 0
		for _, k := range known {
			if k <= e && e+1-k <= epochLeap {
				n++
			}
		}
		if n > most || n == most && e+1 > best {
			most, best = n, e+1
		}
	}
	return best
}

// identified says whether the database is one that this store began, or restored as a whole.
func (s *Store) identified() (bool, error) {
	v := view{r: s.db}
	b, ok, err := v.get(ownKey(tableIdentity))
	if err == nil && ok && !hmac.Equal(b, s.keys().identity()) {
		err = fmt.Errorf("the database is another store's: %w", ErrKeys)
	}
	return ok, err
}

func (s *Store) identify() error {
	return s.db.Set(ownKey(tableIdentity), s.keys().identity(), pebble.Sync)
}

// identity tells a store from others, and its keys to nobody.
func (k *Keys) identity() []byte {
	m := hmac.New(sha256.New, k.heads[:])
	m.Write([]byte("holdfast store database"))
	return m.Sum(nil)
}

// newest is the newest head that this store signed; nil if the store begins.
func (s *Store) newest(all []*answer, known bool) (best *head, err error) {
	r := &s.recovery
	answered := 0
	for _, a := range all {
		if a.err != nil {
			r.Silent = append(r.Silent, a.ID)
			continue
		}
		answered++
		if a.head.Epoch == 0 {
			continue
		}
		h, err := s.keys().verify(a.head)
		if err != nil {
			s.log.Warn("a location's head is not this store's", "location", a.ID.String(), "error", err)
			r.Forged = append(r.Forged, a.ID)
		}
		if err != nil || s.cfg.Before > 0 && h.epoch >= s.cfg.Before {
			if h = s.earlier(a); h == nil {
				continue
			}
		}
		a.signed = h
		if best == nil || !a.older(best.epoch, best.sequence) {
			best = h
		}
	}
	switch {
	case best == nil && s.cfg.Before > 0:
		return nil, fmt.Errorf("no location keeps a head before epoch %d: %w", s.cfg.Before, ErrNoStore)
	case best == nil && len(r.Forged) > 0:
		return nil, fmt.Errorf("%d of %d heads are signed by others: %w", len(r.Forged), answered, ErrKeys)
	case best == nil && known && s.cfg.Restore:
		return nil, fmt.Errorf("the locations have no log, and the directory is not empty: %w", ErrNoStore)
	case best == nil && s.cfg.Restore:
		return nil, ErrNoStore
	case best == nil && answered < len(all):
		return nil, fmt.Errorf("a new store begins with all its locations, %s do not answer: %w", names(r.Silent), ErrBusy)
	case best == nil:
		return nil, nil
	case !known && !s.cfg.Restore:
		return nil, fmt.Errorf("the directory is empty, and %w: restore it", ErrExists)
	}
	// Who acknowledged the block before the last, and does not know of it, is not what it was.
	if b := best.before; b != nil {
		for _, a := range all {
			if i := s.shardAt(best, &b.record, a.ID); a.err == nil && i >= 0 && b.record.durable(i) && a.older(b.epoch, b.head) {
				a.rolled = true
				r.Rolled = append(r.Rolled, a.ID)
				s.log.Warn("a location went back in time", "location", a.ID.String(), "head", a.head.Sequence, "of epoch", a.head.Epoch)
			}
		}
	}
	return best, nil
}

// earlier takes the newest head that a location keeps of earlier epochs and that is this store's, nil if there is none.
func (s *Store) earlier(a *answer) *head {
	for _, l := range a.before {
		if s.cfg.Before > 0 && l.Epoch >= s.cfg.Before {
			continue
		}
		if h, err := s.keys().verify(l); err == nil {
			a.head = l
			return h
		}
	}
	return nil
}

func names(p []disperse.Place) string {
	var out []string
	for _, p := range p {
		out = append(out, fmt.Sprintf("%x", p[:]))
	}
	return strings.Join(out, ", ")
}

// shardAt is which shard of a block a place has, -1 if none.
func (s *Store) shardAt(h *head, r *record, p disperse.Place) int {
	for i, m := range r.members() {
		if h.places[m] == p {
			return i
		}
	}
	return -1
}

// decide says whether the last block is part of the log. If k shards can be had it is. If it cannot have been acknowledged
// it is not, and the log ends before it. Otherwise nobody knows.
func (s *Store) decide(ctx context.Context, all []*answer, best *head) error {
	last := &best.last.record
	have := make([]bool, len(all))
	s.eachAnswer(ctx, all, func(ctx context.Context, j int, a *answer) {
		i := s.shardAt(best, last, a.ID)
		if i < 0 || a.err != nil {
			return
		}
		info, err := a.Location.Stat(ctx, last.name(i))
		switch {
		case err == nil:
			have[j] = !info.Rotten && info.Deleted.IsZero()
		case !errors.Is(err, location.ErrAbsent):
			a.err = err
		}
	})
	there, unknown := 0, len(last.members())
	for j, a := range all {
		if s.shardAt(best, last, a.ID) < 0 {
			continue
		}
		if have[j] {
			there++
			unknown--
		} else if a.err == nil && !a.rolled && (a.head.Epoch != best.last.epoch || a.head.Sequence != best.last.head) {
			unknown-- // with the head it would have had the shard
		}
	}
	c := last.scheme()
	acknowledged := quorum(c)
	if s.cfg.DegradedWrites {
		acknowledged = c.K
	}
	if there >= c.K {
		_, _, err := s.blockOf(ctx, best.last)
		if err == nil {
			return nil
		}
		if !errors.Is(err, ErrLost) {
			return err
		}
		there, unknown = c.K-1, c.N-c.K+1 // somebody says that he has what he has not
	}
	switch {
	case there+unknown >= acknowledged && !s.cfg.AcceptLoss:
		return fmt.Errorf("block %d has %d shards, needs %d, and %d locations that had one are silent or went back (silent %s; went back %s): %w",
			best.last.sequence, there, c.K, unknown, names(s.recovery.Silent), names(s.recovery.Rolled), ErrRollback)
	}
	s.log.Warn("the last block was not finished", "block", best.last.sequence, "shards", there, "silent", unknown)
	s.recovery.Dropped = true
	s.last, s.before = best.before, nil
	return nil
}

func (s *Store) eachAnswer(ctx context.Context, all []*answer, f func(context.Context, int, *answer)) {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.Timeout)
	defer cancel()
	var wg sync.WaitGroup
	for j, a := range all {
		wg.Go(func() { f(ctx, j, a) })
	}
	wg.Wait()
}

// memoryOfReplay bounds the blocks that are kept between finding the way back and going forward.
const memoryOfReplay = 64 << 20

// catchUp applies the blocks that the database lacks: all after the snapshot if it is older than that.
func (s *Store) catchUp(ctx context.Context, local *ref) error {
	from := uint64(0)
	snap := s.snapshot.Load()
	switch {
	case local != nil && local.sequence > s.last.sequence:
		return fmt.Errorf("the database has block %d, the locations end with %d: %w", local.sequence, s.last.sequence, ErrRollback)
	case local != nil && (snap == nil || local.sequence >= snap.sequence):
		from = local.sequence
	default:
		if err := s.emptyDatabase(); err != nil {
			return err
		}
		local = nil
		if snap != nil {
			var err error
			if local, err = s.loadSnapshot(ctx, snap); err != nil {
				return fmt.Errorf("snapshot of block %d: %w", snap.sequence, err)
			}
			from, s.recovery.Snapshot = snap.sequence, snap.sequence
		}
	}
	// Each block knows only the one before it.
	type step struct {
		*ref
		plain []byte // nil: it is read again
	}
	var way []step
	kept := 0
	for r := s.last; r != nil && r.sequence > from; {
		plain, b, err := s.blockOf(ctx, r)
		if err != nil {
			return err
		}
		next := step{ref: r}
		if kept += len(plain); kept <= memoryOfReplay {
			next.plain = plain
		}
		way = append(way, next)
		if b.prev != nil && b.prev.sequence != r.sequence-1 || b.prev == nil && r.sequence != 1 {
			return fmt.Errorf("block %d: what it says is before it is not: %w", r.sequence, errBlock)
		}
		r = b.prev
		if r != nil && r.sequence == from && local != nil && r.record.id() != local.record.id() {
			return fmt.Errorf("the database has another block %d than the log: it is not of this store, or was restored elsewhere", from)
		}
	}
	if len(way) == 0 && local != nil && s.last.record.id() != local.record.id() {
		return fmt.Errorf("the database has another block %d than the log: it is not of this store, or was restored elsewhere", from)
	}
	for i, st := range slices.Backward(way) {
		if s.cfg.Replaying != nil {
			s.cfg.Replaying("block", len(way)-i, len(way))
		}
		plain := st.plain
		if plain == nil {
			var err error
			if plain, _, err = s.blockOf(ctx, st.ref); err != nil {
				return err
			}
		}
		b, err := parseBlock(plain)
		if err != nil {
			return err
		}
		if err := s.apply(b.ops, st.ref); err != nil {
			return err
		}
	}
	if len(way) > 1 {
		s.before = way[1].ref
	} else if s.before == nil && local != nil && local.sequence < s.last.sequence {
		s.before = local
	}
	s.recovery.Replayed = uint64(len(way))
	return s.sinceSnapshot(ctx)
}

// sinceSnapshot counts what a restore would have to read behind the snapshot.
func (s *Store) sinceSnapshot(ctx context.Context) error {
	return s.view(ctx, func(v *view) error {
		row := snapshotRow{}
		if b, ok, err := v.get(ownKey(tableSnapshot)); err != nil {
			return err
		} else if ok {
			if row, err = parseSnapshotRow(b); err != nil {
				return err
			}
		}
		s.snapshotSize.Store(row.size)
		from := uint64(0)
		if snap := s.snapshot.Load(); snap != nil {
			from = snap.sequence
		}
		if from != row.sequence {
			s.wantSnapshot() // the front end died before the snapshot's segments were in the metadata
		}
		c := v.scan(sequenceKey(tableBlock, from+1), ownKey(tableBlock+1), 2)
		for c.Next() {
			r, err := parseRecord(c.Value())
			if err != nil {
				return err
			}
			s.blocks.Add(1)
			s.logged.Add(int64(r.size()))
		}
		return c.Close()
	})
}

// blockOf reads a block by its reference.
func (s *Store) blockOf(ctx context.Context, r *ref) ([]byte, block, error) {
	plain, err := s.get(ctx, nil, &r.record)
	if err != nil {
		return nil, block{}, fmt.Errorf("block %d: %w", r.sequence, err)
	}
	b, err := parseBlock(plain)
	if err == nil && b.sequence != r.sequence {
		err = errBlock
	}
	if err != nil {
		return nil, block{}, fmt.Errorf("block %d: %w", r.sequence, err)
	}
	return plain, b, nil
}

// emptyDatabase begins the database anew: one that is older than the snapshot, or was never whole, is of no use.
func (s *Store) emptyDatabase() error {
	err := s.db.Close()
	s.db = nil
	if err := errors.Join(err, os.RemoveAll(s.metadata())); err != nil {
		return err
	}
	return s.openDatabase()
}

// putHeads tells a quorum of locations where the log ends.
func (s *Store) putHeads(ctx context.Context, seq uint64, signed []byte) error {
	all := s.ask(ctx, func(ctx context.Context, a *answer) error {
		err := a.Location.PutHead(ctx, seq, signed)
		if errors.Is(err, location.ErrEpoch) {
			if err = a.Location.Announce(ctx, s.epoch, s.holder); err == nil {
				err = a.Location.PutHead(ctx, seq, signed)
			}
		}
		return err
	})
	return s.counted("put head", all)
}

// counted says what a quorum of the answers says.
func (s *Store) counted(what string, all []*answer) error {
	var why []error
	fenced := 0
	for _, a := range all {
		if a.err != nil {
			why = append(why, fmt.Errorf("location %v: %w", a.ID, a.err))
		}
		if errors.Is(a.err, location.ErrFenced) {
			fenced++
		}
	}
	switch q := quorum(s.scheme); {
	case fenced > len(all)-q:
		return fmt.Errorf("%s: %w", what, errors.Join(append(why, ErrOld)...))
	case len(all)-len(why) < q:
		return fmt.Errorf("%s: %d of %d locations did: %w", what, len(all)-len(why), len(all), errors.Join(append(why, ErrBusy)...))
	}
	return nil
}

// runHeartbeat notices that another front end has the store when nothing is written.
func (s *Store) runHeartbeat(ctx context.Context) {
	for t := time.NewTicker(s.cfg.Heartbeat); ; {
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-t.C:
		}
		all := s.ask(ctx, func(ctx context.Context, a *answer) error { return a.Location.Announce(ctx, s.epoch, s.holder) })
		if errors.Is(s.counted("announce", all), ErrOld) {
			s.lose()
		}
	}
}

// lose ends the service: what this front end knows is not the newest any more.
func (s *Store) lose() {
	if !s.old.Swap(true) {
		s.log.Error("another front end has taken the store over", "epoch", s.epoch)
	}
}

// snapshotRow is what tableSnapshot says: the newest snapshot's block, the segment that lists, and those that it lists.
type snapshotRow struct {
	sequence uint64
	size     int64         // of all but the list
	segments []disperse.ID // the list first
}

func (r *snapshotRow) append(b []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, r.sequence)
	b = binary.BigEndian.AppendUint64(b, uint64(r.size))
	for _, id := range r.segments {
		b = append(b, id[:]...)
	}
	return b
}

func parseSnapshotRow(b []byte) (r snapshotRow, err error) {
	if len(b) < 16 || len(b)%16 != 0 {
		return r, errRow
	}
	r.sequence, r.size = binary.BigEndian.Uint64(b), int64(binary.BigEndian.Uint64(b[8:]))
	for b = b[16:]; len(b) > 0; b = b[16:] {
		r.segments = append(r.segments, disperse.ID(b[:16]))
	}
	return r, nil
}
