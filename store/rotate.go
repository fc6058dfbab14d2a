package store

import (
	"bytes"
	"context"
	"crypto/hmac"
	"errors"
	"fmt"
	"time"

	"holdfast/disperse"
)

// Follow says whether keys are those of the same store at the same epoch or a later one, with all that the earlier ones open.
func (k *Keys) Follow(earlier *Keys) error {
	switch {
	case !hmac.Equal(k.identity(), earlier.identity()) || k.shards != earlier.shards || k.tls != earlier.tls:
		return ErrKeys
	case k.Epoch < earlier.Epoch:
		return fmt.Errorf("they are of epoch %d, the store has those of %d: %w", k.Epoch, earlier.Epoch, ErrKeys)
	}
	for e, key := range earlier.stores {
		if k.stores[e] != key {
			return fmt.Errorf("they lack that of epoch %d: %w", e, ErrKeys)
		}
	}
	return nil
}

// Rotate has new segments be sealed under the key of a later epoch. The caller has made the keys durable: what comes next
// cannot be read without them. Rewrap then takes what is there over.
func (s *Store) Rotate(keys *Keys) error {
	for {
		now := s.ring.Load()
		if err := keys.Follow(now); err != nil {
			return fmt.Errorf("rotate keys: %w", err)
		}
		if s.ring.CompareAndSwap(now, keys) {
			return nil
		}
	}
}

// Rewrap seals the keys of all segments under the store key of the newest epoch that is here, without touching what they
// seal. It returns how many it changed and how many could not be, since too few locations answer: it may be repeated. seen,
// if it is not nil, hears how far it is.
func (s *Store) Rewrap(ctx context.Context, seen func(changed, left int)) (changed, left int, err error) {
	ctx, end, err := s.begin(ctx)
	if err != nil {
		return 0, 0, err
	}
	defer end()
	for from := ownKey(tableBlock); from != nil; {
		type entry struct {
			key, was []byte
			made     []byte
		}
		var page []entry
		err := s.view(ctx, func(v *view) error {
			c := v.scan(from, ownKey(tableSegment+1), 0)
			from = nil
			for c.Next() {
				k := c.Key()
				if k[1] != tableBlock && k[1] != tableSegment || k[1] == tableSegment && c.Value()[0] != inSegment {
					if k[1] > tableBlock && k[1] < tableSegment {
						from = ownKey(tableSegment)
						break
					}
					continue
				}
				if len(page) == 128 {
					from = bytes.Clone(k)
					break
				}
				page = append(page, entry{key: bytes.Clone(k), was: bytes.Clone(c.Value())})
			}
			return c.Close()
		})
		if err != nil {
			return changed, left, fmt.Errorf("rewrap: %w", err)
		}
		n := 0
		for i := range page {
			e := &page[i]
			b, block := e.was, e.key[1] == tableBlock
			if !block {
				b = b[1:]
			}
			r, err := parseRecord(b)
			if err != nil {
				return changed, left, fmt.Errorf("rewrap: %w", err)
			}
			if r.Secret || r.Key >= s.keys().Epoch {
				continue
			}
			if err := s.rewrapOne(ctx, &r); err != nil {
				s.log.Warn("rewrap", "segment", r.ID, "error", err)
				left++
				continue
			}
			if e.made = appendRecord(nil, &r); !block {
				e.made = appendRecord([]byte{inSegment}, &r)
			}
			n++
		}
		if n == 0 {
			continue
		}
		err = s.update(ctx, func(t *tx) error {
			for _, e := range page {
				now, ok, err := t.get(e.key)
				if err != nil {
					return err
				}
				if e.made != nil && ok && bytes.Equal(now, e.was) {
					t.set(e.key, e.made)
				}
			}
			return nil
		})
		if err != nil {
			return changed, left, fmt.Errorf("rewrap: %w", err)
		}
		changed += n
		if seen != nil {
			seen(changed, left)
		}
	}
	if changed > 0 { // heads and the log name the old wraps
		if err := s.Snapshot(ctx); err != nil {
			return changed, left, fmt.Errorf("rewrap: %w", err)
		}
	}
	return changed, left, nil
}

// rewrapOne reads k shares, which are 32 bytes of each shard.
func (s *Store) rewrapOne(ctx context.Context, r *record) error {
	coder, err := s.coder(r.Scheme)
	if err != nil {
		return err
	}
	keys := s.keys()
	old, err := keys.store(r.Key)
	if err != nil {
		return err
	}
	key, err := keys.store(keys.Epoch)
	if err != nil {
		return err
	}
	shares, have := make([][]byte, r.Scheme.N), 0
	var why error
	for _, i := range s.order(r) {
		if have == r.Scheme.K {
			break
		}
		m := s.memberAt(r.Members[i])
		if m.Location == nil {
			continue
		}
		b := make([]byte, disperse.ShareSize)
		begin := time.Now()
		if err := m.Location.Get(ctx, r.Names[i], int64(coder.ShareOffset(int(r.Size))), b); err != nil {
			m.answered(err, time.Since(begin))
			why = err
			continue
		}
		shares[i] = b
		have++
	}
	if have < r.Scheme.K {
		return fmt.Errorf("%d of %d shares: %w", have, r.Scheme.K, why)
	}
	w, err := coder.Rewrap(r.ID, old, key, r.Wrap, shares)
	if errors.Is(err, disperse.ErrAuth) {
		// A share alone does not say whether it is right. A whole shard does, by its name.
		if shares, err = s.shares(ctx, coder, r); err == nil {
			w, err = coder.Rewrap(r.ID, old, key, r.Wrap, shares)
		}
	}
	if err != nil {
		return err
	}
	r.Wrap, r.Key = w, keys.Epoch
	return nil
}

// shares are k of a segment's shares, from shards that have their names.
func (s *Store) shares(ctx context.Context, coder *disperse.Coder, r *record) ([][]byte, error) {
	shares, have := make([][]byte, r.Scheme.N), 0
	b := s.buffers.get(shardSize(coder, r))
	defer s.buffers.put(b)
	for _, i := range s.order(r) {
		m := s.memberAt(r.Members[i])
		if have == r.Scheme.K {
			break
		}
		if m.Location == nil || m.Location.Get(ctx, r.Names[i], 0, b) != nil {
			continue
		}
		if n, err := disperse.NameOf(b); err != nil || n != r.Names[i] {
			m.lied(r.Names[i])
			s.notice(r.ID, true)
			continue
		}
		shares[i] = bytes.Clone(b[coder.ShareOffset(int(r.Size)):][:disperse.ShareSize])
		have++
	}
	if have < r.Scheme.K {
		return nil, fmt.Errorf("%d of %d shards: %w", have, r.Scheme.K, ErrBusy)
	}
	return shares, nil
}
