package node

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"holdfast/api"
	"holdfast/contract"
	"holdfast/ledger"
)

// A workload of a revision on trial is watched, and the ledger is told once whether it is ready or has failed. What the ledger
// makes of it, going back above all, comes with the next view.

// Trial is what the ledger waits to hear of a workload.
type Trial struct {
	Revision contract.RevisionID
	Monitor  time.Duration // how long it runs without a health check before it is ready
}

// trialOf is the Trial of an assigned workload, or nil.
func trialOf(c *ContractView, as *ledger.Assignment, s *contract.Service) *Trial {
	if !c.Record.Trial.On() || c.Record.Current != c.Revision || as.Old || as.Ready || as.Failed {
		return nil
	}
	return &Trial{c.Revision, s.Monitored()}
}

// maxTries is how often a workload of a revision on trial may end or fail to start.
const maxTries = 3

// watch is what is known of a workload on trial.
type watch struct {
	revision contract.RevisionID
	instance string
	restarts uint32    // that there were before
	tries    uint32    // starts that failed
	why      string    // what was said of it when it failed last
	run      uint32    // restarts when it was seen to run
	since    time.Time // since when it was seen to run, with that many restarts; zero: it does not
	told     bool
}

// trialVerdict is what a workload on trial has come to: it is ready, it failed and why, or neither and when to look again.
type trialVerdict struct {
	ready  bool
	failed string
	again  time.Duration
}

// judge is pure: what the ledger is to be told of w, of which this node says r.
func (t *watch) judge(w *Workload, r *ledger.Report, now time.Time) trialVerdict {
	switch restarts := r.Restarts - t.restarts; {
	case r.State == ledger.StateWaiting && slices.Contains([]string{imageRefused, barRegistry, barSigner}, r.Reason): // for good
		return trialVerdict{failed: r.Reason}
	case r.State == ledger.StateExited && r.ExitCode == 0:
		return trialVerdict{ready: true}
	case r.State == ledger.StateExited:
		return trialVerdict{failed: cmp.Or(r.Reason, "it ended")}
	case restarts >= maxTries || t.tries >= maxTries:
		return trialVerdict{failed: cmp.Or(t.why, r.Reason, fmt.Sprintf("it ended %d times", maxTries))}
	case r.State != ledger.StateRunning:
		return trialVerdict{}
	case w.Process.Health != nil:
		return trialVerdict{ready: r.Healthy}
	case now.Sub(t.since) >= w.Trial.Monitor:
		return trialVerdict{ready: true}
	}
	return trialVerdict{again: w.Trial.Monitor - now.Sub(t.since)}
}

// note keeps what a step found: err is how its start failed.
func (t *watch) note(w *Workload, r *ledger.Report, err error, now time.Time) {
	if t.revision != w.Trial.Revision || t.instance != w.Instance {
		*t = watch{revision: w.Trial.Revision, instance: w.Instance, restarts: r.Restarts}
	}
	if err != nil && r.State == ledger.StateFailed {
		t.tries++
	}
	switch {
	case r.State != ledger.StateRunning:
		t.since = time.Time{}
	case t.since.IsZero() || t.run != r.Restarts:
		t.since, t.run = now, r.Restarts
	}
}

// observe follows a workload on trial after a step that ended with err, and tells the ledger.
func (c *controller) observe(ctx context.Context, w *Workload, err error) (time.Duration, error) {
	if w == nil || w.Trial == nil {
		return 0, nil
	}
	r, _ := c.status()
	if r.Workload != w.ID || r.Epoch != w.Epoch || r.Revision != w.Revision {
		return 0, nil // it says nothing of this one yet
	}
	c.watch.note(w, &r, err, time.Now())
	v := c.watch.judge(w, &r, time.Now())
	if c.watch.told || !v.ready && v.failed == "" {
		return v.again, nil
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	err = c.agent.act(ctx, ledger.KindWorkloadReport, &ledger.WorkloadReport{
		Contract: w.Contract, Workload: w.ID, Epoch: w.Epoch, Revision: w.Trial.Revision, Ready: v.ready, Reason: printableReason(v.failed),
	})
	switch {
	case errors.Is(err, api.ErrRefused):
		c.log.Info("the ledger does not want to hear of a workload", "error", err)
	case err != nil:
		return 0, fmt.Errorf("report of %s: %w", w.Name, err)
	}
	c.watch.told = true
	return 0, nil
}

// printableReason is the words of a report as a transaction takes them.
func printableReason(s string) string {
	out := []byte(s)
	for i, b := range out {
		if b < ' ' || b > '~' {
			out[i] = '?'
		}
	}
	return string(out[:min(len(out), ledger.MaxReason)])
}
