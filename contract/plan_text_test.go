package contract

import (
	"strings"
	"testing"
)

// A file that a stranger wrote says what it likes in names of labels, paths and commands.
func TestPlanHidesNothing(t *testing.T) {
	evil := "x\x1b[1A\x1b[2K\r\n  + nothing\u202e\u0085\x07"
	h := &Header{Services: []Service{{Name: "web"}}}
	b := &Body{Services: []Process{{Name: "web", Labels: map[string]string{evil: "1"}, WorkingDir: evil, Image: Image{Reference: evil}, Command: []string{evil}}}}
	clean := &Body{Services: []Process{{Name: "web", Labels: map[string]string{"a": "1"}, WorkingDir: "/", Image: Image{Reference: "x"}, Command: []string{"run"}}}}
	control := Diff(nil, nil, h, clean).Text()
	for _, want := range []string{"label a", "working directory: /", "command: [run]", "image: x"} {
		if !strings.Contains(control, want) {
			t.Fatalf("control: the plan does not say %q:\n%s", want, control)
		}
	}
	for name, text := range map[string]string{"new": Diff(nil, nil, h, b).Text(), "gone": Diff(h, b, h, clean).Text(), "changed": Diff(h, clean, h, b).Text()} {
		if i := strings.IndexAny(text, "\x1b\r\u202e\u0085\x07"); i >= 0 {
			t.Errorf("%s: the plan speaks to the terminal: %q", name, text)
		}
		for line := range strings.Lines(text) {
			if strings.TrimSpace(line) == "+ nothing" || !strings.HasPrefix(line, " ") && line != "a new contract\n" {
				t.Errorf("%s: a line of the file's own: %q", name, line)
			}
		}
	}
}
