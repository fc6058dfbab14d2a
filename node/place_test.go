package node

import (
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"holdfast/disperse"
	"holdfast/store"
	"holdfast/store/location"
	"holdfast/volume"
	"holdfast/volume/placetest"
)

// dispersed is a store over six directories of one farm each, as a volume's is over six locations.
func dispersed(t *testing.T) *store.Store {
	t.Helper()
	var members []store.Member
	for i := range ContractScheme().N {
		d, err := location.Open(location.Config{Path: filepath.Join(t.TempDir(), "location"), Trusted: true, Scrub: -1})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { d.Close() })
		members = append(members, store.Member{ID: disperse.Place{byte(i + 1)}, Farm: fmt.Sprintf("farm-%d", i+1), Location: d.As(location.Read | location.Write | location.Delete)})
	}
	keys, err := store.NewRoot().Keys(0)
	if err != nil {
		t.Fatal(err)
	}
	s, err := store.Open(t.Context(), store.Config{Dir: t.TempDir(), Keys: keys, Members: members, Scheme: ContractScheme(), Timeout: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func TestAStoreIsAPlace(t *testing.T) {
	placetest.Run(t, func(t *testing.T) volume.Place { return &shelf{store: dispersed(t)} })
}
