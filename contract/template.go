package contract

import (
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"github.com/docker/go-units"
	"go.yaml.in/yaml/v3"

	"holdfast/identity"
)

// A template is a Compose file with parameters: ${variables} whose type the file declares under x-holdfast.parameters. They
// fill texts of the file that was parsed, so that no value can add a key. A published template is the file alone: it names
// no other file and takes no variable from whoever deploys it but its parameters.

// Limits of parameters.
const (
	MaxParameters = 64
	MaxValue      = 4 << 10
)

// Parameter types.
const (
	TypeText    = "text"    // no control characters
	TypeInteger = "integer" // between min and max
	TypeFlag    = "flag"    // true or false
	TypeSize    = "size"    // as 4GiB
	TypeHost    = "host"    // of a route
)

// Parameter is a value that whoever deploys a template chooses.
type Parameter struct {
	Name    string   `json:"name"`
	Type    string   `json:"type"`
	About   string   `json:"about,omitempty"`
	Default *string  `json:"default,omitempty"` // nil: it must be given
	Example string   `json:"example,omitempty"` // of one that must be given: with it the template is checked when it is published
	Choices []string `json:"choices,omitempty"` // only these
	Pattern string   `json:"pattern,omitempty"` // RE2, of all of the text
	Min     *int64   `json:"min,omitempty"`
	Max     *int64   `json:"max,omitempty"`
}

// Origin is the template that a revision was made of, in its body.
type Origin struct {
	Account identity.AccountID `cbor:"1,keyasint" json:"account"`
	Name    string             `cbor:"2,keyasint" json:"name"`
	Version string             `cbor:"3,keyasint" json:"version"`
	Digest  [32]byte           `cbor:"4,keyasint" json:"-"` // SHA-256 of the document, which is the body's Source
	Values  []Value            `cbor:"5,keyasint,omitempty" json:"values,omitempty"`
}

// Value is one that was given.
type Value struct {
	Name string `cbor:"1,keyasint" json:"name"`
	Text string `cbor:"2,keyasint" json:"text"`
}

// String is the template's full name.
func (o *Origin) String() string { return o.Account.String() + "/" + o.Name + "@" + o.Version }

func (o *Origin) valid() error {
	if err := ValidTemplateName(o.Name, o.Version); err != nil {
		return err
	}
	if len(o.Values) > MaxParameters {
		return fmt.Errorf("%d values, at most %d are allowed", len(o.Values), MaxParameters)
	}
	for i, v := range o.Values {
		if !parameterName.MatchString(v.Name) || len(v.Text) > MaxValue || i > 0 && v.Name <= o.Values[i-1].Name {
			return fmt.Errorf("value of %q", clip(v.Name))
		}
	}
	return nil
}

var (
	parameterName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]{0,62}$`)
	versionForm   = regexp.MustCompile(`^[0-9][0-9A-Za-z.-]{0,31}$`)
)

// ValidTemplateName checks a template's name and version.
func ValidTemplateName(name, version string) error {
	if err := validContractName(name); err != nil {
		return err
	}
	if !versionForm.MatchString(version) {
		return fmt.Errorf("version %q: a number first, then numbers, letters, dots and hyphens, at most 32 characters", version)
	}
	return nil
}

// Parameters reads the parameters that a Compose file declares, in the order of their names.
func Parameters(raw []byte) (out []Parameter, err error) {
	defer func() {
		if p := recover(); p != nil { // the parser is not ours
			out, err = nil, fmt.Errorf("the file cannot be read: %v", p)
		}
	}()
	if len(raw) > MaxCompose {
		return nil, fmt.Errorf("more than %d bytes", MaxCompose)
	}
	_, err = (&reader{begin: func(top *yaml.Node) (err error) {
		if out, err = parametersOf(top); err == nil {
			err = errSeen
		}
		return err
	}}).read(raw)
	if errors.Is(err, errSeen) {
		err = nil
	}
	return out, err
}

var errSeen = errors.New("that is enough of the file")

func parametersOf(top *yaml.Node) (out []Parameter, err error) {
	all := child(child(top, "x-holdfast"), "parameters")
	if err := errors.Join(shape(all, yaml.MappingNode, "x-holdfast.parameters"), few(all, MaxParameters, "parameters")); err != nil {
		return nil, err
	}
	seen := map[string]bool{}
	err = pairs(all, func(k, v *yaml.Node) error {
		p := Parameter{Name: k.Value, Type: TypeText}
		if !parameterName.MatchString(p.Name) {
			return at(k, "parameter %q: letters, numbers and _, at most 63", clip(p.Name))
		}
		if seen[p.Name] {
			return at(k, "parameter %s is there twice", p.Name)
		}
		seen[p.Name] = true
		if err := shape(v, yaml.MappingNode, "parameter "+p.Name); err != nil {
			return err
		}
		number := func(n *yaml.Node) (*int64, error) {
			x, err := strconv.ParseInt(n.Value, 10, 64)
			if err != nil {
				return nil, at(n, "parameter %s: %q is no number", p.Name, n.Value)
			}
			return &x, nil
		}
		if err := pairs(v, func(key, n *yaml.Node) (err error) {
			if list := key.Value == "choices"; n.Kind != yaml.ScalarNode && !list || list && n.Kind != yaml.SequenceNode {
				return at(n, "parameter %s: %s cannot be that", p.Name, key.Value)
			}
			switch key.Value {
			case "type":
				p.Type = n.Value
			case "about":
				p.About = n.Value
			case "default":
				p.Default = &n.Value
			case "example":
				p.Example = n.Value
			case "pattern":
				p.Pattern = n.Value
			case "min":
				p.Min, err = number(n)
			case "max":
				p.Max, err = number(n)
			case "choices":
				for _, c := range n.Content {
					p.Choices = append(p.Choices, c.Value)
				}
			default:
				return at(key, "parameter %s: %q is not supported; it can have %s", p.Name, key.Value, strings.Join(supported("parameter"), ", "))
			}
			return err
		}); err != nil {
			return err
		}
		if err := p.valid(); err != nil {
			return at(k, "%v", err)
		}
		out = append(out, p)
		return nil
	})
	slices.SortFunc(out, func(a, b Parameter) int { return strings.Compare(a.Name, b.Name) })
	return out, err
}

func (p *Parameter) valid() error {
	if !slices.Contains([]string{TypeText, TypeInteger, TypeFlag, TypeSize, TypeHost}, p.Type) {
		return fmt.Errorf("parameter %s: there is no type %q: text, integer, flag, size, host", p.Name, p.Type)
	}
	if (p.Min != nil || p.Max != nil) && p.Type != TypeInteger {
		return fmt.Errorf("parameter %s: min and max are of integers", p.Name)
	}
	if len(p.Pattern) > 1000 {
		return fmt.Errorf("parameter %s: a pattern of %d bytes", p.Name, len(p.Pattern))
	}
	if _, err := regexp.Compile(p.Pattern); err != nil {
		return fmt.Errorf("parameter %s: %w", p.Name, err)
	}
	for what, s := range map[string]*string{"default": p.Default, "example": &p.Example} {
		if s == nil || what == "example" && *s == "" {
			continue
		}
		if err := p.Check(*s); err != nil {
			return fmt.Errorf("its %s: %w", what, err)
		}
	}
	return nil
}

// Check says whether a value is one of the parameter's.
func (p *Parameter) Check(s string) error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("parameter %s: %q %s", p.Name, clip(s), fmt.Sprintf(format, args...))
	}
	if len(s) > MaxValue {
		return fmt.Errorf("parameter %s: %d bytes, at most %d are allowed", p.Name, len(s), MaxValue)
	}
	if strings.ContainsFunc(s, func(r rune) bool { return unicode.IsControl(r) || r == unicode.ReplacementChar }) {
		return bad("has control characters")
	}
	switch p.Type {
	case TypeInteger:
		x, err := strconv.ParseInt(s, 10, 64)
		switch {
		case err != nil || strconv.FormatInt(x, 10) != s:
			return bad("is no integer")
		case p.Min != nil && x < *p.Min:
			return bad("is less than %d", *p.Min)
		case p.Max != nil && x > *p.Max:
			return bad("is more than %d", *p.Max)
		}
	case TypeFlag:
		if s != "true" && s != "false" {
			return bad("is neither true nor false")
		}
	case TypeSize:
		if n, err := units.RAMInBytes(s); err != nil || n <= 0 {
			return bad("is no size: write it like 4GiB")
		}
	case TypeHost:
		if err := validHost(s); err != nil {
			return fmt.Errorf("parameter %s: %w", p.Name, err)
		}
	}
	if len(p.Choices) > 0 && !slices.Contains(p.Choices, s) {
		return bad("is none of %s", strings.Join(p.Choices, ", "))
	}
	if p.Pattern != "" && !regexp.MustCompile(`\A(?:`+p.Pattern+`)\z`).MatchString(s) {
		return bad("does not match %s", p.Pattern)
	}
	return nil
}

// Values checks what is given for parameters, and adds defaults. What is missing, unknown or of another type is an error that
// says which there are.
func Values(params []Parameter, given map[string]string) (map[string]string, error) {
	out := map[string]string{}
	var errs []error
	for i := range params {
		p := &params[i]
		s, ok := given[p.Name]
		switch {
		case !ok && p.Default == nil:
			errs = append(errs, fmt.Errorf("parameter %s is missing: give it with --set %s=%s", p.Name, p.Name, p.Type))
			continue
		case !ok:
			s = *p.Default
		}
		if err := p.Check(s); err != nil {
			errs = append(errs, err)
			continue
		}
		out[p.Name] = s
	}
	for _, name := range slices.Sorted(maps.Keys(given)) {
		if !slices.ContainsFunc(params, func(p Parameter) bool { return p.Name == name }) {
			names := make([]string, len(params))
			for i := range params {
				names[i] = params[i].Name
			}
			errs = append(errs, fmt.Errorf("there is no parameter %s: it has %s", name, strings.Join(names, ", ")))
		}
	}
	return out, errors.Join(errs...)
}

// parameters puts the file's parameters before the user's variables.
func (l *composer) parameters(top *yaml.Node) error {
	params, err := parametersOf(top)
	if err != nil {
		return err
	}
	if len(params) == 0 && len(l.Set) == 0 {
		return nil
	}
	if l.values, err = Values(params, l.Set); err != nil {
		return err
	}
	l.vars.env = maps.Clone(l.Env)
	if l.vars.env == nil {
		l.vars.env = map[string]string{}
	}
	maps.Copy(l.vars.env, l.values)
	return nil
}

// origin keeps where a document is from, and refuses what a template cannot have.
func (l *composer) origin() error {
	if l.Template == nil {
		return nil
	}
	for _, name := range slices.Sorted(maps.Keys(l.doc.Images)) {
		if ref := l.doc.Images[name]; strings.HasPrefix(ref, "oci:") {
			return at(l.line(name, "image"), "service %s: image %s is a directory of whoever deploys: a template's images are in registries", name, ref)
		}
	}
	o := *l.Template
	o.Values = nil
	for _, name := range slices.Sorted(maps.Keys(l.values)) {
		o.Values = append(o.Values, Value{name, l.values[name]})
	}
	l.doc.Body.Template = &o
	return nil
}
