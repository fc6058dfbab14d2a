package deploy

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"holdfast/api"
	"holdfast/contract"
	"holdfast/ledger"
	"holdfast/store"
)

const bucketApp = `
name: photos
services:
  web:
    image: oci:img
    x-holdfast: {buckets: [uploads]}
x-holdfast:
  buckets: {uploads: {}%s}
  storage: %s
`

func TestBucketsFromFileToLedger(t *testing.T) {
	s := newSite(t)
	for i := range byte(5) {
		s.grid.Node(s.user.Client, fmt.Sprint("n", i), 20+i)
	}
	if _, err := s.propose(s.user, fmt.Sprintf(bucketApp, "", "1GiB")); err == nil || !strings.Contains(err.Error(), "dispersed over 6 farms, and the grid has 5 that keep shards") {
		t.Fatalf("five farms: %v", err)
	}
	s.grid.Node(s.user.Client, "n5", 25)
	s.submit(s.user, s.plan(s.user, fmt.Sprintf(bucketApp, "", "1GiB")))
	first := s.open(s.user, "photos")
	f := first.Body.FrontEnd()
	if f == nil {
		t.Fatal("no front end")
	}
	rec, err := api.Get[ledger.Store](s.grid.Context(), s.user.Client, ledger.StoreKey(first.Record.ID))
	if err != nil || rec.FrontEnd != first.Header.Store.FrontEnd || rec.Recovery != first.Header.Store.Recovery || rec.Limit != 1<<30 {
		t.Fatalf("%+v %v", rec, err)
	}
	web := first.Body.Services[slices.IndexFunc(first.Body.Services, func(p contract.Process) bool { return p.Name == "web" })]
	if !slices.Contains(web.Environment, "AWS_SECRET_ACCESS_KEY="+f.Secret) || !slices.Contains(web.Environment, "HOLDFAST_BUCKET_UPLOADS=uploads") {
		t.Errorf("%q", web.Environment)
	}

	// The phrase gives the keys that the node was given, and the pins that locations know.
	phrase, err := s.user.StorePhrase(s.grid.Context(), "photos")
	if err != nil {
		t.Fatal(err)
	}
	root, err := store.ParsePhrase(phrase)
	if err != nil {
		t.Fatal(err)
	}
	keys, err := root.Keys(0)
	if err != nil || !bytes.Equal(keys.Marshal(), f.Keys) {
		t.Errorf("the phrase's keys are others: %v", err)
	}
	// What the node gets does not give the phrase, and with it the right to undo and to purge.
	if bytes.Contains(f.Keys, root[:]) {
		t.Error("the root is among the keys of the front end")
	}
	seed := root.Recovery()
	if bytes.Contains(f.Keys, seed[:]) {
		t.Error("the key for recovery is among those of the front end")
	}

	// Nothing changes when nothing changed, and another revision has the same store and credentials.
	if p := s.plan(s.user, fmt.Sprintf(bucketApp, "", "1GiB")); !p.Plan.Empty() {
		t.Errorf("the same file would change\n%s", p.Plan.Text())
	}
	p := s.plan(s.user, fmt.Sprintf(bucketApp, ", avatars: {versioning: true}", "2GiB"))
	if text := p.Plan.Text(); !strings.Contains(text, "+ bucket avatars: with versions") || !strings.Contains(text, "storage on each location: 1 GiB → 2 GiB") || strings.Contains(text, "environment") {
		t.Errorf("the plan is\n%s", text)
	}
	s.submit(s.user, p)
	second := s.open(s.user, "photos")
	g := second.Body.FrontEnd()
	if g.Store != f.Store || g.Access != f.Access || g.Secret != f.Secret || !bytes.Equal(g.Keys, f.Keys) || len(g.Buckets) != 2 {
		t.Errorf("%+v", g)
	}
	if rec, err := api.Get[ledger.Store](s.grid.Context(), s.user.Client, ledger.StoreKey(first.Record.ID)); err != nil || rec.Limit != 2<<30 {
		t.Errorf("%+v %v", rec, err)
	}
	for name, file := range map[string]string{
		"a revision cannot drop them all": "name: photos\nservices: {web: {image: 'oci:img'}}\n",
		"it can only grow":                fmt.Sprintf(bucketApp, "", "1GiB"),
	} {
		if _, err := s.propose(s.user, file); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := s.user.StorePhrase(s.grid.Context(), "none"); !errors.Is(err, ErrUnknown) {
		t.Errorf("%v", err)
	}
	s.submit(s.user, s.plan(s.user, "name: plain\nservices: {web: {image: 'oci:img'}}\n"))
	if _, err := s.user.StorePhrase(s.grid.Context(), "plain"); !errors.Is(err, ErrNoBuckets) {
		t.Errorf("%v", err)
	}
	// Another account's contract of the same name has another store.
	other := s.newUser(9)
	s.submit(other, s.plan(other, fmt.Sprintf(bucketApp, "", "1GiB")))
	if o := s.open(other, "photos"); o.Header.Store.FrontEnd == first.Header.Store.FrontEnd || o.Body.FrontEnd().Secret == f.Secret {
		t.Error("two accounts have one store")
	}
}
