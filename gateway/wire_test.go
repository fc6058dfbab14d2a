package gateway

import (
	"bytes"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"io"
	"net/netip"
	"reflect"
	"strings"
	"testing"
)

// The bytes of version 1. They never change; a new version gets vectors of its own.
var (
	vectorHeader4 = streamHeader{Claim{"pocketbase.localhost", id(0xab), 7}, netip.MustParseAddrPort("192.0.2.1:443")}
	vectorHeader6 = streamHeader{Claim{"a.test", id(1), 1<<64 - 1}, netip.MustParseAddrPort("[2001:db8::1]:65535")}
	vectorClaims  = claimList{3, []Claim{{"a.test", id(1), 2}}}
	vectorVerdict = verdict{3, []refusedClaim{{0, reasonEpoch}}}
)

func TestFrozenVectors(t *testing.T) {
	h4, err := vectorHeader4.encode()
	check(t, err)
	h6, err := vectorHeader6.encode()
	check(t, err)
	claims, err := vectorClaims.encode()
	check(t, err)
	for name, x := range map[string]struct {
		got  []byte
		want string
	}{
		"header, IPv4": {h4, "0114706f636b6574626173652e6c6f63616c686f737404c000020101bb" + strings.Repeat("ab", 32) + "0000000000000007"},
		"header, IPv6": {h6, "0106612e746573741020010db8000000000000000000000001ffff" + strings.Repeat("01", 32) + "ffffffffffffffff"},
		"claims":       {claims, "010000000000000003000106612e74657374" + strings.Repeat("01", 32) + "0000000000000002"},
		"verdict":      {vectorVerdict.encode(), "020000000000000003000100000" + "3"},
	} {
		if got := hex.EncodeToString(x.got); got != x.want {
			t.Errorf("%s:\n got %s\nwant %s", name, got, x.want)
		}
	}
	if h, err := decodeHeader(h4); err != nil || h != vectorHeader4 {
		t.Errorf("got %v, %v", h, err)
	}
	if h, err := decodeHeader(h6); err != nil || h != vectorHeader6 {
		t.Errorf("got %v, %v", h, err)
	}
	if l, err := decodeClaims(claims); err != nil || !reflect.DeepEqual(l, vectorClaims) {
		t.Errorf("got %v, %v", l, err)
	}
	if v, err := decodeVerdict(vectorVerdict.encode()); err != nil || !reflect.DeepEqual(v, vectorVerdict) {
		t.Errorf("got %v, %v", v, err)
	}
}

func TestBadEncodingsAreRefused(t *testing.T) {
	good, _ := vectorHeader4.encode()
	for i := range good {
		if _, err := decodeHeader(good[:i]); err == nil {
			t.Errorf("a header cut at %d is taken", i)
		}
	}
	for name, change := range map[string]func([]byte) []byte{
		"a byte too many":    func(b []byte) []byte { return append(b, 0) },
		"version 2":          func(b []byte) []byte { b[0] = 2; return b },
		"a host in capitals": func(b []byte) []byte { b[2] = 'P'; return b },
		"a host with a zero": func(b []byte) []byte { b[3] = 0; return b },
	} {
		if _, err := decodeHeader(change(bytes.Clone(good))); err == nil {
			t.Errorf("%s is taken", name)
		}
	}
	for host, want := range map[string]string{
		"Example.TEST": "example.test", "a.test.": "a.test", "": "", ".": "", "a..b": "", ".a": "", "1.2.3.4": "", "::1": "",
		"a b": "", "a/b": "", strings.Repeat("a", 254): "", "_dmarc.a-b.test": "_dmarc.a-b.test",
	} {
		if got := normalHost(host); got != want {
			t.Errorf("normalHost(%q) is %q, want %q", host, got, want)
		}
	}
	if _, err := readMessage(bytes.NewReader([]byte{0xff, 0xff, 0xff, 0xff})); err == nil {
		t.Error("a message of 4 GiB is taken")
	}
}

func FuzzHeader(f *testing.F) {
	b, _ := vectorHeader4.encode()
	f.Add(b)
	b, _ = vectorHeader6.encode()
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := decodeHeader(b)
		if err != nil {
			return
		}
		if again, err := h.encode(); err != nil || !bytes.Equal(again, b) {
			t.Fatalf("%x decodes but encodes as %x, %v", b, again, err)
		}
	})
}

func FuzzControl(f *testing.F) {
	b, _ := vectorClaims.encode()
	f.Add(b)
	f.Add(vectorVerdict.encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		if l, err := decodeClaims(b); err == nil {
			if again, err := l.encode(); err != nil || !bytes.Equal(again, b) {
				t.Fatalf("%x decodes but encodes as %x, %v", b, again, err)
			}
		}
		if v, err := decodeVerdict(b); err == nil {
			if again := v.encode(); !bytes.Equal(again, b) {
				t.Fatalf("%x decodes but encodes as %x", b, again)
			}
		}
	})
}

// rerecord cuts a hello of one record into records of n bytes.
func rerecord(raw []byte, n int) []byte {
	var out []byte
	for body := raw[recordHeader:]; len(body) > 0; {
		m := min(n, len(body))
		out = append(append(out, recordHandshake, 3, 1, byte(m>>8), byte(m)), body[:m]...)
		body = body[m:]
	}
	return out
}

// dribble gives one byte at a time.
type dribble struct{ r io.Reader }

func (d dribble) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	return d.r.Read(p[:1])
}

func TestHellosAreReadHoweverTheyAreCut(t *testing.T) {
	raw := helloBytes(t, "App.Test")
	for name, b := range map[string][]byte{
		"one record": raw, "records of 1 byte": rerecord(raw, 1), "records of 3 bytes": rerecord(raw, 3), "two records": rerecord(raw, len(raw)/2+1),
	} {
		for _, r := range []io.Reader{bytes.NewReader(append(b, "rest"...)), dribble{bytes.NewReader(append(b, "rest"...))}} {
			h, err := readHello(r, 16<<10)
			if err != nil || h.serverName != "App.Test" || h.host() != "app.test" {
				t.Fatalf("%s: got %q, %v", name, h.serverName, err)
			}
			rest, _ := io.ReadAll(r)
			if !bytes.Equal(h.raw, b) || string(rest) != "rest" {
				t.Errorf("%s: bytes are lost: %d of %d, then %q", name, len(h.raw), len(b), rest)
			}
		}
	}
	for name, b := range map[string][]byte{
		"cut":                 raw[:len(raw)-1],
		"bytes behind it":     append([]byte{22, 3, 1, byte((len(raw) - 4) >> 8), byte(len(raw) - 4)}, append(bytes.Clone(raw[5:]), 0)...),
		"an empty record":     append([]byte{22, 3, 1, 0, 0}, raw...),
		"an alert between":    append(bytes.Clone(raw[:5]), 21, 3, 3, 0, 2, 2, 0),
		"a server's hello":    {22, 3, 3, 0, 4, 2, 0, 0, 0},
		"a record of 64 KiB":  {22, 3, 3, 0xff, 0xff},
		"a promise of 16 MiB": {22, 3, 3, 0, 4, 1, 0xff, 0xff, 0xff},
		"SSL 2":               {0x80, 0x2e, 1, 0, 2},
	} {
		if _, err := readHello(bytes.NewReader(b), 16<<10); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	if _, err := readHello(bytes.NewReader(raw), len(raw)-1); !errors.Is(err, errHello) {
		t.Errorf("beyond the limit: %v", err)
	}
}

// FuzzHello holds the Edge's reading of a hello against crypto/tls's: a client whom the Edge takes to one host must not
// mean another one to the Origin.
func FuzzHello(f *testing.F) {
	raw := helloBytes(f, "app.test")
	f.Add(raw)
	f.Add(rerecord(raw, 7))
	var b bytes.Buffer
	tls.Client(&scriptConn{out: &b}, &tls.Config{ServerName: "b.test", NextProtos: []string{"h2", ALPN}, MaxVersion: tls.VersionTLS12}).Handshake()
	f.Add(b.Bytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		const limit = 16 << 10
		ours, err := readHello(bytes.NewReader(b), limit)
		if len(ours.raw) > limit || !bytes.HasPrefix(b, ours.raw) {
			t.Fatalf("holds %d bytes that are not the first", len(ours.raw))
		}
		var theirs *tls.ClientHelloInfo
		tls.Server(&scriptConn{in: bytes.NewReader(b), out: io.Discard}, &tls.Config{GetConfigForClient: func(h *tls.ClientHelloInfo) (*tls.Config, error) {
			theirs = h
			return nil, errHello
		}}).Handshake()
		if err != nil || theirs == nil {
			return
		}
		if theirs.ServerName != ours.serverName {
			t.Fatalf("server name %q, crypto/tls reads %q", ours.serverName, theirs.ServerName)
		}
		if len(theirs.SupportedProtos)+len(ours.alpn) > 0 && !reflect.DeepEqual(theirs.SupportedProtos, ours.alpn) {
			t.Fatalf("protocols %q, crypto/tls reads %q", ours.alpn, theirs.SupportedProtos)
		}
	})
}
