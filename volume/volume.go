// Package volume is a workload's disk: an ext4 file system in an encrypted image file. The image is shown as a plain disk
// by a FUSE file system of one file, that file is attached to a loop device, and the Manager mounts the device. The plain
// disk belongs to one server process for each open volume, which outlives whoever asked for it and never sees the mount.
//
// Encryption is AES-256 in XTS mode (IEEE 1619) over sectors of 4096 bytes, the sector's number as tweak, keys by HKDF
// from the volume's key (format.go, docs/formats/volume.md). It keeps the disk's owner from reading. It does not keep him
// from putting back an older sector or garbling one, and it shows him which sectors were ever written, how often, and
// that a sector has the same bytes as before. Writes in place need no journal of their own, so that a crash leaves what
// ext4's journal expects.
//
// A snapshot is the plain disk at one moment, while the workload goes on (cut.go): the server notes what changed (track.go), and
// copies what a snapshot still has to read before it is overwritten. The Manager puts what is new, sealed under names that
// are keyed hashes, to a Place that is not trusted, and makes an image from it (snapshot.go, manifest.go). It never takes a
// snapshot by itself.
//
// The file system is made from a template of the next larger size (64 MiB to 64 GiB): the node needs no mkfs. Nothing is
// ever created in place of what should be there: an absent image is ErrLost unless the caller says Create.
package volume

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Config of a Manager.
type Config struct {
	Self []string // argv prefix of a volume server
	Dir  string   // of the images, on disk
	Run  string   // on tmpfs: mount points and what runs
	Log  *slog.Logger

	Copies  int64 // bytes on disk that a snapshot's copies of what is written meanwhile may take; 0 means 1 GiB
	Uploads int   // how many pieces of a snapshot are on their way at once; 0 means 4
}

// Spec is a volume as it should be open.
type Spec struct {
	ID     string // [a-z0-9-]{1,64}
	Size   int64  // bytes, of a volume that is created; rounded up to a template's
	Key    [32]byte
	Create bool // it may be created if it is absent
}

// Status is a volume that is open.
type Status struct {
	ID         string
	Mountpoint string
}

// Manager opens and closes volumes.
type Manager struct {
	cfg Config
	log *slog.Logger
	mu  sync.Mutex
	ids map[string]*sync.Mutex
}

var idForm = regexp.MustCompile(`^[a-z0-9-]{1,64}$`)

// New checks the configuration; nothing happens before the first call.
func New(cfg Config) (*Manager, error) {
	if !filepath.IsAbs(cfg.Dir) || !filepath.IsAbs(cfg.Run) {
		return nil, fmt.Errorf("volume: directories %q and %q must be absolute paths", cfg.Dir, cfg.Run)
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Copies <= 0 {
		cfg.Copies = 1 << 30
	}
	if cfg.Uploads <= 0 {
		cfg.Uploads = 4
	}
	return &Manager{cfg: cfg, log: cfg.Log, ids: map[string]*sync.Mutex{}}, nil
}

func (m *Manager) lock(id string) func() {
	m.mu.Lock()
	l := m.ids[id]
	if l == nil {
		l = &sync.Mutex{}
		m.ids[id] = l
	}
	m.mu.Unlock()
	l.Lock()
	return l.Unlock
}

func (m *Manager) run(id string) string   { return filepath.Join(m.cfg.Run, id) }
func (m *Manager) image(id string) string { return filepath.Join(m.cfg.Dir, id+".img") }

// tracking is the path of the file that says what of an image changed.
func tracking(image string) string { return strings.TrimSuffix(image, ".img") + ".dirty" }

// order is what a server is told through its standard input: the key is on no command line and in no environment.
type order struct {
	Spec
	Image  string
	Run    string
	Copies int64
}

// report is what a server says of itself in RUN/status.json.
type report struct {
	PID   int
	Ready bool
	Loop  string // the device that shows the plain disk
	Error string
	Kind  string // of the error: "lost", "key", "format"
}

// Open makes a volume's file system available and returns where. A volume that is open already is left as it is.
func (m *Manager) Open(ctx context.Context, s Spec) (string, error) {
	if !idForm.MatchString(s.ID) {
		return "", fmt.Errorf("volume ID %q: want 1 to 64 of a-z, 0-9 and -", s.ID)
	}
	if s.Key == [32]byte{} { // one that somebody forgot, and that everybody knows
		return "", fmt.Errorf("open volume %s: its key is all zeros", s.ID)
	}
	defer m.lock(s.ID)()
	run := m.run(s.ID)
	mnt := filepath.Join(run, "mnt")
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if alive(run) && mounted(mnt) {
		return mnt, nil
	}
	// Also where a server lives whose Manager died before it mounted: the device is gone with that.
	if err := m.end(ctx, s.ID); err != nil {
		return "", fmt.Errorf("open volume %s: %w", s.ID, err)
	}
	hold, err := m.start(&s)
	if err != nil {
		return "", fmt.Errorf("open volume %s: %w", s.ID, err)
	}
	defer hold.Close()
	for {
		r, err := readReport(run)
		switch {
		case err == nil && r.Ready && alive(run):
			// noinit_itable: the template's inode tables are holes, which are zero already.
			err := unix.Mount(r.Loop, mnt, "ext4", unix.MS_NOATIME|unix.MS_NODEV|unix.MS_NOSUID, "noinit_itable,errors=remount-ro,discard")
			if err != nil {
				hold.Close()
				return "", errors.Join(fmt.Errorf("open volume %s: mount: %w", s.ID, err), m.end(ctx, s.ID))
			}
			return mnt, nil
		case err == nil && r.Error != "":
			kind := map[string]error{"lost": ErrLost, "key": ErrKey, "format": ErrFormat}[r.Kind]
			if kind == nil {
				kind = errors.New(r.Error)
			}
			return "", fmt.Errorf("open volume %s: %w", s.ID, kind)
		case !alive(run):
			return "", fmt.Errorf("open volume %s: its server died", s.ID)
		}
		select {
		case <-ctx.Done():
			return "", fmt.Errorf("open volume %s: %w", s.ID, ctx.Err())
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// start starts a server. It holds its device until what is returned is closed.
func (m *Manager) start(s *Spec) (io.Closer, error) {
	run := m.run(s.ID)
	for _, d := range []string{m.cfg.Dir, run, filepath.Join(run, "fuse"), filepath.Join(run, "mnt")} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, err
		}
	}
	lock, err := lockRun(run)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	raw, err := json.Marshal(order{*s, m.image(s.ID), run, m.cfg.Copies})
	if err != nil {
		return nil, err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	cmd := exec.Command(m.cfg.Self[0], m.cfg.Self[1:]...)
	cmd.Dir, cmd.Env = "/", []string{"PATH=/bin"}
	cmd.Stdin = r
	cmd.ExtraFiles = []*os.File{lock} // free only when the server is gone
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true, Unshareflags: unix.CLONE_NEWNS}
	if err := cmd.Start(); err != nil {
		w.Close()
		return nil, err
	}
	go cmd.Wait() // reaped here while this process lives, by init after it
	if _, err := w.Write(raw); err != nil {
		w.Close()
		return nil, err
	}
	return w, nil
}

// lockRun takes a volume's lock, which is free when the last descriptor of what is returned is closed.
func lockRun(run string) (*os.File, error) {
	lock, err := os.OpenFile(filepath.Join(run, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.FcntlFlock(lock.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK}); err != nil {
		lock.Close()
		return nil, fmt.Errorf("lock: %w", err)
	}
	return lock, nil
}

// Close ends a volume's server after everything that was written is on disk. A volume that is not open is closed.
func (m *Manager) Close(ctx context.Context, id string) error {
	if !idForm.MatchString(id) {
		return fmt.Errorf("volume ID %q: want 1 to 64 of a-z, 0-9 and -", id)
	}
	defer m.lock(id)()
	run := m.run(id)
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if err := unmount(ctx, filepath.Join(run, "mnt")); err != nil {
		return fmt.Errorf("close volume %s: unmount: %w", id, err)
	}
	if err := m.end(ctx, id); err != nil {
		return fmt.Errorf("close volume %s: %w", id, err)
	}
	return nil
}

// unmount waits for who still uses a volume: cutting him off would lose what is being written.
func unmount(ctx context.Context, path string) error {
	for {
		err := unix.Unmount(path, 0)
		if err == nil || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// mounted reports whether something is mounted on a directory.
func mounted(path string) bool {
	var dir, above unix.Stat_t
	return unix.Lstat(path, &dir) == nil && unix.Lstat(filepath.Dir(path), &above) == nil && dir.Dev != above.Dev
}

// end ends a server, if there is one, and removes what it left.
func (m *Manager) end(ctx context.Context, id string) error {
	run := m.run(id)
	for first := true; alive(run); first = false {
		if r, err := readReport(run); err == nil && first && r.PID > 0 {
			unix.Kill(r.PID, unix.SIGTERM) // the lock says that it is this server
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
	}
	return m.clean(id)
}

// Destroy deletes a volume's image. It is closed first.
func (m *Manager) Destroy(ctx context.Context, id string) error {
	if err := m.Close(ctx, id); err != nil {
		return err
	}
	if err := untrack(tracking(m.image(id))); err != nil {
		return fmt.Errorf("destroy volume %s: %w", id, err)
	}
	if err := os.Remove(m.image(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("destroy volume %s: %w", id, err)
	}
	return nil
}

// List returns the volumes that are open, also those that a Manager before this one opened.
func (m *Manager) List(context.Context) ([]Status, error) {
	entries, err := os.ReadDir(m.cfg.Run)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("list volumes: %w", err)
	}
	var out []Status
	for _, e := range entries {
		run := m.run(e.Name())
		if r, err := readReport(run); err == nil && r.Ready && alive(run) {
			out = append(out, Status{e.Name(), filepath.Join(run, "mnt")})
		}
	}
	return out, nil
}

// Serving reports whether a volume is open and its server lives. Of a server that died nothing remains that a workload
// could read or write: Close and Open bring it back.
func (m *Manager) Serving(id string) bool {
	r, err := readReport(m.run(id))
	return err == nil && r.Ready && alive(m.run(id)) && mounted(filepath.Join(m.run(id), "mnt"))
}

// Sweep removes what dead servers have left: mounts without a disk behind them, and images that they had not made whole.
func (m *Manager) Sweep() error {
	entries, err := os.ReadDir(m.cfg.Run)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("sweep volumes: %w", err)
	}
	for _, e := range entries {
		if err := m.sweep(e.Name()); err != nil {
			return fmt.Errorf("sweep volume %s: %w", e.Name(), err)
		}
	}
	left, err := filepath.Glob(filepath.Join(m.cfg.Dir, making+"*"))
	if err != nil {
		return fmt.Errorf("sweep volumes: %w", err)
	}
	for _, f := range left {
		if id, ok := strings.CutSuffix(strings.TrimPrefix(filepath.Base(f), making), ".img"); ok && alive(m.run(id)) {
			continue // it is just being made
		}
		if err := os.Remove(f); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("sweep volumes: %w", err)
		}
	}
	return nil
}

func (m *Manager) sweep(id string) error {
	defer m.lock(id)()
	if alive(m.run(id)) {
		return nil
	}
	return m.clean(id)
}

// clean removes what a dead server has left: a mount whose disk is gone. The loop device goes with it, and what the server
// had mounted itself went with its mount namespace.
func (m *Manager) clean(id string) error {
	run := m.run(id)
	for {
		err := unix.Unmount(filepath.Join(run, "mnt"), unix.MNT_DETACH)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
			return os.RemoveAll(run)
		}
		if err != nil {
			return fmt.Errorf("unmount: %w", err)
		}
	}
}

// alive reports whether a volume's server lives. It asks for the lock's holder and never takes the lock, not even for a
// moment, in which a server that is being started would be refused it.
func alive(run string) bool {
	f, err := os.Open(filepath.Join(run, "lock"))
	if err != nil {
		return false
	}
	defer f.Close()
	l := unix.Flock_t{Type: unix.F_RDLCK}
	return unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &l) == nil && l.Type != unix.F_UNLCK
}

func readReport(run string) (report, error) {
	var r report
	b, err := os.ReadFile(filepath.Join(run, "status.json"))
	if err == nil {
		err = json.Unmarshal(b, &r)
	}
	return r, err
}

func writeReport(run string, r report) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	p := filepath.Join(run, "status.json")
	if err := os.WriteFile(p+".tmp", b, 0o600); err != nil {
		return err
	}
	return os.Rename(p+".tmp", p)
}

func kindOf(err error) string {
	switch {
	case errors.Is(err, ErrLost):
		return "lost"
	case errors.Is(err, ErrKey):
		return "key"
	case errors.Is(err, ErrFormat):
		return "format"
	}
	return ""
}

// safe makes an error's text fit for JSON. No error here holds a key.
func safe(err error) string { return strings.ToValidUTF8(err.Error(), "?") }
