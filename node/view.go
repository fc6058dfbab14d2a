package node

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"

	"holdfast/api"
	"holdfast/contract"
	"holdfast/identity"
	"holdfast/internal/canonical"
	"holdfast/ledger"
	"holdfast/overlay"
)

// View is what the ledger says that concerns one node.
type View struct {
	Grid      identity.GridID
	Self      *ledger.Node
	Nodes     []*ledger.Node
	Gateways  []*ledger.Gateway
	Contracts []*ContractView       // those with a workload here
	Unread    map[contract.ID]error // those of them whose records could not be read, with why

	Validators []ledger.Validator // as in the genesis
	Stores     []*ledger.Store    // what a location serves; read if this node is one
}

// ContractView is one contract at one revision: the current one, or the one before, of which workloads here have not been
// replaced yet.
type ContractView struct {
	Old         bool // of the revision before
	Record      *ledger.Contract
	Bounds      identity.Bounds // of its account's policy, now
	Header      *contract.Header
	Other       *contract.Header // of the other revision, while one takes the place of the other; else nil
	Revision    contract.RevisionID
	Assignments []ledger.Assignment
	Networks    map[string]*ledger.Network
	Volumes     map[string]*ledger.Volume
	Envelope    *contract.Envelope // for this node; nil when nobody sealed one yet
	Missing     []*ledger.Node     // eligible nodes without an envelope
}

// has reports whether an assignment is of this view's revision.
func (c *ContractView) has(as *ledger.Assignment) bool { return as.Old == c.Old }

// service is what an assignment runs.
func (c *ContractView) service(as *ledger.Assignment) (*contract.Service, bool) {
	switch {
	case c.has(as):
		return c.Header.Service(as.Service)
	case c.Other != nil:
		return c.Other.Service(as.Service)
	}
	return nil, false
}

// ReadView reads the view of node self. A contract that cannot be read holds up no other: whoever wrote it, and whatever is
// wrong with it, it is left out and named in Unread. Reads may straddle blocks: a record that a later block removed makes its
// contract unread for once, and the caller tries again.
func ReadView(ctx context.Context, r api.Reader, grid identity.GridID, self identity.NodeID) (*View, error) {
	v := &View{Grid: grid, Unread: map[contract.ID]error{}}
	var err error
	if v.Nodes, err = api.List[identity.NodeID, ledger.Node](ctx, r, ledger.NodesKey, ledger.NodeKey); err != nil {
		return nil, err
	}
	i := slices.IndexFunc(v.Nodes, func(n *ledger.Node) bool { return n.ID == self })
	if i < 0 {
		return nil, fmt.Errorf("%v is not admitted to %v", self, grid)
	}
	v.Self = v.Nodes[i]
	if v.Gateways, err = api.List[identity.GatewayID, ledger.Gateway](ctx, r, ledger.GatewaysKey, ledger.GatewayKey); err != nil {
		return nil, err
	}
	if v.Self.Storage > 0 {
		if v.Stores, err = api.List[contract.ID, ledger.Store](ctx, r, ledger.StoresKey, ledger.StoreKey); err != nil {
			return nil, err
		}
	}
	ids, err := api.Get[[]contract.ID](ctx, r, ledger.NodeWorkKey(self))
	if errors.Is(err, ledger.ErrAbsent) {
		return v, nil
	} else if err != nil {
		return nil, err
	}
	for _, id := range *ids {
		cs, err := readContract(ctx, r, id, v)
		switch {
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case err != nil:
			v.Unread[id] = err
		default:
			v.Contracts = append(v.Contracts, cs...)
		}
	}
	return v, nil
}

// readContract reads a contract at its current revision and, if that is needed here, at the one before.
func readContract(ctx context.Context, r api.Reader, id contract.ID, v *View) ([]*ContractView, error) {
	ck, ak := ledger.ContractKey(id), ledger.AssignmentsKey(id)
	got, err := r.Read(ctx, ck, ak)
	if err != nil {
		return nil, err
	}
	craw, ok1 := got.Value(ck)
	araw, ok2 := got.Value(ak)
	if !ok1 || !ok2 {
		return nil, ledger.ErrAbsent
	}
	rec, err := ledger.Decode[ledger.Contract](craw)
	if err != nil {
		return nil, err
	}
	as, err := ledger.Decode[ledger.Assignments](araw)
	if err != nil {
		return nil, err
	}
	c, err := readRevision(ctx, r, v, rec, as, false)
	if err != nil {
		return nil, err
	}
	owner, err := api.Get[identity.Account](ctx, r, ledger.AccountKey(rec.Account))
	if err != nil {
		return nil, fmt.Errorf("%v: %w", rec.Account, err)
	}
	c.Bounds = owner.Policy.Bounds
	out := []*ContractView{c}
	if !slices.ContainsFunc(as.Current, func(a ledger.Assignment) bool { return a.Old }) {
		return out, nil
	}
	if c.Other, err = readHeader(ctx, r, id, as.From); err != nil {
		return nil, err
	}
	if slices.ContainsFunc(as.Current, func(a ledger.Assignment) bool { return a.Old && a.Node == v.Self.ID }) {
		old, err := readRevision(ctx, r, v, rec, as, true)
		if err != nil {
			return nil, err
		}
		old.Other, old.Bounds = c.Header, c.Bounds
		out = append(out, old)
	}
	return out, nil
}

func readHeader(ctx context.Context, r api.Reader, id contract.ID, rev contract.RevisionID) (*contract.Header, error) {
	rk := ledger.RevisionKey(rev)
	got, err := r.Read(ctx, rk)
	if err != nil {
		return nil, err
	}
	raw, ok := got.Value(rk)
	if !ok {
		return nil, fmt.Errorf("%v: %w", rev, ledger.ErrAbsent)
	}
	h, err := contract.DecodeHeader(raw)
	if err != nil {
		return nil, err
	}
	if h.RevisionID() != rev || h.ContractID() != id {
		return nil, fmt.Errorf("header under %v is of %v", rev, h.RevisionID())
	}
	return h, nil
}

func readRevision(ctx context.Context, r api.Reader, v *View, rec *ledger.Contract, as *ledger.Assignments, old bool) (*ContractView, error) {
	id, rev := rec.ID, as.Revision
	if old {
		rev = as.From
	}
	c := &ContractView{Old: old, Record: rec, Revision: rev, Assignments: as.Current, Networks: map[string]*ledger.Network{}, Volumes: map[string]*ledger.Volume{}}
	var err error
	if c.Header, err = readHeader(ctx, r, id, rev); err != nil {
		return nil, err
	}
	keys := make([]string, 0, len(c.Header.Networks)+len(c.Header.Volumes))
	for _, n := range c.Header.Networks {
		keys = append(keys, ledger.NetworkKey(contract.NetworkOf(id, n)))
	}
	nets, err := api.GetAll[ledger.Network](ctx, r, keys)
	if err != nil {
		return nil, err
	}
	for _, n := range nets {
		if n != nil {
			c.Networks[n.Name] = n
		}
	}
	keys = keys[:0]
	for _, vol := range c.Header.Volumes {
		keys = append(keys, ledger.VolumeKey(contract.VolumeOf(id, vol.Name)))
	}
	vols, err := api.GetAll[ledger.Volume](ctx, r, keys)
	if err != nil {
		return nil, err
	}
	for _, vol := range vols {
		if vol != nil {
			c.Volumes[vol.Name] = vol
		}
	}
	keys = keys[:0]
	var eligible []*ledger.Node
	for _, n := range v.Nodes {
		if ledger.Eligible(c.Header, n) {
			eligible = append(eligible, n)
			keys = append(keys, ledger.EnvelopeKey(rev, contract.RecipientNode, n.ID))
		}
	}
	envs, err := api.GetAll[contract.Envelope](ctx, r, keys)
	if err != nil {
		return nil, err
	}
	for i, n := range eligible {
		switch {
		case envs[i] == nil:
			c.Missing = append(c.Missing, n)
		case n.ID == v.Self.ID:
			c.Envelope = envs[i]
		}
	}
	return c, nil
}

// Ports of WireGuard on every node: the system network's, and that of a network by its index.
const basePort = 30000

// SystemNetwork is the ID of the grid's own network of nodes.
func SystemNetwork(grid identity.GridID) [32]byte {
	return canonical.Digest("holdfast/system-network/v1", grid[:])
}

// Mesh is one overlay network as this node should have it.
type Mesh struct {
	Network [32]byte
	Name    string // for interfaces
	Port    uint16
	Self    netip.Addr
	Peers   []overlay.Peer
	Own     []overlay.Address // of the workloads here
	Names   map[string][]netip.Addr
}

// preShared is the pre-shared key of two nodes in a network: from the network's secret, which only the contract's
// envelopes hold, so that the tunnel stays shut to who records it today and breaks X25519 tomorrow.
func preShared(secret [32]byte, a, b [32]byte) [32]byte {
	if slices.Compare(a[:], b[:]) > 0 {
		a, b = b, a
	}
	return canonical.Digest("holdfast/psk/v1", secret[:], a[:], b[:])
}

func endpoint(endpoints []string, port uint16) netip.AddrPort {
	for _, e := range endpoints {
		if a, err := netip.ParseAddr(e); err == nil {
			return netip.AddrPortFrom(a, port)
		}
	}
	return netip.AddrPort{} // it calls us
}

// systemName names the system network's interface.
const systemName = "sys"

// systemMesh is the system network: every node and every validator that has a key for it, no workloads.
func systemMesh(v *View) Mesh {
	id := SystemNetwork(v.Grid)
	return Mesh{Network: id, Name: systemName, Port: basePort, Self: overlay.Addr(id, v.Self.ID), Peers: systemPeers(v.Grid, v.Nodes, v.Validators, v.Self.WireGuard)}
}

// systemPeers are the members of the system network but the one with the key self.
func systemPeers(grid identity.GridID, nodes []*ledger.Node, validators []ledger.Validator, self [32]byte) []overlay.Peer {
	id := SystemNetwork(grid)
	var out []overlay.Peer
	add := func(key [32]byte, endpoints []string, addr netip.Addr) {
		if key != self {
			out = append(out, overlay.Peer{PublicKey: key, Endpoint: endpoint(endpoints, basePort), Addrs: []overlay.Address{{Prefix: host(addr)}}})
		}
	}
	for _, n := range nodes {
		add(n.WireGuard, n.Endpoints, overlay.Addr(id, n.ID))
	}
	for _, v := range validators {
		if v.WireGuard != ([32]byte{}) {
			add(v.WireGuard, v.Endpoints, overlay.Addr(id, v.WireGuard)) // no node's ID, which is a digest
		}
	}
	return out
}

// meshName names a network's interfaces: they take 15 characters.
func meshName(n *ledger.Network) string { return "n" + strconv.FormatUint(uint64(n.Index), 36) }

func host(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

// contractMeshes are the networks of a contract's revision that a workload here is on. Names lead to every replica that is
// assigned to a node that is up.
func contractMeshes(v *View, c *ContractView, keys *contract.Keys, body *contract.Body) []Mesh {
	var out []Mesh
	for _, name := range c.Header.Networks {
		rec, ok := c.Networks[name]
		if !ok {
			continue
		}
		id := [32]byte(rec.ID)
		m := Mesh{
			Network: id, Name: meshName(rec), Port: basePort + rec.Index,
			Self: overlay.Addr(id, v.Self.ID), Names: map[string][]netip.Addr{},
		}
		here := false
		addrs := map[identity.NodeID][]overlay.Address{}
		for _, a := range c.Assignments {
			s, ok := c.service(&a)
			if !ok || a.Node.IsZero() || !slices.Contains(s.Networks, name) {
				continue
			}
			addr := overlay.Addr(id, a.Workload)
			here = here || a.Node == v.Self.ID
			addrs[a.Node] = append(addrs[a.Node], overlay.Address{Prefix: host(addr), Epoch: a.Epoch})
			if a.Reason == "" {
				for _, n := range serviceNames(c, body, a.Service) {
					m.Names[n] = append(m.Names[n], addr)
				}
			}
		}
		if !here {
			continue
		}
		m.Own = addrs[v.Self.ID]
		for _, n := range v.Nodes {
			if list := addrs[n.ID]; list != nil && n.ID != v.Self.ID {
				m.Peers = append(m.Peers, overlay.Peer{
					PublicKey: n.WireGuard, PresharedKey: preShared(keys.Networks[name], v.Self.WireGuard, n.WireGuard),
					Endpoint: endpoint(n.Endpoints, m.Port), Addrs: append(list, overlay.Address{Prefix: host(overlay.Addr(id, n.ID))}),
				})
			}
		}
		out = append(out, m)
	}
	return out
}

func serviceNames(c *ContractView, body *contract.Body, service string) []string {
	names := []string{service}
	for i := range body.Services {
		if body.Services[i].Name == service {
			names = append(names, body.Services[i].Aliases...)
		}
	}
	out := slices.Clone(names)
	for _, n := range names {
		out = append(out, n+"."+c.Record.Name+".internal")
	}
	slices.Sort(out)
	return slices.Compact(out)
}
