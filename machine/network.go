package machine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"
	"unsafe"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/nclient4"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func ioctl(f *os.File, request uintptr, arg *uint64) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(unsafe.Pointer(arg))); errno != 0 {
		return errno
	}
	return nil
}

// waitForLink is how long a network card may take to appear.
const waitForLink = 10 * time.Second

// connect brings the loopback and the network card up. IPv6 addresses and routes come by router advertisement, which is the
// kernel's; IPv4 comes by DHCP, which goes on in the background until ctx ends.
func connect(ctx context.Context, log *slog.Logger) error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	var card netlink.Link
	for end := time.Now().Add(waitForLink); card == nil; time.Sleep(100 * time.Millisecond) {
		links, err := netlink.LinkList()
		if err != nil {
			return err
		}
		if card = firstCard(links); card == nil && time.Now().After(end) {
			return errors.New("there is no network card")
		}
	}
	if err := netlink.LinkSetUp(card); err != nil {
		return fmt.Errorf("%s: %w", card.Attrs().Name, err)
	}
	go keepLease(ctx, card, log)
	return nil
}

// firstCard is the network card with the lowest index, nil if there is none.
func firstCard(links []netlink.Link) (card netlink.Link) {
	for _, l := range links {
		a := l.Attrs()
		if l.Type() != "device" || a.EncapType != "ether" || a.Flags&net.FlagLoopback != 0 {
			continue
		}
		if card == nil || a.Index < card.Attrs().Index {
			card = l
		}
	}
	return card
}

// address is what a DHCP server gave, as far as it makes sense.
type address struct {
	prefix  netip.Prefix
	router  netip.Addr // the zero Addr if there is none
	names   []netip.Addr
	renew   time.Duration
	expires time.Duration
}

// Bounds of what a DHCP server is believed. It is the farmer's, or anybody's on his LAN, and gets nothing by lying but this
// machine's being offline.
const (
	minLease = 30 * time.Second
	maxLease = 24 * time.Hour
	maxNames = 3
)

// addressOf reads a DHCP acknowledgement.
func addressOf(ack *dhcpv4.DHCPv4) (address, error) {
	var a address
	ip, _ := netip.AddrFromSlice(ack.YourIPAddr.To4())
	ones, bits := ack.SubnetMask().Size()
	if !ip.IsValid() || !ip.IsGlobalUnicast() || bits != 32 || ones < 1 {
		return a, fmt.Errorf("address %v/%d from %v makes no sense", ack.YourIPAddr, ones, ack.ServerIdentifier())
	}
	a.prefix = netip.PrefixFrom(ip, ones)
	if r := ack.Router(); len(r) > 0 {
		if router, ok := netip.AddrFromSlice(r[0].To4()); ok && router != ip && a.prefix.Contains(router) && !ofNobody(a.prefix, router) {
			a.router = router
		}
	}
	for _, s := range ack.DNS() {
		if n, ok := netip.AddrFromSlice(s.To4()); ok && len(a.names) < maxNames {
			a.names = append(a.names, n)
		}
	}
	a.expires = min(max(ack.IPAddressLeaseTime(time.Hour), minLease), maxLease)
	a.renew = min(max(ack.IPAddressRenewalTime(a.expires/2), minLease/2), a.expires/2)
	return a, nil
}

// ofNobody says whether an address of a network stands for the network, or for all in it.
func ofNobody(p netip.Prefix, a netip.Addr) bool {
	return p.Bits() < 31 && (a == p.Masked().Addr() || !p.Contains(a.Next()))
}

// keepLease asks for an address, and again when it is due or was refused.
func keepLease(ctx context.Context, card netlink.Link, log *slog.Logger) {
	var had address
	var lease *nclient4.Lease
	wait := time.Second
	failing := false
	for ctx.Err() == nil {
		next, err := obtain(ctx, card.Attrs().Name, lease)
		var a address
		if err == nil {
			a, err = addressOf(next.ACK)
		}
		before := had.prefix
		if err == nil {
			err = errors.Join(apply(card, &had, a), writeNames(names, a.names))
		}
		pause := a.renew
		if err != nil {
			if !failing {
				log.Warn("no address by DHCP", "on", card.Attrs().Name, "error", err)
			}
			// The address that it has goes when the kernel sees it expire.
			failing, lease, pause = true, nil, wait
			wait = min(2*wait, 30*time.Second)
		} else {
			if failing || a.prefix != before {
				log.Info("address by DHCP", "on", card.Attrs().Name, "address", a.prefix, "router", a.router)
			}
			failing, lease, wait = false, next, time.Second
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
}

// obtain asks on a network card, with a socket of its own.
func obtain(ctx context.Context, name string, lease *nclient4.Lease) (*nclient4.Lease, error) {
	c, err := nclient4.New(name, nclient4.WithTimeout(2*time.Second), nclient4.WithRetry(3))
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return ask(ctx, c, lease)
}

var errRefused = errors.New("the server refuses")

// ask renews a lease, or asks for a first one. What a server says in words is dropped: the console is where a machine's ID
// is compared, and nobody else may write one there.
func ask(ctx context.Context, c *nclient4.Client, lease *nclient4.Lease) (*nclient4.Lease, error) {
	if lease != nil {
		if next, err := c.Renew(ctx, lease); err == nil {
			return next, nil
		}
	}
	lease, err := c.Request(ctx)
	if _, ok := errors.AsType[*nclient4.ErrNak](err); ok {
		err = errRefused
	}
	return lease, err
}

// apply gives the card an address, with a lifetime after which the kernel takes it away, and the route that came with it, in
// place of those that it had, which it notes.
func apply(card netlink.Link, had *address, a address) error {
	on := func(p netip.Prefix) *netlink.Addr {
		return &netlink.Addr{IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), 32)}}
	}
	old := *had
	// First: the kernel takes with an address all that came later in the same network.
	if old.prefix.IsValid() && old.prefix != a.prefix {
		if err := netlink.AddrDel(card, on(old.prefix)); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("old address %v: %w", old.prefix, err)
		}
	}
	had.prefix = a.prefix
	addr := on(a.prefix)
	addr.ValidLft = int(a.expires / time.Second)
	addr.PreferedLft = addr.ValidLft
	if err := netlink.AddrReplace(card, addr); err != nil {
		return fmt.Errorf("address %v: %w", a.prefix, err)
	}
	if old.router.IsValid() && !a.router.IsValid() {
		if err := netlink.RouteDel(route(card, old.router)); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("old route via %v: %w", old.router, err)
		}
	}
	had.router = netip.Addr{}
	if a.router.IsValid() {
		if err := netlink.RouteReplace(route(card, a.router)); err != nil {
			return fmt.Errorf("route via %v: %w", a.router, err)
		}
		had.router = a.router
	}
	return nil
}

func route(card netlink.Link, via netip.Addr) *netlink.Route {
	return &netlink.Route{LinkIndex: card.Attrs().Index, Gw: via.AsSlice()}
}

// writeNames makes a file that says whom to ask for names.
func writeNames(file string, servers []netip.Addr) error {
	var text bytes.Buffer
	for _, n := range servers {
		fmt.Fprintf(&text, "nameserver %v\n", n)
	}
	tmp := filepath.Join(filepath.Dir(file), "new")
	if err := os.WriteFile(tmp, text.Bytes(), 0o600); err != nil {
		return fmt.Errorf("names: %w", err)
	}
	return os.Rename(tmp, file)
}
