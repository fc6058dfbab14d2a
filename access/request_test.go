package access

import (
	"errors"
	"net/http"
	"testing"
	"time"

	"holdfast/identity"
)

func TestRequestIsBoundToWhatItAsks(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	key, thief := identity.NewKey([32]byte{1}), identity.NewKey([32]byte{2})
	acct := &identity.Account{ID: identity.AccountID{9}, Devices: []identity.Device{{Name: "laptop", Key: key.Public()}}}
	lookup := func(id identity.AccountID) (*identity.Account, error) {
		if id != acct.ID {
			return nil, errors.New("unknown")
		}
		return acct, nil
	}
	server := [32]byte{5}
	request := func(method, url string) *http.Request {
		r, err := http.NewRequest(method, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	signed := func() *http.Request {
		r := request("PUT", "https://x/v1/blob/aa?b=1")
		Sign(r, server, acct.ID, key, now)
		return r
	}
	if a, d, err := Verify(signed(), server, now.Add(time.Minute), lookup); err != nil || a != acct || d != acct.Devices[0].Key.Device() {
		t.Fatalf("control: %v", err)
	}
	for name, f := range map[string]func() (*http.Request, [32]byte, time.Time){
		"without a proof": func() (*http.Request, [32]byte, time.Time) {
			return request("PUT", "https://x/v1/blob/aa"), server, now
		},
		"another path": func() (*http.Request, [32]byte, time.Time) {
			r := request("PUT", "https://x/v1/blob/bb?b=1")
			r.Header = signed().Header
			return r, server, now
		},
		"another query": func() (*http.Request, [32]byte, time.Time) {
			r := request("PUT", "https://x/v1/blob/aa?b=2")
			r.Header = signed().Header
			return r, server, now
		},
		"another method": func() (*http.Request, [32]byte, time.Time) {
			r := request("DELETE", "https://x/v1/blob/aa?b=1")
			r.Header = signed().Header
			return r, server, now
		},
		"passed on to another server": func() (*http.Request, [32]byte, time.Time) { return signed(), [32]byte{6}, now },
		"an hour later":               func() (*http.Request, [32]byte, time.Time) { return signed(), server, now.Add(time.Hour) },
		"an hour early":               func() (*http.Request, [32]byte, time.Time) { return signed(), server, now.Add(-time.Hour) },
		"by another key": func() (*http.Request, [32]byte, time.Time) {
			r := request("PUT", "https://x/v1/blob/aa?b=1")
			Sign(r, server, acct.ID, thief, now)
			return r, server, now
		},
		"for an unknown account": func() (*http.Request, [32]byte, time.Time) {
			r := request("PUT", "https://x/v1/blob/aa?b=1")
			Sign(r, server, identity.AccountID{8}, key, now)
			return r, server, now
		},
		"garbage": func() (*http.Request, [32]byte, time.Time) {
			r := request("PUT", "https://x/v1/blob/aa?b=1")
			r.Header.Set("Authorization", "Holdfast AAAA")
			return r, server, now
		},
	} {
		r, srv, at := f()
		if _, _, err := Verify(r, srv, at, lookup); !errors.Is(err, ErrDenied) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
