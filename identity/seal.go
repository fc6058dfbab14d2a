package identity

import (
	"crypto/hpke"
	"crypto/rand"
	"fmt"
)

// SealingKeySize is the size in bytes of an encoded SealingKey: ML-KEM-768 (1184) and X25519 (32).
const SealingKeySize = 1184 + 32

// SealingKey is an HPKE public key of the KEM MLKEM768-X25519: what is sealed to it stays closed to a quantum computer
// as long as ML-KEM holds, and to any other as long as one of the two holds.
type SealingKey [SealingKeySize]byte

// OpeningKey opens what was sealed to its SealingKey.
type OpeningKey struct{ k hpke.PrivateKey }

// NewOpeningKey derives a key from a 32-byte secret (RFC 9180, DeriveKeyPair).
func NewOpeningKey(secret [32]byte) (*OpeningKey, error) {
	k, err := hpke.MLKEM768X25519().DeriveKeyPair(secret[:])
	if err != nil {
		return nil, fmt.Errorf("derive HPKE key: %w", err)
	}
	return &OpeningKey{k}, nil
}

// GenerateOpeningKey makes a key from the system's randomness.
func GenerateOpeningKey() (*OpeningKey, error) {
	var s [32]byte
	rand.Read(s[:])
	return NewOpeningKey(s)
}

// Public is the key to seal to.
func (o *OpeningKey) Public() SealingKey { return SealingKey(o.k.PublicKey().Bytes()) }

// Open returns what was sealed for exactly this info.
func (o *OpeningKey) Open(info, sealed []byte) ([]byte, error) {
	b, err := hpke.Open(o.k, hpke.HKDFSHA256(), hpke.AES256GCM(), info, sealed)
	if err != nil {
		return nil, fmt.Errorf("open sealed box: %w", err)
	}
	return b, nil
}

// Seal closes plaintext so that only the holder of p's OpeningKey opens it, and only for the same info.
func (p *SealingKey) Seal(info, plaintext []byte) ([]byte, error) {
	pub, err := hpke.MLKEM768X25519().NewPublicKey(p[:])
	if err != nil {
		return nil, fmt.Errorf("sealing key: %w", err)
	}
	b, err := hpke.Seal(pub, hpke.HKDFSHA256(), hpke.AES256GCM(), info, plaintext)
	if err != nil {
		return nil, fmt.Errorf("seal: %w", err)
	}
	return b, nil
}
