package s3_test

import (
	"fmt"
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
				races := s.races
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
				for round, until := 0, time.Now().Add(3*time.Second); round < 5 || time.Now().Before(until); round++ {
					h := linear.Run(t.Context(), o, fmt.Sprintf("round %d/", round), linear.Config{Seed: uint64(round), Sizes: []int{100, 5000, 70000, 300000}})
					done, refused, unknown = done+h.Done, refused+h.Refused, unknown+h.Unknown
					err := h.Check(30 * time.Second)
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
