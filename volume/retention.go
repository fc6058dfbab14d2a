package volume

import (
	"slices"
	"time"
)

// Retention says which snapshots are kept beside the newest: the last ones, and the newest of each of the last hours and
// days (UTC) of which there are any.
type Retention struct {
	Last, Hourly, Daily int
}

// Keep is which of the earlier snapshots are kept, ascending by sequence. It is pure. At most 1024 are.
func (r Retention) Keep(all []Snapshot) []Snapshot {
	all = slices.SortedFunc(slices.Values(all), func(a, b Snapshot) int {
		if a.Sequence > b.Sequence { // newest first
			return -1
		}
		return 1
	})
	hours, days := map[int64]bool{}, map[int64]bool{}
	var kept []Snapshot
	for i, s := range all {
		hour := s.Time.Unix() / 3600
		day := hour / 24
		keep := i < r.Last
		if !hours[hour] && len(hours) < r.Hourly {
			hours[hour], keep = true, true
		}
		if !days[day] && len(days) < r.Daily {
			days[day], keep = true, true
		}
		if keep && len(kept) < maxHistory {
			kept = append(kept, s)
		}
	}
	slices.Reverse(kept)
	return kept
}

// Pace says when a volume's next snapshot is due. It is pure.
type Pace struct {
	Cut  time.Time     // moment of the newest snapshot that is at its place; zero: there is none
	Took time.Duration // how long it took to get there
}

// Interval is how long after a snapshot the next is due: uploads take at most a sixth of the time.
func (p Pace) Interval() time.Duration { return max(10*time.Second, 5*p.Took) }

// Due reports whether a snapshot is to be taken. A volume that is being closed gets one in any case.
func (p Pace) Due(now time.Time, closing bool) bool {
	return closing || p.Cut.IsZero() || now.Sub(p.Cut) >= p.Interval()
}

// Loss is the time whose changes are lost if the machine is lost now; ok is false if that is all that there is.
func (p Pace) Loss(now time.Time) (d time.Duration, ok bool) {
	return max(0, now.Sub(p.Cut)), !p.Cut.IsZero()
}
