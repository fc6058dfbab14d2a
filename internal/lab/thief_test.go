package lab

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/hkdf"
	"crypto/sha256"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"holdfast/contract"
	"holdfast/internal/grid"
	"holdfast/node"
	"holdfast/store"

	"golang.org/x/crypto/xts"
)

// keyOpens plays the thief of a disk with its key file, which docs/threat-model.md says opens everything: the other half
// of what the search on the disk shows, and a reading of docs/formats/volume.md that shares no code with package volume.
func keyOpens(t *testing.T, l *Lab) {
	disk := filepath.Join(l.Dir, "data", "node-2")
	keys, err := node.LoadKeys(filepath.Join(disk, "node.key"))
	if err != nil {
		t.Fatal(err)
	}
	client, _, err := grid.Connect(l.Dir)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	view, err := node.ReadView(ctx, client, client.Grid(), keys.ID)
	if err != nil {
		t.Fatal(err)
	}
	blobs := store.NewDir(filepath.Join(disk, "blobs"), 1<<30)
	found := false
	for _, c := range view.Contracts {
		if c.Record.Name != "store" {
			continue
		}
		found = true
		opened, err := c.Envelope.Open(keys.Open)
		if err != nil {
			t.Fatal(err)
		}
		r, _, err := blobs.Open(ctx, c.Header.SealedBody)
		if err != nil {
			t.Fatal(err)
		}
		sealed, err := io.ReadAll(r)
		r.Close()
		if err != nil {
			t.Fatal(err)
		}
		body, err := contract.Open(c.Header, opened, sealed)
		if err != nil {
			t.Fatal(err)
		}
		seen := ""
		for _, s := range body.Services {
			seen += strings.Join(s.Environment, "\n")
			for _, f := range s.Files {
				seen += string(f.Data)
			}
		}
		if !strings.Contains(seen, envMarker) || !strings.Contains(seen, fileMarker) {
			t.Errorf("the body shows %q", seen)
		}
		if !bytes.Contains(openVolume(t, filepath.Join(disk, "volumes"), opened.Volumes["data"]), []byte(dataMarker)) {
			t.Error("the volume does not show what was written")
		}
		wrong := opened.Volumes["data"]
		wrong[0] ^= 1
		if bytes.Contains(openVolume(t, filepath.Join(disk, "volumes"), wrong), []byte(dataMarker)) {
			t.Error("control: another key opens the volume too")
		}
	}
	if !found {
		t.Error("the node does not see its contract")
	}
}

// openVolume decrypts the only volume in a directory.
func openVolume(t *testing.T, dir string, key [32]byte) []byte {
	t.Helper()
	images, err := filepath.Glob(filepath.Join(dir, "*.img"))
	if err != nil || len(images) != 1 {
		t.Fatalf("volumes: %v %v", images, err)
	}
	raw, err := os.ReadFile(images[0])
	if err != nil {
		t.Fatal(err)
	}
	id := sha256.Sum256([]byte(strings.TrimSuffix(filepath.Base(images[0]), ".img")))
	k, err := hkdf.Key(sha256.New, key[:], nil, "holdfast/volume/xts/v1"+string(id[:]), 64)
	if err != nil {
		t.Fatal(err)
	}
	c, err := xts.NewCipher(aes.NewCipher, k)
	if err != nil {
		t.Fatal(err)
	}
	const header, sector = 4096, 4096
	hole := make([]byte, sector)
	var out []byte
	for i := 0; header+(i+1)*sector <= len(raw); i++ {
		s := raw[header+i*sector:][:sector]
		if bytes.Equal(s, hole) {
			continue
		}
		plain := make([]byte, sector)
		c.Decrypt(plain, s, uint64(i))
		out = append(out, plain...)
	}
	return out
}
