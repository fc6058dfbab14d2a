// Package canonical is the one encoding of everything that holdfast signs or hashes: deterministic CBOR (RFC 8949,
// section 4.2, core deterministic requirements). Decode accepts exactly the bytes that Encode would have written, so
// that a value has one encoding and a digest one meaning. It never accepts unknown fields, indefinite lengths,
// duplicate keys, tags or deep nesting.
package canonical

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"sync"

	"github.com/fxamacker/cbor/v2"
)

// ErrNotCanonical is returned for bytes that decode but are not the deterministic encoding of what they say.
var ErrNotCanonical = errors.New("encoding is not canonical")

// modes builds the two CBOR modes once. Their options are constants, so an error here is a programming error.
var modes = sync.OnceValues(func() (cbor.EncMode, cbor.DecMode) {
	eo := cbor.CoreDetEncOptions()
	eo.NilContainers = cbor.NilContainerAsEmpty
	enc, err := eo.EncMode()
	if err != nil {
		panic(err)
	}
	dec, err := cbor.DecOptions{
		DupMapKey:         cbor.DupMapKeyEnforcedAPF,
		IndefLength:       cbor.IndefLengthForbidden,
		TagsMd:            cbor.TagsForbidden,
		ExtraReturnErrors: cbor.ExtraDecErrorUnknownField,
		MaxNestedLevels:   16,
		MaxArrayElements:  1 << 16,
		MaxMapPairs:       1 << 16,
		UTF8:              cbor.UTF8RejectInvalid,
	}.DecMode()
	if err != nil {
		panic(err)
	}
	return enc, dec
})

// Encode returns the deterministic encoding of v. It panics only on types that cannot be encoded at all, which is a
// programming error.
func Encode(v any) []byte {
	enc, _ := modes()
	b, err := enc.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("canonical: encode %T: %v", v, err))
	}
	return b
}

// Decode reads exactly one value of at most limit bytes into v, and refuses every encoding but the deterministic one.
func Decode(b []byte, limit int, v any) error {
	if len(b) > limit {
		return fmt.Errorf("%d bytes, at most %d are allowed", len(b), limit)
	}
	enc, dec := modes()
	if err := dec.Unmarshal(b, v); err != nil {
		return err
	}
	again, err := enc.Marshal(v)
	if err != nil {
		return err
	}
	if !bytes.Equal(again, b) {
		return ErrNotCanonical
	}
	return nil
}

// Digest is SHA-256 over label, a zero byte and the parts, each preceded by its length as eight big-endian bytes: no two
// labels and no two lists of parts share an input.
func Digest(label string, parts ...[]byte) [32]byte {
	h := sha256.New()
	h.Write([]byte(label))
	h.Write([]byte{0})
	for _, p := range parts {
		n := uint64(len(p))
		h.Write([]byte{byte(n >> 56), byte(n >> 48), byte(n >> 40), byte(n >> 32), byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)})
		h.Write(p)
	}
	return [32]byte(h.Sum(nil))
}
