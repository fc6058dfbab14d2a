package contract

import (
	"bytes"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"holdfast/identity"
	"holdfast/internal/canonical"
)

// What is read from a Compose file can be signed and opened, and read again it is the same; whatever else it is, it is an
// error that names the file.
func FuzzCompose(f *testing.F) {
	for _, s := range []string{planned, web("ports: [80]"), web("<<: {command: [a]}\nenv_file: a.env"), "x: &a [*a]\n", web("command: ${A:-${B}}"), web("volumes: [{type: tmpfs, target: /t}]"), web("x-holdfast: {buckets: [up1]}") + "x-holdfast: {buckets: {up1: , up2: {versioning: true}}, storage: 512m}\n"} {
		f.Add([]byte(s), []byte("A=1\nB=\"$A\"\n"))
	}
	f.Fuzz(func(t *testing.T, compose, env []byte) {
		dir := t.TempDir()
		path := filepath.Join(dir, "compose.yaml")
		for name, b := range map[string][]byte{path: compose, filepath.Join(dir, "a.env"): env} {
			if err := os.WriteFile(name, b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		in := Input{Path: path, Env: map[string]string{"A": "a", "FROM_USER": "u"}}
		d, err := Load(t.Context(), in)
		if err != nil {
			if !strings.HasPrefix(err.Error(), path+": ") || strings.Contains(err.Error(), "the file cannot be read: ") || len(err.Error()) > 2000 {
				t.Fatalf("no clear error: %v", err)
			}
			return
		}
		h, b := signable(t, d)
		k := NewKeys(h, nil)
		sealed, err := Seal(h, k, b)
		if err != nil {
			t.Fatalf("it was read and cannot be sealed: %v", err)
		}
		again, err := DecodeHeader(h.Encode())
		if err != nil {
			t.Fatalf("it was read and cannot be signed: %v", err)
		}
		opened, err := Open(again, k, sealed)
		if err != nil {
			t.Fatalf("it was read and does not start: %v", err)
		}
		if p := Diff(again, opened, h, b); !p.Empty() {
			t.Fatalf("what was signed differs from what was read:\n%s", p.Text())
		}
		twice, err := Load(t.Context(), in)
		if err != nil || !bytes.Equal(canonical.Encode(twice.Header), canonical.Encode(d.Header)) || !bytes.Equal(canonical.Encode(twice.Body), canonical.Encode(d.Body)) || !reflect.DeepEqual(twice.Notes, d.Notes) {
			t.Fatalf("read again it is another: %v\n%q\n%q", err, d.Notes, twice.Notes)
		}
	})
}

// A header that is accepted has one encoding, and survives what everybody does with it.
func FuzzHeader(f *testing.F) {
	h, _, _ := vectorContract()
	f.Add(h.Encode())
	first := *h
	first.Revision, first.Contract, first.Previous = 1, ID{}, RevisionID{}
	f.Add(first.Encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := DecodeHeader(b)
		if err != nil {
			return
		}
		if !bytes.Equal(h.Encode(), b) {
			t.Fatalf("%x encodes to %x", b, h.Encode())
		}
		if h.ContractID().IsZero() || workloads(h) > MaxWorkloads {
			t.Fatalf("%+v", h)
		}
	})
}

// workloads counts what somebody has to place.
func workloads(h *Header) (n int) {
	for i := range h.Services {
		n += int(h.Services[i].Replicas)
	}
	return n
}

// A body that opens fits its header, shows in a plan, and has one encoding.
func FuzzBody(f *testing.F) {
	h, k, b := vectorContract()
	f.Add(canonical.Encode(b))
	f.Add([]byte{0xa2, 0x01, 0x01, 0x02, 0x80})
	f.Fuzz(func(t *testing.T, plain []byte) {
		b, err := decodeBody(plain)
		if err != nil {
			return
		}
		if again, err := b.encode(); err != nil || !bytes.Equal(again, plain) {
			t.Fatalf("%x encodes to %x (%v)", plain, again, err)
		}
		c := *h
		sealed, err := Seal(&c, k, b)
		if err != nil {
			t.Fatal(err)
		}
		opened, err := Open(&c, k, sealed)
		if errors.Is(err, ErrBody) {
			t.Fatalf("what was sealed is not what is opened: %v", err)
		} else if err == nil && !Diff(&c, b, &c, opened).Empty() {
			t.Fatal("it opens to another body")
		} else if err == nil {
			Diff(nil, nil, &c, opened).Text()
		}
	})
}

// Nobody but the sealer makes an envelope that opens; what is sealed in one is keys or refused.
func FuzzEnvelope(f *testing.F) {
	key, err := identity.NewOpeningKey(fill32(0x30))
	if err != nil {
		f.Fatal(err)
	}
	pub := key.Public()
	_, k, _ := vectorContract()
	text, err := os.ReadFile("testdata/envelope.hex") // the same in every process that fuzzes
	if err != nil {
		f.Fatal(err)
	}
	sealed, err := hex.DecodeString(strings.TrimSpace(string(text)))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(sealed, canonical.Encode(k))
	f.Fuzz(func(t *testing.T, raw, plain []byte) {
		var got Envelope
		if canonical.Decode(raw, 2*MaxEnvelope, &got) == nil {
			if _, err := got.Open(key); err == nil && !bytes.Equal(raw, sealed) {
				t.Fatalf("an envelope that nobody sealed opens: %x", raw)
			}
		}
		c := Envelope{Kind: RecipientNode}
		var err error
		if c.Sealed, err = pub.Seal(c.info(), plain); err != nil {
			t.Fatal(err)
		}
		if keys, err := c.Open(key); err == nil && !bytes.Equal(canonical.Encode(keys), plain) {
			t.Fatalf("%x is read as %+v", plain, keys)
		}
	})
}
