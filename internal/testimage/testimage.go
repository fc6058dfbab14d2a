// Package testimage builds the image that holdfast's tests run: a static server (package server beside it) on nothing.
// It is only ever imported by tests.
package testimage

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Image is an OCI image in memory.
type Image struct {
	Manifest string            // digest
	Blobs    map[string][]byte // by digest
}

// Digest is the OCI digest of b.
func Digest(b []byte) string {
	s := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(s[:])
}

// Open gives a blob, as sandbox.Blobs wants it.
func (i *Image) Open(_ context.Context, d string) (io.ReadCloser, error) {
	b, ok := i.Blobs[d]
	if !ok {
		return nil, fmt.Errorf("blob %s: %w", d, os.ErrNotExist)
	}
	return io.NopCloser(bytes.NewReader(b)), nil
}

// Entry is a tar entry of a layer.
type Entry struct {
	tar.Header
	Data []byte
}

// Layer makes a tar.
func Layer(entries ...Entry) []byte {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, e := range entries {
		h := e.Header
		h.Size = int64(len(e.Data))
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		if h.Mode == 0 {
			h.Mode = 0o755
		}
		if err := w.WriteHeader(&h); err != nil {
			panic(err)
		}
		w.Write(e.Data)
	}
	w.Close()
	return buf.Bytes()
}

// New makes an image of uncompressed layers.
func New(cfg ocispec.ImageConfig, layers ...[]byte) *Image {
	img := &Image{Blobs: map[string][]byte{}}
	add := func(media string, b []byte) ocispec.Descriptor {
		d := Digest(b)
		img.Blobs[d] = b
		return ocispec.Descriptor{MediaType: media, Digest: digest.Digest(d), Size: int64(len(b))}
	}
	c := ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"}, Config: cfg, RootFS: ocispec.RootFS{Type: "layers"}}
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	for _, l := range layers {
		m.Layers = append(m.Layers, add(ocispec.MediaTypeImageLayer, l))
		c.RootFS.DiffIDs = append(c.RootFS.DiffIDs, digest.Digest(Digest(l)))
	}
	raw, _ := json.Marshal(c)
	m.Config = add(ocispec.MediaTypeImageConfig, raw)
	raw, _ = json.Marshal(m)
	img.Manifest = Digest(raw)
	img.Blobs[img.Manifest] = raw
	return img
}

// ServerBinary builds the test server and returns its bytes.
func ServerBinary(dir string) ([]byte, error) {
	_, file, _, _ := runtime.Caller(0)
	out := filepath.Join(dir, "server")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", out, "./server")
	cmd.Dir = filepath.Dir(file)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if b, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build test server: %w: %s", err, b)
	}
	return os.ReadFile(out)
}

// Server is the test server's image, with more layers on top.
func Server(dir string, more ...[]byte) (*Image, error) {
	bin, err := ServerBinary(dir)
	if err != nil {
		return nil, err
	}
	base := Layer(Entry{Header: tar.Header{Name: "server"}, Data: bin}, Entry{Header: tar.Header{Name: "etc/", Typeflag: tar.TypeDir}},
		Entry{Header: tar.Header{Name: "etc/passwd", Mode: 0o644}, Data: []byte("root:x:0:0::/:/\nuser:x:1000:1000::/:/\n")},
		Entry{Header: tar.Header{Name: "tmp/", Typeflag: tar.TypeDir, Mode: 0o1777}})
	return New(ocispec.ImageConfig{Entrypoint: []string{"/server"}, WorkingDir: "/", Env: []string{"GREETING=image"}}, append([][]byte{base}, more...)...), nil
}

// WriteLayout writes the image as an OCI layout into dir.
func (i *Image) WriteLayout(dir string) error {
	blobs := filepath.Join(dir, "blobs", "sha256")
	if err := os.MkdirAll(blobs, 0o755); err != nil {
		return err
	}
	for d, b := range i.Blobs {
		if err := os.WriteFile(filepath.Join(blobs, d[len("sha256:"):]), b, 0o644); err != nil {
			return err
		}
	}
	idx := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{{
		MediaType: ocispec.MediaTypeImageManifest, Digest: digest.Digest(i.Manifest), Size: int64(len(i.Blobs[i.Manifest])),
		Platform: &ocispec.Platform{OS: "linux", Architecture: "amd64"},
	}}}
	raw, err := json.Marshal(idx)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "index.json"), raw, 0o644); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o644)
}
