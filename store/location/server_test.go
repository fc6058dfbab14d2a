package location

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	mrand "math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/disperse"
)

func oneStore(t testing.TB) *serving {
	return serve(t, ServerConfig{Path: t.TempDir(), Scrub: -1, Stores: []Store{
		{Name: "a", Keys: []Key{keyOf(Seed{1}, everything), keyOf(Seed{2}, Read)}},
		{Name: "b", Keys: []Key{keyOf(Seed{3}, everything)}},
	}})
}

// TestStrangersGetNothing plays whoever has no pinned key, and one who has another store's.
func TestStrangersGetNothing(t *testing.T) {
	s := oneStore(t)
	owner := announced(t, s.client(t, Seed{1}), 1)
	n, b := shardOf(t, 1000)
	good(t, "control: put", owner.Put(t.Context(), n, b, time.Time{}))
	has(t, owner, n, b)

	// Each says hello, sends a get for a shard that is there and a put of one that is not, and reads what comes.
	m, c := shardOf(t, 500)
	ask := func(change func(*tls.Config)) ([]byte, error) {
		raw, err := net.Dial("tcp", s.addr)
		if err != nil {
			return nil, err
		}
		defer raw.Close()
		raw.SetDeadline(time.Now().Add(5 * time.Second))
		cfg := tlsConfig(certOf(t, Seed{1}), func(Pin) bool { return true })
		change(cfg)
		x := tls.Client(raw, cfg)
		if err := x.Handshake(); err != nil {
			return nil, err
		}
		p := make([]byte, requestSize)
		(&request{op: opPut, name: m, size: uint32(len(c)), front: front{1, Holder{1}}}).put(p)
		x.Write(append(p, c...))
		(&request{op: opGet, name: n, b: 1000}).put(p)
		x.Write(p)
		got := make([]byte, frameSize+frameSize+1000)
		k, err := io.ReadFull(x, got)
		return got[:k], err
	}
	if got, err := ask(func(*tls.Config) {}); err != nil || !bytes.Equal(got[2*frameSize:], b) {
		t.Fatalf("control: the owner reads %d bytes, %v", len(got), err)
	}
	good(t, "control: and wrote", owner.Delete(t.Context(), m))
	good(t, "control: purge", owner.Purge(t.Context(), m))
	for name, change := range map[string]func(*tls.Config){
		"no certificate":             func(c *tls.Config) { c.Certificates = nil },
		"another key":                func(c *tls.Config) { c.Certificates = []tls.Certificate{certOf(t, Seed{77})} },
		"the location's certificate": func(c *tls.Config) { c.Certificates = []tls.Certificate{certOf(t, Seed{9})} },
		"a pinned certificate without its key": func(c *tls.Config) {
			c.Certificates = []tls.Certificate{{Certificate: certOf(t, Seed{1}).Certificate, PrivateKey: certOf(t, Seed{77}).PrivateKey}}
		},
		"TLS 1.2":          func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 },
		"X25519 alone":     func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.X25519} },
		"another protocol": func(c *tls.Config) { c.NextProtos, c.VerifyConnection = []string{"h2"}, nil },
		"no protocol":      func(c *tls.Config) { c.NextProtos, c.VerifyConnection = nil, nil },
	} {
		if got, err := ask(change); err == nil || len(got) > 0 {
			t.Errorf("%s: %d bytes came, %v", name, len(got), err)
		}
	}
	wants(t, "what strangers put", owner.Get(t.Context(), m, 0, nil), ErrAbsent)

	other := announced(t, s.client(t, Seed{3}), 1)
	wants(t, "another store's key reads", other.Get(t.Context(), n, 0, make([]byte, 1)), ErrAbsent)
	wants(t, "another store's key deletes", other.Delete(t.Context(), n), ErrAbsent)
	good(t, "another store fences its own", other.Announce(t.Context(), 9, Holder{9}))
	if got := list(t, other, Live); len(got) > 0 {
		t.Errorf("another store sees %v", got)
	}
	reader := s.client(t, Seed{2})
	has(t, reader, n, b)
	wants(t, "a reader announces", reader.Announce(t.Context(), 5, Holder{}), ErrRights)
	reader.front.Store(&front{1, Holder{1}})
	wants(t, "a reader writes", reader.Put(t.Context(), m, c, time.Time{}), ErrRights)
	wants(t, "a reader deletes", reader.Delete(t.Context(), n), ErrRights)
	good(t, "control: the owner goes on", owner.Put(t.Context(), m, c, time.Time{}))
}

// TestAClientTalksToItsLocationAlone has another key answer at the address.
func TestAClientTalksToItsLocationAlone(t *testing.T) {
	s := oneStore(t)
	c, err := NewClient(ClientConfig{Addr: s.addr, Pin: Pin{1}, Certificate: certOf(t, Seed{1})})
	good(t, "client", err)
	defer c.Close()
	if _, err := c.Status(t.Context()); err == nil || !strings.Contains(err.Error(), "not pinned") {
		t.Errorf("status: %v", err)
	}
	if _, err := s.client(t, Seed{1}).Status(t.Context()); err != nil {
		t.Errorf("control: %v", err)
	}
}

// A stranger's handshake fails by his key: he is told so by TLS, before a request of his is read. So does that of one who says
// another protocol, or has no certificate.
func TestAStrangersHandshakeFails(t *testing.T) {
	s := oneStore(t)
	for _, c := range []struct {
		name   string
		change func(*tls.Config)
		fails  bool
	}{
		{"control: the owner", func(*tls.Config) {}, false},
		{"a key that is not pinned", func(c *tls.Config) { c.Certificates = []tls.Certificate{certOf(t, Seed{66})} }, true},
		{"no certificate", func(c *tls.Config) { c.Certificates = nil }, true},
		{"another protocol", func(c *tls.Config) { c.NextProtos = []string{"h2"} }, true},
		{"no protocol", func(c *tls.Config) { c.NextProtos = nil }, true},
		{"a key exchange that a quantum computer breaks", func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.X25519} }, true},
		{"TLS 1.2", func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 }, true},
	} {
		cfg := tlsConfig(certOf(t, Seed{1}), func(p Pin) bool { return p == s.pin })
		cfg.VerifyConnection = nil // it takes the location for what it is
		c.change(cfg)
		conn, err := tls.Dial("tcp", s.addr, cfg)
		if err == nil {
			conn.SetDeadline(time.Now().Add(10 * time.Second))
			p := make([]byte, requestSize)
			(&request{op: opStatus}).put(p)
			conn.Write(p)
			_, err = io.ReadFull(conn, make([]byte, frameSize))
			conn.Close()
		}
		if c.fails && (err == nil || !strings.Contains(err.Error(), "tls: ")) {
			t.Errorf("%s: %v, not an alert", c.name, err)
		} else if !c.fails && err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

// One store's challenges do not take the places of another's.
func TestChallengesOfOneStoreDoNotHoldUpAnother(t *testing.T) {
	s := oneStore(t)
	a, other := announced(t, s.client(t, Seed{1}), 1), announced(t, s.client(t, Seed{3}), 1)
	n, b := shardOf(t, 5000)
	good(t, "put", a.Put(t.Context(), n, b, time.Time{}))
	good(t, "put", other.Put(t.Context(), n, b, time.Time{}))
	_, err := a.Prove(t.Context(), n, []int{0})
	good(t, "control: a challenge", err)
	s.mu.Lock()
	mine := s.clients[keyOf(Seed{1}, 0).Pin].store
	d := s.stores[mine].dir
	s.mu.Unlock()
	for range cap(d.proofs) {
		d.proofs <- struct{}{}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := a.Prove(ctx, n, []int{0}); err == nil {
		t.Error("control: the store's own places are taken")
	}
	_, err = other.Prove(t.Context(), n, []int{0})
	good(t, "another store's challenge", err)
	for range cap(d.proofs) {
		<-d.proofs
	}
}

// raw is a connection with a pinned key that does not keep to the client's ways.
func (s *serving) raw(t testing.TB, seed Seed) *tls.Conn {
	t.Helper()
	c, err := tls.Dial("tcp", s.addr, tlsConfig(certOf(t, seed), func(Pin) bool { return true }))
	good(t, "dial", err)
	t.Cleanup(func() { c.NetConn().Close() })
	c.SetDeadline(time.Now().Add(10 * time.Second))
	return c
}

// TestTruncatedUploads break off at every kind of place; nothing is kept, counted or left.
func TestTruncatedUploads(t *testing.T) {
	s := oneStore(t)
	owner := announced(t, s.client(t, Seed{1}), 1)
	d := s.stores["a"].dir
	for _, size := range []int{1000, 300 << 10} {
		n, b := shardOf(t, size)
		for _, cut := range []int{0, 10, requestSize, requestSize + 1, requestSize + size/2, requestSize + size - 1} {
			c := s.raw(t, Seed{1})
			p := make([]byte, requestSize)
			(&request{op: opPut, name: n, size: uint32(size), front: front{1, Holder{1}}}).put(p)
			c.Write(append(p, b...)[:cut])
			c.NetConn().Close()
		}
		for end := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			d.mu.Lock()
			pending := d.pending
			d.mu.Unlock()
			if files := filesOf(t, d); pending == (Quota{}) && len(files) == 0 {
				break
			} else if time.Now().After(end) {
				t.Fatalf("pending %+v, files %v", pending, files)
			}
		}
		wants(t, "get", owner.Get(t.Context(), n, 0, nil), ErrAbsent)
		good(t, "control: the whole", owner.Put(t.Context(), n, b, time.Time{}))
		good(t, "delete", owner.Delete(t.Context(), n))
		good(t, "purge", owner.Purge(t.Context(), n))
	}
}

// TestWhatTheProtocolDoesNotSayEndsTheConnection: and no memory is taken for what a header claims.
func TestWhatTheProtocolDoesNotSayEndsTheConnection(t *testing.T) {
	s := oneStore(t)
	for name, change := range map[string]func(p []byte){
		"operation 0":            func(p []byte) { p[0] = 0 },
		"operation 99":           func(p []byte) { p[0] = 99 },
		"bytes that are to be 0": func(p []byte) { p[2] = 1 },
		"a body of 4 GiB":        func(p []byte) { binary.BigEndian.PutUint32(p[4:], 1<<32-1) },
		"a get with a body":      func(p []byte) { p[0] = byte(opGet); binary.BigEndian.PutUint32(p[4:], 1) },
		"a head that is too large": func(p []byte) {
			p[0] = byte(opPutHead)
			binary.BigEndian.PutUint32(p[4:], MaxHead+1)
		},
	} {
		c := s.raw(t, Seed{1})
		p := make([]byte, requestSize)
		(&request{op: opPut}).put(p)
		change(p)
		c.Write(p)
		if k, err := c.Read(make([]byte, 1)); k > 0 || err == nil {
			t.Errorf("%s: an answer came", name)
		}
	}
}

// TestCrowds: silent connections of strangers do not keep a front end out, nor do a key's own old connections.
func TestCrowds(t *testing.T) {
	s := oneStore(t)
	for range 3 * maxHandshakes {
		c, err := net.Dial("tcp", s.addr)
		good(t, "dial", err)
		defer c.Close()
	}
	owner := announced(t, s.client(t, Seed{1}), 1)
	for range 100 {
		good(t, "key's own", func() error { _, err := owner.Status(t.Context()); return err }())
	}
	s.mu.Lock()
	greeting := len(s.hello)
	s.mu.Unlock()
	if greeting > maxHandshakes {
		t.Errorf("%d handshakes at once", greeting)
	}
	for range 2 * s.cfg.Conns {
		s.raw(t, Seed{1})
	}
	n, b := shardOf(t, 1000)
	good(t, "put beside idle ones", owner.Put(t.Context(), n, b, time.Time{}))
	good(t, "another store", func() error { _, err := s.client(t, Seed{3}).Status(t.Context()); return err }())
	s.mu.Lock()
	conns := len(s.clients[keyOf(Seed{1}, 0).Pin].conns)
	s.mu.Unlock()
	if conns > s.cfg.Conns {
		t.Errorf("%d connections of one key", conns)
	}
}

// TestSlowClients hold only their own connection: one that sends a byte at a time, and one that takes nothing.
func TestSlowClients(t *testing.T) {
	s := oneStore(t)
	owner := announced(t, s.client(t, Seed{1}), 1)
	big, b := shardOf(t, 8<<20)
	good(t, "put", owner.Put(t.Context(), big, b, time.Time{}))
	for range 16 {
		c := s.raw(t, Seed{1})
		p := make([]byte, requestSize)
		(&request{op: opGet, name: big, b: 8 << 20}).put(p)
		c.Write(p) // and reads nothing
		c = s.raw(t, Seed{1})
		(&request{op: opPut, name: Name{1}, size: 1 << 20, front: front{1, Holder{1}}}).put(p)
		c.Write(p)
		c.Write([]byte{1})
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	n, c := shardOf(t, 300<<10)
	good(t, "put", owner.Put(ctx, n, c, time.Time{}))
	has(t, owner, n, c)
	if d := deadlineFor(MaxShard); d > 3*time.Minute || d < time.Minute {
		t.Errorf("the largest shard may take %v", d)
	}
}

// TestDeadlineEndsSlowClients is the other half, with the time that a small request has.
func TestDeadlineEndsSlowClients(t *testing.T) {
	if testing.Short() {
		t.Skip("takes the time that a transfer has")
	}
	s := oneStore(t)
	announced(t, s.client(t, Seed{1}), 1)
	c := s.raw(t, Seed{1})
	p := make([]byte, requestSize)
	(&request{op: opPut, name: Name{1}, size: 1000, front: front{1, Holder{1}}}).put(p)
	c.Write(append(p, 1))
	begin := time.Now()
	c.SetDeadline(begin.Add(transferTime + 5*time.Second))
	_, err := c.Read(make([]byte, 1))
	if took := time.Since(begin); !errors.Is(err, io.EOF) && !strings.Contains(fmt.Sprint(err), "reset") || took < transferTime/2 {
		t.Errorf("after %v: %v", took, err)
	}
}

// liar keeps only the first half of each shard, and answers audits from what it kept.
type liar struct {
	Location
	kept   map[Name][]byte
	proofs map[Name]Proof // of all leaves, made when the shard came
}

func (l *liar) Put(ctx context.Context, n Name, b []byte, _ time.Time) error {
	l.kept[n] = b[:len(b)/2]
	return nil
}

func (l *liar) Prove(_ context.Context, n Name, leaves []int) (p Proof, err error) {
	all := l.proofs[n]
	p.Size = all.Size
	for _, i := range leaves {
		data := make([]byte, min(disperse.LeafSize, p.Size-int64(i)*disperse.LeafSize))
		if off := i * disperse.LeafSize; off < len(l.kept[n]) {
			copy(data, l.kept[n][off:])
		}
		p.Leaves = append(p.Leaves, Leaf{data, all.Leaves[i].Path}) // every path is kept
	}
	return p, nil
}

// TestALiarIsFoundByAudits: a location that kept half of a shard, and all hashes, passes 20 leaves once in a million.
func TestALiarIsFoundByAudits(t *testing.T) {
	const size = 100 << 10
	n, b := shardOf(t, size)
	honest := announced(t, inProcess(t, nil).as(everything), 1)
	good(t, "put", honest.Put(t.Context(), n, b, time.Time{}))
	var all []int
	for i := range disperse.Leaves(size) {
		all = append(all, i)
	}
	p, err := honest.Prove(t.Context(), n, all)
	good(t, "prove", err)
	l := &liar{kept: map[Name][]byte{}, proofs: map[Name]Proof{n: p}}
	l.Put(t.Context(), n, b, time.Time{})
	audit := func(x Location, count int) error {
		var leaves []int
		for range count {
			leaves = append(leaves, mrand.IntN(disperse.Leaves(size)))
		}
		p, err := x.Prove(t.Context(), n, leaves)
		if err != nil {
			return err
		}
		return p.Check(n, size, leaves)
	}
	passed := 0
	for range 200 {
		good(t, "control: an honest location", audit(honest, 20))
		if err := audit(l, 20); err == nil {
			passed++
		} else {
			wants(t, "liar", err, disperse.ErrProof)
		}
	}
	if passed > 1 {
		t.Errorf("the liar passed %d audits of 200", passed)
	}
	if p, _ := l.Prove(t.Context(), n, []int{0}); p.Check(n, size, []int{0}) != nil {
		t.Error("control: the liar does not even answer what it kept")
	}
}

// TestTheEndLeavesNothing counts goroutines after servers and clients that were ended at work.
func TestTheEndLeavesNothing(t *testing.T) {
	before := runtime.NumGoroutine()
	for range 3 {
		s := serve(t, ServerConfig{Path: t.TempDir(), Stores: []Store{{Name: "a", Keys: []Key{keyOf(Seed{1}, everything)}}}})
		c := s.client(t, Seed{1})
		announced(t, c, 1)
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				for ctx.Err() == nil {
					n, b := shardOf(t, 100<<10)
					if c.Put(ctx, n, b, time.Time{}) != nil {
						return
					}
				}
			})
		}
		time.Sleep(100 * time.Millisecond)
		begin := time.Now()
		good(t, "stop", s.stop())
		if took := time.Since(begin); took > graceTime {
			t.Errorf("the end took %v", took)
		}
		cancel()
		wg.Wait()
		c.Close()
	}
	for end := time.Now().Add(5 * time.Second); runtime.NumGoroutine() > before; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			buf := make([]byte, 1<<20)
			t.Fatalf("%d goroutines, before %d:\n%s", runtime.NumGoroutine(), before, buf[:runtime.Stack(buf, true)])
		}
	}
}

// TestACancelledRequestEnds at once, and its connection is not used again for another's answer.
func TestACancelledRequestEnds(t *testing.T) {
	s := oneStore(t)
	c := s.client(t, Seed{1})
	announced(t, c, 1)
	var names []Name
	data := map[Name][]byte{}
	for range 4 {
		n, b := shardOf(t, 1<<20)
		good(t, "put", c.Put(t.Context(), n, b, time.Time{}))
		names, data[n] = append(names, n), b
	}
	for i := range 200 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(mrand.IntN(3000))*time.Microsecond)
		n := names[i%4]
		p := make([]byte, 1<<20)
		if err := c.Get(ctx, n, 0, p); err == nil && !bytes.Equal(p, data[n]) {
			t.Fatal("another's bytes")
		} else if err != nil && !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("get: %v", err)
		}
		cancel()
	}
	for n, b := range data {
		has(t, c, n, b)
	}
}

// TestAClientSurvivesARestart: connections that the location has closed meanwhile are no error.
func TestAClientSurvivesARestart(t *testing.T) {
	root := t.TempDir()
	begin := func(addr string) *serving {
		l, err := net.Listen("tcp", addr)
		good(t, "listen", err)
		return serve(t, ServerConfig{Listener: l, Path: root, Scrub: -1, Stores: []Store{{Name: "a", Keys: []Key{keyOf(Seed{1}, everything)}}}})
	}
	s := begin("127.0.0.1:0")
	c := s.client(t, Seed{1})
	announced(t, c, 1)
	n, b := shardOf(t, 1000)
	good(t, "put", c.Put(t.Context(), n, b, time.Time{}))
	good(t, "stop", s.stop())
	if err := c.Get(t.Context(), n, 0, nil); err == nil {
		t.Error("control: it answers though it has ended")
	}
	begin(s.addr)
	has(t, c, n, b)
}

func TestBadConfigurations(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	good(t, "listen", err)
	defer l.Close()
	for name, stores := range map[string][]Store{
		"a name that leaves the directory": {{Name: "../x"}},
		"an empty name":                    {{}},
		"the same name twice":              {{Name: "a"}, {Name: "a"}},
		"one key in two stores":            {{Name: "a", Keys: []Key{{Pin: Pin{1}}}}, {Name: "b", Keys: []Key{{Pin: Pin{1}}}}},
	} {
		if _, err := NewServer(ServerConfig{Listener: l, Certificate: certOf(t, Seed{9}), Path: "/nowhere", Stores: stores}); err == nil {
			t.Errorf("%s is taken", name)
		}
	}
}

func TestKeysAreMadeOnce(t *testing.T) {
	file := filepath.Join(t.TempDir(), "key")
	a, err := LoadSeed(file)
	good(t, "make", err)
	b, err := LoadSeed(file)
	if err != nil || a != b || a == (Seed{}) {
		t.Errorf("another key: %v", err)
	}
	if fi, _ := os.Stat(file); fi.Mode().Perm() != 0o600 {
		t.Errorf("mode %v", fi.Mode())
	}
	cert := certOf(t, a)
	p, _ := PinOf(a)
	if q, err := ParsePin(p.String()); err != nil || q != p {
		t.Errorf("pin %v %v", q, err)
	}
	if len(cert.Certificate) != 1 {
		t.Error("no certificate")
	}
}

// FuzzRequest has a server's handler read any bytes of a client that has all rights.
func FuzzRequest(f *testing.F) {
	d := open(f, Config{Path: f.TempDir(), Quota: Quota{1 << 20, 100}})
	f.Cleanup(func() { d.Close() })
	p := make([]byte, requestSize)
	n, b := shardSeeded(1, 100)
	for o := opAnnounce; o < opEnd; o++ {
		(&request{op: o, front: front{1, Holder{1}}, a: 1, b: 2, name: n}).put(p)
		f.Add(bytes.Clone(p))
	}
	(&request{op: opPut, front: front{1, Holder{1}}, name: n, size: 100}).put(p)
	f.Add(append(bytes.Clone(p), b...))
	(&request{op: opAppend, front: front{1, Holder{1}}, name: n, a: 1, b: 4, size: 104}).put(p)
	f.Add(append(append(bytes.Clone(p), "head"...), b...))
	f.Fuzz(func(t *testing.T, in []byte) {
		if len(in) < requestSize {
			return
		}
		r, err := parseRequest(in[:requestSize])
		if err != nil {
			return
		}
		again := make([]byte, requestSize)
		r.put(again)
		if !bytes.Equal(again, in[:requestSize]) {
			t.Fatalf("%+v is written as %x, was %x", r, again, in[:requestSize])
		}
		a, z := net.Pipe()
		defer z.Close()
		go z.Write(in[requestSize:]) // which waits for a reader, of nothing too
		go io.Copy(io.Discard, z)
		h := &handler{s: &Server{log: d.log}, d: d, rights: everything, t: a, c: &conn{}}
		a.SetDeadline(time.Now().Add(50 * time.Millisecond))
		h.answer(r)
		a.Close()
	})
}

// FuzzAnswer has a client read any bytes of a location.
func FuzzAnswer(f *testing.F) {
	n, _ := shardSeeded(1, 100)
	f.Add([]byte{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, uint8(opGet))
	f.Add(append([]byte{0, 0, 0, 0, 0, 0, 0, infoSize, 0, 0, 0, 0, 0, 0, 0, 0}, appendInfo(nil, Info{Name: n, Size: 5})...), uint8(opStat))
	f.Add(append([]byte{0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 5}, appendProof(nil, Proof{Leaves: []Leaf{{[]byte("12"), []byte("34")}}})...), uint8(opProve))
	f.Add([]byte{4, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 'x'}, uint8(opList))
	f.Fuzz(func(t *testing.T, in []byte, o uint8) {
		into := []byte(nil)
		if op(o) == opGet {
			into = make([]byte, 100)
		}
		l := &link{t: &script{r: bytes.NewReader(in)}}
		l.raw = l.t
		a, err := l.ask(t.Context(), request{op: op(o), name: n}, into)
		if err != nil {
			_ = err.Error()
			return
		}
		if infos, err := parseInfos(a.body); err == nil {
			var b []byte
			for _, i := range infos {
				b = appendInfo(b, i)
			}
			if len(b) != len(a.body) {
				t.Errorf("%d bytes of infos, were %d", len(b), len(a.body))
			}
		}
		if page, next, err := parsePage(Name{}, a); err == nil && next != (Name{}) && len(page) == 0 {
			t.Error("a list that never ends")
		}
		parseStatus(a.body)
		if p, err := parseProof(a.value, a.body); err == nil && !bytes.Equal(appendProof(nil, p), a.body) {
			t.Error("a proof is written otherwise")
		}
	})
}

// script is a connection that says what it was told.
type script struct {
	net.Conn
	r *bytes.Reader
}

func (s *script) Read(p []byte) (int, error)  { return s.r.Read(p) }
func (s *script) Write(p []byte) (int, error) { return len(p), nil }
func (s *script) SetDeadline(time.Time) error { return nil }

// TestStoresComeAndGo changes what a server serves while it runs: who is struck off loses his connection at once and gets
// none any more, and the others notice nothing.
func TestStoresComeAndGo(t *testing.T) {
	s := oneStore(t)
	a, b := announced(t, s.client(t, Seed{1}), 1), announced(t, s.client(t, Seed{3}), 1)
	n, shard := shardOf(t, 1000)
	good(t, "put", a.Put(t.Context(), n, shard, time.Time{}))
	good(t, "put", b.Put(t.Context(), n, shard, time.Time{}))
	reader := s.client(t, Seed{2})
	has(t, reader, n, shard)
	held := s.raw(t, Seed{3}) // shows its key before and asks after
	first, second := Store{Name: "a", Keys: []Key{keyOf(Seed{1}, everything), keyOf(Seed{2}, Read)}}, Store{Name: "b", Keys: []Key{keyOf(Seed{3}, everything)}}
	third := Store{Name: "c", Keys: []Key{keyOf(Seed{4}, everything)}, Quota: Quota{Bytes: 1500}}

	good(t, "one comes, one goes", s.SetStores([]Store{first, third}))
	has(t, a, n, shard)
	if _, err := b.Status(t.Context()); err == nil {
		t.Error("a store that is gone answers")
	}
	p := make([]byte, requestSize)
	(&request{op: opGet, name: n, b: 1000}).put(p)
	held.Write(p)
	if k, err := io.ReadFull(held, make([]byte, frameSize)); err == nil || k > 0 {
		t.Errorf("a connection from before reads %d bytes: %v", k, err)
	}
	c := announced(t, s.client(t, Seed{4}), 1)
	good(t, "put into the one that came", c.Put(t.Context(), n, shard, time.Time{}))
	m, other := shardOf(t, 1000)
	wants(t, "above its quota", c.Put(t.Context(), m, other, time.Time{}), ErrQuota)

	first.Keys, third.Quota.Bytes = first.Keys[:1], 5000
	if s.SetStores([]Store{first, {Name: "thief", Keys: first.Keys}}) == nil {
		t.Error("one key is for two stores")
	}
	good(t, "the other comes back, a key goes, a quota grows", s.SetStores([]Store{first, second, third}))
	has(t, a, n, shard)
	has(t, b, n, shard)
	good(t, "within its quota", c.Put(t.Context(), m, other, time.Time{}))
	if _, err := reader.Status(t.Context()); err == nil {
		t.Error("a key that is gone reads")
	}
}

// A key that is good from one address is no key from another, and when it becomes another's address what is open ends.
func TestAKeyIsGoodFromOneAddress(t *testing.T) {
	s := oneStore(t)
	first, second := s.clientFrom(t, Seed{1}, "127.0.0.2"), s.clientFrom(t, Seed{1}, "127.0.0.3")
	key := keyOf(Seed{1}, everything)
	set := func(ip string) {
		t.Helper()
		key.From = netip.MustParseAddr(ip)
		good(t, "bind", s.SetStores([]Store{{Name: "a", Keys: []Key{key}}}))
	}
	good(t, "a key that is bound to nothing", second.Announce(t.Context(), 1, Holder{1}))
	set("127.0.0.2")
	n, shard := shardOf(t, 1000)
	announced(t, first, 2)
	good(t, "put", first.Put(t.Context(), n, shard, time.Time{}))
	if _, err := second.Status(t.Context()); err == nil {
		t.Error("it answers another address")
	}
	set("127.0.0.3")
	has(t, second, n, shard)
	if _, err := first.Status(t.Context()); err == nil {
		t.Error("it answers the address from before")
	}
}
