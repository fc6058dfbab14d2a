package machine

import (
	"errors"
	"fmt"
	"strings"
)

// Order is what a machine is told by its kernel's command line: which grid it belongs to, where to find it, and whose it
// is. None of it is secret, and none of it gives whoever sets it more than another grid's node.
type Order struct {
	Grid string // holdfast.grid: the grid's ID, which is the digest of its genesis
	From string // holdfast.from: addresses (host:port, separated by commas) of validators or gateways to ask first
	Farm string // holdfast.farm: the farm's ID
	Name string // holdfast.name: for people
}

// CommandLine is what every kernel of a node is started with, whatever grid it is for.
//
//	console=ttyS0           the serial console, which is written and never read
//	panic=10                a kernel or process 1 that ends starts the machine again
//	oops=panic              so does a kernel that is damaged
//	sysctl.kernel.sysrq=0   a BREAK on the serial line is no command
func CommandLine() string {
	return "console=ttyS0 panic=10 oops=panic quiet loglevel=4 sysctl.kernel.sysrq=0"
}

// Arguments are an Order as the kernel's command line has it.
func (o Order) Arguments() (string, error) {
	var out []string
	for _, p := range o.parts() {
		if *p.to == "" {
			return "", fmt.Errorf("holdfast.%s is missing", p.key)
		}
		if strings.ContainsFunc(*p.to, func(r rune) bool { return r <= ' ' || r == '"' || r > '~' }) {
			return "", fmt.Errorf("holdfast.%s: %q cannot be on a kernel's command line", p.key, *p.to)
		}
		out = append(out, "holdfast."+p.key+"="+*p.to)
	}
	return strings.Join(out, " "), nil
}

type part struct {
	key string
	to  *string
}

func (o *Order) parts() []part {
	return []part{{"grid", &o.Grid}, {"from", &o.From}, {"farm", &o.Farm}, {"name", &o.Name}}
}

// parseOrder reads the command line of a kernel, as /proc/cmdline has it. A key of ours that is not known is an error: a
// word that was misspelt must not mean less.
func parseOrder(line string) (Order, error) {
	var o Order
	var errs []error
	seen := map[string]bool{}
	for word := range strings.FieldsSeq(line) {
		key, value, _ := strings.Cut(word, "=")
		key, ours := strings.CutPrefix(key, "holdfast.")
		if !ours {
			continue
		}
		known := false
		for _, p := range o.parts() {
			if p.key == key {
				*p.to, known = value, true
			}
		}
		if !known {
			errs = append(errs, fmt.Errorf("holdfast.%s is not known", key))
		}
		if seen[key] {
			errs = append(errs, fmt.Errorf("holdfast.%s is there twice", key))
		}
		seen[key] = true
	}
	for _, p := range o.parts() {
		if *p.to == "" {
			errs = append(errs, fmt.Errorf("holdfast.%s is missing", p.key))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return Order{}, fmt.Errorf("kernel command line: %w", err)
	}
	return o, nil
}
