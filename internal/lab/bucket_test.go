package lab

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"holdfast/internal/box"
)

const objectMarker = "kZ4-marker-in-an-object"

const bucketed = `
name: photos
services:
  web:
    image: oci:img
    healthcheck: {test: [CMD, /server, health], interval: 2s}
    x-holdfast: {buckets: [uploads]}
x-holdfast:
  buckets: {uploads: {}}
  storage: 256MiB
  routes: [{host: photos.localhost, service: web, port: 8080}]
`

// bucketOutlives writes an object, and kills the node that has the front end's keys and its database.
func bucketOutlives(t *testing.T, l *Lab) {
	l.Deploy("photos", bucketed)
	put := func(key, body string) bool {
		out, err := l.Curl("photos.localhost", "/object?bucket=uploads&key="+key, "--data-binary", body, "--max-time", "25", "-f")
		if err != nil {
			t.Logf("put %s: %v %s", key, err, out)
		}
		return err == nil
	}
	reads := func(key, want string) bool {
		return l.Get("photos.localhost", "/object?bucket=uploads&key="+key) == want
	}
	long := strings.Repeat(objectMarker+" ", 4500) // a segment of its own, not a part of the log
	l.Until("an object", func() bool { return put("a", objectMarker) && put("long", long) })
	if !reads("a", objectMarker) || !reads("long", long) {
		t.Fatal("what was written is not there")
	}

	was := l.Workload("photos/s3-0")
	// On no disk is anything of it, while it runs.
	planted := t.TempDir()
	if err := os.WriteFile(filepath.Join(planted, "plain"), []byte("x"+objectMarker), 0o600); err != nil {
		t.Fatal(err)
	}
	if found, _ := Search(planted, objectMarker); len(found) == 0 {
		t.Error("control: the marker is not found where it is")
	}
	for n := 1; n <= 3; n++ {
		for _, dir := range []string{fmt.Sprintf("location-%d", n), fmt.Sprintf("node-%d", n)} {
			for _, text := range []string{objectMarker, "uploads"} {
				if found, err := Search(filepath.Join(l.Dir, "data", dir), text); err != nil || len(found) > 0 {
					t.Errorf("%s shows %q: %v %v", dir, text, found, err)
				}
			}
		}
	}
	// Who is in another contract reaches it no more than any workload.
	at := strings.Fields(l.Get("photos.localhost", "/lookup?name=s3"))
	if len(at) != 1 {
		t.Fatalf("its own contract finds it at %q", at)
	}
	dial := "/dial?net=tcp&addr=" + net.JoinHostPort(at[0], "9000")
	dial = strings.NewReplacer("[", "%5B", "]", "%5D").Replace(dial)
	if !strings.Contains(l.Get("photos.localhost", dial), "connected") {
		t.Error("control: its own contract does not reach it")
	}
	if out := l.Get("free.localhost", "/lookup?name=s3.photos.internal"); out != "" {
		t.Errorf("another contract finds it: %q", out)
	}
	if l.Get("free.localhost", dial) != "" {
		t.Error("another contract reaches it")
	}
	// Neither does who is outside, nor a node that runs nothing of the contract.
	for _, name := range []string{"outside", "location-1"} {
		if err := box.Within(l.Box(name).NetNS(), func() error {
			c, err := net.DialTimeout("tcp", net.JoinHostPort(at[0], "9000"), time.Second)
			if err == nil {
				c.Close()
				t.Errorf("%s reaches it", name)
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
	}

	l.Run("lab", "kill", was.Node)
	l.Until("the bucket, served elsewhere", func() bool {
		w := l.Workload("photos/s3-0")
		return w.Node != was.Node && w.Epoch > was.Epoch && reads("a", objectMarker)
	})
	if !reads("long", long) {
		t.Error("the long object is not there")
	}
	l.Until("another object", func() bool { return put("b", "later") })
	l.Run("lab", "resume", was.Node)
	l.Until("the node that is back", func() bool { s, err := l.Status(); return err == nil && len(s.Nodes) > 0 })
	if w := l.Workload("photos/s3-0"); w.Node == was.Node {
		t.Errorf("it moved again: %+v", w)
	}
	if !reads("b", "later") || !reads("a", objectMarker) {
		t.Error("what was written is not there")
	}
	l.Run("contract", "cancel", "photos", "--yes")
}
