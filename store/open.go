package store

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2"

	"holdfast/disperse"
	"holdfast/store/location"
)

// Config configures a Store.
type Config struct {
	// Dir is the front end's own: a database, which is made again from the locations when it is lost.
	Dir     string
	Keys    *Keys
	Members []Member
	Scheme  disperse.Scheme            // of class STANDARD
	Classes map[string]disperse.Scheme // others by name
	// Restore takes over the store that the members keep. Without it a Dir that is empty begins a new store, and is refused
	// if there is one.
	Restore bool
	// Before takes the head of an earlier epoch than this, 0 is any. A thief of the front end's keys signs heads that look like
	// the store's; locations keep those before his while they hold what was deleted (Undelete).
	Before location.Epoch
	// AcceptLoss starts even where locations say less than they once did, and the last writes may be lost.
	AcceptLoss bool
	// DegradedWrites acknowledges with k shards durable where the rule asks for more.
	DegradedWrites bool
	// Fragile allows what Placement refuses: a farm without which nothing can be written, or that can read alone.
	Fragile   bool
	Upkeep    Upkeep
	Timeout   time.Duration // how long nothing at all may happen for who waits; 0 means 10 s
	Heartbeat time.Duration // how often locations are asked whether another front end has the store; 0 means 3 s
	Snapshot  int64         // bytes of log that are worth a snapshot, at least; 0 means 64 MiB
	Memory    int64         // bytes of the database's cache, memtables among them; 0 means 64 MiB
	Log       *slog.Logger  // nil discards
	// Replaying, if it is not nil, hears how far Open is with what the database lacks: pieces of a snapshot, or blocks.
	Replaying func(what string, done, of int)
}

// The log asks this of segments and places (segment.go, places.go, repair.go):
//
//	type record: id() disperse.ID, scheme() disperse.Scheme, size() int (plain bytes), members() []uint16 (indexes, one a shard), name(shard int)
//	disperse.Name, durable(shard int) bool (as it was when put returned: it is in appendRecord's bytes)
//	type headBytes struct{ sequence uint64; sign func(*record) []byte } // what goes with a block, once its record is known
//	put (may give up with ErrBusy, the log comes again with another id and head; ErrOld when more than members−quorum are
//	fenced; on location.ErrEpoch it announces s.epoch, s.holder and comes again), get
//	openPlaces() before the database is there, placesRecovered() when it is whole, runPlaces(ctx) as part of Run
//	learn(index uint16, disperse.Place), placeOf(index uint16) disperse.Place
//	kept(*tx, disperse.ID, *record): a segment is now part of the store; abandon([]record): it never will be
//	noteBlock(*pebble.Batch, *ref): the same for a block, into the batch that applies it (a row in the log would make a block
//	each); repairing a block changes its row of tableBlock, and calls wantSnapshot
//	mend(ctx, *ref) error: brings a block's missing shards back to the places that should have them, until a quorum has

// Store is a front end of a dispersed store. It implements Objects.
type Store struct {
	cfg    Config
	log    *slog.Logger
	ring   atomic.Pointer[Keys]
	scheme disperse.Scheme // of the log: that of the class with the smallest k
	epoch  location.Epoch
	holder location.Holder
	db     *pebble.DB
	sound  context.Context // ends, with the reason, when the database's files are damaged
	places                 // segment.go, places.go

	coders sync.Map // of disperse.Scheme: *disperse.Coder

	// A group takes changes while the one before it is under way. Guarded by mu.
	mu      sync.Mutex
	forming *group
	flying  *group // nil when it has been applied
	spare   *group // nil, or one whose memory can be used again
	dead    error  // why no more changes are taken
	wake    chan struct{}
	waiters sync.Pool
	moved   atomic.Int64 // when the last block was durable, ns since 1970
	// insisting says that what the log wants has failed, and is tried again.
	insisting atomic.Bool

	// The log goroutine's.
	sequence uint64 // of the last block
	heads    uint64 // of the last head
	last     *ref   // nil before the first
	before   *ref
	sealed   bool
	plain    []byte

	snapshot     atomic.Pointer[snapshotRef]
	logged       atomic.Int64 // bytes of blocks since the snapshot
	blocks       atomic.Int64 // blocks since the snapshot
	want         chan struct{}
	snapping     sync.Mutex
	snapshotSize atomic.Int64
	recovery     Recovery

	pending sync.Map // of disperse.ID: *pendingPiece
	cache   blockCache
	old     atomic.Bool // another front end has the store

	stop context.CancelFunc
	life context.Context
	// using counts who uses the database or a location: calls, and what they leave running. Close waits for all.
	using atomic.Int64
	close func() error
}

var _ Objects = (*Store)(nil)

// pendingPiece is what Write has taken and no Tx has kept: a body for the next block, or a segment that is at its places.
type pendingPiece struct {
	small  []byte // nil if it is a segment of its own
	record *record
	by     *tx // that kept it last; guarded by the store's mu
}

// Open takes a store over, or begins it: it fences other front ends off, replays what the database lacks and starts the
// log. The locations stay the caller's.
func Open(ctx context.Context, cfg Config) (*Store, error) {
	cfg.Timeout = cmp.Or(cfg.Timeout, 10*time.Second)
	cfg.Heartbeat = cmp.Or(cfg.Heartbeat, 3*time.Second)
	cfg.Snapshot = cmp.Or(cfg.Snapshot, 64<<20)
	cfg.Memory = cmp.Or(cfg.Memory, 64<<20)
	if cfg.Keys == nil || cfg.Dir == "" {
		return nil, errors.New("open store: keys and a directory are needed")
	}
	s := &Store{cfg: cfg, log: cmp.Or(cfg.Log, slog.New(slog.DiscardHandler)), scheme: cfg.Scheme, wake: make(chan struct{}, 1), want: make(chan struct{}, 1)}
	s.ring.Store(cfg.Keys)
	for _, c := range cfg.Classes {
		if c.K < s.scheme.K {
			s.scheme = c
		}
	}
	rand.Read(s.holder[:])
	s.cache.limit = blockCacheSize
	s.close = sync.OnceValue(s.shut)
	s.life, s.stop = context.WithCancel(context.Background())
	if err := s.open(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("open store: %w", err), s.Close())
	}
	return s, nil
}

func (s *Store) open(ctx context.Context) error {
	if err := errors.Join(s.cfg.Scheme.Check(), s.scheme.Check()); err != nil {
		return err
	}
	if s.scheme.N > maxLogPlaces {
		return fmt.Errorf("the class with the smallest k has %d shards: the log takes at most %d", s.scheme.N, maxLogPlaces)
	}
	if err := s.openPlaces(); err != nil {
		return err
	}
	if err := os.MkdirAll(s.cfg.Dir, 0o700); err != nil {
		return err
	}
	if err := s.openDatabase(); err != nil {
		return err
	}
	if err := s.recover(ctx); err != nil {
		return err
	}
	if err := s.placesRecovered(); err != nil {
		return err
	}
	s.forming = s.newGroup(nil)
	s.spawn(s.runLog)
	return nil
}

// Close ends the store's work. What has not been acknowledged may be lost.
func (s *Store) Close() error { return s.close() }

func (s *Store) shut() error {
	s.stop()
	for s.using.Load() > 0 {
		time.Sleep(time.Millisecond)
	}
	var err error
	if s.forming != nil && s.forming.batch != nil {
		err = s.forming.batch.Close()
	}
	if s.db != nil {
		err = errors.Join(err, s.db.Close())
		if s.sound.Err() != nil { // the locations know all that it knew
			err = s.setAside()
		}
	}
	return err
}

var errClosed = fmt.Errorf("store is closed: %w", ErrBusy)

// enter keeps the database open until leave, and Close from returning. It may be entered again by who is in it.
func (s *Store) enter() error {
	s.using.Add(1)
	if s.life.Err() != nil {
		s.using.Add(-1)
		return errClosed
	}
	return nil
}

func (s *Store) leave() { s.using.Add(-1) }

// spawn runs f beside its caller, who has entered.
func (s *Store) spawn(f func()) {
	s.using.Add(1)
	go func() {
		defer s.leave()
		f()
	}()
}

// begin is enter for what takes long: its context ends with the store too. Call end when it is over.
func (s *Store) begin(ctx context.Context) (_ context.Context, end func(), err error) {
	if err := s.enter(); err != nil {
		return ctx, nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(s.life, cancel)
	return ctx, func() {
		stop()
		cancel()
		s.leave()
	}, nil
}

// Run does what a store does by itself until ctx ends: it notices another front end, takes snapshots, and sees to its
// segments. It returns ErrDamaged if the directory's files are: Close then sets them aside.
func (s *Store) Run(ctx context.Context) error {
	ctx, end, err := s.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(s.sound, cancel)()
	var wg sync.WaitGroup
	wg.Go(func() { s.runHeartbeat(ctx) })
	wg.Go(func() { s.runSnapshots(ctx) })
	s.runPlaces(ctx)
	wg.Wait()
	return context.Cause(s.sound)
}

func (s *Store) coder(c disperse.Scheme) (*disperse.Coder, error) {
	if v, ok := s.coders.Load(c); ok {
		return v.(*disperse.Coder), nil
	}
	made, err := disperse.NewCoder(c)
	if err != nil {
		return nil, err
	}
	v, _ := s.coders.LoadOrStore(c, made)
	return v.(*disperse.Coder), nil
}

// quorum is how many shards of n make a write durable: more than n−k losses away from k, and more than half of the rest.
func quorum(c disperse.Scheme) int { return min(c.N, max(c.K+1, (c.N+c.K+1)/2)) }

func (s *Store) openDatabase() error {
	cache := pebble.NewCache(s.cfg.Memory)
	defer cache.Unref()
	open := func() (err error) {
		sound, spoil := context.WithCancelCause(context.Background())
		s.sound = sound
		s.db, err = pebble.Open(s.metadata(), databaseOptions(cache, s.cfg.Memory, s.log, func(err error) { spoil(fmt.Errorf("%w: %w", ErrDamaged, err)) }))
		return err
	}
	err := open()
	if s.cfg.Restore && pebble.IsCorruptionError(err) {
		s.log.Warn("the database is damaged, and made anew from the locations", "error", err)
		if err = s.setAside(); err == nil {
			err = open()
		}
	}
	if pebble.IsCorruptionError(err) {
		err = fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if err != nil {
		s.db = nil
		return fmt.Errorf("database: %w", err)
	}
	return nil
}

func (s *Store) metadata() string { return filepath.Join(s.cfg.Dir, "metadata") }

// setAside keeps a damaged database for who wants to look at it, until the next is.
func (s *Store) setAside() error {
	aside := s.metadata() + ".damaged"
	if err := os.RemoveAll(aside); err != nil {
		return err
	}
	if err := os.Rename(s.metadata(), aside); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
