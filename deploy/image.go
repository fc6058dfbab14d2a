package deploy

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"holdfast/contract"
	"holdfast/seal"
	"holdfast/store"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// maxIndex bounds an image's manifest, index and configuration.
const maxIndex = 4 << 20

// Source is an image that was found and pinned.
type Source struct {
	Reference string
	Manifest  string // digest of the linux/amd64 manifest
	Blobs     []SourceBlob
}

// SourceBlob is one blob of an image on the user's side.
type SourceBlob struct {
	Digest string
	Size   int64
	Open   func() (io.ReadCloser, error)
}

var platform = v1.Platform{OS: "linux", Architecture: "amd64"}

// Resolve finds an image. "oci:PATH" is an OCI layout, relative to base; "oci:PATH:NAME" the one of several in it that
// has that name. Everything else is a reference to a registry, over HTTPS.
func Resolve(ctx context.Context, ref, base string) (*Source, error) {
	var img v1.Image
	var err error
	if path, ok := strings.CutPrefix(ref, "oci:"); ok {
		img, err = fromLayout(path, base)
	} else {
		img, err = fromRegistry(ctx, ref)
	}
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", ref, err)
	}
	s, err := describe(ref, img)
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", ref, err)
	}
	return s, nil
}

func fromLayout(path, base string) (v1.Image, error) {
	want := ""
	if !filepath.IsAbs(path) {
		path = filepath.Join(base, path)
	}
	if _, err := os.Stat(path); err != nil {
		if i := strings.LastIndexByte(path, ':'); i > 0 {
			path, want = path[:i], path[i+1:]
		}
	}
	if st, err := os.Stat(filepath.Join(path, "index.json")); errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%s is no OCI layout: it has no index.json (are the images built? make images)", path)
	} else if err != nil {
		return nil, err
	} else if st.Size() > maxIndex {
		return nil, fmt.Errorf("index of %d bytes, at most %d are allowed", st.Size(), maxIndex)
	}
	p, err := layout.FromPath(path)
	if err != nil {
		return nil, err
	}
	idx, err := p.ImageIndex()
	if err != nil {
		return nil, err
	}
	return fromIndex(idx, want, 0)
}

func fromIndex(idx v1.ImageIndex, want string, depth int) (v1.Image, error) {
	if depth > 4 {
		return nil, errors.New("indexes are nested too deeply")
	}
	m, err := idx.IndexManifest()
	if err != nil {
		return nil, err
	}
	var fit []v1.Descriptor
	for _, d := range m.Manifests {
		named := d.Annotations["org.opencontainers.image.ref.name"]
		if want != "" && named != want {
			continue
		}
		if d.Platform != nil && !d.Platform.Satisfies(platform) {
			continue
		}
		if d.Size > maxIndex {
			return nil, fmt.Errorf("manifest of %d bytes, at most %d are allowed", d.Size, maxIndex)
		}
		fit = append(fit, d)
	}
	if len(fit) != 1 {
		return nil, fmt.Errorf("%d images for linux/amd64 fit, exactly one must: name one with oci:PATH:NAME", len(fit))
	}
	if fit[0].MediaType.IsIndex() {
		next, err := idx.ImageIndex(fit[0].Digest)
		if err != nil {
			return nil, err
		}
		return fromIndex(next, "", depth+1)
	}
	return idx.Image(fit[0].Digest)
}

func fromRegistry(ctx context.Context, ref string) (v1.Image, error) {
	r, err := name.ParseReference(ref)
	if err != nil {
		return nil, err
	}
	if r.Context().Scheme() != "https" {
		return nil, fmt.Errorf("registry %s would be asked without TLS", r.Context().RegistryStr())
	}
	return remote.Image(r, remote.WithContext(ctx), remote.WithPlatform(platform))
}

func describe(ref string, img v1.Image) (*Source, error) {
	d, err := img.Digest()
	if err != nil {
		return nil, err
	}
	raw, err := img.RawManifest()
	if err != nil {
		return nil, err
	}
	cfg, err := img.RawConfigFile()
	if err != nil {
		return nil, err
	}
	m, err := img.Manifest()
	if err != nil {
		return nil, err
	}
	if len(raw) > maxIndex || len(cfg) > maxIndex {
		return nil, fmt.Errorf("manifest or configuration is larger than %d bytes", maxIndex)
	}
	s := &Source{Reference: ref, Manifest: d.String()}
	memory := func(digest string, b []byte) {
		s.Blobs = append(s.Blobs, SourceBlob{digest, int64(len(b)), func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader(string(b))), nil }})
	}
	memory(d.String(), raw)
	memory(m.Config.Digest.String(), cfg)
	layers, err := img.Layers()
	if err != nil {
		return nil, err
	}
	for _, l := range layers {
		ld, err := l.Digest()
		if err != nil {
			return nil, err
		}
		n, err := l.Size()
		if err != nil {
			return nil, err
		}
		if slices.ContainsFunc(s.Blobs, func(b SourceBlob) bool { return b.Digest == ld.String() }) {
			continue // a layer that is there twice
		}
		s.Blobs = append(s.Blobs, SourceBlob{ld.String(), n, l.Compressed})
	}
	return s, nil
}

// Place is where sealed blobs go.
type Place interface {
	HasBlob(ctx context.Context, d store.Digest) (bool, error)
	Put(ctx context.Context, d store.Digest, size int64, r io.Reader) error
}

// Push seals the blobs of an image and stores those that the place does not have. Every blob is verified while it is
// read. done is called with the bytes that were stored or found.
func Push(ctx context.Context, s *Source, secret [32]byte, to Place, done func(int64)) (*contract.Image, error) {
	img := &contract.Image{Reference: s.Reference, Manifest: s.Manifest}
	for _, b := range s.Blobs {
		out := contract.Blob{Digest: b.Digest, Size: uint64(b.Size), Key: seal.BlobKey(secret, b.Digest)}
		// The first pass gives the sealed digest, under which it is found or stored; the second one sends it.
		h := sha256.New()
		if err := sealBlob(h, b, out.Key); err != nil {
			return nil, err
		}
		out.Sealed = [32]byte(h.Sum(nil))
		have, err := to.HasBlob(ctx, out.Sealed)
		if err != nil {
			return nil, fmt.Errorf("blob %s: %w", b.Digest, err)
		}
		if !have {
			r, w := io.Pipe()
			go func() { w.CloseWithError(sealBlob(w, b, out.Key)) }()
			err := to.Put(ctx, out.Sealed, seal.Size(b.Size), r)
			r.Close()
			if err != nil {
				return nil, fmt.Errorf("blob %s: %w", b.Digest, err)
			}
		}
		if done != nil {
			done(b.Size)
		}
		img.Blobs = append(img.Blobs, out)
	}
	return img, nil
}

func sealBlob(to io.Writer, b SourceBlob, key [32]byte) error {
	r, err := b.Open()
	if err != nil {
		return fmt.Errorf("blob %s: %w", b.Digest, err)
	}
	defer r.Close()
	w, err := seal.NewWriter(to, key)
	if err != nil {
		return err
	}
	h := sha256.New()
	n, err := io.Copy(io.MultiWriter(w, h), io.LimitReader(r, b.Size+1))
	switch {
	case err != nil:
		return fmt.Errorf("blob %s: %w", b.Digest, err)
	case n != b.Size || "sha256:"+hex.EncodeToString(h.Sum(nil)) != b.Digest:
		return fmt.Errorf("blob %s: the image's bytes have another digest", b.Digest)
	}
	return w.Close()
}
