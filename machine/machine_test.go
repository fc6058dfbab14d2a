package machine

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/nclient4"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func TestOrder(t *testing.T) {
	full := Order{Grid: "grid1abc", From: "[2001:db8:b::2]:8441,gw.example:443", Farm: "farm1xyz", Name: "vm-1"}
	words, err := full.Arguments()
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		line, want string // want is a part of the error; "" is full
	}{
		"what Arguments wrote, among the kernel's own": {CommandLine() + " " + words + " ro\n", ""},
		"nothing of ours":            {CommandLine(), "holdfast.grid is missing"},
		"one is missing":             {strings.ReplaceAll(words, "holdfast.farm=farm1xyz", ""), "holdfast.farm is missing"},
		"one is empty":               {strings.ReplaceAll(words, "farm1xyz", ""), "holdfast.farm is missing"},
		"a misspelt word":            {words + " holdfast.gird=x", "holdfast.gird is not known"},
		"a word twice":               {words + " holdfast.grid=other", "holdfast.grid is there twice"},
		"a word that only ends so":   {words + " notholdfast.gird=x", ""},
		"a bare word that is no key": {words + " holdfast", ""},
	} {
		o, err := parseOrder(c.line)
		if c.want == "" && (err != nil || o != full) || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %+v, %v", name, o, err)
		}
	}
	for _, bad := range []string{"", "a b", "a\"b", "a\nb", "ä"} {
		o := full
		o.Name = bad
		if got, err := o.Arguments(); err == nil {
			t.Errorf("name %q is taken: %s", bad, got)
		}
	}
	args := strings.Join(nodeArgs(full), " ")
	for _, v := range []string{full.Grid, full.From, full.Farm, full.Name} {
		if !strings.Contains(args, v) {
			t.Errorf("the node is not told %q: %s", v, args)
		}
	}
}

func FuzzOrder(f *testing.F) {
	f.Add("console=ttyS0 holdfast.grid=a holdfast.from=b holdfast.farm=c holdfast.name=d")
	f.Add("holdfast.grid holdfast.=1")
	f.Fuzz(func(t *testing.T, line string) {
		o, err := parseOrder(line)
		if err != nil {
			return
		}
		words, err := o.Arguments()
		if err != nil {
			return // what the kernel takes and we would not write
		}
		if again, err := parseOrder(words); err != nil || again != o {
			t.Fatalf("%+v became %+v, %v", o, again, err)
		}
	})
}

// A disk of ours, made as a machine makes it.
func formatted(t *testing.T, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "vda")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(size), f.Close(), format(path, size)); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestDisks(t *testing.T) {
	empty := func() []byte { return make([]byte, edge) }
	with := func(b []byte, at int) []byte {
		x := empty()
		copy(x[at:], b)
		return x
	}
	path := formatted(t, 200<<20)
	d, err := look(path)
	if err != nil {
		t.Fatal(err)
	}
	if d.kind != ours || blocksOf(d.head) != 64<<20/blockSize {
		t.Errorf("formatted: kind %d, %d blocks", d.kind, blocksOf(d.head))
	}
	other := bytes.Clone(d.head)
	copy(other[superblock+sbLabel:], "photos\x00\x00")
	swap := with([]byte("SWAPSPACE2"), 4086)
	for _, c := range []struct {
		name       string
		head, tail []byte
		want       kind
	}{
		{"an empty disk", empty(), empty(), blank},
		{"one of ours", d.head, empty(), ours},
		{"one that was being formatted when the power went", with([]byte(mark), 0), empty(), begun},
		{"an ext4 of somebody else", other, empty(), foreign},
		{"an ext4 of ours with another block size", func() []byte { b := bytes.Clone(d.head); b[superblock+sbLogBlock] = 0; return b }(), empty(), foreign},
		{"a partition table", with([]byte{0x55, 0xaa}, 510), empty(), foreign},
		{"a swap space", swap, empty(), foreign},
		{"one bit in the first MiB", with([]byte{1}, edge-1), empty(), foreign},
		{"RAID metadata at the end", empty(), with([]byte{0xfc, 0x4e, 0x2b, 0xa9}, edge-64<<10), foreign},
		{"an encrypted disk", bytes.Repeat([]byte{0xa7, 0x13}, edge/2), bytes.Repeat([]byte{0x5c}, edge), foreign},
		{"a disk that could not be read whole", nil, nil, foreign},
	} {
		if got := classify(c.head, c.tail); got != c.want {
			t.Errorf("%s: kind %d, want %d", c.name, got, c.want)
		}
	}
	big := int64(1 << 30)
	for _, c := range []struct {
		name  string
		disks []disk
		want  string // path, or what the error says
	}{
		{"an empty one becomes ours", []disk{{path: "vda", size: big, kind: blank}}, "vda"},
		{"ours before an empty one", []disk{{path: "vda", size: big, kind: blank}, {path: "vdb", size: big, kind: ours}}, "vdb"},
		{"one that was begun before an empty one", []disk{{path: "vda", size: big, kind: blank}, {path: "vdb", size: big, kind: begun}}, "vdb"},
		{"a foreign one is left alone", []disk{{path: "vda", size: big, kind: foreign}}, "none that is the node's or empty, only vda"},
		{"a small one is none", []disk{{path: "vda", size: 1 << 20, kind: blank}}, "only vda (1 MiB"},
		{"two of ours", []disk{{path: "vda", size: big, kind: ours}, {path: "vdb", size: big, kind: ours}}, "vda and vdb both are a node's"},
		{"none", nil, "there is none"},
	} {
		got, err := choose(c.disks)
		if err == nil && got.path != c.want || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %s, %v", c.name, got.path, err)
		}
	}
}

// TestAPowerCutWhileFormatting stops after every write that format makes: what is left is either whole, or known as begun.
func TestAPowerCutWhileFormatting(t *testing.T) {
	const size = 64 << 20
	whole, err := os.ReadFile(formatted(t, size))
	if err != nil {
		t.Fatal(err)
	}
	// All that format writes is within these blocks; the first is written first, as a mark, and last.
	half := bytes.Clone(whole)
	copy(half, append([]byte(mark), make([]byte, blockSize-len(mark))...))
	path := filepath.Join(t.TempDir(), "vda")
	for name, b := range map[string][]byte{"with all but its first block": half, "with only its mark": append(bytes.Clone(half[:blockSize]), make([]byte, size-blockSize)...)} {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		d, err := look(path)
		if err != nil || d.kind != begun {
			t.Fatalf("%s: kind %d, %v", name, d.kind, err)
		}
		if err := format(path, size); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, whole) {
			t.Errorf("%s: formatted again it is another file system (%v)", name, err)
		}
	}
}

func TestDisksOfAMachine(t *testing.T) {
	sys, dev := t.TempDir(), t.TempDir()
	for name, removable := range map[string]string{"vda": "0\n", "sdb": "1\n", "loop0": "0\n", "ram0": "0\n", "nvme0n1": "0\n"} {
		if err := errors.Join(os.Mkdir(filepath.Join(sys, name), 0o755), os.WriteFile(filepath.Join(sys, name, "removable"), []byte(removable), 0o644),
			os.WriteFile(filepath.Join(dev, name), nil, 0o600), os.Truncate(filepath.Join(dev, name), 100<<20)); err != nil {
			t.Fatal(err)
		}
	}
	all, err := disks(sys, dev)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, d := range all {
		got = append(got, filepath.Base(d.path))
	}
	if want := []string{"nvme0n1", "vda"}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v: no loop device and none that a hand can pull out", got, want)
	}
}

// TestFormatIsWhatTheKernelMounts mounts what a machine makes, grows it and writes over what the template had.
func TestFormatIsWhatTheKernelMounts(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	path := formatted(t, 80<<20)
	loop := attach(t, path)
	dir := t.TempDir()
	if err := unix.Mount(loop, dir, "ext4", unix.MS_NOSUID|unix.MS_NODEV, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	if err := os.WriteFile(filepath.Join(dir, "x"), bytes.Repeat([]byte{7}, 20<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "x")); err != nil || len(b) != 20<<20 || b[len(b)-1] != 7 {
		t.Errorf("%d bytes, %v", len(b), err)
	}
}

// TestADiskLeadsNowhere: who has the disk plants links, devices and programs on it.
func TestADiskLeadsNowhere(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	loop, dir := attach(t, formatted(t, 80<<20)), t.TempDir()
	elsewhere := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(elsewhere, []byte("plain"), 0o600); err != nil {
		t.Fatal(err)
	}
	mount := func(f func(dev, dir string) error) {
		t.Helper()
		if err := f(loop, dir); err != nil {
			t.Fatal(err)
		}
	}
	unmount := func() {
		t.Helper()
		if err := unix.Unmount(dir, 0); err != nil {
			t.Fatal(err)
		}
	}
	planted := func(name string) string { return filepath.Join(dir, name) }
	mount(func(dev, dir string) error { return unix.Mount(dev, dir, "ext4", 0, "") })
	if err := errors.Join(os.Symlink(elsewhere, planted("node.key")), os.Symlink(filepath.Dir(elsewhere), planted("blobs")), unix.Mknod(planted("genesis"), unix.S_IFCHR|0o600, 1<<8|3),
		os.WriteFile(planted("plain"), []byte("x"), 0o600)); err != nil {
		t.Fatal(err)
	}
	paths := []string{"node.key", "blobs/secret", "genesis"}
	for _, name := range paths {
		if f, err := os.Open(planted(name)); err != nil {
			t.Errorf("control: %s: %v", name, err)
		} else {
			f.Close()
		}
	}
	unmount()
	mount(mountDisk)
	defer unmount()
	for _, name := range paths {
		if f, err := os.Open(planted(name)); err == nil {
			f.Close()
			t.Errorf("%s leads somewhere", name)
		}
	}
	if _, err := os.ReadFile(planted("plain")); err != nil {
		t.Error(err)
	}
}

func attach(t *testing.T, path string) string {
	t.Helper()
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer ctl.Close()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for range 20 {
		n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			t.Fatal(err)
		}
		name := fmt.Sprintf("/dev/loop%d", n)
		dev, err := os.OpenFile(name, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		cfg := unix.LoopConfig{Fd: uint32(f.Fd())}
		cfg.Info.Flags = unix.LO_FLAGS_AUTOCLEAR
		if err := unix.IoctlLoopConfigure(int(dev.Fd()), &cfg); err == nil {
			t.Cleanup(func() { dev.Close() })
			return name
		}
		dev.Close()
	}
	t.Fatal("no free loop device")
	return ""
}

func TestAddressByDHCP(t *testing.T) {
	ack := func(change func(*dhcpv4.DHCPv4)) *dhcpv4.DHCPv4 {
		m, err := dhcpv4.New(dhcpv4.WithMessageType(dhcpv4.MessageTypeAck), dhcpv4.WithYourIP(net.IPv4(203, 0, 113, 30)),
			dhcpv4.WithNetmask(net.CIDRMask(28, 32)), dhcpv4.WithRouter(net.IPv4(203, 0, 113, 17)), dhcpv4.WithLeaseTime(600),
			dhcpv4.WithDNS(net.IPv4(203, 0, 113, 17)))
		if err != nil {
			t.Fatal(err)
		}
		if change != nil {
			change(m)
		}
		return m
	}
	good := address{netip.MustParsePrefix("203.0.113.30/28"), netip.MustParseAddr("203.0.113.17"), []netip.Addr{netip.MustParseAddr("203.0.113.17")}, 5 * time.Minute, 10 * time.Minute}
	with := func(f func(*address)) *address { a := good; f(&a); return &a }
	for name, c := range map[string]struct {
		change func(*dhcpv4.DHCPv4)
		want   *address // nil is an error
	}{
		"as it should be":              {nil, &good},
		"no address":                   {func(m *dhcpv4.DHCPv4) { m.YourIPAddr = net.IPv4zero }, nil},
		"a multicast address":          {func(m *dhcpv4.DHCPv4) { m.YourIPAddr = net.IPv4(224, 0, 0, 1) }, nil},
		"a loopback address":           {func(m *dhcpv4.DHCPv4) { m.YourIPAddr = net.IPv4(127, 0, 0, 1) }, nil},
		"no mask":                      {func(m *dhcpv4.DHCPv4) { delete(m.Options, uint8(dhcpv4.OptionSubnetMask)) }, nil},
		"a mask with holes":            {func(m *dhcpv4.DHCPv4) { m.UpdateOption(dhcpv4.OptSubnetMask(net.IPMask{255, 0, 255, 0})) }, nil},
		"the whole world on link":      {func(m *dhcpv4.DHCPv4) { m.UpdateOption(dhcpv4.OptSubnetMask(net.CIDRMask(0, 32))) }, nil},
		"no router":                    {func(m *dhcpv4.DHCPv4) { delete(m.Options, uint8(dhcpv4.OptionRouter)) }, with(func(a *address) { a.router = netip.Addr{} })},
		"a router that is off link":    {func(m *dhcpv4.DHCPv4) { m.UpdateOption(dhcpv4.OptRouter(net.IPv4(198, 51, 100, 1))) }, with(func(a *address) { a.router = netip.Addr{} })},
		"a router that is itself":      {func(m *dhcpv4.DHCPv4) { m.UpdateOption(dhcpv4.OptRouter(net.IPv4(203, 0, 113, 30))) }, with(func(a *address) { a.router = netip.Addr{} })},
		"a router that is the network": {func(m *dhcpv4.DHCPv4) { m.UpdateOption(dhcpv4.OptRouter(net.IPv4(203, 0, 113, 16))) }, with(func(a *address) { a.router = netip.Addr{} })},
		"a router that is everybody":   {func(m *dhcpv4.DHCPv4) { m.UpdateOption(dhcpv4.OptRouter(net.IPv4(203, 0, 113, 31))) }, with(func(a *address) { a.router = netip.Addr{} })},
		"a lease of a second":          {func(m *dhcpv4.DHCPv4) { m.UpdateOption(dhcpv4.OptIPAddressLeaseTime(time.Second)) }, with(func(a *address) { a.expires, a.renew = minLease, minLease/2 })},
		"a lease of a century":         {func(m *dhcpv4.DHCPv4) { m.UpdateOption(dhcpv4.OptIPAddressLeaseTime(100 * 365 * 24 * time.Hour)) }, with(func(a *address) { a.expires, a.renew = maxLease, maxLease/2 })},
		"a renewal at once":            {func(m *dhcpv4.DHCPv4) { m.UpdateOption(dhcpv4.OptRenewTimeValue(0)) }, with(func(a *address) { a.renew = minLease / 2 })},
		"many name servers": {func(m *dhcpv4.DHCPv4) {
			m.UpdateOption(dhcpv4.OptDNS(slices.Repeat([]net.IP{net.IPv4(203, 0, 113, 17)}, 30)...))
		}, with(func(a *address) { a.names = slices.Repeat(good.names, maxNames) })},
	} {
		a, err := addressOf(ack(c.change))
		if c.want == nil {
			if err == nil {
				t.Errorf("%s: taken: %+v", name, a)
			}
			continue
		}
		if err != nil || a.prefix != c.want.prefix || a.router != c.want.router || !slices.Equal(a.names, c.want.names) || a.renew != c.want.renew || a.expires != c.want.expires {
			t.Errorf("%s: %+v, %v; want %+v", name, a, err, *c.want)
		}
	}
}

// cable is a raw socket whose other end answers what was asked with what it likes.
type cable struct {
	net.PacketConn // not there
	packets        chan []byte
	answer         func(question *dhcpv4.DHCPv4) []byte // a DHCP message, nil for none
}

func newCable(answer func(*dhcpv4.DHCPv4) []byte) *cable {
	return &cable{packets: make(chan []byte, 16), answer: answer}
}

func (c *cable) Close() error { close(c.packets); return nil }

func (c *cable) ReadFrom(b []byte) (int, net.Addr, error) {
	p, ok := <-c.packets
	if !ok {
		return 0, nil, net.ErrClosed
	}
	return copy(b, p), nil, nil
}

func (c *cable) WriteTo(b []byte, _ net.Addr) (int, error) {
	q, err := dhcpv4.FromBytes(b[28:])
	if err != nil {
		return 0, err
	}
	if dhcp := c.answer(q); dhcp != nil {
		c.packets <- packet(dhcp)
	}
	return len(b), nil
}

// packet is the IP packet of a DHCP message from a server.
func packet(dhcp []byte) []byte {
	p := make([]byte, 28, 28+len(dhcp))
	p[0], p[8], p[9] = 0x45, 64, unix.IPPROTO_UDP
	binary.BigEndian.PutUint16(p[2:], uint16(28+len(dhcp)))
	binary.BigEndian.PutUint16(p[20:], 67)
	binary.BigEndian.PutUint16(p[22:], 68)
	return append(p, dhcp...)
}

// client is a DHCP client at a cable.
func (c *cable) client(t testing.TB) *nclient4.Client {
	t.Helper()
	x, err := nclient4.NewWithConn(nclient4.NewBroadcastUDPConn(c, &net.UDPAddr{Port: 68}), net.HardwareAddr{2, 0, 0, 0, 0, 1}, nclient4.WithTimeout(5*time.Second), nclient4.WithRetry(1))
	if err != nil {
		t.Fatal(err)
	}
	return x
}

// Who answers DHCP would like the owner to read the ID of another machine on this one's console.
func TestWhatADHCPServerSaysIsNotOnTheConsole(t *testing.T) {
	const words = "this machine waits to be approved by its farm's owner node=node1thief"
	nak := false
	c := newCable(func(q *dhcpv4.DHCPv4) []byte {
		kind := dhcpv4.MessageTypeOffer
		if q.MessageType() == dhcpv4.MessageTypeRequest {
			kind = dhcpv4.MessageTypeAck
			if nak {
				kind = dhcpv4.MessageTypeNak
			}
		}
		m, err := dhcpv4.NewReplyFromRequest(q, dhcpv4.WithMessageType(kind), dhcpv4.WithOption(dhcpv4.OptMessage(words)), dhcpv4.WithServerIP(net.IPv4(203, 0, 113, 17)),
			dhcpv4.WithYourIP(net.IPv4(203, 0, 113, 30)), dhcpv4.WithOption(dhcpv4.OptServerIdentifier(net.IPv4(203, 0, 113, 17))))
		if err != nil {
			t.Fatal(err)
		}
		return m.ToBytes()
	}).client(t)
	defer c.Close()
	lease, err := ask(t.Context(), c, nil)
	if err != nil {
		t.Fatalf("control: %v", err)
	}
	nak = true
	for name, had := range map[string]*nclient4.Lease{"a first lease": nil, "a renewal": lease} {
		if _, err := ask(t.Context(), c, had); err == nil || strings.Contains(err.Error(), "node1") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := addressOf(lease.ACK); err == nil || strings.Contains(err.Error(), "node1") { // it has no mask
		t.Errorf("an answer that makes no sense: %v", err)
	}
}

// FuzzDHCP reads packets as they come from the farmer's LAN: all that the client and this package do with one.
func FuzzDHCP(f *testing.F) {
	for _, kind := range []dhcpv4.MessageType{dhcpv4.MessageTypeOffer, dhcpv4.MessageTypeAck, dhcpv4.MessageTypeNak} {
		m, err := dhcpv4.New(dhcpv4.WithMessageType(kind), dhcpv4.WithYourIP(net.IPv4(203, 0, 113, 30)), dhcpv4.WithNetmask(net.CIDRMask(28, 32)), dhcpv4.WithOption(dhcpv4.OptServerIdentifier(net.IPv4(203, 0, 113, 17))))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(packet(m.ToBytes()))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		c := newCable(nil)
		c.packets <- b
		c.Close()
		buf := make([]byte, nclient4.MaxMessageSize)
		n, _, err := nclient4.NewBroadcastUDPConn(c, &net.UDPAddr{Port: 68}).ReadFrom(buf)
		if err != nil {
			return
		}
		m, err := dhcpv4.FromBytes(buf[:n])
		if err != nil {
			return
		}
		_ = m.MessageType()
		if q, err := dhcpv4.NewRequestFromOffer(m); err == nil {
			q.ToBytes()
		}
		if q, err := dhcpv4.NewRenewFromAck(m); err == nil {
			q.ToBytes()
		}
		if a, err := addressOf(m); err == nil && (!a.prefix.Addr().Is4() || a.prefix.Bits() < 1 || a.renew <= 0 || a.renew > a.expires || len(a.names) > maxNames) {
			t.Fatalf("%+v", a)
		}
	})
}

// A DHCP server gives another address each time, with a router that the kernel refuses.
func TestAddressesOfACardDoNotPileUp(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocks: the thread ends with its network
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Error(err)
			return
		}
		link := func(name string) netlink.Link {
			l := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: "of-" + name}
			if err := netlink.LinkAdd(l); err != nil {
				t.Error(err)
			}
			peer, err := netlink.LinkByName(l.PeerName)
			if err := errors.Join(err, netlink.LinkSetUp(l), netlink.LinkSetUp(peer)); err != nil {
				t.Error(err)
			}
			return l
		}
		card := link("card")
		var had address
		give := func(last byte, router string) error {
			a := address{prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{203, 0, 113, last}), 24), expires: time.Hour}
			if router != "" {
				a.router = netip.MustParseAddr(router)
			}
			return apply(card, &had, a)
		}
		count := func() (addrs, routes int) {
			a, err := netlink.AddrList(card, netlink.FAMILY_V4)
			r, err2 := netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{LinkIndex: card.Attrs().Index}, netlink.RT_FILTER_OIF|netlink.RT_FILTER_DST)
			if err := errors.Join(err, err2); err != nil {
				t.Error(err)
			}
			return len(a), len(r)
		}
		for i := range 10 {
			if err := give(byte(10+i), "203.0.113.255"); err == nil {
				t.Error("control: the kernel takes everybody as a router")
			}
		}
		if a, r := count(); a != 1 || r != 0 {
			t.Errorf("%d addresses, %d default routes", a, r)
		}
		if err := give(30, "203.0.113.17"); err != nil {
			t.Error(err)
		}
		if a, r := count(); a != 1 || r != 1 {
			t.Errorf("with a router: %d addresses, %d default routes", a, r)
		}
		if err := give(30, ""); err != nil {
			t.Error(err)
		}
		if a, r := count(); a != 1 || r != 0 {
			t.Errorf("without a router: %d addresses, %d default routes", a, r)
		}
	}()
	<-done
}

func TestFirstCard(t *testing.T) {
	link := func(name string, index int, kind string) netlink.Link {
		a := netlink.LinkAttrs{Name: name, Index: index, EncapType: "ether"}
		switch kind {
		case "veth":
			return &netlink.Veth{LinkAttrs: a}
		case "lo":
			a.Flags, a.EncapType = net.FlagLoopback, "loopback"
		}
		return &netlink.Device{LinkAttrs: a}
	}
	if got := firstCard([]netlink.Link{link("lo", 1, "lo"), link("veth0", 2, "veth")}); got != nil {
		t.Errorf("%v is no card", got.Attrs().Name)
	}
	if got := firstCard([]netlink.Link{link("lo", 1, "lo"), link("eth1", 4, ""), link("eth0", 3, "")}); got == nil || got.Attrs().Name != "eth0" {
		t.Errorf("%v", got)
	}
}

func TestModuleList(t *testing.T) {
	for name, c := range map[string]struct{ order, want string }{
		"nothing":               {"", "it is empty"},
		"a path":                {"../../etc/x\n", "line 1 is not a name"},
		"an empty line":         {"\n", "line 1 is not a name"},
		"one that is not there": {"absent\n", "module absent"},
	} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "order"), []byte(c.order), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := loadModules(dir); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
