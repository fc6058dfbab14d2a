package api_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"

	"holdfast/api"
	"holdfast/api/apitest"
	"holdfast/identity"
	"holdfast/internal/canonical"
	"holdfast/ledger"
)

func TestMachinesAskToBeAdmitted(t *testing.T) {
	g := apitest.Start(t, nil)
	c, ctx := g.Client(nil), g.Context()
	admitted := g.Node(c, "node-1", 20)
	rec, err := api.Get[ledger.Node](ctx, c, ledger.NodeKey(admitted.ID))
	if err != nil {
		t.Fatal(err)
	}
	// wish is what a machine asks. spoil comes before the proof, forge after it.
	wish := func(seed byte, spoil, forge func(*ledger.NodeAdmit)) *ledger.NodeAdmit {
		k := identity.NewKey([32]byte{seed, 9})
		a := &ledger.NodeAdmit{Farm: rec.Farm, Name: fmt.Sprint("new-", seed), Key: k.Public(), WireGuard: [32]byte{seed}, TLS: [32]byte{seed}, Session: [32]byte{seed}, Endpoints: []string{"2001:db8::7"}, CPUMilli: 1000, Memory: 1 << 30}
		if spoil != nil {
			spoil(a)
		}
		a.Proof = k.Sign(ledger.NodeAdmitPurpose, a.ProofBytes(c.Grid()))
		if forge != nil {
			forge(a)
		}
		return a
	}
	waiting := func() (out []string) {
		t.Helper()
		all, err := c.Pending(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range all {
			out = append(out, a.Name)
		}
		return out
	}
	if got := waiting(); len(got) != 0 {
		t.Fatalf("before: %q", got)
	}
	second := wish(2, nil, nil)
	for _, a := range []*ledger.NodeAdmit{second, wish(1, nil, nil), wish(2, func(a *ledger.NodeAdmit) { a.Endpoints = nil }, nil)} {
		if err := c.Announce(ctx, a); err != nil {
			t.Fatal(err)
		}
	}
	want := []string{"new-1", "new-2"}
	if got := waiting(); !slices.Equal(got, want) {
		t.Fatalf("%q wait", got)
	}

	post := func(body []byte) (int, string) {
		t.Helper()
		resp, err := raw(g).Post("https://"+g.Addr()+"/v1/node/pending", "", bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, _ := io.ReadAll(resp.Body)
		return resp.StatusCode, string(b)
	}
	of := func(spoil, forge func(*ledger.NodeAdmit)) []byte { return wish(3, spoil, forge).Encode() }
	for _, x := range []struct {
		name string
		body []byte
		code int
		msg  string
	}{
		{"a name changed after it was signed", of(nil, func(a *ledger.NodeAdmit) { a.Name = "node-9" }), 403, "proof of node1"},
		{"an endpoint changed after it was signed", of(nil, func(a *ledger.NodeAdmit) { a.Endpoints = []string{"2001:db8::666"} }), 403, "proof of node1"},
		{"no proof", of(nil, func(a *ledger.NodeAdmit) { a.Proof = identity.Signature{} }), 403, "proof of node1"},
		{"another machine's key", of(nil, func(a *ledger.NodeAdmit) { a.Key = second.Key }), 403, "proof of node1"},
		{"a proof for another grid", of(nil, func(a *ledger.NodeAdmit) {
			a.Proof = identity.NewKey([32]byte{3, 9}).Sign(ledger.NodeAdmitPurpose, a.ProofBytes(identity.GridID{1}))
		}), 403, "proof of node1"},
		{"a farm that is not there", of(func(a *ledger.NodeAdmit) { a.Farm = identity.FarmID{1} }, nil), 403, "not on the ledger"},
		{"a name that the ledger would refuse", of(func(a *ledger.NodeAdmit) { a.Name = "\x1b[2J" }, nil), 403, "only a-z"},
		{"an endpoint that is none", of(func(a *ledger.NodeAdmit) { a.Endpoints = []string{"everywhere"} }, nil), 403, "not an address"},
		{"an endpoint with a zone, which is any text", of(func(a *ledger.NodeAdmit) { a.Endpoints = []string{"fe80::1%\x1b[2J"} }, nil), 403, "not an address"},
		{"a node, for which there is nothing to do", of(func(a *ledger.NodeAdmit) { a.Key = rec.Key }, nil), 204, ""},
		{"nothing", nil, 400, "EOF"},
		{"something else", canonical.Encode("let me in"), 400, "node.admit"},
		{"two", append(of(nil, nil), of(nil, nil)...), 400, "node.admit"},
		{"more than any wish has", make([]byte, ledger.MaxNodeAdmit+1), 400, "too large"},
	} {
		if code, msg := post(x.body); code != x.code || !strings.Contains(msg, x.msg) {
			t.Errorf("%s: %d %q, want %d %q", x.name, code, msg, x.code, x.msg)
		}
		if got := waiting(); !slices.Equal(got, want) {
			t.Fatalf("%s: %q wait", x.name, got)
		}
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+g.Addr()+"/v1/node/pending", io.MultiReader(bytes.NewReader(make([]byte, 1<<20))))
	if err != nil {
		t.Fatal(err)
	}
	if resp, err := raw(g).Do(req); err == nil {
		if resp.Body.Close(); resp.StatusCode != 400 {
			t.Errorf("a megabyte without a length: %s", resp.Status)
		}
	}

	// One address fills its places, and no more.
	for seed := byte(10); ; seed++ {
		err := c.Announce(ctx, wish(seed, nil, nil))
		if err != nil && seed == 16 && strings.Contains(err.Error(), "8 machines of 127.0.0.1/32 wait") {
			break
		}
		if err != nil || seed > 16 {
			t.Fatalf("machine %d: %v", seed, err)
		}
	}
	if got := waiting(); len(got) != 8 {
		t.Errorf("%q wait", got)
	}
}

// A validator adds machines that do not verify to what it was told.
func TestALyingBoardShowsNobody(t *testing.T) {
	g := apitest.Start(t, nil)
	k := identity.NewKey([32]byte{9})
	a := &ledger.NodeAdmit{Name: "new-1", Key: k.Public()}
	a.Proof = k.Sign(ledger.NodeAdmitPurpose, a.ProofBytes(g.Genesis.GridID()))
	forged := *a
	forged.Name = "new-2"
	many := make([][]byte, 257)
	for i := range many {
		k := identity.NewKey([32]byte{byte(i), byte(i >> 8), 10})
		w := &ledger.NodeAdmit{Name: "new", Key: k.Public()}
		w.Proof = k.Sign(ledger.NodeAdmitPurpose, w.ProofBytes(g.Genesis.GridID()))
		many[i] = w.Encode()
	}
	for name, x := range map[string]struct {
		answer []byte
		ok     bool
	}{
		"control":                {canonical.Encode([][]byte{a.Encode(), a.Encode()}), true},
		"a machine made up":      {canonical.Encode([][]byte{forged.Encode()}), false},
		"more than there can be": {canonical.Encode(many), false},
		"no end":                 {make([]byte, 8<<20), false},
	} {
		addr := impostor(t, &g.Cert, says(x.answer))
		c := g.Client(func(c *api.ClientConfig) {
			c.Dial = func(ctx context.Context, _ *ledger.Validator) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, "tcp", addr)
			}
		})
		all, err := c.Pending(t.Context())
		if x.ok != (err == nil && len(all) == 1 && all[0].Name == "new-1") || !x.ok && len(all) > 0 {
			t.Errorf("%s: %d machines, %v", name, len(all), err)
		}
	}
}
