package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"holdfast/api"
	"holdfast/api/apitest"
	"holdfast/identity"
	"holdfast/ledger"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// console is what a machine has written.
type console struct {
	mu   sync.Mutex
	text strings.Builder
}

func (c *console) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.text.Write(b)
}

func (c *console) count(s string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return strings.Count(c.text.String(), s)
}

// newcomer is a machine with a farm to ask.
type newcomer struct {
	*apitest.Grid
	client  *api.Client
	console console
	cfg     JoinConfig
	eps     atomic.Value // []string
}

func newNewcomer(t *testing.T, dial func(context.Context, *ledger.Validator) (net.Conn, error)) *newcomer {
	t.Helper()
	x := &newcomer{Grid: apitest.Start(t, nil)}
	x.client = x.Client(nil)
	farm, err := x.client.Act(x.Context(), ledger.KindFarmAdmit, ledger.Actor{ID: x.Genesis.GridAccount()}, &ledger.FarmAdmit{Name: "farm-1", Owner: x.Genesis.GridAccount()}, x.Admin.DeviceKey())
	if err != nil {
		t.Fatal(err)
	}
	keys, err := DeriveKeys([identity.SeedSize]byte{42})
	if err != nil {
		t.Fatal(err)
	}
	x.eps.Store([]string{"2001:db8::1", "203.0.113.1"})
	x.cfg = JoinConfig{
		Client: x.Client(func(c *api.ClientConfig) { c.Dial = dial }), Keys: keys, Farm: identity.FarmID(farm.ID()), Name: "new",
		Log: slog.New(slog.NewTextHandler(&x.console, nil)), Every: 100 * time.Millisecond,
		Endpoints: func() ([]string, error) { return x.eps.Load().([]string), nil },
	}
	return x
}

// start joins in the background.
func (x *newcomer) start() (joined <-chan error, stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Join(ctx, x.cfg) }()
	x.T.Cleanup(cancel)
	return done, cancel
}

// asks waits until the machine is on the board.
func (x *newcomer) asks(good func(*ledger.NodeAdmit) bool) *ledger.NodeAdmit {
	x.T.Helper()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		all, err := x.client.Pending(x.T.Context())
		if err == nil && len(all) == 1 && good(all[0]) {
			return all[0]
		}
		if time.Now().After(end) {
			x.T.Fatalf("it does not ask: %v %v", all, err)
		}
	}
}

func (x *newcomer) admit(a *ledger.NodeAdmit) error {
	_, err := x.client.Act(x.Context(), ledger.KindNodeAdmit, ledger.Actor{ID: x.Genesis.GridAccount()}, a, x.Admin.DeviceKey())
	return err
}

func (x *newcomer) record() *ledger.Node {
	x.T.Helper()
	rec, err := api.Get[ledger.Node](x.Context(), x.client, ledger.NodeKey(x.cfg.Keys.ID))
	if err != nil {
		x.T.Fatal(err)
	}
	return rec
}

func TestAMachineBecomesANode(t *testing.T) {
	var up atomic.Bool
	x := newNewcomer(t, func(ctx context.Context, v *ledger.Validator) (net.Conn, error) {
		if !up.Load() {
			return nil, errors.New("network is unreachable")
		}
		return new(net.Dialer).DialContext(ctx, "tcp", v.Address)
	})
	joined, _ := x.start()
	for x.console.count("network is unreachable") == 0 {
		time.Sleep(10 * time.Millisecond)
	}
	up.Store(true)
	any := func(*ledger.NodeAdmit) bool { return true }
	if a := x.asks(any); a.Name != "new" || a.Key.Node() != x.cfg.Keys.ID || a.Farm != x.cfg.Farm || a.CPUMilli != uint32(runtime.NumCPU())*1000 || a.Memory < 1<<20 {
		t.Errorf("it asks as %q with %d millicores and %d bytes", a.Name, a.CPUMilli, a.Memory)
	}
	x.eps.Store([]string{"2001:db8::2"}) // an address that came later
	a := x.asks(func(a *ledger.NodeAdmit) bool { return slices.Equal(a.Endpoints, []string{"2001:db8::2"}) })
	select {
	case err := <-joined:
		t.Fatalf("it did not wait: %v", err)
	default:
	}
	if err := x.admit(a); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if err := <-joined; err != nil {
		t.Fatal(err)
	}
	if d := time.Since(began); d > time.Second {
		t.Errorf("the approval was noticed after %v", d)
	}
	for text, n := range map[string]int{"waits to be approved": 1, x.cfg.Keys.ID.String(): 2, "short=" + x.cfg.Keys.ID.Short() + " ": 1, "network is unreachable": 1, "is a node": 1} {
		if got := x.console.count(text); got != n {
			t.Errorf("the console says %q %d times, want %d:\n%s", text, got, n, x.console.text.String())
		}
	}

	// It starts again.
	height := func() uint64 {
		n, err := x.client.Next(x.Context(), ledger.Actor{Node: true, ID: x.cfg.Keys.ID})
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	for _, s := range []struct {
		name  string
		eps   []string
		want  []string
		nonce uint64
	}{
		{"at the same address", []string{"2001:db8::2"}, []string{"2001:db8::2"}, 1},
		{"without an address", nil, []string{"2001:db8::2"}, 1},
		{"at another address", []string{"2001:db8::3"}, []string{"2001:db8::3"}, 2},
		{"and again", []string{"2001:db8::3"}, []string{"2001:db8::3"}, 2},
	} {
		x.eps.Store(s.eps)
		if err := Join(x.Context(), x.cfg); err != nil {
			t.Fatalf("%s: %v", s.name, err)
		}
		if rec := x.record(); !slices.Equal(rec.Endpoints, s.want) || height() != s.nonce || rec.Session != a.Session {
			t.Errorf("%s: endpoints %q, nonce %d", s.name, rec.Endpoints, height())
		}
	}
	if x.console.count("waits to be approved") != 1 {
		t.Error("a node asks again")
	}
	all, err := x.client.Pending(t.Context())
	if err != nil || len(all) > 0 {
		t.Errorf("a node is on the board: %v %v", all, err)
	}
}

func TestAMachineThatCannotAskSaysSoOnce(t *testing.T) {
	x := newNewcomer(t, nil)
	x.cfg.Farm, x.cfg.Name = identity.FarmID{1}, ""
	joined, stop := x.start()
	for end := time.Now().Add(20 * time.Second); x.console.count("cannot become a node yet") == 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it says nothing")
		}
	}
	time.Sleep(5 * x.cfg.Every)
	if n := x.console.count("cannot become a node yet"); n != 1 || x.console.count("not on the ledger") != 1 {
		t.Errorf("it complains %d times:\n%s", n, x.console.text.String())
	}
	if x.console.count("name="+x.cfg.Keys.ID.Short()) != 1 {
		t.Error("a machine without a name is not named by its ID")
	}
	stop()
	if err := <-joined; !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

// Who may admit nodes, or reads along, cannot admit a machine in another form than it asked for.
func TestNobodyAdmitsWhatTheMachineDidNotSign(t *testing.T) {
	x := newNewcomer(t, nil)
	joined, stop := x.start()
	a := x.asks(func(*ledger.NodeAdmit) bool { return true })
	a.Name = "other"
	if err := x.admit(a); !errors.Is(err, api.ErrRefused) {
		t.Errorf("the ledger takes what the machine did not sign: %v", err)
	}
	select {
	case err := <-joined:
		t.Fatalf("it joined: %v", err)
	case <-time.After(time.Second):
	}
	stop()
	<-joined
}

func TestEndpointsAreThoseThatLeadOut(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	type link struct {
		addrs  []string
		routes []string // gateways of default routes
	}
	for _, x := range []struct {
		name  string
		links []link
		want  []string
	}{
		{"no network", nil, nil},
		{"no way out", []link{{[]string{"2001:db8:1::5/64", "203.0.113.5/28"}, nil}}, nil},
		{"IPv6 first", []link{{[]string{"203.0.113.5/28", "2001:db8:1::5/64"}, []string{"203.0.113.1", "2001:db8:1::1"}}}, []string{"2001:db8:1::5", "203.0.113.5"}},
		{"each family has its own way out", []link{{[]string{"203.0.113.5/28", "2001:db8:1::5/64"}, []string{"203.0.113.1"}}}, []string{"203.0.113.5"}},
		{"private addresses last", []link{{[]string{"10.0.0.5/24", "fd00:1::5/64"}, []string{"10.0.0.1", "fd00:1::1"}}, {[]string{"198.51.100.5/24"}, []string{"198.51.100.1"}}}, []string{"198.51.100.5", "fd00:1::5", "10.0.0.5"}},
		{"a second interface", []link{{[]string{"2001:db8:1::5/64"}, []string{"2001:db8:1::1"}}, {[]string{"2001:db8:2::5/64"}, nil}}, []string{"2001:db8:1::5"}},
		{"many", []link{{[]string{"2001:db8:1::1/64", "2001:db8:1::2/64", "2001:db8:1::3/64", "2001:db8:1::4/64", "2001:db8:1::5/64", "2001:db8:1::6/64", "2001:db8:1::7/64", "2001:db8:1::8/64", "2001:db8:1::9/64"}, []string{"2001:db8:1::ff"}}}, nil},
	} {
		var got []string
		err := elsewhere(func() error {
			for i, l := range x.links {
				d := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: fmt.Sprint("d", i)}, PeerName: fmt.Sprint("peer", i)}
				if err := netlink.LinkAdd(d); err != nil {
					return err
				}
				peer, err := netlink.LinkByName(d.PeerName)
				if err := errors.Join(err, netlink.LinkSetUp(d), netlink.LinkSetUp(peer)); err != nil {
					return err
				}
				for _, a := range l.addrs {
					addr, err := netlink.ParseAddr(a)
					if err != nil {
						return err
					}
					addr.Flags = unix.IFA_F_NODAD
					if err := netlink.AddrAdd(d, addr); err != nil {
						return fmt.Errorf("%s: %w", a, err)
					}
				}
				for _, gw := range l.routes {
					if err := netlink.RouteAdd(&netlink.Route{LinkIndex: d.Index, Gw: net.ParseIP(gw), Priority: 100 + i}); err != nil {
						return fmt.Errorf("%s: %w", gw, err)
					}
				}
			}
			var err error
			got, err = endpoints()
			return err
		})
		if x.name == "many" && len(got) == maxEndpoints {
			got = nil
		}
		if err != nil || !slices.Equal(got, x.want) {
			t.Errorf("%s: %q %v, want %q", x.name, got, err, x.want)
		}
	}
}

// elsewhere runs f in a network of its own, on a thread that ends with it.
func elsewhere(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			done <- err
			return
		}
		done <- f()
	}()
	return <-done
}
