// Package seal encrypts a stream of any length under a key that is used for this one stream: the STREAM construction
// (Hoang, Reyhanitabar, Rogaway, Vizár: Online Authenticated-Encryption and its Nonce-Reuse Misuse-Resistance, CRYPTO
// 2015) over AES-256-GCM. A reader notices every change, also of the order of chunks and of the end.
//
//	"HFSEAL1\n"                   8 bytes
//	chunk 0, chunk 1, …           each 65536 bytes of plaintext and 16 of tag; the last 0 to 65536 bytes and 16
//
// The nonce of a chunk is 7 zero bytes, its number as 4 big-endian bytes, and 1 for the last chunk, 0 for the others. Since
// the nonces repeat with each stream, a key must never seal two. BlobKey makes such keys.
package seal

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
)

const (
	chunk = 64 << 10
	tag   = 16
)

var magic = []byte("HFSEAL1\n")

// ErrSealed is returned for bytes that are not what was sealed under the key.
var ErrSealed = errors.New("sealed bytes do not open")

// BlobKey is the key of the blob with that digest, for the holder of secret: the same blob is always sealed to the same
// bytes by the same holder, who finds it again, and by nobody else.
func BlobKey(secret [32]byte, digest string) [32]byte {
	b, err := hkdf.Key(sha256.New, secret[:], nil, "holdfast/blob/v1"+digest, 32)
	if err != nil {
		panic(err) // 32 bytes are always within HKDF's limit
	}
	return [32]byte(b)
}

// Size is how many bytes n bytes are sealed to.
func Size(n int64) int64 {
	chunks := max((n+chunk-1)/chunk, 1)
	return int64(len(magic)) + n + chunks*tag
}

func aead(key [32]byte) (cipher.AEAD, error) {
	b, err := aes.NewCipher(key[:])
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(b)
}

func nonce(n uint32, last bool) []byte {
	b := make([]byte, 12)
	binary.BigEndian.PutUint32(b[7:], n)
	if last {
		b[11] = 1
	}
	return b
}

type writer struct {
	w    io.Writer
	a    cipher.AEAD
	n    uint32
	buf  []byte // plaintext that waits: the last chunk is known only at Close
	out  []byte
	err  error
	done bool
}

// NewWriter seals what is written to it into w. Close writes the end; without it the stream does not open.
func NewWriter(w io.Writer, key [32]byte) (io.WriteCloser, error) {
	a, err := aead(key)
	if err != nil {
		return nil, err
	}
	if _, err := w.Write(magic); err != nil {
		return nil, err
	}
	return &writer{w: w, a: a, buf: make([]byte, 0, chunk), out: make([]byte, 0, chunk+tag)}, nil
}

func (s *writer) Write(p []byte) (int, error) {
	if s.err != nil {
		return 0, s.err
	}
	if s.done {
		return 0, errors.New("seal: write after close")
	}
	total := len(p)
	for len(p) > 0 {
		if len(s.buf) == chunk {
			if s.err = s.flush(false); s.err != nil {
				return total - len(p), s.err
			}
		}
		n := min(chunk-len(s.buf), len(p))
		s.buf, p = append(s.buf, p[:n]...), p[n:]
	}
	return total, nil
}

func (s *writer) flush(last bool) error {
	if s.n == math.MaxUint32 {
		return errors.New("seal: stream is too long")
	}
	s.out = s.a.Seal(s.out[:0], nonce(s.n, last), s.buf, nil)
	s.n++
	s.buf = s.buf[:0]
	_, err := s.w.Write(s.out)
	return err
}

// Close writes the last chunk. It does not close the underlying writer.
func (s *writer) Close() error {
	if s.err != nil || s.done {
		return s.err
	}
	s.done = true
	s.err = s.flush(true)
	return s.err
}

type reader struct {
	r    io.Reader
	a    cipher.AEAD
	n    uint32
	buf  []byte // one chunk and a byte of the next, which tells that this one is not the last
	have int
	out  []byte
	end  bool
	err  error
}

// NewReader opens what NewWriter sealed. Nothing is returned before its chunk was verified; whoever uses the beginning
// before the end has come must not mind that the end may be missing.
func NewReader(r io.Reader, key [32]byte) (io.Reader, error) {
	a, err := aead(key)
	if err != nil {
		return nil, err
	}
	head := make([]byte, len(magic))
	if _, err := io.ReadFull(r, head); err != nil || !bytes.Equal(head, magic) {
		return nil, fmt.Errorf("%w: no sealed stream", ErrSealed)
	}
	return &reader{r: r, a: a, buf: make([]byte, chunk+tag+1)}, nil
}

func (s *reader) Read(p []byte) (int, error) {
	for len(s.out) == 0 {
		if s.err != nil {
			return 0, s.err
		}
		if s.end {
			return 0, io.EOF
		}
		s.err = s.next()
	}
	n := copy(p, s.out)
	s.out = s.out[n:]
	return n, nil
}

func (s *reader) next() error {
	n, err := io.ReadFull(s.r, s.buf[s.have:])
	s.have += n
	last := errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
	if err != nil && !last {
		return err
	}
	size := min(s.have, chunk+tag)
	// In place: the plaintext lies at the front and the byte of the next chunk behind it stays.
	out, err := s.a.Open(s.buf[:0], nonce(s.n, last), s.buf[:size], nil)
	if err != nil {
		return fmt.Errorf("%w: chunk %d", ErrSealed, s.n)
	}
	if last && len(out) == 0 && s.n > 0 {
		return fmt.Errorf("%w: empty last chunk", ErrSealed)
	}
	s.out, s.end = out, last
	s.n++
	if !last {
		s.out = bytes.Clone(out) // the next call reads over the buffer
		s.buf[0], s.have = s.buf[size], 1
	}
	return nil
}
