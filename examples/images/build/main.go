// Command build makes the images of the examples as OCI layouts under out/: from Debian packages, and from Go modules. All
// share one base layer. An image whose inputs have not changed is not built again. Run it from examples/images:
//
//	go run ./build [NAME…]
package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// recipe says what an image holds. A change of version makes all images anew.
const version = 5

type recipe struct {
	debs   []string          // Debian packages
	goPkg  map[string]goPkg  // path in the image → program
	files  map[string]string // path → content
	links  map[string]string // symbolic links
	dirs   map[string]owner
	config ocispec.ImageConfig
}

type goPkg struct{ module, pkg string }

type owner struct {
	uid, gid int
	mode     int64
}

var base = recipe{
	debs: []string{"libc6", "libc-bin", "libgcc-s1", "libstdc++6", "zlib1g", "libssl3", "libcrypt1", "ca-certificates", "netbase", "tzdata"},
	files: map[string]string{
		"etc/passwd":        "root:x:0:0:root:/root:/usr/sbin/nologin\nwww-data:x:33:33:www-data:/var/www:/usr/sbin/nologin\npostgres:x:100:102:PostgreSQL:/var/lib/postgresql:/usr/sbin/nologin\nnobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n",
		"etc/group":         "root:x:0:\nadm:x:4:\nwww-data:x:33:\npostgres:x:102:\nnogroup:x:65534:\n",
		"etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
		"etc/os-release":    "PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm), pieces\"\nID=debian\nVERSION_ID=\"12\"\n",
	},
	dirs: map[string]owner{"tmp": {0, 0, 0o1777}, "root": {0, 0, 0o700}, "run": {0, 0, 0o755}, "var/tmp": {0, 0, 0o1777}, "etc": {0, 0, 0o755}},
}

var images = map[string]recipe{
	"pocketbase": {
		goPkg:  map[string]goPkg{"usr/local/bin/pocketbase": {"pocketbase", "."}},
		dirs:   map[string]owner{"data": {0, 0, 0o755}},
		config: ocispec.ImageConfig{Entrypoint: []string{"/usr/local/bin/pocketbase"}, Cmd: []string{"serve", "--http=[::]:8090", "--dir=/data"}, WorkingDir: "/data"},
	},
	"miniflux": {
		goPkg:  map[string]goPkg{"usr/local/bin/miniflux": {"miniflux", "miniflux.app/v2"}},
		config: ocispec.ImageConfig{Entrypoint: []string{"/usr/local/bin/miniflux"}, User: "nobody", Env: []string{"LISTEN_ADDR=[::]:8080"}, WorkingDir: "/"},
	},
	"nginx": {
		debs:   []string{"nginx", "nginx-common", "libpcre2-8-0"},
		dirs:   map[string]owner{"var/lib/nginx": {33, 33, 0o755}, "var/log/nginx": {33, 33, 0o755}, "var/www": {33, 33, 0o755}},
		config: ocispec.ImageConfig{Entrypoint: []string{"/usr/sbin/nginx", "-e", "stderr", "-g", "daemon off;"}, StopSignal: "SIGQUIT", WorkingDir: "/"},
	},
	"postgres": {
		debs: []string{"postgresql-15", "postgresql-client-15", "libpq5", "libicu72", "libxml2", "liblz4-1", "libzstd1", "libgssapi-krb5-2", "libkrb5-3", "libk5crypto3",
			"libkrb5support0", "libcom-err2", "libkeyutils1", "libldap-2.5-0", "libsasl2-2", "libpam0g", "libselinux1", "libsystemd0", "libgcrypt20", "libgpg-error0", "liblzma5",
			"libcap2", "libaudit1", "libcap-ng0", "libuuid1", "libpcre2-8-0", "libgnutls30", "libp11-kit0", "libidn2-0", "libunistring2", "libtasn1-6", "libnettle8", "libhogweed6", "libgmp10", "libffi8", "libdb5.3", "libmd0", "libbsd0", "libreadline8", "libtinfo6", "dash"},
		links:  map[string]string{"usr/bin/sh": "dash"}, // initdb starts the server through popen
		goPkg:  map[string]goPkg{"usr/local/bin/start-postgres": {".", "./start-postgres"}},
		dirs:   map[string]owner{"var/lib/postgresql": {100, 102, 0o755}, "var/lib/postgresql/data": {100, 102, 0o755}},
		config: ocispec.ImageConfig{Entrypoint: []string{"/usr/local/bin/start-postgres"}, StopSignal: "SIGINT", WorkingDir: "/", Env: []string{"PATH=/usr/lib/postgresql/15/bin:/usr/local/bin:/usr/bin:/bin"}},
	},
}

func main() {
	log.SetFlags(0)
	log.SetPrefix("images: ")
	if err := run(os.Args[1:]); err != nil {
		log.Fatal(err)
	}
}

func run(names []string) error {
	if len(names) == 0 {
		for n := range images {
			names = append(names, n)
		}
		slices.Sort(names)
	}
	if err := os.MkdirAll("out", 0o755); err != nil {
		return err
	}
	lock, err := os.OpenFile("out/lock", os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil { // one builder at a time
		return err
	}
	var baseLayer []byte
	for _, n := range names {
		r, ok := images[n]
		if !ok {
			return fmt.Errorf("there is no image %q", n)
		}
		key, err := inputs(n, r)
		if err != nil {
			return err
		}
		out := filepath.Join("out", n)
		if have, err := os.ReadFile(filepath.Join(out, "inputs")); err == nil && string(have) == key {
			log.Printf("%s is as it should be", n)
			continue
		}
		log.Printf("%s: building", n)
		if baseLayer == nil {
			t := tree{}
			if err := t.fill(base); err != nil {
				return fmt.Errorf("base: %w", err)
			}
			if err := t.certificates(); err != nil {
				return err
			}
			baseLayer = t.tar(nil)
		}
		t := tree{}
		if err := t.fill(r); err != nil {
			return fmt.Errorf("%s: %w", n, err)
		}
		size, err := write(out, key, r.config, baseLayer, t.tar(r.dirs))
		if err != nil {
			return fmt.Errorf("%s: %w", n, err)
		}
		log.Printf("%s: %.1f MB", n, float64(size)/1e6)
	}
	return nil
}

// inputs is a digest of what an image is made from.
func inputs(name string, r recipe) (string, error) {
	h := sha256.New()
	fmt.Fprintln(h, version, name, runtime.Version())
	for _, x := range []recipe{base, r} {
		j, err := json.Marshal(struct {
			D []string
			F map[string]string
			C ocispec.ImageConfig
		}{x.debs, x.files, x.config})
		if err != nil {
			return "", err
		}
		h.Write(j)
		for _, g := range x.goPkg {
			for _, pat := range []string{"go.mod", "go.sum", "*.go", "public/*", "start-postgres/*.go"} {
				files, _ := filepath.Glob(filepath.Join(g.module, pat))
				for _, f := range files {
					b, err := os.ReadFile(f)
					if err == nil {
						fmt.Fprintln(h, f, len(b))
						h.Write(b)
					}
				}
			}
		}
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// tree is a layer in the making, by path.
type tree map[string]item

type item struct {
	tar.Header
	data []byte
}

func (t tree) fill(r recipe) error {
	for _, d := range r.debs {
		if err := t.deb(d); err != nil {
			return fmt.Errorf("package %s: %w", d, err)
		}
	}
	for p, g := range r.goPkg {
		b, err := build(g)
		if err != nil {
			return err
		}
		t[p] = item{tar.Header{Name: p, Typeflag: tar.TypeReg, Mode: 0o755}, b}
	}
	for p, c := range r.files {
		t[p] = item{tar.Header{Name: p, Typeflag: tar.TypeReg, Mode: 0o644}, []byte(c)}
	}
	if len(r.goPkg) == 0 || len(r.debs) > 0 || len(r.files) > 0 {
		for link, to := range map[string]string{"bin": "usr/bin", "sbin": "usr/sbin", "lib": "usr/lib", "lib64": "usr/lib64"} {
			t[link] = item{Header: tar.Header{Name: link, Typeflag: tar.TypeSymlink, Linkname: to, Mode: 0o777}}
		}
	}
	for p, to := range r.links {
		t[p] = item{Header: tar.Header{Name: p, Typeflag: tar.TypeSymlink, Linkname: to, Mode: 0o777}}
	}
	for p, o := range r.dirs {
		t[p] = item{Header: tar.Header{Name: p, Typeflag: tar.TypeDir, Mode: o.mode, Uid: o.uid, Gid: o.gid}}
	}
	return nil
}

// skipped are the parts of packages that no program needs.
func skipped(p string) bool {
	for _, s := range []string{"usr/share/doc/", "usr/share/man/", "usr/share/locale/", "usr/share/info/", "usr/share/lintian/", "usr/share/bug/", "usr/share/postgresql/15/man/", "usr/share/doc-base/",
		"usr/lib/postgresql/15/lib/bitcode/", "usr/lib/postgresql/15/lib/llvmjit", "usr/share/zoneinfo/right/", "usr/lib/x86_64-linux-gnu/gconv/", "usr/share/ca-certificates/", "usr/lib/systemd/", "etc/init.d/", "var/cache/", "usr/share/perl"} {
		if strings.HasPrefix(p, s) && s != "usr/share/ca-certificates/" {
			return true
		}
	}
	return false
}

// deb downloads a package and adds its files.
func (t tree) deb(name string) error {
	cache, err := filepath.Abs("out/debs")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return err
	}
	found, _ := filepath.Glob(filepath.Join(cache, name+"_*.deb"))
	if len(found) == 0 {
		cmd := exec.Command("apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", name)
		cmd.Dir = cache
		if out, err := cmd.CombinedOutput(); err != nil {
			// The lists may be old or absent on a new machine: once more with new ones.
			if out, err := exec.Command("apt-get", "update", "-qq").CombinedOutput(); err != nil {
				return fmt.Errorf("apt-get update: %w: %s", err, out)
			}
			cmd = exec.Command("apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", name)
			cmd.Dir = cache
			if again, err := cmd.CombinedOutput(); err != nil {
				return fmt.Errorf("apt-get download: %w: %s%s", err, out, again)
			}
		}
		if found, _ = filepath.Glob(filepath.Join(cache, name+"_*.deb")); len(found) == 0 {
			return errors.New("apt-get brought nothing")
		}
	}
	cmd := exec.Command("dpkg-deb", "--fsys-tarfile", found[len(found)-1])
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	tr := tar.NewReader(pipe)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		p := merged(path.Clean(strings.TrimPrefix(h.Name, "./")))
		if p == "." || skipped(p+"/") || h.Typeflag == tar.TypeDir && t[p].Name != "" {
			continue
		}
		n := tar.Header{Name: p, Typeflag: h.Typeflag, Mode: h.Mode, Uid: h.Uid, Gid: h.Gid, Linkname: h.Linkname}
		if h.Typeflag == tar.TypeLink {
			n.Linkname = merged(path.Clean(strings.TrimPrefix(h.Linkname, "./")))
		}
		data, err := io.ReadAll(tr)
		if err != nil {
			return err
		}
		t[p] = item{n, data}
	}
	return cmd.Wait()
}

// merged moves what packages still put into /lib and the like to /usr, where a merged Debian has it.
func merged(p string) string {
	for _, d := range []string{"bin", "sbin", "lib", "lib64"} {
		if p == d || strings.HasPrefix(p, d+"/") {
			return "usr/" + p
		}
	}
	return p
}

// certificates makes the bundle that the package's script would make.
func (t tree) certificates() error {
	var names []string
	for p := range t {
		if strings.HasPrefix(p, "usr/share/ca-certificates/") && strings.HasSuffix(p, ".crt") {
			names = append(names, p)
		}
	}
	slices.Sort(names)
	var all []byte
	for _, n := range names {
		all = append(all, t[n].data...)
	}
	if len(all) == 0 {
		return errors.New("ca-certificates holds no certificates")
	}
	const p = "etc/ssl/certs/ca-certificates.crt"
	t[p] = item{tar.Header{Name: p, Typeflag: tar.TypeReg, Mode: 0o644}, all}
	return nil
}

func build(g goPkg) ([]byte, error) {
	tmp, err := os.MkdirTemp("", "image-build-*")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(tmp)
	out := filepath.Join(tmp, "bin")
	cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", out, g.pkg)
	cmd.Dir = g.module
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-mod=mod")
	if b, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("go build %s: %w: %s", g.pkg, err, b)
	}
	return os.ReadFile(out)
}

// tar writes the tree in order, with directories before what is in them and without times.
func (t tree) tar(owned map[string]owner) []byte {
	var names []string
	for p := range t {
		names = append(names, p)
		for d := path.Dir(p); d != "."; d = path.Dir(d) {
			if _, ok := t[d]; !ok {
				t[d] = item{Header: tar.Header{Name: d, Typeflag: tar.TypeDir, Mode: 0o755}}
				names = append(names, d)
			}
		}
	}
	slices.Sort(names)
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	var links []string
	put := func(p string) {
		it := t[p]
		h := it.Header
		if h.Typeflag == tar.TypeDir {
			h.Name += "/"
		}
		h.Size = int64(len(it.data))
		h.Format = tar.FormatPAX
		if err := w.WriteHeader(&h); err != nil {
			panic(err)
		}
		w.Write(it.data)
	}
	for _, p := range slices.Compact(names) {
		if t[p].Typeflag == tar.TypeLink {
			links = append(links, p) // after their targets
			continue
		}
		put(p)
	}
	for _, p := range links {
		put(p)
	}
	w.Close()
	return buf.Bytes()
}

// write makes the layout beside its place and moves it there.
func write(out, key string, cfg ocispec.ImageConfig, layers ...[]byte) (int64, error) {
	tmp := out + ".new"
	os.RemoveAll(tmp)
	blobs := filepath.Join(tmp, "blobs", "sha256")
	if err := os.MkdirAll(blobs, 0o755); err != nil {
		return 0, err
	}
	var total int64
	add := func(media string, b []byte) (ocispec.Descriptor, error) {
		d := digest.FromBytes(b)
		total += int64(len(b))
		return ocispec.Descriptor{MediaType: media, Digest: d, Size: int64(len(b))}, os.WriteFile(filepath.Join(blobs, d.Encoded()), b, 0o644)
	}
	c := ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"}, Config: cfg, RootFS: ocispec.RootFS{Type: "layers"}}
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	z, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedDefault), zstd.WithEncoderConcurrency(1))
	if err != nil {
		return 0, err
	}
	for _, l := range layers {
		c.RootFS.DiffIDs = append(c.RootFS.DiffIDs, digest.FromBytes(l))
		d, err := add(ocispec.MediaTypeImageLayerZstd, z.EncodeAll(l, nil))
		if err != nil {
			return 0, err
		}
		m.Layers = append(m.Layers, d)
	}
	raw, err := json.Marshal(c)
	if err != nil {
		return 0, err
	}
	if m.Config, err = add(ocispec.MediaTypeImageConfig, raw); err != nil {
		return 0, err
	}
	if raw, err = json.Marshal(m); err != nil {
		return 0, err
	}
	d, err := add(ocispec.MediaTypeImageManifest, raw)
	if err != nil {
		return 0, err
	}
	d.Platform = &ocispec.Platform{OS: "linux", Architecture: "amd64"}
	idx, err := json.Marshal(ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{d}})
	if err != nil {
		return 0, err
	}
	for f, b := range map[string][]byte{"index.json": idx, "oci-layout": []byte(`{"imageLayoutVersion":"1.0.0"}`), "inputs": []byte(key)} {
		if err := os.WriteFile(filepath.Join(tmp, f), b, 0o644); err != nil {
			return 0, err
		}
	}
	os.RemoveAll(out)
	return total, os.Rename(tmp, out)
}
