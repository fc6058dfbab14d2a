package lab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"holdfast/internal/box"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// Answers of a scanned port.
const (
	open   = "open"
	closed = "closed" // a reset or an ICMP error: somebody is there
)

// fast is how many probes a second a scan sends: with more, queues on the way overflow.
const fast = 50_000

// scan sends one probe to every port of a target, so many a second, and returns every port that answered anything. Whatever else
// comes from the target, neighbour discovery aside, is in answers[0]: a machine that shows nothing has no answers at all.
// A stranger's machine sees what it receives, so nothing that the kernel drops is missed.
func scan(from box.Box, target netip.Addr, udp bool, pace int) (answers map[uint16]string, err error) {
	var send, receive int
	var source netip.Addr
	err = box.Within(from.NetNS(), func() error {
		family, proto, protocol := unix.AF_INET, unix.IPPROTO_TCP, unix.ETH_P_IP
		if target.Is6() {
			family, protocol = unix.AF_INET6, unix.ETH_P_IPV6
		}
		if udp {
			proto = unix.IPPROTO_UDP
		}
		c, err := net.Dial("udp", netip.AddrPortFrom(target, 9).String())
		if err != nil {
			return err
		}
		source = c.LocalAddr().(*net.UDPAddr).AddrPort().Addr()
		c.Close()
		if send, err = unix.Socket(family, unix.SOCK_RAW, proto); err != nil {
			return err
		}
		if receive, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM, int(htons(uint16(protocol)))); err != nil {
			unix.Close(send)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("scan %v: %w", target, err)
	}
	defer unix.Close(send)
	defer unix.Close(receive)
	for _, o := range []struct{ level, name, value int }{
		{unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1}, {unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64 << 20},
	} {
		if err := unix.SetsockoptInt(receive, o.level, o.name, o.value); err != nil {
			return nil, fmt.Errorf("scan %v: %w", target, err)
		}
	}
	if err := unix.SetsockoptTimeval(receive, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100_000}); err != nil {
		return nil, fmt.Errorf("scan %v: %w", target, err)
	}
	answers = map[uint16]string{}
	var g errgroup.Group
	sent := make(chan struct{})
	g.Go(func() error { // until nothing has come for a second after the last probe
		buf := make([]byte, 2048)
		var quiet time.Time
		for {
			n, _, err := unix.Recvfrom(receive, buf, 0)
			if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
				select {
				case <-sent:
					if quiet.IsZero() {
						quiet = time.Now()
					} else if time.Since(quiet) > time.Second {
						return nil
					}
				default:
				}
				continue
			} else if err != nil {
				return err
			}
			quiet = time.Time{}
			if port, what := answer(buf[:n], target, source); what != "" {
				answers[port] = what
			}
		}
	})
	var to unix.Sockaddr = &unix.SockaddrInet4{Addr: [4]byte(target.AsSlice())}
	if target.Is6() {
		to = &unix.SockaddrInet6{Addr: target.As16()}
	}
	begin := time.Now()
	for i := range 65536 {
		port := uint16(i * 7919) // every port once in 65536, in no order
		err := unix.Sendto(send, probe(source, target, port, udp), 0, to)
		if err != nil && !errors.Is(err, unix.ENOBUFS) && !errors.Is(err, unix.EHOSTUNREACH) {
			return nil, fmt.Errorf("scan %v: %w", target, err)
		}
		if due := begin.Add(time.Duration(i) * time.Second / time.Duration(pace)); i%32 == 0 {
			time.Sleep(time.Until(due))
		}
	}
	close(sent)
	return answers, g.Wait()
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }

// probe is a TCP SYN (RFC 9293) or a UDP datagram (RFC 768) to a port.
func probe(source, target netip.Addr, port uint16, udp bool) []byte {
	b, proto, sum := make([]byte, 20), unix.IPPROTO_TCP, 16
	if udp {
		b, proto, sum = make([]byte, 12), unix.IPPROTO_UDP, 6
		binary.BigEndian.PutUint16(b[4:], uint16(len(b)))
	} else {
		b[12], b[13] = 5<<4, 2
		binary.BigEndian.PutUint16(b[14:], 1024)
	}
	binary.BigEndian.PutUint16(b, 40000)
	binary.BigEndian.PutUint16(b[2:], port)
	// The checksum over the pseudo header, whose order does not matter.
	var s uint32
	for _, part := range [][]byte{source.AsSlice(), target.AsSlice(), {0, byte(proto)}, {0, byte(len(b))}, b} {
		for i := 0; i < len(part); i += 2 {
			s += uint32(part[i])<<8 | uint32(part[i+1])
		}
	}
	for s>>16 > 0 {
		s = s&0xffff + s>>16
	}
	binary.BigEndian.PutUint16(b[sum:], ^uint16(s))
	return b
}

// answer reads a packet; what is "" when it is not from the target to the source, or neighbour discovery (RFC 4861).
func answer(p []byte, target, source netip.Addr) (port uint16, what string) {
	var proto byte
	if target.Is6() {
		if len(p) < 44 || netip.AddrFrom16([16]byte(p[8:24])) != target || netip.AddrFrom16([16]byte(p[24:40])) != source {
			return 0, ""
		}
		proto, p = p[6], p[40:]
		if proto == unix.IPPROTO_ICMPV6 && p[0] >= 133 && p[0] <= 137 {
			return 0, ""
		}
	} else {
		if len(p) < 24 || netip.AddrFrom4([4]byte(p[12:16])) != target || netip.AddrFrom4([4]byte(p[16:20])) != source {
			return 0, ""
		}
		proto, p = p[9], p[int(p[0]&15)*4:]
	}
	switch {
	case proto == unix.IPPROTO_TCP && len(p) >= 14 && p[13]&0x12 == 0x12:
		return binary.BigEndian.Uint16(p), open
	case proto == unix.IPPROTO_TCP && len(p) >= 14:
		return binary.BigEndian.Uint16(p), closed
	case proto == unix.IPPROTO_UDP && len(p) >= 8:
		return binary.BigEndian.Uint16(p), open
	}
	return 0, closed
}

// plant listens on TCP and UDP ports in a box's network, and answers, until the test ends.
func plant(t *testing.T, b box.Box, ports ...uint16) {
	t.Helper()
	var answering sync.WaitGroup
	t.Cleanup(answering.Wait)
	err := box.Within(b.NetNS(), func() error {
		for _, port := range ports {
			ln, err := net.Listen("tcp", fmt.Sprintf("[::]:%d", port))
			if err != nil {
				return err
			}
			t.Cleanup(func() { ln.Close() })
			pc, err := net.ListenPacket("udp", fmt.Sprintf("[::]:%d", port))
			if err != nil {
				return err
			}
			t.Cleanup(func() { pc.Close() })
			answering.Go(func() {
				buf := make([]byte, 1500)
				for {
					_, from, err := pc.ReadFrom(buf)
					if errors.Is(err, net.ErrClosed) {
						return
					}
					if err == nil {
						pc.WriteTo([]byte("here"), from)
					}
				}
			})
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func scans(t *testing.T, l *Lab) {
	outside := l.Box("outside")
	top := l.Topology()
	var planted []uint16
	for p := range 100 {
		planted = append(planted, uint16(1+p*655))
	}
	type target struct {
		name     string
		from     box.Box
		host     box.Uplink
		silent   bool // nothing may answer; otherwise closed ports may
		tcp, udp []uint16
	}
	host := func(segment, n int) box.Uplink { return box.Uplink{Segment: segment, Host: n} }
	targets := []target{
		{"the gateway", outside, host(10, 2), false, []uint16{443}, nil},
		{"the validator", outside, host(11, 2), false, []uint16{8441, 26656}, nil},
	}
	plant(t, l.Box("location-1"), planted...)
	targets = append(targets, target{"location-1 from outside", outside, host(4, 2), true, nil, nil})
	for n := 1; n <= 3; n++ {
		lan := l.Attacker(n, 13)
		// Behind the node's firewall even what listens is not there.
		plant(t, l.Box(fmt.Sprintf("node-%d", n)), planted...)
		targets = append(targets, target{fmt.Sprintf("node-%d from outside", n), outside, host(n, 2), true, nil, nil},
			target{fmt.Sprintf("node-%d from its farm's LAN", n), lan, host(n, 2), true, nil, nil})
		if n == 1 { // the control: the same scan finds all the same listeners on a machine that has no firewall
			plant(t, lan, planted...)
			targets = append(targets, target{"a machine without a firewall", outside, host(n, 13), false, planted, planted})
		}
	}
	for _, x := range targets {
		var both errgroup.Group // IPv6 and IPv4 at once
		for _, p := range top.Addresses(x.host) {
			both.Go(func() error {
				for _, udp := range []bool{false, true} {
					want := x.tcp
					if udp {
						want = x.udp
					}
					got, missing, err := scanFor(x.from, p.Addr(), udp, fast, want)
					if err != nil {
						return err
					}
					if x.silent && len(got) > 0 {
						t.Errorf("%s (%v, UDP: %v) answers: %v", x.name, p.Addr(), udp, got)
					}
					if len(missing) > 0 {
						t.Errorf("%s (%v, UDP: %v): ports %v are not found open", x.name, p.Addr(), udp, missing)
					}
					for port, what := range got {
						if what == open && !slices.Contains(want, port) {
							t.Errorf("%s (%v, UDP: %v): port %d is open", x.name, p.Addr(), udp, port)
						}
					}
				}
				return nil
			})
		}
		if err := both.Wait(); err != nil {
			t.Fatal(err)
		}
	}
}

// scanFor scans, and looks again for what should be open: on a busy machine some packets are lost. All but a few must be
// found at once, or the scan proves nothing of what it does not find.
func scanFor(from box.Box, target netip.Addr, udp bool, pace int, want []uint16) (got map[uint16]string, missing []uint16, err error) {
	got = map[uint16]string{}
	for try := range 3 {
		more, err := scan(from, target, udp, pace)
		if err != nil {
			return nil, nil, err
		}
		maps.Copy(got, more)
		missing = slices.DeleteFunc(slices.Clone(want), func(p uint16) bool { return got[p] == open })
		if len(missing) == 0 {
			break
		}
		if try == 0 && len(want) >= 20 && len(missing) > len(want)/10 {
			return nil, nil, fmt.Errorf("scan %v: it finds %d of %d listeners", target, len(want)-len(missing), len(want))
		}
	}
	return got, missing, nil
}
