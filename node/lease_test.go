package node

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// tmpfs mounts a small one.
func tmpfs(t *testing.T, size string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=700,size="+size); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

// A tenant's image fills the tmpfs to its last page.
func TestTheLeaseIsRenewedOnAFullTmpfs(t *testing.T) {
	dir := tmpfs(t, "1m")
	l := &lease{path: filepath.Join(dir, "lease")}
	if err := l.open(); err != nil {
		t.Fatal(err)
	}
	defer l.close()
	if err := os.WriteFile(filepath.Join(dir, "layers"), make([]byte, 2<<20), 0o600); err == nil {
		t.Fatal("control: the tmpfs is not full")
	}
	if err := os.WriteFile(filepath.Join(dir, "more"), []byte("x"), 0o600); err == nil {
		t.Fatal("control: the tmpfs takes another file")
	}
	until := bootTime() + time.Hour
	if err := l.renew(until); err != nil || !l.ok() {
		t.Errorf("renew: %v, ok %v", err, l.ok())
	}
	b, err := os.ReadFile(l.path)
	if err != nil || len(b) != 24 || time.Duration(binary.LittleEndian.Uint64(b)) != until {
		t.Errorf("the watchdogs read %x: %v", b, err)
	}
	// An agent that starts now goes on with it.
	next := &lease{path: l.path}
	if err := next.open(); err != nil || !next.ok() {
		t.Errorf("the next agent: %v, ok %v", err, next.ok())
	}
	defer next.close()
	if err := next.renew(until + 1); err != nil {
		t.Error(err)
	}
}

// What cannot be written is not believed either: agent and watchdogs never differ.
func TestALeaseThatCannotBeWrittenIsNotBelieved(t *testing.T) {
	l := &lease{path: filepath.Join(t.TempDir(), "lease")}
	if err := l.open(); err != nil {
		t.Fatal(err)
	}
	l.file.Close()
	if err := l.renew(bootTime() + time.Hour); err == nil || l.ok() {
		t.Errorf("renew: %v, ok %v", err, l.ok())
	}
}

// The clock began anew with the boot; a deadline of the boot before lies far ahead.
func TestALeaseDoesNotSurviveAReboot(t *testing.T) {
	l := &lease{path: filepath.Join(t.TempDir(), "lease")}
	if err := l.open(); err != nil {
		t.Fatal(err)
	}
	if err := l.renew(bootTime() + 10*24*time.Hour); err != nil {
		t.Fatal(err)
	}
	l.close()
	same := &lease{path: l.path}
	if err := same.open(); err != nil || !same.ok() {
		t.Fatalf("control: an agent of the same boot: %v, ok %v", err, same.ok())
	}
	same.close()
	b, err := os.ReadFile(l.path)
	if err != nil {
		t.Fatal(err)
	}
	b[8] ^= 1 // another boot's
	if err := os.WriteFile(l.path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	for what, content := range map[string][]byte{"another boot": b, "no boot named": b[:8], "garbled": []byte("x"), "too long": append(b, 0)} {
		if err := os.WriteFile(l.path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		next := &lease{path: l.path}
		if err := next.open(); err != nil || next.ok() {
			t.Errorf("%s: %v, ok %v", what, err, next.ok())
		}
		if got, _ := os.ReadFile(l.path); len(got) != 24 || binary.LittleEndian.Uint64(got) != 0 {
			t.Errorf("%s: the watchdogs still read %x", what, got)
		}
		next.close()
	}
}

func TestRunMustBeOnATmpfs(t *testing.T) {
	if err := onTmpfs("/"); err == nil || !strings.Contains(err.Error(), "tmpfs") {
		var st unix.Statfs_t
		if unix.Statfs("/", &st) == nil && st.Type == unix.TMPFS_MAGIC {
			t.Skip("the root is a tmpfs")
		}
		t.Errorf("a disk: %v", err)
	}
	if err := onTmpfs(tmpfs(t, "64k")); err != nil {
		t.Errorf("control: %v", err)
	}
}
