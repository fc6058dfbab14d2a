package ledger

import (
	"errors"
	"fmt"
	"time"

	"holdfast/contract"
	"holdfast/identity"
	"holdfast/internal/canonical"
)

// MaxTx bounds a transaction: a header of 64 KiB, or an account's or a grid's envelopes, with their signatures.
const MaxTx = 512 << 10

// Kind says what a transaction does and so what its payload is.
type Kind string

// The kinds of this version and their payloads.
const (
	KindAccountCreate  Kind = "account.create"   // AccountCreate, signed by every device in it
	KindAccountQuota   Kind = "account.quota"    // AccountQuota, by the grid's account
	KindAccountPolicy  Kind = "account.policy"   // AccountPolicy, by the account; it takes effect later
	KindFarmAdmit      Kind = "farm.admit"       // FarmAdmit, by the grid's account
	KindNodeAdmit      Kind = "node.admit"       // NodeAdmit, by the farm's owner
	KindNodeUpdate     Kind = "node.update"      // NodeUpdate, by the node
	KindGatewayAdmit   Kind = "gateway.admit"    // GatewayAdmit, by the grid's account
	KindContractSubmit Kind = "contract.submit"  // ContractSubmit, by the contract's account
	KindContractCancel Kind = "contract.cancel"  // ContractCancel, by the contract's account
	KindContractState  Kind = "contract.state"   // ContractState, by the contract's account
	KindTemplate       Kind = "template.publish" // TemplatePublish, by the account whose template it is
	KindImageSign      Kind = "image.sign"       // ImageSign, by the account whose signature it is
	KindConsent        Kind = "consent"          // Consent, by a party of what is proposed
	KindWithdraw       Kind = "withdraw"         // Withdraw, by the account that proposed
	KindEnvelopePut    Kind = "envelope.put"     // EnvelopePut, by the contract's account or a node that holds an envelope
	KindVolumeCreated  Kind = "volume.created"   // VolumeCreated, by the node that the volume is on
	KindVolumeSaved    Kind = "volume.saved"     // VolumeSaved, by the same
	KindVolumeRestore  Kind = "volume.restore"   // VolumeRestore, by the contract's account
	KindWorkloadReport Kind = "workload.report"  // WorkloadReport, by the node that the workload is on
	KindValidatorJoin  Kind = "validator.join"   // ValidatorJoin, by the grid's account
	KindValidatorLeave Kind = "validator.leave"  // ValidatorLeave, by the grid's account
)

// Tx is a signed transaction. Signatures are over everything else: grid, actor, nonce, kind and payload.
type Tx struct {
	Version    uint8           `cbor:"1,keyasint"`
	Grid       identity.GridID `cbor:"2,keyasint"`
	Kind       Kind            `cbor:"3,keyasint"`
	Actor      Actor           `cbor:"4,keyasint"`
	Nonce      uint64          `cbor:"5,keyasint"` // one more than the actor's last
	Payload    []byte          `cbor:"6,keyasint"`
	Signatures []TxSignature   `cbor:"7,keyasint,omitempty"`
	Until      int64           `cbor:"8,keyasint,omitempty"` // Unix seconds: no block of a later time executes it; none in account.create
}

// MaxTxLife is how far ahead a transaction's Until can be. What was signed, refused before it came into a block, and given
// up must not come true in a year: whoever has the bytes can send them again.
const MaxTxLife = 7 * 24 * time.Hour

// Actor is who acts: an account or a node.
type Actor struct {
	Node bool     `cbor:"1,keyasint,omitempty"`
	ID   [32]byte `cbor:"2,keyasint"` // zero in account.create, whose transaction makes the ID
}

// TxSignature is one key's signature.
type TxSignature struct {
	Key       [32]byte           `cbor:"1,keyasint"` // DeviceID or NodeID
	Signature identity.Signature `cbor:"2,keyasint"`
}

const txPurpose = "holdfast/tx/v1"

// NewTx makes an unsigned transaction. Its Until is still to be set, but for account.create, which has none.
func NewTx(grid identity.GridID, kind Kind, actor Actor, nonce uint64, payload any) *Tx {
	return &Tx{Version: 1, Grid: grid, Kind: kind, Actor: actor, Nonce: nonce, Payload: canonical.Encode(payload)}
}

// signBytes is the encoding without the signatures.
func (tx *Tx) signBytes() []byte {
	bare := *tx
	bare.Signatures = nil
	return canonical.Encode(&bare)
}

// ID is the digest of what is signed; signatures are not part of it. It is the AccountID or FarmID of what the
// transaction creates.
func (tx *Tx) ID() [32]byte { return canonical.Digest("holdfast/tx-id/v1", tx.signBytes()) }

// Sign adds a signature.
func (tx *Tx) Sign(k *identity.PrivateKey) {
	pub := k.Public()
	tx.Signatures = append(tx.Signatures, TxSignature{pub.Digest(), k.Sign(txPurpose, tx.signBytes())})
}

// Encode is the form that goes to the ledger.
func (tx *Tx) Encode() []byte { return canonical.Encode(tx) }

// DecodeTx reads a transaction and checks what needs no state.
func DecodeTx(b []byte) (*Tx, error) {
	var tx Tx
	if err := canonical.Decode(b, MaxTx, &tx); err != nil {
		return nil, fmt.Errorf("transaction: %w", err)
	}
	if tx.Version != 1 {
		return nil, fmt.Errorf("transaction: version %d is not known", tx.Version)
	}
	if len(tx.Signatures) == 0 || len(tx.Signatures) > identity.MaxDevices {
		return nil, fmt.Errorf("transaction: %d signatures", len(tx.Signatures))
	}
	for i := range tx.Signatures {
		for j := range i {
			if tx.Signatures[i].Key == tx.Signatures[j].Key {
				return nil, errors.New("transaction: the same key signed twice")
			}
		}
	}
	return &tx, nil
}

// AccountCreate makes an account.
type AccountCreate struct {
	Devices []identity.Device   `cbor:"1,keyasint"`
	Policy  identity.Policy     `cbor:"2,keyasint"`
	Sealing identity.SealingKey `cbor:"3,keyasint"`
}

// AccountQuota gives an account a quota of its own, in place of its part in what all others share.
type AccountQuota struct {
	Account identity.AccountID `cbor:"1,keyasint"`
	Quota   Quota              `cbor:"2,keyasint"`
}

// FarmAdmit makes a farm of an owner.
type FarmAdmit struct {
	Name  string             `cbor:"1,keyasint"`
	Owner identity.AccountID `cbor:"2,keyasint"`
}

// NodeAdmit makes a machine a node of a farm.
type NodeAdmit struct {
	Farm      identity.FarmID     `cbor:"1,keyasint"`
	Name      string              `cbor:"2,keyasint"`
	Key       identity.PublicKey  `cbor:"3,keyasint"`
	Sealing   identity.SealingKey `cbor:"4,keyasint"`
	WireGuard [32]byte            `cbor:"5,keyasint"`           // X25519 public key
	TLS       [32]byte            `cbor:"6,keyasint"`           // SHA-256 of the SubjectPublicKeyInfo of the node's TLS key
	Session   [32]byte            `cbor:"7,keyasint"`           // Ed25519 key that signs heartbeats
	Endpoints []string            `cbor:"8,keyasint,omitempty"` // underlay addresses without port
	CPUMilli  uint32              `cbor:"9,keyasint"`
	Memory    uint64              `cbor:"10,keyasint"`
	Proof     identity.Signature  `cbor:"11,keyasint"`           // by Key over ProofBytes: the node agrees to be of that farm
	Storage   uint64              `cbor:"12,keyasint,omitempty"` // bytes that it keeps for stores; 0: it is no location
	Location  [32]byte            `cbor:"13,keyasint,omitzero"`  // SHA-256 of the SubjectPublicKeyInfo of its location's TLS key
}

// MaxNodeAdmit bounds an encoded NodeAdmit that is not in a transaction: keys, proof, eight endpoints.
const MaxNodeAdmit = 16 << 10

// Encode is the form in which a machine asks to be admitted.
func (n *NodeAdmit) Encode() []byte { return canonical.Encode(n) }

// DecodeNodeAdmit reads what a machine asks; nothing of it is checked yet.
func DecodeNodeAdmit(b []byte) (*NodeAdmit, error) {
	var n NodeAdmit
	if err := canonical.Decode(b, MaxNodeAdmit, &n); err != nil {
		return nil, fmt.Errorf("node.admit: %w", err)
	}
	return &n, nil
}

// Check checks what needs no state: name, endpoints, and the proof that the node agrees.
func (n *NodeAdmit) Check(grid identity.GridID) error {
	if err := n.valid(); err != nil {
		return err
	}
	if err := n.Key.Verify(NodeAdmitPurpose, n.ProofBytes(grid), &n.Proof); err != nil {
		return fmt.Errorf("proof of %v: %w", n.Key.Node(), err)
	}
	return nil
}

func (n *NodeAdmit) valid() error {
	if err := validName(n.Name); err != nil {
		return err
	}
	if (n.Storage > 0) != (n.Location != [32]byte{}) {
		return errors.New("a location has both storage and a key")
	}
	if n.Storage > MaxStorage {
		return fmt.Errorf("%d bytes of storage, at most %d are allowed", n.Storage, uint64(MaxStorage))
	}
	return validEndpoints(n.Endpoints)
}

// MaxStorage is the most that one node keeps for stores.
const MaxStorage = 1 << 60

// ProofBytes is what the node signs to be admitted.
func (n *NodeAdmit) ProofBytes(grid identity.GridID) []byte {
	bare := *n
	bare.Proof = identity.Signature{}
	d := canonical.Digest("holdfast/node-admit/v1", grid[:], canonical.Encode(&bare))
	return d[:]
}

// NodeAdmitPurpose is the purpose of a NodeAdmit's Proof.
const NodeAdmitPurpose = "holdfast/node-admit/v1"

// NodeUpdate changes what a node says of itself.
type NodeUpdate struct {
	Session   [32]byte `cbor:"1,keyasint"`
	Endpoints []string `cbor:"2,keyasint,omitempty"`
}

// GatewayAdmit makes a machine a gateway.
type GatewayAdmit struct {
	Name    string   `cbor:"1,keyasint"`
	TLS     [32]byte `cbor:"2,keyasint"` // SHA-256 of the SubjectPublicKeyInfo: the GatewayID
	Address string   `cbor:"3,keyasint"` // host:port that nodes dial
}

// ContractSubmit is a revision with the envelopes of its keys.
type ContractSubmit struct {
	Header    []byte              `cbor:"1,keyasint"`
	Envelopes []contract.Envelope `cbor:"2,keyasint"`
}

// ContractCancel ends a contract.
type ContractCancel struct {
	Contract contract.ID `cbor:"1,keyasint"`
}

// ContractState pauses a contract, sets a paused one to work again, or takes back that it ends.
type ContractState struct {
	Contract contract.ID `cbor:"1,keyasint"`
	State    string      `cbor:"2,keyasint"` // Paused or Active
}

// AccountPolicy replaces an account's policy.
type AccountPolicy struct {
	Policy identity.Policy `cbor:"1,keyasint"`
}

// TemplatePublish puts a version of a template on the ledger, for good. Its document is a blob.
type TemplatePublish struct {
	Name    string   `cbor:"1,keyasint"`
	Version string   `cbor:"2,keyasint"`
	Digest  [32]byte `cbor:"3,keyasint"` // SHA-256 of the document
	Size    uint32   `cbor:"4,keyasint"` // bytes
}

// ImageSign puts an account's signature on an image, or takes it back.
type ImageSign struct {
	Digest [32]byte `cbor:"1,keyasint"` // SHA-256 of the manifest
	Revoke bool     `cbor:"2,keyasint,omitempty"`
}

// Consent is an account's word to a proposal: the ID is a digest of all that the proposal does.
type Consent struct {
	Proposal ProposalID `cbor:"1,keyasint"`
}

// Withdraw ends a proposal that has not come true yet.
type Withdraw struct {
	Proposal ProposalID `cbor:"1,keyasint"`
}

// EnvelopePut adds or replaces envelopes of one revision.
type EnvelopePut struct {
	Envelopes []contract.Envelope `cbor:"1,keyasint"`
}

// VolumeCreated says that a volume's disk now exists: from here on an absent disk is a loss, never a fresh start.
type VolumeCreated struct {
	Volume contract.VolumeID `cbor:"1,keyasint"`
}

// VolumeSaved says that a snapshot of a volume is in its store: from now on the volume can follow its workload, and no
// earlier one is taken for the newest.
type VolumeSaved struct {
	Volume   contract.VolumeID `cbor:"1,keyasint"`
	Sequence uint64            `cbor:"2,keyasint"`
	Snapshot [32]byte          `cbor:"3,keyasint"`
}

// VolumeRestore puts a volume back to one of its snapshots. Its workload starts anew.
type VolumeRestore struct {
	Volume   contract.VolumeID `cbor:"1,keyasint"`
	Snapshot [32]byte          `cbor:"2,keyasint"` // digest of its manifest (package volume)
}
