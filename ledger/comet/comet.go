// Package comet replicates a deterministic state machine among validators through CometBFT, and lets clients read it
// without trusting any of them.
//
// A Validator holds one replica. Transactions enter through its API, are ordered by consensus, and applied by a State,
// which the package knows only by its interface. A Client speaks to validators' APIs, follows the chain of headers as a
// light client, and returns only values that a proof ties to a header that more than 2/3 of the voting power signed.
//
// The package never interprets keys, values or transactions, never takes a clock into the state machine, never exposes
// CometBFT's RPC, and is the only importer of cometbft. What goes over the wire is in docs/formats/ledger-api.md:
// deterministic CBOR over HTTP/2 over TLS 1.3, the server's key pinned.
//
// # State and header
//
// The state after block h has the root that the header of block h+1 carries as its app hash. A View of height h is
// therefore proved by header h+1 and the commit for it. A block whose root changed is followed at once by the block that
// proves it; when idle there is one empty block a second, so that block time moves.
//
// # First transaction of a block
//
// From height 2 on, transaction 0 of each block is the extended commit of the block before: the vote extensions in
// which validators say what they heard. It is not a client's transaction: validators refuse a proposal whose first
// transaction is not a valid extended commit (see extension.go), and the machine sees it as Block.Heard.
package comet

import (
	"crypto/tls"
	"iter"
	"log/slog"
	"net"
	"net/http"
	"time"
)

// Limits of this version.
const (
	MaxTx        = 512 << 10 // bytes of one transaction
	MaxBlock     = 4 << 20   // bytes of one block
	MaxExtension = 16 << 10  // bytes of one vote extension
	MaxKeys      = 256       // keys of one read
	MaxKey       = 1 << 10   // bytes of one key
	MaxChain     = 50        // bytes of a chain's name, CometBFT's limit
)

// A State is an immutable snapshot of the replicated machine. Its methods are called from several goroutines at once,
// have no clock, no randomness and no I/O, and give the same answer on every validator.
type State interface {
	// Root commits to every key and value.
	Root() [32]byte
	// Check says whether a transaction would be accepted on this state: form, signatures, nonce, rules.
	Check(tx []byte) error
	// Verify is the part of Check that later blocks cannot change: form and signatures. A validator refuses a whole
	// proposal that holds a transaction which fails it, so it must not depend on what other transactions of the same
	// block do. Good answers are remembered by the transaction's hash.
	Verify(tx []byte) error
	// Apply executes a block and returns the next state and one result for each transaction. It never fails: a bad
	// transaction changes nothing and gets a code other than 0.
	Apply(Block) (State, []Result)
	// Get returns the value of a key, nil when it is absent, and a proof of either.
	Get(key string) (value, proof []byte)
	// Changes lists the keys that differ from an older state, with a nil value for those that are gone. A nil state is
	// the empty one. It may list keys that Root does not cover, for Load.
	Changes(since State) iter.Seq2[string, []byte]
}

// An Elector is a State that says who votes. Members that differ from those of the state before vote, or do not, from the second
// block after that on. A State that is none keeps the validators of the genesis for ever.
type Elector interface {
	Validators() []Member // at least one; not to be changed
}

// A Machine makes states.
type Machine struct {
	Genesis func(Genesis) (State, error) // the state before block 1
	Load    Loader                       // the state after a restart
}

// A Loader rebuilds the state of a height from every key and value that Changes gave, in byte order of the keys.
type Loader func(height int64, all iter.Seq2[string, []byte]) (State, error)

// A Verifier checks that the state with this root has this value, or none when value is nil, at key.
type Verifier func(root [32]byte, key string, value, proof []byte) error

// A Block is what a State applies.
type Block struct {
	Height int64
	Time   time.Time // the median of the validators' clocks when they voted for the previous block
	Txs    [][]byte
	Heard  []Heard // the vote extensions of the previous height, in the order of the validator set
	// Offenders are the addresses of validators of which the block has proof that they signed two votes where one is allowed.
	Offenders [][]byte
}

// Heard is one validator's vote extension. Power without Data is a validator that did not vote or had nothing to say.
type Heard struct {
	Validator []byte // address: the first 20 bytes of SHA-256 of the validator's public key
	Power     int64
	Data      []byte
}

// A Result is what became of a transaction. Code 0 is success.
type Result struct {
	Code uint32
	Log  string // for people; validators need not agree on it
}

// Genesis is the start of a chain. Every validator and client of a grid has the same.
type Genesis struct {
	Chain      string    // 1 to MaxChain bytes; signatures cover it
	Time       time.Time // block 1's time
	Validators []Member  // at least one
	State      []byte    // opaque, for Machine.Genesis; clients do not need it
}

// A Member is a validator's public key and voting power.
type Member struct {
	Key   []byte // ML-DSA-65 public key, 1952 bytes
	Power int64  // at least 1
}

// Timeouts pace consensus. The zero value is for validators that are close together.
type Timeouts struct {
	Propose   time.Duration // 0 means 200ms
	Prevote   time.Duration // 0 means 100ms
	Precommit time.Duration // 0 means 100ms
	Commit    time.Duration // pause after each block; 0 means none
	Idle      time.Duration // time between empty blocks; 0 means 1s
}

// A Peer is another validator's consensus port.
type Peer struct {
	ID   string // Keys.Peer of that validator
	Addr string // host:port
}

// Config is a validator's configuration.
type Config struct {
	Home            string                    // directory of keys, signing state, chain and machine state; made when absent
	Genesis         Genesis                   // the same on every validator
	Machine         Machine                   // required
	P2P             string                    // host:port that consensus listens on; required
	Peers           []Peer                    // only these may connect to the consensus port
	API             net.Listener              // plain TCP; the validator speaks TLS on it and closes it
	TLS             tls.Certificate           // clients pin its key
	Timeouts        Timeouts                  //
	Extend          func(height int64) []byte // vote extension for a height, at most MaxExtension; nil means none
	VerifyExtension func(data []byte) error   // whether another validator's extension is well formed; nil accepts all
	Handlers        map[string]http.Handler   // further paths of the API, as http.ServeMux patterns
	Conns           int                       // of strangers to the API; 0 means 1024
	// Archive says under which names a transaction is kept for ever, with what shows that it is in the chain: that of an index
	// in the block that made s. Nil keeps nothing, and the blocks of a while.
	Archive func(s State, index int) []string
	Known   func(client Pin) bool // whose certificate has this key is no stranger and has a place of its own; nil knows nobody
	States  int                   // old states kept for proofs; 0 means 64
	Log     *slog.Logger          // nil discards
}
