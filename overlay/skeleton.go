package overlay

import (
	"context"
	"errors"
	"net"
	"net/netip"
)

// Run opens the tunnel, serves DNS and keeps everything as wanted, until ctx ends.
func (n *Network) Run(ctx context.Context) error { return errors.ErrUnsupported }

// Ready is closed once the tunnel of the current Run is up.
func (n *Network) Ready() <-chan struct{} { return nil }

// SetPeers says who the peers are.
func (n *Network) SetPeers(peers []Peer) {}

// SetNames says what DNS answers.
func (n *Network) SetNames(names map[string][]netip.Addr) {}

// SetEgress says what each workload may reach outside.
func (n *Network) SetEgress(rules map[netip.Addr][]Egress) {}

// Attach gives a workload its namespace and returns its path. It is idempotent.
func (n *Network) Attach(ctx context.Context, a Attachment) (string, error) {
	return "", errors.ErrUnsupported
}

// Detach removes a workload's namespace. It is idempotent.
func (n *Network) Detach(ctx context.Context, id string) error { return errors.ErrUnsupported }

// Attachments lists the workloads attached.
func (n *Network) Attachments() ([]Attachment, error) { return nil, errors.ErrUnsupported }

// Dial opens a TCP connection from inside the network, from the node's own address.
func (n *Network) Dial(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	return nil, errors.ErrUnsupported
}

// Peers tells what is known of the peers.
func (n *Network) Status() []PeerStatus { return nil }

// Destroy removes a network and its attachments from this node.
func Destroy(ctx context.Context, dir, name string) error { return errors.ErrUnsupported }

// List tells the names of the networks that exist under dir.
func List(dir string) ([]string, error) { return nil, errors.ErrUnsupported }

// A Firewall is what the node's own namespace accepts: nothing but answers.
type Firewall struct {
	Main   string   // the node's namespace; empty means that of this process
	Access []Access // listeners of the system network
}

// Access opens one tunnel to some of its members.
type Access struct {
	Interface string         // Config.Name of an InMain network
	Sources   []netip.Prefix // who may open connections
}

// Apply replaces the rules in one step.
func (f Firewall) Apply() error { return errors.ErrUnsupported }

// Run applies the rules and applies them again whenever the node's addresses change.
func (f Firewall) Run(ctx context.Context) error { return errors.ErrUnsupported }

// A PeerStatus is what the tunnel saw of a peer.
type PeerStatus struct {
	PublicKey     [32]byte
	Endpoint      netip.AddrPort
	LastHandshake int64
	Received      uint64
	Sent          uint64
}
