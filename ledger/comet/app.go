package comet

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"strings"
	"sync"
	"time"

	abci "github.com/cometbft/cometbft/abci/types"
	"github.com/cometbft/cometbft/crypto"
	"github.com/cometbft/cometbft/types"

	"holdfast/internal/canonical"
)

// Keys of the machine's table.
const (
	keyMeta   = "meta" // meta
	keyValue  = "v"    // then the machine's key
	keyResult = "r"    // then a transaction's hash: stored
	keyOld    = "h"    // then a height, big endian, and a transaction's hash: nothing; to find old results
)

const (
	resultBlocks = 100_000 // blocks for which a transaction's result is kept
	keepBlocks   = 20_000  // blocks that CometBFT keeps
	pruneEvery   = 256     // blocks
	maxLog       = 1 << 10 // bytes of a result's log
)

// meta says of which height the machine's table is.
type meta struct {
	Version uint8    `cbor:"1,keyasint"` // 1
	Genesis [32]byte `cbor:"2,keyasint"` // digest, so that a home is not used for two chains
	Height  int64    `cbor:"3,keyasint"`
	Root    [32]byte `cbor:"4,keyasint"`
}

// stored is the result of a committed transaction.
type stored struct {
	Height int64  `cbor:"1,keyasint"`
	Code   uint32 `cbor:"2,keyasint"`
	Log    string `cbor:"3,keyasint"`
}

// app drives the machine for CometBFT. CometBFT calls the consensus methods from one goroutine, CheckTx from others.
type app struct {
	abci.BaseApplication

	genesis  Genesis
	digest   [32]byte // of genesis
	machine  Machine
	disk     *table
	keys     map[string]crypto.PubKey // by address, whoever was seen to vote
	sets     func(height int64) (*types.ValidatorSet, error)
	peers    map[string]bool // who may connect
	extend   func(int64) []byte
	wellForm func([]byte) error
	keep     int64
	log      *slog.Logger
	archive  archive

	verified verified

	mu      sync.Mutex
	changed chan struct{}   // closed and replaced when anything below changes
	height  int64           // committed
	state   State           // after height
	old     map[int64]State // the last keep states, by height
	proven  int64           // height of the newest state that a decided block proves; -1 before there is one
	at      time.Time       // the time of that block
	wakes   int             // blocks that may still be made only for their time, see wake
	moved   int64           // height at which the root last changed, at most proven
	waiting map[[32]byte][]chan Committed

	// Consensus only.
	next      State // after FinalizeBlock, before Commit
	nextAt    int64
	nextSaid  []stored
	nextTxs   [][32]byte
	nextRaw   [][]byte // all of the block
	lastMoved int64    // height at which the root last changed, whether proven or not
	lastRoot  [32]byte
}

func newApp(c *Config, disk *table, log *slog.Logger) (*app, error) {
	a := &app{
		genesis: c.Genesis, digest: c.Genesis.digest(), machine: c.Machine, disk: disk, extend: c.Extend,
		wellForm: c.VerifyExtension, keep: int64(c.States), log: log, archive: newArchive(c, disk.disk),
		keys: map[string]crypto.PubKey{}, peers: map[string]bool{},
		changed: make(chan struct{}), wakes: 4, old: map[int64]State{}, proven: -1, waiting: map[[32]byte][]chan Committed{},
	}
	set, err := c.Genesis.validators()
	if err != nil {
		return nil, err
	}
	for _, v := range set.Validators {
		a.keys[string(v.Address)] = v.PubKey
	}
	a.sets = func(int64) (*types.ValidatorSet, error) { return set, nil }
	for _, p := range c.Peers {
		a.peers[p.ID] = true
	}
	b, err := disk.Get([]byte(keyMeta))
	if err != nil {
		return nil, fmt.Errorf("read machine state: %w", err)
	}
	if b == nil {
		return a, nil
	}
	var m meta
	if err := canonical.Decode(b, 1<<10, &m); err != nil {
		return nil, fmt.Errorf("read machine state: %w", err)
	}
	if m.Version != 1 || m.Genesis != a.digest {
		return nil, errors.New("read machine state: it is of another version or another chain")
	}
	var broken error
	s, err := a.machine.Load(m.Height, a.stored(&broken))
	if err = errors.Join(broken, err); err != nil {
		return nil, fmt.Errorf("load machine state of height %d: %w", m.Height, err)
	}
	if s.Root() != m.Root {
		return nil, fmt.Errorf("load machine state of height %d: its root is %x, it was %x", m.Height, s.Root(), m.Root)
	}
	a.height, a.state, a.lastMoved, a.lastRoot = m.Height, s, m.Height, m.Root
	a.old[m.Height] = s
	return a, nil
}

// stored walks the machine's keys in their order.
func (a *app) stored(broken *error) iter.Seq2[string, []byte] {
	return func(yield func(string, []byte) bool) {
		it, err := a.disk.iterator([]byte(keyValue), []byte{keyValue[0] + 1}, false)
		if err != nil {
			*broken = err
			return
		}
		defer it.Close()
		for ; it.Valid(); it.Next() {
			if !yield(string(it.Key()[1:]), it.Value()) {
				return
			}
		}
		*broken = it.Error()
	}
}

// touch wakes everybody who waits for a change. a.mu is held.
func (a *app) touch() {
	close(a.changed)
	a.changed = make(chan struct{})
}

// Info is where CometBFT learns which blocks it has to replay.
func (a *app) Info(context.Context, *abci.RequestInfo) (*abci.ResponseInfo, error) {
	r := &abci.ResponseInfo{Data: "holdfast", Version: "1", AppVersion: 1}
	if a.state != nil {
		root := a.state.Root()
		r.LastBlockHeight, r.LastBlockAppHash = a.height, root[:]
	}
	return r, nil
}

// InitChain makes the state before block 1. CometBFT repeats it until block 1 is committed.
func (a *app) InitChain(context.Context, *abci.RequestInitChain) (*abci.ResponseInitChain, error) {
	s, err := a.machine.Genesis(a.genesis)
	if err != nil {
		return nil, fmt.Errorf("make genesis state: %w", err)
	}
	root := s.Root()
	a.mu.Lock()
	defer a.mu.Unlock()
	a.height, a.state, a.lastRoot = 0, s, root
	a.old[0] = s
	return &abci.ResponseInitChain{AppHash: root[:]}, nil
}

// Query admits peers; nothing else is asked by query.
func (a *app) Query(_ context.Context, r *abci.RequestQuery) (*abci.ResponseQuery, error) {
	if strings.HasPrefix(r.Path, "/p2p/filter/addr/") {
		return &abci.ResponseQuery{}, nil // the peer's key decides, see below
	}
	if id, ok := strings.CutPrefix(r.Path, "/p2p/filter/id/"); ok && a.peers[id] {
		return &abci.ResponseQuery{}, nil
	}
	return &abci.ResponseQuery{Code: 1, Log: "not a peer of this validator"}, nil
}

// wake is put into the mempool at the start and never gets into a block: a proposal leaves it out. The first block after
// a pause has the time at which the pause began, and clients take it for stale; this makes CometBFT go on at once to the
// block that has the time of now, instead of a second or two later.
const wake = "holdfast/wake"

// fresh is how near the time of the newest block is to now when the chain runs.
const fresh = 10 * time.Second

func (a *app) awake() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.wakes <= 0 || a.proven > 0 && time.Since(a.at) < fresh
}

// CheckTx lets a transaction into the mempool, or keeps it there after a block.
func (a *app) CheckTx(_ context.Context, r *abci.RequestCheckTx) (*abci.ResponseCheckTx, error) {
	if string(r.Tx) == wake {
		if a.awake() {
			return &abci.ResponseCheckTx{Code: 1, Log: "awake"}, nil
		}
		return &abci.ResponseCheckTx{}, nil
	}
	if err := a.check(r.Tx); err != nil {
		return &abci.ResponseCheckTx{Code: 1, Log: short(err.Error())}, nil
	}
	return &abci.ResponseCheckTx{}, nil
}

func (a *app) check(tx []byte) error {
	if len(tx) == 0 || len(tx) > MaxTx {
		return fmt.Errorf("transaction of %d bytes, from 1 to %d are allowed", len(tx), MaxTx)
	}
	a.mu.Lock()
	s := a.state
	a.mu.Unlock()
	return s.Check(tx)
}

func (a *app) verify(s State, tx []byte) error {
	if len(tx) == 0 || len(tx) > MaxTx {
		return fmt.Errorf("transaction of %d bytes, from 1 to %d are allowed", len(tx), MaxTx)
	}
	h := sha256.Sum256(tx)
	if a.verified.has(h) {
		return nil
	}
	if err := s.Verify(tx); err != nil {
		return err
	}
	a.verified.add(h)
	return nil
}

// PrepareProposal puts the extended commit in front and leaves out what other validators would refuse.
func (a *app) PrepareProposal(_ context.Context, r *abci.RequestPrepareProposal) (*abci.ResponsePrepareProposal, error) {
	var out [][]byte
	var size int64
	if r.Height > 1 {
		x := extend(r.Height, r.LocalLastCommit)
		out = append(out, x)
		size = types.ComputeProtoSizeForTxs([]types.Tx{x})
	}
	var total int64
	for _, tx := range r.Txs {
		if string(tx) == wake || a.verify(a.state, tx) != nil {
			continue
		}
		n := types.ComputeProtoSizeForTxs([]types.Tx{tx})
		if size+n > r.MaxTxBytes || total+n > MaxBlock {
			break
		}
		size, total = size+n, total+n
		out = append(out, tx)
	}
	return &abci.ResponsePrepareProposal{Txs: out}, nil
}

// ProcessProposal refuses a block with a transaction whose signature is bad, or without a true extended commit.
func (a *app) ProcessProposal(_ context.Context, r *abci.RequestProcessProposal) (*abci.ResponseProcessProposal, error) {
	if err := a.process(r); err != nil {
		a.log.Warn("refused a proposal", "height", r.Height, "proposer", fmt.Sprintf("%X", r.ProposerAddress), "error", err)
		return &abci.ResponseProcessProposal{Status: abci.ResponseProcessProposal_REJECT}, nil
	}
	return &abci.ResponseProcessProposal{Status: abci.ResponseProcessProposal_ACCEPT}, nil
}

func (a *app) process(r *abci.RequestProcessProposal) error {
	txs := r.Txs
	if r.Height > 1 {
		if len(txs) == 0 {
			return errors.New("no extended commit")
		}
		if err := a.meet(r.Height-1, r.ProposedLastCommit); err != nil {
			return err
		}
		key := func(address []byte) (crypto.PubKey, bool) { k, ok := a.keys[string(address)]; return k, ok }
		if err := verifyExtended(a.genesis.Chain, r.Height, txs[0], r.ProposedLastCommit, key, a.wellForm); err != nil {
			return err
		}
		txs = txs[1:]
	}
	var total int64
	for i, tx := range txs {
		if string(tx) == wake {
			return errors.New("a wake is no transaction")
		}
		if total += types.ComputeProtoSizeForTxs([]types.Tx{tx}); total > MaxBlock {
			return fmt.Errorf("block of more than %d bytes", MaxBlock)
		}
		if err := a.verify(a.state, tx); err != nil {
			return fmt.Errorf("transaction %d: %w", i, err)
		}
	}
	return nil
}

// meet learns the keys of validators that vote for the first time. Who they are consensus says; an address is a key's digest.
func (a *app) meet(height int64, last abci.CommitInfo) error {
	for _, v := range last.Votes {
		if _, ok := a.keys[string(v.Validator.Address)]; ok {
			continue
		}
		set, err := a.sets(height)
		if err != nil {
			return fmt.Errorf("validators of height %d: %w", height, err)
		}
		for _, m := range set.Validators {
			a.keys[string(m.Address)] = m.PubKey
		}
		return nil
	}
	return nil
}

// ExtendVote says what this validator heard.
func (a *app) ExtendVote(_ context.Context, r *abci.RequestExtendVote) (*abci.ResponseExtendVote, error) {
	if a.extend == nil {
		return &abci.ResponseExtendVote{}, nil
	}
	b := a.extend(r.Height)
	if len(b) > MaxExtension {
		a.log.Error("vote extension is too long and left out", "height", r.Height, "bytes", len(b))
		b = nil
	}
	return &abci.ResponseExtendVote{VoteExtension: b}, nil
}

// VerifyVoteExtension looks at another validator's extension before its vote counts.
func (a *app) VerifyVoteExtension(_ context.Context, r *abci.RequestVerifyVoteExtension) (*abci.ResponseVerifyVoteExtension, error) {
	var err error
	switch {
	case len(r.VoteExtension) > MaxExtension:
		err = fmt.Errorf("it is of %d bytes", len(r.VoteExtension))
	case len(r.VoteExtension) > 0 && a.wellForm != nil:
		err = a.wellForm(r.VoteExtension)
	}
	if err != nil {
		a.log.Warn("refused a vote extension", "height", r.Height, "validator", fmt.Sprintf("%X", r.ValidatorAddress), "error", err)
		return &abci.ResponseVerifyVoteExtension{Status: abci.ResponseVerifyVoteExtension_REJECT}, nil
	}
	return &abci.ResponseVerifyVoteExtension{Status: abci.ResponseVerifyVoteExtension_ACCEPT}, nil
}

// FinalizeBlock executes a decided block. Its header and the commit for it are in CometBFT's block store already, so the
// state before it is provable from here on.
func (a *app) FinalizeBlock(_ context.Context, r *abci.RequestFinalizeBlock) (*abci.ResponseFinalizeBlock, error) {
	if r.Height != a.height+1 {
		return nil, fmt.Errorf("block %d after height %d", r.Height, a.height)
	}
	a.mu.Lock()
	a.proven, a.moved, a.at = a.height, a.lastMoved, r.Time
	a.touch()
	a.mu.Unlock()

	b := Block{Height: r.Height, Time: r.Time.UTC(), Txs: r.Txs}
	if r.Height > 1 {
		if len(r.Txs) == 0 {
			return nil, fmt.Errorf("block %d has no extended commit", r.Height)
		}
		hs, _, err := heard(r.Height, r.Txs[0], r.DecidedLastCommit)
		if err != nil {
			return nil, fmt.Errorf("block %d: %w", r.Height, err)
		}
		b.Heard, b.Txs = hs, r.Txs[1:]
	}
	for _, m := range r.Misbehavior {
		if m.Type == abci.MisbehaviorType_DUPLICATE_VOTE {
			b.Offenders = append(b.Offenders, m.Validator.Address)
		}
	}
	var err error
	next, results := a.state.Apply(b)
	if len(results) != len(b.Txs) {
		return nil, fmt.Errorf("block %d: %d results for %d transactions", r.Height, len(results), len(b.Txs))
	}
	root := next.Root()
	out := &abci.ResponseFinalizeBlock{AppHash: root[:]}
	if out.ValidatorUpdates, err = updates(a.state, next); err != nil {
		return nil, fmt.Errorf("block %d: %w", r.Height, err)
	}
	if r.Height > 1 {
		out.TxResults = append(out.TxResults, &abci.ExecTxResult{})
	}
	a.next, a.nextAt, a.nextSaid, a.nextTxs, a.nextRaw = next, r.Height, nil, nil, r.Txs
	for i, res := range results {
		res.Log = short(res.Log)
		out.TxResults = append(out.TxResults, &abci.ExecTxResult{Code: res.Code, Log: res.Log})
		a.nextSaid = append(a.nextSaid, stored{Height: r.Height, Code: res.Code, Log: res.Log})
		a.nextTxs = append(a.nextTxs, sha256.Sum256(b.Txs[i]))
	}
	return out, nil
}

// Commit writes the new state in one atomic batch. It need not be synced: CometBFT has the block on stable storage, and
// replays it when this write is lost; and CometBFT's next write, which is synced, is later in the same log.
func (a *app) Commit(context.Context, *abci.RequestCommit) (*abci.ResponseCommit, error) {
	if a.next == nil {
		return nil, errors.New("commit without a block")
	}
	w := a.disk.batch()
	defer w.Close()
	var since State
	if a.height > 0 {
		since = a.state
	}
	for k, v := range a.next.Changes(since) {
		var err error
		if v == nil {
			err = w.Delete([]byte(keyValue + k))
		} else {
			err = w.Set([]byte(keyValue+k), v)
		}
		if err != nil {
			return nil, fmt.Errorf("write state of height %d: %w", a.nextAt, err)
		}
	}
	root := a.next.Root()
	said := make(map[[32]byte]stored, len(a.nextSaid))
	for i, h := range a.nextTxs {
		// A success stays the answer when a proposer repeats the transaction.
		if old, ok, err := a.result(h); err != nil {
			return nil, err
		} else if ok && old.Code == 0 {
			continue
		}
		if s, ok := said[h]; ok && s.Code == 0 {
			continue
		}
		said[h] = a.nextSaid[i]
	}
	var err error
	for h, s := range said {
		err = errors.Join(err, w.Set(append([]byte(keyResult), h[:]...), canonical.Encode(s)),
			w.Set(oldKey(s.Height, h[:]), []byte{}))
	}
	err = errors.Join(err, w.Set([]byte(keyMeta), canonical.Encode(meta{Version: 1, Genesis: a.digest, Height: a.nextAt, Root: root})))
	err = errors.Join(err, a.archive.keep(a.disk, w, a.next, a.nextAt, a.nextRaw, len(a.nextRaw)-len(a.nextTxs)))
	if a.nextAt%pruneEvery == 0 {
		err = errors.Join(err, a.pruneResults(w, a.nextAt-resultBlocks))
	}
	if err = errors.Join(err, w.Write()); err != nil {
		return nil, fmt.Errorf("write state of height %d: %w", a.nextAt, err)
	}
	if root != a.lastRoot {
		a.lastMoved, a.lastRoot = a.nextAt, root
	}

	a.mu.Lock()
	a.height, a.state = a.nextAt, a.next
	a.wakes--
	a.old[a.height] = a.state
	delete(a.old, a.height-a.keep)
	for h, s := range said {
		for _, c := range a.waiting[h] {
			c <- Committed{Height: s.Height, Result: Result{Code: s.Code, Log: s.Log}}
		}
		delete(a.waiting, h)
	}
	a.touch()
	a.mu.Unlock()
	a.next = nil

	r := &abci.ResponseCommit{}
	if a.height%pruneEvery == 0 && a.height > keepBlocks {
		r.RetainHeight = a.height - keepBlocks
	}
	return r, nil
}

// result returns what is known of a transaction that was committed.
func (a *app) result(hash [32]byte) (stored, bool, error) {
	b, err := a.disk.Get(append([]byte(keyResult), hash[:]...))
	if b == nil || err != nil {
		return stored{}, false, err
	}
	var s stored
	if err := canonical.Decode(b, 8<<10, &s); err != nil {
		return stored{}, false, fmt.Errorf("read result of transaction %x: %w", hash, err)
	}
	return s, true, nil
}

func oldKey(height int64, hash []byte) []byte {
	return append(binary.BigEndian.AppendUint64([]byte(keyOld), uint64(height)), hash...)
}

// pruneResults forgets results before a height.
func (a *app) pruneResults(w *batch, before int64) error {
	if before <= 0 {
		return nil
	}
	it, err := a.disk.iterator([]byte(keyOld), oldKey(before, nil), false)
	if err != nil {
		return err
	}
	defer it.Close()
	for ; it.Valid(); it.Next() {
		k := it.Key()
		hash := [32]byte(k[len(keyOld)+8:])
		s, ok, err := a.result(hash)
		if err != nil {
			return err
		}
		if ok && s.Height < before {
			err = w.Delete(append([]byte(keyResult), hash[:]...))
		}
		if err = errors.Join(err, w.Delete(k)); err != nil {
			return err
		}
	}
	return it.Error()
}

// wait returns a channel that gets the result of a transaction when it is committed, and a function to call when nobody
// waits any more.
func (a *app) wait(hash [32]byte) (<-chan Committed, func()) {
	c := make(chan Committed, 1)
	a.mu.Lock()
	a.waiting[hash] = append(a.waiting[hash], c)
	a.mu.Unlock()
	return c, func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		for i, x := range a.waiting[hash] {
			if x == c {
				a.waiting[hash] = append(a.waiting[hash][:i:i], a.waiting[hash][i+1:]...)
			}
		}
		if len(a.waiting[hash]) == 0 {
			delete(a.waiting, hash)
		}
	}
}

func short(s string) string {
	if len(s) > maxLog {
		s = s[:maxLog]
	}
	return strings.ToValidUTF8(s, "?")
}

// verified remembers the transactions whose signature was good, the newest few thousand of them.
type verified struct {
	mu       sync.Mutex
	new, old map[[32]byte]struct{}
}

const verifiedHalf = 1 << 14

func (v *verified) has(h [32]byte) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	_, a := v.new[h]
	_, b := v.old[h]
	return a || b
}

func (v *verified) add(h [32]byte) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.new == nil || len(v.new) >= verifiedHalf {
		v.new, v.old = make(map[[32]byte]struct{}), v.new
	}
	v.new[h] = struct{}{}
}
