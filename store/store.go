package store

import (
	"context"
	"errors"
	"io"

	"holdfast/disperse"
	"holdfast/store/location"
)

// Errors of a dispersed store, beside those of a location.
var (
	// ErrBusy is returned when too few locations answered in time. What was asked for may happen yet.
	ErrBusy = errors.New("too few locations answer")
	// ErrLost is returned for a body of which fewer than k shards can be had.
	ErrLost = errors.New("too few shards are left")
	// ErrClass is returned for a storage class that the store does not have.
	ErrClass = errors.New("storage class is unknown")
	// ErrOld is returned when another front end has taken the store over.
	ErrOld = errors.New("another front end has this store now")
	// ErrDamaged is returned when files of the front end's directory are damaged or gone. A restore makes them anew from the
	// locations.
	ErrDamaged = errors.New("files of the front end are damaged")
)

// Member is a place that a store uses.
type Member struct {
	ID       disperse.Place
	Farm     string // whose machine it is; a segment has one shard a farm where there are enough of them
	Location location.Location
	Down     bool // somebody knows that it does not answer just now: Open asks it, and does not wait for it
}

// A Body is the bytes of an object or of a part of one, as they lie in a store: in order, in segments. The value is what
// metadata keeps of it (MarshalBinary). One that came from Write is not there for good before a Tx has kept it.
type Body struct {
	Size     int64
	Segments []Piece
}

// Piece is a segment's place in a body.
type Piece struct {
	ID   disperse.ID
	Size uint32 // plain bytes
}

// Reader reads a store's metadata, an ordered map, as it was at one moment.
type Reader interface {
	// Get returns a value that the caller may keep, and false if there is none.
	Get(key []byte) ([]byte, bool, error)
	// Scan returns a cursor over the keys from..to, to excluded. The caller closes it.
	Scan(from, to []byte) Cursor
}

// Cursor walks keys in order. It is before the first key until Next or Seek has been called. Key and Value are valid
// until the next move.
type Cursor interface {
	Next() bool
	// Seek goes to the first key that is not before key.
	Seek(key []byte) bool
	Key() []byte
	Value() []byte
	// Close returns what stopped the walk, if it was not the end.
	Close() error
}

// Tx is a change of the metadata that happens as a whole, or not. It reads what it has written.
type Tx interface {
	Reader
	Set(key, value []byte)
	Delete(key []byte)
	// Keep makes a body that Write returned part of the store. Each is kept once.
	Keep(b Body)
	// Drop lets go of a body that was kept. Its shards go when nobody reads it any more.
	Drop(b Body)
}

// Objects is what a layer of objects needs of a store. A body may be read while it is dropped.
type Objects interface {
	// Write takes bytes until r ends. size is how many there will be, or -1. What is never kept is removed in time.
	Write(ctx context.Context, class string, r io.Reader, size int64) (Body, error)
	// Discard lets go of a body that will not be kept.
	Discard(b Body)
	// Read returns the n bytes of a body from off on, authenticated before any of them is seen.
	Read(ctx context.Context, b Body, off, n int64) (io.ReadCloser, error)
	// View runs f on the metadata as it is now.
	View(ctx context.Context, f func(Reader) error) error
	// Update runs f, alone, and returns when what it did is durable at enough locations and can be seen. f may run more
	// than once, must not block, and nothing happens if it fails: its error is returned. With ErrBusy it may happen yet.
	Update(ctx context.Context, f func(Tx) error) error
}
