package ledger

import (
	"maps"
	"reflect"
	"testing"
	"time"

	"github.com/cloudflare/circl/sign/mldsa/mldsa65"

	"holdfast/identity"
)

// candidate is a validator of power 10 that would join, and its key.
func candidate(i byte) (*Validator, *mldsa65.PrivateKey) {
	pub, key := mldsa65.NewKeyFromSeed(&[32]byte{77, i})
	return &Validator{Name: "v" + string('a'+rune(i)), Key: pub.Bytes(), Power: 10, TLS: [32]byte{77, i}, Address: "192.0.2.1:8441"}, key
}

func proves(grid identity.GridID, v *Validator, key *mldsa65.PrivateKey) *ValidatorJoin {
	p := &ValidatorJoin{Validator: *v, Proof: make([]byte, mldsa65.SignatureSize)}
	if err := mldsa65.SignTo(key, JoinBytes(grid, v), nil, false, p.Proof); err != nil {
		panic(err)
	}
	return p
}

func (x *grid) join(p *ValidatorJoin, keys ...*identity.PrivateKey) *Tx {
	if keys == nil {
		keys = []*identity.PrivateKey{x.admin}
	}
	return x.tx(KindValidatorJoin, Actor{ID: x.g.GridAccount()}, p, keys...)
}

func (x *grid) leave(id ValidatorID) *Tx {
	return x.tx(KindValidatorLeave, Actor{ID: x.g.GridAccount()}, &ValidatorLeave{id}, x.admin)
}

// names are the validators as the record, proved, and the state at hand have them.
func (x *grid) names() (out string) {
	x.t.Helper()
	raw, _ := x.s.Get(ValidatorsKey)
	all, err := ValidatorsOf(x.g, raw, raw != nil)
	if err != nil {
		x.t.Fatal(err)
	}
	if have := x.s.Validators(); have.Height != all.Height || len(have.Members) != len(all.Members) {
		x.t.Fatalf("at hand are %d of height %d, the record has %d of %d", len(have.Members), have.Height, len(all.Members), all.Height)
	}
	for i, v := range x.s.Validators().Members {
		if v.Name != all.Members[i].Name {
			x.t.Fatalf("at hand is %s for %s", v.Name, all.Members[i].Name)
		}
		out += v.Name + " "
	}
	return out
}

func TestValidatorsJoinAndLeave(t *testing.T) {
	x := newGrid(t, "lab")
	va, ka := candidate(0)
	vb, kb := candidate(1)
	grid := x.g.GridID()
	refused := func(name string, edit func(v *Validator), want string) {
		t.Helper()
		v := *va
		edit(&v)
		x.refused(name, x.join(proves(grid, &v, ka)), want)
	}
	x.refused("of a user", x.tx(KindValidatorJoin, Actor{ID: x.acct}, proves(grid, va, ka), x.owner), "only acct1")
	x.refused("with the proof of another key", x.join(proves(grid, va, kb)), "proof that validator")
	x.refused("with a proof for another grid", x.join(proves(identity.GridID{1}, va, ka)), "proof that validator")
	p := proves(grid, va, ka)
	p.Validator.Address = "192.0.2.66:8441"
	x.refused("with another address than it agreed to", x.join(p), "proof that validator")
	refused("of no power", func(v *Validator) { v.Power = 0 }, "power 0")
	refused("of all power", func(v *Validator) { v.Power = MaxValidatorPower + 1 }, "are allowed")
	refused("of more power than there was", func(v *Validator) { v.Power = 11 }, "do it in steps")
	refused("without an address", func(v *Validator) { v.Address = "here" }, "not host:port")
	refused("without a TLS key", func(v *Validator) { v.TLS = [32]byte{} }, "TLS key is missing")
	refused("with a node's TLS key", func(v *Validator) { v.TLS = [32]byte{2, 1} }, "another node has")
	refused("with a node's WireGuard key", func(v *Validator) { v.WireGuard = [32]byte{1, 1} }, "a node has")
	refused("under another's name", func(v *Validator) { v.Name = "v" }, "already")
	first := x.g.Validators[0].ID()
	x.refused("the only one leaves", x.leave(first), "only validator")

	x.must(x.join(proves(grid, va, ka)))
	if got := x.names(); got != "v va " {
		t.Fatalf("after a join: %s", got)
	}
	again := *va
	again.Name = "other"
	x.refused("twice", x.join(proves(grid, &again, ka)), "one already")
	again = *vb
	again.TLS = va.TLS
	x.refused("with a validator's TLS key", x.join(proves(grid, &again, kb)), "a validator has")
	x.must(x.leave(first))
	if got := x.names(); got != "va " {
		t.Fatalf("after the first left: %s", got)
	}
	x.refused("it leaves twice", x.leave(first), "not on the ledger")
	x.must(x.join(proves(grid, vb, kb)))
	x.must(x.leave(va.ID()))
	x.refused("a key comes back", x.join(proves(grid, va, ka)), "no key comes back")
	loaded, err := Load(maps.All(maps.Collect(x.s.Changes(nil))))
	if err != nil || loaded.Root() != x.s.Root() || !reflect.DeepEqual(loaded.Validators(), x.s.Validators()) {
		t.Fatalf("a loaded state has %+v, %v", loaded.Validators(), err)
	}
}

func TestAPolicySaysWhoNamesValidators(t *testing.T) {
	x := newGrid(t, "lab")
	second := identity.NewKey([32]byte{42})
	x.g.Devices = append(x.g.Devices, identity.Device{Name: "second", Key: second.Public()})
	x.g.Policy.Rules = append(x.g.Policy.Rules, identity.Rule{Act: identity.ActValidators, Threshold: 2})
	s, err := New(x.g)
	if err != nil {
		t.Fatal(err)
	}
	x.s, x.nonce = s, map[Actor]uint64{}
	v, k := candidate(0)
	x.refused("by one of two", x.join(proves(x.g.GridID(), v, k)), "needs")
	x.must(x.join(proves(x.g.GridID(), v, k), x.admin, second))
	if got := x.names(); got != "v va " {
		t.Fatal(got)
	}
}

// together applies transactions in one block.
func (x *grid) together(txs ...*Tx) (refused int) {
	x.h++
	x.at = x.at.Add(time.Second)
	blk := Block{Height: x.h, Time: x.at}
	for i, tx := range txs {
		bare := NewTx(tx.Grid, tx.Kind, tx.Actor, x.nonce[tx.Actor]+1+uint64(i), nil)
		bare.Payload, bare.Until = tx.Payload, tx.Until
		bare.Sign(x.admin)
		blk.Txs = append(blk.Txs, bare.Encode())
	}
	next, res := x.s.Apply(blk)
	x.s = next
	x.nonce[Actor{ID: x.g.GridAccount()}] += uint64(len(txs))
	for _, r := range res {
		if r.Code != CodeOK {
			refused++
		}
	}
	return refused
}

func TestABlockMovesNoMoreThanClientsCanFollow(t *testing.T) {
	x := newGrid(t, "lab")
	var joins []*Tx
	for i := range byte(3) {
		v, k := candidate(i)
		joins = append(joins, x.join(proves(x.g.GridID(), v, k)))
	}
	if n := x.together(joins...); n != 2 || x.names() != "v va " {
		t.Fatalf("%d of three joins were refused: %s", n, x.names())
	}
	if n := x.together(joins[1], joins[2]); n != 0 || x.names() != "v va vb vc " {
		t.Fatalf("%d of two joins were refused: %s", n, x.names())
	}
	v, k := candidate(4)
	in, out := x.join(proves(x.g.GridID(), v, k)), x.leave(x.g.Validators[0].ID())
	va, _ := candidate(0)
	if n := x.together(in, out, x.leave(va.ID())); n != 1 || x.names() != "va vb vc ve " {
		t.Fatalf("%d were refused: %s", n, x.names())
	}
}

func TestWhoWasSeenToLieIsOut(t *testing.T) {
	x := newGrid(t, "lab")
	blame := func(v *Validator) {
		id := v.ID()
		x.h++
		x.at = x.at.Add(time.Second)
		x.s, _ = x.s.Apply(Block{Height: x.h, Time: x.at, Offenders: [][20]byte{[20]byte(id[:20])}})
	}
	blame(&x.g.Validators[0])
	if got := x.names(); got != "v " {
		t.Fatalf("the only one went: %s", got)
	}
	va, ka := candidate(0)
	vb, kb := candidate(1)
	x.must(x.join(proves(x.g.GridID(), va, ka)))
	x.must(x.join(proves(x.g.GridID(), vb, kb)))
	blame(va)
	blame(va)
	if got := x.names(); got != "v vb " {
		t.Fatalf("after proof against va: %s", got)
	}
	x.refused("who was expelled comes back", x.join(proves(x.g.GridID(), va, ka)), "no key comes back")
}

// A node counts by the set that it knows who has heard it. Were it taken for dead by those who have just come, its lease would
// still run, and what has a volume would run twice.
func TestANewSetTakesNobodyForDeadAtOnce(t *testing.T) {
	for _, join := range []bool{true, false} {
		x := newGrid(t, "lab")
		v, k := candidate(0)
		if join {
			x.must(x.join(proves(x.g.GridID(), v, k)))
		} else {
			x.pass(time.Second)
		}
		changed := x.at
		deaf := []Heard{{10, Bitmap{}}, {10, Bitmap{}}}
		for {
			x.h++
			x.at = x.at.Add(time.Second)
			x.s, _ = x.s.Apply(Block{Height: x.h, Time: x.at, Heard: deaf})
			id := x.nodes[0].Public()
			n, err := get[Node](x.s, NodeKey(id.Node()))
			if err != nil {
				t.Fatal(err)
			}
			if !n.Up {
				break
			}
			if x.at.Sub(changed) > time.Minute {
				t.Fatal("a dead node is never taken for dead")
			}
		}
		// The set votes two blocks later: two seconds, and then lease and margin.
		want := time.Second
		if join {
			want = 8 * time.Second
		}
		if got := x.at.Sub(changed); got < want || !join && got != want {
			t.Errorf("join %v: taken for dead after %v, want %v", join, got, want)
		}
	}
}
