package node

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"

	"holdfast/api"
	"holdfast/contract"
	"holdfast/gateway"
	"holdfast/identity"
	"holdfast/ledger"
)

// TunnelName is the TLS server name under which nodes dial a grid's gateways.
func TunnelName(grid identity.GridID) string { return "tunnel." + grid.Short() + ".holdfast" }

// EdgeTable is what a gateway knows of the ledger: which node may serve which host, and which keys may open a tunnel. It
// implements gateway.Routes.
type EdgeTable struct {
	current atomic.Pointer[edgeTable]
}

// NewEdgeTable is the table of a gateway that has not read the ledger yet: it leads to the ledger and nowhere else.
func NewEdgeTable(g *ledger.Genesis) *EdgeTable {
	t := &EdgeTable{}
	t.current.Store(newEdgeTable(g))
	return t
}

func newEdgeTable(g *ledger.Genesis) *edgeTable {
	return &edgeTable{
		// The ledger itself, for those who reach nothing but a gateway.
		routes: map[string]gateway.Route{api.LedgerName(g.GridID()): {Forward: g.Validators[0].Address}},
		nodes:  map[gateway.SPKI]identity.NodeID{},
	}
}

type edgeTable struct {
	routes map[string]gateway.Route
	nodes  map[gateway.SPKI]identity.NodeID
}

// Lookup implements gateway.Routes.
func (t *EdgeTable) Lookup(host string) (gateway.Route, bool) {
	r, ok := t.current.Load().routes[host]
	return r, ok
}

// Authorize names the node that has a TLS key.
func (t *EdgeTable) Authorize(spki gateway.SPKI) (gateway.NodeID, bool) {
	id, ok := t.current.Load().nodes[spki]
	return gateway.NodeID(id), ok
}

// Refresh reads the table from the ledger. A contract that cannot be read keeps what was known of it, and is in the error;
// all others take effect.
func (t *EdgeTable) Refresh(ctx context.Context, c *api.Client) error {
	return t.read(ctx, c, c.Genesis())
}

func (t *EdgeTable) read(ctx context.Context, c api.Reader, g *ledger.Genesis) error {
	next := newEdgeTable(g)
	nodes, err := api.List[identity.NodeID, ledger.Node](ctx, c, ledger.NodesKey, ledger.NodeKey)
	if err != nil {
		return err
	}
	for _, n := range nodes {
		// In order of registration: who was there first keeps his key and his name, whatever one who came later says.
		if _, taken := next.nodes[n.TLS]; !taken {
			next.nodes[n.TLS] = n.ID
		}
		if _, taken := next.routes[ServiceName(n.ID)]; !taken {
			next.routes[ServiceName(n.ID)] = gateway.Route{Servers: []gateway.Server{{Node: gateway.NodeID(n.ID)}}}
		}
	}
	routes, err := api.List[string, ledger.Route](ctx, c, ledger.RoutesKey, ledger.RouteKey)
	if err != nil {
		return err
	}
	last := t.current.Load()
	assigned := map[contract.ID]*ledger.Assignments{}
	var errs []error
	for _, r := range routes {
		as, ok := assigned[r.Contract]
		if !ok {
			if as, err = api.Get[ledger.Assignments](ctx, c, ledger.AssignmentsKey(r.Contract)); errors.Is(err, ledger.ErrAbsent) {
				as = &ledger.Assignments{}
			} else if errors.Is(err, api.ErrUnavailable) {
				return err
			} else if err != nil {
				errs = append(errs, fmt.Errorf("assignments of %v: %w", r.Contract, err))
				as = nil
			}
			assigned[r.Contract] = as
		}
		if as == nil {
			if known, ok := last.routes[r.Host]; ok {
				next.routes[r.Host] = known
			}
			continue
		}
		var target gateway.Route
		for _, a := range as.Current {
			if a.Service == r.Service && !a.Node.IsZero() {
				target.Servers = append(target.Servers, gateway.Server{Node: gateway.NodeID(a.Node), Workload: gateway.WorkloadID(a.Workload), Epoch: a.Epoch})
			}
		}
		slices.SortFunc(target.Servers, func(x, y gateway.Server) int { return slices.Compare(x.Workload[:], y.Workload[:]) })
		next.routes[r.Host] = target
	}
	t.current.Store(next)
	return errors.Join(errs...)
}
