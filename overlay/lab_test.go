package overlay

import (
	"context"
	"crypto/ecdh"
	"crypto/sha256"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A lab is a router with some nodes ("boxes") behind it, each a network namespace, all in this process.
type lab struct {
	t      testing.TB
	dir    string
	router string // namespace
	boxes  []*box
}

type box struct {
	lab  *lab
	n    int
	ns   string // the node's own namespace
	v6   netip.Addr
	v4   netip.Addr
	key  [32]byte
	pub  [32]byte
	id   [32]byte
	nets string // Config.Dir
}

func newLab(t testing.TB, boxes int) *lab {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	dir, err := os.MkdirTemp("", "hfov")
	must(t, err)
	must(t, unix.Mount("hfov", dir, "tmpfs", 0, "size=1m"))
	l := &lab{t: t, dir: dir, router: filepath.Join(dir, "router")}
	t.Cleanup(func() {
		entries, _ := os.ReadDir(dir)
		for _, e := range entries {
			if nets, _ := List(filepath.Join(dir, e.Name(), "nets")); nets != nil {
				for _, name := range nets {
					if err := Destroy(context.Background(), filepath.Join(dir, e.Name(), "nets"), name); err != nil {
						t.Error(err)
					}
				}
			}
			removeNamespace(filepath.Join(dir, e.Name(), "main"))
		}
		removeNamespace(l.router)
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
		os.Remove(dir)
	})
	must(t, makeNamespace(l.router, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		if err := netlink.LinkSetUp(lo); err != nil {
			return err
		}
		for _, k := range []string{"ipv6/conf/all/forwarding", "ipv4/conf/all/forwarding"} {
			if err := sysctl(k, "1"); err != nil {
				return err
			}
		}
		return nil
	}))
	for i := 1; i <= boxes; i++ {
		l.boxes = append(l.boxes, l.addBox(i))
	}
	return l
}

func (l *lab) addBox(i int) *box {
	t := l.t
	t.Helper()
	b := &box{lab: l, n: i, ns: filepath.Join(l.dir, fmt.Sprint(i), "main"), nets: filepath.Join(l.dir, fmt.Sprint(i), "nets")}
	b.derive(i)
	must(t, makeNamespace(b.ns, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(lo)
	}))
	ns, err := unix.Open(b.ns, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	must(t, err)
	defer unix.Close(ns)
	name := fmt.Sprintf("box%d", i)
	must(t, within(l.router, func() error {
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name, MTU: 1500}, PeerName: "eth0", PeerNamespace: netlink.NsFd(ns)}); err != nil {
			return err
		}
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return err
		}
		addAddr(link, netip.PrefixFrom(b.v4.Prev(), 29))
		// Without a link-local address a router cannot solicit its neighbours on behalf of others.
		addAddr(link, netip.MustParsePrefix("fe80::ff/64"))
		return addAddr(link, netip.PrefixFrom(b.v6.Prev(), 64))
	}))
	must(t, within(b.ns, func() error {
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return err
		}
		addAddr(link, netip.PrefixFrom(b.v6, 64))
		addAddr(link, netip.PrefixFrom(b.v4, 29))
		if err := addRoute(netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(everywhere6), Gw: b.v6.Prev().AsSlice()}); err != nil {
			return err
		}
		return addRoute(netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(everywhere4), Gw: b.v4.Prev().AsSlice()})
	}))
	return b
}

// derive gives a box its keys; it is the same in every process.
func (b *box) derive(i int) {
	b.key = sha256.Sum256([]byte(fmt.Sprint("key", i)))
	b.id = sha256.Sum256([]byte(fmt.Sprint("node", i)))
	private, err := ecdh.X25519().NewPrivateKey(b.key[:])
	must(b.lab.t, err)
	copy(b.pub[:], private.PublicKey().Bytes())
	b.v6 = netip.MustParseAddr(fmt.Sprintf("2001:db8:%d::2", i))
	b.v4 = netip.MustParseAddr(fmt.Sprintf("203.0.113.%d", 8*i+2))
}

func attachAddr(network, id string) netip.Addr {
	return Addr(netID(network), sha256.Sum256([]byte(id)))
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func netID(name string) [32]byte { return sha256.Sum256([]byte("net " + name)) }

// A member is a network as one box has it.
type member struct {
	*Network
	box     *box
	places  []netip.Addr
	stop    func()
	stopped chan error
}

// join starts a network on a box and does not wait.
func (b *box) join(name string, port uint16, change ...func(*Config)) *member {
	t := b.lab.t
	t.Helper()
	id := netID(name)
	cfg := Config{Network: id, Name: name, Port: port, PrivateKey: b.key, Self: Addr(id, b.id), Dir: b.nets, Main: b.ns}
	if os.Getenv("HF_LOG") != "" {
		cfg.Log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug})).With("box", b.n)
	}
	for _, f := range change {
		f(&cfg)
	}
	n, err := New(cfg)
	must(t, err)
	m := &member{Network: n, box: b}
	m.start()
	return m
}

func (m *member) start() {
	ctx, cancel := context.WithCancel(context.Background())
	m.stopped = make(chan error, 1)
	go func() { m.stopped <- m.Run(ctx) }()
	m.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-m.stopped; err != nil {
			m.box.lab.t.Error(err)
		}
	})
	m.box.lab.t.Cleanup(m.stop)
}

// attach attaches a workload and returns its namespace and address.
func (m *member) attach(id string) (string, netip.Addr) {
	t := m.box.lab.t
	t.Helper()
	addr := attachAddr(m.cfg.Name, id)
	path, err := m.Attach(context.Background(), Attachment{ID: id, Addr: addr})
	must(t, err)
	m.places = append(m.places, addr)
	return path, addr
}

// as is this member as a peer of others.
func (m *member) as(other *member) Peer {
	var psk [32]byte
	for i := range psk {
		psk[i] = m.box.pub[i] ^ other.box.pub[i]
	}
	p := Peer{PublicKey: m.box.pub, PresharedKey: psk, Endpoint: netip.AddrPortFrom(m.box.v6, m.cfg.Port)}
	for _, a := range append([]netip.Addr{m.cfg.Self}, m.places...) {
		p.Addrs = append(p.Addrs, Address{Prefix: netip.PrefixFrom(a, 128)})
	}
	return p
}

// mesh makes all members peers of each other.
func mesh(t testing.TB, members ...*member) {
	t.Helper()
	for _, m := range members {
		var peers []Peer
		for _, other := range members {
			if other != m {
				peers = append(peers, other.as(m))
			}
		}
		must(t, m.SetPeers(peers))
	}
}

// listen serves TCP in a namespace: it sends greeting and echoes.
func listen(t testing.TB, ns string, at netip.AddrPort, greeting string) net.Listener {
	t.Helper()
	var l net.Listener
	must(t, within(ns, func() (err error) {
		l, err = new(net.ListenConfig).Listen(context.Background(), "tcp", at.String())
		return err
	}))
	serve(t, l, greeting)
	return l
}

func serve(t testing.TB, l net.Listener, greeting string) {
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				io.WriteString(c, greeting)
				io.Copy(c, c)
			}()
		}
	}()
}

func dial(ns string, at netip.AddrPort, timeout time.Duration) (c net.Conn, err error) {
	err = within(ns, func() (err error) {
		c, err = net.DialTimeout("tcp", at.String(), timeout)
		return err
	})
	return c, err
}

// greet connects and reads the greeting, trying again until the deadline.
func greet(ns string, at netip.AddrPort, want string, patience time.Duration) (net.Conn, error) {
	deadline := time.Now().Add(patience)
	for {
		c, err := dial(ns, at, min(time.Second, time.Until(deadline)))
		if err == nil {
			buf := make([]byte, len(want))
			c.SetDeadline(time.Now().Add(2 * time.Second))
			if _, err = io.ReadFull(c, buf); err == nil && string(buf) == want {
				c.SetDeadline(time.Time{})
				return c, nil
			}
			c.Close()
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("%v: %w", at, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func reachable(t testing.TB, ns string, at netip.AddrPort, want string) {
	t.Helper()
	// Longer than the five seconds after which WireGuard tries a handshake again that a busy machine lost.
	c, err := greet(ns, at, want, 30*time.Second)
	must(t, err)
	c.Close()
}
