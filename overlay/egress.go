package overlay

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Egress goes through a veth from NET to the node's own namespace, which exists only while some workload has a rule.
// IPv6 keeps its source until the node masquerades it. IPv4 uses private addresses: every network has 64 of 100.64.0.0/10
// by its port, of which 1 is the gateway, 62 is NET and the workloads take the rest.
const (
	uplinkInner = "up0"
	uplinkOuter = "hf-" // + name
	slotGateway = 1
	slotNet     = 62

	// Connections that one workload may have through the node. The node's connection tracking table is its own lifeline.
	egressFlows = 4096
	egressRate  = 512 // new ones a second, after the first egressFlows: closed ones are kept for ten seconds
)

var (
	everywhere6 = netip.MustParsePrefix("::/0")
	everywhere4 = netip.MustParsePrefix("0.0.0.0/0")
	egressPool4 = netip.MustParsePrefix("100.64.0.0/10")
	outerSide   = netip.MustParseAddr("fe80::1")
	innerSide   = netip.MustParseAddr("fe80::2")
	outerMAC    = net.HardwareAddr{0x06, 'h', 'f', 'o', 'u', 't'}
	innerMAC    = net.HardwareAddr{0x06, 'h', 'f', 'n', 'e', 't'}
)

// block4 is this network's share of the pool.
func (n *Network) block4() netip.Prefix { return netip.PrefixFrom(n.addr4(0), 26) }

func (n *Network) addr4(slot int) netip.Addr {
	base := egressPool4.Addr().As4()
	var a [4]byte
	binary.BigEndian.PutUint32(a[:], binary.BigEndian.Uint32(base[:])|uint32(n.cfg.Port)<<6|uint32(slot))
	return netip.AddrFrom4(a)
}

func freeSlot(places []place) (int, error) {
	used := make(map[int]bool)
	for _, p := range places {
		used[p.slot] = true
	}
	for slot := slotGateway + 1; slot < slotNet; slot++ {
		if !used[slot] {
			return slot, nil
		}
	}
	return 0, errors.New("no IPv4 address is left for egress")
}

func checkEgress(rules map[netip.Addr][]Egress) error {
	for addr, list := range rules {
		for _, e := range list {
			if !e.Prefix.IsValid() || e.Prefix.Addr().Is4In6() || e.Prefix != e.Prefix.Masked() || e.Proto != "tcp" && e.Proto != "udp" {
				return fmt.Errorf("egress of %v: bad rule %v %q", addr, e.Prefix, e.Proto)
			}
		}
	}
	return nil
}

// linkOut makes the way out, or takes it away.
func (n *Network) linkOut(wanted bool) error {
	outer := uplinkOuter + n.cfg.Name
	if !wanted {
		return within(n.tunNS(), func() error { return removeLink(uplinkInner) })
	}
	ns, err := unix.Open(n.tunNS(), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open namespace: %w", err)
	}
	defer unix.Close(ns)
	inner := false
	err = within(n.tunNS(), func() error {
		_, err := netlink.LinkByName(uplinkInner)
		inner = err == nil
		return nil
	})
	if err != nil {
		return err
	}
	err = within(n.cfg.Main, func() error {
		link, err := netlink.LinkByName(outer)
		if err == nil && !inner {
			// Its other end is not ours: a namespace that is gone but not yet forgotten.
			if err := removeLink(outer); err != nil {
				return err
			}
		}
		if err != nil || !inner {
			veth := &netlink.Veth{
				LinkAttrs:        netlink.LinkAttrs{Name: outer, HardwareAddr: outerMAC, MTU: 1500},
				PeerName:         uplinkInner,
				PeerHardwareAddr: innerMAC,
				PeerNamespace:    netlink.NsFd(ns),
			}
			if err := netlink.LinkAdd(veth); err != nil {
				return fmt.Errorf("make %s: %w", outer, err)
			}
			if link, err = netlink.LinkByName(outer); err != nil {
				return fmt.Errorf("find %s: %w", outer, err)
			}
		}
		if err := sysctl("ipv6/conf/"+outer+"/addr_gen_mode", "1"); err != nil {
			return err
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return fmt.Errorf("bring up %s: %w", outer, err)
		}
		if err := addAddr(link, netip.PrefixFrom(n.addr4(slotGateway), 32)); err != nil {
			return err
		}
		for _, r := range []struct {
			to  netip.Prefix
			via netip.Addr
		}{{n.prefix, innerSide}, {n.block4(), n.addr4(slotNet)}} {
			if err := addNeighbour(link, r.via, innerMAC); err != nil {
				return err
			}
			if err := addRoute(netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(r.to), Gw: r.via.AsSlice(), Flags: int(netlink.FLAG_ONLINK)}); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return within(n.tunNS(), func() error {
		link, err := netlink.LinkByName(uplinkInner)
		if err != nil {
			return fmt.Errorf("find %s: %w", uplinkInner, err)
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return fmt.Errorf("bring up %s: %w", uplinkInner, err)
		}
		for _, r := range []struct {
			to  netip.Prefix
			via netip.Addr
		}{{everywhere6, outerSide}, {everywhere4, n.addr4(slotGateway)}} {
			if err := addNeighbour(link, r.via, outerMAC); err != nil {
				return err
			}
			if err := addRoute(netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(r.to), Gw: r.via.AsSlice(), Flags: int(netlink.FLAG_ONLINK)}); err != nil {
				return err
			}
		}
		return nil
	})
}
