package overlay

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"syscall"

	"golang.org/x/sys/unix"
)

// ListenAt opens a TCP listener on a workload's address, in the namespace that Attach returned for it: for a workload that is
// a process of the node's own. The listener lives as long as the namespace, which Detach takes the cable from.
func ListenAt(ctx context.Context, namespace string, at netip.AddrPort) (l net.Listener, err error) {
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		if e := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_FREEBIND, 1) }); e != nil {
			return e
		}
		return err
	}}
	err = within(namespace, func() (err error) {
		l, err = lc.Listen(ctx, "tcp6", at.String())
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("listen on %v: %w", at, err)
	}
	return l, nil
}
