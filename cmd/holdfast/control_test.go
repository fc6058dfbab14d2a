package main

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"holdfast/store"
	"holdfast/store/control"
	"holdfast/store/location"
)

// freePort finds a port that nobody has at the moment.
func freePort(ts *testscript.TestScript, _ bool, args []string) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	ts.Check(err)
	defer l.Close()
	_, port, err := net.SplitHostPort(l.Addr().String())
	ts.Check(err)
	ts.Setenv(args[0], port)
}

// writeNoise makes a file that compresses to nothing less, the same for the same name.
func writeNoise(ts *testscript.TestScript, _ bool, args []string) {
	var size int
	_, err := fmt.Sscan(args[1], &size)
	ts.Check(err)
	var b bytes.Buffer
	for sum := sha256.Sum256([]byte(args[0])); b.Len() < size; sum = sha256.Sum256(sum[:]) {
		b.Write(sum[:])
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), b.Bytes()[:size], 0o600))
}

// askS3 is an S3 client: s3 put|get|delete PORT CREDENTIALS BUCKET/KEY [FILE], or s3 make|delete PORT CREDENTIALS BUCKET. With ! it must be
// refused. A server that does not listen yet is waited for.
func askS3(ts *testscript.TestScript, neg bool, args []string) {
	var c struct {
		Access string `json:"access_key"`
		Secret string `json:"secret_key"`
	}
	method, file := map[string]string{"put": "PUT", "make": "PUT", "get": "GET", "delete": "DELETE"}[args[0]], ""
	var body []byte
	if len(args) > 4 {
		file = ts.MkAbs(args[4])
	}
	if args[0] == "put" {
		var err error
		body, err = os.ReadFile(file)
		ts.Check(err)
	}
	var got []byte
	status := 0
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		var a *http.Response
		raw, err := os.ReadFile(ts.MkAbs(args[2]))
		if err == nil {
			err = json.Unmarshal(raw, &c)
		}
		if err == nil {
			a, err = http.DefaultClient.Do(signed(method, "127.0.0.1:"+args[1], "/"+args[3], body, c.Access, c.Secret))
		}
		if err == nil {
			got, err = io.ReadAll(a.Body)
			a.Body.Close()
			status = a.StatusCode
		}
		if err == nil && status < 500 {
			break
		}
		if time.Now().After(end) {
			ts.Fatalf("s3 %s: %v, %d %s", strings.Join(args, " "), err, status, got)
		}
	}
	if (status/100 != 2) != neg {
		ts.Fatalf("s3 %s: %d %s", strings.Join(args, " "), status, got)
	}
	if args[0] == "get" && !neg {
		ts.Check(os.WriteFile(file, got, 0o600))
	}
}

// signed is a request under AWS's signature, version 4.
func signed(method, host, path string, body []byte, access, secret string) *http.Request {
	r, err := http.NewRequest(method, "http://"+host+path, bytes.NewReader(body))
	if err != nil {
		panic(err)
	}
	now := time.Now().UTC()
	at, day := now.Format("20060102T150405Z"), now.Format("20060102")
	sum := func(b []byte) string { s := sha256.Sum256(b); return hex.EncodeToString(s[:]) }
	r.Header.Set("X-Amz-Date", at)
	r.Header.Set("X-Amz-Content-Sha256", sum(body))
	const headers = "host;x-amz-content-sha256;x-amz-date"
	canonical := strings.Join([]string{method, path, "", "host:" + host, "x-amz-content-sha256:" + sum(body), "x-amz-date:" + at, "", headers, sum(body)}, "\n")
	scope := day + "/us-east-1/s3/aws4_request"
	key := []byte("AWS4" + secret)
	for _, s := range append(strings.Split(scope, "/"), strings.Join([]string{"AWS4-HMAC-SHA256", at, scope, sum([]byte(canonical))}, "\n")) {
		m := hmac.New(sha256.New, key)
		m.Write([]byte(s))
		key = m.Sum(nil)
	}
	r.Header.Set("Authorization", fmt.Sprintf("AWS4-HMAC-SHA256 Credential=%s/%s, SignedHeaders=%s, Signature=%x", access, scope, headers, key))
	return r
}

// TestTheTypedWordIsTheWord plays who removes a location on a terminal.
func TestTheTypedWordIsTheWord(t *testing.T) {
	for name, x := range map[string]struct {
		typed string
		ok    bool
	}{"the farm": {"anna\n", true}, "yes": {"y\n", false}, "another farm": {"bert\n", false}, "nothing": {"\n", false}, "its beginning": {"ann\n", false}} {
		t.Run(name, func(t *testing.T) {
			person, program := terminalPair(t)
			before := os.Stdin
			os.Stdin = program
			defer func() { os.Stdin = before }()
			cmd := newRoot(&app{})
			cmd.SetContext(t.Context())
			var out bytes.Buffer
			cmd.SetErr(&out)
			if _, err := person.WriteString(x.typed); err != nil {
				t.Fatal(err)
			}
			if err := typed(cmd, "what", "anna"); (err == nil) != x.ok {
				t.Errorf("%q: %v", x.typed, err)
			}
			if !strings.Contains(out.String(), "Type anna to go ahead") {
				t.Errorf("it asked %q", out.String())
			}
		})
	}
}

// TestAnotherPhraseRotatesNothing also shows that keys are durable before the front end hears of them.
func TestAnotherPhraseRotatesNothing(t *testing.T) {
	dir := t.TempDir()
	root := store.NewRoot()
	keys, err := root.Keys(0)
	if err != nil {
		t.Fatal(err)
	}
	file, phrase := filepath.Join(dir, s3Keys), filepath.Join(dir, "phrase")
	if err := store.SaveKeys(file, keys); err != nil {
		t.Fatal(err)
	}
	for _, x := range []struct {
		root store.Root
		want store.KeyEpoch
	}{{store.NewRoot(), 0}, {root, 1}, {root, 2}} {
		if err := os.WriteFile(phrase, []byte(x.root.Phrase()), 0o600); err != nil {
			t.Fatal(err)
		}
		err := newEpoch(t.Context(), file, phrase)
		if (err == nil) != (x.root == root) {
			t.Errorf("epoch %d: %v", x.want, err)
		}
		if got, err := store.LoadKeys(file); err != nil || got.Epoch != x.want {
			t.Errorf("the file is of epoch %d, %v; want %d", got.Epoch, err, x.want)
		}
	}
	var st unix.Stat_t
	if err := unix.Stat(file, &st); err != nil || st.Mode&0o077 != 0 {
		t.Errorf("mode %o, %v", st.Mode, err)
	}
}

// TestProgressIsShownToWhoWaits: on a terminal, after two seconds, and not beside JSON.
func TestProgressIsShownToWhoWaits(t *testing.T) {
	person, program := terminalPair(t)
	cmd := newRoot(&app{})
	cmd.SetErr(program)
	seen, done := (&app{}).watch(cmd)
	seen(control.Progress{What: "early", Done: 1, Of: 4, Unit: "shards"})
	time.Sleep(2100 * time.Millisecond)
	seen(control.Progress{What: "compare", Done: 1, Of: 4, Unit: "shards"})
	done()
	program.WriteString("end\n")
	got, err := until(person, "end")
	if err != nil || got != "\r\x1b[Kcompare: 1 of 4 shards, 25 %\r\x1b[Kend" {
		t.Errorf("%q, %v", got, err)
	}
	if seen, _ := (&app{json: true}).watch(cmd); seen != nil {
		t.Error("progress beside JSON")
	}
	cmd.SetErr(io.Discard)
	if seen, _ := (&app{}).watch(cmd); seen != nil {
		t.Error("progress where nobody looks")
	}
}

func now(ts *testscript.TestScript, _ bool, args []string) {
	ts.Setenv(args[0], time.Now().UTC().Format(time.RFC3339Nano))
}

func recoveryKey(ts *testscript.TestScript, _ bool, args []string) {
	root, err := store.ParsePhrase(ts.ReadFile(args[1]))
	ts.Check(err)
	pin, err := location.PinOf(root.Recovery())
	ts.Check(err)
	ts.Setenv(args[0], pin.String()+":recover")
}

// loot is a thief with a front end's keys: he takes every location over, deletes all that it has, tries to remove it for good,
// and puts rubbish in place of the log.
func loot(ts *testscript.TestScript, _ bool, args []string) {
	keys, err := store.LoadKeys(filepath.Join(ts.MkAbs(args[0]), s3Keys))
	ts.Check(err)
	cert, err := location.Certificate(keys.TLS())
	ts.Check(err)
	ctx := context.Background()
	deleted := 0
	for _, url := range args[1:] {
		p, err := control.ParseURL(url)
		ts.Check(err)
		c, err := location.NewClient(location.ClientConfig{Addr: p.Addr, Pin: p.Pin, Certificate: cert})
		ts.Check(err)
		st, err := c.Status(ctx)
		ts.Check(err)
		ts.Check(c.Announce(ctx, st.Epoch+1, location.Holder{6, 6, 6}))
		ts.Check(c.PutHead(ctx, 1<<60, []byte("nothing was ever here, and nobody signed that")))
		for {
			all, _, err := c.List(ctx, location.Name{}, location.Live)
			ts.Check(err)
			if len(all) == 0 {
				break
			}
			for _, i := range all {
				ts.Check(c.Delete(ctx, i.Name))
				if err := c.Purge(ctx, i.Name); !errors.Is(err, location.ErrRights) {
					ts.Fatalf("the thief removes a shard for good: %v", err)
				}
				deleted++
			}
		}
		ts.Check(c.Close())
	}
	if deleted == 0 {
		ts.Fatalf("there was nothing to delete")
	}
}
