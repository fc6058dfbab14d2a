package s3

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/versity/versitygw/auth"
)

func newAdmin(t *testing.T) (*bench, *Admin) {
	b := newBench(t, false)
	u, err := newUsers(b.objects, auth.Account{Access: "root", Secret: "rootsecretrootsecret", Role: auth.RoleAdmin}, [32]byte{1})
	b.ok(err)
	b.ok(b.PutBucketAcl(t.Context(), inBucket, []byte(`{"Owner":"anna"}`)))
	return b, &Admin{b.objects, u}
}

func TestAdminChangesUsers(t *testing.T) {
	b, a := newAdmin(t)
	secret := NewSecret()
	if other := NewSecret(); len(secret) != 40 || secret == other {
		t.Errorf("secrets %q and %q", secret, other)
	}
	b.ok(a.AddUser("anna", secret, "userplus"))
	for name, x := range map[string]struct {
		err  error
		want error
		text string
	}{
		"twice":                   {a.AddUser("anna", secret, "user"), ErrUser, "exists"},
		"the root":                {a.AddUser("root", secret, "user"), ErrUser, "exists"},
		"a name with a slash":     {a.AddUser("an/na", secret, "user"), ErrUser, "letters"},
		"a short secret":          {a.AddUser("bert", "0123456789", "user"), ErrUser, "printable"},
		"a secret of two lines":   {a.AddUser("bert", "0123456789\n0123456789", "user"), ErrUser, "printable"},
		"an unknown role":         {a.AddUser("bert", secret, "king"), ErrUser, "there are user, userplus, admin"},
		"rotate nobody":           {a.SetSecret("carl", secret), ErrNoUser, "carl"},
		"rotate the root":         {a.SetSecret("root", secret), ErrUser, "own account"},
		"rotate to a short one":   {a.SetSecret("anna", "x"), ErrUser, "printable"},
		"remove nobody":           {a.RemoveUser("carl"), ErrNoUser, "carl"},
		"remove the root":         {a.RemoveUser("root"), ErrUser, "own account"},
		"a policy of nowhere":     {a.SetPolicy("nowhere", []byte("{}")), ErrNoBucket, "nowhere"},
		"no policy":               {a.RemovePolicy(inBucket), ErrNoPolicy, inBucket},
		"a policy that is none":   {a.SetPolicy(inBucket, []byte("allow all")), ErrPolicy, ""},
		"a policy for a stranger": {a.SetPolicy(inBucket, []byte(policyFor("carl"))), ErrPolicy, ""},
	} {
		if !errors.Is(x.err, x.want) || !strings.Contains(x.err.Error(), x.text) {
			t.Errorf("%s: %v", name, x.err)
		}
		if x.err != nil && strings.Contains(x.err.Error(), "0123456789") {
			t.Errorf("%s: the error tells the secret: %v", name, x.err)
		}
	}
	all, err := a.Users()
	b.ok(err)
	if len(all) != 2 || !all[0].Root || all[1].Access != "anna" || all[1].Role != "userplus" || len(all[1].Buckets) != 1 {
		t.Errorf("users: %+v", all)
	}
	// A key that was rotated opens nothing, also after a start.
	next := NewSecret()
	b.ok(a.SetSecret("anna", next))
	fresh, err := newUsers(b.objects, a.u.root, [32]byte{1})
	b.ok(err)
	for name, u := range map[string]*users{"at once": a.u, "after a start": fresh} {
		if x, err := u.GetUserAccount("anna"); err != nil || x.Secret != next || x.Role != auth.RoleUserPlus {
			t.Errorf("%s: %v %v", name, x, err)
		}
	}
	b.ok(a.RemoveUser("anna"))
	if _, err := a.u.GetUserAccount("anna"); !errors.Is(err, auth.ErrNoSuchUser) {
		t.Errorf("a removed user: %v", err)
	}
}

func policyFor(who string) string {
	return `{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Principal":{"AWS":["` + who + `"]},"Action":"s3:GetObject","Resource":"arn:aws:s3:::` + inBucket + `/*"}]}`
}

func TestAdminChangesPolicies(t *testing.T) {
	b, a := newAdmin(t)
	b.ok(a.AddUser("bert", NewSecret(), "user"))
	b.ok(a.SetPolicy(inBucket, []byte(policyFor("bert"))))
	got, err := a.Policy(inBucket)
	if b.ok(err); !bytes.Equal(got, []byte(policyFor("bert"))) {
		t.Errorf("policy %s", got)
	}
	all, err := a.Buckets()
	if b.ok(err); len(all) != 1 || all[0] != (Bucket{inBucket, "anna", true}) {
		t.Errorf("buckets %+v", all)
	}
	b.ok(a.RemovePolicy(inBucket))
	if _, err := a.Policy(inBucket); !errors.Is(err, ErrNoPolicy) {
		t.Errorf("a removed policy: %v", err)
	}
}
