package image

import (
	"bytes"
	"compress/flate"
	"compress/gzip"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
)

// archive is a newc archive of what fill writes.
func archive(fill func(*writer)) []byte {
	var b bytes.Buffer
	w := &writer{w: &b}
	fill(w)
	w.close()
	return b.Bytes()
}

// item is an entry of a test's archive.
type item struct {
	path  string
	mode  Mode
	body  string
	links int // 0 is 1
}

func items(list ...item) []byte {
	return archive(func(w *writer) {
		for _, x := range list {
			w.ino++
			w.header(w.ino, x.mode, max(x.links, 1), int64(len(x.body)), x.path)
			io.WriteString(w.w, x.body+strings.Repeat("\x00", -len(x.body)&3))
		}
	})
}

// sound is an image that has what it must have.
func sound() []item {
	p := string(program64(exec64, ""))
	return []item{
		{"bin", typeDir | 0o755, "", 2}, {"dev", typeDir | 0o755, "", 2}, {"lib/modules", typeDir | 0o755, "", 2}, {"tmp", typeDir | 0o1777, "", 2},
		{"init", typeLink | 0o777, "bin/holdfast", 1}, {"bin/holdfast", typeFile | 0o755, p, 1}, {"bin/holdfast-runsc", typeFile | 0o755, p, 1},
		{"lib/modules/net.ko", typeFile | 0o444, string(module64("depends=")), 1}, {"lib/modules/order", typeFile | 0o444, "net\n", 1},
	}
}

func problems(t testing.TB, b []byte) []string {
	t.Helper()
	c, err := Audit(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	return c.Problems()
}

// TestEachRuleFindsWhatIsPlanted plants one thing at a time in an image that is sound.
func TestEachRuleFindsWhatIsPlanted(t *testing.T) {
	if got := problems(t, items(sound()...)); len(got) > 0 {
		t.Fatalf("control: an image that is sound has problems: %q", got)
	}
	busybox := string(program64(exec64, ""))
	dynamic := string(program64(dyn64, "/lib64/ld-linux-x86-64.so.2"))
	hidden := []byte(dynamic)
	binary.LittleEndian.PutUint64(hidden[32:], 1<<20) // program headers behind what is read
	wrapped := []byte(dynamic)
	binary.LittleEndian.PutUint64(wrapped[32:], 1<<64-56)
	big := []byte(busybox)
	big[5] = 2 // big-endian
	const not2 = "and not one of the two that an image has"
	for _, x := range []struct {
		name  string
		plant item
		want  []string // each is in one problem, and there are no others
	}{
		{"busybox under the name of a module", item{"lib/modules/x.ko", typeFile | 0o444, busybox, 1}, []string{"lib/modules/x.ko: it is executable (an ELF program), " + not2}},
		{"busybox without a mode", item{"data/x", typeFile, busybox, 1}, []string{"data/x: it is executable"}},
		{"an executable of type DYN", item{"data/x", typeFile | 0o444, string(program64(dyn64, "")), 1}, []string{"data/x: it is executable"}},
		{"an executable of a type that is unknown", item{"data/x", typeFile | 0o444, string(program64(0xfe00, "")), 1}, []string{"data/x: it is executable"}},
		{"an executable that is cut", item{"data/x", typeFile | 0o444, busybox[:30], 1}, []string{"data/x: it is executable", "data/x: odd: it is no ELF program"}},
		{"an executable of another machine", item{"data/x", typeFile | 0o444, string(big), 1}, []string{"data/x: it is executable", "data/x: odd: it is no ELF program for x86-64"}},
		{"program headers that are not seen", item{"data/x", typeFile | 0o444, string(hidden), 1}, []string{"data/x: it is executable", "data/x: odd: its program headers are out of sight"}},
		{"program headers at the end of all numbers", item{"data/x", typeFile | 0o444, string(wrapped), 1}, []string{"data/x: it is executable", "data/x: odd: its program headers are out of sight"}},
		{"a dynamic executable", item{"data/x", typeFile | 0o444, dynamic, 1}, []string{"data/x: it is executable", `data/x: shell or interpreter: it is dynamic and needs "/lib64/ld-linux-x86-64.so.2"`}},
		{"a script", item{"etc/rc.local", typeFile | 0o644, "#!/bin/sh -e\necho\n", 1}, []string{"etc/rc.local: it is executable (a script)", `etc/rc.local: shell or interpreter: a script for "/bin/sh -e"`}},
		{"text with an execute bit", item{"etc/motd", typeFile | 0o654, "text", 1}, []string{"etc/motd: it is executable (by its mode)"}},
		{"a module with an execute bit", item{"lib/modules/x.ko", typeFile | 0o555, string(module64()), 1}, []string{"lib/modules/x.ko: it is executable (by its mode)"}},
		{"a symbolic link named sh", item{"bin/sh", typeLink | 0o777, "holdfast", 1}, []string{"bin/sh: shell or interpreter: a shell by its name"}},
		{"a symbolic link to busybox", item{"data/x", typeLink | 0o777, "../bin/busybox", 1}, []string{"data/x: shell or interpreter: a shell by what it links to"}},
		{"a hard link named bash", item{"bin/bash", typeFile | 0o444, "", 2}, []string{"bin/bash: shell or interpreter: a shell by its name", "bin/bash: odd: it is a hard link"}},
		{"a shell's name on an empty file", item{"sbin/DASH", typeFile | 0o444, "", 1}, []string{"sbin/DASH: shell or interpreter: a shell"}},
		{"python", item{"usr/bin/python3.11", typeFile | 0o444, "", 1}, []string{"python3.11: shell or interpreter: an interpreter by its name"}},
		{"dropbear", item{"sbin/dropbear", typeFile | 0o444, "", 1}, []string{"sbin/dropbear: shell or interpreter: a way in by its name"}},
		{"getty", item{"sbin/agetty", typeFile | 0o444, "", 1}, []string{"a way in by its name"}},
		{"a library", item{"lib/libc.so.6", typeFile | 0o444, "", 1}, []string{"lib/libc.so.6: library: by its name"}},
		{"the dynamic loader", item{"lib64/ld-linux-x86-64.so.2", typeFile | 0o444, "", 1}, []string{"library: by its name"}},
		{"a setuid file", item{"data/x", typeFile | 0o4644, "x", 1}, []string{"data/x: setuid or setgid: its mode is -rwSr--r--"}},
		{"a setgid directory", item{"data", typeDir | 0o2755, "", 2}, []string{"data: setuid or setgid: its mode is drwxr-sr-x"}},
		{"a disk", item{"dev/sda", typeBlock | 0o600, "", 1}, []string{"dev/sda: device, pipe or socket"}},
		{"a terminal", item{"dev/console", typeChar | 0o600, "", 1}, []string{"dev/console: device, pipe or socket"}},
		{"a pipe", item{"run/p", typePipe | 0o600, "", 1}, []string{"run/p: device, pipe or socket"}},
		{"a socket", item{"run/s", typeSocket | 0o600, "", 1}, []string{"run/s: device, pipe or socket"}},
		{"no type", item{"run/s", 0o600, "", 1}, []string{"run/s: device, pipe or socket"}},
		{"a file that everybody may write", item{"etc/hosts", typeFile | 0o646, "", 1}, []string{"etc/hosts: writable: everybody may write it"}},
		{"a directory that everybody may write", item{"data", typeDir | 0o1777, "", 2}, []string{"data: writable"}},
		{"a path that climbs", item{"data/../bin/x", typeFile | 0o444, "", 1}, []string{"data/../bin/x: odd: its path is not plain"}},
		{"a path from the root", item{"/data/x", typeFile | 0o444, "", 1}, []string{"/data/x: odd: its path is not plain"}},
		{"another holdfast in its place", item{"bin/holdfast", typeFile | 0o755, busybox, 1}, []string{"bin/holdfast: odd: it is there twice"}},
		{"another holdfast by another path", item{"./bin//holdfast", typeFile | 0o755, busybox, 1}, []string{"./bin//holdfast: it is executable", "its path is not plain", "it is there twice"}},
		{"a root of its own", item{"etc/ssl/certs/mine.pem", typeFile | 0o444, "x", 1}, []string{"etc/ssl/certs/mine.pem: it is no part of an image"}},
		{"name servers of its own", item{"etc/resolv.conf", typeFile | 0o444, "nameserver 192.0.2.1\n", 1}, []string{"etc/resolv.conf: it is no part of an image"}},
		{"names of its own", item{"etc/hosts", typeFile | 0o444, "", 1}, []string{"etc/hosts: it is no part of an image"}},
		{"a module that is none", item{"lib/modules/x.ko", typeFile | 0o444, "x", 1}, []string{"lib/modules/x.ko: it is no part of an image"}},
		{"a module elsewhere", item{"lib/modules/x/x.ko", typeFile | 0o444, string(module64()), 1}, []string{"lib/modules/x/x.ko: it is no part of an image"}},
		{"a link through which the next entry replaces another", item{"data/etc", typeLink | 0o777, "../etc/ssl/certs", 1}, []string{"data/etc: it is no part of an image"}},
		{"a link in place of a directory", item{"etc", typeLink | 0o777, "data", 1}, []string{"etc: it is no part of an image"}},
		{"another init", item{"init", typeLink | 0o777, "data/x", 1}, []string{"init: odd: it is there twice"}},
	} {
		got := problems(t, items(append(sound(), x.plant)...))
		if len(got) != len(x.want) {
			t.Errorf("%s: %q, want %q", x.name, got, x.want)
			continue
		}
		for _, want := range x.want {
			if !slices.ContainsFunc(got, func(p string) bool { return strings.Contains(p, want) }) {
				t.Errorf("%s: %q, want %q", x.name, got, want)
			}
		}
	}
	for _, x := range []struct{ name, without, want string }{
		{"no holdfast", "bin/holdfast", "bin/holdfast: it is not there"},
		{"no runsc", "bin/holdfast-runsc", "bin/holdfast-runsc: it is not there"},
		{"no init", "init", "init: it is not a link to bin/holdfast"},
	} {
		list := slices.DeleteFunc(sound(), func(i item) bool { return i.path == x.without })
		if got := problems(t, items(list...)); len(got) != 1 || !strings.Contains(got[0], x.want) {
			t.Errorf("%s: %q", x.name, got)
		}
	}
}

// TestAFileOfAnotherOwnerIsFound: who has the user ID may write it, whatever its mode says of everybody.
func TestAFileOfAnotherOwnerIsFound(t *testing.T) {
	for _, field := range []int{2, 3} { // user and group of the first entry
		b := items(sound()...)
		copy(b[6+8*field:], "000003e8")
		if got := problems(t, b); len(got) != 1 || got[0] != "bin: odd: its owner is not root" {
			t.Errorf("%q", got)
		}
	}
}

func TestNamesThatMeanNothing(t *testing.T) {
	for _, name := range []string{"holdfast", "holdfast-runsc", "order", "ca-certificates.crt", "init", "nft_masq.ko", "lua.ko", "sh.ko", "shadow", "basher", "ssh_host_key", "node.key", "suite", "edit"} {
		if why := known(name); why != "" || library.MatchString(name) {
			t.Errorf("%s is %s", name, why)
		}
	}
	for _, name := range []string{"sh", "bash", "bash-5.2", "rbash", "dash", "ash", "zsh", "ksh93", "mksh", "csh", "tcsh", "fish", "busybox", "busybox.static", "toybox-x86_64", "python", "python3", "pypy3", "perl5.36", "lua5.4", "luajit", "node", "nodejs",
		"ruby", "php8.2", "awk", "gawk", "mawk", "sshd", "sshd-session", "dropbearmulti", "getty", "agetty", "login", "su", "sudo", "nc", "telnetd"} {
		if known(name) == "" {
			t.Errorf("%s is not known", name)
		}
	}
}

func gz(b []byte) []byte {
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	w.Write(b)
	w.Close()
	return out.Bytes()
}

func zst(t testing.TB, b []byte, opts ...zstd.EOption) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := zstd.NewWriter(&out, opts...)
	if err != nil {
		t.Fatal(err)
	}
	w.Write(b)
	w.Close()
	return out.Bytes()
}

// TestTheLastArchiveIsReadToo reads what the kernel reads: the shell is in the last archive of each.
func TestTheLastArchiveIsReadToo(t *testing.T) {
	first := items(sound()...)
	last := items(item{"bin/sh", typeLink | 0o777, "holdfast", 1})
	zeros := make([]byte, 516)
	noise := make([]byte, 300<<10) // more than one block
	for i := range noise {
		noise[i] = byte(i * i >> 7)
	}
	long := items(append(sound(), item{pathRoots, typeFile | 0o444, string(noise) + string(make([]byte, 1<<20)), 1})...)
	for _, x := range []struct {
		name string
		in   [][]byte
	}{
		{"plain, plain", [][]byte{first, last}},
		{"zeros between", [][]byte{first, zeros, slices.Concat(zeros, last, zeros)}},
		{"plain, gzip", [][]byte{first, gz(last)}},
		{"plain, zstd", [][]byte{first, zeros, zst(t, last)}},
		{"gzip, plain", [][]byte{gz(first), last}},
		{"gzip, gzip", [][]byte{gz(first), gz(last)}},
		{"gzip, zstd", [][]byte{gz(first), zst(t, last)}},
		{"zstd, plain", [][]byte{zst(t, first), last}},
		{"zstd, gzip", [][]byte{zst(t, first), zeros, gz(last)}},
		{"zstd, zstd", [][]byte{zst(t, first), zst(t, last)}},
		{"zstd of many blocks, plain", [][]byte{zst(t, long), last}},
		{"zstd without a checksum, plain", [][]byte{zst(t, long, zstd.WithEncoderCRC(false)), last}},
		{"zstd in a single segment, plain", [][]byte{zst(t, first, zstd.WithSingleSegment(true)), last}},
		{"two in one gzip", [][]byte{gz(slices.Concat(first, zeros, last))}},
		{"two in one zstd", [][]byte{zst(t, slices.Concat(long, last))}},
	} {
		got := problems(t, slices.Concat(x.in...))
		if len(got) != 1 || got[0] != "bin/sh: shell or interpreter: a shell by its name" {
			t.Errorf("%s: %q", x.name, got)
		}
		if len(x.in) == 1 {
			continue
		}
		if got := problems(t, slices.Concat(x.in[:len(x.in)-1]...)); len(got) > 0 {
			t.Errorf("%s: control: without the last: %q", x.name, got)
		}
	}
}

func TestWhatCannotBeReadIsRefused(t *testing.T) {
	good := items(sound()...)
	field := func(i int, v string) []byte { // of the first entry
		b := slices.Clone(good)
		copy(b[6+8*i:], v)
		return b
	}
	huge := items(item{"x", typeFile | 0o644, "", 1})
	copy(huge[6+8*6:], fmt.Sprintf("%08x", maxUnpacked+1))
	for _, x := range []struct {
		name string
		in   []byte
		want string
	}{
		{"nothing", nil, "it is empty"},
		{"zeros", make([]byte, 1000), "it is empty"},
		{"another compression", []byte("\xfd7zXZ\x00rest"), "neither a newc archive nor gzip or zstd"},
		{"garbage behind an archive", slices.Concat(good, []byte("garbage")), "neither a newc archive nor gzip or zstd"},
		{"garbage in a compressed one", gz(slices.Concat(good, []byte("garbage"))), "what is compressed is no newc archive"},
		{"a compressed one in a compressed one", zst(t, gz(good)), "what is compressed is no newc archive"},
		{"the old format", append([]byte("070707"), good[6:]...), "an entry begins with"},
		{"no trailer", good[:len(good)-124], "unexpected EOF"},
		{"half of an archive", good[:len(good)/2], "unexpected EOF"},
		{"half of a gzip", gz(good)[:100], "unexpected EOF"},
		{"half of a zstd", zst(t, good)[:100], "unexpected EOF"},
		{"a zstd that is damaged", func() []byte { b := zst(t, good); b[len(b)-1] ^= 1; return b }(), "CRC check failed"},
		{"a number that is none", field(0, "0x000001"), "a number of an entry"},
		{"a name without length", field(11, "00000000"), "name has 0 bytes"},
		{"an empty name", field(11, "00000001"), "name has 1 bytes"},
		{"a name of 4097 bytes", field(11, "00001001"), "name has 4097 bytes"},
		{"a name that ends early", field(11, "00000006"), "is not where it should be"},
		{"a name that does not end", field(11, "00000003"), "is not where it should be"},
		{"a directory with a body", items(item{"x", typeDir | 0o755, "body", 2}), "has a body"},
		{"a device with a body", items(item{"x", typeChar | 0o755, "body", 1}), "has a body"},
		{"a link to nowhere", items(item{"x", typeLink | 0o777, "", 1}), "a target of 0 bytes"},
		{"a link to far away", items(item{"x", typeLink | 0o777, strings.Repeat("x", 4096), 1}), "a target of 4096 bytes"},
		{"a link whose target ends early", items(item{"x", typeLink | 0o777, "sh\x00x", 1}), "a link to"},
		{"a trailer with a body", items(item{trailer, 0, "body", 1}), "has a body"},
		{"a trailer that is a file", items(item{trailer, typeFile, "body", 1}), "its trailer has a body"},
		{"more than a GiB", huge, "it has more than"},
		{"more than a GiB of zeros", zeroFrame(maxUnpacked >> 17), "it has more than"},
		{"a window of a GiB", []byte("\x28\xb5\x2f\xfd\x00\xa0\x00\x00\x00"), "window size"},
		{"too many entries", archive(func(w *writer) {
			for i := range maxEntries + 1 {
				w.entry(fmt.Sprint(i), typeDir|0o755, 0, nil)
			}
		}), "it has more than"},
	} {
		c, err := Audit(bytes.NewReader(x.in))
		if err == nil || !strings.Contains(err.Error(), x.want) {
			t.Errorf("%s: %v, %v, want %s", x.name, c, err, x.want)
		}
	}
}

// TestAGzipThatTheKernelReadsOtherwiseIsRefused: the kernel knows of what may stand in a gzip member's header only the name,
// and takes all else for data. What it would unpack, the audit would not see.
func TestAGzipThatTheKernelReadsOtherwiseIsRefused(t *testing.T) {
	sound := items(sound()...)
	evil := items(item{"bin/sh", typeLink | 0o777, "holdfast", 1})
	// An extra field that is a stored block, as the kernel begins to read: its length is the block's head, and the first byte of
	// the block's own length, which the archive is padded to.
	const length = 0x4400
	evil = append(evil, make([]byte, 1<<8|length>>8-len(evil)&0xff)...)
	extra := binary.LittleEndian.AppendUint16([]byte{byte(len(evil) >> 8)}, ^uint16(len(evil)))
	extra = append(append(extra, evil...), 1, 0, 0, 0xff, 0xff) // and the last block, which is empty
	extra = append(extra, make([]byte, length-len(extra))...)
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	w.Extra = extra
	w.Write(sound)
	w.Close()
	kernel, err := io.ReadAll(flate.NewReader(bytes.NewReader(b.Bytes()[10:])))
	if err != nil || !bytes.Contains(kernel, []byte("bin/sh")) {
		t.Fatalf("control: the kernel would not see a shell: %d bytes, %v", len(kernel), err)
	}
	with := func(f func(*gzip.Writer)) []byte {
		var b bytes.Buffer
		w := gzip.NewWriter(&b)
		f(w)
		w.Write(sound)
		w.Close()
		return b.Bytes()
	}
	checked := gz(sound)
	checked[3] |= 2
	sum := crc32.ChecksumIEEE(checked[:10])
	checked = slices.Insert(checked, 10, byte(sum), byte(sum>>8))
	for name, in := range map[string][]byte{
		"an extra field that is another archive": b.Bytes(),
		"a comment":                              with(func(w *gzip.Writer) { w.Comment = "x" }),
		"a name and a comment":                   with(func(w *gzip.Writer) { w.Name, w.Comment = "x", "y" }),
		"a checksum of the header":               checked,
	} {
		if c, err := Audit(bytes.NewReader(in)); err == nil || !strings.Contains(err.Error(), "gzip header") {
			t.Errorf("%s: %+v, %v", name, c, err)
		}
	}
	if got := problems(t, with(func(w *gzip.Writer) { w.Name = "initramfs.cpio" })); len(got) > 0 {
		t.Errorf("control: a name: %q", got)
	}
}

// zeroFrame is a zstd frame of n times 128 KiB of zeros, four bytes each.
func zeroFrame(n int) []byte {
	b := []byte("\x28\xb5\x2f\xfd\x00\x38") // window 128 KiB
	for i := range n {
		h := uint32(128<<10)<<3 | 1<<1
		if i == n-1 {
			h |= 1
		}
		b = append(b, byte(h), byte(h>>8), byte(h>>16), 0)
	}
	return b
}

// TestAuditTakesLittleMemory: what an archive claims or unpacks to is not kept.
func TestAuditTakesLittleMemory(t *testing.T) {
	body := string(make([]byte, 200<<20))
	in := zst(t, items(append(sound(), item{"data/big", typeFile | 0o444, body, 1})...), zstd.WithWindowSize(8<<20))
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	if _, err := Audit(bytes.NewReader(in)); err != nil {
		t.Fatal(err)
	}
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 48<<20 {
		t.Errorf("it took %d MiB for a file of 200 MiB in %d KiB", n>>20, len(in)>>10)
	}
}

func TestModesLookLikeThoseOfLs(t *testing.T) {
	for m, want := range map[Mode]string{
		typeFile | 0o644: "-rw-r--r--", typeDir | 0o1777: "drwxrwxrwt", typeDir | 0o1776: "drwxrwxrwT", typeLink | 0o777: "lrwxrwxrwx", typeFile | 0o4755: "-rwsr-xr-x",
		typeFile | 0o6644: "-rwSr-Sr--", typeBlock | 0o660: "brw-rw----", typeChar | 0o620: "crw--w----", typePipe | 0o600: "prw-------", typeSocket | 0o777: "srwxrwxrwx", 0: "?---------",
	} {
		var back Mode
		b, _ := m.MarshalText()
		if err := back.UnmarshalText(b); m.String() != want || back != m || err != nil {
			t.Errorf("%o is %v, want %s; %s is %o, %v", uint32(m), m, want, b, uint32(back), err)
		}
	}
}

func FuzzAudit(f *testing.F) {
	good := items(sound()...)
	f.Add(good)
	f.Add(gz(good))
	f.Add(zst(f, good))
	f.Add(slices.Concat(good, make([]byte, 4), zst(f, good), gz(good), good))
	f.Add(zeroFrame(3))
	f.Add(items(item{"data/x", typeFile | 0o4646, string(program64(dyn64, "/lib/ld.so")), 2}, item{"x", typeFile, "#!/bin/sh", 1}))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := Audit(bytes.NewReader(b))
		if err != nil {
			return
		}
		// What was understood can be written again, and means the same.
		var list []item
		for _, e := range c.Entries {
			if e.Mode.kind() == typeFile {
				return // their bodies are not kept
			}
			list = append(list, item{e.Path, e.Mode, e.Target, 1})
		}
		again, err := Audit(bytes.NewReader(items(list...)))
		if err != nil || len(list) > 0 && !slices.Equal(again.Entries, c.Entries) {
			t.Errorf("%v: %v, %v", err, again, c)
		}
	})
}
