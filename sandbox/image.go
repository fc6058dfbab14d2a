package sandbox

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// Limits of an image. The size that it unpacks to is Config.Image.
const (
	maxManifest = 4 << 20
	maxConfig   = 4 << 20
	maxLayers   = 127
	maxEntries  = 1 << 20
	maxPath     = 4096
	maxDepth    = 128
	maxXattrs   = 64 << 10
)

// ErrImage is returned for an image that is not what its digest says, or that no honest builder makes.
var ErrImage = errors.New("image refused")

// Blobs gives an image's blobs by digest ("sha256:…"). What it gives is verified here.
type Blobs interface {
	Open(ctx context.Context, digest string) (io.ReadCloser, error)
}

// Image is an unpacked image.
type Image struct {
	Manifest   string   // digest
	Layers     []string // SHA-256 of each layer's tar in hexadecimal, lowest first
	Entrypoint []string
	Cmd        []string
	Env        []string
	User       string
	WorkingDir string
}

// ErrFull is returned when unpacked layers would take more than Config.Layers.
var ErrFull = errors.New("no room for another layer")

// Unpack makes an image ready for an owner. Each blob must have its digest and size, each layer its diffID; what is wrong
// is refused and leaves nothing. A layer that is there already is used again by an owner whose blobs have given all its
// bytes once: a diffID is no secret, so that naming one must not give what is behind it.
func (r *Runner) Unpack(ctx context.Context, owner string, blobs Blobs, manifest string) (Image, error) {
	img, err := r.unpack(ctx, owner, blobs, manifest)
	if err != nil {
		return Image{}, fmt.Errorf("unpack %s: %w", manifest, err)
	}
	return img, nil
}

func (r *Runner) unpack(ctx context.Context, owner string, blobs Blobs, manifest string) (Image, error) {
	raw, err := readBlob(ctx, blobs, manifest, -1, maxManifest)
	if err != nil {
		return Image{}, err
	}
	// An index names a manifest for each platform. Which of the two a blob is shows in its fields, since a registry's media
	// type is outside the digest; one that has both is refused, so that nobody reads it in another way than we do.
	type either struct {
		ocispec.Manifest
		Manifests []ocispec.Descriptor `json:"manifests"`
	}
	var m either
	if err := json.Unmarshal(raw, &m); err != nil {
		return Image{}, fmt.Errorf("%w: manifest: %w", ErrImage, err)
	}
	if len(m.Manifests) > 0 {
		if len(m.Layers) > 0 || m.Config.Digest != "" {
			return Image{}, fmt.Errorf("%w: it is both an index and a manifest", ErrImage)
		}
		i := slices.IndexFunc(m.Manifests, func(d ocispec.Descriptor) bool {
			return d.Platform != nil && d.Platform.OS == "linux" && d.Platform.Architecture == "amd64"
		})
		if i < 0 {
			return Image{}, fmt.Errorf("%w: none of its %d manifests is for linux/amd64", ErrImage, len(m.Manifests))
		}
		d := m.Manifests[i]
		if raw, err = readBlob(ctx, blobs, string(d.Digest), d.Size, maxManifest); err != nil {
			return Image{}, err
		}
		m = either{}
		if err := json.Unmarshal(raw, &m); err != nil {
			return Image{}, fmt.Errorf("%w: manifest: %w", ErrImage, err)
		}
		if len(m.Manifests) > 0 {
			return Image{}, fmt.Errorf("%w: an index in an index", ErrImage)
		}
	}
	raw, err = readBlob(ctx, blobs, string(m.Config.Digest), m.Config.Size, maxConfig)
	if err != nil {
		return Image{}, fmt.Errorf("config: %w", err)
	}
	var c ocispec.Image
	if err := json.Unmarshal(raw, &c); err != nil {
		return Image{}, fmt.Errorf("%w: config: %w", ErrImage, err)
	}
	if n := len(m.Layers); n == 0 || n > maxLayers || n != len(c.RootFS.DiffIDs) {
		return Image{}, fmt.Errorf("%w: %d layers and %d diffIDs", ErrImage, n, len(c.RootFS.DiffIDs))
	}
	if (c.OS != "" && c.OS != "linux") || (c.Architecture != "" && c.Architecture != "amd64") {
		return Image{}, fmt.Errorf("%w: it is for %s/%s, this machine is linux/amd64", ErrImage, c.OS, c.Architecture)
	}
	img := Image{Manifest: manifest, Entrypoint: c.Config.Entrypoint, Cmd: c.Config.Cmd, Env: c.Config.Env, User: c.Config.User, WorkingDir: c.Config.WorkingDir}
	room := r.cfg.Image
	for i, l := range m.Layers {
		id, err := digestHex(string(c.RootFS.DiffIDs[i]))
		if err != nil {
			return Image{}, fmt.Errorf("%w: diffID of layer %d: %w", ErrImage, i, err)
		}
		n, err := r.layer(ctx, owner, blobs, l, id, room)
		if err != nil {
			return Image{}, fmt.Errorf("layer %d: %w", i, err)
		}
		room -= n
		img.Layers = append(img.Layers, id)
	}
	return img, nil
}

func digestHex(d string) (string, error) {
	h, ok := strings.CutPrefix(d, "sha256:")
	if !ok || len(h) != 64 || strings.Trim(h, "0123456789abcdef") != "" {
		return "", fmt.Errorf("%q is not a sha256 digest", d)
	}
	return h, nil
}

// readBlob reads a small blob; size is what its descriptor says, or negative.
func readBlob(ctx context.Context, blobs Blobs, digest string, size, limit int64) ([]byte, error) {
	want, err := digestHex(digest)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrImage, err)
	}
	f, err := blobs.Open(ctx, digest)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("%w: %s is larger than %d bytes", ErrImage, digest, limit)
	}
	if size >= 0 && int64(len(b)) != size {
		return nil, fmt.Errorf("%w: %s has %d bytes, its descriptor says %d", ErrImage, digest, len(b), size)
	}
	if sum := sha256.Sum256(b); hex.EncodeToString(sum[:]) != want {
		return nil, fmt.Errorf("%w: bytes of %s have another digest", ErrImage, digest)
	}
	return b, nil
}

// mark says that a layer is there, in layers/HEX.json.
type mark struct {
	Size   int64
	Packed map[string][]string // the blobs that unpack to it, by digest, and the owners who had them
}

func (m *mark) add(blob, owner string) {
	if m.Packed == nil {
		m.Packed = map[string][]string{}
	}
	m.Packed[blob] = append(m.Packed[blob], owner)
}

// layer unpacks one layer unless it is there, and returns the bytes that it takes.
func (r *Runner) layer(ctx context.Context, owner string, blobs Blobs, desc ocispec.Descriptor, id string, room int64) (int64, error) {
	defer r.lock("layer-" + id)()
	blob := string(desc.Digest)
	if _, err := digestHex(blob); err != nil {
		return 0, fmt.Errorf("%w: %w", ErrImage, err)
	}
	if desc.Size < 0 {
		return 0, fmt.Errorf("%w: size %d", ErrImage, desc.Size)
	}
	dir := filepath.Join(r.cfg.Dir, "layers", id)
	var m mark
	if readJSON(dir+".json", &m) == nil {
		if m.Size > room {
			return 0, fmt.Errorf("%w: it unpacks to more than %d bytes", ErrImage, r.cfg.Image)
		}
		owners, seen := m.Packed[blob]
		if slices.Contains(owners, owner) {
			return m.Size, nil
		}
		// Every byte is read and none is written. Of a blob that is known to unpack to this layer the packed bytes will do.
		to := func(plain *counter) (err error) { _, err = io.Copy(io.Discard, plain); return err }
		if seen {
			to = nil
		}
		if err := readLayer(ctx, blobs, desc, id, room, to); err != nil {
			return 0, err
		}
		m.add(blob, owner)
		return m.Size, writeJSON(dir+".json", m)
	}
	if err := os.MkdirAll(filepath.Join(r.cfg.Dir, "layers"), 0o700); err != nil {
		return 0, err
	}
	if err := r.take(0); err != nil {
		return 0, err
	}
	tmp := filepath.Join(r.cfg.Dir, "layers", unpacking+id) // one name, so that what a killed process left is found
	if err := os.RemoveAll(tmp); err != nil {
		return 0, err
	}
	if err := os.Mkdir(tmp, 0o700); err != nil {
		return 0, err
	}
	taken := int64(0)
	defer func() {
		if os.RemoveAll(tmp) == nil {
			r.take(-taken)
		}
	}()
	if err := os.Chmod(tmp, 0o755); err != nil {
		return 0, err
	}
	err := readLayer(ctx, blobs, desc, id, room, func(plain *counter) (err error) {
		m.Size, err = untar(ctx, plain, tmp, room, func(n int64) error {
			if err := r.take(n); err != nil {
				return err
			}
			taken += n
			return nil
		})
		return err
	})
	if err != nil {
		return 0, err
	}
	if err := os.RemoveAll(dir); err != nil { // of a process that died between the rename and the mark
		return 0, err
	}
	if err := os.Rename(tmp, dir); err != nil {
		return 0, err
	}
	m.add(blob, owner)
	if err := writeJSON(dir+".json", m); err != nil {
		return 0, errors.Join(err, os.RemoveAll(dir))
	}
	taken = 0 // it stays
	return m.Size, nil
}

// readLayer reads a layer's blob to its end. It must have its digest and size, and what it unpacks to, which is given to
// to, the diffID; without to only the packed bytes are looked at.
func readLayer(ctx context.Context, blobs Blobs, desc ocispec.Descriptor, id string, room int64, to func(plain *counter) error) error {
	f, err := blobs.Open(ctx, string(desc.Digest))
	if err != nil {
		return err
	}
	defer f.Close()
	packed := &counter{ctx: ctx, r: io.LimitReader(f, desc.Size+1), h: sha256.New()}
	read := []*counter{packed}
	if to != nil {
		plain, done, err := decompress(packed)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrImage, err)
		}
		defer done()
		// Headers and padding of the tar come on top of the room.
		diff := &counter{ctx: ctx, r: plain, h: sha256.New(), limit: room + room/8 + 64<<20, packed: packed}
		if err := to(diff); err != nil {
			return err
		}
		read = []*counter{diff, packed}
	}
	// What follows the tar's end counts for both digests.
	for _, c := range read {
		if _, err := io.Copy(io.Discard, c); err != nil {
			return fmt.Errorf("%w: %w", ErrImage, err)
		}
	}
	switch {
	case packed.n != desc.Size:
		return fmt.Errorf("%w: it has %d bytes or more, the manifest says %d", ErrImage, packed.n, desc.Size)
	case "sha256:"+hex.EncodeToString(packed.h.Sum(nil)) != string(desc.Digest):
		return fmt.Errorf("%w: bytes of %s have another digest", ErrImage, desc.Digest)
	case to != nil && hex.EncodeToString(read[0].h.Sum(nil)) != id:
		return fmt.Errorf("%w: it unpacks to another diffID than %s", ErrImage, id)
	}
	return nil
}

// take counts n more bytes of unpacked layers. The tmpfs that they lie on also holds what all sandboxes need to live, so
// that no image may fill it.
func (r *Runner) take(n int64) error {
	r.layers.Lock()
	defer r.layers.Unlock()
	if !r.layers.known {
		all, err := os.ReadDir(filepath.Join(r.cfg.Dir, "layers"))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		for _, l := range all {
			p := filepath.Join(r.cfg.Dir, "layers", l.Name())
			var m mark
			switch {
			case strings.HasPrefix(l.Name(), unpacking): // of a process before this one: nothing is unpacked before this
				if err := os.RemoveAll(p); err != nil {
					return err
				}
			case readJSON(p, &m) == nil:
				r.layers.used += m.Size
			}
		}
		if r.cfg.Layers <= 0 {
			var st unix.Statfs_t
			if err := unix.Statfs(r.cfg.Dir, &st); err != nil {
				return fmt.Errorf("size of %s: %w", r.cfg.Dir, err)
			}
			r.cfg.Layers = int64(st.Blocks) * st.Bsize / 2
		}
		r.layers.known = true
	}
	if n > 0 && r.layers.used+n > r.cfg.Layers {
		return fmt.Errorf("%w: all together may take %d bytes", ErrFull, r.cfg.Layers)
	}
	r.layers.used += n
	return nil
}

// unpacking is how the directory of a layer begins that is not there yet.
const unpacking = ".unpack-"

// counter hashes and counts what is read, and fails at its limits.
type counter struct {
	ctx    context.Context
	r      io.Reader
	h      hash.Hash
	n      int64
	limit  int64
	packed *counter // where its bytes come from, if they are compressed
}

// No honest layer shrinks to less than a part in maxRatio; what is small may.
const (
	maxRatio  = 256
	freeRatio = 32 << 20
)

func (c *counter) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := c.r.Read(p)
	c.h.Write(p[:n])
	c.n += int64(n)
	switch {
	case c.limit > 0 && c.n > c.limit:
		return n, fmt.Errorf("%w: it unpacks to more than is allowed", ErrImage)
	case c.packed != nil && c.n > freeRatio && c.n/maxRatio > c.packed.n:
		return n, fmt.Errorf("%w: it unpacks to more than %d times its size", ErrImage, maxRatio)
	}
	return n, err
}

// decompress knows gzip and zstd by their first bytes; anything else is a plain tar.
func decompress(r io.Reader) (io.Reader, func(), error) {
	head := make([]byte, 4)
	n, err := io.ReadFull(r, head)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		return nil, nil, err
	}
	r = io.MultiReader(bytes.NewReader(head[:n]), r)
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b}):
		z, err := gzip.NewReader(r)
		if err != nil {
			return nil, nil, err
		}
		return z, func() { z.Close() }, nil
	case bytes.Equal(head, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		z, err := zstd.NewReader(r, zstd.WithDecoderMaxWindow(64<<20), zstd.WithDecoderConcurrency(1))
		if err != nil {
			return nil, nil, err
		}
		return z, z.Close, nil
	}
	return r, func() {}, nil
}

// untar unpacks a layer into dir, which nothing in it can leave: every path is resolved beneath dir by the kernel's
// rules for os.Root. Whiteouts become overlayfs's own. Each entry is paid with take before it is made: its pages, and what
// the kernel needs to remember it.
func untar(ctx context.Context, r io.Reader, dir string, room int64, take func(int64) error) (int64, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return 0, err
	}
	defer root.Close()
	var size int64
	tr := tar.NewReader(r)
	for entries := 0; ; entries++ {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return size, nil
		}
		if err != nil {
			return 0, fmt.Errorf("%w: %w", ErrImage, err)
		}
		if h.Typeflag == tar.TypeXGlobalHeader {
			continue // a comment, as git writes it
		}
		if entries >= maxEntries {
			return 0, fmt.Errorf("%w: more than %d entries", ErrImage, maxEntries)
		}
		if h.Size < 0 || h.Size > room {
			return 0, fmt.Errorf("%w: it unpacks to more than is allowed", ErrImage)
		}
		n := (h.Size+pageSize-1)/pageSize*pageSize + inodeSize
		if size += n; size > room {
			return 0, fmt.Errorf("%w: it unpacks to more than is allowed", ErrImage)
		}
		if err := take(n); err != nil {
			return 0, err
		}
		if err := unpackEntry(root, tr, h); err != nil {
			return 0, fmt.Errorf("entry %.200q: %w", h.Name, err)
		}
	}
}

// What a tmpfs keeps of a file: whole pages, and about as much as this beside them.
const (
	pageSize  = 4096
	inodeSize = 1024
)

const (
	whiteout = ".wh."
	opaque   = ".wh..wh..opq"
)

func unpackEntry(root *os.Root, r io.Reader, h *tar.Header) error {
	name := path.Clean(strings.TrimPrefix(h.Name, "/"))
	switch {
	case len(h.Name) > maxPath || len(h.Linkname) > maxPath:
		return fmt.Errorf("%w: path of more than %d bytes", ErrImage, maxPath)
	case strings.Count(name, "/") > maxDepth:
		return fmt.Errorf("%w: path of more than %d levels", ErrImage, maxDepth)
	case strings.ContainsRune(h.Name, 0) || slices.Contains(strings.Split(h.Name, "/"), ".."):
		return fmt.Errorf("%w: path leads outside", ErrImage)
	}
	if name == "." {
		if h.Typeflag != tar.TypeDir {
			return fmt.Errorf("%w: the root is not a directory", ErrImage)
		}
		return attributes(root, ".", h)
	}
	parent, base := path.Split(name)
	if parent = path.Clean(parent); parent != "." {
		if err := makeParents(root, parent); err != nil {
			return fmt.Errorf("%w: %w", ErrImage, err)
		}
	}
	switch {
	case base == opaque:
		return onDir(root, parent, setOpaque)
	case strings.HasPrefix(base, whiteout):
		gone := strings.TrimPrefix(base, whiteout)
		if gone == "" || gone == "." || gone == ".." {
			return fmt.Errorf("%w: whiteout of nothing", ErrImage)
		}
		// It hides what is below, not what this layer itself has put there.
		switch st, err := root.Lstat(path.Join(parent, gone)); {
		case errors.Is(err, fs.ErrNotExist):
			return onDir(root, parent, func(fd int) error { return unix.Mknodat(fd, gone, unix.S_IFCHR, 0) })
		case err != nil:
			return fmt.Errorf("%w: %w", ErrImage, err)
		case st.IsDir():
			return onDir(root, path.Join(parent, gone), setOpaque)
		}
		return nil
	}
	// A later entry replaces an earlier one; a directory stays and takes the new attributes.
	hidden := false
	if st, err := root.Lstat(name); err == nil && (!st.IsDir() || h.Typeflag != tar.TypeDir) {
		hidden = st.Mode()&fs.ModeCharDevice != 0 // the only ones are our whiteouts
		if err := root.RemoveAll(name); err != nil {
			return fmt.Errorf("%w: %w", ErrImage, err)
		}
	}
	switch h.Typeflag {
	case tar.TypeDir:
		if err := root.Mkdir(name, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("%w: %w", ErrImage, err)
		}
		if hidden {
			if err := onDir(root, name, setOpaque); err != nil {
				return err
			}
		}
	case tar.TypeReg:
		f, err := root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrImage, err)
		}
		_, err = io.Copy(f, r)
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
	case tar.TypeSymlink:
		// It may point anywhere: it is followed only inside the sandbox, or by os.Root, which does not leave.
		if err := root.Symlink(h.Linkname, name); err != nil {
			return fmt.Errorf("%w: %w", ErrImage, err)
		}
		return lchown(root, name, h)
	case tar.TypeLink:
		if slices.Contains(strings.Split(h.Linkname, "/"), "..") {
			return fmt.Errorf("%w: hard link leads outside", ErrImage)
		}
		if err := root.Link(path.Clean(strings.TrimPrefix(h.Linkname, "/")), name); err != nil {
			return fmt.Errorf("%w: hard link: %w", ErrImage, err)
		}
		return nil // it has its target's attributes
	default:
		return fmt.Errorf("%w: entry of type %q; devices, sockets and pipes do not belong into an image", ErrImage, h.Typeflag)
	}
	return attributes(root, name, h)
}

func onDir(root *os.Root, dir string, f func(fd int) error) error {
	d, err := root.Open(dir)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrImage, err)
	}
	defer d.Close()
	return f(int(d.Fd()))
}

// makeParents makes a directory and those above it. Where this layer has hidden something of that name the directory begins
// empty.
func makeParents(root *os.Root, dir string) error {
	err := root.MkdirAll(dir, 0o755)
	if err == nil {
		return nil
	}
	for i := range len(dir) + 1 {
		if i < len(dir) && dir[i] != '/' {
			continue
		}
		st, lerr := root.Lstat(dir[:i])
		if lerr != nil || st.Mode()&fs.ModeCharDevice == 0 {
			continue
		}
		if err := errors.Join(root.Remove(dir[:i]), root.Mkdir(dir[:i], 0o755)); err != nil {
			return err
		}
		if err := onDir(root, dir[:i], setOpaque); err != nil {
			return err
		}
		return root.MkdirAll(dir, 0o755)
	}
	return err
}

// setOpaque hides what layers below have in a directory.
func setOpaque(fd int) error { return unix.Fsetxattr(fd, "trusted.overlay.opaque", []byte("y"), 0) }

func lchown(root *os.Root, name string, h *tar.Header) error {
	if h.Uid < 0 || h.Gid < 0 || int64(h.Uid) > 1<<31-1 || int64(h.Gid) > 1<<31-1 {
		return fmt.Errorf("%w: owner %d:%d", ErrImage, h.Uid, h.Gid)
	}
	return root.Lchown(name, h.Uid, h.Gid)
}

func attributes(root *os.Root, name string, h *tar.Header) error {
	if err := lchown(root, name, h); err != nil {
		return err
	}
	total := 0
	for k, v := range h.PAXRecords {
		attr, ok := strings.CutPrefix(k, "SCHILY.xattr.")
		if !ok || (!strings.HasPrefix(attr, "user.") && attr != "security.capability") {
			continue // trusted.overlay.* would let an image play with the layers below it
		}
		if total += len(k) + len(v); total > maxXattrs {
			return fmt.Errorf("%w: extended attributes of more than %d bytes", ErrImage, maxXattrs)
		}
		f, err := root.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW, 0)
		if err != nil {
			return err
		}
		err = unix.Fsetxattr(int(f.Fd()), attr, []byte(v), 0)
		f.Close()
		if err != nil && !errors.Is(err, unix.ENOTSUP) {
			return fmt.Errorf("extended attribute %q: %w", attr, err)
		}
	}
	mode := fs.FileMode(h.Mode & 0o777)
	for bit, m := range map[int64]fs.FileMode{0o4000: fs.ModeSetuid, 0o2000: fs.ModeSetgid, 0o1000: fs.ModeSticky} {
		if h.Mode&bit != 0 {
			mode |= m
		}
	}
	if err := root.Chmod(name, mode); err != nil {
		return err
	}
	t := h.ModTime
	if t.Before(time.Unix(0, 0)) {
		t = time.Unix(0, 0)
	}
	return root.Chtimes(name, t, t)
}

// Prune removes the layers of images that are not kept and that no sandbox uses.
func (r *Runner) Prune(ctx context.Context, keep []Image) error {
	if err := r.take(0); err != nil {
		return fmt.Errorf("prune layers: %w", err)
	}
	used := map[string]bool{}
	for _, img := range keep {
		for _, l := range img.Layers {
			used[l] = true
		}
	}
	bundles, err := os.ReadDir(filepath.Join(r.cfg.Dir, "bundles"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("prune layers: %w", err)
	}
	for _, b := range bundles {
		var s Spec
		if readJSON(filepath.Join(r.bundle(b.Name()), "spec.json"), &s) == nil {
			for _, l := range s.Image.Layers {
				used[l] = true
			}
		}
	}
	layers, err := os.ReadDir(filepath.Join(r.cfg.Dir, "layers"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("prune layers: %w", err)
	}
	for _, l := range layers {
		id := strings.TrimPrefix(strings.TrimSuffix(l.Name(), ".json"), unpacking)
		if used[id] || ctx.Err() != nil {
			continue
		}
		unlock, ok := r.tryLock("layer-" + id)
		if !ok {
			continue // it is just being unpacked
		}
		p := filepath.Join(r.cfg.Dir, "layers", id)
		var m mark
		if readJSON(p+".json", &m) != nil {
			m.Size = 0
		}
		// The mark goes first: a layer without one is unpacked anew.
		err := errors.Join(removeIfThere(p+".json"), os.RemoveAll(p), os.RemoveAll(filepath.Join(r.cfg.Dir, "layers", unpacking+id)))
		if err == nil {
			err = r.take(-m.Size)
		}
		unlock()
		if err != nil {
			return fmt.Errorf("prune layer %s: %w", id, err)
		}
	}
	return ctx.Err()
}

func removeIfThere(p string) error {
	if err := os.Remove(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
