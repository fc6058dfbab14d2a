package overlay

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// gateway is what every workload's default route points to: the NET end of its own veth.
var gateway = netip.MustParseAddr("fe80::1")

func netPath(dir, name string) string      { return filepath.Join(dir, name, "net") }
func workPath(dir, name, id string) string { return filepath.Join(dir, name, "w-"+id) }

// A place is an Attachment as the kernel has it. Its link's alias says it all, so that a restarted agent needs no file:
// "ADDR SLOT ID", written last, when the place is complete.
type place struct {
	Attachment
	slot int // IPv4 slot for egress, 0 if none
}

func (p place) alias() string { return fmt.Sprintf("%v %d %s", p.Addr, p.slot, p.ID) }

func parseAlias(s string) (p place, err error) {
	addr, rest, _ := strings.Cut(s, " ")
	slot, id, _ := strings.Cut(rest, " ")
	if p.Addr, err = netip.ParseAddr(addr); err != nil {
		return p, err
	}
	if p.slot, err = strconv.Atoi(slot); err != nil {
		return p, err
	}
	if p.ID = id; !idForm.MatchString(id) {
		return p, fmt.Errorf("attachment %q: not an id", id)
	}
	return p, nil
}

// linkName names the NET end of a workload's veth. Interface names are too short for IDs.
func linkName(id string) string {
	d := sha256.Sum256([]byte(id))
	return fmt.Sprintf("w%x", d[:6])
}

// macs derives the addresses of both ends, locally administered.
func macs(id string) (workload, router net.HardwareAddr) {
	d := sha256.Sum256([]byte("mac\x00" + id))
	return append(net.HardwareAddr{0x02}, d[:5]...), append(net.HardwareAddr{0x06}, d[:5]...)
}

// Attach gives a workload its namespace and returns its path. A workload that is attached already is left untouched, for
// a sandbox may have taken the addresses of its interface over; to start another sandbox, Detach first.
//
// A workload whose egress rules, known by then, name IPv4 prefixes gets a private IPv4 address as well.
func (n *Network) Attach(ctx context.Context, a Attachment) (string, error) {
	switch {
	case n.cfg.InMain:
		return "", fmt.Errorf("attach %s to %s: %w", a.ID, n.cfg.Name, ErrNoWorkloads)
	case !idForm.MatchString(a.ID):
		return "", fmt.Errorf("attach %q to %s: want an id of 1 to 63 of a-z, 0-9 and -", a.ID, n.cfg.Name)
	case !n.prefix.Contains(a.Addr) || a.Addr == n.cfg.Self || a.Addr.Zone() != "":
		return "", fmt.Errorf("attach %s to %s: address %v is not a workload's in %v", a.ID, n.cfg.Name, a.Addr, n.prefix)
	}
	n.kernel.Lock()
	defer n.kernel.Unlock()
	if err := ctx.Err(); err != nil {
		return "", err
	}
	path, err := n.attach(a)
	if err != nil {
		return "", fmt.Errorf("attach %s to %s: %w", a.ID, n.cfg.Name, err)
	}
	n.poke()
	return path, nil
}

func (n *Network) attach(a Attachment) (string, error) {
	if err := n.ensureNet(); err != nil {
		return "", err
	}
	places, err := n.places()
	if err != nil {
		return "", err
	}
	path := workPath(n.cfg.Dir, n.cfg.Name, a.ID)
	for _, p := range places {
		switch {
		case p.ID == a.ID && p.Addr != a.Addr:
			return "", fmt.Errorf("already attached with address %v", p.Addr)
		case p.ID == a.ID && isNamespace(path):
			return path, nil
		case p.ID != a.ID && p.Addr == a.Addr:
			return "", fmt.Errorf("address %v belongs to %s", a.Addr, p.ID)
		}
	}
	// Whatever is there of it is incomplete.
	places = slices.DeleteFunc(places, func(p place) bool { return p.ID == a.ID })
	if err := n.detach(a.ID); err != nil {
		return "", err
	}
	p := place{Attachment: a}
	n.mu.Lock()
	rules := n.egress[a.Addr]
	n.mu.Unlock()
	if slices.ContainsFunc(rules, func(e Egress) bool { return e.Prefix.Addr().Is4() }) {
		if p.slot, err = freeSlot(places); err != nil {
			return "", err
		}
	}
	if err := makeNamespace(path, quiet); err != nil {
		return "", err
	}
	if err := n.plug(p, path); err != nil {
		return "", errors.Join(err, n.detach(a.ID))
	}
	if err := n.applyRules(append(places, p)); err != nil {
		return "", errors.Join(err, n.detach(a.ID))
	}
	return path, nil
}

// plug runs a veth from NET into the workload's namespace.
func (n *Network) plug(p place, path string) error {
	workMAC, routerMAC := macs(p.ID)
	ns, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open namespace %s: %w", path, err)
	}
	defer unix.Close(ns)
	err = within(n.tunNS(), func() error {
		return netlink.LinkAdd(&netlink.Veth{
			LinkAttrs:        netlink.LinkAttrs{Name: linkName(p.ID), HardwareAddr: routerMAC, MTU: n.cfg.MTU},
			PeerName:         "eth0",
			PeerHardwareAddr: workMAC,
			PeerNamespace:    netlink.NsFd(ns),
		})
	})
	if err != nil {
		return fmt.Errorf("make veth: %w", err)
	}
	err = within(path, func() error {
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return fmt.Errorf("find eth0: %w", err)
		}
		if err := netlink.LinkSetMTU(link, n.cfg.MTU); err != nil {
			return fmt.Errorf("set mtu of eth0: %w", err)
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return fmt.Errorf("bring up eth0: %w", err)
		}
		if err := addAddr(link, netip.PrefixFrom(p.Addr, 128)); err != nil {
			return err
		}
		if err := addNeighbour(link, gateway, routerMAC); err != nil {
			return err
		}
		if err := addRoute(netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(everywhere6), Gw: gateway.AsSlice()}); err != nil {
			return err
		}
		if p.slot == 0 {
			return nil
		}
		gw := n.addr4(slotGateway)
		if err := addAddr(link, netip.PrefixFrom(n.addr4(p.slot), 32)); err != nil {
			return err
		}
		if err := addNeighbour(link, gw, routerMAC); err != nil {
			return err
		}
		// The gateway is made reachable by a route of its own: sandboxes that copy routes know no "onlink".
		if err := addRoute(netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(netip.PrefixFrom(gw, 32)), Scope: netlink.SCOPE_LINK}); err != nil {
			return err
		}
		return addRoute(netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(everywhere4), Gw: gw.AsSlice()})
	})
	if err != nil {
		return err
	}
	return within(n.tunNS(), func() error {
		link, err := netlink.LinkByName(linkName(p.ID))
		if err != nil {
			return fmt.Errorf("find veth: %w", err)
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return fmt.Errorf("bring up veth: %w", err)
		}
		if err := addAddr(link, netip.PrefixFrom(gateway, 64)); err != nil {
			return err
		}
		addrs := []netip.Addr{p.Addr}
		if p.slot != 0 {
			addrs = append(addrs, n.addr4(p.slot))
		}
		for _, a := range addrs {
			if err := addNeighbour(link, a, workMAC); err != nil {
				return err
			}
			route := netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(netip.PrefixFrom(a, a.BitLen()))}
			if a.Is4() {
				route.Scope = netlink.SCOPE_LINK
			}
			if err := addRoute(route); err != nil {
				return err
			}
		}
		if err := netlink.LinkSetAlias(link, p.alias()); err != nil {
			return fmt.Errorf("label veth: %w", err)
		}
		return nil
	})
}

// Detach removes a workload's place in the network. One that is not attached is no error.
func (n *Network) Detach(ctx context.Context, id string) error {
	if !idForm.MatchString(id) {
		return fmt.Errorf("detach %q from %s: not an id", id, n.cfg.Name)
	}
	n.kernel.Lock()
	defer n.kernel.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := n.detach(id); err != nil {
		return fmt.Errorf("detach %s from %s: %w", id, n.cfg.Name, err)
	}
	n.poke()
	return nil
}

func (n *Network) detach(id string) error {
	if isNamespace(n.tunNS()) {
		if err := within(n.tunNS(), func() error { return removeLink(linkName(id)) }); err != nil {
			return err
		}
	}
	return removeNamespace(workPath(n.cfg.Dir, n.cfg.Name, id))
}

func removeLink(name string) error {
	link, err := netlink.LinkByName(name)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("find %s: %w", name, err)
	}
	if err := netlink.LinkDel(link); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("remove %s: %w", name, err)
	}
	return nil
}

// Attachments lists the workloads attached on this node, by this process or one before it, ordered by ID.
func (n *Network) Attachments() ([]Attachment, error) {
	n.kernel.Lock()
	defer n.kernel.Unlock()
	places, err := n.places()
	if err != nil {
		return nil, fmt.Errorf("list attachments of %s: %w", n.cfg.Name, err)
	}
	list := make([]Attachment, len(places))
	for i, p := range places {
		list[i] = p.Attachment
	}
	return list, nil
}

// places reads the complete attachments from the kernel.
func (n *Network) places() ([]place, error) {
	if n.cfg.InMain || !isNamespace(n.tunNS()) {
		return nil, nil
	}
	var places []place
	err := within(n.tunNS(), func() error {
		links, err := dump(netlink.LinkList)
		if err != nil {
			return fmt.Errorf("list links: %w", err)
		}
		for _, link := range links {
			if p, err := parseAlias(link.Attrs().Alias); err == nil && link.Attrs().Name == linkName(p.ID) {
				places = append(places, p)
			}
		}
		return nil
	})
	slices.SortFunc(places, func(a, b place) int { return strings.Compare(a.ID, b.ID) })
	return places, err
}

// ensureNet makes NET if it is not there. Its rules come first: nothing passes them that is not attached.
func (n *Network) ensureNet() error {
	if n.cfg.InMain || isNamespace(n.tunNS()) {
		return nil
	}
	return makeNamespace(n.tunNS(), func() error {
		if err := quiet(); err != nil {
			return err
		}
		// Sources are checked by the pins, and IPv4 links have no addresses of their own to check by.
		for _, key := range []string{"ipv4/conf/all/rp_filter", "ipv4/conf/default/rp_filter"} {
			if err := sysctl(key, "0"); err != nil {
				return err
			}
		}
		if err := n.replaceRules(nil, nil); err != nil {
			return err
		}
		for _, key := range []string{"ipv6/conf/all/forwarding", "ipv4/conf/all/forwarding"} {
			if err := sysctl(key, "1"); err != nil {
				return err
			}
		}
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return fmt.Errorf("find lo: %w", err)
		}
		if err := addAddr(lo, netip.PrefixFrom(n.cfg.Self, 128)); err != nil {
			return err
		}
		// While the tunnel is away, packets for it vanish. An error sent back would end connections.
		return addRoute(netlink.Route{Dst: ipNet(n.prefix), Type: unix.RTN_BLACKHOLE, Priority: 1 << 20, LinkIndex: lo.Attrs().Index})
	})
}

// sweep removes what is in NET or beside it and belongs to no complete attachment.
func (n *Network) sweep() error {
	places, err := n.places()
	if err != nil {
		return err
	}
	known := make(map[string]bool)
	for _, p := range places {
		known[linkName(p.ID)] = true
		known["w-"+p.ID] = isNamespace(workPath(n.cfg.Dir, n.cfg.Name, p.ID))
		if !known["w-"+p.ID] {
			known[linkName(p.ID)] = false
		}
	}
	entries, err := os.ReadDir(filepath.Join(n.cfg.Dir, n.cfg.Name))
	if err != nil {
		return fmt.Errorf("sweep: %w", err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), "w-") && !known[e.Name()] {
			n.log.Info("removed a leftover", "namespace", e.Name())
			if err := removeNamespace(filepath.Join(n.cfg.Dir, n.cfg.Name, e.Name())); err != nil {
				return err
			}
		}
	}
	return within(n.tunNS(), func() error {
		links, err := dump(netlink.LinkList)
		if err != nil {
			return fmt.Errorf("list links: %w", err)
		}
		for _, link := range links {
			switch name := link.Attrs().Name; {
			case name == "lo" || name == n.tunName() || name == uplinkInner || known[name]:
			default:
				n.log.Info("removed a leftover", "link", name)
				if err := removeLink(name); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

// List tells the names of the networks that have a namespace under dir.
func List(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list networks: %w", err)
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() && nameForm.MatchString(e.Name()) {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// Destroy removes a network that List found, with its attachments. Its Network must not run.
func Destroy(ctx context.Context, dir, name string) error {
	if !nameForm.MatchString(name) {
		return fmt.Errorf("destroy network %q: not a name", name)
	}
	root := filepath.Join(dir, name)
	entries, err := os.ReadDir(root)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("destroy network %s: %w", name, err)
	}
	if path := netPath(dir, name); isNamespace(path) {
		// The kernel takes its time over an abandoned namespace; its links go now.
		err := within(path, func() error {
			links, err := dump(netlink.LinkList)
			if err != nil {
				return fmt.Errorf("list links: %w", err)
			}
			for _, link := range links {
				if link.Attrs().Name != "lo" {
					if err := removeLink(link.Attrs().Name); err != nil {
						return err
					}
				}
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("destroy network %s: %w", name, err)
		}
	}
	for _, e := range entries {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := removeNamespace(filepath.Join(root, e.Name())); err != nil {
			return fmt.Errorf("destroy network %s: %w", name, err)
		}
	}
	if err := os.Remove(root); err != nil {
		return fmt.Errorf("destroy network %s: %w", name, err)
	}
	return nil
}
