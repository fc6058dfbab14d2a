package contract

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const blog = `name: ${name}
services:
  web:
    image: registry.example/blog:1.4
    environment: {TITLE: "${title}", HOST: "${host}"}
    deploy: {replicas: "${replicas}"}
x-holdfast:
  routes: [{host: "${host}", service: web, port: 80}]
  parameters:
    name: {default: blog, pattern: "[a-z]+"}
    title: {about: what stands at the top, example: My blog}
    host: {type: host, default: blog.localhost}
    replicas: {type: integer, default: "1", min: 1, max: 3}
`

func expand(t *testing.T, raw string, set map[string]string) (*Document, error) {
	t.Helper()
	return Load(t.Context(), Input{Raw: []byte(raw), Set: set, Template: &Origin{Account: fill32(1), Name: "blog", Version: "1.0", Digest: fill32(2)}})
}

func TestTemplatesExpand(t *testing.T) {
	t.Setenv("title", "from the environment")
	d, err := expand(t, blog, map[string]string{"title": "Hello: {world} # ${host}\\", "replicas": "2"})
	if err != nil {
		t.Fatal(err)
	}
	env := strings.Join(d.Body.Services[0].Environment, "|")
	// A value is text, whatever it looks like: it adds no key and no variable.
	if env != `HOST=blog.localhost|TITLE=Hello: {world} # ${host}\` || d.Name != "blog" || d.Header.Services[0].Replicas != 2 || d.Header.Routes[0].Host != "blog.localhost" {
		t.Errorf("%s %q %+v", d.Name, env, d.Header)
	}
	o := d.Body.Template
	if o == nil || o.Digest != fill32(2) || len(o.Values) != 4 || o.Values[2] != (Value{"replicas", "2"}) || string(d.Body.Source) != blog {
		t.Errorf("%+v", o)
	}
	params, err := Parameters([]byte(blog))
	if err != nil || len(params) != 4 || params[3].About != "what stands at the top" || *params[2].Max != 3 {
		t.Errorf("%+v, %v", params, err)
	}
	for what, x := range map[string]struct {
		set  map[string]string
		want string
	}{
		"nothing":              {nil, "parameter title is missing: give it with --set title=text"},
		"what there is not":    {map[string]string{"title": "x", "titel": "y"}, "there is no parameter titel: it has host, name, replicas, title"},
		"no number":            {map[string]string{"title": "x", "replicas": "two"}, `"two" is no integer`},
		"a number like none":   {map[string]string{"title": "x", "replicas": "+2"}, "is no integer"},
		"too many":             {map[string]string{"title": "x", "replicas": "4"}, "is more than 3"},
		"too few":              {map[string]string{"title": "x", "replicas": "0"}, "is less than 1"},
		"no host":              {map[string]string{"title": "x", "host": "a b"}, "parameter host"},
		"a line":               {map[string]string{"title": "x\ny"}, "control characters"},
		"half of the pattern":  {map[string]string{"title": "x", "name": "a1"}, "does not match [a-z]+"},
		"two lines of pattern": {map[string]string{"title": "x", "name": "a|b"}, "does not match"},
		"very much":            {map[string]string{"title": strings.Repeat("x", MaxValue+1)}, "4097 bytes"},
	} {
		if _, err := expand(t, blog, x.set); err == nil || !strings.Contains(err.Error(), x.want) {
			t.Errorf("%s: %v, want %q", what, err, x.want)
		}
	}
}

// A template reads nothing of whoever deploys it: no file, no variable, no image on his disk.
func TestTemplatesTakeNothing(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	for name, text := range map[string]string{".env": "TOKEN=from-dotenv", "secret": "the-secret"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("TOKEN", "from-the-environment")
	base := "name: x\nservices: {web: {image: a/b, environment: {T: \"${TOKEN-}\"}}}\n"
	d, err := expand(t, base, nil)
	if err != nil || strings.Contains(fmt.Sprint(d.Body), "from-") {
		t.Errorf("%v %+v", err, d)
	}
	for what, raw := range map[string]string{
		"a secret":        "name: x\nservices: {web: {image: a/b, secrets: [s]}}\nsecrets: {s: {file: ./secret}}\n",
		"a config":        "name: x\nservices: {web: {image: a/b, configs: [s]}}\nconfigs: {s: {file: ./secret}}\n",
		"an env file":     "name: x\nservices: {web: {image: a/b, env_file: secret}}\n",
		"a variable":      "name: x\nservices: {web: {image: a/b, secrets: [s]}}\nsecrets: {s: {environment: TOKEN}}\n",
		"an OCI layout":   "name: x\nservices: {web: {image: 'oci:/home/me/img'}}\n",
		"one by variable": "name: x\nservices: {web: {image: '${i}'}}\nx-holdfast: {parameters: {i: {default: 'oci:img'}}}\n",
	} {
		if _, err := expand(t, raw, nil); err == nil {
			t.Errorf("it takes %s", what)
		}
		// Control: as a file of one's own it would.
		if strings.HasPrefix(what, "a ") || strings.HasPrefix(what, "an env") {
			if err := os.WriteFile("own.yaml", []byte(raw), 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := Load(t.Context(), Input{Path: "own.yaml", Env: map[string]string{"TOKEN": "x"}}); err != nil {
				t.Errorf("control: %s: %v", what, err)
			}
		}
	}
}

func TestParametersAreChecked(t *testing.T) {
	for what, x := range map[string][2]string{
		"an unknown type":        {"{a: {type: float}}", `there is no type "float"`},
		"an unknown key":         {"{a: {typ: text}}", `"typ" is not supported`},
		"a name with a dash":     {"{a-b: {}}", "letters, numbers"},
		"a default that is none": {"{a: {type: integer, default: x}}", "its default"},
		"bounds of a text":       {"{a: {min: 1}}", "of integers"},
		"a bad pattern":          {"{a: {pattern: '('}}", "missing closing"},
		"a list":                 {"[a]", "it must be a mapping"},
		"a choice that is none":  {"{a: {choices: [x, y], default: z}}", "is none of x, y"},
		"choices that are one":   {"{a: {choices: x}}", "cannot be that"},
	} {
		if _, err := Parameters([]byte("x-holdfast: {parameters: " + x[0] + "}\n")); err == nil || !strings.Contains(err.Error(), x[1]) {
			t.Errorf("%s: %v, want %q", what, err, x[1])
		}
	}
	if p, err := Parameters([]byte("services: {}\n")); err != nil || len(p) != 0 {
		t.Errorf("%v %v", p, err)
	}
}

func FuzzParameters(f *testing.F) {
	f.Add([]byte(blog), "x")
	f.Add([]byte("x-holdfast: {parameters: {a: {pattern: '(a*)*b', choices: [&x 1, *x]}}}"), "y")
	f.Fuzz(func(t *testing.T, raw []byte, value string) {
		params, err := Parameters(raw)
		if err != nil {
			return
		}
		for i := range params {
			params[i].Check(value)
		}
	})
}
