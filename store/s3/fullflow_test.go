package s3_test

import (
	"bufio"
	"context"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// fullFlow is the number of tests that full-flow of versitygw 1.8.0 runs with versions; a few share a name.
const fullFlow = 765

// TestFullFlow runs versitygw's own conformance tests on each server. What fails must be listed with a reason, and what
// is listed must fail.
func TestFullFlow(t *testing.T) {
	if testing.Short() {
		t.Skip("hundreds of tests take half a minute")
	}
	for _, s := range servers {
		t.Run(s.name, func(t *testing.T) {
			if s.expected == "" && os.Getenv("HOLDFAST_LONG") == "" {
				t.Skip("the control: all pass; only with HOLDFAST_LONG")
			}
			expected := map[string]string{}
			if s.expected != "" {
				b, err := os.ReadFile(s.expected)
				if err != nil {
					t.Fatal(err)
				}
				if expected, err = parseExpected(string(b)); err != nil {
					t.Fatalf("%s: %v", s.expected, err)
				}
			}
			began := time.Now()
			got, out := runFullFlow(t, s.start(t))
			t.Logf("%d passed, %d not, in %v", got.passed, len(got.failed), time.Since(began).Round(time.Second))
			problems := judge(got, expected, fullFlow)
			for _, p := range problems {
				t.Error(p)
			}
			if len(problems) > 0 {
				keep(t, "full-flow.log", out)
			}
		})
	}
}

// runFullFlow gives a server, which must have no bucket, all tests, and returns what they printed too.
func runFullFlow(t *testing.T, s server) (outcome, string) {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	bin := tool(t, "versitygw")
	cmd := exec.CommandContext(ctx, bin, "test", "--access", s.access, "--secret", s.secret, "--endpoint", s.url, "full-flow", "--versioning-enabled", "--parallel")
	// It makes users by ./versitygw admin. The environment of this machine must not tell it of other authorities.
	cmd.Dir, cmd.Env = filepath.Dir(bin), []string{"PATH=/usr/bin:/bin", "HOME=" + t.TempDir()}
	out, err := cmd.CombinedOutput()
	got := parseFullFlow(string(out))
	if got.ran == 0 {
		t.Fatalf("full-flow: %v: %s", err, out[max(0, len(out)-2000):])
	}
	return got, string(out)
}

// outcome is how tests ended.
type outcome struct {
	ran, passed int
	failed      map[string]string // and why
	names       map[string]bool   // all that began
}

// said is a line of versitygw test: RUN, PASS, FAIL or SKIP in a colour, the test, and a reason. It need not begin a line,
// since a failed clean-up prints none of its own.
var said = regexp.MustCompile(`\x1b\[\d+m(RUN|PASS|FAIL|SKIP) +\x1b\[0m(\w+)(?:: ([^\n]*))?`)

var total = regexp.MustCompile(`(?m)^RAN: (\d+) PASS: (\d+) FAIL: (\d+) SKIP: (\d+)`)

// parseFullFlow reads what versitygw test printed. A test that began and did not say how it ended has failed: so has one
// whose clean-up failed, and all if there is no total.
func parseFullFlow(out string) outcome {
	o := outcome{failed: map[string]string{}, names: map[string]bool{}}
	open := map[string]int{}
	for _, m := range said.FindAllStringSubmatch(out, -1) {
		switch verb, name := m[1], m[2]; verb {
		case "RUN":
			o.names[name] = true
			open[name]++
		case "PASS":
			o.passed++
			open[name]--
		case "FAIL":
			o.failed[name] = m[3]
			o.names[name] = true
			open[name]--
		case "SKIP":
			open[name]--
		}
	}
	for name, n := range open {
		if _, failed := o.failed[name]; n > 0 && !failed {
			o.failed[name] = "it did not end, or not clean up"
			if i := strings.Index(out, name+": failed to delete the bucket"); i >= 0 {
				why := out[i+len(name)+2:]
				o.failed[name] = why[:strings.IndexAny(why+"\n", "\n\x1b")]
			}
		}
	}
	if m := total.FindStringSubmatch(out); m != nil {
		o.ran, _ = strconv.Atoi(m[1])
	}
	return o
}

// parseExpected reads a list of tests that fail: "NAME: reason" a line, "#" begins a comment.
func parseExpected(text string) (map[string]string, error) {
	out := map[string]string{}
	for s, n := bufio.NewScanner(strings.NewReader(text)), 1; s.Scan(); n++ {
		line := strings.TrimSpace(s.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		name, reason, _ := strings.Cut(line, ":")
		if reason = strings.TrimSpace(reason); reason == "" {
			return nil, fmt.Errorf("line %d: %s has no reason", n, name)
		}
		if out[name] != "" {
			return nil, fmt.Errorf("line %d: %s is there twice", n, name)
		}
		out[name] = reason
	}
	return out, nil
}

// judge compares an outcome with the list of what may fail, of whole tests that must have run.
func judge(got outcome, expected map[string]string, whole int) (problems []string) {
	if got.ran < whole {
		problems = append(problems, fmt.Sprintf("%d tests ran, of %d", got.ran, whole))
	}
	if 100*len(expected) >= 3*whole {
		problems = append(problems, fmt.Sprintf("%d tests are listed, 3 %% of %d or more", len(expected), whole))
	}
	for _, name := range slices.Sorted(maps.Keys(got.failed)) {
		if expected[name] == "" {
			problems = append(problems, fmt.Sprintf("%s: %s", name, got.failed[name]))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(expected)) {
		if _, failed := got.failed[name]; failed {
			continue
		}
		if got.names[name] {
			problems = append(problems, fmt.Sprintf("%s passes, though it is listed: %s", name, expected[name]))
		} else {
			problems = append(problems, fmt.Sprintf("%s is listed, and there is no such test", name))
		}
	}
	return problems
}

// keep writes what a failed test leaves behind, and says where.
func keep(t *testing.T, name, text string) {
	f, err := os.CreateTemp("", "*-"+name)
	if err != nil {
		t.Error(err)
		return
	}
	defer f.Close()
	f.WriteString(text)
	t.Logf("all of it: %s", f.Name())
}

func TestJudge(t *testing.T) {
	const (
		run  = "\x1b[36mRUN  \x1b[0m"
		pass = "\x1b[32mPASS \x1b[0m"
		fail = "\x1b[31mFAIL \x1b[0m"
	)
	all := func(n int) string { return fmt.Sprintf("\nRAN: %d PASS: 0 FAIL: 0 SKIP: 0\n", n) }
	for _, c := range []struct {
		name, out, expected string
		whole               int
		want                []string
	}{
		{"all pass", run + "A\n" + run + "B\n" + pass + "B\n" + pass + "A\n" + all(2), "", 2, nil},
		{"one fails", run + "A\n" + fail + "A: it hurts\n" + all(1), "", 1, []string{"A: it hurts"}},
		{"one fails that is listed", run + "A\n" + fail + "A: it hurts\n" + all(100), "A: it may", 100, nil},
		{"one passes that is listed", run + "A\n" + pass + "A\n" + all(100), "# why\n\nA: it hurt", 100, []string{"A passes, though it is listed: it hurt"}},
		{"one is listed that is not there", run + "A\n" + pass + "A\n" + all(100), "B: it hurt", 100, []string{"B is listed, and there is no such test"}},
		{"one does not end", run + "A\n" + all(1), "", 1, []string{"A: it did not end, or not clean up"}},
		{"one does not clean up", run + "A\n\x1b[31mA: failed to delete the bucket: no" + run + "B\n" + pass + "B\n" + all(2), "", 2, []string{"A: failed to delete the bucket: no"}},
		{"of two with one name one fails", run + "A\n" + run + "A\n" + pass + "A\n" + fail + "A: no\n" + all(2), "", 2, []string{"A: no"}},
		{"of two with one name one does not end", run + "A\n" + run + "A\n" + pass + "A\n" + all(2), "", 2, []string{"A: it did not end, or not clean up"}},
		{"too few ran", run + "A\n" + pass + "A\n" + all(1), "", 2, []string{"1 tests ran, of 2"}},
		{"it died", run + "A\n" + pass + "A\npanic: no", "", 1, []string{"0 tests ran, of 1"}},
		{"too many are listed", run + "A\n" + fail + "A: no\n" + all(33), "A: it may", 33, []string{"1 tests are listed, 3 % of 33 or more"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			expected, err := parseExpected(c.expected)
			if err != nil {
				t.Fatal(err)
			}
			if got := judge(parseFullFlow(c.out), expected, c.whole); !slices.Equal(got, c.want) {
				t.Errorf("%q, want %q", got, c.want)
			}
		})
	}
	for _, bad := range []string{"A", "A:", "A: x\nA: y"} {
		if _, err := parseExpected(bad); err == nil {
			t.Errorf("list %q is taken", bad)
		}
	}
}
