package lab

import (
	"archive/tar"
	"crypto/rand"
	"crypto/tls"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"holdfast/api"
	"holdfast/deploy"
	"holdfast/identity"
	"holdfast/internal/box"
	"holdfast/internal/grid"
	"holdfast/internal/testimage"
	"holdfast/node"
	"holdfast/store"
)

// files are all regular files under a directory.
func files(dir string) (out []string) {
	filepath.WalkDir(dir, func(p string, d os.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			out = append(out, p)
		}
		return nil
	})
	return out
}

func (l *Lab) inStore() bool {
	s, err := l.Status()
	return err == nil && s.Blobs.Scheme == "4/6" && s.Blobs.Farms == 6 && s.Blobs.Waiting == 0
}

func (l *Lab) client() *api.Client {
	l.T.Helper()
	c, _, err := grid.Connect(l.Dir)
	if err != nil {
		l.T.Fatal(err)
	}
	l.T.Cleanup(c.Close)
	return c
}

// location is where the location of a machine listens, in the system network.
func (l *Lab) location(name string) netip.AddrPort {
	l.T.Helper()
	c := l.client()
	nodes, err := c.Nodes(l.T.Context())
	if err != nil {
		l.T.Fatal(err)
	}
	for _, p := range node.Places(c.Grid(), nodes) {
		if p.Node == name {
			return p.Addr
		}
	}
	l.T.Fatalf("%s is no location", name)
	return netip.AddrPort{}
}

// dispersed looks for the sealed bytes that a node keeps of an image: on no location, and not where the validator is.
func dispersed(t *testing.T, l *Lab) {
	l.Until("the blobs in the store", l.inStore)
	if left := files(filepath.Join(l.Dir, "data", "validator", "blobs")); len(left) > 0 {
		t.Errorf("the validator's directory keeps %v", left)
	}
	var biggest string
	var size int64
	for _, p := range files(filepath.Join(l.Dir, "data", "node-1", "blobs")) {
		if st, err := os.Stat(p); err == nil && st.Size() > size {
			biggest, size = p, st.Size()
		}
	}
	b, err := os.ReadFile(biggest)
	if err != nil || len(b) < 1<<16 {
		t.Fatalf("node-1 keeps no layer: %v", err)
	}
	marker := string(b[len(b)/2:][:32])
	if found, _ := Search(filepath.Dir(biggest), marker); len(found) == 0 {
		t.Error("control: the marker is not found where it is")
	}
	for n := 1; n <= 3; n++ {
		for _, dir := range []string{fmt.Sprintf("location-%d", n), fmt.Sprintf("node-%d/location", n)} {
			kept := int64(0)
			for _, p := range files(filepath.Join(l.Dir, "data", dir)) {
				if st, err := os.Stat(p); err == nil {
					kept += st.Size()
				}
			}
			if kept < size/4 {
				t.Errorf("%s keeps %d bytes, a layer has %d", dir, kept, size)
			}
			if found, err := Search(filepath.Join(l.Dir, "data", dir), marker); err != nil || len(found) > 0 {
				t.Errorf("a location shows the sealed layer: %v %v", found, err)
			}
		}
	}
	if found, err := Search(filepath.Join(l.Dir, "data", "validator"), marker); err != nil || len(found) > 0 {
		t.Errorf("the validator's disk shows the sealed layer: %v %v", found, err)
	}
	// A member of the system network whose key the location was not told: it may not even ask.
	at := l.location("location-1")
	err = box.Within(l.Box("node-1").NetNS(), func() error {
		c, err := net.DialTimeout("tcp", at.String(), 5*time.Second)
		if err != nil {
			return fmt.Errorf("control: a member does not reach it: %w", err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(5 * time.Second))
		s := tls.Client(c, &tls.Config{InsecureSkipVerify: true})
		if err := s.Handshake(); err == nil {
			if n, err := s.Read(make([]byte, 1)); err == nil || n > 0 {
				t.Error("a location serves who shows no key")
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	// Who is no member does not reach it.
	err = box.Within(l.Box("outside").NetNS(), func() error {
		c, err := net.DialTimeout("tcp", at.String(), time.Second)
		if err == nil {
			c.Close()
			t.Error("a stranger reaches a location")
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// image makes one that the grid has not seen.
func (l *Lab) image(name string) {
	l.T.Helper()
	extra := make([]byte, 1<<20)
	rand.Read(extra)
	img, err := testimage.Server(l.T.TempDir(), testimage.Layer(testimage.Entry{Header: tar.Header{Name: "extra"}, Data: extra}))
	if err != nil {
		l.T.Fatal(err)
	}
	if err := img.WriteLayout(filepath.Join(l.App, name)); err != nil {
		l.T.Fatal(err)
	}
}

// blobsOutlive loses a farm, and then the directory in which the validator knows where blobs are.
func blobsOutlive(t *testing.T, l *Lab) {
	l.Run("lab", "cut", "location-2")
	l.Run("lab", "kill", "validator")
	if err := os.RemoveAll(filepath.Join(l.Dir, "data", "validator", "store")); err != nil {
		t.Fatal(err)
	}
	l.Run("lab", "resume", "validator")
	l.Until("the store, restored from its locations", l.inStore)
	if log := l.nodeLogs("validator"); !strings.Contains(log, "restored=true") {
		t.Errorf("the validator's log: %s", log)
	}
	// A layer that no node has, from five locations.
	l.image("img3")
	l.Deploy("late", strings.ReplaceAll(strings.ReplaceAll(stateless, "free", "late"), "oci:img", "oci:img3"))
	if left := files(filepath.Join(l.Dir, "data", "validator", "blobs")); len(left) > 0 {
		t.Errorf("the validator's directory keeps %v", left)
	}
	// And what was there before.
	for _, p := range files(filepath.Join(l.Dir, "data", "node-1", "blobs")) {
		raw, err := hex.DecodeString(filepath.Base(p))
		if err != nil || len(raw) != len(store.Digest{}) {
			continue
		}
		d := store.Digest(raw)
		r, _, err := l.client().OpenBlob(t.Context(), d)
		if err != nil {
			t.Fatal(err)
		}
		_, err = io.Copy(io.Discard, store.Verify(r, d))
		r.Close()
		if err != nil {
			t.Errorf("%s: %v", p, err)
		}
	}
	l.Run("lab", "resume", "location-2")
	l.Run("contract", "cancel", "late", "--yes")
}

// layers are the sealed layers of a contract, as its owner knows them.
func (l *Lab) layers(name string) (out []store.Digest) {
	l.T.Helper()
	keys, err := identity.ReadKeyFile(filepath.Join(l.Dir, "user.key"), "")
	if err != nil {
		l.T.Fatal(err)
	}
	client, cfg, err := grid.Connect(l.Dir)
	if err != nil {
		l.T.Fatal(err)
	}
	defer client.Close()
	owner := deploy.User{Client: client, Account: cfg.Account, Keys: keys}
	c, err := owner.Find(l.T.Context(), name)
	if err != nil {
		l.T.Fatal(err)
	}
	current, err := owner.Open(l.T.Context(), c, c.Current)
	if err != nil {
		l.T.Fatal(err)
	}
	for _, s := range current.Body.Services {
		for _, x := range s.Image.Blobs {
			if x.Size > 1<<16 { // neither manifest nor config
				out = append(out, x.Sealed)
			}
		}
	}
	return out
}
