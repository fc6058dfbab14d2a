package lab

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const rolling = `
name: roll
services:
  web:
    image: oci:img
    environment: {GREETING: first}
    deploy: {replicas: 3}
    healthcheck: {test: [CMD, /server, health], interval: 2s}
    x-holdfast: {deadline: 3m}
x-holdfast:
  routes: [{host: roll.localhost, service: web, port: 8080}]
`

// rolledBack deploys what does not work over what does, and has the grid take it back by itself.
func rolledBack(t *testing.T, l *Lab) {
	l.Deploy("roll", rolling)
	history := func() string { return l.Run("contract", "history", "roll") }
	l.Until("the first revision is good", func() bool { return !strings.Contains(history(), "on trial") })
	deploy := func(compose string) (string, error) {
		t.Helper()
		path := filepath.Join(l.App, "roll.yaml")
		if err := os.WriteFile(path, []byte(compose), 0o600); err != nil {
			t.Fatal(err)
		}
		return l.Try("deploy", path, "--yes", "--wait", "--timeout", "4m")
	}
	stop, silent := make(chan struct{}), make(chan time.Duration)
	go func() {
		var worst time.Duration
		last := time.Now()
		for {
			select {
			case <-stop:
				silent <- worst
				return
			case <-time.After(50 * time.Millisecond):
			}
			if l.Get("roll.localhost", "/") != "" {
				last = time.Now()
			}
			worst = max(worst, time.Since(last))
		}
	}()
	for _, bad := range []struct{ name, compose, want string }{
		{"one that ends", strings.Replace(rolling, "    deploy:", "    entrypoint: [/server, fail]\n    deploy:", 1), "exit code"},
		{"one that is not healthy", strings.Replace(strings.Replace(rolling, "/server, health", "/server, fail", 1), "interval: 2s", "interval: 1s, retries: 2", 1), "health check failed"},
	} {
		out, err := deploy(bad.compose)
		if err == nil || !strings.Contains(err.Error(), "was rolled back to 1: web-0: "+bad.want) {
			t.Fatalf("%s: %v\n%s", bad.name, err, out)
		}
	}
	l.Until("all run as before", func() bool {
		s, err := l.Status()
		if err != nil {
			return false
		}
		n := 0
		for _, w := range s.Workloads {
			if strings.HasPrefix(w.Name, "roll/") && w.State == "running" && w.Epoch == 1 {
				n++
			}
		}
		return n == 3
	})
	for _, i := range []string{"1", "2"} { // they were never replaced
		if w := l.Workload("roll/web-" + i); w.Restarts != 0 {
			t.Errorf("%+v", w)
		}
	}
	close(stop)
	// Two of three stood all the time.
	if worst := <-silent; worst > 20*time.Second {
		t.Errorf("no answer for %v", worst)
	}
	if h := history(); strings.Count(h, "rolled back: web-0") != 2 {
		t.Errorf("%s", h)
	}
	if out, err := deploy(strings.Replace(rolling, "first", "fourth", 1)); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if got := l.Get("roll.localhost", "/"); !strings.Contains(got, "fourth") {
		t.Errorf("after the deploy was done: %q", got)
	}
	l.Run("contract", "cancel", "roll", "--yes")
}
