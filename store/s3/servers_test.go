package s3_test

import (
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// server is an S3 server under test.
type server struct {
	url, access, secret string
	differs             map[string]string // "program: step" that fails there, and why. What is listed must fail
}

// servers are what the tests of this room play their clients on. The first is the positive control: a peer that others
// wrote and use, with which the same tests must pass.
var servers = []struct {
	name     string
	start    func(testing.TB) server
	expected string // the tests of full-flow that fail, and why; "" for the control, where none does
	races    bool   // it is no order that its answers come from, and TestLinear must see it
}{
	{"versitygw over a folder", folder, "", true},
}

// tool is a program that make s3tools has built.
func tool(t testing.TB, name string) string {
	t.Helper()
	path, err := filepath.Abs(filepath.Join("../../bin", name))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("%v: run make s3tools first", err)
	}
	return path
}

// folder serves a folder with versitygw, versions and all.
func folder(t testing.TB) server {
	t.Helper()
	bin, dir := tool(t, "versitygw"), t.TempDir()
	for _, d := range []string{"iam", "versions", "objects"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	s := server{url: "http://" + freePort(t), access: "folderaccess", secret: "foldersecret", differs: map[string]string{
		"minio-trailers: multipart":      "versitygw 1.8.0 takes the line feed before \\r\\n, with which minio-go ends a signed trailer, for a part of the checksum",
		"minio-trailers: checksums":      "the same",
		"mc: a checksum in a trailer":    "the same",
		"aws-sdk: an older null version": "its posix backend takes the null version for the newest when a delete marker goes",
	}}
	daemon(t, s.url, dir, bin, "--port", s.url[len("http://"):], "--access", s.access, "--secret", s.secret, "--iam-dir", filepath.Join(dir, "iam"), "--quiet",
		"posix", "--versioning-dir", filepath.Join(dir, "versions"), filepath.Join(dir, "objects"))
	return s
}

func freePort(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// daemon runs a server until the test ends, and returns when it answers. What it printed is shown if the test fails.
func daemon(t testing.TB, url, dir string, argv ...string) {
	t.Helper()
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Dir, cmd.Env, cmd.Stdout, cmd.Stderr = dir, []string{"PATH=/usr/bin:/bin", "HOME=" + dir}, log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-ended:
		case <-time.After(10 * time.Second):
			t.Errorf("%s did not end within 10 s", filepath.Base(argv[0]))
			cmd.Process.Kill()
			<-ended
		}
		if b, _ := os.ReadFile(log.Name()); t.Failed() && len(b) > 0 {
			t.Logf("%s: %s", filepath.Base(argv[0]), b[max(0, len(b)-4000):])
		}
	})
	for range 100 {
		if res, err := http.Get(url); err == nil {
			res.Body.Close()
			return
		}
		select {
		case err := <-ended:
			ended <- err
			b, _ := os.ReadFile(log.Name())
			t.Fatalf("%s ended: %v: %s", filepath.Base(argv[0]), err, b)
		case <-time.After(100 * time.Millisecond):
		}
	}
	t.Fatalf("%s does not answer within 10 s", url)
}
