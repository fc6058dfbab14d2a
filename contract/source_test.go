package contract

import (
	"maps"
	"strings"
	"testing"

	"github.com/compose-spec/compose-go/v2/dotenv"
	"github.com/compose-spec/compose-go/v2/template"
)

func newVariables(env map[string]string) *variables {
	return &variables{env: env, room: maxText, taken: map[string]bool{}, unset: map[string]int{}}
}

// Variables are filled in as Compose does it; its own implementation is the judge. Ours exists because that one takes
// quadratic time and unbounded room.
func TestVariablesAreFilledInAsComposeDoes(t *testing.T) {
	env := map[string]string{"A": "a", "EMPTY": "", "B": "$A", "_x1": "x"}
	lookup := func(k string) (string, bool) { v, ok := env[k]; return v, ok }
	for _, s := range []string{
		"", "plain", "$A", "${A}", "$A$A", "x${A}y", "$$A", "$$", "$$$A", "a$", "$1", "$ A", "$_x1-", "${_x1}", "${NONE}", "$NONE.",
		"${A:-d}", "${NONE:-d}", "${EMPTY:-d}", "${EMPTY-d}", "${NONE-d}", "${A-d}", "${NONE:-}", "${NONE-}",
		"${A:+o}", "${NONE:+o}", "${EMPTY:+o}", "${EMPTY+o}", "${A+o}", "${NONE+o}",
		"${A:?e}", "${A?e}", "${EMPTY?e}", "${NONE:-${A}}", "${NONE:-${NONE:-${A}}}", "${NONE:-a b}", "${NONE:-$A}x", "${NONE:-{}}", `${NONE:-{"k":"v"}}`,
		"${A:-${NONE:?never}}", "${NONE:-d}${A}${NONE-e}", "${A:-x}:${EMPTY:-y}/${NONE:-z}", "${B}", "https://${NONE:-h}:${NONE:-80}/$$",
		"${NONE:?e}", "${EMPTY:?e}", "${NONE?}", "${", "${}", "${A", "${1}", "${A!}", "${A b}",
	} {
		want, wantErr := template.SubstituteWithOptions(s, lookup, template.WithoutLogging)
		got, err := newVariables(env).fill(s, 1)
		if (err != nil) != (wantErr != nil) {
			t.Errorf("%q: %v, Compose says %v", s, err, wantErr)
		} else if err == nil && got != want {
			t.Errorf("%q gives %q, in Compose %q", s, got, want)
		}
	}
}

func TestVariablesSayWhereTheyCameFrom(t *testing.T) {
	v := newVariables(map[string]string{"USERS": "1", "UNUSED": "2"})
	v.file = map[string]string{"FILES": "3", "USERS": "4"}
	if s, err := v.fill("$USERS $FILES $NONE ${OTHER:-}", 7); err != nil || s != "1 3  " {
		t.Fatalf("%q %v", s, err)
	}
	if got := strings.Join(v.notes(), "\n"); got != "from your environment: USERS\nline 7: the variable NONE is not set: it is empty" {
		t.Errorf("%s", got)
	}
}

func TestEnvFilesAreReadAsComposeDoes(t *testing.T) {
	env := map[string]string{"A": "user", "SET": "s"}
	lookup := func(k string) (string, bool) { v, ok := env[k]; return v, ok }
	for _, s := range []string{
		"", "\n\n", "X=1", "X=1\n", "X=1\r\nY=2\r\n", "\uFEFFX=1", "X= 1 ", "X =1", "  X=1", "X=", "X=\nY=2", "X: yaml", "X:yaml", "export X=1", "export  X=1",
		"# c\nX=1 # c\nY=a#b", "X=1#b", "X='a b'", `X="a b"`, `X='$A'`, `X="$A"`, "X=$A", "X=$$A", `X="\$A"`, `X="a\nb\tc\\d"`, `X='a\nb'`, `X="say \"hi\""`, `X='it\'s'`,
		"X=\"two\nlines\"\nY=2", "X='two\nlines' # c\nY=2", "X=1\nY=${X}2", "A=file\nY=$A", "X=${NONE:-d}", "SET\n", "NOTSET\n", "SET\nX=1", "X=a=b", "X='#'", "X=\"#\" # c",
		"X.Y-Z_1=1", "X=1\nX=2", "X=a\\nb", "X='a'\n\n\nY=1", "X=${NONE-$A}", "X=\"${A}${A}\"", "X=\"\"", "X=''", "X=\"\\z\"",
	} {
		want, wantErr := dotenv.ParseWithLookup(strings.NewReader(s), lookup)
		got, err := newVariables(env).envFile([]byte(s))
		if (err != nil) != (wantErr != nil) || err == nil && !maps.Equal(got, want) {
			t.Errorf("%q: %q %v, in Compose %q %v", s, got, err, want, wantErr)
		}
	}
	for _, s := range []string{"X=\"a", "X='a", "X Y=1", "=1", "X!=1", "X=\"a\" b", "X=${", "X=${NONE:?needed}", "é=1", "X y"} {
		got, err := newVariables(env).envFile([]byte("OK=1\n" + s))
		if err == nil || !strings.HasPrefix(err.Error(), "line 2: ") {
			t.Errorf("%q: %q %v", s, got, err)
		}
	}
}
