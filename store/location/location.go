// Package location keeps shards for stores: a directory (Dir), a server of it (Server) and its client (Client). A location
// is a place that nobody trusts. It sees sealed bytes, their sizes and when they come and go; it holds no key of a store,
// decides nothing about what shards mean, and what it says is checked by who asked: a shard by its name, which is the root
// of its Merkle tree, an audit by the proofs, a head by the signature that the store made.
//
// What it promises to a store is durability before the answer, quotas, a hold on deletes, locks until a time, and a
// fence: once a front end has announced a higher epoch, writes of lower ones are refused.
//
// Bytes on disk and on the wire: docs/formats/location.md.
package location

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"holdfast/disperse"
)

// Name is what a shard is called: it commits the shard's bytes and length.
type Name = disperse.Name

// Epoch numbers a store's front ends. Only the newest one writes.
type Epoch uint64

// A Holder tells front ends apart that announce the same epoch: the first one has it. Nobody else writes under that epoch,
// whatever credential he has: a holder is told to locations alone.
type Holder [16]byte

// front is who writes.
type front struct {
	epoch  Epoch
	holder Holder
}

// Limits.
const (
	MaxShard  = disperse.MaxShard
	MaxHead   = 4 << 10 // bytes of a head
	MaxLeaves = 64      // of one challenge
	MaxHeads  = 64      // that are kept of earlier epochs
	MaxPage   = 1024    // names of one page of a list

	// maxLeap is how far an epoch may grow at once: who stole a credential cannot use up all epochs there are.
	maxLeap = 1 << 32
)

// Errors, the same from a directory and through a client.
var (
	ErrAbsent  = errors.New("shard is not there")
	ErrName    = errors.New("bytes are not those of the name")
	ErrSize    = errors.New("size or range is not possible")
	ErrRotten  = errors.New("shard is rotten")
	ErrLocked  = errors.New("shard is locked")
	ErrFull    = errors.New("no space is left")
	ErrQuota   = errors.New("quota is used up")
	ErrFenced  = errors.New("another front end has announced itself")
	ErrEpoch   = errors.New("epoch is not announced")
	ErrOldHead = errors.New("a newer head is there")
	ErrRights  = errors.New("this key has no right to that")
	ErrBusy    = errors.New("location has too much to do")
	ErrBroken  = errors.New("location cannot write any more")
)

// Location is what a store's front end needs of a place that keeps its shards. Put and Get take whole buffers: a shard's
// name is only known when all its bytes are.
type Location interface {
	// Announce makes e the epoch of this value's writes, and fences lower ones off. It may be repeated by the same holder.
	Announce(ctx context.Context, e Epoch, h Holder) error
	// Put stores a shard durably, or nothing. A shard that is there is only locked for longer, if retain says so; one
	// that was deleted is back; one that is rotten is replaced. The zero time locks nothing.
	Put(ctx context.Context, n Name, shard []byte, retain time.Time) error
	// Append is Put and then PutHead, as one change: a crash may leave the shard without the head, never the head without
	// the shard. When the head is refused the shard is not kept either.
	Append(ctx context.Context, n Name, shard []byte, sequence uint64, signed []byte) error
	// Get fills p with the bytes from off on. They are not checked against anything: who has keys tells
	// rot sooner than a checksum does.
	Get(ctx context.Context, n Name, off int64, p []byte) error
	Stat(ctx context.Context, n Name) (Info, error)
	// List returns shards in the order of their names, from a name on, and the name to go on from; the zero name is the end.
	List(ctx context.Context, from Name, which Which) ([]Info, Name, error)
	// Delete hides a shard, and has it removed when the location's hold is over.
	Delete(ctx context.Context, n Name) error
	// Undelete brings back what is held. Purge removes it now. Both need Recover.
	Undelete(ctx context.Context, n Name) error
	Purge(ctx context.Context, n Name) error
	// Retain locks a shard until a time, never for shorter than it is.
	Retain(ctx context.Context, n Name, until time.Time) error
	// PutHead replaces the head by one of this value's epoch that is newer.
	PutHead(ctx context.Context, sequence uint64, signed []byte) error
	// Head is the newest head; its Epoch is 0 if there is none.
	Head(ctx context.Context) (Head, error)
	// Earlier are the last heads of earlier epochs, the newest first, as long as the hold lasts after the head that replaced them.
	Earlier(ctx context.Context) ([]Head, error)
	// Prove returns leaves of a shard with their proofs, for Check.
	Prove(ctx context.Context, n Name, leaves []int) (Proof, error)
	Status(ctx context.Context) (Status, error)
}

// Which shards a list is of.
type Which uint8

const (
	Live   Which = iota // those that can be read, or are rotten
	Held                // deleted, and not removed yet
	Rotten              // known to be rotten
)

// Info is what a location knows of a shard.
type Info struct {
	Name    Name
	Size    int64
	Put     time.Time // when it came; when it came again, if it had been deleted or rotten
	Retain  time.Time // zero: not locked
	Deleted time.Time // zero: not deleted
	Rotten  bool
}

// Head is the newest end of a store's log that the location was told of. What Bytes says, and whether it is signed, is the
// store's business.
type Head struct {
	Epoch    Epoch
	Sequence uint64
	Bytes    []byte
}

// Status is a location seen by one store.
type Status struct {
	Epoch         Epoch // the highest that was announced
	Shards, Bytes int64 // all that count for the quota, held ones included
	Held, Rotten  int64
	Quota         Quota
	Hold          time.Duration
	Time          time.Time // by which holds and locks end
	Scrubbed      time.Time // when the last whole scrub ended, zero if none since the start
}

// Quota bounds what a store keeps at a location; 0 means no bound.
type Quota struct {
	Bytes  int64 `json:"bytes"`
	Shards int64 `json:"shards"`
}

// Rights are what a key may do.
type Rights uint8

const (
	Read    Rights = 1 << iota
	Write          // put, retain, announce, and move the head
	Delete         // into the hold
	Recover        // undelete, purge
)

const rightNames = "read write delete recover"

func (r Rights) String() string {
	var out []string
	for i, n := range strings.Fields(rightNames) {
		if r&(1<<i) != 0 {
			out = append(out, n)
		}
	}
	return strings.Join(out, ",")
}

// ParseRights reads names of rights.
func ParseRights(names []string) (r Rights, err error) {
next:
	for _, n := range names {
		for i, known := range strings.Fields(rightNames) {
			if n == known {
				r |= 1 << i
				continue next
			}
		}
		return 0, fmt.Errorf("right %q: there are %s", n, rightNames)
	}
	return r, nil
}

// A Pin is the SHA-256 digest of a key's SubjectPublicKeyInfo.
type Pin [32]byte

func (p Pin) String() string { return hex.EncodeToString(p[:]) }

// ParsePin reads the form that String writes.
func ParsePin(s string) (p Pin, err error) {
	if len(s) != 2*len(p) {
		return p, fmt.Errorf("pin %.80q: not %d hexadecimal digits", s, 2*len(p))
	}
	if _, err := hex.Decode(p[:], []byte(s)); err != nil {
		return Pin{}, fmt.Errorf("pin %q: %w", s, err)
	}
	return p, nil
}

// Proof shows that its maker holds leaves of a shard. It answers leaves that the asker drew at random: that is what makes
// it fresh.
type Proof struct {
	Size   int64
	Leaves []Leaf // in the order in which they were asked for
}

// Leaf is one leaf and the hashes beside its way to the root.
type Leaf struct{ Data, Path []byte }

// Check says whether the proof is of those leaves of that shard, whose size the asker knows. Nothing in it is trusted.
func (p Proof) Check(n Name, size int64, leaves []int) error {
	if p.Size != size || len(p.Leaves) != len(leaves) {
		return fmt.Errorf("proof of %d leaves of %d bytes, asked for %d of %d: %w", len(p.Leaves), p.Size, len(leaves), size, disperse.ErrProof)
	}
	for i, l := range p.Leaves {
		if want := min(size-int64(leaves[i])*disperse.LeafSize, disperse.LeafSize); int64(len(l.Data)) != want {
			return fmt.Errorf("leaf %d of shard %v has %d bytes, not %d: %w", leaves[i], n, len(l.Data), want, disperse.ErrProof)
		}
		if err := disperse.Verify(n, size, leaves[i], l.Data, l.Path); err != nil {
			return err
		}
	}
	return nil
}
