package ca

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestNameConstraintsHoldEvenForAThief(t *testing.T) {
	dir, now := t.TempDir(), time.Now()
	c, err := Open(dir, []string{"localhost"}, now)
	if err != nil {
		t.Fatal(err)
	}
	again, err := Open(dir, []string{"elsewhere"}, now)
	if err != nil || string(again.Root()) != string(c.Root()) {
		t.Fatalf("opened again it is another: %v", err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(c.Root())
	verify := func(der []byte, host string) error {
		leaf, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		_, err = leaf.Verify(x509.VerifyOptions{Roots: pool, DNSName: host, CurrentTime: now})
		return err
	}
	chain, key, err := c.Issue("app.localhost", now)
	if err != nil {
		t.Fatal(err)
	}
	if err := verify(chain[0], "app.localhost"); err != nil {
		t.Errorf("control: %v", err)
	}
	if _, err := x509.ParsePKCS8PrivateKey(key); err != nil {
		t.Error(err)
	}
	for _, h := range []string{"example.org", "localhost.example.org", "notlocalhost"} {
		if _, _, err := c.Issue(h, now); err == nil {
			t.Errorf("issued for %s", h)
		}
		// The thief has the key and asks nobody.
		k, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		tmpl := &x509.Certificate{SerialNumber: big.NewInt(5), DNSNames: []string{h}, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour), ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
		der, err := x509.CreateCertificate(rand.Reader, tmpl, c.root, &k.PublicKey, c.key)
		if err != nil {
			t.Fatal(err)
		}
		if err := verify(der, h); err == nil {
			t.Errorf("a forged certificate for %s is accepted", h)
		}
	}
	k, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(6), IPAddresses: []net.IP{net.IPv4(192, 0, 2, 1)}, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, c.root, &k.PublicKey, c.key)
	if err != nil {
		t.Fatal(err)
	}
	if err := verify(der, "192.0.2.1"); err == nil {
		t.Error("a forged certificate for an address is accepted")
	}
	if err := os.Chmod(filepath.Join(dir, keyFile), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir, nil, now); err == nil {
		t.Error("a world-readable key is used")
	}
}
