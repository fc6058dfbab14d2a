package deploy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"holdfast/api"
	"holdfast/api/apitest"
	"holdfast/ca"
	"holdfast/contract"
	"holdfast/identity"
	"holdfast/ledger"
)

// site is a user with a grid, and a directory with a Compose file and an image.
type site struct {
	*testing.T
	grid *apitest.Grid
	user *User
	dir  string
}

func newSite(t *testing.T) *site {
	t.Helper()
	s := &site{T: t, grid: apitest.Start(t, nil), dir: t.TempDir()}
	s.user = s.newUser(7)
	if err := newImage("one").WriteLayout(filepath.Join(s.dir, "img")); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *site) newUser(seed byte) *User {
	s.Helper()
	c := s.grid.Client(nil)
	authority, err := ca.Open(s.TempDir(), []string{"localhost"}, time.Now())
	if err != nil {
		s.Fatal(err)
	}
	keys := apitest.Key(seed)
	return &User{Client: c, Account: s.grid.Account(c, keys), Keys: keys, CA: authority}
}

func (s *site) propose(u *User, compose string) (*Proposal, error) {
	s.Helper()
	path := filepath.Join(s.dir, "compose.yaml")
	if err := os.WriteFile(path, []byte(compose), 0o600); err != nil {
		s.Fatal(err)
	}
	doc, err := contract.Load(s.grid.Context(), contract.Input{Path: path})
	if err != nil {
		s.Fatal(err)
	}
	return u.Propose(s.grid.Context(), doc, path)
}

func (s *site) plan(u *User, compose string) *Proposal {
	s.Helper()
	p, err := s.propose(u, compose)
	if err != nil {
		s.Fatal(err)
	}
	return p
}

func (s *site) submit(u *User, p *Proposal) *Submitted {
	s.Helper()
	done, err := u.Submit(s.grid.Context(), p, time.Now(), nil)
	if err != nil {
		s.Fatal(err)
	}
	return done
}

func (s *site) open(u *User, name string) *Current {
	s.Helper()
	c, err := u.Find(s.grid.Context(), name)
	if err != nil {
		s.Fatal(err)
	}
	cur, err := u.Open(s.grid.Context(), c, c.Current)
	if err != nil {
		s.Fatal(err)
	}
	return cur
}

// stored is how many blobs reached the grid since the last call.
func (s *site) stored() (n int) {
	for {
		select {
		case <-s.grid.Stored:
			n++
		default:
			return n
		}
	}
}

const secretValue = "SECRET-value-that-only-the-workload-sees"

const app = `
name: app
services:
  web:
    image: oci:img
    environment: {PASSWORD: ` + secretValue + `}
    configs: [c]
    volumes: ['data:/data']
  worker:
    image: oci:img
    x-holdfast: {placement: {farms: [farm-of-node-1]}}
configs: {c: {content: ` + secretValue + `}}
volumes: {data: {x-holdfast: {size: 64MiB}}}
x-holdfast: {routes: [{host: app.localhost, service: web, port: 80}]}
`

// From a file to a revision, and on to the next: what is planned is what is signed, sealed for those who may open it, and
// twice the same is nothing.
func TestFromFileToRevision(t *testing.T) {
	s := newSite(t)
	n1, n2 := s.grid.Node(s.user.Client, "node-1", 11), s.grid.Node(s.user.Client, "node-2", 12)
	img := newImage("one")

	// A plan changes nothing.
	p := s.plan(s.user, app)
	if !p.Plan.Create || p.Current != nil || s.stored() != 0 {
		t.Fatalf("%+v", p.Plan)
	}
	if all, err := s.user.Contracts(s.grid.Context()); err != nil || len(all) != 0 {
		t.Fatalf("a plan made %d contracts: %v", len(all), err)
	}
	for i := range p.Document.Body.Services {
		if p.Document.Body.Services[i].Image.Manifest != img.Manifest {
			t.Errorf("the plan pins %q", p.Document.Body.Services[i].Image.Manifest)
		}
	}

	// Between plan and signature the layout gets another image: what was planned is pinned, and pushed.
	dir := filepath.Join(s.dir, "img")
	other := newImage("two")
	if err := other.WriteLayout(dir); err != nil {
		t.Fatal(err)
	}
	var last [2]int64
	done, err := s.user.Submit(s.grid.Context(), p, time.Now(), func(step string, n, total int64) {
		if step == "images" {
			last = [2]int64{n, total}
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if last[0] == 0 || last[0] != last[1] { // two services, one image
		t.Errorf("progress ends at %d of %d", last[0], last[1])
	}
	if n := s.stored(); n != len(img.Blobs)+1 { // and the body
		t.Errorf("%d blobs were stored", n)
	}
	cur := s.open(s.user, "app")
	if cur.Header.RevisionID() != done.Revision || cur.Header.ContractID() != done.Contract || cur.Header.Revision != 1 || cur.Header.Account != s.user.Account || cur.Header.Grid != s.user.Client.Grid() {
		t.Errorf("%+v", cur.Header)
	}
	if got := cur.Body.Services[0].Image; got.Manifest != img.Manifest || got.Reference != "oci:img" {
		t.Errorf("what is signed has %+v", got)
	}
	if by, err := s.user.Find(s.grid.Context(), done.Contract.String()); err != nil || by.ID != done.Contract {
		t.Errorf("by its ID: %+v %v", by, err)
	}

	// What the grid keeps shows nothing. The control: with the keys it is all there.
	if string(cur.Body.Services[0].Files[0].Data) != secretValue || !slices.Contains(cur.Body.Services[0].Environment, "PASSWORD="+secretValue) {
		t.Errorf("%+v", cur.Body.Services[0])
	}
	s.nowhere(secretValue, marker, "oci:img", string(cur.Keys.Body[:]), string(cur.Body.Certificates[0].Key))

	// Keys: for the account and both nodes, since one service may run anywhere; not for another account.
	for _, n := range []*apitest.Node{n1, n2} {
		e, err := api.Get[contract.Envelope](s.grid.Context(), s.user.Client, ledger.EnvelopeKey(done.Revision, contract.RecipientNode, n.ID))
		if err != nil {
			t.Fatalf("%s: %v", n.Name, err)
		}
		if k, err := e.Open(n.Open); err != nil || k.Body != cur.Keys.Body {
			t.Errorf("%s: %v", n.Name, err)
		}
	}
	stranger := s.newUser(8)
	if _, err := stranger.Find(s.grid.Context(), "app"); !errors.Is(err, ErrUnknown) {
		t.Errorf("a stranger finds it: %v", err)
	}
	record, err := s.user.Find(s.grid.Context(), "app")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stranger.Open(s.grid.Context(), record, record.Current); err == nil {
		t.Error("a stranger opens it")
	}
	// A stranger's contract of the same name is his own.
	if p := s.plan(stranger, app); !p.Plan.Create {
		t.Errorf("%+v", p.Plan)
	}

	// The same again is nothing.
	if err := img.WriteLayout(dir); err != nil {
		t.Fatal(err)
	}
	if p := s.plan(s.user, app); !p.Plan.Empty() {
		t.Errorf("the same file changes:\n%s", p.Plan.Text())
	}
	// Another image under the same reference is a change, and nothing but its own blobs is sent.
	if err := other.WriteLayout(dir); err != nil {
		t.Fatal(err)
	}
	p = s.plan(s.user, app)
	if len(p.Plan.Changes) != 2 || p.Plan.Create || p.Plan.Changes[0].What != "image" || !p.Plan.Changes[0].Restarts {
		t.Errorf("%s", p.Plan.Text())
	}
	s.stored()
	second := s.submit(s.user, p)
	if n := s.stored(); n != 4 { // manifest, configuration, the layer that differs, the body
		t.Errorf("%d blobs were stored", n)
	}
	next := s.open(s.user, "app")
	if second.Contract != done.Contract || next.Header.Revision != 2 || next.Header.Previous != done.Revision || next.Header.Contract != done.Contract {
		t.Errorf("%+v", next.Header)
	}
	if next.Keys.Body == cur.Keys.Body || next.Keys.Salt == cur.Keys.Salt || next.Keys.Volumes["data"] != cur.Keys.Volumes["data"] || next.Keys.Networks["default"] != cur.Keys.Networks["default"] {
		t.Error("a revision has new keys for its body, and the old ones for its data")
	}
	if !bytes.Equal(next.Body.Certificates[0].Key, cur.Body.Certificates[0].Key) {
		t.Error("a certificate that is good is made anew")
	}
	// A plan that was made on a revision that is no longer current is not signed away over the other.
	if _, err := s.user.Submit(s.grid.Context(), p, time.Now(), nil); err == nil || !strings.Contains(err.Error(), "plan again") {
		t.Errorf("%v", err)
	}

	// The body's blob is changed on the validator's disk.
	file := s.blob(fmt.Sprintf("%x", next.Header.SealedBody))
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	tampered := slices.Clone(raw)
	tampered[20] ^= 1
	for name, b := range map[string][]byte{"changed": tampered, "cut": raw[:30], "longer": append(slices.Clone(raw), 0), "empty": nil} {
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := s.user.Open(s.grid.Context(), next.Record, second.Revision); err == nil || got != nil {
			t.Errorf("a body that was %s opens", name)
		}
	}
	if err := os.WriteFile(file, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	s.open(s.user, "app") // the control

	// Its end.
	if _, err := s.user.Cancel(s.grid.Context(), done.Contract); err != nil {
		t.Fatal(err)
	}
	if _, err := s.propose(s.user, app); err == nil || !strings.Contains(err.Error(), "contract restore app") {
		t.Errorf("a revision of what ends: %v", err)
	}
	for {
		c, err := s.user.Find(s.grid.Context(), "app")
		if err != nil {
			t.Fatal(err)
		}
		if c.Over() {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	p = s.plan(s.user, app)
	if !p.Plan.Create {
		t.Errorf("%+v", p.Plan)
	}
	if again := s.submit(s.user, p); again.Contract == done.Contract {
		t.Error("a new contract has the ID of the old one")
	}
	if c, err := s.user.Find(s.grid.Context(), "app"); err != nil || c.State != ledger.Active {
		t.Errorf("of two contracts with one name the cancelled one is found: %+v %v", c, err)
	}
}

// nowhere fails if the validator's disk shows one of the texts.
func (s *site) nowhere(texts ...string) {
	s.Helper()
	files := 0
	err := filepath.WalkDir(filepath.Dir(s.grid.Blobs), func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) { // the ledger's database tidies up
			return nil
		} else if err != nil {
			return err
		}
		files++
		for _, t := range texts {
			if bytes.Contains(b, []byte(t)) {
				s.Errorf("%s shows %.40q", path, t)
			}
		}
		return nil
	})
	if err != nil || files < 5 {
		s.Fatalf("%d files were looked at: %v", files, err)
	}
}

func (s *site) blob(hex string) string { return filepath.Join(s.grid.Blobs, hex[:2], hex) }

func TestWhatAPlanRefuses(t *testing.T) {
	s := newSite(t)
	s.submit(s.user, s.plan(s.user, app))
	for _, tc := range []struct{ name, compose, want string }{
		{"a volume of another size", strings.Replace(app, "64MiB", "256MiB", 1), "volume data has 67108864 bytes and would have 268435456: a volume's size cannot change"},
		{"a host that the user's CA does not speak for", strings.Replace(app, "app.localhost", "bank.example", 1), `route bank.example: the local CA may speak for localhost only`},
		{"an image that is not there", strings.Replace(app, "oci:img", "oci:none", 1), "service web: image oci:none: "},
	} {
		if p, err := s.propose(s.user, tc.compose); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %+v %v", tc.name, p, err)
		}
	}
}

// Nothing but the user's side renews certificates: a file that is the same still has something to deploy when they end, or
// when the CA is another.
func TestCertificatesAreRenewed(t *testing.T) {
	s := newSite(t)
	s.submit(s.user, s.plan(s.user, app))
	old := s.open(s.user, "app").Body.Certificates[0]
	later := *s.user
	later.Now = func() time.Time { return time.Now().Add(ca.LeafValidity - renewal + time.Hour) }
	another, err := ca.Open(t.TempDir(), []string{"localhost"}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	moved := *s.user
	moved.CA = another
	if p := s.plan(s.user, app); !p.Plan.Empty() { // the control
		t.Fatalf("%s", p.Plan.Text())
	}
	for name, u := range map[string]*User{"before they end": &later, "from another CA": &moved} {
		p := s.plan(u, app)
		if len(p.Plan.Changes) != 1 || p.Plan.Changes[0].What != "certificate of app.localhost" || p.Plan.Changes[0].Restarts {
			t.Errorf("%s: %s", name, p.Plan.Text())
		}
	}
	p := s.plan(&later, app)
	if _, err := later.Submit(s.grid.Context(), p, later.Now(), nil); err != nil {
		t.Fatal(err)
	}
	if c := s.open(s.user, "app").Body.Certificates[0]; bytes.Equal(c.Key, old.Key) || !ca.Expires(c.Chain).After(ca.Expires(old.Chain)) {
		t.Error("it has the old one")
	}
}

// Keys go to the nodes that the placement allows and to no other.
func TestNodesThatPlacementExcludesGetNoKeys(t *testing.T) {
	s := newSite(t)
	in, out := s.grid.Node(s.user.Client, "node-1", 11), s.grid.Node(s.user.Client, "node-2", 12)
	done := s.submit(s.user, s.plan(s.user, "name: app\nservices:\n  web:\n    image: oci:img\nx-holdfast: {placement: {farms: [farm-of-node-1]}}\n"))
	get := func(n identity.NodeID) error {
		_, err := api.Get[contract.Envelope](s.grid.Context(), s.user.Client, ledger.EnvelopeKey(done.Revision, contract.RecipientNode, n))
		return err
	}
	if err := get(in.ID); err != nil { // the control
		t.Error(err)
	}
	if err := get(out.ID); !errors.Is(err, ledger.ErrAbsent) {
		t.Errorf("a node on another farm has keys: %v", err)
	}
}

// A layer that changes under the hands of a deployment stops it before anything is signed.
func TestATamperedLayerStopsADeployment(t *testing.T) {
	s := newSite(t)
	p := s.plan(s.user, app)
	img := newImage("one")
	for d, b := range img.Blobs {
		if bytes.Contains(b, []byte(marker)) {
			overwrite(t, blobPath(filepath.Join(s.dir, "img"), d), bytes.ToLower(b))
		}
	}
	if _, err := s.user.Submit(s.grid.Context(), p, time.Now(), nil); !errors.Is(err, ErrDigest) || !strings.Contains(err.Error(), "service web: blob sha256:") {
		t.Errorf("%v", err)
	}
	if all, err := s.user.Contracts(s.grid.Context()); err != nil || len(all) != 0 {
		t.Errorf("%d contracts, %v", len(all), err)
	}
	ctx, cancel := context.WithCancel(s.grid.Context())
	cancel()
	if _, err := s.user.Propose(ctx, p.Document, filepath.Join(s.dir, "compose.yaml")); !errors.Is(err, context.Canceled) {
		t.Errorf("a plan that was given up: %v", err)
	}
}

// More nodes than one transaction has room for: those that stand first get the keys, and hand them on.
func TestEnvelopesFitATransaction(t *testing.T) {
	if testing.Short() {
		t.Skip("it admits 32 nodes")
	}
	s := newSite(t)
	var nodes []*apitest.Node
	for i := range 32 {
		nodes = append(nodes, s.grid.Node(s.user.Client, fmt.Sprintf("node-%02d", i), byte(100+i)))
	}
	keys := &contract.Keys{Volumes: map[string][32]byte{}}
	for i := range 290 { // of volumes that were dropped
		keys.Volumes[fmt.Sprintf("volume-%04d", i)] = [32]byte{1}
	}
	h := s.plan(s.user, app).Document.Header
	h.Services = h.Services[1:]
	h.Services[0].Placement = contract.Placement{}
	es, err := s.user.envelopes(s.grid.Context(), &contract.Header{}, &h, contract.RevisionID{1}, keys)
	if err != nil {
		t.Fatal(err)
	}
	tx := ledger.NewTx(s.user.Client.Grid(), ledger.KindContractSubmit, ledger.Actor{ID: s.user.Account}, 1, &ledger.ContractSubmit{Header: make([]byte, contract.MaxHeader), Envelopes: es})
	tx.Sign(s.user.Keys.DeviceKey())
	if n := len(tx.Encode()); n > ledger.MaxTx || n < ledger.MaxTx*3/4 {
		t.Errorf("a transaction of %d bytes", n)
	}
	if len(es) < 10 || len(es) > 32 || es[0].Kind != contract.RecipientAccount || identity.NodeID(es[1].Recipient) != nodes[0].ID {
		t.Errorf("%d envelopes", len(es))
	}
}
