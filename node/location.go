package node

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"time"

	"holdfast/contract"
	"holdfast/disperse"
	"holdfast/identity"
	"holdfast/ledger"
	"holdfast/overlay"
	"holdfast/store"
	"holdfast/store/location"
)

// PortLocation is where a node's location listens, on the node's address in the system network and nowhere else.
const PortLocation = 8450

// volumeHold is how long what was deleted of a volume's snapshots can be brought back. They are many, and have a retention of
// their own.
const volumeHold = 10 * time.Minute

// Place is a location of the grid, as the ledger names it.
type Place struct {
	ID   disperse.Place
	Node string // its name
	Farm string
	Addr netip.AddrPort // in the system network
	Pin  location.Pin
	Up   bool
}

// Places are the locations of a grid, in order of registration.
func Places(grid identity.GridID, nodes []*ledger.Node) []Place {
	var out []Place
	sys := SystemNetwork(grid)
	for _, n := range nodes {
		if n.Storage > 0 {
			// Who restores from the phrase knows addresses and pins only: the ID comes from what is pinned.
			out = append(out, Place{disperse.Place(n.Location[:16]), n.Name, n.FarmName, netip.AddrPortFrom(overlay.Addr(sys, n.ID), PortLocation), n.Location, n.Up})
		}
	}
	return out
}

// Member is the location as a store uses it. cert is the front end's; a nil dial is TCP from where this process is. The
// member's Location is an io.Closer.
func (p Place) Member(cert tls.Certificate, dial func(ctx context.Context, addr string) (net.Conn, error)) (store.Member, error) {
	c, err := location.NewClient(location.ClientConfig{Addr: p.Addr.String(), Pin: p.Pin, Certificate: cert, Dial: dial})
	if err != nil {
		return store.Member{}, fmt.Errorf("location %s: %w", p.Node, err)
	}
	return store.Member{ID: p.ID, Farm: p.Farm, Location: c, Down: !p.Up}, nil
}

// hostedStores are the stores that a node keeps, with their quotas. What it offers goes to them in the order in which they
// came, so that no store that comes takes what another was promised; without has those for which nothing is left.
func hostedStores(grid identity.GridID, self *ledger.Node, stores []*ledger.Store) (out []location.Store, without []contract.ID) {
	room, sys := self.Storage, SystemNetwork(grid)
	for _, s := range stores {
		quota := min(s.Limit, room)
		if quota == 0 { // for a location it would be no bound
			without = append(without, s.ID())
			continue
		}
		room -= quota
		hold := time.Duration(0)
		front := location.Key{Pin: s.FrontEnd, Rights: location.Read | location.Write | location.Delete}
		if !s.Volume.IsZero() { // whoever once had the volume has the key: it is good where the ledger has it now
			front.From = overlay.Addr(sys, s.Node)
			hold = volumeHold
		}
		out = append(out, location.Store{
			Name:  storeName(s),
			Keys:  []location.Key{front, {Pin: s.Recovery, Rights: location.Recover}},
			Quota: location.Quota{Bytes: int64(quota)},
			Hold:  hold,
		})
	}
	return out, without
}

// storeName names a store's directory at a location.
func storeName(s *ledger.Store) string {
	switch {
	case !s.Volume.IsZero():
		return fmt.Sprintf("v-%x", s.Volume[:16])
	case s.Contract.IsZero():
		return "grid"
	}
	return fmt.Sprintf("c-%x", s.Contract[:16])
}

// setLocation has this node's location serve exactly the stores of the view. The data of one that left is kept.
func (a *Agent) setLocation(v *View) error {
	if v.Self.Storage == 0 {
		return nil
	}
	stores, without := hostedStores(v.Grid, v.Self, v.Stores)
	if len(without) != a.without {
		a.without = len(without)
		a.log.Warn("stores that this node has no room for", "stores", len(without), "offered", v.Self.Storage)
	}
	a.mu.Lock()
	s := a.location
	a.mu.Unlock()
	if s != nil {
		return s.SetStores(stores)
	}
	if !a.locating {
		a.locating = true
		a.group.Go(func() error { a.runLocation(a.groupCtx); return nil })
	}
	return nil
}

// runLocation serves until ctx ends. Which stores, the view says as soon as it runs.
func (a *Agent) runLocation(ctx context.Context) {
	for wait := 100 * time.Millisecond; ctx.Err() == nil; wait = min(2*wait, 5*time.Second) {
		err := a.serveLocation(ctx)
		if ctx.Err() != nil {
			return
		}
		a.log.Warn("location ended, starting it again", "error", err)
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
}

func (a *Agent) serveLocation(ctx context.Context) error {
	cert, err := location.Certificate(a.cfg.Keys.Location)
	if err != nil {
		return err
	}
	net := a.network(systemName)
	if net == nil {
		return errors.New("the system network is not up")
	}
	l, err := net.Listen(ctx, PortLocation)
	if err != nil {
		return err
	}
	s, err := location.NewServer(location.ServerConfig{Listener: l, Certificate: cert, Path: filepath.Join(a.cfg.Data, "location"), Log: a.log})
	if err != nil {
		l.Close()
		return err
	}
	a.mu.Lock()
	a.location = s
	a.mu.Unlock()
	a.view.Wake()
	defer func() {
		a.mu.Lock()
		a.location = nil
		a.mu.Unlock()
	}()
	return s.Run(ctx)
}

// stored is how many bytes this node's location keeps.
func (a *Agent) stored() uint64 {
	a.mu.Lock()
	s := a.location
	a.mu.Unlock()
	if s == nil {
		return 0
	}
	return uint64(s.Used())
}
