package ledger

import (
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"slices"
	"strconv"
	"testing"

	"holdfast/contract"
	"holdfast/identity"
	"holdfast/internal/canonical"
)

// told is a contract with the transactions about it, as a validator keeps them.
type toldGrid struct {
	*grid
	id   contract.ID
	done []Executed
}

func (l *toldGrid) do(tx *Tx) {
	l.t.Helper()
	l.must(tx)
	if id, ok := l.s.About(0); ok && id == l.id {
		l.done = append(l.done, Executed{l.h, tx.Encode()})
	}
}

func (l *toldGrid) proved(key string) ([]byte, error) {
	b, ok := l.s.tree.get(key)
	if !ok {
		return nil, ErrAbsent
	}
	return b, nil
}

// toldContract gets its disk, is ready, is refused something, is revised when another account consents, is to be revised once more and is
// not, gets an envelope, pauses, and ends; another contract lives beside it.
func toldContract(t *testing.T) *toldGrid {
	l := &toldGrid{grid: newGrid(t, "lab")}
	friend := l.person(1)
	board := approval("board", 1, map[identity.AccountID]uint16{friend.id: 1}, identity.ActRevise)
	h, other := l.header("app", withVolume, approvals(board)), l.header("other")
	l.id = h.ContractID()
	l.do(l.deploy(other))
	l.do(l.deploy(h))
	n := l.where(l.assigned(h)[0])
	pub := l.nodes[n].Public()
	l.do(l.tx(KindVolumeCreated, Actor{true, pub.Node()}, &VolumeCreated{contract.VolumeOf(l.id, "data")}, l.nodes[n]))
	l.do(l.tx(KindVolumeSaved, Actor{true, pub.Node()}, &VolumeSaved{contract.VolumeOf(l.id, "data"), 1, [32]byte{1}}, l.nodes[n]))
	l.do(l.says(h, l.assigned(h)[0], ""))
	next := *h
	next.Revision, next.Contract, next.Previous, next.SealedSize = 2, l.id, h.RevisionID(), 101
	wrong := next
	wrong.Name = "renamed"
	l.refused("a revision that renames", l.deploy(&wrong), "cannot rename")
	propose := func(h *contract.Header) ProposalID {
		tx := l.deploy(h)
		l.do(tx)
		return ProposalID(tx.ID())
	}
	l.do(l.consent(friend, propose(&next)))
	if c := l.contract(h); c.Revision != 2 {
		t.Fatalf("revision %d after all consented", c.Revision)
	}
	l.do(l.tx(KindWithdraw, Actor{ID: l.acct}, &Withdraw{propose(l.next(&next))}, l.owner))
	e, err := contract.SealEnvelope(next.RevisionID(), contract.RecipientNode, pub.Node(), ptr(l.open.Public()), contract.NewKeys(&next, nil))
	if err != nil {
		t.Fatal(err)
	}
	l.do(l.tx(KindEnvelopePut, Actor{ID: l.acct}, &EnvelopePut{[]contract.Envelope{*e}}, l.owner))
	l.do(l.tx(KindVolumeRestore, Actor{ID: l.acct}, &VolumeRestore{contract.VolumeOf(l.id, "data"), [32]byte{1}}, l.owner))
	l.do(l.tx(KindContractState, Actor{ID: l.acct}, &ContractState{l.id, Paused}, l.owner))
	l.do(l.tx(KindContractCancel, Actor{ID: l.acct}, &ContractCancel{other.ContractID()}, l.owner))
	l.do(l.tx(KindContractCancel, Actor{ID: l.acct}, &ContractCancel{l.id}, l.owner))
	return l
}

func ptr[T any](v T) *T { return &v }

// A contract's history is all that was executed about it, and nothing else can be shown for it: not one transaction less or
// more, in another order, of another height, with other signatures, or about something else.
func TestHistory(t *testing.T) {
	l := toldContract(t)
	grid := l.g.GridID()
	verify := func(all []Executed) ([]Deed, error) { return VerifyHistory(grid, l.id, all, l.proved) }
	deeds, err := verify(l.done)
	if err != nil {
		t.Fatal(err)
	}
	var kinds []Kind
	for _, d := range deeds {
		kinds = append(kinds, d.Kind)
	}
	if want := []Kind{
		KindContractSubmit, KindVolumeCreated, KindVolumeSaved, KindWorkloadReport, KindContractSubmit, KindConsent, KindContractSubmit, KindWithdraw, KindEnvelopePut, KindVolumeRestore, KindContractState, KindContractCancel,
	}; !slices.Equal(kinds, want) {
		t.Fatalf("%v, want %v", kinds, want)
	}

	change := func(f func([]Executed) []Executed) []Executed {
		out := slices.Clone(l.done)
		for i := range out {
			out[i].Tx = slices.Clone(out[i].Tx)
		}
		return f(out)
	}
	resigned := func(k *identity.PrivateKey) func([]Executed) []Executed {
		return func(e []Executed) []Executed {
			tx, err := DecodeTx(e[0].Tx)
			if err != nil {
				t.Fatal(err)
			}
			tx.Signatures[0].Signature = k.Sign(txPurpose, tx.signBytes())
			e[0].Tx = tx.Encode()
			return e
		}
	}
	foreign := l.tx(KindContractCancel, Actor{ID: l.acct}, &ContractCancel{contract.ID{9}}, l.owner).Encode()
	for name, all := range map[string][]Executed{
		"without the first":             l.done[1:],
		"without one in the middle":     change(func(e []Executed) []Executed { return slices.Delete(e, 3, 4) }),
		"without the last":              l.done[:len(l.done)-1],
		"with one twice":                change(func(e []Executed) []Executed { return append(e, e[len(e)-1]) }),
		"in another order":              change(func(e []Executed) []Executed { e[1], e[2] = e[2], e[1]; return e }),
		"of another height":             change(func(e []Executed) []Executed { e[2].Height++; return e }),
		"signed by somebody else":       change(resigned(identity.NewKey([32]byte{99}))),
		"with one about something else": change(func(e []Executed) []Executed { return append(e, Executed{l.h, foreign}) }),
		"nothing":                       nil,
	} {
		if _, err := verify(all); !errors.Is(err, ErrHistory) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Should validators sign a history that was made up, what is in it must still be signed by those who did it.
	for name, all := range map[string][]Executed{
		"signed by somebody else": change(resigned(identity.NewKey([32]byte{99}))),
		"replayed":                change(func(e []Executed) []Executed { return append(e, e[2]) }),
		"about something else":    change(func(e []Executed) []Executed { return append(e, Executed{l.h, foreign}) }),
		"without a revision":      change(func(e []Executed) []Executed { return slices.Delete(e, 2, 5) }),
	} {
		var made History
		for _, x := range all {
			made = made.After(x.Height, x.Tx)
		}
		_, err := VerifyHistory(grid, l.id, all, func(key string) ([]byte, error) {
			if key == HistoryKey(l.id) {
				return canonical.Encode(made), nil
			}
			return l.proved(key)
		})
		if !errors.Is(err, ErrHistory) {
			t.Errorf("%s, and the ledger agrees: %v", name, err)
		}
	}
	if _, err := VerifyHistory(identity.GridID{1}, l.id, l.done, l.proved); !errors.Is(err, ErrHistory) {
		t.Errorf("of another grid: %v", err)
	}
	if _, err := VerifyHistory(grid, l.id, l.done, func(string) ([]byte, error) { return nil, ErrAbsent }); !errors.Is(err, ErrAbsent) {
		t.Errorf("without records: %v", err)
	}
}

// A kind of transaction is of contracts or not: a new one must not be left out of their histories by mistake.
func TestEveryKindIsOfAHistoryOrNot(t *testing.T) {
	not := []Kind{KindAccountCreate, KindAccountQuota, KindAccountPolicy, KindTemplate, KindImageSign, KindFarmAdmit, KindNodeAdmit, KindNodeUpdate, KindGatewayAdmit, KindValidatorJoin,
		KindValidatorLeave}
	in := map[Kind]bool{}
	for _, x := range toldContract(t).done {
		tx, err := DecodeTx(x.Tx)
		if err != nil {
			t.Fatal(err)
		}
		in[tx.Kind] = true
	}
	f, err := parser.ParseFile(token.NewFileSet(), "tx.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	kinds := 0
	ast.Inspect(f, func(n ast.Node) bool {
		v, ok := n.(*ast.ValueSpec)
		if !ok || len(v.Values) != 1 || v.Type == nil {
			return true
		}
		if id, ok := v.Type.(*ast.Ident); !ok || id.Name != "Kind" {
			return true
		}
		s, err := strconv.Unquote(v.Values[0].(*ast.BasicLit).Value)
		if err != nil {
			t.Fatal(err)
		}
		kinds++
		if k := Kind(s); in[k] == slices.Contains(not, k) {
			t.Errorf("%s: is it about a contract? Say so in about.of, and in toldContract or here", k)
		}
		return true
	})
	if kinds != len(not)+len(in) {
		t.Errorf("%d kinds, %d are known here", kinds, len(not)+len(in))
	}
}
