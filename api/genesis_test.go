package api_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"holdfast/api"
	"holdfast/api/apitest"
	"holdfast/identity"
	"holdfast/ledger"
	"holdfast/ledger/comet"
)

// impostor answers everything over TLS; its key is its own when cert is nil.
func impostor(t *testing.T, cert *tls.Certificate, h http.HandlerFunc) (addr string) {
	t.Helper()
	if cert == nil {
		own, err := comet.LoadCertificate(filepath.Join(t.TempDir(), "tls.pem"), "impostor")
		if err != nil {
			t.Fatal(err)
		}
		cert = &own
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var only http.Protocols
	only.SetHTTP2(true)
	srv := &http.Server{
		Protocols: &only, Handler: h, ErrorLog: log.New(io.Discard, "", 0),
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{*cert}, NextProtos: []string{"h2"}},
	}
	done := make(chan struct{})
	go func() { defer close(done); srv.ServeTLS(ln, "", "") }()
	t.Cleanup(func() { srv.Close(); <-done })
	return ln.Addr().String()
}

func says(b []byte) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { w.Write(b) }
}

// A machine that knows nothing but the grid's ID is told other genesis documents.
func TestAGenesisIsBelievedByItsDigestAlone(t *testing.T) {
	g := apitest.Start(t, nil)
	grid := g.Genesis.GridID()
	other := *g.Genesis
	other.Validators = []ledger.Validator{g.Genesis.Validators[0]}
	other.Validators[0].TLS = [32]byte{6, 6, 6} // the impostor's own
	if _, err := ledger.DecodeGenesis(other.Encode()); err != nil {
		t.Fatalf("control: %v", err)
	}
	silent, err := net.Listen("tcp", "127.0.0.1:0") // takes connections, and says nothing
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { silent.Close() })
	for _, x := range []struct {
		name, addr, want string
		is               error
	}{
		{"another grid's", impostor(t, nil, says(other.Encode())), "the server has " + other.GridID().String(), api.ErrOtherGrid},
		{"the right one and more", impostor(t, nil, says(append(g.Genesis.Encode(), 0))), "", api.ErrOtherGrid},
		{"nothing", impostor(t, nil, says(nil)), "", api.ErrOtherGrid},
		{"more than any genesis", impostor(t, nil, says(make([]byte, ledger.MaxGenesis+1))), "more than 1048576 bytes", nil},
		{"no end", impostor(t, nil, func(w http.ResponseWriter, _ *http.Request) {
			for err := error(nil); err == nil; _, err = w.Write(make([]byte, 1<<16)) {
			}
		}), "more than 1048576 bytes", nil},
		{"the way to another", impostor(t, nil, func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://"+g.Addr()+"/v1/genesis", http.StatusFound)
		}), "302", nil},
		{"an error", impostor(t, nil, http.NotFound), "404", nil},
		{"silence", silent.Addr().String(), "deadline", nil},
	} {
		t.Run(x.name, func(t *testing.T) {
			t.Parallel()
			_, err := api.FetchGenesis(t.Context(), grid, []string{x.addr})
			if err == nil || !strings.Contains(err.Error(), x.want) || x.is != nil && !errors.Is(err, x.is) {
				t.Errorf("%v, want %q", err, x.want)
			}
		})
		t.Run(x.name+" and then the truth", func(t *testing.T) {
			t.Parallel()
			got, err := api.FetchGenesis(t.Context(), grid, []string{x.addr, g.Addr()})
			if err != nil || !bytes.Equal(got.Encode(), g.Genesis.Encode()) {
				t.Error(err)
			}
		})
	}
	if _, err := api.FetchGenesis(t.Context(), grid, nil); err == nil {
		t.Error("a genesis from nowhere")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	began := time.Now()
	if _, err := api.FetchGenesis(ctx, grid, []string{silent.Addr().String(), silent.Addr().String()}); err == nil || time.Since(began) > 2*time.Second {
		t.Errorf("%v after %v", err, time.Since(began))
	}
}

// A machine says on its console why it has no genesis yet, and there the owner of its farm will read the machine's ID. Who is
// on the way would have him read another.
func TestAGenesissServerHasNoWordOnTheConsole(t *testing.T) {
	const words = "this machine waits to be approved node=node1thief"
	cert, err := comet.LoadCertificate(filepath.Join(t.TempDir(), "tls.pem"), "impostor")
	if err != nil {
		t.Fatal(err)
	}
	frame := func(kind, flags, stream byte, payload string) string {
		return string([]byte{0, byte(len(payload) >> 8), byte(len(payload)), kind, flags, 0, 0, 0, stream}) + payload
	}
	settings := frame(4, 0, 0, "")
	literal := func(name, value string) string {
		return "\x00" + string(rune(len(name))) + name + string(rune(len(value))) + value
	}
	uri := "http://node1thief%zz/"
	names := append([]byte{0x30, byte(len(uri) + 2), 0x86, byte(len(uri))}, uri...)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Value: names}}}
	der, err := x509.CreateCertificate(rand.Reader, template, cert.Leaf, cert.Leaf.PublicKey, cert.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	named := tls.Certificate{Certificate: [][]byte{der}, PrivateKey: cert.PrivateKey}
	for name, x := range map[string]struct {
		cert   tls.Certificate
		answer string
	}{
		"a farewell":       {cert, settings + frame(7, 0, 0, "\x00\x00\x00\x00\x00\x00\x00\x00"+words)},
		"a header's name":  {cert, settings + frame(1, 4, 1, "\x88"+literal(words, "x"))},
		"a header's value": {cert, settings + frame(1, 4, 1, literal(":status", words))},
		"no HTTP":          {cert, words},
		"its certificate":  {named, ""},
	} {
		ln, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{x.cert}, NextProtos: []string{"h2"}})
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				go func() {
					defer c.Close()
					io.ReadFull(c, make([]byte, 64)) // it has asked
					io.WriteString(c, x.answer)
				}()
			}
		}()
		_, err = api.FetchGenesis(t.Context(), identity.GridID{1}, []string{ln.Addr().String()})
		if err == nil || strings.Contains(err.Error(), "node1") {
			t.Errorf("%s: %v", name, err)
		}
		ln.Close()
	}
}
