package comet

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cometbft/cometbft/crypto/mldsa65"
	cmtproto "github.com/cometbft/cometbft/proto/tendermint/types"
	"github.com/cometbft/cometbft/types"

	"holdfast/internal/canonical"
)

// liar is a server that passes requests on to a true one and may change the answers. Clients pin its own key: it is a
// validator that turned bad.
type liar struct {
	t    *testing.T
	true *server

	mu     sync.Mutex
	change func(path string, body, answer []byte) []byte
	addr   string
	pin    Pin
}

func newLiar(t *testing.T, g *grid) *liar {
	t.Helper()
	cert, err := LoadCertificate(filepath.Join(t.TempDir(), "liar.pem"), "ledger")
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	pin, err := PinOf(cert)
	if err != nil {
		t.Fatal(err)
	}
	l := &liar{t: t, addr: ln.Addr().String(), pin: pin}
	s := g.server(0)
	s.Name = "ledger"
	l.true = newServer(s, nil)
	srv := &http.Server{Handler: l, TLSConfig: tlsServer(cert)}
	done := make(chan struct{})
	go func() { defer close(done); srv.ServeTLS(ln, "", "") }()
	t.Cleanup(func() { srv.Close(); <-done; l.true.http.CloseIdleConnections() })
	return l
}

func (l *liar) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	r2, _ := http.NewRequestWithContext(r.Context(), r.Method, "https://ledger"+r.URL.Path, bytes.NewReader(body))
	resp, err := l.true.do(r2)
	if err != nil {
		w.WriteHeader(http.StatusBadGateway)
		return
	}
	defer resp.Body.Close()
	answer, _ := io.ReadAll(resp.Body)
	if resp.StatusCode == http.StatusOK {
		l.mu.Lock()
		change := l.change
		l.mu.Unlock()
		if change != nil {
			answer = change(r.URL.Path, body, answer)
		}
	}
	w.WriteHeader(resp.StatusCode)
	w.Write(answer)
}

func (l *liar) set(change func(path string, body, answer []byte) []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.change = change
}

// reads makes a change of answers to reads alone.
func reads(t *testing.T, f func(a *readAnswer)) func(string, []byte, []byte) []byte {
	return func(path string, _, answer []byte) []byte {
		if path != pathRead {
			return answer
		}
		var a readAnswer
		if err := canonical.Decode(answer, maxAnswer, &a); err != nil {
			t.Error(err)
		}
		f(&a)
		return canonical.Encode(a)
	}
}

func (l *liar) server() Server {
	return Server{Pins: []Pin{l.pin}, Dial: func(ctx context.Context) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", l.addr)
	}}
}

// resign changes a header and signs it with the given keys, which are the validators set unless it is nil.
func resign(t *testing.T, h head, chain string, keys []mldsa65.PrivKey, set *types.ValidatorSet, edit func(*types.Header)) head {
	t.Helper()
	sh, _, err := decodeHead(h)
	if err != nil {
		t.Fatal(err)
	}
	edit(sh.Header)
	sh.ChainID = chain
	if set != nil {
		sh.ValidatorsHash, sh.NextValidatorsHash = set.Hash(), set.Hash()
		sh.ProposerAddress = set.Validators[0].Address
	}
	c := sh.Commit
	c.BlockID.Hash = sh.Header.Hash()
	c.Height = sh.Height
	c.Signatures = nil
	for _, k := range keys {
		v := &types.Vote{Type: cmtproto.PrecommitType, Height: c.Height, Round: c.Round, BlockID: c.BlockID,
			Timestamp: time.Now().UTC(), ValidatorAddress: k.PubKey().Address()}
		sig, err := k.Sign(types.VoteSignBytes(chain, v.ToProto()))
		if err != nil {
			t.Fatal(err)
		}
		c.Signatures = append(c.Signatures, types.CommitSig{BlockIDFlag: types.BlockIDFlagCommit,
			ValidatorAddress: v.ValidatorAddress, Timestamp: v.Timestamp, Signature: sig})
	}
	var known []byte
	if set == nil {
		known = sh.ValidatorsHash
	}
	out, err := encodeHead(sh, set, known)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func forgedState() (*kv, [32]byte) {
	s := &kv{map[string][]byte{"a": []byte("forged")}}
	return s, s.Root()
}

// forge replaces what a says with a state of the liar's own.
func forge(a *readAnswer) [32]byte {
	s, root := forgedState()
	v, p := s.Get("a")
	for i := range a.Entries {
		a.Entries[i] = entry{Present: true, Value: v, Proof: p}
	}
	return root
}

func TestClientBelievesNoLiar(t *testing.T) {
	g := newGrid(t, 1, nil)
	await(t, g.start(0), 10*time.Second)
	ctx := within(t, 60*time.Second)
	honest := g.client(nil)
	for _, tx := range []string{"1:a=true value|good", "2:b=other value|good"} {
		if _, err := honest.Submit(ctx, []byte(tx)); err != nil {
			t.Fatal(err)
		}
	}
	r, err := honest.Submit(ctx, []byte("3:c=1|good"))
	if err != nil {
		t.Fatal(err)
	}
	l := newLiar(t, g)
	ks, err := loadKeys(g.configs[0].Home)
	if err != nil {
		t.Fatal(err)
	}
	own := []mldsa65.PrivKey{ks.consensus}
	bad, err := mldsa65.GenPrivKey()
	if err != nil {
		t.Fatal(err)
	}
	others := types.NewValidatorSet([]*types.Validator{types.NewValidator(bad.PubKey(), 1)})
	chain := g.genesis.Chain

	for name, c := range map[string]struct {
		change func(a *readAnswer)
		want   error
	}{
		"control: the truth is believed": {func(a *readAnswer) {}, nil},
		"control: a resigned header with a root of its own is what consensus could have said": {func(a *readAnswer) {
			a.Head = resign(t, a.Head, chain, own, nil, func(*types.Header) {})
		}, nil},
		"a tampered value":              {func(a *readAnswer) { a.Entries[0].Value = []byte("false value") }, ErrProof},
		"a tampered proof":              {func(a *readAnswer) { a.Entries[0].Proof[9] ^= 1 }, ErrProof},
		"the value of another key":      {func(a *readAnswer) { a.Entries[0] = a.Entries[1] }, ErrProof},
		"a present key called absent":   {func(a *readAnswer) { a.Entries[0].Present, a.Entries[0].Value = false, nil }, ErrProof},
		"an absent key called present":  {func(a *readAnswer) { a.Entries[2].Present, a.Entries[2].Value = true, []byte("x") }, ErrProof},
		"an absent key called empty":    {func(a *readAnswer) { a.Entries[2].Present = true }, ErrProof},
		"an answer with a key left out": {func(a *readAnswer) { a.Entries = a.Entries[:2] }, ErrProof},
		"an answer with no header":      {func(a *readAnswer) { a.Head = head{} }, ErrProof},
		"a state of its own":            {func(a *readAnswer) { forge(a) }, ErrProof},
		"a header that is not signed": {func(a *readAnswer) {
			root := forge(a)
			a.Head = resign(t, a.Head, chain, nil, nil, func(h *types.Header) { h.AppHash = root[:] })
		}, ErrProof},
		"a header signed by others who claim to be the validators": {func(a *readAnswer) {
			root := forge(a)
			a.Head = resign(t, a.Head, chain, []mldsa65.PrivKey{bad}, nil, func(h *types.Header) { h.AppHash = root[:] })
		}, ErrProof},
		"a header signed by other validators": {func(a *readAnswer) {
			root := forge(a)
			a.Head = resign(t, a.Head, chain, []mldsa65.PrivKey{bad}, others, func(h *types.Header) { h.AppHash = root[:] })
		}, ErrProof},
		"another chain of the same validators": {func(a *readAnswer) {
			root := forge(a)
			a.Head = resign(t, a.Head, "other-grid", own, nil, func(h *types.Header) { h.AppHash = root[:] })
		}, ErrProof},
		"the signatures of another header": {func(a *readAnswer) {
			root := forge(a)
			sh, _, _ := decodeHead(a.Head)
			sh.AppHash = root[:]
			a.Head, _ = encodeHead(sh, nil, sh.ValidatorsHash)
		}, ErrProof},
		"a header from the future": {func(a *readAnswer) {
			root := forge(a)
			a.Head = resign(t, a.Head, chain, own, nil, func(h *types.Header) { h.AppHash, h.Time = root[:], time.Now().Add(time.Hour) })
		}, ErrProof},
		"a stale header": {func(a *readAnswer) {
			a.Head = resign(t, a.Head, chain, own, nil, func(h *types.Header) { h.Time = time.Now().Add(-40 * time.Second) })
		}, ErrStale},
	} {
		// A fresh client each: with one that knows the height already, the two controls would be forks.
		cl := g.client(func(c *ClientConfig) { c.Servers = []Server{l.server()} })
		l.set(reads(t, c.change))
		v, err := cl.ReadAt(ctx, r.Height, "a", "b", "absent")
		if !errors.Is(err, c.want) || err != nil && c.want == nil {
			t.Errorf("%s: got %v and error %v, want %v", name, v.values, err, c.want)
		}
	}
}

func TestClientWithAMemoryIsNotLedBackOrAside(t *testing.T) {
	g := newGrid(t, 1, nil)
	await(t, g.start(0), 10*time.Second)
	ctx := within(t, 60*time.Second)
	l := newLiar(t, g)
	ks, err := loadKeys(g.configs[0].Home)
	if err != nil {
		t.Fatal(err)
	}
	own := []mldsa65.PrivKey{ks.consensus}
	chain := g.genesis.Chain
	store := FileTrust(filepath.Join(t.TempDir(), "trust"))
	client := func() *Client {
		return g.client(func(c *ClientConfig) { c.Servers, c.Trust = []Server{l.server()}, store })
	}

	// The liar records an early answer, which is true and signed.
	var early []byte
	l.set(func(path string, _, answer []byte) []byte {
		if path == pathRead {
			early = bytes.Clone(answer)
		}
		return answer
	})
	first := client()
	if _, err := first.Read(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	r, err := first.Submit(ctx, []byte("1:a=new|good"))
	if err != nil {
		t.Fatal(err)
	}
	old := bytes.Clone(early)
	if _, err := first.ReadAt(ctx, r.Height, "a"); err != nil {
		t.Fatal(err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}

	replay := func(path string, _, answer []byte) []byte {
		if path == pathRead {
			return old
		}
		return answer
	}
	l.set(replay)
	if _, err := first.Read(ctx, "a"); !errors.Is(err, ErrRollback) {
		t.Errorf("the client that saw more: %v", err)
	}
	if _, err := client().Read(ctx, "a"); !errors.Is(err, ErrRollback) {
		t.Errorf("a later client with its memory: %v", err)
	}
	fresh := g.client(func(c *ClientConfig) { c.Servers = []Server{l.server()} })
	if _, err := fresh.Read(ctx, "a"); err != nil {
		t.Errorf("control: a client without memory takes the old answer for as long as it is not stale: %v", err)
	}
	l.set(nil)
	if _, err := client().Read(ctx, "a"); err != nil {
		t.Errorf("control: the truth: %v", err)
	}

	// The validators sign a second chain. First at a height that the client knows.
	l.set(func(path string, body, answer []byte) []byte {
		if path != pathHeader {
			return answer
		}
		var h head
		canonical.Decode(answer, maxAnswer, &h)
		_, root := forgedState()
		return canonical.Encode(resign(t, h, chain, own, nil, func(h *types.Header) { h.AppHash = root[:] }))
	})
	if _, err := client().Read(ctx, "a"); !errors.Is(err, ErrFork) {
		t.Errorf("a fork below the header that is shown: %v", err)
	}
	// Then at the next height, on top of a block that is not the one the client knows.
	c := client()
	l.set(nil)
	if _, err := c.Read(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	base := c.chain.trusted()
	l.set(reads(t, func(a *readAnswer) {
		root := forge(a)
		a.Head = resign(t, a.Head, chain, own, nil, func(h *types.Header) {
			h.AppHash, h.Height, h.Time = root[:], base.Height+1, base.Time.Add(time.Millisecond)
			h.LastBlockID.Hash = bytes.Repeat([]byte{7}, 32)
		})
	}))
	if _, err := c.Read(ctx, "a"); !errors.Is(err, ErrFork) {
		t.Errorf("a fork on top of another block: %v", err)
	}
	l.set(nil)
	if _, err := c.Read(ctx, "a"); err != nil {
		t.Errorf("control: the truth after the lies: %v", err)
	}

	// Time.
	c.now = func() time.Time { return time.Now().Add(time.Hour) }
	if _, err := c.Read(ctx, "a"); !errors.Is(err, ErrStale) {
		t.Errorf("a head an hour old: %v", err)
	}
	c.now = func() time.Time { return time.Now().Add(-time.Hour) }
	if _, err := c.Read(ctx, "a"); err == nil {
		t.Error("a head an hour ahead was accepted")
	}
	c.now = time.Now
	if _, err := c.Read(ctx, "a"); err != nil {
		t.Errorf("control: the clock is right again: %v", err)
	}

	// A memory that names validators of its own. The control names the true ones.
	ctl := g.client(nil)
	if _, err := ctl.Read(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	top := ctl.chain.trusted()
	truth, err := encodeHead(top.SignedHeader, top.set, nil)
	if err != nil {
		t.Fatal(err)
	}
	bad, err := mldsa65.GenPrivKey()
	if err != nil {
		t.Fatal(err)
	}
	usurpers := types.NewValidatorSet([]*types.Validator{types.NewValidator(bad.PubKey(), 1)})
	for name, x := range map[string]struct {
		head head
		want string
	}{
		"control: the validators of the genesis": {truth, ""},
		"validators of its own":                  {resign(t, truth, chain, []mldsa65.PrivKey{bad}, usurpers, func(*types.Header) {}), "cant trust new val set"},
	} {
		planted := FileTrust(filepath.Join(t.TempDir(), "planted"))
		if err := planted.Save(canonical.Encode(trustFile{Version: 1, Chain: chain, Head: x.head})); err != nil {
			t.Fatal(err)
		}
		_, err := g.client(func(c *ClientConfig) { c.Trust = planted }).Read(ctx, "a")
		if (err == nil) != (x.want == "") || err != nil && !strings.Contains(err.Error(), x.want) {
			t.Errorf("a memory with %s: %v", name, err)
		}
	}

	// The memory of another chain.
	other := g.client(func(c *ClientConfig) { c.Genesis.Chain, c.Trust = "other", store })
	if _, err := other.Read(ctx, "a"); err == nil || !strings.Contains(err.Error(), "is of chain") {
		t.Errorf("a memory of another chain: %v", err)
	}
}

func TestClientOfOneGridRefusesAnother(t *testing.T) {
	a := newGrid(t, 1, nil)
	b := newGrid(t, 1, nil) // the same chain name, other validators
	await(t, a.start(0), 10*time.Second)
	await(t, b.start(0), 10*time.Second)
	ctx := within(t, 20*time.Second)
	for name, c := range map[string]struct {
		genesis Genesis
		ok      bool
	}{
		"control: its own":           {a.genesis, true},
		"another grid's":             {b.genesis, false},
		"its own under another name": {Genesis{Chain: "x", Time: a.genesis.Time, Validators: a.genesis.Validators}, false},
	} {
		cl := a.client(func(cc *ClientConfig) { cc.Genesis = c.genesis })
		_, err := cl.Read(ctx, "a")
		if c.ok != (err == nil) || err != nil && !errors.Is(err, ErrProof) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestClientSpeaksOnlyToThePinnedKey(t *testing.T) {
	g := newGrid(t, 1, nil)
	await(t, g.start(0), 10*time.Second)
	ctx := within(t, 20*time.Second)
	right := g.server(0)
	wrong := right
	wrong.Pins = []Pin{{1, 2, 3}}
	cl := g.client(func(c *ClientConfig) { c.Servers = []Server{wrong} })
	if _, err := cl.Read(ctx, "a"); !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "pinned") {
		t.Errorf("a wrong pin: %v", err)
	}
	cl = g.client(func(c *ClientConfig) { c.Servers = []Server{wrong, right} })
	if _, err := cl.Read(ctx, "a"); err != nil {
		t.Errorf("control: the next server has the pinned key: %v", err)
	}
}

func TestClientGoesOnToAServerThatTellsTheTruth(t *testing.T) {
	g := newGrid(t, 1, nil)
	await(t, g.start(0), 10*time.Second)
	l := newLiar(t, g)
	l.set(reads(t, func(a *readAnswer) { forge(a) }))
	ctx := within(t, 20*time.Second)
	dead := Server{Pins: []Pin{{}}, Dial: func(context.Context) (net.Conn, error) { return nil, errors.New("down") }}
	cl := g.client(func(c *ClientConfig) { c.Servers = []Server{dead, l.server(), g.server(0)} })
	v, err := cl.Read(ctx, "a")
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := v.Value("a"); ok {
		t.Fatal("believed the liar")
	}
}
