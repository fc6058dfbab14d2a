package location

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"
)

const (
	sweepEvery = time.Minute
	scrubEvery = time.Hour // the least time between the beginnings of two scrubs
)

// Run sweeps and scrubs until ctx ends.
func (d *Dir) Run(ctx context.Context) error {
	done := make(chan struct{})
	go func() {
		defer close(done)
		for d.cfg.Scrub > 0 {
			next := time.After(scrubEvery)
			if _, err := d.Scrub(ctx, d.cfg.Scrub); err != nil && ctx.Err() == nil {
				d.log.Error("scrub", "dir", d.cfg.Path, "error", err)
			}
			select {
			case <-next:
			case <-ctx.Done():
				return
			}
		}
	}()
	t := time.NewTicker(sweepEvery)
	defer t.Stop()
	for {
		if err := d.Sweep(ctx); err != nil && ctx.Err() == nil {
			d.log.Error("sweep", "dir", d.cfg.Path, "error", err)
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			<-done
			return nil
		}
	}
}

// removal removes what was deleted at least hold ago and is not locked.
func (d *Dir) removal(n Name, hold time.Duration) *change {
	return &change{name: n, decide: func() (*record, error) {
		e, ok := d.find(n)
		now := d.now()
		switch {
		case !ok || e.deleted == 0:
			return nil, ErrAbsent
		case e.retain > now:
			return nil, fmt.Errorf("until %v: %w", milli(e.retain), ErrLocked)
		case hold > 0 && now-e.deleted < hold.Milliseconds():
			return nil, nil
		}
		return &record{kind: kindGone, name: n}, nil
	}}
}

// Sweep removes shards whose hold is over, notes that time passes, and rewrites segments that are mostly dead.
func (d *Dir) Sweep(ctx context.Context) error {
	d.sweeping.Lock()
	defer d.sweeping.Unlock()
	d.mu.Lock()
	now := d.now()
	var over []*change
	for n := range d.held {
		if e, _ := d.find(n); now-e.deleted >= d.cfg.Hold.Milliseconds() && e.retain <= now {
			over = append(over, d.removal(n, d.cfg.Hold))
		}
	}
	idle := now-d.written >= sweepEvery.Milliseconds()
	d.mu.Unlock()
	var errs []error
	for part := range slices.Chunk(over, 1024) {
		// One that came back meanwhile is none of ours.
		if err := d.commit(part...); err != nil && !errors.Is(err, ErrAbsent) {
			errs = append(errs, fmt.Errorf("remove shards: %w", err))
		}
	}
	if idle && len(over) == 0 {
		errs = append(errs, d.commit(&change{decide: func() (*record, error) { return &record{kind: kindTime}, nil }}))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return d.compact(ctx)
}

// compact rewrites what lives in segments that are half dead, the oldest first, and removes them.
func (d *Dir) compact(ctx context.Context) error {
	d.mu.RLock()
	var ids []uint32
	oldest := d.current.id
	for id, s := range d.segments {
		oldest = min(oldest, id)
		if s != d.current && s.dead+s.soft > s.size/2 {
			ids = append(ids, id)
		}
	}
	d.mu.RUnlock()
	slices.Sort(ids)
	for _, id := range ids {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := d.rewrite(id, id == oldest); err != nil {
			return fmt.Errorf("compact segment %08x: %w", id, err)
		}
		if id == oldest {
			d.mu.RLock()
			oldest = d.current.id
			for id := range d.segments {
				oldest = min(oldest, id)
			}
			d.mu.RUnlock()
		}
	}
	return nil
}

func (d *Dir) rewrite(id uint32, oldest bool) error {
	d.mu.RLock()
	s := d.segments[id]
	d.mu.RUnlock()
	var changes []*change
	waiting := 0
	flush := func() error {
		err := d.commit(changes...)
		changes, waiting = nil, 0
		return err
	}
	_, _, err := s.each(func(r record, off int64) error {
		c := &change{name: r.name, fills: r.kind == kindShard}
		pos := at(id, off)
		c.decide = func() (*record, error) {
			_, bad := d.rotten[r.name]
			c.bad = bad && r.kind == kindShard
			return d.kept(r, pos, oldest), nil
		}
		d.mu.RLock()
		keep := d.kept(r, pos, oldest) != nil
		d.mu.RUnlock()
		if !keep {
			return nil
		}
		if r.body() > 0 {
			c.body = make([]byte, r.body())
			if err := s.read(off, c.body, r.crc); errors.Is(err, ErrRotten) {
				// It moves as it is, and stays rotten.
				d.mu.Lock()
				if e, ok := d.find(r.name); ok && e.pos == pos {
					d.rotten[r.name] = struct{}{}
				}
				d.mu.Unlock()
			} else if err != nil {
				return err
			}
		}
		changes = append(changes, c)
		if waiting += int(r.length()); waiting >= maxBatch {
			return flush()
		}
		return nil
	})
	if err == nil {
		err = flush()
	}
	if err != nil {
		return err
	}
	d.mu.Lock()
	delete(d.segments, id)
	d.mu.Unlock()
	s.mu.Lock()
	s.gone = true
	err = s.f.Close()
	s.mu.Unlock()
	// Synced before a later segment goes: a tombstone must not go before what it buries.
	return errors.Join(err, os.Remove(segmentPath(d.cfg.Path, id)), syncDir(filepath.Join(d.cfg.Path, "log")))
}

// kept is the record that a compaction writes instead of the one at pos; nil if nobody needs it. Call it with mu held.
func (d *Dir) kept(r record, pos position, oldest bool) *record {
	e, ok := d.find(r.name)
	switch r.kind {
	case kindShard, kindFile:
		if !ok || e.pos != pos {
			return nil
		}
		return &record{kind: r.kind, name: r.name, size: e.size, file: e.file, put: e.put, retain: e.retain, deleted: e.deleted}
	case kindState:
		// A shard's own record carries the state: only what is younger than that says anything.
		if !ok || e.pos > pos {
			return nil
		}
		return &record{kind: kindState, name: r.name, retain: e.retain, deleted: e.deleted}
	case kindGone:
		if ok || oldest {
			return nil
		}
		return &record{kind: kindGone, name: r.name}
	case kindHead, kindEarlier:
		if r.kind == kindHead && pos == d.headPos {
			return &record{kind: kindHead}
		}
		for _, h := range d.earlier {
			if h.pos == pos {
				return &record{kind: kindEarlier, deleted: h.at}
			}
		}
		return nil
	case kindEpoch:
		if pos != d.epochPos {
			return nil
		}
		return &record{kind: kindEpoch, epoch: d.epoch}
	}
	return nil
}

// Scrubbed is what a scrub saw.
type Scrubbed struct {
	Shards, Bytes, Rotten int64
}

// Scrub checks every shard against its name, at most so many bytes a second. Those that are rotten are listed and not
// served any more.
func (d *Dir) Scrub(ctx context.Context, rate int64) (out Scrubbed, err error) {
	begin := time.Now()
	pace := func(n int) error {
		out.Bytes += int64(n)
		ahead := time.Duration(float64(out.Bytes)/float64(rate)*float64(time.Second)) - time.Since(begin)
		if ahead < 10*time.Millisecond {
			return ctx.Err()
		}
		t := time.NewTimer(ahead)
		defer t.Stop()
		select {
		case <-t.C:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	for b := range d.index {
		d.mu.RLock()
		names := make([]Name, 0, len(d.index[b]))
		for n := range d.index[b] {
			names = append(names, n)
		}
		d.mu.RUnlock()
		for _, n := range names {
			var f shard
			err := f.open(d, n, true, true)
			if err == nil {
				t, err2 := d.hash(&f, pace)
				if err = err2; err == nil {
					d.trees.Put(t)
				}
				f.close()
			}
			switch {
			case errors.Is(err, ErrRotten):
				out.Rotten++
			case errors.Is(err, ErrAbsent):
				continue
			case err != nil:
				return out, named("scrub", n, err)
			}
			out.Shards++
			if err := ctx.Err(); err != nil {
				return out, err
			}
		}
	}
	d.mu.Lock()
	d.scrubbed = d.cfg.Now()
	d.mu.Unlock()
	return out, nil
}
