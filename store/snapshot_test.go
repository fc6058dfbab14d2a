package store

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	mrand "math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"sync"
	"testing"
	"time"

	"holdfast/disperse"
	"holdfast/store/location"
)

// collect plays the collector: nobody reads what was let go.
func collect(t testing.TB, s *Store) {
	t.Helper()
	err := s.update(t.Context(), func(tx *tx) error {
		c := tx.scan(ownKey(tableGarbage), ownKey(tableGarbage+1), 2)
		var keys, values [][]byte
		for c.Next() {
			keys, values = append(keys, idKey(tableGarbage, [16]byte(c.Key()))), append(values, bytes.Clone(c.Value()))
		}
		if err := c.Close(); err != nil {
			return err
		}
		for i, k := range keys {
			if p, ok := parseSpot(values[i][8:]); ok {
				tx.release(p)
			}
			tx.delete(k)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func rowsOf(t testing.TB, s *Store, table byte) (n int) {
	t.Helper()
	err := s.view(t.Context(), func(v *view) error {
		c := v.scan(ownKey(table), ownKey(table+1), 2)
		for c.Next() {
			n++
		}
		return c.Close()
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestSnapshotLetsGoOfBlocksAndKeepsBodies(t *testing.T) {
	ctx := t.Context()
	b := newBed(t, 4, 6)
	s := b.open()
	bodies := map[string][]byte{}
	put := func(key string) {
		body := make([]byte, 500+mrand.IntN(500))
		rand.Read(body)
		if old, ok := bodies[key]; ok && old != nil {
			var o Body
			err := s.Update(ctx, func(t Tx) error {
				v, _, err := t.Get([]byte(key))
				if err != nil {
					return err
				}
				if err := o.UnmarshalBinary(v); err != nil {
					return err
				}
				t.Drop(o)
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
		}
		bodies[key] = body
		if err := putObject(ctx, s, key, body); err != nil {
			t.Fatal(err)
		}
	}
	check := func(s *Store) {
		t.Helper()
		for key, body := range bodies {
			if got, err := getObject(ctx, s, key); err != nil || !bytes.Equal(got, body) {
				t.Fatalf("%s: %d bytes, %v", key, len(got), err)
			}
		}
	}
	// Blocks of several bodies each, of which most die.
	var wg sync.WaitGroup
	var mu sync.Mutex
	for i := range 64 {
		wg.Go(func() {
			body := make([]byte, 1000)
			rand.Read(body)
			key := fmt.Sprint("many", i)
			if err := putObject(ctx, s, key, body); err != nil {
				t.Error(err)
			}
			mu.Lock()
			bodies[key] = body
			mu.Unlock()
		})
	}
	wg.Wait()
	for i := range 64 {
		if i%8 != 0 {
			put(fmt.Sprint("many", i))
		}
	}
	collect(t, s)
	if err := s.Snapshot(ctx); err != nil { // the first block has few that live
		t.Fatal(err)
	}
	check(s)
	collect(t, s)
	for i := range 64 {
		put(fmt.Sprint("many", i))
	}
	collect(t, s)
	before := rowsOf(t, s, tableBlock)
	if err := s.Snapshot(ctx); err != nil {
		t.Fatal(err)
	}
	collect(t, s)
	if err := s.trim(ctx); err != nil {
		t.Fatal(err)
	}
	after := rowsOf(t, s, tableBlock)
	if after >= before {
		t.Errorf("%d blocks before the snapshot, %d after it", before, after)
	}
	check(s)
	s.Close()
	s = b.opened()
	check(s)
	s.Close()
	s = b.restored()
	if s.Recovery().Snapshot == 0 {
		t.Errorf("restored without the snapshot: %+v", s.Recovery())
	}
	check(s)
}

// A front end comes back with a database of long ago. The blocks that it lacks are gone: the snapshot has them.
func TestAnOldDatabaseIsMadeAnew(t *testing.T) {
	ctx := t.Context()
	b := newBed(t, 4, 6)
	s := b.open()
	if err := putObject(ctx, s, "first", []byte("first body")); err != nil {
		t.Fatal(err)
	}
	s.Close()
	old := b.frontAt + "-old"
	if err := os.CopyFS(old, os.DirFS(b.frontAt)); err != nil {
		t.Fatal(err)
	}
	s = b.open()
	for i := range 5 {
		if err := set(ctx, s, "key", fmt.Sprint(i)); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Snapshot(ctx); err != nil {
		t.Fatal(err)
	}
	gone := 0
	err := s.view(ctx, func(v *view) error {
		c := v.scan(ownKey(tableGarbage), ownKey(tableGarbage+1), 2)
		for c.Next() {
			r, err := parseRecord(c.Value()[9:])
			if err != nil {
				return err
			}
			for i, m := range r.members() {
				if err := s.memberAt(m).Location.Delete(ctx, r.name(i)); err != nil {
					return err
				}
			}
			gone++
		}
		return c.Close()
	})
	if err != nil || gone < 4 {
		t.Fatalf("%d blocks are gone, %v", gone, err)
	}
	if err := set(ctx, s, "key", "last"); err != nil {
		t.Fatal(err)
	}
	s.Close()
	b.frontAt = old
	s = b.opened()
	if got := value(t, s, "key"); got != "last" || s.Recovery().Snapshot == 0 {
		t.Errorf("key is %s, %+v", got, s.Recovery())
	}
	if got, err := getObject(ctx, s, "first"); err != nil || string(got) != "first body" {
		t.Errorf("%q, %v", got, err)
	}
}

// A database that the disk has spoilt says so, and a restore makes it anew in the same directory.
func TestADamagedDatabaseIsRestored(t *testing.T) {
	ctx := t.Context()
	b := newBed(t, 4, 6)
	s := b.open()
	if err := set(ctx, s, "a", "1"); err != nil {
		t.Fatal(err)
	}
	s.Close()
	files, err := filepath.Glob(filepath.Join(b.frontAt, "metadata", "MANIFEST-*"))
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, f := range files {
		if err := os.WriteFile(f, bytes.Repeat([]byte("spoilt "), 1000), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if s, err := Open(ctx, b.config()); err == nil {
		s.Close()
		t.Fatal("it was opened")
	}
	c := b.config()
	c.Restore = true
	if s, err = Open(ctx, c); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if got := value(t, s, "a"); got != "1" {
		t.Errorf("a is %q", got)
	}
}

// A table is gone under a front end that works: Pebble finds out by itself. The front end ends, the process does not.
func TestADatabaseDamagedAtWorkEnds(t *testing.T) {
	ctx := t.Context()
	b := newBed(t, 4, 6)
	s := b.open()
	if err := set(ctx, s, "a", "1"); err != nil {
		t.Fatal(err)
	}
	ran := make(chan error, 1)
	go func() { ran <- s.Run(ctx) }()
	for {
		spoilTables(t, s)
		select {
		case err := <-ran:
			if !errors.Is(err, ErrDamaged) {
				t.Fatalf("it ran until %v", err)
			}
		case <-time.After(50 * time.Millisecond): // what it has in memory hid the damage
			continue
		}
		break
	}
	if err := set(ctx, s, "b", "2"); !errors.Is(err, ErrDamaged) {
		t.Errorf("a change after it: %v", err)
	}
	s.Close()
	if s, err := Open(ctx, b.config()); !errors.Is(err, ErrExists) {
		s.Close()
		t.Fatalf("what was set aside is not asked for: %v", err)
	}
	c := b.config()
	c.Restore = true
	s, err := Open(ctx, c)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if got := value(t, s, "a"); got != "1" {
		t.Errorf("a is %q", got)
	}
}

// spoilTables writes over two tables of a database, and has it read them.
func spoilTables(t *testing.T, s *Store) {
	for range 2 {
		if err := set(t.Context(), s, "spoilt", ""); err != nil && !errors.Is(err, ErrDamaged) {
			t.Fatal(err)
		}
		if err := s.db.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	tables, err := filepath.Glob(filepath.Join(s.metadata(), "*.sst"))
	if err != nil || len(tables) == 0 {
		t.Fatal(tables, err)
	}
	for _, f := range tables {
		if err := os.WriteFile(f, bytes.Repeat([]byte("spoilt "), 1000), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	ctx, stop := context.WithTimeout(t.Context(), time.Second)
	defer stop()
	context.AfterFunc(s.sound, stop)
	s.db.Compact(ctx, []byte{0}, []byte{0xff}, false) // Pebble tries it for ever
}

// The front end dies between the steps of a snapshot. What is left is whole, and the next one goes on.
func TestAFrontEndDiesInASnapshot(t *testing.T) {
	ctx := t.Context()
	for die := range 14 {
		b := newBed(t, 2, 3)
		s := b.open()
		for i := range 30 {
			if err := putObject(ctx, s, fmt.Sprint("key", i), fmt.Appendf(nil, "body %d", i)); err != nil {
				t.Fatal(err)
			}
			if i == 10 {
				if err := s.Snapshot(ctx); err != nil {
					t.Fatal(err)
				}
			}
		}
		collect(t, s)
		var mu sync.Mutex
		left := die
		for _, f := range b.faults {
			f.set(func(_ context.Context, op string) error {
				mu.Lock()
				defer mu.Unlock()
				if op == "put" || op == "append" {
					if left--; left < 0 {
						return errFault
					}
				}
				return nil
			}, nil)
		}
		dying, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
		failed := s.Snapshot(dying)
		cancel()
		s.Close()
		for _, f := range b.faults {
			f.set(nil, nil)
		}
		s = b.restored()
		for i := range 30 {
			if got, err := getObject(ctx, s, fmt.Sprint("key", i)); err != nil || string(got) != fmt.Sprintf("body %d", i) {
				t.Fatalf("died after %d shards (%v): key %d: %q, %v", die, failed, i, got, err)
			}
		}
		if err := s.Snapshot(ctx); err != nil {
			t.Fatal(err)
		}
		s.Close()
	}
}

func TestFormatsOfTheLog(t *testing.T) {
	b := block{sequence: 8, epoch: 3, ops: appendOp(appendOp(nil, opSet, []byte("k"), []byte("v")), opDelete, []byte("k2"), nil), bodies: []byte("bodies")}
	p := b.append(nil)
	got, err := parseBlock(p)
	if err != nil || got.sequence != 8 || got.epoch != 3 || got.prev != nil || !bytes.Equal(got.ops, b.ops) || string(got.bodies) != "bodies" {
		t.Fatalf("%+v, %v", got, err)
	}
	if _, err := got.body(spot{8, 3, 4}); err == nil {
		t.Error("a body beyond the block")
	}
	if v, err := got.body(spot{8, 2, 4}); err != nil || string(v) != "dies" {
		t.Errorf("%q, %v", v, err)
	}
	for i := range p[:blockFixed] {
		if _, err := parseBlock(p[:i]); err == nil {
			t.Errorf("%d bytes are a block", i)
		}
	}
}

// largeHead is one of the most places that the log takes.
func largeHead() *head {
	h := &head{epoch: 3, sequence: 9, key: 1, places: map[uint16]disperse.Place{}}
	r := record{ID: disperse.ID{1}, Size: 77, Scheme: disperse.Scheme{K: 16, N: maxLogPlaces}, Key: 1}
	for i := range uint16(maxLogPlaces) {
		r.Members = append(r.Members, i)
		r.Names = append(r.Names, disperse.Name{byte(i)})
		h.places[i] = disperse.Place{byte(i), 1}
	}
	h.last, h.before, h.snapshot = &ref{8, 3, 9, r}, &ref{7, 2, 4, r}, &snapshotRef{5, r}
	return h
}

func TestHeadsAreSignedAndFit(t *testing.T) {
	keys, err := Root{1}.Keys(0)
	if err != nil {
		t.Fatal(err)
	}
	h := largeHead()
	b := keys.sign(h)
	if len(b) > location.MaxHead {
		t.Errorf("a head of %d places has %d bytes, at most %d", maxLogPlaces, len(b), location.MaxHead)
	}
	got, err := keys.verify(location.Head{Epoch: 3, Sequence: 9, Bytes: b})
	if err != nil || !reflect.DeepEqual(got, h) {
		t.Fatalf("%+v, %v", got, err)
	}
	for name, l := range map[string]location.Head{
		"another epoch":    {Epoch: 4, Sequence: 9, Bytes: b},
		"another sequence": {Epoch: 3, Sequence: 8, Bytes: b},
		"nothing":          {Epoch: 3, Sequence: 9},
	} {
		if _, err := keys.verify(l); !errors.Is(err, errHead) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for i := range b {
		bad := bytes.Clone(b)
		bad[i] ^= 0x80
		if _, err := keys.verify(location.Head{Epoch: 3, Sequence: 9, Bytes: bad}); !errors.Is(err, errHead) {
			t.Fatalf("byte %d was changed: %v", i, err)
		}
	}
}

func FuzzParseBlock(f *testing.F) {
	b := block{sequence: 8, ops: appendOp(nil, opSet, []byte("k"), []byte("v"))}
	f.Add(b.append(nil))
	f.Fuzz(func(t *testing.T, p []byte) {
		b, err := parseBlock(p)
		if err != nil {
			return
		}
		eachOp(b.ops, func(_ byte, k, v []byte) error {
			parseSpot(v)
			parseLive(v)
			parseSnapshotRow(v)
			return nil
		})
		if b.prev == nil {
			if got := b.append(nil); !bytes.Equal(got, p) {
				t.Errorf("%x is written as %x", p, got)
			}
		}
		parseList(p)
	})
}

func FuzzParseHead(f *testing.F) {
	f.Add(largeHead().append(nil))
	f.Fuzz(func(t *testing.T, p []byte) {
		h, err := parseHead(p)
		if err == nil && h.last == nil {
			t.Error("a head without a block")
		}
		parseRef(p)
		parseKeys(p)
	})
}

// BenchmarkUpdate is of small objects: a body of 4 KiB and its metadata, by eight callers.
func BenchmarkUpdate(b *testing.B) {
	for _, size := range []int{0, 4 << 10, 32 << 10} {
		for _, callers := range []int{1, 8, 64} {
			b.Run(fmt.Sprintf("body=%d/c%d", size, callers), func(b *testing.B) {
				bed := newBed(b, 4, 6)
				s := bed.opened()
				body := make([]byte, size)
				rand.Read(body)
				first := s.sequence
				b.SetBytes(int64(size))
				b.ReportAllocs()
				b.ResetTimer()
				var wg sync.WaitGroup
				for c := range callers {
					wg.Go(func() {
						for i := c; i < b.N; i += callers {
							kept, err := s.Write(b.Context(), "", bytes.NewReader(body), int64(size))
							if err == nil {
								err = s.Update(b.Context(), func(t Tx) error {
									t.Set(fmt.Appendf(nil, "bucket/key-%d", i), body[:min(size, 200)])
									t.Keep(kept)
									return nil
								})
							}
							if err != nil {
								b.Error(err)
							}
						}
					})
				}
				wg.Wait()
				b.StopTimer()
				b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "updates/s")
				b.ReportMetric(float64(b.N)/float64(max(1, s.sequence-first)), "updates/block")
			})
		}
	}
}

// BenchmarkMetadata is of reads among many keys. Ten million take minutes: HOLDFAST_LONG.
func BenchmarkMetadata(b *testing.B) {
	sizes := []int{10_000, 1_000_000}
	if os.Getenv("HOLDFAST_LONG") != "" {
		sizes = []int{10_000, 10_000_000}
	}
	for _, n := range sizes {
		s := newBed(b, 1, 1).opened()
		key := func(i int) []byte {
			k := binary.BigEndian.AppendUint64([]byte("bucket/"), uint64(i)*0x9e3779b97f4a7c15)
			return fmt.Appendf(nil, "%x", k)
		}
		value := make([]byte, 200)
		for i := 0; i < n; {
			err := s.Update(b.Context(), func(t Tx) error {
				for range 2000 {
					rand.Read(value[:32])
					t.Set(key(i), value)
					i++
				}
				return nil
			})
			if err != nil {
				b.Fatal(err)
			}
		}
		// What was written long ago has been compacted.
		if err := s.db.Flush(); err != nil {
			b.Fatal(err)
		}
		if err := s.db.Compact(b.Context(), []byte{0}, []byte{2}, true); err != nil {
			b.Fatal(err)
		}
		b.Run(fmt.Sprintf("get/%d", n), func(b *testing.B) {
			for i := range b.N {
				s.View(b.Context(), func(r Reader) error {
					if _, ok, err := r.Get(key(i * 7919 % n)); !ok || err != nil {
						b.Fatal(ok, err)
					}
					return nil
				})
			}
		})
		b.Run(fmt.Sprintf("page/%d", n), func(b *testing.B) {
			for range b.N {
				s.View(b.Context(), func(r Reader) error {
					c := r.Scan([]byte("6"), nil)
					for i := 0; i < 1000 && c.Next(); i++ {
					}
					return c.Close()
				})
			}
		})
		s.Close()
	}
}

// What these say is in docs/formats/store-log.md. If one fails, stores that exist cannot be read any more.
func TestKeysAreFrozen(t *testing.T) {
	var root Root
	for i := range root {
		root[i] = byte(i)
	}
	for label, want := range map[string]string{
		labelStore + "0": "a5c383a46a7e8b37",
		labelStore + "1": "1237ff152d29febc",
		labelShards:      "ac5125a143d45f4d",
		labelHeads:       "f7d5291d95c171fc",
		labelFrontEnd:    "b22f3d5ecafc0b94",
		labelRecovery:    "ee6b8f535a85876a",
	} {
		if got := root.derive(label); fmt.Sprintf("%x", got[:8]) != want {
			t.Errorf("%q: %x", label, got[:8])
		}
	}
	keys, err := root.Keys(1)
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprintf("%x", sha256.Sum256(keys.marshal())); got != "96c65b82ce23b391ad5dfeed89fc8491b1445d043654e7b79574714014e51014" {
		t.Errorf("file of keys: %s", got)
	}
}

func TestBlockIsFrozen(t *testing.T) {
	b := block{sequence: 1, epoch: 2, ops: appendOp(appendOp(nil, opSet, []byte("\x01key"), []byte("value")), opDelete, []byte("\x01old"), nil), bodies: []byte("body")}
	const want = "48464201000000000000000000000001000000000000000200000012000000000104016b65790576616c75650204016f6c64626f6479"
	if got := fmt.Sprintf("%x", b.append(nil)); got != want {
		t.Errorf("block: %s", got)
	}
	at := spot{1, 2, 3}
	if got := fmt.Sprintf("%x", at.append(nil)); got != "62"+"0000000000000001"+"00000002"+"00000003" {
		t.Errorf("spot: %s", got)
	}
}

// Heads and lists of snapshots, by their digests: their parts are frozen byte by byte (TestRecordIsFrozen, TestBlockIsFrozen).
func TestHeadIsFrozen(t *testing.T) {
	keys, err := Root{1}.Keys(0)
	if err != nil {
		t.Fatal(err)
	}
	r := record{ID: disperse.ID{1}, Size: 5, Scheme: disperse.Scheme{K: 1, N: 1}, Members: []uint16{3}, Names: []disperse.Name{{9}}}
	h := &head{epoch: 1, sequence: 2, key: 4, places: map[uint16]disperse.Place{3: {7}}, last: &ref{5, 6, 8, r}}
	const fixed = "48464801" + "0000000000000001" + "0000000000000002" + "00000004" + "0001" + "0003" + "07000000000000000000000000000000" +
		"0095" + "0000000000000005" + "0000000000000006" + "0000000000000008" // and the record
	got := h.append(nil)
	if want := fixed + fmt.Sprintf("%x", appendRecord(nil, &r)) + "0000" + "0000"; fmt.Sprintf("%x", got) != want {
		t.Errorf("head is\n%x, was\n%s", got, want)
	}
	if mac := keys.sign(h)[len(got):]; fmt.Sprintf("%x", mac) != "225f00f91239579cce7e537c136bee4a49448a65d663583f38e8d9b51cf34513" {
		t.Errorf("its code is %x", mac)
	}
	if sum := sha256.Sum256(keys.sign(largeHead())); fmt.Sprintf("%x", sum) != "5802e0f17250a4dd896240ba67dd3590c83af218d9b6521ea53cf5647869d796" {
		t.Errorf("the largest head's digest is %x", sum)
	}
}
