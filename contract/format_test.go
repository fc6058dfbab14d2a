package contract

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"holdfast/identity"
	"holdfast/internal/canonical"
)

func fill32(b byte) (out [32]byte) {
	for i := range out {
		out[i] = b
	}
	return out
}

// vectorContract is a contract in which every field of the format is set.
func vectorContract() (*Header, *Keys, *Body) {
	manifest, layer := "sha256:"+strings.Repeat("4d", 32), "sha256:"+strings.Repeat("4c", 32)
	h := &Header{
		Version: 1, Grid: fill32(0x01), Account: fill32(0x02), Name: "shop", Revision: 2, Contract: fill32(0x03), Previous: fill32(0x04),
		Services: []Service{
			{Name: "db", Replicas: 1, CPUMilli: 1000, Memory: 512 << 20, Pids: 512, Networks: []string{"default"}, Volumes: []string{"data"}},
			{Name: "web", Replicas: 2, CPUMilli: 250, Memory: 128 << 20, Pids: 100, Networks: []string{"default"}, Placement: Placement{"farm", []string{"farm-1", "farm-2"}, []string{"node-3"}}, Egress: true, Update: Update{1, OnFailurePause, 30, 300}},
		},
		Volumes: []Volume{{"data", 1 << 30, Store{}}}, Networks: []string{"default"}, Routes: []Route{{"shop.localhost", "web", 8080}},
	}
	k := &Keys{Body: fill32(0x10), Salt: fill32(0x11), Volumes: map[string][32]byte{"data": fill32(0x12), "old": fill32(0x13)}, Networks: map[string][32]byte{"default": fill32(0x14)}}
	img := Image{"example/web:1", manifest, []Blob{{manifest, 1, fill32(0x20), fill32(0x21)}, {layer, 1 << 20, fill32(0x22), fill32(0x23)}}}
	b := &Body{Version: 1, Services: []Process{
		{Name: "db", Image: img, Mounts: []Mount{{"data", "/data", true}}, Health: &Healthcheck{[]string{"ok"}, time.Second, 2 * time.Second, 3 * time.Second, 4}},
		{
			Name: "web", Image: img, Entrypoint: []string{"/web"}, Command: []string{"-v"}, Environment: []string{"A=1", "B="}, WorkingDir: "/srv", User: "5:6", ReadOnly: true,
			CapAdd: []string{"NET_ADMIN"}, CapDrop: []string{"ALL"}, Tmpfs: []Tmpfs{{"/tmp", 1 << 20}}, Files: []File{{"/run/secrets/s", []byte("s"), 0o400, 5, 6, true}},
			DependsOn: []Dependency{{"db", Healthy}}, Restart: "on-failure", MaxRetries: 3, StopSignal: "SIGINT", StopGrace: 20 * time.Second,
			Labels: map[string]string{"k": "v"}, Egress: []Egress{{"203.0.113.0/24", "tcp", 443}}, Expose: []uint16{8080}, Hostname: "front", Aliases: []string{"www"},
		},
	}, Certificates: []Certificate{{"shop.localhost", [][]byte{{0x30}}, []byte{0x31}}}, Source: []byte("services:\n")}
	sealed, err := Seal(h, k, b)
	if err != nil {
		panic(err)
	}
	_ = sealed
	return h, k, b
}

// vectorStore is a contract with buckets, in which every field of these is set.
func vectorStore() (*Header, *Keys, *Body) {
	h, k, b := vectorContract()
	h.Services = []Service{
		{Name: "s3", Replicas: 1, CPUMilli: 500, Memory: 512 << 20, Pids: 512, Networks: []string{"default"}},
		{Name: "web", Replicas: 1, CPUMilli: 250, Memory: 128 << 20, Pids: 100, Networks: []string{"default"}},
	}
	h.Volumes, h.Routes, h.Store = nil, nil, Store{fill32(0x30), fill32(0x31), 1 << 30}
	h.Approvals = []identity.Approval{{Name: "budget", Need: 2, Parties: []identity.Party{{Account: fill32(0x33), Weight: 1}, {Account: fill32(0x34), Weight: 2}}, Acts: []identity.Act{identity.ActCancel, identity.ActRevise}}}
	b.Certificates = nil
	b.Template = &Origin{fill32(0x35), "photos", "1.0", fill32(0x36), []Value{{"size", "1GiB"}}}
	b.Services = []Process{
		{Name: "s3", Image: Image{Blobs: []Blob{}}, FrontEnd: &FrontEnd{fill32(0x32), []byte("keys"), "HFACCESS00000000", "secretsecretsecret", []Bucket{{"avatars", true}, {"uploads", false}}}},
		{Name: "web", Image: b.Services[1].Image, Buckets: []string{"uploads"}},
	}
	if _, err := Seal(h, k, b); err != nil {
		panic(err)
	}
	return h, k, b
}

// documented are the vectors of docs/formats/contract.md.
func documented(t *testing.T) map[string][]byte {
	t.Helper()
	raw, err := os.ReadFile("../docs/formats/contract.md")
	if err != nil {
		t.Fatal(err)
	}
	out := map[string][]byte{}
	for _, m := range regexp.MustCompile("(?m)^### ([^\n]+)\n+```hex\n([0-9a-f\n]+)```").FindAllStringSubmatch(string(raw), -1) {
		b, err := hex.DecodeString(strings.ReplaceAll(m[2], "\n", ""))
		if err != nil {
			t.Fatalf("%s: %v", m[1], err)
		}
		out[m[1]] = b
	}
	return out
}

// The vectors of the document are what this program writes. HOLDFAST_VECTORS names a file to print them into.
func TestTheFormatIsFrozen(t *testing.T) {
	h, k, b := vectorContract()
	first := *h
	first.Revision, first.Contract, first.Previous = 1, ID{}, RevisionID{}
	sealed, err := Seal(h, k, b)
	if err != nil {
		t.Fatal(err)
	}
	id := ID(fill32(0x03))
	e := Envelope{Revision: fill32(0x05), Kind: RecipientNode, Recipient: fill32(0x06)}
	d32 := func(d [32]byte) []byte { return d[:] }
	sealedHash := sha256.Sum256(sealed)
	got := []struct {
		name string
		b    []byte
	}{
		{"Keys", canonical.Encode(k)}, {"Body", canonical.Encode(b)}, {"SHA-256 of the sealed body", sealedHash[:]},
		{"Body commitment", d32(commitBody(k, canonical.Encode(b)))}, {"Key commitment", d32(commitKeys(k))},
		{"Header", h.Encode()}, {"RevisionID of the header", d32(h.RevisionID())}, {"ContractID of revision 1", d32(first.ContractID())},
		{"NetworkID of default", d32(NetworkOf(id, "default"))}, {"VolumeID of data", d32(VolumeOf(id, "data"))}, {"WorkloadID of web 258", d32(WorkloadOf(id, "web", 258))},
		{"Info of the envelope", e.info()},
	}
	sh, sk, sb := vectorStore()
	got = append(got, []struct {
		name string
		b    []byte
	}{{"Header with a store", sh.Encode()}, {"Body with a store", canonical.Encode(sb)}}...)
	if stored, err := Seal(sh, sk, sb); err != nil {
		t.Error(err)
	} else if again, err := Open(sh, sk, stored); err != nil || !reflect.DeepEqual(again, sb) {
		t.Errorf("%v\n%+v\n%+v", err, again, sb)
	}
	want := documented(t)
	if name := os.Getenv("HOLDFAST_VECTORS"); name != "" {
		var out strings.Builder
		for _, v := range got {
			fmt.Fprintf(&out, "### %s\n\n```hex\n", v.name)
			for s := hex.EncodeToString(v.b); s != ""; {
				n := min(len(s), 120)
				fmt.Fprintln(&out, s[:n])
				s = s[n:]
			}
			out.WriteString("```\n\n")
		}
		if err := os.WriteFile(name, []byte(out.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, v := range got {
		if !bytes.Equal(want[v.name], v.b) {
			t.Errorf("%s changed:\n got %x\nwant %x", v.name, v.b, want[v.name])
		}
	}
	if len(want) != len(got) {
		t.Errorf("the document has %d vectors, this test knows %d", len(want), len(got))
	}
	// And the other way round: what the document says decodes to what was encoded.
	again, err := DecodeHeader(want["Header"])
	if err != nil || !reflect.DeepEqual(again, h) {
		t.Fatalf("%v\n%+v\n%+v", err, again, h)
	}
	body, err := Open(again, k, sealed)
	if err != nil || !reflect.DeepEqual(body, b) {
		t.Fatalf("%v\n%+v\n%+v", err, body, b)
	}
}

// Every field of the format is in the vector: a field that is added without one would go unnoticed when it changes.
func TestTheVectorSetsEveryField(t *testing.T) {
	h, k, b := vectorContract()
	set := map[string]bool{}
	var walk func(path string, v reflect.Value)
	walk = func(path string, v reflect.Value) {
		switch v.Kind() {
		case reflect.Pointer:
			if !v.IsNil() {
				walk(path, v.Elem())
			}
		case reflect.Struct:
			for i := range v.NumField() {
				walk(v.Type().Name()+"."+v.Type().Field(i).Name, v.Field(i))
			}
		case reflect.Slice:
			for i := range v.Len() {
				walk(path, v.Index(i))
			}
			fallthrough
		default:
			set[path] = set[path] || !v.IsZero()
		}
	}
	sh, sk, sb := vectorStore()
	for _, v := range []any{h, k, b, sh, sk, sb} {
		walk("", reflect.ValueOf(v))
	}
	if len(set) < 60 {
		t.Fatalf("only %d fields were looked at", len(set))
	}
	for path, ok := range set {
		if !ok {
			t.Errorf("%s is nowhere set", path)
		}
	}
}

func TestIdentifiersDoNotMix(t *testing.T) {
	id := ID{1}
	seen := map[[32]byte]string{}
	for name, d := range map[string][32]byte{
		"network a": NetworkOf(id, "a"), "network b": NetworkOf(id, "b"), "volume a": VolumeOf(id, "a"), "another contract's volume a": VolumeOf(ID{2}, "a"),
		"workload a 0": WorkloadOf(id, "a", 0), "workload a 1": WorkloadOf(id, "a", 1), "workload a 256": WorkloadOf(id, "a", 256), "workload b 0": WorkloadOf(id, "b", 0),
	} {
		if other, dup := seen[d]; dup {
			t.Errorf("%s and %s are one", name, other)
		}
		seen[d] = name
	}
}

func TestIdentifiersAreOfTheHeader(t *testing.T) {
	h, _, _ := vectorContract()
	if h.ContractID() != h.Contract {
		t.Error("a later revision belongs to another contract than it says")
	}
	first := *h
	first.Revision, first.Contract, first.Previous = 1, ID{}, RevisionID{}
	if [32]byte(first.ContractID()) != first.RevisionID() {
		t.Error("revision 1 does not make its contract")
	}
	rev := h.RevisionID()
	for name, f := range map[string]func(*Header){
		"grid": func(h *Header) { h.Grid[0]++ }, "account": func(h *Header) { h.Account[0]++ }, "name": func(h *Header) { h.Name = "x" }, "number": func(h *Header) { h.Revision++ },
		"previous": func(h *Header) { h.Previous[0]++ }, "replicas": func(h *Header) { h.Services = []Service{{Replicas: 9}} }, "sealed body": func(h *Header) { h.SealedBody[0]++ },
		"size": func(h *Header) { h.SealedSize++ }, "body commitment": func(h *Header) { h.BodyCommitment[0]++ }, "key commitment": func(h *Header) { h.KeyCommitment[0]++ },
	} {
		c := *h
		if f(&c); c.RevisionID() == rev {
			t.Errorf("another %s is the same revision", name)
		}
	}
	text := rev.String()
	if !strings.HasPrefix(text, "rev1") || !strings.HasPrefix(WorkloadID{}.String(), "wl1") || !strings.HasPrefix(NetworkID{}.String(), "net1") || !strings.HasPrefix(VolumeID{}.String(), "vol1") {
		t.Errorf("%s", text)
	}
	id, err := ParseID(h.Contract.String())
	if err != nil || id != h.Contract {
		t.Errorf("%v %v", id, err)
	}
	if _, err := ParseID(text); err == nil {
		t.Error("a revision's ID is read as a contract's")
	}
	w := WorkloadOf(id, "web", 1)
	if again, err := ParseWorkloadID(w.String()); err != nil || again != w {
		t.Errorf("%v %v", again, err)
	}
	raw, err := json.Marshal(h) // what holdfast contract show --json prints
	if err != nil || !strings.Contains(string(raw), `"contract":"ctr1`) || strings.Contains(string(raw), "ommitment") {
		t.Errorf("%s %v", raw, err)
	}
}

// An envelope that was sealed once opens for ever.
func TestEnvelopeVector(t *testing.T) {
	_, k, _ := vectorContract()
	key, err := identity.NewOpeningKey(fill32(0x30))
	if err != nil {
		t.Fatal(err)
	}
	const file = "testdata/envelope.hex"
	e := &Envelope{Revision: fill32(0x05), Kind: RecipientNode, Recipient: fill32(0x06)}
	if os.Getenv("HOLDFAST_VECTORS") != "" {
		pub := key.Public()
		sealed, err := SealEnvelope(e.Revision, e.Kind, e.Recipient, &pub, k)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(hex.EncodeToString(canonical.Encode(sealed))+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := hex.DecodeString(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	var got Envelope
	if err := canonical.Decode(raw, MaxEnvelope+256, &got); err != nil {
		t.Fatal(err)
	}
	if got.Revision != e.Revision || got.Kind != e.Kind || got.Recipient != e.Recipient {
		t.Errorf("%+v", got)
	}
	keys, err := got.Open(key)
	if err != nil || !reflect.DeepEqual(keys, k) {
		t.Errorf("%+v %v", keys, err)
	}
}
