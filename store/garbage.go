package store

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"sync"
	"time"

	"holdfast/disperse"
)

// Collect removes what was dropped, for long enough that nobody reads it. Where a location is silent its shards are left to
// the sweep.
func (s *Store) Collect(ctx context.Context) error {
	ctx, end, err := s.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	before := s.running.oldest().Add(-s.cfg.Upkeep.defaults().Grace)
	for from := ownKey(tableGarbage); from != nil; {
		type piece struct {
			id    disperse.ID
			value []byte
		}
		var page []piece
		err := s.view(ctx, func(v *view) error {
			c := v.scan(from, ownKey(tableGarbage+1), 2)
			from = nil
			for c.Next() {
				if len(page) == 256 {
					from = append(ownKey(tableGarbage), c.Key()...)
					break
				}
				b := c.Value()
				if len(c.Key()) != 16 || len(b) < 9 {
					return fmt.Errorf("garbage: %w", errRow)
				}
				if time.UnixMilli(int64(binary.BigEndian.Uint64(b))).Before(before) {
					page = append(page, piece{disperse.ID(c.Key()), bytes.Clone(b[8:])})
				}
			}
			return c.Close()
		})
		if err != nil {
			return err
		}
		if len(page) == 0 {
			continue
		}
		var wg sync.WaitGroup
		turns := make(chan struct{}, 8)
		for _, p := range page {
			if p.value[0] != inSegment {
				continue
			}
			r, err := parseRecord(p.value[1:])
			if err != nil {
				return fmt.Errorf("garbage %v: %w", p.id, err)
			}
			turns <- struct{}{}
			wg.Go(func() {
				s.removeAll(ctx, &r)
				<-turns
			})
		}
		wg.Wait()
		if err := ctx.Err(); err != nil {
			return err
		}
		err = s.update(ctx, func(t *tx) error {
			for _, p := range page {
				key := idKey(tableGarbage, p.id)
				_, ok, err := t.get(key)
				if err != nil {
					return err
				}
				if !ok {
					continue
				}
				if at, ok := parseSpot(p.value); ok {
					t.release(at)
				} else if _, ok, err := t.get(idKey(tableHad, p.id)); err != nil {
					return err
				} else if ok {
					t.delete(idKey(tableHad, p.id))
				}
				t.delete(key)
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("note what was removed: %w", err)
		}
	}
	return nil
}
