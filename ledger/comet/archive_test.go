package comet

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"iter"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	sm "github.com/cometbft/cometbft/state"

	"holdfast/internal/canonical"
)

// keeper is a kv that knows which keys the transactions of its block set.
type keeper struct {
	*kv
	keys map[int]string
}

func (k keeper) Apply(b Block) (State, []Result) {
	next, res := k.kv.Apply(b)
	out := keeper{next.(*kv), map[int]string{}}
	for i, r := range res {
		if r.Code == 0 {
			_, out.keys[i], _, _ = kvParse(b.Txs[i])
		}
	}
	return out, res
}

func (k keeper) Changes(since State) iter.Seq2[string, []byte] {
	if since == nil {
		return k.kv.Changes(nil)
	}
	return k.kv.Changes(since.(keeper).kv)
}

// archiving makes a validator keep what sets a key that begins with "keep-".
func archiving(_ int, c *Config) {
	m := kvMachine()
	c.Machine = Machine{
		Genesis: func(g Genesis) (State, error) { s, err := m.Genesis(g); return keeper{s.(*kv), nil}, err },
		Load: func(h int64, all iter.Seq2[string, []byte]) (State, error) {
			s, err := m.Load(h, all)
			return keeper{s.(*kv), nil}, err
		},
	}
	c.Archive = func(s State, i int) []string {
		if k := s.(keeper).keys[i]; strings.HasPrefix(k, "keep-") {
			return []string{k}
		}
		return nil
	}
}

func txsOf(blocks []Archived) (out []string) {
	for _, b := range blocks {
		for _, x := range b.Txs {
			out = append(out, string(x.Tx))
		}
	}
	return out
}

// What is archived outlives the blocks that it was in, restarts, and is with a validator that was away; who has it believes it
// with nothing but the genesis.
func TestTheArchiveOutlivesItsBlocks(t *testing.T) {
	g := newGrid(t, 4, archiving)
	for i := range 4 {
		g.start(i)
	}
	c := g.client(nil)
	ctx := within(t, 90*time.Second)
	put := func(tx string) int64 {
		t.Helper()
		r, err := c.Submit(ctx, []byte(tx+"|good"))
		if err != nil || r.Code != 0 {
			t.Fatal(r, err)
		}
		return r.Height
	}
	put("1:keep-a=1")
	put("2:other=1")
	put("3:keep-b=1")
	g.stop(0)
	last := put("4:keep-a=2")
	v := g.start(0)
	await(t, v, 20*time.Second)
	only := g.client(func(c *ClientConfig) { c.Servers = c.Servers[:1] })
	if _, err := only.ReadAt(ctx, last); err != nil {
		t.Fatal(err)
	}
	want := []string{"1:keep-a=1|good", "4:keep-a=2|good"}
	check := func(when string) []Archived {
		t.Helper()
		since, blocks, err := only.Archive(ctx, "keep-a", 0)
		if err != nil || since != 1 || !slices.Equal(txsOf(blocks), want) {
			t.Fatalf("%s: %d, %q, %v; want %q", when, since, txsOf(blocks), err, want)
		}
		heads, err := VerifyArchive(&g.genesis, blocks, time.Now())
		if err != nil || heads[len(heads)-1].Height != last {
			t.Fatalf("%s: %v, %v", when, heads, err)
		}
		return blocks
	}
	check("after it caught up")

	// The blocks go, as they do after a while.
	st, err := sm.NewStore(v.app.disk.disk.table(tableState), sm.StoreOptions{}).Load()
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := v.blocks.PruneBlocks(last+1, st); err != nil {
		t.Fatal(err)
	}
	if v.blocks.LoadBlock(last) != nil {
		t.Fatalf("control: block %d is still there", last)
	}
	check("without the blocks")
	g.stop(0)
	await(t, g.start(0), 20*time.Second)
	blocks := check("after a restart")
	if _, later, err := only.Archive(ctx, "keep-a", last-1); err != nil || !slices.Equal(txsOf(later), want[1:]) {
		t.Errorf("after a height: %q, %v", txsOf(later), err)
	}
	if _, none, err := only.Archive(ctx, "keep-", 0); err != nil || len(none) != 0 {
		t.Errorf("under the beginning of a name: %q, %v", txsOf(none), err)
	}

	// Whoever asks no server is told lies by none.
	head, entries, err := only.Prove(ctx, last, "keep-a")
	if err != nil {
		t.Fatal(err)
	}
	blocks = append(blocks, head)
	heads, err := VerifyArchive(&g.genesis, blocks, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if err := kvVerify(heads[len(heads)-1].Root, "keep-a", entries[0].Value, entries[0].Proof); err != nil || string(entries[0].Value) != "2" {
		t.Errorf("%q, %v", entries[0].Value, err)
	}
	flips(t, canonical.Encode(blocks), func(b []byte) error {
		var a []Archived
		if err := canonical.Decode(b, 1<<20, &a); err != nil {
			return err
		}
		_, err := VerifyArchive(&g.genesis, a, time.Now())
		return err
	})
	other := g.genesis
	other.Chain = "another"
	change := func(f func([]Archived)) []Archived {
		var a []Archived
		if err := canonical.Decode(canonical.Encode(blocks), 1<<20, &a); err != nil {
			t.Fatal(err)
		}
		f(a)
		return a
	}
	if _, err := VerifyArchive(&other, blocks, time.Now()); !errors.Is(err, ErrProof) {
		t.Errorf("of another chain: %v", err)
	}
	for name, a := range map[string][]Archived{
		"in another order":     change(func(a []Archived) { a[0], a[1] = a[1], a[0] }),
		"one block twice":      append(slices.Clone(blocks[:1]), blocks...),
		"a transaction put in": change(func(a []Archived) { a[0].Txs = append(a[0].Txs, ArchivedTx{9, []byte("x")}) }),
		"a transaction with its hash": change(func(a []Archived) {
			a[0].Txs[0].Tx = []byte("x")
			a[0].Hashes[a[0].Txs[0].Index] = sha256.Sum256([]byte("x"))
		}),
		"without hashes":            change(func(a []Archived) { a[0].Hashes = nil }),
		"the same validators again": change(func(a []Archived) { a[1].Validators = voters(&g.genesis) }),
	} {
		if _, err := VerifyArchive(&g.genesis, a, time.Now()); !errors.Is(err, ErrProof) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := VerifyArchive(&g.genesis, blocks, time.Now().Add(-time.Hour)); !errors.Is(err, ErrProof) {
		t.Errorf("headers of the future: %v", err)
	}
}

func voters(g *Genesis) (out []Voter) {
	set, err := g.validators()
	if err != nil {
		panic(err)
	}
	for _, v := range set.Validators {
		out = append(out, Voter{v.PubKey.Bytes(), v.VotingPower})
	}
	return out
}

// flips changes one bit after another, of all or of many bytes, and wants each found.
func flips(t *testing.T, good []byte, verify func([]byte) error) {
	t.Helper()
	if err := verify(good); err != nil {
		t.Fatal("control:", err)
	}
	n := 500
	if os.Getenv("HOLDFAST_LONG") != "" {
		n = len(good)
	}
	for i := range n {
		at := i
		if n < len(good) {
			at = rand.IntN(len(good))
		}
		bit := byte(1) << rand.IntN(8)
		b := bytes.Clone(good)
		b[at] ^= bit
		if verify(b) == nil {
			t.Fatalf("bit %#x of byte %d of %d was flipped and nobody saw it", bit, at, len(good))
		}
	}
}

// An archive answers a page at a time.
func TestALongArchiveComesInPages(t *testing.T) {
	g := newGrid(t, 1, archiving)
	await(t, g.start(0), 20*time.Second)
	c := g.client(nil)
	ctx := within(t, 60*time.Second)
	var want []string
	for i := range 8 {
		tx := strconv.Itoa(i) + ":keep-x=" + strings.Repeat("x", MaxTx-100) + "|good"
		if r, err := c.Submit(ctx, []byte(tx)); err != nil || r.Code != 0 {
			t.Fatal(r, err)
		}
		want = append(want, tx)
	}
	if size := 8 * MaxTx; size < maxReadSize/2 {
		t.Fatalf("%d bytes are one page", size)
	}
	_, blocks, err := c.Archive(ctx, "keep-x", 0)
	if err != nil || !slices.Equal(txsOf(blocks), want) {
		t.Fatalf("%d transactions, %v", len(txsOf(blocks)), err)
	}
	if _, err := VerifyArchive(&g.genesis, blocks, time.Now()); err != nil {
		t.Fatal(err)
	}
}
