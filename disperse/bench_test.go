package disperse

import (
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"testing"
	"time"

	"github.com/klauspost/reedsolomon"
)

// BenchmarkScheme sets Encode and Decode beside what they are made of, in turns: AES-256-GCM, Reed–Solomon and SHA-256 over
// the same bytes, one after another, as if by hand and without names, MACs or shares. parts/op and unhashed/op are the
// by-hand times, the latter without the hash; the ratios are of speeds, ours to that by hand, each by its best turn. Run it
// on one core:
//
//	GOMAXPROCS=1 go test ./disperse -run '^$' -bench Scheme
func BenchmarkScheme(b *testing.B) {
	for _, s := range []Scheme{{4, 6}, {16, 20}} {
		for _, size := range []int{64 << 10, 1 << 20, 4 << 20, 16 << 20} {
			c, err := NewCoder(s)
			if err != nil {
				b.Fatal(err)
			}
			key, mac, places := testKeys(s)
			id, plain := NewID(), make([]byte, size)
			rand.Read(plain)
			p, err := newParts(s, plain)
			if err != nil {
				b.Fatal(err)
			}
			e, err := c.Encode(id, key, mac, places, plain)
			if err != nil {
				b.Fatal(err)
			}
			dst := make([]byte, 0, size+size/4+64*s.K)
			decode := func(shards [][]byte) func() {
				return func() {
					if _, err := c.Decode(dst, id, key, e.Wrap, size, shards); err != nil {
						b.Fatal(err)
					}
				}
			}
			part := make([][]byte, s.N)
			copy(part[s.N-s.K:], e.Shards[s.N-s.K:])
			for _, x := range []struct {
				what                  string
				ours, parts, unhashed func()
			}{
				{"encode", func() {
					e, err := c.Encode(id, key, mac, places, plain)
					if err != nil {
						b.Fatal(err)
					}
					e.Release()
				}, p.encode, nil},
				{"decode", decode(e.Shards), func() { p.decode(b, true, 0) }, func() { p.decode(b, false, 0) }},
				{"decode with n-k lost", decode(part), func() { p.decode(b, true, s.N-s.K) }, func() { p.decode(b, false, s.N-s.K) }},
			} {
				b.Run(fmt.Sprintf("%dof%d/%dKiB/%s", s.K, s.N, size>>10, x.what), func(b *testing.B) {
					b.ReportAllocs()
					x.ours()
					const long = time.Hour
					best := [3]time.Duration{long, long, long}
					for b.Loop() {
						for i, f := range []func(){x.ours, x.parts, x.unhashed} {
							if f == nil {
								continue
							}
							if i == 1 {
								b.StopTimer()
							}
							start := time.Now()
							f()
							best[i] = min(best[i], time.Since(start))
						}
						b.StartTimer()
					}
					b.ReportMetric(float64(size)/1e6/best[0].Seconds(), "best-MB/s")
					b.ReportMetric(best[1].Seconds()/best[0].Seconds(), "ratio")
					if x.unhashed != nil {
						b.ReportMetric(best[2].Seconds()/best[0].Seconds(), "ratio-unhashed")
					}
				})
			}
		}
	}
}

// parts is the work by hand.
type parts struct {
	s           Scheme
	plain       []byte
	sealed, out []byte
	shards, cut [][]byte
	sums        [][32]byte
	code        reedsolomon.Encoder
}

func newParts(s Scheme, plain []byte) (*parts, error) {
	size := (len(plain) + 16 + s.K - 1) / s.K
	all := make([]byte, s.N*size)
	p := &parts{s: s, plain: plain, sealed: all[:s.K*size], out: make([]byte, s.K*size), sums: make([][32]byte, s.N), cut: make([][]byte, s.N)}
	for i := range s.N {
		p.shards = append(p.shards, all[i*size:(i+1)*size:(i+1)*size])
	}
	var err error
	p.code, err = reedsolomon.New(s.K, s.N-s.K, reedsolomon.WithMaxGoroutines(1))
	p.encode()
	return p, err
}

func (p *parts) encode() {
	a, _ := aead(make([]byte, 32))
	a.Seal(p.sealed[:0], make([]byte, 12), p.plain, nil)
	p.code.Encode(p.shards)
	for i, s := range p.shards {
		p.sums[i] = sha256.Sum256(s)
	}
}

func (p *parts) decode(t testing.TB, hash bool, lost int) {
	a, _ := aead(make([]byte, 32))
	size := len(p.shards[0])
	for i, s := range p.shards[:p.s.K+lost] {
		p.cut[i] = s
		if i < lost {
			p.cut[i] = p.out[i*size : i*size : (i+1)*size]
			continue
		}
		if i < p.s.K {
			copy(p.out[i*size:], s)
		}
		if hash && sha256.Sum256(s) != p.sums[i] {
			t.Fatal("sum")
		}
	}
	for i := range p.s.N {
		if i >= p.s.K+lost {
			p.cut[i] = nil
		}
	}
	if lost > 0 {
		if err := p.code.ReconstructData(p.cut); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := a.Open(p.out[:0], make([]byte, 12), p.out[:len(p.plain)+16], nil); err != nil {
		t.Fatal(err)
	}
}

func testKeys(s Scheme) (key, mac *Key, places []Place) {
	k, m := Key(sha256.Sum256([]byte("store"))), Key(sha256.Sum256([]byte("shards")))
	key, mac, places = &k, &m, make([]Place, s.N)
	for i := range places {
		places[i] = Place{0xaa, byte(i)}
	}
	return key, mac, places
}
