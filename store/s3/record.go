package s3

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/oklog/ulid/v2"

	"holdfast/disperse"
	"holdfast/store"
)

// Rows of the metadata, by the first byte of their keys. The format is in docs/formats/objects.md.
const (
	rowBucket = 'b' // NAME: bucket
	rowHold   = 'h' // BUCKET KEY VERSION: it is locked, and locations hold it
	rowUser   = 'i' // ACCESS: user
	rowNull   = 'n' // BUCKET KEY: where the null version of a key is, if it was written with versions suspended
	rowObject = 'o' // BUCKET KEY VERSION: object, the newest version of a key first
	rowPart   = 'p' // UPLOAD NUMBER: part
	rowTrash  = 't' // TIME: a row that was deleted
	rowUpload = 'u' // BUCKET KEY UPLOAD: upload
)

const (
	maxKey     = 1024
	maxPieces  = 1 << 20
	idSize     = 16
	bucketSize = 8
)

// bucketID names a bucket for its life: one that is made again under the same name is another.
type bucketID [bucketSize]byte

// uploadID is a UUID of version 7, so that uploads of a key come in the order in which they began.
type uploadID [idSize]byte

// A version is where among the versions of its key an object is. Zero is the place of what was written before the bucket
// had versions.
type version = ulid.ULID

// appendName appends a key so that names sort as their bytes do, and none is the beginning of another.
func appendName(b []byte, name string) []byte {
	for i := range len(name) {
		if b = append(b, name[i]); name[i] == 0 {
			b = append(b, 0xff)
		}
	}
	return b
}

func nameKey(row byte, id bucketID, name string) []byte {
	b := append(make([]byte, 0, 1+bucketSize+len(name)+2+idSize), row)
	return append(appendName(append(b, id[:]...), name), 0, 1)
}

func objectKey(id bucketID, name string, v version) []byte {
	return appendVersion(nameKey(rowObject, id, name), v)
}

// appendVersion puts the newest first.
func appendVersion(b []byte, v version) []byte {
	for _, c := range v {
		b = append(b, ^c)
	}
	return b
}

func uploadKey(id bucketID, name string, u uploadID) []byte {
	return append(nameKey(rowUpload, id, name), u[:]...)
}

func partKey(u uploadID, number uint16) []byte {
	return binary.BigEndian.AppendUint16(append([]byte{rowPart}, u[:]...), number)
}

// splitKey takes the key of an object or an upload apart.
func splitKey(key []byte) (name string, id [idSize]byte, err error) {
	end := len(key) - idSize - 2
	if end < 1+bucketSize || key[end] != 0 || key[end+1] != 1 {
		return "", id, errRow
	}
	b := make([]byte, 0, end)
	for i := 1 + bucketSize; i < end; i++ {
		if b = append(b, key[i]); key[i] == 0 {
			if i++; i == end || key[i] != 0xff {
				return "", id, errRow
			}
		}
	}
	return string(b), [idSize]byte(key[end+2:]), nil
}

func splitVersion(key []byte) (string, version, error) {
	name, v, err := splitKey(key)
	for i := range v {
		v[i] = ^v[i]
	}
	return name, version(v), err
}

// behind is the first key behind all that begin with p.
func behind(p []byte) []byte {
	p = slices.Clone(p)
	for i := len(p) - 1; i >= 0; i-- {
		if p[i]++; p[i] != 0 {
			return p[:i+1]
		}
	}
	return nil
}

var errRow = errors.New("metadata has a row that is not in its format")

// A row is fields: a number, a length, and as many bytes. Numbers that a reader does not know are an error; rowVersion
// comes first.
const rowVersion = 1

func appendField[T ~string | ~[]byte](b []byte, n byte, v T) []byte {
	if len(v) == 0 {
		return b
	}
	return append(binary.AppendUvarint(append(b, n), uint64(len(v))), v...)
}

func appendInt(b []byte, n byte, v int64) []byte {
	if v == 0 {
		return b
	}
	var x [binary.MaxVarintLen64]byte
	return appendField(b, n, x[:binary.PutVarint(x[:], v)])
}

func appendMap(b []byte, n byte, m map[string]string) []byte {
	for _, k := range slices.Sorted(maps.Keys(m)) {
		b = appendField(b, n, append(append(binary.AppendUvarint(nil, uint64(len(k))), k...), m[k]...))
	}
	return b
}

// fields calls f for each.
func fields(b []byte, f func(n byte, v []byte) error) error {
	if len(b) == 0 || b[0] != rowVersion {
		return errRow
	}
	for b = b[1:]; len(b) > 0; {
		size, n := binary.Uvarint(b[1:])
		if n <= 0 || size > uint64(len(b)-1-n) {
			return errRow
		}
		if err := f(b[0], b[1+n:1+n+int(size)]); err != nil {
			return fmt.Errorf("field %d: %w", b[0], err)
		}
		b = b[1+n+int(size):]
	}
	return nil
}

func toInt(v []byte) (int64, error) {
	x, n := binary.Varint(v)
	if n != len(v) {
		return 0, errRow
	}
	return x, nil
}

func toMap(m *map[string]string, v []byte) error {
	size, n := binary.Uvarint(v)
	if n <= 0 || size > uint64(len(v)-n) {
		return errRow
	}
	if *m == nil {
		*m = map[string]string{}
	}
	(*m)[string(v[n:n+int(size)])] = string(v[n+int(size):])
	return nil
}

func appendBody(b []byte, n byte, body store.Body) []byte {
	if len(body.Segments) == 0 {
		return b
	}
	v := make([]byte, 0, len(body.Segments)*(len(disperse.ID{})+4))
	for _, p := range body.Segments {
		v = binary.AppendUvarint(append(v, p.ID[:]...), uint64(p.Size))
	}
	return appendField(b, n, v)
}

func toBody(v []byte) (body store.Body, err error) {
	body.Segments = make([]store.Piece, 0, min(len(v)/17, maxPieces))
	for len(v) > 0 {
		var p store.Piece
		if len(v) < len(p.ID) || len(body.Segments) == maxPieces {
			return body, errRow
		}
		copy(p.ID[:], v)
		size, n := binary.Uvarint(v[len(p.ID):])
		if n <= 0 || size > disperse.MaxSegment {
			return body, errRow
		}
		p.Size = uint32(size)
		body.Size += int64(size)
		body.Segments = append(body.Segments, p)
		v = v[len(p.ID)+n:]
	}
	return body, nil
}

// bucket is a row. What S3 keeps as documents is kept as it came.
type bucket struct {
	id         bucketID
	created    time.Time
	versioning byte // "" until it was ever set
	acl        []byte
	policy     []byte
	cors       []byte
	website    []byte
	lock       []byte
	ownership  string
	tagged     bool // with no tags too
	tags       map[string]string
	class      string // of objects that do not say one
	lifecycle  []byte
}

const (
	unversioned = 0
	versioned   = 1
	suspended   = 2
)

func (k *bucket) encode() []byte {
	b := appendField([]byte{rowVersion}, 1, k.id[:])
	b = appendInt(b, 2, k.created.UnixNano())
	b = appendInt(b, 3, int64(k.versioning))
	b = appendField(b, 4, k.acl)
	b = appendField(b, 5, k.policy)
	b = appendField(b, 6, k.cors)
	b = appendField(b, 7, k.website)
	b = appendField(b, 8, k.lock)
	b = appendField(b, 9, k.ownership)
	if k.tagged {
		b = appendInt(b, 10, 1)
	}
	b = appendMap(b, 11, k.tags)
	b = appendField(b, 12, k.class)
	return appendField(b, 13, k.lifecycle)
}

func parseBucket(b []byte) (*bucket, error) {
	k := &bucket{}
	err := fields(b, func(n byte, v []byte) (err error) {
		var x int64
		switch n {
		case 1:
			if len(v) != bucketSize {
				return errRow
			}
			copy(k.id[:], v)
		case 2:
			x, err = toInt(v)
			k.created = time.Unix(0, x)
		case 3:
			x, err = toInt(v)
			k.versioning = byte(x)
		case 4:
			k.acl = slices.Clone(v)
		case 5:
			k.policy = slices.Clone(v)
		case 6:
			k.cors = slices.Clone(v)
		case 7:
			k.website = slices.Clone(v)
		case 8:
			k.lock = slices.Clone(v)
		case 9:
			k.ownership = string(v)
		case 10:
			k.tagged = true
		case 11:
			err = toMap(&k.tags, v)
		case 12:
			k.class = string(v)
		case 13:
			k.lifecycle = slices.Clone(v)
		default:
			return errRow
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("bucket: %w", err)
	}
	return k, nil
}

// checksum is what a client may ask to compare an object with.
type checksum struct {
	algorithm string // as S3 writes it: CRC64NVME
	composite bool   // of the parts' checksums
	value     string // in base64
}

// headers are what S3 keeps of an object and does not read.
type headers struct {
	contentType, encoding, disposition, language, cacheControl, expires, redirect string
	user                                                                          map[string]string
}

// object is a row: a version of an object, or a delete marker.
type object struct {
	at        version // not in the row: its key has it
	null      bool    // its version is called null
	marker    bool    // there is nothing
	size      int64
	modified  time.Time
	etag      string // without quotes
	sum       checksum
	headers   headers
	tags      map[string]string
	retention []byte // as versitygw writes it
	hold      byte
	class     string
	upload    string  // that it came from
	parts     []int64 // where each part ends, if it came in parts
	body      store.Body
}

const (
	holdOff = 1
	holdOn  = 2
)

func (h *headers) append(b []byte) []byte {
	b = appendField(b, 20, h.contentType)
	b = appendField(b, 21, h.encoding)
	b = appendField(b, 22, h.disposition)
	b = appendField(b, 23, h.language)
	b = appendField(b, 24, h.cacheControl)
	b = appendField(b, 25, h.expires)
	b = appendField(b, 26, h.redirect)
	return appendMap(b, 27, h.user)
}

func (h *headers) set(n byte, v []byte) error {
	switch n {
	case 20:
		h.contentType = string(v)
	case 21:
		h.encoding = string(v)
	case 22:
		h.disposition = string(v)
	case 23:
		h.language = string(v)
	case 24:
		h.cacheControl = string(v)
	case 25:
		h.expires = string(v)
	case 26:
		h.redirect = string(v)
	case 27:
		return toMap(&h.user, v)
	default:
		return errRow
	}
	return nil
}

func (c *checksum) append(b []byte) []byte {
	b = appendField(b, 30, c.algorithm)
	if c.composite {
		b = appendInt(b, 31, 1)
	}
	return appendField(b, 32, c.value)
}

func (c *checksum) set(n byte, v []byte) error {
	switch n {
	case 30:
		c.algorithm = string(v)
	case 31:
		c.composite = true
	case 32:
		c.value = string(v)
	default:
		return errRow
	}
	return nil
}

func (o *object) encode() []byte {
	b := make([]byte, 1, 192+len(o.body.Segments)*20)
	b[0] = rowVersion
	flags := int64(0)
	if o.null {
		flags |= 1
	}
	if o.marker {
		flags |= 2
	}
	b = appendInt(b, 1, flags)
	b = appendInt(b, 2, o.modified.UnixNano())
	b = appendField(b, 3, o.etag)
	b = appendMap(b, 4, o.tags)
	b = appendField(b, 5, o.retention)
	b = appendInt(b, 6, int64(o.hold))
	b = appendField(b, 7, o.class)
	b = appendField(b, 8, o.upload)
	if len(o.parts) > 0 {
		var v []byte
		for _, p := range o.parts {
			v = binary.AppendUvarint(v, uint64(p))
		}
		b = appendField(b, 9, v)
	}
	b = appendBody(b, 10, o.body)
	return o.sum.append(o.headers.append(b))
}

func parseObject(b []byte, at version) (*object, error) {
	o := &object{at: at}
	err := fields(b, func(n byte, v []byte) (err error) {
		var x int64
		switch {
		case n == 1:
			x, err = toInt(v)
			o.null, o.marker = x&1 != 0, x&2 != 0
		case n == 2:
			x, err = toInt(v)
			o.modified = time.Unix(0, x)
		case n == 3:
			o.etag = string(v)
		case n == 4:
			err = toMap(&o.tags, v)
		case n == 5:
			o.retention = slices.Clone(v)
		case n == 6:
			x, err = toInt(v)
			o.hold = byte(x)
		case n == 7:
			o.class = string(v)
		case n == 8:
			o.upload = string(v)
		case n == 9:
			for len(v) > 0 {
				p, size := binary.Uvarint(v)
				if size <= 0 {
					return errRow
				}
				o.parts, v = append(o.parts, int64(p)), v[size:]
			}
		case n == 10:
			o.body, err = toBody(v)
			o.size = o.body.Size
		case n >= 20 && n < 30:
			err = o.headers.set(n, v)
		default:
			err = o.sum.set(n, v)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("object: %w", err)
	}
	return o, nil
}

// id is what clients call the version.
func (o *object) id() string {
	if o.null || o.at == (version{}) {
		return nullVersion
	}
	return o.at.String()
}

const nullVersion = "null"

// part is a row: a part of an upload.
type part struct {
	size     int64
	modified time.Time
	etag     string
	sum      checksum // of the upload's algorithm, if it has one
	crc64    string   // otherwise, from which the whole object's is made
	body     store.Body
}

func (p *part) encode() []byte {
	b := appendInt([]byte{rowVersion}, 2, p.modified.UnixNano())
	b = appendField(b, 3, p.etag)
	b = appendField(b, 4, p.crc64)
	return p.sum.append(appendBody(b, 10, p.body))
}

func parsePart(b []byte) (*part, error) {
	p := &part{}
	err := fields(b, func(n byte, v []byte) (err error) {
		var x int64
		switch n {
		case 2:
			x, err = toInt(v)
			p.modified = time.Unix(0, x)
		case 3:
			p.etag = string(v)
		case 4:
			p.crc64 = string(v)
		case 10:
			p.body, err = toBody(v)
			p.size = p.body.Size
		default:
			err = p.sum.set(n, v)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("part: %w", err)
	}
	return p, nil
}
