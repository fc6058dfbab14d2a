package box

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// ErrLocked is returned when another process has the directory.
var ErrLocked = errors.New("another process supervises this grid")

// record is a box that was started, as DIR/boxes/NAME.json.
type record struct {
	Box    Box
	Digest string        // of its Spec and of what that names
	Cgroup string        `json:",omitempty"`
	Grace  time.Duration `json:",omitempty"`
	Uplink *Uplink       `json:",omitempty"`
	Router bool          `json:",omitempty"`
	Last   bool          `json:",omitempty"` // stops when the others have
}

func records(dir string) (map[string]record, error) {
	files, err := os.ReadDir(filepath.Join(dir, "boxes"))
	if errors.Is(err, fs.ErrNotExist) {
		return map[string]record{}, nil
	} else if err != nil {
		return nil, fmt.Errorf("boxes: %w", err)
	}
	out := map[string]record{}
	for _, f := range files {
		name, ok := strings.CutSuffix(f.Name(), ".json")
		if !ok {
			continue
		}
		var r record
		b, err := os.ReadFile(filepath.Join(dir, "boxes", f.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue // forgotten meanwhile
		}
		if err == nil {
			err = json.Unmarshal(b, &r)
		}
		if err != nil {
			return nil, fmt.Errorf("box %s: %w", name, err)
		}
		out[name] = r
	}
	return out, nil
}

// writeFile replaces a file at once. The power may fail: what is remembered of processes is worth nothing then.
func writeFile(path string, b []byte) error {
	if err := os.WriteFile(path+".tmp", b, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".tmp", path)
}

func remember(dir string, r record) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return writeFile(filepath.Join(dir, "boxes", r.Box.Name+".json"), b)
}

func forget(dir, name string) { os.Remove(filepath.Join(dir, "boxes", name+".json")) }

// Running returns the boxes of a grid that are alive.
func Running(dir string) (map[string]Box, error) {
	have, err := records(dir)
	if err != nil {
		return nil, err
	}
	out := map[string]Box{}
	for n, r := range have {
		if r.Box.Alive() {
			out[n] = r.Box
		}
	}
	return out, nil
}

// lock is the right to change a grid. The kernel lets go of it when its process dies.
type lock struct{ f *os.File }

// lockDir takes a grid's lock. Who ends or sweeps a grid has it for a moment, and is waited for; a supervisor is not.
func lockDir(ctx context.Context, dir string) (lock, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return lock{}, fmt.Errorf("lock: %w", err)
	}
	for end := time.Now().Add(settle); ; time.Sleep(10 * time.Millisecond) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return lock{f}, nil
		}
		pid := Supervisor(dir)
		if !errors.Is(err, unix.EWOULDBLOCK) || pid > 0 || ctx.Err() != nil || time.Now().After(end) {
			f.Close()
			if errors.Is(err, unix.EWOULDBLOCK) {
				return lock{}, fmt.Errorf("%w: %s has process %d", ErrLocked, dir, pid)
			}
			return lock{}, fmt.Errorf("lock %s: %w", dir, err)
		}
	}
}

// sign says that this process is the supervisor.
func (l lock) sign() error {
	_, began, err := stat(os.Getpid())
	if err == nil {
		_, err = l.f.WriteAt(fmt.Appendf(nil, "%d %d\n", os.Getpid(), began), 0)
	}
	if err != nil {
		return fmt.Errorf("lock: %w", err)
	}
	return nil
}

func (l lock) release() {
	l.f.Truncate(0)
	l.f.Close()
}

// Supervisor returns the process that supervises a grid, 0 when there is none. It takes no lock: asking never keeps
// anybody from starting.
func Supervisor(dir string) int {
	if b := supervisorOf(dir); b.Alive() {
		return b.PID
	}
	return 0
}

func supervisorOf(dir string) Box {
	b := Box{Name: "supervisor"}
	raw, err := os.ReadFile(filepath.Join(dir, "lock"))
	if err != nil {
		return b
	}
	if n, _ := fmt.Sscan(string(raw), &b.PID, &b.Start); n != 2 {
		return Box{}
	}
	return b
}

// Ask says what a box of a grid should be. The supervisor puts it into effect, also one that starts later.
func Ask(dir, name string, w Wanted) error {
	p := filepath.Join(dir, "lab", name)
	if w == Up {
		if err := os.Remove(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("lab: %w", err)
		}
		return nil
	}
	if err := writeFile(p, []byte(w)); err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	return nil
}

// Asked is what Ask said last.
func Asked(dir, name string) Wanted {
	b, err := os.ReadFile(filepath.Join(dir, "lab", name))
	if err != nil {
		return Up
	}
	return Wanted(strings.TrimSpace(string(b)))
}

// Await returns when the supervisor has put into effect what was asked.
func Await(ctx context.Context, dir, name string, w Wanted) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for {
		if b, err := os.ReadFile(filepath.Join(dir, "lab", name+".is")); err == nil && Wanted(b) == w {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s is not %q yet: %w", name, w, ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// StopAll ends the supervisor of a grid and everything that it started, alive or not. It keeps the data.
func StopAll(ctx context.Context, dir string) error {
	if sup := supervisorOf(dir); sup.Alive() {
		if err := sup.Stop(ctx, "", 90*time.Second); err != nil {
			return err
		}
	}
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	l, err := lockDir(ctx, dir)
	if err != nil {
		return err
	}
	defer l.release()
	return stopRecords(ctx, dir)
}

// stopRecords ends all boxes of a grid: together, then the last one, then the internet. It removes all that they had but
// data. The caller has the lock.
func stopRecords(ctx context.Context, dir string) error {
	have, err := records(dir)
	if err != nil {
		return err
	}
	rank := func(r record) int {
		switch {
		case r.Router:
			return 2
		case r.Last:
			return 1
		}
		return 0
	}
	var mu sync.Mutex
	var errs []error
	for turn := range 3 {
		var all sync.WaitGroup
		for n, r := range have {
			if rank(r) != turn {
				continue
			}
			all.Go(func() {
				grace := r.Grace
				if grace <= 0 {
					grace = defaultGrace
				}
				if machine.frozen(r.Cgroup) {
					grace = 0 // a machine that hangs cannot be asked
				}
				err := r.Box.Stop(ctx, r.Cgroup, grace+time.Second)
				mu.Lock()
				defer mu.Unlock()
				if err != nil {
					errs = append(errs, err)
					return
				}
				forget(dir, n)
			})
		}
		all.Wait()
	}
	if len(errs) == 0 {
		errs = append(errs, unregister(dir))
	}
	return errors.Join(errs...)
}

// registry holds one file for each grid of this machine, DIGEST.json: where it is and where its processes are. It is what
// finds the processes of a grid whose directory is gone.
const registry = "/run/holdfast/grids"

type entry struct {
	Dir        string
	Cgroup     string
	Supervisor Box
}

func entryPath(dir string) string {
	sum := sha256.Sum256([]byte(dir))
	return filepath.Join(registry, hex.EncodeToString(sum[:8])+".json")
}

func register(dir, cgroup string) error {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return fmt.Errorf("register: %w", err)
	}
	_, began, err := stat(os.Getpid())
	if err != nil {
		return fmt.Errorf("register: %w", err)
	}
	b, err := json.Marshal(entry{abs, cgroup, Box{Name: "supervisor", PID: os.Getpid(), Start: began}})
	if err != nil {
		return fmt.Errorf("register: %w", err)
	}
	if err := os.MkdirAll(registry, 0o700); err != nil {
		return fmt.Errorf("register: %w", err)
	}
	if err := writeFile(entryPath(abs), b); err != nil {
		return fmt.Errorf("register: %w", err)
	}
	return nil
}

// unregister ends what is left in a grid's cgroups, known or not, and forgets the grid.
func unregister(dir string) error {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	p := entryPath(abs)
	e, err := readEntry(p)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	if e.Cgroup != "" {
		if err := machine.end(e.Cgroup); err != nil {
			return err
		}
	}
	return os.Remove(p)
}

func readEntry(path string) (e entry, err error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return e, err
	}
	if err := json.Unmarshal(b, &e); err != nil {
		return e, fmt.Errorf("%s: %w", path, err)
	}
	return e, nil
}

// Sweep ends what runs, and removes what is left, of grids of this machine that are dead: their supervisor is, and either
// all their boxes are too, or their directory is gone, so that nobody can adopt them.
func Sweep(log *slog.Logger) error {
	files, err := filepath.Glob(filepath.Join(registry, "*.json"))
	if err != nil {
		return fmt.Errorf("sweep: %w", err)
	}
	var errs []error
	for _, p := range files {
		e, err := readEntry(p)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			var swept bool
			if swept, err = sweep(e); swept {
				log.Info("swept what a dead grid left", "dir", e.Dir)
			}
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("sweep: %w", err))
		}
	}
	return errors.Join(errs...)
}

func sweep(e entry) (bool, error) {
	if e.Supervisor.Alive() || Supervisor(e.Dir) > 0 {
		return false, nil
	}
	if _, err := os.Stat(filepath.Join(e.Dir, "boxes")); err == nil {
		f, err := os.OpenFile(filepath.Join(e.Dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			return false, err
		}
		defer f.Close()
		if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
			return false, nil // somebody is at it
		}
		running, err := Running(e.Dir)
		if err != nil || len(running) > 0 {
			return false, err
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	return true, unregister(e.Dir)
}
