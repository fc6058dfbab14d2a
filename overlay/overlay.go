// Package overlay builds private IPv6 networks between machines that do not trust the cable, the farm or each other.
//
// One Network is one WireGuard mesh as one node sees it: a tunnel, its peers, the workloads attached to it on this node,
// their names, and what they may reach outside. A node runs one for each contract network that has workloads on it, in a
// network namespace of its own (NET), and one for the grid's system network, whose tunnel is in the node's own namespace.
//
// Addresses are derived and never chosen. A network has a /48 and each member, node or workload, a /128 in it:
//
//	prefix = fd || first  5 bytes of SHA-256("holdfast/net/v1"  || 00 || network)
//	addr   = prefix || first 10 bytes of SHA-256("holdfast/addr/v1" || 00 || network || member)
//
// The package never decides who is a peer, who runs where or who may talk to whom: the caller says so, and says so again
// whenever it changes. It only remembers, as long as a Network lives, in which epoch each address was given to a node, and
// takes no word that is older. It keeps nothing on disk. What must survive the death of the process (NET, attachments, their
// pins) lives in the kernel; the tunnel and the DNS server live in the process and come back with the next Run:
//
//	DIR/NAME/net     NET: tunnel "tun0", one veth "w…" a workload, "up0" when a workload has egress
//	DIR/NAME/w-ID    a workload's namespace: "eth0", handed to its sandbox
//
// Inside NET nothing is bridged and nothing is believed. Each workload hangs on a routed veth of its own, and a packet
// enters only if its interface, source MAC and source address are those of one attachment; a packet from the tunnel is
// already bound by WireGuard's allowed addresses. Forwarding goes between members of the network and nowhere else.
// Neighbours are permanent entries on both ends, so that neighbour discovery can neither fail nor be forged.
//
// DNS (RFC 1035, UDP and TCP port 53) listens inside NET on the node's own address and answers that network's workloads
// only: AAAA of the names given by SetNames, no data for other types, NXDOMAIN for other names, or the node's resolvers'
// answer if the asking workload has egress. Names are matched without regard to case. Limits: one question a message,
// 4096 bytes a message, 8 TCP connections and forwarded
// queries of a workload at a time.
package overlay

import (
	"context"
	"crypto/ecdh"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"regexp"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Prefix returns the /48 of a network.
func Prefix(network [32]byte) netip.Prefix {
	return netip.PrefixFrom(address(network, nil), 48)
}

// Addr returns the /128 of a member, a node or a workload, in a network.
func Addr(network, member [32]byte) netip.Addr {
	return address(network, member[:])
}

func address(network [32]byte, member []byte) netip.Addr {
	var a [16]byte
	p := sha256.Sum256(append([]byte("holdfast/net/v1\x00"), network[:]...))
	a[0] = 0xfd
	copy(a[1:6], p[:5])
	if member != nil {
		m := sha256.Sum256(append(append([]byte("holdfast/addr/v1\x00"), network[:]...), member...))
		copy(a[6:], m[:10])
	}
	return netip.AddrFrom16(a)
}

// Config says what a Network is on this node. It does not change during the Network's life.
type Config struct {
	Network    [32]byte
	Name       string           // unique on this node, [a-z0-9]{1,8}: it names directories and interfaces
	Port       uint16           // UDP port of WireGuard in the node's namespace, unique on this node
	PrivateKey [32]byte         // the node's X25519 key
	Self       netip.Addr       // the node's address in this network: router and DNS server
	Dir        string           // directory on tmpfs that holds the namespaces of all networks
	InMain     bool             // the tunnel is in the node's own namespace and there are no workloads: the system network
	Main       string           // the node's own namespace; empty means that of this process
	MTU        int              // of the tunnel; 0 means 1420
	Resolvers  []netip.AddrPort // answer foreign names for workloads that have egress; none means that nobody does
	Log        *slog.Logger     // nil discards
}

// A Peer is another node of the network.
type Peer struct {
	PublicKey    [32]byte
	PresharedKey [32]byte
	Endpoint     netip.AddrPort // the zero value waits for the peer to call
	Addrs        []Address      // what it may send from and is sent to: its own and those of its workloads
}

// An Address is a member's /128, and the epoch in which the ledger assigned that workload to its node. A node's own address
// never moves and has epoch 0.
type Address struct {
	netip.Prefix
	Epoch uint64
}

// An Egress rule lets one workload open connections to the outside. Whatever the rules say, a workload never reaches
// the node, the node's own links, loopback, link-local, multicast and private addresses, or another network.
type Egress struct {
	Prefix netip.Prefix // IPv6 or IPv4
	Proto  string       // "tcp" or "udp"
	Port   uint16       // 0 means any
}

// An Attachment is one workload's place in the network.
type Attachment struct {
	ID   string // [a-z0-9-]{1,63}
	Addr netip.Addr
}

// A Network is one overlay network on this node.
type Network struct {
	cfg    Config
	prefix netip.Prefix
	public [32]byte
	log    *slog.Logger
	wake   chan struct{}
	dns    server

	mu     sync.Mutex // guards what is wanted, and the wire
	peers  map[[32]byte]Peer
	newest map[netip.Prefix]uint64 // the highest epoch that was seen of a workload's address; it only grows
	egress map[netip.Addr][]Egress
	wire   *wire // while Run runs

	kernel sync.Mutex // held while the namespaces, links and rules of this network are read or changed
}

var (
	nameForm = regexp.MustCompile(`^[a-z0-9]{1,8}$`)
	idForm   = regexp.MustCompile(`^[a-z0-9-]{1,63}$`)
)

// New checks the configuration. It touches nothing.
func New(cfg Config) (*Network, error) {
	n := &Network{cfg: cfg, prefix: Prefix(cfg.Network), log: cfg.Log, wake: make(chan struct{}, 1), newest: make(map[netip.Prefix]uint64)}
	switch {
	case !nameForm.MatchString(cfg.Name):
		return nil, fmt.Errorf("overlay: name %q: want 1 to 8 of a-z and 0-9", cfg.Name)
	case !filepath.IsAbs(cfg.Dir) && !cfg.InMain:
		return nil, fmt.Errorf("overlay %s: directory %q: want an absolute path", cfg.Name, cfg.Dir)
	case !n.prefix.Contains(cfg.Self):
		return nil, fmt.Errorf("overlay %s: own address %v is outside %v", cfg.Name, cfg.Self, n.prefix)
	case cfg.Port == 0:
		return nil, fmt.Errorf("overlay %s: no port", cfg.Name)
	case cfg.PrivateKey == [32]byte{}:
		return nil, fmt.Errorf("overlay %s: no private key", cfg.Name)
	}
	if n.cfg.MTU == 0 {
		n.cfg.MTU = 1420
	}
	if n.cfg.MTU < 1280 || n.cfg.MTU > 65000 {
		return nil, fmt.Errorf("overlay %s: mtu %d: want 1280 to 65000", cfg.Name, n.cfg.MTU)
	}
	if n.log == nil {
		n.log = slog.New(slog.DiscardHandler)
	}
	n.log = n.log.With("network", cfg.Name)
	private, err := ecdh.X25519().NewPrivateKey(cfg.PrivateKey[:])
	if err != nil {
		return nil, fmt.Errorf("overlay %s: private key: %w", cfg.Name, err)
	}
	n.public = [32]byte(private.PublicKey().Bytes())
	n.dns = server{self: cfg.Self, main: cfg.Main, resolvers: cfg.Resolvers, log: n.log}
	return n, nil
}

// poke makes Run compare again.
func (n *Network) poke() {
	select {
	case n.wake <- struct{}{}:
	default:
	}
}

// ErrNoWorkloads says that the system network takes no attachments.
var ErrNoWorkloads = errors.New("a system network takes no workloads")

// ErrSuperseded says that peers were given in an epoch below one that was seen.
var ErrSuperseded = errors.New("the epoch is superseded")

// SetPeers says who the peers are, and which workloads this node has of its own. Peers that did not change notice nothing;
// an address moves from one to another without a gap. What cannot be meant so, a peer given twice or an address that is
// another's, is left out and named in the error; the rest takes effect, so that nobody's bad word keeps others apart.
//
// Where an address has a lower epoch than it had before, all that is said here is older than what is known: it is refused
// with ErrSuperseded and changes nothing, so that no late view gives a workload's address back to the node that lost it.
func (n *Network) SetPeers(peers []Peer, own ...Address) error {
	set, err := n.checkPeers(peers)
	n.mu.Lock()
	if err := n.remember(set, own); err != nil {
		n.mu.Unlock()
		return fmt.Errorf("peers of %s: %w", n.cfg.Name, err)
	}
	n.peers = set
	n.mu.Unlock()
	n.poke()
	if err != nil {
		return fmt.Errorf("peers of %s: %w", n.cfg.Name, err)
	}
	return nil
}

// SetNames says what DNS answers: names without a final dot, such as "db" and "db.shop.internal".
func (n *Network) SetNames(names map[string][]netip.Addr) { n.dns.setNames(names) }

// SetEgress says what each workload may reach outside; a workload that is not in it reaches nothing. If nobody has
// egress, there is no path. The Firewall's Egress must be on as well.
func (n *Network) SetEgress(rules map[netip.Addr][]Egress) error {
	if err := checkEgress(rules); err != nil {
		return fmt.Errorf("network %s: %w", n.cfg.Name, err)
	}
	wanted := make(map[netip.Addr][]Egress)
	free := make(map[netip.Addr]bool)
	for addr, list := range rules {
		if len(list) > 0 {
			wanted[addr] = slices.Clone(list)
			free[addr] = true
		}
	}
	n.mu.Lock()
	n.egress = wanted
	n.mu.Unlock()
	n.dns.setForward(free)
	n.poke()
	return nil
}

// Run opens the tunnel, serves DNS, and keeps the kernel as wanted, until ctx ends. Then the tunnel is gone; NET, the
// attachments and their rules stay, and the next Run, in this process or another, takes them over.
func (n *Network) Run(ctx context.Context) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("network %s: %w", n.cfg.Name, err)
		}
	}()
	n.kernel.Lock()
	if err = n.ensureNet(); err == nil && !n.cfg.InMain {
		err = n.sweep()
	}
	n.kernel.Unlock()
	if err != nil {
		return err
	}
	wire, err := n.openWire(ctx)
	if err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	n.mu.Lock()
	n.wire = wire
	n.mu.Unlock()
	defer func() {
		n.mu.Lock()
		n.wire = nil
		n.mu.Unlock()
		wire.Close()
	}()

	var serving sync.WaitGroup
	defer serving.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if !n.cfg.InMain {
		packets, streams, err := n.listenDNS()
		if err != nil {
			return err
		}
		serving.Go(func() { n.dns.serve(ctx, packets, streams) })
	}

	have := make(map[[32]byte]Peer)
	var greetings []greeting
	greet := time.NewTimer(0)
	defer greet.Stop()
	again := time.NewTimer(0)
	defer again.Stop()
	resync := time.NewTicker(30 * time.Second)
	defer resync.Stop()
	for {
		n.mu.Lock()
		want, egress := n.peers, n.egress
		n.mu.Unlock()
		plan, fresh := planPeers(n.public, have, want)
		if plan != "" {
			if err := wire.IpcSet(plan); err != nil {
				return fmt.Errorf("set peers: %w", err)
			}
			have = want
		}
		if greetings, err = wire.greet(n.public, greetings, fresh, time.Now()); err != nil {
			n.log.Debug("greet", "error", err) // the handshake goes on trying
		}
		if len(greetings) > 0 {
			greet.Reset(headStart / 2)
		}
		if err := n.reconcile(egress); err != nil {
			// The tunnel goes on; half of the peers' trouble would be made by taking it down.
			n.log.Warn("reconcile", "error", err)
			again.Reset(time.Second)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-wire.Wait():
			return errors.New("wireguard ended by itself")
		case <-n.wake:
		case now := <-greet.C:
			met := make(map[[32]byte]bool)
			for _, p := range n.Status() {
				met[p.PublicKey] = !p.Handshake.IsZero()
			}
			plan, greetings = planGreetings(n.public, greetings, have, func(key [32]byte) bool { return met[key] }, now)
			if err := wire.IpcSet(plan); err != nil {
				return fmt.Errorf("greet peers: %w", err)
			}
		case <-again.C:
		case <-resync.C:
		}
	}
}

// reconcile makes NET's rules and its way out what they should be.
func (n *Network) reconcile(egress map[netip.Addr][]Egress) error {
	if n.cfg.InMain {
		return nil
	}
	n.kernel.Lock()
	defer n.kernel.Unlock()
	places, err := n.places()
	if err != nil {
		return err
	}
	// The rules come before the way out, and go after it.
	if len(egress) == 0 {
		if err := n.linkOut(false); err != nil {
			return err
		}
	}
	if err := n.applyRules(places); err != nil {
		return err
	}
	if len(egress) > 0 {
		return n.linkOut(true)
	}
	return nil
}

func (n *Network) applyRules(places []place) error {
	n.mu.Lock()
	egress := n.egress
	n.mu.Unlock()
	return within(n.tunNS(), func() error { return n.replaceRules(places, egress) })
}

// Dial opens a TCP connection from inside the network, from the node's own address.
func (n *Network) Dial(ctx context.Context, to netip.AddrPort) (c net.Conn, err error) {
	if !n.prefix.Contains(to.Addr()) {
		return nil, fmt.Errorf("network %s: dial %v: outside %v", n.cfg.Name, to, n.prefix)
	}
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: n.cfg.Self.AsSlice()}}
	err = within(n.tunNS(), func() (err error) {
		c, err = d.DialContext(ctx, "tcp6", to.String())
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("network %s: %w", n.cfg.Name, err)
	}
	return c, nil
}

// Listen opens a TCP listener on the node's own address in the network. Only on a system network can others reach it,
// as far as the Firewall's Access lets them. It may be called before Run, and outlives it.
func (n *Network) Listen(ctx context.Context, port uint16) (l net.Listener, err error) {
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		// The address comes and goes with the tunnel.
		if e := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_FREEBIND, 1) }); e != nil {
			return e
		}
		return err
	}}
	err = within(n.tunNS(), func() (err error) {
		l, err = lc.Listen(ctx, "tcp6", netip.AddrPortFrom(n.cfg.Self, port).String())
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("network %s: %w", n.cfg.Name, err)
	}
	return l, nil
}
