package deploy

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"holdfast/api"
	"holdfast/contract"
	"holdfast/ledger"
	"holdfast/store"
)

// Revision finds a revision of a contract by its number, among those that the contract's record lists.
func Revision(c *ledger.Contract, number int) (contract.RevisionID, error) {
	first, newest := int(c.First()), int(c.Newest())
	if number < first || number > newest {
		return contract.RevisionID{}, fmt.Errorf("%s has no revision %d: it has %d to %d", c.Name, number, first, newest)
	}
	return c.Revisions[number-first], nil
}

// ProposeRollback makes a proposal of what an earlier revision was. Images and bodies stay on the grid, so that nothing has
// to be found again; certificates are renewed where they are due, and a store stays as large as it is.
func (u *User) ProposeRollback(ctx context.Context, c *ledger.Contract, number int) (*Proposal, error) {
	rev, err := Revision(c, number)
	if err != nil {
		return nil, err
	}
	if rev == c.Current {
		return nil, fmt.Errorf("revision %d of %s is the current one", number, c.Name)
	}
	if c.State != ledger.Active && c.State != ledger.Paused {
		return nil, fmt.Errorf("%s is %s: there is nothing to roll back", c.Name, c.State)
	}
	old, err := u.Open(ctx, c, rev)
	if err != nil {
		return nil, err
	}
	p := &Proposal{}
	if p.Current, err = u.Open(ctx, c, c.Current); err != nil {
		return nil, err
	}
	doc := &contract.Document{Name: c.Name, Header: *old.Header, Body: *old.Body}
	doc.Header.Services, doc.Body.Services = slices.Clone(old.Header.Services), slices.Clone(old.Body.Services)
	doc.Header.Store = p.Current.Header.Store
	if err := u.bindStore(ctx, doc, p.Current); err != nil {
		return nil, fmt.Errorf("revision %d: %w", number, err)
	}
	p.Document = doc
	for _, check := range []func() error{
		func() error { return u.imagesKept(ctx, doc) }, func() error { return u.routesFree(ctx, c.ID, doc) }, func() error { return u.compare(ctx, p) },
	} {
		if err := check(); err != nil {
			return nil, fmt.Errorf("revision %d: %w", number, err)
		}
	}
	return p, nil
}

// imagesKept looks for the blobs of all images: nobody has the file any more that said where they came from.
func (u *User) imagesKept(ctx context.Context, doc *contract.Document) error {
	seen := map[[32]byte]bool{}
	for i := range doc.Body.Services {
		s := &doc.Body.Services[i]
		for _, b := range s.Image.Blobs {
			if seen[b.Sealed] {
				continue
			}
			seen[b.Sealed] = true
			ok, err := u.Client.HasBlob(ctx, store.Digest(b.Sealed))
			if err != nil {
				return err
			}
			if !ok {
				return fmt.Errorf("service %s: the grid does not keep %s of image %s any more: deploy a file with that image", s.Name, b.Digest, s.Image.Reference)
			}
		}
	}
	return nil
}

// routesFree looks whether another contract has taken a host meanwhile.
func (u *User) routesFree(ctx context.Context, id contract.ID, doc *contract.Document) error {
	for _, r := range doc.Header.Routes {
		if err := u.CA.Permits(r.Host); err != nil {
			return fmt.Errorf("route %s: %w", r.Host, err)
		}
		have, err := api.Get[ledger.Route](ctx, u.Client, ledger.RouteKey(r.Host))
		switch {
		case errors.Is(err, ledger.ErrAbsent):
		case err != nil:
			return err
		case have.Contract != id:
			return fmt.Errorf("route %s belongs to another contract now", r.Host)
		}
	}
	return nil
}

// Difference is what changed between two revisions of a contract; 0 is before the first.
func (u *User) Difference(ctx context.Context, c *ledger.Contract, from, to int) (*contract.Plan, error) {
	open := func(number int) (*contract.Header, *contract.Body, error) {
		if number == 0 {
			return nil, nil, nil
		}
		rev, err := Revision(c, number)
		if err != nil {
			return nil, nil, err
		}
		x, err := u.Open(ctx, c, rev)
		if err != nil {
			return nil, nil, err
		}
		return x.Header, x.Body, nil
	}
	h1, b1, err := open(from)
	if err != nil {
		return nil, err
	}
	h2, b2, err := open(to)
	if err != nil {
		return nil, err
	}
	plan := contract.Diff(h1, b1, h2, b2)
	return &plan, nil
}
