package overlay

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// A Firewall is what the node's own namespace lets in: answers to what the node asked, neighbour discovery and router
// advertisements that did not pass a router (hop limit 255), DHCP replies, and what Access opens on system networks.
// Nothing is answered with an error, not even echo. What is of a system network passes by its tunnel alone, whatever the
// routes are: who shares the cable can add some, by router advertisements.
type Firewall struct {
	Main   string       // the node's namespace; empty means that of this process
	Access []Access     // the system networks; nothing else listens
	Egress bool         // forward and masquerade what Networks let out
	Log    *slog.Logger // nil discards
}

// Access opens ports on the tunnel of a system network to some of its members.
type Access struct {
	Interface string       // Config.Name of the Network
	Sources   []netip.Addr // who may open connections to this node
	Ports     []uint16     // TCP ports that they may open; what else the machine listens on stays shut to them too
}

// egressMark tells masquerading what came from a Network.
const egressMark = 0x686f6c64

// Apply replaces the rules in one step; connections that the new rules allow go on.
func (f Firewall) Apply() error {
	err := within(f.Main, func() error {
		links, err := f.onLink()
		if err != nil {
			return err
		}
		if err := replaceTable(func(r *ruleset) error { return f.build(r, links) }); err != nil {
			return err
		}
		return f.forwarding()
	})
	if err != nil {
		return fmt.Errorf("firewall: %w", err)
	}
	return nil
}

func (f Firewall) build(r *ruleset, links []netip.Prefix) error {
	rule := r.chain("input", nftables.ChainTypeFilter, nftables.ChainHookInput, nftables.ChainPriorityFilter, nftables.ChainPolicyDrop)
	out := r.chain("output", nftables.ChainTypeFilter, nftables.ChainHookOutput, nftables.ChainPriorityFilter, nftables.ChainPolicyAccept)
	rule(iif("lo"), accept())
	out(oif("lo"), accept())
	for _, a := range f.Access {
		// Before the general answers, so that who is struck off the list loses the connections that he opened.
		listed, toListed, err := r.members("access "+a.Interface, a.Sources)
		if err != nil {
			return err
		}
		rule(notIif(a.Interface), listed, drop())
		out(notOif(a.Interface), toListed, drop())
		for _, port := range a.Ports {
			rule(iif(a.Interface), listed, l4(unix.IPPROTO_TCP), dport(port), accept())
		}
		rule(iif(a.Interface), replies(), answers(), accept())
		rule(iif(a.Interface), drop())
	}
	rule(answers(), accept())
	for _, kind := range []byte{icmpNeighbourSolicit, icmpNeighbourAdvert, icmpRouterAdvert} {
		rule(icmp6(kind), hopLimit255(), accept())
	}
	rule(family(unix.NFPROTO_IPV4), l4(unix.IPPROTO_UDP), sport(67), dport(68), accept())
	rule(from(netip.MustParsePrefix("fe80::/10")), l4(unix.IPPROTO_UDP), sport(547), dport(546), accept())
	// The last two let anybody in; where nobody waits for DHCP, the kernel would say so. (Workloads may be told.)
	out(oif(uplinkOuter+"*"), accept())
	out(noPort(unix.NFPROTO_IPV4), drop())
	out(noPort(unix.NFPROTO_IPV6), drop())

	rule = r.chain("forward", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter, nftables.ChainPolicyDrop)
	if !f.Egress {
		return nil
	}
	uplink := uplinkOuter + "*"
	rule(oif(uplink), iif(uplink), drop())
	rule(oif(uplink), answers(), accept())
	for _, a := range f.Access {
		rule(oif(a.Interface), drop())
	}
	for _, p := range slices.Concat(privatePrefixes(), links) {
		rule(iif(uplink), to(p), drop())
	}
	rule(iif(uplink), from(netip.MustParsePrefix("fd00::/8")), mark(), accept())
	rule(iif(uplink), from(egressPool4), mark(), accept())

	rule = r.chain("nat", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource, nftables.ChainPolicyAccept)
	rule(meta(expr.MetaKeyMARK, bytes32(egressMark)...), []expr.Any{&expr.Masq{}})
	return nil
}

// onLink lists the prefixes that the node reaches without a router: the farm's LAN, and the node's own addresses.
func (f Firewall) onLink() ([]netip.Prefix, error) {
	ours := func(name string) bool {
		return name == "lo" || strings.HasPrefix(name, uplinkOuter) ||
			slices.ContainsFunc(f.Access, func(a Access) bool { return a.Interface == name })
	}
	links, err := dump(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	var list []netip.Prefix
	add := func(p netip.Prefix) {
		if p = p.Masked(); p.Bits() > 0 && !slices.Contains(list, p) {
			list = append(list, p)
		}
	}
	for _, link := range links {
		if ours(link.Attrs().Name) {
			continue
		}
		addrs, err := dump(func() ([]netlink.Addr, error) { return netlink.AddrList(link, netlink.FAMILY_ALL) })
		if err != nil {
			return nil, fmt.Errorf("list addresses of %s: %w", link.Attrs().Name, err)
		}
		for _, a := range addrs {
			if ip, ok := netip.AddrFromSlice(a.IP); ok {
				bits, _ := a.Mask.Size()
				add(netip.PrefixFrom(ip.Unmap(), bits))
			}
		}
		routes, err := dump(func() ([]netlink.Route, error) { return netlink.RouteList(link, netlink.FAMILY_ALL) })
		if err != nil {
			return nil, fmt.Errorf("list routes of %s: %w", link.Attrs().Name, err)
		}
		for _, r := range routes {
			if r.Dst == nil || r.Gw != nil || r.Via != nil || len(r.MultiPath) > 0 {
				continue
			}
			if ip, ok := netip.AddrFromSlice(r.Dst.IP); ok {
				bits, _ := r.Dst.Mask.Size()
				add(netip.PrefixFrom(ip.Unmap(), bits))
			}
		}
	}
	slices.SortFunc(list, func(a, b netip.Prefix) int { return strings.Compare(a.String(), b.String()) })
	return list, nil
}

// forwarding makes the node a router, if it has egress to route; what else it could forward, the rules drop, also when
// egress has ended. An interface that learns its own routes from advertisements goes on doing so, which the kernel
// denies routers unless told twice.
func (f Firewall) forwarding() error {
	if !f.Egress {
		return nil
	}
	const conf = "/proc/sys/net/ipv6/conf"
	entries, err := os.ReadDir(conf)
	if err != nil {
		return fmt.Errorf("list interfaces: %w", err)
	}
	for _, e := range entries {
		if have, err := os.ReadFile(conf + "/" + e.Name() + "/accept_ra"); err == nil && strings.TrimSpace(string(have)) == "1" {
			if err := sysctl("ipv6/conf/"+e.Name()+"/accept_ra", "2"); err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
		}
	}
	for _, key := range []string{"ipv6/conf/all/forwarding", "ipv4/conf/all/forwarding"} {
		if err := sysctl(key, "1"); err != nil {
			return err
		}
	}
	return nil
}

// Run applies the rules, and applies them again when the node's addresses change, until ctx ends. The rules stay.
func (f Firewall) Run(ctx context.Context) error {
	log := f.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	changed := make(chan netlink.AddrUpdate, 16)
	done := make(chan struct{})
	options := netlink.AddrSubscribeOptions{ErrorCallback: func(err error) { log.Debug("address subscription", "error", err) }}
	if f.Main != "" {
		ns, err := netns.GetFromPath(f.Main)
		if err != nil {
			return fmt.Errorf("firewall: open namespace %s: %w", f.Main, err)
		}
		defer ns.Close()
		options.Namespace = &ns
	}
	if err := netlink.AddrSubscribeWithOptions(changed, done, options); err != nil {
		return fmt.Errorf("firewall: watch addresses: %w", err)
	}
	defer func() {
		close(done)
		for range changed { // closed by its sender, which ends with it
		}
	}()
	resync := time.NewTicker(30 * time.Second)
	defer resync.Stop()
	for {
		if err := f.Apply(); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case _, ok := <-changed:
			if !ok {
				return errors.New("firewall: the kernel stopped reporting addresses")
			}
			for len(changed) > 0 { // addresses come in swarms
				<-changed
			}
		case <-resync.C:
		}
	}
}
