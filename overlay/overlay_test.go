package overlay

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
)

// Computed apart from this package, in Python.
const (
	wantPrefix = "fdb1:87c6:1d96::/48"
	wantAddr   = "fdb1:87c6:1d96:bf45:184e:b926:c36f:380a"
	wantZero   = "fd94:8862:d119:2014:4525:b5e3:942:ef3d"
)

func TestAddressesAreFrozen(t *testing.T) {
	var network, member [32]byte
	for i := range network {
		network[i], member[i] = byte(i), byte(255-i)
	}
	if got := Prefix(network).String(); got != wantPrefix {
		t.Errorf("prefix %s, want %s", got, wantPrefix)
	}
	if got := Addr(network, member).String(); got != wantAddr {
		t.Errorf("address %s, want %s", got, wantAddr)
	}
	if got := Addr([32]byte{}, [32]byte{}).String(); got != wantZero {
		t.Errorf("address %s, want %s", got, wantZero)
	}
	if !Prefix(network).Contains(Addr(network, member)) {
		t.Error("the address is outside the prefix")
	}
}

func TestNewRefuses(t *testing.T) {
	good := Config{Network: netID("x"), Name: "x", Port: 1, PrivateKey: [32]byte{1}, Self: Addr(netID("x"), [32]byte{}), Dir: "/run/x"}
	if _, err := New(good); err != nil {
		t.Fatal(err)
	}
	for name, spoil := range map[string]func(*Config){
		"a long name":                 func(c *Config) { c.Name = "ninechars" },
		"a name with a path in it":    func(c *Config) { c.Name = "../x" },
		"no name":                     func(c *Config) { c.Name = "" },
		"a relative directory":        func(c *Config) { c.Dir = "x" },
		"an address of another net":   func(c *Config) { c.Self = Addr(netID("y"), [32]byte{}) },
		"no port":                     func(c *Config) { c.Port = 0 },
		"no key":                      func(c *Config) { c.PrivateKey = [32]byte{} },
		"an MTU that IPv6 cannot use": func(c *Config) { c.MTU = 1279 },
	} {
		bad := good
		spoil(&bad)
		if _, err := New(bad); err == nil {
			t.Errorf("%s was accepted", name)
		}
	}
}

func TestPlanPeers(t *testing.T) {
	prefix := func(s string) Address { return Address{Prefix: netip.MustParsePrefix(s + "/128")} }
	a := Peer{PublicKey: [32]byte{1}, Endpoint: netip.MustParseAddrPort("[2001:db8::1]:1"), Addrs: []Address{prefix("fd::1"), prefix("fd::2")}}
	b := Peer{PublicKey: [32]byte{2}, Endpoint: netip.MustParseAddrPort("[2001:db8::2]:1"), Addrs: []Address{prefix("fd::3")}}
	set := func(peers ...Peer) map[[32]byte]Peer {
		m := make(map[[32]byte]Peer)
		for _, p := range peers {
			m[p.PublicKey] = p
		}
		return m
	}
	with := func(p Peer, f func(*Peer)) Peer {
		f(&p)
		return p
	}
	key := func(p Peer) string { return fmt.Sprintf("public_key=%x\n", p.PublicKey) }
	for _, c := range []struct {
		name       string
		have, want map[[32]byte]Peer
		plan       string
	}{
		{"the same peers need nothing", set(a, b), set(b, a), ""},
		{"a new peer is told everything, and called last", set(b), set(a, b), key(a) +
			fmt.Sprintf("preshared_key=%064x\n", 0) + "endpoint=[2001:db8::1]:1\nallowed_ip=fd::1/128\nallowed_ip=fd::2/128\npersistent_keepalive_interval=20\n"},
		{"a peer that left is removed", set(a, b), set(b), key(a) + "remove=true\n"},
		{"a moved endpoint is called, and nothing else is touched", set(a, b), set(a, with(b, func(p *Peer) { p.Endpoint = netip.MustParseAddrPort("[2001:db8::9]:1") })),
			key(b) + "update_only=true\nendpoint=[2001:db8::9]:1\npersistent_keepalive_interval=0\npersistent_keepalive_interval=20\n"},
		{"an address is taken over before it is dropped", set(a, b),
			set(with(a, func(p *Peer) { p.Addrs = p.Addrs[:1] }), with(b, func(p *Peer) { p.Addrs = []Address{prefix("fd::2"), prefix("fd::3")} })),
			key(b) + "update_only=true\nallowed_ip=fd::2/128\n" + key(a) + "update_only=true\nallowed_ip=-fd::2/128\n"},
		{"a new epoch on the same node touches nothing", set(a), set(with(a, func(p *Peer) { p.Addrs = []Address{{p.Addrs[0].Prefix, 7}, p.Addrs[1]} })), ""},
		{"a rotated secret touches nothing else", set(a), set(with(a, func(p *Peer) { p.PresharedKey[31] = 7 })),
			key(a) + "update_only=true\n" + fmt.Sprintf("preshared_key=%064x\n", 7)},
	} {
		if got, _ := planPeers([32]byte{}, c.have, c.want); got != c.plan {
			t.Errorf("%s:\ngot\n%swant\n%s", c.name, got, c.plan)
		}
	}
}

func TestSetPeersRefuses(t *testing.T) {
	id := netID("x")
	n, err := New(Config{Network: id, Name: "x", Port: 1, PrivateKey: [32]byte{1}, Self: Addr(id, [32]byte{}), Dir: "/run/x"})
	must(t, err)
	member := Address{Prefix: netip.PrefixFrom(Addr(id, [32]byte{9}), 128)}
	for name, peers := range map[string][]Peer{
		"an address of another network": {{PublicKey: [32]byte{2}, Addrs: []Address{{Prefix: netip.PrefixFrom(Addr(netID("y"), [32]byte{}), 128)}}}},
		"a whole prefix":                {{PublicKey: [32]byte{2}, Addrs: []Address{{Prefix: Prefix(id)}}}},
		"the node's own address":        {{PublicKey: [32]byte{2}, Addrs: []Address{{Prefix: netip.PrefixFrom(n.cfg.Self, 128)}}}},
		"one address for two":           {{PublicKey: [32]byte{2}, Addrs: []Address{member}}, {PublicKey: [32]byte{3}, Addrs: []Address{member}}},
		"a peer twice":                  {{PublicKey: [32]byte{2}}, {PublicKey: [32]byte{2}, Endpoint: netip.MustParseAddrPort("[2001:db8::bad]:1"), Addrs: []Address{member}}},
		"this node":                     {{PublicKey: n.public}},
	} {
		honest := Peer{PublicKey: [32]byte{7}, Addrs: []Address{{Prefix: netip.PrefixFrom(Addr(id, [32]byte{7}), 128)}}}
		if err := n.SetPeers(append(peers, honest)); err == nil {
			t.Errorf("%s was accepted", name)
		}
		// It keeps nobody else out, and the first owner has what he had.
		if got := n.peers[honest.PublicKey]; !slices.Equal(got.Addrs, honest.Addrs) {
			t.Errorf("%s keeps out an honest peer: %v", name, got)
		}
		for key, p := range n.peers {
			if key == n.public || key == [32]byte{3} && len(p.Addrs) > 0 || p.Endpoint.IsValid() {
				t.Errorf("%s was accepted: %v", name, p)
			}
		}
	}
	must(t, n.SetPeers([]Peer{{PublicKey: [32]byte{2}, Addrs: []Address{member}}}))
}

// A marker that crosses the mesh is on no wire; on a plain connection the same capture shows it.
func TestThreeNodesMesh(t *testing.T) {
	const marker = "the-quick-brown-marker-jumps"
	l := newLab(t, 3)
	var ms []*member
	var paths []string
	var addrs []netip.Addr
	for i, b := range l.boxes {
		must(t, Firewall{Main: b.ns}.Apply())
		m := b.join("shop", 30001)
		p, a := m.attach([]string{"a", "b", "c"}[i])
		ms, paths, addrs = append(ms, m), append(paths, p), append(addrs, a)
	}
	mesh(t, ms...)
	for _, m := range ms {
		m.SetNames(map[string][]netip.Addr{"db": {addrs[1]}, "db.shop.internal": {addrs[1]}})
	}
	wire := sniff(t, l.router, "")
	at := netip.AddrPortFrom(addrs[1], 8080)
	listen(t, paths[1], at, marker)
	for _, i := range []int{0, 2} {
		reachable(t, paths[i], at, marker)
	}
	for _, name := range []string{"db", "DB.shop.internal"} {
		got, err := lookup(paths[0], ms[0].cfg.Self, name)
		if err != nil || !slices.Equal(got, addrs[1:2]) {
			t.Fatalf("%s is %v, %v; want %v", name, got, err, addrs[1])
		}
	}
	if got, err := lookup(paths[0], ms[0].cfg.Self, "nobody"); err == nil {
		t.Errorf("nobody is %v", got)
	}
	// The node itself reaches a workload, here and there.
	for _, m := range ms[:2] {
		c, err := m.Dial(t.Context(), at)
		must(t, err)
		buf := make([]byte, len(marker))
		_, err = io.ReadFull(c, buf)
		must(t, err)
		c.Close()
	}
	udp := func(f []byte) bool { return len(f) > 60 && f[12] == 0x86 && f[20] == 17 }
	if n := wire.count(udp); n < 10 {
		t.Errorf("the capture saw %d packets of the mesh", n)
	}
	if wire.has(marker) {
		t.Error("the marker was on the wire")
	}
	plain := netip.AddrPortFrom(l.boxes[0].v6.Prev(), 8080)
	listen(t, l.router, plain, marker)
	reachable(t, l.boxes[1].ns, plain, marker)
	if !soon(time.Second, func() bool { return wire.has(marker) }) {
		t.Error("control: the capture missed the marker on a plain connection")
	}
}

func lookup(ns string, server netip.Addr, name string) ([]netip.Addr, error) {
	r := &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (c net.Conn, err error) {
		err = within(ns, func() (err error) {
			c, err = new(net.Dialer).DialContext(ctx, network, netip.AddrPortFrom(server, 53).String())
			return err
		})
		return c, err
	}}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return r.LookupNetIP(ctx, "ip", name+".")
}

// Both ends drop what they did not ask for, and start apart.
func TestPeersConverge(t *testing.T) {
	for _, c := range []struct {
		name  string
		apart time.Duration
	}{{"at once", 0}, {"700 ms apart", 700 * time.Millisecond}} {
		t.Run(c.name, func(t *testing.T) {
			l := newLab(t, 2)
			var ms []*member
			for _, b := range l.boxes {
				must(t, Firewall{Main: b.ns}.Apply())
				ms = append(ms, b.join("pair", 30002))
			}
			pa, _ := ms[0].attach("a")
			pb, b := ms[1].attach("b")
			at := netip.AddrPortFrom(b, 80)
			listen(t, pb, at, "hi")
			must(t, ms[0].SetPeers([]Peer{ms[1].as(ms[0])}))
			// What is being tested is the passing of time.
			time.Sleep(c.apart)
			start := time.Now()
			must(t, ms[1].SetPeers([]Peer{ms[0].as(ms[1])}))
			reachable(t, pa, at, "hi")
			if took := time.Since(start); took > 2*time.Second {
				t.Errorf("took %v", took)
			} else {
				t.Log("first answer after", took)
			}
			// One side starts anew, the other does not know.
			ms[1].stop()
			start = time.Now()
			ms[1].start()
			reachable(t, pa, at, "hi")
			if took := time.Since(start); took > 2*time.Second {
				t.Errorf("after a restart took %v", took)
			} else {
				t.Log("after a restart", took)
			}
			if s := ms[0].Status(); len(s) != 1 || s[0].PublicKey != l.boxes[1].pub || s[0].Handshake.IsZero() || s[0].Received == 0 {
				t.Errorf("status %+v", s)
			}
		})
	}
}

func TestWorkloadMoves(t *testing.T) {
	l := newLab(t, 3)
	var ms []*member
	for _, b := range l.boxes {
		ms = append(ms, b.join("move", 30003))
	}
	client, _ := ms[0].attach("client")
	still, stillAddr := ms[1].attach("still")
	path, addr := ms[1].attach("mover")
	at := netip.AddrPortFrom(addr, 80)
	old := listen(t, path, at, "old")
	stillAt := netip.AddrPortFrom(stillAddr, 80)
	listen(t, still, stillAt, "still")
	mesh(t, ms...)
	reachable(t, client, at, "old")
	kept, err := greet(client, stillAt, "still", time.Second)
	must(t, err)
	defer kept.Close()
	// All of them have shaken hands, and two hands that were held out at once have been taken.
	before := ms[0].Status()
	limit := time.Now().Add(15 * time.Second)
	for since := time.Now(); time.Since(since) < time.Second; time.Sleep(100 * time.Millisecond) {
		if time.Now().After(limit) {
			t.Fatalf("no rest: %+v", before)
		}
		now := ms[0].Status()
		if slices.ContainsFunc(now, func(s PeerStatus) bool { return s.Handshake.IsZero() }) ||
			!slices.EqualFunc(now, before, func(a, b PeerStatus) bool { return a.Handshake == b.Handshake }) {
			before, since = now, time.Now()
		}
	}

	old.Close()
	must(t, ms[1].Detach(t.Context(), "mover"))
	ms[1].places = ms[1].places[:1]
	path, _ = ms[2].attach("mover")
	listen(t, path, at, "new")
	mesh(t, ms...)
	reachable(t, client, at, "new")
	echo(t, kept, "unmoved")
	for i, s := range ms[0].Status() {
		if s.Handshake != before[i].Handshake {
			t.Errorf("peer %d shook hands again", i)
		}
	}
}

func echo(t testing.TB, c net.Conn, text string) {
	t.Helper()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	_, err := io.WriteString(c, text)
	must(t, err)
	buf := make([]byte, len(text))
	_, err = io.ReadFull(c, buf)
	must(t, err)
	if string(buf) != text {
		t.Fatalf("got %q", buf)
	}
}

func TestAttachIsIdempotent(t *testing.T) {
	l := newLab(t, 1)
	m := l.boxes[0].join("idem", 30004)
	path, addr := m.attach("a")
	m.attach("b")
	// A sandbox takes the address over; attaching again must not give it back to the kernel.
	must(t, within(path, func() error {
		eth0, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return netlink.AddrDel(eth0, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(addr, 128))})
	}))
	if again, _ := m.attach("a"); again != path {
		t.Errorf("path %s, then %s", path, again)
	}
	must(t, within(path, func() error {
		eth0, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		if addrs, err := netlink.AddrList(eth0, netlink.FAMILY_ALL); err != nil || len(addrs) != 0 {
			return fmt.Errorf("addresses %v, %v", addrs, err)
		}
		return nil
	}))
	if _, err := m.Attach(t.Context(), Attachment{"c", addr}); err == nil {
		t.Error("an address was given twice")
	}
	if _, err := m.Attach(t.Context(), Attachment{"a", Addr(m.cfg.Network, [32]byte{1})}); err == nil {
		t.Error("a workload changed its address")
	}
	if _, err := m.Attach(t.Context(), Attachment{"../a", Addr(m.cfg.Network, [32]byte{1})}); err == nil {
		t.Error("a path was taken for an ID")
	}
	list, err := m.Attachments()
	if err != nil || len(list) != 2 || list[0] != (Attachment{"a", addr}) || list[1].ID != "b" {
		t.Errorf("attachments %v, %v", list, err)
	}
	must(t, m.Detach(t.Context(), "a"))
	must(t, m.Detach(t.Context(), "a"))
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after Detach: %v", err)
	}
	if list, err := m.Attachments(); err != nil || len(list) != 1 {
		t.Errorf("attachments %v, %v", list, err)
	}
}

func TestRunSweepsLeftovers(t *testing.T) {
	l := newLab(t, 1)
	m := l.boxes[0].join("sweep", 30005)
	keep, _ := m.attach("keep")
	m.stop()
	// A predecessor died half way through three attachments.
	half := workPath(m.cfg.Dir, m.cfg.Name, "half")
	must(t, makeNamespace(half, quiet))
	must(t, os.WriteFile(workPath(m.cfg.Dir, m.cfg.Name, "quarter"), nil, 0o600))
	must(t, within(m.tunNS(), func() error {
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "w123456789abc"}, PeerName: "stray"})
	}))
	m.start()
	var err error
	if !soon(10*time.Second, func() bool {
		entries, _ := os.ReadDir(l.boxes[0].nets + "/sweep")
		if len(entries) != 2 || !isNamespace(keep) {
			err = fmt.Errorf("files %v", entries)
			return false
		}
		err = within(m.tunNS(), func() error {
			links, err := netlink.LinkList()
			for _, l := range links {
				if n := l.Attrs().Name; n == "stray" || n == "w123456789abc" {
					err = errors.Join(err, fmt.Errorf("link %s", n))
				}
			}
			return err
		})
		return err == nil
	}) {
		t.Error("leftovers stayed: ", err)
	}
}

// TestAgent is the process that TestAgentDies kills.
func TestAgent(t *testing.T) {
	main, nets := os.Getenv("HF_OVERLAY_MAIN"), os.Getenv("HF_OVERLAY_NETS")
	if main == "" {
		t.Skip("runs only as a child of TestAgentDies")
	}
	l := &lab{t: t}
	one := &box{lab: l, ns: main, nets: nets}
	one.derive(1)
	two := &box{lab: l}
	two.derive(2)
	m := one.join("die", 30006)
	m.attach("a")
	other := &member{Network: &Network{cfg: Config{Self: Addr(netID("die"), two.id), Port: 30006}}, box: two, places: []netip.Addr{attachAddr("die", "b")}}
	must(t, m.SetPeers([]Peer{other.as(m)}))
	fmt.Println("running")
	<-m.stopped
}

func TestAgentDies(t *testing.T) {
	l := newLab(t, 2)
	for _, b := range l.boxes {
		must(t, Firewall{Main: b.ns}.Apply())
	}
	two := l.boxes[1].join("die", 30006)
	pb, b := two.attach("b")
	one := &member{Network: &Network{cfg: Config{Self: Addr(netID("die"), l.boxes[0].id), Port: 30006}}, box: l.boxes[0], places: []netip.Addr{attachAddr("die", "a")}}
	must(t, two.SetPeers([]Peer{one.as(two)}))
	at := netip.AddrPortFrom(b, 80)
	listen(t, pb, at, "hi")

	agent := func() *exec.Cmd {
		exe, err := os.Executable()
		must(t, err)
		c := exec.Command(exe, "-test.run=^TestAgent$", "-test.timeout=60s")
		c.Env = append(os.Environ(), "HF_OVERLAY_MAIN="+l.boxes[0].ns, "HF_OVERLAY_NETS="+l.boxes[0].nets)
		out, err := c.StdoutPipe()
		must(t, err)
		c.Stderr = os.Stderr
		must(t, c.Start())
		t.Cleanup(func() {
			c.Process.Kill()
			c.Wait()
		})
		for seen := ""; !strings.Contains(seen, "running\n"); {
			buf := make([]byte, 1024)
			n, err := out.Read(buf)
			seen += string(buf[:n])
			if err != nil {
				t.Fatalf("agent: %v\n%s", err, seen)
			}
		}
		return c
	}
	first := agent()
	path := workPath(l.boxes[0].nets, "die", "a")
	c, err := greet(path, at, "hi", 5*time.Second)
	must(t, err)
	defer c.Close()
	echo(t, c, "before")
	inode := func() string {
		var out string
		must(t, within(path, func() (err error) {
			out, err = os.Readlink("/proc/thread-self/ns/net")
			return err
		}))
		return out
	}
	ns := inode()
	must(t, first.Process.Kill())
	first.Wait()
	if _, err := greet(path, at, "hi", 100*time.Millisecond); err == nil {
		t.Error("control: the tunnel outlived its agent")
	}
	agent()
	start := time.Now()
	echo(t, c, "after")
	t.Log("the old connection answered", time.Since(start), "after the new agent started")
	if inode() != ns {
		t.Error("the workload's namespace was replaced")
	}
}

func TestRunLeavesNothing(t *testing.T) {
	l := newLab(t, 2)
	before := runtime.NumGoroutine()
	var ms []*member
	for _, b := range l.boxes {
		ms = append(ms, b.join("leak", 30007))
	}
	pa, _ := ms[0].attach("a")
	ms[1].attach("b")
	mesh(t, ms...)
	if _, err := lookup(pa, ms[0].cfg.Self, "nobody"); err == nil {
		t.Error("nobody was found")
	}
	fw, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- Firewall{Main: l.boxes[0].ns}.Run(fw) }()
	for _, m := range ms {
		m.stop()
	}
	cancel()
	must(t, <-done)
	if !soon(5*time.Second, func() bool { return runtime.NumGoroutine() <= before }) {
		buf := make([]byte, 1<<20)
		t.Errorf("%d goroutines, %d before\n%s", runtime.NumGoroutine(), before, buf[:runtime.Stack(buf, true)])
	}
	// No thread was left in a foreign namespace.
	own, err := os.Readlink("/proc/self/ns/net")
	must(t, err)
	tasks, err := os.ReadDir("/proc/self/task")
	must(t, err)
	for _, task := range tasks {
		if ns, err := os.Readlink("/proc/self/task/" + task.Name() + "/ns/net"); err == nil && ns != own {
			t.Errorf("thread %s is in %s", task.Name(), ns)
		}
	}
	for _, b := range l.boxes {
		must(t, Destroy(t.Context(), b.nets, "leak"))
		if names, err := List(b.nets); err != nil || len(names) != 0 {
			t.Errorf("after Destroy: %v, %v", names, err)
		}
	}
}

func TestPlanGreetings(t *testing.T) {
	low, high := Peer{PublicKey: [32]byte{1}}, Peer{PublicKey: [32]byte{9}}
	self := [32]byte{5}
	have := map[[32]byte]Peer{low.PublicKey: low, high.PublicKey: high}
	at := time.Unix(1000, 0)
	for _, c := range []struct {
		name    string
		list    []greeting
		current map[[32]byte]Peer
		met     bool
		plan    []string
		rest    int
	}{
		{"nothing is due", []greeting{{low, at.Add(1), 0}, {high, at.Add(1), headStart}}, have, false, nil, 2},
		{"the peer did not begin", []greeting{{low, at, 0}}, have, false, []string{"update_only=true", "persistent_keepalive_interval=20"}, 0},
		{"the peer did begin", []greeting{{low, at, 0}}, have, true, []string{"persistent_keepalive_interval=20"}, 0},
		{"no answer yet", []greeting{{high, at, 2 * headStart}}, have, false, []string{"remove=true", "persistent_keepalive_interval=20"}, 1},
		{"no answer for long", []greeting{{high, at, 8 * headStart}}, have, false, []string{"remove=true", "persistent_keepalive_interval=20"}, 0},
		{"an answer", []greeting{{high, at.Add(time.Hour), 2 * headStart}}, have, true, nil, 0},
		{"the peer is gone", []greeting{{low, at, 0}, {high, at, headStart}}, nil, false, nil, 0},
	} {
		plan, rest := planGreetings(self, c.list, c.current, func([32]byte) bool { return c.met }, at)
		if len(rest) != c.rest || (plan == "") != (c.plan == nil) {
			t.Errorf("%s: plan %q, rest %d", c.name, plan, len(rest))
		}
		for _, want := range c.plan {
			if !strings.Contains(plan, want) {
				t.Errorf("%s: plan %q", c.name, plan)
			}
		}
	}
}
