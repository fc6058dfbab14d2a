package box

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Topology is the little internet of a grid on one machine: a router (a box without a daemon) with one bridge for each
// segment. Addresses are those reserved for documentation: segment n is 203.0.113.(16n)/28 and 2001:db8:n::/64, the
// router is host 1 of each. No route leads from the host into it or out of it. It is held by one process and by no mount:
// nothing of it can be left when that process is gone.
type Topology struct {
	Router Box
}

// Segments is how many segments there are, numbered from 0.
const Segments = 16

func addr4(segment, host int) netip.Addr {
	return netip.AddrFrom4([4]byte{203, 0, 113, byte(16*segment + host)})
}

func addr6(segment, host int) netip.Addr {
	return netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, 0, byte(segment), 15: byte(host)})
}

// Addresses are those of a host, IPv6 first.
func (t *Topology) Addresses(u Uplink) []netip.Prefix {
	return []netip.Prefix{netip.PrefixFrom(addr6(u.Segment, u.Host), 64), netip.PrefixFrom(addr4(u.Segment, u.Host), 28)}
}

// Gateways are the router's addresses in a segment.
func (t *Topology) Gateways(segment int) []netip.Addr {
	return []netip.Addr{addr6(segment, 1), addr4(segment, 1)}
}

// Prepare makes a new router's bridges. It is idempotent.
func (t *Topology) Prepare(segments []int) error {
	return t.within(func(h *netlink.Handle) error {
		for _, f := range []string{"net/ipv6/conf/all/forwarding", "net/ipv4/ip_forward"} {
			if err := os.WriteFile("/proc/sys/"+f, []byte("1"), 0o644); err != nil {
				return err
			}
		}
		for _, s := range segments {
			name := bridgeName(s)
			if _, err := h.LinkByName(name); err == nil {
				continue
			}
			// An address of its own: one that it takes from its ports changes when a cable comes or goes, and then nobody on the
			// segment finds the router until he asks again.
			if err := h.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name, HardwareAddr: t.MAC(Uplink{s, 1})}}); err != nil {
				return fmt.Errorf("bridge %s: %w", name, err)
			}
			l, err := h.LinkByName(name)
			if err != nil {
				return err
			}
			if err := os.WriteFile("/proc/sys/net/ipv6/conf/"+name+"/accept_dad", []byte("0"), 0o644); err != nil {
				return err
			}
			for _, p := range t.Addresses(Uplink{s, 1}) {
				a := &netlink.Addr{IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}}
				if p.Addr().Is6() {
					a.Flags = unix.IFA_F_NODAD
				}
				if err := h.AddrAdd(l, a); err != nil {
					return fmt.Errorf("bridge %s: %w", name, err)
				}
			}
			if err := h.LinkSetUp(l); err != nil {
				return fmt.Errorf("bridge %s: %w", name, err)
			}
		}
		return nil
	})
}

func bridgeName(segment int) string { return fmt.Sprintf("br%d", segment) }

func vethName(u Uplink) string { return fmt.Sprintf("v%d-%d", u.Segment, u.Host) }

// attach gives a box an eth0 on a segment.
func (t *Topology) attach(u Uplink, b Box, plugged bool) error {
	return t.within(func(h *netlink.Handle) error {
		name := vethName(u)
		if old, err := h.LinkByName(name); err == nil { // of a box that has just died
			if err := h.LinkDel(old); err != nil {
				return fmt.Errorf("veth %s: %w", name, err)
			}
		}
		br, err := h.LinkByName(bridgeName(u.Segment))
		if err != nil {
			return fmt.Errorf("segment %d: %w", u.Segment, err)
		}
		fd, err := b.netns()
		if err != nil {
			return err
		}
		defer fd.Close()
		v := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name, MasterIndex: br.Attrs().Index}, PeerName: "eth0", PeerNamespace: netlink.NsFd(fd)}
		if err := h.LinkAdd(v); err != nil {
			return fmt.Errorf("veth %s: %w", name, err)
		}
		if !plugged {
			return nil
		}
		l, err := h.LinkByName(name)
		if err != nil {
			return fmt.Errorf("veth %s: %w", name, err)
		}
		return h.LinkSetUp(l)
	})
}

// detach takes a box's cable away. A namespace that has ended gives its interfaces back when the kernel gets to it.
func (t *Topology) detach(u Uplink) error {
	return t.within(func(h *netlink.Handle) error {
		l, err := h.LinkByName(vethName(u))
		if errors.As(err, &netlink.LinkNotFoundError{}) {
			return nil
		} else if err != nil {
			return err
		}
		return h.LinkDel(l)
	})
}

// unplugged are the cables that are there and not plugged in.
func (t *Topology) unplugged() (map[string]bool, error) {
	out := map[string]bool{}
	err := t.within(func(h *netlink.Handle) error {
		all, err := h.LinkList()
		for _, l := range all {
			if l.Type() == "veth" && l.Attrs().Flags&net.FlagUp == 0 {
				out[l.Attrs().Name] = true
			}
		}
		return err
	})
	return out, err
}

// setLink plugs a host's cable in or pulls it.
func (t *Topology) setLink(u Uplink, up bool) error {
	return t.within(func(h *netlink.Handle) error {
		l, err := h.LinkByName(vethName(u))
		if err != nil {
			return fmt.Errorf("cable of host %d on segment %d: %w", u.Host, u.Segment, err)
		}
		if up {
			return h.LinkSetUp(l)
		}
		return h.LinkSetDown(l)
	})
}

// within runs f in the router's network namespace, with a netlink handle there.
func (t *Topology) within(f func(*netlink.Handle) error) error {
	if t == nil {
		return errNoInternet
	}
	ns, err := t.Router.netns()
	if err != nil {
		return errNoInternet
	}
	defer ns.Close()
	return within(ns, func() error {
		h, err := netlink.NewHandle()
		if err != nil {
			return err
		}
		defer h.Close()
		return f(h)
	})
}

var errNoInternet = errors.New("the grid's internet is not up")

// netns opens the box's network namespace, and no other's that has got its process ID.
func (b Box) netns() (netns.NsHandle, error) {
	ns, err := netns.GetFromPath(b.NetNS())
	if err != nil {
		return ns, fmt.Errorf("network of %s: %w", b.Name, err)
	}
	if !b.Alive() {
		ns.Close()
		return ns, fmt.Errorf("network of %s: %w", b.Name, os.ErrProcessDone)
	}
	return ns, nil
}

// Within runs f on a thread of its own in a network namespace. Sockets that f makes stay there. The thread ends with f:
// one that has been elsewhere must not run other goroutines.
func Within(path string, f func() error) error {
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return fmt.Errorf("enter %s: %w", path, err)
	}
	defer ns.Close()
	return within(ns, f)
}

func within(ns netns.NsHandle, f func() error) error {
	done := make(chan error, 1)
	go enter(done, ns, f)
	return <-done
}

func enter(done chan<- error, ns netns.NsHandle, f func() error) {
	err := errors.New("the function ended its goroutine")
	defer func() { done <- err }() // also when f is a test that calls FailNow
	runtime.LockOSThread()
	if unix.Gettid() == unix.Getpid() {
		// The first thread cannot end, and what /proc says of the process is what it is. It is held while another
		// goroutine, which cannot get it, does the work.
		inner := make(chan error, 1)
		go enter(inner, ns, f)
		err = <-inner
		runtime.UnlockOSThread()
		return
	}
	if e := netns.Set(ns); e != nil {
		err = fmt.Errorf("enter network namespace: %w", e)
		return
	}
	err = f()
}

// DialIn connects from inside a network namespace. The address must be a literal one.
func DialIn(ctx context.Context, path, addr string) (c net.Conn, err error) {
	err = Within(path, func() error {
		var d net.Dialer
		c, err = d.DialContext(ctx, "tcp", addr)
		return err
	})
	return c, err
}

// Forward passes what comes to l on to an address inside a network namespace, which path names anew for each
// connection, until ctx ends.
func Forward(ctx context.Context, l net.Listener, path func() string, addr string) error {
	var all sync.WaitGroup
	defer all.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // ends the connections too when somebody else closes l
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	for {
		in, err := l.Accept()
		if ctx.Err() != nil {
			if err == nil {
				in.Close()
			}
			return ctx.Err()
		}
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return err
			}
			time.Sleep(50 * time.Millisecond) // out of descriptors, most likely
			continue
		}
		all.Go(func() {
			defer in.Close()
			dctx, cancel := context.WithTimeout(ctx, 10*time.Second)
			out, err := DialIn(dctx, path(), addr)
			cancel()
			if err != nil {
				return
			}
			defer out.Close()
			end := context.AfterFunc(ctx, func() { in.Close(); out.Close() })
			defer end()
			Splice(in, out)
		})
	}
}

// Splice copies both ways until both are done, and passes on the end of each. A connection that breaks ends both.
func Splice(a, b net.Conn) {
	var both sync.WaitGroup
	one := func(dst, src net.Conn) {
		if _, err := io.Copy(dst, src); err != nil {
			a.Close()
			b.Close()
			return
		}
		if w, ok := dst.(interface{ CloseWrite() error }); ok {
			w.CloseWrite()
		}
	}
	both.Go(func() { one(a, b) })
	both.Go(func() { one(b, a) })
	both.Wait()
}
