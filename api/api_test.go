package api_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/access"
	"holdfast/api"
	"holdfast/api/apitest"
	"holdfast/contract"
	"holdfast/identity"
	"holdfast/internal/canonical"
	"holdfast/ledger"
	"holdfast/ledger/comet"
	"holdfast/store"
)

func digest(b []byte) store.Digest { return sha256.Sum256(b) }

func random(n int) []byte {
	b := make([]byte, n)
	rand.Read(b)
	return b
}

// files lists everything under a directory that is no directory.
func files(t *testing.T, dir string) []string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err == nil && !d.IsDir() {
			out = append(out, filepath.Base(p))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// raw speaks to a validator without a client of ours between.
func raw(g *apitest.Grid) *http.Client {
	var only http.Protocols
	only.SetHTTP2(true)
	tr := &http.Transport{Protocols: &only, TLSClientConfig: &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS13}}
	g.T.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

// put prepares a PUT of a blob that a test sends itself.
func put(g *apitest.Grid, d store.Digest, body io.Reader, size int64) *http.Request {
	req, err := http.NewRequestWithContext(g.Context(), http.MethodPut, "https://"+g.Addr()+"/v1/blob/"+d.String(), body)
	if err != nil {
		g.T.Fatal(err)
	}
	req.ContentLength = size
	return req
}

func TestBlobs(t *testing.T) {
	g := apitest.Start(t, func(c *api.ValidatorConfig) { c.Idle = 500 * time.Millisecond })
	c, ctx := g.Client(nil), g.Context()
	keys := apitest.Key(7)
	account := g.Account(c, keys)
	key := keys.DeviceKey()
	pin := g.Genesis.Validators[0].TLS
	data := random(10_000)

	// The control: what the owner of an account pushes is there, byte for byte.
	if have, err := c.HasBlob(ctx, digest(data)); err != nil || have {
		t.Fatalf("before: %v %v", have, err)
	}
	if err := c.PutBlob(ctx, digest(data), int64(len(data)), bytes.NewReader(data), account, key); err != nil {
		t.Fatal(err)
	}
	<-g.Stored
	r, n, err := c.OpenBlob(ctx, digest(data))
	if err != nil || n != int64(len(data)) {
		t.Fatalf("open: %d bytes, %v", n, err)
	}
	got, err := io.ReadAll(r)
	if r.Close(); err != nil || !bytes.Equal(got, data) {
		t.Fatalf("read: %v", err)
	}
	if have, err := c.HasBlob(ctx, digest(data)); err != nil || !have {
		t.Fatalf("after: %v %v", have, err)
	}
	want := []string{digest(data).String()}
	untouched := func(what string) {
		t.Helper()
		if got := files(t, g.Blobs); !slices.Equal(got, want) {
			t.Errorf("%s left %v", what, got)
		}
	}
	untouched("the control")

	// do sends a request and says what came.
	do := func(req *http.Request) (int, string) {
		t.Helper()
		resp, err := raw(g).Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, _ := io.ReadAll(resp.Body)
		return resp.StatusCode, strings.TrimSpace(string(b))
	}
	other := random(100)
	sign := func(req *http.Request, server [32]byte, a identity.AccountID, k *identity.PrivateKey, at time.Time) {
		access.Sign(req, server, a, k, at)
	}
	for name, spoil := range map[string]func(*http.Request){
		"unsigned":                           func(*http.Request) {},
		"of an account that is not there":    func(r *http.Request) { sign(r, pin, identity.AccountID{9}, key, time.Now()) },
		"by a key that the account has not":  func(r *http.Request) { sign(r, pin, account, apitest.Key(8).DeviceKey(), time.Now()) },
		"for another server":                 func(r *http.Request) { sign(r, [32]byte{1}, account, key, time.Now()) },
		"of an hour ago":                     func(r *http.Request) { sign(r, pin, account, key, time.Now().Add(-time.Hour)) },
		"of an hour ahead":                   func(r *http.Request) { sign(r, pin, account, key, time.Now().Add(time.Hour)) },
		"with a proof that is not of a form": func(r *http.Request) { r.Header.Set("Authorization", "Holdfast !!!!") },
		"signed for another blob": func(r *http.Request) {
			signed := put(g, digest(data), nil, 0)
			sign(signed, pin, account, key, time.Now())
			r.Header.Set("Authorization", signed.Header.Get("Authorization"))
		},
		"signed for a read": func(r *http.Request) {
			signed := r.Clone(r.Context())
			signed.Method = http.MethodGet
			sign(signed, pin, account, key, time.Now())
			r.Header.Set("Authorization", signed.Header.Get("Authorization"))
		},
	} {
		req := put(g, digest(other), bytes.NewReader(other), int64(len(other)))
		spoil(req)
		if code, msg := do(req); code != http.StatusForbidden || !strings.Contains(msg, access.ErrDenied.Error()) {
			t.Errorf("a push %s: %d %q", name, code, msg)
		}
		untouched("a push " + name)
	}

	for name, x := range map[string]struct {
		d    store.Digest
		body []byte
		size int64
		code int
		msg  error
	}{
		"bytes of another digest":              {digest(other), data, int64(len(data)), http.StatusBadRequest, store.ErrDigest},
		"more bytes than the store takes":      {digest(make([]byte, g.BlobMax+1)), make([]byte, g.BlobMax+1), g.BlobMax + 1, http.StatusRequestEntityTooLarge, store.ErrTooBig},
		"the same, without saying how many":    {digest(make([]byte, g.BlobMax+1)), make([]byte, g.BlobMax+1), -1, http.StatusRequestEntityTooLarge, store.ErrTooBig},
		"an announcement of more than MaxBlob": {digest(other), nil, api.MaxBlob + 1, http.StatusRequestEntityTooLarge, store.ErrTooBig},
	} {
		var body io.Reader = bytes.NewReader(x.body)
		if x.body == nil {
			pr, pw := io.Pipe() // it announces and sends nothing
			defer pw.Close()
			body = pr
		}
		req := put(g, x.d, body, x.size)
		sign(req, pin, account, key, time.Now())
		if code, msg := do(req); code != x.code || !strings.Contains(msg, x.msg.Error()) {
			t.Errorf("%s: %d %q", name, code, msg)
		}
		if x.body != nil {
			if err := <-g.Stored; !errors.Is(err, x.msg) {
				t.Errorf("%s: the store says %v", name, err)
			}
		}
		untouched(name)
	}
	if code, msg := do(put(g, store.Digest{}, nil, 0)); code != http.StatusForbidden {
		t.Errorf("control: %d %q", code, msg)
	}
	req := put(g, store.Digest{}, nil, 0)
	req.URL.Path = "/v1/blob/..%2f..%2fetc"
	if code, _ := do(req); code != http.StatusBadRequest && code != http.StatusNotFound {
		t.Errorf("a digest that is a path: %d", code)
	}
}

func TestBrokenUploads(t *testing.T) {
	g := apitest.Start(t, func(c *api.ValidatorConfig) { c.Idle = 300 * time.Millisecond })
	c := g.Client(nil)
	keys := apitest.Key(7)
	account := g.Account(c, keys)
	pin := g.Genesis.Validators[0].TLS
	data := random(200_000)
	for name, end := range map[string]func(w *io.PipeWriter, cancel func()){
		"a client that goes away":    func(_ *io.PipeWriter, cancel func()) { cancel() },
		"an upload that breaks":      func(w *io.PipeWriter, _ func()) { w.CloseWithError(errors.New("cable pulled")) },
		"an upload that ends early":  func(w *io.PipeWriter, _ func()) { w.Close() },
		"a client that stands still": func(*io.PipeWriter, func()) {},
	} {
		ctx, cancel := context.WithCancel(g.Context())
		pr, pw := io.Pipe()
		req := put(g, digest(data), pr, int64(len(data))).WithContext(ctx)
		access.Sign(req, pin, account, keys.DeviceKey(), time.Now())
		failed := make(chan error, 1)
		go func() {
			resp, err := raw(g).Do(req)
			if err == nil {
				resp.Body.Close()
				err = fmt.Errorf("status %d", resp.StatusCode)
			}
			failed <- err
		}()
		if _, err := pw.Write(data[:len(data)/2]); err != nil {
			t.Fatal(err)
		}
		end(pw, cancel)
		select {
		case err := <-g.Stored:
			if err == nil {
				t.Errorf("%s: the store took it", name)
			}
		case <-time.After(10 * time.Second): // long before the request's own end
			t.Errorf("%s: the validator waits", name)
			cancel()
			<-g.Stored
		}
		cancel()
		pw.Close()
		<-failed
		if got := files(t, g.Blobs); len(got) > 0 {
			t.Errorf("%s left %v", name, got)
		}
		if have, err := c.HasBlob(g.Context(), digest(data)); err != nil || have {
			t.Errorf("%s: the grid has it: %v %v", name, have, err)
		}
	}
	// The control: slowly is not still. It takes longer than a stand-still may, and arrives.
	pr, pw := io.Pipe()
	go func() {
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for part := range slices.Chunk(data, len(data)/6) {
			<-tick.C
			pw.Write(part)
		}
		pw.Close()
	}()
	if err := c.PutBlob(g.Context(), digest(data), int64(len(data)), pr, account, keys.DeviceKey()); err != nil {
		t.Fatal(err)
	}
	if got := files(t, g.Blobs); !slices.Equal(got, []string{digest(data).String()}) {
		t.Errorf("control: %v", got)
	}
}

// A blob that rots on the validator's disk is refused by who fetches it, in words that say what to look at.
// Where blobs are is the validator's own word: it may be long, or no text.
func TestWhereBlobsAre(t *testing.T) {
	say := api.BlobPlace{}
	g := apitest.Start(t, func(c *api.ValidatorConfig) { c.Where = func() api.BlobPlace { return say } })
	c := g.Client(nil)
	for want, p := range map[string]api.BlobPlace{
		"directory of the validator, 3 blobs":                                 {Waiting: 3},
		"directory of the validator, 0 blobs (why)":                           {Reason: "why"},
		"store 4/6 on 6 farms":                                                {Scheme: "4/6", Locations: 7, Farms: 6},
		"store 4/6 on 6 farms, 2 blobs wait in the validator's directory (?)": {Scheme: "4/6", Locations: 6, Farms: 6, Waiting: 2, Reason: "\xff"},
	} {
		say = p
		got, err := c.BlobPlace(t.Context())
		if err != nil || got.String() != want {
			t.Errorf("%v, %v, not %s", got, err, want)
		}
	}
	say = api.BlobPlace{Reason: strings.Repeat("long", 10_000)}
	if got, err := c.BlobPlace(t.Context()); err != nil || len(got.Reason) > 2000 {
		t.Errorf("a long reason: %v", err)
	}
}

func TestDamagedBlobs(t *testing.T) {
	g := apitest.Start(t, nil)
	c, ctx := g.Client(nil), g.Context()
	keys := apitest.Key(7)
	account := g.Account(c, keys)
	for _, size := range []int{1, 1000, 200_000} { // within one buffer of the server, and over several
		for name, damage := range map[string]func([]byte) []byte{
			"untouched":     nil, // the control
			"one bit":       func(b []byte) []byte { b[len(b)/2] ^= 1; return b },
			"cut short":     func(b []byte) []byte { return b[:len(b)-1] },
			"grown":         func(b []byte) []byte { return append(b, 0) },
			"emptied":       func([]byte) []byte { return nil },
			"the last byte": func(b []byte) []byte { b[len(b)-1]++; return b },
		} {
			data := random(size)
			d := digest(data)
			if err := c.PutBlob(ctx, d, int64(len(data)), bytes.NewReader(data), account, keys.DeviceKey()); err != nil {
				t.Fatal(err)
			}
			<-g.Stored
			if damage != nil {
				if err := os.WriteFile(filepath.Join(g.Blobs, d.String()[:2], d.String()), damage(bytes.Clone(data)), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			r, _, err := c.OpenBlob(ctx, d)
			if err == nil {
				_, err = io.ReadAll(r)
				r.Close()
			}
			if damage == nil {
				if err != nil {
					t.Errorf("control of %d bytes: %v", size, err)
				}
				continue
			}
			want := fmt.Sprintf("blob %v: the grid's copy is damaged: ", d)
			if !errors.Is(err, store.ErrDigest) || errors.Is(err, comet.ErrUnavailable) || !strings.HasPrefix(err.Error(), want) || !strings.Contains(err.Error()[len(want):], "digest") {
				t.Errorf("%d bytes, %s: %v", size, name, err)
			}
			// Who has it may store it again, and then it is whole. What is not it repairs nothing.
			if have, err := c.HasBlob(ctx, d); err != nil || have {
				t.Errorf("%d bytes, %s: the grid says that it has it: %v %v", size, name, have, err)
			}
			if err := c.PutBlob(ctx, d, int64(len(data)), bytes.NewReader(random(size + 1)[:size]), account, keys.DeviceKey()); err == nil && size > 1 {
				t.Errorf("%d bytes, %s: other bytes are taken", size, name)
			}
			<-g.Stored
			if err := c.PutBlob(ctx, d, int64(len(data)), bytes.NewReader(data), account, keys.DeviceKey()); err != nil {
				t.Errorf("%d bytes, %s: it cannot be stored again: %v", size, name, err)
			}
			<-g.Stored
			r, _, err = c.OpenBlob(ctx, d)
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(r)
			if r.Close(); err != nil || !bytes.Equal(got, data) {
				t.Errorf("%d bytes, %s: stored again: %v", size, name, err)
			}
		}
	}
}

// frayed is a connection that breaks after so many bytes.
type frayed struct {
	net.Conn
	left int
}

func (f *frayed) Read(p []byte) (int, error) {
	if f.left <= 0 {
		f.Close()
		return 0, errors.New("cable pulled")
	}
	n, err := f.Conn.Read(p[:min(len(p), f.left)])
	f.left -= n
	return n, err
}

// A line that breaks says nothing about the blob: it is worth another try, and damage is not.
func TestABlobOnABrokenLine(t *testing.T) {
	g := apitest.Start(t, nil)
	keys := apitest.Key(7)
	c := g.Client(nil)
	account := g.Account(c, keys)
	data := random(500_000)
	if err := c.PutBlob(g.Context(), digest(data), int64(len(data)), bytes.NewReader(data), account, keys.DeviceKey()); err != nil {
		t.Fatal(err)
	}
	for _, after := range []int{200_000, 10_000_000} { // the second is the control
		c := g.Client(func(cfg *api.ClientConfig) {
			cfg.Dial = func(ctx context.Context, v *ledger.Validator) (net.Conn, error) {
				conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", v.Address)
				return &frayed{conn, after}, err
			}
		})
		r, _, err := c.OpenBlob(g.Context(), digest(data))
		if err != nil {
			t.Fatal(err)
		}
		_, err = io.ReadAll(r)
		r.Close()
		broken := after < len(data)
		if broken != errors.Is(err, comet.ErrUnavailable) || errors.Is(err, store.ErrDigest) || broken != (err != nil) {
			t.Errorf("after %d bytes: %v", after, err)
		}
	}
}

func TestHeartbeats(t *testing.T) {
	g := apitest.Start(t, nil)
	c, ctx := g.Client(nil), g.Context()
	n, m := g.Node(c, "node-1", 20), g.Node(c, "node-2", 21)
	isUp := func(n *apitest.Node) bool {
		t.Helper()
		rec, err := api.Get[ledger.Node](ctx, c, ledger.NodeKey(n.ID))
		if err != nil {
			t.Fatal(err)
		}
		return rec.Up
	}
	stranger := apitest.Node{ID: identity.NodeID{1}, Session: n.Session}
	for name, h := range map[string]*ledger.Heartbeat{
		"by another node's session key": func() *ledger.Heartbeat { h := n.Heartbeat(); h.Sign(m.Session); return h }(),
		"unsigned":                      func() *ledger.Heartbeat { h := n.Heartbeat(); h.Signature = nil; return h }(),
		"changed after it was signed": func() *ledger.Heartbeat {
			h := n.Heartbeat(ledger.Report{Service: "web", State: ledger.StateStarting})
			h.Workloads[0].State = ledger.StateRunning
			return h
		}(),
		"of another grid": func() *ledger.Heartbeat { h := n.Heartbeat(); h.Grid[0] ^= 1; h.Sign(n.Session); return h }(),
		"of a node that the ledger does not know": func() *ledger.Heartbeat {
			h := stranger.Heartbeat()
			h.Grid = c.Grid()
			h.Sign(stranger.Session)
			return h
		}(),
	} {
		if err := c.Heartbeat(ctx, h.Encode()); err == nil || !strings.Contains(err.Error(), "403") {
			t.Errorf("a heartbeat %s: %v", name, err)
		}
	}
	if err := c.Heartbeat(ctx, []byte("no heartbeat")); err == nil {
		t.Error("bytes that are no heartbeat are taken")
	}
	if err := c.Heartbeat(ctx, make([]byte, ledger.MaxHeartbeat+1)); err == nil || !strings.Contains(err.Error(), "too large") {
		t.Errorf("a heartbeat that is too large: %v", err)
	}
	nodes, err := c.Nodes(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if all, err := c.Reports(ctx, nodes); err != nil || len(all) > 0 {
		t.Fatalf("after refused heartbeats: reports %v, %v", all, err)
	}
	// The control: another node sends its own, and by the time that the ledger takes it for up the first one is not.
	if err := c.Heartbeat(ctx, m.Heartbeat().Encode()); err != nil {
		t.Fatal(err)
	}
	g.Up(c, m)
	if isUp(n) {
		t.Error("refused heartbeats made a node count as up")
	}
	first := n.Heartbeat(ledger.Report{Service: "web", State: ledger.StateRunning})
	if err := c.Heartbeat(ctx, first.Encode()); err != nil {
		t.Fatal(err)
	}
	g.Up(c, n)
	all, err := c.Reports(ctx, nodes)
	if err != nil || len(all) != 2 {
		t.Fatalf("reports: %+v %v", all, err)
	}
	if i := slices.IndexFunc(all, func(h *ledger.Heartbeat) bool { return h.Node == n.ID }); i < 0 || all[i].Workloads[0].State != ledger.StateRunning {
		t.Fatalf("reports: %+v", all)
	}
	if err := c.Heartbeat(ctx, first.Encode()); err == nil || !strings.Contains(err.Error(), ledger.ErrStale.Error()) {
		t.Errorf("the same heartbeat again: %v", err)
	}

	// A node that changes its session key makes its own last words worthless, not those of the others.
	if err := c.Heartbeat(ctx, m.Heartbeat().Encode()); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Act(ctx, ledger.KindNodeUpdate, ledger.Actor{Node: true, ID: n.ID}, &ledger.NodeUpdate{Session: [32]byte{1}}, n.Key); err != nil {
		t.Fatal(err)
	}
	if nodes, err = c.Nodes(ctx); err != nil {
		t.Fatal(err)
	}
	if all, err = c.Reports(ctx, nodes); err != nil || len(all) != 1 || all[0].Node != m.ID {
		t.Errorf("reports after a change of keys: %+v %v", all, err)
	}
}

func TestTransactions(t *testing.T) {
	g := apitest.Start(t, nil)
	c, ctx := g.Client(nil), g.Context()
	mallory := apitest.Key(8)
	m := g.Account(c, mallory)
	actor := ledger.Actor{ID: g.Genesis.GridAccount()}
	admin := g.Admin.DeviceKey()
	farm := func(name string, nonce uint64, edit func(*ledger.Tx), keys ...*identity.PrivateKey) *ledger.Tx {
		tx := ledger.NewTx(c.Grid(), ledger.KindFarmAdmit, actor, nonce, &ledger.FarmAdmit{Name: name, Owner: g.Genesis.GridAccount()})
		tx.Until = time.Now().Add(time.Minute).Unix()
		if edit != nil {
			edit(tx)
		}
		for _, k := range keys {
			tx.Sign(k)
		}
		return tx
	}
	// The control.
	good := farm("good", 1, nil, admin)
	h, err := c.Submit(ctx, good)
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range []struct {
		name, want string
		tx         *ledger.Tx
	}{
		{"executed before, signed anew", "nonce 1, the next one is 2", farm("again", 1, nil, admin)},
		{"ahead of its time", "nonce 5, the next one is 2", farm("later", 5, nil, admin)},
		{"re-signed by a key of another account", "not a key of the actor", farm("mine", 2, nil, mallory.DeviceKey())},
		{"signed by the right key and another", "not a key of the actor", farm("mine", 2, nil, admin, mallory.DeviceKey())},
		{"with a signature taken from another", "does not verify", func() *ledger.Tx {
			tx := farm("mine", 2, nil)
			tx.Signatures = good.Signatures
			return tx
		}()},
		{"by an account that may not", "only " + g.Genesis.GridAccount().String() + " can do this", farm("mine", 1, func(tx *ledger.Tx) { tx.Actor = ledger.Actor{ID: m} }, mallory.DeviceKey())},
		{"from another grid", "transaction is for", farm("mine", 2, func(tx *ledger.Tx) { tx.Grid[0] ^= 1 }, admin)},
		{"changed after it was signed", "does not verify", func() *ledger.Tx {
			tx := farm("mine", 2, nil, admin)
			tx.Payload = canonical.Encode(&ledger.FarmAdmit{Name: "other", Owner: g.Genesis.GridAccount()})
			return tx
		}()},
		{"whose time is over", "its time is over", farm("mine", 2, func(tx *ledger.Tx) { tx.Until = time.Now().Add(-time.Minute).Unix() }, admin)},
		{"unsigned", "0 signatures", farm("mine", 2, nil)},
		{"of no kind", "kind of transaction is not known", farm("mine", 2, func(tx *ledger.Tx) { tx.Kind = "grid.give" }, admin)},
	} {
		_, err := c.Submit(ctx, x.tx)
		if !errors.Is(err, api.ErrRefused) || !strings.Contains(err.Error(), x.want) {
			t.Errorf("a transaction %s: %v, want a refusal with %q", x.name, err, x.want)
		}
	}
	// The very same bytes again do nothing: they tell what became of them the first time.
	if again, err := c.Submit(ctx, good); err != nil || again != h {
		t.Errorf("the same bytes again: height %d, %v; they were in block %d", again, err, h)
	}
	g.Until(c, "the block's proof", func(ctx context.Context) (bool, error) {
		n, err := c.Next(ctx, actor)
		return n > 1, err
	})
	farms, err := api.List[identity.FarmID, ledger.Farm](ctx, c, ledger.FarmsKey, ledger.FarmKey)
	if err != nil || len(farms) != 1 || farms[0].Name != "good" {
		t.Errorf("farms: %+v %v", farms, err)
	}
	if n, err := c.Next(ctx, actor); err != nil || n != 2 {
		t.Errorf("the next nonce is %d, %v", n, err)
	}
}

// liar stands before a validator with that validator's own certificate: it is a validator that turned bad. It passes
// requests on, and may change answers or make them up.
type liar struct {
	addr string
	mu   sync.Mutex
	lie  func(path string, answer []byte) []byte // nil tells the truth
	fake map[string][]byte                       // path → answer of requests that are not passed on
}

func newLiar(g *apitest.Grid, cert tls.Certificate) *liar {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		g.T.Fatal(err)
	}
	l := &liar{addr: ln.Addr().String(), fake: map[string][]byte{}}
	up := raw(g)
	var only http.Protocols
	only.SetHTTP2(true)
	srv := &http.Server{
		Protocols: &only, ErrorLog: log.New(io.Discard, "", 0), TLSConfig: &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}},
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			l.mu.Lock()
			lie, fake := l.lie, l.fake[r.URL.Path]
			l.mu.Unlock()
			if fake != nil {
				w.Write(fake)
				return
			}
			req, _ := http.NewRequestWithContext(r.Context(), r.Method, "https://"+g.Addr()+r.URL.RequestURI(), r.Body)
			req.ContentLength = r.ContentLength
			resp, err := up.Do(req)
			if err != nil {
				w.WriteHeader(http.StatusBadGateway)
				return
			}
			defer resp.Body.Close()
			b, _ := io.ReadAll(resp.Body)
			if lie != nil && resp.StatusCode == http.StatusOK {
				b = lie(r.URL.Path, b)
			}
			w.WriteHeader(resp.StatusCode)
			w.Write(b)
		}),
	}
	done := make(chan struct{})
	go func() { defer close(done); srv.ServeTLS(ln, "", "") }()
	g.T.Cleanup(func() { srv.Close(); <-done })
	return l
}

func (l *liar) set(f func(path string, answer []byte) []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lie = f
}

func (l *liar) client(g *apitest.Grid) *api.Client {
	return g.Client(func(c *api.ClientConfig) {
		c.Dial = func(ctx context.Context, _ *ledger.Validator) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "tcp", l.addr)
		}
	})
}

// The answer to a read, as docs/formats/ledger-api.md has it.
type (
	readAnswer struct {
		Head    readHead    `cbor:"1,keyasint"`
		Entries []readEntry `cbor:"2,keyasint"`
	}
	readHead struct {
		Signed     []byte `cbor:"1,keyasint"`
		Validators []byte `cbor:"2,keyasint"`
	}
	readEntry struct {
		Present bool   `cbor:"1,keyasint"`
		Value   []byte `cbor:"2,keyasint"`
		Proof   []byte `cbor:"3,keyasint"`
	}
)

func reads(t *testing.T, f func(*readAnswer)) func(string, []byte) []byte {
	return func(path string, answer []byte) []byte {
		if path != "/v1/read" {
			return answer
		}
		var a readAnswer
		if err := canonical.Decode(answer, 1<<20, &a); err != nil {
			t.Error(err)
		}
		f(&a)
		return canonical.Encode(a)
	}
}

func TestClientRefusesLies(t *testing.T) {
	g := apitest.Start(t, nil)
	honest, ctx := g.Client(nil), g.Context()
	keys := apitest.Key(7)
	account := g.Account(honest, keys)
	mine, theirs := ledger.AccountKey(account), ledger.AccountKey(g.Genesis.GridAccount())
	l := newLiar(g, g.Cert)

	// The control: through the same machine, when it tells the truth.
	c := l.client(g)
	rec, err := api.Get[identity.Account](ctx, c, mine)
	if err != nil || rec.ID != account {
		t.Fatalf("through an honest machine: %v %v", rec, err)
	}
	if _, err := api.Get[identity.Account](ctx, c, ledger.AccountKey(identity.AccountID{9})); !errors.Is(err, ledger.ErrAbsent) {
		t.Fatalf("an account that is not there, through an honest machine: %v", err)
	}
	evil := apitest.Key(66)
	for name, lie := range map[string]func(*readAnswer){
		"another device in the account": func(a *readAnswer) {
			x, err := ledger.Decode[identity.Account](a.Entries[0].Value)
			if err != nil {
				t.Error(err)
				return
			}
			x.Devices[0].Key = evil.DeviceKey().Public()
			a.Entries[0].Value = canonical.Encode(x)
		},
		"that it is not there":    func(a *readAnswer) { a.Entries[0] = readEntry{Proof: a.Entries[0].Proof} },
		"no proof":                func(a *readAnswer) { a.Entries[0].Proof = nil },
		"another record's answer": func(a *readAnswer) { a.Entries[0] = a.Entries[1] },
		"fewer answers":           func(a *readAnswer) { a.Entries = a.Entries[:1] },
		"a header of its own": func(a *readAnswer) {
			at := bytes.Index(a.Head.Signed, []byte(c.Grid().String()[:comet.MaxChain]))
			a.Head.Signed[at+comet.MaxChain+10] ^= 1
		},
		"validators of its own": func(a *readAnswer) { a.Head.Validators = random(100) },
	} {
		l.set(reads(t, lie))
		for _, c := range []*api.Client{c, l.client(g)} { // one that has seen the truth, and one that has not
			if v, err := c.Read(ctx, mine, theirs); err == nil {
				t.Errorf("the client believes %s: %v", name, v)
			} else if !errors.Is(err, comet.ErrProof) && !errors.Is(err, comet.ErrFork) {
				t.Errorf("%s: %v, which does not say that the answer is not proven", name, err)
			}
		}
	}
	l.set(nil)
	if _, err := c.Read(ctx, mine); err != nil {
		t.Errorf("the truth again: %v", err)
	}

	// It says that a transaction is in a block, and threw it away.
	l.mu.Lock()
	l.fake["/v1/tx"] = canonical.Encode(struct {
		Height int64  `cbor:"1,keyasint"`
		Code   uint32 `cbor:"2,keyasint"`
		Log    string `cbor:"3,keyasint"`
	}{Height: 1})
	l.mu.Unlock()
	_, err = c.Act(ctx, ledger.KindFarmAdmit, ledger.Actor{ID: g.Genesis.GridAccount()}, &ledger.FarmAdmit{Name: "gone", Owner: g.Genesis.GridAccount()}, g.Admin.DeviceKey())
	if err == nil || !strings.Contains(err.Error(), "it is not on the ledger") {
		t.Errorf("a transaction that was thrown away: %v", err)
	}

	// Reports and blobs are not on the ledger, but bound to it.
	n := g.Node(honest, "node-1", 20)
	if err := honest.Heartbeat(ctx, n.Heartbeat(ledger.Report{Workload: contract.WorkloadID{1}, State: ledger.StateFailed}).Encode()); err != nil {
		t.Fatal(err)
	}
	nodes, err := honest.Nodes(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if all, err := c.Reports(ctx, nodes); err != nil || len(all) != 1 {
		t.Fatalf("reports through an honest machine: %v %v", all, err)
	}
	data := random(1000)
	if err := honest.PutBlob(ctx, digest(data), int64(len(data)), bytes.NewReader(data), account, keys.DeviceKey()); err != nil {
		t.Fatal(err)
	}
	l.set(func(path string, answer []byte) []byte {
		if path == "/v1/reports" {
			return bytes.Replace(answer, []byte(ledger.StateFailed), []byte("runnin"), 1)
		}
		answer[len(answer)/2] ^= 1
		return answer
	})
	if all, err := c.Reports(ctx, nodes); err != nil || len(all) != 0 {
		t.Errorf("a report that was changed counts: %+v %v", all, err)
	}
	r, _, err := c.OpenBlob(ctx, digest(data))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(r); !errors.Is(err, store.ErrDigest) {
		t.Errorf("a blob that was changed: %v", err)
	}
	r.Close()

	// A stranger, without the validator's key, gets no request at all.
	cert, err := comet.LoadCertificate(filepath.Join(t.TempDir(), "stranger.pem"), "holdfast validator")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := newLiar(g, cert).client(g).Read(ctx, mine); err == nil || !strings.Contains(err.Error(), "not the pinned one") {
		t.Errorf("a server with another key: %v", err)
	}
}
