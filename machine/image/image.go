// Package image builds what a node boots, and counts what is in it. An image is three files: a kernel from the one Debian
// package that kernel.json pins by digest, an initramfs, and a manifest that names every file of it. The initramfs has
// holdfast, holdfast-runsc, the kernel modules that were asked for and those that they depend on, and the roots of the
// public certificate authorities; no shell, no interpreter, no library, nothing that is setuid. Build reads its own output
// with Audit, and keeps no image that has something else.
//
// The same inputs give the same bytes: nothing of the time, the place, the user, the environment or the number of cores is
// in an image. Package image executes nothing and runs nothing of what it packs. Bytes: docs/formats/image.md.
package image

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"debug/buildinfo"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/crypto/x509roots/fallback/bundle"
)

// Config says what to build.
type Config struct {
	Out      string   // directory that gets the image; made if it is not there
	Holdfast string   // the program, static
	Runsc    string   // holdfast-runsc, static
	Modules  []string // names of kernel modules that are wanted; what they depend on is found

	Mirror   string                  // URL of a Debian mirror; "" is Debian's own
	Package  string                  // the kernel's package as a file; "" fetches it
	Cache    string                  // directory that keeps a fetched package; "" keeps none
	Progress func(done, total int64) // called while bytes are fetched; nil is not called

	pin   *Pin          // of tests; nil is Pinned
	stall time.Duration // of tests; 0 is stallsAfter
}

// Names of an image's files.
const (
	FileKernel    = "kernel"
	FileInitramfs = "initramfs"
	FileManifest  = "manifest.json"
)

// Manifest says what an image is.
type Manifest struct {
	Version   int       `json:"version"` // of this format: 1
	Release   string    `json:"release"` // of the kernel, as uname -r has it
	Pin       Pin       `json:"pin"`
	Kernel    File      `json:"kernel"`
	Initramfs File      `json:"initramfs"`
	Programs  []Program `json:"programs"`
	Modules   []string  `json:"modules"` // in the order of loading
	Roots     Roots     `json:"roots"`
	Files     []Entry   `json:"files"` // of the initramfs
}

// File is one of the image's files.
type File struct {
	Size        int64  `json:"size"`
	SHA256      Digest `json:"sha256"`
	Compression string `json:"compression,omitempty"`
}

// Program is what a Go program says that it was built from.
type Program struct {
	Path     string `json:"path"`
	Go       string `json:"go,omitempty"`
	Module   string `json:"module,omitempty"`
	Version  string `json:"version,omitempty"`
	Revision string `json:"revision,omitempty"`
}

// Roots are the certificate authorities of an image: Mozilla's, without those that Mozilla trusts under a condition which a
// file of certificates cannot express.
type Roots struct {
	Count   int      `json:"count"`
	LeftOut []string `json:"left_out"`
}

// Build builds an image. When it fails, what was in Out before is still there.
func Build(ctx context.Context, c Config) (*Manifest, error) {
	m, err := c.build(ctx)
	if err != nil {
		return nil, fmt.Errorf("build image: %w", err)
	}
	return m, nil
}

func (c *Config) build(ctx context.Context) (*Manifest, error) {
	m := &Manifest{Version: 1}
	if c.pin != nil {
		m.Pin = *c.pin
	} else {
		var err error
		if m.Pin, err = Pinned(); err != nil {
			return nil, err
		}
	}
	var files []file
	for _, p := range []struct{ path, from string }{{pathHoldfast, c.Holdfast}, {pathRunsc, c.Runsc}} {
		f, size, err := openProgram(p.from)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		files = append(files, file{p.path, typeFile | 0o755, size, f})
		prog := Program{Path: p.path}
		if info, err := buildinfo.Read(f); err == nil {
			prog.Go, prog.Module, prog.Version = info.GoVersion, info.Main.Path, info.Main.Version
			for _, s := range info.Settings {
				if s.Key == "vcs.revision" {
					prog.Revision = s.Value
				}
			}
		}
		m.Programs = append(m.Programs, prog)
	}
	deb, err := c.obtain(ctx, m.Pin)
	if err != nil {
		return nil, err
	}
	k, err := unpack(ctx, deb)
	if err != nil {
		return nil, fmt.Errorf("unpack %s: %w", m.Pin.Package, err)
	}
	if m.Modules, err = k.order(c.Modules); err != nil {
		return nil, err
	}
	m.Release = k.release
	text := func(path string, b []byte) {
		files = append(files, file{path, typeFile | 0o444, int64(len(b)), bytes.NewReader(b)})
	}
	for _, name := range m.Modules {
		text(pathModules+"/"+name+".ko", k.modules[name])
	}
	text(pathOrder, []byte(strings.Join(append(slices.Clone(m.Modules), ""), "\n")))
	roots, err := m.Roots.pem()
	if err != nil {
		return nil, err
	}
	text(pathRoots, roots)
	if err := os.MkdirAll(c.Out, 0o755); err != nil {
		return nil, err
	}
	return m, c.write(ctx, m, k.image, files)
}

// file is a file to be packed.
type file struct {
	path string
	mode Mode
	size int64
	body io.Reader
}

// openProgram opens a program that is static, so that it runs where there is no library.
func openProgram(name string) (f *os.File, size int64, err error) {
	f, err = os.Open(name)
	if err != nil {
		return nil, 0, err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	st, err := f.Stat()
	if err != nil {
		return nil, 0, err
	}
	head := make([]byte, min(maxHead, st.Size()))
	if _, err := f.ReadAt(head, 0); err != nil {
		return nil, 0, err
	}
	switch is := inspect(head); {
	case is.is != program || is.odd != "":
		return nil, 0, fmt.Errorf("%s is no ELF program for x86-64: %s", name, is.odd)
	case is.interpreter != "":
		return nil, 0, fmt.Errorf("%s is dynamic and needs %s, which is in no image: build it with CGO_ENABLED=0", name, is.interpreter)
	}
	return f, st.Size(), nil
}

// pem is the file of certificates.
func (r *Roots) pem() ([]byte, error) {
	r.LeftOut = []string{}
	var ders [][]byte
	for root := range bundle.Roots() {
		if root.Constraint == nil {
			ders = append(ders, root.Certificate)
			continue
		}
		cert, err := x509.ParseCertificate(root.Certificate)
		if err != nil {
			return nil, fmt.Errorf("certificate authorities: %w", err)
		}
		r.LeftOut = append(r.LeftOut, cert.Subject.String())
	}
	slices.SortFunc(ders, bytes.Compare)
	slices.Sort(r.LeftOut)
	var b bytes.Buffer
	for _, der := range ders {
		if err := pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: der}); err != nil {
			return nil, err
		}
	}
	r.Count = len(ders)
	return b.Bytes(), nil
}

// directories are those of an initramfs, parents first. What is not the kernel's to fill is mounted on or written by process 1.
func directories() []string {
	return []string{"bin", "data", "dev", "etc", "etc/ssl", "etc/ssl/certs", "lib", "lib/modules", "proc", "run", "sys"}
}

func pack(w io.Writer, files []file) error {
	a := &writer{w: w}
	for _, d := range directories() {
		if err := a.entry(d, typeDir|0o755, 0, nil); err != nil {
			return err
		}
	}
	if err := a.entry(pathTmp, typeDir|sticky|0o777, 0, nil); err != nil {
		return err
	}
	if err := a.entry(pathInit, typeLink|0o777, int64(len(pathHoldfast)), strings.NewReader(pathHoldfast)); err != nil {
		return err
	}
	for _, f := range files {
		if err := a.entry(f.path, f.mode, f.size, f.body); err != nil {
			return err
		}
	}
	return a.close()
}

// write writes the image's files beside their places, looks at what it wrote, and only then puts them there, the manifest
// last: where the manifest does not fit the others, that was interrupted.
func (c *Config) write(ctx context.Context, m *Manifest, kernel []byte, files []file) error {
	var tmps []string
	defer func() {
		for _, tmp := range tmps {
			os.Remove(tmp)
		}
	}()
	add := func(fill func(io.Writer) error) (string, File, error) {
		tmp, f, err := stage(ctx, c.Out, fill)
		tmps = append(tmps, tmp)
		return tmp, f, err
	}
	whole := func(b []byte) func(io.Writer) error {
		return func(w io.Writer) error { _, err := w.Write(b); return err }
	}
	var err error
	if _, m.Kernel, err = add(whole(kernel)); err != nil {
		return err
	}
	initramfs, f, err := add(func(w io.Writer) error { return c.compress(w, files) })
	if err != nil {
		return err
	}
	m.Initramfs, m.Initramfs.Compression = f, "zstd"
	contents, _, err := auditFile(initramfs)
	if err != nil {
		return err
	}
	if p := contents.Problems(); len(p) > 0 {
		return fmt.Errorf("it would have what an image must not have:\n  %s", strings.Join(p, "\n  "))
	}
	m.Files = contents.Entries
	b, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	if _, _, err := add(whole(append(b, '\n'))); err != nil {
		return err
	}
	for i, name := range []string{FileKernel, FileInitramfs, FileManifest} {
		if err := os.Rename(tmps[i], filepath.Join(c.Out, name)); err != nil {
			return err
		}
	}
	return syncDir(c.Out)
}

// compress packs the files. One goroutine and a window of its own: the bytes must not depend on the machine.
func (c *Config) compress(w io.Writer, files []file) error {
	z, err := zstd.NewWriter(w, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedDefault), zstd.WithWindowSize(8<<20))
	if err != nil {
		return err
	}
	return errors.Join(pack(z, files), z.Close())
}

// stage writes a new file in a directory, durably.
func stage(ctx context.Context, dir string, fill func(io.Writer) error) (tmp string, as File, err error) {
	f, err := os.CreateTemp(dir, ".new-*")
	if err != nil {
		return "", File{}, err
	}
	sha := sha256.New()
	w := &sink{ctx: ctx, w: io.MultiWriter(f, sha)}
	err = errors.Join(fill(w), f.Chmod(0o644), f.Sync(), f.Close()) // whatever the umask is
	return f.Name(), File{Size: w.n, SHA256: sum(sha)}, err
}

// sink counts, and ends when its context does.
type sink struct {
	ctx context.Context
	w   io.Writer
	n   int64
}

func (s *sink) Write(b []byte) (int, error) {
	if err := s.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := s.w.Write(b)
	s.n += int64(n)
	return n, err
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
