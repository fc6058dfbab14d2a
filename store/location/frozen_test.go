package location

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// What is on disks and on the wire, byte by byte, as docs/formats/location.md has it.
func TestFormatsAreFrozen(t *testing.T) {
	name := Name{0: 0xaa, 31: 0xbb}
	const nameHex = "aa000000000000000000000000000000000000000000000000000000000000bb"
	r := record{
		kind: kindShard, joined: true, size: 5, crc: 0x01020304, time: 0x11, put: 0x22, retain: 0x33, deleted: 0x44, epoch: 0x55, file: 0x66, name: name,
	}
	p := make([]byte, recordHead)
	r.write(0xdeadbeef, p)
	req := make([]byte, requestSize)
	(&request{op: opAppend, size: 7, front: front{0x55, Holder{0: 0xcc, 15: 0xdd}}, a: 0x66, b: 0x77, name: name}).put(req)
	fr := make([]byte, frameSize)
	frame{status: 9, more: false, size: 3, value: 4}.put(fr)
	more := make([]byte, frameSize)
	frame{more: true, size: 3}.put(more)
	at := time.UnixMilli(0x0102)
	for _, c := range []struct {
		what string
		got  []byte
		want string
	}{
		{"record", p, "72676600" + "01" + "01" + "0000" + "00000005" + "01020304" + "0000000000000011" + "0000000000000033" + "0000000000000044" +
			"0000000000000055" + "0000000000000066" + "0000000000000022" + nameHex},
		{"head's body", headBody(1, 2, []byte("h")), "0000000000000001" + "0000000000000002" + "68"},
		{"request", req, "0e" + "000000" + "00000007" + "0000000000000055" + "0000000000000066" + "0000000000000077" + nameHex + "cc0000000000000000000000000000dd"},
		{"last frame", fr, "09" + "00" + "0000" + "00000003" + "0000000000000004"},
		{"frame", more, "00" + "01" + "0000" + "00000003" + "0000000000000000"},
		{"info", appendInfo(nil, Info{name, 5, at, time.Time{}, at, true}), nameHex + "0000000000000005" + "0000000000000102" + "0000000000000000" + "0000000000000102" + "01"},
		{"proof", appendProof(nil, Proof{5, []Leaf{{[]byte("da"), []byte("pat")}}}), "0002" + "0003" + "6461" + "706174"},
		{"heads", appendHeads(nil, []Head{{1, 2, []byte("h")}}), "0000000000000001" + "0000000000000002" + "0001" + "68"},
		{"status", appendStatus(nil, Status{1, 2, 3, 4, 5, Quota{6, 7}, 8 * time.Millisecond, at, time.Time{}}),
			"0000000000000001" + "0000000000000002" + "0000000000000003" + "0000000000000004" + "0000000000000005" + "0000000000000006" + "0000000000000007" +
				"0000000000000008" + "0000000000000102" + "0000000000000000"},
	} {
		if got := hex.EncodeToString(c.got); got != c.want {
			t.Errorf("%s is\n%s, was\n%s", c.what, got, c.want)
		}
	}
	for i, want := range []error{ErrAbsent, ErrName, ErrSize, ErrRotten, ErrLocked, ErrFull, ErrQuota, ErrFenced, ErrEpoch, ErrOldHead, ErrRights, ErrBusy, ErrBroken} {
		if err := failureOf(byte(i+1), nil); !errors.Is(err, want) {
			t.Errorf("error %d is %v, was %v", i+1, err, want)
		}
	}
	for i, o := range []op{opAnnounce, opPut, opGet, opStat, opList, opDelete, opUndelete, opPurge, opRetain, opPutHead, opHead, opProve, opStatus, opAppend, opEarlier} {
		if int(o) != i+1 {
			t.Errorf("operation %d is %d", i+1, o)
		}
	}
}

// A directory of an earlier version of the program is read: the log and the file below are what this one wrote when the format
// was frozen, with a salt of zeros.
func TestADirectoryOfTheFrozenFormatIsRead(t *testing.T) {
	path := t.TempDir()
	clock := newClock()
	small, b := shardSeeded(1, 100)
	large, c := shardSeeded(2, 70_000)
	gone, e := shardSeeded(3, 50)
	d := open(t, Config{Path: path, Now: clock.Now})
	// The salt is the only thing in it that is random.
	s := d.current
	_, err := s.f.WriteAt(make([]byte, 16), 16)
	good(t, "salt", err)
	s.salt = checksum(make([]byte, 16))
	a := announced(t, d.As(everything), 7)
	good(t, "put", a.Append(t.Context(), small, b, 1, []byte("one")))
	good(t, "put", a.Put(t.Context(), large, c, clock.Now().Add(time.Hour)))
	good(t, "put", a.Put(t.Context(), gone, e, time.Time{}))
	good(t, "delete", a.Delete(t.Context(), gone))
	good(t, "purge", a.Purge(t.Context(), gone))
	good(t, "head", announced(t, d.As(everything), 8).PutHead(t.Context(), 1, []byte("two")))
	end := s.size
	good(t, "close", d.Close())
	log, err := os.ReadFile(segmentPath(path, 1))
	good(t, "read", err)
	file, err := os.ReadFile(filepath.Join(path, "files", "00000000", "0000000000000001"))
	good(t, "read", err)
	for what, x := range map[string]struct {
		b    []byte
		want string
	}{
		"log":  {log[:end], "edfc90c0935464d87929c276725d88798af1ccfe28d83d8b4d9a72f914cac130"},
		"file": {file, "2a194a8034a69f1d34723db951eead988767c51171ebe8190e219fdcd8786ab6"},
	} {
		if sum := sha256.Sum256(x.b); fmt.Sprintf("%x", sum) != x.want {
			t.Errorf("%s of %d bytes is %x, was %s", what, len(x.b), sum, x.want)
		}
	}
	d = open(t, Config{Path: path, Now: clock.Now})
	defer d.Close()
	l := d.As(everything)
	has(t, l, small, b)
	has(t, l, large, c)
	if _, err := l.Stat(t.Context(), gone); !errors.Is(err, ErrAbsent) {
		t.Error(err)
	}
	if h, err := l.Head(t.Context()); err != nil || h.Epoch != 8 || !bytes.Equal(h.Bytes, []byte("two")) {
		t.Errorf("%+v, %v", h, err)
	}
	if all, err := l.Earlier(t.Context()); err != nil || len(all) != 1 || string(all[0].Bytes) != "one" {
		t.Errorf("%+v, %v", all, err)
	}
}
