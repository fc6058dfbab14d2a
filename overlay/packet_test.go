package overlay

import (
	"bytes"
	"encoding/binary"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// What an adversary with raw sockets uses.

func htons(v uint16) uint16 { return v<<8 | v>>8 }

// A sniffer reads every frame of a namespace, or of one interface in it.
type sniffer struct {
	mu     sync.Mutex
	frames [][]byte
	fd     int
	done   chan struct{}
}

func sniff(t testing.TB, ns, iface string) *sniffer {
	t.Helper()
	s := &sniffer{done: make(chan struct{})}
	must(t, within(ns, func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(htons(unix.ETH_P_ALL)))
		if err != nil {
			return err
		}
		s.fd = fd
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20); err != nil {
			return err
		}
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 20000})
		if iface == "" {
			return nil
		}
		dev, err := net.InterfaceByName(iface)
		if err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL), Ifindex: dev.Index})
	}))
	stop := make(chan struct{})
	go func() {
		defer close(s.done)
		buf := make([]byte, 70000)
		for {
			n, _, err := unix.Recvfrom(s.fd, buf, 0)
			if err == nil {
				s.mu.Lock()
				s.frames = append(s.frames, bytes.Clone(buf[:n]))
				s.mu.Unlock()
			}
			select {
			case <-stop:
				return
			default:
			}
		}
	}()
	t.Cleanup(func() {
		close(stop)
		<-s.done
		unix.Close(s.fd)
	})
	return s
}

func (s *sniffer) count(match func(frame []byte) bool) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range s.frames {
		if match(f) {
			n++
		}
	}
	return n
}

func (s *sniffer) has(marker string) bool {
	return s.count(func(f []byte) bool { return bytes.Contains(f, []byte(marker)) }) > 0
}

// soon polls for a condition.
func soon(patience time.Duration, ok func() bool) bool {
	for deadline := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		if ok() {
			return true
		}
		if time.Now().After(deadline) {
			return false
		}
	}
}

// inject sends a frame from an interface.
func inject(t testing.TB, ns, iface string, frames ...[]byte) {
	t.Helper()
	must(t, within(ns, func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		dev, err := net.InterfaceByName(iface)
		if err != nil {
			return err
		}
		for _, f := range frames {
			for {
				err = unix.Sendto(fd, f, 0, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_IPV6), Ifindex: dev.Index})
				if err != unix.ENOBUFS && err != unix.EAGAIN {
					break
				}
				time.Sleep(time.Millisecond)
			}
			if err != nil {
				return err
			}
		}
		return nil
	}))
}

// frame builds Ethernet, IPv6 or IPv4, and a transport header with payload; proto is 6 (a SYN), 17 or 58 (as given).
func frame(from, to net.HardwareAddr, src, dst netip.Addr, proto byte, port uint16, payload []byte) []byte {
	return frameFrom(40000, from, to, src, dst, proto, port, payload)
}

// frameFrom is a frame from a port.
func frameFrom(sport uint16, from, to net.HardwareAddr, src, dst netip.Addr, proto byte, port uint16, payload []byte) []byte {
	var l4 []byte
	switch proto {
	case unix.IPPROTO_TCP:
		l4 = make([]byte, 20)
		binary.BigEndian.PutUint16(l4[0:], sport)
		binary.BigEndian.PutUint16(l4[2:], port)
		l4[12], l4[13] = 5<<4, 2
		binary.BigEndian.PutUint16(l4[14:], 1000)
	case unix.IPPROTO_UDP:
		l4 = make([]byte, 8)
		binary.BigEndian.PutUint16(l4[0:], sport)
		binary.BigEndian.PutUint16(l4[2:], port)
		binary.BigEndian.PutUint16(l4[4:], uint16(8+len(payload)))
	}
	l4 = append(l4, payload...)
	at := map[byte]int{unix.IPPROTO_TCP: 16, unix.IPPROTO_UDP: 6, unix.IPPROTO_ICMPV6: 2}[proto]
	pseudo := append(append(src.AsSlice(), dst.AsSlice()...), 0, 0, byte(len(l4)>>8), byte(len(l4)), 0, 0, 0, proto)
	binary.BigEndian.PutUint16(l4[at:], checksum(append(pseudo, l4...)))
	eth := append(append([]byte{}, to...), from...)
	if src.Is4() {
		ip := make([]byte, 20)
		ip[0], ip[8], ip[9] = 0x45, 64, proto
		binary.BigEndian.PutUint16(ip[2:], uint16(20+len(l4)))
		copy(ip[12:], src.AsSlice())
		copy(ip[16:], dst.AsSlice())
		binary.BigEndian.PutUint16(ip[10:], checksum(ip))
		return append(append(append(eth, 0x08, 0x00), ip...), l4...)
	}
	ip := make([]byte, 40)
	ip[0], ip[6], ip[7] = 0x60, proto, 64
	if proto == unix.IPPROTO_ICMPV6 {
		ip[7] = 255
	}
	binary.BigEndian.PutUint16(ip[4:], uint16(len(l4)))
	copy(ip[8:], src.AsSlice())
	copy(ip[24:], dst.AsSlice())
	return append(append(append(eth, 0x86, 0xdd), ip...), l4...)
}

func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i < len(b); i += 2 {
		v := uint32(b[i]) << 8
		if i+1 < len(b) {
			v |= uint32(b[i+1])
		}
		sum += v
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
