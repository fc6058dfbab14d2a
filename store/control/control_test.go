package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/disperse"
	"holdfast/store"
	"holdfast/store/s3"
)

// front is a front end without S3, and what asks it.
type front struct {
	t       *testing.T
	dir     string
	root    store.Root
	keys    *store.Keys
	store   *store.Store
	members *Members
	log     *bytes.Buffer
	refused atomic.Int64
	stop    func()
	*Client
}

func newFront(t *testing.T, dir string, root store.Root, named ...Place) *front {
	t.Helper()
	f := &front{t: t, dir: dir, root: root, log: &bytes.Buffer{}}
	log := slog.New(slog.NewTextHandler(f.log, nil))
	file := filepath.Join(dir, "keys")
	var err error
	if f.keys, err = store.LoadKeys(file); err != nil {
		f.keys, err = root.Keys(0)
		f.ok(err)
		f.ok(store.SaveKeys(file, f.keys))
	}
	otherwise := []Place{{Path: "l/f1", Farm: "f1"}, {Path: "l/f2", Farm: "f2"}, {Path: "l/f3", Farm: "f3"}}
	f.members, err = OpenMembers(MembersConfig{Dir: dir, Keys: f.keys, Log: log}, named, otherwise)
	f.ok(err)
	scheme := disperse.Scheme{K: 2, N: 3}
	f.store, err = store.Open(t.Context(), store.Config{Dir: filepath.Join(dir, "front"), Keys: f.keys, Members: f.members.All(), Scheme: scheme, Fragile: true, Timeout: 5 * time.Second})
	f.ok(err)
	f.ok(f.members.Settle(f.store))
	l, err := Listen(dir, func(uint32) { f.refused.Add(1) })
	f.ok(err)
	var admin *s3.Admin
	// An Admin comes from a server that runs; this one ends before it listens.
	over, cancel := context.WithCancel(t.Context())
	s3.Run(over, s3.Config{Store: f.store, Listen: "127.0.0.1:0", Access: "root", Secret: "rootsecretrootsecret", Admin: func(a *s3.Admin) { admin = a; cancel() }})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 2)
	go func() {
		done <- Serve(ctx, Config{Listener: l, Store: f.store, Members: f.members, Admin: admin, Scheme: scheme, Keys: func() (*store.Keys, error) { return store.LoadKeys(file) }, Log: log})
	}()
	go func() { done <- f.members.Run(ctx) }()
	f.stop = func() {
		cancel()
		for range 2 {
			if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		}
		if err := errors.Join(f.store.Close(), f.members.Close()); err != nil {
			t.Error(err)
		}
		f.stop = func() {}
	}
	t.Cleanup(func() { f.stop() })
	f.Client, err = Dial(dir)
	f.ok(err)
	return f
}

func (f *front) ok(err error) {
	f.t.Helper()
	if err != nil {
		f.t.Fatal(err)
	}
}

func (f *front) keep(n int) {
	f.t.Helper()
	for i := range n {
		body, err := f.store.Write(f.t.Context(), "", strings.NewReader(strings.Repeat(fmt.Sprint(i, " "), 100_000)), -1)
		f.ok(err)
		f.ok(f.store.Update(f.t.Context(), func(tx store.Tx) error {
			tx.Keep(body)
			tx.Set([]byte{'o', byte(i)}, []byte("there"))
			return nil
		}))
	}
}

func TestOnlyTheSameUserIsAnswered(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("another user can be played by root only")
	}
	f := newFront(t, t.TempDir(), store.NewRoot())
	// What the modes of files hold off already is let through, so that the answer is the socket's own.
	at := filepath.Join(f.dir, socketDir)
	for p := f.dir; p != "/"; p = filepath.Dir(p) {
		os.Chmod(p, 0o777)
	}
	f.ok(os.Chmod(at, 0o777))
	f.ok(os.Chmod(filepath.Join(at, socketName), 0o777))
	ask := func(uid int) (string, error) {
		var text string
		var err error
		done := make(chan struct{})
		go func() {
			defer close(done)
			runtime.LockOSThread() // the thread that is another user ends with this goroutine
			if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), uintptr(uid), ^uintptr(0)); e != 0 {
				err = e
				return
			}
			fd, e := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
			if e != nil {
				err = e
				return
			}
			defer unix.Close(fd)
			if err = unix.Connect(fd, &unix.SockaddrUnix{Name: socketName}); err != nil {
				return
			}
			unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5})
			unix.Write(fd, []byte("GET /v1/users HTTP/1.0\r\n\r\n"))
			b := make([]byte, 64<<10)
			n, e := unix.Read(fd, b)
			text, err = string(b[:max(n, 0)]), e
		}()
		<-done
		return text, err
	}
	t.Chdir(at)
	if got, err := ask(0); err != nil || !strings.Contains(got, "200 OK") || !strings.Contains(got, "root") {
		t.Fatalf("control: the same user is answered %q, %v", got, err)
	}
	if got, err := ask(65534); got != "" || errors.Is(err, unix.EACCES) {
		t.Errorf("another user is answered %q, %v", got, err)
	}
	for range 500 { // his end sees the close before the server has said so
		if f.refused.Load() > 0 {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if f.refused.Load() != 1 {
		t.Errorf("%d were refused", f.refused.Load())
	}
}

func TestAnotherUsersSocketIsNotAsked(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("another user can be played by root only")
	}
	dir := t.TempDir()
	at := filepath.Join(dir, socketDir)
	if err := os.Mkdir(at, 0o777); err != nil {
		t.Fatal(err)
	}
	for p := at; p != "/"; p = filepath.Dir(p) {
		os.Chmod(p, 0o777)
	}
	t.Chdir(at)
	for _, uid := range []int{0, 65534} {
		os.Remove(socketName)
		ready, over := make(chan error), make(chan struct{})
		go func() {
			runtime.LockOSThread()
			if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), uintptr(uid), ^uintptr(0)); e != 0 {
				ready <- e
				return
			}
			fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
			if err == nil {
				defer unix.Close(fd)
				err = errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: socketName}), unix.Listen(fd, 5))
			}
			ready <- err
			<-over
		}()
		if err := <-ready; err != nil {
			t.Fatal(err)
		}
		c, err := Dial(dir)
		if close(over); (err == nil) != (uid == 0) || uid != 0 && !strings.Contains(err.Error(), "user 65534 answers") {
			t.Errorf("a socket of user %d: %v, %v", uid, c, err)
		}
	}
}

func TestTheSocketIsPrivate(t *testing.T) {
	// The directory is there already, and open to all; a socket of an earlier process is left.
	dir := filepath.Join(t.TempDir(), strings.Repeat("long", 40))
	for _, d := range []string{dir, filepath.Join(dir, socketDir)} {
		if err := os.Mkdir(d, 0o777); err != nil {
			t.Fatal(err)
		}
		os.Chmod(d, 0o777)
	}
	l, err := Listen(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	l.(*listener).SetUnlinkOnClose(false)
	l.Close()
	if _, err := Dial(dir); !errors.Is(err, ErrNotRunning) {
		t.Errorf("a socket that nobody listens on: %v", err)
	}
	if l, err = Listen(dir, nil); err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for name, want := range map[string]os.FileMode{socketDir: 0o700, socketDir + "/" + socketName: 0o600} {
		if st, err := os.Lstat(filepath.Join(dir, name)); err != nil || st.Mode().Perm() != want {
			t.Errorf("%s: mode %v, %v", name, st.Mode(), err)
		}
	}
	if _, err := Dial(t.TempDir()); !errors.Is(err, ErrNotRunning) {
		t.Errorf("a directory without a socket: %v", err)
	}
	// A link in its place is not followed.
	other := t.TempDir()
	if err := os.Symlink(filepath.Join(dir, socketDir), filepath.Join(other, socketDir)); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(other, nil); err == nil {
		t.Error("the directory of the socket is a link")
	}
}

func TestAFrontEndIsLookedAfter(t *testing.T) {
	ctx := t.Context()
	f := newFront(t, t.TempDir(), store.NewRoot())
	f.keep(5)
	st, err := f.Status(ctx)
	f.ok(err)
	if st.Scheme != "2/3" || st.Segments != 5 || st.Degraded != 0 || st.Durable["2/3"]["3"] < 5 || len(st.Locations) != 3 || st.Locations[0].At != "l/f1" || !st.Locations[0].Answers {
		t.Errorf("status %+v", st)
	}
	if got, err := f.Scrub(ctx, Scrub{}, nil); err != nil || got.Shards < 15 || got.Missing > 0 {
		t.Errorf("scrub: %+v, %v", got, err)
	}
	// Two lists of all shards, and progress while they are read slowly.
	var heard []Progress
	got, err := f.Scrub(ctx, Scrub{Deep: true, Rate: 1 << 20}, func(p Progress) { heard = append(heard, p) })
	if err != nil || got.Shards < 15 || got.Missing > 0 || got.Bytes < 1<<20 {
		t.Errorf("deep scrub: %+v, %v", got, err)
	}
	if len(heard) == 0 || heard[0].Of < 15 || heard[0].Unit != "shards" {
		t.Errorf("progress %+v", heard)
	}
	if got, err := f.Audit(ctx, Audit{Count: 20}, nil); err != nil || got.Passed != 20 {
		t.Errorf("audit: %+v, %v", got, err)
	}
	if got, err := f.Repair(ctx, Repair{}, nil); err != nil || got.Queue != 0 {
		t.Errorf("repair: %+v, %v", got, err)
	}
	for name, x := range map[string]struct{ method, path, body string }{
		"a rate below zero":     {"POST", "repair", `{"rate": -1}`},
		"an audit of nothing":   {"POST", "audit", `{"count": 0}`},
		"an unknown field":      {"POST", "scrub", `{"speed": 1}`},
		"a location without ID": {"POST", "locations/zz/drain", `{}`},
		"an unknown location":   {"POST", "locations/" + strings.Repeat("0", 32) + "/undrain", `{}`},
		"no location":           {"POST", "locations", `{"location": "http://x/y,farm=f"}`},
		"a user without a name": {"POST", "users", `{"access_key": "", "role": "user"}`},
		"too much":              {"POST", "users", `{"access_key": "` + strings.Repeat("a", maxRequest) + `"}`},
		"another path":          {"GET", "keys", ``},
	} {
		r, err := http.NewRequest(x.method, "http://x/v1/"+x.path, strings.NewReader(x.body))
		f.ok(err)
		a, err := f.http.Do(r)
		f.ok(err)
		b, _ := io.ReadAll(a.Body)
		if a.Body.Close(); a.StatusCode < 400 || a.StatusCode > 499 {
			t.Errorf("%s: %d %s", name, a.StatusCode, b)
		}
	}
}

func TestALocationIsReplacedForGood(t *testing.T) {
	ctx := t.Context()
	dir, root := t.TempDir(), store.NewRoot()
	f := newFront(t, dir, root)
	f.keep(5)
	st, err := f.Status(ctx)
	f.ok(err)
	gone := st.Locations[1].ID
	disk := t.TempDir()
	at := filepath.Join(disk, "f4")
	if _, err := f.AddLocation(ctx, Place{Path: "f4", Farm: "f4"}); err == nil {
		t.Error("a path that depends on where somebody is was taken")
	}
	if _, err := f.AddLocation(ctx, Place{Path: filepath.Join(disk, "none", "\x01"), Farm: "f1"}); err == nil || !strings.Contains(err.Error(), "already") {
		t.Errorf("a directory of a farm that has one: %v", err)
	}
	if _, err := f.RemoveLocation(ctx, gone, nil); err == nil || !strings.Contains(err.Error(), "drain it first") {
		t.Errorf("remove one in use: %v", err)
	}
	if _, err := f.AddLocation(ctx, Place{Path: at, Farm: "f4"}); err != nil {
		t.Fatal(err)
	}
	moved, err := f.Drain(ctx, gone, Repair{}, nil)
	if err != nil || moved.Shards < 5 || moved.Left != 0 {
		t.Fatalf("drain: %+v, %v", moved, err)
	}
	f.ok(f.Undrain(ctx, gone))
	if _, err := f.Drain(ctx, gone, Repair{}, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := f.RemoveLocation(ctx, gone, nil); err != nil {
		t.Fatal(err)
	}
	want := []string{"f1", "f3", "f4"}
	check := func(when string, f *front) {
		t.Helper()
		st, err := f.Status(ctx)
		f.ok(err)
		var have []string
		for _, l := range st.Locations {
			if l.State == "active" && l.Answers && l.At != "" && l.Shards > 0 {
				have = append(have, l.Farm)
			}
		}
		if fmt.Sprint(have) != fmt.Sprint(want) || st.Degraded > 0 || st.Segments < 5 {
			t.Errorf("%s: %v, %d of %d degraded", when, have, st.Degraded, st.Segments)
		}
	}
	check("at once", f)
	f.stop()
	f = newFront(t, dir, root)
	check("after a start", f)
	f.stop()
	// With the command line of the first day it is the same, and it says so.
	f = newFront(t, dir, root, Place{Path: "l/f1", Farm: "f1"}, Place{Path: "l/f2", Farm: "f2"}, Place{Path: "l/f3", Farm: "f3"})
	check("after a start with old flags", f)
	for _, said := range []string{`"a location is named that was removed: it is not used, holdfast location add has it back" location="l/f2,farm=f2"`, `though the command line does not name it" location="` + at + `,farm=f4"`} {
		if !strings.Contains(f.log.String(), said) {
			t.Errorf("%s\ndoes not say %s", f.log, said)
		}
	}
	f.stop()
	// So it is when the list is lost.
	f.ok(os.Remove(filepath.Join(dir, listFile)))
	f = newFront(t, dir, root, Place{Path: "l/f1", Farm: "f1"}, Place{Path: "l/f2", Farm: "f2"}, Place{Path: "l/f3", Farm: "f3"}, Place{Path: at, Farm: "f4"})
	check("after a start without a list", f)
	// It can come back, by name.
	if _, err := f.AddLocation(ctx, Place{Path: filepath.Join(dir, "l/f2"), Farm: "f2"}); err != nil {
		t.Fatal(err)
	}
	if got := len(f.members.Places()); got != 4 {
		t.Errorf("%d locations", got)
	}
}

func TestAnAddThatFailsLeavesNothing(t *testing.T) {
	ctx := t.Context()
	f := newFront(t, t.TempDir(), store.NewRoot())
	f.keep(1)
	before, err := os.ReadFile(filepath.Join(f.dir, listFile))
	f.ok(err)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	f.ok(err)
	addr := l.Addr().String()
	l.Close()
	if _, err := f.AddLocation(ctx, Place{Addr: addr, Pin: [32]byte{1}, Farm: "f4"}); err == nil || !strings.Contains(err.Error(), "refused") {
		t.Errorf("a location that nobody is: %v", err)
	}
	// One that has another store's log.
	other := newFront(t, t.TempDir(), store.NewRoot())
	other.keep(1)
	other.stop()
	if _, err := f.AddLocation(ctx, Place{Path: filepath.Join(other.dir, "l/f1"), Farm: "f9"}); err == nil || !strings.Contains(err.Error(), "another store") {
		t.Errorf("another store's location: %v", err)
	}
	after, err := os.ReadFile(filepath.Join(f.dir, listFile))
	if f.ok(err); !bytes.Equal(before, after) {
		t.Errorf("the list became %s", after)
	}
	if st, err := f.Status(ctx); err != nil || len(st.Locations) != 3 {
		t.Errorf("%+v, %v", st, err)
	}
}

func TestKeysRotateFromTheirFile(t *testing.T) {
	ctx := t.Context()
	f := newFront(t, t.TempDir(), store.NewRoot())
	f.keep(5)
	file := filepath.Join(f.dir, "keys")
	strange, err := store.NewRoot().Keys(1)
	f.ok(err)
	f.ok(store.SaveKeys(file, strange))
	if _, err := f.Rotate(ctx, nil); err == nil || !strings.Contains(err.Error(), "the phrase is wrong") {
		t.Errorf("another store's keys: %v", err)
	}
	next, err := f.root.Keys(1)
	f.ok(err)
	f.ok(store.SaveKeys(file, next))
	if got, err := f.Rotate(ctx, nil); err != nil || got.KeyEpoch != 1 || got.Changed < 5 || got.Left > 0 {
		t.Errorf("%+v, %v", got, err)
	}
	if st, err := f.Status(ctx); err != nil || st.KeyEpoch != 1 || st.OldKey > 0 {
		t.Errorf("%+v, %v", st, err)
	}
}

func TestWhoLeavesEndsWhatHeAskedFor(t *testing.T) {
	f := newFront(t, t.TempDir(), store.NewRoot())
	f.keep(5)
	ctx, cancel := context.WithCancel(t.Context())
	begin := time.Now()
	_, err := f.Scrub(ctx, Scrub{Deep: true, Rate: 1000}, func(Progress) { cancel() })
	if !errors.Is(err, context.Canceled) || time.Since(begin) > 30*time.Second {
		t.Fatalf("%v after %v", err, time.Since(begin))
	}
	// One scrub runs at a time: this one would wait for the other.
	ctx, cancel = context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if _, err := f.Scrub(ctx, Scrub{}, nil); err != nil {
		t.Errorf("the next one: %v", err)
	}
}

func TestPlaces(t *testing.T) {
	const url = "holdfast-location://a.example:7000/0000000000000000000000000000000000000000000000000000000000000001"
	for text, want := range map[string]string{
		url + ",farm=anna":                  "",
		"/mnt/a,b,farm=f1":                  "",
		"locations/f1,farm=f1":              "",
		url:                                 "farm=NAME is missing",
		url + ",farm=":                      "a name has letters",
		url + ",farm=a b":                   "a name has letters",
		url + ",farm=a\x1b[2J":              "a name has letters",
		"http://a:1/x,farm=f":               "it is not holdfast-location://",
		url + "?x=1,farm=f":                 "it is not holdfast-location://",
		"holdfast-location://a:1/12,farm=f": "not 64 hexadecimal digits",
		",farm=f":                           "neither an address nor a directory",
		"":                                  "neither an address nor a directory",
	} {
		p, err := ParsePlace(text)
		if want == "" && (err != nil || p.String() != text) || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%q: %v, %v", text, p, err)
		}
	}
}

func FuzzList(f *testing.F) {
	f.Add([]byte(`{"locations":["l/f1,farm=f1","holdfast-location://a:1/0000000000000000000000000000000000000000000000000000000000000001,farm=g"],"removed":["x,farm=h"]}`))
	f.Add([]byte(`{"locations":["l/f1,farm=f1","l/f2,farm=f1"]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		at, removed, err := parseList(b)
		if err != nil {
			return
		}
		var l list
		for _, p := range at {
			l.Locations = append(l.Locations, p.String())
		}
		for _, p := range removed {
			l.Removed = append(l.Removed, p.String())
		}
		b, err = json.Marshal(l)
		if err != nil {
			t.Fatal(err)
		}
		again, gone, err := parseList(b)
		if err != nil || fmt.Sprint(again, gone) != fmt.Sprint(at, removed) {
			t.Errorf("%s: %v %v, %v", b, again, gone, err)
		}
	})
}
