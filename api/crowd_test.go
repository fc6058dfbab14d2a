package api_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"holdfast/access"
	"holdfast/api"
	"holdfast/api/apitest"
	"holdfast/identity"
	"holdfast/ledger"
	"holdfast/ledger/comet"
)

// A stranger opens more connections than the ledger has places for and says nothing on them. A node that shows the
// certificate which the ledger names keeps its connection, and its heartbeats arrive.
func TestStrangersDoNotLockANodeOut(t *testing.T) {
	g := apitest.Start(t, nil)
	c, ctx := g.Client(nil), g.Context()
	n := g.Node(c, "node-1", 20)
	dials := map[string]*atomic.Int32{"the node": new(atomic.Int32), "a stranger": new(atomic.Int32)}
	member := func(name string, cert *tls.Certificate) *api.Client {
		m := g.Client(func(c *api.ClientConfig) {
			c.Certificate = cert
			c.Dial = func(ctx context.Context, v *ledger.Validator) (net.Conn, error) {
				dials[name].Add(1)
				return (&net.Dialer{}).DialContext(ctx, "tcp", v.Address)
			}
		})
		if _, err := m.Nodes(ctx); err != nil {
			t.Fatal(err)
		}
		return m
	}
	node, stranger := member("the node", &n.TLS), member("a stranger", nil)
	const crowd = 1100
	var mu sync.Mutex
	var held []net.Conn
	defer func() {
		for _, c := range held {
			c.Close()
		}
	}()
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range crowd / 4 {
				raw, err := tls.Dial("tcp", g.Addr(), &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
				if err != nil {
					continue
				}
				// The preface and empty settings: from here on it is an idle connection of HTTP/2.
				raw.Write([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"))
				mu.Lock()
				held = append(held, raw)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if len(held) < crowd*9/10 {
		t.Fatalf("control: only %d of %d connections were let in", len(held), crowd)
	}
	if err := node.Heartbeat(ctx, n.Heartbeat().Encode()); err != nil {
		t.Errorf("the node's heartbeat: %v", err)
	}
	for name, c := range map[string]*api.Client{"the node": node, "a stranger": stranger, "a newcomer": g.Client(nil)} {
		if _, err := c.Nodes(ctx); err != nil {
			t.Errorf("%s is locked out: %v", name, err)
		}
	}
	if n := dials["the node"].Load(); n != 1 {
		t.Errorf("the node had to connect %d times", n)
	}
	if n := dials["a stranger"].Load(); n < 2 {
		t.Error("control: the crowd took nobody's place")
	}
}

func TestQuotaIsTold(t *testing.T) {
	g := apitest.Start(t, func(c *api.ValidatorConfig) { c.Quota = api.Quota{AccountBytes: 1000, Bytes: 1600} })
	c, ctx := g.Client(nil), g.Context()
	put := func(k *identity.KeyFile, account identity.AccountID, n int) error {
		data := random(n)
		return c.PutBlob(ctx, digest(data), int64(n), bytes.NewReader(data), account, k.DeviceKey())
	}
	keys, others := apitest.Key(7), apitest.Key(8)
	account, other := g.Account(c, keys), g.Account(c, others)
	if err := put(keys, account, 900); err != nil {
		t.Fatal(err)
	}
	for name, x := range map[string]struct {
		err  error
		want string
	}{
		"the account's": {put(keys, account, 200), "the account stores 900 bytes in 1 blobs, and at most 1000"},
		"the store's":   {put(others, other, 700), "the grid's store is full: it keeps 900 bytes in 1 blobs, and at most 1500"},
	} {
		if x.err == nil || !strings.Contains(x.err.Error(), "507") || !strings.Contains(x.err.Error(), x.want) || errors.Is(x.err, comet.ErrUnavailable) {
			t.Errorf("%s quota: %v", name, x.err)
		}
	}
	// Nobody says how many bytes come.
	data := random(200)
	req := put2(g, data)
	access.Sign(req, g.Genesis.Validators[0].TLS, account, keys.DeviceKey(), time.Now())
	resp, err := raw(g).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	if resp.Body.Close(); resp.StatusCode != http.StatusInsufficientStorage {
		t.Errorf("without a length: %s", resp.Status)
	}
	if err := put(g.Admin, g.Genesis.GridAccount(), 700); err != nil {
		t.Errorf("control: the grid's own account: %v", err)
	}
}

func put2(g *apitest.Grid, data []byte) *http.Request {
	return put(g, digest(data), io.MultiReader(bytes.NewReader(data)), -1)
}

// ear is a validator that only hears heartbeats.
type ear struct {
	addr  string
	cert  tls.Certificate
	heard chan []byte
	deaf  atomic.Value // what it does instead: "refuse", "hang"
}

func newEar(t *testing.T, name string) *ear {
	t.Helper()
	cert, err := comet.LoadCertificate(filepath.Join(t.TempDir(), "tls.pem"), name)
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	e := &ear{addr: ln.Addr().String(), cert: cert, heard: make(chan []byte, 64)}
	e.deaf.Store("")
	var only http.Protocols
	only.SetHTTP2(true)
	srv := &http.Server{
		Protocols: &only, ErrorLog: log.New(io.Discard, "", 0), TLSConfig: &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}},
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			b, _ := io.ReadAll(r.Body)
			switch e.deaf.Load() {
			case "refuse":
				http.Error(w, "no", http.StatusForbidden)
				return
			case "hang":
				<-r.Context().Done()
				return
			}
			e.heard <- b
			w.WriteHeader(http.StatusNoContent)
		}),
	}
	done := make(chan struct{})
	go func() { defer close(done); srv.ServeTLS(ln, "", "") }()
	t.Cleanup(func() { srv.Close(); <-done })
	return e
}

// A node counts by the newest set who has heard it: by an older one it could be dead for those who decide.
func TestHeartbeatsGoByTheSetOfNow(t *testing.T) {
	g := apitest.Start(t, nil)
	admin, ctx := g.Client(nil), g.Context()
	n := g.Node(admin, "node-1", 20)
	lags := g.Client(nil)
	if err := lags.Heartbeat(ctx, n.Heartbeat().Encode()); err != nil {
		t.Fatal(err)
	}
	home := filepath.Join(t.TempDir(), "second")
	keys, err := comet.MakeKeys(home)
	if err != nil {
		t.Fatal(err)
	}
	join := &ledger.ValidatorJoin{Validator: ledger.Validator{Name: "second", Key: keys.Public, Power: 1, TLS: [32]byte{5}, Address: "127.0.0.1:1"}}
	if join.Proof, err = comet.Prove(home, ledger.JoinBytes(admin.Grid(), &join.Validator)); err != nil {
		t.Fatal(err)
	}
	if _, err := admin.Act(ctx, ledger.KindValidatorJoin, ledger.Actor{ID: g.Genesis.GridAccount()}, join, g.Admin.DeviceKey()); err != nil {
		t.Fatal(err)
	}
	if err := lags.Heartbeat(ctx, n.Heartbeat().Encode()); err == nil || !strings.Contains(err.Error(), "its set of validators is of height") {
		t.Errorf("by the set of the genesis: %v", err)
	}
	// It has learned of the new one by that, and the one of power 10 of 11 is enough.
	if err := lags.Heartbeat(ctx, n.Heartbeat().Encode()); err != nil {
		t.Errorf("by the set of now: %v", err)
	}
	if set, err := lags.Validators(ctx); err != nil || len(set.Members) != 2 || set.Members[1].Name != "second" {
		t.Errorf("validators are %+v, %v", set, err)
	}
	if _, err := admin.Act(ctx, ledger.KindValidatorLeave, ledger.Actor{ID: g.Genesis.GridAccount()}, &ledger.ValidatorLeave{Validator: join.Validator.ID()}, g.Admin.DeviceKey()); err != nil {
		t.Fatal(err)
	}
	if set, err := lags.Validators(ctx); err != nil || len(set.Members) != 1 {
		t.Errorf("validators are %+v, %v", set, err)
	}
}

func TestHeartbeatsGoToAllValidators(t *testing.T) {
	g := &ledger.Genesis{Version: 1, Name: "test", Time: time.Now().Unix(), Policy: identity.SingleDevice(), Lease: 5 * time.Second, Margin: time.Second}
	var ears []*ear
	for i := range 4 {
		e := newEar(t, fmt.Sprint("v", i))
		keys, err := comet.MakeKeys(filepath.Join(t.TempDir(), "v"))
		if err != nil {
			t.Fatal(err)
		}
		pin, err := comet.PinOf(e.cert)
		if err != nil {
			t.Fatal(err)
		}
		ears = append(ears, e)
		g.Validators = append(g.Validators, ledger.Validator{Name: fmt.Sprint("v", i), Key: keys.Public, Power: 10, TLS: pin, Address: e.addr})
	}
	// client reaches the validators that are late only when the gate is open.
	client := func(deaf [4]string, gate <-chan struct{}, power ...int64) *api.Client {
		h := *g
		h.Validators = slices.Clone(g.Validators)
		for i, p := range power {
			h.Validators[i].Power = p
		}
		c, err := api.NewClient(api.ClientConfig{Genesis: &h, Dial: func(ctx context.Context, v *ledger.Validator) (net.Conn, error) {
			if i := slices.IndexFunc(ears, func(e *ear) bool { return e.addr == v.Address }); deaf[i] == "late" {
				select {
				case <-gate:
				case <-ctx.Done():
					return nil, ctx.Err()
				}
			}
			return (&net.Dialer{}).DialContext(ctx, "tcp", v.Address)
		}})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(c.Close)
		return c
	}
	for i, x := range []struct {
		name  string
		deaf  [4]string
		power []int64
		err   string
	}{
		{"all hear", [4]string{}, nil, ""},
		{"one refuses", [4]string{"refuse"}, nil, ""},
		{"one hangs", [4]string{"", "", "hang"}, nil, ""},
		{"one is far away", [4]string{"", "late"}, nil, ""},
		{"two refuse", [4]string{"refuse", "", "refuse"}, nil, "heard by 20 of 40 of the power"},
		{"two hang", [4]string{"", "hang", "hang"}, nil, "heard by 20 of 40 of the power"},
		{"three of little power refuse", [4]string{"refuse", "refuse", "refuse"}, []int64{2, 2, 1, 10}, ""},
		{"the one of great power refuses", [4]string{"", "", "", "refuse"}, []int64{2, 2, 2, 10}, "heard by 6 of 16 of the power"},
	} {
		for j, e := range ears {
			e.deaf.Store(x.deaf[j])
		}
		gate := make(chan struct{})
		c := client(x.deaf, gate, x.power...)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		if x.err == "" {
			cancel()
			ctx, cancel = context.WithTimeout(t.Context(), 20*time.Second)
		}
		beat := fmt.Appendf(nil, "beat %d", i)
		err := c.Heartbeat(ctx, beat)
		cancel()
		close(gate)
		if (err == nil) != (x.err == "") || err != nil && !strings.Contains(err.Error(), x.err) {
			t.Errorf("%s: %v", x.name, err)
		}
		for j, e := range ears {
			if x.deaf[j] != "" && x.deaf[j] != "late" {
				continue
			}
			for heard := false; !heard; {
				select { // also those that were not waited for
				case b := <-e.heard:
					heard = bytes.Equal(b, beat) // or an earlier one, which came when it was to refuse, and was looked at later
				case <-time.After(10 * time.Second):
					t.Fatalf("%s: validator %d heard nothing", x.name, j)
				}
			}
		}
		closed := make(chan struct{})
		go func() { defer close(closed); c.Close() }()
		select {
		case <-closed:
		case <-time.After(3 * time.Second):
			t.Errorf("%s: heartbeats outlive their client", x.name)
		}
	}
}

// sparse is a ledger that answers few keys at once.
type sparse struct {
	api.Reader
	most  int
	asked []int
}

func (s *sparse) Read(ctx context.Context, keys ...string) (comet.View, error) {
	s.asked = append(s.asked, len(keys))
	if len(keys) > s.most {
		return comet.View{}, fmt.Errorf("read ledger: %w", comet.ErrTooLarge)
	}
	return s.Reader.Read(ctx, keys...)
}

func TestManyLargeRecordsAreAskedForInParts(t *testing.T) {
	g := apitest.Start(t, nil)
	c := g.Client(nil)
	id := g.Account(c, apitest.Key(7))
	keys := make([]string, 70)
	for i := range keys {
		keys[i] = ledger.AccountKey(identity.AccountID{byte(i)})
	}
	keys[5], keys[66] = ledger.AccountKey(id), ledger.AccountKey(id)
	for most, want := range map[int]bool{64: true, 10: true, 1: true, 0: false} {
		s := &sparse{Reader: c, most: most}
		all, err := api.GetAll[identity.Account](g.Context(), s, keys)
		if (err == nil) != want || !want && !errors.Is(err, comet.ErrTooLarge) {
			t.Errorf("at most %d: %v", most, err)
			continue
		}
		for i, a := range all {
			if (a != nil) != (i == 5 || i == 66) {
				t.Errorf("at most %d: record %d is %v", most, i, a)
			}
		}
		if want && len(all) != len(keys) {
			t.Errorf("at most %d: %d records", most, len(all))
		}
	}
}
