package volume

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/subtle"
	"embed"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"sync"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/crypto/xts"
	"golang.org/x/sys/unix"
)

// Sector is the unit of encryption, in bytes.
const Sector = 4096

// Errors of an image.
var (
	ErrLost   = errors.New("the volume's disk is not here")
	ErrKey    = errors.New("this key does not open the volume")
	ErrFormat = errors.New("not a volume of this format")
)

//go:generate go run ./gen
//go:embed templates/*.zst
var templates embed.FS

// sizes are those of the templates, in MiB.
func sizes() []int64 { return []int64{64, 256, 1 << 10, 4 << 10, 16 << 10, 64 << 10} }

// RoundUp is the size that a volume of at least size bytes has; 0 when none is large enough.
func RoundUp(size int64) int64 {
	for _, m := range sizes() {
		if m<<20 >= size {
			return m << 20
		}
	}
	return 0
}

// header is the first sector of an image, in the clear:
//
//	 0  8  "HFVOLUME"
//	 8  4  version, 1
//	12  4  sector size, 4096
//	16  8  size of the plain disk in bytes
//	24 32  SHA-256 of the volume's ID
//	56 32  key check: HKDF of the key over bytes 0 to 55
//	88     zero
type header struct {
	size int64
	id   [32]byte
	rest [32]byte // key check
}

var magic = [8]byte{'H', 'F', 'V', 'O', 'L', 'U', 'M', 'E'}

func (h *header) encode() []byte {
	b := make([]byte, Sector)
	copy(b, magic[:])
	binary.LittleEndian.PutUint32(b[8:], 1)
	binary.LittleEndian.PutUint32(b[12:], Sector)
	binary.LittleEndian.PutUint64(b[16:], uint64(h.size))
	copy(b[24:], h.id[:])
	copy(b[56:], h.rest[:])
	return b
}

func decodeHeader(b []byte) (*header, error) {
	if len(b) != Sector || !bytes.Equal(b[:8], magic[:]) {
		return nil, ErrFormat
	}
	if v := binary.LittleEndian.Uint32(b[8:]); v != 1 {
		return nil, fmt.Errorf("%w: version %d", ErrFormat, v)
	}
	if s := binary.LittleEndian.Uint32(b[12:]); s != Sector {
		return nil, fmt.Errorf("%w: sectors of %d bytes", ErrFormat, s)
	}
	h := &header{size: int64(binary.LittleEndian.Uint64(b[16:]))}
	if h.size <= 0 || RoundUp(h.size) != h.size {
		return nil, fmt.Errorf("%w: size %d", ErrFormat, h.size)
	}
	copy(h.id[:], b[24:])
	copy(h.rest[:], b[56:])
	for _, x := range b[88:] {
		if x != 0 {
			return nil, fmt.Errorf("%w: bytes after the header", ErrFormat)
		}
	}
	return h, nil
}

func derive(key [32]byte, label string, info []byte, n int) []byte {
	b, err := hkdf.Key(sha256.New, key[:], nil, label+string(info), n)
	if err != nil {
		panic(err) // both lengths are far within HKDF's limit
	}
	return b
}

func (h *header) check(key [32]byte) [32]byte {
	return [32]byte(derive(key, "holdfast/volume/check/v1", h.encode()[:56], 32))
}

// disk is the plain view of an image.
type disk struct {
	f    *os.File
	size int64
	c    *xts.Cipher
}

func newDisk(f *os.File, size int64, key [32]byte, id [32]byte) (*disk, error) {
	c, err := xts.NewCipher(func(k []byte) (cipher.Block, error) { return aes.NewCipher(k) }, derive(key, "holdfast/volume/xts/v1", id[:], 64))
	if err != nil {
		return nil, err
	}
	return &disk{f, size, c}, nil
}

// openImage checks the header of an image against ID and key.
func openImage(path, id string, key [32]byte) (*disk, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%s: %w", path, ErrLost)
	} else if err != nil {
		return nil, err
	}
	b := make([]byte, Sector)
	if _, err := io.ReadFull(f, b); err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", path, ErrFormat)
	}
	h, err := decodeHeader(b)
	if err == nil && h.id != sha256.Sum256([]byte(id)) {
		err = fmt.Errorf("%w: it belongs to another volume", ErrFormat)
	}
	if err == nil {
		if want := h.check(key); subtle.ConstantTimeCompare(want[:], h.rest[:]) != 1 {
			err = ErrKey
		}
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return newDisk(f, h.size, key, h.id)
}

// createImage makes an image with an empty file system.
func createImage(path, id string, size int64, key [32]byte) error {
	real := RoundUp(size)
	if real == 0 {
		return fmt.Errorf("%d bytes: a volume has at most %d", size, sizes()[len(sizes())-1]<<20)
	}
	return makeImage(path, id, real, key, func(d *disk) error { return Format(d, real) })
}

// makeImage makes an image of one of the sizes that fill fills. It appears whole or not at all.
func makeImage(path, id string, size int64, key [32]byte, fill func(*disk) error) error {
	// One name for each volume: what a killed server left is written over, by whoever holds the volume's lock.
	tmp, err := os.OpenFile(filepath.Join(filepath.Dir(path), making+filepath.Base(path)), os.O_CREATE|os.O_TRUNC|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	defer tmp.Close()
	h := &header{size: size, id: sha256.Sum256([]byte(id))}
	h.rest = h.check(key)
	d, err := newDisk(tmp, size, key, h.id)
	if err != nil {
		return err
	}
	if err := tmp.Truncate(Sector + size); err != nil {
		return err
	}
	if _, err := tmp.WriteAt(h.encode(), 0); err != nil {
		return err
	}
	if err := fill(d); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := tmp.Sync(); err != nil {
		return err
	}
	return errors.Join(os.Rename(tmp.Name(), path), dir.Sync())
}

// making is how the name of an image begins that is not whole yet.
const making = ".new-"

// Format writes an empty file system, labelled "holdfast", to a disk of size bytes all of which are zero: the largest template
// that fits, which the kernel can grow once it is mounted. The first block, without which there is no file system, comes
// last.
func Format(d interface {
	io.WriterAt
	Sync() error
}, size int64) error {
	mib := int64(0)
	for _, m := range sizes() {
		if m<<20 <= size {
			mib = m
		}
	}
	if mib == 0 {
		return fmt.Errorf("%d bytes: a file system has at least %d", size, sizes()[0]<<20)
	}
	packed, err := templates.Open(fmt.Sprintf("templates/ext4-%d.zst", mib))
	if err != nil {
		return err
	}
	defer packed.Close()
	z, err := zstd.NewReader(packed, zstd.WithDecoderConcurrency(1))
	if err != nil {
		return err
	}
	defer z.Close()
	rec := make([]byte, 4+Sector)
	var first []byte
	for {
		if _, err := io.ReadFull(z, rec); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return fmt.Errorf("template: %w", err)
		}
		n := int64(binary.LittleEndian.Uint32(rec))
		if n == 0 {
			first = bytes.Clone(rec[4:])
			continue
		}
		if _, err := d.WriteAt(rec[4:], n*Sector); err != nil {
			return err
		}
	}
	if err := d.Sync(); err != nil {
		return err
	}
	_, err = d.WriteAt(first, 0)
	return err
}

// zero is what a sector that was never written, or was discarded, holds on disk: a hole. No plaintext encrypts to it but
// with a chance of 2^-32768.
var zero [Sector]byte

// ReadAt reads whole sectors.
func (d *disk) ReadAt(p []byte, off int64) (int, error) {
	if err := d.bounds(p, off); err != nil {
		return 0, err
	}
	n, err := d.f.ReadAt(p, off+Sector)
	if n < len(p) {
		return 0, fmt.Errorf("read at %d: %w", off, errors.Join(err, io.ErrUnexpectedEOF))
	}
	d.decrypt(p, off)
	return n, nil
}

func (d *disk) decrypt(p []byte, off int64) {
	each(p, func(s []byte, i int64) {
		if !bytes.Equal(s, zero[:]) {
			d.c.Decrypt(s, s, uint64(off/Sector+i))
		}
	})
}

// isZero reports whether whole sectors are all zero.
func isZero(p []byte) bool {
	for ; len(p) > 0; p = p[Sector:] {
		if !bytes.Equal(p[:Sector], zero[:]) {
			return false
		}
	}
	return true
}

// buffers hold ciphertext on its way to the disk.
var buffers = sync.Pool{New: func() any { return new([]byte) }}

// WriteAt writes whole sectors.
func (d *disk) WriteAt(p []byte, off int64) (int, error) {
	if err := d.bounds(p, off); err != nil {
		return 0, err
	}
	bp := buffers.Get().(*[]byte)
	defer buffers.Put(bp)
	if cap(*bp) < len(p) {
		*bp = make([]byte, len(p))
	}
	b := (*bp)[:len(p)]
	copy(b, p) // the caller's bytes are not ours to change
	each(b, func(s []byte, i int64) { d.c.Encrypt(s, s, uint64(off/Sector+i)) })
	return d.f.WriteAt(b, off+Sector)
}

// Discard makes a range of whole sectors a hole.
func (d *disk) Discard(off, n int64) error {
	if off%Sector != 0 || n%Sector != 0 || off < 0 || n < 0 || off+n > d.size {
		return unix.EINVAL
	}
	return unix.Fallocate(int(d.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off+Sector, n)
}

// Sync makes everything that was written last.
func (d *disk) Sync() error { return unix.Fdatasync(int(d.f.Fd())) }

func (d *disk) bounds(p []byte, off int64) error {
	if off < 0 || off%Sector != 0 || len(p)%Sector != 0 || off+int64(len(p)) > d.size {
		return fmt.Errorf("%d bytes at %d of %d: %w", len(p), off, d.size, unix.EINVAL)
	}
	return nil
}

// each calls f for every sector of p, on several cores when there is enough to do.
func each(p []byte, f func(s []byte, i int64)) {
	n := int64(len(p) / Sector)
	part := func(from, to int64) {
		for i := from; i < to; i++ {
			f(p[i*Sector:(i+1)*Sector], i)
		}
	}
	cores := int64(min(runtime.GOMAXPROCS(0), 4))
	if n < 16 || cores == 1 {
		part(0, n)
		return
	}
	var all sync.WaitGroup
	for c := range cores {
		all.Go(func() { part(n*c/cores, n*(c+1)/cores) })
	}
	all.Wait()
}
