package comet

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/cometbft/cometbft/crypto/merkle"
	"github.com/cometbft/cometbft/crypto/mldsa65"
	"github.com/cometbft/cometbft/light"
	sm "github.com/cometbft/cometbft/state"
	"github.com/cometbft/cometbft/store"
	"github.com/cometbft/cometbft/types"

	"holdfast/internal/canonical"
)

// Keys of the machine's table for what is kept for ever: CometBFT keeps its blocks for a while only. They are written with
// the state of their block, in one batch.
const (
	keyArchived = "a" // then SHA-256 of a name, a height and an index, big endian: a transaction
	keyShown    = "p" // then a height, big endian: shown
	keySince    = "f" // the height since which everything is kept
)

// shown is what shows that transactions are in a block: the header, whose data hash is the Merkle root of their hashes.
type shown struct {
	Head   head       `cbor:"1,keyasint"` // with its validators
	Set    []byte     `cbor:"2,keyasint"` // their hash
	Hashes [][32]byte `cbor:"3,keyasint"` // SHA-256 of every transaction of the block
}

// Archived is a block with some of its transactions and what shows that they are in it.
type Archived struct {
	Signed     []byte       `cbor:"1,keyasint"`           // CometBFT's protobuf of the header and of a commit for it
	Validators []Voter      `cbor:"2,keyasint,omitempty"` // who signed it; absent: as for the block before, at first those of the genesis
	Hashes     [][32]byte   `cbor:"3,keyasint,omitempty"` // SHA-256 of every transaction of the block; absent: there are none here
	Txs        []ArchivedTx `cbor:"4,keyasint,omitempty"` // in their order
}

// ArchivedTx is a transaction of a block.
type ArchivedTx struct {
	Index uint32 `cbor:"1,keyasint"`
	Tx    []byte `cbor:"2,keyasint"`
}

// Voter is a validator of an Archived.
type Voter struct {
	Key   []byte `cbor:"1,keyasint"` // ML-DSA-65
	Power int64  `cbor:"2,keyasint"`
}

// Entry is a key with its value, or none, and the proof of it in some state.
type Entry struct {
	Key   []byte `cbor:"1,keyasint"`
	Value []byte `cbor:"2,keyasint"` // of a key that is present
	Proof []byte `cbor:"3,keyasint"`
}

// A Head is what a header that was verified says.
type Head struct {
	Height int64
	Time   time.Time
	Root   [32]byte // of the state before the block
}

// archive is the part of an app that keeps transactions for ever.
type archive struct {
	names  func(s State, index int) []string // nil keeps nothing
	blocks *store.BlockStore
	sets   sm.Store
}

func newArchive(c *Config, d *disk) archive {
	if c.Archive == nil {
		return archive{}
	}
	return archive{c.Archive, store.NewBlockStore(d.table(tableBlocks)), sm.NewStore(d.table(tableState), sm.StoreOptions{})}
}

// keep writes what of a block is to be kept. raw are all its transactions, skip how many of them are not the machine's.
func (a *archive) keep(disk *table, w *batch, s State, height int64, raw [][]byte, skip int) error {
	if a.names == nil {
		return nil
	}
	if since, err := disk.Get([]byte(keySince)); err != nil {
		return err
	} else if since == nil {
		if err := w.Set([]byte(keySince), canonical.Encode(height)); err != nil {
			return err
		}
	}
	any := false
	for i := range raw[skip:] {
		for _, n := range a.names(s, i) {
			any = true
			if err := w.Set(archivedKey(n, height, uint32(skip+i)), raw[skip+i]); err != nil {
				return err
			}
		}
	}
	if !any {
		return nil
	}
	m := a.blocks.LoadBlockMeta(height)
	c := a.blocks.LoadBlockCommit(height)
	if c == nil {
		c = a.blocks.LoadSeenCommit(height)
	}
	if m == nil || c == nil {
		return fmt.Errorf("block %d is not there", height)
	}
	set, err := a.sets.LoadValidators(height)
	if err != nil {
		return fmt.Errorf("validators of height %d: %w", height, err)
	}
	p := shown{Set: m.Header.ValidatorsHash}
	if p.Head, err = encodeHead(&types.SignedHeader{Header: &m.Header, Commit: c}, set, nil); err != nil {
		return err
	}
	for _, tx := range raw {
		p.Hashes = append(p.Hashes, sha256.Sum256(tx))
	}
	return w.Set(shownKey(height), canonical.Encode(p))
}

func archivedKey(name string, height int64, index uint32) []byte {
	sum := sha256.Sum256([]byte(name))
	k := binary.BigEndian.AppendUint64(append([]byte(keyArchived), sum[:]...), uint64(height))
	return binary.BigEndian.AppendUint32(k, index)
}

func shownKey(height int64) []byte {
	return binary.BigEndian.AppendUint64([]byte(keyShown), uint64(height))
}

const pathArchive = "/v1/archive"

// archiveRequest asks for what is kept under a name, of blocks after a height.
type archiveRequest struct {
	Name       []byte `cbor:"1,keyasint"`
	After      int64  `cbor:"2,keyasint"`
	Validators []byte `cbor:"3,keyasint"` // hash of the validator set that the client knows
}

type archiveAnswer struct {
	Since  int64         `cbor:"1,keyasint"` // the height since which everything is kept
	Blocks []archiveItem `cbor:"2,keyasint"`
	More   bool          `cbor:"3,keyasint"`
}

type archiveItem struct {
	Head   head         `cbor:"1,keyasint"`
	Hashes [][32]byte   `cbor:"2,keyasint"`
	Txs    []ArchivedTx `cbor:"3,keyasint"`
}

func (s *api) archive(ctx context.Context, c *call, body []byte) (any, error) {
	var r archiveRequest
	if err := decode(body, maxSmall+MaxKey, &r); err != nil {
		return nil, malformed(err)
	}
	if len(r.Name) == 0 || len(r.Name) > MaxKey || len(r.Validators) > 64 || r.After < 0 || r.After == 1<<63-1 {
		return nil, malformed(errors.New("name, height or hash of the validator set is not valid"))
	}
	if err := c.enter(ctx, c.share.work); err != nil {
		return nil, err
	}
	var out archiveAnswer
	b, err := s.a.disk.Get([]byte(keySince))
	if err != nil || b == nil {
		return nil, errors.Join(err, &failure{503, kindBehind, errors.New("nothing is kept yet")})
	}
	if err := decode(b, 16, &out.Since); err != nil {
		return nil, err
	}
	end := archivedKey(string(r.Name), -1, 1<<32-1) // heights are positive: this is after all of them
	it, err := s.a.disk.iterator(archivedKey(string(r.Name), r.After+1, 0), end, false)
	if err != nil {
		return nil, err
	}
	defer it.Close()
	size, last := 0, int64(0)
	for ; it.Valid(); it.Next() {
		k := it.Key()[len(keyArchived)+32:]
		height := int64(binary.BigEndian.Uint64(k))
		if height != last {
			if size > maxReadSize/2 {
				out.More = true
				return out, nil
			}
			b, err := s.a.disk.Get(shownKey(height))
			if err != nil {
				return nil, err
			}
			var p shown
			if err := decode(b, maxAnswer, &p); err != nil {
				return nil, fmt.Errorf("what shows block %d: %w", height, err)
			}
			if bytes.Equal(p.Set, r.Validators) {
				p.Head.Validators = []byte{}
			}
			out.Blocks = append(out.Blocks, archiveItem{Head: p.Head, Hashes: p.Hashes})
			size += len(p.Head.Signed) + len(p.Head.Validators) + 32*len(p.Hashes)
			last = height
		}
		tx := it.Value()
		x := &out.Blocks[len(out.Blocks)-1]
		x.Txs = append(x.Txs, ArchivedTx{Index: binary.BigEndian.Uint32(k[8:]), Tx: tx})
		size += len(tx)
	}
	return out, it.Error()
}

// Archive returns what a server keeps under a name of blocks after a height, and since which height it keeps everything. It is
// that server's word until VerifyArchive, which does not know what is missing.
func (c *Client) Archive(ctx context.Context, name string, after int64) (since int64, out []Archived, err error) {
	first := c.chain.first
	known := first.Hash()
	for more := true; more; {
		var a archiveAnswer
		err := c.each(ctx, func(ctx context.Context, s *server) error {
			a = archiveAnswer{}
			return s.call(ctx, pathArchive, canonical.Encode(archiveRequest{Name: []byte(name), After: after, Validators: known}), maxAnswer, &a)
		})
		if err != nil {
			return 0, nil, fmt.Errorf("read archive: %w", err)
		}
		for _, x := range a.Blocks {
			b, height, err := archived(x.Head, first)
			if err == nil && height <= after {
				err = fmt.Errorf("block %d after block %d", height, after)
			}
			if err != nil {
				return 0, nil, fmt.Errorf("read archive: %w: %w", ErrProof, err)
			}
			b.Hashes, b.Txs, after = x.Hashes, x.Txs, height
			out = append(out, b)
		}
		since, more = a.Since, a.More && len(a.Blocks) > 0
	}
	return since, out, nil
}

// archived is a head in the form of an Archived. Its validators are left out when they are those of first.
func archived(h head, first *types.ValidatorSet) (Archived, int64, error) {
	sh, set, err := decodeHead(h)
	if err != nil {
		return Archived{}, 0, err
	}
	a := Archived{Signed: h.Signed}
	if set != nil && !bytes.Equal(set.Hash(), first.Hash()) {
		for _, v := range set.Validators {
			a.Validators = append(a.Validators, Voter{v.PubKey.Bytes(), v.VotingPower})
		}
	}
	return a, sh.Height, nil
}

// Prove reads keys at minHeight or above as ReadAt does, and returns what shows it to somebody who asks no server.
func (c *Client) Prove(ctx context.Context, minHeight int64, keys ...string) (Archived, []Entry, error) {
	r := readRequest{MinHeight: minHeight}
	for _, k := range keys {
		r.Keys = append(r.Keys, []byte(k))
	}
	if err := r.check(); err != nil {
		return Archived{}, nil, fmt.Errorf("read ledger: %w", err)
	}
	var out Archived
	var entries []Entry
	err := c.each(ctx, func(ctx context.Context, s *server) error {
		v, b, proofs, err := c.prove(ctx, s, r)
		if err != nil {
			return err
		}
		h, err := encodeHead(b.SignedHeader, b.set, nil)
		if err != nil {
			return err
		}
		if out, _, err = archived(h, c.chain.first); err != nil {
			return err
		}
		entries = nil
		for i, k := range keys {
			value, ok := v.Value(k)
			if !ok {
				return fmt.Errorf("key %q is absent", k)
			}
			entries = append(entries, Entry{[]byte(k), value, proofs[i].Proof})
		}
		return nil
	})
	if err != nil {
		return Archived{}, nil, fmt.Errorf("read ledger: %w", err)
	}
	return out, entries, nil
}

// VerifyArchive checks that blocks are of the chain of a genesis, in their order, and that their transactions are in them, as a
// light client that has nothing but the genesis: each header is signed by more than 2/3 of its validators, and by more than
// 1/3 of those of the one before. Every byte of blocks counts. It asks nobody.
func VerifyArchive(g *Genesis, blocks []Archived, now time.Time) ([]Head, error) {
	ch, err := newChain(g, &ClientConfig{})
	if err != nil {
		return nil, err
	}
	at := ch.top
	var out []Head
	for i := range blocks {
		b, err := blocks[i].verify(ch, at, now)
		if err != nil {
			return nil, fmt.Errorf("%w: block %d of %d: %w", ErrProof, i+1, len(blocks), err)
		}
		if len(b.AppHash) != 32 {
			return nil, fmt.Errorf("%w: block %d of %d: app hash of %d bytes", ErrProof, i+1, len(blocks), len(b.AppHash))
		}
		out = append(out, Head{b.Height, b.Time, [32]byte(b.AppHash)})
		at = b
	}
	return out, nil
}

func (a *Archived) verify(ch *chain, at *block, now time.Time) (*block, error) {
	sh, _, err := decodeHead(head{Signed: a.Signed})
	if err != nil {
		return nil, err
	}
	if again, err := encodeHead(sh, nil, sh.ValidatorsHash); err != nil || !bytes.Equal(again.Signed, a.Signed) {
		return nil, errors.Join(errors.New("header is not in its only form"), err)
	}
	set := at.set
	if len(a.Validators) > 0 {
		if set, err = votersOf(a.Validators); err != nil {
			return nil, err
		}
		if bytes.Equal(set.Hash(), at.set.Hash()) {
			return nil, errors.New("it names the validators of the block before again")
		}
	}
	b := &block{SignedHeader: sh, set: set}
	if err := b.ValidateBasic(ch.name); err != nil {
		return nil, err
	}
	if at.Height > 0 && b.Height == at.Height+1 && !bytes.Equal(b.LastBlockID.Hash, at.Hash()) {
		return nil, fmt.Errorf("header %d does not follow header %d", b.Height, at.Height)
	}
	if err := light.Verify(at.SignedHeader, at.set, b.SignedHeader, b.set, ch.period, now, ch.drift, light.DefaultTrustLevel); err != nil {
		return nil, fmt.Errorf("header %d after header %d: %w", b.Height, at.Height, err)
	}
	// A light client is content with 2/3: here all that is said must be true.
	if err := set.VerifyCommit(ch.name, b.Commit.BlockID, b.Height, b.Commit); err != nil {
		return nil, fmt.Errorf("header %d: %w", b.Height, err)
	}
	return b, a.verifyTxs(b)
}

func (a *Archived) verifyTxs(b *block) error {
	if len(a.Hashes) == 0 {
		if len(a.Txs) > 0 {
			return fmt.Errorf("block %d has transactions and no hashes", b.Height)
		}
		return nil
	}
	leaves := make([][]byte, len(a.Hashes))
	for i := range a.Hashes {
		leaves[i] = a.Hashes[i][:]
	}
	if !bytes.Equal(merkle.HashFromByteSlices(leaves), b.DataHash) {
		return fmt.Errorf("block %d holds other transactions", b.Height)
	}
	if len(a.Txs) == 0 {
		return fmt.Errorf("block %d has hashes and no transactions", b.Height)
	}
	last := -1
	for _, x := range a.Txs {
		if int64(x.Index) >= int64(len(a.Hashes)) || int(x.Index) <= last {
			return fmt.Errorf("block %d: transaction %d after %d, there are %d", b.Height, x.Index, last, len(a.Hashes))
		}
		last = int(x.Index)
		if sha256.Sum256(x.Tx) != a.Hashes[x.Index] {
			return fmt.Errorf("block %d has another transaction %d", b.Height, x.Index)
		}
	}
	return nil
}

// votersOf is a validator set from the keys and powers in it, in its order.
func votersOf(vs []Voter) (*types.ValidatorSet, error) {
	if len(vs) > types.MaxVotesCount {
		return nil, fmt.Errorf("%d validators", len(vs))
	}
	g := Genesis{Chain: "-"}
	for _, v := range vs {
		g.Validators = append(g.Validators, Member(v))
	}
	set, err := g.validators()
	if err != nil {
		return nil, err
	}
	for i, v := range set.Validators {
		k, ok := v.PubKey.(mldsa65.PubKey)
		if !ok || !bytes.Equal(k.Bytes(), vs[i].Key) {
			return nil, errors.New("validators are not in their order")
		}
	}
	return set, nil
}
