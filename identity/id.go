// Package identity holds who is who: identifiers in one checksummed text form, hybrid signing keys, HPKE keys, accounts
// with their devices and policies, and the files that keep private keys. It verifies and decides; it never talks to
// anything and keeps no state.
//
// Text form of an identifier: bech32m (BIP 350) over the 32 bytes of a digest, with a prefix that names the kind
// ("acct1…", "node1…"). Six characters of checksum catch every single typo and every swap of neighbours.
package identity

import (
	"fmt"
	"strings"

	"github.com/btcsuite/btcd/btcutil/bech32"
)

// Kind names what an identifier identifies. Its Prefix is the part of the text form before the "1".
type Kind interface{ Prefix() string }

// ID is the digest of what it identifies; IDs of different kinds are different types.
type ID[K Kind] [32]byte

type (
	accountKind struct{}
	deviceKind  struct{}
	nodeKind    struct{}
	farmKind    struct{}
	gatewayKind struct{}
	gridKind    struct{}
)

func (accountKind) Prefix() string { return "acct" }
func (deviceKind) Prefix() string  { return "dev" }
func (nodeKind) Prefix() string    { return "node" }
func (farmKind) Prefix() string    { return "farm" }
func (gatewayKind) Prefix() string { return "gw" }
func (gridKind) Prefix() string    { return "grid" }

type (
	// An AccountID is the digest of the transaction that created the account.
	AccountID = ID[accountKind]
	// A DeviceID is the digest of a device's public key.
	DeviceID = ID[deviceKind]
	// A NodeID is the digest of a node's public key.
	NodeID = ID[nodeKind]
	// A FarmID is the digest of the transaction that admitted the farm.
	FarmID = ID[farmKind]
	// A GatewayID is the digest of a gateway's TLS public key (SubjectPublicKeyInfo).
	GatewayID = ID[gatewayKind]
	// A GridID is the digest of the grid's genesis document.
	GridID = ID[gridKind]
)

// String is the text form.
func (id ID[K]) String() string {
	var k K
	five, err := bech32.ConvertBits(id[:], 8, 5, true)
	if err != nil {
		panic(err) // 32 bytes always convert
	}
	s, err := bech32.EncodeM(k.Prefix(), five)
	if err != nil {
		panic(err) // the alphabet and the prefix are ours
	}
	return s
}

// Short is the first characters of the text form, for people; never parsed.
func (id ID[K]) Short() string {
	var k K
	return id.String()[:len(k.Prefix())+1+8]
}

// IsZero reports whether the identifier is unset.
func (id ID[K]) IsZero() bool { return id == ID[K]{} }

// MarshalText implements encoding.TextMarshaler, so that JSON shows the text form.
func (id ID[K]) MarshalText() ([]byte, error) { return []byte(id.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (id *ID[K]) UnmarshalText(b []byte) error {
	v, err := ParseID[K](string(b))
	if err != nil {
		return err
	}
	*id = v
	return nil
}

// ParseID reads the text form of an identifier of kind K.
func ParseID[K Kind](s string) (ID[K], error) {
	var k K
	var id ID[K]
	if len(s) > 100 {
		return id, fmt.Errorf("%s identifier of %d characters is too long", k.Prefix(), len(s))
	}
	prefix, five, version, err := bech32.DecodeNoLimitWithVersion(s)
	if err != nil {
		return id, fmt.Errorf("%q is not a %s identifier: %w", s, k.Prefix(), err)
	}
	if prefix != k.Prefix() {
		return id, fmt.Errorf("%q is a %s identifier, a %s identifier is needed", s, prefix, k.Prefix())
	}
	if version != bech32.VersionM {
		return id, fmt.Errorf("%q has the checksum of another format", s)
	}
	b, err := bech32.ConvertBits(five, 5, 8, false)
	if err != nil || len(b) != len(id) {
		return id, fmt.Errorf("%q does not hold 32 bytes", s)
	}
	copy(id[:], b)
	if strings.ToLower(s) != id.String() {
		return id, fmt.Errorf("%q is not the canonical form", s)
	}
	return id, nil
}
