package comet

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"time"
)

var errSkeleton = errors.New("comet: not built yet")

// Keys are a validator's keys, in one file that only its owner reads.
type Keys struct {
	Public []byte // ML-DSA-65, for Genesis
	Peer   string // identifies the consensus port, for Peer.ID
}

// MakeKeys returns the keys in home, and makes them when there are none. `New` needs them to be there.
func MakeKeys(home string) (Keys, error) { return Keys{}, errSkeleton }

// LoadCertificate returns the TLS certificate in file (key and self-signed leaf, 0600), and makes one when there is none.
func LoadCertificate(file, name string) (tls.Certificate, error) {
	return tls.Certificate{}, errSkeleton
}

// A Pin is the SHA-256 digest of a server's public key (its SubjectPublicKeyInfo).
type Pin [32]byte

// PinOf returns the pin of a certificate.
func PinOf(c tls.Certificate) (Pin, error) { return Pin{}, errSkeleton }

// Validator is one replica.
type Validator struct{}

// New checks a configuration. It reads, writes and listens on nothing.
func New(c Config) (*Validator, error) { return nil, errSkeleton }

// Run takes part in consensus and serves the API until ctx ends or the replica fails.
func (v *Validator) Run(ctx context.Context) error { return errSkeleton }

// Ready is closed when the API answers.
func (v *Validator) Ready() <-chan struct{} { return nil }

// State returns the newest state and its height, for Handlers and Extend; nil before the replica has one.
func (v *Validator) State() (State, int64) { return nil, 0 }

// Submit does what a client's Submit does, in process.
func (v *Validator) Submit(ctx context.Context, tx []byte) (Committed, error) {
	return Committed{}, errSkeleton
}

// Committed is what became of a transaction, and where.
type Committed struct {
	Height int64
	Result
}

// Server is how a client reaches one validator's API.
type Server struct {
	Dial func(ctx context.Context) (net.Conn, error) // required
	Name string                                      // TLS server name
	Pins []Pin                                       // at least one; the server's key must be one of these
}

// ClientConfig is a client's configuration.
type ClientConfig struct {
	Servers       []Server      // at least one; the next one is tried when one fails
	Genesis       Genesis       // State may be empty
	Trust         TrustStore    // remembers the newest header seen; nil forgets it with the Client
	Verify        Verifier      // required
	MaxAge        time.Duration // a head older than this is refused as stale; 0 means 30s
	MaxClockDrift time.Duration // a head more than this in the future is refused; 0 means 10s
	TrustPeriod   time.Duration // how long a remembered header may vouch for newer ones; 0 means forever
	Log           *slog.Logger  // nil discards
}

// A TrustStore keeps the newest header that a client trusts.
type TrustStore interface {
	Load() ([]byte, error) // nil when there is none
	Save([]byte) error     // atomic
}

// FileTrust is a TrustStore in a file.
func FileTrust(file string) TrustStore { return nil }

// Client reads the ledger and submits to it. It is safe for concurrent use.
type Client struct{}

// NewClient checks a configuration. It dials nothing and reads nothing.
func NewClient(c ClientConfig) (*Client, error) { return nil, errSkeleton }

// Close closes idle connections.
func (c *Client) Close() {}

// View is the proven values of some keys at one height.
type View struct {
	Height int64     // of the state
	Time   time.Time // of the header that proves it
}

// Value returns a key's value, and whether it is present. It panics when the key was not asked for.
func (v View) Value(key string) ([]byte, bool) { return nil, false }

// Read returns the values of keys at the newest provable height.
func (c *Client) Read(ctx context.Context, keys ...string) (View, error) {
	return c.ReadAt(ctx, 0, keys...)
}

// ReadAt is Read at minHeight or above: after a Submit that returned minHeight it shows what was submitted.
func (c *Client) ReadAt(ctx context.Context, minHeight int64, keys ...string) (View, error) {
	return View{}, errSkeleton
}

// Watch returns when the state has changed after the given height, with a height at or above the change,
// or after about 25 s with the height unchanged. The answer is a hint: only a Read proves.
func (c *Client) Watch(ctx context.Context, after int64) (int64, error) { return 0, errSkeleton }

// Submit sends a transaction and returns when it is committed. Sending the same bytes again is safe: it returns
// what became of them. A transaction that is refused before it enters a block is an error that wraps ErrRefused.
func (c *Client) Submit(ctx context.Context, tx []byte) (Committed, error) {
	return Committed{}, errSkeleton
}

// Do sends a request for one of Config.Handlers over the pinned connection. The URL's scheme and host are replaced.
func (c *Client) Do(r *http.Request) (*http.Response, error) { return nil, errSkeleton }

// Errors that a caller may want to tell apart. All but ErrRefused and ErrUnavailable say that a server lies or is broken.
var (
	ErrRefused     = errors.New("transaction refused")
	ErrUnavailable = errors.New("no server answers")
	ErrProof       = errors.New("answer is not proven")
	ErrRollback    = errors.New("server is behind what this client has seen")
	ErrFork        = errors.New("chain is forked")
	ErrStale       = errors.New("head is too old")
)
