package volume_test

import (
	"testing"

	"holdfast/volume"
	"holdfast/volume/placetest"
)

// TestShelf: the place of the other tests is one.
func TestShelf(t *testing.T) {
	placetest.Run(t, func(*testing.T) volume.Place { return volume.NewShelf() })
}
