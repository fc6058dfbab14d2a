package api_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"holdfast/api"
	"holdfast/api/apitest"
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
