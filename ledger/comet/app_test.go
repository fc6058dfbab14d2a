package comet

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"testing"
	"time"

	abci "github.com/cometbft/cometbft/abci/types"
	"github.com/cometbft/cometbft/crypto/mldsa65"
	cmtproto "github.com/cometbft/cometbft/proto/tendermint/types"
	"github.com/cometbft/cometbft/types"

	"holdfast/internal/canonical"
)

// bench is an app without CometBFT around it, and the keys of its validators in the order of the set.
type appBench struct {
	*app
	keys []mldsa65.PrivKey
	last abci.CommitInfo
}

func newAppBench(t *testing.T, n int) *appBench {
	t.Helper()
	byAddress := map[string]mldsa65.PrivKey{}
	g := Genesis{Chain: "unit", Time: time.Unix(1_700_000_000, 0)}
	for range n {
		k, err := mldsa65.GenPrivKey()
		if err != nil {
			t.Fatal(err)
		}
		byAddress[string(k.PubKey().Address())] = k
		g.Validators = append(g.Validators, Member{Key: k.PubKey().Bytes(), Power: 1})
	}
	d, err := openDisk(t.TempDir(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.close() })
	a, err := newApp(&Config{Genesis: g, Machine: kvMachine(), States: 4, VerifyExtension: func(b []byte) error {
		if bytes.HasPrefix(b, []byte("malformed")) {
			return errors.New("malformed")
		}
		return nil
	}}, d.table(tableMachine), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.InitChain(context.Background(), nil); err != nil {
		t.Fatal(err)
	}
	b := &appBench{app: a}
	set, err := g.validators()
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range set.Validators {
		b.keys = append(b.keys, byAddress[string(v.Address)])
		b.last.Votes = append(b.last.Votes, abci.VoteInfo{Validator: abci.Validator{Address: v.Address, Power: 1}, BlockIdFlag: cmtproto.BlockIDFlagCommit})
	}
	return b
}

func (b *appBench) spoken(t *testing.T, i int, chain string, height int64, round int32, data string) spoken {
	t.Helper()
	sig, err := b.keys[i].Sign(types.VoteExtensionSignBytes(chain, &cmtproto.Vote{Height: height, Round: round, Extension: []byte(data)}))
	if err != nil {
		t.Fatal(err)
	}
	return spoken{Data: []byte(data), Signature: sig}
}

func TestProposalsWithoutATrueExtendedCommitAreRefused(t *testing.T) {
	const h = 7
	good := func(t *testing.T, b *appBench) extended {
		x := extended{Version: 1, Height: h - 1}
		for i := range b.keys {
			x.Votes = append(x.Votes, b.spoken(t, i, "unit", h-1, 0, fmt.Sprint("heard by ", i)))
		}
		return x
	}
	for name, c := range map[string]struct {
		edit func(t *testing.T, b *appBench, x *extended)
		raw  func([]byte) [][]byte // all transactions of the block; nil means the extended commit alone
		ok   bool
	}{
		"control: what every validator said": {ok: true},
		"control: with a transaction":        {raw: func(x []byte) [][]byte { return [][]byte{x, []byte("1:a=1|good")} }, ok: true},
		"control: one of four was silent, and is so in the commit": {edit: func(t *testing.T, b *appBench, x *extended) {
			b.last.Votes[2].BlockIdFlag = cmtproto.BlockIDFlagAbsent
			x.Votes = append(x.Votes[:2:2], x.Votes[3])
		}, ok: true},
		"two of four are not more than 2/3": {edit: func(t *testing.T, b *appBench, x *extended) {
			b.last.Votes[2].BlockIdFlag = cmtproto.BlockIDFlagAbsent
			b.last.Votes[3].BlockIdFlag = cmtproto.BlockIDFlagNil
			x.Votes = x.Votes[:2]
		}},
		"an extension changed by the proposer": {edit: func(t *testing.T, b *appBench, x *extended) { x.Votes[1].Data = []byte("heard by 9") }},
		"an extension emptied by the proposer": {edit: func(t *testing.T, b *appBench, x *extended) { x.Votes[1].Data = nil }},
		"a forged signature":                   {edit: func(t *testing.T, b *appBench, x *extended) { x.Votes[1].Signature[8] ^= 1 }},
		"one validator twice":                  {edit: func(t *testing.T, b *appBench, x *extended) { x.Votes[1] = x.Votes[0] }},
		"one validator too many":               {edit: func(t *testing.T, b *appBench, x *extended) { x.Votes = append(x.Votes, x.Votes[0]) }},
		"one validator left out":               {edit: func(t *testing.T, b *appBench, x *extended) { x.Votes = x.Votes[:3] }},
		"another order":                        {edit: func(t *testing.T, b *appBench, x *extended) { x.Votes[0], x.Votes[1] = x.Votes[1], x.Votes[0] }},
		"an extension of another height": {edit: func(t *testing.T, b *appBench, x *extended) {
			x.Votes[1] = b.spoken(t, 1, "unit", h-2, 0, "heard by 1")
		}},
		"an extension of another round": {edit: func(t *testing.T, b *appBench, x *extended) {
			x.Votes[1] = b.spoken(t, 1, "unit", h-1, 1, "heard by 1")
		}},
		"an extension of another chain": {edit: func(t *testing.T, b *appBench, x *extended) {
			x.Votes[1] = b.spoken(t, 1, "other", h-1, 0, "heard by 1")
		}},
		"an extended commit of another height": {edit: func(t *testing.T, b *appBench, x *extended) {
			x.Height = h - 2
			for i := range x.Votes {
				x.Votes[i] = b.spoken(t, i, "unit", h-2, 0, "old")
			}
		}},
		"an extended commit of another round": {edit: func(t *testing.T, b *appBench, x *extended) {
			x.Round = 1
			for i := range x.Votes {
				x.Votes[i] = b.spoken(t, i, "unit", h-1, 1, "old")
			}
		}},
		"an extension that is not well formed": {edit: func(t *testing.T, b *appBench, x *extended) {
			x.Votes[1] = b.spoken(t, 1, "unit", h-1, 0, "malformed")
		}},
		"an extension that is too long": {edit: func(t *testing.T, b *appBench, x *extended) {
			x.Votes[1] = b.spoken(t, 1, "unit", h-1, 0, string(make([]byte, MaxExtension+1)))
		}},
		"a validator that nobody knows": {edit: func(t *testing.T, b *appBench, x *extended) {
			k, err := mldsa65.GenPrivKey()
			if err != nil {
				t.Fatal(err)
			}
			b.keys[1] = k
			b.last.Votes[1].Validator.Address = k.PubKey().Address()
			x.Votes[1] = b.spoken(t, 1, "unit", h-1, 0, "heard by 1")
		}},
		"another version":                      {edit: func(t *testing.T, b *appBench, x *extended) { x.Version = 2 }},
		"no extended commit":                   {raw: func([]byte) [][]byte { return nil }},
		"a transaction in its place":           {raw: func([]byte) [][]byte { return [][]byte{[]byte("1:a=1|good")} }},
		"a transaction before it":              {raw: func(x []byte) [][]byte { return [][]byte{[]byte("1:a=1|good"), x} }},
		"bytes after it":                       {raw: func(x []byte) [][]byte { return [][]byte{append(x, 0)} }},
		"a transaction whose signature is bad": {raw: func(x []byte) [][]byte { return [][]byte{x, []byte("1:a=1|bad")} }},
		"an empty transaction":                 {raw: func(x []byte) [][]byte { return [][]byte{x, {}} }},
		"a transaction that is too long": {raw: func(x []byte) [][]byte {
			return [][]byte{x, append(append([]byte("1:a="), make([]byte, MaxTx)...), "|good"...)}
		}},
		"the wake": {raw: func(x []byte) [][]byte { return [][]byte{x, []byte(wake)} }},
	} {
		t.Run(name, func(t *testing.T) {
			b := newAppBench(t, 4)
			x := good(t, b)
			if c.edit != nil {
				c.edit(t, b, &x)
			}
			txs := [][]byte{canonical.Encode(x)}
			if c.raw != nil {
				txs = c.raw(txs[0])
			}
			r, err := b.ProcessProposal(context.Background(), &abci.RequestProcessProposal{Height: h, Txs: txs, ProposedLastCommit: b.last})
			if err != nil {
				t.Fatal(err)
			}
			if r.IsAccepted() != c.ok {
				t.Fatalf("accepted is %v", r.IsAccepted())
			}
		})
	}
}

func TestAnExtensionIsLookedAtBeforeItsVoteCounts(t *testing.T) {
	b := newAppBench(t, 1)
	for name, c := range map[string]struct {
		data []byte
		ok   bool
	}{
		"control: well formed": {[]byte("fine"), true},
		"control: empty":       {nil, true},
		"malformed":            {[]byte("malformed"), false},
		"too long":             {make([]byte, MaxExtension+1), false},
	} {
		r, err := b.VerifyVoteExtension(context.Background(), &abci.RequestVerifyVoteExtension{Height: 3, VoteExtension: c.data})
		if err != nil || r.IsAccepted() != c.ok {
			t.Errorf("%s: %v, %v", name, r, err)
		}
	}
}

func TestAProposerLeavesOutWhatOthersWouldRefuse(t *testing.T) {
	b := newAppBench(t, 1)
	r, err := b.PrepareProposal(context.Background(), &abci.RequestPrepareProposal{Height: 1, MaxTxBytes: 1 << 20, Txs: [][]byte{
		[]byte("1:a=1|good"), []byte("2:a=1|bad"), []byte(wake), []byte("3:a=1|good"), bytes.Repeat([]byte{'x'}, 2<<20),
	}})
	if err != nil || len(r.Txs) != 2 || string(r.Txs[1]) != "3:a=1|good" {
		t.Fatalf("%q, %v", r.Txs, err)
	}
}

func TestARepeatedTransactionKeepsItsFirstSuccess(t *testing.T) {
	b := newAppBench(t, 1)
	block := func(h int64, txs ...string) {
		t.Helper()
		r := &abci.RequestFinalizeBlock{Height: h, Time: time.Unix(1_700_000_000+h, 0), DecidedLastCommit: b.last}
		if h > 1 {
			x := extended{Version: 1, Height: h - 1, Votes: []spoken{{Data: []byte("x")}}}
			r.Txs = append(r.Txs, canonical.Encode(x))
		}
		for _, tx := range txs {
			r.Txs = append(r.Txs, []byte(tx))
		}
		out, err := b.FinalizeBlock(context.Background(), r)
		if err != nil || len(out.TxResults) != len(r.Txs) {
			t.Fatal(out, err)
		}
		if _, err := b.Commit(context.Background(), nil); err != nil {
			t.Fatal(err)
		}
	}
	block(1, "1:a=1|good", "1:a=1|good")
	block(2, "1:a=1|good")
	s, ok, err := b.result(sha256.Sum256([]byte("1:a=1|good")))
	if err != nil || !ok || s.Code != 0 || s.Height != 1 {
		t.Fatalf("%+v %v %v", s, ok, err)
	}
	// Old results are forgotten, and the state is what a restart loads.
	w := b.disk.batch()
	if err := errors.Join(b.pruneResults(w, 2), w.Write()); err != nil {
		t.Fatal(err)
	}
	if _, ok, err := b.result(sha256.Sum256([]byte("1:a=1|good"))); ok || err != nil {
		t.Fatalf("an old result is still there: %v", err)
	}
	again, err := newApp(&Config{Genesis: b.genesis, Machine: kvMachine(), States: 4}, b.disk, b.log)
	if err != nil || again.height != 2 || again.state.Root() != b.state.Root() {
		t.Fatalf("%+v, %v", again, err)
	}
	// Another genesis does not get this home.
	g := b.genesis
	g.State = []byte("another")
	if _, err := newApp(&Config{Genesis: g, Machine: kvMachine()}, b.disk, b.log); err == nil {
		t.Fatal("a home was taken over by another chain")
	}
}

func FuzzWire(f *testing.F) {
	f.Add(canonical.Encode(readRequest{Keys: [][]byte{[]byte("a")}, MinHeight: 3}))
	f.Add(canonical.Encode(watchRequest{After: 9}))
	f.Add(canonical.Encode(readAnswer{Head: head{Signed: []byte{1}}, Entries: []entry{{Present: true, Value: []byte("v")}}}))
	f.Add(canonical.Encode(extended{Version: 1, Height: 2, Votes: []spoken{{Data: []byte("x"), Signature: []byte("y")}}}))
	last := abci.CommitInfo{Votes: []abci.VoteInfo{{BlockIdFlag: cmtproto.BlockIDFlagCommit, Validator: abci.Validator{Address: []byte("a"), Power: 1}}}}
	f.Fuzz(func(t *testing.T, b []byte) {
		var r readRequest
		if decode(b, maxRequest, &r) == nil && r.check() == nil && !bytes.Equal(canonical.Encode(r), b) {
			t.Error("a request has two encodings")
		}
		var a readAnswer
		if decode(b, maxAnswer, &a) == nil {
			decodeHead(a.Head)
		}
		decodeHead(head{Signed: b, Validators: b})
		heard(3, b, last)
		var s = make([]byte, signSlot)
		copy(s, b)
		decodeSigned(s)
	})
}
