// Command front serves S3's PUT and GET of objects with nothing behind them: bodies are read, their signatures checked, and
// discarded; what is served comes from memory. So it is known what a front costs before any store does. Fronts: versitygw as
// holdfast embeds it, and net/http and fasthttp with just enough of signature version 4. It keeps nothing: never use it as a server.
package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/valyala/fasthttp"
	"github.com/versity/versitygw/auth"
	"github.com/versity/versitygw/backend"
	"github.com/versity/versitygw/debuglogger"
	"github.com/versity/versitygw/embedgw"
	"github.com/versity/versitygw/s3err"
	"github.com/versity/versitygw/s3response"
)

const etag = `"00000000000000000000000000000000"`

var memory = make([]byte, 16<<20) // what GET serves the beginning of

func main() {
	if len(os.Args) != 5 {
		log.Fatal("usage: front versitygw_null|nethttp|fasthttp ADDRESS ACCESS SECRET")
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	go func() { <-ctx.Done(); time.Sleep(time.Second); os.Exit(0) }()
	at, access, secret := os.Args[2], os.Args[3], os.Args[4]
	var err error
	switch os.Args[1] {
	case "versitygw_null":
		root := auth.Account{Access: access, Secret: secret, Role: auth.RoleAdmin}
		err = embedgw.RunVersityGW(ctx, null{}, &embedgw.Config{RootUserAccess: access, RootUserSecret: secret, IAMService: auth.NewIAMServiceSingle(root),
			Region: "us-east-1", Ports: []string{at}, KeepAlive: true, Quiet: true, LogLevel: debuglogger.LevelSilent, MaxConnections: 8192, MaxRequests: 4096, MultipartMaxParts: 10000})
	case "nethttp":
		err = http.ListenAndServe(at, plain(secret))
	case "fasthttp":
		err = (&fasthttp.Server{Handler: fast(secret), StreamRequestBody: true, MaxRequestBodySize: 1 << 30, ReadBufferSize: 8 << 10}).ListenAndServe(at)
	default:
		err = errors.New("no such front")
	}
	if err != nil {
		log.Fatal(err)
	}
}

// sizeOf is the first part of a key: how large the client's object is.
func sizeOf(path string) int64 {
	for _, p := range strings.Split(path, "/") {
		if n, err := strconv.ParseInt(p, 10, 64); err == nil {
			return min(n, int64(len(memory)))
		}
	}
	return 0
}

type null struct{ backend.BackendUnsupported }

func (null) CreateBucket(context.Context, *s3.CreateBucketInput, []byte) error { return nil }
func (null) HeadBucket(context.Context, *s3.HeadBucketInput) (*s3.HeadBucketOutput, error) {
	return &s3.HeadBucketOutput{}, nil
}
func (null) GetBucketAcl(context.Context, *s3.GetBucketAclInput) ([]byte, error) {
	return json.Marshal(auth.ACL{Owner: "benchaccess"})
}
func (null) GetObjectLockConfiguration(context.Context, string) ([]byte, error) {
	return nil, s3err.GetAPIError(s3err.ErrObjectLockConfigurationNotFound)
}
func (null) GetBucketPolicy(context.Context, string) ([]byte, error) {
	return nil, s3err.GetAPIError(s3err.ErrNoSuchBucketPolicy)
}
func (null) GetBucketCors(context.Context, string) ([]byte, error) {
	return nil, s3err.GetAPIError(s3err.ErrNoSuchCORSConfiguration)
}
func (null) PutObject(_ context.Context, in s3response.PutObjectInput) (s3response.PutObjectOutput, error) {
	_, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, in.Body, make([]byte, 64<<10))
	return s3response.PutObjectOutput{ETag: etag}, err
}
func (null) GetObject(_ context.Context, in *s3.GetObjectInput) (*s3.GetObjectOutput, error) {
	n, now, tag := sizeOf(*in.Key), time.Now(), etag
	return &s3.GetObjectOutput{Body: io.NopCloser(bytes.NewReader(memory[:n])), ContentLength: &n, LastModified: &now, ETag: &tag}, nil
}

func mac(key []byte, s string) []byte {
	h := hmac.New(sha256.New, key)
	io.WriteString(h, s)
	return h.Sum(nil)
}

func sum(s string) string { h := sha256.Sum256([]byte(s)); return hex.EncodeToString(h[:]) }

var (
	errSignature = errors.New("the signature is wrong")
	empty        = sum("")
)

// A signed request is what its body's chunks are checked by.
type signed struct {
	key                     []byte
	date, scope, last, body string
}

// authorize checks a request's signature.
func authorize(secret, method, path, query string, header func(string) string) (s signed, err error) {
	rest, ok := strings.CutPrefix(header("Authorization"), "AWS4-HMAC-SHA256 ")
	var names, got string
	for f := range strings.SplitSeq(rest, ",") {
		switch k, v, _ := strings.Cut(strings.TrimSpace(f), "="); k {
		case "Credential":
			_, s.scope, _ = strings.Cut(v, "/")
		case "SignedHeaders":
			names = v
		case "Signature":
			got = v
		}
	}
	scope := strings.Split(s.scope, "/")
	if !ok || len(scope) != 4 {
		return s, errSignature
	}
	s.date, s.body = header("X-Amz-Date"), header("X-Amz-Content-Sha256")
	var c strings.Builder
	c.WriteString(method + "\n" + path + "\n" + query + "\n")
	for n := range strings.SplitSeq(names, ";") {
		c.WriteString(n + ":" + strings.TrimSpace(header(n)) + "\n")
	}
	c.WriteString("\n" + names + "\n" + s.body)
	s.key = []byte("AWS4" + secret)
	for _, p := range scope {
		s.key = mac(s.key, p)
	}
	s.last = hex.EncodeToString(mac(s.key, "AWS4-HMAC-SHA256\n"+s.date+"\n"+s.scope+"\n"+sum(c.String())))
	if !hmac.Equal([]byte(s.last), []byte(got)) {
		return s, errSignature
	}
	return s, nil
}

// discard reads a body to its end and checks its signatures.
func (s signed) discard(body io.Reader) error {
	h, buffer := sha256.New(), make([]byte, 64<<10)
	if s.body != "STREAMING-AWS4-HMAC-SHA256-PAYLOAD" {
		if _, err := io.CopyBuffer(h, body, buffer); err != nil {
			return err
		}
		if got := hex.EncodeToString(h.Sum(nil)); got != s.body && s.body != "UNSIGNED-PAYLOAD" {
			return errSignature
		}
		return nil
	}
	r := bufio.NewReaderSize(body, 64<<10)
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return err
		}
		size, signature, _ := strings.Cut(strings.TrimRight(line, "\r\n"), ";chunk-signature=")
		n, err := strconv.ParseInt(size, 16, 64)
		if err != nil {
			return err
		}
		h.Reset()
		if _, err := io.CopyBuffer(h, io.LimitReader(r, n), buffer); err != nil {
			return err
		}
		s.last = hex.EncodeToString(mac(s.key, "AWS4-HMAC-SHA256-PAYLOAD\n"+s.date+"\n"+s.scope+"\n"+s.last+"\n"+empty+"\n"+hex.EncodeToString(h.Sum(nil))))
		if !hmac.Equal([]byte(s.last), []byte(signature)) {
			return errSignature
		}
		if _, err := r.Discard(2); err != nil {
			return err
		}
		if n == 0 {
			return nil
		}
	}
}

func plain(secret string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s, err := authorize(secret, r.Method, r.URL.EscapedPath(), r.URL.RawQuery, func(n string) string {
			if n == "host" {
				return r.Host
			}
			if n == "content-length" {
				return strconv.FormatInt(r.ContentLength, 10)
			}
			return r.Header.Get(n)
		})
		if err == nil && r.Method == http.MethodPut {
			err = s.discard(r.Body)
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusForbidden)
			return
		}
		w.Header().Set("ETag", etag)
		if r.Method == http.MethodGet {
			n := sizeOf(r.URL.Path)
			w.Header().Set("Last-Modified", time.Now().UTC().Format(http.TimeFormat))
			w.Header().Set("Content-Type", "application/octet-stream")
			w.Header().Set("Content-Length", strconv.FormatInt(n, 10))
			w.Write(memory[:n])
		}
	})
}

func fast(secret string) fasthttp.RequestHandler {
	return func(c *fasthttp.RequestCtx) {
		s, err := authorize(secret, string(c.Method()), string(c.URI().PathOriginal()), string(c.URI().QueryString()), func(n string) string { return string(c.Request.Header.Peek(n)) })
		if err == nil && c.IsPut() {
			body := c.RequestBodyStream()
			if body == nil {
				body = bytes.NewReader(c.Request.Body())
			}
			err = s.discard(body)
		}
		if err != nil {
			c.Error(fmt.Sprint(err), fasthttp.StatusForbidden)
			return
		}
		c.Response.Header.Set("ETag", etag)
		if c.IsGet() {
			n := sizeOf(string(c.Path()))
			c.Response.Header.Set("Last-Modified", time.Now().UTC().Format(http.TimeFormat))
			c.Response.SetBodyStream(bytes.NewReader(memory[:n]), int(n))
		}
	}
}
