package overlay

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

const (
	dnsMax      = 4096 // bytes of a message, both ways
	dnsPlain    = 512  // bytes of an answer to who did not say that he takes more
	dnsAtOnce   = 8    // forwarded queries and TCP connections, per workload
	dnsTTL      = 2    // seconds: workloads move
	dnsPatience = 5 * time.Second
)

// A server answers the DNS queries of one network.
type server struct {
	self      netip.Addr
	main      string
	resolvers []netip.AddrPort
	log       *slog.Logger

	mu    sync.RWMutex
	names map[string][]netip.Addr // lower case, without the final dot
	free  map[netip.Addr]bool     // who may ask for foreign names
}

func (s *server) setNames(names map[string][]netip.Addr) {
	lower := make(map[string][]netip.Addr, len(names))
	for name, addrs := range names {
		name = strings.ToLower(strings.TrimSuffix(name, "."))
		lower[name] = slices.DeleteFunc(slices.Concat(lower[name], addrs), func(a netip.Addr) bool { return !a.Is6() || a.Is4In6() })
	}
	s.mu.Lock()
	s.names = lower
	s.mu.Unlock()
}

func (s *server) setForward(free map[netip.Addr]bool) {
	s.mu.Lock()
	s.free = maps.Clone(free)
	s.mu.Unlock()
}

// listenDNS opens the sockets in NET.
func (n *Network) listenDNS() (packets net.PacketConn, streams net.Listener, err error) {
	at := netip.AddrPortFrom(n.cfg.Self, 53).String()
	var lc net.ListenConfig
	err = within(n.tunNS(), func() (err error) {
		if packets, err = lc.ListenPacket(context.Background(), "udp6", at); err != nil {
			return err
		}
		if streams, err = lc.Listen(context.Background(), "tcp6", at); err != nil {
			packets.Close()
		}
		return err
	})
	return packets, streams, err
}

// serve answers until ctx ends, and closes both.
func (s *server) serve(ctx context.Context, packets net.PacketConn, streams net.Listener) {
	var all sync.WaitGroup
	defer all.Wait()
	stop := context.AfterFunc(ctx, func() {
		packets.Close()
		streams.Close()
	})
	defer stop()
	slots := slots{used: make(map[netip.Addr]int)}
	all.Go(func() {
		for {
			c, err := streams.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil {
				continue
			}
			who := source(c.RemoteAddr())
			if !slots.take(who) {
				c.Close()
				continue
			}
			all.Go(func() {
				defer slots.release(who)
				defer c.Close()
				s.stream(ctx, c)
			})
		}
	})
	for {
		query := make([]byte, dnsMax)
		size, from, err := packets.ReadFrom(query)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue
		}
		reply, forward := s.answer(query[:size], source(from), dnsPlain)
		if !forward {
			if reply != nil {
				packets.WriteTo(reply, from)
			}
			continue
		}
		// Only forwarding waits for others, so only it needs a slot. A query that finds none is lost, as UDP allows.
		if who := source(from); slots.take(who) {
			all.Go(func() {
				defer slots.release(who)
				if reply := s.ask(ctx, "udp", query[:size]); reply != nil {
					packets.WriteTo(reply, from)
				}
			})
		}
	}
}

// slots limits what one workload keeps the server busy with. Its address is pinned, so it cannot pose as many.
type slots struct {
	mu   sync.Mutex
	used map[netip.Addr]int
}

func (s *slots) take(who netip.Addr) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.used[who] >= dnsAtOnce {
		return false
	}
	s.used[who]++
	return true
}

func (s *slots) release(who netip.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.used[who]--; s.used[who] == 0 {
		delete(s.used, who)
	}
}

// stream answers one TCP connection: each message after its length in two bytes.
func (s *server) stream(ctx context.Context, c net.Conn) {
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	for {
		c.SetDeadline(time.Now().Add(dnsPatience))
		query, err := readMessage(c)
		if err != nil {
			return
		}
		reply, forward := s.answer(query, source(c.RemoteAddr()), dnsMax)
		if forward {
			reply = s.ask(ctx, "tcp", query)
		}
		if reply == nil || writeMessage(c, reply) != nil {
			return
		}
	}
}

func readMessage(r io.Reader) ([]byte, error) {
	var head [2]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	size := binary.BigEndian.Uint16(head[:])
	if size > dnsMax {
		return nil, errors.New("message too long")
	}
	body := make([]byte, size)
	_, err := io.ReadFull(r, body)
	return body, err
}

func writeMessage(w io.Writer, body []byte) error {
	_, err := w.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(body))), body...))
	return err
}

func source(a net.Addr) netip.Addr {
	switch a := a.(type) {
	case *net.UDPAddr:
		return a.AddrPort().Addr()
	case *net.TCPAddr:
		return a.AddrPort().Addr()
	}
	return netip.Addr{}
}

// ask gets the answer from the first resolver that gives one, from the node's own namespace.
func (s *server) ask(ctx context.Context, network string, query []byte) []byte {
	for _, resolver := range s.resolvers {
		if reply, err := s.askOne(ctx, network, resolver, query); err == nil {
			return reply
		} else {
			s.log.Debug("resolver", "address", resolver, "error", err)
		}
	}
	return nil
}

func (s *server) askOne(ctx context.Context, network string, resolver netip.AddrPort, query []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, dnsPatience/2)
	defer cancel()
	var c net.Conn
	err := within(s.main, func() (err error) {
		c, err = new(net.Dialer).DialContext(ctx, network, resolver.String())
		return err
	})
	if err != nil {
		return nil, err
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	if network == "tcp" {
		if err := writeMessage(c, query); err != nil {
			return nil, err
		}
		return readMessage(c)
	}
	if _, err := c.Write(query); err != nil {
		return nil, err
	}
	reply := make([]byte, dnsMax)
	for {
		// The socket is connected, so that only the resolver is heard; the ID tells a late answer from this one.
		size, err := c.Read(reply)
		if err != nil {
			return nil, err
		}
		if size >= 12 && [2]byte(reply[:2]) == [2]byte(query[:2]) {
			return reply[:size], nil
		}
	}
}

// answer gives the reply to a query, nil for none, or says that the query is for the resolvers. It is pure but for
// reading the names.
func (s *server) answer(query []byte, from netip.Addr, limit int) (reply []byte, forward bool) {
	var p dnsmessage.Parser
	head, err := p.Start(query)
	if err != nil || head.Response {
		return nil, false // not a query; answering answers would be a loop
	}
	out := dnsmessage.Header{ID: head.ID, Response: true, OpCode: head.OpCode, RecursionDesired: head.RecursionDesired}
	if head.OpCode != 0 {
		out.RCode = dnsmessage.RCodeNotImplemented
		return pack(out, nil, nil, nil, limit), false
	}
	questions, err := p.AllQuestions()
	if err != nil || len(questions) != 1 {
		out.RCode = dnsmessage.RCodeFormatError
		return pack(out, nil, nil, nil, limit), false
	}
	q := questions[0]
	edns, err := extension(&p)
	if err != nil {
		out.RCode = dnsmessage.RCodeFormatError
		return pack(out, nil, nil, nil, limit), false
	}
	if edns != nil {
		// No fragment is sent: 1232 fits the smallest IPv6 MTU.
		limit = max(limit, min(int(edns.Class), 1232))
		edns = &dnsmessage.ResourceHeader{}
		edns.SetEDNS0(dnsMax, dnsmessage.RCodeSuccess, false)
	}
	name := strings.ToLower(strings.TrimSuffix(q.Name.String(), "."))
	s.mu.RLock()
	addrs, known := s.names[name]
	free := s.free[from] && len(s.resolvers) > 0
	s.mu.RUnlock()
	switch {
	case known && (q.Class == dnsmessage.ClassINET || q.Class == dnsmessage.ClassANY):
		out.Authoritative = true
		if q.Type != dnsmessage.TypeAAAA && q.Type != dnsmessage.TypeALL {
			addrs = nil
		}
		// Each query begins elsewhere, which spreads the load of clients that take the first.
		if len(addrs) > 1 {
			at := int(head.ID) % len(addrs)
			addrs = slices.Concat(addrs[at:], addrs[:at])
		}
		out.RecursionAvailable = free
		return pack(out, &q, addrs, edns, limit), false
	case free && strings.Contains(name, ".") && !strings.HasSuffix(name, ".internal"):
		return nil, true
	}
	// A name of this network that is not there, and any other, does not exist.
	out.RCode = dnsmessage.RCodeNameError
	out.Authoritative = true
	return pack(out, &q, nil, edns, limit), false
}

// extension finds the OPT record of a query.
func extension(p *dnsmessage.Parser) (*dnsmessage.ResourceHeader, error) {
	if err := p.SkipAllAnswers(); err != nil {
		return nil, err
	}
	if err := p.SkipAllAuthorities(); err != nil {
		return nil, err
	}
	for {
		h, err := p.AdditionalHeader()
		if errors.Is(err, dnsmessage.ErrSectionDone) {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		if h.Type == dnsmessage.TypeOPT {
			return &h, nil
		}
		if err := p.SkipAdditional(); err != nil {
			return nil, err
		}
	}
}

// pack builds a reply. One that is too long loses its answers and says so, and the client asks again over TCP.
func pack(head dnsmessage.Header, q *dnsmessage.Question, addrs []netip.Addr, edns *dnsmessage.ResourceHeader, limit int) []byte {
	b := dnsmessage.NewBuilder(make([]byte, 0, dnsPlain), head)
	b.EnableCompression()
	fail := func(err error) bool { return err != nil }
	if fail(b.StartQuestions()) || q != nil && fail(b.Question(*q)) || fail(b.StartAnswers()) {
		return nil
	}
	for _, a := range addrs {
		h := dnsmessage.ResourceHeader{Name: q.Name, Class: dnsmessage.ClassINET, TTL: dnsTTL}
		if fail(b.AAAAResource(h, dnsmessage.AAAAResource{AAAA: a.As16()})) {
			return nil
		}
	}
	if fail(b.StartAdditionals()) || edns != nil && fail(b.OPTResource(*edns, dnsmessage.OPTResource{})) {
		return nil
	}
	reply, err := b.Finish()
	if err != nil {
		return nil
	}
	if len(reply) > limit && len(addrs) > 0 {
		head.Truncated = true
		return pack(head, q, nil, edns, limit)
	}
	return reply
}
