package s3_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	mathrand "math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestClients plays the S3 clients that people have on each server, as they are: two Go libraries, boto3, awscli, s3cmd,
// rclone, restic and mc. Every byte that comes back is compared. A step that fails must be in server.differs, and what is
// there must fail.
func TestClients(t *testing.T) {
	if testing.Short() {
		t.Skip("a dozen programs take half a minute")
	}
	for _, s := range servers {
		t.Run(s.name, func(t *testing.T) {
			s := s.start(t)
			verdicts := clients(t, s)
			for step, err := range verdicts {
				switch why, listed := s.differs[step]; {
				case err == nil && listed:
					t.Errorf("%s: it works, though it is listed: %s", step, why)
				case err != nil && !listed:
					t.Errorf("%s: %v", step, err)
				}
			}
			for step := range s.differs {
				if _, ok := verdicts[step]; !ok {
					t.Errorf("%s: it is listed, and there is no such step", step)
				}
			}
		})
	}
}

// TestClientsNoticeAFlippedBit is the negative control: what reads through a server that flips a bit must fail.
func TestClientsNoticeAFlippedBit(t *testing.T) {
	if testing.Short() {
		t.Skip("four programs take some seconds")
	}
	s := folder(t)
	upstream, err := url.Parse(s.url)
	if err != nil {
		t.Fatal(err)
	}
	proxy := httptest.NewServer(&httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(upstream)
			r.Out.Host = r.In.Host // it is signed
		},
		ModifyResponse: func(r *http.Response) error {
			if r.Request.Method != http.MethodGet || r.StatusCode/100 != 2 || strings.Contains(r.Header.Get("Content-Type"), "xml") {
				return nil
			}
			b, err := io.ReadAll(r.Body)
			if len(b) > 0 {
				b[mathrand.IntN(len(b))] ^= 1 << mathrand.IntN(8)
			}
			r.Body = io.NopCloser(bytes.NewReader(b))
			return err
		},
	})
	defer proxy.Close()
	s.url = proxy.URL
	verdicts := clients(t, s, "minio", "aws-sdk", "rclone", "mc")
	for _, step := range []string{"minio: put and get", "aws-sdk: put and get", "rclone: parts, and a range of them", "mc: parts"} {
		if err, ok := verdicts[step]; !ok || err == nil {
			t.Errorf("%s: it does not notice (it ran: %v)", step, ok)
		}
	}
	for _, step := range []string{"minio: create bucket", "aws-sdk: create bucket", "rclone: create bucket", "mc: create bucket"} {
		if err := verdicts[step]; err != nil {
			t.Errorf("control: %s: %v", step, err)
		}
	}
}

// clients runs programs, all if none is named, and returns how each step ended, by "program: step".
func clients(t *testing.T, s server, only ...string) map[string]error {
	var mu sync.Mutex
	verdicts := map[string]error{}
	t.Run("programs", func(t *testing.T) {
		for _, p := range []struct {
			name string
			run  func(*client)
		}{
			{"aws", awscli},
			{"restic", restic},
			{"minio", func(c *client) { c.steps("delete", tool(t, "s3clients"), "minio", s.url) }},
			{"minio-trailers", func(c *client) { c.steps("delete", tool(t, "s3clients"), "minio-trailers", s.url) }},
			{"aws-sdk", func(c *client) { c.steps("delete", tool(t, "s3clients"), "aws", s.url) }},
			{"boto3", func(c *client) {
				script, err := filepath.Abs("testdata/boto.py")
				if err != nil {
					t.Fatal(err)
				}
				c.steps("delete", "python3", script, s.url, c.bucket)
			}},
			{"s3cmd", s3cmd},
			{"rclone", rclone},
			{"mc", mc},
		} {
			if len(only) > 0 && !slices.Contains(only, p.name) {
				continue
			}
			t.Run(p.name, func(t *testing.T) {
				t.Parallel()
				c := newClient(t, s, p.name)
				c.verdict = func(step string, err error) {
					mu.Lock()
					defer mu.Unlock()
					verdicts[p.name+": "+step] = err
				}
				p.run(c)
			})
		}
	})
	return verdicts
}

// client is one program, with a home, a bucket's name and files of its own.
type client struct {
	t       *testing.T
	s       server
	program string
	verdict func(step string, err error)
	dir     string
	bucket  string
	env     []string
	small   []byte
	big     []byte            // takes several parts
	tree    map[string][]byte // what lies under dir/tree
}

func newClient(t *testing.T, s server, program string) *client {
	var id [4]byte
	rand.Read(id[:])
	c := &client{t: t, s: s, program: program, dir: t.TempDir(), bucket: program + "-" + hex.EncodeToString(id[:]),
		small: noise(1, 4099), big: noise(2, 17<<20+5),
		tree: map[string][]byte{"a": noise(3, 1), "b/c": noise(4, 70000), "b/d e+f&g": noise(5, 3000), "b/h/ü-日本.txt": noise(6, 12), "empty": nil, "z/z/z/z": noise(7, 6<<20)},
	}
	c.env = []string{"PATH=/usr/bin:/bin", "HOME=" + c.dir, "LANG=C.UTF-8", "AWS_ACCESS_KEY_ID=" + s.access, "AWS_SECRET_ACCESS_KEY=" + s.secret,
		"AWS_DEFAULT_REGION=us-east-1", "AWS_EC2_METADATA_DISABLED=true"}
	c.write("small", c.small)
	c.write("big", c.big)
	for name, b := range c.tree {
		c.write("tree/"+name, b)
	}
	return c
}

// noise is n bytes, the same for the same seed.
func noise(seed byte, n int) []byte {
	b := make([]byte, n)
	mathrand.NewChaCha8([32]byte{seed}).Read(b)
	return b
}

// failure is what ends a step.
type failure string

func (c *client) fail(format string, args ...any) { panic(failure(fmt.Sprintf(format, args...))) }

// step runs f and notes how it ended.
func (c *client) step(name string, f func()) {
	err := func() (err error) {
		defer func() {
			switch r := recover().(type) {
			case nil:
			case failure:
				err = fmt.Errorf("%s", string(r))
			default:
				panic(r)
			}
		}()
		f()
		return nil
	}()
	c.verdict(name, err)
}

// steps runs a program that prints a line for each step, of which the last has that name.
func (c *client) steps(last string, argv ...string) {
	c.t.Helper()
	out, err := c.output(argv...)
	ended := false
	for line := range strings.Lines(out) {
		line = strings.TrimSpace(line)
		if name, ok := strings.CutPrefix(line, "ok   "); ok {
			c.verdict(name, nil)
			ended = ended || name == last
		} else if rest, ok := strings.CutPrefix(line, "FAIL "); ok {
			name, why, _ := strings.Cut(rest, ": ")
			c.verdict(name, fmt.Errorf("%s", why))
			ended = ended || name == last
		}
	}
	if !ended {
		c.verdict("run to its end", fmt.Errorf("%v: %s", err, out))
	}
}

// output runs a program in dir and returns what it printed.
func (c *client) output(argv ...string) (string, error) {
	if !strings.Contains(argv[0], "/") {
		argv[0] = "/usr/bin/" + argv[0]
	}
	ctx, cancel := context.WithTimeout(c.t.Context(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	var out, errs bytes.Buffer
	cmd.Dir, cmd.Env, cmd.Stdout, cmd.Stderr = c.dir, c.env, &out, &errs
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%s: %w: %s", filepath.Base(argv[0]), err, errs.Bytes()[:min(errs.Len(), 2000)])
	}
	return out.String(), nil
}

func (c *client) run(argv ...string) string {
	out, err := c.output(argv...)
	if err != nil {
		c.fail("%v: %v", argv, err)
	}
	return out
}

// refused wants a program to fail, and to say why.
func (c *client) refused(why string, argv ...string) {
	out, err := c.output(argv...)
	if err == nil || !strings.Contains(out+err.Error(), why) {
		c.fail("%v: %v %s, want it refused with %q", argv, err, out, why)
	}
}

func (c *client) write(name string, b []byte) {
	path := filepath.Join(c.dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		c.t.Fatal(err)
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		c.t.Fatal(err)
	}
	// S3 tells seconds: mc takes a file of the same second for newer than its copy.
	then := time.Now().Add(-time.Hour)
	if err := os.Chtimes(path, then, then); err != nil {
		c.t.Fatal(err)
	}
}

// equal compares bytes, and says where they part.
func (c *client) equal(what string, got, want []byte) {
	if !bytes.Equal(got, want) {
		i := 0
		for i < min(len(got), len(want)) && got[i] == want[i] {
			i++
		}
		c.fail("%s: %d bytes, want %d; from %d on %.40q", what, len(got), len(want), i, got[i:])
	}
}

// file compares a file with bytes.
func (c *client) file(name string, want []byte) {
	b, err := os.ReadFile(filepath.Join(c.dir, name))
	if err != nil {
		c.fail("%v", err)
	}
	c.equal(name, b, want)
}

// same compares a folder with tree: no file less, none more.
func (c *client) same(dir string) {
	seen := 0
	err := filepath.WalkDir(filepath.Join(c.dir, dir), func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		name, _ := filepath.Rel(filepath.Join(c.dir, dir), p)
		want, ok := c.tree[name]
		if !ok {
			c.fail("%s: %q is too many", dir, name)
		}
		seen++
		c.file(filepath.Join(dir, name), want)
		return nil
	})
	if err != nil || seen != len(c.tree) {
		c.fail("%s: %d files, want %d: %v", dir, seen, len(c.tree), err)
	}
}

// change changes tree on disk and in mind: one file more, one other, one less.
func (c *client) change() {
	c.tree["new"], c.tree["b/c"] = noise(8, 333), noise(9, 70001)
	c.write("tree/new", c.tree["new"])
	c.write("tree/b/c", c.tree["b/c"])
	delete(c.tree, "a")
	os.Remove(filepath.Join(c.dir, "tree/a"))
}

// fetch gets an address as a browser would.
func (c *client) fetch(url string, want []byte) {
	res, err := http.Get(strings.TrimSpace(url))
	if err != nil {
		c.fail("%v", err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != http.StatusOK {
		c.fail("get %s: %s %v %.300s", url, res.Status, err, b)
	}
	c.equal(url, b, want)
}

// lines are the sorted words of each line that f picks.
func lines(out string, f func([]string) string) []string {
	var all []string
	for line := range strings.Lines(out) {
		if w := strings.Fields(line); len(w) > 0 {
			all = append(all, f(w))
		}
	}
	slices.Sort(all)
	return all
}

func last(w []string) string { return w[len(w)-1] }

func (c *client) want(what string, got, want any) {
	if g, w := fmt.Sprint(got), fmt.Sprint(want); g != w {
		c.fail("%s: %s, want %s", what, g, w)
	}
}

func (c *client) json(out string, into any) {
	if err := json.Unmarshal([]byte(out), into); err != nil {
		c.fail("%v: %s", err, out)
	}
}

func awscli(c *client) {
	api := func(args ...string) []string {
		return append([]string{"aws", "--endpoint-url", c.s.url, "--output", "json", "s3api"}, append(args, "--bucket", c.bucket)...)
	}
	s3 := func(args ...string) []string {
		return append([]string{"aws", "--endpoint-url", c.s.url, "s3"}, args...)
	}
	at := "s3://" + c.bucket + "/"
	c.step("create bucket", func() { c.run(s3("mb", at)...) })
	c.step("put and get with checksum, metadata and tags", func() {
		c.run(api("put-object", "--key", "dir/small file", "--body", "small", "--checksum-algorithm", "SHA256", "--metadata", "colour=blue", "--tagging", "a=b")...)
		var head struct {
			Metadata       map[string]string
			ChecksumSHA256 string
			TagCount       int
		}
		c.json(c.run(api("get-object", "--key", "dir/small file", "--checksum-mode", "ENABLED", "small.out")...), &head)
		c.file("small.out", c.small)
		c.want("metadata", head.Metadata["colour"], "blue")
		c.want("length of the checksum", len(head.ChecksumSHA256), 44)
		c.want("tags", head.TagCount, 1)
	})
	c.step("parts, and a range of them", func() {
		c.run(s3("cp", "--quiet", "big", at+"big")...)
		c.run(s3("cp", "--quiet", at+"big", "big.out")...)
		c.file("big.out", c.big)
		c.run(api("get-object", "--key", "big", "--range", "bytes=8388600-8388700", "range.out")...)
		c.file("range.out", c.big[8388600:8388701])
	})
	c.step("copy", func() {
		c.run(s3("cp", "--quiet", at+"big", at+"copy")...)
		c.equal("copy", []byte(c.run(s3("cp", at+"copy", "-")...)), c.big)
	})
	c.step("sync", func() {
		c.run(s3("sync", "--quiet", "tree", at+"tree")...)
		c.change()
		c.run(s3("sync", "--quiet", "--delete", "tree", at+"tree")...)
		c.run(s3("sync", "--quiet", at+"tree", "tree.out")...)
		c.same("tree.out")
	})
	c.step("list with prefix, delimiter and pages", func() {
		var l struct {
			Contents       []struct{ Key string }
			CommonPrefixes []struct{ Prefix string }
		}
		c.json(c.run(api("list-objects-v2", "--prefix", "tree/", "--delimiter", "/", "--page-size", "1")...), &l)
		c.want("listed", fmt.Sprint(l.Contents, l.CommonPrefixes), "[{tree/empty} {tree/new}] [{tree/b/} {tree/z/}]")
	})
	c.step("presigned address", func() { c.fetch(c.run(s3("presign", at+"dir/small file")...), c.small) })
	c.step("versions", func() {
		c.run(api("put-bucket-versioning", "--versioning-configuration", "Status=Enabled")...)
		c.run(s3("cp", "--quiet", "small", at+"v")...)
		c.run(s3("cp", "--quiet", "big", at+"v")...)
		var l struct {
			Versions []struct {
				VersionId string
				Size      int
				IsLatest  bool
			}
		}
		c.json(c.run(api("list-object-versions", "--prefix", "v")...), &l)
		if len(l.Versions) != 2 || l.Versions[0].Size != len(c.big) || !l.Versions[0].IsLatest {
			c.fail("versions: %v", l)
		}
		c.run(api("get-object", "--key", "v", "--version-id", l.Versions[1].VersionId, "v.out")...)
		c.file("v.out", c.small)
	})
	c.step("delete", func() {
		c.run(s3("rm", "--quiet", "--recursive", at+"tree")...)
		c.want("left", c.run(api("list-objects-v2", "--prefix", "tree/", "--query", "Contents")...), "null\n")
	})
}

func s3cmd(c *client) {
	host := strings.TrimPrefix(c.s.url, "http://")
	c.write("s3cfg", fmt.Appendf(nil, "[default]\naccess_key = %s\nsecret_key = %s\nhost_base = %s\nhost_bucket = %s\nbucket_location = us-east-1\nuse_https = %v\n",
		c.s.access, c.s.secret, host, host, strings.HasPrefix(c.s.url, "https")))
	s3 := func(args ...string) []string {
		return append([]string{"s3cmd", "-c", filepath.Join(c.dir, "s3cfg"), "--no-progress"}, args...)
	}
	at := "s3://" + c.bucket + "/"
	c.step("create bucket", func() { c.run(s3("mb", at)...) })
	c.step("put and get", func() {
		c.run(s3("put", "small", at+"dir/small", "--add-header=x-amz-meta-colour:blue")...)
		c.run(s3("get", at+"dir/small", "small.out")...)
		c.file("small.out", c.small)
		if out := c.run(s3("info", at+"dir/small")...); !strings.Contains(out, "colour:") {
			c.fail("info: %s", out)
		}
	})
	c.step("parts", func() {
		c.run(s3("put", "big", at+"big", "--multipart-chunk-size-mb=5")...)
		c.run(s3("get", at+"big", "big.out")...)
		c.file("big.out", c.big)
	})
	c.step("sync", func() {
		c.run(s3("sync", "tree/", at+"tree/")...)
		c.change()
		c.run(s3("sync", "--delete-removed", "tree/", at+"tree/")...)
		os.Mkdir(filepath.Join(c.dir, "tree.out"), 0o700)
		c.run(s3("sync", at+"tree/", "tree.out/")...)
		c.same("tree.out")
	})
	c.step("list", func() {
		c.want("listed", lines(c.run(s3("ls", at+"tree/")...), last), fmt.Sprintf("[%[1]stree/b/ %[1]stree/empty %[1]stree/new %[1]stree/z/]", at))
		c.want("all", len(lines(c.run(s3("ls", "-r", at)...), last)), 2+len(c.tree))
	})
	c.step("copy and move", func() {
		c.run(s3("cp", at+"dir/small", at+"copy")...)
		c.run(s3("mv", at+"copy", at+"moved")...)
		c.run(s3("get", at+"moved", "moved.out")...)
		c.file("moved.out", c.small)
		c.refused("does not exist", s3("get", at+"copy", "copy.out")...)
	})
	c.step("delete", func() {
		c.refused("BucketNotEmpty", s3("rb", at)...)
		c.run(s3("rb", "--recursive", "--force", at)...)
		c.refused("NoSuchBucket", s3("ls", at)...)
	})
}

func rclone(c *client) {
	c.env = append(c.env, "RCLONE_CONFIG_T_TYPE=s3", "RCLONE_CONFIG_T_PROVIDER=Other", "RCLONE_CONFIG_T_ENDPOINT="+c.s.url, "RCLONE_CONFIG_T_REGION=us-east-1",
		"RCLONE_CONFIG_T_ENV_AUTH=true", "RCLONE_S3_UPLOAD_CUTOFF=5Mi", "RCLONE_S3_CHUNK_SIZE=5Mi", "RCLONE_RETRIES=1", "RCLONE_LOW_LEVEL_RETRIES=1")
	r := func(args ...string) string {
		return c.run(append([]string{"rclone", "--config", filepath.Join(c.dir, "rclone.conf"), "--quiet"}, args...)...)
	}
	at := "t:" + c.bucket
	c.step("create bucket", func() { r("mkdir", at) })
	c.step("copy there and check", func() {
		r("copy", "tree", at+"/tree")
		r("check", "--download", "tree", at+"/tree")
		r("check", "tree", at+"/tree") // by the checksums that the server tells
	})
	c.step("sync", func() {
		c.change()
		r("sync", "tree", at+"/tree")
		r("sync", at+"/tree", "tree.out")
		c.same("tree.out")
	})
	c.step("parts, and a range of them", func() {
		r("copyto", "big", at+"/big")
		r("copyto", at+"/big", "big.out", "--multi-thread-streams=0")
		c.file("big.out", c.big)
		c.equal("range", []byte(r("cat", "--offset", "5242870", "--count", "100", at+"/big")), c.big[5242870:5242970])
	})
	c.step("list", func() {
		c.want("listed", strings.Fields(r("lsf", at+"/tree")), "[b/ empty new z/]")
		c.want("all", len(strings.Split(strings.TrimSpace(r("lsf", "-R", "--files-only", "--s3-list-chunk=2", at)), "\n")), 1+len(c.tree))
	})
	c.step("copy and move", func() {
		r("copyto", at+"/big", at+"/copy")
		r("moveto", at+"/copy", at+"/a/moved")
		c.equal("moved", []byte(r("cat", at+"/a/moved")), c.big)
	})
	c.step("presigned address", func() { c.fetch(r("link", "--expire", "1m", at+"/big"), c.big) })
	c.step("times are kept", func() {
		when := time.Date(2001, 2, 3, 4, 5, 6, 0, time.UTC)
		os.Chtimes(filepath.Join(c.dir, "small"), when, when)
		r("copyto", "small", at+"/old")
		c.want("time", strings.TrimSpace(r("lsf", "--format", "t", at+"/old")), when.In(time.Local).Format(time.DateTime))
	})
	c.step("delete", func() {
		r("purge", at)
		c.want("buckets", strings.Contains(r("lsd", "t:"), c.bucket), false)
	})
}

func restic(c *client) {
	c.env = append(c.env, "RESTIC_PASSWORD=correct horse", "RESTIC_REPOSITORY=s3:"+c.s.url+"/"+c.bucket+"/repo", "RESTIC_CACHE_DIR="+filepath.Join(c.dir, "cache"))
	snapshots := func() int {
		var all []any
		c.json(c.run("restic", "snapshots", "--json"), &all)
		return len(all)
	}
	c.step("init", func() { c.run("restic", "init") })
	c.step("backup", func() {
		c.run("restic", "backup", "--quiet", "tree", "big")
		c.change()
		c.run("restic", "backup", "--quiet", "tree")
		c.want("snapshots", snapshots(), 2)
	})
	c.step("check and restore", func() {
		c.run("restic", "check", "--read-data")
		c.run("restic", "restore", "--quiet", "latest", "--target", "out")
		c.same("out/tree")
	})
	c.step("forget and prune", func() {
		c.run("restic", "forget", "--quiet", "--group-by", "", "--keep-last", "1", "--prune")
		c.want("snapshots", snapshots(), 1)
		c.run("restic", "check", "--read-data")
	})
	c.step("another password", func() {
		c.env = append(c.env, "RESTIC_PASSWORD=battery staple")
		c.refused("wrong password", "restic", "snapshots")
	})
}

func mc(c *client) {
	scheme, host, _ := strings.Cut(c.s.url, "://")
	c.env = append(c.env, fmt.Sprintf("MC_HOST_t=%s://%s:%s@%s", scheme, c.s.access, c.s.secret, host), "MC_UPDATE=off", "MINIO_UPDATE=off")
	bin := tool(c.t, "mc")
	args := func(args ...string) []string {
		return append([]string{bin, "--config-dir", filepath.Join(c.dir, "mc"), "--quiet"}, args...)
	}
	r := func(a ...string) string { return c.run(args(a...)...) }
	at := "t/" + c.bucket
	c.step("create bucket", func() { r("mb", at) })
	c.step("mirror and diff", func() {
		r("mirror", "tree", at+"/tree")
		c.want("diff", r("diff", "tree", at+"/tree"), "")
		c.change()
		if out := r("diff", "tree", at+"/tree"); out == "" {
			c.fail("diff shows nothing after a change")
		}
		r("mirror", "--overwrite", "--remove", "tree", at+"/tree")
		c.want("diff", r("diff", "tree", at+"/tree"), "")
		r("mirror", at+"/tree", "tree.out")
		c.same("tree.out")
	})
	c.step("parts", func() {
		r("put", "--part-size", "5MiB", "big", at+"/big")
		c.equal("big", []byte(r("cat", at+"/big")), c.big)
		c.equal("head", []byte(r("cat", "--offset", "5242870", at+"/big")), c.big[5242870:])
	})
	c.step("a checksum in a trailer", func() {
		r("put", "--checksum", "SHA256", "small", at+"/sum")
		c.equal("sum", []byte(r("cat", at+"/sum")), c.small)
	})
	c.step("stat", func() {
		var s struct {
			Size int
			Etag string
		}
		c.json(r("stat", "--json", at+"/big"), &s)
		c.want("size", s.Size, len(c.big))
	})
	c.step("list", func() {
		c.want("listed", lines(r("ls", at+"/tree/"), last), "[b/ empty new z/]")
	})
	c.step("copy and move", func() {
		r("cp", at+"/big", at+"/copy")
		r("mv", at+"/copy", at+"/moved")
		c.equal("moved", []byte(r("cat", at+"/moved")), c.big)
		c.refused("not exist", args("stat", at+"/copy")...)
	})
	c.step("tags", func() {
		r("tag", "set", at+"/big", "colour=blue&shape=round")
		if out := r("tag", "list", at+"/big"); !strings.Contains(out, "blue") || !strings.Contains(out, "round") {
			c.fail("tags: %s", out)
		}
	})
	c.step("presigned address", func() {
		var s struct{ Share string }
		c.json(r("share", "download", "--json", "--expire", "1m", at+"/big"), &s)
		c.fetch(s.Share, c.big)
	})
	c.step("versions", func() {
		r("version", "enable", at)
		r("cp", "small", at+"/v")
		r("cp", "big", at+"/v")
		r("rm", at+"/v")
		c.want("versions", len(lines(r("ls", "--versions", at+"/v"), last)), 3)
		r("undo", "--force", at+"/v")
		c.equal("v", []byte(r("cat", at+"/v")), c.big)
	})
	c.step("delete", func() {
		r("rm", "--recursive", "--force", "--versions", at)
		r("rb", at)
		c.refused("not exist", args("ls", at)...)
	})
}
