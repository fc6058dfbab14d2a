package machine

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"holdfast/volume"

	"golang.org/x/sys/unix"
)

// kind is what is on a disk.
type kind int

const (
	foreign kind = iota // somebody's: never touched
	blank               // nothing
	begun               // a file system of ours that is not whole yet
	ours
)

// edge is how much of each end of a disk must be zero for it to be empty: partition tables, file systems, RAID and LVM all
// leave something there.
const edge = 1 << 20

// mark is on a disk while it is given its file system, which overwrites it at the end: half of one is not anybody's data.
const mark = "holdfast: this disk is being formatted\n"

// Offsets in an ext4 superblock (the kernel's Documentation/filesystems/ext4/super.rst), which is at 1024.
const (
	superblock  = 1024
	sbBlocks    = 0x04 // low 32 bits
	sbLogBlock  = 0x18
	sbMagic     = 0x38
	sbLabel     = 0x78
	sbBlocksHi  = 0x150
	ext4Magic   = 0xEF53
	ext4Label   = "holdfast"
	ext4Resize  = 0x40086610 // EXT4_IOC_RESIZE_FS: _IOW('f', 16, __u64), the new size in blocks
	smallest    = 64 << 20
	blockSize   = 4096
	waitForDisk = 10 * time.Second
)

// classify says what is on a disk from its first and last bytes, edge of each.
func classify(head, tail []byte) kind {
	if len(head) < edge || len(tail) < edge {
		return foreign
	}
	if bytes.HasPrefix(head, []byte(mark)) {
		return begun
	}
	sb := head[superblock:]
	if binary.LittleEndian.Uint16(sb[sbMagic:]) == ext4Magic {
		if label, _, _ := bytes.Cut(sb[sbLabel:sbLabel+16], []byte{0}); string(label) == ext4Label && binary.LittleEndian.Uint32(sb[sbLogBlock:]) == 2 {
			return ours
		}
		return foreign
	}
	if zero(head) && zero(tail) {
		return blank
	}
	return foreign
}

func zero(b []byte) bool { return len(bytes.Trim(b, "\x00")) == 0 }

// blocksOf is how many blocks the file system of a disk of ours has.
func blocksOf(head []byte) uint64 {
	sb := head[superblock:]
	return uint64(binary.LittleEndian.Uint32(sb[sbBlocks:])) | uint64(binary.LittleEndian.Uint32(sb[sbBlocksHi:]))<<32
}

// disk is a whole disk of the machine.
type disk struct {
	path string
	size int64
	kind kind
	head []byte
}

// choose picks the disk of a node. Two of ours are an error: neither may be taken for the other.
func choose(disks []disk) (disk, error) {
	var found []string
	for _, want := range []kind{ours, begun, blank} {
		of := slices.DeleteFunc(slices.Clone(disks), func(d disk) bool { return d.kind != want || d.size < smallest })
		if want == ours && len(of) > 1 {
			return disk{}, fmt.Errorf("%s and %s both are a node's: leave one of them", of[0].path, of[1].path)
		}
		if len(of) > 0 {
			return of[0], nil
		}
	}
	for _, d := range disks {
		found = append(found, fmt.Sprintf("%s (%d MiB, in use or too small)", d.path, d.size>>20))
	}
	if len(found) == 0 {
		return disk{}, errNoDisk
	}
	return disk{}, fmt.Errorf("none that is the node's or empty, only %s: a disk is empty when its first and last MiB are zero", strings.Join(found, ", "))
}

var errNoDisk = errors.New("there is none")

// takeDisk mounts the node's disk, which becomes one if it is empty, and returns its path.
func takeDisk(log *slog.Logger) (string, error) {
	var d disk
	for end := time.Now().Add(waitForDisk); ; time.Sleep(100 * time.Millisecond) {
		all, err := disks("/sys/block", "/dev")
		if err != nil {
			return "", err
		}
		if d, err = choose(all); err == nil {
			break
		} else if !errors.Is(err, errNoDisk) || time.Now().After(end) {
			return "", err
		}
	}
	if d.kind != ours {
		log.Info("formatting", "device", d.path, "mib", d.size>>20)
		if err := format(d.path, d.size); err != nil {
			return "", fmt.Errorf("format %s: %w", d.path, err)
		}
	}
	if err := mountDisk(d.path, data); err != nil {
		return "", fmt.Errorf("mount %s: %w", d.path, err)
	}
	if err := grow(d.path, d.size); err != nil {
		return "", fmt.Errorf("grow %s: %w", d.path, err)
	}
	return d.path, os.Chmod(data, 0o700)
}

// mountDisk mounts a disk whose content may be anybody's: it was out of the machine's hands while that was off. A link leads to
// what its maker cannot reach himself, so none is followed.
func mountDisk(dev, dir string) error {
	return unix.Mount(dev, dir, "ext4", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC|unix.MS_NOSYMFOLLOW|unix.MS_NOATIME, "errors=remount-ro")
}

// disks are the whole disks of the machine by name, without those that a hand can pull out.
func disks(sys, dev string) ([]disk, error) {
	names, err := os.ReadDir(sys)
	if err != nil {
		return nil, err
	}
	var out []disk
	for _, e := range names {
		if n := e.Name(); !slices.ContainsFunc([]string{"vd", "sd", "nvme", "xvd", "mmcblk"}, func(p string) bool { return strings.HasPrefix(n, p) }) {
			continue
		}
		if b, err := os.ReadFile(filepath.Join(sys, e.Name(), "removable")); err != nil || strings.TrimSpace(string(b)) != "0" {
			continue
		}
		d, err := look(filepath.Join(dev, e.Name()))
		if err != nil {
			return nil, err
		}
		out = append(out, d)
	}
	return out, nil
}

func look(path string) (disk, error) {
	f, err := os.Open(path)
	if err != nil {
		return disk{}, err
	}
	defer f.Close()
	d := disk{path: path}
	if d.size, err = f.Seek(0, io.SeekEnd); err != nil || d.size < 2*edge {
		return d, err
	}
	tail := make([]byte, edge)
	d.head = make([]byte, edge)
	_, err = f.ReadAt(d.head, 0)
	if err == nil {
		_, err = f.ReadAt(tail, d.size-edge)
	}
	d.kind = classify(d.head, tail)
	return d, err
}

// format gives an empty disk its file system. Until that is whole the disk is marked as begun, and so is begun again after a
// power cut.
func format(path string, size int64) error {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_EXCL, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.WriteAt(append([]byte(mark), make([]byte, blockSize-len(mark))...), 0); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := volume.Format(f, size); err != nil {
		return err
	}
	return f.Sync()
}

// grow makes the mounted file system as large as its disk.
func grow(path string, size int64) error {
	d, err := look(path)
	if err != nil {
		return err
	}
	blocks := uint64(size / blockSize)
	if blocksOf(d.head) >= blocks {
		return nil
	}
	dir, err := os.Open(data)
	if err != nil {
		return err
	}
	defer dir.Close()
	return ioctl(dir, ext4Resize, &blocks)
}
