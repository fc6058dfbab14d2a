package comet

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"time"

	"github.com/cometbft/cometbft/crypto"
	cmted25519 "github.com/cometbft/cometbft/crypto/ed25519"
	"github.com/cometbft/cometbft/crypto/mldsa65"
	"github.com/cometbft/cometbft/libs/protoio"
	"github.com/cometbft/cometbft/p2p"
	cmtproto "github.com/cometbft/cometbft/proto/tendermint/types"
	"github.com/cometbft/cometbft/types"
	"golang.org/x/sys/unix"
)

// Files of a home.
const (
	keyFile   = "validator.key"  // "holdfast-validator-key-v1 " and 64 hex digits: the seed of all keys
	signFile  = "validator.sign" // the newest signatures, see signer
	chainDir  = "chain"          // the database
	walFile   = "wal/wal"        // CometBFT's consensus log
	keyPrefix = "holdfast-validator-key-v1 "
)

// Keys are the public side of a validator's keys.
type Keys struct {
	Public []byte // ML-DSA-65, for Member.Key
	Peer   string // names the consensus port, for Peer.ID
}

// MakeKeys returns the keys of a home, and makes home and keys when there are none. A Validator needs them to be there.
// Each home is one validator: a copy that runs at the same time signs conflicting votes, which is proof of misbehaviour.
func MakeKeys(home string) (Keys, error) {
	k, err := loadKeys(home)
	if errors.Is(err, fs.ErrNotExist) {
		if err := makeKeys(home); err != nil {
			return Keys{}, fmt.Errorf("make validator key in %s: %w", home, err)
		}
		k, err = loadKeys(home)
	}
	if err != nil {
		return Keys{}, err
	}
	return k.public(), nil
}

// Prove signs with the consensus key of a home what shows that somebody has it: "holdfast/" and at least one, at most 90 bytes more.
// Votes begin with their length, which "h", 104, never is for so few: no vote can be had this way.
func Prove(home string, word []byte) ([]byte, error) {
	if n := len(word); !bytes.HasPrefix(word, []byte("holdfast/")) || n < 10 || n > 99 {
		return nil, fmt.Errorf("a validator's key does not sign these %d bytes", n)
	}
	ks, err := loadKeys(home)
	if err != nil {
		return nil, err
	}
	return ks.consensus.Sign(word)
}

type keys struct {
	consensus mldsa65.PrivKey
	node      cmted25519.PrivKey
}

func (k keys) public() Keys {
	return Keys{Public: k.consensus.PubKey().Bytes(), Peer: string(p2p.PubKeyToID(k.node.PubKey()))}
}

func makeKeys(home string) error {
	if err := os.MkdirAll(home, 0o700); err != nil {
		return err
	}
	var seed [32]byte
	if _, err := rand.Read(seed[:]); err != nil {
		return err
	}
	// The signing state comes first: a key without it is refused, a signing state without a key is replaced.
	if err := writeFile(filepath.Join(home, signFile), make([]byte, 2*signSlot)); err != nil {
		return err
	}
	return writeFile(filepath.Join(home, keyFile), []byte(keyPrefix+hex.EncodeToString(seed[:])+"\n"))
}

func loadKeys(home string) (keys, error) {
	name := filepath.Join(home, keyFile)
	b, err := os.ReadFile(name)
	if err != nil {
		return keys{}, fmt.Errorf("read validator key: %w", err)
	}
	if st, err := os.Stat(name); err != nil || st.Mode().Perm()&0o077 != 0 {
		return keys{}, fmt.Errorf("read validator key %s: others may read it", name)
	}
	text, ok := bytes.CutPrefix(bytes.TrimSpace(b), []byte(keyPrefix))
	seed, err := hex.DecodeString(string(text))
	if !ok || err != nil || len(seed) != 32 {
		return keys{}, fmt.Errorf("read validator key %s: not a validator key of version 1", name)
	}
	sub, err := hkdf.Key(sha256.New, seed, nil, "holdfast/validator/consensus/v1", mldsa65.SeedSize)
	if err != nil {
		return keys{}, err
	}
	c, err := mldsa65.GenPrivKeyFromSeed(sub)
	if err != nil {
		return keys{}, err
	}
	sub, err = hkdf.Key(sha256.New, seed, nil, "holdfast/validator/peer/v1", ed25519.SeedSize)
	if err != nil {
		return keys{}, err
	}
	return keys{consensus: c, node: cmted25519.PrivKey(ed25519.NewKeyFromSeed(sub))}, nil
}

// writeFile replaces a file atomically and durably; only its owner may read it.
func writeFile(name string, data []byte) error {
	f, err := os.CreateTemp(filepath.Dir(name), ".tmp-*") // 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	if _, err = f.Write(data); err == nil {
		err = f.Sync()
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err != nil {
		return err
	}
	d, err := os.Open(filepath.Dir(name))
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// signer signs consensus messages and never two that conflict, over any number of crashes: what it signed last is on
// stable storage before the signature leaves it.
//
// The file has two slots of signSlot bytes, written in turn, so that a torn write leaves the older one:
//
//	sequence uint64 | height int64 | round int32 | step uint8 | n uint16 | sign bytes | m uint16 | signature | SHA-256
//
// little endian, the digest over all before it. An empty slot is all zero.
type signer struct {
	key  mldsa65.PrivKey
	pub  crypto.PubKey
	file *os.File
	last signed
}

const signSlot = 8192

// signed is the newest signature.
type signed struct {
	seq    uint64
	height int64
	round  int32
	step   uint8
	msg    []byte
	sig    []byte
}

// Steps of a round in the order in which a validator signs them.
const (
	stepPropose uint8 = iota + 1
	stepPrevote
	stepPrecommit
)

var errConflict = errors.New("would conflict with an earlier signature")

func openSigner(home string, key mldsa65.PrivKey) (*signer, error) {
	name := filepath.Join(home, signFile)
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("read signing state: %w", err) // absent means lost, and a lost one is not safe to replace
	}
	b := make([]byte, 2*signSlot)
	if _, err := f.ReadAt(b, 0); err != nil {
		f.Close()
		return nil, fmt.Errorf("read signing state %s: %w", name, err)
	}
	s := &signer{key: key, pub: key.PubKey(), file: f}
	damaged := 0
	for i := range 2 {
		slot := b[i*signSlot : (i+1)*signSlot]
		v, err := decodeSigned(slot)
		switch {
		case err != nil:
			damaged++
		case v.seq > s.last.seq:
			s.last = v
		}
	}
	if damaged == 2 {
		f.Close()
		return nil, fmt.Errorf("read signing state %s: damaged", name)
	}
	return s, nil
}

func (s *signer) close() error { return s.file.Close() }

func (v signed) encode() []byte {
	b := make([]byte, 0, signSlot)
	b = binary.LittleEndian.AppendUint64(b, v.seq)
	b = binary.LittleEndian.AppendUint64(b, uint64(v.height))
	b = binary.LittleEndian.AppendUint32(b, uint32(v.round))
	b = append(b, v.step)
	for _, x := range [][]byte{v.msg, v.sig} {
		b = binary.LittleEndian.AppendUint16(b, uint16(len(x)))
		b = append(b, x...)
	}
	h := sha256.Sum256(b)
	return append(b, h[:]...)
}

func decodeSigned(b []byte) (signed, error) {
	if len(b) != signSlot {
		return signed{}, errors.New("slot is short")
	}
	if bytes.Equal(b, make([]byte, signSlot)) {
		return signed{}, nil
	}
	v := signed{
		seq:    binary.LittleEndian.Uint64(b),
		height: int64(binary.LittleEndian.Uint64(b[8:])),
		round:  int32(binary.LittleEndian.Uint32(b[16:])),
		step:   b[20],
	}
	at := 21
	for _, x := range []*[]byte{&v.msg, &v.sig} {
		n := int(binary.LittleEndian.Uint16(b[at:]))
		if at+2+n+2+sha256.Size > len(b) {
			return signed{}, errors.New("slot is damaged")
		}
		*x = bytes.Clone(b[at+2 : at+2+n])
		at += 2 + n
	}
	h := sha256.Sum256(b[:at])
	if !bytes.Equal(h[:], b[at:at+sha256.Size]) {
		return signed{}, errors.New("slot is damaged")
	}
	return v, nil
}

// GetPubKey is CometBFT's.
func (s *signer) GetPubKey() (crypto.PubKey, error) { return s.pub, nil }

// SignVote is CometBFT's.
func (s *signer) SignVote(chain string, v *cmtproto.Vote) error {
	step := stepPrevote
	if v.Type == cmtproto.PrecommitType {
		step = stepPrecommit
	}
	if len(v.Extension) > 0 && (step != stepPrecommit || types.ProtoBlockIDIsNil(&v.BlockID)) {
		return fmt.Errorf("sign vote at height %d: an extension without a precommit for a block", v.Height)
	}
	sig, old, err := s.sign(v.Height, v.Round, step, types.VoteSignBytes(chain, v))
	if err != nil {
		return fmt.Errorf("sign vote at height %d: %w", v.Height, err)
	}
	if old != nil {
		var c cmtproto.CanonicalVote
		if err := protoio.UnmarshalDelimited(old, &c); err != nil {
			return fmt.Errorf("read signing state: %w", err)
		}
		v.Timestamp = c.Timestamp
	}
	v.Signature = sig
	// An extension is not bound to a block, and may differ when a crash lies between: signing two is no misbehaviour.
	if step == stepPrecommit && !types.ProtoBlockIDIsNil(&v.BlockID) {
		if v.ExtensionSignature, err = s.key.Sign(types.VoteExtensionSignBytes(chain, v)); err != nil {
			return fmt.Errorf("sign vote extension at height %d: %w", v.Height, err)
		}
	}
	return nil
}

// SignProposal is CometBFT's.
func (s *signer) SignProposal(chain string, p *cmtproto.Proposal) error {
	sig, old, err := s.sign(p.Height, p.Round, stepPropose, types.ProposalSignBytes(chain, p))
	if err != nil {
		return fmt.Errorf("sign proposal at height %d: %w", p.Height, err)
	}
	if old != nil {
		var c cmtproto.CanonicalProposal
		if err := protoio.UnmarshalDelimited(old, &c); err != nil {
			return fmt.Errorf("read signing state: %w", err)
		}
		p.Timestamp = c.Timestamp
	}
	p.Signature = sig
	return nil
}

// sign signs msg, or returns the earlier signature and message of the same step when they differ in their time alone.
func (s *signer) sign(height int64, round int32, step uint8, msg []byte) (sig, old []byte, err error) {
	switch l := s.last; {
	case l.seq == 0 || height > l.height || height == l.height && (round > l.round || round == l.round && step > l.step):
	case height == l.height && round == l.round && step == l.step && sameButTime(l.msg, msg, step):
		return l.sig, l.msg, nil
	default:
		return nil, nil, fmt.Errorf("round %d step %d after height %d round %d step %d: %w",
			round, step, l.height, l.round, l.step, errConflict)
	}
	if sig, err = s.key.Sign(msg); err != nil {
		return nil, nil, err
	}
	next := signed{seq: s.last.seq + 1, height: height, round: round, step: step, msg: msg, sig: sig}
	b := next.encode()
	if len(b) > signSlot {
		return nil, nil, fmt.Errorf("message of %d bytes", len(msg))
	}
	if _, err := s.file.WriteAt(b, int64(next.seq%2)*signSlot); err != nil {
		return nil, nil, fmt.Errorf("write signing state: %w", err)
	}
	if err := unix.Fdatasync(int(s.file.Fd())); err != nil {
		return nil, nil, fmt.Errorf("sync signing state: %w", err)
	}
	s.last = next
	return sig, nil, nil
}

// sameButTime says whether two messages of a step differ in nothing but their time.
func sameButTime(a, b []byte, step uint8) bool {
	var ea, eb []byte
	var err1, err2 error
	if step == stepPropose {
		var x, y cmtproto.CanonicalProposal
		if protoio.UnmarshalDelimited(a, &x) != nil || protoio.UnmarshalDelimited(b, &y) != nil {
			return false
		}
		y.Timestamp = x.Timestamp
		ea, err1 = x.Marshal()
		eb, err2 = y.Marshal()
	} else {
		var x, y cmtproto.CanonicalVote
		if protoio.UnmarshalDelimited(a, &x) != nil || protoio.UnmarshalDelimited(b, &y) != nil {
			return false
		}
		y.Timestamp = x.Timestamp
		ea, err1 = x.Marshal()
		eb, err2 = y.Marshal()
	}
	return err1 == nil && err2 == nil && bytes.Equal(ea, eb)
}

// A Pin is the SHA-256 digest of a server's public key, in its SubjectPublicKeyInfo form.
type Pin [32]byte

// PinOf returns the pin of a certificate.
func PinOf(c tls.Certificate) (Pin, error) {
	if len(c.Certificate) == 0 {
		return Pin{}, errors.New("pin of a certificate: it is empty")
	}
	x, err := x509.ParseCertificate(c.Certificate[0])
	if err != nil {
		return Pin{}, fmt.Errorf("pin of a certificate: %w", err)
	}
	return sha256.Sum256(x.RawSubjectPublicKeyInfo), nil
}

// LoadCertificate returns the TLS certificate in a file that only its owner reads, and makes one when there is none.
// It is self-signed and does not expire: clients know its key by its pin.
func LoadCertificate(file, name string) (tls.Certificate, error) {
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		if b, err = makeCertificate(name); err == nil {
			err = writeFile(file, b)
		}
	}
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("load certificate %s: %w", file, err)
	}
	c, err := tls.X509KeyPair(b, b)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("load certificate %s: %w", file, err)
	}
	return c, nil
}

func makeCertificate(name string) ([]byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return nil, err
	}
	cert, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: name},
		DNSNames:     []string{name},
		NotBefore:    time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC),
		NotAfter:     time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}, &x509.Certificate{SerialNumber: serial, Subject: pkix.Name{CommonName: name}}, &key.PublicKey, key)
	if err != nil {
		return nil, err
	}
	priv, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	out := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: priv})
	return append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert})...), nil
}
