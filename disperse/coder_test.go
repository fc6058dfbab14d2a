package disperse

import (
	"bytes"
	"crypto/rand"
	"testing"
)

func TestSmoke(t *testing.T) {
	c, err := NewCoder(Scheme{4, 6})
	if err != nil {
		t.Fatal(err)
	}
	key, mac := Key{1}, Key{2}
	places := make([]Place, 6)
	for i := range places {
		places[i][0] = byte(i)
	}
	for _, n := range []int{0, 1, 255, 256, 1000, 65536, 4 << 20, 16 << 20} {
		plain := make([]byte, n)
		rand.Read(plain)
		id := NewID()
		e, err := c.Encode(id, &key, &mac, places, plain)
		if err != nil {
			t.Fatal(err)
		}
		got, err := c.Decode([]byte("x"), id, &key, e.Wrap, n, e.Shards)
		if err != nil || !bytes.Equal(got[1:], plain) {
			t.Fatal(n, err)
		}
		s := append([][]byte{}, e.Shards...)
		s[0], s[2] = nil, nil
		got, err = c.Decode(nil, id, &key, e.Wrap, n, s)
		if err != nil || !bytes.Equal(got, plain) {
			t.Fatal(n, err)
		}
		r, names, err := c.Reconstruct(id, &mac, s, []int{2, 0}, []Place{places[2], places[0]})
		if err != nil || !bytes.Equal(r[0], e.Shards[2]) || names[1] != e.Names[0] {
			t.Fatal(n, err)
		}
		e.Release()
	}
}
