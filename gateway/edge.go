package gateway

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"time"
)

// Routes is what an Edge knows of the ledger. Lookup answers from the newest verified state that it has, never from the
// network, and keeps answering from it while the ledger cannot be reached.
type Routes interface {
	Lookup(host string) (Route, bool)
}

// A Route says who may serve a host: workloads on nodes, or one TCP address to which bytes are passed.
type Route struct {
	Servers []Server
	Forward string
}

// A Server is a workload that the ledger assigned to a node in an epoch.
type Server struct {
	Node     NodeID
	Workload WorkloadID
	Epoch    uint64
}

// Limits bound what strangers and nodes can make an Edge hold. Zero values mean the defaults.
type Limits struct {
	Connections   int           // public connections; 0 means 16384
	PerClient     int           // public connections of one IPv4 address or IPv6 /64; 0 means 512
	Tunnels       int           // tunnels; 0 means 16384
	TunnelStreams int           // open streams of one tunnel; 0 means 2048, which is also the most
	Claims        int           // claims of one tunnel; 0 means 4096, which is also the most
	Hello         int           // bytes of a ClientHello; 0 means 16 KiB
	HelloTime     time.Duration // to send a ClientHello, and for a tunnel's handshake; 0 means 5s
	OriginTime    time.Duration // for an Origin's first byte, before another is tried; 0 means 5s
	IdleTime      time.Duration // of a connection without a byte in either direction; 0 means 10m
	LingerTime    time.Duration // for a client to close after its Origin has; 0 means 30s
	KeepAlive     time.Duration // between signs of life on a tunnel, which is dead after four; 0 means 1s
}

// EdgeConfig configures an Edge.
type EdgeConfig struct {
	Listener    net.Listener    // the public port; Run closes it
	Certificate tls.Certificate // of the tunnel end; Origins pin its key
	TunnelName  string          // the server name by which Origins ask for the tunnel
	Routes      Routes
	Authorize   func(SPKI) (node NodeID, ok bool)                        // the ledger's node with this key
	Dial        func(ctx context.Context, addr string) (net.Conn, error) // for Route.Forward; nil dials TCP
	Limits      Limits
	Log         *slog.Logger // nil discards
}

// An Edge is the public end of the gateway.
type Edge struct{ cfg EdgeConfig }

// NewEdge checks the configuration.
func NewEdge(cfg EdgeConfig) (*Edge, error) { return &Edge{cfg: cfg}, nil }

// Run serves until ctx ends.
func (e *Edge) Run(ctx context.Context) error { return errors.New("gateway edge: not yet") }

// Update rechecks everything that is open against Routes and Authorize. Call it whenever either has changed.
func (e *Edge) Update() {}

// EdgeStatus is what an Edge sees, for people and JSON.
type EdgeStatus struct {
	Connections int            `json:"connections"`
	Hosts       map[string]int `json:"hosts"` // how many Origins serve a host now
	Tunnels     []TunnelStatus `json:"tunnels"`
	Counters    EdgeCounters   `json:"counters"`
}

// TunnelStatus is one tunnel as the Edge sees it.
type TunnelStatus struct {
	Node    NodeID    `json:"node"`
	Addr    string    `json:"addr"`
	Since   time.Time `json:"since"`
	Streams int       `json:"streams"`
	Claims  int       `json:"claims"`
	Refused []Refusal `json:"refused,omitempty"`
}

// EdgeCounters only grow while an Edge runs.
type EdgeCounters struct {
	Accepted     uint64 `json:"accepted"`
	OverLimit    uint64 `json:"over_limit"`
	BadHello     uint64 `json:"bad_hello"`
	HelloTimeout uint64 `json:"hello_timeout"`
	UnknownHost  uint64 `json:"unknown_host"`
	NoOrigin     uint64 `json:"no_origin"`
	OriginRetry  uint64 `json:"origin_retry"`
	BadTunnel    uint64 `json:"bad_tunnel"`
	RefusedClaim uint64 `json:"refused_claim"`
	Superseded   uint64 `json:"superseded"` // connections cut because the ledger no longer names their server
	BytesIn      uint64 `json:"bytes_in"`   // from clients
	BytesOut     uint64 `json:"bytes_out"`  // to clients
}

// Status tells what the Edge sees now.
func (e *Edge) Status() EdgeStatus { return EdgeStatus{} }
