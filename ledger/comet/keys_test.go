package comet

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/cometbft/cometbft/crypto/mldsa65"
	"github.com/cometbft/cometbft/crypto/tmhash"
	cmtproto "github.com/cometbft/cometbft/proto/tendermint/types"
	"github.com/cometbft/cometbft/types"
)

func vote(h int64, r int32, typ cmtproto.SignedMsgType, block byte, at int64) *cmtproto.Vote {
	hash := tmhash.Sum([]byte{block})
	return &cmtproto.Vote{Type: typ, Height: h, Round: r, Timestamp: time.Unix(at, 0).UTC(),
		BlockID: cmtproto.BlockID{Hash: hash, PartSetHeader: cmtproto.PartSetHeader{Total: 1, Hash: hash}}}
}

func TestSignerNeverSignsTwoThatConflict(t *testing.T) {
	home := t.TempDir()
	if _, err := MakeKeys(home); err != nil {
		t.Fatal(err)
	}
	ks, err := loadKeys(home)
	if err != nil {
		t.Fatal(err)
	}
	open := func() *signer {
		s, err := openSigner(home, ks.consensus)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	s := open()
	const prevote, precommit = cmtproto.PrevoteType, cmtproto.PrecommitType
	first := vote(5, 0, precommit, 1, 100)
	if err := s.SignVote("c", first); err != nil {
		t.Fatal(err)
	}
	for _, crash := range []bool{false, true} {
		if crash {
			s.close()
			s = open()
		}
		for name, c := range map[string]struct {
			v  *cmtproto.Vote
			ok bool
		}{
			"control: the same vote":               {vote(5, 0, precommit, 1, 100), true},
			"control: the same vote at a new time": {vote(5, 0, precommit, 1, 200), true},
			"another block":                        {vote(5, 0, precommit, 2, 100), false},
			"an earlier step":                      {vote(5, 0, prevote, 1, 100), false},
			"an earlier height":                    {vote(4, 3, precommit, 1, 100), false},
		} {
			err := s.SignVote("c", c.v)
			if (err == nil) != c.ok || err != nil && !errors.Is(err, errConflict) {
				t.Errorf("%s, crashed %v: %v", name, crash, err)
			}
			if err == nil && (string(c.v.Signature) != string(first.Signature) || !c.v.Timestamp.Equal(first.Timestamp)) {
				t.Errorf("%s, crashed %v: signed anew", name, crash)
			}
		}
	}
	p := &cmtproto.Proposal{Type: cmtproto.ProposalType, Height: 6, Timestamp: time.Unix(1, 0), BlockID: first.BlockID}
	if err := s.SignProposal("c", p); err != nil {
		t.Fatal(err)
	}
	p2 := *p
	p2.BlockID = vote(6, 0, precommit, 9, 1).BlockID
	if err := s.SignProposal("c", &p2); !errors.Is(err, errConflict) {
		t.Errorf("a second proposal: %v", err)
	}
	s.close()

	// A torn write of the newest slot leaves the one before; a lost or damaged file is refused.
	name := filepath.Join(home, signFile)
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	torn := append([]byte{}, b...)
	torn[40] ^= 1 // slot 0 has sequence 2, the proposal
	os.WriteFile(name, torn, 0o600)
	s = open()
	if s.last.height != 5 {
		t.Errorf("after a torn write the last height is %d", s.last.height)
	}
	s.close()
	torn[signSlot+40] ^= 1
	os.WriteFile(name, torn, 0o600)
	if _, err := openSigner(home, ks.consensus); err == nil {
		t.Error("a damaged signing state was accepted")
	}
	os.Remove(name)
	if _, err := openSigner(home, ks.consensus); err == nil {
		t.Error("a lost signing state was accepted")
	}
}

func TestKeysAreStableAndPrivate(t *testing.T) {
	home := filepath.Join(t.TempDir(), "home")
	a, err := MakeKeys(home)
	if err != nil {
		t.Fatal(err)
	}
	b, err := MakeKeys(home)
	if err != nil || string(a.Public) != string(b.Public) || a.Peer != b.Peer {
		t.Fatalf("keys changed: %v", err)
	}
	if st, err := os.Stat(filepath.Join(home, keyFile)); err != nil || st.Mode().Perm() != 0o600 {
		t.Fatal(st.Mode(), err)
	}
	os.Chmod(filepath.Join(home, keyFile), 0o644)
	if _, err := MakeKeys(home); err == nil {
		t.Error("a key that others may read was accepted")
	}
}

func TestDiskRefusesAfterCloseInsteadOfCrashing(t *testing.T) {
	d, err := openDisk(t.TempDir(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	x, y := d.table("x/"), d.table("y/")
	for _, k := range []string{"a", "b", "c"} {
		if err := errors.Join(x.Set([]byte(k), []byte(k)), y.SetSync([]byte(k), []byte("y"+k))); err != nil {
			t.Fatal(err)
		}
	}
	walk := func(reverse bool, start, end []byte) (out string) {
		it, err := x.iterator(start, end, reverse)
		if err != nil {
			t.Fatal(err)
		}
		defer it.Close()
		for ; it.Valid(); it.Next() {
			out += string(it.Key()) + string(it.Value())
		}
		return out
	}
	for _, c := range []struct {
		reverse    bool
		start, end []byte
		want       string
	}{
		{false, nil, nil, "aabbcc"},
		{true, nil, nil, "ccbbaa"},
		{false, []byte("b"), nil, "bbcc"},
		{false, nil, []byte("b"), "aa"},
		{true, []byte("a"), []byte("c"), "bbaa"},
	} {
		if got := walk(c.reverse, c.start, c.end); got != c.want {
			t.Errorf("walk %v: %s", c, got)
		}
	}
	if v, err := x.Get([]byte("nothing")); v != nil || err != nil {
		t.Errorf("absent key: %v %v", v, err)
	}
	if err := d.close(); err != nil {
		t.Fatal(err)
	}
	if _, err := x.Get([]byte("a")); !errors.Is(err, errClosed) {
		t.Errorf("get after close: %v", err)
	}
	if err := x.NewBatch().Set([]byte("a"), []byte{}); !errors.Is(err, errClosed) {
		t.Errorf("batch after close: %v", err)
	}
	if _, err := x.Iterator(nil, nil); !errors.Is(err, errClosed) {
		t.Errorf("iterator after close: %v", err)
	}
}

func TestAKeyProvesItselfAndVotesForNobody(t *testing.T) {
	home := t.TempDir()
	k, err := MakeKeys(home)
	if err != nil {
		t.Fatal(err)
	}
	pub, err := mldsa65.NewPubKeyFromBytes(k.Public)
	if err != nil {
		t.Fatal(err)
	}
	word := []byte("holdfast/validator-join/v1 and a digest")
	if sig, err := Prove(home, word); err != nil || !pub.VerifySignature(word, sig) {
		t.Errorf("control: %v", err)
	}
	asVote := types.VoteSignBytes("grid", vote(1, 0, cmtproto.PrecommitType, 1, 1))
	long := append([]byte("holdfast/"), make([]byte, 96)...) // as long as "h" says
	for _, word := range [][]byte{asVote, long, nil, []byte("holdfast/")} {
		if _, err := Prove(home, word); err == nil {
			t.Errorf("%q was signed", word)
		}
	}
}
