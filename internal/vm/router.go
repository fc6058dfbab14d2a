package vm

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"holdfast/internal/box"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/server4"
	"github.com/mdlayher/ndp"
	"golang.org/x/sync/errgroup"
)

// router gives one machine what the router of its farm would: an IPv4 address by DHCP (RFC 2131), and router advertisements
// (RFC 4861), from which it makes its IPv6 address. To other machines on the segment it says nothing that they listen to.
type router struct {
	dhcp   *server4.Server
	conn   *ndp.Conn
	advert *ndp.RouterAdvertisement
}

// lease is how long an address is the machine's; it asks again after half of it.
const lease = 10 * time.Minute

func newRouter(top *box.Topology, u box.Uplink) (*router, error) {
	r := &router{}
	bridge := top.Bridge(u.Segment)
	err := box.Within(top.Router.NetNS(), func() error {
		iface, err := net.InterfaceByName(bridge)
		if err != nil {
			return err
		}
		if r.dhcp, err = server4.NewServer(bridge, &net.UDPAddr{IP: net.IPv4zero, Port: 67}, answer(top, u), server4.WithLogger(server4.EmptyLogger{})); err != nil {
			return fmt.Errorf("dhcp: %w", err)
		}
		if r.conn, _, err = ndp.Listen(iface, ndp.LinkLocal); err != nil {
			return fmt.Errorf("router advertisements: %w", err)
		}
		if err := r.conn.JoinGroup(netip.MustParseAddr("ff02::2")); err != nil {
			return fmt.Errorf("router advertisements: %w", err)
		}
		prefix := top.Addresses(u)[0].Masked()
		r.advert = &ndp.RouterAdvertisement{
			CurrentHopLimit: 64, RouterLifetime: 30 * time.Minute,
			Options: []ndp.Option{
				&ndp.PrefixInformation{PrefixLength: uint8(prefix.Bits()), OnLink: true, AutonomousAddressConfiguration: true, ValidLifetime: time.Hour, PreferredLifetime: time.Hour, Prefix: prefix.Addr()},
				&ndp.LinkLayerAddress{Direction: ndp.Source, Addr: iface.HardwareAddr},
			},
		}
		return nil
	})
	if err != nil {
		r.close()
		return nil, fmt.Errorf("router of segment %d: %w", u.Segment, err)
	}
	return r, nil
}

func (r *router) close() {
	if r.dhcp != nil {
		r.dhcp.Close()
	}
	if r.conn != nil {
		r.conn.Close()
	}
}

// run answers until ctx ends.
func (r *router) run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, r.close)
	defer stop()
	var g errgroup.Group
	g.Go(r.dhcp.Serve)
	g.Go(func() error { // solicitations
		for {
			m, _, _, err := r.conn.ReadFrom()
			if errors.Is(err, net.ErrClosed) || ctx.Err() != nil {
				return nil
			} else if err != nil {
				continue // not one that can be read
			}
			if _, ok := m.(*ndp.RouterSolicitation); ok {
				r.advertise()
			}
		}
	})
	g.Go(func() error {
		t := time.NewTicker(10 * time.Second)
		defer t.Stop()
		for {
			r.advertise()
			select {
			case <-ctx.Done():
				return nil
			case <-t.C:
			}
		}
	})
	err := g.Wait()
	if ctx.Err() != nil {
		return nil
	}
	return err
}

func (r *router) advertise() {
	r.conn.WriteTo(r.advert, nil, netip.MustParseAddr("ff02::1")) // lost is lost: it comes again
}

// answer is the DHCP server's: one machine, one address.
func answer(top *box.Topology, u box.Uplink) server4.Handler {
	prefix, gw, mac := top.Addresses(u)[1], top.Gateways(u.Segment)[1], top.MAC(u).String()
	return func(conn net.PacketConn, peer net.Addr, m *dhcpv4.DHCPv4) {
		if m.ClientHWAddr.String() != mac {
			return
		}
		kind := dhcpv4.MessageTypeOffer
		if m.MessageType() == dhcpv4.MessageTypeRequest {
			kind = dhcpv4.MessageTypeAck
		} else if m.MessageType() != dhcpv4.MessageTypeDiscover {
			return
		}
		reply, err := dhcpv4.NewReplyFromRequest(m,
			dhcpv4.WithMessageType(kind), dhcpv4.WithYourIP(prefix.Addr().AsSlice()), dhcpv4.WithServerIP(gw.AsSlice()),
			dhcpv4.WithOption(dhcpv4.OptServerIdentifier(gw.AsSlice())), dhcpv4.WithNetmask(net.CIDRMask(prefix.Bits(), 32)),
			dhcpv4.WithRouter(gw.AsSlice()), dhcpv4.WithLeaseTime(uint32(lease/time.Second)),
		)
		if err != nil {
			return
		}
		conn.WriteTo(reply.ToBytes(), &net.UDPAddr{IP: net.IPv4bcast, Port: 68})
	}
}
