package overlay

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// unprotect removes our rules in a namespace: what a test then sees is what the rules prevent.
func unprotect(t testing.TB, ns string) {
	t.Helper()
	must(t, within(ns, func() error {
		conn, err := nftables.New()
		if err != nil {
			return err
		}
		conn.DelTable(&nftables.Table{Name: tableName, Family: nftables.TableFamilyINet})
		return conn.Flush()
	}))
}

// Root in a workload sends whatever he likes from his interface; the others see only what bears his own addresses.
func TestForgedSourcesAreDropped(t *testing.T) {
	l := newLab(t, 2)
	one, two := l.boxes[0].join("forge", 30010), l.boxes[1].join("forge", 30010)
	pa, a := one.attach("a")
	pb, b := one.attach("b")
	pc, c := two.attach("c")
	mesh(t, one, two)
	listen(t, pc, netip.AddrPortFrom(c, 80), "up")
	reachable(t, pa, netip.AddrPortFrom(c, 80), "up")
	mac, router := macs("a")
	otherMAC, _ := macs("b")
	near, far, node := sniff(t, pb, "eth0"), sniff(t, pc, "eth0"), sniff(t, one.tunNS(), "tun0")

	forged := map[string][]byte{}
	add := func(name string, from net.HardwareAddr, src, dst netip.Addr) {
		forged[name] = frame(from, router, src, dst, unix.IPPROTO_UDP, 9, []byte("forged: "+name))
	}
	for where, dst := range map[string]netip.Addr{"near": b, "far": c} {
		add("the address of the other workload here, to "+where, mac, map[string]netip.Addr{"near": c, "far": b}[where], dst)
		add("the node's own address, to "+where, mac, one.cfg.Self, dst)
		add("the other node's address, to "+where, mac, two.cfg.Self, dst)
		add("an address that nobody has, to "+where, mac, Addr(netID("forge"), [32]byte{77}), dst)
		add("an address of another network, to "+where, mac, Addr(netID("else"), [32]byte{1}), dst)
		add("a public address, to "+where, mac, netip.MustParseAddr("2001:db8:1::2"), dst)
		add("a link-local address, to "+where, mac, netip.MustParseAddr("fe80::5"), dst)
		add("loopback, to "+where, mac, netip.MustParseAddr("::1"), dst)
		add("no address, to "+where, mac, netip.IPv6Unspecified(), dst)
		add("another's MAC, to "+where, otherMAC, a, dst)
	}
	honest := [][]byte{
		frame(mac, router, a, b, unix.IPPROTO_UDP, 9, []byte("honest near")),
		frame(mac, router, a, c, unix.IPPROTO_UDP, 9, []byte("honest far")),
	}
	send := func() {
		for _, f := range forged {
			inject(t, pa, "eth0", f)
		}
		inject(t, pa, "eth0", honest...)
		if !soon(5*time.Second, func() bool { return near.has("honest near") && far.has("honest far") }) {
			t.Fatal("control: honest packets did not arrive")
		}
	}
	send()
	for _, s := range []*sniffer{near, far, node} {
		if s.has("forged: ") {
			t.Error("a forged packet passed")
		}
	}
	// A neighbour's lie changes nothing: what is for b goes to b.
	lie := make([]byte, 32)
	lie[0] = icmpNeighbourAdvert
	binary.BigEndian.PutUint32(lie[4:], 0x20000000)
	copy(lie[8:], b.AsSlice())
	copy(lie[24:], append([]byte{2, 1}, mac...))
	inject(t, pa, "eth0", frame(mac, router, a, gateway, unix.IPPROTO_ICMPV6, 0, lie), frame(mac, router, b, gateway, unix.IPPROTO_ICMPV6, 0, lie))
	own := sniff(t, pa, "eth0")
	listen(t, pb, netip.AddrPortFrom(b, 81), "for b alone")
	reachable(t, pc, netip.AddrPortFrom(b, 81), "for b alone")
	if own.has("for b alone") {
		t.Error("a workload turned another's traffic to itself")
	}

	unprotect(t, one.tunNS())
	send()
	if !soon(5*time.Second, func() bool {
		return near.has("forged: an address of another network, to near") && near.has("forged: another's MAC, to near") && node.has("forged: the address of the other workload here, to far")
	}) {
		t.Error("control: without the rules forged packets do not arrive either")
	}
	if far.has("forged: the node's own address of") || far.has("forged: an address of another network, to far") {
		t.Error("WireGuard let a foreign source out of its tunnel")
	}
}

// A farmer who is root on his node sends from other members' addresses through the tunnel.
func TestForgedPeerSourcesAreDropped(t *testing.T) {
	l := newLab(t, 3)
	var ms []*member
	for _, b := range l.boxes {
		ms = append(ms, b.join("evil", 30011))
	}
	victim, v := ms[0].attach("victim")
	_, mine := ms[1].attach("mine")
	_, other := ms[2].attach("other")
	mesh(t, ms...)
	seen := sniff(t, victim, "eth0")
	listen(t, victim, netip.AddrPortFrom(v, 80), "up")
	evil := ms[1].tunNS()
	must(t, within(evil, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		for _, a := range []netip.Addr{mine, other, ms[0].cfg.Self, netip.MustParseAddr("2001:db8:bad::1")} {
			if err := addAddr(lo, netip.PrefixFrom(a, 128)); err != nil {
				return err
			}
		}
		return nil
	}))
	say := func(src netip.Addr, text string) error {
		return within(evil, func() error {
			c, err := net.DialUDP("udp6", net.UDPAddrFromAddrPort(netip.AddrPortFrom(src, 0)), net.UDPAddrFromAddrPort(netip.AddrPortFrom(v, 9)))
			if err != nil {
				return err
			}
			defer c.Close()
			_, err = io.WriteString(c, text)
			return err
		})
	}
	honest := func(text string) {
		t.Helper()
		// Until the network has come up there is no route, and a socket says so.
		var err error
		if !soon(10*time.Second, func() bool { err = say(mine, text); return seen.has(text) }) {
			t.Fatalf("control: the peer's own source did not arrive: %v", err)
		}
	}
	honest("honest 1")
	must(t, say(other, "forged other"))
	must(t, say(ms[0].cfg.Self, "forged self"))
	must(t, say(netip.MustParseAddr("2001:db8:bad::1"), "forged public"))
	honest("honest 2")
	if seen.has("forged") {
		t.Error("a forged source came through the tunnel")
	}
	// Without allowed addresses it would: the victim's node is told that the address is the evil one's.
	p1, p2 := ms[1].as(ms[0]), ms[2].as(ms[0])
	p1.Addrs, p2.Addrs = append(p1.Addrs, p2.Addrs[1]), p2.Addrs[:1]
	must(t, ms[0].SetPeers([]Peer{p1, p2}))
	if !soon(5*time.Second, func() bool { must(t, say(other, "forged other")); return seen.has("forged other") }) {
		t.Error("control: the forged source never arrives")
	}
}

// Root in a workload, with any addresses and routes he gives himself, reaches his network and nothing else.
func TestWorkloadReachesNothingElse(t *testing.T) {
	l := newLab(t, 2)
	b := l.boxes[0]
	must(t, Firewall{Main: b.ns}.Apply())
	one, else1 := b.join("mine", 30012), b.join("else", 30013)
	pa, a := one.attach("a")
	pf, f := one.attach("friend")
	pe, e := else1.attach("e")
	metadata := netip.MustParseAddr("169.254.169.254")
	ledger := netip.MustParseAddr("2001:db8:ffff::1")
	must(t, within(l.router, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		addAddr(lo, netip.PrefixFrom(metadata, 32))
		return addAddr(lo, netip.PrefixFrom(ledger, 128))
	}))
	type place struct {
		name, ns string
		addr     netip.Addr
	}
	targets := []place{
		{"another network's workload", pe, e},
		{"the node", b.ns, b.v6}, {"the node's IPv4", b.ns, b.v4}, {"the farm's LAN", l.router, b.v6.Prev()}, {"the farm's IPv4 LAN", l.router, b.v4.Prev()},
		{"another node", l.boxes[1].ns, l.boxes[1].v6}, {"a metadata address", l.router, metadata}, {"the ledger", l.router, ledger},
		{"its own router, but for DNS", one.tunNS(), one.cfg.Self}, {"the other network's router", else1.tunNS(), else1.cfg.Self},
	}
	for _, p := range targets {
		at := netip.AddrPortFrom(p.addr, 7000)
		listen(t, p.ns, at, "here")
		reachable(t, p.ns, at, "here")
	}
	listen(t, pf, netip.AddrPortFrom(f, 7000), "here")
	var link *net.TCPAddr
	must(t, within(one.tunNS(), func() error {
		link = &net.TCPAddr{IP: gateway.AsSlice(), Port: 7000, Zone: linkName("a")}
		l, err := net.ListenTCP("tcp6", link)
		if err == nil {
			t.Cleanup(func() { l.Close() })
		}
		return err
	}))
	// He takes addresses of everyone, and routes for everything.
	_, router := macs("a")
	must(t, within(pa, func() error {
		eth0, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		for _, s := range []string{"169.254.169.1/16", b.v4.Next().String() + "/29", b.v6.Next().String() + "/64", "fe80::7/64"} {
			addAddr(eth0, netip.MustParsePrefix(s))
		}
		for _, p := range targets {
			if err := addNeighbour(eth0, p.addr, router); err != nil {
				return err
			}
		}
		gw := netip.MustParseAddr("192.0.2.1")
		addNeighbour(eth0, gw, router)
		return addRoute(netlink.Route{LinkIndex: eth0.Attrs().Index, Dst: ipNet(everywhere4), Gw: gw.AsSlice(), Flags: int(netlink.FLAG_ONLINK)})
	}))
	seen := map[string]*sniffer{}
	for _, p := range targets {
		if seen[p.ns] == nil && p.ns != one.tunNS() {
			seen[p.ns] = sniff(t, p.ns, "")
		}
	}
	type result struct {
		name string
		err  error
	}
	results := make(chan result)
	for _, p := range targets {
		go func() {
			c, err := dial(pa, netip.AddrPortFrom(p.addr, 7000), 700*time.Millisecond)
			if err == nil {
				c.Close()
			}
			results <- result{p.name, err}
		}()
	}
	go func() {
		err := within(pa, func() error {
			c, err := net.DialTimeout("tcp6", "[fe80::1%eth0]:7000", 700*time.Millisecond)
			if err == nil {
				c.Close()
			}
			return err
		})
		results <- result{"the link-local address of its router", err}
	}()
	for range len(targets) + 1 {
		if r := <-results; r.err == nil {
			t.Errorf("%s was reached", r.name)
		}
	}
	// And without waiting for answers, from every source.
	mac, _ := macs("a")
	for _, src := range []netip.Addr{a, e, f, b.v6, b.v6.Prev(), ledger, one.cfg.Self, else1.cfg.Self, netip.MustParseAddr("fe80::9")} {
		for _, p := range targets {
			if p.addr.Is6() && p.ns != one.tunNS() {
				inject(t, pa, "eth0", frame(mac, router, src, p.addr, unix.IPPROTO_UDP, 7001, []byte("stray")))
			}
		}
	}
	inject(t, pa, "eth0", frame(mac, router, b.v4.Next(), b.v4, unix.IPPROTO_UDP, 7001, []byte("stray")))
	reachable(t, pa, netip.AddrPortFrom(f, 7000), "here")
	for ns, s := range seen {
		if s.has("stray") {
			t.Errorf("a stray packet reached %s", ns)
		}
	}
	// The router does listen; it is the rules that hide it.
	unprotect(t, one.tunNS())
	reachable(t, pa, netip.AddrPortFrom(one.cfg.Self, 7000), "here")
}

// probe sends a SYN and a UDP packet to every port, and returns what came back but neighbour discovery and ARP.
func probe(t testing.TB, l *lab, b *box) (answers int) {
	t.Helper()
	iface := fmt.Sprintf("box%d", b.n)
	var from, to net.HardwareAddr
	var local netip.Addr // of the router, on the link
	must(t, within(l.router, func() error {
		dev, err := net.InterfaceByName(iface)
		if err != nil {
			return err
		}
		from = dev.HardwareAddr
		addrs, err := dev.Addrs()
		for _, a := range addrs {
			if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().IsLinkLocalUnicast() {
				local = p.Addr()
			}
		}
		return err
	}))
	if !local.IsValid() {
		t.Fatal("the router has no address of the link")
	}
	must(t, within(b.ns, func() error {
		dev, err := net.InterfaceByName("eth0")
		if err == nil {
			to = dev.HardwareAddr
		}
		return err
	}))
	s := sniff(t, l.router, iface)
	var frames [][]byte
	for _, pair := range [][2]netip.Addr{{b.v6.Prev(), b.v6}, {b.v4.Prev(), b.v4}} {
		for port := 1; port < 65536; port++ {
			frames = append(frames,
				frame(from, to, pair[0], pair[1], unix.IPPROTO_TCP, uint16(port), nil),
				frame(from, to, pair[0], pair[1], unix.IPPROTO_UDP, uint16(port), []byte("probe")))
		}
	}
	// As a DHCP server would, whom the rules let in.
	for range 3 {
		frames = append(frames,
			frameFrom(67, from, to, b.v4.Prev(), b.v4, unix.IPPROTO_UDP, 68, []byte("probe")),
			frameFrom(547, from, to, local, b.v6, unix.IPPROTO_UDP, 546, []byte("probe")))
	}
	ping := []byte{icmpEcho, 0, 0, 0, 1, 2, 3, 4}
	frames = append(frames, frame(from, to, b.v6.Prev(), b.v6, unix.IPPROTO_ICMPV6, 0, ping))
	inject(t, l.router, iface, frames...)
	// A last question that is always answered says that the rest was looked at.
	solicit := make([]byte, 24)
	solicit[0] = icmpNeighbourSolicit
	copy(solicit[8:], b.v6.AsSlice())
	advert := func(f []byte) bool {
		return bytes.HasPrefix(f[6:], to) && len(f) > 54 && f[20] == 58 && f[54] == icmpNeighbourAdvert
	}
	if !soon(5*time.Second, func() bool {
		inject(t, l.router, iface, frame(from, to, b.v6.Prev(), b.v6, unix.IPPROTO_ICMPV6, 0, solicit))
		return s.count(advert) > 0
	}) {
		t.Fatal("control: the node does not answer neighbour discovery")
	}
	return s.count(func(f []byte) bool {
		if !bytes.HasPrefix(f[6:], to) || f[12] == 0x08 && f[13] == 0x06 {
			return false
		}
		return !(f[12] == 0x86 && f[20] == 58 && f[54] >= 133 && f[54] <= 136) && !(f[12] == 0x86 && f[20] == 0) // ND, MLD reports
	})
}

func TestScanFindsNothing(t *testing.T) {
	l := newLab(t, 1)
	b := l.boxes[0]
	must(t, Firewall{Main: b.ns}.Apply())
	m := b.join("scan", 30014)
	sys := b.join("sys0", 30000, func(c *Config) { c.InMain = true })
	m.attach("w")
	for _, addr := range []netip.Addr{b.v6, b.v4} {
		listen(t, b.ns, netip.AddrPortFrom(addr, 22), "planted")
	}
	open, err := sys.Listen(t.Context(), 443)
	must(t, err)
	defer open.Close()
	if !soon(5*time.Second, func() bool { return sys.Status() != nil }) {
		t.Fatal("the system network did not come up")
	}
	start := time.Now()
	if n := probe(t, l, b); n != 0 {
		t.Errorf("the node answered %d times", n)
	}
	t.Log("probed in", time.Since(start))
	if _, err := dial(l.router, netip.AddrPortFrom(b.v6, 22), 300*time.Millisecond); err == nil {
		t.Error("the planted listener was reached")
	}
	unprotect(t, b.ns)
	reachable(t, l.router, netip.AddrPortFrom(b.v6, 22), "planted")
	reachable(t, l.router, netip.AddrPortFrom(b.v4, 22), "planted")
	if n := probe(t, l, b); n < 1000 {
		t.Errorf("control: without rules the node answered %d times", n)
	}
}

func TestSystemNetworkAccess(t *testing.T) {
	l := newLab(t, 3)
	var ms []*member
	for _, b := range l.boxes {
		must(t, Firewall{Main: b.ns, Access: []Access{{Interface: "sys0"}}}.Apply())
		ms = append(ms, b.join("sys0", 30000, func(c *Config) { c.InMain = true }))
	}
	mesh(t, ms...)
	allow := func(i int, who ...netip.Addr) {
		must(t, Firewall{Main: l.boxes[i].ns, Access: []Access{{"sys0", who, []uint16{7000}}}}.Apply())
	}
	allow(0, ms[1].cfg.Self)
	allow(1)
	allow(2, ms[0].cfg.Self)
	at := func(i int) netip.AddrPort { return netip.AddrPortFrom(ms[i].cfg.Self, 7000) }
	for _, m := range ms {
		ln, err := m.Listen(t.Context(), 7000)
		must(t, err)
		serve(t, ln, "sys")
	}
	kept, err := greet(l.boxes[1].ns, at(0), "sys", 5*time.Second)
	must(t, err)
	defer kept.Close()
	echo(t, kept, "listed")
	// A port that is not opened to it is not there, whoever listens.
	listen(t, l.boxes[0].ns, netip.MustParseAddrPort("[::]:22"), "sshd")
	if _, err := dial(l.boxes[1].ns, netip.AddrPortFrom(ms[0].cfg.Self, 22), 500*time.Millisecond); err == nil {
		t.Error("a listed node reached a port that is not opened")
	}
	listen(t, l.boxes[1].ns, netip.MustParseAddrPort("[::]:22"), "sshd")
	must(t, Firewall{Main: l.boxes[1].ns, Access: []Access{{Interface: "sys0", Sources: []netip.Addr{ms[0].cfg.Self}}}}.Apply())
	for _, port := range []uint16{22, 7000} {
		if _, err := dial(l.boxes[0].ns, netip.AddrPortFrom(ms[1].cfg.Self, port), 500*time.Millisecond); err == nil {
			t.Errorf("a listed node reached port %d, and none is opened", port)
		}
	}
	// The one that is not listed is not heard, and hears answers all the same.
	if _, err := dial(l.boxes[2].ns, at(0), 500*time.Millisecond); err == nil {
		t.Error("a node that is not listed connected")
	}
	answered, err := greet(l.boxes[0].ns, at(2), "sys", 5*time.Second)
	must(t, err)
	defer answered.Close()
	allow(0, ms[2].cfg.Self)
	reachable(t, l.boxes[2].ns, at(0), "sys")
	echo(t, answered, "still")
	kept.SetDeadline(time.Now().Add(500 * time.Millisecond))
	io.WriteString(kept, "struck")
	if _, err := kept.Read(make([]byte, 1)); err == nil {
		t.Error("a node that was struck off the list kept its connection")
	}
	if _, err := ms[0].Attach(t.Context(), Attachment{"w", Addr(netID("sys0"), [32]byte{5})}); err == nil {
		t.Error("the system network took a workload")
	}
}

// A machine that is no node takes part, to ask: nobody who is in the network with it reaches what it has open to others.
func TestAGuestOffersItsNetworkNothing(t *testing.T) {
	l := newLab(t, 2)
	node, guest := l.boxes[0], l.boxes[1]
	a := node.join("sys0", 30000, func(c *Config) { c.InMain = true })
	b := guest.join("sys0", 30000, func(c *Config) { c.InMain = true })
	must(t, Firewall{Main: node.ns, Access: []Access{{"sys0", []netip.Addr{b.cfg.Self}, []uint16{7000}}}}.Apply())
	mesh(t, a, b)
	listen(t, guest.ns, netip.MustParseAddrPort("[::]:8441"), "api")
	ln, err := a.Listen(t.Context(), 7000)
	must(t, err)
	serve(t, ln, "sys")
	inside := netip.AddrPortFrom(b.cfg.Self, 8441)
	reachable(t, node.ns, inside, "api") // the control: without rules
	must(t, Guest{Main: guest.ns, Interface: "sys0"}.Apply())
	if _, err := dial(node.ns, inside, 500*time.Millisecond); err == nil {
		t.Error("a member reached a guest")
	}
	c, err := greet(guest.ns, netip.AddrPortFrom(a.cfg.Self, 7000), "sys", 5*time.Second)
	must(t, err)
	defer c.Close()
	echo(t, c, "answered")
	reachable(t, l.router, netip.AddrPortFrom(guest.v6, 8441), "api") // what it serves to others is its own business
}

// Who shares the cable advertises that a member of the system network is on the link, and answers in its place. (A machine
// believes router advertisements: IPv6 dies without.)
func TestTheCableDoesNotGetTheSystemNetworksTraffic(t *testing.T) {
	l := newLab(t, 2)
	a, b := l.boxes[0], l.boxes[1]
	one := a.join("sys0", 30000, func(c *Config) { c.InMain = true })
	two := b.join("sys0", 30000, func(c *Config) { c.InMain = true })
	mesh(t, one, two)
	must(t, Firewall{Main: b.ns, Access: []Access{{"sys0", []netip.Addr{one.cfg.Self}, []uint16{7000}}}}.Apply())
	protect := func() {
		must(t, Firewall{Main: a.ns, Access: []Access{{Interface: "sys0", Sources: []netip.Addr{two.cfg.Self}}}}.Apply())
	}
	protect()
	ln, err := two.Listen(t.Context(), 7000)
	must(t, err)
	serve(t, ln, "two")
	to := netip.AddrPortFrom(two.cfg.Self, 7000)
	reachable(t, a.ns, to, "two")

	iface := fmt.Sprintf("box%d", a.n)
	var router, victim *net.Interface
	must(t, within(a.ns, func() (err error) {
		victim, err = net.InterfaceByName("eth0")
		return errors.Join(err, sysctl("ipv6/conf/eth0/accept_ra", "2"))
	}))
	var local netip.Addr
	must(t, within(l.router, func() (err error) {
		if router, err = net.InterfaceByName(iface); err != nil {
			return err
		}
		addrs, err := router.Addrs()
		for _, x := range addrs {
			if p, err := netip.ParsePrefix(x.String()); err == nil && p.Addr().IsLinkLocalUnicast() {
				local = p.Addr()
			}
		}
		link, err2 := netlink.LinkByName(iface)
		if err := errors.Join(err, err2); err != nil {
			return err
		}
		addAddr(link, netip.PrefixFrom(two.cfg.Self, 128))
		return nil
	}))
	listen(t, l.router, to, "thief")
	advert := make([]byte, 16, 48)
	advert[0], advert[4] = icmpRouterAdvert, 64
	advert = append(advert, 3, 4, 128, 0x80, 0, 0, 14, 16, 0, 0, 14, 16, 0, 0, 0, 0) // on link, for an hour
	advert = append(advert, two.cfg.Self.AsSlice()...)
	// An answer from the cable to what was asked through the tunnel.
	var pc net.PacketConn
	must(t, within(a.ns, func() (err error) {
		pc, err = new(net.ListenConfig).ListenPacket(t.Context(), "udp6", netip.AddrPortFrom(one.cfg.Self, 9000).String())
		return err
	}))
	defer pc.Close()
	forged := func() bool {
		if _, err := pc.WriteTo([]byte("question"), net.UDPAddrFromAddrPort(netip.AddrPortFrom(two.cfg.Self, 9001))); err != nil {
			t.Log(err)
		}
		inject(t, l.router, iface, frameFrom(9001, router.HardwareAddr, victim.HardwareAddr, two.cfg.Self, one.cfg.Self, unix.IPPROTO_UDP, 9000, []byte("forged")))
		pc.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
		n, _, _ := pc.ReadFrom(make([]byte, 16))
		return n > 0
	}
	if forged() {
		t.Error("an answer from the cable was heard as a member's")
	}
	inject(t, l.router, iface, frame(router.HardwareAddr, victim.HardwareAddr, local, a.v6, unix.IPPROTO_ICMPV6, 0, advert))
	must(t, within(a.ns, func() error { // he says so from an address of his own, too
		return netlink.NeighSet(&netlink.Neigh{LinkIndex: victim.Index, Family: unix.AF_INET6, State: netlink.NUD_PERMANENT, IP: two.cfg.Self.AsSlice(), HardwareAddr: router.HardwareAddr})
	}))
	stolen := func() bool {
		c, err := dial(a.ns, to, time.Second)
		if err != nil {
			return false
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(time.Second))
		who, _ := io.ReadAll(io.LimitReader(c, 3))
		return string(who) == "thi"
	}
	clear := func(f []byte) bool {
		return bytes.HasPrefix(f[6:], victim.HardwareAddr) && len(f) > 54 && f[12] == 0x86 && bytes.Equal(f[38:54], two.cfg.Self.AsSlice())
	}
	wire := sniff(t, l.router, iface)
	for range 3 {
		if stolen() {
			t.Error("the cable answers for a member of the system network")
		}
	}
	if n := wire.count(clear); n > 0 {
		t.Errorf("%d packets for a member of the system network went to the cable, in the clear", n)
	}
	unprotect(t, a.ns)
	if !soon(10*time.Second, stolen) {
		t.Error("control: without rules the cable does not get it")
	}
	if !forged() {
		t.Error("control: without rules an answer from the cable is not heard")
	}
	if wire.count(clear) == 0 {
		t.Error("control: without rules nothing is seen on the cable")
	}
	protect()
	if stolen() || forged() {
		t.Error("again")
	}
}

func TestEgress(t *testing.T) {
	l := newLab(t, 2)
	b := l.boxes[0]
	must(t, Firewall{Main: b.ns, Egress: true}.Apply())
	m, other := b.join("out", 30015), b.join("other", 30016)
	site6, site4 := netip.MustParseAddr("2001:db8:ffff::1"), netip.MustParseAddr("203.0.113.250")
	private6, private4 := netip.MustParseAddr("fd00:bad::1"), netip.MustParseAddr("10.1.2.3")
	must(t, within(l.router, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		for _, a := range []netip.Addr{site6, site4, private6, private4} {
			addAddr(lo, netip.PrefixFrom(a, a.BitLen()))
		}
		return nil
	}))
	po, o := other.attach("o")
	for _, a := range []netip.Addr{site6, site4, private6, private4, b.v6.Prev(), b.v4.Prev()} {
		for _, port := range []uint16{443, 444} {
			listen(t, l.router, netip.AddrPortFrom(a, port), "site")
		}
	}
	listen(t, b.ns, netip.AddrPortFrom(b.v6, 443), "site")
	listen(t, po, netip.AddrPortFrom(o, 443), "site")
	listen(t, l.boxes[1].ns, netip.AddrPortFrom(l.boxes[1].v6, 443), "site")

	free := attachAddr("out", "free")
	rule := func(p string) Egress { return Egress{Prefix: netip.MustParsePrefix(p), Proto: "tcp", Port: 443} }
	// He is allowed everything that a contract can name; what is refused is refused all the same.
	must(t, m.SetEgress(map[netip.Addr][]Egress{free: {rule("::/0"), rule("0.0.0.0/0"), rule("10.0.0.0/8"), rule("fc00::/7")}, attachAddr("out", "free2"): {rule("::/0")}}))
	pf, _ := m.attach("free")
	pc, _ := m.attach("captive")
	must(t, soonReachable(pf, netip.AddrPortFrom(site6, 443)))
	must(t, soonReachable(pf, netip.AddrPortFrom(site4, 443)))
	must(t, soonReachable(pf, netip.AddrPortFrom(l.boxes[1].v6, 443)))
	mac, router := macs("free")
	lan := sniff(t, l.router, "")
	captiveMAC, captiveRouter := macs("captive")
	inject(t, pc, "eth0", frame(captiveMAC, captiveRouter, free, site6, unix.IPPROTO_TCP, 443, []byte("as the free one")))
	inject(t, pf, "eth0", frame(mac, router, attachAddr("out", "captive"), site6, unix.IPPROTO_TCP, 443, []byte("as the captive")))
	type try struct {
		name, ns string
		to       netip.AddrPort
	}
	tries := []try{
		{"another port", pf, netip.AddrPortFrom(site6, 444)}, {"another port over IPv4", pf, netip.AddrPortFrom(site4, 444)},
		{"a private address", pf, netip.AddrPortFrom(private6, 443)}, {"a private IPv4 address", pf, netip.AddrPortFrom(private4, 443)},
		{"the farm's LAN", pf, netip.AddrPortFrom(b.v6.Prev(), 443)}, {"the farm's IPv4 LAN", pf, netip.AddrPortFrom(b.v4.Prev(), 443)},
		{"the node", pf, netip.AddrPortFrom(b.v6, 443)}, {"another network", pf, netip.AddrPortFrom(o, 443)},
		{"a workload without rules", pc, netip.AddrPortFrom(site6, 443)}, {"a workload without rules, IPv4", pc, netip.AddrPortFrom(site4, 443)},
	}
	refused := func(tries []try) {
		t.Helper()
		type result struct {
			name string
			err  error
		}
		results := make(chan result)
		for _, c := range tries {
			go func() {
				conn, err := dial(c.ns, c.to, 500*time.Millisecond)
				if err == nil {
					conn.Close()
				}
				results <- result{c.name, err}
			}()
		}
		for range tries {
			if r := <-results; r.err == nil {
				t.Errorf("%s was reached", r.name)
			}
		}
	}
	refused(tries)
	if lan.has("as the free one") || lan.has("as the captive") {
		t.Error("a forged source got out")
	}
	if lan.count(func(f []byte) bool { return len(f) > 54 && f[12] == 0x86 && f[22] == 0xfd }) > 0 {
		t.Error("a private source was on the wire")
	}
	// A flood of connections ends at the limit, whether they stay half open or are closed at once, or come slowly.
	flood := func(id string, dst netip.Addr, from, count int) (out int) {
		ns, src := workPath(b.nets, "out", id), attachAddr("out", id)
		mac, router := macs(id)
		var frames [][]byte
		for i := range count {
			f := frame(mac, router, src, dst, unix.IPPROTO_TCP, 443, nil)
			binary.BigEndian.PutUint16(f[54:], uint16(from+i))
			binary.BigEndian.PutUint16(f[70:], 0)
			pseudo := append(append(append([]byte{}, f[22:54]...), 0, 0, 0, 20, 0, 0, 0, 6), f[54:]...)
			binary.BigEndian.PutUint16(f[70:], checksum(pseudo))
			frames = append(frames, f)
		}
		syns := func() int {
			return lan.count(func(f []byte) bool {
				return len(f) >= 74 && f[12] == 0x86 && f[20] == 6 && f[67] == 2 && bytes.Equal(f[38:54], dst.AsSlice())
			})
		}
		before := syns()
		start := time.Now()
		inject(t, ns, "eth0", frames...)
		took := time.Since(start)
		out = syns() - before
		if most := egressFlows + 10 + int((took.Seconds()+1)*egressRate); out > most {
			t.Errorf("%d connections of %s to %v got out, at most %d may", out, id, dst, most)
		}
		return out
	}
	m.attach("free2")
	for _, c := range []struct {
		id  string
		dst netip.Addr
	}{{"free2", site6}, {"free", site6.Next()}} {
		if out := flood(c.id, c.dst, 20000, 2*egressFlows); out < egressFlows/2 {
			t.Errorf("control: %d connections of %s got out", out, c.id)
		}
	}
	// What is being tested is that time, which refills the rate, does not lift the limit.
	time.Sleep(time.Second)
	if out := flood("free", site6.Next(), 40000, egressRate/2); out > 10 {
		t.Errorf("%d connections beyond the limit got out", out)
	}
	// No rule, no path.
	must(t, m.SetEgress(nil))
	if !soon(3*time.Second, func() bool {
		gone := false
		must(t, within(m.tunNS(), func() error {
			_, err := netlink.LinkByName(uplinkInner)
			gone = err != nil
			return nil
		}))
		return gone
	}) {
		t.Error("the way out is still there")
	}
	refused([]try{{"a site after the rules went", pf, netip.AddrPortFrom(site6, 443)}, {"a site over IPv4 after the rules went", pf, netip.AddrPortFrom(site4, 443)}})
}

func soonReachable(ns string, at netip.AddrPort) error {
	c, err := greet(ns, at, "site", 5*time.Second)
	if err == nil {
		c.Close()
	}
	return err
}
