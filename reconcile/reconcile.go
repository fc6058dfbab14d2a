// Package reconcile is the loop that all controllers share: wake, compare, act, back off. It knows no domain. A
// controller is one function that looks at the world, compares it with what is wanted and does what is missing; it is
// called again when something may have changed, when an error asks for another try, and now and then anyway.
package reconcile

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"time"
)

// Config of a Loop.
type Config struct {
	Name   string        // for the log
	Resync time.Duration // call Step at least this often; 0 means 30 s
	Min    time.Duration // first wait after an error; 0 means 200 ms
	Max    time.Duration // longest wait after errors; 0 means 10 s
	Log    *slog.Logger  // nil discards
	// Step compares and acts. It must be idempotent. again > 0 asks to be called once more after that long.
	Step func(ctx context.Context) (again time.Duration, err error)
}

// Loop calls Step.
type Loop struct {
	cfg  Config
	wake chan struct{}
}

// New makes a Loop; nothing happens before Run.
func New(cfg Config) *Loop {
	if cfg.Resync <= 0 {
		cfg.Resync = 30 * time.Second
	}
	if cfg.Min <= 0 {
		cfg.Min = 200 * time.Millisecond
	}
	if cfg.Max < cfg.Min {
		cfg.Max = max(10*time.Second, cfg.Min)
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Loop{cfg, make(chan struct{}, 1)}
}

// Wake asks for a Step soon. It never blocks; any number of calls before the next Step are one.
func (l *Loop) Wake() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// Run calls Step until ctx ends. The first call is at once.
func (l *Loop) Run(ctx context.Context) error {
	t := time.NewTimer(0)
	defer t.Stop()
	backoff := time.Duration(0)
	last := ""
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-t.C:
		case <-l.wake:
		}
		again, err := l.cfg.Step(ctx)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		wait := l.cfg.Resync
		if err != nil {
			backoff = min(max(2*backoff, l.cfg.Min), l.cfg.Max)
			wait = backoff/2 + rand.N(backoff) // spread out those who fail together
			if msg := err.Error(); msg != last {
				last = msg
				l.cfg.Log.Warn("will try again", "what", l.cfg.Name, "error", err)
			}
		} else {
			backoff, last = 0, ""
		}
		if again > 0 {
			wait = min(wait, again)
		}
		t.Reset(wait)
	}
}
