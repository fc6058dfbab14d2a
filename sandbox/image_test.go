package sandbox

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"holdfast/internal/testimage"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func runner(t testing.TB) *Runner {
	t.Helper()
	r, err := New(Config{Dir: t.TempDir(), Image: 8 << 20})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func file(name, data string) testimage.Entry {
	return testimage.Entry{Header: tar.Header{Name: name, Mode: 0o644}, Data: []byte(data)}
}

func entry(name string, kind byte, link string) testimage.Entry {
	return testimage.Entry{Header: tar.Header{Name: name, Typeflag: kind, Linkname: link}}
}

func TestMaliciousLayersAreRefused(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	outside := filepath.Join(t.TempDir(), "outside")
	for name, layer := range map[string][]byte{
		"path traversal":              testimage.Layer(file("../../outside", "x")),
		"traversal in the middle":     testimage.Layer(file("a/../../x", "x")),
		"absolute symlink escape":     testimage.Layer(entry("d", tar.TypeSymlink, filepath.Dir(outside)), file("d/outside", "x")),
		"relative symlink escape":     testimage.Layer(entry("d", tar.TypeSymlink, "../../../../../../../../tmp"), file("d/outside", "x")),
		"hard link to the outside":    testimage.Layer(entry("l", tar.TypeLink, "../../../../../../etc/passwd")),
		"hard link through a symlink": testimage.Layer(entry("d", tar.TypeSymlink, "/etc"), entry("l", tar.TypeLink, "d/passwd")),
		"device node":                 testimage.Layer(testimage.Entry{Header: tar.Header{Name: "null", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3}}),
		"block device":                testimage.Layer(testimage.Entry{Header: tar.Header{Name: "sda", Typeflag: tar.TypeBlock, Devmajor: 8}}),
		"pipe":                        testimage.Layer(entry("p", tar.TypeFifo, "")),
		"whiteout of the parent":      testimage.Layer(file("a/.wh...", "")),
		"too deep":                    testimage.Layer(file(strings.Repeat("d/", 200)+"f", "x")),
		"larger than allowed":         testimage.Layer(file("big", strings.Repeat("x", 9<<20))),
		"not a tar":                   bytes.Repeat([]byte("garbage "), 200),
		"truncated":                   testimage.Layer(file("f", strings.Repeat("x", 2000)))[:1500],
	} {
		r := runner(t)
		img := testimage.New(ocispec.ImageConfig{}, layer)
		if _, err := r.Unpack(t.Context(), img, img.Manifest); err == nil {
			t.Errorf("%s: accepted", name)
		}
		if _, err := os.Lstat(outside); err == nil {
			t.Fatalf("%s: it wrote outside", name)
		}
		if left, _ := filepath.Glob(filepath.Join(r.cfg.Dir, "layers", "*")); len(left) > 0 {
			t.Errorf("%s: left %v", name, left)
		}
	}
	r := runner(t)
	img := testimage.New(ocispec.ImageConfig{}, testimage.Layer(file("d/f", "x"), entry("l", tar.TypeSymlink, "/etc/passwd"), entry("h", tar.TypeLink, "d/f")))
	if _, err := r.Unpack(t.Context(), img, img.Manifest); err != nil {
		t.Errorf("control: %v", err)
	}
}

func TestDecompressionBomb(t *testing.T) {
	var buf bytes.Buffer
	z := gzip.NewWriter(&buf)
	tw := tar.NewWriter(z)
	const size = 1 << 30
	tw.WriteHeader(&tar.Header{Name: "bomb", Size: size, Mode: 0o644})
	io.CopyN(tw, zeros{}, size)
	tw.Close()
	z.Close()
	r := runner(t)
	img := testimage.New(ocispec.ImageConfig{}, buf.Bytes())
	if _, err := r.Unpack(t.Context(), img, img.Manifest); !errors.Is(err, ErrImage) {
		t.Fatalf("%d bytes that unpack to 1 GiB: %v", buf.Len(), err)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// liar gives other bytes than the digest says for one blob.
type liar struct {
	*testimage.Image
	about string
	bytes []byte
}

func (l liar) Open(ctx context.Context, d string) (io.ReadCloser, error) {
	if d == l.about {
		return io.NopCloser(bytes.NewReader(l.bytes)), nil
	}
	return l.Image.Open(ctx, d)
}

func TestTamperedBlobsAreRefused(t *testing.T) {
	good := testimage.New(ocispec.ImageConfig{Entrypoint: []string{"/a"}}, testimage.Layer(file("a", "good")))
	evil := testimage.New(ocispec.ImageConfig{Entrypoint: []string{"/a"}}, testimage.Layer(file("a", "evil")))
	for d, b := range good.Blobs {
		changed := bytes.Clone(b)
		changed[len(changed)/2] ^= 1
		for name, with := range map[string][]byte{"a flipped bit": changed, "a byte more": append(bytes.Clone(b), 0), "a byte less": b[:len(b)-1], "nothing": nil, "another manifest": evil.Blobs[evil.Manifest]} {
			r := runner(t)
			if _, err := r.Unpack(t.Context(), liar{good, d, with}, good.Manifest); err == nil {
				t.Errorf("%s with %s was accepted", d, name)
			}
			if left, _ := filepath.Glob(filepath.Join(r.cfg.Dir, "layers", "*")); len(left) > 0 {
				t.Errorf("%s: left %v", name, left)
			}
		}
	}
	if _, err := runner(t).Unpack(t.Context(), good, good.Manifest); err != nil {
		t.Errorf("control: %v", err)
	}
}

func TestWhiteouts(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	r := runner(t)
	img := testimage.New(ocispec.ImageConfig{}, testimage.Layer(file("a", "1"), file("d/x", "1"), file("d/y", "1")), testimage.Layer(file(".wh.a", ""), file("d/.wh..wh..opq", ""), file("d/z", "2")))
	got, err := r.Unpack(t.Context(), img, img.Manifest)
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Layers) != 2 {
		t.Fatal(got)
	}
	// Only overlayfs on a file system with trusted attributes shows the result; the lab's sandbox does the rest.
	if st, err := os.Lstat(filepath.Join(r.cfg.Dir, "layers", got.Layers[1], "a")); err != nil || st.Mode()&os.ModeCharDevice == 0 {
		t.Errorf("whiteout: %v %v", st, err)
	}
	if err := r.Prune(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if left, _ := filepath.Glob(filepath.Join(r.cfg.Dir, "layers", "*")); len(left) > 0 {
		t.Errorf("pruned, but %v", left)
	}
}

func FuzzLayer(f *testing.F) {
	f.Add(testimage.Layer(file("a", "1"), entry("l", tar.TypeSymlink, "a"), entry("h", tar.TypeLink, "a"), file(".wh.a", "")))
	f.Add(testimage.Layer(file("../x", "1")))
	f.Fuzz(func(t *testing.T, layer []byte) {
		base := t.TempDir()
		dir := filepath.Join(base, "in")
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		untar(t.Context(), bytes.NewReader(layer), dir, 1<<20)
		if e, _ := os.ReadDir(base); len(e) != 1 {
			t.Fatalf("it wrote outside: %v", e)
		}
	})
}
