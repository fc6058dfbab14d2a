package ledger

import (
	"crypto/ed25519"
	"errors"
	"fmt"
	"sync"
	"time"

	"holdfast/contract"
	"holdfast/identity"
	"holdfast/internal/canonical"
)

// MaxHeartbeat bounds an encoded heartbeat: the reports of a node's workloads.
const MaxHeartbeat = 256 << 10

// Heartbeat is a node's sign of life with what it sees of its workloads. It is not a transaction: it is signed by the
// node's session key, which the ledger names, and validators keep only the latest.
type Heartbeat struct {
	Grid      identity.GridID `cbor:"1,keyasint"`
	Node      identity.NodeID `cbor:"2,keyasint"`
	Sequence  uint64          `cbor:"3,keyasint"` // grows: Unix nanoseconds of the node's clock
	Workloads []Report        `cbor:"4,keyasint,omitempty"`
	Signature []byte          `cbor:"5,keyasint,omitempty"` // Ed25519, over all else
	Stored    uint64          `cbor:"6,keyasint,omitempty"` // bytes that the node's location keeps
}

// States of a workload, as its node sees it.
const (
	StateWaiting  = "waiting"  // for something that Reason names
	StateStarting = "starting" // it runs, but its health check has not passed yet
	StateRunning  = "running"
	StateFailed   = "failed" // it will be tried again
	StateExited   = "exited" // it ended and its restart policy leaves it so
)

// Report is a node's word on one of its workloads.
type Report struct {
	Workload contract.WorkloadID `cbor:"1,keyasint" json:"workload"`
	Contract contract.ID         `cbor:"2,keyasint" json:"contract"`
	Service  string              `cbor:"3,keyasint" json:"service"`
	Replica  uint16              `cbor:"4,keyasint" json:"replica"`
	Epoch    uint64              `cbor:"5,keyasint" json:"epoch"`
	Revision uint32              `cbor:"6,keyasint" json:"revision"`
	State    string              `cbor:"7,keyasint" json:"state"`
	Reason   string              `cbor:"8,keyasint,omitempty" json:"reason,omitempty"`
	Restarts uint32              `cbor:"9,keyasint,omitempty" json:"restarts"`
	Healthy  bool                `cbor:"10,keyasint,omitempty" json:"healthy"` // the health check passed; false without one
	ExitCode int32               `cbor:"11,keyasint,omitempty" json:"exitCode"`
	Saved    int64               `cbor:"12,keyasint,omitempty" json:"saved,omitempty"`   // Unix ms: what its volumes had then is in their stores; 0 with volumes: nothing is
	Unsaved  string              `cbor:"13,keyasint,omitempty" json:"unsaved,omitempty"` // why nothing newer is
}

// Sign signs the heartbeat with the session key.
func (h *Heartbeat) Sign(k ed25519.PrivateKey) { h.Signature = ed25519.Sign(k, h.signBytes()) }

func (h *Heartbeat) signBytes() []byte {
	bare := *h
	bare.Signature = nil
	d := canonical.Digest("holdfast/heartbeat/v1", canonical.Encode(&bare))
	return d[:]
}

// Encode is the form that is sent.
func (h *Heartbeat) Encode() []byte { return canonical.Encode(h) }

// DecodeHeartbeat reads a heartbeat; its signature is not yet verified.
func DecodeHeartbeat(b []byte) (*Heartbeat, error) {
	var h Heartbeat
	if err := canonical.Decode(b, MaxHeartbeat, &h); err != nil {
		return nil, fmt.Errorf("heartbeat: %w", err)
	}
	return &h, nil
}

// Verify checks that the heartbeat is for this grid and signed by the session key of node n.
func (h *Heartbeat) Verify(grid identity.GridID, n *Node) error {
	switch {
	case h.Grid != grid:
		return fmt.Errorf("heartbeat of %v is for %v", h.Node, h.Grid)
	case h.Node != n.ID:
		return fmt.Errorf("heartbeat of %v, not of %v", h.Node, n.ID)
	case len(h.Signature) != ed25519.SignatureSize || !ed25519.Verify(n.Session[:], h.signBytes(), h.Signature):
		return fmt.Errorf("heartbeat of %v: %w", h.Node, identity.ErrSignature)
	}
	return nil
}

// Ears is what one validator has heard of the nodes, by its own clock. What it says in its vote extensions is its
// statement; what becomes of it is decided by all in Apply.
type Ears struct {
	lease time.Duration
	wait  time.Duration
	mu    sync.Mutex
	since time.Time // when this validator began to listen: silence before does not count
	heard map[identity.NodeID]ear
}

type ear struct {
	at  time.Time
	raw []byte
	seq uint64
}

// NewEars listens with the grid's lease and margin, from start on.
func NewEars(g *Genesis, start time.Time) *Ears {
	return &Ears{lease: g.Lease, wait: g.Lease + g.Margin, since: start, heard: map[identity.NodeID]ear{}}
}

// ErrStale is returned for a heartbeat that is not newer than the last one.
var ErrStale = errors.New("heartbeat is not newer than the last one")

// ErrClock is returned for a heartbeat of another time.
var ErrClock = errors.New("heartbeat is of another time")

// Hear verifies and keeps a heartbeat that arrived at now, by the validator's clock. One that was made more than a lease
// before or after now is refused: a recorded one would keep up a node that is gone, before a validator that has just
// started; one from the future would shut out all that the node says after its clock is set right.
func (e *Ears) Hear(s *State, raw []byte, now time.Time) error {
	h, err := DecodeHeartbeat(raw)
	if err != nil {
		return err
	}
	grid, err := get[Grid](s, GridKey)
	if err != nil {
		return fmt.Errorf("grid record: %w", err)
	}
	n, err := get[Node](s, NodeKey(h.Node))
	if err != nil {
		return fmt.Errorf("heartbeat of %v: %w", h.Node, err)
	}
	if err := h.Verify(grid.ID, n); err != nil {
		return err
	}
	if off := clockOffset(h.Sequence, now); off > e.lease || off < -e.lease {
		return fmt.Errorf("%v: %w: the node's clock and the validator's differ by %v", h.Node, ErrClock, off.Round(time.Millisecond))
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if old, ok := e.heard[h.Node]; ok && h.Sequence <= old.seq {
		return fmt.Errorf("%v: %w", h.Node, ErrStale)
	}
	e.heard[h.Node] = ear{now, raw, h.Sequence}
	return nil
}

// clockOffset is how far sequence, Unix nanoseconds, is ahead of now; it does not overflow, whatever a node claims.
func clockOffset(sequence uint64, now time.Time) time.Duration {
	const maxInt64 = 1<<63 - 1
	if sequence > maxInt64 {
		return maxInt64
	}
	return time.Unix(0, int64(sequence)).Sub(now.Round(0)) // wall clock against wall clock; Sub saturates
}

// Extension is the vote extension at now: the version byte 1 and the Bitmap of the nodes heard within lease and margin.
func (e *Ears) Extension(s *State, now time.Time) []byte {
	m := make(Bitmap, (len(s.fleet)+7)/8)
	e.mu.Lock()
	defer e.mu.Unlock()
	for i := range s.fleet {
		h, ok := e.heard[identity.NodeID(s.fleet[i].ID)]
		if !ok {
			// Never heard: while this validator has listened for less than a lease it says of a node what the ledger says.
			if !s.fleet[i].Up || now.Sub(e.since) > e.wait {
				continue
			}
		} else if now.Sub(h.at) > e.wait {
			continue
		}
		m[i/8] |= 1 << (i % 8)
	}
	return append([]byte{1}, m...)
}

// Reports returns the latest heartbeat of every node, as it was signed.
func (e *Ears) Reports() [][]byte {
	e.mu.Lock()
	defer e.mu.Unlock()
	out := make([][]byte, 0, len(e.heard))
	for _, h := range e.heard {
		out = append(out, h.raw)
	}
	return out
}

// DecodeExtension reads a vote extension. Nil is a validator that said nothing.
func DecodeExtension(b []byte) (Bitmap, error) {
	switch {
	case len(b) == 0:
		return nil, nil
	case b[0] != 1:
		return nil, fmt.Errorf("vote extension: version %d is not known", b[0])
	case len(b) > 1+MaxNodes/8:
		return nil, fmt.Errorf("vote extension of %d bytes", len(b))
	}
	return append(Bitmap{}, b[1:]...), nil
}
