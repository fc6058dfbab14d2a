package identity

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Act is something that a policy rules over.
type Act string

// The acts of this version. An act without a rule of its own goes by that of a heavier act, and "default" in the end.
const (
	ActDefault      Act = "default"
	ActCreate       Act = "create"        // a contract's first revision
	ActRevise       Act = "revise"        // a further revision
	ActScale        Act = "scale"         // a revision that changes nothing but how many replicas there are; else as revise
	ActRoute        Act = "route"         // a revision that changes nothing but routes; else as revise
	ActCancel       Act = "cancel"        // the end of a contract, and taking that back
	ActPause        Act = "pause"         // stopping a contract's workloads, and starting them again; else as cancel
	ActPublish      Act = "publish"       // a template
	ActSignImage    Act = "sign-image"    // vouching for an image, and taking that back
	ActApprove      Act = "approve"       // consenting to what another account proposes
	ActPolicy       Act = "change-policy" // needs what every rule and every approval of the policy needs
	ActReadLogs     Act = "read-logs"     // a workload's output
	ActAdmitFarm    Act = "admit-farm"    // grid account only
	ActAdmitNode    Act = "admit-node"    // the farm's owner
	ActAdmitGateway Act = "admit-gateway" // grid account only
	ActSetQuota     Act = "set-quota"     // grid account only
	ActValidators   Act = "validators"    // grid account only: who takes part in consensus
)

// Limits of an account.
const (
	MaxDevices = 32
	MaxRules   = 32
	MaxName    = 63
	// Of approvals in one policy or contract, and of parties in one approval. A weight is at most MaxWeight.
	MaxApprovals = 8
	MaxParties   = 16
	MaxWeight    = 1000
)

// Acts are all acts that a rule or an approval can name.
func Acts() []Act {
	return []Act{
		ActDefault, ActCreate, ActRevise, ActScale, ActRoute, ActCancel, ActPause, ActPublish, ActSignImage, ActApprove, ActPolicy, ActReadLogs,
		ActAdmitFarm, ActAdmitNode, ActAdmitGateway, ActSetQuota, ActValidators,
	}
}

// heavier is the act by whose rule this one goes when it has none.
func (a Act) heavier() Act {
	switch a {
	case ActScale, ActRoute:
		return ActRevise
	case ActPause:
		return ActCancel
	}
	return ActDefault
}

// Party is an account whose consent counts.
type Party struct {
	Account AccountID `cbor:"1,keyasint" json:"account"`
	Weight  uint16    `cbor:"2,keyasint" json:"weight"`
}

// Approval is a say that others have in an act: parties whose weights together reach Need must consent. The account that acts
// consents by acting.
type Approval struct {
	Name    string  `cbor:"1,keyasint" json:"name"`
	Need    uint16  `cbor:"2,keyasint" json:"need"`
	Parties []Party `cbor:"3,keyasint" json:"parties"`
	Acts    []Act   `cbor:"4,keyasint,omitempty" json:"acts,omitempty"` // sorted; none: every act
}

// Of says whether an act needs the approval.
func (a *Approval) Of(act Act) bool { return len(a.Acts) == 0 || slices.Contains(a.Acts, act) }

// Has says whether an account is a party.
func (a *Approval) Has(id AccountID) bool {
	return slices.ContainsFunc(a.Parties, func(p Party) bool { return p.Account == id })
}

// Given is the weight of those who consented; one who is named twice counts once.
func (a *Approval) Given(consented []AccountID) int {
	n := 0
	for _, p := range a.Parties {
		if slices.Contains(consented, p.Account) {
			n += int(p.Weight)
		}
	}
	return n
}

// String is the approval for people.
func (a *Approval) String() string {
	sum := 0
	parties := make([]string, len(a.Parties))
	for i, p := range a.Parties {
		sum += int(p.Weight)
		parties[i] = p.Account.Short()
		if p.Weight != 1 {
			parties[i] += fmt.Sprintf(" (%d)", p.Weight)
		}
	}
	text := fmt.Sprintf("%d of %d: %s", a.Need, sum, strings.Join(parties, ", "))
	if len(a.Acts) > 0 {
		acts := make([]string, len(a.Acts))
		for i, x := range a.Acts {
			acts[i] = string(x)
		}
		text += "; to " + strings.Join(acts, ", ")
	}
	return text
}

// ValidateApprovals checks limits, names, and that each can be reached.
func ValidateApprovals(all []Approval) error {
	if len(all) > MaxApprovals {
		return fmt.Errorf("%d approvals, at most %d are allowed", len(all), MaxApprovals)
	}
	names := map[string]bool{}
	for i := range all {
		a := &all[i]
		if len(a.Name) == 0 || len(a.Name) > MaxName {
			return fmt.Errorf("an approval's name of %d bytes, 1 to %d are allowed", len(a.Name), MaxName)
		}
		for _, c := range []byte(a.Name) {
			if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
				return fmt.Errorf("approval %q: only a-z, 0-9 and hyphens are allowed in a name", a.Name)
			}
		}
		if names[a.Name] {
			return fmt.Errorf("approval %q is there twice", a.Name)
		}
		names[a.Name] = true
		if len(a.Parties) == 0 || len(a.Parties) > MaxParties {
			return fmt.Errorf("approval %q has %d parties, 1 to %d are allowed", a.Name, len(a.Parties), MaxParties)
		}
		sum := 0
		for j, p := range a.Parties {
			if slices.ContainsFunc(a.Parties[:j], func(o Party) bool { return o.Account == p.Account }) {
				return fmt.Errorf("approval %q names %v twice", a.Name, p.Account)
			}
			if p.Weight == 0 || p.Weight > MaxWeight {
				return fmt.Errorf("approval %q: weight %d of %v, 1 to %d are allowed", a.Name, p.Weight, p.Account, MaxWeight)
			}
			sum += int(p.Weight)
		}
		if a.Need == 0 || int(a.Need) > sum {
			return fmt.Errorf("approval %q needs %d of %d", a.Name, a.Need, sum)
		}
		if !slices.IsSorted(a.Acts) || len(slices.Compact(slices.Clone(a.Acts))) != len(a.Acts) {
			return fmt.Errorf("approval %q: its acts are not sorted, or one is there twice", a.Name)
		}
		for _, act := range a.Acts {
			if !slices.Contains(Acts(), act) || act == ActDefault {
				return fmt.Errorf("approval %q: there is no act %q", a.Name, act)
			}
		}
	}
	return nil
}

// Device is a key that can sign for an account.
type Device struct {
	Name string    `cbor:"1,keyasint" json:"name"`
	Key  PublicKey `cbor:"2,keyasint" json:"-"`
}

// Rule says which signatures an act needs: at least Threshold different ones out of Devices (all of the account's, when
// empty).
type Rule struct {
	Act       Act        `cbor:"1,keyasint" json:"act"`
	Threshold uint16     `cbor:"2,keyasint" json:"threshold"`
	Devices   []DeviceID `cbor:"3,keyasint,omitempty" json:"devices,omitempty"`
}

// Policy is an account's list of rules. It must hold a rule for ActDefault.
type Policy struct {
	Rules     []Rule     `cbor:"1,keyasint" json:"rules"`
	Approvals []Approval `cbor:"2,keyasint,omitempty" json:"approvals,omitempty"` // what others have a say in
	Bounds    Bounds     `cbor:"3,keyasint,omitzero" json:"bounds,omitzero"`      // what contracts may look like
}

// SingleDevice is the policy under which any one device may do everything.
func SingleDevice() Policy { return Policy{Rules: []Rule{{Act: ActDefault, Threshold: 1}}} }

// Account is whoever owns things.
type Account struct {
	ID      AccountID  `cbor:"1,keyasint" json:"id"`
	Devices []Device   `cbor:"2,keyasint" json:"devices"`
	Policy  Policy     `cbor:"3,keyasint" json:"policy"`
	Sealing SealingKey `cbor:"4,keyasint" json:"-"`
}

// Validate checks what a creation transaction proposes: limits, no device twice, no rule that nobody could satisfy.
func (a *Account) Validate() error {
	if len(a.Devices) == 0 || len(a.Devices) > MaxDevices {
		return fmt.Errorf("account has %d devices, 1 to %d are allowed", len(a.Devices), MaxDevices)
	}
	have := map[DeviceID]bool{}
	for i := range a.Devices {
		d := &a.Devices[i]
		if len(d.Name) > MaxName {
			return fmt.Errorf("device name of %d bytes, at most %d are allowed", len(d.Name), MaxName)
		}
		id := d.Key.Device()
		if have[id] {
			return fmt.Errorf("device %v is listed twice", id)
		}
		have[id] = true
	}
	if len(a.Policy.Rules) > MaxRules {
		return fmt.Errorf("policy has %d rules, at most %d are allowed", len(a.Policy.Rules), MaxRules)
	}
	acts := map[Act]bool{}
	for _, r := range a.Policy.Rules {
		if acts[r.Act] {
			return fmt.Errorf("policy has two rules for %q", r.Act)
		}
		acts[r.Act] = true
		n := len(a.Devices)
		if len(r.Devices) > 0 {
			n = len(r.Devices)
			for i, id := range r.Devices {
				if !have[id] {
					return fmt.Errorf("rule for %q names device %v, which the account does not have", r.Act, id)
				}
				if slices.Contains(r.Devices[:i], id) {
					return fmt.Errorf("rule for %q names device %v twice", r.Act, id)
				}
			}
		}
		if r.Threshold == 0 || int(r.Threshold) > n {
			return fmt.Errorf("rule for %q needs %d signatures of %d devices", r.Act, r.Threshold, n)
		}
	}
	if !acts[ActDefault] {
		return errors.New("policy has no default rule")
	}
	if err := ValidateApprovals(a.Policy.Approvals); err != nil {
		return fmt.Errorf("policy: %w", err)
	}
	if err := a.Policy.Bounds.validate(); err != nil {
		return fmt.Errorf("policy: %w", err)
	}
	return nil
}

// Device returns the account's device with that ID.
func (a *Account) Device(id DeviceID) (*Device, bool) {
	for i := range a.Devices {
		if a.Devices[i].Key.Device() == id {
			return &a.Devices[i], true
		}
	}
	return nil, false
}

// Allows reports whether the signatures of exactly these devices, already verified, are enough for act. What others have a
// say in is asked for by Consents.
func (a *Account) Allows(act Act, signers []DeviceID) error {
	if act == ActPolicy { // else the weakest rule would decide over all others
		for i := range a.Policy.Rules {
			if err := a.satisfied(&a.Policy.Rules[i], act, signers); err != nil {
				return err
			}
		}
		return nil
	}
	for r := act; ; r = r.heavier() {
		i := slices.IndexFunc(a.Policy.Rules, func(x Rule) bool { return x.Act == r })
		if i >= 0 {
			return a.satisfied(&a.Policy.Rules[i], act, signers)
		}
		if r == ActDefault {
			return fmt.Errorf("policy of %v has no rule for %q", a.ID, act)
		}
	}
}

func (a *Account) satisfied(rule *Rule, act Act, signers []DeviceID) error {
	counted := map[DeviceID]bool{}
	for _, id := range signers {
		if _, ok := a.Device(id); !ok {
			continue
		}
		if len(rule.Devices) == 0 || slices.Contains(rule.Devices, id) {
			counted[id] = true
		}
	}
	if len(counted) < int(rule.Threshold) {
		return fmt.Errorf("%q needs %d signatures, %d given count", act, rule.Threshold, len(counted))
	}
	return nil
}

// Consents are the approvals that the account's policy asks for before act.
func (p *Policy) Consents(act Act) []Approval {
	var out []Approval
	for _, a := range p.Approvals {
		if act == ActPolicy || a.Of(act) {
			out = append(out, a)
		}
	}
	return out
}
