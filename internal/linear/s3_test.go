package linear

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// serve speaks as much of S3 as Objects needs, over a memory.
func serve(m *memory) http.Handler {
	say := func(w http.ResponseWriter, status int, code string) {
		w.WriteHeader(status)
		fmt.Fprintf(w, "<Error><Code>%s</Code></Error>", code)
	}
	fail := func(w http.ResponseWriter, err error) {
		switch {
		case errors.Is(err, ErrAbsent):
			say(w, 404, "NoSuchKey")
		case errors.Is(err, ErrCondition):
			say(w, 412, "PreconditionFailed")
		case errors.Is(err, ErrNothing):
			say(w, 409, "ConditionalRequestConflict")
		default:
			say(w, 503, "SlowDown")
		}
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, key, _ := strings.Cut(r.URL.Path[1:], "/")
		ctx := context.Background()
		switch {
		case !strings.HasPrefix(r.Header.Get("Authorization"), "AWS4-HMAC-SHA256 Credential=access/"):
			say(w, 403, "AccessDenied")
		case r.Method == "PUT":
			b, err := io.ReadAll(r.Body)
			if err == nil {
				err = m.Put(ctx, key, b, Condition{r.Header.Get("If-None-Match") == "*", strings.Trim(r.Header.Get("If-Match"), `"`)})
			}
			if err != nil {
				fail(w, err)
				return
			}
			w.Header().Set("ETag", `"`+m.Tag(b)+`"`)
		case r.Method == "DELETE":
			if err := m.Delete(ctx, key); err != nil {
				fail(w, err)
				return
			}
			w.WriteHeader(204)
		case key == "":
			all, err := m.List(ctx, r.URL.Query().Get("prefix"))
			if err != nil {
				fail(w, err)
				return
			}
			type object struct{ Key, ETag string }
			var l struct {
				XMLName  xml.Name `xml:"ListBucketResult"`
				Contents []object
			}
			for k, tag := range all {
				l.Contents = append(l.Contents, object{k, `"` + tag + `"`})
			}
			xml.NewEncoder(w).Encode(l)
		default:
			b, tag, err := m.Get(ctx, key)
			if err != nil {
				fail(w, err)
				return
			}
			w.Header().Set("ETag", `"`+tag+`"`)
			w.Write(b)
		}
	})
}

// TestS3 plays the same rounds over HTTP.
func TestS3(t *testing.T) {
	for _, c := range []struct {
		way   string
		right bool
	}{
		{"one after another", true}, {"loses answers", true}, {"is down", true},
		{"serves stale reads", false}, {"loses puts", false}, {"puts twice", false}, {"ignores conditions", false}, {"tells another's tag", false},
	} {
		t.Run(c.way, func(t *testing.T) {
			t.Parallel()
			m := newMemory(c.way)
			srv := httptest.NewServer(serve(m))
			defer srv.Close()
			o := NewS3(srv.URL, "access", "secret", "bucket")
			for round := range map[bool]int{true: 10, false: 200}[c.right] {
				h := Run(t.Context(), o, fmt.Sprintf("round %d+/", round), Config{Seed: uint64(round)})
				m.wg.Wait()
				switch err := h.Check(t.TempDir(), 20*time.Second); {
				case err == nil:
				case c.right:
					t.Fatalf("round %d: %v", round, err)
				default:
					pictured(t, err)
					return
				}
			}
			if !c.right {
				t.Error("200 rounds look right")
			}
		})
	}
}

// TestCutConnections: a server that dies leaves open what it was asked, and that is explained in time.
func TestCutConnections(t *testing.T) {
	m := newMemory("")
	inner := serve(m)
	var asked atomic.Int64
	var srv *httptest.Server
	srv = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if asked.Add(1)%150 == 0 {
			go srv.CloseClientConnections()
		}
		inner.ServeHTTP(w, r)
	}))
	defer srv.Close()
	unknown := 0
	for round := range 10 {
		h := Run(t.Context(), NewS3(srv.URL, "access", "secret", "bucket"), fmt.Sprintf("round %d/", round), Config{Seed: uint64(round), Ops: 100})
		if err := h.Check(t.TempDir(), 20*time.Second); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		unknown += h.Unknown
	}
	if unknown == 0 {
		t.Error("control: no outcome is unknown")
	}
	t.Logf("%d outcomes unknown", unknown)
}

// TestARefusedConnectionDidNothing: it must not count as an open outcome, of which a server that is away would make many.
func TestARefusedConnectionDidNothing(t *testing.T) {
	srv := httptest.NewServer(nil)
	o := NewS3(srv.URL, "access", "secret", "bucket")
	srv.Close()
	if err := o.Put(t.Context(), "k", nil, Condition{}); !errors.Is(err, ErrNothing) {
		t.Errorf("put to nobody: %v", err)
	}
}
