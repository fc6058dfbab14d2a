package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"holdfast/contract"
	"holdfast/ledger"
	"holdfast/store"
	"holdfast/store/location"
	"holdfast/volume"
)

// A volume whose contract has a store for it is saved: snapshots go there while its workload runs and once more when that has
// ended. A node that gets the volume after another makes it from the newest. The store's database is on tmpfs and goes with
// the saver, as that of a front end does: every saver takes the store over from the locations, which from then on refuse the
// one before.

// retention is what is kept of a volume beside its newest snapshot.
var retention = volume.Retention{Last: 6, Hourly: 24, Daily: 7}

// When what is saved does not fit any more, only the newest is kept until it does.
var least = volume.Retention{Last: 1}

const (
	saverMemory = 24 << 20         // of the database of one store
	tellEvery   = time.Hour        // how often the ledger hears of a newer snapshot
	lastSave    = 30 * time.Second // what the last snapshot of a volume may take
)

// savers are those of this node.
type savers struct {
	agent *Agent
	mu    sync.Mutex
	all   map[contract.VolumeID]*saver
}

// saver saves one volume, as long as this node has it.
type saver struct {
	agent  *Agent
	volume WorkVolume
	epoch  uint64 // of the workload
	log    *slog.Logger
	cancel context.CancelFunc
	done   chan struct{}
	last   chan struct{} // closed: the workload has ended
	ready  chan struct{} // closed: the disk is there
	end    sync.Once

	mu    sync.Mutex
	place *shelf // nil while the store is not open
	pace  volume.Pace
	why   string // why the newest snapshot is not newer; "" when that is as it should be

	// Of run alone.
	told      volume.Snapshot // that the ledger knows of
	toldAt    time.Time
	collected time.Time
	full      bool // the store was, when something was put last
}

// begin has a volume saved in an epoch, by the saver that there is or by a new one. It returns nil for one without a store.
func (s *savers) begin(v *WorkVolume, epoch uint64) *saver {
	if v.Store == [32]byte{} {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.all[v.ID]
	if old != nil && old.epoch == epoch {
		return old
	}
	if old != nil {
		old.cancel()
	}
	x := &saver{
		agent: s.agent, volume: *v, epoch: epoch, log: s.agent.log.With("volume", v.ID.Short(), "epoch", epoch),
		done: make(chan struct{}), last: make(chan struct{}), ready: make(chan struct{}), why: "there is none yet",
		told: volume.Snapshot{Sequence: v.Sequence, Digest: v.Snapshot}, collected: time.Now(),
	}
	if !v.Restore {
		close(x.ready)
	}
	var ctx context.Context
	ctx, x.cancel = context.WithCancel(s.agent.groupCtx)
	s.all[v.ID] = x
	s.agent.group.Go(func() error {
		defer close(x.done)
		defer x.cancel()
		if old != nil {
			<-old.done
		}
		x.run(ctx)
		return nil
	})
	return x
}

// finish ends the saving of a volume, after a last snapshot if its workload ended in this node's own time.
func (s *savers) finish(ctx context.Context, id contract.VolumeID, save bool) {
	s.mu.Lock()
	x := s.all[id]
	s.mu.Unlock()
	if x == nil {
		return
	}
	x.end.Do(func() { close(x.last) })
	if save {
		ctx, cancel := context.WithTimeout(ctx, lastSave)
		defer cancel()
		select {
		case <-x.done:
		case <-ctx.Done():
			x.log.Warn("the last snapshot of a volume was given up")
		}
	}
	x.cancel()
	<-x.done
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.all[id] == x {
		delete(s.all, id)
	}
}

// leave finishes the saving of a volume that an earlier epoch began here: what its disk has now can be had back too.
func (s *savers) leave(ctx context.Context, id contract.VolumeID, epoch uint64) {
	s.mu.Lock()
	x := s.all[id]
	s.mu.Unlock()
	if x != nil && x.epoch < epoch {
		s.finish(ctx, id, true)
	}
}

// snapshots are those of a volume that this node saves, oldest first.
func (s *savers) snapshots(ctx context.Context, id contract.VolumeID) ([]volume.Snapshot, error) {
	s.mu.Lock()
	x := s.all[id]
	s.mu.Unlock()
	if x == nil {
		return nil, errors.New("the volume is not open")
	}
	x.mu.Lock()
	p := x.place
	x.mu.Unlock()
	if p == nil {
		return nil, errors.New("the store of its snapshots is not open")
	}
	return volume.Snapshots(ctx, x.spec(), p, volume.Snapshot{})
}

// saved is the moment of the newest snapshots of volumes, of the oldest of these, in Unix milliseconds; 0 where one has none.
// why says what keeps them from being newer.
func (s *savers) saved(vols []WorkVolume) (at int64, why string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	first := true
	for i := range vols {
		if vols[i].Store == [32]byte{} {
			continue
		}
		x := s.all[vols[i].ID]
		if x == nil {
			return 0, "its volume is not open"
		}
		x.mu.Lock()
		t := int64(0)
		if !x.pace.Cut.IsZero() {
			t = x.pace.Cut.UnixMilli()
		}
		if first || t < at {
			at, why, first = t, x.why, false
		}
		x.mu.Unlock()
	}
	return at, why
}

// say keeps what is reported, and has it reported.
func (s *saver) say(f func()) {
	s.mu.Lock()
	f()
	s.mu.Unlock()
	s.agent.wakeAll()
}

// waitReady returns when the volume's disk is there, or when ctx ends.
func (s *saver) waitReady(ctx context.Context) error {
	select {
	case <-s.ready:
		return nil
	case <-s.done:
		return &failure{notRestored, errors.New(s.reason())}
	case <-ctx.Done():
		return &failure{notRestored, fmt.Errorf("%s: %w", s.reason(), ctx.Err())}
	}
}

const notRestored = "its volume is not restored from its snapshots yet"

func (s *saver) reason() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.why
}

func (s *saver) spec() volume.Spec {
	return volume.Spec{ID: volumeName(s.volume.ID), Size: s.volume.Size, Key: s.volume.Key}
}

func (s *saver) floor() volume.Snapshot { return s.told }

// run tries until ctx ends, another has the volume, or the last snapshot is taken.
func (s *saver) run(ctx context.Context) {
	said := ""
	for wait := time.Second; ; wait = min(2*wait, 10*time.Second) {
		began := time.Now()
		err := s.work(ctx)
		if err == nil || ctx.Err() != nil {
			return
		}
		if text := err.Error(); text != said {
			said = text
			s.log.Warn("the volume is not saved", "error", err)
		}
		s.say(func() { s.why = words(err) })
		if errors.Is(err, volume.ErrFenced) {
			return
		}
		if time.Since(began) > time.Minute {
			wait = time.Second
		}
		select {
		case <-ctx.Done():
			return
		case <-s.last: // one more try, and that is it
			if err := s.work(ctx); err != nil {
				s.log.Warn("the last snapshot of a volume was not taken", "error", err)
			}
			return
		case <-time.After(wait):
		}
	}
}

// words say why a volume is not saved, in fixed ones: they are reported.
func words(err error) string {
	var few *fewFarms
	switch {
	case errors.As(err, &few):
		return few.Error()
	case errors.Is(err, volume.ErrFenced), errors.Is(err, store.ErrOld):
		return "another node has the volume"
	case errors.Is(err, location.ErrQuota), errors.Is(err, location.ErrFull):
		return "the locations have no room for another snapshot"
	case errors.Is(err, volume.ErrRolledBack):
		return "the locations have older snapshots than the ledger knows of"
	case errors.Is(err, volume.ErrSnapshot):
		return "a snapshot is damaged"
	case errors.Is(err, store.ErrBusy), errors.Is(err, errUnsettled):
		return "too few locations answer"
	}
	return "the last try failed"
}

// work opens the store, makes the disk from it if that is asked, and saves. It returns nil after the last snapshot.
func (s *saver) work(ctx context.Context) (err error) {
	ctx, cancel := context.WithCancel(ctx)
	o, err := s.open(ctx)
	if err != nil {
		cancel()
		return err
	}
	var running sync.WaitGroup
	running.Go(func() { o.store.Run(ctx) })
	defer func() {
		cancel()
		running.Wait()
		err = errors.Join(err, o.close())
	}()
	p := &shelf{store: o.store}
	s.show(p)
	defer s.show(nil)
	select {
	case <-s.ready:
	default:
		if err := s.restore(ctx, p); err != nil {
			return err
		}
		close(s.ready)
		s.agent.wakeAll()
	}
	failed := 0
	for {
		last := s.wait(ctx, failed)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		o.follow(ctx)
		switch err := s.save(ctx, p, last); {
		case err == nil && last:
			return nil
		case err == nil:
			failed = 0
		case last, p.unsettled.Load(), errors.Is(err, volume.ErrFenced), errors.Is(err, store.ErrOld), errors.Is(err, store.ErrBusy):
			return err
		default:
			failed++
			s.full = s.full || errors.Is(err, location.ErrQuota) || errors.Is(err, location.ErrFull)
			s.log.Warn("a snapshot was not taken", "error", err)
			s.say(func() { s.why = words(err) })
		}
		if err := s.collect(ctx, p); err != nil {
			s.log.Warn("snapshots are not collected", "error", err)
		}
	}
}

func (s *saver) show(p *shelf) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.place = p
}

// wait returns when a snapshot is due; last is true when it is the last one. After failures it is due later.
func (s *saver) wait(ctx context.Context, failed int) (last bool) {
	s.mu.Lock()
	next := s.pace.Interval() - time.Since(s.pace.Cut)
	s.mu.Unlock()
	if failed > 0 {
		next = max(next, min(time.Duration(failed)*5*time.Second, time.Minute))
	}
	select {
	case <-ctx.Done():
	case <-s.last:
		return true
	case <-time.After(max(next, 0)):
	}
	return false
}

func (s *saver) save(ctx context.Context, p volume.Place, last bool) error {
	begin := time.Now()
	// What was written and never synced is on the disk by now too: a workload that syncs nothing loses no more than one that does.
	w := volume.Writer{Epoch: s.epoch, Keep: retention, Floor: s.floor(), Flush: true}
	if s.full {
		w.Keep = least
	}
	t, err := s.agent.volumes.Snapshot(ctx, s.spec(), p, w)
	if err != nil {
		return err
	}
	s.full = false
	s.say(func() { s.pace, s.why = volume.Pace{Cut: begin, Took: t.Took}, "" })
	s.log.Debug("snapshot", "sequence", t.Sequence, "extents", t.Extents, "put", t.Put, "took", t.Took)
	if t.Sequence == s.told.Sequence || s.told.Sequence > 0 && !last && time.Since(s.toldAt) < tellEvery {
		return nil
	}
	// Without the ledger's knowing the volume does not move.
	actx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if err := s.agent.act(actx, ledger.KindVolumeSaved, &ledger.VolumeSaved{Volume: s.volume.ID, Sequence: t.Sequence, Snapshot: t.Digest}); err != nil {
		s.log.Warn("the ledger did not hear of a snapshot", "error", err)
		return nil // with the next one
	}
	s.told, s.toldAt = t.Snapshot, time.Now()
	return nil
}

func (s *saver) collect(ctx context.Context, p volume.Place) error {
	if time.Since(s.collected) < time.Minute {
		return nil
	}
	s.collected = time.Now()
	c, err := s.agent.volumes.Collect(ctx, s.spec(), p, volume.Writer{Epoch: s.epoch, Floor: s.floor()})
	if err == nil && c.Removed > 0 {
		s.log.Debug("collected", "snapshots", c.Snapshots, "removed", c.Removed)
	}
	return err
}

// restore makes the disk from the newest snapshot. An image that is here is of an earlier epoch, or was never used.
func (s *saver) restore(ctx context.Context, p volume.Place) error {
	begin := time.Now()
	name := volumeName(s.volume.ID)
	if err := s.agent.volumes.Destroy(ctx, name); err != nil {
		return err
	}
	if err := s.agent.noteVolume(s.volume.ID); err != nil {
		return err
	}
	snap, err := s.agent.volumes.Restore(ctx, s.spec(), p, volume.From{Epoch: s.epoch, Digest: s.volume.From, Floor: s.floor()})
	if err != nil {
		return err
	}
	s.log.Info("the volume was restored", "snapshot", snap.Sequence, "of", snap.Time, "took", time.Since(begin))
	return nil
}

// opened is a store with the locations that it uses.
type openStore struct {
	store   *store.Store
	saver   *saver
	members []store.Member
}

func (o *openStore) close() (err error) {
	if o.store != nil {
		err = o.store.Close()
	}
	for _, m := range o.members {
		err = errors.Join(err, m.Location.(io.Closer).Close())
	}
	return errors.Join(err, os.RemoveAll(o.saver.dir()))
}

func (s *saver) dir() string {
	return filepath.Join(s.agent.cfg.Run, "savers", volumeName(s.volume.ID))
}

// fewFarms is why a new store is not begun.
type fewFarms struct{ have int }

func (f *fewFarms) Error() string {
	return fmt.Sprintf("%d farms have a location that is up, snapshots need %d", f.have, contract.StoreN)
}

// open takes the store over. One that the ledger knows no snapshot of may have to be begun.
func (s *saver) open(ctx context.Context) (*openStore, error) {
	places := s.agent.places()
	o, err := s.openOver(ctx, places, true)
	if !errors.Is(err, store.ErrNoStore) || s.told.Sequence > 0 {
		return o, err
	}
	up := slices.DeleteFunc(slices.Clone(places), func(p Place) bool { return !p.Up })
	if n := len(farms(up)); n < contract.StoreN {
		return nil, &fewFarms{n}
	}
	return s.openOver(ctx, up, false)
}

func (s *saver) openOver(ctx context.Context, places []Place, restore bool) (*openStore, error) {
	keys, err := store.Root(s.volume.Store).Keys(0)
	if err != nil {
		return nil, err
	}
	o := &openStore{saver: s}
	if err = errors.Join(os.RemoveAll(s.dir()), os.MkdirAll(s.dir(), 0o700)); err == nil {
		err = o.add(places, func(m store.Member) error { o.members = append(o.members, m); return nil })
	}
	if err == nil {
		o.store, err = store.Open(ctx, store.Config{
			Dir: s.dir(), Keys: keys, Members: o.members, Scheme: ContractScheme(), Restore: restore, Memory: saverMemory, Log: s.log,
		})
	}
	if err != nil {
		return nil, errors.Join(err, o.close())
	}
	return o, nil
}

// add makes members of those places that are none yet.
func (o *openStore) add(places []Place, use func(store.Member) error) error {
	keys, err := store.Root(o.saver.volume.Store).Keys(0)
	if err != nil {
		return err
	}
	cert, err := location.Certificate(keys.TLS())
	if err != nil {
		return err
	}
	for _, p := range places {
		if slices.ContainsFunc(o.members, func(m store.Member) bool { return m.ID == p.ID }) {
			continue
		}
		m, err := p.Member(cert, nil)
		if err != nil {
			return err
		}
		if err := use(m); err != nil {
			m.Location.(io.Closer).Close()
			return fmt.Errorf("location %s: %w", p.Node, err)
		}
	}
	return nil
}

// follow adds locations that have come.
func (o *openStore) follow(ctx context.Context) {
	up := slices.DeleteFunc(o.saver.agent.places(), func(p Place) bool { return !p.Up })
	err := o.add(up, func(m store.Member) error {
		if err := o.store.Add(ctx, m); err != nil && !errors.Is(err, store.ErrMemberThere) {
			return err
		}
		o.members = append(o.members, m)
		return nil
	})
	if err != nil {
		o.saver.log.Debug("a location is not added yet", "error", err)
	}
}

// places are the grid's locations, as the view has them.
func (a *Agent) places() []Place {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.current == nil {
		return nil
	}
	return Places(a.current.Grid, a.current.Nodes)
}
