// Package ledger is the grid's memory: a deterministic state machine from (State, Block) to State. It holds accounts,
// farms, nodes, gateways, contracts with all their revisions, and the assignments that it computes itself (package
// schedule) from committed state only. It has no clock and no I/O: time comes from the block. States are immutable
// values; a State can be read while its successor is computed. Records are deterministic CBOR under the names of
// records.go, in a Merkle tree (trie.go) whose root every block carries, so that each answer can be proved.
package ledger

import (
	"errors"
	"fmt"
	"iter"
	"slices"
	"sync"
	"time"

	"holdfast/contract"
	"holdfast/identity"
	"holdfast/internal/canonical"
	"holdfast/schedule"
)

// maxRecord bounds a record that is read back; what is written is bounded by transactions.
const maxRecord = 4 << 20

// State is one version of the ledger.
type State struct {
	tree  *trieNode
	clock clock
	sigs  *signatures
	birth *Genesis        // the tree's genesis, kept at hand: it is read with every block and never changes
	fleet []schedule.Node // the tree's nodes with the room that is left, kept at hand; never changed in place
	set   []Validator     // the tree's validators, kept at hand; never changed in place
	setAt int64           // the height of the block that made set; 0: the genesis
	told  []told          // of the block that made it, outside the tree
}

// clock is what the machine remembers of time. It is the same on every validator, but outside the Merkle tree: it
// changes with every block, and a root that changes makes CometBFT start the next block at once.
type clock struct {
	Time  int64 `cbor:"1,keyasint"` // Unix milliseconds of the last block
	Grace int64 `cbor:"2,keyasint"` // until then no node is taken for down
}

// clockKey is the name under which the clock is persisted beside the records.
const clockKey = "\x00clock"

// Block is what a height brings.
type Block struct {
	Height int64
	Time   time.Time
	Txs    [][]byte
	Heard  []Heard
	// Offenders are validators of which there is proof that they voted for two blocks of one height: the first 20 bytes of
	// their ValidatorID each.
	Offenders [][20]byte
}

// Heard is one validator's word of which nodes it has heard within lease and margin.
type Heard struct {
	Power int64  // in the set that voted, whatever the set is by now
	Nodes Bitmap // by Node.Index; nil: the validator said nothing
}

// Result of a transaction. Code 0 is accepted.
type Result struct {
	Code uint32
	Log  string
}

// Codes of a Result.
const (
	CodeOK      = 0
	CodeInvalid = 1 // malformed, wrong signature, wrong grid
	CodeNonce   = 2 // replayed or out of order
	CodeRefused = 3 // against a rule
)

// New is the state that a genesis begins with.
func New(g *Genesis) (*State, error) {
	birth, err := Decode[Genesis](g.Encode()) // its own, whatever becomes of g
	if err != nil {
		return nil, fmt.Errorf("genesis: %w", err)
	}
	b := &batch{State: State{sigs: newSignatures(), birth: birth, set: birth.Validators}}
	acct := identity.Account{ID: g.GridAccount(), Devices: g.Devices, Policy: g.Policy, Sealing: g.Sealing}
	if err := acct.Validate(); err != nil {
		return nil, fmt.Errorf("genesis: grid account: %w", err)
	}
	set(b, AccountKey(acct.ID), &acct)
	set(b, GridKey, &Grid{ID: g.GridID(), Account: acct.ID, NextNetwork: 1})
	set(b, genesisKey, g)
	if birth.Store != (Store{}) {
		if err := b.addStore(&birth.Store); err != nil {
			return nil, fmt.Errorf("genesis: %w", err)
		}
	}
	return &b.State, nil
}

const genesisKey = "genesis"

// Load rebuilds a state from what Changes gave over time.
func Load(all iter.Seq2[string, []byte]) (*State, error) {
	s := &State{sigs: newSignatures()}
	for k, v := range all {
		if k == clockKey {
			if err := canonical.Decode(v, 64, &s.clock); err != nil {
				return nil, fmt.Errorf("load clock: %w", err)
			}
			continue
		}
		s.tree = s.tree.put(k, v)
	}
	var err error
	if s.birth, err = get[Genesis](s, genesisKey); err != nil && !errors.Is(err, ErrAbsent) {
		return nil, fmt.Errorf("load genesis: %w", err)
	}
	if s.fleet, err = readFleet(s); err != nil {
		return nil, err
	}
	if s.set, s.setAt, err = readSet(s); err != nil {
		return nil, err
	}
	return s, nil
}

// Root is the Merkle root of all records.
func (s *State) Root() [32]byte { return s.tree.root() }

// Get returns a record, nil if absent, and the proof of either.
func (s *State) Get(key string) (value, proof []byte) {
	v, p := s.tree.prove(key)
	return v, canonical.Encode(p)
}

// Changes yields what to persist to turn since (nil: nothing) into s; a nil value deletes.
func (s *State) Changes(since *State) iter.Seq2[string, []byte] {
	return func(yield func(string, []byte) bool) {
		var old *trieNode
		if since != nil {
			old = since.tree
		}
		if s.tree.changes(old, yield) {
			yield(clockKey, canonical.Encode(&s.clock))
		}
	}
}

// Genesis is the document that the grid began with. It is not to be changed.
func (s *State) Genesis() (*Genesis, error) {
	if s.birth == nil {
		return nil, fmt.Errorf("genesis: %w", ErrAbsent)
	}
	return s.birth, nil
}

// ErrAbsent is returned for a record that is not there.
var ErrAbsent = errors.New("not on the ledger")

// get reads a record.
func get[T any](s *State, key string) (*T, error) {
	b, ok := s.tree.get(key)
	if !ok {
		return nil, ErrAbsent
	}
	return Decode[T](b)
}

// Decode reads a record's bytes, as a View returns them.
func Decode[T any](b []byte) (*T, error) {
	v := new(T)
	if err := canonical.Decode(b, maxRecord, v); err != nil {
		return nil, fmt.Errorf("record: %w", err)
	}
	return v, nil
}

// batch is a State under change. It is a copy: what a failed transaction wrote is dropped with it.
type batch struct {
	State
	height  int64
	subject contract.ID // of the transaction that was executed, zero without one
	began   []Validator // the set before the block
}

func set[T any](b *batch, key string, v *T) { b.tree = b.tree.put(key, canonical.Encode(v)) }

func (b *batch) del(key string) { b.tree = b.tree.del(key) }

// Check says whether tx would be accepted now.
func (s *State) Check(tx []byte) error {
	b := &batch{State: *s, began: s.set}
	_, _, err := b.apply(tx)
	return err
}

// Verify checks the parts of a transaction that make a proposal invalid as a whole: form, grid and signatures.
func (s *State) Verify(raw []byte) error {
	tx, err := DecodeTx(raw)
	if err != nil {
		return err
	}
	_, err = s.authenticate(raw, tx)
	return err
}

// Apply computes the next state. It does not fail: a transaction that is refused leaves nothing but its Result and, when its
// signers could have done such a thing, a used nonce. Otherwise what was refused once could be executed years later, by
// whoever kept it.
func (s *State) Apply(blk Block) (*State, []Result) {
	b := &batch{State: *s, height: blk.Height, began: s.set}
	b.told = nil
	now := blk.Time.UnixMilli()
	for _, address := range blk.Offenders {
		b.expel(address)
	}
	results := make([]Result, len(blk.Txs))
	for i, raw := range blk.Txs {
		try := *b
		try.clock.Time = now
		tx, code, err := try.apply(raw)
		if err != nil {
			results[i] = Result{Code: code, Log: err.Error()}
			if tx != nil {
				set(b, NonceKey(tx.Actor), &tx.Nonce)
			}
			continue
		}
		b.tree, b.fleet, b.set, b.setAt = try.tree, try.fleet, try.set, try.setAt
		if try.subject != (contract.ID{}) {
			b.told = append(b.told, told{i, try.subject})
		}
	}
	if g, err := b.Genesis(); err == nil {
		lease := g.Lease.Milliseconds()
		// A jump of time longer than a lease means that the ledger stood still, and with it the ears of all: everybody
		// gets one more lease.
		if s.clock.Time != 0 && now-s.clock.Time > lease {
			b.clock.Grace = now + lease + g.Margin.Milliseconds()
		}
		// Until the new set votes, nodes count by the old one who has heard them; and what comes into it may never have.
		if b.setAt > 0 && blk.Height <= b.setAt+2 {
			b.clock.Grace = now + lease + g.Margin.Milliseconds()
		}
		b.clock.Time = now
		for _, id := range b.liveness(blk.Heard) {
			b.move(id)
		}
	}
	b.clock.Time = now
	b.due()
	b.retry()
	return &b.State, results
}

// liveness changes nodes between up and down by what validators with more than 2/3 of the power agree on. It returns the
// contracts that this concerns: those with a workload on a node that changed, in the order of nodes and of their lists.
func (b *batch) liveness(heard []Heard) (concerned []contract.ID) {
	var total int64
	for _, h := range heard {
		total += h.Power
	}
	if total == 0 {
		return nil
	}
	var changed []int
	for i := range b.fleet {
		var yes, no int64
		for _, h := range heard {
			switch {
			case h.Nodes == nil:
			case h.Nodes.Has(i):
				yes += h.Power
			default:
				no += h.Power
			}
		}
		if 3*yes <= 2*total && 3*no <= 2*total {
			continue
		}
		up := 3*yes > 2*total
		if b.fleet[i].Up == up || (!up && b.clock.Time < b.clock.Grace) {
			continue
		}
		id := identity.NodeID(b.fleet[i].ID)
		n, err := get[Node](&b.State, NodeKey(id))
		if err != nil {
			continue
		}
		n.Up, n.Since = up, b.clock.Time
		set(b, NodeKey(id), n)
		changed = append(changed, i)
	}
	if len(changed) == 0 {
		return nil
	}
	b.fleet = slices.Clone(b.fleet)
	seen := map[contract.ID]bool{}
	for _, i := range changed {
		b.fleet[i].Up = !b.fleet[i].Up
		if b.fleet[i].Up {
			b.more()
		}
		ids, err := list[contract.ID](&b.State, NodeWorkKey(identity.NodeID(b.fleet[i].ID)))
		if err != nil {
			continue // the node's own view is broken likewise; others are not held up
		}
		for _, id := range ids {
			if !seen[id] {
				seen[id], concerned = true, append(concerned, id)
			}
		}
	}
	return concerned
}

// Bitmap is a set of node indices: bit i%8 of byte i/8. A Bitmap that is not nil is a statement, even when empty.
type Bitmap []byte

// MaxNodes bounds a grid in this version, and so a Bitmap.
const MaxNodes = 1 << 16

// Has reports whether index i is in the set.
func (m Bitmap) Has(i int) bool { return i/8 < len(m) && m[i/8]>>(i%8)&1 == 1 }

// With returns the set with i added.
func (m Bitmap) With(i int) Bitmap {
	out := make(Bitmap, max(len(m), i/8+1))
	copy(out, m)
	out[i/8] |= 1 << (i % 8)
	return out
}

// signatures remembers which hybrid signatures were verified, by digest of all that they depend on: the same
// transaction is checked at the mempool, in the proposal and in the block.
type signatures struct {
	mu   sync.Mutex
	good map[[32]byte]struct{}
}

const maxSignatures = 1 << 14

func newSignatures() *signatures { return &signatures{good: map[[32]byte]struct{}{}} }

func (c *signatures) verify(key *identity.PublicKey, purpose string, msg []byte, sig *identity.Signature) error {
	d := canonical.Digest("holdfast/signature-cache/v1", key[:], []byte(purpose), msg, sig[:])
	c.mu.Lock()
	_, ok := c.good[d]
	c.mu.Unlock()
	if ok {
		return nil
	}
	if err := key.Verify(purpose, msg, sig); err != nil {
		return err
	}
	c.mu.Lock()
	if len(c.good) >= maxSignatures {
		clear(c.good)
	}
	c.good[d] = struct{}{}
	c.mu.Unlock()
	return nil
}
