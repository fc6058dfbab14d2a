// Package contract is the document: what an account wants to run, as a public header and a sealed body, derived from a
// Compose file. It parses, plans, validates, seals and opens; it knows no ledger and no machine, and the only thing that
// it does to the world is that Load reads a Compose file and the files that this names.
//
// A header is public: resources, placement, routes, whether there is egress, and three commitments to the body. A body
// holds images, environment, secrets and files; it is sealed with AES-256-GCM under a random key and kept off the
// ledger, by the hash of its sealed bytes. AEADs do not commit to their key, so the header also carries salted
// commitments to the plaintext and to the keys; whoever approves or starts a revision recomputes all three (Open).
// The format is docs/formats/contract.md.
package contract

import (
	"cmp"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"holdfast/identity"
	"holdfast/internal/canonical"
)

// Version of header and body.
const Version = 1

// Limits of a contract. They bound what a validator holds and what a node does for one contract.
const (
	MaxHeader      = 64 << 10
	MaxBody        = 8 << 20 // plaintext; secrets and files are in it
	MaxItems       = 1 << 16 // CBOR data items of a body, which bound the memory that it takes when it is read
	MaxServices    = 64
	MaxReplicas    = 32 // of one service
	MaxWorkloads   = 128
	MaxVolumes     = 64
	MaxNetworks    = 8
	MaxRoutes      = 64
	MaxConstraints = 64
	MaxVolumeSize  = 64 << 30
	MaxMounts      = 256 // volumes, tmpfs, configs and secrets of one service
)

type (
	contractKind struct{}
	revisionKind struct{}
	networkKind  struct{}
	volumeKind   struct{}
	workloadKind struct{}
)

func (contractKind) Prefix() string { return "ctr" }
func (revisionKind) Prefix() string { return "rev" }
func (networkKind) Prefix() string  { return "net" }
func (volumeKind) Prefix() string   { return "vol" }
func (workloadKind) Prefix() string { return "wl" }

type (
	// An ID is the digest of revision 1's header.
	ID = identity.ID[contractKind]
	// A RevisionID is the digest of a revision's header.
	RevisionID = identity.ID[revisionKind]
	// A NetworkID derives from the contract and the network's name.
	NetworkID = identity.ID[networkKind]
	// A VolumeID derives from the contract and the volume's name.
	VolumeID = identity.ID[volumeKind]
	// A WorkloadID derives from the contract, the service and the replica's index.
	WorkloadID = identity.ID[workloadKind]
)

// Header is the public part of a revision.
type Header struct {
	Version  uint8              `cbor:"1,keyasint" json:"version"`
	Grid     identity.GridID    `cbor:"2,keyasint" json:"grid"`
	Account  identity.AccountID `cbor:"3,keyasint" json:"account"`
	Name     string             `cbor:"4,keyasint" json:"name"` // unique in the account
	Revision uint32             `cbor:"5,keyasint" json:"revision"`
	Contract ID                 `cbor:"6,keyasint" json:"contract"` // zero in revision 1, whose digest it is
	Previous RevisionID         `cbor:"7,keyasint" json:"previous"` // zero in revision 1

	Services []Service `cbor:"8,keyasint" json:"services"`
	Volumes  []Volume  `cbor:"9,keyasint,omitempty" json:"volumes,omitempty"`
	Networks []string  `cbor:"10,keyasint,omitempty" json:"networks,omitempty"`
	Routes   []Route   `cbor:"11,keyasint,omitempty" json:"routes,omitempty"`

	SealedBody     [32]byte `cbor:"12,keyasint" json:"-"` // SHA-256 of the sealed body
	SealedSize     uint32   `cbor:"13,keyasint" json:"sealedSize"`
	BodyCommitment [32]byte `cbor:"14,keyasint" json:"-"`
	KeyCommitment  [32]byte `cbor:"15,keyasint" json:"-"`

	Store Store `cbor:"16,keyasint,omitzero" json:"store,omitzero"` // of its buckets; zero: it has none

	Approvals []identity.Approval `cbor:"17,keyasint,omitempty" json:"approvals,omitempty"` // beside what the account's policy asks for
}

// Service is what the grid must know of a service to place it and to bound it.
type Service struct {
	Name      string    `cbor:"1,keyasint" json:"name"`
	Replicas  uint16    `cbor:"2,keyasint" json:"replicas"`
	CPUMilli  uint32    `cbor:"3,keyasint" json:"cpuMilli"` // thousandths of a core, a limit
	Memory    uint64    `cbor:"4,keyasint" json:"memory"`   // bytes, a limit
	Pids      uint32    `cbor:"5,keyasint" json:"pids"`
	Networks  []string  `cbor:"6,keyasint,omitempty" json:"networks,omitempty"`
	Volumes   []string  `cbor:"7,keyasint,omitempty" json:"volumes,omitempty"`
	Placement Placement `cbor:"8,keyasint,omitempty" json:"placement"`
	Egress    bool      `cbor:"9,keyasint,omitempty" json:"egress"`
	Update    Update    `cbor:"10,keyasint,omitzero" json:"update,omitzero"`
}

// Update is how a revision takes the place of the one before, where that one was good.
type Update struct {
	Parallel uint16 `cbor:"1,keyasint,omitempty" json:"parallel,omitempty"` // replicas that may be without one that is ready at a time; 0: see Unavailable
	Action   string `cbor:"2,keyasint,omitempty" json:"action,omitempty"`   // what a failure brings: "" the revision before, OnFailurePause, OnFailureContinue
	Monitor  uint32 `cbor:"3,keyasint,omitempty" json:"monitor,omitempty"`  // seconds that one without a health check runs before it is ready; 0: DefaultMonitor
	Deadline uint32 `cbor:"4,keyasint,omitempty" json:"deadline,omitempty"` // seconds in which the revision must be ready; 0: DefaultDeadline
}

// What else than going back the failure of an update can bring.
const (
	OnFailurePause    = "pause"    // nothing more is replaced, nothing taken back
	OnFailureContinue = "continue" // the rest is replaced all the same
)

// Defaults and bounds of an Update.
const (
	DefaultMonitor  = 5 * time.Second
	DefaultDeadline = 10 * time.Minute
	maxUpdateTime   = 24 * time.Hour
)

// Unavailable is how many of the service's replicas an update may have without a ready one at a time: a quarter, if nothing
// is said.
func (s *Service) Unavailable() int {
	if s.Update.Parallel > 0 {
		return int(s.Update.Parallel)
	}
	return max(1, (int(s.Replicas)+3)/4)
}

// Monitored is how long one without a health check runs before it is ready.
func (s *Service) Monitored() time.Duration {
	return cmp.Or(time.Duration(s.Update.Monitor)*time.Second, DefaultMonitor)
}

// Deadline is the time in which a revision must be ready: the longest of its services'.
func (h *Header) Deadline() time.Duration {
	var d time.Duration
	for i := range h.Services {
		d = max(d, cmp.Or(time.Duration(h.Services[i].Update.Deadline)*time.Second, DefaultDeadline))
	}
	return d
}

// Placement is where a service's replicas may run.
type Placement struct {
	Spread string   `cbor:"1,keyasint,omitempty" json:"spread,omitempty"` // "farm" or "node": no two replicas of the service share one; "" does not care
	Farms  []string `cbor:"2,keyasint,omitempty" json:"farms,omitempty"`  // names; empty allows all
	Nodes  []string `cbor:"3,keyasint,omitempty" json:"nodes,omitempty"`  // names; empty allows all
}

// Allows reports whether a node of that name, of that farm, may run the service.
func (p *Placement) Allows(farm, node string) bool {
	return (len(p.Farms) == 0 || slices.Contains(p.Farms, farm)) && (len(p.Nodes) == 0 || slices.Contains(p.Nodes, node))
}

// Volume is a disk of one service. Its data stays with the contract over revisions.
type Volume struct {
	Name  string `cbor:"1,keyasint" json:"name"`
	Size  uint64 `cbor:"2,keyasint" json:"size"`                    // bytes
	Store Store  `cbor:"3,keyasint,omitzero" json:"store,omitzero"` // of its snapshots; zero: none are taken
}

// Route leads a host name to a port of a service.
type Route struct {
	Host    string `cbor:"1,keyasint" json:"host"`
	Service string `cbor:"2,keyasint" json:"service"`
	Port    uint16 `cbor:"3,keyasint" json:"port"`
}

// Encode is the signed form of h.
func (h *Header) Encode() []byte { return canonical.Encode(h) }

// DecodeHeader reads and validates a header.
func DecodeHeader(b []byte) (*Header, error) {
	var h Header
	if err := canonical.Decode(b, MaxHeader, &h); err != nil {
		return nil, fmt.Errorf("contract header: %w", err)
	}
	if err := h.Validate(); err != nil {
		return nil, fmt.Errorf("contract header: %w", err)
	}
	return &h, nil
}

// RevisionID identifies this revision.
func (h *Header) RevisionID() RevisionID {
	return RevisionID(canonical.Digest("holdfast/revision/v1", h.Encode()))
}

// ContractID identifies the contract that this is a revision of.
func (h *Header) ContractID() ID {
	if h.Revision == 1 {
		return ID(h.RevisionID())
	}
	return h.Contract
}

// NetworkOf is the ID of contract c's network of that name.
func NetworkOf(c ID, name string) NetworkID {
	return NetworkID(canonical.Digest("holdfast/network/v1", c[:], []byte(name)))
}

// VolumeOf is the ID of contract c's volume of that name.
func VolumeOf(c ID, name string) VolumeID {
	return VolumeID(canonical.Digest("holdfast/volume/v1", c[:], []byte(name)))
}

// WorkloadOf is the ID of one replica of a service of contract c.
func WorkloadOf(c ID, service string, replica int) WorkloadID {
	return WorkloadID(canonical.Digest("holdfast/workload/v1", c[:], []byte(service), []byte{byte(replica >> 8), byte(replica)}))
}

// Service returns the service of that name.
func (h *Header) Service(name string) (*Service, bool) {
	for i := range h.Services {
		if h.Services[i].Name == name {
			return &h.Services[i], true
		}
	}
	return nil, false
}

// Keys opens one revision: the body's key, the salt of its commitments, and the secrets that live as long as the
// contract. The header commits to all of them: a holder who hands them on cannot put others in their place.
type Keys struct {
	Body     [32]byte            `cbor:"1,keyasint"`
	Salt     [32]byte            `cbor:"2,keyasint"`
	Volumes  map[string][32]byte `cbor:"3,keyasint,omitempty"` // volume name → key
	Networks map[string][32]byte `cbor:"4,keyasint,omitempty"` // network name → secret of which the pairs' pre-shared keys derive
}

// NewKeys makes the keys of a revision with those volumes and networks. Keys of volumes and networks that previous
// already has are kept: the data outlives the revision. They seal one body: the next one has new ones.
func NewKeys(h *Header, previous *Keys) *Keys {
	k := &Keys{Volumes: map[string][32]byte{}, Networks: map[string][32]byte{}}
	rand.Read(k.Body[:])
	rand.Read(k.Salt[:])
	keep := func(dst map[string][32]byte, old map[string][32]byte, name string) {
		v, ok := old[name]
		if !ok {
			rand.Read(v[:])
		}
		dst[name] = v
	}
	if previous == nil {
		previous = &Keys{}
	}
	// Those of dropped volumes stay too: dropping a volume by mistake must not lose its key.
	maps.Copy(k.Volumes, previous.Volumes)
	for _, v := range h.Volumes {
		keep(k.Volumes, previous.Volumes, v.Name)
	}
	for _, n := range h.Networks {
		keep(k.Networks, previous.Networks, n)
	}
	return k
}

// ErrBody is returned for a body or keys that are not those that the header commits to.
var ErrBody = errors.New("body is not the one that the header commits to")

// Seal encrypts body and sets the header's three commitments to it.
func Seal(h *Header, k *Keys, body *Body) ([]byte, error) {
	plain, err := body.encode()
	if err != nil {
		return nil, err
	}
	if n := len(canonical.Encode(k)); n > MaxKeys {
		return nil, fmt.Errorf("the keys of %d volumes, dropped ones among them, have %d bytes, at most %d are allowed: give volumes names that there were before, or make a new contract", len(k.Volumes), n, MaxKeys)
	}
	aead, err := bodyAEAD(k)
	if err != nil {
		return nil, err
	}
	// The key is random and used for this one message, so that the nonce may be constant.
	sealed := aead.Seal(nil, make([]byte, aead.NonceSize()), plain, []byte(bodyLabel))
	h.SealedBody = sha256.Sum256(sealed)
	h.SealedSize = uint32(len(sealed))
	h.BodyCommitment = commitBody(k, plain)
	h.KeyCommitment = commitKeys(k)
	return sealed, nil
}

// Open checks all three commitments and returns the body.
func Open(h *Header, k *Keys, sealed []byte) (*Body, error) {
	if len(sealed) > MaxBody+overhead || uint64(len(sealed)) != uint64(h.SealedSize) {
		return nil, fmt.Errorf("%w: %d sealed bytes, the header says %d", ErrBody, len(sealed), h.SealedSize)
	}
	if sha256.Sum256(sealed) != h.SealedBody {
		return nil, fmt.Errorf("%w: sealed bytes have another hash", ErrBody)
	}
	if c := commitKeys(k); subtle.ConstantTimeCompare(c[:], h.KeyCommitment[:]) != 1 {
		return nil, fmt.Errorf("%w: other keys", ErrBody)
	}
	// A missing key would be read as one of zeros, that everybody knows.
	for _, v := range h.Volumes {
		if _, ok := k.Volumes[v.Name]; !ok {
			return nil, fmt.Errorf("%w: no key for volume %q", ErrBody, v.Name)
		}
	}
	for _, n := range h.Networks {
		if _, ok := k.Networks[n]; !ok {
			return nil, fmt.Errorf("%w: no secret for network %q", ErrBody, n)
		}
	}
	aead, err := bodyAEAD(k)
	if err != nil {
		return nil, err
	}
	plain, err := aead.Open(nil, make([]byte, aead.NonceSize()), sealed, []byte(bodyLabel))
	if err != nil {
		return nil, fmt.Errorf("%w: it does not decrypt", ErrBody)
	}
	if c := commitBody(k, plain); subtle.ConstantTimeCompare(c[:], h.BodyCommitment[:]) != 1 {
		return nil, fmt.Errorf("%w: another plaintext", ErrBody)
	}
	b, err := decodeBody(plain)
	if err != nil {
		return nil, err
	}
	if err := b.Validate(h); err != nil {
		return nil, fmt.Errorf("contract body: %w", err)
	}
	return b, nil
}

const (
	bodyLabel = "holdfast/body/v1"
	overhead  = 16 // AES-GCM's tag
)

func bodyAEAD(k *Keys) (cipher.AEAD, error) {
	block, err := aes.NewCipher(k.Body[:])
	if err != nil {
		return nil, fmt.Errorf("body key: %w", err)
	}
	return cipher.NewGCM(block)
}

func commitBody(k *Keys, plain []byte) [32]byte {
	return canonical.Digest("holdfast/body-commitment/v1", k.Salt[:], plain)
}

// commitKeys covers the salt too, since it is among the keys.
func commitKeys(k *Keys) [32]byte {
	return canonical.Digest("holdfast/key-commitment/v1", canonical.Encode(k))
}

// Recipient kinds of an Envelope.
const (
	RecipientAccount = "account"
	RecipientNode    = "node"
)

// Envelope gives one recipient the keys of one revision. It is a record apart from the revision and outside its digest.
type Envelope struct {
	Revision  RevisionID `cbor:"1,keyasint" json:"revision"`
	Kind      string     `cbor:"2,keyasint" json:"kind"`
	Recipient [32]byte   `cbor:"3,keyasint" json:"-"` // AccountID or NodeID
	Sealed    []byte     `cbor:"4,keyasint" json:"-"`
}

// MaxEnvelope bounds the sealed keys, MaxKeys their plaintext: HPKE adds some 1140 bytes.
const (
	MaxEnvelope = 16 << 10
	MaxKeys     = 14 << 10
)

// SealEnvelope seals keys for a recipient's sealing key.
func SealEnvelope(rev RevisionID, kind string, recipient [32]byte, to *identity.SealingKey, k *Keys) (*Envelope, error) {
	e := &Envelope{Revision: rev, Kind: kind, Recipient: recipient}
	var err error
	if e.Sealed, err = to.Seal(e.info(), canonical.Encode(k)); err != nil {
		return nil, fmt.Errorf("envelope of %v: %w", rev, err)
	}
	return e, nil
}

// Open returns the keys.
func (e *Envelope) Open(key *identity.OpeningKey) (*Keys, error) {
	if len(e.Sealed) > MaxEnvelope {
		return nil, fmt.Errorf("envelope of %v: %d bytes, at most %d are allowed", e.Revision, len(e.Sealed), MaxEnvelope)
	}
	b, err := key.Open(e.info(), e.Sealed)
	if err != nil {
		return nil, fmt.Errorf("envelope of %v: %w", e.Revision, err)
	}
	var k Keys
	if err := canonical.Decode(b, MaxKeys, &k); err != nil {
		return nil, fmt.Errorf("envelope of %v: %w", e.Revision, err)
	}
	return &k, nil
}

// info binds an envelope to its revision and recipient: one moved to another record does not open.
func (e *Envelope) info() []byte {
	d := canonical.Digest("holdfast/envelope/v1", e.Revision[:], []byte(e.Kind), e.Recipient[:])
	return d[:]
}
