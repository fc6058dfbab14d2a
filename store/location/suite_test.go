package location

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	mrand "math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"holdfast/disperse"
)

// clock is a time that tests move.
type clock struct {
	mu sync.Mutex
	t  time.Time
}

func newClock() *clock { return &clock{t: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)} }

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.t
}

func (c *clock) Add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.t = c.t.Add(d)
}

func shardOf(t testing.TB, size int) (Name, []byte) {
	t.Helper()
	b := make([]byte, size)
	rand.Read(b)
	n, err := disperse.NameOf(b)
	if err != nil {
		t.Fatal(err)
	}
	return n, b
}

// shardSeeded is a shard that another process can make again.
func shardSeeded(seed uint64, size int) (Name, []byte) {
	b := make([]byte, size)
	mrand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16), byte(seed >> 24), 1}).Read(b)
	n, _ := disperse.NameOf(b)
	return n, b
}

var sizes = []int{0, 1, 4095, 4096, 5000, embedLimit - 1, embedLimit, embedLimit + 1, blockSize*3 + 17, pieceSize, pieceSize*2 + 1, 1 << 20}

// place is one implementation under test: handles with rights, all of one directory.
type locality struct {
	clock *clock
	dir   func() *Dir
	as    func(Rights) Location
	// again ends the process, so to speak, and begins another on the same disk.
	again func()
}

const everything = Read | Write | Delete | Recover

func open(t testing.TB, cfg Config) *Dir {
	t.Helper()
	d, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func inProcess(t *testing.T, change func(*Config)) *locality {
	l := &locality{clock: newClock()}
	cfg := Config{Path: t.TempDir(), Now: l.clock.Now}
	if change != nil {
		change(&cfg)
	}
	d := open(t, cfg)
	l.dir = func() *Dir { return d }
	l.as = func(r Rights) Location { return d.As(r) }
	l.again = func() {
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		d = open(t, cfg)
	}
	t.Cleanup(func() { d.Close() })
	return l
}

// serving is a server in this process.
type serving struct {
	*Server
	addr string
	pin  Pin
	stop func() error
}

func serve(t testing.TB, cfg ServerConfig) *serving {
	t.Helper()
	seed := Seed{9}
	var err error
	if cfg.Certificate, err = Certificate(seed); err != nil {
		t.Fatal(err)
	}
	if cfg.Listener == nil {
		if cfg.Listener, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
			t.Fatal(err)
		}
	}
	s, err := NewServer(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	out := &serving{Server: s, addr: cfg.Listener.Addr().String()}
	out.pin, _ = PinOf(seed)
	out.stop = sync.OnceValue(func() error { cancel(); return <-done })
	t.Cleanup(func() {
		if err := out.stop(); err != nil {
			t.Error(err)
		}
	})
	return out
}

func keyOf(seed Seed, r Rights) Key {
	p, err := PinOf(seed)
	if err != nil {
		panic(err)
	}
	return Key{Pin: p, Rights: r}
}

func certOf(t testing.TB, seed Seed) tls.Certificate {
	t.Helper()
	c, err := Certificate(seed)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func (s *serving) client(t testing.TB, seed Seed) *Client {
	t.Helper()
	c, err := NewClient(ClientConfig{Addr: s.addr, Pin: s.pin, Certificate: certOf(t, seed)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// clientFrom is a client at an address of its own.
func (s *serving) clientFrom(t testing.TB, seed Seed, ip string) *Client {
	t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(ip)}}
	c, err := NewClient(ClientConfig{Addr: s.addr, Pin: s.pin, Certificate: certOf(t, seed), Dial: func(ctx context.Context, addr string) (net.Conn, error) {
		return d.DialContext(ctx, "tcp", addr)
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// overTLS has a key for each set of rights.
func overTLS(t *testing.T, change func(*Config)) *locality {
	l := &locality{clock: newClock()}
	var c Config
	if change != nil {
		change(&c)
	}
	var keys []Key
	for r := Rights(0); r <= everything; r++ {
		keys = append(keys, keyOf(Seed{1, byte(r)}, r))
	}
	root := t.TempDir()
	begin := func() *serving {
		return serve(t, ServerConfig{Path: root, Stores: []Store{{Name: "s", Keys: keys, Quota: c.Quota}}, Hold: c.Hold, Now: l.clock.Now, Scrub: -1})
	}
	s := begin()
	l.as = func(r Rights) Location { return s.client(t, Seed{1, byte(r)}) }
	l.dir = func() *Dir {
		if _, err := l.as(Read).Status(t.Context()); err != nil { // until it has begun
			t.Fatal(err)
		}
		return s.stores["s"].dir
	}
	l.again = func() {
		if err := s.stop(); err != nil {
			t.Fatal(err)
		}
		s = begin()
	}
	return l
}

func announced(t testing.TB, l Location, e Epoch) Location {
	t.Helper()
	if err := l.Announce(t.Context(), e, Holder{byte(e)}); err != nil {
		t.Fatal(err)
	}
	return l
}

func wants(t testing.TB, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: %v, want %v", what, err, want)
	}
}

func good(t testing.TB, what string, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

func has(t testing.TB, l Location, n Name, data []byte) {
	t.Helper()
	p := make([]byte, len(data))
	if err := l.Get(t.Context(), n, 0, p); err != nil {
		t.Errorf("%v", err)
	} else if !bytes.Equal(p, data) {
		t.Errorf("get %v: other bytes", n)
	}
}

func list(t testing.TB, l Location, which Which) (out []Name) {
	t.Helper()
	var from Name
	for {
		page, next, err := l.List(t.Context(), from, which)
		good(t, "list", err)
		for _, i := range page {
			out = append(out, i.Name)
		}
		if next == (Name{}) {
			return out
		}
		from = next
	}
}

// TestLocation is what every Location does.
func TestLocation(t *testing.T) {
	for name, begin := range map[string]func(*testing.T, func(*Config)) *locality{"directory": inProcess, "TLS": overTLS} {
		t.Run(name, func(t *testing.T) { suite(t, begin) })
	}
}

func suite(t *testing.T, begin func(*testing.T, func(*Config)) *locality) {
	never := time.Time{}
	t.Run("what is put is read, whole and in parts, after a restart too", func(t *testing.T) {
		l := begin(t, nil)
		a := announced(t, l.as(everything), 1)
		shards, begun := map[Name][]byte{}, l.clock.Now()
		for _, size := range sizes {
			n, b := shardOf(t, size)
			shards[n] = b
			for range 2 { // idempotent
				good(t, "put", a.Put(t.Context(), n, b, never))
			}
		}
		for range 2 {
			for n, b := range shards {
				has(t, a, n, b)
				for range 20 {
					off := mrand.IntN(len(b) + 1)
					p := make([]byte, mrand.IntN(len(b)-off+1))
					good(t, "get", a.Get(t.Context(), n, int64(off), p))
					if !bytes.Equal(p, b[off:][:len(p)]) {
						t.Fatalf("%d bytes from %d of %d are others", len(p), off, len(b))
					}
				}
				wants(t, "beyond the end", a.Get(t.Context(), n, int64(len(b)), make([]byte, 1)), ErrSize)
				wants(t, "before the begin", a.Get(t.Context(), n, -1, make([]byte, 1)), ErrSize)
				i, err := a.Stat(t.Context(), n)
				if err != nil || i != (Info{Name: n, Size: int64(len(b)), Put: begun}) {
					t.Errorf("stat: %+v %v", i, err)
				}
			}
			if got := list(t, a, Live); len(got) != len(shards) || !slices.IsSortedFunc(got, func(a, b Name) int { return bytes.Compare(a[:], b[:]) }) {
				t.Errorf("list: %v", got)
			}
			st, err := a.Status(t.Context())
			if err != nil || st.Shards != int64(len(shards)) || st.Epoch != 1 {
				t.Errorf("status: %+v %v", st, err)
			}
			l.clock.Add(time.Second)
			l.again()
			a = announced(t, l.as(everything), 1)
		}
		n, _ := shardOf(t, 100)
		wants(t, "get what is not there", a.Get(t.Context(), n, 0, make([]byte, 1)), ErrAbsent)
		_, err := a.Stat(t.Context(), n)
		wants(t, "stat what is not there", err, ErrAbsent)
		wants(t, "delete what is not there", a.Delete(t.Context(), n), ErrAbsent)
	})
	t.Run("wrong bytes under a name are not kept", func(t *testing.T) {
		l := begin(t, nil)
		a := announced(t, l.as(everything), 1)
		for _, size := range sizes[1:] {
			n, b := shardOf(t, size)
			b[mrand.IntN(size)] ^= 1
			wants(t, "a flipped bit", a.Put(t.Context(), n, b, never), ErrName)
			wants(t, "and get", a.Get(t.Context(), n, 0, nil), ErrAbsent)
		}
		if files := filesOf(t, l.dir()); len(files) > 0 {
			t.Errorf("left %v", files)
		}
		if st, _ := a.Status(t.Context()); st.Bytes != 0 || l.dir().pending != (Quota{}) {
			t.Errorf("counted %+v, %+v", st, l.dir().pending)
		}
	})
	t.Run("a delete is held, can be undone with the recovery right alone, and ends", func(t *testing.T) {
		l := begin(t, nil)
		a := announced(t, l.as(Read|Write|Delete), 1)
		var names []Name
		data := map[Name][]byte{}
		for _, size := range []int{1000, 200 << 10} {
			for range 3 {
				n, b := shardOf(t, size)
				names, data[n] = append(names, n), b
				good(t, "put", a.Put(t.Context(), n, b, never))
				good(t, "delete", a.Delete(t.Context(), n))
				good(t, "delete again", a.Delete(t.Context(), n))
				wants(t, "get", a.Get(t.Context(), n, 0, make([]byte, 1)), ErrAbsent)
				wants(t, "a thief purges", a.Purge(t.Context(), n), ErrRights)
				wants(t, "a thief undeletes", a.Undelete(t.Context(), n), ErrRights)
			}
		}
		if got := list(t, a, Held); len(got) != len(names) || len(list(t, a, Live)) != 0 {
			t.Errorf("held: %v", got)
		}
		l.clock.Add(24*time.Hour - time.Second)
		l.again()
		good(t, "sweep", l.dir().Sweep(t.Context()))
		a, rescue := announced(t, l.as(Read|Write|Delete), 1), l.as(Recover)
		back := []Name{names[0], names[3]}
		for _, n := range back {
			good(t, "undelete", rescue.Undelete(t.Context(), n))
			has(t, a, n, data[n])
		}
		good(t, "put again", a.Put(t.Context(), names[1], data[names[1]], never))
		good(t, "purge", rescue.Purge(t.Context(), names[4]))
		wants(t, "purge what is live", rescue.Purge(t.Context(), names[0]), ErrAbsent)
		wants(t, "undelete what was purged", rescue.Undelete(t.Context(), names[4]), ErrAbsent)
		l.clock.Add(2 * time.Second)
		good(t, "sweep", l.dir().Sweep(t.Context()))
		for range 2 {
			for i, n := range names {
				_, err := l.as(Read).Stat(t.Context(), n)
				if i == 0 || i == 1 || i == 3 {
					good(t, "stat", err)
					has(t, l.as(Read), n, data[n])
				} else {
					wants(t, fmt.Sprintf("stat %d after the hold", i), err, ErrAbsent)
				}
			}
			if got := filesOf(t, l.dir()); len(got) != 1 {
				t.Errorf("files: %v", got)
			}
			l.again()
		}
	})
	t.Run("a lock holds, whoever asks and whatever the clock says", func(t *testing.T) {
		l := begin(t, nil)
		a := announced(t, l.as(everything), 1)
		n, b := shardOf(t, 3000)
		m, c := shardOf(t, 300<<10)
		day := 24 * time.Hour
		begun := l.clock.Now()
		good(t, "put", a.Put(t.Context(), n, b, begun.Add(day)))
		good(t, "put", a.Put(t.Context(), m, c, never))
		good(t, "retain", a.Retain(t.Context(), m, begun.Add(day)))
		good(t, "retain for shorter", a.Retain(t.Context(), n, begun.Add(time.Hour)))
		good(t, "put for shorter", a.Put(t.Context(), n, b, begun.Add(time.Hour)))
		wants(t, "retain for ever", a.Retain(t.Context(), n, begun.Add(20*365*day)), ErrSize)
		l.clock.Add(day - time.Second)
		for _, x := range []Name{n, m} {
			wants(t, "delete", a.Delete(t.Context(), x), ErrLocked)
			wants(t, "purge", a.Purge(t.Context(), x), ErrAbsent)
			if i, err := a.Stat(t.Context(), x); err != nil || !i.Retain.Equal(begun.Add(day)) {
				t.Errorf("stat: %+v %v", i, err)
			}
		}
		good(t, "put for longer", a.Put(t.Context(), n, b, begun.Add(2*day)))
		l.clock.Add(2 * time.Second)
		good(t, "delete after the lock", a.Delete(t.Context(), m))
		l.again()
		a = announced(t, l.as(everything), 1)
		wants(t, "delete of what is locked for longer", a.Delete(t.Context(), n), ErrLocked)
		has(t, a, n, b)
	})
	t.Run("a clock that was set back shortens nothing and lengthens nothing", func(t *testing.T) {
		l := begin(t, nil)
		a := announced(t, l.as(everything), 1)
		n, b := shardOf(t, 3000)
		good(t, "put", a.Put(t.Context(), n, b, never))
		l.clock.Add(time.Hour)
		good(t, "delete", a.Delete(t.Context(), n))
		deleted := l.clock.Now()
		l.clock.Add(-10 * 24 * time.Hour)
		l.again()
		if st, err := l.as(Read).Status(t.Context()); err != nil || st.Time.Before(deleted) {
			t.Errorf("the location's time is %v, it was %v", st.Time, deleted)
		}
		good(t, "sweep", l.dir().Sweep(t.Context()))
		if i, err := l.as(Read).Stat(t.Context(), n); err != nil || !i.Deleted.Equal(deleted) {
			t.Errorf("stat: %+v %v", i, err)
		}
	})
	t.Run("who knows the epoch and is not its holder writes nothing", func(t *testing.T) {
		l := begin(t, nil)
		a, thief := announced(t, l.as(everything), 3), &epochOf{l.as(everything), l, 3, Holder{99}}
		n, b := shardOf(t, 3000)
		m, c := shardOf(t, 300<<10)
		good(t, "put", a.Put(t.Context(), n, b, never))
		good(t, "head", a.PutHead(t.Context(), 7, []byte("seven")))
		wants(t, "put", thief.Put(t.Context(), m, c, never), ErrFenced)
		wants(t, "append", thief.set().Append(t.Context(), m, c, 1<<63, []byte("x")), ErrFenced)
		wants(t, "append of what is there", thief.set().Append(t.Context(), n, b, 1<<63, []byte("x")), ErrFenced)
		wants(t, "head", thief.PutHead(t.Context(), 1<<63, []byte("x")), ErrFenced)
		wants(t, "delete", thief.Delete(t.Context(), n), ErrFenced)
		wants(t, "retain", thief.Retain(t.Context(), n, l.clock.Now().Add(time.Hour)), ErrFenced)
		good(t, "control: the holder goes on", a.Append(t.Context(), m, c, 8, []byte("eight")))
		has(t, a, n, b)
	})
	t.Run("the last head of an earlier epoch stays while the hold lasts", func(t *testing.T) {
		l := begin(t, func(c *Config) { c.Segment = 8 << 10 })
		a := announced(t, l.as(everything), 1)
		for i := range 3 {
			good(t, "head", a.PutHead(t.Context(), uint64(i+1), fmt.Appendf(nil, "true %d", i+1)))
		}
		for e := range 100 { // a thief of the credential says what he likes
			a := announced(t, l.as(Read|Write|Delete), Epoch(e+2))
			good(t, "a head of the thief", a.PutHead(t.Context(), 1<<63, bytes.Repeat([]byte{byte(e)}, MaxHead)))
			for i := range 3 {
				n, b := shardSeeded(uint64(e*3+i), 3000)
				good(t, "put", a.Put(t.Context(), n, b, never))
				good(t, "delete", a.Delete(t.Context(), n))
			}
		}
		check := func(when string, want int) {
			t.Helper()
			all, err := l.as(Read).Earlier(t.Context())
			good(t, "earlier heads", err)
			if len(all) != want || want > 0 && (all[want-1].Epoch != 1 || all[want-1].Sequence != 3 || string(all[want-1].Bytes) != "true 3") {
				t.Errorf("%s: %d heads", when, len(all))
			}
			if h, err := l.as(Read).Head(t.Context()); err != nil || h.Epoch != 101 {
				t.Errorf("%s: the head is of epoch %d, %v", when, h.Epoch, err)
			}
		}
		check("at once", MaxHeads)
		l.again()
		check("after a restart", MaxHeads)
		before := len(l.dir().segments)
		d := l.dir()
		d.mu.Lock()
		for _, s := range d.segments { // as if all were mostly dead
			s.dead = s.size
		}
		d.mu.Unlock()
		good(t, "sweep", d.Sweep(t.Context()))
		if after := len(d.segments); before > 1 && after >= before {
			t.Errorf("%d segments, before %d", after, before)
		}
		check("after they were rewritten", MaxHeads)
		l.again()
		check("after that and a restart", MaxHeads)
		l.clock.Add(23 * time.Hour)
		l.again()
		check("an hour before the end", MaxHeads)
		l.clock.Add(2 * time.Hour)
		check("after the hold", 0)
	})
	t.Run("a new front end fences the old one off", func(t *testing.T) {
		l := begin(t, nil)
		old, young := l.as(everything), l.as(everything)
		n, b := shardOf(t, 3000)
		big, c := shardOf(t, 300<<10)
		wants(t, "put without an epoch", old.Put(t.Context(), n, b, never), ErrEpoch)
		announced(t, old, 3)
		good(t, "put", old.Put(t.Context(), n, b, never))
		good(t, "head", old.PutHead(t.Context(), 7, []byte("seven")))
		good(t, "head again", old.PutHead(t.Context(), 7, []byte("seven")))
		wants(t, "another head of that sequence", old.PutHead(t.Context(), 7, []byte("SEVEN")), ErrOldHead)
		wants(t, "an older head", old.PutHead(t.Context(), 6, []byte("six")), ErrOldHead)
		wants(t, "the same epoch, another holder", young.Announce(t.Context(), 3, Holder{99}), ErrFenced)
		wants(t, "a lower epoch", young.Announce(t.Context(), 2, Holder{99}), ErrFenced)
		wants(t, "an epoch that uses up all", young.Announce(t.Context(), 1<<63, Holder{99}), ErrSize)
		good(t, "the same again", old.Announce(t.Context(), 3, Holder{3}))
		announced(t, young, 4)
		for range 2 {
			wants(t, "old put", old.Put(t.Context(), big, c, never), ErrFenced)
			wants(t, "old put of what is there", old.Put(t.Context(), n, b, never), ErrFenced)
			wants(t, "old delete", old.Delete(t.Context(), n), ErrFenced)
			wants(t, "old retain", old.Retain(t.Context(), n, l.clock.Now().Add(time.Hour)), ErrFenced)
			wants(t, "old head", old.PutHead(t.Context(), 8, []byte("eight")), ErrFenced)
			has(t, old, n, b)
			if h, err := young.Head(t.Context()); err != nil || h.Epoch != 3 || h.Sequence != 7 || string(h.Bytes) != "seven" {
				t.Errorf("head: %+v %v", h, err)
			}
			l.again()
			old, young = &epochOf{l.as(everything), l, 3, Holder{3}}, l.as(everything)
			announced(t, young, 4)
		}
		good(t, "a head of the new epoch", young.PutHead(t.Context(), 1, []byte("one")))
		wants(t, "too large a head", young.PutHead(t.Context(), 2, make([]byte, MaxHead+1)), ErrSize)
		good(t, "the largest head", young.PutHead(t.Context(), 2, make([]byte, MaxHead)))
		l.again()
		if h, err := l.as(Read).Head(t.Context()); err != nil || h.Epoch != 4 || h.Sequence != 2 || len(h.Bytes) != MaxHead {
			t.Errorf("head: %+v %v", h, err)
		}
	})
	t.Run("an append is a put and a head, or neither", func(t *testing.T) {
		l := begin(t, func(c *Config) { c.Quota = Quota{Bytes: 1 << 20} })
		a := announced(t, l.as(everything), 3)
		sequence := uint64(0)
		for _, size := range []int{0, 1, 2000, embedLimit, embedLimit + 1, 300 << 10} {
			n, b := shardOf(t, size)
			sequence++
			for range 2 { // idempotent
				good(t, "append", a.Append(t.Context(), n, b, sequence, []byte(fmt.Sprint("head ", size))))
			}
			has(t, a, n, b)
			if h, err := a.Head(t.Context()); err != nil || h.Epoch != 3 || h.Sequence != sequence || string(h.Bytes) != fmt.Sprint("head ", size) {
				t.Errorf("head: %+v %v", h, err)
			}
			sequence++
			good(t, "append of what is there", a.Append(t.Context(), n, b, sequence, []byte("new")))
			if h, err := a.Head(t.Context()); err != nil || h.Sequence != sequence || string(h.Bytes) != "new" {
				t.Errorf("head: %+v %v", h, err)
			}
		}
		for _, size := range []int{100, 100 << 10} {
			n, b := shardOf(t, size)
			wants(t, "an older head", a.Append(t.Context(), n, b, sequence-1, []byte("new")), ErrOldHead)
			wants(t, "another head of that sequence", a.Append(t.Context(), n, b, sequence, []byte("NEW")), ErrOldHead)
			wants(t, "too large a head", a.Append(t.Context(), n, b, sequence+1, make([]byte, MaxHead+1)), ErrSize)
			wants(t, "without the right", l.as(everything&^Write).Append(t.Context(), n, b, sequence+1, nil), ErrRights)
			b[0] ^= 1
			wants(t, "other bytes", a.Append(t.Context(), n, b, sequence+1, nil), ErrName)
			wants(t, "none of which is there", a.Get(t.Context(), n, 0, nil), ErrAbsent)
		}
		n, b := shardOf(t, 900<<10)
		wants(t, "beyond the quota", a.Append(t.Context(), n, b, sequence+1, nil), ErrQuota)
		m, c := shardOf(t, 200)
		young := announced(t, l.as(everything), 4)
		wants(t, "an older epoch", a.Append(t.Context(), m, c, sequence+1, nil), ErrFenced)
		if h, err := a.Head(t.Context()); err != nil || h.Sequence != sequence || h.Epoch != 3 || l.dir().pending != (Quota{}) || len(filesOf(t, l.dir())) != 2 {
			t.Errorf("head %+v %v, pending %+v, files %v", h, err, l.dir().pending, filesOf(t, l.dir()))
		}
		good(t, "the first of a new epoch", young.Append(t.Context(), m, c, 1, make([]byte, MaxHead)))
		l.again()
		has(t, l.as(Read), m, c)
		if h, err := l.as(Read).Head(t.Context()); err != nil || h.Sequence != 1 || h.Epoch != 4 || len(h.Bytes) != MaxHead {
			t.Errorf("head: %+v %v", h, err)
		}
	})
	t.Run("quotas hold, also while shards are under way", func(t *testing.T) {
		l := begin(t, func(c *Config) { c.Quota = Quota{Bytes: 1 << 20, Shards: 20} })
		a := announced(t, l.as(everything), 1)
		var wg sync.WaitGroup
		var mu sync.Mutex
		var kept []Name
		data := map[Name][]byte{}
		for range 8 {
			n, b := shardOf(t, 300<<10)
			wg.Go(func() {
				switch err := a.Put(t.Context(), n, b, never); {
				case err == nil:
					mu.Lock()
					kept, data[n] = append(kept, n), b
					mu.Unlock()
				case !errors.Is(err, ErrQuota):
					t.Errorf("put: %v", err)
				}
			})
		}
		wg.Wait()
		if len(kept) > 3 || len(kept) == 0 {
			t.Fatalf("%d of 300 KiB were kept in 1 MiB", len(kept))
		}
		for i := range 30 {
			n, b := shardOf(t, 100)
			err := a.Put(t.Context(), n, b, never)
			if want := i+len(kept) < 20; want != (err == nil) || !want && !errors.Is(err, ErrQuota) {
				t.Fatalf("shard %d: %v", i+len(kept), err)
			}
		}
		good(t, "put what is there", a.Put(t.Context(), kept[0], data[kept[0]], never))
		good(t, "delete", a.Delete(t.Context(), kept[0]))
		n, b := shardOf(t, 100)
		wants(t, "what is held counts", a.Put(t.Context(), n, b, never), ErrQuota)
		good(t, "purge", a.Purge(t.Context(), kept[0]))
		good(t, "put into what was purged", a.Put(t.Context(), n, b, never))
	})
	t.Run("rights are what they say", func(t *testing.T) {
		l := begin(t, nil)
		a := announced(t, l.as(everything), 1)
		n, b := shardOf(t, 100)
		m, c := shardOf(t, 100)
		acts := []struct {
			what  string
			needs Rights
			do    func(Location) error
		}{
			{"put", Write, func(x Location) error { return x.Put(t.Context(), m, c, never) }},
			{"get", Read, func(x Location) error { return x.Get(t.Context(), n, 0, make([]byte, 1)) }},
			{"stat", Read, func(x Location) error { _, err := x.Stat(t.Context(), n); return err }},
			{"list", Read, func(x Location) error { _, _, err := x.List(t.Context(), Name{}, Live); return err }},
			{"head", Read, func(x Location) error { _, err := x.Head(t.Context()); return err }},
			{"prove", Read, func(x Location) error { _, err := x.Prove(t.Context(), n, []int{0}); return err }},
			{"append", Write, func(x Location) error { return x.Append(t.Context(), m, c, 1, []byte("h")) }},
			{"retain", Write, func(x Location) error { return x.Retain(t.Context(), n, l.clock.Now()) }},
			{"announce", Write, func(x Location) error { return x.Announce(t.Context(), 1, Holder{1}) }},
			{"put head", Write, func(x Location) error { return x.PutHead(t.Context(), 1, []byte("h")) }},
			{"delete", Delete, func(x Location) error { return x.Delete(t.Context(), n) }},
			{"undelete", Recover, func(x Location) error { return x.Undelete(t.Context(), n) }},
			{"purge", Recover, func(x Location) error { return x.Purge(t.Context(), n) }},
			{"status", everything, func(x Location) error { _, err := x.Status(t.Context()); return err }},
		}
		for r := Rights(0); r <= everything; r++ {
			x := l.as(r)
			if r&Write != 0 {
				announced(t, x, 1)
			}
			good(t, "put", a.Put(t.Context(), n, b, never))
			for _, act := range acts {
				err := act.do(x)
				if may := r&act.needs != 0; may == errors.Is(err, ErrRights) {
					t.Errorf("%s with %q: %v", act.what, r, err)
				}
			}
		}
	})
	t.Run("an audit is answered from the bytes", func(t *testing.T) {
		l := begin(t, nil)
		a := announced(t, l.as(everything), 1)
		for _, size := range sizes[1:] {
			n, b := shardOf(t, size)
			good(t, "put", a.Put(t.Context(), n, b, never))
			var leaves []int
			for range MaxLeaves {
				leaves = append(leaves, mrand.IntN(disperse.Leaves(int64(size))))
			}
			p, err := a.Prove(t.Context(), n, leaves)
			good(t, "prove", err)
			good(t, "check", p.Check(n, int64(size), leaves))
			if p.Check(n, int64(size)+1, leaves) == nil || p.Check(Name{1}, int64(size), leaves) == nil || p.Check(n, int64(size), leaves[1:]) == nil {
				t.Error("a proof of something else is taken")
			}
			_, err = a.Prove(t.Context(), n, []int{disperse.Leaves(int64(size))})
			wants(t, "a leaf that is not there", err, ErrSize)
			_, err = a.Prove(t.Context(), n, []int{-1})
			wants(t, "leaf -1", err, ErrSize)
			_, err = a.Prove(t.Context(), n, make([]int, MaxLeaves+1))
			wants(t, "too many leaves", err, ErrSize)
		}
	})
	t.Run("rot is found, listed, not served, and mended by a put", func(t *testing.T) {
		l := begin(t, nil)
		a := announced(t, l.as(everything), 1)
		type kept struct {
			n Name
			b []byte
		}
		var all []kept
		for _, size := range sizes[1:] {
			n, b := shardOf(t, size)
			good(t, "put", a.Put(t.Context(), n, b, never))
			all = append(all, kept{n, b})
		}
		d := l.dir()
		good(t, "scrub of what is well", func() error { _, err := d.Scrub(t.Context(), 1<<30); return err }())
		if got := list(t, a, Rotten); len(got) > 0 {
			t.Fatalf("control: rotten: %v", got)
		}
		for i, k := range all {
			flip(t, d, k.n, mrand.IntN(len(k.b)))
			if i%2 == 0 { // an audit finds it too, a get is not asked to
				_, err := a.Prove(t.Context(), k.n, []int{0})
				wants(t, fmt.Sprintf("prove %d rotten bytes", len(k.b)), err, ErrRotten)
			}
		}
		s, err := d.Scrub(t.Context(), 1<<30)
		if err != nil || s.Rotten != int64(len(all)) {
			t.Errorf("scrub: %+v %v", s, err)
		}
		if got := list(t, a, Rotten); len(got) != len(all) || len(list(t, a, Live)) != len(all) {
			t.Errorf("listed: %v", got)
		}
		for _, k := range all {
			wants(t, "get", a.Get(t.Context(), k.n, 0, nil), ErrRotten)
			_, err := a.Prove(t.Context(), k.n, []int{0})
			wants(t, "prove", err, ErrRotten)
			good(t, "mend", a.Put(t.Context(), k.n, k.b, never))
			has(t, a, k.n, k.b)
		}
		if got := list(t, a, Rotten); len(got) > 0 {
			t.Errorf("rotten still: %v", got)
		}
		l.again()
		for _, k := range all {
			has(t, l.as(Read), k.n, k.b)
		}
	})
	t.Run("lists go on where they ended", func(t *testing.T) {
		l := begin(t, nil)
		a := announced(t, l.as(everything), 1)
		want := map[Name]bool{}
		var wg sync.WaitGroup
		var mu sync.Mutex
		for range 8 {
			wg.Go(func() {
				for range 300 {
					n, b := shardOf(t, 10)
					mu.Lock()
					want[n] = true
					mu.Unlock()
					if err := a.Put(t.Context(), n, b, never); err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
		got := list(t, a, Live)
		for _, n := range got {
			delete(want, n)
		}
		if len(got) != 2400 || len(want) > 0 {
			t.Errorf("%d names, %d not", len(got), len(want))
		}
	})
}

// epochOf is a front end that has not heard of what happened meanwhile.
type epochOf struct {
	Location
	l *locality
	e Epoch
	h Holder
}

func (o *epochOf) set() Location {
	switch x := o.Location.(type) {
	case *Session:
		x.front = front{o.e, o.h}
	case *Client:
		x.front.Store(&front{o.e, o.h})
	}
	return o.Location
}
func (o *epochOf) Put(ctx context.Context, n Name, b []byte, t time.Time) error {
	return o.set().Put(ctx, n, b, t)
}
func (o *epochOf) Delete(ctx context.Context, n Name) error { return o.set().Delete(ctx, n) }
func (o *epochOf) Retain(ctx context.Context, n Name, t time.Time) error {
	return o.set().Retain(ctx, n, t)
}
func (o *epochOf) PutHead(ctx context.Context, s uint64, b []byte) error {
	return o.set().PutHead(ctx, s, b)
}

func filesOf(t testing.TB, d *Dir) (out []string) {
	t.Helper()
	filepath.Walk(filepath.Join(d.cfg.Path, "files"), func(p string, fi os.FileInfo, _ error) error {
		if fi != nil && !fi.IsDir() {
			out = append(out, p)
		}
		return nil
	})
	return out
}

// flip is the disk's owner, or its age: one bit of a shard is another.
func flip(t testing.TB, d *Dir, n Name, i int) {
	t.Helper()
	d.mu.RLock()
	e, ok := d.find(n)
	d.mu.RUnlock()
	path, off := d.filePath(e.file), int64(i)
	if e.file == 0 {
		path, off = segmentPath(d.cfg.Path, e.pos.segment()), e.pos.offset()+recordHead+int64(i)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if !ok || err != nil {
		t.Fatal(ok, err)
	}
	defer f.Close()
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, off); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1 << mrand.IntN(8)
	if _, err := f.WriteAt(b, off); err != nil {
		t.Fatal(err)
	}
}
