package image

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/ulikunitz/xz"
)

// child is how TestMain knows that this binary is to build an image and say its digests.
const child = "HOLDFAST_IMAGE_CHILD"

func TestMain(m *testing.M) {
	if v := os.Getenv(child); v != "" {
		if err := buildInChild(v); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// job is what a child gets: it has another umask, and reads another environment.
type job struct {
	Config
	Pin   Pin
	Umask int
}

func buildInChild(v string) error {
	var j job
	if err := json.Unmarshal([]byte(v), &j); err != nil {
		return err
	}
	syscall.Umask(j.Umask)
	j.Config.pin = &j.Pin
	_, err := Build(context.Background(), j.Config)
	return err
}

// program64 is an ELF program that does nothing; it is dynamic if it names an interpreter.
func program64(kind uint16, interpreter string) []byte {
	b := make([]byte, 64+56)
	copy(b, "\x7fELF\x02\x01\x01")
	le := binary.LittleEndian
	le.PutUint16(b[16:], kind)
	le.PutUint16(b[18:], 62)
	le.PutUint32(b[20:], 1)
	le.PutUint64(b[32:], 64) // program headers
	le.PutUint16(b[52:], 64)
	le.PutUint16(b[54:], 56)
	le.PutUint16(b[56:], 1)
	le.PutUint32(b[64:], 1) // PT_LOAD
	if interpreter != "" {
		le.PutUint32(b[64:], 3)
		le.PutUint64(b[72:], uint64(len(b)))
		le.PutUint64(b[96:], uint64(len(interpreter)+1))
		b = append(append(b, interpreter...), 0)
	}
	return b
}

const (
	exec64 = 2 // ET_EXEC
	dyn64  = 3 // ET_DYN
)

// module64 is a relocatable ELF file whose .modinfo has these lines.
func module64(info ...string) []byte {
	text := []byte(strings.Join(append(info, ""), "\x00"))
	names := []byte("\x00.modinfo\x00.shstrtab\x00")
	b := make([]byte, 64)
	copy(b, "\x7fELF\x02\x01\x01")
	le := binary.LittleEndian
	le.PutUint16(b[16:], 1)
	le.PutUint16(b[18:], 62)
	le.PutUint32(b[20:], 1)
	le.PutUint16(b[52:], 64)
	le.PutUint16(b[58:], 64)
	le.PutUint16(b[60:], 3)
	le.PutUint16(b[62:], 2)
	at := len(b)
	b = append(append(b, text...), names...)
	le.PutUint64(b[40:], uint64(len(b)))
	for _, s := range []struct{ name, kind, off, size int }{{}, {1, 1, at, len(text)}, {10, 3, at + len(text), len(names)}} {
		h := make([]byte, 64)
		le.PutUint32(h, uint32(s.name))
		le.PutUint32(h[4:], uint32(s.kind))
		le.PutUint64(h[24:], uint64(s.off))
		le.PutUint64(h[32:], uint64(s.size))
		b = append(b, h...)
	}
	return b
}

// debian is a package with these files.
func debian(t testing.TB, files map[string]string) []byte {
	t.Helper()
	var data bytes.Buffer
	z, err := xz.NewWriter(&data)
	if err != nil {
		t.Fatal(err)
	}
	w := tar.NewWriter(z)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if err := w.WriteHeader(&tar.Header{Name: "./" + name, Mode: 0o644, Size: int64(len(files[name]))}); err != nil {
			t.Fatal(err)
		}
		w.Write([]byte(files[name]))
	}
	if err := errors.Join(w.Close(), z.Close()); err != nil {
		t.Fatal(err)
	}
	deb := []byte("!<arch>\n")
	for _, m := range []struct {
		name string
		body []byte
	}{{"debian-binary", []byte("2.0\n")}, {"control.tar.xz", []byte("odd")}, {"data.tar.xz", data.Bytes()}} {
		deb = fmt.Appendf(deb, "%-16s%-12d%-6d%-6d%-8s%-10d`\n", m.name, 0, 0, 0, "100644", len(m.body))
		deb = append(deb, m.body...)
		if len(m.body)%2 == 1 {
			deb = append(deb, '\n')
		}
	}
	return deb
}

const release = "6.1.0-0-test"

// theKernel is a small package: virtio-pci needs virtio_ring and virtio, net needs virtio-pci; ext4 is built in.
func theKernel(t testing.TB) []byte {
	dir := "lib/modules/" + release + "/"
	return debian(t, map[string]string{
		"boot/vmlinuz-" + release:          strings.Repeat("kernel", 1000),
		dir + "kernel/a/virtio-pci.ko":     string(module64("name=virtio_pci", "depends=virtio_ring,virtio")),
		dir + "kernel/b/virtio.ko":         string(module64("depends=")),
		dir + "kernel/b/virtio_ring.ko":    string(module64("license=GPL", "depends=virtio")),
		dir + "kernel/c/net.ko":            string(module64("depends=virtio_pci,ext4")),
		dir + "kernel/c/lonely.ko":         string(module64("license=GPL")),
		dir + "kernel/d/loop-a.ko":         string(module64("depends=loop_b")),
		dir + "kernel/d/loop-b.ko":         string(module64("depends=loop_a")),
		dir + "kernel/d/orphan.ko":         string(module64("depends=virtio,missing")),
		dir + "kernel/d/text.ko":           "this is no ELF file",
		dir + "kernel/d/program.ko":        string(program64(exec64, "")),
		dir + "modules.builtin":            "kernel/fs/ext4/ext4.ko\nkernel/net/af-packet.ko\n",
		"usr/share/doc/linux-image/readme": "read me",
	})
}

func pinOf(deb []byte) *Pin {
	return &Pin{Package: "linux-image-test", Version: "1-1", Path: "debian-security/pool/l/linux.deb", Size: int64(len(deb)), SHA256: sha256.Sum256(deb)}
}

// inputs is a Config with everything but a place to take the package from.
func inputs(t testing.TB, deb []byte) Config {
	t.Helper()
	dir := t.TempDir()
	c := Config{Out: filepath.Join(dir, "out"), Holdfast: filepath.Join(dir, "holdfast"), Runsc: filepath.Join(dir, "runsc"), Modules: []string{"net", "lonely"}, pin: pinOf(deb)}
	put(t, c.Holdfast, append(program64(exec64, ""), bytes.Repeat([]byte("holdfast and what else there is\n"), 1<<15)...)) // several blocks
	put(t, c.Runsc, append(program64(dyn64, ""), "runsc"...))
	return c
}

func put(t testing.TB, name string, b []byte) {
	t.Helper()
	if err := os.WriteFile(name, b, 0o644); err != nil {
		t.Fatal(err)
	}
}

// mirrorOf serves a package as Debian does, and counts how often.
func mirrorOf(t testing.TB, path string, deb []byte) (url string, served *atomic.Int32) {
	served = &atomic.Int32{}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != path {
			http.NotFound(w, r)
			return
		}
		served.Add(1)
		w.Write(deb)
	}))
	t.Cleanup(s.Close)
	return s.URL, served
}

// tree is what is in a directory: names, modes and digests.
func tree(t testing.TB, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(p)
		info, _ := d.Info()
		out[d.Name()] = fmt.Sprintf("%v %x", info.Mode(), sha256.Sum256(b))
		return err
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return out
}

func TestTheSameInputsGiveTheSameBytes(t *testing.T) {
	deb := theKernel(t)
	url, served := mirrorOf(t, "/debian-security/pool/l/linux.deb", deb)
	base := inputs(t, deb)
	base.Mirror, base.Cache = url, filepath.Join(t.TempDir(), "cache")
	file := filepath.Join(t.TempDir(), "linux.deb")
	put(t, file, deb)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	var first map[string]string
	for i, x := range []struct {
		name  string
		umask int
		env   []string
		with  func(*job)
		fetch int32
	}{
		{"cold cache", 0o022, nil, func(j *job) { j.Cache += "-2" }, 1},
		{"warm cache", 0o022, nil, func(j *job) { j.Cache += "-2" }, 0},
		{"no cache", 0o022, nil, func(j *job) { j.Cache = "" }, 1},
		{"the package as a file", 0o022, nil, func(j *job) { j.Package, j.Mirror = file, "http://127.0.0.1:1" }, 0},
		{"umask 0", 0, nil, nil, 1},
		{"umask 077", 0o077, nil, nil, 0},
		{"east", 0o022, []string{"TZ=Asia/Tokyo", "LANG=ja_JP.UTF-8"}, nil, 0},
		{"west", 0o022, []string{"TZ=America/Los_Angeles"}, nil, 0},
		{"one core", 0o022, []string{"GOMAXPROCS=1"}, nil, 0},
		{"eight cores", 0o022, []string{"GOMAXPROCS=8"}, nil, 0},
		{"later, programs elsewhere", 0o022, nil, func(j *job) {
			dir := t.TempDir()
			for _, p := range []*string{&j.Holdfast, &j.Runsc} {
				b, err := os.ReadFile(*p)
				if err != nil {
					t.Fatal(err)
				}
				*p = filepath.Join(dir, "other-"+filepath.Base(*p))
				put(t, *p, b)
				if err := errors.Join(os.Chtimes(*p, time.Unix(1, 0), time.Unix(1, 0)), os.Chmod(*p, 0o700)); err != nil {
					t.Fatal(err)
				}
			}
		}, 0},
		{"over an older image", 0o022, nil, func(j *job) {
			if err := os.MkdirAll(j.Out, 0o755); err != nil {
				t.Fatal(err)
			}
			put(t, filepath.Join(j.Out, FileInitramfs), []byte("older"))
		}, 0},
	} {
		j := job{Config: base, Pin: *base.pin, Umask: x.umask}
		j.Out = filepath.Join(t.TempDir(), fmt.Sprintf("out-%d", i))
		if x.with != nil {
			x.with(&j)
		}
		before := served.Load()
		arg, err := json.Marshal(struct {
			job
			Progress *int // instead of Config's, which JSON cannot say
		}{job: j})
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(self)
		cmd.Env = append(append(os.Environ(), child+"="+string(arg)), x.env...)
		if b, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", x.name, err, b)
		}
		if n := served.Load() - before; n != x.fetch {
			t.Errorf("%s: the package was fetched %d times, want %d", x.name, n, x.fetch)
		}
		got := tree(t, j.Out)
		if len(got) != 3 {
			t.Errorf("%s: it made %v", x.name, got)
		}
		if first == nil {
			first = got
		} else if !maps.Equal(got, first) {
			t.Errorf("%s: other bytes:\n%v\n%v", x.name, got, first)
		}
	}
	// Control: one byte of an input is seen.
	c := base
	c.Out, c.Holdfast = filepath.Join(t.TempDir(), "out"), c.Runsc
	if _, err := Build(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	got := tree(t, c.Out)
	if got[FileKernel] != first[FileKernel] || got[FileInitramfs] == first[FileInitramfs] || got[FileManifest] == first[FileManifest] {
		t.Errorf("control: another program gives %v, the first gave %v", got, first)
	}
}

func TestWhatIsInAnImage(t *testing.T) {
	deb := theKernel(t)
	c := inputs(t, deb)
	c.Package = filepath.Join(t.TempDir(), "linux.deb")
	put(t, c.Package, deb)
	m, err := Build(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	r, err := Look(c.Out)
	if err != nil {
		t.Fatal(err)
	}
	var paths []string
	for _, e := range r.Entries {
		paths = append(paths, fmt.Sprint(e.Mode, " ", e.Path))
	}
	want := []string{
		"drwxr-xr-x bin", "drwxr-xr-x data", "drwxr-xr-x dev", "drwxr-xr-x etc", "drwxr-xr-x etc/ssl", "drwxr-xr-x etc/ssl/certs", "drwxr-xr-x lib",
		"drwxr-xr-x lib/modules", "drwxr-xr-x proc", "drwxr-xr-x run", "drwxr-xr-x sys", "drwxrwxrwt tmp", "lrwxrwxrwx init",
		"-rwxr-xr-x bin/holdfast", "-rwxr-xr-x bin/holdfast-runsc", "-r--r--r-- lib/modules/virtio.ko", "-r--r--r-- lib/modules/virtio_ring.ko",
		"-r--r--r-- lib/modules/virtio_pci.ko", "-r--r--r-- lib/modules/net.ko", "-r--r--r-- lib/modules/lonely.ko", "-r--r--r-- lib/modules/order",
		"-r--r--r-- etc/ssl/certs/ca-certificates.crt",
	}
	if !slices.Equal(paths, want) {
		t.Errorf("it has\n%s\nwant\n%s", strings.Join(paths, "\n"), strings.Join(want, "\n"))
	}
	if len(r.Executables) != 2 || len(r.Modules) != 5 || len(r.Problems) > 0 {
		t.Errorf("%d executables, %d modules, problems %q", len(r.Executables), len(r.Modules), r.Problems)
	}
	if m.Release != release || m.Pin != *c.pin || m.Kernel.Size != 6000 || !slices.Equal(m.Modules, []string{"virtio", "virtio_ring", "virtio_pci", "net", "lonely"}) {
		t.Errorf("manifest %+v", m)
	}
	got, err := json.Marshal(r.Manifest)
	if want, _ := json.Marshal(m); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the manifest that was written is not that which was returned: %s", got)
	}
	for name, is := range tree(t, c.Out) {
		if !strings.HasPrefix(is, "-rw-r--r-- ") {
			t.Errorf("%s is %s", name, is)
		}
	}
	order := sha256.Sum256([]byte("virtio\nvirtio_ring\nvirtio_pci\nnet\nlonely\n"))
	if i := slices.IndexFunc(r.Entries, func(e Entry) bool { return e.Path == pathOrder }); r.Entries[i].SHA256 != order {
		t.Error("lib/modules/order is not the list of modules")
	}
}

func TestModulesComeAfterWhatTheyDependOn(t *testing.T) {
	k, err := unpack(t.Context(), theKernel(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range []struct {
		name   string
		wanted []string
		want   string // an error if it has spaces
	}{
		{"alone", []string{"virtio"}, "virtio"},
		{"what it depends on first", []string{"net"}, "virtio,virtio_ring,virtio_pci,net"},
		{"each once", []string{"virtio_ring", "net", "virtio", "net"}, "virtio,virtio_ring,virtio_pci,net"},
		{"in the order that was asked for", []string{"lonely", "virtio"}, "lonely,virtio"},
		{"a dash is an underscore", []string{"virtio-pci"}, "virtio,virtio_ring,virtio_pci"},
		{"what is built in is left out", []string{"ext4", "af_packet", "lonely"}, "lonely"},
		{"no line of dependencies", []string{"lonely"}, "lonely"},
		{"nothing", nil, ""},
		{"absent", []string{"virtio", "wireguard"}, "module wireguard is neither in the package nor built into kernel 6.1.0-0-test"},
		{"absent, by dependency", []string{"orphan"}, "module missing, which orphan depends on, is neither in the package nor built into kernel 6.1.0-0-test"},
		{"in a circle", []string{"loop_a"}, "depends on itself"},
		{"no ELF", []string{"text"}, "module text: bad magic number"},
		{"a program", []string{"program"}, "module program: it is no module"},
		{"a path", []string{"../b/virtio"}, "module ../b/virtio is neither"},
	} {
		got, err := k.order(x.wanted)
		switch {
		case strings.Contains(x.want, " ") && (err == nil || !strings.Contains(err.Error(), x.want)):
			t.Errorf("%s: %v, %v, want %s", x.name, got, err, x.want)
		case !strings.Contains(x.want, " ") && (err != nil || strings.Join(got, ",") != x.want):
			t.Errorf("%s: %v, %v, want %s", x.name, got, err, x.want)
		}
	}
}

func TestOtherBytesBuildNothing(t *testing.T) {
	deb := theKernel(t)
	const path = "/debian-security/pool/l/linux.deb"
	serve := func(h http.HandlerFunc) func(*testing.T, *Config) {
		return func(t *testing.T, c *Config) {
			s := httptest.NewServer(h)
			t.Cleanup(s.Close)
			c.Mirror = s.URL
		}
	}
	changed := slices.Clone(deb)
	changed[len(changed)/2] ^= 1
	file := func(b []byte) func(*testing.T, *Config) {
		return func(t *testing.T, c *Config) {
			c.Package = filepath.Join(t.TempDir(), "linux.deb")
			put(t, c.Package, b)
		}
	}
	bytesOf := func(b []byte) func(*testing.T, *Config) {
		return serve(func(w http.ResponseWriter, r *http.Request) { w.Write(b) })
	}
	stop := make(chan struct{})
	t.Cleanup(func() { close(stop) })
	for _, x := range []struct {
		name  string
		with  func(*testing.T, *Config)
		want  string
		moved bool
	}{
		{"a file with one bit changed", file(changed), "its digest is", true},
		{"a file that is cut", file(deb[:100]), "it has 100 bytes", true},
		{"a file that is longer", file(append(slices.Clone(deb), 0)), "it has more bytes", true},
		{"no file", func(_ *testing.T, c *Config) { c.Package = "/nowhere/linux.deb" }, "no such file", false},
		{"a mirror that changed one bit", bytesOf(changed), "its digest is", true},
		{"a mirror that has another package", bytesOf(deb[:50]), "it has 50 bytes", true},
		{"a mirror that sends without end", serve(func(w http.ResponseWriter, r *http.Request) {
			for r.Context().Err() == nil {
				if _, err := w.Write(make([]byte, 1<<16)); err != nil {
					return
				}
			}
		}), "it has more bytes", true},
		{"a mirror that moved on", serve(http.NotFound), "404 Not Found", true},
		{"a mirror that breaks off", serve(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", fmt.Sprint(len(deb)))
			w.Write(deb[:10])
		}), "unexpected EOF", false},
		{"a mirror that is ill", serve(func(w http.ResponseWriter, r *http.Request) { http.Error(w, "", http.StatusServiceUnavailable) }), "503 Service Unavailable", false},
		{"no mirror", func(_ *testing.T, c *Config) { c.Mirror = "http://127.0.0.1:1" }, "connection refused", false},
		{"a mirror that stands still", func(t *testing.T, c *Config) {
			c.stall = 50 * time.Millisecond
			serve(func(w http.ResponseWriter, r *http.Request) {
				w.Write(deb[:10])
				w.(http.Flusher).Flush()
				select {
				case <-r.Context().Done():
				case <-stop:
				}
			})(t, c)
		}, "nothing came for", false},
		{"a dynamic holdfast", func(t *testing.T, c *Config) {
			file(deb)(t, c)
			put(t, c.Holdfast, program64(dyn64, "/lib64/ld-linux-x86-64.so.2"))
		}, `is dynamic and needs "/lib64/ld-linux-x86-64.so.2", which is in no image: build it with CGO_ENABLED=0`, false},
		{"a script for runsc", func(t *testing.T, c *Config) { file(deb)(t, c); put(t, c.Runsc, []byte("#!/bin/sh\n")) }, "is no ELF program for x86-64", false},
		{"no runsc", func(t *testing.T, c *Config) { file(deb)(t, c); os.Remove(c.Runsc) }, "no such file", false},
		{"a module that is not there", func(t *testing.T, c *Config) { file(deb)(t, c); c.Modules = []string{"zfs"} }, "module zfs is neither", false},
		{"a package that is none", func(t *testing.T, c *Config) { file([]byte("x"))(t, c); c.pin = pinOf([]byte("x")) }, "no Debian package", false},
	} {
		t.Run(x.name, func(t *testing.T) {
			c := inputs(t, deb)
			c.Package = filepath.Join(t.TempDir(), "good.deb")
			put(t, c.Package, deb)
			if _, err := Build(t.Context(), c); err != nil {
				t.Fatalf("control: %v", err)
			}
			before := tree(t, c.Out)
			c.Package, c.Cache = "", filepath.Join(t.TempDir(), "cache")
			x.with(t, &c)
			_, err := Build(t.Context(), c)
			if err == nil || !strings.Contains(err.Error(), x.want) {
				t.Fatalf("%v, want %s", err, x.want)
			}
			if errors.Is(err, ErrMoved) != x.moved {
				t.Errorf("it counts as moved: %t, want %t: %v", !x.moved, x.moved, err)
			}
			if x.moved {
				for _, s := range []string{"linux-image-test 1-1", c.pin.SHA256.String(), "nothing was built", "scripts/pin-kernel.sh", "--mirror", "snapshot.debian.org", "--package"} {
					if !strings.Contains(err.Error(), s) {
						t.Errorf("the error does not say %s: %v", s, err)
					}
				}
			}
			if after := tree(t, c.Out); !maps.Equal(after, before) {
				t.Errorf("the image of before changed: %v, %v", before, after)
			}
			if left := tree(t, c.Cache); len(left) > 0 {
				t.Errorf("the cache has %v", left)
			}
		})
	}
	t.Run("whoever asks gives up", func(t *testing.T) {
		c := inputs(t, deb)
		ctx, cancel := context.WithCancel(t.Context())
		serve(func(w http.ResponseWriter, r *http.Request) {
			cancel()
			select {
			case <-r.Context().Done():
			case <-stop:
			}
		})(t, &c)
		if _, err := Build(ctx, c); !errors.Is(err, context.Canceled) {
			t.Errorf("%v", err)
		}
	})
	t.Run("a damaged cache is not believed", func(t *testing.T) {
		c := inputs(t, deb)
		var served *atomic.Int32
		c.Mirror, served = mirrorOf(t, path, deb)
		c.Cache = t.TempDir()
		cached := filepath.Join(c.Cache, c.pin.SHA256.String()+".deb")
		for _, b := range [][]byte{changed, deb[:9], append(slices.Clone(deb), 0)} {
			put(t, cached, b)
			served.Store(0)
			if _, err := Build(t.Context(), c); err != nil || served.Load() != 1 {
				t.Errorf("%v; fetched %d times", err, served.Load())
			}
			if got, _ := os.ReadFile(cached); !bytes.Equal(got, deb) {
				t.Error("the cache is still damaged")
			}
		}
		if _, err := Build(t.Context(), c); err != nil || served.Load() != 1 {
			t.Errorf("control: %v; fetched %d times", err, served.Load())
		}
	})
	t.Run("a mirror of one archive", func(t *testing.T) { // as snapshot.debian.org has them
		c := inputs(t, deb)
		url, _ := mirrorOf(t, "/archive/debian-security/20261117T000000Z/pool/l/linux.deb", deb)
		c.Mirror = url + "/archive/debian-security/20261117T000000Z/"
		if _, err := Build(t.Context(), c); err != nil {
			t.Error(err)
		}
	})
}

// TestBuildLooksAtWhatItWrote plants a shell between a builder's files and its writer.
func TestBuildLooksAtWhatItWrote(t *testing.T) {
	c := inputs(t, theKernel(t))
	c.Out = t.TempDir()
	put(t, filepath.Join(c.Out, FileInitramfs), []byte("of before"))
	before := tree(t, c.Out)
	program := func(path string) file {
		return file{path, typeFile | 0o755, 120, bytes.NewReader(program64(exec64, ""))}
	}
	files := func() []file { return []file{program(pathHoldfast), program(pathRunsc)} }
	err := c.write(t.Context(), &Manifest{}, nil, append(files(), program("bin/busybox")))
	if err == nil || !strings.Contains(err.Error(), "bin/busybox: shell or interpreter: a shell by its name") {
		t.Errorf("%v", err)
	}
	if after := tree(t, c.Out); !maps.Equal(before, after) {
		t.Errorf("it left %v, there was %v", after, before)
	}
	if err := c.write(t.Context(), &Manifest{}, nil, files()); err != nil || len(tree(t, c.Out)) != 3 {
		t.Errorf("control: %v, %v", err, tree(t, c.Out))
	}
}

func TestLookFindsWhatDoesNotFit(t *testing.T) {
	deb := theKernel(t)
	for _, x := range []struct {
		name  string
		spoil func(dir string) error
		want  string // of an error or a problem
	}{
		{"a kernel of another build", func(dir string) error { return os.WriteFile(filepath.Join(dir, FileKernel), []byte("other"), 0o644) }, "kernel: it is not that of the manifest"},
		{"an archive behind the initramfs", func(dir string) error {
			f, err := os.OpenFile(filepath.Join(dir, FileInitramfs), os.O_APPEND|os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			_, err = f.Write(archive(func(w *writer) { w.entry("etc/hosts", typeFile|0o644, 1, strings.NewReader("x")) }))
			return errors.Join(err, f.Close())
		}, "initramfs: it is not that of the manifest"},
		{"an initramfs that is cut", func(dir string) error { return os.Truncate(filepath.Join(dir, FileInitramfs), 1000) }, "unexpected EOF"},
		{"no kernel", func(dir string) error { return os.Remove(filepath.Join(dir, FileKernel)) }, "no such file"},
		{"no manifest", func(dir string) error { return os.Remove(filepath.Join(dir, FileManifest)) }, "no such file"},
		{"a manifest of a later version", func(dir string) error {
			return os.WriteFile(filepath.Join(dir, FileManifest), []byte(`{"version":2}`), 0o644)
		}, "version 2 is not known"},
		{"a manifest that is none", func(dir string) error { return os.WriteFile(filepath.Join(dir, FileManifest), []byte("x"), 0o644) }, "invalid character"},
	} {
		c := inputs(t, deb)
		c.Package = filepath.Join(t.TempDir(), "linux.deb")
		put(t, c.Package, deb)
		if _, err := Build(t.Context(), c); err != nil {
			t.Fatal(err)
		}
		if r, err := Look(c.Out); err != nil || len(r.Problems) > 0 {
			t.Fatalf("control: %v, %v", r, err)
		}
		if err := x.spoil(c.Out); err != nil {
			t.Fatal(err)
		}
		r, err := Look(c.Out)
		if err == nil {
			err = errors.New(strings.Join(r.Problems, "\n"))
		}
		if !strings.Contains(err.Error(), x.want) {
			t.Errorf("%s: %v, want %s", x.name, err, x.want)
		}
	}
}

func TestRootsArePlain(t *testing.T) {
	var r Roots
	b, err := r.pem()
	if err != nil {
		t.Fatal(err)
	}
	if pool := x509.NewCertPool(); !pool.AppendCertsFromPEM(b) || r.Count < 100 || strings.Count(string(b), "BEGIN CERTIFICATE") != r.Count {
		t.Errorf("%d roots in %d bytes", r.Count, len(b))
	}
	var last []byte
	for p, rest := pem.Decode(b); p != nil; p, rest = pem.Decode(rest) {
		if bytes.Compare(last, p.Bytes) >= 0 {
			t.Error("they are not in order")
		}
		last = p.Bytes
	}
	for _, name := range r.LeftOut {
		if !strings.Contains(name, "CN=") {
			t.Errorf("left out: %q", name)
		}
	}
}

func TestPinIsWhole(t *testing.T) {
	p, err := Pinned()
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(p.Path, "debian") || !strings.HasSuffix(p.Path, "/"+p.Package+"_"+p.Version+"_amd64.deb") || p.SHA256 == (Digest{}) {
		t.Errorf("%+v", p)
	}
}

// TestTheImage builds the image of this tree, from the pinned package, with the programs that make build left in bin/.
func TestTheImage(t *testing.T) {
	if testing.Short() {
		t.Skip("it takes ten seconds, and may fetch a kernel")
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	c := Config{
		Out: filepath.Join(t.TempDir(), "out"), Holdfast: "../../bin/holdfast", Runsc: "../../bin/holdfast-runsc", Cache: filepath.Join(cache, "holdfast"),
		Modules: []string{"virtio_pci", "virtio_net", "virtio_blk", "virtio_rng", "overlay", "fuse", "loop", "tun", "veth", "nf_tables", "nft_masq", "ext4"},
	}
	start := time.Now()
	m, err := Build(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("built in %v: kernel %s, %d bytes, initramfs %d bytes", time.Since(start).Round(time.Millisecond), m.Release, m.Kernel.Size, m.Initramfs.Size)
	r, err := Look(c.Out)
	if err != nil || len(r.Problems) > 0 || len(r.Executables) != 2 || len(r.Interpreters)+len(r.Setuid)+len(r.Libraries) != 0 {
		t.Fatalf("%v: %+v", err, r)
	}
	if slices.Index(m.Modules, "net_failover") > slices.Index(m.Modules, "virtio_net") || !slices.Contains(m.Modules, "nf_conntrack") || slices.Contains(m.Modules, "ext4") {
		t.Errorf("modules %q", m.Modules)
	}
	for _, p := range m.Programs {
		if p.Go == "" || !strings.HasPrefix(p.Module, "holdfast") {
			t.Errorf("program %+v", p)
		}
	}
}
