package api

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"time"

	"holdfast/identity"
	"holdfast/ledger"
)

// serveGenesis gives the genesis to whoever knows no more than the grid's ID.
func (v *Validator) serveGenesis(w http.ResponseWriter, r *http.Request) {
	release, ok := v.hold(w, r, streamHeld)
	if !ok {
		return
	}
	defer release()
	w.Header().Set("Content-Type", "application/cbor")
	w.Header().Set("Content-Length", strconv.Itoa(len(v.genesis)))
	v.send(w, bytes.NewReader(v.genesis))
}

// genesisTime is how long one server may take to hand over a genesis, from the first packet to the last.
const genesisTime = 5 * time.Second

// FetchGenesis gets a grid's genesis from the first of some addresses (host:port) that has it: a validator's API, or a
// gateway's public port. Nobody has to be trusted, since the ID is the document's digest.
func FetchGenesis(ctx context.Context, grid identity.GridID, addrs []string) (*ledger.Genesis, error) {
	var errs []error
	for _, addr := range addrs {
		g, err := fetchGenesis(ctx, grid, addr)
		if err == nil {
			return g, nil
		}
		errs = append(errs, fmt.Errorf("%s: %w", addr, err))
	}
	if len(errs) == 0 {
		errs = append(errs, errors.New("no address to ask"))
	}
	return nil, fmt.Errorf("genesis of %v: %w", grid, errors.Join(errs...))
}

func fetchGenesis(ctx context.Context, grid identity.GridID, addr string) (*ledger.Genesis, error) {
	ctx, cancel := context.WithTimeout(ctx, genesisTime)
	defer cancel()
	var only http.Protocols
	only.SetHTTP2(true)
	tr := &http.Transport{
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, addr)
		},
		TLSClientConfig: &tls.Config{
			MinVersion: tls.VersionTLS13, CurvePreferences: []tls.CurveID{tls.X25519MLKEM768}, ServerName: LedgerName(grid),
			InsecureSkipVerify: true, // who says it does not matter: what is said is compared with its digest
		},
		Protocols: &only, DisableCompression: true, MaxResponseHeaderBytes: 16 << 10,
	}
	defer tr.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+LedgerName(grid)+"/v1/genesis", nil)
	if err != nil {
		return nil, err
	}
	resp, err := tr.RoundTrip(req)
	if err != nil {
		return nil, wordless(ctx, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, errors.New(resp.Status)
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, ledger.MaxGenesis+1))
	if err != nil {
		return nil, wordless(ctx, err)
	}
	if len(b) > ledger.MaxGenesis {
		return nil, fmt.Errorf("the server sends more than %d bytes", ledger.MaxGenesis)
	}
	if d := ledger.GenesisDigest(b); d != grid {
		return nil, fmt.Errorf("%w: the server has %v", ErrOtherGrid, d)
	}
	return ledger.DecodeGenesis(b)
}

var errNonsense = errors.New("it does not speak as validators and gateways do")

// wordless is an error of a connection without the words of the other end, whoever that is: a machine shows it on its console,
// which is where its ID is compared.
func wordless(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if _, ok := errors.AsType[*net.OpError](err); ok {
		return err
	}
	return errNonsense
}

// ErrOtherGrid is returned for a genesis that is not the one of the grid that was asked for.
var ErrOtherGrid = errors.New("not the genesis of this grid")
