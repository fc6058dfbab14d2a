package volume

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestMain plays the volume server.
func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == "serve-volume" {
		if err := Serve(context.Background(), os.Stdin); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if len(os.Args) == 3 && os.Args[1] == "everybody" {
		fmt.Fprintln(os.Stderr, everybody(os.Args[2]))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func manager(t testing.TB) *Manager {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	m, err := New(Config{Self: []string{self, "serve-volume"}, Dir: filepath.Join(dir, "disk"), Run: filepath.Join(dir, "run")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		open, _ := m.List(context.Background())
		for _, s := range open {
			if err := m.Close(context.Background(), s.ID); err != nil {
				t.Error(err)
			}
		}
	})
	return m
}

func spec(id string) Spec { return Spec{ID: id, Size: 64 << 20, Key: [32]byte{1, 2, 3}, Create: true} }

func open(t testing.TB, m *Manager, s Spec) string {
	t.Helper()
	dir, err := m.Open(context.Background(), s)
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestLife(t *testing.T) {
	m := manager(t)
	begin := time.Now()
	dir := open(t, m, spec("v"))
	t.Logf("create and open: %v", time.Since(begin))
	if again := open(t, m, spec("v")); again != dir {
		t.Errorf("opened twice at %s and %s", dir, again)
	}
	want := bytes.Repeat([]byte("data"), 1<<18)
	if err := os.WriteFile(filepath.Join(dir, "f"), want, 0o600); err != nil {
		t.Fatal(err)
	}
	begin = time.Now()
	if err := m.Close(t.Context(), "v"); err != nil {
		t.Fatal(err)
	}
	t.Logf("close: %v", time.Since(begin))
	if b, _ := os.ReadFile("/proc/self/mountinfo"); bytes.Contains(b, []byte(m.cfg.Run)) {
		t.Error("a mount is left")
	}
	s := spec("v")
	s.Create = false
	begin = time.Now()
	dir = open(t, m, s)
	t.Logf("open: %v", time.Since(begin))
	if got, err := os.ReadFile(filepath.Join(dir, "f")); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the data did not come back: %d bytes, %v", len(got), err)
	}
	if err := m.Close(t.Context(), "v"); err != nil {
		t.Fatal(err)
	}
	if err := m.Close(t.Context(), "v"); err != nil {
		t.Errorf("closing what is closed: %v", err)
	}
	fsck(t, m, s)
	if err := m.Destroy(t.Context(), "v"); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Open(t.Context(), s); !errors.Is(err, ErrLost) {
		t.Errorf("an absent disk: %v", err)
	}
}

// fsck copies the plain disk out and lets e2fsck judge it.
func fsck(t testing.TB, m *Manager, s Spec) {
	t.Helper()
	d, err := openImage(m.image(s.ID), s.ID, s.Key)
	if err != nil {
		t.Fatal(err)
	}
	defer d.f.Close()
	out := filepath.Join(t.TempDir(), "plain")
	f, err := os.Create(out)
	if err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 1<<20)
	for off := int64(0); off < d.size; off += int64(len(buf)) {
		if _, err := d.ReadAt(buf, off); err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt(buf, off); err != nil {
			t.Fatal(err)
		}
	}
	f.Close()
	if b, err := exec.Command("e2fsck", "-fn", out).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v\n%s", err, b)
	}
}

func TestTemplatesAreSound(t *testing.T) {
	for _, mib := range sizes()[:2] {
		p := filepath.Join(t.TempDir(), "img")
		if err := createImage(p, "x", mib<<20, [32]byte{1}); err != nil {
			t.Fatal(err)
		}
		m := &Manager{cfg: Config{Dir: filepath.Dir(p)}}
		os.Rename(p, m.image("x"))
		fsck(t, m, Spec{ID: "x", Key: [32]byte{1}})
	}
	for size, want := range map[int64]int64{1: 64 << 20, 64 << 20: 64 << 20, 64<<20 + 1: 256 << 20, 64 << 30: 64 << 30, 64<<30 + 1: 0} {
		if got := RoundUp(size); got != want {
			t.Errorf("%d is rounded up to %d, not %d", size, got, want)
		}
	}
}

func TestWrongKeyIsRefusedAndChangesNothing(t *testing.T) {
	m := manager(t)
	open(t, m, spec("v"))
	if err := m.Close(t.Context(), "v"); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(m.image("v"))
	if err != nil {
		t.Fatal(err)
	}
	for _, create := range []bool{false, true} {
		s := spec("v")
		s.Key[0]++
		s.Create = create
		if _, err := m.Open(t.Context(), s); !errors.Is(err, ErrKey) {
			t.Errorf("wrong key: %v", err)
		}
	}
	// Another volume's image under this one's name.
	if err := os.WriteFile(m.image("w"), before, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Open(t.Context(), spec("w")); !errors.Is(err, ErrFormat) {
		t.Errorf("another volume's image: %v", err)
	}
	if after, _ := os.ReadFile(m.image("v")); !bytes.Equal(before, after) {
		t.Error("the image changed")
	}
}

// forms are the shapes in which a marker might be on a disk.
func forms(m string) map[string][]byte {
	var wide, back []byte
	for i := range m {
		wide = append(wide, m[i], 0)
		back = append(back, m[len(m)-1-i])
	}
	b64 := base64.StdEncoding.EncodeToString([]byte(m))
	return map[string][]byte{"plain": []byte(m), "hex": []byte(hex.EncodeToString([]byte(m))), "base64": []byte(b64[:len(b64)-4]), "utf-16": wide, "reversed": back}
}

func search(t *testing.T, dir, marker string) (found []string) {
	t.Helper()
	filepath.Walk(dir, func(p string, st os.FileInfo, err error) error {
		if err != nil || !st.Mode().IsRegular() {
			return nil
		}
		b, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		for form, want := range forms(marker) {
			if bytes.Contains(b, want) || strings.Contains(p, string(want)) {
				found = append(found, form)
			}
		}
		return nil
	})
	return found
}

func TestDiskShowsNothingWithoutTheKey(t *testing.T) {
	m := manager(t)
	const marker = "uZ7-marker-that-must-not-be-on-disk"
	dir := open(t, m, spec("v"))
	all := bytes.Buffer{}
	for _, f := range forms(marker) {
		all.Write(f)
		all.WriteByte('\n')
	}
	for i := range 20 {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprint(marker, i)), bytes.Repeat(all.Bytes(), 50), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	unix.Sync()
	if found := search(t, m.cfg.Dir, marker); len(found) > 0 {
		t.Errorf("on disk: %v", found)
	}
	if found := search(t, dir, marker); len(found) < 5 {
		t.Errorf("control: the same search finds only %v in the clear", found)
	}
	// Nor does the key lie anywhere that others see.
	r, err := readReport(m.run("v"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{"cmdline", "environ"} {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", r.PID, f))
		if err != nil {
			t.Fatal(err)
		}
		key := spec("v").Key
		if bytes.Contains(b, key[:3]) || bytes.Contains(b, []byte(base64.StdEncoding.EncodeToString(key[:])[:20])) {
			t.Errorf("%s shows the key", f)
		}
	}
	if st, err := os.Stat(fmt.Sprintf("/proc/%d/mem", r.PID)); err == nil && st.Mode().Perm()&0o077 != 0 {
		t.Errorf("memory mode %v", st.Mode())
	}
}

func TestKilledServerLosesNothingThatWasSynced(t *testing.T) {
	m := manager(t)
	s := spec("v")
	acked := map[string]string{}
	for round := range 5 {
		dir := open(t, m, s)
		for name, want := range acked {
			got, err := os.ReadFile(filepath.Join(dir, name))
			if err != nil || string(got) != want {
				t.Fatalf("round %d: %s is lost: %q %v", round, name, got, err)
			}
		}
		r, err := readReport(m.run("v"))
		if err != nil {
			t.Fatal(err)
		}
		kill := time.AfterFunc(time.Duration(20+30*round)*time.Millisecond, func() { unix.Kill(r.PID, unix.SIGKILL) })
		for i := 0; ; i++ {
			name, data := fmt.Sprintf("f-%d-%d", round, i), fmt.Sprintf("content %d %d", round, i)
			f, err := os.Create(filepath.Join(dir, name))
			if err == nil {
				_, err = io.WriteString(f, data)
			}
			if err == nil {
				err = f.Sync()
			}
			if err == nil { // a new name is durable only with its directory
				var d *os.File
				if d, err = os.Open(dir); err == nil {
					err = d.Sync()
					d.Close()
				}
			}
			if f != nil {
				f.Close()
			}
			if err != nil {
				break
			}
			acked[name] = data
		}
		kill.Stop()
		for alive(m.run("v")) {
			time.Sleep(5 * time.Millisecond)
		}
		s.Create = false
	}
	if len(acked) < 5 {
		t.Fatalf("only %d writes were acknowledged: the test tests nothing", len(acked))
	}
	t.Logf("%d writes", len(acked))
	open(t, m, s)
	if err := m.Close(t.Context(), "v"); err != nil {
		t.Fatal(err)
	}
	fsck(t, m, s)
}

// A server is killed, once while it serves and once while it makes its image. Nobody opens these volumes again.
func TestSweepRemovesWhatDeadServersLeft(t *testing.T) {
	m := manager(t)
	if err := m.Sweep(); err != nil {
		t.Fatalf("there is nothing yet: %v", err)
	}
	open(t, m, spec("dead"))
	open(t, m, spec("lives"))
	mounts := func() (n int) {
		b, _ := os.ReadFile("/proc/self/mountinfo")
		return bytes.Count(b, []byte(m.cfg.Run+"/dead/"))
	}
	if !m.Serving("dead") || mounts() != 1 {
		t.Fatalf("control: serving %v, %d mounts", m.Serving("dead"), mounts())
	}
	r, err := readReport(m.run("dead"))
	if err != nil {
		t.Fatal(err)
	}
	unix.Kill(r.PID, unix.SIGKILL)
	for end := time.Now().Add(5 * time.Second); m.Serving("dead"); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("its death is not noticed")
		}
	}
	for _, f := range []string{making + "half.img", making + "1234", making + "lives.img"} {
		if err := os.WriteFile(filepath.Join(m.cfg.Dir, f), []byte("half"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := m.Sweep(); err != nil {
		t.Fatal(err)
	}
	if mounts() != 0 {
		t.Error("a dead server's mounts are left")
	}
	if _, err := os.Stat(m.run("dead")); err == nil {
		t.Error("a dead server's directory is left")
	}
	left, _ := filepath.Glob(filepath.Join(m.cfg.Dir, making+"*"))
	if len(left) != 1 || filepath.Base(left[0]) != making+"lives.img" {
		t.Errorf("left %v: half an image, or not that of a server that lives", left)
	}
	if !m.Serving("lives") {
		t.Error("a server that lives was swept")
	}
	// What was left half made is no hindrance and does not show in what is made after it.
	if err := os.WriteFile(filepath.Join(m.cfg.Dir, making+"half.img"), bytes.Repeat([]byte{1}, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	open(t, m, spec("half"))
	if err := m.Close(t.Context(), "half"); err != nil {
		t.Fatal(err)
	}
	fsck(t, m, spec("half"))
	dir := open(t, m, spec("dead"))
	if _, err := os.Stat(dir); err != nil {
		t.Error(err)
	}
}

func TestAForgottenKeyOpensNothing(t *testing.T) {
	m := manager(t)
	s := spec("v")
	s.Key = [32]byte{}
	if _, err := m.Open(t.Context(), s); err == nil || !strings.Contains(err.Error(), "zeros") {
		t.Errorf("a volume under a key of zeros: %v", err)
	}
	if _, err := os.Stat(m.image("v")); err == nil {
		t.Error("it was created")
	}
}

func TestSectors(t *testing.T) {
	p := filepath.Join(t.TempDir(), "img")
	if err := createImage(p, "x", 1, [32]byte{1}); err != nil {
		t.Fatal(err)
	}
	d, err := openImage(p, "x", [32]byte{1})
	if err != nil {
		t.Fatal(err)
	}
	defer d.f.Close()
	plain := bytes.Repeat([]byte{0xaa}, 64*Sector)
	if _, err := d.WriteAt(plain, 1<<20); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(plain))
	if _, err := d.ReadAt(got, 1<<20); err != nil || !bytes.Equal(got, plain) {
		t.Fatalf("round trip: %v", err)
	}
	raw := make([]byte, 2*Sector)
	d.f.ReadAt(raw, 1<<20+Sector)
	if bytes.Equal(raw[:Sector], raw[Sector:]) {
		t.Error("two sectors of the same plaintext look the same")
	}
	sum := sha256.Sum256(raw)
	if got := hex.EncodeToString(sum[:8]); got != "05589b945c6b8408" {
		t.Errorf("the format changed: %s", got)
	}
	if err := d.Discard(1<<20, 64*Sector); err != nil {
		t.Fatal(err)
	}
	if _, err := d.ReadAt(got, 1<<20); err != nil || !bytes.Equal(got, make([]byte, len(got))) {
		t.Error("a discarded sector is not zero")
	}
	for _, off := range []int64{-Sector, 1, d.size, d.size - Sector + 1} {
		if _, err := d.WriteAt(make([]byte, Sector), off); err == nil {
			t.Errorf("wrote at %d", off)
		}
	}
}

func FuzzHeader(f *testing.F) {
	h := &header{size: 64 << 20}
	f.Add(h.encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		if h, err := decodeHeader(b); err == nil && !bytes.Equal(h.encode(), b) {
			t.Fatal("a header has two encodings")
		}
	})
}

func BenchmarkDisk(b *testing.B) {
	p := filepath.Join(b.TempDir(), "img")
	if err := createImage(p, "x", 1, [32]byte{1}); err != nil {
		b.Fatal(err)
	}
	d, err := openImage(p, "x", [32]byte{1})
	if err != nil {
		b.Fatal(err)
	}
	defer d.f.Close()
	buf := make([]byte, 1<<20)
	b.Run("write 1 MiB", func(b *testing.B) {
		b.SetBytes(1 << 20)
		for i := 0; b.Loop(); i++ {
			d.WriteAt(buf, int64(i%32)<<20)
		}
	})
	b.Run("read 1 MiB", func(b *testing.B) {
		b.SetBytes(1 << 20)
		for i := 0; b.Loop(); i++ {
			d.ReadAt(buf, int64(i%32)<<20)
		}
	})
}

func BenchmarkMounted(b *testing.B) {
	m := manager(b)
	s := spec("v")
	s.Size = 256 << 20
	dir := open(b, m, s)
	buf := make([]byte, 1<<20)
	for name, where := range map[string]string{"volume": dir, "plain": b.TempDir()} {
		b.Run(name, func(b *testing.B) {
			f, err := os.Create(filepath.Join(where, "bench"))
			if err != nil {
				b.Fatal(err)
			}
			defer f.Close()
			b.SetBytes(64 << 20)
			for b.Loop() {
				for i := range 64 {
					f.WriteAt(buf, int64(i)<<20)
				}
				f.Sync()
			}
		})
	}
}

// everybody plays a node: process 1 of a namespace, with a volume and somebody who writes to it.
func everybody(dir string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	m, err := New(Config{Self: []string{self, "serve-volume"}, Dir: filepath.Join(dir, "disk"), Run: filepath.Join(dir, "run")})
	if err != nil {
		return err
	}
	for _, id := range []string{"v", "w"} {
		mnt, err := m.Open(context.Background(), spec(id))
		if err != nil {
			return err
		}
		go func() {
			for i := 0; ; i++ { // never synced: there is always something left to write when the plug is pulled
				os.WriteFile(filepath.Join(mnt, fmt.Sprint(i%16)), bytes.Repeat([]byte{byte(i)}, 256<<10), 0o600)
			}
		}()
	}
	fmt.Println("ready")
	select {}
}

// TestPullingThePlugEnds kills a node's processes all at once, while its volumes are written to: whoever of them leaves
// the mount last must not have to wait for one that is dead.
func TestPullingThePlugEnds(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for round := range 8 {
		cmd := exec.Command(self, "everybody", t.TempDir())
		cmd.Stderr = os.Stderr
		cmd.SysProcAttr = &unix.SysProcAttr{Cloneflags: unix.CLONE_NEWPID, Unshareflags: unix.CLONE_NEWNS}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		line := make([]byte, 6)
		if _, err := io.ReadFull(out, line); err != nil || string(line) != "ready\n" {
			t.Fatalf("round %d: %q %v", round, line, err)
		}
		time.Sleep(time.Duration(20*round) * time.Millisecond) // another moment each time
		cmd.Process.Kill()
		done := make(chan struct{})
		go func() { cmd.Wait(); close(done) }()
		select {
		case <-done:
		case <-time.After(20 * time.Second):
			t.Fatalf("round %d: process %d and what it started does not end", round, cmd.Process.Pid)
		}
	}
}

// TestWhatIsDeletedIsGivenBack asks the kernel for the unit in which the volume's device discards, and then the host's file
// system for what the image takes.
func TestWhatIsDeletedIsGivenBack(t *testing.T) {
	m := manager(t)
	s := spec("v")
	dir := open(t, m, s)
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(fmt.Sprintf("/sys/dev/block/%d:%d/queue/discard_granularity", unix.Major(st.Dev), unix.Minor(st.Dev)))
	if got := strings.TrimSpace(string(b)); err != nil || got != "4096" {
		t.Errorf("the device discards in units of %q bytes (%v)", got, err)
	}
	takes := func() int64 {
		var st unix.Stat_t
		if err := unix.Stat(m.image(s.ID), &st); err != nil {
			t.Fatal(err)
		}
		return st.Blocks * 512
	}
	name := filepath.Join(dir, "f")
	if err := os.WriteFile(name, bytes.Repeat([]byte("data"), 4<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	unix.Sync()
	full := takes()
	if err := os.Remove(name); err != nil {
		t.Fatal(err)
	}
	var left int64
	for range 100 {
		unix.Sync()
		if left = takes(); left < full-12<<20 {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	if full < 16<<20 || left >= full-12<<20 {
		t.Errorf("16 MiB were written and deleted: the image took %d bytes, and takes %d", full, left)
	}
	if err := m.Close(t.Context(), "v"); err != nil {
		t.Fatal(err)
	}
}
