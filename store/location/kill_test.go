package location

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	mrand "math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// childEnv makes the test's own program a location, in the directory that it names.
const childEnv = "HOLDFAST_TEST_LOCATION"

func TestMain(m *testing.M) {
	if dir := os.Getenv(childEnv); dir != "" {
		fmt.Fprintln(os.Stderr, child(dir))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// child serves until it is killed, and says where.
func child(dir string) error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	cert, err := Certificate(Seed{9})
	if err != nil {
		return err
	}
	s, err := NewServer(ServerConfig{Listener: l, Certificate: cert, Path: dir, Stores: []Store{{Name: "s", Keys: []Key{keyOf(Seed{1}, everything)}}}, Scrub: -1})
	if err != nil {
		return err
	}
	fmt.Println(l.Addr().(*net.TCPAddr).Port)
	return s.Run(context.Background())
}

func startChild(t *testing.T, dir string) (*exec.Cmd, *Client) {
	t.Helper()
	exe, err := os.Executable()
	good(t, "executable", err)
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), childEnv+"="+dir)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	good(t, "pipe", err)
	good(t, "start", cmd.Start())
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	line := make([]byte, 0, 8)
	for b := make([]byte, 1); ; {
		if _, err := io.ReadFull(out, b); err != nil {
			t.Fatalf("the location says nothing: %v", err)
		}
		if b[0] == '\n' {
			break
		}
		line = append(line, b[0])
	}
	pin, _ := PinOf(Seed{9})
	c, err := NewClient(ClientConfig{Addr: "127.0.0.1:" + string(line), Pin: pin, Certificate: certOf(t, Seed{1})})
	good(t, "client", err)
	t.Cleanup(func() { c.Close() })
	return cmd, c
}

// TestKilledUnderLoadKeepsEveryAcknowledgedChange kills a location at random moments, while shards of both kinds are put,
// appended and deleted, and looks afterwards for what was acknowledged and for what is half there.
func TestKilledUnderLoadKeepsEveryAcknowledgedChange(t *testing.T) {
	rounds := 10
	if os.Getenv("HOLDFAST_LONG") != "" {
		rounds = 1000
	}
	dir := t.TempDir()
	const workers = 6
	var next atomic.Uint64
	var sequence uint64        // of the newest append that was acknowledged; one worker appends
	live := map[Name]uint64{}  // acknowledged, by seed
	doubt := map[Name]uint64{} // asked for, and not answered
	dead := map[Name]bool{}    // deletes that were acknowledged
	unsure := map[Name]bool{}  // deletes that were not
	var mu sync.Mutex
	sizeOf := func(seed uint64) int {
		if seed%5 == 0 {
			return embedLimit + int(seed%200000)
		}
		return int(seed * 7919 % 6000)
	}
	head := func(seq, seed uint64) []byte {
		return binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, seq), seed)
	}
	for round := range rounds {
		cmd, c := startChild(t, dir)
		announced(t, c, Epoch(round+1))
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for w := range workers {
			wg.Go(func() {
				for ctx.Err() == nil {
					seed := next.Add(1)
					n, b := shardSeeded(seed, sizeOf(seed))
					mu.Lock()
					doubt[n] = seed
					seq := sequence + 1
					mu.Unlock()
					var err error
					if w == 0 {
						err = c.Append(ctx, n, b, uint64(round+1)<<32|seq, head(seq, seed))
					} else {
						err = c.Put(ctx, n, b, time.Time{})
					}
					if err != nil {
						return
					}
					mu.Lock()
					delete(doubt, n)
					live[n] = seed
					if w == 0 {
						sequence = seq
					}
					var victim Name
					if w == 1 && seed%2 == 0 {
						for victim = range live {
							break
						}
						delete(live, victim)
						unsure[victim] = true
					}
					mu.Unlock()
					if victim == (Name{}) {
						continue
					}
					if c.Delete(ctx, victim) != nil {
						return
					}
					mu.Lock()
					delete(unsure, victim)
					dead[victim] = true
					mu.Unlock()
				}
			})
		}
		// However slow the machine is, it is under load by then.
		for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
			mu.Lock()
			loaded := len(live) >= 12*(round+1) && sequence > 0 && (len(dead) > 0 || round < rounds/2)
			mu.Unlock()
			if loaded {
				break
			}
		}
		time.Sleep(time.Duration(20+mrand.IntN(150)) * time.Millisecond)
		good(t, "kill", cmd.Process.Kill())
		cmd.Wait()
		cancel()
		wg.Wait()
		c.Close()

		d := open(t, Config{Path: filepath.Join(dir, "stores", "s")})
		a := d.As(everything)
		for n, seed := range live {
			_, b := shardSeeded(seed, sizeOf(seed))
			has(t, a, n, b)
		}
		for n := range dead {
			if i, err := a.Stat(t.Context(), n); err != nil || i.Deleted.IsZero() {
				t.Errorf("round %d: a delete is lost: %+v %v", round, i, err)
			}
		}
		known := len(live)
		for n, seed := range doubt {
			_, b := shardSeeded(seed, sizeOf(seed))
			p := make([]byte, len(b))
			switch err := a.Get(t.Context(), n, 0, p); {
			case err == nil && bytes.Equal(p, b):
				live[n] = seed
				known++
			case !errors.Is(err, ErrAbsent):
				t.Errorf("round %d: half a shard is there: %v", round, err)
			}
			delete(doubt, n)
		}
		h, err := a.Head(t.Context())
		good(t, "head", err)
		if sequence > 0 {
			if len(h.Bytes) != 16 || binary.BigEndian.Uint64(h.Bytes) < sequence {
				t.Errorf("round %d: head %x, acknowledged %d", round, h.Bytes, sequence)
			} else {
				seed := binary.BigEndian.Uint64(h.Bytes[8:])
				n, _ := shardSeeded(seed, sizeOf(seed))
				if _, err := a.Stat(t.Context(), n); err != nil {
					t.Errorf("round %d: the head is there without its shard: %v", round, err)
				}
				sequence = binary.BigEndian.Uint64(h.Bytes)
			}
		}
		if got := list(t, a, Live); len(got) < known || len(got) > known+len(unsure) {
			t.Errorf("round %d: %d shards, want %d to %d", round, len(got), known, known+len(unsure))
		}
		if s, err := d.Scrub(t.Context(), 1<<30); err != nil || s.Rotten > 0 {
			t.Errorf("round %d: scrub %+v %v", round, s, err)
		}
		good(t, "close", d.Close())
		if t.Failed() {
			t.FailNow()
		}
	}
	if len(live) < 10*rounds || len(dead) == 0 || sequence == 0 {
		t.Errorf("control: %d shards, %d deletes and %d appends are no load", len(live), len(dead), sequence)
	}
	t.Logf("%d rounds: %d shards, %d deletes, %d appends", rounds, len(live), len(dead), sequence)
}
