package gateway

import (
	"cmp"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// Frames of a tunnel. docs/formats/tunnel.md describes them.
const (
	frameOpen   = 1 // payload: streamHeader; Edge to Origin only
	frameData   = 2
	frameFin    = 3
	frameReset  = 4 // payload: one byte, a resetCode
	frameWindow = 5 // payload: uint32, bytes more that may be sent
	framePing   = 6

	frameHeader = 8
	maxFrame    = 16 << 10 // header and payload: exactly one TLS record
	maxPayload  = maxFrame - frameHeader

	controlStream    = 0
	maxTunnelStreams = 2048 // that an Edge opens
	// An Origin hears of a stream's end later than the Edge does, so it bears more than the Edge may open.
	maxPeerStreams = 2 * maxTunnelStreams

	firstWindow = 64 << 10 // what a stream may have in flight at first, by protocol
	maxWindow   = 2 << 20
	// spareWindow is what all streams of a tunnel together may grow beyond their first windows.
	spareWindow = 32 << 20
	growWithin  = 250 * time.Millisecond
)

// A resetCode says why a stream was ended.
type resetCode uint8

const (
	resetAborted    resetCode = 1 // the other side of the copy broke
	resetNotServed  resetCode = 2 // the Origin does not serve this workload in this epoch
	resetSuperseded resetCode = 3 // the ledger no longer names this workload in this epoch
	resetStop       resetCode = 4 // the stream was closed and reads no more
)

func (c resetCode) Error() string {
	switch c {
	case resetNotServed:
		return "stream reset: not served here"
	case resetSuperseded:
		return "stream reset: superseded"
	case resetStop:
		return "stream reset: peer reads no more"
	}
	return "stream reset"
}

var (
	errTunnelDead  = errors.New("tunnel: no sign of life")
	errTunnelStuck = errors.New("tunnel: peer does not read")
	errTunnelEnded = errors.New("tunnel: closed")
)

// A block is the unit of buffering: a frame to send, or bytes received.
type block struct {
	next int // where the next byte is read
	end  int // where the next byte is written
	buf  [maxFrame]byte
}

// blocks are shared by all tunnels, so that idle ones hold none.
var blocks = sync.Pool{New: func() any { return new(block) }}

func getBlock() *block {
	b := blocks.Get().(*block)
	b.next, b.end = 0, 0
	return b
}

// A session multiplexes streams over one connection. Only the Edge opens streams, beside the control stream that both
// ends have from the start. Every stream has a window of its own and none shares one, so that a client who does not read
// delays nobody else.
type session struct {
	conn      net.Conn
	keepAlive time.Duration
	onOpen    func(*stream) // set at the Origin; runs on a goroutine of its own
	control   *stream

	writing    sync.Mutex
	writeStart atomic.Int64  // when the write in progress began; 0 when there is none
	heard      atomic.Uint64 // frames that came
	spare      atomic.Int64  // of spareWindow

	mu      sync.Mutex
	streams map[uint32]*stream
	last    uint32
	err     error         // why the session ended
	die     chan struct{} // closed when it has
	opened  sync.WaitGroup
}

func newSession(conn net.Conn, keepAlive time.Duration, onOpen func(*stream)) *session {
	s := &session{
		conn:      conn,
		keepAlive: keepAlive,
		onOpen:    onOpen,
		streams:   make(map[uint32]*stream),
		die:       make(chan struct{}),
	}
	s.spare.Store(spareWindow)
	s.control = s.newStream(controlStream)
	s.streams[controlStream] = s.control
	return s
}

func (s *session) newStream(id uint32) *stream {
	return &stream{
		session:  s,
		id:       id,
		window:   firstWindow,
		granted:  firstWindow,
		credit:   firstWindow,
		readable: make(chan struct{}, 1),
		writable: make(chan struct{}, 1),
		remote:   s.conn.RemoteAddr(),
	}
}

// run serves the session until it ends and returns why. All goroutines that it started have ended then.
func (s *session) run() error {
	var both sync.WaitGroup
	both.Go(s.watch)
	both.Go(s.ping)
	err := s.receive()
	s.close(err)
	both.Wait()
	s.opened.Wait()
	return s.cause()
}

// close ends the session and every stream. The first reason given stays.
func (s *session) close(err error) {
	s.mu.Lock()
	if s.err != nil {
		s.mu.Unlock()
		return
	}
	s.err = cmp.Or(err, errTunnelEnded)
	close(s.die)
	streams := s.streams
	s.streams = nil
	s.mu.Unlock()
	// Frames say where a stream ends, so no farewell is owed on a connection that may take none.
	if t, ok := s.conn.(*tls.Conn); ok {
		t.NetConn().Close()
	} else {
		s.conn.Close()
	}
	for _, st := range streams {
		st.fail(err)
	}
}

func (s *session) cause() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// open starts a stream.
func (s *session) open(h streamHeader, limit int) (*stream, error) {
	payload, err := h.encode()
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	switch {
	case s.err != nil:
		s.mu.Unlock()
		return nil, s.err
	case len(s.streams) > limit: // the control stream is one of them
		s.mu.Unlock()
		return nil, fmt.Errorf("open stream: tunnel has %d", limit)
	case s.last == 1<<32-1:
		s.mu.Unlock()
		s.close(errTunnelEnded) // numbers are used up; a new tunnel starts afresh
		return nil, errTunnelEnded
	}
	s.last++
	st := s.newStream(s.last)
	st.header = h
	s.streams[st.id] = st
	s.mu.Unlock()
	if err := s.send(frameOpen, st.id, payload); err != nil {
		return nil, err
	}
	return st, nil
}

// count returns how many streams are open, without the control stream.
func (s *session) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return max(0, len(s.streams)-1)
}

func (s *session) forget(id uint32) {
	s.mu.Lock()
	delete(s.streams, id)
	s.mu.Unlock()
}

// send writes one frame.
func (s *session) send(kind byte, id uint32, payload []byte) error {
	b := getBlock()
	defer blocks.Put(b)
	n := copy(b.buf[frameHeader:], payload)
	return s.sendBlock(b, kind, id, n)
}

// sendBlock writes the frame whose n bytes of payload lie in the block behind the space for its header.
func (s *session) sendBlock(b *block, kind byte, id uint32, n int) error {
	b.buf[0], b.buf[1] = kind, 0
	binary.BigEndian.PutUint16(b.buf[2:], uint16(n))
	binary.BigEndian.PutUint32(b.buf[4:], id)
	s.writing.Lock()
	s.writeStart.Store(time.Now().UnixNano())
	_, err := s.conn.Write(b.buf[:frameHeader+n])
	s.writeStart.Store(0)
	s.writing.Unlock()
	if err != nil {
		s.close(fmt.Errorf("tunnel: %w", err))
		return s.cause()
	}
	return nil
}

// ping shows the peer that this end lives. Each end does so by itself and nobody answers, so that receive never writes:
// two ends whose receivers both waited to write would wait for ever.
func (s *session) ping() {
	tick := time.NewTicker(s.keepAlive)
	defer tick.Stop()
	for {
		select {
		case <-s.die:
			return
		case <-tick.C:
			if s.send(framePing, controlStream, nil) != nil {
				return
			}
		}
	}
}

// watch ends the session when the peer is silent, or takes nothing.
func (s *session) watch() {
	tick := time.NewTicker(s.keepAlive)
	defer tick.Stop()
	var missed int
	for last := s.heard.Load(); ; {
		select {
		case <-s.die:
			return
		case <-tick.C:
		}
		// Ticks are counted, not clocks compared: a process that was paused as a whole gives its peer the chance to be
		// heard before it calls him dead.
		if heard := s.heard.Load(); heard != last {
			last, missed = heard, 0
		} else if missed++; missed >= 4 {
			s.close(errTunnelDead)
			return
		}
		if start := s.writeStart.Load(); start != 0 && time.Since(time.Unix(0, start)) > 8*s.keepAlive {
			s.close(errTunnelStuck)
			return
		}
	}
}

// receive reads frames until the connection or the protocol breaks. It never blocks on anything but the connection.
func (s *session) receive() error {
	var head [frameHeader]byte
	for {
		if _, err := io.ReadFull(s.conn, head[:]); err != nil {
			return fmt.Errorf("tunnel: %w", err)
		}
		s.heard.Add(1)
		kind, size, id := head[0], int(binary.BigEndian.Uint16(head[2:])), binary.BigEndian.Uint32(head[4:])
		if head[1] != 0 || size > maxPayload {
			return fmt.Errorf("tunnel: bad frame header %x", head)
		}
		s.mu.Lock()
		st := s.streams[id]
		s.mu.Unlock()
		if kind == frameData {
			if err := s.receiveData(st, size); err != nil {
				return err
			}
			continue
		}
		var payload [maxHeader]byte
		if size > len(payload) {
			return fmt.Errorf("tunnel: frame %d of %d bytes", kind, size)
		}
		if _, err := io.ReadFull(s.conn, payload[:size]); err != nil {
			return fmt.Errorf("tunnel: %w", err)
		}
		switch {
		case kind == framePing && size == 0:
		case kind == frameOpen && s.onOpen != nil && st == nil && id != controlStream:
			if err := s.accept(id, payload[:size]); err != nil {
				return err
			}
		case id == controlStream && kind != frameWindow:
			return fmt.Errorf("tunnel: frame %d on the control stream", kind)
		case kind == frameFin && size == 0:
			if st != nil {
				st.finish()
			}
		case kind == frameReset && size == 1:
			if st != nil {
				st.peerReset(resetCode(payload[0]))
			}
		case kind == frameWindow && size == 4:
			if st != nil {
				if err := st.addCredit(binary.BigEndian.Uint32(payload[:])); err != nil {
					return err
				}
			}
		default:
			return fmt.Errorf("tunnel: frame %d of %d bytes for stream %d", kind, size, id)
		}
	}
}

func (s *session) accept(id uint32, payload []byte) error {
	h, err := decodeHeader(payload)
	if err != nil {
		return fmt.Errorf("tunnel: %w", err)
	}
	st := s.newStream(id)
	st.header = h
	st.remote = net.TCPAddrFromAddrPort(h.client)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return s.err
	}
	if len(s.streams) > maxPeerStreams {
		return fmt.Errorf("tunnel: more than %d streams", maxPeerStreams)
	}
	s.streams[id] = st
	s.opened.Go(func() { s.onOpen(st) })
	return nil
}

// receiveData moves a frame's payload into the stream's blocks, or away when nobody wants it.
func (s *session) receiveData(st *stream, size int) error {
	if st != nil {
		if err := st.take(size); err != nil {
			return err
		}
	}
	for size > 0 {
		var b *block
		if st != nil {
			b = st.fill(size)
		}
		if b == nil {
			b = getBlock()
			_, err := io.ReadFull(s.conn, b.buf[:size])
			blocks.Put(b)
			if err != nil {
				return fmt.Errorf("tunnel: %w", err)
			}
			return nil
		}
		n := min(size, len(b.buf)-b.end)
		_, err := io.ReadFull(s.conn, b.buf[b.end:b.end+n])
		if err != nil {
			n = 0
		}
		st.filled(b, n)
		if err != nil {
			return fmt.Errorf("tunnel: %w", err)
		}
		size -= n
	}
	return nil
}

// A stream is one connection through a tunnel. It is a net.Conn that can end each direction by itself.
//
// Closing it is gentle, as with TCP: what was written still arrives, and a peer who goes on sending is told to stop.
type stream struct {
	session *session
	id      uint32
	header  streamHeader
	remote  net.Addr

	readable, writable chan struct{} // one token each: look again
	readBy, writeBy    deadline

	mu         sync.Mutex
	blocks     []*block
	filling    bool // receive writes into the last block
	window     int  // the most that the peer may have in flight
	granted    int  // what he may still send
	consumed   int  // read here since the last credit
	credited   time.Time
	finIn      bool // the peer sends no more
	closed     bool // Close was called
	readErr    error
	credit     int  // what may still be sent
	finOut     bool // this end sends no more
	writeErr   error
	finSent    bool // and the frame that says so is on its way
	unwanted   bool // something came behind Close
	windowBack bool // what the window grew by was given back
}

func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// take charges the peer for bytes that are about to come.
func (st *stream) take(size int) error {
	st.mu.Lock()
	defer st.mu.Unlock()
	if size > st.granted {
		return fmt.Errorf("tunnel: stream %d exceeds its window", st.id)
	}
	if st.finIn {
		return fmt.Errorf("tunnel: stream %d goes on behind its end", st.id)
	}
	st.granted -= size
	return nil
}

// fill returns the block into which up to size bytes go next, or nil when nobody will read them.
func (st *stream) fill(size int) *block {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.closed || st.readErr != nil {
		st.lost()
		return nil
	}
	st.filling = true
	if n := len(st.blocks); n > 0 {
		// A quarter of a block is the most that is wasted, so memory stays near the window however frames are cut.
		if space := len(st.blocks[n-1].buf) - st.blocks[n-1].end; space >= size || space >= maxFrame/4 {
			return st.blocks[n-1]
		}
	}
	b := getBlock()
	st.blocks = append(st.blocks, b)
	return b
}

// filled makes the n bytes that were put into the block readable.
func (st *stream) filled(b *block, n int) {
	st.mu.Lock()
	st.filling = false
	if st.closed || st.readErr != nil {
		st.lost()
		st.mu.Unlock()
		blocks.Put(b) // drop left it to us
		return
	}
	b.end += n
	st.mu.Unlock()
	poke(st.readable)
}

// lost notes that something came which nobody will read, and so without credit: the peer must be told, or he may wait for
// credit for ever. He is told behind the end of this direction, so that he loses nothing of it. With mu held, on the
// goroutine of receive.
func (st *stream) lost() {
	if !st.unwanted {
		st.unwanted = true
		if st.finSent {
			st.session.opened.Go(func() { st.reset(resetStop) })
		}
	}
}

// drop gives the blocks back. Called with mu held.
func (st *stream) drop() {
	for i, b := range st.blocks {
		if !st.filling || i < len(st.blocks)-1 {
			blocks.Put(b)
		}
	}
	st.blocks = nil
	st.returnWindow()
}

// returnWindow gives back what the window grew by. Called with mu held.
func (st *stream) returnWindow() {
	if !st.windowBack {
		st.windowBack = true
		st.session.spare.Add(int64(st.window - firstWindow))
	}
}

// head returns the readable bytes of the first block, or the reason why there will be none, or neither. With mu held.
func (st *stream) head() (*block, []byte, error) {
	for len(st.blocks) > 0 {
		b := st.blocks[0]
		if b.next < b.end {
			return b, b.buf[b.next:b.end], nil
		}
		if len(st.blocks) == 1 {
			break
		}
		st.shift()
	}
	switch {
	case st.closed:
		return nil, nil, net.ErrClosed
	case st.readErr != nil:
		return nil, nil, st.readErr
	case st.finIn:
		return nil, nil, io.EOF
	}
	return nil, nil, nil
}

// shift gives the first block back. With mu held.
func (st *stream) shift() {
	blocks.Put(st.blocks[0])
	st.blocks[0] = nil
	st.blocks = st.blocks[1:]
}

// read consumes n bytes of the block that head returned and says how much credit to send. With mu held since head.
func (st *stream) read(b *block, n int) (credit int) {
	b.next += n
	if b.next == b.end && (len(st.blocks) > 1 || !st.filling) {
		st.shift()
	}
	return st.account(n)
}

// account says how much credit follows from n more bytes delivered. With mu held.
func (st *stream) account(n int) (credit int) {
	st.consumed += n
	if st.finIn || st.consumed < st.window/2 {
		return 0
	}
	credit = st.consumed
	st.consumed = 0
	// Whoever drains half a window this fast may be held back by it.
	now := time.Now()
	if grow := int64(st.window); !st.windowBack && st.window < maxWindow && now.Sub(st.credited) < growWithin {
		if st.session.spare.Add(-grow) >= 0 {
			st.window += int(grow)
			credit += int(grow)
		} else {
			st.session.spare.Add(grow)
		}
	}
	st.credited = now
	st.granted += credit
	return credit
}

func (st *stream) sendCredit(n int) {
	if n > 0 {
		// An error ends the session, which the next read reports.
		_ = st.session.send(frameWindow, st.id, binary.BigEndian.AppendUint32(nil, uint32(n)))
	}
}

// awaitRead blocks until head has something to say, with mu held before and after.
func (st *stream) awaitRead() (*block, []byte, error) {
	for {
		if st.readBy.expired() {
			return nil, nil, os.ErrDeadlineExceeded
		}
		if b, data, err := st.head(); data != nil || err != nil {
			return b, data, err
		}
		expires := st.readBy.wait()
		st.mu.Unlock()
		select {
		case <-st.readable:
		case <-expires:
		}
		st.mu.Lock()
	}
}

func (st *stream) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	st.mu.Lock()
	b, data, err := st.awaitRead()
	if err != nil {
		st.mu.Unlock()
		return 0, err
	}
	n := copy(p, data)
	credit := st.read(b, n)
	st.mu.Unlock()
	st.sendCredit(credit)
	return n, nil
}

// WriteTo copies what comes to w, without a buffer between.
func (st *stream) WriteTo(w io.Writer) (total int64, err error) {
	for {
		st.mu.Lock()
		b, data, err := st.awaitRead()
		if err != nil {
			st.mu.Unlock()
			if err == io.EOF {
				err = nil
			}
			return total, err
		}
		// The block leaves the stream while w has it, so that a reset cannot give it to somebody else. Only the last
		// block may be in use by receive; from that one the bytes are copied.
		lone := len(st.blocks) == 1 && st.filling
		if lone {
			own := getBlock()
			own.end = copy(own.buf[:], data)
			credit := st.read(b, own.end)
			st.mu.Unlock()
			st.sendCredit(credit)
			n, err := w.Write(own.buf[:own.end])
			blocks.Put(own)
			total += int64(n)
			if err != nil {
				return total, err
			}
			continue
		}
		st.blocks[0] = nil
		st.blocks = st.blocks[1:]
		st.mu.Unlock()
		n, err := w.Write(data)
		blocks.Put(b)
		total += int64(n)
		if err != nil {
			return total, err
		}
		// Credit only follows delivery: a slow client is felt by the sender.
		st.mu.Lock()
		credit := st.account(len(data))
		st.mu.Unlock()
		st.sendCredit(credit)
	}
}

// awaitCredit blocks until something may be sent and returns how much, with mu held before and after.
func (st *stream) awaitCredit() (int, error) {
	for {
		switch {
		case st.closed:
			return 0, net.ErrClosed
		case st.writeErr != nil:
			return 0, st.writeErr
		case st.finOut:
			return 0, net.ErrClosed
		case st.writeBy.expired():
			return 0, os.ErrDeadlineExceeded
		case st.credit > 0:
			return min(st.credit, maxPayload), nil
		}
		expires := st.writeBy.wait()
		st.mu.Unlock()
		select {
		case <-st.writable:
		case <-expires:
		}
		st.mu.Lock()
	}
}

func (st *stream) Write(p []byte) (total int, err error) {
	for len(p) > 0 {
		st.mu.Lock()
		n, err := st.awaitCredit()
		n = min(n, len(p))
		st.credit -= n
		st.mu.Unlock()
		if err != nil {
			return total, err
		}
		if err := st.session.send(frameData, st.id, p[:n]); err != nil {
			return total, err
		}
		total += n
		p = p[n:]
	}
	return total, nil
}

// ReadFrom copies r into the stream, reading straight into frames. One goroutine at a time writes.
func (st *stream) ReadFrom(r io.Reader) (total int64, err error) {
	b := getBlock()
	defer blocks.Put(b)
	for {
		st.mu.Lock()
		n, err := st.awaitCredit()
		st.mu.Unlock()
		if err != nil {
			return total, err
		}
		n, readErr := r.Read(b.buf[frameHeader : frameHeader+n])
		if n > 0 {
			st.mu.Lock()
			st.credit -= n
			err := st.writeErr
			st.mu.Unlock()
			if err != nil {
				return total, err
			}
			if err := st.session.sendBlock(b, frameData, st.id, n); err != nil {
				return total, err
			}
			total += int64(n)
		}
		if readErr == io.EOF {
			return total, nil
		}
		if readErr != nil {
			return total, readErr
		}
	}
}

// CloseWrite ends this direction.
func (st *stream) CloseWrite() error {
	st.mu.Lock()
	if st.finOut || st.writeErr != nil {
		defer st.mu.Unlock()
		return st.writeErr
	}
	st.finOut = true
	done := st.finIn
	st.mu.Unlock()
	poke(st.writable)
	err := st.session.send(frameFin, st.id, nil)
	if done {
		st.session.forget(st.id)
		return err
	}
	st.mu.Lock()
	st.finSent = true
	stop := st.closed && st.unwanted
	st.mu.Unlock()
	if stop {
		st.reset(resetStop)
	}
	return err
}

// Close ends both directions and drops what was not read.
func (st *stream) Close() error {
	st.mu.Lock()
	if st.closed {
		st.mu.Unlock()
		return net.ErrClosed
	}
	st.closed = true
	for _, b := range st.blocks {
		st.unwanted = st.unwanted || b.next < b.end && !st.finIn
	}
	stop := st.unwanted && st.finSent
	st.drop()
	st.mu.Unlock()
	st.readBy.set(time.Time{})
	st.writeBy.set(time.Time{})
	poke(st.readable)
	poke(st.writable)
	if stop {
		st.reset(resetStop)
	}
	return st.CloseWrite()
}

// reset ends both directions at once. What was written may not arrive.
func (st *stream) reset(code resetCode) {
	st.mu.Lock()
	if st.writeErr != nil && st.readErr != nil {
		st.mu.Unlock()
		return
	}
	ended := st.finIn && st.finOut
	st.readErr, st.writeErr = code, code
	st.drop()
	st.mu.Unlock()
	poke(st.readable)
	poke(st.writable)
	if !ended {
		// It counts until the peer can know: else one who opens streams and takes no resets would pile them up.
		_ = st.session.send(frameReset, st.id, []byte{byte(code)})
		st.session.forget(st.id)
	}
}

// peerReset takes a reset from the peer. One that follows his end only says that he reads no more: what he sent before
// stays readable.
func (st *stream) peerReset(code resetCode) {
	st.session.forget(st.id)
	st.fail(code)
}

func (st *stream) fail(err error) {
	st.mu.Lock()
	if st.writeErr == nil {
		st.writeErr = err
	}
	if !st.finIn && st.readErr == nil {
		st.readErr = err
		st.drop()
	}
	st.returnWindow()
	st.mu.Unlock()
	poke(st.readable)
	poke(st.writable)
}

// finish takes the end of the peer's direction.
func (st *stream) finish() {
	st.mu.Lock()
	st.finIn = true
	st.returnWindow()
	done := st.finOut
	st.mu.Unlock()
	if done {
		st.session.forget(st.id)
	}
	poke(st.readable)
}

func (st *stream) addCredit(n uint32) error {
	st.mu.Lock()
	defer st.mu.Unlock()
	if int64(st.credit)+int64(n) > maxWindow {
		return fmt.Errorf("tunnel: window of stream %d exceeds %d", st.id, maxWindow)
	}
	st.credit += int(n)
	poke(st.writable)
	return nil
}

func (st *stream) LocalAddr() net.Addr  { return st.session.conn.LocalAddr() }
func (st *stream) RemoteAddr() net.Addr { return st.remote }

func (st *stream) SetDeadline(t time.Time) error {
	return errors.Join(st.SetReadDeadline(t), st.SetWriteDeadline(t))
}

func (st *stream) SetReadDeadline(t time.Time) error {
	st.readBy.set(t)
	poke(st.readable)
	return nil
}

func (st *stream) SetWriteDeadline(t time.Time) error {
	st.writeBy.set(t)
	poke(st.writable)
	return nil
}

// A deadline is a moment after which waiting ends. Whoever sets it wakes who waits, so that he waits for the new one.
type deadline struct {
	mu    sync.Mutex
	at    time.Time
	timer *time.Timer
	past  chan struct{}
}

func (d *deadline) set(t time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
	d.at = t
	d.past = nil
}

func (d *deadline) expired() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return !d.at.IsZero() && !time.Now().Before(d.at)
}

// wait returns a channel that is closed at the deadline. The timer starts here, for most deadlines are never waited for.
func (d *deadline) wait() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.at.IsZero() {
		return nil
	}
	if d.past == nil {
		past := make(chan struct{})
		d.past = past
		d.timer = time.AfterFunc(time.Until(d.at), func() { close(past) })
	}
	return d.past
}
