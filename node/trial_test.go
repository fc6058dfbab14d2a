package node

import (
	"slices"
	"testing"
	"time"

	"holdfast/contract"
	"holdfast/identity"
	"holdfast/ledger"
)

func TestATrialIsJudged(t *testing.T) {
	now := time.Unix(1000, 0)
	plain := &Workload{Instance: "a", Process: &contract.Process{}, Trial: &Trial{contract.RevisionID{1}, 5 * time.Second}}
	checked := &Workload{Instance: "a", Process: &contract.Process{Health: &contract.Healthcheck{}}, Trial: plain.Trial}
	type seen struct {
		r   ledger.Report
		err error
		at  time.Duration
	}
	run := func(restarts uint32, healthy bool, at time.Duration) seen {
		return seen{ledger.Report{State: ledger.StateRunning, Restarts: restarts, Healthy: healthy}, nil, at}
	}
	died := func(restarts uint32, at time.Duration) seen {
		return seen{ledger.Report{State: ledger.StateFailed, Reason: "exit code 1", Restarts: restarts}, nil, at}
	}
	notUp := seen{ledger.Report{State: ledger.StateFailed, Reason: notStarted}, errNoBody, 0}
	for _, tc := range []struct {
		name string
		w    *Workload
		seen []seen
		want trialVerdict
	}{
		{"it has just begun", plain, []seen{run(0, false, 0)}, trialVerdict{again: 5 * time.Second}},
		{"it is watched", plain, []seen{run(0, false, 0), run(0, false, 3*time.Second)}, trialVerdict{again: 2 * time.Second}},
		{"it ran long enough", plain, []seen{run(0, false, 0), run(0, false, 5*time.Second)}, trialVerdict{ready: true}},
		{"it ended meanwhile", plain, []seen{run(0, false, 0), died(0, time.Second), run(1, false, 2*time.Second), run(1, false, 6*time.Second)}, trialVerdict{again: time.Second}},
		{"it ended unseen", plain, []seen{run(0, false, 0), run(1, false, 6*time.Second)}, trialVerdict{again: 5 * time.Second}},
		{"it goes on ending", plain, []seen{run(0, false, 0), died(1, 0), died(2, 0), died(3, 0)}, trialVerdict{failed: "exit code 1"}},
		{"it ended before this revision", plain, []seen{run(7, false, 0)}, trialVerdict{again: 5 * time.Second}},
		{"its check has not passed", checked, []seen{run(0, false, 0), run(0, false, time.Hour)}, trialVerdict{}},
		{"its check passed", checked, []seen{run(0, true, 0)}, trialVerdict{ready: true}},
		{"it cannot be started", plain, []seen{notUp, notUp, notUp}, trialVerdict{failed: notStarted}},
		{"it may be started yet", plain, []seen{notUp, notUp}, trialVerdict{}},
		{"it is a job that is done", plain, []seen{{ledger.Report{State: ledger.StateExited}, nil, 0}}, trialVerdict{ready: true}},
		{"it is a job that failed", plain, []seen{{ledger.Report{State: ledger.StateExited, ExitCode: 2, Reason: "exit code 2"}, nil, 0}}, trialVerdict{failed: "exit code 2"}},
		{"its image is another", plain, []seen{{ledger.Report{State: ledger.StateWaiting, Reason: imageRefused}, errNoBody, 0}}, trialVerdict{failed: imageRefused}},
		{"the signatures of its image cannot be read now", &Workload{Instance: "a", Process: plain.Process, Trial: plain.Trial, Barred: &bar{barUnread, "which"}}, []seen{{ledger.Report{State: ledger.StateWaiting, Reason: barUnread}, nil, 0}}, trialVerdict{}},
		{"its image is out of bounds", &Workload{Instance: "a", Process: plain.Process, Trial: plain.Trial, Barred: &bar{barSigner, "which"}}, []seen{{ledger.Report{State: ledger.StateWaiting, Reason: barSigner}, nil, 0}}, trialVerdict{failed: barSigner}},
		{"its image is not there yet", plain, []seen{{ledger.Report{State: ledger.StateWaiting, Reason: "the image cannot be had"}, errNoBody, 0}}, trialVerdict{}},
	} {
		var w watch
		var got trialVerdict
		for _, s := range tc.seen {
			w.note(tc.w, &s.r, s.err, now.Add(s.at))
			got = w.judge(tc.w, &s.r, now.Add(s.at))
		}
		if got != tc.want {
			t.Errorf("%s: %+v, want %+v", tc.name, got, tc.want)
		}
	}
	// What it ended of counts, not what it does at this moment.
	w := watch{revision: plain.Trial.Revision, instance: "a", why: "exit code 3"}
	r := &ledger.Report{State: ledger.StateStarting, Reason: "health check has not passed yet", Restarts: 3}
	w.note(plain, r, nil, now)
	if v := w.judge(plain, r, now); v.failed != "exit code 3" {
		t.Errorf("%+v", v)
	}
	// The next revision begins anew.
	w = watch{revision: plain.Trial.Revision, instance: "a", tries: 3, told: true}
	next := *plain
	next.Trial = &Trial{contract.RevisionID{2}, time.Second}
	w.note(&next, &ledger.Report{State: ledger.StateRunning}, nil, now)
	if w.told || w.tries != 0 {
		t.Errorf("%+v", w)
	}
}

// While one revision takes the place of another a node runs both, each workload by its own body, in one network.
func TestTwoRevisionsOfAContract(t *testing.T) {
	a := agent(t)
	grow := func(env string) func(*contract.Header, *contract.Body) {
		return func(h *contract.Header, b *contract.Body) {
			h.Services[0].Replicas, h.Services[0].Volumes, h.Volumes = 3, nil, nil
			b.Services[0].Mounts, b.Services[0].Environment = nil, []string{env}
		}
	}
	first := deploy(t, a, grow("WHICH=first"))
	second := deploy(t, a, func(h *contract.Header, b *contract.Body) {
		grow("WHICH=second")(h, b)
		h.Revision, h.Contract, h.Previous = 2, first.Record.ID, first.Revision
	})
	second.keys.Networks = first.keys.Networks
	var err error
	if second.sealed, err = contract.Seal(second.Header, second.keys, second.body); err != nil {
		t.Fatal(err)
	}
	second.settle(t, a)
	id := first.Record.ID
	rec := *first.Record
	rec.Current, rec.Trial = second.Revision, ledger.Trial{From: first.Revision, Until: 1}
	other := identity.NodeID{9}
	as := &ledger.Assignments{Revision: second.Revision, From: first.Revision}
	for i, node := range []identity.NodeID{a.cfg.Keys.ID, a.cfg.Keys.ID, other} {
		as.Current = append(as.Current, ledger.Assignment{Workload: contract.WorkloadOf(id, "web", i), Service: "web", Replica: uint16(i), Node: node, Epoch: 1, Old: i > 0})
	}
	r := records{}
	self := &ledger.Node{ID: a.cfg.Keys.ID, Name: "node-1", Up: true, CPUMilli: 4000, Memory: 8 << 30}
	far := &ledger.Node{ID: other, Name: "node-2", Up: true, CPUMilli: 4000, Memory: 8 << 30, WireGuard: [32]byte{7}}
	for k, v := range map[string]any{
		ledger.NodesKey: []identity.NodeID{self.ID, other}, ledger.NodeKey(self.ID): self, ledger.NodeKey(other): far,
		ledger.NodeWorkKey(self.ID): []contract.ID{id}, ledger.ContractKey(id): &rec, ledger.AssignmentsKey(id): as,
		ledger.NetworkKey(contract.NetworkOf(id, "default")):                first.Networks["default"],
		ledger.EnvelopeKey(first.Revision, contract.RecipientNode, self.ID): first.Envelope, ledger.EnvelopeKey(second.Revision, contract.RecipientNode, self.ID): second.Envelope,
	} {
		r.put(k, v)
	}
	r.put(ledger.AccountKey(first.Header.Account), &identity.Account{ID: first.Header.Account})
	r[ledger.RevisionKey(first.Revision)], r[ledger.RevisionKey(second.Revision)] = first.Header.Encode(), second.Header.Encode()
	v, err := ReadView(t.Context(), r, first.Header.Grid, self.ID)
	if err != nil || len(v.Contracts) != 2 || v.Contracts[0].Old || !v.Contracts[1].Old {
		t.Fatalf("%v %+v %v", err, v.Contracts, v.Unread)
	}
	s, err := a.specs(t.Context(), v, nil)
	if err != nil || len(s.workloads) != 2 {
		t.Fatalf("%v, %d workloads", err, len(s.workloads))
	}
	for i, want := range []string{"WHICH=second", "WHICH=first"} {
		w := s.workloads[as.Current[i].Workload]
		if !slices.Equal(w.Process.Environment, []string{want}) || (w.Trial != nil) != (i == 0) || w.Old != (i == 1) || w.Network == "" || !w.Address.IsValid() {
			t.Errorf("%d: %+v", i, w)
		}
	}
	if len(s.meshes) != 2 { // the system network, and the contract's
		t.Fatalf("%d meshes", len(s.meshes))
	}
	m := s.meshes[1]
	if len(m.Own) != 2 || len(m.Peers) != 1 || len(m.Peers[0].Addrs) != 2 || len(m.Names["web"]) != 3 {
		t.Errorf("%+v", m)
	}
	// One that was replaced and reported is not waited for; of one revision alone there is one view.
	as.Current[0].Ready, as.Current[1].Old = true, false
	r.put(ledger.AssignmentsKey(id), as)
	if v, err = ReadView(t.Context(), r, first.Header.Grid, self.ID); err != nil || len(v.Contracts) != 1 || v.Contracts[0].Other == nil {
		t.Fatalf("%v %+v", err, v.Contracts)
	}
	if s, err = a.specs(t.Context(), v, nil); err != nil || s.workloads[as.Current[0].Workload].Trial != nil || s.workloads[as.Current[1].Workload].Trial == nil {
		t.Errorf("%v %+v", err, s.workloads)
	}
	// The body of one cannot be had: what runs of the other is its own affair.
	second.Envelope = nil
	a.bodies = nil
	as.Current[1].Old = true
	r.put(ledger.AssignmentsKey(id), as)
	delete(r, ledger.EnvelopeKey(second.Revision, contract.RecipientNode, self.ID))
	if v, err = ReadView(t.Context(), r, first.Header.Grid, self.ID); err != nil {
		t.Fatal(err)
	}
	s, err = a.specs(t.Context(), v, nil)
	if w := s.workloads[as.Current[0].Workload]; err == nil || w == nil || w.Keep == "" {
		t.Errorf("%v: the one that cannot be opened: %+v", err, w)
	}
	if w := s.workloads[as.Current[1].Workload]; w == nil || w.Keep != "" || w.Network == "" {
		t.Errorf("the other: %+v", w)
	}
}
