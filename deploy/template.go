package deploy

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"strings"

	"holdfast/api"
	"holdfast/contract"
	"holdfast/identity"
	"holdfast/ledger"
)

// ParseTemplate reads [ACCOUNT/]NAME@VERSION; without an account it is own's.
func ParseTemplate(ref string, own identity.AccountID) (account identity.AccountID, name, version string, err error) {
	account = own
	if owner, rest, ok := strings.Cut(ref, "/"); ok {
		if err := account.UnmarshalText([]byte(owner)); err != nil {
			return account, "", "", err
		}
		ref = rest
	}
	name, version, ok := strings.Cut(ref, "@")
	if !ok {
		return account, "", "", fmt.Errorf("%q is no template: write [ACCOUNT/]NAME@VERSION", ref)
	}
	return account, name, version, contract.ValidTemplateName(name, version)
}

// Template reads a template: what the ledger says of it, and its document, which is the one that was published.
func (u *User) Template(ctx context.Context, ref string) (*ledger.Template, []byte, error) {
	account, name, version, err := ParseTemplate(ref, u.Account)
	if err != nil {
		return nil, nil, err
	}
	t, err := api.Get[ledger.Template](ctx, u.Client, ledger.TemplateKey(account, name, version))
	if errors.Is(err, ledger.ErrAbsent) {
		return nil, nil, fmt.Errorf("%v has no template %s@%s", account, name, version)
	} else if err != nil {
		return nil, nil, err
	}
	raw, err := u.TemplateDocument(ctx, t.Digest)
	if err != nil {
		return nil, nil, fmt.Errorf("%s@%s: %w", name, version, err)
	}
	return t, raw, nil
}

// TemplateDocument reads a template's document by its digest.
func (u *User) TemplateDocument(ctx context.Context, digest [32]byte) ([]byte, error) {
	r, _, err := u.Client.OpenBlob(ctx, digest)
	if err != nil {
		return nil, fmt.Errorf("document: %w", err)
	}
	defer r.Close()
	raw, err := io.ReadAll(io.LimitReader(r, contract.MaxCompose+1))
	if err != nil {
		return nil, fmt.Errorf("document: %w", err)
	}
	if sha256.Sum256(raw) != digest {
		return nil, errors.New("document: what the grid gives out is not what was published")
	}
	return raw, nil
}

// Expand loads a template with values for its parameters, as a document to propose.
func (u *User) Expand(ctx context.Context, ref string, set map[string]string) (*contract.Document, error) {
	t, raw, err := u.Template(ctx, ref)
	if err != nil {
		return nil, err
	}
	return contract.Load(ctx, contract.Input{
		Raw: raw, Set: set, Template: &contract.Origin{Account: t.Account, Name: t.Name, Version: t.Version, Digest: t.Digest},
	})
}

// Publish checks a template with its defaults and examples, stores its document for everybody to read, and puts it on the
// ledger.
func (u *User) Publish(ctx context.Context, name, version string, raw []byte) (*ledger.Proposal, error) {
	if err := contract.ValidTemplateName(name, version); err != nil {
		return nil, err
	}
	params, err := contract.Parameters(raw)
	if err != nil {
		return nil, err
	}
	set := map[string]string{}
	for _, p := range params {
		switch {
		case p.Default != nil:
		case p.Example == "":
			return nil, fmt.Errorf("parameter %s has neither a default nor an example: with one of them the template is checked before others use it", p.Name)
		default:
			set[p.Name] = p.Example
		}
	}
	digest := sha256.Sum256(raw)
	if _, err := contract.Load(ctx, contract.Input{Raw: raw, Set: set, Template: &contract.Origin{Account: u.Account, Name: name, Version: version, Digest: digest}}); err != nil {
		return nil, err
	}
	if err := (place{u}).Put(ctx, digest, int64(len(raw)), bytes.NewReader(raw)); err != nil {
		return nil, fmt.Errorf("store the document: %w", err)
	}
	return u.propose(ctx, ledger.KindTemplate, &ledger.TemplatePublish{Name: name, Version: version, Digest: digest, Size: uint32(len(raw))})
}

// Templates are those of an account, in order of publication.
func (u *User) Templates(ctx context.Context, account identity.AccountID) ([]*ledger.Template, error) {
	return api.List[string, ledger.Template](ctx, u.Client, ledger.TemplatesKey(account), func(s string) string {
		name, version, _ := strings.Cut(s, "@")
		return ledger.TemplateKey(account, name, version)
	})
}
