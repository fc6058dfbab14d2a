package node

import (
	"crypto/ecdh"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"time"

	"holdfast/identity"
	"holdfast/ledger"
	"holdfast/store/location"
)

// Keys are all of a node's keys. They derive from one seed in one file; until a TPM seals it, whoever has the file is
// the node.
type Keys struct {
	Sign      *identity.PrivateKey
	Open      *identity.OpeningKey
	Session   ed25519.PrivateKey // signs heartbeats
	WireGuard [32]byte           // X25519 private key
	TLS       tls.Certificate    // of the node's end of tunnels and of its log service; pinned by the ledger
	Location  location.Seed      // of the location's TLS key
	ID        identity.NodeID
}

// LoadKeys reads the seed in file, and makes one when there is none.
func LoadKeys(file string) (*Keys, error) {
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		b, err = makeSeed(file)
	}
	if err != nil {
		return nil, fmt.Errorf("node key: %w", err)
	}
	if st, err := os.Stat(file); err != nil {
		return nil, fmt.Errorf("node key: %w", err)
	} else if st.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("node key %s can be read by others (mode %#o)", file, st.Mode().Perm())
	}
	seed, err := hex.DecodeString(strings.TrimSpace(string(b)))
	if err != nil || len(seed) != identity.SeedSize {
		return nil, fmt.Errorf("node key %s is not 64 hexadecimal digits", file)
	}
	return DeriveKeys([identity.SeedSize]byte(seed))
}

func makeSeed(file string) ([]byte, error) {
	var seed [identity.SeedSize]byte
	rand.Read(seed[:])
	text := []byte(hex.EncodeToString(seed[:]) + "\n")
	tmp, err := os.CreateTemp(filepath.Dir(file), ".node-key-*")
	if err != nil {
		return nil, err
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.Write(text)
	return text, errors.Join(err, tmp.Sync(), tmp.Close(), os.Link(tmp.Name(), file))
}

// DeriveKeys derives a node's keys from its seed.
func DeriveKeys(seed [identity.SeedSize]byte) (*Keys, error) {
	part := func(label string) [32]byte { return [32]byte(identity.Derive(seed[:], "holdfast/node/"+label+"/v1")) }
	k := &Keys{Sign: identity.NewKey(part("sign")), WireGuard: part("wireguard"), Location: part("location")}
	pub := k.Sign.Public()
	k.ID = pub.Node()
	s := part("session")
	k.Session = ed25519.NewKeyFromSeed(s[:])
	var err error
	if k.Open, err = identity.NewOpeningKey(part("open")); err != nil {
		return nil, err
	}
	t := part("tls")
	if k.TLS, err = selfSigned(ed25519.NewKeyFromSeed(t[:]), ServiceName(k.ID)); err != nil {
		return nil, err
	}
	return k, nil
}

// ServiceName is the TLS server name under which a node's own services (logs) are reached through a gateway.
func ServiceName(id identity.NodeID) string { return id.Short() + ".node.holdfast" }

func selfSigned(key ed25519.PrivateKey, name string) (tls.Certificate, error) {
	// It is pinned by its key: the dates say nothing and only keep parsers content.
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC), NotAfter: time.Date(2120, 1, 1, 0, 0, 0, 0, time.UTC),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("certificate: %w", err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("certificate: %w", err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, nil
}

// Offer is what a machine has for others.
type Offer struct {
	CPUMilli uint32
	Memory   uint64 // bytes
	Storage  uint64 // bytes that it keeps for stores; 0: it is no location
}

// Admission is what the owner of a farm submits to admit this node, with the node's proof that it agrees.
func (k *Keys) Admission(grid identity.GridID, farm identity.FarmID, name string, endpoints []string, o Offer) (*ledger.NodeAdmit, error) {
	wg, err := ecdh.X25519().NewPrivateKey(k.WireGuard[:])
	if err != nil {
		return nil, fmt.Errorf("wireguard key: %w", err)
	}
	a := &ledger.NodeAdmit{
		Farm: farm, Name: name, Key: k.Sign.Public(), Sealing: k.Open.Public(), WireGuard: [32]byte(wg.PublicKey().Bytes()),
		TLS: sha256.Sum256(k.TLS.Leaf.RawSubjectPublicKeyInfo), Session: [32]byte(k.Session.Public().(ed25519.PublicKey)),
		Endpoints: endpoints, CPUMilli: o.CPUMilli, Memory: o.Memory, Storage: o.Storage,
	}
	if o.Storage > 0 {
		pin, err := location.PinOf(k.Location)
		if err != nil {
			return nil, fmt.Errorf("location key: %w", err)
		}
		a.Location = pin
	}
	a.Proof = k.Sign.Sign(ledger.NodeAdmitPurpose, a.ProofBytes(grid))
	return a, nil
}
