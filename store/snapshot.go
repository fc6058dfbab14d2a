package store

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/cockroachdb/pebble/v2"

	"holdfast/disperse"
)

const (
	snapshotMagic = "HFS\x01"
	snapshotPiece = 4 << 20
	// A restore reads the snapshot and what follows. Taking one when the log has half its size costs a constant factor.
	snapshotShare  = 2
	snapshotBlocks = 20000
	trimPage       = 256
)

// runSnapshots takes a snapshot when the log since the last has grown, and then lets go of the blocks that it covers.
func (s *Store) runSnapshots(ctx context.Context) {
	pause := time.NewTicker(time.Minute)
	defer pause.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-pause.C:
			if err := s.trim(ctx); err != nil && ctx.Err() == nil {
				s.log.Warn("let go of blocks", "error", err)
			}
			continue
		case <-s.want:
		}
		if err := s.Snapshot(ctx); err != nil && ctx.Err() == nil {
			s.log.Warn("take a snapshot", "error", err)
			select {
			case <-ctx.Done():
			case <-time.After(10 * time.Second):
				s.wantSnapshot()
			}
		}
	}
}

// wantSnapshot asks for a snapshot. Whoever moves shards of a block does too: the blocks behind it know it as it was.
func (s *Store) wantSnapshot() {
	select {
	case s.want <- struct{}{}:
	default:
	}
}

// Snapshot writes the metadata as it is now to the locations, so that a restore need not read the log before it.
func (s *Store) Snapshot(ctx context.Context) error {
	s.snapping.Lock()
	defer s.snapping.Unlock()
	if s.old.Load() {
		return ErrOld
	}
	ctx, end, err := s.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	logged, blocks := s.logged.Load(), s.blocks.Load()
	snap := s.db.NewSnapshot()
	defer snap.Close()
	last, err := readApplied(snap)
	if err != nil || last == nil {
		return err
	}
	size, records, err := s.writeSnapshot(ctx, snap, last)
	if err != nil {
		return fmt.Errorf("snapshot of block %d: %w", last.sequence, err)
	}
	list := &records[len(records)-1]
	// From here on every head names the new snapshot. So when the block is durable that lets go of the old one, no newest
	// head names that any more.
	old := s.snapshot.Swap(&snapshotRef{last.sequence, *list})
	err = s.update(ctx, func(t *tx) error {
		row := snapshotRow{sequence: last.sequence, size: size, segments: []disperse.ID{list.id()}}
		for i := range records {
			r := &records[i]
			t.set(idKey(tableSegment, r.id()), appendRecord([]byte{inSegment}, r))
			t.s.kept(t, r.id(), r)
			if r != list {
				row.segments = append(row.segments, r.id())
			}
		}
		was, ok, err := t.get(ownKey(tableSnapshot))
		if err != nil {
			return err
		}
		if ok {
			w, err := parseSnapshotRow(was)
			if err != nil {
				return err
			}
			now := time.Now()
			for _, id := range w.segments {
				t.drop(id, now)
			}
		}
		t.set(ownKey(tableSnapshot), row.append(nil))
		return nil
	})
	if err != nil && !errors.Is(err, ErrBusy) {
		s.snapshot.Store(old)
	}
	if err != nil {
		return fmt.Errorf("snapshot of block %d: %w", last.sequence, err)
	}
	s.logged.Add(-logged)
	s.blocks.Add(-blocks)
	s.snapshotSize.Store(size)
	s.log.Info("snapshot", "block", last.sequence, "bytes", size, "segments", len(records))
	if err := s.trim(ctx); err != nil {
		return err
	}
	return s.compact(ctx)
}

// writeSnapshot puts all rows into segments, and behind them one that lists them.
func (s *Store) writeSnapshot(ctx context.Context, snap *pebble.Snapshot, last *ref) (size int64, records []record, err error) {
	coder, err := s.coder(s.scheme)
	if err != nil {
		return 0, nil, err
	}
	defer func() {
		if err != nil {
			s.abandon(records)
		}
	}()
	put := func(b []byte) error {
		r, _, err := s.put(ctx, coder, disperse.NewID(), b, nil)
		if err == nil {
			records = append(records, r)
			size += int64(len(b))
		}
		return err
	}
	it, err := snap.NewIter(nil)
	if err != nil {
		return 0, nil, err
	}
	defer it.Close()
	var b []byte
	for ok := it.First(); ok; ok = it.Next() {
		k, v := it.Key(), it.Value()
		if k[0] == own && (k[1] == tableApplied || k[1] == tableIdentity) {
			continue
		}
		if len(b) > 0 && len(b)+len(k)+len(v)+16 > snapshotPiece {
			if err := put(b); err != nil {
				return 0, records, err
			}
			b = b[:0]
		}
		b = appendOp(b, opSet, k, v)
	}
	if err := it.Error(); err != nil {
		return 0, records, err
	}
	if len(b) > 0 {
		if err := put(b); err != nil {
			return 0, records, err
		}
	}
	list := append([]byte(nil), snapshotMagic...)
	part := func(p []byte) { list = append(binary.BigEndian.AppendUint32(list, uint32(len(p))), p...) }
	part(last.append(nil))
	for i := range records {
		part(appendRecord(nil, &records[i]))
	}
	return size, records, put(list)
}

// parseList reads what a snapshot's last segment says.
func parseList(b []byte) (last *ref, records []record, err error) {
	bad := errors.New("not the list of a snapshot")
	if len(b) < len(snapshotMagic) || string(b[:len(snapshotMagic)]) != snapshotMagic {
		return nil, nil, bad
	}
	for b = b[len(snapshotMagic):]; len(b) > 0; {
		if len(b) < 4 || uint64(binary.BigEndian.Uint32(b)) > uint64(len(b)-4) {
			return nil, nil, bad
		}
		p := b[4:][:binary.BigEndian.Uint32(b)]
		b = b[4+len(p):]
		if last == nil {
			if last, err = parseRef(p); err != nil {
				return nil, nil, err
			}
			continue
		}
		r, err := parseRecord(p)
		if err != nil {
			return nil, nil, err
		}
		records = append(records, r)
	}
	if last == nil {
		return nil, nil, bad
	}
	return last, records, nil
}

// loadSnapshot fills an empty database. The row that says what it is comes last: one without it is not whole.
func (s *Store) loadSnapshot(ctx context.Context, r *snapshotRef) (*ref, error) {
	list, err := s.get(ctx, nil, &r.record)
	if err != nil {
		return nil, err
	}
	last, records, err := parseList(list)
	if err != nil {
		return nil, err
	}
	if last.sequence != r.sequence {
		return nil, fmt.Errorf("it is of block %d", last.sequence)
	}
	var plain []byte
	for i := range records {
		if s.cfg.Replaying != nil {
			s.cfg.Replaying("piece of the snapshot", i+1, len(records))
		}
		if plain, err = s.get(ctx, plain[:0], &records[i]); err != nil {
			return nil, err
		}
		b := s.db.NewBatchWithSize(len(plain) + len(plain)/8)
		err := applyOps(b, plain)
		if err == nil {
			err = b.Commit(pebble.NoSync)
		}
		if err := errors.Join(err, b.Close()); err != nil {
			return nil, err
		}
	}
	return last, s.db.Set(ownKey(tableApplied), last.append(nil), pebble.NoSync)
}

func readApplied(r pebble.Reader) (*ref, error) {
	v := view{r: r}
	b, ok, err := v.get(ownKey(tableApplied))
	if err != nil || !ok {
		return nil, err
	}
	return parseRef(b)
}

// blocksUpTo calls f for blocks that a snapshot covers, in order, from one on, at most trimPage of those for which f says so.
func (s *Store) covered(ctx context.Context, from uint64, f func(seq uint64, l live) bool) (next uint64, err error) {
	snap := s.snapshot.Load()
	if snap == nil {
		return 0, nil
	}
	err = s.view(ctx, func(v *view) error {
		c := v.scan(sequenceKey(tableBlock, from), sequenceKey(tableBlock, snap.sequence+1), 2)
		for n := 0; c.Next(); {
			seq := binary.BigEndian.Uint64(c.Key())
			if n == trimPage {
				next = seq
				return nil
			}
			b, _, err := v.get(sequenceKey(tableLive, seq))
			if err != nil {
				return err
			}
			l, _ := parseLive(b)
			if f(seq, l) {
				n++
			}
		}
		return c.Close()
	})
	return next, err
}

// trim lets go of blocks that a snapshot covers and in which no body is referred to.
func (s *Store) trim(ctx context.Context) error {
	for from := uint64(0); ; {
		var dead []uint64
		next, err := s.covered(ctx, from, func(seq uint64, l live) bool {
			if l.bodies == 0 {
				dead = append(dead, seq)
			}
			return l.bodies == 0
		})
		if err != nil {
			return err
		}
		if len(dead) > 0 {
			err = s.update(ctx, func(t *tx) error {
				now := time.Now()
				for _, seq := range dead {
					row, ok, err := t.get(sequenceKey(tableBlock, seq))
					if err != nil {
						return err
					}
					if !ok {
						continue
					}
					r, err := parseRecord(row)
					if err != nil {
						return err
					}
					t.delete(sequenceKey(tableBlock, seq))
					t.delete(sequenceKey(tableLive, seq))
					t.garbage(r.id(), append([]byte{inSegment}, row...), now)
				}
				return nil
			})
		}
		if err != nil {
			return fmt.Errorf("let go of %d blocks: %w", len(dead), err)
		}
		if from = next; from == 0 {
			return nil
		}
	}
}

// compact moves the bodies that are left in blocks that are mostly dead into new ones.
func (s *Store) compact(ctx context.Context) error {
	for from := uint64(0); ; {
		var mostly []uint64
		next, err := s.covered(ctx, from, func(seq uint64, l live) bool {
			if l.bodies > 0 && l.bytes*4 < l.total {
				mostly = append(mostly, seq)
				return true
			}
			return false
		})
		for _, seq := range mostly {
			if err == nil {
				err = s.moveBodies(ctx, seq)
			}
		}
		if err != nil {
			return fmt.Errorf("compact blocks: %w", err)
		}
		if from = next; from == 0 {
			return nil
		}
	}
}

// moveBodies writes the bodies of a block again. Reads that know the old places find them until the collector comes by.
func (s *Store) moveBodies(ctx context.Context, seq uint64) error {
	b, err := s.readBlock(ctx, seq)
	if err != nil {
		return err
	}
	type body struct {
		id disperse.ID
		at spot
	}
	var bodies []body
	err = eachOp(b.ops, func(kind byte, key, value []byte) error {
		if at, ok := parseSpot(value); ok && kind == opSet && len(key) == 18 && key[0] == own && key[1] == tableSegment && at.sequence == seq {
			bodies = append(bodies, body{disperse.ID(key[2:]), at})
		}
		return nil
	})
	if err != nil {
		return err
	}
	return s.update(ctx, func(t *tx) error {
		now := time.Now()
		for _, x := range bodies {
			v, ok, err := t.get(idKey(tableSegment, x.id))
			if err != nil {
				return err
			}
			if at, block := parseSpot(v); !ok || !block || at != x.at {
				continue
			}
			p, err := b.body(x.at)
			if err != nil {
				return err
			}
			t.garbage(disperse.NewID(), v, now)
			t.embed(x.id, p)
		}
		return nil
	})
}
