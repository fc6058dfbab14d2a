package location

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"time"
)

// A Seed is the secret of a key: of a location, of a front end, or of a store's recovery.
type Seed [32]byte

// Certificate is the self-signed certificate of a seed's Ed25519 key. Only the key counts, by its pin.
func Certificate(s Seed) (tls.Certificate, error) {
	key := ed25519.NewKeyFromSeed(s[:])
	t := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		Subject:      pkix.Name{CommonName: "holdfast location"},
		NotBefore:    time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC),
		NotAfter:     time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("make certificate: %w", err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}

// PinOf is the pin of a seed's key.
func PinOf(s Seed) (Pin, error) {
	der, err := x509.MarshalPKIXPublicKey(ed25519.NewKeyFromSeed(s[:]).Public())
	return sha256.Sum256(der), err
}

// LoadSeed reads a seed from a file, or makes both.
func LoadSeed(file string) (s Seed, err error) {
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		rand.Read(s[:])
		return s, writeSeed(file, s)
	}
	if err == nil && len(b) != len(s) {
		err = fmt.Errorf("%d bytes, not %d", len(b), len(s))
	}
	if err != nil {
		return s, fmt.Errorf("load key %s: %w", file, err)
	}
	return Seed(b), nil
}

func writeSeed(file string, s Seed) error {
	f, err := os.CreateTemp(filepath.Dir(file), ".key-*") // 0600
	if err != nil {
		return fmt.Errorf("make key %s: %w", file, err)
	}
	defer os.Remove(f.Name())
	_, err = f.Write(s[:])
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("make key %s: %w", file, err)
	}
	// Link, unlike rename, does not replace the key that another process has just made.
	return errors.Join(os.Link(f.Name(), file), syncDir(filepath.Dir(file)))
}

// tlsConfig is what both ends have in common: TLS 1.3, a post-quantum key exchange, no resumption. Certificates are not
// verified by authorities: allowed decides by the key's pin. The handshake has proved its possession by then.
func tlsConfig(c tls.Certificate, allowed func(Pin) bool) *tls.Config {
	return &tls.Config{
		MinVersion:                  tls.VersionTLS13,
		CurvePreferences:            []tls.CurveID{tls.X25519MLKEM768},
		Certificates:                []tls.Certificate{c},
		NextProtos:                  []string{protocol},
		ClientAuth:                  tls.RequireAnyClientCert,
		InsecureSkipVerify:          true, // see VerifyConnection
		SessionTicketsDisabled:      true,
		DynamicRecordSizingDisabled: true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			switch {
			case cs.NegotiatedProtocol != protocol:
				return fmt.Errorf("protocol %q: %w", cs.NegotiatedProtocol, errWire)
			case len(cs.PeerCertificates) == 0 || !allowed(pinOf(cs)):
				return errors.New("key is not pinned")
			}
			return nil
		},
	}
}

func pinOf(cs tls.ConnectionState) Pin {
	return sha256.Sum256(cs.PeerCertificates[0].RawSubjectPublicKeyInfo)
}
