// Package access lets a device of an account make single requests of a server, without a session: each request carries
// the device's hybrid signature over what is asked, whom, and when. A server checks it against the account on the
// ledger, so that no party has to know the other beforehand.
//
// Header: "Authorization: Holdfast " and base64 of the deterministic CBOR of Proof. It covers the server's TLS key, so
// that one server cannot pass it on to another, and is good for two minutes; what it allows is idempotent or a read, and
// it travels only inside TLS that ends at the server.
package access

import (
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"holdfast/identity"
	"holdfast/internal/canonical"
)

const (
	scheme   = "Holdfast "
	purpose  = "holdfast/request/v1"
	validity = 2 * time.Minute
	maxProof = 8 << 10
)

// ErrDenied is returned for a request that does not prove what it must.
var ErrDenied = errors.New("request is not authorised")

// Proof is what the header carries.
type Proof struct {
	Account   identity.AccountID `cbor:"1,keyasint"`
	Device    identity.DeviceID  `cbor:"2,keyasint"`
	Time      int64              `cbor:"3,keyasint"` // Unix seconds
	Signature identity.Signature `cbor:"4,keyasint"`
}

func message(r *http.Request, server [32]byte, account identity.AccountID, at int64) []byte {
	d := canonical.Digest(purpose, server[:], account[:], canonical.Encode(at), []byte(r.Method), []byte(r.URL.RequestURI()))
	return d[:]
}

// Sign authorises r for the server whose TLS public key has that digest.
func Sign(r *http.Request, server [32]byte, account identity.AccountID, key *identity.PrivateKey, now time.Time) {
	pub := key.Public()
	p := Proof{Account: account, Device: pub.Device(), Time: now.Unix()}
	p.Signature = key.Sign(purpose, message(r, server, account, p.Time))
	r.Header.Set("Authorization", scheme+base64.StdEncoding.EncodeToString(canonical.Encode(&p)))
}

// Verify returns the account that asks and the device that signed. server is the digest of the own TLS key; lookup reads
// an account from the ledger.
func Verify(r *http.Request, server [32]byte, now time.Time, lookup func(identity.AccountID) (*identity.Account, error)) (*identity.Account, identity.DeviceID, error) {
	text, ok := strings.CutPrefix(r.Header.Get("Authorization"), scheme)
	if !ok {
		return nil, identity.DeviceID{}, fmt.Errorf("%w: no proof", ErrDenied)
	}
	raw, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		return nil, identity.DeviceID{}, fmt.Errorf("%w: %w", ErrDenied, err)
	}
	var p Proof
	if err := canonical.Decode(raw, maxProof, &p); err != nil {
		return nil, identity.DeviceID{}, fmt.Errorf("%w: %w", ErrDenied, err)
	}
	if age := now.Sub(time.Unix(p.Time, 0)); age > validity || age < -validity {
		return nil, p.Device, fmt.Errorf("%w: proof is %v old, or the clocks differ", ErrDenied, age.Round(time.Second))
	}
	a, err := lookup(p.Account)
	if err != nil {
		return nil, p.Device, fmt.Errorf("%w: %v: %w", ErrDenied, p.Account, err)
	}
	d, ok := a.Device(p.Device)
	if !ok {
		return nil, p.Device, fmt.Errorf("%w: %v is not a device of %v", ErrDenied, p.Device, a.ID)
	}
	if err := d.Key.Verify(purpose, message(r, server, p.Account, p.Time), &p.Signature); err != nil {
		return nil, p.Device, fmt.Errorf("%w: %w", ErrDenied, err)
	}
	return a, p.Device, nil
}
