package canonical

import (
	"bytes"
	"encoding/hex"
	"errors"
	"testing"
)

type sample struct {
	A uint64            `cbor:"1,keyasint"`
	B []string          `cbor:"2,keyasint,omitempty"`
	C map[string][]byte `cbor:"3,keyasint,omitempty"`
	D [4]byte           `cbor:"4,keyasint"`
}

func TestEncodingIsFrozen(t *testing.T) {
	v := sample{A: 500, B: []string{"x"}, C: map[string][]byte{"bb": {1}, "a": {2}}, D: [4]byte{1, 2, 3, 4}}
	const want = "a4011901f4028161780" + "3a26161410262626241010444" + "01020304"
	if got := hex.EncodeToString(Encode(v)); got != want {
		t.Fatalf("encoding changed:\n got %s\nwant %s", got, want)
	}
}

func TestDecodeRefusesWhatEncodeWouldNotWrite(t *testing.T) {
	for name, in := range map[string]string{
		"integer not in its shortest form": "a2011900050444" + "01020304",
		"keys out of order":                "a20444010203040105",
		"duplicate key":                    "a3010501050444" + "01020304",
		"unknown field":                    "a3010504440102030409f5",
		"indefinite length":                "bf01050444" + "01020304ff",
		"trailing bytes":                   "a201050444" + "0102030400",
		"tag":                              "c1a201050444" + "01020304",
		"truncated":                        "a20105044401",
		"array of another length":          "a20105044301" + "0203",
	} {
		b, err := hex.DecodeString(in)
		if err != nil {
			t.Fatal(err)
		}
		var v sample
		if err := Decode(b, 1<<10, &v); err == nil {
			t.Errorf("%s: accepted as %+v", name, v)
		}
	}
	good, _ := hex.DecodeString("a201050444" + "01020304")
	var v sample
	if err := Decode(good, 1<<10, &v); err != nil || v.A != 5 {
		t.Fatalf("the control value was refused: %v", err)
	}
	if err := Decode(good, 3, &v); err == nil {
		t.Fatal("the limit did not hold")
	}
	if err := Decode([]byte{0xa2, 0x01, 0x18, 0x05, 0x04, 0x44, 1, 2, 3, 4}, 1<<10, &v); !errors.Is(err, ErrNotCanonical) {
		t.Fatalf("long form of 5: %v", err)
	}
}

func TestDigestSeparatesLabelsAndParts(t *testing.T) {
	seen := map[[32]byte]string{}
	for name, d := range map[string][32]byte{
		"ab|c": Digest("l", []byte("ab"), []byte("c")),
		"a|bc": Digest("l", []byte("a"), []byte("bc")),
		"abc":  Digest("l", []byte("abc")),
		"m":    Digest("m", []byte("abc")),
		"none": Digest("l"),
		"one":  Digest("l", nil),
	} {
		if other, dup := seen[d]; dup {
			t.Errorf("%s and %s have the same digest", name, other)
		}
		seen[d] = name
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(Encode(sample{A: 1, B: []string{"x"}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		var v sample
		if Decode(b, 1<<16, &v) == nil && !bytes.Equal(Encode(v), b) {
			t.Fatalf("%x decodes and encodes to %x", b, Encode(v))
		}
	})
}
