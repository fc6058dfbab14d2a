package ledger

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"holdfast/contract"
	"holdfast/identity"
	"holdfast/internal/canonical"
)

// What others have a say in is proposed: the transaction is tried, found good but for their consent, and kept. Each consent
// is a transaction of its own, by another account under its own policy, and names the proposal by the digest of all that was
// signed. The one that is enough executes what was proposed, as if it had come then: against the state, the policy and the
// contract as they are at that moment. What took effect since, a stricter policy among it, counts.

type proposalKind struct{}

func (proposalKind) Prefix() string { return "prop" }

// A ProposalID is the ID of the transaction that proposes.
type ProposalID = identity.ID[proposalKind]

// Proposal is a transaction that waits for consent, or for its time.
type Proposal struct {
	ID        ProposalID           `cbor:"1,keyasint" json:"id"`
	Kind      Kind                 `cbor:"2,keyasint" json:"kind"`
	Account   identity.AccountID   `cbor:"3,keyasint" json:"account"`
	Contract  contract.ID          `cbor:"4,keyasint,omitzero" json:"contract,omitzero"`
	Tx        []byte               `cbor:"5,keyasint" json:"-"` // without signatures
	Devices   []identity.DeviceID  `cbor:"6,keyasint" json:"devices"`
	Missing   []identity.Approval  `cbor:"7,keyasint,omitempty" json:"missing,omitempty"` // what more is needed, as of the last consent
	Consented []identity.AccountID `cbor:"8,keyasint,omitempty" json:"consented,omitempty"`
	Until     int64                `cbor:"9,keyasint" json:"until"`                      // Unix milliseconds: it ends then
	Ripe      int64                `cbor:"10,keyasint,omitempty" json:"ripe,omitempty"`  // Unix milliseconds: all have consented, and it comes true then
	Shared    bool                 `cbor:"11,keyasint,omitempty" json:"-"`               // it is one of those of accounts without a quota of their own
	Asked     []identity.AccountID `cbor:"12,keyasint,omitempty" json:"asked,omitempty"` // whose consent counts, or did
}

// Bounds of proposals that are open, of one account and of all without a quota of their own: each keeps its transaction in
// every validator's memory.
const (
	MaxAccountProposals = 16
	maxSharedProposals  = 128
)

// unripe is what a good transaction returns that others have a say in, or that takes effect later.
type unripe struct {
	contract contract.ID
	missing  []identity.Approval
	delay    time.Duration // after the last consent
}

func (u *unripe) Error() string {
	var names []string
	for _, a := range u.missing {
		names = append(names, a.Name)
	}
	return "it needs the consent of " + strings.Join(names, ", ")
}

// agreed returns unripe when an approval of the account's policy, or one of more, is missing.
func (w *signers) agreed(act identity.Act, more ...[]identity.Approval) error {
	var missing []identity.Approval
	given := append([]identity.AccountID{w.account.ID}, w.consented...)
	for _, all := range append([][]identity.Approval{w.account.Policy.Consents(act)}, more...) {
		for _, a := range all {
			if a.Given(given) < int(a.Need) && !slices.ContainsFunc(missing, func(m identity.Approval) bool { return sameApproval(&m, &a) }) {
				missing = append(missing, a)
			}
		}
	}
	if len(missing) > 0 {
		return &unripe{missing: missing}
	}
	return nil
}

func sameApproval(a, b *identity.Approval) bool {
	return string(canonical.Encode(a)) == string(canonical.Encode(b))
}

// kept are the approvals of the revision before that have a say in the next one: those of the act, and those that it
// changes or drops, whatever they are of. Nobody takes his co-signers out alone.
func kept(was, h *contract.Header, act identity.Act) []identity.Approval {
	var out []identity.Approval
	for _, a := range was.Approvals {
		if a.Of(act) || !slices.ContainsFunc(h.Approvals, func(b identity.Approval) bool { return sameApproval(&a, &b) }) {
			out = append(out, a)
		}
	}
	return out
}

// readers are the accounts that can be given a revision's keys: its owner, and who has a say, by the revision before too.
func readers(owner *identity.Account, was, h *contract.Header) []identity.AccountID {
	out := []identity.AccountID{owner.ID}
	for _, a := range slices.Concat(was.Approvals, h.Approvals, owner.Policy.Approvals) {
		for _, p := range a.Parties {
			out = append(out, p.Account)
		}
	}
	return out
}

// propose keeps a transaction that is unripe. A consent that is given before its time changes what is kept.
func (b *batch) propose(tx *Tx, who *signers, u *unripe) error {
	bare := *tx
	bare.Signatures = nil
	p := &Proposal{
		ID: ProposalID(tx.ID()), Kind: tx.Kind, Account: who.account.ID, Contract: u.contract, Tx: bare.Encode(), Devices: who.devices,
		Missing: u.missing, Until: b.clock.Time + b.delays().Proposal.Milliseconds(),
	}
	if err := b.openProposal(p); err != nil {
		return err
	}
	if err := b.ripen(p, u); err != nil {
		return err
	}
	set(b, ProposalKey(p.ID), p)
	return b.remind(p.Until, dueProposal, p.ID)
}

// ripen asks those whose consent is missing, or starts the time that a proposal still has to wait when nothing else is.
func (b *batch) ripen(p *Proposal, u *unripe) error {
	p.Missing, p.Ripe = u.missing, 0
	if len(u.missing) == 0 {
		p.Ripe = b.clock.Time + u.delay.Milliseconds()
		p.Until = p.Ripe
	}
	for _, a := range p.Missing {
		for _, q := range a.Parties {
			if q.Account == p.Account || slices.Contains(p.Asked, q.Account) {
				continue
			}
			p.Asked = append(p.Asked, q.Account)
			if err := push(b, AskedKey(q.Account), p.ID); err != nil {
				return err
			}
		}
	}
	return nil
}

func (b *batch) openProposal(p *Proposal) error {
	n, _, err := items(&b.State, ProposalsKey(p.Account))
	if err != nil {
		return err
	}
	if n >= MaxAccountProposals {
		return fmt.Errorf("the account has %d proposals that are open: withdraw one", n)
	}
	if _, own := b.tree.get(QuotaKey(p.Account)); !own && p.Account != b.grid().Account {
		p.Shared = true
		if err := b.shareProposals(1); err != nil {
			return err
		}
	}
	return push(b, ProposalsKey(p.Account), p.ID)
}

// shareProposals counts those of accounts without a quota of their own.
func (b *batch) shareProposals(more int) error {
	n, err := orZero(get[int](&b.State, openKey))
	if err != nil {
		return fmt.Errorf("number of proposals: %w", err)
	}
	if *n += more; *n > maxSharedProposals {
		return errors.New("accounts without a quota of their own have too many proposals: ask the grid for a quota, or try later")
	}
	set(b, openKey, n)
	return nil
}

// closeProposal forgets one.
func (b *batch) closeProposal(p *Proposal) error {
	if p.Shared {
		if err := b.shareProposals(-1); err != nil {
			return err
		}
	}
	for _, id := range p.Asked {
		if err := drop(b, AskedKey(id), p.ID); err != nil {
			return err
		}
	}
	b.del(ProposalKey(p.ID))
	return drop(b, ProposalsKey(p.Account), p.ID)
}

// consent adds an account's word, and executes what is then good.
func (b *batch) consent(who *signers, c *Consent) error {
	if who.account == nil {
		return errors.New("only an account can consent")
	}
	p, err := get[Proposal](&b.State, ProposalKey(c.Proposal))
	if err != nil {
		return fmt.Errorf("%v: %w", c.Proposal, err)
	}
	if err := who.allowed(who.account.ID, identity.ActApprove); err != nil {
		return err
	}
	id := who.account.ID
	switch {
	case id == p.Account:
		return errors.New("the account that proposes has consented by that")
	case slices.Contains(p.Consented, id):
		return errors.New("the account has consented already")
	case !slices.ContainsFunc(p.Missing, func(a identity.Approval) bool { return a.Has(id) }):
		return fmt.Errorf("%v has no say in %v", id, p.ID)
	}
	p.Consented = append(p.Consented, id)
	return b.attempt(p, false)
}

// attempt executes a proposal, or keeps what it still waits for.
func (b *batch) attempt(p *Proposal, ripe bool) error {
	tx, who, err := b.proposed(p)
	if err != nil {
		return err
	}
	who.ripe = ripe
	before := *b
	err = b.execute(tx, who)
	if u := new(unripe); errors.As(err, &u) {
		*b = before
		if err := b.ripen(p, u); err != nil {
			return err
		}
		set(b, ProposalKey(p.ID), p)
		if p.Ripe == 0 {
			return nil
		}
		return b.remind(p.Ripe, dueProposal, p.ID)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", tx.Kind, err)
	}
	return b.closeProposal(p)
}

// proposed is a proposal's transaction and its signers, as they are now: a device that the account has no more does not
// count.
func (b *batch) proposed(p *Proposal) (*Tx, *signers, error) {
	tx, err := p.Transaction()
	if err != nil {
		return nil, nil, err
	}
	account, err := get[identity.Account](&b.State, AccountKey(p.Account))
	if err != nil {
		return nil, nil, fmt.Errorf("%v: %w", p.Account, err)
	}
	return tx, &signers{devices: p.Devices, account: account, consented: p.Consented}, nil
}

// Transaction is what is proposed. Its ID is the proposal's.
func (p *Proposal) Transaction() (*Tx, error) {
	var tx Tx
	if err := canonical.Decode(p.Tx, MaxTx, &tx); err != nil {
		return nil, fmt.Errorf("proposal: %w", err)
	}
	if got := ProposalID(tx.ID()); got != p.ID {
		return nil, fmt.Errorf("proposal %v holds %v", p.ID, got)
	}
	return &tx, nil
}

// withdraw ends a proposal, by whoever could have made it.
func (b *batch) withdraw(who *signers, w *Withdraw) error {
	p, err := get[Proposal](&b.State, ProposalKey(w.Proposal))
	if err != nil {
		return fmt.Errorf("%v: %w", w.Proposal, err)
	}
	if who.account == nil || who.account.ID != p.Account {
		return fmt.Errorf("only %v can withdraw what it proposed", p.Account)
	}
	if !who.could(p.Kind) {
		return notAllowed{errors.New("withdrawing needs the signatures that proposing needs")}
	}
	return b.closeProposal(p)
}

// proposalDue ends a proposal whose time is over, or makes one come true whose time has come. One that cannot come true
// any more ends too.
func (b *batch) proposalDue(id ProposalID) error {
	p, err := get[Proposal](&b.State, ProposalKey(id))
	switch {
	case errors.Is(err, ErrAbsent):
		return nil // withdrawn, or it came true
	case err != nil:
		return err
	case b.clock.Time < p.Until:
		return nil // it waits for another time
	case p.Ripe == 0:
		return b.closeProposal(p)
	}
	before := *b
	if err := b.attempt(p, true); err != nil {
		*b = before
		return b.closeProposal(p)
	}
	return nil
}

// accountPolicy replaces the account's policy, by all that the old one asks for and after a while, in which its devices can
// see it and take it back.
func (b *batch) accountPolicy(who *signers, p *AccountPolicy) error {
	if who.account == nil {
		return errors.New("only an account can do this")
	}
	if err := who.allowed(who.account.ID, identity.ActPolicy); err != nil {
		return err
	}
	a := *who.account
	a.Policy = p.Policy
	if err := a.Validate(); err != nil {
		return err
	}
	for _, x := range p.Policy.Approvals {
		for _, q := range x.Parties {
			if _, ok := b.tree.get(AccountKey(q.Account)); !ok {
				return fmt.Errorf("approval %q: %v: %w", x.Name, q.Account, ErrAbsent)
			}
		}
	}
	for _, id := range p.Policy.Bounds.Signers {
		if _, ok := b.tree.get(AccountKey(id)); !ok {
			return fmt.Errorf("signer %v: %w", id, ErrAbsent)
		}
	}
	if err := who.agreed(identity.ActPolicy); err != nil {
		return err
	}
	if !who.ripe {
		return &unripe{delay: b.delays().Policy}
	}
	set(b, AccountKey(a.ID), &a)
	return nil
}
