package s3_test

import (
	"bufio"
	"bytes"
	"cmp"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

// modelServer serves the model in a process of its own, with more of its environment.
func modelServer(t testing.TB, env ...string) server {
	t.Helper()
	dir := t.TempDir()
	s := server{url: "http://" + freePort(t), access: "modelaccess", secret: "modelsecret"}
	argv := append([]string{"/usr/bin/env", "HOLDFAST_TEST_S3_LISTEN=" + s.url[len("http://"):], "HOLDFAST_TEST_S3_ACCESS=" + s.access, "HOLDFAST_TEST_S3_SECRET=" + s.secret}, env...)
	s.process = daemon(t, s.url, dir, append(argv, os.Args[0], "-test.run=^TestServeModel$")...)
	return s
}

// signed is a request with a signature of that time, of a body that is not signed.
func (s server) signed(method, path, query string, body io.Reader, now time.Time, header ...string) *http.Request {
	req, err := http.NewRequest(method, s.url+path+"?"+query, body)
	if err != nil {
		panic(err)
	}
	date := now.UTC().Format("20060102T150405Z")
	req.Header.Set("X-Amz-Date", date)
	req.Header.Set("X-Amz-Content-Sha256", "UNSIGNED-PAYLOAD")
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	names := []string{"host"}
	for name := range req.Header {
		names = append(names, strings.ToLower(name))
	}
	slices.Sort(names)
	var lines strings.Builder
	for _, n := range names {
		fmt.Fprintf(&lines, "%s:%s\n", n, cmp.Or(req.Header.Get(n), req.URL.Host))
	}
	all := strings.Join(names, ";")
	u := url.URL{Path: path}
	if q := req.URL.Query(); query != "" {
		query = q.Encode()
	}
	canonical := sha256.Sum256([]byte(strings.Join([]string{method, u.EscapedPath(), query, lines.String(), all, req.Header.Get("X-Amz-Content-Sha256")}, "\n")))
	scope := date[:8] + "/us-east-1/s3/aws4_request"
	key := []byte("AWS4" + s.secret)
	mac := func(text string) {
		h := hmac.New(sha256.New, key)
		h.Write([]byte(text))
		key = h.Sum(nil)
	}
	for _, p := range strings.Split(scope, "/") {
		mac(p)
	}
	mac("AWS4-HMAC-SHA256\n" + date + "\n" + scope + "\n" + hex.EncodeToString(canonical[:]))
	req.Header.Set("Authorization", fmt.Sprintf("AWS4-HMAC-SHA256 Credential=%s/%s,SignedHeaders=%s,Signature=%x", s.access, scope, all, key))
	return req
}

// ask sends one, and returns its status and the whole answer.
func (s server) ask(t testing.TB, method, path, query string, body []byte, header ...string) (int, string) {
	t.Helper()
	return send(t, s.signed(method, path, query, bytes.NewReader(body), time.Now(), header...))
}

func send(t testing.TB, req *http.Request) (int, string) {
	t.Helper()
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, string(b)
}

// TestClientsThatWaitAreLetGo plays clients that hold a connection, and memory with it, by sending or taking next to nothing.
// Who is slow and moves is served.
func TestClientsThatWaitAreLetGo(t *testing.T) {
	const patience = time.Second
	s := modelServer(t, "HOLDFAST_TEST_S3_PATIENCE="+patience.String())
	large := noise(1, 32<<20)
	for _, r := range []struct {
		path string
		body []byte
	}{{"/slow", nil}, {"/slow/large", large}} {
		if code, answer := s.ask(t, "PUT", r.path, "", r.body); code != 200 {
			t.Fatalf("%s: %d %s", r.path, code, answer)
		}
	}
	dial := func(t *testing.T) net.Conn {
		c, err := net.Dial("tcp", s.url[len("http://"):])
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		c.SetDeadline(time.Now().Add(time.Minute))
		return c
	}
	// drip sends a byte at a time until the server closes, and returns what it said.
	drip := func(t *testing.T, c net.Conn) string {
		ended := make(chan string)
		go func() {
			b, _ := io.ReadAll(c)
			ended <- string(b)
		}()
		for begun := time.Now(); ; {
			select {
			case said := <-ended:
				if took := time.Since(begun); took < patience/2 {
					t.Errorf("it closed after %v: %s", took, said)
				}
				return said
			case <-time.After(100 * time.Millisecond):
				c.Write([]byte("x"))
			}
			if time.Since(begun) > 30*patience {
				t.Fatal("it waits for ever")
			}
		}
	}
	head := func(method, path string, size int) string {
		req := s.signed(method, path, "", nil, time.Now())
		var b bytes.Buffer
		fmt.Fprintf(&b, "%s %s HTTP/1.1\r\nHost: %s\r\nContent-Length: %d\r\n", method, path, req.URL.Host, size)
		req.Header.Write(&b)
		return b.String() + "\r\n"
	}
	t.Run("nothing comes", func(t *testing.T) {
		t.Parallel()
		io.ReadAll(dial(t))
	})
	t.Run("a header by bytes", func(t *testing.T) {
		t.Parallel()
		c := dial(t)
		io.WriteString(c, "GET / HTTP/1.1\r\nX: ")
		drip(t, c)
	})
	for path, start := range map[string]int{"/slow/first": 0, "/slow/late": 100 << 10, "/slow?versioning": 9 << 10} {
		t.Run("a body by bytes to "+path, func(t *testing.T) {
			t.Parallel()
			c := dial(t)
			name, _, _ := strings.Cut(path, "?")
			h := head("PUT", name, 1<<20)
			if name != path {
				h = strings.Replace(head("PUT", path, 1<<20), "/slow?versioning ", "/slow?versioning= ", 1)
			}
			io.WriteString(c, h)
			c.Write(large[:start])
			if said := drip(t, c); name == path && !strings.Contains(said, "RequestTimeout") {
				t.Errorf("it says %q", said)
			}
		})
	}
	t.Run("an answer is not taken", func(t *testing.T) {
		t.Parallel()
		c := dial(t)
		io.WriteString(c, head("GET", "/slow/large", 0))
		time.Sleep(5 * patience)
		if n, err := io.Copy(io.Discard, c); n >= int64(len(large)) {
			t.Errorf("it kept %d bytes (%v)", n, err)
		}
	})
	t.Run("nothing is asked any more", func(t *testing.T) {
		t.Parallel()
		c := dial(t)
		io.WriteString(c, head("GET", "/slow/none", 0))
		r := bufio.NewReader(c)
		res, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Fatal(err)
		}
		io.Copy(io.Discard, res.Body)
		begun := time.Now()
		io.ReadAll(r)
		if took := time.Since(begun); took < patience || took > 30*patience {
			t.Errorf("it waited %v", took)
		}
	})
	t.Run("control: slow ones that move", func(t *testing.T) {
		t.Parallel()
		r, w := io.Pipe()
		go func() {
			for i := 0; i < 2<<20; i += 64 << 10 {
				w.Write(large[i : i+64<<10])
				time.Sleep(patience / 10)
			}
			w.Close()
		}()
		req := s.signed("PUT", "/slow/moves", "", r, time.Now())
		req.ContentLength = 2 << 20
		if code, answer := send(t, req); code != 200 {
			t.Errorf("put: %d %s", code, answer)
		}
		c := dial(t)
		io.WriteString(c, head("GET", "/slow/large", 0))
		b := bufio.NewReader(c)
		res, err := http.ReadResponse(b, nil)
		if err != nil {
			t.Fatal(err)
		}
		for range 30 { // three times as long as patience
			io.CopyN(io.Discard, res.Body, 512<<10)
			time.Sleep(patience / 10)
		}
		if _, err := io.Copy(io.Discard, res.Body); err != nil {
			t.Errorf("get: %v", err)
		}
	})
}

// TestNoRequestHidesInABody writes a request where the server may have ceased to read a body.
func TestNoRequestHidesInABody(t *testing.T) {
	s := modelServer(t, "HOLDFAST_TEST_S3_PATIENCE=1s")
	for _, path := range []string{"/hides", "/hides/secret"} {
		if code, answer := s.ask(t, "PUT", path, "", nil); code != 200 {
			t.Fatalf("%s: %d %s", path, code, answer)
		}
	}
	write := func(method, path, frame string, header ...string) string {
		req := s.signed(method, path, "", nil, time.Now(), header...)
		var b bytes.Buffer
		fmt.Fprintf(&b, "%s %s HTTP/1.1\r\nHost: %s\r\n%s\r\n", method, path, req.URL.Host, frame)
		req.Header.Write(&b)
		return b.String() + "\r\n"
	}
	const inChunks = "Transfer-Encoding: chunked"
	chunk := func(b string) string { return fmt.Sprintf("%x\r\n%s\r\n", len(b), b) }
	next := write("GET", "/hides/secret", "Connection: close")
	object := []string{"X-Amz-Content-Sha256", "STREAMING-UNSIGNED-PAYLOAD-TRAILER", "X-Amz-Decoded-Content-Length", "3", "X-Amz-Trailer", "x-amz-checksum-crc32"}
	framed := "3\r\nabc\r\n0\r\nx-amz-checksum-crc32:NSRBwg==\r\n\r\n"
	bad := append(slices.Clone(object), "X-Amz-Security-Token", "no")
	long := strings.Repeat("x", 1<<20)
	for name, c := range map[string]struct {
		send string
		want string // the statuses of the answers
	}{
		"control: one after the other":    {write("PUT", "/hides/a", "Content-Length: 3") + "abc" + next, "200 200"},
		"an object in chunks":             {write("PUT", "/hides/b", inChunks, object...) + chunk(framed) + chunk("") + next, "200 200"},
		"an object in many chunks":        {write("PUT", "/hides/b", inChunks, object...) + chunk(framed[:1]) + chunk(framed[1:7]) + chunk(framed[7:]) + chunk("") + next, "200 200"},
		"a request behind an object":      {write("PUT", "/hides/b", inChunks, object...) + chunk(framed+next) + chunk(""), "200"},
		"after much more than the object": {write("PUT", "/hides/b", inChunks, object...) + chunk(framed+long+next), "200"},
		"a refused object in chunks":      {write("PUT", "/none/b", inChunks, bad...) + next, "400"},
		"a chunk that is none":            {write("PUT", "/none/b", inChunks, bad...) + chunk(framed) + next, "400"},
		"a question with a body":          {write("GET", "/hides/none", inChunks) + next, "404"},
		"a refused object with a length":  {write("PUT", "/none/b", fmt.Sprintf("Content-Length: %d", len(next))) + next, "404"},
		"a long one":                      {write("PUT", "/none/b", "Content-Length: 10000000") + long + next, "404"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			conn, err := net.Dial("tcp", s.url[len("http://"):])
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(time.Minute))
			go io.WriteString(conn, c.send)
			var got []string
			for r := bufio.NewReader(conn); ; {
				res, err := http.ReadResponse(r, nil)
				if err != nil {
					break
				}
				got = append(got, fmt.Sprint(res.StatusCode))
				io.Copy(io.Discard, res.Body)
			}
			if g := strings.Join(got, " "); g != c.want {
				t.Errorf("answers %q, want %q", g, c.want)
			}
		})
	}
}

// TestAClockThatIsWrong gets the answer by which clients mend it.
func TestAClockThatIsWrong(t *testing.T) {
	s := modelServer(t)
	for _, c := range []struct {
		by   time.Duration
		want string
	}{{0, ""}, {10 * time.Minute, ""}, {-10 * time.Minute, ""}, {20 * time.Minute, "RequestTimeTooSkewed"}, {-20 * time.Minute, "RequestTimeTooSkewed"}, {-48 * time.Hour, "RequestTimeTooSkewed"}} {
		code, answer := send(t, s.signed("GET", "/", "", nil, time.Now().Add(c.by)))
		if c.want == "" && code != 200 || c.want != "" && (code != 403 || !strings.Contains(answer, "<Code>"+c.want+"</Code>")) {
			t.Errorf("%v: %d %s, want %q", c.by, code, answer, c.want)
		}
	}
}
