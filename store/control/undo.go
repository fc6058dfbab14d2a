package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"holdfast/store"
	"holdfast/store/location"
)

// recoverer is a location that is listed by the front end's key, and undeletes by the phrase's, which may do nothing else.
type recoverer struct {
	location.Location
	by location.Location
}

func (r recoverer) Undelete(ctx context.Context, n location.Name) error { return r.by.Undelete(ctx, n) }

// Undeleted is what came back at a location.
type Undeleted struct {
	Place Place
	N     int
	Err   error
}

// Undelete brings back what was deleted at the locations since a time, by the key of the phrase. A location that does not do
// it keeps no other from it. said hears how many shards are back everywhere.
func (m *Members) Undelete(ctx context.Context, recovery location.Seed, since time.Time, said func(n int)) ([]Undeleted, error) {
	cert, err := location.Certificate(recovery)
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	out := make([]Undeleted, len(m.all))
	counts := make([]int, len(m.all))
	var mu sync.Mutex
	var wg sync.WaitGroup
	for i, h := range m.all {
		out[i].Place = h.place
		l := recoverer{Location: h.member.Location}
		var end io.Closer
		if d, ok := h.open.(*location.Dir); ok {
			l.by = d.As(location.Recover)
		} else {
			c, err := location.NewClient(location.ClientConfig{Addr: h.place.Addr, Pin: h.place.Pin, Certificate: cert, Dial: m.cfg.Dial})
			if err != nil {
				out[i].Err = fmt.Errorf("location %s: %w", h.place.URL(), err)
				continue
			}
			l.by, end = c, c
		}
		wg.Go(func() {
			n, err := store.Undelete(ctx, l, since, func(n int) {
				mu.Lock()
				defer mu.Unlock()
				all := 0
				counts[i] = n
				for _, n := range counts {
					all += n
				}
				said(all)
			})
			if end != nil {
				err = errors.Join(err, end.Close())
			}
			if out[i].N, out[i].Err = n, err; err != nil {
				out[i].Err = fmt.Errorf("location %s: %w", h.place.URL(), err)
			}
		})
	}
	wg.Wait()
	return out, ctx.Err()
}
