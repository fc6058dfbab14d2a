// Command gen makes the ext4 templates that package volume embeds: a freshly made file system of each size, as the list
// of its blocks that are not zero. It runs mkfs.ext4 with everything fixed that it would otherwise choose, so that the
// same version gives the same bytes. Run it with "go generate ./volume".
package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"log"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/klauspost/compress/zstd"
)

func main() {
	for _, mib := range []int{64, 256, 1 << 10, 4 << 10, 16 << 10, 64 << 10} {
		if err := template(mib); err != nil {
			log.Fatalf("template of %d MiB: %v", mib, err)
		}
	}
}

func template(mib int) error {
	img := filepath.Join(os.TempDir(), fmt.Sprintf("holdfast-template-%d-%d", mib, os.Getpid()))
	defer os.Remove(img)
	f, err := os.Create(img)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(int64(mib) << 20); err != nil {
		return err
	}
	cmd := exec.Command("mkfs.ext4", "-q", "-F", "-b", "4096", "-m", "0", "-U", "686f6c64-6661-7374-0000-000000000001", "-L", "holdfast",
		"-O", "^resize_inode,^metadata_csum_seed,^orphan_file", "-E", "hash_seed=686f6c64-6661-7374-0000-000000000002,lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0", img)
	cmd.Env = append(os.Environ(), "E2FSPROGS_FAKE_TIME=1700000000")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	var packed bytes.Buffer
	z, err := zstd.NewWriter(&packed, zstd.WithEncoderLevel(zstd.SpeedBestCompression), zstd.WithEncoderConcurrency(1))
	if err != nil {
		return err
	}
	block := make([]byte, 4096)
	zero := make([]byte, 4096)
	for i := uint32(0); ; i++ {
		if _, err := io.ReadFull(f, block); err == io.EOF {
			break
		} else if err != nil {
			return err
		}
		if !bytes.Equal(block, zero) {
			z.Write(binary.LittleEndian.AppendUint32(nil, i))
			z.Write(block)
		}
	}
	if err := z.Close(); err != nil {
		return err
	}
	out := filepath.Join("templates", fmt.Sprintf("ext4-%d.zst", mib))
	fmt.Println(out, packed.Len(), "bytes")
	return os.WriteFile(out, packed.Bytes(), 0o644)
}
