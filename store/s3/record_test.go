package s3

import (
	"bytes"
	"encoding/hex"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"holdfast/disperse"
	"holdfast/store"
)

func anObject() *object {
	return &object{
		null: true, modified: time.Unix(1700000000, 5), etag: "d41d8cd98f00b204e9800998ecf8427e-2", sum: checksum{"CRC64NVME", true, "AAAAAAAAAAA="},
		headers: headers{"text/plain", "gzip", "inline", "de", "no-store", "never", "/there", map[string]string{"a": "1", "b": ""}}, tags: map[string]string{"t": "v"},
		retention: []byte("{}"), hold: holdOn, class: "SHAMIR", upload: "u", parts: []int64{5, 300}, size: 300,
		body: store.Body{Size: 300, Segments: []store.Piece{{ID: disperse.ID{1, 2}, Size: 5}, {ID: disperse.ID{3}, Size: 295}}},
	}
}

func aBucket() *bucket {
	return &bucket{id: bucketID{1, 2, 3}, created: time.Unix(1600000000, 7), versioning: suspended, acl: []byte("a"), policy: []byte("p"), cors: []byte("c"), website: []byte("w"), lock: []byte("l"), ownership: "o", tagged: true, tags: map[string]string{"x": "y"}, class: "16/20"}
}

func aPart() *part {
	return &part{size: 9, modified: time.Unix(1, 0), etag: "00ff", sum: checksum{algorithm: "SHA256", value: "x"}, crc64: "y", body: store.Body{Size: 9, Segments: []store.Piece{{ID: disperse.ID{9}, Size: 9}}}}
}

// TestRowsAreFrozen holds rows to their bytes: an upgrade reads what was written before.
func TestRowsAreFrozen(t *testing.T) {
	for _, c := range []struct {
		name      string
		row, want string
		back      any
		parse     func([]byte) (any, error)
	}{
		{"object", hex.EncodeToString(anObject().encode()), "0101010202098a80d0e2c6bfce972f032264343164386364393866303062323034653938303039393865636638343237652d32040301747605027b7d06010407065348414d4952080175090305ac020a23010200000000000000000000000000000503000000000000000000000000000000a702140a746578742f706c61696e1504677a69701606696e6c696e651702646518086e6f2d73746f726519056e657665721a062f74686572651b030161311b0201621e0943524336344e564d451f0102200c41414141414141414141413d", anObject(), func(b []byte) (any, error) { return parseObject(b, version{}) }},
		{"bucket", hex.EncodeToString(aBucket().encode()), "010108010203000000000002098e80808abbe1abb42c03010404016105017006016307017708016c09016f0a01020b030178790c0531362f3230", aBucket(), func(b []byte) (any, error) { return parseBucket(b) }},
		{"bucket with rules", hex.EncodeToString((&bucket{id: bucketID{1}, lifecycle: []byte("<x/>")}).encode()), "0101080100000000000000020affffafae9885fecdbc010d043c782f3e", nil, nil},
		{"key of a hold", hex.EncodeToString(holdKey(bucketID{1}, "k", version{1})), "6801000000000000006b0001feffffffffffffffffffffffffffffff", nil, nil},
		{"key in the trash, without its random end", hex.EncodeToString(trashKey(time.UnixMilli(258))), "740000000000000102", nil, nil},
		{"part", hex.EncodeToString(aPart().encode()), "01020580a8d6b9070304303066660401790a1109000000000000000000000000000000091e06534841323536200178", aPart(), func(b []byte) (any, error) { return parsePart(b) }},
		{"key of an object", hex.EncodeToString(objectKey(bucketID{1}, "a\x00b", version{1})), "6f01000000000000006100ff620001feffffffffffffffffffffffffffffff", nil, nil},
		{"key of an upload", hex.EncodeToString(uploadKey(bucketID{1}, "k", uploadID{2})), "7501000000000000006b000102000000000000000000000000000000", nil, nil},
		{"key of a part", hex.EncodeToString(partKey(uploadID{2}, 258)), "70020000000000000000000000000000000102", nil, nil},
	} {
		if c.row != c.want {
			t.Errorf("%s:\n%s, want\n%s", c.name, c.row, c.want)
		}
		if c.parse == nil {
			continue
		}
		b, _ := hex.DecodeString(c.row)
		got, err := c.parse(b)
		if err != nil || !reflect.DeepEqual(got, c.back) {
			t.Errorf("%s comes back as %+v, %v", c.name, got, err)
		}
		for i := range b { // every beginning is refused, or is a row with fewer fields
			c.parse(b[:i])
		}
	}
}

func TestNamesSortAsTheirBytesDo(t *testing.T) {
	names := []string{"\x00", "\x00\x00", "\x00\x01", "\x00\xff", "a", "a\x00", "a\x00\x00", "a\x00\x01", "a\x00b", "a\x01", "a/", "a/b", "aa", "\xff", "ü", strings.Repeat("z", maxKey)}
	slices.Sort(names)
	var last []byte
	for i, n := range names {
		k := objectKey(bucketID{}, n, version{})
		if bytes.Compare(last, k) >= 0 {
			t.Errorf("%q is not behind %q", n, names[i-1])
		}
		last = k
		if got, v, err := splitVersion(k); got != n || v != (version{}) || err != nil {
			t.Errorf("%q comes back as %q %v %v", n, got, v, err)
		}
		for _, m := range names {
			if m != n && bytes.HasPrefix(objectKey(bucketID{}, m, version{}), nameKey(rowObject, bucketID{}, n)) {
				t.Errorf("rows of %q look like %q's", m, n)
			}
		}
	}
}

// FuzzRow parses rows that nobody wrote: an error, never a panic, and memory within a small multiple of the row's.
func FuzzRow(f *testing.F) {
	f.Add(anObject().encode())
	f.Add(aBucket().encode())
	f.Add(aPart().encode())
	f.Add([]byte{1, 10, 255, 255, 255, 255, 255, 255, 255, 255, 255, 1})
	f.Fuzz(func(t *testing.T, b []byte) {
		if o, err := parseObject(b, version{}); err == nil {
			again, err := parseObject(o.encode(), version{})
			if err != nil || !reflect.DeepEqual(again, o) && len(o.headers.user)+len(o.tags) == 0 && !slices.Contains(o.parts, 0) && o.retention != nil {
				t.Fatalf("%+v comes back as %+v, %v", o, again, err)
			}
		}
		parseBucket(b)
		parsePart(b)
		if name, id, err := splitKey(b); err == nil && !bytes.Equal(uploadKey(bucketID(b[1:9]), name, id)[1:], b[1:]) {
			t.Fatalf("key %x comes back otherwise", b)
		}
	})
}
