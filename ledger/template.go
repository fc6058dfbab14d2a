package ledger

import (
	"errors"
	"fmt"

	"holdfast/contract"
	"holdfast/identity"
)

// Template is one version of a template, for good: who deploys name@version today gets what it was yesterday.
type Template struct {
	Account identity.AccountID `cbor:"1,keyasint" json:"account"`
	Name    string             `cbor:"2,keyasint" json:"name"`
	Version string             `cbor:"3,keyasint" json:"version"`
	Digest  [32]byte           `cbor:"4,keyasint" json:"-"` // SHA-256 of the document, a blob that everybody can read
	Size    uint32             `cbor:"5,keyasint" json:"size"`
	Time    int64              `cbor:"6,keyasint" json:"time"` // block time of its publication, Unix seconds
}

// How many templates an account has at most, without and with a quota of its own.
const (
	maxTemplates    = 64
	maxOwnTemplates = 4096
)

func (b *batch) templatePublish(who *signers, p *TemplatePublish) error {
	if who.account == nil {
		return errors.New("only an account can do this")
	}
	id := who.account.ID
	if err := who.allowed(id, identity.ActPublish); err != nil {
		return err
	}
	if err := contract.ValidTemplateName(p.Name, p.Version); err != nil {
		return err
	}
	if p.Size == 0 || p.Size > contract.MaxCompose {
		return fmt.Errorf("template of %d bytes, 1 to %d are allowed", p.Size, contract.MaxCompose)
	}
	key := TemplateKey(id, p.Name, p.Version)
	if _, taken := b.tree.get(key); taken {
		return fmt.Errorf("template %s@%s exists: a version is never changed, publish another", p.Name, p.Version)
	}
	most := maxTemplates
	if _, own := b.tree.get(QuotaKey(id)); own {
		most = maxOwnTemplates
	}
	n, _, err := items(&b.State, TemplatesKey(id))
	if err != nil {
		return err
	}
	if n >= most {
		return fmt.Errorf("the account has %d templates, more are not allowed", n)
	}
	set(b, key, &Template{Account: id, Name: p.Name, Version: p.Version, Digest: p.Digest, Size: p.Size, Time: b.clock.Time / 1000})
	return errors.Join(push(b, TemplatesKey(id), p.Name+"@"+p.Version), who.agreed(identity.ActPublish))
}
