package store

import (
	"crypto/sha256"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
)

// pattern is n bytes that take no memory.
type pattern struct {
	seed, at uint64
	left     int64
	sum      hash.Hash
}

func (p *pattern) Read(b []byte) (int, error) {
	if p.left == 0 {
		return 0, io.EOF
	}
	b = b[:min(int64(len(b)), p.left)]
	for i := range b {
		b[i] = byte((p.at + uint64(i)) * (p.seed | 1) >> 3)
	}
	p.sum.Write(b)
	p.at, p.left = p.at+uint64(len(b)), p.left-int64(len(b))
	return len(b), nil
}

const memoryVariable = "HOLDFAST_STORE_MEMORY"

// Sixteen bodies of 64 MiB, and sixty-four of 12 MiB, are written at once, and then read at once by clients that take their
// time. The long form has sixty-four of 256 MiB: what is held does not depend on it.
func TestMemoryOfManyBodies(t *testing.T) {
	const most = 512 << 10 // KiB
	long := os.Getenv("HOLDFAST_LONG") != ""
	cases := map[string]func(){
		"one":     func() { largeBody(t, 4, most) },
		"sixteen": func() { manyBodies(t, 16, 64<<20, most) },
		"many":    func() { manyBodies(t, 64, 12<<20, most) },
	}
	if long {
		cases = map[string]func(){
			"one":  func() { largeBody(t, 128, most) }, // 8 GiB
			"many": func() { manyBodies(t, 64, 256<<20, most) },
		}
	}
	if f := cases[os.Getenv(memoryVariable)]; f != nil {
		f()
		return
	}
	for name := range cases {
		cmd := exec.Command(os.Args[0], "-test.run=^TestMemoryOfManyBodies$", "-test.v", "-test.timeout=1h")
		cmd.Env = append(os.Environ(), memoryVariable+"="+name)
		if long {
			cmd.Env = append(cmd.Env, onDiskVariable+"=1")
		}
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v\n%s", name, err, out)
		}
		for line := range strings.Lines(string(out)) {
			if strings.Contains(line, "KiB") {
				t.Log(name, strings.TrimSpace(line))
			}
		}
	}
}

func manyBodies(t *testing.T, n int, size int64, most int) {
	ctx := t.Context()
	bed := newBed(t, 4, 6)
	s := bed.open()
	defer s.Close()
	bodies, sums := make([]Body, n), make([][]byte, n)
	var wg sync.WaitGroup
	for i := range bodies {
		wg.Go(func() {
			p := &pattern{seed: uint64(i), left: size, sum: sha256.New()}
			b, err := s.Write(ctx, "", p, size)
			if err == nil {
				err = s.Update(ctx, func(tx Tx) error { tx.Keep(b); return nil })
			}
			if err != nil {
				t.Error(err)
			}
			bodies[i], sums[i] = b, p.sum.Sum(nil)
		})
	}
	wg.Wait()
	t.Logf("writing: %d KiB resident at most", peak(t))
	for i := range bodies {
		wg.Go(func() {
			r, err := s.Read(ctx, bodies[i], 0, size)
			if err != nil {
				t.Error(err)
				return
			}
			defer r.Close()
			h := sha256.New()
			if _, err := io.Copy(h, struct{ io.Reader }{r}); err != nil || string(h.Sum(nil)) != string(sums[i]) {
				t.Errorf("body %d: %v", i, err)
			}
		})
	}
	wg.Wait()
	if n := peak(t); n > most {
		t.Errorf("%d KiB were resident, at most %d", n, most)
	} else {
		t.Logf("reading: %d KiB resident at most", n)
	}
}

// largeBody is one of parts of 64 MiB, as a multipart upload makes it, of which ranges are read.
func largeBody(t *testing.T, parts, most int) {
	const part, seed = 64 << 20, 7
	ctx := t.Context()
	s := newBed(t, 4, 6).open()
	defer s.Close()
	made := make([]Body, parts)
	var wg sync.WaitGroup
	turns := make(chan struct{}, 4)
	for i := range made {
		turns <- struct{}{}
		wg.Go(func() {
			var err error
			if made[i], err = s.Write(ctx, "", &pattern{seed: seed, at: uint64(i) * part, left: part, sum: sha256.New()}, part); err != nil {
				t.Error(err)
			}
			<-turns
		})
	}
	wg.Wait()
	var body Body
	for _, b := range made {
		body.Size += b.Size
		body.Segments = append(body.Segments, b.Segments...)
	}
	if err := s.Update(ctx, func(tx Tx) error { tx.Keep(body); return nil }); err != nil {
		t.Fatal(err)
	}
	for range 100 {
		off := rand.Int64N(body.Size)
		n := min(rand.Int64N(8<<20), body.Size-off)
		want, have := &pattern{seed: seed, at: uint64(off), left: n, sum: sha256.New()}, sha256.New()
		io.Copy(io.Discard, want)
		r, err := s.Read(ctx, body, off, n)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(have, r); err != nil || string(have.Sum(nil)) != string(want.sum.Sum(nil)) {
			t.Errorf("%d bytes at %d: %v", n, off, err)
		}
		r.Close()
	}
	if n := peak(t); n > most {
		t.Errorf("a body of %d bytes: %d KiB were resident, at most %d", body.Size, n, most)
	} else {
		t.Logf("a body of %d MiB: %d KiB resident at most", body.Size>>20, n)
	}
}

func peak(t *testing.T) (kib int) {
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Skip(err)
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			fmt.Sscanf(v, "%d", &kib)
		}
	}
	return kib
}
