package comet

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/cometbft/cometbft/light"
	"github.com/cometbft/cometbft/types"

	"holdfast/internal/canonical"
)

// block is a header that is, or may become, trusted, with its validator set.
type block struct {
	*types.SignedHeader
	set *types.ValidatorSet
	via *block // of another set, and vouched for it; nil: the genesis. Of a block that is not trusted it says nothing
}

// follows says that at has vouched for b.
func (b *block) follows(at *block) {
	switch {
	case bytes.Equal(b.ValidatorsHash, at.ValidatorsHash):
		b.via = at.via
	case at.Height > 0:
		b.via = at
	}
}

// chain is what a client knows of a chain. It begins with a header of height 0, made up from the genesis, whose
// validators vouch for the first real one.
type chain struct {
	name   string
	drift  time.Duration
	period time.Duration
	store  TrustStore          // may be nil
	first  *types.ValidatorSet // of the genesis

	mu    sync.Mutex
	top   *block
	seen  map[int64]string // hashes of the newest verified headers by height
	saved time.Time
	dirty bool
}

const (
	keepSeen = 512
	forever  = 100 * 365 * 24 * time.Hour
	// maxBisect bounds the headers fetched to follow changes of the validator set over a long absence.
	maxBisect = 64
	// maxPath bounds the sets that a memory leads through.
	maxPath   = 1024
	maxMemory = 64 << 20
)

// trustFile is what a TrustStore keeps.
type trustFile struct {
	Version uint8  `cbor:"1,keyasint"` // 1
	Chain   string `cbor:"2,keyasint"`
	Head    head   `cbor:"3,keyasint"`
	Path    []head `cbor:"4,keyasint,omitempty"` // from the genesis to Head, the oldest first: each vouches for the next
}

func newChain(g *Genesis, c *ClientConfig) (*chain, error) {
	set, err := g.validators()
	if err != nil {
		return nil, err
	}
	ch := &chain{name: g.Chain, drift: or(c.MaxClockDrift, 10*time.Second), period: or(c.TrustPeriod, forever),
		store: c.Trust, first: set, seen: map[int64]string{}}
	ch.top = &block{set: set, SignedHeader: &types.SignedHeader{Header: &types.Header{
		ChainID: g.Chain, Height: 0, Time: g.Time.UTC().Truncate(time.Millisecond).Add(-time.Millisecond),
		ValidatorsHash: set.Hash(), NextValidatorsHash: set.Hash(),
	}}}
	return ch, nil
}

// load reads the trust store.
func (c *chain) load() error {
	if c.store == nil {
		return nil
	}
	b, err := c.store.Load()
	if err != nil || b == nil {
		return err
	}
	var f trustFile
	if err := canonical.Decode(b, maxMemory, &f); err != nil {
		return fmt.Errorf("read trusted header: %w", err)
	}
	if f.Version != 1 || f.Chain != c.name {
		return fmt.Errorf("read trusted header: it is of chain %q, not %q", f.Chain, c.name)
	}
	if len(f.Path) > maxPath {
		return fmt.Errorf("read trusted header: it leads through %d sets", len(f.Path))
	}
	// A file must not know better than the genesis who validators are: all that led away from it is verified again.
	at := c.top
	for _, h := range append(f.Path, f.Head) {
		sh, set, err := decodeHead(h)
		if err == nil && set == nil {
			err = errors.New("it has no validators")
		}
		if err == nil {
			err = sh.ValidateBasic(c.name)
		}
		if err == nil {
			err = light.Verify(at.SignedHeader, at.set, sh, set, forever, sh.Time, c.drift, light.DefaultTrustLevel)
		}
		if err != nil {
			return fmt.Errorf("read trusted header: %w", err)
		}
		next := &block{SignedHeader: sh, set: set}
		next.follows(at)
		at = next
	}
	c.top = at
	c.seen[at.Height] = string(at.Hash())
	return nil
}

// trusted returns the newest header that is trusted.
func (c *chain) trusted() *block {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.top
}

// verify checks b against base, which was trusted when the request for b began, and makes it trusted. It fetches headers
// between the two where the validator set has changed too much. Newer requests may have advanced the trust meanwhile:
// b may then be older than the newest, but never older than base.
func (c *chain) verify(ctx context.Context, base, b *block, now time.Time, fetch func(context.Context, int64) (*block, error)) error {
	if err := b.ValidateBasic(c.name); err != nil {
		return fmt.Errorf("%w: %w", ErrProof, err)
	}
	hash := string(b.Hash())
	c.mu.Lock()
	known, ok := c.seen[b.Height]
	c.mu.Unlock()
	switch {
	case ok && known == hash:
		// Its signatures were verified before; these may be others, and nothing rests on them.
		if b.Height < base.Height {
			return fmt.Errorf("%w: header %d after header %d", ErrRollback, b.Height, base.Height)
		}
		return nil
	case ok:
		return c.fork(b)
	case b.Height < base.Height:
		return fmt.Errorf("%w: header %d after header %d", ErrRollback, b.Height, base.Height)
	case b.Height == base.Height && hash == string(base.Hash()):
		return nil
	case b.Height == base.Height:
		return c.fork(b)
	case b.set == nil:
		return fmt.Errorf("%w: header %d comes without its validators", ErrProof, b.Height)
	}
	at := base
	path := []*block{b}
	for fetched := 0; len(path) > 0; {
		next := path[len(path)-1]
		if at.Height > 0 && next.Height == at.Height+1 && !bytes.Equal(next.LastBlockID.Hash, at.Hash()) {
			return c.fork(next)
		}
		err := light.Verify(at.SignedHeader, at.set, next.SignedHeader, next.set, c.period, now, c.drift, light.DefaultTrustLevel)
		var unknown light.ErrNewValSetCantBeTrusted
		switch {
		case err == nil:
			next.follows(at)
			at, path = next, path[:len(path)-1]
		case errors.As(err, &unknown) && next.Height > at.Height+1 && fetched < maxBisect:
			fetched++
			mid, err := fetch(ctx, at.Height+(next.Height-at.Height)/2)
			if err != nil {
				return fmt.Errorf("follow validators from height %d to %d: %w", at.Height, next.Height, err)
			}
			if mid.set == nil || mid.Height <= at.Height || mid.Height >= next.Height {
				return fmt.Errorf("%w: header %d is not between %d and %d", ErrProof, mid.Height, at.Height, next.Height)
			}
			path = append(path, mid)
		default:
			return fmt.Errorf("%w: header %d after header %d: %w", ErrProof, next.Height, at.Height, err)
		}
	}
	return c.trust(b, now)
}

// fork says what to make of a header that differs from a trusted one of its height.
func (c *chain) fork(b *block) error {
	for _, set := range []*types.ValidatorSet{b.set, c.trusted().set} {
		if set != nil && bytes.Equal(set.Hash(), c.trusted().ValidatorsHash) &&
			set.VerifyCommitLight(c.name, b.Commit.BlockID, b.Height, b.Commit) == nil {
			return fmt.Errorf("%w: two headers of height %d are signed by the same validators", ErrFork, b.Height)
		}
	}
	return fmt.Errorf("%w: another header of height %d is trusted", ErrProof, b.Height)
}

// trust remembers a verified header.
func (c *chain) trust(b *block, now time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if h, ok := c.seen[b.Height]; ok && h != string(b.Hash()) {
		return fmt.Errorf("%w: two headers of height %d", ErrFork, b.Height) // came in while this one was verified
	}
	c.seen[b.Height] = string(b.Hash())
	for h := range c.seen {
		if h <= b.Height-keepSeen {
			delete(c.seen, h)
		}
	}
	if b.Height <= c.top.Height {
		return nil
	}
	c.top, c.dirty = b, true
	if now.Sub(c.saved).Abs() < time.Second {
		return nil // flush saves it
	}
	c.saved = now
	return c.save()
}

// flush saves the newest header if it is not.
func (c *chain) flush() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.save()
}

func (c *chain) save() error {
	if c.store == nil || !c.dirty {
		return nil
	}
	f := trustFile{Version: 1, Chain: c.name}
	var err error
	f.Head, err = encodeHead(c.top.SignedHeader, c.top.set, nil)
	for b := c.top.via; b != nil && err == nil; b = b.via {
		var h head
		h, err = encodeHead(b.SignedHeader, b.set, nil)
		f.Path = append(f.Path, h)
	}
	slices.Reverse(f.Path)
	if err == nil {
		err = c.store.Save(canonical.Encode(f))
	}
	if err != nil {
		return fmt.Errorf("save trusted header: %w", err)
	}
	c.dirty = false
	return nil
}

// A TrustStore keeps the newest header that a client trusts, so that a later one is not led back behind it.
type TrustStore interface {
	Load() ([]byte, error) // nil when there is none
	Save([]byte) error     // atomic
}

// FileTrust is a TrustStore in a file.
type FileTrust string

// Load reads the file.
func (f FileTrust) Load() ([]byte, error) {
	b, err := os.ReadFile(string(f))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	return b, err
}

// Save replaces the file. It is not synced: after a loss of power an older header is there, which is as safe as it was.
func (f FileTrust) Save(b []byte) error {
	t, err := os.CreateTemp(filepath.Dir(string(f)), ".trust-*")
	if err != nil {
		return err
	}
	defer os.Remove(t.Name())
	_, err = t.Write(b)
	if err = errors.Join(err, t.Close()); err != nil {
		return err
	}
	return os.Rename(t.Name(), string(f))
}
