package box

import (
	"fmt"
	"net"
	"os"

	"github.com/vishvananda/netlink"
)

// Tap puts a machine that is no box on a segment: what is read from the file is what the machine hears, Ethernet frame by
// frame with a virtio header. The cable is gone when the file is closed everywhere.
func (t *Topology) Tap(u Uplink) (*os.File, error) {
	if err := u.valid(); err != nil {
		return nil, err
	}
	var f *os.File
	err := t.within(func(h *netlink.Handle) error {
		br, err := h.LinkByName(bridgeName(u.Segment))
		if err != nil {
			return fmt.Errorf("segment %d: %w", u.Segment, err)
		}
		tap := &netlink.Tuntap{
			LinkAttrs: netlink.LinkAttrs{Name: fmt.Sprintf("t%d-%d", u.Segment, u.Host)}, Mode: netlink.TUNTAP_MODE_TAP, NonPersist: true,
			Flags: netlink.TUNTAP_NO_PI | netlink.TUNTAP_VNET_HDR | netlink.TUNTAP_ONE_QUEUE, Queues: 1,
		}
		if err := netlink.LinkAdd(tap); err != nil { // a device is made where its file is opened: on this thread
			return fmt.Errorf("tap of host %d on segment %d: %w", u.Host, u.Segment, err)
		}
		f = tap.Fds[0]
		l, err := h.LinkByName(tap.Name)
		if err == nil {
			err = h.LinkSetMaster(l, br)
		}
		if err == nil {
			err = h.LinkSetUp(l)
		}
		if err != nil {
			f.Close()
			return fmt.Errorf("tap of host %d on segment %d: %w", u.Host, u.Segment, err)
		}
		return nil
	})
	return f, err
}

// Free finds a host of a segment that nobody has, the last ones first: boxes have the first ones.
func (t *Topology) Free(segment int) (Uplink, error) {
	for host := 14; host >= 2; host-- {
		u, taken := Uplink{segment, host}, false
		err := t.within(func(h *netlink.Handle) error {
			for _, name := range []string{vethName(u), fmt.Sprintf("t%d-%d", segment, host)} {
				if _, err := h.LinkByName(name); err == nil {
					taken = true
				}
			}
			return nil
		})
		if err != nil || !taken {
			return u, err
		}
	}
	return Uplink{}, fmt.Errorf("segment %d is full", segment)
}

// MAC is the Ethernet address of a router, and of a host that is no box. IPv6 addresses derive from it.
func (t *Topology) MAC(u Uplink) net.HardwareAddr {
	return net.HardwareAddr{0x02, 'h', 'f', 0, byte(u.Segment), byte(u.Host)}
}

// Bridge is the name of a segment's interface on the router, where the router's own services listen.
func (t *Topology) Bridge(segment int) string { return bridgeName(segment) }
