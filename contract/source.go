package contract

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// at is an error with the line of the Compose file that it is about.
func at(n *yaml.Node, format string, args ...any) error {
	return fmt.Errorf("line %d: %s", n.Line, clip(fmt.Sprintf(format, args...)))
}

// A reader turns the bytes of a Compose file into a tree that holds nothing but mappings, sequences and scalars: aliases
// and merges are followed and variables filled in. Everybody behind it sees this tree and nothing else, so that what is
// checked is what is used. Its size is bounded by what it holds, not by what the file looks like.
type reader struct {
	vars  *variables
	parts int                    // that the tree may still have
	begin func(*yaml.Node) error // sees the file as it is written, before variables are filled in
}

// read parses exactly one document.
func (r *reader) read(raw []byte) (*yaml.Node, error) {
	dec := yaml.NewDecoder(bytes.NewReader(raw))
	var doc, more yaml.Node
	if err := dec.Decode(&doc); errors.Is(err, io.EOF) {
		return nil, errors.New("it is empty, and not a Compose file")
	} else if err != nil {
		return nil, err
	}
	switch err := dec.Decode(&more); {
	case err == nil:
		return nil, at(&more, "a second document begins: write all of it in one")
	case !errors.Is(err, io.EOF):
		return nil, err
	}
	if len(doc.Content) != 1 || doc.Content[0].Kind != yaml.MappingNode {
		return nil, errors.New("it is not a Compose file: the top is no mapping")
	}
	if err := r.begin(doc.Content[0]); err != nil {
		return nil, err
	}
	return r.expand(doc.Content[0], 0)
}

func (r *reader) expand(n *yaml.Node, depth int) (*yaml.Node, error) {
	if r.parts--; r.parts < 0 {
		return nil, fmt.Errorf("it has more than %d parts when its aliases are followed", maxNodes)
	}
	if depth > maxNesting {
		return nil, at(n, "nested more than %d levels deep", maxNesting)
	}
	if n.Kind == yaml.AliasNode {
		return r.expand(n.Alias, depth+1)
	}
	tag := n.ShortTag()
	if !slices.Contains([]string{"!!str", "!!int", "!!float", "!!bool", "!!null", "!!timestamp", "!!map", "!!seq", "!!merge"}, tag) {
		return nil, at(n, "the tag %s is not supported: leave it out", tag)
	}
	out := &yaml.Node{Kind: n.Kind, Style: n.Style, Tag: tag, Value: n.Value, Line: n.Line, Column: n.Column}
	switch n.Kind {
	case yaml.ScalarNode:
		if !strings.Contains(n.Value, "$") {
			return out, r.vars.take(n.Value)
		}
		v, err := r.vars.fill(n.Value, n.Line)
		if err != nil {
			return nil, at(n, "%v", err)
		}
		// What came from a variable stays a string: a version of 1.10 is not the number 1.1.
		out.Value, out.Tag, out.Style = v, "!!str", yaml.DoubleQuotedStyle
		return out, nil
	case yaml.SequenceNode:
		for _, c := range n.Content {
			x, err := r.expand(c, depth+1)
			if err != nil {
				return nil, err
			}
			out.Content = append(out.Content, x)
		}
		return out, nil
	}
	own, err := r.mapping(n, depth)
	if err != nil {
		return nil, err
	}
	out.Content = own
	return out, nil
}

// mapping returns the keys and values of a mapping, those of its merges behind its own. A merge counts as a part and as a
// level, so that one that holds itself ends too.
func (r *reader) mapping(n *yaml.Node, depth int) ([]*yaml.Node, error) {
	if depth > maxNesting {
		return nil, at(n, "nested more than %d levels deep", maxNesting)
	}
	var out, merged []*yaml.Node
	have := map[string]int{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, v := n.Content[i], n.Content[i+1]
		if k.Kind != yaml.ScalarNode {
			return nil, at(k, "a key must be a word")
		}
		if k.ShortTag() == "!!merge" {
			list := []*yaml.Node{v}
			if v.Kind == yaml.SequenceNode {
				list = v.Content
			}
			for _, m := range list {
				for m.Kind == yaml.AliasNode {
					m = m.Alias
				}
				if m.Kind != yaml.MappingNode {
					return nil, at(v, "<< takes a mapping, or a list of mappings")
				}
				if r.parts--; r.parts < 0 {
					return nil, fmt.Errorf("it has more than %d parts when its aliases are followed", maxNodes)
				}
				pairs, err := r.mapping(m, depth+1)
				if err != nil {
					return nil, err
				}
				merged = append(merged, pairs...)
			}
			continue
		}
		if line, twice := have[k.Value]; twice {
			return nil, at(k, "%q stands on line %d already", k.Value, line)
		}
		have[k.Value] = k.Line
		if err := r.vars.take(k.Value); err != nil {
			return nil, err
		}
		x, err := r.expand(v, depth+1)
		if err != nil {
			return nil, err
		}
		out = append(out, &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: k.Value, Line: k.Line, Column: k.Column}, x)
	}
	for i := 0; i < len(merged); i += 2 { // what comes first goes before
		if _, twice := have[merged[i].Value]; !twice {
			have[merged[i].Value] = merged[i].Line
			out = append(out, merged[i], merged[i+1])
		}
	}
	return out, nil
}

// child returns the value of a key of a mapping, nil when absent.
func child(n *yaml.Node, key string) *yaml.Node {
	if n == nil || n.Kind != yaml.MappingNode {
		return nil
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == key {
			return n.Content[i+1]
		}
	}
	return nil
}

// pairs calls f for each key of a mapping, in the file's order.
func pairs(n *yaml.Node, f func(key, value *yaml.Node) error) error {
	if n == nil || n.Kind != yaml.MappingNode {
		return nil
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		if err := f(n.Content[i], n.Content[i+1]); err != nil {
			return err
		}
	}
	return nil
}

// items are the members of a sequence.
func items(n *yaml.Node) []*yaml.Node {
	if n == nil || n.Kind != yaml.SequenceNode {
		return nil
	}
	return n.Content
}

// value is the tree as compose-go wants it.
func value(n *yaml.Node) (any, error) {
	switch n.Kind {
	case yaml.MappingNode:
		m := make(map[string]any, len(n.Content)/2)
		return m, pairs(n, func(k, v *yaml.Node) (err error) {
			m[k.Value], err = value(v)
			return err
		})
	case yaml.SequenceNode:
		s := make([]any, len(n.Content))
		for i, c := range n.Content {
			var err error
			if s[i], err = value(c); err != nil {
				return nil, err
			}
		}
		return s, nil
	}
	switch n.Tag {
	case "!!null", "!!bool", "!!int", "!!float":
		var v any
		if err := n.Decode(&v); err != nil {
			return nil, at(n, "%v", err)
		}
		return v, nil
	}
	return n.Value, nil
}

// variables fills in ${NAMES}. The Compose file's author chooses what is filled in and how often, and is not always the
// user: what may come out of it is bounded, and which of the user's variables went in is noted.
type variables struct {
	env   map[string]string // the user's
	file  map[string]string // from .env, behind the user's
	room  int               // bytes that all texts together may still have
	taken map[string]bool   // of the user's
	unset map[string]int    // without a default, by line
}

// maxDefaults bounds ${A:-${B:-${C:-…}}}.
const maxDefaults = 8

// take counts text.
func (v *variables) take(s string) error {
	if v.room -= len(s); v.room < 0 {
		return fmt.Errorf("it has more than %d bytes when its aliases and variables are followed", maxText)
	}
	return nil
}

func (v *variables) lookup(name string) (string, bool) {
	if s, ok := v.env[name]; ok {
		v.taken[name] = true
		return s, true
	}
	s, ok := v.file[name]
	return s, ok
}

// fill replaces $NAME, ${NAME}, ${NAME:-default}, ${NAME:?error}, ${NAME:+other}, the three of them without the colon, and
// $$.
func (v *variables) fill(s string, line int) (string, error) {
	return v.fillFrom(s, 0, v.lookup, func(name string) {
		if _, seen := v.unset[name]; !seen {
			v.unset[name] = line
		}
	})
}

func (v *variables) fillFrom(s string, depth int, lookup func(string) (string, bool), unset func(string)) (string, error) {
	if depth > maxDefaults {
		return "", fmt.Errorf("variables in variables, more than %d levels deep", maxDefaults)
	}
	var out strings.Builder
	put := func(t string) error {
		out.WriteString(t)
		return v.take(t)
	}
	for s != "" {
		i := strings.IndexByte(s, '$')
		if i < 0 {
			i = len(s)
		}
		if err := put(s[:i]); err != nil {
			return "", err
		}
		if s = s[i:]; s == "" {
			break
		}
		s = s[1:]
		name, braced := "", false
		var op, arg string
		switch {
		case strings.HasPrefix(s, "$"):
			s = s[1:]
			if err := put("$"); err != nil {
				return "", err
			}
			continue
		case strings.HasPrefix(s, "{"):
			end := closing(s)
			if end < 0 {
				return "", fmt.Errorf("${ without its }: write $$ for a $")
			}
			name, op, arg = cutVariable(s[1:end])
			if name == "" || op == "" && arg != "" {
				return "", fmt.Errorf("%q is not a variable: write ${NAME}, ${NAME:-default}, ${NAME:?error} or ${NAME:+other}, and $$ for a $", "$"+s[:end+1])
			}
			s, braced = s[end+1:], true
		default:
			name, _, _ = cutVariable(s)
			s = s[len(name):]
		}
		if name == "" { // a $ by itself
			if err := put("$"); err != nil {
				return "", err
			}
			continue
		}
		val, ok := lookup(name)
		if braced && op != "" {
			there := ok && (val != "" || op[0] != ':')
			var err error
			switch op[len(op)-1] {
			case '-':
				if !there {
					val, err = v.fillFrom(arg, depth+1, lookup, unset)
				}
			case '+':
				if val = ""; there {
					val, err = v.fillFrom(arg, depth+1, lookup, unset)
				}
			case '?':
				if !there {
					if arg, err = v.fillFrom(arg, depth+1, lookup, unset); err == nil {
						err = fmt.Errorf("the variable %s is needed and not set: %s", name, arg)
					}
				}
			}
			if err != nil {
				return "", err
			}
		} else if !ok {
			unset(name)
		}
		if !utf8.ValidString(val) {
			return "", fmt.Errorf("the variable %s is not UTF-8 text", name)
		}
		if err := put(val); err != nil {
			return "", err
		}
	}
	return out.String(), nil
}

// closing is the index of the brace that closes the one at the beginning of s.
func closing(s string) int {
	open := 0
	for i := range len(s) {
		switch s[i] {
		case '{':
			open++
		case '}':
			if open--; open == 0 {
				return i
			}
		}
	}
	return -1
}

// cutVariable splits what is between the braces.
func cutVariable(s string) (name, op, arg string) {
	i := 0
	for i < len(s) && (s[i] == '_' || s[i] >= 'a' && s[i] <= 'z' || s[i] >= 'A' && s[i] <= 'Z' || i > 0 && s[i] >= '0' && s[i] <= '9') {
		i++
	}
	name, arg = s[:i], s[i:]
	for _, op := range []string{":-", "-", ":?", "?", ":+", "+"} {
		if rest, ok := strings.CutPrefix(arg, op); ok {
			return name, op, rest
		}
	}
	return name, "", arg
}

// envFile reads KEY=value lines: quotes, comments and "export" as in Compose. A value in double quotes or none may name
// variables, the user's and those above it in the file; a key without a value takes it from the user's environment.
func (v *variables) envFile(raw []byte) (map[string]string, error) {
	out := map[string]string{}
	lookup := func(name string) (string, bool) {
		if s, ok := v.lookup(name); ok {
			return s, ok
		}
		s, ok := out[name]
		return s, ok
	}
	s := strings.ReplaceAll(strings.TrimPrefix(string(raw), "\uFEFF"), "\r\n", "\n")
	for line := 1; s != ""; {
		all, rest, _ := strings.Cut(s, "\n")
		text := strings.TrimPrefix(strings.TrimLeft(all, " \t"), "export ")
		if text = strings.TrimLeft(text, " \t"); text == "" || text[0] == '#' {
			s, line = rest, line+1
			continue
		}
		end := strings.IndexAny(text, "=: \t#")
		if end < 0 {
			end = len(text)
		}
		key, tail := text[:end], strings.TrimLeft(text[end:], " \t")
		if strings.Trim(key, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-") != "" || key == "" {
			return nil, fmt.Errorf("line %d: it is not KEY=value", line)
		}
		if tail == "" || tail[0] == '#' {
			if val, ok := v.lookup(key); ok {
				out[key] = val
			}
			s, line = rest, line+1
			continue
		}
		if tail[0] != '=' && tail[0] != ':' {
			return nil, fmt.Errorf("line %d: it is not KEY=value", line)
		}
		tail = strings.TrimLeft(tail[1:], " \t")
		val, literal := "", false
		if tail != "" && (tail[0] == '"' || tail[0] == '\'') {
			// A quoted value may go over several lines.
			quoted, n, ok := s[len(all)-len(tail):], 0, false
			if val, n, ok = quotedValue(quoted); !ok {
				return nil, fmt.Errorf("line %d: a quote is not closed", line)
			}
			literal = tail[0] == '\''
			line += strings.Count(quoted[:n], "\n")
			var behind string
			behind, rest, _ = strings.Cut(quoted[n:], "\n")
			if behind = strings.TrimLeft(behind, " \t"); behind != "" && behind[0] != '#' {
				return nil, fmt.Errorf("line %d: text behind the closing quote", line)
			}
		} else {
			val, _, _ = strings.Cut(tail, " #")
			if strings.HasPrefix(val, "#") {
				val = ""
			}
			val = strings.TrimRight(val, " \t")
		}
		if !literal {
			var err error
			if val, err = v.fillFrom(val, 0, lookup, func(string) {}); err != nil {
				return nil, fmt.Errorf("line %d: %w", line, err)
			}
		}
		out[key] = val
		s, line = rest, line+1
	}
	return out, nil
}

// quotedValue reads from a quote to its end, and returns how many bytes that are. An escaped dollar becomes $$, which
// stands for one when variables are filled in.
func quotedValue(s string) (val string, n int, ok bool) {
	quote := s[0]
	var out strings.Builder
	for i := 1; i < len(s); i++ {
		switch c := s[i]; {
		case c == quote:
			return out.String(), i + 1, true
		case c == '\\' && i+1 < len(s) && s[i+1] == quote:
			i++
			out.WriteByte(quote)
		case c == '\\' && i+1 < len(s) && quote == '"':
			i++
			e := strings.IndexByte(`abfnrtv\`, s[i])
			switch {
			case s[i] == '$':
				out.WriteString("$$")
			case e >= 0:
				out.WriteByte("\a\b\f\n\r\t\v\\"[e])
			default:
				out.WriteByte('\\')
				out.WriteByte(s[i])
			}
		default:
			out.WriteByte(c)
		}
	}
	return "", 0, false
}

// notes says what went in without being in the file.
func (v *variables) notes() []string {
	var out []string
	if len(v.taken) > 0 {
		out = append(out, "from your environment: "+strings.Join(slices.Sorted(maps.Keys(v.taken)), ", "))
	}
	for _, name := range slices.Sorted(maps.Keys(v.unset)) {
		out = append(out, fmt.Sprintf("line %d: the variable %s is not set: it is empty", v.unset[name], name))
	}
	return out
}
