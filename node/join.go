package node

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"time"

	"holdfast/api"
	"holdfast/identity"
	"holdfast/ledger"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// JoinConfig says who asks to become a node, and of which farm.
type JoinConfig struct {
	Client *api.Client
	Keys   *Keys
	Farm   identity.FarmID
	Name   string // "" is the short form of the node's ID
	// Storage is how many bytes the machine offers to stores; its cores and its memory it offers all.
	Storage uint64
	Log     *slog.Logger

	Endpoints func() ([]string, error) // where peers reach the machine; nil asks the kernel
	Every     time.Duration            // between two announcements; 0 means 10 s
}

// joiner is a Join under way.
type joiner struct {
	JoinConfig
	mu   sync.Mutex
	said map[string]string // what is wrong, by what was tried: the console says it once
}

// Join asks to be admitted until the ledger has this node, or ctx ends. A node that is admitted already tells the ledger
// its endpoints if they have changed. Nobody's word counts but the ledger's, which is read with proof.
func Join(ctx context.Context, cfg JoinConfig) error {
	j := &joiner{JoinConfig: cfg, said: map[string]string{}}
	if j.Log == nil {
		j.Log = slog.New(slog.DiscardHandler)
	}
	if j.Name == "" {
		j.Name = j.Keys.ID.Short()
	}
	if j.Endpoints == nil {
		j.Endpoints = endpoints
	}
	if j.Every <= 0 {
		j.Every = 10 * time.Second
	}
	rec, err := j.wait(ctx, nil)
	if errors.Is(err, ledger.ErrAbsent) {
		j.Log.Info("this machine waits to be approved by its farm's owner, who compares its ID with this one",
			"node", j.Keys.ID, "short", j.Keys.ID.Short(), "name", j.Name, "farm", j.Farm, "grid", j.Client.Grid())
		rec, err = j.ask(ctx)
	}
	if err != nil {
		return err
	}
	j.Log.Info("this machine is a node", "node", j.Keys.ID, "name", rec.Name, "farm", rec.FarmName)
	j.update(ctx, rec)
	return nil
}

// ask announces the machine while it waits.
func (j *joiner) ask(ctx context.Context) (*ledger.Node, error) {
	inner, cancel := context.WithCancel(ctx)
	var all sync.WaitGroup
	defer all.Wait()
	defer cancel()
	changed := make(chan struct{}, 1)
	all.Go(func() {
		j.Client.Follow(inner, func() {
			select {
			case changed <- struct{}{}:
			default:
			}
		})
	})
	all.Go(func() {
		for {
			j.complain(inner, "announce", j.announce(inner))
			select {
			case <-inner.Done():
				return
			case <-time.After(j.Every):
			}
		}
	})
	return j.wait(ctx, changed)
}

func (j *joiner) announce(ctx context.Context) error {
	eps, err := j.Endpoints() // anew each time: addresses come and go
	if err != nil {
		return err
	}
	cpu, memory, err := capacity()
	if err != nil {
		return err
	}
	a, err := j.Keys.Admission(j.Client.Grid(), j.Farm, j.Name, eps, Offer{cpu, memory, j.Storage})
	if err != nil {
		return err
	}
	return j.Client.Announce(ctx, a)
}

// wait reads this node's record until there is one. Without changed it returns ledger.ErrAbsent when it is proved that
// there is none.
func (j *joiner) wait(ctx context.Context, changed <-chan struct{}) (*ledger.Node, error) {
	for {
		rec, err := api.Get[ledger.Node](ctx, j.Client, ledger.NodeKey(j.Keys.ID))
		absent := errors.Is(err, ledger.ErrAbsent)
		switch {
		case err == nil || absent && changed == nil:
			return rec, err
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case !absent:
			j.complain(ctx, "read the ledger", err)
		}
		// A busy ledger changes all the time, and whoever waits has no hurry.
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(500 * time.Millisecond):
		}
		if absent {
			select {
			case <-ctx.Done():
				return nil, ctx.Err()
			case <-changed:
			case <-time.After(j.Every):
			}
		}
	}
}

// complain says what is wrong when it was not wrong before.
func (j *joiner) complain(ctx context.Context, try string, err error) {
	if ctx.Err() != nil {
		return
	}
	text := ""
	if err != nil {
		text = err.Error()
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if text != "" && text != j.said[try] {
		j.Log.Warn("this machine cannot become a node yet", "try", try, "error", err)
	}
	j.said[try] = text
}

// update tells the ledger of new endpoints. A node that cannot is one that some peers do not find, and works.
func (j *joiner) update(ctx context.Context, rec *ledger.Node) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	eps, err := j.Endpoints()
	if err == nil && (len(eps) == 0 || slices.Equal(eps, rec.Endpoints)) {
		return
	}
	if err == nil {
		session := [32]byte(j.Keys.Session.Public().(ed25519.PublicKey))
		_, err = j.Client.Act(ctx, ledger.KindNodeUpdate, ledger.Actor{Node: true, ID: j.Keys.ID}, &ledger.NodeUpdate{Session: session, Endpoints: eps}, j.Keys.Sign)
	}
	if err != nil {
		j.Log.Warn("the ledger was not told where this node is", "endpoints", eps, "error", err)
		return
	}
	j.Log.Info("the ledger was told where this node is", "was", rec.Endpoints, "endpoints", eps)
}

// capacity is what this machine has.
func capacity() (cpuMilli uint32, memory uint64, err error) {
	var si unix.Sysinfo_t
	if err := unix.Sysinfo(&si); err != nil {
		return 0, 0, fmt.Errorf("memory of this machine: %w", err)
	}
	return uint32(runtime.NumCPU()) * 1000, uint64(si.Totalram) * uint64(si.Unit), nil
}

// maxEndpoints is how many the ledger takes.
const maxEndpoints = 8

// endpoints are the addresses under which others may reach this machine: those on interfaces with a default route, the
// ones that reach furthest first, and of these IPv6 first.
func endpoints() ([]string, error) {
	var all []netip.Addr
	for _, family := range []int{netlink.FAMILY_V6, netlink.FAMILY_V4} {
		defaults, err := netlink.RouteListFiltered(family, &netlink.Route{}, netlink.RT_FILTER_DST) // no Dst: default routes
		if err != nil {
			return nil, fmt.Errorf("default routes: %w", err)
		}
		out := map[int]bool{}
		for _, r := range defaults {
			out[r.LinkIndex] = true
			for _, n := range r.MultiPath {
				out[n.LinkIndex] = true
			}
		}
		addrs, err := netlink.AddrList(nil, family)
		if err != nil {
			return nil, fmt.Errorf("addresses: %w", err)
		}
		// Those that come and go, and those that the network does not let this machine have. (Of IPv4, secondary ones.)
		const passing = unix.IFA_F_TEMPORARY | unix.IFA_F_TENTATIVE | unix.IFA_F_DADFAILED | unix.IFA_F_DEPRECATED
		for _, a := range addrs {
			ip, ok := netip.AddrFromSlice(a.IP)
			if ip = ip.Unmap(); ok && ip.IsGlobalUnicast() && out[a.LinkIndex] && a.Flags&passing == 0 {
				all = append(all, ip)
			}
		}
	}
	slices.SortStableFunc(all, func(a, b netip.Addr) int {
		switch {
		case a.IsPrivate() == b.IsPrivate():
			return 0
		case b.IsPrivate():
			return -1
		}
		return 1
	})
	var eps []string
	for _, a := range all[:min(len(all), maxEndpoints)] {
		eps = append(eps, a.String())
	}
	return eps, nil
}
