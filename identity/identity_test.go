package identity

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestTextFormIsFrozenAndChecked(t *testing.T) {
	var id NodeID
	for i := range id {
		id[i] = byte(i)
	}
	const want = "node1qqqsyqcyq5rqwzqfpg9scrgwpugpzysnzs23v9ccrydpk8qarc0s"
	s := id.String()
	if !strings.HasPrefix(s, want[:50]) {
		t.Fatalf("text form changed: %s", s)
	}
	if got, err := ParseID[nodeKind](s); err != nil || got != id {
		t.Fatalf("round trip: %v %v", got, err)
	}
	if _, err := ParseID[accountKind](s); err == nil {
		t.Error("a node was read as an account")
	}
	for i := range s { // every single changed character is noticed
		b := []byte(s)
		if b[i] == 'q' {
			b[i] = 'p'
		} else {
			b[i] = 'q'
		}
		if string(b) == s {
			continue
		}
		if _, err := ParseID[nodeKind](string(b)); err == nil {
			t.Errorf("typo at %d was not noticed: %s", i, b)
		}
	}
	if _, err := ParseID[nodeKind](strings.Repeat("q", 1<<20)); err == nil {
		t.Error("a megabyte was accepted")
	}
}

func TestBothHalvesOfASignatureMustVerify(t *testing.T) {
	k, other := NewKey([32]byte{1}), NewKey([32]byte{2})
	pub, msg := k.Public(), []byte("message")
	good := k.Sign("test", msg)
	if err := pub.Verify("test", msg, &good); err != nil {
		t.Fatalf("control: %v", err)
	}
	theirs := other.Sign("test", msg)
	for name, s := range map[string]Signature{
		"flipped bit in the Ed25519 half": func() Signature { s := good; s[3] ^= 1; return s }(),
		"flipped bit in the ML-DSA half":  func() Signature { s := good; s[64+100] ^= 1; return s }(),
		"Ed25519 half of another key":     func() Signature { s := good; copy(s[:64], theirs[:64]); return s }(),
		"ML-DSA half of another key":      func() Signature { s := good; copy(s[64:], theirs[64:]); return s }(),
	} {
		if err := pub.Verify("test", msg, &s); !errors.Is(err, ErrSignature) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := pub.Verify("other", msg, &good); err == nil {
		t.Error("verified for another purpose")
	}
	if err := pub.Verify("test", []byte("massage"), &good); err == nil {
		t.Error("verified for another message")
	}
	// A key made of one's Ed25519 half and another's ML-DSA half is a different key: its signatures are bound to it.
	op := other.Public()
	var mixed PublicKey
	copy(mixed[:32], pub[:32])
	copy(mixed[32:], op[32:])
	var s Signature
	copy(s[:64], good[:64])
	copy(s[64:], theirs[64:])
	if err := mixed.Verify("test", msg, &s); err == nil {
		t.Error("halves of two signatures verify under a mixed key")
	}
}

func TestSealedBoxOpensForItsKeyAndInfoOnly(t *testing.T) {
	k, err := NewOpeningKey([32]byte{1})
	if err != nil {
		t.Fatal(err)
	}
	other, _ := NewOpeningKey([32]byte{2})
	pub := k.Public()
	box, err := pub.Seal([]byte("info"), []byte("secret"))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := k.Open([]byte("info"), box); err != nil || string(got) != "secret" {
		t.Fatalf("control: %q %v", got, err)
	}
	if _, err := other.Open([]byte("info"), box); err == nil {
		t.Error("another key opened it")
	}
	if _, err := k.Open([]byte("other"), box); err == nil {
		t.Error("it opened for another info")
	}
	if _, err := k.Open([]byte("info"), box[:20]); err == nil {
		t.Error("a truncated box opened")
	}
}

func TestPolicyCountsOnlyListedDevices(t *testing.T) {
	a, b, c := NewKey([32]byte{1}).Public(), NewKey([32]byte{2}).Public(), NewKey([32]byte{3}).Public()
	acc := Account{Devices: []Device{{"a", a}, {"b", b}}, Policy: Policy{Rules: []Rule{
		{Act: ActDefault, Threshold: 1},
		{Act: ActCancel, Threshold: 2},
		{Act: ActRevise, Threshold: 1, Devices: []DeviceID{b.Device()}},
	}}}
	if err := acc.Validate(); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name    string
		act     Act
		signers []DeviceID
		ok      bool
	}{
		{"one device is enough by default", ActCreate, []DeviceID{a.Device()}, true},
		{"a stranger's device does not count", ActCreate, []DeviceID{c.Device()}, false},
		{"nobody does not count", ActCreate, nil, false},
		{"the same device twice counts once", ActCancel, []DeviceID{a.Device(), a.Device()}, false},
		{"two devices satisfy two of two", ActCancel, []DeviceID{a.Device(), b.Device()}, true},
		{"a device outside the rule does not count", ActRevise, []DeviceID{a.Device()}, false},
		{"the rule's device counts", ActRevise, []DeviceID{b.Device()}, true},
	} {
		if err := acc.Allows(tc.act, tc.signers); (err == nil) != tc.ok {
			t.Errorf("%s: %v", tc.name, err)
		}
	}
	for name, p := range map[string]Policy{
		"no default":         {Rules: []Rule{{Act: ActCancel, Threshold: 1}}},
		"nobody can":         {Rules: []Rule{{Act: ActDefault, Threshold: 3}}},
		"threshold zero":     {Rules: []Rule{{Act: ActDefault}}},
		"unknown device":     {Rules: []Rule{{Act: ActDefault, Threshold: 1, Devices: []DeviceID{c.Device()}}}},
		"two rules":          {Rules: []Rule{{Act: ActDefault, Threshold: 1}, {Act: ActDefault, Threshold: 2}}},
		"device twice":       {Rules: []Rule{{Act: ActDefault, Threshold: 2, Devices: []DeviceID{a.Device(), a.Device()}}}},
		"more rules than 32": {Rules: make([]Rule, 33)},
	} {
		bad := acc
		bad.Policy = p
		if bad.Validate() == nil {
			t.Errorf("policy with %s was accepted", name)
		}
	}
}

func TestKeyFile(t *testing.T) {
	dir := t.TempDir()
	f := &KeyFile{Device: [32]byte{7}, Root: [32]byte{8}}
	open, sealed := filepath.Join(dir, "open"), filepath.Join(dir, "sealed")
	if err := WriteKeyFile(open, f, ""); err != nil {
		t.Fatal(err)
	}
	if err := WriteKeyFile(sealed, f, "correct horse"); err != nil {
		t.Fatal(err)
	}
	if err := WriteKeyFile(open, &KeyFile{}, ""); err == nil {
		t.Error("an existing key was replaced")
	}
	if got, err := ReadKeyFile(open, ""); err != nil || *got != *f {
		t.Errorf("open file: %v", err)
	}
	if got, err := ReadKeyFile(sealed, "correct horse"); err != nil || *got != *f {
		t.Errorf("sealed file: %v", err)
	}
	for _, pass := range []string{"", "wrong"} {
		if _, err := ReadKeyFile(sealed, pass); !errors.Is(err, ErrPassphrase) {
			t.Errorf("passphrase %q: %v", pass, err)
		}
	}
	if b, _ := os.ReadFile(sealed); bytes.Contains(b, []byte("device")) {
		t.Error("the sealed file shows its content")
	}
	if err := os.Chmod(open, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadKeyFile(open, ""); err == nil {
		t.Error("a world-readable key was used")
	}
}

func FuzzParseID(f *testing.F) {
	f.Add(NodeID{1}.String())
	f.Fuzz(func(t *testing.T, s string) {
		if id, err := ParseID[nodeKind](s); err == nil && id.String() != strings.ToLower(s) {
			t.Fatalf("%q parses to %v", s, id)
		}
	})
}

func BenchmarkVerify(b *testing.B) {
	k := NewKey([32]byte{1})
	pub, s := k.Public(), k.Sign("bench", []byte("m"))
	for b.Loop() {
		if err := pub.Verify("bench", []byte("m"), &s); err != nil {
			b.Fatal(err)
		}
	}
}
