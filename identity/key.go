package identity

import (
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"

	"holdfast/internal/canonical"

	"github.com/cloudflare/circl/sign/mldsa/mldsa65"
)

// Sizes in bytes of the encoded forms.
const (
	SeedSize      = 32
	PublicKeySize = ed25519.PublicKeySize + mldsa65.PublicKeySize
	SignatureSize = ed25519.SignatureSize + mldsa65.SignatureSize
)

// ErrSignature is returned for a signature that does not verify, whichever half failed.
var ErrSignature = errors.New("signature does not verify")

// PublicKey is a hybrid verification key: Ed25519 (RFC 8032, 32 bytes) followed by ML-DSA-65 (FIPS 204, 1952 bytes).
type PublicKey [PublicKeySize]byte

// Signature is an Ed25519 signature (64 bytes) followed by an ML-DSA-65 signature (3309 bytes) over the same bytes.
type Signature [SignatureSize]byte

// PrivateKey signs with both algorithms. It is derived from a 32-byte seed.
type PrivateKey struct {
	seed  [SeedSize]byte
	ed    ed25519.PrivateKey
	mldsa *mldsa65.PrivateKey
	pub   PublicKey
}

// GenerateKey makes a key from the system's randomness.
func GenerateKey() *PrivateKey {
	var seed [SeedSize]byte
	rand.Read(seed[:]) // never fails (crypto/rand)
	return NewKey(seed)
}

// NewKey derives both halves from seed by HKDF-SHA256 under labels of their own.
func NewKey(seed [SeedSize]byte) *PrivateKey {
	k := &PrivateKey{seed: seed}
	k.ed = ed25519.NewKeyFromSeed(Derive(seed[:], "holdfast/key/ed25519/v1"))
	ms := [mldsa65.SeedSize]byte(Derive(seed[:], "holdfast/key/mldsa65/v1"))
	mpub, mpriv := mldsa65.NewKeyFromSeed(&ms)
	k.mldsa = mpriv
	copy(k.pub[:], k.ed.Public().(ed25519.PublicKey))
	copy(k.pub[ed25519.PublicKeySize:], mpub.Bytes())
	return k
}

// Derive expands secret to 32 bytes for one purpose, by HKDF-SHA256 (RFC 5869) without salt.
func Derive(secret []byte, label string) []byte {
	b, err := hkdf.Key(sha256.New, secret, nil, label, 32)
	if err != nil {
		panic(err) // 32 bytes are always within HKDF's limit
	}
	return b
}

// Public is the verification key.
func (k *PrivateKey) Public() PublicKey { return k.pub }

// Seed is the secret that the key was derived from.
func (k *PrivateKey) Seed() [SeedSize]byte { return k.seed }

// Sign signs msg for one purpose. A signature for one purpose never verifies for another.
func (k *PrivateKey) Sign(purpose string, msg []byte) Signature {
	var s Signature
	m := signed(purpose, &k.pub, msg)
	copy(s[:], ed25519.Sign(k.ed, m))
	// Deterministic: a signature must not depend on the quality of randomness at signing time.
	if err := mldsa65.SignTo(k.mldsa, m, []byte(purpose), false, s[ed25519.SignatureSize:]); err != nil {
		panic(fmt.Sprintf("ml-dsa: %v", err)) // only a context over 255 bytes can fail: a programming error
	}
	return s
}

// Verify checks both halves; both must be right.
func (p *PublicKey) Verify(purpose string, msg []byte, s *Signature) error {
	m := signed(purpose, p, msg)
	if !ed25519.Verify(p[:ed25519.PublicKeySize], m, s[:ed25519.SignatureSize]) {
		return ErrSignature
	}
	var mpub mldsa65.PublicKey
	if err := mpub.UnmarshalBinary(p[ed25519.PublicKeySize:]); err != nil {
		return fmt.Errorf("ml-dsa key: %w", err)
	}
	if !mldsa65.Verify(&mpub, m, []byte(purpose), s[ed25519.SignatureSize:]) {
		return ErrSignature
	}
	return nil
}

// VerifyMLDSA checks an ML-DSA-65 signature of a key that is not one of ours, a validator's, which signs without a context. No
// signature of a PrivateKey passes: those have one.
func VerifyMLDSA(key, msg, sig []byte) error {
	var pub mldsa65.PublicKey
	if err := pub.UnmarshalBinary(key); err != nil {
		return fmt.Errorf("ml-dsa key: %w", err)
	}
	if !mldsa65.Verify(&pub, msg, nil, sig) {
		return ErrSignature
	}
	return nil
}

// Digest identifies the key.
func (p *PublicKey) Digest() [32]byte { return canonical.Digest("holdfast/public-key/v1", p[:]) }

// Device is the DeviceID of a device's key.
func (p *PublicKey) Device() DeviceID { return DeviceID(p.Digest()) }

// Node is the NodeID of a node's key.
func (p *PublicKey) Node() NodeID { return NodeID(p.Digest()) }

// signed is what both algorithms sign: the purpose and the digest of the whole hybrid key come first, so that neither
// half of a signature can be taken out and used with another partner or for another purpose.
func signed(purpose string, p *PublicKey, msg []byte) []byte {
	d, m := p.Digest(), sha256.Sum256(msg)
	sum := canonical.Digest("holdfast/signed/v1", []byte(purpose), d[:], m[:])
	return sum[:]
}
