package disperse

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"
)

func TestScheme(t *testing.T) {
	for _, x := range []struct {
		text string
		want Scheme
		ok   bool
	}{
		{"4/6", Scheme{4, 6}, true},
		{"1/1", Scheme{1, 1}, true},
		{"16/20", Scheme{16, 20}, true},
		{"128/128", Scheme{128, 128}, true},
		{"100/129", Scheme{}, false}, // k+n symbols share the key: at most 256
		{"0/6", Scheme{}, false},
		{"-1/6", Scheme{}, false},
		{"7/6", Scheme{}, false},
		{"04/6", Scheme{}, false},
		{"+4/6", Scheme{}, false},
		{" 4/6", Scheme{}, false},
		{"4/6/", Scheme{}, false},
		{"4/", Scheme{}, false},
		{"4", Scheme{}, false},
		{"", Scheme{}, false},
		{"99999999999999999999/6", Scheme{}, false},
	} {
		s, err := ParseScheme(x.text)
		if (err == nil) != x.ok || x.ok && (s != x.want || s.String() != x.text) {
			t.Errorf("%q: %v, %v", x.text, s, err)
		}
		var u Scheme
		if err := json.Unmarshal(fmt.Appendf(nil, "%q", x.text), &u); (err == nil) != x.ok || x.ok && u != x.want {
			t.Errorf("%q as JSON: %v, %v", x.text, u, err)
		}
	}
	for _, s := range []Scheme{{}, {5, 4}, {1, MaxN + 1}} {
		if _, err := NewCoder(s); err == nil {
			t.Errorf("a coder of %v", s)
		}
		if _, err := s.MarshalText(); err == nil {
			t.Errorf("text of %v", s)
		}
	}
}

func TestAKeyIsNeverPrinted(t *testing.T) {
	k := Key([]byte("0123456789abcdefghijklmnopqrstuv"))
	holder := struct {
		K Key
		P *Key
	}{k, &k}
	var log bytes.Buffer
	for _, h := range []slog.Handler{slog.NewTextHandler(&log, nil), slog.NewJSONHandler(&log, nil)} {
		slog.New(h).Info("x", "k", k, "p", &k, "in", holder)
	}
	j, err := json.Marshal(holder)
	if err != nil {
		t.Fatal(err)
	}
	out := log.String() + string(j) + fmt.Sprint(k, &k) + k.String()
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%b"} {
		out += fmt.Sprintf(verb+verb+verb+verb, k, &k, holder, []Key{k})
	}
	for _, bad := range []string{"0123", "30313233", "48 49", "0x30", "MDEy", "110000"} {
		if strings.Contains(out, bad) {
			t.Errorf("%q shows in %s", bad, out)
		}
	}
	if control := fmt.Sprintf("%x %s", [32]byte(k), k[:]); !strings.Contains(control, "30313233") || !strings.Contains(control, "0123") {
		t.Error("control: the key does not show where it is printed")
	}
}

func TestPadding(t *testing.T) {
	for _, x := range [][2]int{
		{0, 256}, {1, 256}, {256, 256}, {257, 272}, {1000, 1024}, {1025, 1088}, {4096, 4096}, {65536, 65536}, {65537, 67584},
		{4 << 20, 4 << 20}, {4<<20 + 1, 4<<20 + 128<<10}, {MaxSegment - 1, MaxSegment}, {MaxSegment, MaxSegment},
	} {
		if got := padded(x[0]); got != x[1] {
			t.Errorf("%d is taken for %d, want %d", x[0], got, x[1])
		}
	}
	sizes := map[int]bool{}
	last := 0
	for n := 0; n <= MaxSegment; n += 1 + n/1000 {
		p := padded(n)
		if p < n || p < last || n >= minPadded && (p-n)*100 > 12*n {
			t.Fatalf("%d is taken for %d, after %d", n, p, last)
		}
		last, sizes[p] = p, true
	}
	if len(sizes) > 600 {
		t.Errorf("%d sizes can be told apart", len(sizes))
	}
}
