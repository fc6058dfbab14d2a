package testimage

import (
	"os"
	"testing"
)

// TestWriteLayout also serves a person who wants the image: HOLDFAST_TESTIMAGE names where to write it.
func TestWriteLayout(t *testing.T) {
	dir := os.Getenv("HOLDFAST_TESTIMAGE")
	if dir == "" {
		dir = t.TempDir()
	}
	img, err := Server(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if err := img.WriteLayout(dir); err != nil {
		t.Fatal(err)
	}
}
