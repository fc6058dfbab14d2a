package s3_test

import (
	"fmt"
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
	*process
}

// servers are what the tests of this room play their clients on. The first is the positive control: a peer that others
// wrote and use, with which the same tests must pass.
var servers = []struct {
	name     string
	start    func(testing.TB) server
	expected string // the tests of full-flow that fail, and why; "" for the control, where none does
	races    bool   // it is no order that its answers come from, and TestLinear must see it
	forgets  bool   // it keeps nothing when it is killed
}{
	{"versitygw over a folder", folder, "", true, false},
	{"holdfast", holdfast, "testdata/fullflow-expected.txt", false, false},
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
	s.process = daemon(t, s.url, dir, bin, "--port", s.url[len("http://"):], "--access", s.access, "--secret", s.secret, "--iam-dir", filepath.Join(dir, "iam"), "--quiet",
		"posix", "--versioning-dir", filepath.Join(dir, "versions"), filepath.Join(dir, "objects"))
	return s
}

// holdfast serves six locations under a folder, as somebody does who tries it.
func holdfast(t testing.TB) server {
	t.Helper()
	dir := t.TempDir()
	s := server{url: "http://" + freePort(t), access: "holdfastaccess", secret: "holdfastsecret"}
	account := fmt.Sprintf(`{"access_key": %q, "secret_key": %q}`, s.access, s.secret)
	if err := os.Mkdir(filepath.Join(dir, "store"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "store", "credentials.json"), []byte(account), 0o600); err != nil {
		t.Fatal(err)
	}
	s.process = daemon(t, s.url, dir, tool(t, "holdfast"), "run", "s3", "--dir", filepath.Join(dir, "store"), "--listen", s.url[len("http://"):],
		"--scheme", "4/6", "--phrase-file", filepath.Join(dir, "phrase"))
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

// process is a server that can be killed and started again, with what it has on disk.
type process struct {
	t        testing.TB
	url, dir string
	argv     []string
	cmd      *exec.Cmd
	ended    chan error
}

// daemon runs a server until the test ends. What it printed is shown if the test fails.
func daemon(t testing.TB, url, dir string, argv ...string) *process {
	p := &process{t: t, url: url, dir: dir, argv: argv}
	p.start()
	t.Cleanup(func() {
		p.cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-p.ended:
		case <-time.After(time.Minute):
			t.Errorf("%s did not end within a minute", filepath.Base(argv[0]))
			p.kill()
		}
		if t.Failed() {
			t.Logf("%s: %s", filepath.Base(argv[0]), p.log())
		}
	})
	return p
}

// log is the end of what it printed.
func (p *process) log() []byte {
	b, _ := os.ReadFile(filepath.Join(p.dir, "log"))
	return b[max(0, len(b)-4000):]
}

// kill ends it at once.
func (p *process) kill() {
	p.cmd.Process.Kill()
	<-p.ended
}

// start returns when it answers.
func (p *process) start() {
	log, err := os.OpenFile(filepath.Join(p.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		p.t.Fatal(err)
	}
	defer log.Close()
	p.cmd, p.ended = exec.Command(p.argv[0], p.argv[1:]...), make(chan error, 1)
	p.cmd.Dir, p.cmd.Env, p.cmd.Stdout, p.cmd.Stderr = p.dir, []string{"PATH=/usr/bin:/bin", "HOME=" + p.dir}, log, log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	go func(cmd *exec.Cmd, ended chan<- error) { ended <- cmd.Wait() }(p.cmd, p.ended)
	for range 600 { // a busy machine
		if res, err := http.Get(p.url); err == nil {
			res.Body.Close()
			return
		}
		select {
		case err := <-p.ended:
			p.ended <- err
			p.t.Fatalf("%s ended: %v: %s", filepath.Base(p.argv[0]), err, p.log())
		case <-time.After(100 * time.Millisecond):
		}
	}
	p.t.Fatalf("%s does not answer within a minute", p.url)
}
