package overlay

import (
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// TestALateNodeIsNotHeard plays a node that was paused while its workload moved: it wakes, and its workload goes on
// sending from the address that is another's now.
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
	mesh(t, ms...)
	reachable(t, client, at, "old")
	heard := sniff(t, client, "eth0")
	say := func(text string) {
		must(t, within(old, func() error {
			c, err := net.DialUDP("udp6", net.UDPAddrFromAddrPort(netip.AddrPortFrom(addr, 0)), net.UDPAddrFromAddrPort(netip.AddrPortFrom(clientAddr, 9)))
			if err != nil {
				return err
			}
			defer c.Close()
			_, err = io.WriteString(c, text)
			return err
		}))
	}
	if !soon(5*time.Second, func() bool { say("in time"); return heard.has("in time") }) {
		t.Fatal("control: while it has the address it is not heard")
	}
	// The ledger gave the address to the third node. The second has not read that yet: it changes nothing.
	path, moved := ms[2].attach("mover")
	if moved != addr {
		t.Fatalf("a workload's address changed with its node: %v, was %v", moved, addr)
	}
	listen(t, path, at, "new")
	late := ms[1].as(ms[0])
	late.Addrs = late.Addrs[:1]
	must(t, ms[0].SetPeers([]Peer{late, ms[2].as(ms[0])}))
	must(t, ms[2].SetPeers([]Peer{ms[0].as(ms[2])}))
	reachable(t, client, at, "new")
	for range 20 {
		say("too late")
	}
	if c, err := dial(old, netip.AddrPortFrom(clientAddr, 81), 300*time.Millisecond); err == nil {
		c.Close()
		t.Error("a late node's workload connected")
	}
	// What was sent after it has arrived: the late words were not merely slow.
	reachable(t, client, at, "new")
	if heard.has("too late") {
		t.Error("a late node's workload is heard")
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
