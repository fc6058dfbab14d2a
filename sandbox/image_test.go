package sandbox

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"testing"

	"holdfast/internal/testimage"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
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
		if _, err := r.Unpack(t.Context(), "owner", img, img.Manifest); err == nil {
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
	if _, err := r.Unpack(t.Context(), "owner", img, img.Manifest); err != nil {
		t.Errorf("control: %v", err)
	}
}

func TestDecompressionBombs(t *testing.T) {
	var buf bytes.Buffer
	z := gzip.NewWriter(&buf)
	tw := tar.NewWriter(z)
	const size = 128 << 20
	tw.WriteHeader(&tar.Header{Name: "bomb", Size: size, Mode: 0o644})
	io.CopyN(tw, zeros{}, size)
	tw.Close()
	z.Close()
	plain := testimage.Layer(testimage.Entry{Header: tar.Header{Name: "zeros", Mode: 0o644}, Data: make([]byte, 6<<20)})
	for name, c := range map[string]struct {
		layer  []byte
		limit  int64
		refuse string
	}{
		"more than an image may take": {buf.Bytes(), 8 << 20, "more than is allowed"},
		"more than is honest":         {buf.Bytes(), 1 << 30, "times its size"},
		"zeros that are not packed":   {plain, 8 << 20, ""},
		"few zeros, packed well":      {zipped(plain), 8 << 20, ""},
	} {
		r, err := New(Config{Dir: t.TempDir(), Image: c.limit})
		if err != nil {
			t.Fatal(err)
		}
		img := testimage.New(ocispec.ImageConfig{}, c.layer)
		if bytes.HasPrefix(c.layer, []byte{0x1f, 0x8b}) {
			img = packed(t, c.layer)
		}
		_, err = r.Unpack(t.Context(), "owner", img, img.Manifest)
		if c.refuse == "" && err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if c.refuse != "" && (!errors.Is(err, ErrImage) || !strings.Contains(err.Error(), c.refuse)) {
			t.Errorf("%s: %v", name, err)
		}
		if left, _ := filepath.Glob(filepath.Join(r.cfg.Dir, "layers", "*")); len(left) > 0 && err != nil {
			t.Errorf("%s: left %v", name, left)
		}
	}
}

func zipped(b []byte) []byte {
	var buf bytes.Buffer
	z := gzip.NewWriter(&buf)
	z.Write(b)
	z.Close()
	return buf.Bytes()
}

// packed makes an image of layers that are compressed.
func packed(t testing.TB, layers ...[]byte) *testimage.Image {
	t.Helper()
	img := &testimage.Image{Blobs: map[string][]byte{}}
	add := func(b []byte) ocispec.Descriptor {
		d := testimage.Digest(b)
		img.Blobs[d] = b
		return ocispec.Descriptor{Digest: digest.Digest(d), Size: int64(len(b))}
	}
	c := ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"}, RootFS: ocispec.RootFS{Type: "layers"}}
	var m ocispec.Manifest
	for _, l := range layers {
		r, done, err := decompress(bytes.NewReader(l))
		if err != nil {
			t.Fatal(err)
		}
		h := sha256.New()
		io.Copy(h, r)
		done()
		m.Layers = append(m.Layers, add(l))
		c.RootFS.DiffIDs = append(c.RootFS.DiffIDs, digest.NewDigest(digest.SHA256, h))
	}
	raw, _ := json.Marshal(c)
	m.Config = add(raw)
	raw, _ = json.Marshal(m)
	img.Manifest = string(add(raw).Digest)
	return img
}

func TestCompressions(t *testing.T) {
	layer := testimage.Layer(file("a", "1"))
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer enc.Close()
	for name, b := range map[string][]byte{"none": layer, "gzip": zipped(layer), "two gzip members": append(zipped(layer[:700]), zipped(layer[700:])...), "zstd": enc.EncodeAll(layer, nil)} {
		r := runner(t)
		img := packed(t, b)
		got, err := r.Unpack(t.Context(), "owner", img, img.Manifest)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if data, err := os.ReadFile(filepath.Join(r.cfg.Dir, "layers", got.Layers[0], "a")); err != nil || string(data) != "1" {
			t.Errorf("%s: %q %v", name, data, err)
		}
		// A packed blob that says the right diffID but is cut, or has more behind it.
		bads := map[string][]byte{"cut": b[:len(b)-3], "longer": append(bytes.Clone(b), 0, 0, 0)}
		if name == "gzip" {
			bads["packed in another way"] = bytes.Clone(b)
			bads["packed in another way"][9] ^= 1 // the operating system, which changes nothing inside
		}
		for what, bad := range bads {
			r := runner(t)
			if _, err := r.Unpack(t.Context(), "owner", liar{img, testimage.Digest(b), bad}, img.Manifest); err == nil {
				t.Errorf("%s, %s: accepted", name, what)
			}
		}
	}
}

func TestIndexes(t *testing.T) {
	img := testimage.New(ocispec.ImageConfig{Entrypoint: []string{"/a"}}, testimage.Layer(file("a", "1")))
	put := func(v any) string {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		img.Blobs[testimage.Digest(b)] = b
		return testimage.Digest(b)
	}
	desc := func(d, os, arch string, more int64) ocispec.Descriptor {
		return ocispec.Descriptor{Digest: digest.Digest(d), Size: int64(len(img.Blobs[d])) + more, Platform: &ocispec.Platform{OS: os, Architecture: arch}}
	}
	index := func(m ...ocispec.Descriptor) string { return put(ocispec.Index{Manifests: m}) }
	other := desc(testimage.Digest([]byte("elsewhere")), "linux", "arm64", 0)
	right := desc(img.Manifest, "linux", "amd64", 0)
	var both map[string]any
	if err := json.Unmarshal(img.Blobs[img.Manifest], &both); err != nil {
		t.Fatal(err)
	}
	both["manifests"] = []ocispec.Descriptor{right}
	for name, c := range map[string]struct{ digest, refuse string }{
		"the one for this machine is taken": {index(other, right), ""},
		"none for this machine":             {index(other), "none of its 1 manifests"},
		"another size than it says":         {index(desc(img.Manifest, "linux", "amd64", 1)), "its descriptor says"},
		"an index in an index":              {index(desc(index(right), "linux", "amd64", 0)), "index in an index"},
		"both an index and a manifest":      {put(both), "both an index and a manifest"},
	} {
		got, err := runner(t).Unpack(t.Context(), "owner", img, c.digest)
		if c.refuse == "" && (err != nil || len(got.Layers) != 1) {
			t.Errorf("%s: %v %v", name, got, err)
		}
		if c.refuse != "" && (!errors.Is(err, ErrImage) || !strings.Contains(err.Error(), c.refuse)) {
			t.Errorf("%s: %v", name, err)
		}
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
			if _, err := r.Unpack(t.Context(), "owner", liar{good, d, with}, good.Manifest); err == nil {
				t.Errorf("%s with %s was accepted", d, name)
			}
			if left, _ := filepath.Glob(filepath.Join(r.cfg.Dir, "layers", "*")); len(left) > 0 {
				t.Errorf("%s: left %v", name, left)
			}
		}
	}
	if _, err := runner(t).Unpack(t.Context(), "owner", good, good.Manifest); err != nil {
		t.Errorf("control: %v", err)
	}
}

func TestALayerMustHaveTheDiffIDThatItsConfigurationNames(t *testing.T) {
	a, b := testimage.Layer(file("a", "1")), testimage.Layer(file("a", "2"))
	img := testimage.New(ocispec.ImageConfig{Entrypoint: []string{"/a"}}, a)
	swap := func(d string, from, to string) string {
		changed := bytes.ReplaceAll(img.Blobs[d], []byte(from), []byte(to))
		img.Blobs[testimage.Digest(changed)] = changed
		return testimage.Digest(changed)
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(img.Blobs[img.Manifest], &m); err != nil {
		t.Fatal(err)
	}
	// All blobs have their digests; only the configuration names another tar.
	config := string(m.Config.Digest)
	manifest := swap(img.Manifest, config, swap(config, testimage.Digest(a), testimage.Digest(b)))
	if _, err := runner(t).Unpack(t.Context(), "owner", img, manifest); !errors.Is(err, ErrImage) || !strings.Contains(err.Error(), "diffID") {
		t.Errorf("another diffID: %v", err)
	}
	// And its descriptor another size.
	size := fmt.Sprintf(`"size":%d`, len(a))
	manifest = swap(img.Manifest, size, fmt.Sprintf(`"size":%d`, len(a)+1))
	if _, err := runner(t).Unpack(t.Context(), "owner", img, manifest); !errors.Is(err, ErrImage) || !strings.Contains(err.Error(), "the manifest says") {
		t.Errorf("another size: %v", err)
	}
	if _, err := runner(t).Unpack(t.Context(), "owner", img, img.Manifest); err != nil {
		t.Errorf("control: %v", err)
	}
}

// onTmpfs is a runner on a tmpfs, which keeps the attributes that overlayfs wants.
func onTmpfs(t testing.TB) *Runner {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	r := runner(t)
	if err := unix.Mount("tmpfs", r.cfg.Dir, "tmpfs", 0, "mode=700"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(r.cfg.Dir, unix.MNT_DETACH) })
	return r
}

// merged mounts an image as a sandbox would see it, and lists its files with what is in them.
func merged(t *testing.T, r *Runner, img Image) map[string]string {
	t.Helper()
	b := filepath.Join(r.cfg.Dir, "view")
	for _, d := range []string{"rootfs", "upper", "work"} {
		if err := os.MkdirAll(filepath.Join(b, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := mountRoot(r.cfg.Dir, b, img); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(filepath.Join(b, "rootfs"), unix.MNT_DETACH)
	out := map[string]string{}
	root := filepath.Join(b, "rootfs")
	filepath.WalkDir(root, func(p string, e fs.DirEntry, err error) error {
		if err != nil {
			t.Error(err)
		} else if e.Type().IsRegular() {
			data, _ := os.ReadFile(p)
			out[strings.TrimPrefix(p, root+"/")] = string(data)
		}
		return nil
	})
	return out
}

func TestLayersLieOverEachOther(t *testing.T) {
	below := testimage.Layer(file("a", "1"), file("d/x", "1"), file("d/y", "1"), file("e/x", "1"), file("f/x", "1"), file("g/x", "1"), file("k", "1"))
	for name, c := range map[string]struct {
		top  []testimage.Entry
		want map[string]string
	}{
		"a file is replaced":                        {[]testimage.Entry{file("a", "2")}, map[string]string{"a": "2", "d/x": "1", "d/y": "1", "e/x": "1", "f/x": "1", "g/x": "1", "k": "1"}},
		"a whiteout hides a file and a tree":        {[]testimage.Entry{file(".wh.a", ""), file(".wh.d", "")}, map[string]string{"e/x": "1", "f/x": "1", "g/x": "1", "k": "1"}},
		"an opaque directory hides what is below":   {[]testimage.Entry{file("d/z", "2"), file("d/.wh..wh..opq", "")}, map[string]string{"a": "1", "d/z": "2", "e/x": "1", "f/x": "1", "g/x": "1", "k": "1"}},
		"a directory over a whiteout begins empty":  {[]testimage.Entry{file(".wh.e", ""), file("e/z", "2")}, map[string]string{"a": "1", "d/x": "1", "d/y": "1", "e/z": "2", "f/x": "1", "g/x": "1", "k": "1"}},
		"a directory's own entry, too":              {[]testimage.Entry{file(".wh.e", ""), entry("e/", tar.TypeDir, ""), file("e/z", "2")}, map[string]string{"a": "1", "d/x": "1", "d/y": "1", "e/z": "2", "f/x": "1", "g/x": "1", "k": "1"}},
		"a whiteout after its directory does too":   {[]testimage.Entry{file("f/z", "2"), file(".wh.f", "")}, map[string]string{"a": "1", "d/x": "1", "d/y": "1", "e/x": "1", "f/z": "2", "g/x": "1", "k": "1"}},
		"a whiteout does not hide its layer's file": {[]testimage.Entry{file("k", "2"), file(".wh.k", "")}, map[string]string{"a": "1", "d/x": "1", "d/y": "1", "e/x": "1", "f/x": "1", "g/x": "1", "k": "2"}},
		"a file replaces a directory":               {[]testimage.Entry{file("g", "2")}, map[string]string{"a": "1", "d/x": "1", "d/y": "1", "e/x": "1", "f/x": "1", "g": "2", "k": "1"}},
	} {
		t.Run(name, func(t *testing.T) {
			r := onTmpfs(t)
			img := testimage.New(ocispec.ImageConfig{}, below, testimage.Layer(c.top...))
			got, err := r.Unpack(t.Context(), "owner", img, img.Manifest)
			if err != nil {
				t.Fatal(err)
			}
			if m := merged(t, r, got); !maps.Equal(m, c.want) {
				t.Errorf("got %v, want %v", m, c.want)
			}
		})
	}
}

func TestAnImageMayHaveManyLayers(t *testing.T) {
	r := onTmpfs(t)
	var layers [][]byte
	for i := range maxLayers {
		layers = append(layers, testimage.Layer(file("n", strconv.Itoa(i)), file("f"+strconv.Itoa(i), "")))
	}
	img := testimage.New(ocispec.ImageConfig{}, layers...)
	got, err := r.Unpack(t.Context(), "owner", img, img.Manifest)
	if err != nil {
		t.Fatal(err)
	}
	if m := merged(t, r, got); len(m) != maxLayers+1 || m["n"] != strconv.Itoa(maxLayers-1) {
		t.Errorf("%d files, n is %s", len(m), m["n"])
	}
	img = testimage.New(ocispec.ImageConfig{}, append(layers, testimage.Layer(file("x", "")))...)
	if _, err := r.Unpack(t.Context(), "owner", img, img.Manifest); !errors.Is(err, ErrImage) {
		t.Errorf("one layer more: %v", err)
	}
}

func TestPrune(t *testing.T) {
	r := onTmpfs(t)
	img := testimage.New(ocispec.ImageConfig{}, testimage.Layer(file("a", "1")), testimage.Layer(file("b", "1")))
	got, err := r.Unpack(t.Context(), "owner", img, img.Manifest)
	if err != nil {
		t.Fatal(err)
	}
	left := func() []string { m, _ := filepath.Glob(filepath.Join(r.cfg.Dir, "layers", "*")); return m }
	if err := r.Prune(t.Context(), []Image{got}); err != nil || len(left()) != 4 {
		t.Errorf("kept: %v %v", left(), err)
	}
	// A sandbox that uses the first layer, and what killed processes left.
	if err := os.MkdirAll(r.bundle("w"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := writeJSON(filepath.Join(r.bundle("w"), "spec.json"), Spec{ID: "w", Image: Image{Layers: got.Layers[:1]}}); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{unpacking + got.Layers[1], strings.Repeat("0", 64)} {
		if err := os.MkdirAll(filepath.Join(r.cfg.Dir, "layers", d, "deep"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.Prune(t.Context(), nil); err != nil || len(left()) != 2 || !strings.Contains(left()[0], got.Layers[0]) {
		t.Errorf("used by a sandbox: %v %v", left(), err)
	}
	if all, _ := os.ReadDir(filepath.Join(r.cfg.Dir, "layers")); len(all) != 2 {
		t.Errorf("hidden leftovers: %v", all)
	}
	if err := os.RemoveAll(r.bundle("w")); err != nil {
		t.Fatal(err)
	}
	if err := r.Prune(t.Context(), nil); err != nil || len(left()) != 0 {
		t.Errorf("used by nobody: %v %v", left(), err)
	}
}

// counting counts how often each blob is read.
type counting struct {
	*testimage.Image
	read map[string]int
}

func (c counting) Open(ctx context.Context, d string) (io.ReadCloser, error) {
	c.read[d]++
	return c.Image.Open(ctx, d)
}

// A tenant knows the diffID of another's layer, which is unpacked on the node: from a plan, a log, a public image's page.
// He writes an image that names it, with a blob of his own under it, or with a blob whose digest he knows and nothing else.
func TestWhoKnowsADiffIDDoesNotHaveTheLayer(t *testing.T) {
	r := onTmpfs(t)
	secret := testimage.Layer(file("secret", "of the victim"))
	victim := testimage.New(ocispec.ImageConfig{}, secret)
	if _, err := r.Unpack(t.Context(), "victim", victim, victim.Manifest); err != nil {
		t.Fatal(err)
	}
	own := zipped(testimage.Layer(file("own", "of the attacker")))
	forged := func(blob []byte, give bool) *testimage.Image {
		img := &testimage.Image{Blobs: map[string][]byte{}}
		put := func(b []byte) digest.Digest {
			img.Blobs[testimage.Digest(b)] = b
			return digest.Digest(testimage.Digest(b))
		}
		c, _ := json.Marshal(ocispec.Image{RootFS: ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{digest.Digest(testimage.Digest(secret))}}})
		l := ocispec.Descriptor{Digest: put(blob), Size: int64(len(blob))}
		if !give {
			delete(img.Blobs, string(l.Digest))
		}
		m, _ := json.Marshal(ocispec.Manifest{Config: ocispec.Descriptor{Digest: put(c), Size: int64(len(c))}, Layers: []ocispec.Descriptor{l}})
		img.Manifest = string(put(m))
		return img
	}
	lied := forged(secret, true)
	lied.Blobs[testimage.Digest(secret)] = bytes.Repeat([]byte{1}, len(secret))
	for what, img := range map[string]*testimage.Image{
		"the digest of the blob and not its bytes": forged(secret, false), "a blob of his own": forged(own, true), "other bytes under the digest": lied,
	} {
		if got, err := r.Unpack(t.Context(), "attacker", img, img.Manifest); err == nil {
			t.Errorf("with %s he runs with %v", what, merged(t, r, got))
		}
	}
	// The control: another who has the layer, packed in his own way, shares it, and nobody reads it twice.
	again := counting{forged(zipped(secret), true), map[string]int{}}
	blob := testimage.Digest(zipped(secret))
	for i := range 2 {
		got, err := r.Unpack(t.Context(), "honest", again, again.Manifest)
		if err != nil || !reflect.DeepEqual(merged(t, r, got), map[string]string{"secret": "of the victim"}) {
			t.Fatalf("control %d: %v", i, err)
		}
	}
	if n := again.read[blob]; n != 1 {
		t.Errorf("the blob was read %d times", n)
	}
	// A runner after this one knows it too: nothing is read again for a restart.
	r2, err := New(r.cfg)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r2.Unpack(t.Context(), "honest", again, again.Manifest); err != nil || again.read[blob] != 1 {
		t.Errorf("after a restart: %d times, %v", again.read[blob], err)
	}
	if _, err := r2.Unpack(t.Context(), "attacker", forged(zipped(secret), false), again.Manifest); err == nil {
		t.Error("after a restart the attacker has it")
	}
}

// Layers share the tmpfs with what all workloads need to live.
func TestLayersTogetherAreBounded(t *testing.T) {
	r := onTmpfs(t)
	r.cfg.Layers = 3 << 20
	images := map[string]*testimage.Image{}
	for _, name := range []string{"a", "b", "c"} {
		images[name] = testimage.New(ocispec.ImageConfig{}, testimage.Layer(file(name, strings.Repeat(name, 1<<20))))
	}
	small := make([]testimage.Entry, 800)
	for i := range small {
		small[i] = file(strconv.Itoa(i), "x")
	}
	// A byte takes a page: what a tar calls 400 KiB is 3 MiB and more.
	images["many"] = testimage.New(ocispec.ImageConfig{}, testimage.Layer(small...))
	unpack := func(r *Runner, name string) error {
		_, err := r.Unpack(t.Context(), name, images[name], images[name].Manifest)
		return err
	}
	if err := unpack(r, "many"); !errors.Is(err, ErrFull) {
		t.Errorf("many small files: %v", err)
	}
	for _, name := range []string{"a", "b"} { // also: what was refused gave back all that it had taken
		if err := unpack(r, name); err != nil {
			t.Fatalf("control %s: %v", name, err)
		}
	}
	if err := unpack(r, "c"); !errors.Is(err, ErrFull) {
		t.Errorf("the third MiB: %v", err)
	}
	// A runner after this one counts what is there, and sweeps what was half unpacked.
	half := filepath.Join(r.cfg.Dir, "layers", unpacking+strings.Repeat("0", 64))
	if err := os.Mkdir(half, 0o700); err != nil {
		t.Fatal(err)
	}
	r2, err := New(r.cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := unpack(r2, "c"); !errors.Is(err, ErrFull) {
		t.Errorf("after a restart: %v", err)
	}
	if _, err := os.Stat(half); err == nil {
		t.Error("half an unpacked layer is left")
	}
	if err := r2.Prune(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"c", "b"} {
		if err := unpack(r2, name); err != nil {
			t.Errorf("pruned, but %s: %v", name, err)
		}
	}
	if r2.layers.used != 2*(1<<20+inodeSize) {
		t.Errorf("%d bytes are counted", r2.layers.used)
	}
}

func TestUsers(t *testing.T) {
	dir := t.TempDir()
	outside := filepath.Join(t.TempDir(), "passwd")
	for p, s := range map[string]string{
		filepath.Join(dir, "etc/passwd"): "root:x:0:0::/root:/\nweb:x:33:34::/srv:/bin/sh\nbad:x:-1:0::/:/\nshort:x:5\n",
		filepath.Join(dir, "etc/group"):  "root:x:0:\nlogs:x:50:web,other\nown:x:34:web\nmail:x:60:other\n",
		outside:                          "evil:x:0:0::/:/\n",
	} {
		os.MkdirAll(filepath.Dir(p), 0o755)
		if err := os.WriteFile(p, []byte(s), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	linked := t.TempDir()
	os.Mkdir(filepath.Join(linked, "etc"), 0o755)
	if err := os.Symlink(outside, filepath.Join(linked, "etc/passwd")); err != nil {
		t.Fatal(err)
	}
	pipe := t.TempDir()
	os.Mkdir(filepath.Join(pipe, "etc"), 0o755)
	if err := unix.Mkfifo(filepath.Join(pipe, "etc/passwd"), 0o644); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct{ root, user, want string }{
		"nobody named is root":            {dir, "", "0:0 [] /root"},
		"by name with all groups":         {dir, "web", "33:34 [50] /srv"},
		"by number with all groups":       {dir, "33", "33:34 [50] /srv"},
		"a given group is the only one":   {dir, "web:mail", "33:60 [] /srv"},
		"a number that nobody has":        {dir, "4711", "4711:0 [] /"},
		"a group by number":               {dir, "4711:99", "4711:99 [] /"},
		"a group that is not there":       {dir, "web:nope", "error"},
		"a user that is not there":        {dir, "nope", "error"},
		"a user with a bad number":        {dir, "bad", "error"},
		"a line that is too short":        {dir, "short", "error"},
		"a number that is too large":      {dir, "4294967296", "error"},
		"a negative number":               {dir, "-1", "error"},
		"a link that leads out":           {linked, "evil", "error"},
		"a pipe does not hold us up":      {pipe, "web", "error"},
		"no accounts, but a number works": {pipe, "7", "7:0 [] /"},
	} {
		u, home, err := resolveUser(c.root, c.user)
		got := fmt.Sprintf("%d:%d %v %s", u.UID, u.GID, u.AdditionalGids, home)
		if err != nil {
			got = "error"
		}
		if got != c.want {
			t.Errorf("%s: got %s (%v), want %s", name, got, err, c.want)
		}
	}
}

func FuzzLayer(f *testing.F) {
	layer := testimage.Layer(file("a", "1"), entry("l", tar.TypeSymlink, "a"), entry("h", tar.TypeLink, "a"), file(".wh.a", ""), file("d/.wh..wh..opq", ""))
	f.Add(layer)
	f.Add(zipped(layer))
	f.Add(testimage.Layer(file("../x", "1")))
	f.Add(testimage.Layer(entry("l", tar.TypeSymlink, ".."), file("l/x", "1")))
	f.Fuzz(func(t *testing.T, layer []byte) {
		base := t.TempDir()
		dir := filepath.Join(base, "in")
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		r, done, err := decompress(bytes.NewReader(layer))
		if err != nil {
			return
		}
		defer done()
		size, _ := untar(t.Context(), &counter{ctx: t.Context(), r: r, h: sha256.New(), limit: 4 << 20}, dir, 1<<20, func(int64) error { return nil })
		if size > 1<<20 {
			t.Fatalf("it took %d bytes", size)
		}
		if e, _ := os.ReadDir(base); len(e) != 1 {
			t.Fatalf("it wrote outside: %v", e)
		}
	})
}

// FuzzManifest gives any bytes as an image's manifest and as its configuration.
func FuzzManifest(f *testing.F) {
	img := testimage.New(ocispec.ImageConfig{Entrypoint: []string{"/a"}}, testimage.Layer(file("a", "1")))
	for _, b := range img.Blobs {
		if b[0] == '{' {
			f.Add(b)
		}
	}
	f.Add([]byte(`{"manifests":[{"platform":{"os":"linux","architecture":"amd64"}}]}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		d := testimage.Digest(raw)
		for _, manifest := range [][]byte{raw, fmt.Appendf(nil, `{"config":{"digest":%q,"size":%d},"layers":[]}`, d, len(raw))} {
			in := &testimage.Image{Blobs: maps.Clone(img.Blobs)}
			in.Blobs[d] = raw
			in.Blobs[testimage.Digest(manifest)] = manifest
			r, err := New(Config{Dir: t.TempDir(), Image: 1 << 20})
			if err != nil {
				t.Fatal(err)
			}
			got, err := r.Unpack(t.Context(), "owner", in, testimage.Digest(manifest))
			if err == nil && len(got.Layers) == 0 {
				t.Fatal("an image without layers")
			}
		}
	})
}
