package volume

import (
	"bufio"
	"context"
	"crypto/subtle"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// A server is asked through a socket in its run directory, which only its own user can open. Each connection is one
// request, a line of JSON, and its answer, another:
//
//	dirty    how much may differ from the last snapshot
//	cut      takes a cut. After the answer come its extents, each as its number (4 bytes, little-endian), with the
//	         highest bit set and no bytes if it is zero, then Extent bytes; then endOfCut. The other side then says
//	         {"Done": sequence}, when its snapshot is at its place, and is answered; if it goes away before, the
//	         cut never was.
//
// What is plain goes through this socket and the memory of both ends only.
type request struct {
	Op    string
	Base  CutID    // of a cut: the snapshot that is known
	Check [32]byte // of a cut: what follows will be sealed with this volume's key
	Done  uint64   // ends a cut: the sequence of its snapshot
}

type answer struct {
	Error string `json:",omitempty"`
	Kind  string `json:",omitempty"`
	Dirty int64
	Size  int64
	// Of a cut.
	Cut      CutID
	Full     bool
	Extents  int
	Sequence uint64 // of the newest snapshot that this image knows of itself
}

const (
	zeroExtent = 1 << 31
	endOfCut   = 1<<32 - 1
	maxLine    = 4096
)

// inside is the path of a file in a directory, short enough for the address of a socket.
func inside(dir, name string) (path string, done func(), err error) {
	d, err := os.Open(dir)
	if err != nil {
		return "", nil, err
	}
	return fmt.Sprintf("/proc/self/fd/%d/%s", d.Fd(), name), func() { d.Close() }, nil
}

// control answers requests until it is closed.
type control struct {
	disk  *tracked
	check [32]byte
	l     *net.UnixListener
	all   sync.WaitGroup

	mu     sync.Mutex
	conns  map[net.Conn]bool
	closed bool
}

func listen(run string, d *tracked, check [32]byte) (*control, error) {
	path, done, err := inside(run, "control")
	if err != nil {
		return nil, err
	}
	defer done()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false) // the name leads nowhere any more; the directory goes with the server
	c := &control{disk: d, check: check, l: l, conns: map[net.Conn]bool{}}
	c.all.Go(c.accept)
	return c, nil
}

func (c *control) accept() {
	for {
		conn, err := c.l.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return
		} else if err != nil {
			time.Sleep(10 * time.Millisecond)
			continue
		}
		c.mu.Lock()
		if c.closed || len(c.conns) >= 16 || !same(conn) {
			conn.Close()
		} else {
			c.conns[conn] = true
			c.all.Go(func() {
				defer func() {
					conn.Close()
					c.mu.Lock()
					delete(c.conns, conn)
					c.mu.Unlock()
				}()
				c.serve(conn)
			})
		}
		c.mu.Unlock()
	}
}

// same reports whether the other side is a process of the same user.
func same(conn *net.UnixConn) (ok bool) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return false
	}
	raw.Control(func(fd uintptr) {
		cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		ok = err == nil && int(cred.Uid) == os.Geteuid()
	})
	return ok
}

// close ends all requests; a cut that is being read is given up.
func (c *control) close() {
	c.mu.Lock()
	c.closed = true
	c.l.Close()
	for conn := range c.conns {
		conn.Close()
	}
	c.mu.Unlock()
	c.all.Wait()
}

func (c *control) serve(conn net.Conn) {
	r := bufio.NewReaderSize(conn, maxLine)
	say := func(a answer) error { return json.NewEncoder(conn).Encode(a) }
	var q request
	if readLine(r, &q) != nil {
		return
	}
	switch q.Op {
	case "dirty":
		say(answer{Dirty: c.disk.Dirty(), Size: c.disk.size})
	case "cut":
		if subtle.ConstantTimeCompare(q.Check[:], c.check[:]) != 1 {
			say(answer{Error: ErrKey.Error(), Kind: "key"})
			return
		}
		cut, err := c.disk.begin(q.Base)
		for range 100 { // it may just be given up by one who went away
			if !errors.Is(err, ErrBusy) {
				break
			}
			time.Sleep(10 * time.Millisecond)
			cut, err = c.disk.begin(q.Base)
		}
		if err != nil {
			say(answer{Error: safe(err), Kind: cutKind(err)})
			return
		}
		if err := c.send(conn, r, cut, say); err != nil {
			cut.abort()
		}
	default:
		say(answer{Error: "no such request"})
	}
}

// send sends a cut, and ends it when the other side has put it where it belongs.
func (c *control) send(conn net.Conn, r *bufio.Reader, cut *cut, say func(answer) error) error {
	c.disk.mu.Lock()
	sequence := c.disk.base.sequence
	c.disk.mu.Unlock()
	if err := say(answer{Size: c.disk.size, Cut: cut.id, Full: cut.full, Extents: cut.size, Sequence: sequence}); err != nil {
		return err
	}
	b := make([]byte, 4+Extent)
	for {
		i, zero, err := cut.next(b[4:])
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			binary.LittleEndian.PutUint32(b, endOfCut)
			conn.Write(b[:4])
			say(answer{Error: safe(err), Kind: cutKind(err)})
			return err
		}
		n := len(b)
		binary.LittleEndian.PutUint32(b, uint32(i))
		if zero {
			binary.LittleEndian.PutUint32(b, uint32(i)|zeroExtent)
			n = 4
		}
		if _, err := conn.Write(b[:n]); err != nil {
			return err
		}
	}
	binary.LittleEndian.PutUint32(b, endOfCut)
	if _, err := conn.Write(b[:4]); err != nil {
		return err
	}
	if err := say(answer{}); err != nil {
		return err
	}
	var q request
	if err := readLine(r, &q); err != nil || q.Done == 0 {
		return errors.Join(err, errors.New("the snapshot was given up"))
	}
	if err := cut.done(q.Done); err != nil {
		say(answer{Error: safe(err)})
		return err
	}
	return say(answer{})
}

func readLine(r *bufio.Reader, v any) error {
	line, err := r.ReadSlice('\n')
	if err != nil {
		return err
	}
	return json.Unmarshal(line, v)
}

func cutKind(err error) string {
	switch {
	case errors.Is(err, ErrBehind):
		return "behind"
	case errors.Is(err, ErrBusy):
		return "busy"
	}
	return ""
}

// err is the error that an answer says.
func (a answer) err() error {
	switch {
	case a.Error == "":
		return nil
	case a.Kind == "behind":
		return ErrBehind
	case a.Kind == "busy":
		return ErrBusy
	case a.Kind == "key":
		return ErrKey
	}
	return errors.New(a.Error)
}

// ask sends a request to a server and reads the first answer. The connection ends with ctx.
func ask(ctx context.Context, run string, q request) (*asked, error) {
	path, done, err := inside(run, "control")
	if err != nil {
		return nil, err
	}
	defer done()
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("%s: its server does not answer: %w", filepath.Base(run), err)
	}
	a := &asked{conn: conn, r: bufio.NewReaderSize(conn, 64<<10)}
	a.stop = context.AfterFunc(ctx, func() { conn.Close() })
	if a.first, err = a.say(q); err != nil {
		a.close()
		return nil, err
	}
	return a, nil
}

// asked is a connection to a server.
type asked struct {
	conn  net.Conn
	r     *bufio.Reader
	stop  func() bool
	first answer
}

func (a *asked) close() {
	a.stop()
	a.conn.Close()
}

// gone is the error of a connection that ended too early. It is no io.EOF, which would be the end of a cut.
func gone(err error) error { return fmt.Errorf("the volume's server went away: %v", err) }

func (a *asked) say(q request) (answer, error) {
	if err := json.NewEncoder(a.conn).Encode(q); err != nil {
		return answer{}, err
	}
	return a.answer()
}

func (a *asked) answer() (answer, error) {
	var x answer
	if err := readLine(a.r, &x); err != nil {
		return x, gone(err)
	}
	return x, x.err()
}

// next reads one more extent of the cut into b; the end is io.EOF.
func (a *asked) next(b []byte) (i int, zero bool, err error) {
	var n [4]byte
	if _, err := io.ReadFull(a.r, n[:]); err != nil {
		return 0, false, gone(err)
	}
	u := binary.LittleEndian.Uint32(n[:])
	if u == endOfCut {
		if _, err := a.answer(); err != nil {
			return 0, false, err
		}
		return 0, false, io.EOF
	}
	if i = int(u &^ zeroExtent); int64(i) >= a.first.Size/Extent {
		return 0, false, fmt.Errorf("extent %d of a volume of %d bytes: %w", i, a.first.Size, ErrFormat)
	}
	if u&zeroExtent != 0 {
		return i, true, nil
	}
	if _, err := io.ReadFull(a.r, b[:Extent]); err != nil {
		return 0, false, gone(err)
	}
	return i, false, nil
}
