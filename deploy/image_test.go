package deploy

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"holdfast/internal/testimage"

	"github.com/google/go-containerregistry/pkg/name"
	gcrregistry "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	gcrlayout "github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// marker is in a layer, and must be nowhere where only sealed bytes may be.
const marker = "MARKER-of-a-layer-that-nobody-may-read"

func newImage(text string) *testimage.Image {
	return testimage.New(ocispec.ImageConfig{Entrypoint: []string{"/app"}}, layer("app", text), layer("etc/conf", marker))
}

func layer(name, text string) []byte {
	return testimage.Layer(testimage.Entry{Header: tar.Header{Name: name}, Data: []byte(text)})
}

func write(t testing.TB, img *testimage.Image) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "img")
	if err := img.WriteLayout(dir); err != nil {
		t.Fatal(err)
	}
	return dir
}

func blobPath(dir, d string) string {
	return filepath.Join(dir, "blobs", "sha256", strings.TrimPrefix(d, "sha256:"))
}

func descriptor(img *testimage.Image) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.Digest(img.Manifest), Size: int64(len(img.Blobs[img.Manifest]))}
}

// put writes JSON as a blob of a layout.
func put(t testing.TB, dir, media string, v any) ocispec.Descriptor {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	d := testimage.Digest(b)
	overwrite(t, blobPath(dir, d), b)
	return ocispec.Descriptor{MediaType: media, Digest: digest.Digest(d), Size: int64(len(b))}
}

func overwrite(t testing.TB, path string, b []byte) {
	t.Helper()
	if err := os.RemoveAll(path); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func index(t testing.TB, dir string, entries ...ocispec.Descriptor) {
	t.Helper()
	b, err := json.Marshal(map[string]any{"schemaVersion": 2, "manifests": entries})
	if err != nil {
		t.Fatal(err)
	}
	overwrite(t, filepath.Join(dir, "index.json"), b)
}

// manifestOf changes an image's manifest in its layout, and its index with it, so that all digests fit.
func manifestOf(t testing.TB, dir string, img *testimage.Image, f func(m *ocispec.Manifest)) {
	t.Helper()
	var m ocispec.Manifest
	if err := json.Unmarshal(img.Blobs[img.Manifest], &m); err != nil {
		t.Fatal(err)
	}
	f(&m)
	index(t, dir, put(t, dir, ocispec.MediaTypeImageManifest, m))
}

func on(arch, variant string) *ocispec.Platform {
	return &ocispec.Platform{OS: "linux", Architecture: arch, Variant: variant}
}

func TestAnImageIsFoundInALayout(t *testing.T) {
	img, other := newImage("one"), newImage("two")
	for _, tc := range []struct {
		name string
		make func(t *testing.T, dir string)
		ref  func(dir string) (ref, base string)
		want *testimage.Image
	}{
		{"by an absolute path", nil, nil, img},
		{"by a path relative to the Compose file", nil, func(dir string) (string, string) { return "oci:img", filepath.Dir(dir) }, img},
		{"by a path that goes up", nil, func(dir string) (string, string) { return "oci:../img", filepath.Join(filepath.Dir(dir), "sub") }, img},
		{"by its name", func(t *testing.T, dir string) {
			a, b := descriptor(img), descriptor(other)
			a.Annotations, b.Annotations = map[string]string{ocispec.AnnotationRefName: "one"}, map[string]string{ocispec.AnnotationRefName: "two"}
			if err := other.WriteLayout(dir); err != nil {
				t.Fatal(err)
			}
			index(t, dir, a, b)
		}, func(dir string) (string, string) { return "oci:" + dir + ":two", "" }, other},
		{"by the platform among several", func(t *testing.T, dir string) {
			a, b, c := descriptor(img), descriptor(other), descriptor(other)
			a.Platform, b.Platform, c.Platform = on("amd64", ""), on("arm64", "v8"), &ocispec.Platform{OS: "unknown", Architecture: "unknown"}
			index(t, dir, b, a, c)
		}, nil, img},
		{"of the oldest variant of the platform", func(t *testing.T, dir string) {
			a, b := descriptor(img), descriptor(other)
			a.Platform, b.Platform = on("amd64", ""), on("amd64", "v3")
			index(t, dir, b, a)
		}, nil, img},
		{"below an index in the index", func(t *testing.T, dir string) {
			a, b := descriptor(img), descriptor(other)
			a.Platform, b.Platform = on("amd64", ""), on("arm64", "")
			inner := put(t, dir, ocispec.MediaTypeImageIndex, ocispec.Index{Manifests: []ocispec.Descriptor{a, b}})
			inner.Annotations = map[string]string{ocispec.AnnotationRefName: "latest"}
			index(t, dir, inner)
		}, func(dir string) (string, string) { return "oci:" + dir + ":latest", "" }, img},
		{"that has two names", func(t *testing.T, dir string) {
			a, b := descriptor(img), descriptor(img)
			a.Annotations, b.Annotations = map[string]string{ocispec.AnnotationRefName: "one"}, map[string]string{ocispec.AnnotationRefName: "two"}
			index(t, dir, a, b)
		}, nil, img},
		{"behind a symbolic link", func(t *testing.T, dir string) {
			if err := os.Symlink(dir, dir+"-link"); err != nil {
				t.Fatal(err)
			}
		}, func(dir string) (string, string) { return "oci:" + dir + "-link", "" }, img},
		{"with blobs that are symbolic links", func(t *testing.T, dir string) {
			for d := range img.Blobs {
				p := blobPath(dir, d)
				if err := errors.Join(os.Rename(p, p+".real"), os.Symlink(p+".real", p)); err != nil {
					t.Fatal(err)
				}
			}
		}, nil, img},
		{"with a colon in its path", func(t *testing.T, dir string) {
			if err := img.WriteLayout(dir + ":x"); err != nil {
				t.Fatal(err)
			}
		}, func(dir string) (string, string) { return "oci:" + dir + ":x", "" }, img},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := write(t, img)
			if tc.make != nil {
				tc.make(t, dir)
			}
			ref, base := "oci:"+dir, ""
			if tc.ref != nil {
				ref, base = tc.ref(dir)
			}
			s, err := Resolve(t.Context(), ref, base)
			if err != nil {
				t.Fatal(err)
			}
			if s.Reference != ref || s.Manifest != tc.want.Manifest || len(s.Blobs) != len(tc.want.Blobs) {
				t.Fatalf("%+v", s)
			}
			for _, b := range s.Blobs {
				r, err := b.Open(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				got, err := io.ReadAll(r)
				r.Close()
				if err != nil || string(got) != string(tc.want.Blobs[b.Digest]) || b.Size != int64(len(got)) {
					t.Errorf("%s: %d bytes, %v", b.Digest, len(got), err)
				}
			}
		})
	}
}

func TestALayoutThatIsNotWhatItSaysIsRefused(t *testing.T) {
	img := newImage("one")
	var m ocispec.Manifest
	if err := json.Unmarshal(img.Blobs[img.Manifest], &m); err != nil {
		t.Fatal(err)
	}
	config := string(m.Config.Digest)
	for _, tc := range []struct {
		name string
		make func(t *testing.T, dir string)
		want string
	}{
		{"no layout", func(t *testing.T, dir string) { os.RemoveAll(dir) }, "is no OCI layout: it has no index.json"},
		{"an index that is a directory", func(t *testing.T, dir string) {
			os.Remove(filepath.Join(dir, "index.json"))
			os.Mkdir(filepath.Join(dir, "index.json"), 0o700)
		}, "is not a regular file"},
		{"an index that is a pipe", func(t *testing.T, dir string) {
			os.Remove(filepath.Join(dir, "index.json"))
			unix.Mkfifo(filepath.Join(dir, "index.json"), 0o600)
		}, "is not a regular file"},
		{"an index that is too large", func(t *testing.T, dir string) { os.Truncate(filepath.Join(dir, "index.json"), 1<<40) }, "index of 1099511627776 bytes"},
		{"an index that is no JSON", func(t *testing.T, dir string) { overwrite(t, filepath.Join(dir, "index.json"), []byte("{")) }, "unexpected end of JSON input"},
		{"an index of lists in lists", func(t *testing.T, dir string) {
			overwrite(t, filepath.Join(dir, "index.json"), []byte(`{"manifests":`+strings.Repeat("[", 1<<20)))
		}, "exceeded max depth"},
		{"an empty index", func(t *testing.T, dir string) { index(t, dir) }, "no image for linux/amd64"},
		{"a platform that nodes do not have", func(t *testing.T, dir string) {
			d := descriptor(img)
			d.Platform = on("arm64", "")
			index(t, dir, d)
		}, "no image for linux/amd64; there are: linux/arm64"},
		{"two images", func(t *testing.T, dir string) {
			o := newImage("two")
			o.WriteLayout(dir)
			index(t, dir, descriptor(img), descriptor(o))
		}, "2 images fit: name one, oci:PATH:NAME"},
		{"a configuration for another platform", func(t *testing.T, dir string) {
			manifestOf(t, dir, img, func(m *ocispec.Manifest) {
				m.Config = put(t, dir, ocispec.MediaTypeImageConfig, map[string]any{"os": "linux", "architecture": "riscv64"})
			})
		}, "it is for linux/riscv64, nodes are linux/amd64"},
		{"indexes without an end", func(t *testing.T, dir string) {
			d := descriptor(img)
			for range 5 {
				d = put(t, dir, ocispec.MediaTypeImageIndex, ocispec.Index{Manifests: []ocispec.Descriptor{d}})
			}
			index(t, dir, d)
		}, "more than 4 indexes below each other"},
		{"a manifest that is an index too", func(t *testing.T, dir string) {
			index(t, dir, put(t, dir, ocispec.MediaTypeImageManifest, map[string]any{"config": m.Config, "layers": m.Layers, "manifests": []any{descriptor(img)}}))
		}, "it is both an index and a manifest"},
		{"a manifest with a flipped bit", func(t *testing.T, dir string) {
			b := slices.Clone(img.Blobs[img.Manifest])
			b[len(b)/2] ^= 1
			overwrite(t, blobPath(dir, img.Manifest), b)
		}, "another digest"},
		{"another image's manifest", func(t *testing.T, dir string) {
			o := newImage("two")
			o.WriteLayout(dir)
			index(t, dir, descriptor(img))
			overwrite(t, blobPath(dir, img.Manifest), o.Blobs[o.Manifest])
		}, "another digest"},
		{"a manifest that is cut", func(t *testing.T, dir string) {
			os.Truncate(blobPath(dir, img.Manifest), 10)
		}, "another digest"},
		{"a manifest that goes on and on", func(t *testing.T, dir string) {
			os.Remove(blobPath(dir, img.Manifest))
			os.Symlink("/dev/zero", blobPath(dir, img.Manifest))
		}, "is not a regular file"},
		{"a manifest with holes of a terabyte", func(t *testing.T, dir string) { os.Truncate(blobPath(dir, img.Manifest), 1<<40) }, "another digest"},
		{"a manifest that says it is large", func(t *testing.T, dir string) {
			d := descriptor(img)
			d.Size = 1 << 40
			index(t, dir, d)
		}, "of 1099511627776 bytes, at most 4194304 are allowed for a manifest"},
		{"a manifest of less than nothing", func(t *testing.T, dir string) {
			d := descriptor(img)
			d.Size = -1
			index(t, dir, d)
		}, "of -1 bytes"},
		{"no manifest", func(t *testing.T, dir string) { os.Remove(blobPath(dir, img.Manifest)) }, "is not in the layout"},
		{"a manifest outside the layout", func(t *testing.T, dir string) {
			d := descriptor(img)
			d.Digest = "sha256:../../../etc/passwd"
			index(t, dir, d)
		}, "is not a sha256 digest"},
		{"a digest of another kind", func(t *testing.T, dir string) {
			d := descriptor(img)
			d.Digest = digest.Digest("sha512:" + strings.Repeat("0", 128))
			index(t, dir, d)
		}, "is not a sha256 digest"},
		{"a configuration with a flipped bit", func(t *testing.T, dir string) {
			b := slices.Clone(img.Blobs[config])
			b[len(b)/2] ^= 1
			overwrite(t, blobPath(dir, config), b)
		}, "configuration: blob sha256:"},
		{"no configuration", func(t *testing.T, dir string) { os.Remove(blobPath(dir, config)) }, "is not in the layout"},
		{"a configuration that is no JSON", func(t *testing.T, dir string) {
			manifestOf(t, dir, img, func(m *ocispec.Manifest) {
				m.Config = put(t, dir, ocispec.MediaTypeImageConfig, []string{"x"})
			})
		}, "configuration: json"},
		{"no layers", func(t *testing.T, dir string) {
			manifestOf(t, dir, img, func(m *ocispec.Manifest) { m.Layers = nil })
		}, "0 layers, of which its configuration names 2"},
		{"a layer that the configuration does not name", func(t *testing.T, dir string) {
			manifestOf(t, dir, img, func(m *ocispec.Manifest) { m.Layers = append(m.Layers, m.Layers[0]) })
		}, "3 layers, of which its configuration names 2"},
		{"too many layers", func(t *testing.T, dir string) {
			manifestOf(t, dir, img, func(m *ocispec.Manifest) { m.Layers = make([]ocispec.Descriptor, 128) })
		}, "128 layers"},
		{"a layer outside the layout", func(t *testing.T, dir string) {
			manifestOf(t, dir, img, func(m *ocispec.Manifest) { m.Layers[0].Digest = "sha256:../x" })
		}, "is not a sha256 digest"},
		{"a layer of less than nothing", func(t *testing.T, dir string) {
			manifestOf(t, dir, img, func(m *ocispec.Manifest) { m.Layers[0].Size = -1 })
		}, "of -1 bytes"},
		{"a layer that no grid takes", func(t *testing.T, dir string) {
			manifestOf(t, dir, img, func(m *ocispec.Manifest) { m.Layers[0].Size = 5 << 30 })
		}, "of 5368709120 bytes, at most"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := write(t, img)
			if _, err := Resolve(t.Context(), "oci:"+dir, ""); err != nil { // the control
				t.Fatal(err)
			}
			tc.make(t, dir)
			s, err := Resolve(t.Context(), "oci:"+dir, "")
			if err == nil || !strings.Contains(err.Error(), tc.want) || !strings.HasPrefix(err.Error(), "image oci:") {
				t.Errorf("%+v, %v, want %q", s, err, tc.want)
			}
		})
	}
	dir := write(t, img)
	if _, err := Resolve(t.Context(), "oci:"+dir+":none", ""); err == nil || !strings.Contains(err.Error(), `no image has the name "none"`) {
		t.Errorf("a name that is not there: %v", err)
	}
}

// registries serves images over HTTPS, with whatever a test puts between.
func registries(t *testing.T, between func(next http.Handler) http.Handler) (host string, transport http.RoundTripper) {
	t.Helper()
	h := gcrregistry.New(gcrregistry.Logger(logNothing))
	if between != nil {
		h = between(h)
	}
	s := httptest.NewTLSServer(h)
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "https://"), s.Client().Transport
}

// upload puts an image into a registry under a tag.
func upload(t *testing.T, transport http.RoundTripper, ref string, img *testimage.Image) {
	t.Helper()
	p, err := gcrlayout.FromPath(write(t, img))
	if err != nil {
		t.Fatal(err)
	}
	h, err := v1.NewHash(img.Manifest)
	if err != nil {
		t.Fatal(err)
	}
	i, err := p.Image(h)
	if err != nil {
		t.Fatal(err)
	}
	r, err := name.ParseReference(ref)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(r, i, remote.WithTransport(transport), remote.WithContext(t.Context())); err != nil {
		t.Fatal(err)
	}
}

// uploadIndex puts an index beside the images that it names.
func uploadIndex(t *testing.T, transport http.RoundTripper, host, tag string, entries ...ocispec.Descriptor) {
	t.Helper()
	b, err := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": ocispec.MediaTypeImageIndex, "manifests": entries})
	if err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, "https://"+host+"/v2/app/manifests/"+tag, strings.NewReader(string(b)))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", ocispec.MediaTypeImageIndex)
	resp, err := transport.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode/100 != 2 {
		t.Fatal(resp.Status)
	}
}

func TestAnImageIsFoundInARegistry(t *testing.T) {
	img, other := newImage("one"), newImage("two")
	host, transport := registries(t, nil)
	upload(t, transport, host+"/app:1", img)
	upload(t, transport, host+"/app:arm", other)
	a, b := descriptor(img), descriptor(other)
	a.Platform, b.Platform = on("amd64", ""), on("arm64", "v8")
	uploadIndex(t, transport, host, "many", b, a)
	uploadIndex(t, transport, host, "arm-only", b)
	for _, ref := range []string{host + "/app:1", host + "/app@" + img.Manifest, host + "/app:1@" + img.Manifest, host + "/app:many"} {
		s, err := resolve(t.Context(), ref, "", transport)
		if err != nil {
			t.Fatalf("%s: %v", ref, err)
		}
		if s.Manifest != img.Manifest || len(s.Blobs) != len(img.Blobs) {
			t.Errorf("%s: %+v", ref, s)
		}
		p := &memory{}
		if _, err := Push(t.Context(), s, [32]byte{1}, p, nil, nil); err != nil || len(p.blobs) != len(img.Blobs) {
			t.Errorf("%s: %d blobs, %v", ref, len(p.blobs), err)
		}
	}
	for ref, want := range map[string]string{
		host + "/app:none": "MANIFEST_UNKNOWN", host + "/none:1": "NAME_UNKNOWN", host + "/app:arm-only": "no image for linux/amd64; there are: linux/arm64/v8",
		host + "/app@" + testimage.Digest(nil): "MANIFEST_UNKNOWN", "UPPER/case": "could not parse reference", "": "could not parse reference",
	} {
		if _, err := resolve(t.Context(), ref, "", transport); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", ref, err, want)
		}
	}
	// A certificate that nobody vouches for.
	if _, err := resolve(t.Context(), host+"/app:1", "", http.DefaultTransport); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("%v", err)
	}
}

// The registry, or who sits in it, gives other bytes than those that were asked for.
func TestARegistryThatLiesIsNotBelieved(t *testing.T) {
	img := newImage("one")
	var lie atomic.Pointer[func(w http.ResponseWriter, r *http.Request) bool]
	host, transport := registries(t, func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if f := lie.Load(); f == nil || !(*f)(w, r) {
				next.ServeHTTP(w, r)
			}
		})
	})
	upload(t, transport, host+"/app:1", img)
	d := descriptor(img)
	d.Platform = on("amd64", "")
	uploadIndex(t, transport, host, "many", d)
	var m ocispec.Manifest
	if err := json.Unmarshal(img.Blobs[img.Manifest], &m); err != nil {
		t.Fatal(err)
	}
	tampered := func(d string) []byte { b := slices.Clone(img.Blobs[d]); b[len(b)-1] ^= 1; return b }
	answer := func(path string, b []byte) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method != http.MethodGet || !strings.HasSuffix(r.URL.Path, path) {
				return false
			}
			w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
			w.Write(b)
			return true
		}
	}
	other := newImage("two")
	for _, tc := range []struct {
		name, ref string
		lie       func(http.ResponseWriter, *http.Request) bool
		want      string
	}{
		{"another manifest for a digest", "/app@" + img.Manifest, answer("/manifests/"+img.Manifest, other.Blobs[other.Manifest]), "digest"},
		{"another manifest for an index's entry", "/app:many", answer("/manifests/"+img.Manifest, other.Blobs[other.Manifest]), "digest"},
		{"another configuration", "/app:1", answer("/blobs/"+string(m.Config.Digest), tampered(string(m.Config.Digest))), "sha256 checksum"},
		{"another layer", "/app:1", answer("/blobs/"+string(m.Layers[1].Digest), tampered(string(m.Layers[1].Digest))), "sha256 checksum"},
		{"a layer that goes on", "/app:1", answer("/blobs/"+string(m.Layers[1].Digest), append(slices.Clone(img.Blobs[string(m.Layers[1].Digest)]), 0)), "sha256 checksum"},
		{"no layer", "/app:1", func(w http.ResponseWriter, r *http.Request) bool {
			if strings.HasSuffix(r.URL.Path, "/blobs/"+string(m.Layers[1].Digest)) {
				http.Error(w, "gone", http.StatusNotFound)
				return true
			}
			return false
		}, "404"},
		{"a manifest without an end", "/app:1", func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method != http.MethodGet || !strings.HasSuffix(r.URL.Path, "/manifests/1") {
				return false
			}
			w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
			for b := make([]byte, 1<<20); ; {
				if _, err := w.Write(b); err != nil {
					return true
				}
			}
		}, "manifest of more than 4194304 bytes"},
		{"no JSON", "/app:1", answer("/manifests/1", []byte("<html>")), "invalid character"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			try := func() (*memory, error) {
				s, err := resolve(t.Context(), host+tc.ref, "", transport)
				if err != nil {
					return nil, err
				}
				p := &memory{}
				_, err = Push(t.Context(), s, [32]byte{1}, p, nil, nil)
				return p, err
			}
			if _, err := try(); err != nil { // the control
				t.Fatal(err)
			}
			lie.Store(&tc.lie)
			defer lie.Store(nil)
			p, err := try()
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%v, want %q", err, tc.want)
			}
			if p != nil && len(p.blobs) > 3 { // what came before it: manifest, configuration, first layer
				t.Errorf("%d blobs were stored", len(p.blobs))
			}
		})
	}
}

// Nothing of an image goes over a network without TLS, whatever the library would do by itself.
func TestARegistryIsNeverAskedWithoutTLS(t *testing.T) {
	img := newImage("one")
	var asked atomic.Int32
	plain := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		registryHandler().ServeHTTP(w, r)
	}))
	defer plain.Close()
	ref := strings.TrimPrefix(plain.URL, "http://") + "/app:1"
	// The control: the library asks a loopback address in the clear.
	r, err := name.ParseReference(ref)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := remote.Get(r, remote.WithContext(t.Context())); err == nil || asked.Load() == 0 {
		t.Fatalf("%v, asked %d times", err, asked.Load())
	}
	asked.Store(0)
	if _, err := Resolve(t.Context(), ref, ""); err == nil || !strings.Contains(err.Error(), "would be asked without TLS") {
		t.Errorf("%v", err)
	}
	if n := asked.Load(); n != 0 {
		t.Errorf("it was asked %d times", n)
	}

	// A registry over TLS that sends its users to one without, for a layer or for a token.
	for where, want := range map[string]string{"blobs": "would be asked without TLS", "token": "use https"} {
		t.Run(where, func(t *testing.T) {
			var redirect atomic.Bool
			host, transport := registries(t, func(next http.Handler) http.Handler {
				return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					switch {
					case redirect.Load() && where == "blobs" && r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/"):
						http.Redirect(w, r, plain.URL+r.URL.Path, http.StatusTemporaryRedirect)
					case redirect.Load() && where == "token":
						w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="x"`, plain.URL))
						w.WriteHeader(http.StatusUnauthorized)
					default:
						next.ServeHTTP(w, r)
					}
				})
			})
			upload(t, transport, host+"/app:1", img)
			if _, err := resolve(t.Context(), host+"/app:1", "", transport); err != nil { // the control
				t.Fatal(err)
			}
			redirect.Store(true)
			asked.Store(0)
			if _, err := resolve(t.Context(), host+"/app:1", "", transport); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%v", err)
			}
			if n := asked.Load(); n != 0 {
				t.Errorf("it was asked %d times", n)
			}
		})
	}
}

// A registry that does not answer holds up nobody for longer than he waits.
func TestARegistryThatStallsCanBeLeft(t *testing.T) {
	stalled := make(chan struct{}, 16)
	host, transport := registries(t, func(http.Handler) http.Handler {
		return http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			stalled <- struct{}{}
			<-r.Context().Done()
		})
	})
	ctx, cancel := contextWithCancel(t)
	done := make(chan error, 1)
	go func() {
		_, err := resolve(ctx, host+"/app:1", "", transport)
		done <- err
	}()
	<-stalled
	cancel()
	select {
	case err := <-done:
		if err == nil {
			t.Error("it found an image")
		}
	case <-time.After(20 * time.Second):
		t.Error("it waits on")
	}
}
