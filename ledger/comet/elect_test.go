package comet

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"iter"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	abci "github.com/cometbft/cometbft/abci/types"
	"github.com/cometbft/cometbft/crypto/mldsa65"
	cmtproto "github.com/cometbft/cometbft/proto/tendermint/types"
	"github.com/cometbft/cometbft/types"

	"holdfast/internal/canonical"
)

// elector is a kv whose keys under "val/" are the validators, in hex, of power 1 each. Whom a block blames is kept under
// "blamed/".
type elector struct{ *kv }

func electors() Machine {
	return Machine{
		Genesis: func(g Genesis) (State, error) {
			s := elector{&kv{map[string][]byte{}}}
			for _, m := range g.Validators {
				s.m["val/"+hex.EncodeToString(m.Key)] = []byte("1")
			}
			return s, nil
		},
		Load: func(_ int64, all iter.Seq2[string, []byte]) (State, error) {
			return elector{&kv{maps.Collect(all)}}, nil
		},
	}
}

func (s elector) Apply(b Block) (State, []Result) {
	next, res := s.kv.Apply(b)
	n := next.(*kv)
	for _, a := range b.Offenders {
		n.m["blamed/"+string(a)] = []byte("1")
	}
	return elector{n}, res
}

func (s elector) Changes(since State) iter.Seq2[string, []byte] {
	if since == nil {
		return s.kv.Changes(nil)
	}
	return s.kv.Changes(since.(elector).kv)
}

func (s elector) Validators() (out []Member) {
	for _, k := range slices.Sorted(maps.Keys(s.m)) {
		if h, ok := strings.CutPrefix(k, "val/"); ok {
			b, _ := hex.DecodeString(h)
			out = append(out, Member{b, 1})
		}
	}
	return out
}

// signedBy changes a header to be of set, with the votes of those of its members whose keys are given.
func signedBy(t *testing.T, h head, set *types.ValidatorSet, keys []mldsa65.PrivKey, edit func(*types.Header)) head {
	t.Helper()
	sh, _, err := decodeHead(h)
	if err != nil {
		t.Fatal(err)
	}
	edit(sh.Header)
	sh.ValidatorsHash, sh.NextValidatorsHash, sh.ProposerAddress = set.Hash(), set.Hash(), set.Validators[0].Address
	c := sh.Commit
	c.BlockID.Hash, c.Height, c.Signatures = sh.Header.Hash(), sh.Height, nil
	for _, m := range set.Validators {
		i := slices.IndexFunc(keys, func(k mldsa65.PrivKey) bool { return bytes.Equal(k.PubKey().Address(), m.Address) })
		if i < 0 {
			c.Signatures = append(c.Signatures, types.NewCommitSigAbsent())
			continue
		}
		v := &types.Vote{Type: cmtproto.PrecommitType, Height: c.Height, Round: c.Round, BlockID: c.BlockID,
			Timestamp: time.Now().UTC(), ValidatorAddress: m.Address}
		sig, err := keys[i].Sign(types.VoteSignBytes(sh.ChainID, v.ToProto()))
		if err != nil {
			t.Fatal(err)
		}
		c.Signatures = append(c.Signatures, types.CommitSig{BlockIDFlag: types.BlockIDFlagCommit, ValidatorAddress: m.Address, Timestamp: v.Timestamp, Signature: sig})
	}
	out, err := encodeHead(sh, set, nil)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestTheSetOfValidatorsChanges(t *testing.T) {
	g := newGrid(t, 6, func(i int, c *Config) {
		c.Machine = electors()
		c.Genesis.Validators = c.Genesis.Validators[:4] // 4 and 5 follow, until they join
		c.Extend = func(int64) []byte { return []byte{'v', byte('0' + i)} }
	})
	members := g.genesis.Validators
	g.genesis.Validators = members[:4]
	var keys []mldsa65.PrivKey
	for i := range 6 {
		ks, err := loadKeys(g.configs[i].Home)
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, ks.consensus)
	}
	setOf := func(is ...int) *types.ValidatorSet {
		var vs []*types.Validator
		for _, i := range is {
			vs = append(vs, types.NewValidator(keys[i].PubKey(), 1))
		}
		return types.NewValidatorSet(vs)
	}
	var vs []*Validator
	for i := range 6 {
		vs = append(vs, g.start(i))
	}
	for _, v := range vs {
		await(t, v, 60*time.Second)
	}
	ctx := within(t, 4*time.Minute)
	store := FileTrust(filepath.Join(t.TempDir(), "trust"))
	at := func(i int, edit ...func(*ClientConfig)) *Client {
		return g.client(func(c *ClientConfig) {
			c.Servers = []Server{g.server(i)}
			for _, f := range edit {
				f(c)
			}
		})
	}
	remember := func(c *ClientConfig) { c.Trust = store }
	c := at(5, remember)
	n := 0
	put := func(change string) int64 {
		t.Helper()
		n++
		r, err := c.Submit(ctx, fmt.Appendf(nil, "%d:%s|good", n, change))
		if err != nil || r.Code != 0 {
			t.Fatal(r, err)
		}
		// The change votes from the second block on.
		if _, err := c.ReadAt(ctx, r.Height+2, "a"); err != nil {
			t.Fatal(err)
		}
		return r.Height
	}
	name := func(i int) string { return "val/" + hex.EncodeToString(members[i].Key) }
	put("a=1")
	put(name(4) + "=1")
	put(name(0))
	put(name(5) + "=1")
	put(name(1))
	// The set is 2 to 5 by now. Those who left are not needed, and one may be missing.
	g.stop(0)
	g.stop(1)
	g.stop(2)
	put("b=1")
	h := put("c=1")
	for i, want := range []bool{4: true, 5: true} {
		key := "heard/" + string(keys[i].PubKey().Address())
		view, err := c.ReadAt(ctx, h, key)
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := view.Value(key); want && !ok {
			t.Errorf("nobody heard validator %d, which joined", i)
		}
	}
	vs[2] = g.start(2)
	await(t, vs[2], 60*time.Second)
	put(name(2))
	put("d=1")

	// Of the set of the genesis only 3 is left: a new client finds the way over headers between.
	fresh := at(4)
	if view, err := fresh.ReadAt(ctx, h, "c"); err != nil {
		t.Fatal(err)
	} else if _, ok := view.Value("c"); !ok {
		t.Fatal("a new client does not see what was written")
	}
	now := setOf(3, 4, 5)
	if !bytes.Equal(fresh.chain.trusted().ValidatorsHash, now.Hash()) {
		t.Fatal("the newest header is of other validators")
	}

	// A memory leads there too, and nowhere else.
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	again := at(3, remember)
	if _, err := again.Read(ctx, "a"); err != nil {
		t.Fatal("with a memory: ", err)
	}
	if err := again.Close(); err != nil {
		t.Fatal(err)
	}
	raw, err := store.Load()
	if err != nil {
		t.Fatal(err)
	}
	var f trustFile
	if err := canonical.Decode(raw, maxMemory, &f); err != nil {
		t.Fatal(err)
	}
	if len(f.Path) == 0 {
		t.Fatal("the memory does not say how it came to its validators")
	}
	f.Path = nil
	planted := FileTrust(filepath.Join(t.TempDir(), "planted"))
	if err := planted.Save(canonical.Encode(f)); err != nil {
		t.Fatal(err)
	}
	if _, err := at(3, func(c *ClientConfig) { c.Trust = planted }).Read(ctx, "a"); err == nil || !strings.Contains(err.Error(), "cant trust new val set") {
		t.Errorf("a memory whose validators come from nowhere: %v", err)
	}

	// Lies. Each is a later header than the last that is trusted.
	first := setOf(0, 1, 2, 3)
	stranger, err := mldsa65.GenPrivKey()
	if err != nil {
		t.Fatal(err)
	}
	alone := types.NewValidatorSet([]*types.Validator{types.NewValidator(stranger.PubKey(), 1)})
	mixed := types.NewValidatorSet([]*types.Validator{types.NewValidator(stranger.PubKey(), 10), types.NewValidator(keys[3].PubKey(), 1)})
	memory, err := store.Load()
	if err != nil {
		t.Fatal(err)
	}
	top := again.chain.trusted()
	truth, err := encodeHead(top.SignedHeader, top.set, nil)
	if err != nil {
		t.Fatal(err)
	}
	later := func(h *types.Header) { h.Height += 10; h.Time = h.Time.Add(time.Second) }
	fork := func(h *types.Header) { h.AppHash = make([]byte, 32) }
	for _, x := range []struct {
		name string
		head head
		want error
	}{
		{"control: more than 2/3 of the set of now", signedBy(t, truth, now, keys[3:6], later), nil},
		{"a set that was never in force", signedBy(t, truth, alone, []mldsa65.PrivKey{stranger}, later), ErrProof},
		{"one of the set with strangers", signedBy(t, truth, mixed, []mldsa65.PrivKey{stranger}, later), ErrProof},
		{"the set that left", signedBy(t, truth, first, keys[:3], later), ErrProof},
		{"the set of now, signed by who left", signedBy(t, truth, now, keys[:3], later), ErrProof},
		{"the set of now, signed by two of three", signedBy(t, truth, now, keys[3:5], later), ErrProof},
		{"a fork by the set of now", signedBy(t, truth, now, keys[3:6], fork), ErrFork},
		{"a fork by the set that left", signedBy(t, truth, first, keys[:3], fork), ErrProof},
	} {
		copied := FileTrust(filepath.Join(t.TempDir(), "copied"))
		if err := copied.Save(memory); err != nil {
			t.Fatal(err)
		}
		cl := at(3, func(c *ClientConfig) { c.Trust = copied })
		if err := cl.chain.load(); err != nil {
			t.Fatal(err)
		}
		base := cl.chain.trusted()
		b, err := newBlock(x.head, base)
		if err == nil {
			err = cl.chain.verify(ctx, base, b, time.Now(), func(context.Context, int64) (*block, error) {
				return nil, errors.New("nothing is between")
			})
		}
		if x.want == nil && err != nil || x.want != nil && !errors.Is(err, x.want) && !strings.Contains(fmt.Sprint(err), "nothing is between") {
			t.Errorf("%s: %v, want %v", x.name, err, x.want)
		}
	}
}

func TestProofOfTwoVotesReachesTheMachine(t *testing.T) {
	b := newAppBench(t, 4)
	b.app.state = elector{b.app.state.(*kv)}
	liar := b.last.Votes[2].Validator
	for _, x := range []struct {
		kind abci.MisbehaviorType
		want bool
	}{{abci.MisbehaviorType_LIGHT_CLIENT_ATTACK, false}, {abci.MisbehaviorType_DUPLICATE_VOTE, true}} {
		_, err := b.FinalizeBlock(t.Context(), &abci.RequestFinalizeBlock{Height: 1, Time: time.Now(), Misbehavior: []abci.Misbehavior{{Type: x.kind, Validator: liar, Height: 1}}})
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := b.next.(elector).m["blamed/"+string(liar.Address)]; ok != x.want {
			t.Errorf("%v: blamed %v", x.kind, ok)
		}
	}
}

func TestAStateCannotStopTheChain(t *testing.T) {
	key := func() []byte {
		k, err := mldsa65.GenPrivKey()
		if err != nil {
			t.Fatal(err)
		}
		return k.PubKey().Bytes()
	}
	a, b := key(), key()
	state := func(ks ...[]byte) State {
		s := elector{&kv{map[string][]byte{}}}
		for _, k := range ks {
			s.m["val/"+hex.EncodeToString(k)] = []byte("1")
		}
		return s
	}
	for _, x := range []struct {
		name string
		next State
		n    int
		ok   bool
	}{
		{"the same", state(a), 0, true},
		{"one joins", state(a, b), 1, true},
		{"one takes the place of the other", state(b), 2, true},
		{"all leave", state(), 0, false},
		{"a key that is none", state(a, []byte("key")), 0, false},
	} {
		if u, err := updates(state(a), x.next); len(u) != x.n || (err == nil) != x.ok {
			t.Errorf("%s: %d updates, %v", x.name, len(u), err)
		}
	}
}
