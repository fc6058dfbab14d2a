package node

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"sync/atomic"

	"holdfast/store"
	"holdfast/volume"
)

// shelf is a dispersed store as the place of one volume's snapshots (volume.Place). Names, the highest epoch and the newest
// manifest are rows of the store's metadata; what is under a name is a body.
type shelf struct {
	store store.Objects
	// unsettled is set by the first change of which the store could not say whether it was made. It may be yet, so that
	// nothing is asked of this shelf any more: who opens the store anew finds out.
	unsettled atomic.Bool
}

var _ volume.Place = (*shelf)(nil)

var (
	rowEpoch  = []byte("epoch")  // 8 bytes, big-endian
	rowNewest = []byte("newest") // a name
	rowName   = "name/"
)

var errUnsettled = errors.New("the store of its snapshots does not answer")

func (p *shelf) ok() error {
	if p.unsettled.Load() {
		return errUnsettled
	}
	return nil
}

func (p *shelf) update(ctx context.Context, f func(store.Tx) error) error {
	if err := p.ok(); err != nil {
		return err
	}
	err := p.store.Update(ctx, f)
	if errors.Is(err, store.ErrBusy) || err != nil && ctx.Err() != nil {
		p.unsettled.Store(true)
	}
	return err
}

func (p *shelf) Put(ctx context.Context, name string, data []byte) error {
	if err := p.ok(); err != nil {
		return err
	}
	body, err := p.store.Write(ctx, "STANDARD", bytes.NewReader(data), int64(len(data)))
	if err != nil {
		return err
	}
	row, err := body.MarshalBinary()
	if err != nil {
		return err
	}
	have := false
	err = p.update(ctx, func(t store.Tx) (err error) {
		if _, have, err = t.Get([]byte(rowName + name)); err != nil || have {
			return err
		}
		t.Set([]byte(rowName+name), row)
		t.Keep(body)
		return nil
	})
	if err == nil && have {
		p.store.Discard(body)
	}
	return err
}

func (p *shelf) Get(ctx context.Context, name string, limit int) ([]byte, error) {
	if err := p.ok(); err != nil {
		return nil, err
	}
	var body store.Body
	if err := p.store.View(ctx, func(r store.Reader) error { return find(r, name, &body) }); err != nil {
		return nil, err
	}
	if body.Size > int64(limit) {
		return nil, fmt.Errorf("%s has %d bytes, at most %d are wanted", name, body.Size, limit)
	}
	if body.Size == 0 {
		return nil, nil
	}
	r, err := p.store.Read(ctx, body, 0, body.Size)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	out := make([]byte, body.Size)
	_, err = io.ReadFull(r, out)
	return out, err
}

// find reads the row of a name.
func find(r store.Reader, name string, body *store.Body) error {
	row, have, err := r.Get([]byte(rowName + name))
	if err == nil && !have {
		err = fmt.Errorf("%s: %w", name, fs.ErrNotExist)
	}
	if err != nil {
		return err
	}
	return body.UnmarshalBinary(row)
}

func (p *shelf) List(ctx context.Context, prefix string) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		from, to := []byte(rowName+prefix), []byte(rowName+prefix+"\xff")
		for {
			var page []string // who reads may write: no view is held meanwhile
			err := p.ok()
			if err == nil {
				err = p.store.View(ctx, func(r store.Reader) error {
					c := r.Scan(from, to)
					for len(page) < 1000 && c.Next() {
						page = append(page, string(c.Key()[len(rowName):]))
					}
					return c.Close()
				})
			}
			if err != nil {
				yield("", err)
				return
			}
			for _, name := range page {
				if !yield(name, nil) {
					return
				}
			}
			if len(page) < 1000 {
				return
			}
			from = []byte(rowName + page[len(page)-1] + "\x00")
		}
	}
}

// fenced is ErrFenced in an update of an epoch below the highest.
func fenced(t store.Tx, epoch uint64) error {
	row, have, err := t.Get(rowEpoch)
	switch {
	case err != nil:
		return err
	case have && len(row) == 8 && binary.BigEndian.Uint64(row) > epoch:
		return volume.ErrFenced
	}
	return nil
}

func (p *shelf) Delete(ctx context.Context, epoch uint64, name string) error {
	return p.update(ctx, func(t store.Tx) error {
		if err := fenced(t, epoch); err != nil {
			return err
		}
		var body store.Body
		if err := find(t, name, &body); errors.Is(err, fs.ErrNotExist) {
			return nil
		} else if err != nil {
			return err
		}
		t.Delete([]byte(rowName + name))
		t.Drop(body)
		return nil
	})
}

func (p *shelf) Fence(ctx context.Context, epoch uint64) error {
	return p.update(ctx, func(t store.Tx) error {
		if err := fenced(t, epoch); err != nil {
			return err
		}
		t.Set(rowEpoch, binary.BigEndian.AppendUint64(nil, epoch))
		return nil
	})
}

func (p *shelf) Newest(ctx context.Context) (name string, err error) {
	if err := p.ok(); err != nil {
		return "", err
	}
	err = p.store.View(ctx, func(r store.Reader) error {
		row, _, err := r.Get(rowNewest)
		name = string(row)
		return err
	})
	return name, err
}

func (p *shelf) Commit(ctx context.Context, epoch uint64, old, new string) error {
	return p.update(ctx, func(t store.Tx) error {
		if err := fenced(t, epoch); err != nil {
			return err
		}
		row, _, err := t.Get(rowNewest)
		if err != nil {
			return err
		}
		if string(row) != old {
			return volume.ErrMoved
		}
		t.Set(rowEpoch, binary.BigEndian.AppendUint64(nil, epoch))
		t.Set(rowNewest, []byte(new))
		return nil
	})
}
