package comet

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	dbm "github.com/cometbft/cometbft-db"
	abci "github.com/cometbft/cometbft/abci/types"
	cmtproto "github.com/cometbft/cometbft/proto/tendermint/types"
	sm "github.com/cometbft/cometbft/state"
	"github.com/cometbft/cometbft/store"
	"github.com/cometbft/cometbft/types"

	"holdfast/internal/canonical"
)

// ErrDamaged is returned for a home whose chain or state is not what its blocks say.
var ErrDamaged = errors.New("ledger is damaged")

// Checked is what VerifyHome went through.
type Checked struct {
	First, Last int64 // blocks
	State       int64 // height of the state
	Root        [32]byte
	Replayed    bool // all blocks from the genesis are there, and were executed again
	Rows        int64
}

// VerifyHome checks the chain and the state of a validator that does not run, or a copy of its home: c.Home, with the Genesis,
// Machine and Archive of that validator; nothing else of c counts. Blocks, their hashes and commits are checked one after
// another; if they go back to the first one they are executed again, and every row that the machine wrote must come out as it
// is. It changes nothing. progress may be nil.
func VerifyHome(ctx context.Context, c *Config, progress func(height, last int64)) (out *Checked, err error) {
	d, err := openDiskToRead(filepath.Join(c.Home, chainDir))
	if err != nil {
		return nil, err
	}
	defer func() {
		closed := make(chan error, 1)
		go func() {
			defer func() { // Pebble does not close a table that it could not read: nothing was written, and it can stay open
				if recover() != nil {
					closed <- nil
				}
			}()
			closed <- d.close()
		}()
		if err == nil {
			err = <-closed
			return
		}
		select {
		case <-closed:
		case <-time.After(time.Second):
		}
	}()
	tmp, err := os.MkdirTemp("", "holdfast-verify-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(tmp)) }()
	log := slog.New(slog.DiscardHandler)
	again, err := openDisk(tmp, log)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, again.close()) }()
	v := &verifier{c: c, blocks: d.table(tableBlocks), machine: d.table(tableMachine), again: again, sets: sm.NewStore(d.table(tableState), sm.StoreOptions{})}
	defer func() {
		if p := recover(); p != nil { // so CometBFT says that it cannot read what it wrote
			out, err = nil, errors.Join(err, fmt.Errorf("%w: block %d: %.200s", ErrDamaged, v.at, fmt.Sprint(p)))
		}
	}()
	if err := v.run(ctx, progress); err != nil {
		return nil, err
	}
	return &v.out, nil
}

type verifier struct {
	c       *Config
	blocks  *table
	machine *table
	again   *disk
	sets    sm.Store

	at   int64 // block that is looked at
	app  *app  // nil when nothing is executed
	prev *types.Block
	id   types.BlockID // of prev
	set  *types.ValidatorSet
	last []*abci.ExecTxResult
	out  Checked
}

func damaged(format string, a ...any) error {
	return fmt.Errorf("%w: %w", ErrDamaged, fmt.Errorf(format, a...))
}

func (v *verifier) run(ctx context.Context, progress func(height, last int64)) error {
	raw, err := v.machine.Get([]byte(keyMeta))
	if err != nil {
		return damaged("meta: %w", err)
	}
	if raw == nil {
		return fmt.Errorf("%s has no state yet", v.c.Home)
	}
	var m meta
	if err := canonical.Decode(raw, 1<<10, &m); err != nil {
		return damaged("meta: %w", err)
	}
	if m.Version != 1 || m.Genesis != v.c.Genesis.digest() {
		return damaged("meta: it is of another version or another chain")
	}
	st := store.LoadBlockStoreState(v.blocks)
	v.out = Checked{First: st.Base, Last: st.Height, State: m.Height, Root: m.Root, Replayed: st.Base == 1}
	if st.Base < 1 || m.Height > st.Height || m.Height < st.Height-1 || m.Height < st.Base-1 {
		return damaged("blocks are %d to %d, the state is of height %d", st.Base, st.Height, m.Height)
	}
	if want, err := st.Marshal(); err != nil || !v.is(v.blocks, "blockStore", want) {
		return damaged("which blocks there are is not in its only form")
	}
	if v.out.Replayed {
		if v.app, err = newApp(v.c, v.again.table(tableMachine), slog.New(slog.DiscardHandler)); err != nil {
			return err
		}
		v.app.sets = v.sets.LoadValidators
		if _, err := v.app.InitChain(ctx, nil); err != nil {
			return err
		}
	}
	rows := int64(1)
	for v.at = st.Base; v.at <= st.Height; v.at++ {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := v.block(ctx, v.at <= m.Height)
		if err != nil {
			return damaged("block %d: %w", v.at, err)
		}
		rows += n
		if progress != nil {
			progress(v.at, st.Height)
		}
	}
	if err := v.others(rows, st.Base); err != nil {
		return err
	}
	if err := v.cometState(&m); err != nil {
		return err
	}
	if v.out.Replayed {
		return v.compare()
	}
	return v.state(&m)
}

// is says whether a row holds these bytes.
func (v *verifier) is(t *table, key string, want []byte) bool {
	b, err := t.Get([]byte(key))
	return err == nil && b != nil && bytes.Equal(b, want)
}

// read decodes a row that CometBFT wrote.
func (v *verifier) read(key string, p interface{ Unmarshal([]byte) error }) error {
	b, err := v.blocks.Get([]byte(key))
	if err != nil {
		return fmt.Errorf("%s: %w", key, err)
	}
	if b == nil {
		return fmt.Errorf("%s is not there", key)
	}
	if err := p.Unmarshal(b); err != nil {
		return fmt.Errorf("%s: %w", key, err)
	}
	return nil
}

// block checks a block and executes it; it returns how many rows belong to it.
func (v *verifier) block(ctx context.Context, execute bool) (int64, error) {
	h := v.at
	var pm cmtproto.BlockMeta
	if err := v.read(fmt.Sprintf("H:%d", h), &pm); err != nil {
		return 0, err
	}
	if pm.BlockID.PartSetHeader.Total > types.MaxBlockPartsCount {
		return 0, fmt.Errorf("%d parts", pm.BlockID.PartSetHeader.Total)
	}
	var body []byte
	for i := range pm.BlockID.PartSetHeader.Total {
		var p cmtproto.Part
		if err := v.read(fmt.Sprintf("P:%d:%d", h, i), &p); err != nil {
			return 0, err
		}
		body = append(body, p.Bytes...)
	}
	var pb cmtproto.Block
	if err := pb.Unmarshal(body); err != nil {
		return 0, err
	}
	b, err := types.BlockFromProto(&pb)
	if err != nil {
		return 0, err
	}
	parts, err := b.MakePartSet(types.BlockPartSizeBytes)
	if err != nil {
		return 0, err
	}
	id := types.BlockID{Hash: b.Hash(), PartSetHeader: parts.Header()}
	if err := b.ValidateBasic(); err != nil {
		return 0, err
	}
	if b.Height != h || b.ChainID != v.c.Genesis.Chain {
		return 0, fmt.Errorf("it is block %d of chain %q", b.Height, b.ChainID)
	}
	set, err := v.validators(b)
	if err != nil {
		return 0, err
	}
	if v.prev != nil {
		if !b.LastBlockID.Equals(v.id) {
			return 0, fmt.Errorf("it follows %v, the block before is %v", b.LastBlockID, v.id)
		}
		if err := v.set.VerifyCommit(b.ChainID, v.id, h-1, b.LastCommit); err != nil {
			return 0, fmt.Errorf("commit of the block before: %w", err)
		}
		if at, err := sm.MedianTime(b.LastCommit, v.set); err != nil || !at.Equal(b.Time) {
			return 0, fmt.Errorf("it is of %v, its votes are of %v: %w", b.Time, at, err)
		}
	}
	rows, kept, err := v.rebuild(b, parts, id, set)
	if err != nil {
		return 0, err
	}
	if v.app != nil && execute {
		if err := v.execute(ctx, b, kept); err != nil {
			return 0, err
		}
	}
	v.prev, v.id, v.set = b, id, set
	return rows, nil
}

// validators are those of a block, as the block before has named them.
func (v *verifier) validators(b *types.Block) (*types.ValidatorSet, error) {
	if v.prev != nil && !bytes.Equal(b.ValidatorsHash, v.prev.NextValidatorsHash) {
		return nil, errors.New("its validators are not those that the block before names")
	}
	if v.set != nil && bytes.Equal(b.ValidatorsHash, v.set.Hash()) {
		return v.set, nil
	}
	set, err := v.sets.LoadValidators(b.Height)
	if err != nil {
		return nil, fmt.Errorf("validators: %w", err)
	}
	if !bytes.Equal(set.Hash(), b.ValidatorsHash) {
		return nil, errors.New("the validators that are kept are others")
	}
	if b.Height == 1 {
		first, err := v.c.Genesis.validators()
		if err != nil {
			return nil, err
		}
		if !bytes.Equal(first.Hash(), b.ValidatorsHash) {
			return nil, errors.New("its validators are not those of the genesis")
		}
	}
	return set, nil
}

// rebuild writes the block again, elsewhere, and compares every row.
func (v *verifier) rebuild(b *types.Block, parts *types.PartSet, id types.BlockID, set *types.ValidatorSet) (int64, *store.BlockStore, error) {
	var pc cmtproto.ExtendedCommit
	if err := v.read(fmt.Sprintf("EC:%d", b.Height), &pc); err != nil {
		return 0, nil, err
	}
	ec, err := types.ExtendedCommitFromProto(&pc)
	if err != nil {
		return 0, nil, fmt.Errorf("commit: %w", err)
	}
	if err := ec.EnsureExtensions(true); err != nil {
		return 0, nil, fmt.Errorf("commit: %w", err)
	}
	if err := set.VerifyCommit(b.ChainID, id, b.Height, ec.ToCommit()); err != nil {
		return 0, nil, fmt.Errorf("commit: %w", err)
	}
	for i, s := range ec.ExtendedSignatures {
		if s.BlockIDFlag != types.BlockIDFlagCommit {
			continue
		}
		msg := types.VoteExtensionSignBytes(b.ChainID, &cmtproto.Vote{Height: b.Height, Round: ec.Round, Extension: s.Extension})
		if !set.Validators[i].PubKey.VerifySignature(msg, s.ExtensionSignature) {
			return 0, nil, fmt.Errorf("vote extension of validator %d is not signed by it", i)
		}
	}
	db := dbm.NewMemDB()
	bs := store.NewBlockStore(db)
	bs.SaveBlockWithExtendedCommit(b, parts, ec)
	it, err := db.Iterator(nil, nil)
	if err != nil {
		return 0, nil, err
	}
	defer it.Close()
	rows := int64(0)
	for ; it.Valid(); it.Next() {
		if k := string(it.Key()); k != "blockStore" {
			rows++
			if !v.is(v.blocks, k, it.Value()) {
				return 0, nil, fmt.Errorf("row %q is not what the block says", k)
			}
		}
	}
	return rows, bs, it.Error()
}

// execute runs a block through the machine, as a validator does.
func (v *verifier) execute(ctx context.Context, b *types.Block, kept *store.BlockStore) error {
	if root := v.app.state.Root(); !bytes.Equal(b.AppHash, root[:]) {
		return fmt.Errorf("its app hash is %x, the state before it has the root %x", b.AppHash, root)
	}
	if v.prev != nil && !bytes.Equal(b.LastResultsHash, sm.TxResultsHash(v.last)) {
		return errors.New("the results of the block before are others")
	}
	txs := b.Txs.ToSliceOfBytes()
	var info abci.CommitInfo
	if v.prev != nil {
		info = sm.BuildLastCommitInfo(b, v.set, 1)
	}
	if err := v.app.process(&abci.RequestProcessProposal{Height: b.Height, Txs: txs, ProposedLastCommit: info}); err != nil {
		return err
	}
	v.app.archive.blocks, v.app.archive.sets = kept, v.sets
	res, err := v.app.FinalizeBlock(ctx, &abci.RequestFinalizeBlock{
		Height: b.Height, Time: b.Time, Txs: txs, DecidedLastCommit: info, Misbehavior: b.Evidence.Evidence.ToABCI(),
	})
	if err != nil {
		return err
	}
	v.last = res.TxResults
	_, err = v.app.Commit(ctx, nil)
	return err
}

// others looks for rows that belong to no block.
func (v *verifier) others(known, base int64) error {
	it, err := v.blocks.iterator(nil, nil, false)
	if err != nil {
		return damaged("blocks: %w", err)
	}
	defer it.Close()
	n := int64(0)
	for ; it.Valid(); it.Next() {
		if kind, rest, ok := strings.Cut(string(it.Key()), ":"); ok && kind != "BH" {
			height, _, _ := strings.Cut(rest, ":")
			if h, err := strconv.ParseInt(height, 10, 64); err == nil && h < base && !(kind == "C" && h == base-1) {
				continue // of a block that is gone, kept as evidence
			}
		}
		n++
	}
	if err := it.Error(); err != nil {
		return damaged("blocks: %w", err)
	}
	if n != known && v.out.Replayed {
		return damaged("%d rows belong to no block", n-known)
	}
	v.out.Rows += n
	return nil
}

// cometState checks what CometBFT remembers of the newest block.
func (v *verifier) cometState(m *meta) error {
	s, err := v.sets.Load()
	if err != nil {
		return damaged("state of consensus: %w", err)
	}
	switch {
	case s.ChainID != v.c.Genesis.Chain:
		return damaged("state of consensus: it is of chain %q", s.ChainID)
	case s.LastBlockHeight == m.Height && !bytes.Equal(s.AppHash, m.Root[:]):
		return damaged("state of consensus: its app hash is %x, the state has the root %x", s.AppHash, m.Root)
	case s.LastBlockHeight == v.out.Last && !s.LastBlockID.Equals(v.id):
		return damaged("state of consensus: its last block is another")
	case s.LastBlockHeight < v.out.Last-1 || s.LastBlockHeight > v.out.Last:
		return damaged("state of consensus: it is of height %d", s.LastBlockHeight)
	}
	return nil
}

// compare wants the machine's rows to be those that executing the blocks made.
func (v *verifier) compare() error {
	a, err := v.machine.iterator(nil, nil, false)
	if err != nil {
		return damaged("state: %w", err)
	}
	defer a.Close()
	b, err := v.again.table(tableMachine).iterator(nil, nil, false)
	if err != nil {
		return err
	}
	defer b.Close()
	for a.Valid() || b.Valid() {
		order := 0
		switch {
		case !a.Valid():
			order = 1
		case !b.Valid():
			order = -1
		default:
			order = bytes.Compare(a.Key(), b.Key())
		}
		switch {
		case order < 0:
			return damaged("%s is there, and no block made it", row(a.Key()))
		case order > 0:
			return damaged("%s is not there", row(b.Key()))
		case !bytes.Equal(a.Value(), b.Value()):
			return damaged("%s is not what the blocks make of it", row(a.Key()))
		}
		v.out.Rows++
		a.Next()
		b.Next()
	}
	if err := errors.Join(a.Error(), b.Error()); err != nil {
		return damaged("state: %w", err)
	}
	return nil
}

// row names a row of the machine's table.
func row(k []byte) string {
	switch rest := k[1:]; {
	case string(k) == keyMeta:
		return "meta"
	case string(k[:1]) == keyValue:
		return fmt.Sprintf("record %q", rest)
	case string(k[:1]) == keyResult:
		return fmt.Sprintf("result of transaction %x", rest)
	case string(k[:1]) == keyArchived && len(rest) == 44:
		return fmt.Sprintf("archived transaction %d of block %d", binary.BigEndian.Uint32(rest[40:]), binary.BigEndian.Uint64(rest[32:]))
	case string(k[:1]) == keyShown && len(rest) == 8:
		return fmt.Sprintf("archived header of block %d", binary.BigEndian.Uint64(rest))
	}
	return fmt.Sprintf("row %q", k)
}

// state checks the records against the root that the newest header, or at its height CometBFT, has.
func (v *verifier) state(m *meta) error {
	a, err := newApp(v.c, v.machine, slog.New(slog.DiscardHandler))
	if err != nil {
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	root := a.state.Root()
	if m.Height == v.out.Last-1 && !bytes.Equal(v.prev.AppHash, root[:]) {
		return damaged("block %d has the app hash %x, the state before it the root %x", v.out.Last, v.prev.AppHash, root)
	}
	return nil
}
