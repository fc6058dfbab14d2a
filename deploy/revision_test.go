package deploy

import (
	"bytes"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"holdfast/ca"
	"holdfast/contract"
)

const app2 = `
name: app
services:
  web:
    image: oci:img
`

// An old revision comes back whole under keys of its own: the same document, the same disks, a certificate that is good now,
// and nothing of its images is sent again.
func TestRollback(t *testing.T) {
	s := newSite(t)
	s.grid.Node(s.user.Client, "node-1", 11)
	s.submit(s.user, s.plan(s.user, app))
	old := s.open(s.user, "app")
	s.submit(s.user, s.plan(s.user, app2))
	last := s.open(s.user, "app")
	s.stored()

	p, err := s.user.ProposeRollback(s.grid.Context(), last.Record, 1)
	if err != nil {
		t.Fatal(err)
	}
	if p.Plan.Create || !strings.Contains(p.Plan.Text(), "+ route app.localhost: web port 80") || s.stored() != 0 {
		t.Fatalf("%s", p.Plan.Text())
	}
	now := time.Now().Add(ca.LeafValidity)
	if _, err := s.user.Submit(s.grid.Context(), p, now, nil); err != nil {
		t.Fatal(err)
	}
	if n := s.stored(); n != 1 {
		t.Errorf("%d blobs were stored, want the body alone", n)
	}
	cur := s.open(s.user, "app")
	if d := contract.Diff(old.Header, old.Body, cur.Header, cur.Body); !d.Empty() {
		t.Errorf("it came back changed:\n%s", d.Text())
	}
	if !bytes.Equal(cur.Body.Source, old.Body.Source) {
		t.Error("the source is another")
	}
	if h := cur.Header; h.Revision != 3 || h.Previous != last.Record.Current || h.Contract != last.Record.ID {
		t.Errorf("revision %d of %v after %v", h.Revision, h.Contract, h.Previous)
	}
	if cur.Keys.Volumes["data"] != old.Keys.Volumes["data"] {
		t.Error("the volume has another key: its data is lost")
	}
	if cur.Keys.Body == old.Keys.Body || cur.Keys.Salt == old.Keys.Salt || cur.Header.SealedBody == old.Header.SealedBody {
		t.Error("a body was sealed under a key that sealed another")
	}
	if c := cur.Body.Certificates[0]; bytes.Equal(c.Key, old.Body.Certificates[0].Key) || !ca.Expires(c.Chain).After(now) {
		t.Error("the certificate is the old one")
	}
}

// What is gone does not come back by half.
func TestRollbackRefuses(t *testing.T) {
	s := newSite(t)
	s.grid.Node(s.user.Client, "node-1", 11)
	s.submit(s.user, s.plan(s.user, app))
	old := s.open(s.user, "app")
	if err := newImage("two").WriteLayout(s.dir + "/two"); err != nil {
		t.Fatal(err)
	}
	s.submit(s.user, s.plan(s.user, strings.ReplaceAll(app2, "oci:img", "oci:two")))
	last := s.open(s.user, "app")
	ctx := s.grid.Context()
	if _, err := s.user.ProposeRollback(ctx, last.Record, 1); err != nil {
		t.Fatal("control:", err)
	}
	kept := map[[32]byte]bool{}
	for _, b := range last.Body.Services[0].Image.Blobs {
		kept[b.Sealed] = true
	}
	blobs := old.Body.Services[0].Image.Blobs
	i := slices.IndexFunc(blobs, func(b contract.Blob) bool { return !kept[b.Sealed] })
	path := s.blob(fmt.Sprintf("%x", blobs[i].Sealed))
	if err := os.Rename(path, path+".away"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.user.ProposeRollback(ctx, last.Record, 1); err == nil || !strings.Contains(err.Error(), "does not keep "+blobs[i].Digest) {
		t.Errorf("a blob is gone: %v", err)
	}
	if err := os.Rename(path+".away", path); err != nil {
		t.Fatal(err)
	}
	body := s.blob(fmt.Sprintf("%x", old.Header.SealedBody))
	if err := os.Truncate(body, 100); err != nil {
		t.Fatal(err)
	}
	if _, err := s.user.ProposeRollback(ctx, last.Record, 1); err == nil || !strings.Contains(err.Error(), "the grid's copy is damaged") {
		t.Errorf("a body is damaged: %v", err)
	}

	// The ledger lets no volume change its size; should that change, going back must not.
	doc := &contract.Document{Header: *old.Header, Body: *old.Body}
	bigger := *old
	bigger.Header = new(contract.Header)
	*bigger.Header = *old.Header
	bigger.Header.Volumes = []contract.Volume{{Name: "data", Size: 2 * old.Header.Volumes[0].Size}}
	if err := s.user.compare(t.Context(), &Proposal{Document: doc, Current: &bigger}); err == nil || !strings.Contains(err.Error(), "a volume's size cannot change") {
		t.Errorf("a volume would shrink: %v", err)
	}
}
