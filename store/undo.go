package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"holdfast/disperse"
	"holdfast/store/location"
)

// undeletesAtOnce is how many requests a location is sent at once: it syncs them together.
const undeletesAtOnce = 32

// Undelete brings back what was deleted at a location since a time, as long as it is held there. It needs the right to
// recover, which the phrase gives (Root.Recovery) and no front end has: this is what undoes a theft of a front end's keys. What
// was deleted rightly comes back too, and is removed by the sweep in time. said, if it is not nil, hears how many are back.
func Undelete(ctx context.Context, l location.Location, since time.Time, said func(n int)) (int, error) {
	var n atomic.Int64
	for from := (disperse.Name{}); ; {
		page, next, err := l.List(ctx, from, location.Held)
		if err != nil {
			return int(n.Load()), fmt.Errorf("undelete: %w", err)
		}
		var eg errgroup.Group
		eg.SetLimit(undeletesAtOnce)
		for _, i := range page {
			if i.Deleted.Before(since) {
				continue
			}
			eg.Go(func() error {
				err := l.Undelete(ctx, i.Name)
				if err == nil {
					n.Add(1)
				} else if errors.Is(err, location.ErrAbsent) { // its hold has just ended
					return nil
				}
				return err
			})
		}
		if err := eg.Wait(); err != nil {
			return int(n.Load()), fmt.Errorf("undelete: %w", err)
		}
		if said != nil {
			said(int(n.Load()))
		}
		if from = next; next == (disperse.Name{}) {
			return int(n.Load()), nil
		}
	}
}

// An End is where locations say that the log ends, or ended when another front end took the store.
type End struct {
	Epoch     location.Epoch // of the front end that wrote it
	Block     uint64         // the last
	Wrote     time.Time      // when the middle one of those that keep the block got it; zero: nobody who answers has it
	Locations int            // that keep this end
}

// Ends are the ends of the log that locations keep, the newest first: that of the front end which wrote last and, as long as
// they hold what was deleted, of those before it. It changes nothing at them. Ends that the store did not sign are left out.
func Ends(ctx context.Context, keys *Keys, members []Member) ([]End, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	type found struct {
		*head
		at int // how many keep it
	}
	var mu sync.Mutex
	best := map[location.Epoch]*found{}
	var wg sync.WaitGroup
	why := make([]error, len(members))
	for i, m := range members {
		wg.Go(func() {
			all, err := m.Location.Earlier(ctx)
			if err == nil {
				var h location.Head
				h, err = m.Location.Head(ctx)
				all = append(all, h)
			}
			why[i] = err
			for _, l := range all {
				h, err := keys.verify(l)
				if err != nil || h.last == nil {
					continue
				}
				mu.Lock()
				f := best[h.epoch]
				switch {
				case f == nil || f.sequence < h.sequence:
					best[h.epoch] = &found{h, 1}
				case f.sequence == h.sequence:
					f.at++
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if len(best) == 0 {
		return nil, fmt.Errorf("ends of the log: %w", cmp.Or(errors.Join(why...), ErrNoStore))
	}
	var out []End
	for _, f := range best {
		e := End{Epoch: f.epoch, Block: f.last.sequence, Locations: f.at}
		var times []time.Time
		for i, x := range f.last.record.members() {
			j := slices.IndexFunc(members, func(m Member) bool { return m.ID == f.places[x] })
			if j < 0 {
				continue
			}
			wg.Go(func() {
				if info, err := members[j].Location.Stat(ctx, f.last.record.name(i)); err == nil {
					mu.Lock()
					defer mu.Unlock()
					times = append(times, info.Put)
				}
			})
		}
		wg.Wait()
		if slices.SortFunc(times, time.Time.Compare); len(times) > 0 {
			e.Wrote = times[len(times)/2]
		}
		out = append(out, e)
	}
	slices.SortFunc(out, func(a, b End) int { return cmp.Compare(b.Epoch, a.Epoch) })
	return out, nil
}
