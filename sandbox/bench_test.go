package sandbox

import (
	"archive/tar"
	"math/rand/v2"
	"strconv"
	"testing"
	"time"

	"holdfast/internal/testimage"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// BenchmarkStart goes from Start to a first process that runs and a health check that it answers, and to the end of Stop.
func BenchmarkStart(b *testing.B) {
	l := newLab(b)
	var start, healthy, stop time.Duration
	for i := 0; b.Loop(); i++ {
		id := "b-" + strconv.Itoa(i)
		begin := time.Now()
		l.start(id, func(s *Spec) { s.MemoryBytes, s.CPUMilli, s.Pids = 256<<20, 1000, 100 })
		start += time.Since(begin)
		for {
			if code, _ := l.exec(id, "/server", "health"); code == 0 {
				break
			}
		}
		healthy += time.Since(begin)
		begin = time.Now()
		if err := l.Stop(b.Context(), id); err != nil {
			b.Fatal(err)
		}
		stop += time.Since(begin)
	}
	n := float64(b.N) * 1e6
	b.ReportMetric(float64(start)/n, "ms-start")
	b.ReportMetric(float64(healthy)/n, "ms-healthy")
	b.ReportMetric(float64(stop)/n, "ms-stop")
}

func BenchmarkExec(b *testing.B) {
	l := newLab(b)
	l.start("b")
	for b.Loop() {
		l.exec("b", "/server", "print", "x")
	}
}

// BenchmarkList is what watching costs, with ten sandboxes.
func BenchmarkList(b *testing.B) {
	l := newLab(b)
	for i := range 10 {
		l.start("b-"+strconv.Itoa(i), func(s *Spec) { s.Args = []string{"/server", "sleep"} })
	}
	for b.Loop() {
		if all, err := l.List(b.Context()); err != nil || len(all) != 10 {
			b.Fatal(all, err)
		}
	}
}

func BenchmarkUnpack(b *testing.B) {
	r := onTmpfs(b)
	r.cfg.Image = 1 << 30
	data := make([]byte, 64<<10)
	for i := range data {
		data[i] = byte(rand.IntN(16)) // half of it is air
	}
	var entries []testimage.Entry
	for i := range 512 {
		entries = append(entries, testimage.Entry{Header: tar.Header{Name: "d/" + strconv.Itoa(i), Mode: 0o644}, Data: data})
	}
	layer := testimage.Layer(entries...)
	for name, img := range map[string]*testimage.Image{"plain": testimage.New(ocispec.ImageConfig{}, layer), "gzip": packed(b, zipped(layer))} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(layer)))
			for b.Loop() {
				if _, err := r.Unpack(b.Context(), "owner", img, img.Manifest); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				if err := r.Prune(b.Context(), nil); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
		})
	}
}

// BenchmarkPossession is a second owner's first use of a layer that is unpacked: he must show that he has it.
func BenchmarkPossession(b *testing.B) {
	r := onTmpfs(b)
	r.cfg.Image = 1 << 30
	data := make([]byte, 64<<10)
	for i := range data {
		data[i] = byte(rand.IntN(16))
	}
	var entries []testimage.Entry
	for i := range 512 {
		entries = append(entries, testimage.Entry{Header: tar.Header{Name: "d/" + strconv.Itoa(i), Mode: 0o644}, Data: data})
	}
	layer := testimage.Layer(entries...)
	img := packed(b, zipped(layer))
	if _, err := r.Unpack(b.Context(), "first", img, img.Manifest); err != nil {
		b.Fatal(err)
	}
	b.SetBytes(int64(len(layer)))
	owner := 0
	for b.Loop() {
		owner++
		if _, err := r.Unpack(b.Context(), strconv.Itoa(owner), img, img.Manifest); err != nil {
			b.Fatal(err)
		}
	}
}
