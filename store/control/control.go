// Package control is what a store's front end lets its own user do while it runs: say how it is, scrub, audit, repair, rotate
// its keys, change its locations, its users and policies. It serves HTTP over a socket in the front end's directory, to
// processes of the same user and nobody else: the kernel says whose they are. It keeps the list of the store's locations
// there too, so that a start knows what commands changed. It decides nothing about shards, and no secret but a new user's
// passes through it: keys come from the front end's file, a phrase never does.
//
// Requests and answers are JSON. What takes long answers with lines of JSON, {"progress": …} as often as it likes and
// {"result": …} or {"error": …} at the end. A client that leaves ends what it asked for.
package control

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/store"
)

// ErrNotRunning is returned where no front end answers.
var ErrNotRunning = errors.New("no front end runs there")

const (
	socketDir  = "control" // in the front end's directory
	socketName = "socket"
)

// Status is a store as its front end sees it.
type Status struct {
	Scheme    string                      `json:"scheme"` // of class STANDARD
	Classes   map[string]string           `json:"classes,omitempty"`
	Started   time.Time                   `json:"started"`
	Epoch     uint64                      `json:"epoch"`     // of this front end
	KeyEpoch  uint32                      `json:"key_epoch"` // of the keys for what is new
	Segments  int64                       `json:"segments"`
	Blocks    int64                       `json:"blocks"`
	Small     int64                       `json:"small"`   // bodies that lie in blocks
	Bytes     int64                       `json:"bytes"`   // of bodies
	Durable   map[string]map[string]int64 `json:"durable"` // scheme: durable shards: how many segments and blocks
	Degraded  int64                       `json:"degraded"`
	Lost      int64                       `json:"lost"`
	OldKey    int64                       `json:"old_key"` // sealed under the key of an earlier epoch
	Queue     int64                       `json:"queue"`   // waiting for repair
	Garbage   int64                       `json:"garbage"` // dropped, not removed yet
	Locations []Location                  `json:"locations"`
}

// Location is one of a store.
type Location struct {
	ID       string     `json:"id"`
	Farm     string     `json:"farm"`
	At       string     `json:"at,omitempty"` // "" for one that the store knows, and this front end cannot find
	State    string     `json:"state"`
	Answers  bool       `json:"answers"`
	Why      string     `json:"why,omitempty"`  // it does not
	Down     float64    `json:"down,omitempty"` // seconds since when
	Full     bool       `json:"full,omitempty"`
	Lies     int64      `json:"lies"` // wrong bytes and proofs since the start
	Shards   int64      `json:"shards"`
	Bytes    int64      `json:"bytes"` // by what it says
	Held     int64      `json:"held"`  // deleted, not removed yet
	Rotten   int64      `json:"rotten"`
	Quota    int64      `json:"quota,omitempty"` // bytes
	Passed   uint64     `json:"audits_passed"`
	Failed   uint64     `json:"audits_failed"`
	Scrubbed *time.Time `json:"scrubbed,omitempty"` // by itself, whole
}

// Progress is how far something is.
type Progress struct {
	What string `json:"what"`
	Done int64  `json:"done"`
	Of   int64  `json:"of,omitempty"` // about; 0: nobody knows
	Unit string `json:"unit"`
}

// Scrubbed is what a scrub found.
type Scrubbed struct {
	Deep    bool  `json:"deep"`
	Shards  int64 `json:"shards"`
	Bytes   int64 `json:"bytes,omitempty"` // that were read
	Missing int64 `json:"missing"`         // or rotten, or other bytes: they are queued for repair
	Orphans int64 `json:"orphans"`         // shards that nothing refers to
	Removed int64 `json:"removed"`         // of these
	Silent  int64 `json:"silent"`          // locations, of a deep one shards, that did not answer
}

// Audited is what challenges found.
type Audited struct {
	Passed int `json:"passed"`
	Failed int `json:"failed"`
	Silent int `json:"silent"`
}

// Repaired is what a round of repair did.
type Repaired struct {
	Looked   int   `json:"looked"`
	Whole    int   `json:"whole"`
	Shards   int   `json:"shards"`
	Bytes    int64 `json:"bytes"`
	Lost     int   `json:"lost"`
	Deferred int   `json:"deferred"`
	Queue    int64 `json:"queue"` // what is left
}

// Moved is what became of a location that shall go.
type Moved struct {
	Location string `json:"location"`
	Shards   int    `json:"shards"` // that were made elsewhere
	Bytes    int64  `json:"bytes"`
	Left     int    `json:"left"` // segments that have a shard there yet
}

// Rotated is what a rotation of keys did.
type Rotated struct {
	KeyEpoch uint32 `json:"key_epoch"`
	Changed  int    `json:"changed"`
	Left     int    `json:"left"` // not re-wrapped, since too few locations answer
}

// Credentials are shown once.
type Credentials struct {
	Access string `json:"access_key"`
	Secret string `json:"secret_key"`
}

// Requests.
type (
	// Scrub is rate shards a second, or bytes a second of a deep one, which reads them all.
	Scrub struct {
		Rate int  `json:"rate"`
		Deep bool `json:"deep"`
	}
	// Audit is count challenges, rate a second.
	Audit struct {
		Count int `json:"count"`
		Rate  int `json:"rate"`
	}
	// Repair is rate bytes a second that are made; 0 is no bound.
	Repair struct {
		Rate int `json:"rate"`
	}
	// User is one to be made; without a secret it gets one.
	User struct {
		Access string `json:"access_key"`
		Secret string `json:"secret_key,omitempty"`
		Role   string `json:"role"`
	}
	// Secret is a user's new one; "" has it drawn.
	Secret struct {
		Secret string `json:"secret_key,omitempty"`
	}
	at struct {
		Location string `json:"location"`
	}
)

// socket opens the directory of the socket, and gives a path through its descriptor: a socket's own path has no more than 107
// bytes. The file is closed when the path is not needed any more.
func socket(dir string) (*os.File, string, error) {
	fd, err := unix.Open(filepath.Join(dir, socketDir), unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, "", &os.PathError{Op: "open", Path: filepath.Join(dir, socketDir), Err: err}
	}
	return os.NewFile(uintptr(fd), socketDir), "/proc/self/fd/" + strconv.Itoa(fd) + "/" + socketName, nil
}

// listener takes connections of one user only.
type listener struct {
	*net.UnixListener
	dir *os.File
	uid uint32
	no  func(uid uint32) // hears who was refused
}

// Listen makes the socket in a front end's directory, whose lock the caller holds: what is left of an earlier one is removed.
func Listen(dir string, refused func(uid uint32)) (net.Listener, error) {
	at := filepath.Join(dir, socketDir)
	if err := os.Mkdir(at, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, err
	}
	f, path, err := socket(dir)
	if err != nil {
		return nil, err
	}
	l, err := listen(f, path)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("listen on %s: %w", filepath.Join(at, socketName), err), f.Close())
	}
	return &listener{l, f, uint32(os.Geteuid()), refused}, nil
}

func listen(dir *os.File, path string) (*net.UnixListener, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(dir.Fd()), &st); err != nil {
		return nil, err
	}
	if st.Uid != uint32(os.Geteuid()) {
		return nil, fmt.Errorf("the directory belongs to user %d", st.Uid)
	}
	if err := os.Chmod(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

func (l *listener) Accept() (net.Conn, error) {
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			return nil, err
		}
		uid, err := peer(c)
		if err == nil && uid == l.uid {
			return c, nil
		}
		c.Close()
		if err == nil {
			l.no(uid)
		}
	}
}

func (l *listener) Close() error { return errors.Join(l.UnixListener.Close(), l.dir.Close()) }

// peer is the user at the other end, as it was when the connection was made.
func peer(c *net.UnixConn) (uint32, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var err2 error
	err = raw.Control(func(fd uintptr) { cred, err2 = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err = errors.Join(err, err2); err != nil {
		return 0, err
	}
	return cred.Uid, nil
}

// dial connects to a front end of this user's.
func dial(dir string) (net.Conn, error) {
	f, path, err := socket(dir)
	if err == nil {
		defer f.Close()
		var c *net.UnixConn
		if c, err = net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"}); err == nil {
			uid, err := peer(c)
			if err == nil && uid != uint32(os.Geteuid()) {
				err = fmt.Errorf("user %d answers in %s", uid, dir)
			}
			if err != nil {
				return nil, errors.Join(err, c.Close())
			}
			return c, nil
		}
	}
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return nil, fmt.Errorf("%s: %w", dir, ErrNotRunning)
	}
	return nil, err
}

func repaired(r store.Repaired) Repaired {
	return Repaired{Looked: r.Looked, Whole: r.Whole, Shards: r.Shards, Bytes: r.Bytes, Lost: r.Lost, Deferred: r.Deferred}
}
