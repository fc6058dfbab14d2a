package main

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"
)

// object gets or puts an object of a bucket, with what the environment says of it.
func object(method, bucket, key string, body []byte) (int, []byte, error) {
	base, err := url.Parse(os.Getenv("AWS_ENDPOINT_URL_S3"))
	if err != nil {
		return 0, nil, err
	}
	path := "/" + bucket + "/" + key
	r, err := http.NewRequest(method, base.String()+path, bytes.NewReader(body))
	if err != nil {
		return 0, nil, err
	}
	sum := func(b []byte) string { s := sha256.Sum256(b); return hex.EncodeToString(s[:]) }
	now := time.Now().UTC()
	at, day := now.Format("20060102T150405Z"), now.Format("20060102")
	r.Header.Set("X-Amz-Date", at)
	r.Header.Set("X-Amz-Content-Sha256", sum(body))
	const headers = "host;x-amz-content-sha256;x-amz-date"
	canonical := strings.Join([]string{method, path, "", "host:" + base.Host, "x-amz-content-sha256:" + sum(body), "x-amz-date:" + at, "", headers, sum(body)}, "\n")
	scope := day + "/" + os.Getenv("AWS_REGION") + "/s3/aws4_request"
	sign := []byte("AWS4" + os.Getenv("AWS_SECRET_ACCESS_KEY"))
	for _, s := range append(strings.Split(scope, "/"), strings.Join([]string{"AWS4-HMAC-SHA256", at, scope, sum([]byte(canonical))}, "\n")) {
		m := hmac.New(sha256.New, sign)
		m.Write([]byte(s))
		sign = m.Sum(nil)
	}
	r.Header.Set("Authorization", fmt.Sprintf("AWS4-HMAC-SHA256 Credential=%s/%s, SignedHeaders=%s, Signature=%x", os.Getenv("AWS_ACCESS_KEY_ID"), scope, headers, sign))
	c := http.Client{Timeout: 20 * time.Second}
	resp, err := c.Do(r)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp.StatusCode, b, err
}

func serveObject(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	method := http.MethodGet
	if r.Method == http.MethodPost {
		method = http.MethodPut
	}
	q := r.URL.Query()
	code, b, err := object(method, q.Get("bucket"), q.Get("key"), body)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	w.WriteHeader(code)
	w.Write(b)
}
