package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"text/tabwriter"

	"golang.org/x/term"
)

func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// table prints rows in columns.
func table(w io.Writer, rows ...[]string) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, r := range rows {
		fmt.Fprintln(t, strings.Join(r, "\t"))
	}
	t.Flush()
}

// progress shows one line that changes on a terminal, and one line for each step elsewhere.
type progress struct {
	w    io.Writer
	tty  bool
	last string
}

func newProgress(w io.Writer) *progress {
	f, ok := w.(*os.File)
	return &progress{w: w, tty: ok && term.IsTerminal(int(f.Fd()))}
}

func (p *progress) say(format string, args ...any) {
	s := fmt.Sprintf(format, args...)
	if s == p.last {
		return
	}
	if p.tty {
		fmt.Fprintf(p.w, "\r\x1b[K%s", s)
	} else {
		fmt.Fprintln(p.w, s)
	}
	p.last = s
}

// done ends the changing line.
func (p *progress) done() {
	if p.tty && p.last != "" {
		fmt.Fprint(p.w, "\r\x1b[K")
	}
	p.last = ""
}

// green and red colour a word on a terminal.
func paint(w io.Writer, code, s string) string {
	if f, ok := w.(*os.File); ok && term.IsTerminal(int(f.Fd())) && os.Getenv("NO_COLOR") == "" {
		return "\x1b[" + code + "m" + s + "\x1b[0m"
	}
	return s
}

func stateColour(w io.Writer, s string) string {
	switch s {
	case "up", "running", "active", "serving":
		return paint(w, "32", s)
	case "down", "failed", "lost":
		return paint(w, "31", s)
	}
	return paint(w, "33", s)
}

func mib(n int64) string { return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20)) }

// lineWriter keeps lines of several writers whole.
type lineWriter struct {
	mu sync.Mutex
	w  io.Writer
}

func (l *lineWriter) prefixed(p string) io.Writer { return &prefixed{l: l, prefix: p} }

type prefixed struct {
	l      *lineWriter
	prefix string
	rest   []byte
}

func (p *prefixed) Write(b []byte) (int, error) {
	p.rest = append(p.rest, b...)
	for {
		i := bytes.IndexByte(p.rest, '\n')
		if i < 0 {
			return len(b), nil
		}
		p.l.mu.Lock()
		_, err := fmt.Fprintf(p.l.w, "%s%s\n", p.prefix, printable(p.rest[:i]))
		p.l.mu.Unlock()
		p.rest = p.rest[i+1:]
		if err != nil {
			return 0, err
		}
	}
}

// printable takes the escape sequences out of a workload's line: it must not talk to the user's terminal.
func printable(b []byte) string {
	return strings.Map(func(r rune) rune {
		if r == '\t' || r >= ' ' && r != 0x7f && (r < 0x80 || r > 0x9f) {
			return r
		}
		return -1
	}, string(b))
}
