package image

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"debug/elf"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/ulikunitz/xz"
)

// Pin is the one package of Debian's that a kernel is taken from.
type Pin struct {
	Package string `json:"package"`
	Version string `json:"version"`
	Path    string `json:"path"` // below a mirror
	Size    int64  `json:"size"`
	SHA256  Digest `json:"sha256"`
}

//go:embed kernel.json
var kernelJSON []byte

// Pinned is the package that images are built from. scripts/pin-kernel.sh writes it.
func Pinned() (Pin, error) {
	var p Pin
	d := json.NewDecoder(bytes.NewReader(kernelJSON))
	d.DisallowUnknownFields()
	if err := d.Decode(&p); err != nil {
		return p, fmt.Errorf("read machine/image/kernel.json: %w", err)
	}
	if p.Size <= 0 || p.Size > maxPackage || p.Path == "" {
		return p, fmt.Errorf("read machine/image/kernel.json: %d bytes at %q", p.Size, p.Path)
	}
	return p, nil
}

const (
	mirror      = "http://deb.debian.org"
	maxPackage  = 256 << 20
	maxModule   = 64 << 20
	maxKernel   = 1 << 30          // all that is unpacked
	stallsAfter = 30 * time.Second // a fetch in which nothing comes
)

// ErrMoved is a source that does not have the pinned package.
var ErrMoved = errors.New("the pinned package is not there")

// moved says what was wanted, and what can be done.
func (p Pin) moved(where, why string) error {
	return fmt.Errorf(`%s: %s: %w
wanted: %s %s, %d bytes, sha256 %v; nothing was built
Debian's mirrors keep a kernel only until the next one. Go on with one of these:
  scripts/pin-kernel.sh  pins the kernel that Debian has now, whose signature apt verifies; then review the change of
                         machine/image/kernel.json and build holdfast again
  --mirror URL           another mirror; snapshot.debian.org keeps all (http://snapshot.debian.org/archive/debian-security/TIME)
  --package FILE         the package, from wherever you have it`, where, why, ErrMoved, p.Package, p.Version, p.Size, p.SHA256)
}

// check says what is wrong with bytes that should be the package; "" is nothing.
func (p Pin) check(b []byte) string {
	if int64(len(b)) > p.Size {
		return "it has more bytes"
	}
	if int64(len(b)) < p.Size {
		return fmt.Sprintf("it has %d bytes", len(b))
	}
	if d := Digest(sha256.Sum256(b)); d != p.SHA256 {
		return fmt.Sprintf("its digest is %v", d)
	}
	return ""
}

// obtain returns the package's bytes: from a file, from the cache, or from a mirror. They were checked, wherever they come
// from, and are not read again.
func (c *Config) obtain(ctx context.Context, p Pin) ([]byte, error) {
	if c.Package != "" {
		b, err := readSome(c.Package, p.Size)
		if err != nil {
			return nil, fmt.Errorf("kernel package: %w", err)
		}
		if why := p.check(b); why != "" {
			return nil, p.moved(c.Package, why)
		}
		return b, nil
	}
	cached := filepath.Join(c.Cache, p.SHA256.String()+".deb")
	if c.Cache != "" {
		if b, err := readSome(cached, p.Size); err == nil && p.check(b) == "" {
			return b, nil
		}
	}
	b, err := c.fetch(ctx, p)
	if err != nil {
		return nil, err
	}
	if c.Cache != "" {
		if err := os.MkdirAll(c.Cache, 0o755); err != nil {
			return nil, fmt.Errorf("cache kernel package: %w", err)
		}
		tmp, _, err := stage(ctx, c.Cache, func(w io.Writer) error { _, err := w.Write(b); return err })
		defer os.Remove(tmp)
		if err == nil {
			err = os.Rename(tmp, cached)
		}
		if err != nil {
			return nil, fmt.Errorf("cache kernel package: %w", err)
		}
	}
	return b, nil
}

// readSome reads a file, at most one byte more than limit.
func readSome(name string, limit int64) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, limit+1))
}

// fetch asks a mirror, which has one or all of Debian's archives below its URL.
func (c *Config) fetch(ctx context.Context, p Pin) ([]byte, error) {
	base := c.Mirror
	if base == "" {
		base = mirror
	}
	base = strings.TrimRight(base, "/") + "/"
	b, err := c.get(ctx, p, base+p.Path)
	if _, below, ok := strings.Cut(p.Path, "/"); ok && errors.Is(err, ErrMoved) {
		if b, err2 := c.get(ctx, p, base+below); err2 == nil {
			return b, nil
		}
	}
	return b, err
}

var errStalled = fmt.Errorf("nothing came for %v", stallsAfter)

func (c *Config) get(ctx context.Context, p Pin, url string) ([]byte, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	after := stallsAfter
	if c.stall > 0 {
		after = c.stall
	}
	stalled := time.AfterFunc(after, func() { cancel(errStalled) })
	defer stalled.Stop()
	b, why, err := c.download(ctx, p, url, func() { stalled.Reset(after) })
	switch {
	case err != nil && context.Cause(ctx) != nil:
		return nil, fmt.Errorf("fetch %s: %w: nothing was built", url, context.Cause(ctx))
	case err != nil:
		return nil, fmt.Errorf("fetch kernel package: %w: nothing was built; --mirror names another mirror, --package a file", err)
	case why != "":
		return nil, p.moved("fetch "+url, why)
	}
	return b, nil
}

// download returns the body at a URL, or why it is not the package's.
func (c *Config) download(ctx context.Context, p Pin, url string, alive func()) (b []byte, why string, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, "", err
	}
	resp, err := (&http.Client{}).Do(req)
	if err != nil {
		return nil, "", err
	}
	defer resp.Body.Close()
	switch {
	case resp.StatusCode == http.StatusNotFound || resp.StatusCode == http.StatusGone:
		return nil, resp.Status, nil
	case resp.StatusCode != http.StatusOK:
		return nil, "", fmt.Errorf("%s: %s", url, resp.Status)
	case resp.ContentLength >= 0 && resp.ContentLength != p.Size:
		return nil, fmt.Sprintf("it has %d bytes", resp.ContentLength), nil
	}
	b = make([]byte, 0, p.Size+1)
	for {
		n, err := resp.Body.Read(b[len(b):min(cap(b), len(b)+256<<10)])
		b = b[:len(b)+n]
		alive()
		if c.Progress != nil && n > 0 {
			c.Progress(int64(len(b)), p.Size)
		}
		if err == io.EOF || len(b) == cap(b) {
			return b, p.check(b), nil
		}
		if err != nil {
			return nil, "", fmt.Errorf("%s: byte %d of %d: %w", url, len(b), p.Size, err)
		}
	}
}

// kernel is what an image takes from a package.
type kernel struct {
	release string
	image   []byte
	modules map[string][]byte // by name, with _ for -
	builtin map[string]bool
}

// unpack reads Debian's package. Its digest was checked: limits are only against what is broken.
func unpack(ctx context.Context, deb []byte) (*kernel, error) {
	data, err := member(deb, "data.tar.xz")
	if err != nil {
		return nil, err
	}
	z, err := xz.NewReader(bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	k := &kernel{modules: map[string][]byte{}, builtin: map[string]bool{}}
	left := int64(maxKernel)
	for t := tar.NewReader(z); ; {
		h, err := t.Next()
		if err == io.EOF {
			break
		}
		if err = errors.Join(err, ctx.Err()); err != nil {
			return nil, err
		}
		name := strings.TrimPrefix(strings.TrimPrefix(h.Name, "./"), "usr/")
		release, isKernel := strings.CutPrefix(name, "boot/vmlinuz-")
		isModule, isList := strings.HasPrefix(name, "lib/modules/") && path.Ext(name) == ".ko", path.Base(name) == "modules.builtin"
		if h.Typeflag != tar.TypeReg || !isKernel && !isModule && !isList {
			continue
		}
		if left -= h.Size; h.Size > maxModule || left < 0 {
			return nil, fmt.Errorf("%s has %d bytes", name, h.Size)
		}
		b := make([]byte, h.Size)
		if _, err := io.ReadFull(t, b); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		switch {
		case isKernel && k.release != "":
			return nil, fmt.Errorf("it has two kernels, %s and %s", k.release, release)
		case isKernel:
			k.release, k.image = release, b
		case isModule:
			k.modules[moduleName(name)] = b
		case isList:
			for line := range strings.FieldsSeq(string(b)) {
				k.builtin[moduleName(line)] = true
			}
		}
	}
	if k.release == "" || len(k.builtin) == 0 {
		return nil, fmt.Errorf("it lacks boot/vmlinuz-* or modules.builtin")
	}
	return k, nil
}

// member is a member of an ar archive.
func member(b []byte, want string) ([]byte, error) {
	b, ok := bytes.CutPrefix(b, []byte("!<arch>\n"))
	for ok && len(b) >= 60 {
		name := strings.TrimRight(string(b[:16]), " /")
		size, err := strconv.Atoi(strings.TrimSpace(string(b[48:58])))
		if err != nil || size < 0 || size > len(b)-60 {
			break
		}
		if b = b[60:]; name == want {
			return b[:size], nil
		}
		b = b[min(size+size&1, len(b)):]
	}
	return nil, fmt.Errorf("it is no Debian package, or has no %s", want)
}

// moduleName is what the kernel calls the module in a file.
func moduleName(file string) string {
	return strings.ReplaceAll(strings.TrimSuffix(path.Base(file), ".ko"), "-", "_")
}

// order lists the modules that are wanted and those that they depend on, each after what it depends on. What is built into
// the kernel is left out.
func (k *kernel) order(wanted []string) ([]string, error) {
	out := []string{}
	done := map[string]bool{}
	var add func(name, by string, depth int) error
	add = func(name, by string, depth int) error {
		name = strings.ReplaceAll(name, "-", "_")
		if done[name] || k.builtin[name] {
			return nil
		}
		b, ok := k.modules[name]
		switch {
		case !ok:
			return fmt.Errorf("module %s%s is neither in the package nor built into kernel %s", name, by, k.release)
		case depth > len(k.modules):
			return fmt.Errorf("module %s depends on itself", name)
		}
		depends, err := dependencies(b)
		if err != nil {
			return fmt.Errorf("module %s: %w", name, err)
		}
		for _, d := range depends {
			if err := add(d, ", which "+name+" depends on,", depth+1); err != nil {
				return err
			}
		}
		if !done[name] {
			done[name] = true
			out = append(out, name)
		}
		return nil
	}
	for _, name := range wanted {
		if err := add(name, "", 0); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// dependencies reads what a module says of itself: NUL-terminated key=value pairs in a section of its own.
func dependencies(ko []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(ko))
	if err != nil {
		return nil, err
	}
	s := f.Section(".modinfo")
	if f.Type != elf.ET_REL || s == nil {
		return nil, errors.New("it is no module: it has no .modinfo")
	}
	info, err := s.Data()
	if err != nil {
		return nil, err
	}
	for pair := range strings.SplitSeq(string(info), "\x00") {
		if list, ok := strings.CutPrefix(pair, "depends="); ok && list != "" {
			return strings.Split(list, ","), nil
		}
	}
	return nil, nil
}
