package location

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"
)

// The log is a row of append-only segments. Every change of a directory is a record in it; small shards are bodies of
// their records. Whatever is known is what the records say, applied in order.

const (
	logMagic     = "holdfast-shards\x01"
	segmentHead  = 32 // magic and salt
	recordHead   = 96
	recordAlign  = 8
	maxBatch     = 1 << 20 // bytes of one write, if it has more than one record
	headroom     = 1 << 20 // kept allocated for records that are no shards, so that deletes work on a full disk
	allocateStep = 4 << 20
)

// Kinds of records.
const (
	kindShard   = 1 + iota // body: the shard
	kindFile               // the shard is in a file of its own
	kindState              // a shard was deleted, undeleted or locked
	kindGone               // a shard was removed
	kindHead               // body: epoch, sequence, bytes
	kindEpoch              // body: holder
	kindTime               // a sign that time has passed
	kindEarlier            // body: as of kindHead; deleted: when it was replaced
	kindEnd
)

// record is the fixed part of a record.
type record struct {
	kind    byte
	joined  bool   // the record before it is of the same batch
	size    uint32 // of the body, or of the shard in the file
	crc     uint32 // CRC-32C of the body
	time    int64  // when it was written; all times are milliseconds since 1970
	put     int64  // when the shard came
	retain  int64
	deleted int64
	epoch   Epoch // the highest that was known
	file    uint64
	name    Name
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func checksum(b []byte) uint32 { return crc32.Checksum(b, castagnoli) }

func (r *record) body() int64 {
	if r.kind == kindFile {
		return 0
	}
	return int64(r.size)
}

// length is what the record takes in the log.
func (r *record) length() int64 {
	return (recordHead + r.body() + recordAlign - 1) &^ (recordAlign - 1)
}

// write writes the fixed part. The checksum begins with the segment's salt, which no store knows: a body is never taken for
// a record.
func (r *record) write(salt uint32, b []byte) {
	clear(b[:recordHead])
	b[4] = r.kind
	if r.joined {
		b[5] = 1
	}
	be := binary.BigEndian
	be.PutUint32(b[8:], r.size)
	be.PutUint32(b[12:], r.crc)
	be.PutUint64(b[16:], uint64(r.time))
	be.PutUint64(b[24:], uint64(r.retain))
	be.PutUint64(b[32:], uint64(r.deleted))
	be.PutUint64(b[40:], uint64(r.epoch))
	be.PutUint64(b[48:], r.file)
	be.PutUint64(b[56:], uint64(r.put))
	copy(b[64:], r.name[:])
	be.PutUint32(b, crc32.Update(salt, castagnoli, b[4:recordHead]))
}

// parseRecord reads what write wrote.
func parseRecord(salt uint32, b []byte) (r record, ok bool) {
	be := binary.BigEndian
	if len(b) < recordHead || be.Uint32(b) != crc32.Update(salt, castagnoli, b[4:recordHead]) {
		return r, false
	}
	r = record{
		kind: b[4], joined: b[5] == 1, size: be.Uint32(b[8:]), crc: be.Uint32(b[12:]), time: int64(be.Uint64(b[16:])), retain: int64(be.Uint64(b[24:])),
		deleted: int64(be.Uint64(b[32:])), epoch: Epoch(be.Uint64(b[40:])), file: be.Uint64(b[48:]), put: int64(be.Uint64(b[56:])), name: Name(b[64:96]),
	}
	limit := uint32(0)
	switch r.kind {
	case kindShard:
		limit = embedLimit
	case kindFile:
		limit = MaxShard
	case kindHead, kindEarlier:
		limit = headFixed + MaxHead
	case kindEpoch:
		limit = uint32(len(Holder{}))
	}
	return r, r.kind > 0 && r.kind < kindEnd && b[5] <= 1 && b[6]|b[7] == 0 && r.size <= limit
}

// position is where a record is: the segment and the offset in it.
type position uint64

func at(seg uint32, off int64) position { return position(seg)<<32 | position(off) }
func (p position) segment() uint32      { return uint32(p >> 32) }
func (p position) offset() int64        { return int64(uint32(p)) }

// segment is one file of the log.
type segment struct {
	id   uint32
	salt uint32
	f    *os.File
	size int64 // where the next record goes
	// dead is bytes of records that say nothing any more; soft those of records that may, which only compaction finds out.
	dead, soft int64
	allocated  int64

	mu   sync.RWMutex // held by readers of bodies
	gone bool         // guarded by mu
}

func segmentPath(dir string, id uint32) string {
	return filepath.Join(dir, "log", fmt.Sprintf("%08x", id))
}

// newSegment makes an empty segment that survives a crash, with room for a batch and the headroom.
func newSegment(dir string, id uint32) (*segment, error) {
	f, err := os.OpenFile(segmentPath(dir, id), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	b := make([]byte, segmentHead)
	copy(b, logMagic)
	rand.Read(b[16:])
	s := &segment{id: id, salt: checksum(b[16:]), f: f, size: segmentHead}
	err = s.room()
	if err == nil {
		_, err = f.WriteAt(b, 0)
	}
	if err := errors.Join(err, datasync(f), syncDir(filepath.Join(dir, "log"))); err != nil {
		f.Close()
		os.Remove(f.Name())
		return nil, err
	}
	return s, nil
}

// openSegment opens a segment. One whose beginning is not whole was never written to: nil.
func openSegment(dir string, id uint32) (*segment, error) {
	f, err := os.OpenFile(segmentPath(dir, id), os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	b := make([]byte, segmentHead)
	if _, err := f.ReadAt(b, 0); errors.Is(err, io.EOF) {
		return nil, f.Close()
	} else if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	if string(b[:16]) != logMagic {
		return nil, errors.Join(fmt.Errorf("%s: not a log of shards of version %d", f.Name(), logMagic[15]), f.Close())
	}
	st, err := f.Stat()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &segment{id: id, salt: checksum(b[16:]), f: f, size: st.Size()}, nil
}

// room sees to it that a batch fits and leaves the headroom.
func (s *segment) room() error {
	want := s.size + maxBatch + embedLimit + headroom
	if s.allocated >= want {
		return nil
	}
	from := max(s.allocated, s.size)
	err := syscall.Fallocate(int(s.f.Fd()), 1 /* keep the size */, from, want+allocateStep-from)
	if err == nil {
		s.allocated = want + allocateStep
		return nil
	}
	if err = syscall.Fallocate(int(s.f.Fd()), 1, from, want-from); err == nil || errors.Is(err, syscall.EOPNOTSUPP) {
		s.allocated = want
		return nil
	}
	return err
}

// each calls f for the records of a segment in order, without their bodies. A part that is no record is skipped up to the
// next one; end is behind the last. It never believes a length that a checksum does not cover.
func (s *segment) each(f func(r record, off int64) error) (end, skipped int64, err error) {
	window := make([]byte, 16<<10)
	have, base := 0, int64(0)
	load := func(off int64, n int) ([]byte, error) {
		if off < base || off+int64(n) > base+int64(have) {
			m, err := s.f.ReadAt(window[:min(int64(len(window)), s.size-off)], off)
			if err != nil && !errors.Is(err, io.EOF) {
				return nil, err
			}
			base, have = off, m
			n = min(n, m)
		}
		return window[off-base:][:n], nil
	}
	end = segmentHead
	for off := int64(segmentHead); off+recordHead <= s.size; {
		b, err := load(off, recordHead)
		if err != nil {
			return end, skipped, fmt.Errorf("read log %s: %w", s.f.Name(), err)
		}
		r, ok := parseRecord(s.salt, b)
		if !ok || off+recordHead+r.body() > s.size {
			off += recordAlign
			continue
		}
		if err := f(r, off); err != nil {
			return end, skipped, err
		}
		skipped += off - end
		off += r.length()
		end = off
	}
	return end, skipped, nil
}

// read reads the body of the record at off into p and checks it.
func (s *segment) read(off int64, p []byte, crc uint32) error {
	if _, err := s.f.ReadAt(p, off+recordHead); err != nil && !errors.Is(err, io.EOF) {
		return err
	} else if err != nil || checksum(p) != crc {
		return ErrRotten
	}
	return nil
}

func datasync(f *os.File) error {
	for {
		if err := syscall.Fdatasync(int(f.Fd())); !errors.Is(err, syscall.EINTR) {
			return err
		}
	}
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

func isFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

// readDir is the names in a directory; none if it is not there.
func readDir(dir string) ([]string, error) {
	f, err := os.Open(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	defer f.Close()
	return f.Readdirnames(-1)
}
