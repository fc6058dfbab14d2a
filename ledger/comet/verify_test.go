package comet

import (
	"errors"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	sm "github.com/cometbft/cometbft/state"
	"github.com/cometbft/cometbft/store"

	"holdfast/internal/canonical"
)

// stopped is a validator that made some blocks and was stopped.
func stopped(t *testing.T) *Config {
	g := newGrid(t, 1, func(i int, c *Config) {
		archiving(i, c)
		c.Extend = func(int64) []byte { return []byte("heard") }
	})
	await(t, g.start(0), 20*time.Second)
	c := g.client(nil)
	for i := range 6 {
		id := strconv.Itoa(i)
		if r, err := c.Submit(within(t, 30*time.Second), []byte(id+":keep-"+id+"="+strings.Repeat("x", 1<<(2*i))+"|good")); err != nil || r.Code != 0 {
			t.Fatal(r, err)
		}
	}
	g.stop(0)
	return &g.configs[0]
}

func with(t *testing.T, c *Config, f func(d *disk)) {
	t.Helper()
	d, err := openDisk(filepath.Join(c.Home, chainDir), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	f(d)
	if err := d.close(); err != nil {
		t.Fatal(err)
	}
}

// rows are all rows of a table, in their order.
func rows(t *testing.T, c *Config, prefix string) (keys, values [][]byte) {
	with(t, c, func(d *disk) {
		it, err := d.table(prefix).iterator(nil, nil, false)
		if err != nil {
			t.Fatal(err)
		}
		defer it.Close()
		for ; it.Valid(); it.Next() {
			keys, values = append(keys, it.Key()), append(values, it.Value())
		}
	})
	return keys, values
}

// A chain that was not touched is verified down to its last row; one bit in any row of its blocks or of the machine is found,
// and so is a row that is gone or that was put in.
func TestVerifyFindsEveryBit(t *testing.T) {
	c := stopped(t)
	ctx := within(t, 5*time.Minute)
	var seen []int64
	good, err := VerifyHome(ctx, c, func(h, _ int64) { seen = append(seen, h) })
	if err != nil {
		t.Fatal(err)
	}
	if !good.Replayed || good.First != 1 || good.Last < 6 || good.State != good.Last || int64(len(seen)) != good.Last {
		t.Fatalf("%+v, %v", good, seen)
	}
	n := 0
	for _, prefix := range []string{tableBlocks, tableMachine} {
		keys, values := rows(t, c, prefix)
		n += len(keys)
		few := max(1, len(keys)/80)
		if os.Getenv("HOLDFAST_LONG") != "" {
			few = 1
		}
		kinds := map[string]bool{}
		for i, k := range keys {
			kind, _, _ := strings.Cut(string(k), ":")
			if prefix == tableMachine {
				kind = string(k[:1])
			}
			if kinds[kind] && i%few != 0 {
				continue
			}
			kinds[kind] = true
			for what, change := range map[string]func(*table) error{
				"flipped": func(t *table) error {
					b := append([]byte{}, values[i]...)
					if len(b) == 0 {
						return t.Set(k, []byte{1})
					}
					b[rand.IntN(len(b))] ^= 1 << rand.IntN(8)
					return t.Set(k, b)
				},
				"gone":     func(t *table) error { return t.Delete(k) },
				"one more": func(t *table) error { return t.Set(append(append([]byte{}, k...), 'x'), values[i]) },
			} {
				with(t, c, func(d *disk) {
					if err := change(d.table(prefix)); err != nil {
						t.Fatal(err)
					}
				})
				if got, err := VerifyHome(ctx, c, nil); err == nil {
					t.Errorf("%s%q: %s, and nobody saw it: %+v", prefix, k, what, got)
				} else if !errors.Is(err, ErrDamaged) && !strings.Contains(err.Error(), "no state yet") {
					t.Errorf("%s%q: %s: %v", prefix, k, what, err)
				}
				with(t, c, func(d *disk) {
					t0 := d.table(prefix)
					if err := errors.Join(t0.Delete(append(append([]byte{}, k...), 'x')), t0.Set(k, values[i])); err != nil {
						t.Fatal(err)
					}
				})
			}
		}
		t.Logf("%s: %d rows of the kinds %v", prefix, len(keys), kinds)
	}
	if good.Rows != int64(n) {
		t.Errorf("%d rows were checked of %d", good.Rows, n)
	}
	if again, err := VerifyHome(ctx, c, nil); err != nil || *again != *good {
		t.Errorf("control: %+v, %v", again, err)
	}
	other := *c
	other.Genesis.Chain = "another"
	if _, err := VerifyHome(ctx, &other, nil); !errors.Is(err, ErrDamaged) {
		t.Errorf("with another genesis: %v", err)
	}
}

// A bit that a disk flips in a file is found, or was in a place that says nothing: what is verified is never something else.
func TestVerifyFindsWhatADiskFlips(t *testing.T) {
	c := stopped(t)
	ctx := within(t, 2*time.Minute)
	with(t, c, func(d *disk) { // into tables on the disk
		if err := d.db.Compact(ctx, []byte{0}, []byte{0xff}, false); err != nil {
			t.Fatal(err)
		}
	})
	good, err := VerifyHome(ctx, c, nil)
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for range 60 {
		hurt := *c
		hurt.Home = t.TempDir()
		if err := os.CopyFS(hurt.Home, os.DirFS(c.Home)); err != nil {
			t.Fatal(err)
		}
		files, err := filepath.Glob(filepath.Join(hurt.Home, chainDir, "*.sst"))
		if err != nil || len(files) == 0 {
			t.Fatal(files, err)
		}
		p := files[rand.IntN(len(files))]
		b, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		at := rand.IntN(len(b))
		b[at] ^= 1 << rand.IntN(8)
		if err := os.WriteFile(p, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := VerifyHome(ctx, &hurt, nil); err != nil {
			found++
		} else if *got != *good {
			t.Errorf("byte %d of %s flipped: verified as %+v, it is %+v", at, filepath.Base(p), got, good)
		}
	}
	t.Logf("%d of 60 were found", found)
	if found == 0 {
		t.Error("no flipped bit was found")
	}
}

// What is left of a chain whose first blocks are gone is verified without executing it.
func TestVerifyWithoutTheFirstBlocks(t *testing.T) {
	c := stopped(t)
	ctx := within(t, time.Minute)
	with(t, c, func(d *disk) {
		st, err := sm.NewStore(d.table(tableState), sm.StoreOptions{}).Load()
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := store.NewBlockStore(d.table(tableBlocks)).PruneBlocks(4, st); err != nil {
			t.Fatal(err)
		}
	})
	got, err := VerifyHome(ctx, c, nil)
	if err != nil || got.Replayed || got.First != 4 {
		t.Fatalf("%+v, %v", got, err)
	}
	with(t, c, func(d *disk) {
		if err := d.table(tableMachine).Set([]byte(keyValue+"keep-1"), []byte("forged")); err != nil {
			t.Fatal(err)
		}
	})
	if _, err := VerifyHome(ctx, c, nil); !errors.Is(err, ErrDamaged) {
		t.Errorf("a forged record: %v", err)
	}
	var m meta
	with(t, c, func(d *disk) { // and a root that fits it
		s := d.table(tableMachine)
		b, err := s.Get([]byte(keyMeta))
		if err != nil || canonical.Decode(b, 1<<10, &m) != nil {
			t.Fatal(err)
		}
		a, err := newApp(c, d.table("none/"), slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		var broken error
		a.disk = s
		st, err := c.Machine.Load(m.Height, a.stored(&broken))
		if err != nil || broken != nil {
			t.Fatal(err, broken)
		}
		m.Root = st.Root()
		if err := s.Set([]byte(keyMeta), canonical.Encode(m)); err != nil {
			t.Fatal(err)
		}
	})
	if _, err := VerifyHome(ctx, c, nil); !errors.Is(err, ErrDamaged) {
		t.Errorf("a forged record and its root: %v", err)
	}
}
