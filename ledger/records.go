package ledger

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"holdfast/contract"
	"holdfast/identity"
	"holdfast/internal/canonical"
)

// Genesis is the document that a grid begins with; its digest is the GridID and it is every client's root of trust.
type Genesis struct {
	Version    uint8               `cbor:"1,keyasint" json:"version"`
	Name       string              `cbor:"2,keyasint" json:"name"`
	Time       int64               `cbor:"3,keyasint" json:"time"` // Unix seconds
	Devices    []identity.Device   `cbor:"4,keyasint" json:"-"`    // of the grid's account
	Policy     identity.Policy     `cbor:"5,keyasint" json:"policy"`
	Sealing    identity.SealingKey `cbor:"6,keyasint" json:"-"`
	Validators []Validator         `cbor:"7,keyasint" json:"validators"`
	Lease      time.Duration       `cbor:"8,keyasint" json:"lease"`  // how long a node counts as alive after its last heartbeat
	Margin     time.Duration       `cbor:"9,keyasint" json:"margin"` // a node stops its volumes' workloads this much before, the ledger moves on this much after
	Limits     Limits              `cbor:"10,keyasint,omitzero" json:"limits,omitzero"`
	Store      Store               `cbor:"11,keyasint,omitzero" json:"store,omitzero"` // the grid's own; zero: it has none
	Delays     Delays              `cbor:"12,keyasint,omitzero" json:"delays,omitzero"`
}

// Validator takes part in consensus.
type Validator struct {
	Name    string   `cbor:"1,keyasint" json:"name"`
	Key     []byte   `cbor:"2,keyasint" json:"-"` // ML-DSA-65 public key
	Power   int64    `cbor:"3,keyasint" json:"power"`
	TLS     [32]byte `cbor:"4,keyasint" json:"-"` // SHA-256 of the SubjectPublicKeyInfo of its ledger API
	Address string   `cbor:"5,keyasint" json:"address"`
	// In the system network it is a peer that offers nothing. Without a WireGuard key it is none.
	WireGuard [32]byte `cbor:"6,keyasint,omitzero" json:"-"`                    // X25519 public key
	Endpoints []string `cbor:"7,keyasint,omitempty" json:"endpoints,omitempty"` // underlay addresses without port
}

// MaxGenesis bounds an encoded genesis: 150 validators and their keys.
const MaxGenesis = 1 << 20

// Encode is the form whose digest is the GridID.
func (g *Genesis) Encode() []byte { return canonical.Encode(g) }

// GridID identifies the grid.
func (g *Genesis) GridID() identity.GridID { return GenesisDigest(g.Encode()) }

// GenesisDigest is the GridID of an encoded genesis: whoever has the ID need not read a document that is another's.
func GenesisDigest(b []byte) identity.GridID {
	return identity.GridID(canonical.Digest("holdfast/genesis/v1", b))
}

// GridAccount is the account that admits farms and gateways.
func (g *Genesis) GridAccount() identity.AccountID {
	id := g.GridID()
	return identity.AccountID(canonical.Digest("holdfast/grid-account/v1", id[:]))
}

// DecodeGenesis reads and validates a genesis document.
func DecodeGenesis(b []byte) (*Genesis, error) {
	var g Genesis
	if err := canonical.Decode(b, MaxGenesis, &g); err != nil {
		return nil, fmt.Errorf("genesis: %w", err)
	}
	if g.Version != 1 {
		return nil, fmt.Errorf("genesis: version %d is not known", g.Version)
	}
	if err := validName(g.Name); err != nil {
		return nil, fmt.Errorf("genesis: grid %w", err)
	}
	if len(g.Validators) == 0 || len(g.Validators) > 150 {
		return nil, fmt.Errorf("genesis: %d validators, 1 to 150 are allowed", len(g.Validators))
	}
	if g.Lease < time.Second || g.Margin < 0 || 2*g.Margin > g.Lease {
		return nil, fmt.Errorf("genesis: lease %v with margin %v: the lease is at least 1 s, the margin at most half of it", g.Lease, g.Margin)
	}
	for i, v := range g.Validators {
		if err := validEndpoints(v.Endpoints); err != nil {
			return nil, fmt.Errorf("genesis: validator %q: %w", v.Name, err)
		}
		if v.WireGuard != ([32]byte{}) && slices.ContainsFunc(g.Validators[:i], func(o Validator) bool { return o.WireGuard == v.WireGuard }) {
			return nil, fmt.Errorf("genesis: validator %q has another's %s key", v.Name, useWireGuard)
		}
	}
	if err := g.Delays.valid(); err != nil {
		return nil, fmt.Errorf("genesis: %w", err)
	}
	if g.Store != (Store{}) {
		if err := g.Store.valid(); err != nil {
			return nil, fmt.Errorf("genesis: %w", err)
		}
		if g.Store.Contract != (contract.ID{}) {
			return nil, errors.New("genesis: the grid's own store is of no contract")
		}
	}
	a := identity.Account{Devices: g.Devices, Policy: g.Policy}
	if err := a.Validate(); err != nil {
		return nil, fmt.Errorf("genesis: grid account: %w", err)
	}
	return &g, nil
}

// Names of records. An identifier in a name is raw bytes: names are only ever built here.
func AccountKey(id identity.AccountID) string     { return "account/" + string(id[:]) }
func AccountWorkKey(id identity.AccountID) string { return "account-contracts/" + string(id[:]) } // []contract.ID
func FarmKey(id identity.FarmID) string           { return "farm/" + string(id[:]) }
func NodeKey(id identity.NodeID) string           { return "node/" + string(id[:]) }
func NodeWorkKey(id identity.NodeID) string       { return "node-contracts/" + string(id[:]) } // []contract.ID that have a workload there
func NodeUsedKey(id identity.NodeID) string       { return "node-used/" + string(id[:]) }
func AccountUsedKey(id identity.AccountID) string { return "account-used/" + string(id[:]) }  // Quota
func QuotaKey(id identity.AccountID) string       { return "account-quota/" + string(id[:]) } // Quota, where the account has its own
func GatewayKey(id identity.GatewayID) string     { return "gateway/" + string(id[:]) }
func ContractKey(id contract.ID) string           { return "contract/" + string(id[:]) }
func AssignmentsKey(id contract.ID) string        { return "assignments/" + string(id[:]) }
func RevisionKey(id contract.RevisionID) string   { return "revision/" + string(id[:]) } // an encoded header
func NetworkKey(id contract.NetworkID) string     { return "network/" + string(id[:]) }
func VolumeKey(id contract.VolumeID) string       { return "volume/" + string(id[:]) }
func StoreKey(id contract.ID) string              { return "store/" + string(id[:]) } // of Store.ID
func RouteKey(host string) string                 { return "route/" + host }
func ProposalKey(id ProposalID) string            { return "proposal/" + string(id[:]) }
func TemplateKey(a identity.AccountID, name, version string) string {
	return "template/" + string(a[:]) + name + "@" + version
}
func TemplatesKey(id identity.AccountID) string { return "account-templates/" + string(id[:]) } // []string, NAME@VERSION in order of publication
func ImageSignatureKey(a identity.AccountID, manifest [32]byte) string {
	return "image-signature/" + string(a[:]) + string(manifest[:])
}
func ImageSignaturesKey(id identity.AccountID) string { return "account-signatures/" + string(id[:]) } // [][]byte, digests in order
func AskedKey(id identity.AccountID) string           { return "account-asked/" + string(id[:]) }      // []ProposalID that are open and ask it
func ProposalsKey(id identity.AccountID) string       { return "account-proposals/" + string(id[:]) }  // []ProposalID that are open
func contractNameKey(a identity.AccountID, name string) string {
	return "contract-name/" + string(a[:]) + name
}

// goneKey names a validator that left, by the SHA-256 of its consensus key: an int64, the height.
func goneKey(id ValidatorID) string { return "validator-gone/" + string(id[:]) }

// dueKey names what is to be looked at in a minute since 1970: 8 bytes of time (Unix milliseconds), a kind, an ID each.
func dueKey(minute uint64) string              { return "due/" + string(binary.BigEndian.AppendUint64(nil, minute)) }
func farmNameKey(name string) string           { return "farm-name/" + name }
func nodeKeyKey(use string, k [32]byte) string { return "node-key/" + use + "/" + string(k[:]) }
func nodeNameKey(name string) string           { return "node-name/" + name }
func addressKey(prefix []byte) string          { return "prefix/" + string(prefix) }

// NonceKey names the last nonce of an actor, a uint64.
func NonceKey(a Actor) string {
	if a.Node {
		return "nonce/n" + string(a.ID[:])
	}
	return "nonce/a" + string(a.ID[:])
}

// EnvelopeKey names the envelope of one recipient.
func EnvelopeKey(rev contract.RevisionID, kind string, recipient [32]byte) string {
	return "envelope/" + string(rev[:]) + kind + "/" + string(recipient[:])
}

// Lists of everything of a kind, in the order of creation.
const (
	GridKey       = "grid"       // Grid
	FarmsKey      = "farms"      // []identity.FarmID
	NodesKey      = "nodes"      // []identity.NodeID
	GatewaysKey   = "gateways"   // []identity.GatewayID
	ContractsKey  = "contracts"  // []contract.ID, those that are active
	RoutesKey     = "routes"     // []string, host names
	StoresKey     = "stores"     // []contract.ID, of Store.ID: what locations serve
	SharedKey     = "shared"     // Quota, what all accounts without a quota of their own use together
	ValidatorsKey = "validators" // Validators; absent while they are those of the genesis
	WaitingKey    = "waiting"    // []contract.ID, active ones with a workload that is on no node, the next one to try first
)

const (
	duesKey         = "due"           // dues, when there are any
	openKey         = "proposals"     // uint64: how many are open of accounts without a quota of their own
	growthKey       = "shared-growth" // growth, when there was any
	retryKey        = "waiting-retry" // uint64: how many of WaitingKey were not tried since room came
	freeNetworksKey = "networks-free" // []uint16, indexes, the one that has been free for longest first
)

// Grid is the grid's own record.
type Grid struct {
	ID          identity.GridID    `cbor:"1,keyasint"`
	Account     identity.AccountID `cbor:"2,keyasint"`
	NextNetwork uint16             `cbor:"3,keyasint"` // the lowest index that no network had yet
}

// NodeUsed is what the workloads on a node use, with what each costs beside its limits (schedule.Node.Take).
type NodeUsed struct {
	CPUMilli  int64 `cbor:"1,keyasint"`
	Memory    int64 `cbor:"2,keyasint"`
	Workloads int64 `cbor:"3,keyasint"`
}

// Farm is machines of one owner.
type Farm struct {
	ID    identity.FarmID    `cbor:"1,keyasint" json:"id"`
	Name  string             `cbor:"2,keyasint" json:"name"`
	Owner identity.AccountID `cbor:"3,keyasint" json:"owner"`
}

// Node is a machine that runs workloads.
type Node struct {
	ID        identity.NodeID     `cbor:"1,keyasint" json:"id"`
	Name      string              `cbor:"2,keyasint" json:"name"`
	Farm      identity.FarmID     `cbor:"3,keyasint" json:"farm"`
	FarmName  string              `cbor:"4,keyasint" json:"farmName"`
	Key       identity.PublicKey  `cbor:"5,keyasint" json:"-"`
	Sealing   identity.SealingKey `cbor:"6,keyasint" json:"-"`
	WireGuard [32]byte            `cbor:"7,keyasint" json:"-"`
	TLS       [32]byte            `cbor:"8,keyasint" json:"-"`
	Session   [32]byte            `cbor:"9,keyasint" json:"-"`
	Endpoints []string            `cbor:"10,keyasint,omitempty" json:"endpoints"`
	CPUMilli  uint32              `cbor:"11,keyasint" json:"cpuMilli"`
	Memory    uint64              `cbor:"12,keyasint" json:"memory"`
	Index     uint32              `cbor:"13,keyasint" json:"index"` // order of registration: its bit in vote extensions
	Up        bool                `cbor:"14,keyasint" json:"up"`
	Since     int64               `cbor:"15,keyasint" json:"since"`                       // block time of the last change of Up, Unix milliseconds
	Storage   uint64              `cbor:"16,keyasint,omitempty" json:"storage,omitempty"` // bytes that it keeps for stores; 0: it is no location
	Location  [32]byte            `cbor:"17,keyasint,omitzero" json:"-"`                  // SHA-256 of the SubjectPublicKeyInfo of its location's TLS key
}

// Gateway is a public Edge.
type Gateway struct {
	ID      identity.GatewayID `cbor:"1,keyasint" json:"id"`
	Name    string             `cbor:"2,keyasint" json:"name"`
	Address string             `cbor:"3,keyasint" json:"address"`
}

// States of a Contract. An active one, and one that is about to end, has its workloads assigned.
const (
	Active     = "active"
	Paused     = "paused"     // its workloads stand still; all else it keeps
	Cancelling = "cancelling" // it ends at Due, unless that is taken back
	Cancelled  = "cancelled"  // its data is kept until Due
	Retired    = "retired"    // for good
)

// MaxRevisions bounds how many revisions a contract's record lists. Their headers stay on the ledger, each naming the one
// before.
const MaxRevisions = 1024

// Contract is a contract's head.
type Contract struct {
	ID        contract.ID           `cbor:"1,keyasint" json:"id"`
	Account   identity.AccountID    `cbor:"2,keyasint" json:"account"`
	Name      string                `cbor:"3,keyasint" json:"name"`
	Current   contract.RevisionID   `cbor:"4,keyasint" json:"current"`
	State     string                `cbor:"5,keyasint" json:"state"`
	Revisions []contract.RevisionID `cbor:"6,keyasint" json:"revisions"`               // the newest ones, oldest first
	Times     []int64               `cbor:"7,keyasint" json:"times"`                   // block time of each of these, Unix seconds
	Revision  uint32                `cbor:"8,keyasint" json:"revision"`                // number of the current one
	Due       int64                 `cbor:"9,keyasint,omitempty" json:"due,omitempty"` // block time of its next state, Unix milliseconds

	Good     contract.RevisionID `cbor:"10,keyasint,omitzero" json:"good,omitzero"`       // the last one that was ready everywhere
	Latest   uint32              `cbor:"11,keyasint,omitempty" json:"latest,omitempty"`   // number of the newest, when that was undone
	Trial    Trial               `cbor:"12,keyasint,omitzero" json:"trial,omitzero"`      // of the current one, until it is good
	Failures []Failure           `cbor:"13,keyasint,omitempty" json:"failures,omitempty"` // of revisions that were undone, the newest last
}

// Over says whether the contract has ended: its name is free.
func (c *Contract) Over() bool { return c.State == Cancelled || c.State == Retired }

// Runs says whether the contract's workloads are assigned.
func (c *Contract) Runs() bool { return c.State == Active || c.State == Cancelling }

// Network is a contract's network.
type Network struct {
	ID       contract.NetworkID `cbor:"1,keyasint"`
	Contract contract.ID        `cbor:"2,keyasint"`
	Name     string             `cbor:"3,keyasint"`
	Index    uint16             `cbor:"4,keyasint"` // its UDP port on every node is 30000 + Index
}

// Volume is where a contract's volume is.
type Volume struct {
	ID       contract.VolumeID `cbor:"1,keyasint"`
	Contract contract.ID       `cbor:"2,keyasint"`
	Name     string            `cbor:"3,keyasint"`
	Size     uint64            `cbor:"4,keyasint"`
	Node     identity.NodeID   `cbor:"5,keyasint"`
	Created  bool              `cbor:"6,keyasint,omitempty"` // its disk exists there: absent is lost, not new
	Sequence uint64            `cbor:"7,keyasint,omitempty"` // of the newest snapshot that the ledger heard of; 0: of none. With one the volume follows its workload
	Snapshot [32]byte          `cbor:"8,keyasint,omitzero"`  // its digest
	From     [32]byte          `cbor:"9,keyasint,omitzero"`  // digest of the snapshot that its owner wants back; zero: the newest
}

// Restore says whether the volume's disk is to be made from a snapshot: From, or the newest, which is Sequence or a later one.
func (v *Volume) Restore() bool { return !v.Created && v.Sequence > 0 }

// Assignment is the ledger's word that a node runs a workload. Epoch grows with every move and never shrinks.
type Assignment struct {
	Workload contract.WorkloadID `cbor:"1,keyasint" json:"workload"`
	Service  string              `cbor:"2,keyasint" json:"service"`
	Replica  uint16              `cbor:"3,keyasint" json:"replica"`
	Node     identity.NodeID     `cbor:"4,keyasint" json:"node"` // zero: on none
	Epoch    uint64              `cbor:"5,keyasint" json:"epoch"`
	Reason   string              `cbor:"6,keyasint,omitempty" json:"reason,omitempty"`  // why it does not run
	Height   int64               `cbor:"7,keyasint" json:"height"`                      // of the last change
	Fenced   bool                `cbor:"8,keyasint,omitempty" json:"fenced,omitempty"`  // has a volume: stops when its node's lease ends
	Old      bool                `cbor:"9,keyasint,omitempty" json:"old,omitempty"`     // it still runs Assignments.From
	Ready    bool                `cbor:"10,keyasint,omitempty" json:"ready,omitempty"`  // its node said so, of the revision on trial
	Failed   bool                `cbor:"11,keyasint,omitempty" json:"failed,omitempty"` // its node said so
}

// Assignments of one contract. Floor is the highest epoch of any workload that a revision dropped. A workload that comes
// begins above it: it may be one that was dropped, and its epochs never shrink.
type Assignments struct {
	Revision contract.RevisionID `cbor:"1,keyasint"`
	Current  []Assignment        `cbor:"2,keyasint,omitempty"`
	Floor    uint64              `cbor:"3,keyasint,omitempty"`
	From     contract.RevisionID `cbor:"4,keyasint,omitzero"` // the revision before, while that of Revision is on trial and takes its place
}

// Route leads a host name to a service of a contract.
type Route struct {
	Host     string      `cbor:"1,keyasint" json:"host"`
	Contract contract.ID `cbor:"2,keyasint" json:"contract"`
	Service  string      `cbor:"3,keyasint" json:"service"`
	Port     uint16      `cbor:"4,keyasint" json:"port"`
}
