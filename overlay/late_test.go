package overlay

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// TestALateNodeIsNotHeard plays a node that was paused while its workload moved: it wakes, and its workload goes on
// sending from the address that is another's now. No late view gives it the address back.
func TestALateNodeIsNotHeard(t *testing.T) {
	l := newLab(t, 3)
	var ms []*member
	for _, b := range l.boxes {
		ms = append(ms, b.join("late", 30017))
	}
	client, clientAddr := ms[0].attach("client")
	old, addr := ms[1].attach("mover")
	at := netip.AddrPortFrom(addr, 80)
	listen(t, old, at, "old")
	mover := func(epoch uint64) Address { return Address{netip.PrefixFrom(addr, 128), epoch} }
	// set tells a member who the others are, and which of them has the mover.
	set := func(m, holder *member, epoch uint64) error {
		var peers []Peer
		for _, other := range ms {
			if other == m {
				continue
			}
			p := other.as(m)
			p.Addrs = slices.DeleteFunc(p.Addrs, func(a Address) bool { return a.Addr() == addr })
			if other == holder {
				p.Addrs = append(p.Addrs, mover(epoch))
			}
			peers = append(peers, p)
		}
		if m == holder {
			return m.SetPeers(peers, mover(epoch))
		}
		return m.SetPeers(peers)
	}
	for _, m := range ms {
		must(t, set(m, ms[1], 1))
	}
	reachable(t, client, at, "old")
	heard := sniff(t, client, "eth0")
	say := func(from, text string) {
		must(t, within(from, func() error {
			c, err := net.DialUDP("udp6", net.UDPAddrFromAddrPort(netip.AddrPortFrom(addr, 0)), net.UDPAddrFromAddrPort(netip.AddrPortFrom(clientAddr, 9)))
			if err != nil {
				return err
			}
			defer c.Close()
			_, err = io.WriteString(c, text)
			return err
		}))
	}
	if !soon(5*time.Second, func() bool { say(old, "in time"); return heard.has("in time") }) {
		t.Fatal("control: while it has the address it is not heard")
	}
	// The ledger gave the address to the third node. The second has not read that yet: it changes nothing.
	path, moved := ms[2].attach("mover")
	if moved != addr {
		t.Fatalf("a workload's address changed with its node: %v, was %v", moved, addr)
	}
	listen(t, path, at, "new")
	silent := func(when string) {
		t.Helper()
		for range 20 {
			say(old, "too late")
		}
		if c, err := dial(old, netip.AddrPortFrom(clientAddr, 81), 300*time.Millisecond); err == nil {
			c.Close()
			t.Errorf("%s: a late node's workload connected", when)
		}
		// What was sent after it has arrived: the late words were not merely slow.
		reachable(t, client, at, "new")
		if !soon(5*time.Second, func() bool { say(path, "new "+when); return heard.has("new " + when) }) {
			t.Fatalf("%s: the node that has the address is not heard", when)
		}
		if heard.has("too late") {
			t.Errorf("%s: a late node's workload is heard", when)
		}
	}
	must(t, set(ms[0], ms[2], 2))
	must(t, set(ms[2], ms[2], 2))
	reachable(t, client, at, "new")
	silent("after the move")
	for _, m := range []*member{ms[0], ms[2]} {
		if err := set(m, ms[1], 1); !errors.Is(err, ErrSuperseded) {
			t.Errorf("a late view is taken: %v", err)
		}
	}
	silent("after a late view")
	// The next view, of whatever epoch that is not lower, is heard again.
	must(t, set(ms[0], ms[1], 3))
	if !soon(5*time.Second, func() bool { say(old, "given back"); return heard.has("given back") }) {
		t.Error("a later epoch is not taken")
	}
}

// TestAWrongSecretKeepsAMeshShut: a node whose key the ledger lists, but who was never given the network's secret, is no
// member, however long it tries.
func TestAWrongSecretKeepsAMeshShut(t *testing.T) {
	l := newLab(t, 3)
	var ms []*member
	for _, b := range l.boxes {
		ms = append(ms, b.join("secret", 30019))
	}
	var inside []netip.AddrPort
	for i, m := range ms {
		path, addr := m.attach([]string{"a", "b", "c"}[i])
		inside = append(inside, netip.AddrPortFrom(addr, 80))
		listen(t, path, inside[i], "in")
	}
	// The third guesses.
	for i, m := range ms {
		var peers []Peer
		for j, other := range ms {
			if i == j {
				continue
			}
			p := other.as(m)
			if i == 2 {
				p.PresharedKey[0]++
			}
			peers = append(peers, p)
		}
		must(t, m.SetPeers(peers))
	}
	reachable(t, ms[0].tunNS(), inside[1], "in")
	status := func(m, of *member) (s PeerStatus) {
		for _, p := range m.Status() {
			if p.PublicKey == of.box.pub {
				s = p
			}
		}
		return s
	}
	// Handshakes have come and gone, from both sides where both began.
	if !soon(10*time.Second, func() bool {
		a, c := status(ms[0], ms[2]), status(ms[2], ms[0])
		return a.Received+c.Received >= 2*148
	}) {
		t.Fatalf("control: no handshake was tried: %+v", status(ms[0], ms[2]))
	}
	for _, pair := range [][2]int{{0, 2}, {2, 0}, {1, 2}, {2, 1}} {
		if c, err := dial(ms[pair[0]].tunNS(), inside[pair[1]], 500*time.Millisecond); err == nil {
			c.Close()
			t.Errorf("%v: a wrong secret opens the mesh", pair)
		}
		if s := status(ms[pair[0]], ms[pair[1]]); !s.Handshake.IsZero() {
			t.Errorf("%v: a handshake with a wrong secret is done", pair)
		}
	}
	// Control: with the right one it opens.
	mesh(t, ms...)
	for _, try := range [][2]int{{0, 2}, {2, 1}} {
		c, err := greet(ms[try[0]].tunNS(), inside[try[1]], "in", 20*time.Second) // WireGuard tries every five seconds
		must(t, err)
		c.Close()
	}
}

// TestNodesDoNotAskEachOthersDNS: the names of a network are for the workloads of one's own node.
func TestNodesDoNotAskEachOthersDNS(t *testing.T) {
	l := newLab(t, 2)
	a, b := l.boxes[0].join("shop", 30018), l.boxes[1].join("shop", 30018)
	own, _ := b.attach("own")
	mesh(t, a, b)
	b.SetNames(map[string][]netip.Addr{"db": {b.cfg.Self}})
	msg := dnsmessage.Message{Header: dnsmessage.Header{ID: 7}, Questions: []dnsmessage.Question{
		{Name: dnsmessage.MustNewName("db."), Type: dnsmessage.TypeAAAA, Class: dnsmessage.ClassINET}}}
	question, err := msg.Pack()
	must(t, err)
	ask := func(ns string, from netip.Addr) bool {
		var c net.Conn
		err := within(ns, func() (err error) {
			c, err = net.DialUDP("udp6", net.UDPAddrFromAddrPort(netip.AddrPortFrom(from, 0)), net.UDPAddrFromAddrPort(netip.AddrPortFrom(b.cfg.Self, 53)))
			return err
		})
		if err != nil {
			return false
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(200 * time.Millisecond))
		if _, err := c.Write(question); err != nil {
			return false
		}
		n, err := c.Read(make([]byte, 512))
		return err == nil && n > 12
	}
	if !soon(5*time.Second, func() bool { return ask(own, netip.IPv6Unspecified()) }) {
		t.Fatal("control: the node's own workload gets no answer")
	}
	// The tunnel is up when the node itself can be pinged; here, when a listener beyond it answers.
	path, addr := b.attach("up")
	listen(t, path, netip.AddrPortFrom(addr, 80), "up")
	mesh(t, a, b)
	reachable(t, a.tunNS(), netip.AddrPortFrom(addr, 80), "up")
	for range 5 {
		if ask(a.tunNS(), a.cfg.Self) {
			t.Fatal("another node's DNS answered")
		}
	}
}
