package overlay

import (
	"context"
	"encoding/binary"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

var (
	asker  = netip.MustParseAddr("fd00::a")
	free   = netip.MustParseAddr("fd00::f")
	dbAddr = netip.MustParseAddr("fd00::db")
)

func testServer() *server {
	s := &server{resolvers: []netip.AddrPort{netip.MustParseAddrPort("[2001:db8::53]:53")}, log: slog.New(slog.DiscardHandler)}
	many := make([]netip.Addr, 40)
	for i := range many {
		many[i] = netip.AddrFrom16([16]byte{0: 0xfd, 15: byte(i)})
	}
	s.setNames(map[string][]netip.Addr{
		"db": {dbAddr}, "DB.Shop.internal.": {dbAddr}, "web": {asker, free}, "empty": {}, "many": many,
		"four": {netip.MustParseAddr("192.0.2.1"), dbAddr},
	})
	s.setForward(map[netip.Addr]bool{free: true})
	return s
}

func query(name string, kind dnsmessage.Type, edns int) []byte {
	b := dnsmessage.NewBuilder(nil, dnsmessage.Header{ID: 7, RecursionDesired: true})
	b.StartQuestions()
	b.Question(dnsmessage.Question{Name: dnsmessage.MustNewName(name), Type: kind, Class: dnsmessage.ClassINET})
	if edns > 0 {
		b.StartAdditionals()
		var h dnsmessage.ResourceHeader
		h.SetEDNS0(edns, dnsmessage.RCodeSuccess, false)
		b.OPTResource(h, dnsmessage.OPTResource{})
	}
	out, err := b.Finish()
	if err != nil {
		panic(err)
	}
	return out
}

func TestDNSAnswers(t *testing.T) {
	s := testServer()
	for _, c := range []struct {
		name    string
		query   []byte
		from    netip.Addr
		forward bool
		code    dnsmessage.RCode
		addrs   int
		cut     bool
	}{
		{"a short name", query("db.", dnsmessage.TypeAAAA, 0), asker, false, dnsmessage.RCodeSuccess, 1, false},
		{"a full name in capitals", query("DB.SHOP.INTERNAL.", dnsmessage.TypeAAAA, 1232), asker, false, dnsmessage.RCodeSuccess, 1, false},
		{"all replicas", query("web.", dnsmessage.TypeAAAA, 0), asker, false, dnsmessage.RCodeSuccess, 2, false},
		{"no data of another type", query("db.", dnsmessage.TypeA, 0), asker, false, dnsmessage.RCodeSuccess, 0, false},
		{"a name whose workloads are all down", query("empty.", dnsmessage.TypeAAAA, 0), asker, false, dnsmessage.RCodeSuccess, 0, false},
		{"an IPv4 address is not given out", query("four.", dnsmessage.TypeAAAA, 0), asker, false, dnsmessage.RCodeSuccess, 1, false},
		{"an unknown name", query("nobody.", dnsmessage.TypeAAAA, 0), asker, false, dnsmessage.RCodeNameError, 0, false},
		{"a foreign name without egress", query("example.org.", dnsmessage.TypeA, 0), asker, false, dnsmessage.RCodeNameError, 0, false},
		{"a foreign name with egress", query("example.org.", dnsmessage.TypeA, 0), free, true, 0, 0, false},
		{"an unknown internal name is nobody else's business", query("x.shop.internal.", dnsmessage.TypeAAAA, 0), free, false, dnsmessage.RCodeNameError, 0, false},
		{"an unknown short name neither", query("nobody.", dnsmessage.TypeAAAA, 0), free, false, dnsmessage.RCodeNameError, 0, false},
		{"an own name with egress", query("db.", dnsmessage.TypeAAAA, 0), free, false, dnsmessage.RCodeSuccess, 1, false},
		{"too many for a plain packet", query("many.", dnsmessage.TypeAAAA, 0), asker, false, dnsmessage.RCodeSuccess, 0, true},
		{"not too many for a large one", query("many.", dnsmessage.TypeAAAA, 4096), asker, false, dnsmessage.RCodeSuccess, 40, false},
	} {
		reply, forward := s.answer(c.query, c.from, dnsPlain)
		if forward != c.forward {
			t.Errorf("%s: forward %v", c.name, forward)
		}
		if forward {
			continue
		}
		var m dnsmessage.Message
		if err := m.Unpack(reply); err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		if m.ID != 7 || !m.Response || m.RCode != c.code || len(m.Answers) != c.addrs || m.Truncated != c.cut || len(m.Questions) != 1 {
			t.Errorf("%s: %v", c.name, m.GoString())
		}
	}
	for name, q := range map[string][]byte{"nothing": nil, "noise": []byte("hello"), "an answer": func() []byte { q := query("db.", 1, 0); q[2] |= 0x80; return q }()} {
		if reply, forward := s.answer(q, free, dnsPlain); reply != nil || forward {
			t.Errorf("%s was answered", name)
		}
	}
	two := query("db.", dnsmessage.TypeAAAA, 0)
	two[5] = 2
	update := query("db.", dnsmessage.TypeAAAA, 0)
	update[2] |= 5 << 3
	for name, c := range map[string]struct {
		query []byte
		code  dnsmessage.RCode
	}{"two questions": {two, dnsmessage.RCodeFormatError}, "an update": {update, dnsmessage.RCodeNotImplemented}} {
		reply, _ := s.answer(c.query, free, dnsPlain)
		var m dnsmessage.Message
		if err := m.Unpack(reply); err != nil || m.RCode != c.code {
			t.Errorf("%s: %v %v", name, m.RCode, err)
		}
	}
}

func FuzzDNS(f *testing.F) {
	for _, name := range []string{"db.", "many.", "example.org.", "."} {
		for _, kind := range []dnsmessage.Type{dnsmessage.TypeA, dnsmessage.TypeAAAA, dnsmessage.TypeALL} {
			f.Add(query(name, kind, 0))
			f.Add(query(name, kind, 65535))
		}
	}
	s := testServer()
	f.Fuzz(func(t *testing.T, q []byte) {
		for _, from := range []netip.Addr{asker, free, {}} {
			reply, forward := s.answer(q, from, dnsPlain)
			if forward && from != free {
				t.Fatal("forwarded for who may not ask")
			}
			if reply == nil {
				continue
			}
			if len(reply) > 1232 {
				t.Fatalf("%d bytes", len(reply))
			}
			if [2]byte(reply) != [2]byte(q) || reply[2]&0x80 == 0 {
				t.Fatal("not an answer to this query")
			}
		}
	})
}

// One workload floods the server and keeps connections open; the other is served.
func TestDNSUnderLoad(t *testing.T) {
	l := newLab(t, 1)
	resolver := netip.AddrPortFrom(l.boxes[0].v6.Prev(), 53)
	m := l.boxes[0].join("dns", 30020, func(c *Config) { c.Resolvers = []netip.AddrPort{resolver} })
	bad, _ := m.attach("bad")
	good, goodAddr := m.attach("good")
	m.SetNames(map[string][]netip.Addr{"good": {goodAddr}})
	must(t, m.SetEgress(map[netip.Addr][]Egress{goodAddr: {{Prefix: everywhere6, Proto: "tcp"}}}))
	serveResolver(t, l.router, resolver)

	find := func(ns, name string, want ...netip.Addr) {
		t.Helper()
		var got []netip.Addr
		var err error
		if !soon(20*time.Second, func() bool { got, err = lookup(ns, m.cfg.Self, name); return slices.Equal(got, want) }) {
			t.Errorf("%s is %v, %v; want %v", name, got, err, want)
		}
	}
	find(good, "good", goodAddr)
	find(good, "site.example", netip.MustParseAddr("2001:db8::80"))
	find(bad, "site.example")
	// Over TCP, in pieces.
	c, err := dial(bad, netip.AddrPortFrom(m.cfg.Self, 53), time.Second)
	must(t, err)
	defer c.Close()
	q := query("good.", dnsmessage.TypeAAAA, 0)
	framed := append(binary.BigEndian.AppendUint16(nil, uint16(len(q))), q...)
	for _, b := range [][]byte{framed[:1], framed[1:9], framed[9:]} {
		_, err := c.Write(b)
		must(t, err)
	}
	reply, err := readMessage(c)
	if err != nil || !strings.Contains(string(reply), string(goodAddr.AsSlice())) {
		t.Errorf("over TCP: %x, %v", reply, err)
	}
	var open []net.Conn
	for range 3 * dnsAtOnce {
		if c, err := dial(bad, netip.AddrPortFrom(m.cfg.Self, 53), time.Second); err == nil {
			open = append(open, c)
		}
	}
	defer func() {
		for _, c := range open {
			c.Close()
		}
	}()
	find(good, "good", goodAddr)
	find(good, "site.example", netip.MustParseAddr("2001:db8::80"))
	other, err := dial(good, netip.AddrPortFrom(m.cfg.Self, 53), time.Second)
	must(t, err)
	defer other.Close()
	must(t, writeMessage(other, q))
	if _, err := readMessage(other); err != nil {
		t.Errorf("over TCP beside who holds all he can get: %v", err)
	}
}

// serveResolver answers every query with one address.
func serveResolver(t testing.TB, ns string, at netip.AddrPort) {
	var pc net.PacketConn
	must(t, within(ns, func() (err error) {
		pc, err = new(net.ListenConfig).ListenPacket(context.Background(), "udp", at.String())
		return err
	}))
	t.Cleanup(func() { pc.Close() })
	go func() {
		buf := make([]byte, 4096)
		for {
			n, from, err := pc.ReadFrom(buf)
			if err == io.EOF || n == 0 || err != nil {
				return
			}
			var m dnsmessage.Message
			if m.Unpack(buf[:n]) != nil {
				continue
			}
			m.Response, m.Additionals = true, nil
			if m.Questions[0].Type == dnsmessage.TypeAAAA {
				m.Answers = []dnsmessage.Resource{{
					Header: dnsmessage.ResourceHeader{Name: m.Questions[0].Name, Class: dnsmessage.ClassINET, TTL: 1},
					Body:   &dnsmessage.AAAAResource{AAAA: netip.MustParseAddr("2001:db8::80").As16()},
				}}
			}
			if out, err := m.Pack(); err == nil {
				pc.WriteTo(out, from)
			}
		}
	}()
}
