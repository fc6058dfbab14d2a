package comet

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"time"

	dbm "github.com/cometbft/cometbft-db"
	abci "github.com/cometbft/cometbft/abci/types"
	cfg "github.com/cometbft/cometbft/config"
	"github.com/cometbft/cometbft/crypto/mldsa65"
	cmtlog "github.com/cometbft/cometbft/libs/log"
	"github.com/cometbft/cometbft/mempool"
	"github.com/cometbft/cometbft/node"
	"github.com/cometbft/cometbft/p2p"
	"github.com/cometbft/cometbft/proxy"
	sm "github.com/cometbft/cometbft/state"
	"github.com/cometbft/cometbft/store"
	"github.com/cometbft/cometbft/types"

	"holdfast/internal/canonical"
)

// Validator is one replica: it takes part in consensus, keeps the machine's state, and serves the API.
type Validator struct {
	c     Config
	log   *slog.Logger
	ready chan struct{}
	conns *conns // of the API

	mu     sync.Mutex
	app    *app // nil before and after Run
	blocks *store.BlockStore
	pool   mempool.Mempool
}

// New checks a configuration. It reads, writes and listens on nothing.
func New(c Config) (*Validator, error) {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.States <= 0 {
		c.States = 64
	}
	if err := c.Genesis.check(); err != nil {
		return nil, err
	}
	switch {
	case c.Home == "":
		return nil, errors.New("validator has no home")
	case c.Machine.Genesis == nil || c.Machine.Load == nil:
		return nil, errors.New("validator has no machine")
	case c.P2P == "":
		return nil, errors.New("validator has no consensus address")
	case c.API == nil:
		return nil, errors.New("validator has no API listener")
	case len(c.TLS.Certificate) == 0:
		return nil, errors.New("validator has no TLS certificate")
	}
	for _, p := range c.Peers {
		if _, err := p2p.NewNetAddressString(p2p.IDAddressString(p2p.ID(p.ID), p.Addr)); err != nil {
			return nil, fmt.Errorf("peer %s at %s: %w", p.ID, p.Addr, err)
		}
	}
	return &Validator{c: c, log: c.Log, ready: make(chan struct{}), conns: newConns(c.Conns, c.Known)}, nil
}

// Ready is closed when the API answers.
func (v *Validator) Ready() <-chan struct{} { return v.ready }

// State returns the newest committed state and its height, for Handlers, Extend and VerifyExtension. The state is nil
// before Run has one.
func (v *Validator) State() (State, int64) {
	a := v.replica()
	if a == nil {
		return nil, 0
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.state, a.height
}

func (v *Validator) replica() *app {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.app
}

// Run takes part in consensus and serves the API until ctx ends, when it returns nil, or until the replica fails. It
// runs once.
func (v *Validator) Run(ctx context.Context) (err error) {
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	defer v.c.API.Close()
	ks, err := loadKeys(v.c.Home)
	if err != nil {
		return err
	}
	d, err := openDisk(filepath.Join(v.c.Home, chainDir), v.log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.close()) }()
	s, err := openSigner(v.c.Home, ks.consensus)
	if err != nil {
		return err
	}
	defer s.close()
	a, err := newApp(&v.c, d.table(tableMachine), v.log)
	if err != nil {
		return err
	}
	a.sets = sm.NewStore(d.table(tableState), sm.StoreOptions{}).LoadValidators
	v.mu.Lock()
	v.app = a
	v.mu.Unlock()

	doc, err := v.c.Genesis.doc()
	if err != nil {
		return err
	}
	tables := func(c *cfg.DBContext) (dbm.DB, error) {
		switch c.ID {
		case "blockstore":
			return lateTable{d.table(tableBlocks)}, nil
		case "state":
			return lateTable{d.table(tableState)}, nil
		case "evidence":
			return lateTable{d.table(tableEvidence)}, nil
		}
		return nil, fmt.Errorf("no table for %q", c.ID)
	}
	conf := v.config()
	n, err := node.NewNodeWithContext(ctx, conf, s, &p2p.NodeKey{PrivKey: ks.node}, proxy.NewConnSyncLocalClientCreator(a),
		func() (*types.GenesisDoc, error) { return doc, nil }, tables,
		node.DefaultMetricsProvider(conf.Instrumentation), newCometLog(ctx, v.log, fail))
	if err != nil {
		return fmt.Errorf("open chain %s: %w", v.c.Genesis.Chain, err)
	}
	defer func() {
		// The clients of the machine outlive CometBFT's stop, which forgets them.
		if e := n.ProxyApp().Stop(); e != nil {
			err = errors.Join(err, fmt.Errorf("stop replica: %w", e))
		}
	}()
	if err := n.Start(); err != nil {
		return fmt.Errorf("start chain %s: %w", v.c.Genesis.Chain, errors.Join(err, n.EventBus().Stop()))
	}
	defer func() {
		if e := n.Stop(); e != nil {
			err = errors.Join(err, fmt.Errorf("stop chain %s: %w", v.c.Genesis.Chain, e))
		}
		// A block may still be telling the mempool.
		n.Mempool().Lock()
		//lint:ignore SA2001 waiting is the point
		n.Mempool().Unlock()
	}()
	v.mu.Lock()
	v.blocks, v.pool = n.BlockStore(), n.Mempool()
	v.mu.Unlock()

	if err := n.Mempool().CheckTx([]byte(wake), nil, mempool.TxInfo{}); err != nil {
		v.log.Warn("the first block waits", "error", err)
	}
	err = v.serve(ctx)
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) && !errors.Is(cause, context.DeadlineExceeded) {
		err = errors.Join(cause, err)
	}
	return err
}

// config is CometBFT's configuration: consensus is its only port, it writes no file but its log, and asks nobody.
func (v *Validator) config() *cfg.Config {
	c := cfg.DefaultConfig()
	c.SetRoot(v.c.Home)
	c.FilterPeers = true
	c.RPC.ListenAddress = ""
	c.RPC.GRPCListenAddress = ""
	c.RPC.PprofListenAddress = ""
	c.TxIndex.Indexer = "null"
	c.Storage.DiscardABCIResponses = true
	c.StateSync.Enable = false
	c.Instrumentation.Prometheus = false
	c.BlockSync.AdaptiveSync = false

	t := v.c.Timeouts
	c.Consensus.WalPath = walFile
	c.Consensus.TimeoutPropose = or(t.Propose, 200*time.Millisecond)
	c.Consensus.TimeoutPrevote = or(t.Prevote, 100*time.Millisecond)
	c.Consensus.TimeoutPrecommit = or(t.Precommit, 100*time.Millisecond)
	c.Consensus.TimeoutProposeDelta = c.Consensus.TimeoutPropose / 2
	c.Consensus.TimeoutPrevoteDelta = c.Consensus.TimeoutPrevote / 2
	c.Consensus.TimeoutPrecommitDelta = c.Consensus.TimeoutPrecommit / 2
	c.Consensus.TimeoutCommit = t.Commit
	c.Consensus.SkipTimeoutCommit = true
	c.Consensus.CreateEmptyBlocks = true
	c.Consensus.CreateEmptyBlocksInterval = or(t.Idle, time.Second)
	c.Consensus.PeerGossipSleepDuration = 2 * time.Millisecond
	c.Consensus.PeerQueryMaj23SleepDuration = 500 * time.Millisecond

	c.P2P.ListenAddress = "tcp://" + v.c.P2P
	c.P2P.PexReactor = false
	c.P2P.AddrBook = "peers.json" // never written: peer exchange is off
	c.P2P.AddrBookStrict = false
	c.P2P.AllowDuplicateIP = true
	c.P2P.FlushThrottleTimeout = time.Millisecond
	c.P2P.SendRate = 64 << 20
	c.P2P.RecvRate = 64 << 20
	c.P2P.PersistentPeersMaxDialPeriod = 2 * time.Second
	c.P2P.MaxNumInboundPeers = 2*len(v.c.Peers) + 8
	c.P2P.MaxNumOutboundPeers = len(v.c.Peers) + 1
	var peers, ids []string
	for _, p := range v.c.Peers {
		peers = append(peers, p2p.IDAddressString(p2p.ID(p.ID), p.Addr))
		ids = append(ids, p.ID)
	}
	c.P2P.PersistentPeers = strings.Join(peers, ",")
	c.P2P.UnconditionalPeerIDs = strings.Join(ids, ",")

	c.Mempool.Size = 5000
	c.Mempool.MaxTxBytes = MaxTx
	c.Mempool.MaxTxsBytes = 64 << 20
	c.Mempool.CacheSize = 10_000
	return c
}

func or(d, zero time.Duration) time.Duration {
	if d == 0 {
		return zero
	}
	return d
}

// Submit does what a client's Submit does, in process.
func (v *Validator) Submit(ctx context.Context, tx []byte) (Committed, error) {
	a := v.replica()
	v.mu.Lock()
	pool := v.pool
	v.mu.Unlock()
	if a == nil || pool == nil {
		return Committed{}, fmt.Errorf("submit transaction: %w", ErrUnavailable)
	}
	hash := sha256.Sum256(tx)
	done, forget := a.wait(hash)
	defer forget()
	if s, ok, err := a.result(hash); err != nil {
		return Committed{}, err
	} else if ok && s.Code == 0 {
		return Committed{Height: s.Height, Result: Result{Code: s.Code, Log: s.Log}}, nil
	}
	var refused *abci.ResponseCheckTx
	err := pool.CheckTx(tx, func(r *abci.ResponseCheckTx) { refused = r }, mempool.TxInfo{})
	switch {
	case errors.Is(err, mempool.ErrTxInCache):
		// In the mempool, or just committed, or known to be bad for as long as it is in CometBFT's cache.
		if err := a.check(tx); err != nil {
			if s, ok, e := a.result(hash); e == nil && ok {
				return Committed{Height: s.Height, Result: Result{Code: s.Code, Log: s.Log}}, nil
			}
			return Committed{}, fmt.Errorf("%w: %w", ErrRefused, err)
		}
	case err != nil:
		var full mempool.ErrMempoolIsFull
		if errors.As(err, &full) {
			return Committed{}, fmt.Errorf("submit transaction: %w: %w", ErrUnavailable, err)
		}
		return Committed{}, fmt.Errorf("%w: %w", ErrRefused, err)
	case refused != nil && refused.Code != 0:
		if s, ok, e := a.result(hash); e == nil && ok { // committed in the meantime, or failed in a block
			return Committed{Height: s.Height, Result: Result{Code: s.Code, Log: s.Log}}, nil
		}
		return Committed{}, fmt.Errorf("%w: %s", ErrRefused, refused.Log)
	}
	select {
	case r := <-done:
		return r, nil
	case <-ctx.Done():
		return Committed{}, fmt.Errorf("wait for transaction %x: %w", hash[:8], context.Cause(ctx))
	}
}

// check says whether a chain can begin with g.
func (g *Genesis) check() error {
	if len(g.Chain) == 0 || len(g.Chain) > MaxChain {
		return fmt.Errorf("chain %q: the name has from 1 to %d bytes", g.Chain, MaxChain)
	}
	if g.Time.IsZero() {
		return fmt.Errorf("chain %s has no genesis time", g.Chain)
	}
	_, err := g.validators()
	return err
}

func (g *Genesis) validators() (*types.ValidatorSet, error) {
	if len(g.Validators) == 0 {
		return nil, fmt.Errorf("chain %s has no validators", g.Chain)
	}
	var vs []*types.Validator
	var total int64
	seen := map[string]bool{}
	for i, m := range g.Validators {
		k, err := mldsa65.NewPubKeyFromBytes(m.Key)
		if err != nil {
			return nil, fmt.Errorf("chain %s: validator %d: %w", g.Chain, i, err)
		}
		if m.Power < 1 || m.Power > types.MaxTotalVotingPower-total {
			return nil, fmt.Errorf("chain %s: validator %d has power %d", g.Chain, i, m.Power)
		}
		if seen[string(m.Key)] {
			return nil, fmt.Errorf("chain %s: validator %d is there twice", g.Chain, i)
		}
		seen[string(m.Key)] = true
		total += m.Power
		vs = append(vs, types.NewValidator(k, m.Power))
	}
	return types.NewValidatorSet(vs), nil
}

// maxSet is how many validators a block has room for.
const maxSet = 150

func (g *Genesis) doc() (*types.GenesisDoc, error) {
	set, err := g.validators()
	if err != nil {
		return nil, err
	}
	p := types.DefaultConsensusParams()
	p.Block.MaxBytes = MaxBlock + maxExtended + types.MaxCommitBytes(maxSet) + 1<<20
	p.Validator.PubKeyTypes = []string{types.ABCIPubKeyTypeMlDsa65}
	p.ABCI.VoteExtensionsEnableHeight = 1
	p.Version.App = 1
	doc := &types.GenesisDoc{ChainID: g.Chain, GenesisTime: g.Time.UTC().Truncate(time.Millisecond), InitialHeight: 1, ConsensusParams: p}
	for _, v := range set.Validators {
		doc.Validators = append(doc.Validators, types.GenesisValidator{Address: v.Address, PubKey: v.PubKey, Power: v.VotingPower})
	}
	if err := doc.ValidateAndComplete(); err != nil {
		return nil, fmt.Errorf("chain %s: %w", g.Chain, err)
	}
	return doc, nil
}

// digest tells chains apart on disk.
func (g *Genesis) digest() [32]byte {
	type member struct {
		Key   []byte `cbor:"1,keyasint"`
		Power int64  `cbor:"2,keyasint"`
	}
	v := struct {
		Label   string   `cbor:"1,keyasint"`
		Chain   string   `cbor:"2,keyasint"`
		Time    int64    `cbor:"3,keyasint"`
		Members []member `cbor:"4,keyasint"`
		State   []byte   `cbor:"5,keyasint"`
	}{Label: "holdfast/chain-genesis/v1", Chain: g.Chain, Time: g.Time.UnixMilli(), State: g.State}
	for _, m := range g.Validators {
		v.Members = append(v.Members, member(m))
	}
	return sha256.Sum256(canonical.Encode(v))
}

// cometLog passes CometBFT's warnings on, at most logBurst in logWindow, and turns its cry that consensus has failed,
// after which it would stay up and do nothing, into the end of the replica.
type cometLog struct {
	*cometLogState
	with []any
}

type cometLogState struct {
	ctx  context.Context
	out  *slog.Logger
	fail context.CancelCauseFunc

	mu      sync.Mutex
	since   time.Time
	n, lost int
}

const (
	logBurst  = 20
	logWindow = 10 * time.Second
)

func newCometLog(ctx context.Context, out *slog.Logger, fail context.CancelCauseFunc) cmtlog.Logger {
	return &cometLog{cometLogState: &cometLogState{ctx: ctx, out: out, fail: fail}}
}

func (l *cometLog) Debug(string, ...any) {}
func (l *cometLog) Info(string, ...any)  {}

func (l *cometLog) Warn(msg string, kv ...any) { l.write(slog.LevelWarn, msg, kv) }

func (l *cometLog) Error(msg string, kv ...any) {
	if strings.HasPrefix(msg, "CONSENSUS FAILURE") {
		l.out.Error("consensus failed", l.args(kv)...)
		l.fail(fmt.Errorf("consensus failed: %v", kv))
		return
	}
	l.write(slog.LevelWarn, msg, kv) // what CometBFT calls an error is mostly a peer that went away
}

func (l *cometLog) With(kv ...any) cmtlog.Logger {
	return &cometLog{cometLogState: l.cometLogState, with: append(l.with[:len(l.with):len(l.with)], kv...)}
}

func (l *cometLog) args(kv []any) []any {
	out := append(l.with[:len(l.with):len(l.with)], kv...)
	for i := 1; i < len(out); i += 2 {
		out[i] = short(fmt.Sprint(out[i]))
	}
	return out
}

func (l *cometLog) write(level slog.Level, msg string, kv []any) {
	if l.ctx.Err() != nil || !l.out.Enabled(l.ctx, level) {
		return // it complains about its own stop
	}
	now := time.Now()
	l.mu.Lock()
	if now.Sub(l.since) > logWindow {
		if l.lost > 0 {
			l.out.Warn("dropped messages of cometbft", "count", l.lost)
		}
		l.since, l.n, l.lost = now, 0, 0
	}
	l.n++
	drop := l.n > logBurst
	if drop {
		l.lost++
	}
	l.mu.Unlock()
	if !drop {
		l.out.Log(l.ctx, level, "cometbft: "+msg, l.args(kv)...)
	}
}
