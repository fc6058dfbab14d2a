package location

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"time"
)

// One connection has one request under way: a request, its body, and an answer of one or more frames, all but the last
// marked. docs/formats/location.md has the bytes.

const (
	protocol    = "holdfast-location/1"
	requestSize = 80
	frameSize   = 16
	frameMore   = 1
	infoSize    = 65
	statusSize  = 80
	maxText     = 256 // bytes of an error's text
	// maxAnswer bounds a frame: a page of names, or a challenge's leaves with their paths.
	maxAnswer = 1 << 20
)

type op byte

const (
	opAnnounce op = 1 + iota
	opPut
	opGet
	opStat
	opList
	opDelete
	opUndelete
	opPurge
	opRetain
	opPutHead
	opHead
	opProve
	opStatus
	opAppend
	opEarlier
	opEnd
)

// request is the fixed part of a request. What a and b mean depends on op.
type request struct {
	op   op
	size uint32 // of the body that follows
	front
	a, b uint64
	name Name
}

func (r *request) put(p []byte) {
	be := binary.BigEndian
	clear(p[:8])
	p[0] = byte(r.op)
	be.PutUint32(p[4:], r.size)
	be.PutUint64(p[8:], uint64(r.epoch))
	be.PutUint64(p[16:], r.a)
	be.PutUint64(p[24:], r.b)
	copy(p[32:], r.name[:])
	copy(p[64:], r.holder[:])
}

var errWire = errors.New("not what the protocol says")

// parseRequest reads the fixed part and bounds the body by what the operation takes.
func parseRequest(p []byte) (r request, err error) {
	if len(p) != requestSize || p[1]|p[2]|p[3] != 0 {
		return r, errWire
	}
	be := binary.BigEndian
	r = request{op: op(p[0]), size: be.Uint32(p[4:]), front: front{Epoch(be.Uint64(p[8:])), Holder(p[64:])}, a: be.Uint64(p[16:]), b: be.Uint64(p[24:]), name: Name(p[32:])}
	limit := uint32(0)
	switch r.op {
	case opPut:
		limit = MaxShard
	case opAppend:
		limit = MaxHead + MaxShard
	case opPutHead:
		limit = MaxHead
	case opProve:
		limit = 4 * MaxLeaves
	case opAnnounce:
		limit = uint32(len(Holder{}))
	}
	if r.op == 0 || r.op >= opEnd || r.size > limit || r.op == opAnnounce && r.size != limit || r.op == opProve && r.size%4 != 0 || r.op == opAppend && r.b > min(MaxHead, uint64(r.size)) {
		return r, fmt.Errorf("request %d with %d bytes: %w", r.op, r.size, errWire)
	}
	return r, nil
}

// frame is the fixed part of a part of an answer.
type frame struct {
	status byte // 0: it went well
	more   bool
	size   uint32
	value  uint64
}

func (f frame) put(p []byte) {
	clear(p[:8])
	p[0] = f.status
	if f.more {
		p[1] = frameMore
	}
	binary.BigEndian.PutUint32(p[4:], f.size)
	binary.BigEndian.PutUint64(p[8:], f.value)
}

func parseFrame(p []byte) (f frame, err error) {
	if len(p) != frameSize || p[1] > frameMore || p[2]|p[3] != 0 {
		return f, errWire
	}
	f = frame{p[0], p[1] == frameMore, binary.BigEndian.Uint32(p[4:]), binary.BigEndian.Uint64(p[8:])}
	if f.size > maxAnswer || f.status != 0 && (f.more || f.size > maxText) {
		return f, errWire
	}
	return f, nil
}

// failures are the errors that have a number. The order is the format.
var failures = [...]error{ErrAbsent, ErrName, ErrSize, ErrRotten, ErrLocked, ErrFull, ErrQuota, ErrFenced, ErrEpoch, ErrOldHead, ErrRights, ErrBusy, ErrBroken}

const statusBusy = 12 // of ErrBusy

// statusOf is the number of an error, and what a client may read of it.
func statusOf(err error) (byte, string) {
	for i, f := range failures {
		if errors.Is(err, f) {
			return byte(i + 1), err.Error()[:min(len(err.Error()), maxText)]
		}
	}
	return statusBusy, "" // details of the machine stay here
}

// failureOf is the error of a number.
func failureOf(status byte, text []byte) error {
	if status == 0 || int(status) > len(failures) {
		return fmt.Errorf("status %d: %w", status, errWire)
	}
	return &remote{failures[status-1], string(text)}
}

// remote is an error of the other side. Its text is another's, and shown quoted.
type remote struct {
	kind error
	text string
}

func (r *remote) Error() string {
	if r.text == "" {
		return r.kind.Error()
	}
	return fmt.Sprintf("%v (%.*q)", r.kind, maxText, r.text)
}
func (r *remote) Unwrap() error { return r.kind }

func ms(t time.Time) uint64 {
	if t.IsZero() {
		return 0
	}
	return uint64(t.UnixMilli())
}

// until reads a time; one that no clock will show is as good as the last that one can.
func until(v uint64) time.Time { return milli(int64(min(v, 1<<50))) }

func appendInfo(b []byte, i Info) []byte {
	be := binary.BigEndian
	b = append(b, i.Name[:]...)
	b = be.AppendUint64(b, uint64(i.Size))
	b = be.AppendUint64(b, ms(i.Put))
	b = be.AppendUint64(b, ms(i.Retain))
	b = be.AppendUint64(b, ms(i.Deleted))
	if i.Rotten {
		return append(b, 1)
	}
	return append(b, 0)
}

func parseInfos(b []byte) ([]Info, error) {
	if len(b)%infoSize != 0 || len(b)/infoSize > MaxPage {
		return nil, errWire
	}
	var out []Info
	be := binary.BigEndian
	for ; len(b) > 0; b = b[infoSize:] {
		i := Info{Name: Name(b), Size: int64(be.Uint64(b[32:])), Put: until(be.Uint64(b[40:])), Retain: until(be.Uint64(b[48:])), Deleted: until(be.Uint64(b[56:])), Rotten: b[64] == 1}
		if i.Size < 0 || i.Size > MaxShard || b[64] > 1 {
			return nil, errWire
		}
		out = append(out, i)
	}
	return out, nil
}

// parsePage reads a page of a list: what it names is in order, and the next name behind all of it.
func parsePage(from Name, a answer) (page []Info, next Name, err error) {
	b := a.body
	switch {
	case a.value > 1 || a.value == 1 && len(b) < len(next):
		return nil, next, errWire
	case a.value == 1:
		next = Name(b[len(b)-len(next):])
		b = b[:len(b)-len(next)]
	}
	if page, err = parseInfos(b); err != nil {
		return nil, next, err
	}
	least := from
	for i, x := range page {
		if order := bytes.Compare(x.Name[:], least[:]); order < 0 || i > 0 && order == 0 {
			return nil, next, errWire
		}
		least = x.Name
	}
	if a.value == 1 && (len(page) == 0 || bytes.Compare(next[:], least[:]) <= 0) {
		return nil, next, errWire // it would never end
	}
	return page, next, nil
}

func appendStatus(b []byte, s Status) []byte {
	for _, v := range []uint64{
		uint64(s.Epoch), uint64(s.Shards), uint64(s.Bytes), uint64(s.Held), uint64(s.Rotten), uint64(s.Quota.Bytes), uint64(s.Quota.Shards),
		uint64(s.Hold.Milliseconds()), ms(s.Time), ms(s.Scrubbed),
	} {
		b = binary.BigEndian.AppendUint64(b, v)
	}
	return b
}

// appendHeads writes each head as its epoch, sequence, length and bytes.
func appendHeads(b []byte, all []Head) []byte {
	for _, h := range all {
		b = binary.BigEndian.AppendUint64(b, uint64(h.Epoch))
		b = binary.BigEndian.AppendUint64(b, h.Sequence)
		b = binary.BigEndian.AppendUint16(b, uint16(len(h.Bytes)))
		b = append(b, h.Bytes...)
	}
	return b
}

func parseHeads(b []byte) (all []Head, err error) {
	for len(b) > 0 {
		if len(b) < 18 || len(all) == MaxHeads {
			return nil, errWire
		}
		h := Head{Epoch: Epoch(binary.BigEndian.Uint64(b)), Sequence: binary.BigEndian.Uint64(b[8:])}
		n := int(binary.BigEndian.Uint16(b[16:]))
		if b = b[18:]; n > MaxHead || n > len(b) {
			return nil, errWire
		}
		h.Bytes, b = b[:n:n], b[n:]
		all = append(all, h)
	}
	return all, nil
}

func parseStatus(b []byte) (s Status, err error) {
	if len(b) != statusSize {
		return s, errWire
	}
	var v [statusSize / 8]uint64
	for i := range v {
		v[i] = binary.BigEndian.Uint64(b[8*i:])
	}
	count := func(v uint64) int64 { return int64(min(v, 1<<62)) }
	return Status{
		Epoch: Epoch(v[0]), Shards: count(v[1]), Bytes: count(v[2]), Held: count(v[3]), Rotten: count(v[4]), Quota: Quota{count(v[5]), count(v[6])},
		Hold: time.Duration(min(v[7], 1<<40)) * time.Millisecond, Time: until(v[8]), Scrubbed: until(v[9]),
	}, nil
}

// appendProof writes each leaf as two lengths, its data and its path.
func appendProof(b []byte, p Proof) []byte {
	for _, l := range p.Leaves {
		b = binary.BigEndian.AppendUint16(b, uint16(len(l.Data)))
		b = binary.BigEndian.AppendUint16(b, uint16(len(l.Path)))
		b = append(append(b, l.Data...), l.Path...)
	}
	return b
}

func parseProof(size uint64, b []byte) (p Proof, err error) {
	if size > MaxShard {
		return p, errWire
	}
	p.Size = int64(size)
	for len(b) > 0 {
		if len(b) < 4 || len(p.Leaves) == MaxLeaves {
			return p, errWire
		}
		data, path := int(binary.BigEndian.Uint16(b)), int(binary.BigEndian.Uint16(b[2:]))
		if b = b[4:]; len(b) < data+path {
			return p, errWire
		}
		p.Leaves = append(p.Leaves, Leaf{b[:data:data], b[data : data+path : data+path]})
		b = b[data+path:]
	}
	return p, nil
}

// wire makes few system calls of TLS's many records: what is written waits until something is read, or the buffer is
// full. It is used by one goroutine, but for its deadlines and the end of what is below.
type wire struct {
	net.Conn
	r *bufio.Reader
	w *bufio.Writer
}

const wireBuffer = 64 << 10

func newWire(c net.Conn) *wire {
	return &wire{c, bufio.NewReaderSize(c, wireBuffer), bufio.NewWriterSize(c, wireBuffer)}
}

func (w *wire) Write(p []byte) (int, error) { return w.w.Write(p) }

func (w *wire) Read(p []byte) (int, error) {
	if w.w.Buffered() > 0 {
		if err := w.w.Flush(); err != nil {
			return 0, err
		}
	}
	return w.r.Read(p)
}

// deadlineFor is how long a transfer may take: a slow peer holds a place, but not for ever.
func deadlineFor(n int64) time.Duration {
	return transferTime + time.Duration(n/slowest)*time.Second
}

const (
	transferTime = 20 * time.Second
	slowest      = 128 << 10 // bytes a second
)

func discard(r io.Reader, n int64) error {
	_, err := io.CopyN(io.Discard, r, n)
	return err
}
