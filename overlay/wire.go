package overlay

import (
	"bufio"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"
)

// keepalive is how often an idle pair sends, in seconds. It is shorter than the 30 s after which connection tracking
// forgets a UDP flow that was never answered, so that a peer who starts late is always let in.
const keepalive = 20

// A wire is a running WireGuard.
type wire struct {
	*device.Device
	bind *bind
}

// openWire makes the tunnel in its namespace and starts WireGuard on it. A predecessor that is still dying may hold the
// port and the interface for a moment.
func (n *Network) openWire(ctx context.Context) (*wire, error) {
	deadline := time.Now().Add(10 * time.Second)
	for {
		w, err := n.tryWire()
		if err == nil || time.Now().After(deadline) ||
			!errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.EADDRINUSE) && !strings.Contains(err.Error(), "address already in use") {
			return w, err
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (n *Network) tryWire() (*wire, error) {
	var t tun.Device
	err := within(n.tunNS(), func() (err error) {
		t, err = openTun(n.tunName(), n.cfg.MTU)
		return err
	})
	if err != nil {
		return nil, err
	}
	b := &bind{Bind: conn.NewStdNetBind(), ns: n.cfg.Main}
	dev := device.NewDevice(t, b, &device.Logger{
		Verbosef: func(format string, args ...any) {
			if n.log.Enabled(context.Background(), slog.LevelDebug) {
				n.log.Debug("wireguard", "event", fmt.Sprintf(format, args...))
			}
		},
		Errorf: func(format string, args ...any) { n.log.Debug("wireguard", "trouble", fmt.Sprintf(format, args...)) },
	})
	if err := dev.IpcSet(fmt.Sprintf("private_key=%x\nlisten_port=%d\n", n.cfg.PrivateKey, n.cfg.Port)); err != nil {
		dev.Close()
		return nil, fmt.Errorf("configure wireguard: %w", err)
	}
	if err := dev.Up(); err != nil {
		dev.Close()
		return nil, fmt.Errorf("start wireguard on port %d: %w", n.cfg.Port, err)
	}
	if err := within(n.tunNS(), n.configureTun); err != nil {
		dev.Close()
		return nil, err
	}
	return &wire{dev, b}, nil
}

func openTun(name string, mtu int) (tun.Device, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/net/tun: %w", err)
	}
	req, err := unix.NewIfreq(name)
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("tunnel %s: %w", name, err)
	}
	req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("make tunnel %s: %w", name, err)
	}
	t, _, err := tun.CreateUnmonitoredTUNFromFD(fd)
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("open tunnel %s: %w", name, err)
	}
	return fixedTun{t, mtu}, nil
}

// A fixedTun knows its MTU: WireGuard asks from threads that do not see the interface.
type fixedTun struct {
	tun.Device
	mtu int
}

func (t fixedTun) MTU() (int, error) { return t.mtu, nil }

// A bind opens WireGuard's sockets in the node's own namespace, whatever thread WireGuard is on.
type bind struct {
	conn.Bind
	ns string
}

func (b *bind) Open(port uint16) (fns []conn.ReceiveFunc, actual uint16, err error) {
	err = within(b.ns, func() (err error) {
		fns, actual, err = b.Bind.Open(port)
		return err
	})
	return fns, actual, err
}

// configureTun gives the tunnel its route. It runs in the tunnel's namespace.
func (n *Network) configureTun() error {
	link, err := netlink.LinkByName(n.tunName())
	if err != nil {
		return fmt.Errorf("find tunnel %s: %w", n.tunName(), err)
	}
	if n.cfg.InMain {
		if err := sysctl("ipv6/conf/"+n.tunName()+"/addr_gen_mode", "1"); err != nil {
			return err
		}
	}
	if err := netlink.LinkSetMTU(link, n.cfg.MTU); err != nil {
		return fmt.Errorf("set mtu of %s: %w", n.tunName(), err)
	}
	if n.cfg.InMain {
		// Without its tunnel the network is nowhere: its packets must not take the node's default route in the clear.
		if err := addRoute(netlink.Route{Dst: ipNet(n.prefix), Type: unix.RTN_BLACKHOLE, Priority: 1 << 20}); err != nil {
			return err
		}
		if err := addAddr(link, netip.PrefixFrom(n.cfg.Self, 128)); err != nil {
			return err
		}
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring up %s: %w", n.tunName(), err)
	}
	return addRoute(netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(n.prefix), Src: n.cfg.Self.AsSlice()})
}

func (n *Network) tunName() string {
	if n.cfg.InMain {
		return n.cfg.Name
	}
	return "tun0" // not w…: those are workloads
}

func (n *Network) tunNS() string {
	if n.cfg.InMain {
		return n.cfg.Main
	}
	return netPath(n.cfg.Dir, n.cfg.Name)
}

// Two first handshakes that cross cancel each other, and WireGuard tries again only after five seconds. So the side
// with the lower key begins, and the other only knocks, and begins itself if nothing came for a headStart. Workloads that
// are already sending can make both begin at once all the same; then the lower side begins again, ever less often.
const headStart = 250 * time.Millisecond

// A greeting is a first handshake that may need help.
type greeting struct {
	peer Peer
	due  time.Time
	gap  time.Duration // until the next try; 0 for the side that does not begin
}

// greet starts the greetings of new peers, and returns the list of all.
func (w *wire) greet(self [32]byte, list []greeting, fresh []Peer, now time.Time) ([]greeting, error) {
	for _, p := range fresh {
		g := greeting{peer: p, due: now.Add(headStart)}
		if compareKeys(self, p.PublicKey) < 0 {
			g.gap = 2 * headStart
			g.due = now.Add(g.gap)
		} else if err := w.bind.knock(p); err != nil {
			return list, err
		}
		list = append(list, g)
	}
	return list, nil
}

// planGreetings says what the greetings that are due need. It is pure.
func planGreetings(self [32]byte, list []greeting, current map[[32]byte]Peer, done func(key [32]byte) bool, now time.Time) (plan string, rest []greeting) {
	for _, g := range list {
		switch peer, ok := current[g.peer.PublicKey]; {
		case !ok || done(g.peer.PublicKey) && g.gap > 0:
		case now.Before(g.due):
			rest = append(rest, g)
		case g.gap == 0:
			// This also turns the keepalive on, if the other side did begin.
			plan += fmt.Sprintf("public_key=%x\nupdate_only=true\npersistent_keepalive_interval=%d\n", g.peer.PublicKey, keepalive)
		default:
			// Only a new peer may begin at once. There is no session yet that this could end.
			again, _ := planPeers(self, nil, map[[32]byte]Peer{peer.PublicKey: peer})
			plan += fmt.Sprintf("public_key=%x\nremove=true\n", peer.PublicKey) + again
			if g.gap *= 2; g.gap <= 8*headStart {
				rest = append(rest, greeting{peer, now.Add(g.gap), g.gap})
			}
		}
	}
	return plan, rest
}

// planPeers says in WireGuard's configuration protocol how to get from one set of peers to another without touching
// what is in both, and which peers are new. An address that changes hands is given to its new peer
// before the old one is told to drop it, so that no packet finds it without an owner.
func planPeers(self [32]byte, have, want map[[32]byte]Peer) (plan string, fresh []Peer) {
	var gone, set, drop strings.Builder
	keys := make([][32]byte, 0, len(have)+len(want))
	for key := range have {
		keys = append(keys, key)
	}
	for key := range want {
		if _, ok := have[key]; !ok {
			keys = append(keys, key)
		}
	}
	slices.SortFunc(keys, compareKeys)
	for _, key := range keys {
		old, had := have[key]
		peer, wanted := want[key]
		if !wanted {
			fmt.Fprintf(&gone, "public_key=%x\nremove=true\n", key)
			continue
		}
		var lines strings.Builder
		if !had || old.PresharedKey != peer.PresharedKey {
			fmt.Fprintf(&lines, "preshared_key=%x\n", peer.PresharedKey)
		}
		moved := peer.Endpoint.IsValid() && (!had || old.Endpoint != peer.Endpoint)
		if moved {
			fmt.Fprintf(&lines, "endpoint=%v\n", peer.Endpoint)
		}
		for _, p := range peer.Addrs {
			if !old.has(p) {
				fmt.Fprintf(&lines, "allowed_ip=%v\n", p.Prefix)
			}
		}
		switch {
		case had && moved:
			// Off and on sends at once, which tells the new place and opens this node's firewall to it.
			fmt.Fprintf(&lines, "persistent_keepalive_interval=0\npersistent_keepalive_interval=%d\n", keepalive)
		case !had && compareKeys(self, key) < 0:
			fmt.Fprintf(&lines, "persistent_keepalive_interval=%d\n", keepalive)
		}
		if !had {
			fresh = append(fresh, peer)
		}
		if lines.Len() > 0 {
			fmt.Fprintf(&set, "public_key=%x\n", key)
			if had {
				set.WriteString("update_only=true\n")
			}
			set.WriteString(lines.String())
		}
		for _, p := range old.Addrs {
			if !peer.has(p) {
				fmt.Fprintf(&drop, "public_key=%x\nupdate_only=true\nallowed_ip=-%v\n", key, p.Prefix)
			}
		}
	}
	return set.String() + drop.String() + gone.String(), fresh
}

// has reports whether an address is the peer's. A new epoch on the same node changes nothing that WireGuard knows.
func (p Peer) has(a Address) bool {
	return slices.ContainsFunc(p.Addrs, func(b Address) bool { return a.Prefix == b.Prefix })
}

func compareKeys(a, b [32]byte) int { return slices.Compare(a[:], b[:]) }

// knock sends a peer one meaningless byte: its firewall drops it, or its WireGuard does, and this node's firewall takes
// the peer's handshake for an answer from then on.
func (b *bind) knock(p Peer) error {
	if !p.Endpoint.IsValid() {
		return nil
	}
	to, err := b.ParseEndpoint(p.Endpoint.String())
	if err != nil {
		return fmt.Errorf("knock at %v: %w", p.Endpoint, err)
	}
	return b.Send([][]byte{{0}}, to)
}

// checkPeers indexes the peers and leaves out what could not be meant: this node itself, a peer or an address that another
// had before it, an address outside the network. The error names what it left out.
func (n *Network) checkPeers(peers []Peer) (map[[32]byte]Peer, error) {
	set := make(map[[32]byte]Peer, len(peers))
	owner := make(map[netip.Prefix]bool)
	var out []error
	for _, p := range peers {
		if p.PublicKey == n.public {
			out = append(out, fmt.Errorf("peer %x: is this node", p.PublicKey[:4]))
			continue
		}
		if _, ok := set[p.PublicKey]; ok {
			out = append(out, fmt.Errorf("peer %x: given twice", p.PublicKey[:4]))
			continue
		}
		var addrs []Address
		for _, a := range p.Addrs {
			if a.Bits() != 128 || !n.prefix.Contains(a.Addr()) || a.Addr() == n.cfg.Self {
				out = append(out, fmt.Errorf("peer %x: address %v is not another member of %v", p.PublicKey[:4], a.Prefix, n.prefix))
			} else if owner[a.Prefix] {
				out = append(out, fmt.Errorf("peer %x: address %v has another owner", p.PublicKey[:4], a.Prefix))
			} else {
				owner[a.Prefix] = true
				addrs = append(addrs, a)
			}
		}
		p.Addrs = addrs
		set[p.PublicKey] = p
	}
	return set, errors.Join(out...)
}

// remember holds a set against the epochs that were seen, and adds its own to them if none is superseded. With mu held.
func (n *Network) remember(set map[[32]byte]Peer, own []Address) error {
	all := slices.Clone(own)
	for _, p := range set {
		all = append(all, p.Addrs...)
	}
	for _, a := range all {
		if a.Epoch < n.newest[a.Prefix] {
			return fmt.Errorf("address %v in epoch %d, seen in %d: %w", a.Prefix, a.Epoch, n.newest[a.Prefix], ErrSuperseded)
		}
	}
	for _, a := range all {
		if a.Epoch > 0 {
			n.newest[a.Prefix] = a.Epoch
		}
	}
	return nil
}

// A PeerStatus is what the tunnel saw of a peer.
type PeerStatus struct {
	PublicKey      [32]byte
	Endpoint       netip.AddrPort // where it was last heard
	Handshake      time.Time      // last completed; zero means never
	Received, Sent uint64         // bytes
}

// Status tells what the tunnel saw of each peer, ordered by public key. It is empty while Run does not run.
func (n *Network) Status() []PeerStatus {
	n.mu.Lock()
	dev := n.wire
	n.mu.Unlock()
	if dev == nil {
		return nil
	}
	text, err := dev.IpcGet()
	if err != nil {
		return nil
	}
	seen := make(map[[32]byte]*PeerStatus)
	var p *PeerStatus
	var sec, nsec int64
	for lines := bufio.NewScanner(strings.NewReader(text)); lines.Scan(); {
		key, value, _ := strings.Cut(lines.Text(), "=")
		if key == "public_key" {
			p = new(PeerStatus)
			hex.Decode(p.PublicKey[:], []byte(value))
			seen[p.PublicKey] = p
		}
		if p == nil {
			continue
		}
		switch key {
		case "endpoint":
			p.Endpoint, _ = netip.ParseAddrPort(value)
		case "last_handshake_time_sec":
			sec, _ = strconv.ParseInt(value, 10, 64)
		case "last_handshake_time_nsec":
			if nsec, _ = strconv.ParseInt(value, 10, 64); sec != 0 || nsec != 0 {
				p.Handshake = time.Unix(sec, nsec)
			}
		case "rx_bytes":
			p.Received, _ = strconv.ParseUint(value, 10, 64)
		case "tx_bytes":
			p.Sent, _ = strconv.ParseUint(value, 10, 64)
		}
	}
	out := make([]PeerStatus, 0, len(seen))
	for _, key := range slices.SortedFunc(maps.Keys(seen), compareKeys) {
		out = append(out, *seen[key])
	}
	return out
}

// Links, addresses and routes of the thread's namespace.

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func addAddr(link netlink.Link, p netip.Prefix) error {
	addr := &netlink.Addr{IPNet: ipNet(p)}
	if p.Addr().Is6() {
		addr.Flags = unix.IFA_F_NODAD
	}
	if err := netlink.AddrReplace(link, addr); err != nil {
		return fmt.Errorf("add address %v to %s: %w", p, link.Attrs().Name, err)
	}
	return nil
}

func addRoute(r netlink.Route) error {
	if err := netlink.RouteReplace(&r); err != nil {
		return fmt.Errorf("add route to %v: %w", r.Dst, err)
	}
	return nil
}

func addNeighbour(link netlink.Link, ip netip.Addr, mac net.HardwareAddr) error {
	err := netlink.NeighSet(&netlink.Neigh{LinkIndex: link.Attrs().Index, IP: ip.AsSlice(), HardwareAddr: mac, State: netlink.NUD_PERMANENT})
	if err != nil {
		return fmt.Errorf("add neighbour %v: %w", ip, err)
	}
	return nil
}
