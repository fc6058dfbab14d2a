// Package deploy is the user's side of a contract: it turns a Compose file into a proposal (images found and pinned,
// certificates issued, the difference from what runs), and a proposal into a signed revision (blobs and body sealed and
// stored, envelopes for the account and every node that may run it, one transaction). Keys never leave this side but in
// envelopes.
package deploy

import (
	"bytes"
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"time"

	"holdfast/api"
	"holdfast/ca"
	"holdfast/contract"
	"holdfast/identity"
	"holdfast/ledger"
	"holdfast/store"
)

// User acts for an account with one device.
type User struct {
	Client  *api.Client
	Account identity.AccountID
	Keys    *identity.KeyFile
	CA      *ca.CA
	Now     func() time.Time // nil is time.Now
}

func (u *User) now() time.Time {
	if u.Now == nil {
		return time.Now()
	}
	return u.Now()
}

// Current is a contract as it stands.
type Current struct {
	Record *ledger.Contract
	Header *contract.Header
	Keys   *contract.Keys
	Body   *contract.Body
}

// ErrUnknown is returned for a contract that the account does not have.
var ErrUnknown = errors.New("the account has no such contract")

// Contracts reads all contracts of the account, in order of creation.
func (u *User) Contracts(ctx context.Context) ([]*ledger.Contract, error) {
	return api.List[contract.ID, ledger.Contract](ctx, u.Client, ledger.AccountWorkKey(u.Account), ledger.ContractKey)
}

// Find returns the account's contract with that name or ID. Those that have the name go before those that had it.
func (u *User) Find(ctx context.Context, name string) (*ledger.Contract, error) {
	all, err := u.Contracts(ctx)
	if err != nil {
		return nil, err
	}
	var found *ledger.Contract
	for _, c := range all {
		if c.ID.String() == name || c.Name == name && (found == nil || found.Over()) {
			found = c
		}
	}
	if found == nil {
		return nil, fmt.Errorf("%q: %w", name, ErrUnknown)
	}
	return found, nil
}

// Header reads the header of a revision.
func (u *User) Header(ctx context.Context, rev contract.RevisionID) (*contract.Header, error) {
	key := ledger.RevisionKey(rev)
	v, err := u.Client.Read(ctx, key)
	if err != nil {
		return nil, err
	}
	raw, ok := v.Value(key)
	if !ok {
		return nil, fmt.Errorf("%v: %w", rev, ledger.ErrAbsent)
	}
	h, err := contract.DecodeHeader(raw)
	if err != nil {
		return nil, err
	}
	if h.RevisionID() != rev {
		return nil, fmt.Errorf("%v holds the header of %v", rev, h.RevisionID())
	}
	return h, nil
}

// Open reads a revision with its body.
func (u *User) Open(ctx context.Context, c *ledger.Contract, rev contract.RevisionID) (*Current, error) {
	h, err := u.Header(ctx, rev)
	if err != nil {
		return nil, err
	}
	e, err := api.Get[contract.Envelope](ctx, u.Client, ledger.EnvelopeKey(rev, contract.RecipientAccount, u.Account))
	if err != nil {
		return nil, fmt.Errorf("envelope of %v: %w", rev, err)
	}
	key, err := u.Keys.OpeningKey()
	if err != nil {
		return nil, err
	}
	keys, err := e.Open(key)
	if err != nil {
		return nil, err
	}
	body, err := u.body(ctx, h, keys)
	if err != nil {
		return nil, err
	}
	return &Current{c, h, keys, body}, nil
}

// Proposal is what a deployment would change.
type Proposal struct {
	Document *contract.Document
	Current  *Current // nil: a new contract
	Plan     contract.Plan
	Breaches []contract.Breach  // where it leaves the bounds of the account's policy: it cannot be submitted
	sources  map[string]*Source // by service
}

// Propose finds the images of a document and compares it with what runs. It changes nothing.
func (u *User) Propose(ctx context.Context, doc *contract.Document, path string) (*Proposal, error) {
	p := &Proposal{Document: doc, sources: map[string]*Source{}}
	for _, r := range doc.Header.Routes {
		if err := u.CA.Permits(r.Host); err != nil {
			return nil, fmt.Errorf("route %s: %w", r.Host, err)
		}
	}
	c, err := u.Find(ctx, doc.Name)
	switch {
	case errors.Is(err, ErrUnknown), err == nil && c.Over():
	case err != nil:
		return nil, err
	case c.State == ledger.Cancelling:
		return nil, fmt.Errorf("%s is cancelled and ends at %s: take that back first (holdfast contract restore %s)", c.Name, time.UnixMilli(c.Due).UTC().Format(time.RFC3339), c.Name)
	default:
		if p.Current, err = u.Open(ctx, c, c.Current); err != nil {
			return nil, err
		}
	}
	if err := u.bindStore(ctx, doc, p.Current); err != nil {
		return nil, err
	}
	found := map[string]*Source{} // services with one reference get one image, also while a tag moves
	for i := range doc.Body.Services {
		s := &doc.Body.Services[i]
		if s.FrontEnd != nil {
			continue // the node's own program
		}
		src := found[doc.Images[s.Name]]
		if src == nil {
			var err error
			if src, err = Resolve(ctx, doc.Images[s.Name], filepath.Dir(path)); err != nil {
				return nil, fmt.Errorf("service %s: %w", s.Name, err)
			}
			found[doc.Images[s.Name]] = src
		}
		p.sources[s.Name] = src
		s.Image = contract.Image{Reference: src.Reference, Manifest: src.Manifest}
	}
	if err := u.compare(ctx, p); err != nil {
		return nil, err
	}
	return p, nil
}

// compare makes the plan of a proposal, and finds what the account's policy does not allow.
func (u *User) compare(ctx context.Context, p *Proposal) error {
	doc := p.Document
	var oldH *contract.Header
	var oldB *contract.Body
	if p.Current != nil {
		oldH, oldB = p.Current.Header, p.Current.Body
		for _, v := range doc.Header.Volumes {
			i := slices.IndexFunc(oldH.Volumes, func(o contract.Volume) bool { return o.Name == v.Name })
			if i >= 0 && oldH.Volumes[i].Size != v.Size {
				return fmt.Errorf("volume %s has %d bytes and would have %d: a volume's size cannot change; make another volume and move the data", v.Name, oldH.Volumes[i].Size, v.Size)
			}
		}
	}
	p.Plan = contract.Diff(oldH, oldB, &doc.Header, &doc.Body)
	if p.Current != nil {
		// Nothing else would ever renew one: a node has no CA.
		for _, r := range doc.Header.Routes {
			if c := p.Current.certificate(r.Host); c != nil && !u.keeps(c, u.now()) {
				p.Plan.Changes = append(p.Plan.Changes, contract.Change{What: "certificate of " + r.Host, Old: "until " + ca.Expires(c.Chain).Format(time.DateOnly), New: "a new one"})
			}
		}
	}
	var err error
	p.Breaches, err = u.outside(ctx, u.Account, &doc.Header, &doc.Body)
	return err
}

// Progress tells what Submit is doing.
type Progress func(step string, done, total int64)

// Submitted is a revision that the ledger has accepted.
type Submitted struct {
	Contract contract.ID
	Revision contract.RevisionID
	Header   *contract.Header
	Proposed *ledger.Proposal // not nil: others have a say, and it waits for them
}

// place stores blobs in the name of the account.
type place struct{ *User }

func (p place) HasBlob(ctx context.Context, d store.Digest) (bool, error) {
	return p.Client.HasBlob(ctx, d)
}

func (p place) Put(ctx context.Context, d store.Digest, size int64, r io.Reader) error {
	return p.Client.PutBlob(ctx, d, size, r, p.Account, p.Keys.DeviceKey())
}

// Submit seals, stores, signs and submits a proposal.
func (u *User) Submit(ctx context.Context, p *Proposal, now time.Time, progress Progress) (*Submitted, error) {
	if progress == nil {
		progress = func(string, int64, int64) {}
	}
	if len(p.Breaches) > 0 {
		return nil, OutsideError(p.Breaches)
	}
	var total, done int64
	counted, known := map[string]bool{}, map[string]contract.Blob{}
	for _, s := range p.sources {
		if counted[s.Manifest] {
			continue
		}
		counted[s.Manifest] = true
		for _, b := range s.Blobs {
			total += b.Size
		}
	}
	if p.Current != nil {
		for i := range p.Current.Body.Services {
			for _, b := range p.Current.Body.Services[i].Image.Blobs {
				known[b.Digest] = b
			}
		}
	}
	h, body := p.Document.Header, p.Document.Body
	body.Services = slices.Clone(body.Services)
	images := map[string]*contract.Image{} // services that share an image push it once
	for i := range body.Services {
		s := &body.Services[i]
		if s.FrontEnd != nil {
			continue
		}
		src := p.sources[s.Name]
		if src == nil {
			continue // of an earlier revision, and on the grid
		}
		img := images[src.Manifest]
		if img == nil {
			var err error
			img, err = Push(ctx, src, u.Keys.BlobSecret(), place{u}, known, func(n int64) {
				done += n
				progress("images", done, total)
			})
			if err != nil {
				return nil, fmt.Errorf("service %s: %w", s.Name, err)
			}
			images[src.Manifest] = img
		}
		s.Image = *img
		s.Image.Reference = src.Reference
	}
	h.Version, h.Grid, h.Account, h.Revision = contract.Version, u.Client.Grid(), u.Account, 1
	body.Version = contract.Version
	var previous *contract.Keys
	was := &contract.Header{}
	if c := p.Current; c != nil {
		was = c.Header
		h.Revision, h.Contract, h.Previous, previous = c.Record.Newest()+1, c.Record.ID, c.Record.Current, c.Keys
	}
	body.Certificates = nil
	for _, r := range h.Routes {
		cert, err := u.certificate(p.Current, r.Host, now)
		if err != nil {
			return nil, err
		}
		body.Certificates = append(body.Certificates, *cert)
	}
	progress("sealing", 0, 0)
	keys := contract.NewKeys(&h, previous)
	if err := u.pinVolumes(&h, keys); err != nil {
		return nil, err
	}
	sealed, err := contract.Seal(&h, keys, &body)
	if err != nil {
		return nil, err
	}
	if err := h.Validate(); err != nil {
		return nil, fmt.Errorf("contract header: %w", err)
	}
	if _, err := contract.Open(&h, keys, sealed); err != nil { // what we sign is what others will open
		return nil, err
	}
	if err := (place{u}).Put(ctx, h.SealedBody, int64(len(sealed)), bytes.NewReader(sealed)); err != nil {
		return nil, fmt.Errorf("store body: %w", err)
	}
	rev := h.RevisionID()
	envelopes, err := u.envelopes(ctx, was, &h, rev, keys)
	if err != nil {
		return nil, err
	}
	progress("signing", 0, 0)
	proposed, err := u.propose(ctx, ledger.KindContractSubmit, &ledger.ContractSubmit{Header: h.Encode(), Envelopes: envelopes})
	if err != nil {
		return nil, err
	}
	return &Submitted{Contract: h.ContractID(), Revision: rev, Header: &h, Proposed: proposed}, nil
}

// renewal is how long before its end a certificate is replaced.
const renewal = 30 * 24 * time.Hour

// certificate is the one that a revision has for a host, or nil.
func (c *Current) certificate(host string) *contract.Certificate {
	for i := range c.Body.Certificates {
		if c.Body.Certificates[i].Host == host {
			return &c.Body.Certificates[i]
		}
	}
	return nil
}

// keeps says whether a certificate is good for a while, and from the user's CA as it is now.
func (u *User) keeps(c *contract.Certificate, now time.Time) bool {
	root, _ := pem.Decode(u.CA.Root())
	return ca.Expires(c.Chain).After(now.Add(renewal)) && root != nil && bytes.Equal(c.Chain[len(c.Chain)-1], root.Bytes)
}

// certificate keeps the one that runs while it is good.
func (u *User) certificate(c *Current, host string, now time.Time) (*contract.Certificate, error) {
	if c != nil {
		if old := c.certificate(host); old != nil && u.keeps(old, now) {
			return old, nil
		}
	}
	chain, key, err := u.CA.Issue(host, now)
	if err != nil {
		return nil, err
	}
	return &contract.Certificate{Host: host, Chain: chain, Key: key}, nil
}

// envelopes are for the account and for every node that the placement allows, as many as one transaction holds: nodes hand
// the keys on to the rest.
func (u *User) envelopes(ctx context.Context, was, h *contract.Header, rev contract.RevisionID, keys *contract.Keys) ([]contract.Envelope, error) {
	key, err := u.Keys.OpeningKey()
	if err != nil {
		return nil, err
	}
	pub := key.Public()
	e, err := contract.SealEnvelope(rev, contract.RecipientAccount, u.Account, &pub, keys)
	if err != nil {
		return nil, err
	}
	out := []contract.Envelope{*e}
	others, err := u.parties(ctx, was, h)
	if err != nil {
		return nil, err
	}
	for _, o := range others { // who has a say opens what he consents to
		if e, err = contract.SealEnvelope(rev, contract.RecipientAccount, o.ID, &o.Sealing, keys); err != nil {
			return nil, err
		}
		out = append(out, *e)
	}
	room := ledger.MaxTx - contract.MaxHeader - 16<<10 // signatures and the rest
	for i := range out[1:] {
		room -= len(out[1+i].Sealed) + 128
	}
	nodes, err := u.Client.Nodes(ctx)
	if err != nil {
		return nil, err
	}
	for _, n := range nodes {
		if !ledger.Eligible(h, n) {
			continue
		}
		if e, err = contract.SealEnvelope(rev, contract.RecipientNode, n.ID, &n.Sealing, keys); err != nil {
			return nil, err
		}
		if room -= len(e.Sealed) + 128; room < 0 {
			break
		}
		out = append(out, *e)
	}
	return out, nil
}

func (u *User) act(ctx context.Context, kind ledger.Kind, payload any) (*ledger.Tx, error) {
	return u.Client.Act(ctx, kind, ledger.Actor{ID: u.Account}, payload, u.Keys.DeviceKey())
}
