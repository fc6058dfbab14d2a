package image

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
)

// Report is what Look found in an image.
type Report struct {
	Manifest *Manifest `json:"manifest,omitempty"` // of a directory
	*Contents
	Problems []string `json:"problems"`
}

// Look audits the image in a directory, or a file that is an initramfs. In a directory it also compares kernel and
// initramfs with the manifest, which nobody signed: it finds what was interrupted or damaged, not what was forged.
func Look(name string) (*Report, error) {
	st, err := os.Stat(name)
	if err != nil {
		return nil, err
	}
	r := &Report{Problems: []string{}}
	initramfs := name
	if st.IsDir() {
		if r.Manifest, err = readManifest(filepath.Join(name, FileManifest)); err != nil {
			return nil, err
		}
		kernel, err := digestFile(filepath.Join(name, FileKernel))
		if err != nil {
			return nil, err
		}
		if kernel != r.Manifest.Kernel.fixed() {
			r.Problems = append(r.Problems, FileKernel+": it is not that of the manifest")
		}
		initramfs = filepath.Join(name, FileInitramfs)
	}
	c, as, err := auditFile(initramfs)
	if err != nil {
		return nil, err
	}
	r.Contents = c
	if m := r.Manifest; m != nil && (as != m.Initramfs.fixed() || !slices.Equal(c.Entries, m.Files)) {
		r.Problems = append(r.Problems, FileInitramfs+": it is not that of the manifest")
	}
	r.Problems = append(r.Problems, c.Problems()...)
	return r, nil
}

// fixed is what can be seen of a file without reading its manifest.
func (f File) fixed() File { return File{Size: f.Size, SHA256: f.SHA256} }

func readManifest(name string) (*Manifest, error) {
	const limit = 16 << 20
	b, err := readSome(name, limit)
	if err != nil {
		return nil, err
	}
	m := &Manifest{}
	if len(b) > limit {
		err = errors.New("it is too long")
	} else {
		err = json.Unmarshal(b, m)
	}
	if err == nil && m.Version != 1 {
		err = fmt.Errorf("version %d is not known", m.Version)
	}
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	return m, nil
}

func digestFile(name string) (File, error) {
	f, err := os.Open(name)
	if err != nil {
		return File{}, err
	}
	defer f.Close()
	sha := sha256.New()
	n, err := io.Copy(sha, f)
	return File{Size: n, SHA256: sum(sha)}, err
}

// auditFile is Audit, with the digest of the bytes that it saw.
func auditFile(name string) (*Contents, File, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, File{}, err
	}
	defer f.Close()
	sha := sha256.New()
	n := &counter{r: io.TeeReader(f, sha)}
	c, err := Audit(n)
	return c, File{Size: n.n, SHA256: sum(sha)}, err
}

type counter struct {
	r io.Reader
	n int64
}

func (c *counter) Read(b []byte) (int, error) {
	n, err := c.r.Read(b)
	c.n += int64(n)
	return n, err
}
