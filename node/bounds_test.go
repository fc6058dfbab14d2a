package node

import (
	"errors"
	"strings"
	"testing"

	"holdfast/contract"
	"holdfast/identity"
	"holdfast/ledger"
	"holdfast/sandbox"
)

// bounded is a contract on a ledger of bytes whose account has bounds.
type bounded struct {
	*deployed
	r       records
	account identity.Account
}

func onLedger(t *testing.T, a *Agent, d *deployed) *bounded {
	t.Helper()
	b := &bounded{d, records{}, identity.Account{ID: d.Header.Account}}
	self := &ledger.Node{ID: a.cfg.Keys.ID, Name: "node-1", Up: true, CPUMilli: 4000, Memory: 8 << 30}
	for k, v := range map[string]any{
		ledger.NodesKey: []identity.NodeID{self.ID}, ledger.NodeKey(self.ID): self, ledger.NodeWorkKey(self.ID): []contract.ID{d.Record.ID},
		ledger.ContractKey(d.Record.ID): d.Record, ledger.AssignmentsKey(d.Record.ID): &ledger.Assignments{Revision: d.Revision, Current: d.Assignments},
		ledger.NetworkKey(contract.NetworkOf(d.Record.ID, "default")): d.Networks["default"], ledger.VolumeKey(contract.VolumeOf(d.Record.ID, "data")): d.Volumes["data"],
		ledger.EnvelopeKey(d.Revision, contract.RecipientNode, self.ID): d.Envelope,
	} {
		b.r.put(k, v)
	}
	b.r[ledger.RevisionKey(d.Revision)] = d.Header.Encode()
	b.bind(identity.Bounds{})
	a.ledger = b.r
	return b
}

func (b *bounded) bind(to identity.Bounds) {
	b.account.Policy.Bounds = to
	b.r.put(ledger.AccountKey(b.account.ID), &b.account)
}

func (b *bounded) digest(t *testing.T) [32]byte {
	t.Helper()
	d, err := b.body.Services[0].Image.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// wanted is the workload as the agent reads it from the ledger now.
func (b *bounded) wanted(t *testing.T, a *Agent) (*Workload, error) {
	t.Helper()
	v, err := ReadView(t.Context(), b.r, b.Header.Grid, a.cfg.Keys.ID)
	if err != nil || len(v.Contracts) != 1 {
		t.Fatalf("%v, %v", err, v.Unread)
	}
	s, err := a.specs(t.Context(), v, nil)
	a.settle(v, s)
	w := s.workloads[b.workload()]
	if w == nil {
		t.Fatalf("nothing is wanted: %v", err)
	}
	return w, err
}

// A client that checks nothing has signed a body that is out of its account's bounds, and a quorum of the ledger has taken it:
// it cannot read it. The node starts nothing.
func TestANodeHoldsBodiesToBounds(t *testing.T) {
	review, stranger := identity.AccountID{7}, identity.AccountID{8}
	sign := func(t *testing.T, b *bounded, by identity.AccountID, d [32]byte) {
		b.r.put(ledger.ImageSignatureKey(by, d), &ledger.ImageSignature{Account: by, Digest: d})
	}
	for name, tc := range map[string]struct {
		bounds identity.Bounds
		f      func(t *testing.T, b *bounded)
		want   string // "" starts
	}{
		"the control: no bounds":                    {identity.Bounds{}, nil, ""},
		"bounds of headers are the ledger's affair": {identity.Bounds{NoEgress: true, Farms: []string{"other"}}, nil, ""},
		"its registry":                              {identity.Bounds{Registries: []string{"registry.example"}}, nil, ""},
		"another registry":                          {identity.Bounds{Registries: []string{"registry.exampl"}}, nil, barRegistry},
		"another path":                              {identity.Bounds{Registries: []string{"registry.example/marker"}}, nil, barRegistry},
		"no signature":                              {identity.Bounds{Signers: []identity.AccountID{review}}, nil, barSigner},
		"signed": {identity.Bounds{Signers: []identity.AccountID{review}}, func(t *testing.T, b *bounded) {
			sign(t, b, review, b.digest(t))
		}, ""},
		"signed by another": {identity.Bounds{Signers: []identity.AccountID{review}}, func(t *testing.T, b *bounded) {
			sign(t, b, stranger, b.digest(t))
		}, barSigner},
		"another image is signed": {identity.Bounds{Signers: []identity.AccountID{review}}, func(t *testing.T, b *bounded) {
			sign(t, b, review, [32]byte{1})
		}, barSigner},
		"another's signature under its name": {identity.Bounds{Signers: []identity.AccountID{review}}, func(t *testing.T, b *bounded) {
			b.r.put(ledger.ImageSignatureKey(review, b.digest(t)), &ledger.ImageSignature{Account: stranger, Digest: b.digest(t)})
		}, barSigner},
		"one of two": {identity.Bounds{Signers: []identity.AccountID{review, stranger}}, func(t *testing.T, b *bounded) {
			sign(t, b, review, b.digest(t))
		}, barSigner},
		"signed, of another registry": {identity.Bounds{Registries: []string{"docker.io"}, Signers: []identity.AccountID{review}}, func(t *testing.T, b *bounded) {
			sign(t, b, review, b.digest(t))
		}, barRegistry},
		"a signature that cannot be read": {identity.Bounds{Signers: []identity.AccountID{review}}, func(t *testing.T, b *bounded) {
			b.r[ledger.ImageSignatureKey(review, b.digest(t))] = tooLong
		}, barUnread},
	} {
		t.Run(name, func(t *testing.T) {
			a := agent(t)
			b := onLedger(t, a, deploy(t, a, nil))
			b.bind(tc.bounds)
			if tc.f != nil {
				tc.f(t, b)
			}
			w, err := b.wanted(t, a)
			if (err != nil) != (tc.want == barUnread) {
				t.Error(err)
			}
			if starts := decide(w, observed{leaseOK: true}).start; starts != (tc.want == "") {
				t.Errorf("starts: %v, %+v", starts, w.Barred)
			}
			if tc.want == "" {
				return
			}
			c := a.newController(w.ID)
			c.want = w
			if _, err := c.step(t.Context()); err != nil {
				t.Error(err)
			}
			if r, _ := c.status(); r.State != ledger.StateWaiting || r.Reason != tc.want {
				t.Errorf("reported %+v", r)
			}
			var log strings.Builder
			if err := a.runner.Logs(t.Context(), w.Instance, false, 10, &log); err != nil || !strings.Contains(log.String(), "service web: image") && tc.want != barUnread {
				t.Errorf("its owner's log: %q %v", log.String(), err)
			}
		})
	}
}

// Bounds become tighter, or a signature is taken back, while a workload runs. It goes on, and is not started again.
func TestARevokedSignatureEndsTheNextStart(t *testing.T) {
	a := agent(t)
	review := identity.AccountID{7}
	b := onLedger(t, a, deploy(t, a, nil))
	b.bind(identity.Bounds{Signers: []identity.AccountID{review}})
	key := ledger.ImageSignatureKey(review, b.digest(t))
	b.r.put(key, &ledger.ImageSignature{Account: review, Digest: b.digest(t)})
	w, err := b.wanted(t, a)
	if err != nil || w.Barred != nil {
		t.Fatalf("control: %v %+v", err, w)
	}
	signed := b.r[key]
	// For a moment it cannot be read: what was known of it stands.
	b.r[key] = tooLong
	if w, err = b.wanted(t, a); err == nil || w.Barred != nil {
		t.Errorf("a ledger that does not answer is taken for a revocation: %v %+v", err, w.Barred)
	}
	run := sandbox.Status{ID: w.Instance, State: sandbox.Running, Labels: labels(w)}
	ended := sandbox.Status{ID: w.Instance, State: sandbox.Exited, ExitCode: 1, Labels: labels(w)}
	seen := func(s sandbox.Status) observed {
		return observed{leaseOK: true, instances: map[string]sandbox.Status{s.ID: s}}
	}
	if !decide(w, seen(ended)).start {
		t.Fatal("control: signed it is not started again")
	}
	delete(b.r, key)
	for name, f := range map[string]func() *Workload{
		"this agent": func() *Workload { w, _ := b.wanted(t, a); return w },
		"the next":   func() *Workload { a.bodies = nil; w, _ := b.wanted(t, a); return w },
	} {
		w := f()
		if s := decide(w, seen(run)); s.state != ledger.StateRunning || len(s.stop) > 0 || !strings.Contains(s.reason, barSigner) {
			t.Errorf("%s: what runs: %+v", name, s)
		}
		if s := decide(w, seen(ended)); s.start || s.reason != barSigner {
			t.Errorf("%s: it is started again: %+v", name, s)
		}
		if s := decide(w, observed{leaseOK: true}); s.start {
			t.Errorf("%s: it is started: %+v", name, s)
		}
	}
	// Unread, it stays barred.
	b.r[key] = tooLong
	if w, err = b.wanted(t, a); err == nil || w.Barred == nil {
		t.Errorf("%v %+v", err, w.Barred)
	}
	b.r[key] = signed
	if w, err = b.wanted(t, a); err != nil || w.Barred != nil {
		t.Errorf("signed again: %v %+v", err, w.Barred)
	}
	// Without the account's record nobody knows its bounds: nothing is read of the contract.
	delete(b.r, ledger.AccountKey(b.account.ID))
	v, err := ReadView(t.Context(), b.r, b.Header.Grid, a.cfg.Keys.ID)
	if err != nil || len(v.Contracts) != 0 || !errors.Is(v.Unread[b.Record.ID], ledger.ErrAbsent) {
		t.Errorf("%v %+v", err, v)
	}
}
