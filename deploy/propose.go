package deploy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"holdfast/api"
	"holdfast/contract"
	"holdfast/identity"
	"holdfast/ledger"
)

// propose acts for the account. What others have a say in is a proposal then.
func (u *User) propose(ctx context.Context, kind ledger.Kind, payload any) (*ledger.Proposal, error) {
	tx, err := u.act(ctx, kind, payload)
	if err != nil {
		return nil, err
	}
	p, err := api.Get[ledger.Proposal](ctx, u.Client, ledger.ProposalKey(ledger.ProposalID(tx.ID())))
	if errors.Is(err, ledger.ErrAbsent) {
		return nil, nil
	}
	return p, err
}

// parties are the accounts other than the user's that have a say in a revision: those of the one before too.
func (u *User) parties(ctx context.Context, was, h *contract.Header) ([]*identity.Account, error) {
	own, err := api.Get[identity.Account](ctx, u.Client, ledger.AccountKey(u.Account))
	if err != nil {
		return nil, err
	}
	var ids []identity.AccountID
	var keys []string
	for _, a := range slices.Concat(was.Approvals, h.Approvals, own.Policy.Approvals) {
		for _, p := range a.Parties {
			if p.Account != u.Account && !slices.Contains(ids, p.Account) {
				ids, keys = append(ids, p.Account), append(keys, ledger.AccountKey(p.Account))
			}
		}
	}
	out, err := api.GetAll[identity.Account](ctx, u.Client, keys)
	if err != nil {
		return nil, err
	}
	for i, a := range out {
		if a == nil {
			return nil, fmt.Errorf("%v has a say, and there is no such account", ids[i])
		}
	}
	return out, nil
}

// Cancel begins a contract's end.
func (u *User) Cancel(ctx context.Context, id contract.ID) (*ledger.Proposal, error) {
	return u.propose(ctx, ledger.KindContractCancel, &ledger.ContractCancel{Contract: id})
}

// SetState pauses a contract, or makes it active again, which takes back that it ends.
func (u *User) SetState(ctx context.Context, id contract.ID, state string) (*ledger.Proposal, error) {
	return u.propose(ctx, ledger.KindContractState, &ledger.ContractState{Contract: id, State: state})
}

// RestoreVolume puts a volume back to a snapshot.
func (u *User) RestoreVolume(ctx context.Context, id contract.VolumeID, snapshot [32]byte) (*ledger.Proposal, error) {
	return u.propose(ctx, ledger.KindVolumeRestore, &ledger.VolumeRestore{Volume: id, Snapshot: snapshot})
}

// SetPolicy proposes a policy for the account.
func (u *User) SetPolicy(ctx context.Context, p identity.Policy) (*ledger.Proposal, error) {
	return u.propose(ctx, ledger.KindAccountPolicy, &ledger.AccountPolicy{Policy: p})
}

// Proposals are those that are open: the account's own, and those that ask for its consent.
func (u *User) Proposals(ctx context.Context) (own, asked []*ledger.Proposal, err error) {
	if own, err = api.List[ledger.ProposalID, ledger.Proposal](ctx, u.Client, ledger.ProposalsKey(u.Account), ledger.ProposalKey); err != nil {
		return nil, nil, err
	}
	asked, err = api.List[ledger.ProposalID, ledger.Proposal](ctx, u.Client, ledger.AskedKey(u.Account), ledger.ProposalKey)
	return own, asked, err
}

// Review is a proposal as one of those who decide sees it.
type Review struct {
	Proposal *ledger.Proposal
	Tx       *ledger.Tx
	Header   *contract.Header // of the revision that is proposed, if one is
	Body     *contract.Body
	Plan     contract.Plan
	Breaches []contract.Breach // where the revision leaves the bounds of its account's policy: nobody is to consent
	Blind    bool              // nobody gave the account the keys of the current revision: the plan shows all as new
}

// ErrSealed is returned for a proposal that the account cannot open.
var ErrSealed = errors.New("there is no envelope for this account: who proposes must seal one for everybody who has a say")

// Review reads a proposal, opens the revision that it proposes, recomputes what its header commits to, and compares it with
// the current one. Nobody is to consent to what he has not seen.
func (u *User) Review(ctx context.Context, id ledger.ProposalID) (*Review, error) {
	p, err := api.Get[ledger.Proposal](ctx, u.Client, ledger.ProposalKey(id))
	if errors.Is(err, ledger.ErrAbsent) {
		return nil, fmt.Errorf("there is no open proposal %v: it came true, was withdrawn, or its time is over", id)
	} else if err != nil {
		return nil, err
	}
	r := &Review{Proposal: p}
	if r.Tx, err = p.Transaction(); err != nil {
		return nil, err
	}
	if p.ID != id {
		return nil, fmt.Errorf("%v holds %v", id, p.ID)
	}
	if r.Tx.Kind != ledger.KindContractSubmit {
		return r, nil
	}
	s, err := ledger.Payload[ledger.ContractSubmit](r.Tx)
	if err != nil {
		return nil, err
	}
	if r.Header, err = contract.DecodeHeader(s.Header); err != nil {
		return nil, err
	}
	i := slices.IndexFunc(s.Envelopes, func(e contract.Envelope) bool {
		return e.Revision == r.Header.RevisionID() && e.Kind == contract.RecipientAccount && e.Recipient == u.Account
	})
	if i < 0 {
		return nil, fmt.Errorf("%v: %w", id, ErrSealed)
	}
	if r.Body, err = u.unseal(ctx, r.Header, &s.Envelopes[i]); err != nil {
		return nil, err
	}
	var oldH *contract.Header
	var oldB *contract.Body
	if r.Header.Revision > 1 {
		if oldH, oldB, err = u.current(ctx, r.Header.ContractID()); errors.Is(err, ledger.ErrAbsent) {
			r.Blind = true
		} else if err != nil {
			return nil, err
		}
	}
	r.Plan = contract.Diff(oldH, oldB, r.Header, r.Body)
	r.Breaches, err = u.outside(ctx, p.Account, r.Header, r.Body)
	return r, err
}

// current opens a contract's current revision, whosever it is; ErrAbsent: with no envelope for the account.
func (u *User) current(ctx context.Context, id contract.ID) (*contract.Header, *contract.Body, error) {
	c, err := api.Get[ledger.Contract](ctx, u.Client, ledger.ContractKey(id))
	if err != nil {
		return nil, nil, err
	}
	h, err := u.Header(ctx, c.Current)
	if err != nil {
		return nil, nil, err
	}
	e, err := api.Get[contract.Envelope](ctx, u.Client, ledger.EnvelopeKey(c.Current, contract.RecipientAccount, u.Account))
	if err != nil {
		return nil, nil, err
	}
	b, err := u.unseal(ctx, h, e)
	return h, b, err
}

// unseal opens an envelope, and with it the body.
func (u *User) unseal(ctx context.Context, h *contract.Header, e *contract.Envelope) (*contract.Body, error) {
	key, err := u.Keys.OpeningKey()
	if err != nil {
		return nil, err
	}
	keys, err := e.Open(key)
	if err != nil {
		return nil, err
	}
	return u.body(ctx, h, keys)
}

// body fetches a sealed body and opens it.
func (u *User) body(ctx context.Context, h *contract.Header, keys *contract.Keys) (*contract.Body, error) {
	sealed, err := u.SealedBody(ctx, h)
	if err != nil {
		return nil, err
	}
	return contract.Open(h, keys, sealed)
}

// SealedBody fetches the body of a revision as it is stored.
func (u *User) SealedBody(ctx context.Context, h *contract.Header) ([]byte, error) {
	r, _, err := u.Client.OpenBlob(ctx, h.SealedBody)
	if err != nil {
		return nil, fmt.Errorf("body of %v: %w", h.RevisionID(), err)
	}
	defer r.Close()
	sealed, err := io.ReadAll(io.LimitReader(r, contract.MaxBody+1<<10))
	if err != nil {
		return nil, fmt.Errorf("body of %v: %w", h.RevisionID(), err)
	}
	return sealed, nil
}

// Consent gives the account's word to a proposal, which Review has shown. It says whether that was enough.
func (u *User) Consent(ctx context.Context, r *Review) (left *ledger.Proposal, err error) {
	if len(r.Breaches) > 0 {
		return nil, OutsideError(r.Breaches)
	}
	if _, err := u.act(ctx, ledger.KindConsent, &ledger.Consent{Proposal: r.Proposal.ID}); err != nil {
		return nil, err
	}
	left, err = api.Get[ledger.Proposal](ctx, u.Client, ledger.ProposalKey(r.Proposal.ID))
	if errors.Is(err, ledger.ErrAbsent) {
		return nil, nil
	}
	return left, err
}

// Withdraw ends a proposal of the account.
func (u *User) Withdraw(ctx context.Context, id ledger.ProposalID) error {
	_, err := u.act(ctx, ledger.KindWithdraw, &ledger.Withdraw{Proposal: id})
	return err
}
