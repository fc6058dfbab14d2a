package s3

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/aws/aws-sdk-go-v2/service/s3/types"

	"holdfast/store"
)

// Store is what a server needs of a store: that locations hold what is locked, beside the objects.
type Store interface {
	store.Objects
	// Retain has locations keep a body's shards until a time, whoever asks them to delete.
	Retain(ctx context.Context, b store.Body, until time.Time) error
}

// Locations forget no hold before its time. A lock that can be taken away, by who may, is held for holdAhead and again every
// holdAgain; so is one that lasts longer than a location takes (ten years).
const (
	holdAhead = 7 * day
	holdAgain = day
	holdMost  = 9 * 365 * day
)

// heldUntil is until when locations should hold a version, zero if it is not locked.
func heldUntil(o *object, now time.Time) time.Time {
	mode, until, hold := o.lock()
	var t time.Time
	if until != nil && until.After(now) {
		if t = *until; mode != types.ObjectLockModeCompliance && t.After(now.Add(holdAhead)) {
			t = now.Add(holdAhead)
		}
	}
	if ahead := now.Add(holdAhead); hold == types.ObjectLockLegalHoldStatusOn && t.Before(ahead) {
		t = ahead
	}
	if most := now.Add(holdMost); t.After(most) {
		t = most
	}
	return t
}

func holdKey(id bucketID, name string, v version) []byte {
	key := objectKey(id, name, v)
	key[0] = rowHold
	return key
}

// watch notes that a version is locked, for renewHolds.
func (b *objects) watch(tx store.Tx, k *bucket, name string, o *object) {
	if !heldUntil(o, b.now()).IsZero() {
		tx.Set(holdKey(k.id, name, o.at), []byte{rowVersion})
	}
}

// hold has locations hold what was locked just now. What it cannot do renewHolds does later.
func (b *objects) hold(o *object) {
	if err := b.retain(context.Background(), o); err != nil {
		b.once("what is locked is not yet held by locations", err)
	}
}

func (b *objects) retain(ctx context.Context, o *object) error {
	until := heldUntil(o, b.now())
	if until.IsZero() || len(o.body.Segments) == 0 {
		return nil
	}
	return b.store.Retain(ctx, o.body, until)
}

// renewHolds has locations hold all that is locked, a page at a time: locks that are renewed, those that they did not hear of,
// and what was moved since.
func (b *objects) renewHolds(ctx context.Context) error {
	var failed error
	for from := []byte{rowHold}; from != nil && ctx.Err() == nil; {
		var over [][]byte
		var locked []*object
		err := b.view(func(r store.Reader) (err error) {
			c := r.Scan(from, []byte{rowHold + 1})
			defer func() { err = errors.Join(err, c.Close()) }()
			from = nil
			for n := 0; c.Next(); n++ {
				if n == trashPage {
					from = bytes.Clone(c.Key())
					return nil
				}
				name, at, err := splitVersion(c.Key())
				if err != nil {
					return err
				}
				o, err := getObject(r, &bucket{id: bucketID(c.Key()[1 : 1+bucketSize])}, name, at)
				if err != nil {
					return err
				}
				if o == nil || heldUntil(o, b.now()).IsZero() {
					over = append(over, bytes.Clone(c.Key()))
				} else {
					locked = append(locked, o)
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
		for _, o := range locked {
			if err := b.retain(ctx, o); err != nil {
				failed = fmt.Errorf("hold a locked version: %w", err)
			}
		}
		if len(over) == 0 {
			continue
		}
		if err := b.update(func(tx store.Tx) error {
			for _, key := range over {
				name, at, err := splitVersion(key)
				if err != nil {
					return err
				}
				// It may be locked again.
				if o, err := getObject(tx, &bucket{id: bucketID(key[1 : 1+bucketSize])}, name, at); err != nil || o != nil && !heldUntil(o, b.now()).IsZero() {
					if err != nil {
						return err
					}
					continue
				}
				tx.Delete(key)
			}
			return nil
		}); err != nil {
			return err
		}
	}
	return failed
}
