package ledger

import (
	"errors"
	"fmt"

	"holdfast/contract"
	"holdfast/identity"
)

// Quota bounds, or counts, what active contracts take of what a grid has only so much of.
type Quota struct {
	Contracts int `cbor:"1,keyasint" json:"contracts"`
	Workloads int `cbor:"2,keyasint" json:"workloads"`
	Networks  int `cbor:"3,keyasint" json:"networks"`
	Hosts     int `cbor:"4,keyasint" json:"hosts"`                      // of routes
	Storage   int `cbor:"5,keyasint,omitzero" json:"storage,omitempty"` // bytes that stores take on one location, those of cancelled contracts too
}

// Limits are a grid's quotas; one that is zero is that of DefaultLimits. An account costs nothing, so that a bound on each
// stops nobody: a stranger makes a thousand. Therefore those to whom the grid gave no quota of their own (account.quota) are
// bounded together as well, and whatever they do leaves room for those to whom it did.
type Limits struct {
	Account Quota `cbor:"1,keyasint,omitzero" json:"account,omitzero"` // of an account without a quota of its own
	Shared  Quota `cbor:"2,keyasint,omitzero" json:"shared,omitzero"`  // of all these together
	Growth  int   `cbor:"3,keyasint,omitzero" json:"growth,omitempty"` // bytes of transactions an hour of all these that leave something for good
}

// Default quota of an account: far above what one user deploys.
const (
	MaxAccountContracts = 256
	MaxAccountWorkloads = 2048
	MaxAccountNetworks  = 512
	MaxAccountHosts     = 512
	MaxAccountStorage   = 16 << 30
)

// DefaultLimits leave most of what a grid can have (65536 contracts, 29999 networks, 4 MiB of host names) to the accounts
// that it knows.
func DefaultLimits() Limits {
	return Limits{
		Account: Quota{MaxAccountContracts, MaxAccountWorkloads, MaxAccountNetworks, MaxAccountHosts, MaxAccountStorage},
		Shared:  Quota{4096, 16384, 8192, 4096, 256 << 30},
		Growth:  16 << 20,
	}
}

// OwnQuota is what a grid gives an account that it knows, when nothing else was agreed.
func OwnQuota() Quota { return Quota{1024, 8192, 2048, 2048, 1 << 40} }

func (l Limits) orDefault() Limits {
	d := DefaultLimits()
	if l.Account == (Quota{}) {
		l.Account = d.Account
	}
	if l.Shared == (Quota{}) {
		l.Shared = d.Shared
	}
	if l.Growth <= 0 {
		l.Growth = d.Growth
	}
	return l
}

// usage counts what a header takes; an empty one takes nothing.
func usage(h *contract.Header) Quota {
	u := Quota{Networks: len(h.Networks), Hosts: len(h.Routes), Storage: int(h.Store.Limit)}
	if h.Version != 0 {
		u.Contracts = 1
	}
	for i := range h.Volumes {
		u.Storage += int(h.Volumes[i].Store.Limit)
	}
	for i := range h.Services {
		u.Workloads += int(h.Services[i].Replicas)
	}
	return u
}

// plus is q with sign times o.
func (q Quota) plus(o Quota, sign int) Quota {
	return Quota{q.Contracts + sign*o.Contracts, q.Workloads + sign*o.Workloads, q.Networks + sign*o.Networks, q.Hosts + sign*o.Hosts, q.Storage + sign*o.Storage}
}

// grow checks a usage that was was and will be is. Who is above q already can still become less.
func (q Quota) grow(was, is Quota) error {
	for _, x := range []struct {
		what           string
		was, is, limit int
	}{
		{"contracts", was.Contracts, is.Contracts, q.Contracts},
		{"workloads", was.Workloads, is.Workloads, q.Workloads},
		{"networks", was.Networks, is.Networks, q.Networks},
		{"hosts", was.Hosts, is.Hosts, q.Hosts},
		{"bytes of storage on a location", was.Storage, is.Storage, q.Storage},
	} {
		if x.is > x.was && x.is > x.limit {
			return fmt.Errorf("would have %d %s, at most %d are allowed", x.is, x.what, x.limit)
		}
	}
	return nil
}

// max is of each kind the more.
func (q Quota) max(o Quota) Quota {
	return Quota{
		max(q.Contracts, o.Contracts), max(q.Workloads, o.Workloads), max(q.Networks, o.Networks), max(q.Hosts, o.Hosts), max(q.Storage, o.Storage),
	}
}

// bill makes an account's usage more by is and less by was.
func (b *batch) bill(id identity.AccountID, was, will Quota) error {
	used, err := orZero(get[Quota](&b.State, AccountUsedKey(id)))
	if err != nil {
		return fmt.Errorf("usage of %v: %w", id, err)
	}
	is := used.plus(was, -1).plus(will, 1)
	quota, err := get[Quota](&b.State, QuotaKey(id))
	switch {
	case errors.Is(err, ErrAbsent):
		g, err := b.Genesis()
		if err != nil {
			return err
		}
		limits := g.Limits.orDefault()
		if err := b.share(limits.Shared, was, will); err != nil {
			return err
		}
		quota = &limits.Account
	case err != nil:
		return fmt.Errorf("quota of %v: %w", id, err)
	}
	if err := quota.grow(*used, is); err != nil {
		return fmt.Errorf("the account %w", err)
	}
	set(b, AccountUsedKey(id), &is)
	return nil
}

// share changes what all accounts without a quota of their own use together.
func (b *batch) share(limit, less, more Quota) error {
	all, err := orZero(get[Quota](&b.State, SharedKey))
	if err != nil {
		return fmt.Errorf("what accounts share: %w", err)
	}
	is := all.plus(less, -1).plus(more, 1)
	if err := limit.grow(*all, is); err != nil {
		return fmt.Errorf("all accounts without a quota of their own %w: ask the grid for a quota", err)
	}
	set(b, SharedKey, &is)
	return nil
}

func (b *batch) accountQuota(who *signers, p *AccountQuota) error {
	if err := who.allowed(b.grid().Account, identity.ActSetQuota); err != nil {
		return err
	}
	if _, ok := b.tree.get(AccountKey(p.Account)); !ok {
		return fmt.Errorf("%v: %w", p.Account, ErrAbsent)
	}
	if q := p.Quota; min(q.Contracts, q.Workloads, q.Networks, q.Hosts, q.Storage) < 0 || q.Contracts > maxList {
		return fmt.Errorf("a quota of %+v", q)
	}
	if _, own := b.tree.get(QuotaKey(p.Account)); !own { // what it has counts among the others' no more
		used, err := orZero(get[Quota](&b.State, AccountUsedKey(p.Account)))
		if err != nil {
			return fmt.Errorf("usage of %v: %w", p.Account, err)
		}
		if err := b.share(Quota{}, *used, Quota{}); err != nil {
			return err
		}
	}
	set(b, QuotaKey(p.Account), &p.Quota)
	return who.agreed(identity.ActSetQuota)
}
