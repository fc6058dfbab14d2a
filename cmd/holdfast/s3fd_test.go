package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"holdfast/contract"
	"holdfast/disperse"
	"holdfast/node"
	"holdfast/store"
	"holdfast/store/location"
)

// placesOf runs n locations of one store, on as many farms.
func placesOf(t *testing.T, root store.Root, n int) (places []node.Place, dirs []string) {
	t.Helper()
	front, recovery, err := root.Pins()
	if err != nil {
		t.Fatal(err)
	}
	for i := range n {
		seed := location.Seed{9, byte(i)}
		cert, err := location.Certificate(seed)
		if err != nil {
			t.Fatal(err)
		}
		pin, err := location.PinOf(seed)
		if err != nil {
			t.Fatal(err)
		}
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		s, err := location.NewServer(location.ServerConfig{Listener: l, Certificate: cert, Path: dir, Scrub: -1, Stores: []location.Store{{Name: "c", Keys: []location.Key{
			{Pin: front, Rights: location.Read | location.Write | location.Delete}, {Pin: recovery, Rights: location.Recover},
		}}}})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- s.Run(ctx) }()
		t.Cleanup(func() { cancel(); <-done })
		addr := netip.MustParseAddrPort(l.Addr().String())
		places = append(places, node.Place{ID: disperse.Place(pin[:16]), Node: fmt.Sprint("node-", i), Farm: fmt.Sprint("farm-", i), Addr: addr, Pin: pin, Up: true})
		dirs = append(dirs, dir)
	}
	return places, dirs
}

// aFront is a front end as a node starts it.
type aFront struct {
	*testing.T
	cmd  *exec.Cmd
	in   *os.File
	addr string
	out  chan string
	done chan error
	log  *bytes.Buffer
}

func startFront(t *testing.T, dir string, fe contract.FrontEnd, places []node.Place, more ...node.Place) *aFront {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	file, err := l.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	f := &aFront{T: t, in: w, addr: l.Addr().String(), out: make(chan string, 10), done: make(chan error, 1), log: &bytes.Buffer{}}
	f.cmd = exec.Command(self, "run", "s3", "--front")
	f.cmd.Args[0] = "holdfast"
	f.cmd.Stdin, f.cmd.ExtraFiles, f.cmd.Stderr, f.cmd.Env = r, []*os.File{file}, f.log, []string{"PATH=/bin"}
	out, err := f.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := f.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		for s := bufio.NewScanner(out); s.Scan(); {
			f.out <- s.Text()
		}
		f.done <- f.cmd.Wait()
	}()
	t.Cleanup(func() { f.cmd.Process.Kill(); w.Close() })
	user := 0
	if os.Geteuid() == 0 {
		user = 748_010
		if err := os.Chown(dir, user, user); err != nil {
			t.Fatal(err)
		}
	}
	var ports []uint16
	for _, p := range append(slices.Clone(places), more...) {
		ports = append(ports, p.Addr.Port())
	}
	f.tell(node.Front{Dir: dir, User: user, Ports: ports, FrontEnd: fe, Places: places})
	return f
}

// held reads from the kernel that the front end is confined.
func (f *aFront) held() {
	f.Helper()
	if os.Geteuid() != 0 {
		return
	}
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", f.cmd.Process.Pid))
	if err != nil || len(tasks) < 2 {
		f.Fatalf("%d threads, %v", len(tasks), err)
	}
	for _, task := range tasks {
		b, err := os.ReadFile(task)
		if err != nil {
			continue // it has ended
		}
		for _, want := range []string{"Uid:\t748010\t748010\t748010\t748010\n", "Groups:\t \n", "CapEff:\t0000000000000000\n", "CapBnd:\t0000000000000000\n", "NoNewPrivs:\t1\n", "Seccomp:\t2\n"} {
			if !strings.Contains(string(b), want) {
				f.Errorf("%s has no %q:\n%s", task, want, b)
				return
			}
		}
	}
	if root, err := os.Readlink(fmt.Sprintf("/proc/%d/root", f.cmd.Process.Pid)); err != nil || root == "/" {
		f.Errorf("its root is %s, %v", root, err)
	}
}

func (f *aFront) tell(m node.Front) {
	f.Helper()
	b, err := json.Marshal(m)
	if err != nil {
		f.Fatal(err)
	}
	if _, err := f.in.Write(append(b, '\n')); err != nil {
		f.Fatal(err)
	}
}

// ask returns status and body of a signed request, tried until the front end answers.
func (f *aFront) ask(fe contract.FrontEnd, method, path string, body []byte) (int, string) {
	f.Helper()
	for begin := time.Now(); ; time.Sleep(100 * time.Millisecond) {
		ctx, cancel := context.WithTimeout(f.Context(), 20*time.Second)
		resp, err := http.DefaultClient.Do(signed(method, f.addr, path, body, fe.Access, fe.Secret).WithContext(ctx))
		if err == nil {
			b, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			cancel()
			if err != nil {
				f.Fatal(err)
			}
			return resp.StatusCode, string(b)
		}
		cancel()
		if time.Since(begin) > 40*time.Second {
			f.Fatalf("%s %s: %v\n%s", method, path, err, f.log)
		}
	}
}

func (f *aFront) ended(what string) error {
	f.Helper()
	select {
	case err := <-f.done:
		return err
	case <-time.After(30 * time.Second):
		f.Fatalf("%s, and it goes on\n%s", what, f.log)
		return nil
	}
}

// A front end takes its contract's buckets over wherever it is started, and the one before it is shut out and says so.
func TestAFrontEndOfAContract(t *testing.T) {
	root := store.NewRoot()
	keys, err := root.Keys(0)
	if err != nil {
		t.Fatal(err)
	}
	fe := contract.FrontEnd{
		Store: [32]byte{1}, Keys: keys.Marshal(), Access: "HFACCESSACCESSAC", Secret: "secretsecretsecretse",
		Buckets: []contract.Bucket{{Name: "avatars", Versioning: true}, {Name: "uploads"}},
	}
	places, locations := placesOf(t, root, 6)
	dirs := []string{t.TempDir(), t.TempDir()}
	first := startFront(t, dirs[0], fe, places)
	const marker = "MARKER-of-an-object-that-only-the-contract-sees"
	if code, body := first.ask(fe, "PUT", "/uploads/a", []byte(marker)); code != 200 {
		t.Fatalf("%d %s\n%s", code, body, first.log)
	}
	for path, versions := range map[string]bool{"/avatars/a": true, "/uploads/c": false} {
		resp, err := http.DefaultClient.Do(signed("PUT", first.addr, path, []byte("x"), fe.Access, fe.Secret))
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != 200 || (resp.Header.Get("X-Amz-Version-Id") != "") != versions {
			t.Errorf("%s: %d, version %q", path, resp.StatusCode, resp.Header.Get("X-Amz-Version-Id"))
		}
	}
	first.held()
	stranger := fe
	stranger.Secret = "another-secret-of-16"
	if code, _ := first.ask(stranger, "GET", "/uploads/a", nil); code != 403 {
		t.Errorf("with another secret: %d", code)
	}
	// No secret is where other processes of the machine see it, and nothing is on the locations that could be read.
	for _, file := range []string{"cmdline", "environ"} {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", first.cmd.Process.Pid, file))
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(b), fe.Secret) || strings.Contains(string(b), fe.Access) {
			t.Errorf("%s: %q", file, b)
		}
	}
	planted := t.TempDir()
	if err := os.WriteFile(filepath.Join(planted, "plain"), []byte("x"+marker), 0o600); err != nil {
		t.Fatal(err)
	}
	if !holds(t, planted, marker) {
		t.Error("control: the search does not find what is there")
	}
	for _, d := range locations {
		if holds(t, d, marker) || holds(t, d, "uploads") {
			t.Errorf("%s holds it", d)
		}
	}

	// The node of the first has been cut off, and does not know.
	second := startFront(t, dirs[1], fe, places)
	if code, body := second.ask(fe, "GET", "/uploads/a", nil); code != 200 || body != marker {
		t.Fatalf("%d %q\n%s", code, body, second.log)
	}
	if err := first.ended("another has its store"); err == nil {
		t.Error("it ended as if it had been asked to")
	}
	if said := <-first.out; said != node.FrontTaken {
		t.Errorf("it said %q", said)
	}
	if code, body := second.ask(fe, "PUT", "/uploads/b", []byte("later")); code != 200 {
		t.Errorf("%d %s", code, body)
	}

	// Its agent dies.
	second.in.Close()
	if err := second.ended("its input has ended"); err != nil {
		t.Errorf("%v\n%s", err, second.log)
	}
}

func holds(t *testing.T, dir, text string) (found bool) {
	t.Helper()
	if err := filepath.WalkDir(dir, func(p string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(p)
		found = found || bytes.Contains(b, []byte(text))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return found
}

// A store begins only where all its shards have a place, and when that is so it does, without being started again.
func TestAFrontEndWaitsForLocations(t *testing.T) {
	root := store.NewRoot()
	keys, err := root.Keys(0)
	if err != nil {
		t.Fatal(err)
	}
	fe := contract.FrontEnd{Store: [32]byte{1}, Keys: keys.Marshal(), Access: "HFACCESSACCESSAC", Secret: "secretsecretsecretse", Buckets: []contract.Bucket{{Name: "uploads"}}}
	places, _ := placesOf(t, root, 6)
	f := startFront(t, t.TempDir(), fe, places[:5], places[5:]...)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	if resp, err := http.DefaultClient.Do(signed("GET", f.addr, "/uploads", nil, fe.Access, fe.Secret).WithContext(ctx)); err == nil {
		resp.Body.Close()
		t.Errorf("on five farms it answers %d", resp.StatusCode)
	}
	f.tell(node.Front{Places: places})
	if code, body := f.ask(fe, "PUT", "/uploads/a", []byte("x")); code != 200 {
		t.Errorf("%d %s\n%s", code, body, f.log)
	}
}
