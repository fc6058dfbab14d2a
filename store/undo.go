package store

import (
	"context"
	"errors"
	"fmt"
	"time"

	"holdfast/disperse"
	"holdfast/store/location"
)

// Undelete brings back what was deleted at a location since a time, as long as it is held there. It needs the right to
// recover, which the phrase gives (Root.Recovery) and no front end has: this is what undoes a theft of a front end's keys. What
// was deleted rightly comes back too, and is removed by the sweep in time.
func Undelete(ctx context.Context, l location.Location, since time.Time) (n int, err error) {
	for from := (disperse.Name{}); ; {
		page, next, err := l.List(ctx, from, location.Held)
		if err != nil {
			return n, fmt.Errorf("undelete: %w", err)
		}
		for _, i := range page {
			if i.Deleted.Before(since) {
				continue
			}
			switch err := l.Undelete(ctx, i.Name); {
			case err == nil:
				n++
			case !errors.Is(err, location.ErrAbsent): // its hold has just ended
				return n, fmt.Errorf("undelete: %w", err)
			}
		}
		if from = next; next == (disperse.Name{}) {
			return n, nil
		}
	}
}
