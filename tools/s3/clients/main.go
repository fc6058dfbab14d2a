// Command clients does round trips against an S3 server with two Go libraries, minio-go and aws-sdk-go-v2, and compares
// every byte and answer with what it should be: "clients minio|minio-trailers|aws ENDPOINT", with AWS_ACCESS_KEY_ID and
// AWS_SECRET_ACCESS_KEY. It prints a line for each step, "ok   NAME" or "FAIL NAME: why", fails if one did, leaves nothing
// behind, and knows nothing of the server. It is a module of its own so that holdfast's does not require these libraries.
package main

import (
	"bytes"
	"context"
	"crypto/md5"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"mime/multipart"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"
)

// step is one round trip. Its name says what holds.
type step struct {
	name string
	run  func(ctx context.Context) error
}

// server is what the steps talk to.
type server struct{ endpoint, access, secret string }

const part = 5 << 20 // the least that S3 takes as a part

// Names that a client must escape, and a server must not change.
var odd = []string{"a b/c+d&e=f@g:h,i$j;k~l", "dir/ü-ß-日本/🙂.txt", "%20/%2F%/100%", "quote'\"(paren)!*[x]{y}|z^`<&>", "tail.", "#hash?query"}

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: clients minio|minio-trailers|aws ENDPOINT")
		os.Exit(2)
	}
	s := server{os.Args[2], os.Getenv("AWS_ACCESS_KEY_ID"), os.Getenv("AWS_SECRET_ACCESS_KEY")}
	var steps []step
	switch os.Args[1] {
	case "minio":
		steps = minioSteps(s, false)
	case "minio-trailers":
		steps = minioSteps(s, true)
	case "aws":
		steps = awsSteps(s)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	failed := false
	for _, x := range steps {
		if err := x.run(ctx); err != nil {
			failed = true
			fmt.Printf("FAIL %s: %v\n", x.name, err)
			continue
		}
		fmt.Printf("ok   %s\n", x.name)
	}
	switch {
	case len(steps) == 0:
		fmt.Fprintf(os.Stderr, "no library %q\n", os.Args[1])
		os.Exit(2)
	case failed:
		os.Exit(1)
	}
}

// bucketName is one that nobody has.
func bucketName() string {
	var b [6]byte
	rand.Read(b[:])
	return "clients-" + hex.EncodeToString(b[:])
}

// pattern is n bytes that do not repeat, the same for the same seed.
func pattern(seed byte, n int) []byte {
	out := make([]byte, n)
	mathrand.NewChaCha8([32]byte{seed}).Read(out)
	return out
}

func etag(b []byte) string {
	h := md5.Sum(b)
	return hex.EncodeToString(h[:])
}

// partsETag is the entity tag of an object that was put in parts.
func partsETag(parts ...[]byte) string {
	var all []byte
	for _, p := range parts {
		h := md5.Sum(p)
		all = append(all, h[:]...)
	}
	return fmt.Sprintf("%s-%d", etag(all), len(parts))
}

// equal compares bytes and says where they part.
func equal(what string, got, want []byte) error {
	if bytes.Equal(got, want) {
		return nil
	}
	i := 0
	for i < min(len(got), len(want)) && got[i] == want[i] {
		i++
	}
	return fmt.Errorf("%s: %d bytes, want %d; from %d on %.20q, want %.20q", what, len(got), len(want), i, got[i:], want[i:])
}

// same compares anything that prints.
func same(what string, got, want any) error {
	if g, w := fmt.Sprint(got), fmt.Sprint(want); g != w {
		return fmt.Errorf("%s is %s, want %s", what, g, w)
	}
	return nil
}

// first is the first error.
func first(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// request sends a bare request, as a browser does with a presigned address.
func request(ctx context.Context, method, address string, body []byte, header http.Header) (int, []byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, address, bytes.NewReader(body))
	if err != nil {
		return 0, nil, err
	}
	for k, v := range header {
		req.Header[k] = v
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	return res.StatusCode, b, err
}

// tampered is a presigned address with one digit of its signature changed.
func tampered(address string) string {
	i := strings.Index(address, "X-Amz-Signature=") + len("X-Amz-Signature=")
	digit := "0"
	if address[i] == '0' {
		digit = "1"
	}
	return address[:i] + digit + address[i+1:]
}

// presigned checks an address to get, that must give body, and one to put, after which check must find what was sent.
func presigned(ctx context.Context, get, put string, body, sent []byte, check func() error) error {
	code, b, err := request(ctx, "GET", get, nil, nil)
	if err := first(err, same("status of GET", code, 200), equal("GET", b, body)); err != nil {
		return err
	}
	code, _, err = request(ctx, "GET", tampered(get), nil, nil)
	if err := first(err, same("status of GET with another signature", code, 403)); err != nil {
		return err
	}
	code, _, err = request(ctx, "GET", strings.Split(get, "?")[0], nil, nil)
	if err := first(err, same("status of GET without signature", code, 403)); err != nil {
		return err
	}
	code, _, err = request(ctx, "PUT", tampered(put), []byte("intruder"), nil)
	if err := first(err, same("status of PUT with another signature", code, 403)); err != nil {
		return err
	}
	code, b, err = request(ctx, "PUT", put, sent, nil)
	if err := first(err, same("status of PUT", code, 200)); err != nil {
		return fmt.Errorf("%w: %s", err, b)
	}
	return check()
}

// form posts an object as a browser's form does.
func form(ctx context.Context, address string, fields map[string]string, file []byte) (int, []byte, error) {
	var b bytes.Buffer
	w := multipart.NewWriter(&b)
	for k, v := range fields {
		w.WriteField(k, v)
	}
	f, _ := w.CreateFormFile("file", "name")
	f.Write(file)
	w.Close()
	return request(ctx, "POST", address, b.Bytes(), http.Header{"Content-Type": {w.FormDataContentType()}})
}

// names are n keys in three folders and on top, in order.
func names(n int) []string {
	var out []string
	for i := range n {
		out = append(out, fmt.Sprintf("%s%03d", []string{"a/", "b/x/", "b/y/", "c"}[i%4], i))
	}
	slices.Sort(out)
	return out
}

// fold is what a listing with a prefix and the delimiter "/" shows: keys, and prefixes in common.
func fold(keys []string, prefix string) (objects, prefixes []string) {
	for _, k := range keys {
		rest, ok := strings.CutPrefix(k, prefix)
		if !ok {
			continue
		}
		if i := strings.IndexByte(rest, '/'); i >= 0 {
			prefixes = append(prefixes, prefix+rest[:i+1])
		} else {
			objects = append(objects, k)
		}
	}
	return objects, slices.Compact(prefixes)
}
