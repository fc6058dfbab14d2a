package s3_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"testing"
	"time"

	"holdfast/internal/linear"
)

// TestLinear lets many clients put, get, delete, list and put on condition the same few objects, with and without versions,
// small and large, and looks for an order that explains what they heard. The folder is the negative control: there is none
// (it gives the bytes of one object with the tag of the next); internal/linear has the positive one.
func TestLinear(t *testing.T) {
	if testing.Short() {
		t.Skip("it needs what make s3tools builds")
	}
	for _, s := range servers {
		for _, versions := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/versions %v", s.name, versions), func(t *testing.T) {
				races, pictures := s.races, pictures(t, s.races)
				s := s.start(t)
				o := linear.NewS3(s.url, s.access, s.secret, "linear")
				if err := o.CreateBucket(t.Context()); err != nil {
					t.Fatal(err)
				}
				if versions {
					if err := o.Version(t.Context()); err != nil {
						t.Fatal(err)
					}
				}
				var done, refused, unknown int
				least := 3 * time.Second
				if races {
					least = time.Minute // some machines show one late
				}
				for round, until := 0, time.Now().Add(least); round < 5 || time.Now().Before(until); round++ {
					h := linear.Run(t.Context(), o, fmt.Sprintf("round %d/", round), linear.Config{Seed: uint64(round), Sizes: []int{100, 5000, 70000, 300000}})
					done, refused, unknown = done+h.Done, refused+h.Refused, unknown+h.Unknown
					err := h.Check(pictures, 30*time.Second)
					if err != nil && races {
						t.Logf("round %d, as it should: %v", round, err)
						return
					}
					if err != nil {
						t.Fatalf("round %d: %v (%d outcomes unknown, the last: %v)", round, err, h.Unknown, h.Last)
					}
				}
				t.Logf("%d operations done, %d refused by their condition, %d unknown", done, refused, unknown)
				if races {
					t.Error("control: the folder's races are not seen")
				}
			})
		}
	}
}

// TestLinearUnderKills kills the server with SIGKILL at a random point of each round, and starts it again while the
// clients go on. What was acknowledged must be there, and nothing by halves.
func TestLinearUnderKills(t *testing.T) {
	if testing.Short() {
		t.Skip("it needs what make s3tools builds")
	}
	rounds := 10
	if os.Getenv("HOLDFAST_LONG") != "" {
		rounds = 1000
	}
	for _, s := range servers {
		t.Run(s.name, func(t *testing.T) {
			if s.forgets {
				t.Skip("it keeps nothing")
			}
			races, pictures := s.races, pictures(t, s.races)
			s := s.start(t)
			o := linear.NewS3(s.url, s.access, s.secret, "linear")
			if err := o.CreateBucket(t.Context()); err != nil {
				t.Fatal(err)
			}
			var done, open, nothing int
			rounds := rounds
			if races {
				rounds = max(rounds, 100) // some machines show one late
			}
			for round := range rounds {
				var h *linear.History
				ran := make(chan bool)
				go func() {
					defer close(ran)
					h = linear.Run(t.Context(), o, fmt.Sprintf("round %d/", round), linear.Config{Seed: uint64(round), Ops: 60, Sizes: []int{100, 5000, 70000, 300000}})
				}()
				time.Sleep(time.Duration(rand.IntN(300)) * time.Millisecond)
				s.kill()
				s.process.start()
				<-ran
				done, open, nothing = done+h.Done, open+h.Unknown, nothing+h.Nothing
				if err := h.Check(pictures, 30*time.Second); err != nil {
					if races {
						t.Logf("round %d, as it should: %v", round, err)
						return
					}
					t.Fatalf("round %d: %v (%d outcomes unknown, the last: %v)", round, err, h.Unknown, h.Last)
				}
			}
			t.Logf("%d operations done, %d outcomes unknown, %d found nobody", done, open, nothing)
			if open == 0 || nothing == 0 {
				t.Error("control: no client was hit by a kill")
			}
			if races {
				t.Error("control: the folder's races are not seen")
			}
		})
	}
}

// pictures is where pictures of wrong histories go: those that are expected do not stay.
func pictures(t *testing.T, expected bool) string {
	if expected {
		return t.TempDir()
	}
	return ""
}
