package image

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash"
	"io"
	"path"
	"regexp"
	"slices"
	"strings"
)

// Digest is a SHA-256 digest; in text it is in hexadecimal.
type Digest [32]byte

// String is the digest in hexadecimal.
func (d Digest) String() string { return hex.EncodeToString(d[:]) }

// MarshalText is the digest in hexadecimal.
func (d Digest) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText reads it back.
func (d *Digest) UnmarshalText(b []byte) error {
	if len(b) != 2*len(d) {
		return fmt.Errorf("digest of %d characters, %d are needed", len(b), 2*len(d))
	}
	_, err := hex.Decode(d[:], b)
	return err
}

func sum(h hash.Hash) (d Digest) {
	h.Sum(d[:0])
	return d
}

// Entry is one entry of an initramfs.
type Entry struct {
	Path   string `json:"path"`
	Mode   Mode   `json:"mode"`
	Size   int64  `json:"size"`
	SHA256 Digest `json:"sha256,omitzero"`  // of a file
	Target string `json:"target,omitempty"` // of a symbolic link
}

// Finding is an entry that something is to be said of.
type Finding struct {
	Path string `json:"path"`
	Why  string `json:"why"`
}

// Contents is what Audit found in an initramfs. An entry may be in several lists.
type Contents struct {
	Entries      []Entry   `json:"entries"`
	Executables  []Finding `json:"executables"`  // by content, whatever name and mode say, and by mode
	Interpreters []Finding `json:"interpreters"` // shells, interpreters, what needs one, and ways to log in
	Libraries    []Finding `json:"libraries"`
	Modules      []Finding `json:"modules"`  // of the kernel
	Setuid       []Finding `json:"setuid"`   // and setgid
	Special      []Finding `json:"special"`  // devices, pipes, sockets
	Writable     []Finding `json:"writable"` // by everybody
	Odd          []Finding `json:"odd"`      // what could make one entry stand for another, or hide what it is
}

// maxHead is how much of a file is looked at to say what it is.
const maxHead = 64 << 10

// Audit reads an initramfs to its end: newc archives, plain or in gzip or zstd, one or several. It believes no name and no
// mode, and keeps nothing of the files. File capabilities cannot be in a newc archive.
func Audit(r io.Reader) (*Contents, error) {
	none := []Finding{} // in JSON a list, not null
	c := &Contents{[]Entry{}, none, none, none, none, none, none, none, none}
	seen := map[string]bool{}
	if err := walk(r, func(h header, body io.Reader) error { return c.add(h, body, seen) }); err != nil {
		return nil, fmt.Errorf("audit initramfs: %w", err)
	}
	return c, nil
}

func (c *Contents) add(h header, body io.Reader, seen map[string]bool) error {
	e := Entry{Path: h.name, Mode: h.mode, Size: h.size}
	say := func(to *[]Finding, format string, args ...any) {
		*to = append(*to, Finding{h.name, fmt.Sprintf(format, args...)})
	}
	plain := path.Clean("/" + h.name)
	if h.name != "." && "/"+h.name != plain {
		say(&c.Odd, "its path is not plain")
	}
	if seen[plain] {
		say(&c.Odd, "it is there twice")
	}
	seen[plain] = true
	if h.mode.kind() != typeLink && h.mode&0o002 != 0 && !(h.name == "tmp" && h.mode.kind() == typeDir && h.mode&sticky != 0) {
		say(&c.Writable, "everybody may write it")
	}
	if h.mode.kind() != typeDir {
		if why := known(path.Base(plain)); why != "" {
			say(&c.Interpreters, "%s by its name", why)
		}
		if library.MatchString(path.Base(plain)) {
			say(&c.Libraries, "by its name")
		}
	}
	if h.uid != 0 || h.gid != 0 {
		say(&c.Odd, "its owner is not root")
	}
	if h.mode&setID != 0 {
		say(&c.Setuid, "its mode is %v", h.mode)
	}
	switch h.mode.kind() {
	case typeDir:
	case typeLink:
		target, err := io.ReadAll(body)
		if err != nil {
			return err
		}
		e.Target = string(target)
		if strings.ContainsRune(e.Target, 0) {
			return fmt.Errorf("a link to %q", e.Target)
		}
		if why := known(path.Base(e.Target)); why != "" {
			say(&c.Interpreters, "%s by what it links to", why)
		}
	case typeFile:
		if h.links > 1 {
			say(&c.Odd, "it is a hard link")
		}
		sha := sha256.New()
		head, err := io.ReadAll(io.LimitReader(io.TeeReader(body, sha), maxHead))
		if err != nil {
			return err
		}
		if _, err := io.Copy(sha, body); err != nil {
			return err
		}
		e.SHA256 = sum(sha)
		f := inspect(head)
		switch f.is {
		case module:
			say(&c.Modules, "a relocatable ELF file")
		case script:
			say(&c.Executables, "a script")
			say(&c.Interpreters, "a script for %s", f.interpreter)
		case program:
			say(&c.Executables, "an ELF program")
			if f.interpreter != "" {
				say(&c.Interpreters, "it is dynamic and needs %s", f.interpreter)
			}
		}
		if f.is != program && f.is != script && h.mode&0o111 != 0 {
			say(&c.Executables, "by its mode")
		}
		if f.odd != "" {
			say(&c.Odd, "%s", f.odd)
		}
	default:
		say(&c.Special, "it is no file, directory or link: %v", h.mode)
	}
	c.Entries = append(c.Entries, e)
	return nil
}

var (
	library = regexp.MustCompile(`^(ld-.*|ld\.so.*|.*\.so(\.[0-9.]+)?)$`)
	shell   = regexp.MustCompile(`^(r?bash|d?ash|[akmpz]?sh|m?ksh(93)?|r?zsh|t?csh|fish|hush|yash|busybox.*|toybox.*|sash|nsh|elvish|xonsh|pwsh)([-.0-9].*)?$`)
	// Interpreters of languages, and other programs that run what they are told.
	language = regexp.MustCompile(`^(python.*|pypy.*|perl.*|lua.*|ruby.*|irb.*|node(js)?|deno|bun|php.*|tclsh.*|wish.*|expect|guile.*|[gmn]?awk|sed|bc|dc|ed|vi|vim.*|java|gdb.*|strace)$`)
	entrance = regexp.MustCompile(`^(sshd.*|dropbear.*|telnetd|in\.telnetd|rlogind|rshd|ftpd|[am]?getty|getty.*|login|sulogin|su|sudo|doas|socat|nc|ncat|netcat.*)$`)
)

// known says what a program of that name is, if an image must not have it.
func known(name string) string {
	switch name = strings.ToLower(name); {
	case strings.HasSuffix(name, ".ko"):
		return "" // what it is is said by its content
	case shell.MatchString(name):
		return "a shell"
	case language.MatchString(name):
		return "an interpreter"
	case entrance.MatchString(name):
		return "a way in"
	}
	return ""
}

// Kinds of a file's content.
const (
	notCode = iota
	module
	script
	program
)

type content struct {
	is          int
	interpreter string // of a script, or of a program that is dynamic
	odd         string
}

// inspect says what a file is by how it begins. The kernel executes scripts and ELF files of types EXEC and DYN; an ELF
// file of any other type than REL counts as a program too.
func inspect(head []byte) content {
	if rest, ok := bytes.CutPrefix(head, []byte("#!")); ok {
		line, _, _ := bytes.Cut(rest[:min(len(rest), 256)], []byte("\n"))
		return content{is: script, interpreter: fmt.Sprintf("%q", bytes.TrimSpace(line))}
	}
	if !bytes.HasPrefix(head, []byte("\x7fELF")) {
		return content{}
	}
	le := binary.LittleEndian
	if len(head) >= 18 && le.Uint16(head[16:]) == 1 { // ET_REL
		return content{is: module}
	}
	c := content{is: program}
	if len(head) < 64 || head[4] != 2 || head[5] != 1 || le.Uint16(head[18:]) != 62 {
		c.odd = "it is no ELF program for x86-64"
		return c
	}
	at, size, n := le.Uint64(head[32:]), uint64(le.Uint16(head[54:])), uint64(le.Uint16(head[56:]))
	if size != 56 || at > maxHead || at+n*size > uint64(len(head)) {
		c.odd = "its program headers are out of sight"
		return c
	}
	for p := head[at:]; n > 0; n, p = n-1, p[size:] {
		if le.Uint32(p) != 3 { // PT_INTERP
			continue
		}
		c.interpreter = "an interpreter that is out of sight"
		if off, length := le.Uint64(p[8:]), le.Uint64(p[32:]); off <= maxHead && length <= 4096 && off+length <= uint64(len(head)) {
			c.interpreter = fmt.Sprintf("%q", bytes.TrimRight(head[off:off+length], "\x00"))
		}
	}
	return c
}

// Paths of what an image has.
const (
	pathHoldfast = "bin/holdfast"
	pathRunsc    = "bin/holdfast-runsc"
	pathInit     = "init"
	pathTmp      = "tmp"
	pathModules  = "lib/modules"
	pathOrder    = pathModules + "/order"
	pathRoots    = "etc/ssl/certs/ca-certificates.crt"
)

// Problems says what an image must not have and these contents do, and what they lack: an image has two executables, both
// static, none of the rest, and nothing that Build does not put there: a file that is no code can do harm too, by where it is.
func (c *Contents) Problems() []string {
	var out []string
	said := map[string]bool{}
	say := func(p, why string) {
		out = append(out, fmt.Sprintf("%s: %s", p, why))
		said[p] = true
	}
	programs := []string{pathHoldfast, pathRunsc}
	missing := slices.Clone(programs)
	for _, f := range c.Executables {
		if i := slices.Index(missing, f.Path); i >= 0 {
			missing = slices.Delete(missing, i, i+1)
		} else if !slices.Contains(programs, f.Path) { // a second one of that path is odd
			say(f.Path, "it is executable ("+f.Why+"), and not one of the two that an image has")
		}
	}
	for _, p := range missing {
		say(p, "it is not there, or not executable")
	}
	for _, list := range []struct {
		what     string
		findings []Finding
	}{
		{"shell or interpreter", c.Interpreters}, {"library", c.Libraries}, {"setuid or setgid", c.Setuid},
		{"device, pipe or socket", c.Special}, {"writable", c.Writable}, {"odd", c.Odd},
	} {
		for _, f := range list.findings {
			say(f.Path, list.what+": "+f.Why)
		}
	}
	for _, e := range c.Entries {
		if !said[e.Path] && !c.belongs(e) {
			say(e.Path, "it is no part of an image")
		}
	}
	if !slices.ContainsFunc(c.Entries, func(e Entry) bool {
		return e.Path == pathInit && e.Mode.kind() == typeLink && e.Target == pathHoldfast
	}) {
		say(pathInit, "it is not a link to "+pathHoldfast)
	}
	return out
}

// belongs says whether Build makes such an entry.
func (c *Contents) belongs(e Entry) bool {
	switch e.Mode.kind() {
	case typeDir:
		return e.Path == pathTmp || slices.Contains(directories(), e.Path)
	case typeLink:
		return e.Path == pathInit
	case typeFile:
		dir, name := path.Split(e.Path)
		return slices.Contains([]string{pathHoldfast, pathRunsc, pathOrder, pathRoots}, e.Path) ||
			dir == pathModules+"/" && path.Ext(name) == ".ko" && slices.ContainsFunc(c.Modules, func(f Finding) bool { return f.Path == e.Path })
	}
	return false
}
