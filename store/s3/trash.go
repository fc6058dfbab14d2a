package s3

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"holdfast/store"
)

// What was deleted or replaced is kept as a row of its own for a while, bodies and all, and is no object until Undelete makes it
// one again: who steals a credential of S3 cannot ask for these rows.

// trash keeps a row that is deleted.
func (b *objects) trash(tx store.Tx, key, row []byte) {
	v := append(binary.AppendUvarint([]byte{rowVersion}, uint64(len(key))), key...)
	var id [8]byte
	rand.Read(id[:])
	tx.Set(append(trashKey(b.now()), id[:]...), append(v, row...))
}

func trashKey(t time.Time) []byte {
	return binary.BigEndian.AppendUint64([]byte{rowTrash}, uint64(max(t.UnixMilli(), 0)))
}

// A thrown row was one with that key.
type thrown struct {
	in       []byte // the key in the trash
	key, row []byte
}

func parseThrown(key, value []byte) (t thrown, err error) {
	if len(key) != 1+8+8 || len(value) == 0 || value[0] != rowVersion {
		return t, fmt.Errorf("trash: %w", errRow)
	}
	size, n := binary.Uvarint(value[1:])
	if n <= 0 || size == 0 || size > uint64(len(value)-1-n) {
		return t, fmt.Errorf("trash: %w", errRow)
	}
	value = bytes.Clone(value[1+n:])
	return thrown{bytes.Clone(key), value[:size], value[size:]}, nil
}

const trashPage = 100

// eachThrown calls f for pages of rows from..to.
func eachThrown(ctx context.Context, s store.Objects, from, to []byte, f func([]thrown) error) error {
	for from != nil {
		var page []thrown
		err := s.View(ctx, func(r store.Reader) (err error) {
			c := r.Scan(from, to)
			defer func() { err = errors.Join(err, c.Close()) }()
			for from = nil; c.Next(); {
				if len(page) == trashPage {
					from = bytes.Clone(c.Key())
					return nil
				}
				t, err := parseThrown(c.Key(), c.Value())
				if err != nil {
					return err
				}
				page = append(page, t)
			}
			return nil
		})
		if err == nil && len(page) > 0 {
			err = f(page)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// empty lets go of what was thrown away before a time.
func (b *objects) empty(ctx context.Context, before time.Time) error {
	return eachThrown(ctx, b.store, []byte{rowTrash}, trashKey(before), func(page []thrown) error {
		return b.update(func(tx store.Tx) error {
			for _, t := range page {
				_, ok, err := tx.Get(t.in)
				if err != nil {
					return err
				}
				if !ok {
					continue
				}
				tx.Delete(t.in)
				if t.key[0] != rowObject {
					continue
				}
				o, err := parseObject(t.row, version{})
				if err != nil {
					return err
				}
				if len(o.body.Segments) > 0 {
					tx.Drop(o.body)
				}
			}
			return nil
		})
	})
}

// Undeleted is what came back.
type Undeleted struct {
	Buckets  int      `json:"buckets"`
	Versions int      `json:"versions"`
	Markers  int      `json:"markers"` // delete markers that went
	Kept     []string `json:"kept"`    // names of buckets that were made anew since, and of what is locked since: they stay
}

// Undelete takes back what was deleted or replaced since a time: buckets, versions of objects that were there then, and delete
// markers that were not. What replaced them goes where they were. What was made since and replaced nothing stays.
func Undelete(ctx context.Context, s Store, since time.Time) (u Undeleted, err error) {
	b := newBackend(s, slog.New(slog.DiscardHandler))
	b.spare = time.Nanosecond // what goes now can come back
	err = eachThrown(ctx, s, trashKey(since), trashKey(b.now().Add(day)), func(page []thrown) error {
		var d Undeleted
		err := s.Update(ctx, func(tx store.Tx) error {
			d = Undeleted{}
			for _, t := range page {
				if err := b.bringBack(tx, t, since, &d); err != nil {
					return err
				}
			}
			return nil
		})
		u.Buckets, u.Versions, u.Kept = u.Buckets+d.Buckets, u.Versions+d.Versions, append(u.Kept, d.Kept...)
		return err
	})
	if err != nil {
		return u, fmt.Errorf("undelete: %w", err)
	}
	u.Markers, err = b.dropMarkers(ctx, since)
	if err != nil {
		return u, fmt.Errorf("undelete: markers: %w", err)
	}
	return u, nil
}

func (b *objects) bringBack(tx store.Tx, t thrown, since time.Time, d *Undeleted) error {
	now, taken, err := tx.Get(t.key)
	if err != nil {
		return err
	}
	switch t.key[0] {
	case rowBucket:
		k, err := parseBucket(t.row)
		if err != nil || !k.created.Before(since) {
			return err
		}
		if taken {
			d.Kept = append(d.Kept, string(t.key[1:]))
			return nil
		}
		d.Buckets++
	case rowObject:
		name, at, err := splitVersion(t.key)
		if err != nil {
			return err
		}
		o, err := parseObject(t.row, at)
		if err != nil || !o.modified.Before(since) {
			return err
		}
		k := &bucket{id: bucketID(t.key[1 : 1+bucketSize]), versioning: suspended}
		var other *object // in its place
		switch {
		case taken:
			other, err = parseObject(now, at)
		case o.null: // there is one version called null
			other, err = nullObject(tx, k, name)
		}
		if err != nil {
			return err
		}
		if other != nil {
			if b.locked(other) {
				d.Kept = append(d.Kept, name)
				return nil
			}
			if err := b.remove(tx, k, name, other); err != nil {
				return err
			}
		}
		if o.null && at != (version{}) {
			tx.Set(nameKey(rowNull, k.id, name), at[:])
		}
		b.watch(tx, k, name, o)
		d.Versions++
	default:
		return fmt.Errorf("trash: row %q: %w", t.key[0], errRow)
	}
	tx.Set(t.key, t.row)
	tx.Delete(t.in)
	return nil
}

// dropMarkers takes delete markers away that were made since.
func (b *objects) dropMarkers(ctx context.Context, since time.Time) (n int, err error) {
	for from := []byte{rowObject}; from != nil; {
		var page []ending
		var keys []bucketID
		err := b.store.View(ctx, func(r store.Reader) (err error) {
			c := r.Scan(from, []byte{rowObject + 1})
			defer func() { err = errors.Join(err, c.Close()) }()
			from = nil
			for rows := 0; c.Next(); rows++ {
				if rows == sweepPage || len(page) == trashPage {
					from = bytes.Clone(c.Key())
					return nil
				}
				name, at, err := splitVersion(c.Key())
				if err != nil {
					return err
				}
				o, err := parseObject(c.Value(), at)
				if err != nil {
					return err
				}
				if o.marker && !o.modified.Before(since) {
					page, keys = append(page, ending{name, at, o.modified}), append(keys, bucketID(c.Key()[1:1+bucketSize]))
				}
			}
			return nil
		})
		if err != nil {
			return n, err
		}
		if len(page) == 0 {
			continue
		}
		done := 0
		err = b.store.Update(ctx, func(tx store.Tx) error {
			done = 0
			for i, e := range page {
				k := &bucket{id: keys[i], versioning: suspended}
				o, err := getObject(tx, k, e.name, e.at)
				if err != nil {
					return err
				}
				if o == nil || !o.marker {
					continue
				}
				if err := b.remove(tx, k, e.name, o); err != nil {
					return err
				}
				done++
			}
			return nil
		})
		if n += done; err != nil {
			return n, err
		}
	}
	return n, nil
}
