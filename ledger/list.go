package ledger

import (
	"encoding/binary"
	"errors"
	"fmt"

	"holdfast/internal/canonical"
)

// Bounds of a list: what users can make it grow to. Package canonical reads no more entries, and a reader takes no larger
// record: a list beyond either would be one that nobody can read.
const (
	maxList      = 1 << 16
	maxListBytes = maxRecord
)

// ErrFull is returned when a list has no room for one more.
var ErrFull = errors.New("no room for one more")

// list reads a list, empty when absent. One that cannot be read is an error: taken for empty it would be written anew, and
// what everybody had in it would be gone.
func list[T any](s *State, key string) ([]T, error) {
	v, err := get[[]T](s, key)
	if errors.Is(err, ErrAbsent) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list %q: %w", key, err)
	}
	return *v, nil
}

// Lists of the whole grid are long and change with many transactions. push and drop work on the encoding, so that a change
// costs a copy and a hash; they write what canonical would. Elements are byte strings, texts and unsigned integers.

// push appends to a list.
func push[T any](b *batch, key string, vs ...T) error {
	n, body, err := items(&b.State, key)
	if err != nil {
		return err
	}
	if n+len(vs) > maxList {
		return fmt.Errorf("list %q of %d entries: %w", key, n, ErrFull)
	}
	out := head(n + len(vs))
	out = append(out, body...)
	for i := range vs {
		out = append(out, canonical.Encode(&vs[i])...)
	}
	if len(out) > maxListBytes {
		return fmt.Errorf("list %q of %d bytes: %w", key, len(body), ErrFull)
	}
	b.tree = b.tree.put(key, out)
	return nil
}

// drop takes entries out of a list, each where it is first. An empty list stays, as an empty one.
func drop[T any](b *batch, key string, vs ...T) error {
	n, body, err := items(&b.State, key)
	if err != nil {
		return err
	}
	gone := make(map[string]bool, len(vs))
	for i := range vs {
		gone[string(canonical.Encode(&vs[i]))] = true
	}
	kept := make([]byte, 0, len(body))
	left := n
	for rest := body; len(rest) > 0; {
		size, err := itemSize(rest)
		if err != nil {
			return fmt.Errorf("list %q: %w", key, err)
		}
		if gone[string(rest[:size])] {
			delete(gone, string(rest[:size]))
			left--
		} else {
			kept = append(kept, rest[:size]...)
		}
		rest = rest[size:]
	}
	if left == n {
		return nil
	}
	b.tree = b.tree.put(key, append(head(left), kept...))
	return nil
}

// items is a list's count and the encodings of its entries, one after the other.
func items(s *State, key string) (int, []byte, error) {
	raw, ok := s.tree.get(key)
	if !ok {
		return 0, nil, nil
	}
	major, n, size, err := cborHead(raw)
	if err != nil || major != 4 || n > maxList || len(raw) > maxRecord {
		return 0, nil, fmt.Errorf("list %q of %d bytes cannot be read", key, len(raw))
	}
	return int(n), raw[size:], nil
}

var errCBOR = errors.New("entry cannot be read")

func itemSize(b []byte) (int, error) {
	major, n, size, err := cborHead(b)
	switch {
	case err != nil:
		return 0, err
	case major == 0:
		return size, nil
	case (major == 2 || major == 3) && n <= uint64(len(b)-size):
		return size + int(n), nil
	}
	return 0, errCBOR
}

// cborHead reads an item's major type and argument, and how long both are (RFC 8949, section 3).
func cborHead(b []byte) (major byte, n uint64, size int, err error) {
	if len(b) == 0 {
		return 0, 0, 0, errCBOR
	}
	major, low := b[0]>>5, b[0]&31
	if low < 24 {
		return major, uint64(low), 1, nil
	}
	if low > 27 {
		return 0, 0, 0, errCBOR
	}
	size = 1 << (low - 24)
	if len(b) < 1+size {
		return 0, 0, 0, errCBOR
	}
	var be [8]byte
	copy(be[8-size:], b[1:1+size])
	return major, binary.BigEndian.Uint64(be[:]), 1 + size, nil
}

// head is the head of a list of n entries.
func head(n int) []byte {
	switch {
	case n < 24:
		return []byte{0x80 | byte(n)}
	case n < 1<<8:
		return []byte{0x98, byte(n)}
	case n < 1<<16:
		return binary.BigEndian.AppendUint16([]byte{0x99}, uint16(n))
	}
	return binary.BigEndian.AppendUint32([]byte{0x9a}, uint32(n))
}
