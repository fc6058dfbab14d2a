package identity

import (
	"errors"
	"fmt"
	"slices"
)

// Act is something that a policy rules over.
type Act string

// The acts of this version. "default" is the rule for every act without one of its own.
const (
	ActDefault      Act = "default"
	ActCreate       Act = "create"        // a contract's first revision
	ActRevise       Act = "revise"        // a further revision
	ActCancel       Act = "cancel"        // the end of a contract
	ActReadLogs     Act = "read-logs"     // a workload's output
	ActAdmitFarm    Act = "admit-farm"    // grid account only
	ActAdmitNode    Act = "admit-node"    // the farm's owner
	ActAdmitGateway Act = "admit-gateway" // grid account only
	ActSetQuota     Act = "set-quota"     // grid account only
)

// Limits of an account.
const (
	MaxDevices = 32
	MaxRules   = 32
	MaxName    = 63
)

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
	Rules []Rule `cbor:"1,keyasint" json:"rules"`
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

// Allows reports whether the signatures of exactly these devices, already verified, are enough for act.
func (a *Account) Allows(act Act, signers []DeviceID) error {
	var rule *Rule
	for i := range a.Policy.Rules {
		r := &a.Policy.Rules[i]
		if r.Act == act {
			rule = r
			break
		}
		if r.Act == ActDefault {
			rule = r
		}
	}
	if rule == nil {
		return fmt.Errorf("policy of %v has no rule for %q", a.ID, act)
	}
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
