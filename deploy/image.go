package deploy

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"holdfast/api"
	"holdfast/seal"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// Bounds of an image, as package sandbox has them.
const (
	maxManifest = 4 << 20 // an index, a manifest or a configuration
	maxLayers   = 127
	maxIndexes  = 4 // below each other
)

// Source is an image that was found and pinned.
type Source struct {
	Reference string
	Manifest  string // digest of the linux/amd64 manifest
	Blobs     []SourceBlob
}

// SourceBlob is one blob of an image on the user's side. What Open gives is verified by whoever reads it.
type SourceBlob struct {
	Digest string
	Size   int64
	Open   func(ctx context.Context) (io.ReadCloser, error)
}

// A shelf is where the parts of an image lie, found by their digests. It need not be trusted.
type shelf interface {
	manifest(ctx context.Context, digest string) (io.ReadCloser, error)
	blob(ctx context.Context, digest string) (io.ReadCloser, error)
}

// Resolve finds an image. "oci:PATH" is an OCI layout, relative to base; "oci:PATH:NAME" the one of several in it that
// has that name. Everything else is a reference to a registry, over HTTPS and without a login.
func Resolve(ctx context.Context, ref, base string) (*Source, error) {
	return resolve(ctx, ref, base, remote.DefaultTransport)
}

func resolve(ctx context.Context, ref, base string, transport http.RoundTripper) (*Source, error) {
	s, err := find(ctx, ref, base, transport)
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", ref, err)
	}
	s.Reference = ref
	return s, nil
}

func find(ctx context.Context, ref, base string, transport http.RoundTripper) (*Source, error) {
	if path, ok := strings.CutPrefix(ref, "oci:"); ok {
		dir, index, want, err := openLayout(path, base)
		if err != nil {
			return nil, err
		}
		return choose(ctx, dir, index, want)
	}
	reg, top, err := openRegistry(ctx, ref, transport)
	if err != nil {
		return nil, err
	}
	return choose(ctx, reg, top, "")
}

// document is a manifest or an index. Which of the two shows in its fields: a registry's media type is outside the digest.
type document struct {
	Config    ocispec.Descriptor   `json:"config"`
	Layers    []ocispec.Descriptor `json:"layers"`
	Manifests []ocispec.Descriptor `json:"manifests"`
}

func parse(raw []byte) (*document, error) {
	var d document
	if err := json.Unmarshal(raw, &d); err != nil {
		return nil, fmt.Errorf("manifest: %w", err)
	}
	if len(d.Manifests) > 0 && (len(d.Layers) > 0 || d.Config.Digest != "") {
		return nil, errors.New("it is both an index and a manifest")
	}
	return &d, nil
}

// choose goes down from an index to the one manifest for linux/amd64, verifying each step, and lists its blobs.
func choose(ctx context.Context, from shelf, raw []byte, want string) (*Source, error) {
	for range maxIndexes {
		d, err := parse(raw)
		if err != nil {
			return nil, err
		}
		if d.Config.Digest != "" {
			return describe(ctx, from, raw, d)
		}
		next, err := pick(d.Manifests, want)
		if err != nil {
			return nil, err
		}
		if raw, err = small(ctx, from.manifest, next); err != nil {
			return nil, err
		}
		want = ""
	}
	return nil, fmt.Errorf("more than %d indexes below each other", maxIndexes)
}

// pick finds the one entry of an index that fits.
func pick(all []ocispec.Descriptor, want string) (ocispec.Descriptor, error) {
	var fit []ocispec.Descriptor
	var names, platforms []string
	for _, d := range all {
		named := d.Annotations[ocispec.AnnotationRefName]
		if named != "" {
			names = append(names, named)
		}
		if want != "" && named != want {
			continue
		}
		if p := d.Platform; p != nil {
			if p.OS != "linux" || p.Architecture != "amd64" || p.Variant != "" && p.Variant != "v1" {
				platforms = append(platforms, strings.TrimRight(p.OS+"/"+p.Architecture+"/"+p.Variant, "/"))
				continue
			}
		}
		if !slices.ContainsFunc(fit, func(x ocispec.Descriptor) bool { return x.Digest == d.Digest }) { // one image may have two names
			fit = append(fit, d)
		}
	}
	slices.Sort(platforms)
	has := func(what string, list []string) string {
		if len(list) == 0 {
			return ""
		}
		return fmt.Sprintf("; %s: %.300s", what, strings.Join(slices.Compact(list), ", "))
	}
	switch {
	case len(fit) == 1:
		return fit[0], nil
	case len(fit) > 1:
		return ocispec.Descriptor{}, fmt.Errorf("%d images fit: name one, oci:PATH:NAME%s", len(fit), has("there are", names))
	case want != "" && !slices.Contains(names, want):
		return ocispec.Descriptor{}, fmt.Errorf("no image has the name %q%s", want, has("there are", names))
	}
	return ocispec.Descriptor{}, fmt.Errorf("no image for linux/amd64%s", has("there are", platforms))
}

// small reads and verifies a manifest, an index or a configuration.
func small(ctx context.Context, open func(context.Context, string) (io.ReadCloser, error), d ocispec.Descriptor) ([]byte, error) {
	want, err := digestHex(string(d.Digest))
	if err != nil {
		return nil, err
	}
	if d.Size < 0 || d.Size > maxManifest {
		return nil, fmt.Errorf("blob %s of %d bytes, at most %d are allowed for a manifest or a configuration", d.Digest, d.Size, maxManifest)
	}
	r, err := open(ctx, string(d.Digest))
	if err != nil {
		return nil, err
	}
	defer r.Close()
	b, err := io.ReadAll(io.LimitReader(r, d.Size+1))
	if err != nil {
		return nil, fmt.Errorf("blob %s: %w", d.Digest, err)
	}
	if sum := sha256.Sum256(b); int64(len(b)) != d.Size || hex.EncodeToString(sum[:]) != want {
		return nil, fmt.Errorf("blob %s: %w", d.Digest, ErrDigest)
	}
	return b, nil
}

// ErrDigest is returned for an image whose bytes are not those that its digests name.
var ErrDigest = errors.New("the image's bytes have another digest")

func digestHex(d string) (string, error) {
	h, ok := strings.CutPrefix(d, "sha256:")
	if !ok || len(h) != 64 || strings.Trim(h, "0123456789abcdef") != "" {
		return "", fmt.Errorf("%q is not a sha256 digest", d)
	}
	return h, nil
}

// describe lists the blobs of a manifest that was verified.
func describe(ctx context.Context, from shelf, raw []byte, m *document) (*Source, error) {
	cfg, err := small(ctx, from.blob, m.Config)
	if err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	var c struct {
		OS           string `json:"os"`
		Architecture string `json:"architecture"`
		RootFS       struct {
			DiffIDs []string `json:"diff_ids"`
		} `json:"rootfs"`
	}
	if err := json.Unmarshal(cfg, &c); err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	if c.OS != "" && c.OS != "linux" || c.Architecture != "" && c.Architecture != "amd64" {
		return nil, fmt.Errorf("it is for %s/%s, nodes are linux/amd64", c.OS, c.Architecture)
	}
	if n := len(m.Layers); n == 0 || n > maxLayers || n != len(c.RootFS.DiffIDs) {
		return nil, fmt.Errorf("%d layers, of which its configuration names %d; 1 to %d are allowed", n, len(c.RootFS.DiffIDs), maxLayers)
	}
	sum := sha256.Sum256(raw)
	s := &Source{Manifest: "sha256:" + hex.EncodeToString(sum[:])}
	memory := func(digest string, b []byte) {
		s.Blobs = append(s.Blobs, SourceBlob{digest, int64(len(b)), func(context.Context) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil }})
	}
	memory(s.Manifest, raw)
	memory(string(m.Config.Digest), cfg)
	for _, l := range m.Layers {
		digest := string(l.Digest)
		if _, err := digestHex(digest); err != nil {
			return nil, fmt.Errorf("layer: %w", err)
		}
		if l.Size < 0 || seal.Size(l.Size) > api.MaxBlob {
			return nil, fmt.Errorf("layer %s of %d bytes, at most %d are allowed", digest, l.Size, int64(api.MaxBlob))
		}
		if slices.ContainsFunc(s.Blobs, func(b SourceBlob) bool { return b.Digest == digest }) {
			continue // a layer that is there twice
		}
		s.Blobs = append(s.Blobs, SourceBlob{digest, l.Size, func(ctx context.Context) (io.ReadCloser, error) { return from.blob(ctx, digest) }})
	}
	return s, nil
}

// layout is the directory of an OCI image layout.
type layout string

func openLayout(path, base string) (dir layout, index []byte, want string, err error) {
	if !filepath.IsAbs(path) {
		path = filepath.Join(base, path)
	}
	if _, err := os.Stat(path); err != nil {
		if i := strings.LastIndexByte(path, ':'); i > strings.LastIndexByte(path, '/') {
			path, want = path[:i], path[i+1:]
		}
	}
	f, size, err := regular(filepath.Join(path, "index.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil, "", fmt.Errorf("%s is no OCI layout: it has no index.json (are the images built? make images)", path)
	} else if err != nil {
		return "", nil, "", err
	}
	defer f.Close()
	if size > maxManifest {
		return "", nil, "", fmt.Errorf("index of %d bytes, at most %d are allowed", size, maxManifest)
	}
	index, err = io.ReadAll(io.LimitReader(f, size))
	return layout(path), index, want, err
}

func (l layout) manifest(ctx context.Context, digest string) (io.ReadCloser, error) {
	return l.blob(ctx, digest)
}

func (l layout) blob(_ context.Context, digest string) (io.ReadCloser, error) {
	h, err := digestHex(digest)
	if err != nil {
		return nil, err
	}
	f, _, err := regular(filepath.Join(string(l), "blobs", "sha256", h))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("blob %s is not in the layout", digest)
	} else if err != nil {
		return nil, err
	}
	return f, nil
}

// regular opens a file, and waits for no pipe. Links are followed: what is read is verified, wherever it lies.
func regular(path string) (*os.File, int64, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, 0, err
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", path)
	}
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, st.Size(), nil
}

// registry is a repository behind HTTPS.
type registry struct {
	puller *remote.Puller
	repo   name.Repository
}

func openRegistry(ctx context.Context, ref string, transport http.RoundTripper) (shelf, []byte, error) {
	r, err := name.ParseReference(ref)
	if err != nil {
		return nil, nil, err
	}
	p, err := remote.NewPuller(remote.WithTransport(onlyTLS{transport}))
	if err != nil {
		return nil, nil, err
	}
	d, err := p.Get(ctx, r)
	if err != nil {
		return nil, nil, err
	}
	return registry{p, r.Context()}, d.Manifest, nil
}

func (r registry) manifest(ctx context.Context, digest string) (io.ReadCloser, error) {
	d, err := r.puller.Get(ctx, r.repo.Digest(digest))
	if err != nil {
		return nil, err
	}
	return io.NopCloser(bytes.NewReader(d.Manifest)), nil
}

func (r registry) blob(ctx context.Context, digest string) (io.ReadCloser, error) {
	l, err := r.puller.Layer(ctx, r.repo.Digest(digest))
	if err != nil {
		return nil, err
	}
	return l.Compressed()
}

// onlyTLS refuses what would go over the network in the clear: a registry on a private address, which the library asks
// without TLS if it must, a token service, or the target of a redirection. It also bounds what a manifest may have.
type onlyTLS struct{ http.RoundTripper }

func (t onlyTLS) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.URL.Scheme != "https" {
		return nil, fmt.Errorf("%s would be asked without TLS", r.URL.Host)
	}
	resp, err := t.RoundTripper.RoundTrip(r)
	if err == nil && strings.Contains(r.URL.Path, "/manifests/") {
		resp.Body = struct {
			io.Reader
			io.Closer
		}{&bounded{resp.Body, maxManifest}, resp.Body}
	}
	return resp, err
}

// bounded fails behind its end.
type bounded struct {
	r    io.Reader
	left int64
}

func (b *bounded) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	if b.left -= int64(n); b.left < 0 {
		return 0, fmt.Errorf("manifest of more than %d bytes", maxManifest)
	}
	return n, err
}
