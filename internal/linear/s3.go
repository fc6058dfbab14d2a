package linear

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/md5"
	"crypto/sha256"
	"encoding/hex"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"
)

// S3 is a bucket of an S3 server as Objects. It asks once and tries nothing again, since what is tried twice can happen
// twice. Its requests are signed (version 4), their bodies are not.
type S3 struct {
	http                             *http.Client
	endpoint, access, secret, bucket string
}

// NewS3 returns a bucket of the server at endpoint, http://HOST:PORT. It is there after CreateBucket.
func NewS3(endpoint, access, secret, bucket string) *S3 {
	return &S3{&http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 64}}, endpoint, access, secret, bucket}
}

const signed = "host;x-amz-content-sha256;x-amz-date"

// escape writes a query or path as signatures want it: all but letters, digits and -._~ in percent.
func escape(s string, keep string) string {
	var b strings.Builder
	for _, c := range []byte(s) {
		if 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || strings.IndexByte("-._~"+keep, c) >= 0 {
			b.WriteByte(c)
		} else {
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	return b.String()
}

func mac(key []byte, text string) []byte {
	h := hmac.New(sha256.New, key)
	h.Write([]byte(text))
	return h.Sum(nil)
}

// request asks once, and reads the answer to its end. query must be escaped and in order.
func (s *S3) request(ctx context.Context, method, key, query string, body []byte, header ...string) (status int, head http.Header, answer []byte, err error) {
	path := escape("/"+s.bucket+"/"+key, "/")
	if key == "" {
		path = escape("/"+s.bucket, "/")
	}
	u, err := url.Parse(s.endpoint + path + "?" + query)
	if err != nil {
		return 0, nil, nil, err
	}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), bytes.NewReader(body))
	if err != nil {
		return 0, nil, nil, err
	}
	req.GetBody = nil // nothing is sent a second time
	now := time.Now().UTC().Format("20060102T150405Z")
	req.Header.Set("X-Amz-Date", now)
	req.Header.Set("X-Amz-Content-Sha256", "UNSIGNED-PAYLOAD")
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	canonical := strings.Join([]string{method, path, query, "host:" + u.Host, "x-amz-content-sha256:UNSIGNED-PAYLOAD", "x-amz-date:" + now, "", signed, "UNSIGNED-PAYLOAD"}, "\n")
	digest := sha256.Sum256([]byte(canonical))
	scope := now[:8] + "/us-east-1/s3/aws4_request"
	k := []byte("AWS4" + s.secret)
	for _, part := range strings.Split(scope, "/") {
		k = mac(k, part)
	}
	signature := mac(k, "AWS4-HMAC-SHA256\n"+now+"\n"+scope+"\n"+hex.EncodeToString(digest[:]))
	req.Header.Set("Authorization", fmt.Sprintf("AWS4-HMAC-SHA256 Credential=%s/%s,SignedHeaders=%s,Signature=%x", s.access, scope, signed, signature))
	res, err := s.http.Do(req)
	if err != nil {
		if op := (*net.OpError)(nil); errors.As(err, &op) && op.Op == "dial" {
			return 0, nil, nil, fmt.Errorf("%w: %w", ErrNothing, err)
		}
		return 0, nil, nil, err
	}
	defer res.Body.Close()
	answer, err = io.ReadAll(res.Body)
	return res.StatusCode, res.Header, answer, err
}

// failed is the error of S3 in an answer.
func failed(what string, status int, answer []byte) error {
	var e struct{ Code, Message string }
	xml.Unmarshal(answer, &e)
	return fmt.Errorf("%s: %d %s %s", what, status, e.Code, e.Message)
}

// CreateBucket makes the bucket.
func (s *S3) CreateBucket(ctx context.Context) error {
	status, _, answer, err := s.request(ctx, http.MethodPut, "", "", nil)
	if err == nil && status != http.StatusOK {
		err = failed("create bucket "+s.bucket, status, answer)
	}
	return err
}

// Version turns versions on.
func (s *S3) Version(ctx context.Context) error {
	status, _, answer, err := s.request(ctx, http.MethodPut, "", "versioning=", []byte("<VersioningConfiguration><Status>Enabled</Status></VersioningConfiguration>"))
	if err == nil && status != http.StatusOK {
		err = failed("turn on versions of "+s.bucket, status, answer)
	}
	return err
}

// Tag implements Objects.
func (s *S3) Tag(body []byte) string {
	h := md5.Sum(body)
	return `"` + hex.EncodeToString(h[:]) + `"`
}

// Get implements Objects.
func (s *S3) Get(ctx context.Context, key string) ([]byte, string, error) {
	status, head, answer, err := s.request(ctx, http.MethodGet, key, "", nil)
	switch {
	case err != nil:
		return nil, "", err
	case status == http.StatusNotFound && bytes.Contains(answer, []byte("NoSuchKey")):
		return nil, "", ErrAbsent
	case status != http.StatusOK:
		return nil, "", failed("get "+key, status, answer)
	}
	return answer, head.Get("ETag"), nil
}

// Put implements Objects.
func (s *S3) Put(ctx context.Context, key string, body []byte, when Condition) error {
	var header []string
	if when.Absent {
		header = append(header, "If-None-Match", "*")
	}
	if when.Match != "" {
		header = append(header, "If-Match", when.Match)
	}
	status, head, answer, err := s.request(ctx, http.MethodPut, key, "", body, header...)
	switch {
	case err != nil:
		return err
	case status == http.StatusPreconditionFailed, status == http.StatusNotFound && when.Match != "":
		return ErrCondition
	case status == http.StatusConflict: // another was faster; S3 does not say whether the condition held
		return fmt.Errorf("%w: %w", ErrNothing, failed("put "+key, status, answer))
	case status != http.StatusOK:
		return failed("put "+key, status, answer)
	case head.Get("ETag") != s.Tag(body):
		return fmt.Errorf("put %s: tag %s, want %s", key, head.Get("ETag"), s.Tag(body))
	}
	return nil
}

// Delete implements Objects.
func (s *S3) Delete(ctx context.Context, key string) error {
	status, _, answer, err := s.request(ctx, http.MethodDelete, key, "", nil)
	if err == nil && status != http.StatusNoContent {
		err = failed("delete "+key, status, answer)
	}
	return err
}

// List implements Objects, by one page.
func (s *S3) List(ctx context.Context, prefix string) (map[string]string, error) {
	status, _, answer, err := s.request(ctx, http.MethodGet, "", "list-type=2&max-keys=1000&prefix="+escape(prefix, ""), nil)
	if err != nil {
		return nil, err
	}
	if status != http.StatusOK {
		return nil, failed("list "+prefix, status, answer)
	}
	var l struct {
		Contents []struct{ Key, ETag string }
	}
	if err := xml.Unmarshal(answer, &l); err != nil {
		return nil, fmt.Errorf("list %s: %w", prefix, err)
	}
	out := map[string]string{}
	for _, o := range l.Contents {
		out[o.Key] = o.ETag
	}
	return out, nil
}
