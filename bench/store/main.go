// Command store measures holdfast beside other S3 servers: MinIO over six folders (EC:2), the same with its own encryption,
// and versitygw over one plain folder. The servers take turns on the same folders with the same client; every turn starts
// with an empty store, since some keep what is deleted. It prints one JSON object a line, medians of the rounds. Figures are
// of this machine at this moment, which client and server share: compare ratios.
package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
)

const (
	access, secret = "benchaccess", "benchsecret1234"
	bucket         = "bench"
	most           = 1 << 30 // bytes that one case writes: space is bounded, tmpfs is memory
	mostObjects    = 40000
	tmpfsSize      = "8g"
)

type options struct {
	quick, front bool
	rounds       int
	servers      []string
	cases        string
	disk         string
	profile      string
	holdfast     string
	length       time.Duration
}

func main() {
	var o options
	flag.BoolVar(&o.quick, "quick", false, "tmpfs and c8 only, two short rounds of holdfast and MinIO: under a minute")
	flag.BoolVar(&o.front, "front", false, "measure fronts without a store behind them instead")
	flag.IntVar(&o.rounds, "rounds", 0, "turns of every server; 0 means 3, or 2 if quick")
	list := flag.String("servers", "", "take only these, by comma")
	flag.StringVar(&o.cases, "cases", "", "take only cases whose name contains this, as \"4KiB put tmpfs c8\"")
	flag.StringVar(&o.disk, "disk", os.TempDir(), "directory on the disk to measure")
	flag.StringVar(&o.profile, "profile", "", "directory for perf's profiles of holdfast, one a case; the program must have its symbols")
	flag.StringVar(&o.holdfast, "holdfast", "bin/holdfast", "the program")
	flag.DurationVar(&o.length, "length", 0, "of a case in a round; 0 means 3s, or 900ms if quick")
	flag.Parse()
	if o.servers = []string{"holdfast", "minio", "minio_encrypted", "versitygw"}; o.front {
		o.servers = []string{"versitygw_null", "nethttp", "fasthttp"}
	}
	if o.quick {
		o.rounds, o.length = cmp.Or(o.rounds, 2), cmp.Or(o.length, 900*time.Millisecond)
		if !o.front {
			o.servers = o.servers[:2]
		}
	}
	o.rounds, o.length = cmp.Or(o.rounds, 3), cmp.Or(o.length, 3*time.Second)
	if *list != "" {
		o.servers = strings.Split(*list, ",")
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o); err != nil {
		log.Fatal(err)
	}
}

// A load is a put case and the get case that reads what it wrote.
type load struct {
	label, medium string
	size, clients int
}

func (l load) name(op string) string {
	return fmt.Sprintf("%s %s %s c%d", l.label, op, l.medium, l.clients)
}

// figure is what one case gave in one round: operations a second, and the server's processor seconds an operation.
type figure struct{ rate, cpu float64 }

func run(ctx context.Context, o options) (err error) {
	dir, err := os.MkdirTemp(o.disk, "bench-store-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	tmpfs, disk := filepath.Join(dir, "tmpfs"), filepath.Join(dir, "disk")
	if err := errors.Join(os.Mkdir(tmpfs, 0o700), os.Mkdir(disk, 0o700)); err != nil {
		return err
	}
	if err := syscall.Mount("tmpfs", tmpfs, "tmpfs", syscall.MS_NOSUID|syscall.MS_NODEV, "mode=0700,size="+tmpfsSize); err != nil {
		return fmt.Errorf("mount tmpfs: %w", err)
	}
	defer func() { err = errors.Join(err, syscall.Unmount(tmpfs, syscall.MNT_DETACH)) }()

	for _, medium := range []string{"tmpfs", "disk"} {
		for _, clients := range []int{8, 64} {
			if (o.quick || o.front) && (medium != "tmpfs" || clients != 8) {
				continue
			}
			var loads []load
			for _, s := range []load{{label: "10MiB", size: 10 << 20}, {label: "1MiB", size: 1 << 20}, {label: "4KiB", size: 4 << 10}} {
				s.medium, s.clients = medium, clients
				if strings.Contains(s.name("put"), o.cases) || strings.Contains(s.name("get"), o.cases) {
					loads = append(loads, s)
				}
			}
			got := map[string]map[string][]figure{} // by case and server
			for round := range o.rounds {
				for _, s := range o.servers {
					if len(loads) == 0 {
						continue
					}
					if err := turn(ctx, o, s, filepath.Join(dir, medium, s), loads, func(c string, f figure) {
						if got[c] == nil {
							got[c] = map[string][]figure{}
						}
						got[c][s] = append(got[c][s], f)
					}); err != nil {
						return fmt.Errorf("%s, round %d: %w", s, round+1, err)
					}
				}
			}
			for _, l := range loads {
				for _, op := range []string{"put", "get"} {
					say(o, l, op, got[l.name(op)])
				}
			}
		}
	}
	return nil
}

// say prints a case: a rate for every server, and what holdfast's is of MinIO's. cpu_us is the processor time a server
// took for one operation, which a busy machine changes less than the rate.
func say(o options, l load, op string, by map[string][]figure) {
	c, unit, scale := l.name(op), "op/s", 1.0
	if l.size >= 1<<20 {
		unit, scale = "MB/s", float64(l.size)/1e6
	}
	line := map[string]any{"bench": "store", "case": c, "unit": unit, "rounds": o.rounds}
	cpu := map[string]float64{}
	rate := map[string]float64{}
	for s, fs := range by {
		rate[s] = scale * median(fs, func(f figure) float64 { return f.rate })
		line[s] = round(rate[s])
		cpu[s] = round(1e6 * median(fs, func(f figure) float64 { return f.cpu }))
	}
	line["cpu_us"] = cpu
	for key, peer := range map[string]string{"ratio": "minio", "ratio_encrypted": "minio_encrypted"} {
		if rate["holdfast"] > 0 && rate[peer] > 0 {
			line[key] = round(rate["holdfast"] / rate[peer])
		}
	}
	json.NewEncoder(os.Stdout).Encode(line)
}

func round(v float64) float64 {
	v, _ = strconv.ParseFloat(strconv.FormatFloat(v, 'g', 4, 64), 64)
	return v
}

func median(fs []figure, of func(figure) float64) float64 {
	v := make([]float64, len(fs))
	for i, f := range fs {
		v[i] = of(f)
	}
	slices.Sort(v)
	return (v[(len(v)-1)/2] + v[len(v)/2]) / 2
}

// turn is one server's round: from an empty directory through all loads to an empty directory.
func turn(ctx context.Context, o options, name, dir string, loads []load, got func(string, figure)) (err error) {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	s, err := start(ctx, o, name, dir)
	if err != nil {
		return err
	}
	defer s.end()
	client, err := minio.NewCore(s.address, &minio.Options{
		Creds: credentials.NewStaticV4(access, secret, ""), Region: "us-east-1", BucketLookup: minio.BucketLookupPath, MaxRetries: 1,
		Transport: &http.Transport{MaxIdleConns: 256, MaxIdleConnsPerHost: 256, DisableCompression: true},
	})
	if err != nil {
		return err
	}
	// A server listens before it serves.
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		if err = client.MakeBucket(ctx, bucket, minio.MakeBucketOptions{Region: "us-east-1"}); err == nil {
			break
		}
		if time.Now().After(end) || ctx.Err() != nil {
			return fmt.Errorf("make bucket: %w\n%s", err, s.output.Bytes())
		}
	}
	for _, l := range loads {
		if err := play(ctx, o, s, client, l, got); err != nil {
			return fmt.Errorf("%s: %w\n%s", l.label, err, s.output.Bytes())
		}
	}
	return nil
}

// play writes objects, reads them in another order, and compares some with what was written, which is not timed.
func play(ctx context.Context, o options, s *server, client *minio.Core, l load, got func(string, figure)) error {
	body := newBodies(l.size)
	key := func(i int64) string { return fmt.Sprintf("%d/%07d", l.size, i) }
	limit := min(int64(most/l.size), mostObjects)
	put := func(i int64, _ []byte) error {
		_, err := client.Client.PutObject(ctx, bucket, key(i), bytes.NewReader(body.of(i)), int64(l.size), minio.PutObjectOptions{})
		return err
	}
	written, f, err := s.timed(o, l.name("put"), l.clients, o.length, limit, put)
	if err != nil {
		return fmt.Errorf("put: %w", err)
	}
	got(l.name("put"), f)
	get := func(i int64, buffer []byte, check func([]byte) bool) error {
		r, _, _, err := client.GetObject(ctx, bucket, key(i), minio.GetObjectOptions{})
		if err != nil {
			return err
		}
		defer r.Close()
		n := 0
		for {
			m, err := r.Read(buffer)
			if n += m; check != nil && !check(buffer[:m]) {
				return fmt.Errorf("%s: other bytes than were written, before byte %d", key(i), n)
			}
			if err == io.EOF {
				break
			}
			if err != nil {
				return err
			}
		}
		if n != l.size {
			return fmt.Errorf("%s: %d bytes of %d", key(i), n, l.size)
		}
		return nil
	}
	const step = 7919 // a prime: all objects, not in the order they were written in
	_, f, err = s.timed(o, l.name("get"), l.clients, o.length, 1<<40, func(i int64, b []byte) error { return get(i*step%written, b, nil) })
	if err != nil {
		return fmt.Errorf("get: %w", err)
	}
	got(l.name("get"), f)
	if s.null {
		return nil
	}
	if s.name == "minio_encrypted" {
		r, _, header, err := client.GetObject(ctx, bucket, key(0), minio.GetObjectOptions{})
		if err != nil {
			return err
		}
		r.Close()
		if header.Get("X-Amz-Server-Side-Encryption") == "" {
			return errors.New("it does not encrypt")
		}
	}
	buffer := make([]byte, 256<<10)
	for i := int64(0); i < written; i += max(1, written/50) {
		want := body.of(i)
		if err := get(i, buffer, func(b []byte) bool {
			same := len(b) <= len(want) && bytes.Equal(b, want[:len(b)])
			want = want[min(len(b), len(want)):]
			return same
		}); err != nil {
			return fmt.Errorf("verify: %w", err)
		}
	}
	return nil
}

// bodies are windows of random bytes, another for each of 4096 consecutive objects.
type bodies struct {
	bytes []byte
	size  int
}

func newBodies(size int) bodies {
	b := make([]byte, size+4096*8)
	rand.NewChaCha8([32]byte{1}).Read(b)
	return bodies{b, size}
}

func (b bodies) of(i int64) []byte { return b.bytes[i%4096*8:][:b.size] }

// timed does operations 0, 1, 2 … with some clients at once until time or their number ends, and says how many it did.
func (s *server) timed(o options, name string, clients int, length time.Duration, limit int64, do func(int64, []byte) error) (int64, figure, error) {
	done := s.profile(o, name)
	before := s.cpu()
	var next atomic.Int64
	var wg sync.WaitGroup
	errs := make(chan error, clients)
	begin := time.Now()
	for range clients {
		wg.Go(func() {
			buffer := make([]byte, 256<<10)
			for time.Since(begin) < length {
				i := next.Add(1) - 1
				if i >= limit {
					return
				}
				if err := do(i, buffer); err != nil {
					errs <- err
					return
				}
			}
		})
	}
	wg.Wait()
	took := time.Since(begin).Seconds()
	n := min(next.Load(), limit)
	f := figure{float64(n) / took, (s.cpu() - before) / float64(n)}
	close(errs)
	return n, f, errors.Join(<-errs, done())
}

// A server is one that this program started.
type server struct {
	name, address string
	null          bool // keeps nothing
	cmd           *exec.Cmd
	output        *bytes.Buffer
	ended         chan struct{}
}

func start(ctx context.Context, o options, name, dir string) (*server, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	at := l.Addr().String()
	l.Close()
	s := &server{name: name, address: at, output: &bytes.Buffer{}, ended: make(chan struct{})}
	var args, env []string
	switch name {
	case "holdfast":
		args = []string{o.holdfast, "run", "s3", "--dir", filepath.Join(dir, "store"), "--listen", at, "--scheme", "4/6", "--phrase-file", filepath.Join(dir, "phrase")}
		env = []string{"HOLDFAST_S3_ACCESS_KEY=" + access, "HOLDFAST_S3_SECRET_KEY=" + secret}
	case "minio", "minio_encrypted":
		args = []string{"bin/minio", "server", "--quiet", "--address", at, "--console-address", "127.0.0.1:0", filepath.Join(dir, "d{1...6}")}
		env = []string{"MINIO_ROOT_USER=" + access, "MINIO_ROOT_PASSWORD=" + secret, "MINIO_STORAGE_CLASS_STANDARD=EC:2", "MINIO_BROWSER=off",
			"MINIO_UPDATE=off", "MINIO_CALLHOME_ENABLE=off", "MINIO_ROOTDISK_THRESHOLD_SIZE=1MiB", "HOME=" + dir} // folders on the system's disk are allowed; MINIO_CI_CD would allow them too, but shrinks pools
		if name == "minio_encrypted" {
			env = append(env, "MINIO_KMS_SECRET_KEY=bench:"+strings.Repeat("A", 43)+"=", "MINIO_KMS_AUTO_ENCRYPTION=on")
		}
	case "versitygw":
		objects := filepath.Join(dir, "objects")
		if err := os.Mkdir(objects, 0o700); err != nil {
			return nil, err
		}
		args = []string{"bin/versitygw", "--port", at, "--access", access, "--secret", secret, "--quiet", "posix", objects}
	case "versitygw_null", "nethttp", "fasthttp":
		s.null = true
		args = []string{"bin/bench-front", name, at, access, secret}
	default:
		return nil, fmt.Errorf("%q is no server", name)
	}
	s.cmd = exec.CommandContext(ctx, args[0], args[1:]...)
	s.cmd.Env = append(os.Environ(), env...)
	s.cmd.Stdout, s.cmd.Stderr = s.output, s.output
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	go func() { s.cmd.Wait(); close(s.ended) }()
	return s, nil
}

func (s *server) end() {
	s.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-s.ended:
	case <-time.After(3 * time.Second):
		s.cmd.Process.Kill()
		<-s.ended
	}
}

// profile begins a profile of holdfast during a case; the function ends it.
func (s *server) profile(o options, name string) func() error {
	if o.profile == "" || s.name != "holdfast" {
		return func() error { return nil }
	}
	cmd := exec.Command("perf", "record", "--quiet", "-g", "-F", "997", "-o", filepath.Join(o.profile, strings.ReplaceAll(name, " ", "-")+".perf"),
		"-p", strconv.Itoa(s.cmd.Process.Pid))
	if err := cmd.Start(); err != nil {
		return func() error { return err }
	}
	return func() error {
		cmd.Process.Signal(os.Interrupt)
		cmd.Wait() // it says that it was interrupted
		return nil
	}
}

// cpu is how many seconds of processors the server has taken.
func (s *server) cpu() float64 {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", s.cmd.Process.Pid))
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(f) < 13 {
		return 0
	}
	u, _ := strconv.ParseFloat(f[11], 64)
	k, _ := strconv.ParseFloat(f[12], 64)
	return (u + k) / 100 // USER_HZ
}
