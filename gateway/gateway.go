package gateway

import (
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"net"
	"strings"
	"time"
)

// ALPN names the tunnel protocol, and with it the version of its frames and messages.
const ALPN = "holdfast-tunnel/1"

// An SPKI is the SHA-256 digest of a certificate's SubjectPublicKeyInfo: what the ledger pins.
type SPKI [32]byte

// A NodeID names a node as the ledger does.
type NodeID [32]byte

// A WorkloadID names a workload as the ledger does.
type WorkloadID [32]byte

func (k SPKI) String() string       { return hex.EncodeToString(k[:]) }
func (n NodeID) String() string     { return hex.EncodeToString(n[:8]) }
func (w WorkloadID) String() string { return hex.EncodeToString(w[:8]) }

// MarshalText lets a status be printed as JSON.
func (k SPKI) MarshalText() ([]byte, error)       { return []byte(hex.EncodeToString(k[:])), nil }
func (n NodeID) MarshalText() ([]byte, error)     { return []byte(hex.EncodeToString(n[:])), nil }
func (w WorkloadID) MarshalText() ([]byte, error) { return []byte(hex.EncodeToString(w[:])), nil }

// A Claim is an Origin's word that it serves a host with a workload in an epoch.
type Claim struct {
	Host     string     `json:"host"`
	Workload WorkloadID `json:"workload"`
	Epoch    uint64     `json:"epoch"`
}

// A Refusal is the Edge's answer to a claim that the ledger does not bear out.
type Refusal struct {
	Claim
	Reason string `json:"reason"`
}

// SPKIOf returns the digest by which the ledger pins a public key.
func SPKIOf(public crypto.PublicKey) (SPKI, error) {
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return SPKI{}, fmt.Errorf("encode public key: %w", err)
	}
	return sha256.Sum256(der), nil
}

// SelfSigned returns a certificate that says nothing but its key: both ends of a tunnel pin the key and read no name or
// date in it.
func SelfSigned(key crypto.Signer) (tls.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("draw serial number: %w", err)
	}
	template := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: "holdfast tunnel"},
		NotBefore:    time.Unix(0, 0),
		NotAfter:     time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC), // RFC 5280: no expiry
		KeyUsage:     x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("sign tunnel certificate: %w", err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}

// tunnelTLS is what both ends of a tunnel demand: TLS 1.3, the hybrid key exchange and no other, and no resumption, so
// that every connection shows its key.
func tunnelTLS(own tls.Certificate) *tls.Config {
	return &tls.Config{
		Certificates:                []tls.Certificate{own},
		MinVersion:                  tls.VersionTLS13,
		CurvePreferences:            []tls.CurveID{tls.X25519MLKEM768},
		NextProtos:                  []string{ALPN},
		SessionTicketsDisabled:      true,
		DynamicRecordSizingDisabled: true,
	}
}

// peerSPKI returns the pinned form of the peer's key, after checking again what tunnelTLS asked for.
func peerSPKI(state tls.ConnectionState) (SPKI, error) {
	switch {
	case state.Version != tls.VersionTLS13:
		return SPKI{}, errors.New("tunnel is not TLS 1.3")
	case state.CurveID != tls.X25519MLKEM768:
		return SPKI{}, fmt.Errorf("tunnel key exchange is %v, not X25519MLKEM768", state.CurveID)
	case state.NegotiatedProtocol != ALPN:
		return SPKI{}, fmt.Errorf("tunnel protocol is %q, not %q", state.NegotiatedProtocol, ALPN)
	case len(state.PeerCertificates) == 0:
		return SPKI{}, errors.New("tunnel peer shows no certificate")
	}
	return sha256.Sum256(state.PeerCertificates[0].RawSubjectPublicKeyInfo), nil
}

// normalHost returns a host name in the one form in which hosts are compared, or "" for what cannot be a host name.
func normalHost(host string) string {
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	if len(host) == 0 || len(host) > maxHost || host[0] == '.' || net.ParseIP(host) != nil {
		return ""
	}
	for i := 0; i < len(host); i++ {
		c := host[i]
		if c == '.' && host[i-1] == '.' {
			return ""
		}
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '.' && c != '_' {
			return ""
		}
	}
	return host
}

const maxHost = 253
