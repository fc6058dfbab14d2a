package disperse

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"testing"
)

const vectors = "testdata/shard-v1.json"

// vector is a segment or a secret as it was encoded once, for good. Randomness is ChaCha8 of Go's math/rand/v2, seeded with
// 32 bytes of which the first is Seed.
type vector struct {
	Name     string
	Scheme   Scheme
	Seed     byte
	ID       string
	StoreKey string `json:",omitempty"` // empty: a secret, for Split
	MACKey   string
	Places   []string
	Plain    string   // hexadecimal, or
	Long     int      `json:",omitempty"` // so many bytes: byte i is i modulo 251
	Wrap     string   `json:",omitempty"`
	Shards   []string `json:",omitempty"` // of short ones only
	Names    []string
}

func (v *vector) plain() []byte {
	if v.Long == 0 {
		return unhex(v.Plain)
	}
	b := make([]byte, v.Long)
	for i := range b {
		b[i] = byte(i % 251)
	}
	return b
}

func unhex(s string) []byte {
	b, err := hex.DecodeString(s)
	if err != nil {
		panic(err)
	}
	return b
}

// encode fills in what comes out.
func (v *vector) encode(t *testing.T) *Encoded {
	c := newCoder(t, v.Scheme)
	c.rand = seeded(v.Seed)
	var places []Place
	for _, p := range v.Places {
		places = append(places, Place(unhex(p)))
	}
	id, mac := ID(unhex(v.ID)), Key(unhex(v.MACKey))
	var e *Encoded
	var err error
	if v.StoreKey == "" {
		e, err = c.Split(id, &mac, places, v.plain())
	} else {
		key := Key(unhex(v.StoreKey))
		e, err = c.Encode(id, &key, &mac, places, v.plain())
	}
	if err != nil {
		t.Fatal(err)
	}
	v.Wrap, v.Names, v.Shards = "", nil, nil
	if v.StoreKey != "" {
		v.Wrap = hex.EncodeToString(e.Wrap[:])
	}
	for i, s := range e.Shards {
		v.Names = append(v.Names, e.Names[i].String())
		if v.Long == 0 {
			v.Shards = append(v.Shards, hex.EncodeToString(s))
		}
	}
	return e
}

// TestFormatIsFrozen compares with what was written once. Without the file it writes a new one, and fails.
func TestFormatIsFrozen(t *testing.T) {
	places := func(n int) (out []string) {
		for i := range n {
			p := Place{0: 0xa0, 15: byte(i)}
			out = append(out, hex.EncodeToString(p[:]))
		}
		return out
	}
	const id, store, mac = "000102030405060708090a0b0c0d0e0f", "2020202020202020202020202020202020202020202020202020202020202020", "3030303030303030303030303030303030303030303030303030303030303030"
	b, err := os.ReadFile(vectors)
	if errors.Is(err, fs.ErrNotExist) {
		all := []vector{
			{Name: "empty", Scheme: Scheme{2, 3}, Seed: 1, Places: places(3), StoreKey: store},
			{Name: "short", Scheme: Scheme{4, 6}, Seed: 2, Places: places(6), StoreKey: store, Plain: hex.EncodeToString([]byte("any four of six"))},
			{Name: "copies", Scheme: Scheme{1, 2}, Seed: 3, Places: places(2), StoreKey: store, Plain: "00"},
			{Name: "leaves", Scheme: Scheme{4, 6}, Seed: 4, Places: places(6), StoreKey: store, Long: 100_000},
			{Name: "wide", Scheme: Scheme{16, 20}, Seed: 5, Places: places(20), StoreKey: store, Long: 200_000},
			{Name: "secret", Scheme: Scheme{3, 5}, Seed: 6, Places: places(5), Plain: hex.EncodeToString([]byte("to be or not to be"))},
		}
		for i := range all {
			all[i].ID, all[i].MACKey = id, mac
			all[i].encode(t)
		}
		b, _ := json.MarshalIndent(all, "", " ")
		if err := errors.Join(os.MkdirAll("testdata", 0o755), os.WriteFile(vectors, append(b, '\n'), 0o644)); err != nil {
			t.Fatal(err)
		}
		t.Fatalf("%s was written: look at it and run the test again", vectors)
	}
	var all []vector
	if err := errors.Join(err, json.Unmarshal(b, &all)); err != nil || len(all) < 6 {
		t.Fatal(len(all), err)
	}
	for _, v := range all {
		t.Run(v.Name, func(t *testing.T) {
			got := v
			e := got.encode(t)
			x, _ := json.Marshal(got)
			y, _ := json.Marshal(v)
			if !bytes.Equal(x, y) {
				t.Errorf("it is now\n%s\nand was\n%s", x, y)
			}
			v.byHand(t, e.Shards)
		})
	}
}

// byHand reads the last k shards with nothing of this package and nothing of the code's library: as a stranger would who
// has the document.
func (v *vector) byHand(t *testing.T, shards [][]byte) {
	k, n := v.Scheme.K, v.Scheme.N
	size := len(shards[0]) - 108
	at := make([]byte, k)
	for j := range k {
		at[j] = byte(n - k + j)
		s := shards[n-k+j]
		tr := s[size:]
		h := hmac.New(sha256.New, unhex(v.MACKey))
		h.Write(tr[:76])
		for l := 0; l+4096 <= size; l += 4096 {
			d := sha256.Sum256(append([]byte{0}, s[l:l+4096]...))
			h.Write(d[:])
		}
		h.Write(s[size-size%4096 : size])
		if !hmac.Equal(h.Sum(nil), tr[76:]) {
			t.Errorf("shard %d: MAC", n-k+j)
		}
		if name := rootByHand(s); name.String() != v.Names[n-k+j] {
			t.Errorf("shard %d: name", n-k+j)
		}
		want := append([]byte{'H', 'F', 'S', 1, 0, byte(k), byte(n), at[j]}, unhex(v.ID)...)
		if v.StoreKey == "" {
			want[4] = 1
		}
		want = append(want, byte(size>>24), byte(size>>16), byte(size>>8), byte(size))
		want = append(want, unhex(v.Places[n-k+j])...)
		if !bytes.Equal(tr[:44], want) {
			t.Errorf("shard %d: trailer %x, want %x", n-k+j, tr[:44], want)
		}
	}
	// weights of the k values in the value at x of the polynomial through them
	weights := func(x byte, at []byte) []byte {
		w := make([]byte, k)
		for i := range w {
			unit := make([]byte, k)
			unit[i] = 1
			w[i] = interpolate(x, at, unit)
		}
		return w
	}
	combine := func(w []byte, off, m int) []byte {
		out := make([]byte, m)
		for j := range k {
			for b := range out {
				out[b] ^= gfMul(w[j], shards[n-k+j][off+b])
			}
		}
		return out
	}
	sharesAt := make([]byte, k)
	for j := range k {
		sharesAt[j] = byte(k) + at[j]
	}
	plain := v.plain()
	if v.StoreKey == "" {
		first := combine(weights(0, sharesAt), 0, size)
		sum := sha256.Sum256(first[:size-32])
		if !bytes.Equal(first[:4], []byte{0, 0, 0, byte(len(plain))}) || !bytes.Equal(first[4:4+len(plain)], plain) || !bytes.Equal(first[size-32:], sum[:]) {
			t.Error("the secret is another")
		}
		return
	}
	secret := combine(weights(0, sharesAt), size+44, 32)
	gcm := func(key []byte) cipher.AEAD {
		b, err := aes.NewCipher(key)
		if err != nil {
			t.Fatal(err)
		}
		a, err := cipher.NewGCM(b)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	bound := string(unhex(v.ID)) + string([]byte{byte(k), byte(n)})
	kek, err := hkdf.Key(sha256.New, secret, unhex(v.StoreKey), "holdfast segment wrap v1"+bound, 32)
	if err != nil {
		t.Fatal(err)
	}
	key, err := gcm(kek).Open(nil, make([]byte, 12), unhex(v.Wrap), nil)
	if err != nil {
		t.Fatal("wrap: ", err)
	}
	var text []byte
	for i := range k {
		text = append(text, combine(weights(byte(i), at), 0, size)...)
	}
	m := len(plain)
	got, err := gcm(key).Open(nil, make([]byte, 12), text[:m+16], nil)
	if err != nil || !bytes.Equal(got, plain) {
		t.Error("segment: ", err)
	}
}
