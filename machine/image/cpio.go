package image

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strconv"

	"github.com/klauspost/compress/zstd"
)

// Mode is the type and the permissions of an entry, as in stat(2).
type Mode uint32

const (
	typeMask   Mode = 0o170000
	typeSocket Mode = 0o140000
	typeLink   Mode = 0o120000
	typeFile   Mode = 0o100000
	typeBlock  Mode = 0o060000
	typeDir    Mode = 0o040000
	typeChar   Mode = 0o020000
	typePipe   Mode = 0o010000
	setID      Mode = 0o006000
	sticky     Mode = 0o001000
)

func (m Mode) kind() Mode { return m & typeMask }

// String is the mode as ls shows it.
func (m Mode) String() string {
	b := []byte("?rwxrwxrwx")
	switch m.kind() {
	case typeFile:
		b[0] = '-'
	case typeDir:
		b[0] = 'd'
	case typeLink:
		b[0] = 'l'
	case typeChar:
		b[0] = 'c'
	case typeBlock:
		b[0] = 'b'
	case typePipe:
		b[0] = 'p'
	case typeSocket:
		b[0] = 's'
	}
	for i := range 9 {
		if m>>(8-i)&1 == 0 {
			b[i+1] = '-'
		}
	}
	for i, c := range []byte("sst") { // setuid, setgid, sticky
		if m>>(11-i)&1 == 1 {
			if b[3*i+3] == '-' {
				c -= 'a' - 'A'
			}
			b[3*i+3] = c
		}
	}
	return string(b)
}

// MarshalText is the mode in octal.
func (m Mode) MarshalText() ([]byte, error) { return fmt.Appendf(nil, "%06o", uint32(m)), nil }

// UnmarshalText reads it back.
func (m *Mode) UnmarshalText(b []byte) error {
	n, err := strconv.ParseUint(string(b), 8, 32)
	*m = Mode(n)
	return err
}

const (
	magic   = "070701"
	trailer = "TRAILER!!!"
	maxName = 4096 // the kernel skips what has a longer name or link
)

// writer writes a newc archive that has neither times nor owners, and numbers inodes by order.
type writer struct {
	w   io.Writer
	ino int
}

// entry writes one entry, whose parents were written before. Exactly size bytes are taken from body.
func (w *writer) entry(name string, mode Mode, size int64, body io.Reader) error {
	if size < 0 || size > 1<<32-1 {
		return fmt.Errorf("write %s: %d bytes do not fit an archive", name, size)
	}
	w.ino++
	links := 1
	if mode.kind() == typeDir {
		links = 2
	}
	if err := w.header(w.ino, mode, links, size, name); err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	if size == 0 {
		return nil
	}
	if n, err := io.CopyN(w.w, body, size); err != nil {
		return fmt.Errorf("write %s: byte %d of %d: %w", name, n, size, err)
	}
	_, err := w.w.Write(make([]byte, -size&3))
	return err
}

func (w *writer) close() error { return w.header(0, 0, 1, 0, trailer) }

func (w *writer) header(ino int, mode Mode, links int, size int64, name string) error {
	b := []byte(magic)
	for _, n := range []int64{int64(ino), int64(mode), 0, 0, int64(links), 0, size, 0, 0, 0, 0, int64(len(name) + 1), 0} {
		b = fmt.Appendf(b, "%08x", n)
	}
	b = append(append(b, name...), 0)
	_, err := w.w.Write(append(b, make([]byte, -len(b)&3)...))
	return err
}

// header is what an archive says of an entry.
type header struct {
	name     string
	mode     Mode
	uid, gid uint32
	links    uint32
	size     int64
}

// Limits of an archive that is read.
const (
	maxEntries  = 1 << 14
	maxUnpacked = 1 << 30  // bytes, before and after decompression
	maxWindow   = 32 << 20 // of zstd
)

// walk calls f for every entry of an initramfs: newc archives one after the other, each plain, in a gzip member or in a
// zstd frame, with zeros between, as the kernel takes them. It refuses what the kernel might read in another way than it
// does.
func walk(r io.Reader, f func(header, io.Reader) error) error {
	w := &walker{f: f, left: maxUnpacked}
	in := w.bounded(r)
	for n := 0; ; n++ {
		b, err := pastZeros(in)
		if err == io.EOF {
			if n == 0 {
				return errors.New("it is empty")
			}
			return nil
		}
		if err != nil {
			return err
		}
		switch {
		case b[0] == '0':
			err = w.archive(in)
		case bytes.HasPrefix(b, []byte{0x1f, 0x8b}):
			err = w.gzip(in)
		case bytes.HasPrefix(b, []byte{0x28, 0xb5, 0x2f, 0xfd}):
			err = w.zstd(in)
		default:
			err = fmt.Errorf("it is neither a newc archive nor gzip or zstd: it begins with %x", b)
		}
		if err != nil {
			return fmt.Errorf("archive %d: %w", n+1, err)
		}
	}
}

// pastZeros skips zeros and shows what follows, at most 4 bytes.
func pastZeros(in *bufio.Reader) ([]byte, error) {
	for {
		if _, err := in.Peek(1); err != nil {
			return nil, err
		}
		b, _ := in.Peek(in.Buffered())
		n := len(b) - len(bytes.TrimLeft(b, "\x00"))
		in.Discard(n)
		if n == len(b) {
			continue
		}
		b, err := in.Peek(4)
		if err == io.EOF {
			err = nil
		}
		return b, err
	}
}

type walker struct {
	f       func(header, io.Reader) error
	entries int
	left    int64 // of what may be read, before and after decompression
}

var errTooMuch = fmt.Errorf("it has more than %d entries or %d bytes", maxEntries, maxUnpacked)

func (w *walker) bounded(r io.Reader) *bufio.Reader {
	return bufio.NewReaderSize(&bounded{r, &w.left}, 1<<16)
}

type bounded struct {
	r    io.Reader
	left *int64
}

func (b *bounded) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	if *b.left -= int64(n); *b.left < 0 {
		return 0, errTooMuch
	}
	return n, err
}

func (w *walker) gzip(in *bufio.Reader) error {
	// The kernel skips a name, and takes what other flags announce for data: it would unpack something else.
	const name = 1 << 3
	if b, err := in.Peek(4); err != nil {
		return cut(err)
	} else if b[2] != 8 || b[3]&^name != 0 {
		return fmt.Errorf("a gzip header with method %d and flags %#x", b[2], b[3])
	}
	z, err := gzip.NewReader(in)
	if err != nil {
		return err
	}
	z.Multistream(false)
	return w.unpacked(z)
}

func (w *walker) zstd(in *bufio.Reader) error {
	frame := &frame{r: in}
	z, err := zstd.NewReader(frame, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
	if err != nil {
		return err
	}
	defer z.Close()
	if err := w.unpacked(z); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, frame)
	return err
}

// unpacked walks the archives in a compressed stream to its end.
func (w *walker) unpacked(r io.Reader) error {
	in := w.bounded(r)
	for {
		b, err := pastZeros(in)
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if b[0] != '0' {
			return fmt.Errorf("what is compressed is no newc archive: it begins with %x", b)
		}
		if err := w.archive(in); err != nil {
			return err
		}
	}
}

// archive walks one archive up to its trailer.
func (w *walker) archive(in *bufio.Reader) error {
	for {
		h, err := readHeader(in)
		if err != nil {
			return cut(err)
		}
		if h.name == trailer {
			if h.size != 0 {
				return errors.New("its trailer has a body")
			}
			return nil
		}
		if w.entries++; w.entries > maxEntries || h.size > maxUnpacked {
			return errTooMuch
		}
		body := &io.LimitedReader{R: in, N: h.size}
		if err := w.f(h, body); err != nil {
			return fmt.Errorf("%q: %w", h.name, cut(err))
		}
		for _, rest := range []int64{body.N, -h.size & 3} {
			if _, err := io.CopyN(io.Discard, in, rest); err != nil {
				return fmt.Errorf("%q: %w", h.name, cut(err))
			}
		}
	}
}

func cut(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

func readHeader(in io.Reader) (header, error) {
	var b [110]byte
	if _, err := io.ReadFull(in, b[:]); err != nil {
		return header{}, err
	}
	if m := string(b[:6]); m != magic && m != "070702" { // with checksums
		return header{}, fmt.Errorf("an entry begins with %q, not with %s", m, magic)
	}
	var n [13]uint32
	for i := range n {
		v, err := strconv.ParseUint(string(b[6+8*i:14+8*i]), 16, 32)
		if err != nil {
			return header{}, fmt.Errorf("a number of an entry is %q", b[6+8*i:14+8*i])
		}
		n[i] = uint32(v)
	}
	h := header{mode: Mode(n[1]), uid: n[2], gid: n[3], links: n[4], size: int64(n[6])}
	length := int(n[11])
	if length < 2 || length > maxName {
		return header{}, fmt.Errorf("an entry's name has %d bytes", length)
	}
	name := make([]byte, length+(-(len(b)+length)&3))
	if _, err := io.ReadFull(in, name); err != nil {
		return header{}, err
	}
	name = name[:length]
	if bytes.IndexByte(name, 0) != length-1 {
		return header{}, fmt.Errorf("the end of name %q is not where it should be", name)
	}
	h.name = string(name[:length-1])
	switch {
	case h.mode.kind() == typeLink && (h.size == 0 || h.size >= maxName):
		return header{}, fmt.Errorf("link %q has a target of %d bytes", h.name, h.size)
	case h.mode.kind() != typeLink && h.mode.kind() != typeFile && h.size != 0:
		return header{}, fmt.Errorf("%q has a body and is no file", h.name)
	}
	return h, nil
}

// frame reads one zstd frame (RFC 8878) and nothing behind it: what follows may be another archive, and a decoder would
// take it for itself.
type frame struct {
	r    *bufio.Reader
	next []byte // of a header, not given out yet
	left int64  // of a block's content
	step int
	sum  bool // a checksum follows the last block
}

// Steps of a frame.
const (
	stepBegin = iota
	stepBlocks
	stepSum
	stepEnd
)

func (f *frame) Read(p []byte) (int, error) {
	for len(p) > 0 {
		switch {
		case len(f.next) > 0:
			n := copy(p, f.next)
			f.next = f.next[n:]
			return n, nil
		case f.left > 0:
			n, err := f.r.Read(p[:min(int64(len(p)), f.left)])
			f.left -= int64(n)
			return n, cut(err)
		case f.step == stepEnd:
			return 0, io.EOF
		}
		if err := f.advance(); err != nil {
			return 0, cut(err)
		}
	}
	return 0, nil
}

func (f *frame) take(n int) error {
	f.next = make([]byte, n)
	_, err := io.ReadFull(f.r, f.next)
	return err
}

// advance reads the header of what comes next.
func (f *frame) advance() error {
	switch f.step {
	case stepBegin:
		b, err := f.r.Peek(5)
		if err != nil {
			return err
		}
		d := b[4]
		n := 5 + [4]int{0, 1, 2, 4}[d&3] + [4]int{0, 2, 4, 8}[d>>6]
		switch single := d>>5&1 == 1; {
		case !single, d>>6 == 0: // a window, or the one byte of a size
			n++
		}
		f.sum, f.step = d>>2&1 == 1, stepBlocks
		return f.take(n)
	case stepBlocks:
		if err := f.take(3); err != nil {
			return err
		}
		h := binary.LittleEndian.Uint32(append(f.next[:3:3], 0))
		switch h >> 1 & 3 {
		case 1: // one byte, repeated
			f.left = 1
		case 3:
			return errors.New("a zstd block of a type that is reserved")
		default:
			f.left = int64(h >> 3)
		}
		if h&1 == 1 {
			f.step = stepSum
		}
		return nil
	default:
		f.step = stepEnd
		if !f.sum {
			return nil
		}
		return f.take(4)
	}
}
