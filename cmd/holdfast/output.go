package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"unicode/utf8"

	"golang.org/x/term"
)

func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// terminal returns the file behind w if a person looks at it.
func terminal(w io.Writer) (*os.File, bool) {
	f, ok := w.(*os.File)
	return f, ok && term.IsTerminal(int(f.Fd()))
}

// table prints rows in columns, two spaces apart. Colours take no room.
func table(w io.Writer, rows ...[]string) {
	var widths []int
	for _, r := range rows {
		for i, c := range r {
			if i == len(widths) {
				widths = append(widths, 0)
			}
			widths[i] = max(widths[i], width(c))
		}
	}
	var b strings.Builder
	for _, r := range rows {
		var line strings.Builder
		for i, c := range r {
			line.WriteString(c)
			if i < len(r)-1 {
				line.WriteString(strings.Repeat(" ", widths[i]-width(c)+2))
			}
		}
		b.WriteString(strings.TrimRight(line.String(), " ") + "\n")
	}
	io.WriteString(w, b.String())
}

// width is how many columns s takes, without what paint adds.
func width(s string) int {
	n := 0
	for len(s) > 0 {
		if strings.HasPrefix(s, "\x1b[") {
			if i := strings.IndexByte(s, 'm'); i > 0 {
				s = s[i+1:]
				continue
			}
		}
		_, size := utf8.DecodeRuneInString(s)
		s = s[size:]
		n++
	}
	return n
}

// progress shows one line that changes on a terminal, and one line for each step elsewhere.
type progress struct {
	w    io.Writer
	tty  *os.File // nil elsewhere
	last string
}

func newProgress(w io.Writer) *progress {
	p := &progress{w: w}
	if f, ok := terminal(w); ok {
		p.tty = f
	}
	return p
}

func (p *progress) say(format string, args ...any) {
	s := printable(fmt.Appendf(nil, format, args...))
	if s == p.last {
		return
	}
	p.last = s
	if p.tty == nil {
		fmt.Fprintln(p.w, s)
		return
	}
	// A line that wraps could not be taken back.
	if cols, _, err := term.GetSize(int(p.tty.Fd())); err == nil && cols > 1 && utf8.RuneCountInString(s) >= cols {
		s = string([]rune(s)[:cols-2]) + "…"
	}
	fmt.Fprintf(p.w, "\r\x1b[K%s", s)
}

// done ends the changing line.
func (p *progress) done() {
	if p.tty != nil && p.last != "" {
		fmt.Fprint(p.w, "\r\x1b[K")
	}
	p.last = ""
}

// Colours.
const (
	red    = "31"
	green  = "32"
	yellow = "33"
)

// paint colours a word on a terminal.
func paint(w io.Writer, code, s string) string {
	if _, ok := terminal(w); ok && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb" {
		return "\x1b[" + code + "m" + s + "\x1b[0m"
	}
	return s
}

func stateColour(w io.Writer, s string) string {
	switch s {
	case "up", "running", "active", "serving":
		return paint(w, green, s)
	case "down", "failed", "lost":
		return paint(w, red, s)
	}
	return paint(w, yellow, s)
}

func mib(n int64) string { return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20)) }

// lineWriter keeps lines of several writers whole.
type lineWriter struct {
	mu   sync.Mutex
	w    io.Writer
	json bool // one object a line, with the name instead of a prefix
}

// of returns the writer of one source. Its Close writes a last line that has no end.
func (l *lineWriter) of(name, prefix string) io.WriteCloser {
	return &lines{l: l, name: name, prefix: prefix}
}

type lines struct {
	l            *lineWriter
	name, prefix string
	rest         []byte
}

// maxLine bounds what is kept of a line that does not end.
const maxLine = 64 << 10

func (p *lines) Write(b []byte) (int, error) {
	p.rest = append(p.rest, b...)
	for {
		i := bytes.IndexByte(p.rest, '\n')
		if i < 0 && len(p.rest) < maxLine {
			return len(b), nil
		}
		next := i + 1
		if i < 0 || i > maxLine {
			i, next = maxLine, maxLine
		}
		err := p.line(p.rest[:i])
		p.rest = p.rest[next:]
		if err != nil {
			return 0, err
		}
	}
}

func (p *lines) Close() error {
	if len(p.rest) == 0 {
		return nil
	}
	defer func() { p.rest = nil }()
	return p.line(p.rest)
}

func (p *lines) line(b []byte) error {
	p.l.mu.Lock()
	defer p.l.mu.Unlock()
	if p.l.json {
		return json.NewEncoder(p.l.w).Encode(struct {
			Workload string `json:"workload"`
			Line     string `json:"line"`
		}{p.name, string(b)})
	}
	_, err := fmt.Fprintf(p.l.w, "%s%s\n", p.prefix, printable(b))
	return err
}

// printable takes out of a text of somebody else's what would talk to the user's terminal: escape sequences and other
// control characters, and those that turn the direction of writing.
func printable(b []byte) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\t':
			return r
		case r < ' ', r >= 0x7f && r <= 0x9f, r >= 0x202a && r <= 0x202e, r >= 0x2066 && r <= 0x2069, r == 0x2028, r == 0x2029:
			return -1
		}
		return r
	}, string(b))
}
