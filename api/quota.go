package api

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"sync"

	"holdfast/identity"
	"holdfast/store"
)

// Quota bounds what a validator stores. Whoever stores a blob first pays for it; nobody pays for one that is there. An
// account costs nothing, so the bound of the store is what protects the disk, and the part of it that is kept for the
// grid's own account is what lets its operator go on.
type Quota struct {
	AccountBytes int64 `json:"accountBytes,omitempty"` // of one account's blobs, beside the grid's; 0 means 16 GiB
	AccountBlobs int   `json:"accountBlobs,omitempty"` // how many; 0 means 4096
	Bytes        int64 `json:"bytes,omitempty"`        // of all blobs, a sixteenth of it for the grid's account alone; 0 means 256 GiB
	Blobs        int   `json:"blobs,omitempty"`        // how many, in the same way; 0 means 262144
}

func (q Quota) filled() Quota {
	d := Quota{AccountBytes: 16 << 30, AccountBlobs: 4096, Bytes: 256 << 30, Blobs: 1 << 18}
	if q.AccountBytes <= 0 {
		q.AccountBytes = d.AccountBytes
	}
	if q.AccountBlobs <= 0 {
		q.AccountBlobs = d.AccountBlobs
	}
	if q.Bytes <= 0 {
		q.Bytes = d.Bytes
	}
	if q.Blobs <= 0 {
		q.Blobs = d.Blobs
	}
	return q
}

// errQuota is of a blob for which there is no room: in the account, or in the store.
var errQuota = errors.New("no room for the blob")

// The file that remembers who stored what: a line that names the format, then records of recordSize bytes: account,
// digest, size (big endian), CRC-32 (IEEE) of these.
const (
	storedFile   = "stored"
	storedFormat = "holdfast stored 1\n"
	recordSize   = 32 + 32 + 8 + 4
)

// record is one blob that an account pays for.
type record struct {
	account identity.AccountID
	digest  store.Digest
	size    int64
}

func (r record) encode() []byte {
	b := make([]byte, 0, recordSize)
	b = append(append(b, r.account[:]...), r.digest[:]...)
	b = binary.BigEndian.AppendUint64(b, uint64(r.size))
	return binary.BigEndian.AppendUint32(b, crc32.ChecksumIEEE(b))
}

// decodeStored reads the file. What a crash left half written at its end is no record; anything else that cannot be
// read is an error.
func decodeStored(b []byte) ([]record, error) {
	if len(b) < len(storedFormat) && string(b) == storedFormat[:len(b)] {
		return nil, nil
	}
	b, ok := bytes.CutPrefix(b, []byte(storedFormat))
	if !ok {
		return nil, errors.New("it is of another format")
	}
	var out []record
	for ; len(b) >= recordSize; b = b[recordSize:] {
		r := record{account: identity.AccountID(b[:32]), digest: store.Digest(b[32:64]), size: int64(binary.BigEndian.Uint64(b[64:72]))}
		if crc32.ChecksumIEEE(b[:72]) != binary.BigEndian.Uint32(b[72:76]) || r.size < 0 {
			if len(b) < 2*recordSize {
				break
			}
			return nil, fmt.Errorf("record %d is damaged", len(out))
		}
		out = append(out, r)
	}
	return out, nil
}

// usage is what is stored, and by whom.
type usage struct {
	q     Quota
	grid  identity.AccountID
	log   *os.File
	mu    sync.Mutex
	have  map[store.Digest]bool
	bytes int64 // of these, and of what is being uploaded
	blobs int
	by    map[identity.AccountID]*used
}

type used struct {
	bytes int64
	blobs int
}

// openUsage reads what is stored. Blobs that are gone (an operator made room) cost nobody anything any more. As long as the
// store cannot tell (store.ErrBusy), what is written down is taken for stored.
func openUsage(home string, blobs store.Blobs, q Quota, grid identity.AccountID) (_ *usage, err error) {
	u := &usage{q: q.filled(), grid: grid, have: map[store.Digest]bool{}, by: map[identity.AccountID]*used{}}
	path := filepath.Join(home, storedFile)
	defer func() {
		if err != nil {
			err = fmt.Errorf("read who stored what from %s: %w", path, err)
		}
	}()
	err = blobs.Each(func(d store.Digest, size int64) error {
		u.have[d] = true
		u.bytes += size
		return nil
	})
	unknown := errors.Is(err, store.ErrBusy)
	if err != nil && !unknown {
		return nil, err
	}
	u.blobs = len(u.have)
	b, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	all, err := decodeStored(b)
	if err != nil {
		return nil, fmt.Errorf("%w; without the file all accounts begin again with nothing stored", err)
	}
	out := []byte(storedFormat)
	seen := map[store.Digest]bool{}
	for _, r := range all {
		if seen[r.digest] || !u.have[r.digest] && !unknown {
			continue
		}
		if seen[r.digest] = true; !u.have[r.digest] {
			u.have[r.digest] = true
			u.bytes += r.size
			u.blobs++
		}
		a := u.of(r.account)
		a.bytes += r.size
		a.blobs++
		out = append(out, r.encode()...)
	}
	// The file is written anew, without what is gone or half written.
	if err := os.MkdirAll(home, 0o700); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(path+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	_, werr := f.Write(out)
	if err := errors.Join(werr, f.Sync(), os.Rename(f.Name(), path), store.SyncDir(home)); err != nil {
		f.Close()
		return nil, err
	}
	u.log = f
	return u, nil
}

func (u *usage) close() error { return u.log.Close() }

func (u *usage) of(id identity.AccountID) *used {
	a := u.by[id]
	if a == nil {
		a = &used{}
		u.by[id] = a
	}
	return a
}

// paid says whether a blob is counted already.
func (u *usage) paid(d store.Digest) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.have[d]
}

// upload is a blob on its way in.
type upload struct {
	u       *usage
	account identity.AccountID
	size    int64 // so far
}

// begin counts a blob of which size bytes are announced, -1 when none are: what comes is counted as it comes.
func (u *usage) begin(id identity.AccountID, size int64) (*upload, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if err := u.room(id, max(size, 0), 1); err != nil {
		return nil, err
	}
	u.of(id).blobs++
	u.blobs++
	return &upload{u: u, account: id}, nil
}

// room says whether an account may store more.
func (u *usage) room(id identity.AccountID, bytes int64, blobs int) error {
	a, limit, count := u.of(id), u.q.Bytes, u.q.Blobs
	if id != u.grid {
		if a.blobs+blobs > u.q.AccountBlobs || bytes > u.q.AccountBytes-a.bytes {
			return fmt.Errorf("%w: the account stores %d bytes in %d blobs, and at most %d in %d are allowed; the grid's operator can allow more (quota in the validator's configuration)", errQuota, a.bytes, a.blobs, u.q.AccountBytes, u.q.AccountBlobs)
		}
		limit, count = limit-limit/16, count-count/16
	}
	if u.blobs+blobs > count || bytes > limit-u.bytes {
		return fmt.Errorf("%w: the grid's store is full: it keeps %d bytes in %d blobs, and at most %d in %d are allowed; its operator must allow more (quota in the validator's configuration), or stop the validator, remove blobs that no contract needs, and start it again", errQuota, u.bytes, u.blobs, limit, count)
	}
	return nil
}

// meter counts what is read as the account's.
func (up *upload) meter(r io.Reader) io.Reader { return &meter{up, r} }

type meter struct {
	up *upload
	r  io.Reader
}

func (m *meter) Read(p []byte) (int, error) {
	n, err := m.r.Read(p)
	if n > 0 {
		u := m.up.u
		u.mu.Lock()
		defer u.mu.Unlock()
		if err := u.room(m.up.account, int64(n), 0); err != nil {
			return 0, err
		}
		m.up.size += int64(n)
		u.bytes += int64(n)
		u.of(m.up.account).bytes += int64(n)
	}
	return n, err
}

// drop gives back what a blob that was not stored was counted as.
func (up *upload) drop() {
	up.u.mu.Lock()
	defer up.u.mu.Unlock()
	up.forget()
}

func (up *upload) forget() {
	a := up.u.of(up.account)
	a.bytes -= up.size
	a.blobs--
	up.u.bytes -= up.size
	up.u.blobs--
	if *a == (used{}) {
		delete(up.u.by, up.account)
	}
}

// done remembers a blob that is stored. If it was there already, or another upload of it came first, it costs nothing.
func (up *upload) done(d store.Digest) error {
	u := up.u
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.have[d] {
		up.forget()
		return nil
	}
	u.have[d] = true
	if _, err := u.log.Write(record{up.account, d, up.size}.encode()); err != nil {
		return fmt.Errorf("remember who stored %v: %w", d, err)
	}
	if err := u.log.Sync(); err != nil {
		return fmt.Errorf("remember who stored %v: %w", d, err)
	}
	return nil
}
