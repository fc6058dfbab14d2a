package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"

	"holdfast/store"
	"holdfast/store/location"
	"holdfast/store/s3"
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

// Since is the time from which on what S3 deleted and replaced is undone.
type Since struct {
	Since time.Time `json:"since"`
}

func (s *server) undelete(w http.ResponseWriter, r *http.Request) {
	x, err := read[Since](r)
	if err != nil {
		answer(w, nil, err)
		return
	}
	job(w, r, func(ctx context.Context, _ func(Progress)) (any, error) {
		s.log.Info("control: undelete", "since", x.Since)
		return s3.Undelete(ctx, s.Store, x.Since)
	})
}

// Undelete brings back what users of S3 have deleted or replaced since a time.
func (c *Client) Undelete(ctx context.Context, since time.Time) (s3.Undeleted, error) {
	return call[s3.Undeleted](ctx, c, "POST", "undelete", Since{since}, nil)
}
