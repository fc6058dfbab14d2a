package contract

import (
	"bytes"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"

	"holdfast/identity"
	"holdfast/internal/canonical"
)

// Act is what a revision does: create, scale, route or revise. Scaling and routing leave the sealed body and its keys as they
// are: what nobody can read cannot be told to be the same.
func (h *Header) Act(was *Header) identity.Act {
	if h.Revision == 1 {
		return identity.ActCreate
	}
	same := func(change func(h *Header)) bool {
		a, b := *was, *h
		for _, x := range []*Header{&a, &b} {
			x.Revision, x.Contract, x.Previous = 0, ID{}, RevisionID{}
			change(x)
		}
		return bytes.Equal(canonical.Encode(&a), canonical.Encode(&b))
	}
	switch {
	case same(func(h *Header) {
		h.Services = slices.Clone(h.Services)
		for i := range h.Services {
			h.Services[i].Replicas = 0
		}
	}):
		return identity.ActScale
	case same(func(h *Header) { h.Routes = nil }):
		return identity.ActRoute
	}
	return identity.ActRevise
}

// Consents are the approvals that the contract asks for before act.
func (h *Header) Consents(act identity.Act) []identity.Approval {
	var out []identity.Approval
	for _, a := range h.Approvals {
		if a.Of(act) {
			out = append(out, a)
		}
	}
	return out
}

// contractActs are those that a contract's approvals can be of.
func contractActs() []identity.Act {
	return []identity.Act{identity.ActCreate, identity.ActRevise, identity.ActScale, identity.ActRoute, identity.ActPause, identity.ActCancel}
}

func validApprovals(all []identity.Approval) error {
	if err := identity.ValidateApprovals(all); err != nil {
		return err
	}
	for _, a := range all {
		for _, act := range a.Acts {
			if !slices.Contains(contractActs(), act) {
				return fmt.Errorf("approval %q: %q is no act on a contract", a.Name, act)
			}
		}
	}
	return nil
}

// approvals reads x-holdfast.approvals.
func (l *composer) approvals(x *yaml.Node) error {
	all := child(x, "approvals")
	if err := shape(all, yaml.MappingNode, "x-holdfast.approvals"); err != nil {
		return err
	}
	if err := few(all, identity.MaxApprovals, "approvals"); err != nil {
		return err
	}
	var out []identity.Approval
	err := pairs(all, func(k, v *yaml.Node) error {
		what := "approval " + k.Value
		if err := shape(v, yaml.MappingNode, what); err != nil {
			return err
		}
		if err := l.allow(v, "approval", what); err != nil {
			return err
		}
		a := identity.Approval{Name: k.Value, Need: 1}
		if n := child(v, "need"); n != nil {
			need, err := strconv.ParseUint(n.Value, 10, 16)
			if err != nil {
				return at(n, "%s: need %q is no number", what, n.Value)
			}
			a.Need = uint16(need)
		}
		party := func(id, weight *yaml.Node) error {
			var p identity.Party
			if err := p.Account.UnmarshalText([]byte(id.Value)); err != nil {
				return at(id, "%s: %v: name accounts as `holdfast account show` prints them", what, err)
			}
			p.Weight = 1
			if weight != nil {
				w, err := strconv.ParseUint(weight.Value, 10, 16)
				if err != nil {
					return at(weight, "%s: weight %q is no number", what, weight.Value)
				}
				p.Weight = uint16(w)
			}
			a.Parties = append(a.Parties, p)
			return nil
		}
		of := child(v, "of")
		switch {
		case of == nil:
			return at(v, "%s: say whose it is, as of: [acct_…]", what)
		case of.Kind == yaml.MappingNode:
			if err := pairs(of, party); err != nil {
				return err
			}
		case of.Kind == yaml.SequenceNode:
			for _, n := range items(of) {
				if err := party(n, nil); err != nil {
					return err
				}
			}
		default:
			return at(of, "%s: of is a list of accounts, or a mapping from accounts to weights", what)
		}
		slices.SortFunc(a.Parties, func(x, y identity.Party) int { return bytes.Compare(x.Account[:], y.Account[:]) })
		if err := shape(child(v, "acts"), yaml.SequenceNode, what+".acts"); err != nil {
			return err
		}
		for _, n := range items(child(v, "acts")) {
			a.Acts = append(a.Acts, identity.Act(n.Value))
		}
		slices.Sort(a.Acts)
		a.Acts = slices.Compact(a.Acts)
		if err := validApprovals([]identity.Approval{a}); err != nil {
			return at(k, "%v", err)
		}
		out = append(out, a)
		return nil
	})
	slices.SortFunc(out, func(a, b identity.Approval) int { return strings.Compare(a.Name, b.Name) })
	l.doc.Header.Approvals = out
	return err
}
