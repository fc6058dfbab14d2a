package deploy

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"holdfast/api"
	"holdfast/contract"
	"holdfast/identity"
	"holdfast/ledger"

	"github.com/google/go-containerregistry/pkg/name"
)

// bind gives the user's account bounds, and waits until they rule.
func (s *site) bind(u *User, b identity.Bounds) {
	s.Helper()
	p := identity.SingleDevice()
	p.Bounds = b
	if _, err := u.SetPolicy(s.grid.Context(), p); err != nil {
		s.Fatal(err)
	}
	s.grid.Until(u.Client, "the policy", func(ctx context.Context) (bool, error) {
		a, err := api.Get[identity.Account](ctx, u.Client, ledger.AccountKey(u.Account))
		return err == nil && fmt.Sprint(a.Policy.Bounds) == fmt.Sprint(b), err
	})
}

// A client says what its account's policy does not allow before it pushes anything, and so does that of who is asked for his
// consent. One that says nothing comes as far as the ledger with a header, and with a body as far as a node.
func TestNobodySubmitsOrConsentsOutOfBounds(t *testing.T) {
	s := newSite(t)
	s.grid.Node(s.user.Client, "node-1", 11)
	review, boss := s.newUser(8), s.newUser(9)
	s.bind(s.user, identity.Bounds{NoEgress: true, Signers: []identity.AccountID{review.Account}})
	plain := "name: app\nservices:\n  web:\n    image: oci:img\n"
	shared := plain + fmt.Sprintf("x-holdfast: {approvals: {code: {of: [%s]}}}\n", boss.Account)
	wild := plain + "    x-holdfast: {egress: ['tcp://192.0.2.1:443']}\n"
	s.stored()
	bounds := func(all []contract.Breach) (out []string) {
		for _, b := range all {
			out = append(out, b.Bound)
		}
		return out
	}
	submit := func(p *Proposal) error {
		_, err := s.user.Submit(s.grid.Context(), p, time.Now(), nil)
		return err
	}
	p := s.plan(s.user, wild)
	if got := bounds(p.Breaches); !slices.Equal(got, []string{contract.BoundEgress, contract.BoundSigners}) {
		t.Errorf("%v", got)
	}
	if err := submit(p); !errors.As(err, new(OutsideError)) || s.stored() != 0 {
		t.Errorf("it is submitted, or something was pushed: %v", err)
	}
	p.Breaches = nil // by a client that skips its checks
	if err := submit(p); err == nil || errors.As(err, new(OutsideError)) || !strings.Contains(err.Error(), "allows no egress") {
		t.Errorf("the ledger takes a header that is out of bounds: %v", err)
	}
	p = s.plan(s.user, strings.Replace(plain, "name: app", "name: stolen", 1))
	p.Breaches = nil
	if err := submit(p); err != nil {
		t.Errorf("control: the ledger cannot read a body: %v", err)
	}

	digest, err := p.Document.Body.Services[0].Image.Digest()
	if err != nil {
		t.Fatal(err)
	}
	sign := func(u *User, revoke bool) {
		t.Helper()
		if _, err := u.SignImage(s.grid.Context(), digest, revoke); err != nil {
			t.Fatal(err)
		}
	}
	sign(boss, false)
	if err := submit(s.plan(s.user, shared)); !errors.As(err, new(OutsideError)) {
		t.Errorf("signed by somebody else it is submitted: %v", err)
	}
	sign(review, false)
	done := s.submit(s.user, s.plan(s.user, shared))
	if done.Proposed == nil {
		t.Fatal("it was not proposed")
	}
	look := func() *Review {
		t.Helper()
		r, err := boss.Review(s.grid.Context(), done.Proposed.ID)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	sign(review, true)
	r := look()
	if got := bounds(r.Breaches); !slices.Equal(got, []string{contract.BoundSigners}) {
		t.Errorf("who is asked sees %v", got)
	}
	if _, err := boss.Consent(s.grid.Context(), r); !errors.As(err, new(OutsideError)) {
		t.Errorf("who is asked consents: %v", err)
	}
	sign(review, false)
	if left, err := boss.Consent(s.grid.Context(), look()); err != nil || left != nil {
		t.Errorf("control: %+v, %v", left, err)
	}
	if all, err := review.ImageSignatures(s.grid.Context(), review.Account); err != nil || len(all) != 1 || all[0].Digest != digest {
		t.Errorf("%+v %v", all, err)
	}
}

// What bounds compare is what a registry's client asks for.
func TestRepositoriesAreThoseThatClientsAsk(t *testing.T) {
	for _, ref := range []string{
		"nginx", "nginx:1.27", "team/app", "docker.io/nginx", "index.docker.io/library/nginx", "localhost/app", "localhost:5000/app:1", "registry.example.com/a/b/c:tag",
		"registry.example.com:443/app@sha256:" + strings.Repeat("0a", 32), "registry.example.com.evil/app", "a.b/c_d/e-f",
	} {
		asked, err := name.ParseReference(ref)
		if err != nil {
			t.Fatal(err)
		}
		want := strings.Replace(asked.Context().Name(), "index.docker.io/", "docker.io/", 1)
		if got, err := contract.Repository(ref); err != nil || got != want {
			t.Errorf("%s: %q, %v, the client asks %q", ref, got, err, want)
		}
	}
}
