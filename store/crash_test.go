package store

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	mrand "math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/store/location"
)

// A block of which fewer than k shards were written when the front end died never was; one with k or more is finished, and
// nobody who was told that a change is durable is told otherwise later.
func TestABlockThatWasUnderWay(t *testing.T) {
	for _, c := range []struct {
		name    string
		wrote   int  // of six
		silent  int  // of those that did not, at the start
		lost    bool // of those that did, one is silent
		done    bool
		refused bool
	}{
		{"on no location: dropped", 0, 0, false, false, false},
		{"on one of six, needs four: dropped", 1, 0, false, false, false},
		{"on three of six, needs four: dropped", 3, 0, false, false, false},
		{"on three, and one that is silent makes four, who acknowledged nothing: dropped", 3, 1, false, false, false},
		{"on three, and two that are silent could make five: nobody knows", 3, 2, false, false, true},
		{"on four: finished", 4, 0, false, true, false},
		{"on four and two silent: finished", 4, 2, false, true, false},
		{"on four, of which one is silent: dropped", 4, 0, true, false, false},
		{"on six, though nobody heard of it: finished", 6, 0, false, true, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			ctx := t.Context()
			b := newBed(t, 4, 6)
			b.change = func(c *Config) { c.Timeout = 200 * time.Millisecond }
			s := b.open()
			if err := set(ctx, s, "a", "1"); err != nil {
				t.Fatal(err)
			}
			if err := set(ctx, s, "a", "2"); err != nil {
				t.Fatal(err)
			}
			for i, f := range b.faults {
				if i >= c.wrote {
					f.set(mute, nil)
				} else {
					f.set(nil, func(_ context.Context, op string) error {
						if op == "append" {
							return errFault // it did, and nobody is told
						}
						return nil
					})
				}
			}
			if err := set(ctx, s, "a", "3", "b", "3"); !errors.Is(err, ErrBusy) {
				t.Fatalf("no quorum: %v", err)
			}
			s.Close()
			for i, f := range b.faults {
				if i >= c.wrote && i < c.wrote+c.silent || i == 0 && c.lost {
					f.set(silent, nil)
				} else {
					f.set(nil, nil)
				}
			}
			s, err := b.restore()
			if c.refused {
				if !errors.Is(err, ErrRollback) {
					t.Fatalf("got %v", err)
				}
				was := b.change
				b.change = func(c *Config) { was(c); c.AcceptLoss = true }
				if s, err = b.restore(); err != nil {
					t.Fatalf("accepting the loss: %v", err)
				}
			} else if err != nil {
				t.Fatal(err)
			}
			want := "2-"
			if c.done {
				want = "33"
			}
			if got := value(t, s, "a") + value(t, s, "b"); got != want || s.Recovery().Dropped == c.done && c.wrote > 0 {
				t.Errorf("a and b are %s, not %s; %+v", got, want, s.Recovery())
			}
			for _, f := range b.faults {
				f.set(nil, nil)
			}
			// What was decided stays, whoever is back.
			for err := set(ctx, s, "c", "4"); err != nil; err = set(ctx, s, "c", "4") {
				if !errors.Is(err, ErrBusy) || ctx.Err() != nil {
					t.Fatal(err)
				}
			}
			s.Close()
			b.faults[0].set(silent, nil)
			if got := value(t, b.restored(), "a"); got != want[:1] {
				t.Errorf("later, without one location that had it, a is %s", got)
			}
		})
	}
}

const childVariable = "HOLDFAST_STORE_CHILD"

// A worker's objects: what it writes at step i can be told from everything else.
func objectOf(worker, step int) []byte {
	r := mrand.New(mrand.NewPCG(uint64(worker), uint64(step)))
	b := make([]byte, r.IntN(6000))
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

const (
	crashWorkers = 8
	crashKeys    = 20
)

func crashBed(t testing.TB, dir string) *bed {
	b := &bed{t: t, scheme: newBedScheme, frontAt: filepath.Join(dir, "front")}
	b.root = Root(sha256.Sum256([]byte(dir)))
	for i := range b.scheme.N {
		d, err := newSite(filepath.Join(dir, fmt.Sprint("location-", i)))
		if err != nil {
			t.Fatal(err)
		}
		b.dirs = append(b.dirs, d)
		b.faults = append(b.faults, &faulty{})
	}
	b.change = func(c *Config) { c.Snapshot = 200 << 10 }
	return b
}

func (b *bed) closeDirs() {
	for _, d := range b.dirs {
		d.Close()
	}
}

// TestCrashChild is what TestKilledAtAnyPoint kills: it writes as fast as it can and says what was acknowledged.
func TestCrashChild(t *testing.T) {
	dir := os.Getenv(childVariable)
	if dir == "" {
		t.Skip("a part of TestKilledAtAnyPoint")
	}
	b := crashBed(t, dir)
	c := b.config()
	_, err := os.Stat(b.frontAt)
	_, began := os.Stat(filepath.Join(dir, "began"))
	c.Restore = err != nil && began == nil
	s, err := Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	go s.Run(t.Context())
	var mu sync.Mutex
	var wg sync.WaitGroup
	for w := range crashWorkers {
		wg.Go(func() {
			step := 0
			fmt.Sscan(value(t, s, fmt.Sprintf("last/%d", w)), &step)
			for {
				step++
				if err := crashStep(t.Context(), s, w, step); err != nil {
					t.Errorf("worker %d, step %d: %v", w, step, err)
					return
				}
				mu.Lock()
				fmt.Printf("ack %d %d\n", w, step)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
}

// crashStep replaces one object, and says twice which step it was.
func crashStep(ctx context.Context, s *Store, w, step int) error {
	body, err := s.Write(ctx, "", bytes.NewReader(objectOf(w, step)), -1)
	if err != nil {
		return err
	}
	v, err := body.MarshalBinary()
	if err != nil {
		return err
	}
	return s.Update(ctx, func(t Tx) error {
		key := fmt.Appendf(nil, "object/%d/%d", w, step%crashKeys)
		old, ok, err := t.Get(key)
		if err != nil {
			return err
		}
		if ok {
			var b Body
			if err := b.UnmarshalBinary(old); err != nil {
				return err
			}
			t.Drop(b)
		}
		t.Set(key, v)
		t.Keep(body)
		t.Set(fmt.Appendf(nil, "last/%d", w), fmt.Append(nil, step))
		t.Set(fmt.Appendf(nil, "copy/%d", w), fmt.Append(nil, step))
		return nil
	})
}

func crashCheck(t *testing.T, s *Store, acked *[crashWorkers]int) {
	t.Helper()
	for w := range crashWorkers {
		last := 0
		fmt.Sscan(value(t, s, fmt.Sprintf("last/%d", w)), &last)
		if c := value(t, s, fmt.Sprintf("copy/%d", w)); last > 0 && c != fmt.Sprint(last) {
			t.Fatalf("worker %d: last is %d, its copy %s", w, last, c)
		}
		if last < acked[w] || last > acked[w]+1 {
			t.Fatalf("worker %d: step %d was acknowledged, the store has %d", w, acked[w], last)
		}
		acked[w] = last // what was not acknowledged, and is there, stays
		for step := max(1, last-crashKeys+1); step <= last; step++ {
			got, err := getObject(t.Context(), s, fmt.Sprintf("object/%d/%d", w, step%crashKeys))
			if err != nil || !bytes.Equal(got, objectOf(w, step)) {
				t.Fatalf("worker %d, step %d of %d: %d bytes, %v", w, step, last, len(got), err)
			}
		}
	}
}

func TestKilledAtAnyPoint(t *testing.T) {
	rounds := 10
	if os.Getenv("HOLDFAST_LONG") != "" {
		rounds = 1000
	}
	dir := inMemory(t)
	var acked [crashWorkers]int
	total := 0
	for round := range rounds {
		cmd := exec.Command(os.Args[0], "-test.run=^TestCrashChild$", "-test.count=1")
		cmd.Env = append(os.Environ(), childVariable+"="+dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// At work most often, sometimes while it starts.
		kill := time.AfterFunc(time.Duration(50+mrand.IntN(200))*time.Millisecond, func() { cmd.Process.Kill() })
		begun := mrand.IntN(4) == 0
		if !begun {
			kill.Reset(20 * time.Second)
		}
		var other []string
		for sc := bufio.NewScanner(out); sc.Scan(); {
			var w, step int
			if n, _ := fmt.Sscanf(sc.Text(), "ack %d %d", &w, &step); n == 2 {
				acked[w] = max(acked[w], step)
				total++
				if !begun {
					begun = true
					kill.Reset(time.Duration(mrand.IntN(300)) * time.Millisecond)
				}
			} else if len(other) < 20 {
				other = append(other, sc.Text())
			}
		}
		kill.Stop()
		cmd.Wait()
		if len(other) > 0 && strings.Contains(strings.Join(other, "\n"), "FAIL") {
			t.Fatalf("round %d: %s", round, strings.Join(other, "\n"))
		}
		if mrand.IntN(3) == 0 { // and the front end's disk is lost
			if err := os.RemoveAll(filepath.Join(dir, "front")); err != nil {
				t.Fatal(err)
			}
		}
		b := crashBed(t, dir)
		c := b.config()
		_, err = os.Stat(filepath.Join(b.frontAt, "metadata"))
		c.Restore = err != nil
		s, err := Open(t.Context(), c)
		if errors.Is(err, ErrNoStore) {
			b.closeDirs()
			continue
		}
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		crashCheck(t, s, &acked)
		if err := os.WriteFile(filepath.Join(dir, "began"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		b.closeDirs()
	}
	if total < rounds*5 { // a busy machine does little in the time of a round
		t.Errorf("only %d changes in %d rounds: nothing was tried", total, rounds)
	}
	t.Logf("%d changes acknowledged in %d rounds", total, rounds)
}

// The front end's directory goes at a random moment, under load: what is restored has everything that was acknowledged.
func TestTheFrontEndsDiskIsLostUnderLoad(t *testing.T) {
	ctx := t.Context()
	b := newBed(t, 4, 6)
	b.change = func(c *Config) { c.Snapshot = 100 << 10; c.Timeout = 5 * time.Second }
	s := b.open()
	var acked [crashWorkers]int
	for range 3 {
		run, stop := context.WithCancel(ctx)
		ran := make(chan error, 1)
		go func() { ran <- s.Run(run) }()
		var wg sync.WaitGroup
		gone := make(chan struct{})
		for w := range crashWorkers {
			wg.Go(func() {
				for {
					select {
					case <-gone:
						return
					default:
					}
					if err := crashStep(ctx, s, w, acked[w]+1); err != nil {
						return
					}
					acked[w]++
				}
			})
		}
		time.Sleep(time.Duration(100+mrand.IntN(200)) * time.Millisecond)
		// All files go. (Without its directories Pebble ends the process, and with it this test.)
		filepath.WalkDir(b.frontAt, func(p string, d fs.DirEntry, err error) error {
			if err == nil && !d.IsDir() {
				os.Remove(p)
			}
			return nil
		})
		next := b.restored() // while the old one still writes
		close(gone)
		wg.Wait()
		stop()
		<-ran
		s.Close()
		crashCheck(t, next, &acked)
		s = next
	}
}

func TestPhraseAndFileOfKeys(t *testing.T) {
	root := NewRoot()
	words := strings.Fields(root.Phrase())
	if got, err := ParsePhrase(" " + strings.ToUpper(strings.Join(words, "\n ")) + " "); err != nil || got != root {
		t.Fatalf("%v", err)
	}
	for name, change := range map[string]func([]string) []string{
		"one word is missing":       func(w []string) []string { return w[1:] },
		"two words change places":   func(w []string) []string { w[0], w[1] = w[1], w[0]; return w },
		"a word is not in the list": func(w []string) []string { w[3] = "holdfast"; return w },
		"nothing":                   func([]string) []string { return nil },
	} {
		w := change(append([]string(nil), words...))
		if words[0] == words[1] && name == "two words change places" {
			continue
		}
		got, err := ParsePhrase(strings.Join(w, " "))
		if !errors.Is(err, ErrPhrase) && got == root {
			t.Errorf("%s: %v", name, err)
		}
		// The words of an error may be those of the list: it shows none of the phrase's if it is the same for another.
		other := strings.Fields((Root{1, 2, 3}).Phrase())
		if _, again := ParsePhrase(strings.Join(change(other), " ")); err != nil && again != nil && err.Error() != again.Error() {
			t.Errorf("%s: the error depends on the phrase: %v; %v", name, err, again)
		}
	}
	// The published vector of BIP39 for 32 zero bytes.
	if got := (Root{}).Phrase(); got != strings.Repeat("abandon ", 23)+"art" {
		t.Errorf("zero root: %s", got)
	}

	keys, err := root.Keys(2)
	if err != nil {
		t.Fatal(err)
	}
	secret := func(b [32]byte) string { return hex.EncodeToString(b[:]) }
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%x", "%q", "%d"} {
		if got := fmt.Sprintf(verb, root); got != "[root]" {
			t.Errorf("%s of a root: %s", verb, got)
		}
		if got := fmt.Sprintf(verb, keys); got != "[keys]" {
			t.Errorf("%s of keys: %s", verb, got)
		}
	}
	file := filepath.Join(t.TempDir(), "keys")
	if err := SaveKeys(file, keys); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for name, k := range map[string][32]byte{"the root": root, "the recovery key": root.Recovery()} {
		if bytes.Contains(b, k[:]) || bytes.Contains(b, []byte(secret(k))) {
			t.Errorf("%s is in the front end's file", name)
		}
	}
	if k := root.derive(labelHeads); !bytes.Contains(b, k[:]) {
		t.Error("control: the search finds nothing")
	}
	got, err := LoadKeys(file)
	if err != nil || got.Epoch != 2 || got.heads != keys.heads || got.tls != keys.tls || got.shards != keys.shards || len(got.stores) != 3 {
		t.Fatalf("%v", err)
	}
	for e, k := range keys.stores {
		if got.stores[e] != k {
			t.Errorf("key of epoch %d", e)
		}
	}
	for i := range b {
		bad := bytes.Clone(b)
		bad[i] ^= 1
		if _, err := parseKeys(bad); err == nil {
			t.Fatalf("byte %d was changed, and nobody saw it", i)
		}
	}
	if err := os.Chmod(file, 0o640); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadKeys(file); err == nil {
		t.Error("a file that others may read was taken")
	}
}

// Locations fail before and after what they do, and take their time, all of them, again and again; front ends come and go.
// What was acknowledged is there, once.
func TestLocationsThatFailAtRandom(t *testing.T) {
	ctx := t.Context()
	b := newBed(t, 4, 6)
	b.change = func(c *Config) { c.Snapshot = 100 << 10; c.Timeout = 3 * time.Second }
	whim := func(ctx context.Context, op string) error {
		switch mrand.IntN(50) {
		case 0:
			return errFault
		case 1:
			return location.ErrBusy
		case 2, 3:
			time.Sleep(time.Duration(mrand.IntN(10)) * time.Millisecond)
		}
		return nil
	}
	calm := func() {
		for _, f := range b.faults {
			f.set(nil, nil)
		}
	}
	var acked [crashWorkers]int
	s := b.open()
	for round := range 6 {
		for _, f := range b.faults {
			f.set(whim, whim)
		}
		run, stop := context.WithCancel(ctx)
		ran := make(chan error, 1)
		go func() { ran <- s.Run(run) }()
		var wg sync.WaitGroup
		gone := make(chan struct{})
		for w := range crashWorkers {
			wg.Go(func() {
				for {
					select {
					case <-gone:
						return
					default:
					}
					if err := crashStep(ctx, s, w, acked[w]+1); err != nil {
						return // whether it happened nobody knows; crashCheck looks
					}
					acked[w]++
				}
			})
		}
		time.Sleep(300 * time.Millisecond)
		if round%2 == 0 {
			s.Close() // in the middle
		}
		close(gone)
		wg.Wait()
		stop()
		<-ran
		s.Close()
		calm()
		if round%3 == 0 {
			s = b.restored()
		} else {
			s = b.opened()
		}
		crashCheck(t, s, &acked)
	}
	total := 0
	for _, n := range acked {
		total += n
	}
	if total < 100 {
		t.Errorf("%d changes: nothing was tried", total)
	}
	t.Logf("%d changes", total)
}
