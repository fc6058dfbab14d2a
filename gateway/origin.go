package gateway

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"time"
)

// A Service is what an Origin serves for one host with one workload. Several services may share a host: replicas.
type Service struct {
	Host     string
	Workload WorkloadID
	Epoch    uint64

	// TLS ends the client's connection: Certificates or GetCertificate must be set. MinVersion 0 means TLS 1.3.
	TLS *tls.Config

	// Dial connects to the workload, which speaks HTTP/1.1. Handler, when set, answers instead.
	Dial    func(ctx context.Context) (net.Conn, error)
	Handler http.Handler
}

// EdgeInfo is an Edge as the ledger lists it.
type EdgeInfo struct {
	Addr       string // host:port of the public port
	SPKI       SPKI   // of the Edge's tunnel certificate
	TunnelName string
}

// OriginConfig configures an Origin.
type OriginConfig struct {
	Certificate tls.Certificate                                          // whose key the ledger lists for this node
	Dial        func(ctx context.Context, addr string) (net.Conn, error) // to Edges; nil dials TCP
	KeepAlive   time.Duration                                            // as Limits.KeepAlive; 0 means 1s
	Log         *slog.Logger                                             // nil discards
}

// An Origin is the inside end of the gateway. It listens on nothing.
type Origin struct{ cfg OriginConfig }

// NewOrigin checks the configuration.
func NewOrigin(cfg OriginConfig) (*Origin, error) { return &Origin{cfg: cfg}, nil }

// Run keeps a tunnel to every Edge and serves what comes through them, until ctx ends.
func (o *Origin) Run(ctx context.Context) error { return errors.New("gateway origin: not yet") }

// SetEdges replaces the list of Edges. It may be called at any time.
func (o *Origin) SetEdges(edges []EdgeInfo) {}

// SetServices replaces what is served and announces it. Connections of a service that is no longer listed, in this
// epoch, are cut. It may be called at any time.
func (o *Origin) SetServices(services []Service) error { return nil }

// OriginStatus is what an Origin sees, for people and JSON.
type OriginStatus struct {
	Edges []EdgeLink `json:"edges"`
}

// EdgeLink is an Origin's tunnel to one Edge.
type EdgeLink struct {
	Addr      string    `json:"addr"`
	Connected bool      `json:"connected"` // and the newest list of claims acknowledged
	Since     time.Time `json:"since"`
	Streams   int       `json:"streams"`
	Refused   []Refusal `json:"refused,omitempty"`
	Error     string    `json:"error,omitempty"` // why it is not connected
}

// Status tells what the Origin sees now.
func (o *Origin) Status() OriginStatus { return OriginStatus{} }
