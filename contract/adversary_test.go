package contract

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"strings"
	"testing"

	"holdfast/identity"
	"holdfast/internal/canonical"
)

// small is a contract of one service.
func small(t testing.TB) (*Header, *Keys, *Body) {
	t.Helper()
	d := load(t, web("volumes: [data:/d]")+"volumes: {data: }\nx-holdfast: {routes: [{host: a.localhost, service: web, port: 80}]}\n", nil)
	h, b := signable(t, d)
	return h, NewKeys(h, nil), b
}

// Whoever keeps a sealed body, hands on an envelope or shows a header changes something: nothing opens.
func TestWhatTheHeaderDoesNotCommitToIsRefused(t *testing.T) {
	h, k, b := small(t)
	sealed, err := Seal(h, k, b)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Open(h, k, sealed); err != nil { // the control
		t.Fatal(err)
	}
	keys := func(f func(*Keys)) *Keys {
		c := *k
		c.Volumes, c.Networks = maps.Clone(k.Volumes), maps.Clone(k.Networks)
		f(&c)
		return &c
	}
	head := func(f func(*Header)) *Header { c := *h; f(&c); return &c }
	flip := func(i int) []byte { c := bytes.Clone(sealed); c[i] ^= 1; return c }
	other, otherKeys, otherBody := small(t)
	otherSealed, err := Seal(other, otherKeys, otherBody)
	if err != nil {
		t.Fatal(err)
	}
	// rehash is an owner, or somebody who can write the ledger, who makes the hash fit.
	rehash := func(sealed []byte) *Header {
		return head(func(h *Header) { h.SealedBody, h.SealedSize = sha256.Sum256(sealed), uint32(len(sealed)) })
	}
	for _, tc := range []struct {
		name   string
		h      *Header
		k      *Keys
		sealed []byte
		want   string
	}{
		{"a flipped bit of the sealed body", h, k, flip(10), "sealed bytes have another hash"},
		{"a flipped bit whose hash fits", rehash(flip(10)), k, flip(10), "it does not decrypt"},
		{"a flipped bit of the tag whose hash fits", rehash(flip(len(sealed) - 1)), k, flip(len(sealed) - 1), "it does not decrypt"},
		{"a sealed body that is cut", h, k, sealed[:len(sealed)-1], "sealed bytes, the header says"},
		{"a sealed body with a byte more", h, k, append(bytes.Clone(sealed), 0), "sealed bytes, the header says"},
		{"no sealed body", h, k, nil, "sealed bytes, the header says"},
		{"another contract's sealed body", h, k, otherSealed, "another hash"},
		{"another contract's sealed body whose hash fits", rehash(otherSealed), k, otherSealed, "it does not decrypt"},
		{"another contract's sealed body with its keys", rehash(otherSealed), otherKeys, otherSealed, "other keys"},
		{"another body key", h, keys(func(k *Keys) { k.Body[0] ^= 1 }), sealed, "other keys"},
		{"another salt", h, keys(func(k *Keys) { k.Salt[0] ^= 1 }), sealed, "other keys"},
		{"another key of a volume", h, keys(func(k *Keys) { k.Volumes["data"] = [32]byte{1} }), sealed, "other keys"},
		{"no key of a volume", h, keys(func(k *Keys) { delete(k.Volumes, "data") }), sealed, "other keys"},
		{"another secret of a network", h, keys(func(k *Keys) { k.Networks["default"] = [32]byte{1} }), sealed, "other keys"},
		{"a key more", h, keys(func(k *Keys) { k.Volumes["more"] = [32]byte{1} }), sealed, "other keys"},
		{"another key commitment", head(func(h *Header) { h.KeyCommitment[0] ^= 1 }), k, sealed, "other keys"},
		{"another body commitment", head(func(h *Header) { h.BodyCommitment[0] ^= 1 }), k, sealed, "another plaintext"},
		{"no commitments", head(func(h *Header) { h.KeyCommitment, h.BodyCommitment = [32]byte{}, [32]byte{} }), k, sealed, "other keys"},
	} {
		got, err := Open(tc.h, tc.k, tc.sealed)
		if !errors.Is(err, ErrBody) || !strings.Contains(err.Error(), tc.want) || got != nil {
			t.Errorf("%s: %v, want %q", tc.name, err, tc.want)
		}
	}
	// Keys that an owner left out himself: the header commits to their absence, and the node must not take zeros instead.
	for what, f := range map[string]func(*Keys){"volume": func(k *Keys) { clear(k.Volumes) }, "network": func(k *Keys) { clear(k.Networks) }} {
		c, less := *h, keys(f)
		sealed, err := Seal(&c, less, b)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Open(&c, less, sealed); !errors.Is(err, ErrBody) || !strings.Contains(err.Error(), what) {
			t.Errorf("no %s key: %v", what, err)
		}
	}
}

// The salt keeps whoever sees headers from guessing: equal bodies and equal keys do not show.
func TestCommitmentsAreSalted(t *testing.T) {
	h1, k1, b := small(t)
	h2 := *h1
	k2 := *k1
	k2.Salt[0] ^= 1
	for h, k := range map[*Header]*Keys{h1: k1, &h2: &k2} {
		if _, err := Seal(h, k, b); err != nil {
			t.Fatal(err)
		}
	}
	if h1.BodyCommitment == h2.BodyCommitment || h1.KeyCommitment == h2.KeyCommitment {
		t.Error("the same body under the same key shows")
	}
	if h1.SealedBody != h2.SealedBody {
		t.Error("the control: the body and its key were not the same")
	}
	h3, k3 := *h1, NewKeys(h1, k1)
	if _, err := Seal(&h3, k3, b); err != nil {
		t.Fatal(err)
	}
	if k3.Body == k1.Body || k3.Salt == k1.Salt || h3.SealedBody == h1.SealedBody {
		t.Error("a new revision is sealed with old keys")
	}
	if k3.Volumes["data"] != k1.Volumes["data"] || k3.Networks["default"] != k1.Networks["default"] {
		t.Error("a new revision loses the keys of its volumes and networks")
	}
}

// twoKeys makes bytes that AES-256-GCM opens under both keys: the plaintext under the first one is plain, but for its block
// number free, which is chosen so that both tags agree. (AEADs do not commit to their key; the tag is linear in the blocks.)
func twoKeys(t *testing.T, k1, k2 [32]byte, plain []byte, free int) []byte {
	t.Helper()
	type key struct {
		h, mask gf
		b       cipher.Block
	}
	nonce := make([]byte, 12)
	newKey := func(k [32]byte) (out key) {
		out.b, _ = aes.NewCipher(k[:])
		var z, j0 [16]byte
		j0[15] = 1
		var h, m [16]byte
		out.b.Encrypt(h[:], z[:])
		out.b.Encrypt(m[:], j0[:])
		out.h, out.mask = gfOf(h[:]), gfOf(m[:])
		return out
	}
	a, b := newKey(k1), newKey(k2)
	// The ciphertext under the first key, by counter mode from 2.
	ctr := append(bytes.Clone(nonce), 0, 0, 0, 2)
	c := make([]byte, len(plain))
	cipher.NewCTR(a.b, ctr).XORKeyStream(c, plain)
	// What is hashed: the label, the ciphertext, the lengths; each padded to 16 bytes.
	pad := func(b []byte) []byte { return append(bytes.Clone(b), make([]byte, (16-len(b)%16)%16)...) }
	label := []byte(bodyLabel)
	lens := binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, uint64(len(label))*8), uint64(len(c))*8)
	all := append(append(pad(label), pad(c)...), lens...)
	at := len(pad(label))/16 + free
	n := len(all) / 16
	sum, diff := gf{}, gf{}
	p1, p2 := a.h, b.h
	for i := n - 1; i >= 0; i-- {
		d := p1.xor(p2)
		if i == at {
			diff = d
		} else {
			sum = sum.xor(gfOf(all[i*16 : i*16+16]).mul(d))
		}
		p1, p2 = p1.mul(a.h), p2.mul(b.h)
	}
	x := sum.xor(a.mask).xor(b.mask).mul(diff.inverse())
	copy(c[free*16:], x.bytes())
	copy(all[at*16:], x.bytes())
	tag := gf{}
	for i := range n {
		tag = tag.xor(gfOf(all[i*16 : i*16+16])).mul(a.h)
	}
	return append(c, tag.xor(a.mask).bytes()...)
}

// gf is an element of GCM's field: the first bit of the first byte is the coefficient of 1.
type gf struct{ hi, lo uint64 }

func gfOf(b []byte) gf   { return gf{binary.BigEndian.Uint64(b), binary.BigEndian.Uint64(b[8:])} }
func (x gf) xor(y gf) gf { return gf{x.hi ^ y.hi, x.lo ^ y.lo} }
func (x gf) bytes() []byte {
	return binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, x.hi), x.lo)
}
func (x gf) bit(i uint) uint64 { return append([]uint64{x.hi}, x.lo)[i/64] >> (63 - i%64) & 1 }

func (x gf) mul(y gf) (z gf) {
	for i := range uint(128) {
		if x.bit(i) == 1 {
			z = z.xor(y)
		}
		low := y.lo & 1
		y = gf{y.hi >> 1, y.lo>>1 | y.hi<<63}
		if low == 1 {
			y.hi ^= 0xe1 << 56
		}
	}
	return z
}

// inverse is x to the power of 2^128-2.
func (x gf) inverse() gf {
	z, sq := gf{1 << 63, 0}, x
	for range 127 {
		sq = sq.mul(sq)
		z = z.mul(sq)
	}
	return z
}

// A proposer makes one sealed body that opens for the approvers under one key and for a node under another. AES-GCM does
// not notice. The commitments do, whichever of the two the header names.
func TestABodyThatOpensUnderTwoKeysIsRefused(t *testing.T) {
	h, k1, b := small(t)
	k2 := NewKeys(h, k1)
	// Room in the body for a block that nobody reads.
	b.Source = bytes.Repeat([]byte("#"), 64)
	plain := canonical.Encode(b)
	free := (bytes.Index(plain, b.Source) + 15) / 16
	sealed := twoKeys(t, k1.Body, k2.Body, plain, free)
	// The control: the cipher itself opens it under both, to two things.
	opened := map[string]bool{}
	var good []byte
	for _, k := range []*Keys{k1, k2} {
		aead, err := bodyAEAD(k)
		if err != nil {
			t.Fatal(err)
		}
		p, err := aead.Open(nil, make([]byte, 12), sealed, []byte(bodyLabel))
		if err != nil {
			t.Fatalf("the adversary's bytes do not open: %v", err)
		}
		opened[string(p)] = true
		if k == k1 {
			good = p
		}
	}
	if len(opened) != 2 {
		t.Fatal("both keys open the same")
	}
	h.SealedBody, h.SealedSize = sha256.Sum256(sealed), uint32(len(sealed))
	for _, tc := range []struct {
		name           string
		body, key      *Keys // whom the commitments are made for
		first, second  string
		firstDecrypted bool
	}{
		{"both commitments for the first", k1, k1, "", "other keys", true},
		{"key commitment for the second", k1, k2, "other keys", "another plaintext", false},
	} {
		c := *h
		c.BodyCommitment, c.KeyCommitment = commitBody(tc.body, good), commitKeys(tc.key)
		for i, k := range []*Keys{k1, k2} {
			want := []string{tc.first, tc.second}[i]
			_, err := Open(&c, k, sealed)
			switch {
			case want == "" && err != nil:
				t.Errorf("%s, key %d: the body that was meant is refused: %v", tc.name, i+1, err)
			case want != "" && (!errors.Is(err, ErrBody) || !strings.Contains(err.Error(), want)):
				t.Errorf("%s, key %d: %v, want %q", tc.name, i+1, err, want)
			}
		}
	}
}

// A body that its own owner sealed must still fit what the grid was told.
func TestABodyThatDoesNotFitItsHeaderIsRefused(t *testing.T) {
	for _, tc := range []struct {
		name string
		f    func(h *Header, b *Body)
		want string
	}{
		{"another version", func(_ *Header, b *Body) { b.Version = 2 }, "version 2 is not known"},
		{"a service more", func(_ *Header, b *Body) { b.Services = append(b.Services, b.Services[0]) }, "2 services, the header has 1"},
		{"a service by another name", func(_ *Header, b *Body) { b.Services[0].Name = "db" }, `service 0 is "db", in the header it is "web"`},
		{"egress that the header does not tell", func(_ *Header, b *Body) { b.Services[0].Egress = []Egress{{"0.0.0.0/0", "tcp", 0}} }, "egress in body and header differ"},
		{"egress that the header promises", func(h *Header, _ *Body) { h.Services[0].Egress = true }, "egress in body and header differ"},
		{"egress to what is no prefix", func(h *Header, b *Body) {
			h.Services[0].Egress = true
			b.Services[0].Egress = []Egress{{"10.0.0.1/8", "tcp", 0}}
		}, "not a protocol and a prefix"},
		{"egress of another protocol", func(h *Header, b *Body) {
			h.Services[0].Egress = true
			b.Services[0].Egress = []Egress{{"10.0.0.0/8", "icmp", 0}}
		}, "not a protocol and a prefix"},
		{"a volume of another service", func(_ *Header, b *Body) { b.Services[0].Mounts[0].Volume = "other" }, `mount of volume "other", which the header does not give it`},
		{"a volume that is not mounted", func(_ *Header, b *Body) { b.Services[0].Mounts = nil }, `volume "data" is not mounted`},
		{"a mount over the root", func(_ *Header, b *Body) { b.Services[0].Mounts[0].Target = "/" }, "is not a clean absolute path"},
		{"a mount that climbs", func(_ *Header, b *Body) { b.Services[0].Mounts[0].Target = "/a/../../etc" }, "is not a clean absolute path"},
		{"a file over /proc", func(_ *Header, b *Body) { b.Services[0].Files = []File{{Target: "/proc/self/mem"}} }, "nothing can be mounted at /proc/self/mem"},
		{"a file that sets the user", func(_ *Header, b *Body) { b.Services[0].Files = []File{{Target: "/x", Mode: 0o4755}} }, "file /x has mode"},
		{"two things at one path", func(_ *Header, b *Body) { b.Services[0].Tmpfs = []Tmpfs{{Target: "/d"}} }, "two things are mounted at /d"},
		{"files in another order", func(_ *Header, b *Body) { b.Services[0].Files = []File{{Target: "/y"}, {Target: "/x"}} }, "not sorted"},
		{"too many files", func(_ *Header, b *Body) {
			for i := range MaxMounts {
				b.Services[0].Files = append(b.Services[0].Files, File{Target: fmt.Sprintf("/f%04d", i)})
			}
		}, "257 volumes, tmpfs, configs and secrets, at most 256 are allowed"},
		{"an endless tmpfs", func(_ *Header, b *Body) { b.Services[0].Tmpfs = []Tmpfs{{Target: "/t", Size: MaxMemory + 1}} }, "at most"},
		{"an environment name twice", func(_ *Header, b *Body) { b.Services[0].Environment = []string{"A=1", "A=2"} }, `environment entries are not sorted, or "A" is there twice`},
		{"an environment without a name", func(_ *Header, b *Body) { b.Services[0].Environment = []string{"=1"} }, "not KEY=value"},
		{"a zero byte in the environment", func(_ *Header, b *Body) { b.Services[0].Environment = []string{"A=1\x00B=2"} }, "environment holds a zero byte"},
		{"a zero byte in a command", func(_ *Header, b *Body) { b.Services[0].Command = []string{"a\x00b"} }, "command holds a zero byte"},
		{"a capability that is none", func(_ *Header, b *Body) { b.Services[0].CapAdd = []string{"ALL"} }, "capability ALL cannot be added"},
		{"a capability that is none, dropped", func(_ *Header, b *Body) { b.Services[0].CapDrop = []string{"FLY"} }, `capability "FLY" is not known`},
		{"a relative working directory", func(_ *Header, b *Body) { b.Services[0].WorkingDir = "a" }, "working directory"},
		{"an image without its manifest", func(_ *Header, b *Body) { b.Services[0].Image.Blobs = nil }, "its manifest is not among its blobs"},
		{"an image by a name", func(_ *Header, b *Body) { b.Services[0].Image.Manifest = "latest" }, `image: "latest" is not a sha256 digest`},
		{"a blob with a digest that is none", func(_ *Header, b *Body) {
			b.Services[0].Image.Blobs = append(b.Services[0].Image.Blobs, Blob{Digest: "sha256:../../x"})
		}, "is not a sha256 digest"},
		{"a blob twice", func(_ *Header, b *Body) { i := &b.Services[0].Image; i.Blobs = append(i.Blobs, i.Blobs[0]) }, "is there twice"},
		{"a dependency that is not there", func(_ *Header, b *Body) { b.Services[0].DependsOn = []Dependency{{"db", Started}} }, `it depends on "db", which is not there`},
		{"a dependency on itself", func(_ *Header, b *Body) { b.Services[0].DependsOn = []Dependency{{"web", Started}} }, `it depends on "web"`},
		{"a healthcheck of nothing", func(_ *Header, b *Body) { b.Services[0].Health = &Healthcheck{} }, "healthcheck has no command"},
		{"a healthcheck in the past", func(_ *Header, b *Body) { b.Services[0].Health = &Healthcheck{Test: []string{"x"}, Interval: -1} }, "healthcheck time of -1ns"},
		{"a restart that is not known", func(_ *Header, b *Body) { b.Services[0].Restart = "maybe" }, `restart "maybe"`},
		{"retries without on-failure", func(_ *Header, b *Body) { b.Services[0].MaxRetries = 1 }, "only on-failure has one"},
		{"a stop that never ends", func(_ *Header, b *Body) { b.Services[0].StopGrace = 2 * maxGrace }, "stop grace"},
		{"a stop signal that is none", func(_ *Header, b *Body) { b.Services[0].StopSignal = "-9" }, "stop signal"},
		{"port 0", func(_ *Header, b *Body) { b.Services[0].Expose = []uint16{0} }, "exposed ports"},
		{"a host name with a line in it", func(_ *Header, b *Body) { b.Services[0].Hostname = "a\n10.0.0.1 b" }, "host"},
		{"an alias of the grid", func(_ *Header, b *Body) { b.Services[0].Aliases = []string{"ledger.grid1.holdfast"} }, "belong to the grid"},
		{"a certificate for another host", func(_ *Header, b *Body) { b.Certificates = []Certificate{{"bank.example", [][]byte{{1}}, []byte{1}}} }, `certificate for "bank.example", which is no route`},
		{"a certificate twice", func(_ *Header, b *Body) {
			c := Certificate{"a.localhost", [][]byte{{1}}, []byte{1}}
			b.Certificates = []Certificate{c, c}
		}, "is there twice"},
		{"a certificate without a key", func(_ *Header, b *Body) { b.Certificates = []Certificate{{"a.localhost", [][]byte{{1}}, nil}} }, "no chain or no key"},
	} {
		h, k, b := small(t)
		tc.f(h, b)
		sealed, err := Seal(h, k, b)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Open(h, k, sealed); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q", tc.name, err, tc.want)
		}
	}
}

func TestHeadersAreValidated(t *testing.T) {
	long := strings.Repeat("x", 64)
	for _, tc := range []struct {
		name string
		f    func(h *Header)
		want string
	}{
		{"another version", func(h *Header) { h.Version = 2 }, "version 2 is not known, this program knows 1"},
		{"no grid", func(h *Header) { h.Grid = identity.GridID{} }, "grid or account is missing"},
		{"no account", func(h *Header) { h.Account = identity.AccountID{} }, "grid or account is missing"},
		{"no name", func(h *Header) { h.Name = "" }, "contract name of 0 bytes"},
		{"a long name", func(h *Header) { h.Name = long }, "contract name of 64 bytes, 1 to 63 are allowed"},
		{"a name with a slash", func(h *Header) { h.Name = "a/b" }, `contract name "a/b"`},
		{"a name with an underscore", func(h *Header) { h.Name = "a_b" }, "use - instead of _"},
		{"revision 0", func(h *Header) { h.Revision = 0 }, "revisions begin with 1"},
		{"revision 1 of another contract", func(h *Header) { h.Contract[0] = 1 }, "revision 1 has no contract"},
		{"revision 2 of no contract", func(h *Header) { h.Revision = 2; h.Previous[0] = 1 }, "names no contract"},
		{"revision 2 behind nothing", func(h *Header) { h.Revision = 2; h.Contract[0] = 1 }, "names no contract or no previous"},
		{"no body", func(h *Header) { h.SealedSize = 0 }, "sealed body of 0 bytes"},
		{"a body that is too large", func(h *Header) { h.SealedSize = MaxBody + 17 }, "sealed body of"},
		{"no services", func(h *Header) { h.Services, h.Volumes, h.Routes = nil, nil, nil }, "0 services"},
		{"too many services", func(h *Header) { h.Services = make([]Service, MaxServices+1) }, "65 services, 1 to 64"},
		{"too many volumes", func(h *Header) { h.Volumes = make([]Volume, MaxVolumes+1) }, "65 volumes"},
		{"too many routes", func(h *Header) { h.Routes = make([]Route, MaxRoutes+1) }, "65 routes"},
		{"too many networks", func(h *Header) { h.Networks = make([]string, MaxNetworks+1) }, "9 networks"},
		{"services in another order", func(h *Header) {
			h.Services = append(h.Services, Service{Name: "a", CPUMilli: 1, Memory: MinMemory, Pids: 1, Networks: h.Networks})
		}, "service names are not sorted"},
		{"a service twice", func(h *Header) { s := h.Services[0]; s.Volumes = nil; h.Services = append(h.Services, s) }, `"web" is there twice`},
		{"too many replicas", func(h *Header) { h.Services[0].Replicas = MaxReplicas + 1 }, "33 replicas, at most 32"},
		{"too many workloads", func(h *Header) {
			h.Services, h.Volumes, h.Routes = nil, nil, nil
			for i := range 5 {
				h.Services = append(h.Services, Service{Name: fmt.Sprint("s", i), Replicas: 32, CPUMilli: 1, Memory: MinMemory, Pids: 1, Networks: h.Networks})
			}
		}, "160 replicas in all, at most 128 are allowed"},
		{"no memory", func(h *Header) { h.Services[0].Memory = 0 }, "memory of 0 bytes"},
		{"endless memory", func(h *Header) { h.Services[0].Memory = 1 << 63 }, "memory of"},
		{"no core", func(h *Header) { h.Services[0].CPUMilli = 0 }, "0 thousandths of a core"},
		{"no processes", func(h *Header) { h.Services[0].Pids = 0 }, "0 processes"},
		{"no network", func(h *Header) { h.Services[0].Networks = nil }, "it is on 0 networks, exactly one is needed"},
		{"two networks", func(h *Header) { h.Networks = []string{"a", "default"}; h.Services[0].Networks = h.Networks }, "it is on 2 networks"},
		{"a network that is not there", func(h *Header) { h.Services[0].Networks = []string{"x"} }, `network "x" is not there`},
		{"a network that nobody is on", func(h *Header) { h.Networks = []string{"default", "x"} }, `network "x" is used by no service`},
		{"a volume that is not there", func(h *Header) { h.Services[0].Volumes = []string{"data", "x"} }, `volume "x" is not there`},
		{"a volume that nobody has", func(h *Header) { h.Services[0].Volumes = nil }, `volume "data" is used by no service`},
		{"a volume of two services", func(h *Header) { s := h.Services[0]; s.Name = "x"; h.Services = append(h.Services, s) }, `volume "data" is used by services "web" and "x"`},
		{"a volume of two replicas", func(h *Header) { h.Services[0].Replicas = 2 }, "a volume belongs to one replica"},
		{"a volume of nothing", func(h *Header) { h.Volumes[0].Size = 0 }, `volume "data" has 0 bytes`},
		{"a volume that is too large", func(h *Header) { h.Volumes[0].Size = MaxVolumeSize + 1 }, `volume "data" has`},
		{"a route to nowhere", func(h *Header) { h.Routes[0].Service = "x" }, `route "a.localhost" leads to service "x"`},
		{"a route without a port", func(h *Header) { h.Routes[0].Port = 0 }, "has no port"},
		{"a route twice", func(h *Header) { h.Routes = append(h.Routes, h.Routes[0]) }, `"a.localhost" is there twice`},
		{"a route of the grid", func(h *Header) { h.Routes[0].Host = "x.holdfast" }, "belong to the grid"},
		{"a route in capitals", func(h *Header) { h.Routes[0].Host = "A.localhost" }, "only a-z"},
		{"a route to an address", func(h *Header) { h.Routes[0].Host = "10.0.0.1" }, "is an address"},
		{"a route with a dot at its end", func(h *Header) { h.Routes[0].Host = "a." }, "is not a host name"},
		{"a route without a name", func(h *Header) { h.Routes[0].Host = "" }, "host name of 0 bytes"},
		{"a spread that is not known", func(h *Header) { h.Services[0].Placement.Spread = "rack" }, `spread "rack"`},
		{"farms in another order", func(h *Header) { h.Services[0].Placement.Farms = []string{"b", "a"} }, "farm names are not sorted"},
		{"too many nodes", func(h *Header) { h.Services[0].Placement.Nodes = make([]string, MaxConstraints+1) }, "65 nodes"},
	} {
		h, k, b := small(t)
		if _, err := Seal(h, k, b); err != nil {
			t.Fatal(err)
		}
		if _, err := DecodeHeader(h.Encode()); err != nil { // the control
			t.Fatal(err)
		}
		tc.f(h)
		if _, err := DecodeHeader(h.Encode()); err == nil || !strings.Contains(err.Error(), tc.want) || !strings.HasPrefix(err.Error(), "contract header: ") {
			t.Errorf("%s: %v, want %q", tc.name, err, tc.want)
		}
	}
}

// A header that is right in all its parts can still be too large.
func TestLargeHeadersAreRefused(t *testing.T) {
	h, k, b := small(t)
	if _, err := Seal(h, k, b); err != nil {
		t.Fatal(err)
	}
	s := h.Services[0]
	s.Volumes = nil
	for i := range MaxConstraints {
		s.Placement.Nodes = append(s.Placement.Nodes, fmt.Sprintf("node-%058d", i))
	}
	for i := range 20 {
		s.Name = fmt.Sprintf("x%02d", i)
		h.Services = append(h.Services, s)
	}
	if err := h.Validate(); err != nil { // the control
		t.Fatal(err)
	}
	if _, err := DecodeHeader(h.Encode()); err == nil || !strings.Contains(err.Error(), "at most 65536 are allowed") {
		t.Errorf("%v", err)
	}
	// And its author is told so before anything is signed.
	var nodes, services strings.Builder
	for _, n := range s.Placement.Nodes {
		nodes.WriteString(n + ", ")
	}
	for i := range 20 {
		fmt.Fprintf(&services, "  x%d: {image: x}\n", i)
	}
	path := project(t, "services:\n"+services.String()+"x-holdfast: {placement: {nodes: ["+nodes.String()+"]}}\n", nil)
	if _, err := Load(t.Context(), Input{Path: path}); err == nil || !strings.Contains(err.Error(), "the contract's public header has") {
		t.Errorf("%v", err)
	}
}

// Envelopes are records that anybody who keeps the ledger's state can copy and move.
func TestEnvelopesOpenForTheirRecipientOnly(t *testing.T) {
	_, k, _ := small(t)
	key, err := identity.GenerateOpeningKey()
	if err != nil {
		t.Fatal(err)
	}
	other, err := identity.GenerateOpeningKey()
	if err != nil {
		t.Fatal(err)
	}
	pub := key.Public()
	e, err := SealEnvelope(RevisionID{1}, RecipientNode, [32]byte{2}, &pub, k)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := e.Open(key); err != nil || got.Body != k.Body || got.Volumes["data"] != k.Volumes["data"] { // the control
		t.Fatalf("%+v %v", got, err)
	}
	if bytes.Contains(e.Sealed, k.Body[:]) {
		t.Error("the key lies open in its envelope")
	}
	blown := Envelope{Sealed: make([]byte, MaxEnvelope+1)}
	if _, err := blown.Open(key); err == nil || !strings.Contains(err.Error(), "16385 bytes, at most 16384 are allowed") {
		t.Errorf("too large: %v", err)
	}
	for name, f := range map[string]func(e *Envelope){
		"moved to another revision":  func(e *Envelope) { e.Revision[0]++ },
		"moved to another recipient": func(e *Envelope) { e.Recipient[0]++ },
		"moved to an account":        func(e *Envelope) { e.Kind = RecipientAccount },
		"changed":                    func(e *Envelope) { e.Sealed[len(e.Sealed)-1] ^= 1 },
		"cut":                        func(e *Envelope) { e.Sealed = e.Sealed[:len(e.Sealed)-1] },
		"emptied":                    func(e *Envelope) { e.Sealed = nil },
	} {
		c := *e
		c.Sealed = bytes.Clone(e.Sealed)
		f(&c)
		if got, err := c.Open(key); err == nil || got != nil {
			t.Errorf("%s: it opens", name)
		}
	}
	if _, err := e.Open(other); err == nil {
		t.Error("another key opens it")
	}
	// What is sealed properly and is not keys.
	for name, plain := range map[string][]byte{"nothing": nil, "no map": {0x01}, "a key that is too short": {0xa1, 0x01, 0x41, 0x00}, "a field more": append(canonical.Encode(k), 0)} {
		c := *e
		if c.Sealed, err = pub.Seal(c.info(), plain); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Open(key); err == nil {
			t.Errorf("%s is taken for keys", name)
		}
	}
}

// A volume that is dropped by mistake, and put back two revisions later, opens.
func TestKeysOfDroppedVolumesStay(t *testing.T) {
	h, first, _ := small(t)
	without := *h
	without.Volumes = nil
	second := NewKeys(&without, first)
	third := NewKeys(h, NewKeys(&without, second))
	if third.Volumes["data"] != first.Volumes["data"] || second.Volumes["data"] != first.Volumes["data"] {
		t.Error("its key is another")
	}
	if NewKeys(h, nil).Volumes["data"] == first.Volumes["data"] { // the control
		t.Error("two contracts share a key")
	}
}

// Keys of dropped volumes stay, so that a contract could collect more than an envelope holds: its owner is told before
// anything is signed.
func TestKeysThatNoEnvelopeHoldsAreNotSealed(t *testing.T) {
	h, k, b := small(t)
	for i := range 400 {
		k.Volumes[fmt.Sprintf("dropped-%d", i)] = [32]byte{byte(i)}
	}
	if _, err := Seal(h, k, b); err == nil || !strings.Contains(err.Error(), "the keys of 401 volumes") {
		t.Errorf("%v", err)
	}
	// The most that is allowed fits into an envelope.
	clear(k.Volumes)
	for i := 0; len(canonical.Encode(k)) < MaxKeys-40; i++ {
		k.Volumes[fmt.Sprint(i)] = [32]byte{}
	}
	key, err := identity.GenerateOpeningKey()
	if err != nil {
		t.Fatal(err)
	}
	pub := key.Public()
	e, err := SealEnvelope(RevisionID{}, RecipientNode, [32]byte{}, &pub, k)
	if err != nil {
		t.Fatal(err)
	}
	if len(e.Sealed) > MaxEnvelope {
		t.Errorf("%d bytes", len(e.Sealed))
	}
	if _, err := e.Open(key); err != nil {
		t.Error(err)
	}
}

func TestBodiesOfTooMuchAreNotSealed(t *testing.T) {
	h, k, b := small(t)
	b.Source = make([]byte, MaxBody)
	if _, err := Seal(h, k, b); err == nil || !strings.Contains(err.Error(), "at most 8388608 are allowed") {
		t.Errorf("%v", err)
	}
	b.Source = nil
	b.Services[0].Command = make([]string, MaxItems)
	if _, err := Seal(h, k, b); err == nil || !strings.Contains(err.Error(), "more than 65536 entries") {
		t.Errorf("%v", err)
	}
	b.Services[0].Command = make([]string, MaxItems-200)
	sealed, err := Seal(h, k, b)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Open(h, k, sealed); err != nil {
		t.Error(err)
	}
}
