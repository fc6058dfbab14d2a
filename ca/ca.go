// Package ca is a user's own certificate authority. It issues the leaf certificates of routes on the user's machine;
// they travel to nodes inside the sealed body. The root is name-constrained (RFC 5280, section 4.2.1.10): even who
// steals it cannot speak for names outside its domains. Its key is in one file that only its owner reads, and never
// leaves the user's side.
package ca

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Validity of what is made here.
const (
	RootValidity = 10 * 365 * 24 * time.Hour
	LeafValidity = 90 * 24 * time.Hour
)

// Files of a CA's directory.
const (
	rootFile = "ca.pem"
	keyFile  = "ca.key"
)

// CA issues certificates.
type CA struct {
	root *x509.Certificate
	key  *ecdsa.PrivateKey
}

// Open reads the CA in dir, and makes one for the domains when there is none.
func Open(dir string, domains []string, now time.Time) (*CA, error) {
	c, err := load(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return create(dir, domains, now)
	}
	if err != nil {
		return nil, fmt.Errorf("certificate authority in %s: %w", dir, err)
	}
	return c, nil
}

func load(dir string) (*CA, error) {
	kf := filepath.Join(dir, keyFile)
	b, err := os.ReadFile(kf)
	if err != nil {
		return nil, err
	}
	if st, err := os.Stat(kf); err != nil {
		return nil, err
	} else if st.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("%s can be read by others (mode %#o)", kf, st.Mode().Perm())
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, fmt.Errorf("%s holds no key", kf)
	}
	k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, err
	}
	key, ok := k.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("%s holds a %T", kf, k)
	}
	if b, err = os.ReadFile(filepath.Join(dir, rootFile)); err != nil {
		return nil, err
	}
	if block, _ = pem.Decode(b); block == nil {
		return nil, fmt.Errorf("%s holds no certificate", rootFile)
	}
	root, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, err
	}
	if !key.PublicKey.Equal(root.PublicKey) {
		return nil, errors.New("key and certificate do not belong together")
	}
	return &CA{root, key}, nil
}

func create(dir string, domains []string, now time.Time) (*CA, error) {
	if len(domains) == 0 {
		return nil, errors.New("a certificate authority without domains could speak for every name: name at least one")
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: "holdfast local CA for " + strings.Join(domains, ", ")},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(RootValidity), IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
		KeyUsage: x509.KeyUsageCertSign, PermittedDNSDomainsCritical: true, PermittedDNSDomains: domains,
		// A name constraint binds only the kinds of name that it lists: no address, no mail, no URI.
		ExcludedIPRanges: everyIP(), ExcludedEmailAddresses: []string{""}, ExcludedURIDomains: []string{""},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		return nil, err
	}
	raw, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	// The key last: a directory with a key is complete.
	if err := write(filepath.Join(dir, rootFile), &pem.Block{Type: "CERTIFICATE", Bytes: der}, 0o644); err != nil {
		return nil, err
	}
	if err := write(filepath.Join(dir, keyFile), &pem.Block{Type: "PRIVATE KEY", Bytes: raw}, 0o600); err != nil {
		return nil, err
	}
	return load(dir)
}

func write(path string, b *pem.Block, mode os.FileMode) error {
	tmp, err := os.CreateTemp(filepath.Dir(path), ".ca-*")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	return errors.Join(pem.Encode(tmp, b), tmp.Chmod(mode), tmp.Sync(), tmp.Close(), os.Rename(tmp.Name(), path))
}

func serial() *big.Int {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		panic(err) // never fails (crypto/rand)
	}
	return n.Add(n, big.NewInt(1))
}

// Root is the certificate that clients must trust, in PEM.
func (c *CA) Root() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.root.Raw})
}

// Permits reports whether the CA may speak for a host.
func (c *CA) Permits(host string) error {
	for _, d := range c.root.PermittedDNSDomains {
		if host == d || strings.HasSuffix(host, "."+d) {
			return nil
		}
	}
	return fmt.Errorf("the local CA may speak for %s only, not for %q: choose a host name below one of these", strings.Join(c.root.PermittedDNSDomains, ", "), host)
}

// Issue makes a leaf for one host: the chain in DER, leaf first, and the leaf's key in PKCS #8.
func (c *CA) Issue(host string, now time.Time) (chain [][]byte, key []byte, err error) {
	if err := c.Permits(host); err != nil {
		return nil, nil, err
	}
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("certificate for %s: %w", host, err)
	}
	spki, err := x509.MarshalPKIXPublicKey(&k.PublicKey)
	if err != nil {
		return nil, nil, fmt.Errorf("certificate for %s: %w", host, err)
	}
	id := sha256.Sum256(spki)
	tmpl := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: host}, DNSNames: []string{host}, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(LeafValidity),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, SubjectKeyId: id[:20], BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, c.root, &k.PublicKey, c.key)
	if err != nil {
		return nil, nil, fmt.Errorf("certificate for %s: %w", host, err)
	}
	if key, err = x509.MarshalPKCS8PrivateKey(k); err != nil {
		return nil, nil, fmt.Errorf("certificate for %s: %w", host, err)
	}
	return [][]byte{der, c.root.Raw}, key, nil
}

func everyIP() []*net.IPNet {
	return []*net.IPNet{{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}, {IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}}
}

// Expires is when the leaf of a chain ends; the zero time if it cannot be read.
func Expires(chain [][]byte) time.Time {
	if len(chain) == 0 {
		return time.Time{}
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return time.Time{}
	}
	return leaf.NotAfter
}
