package machine

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Modules are those that a node needs of Debian's cloud kernel, by name. What they depend on is found when an image is
// built; nothing else can be loaded, since there is no modprobe that the kernel could call.
func Modules() []string {
	return []string{
		"virtio_pci", "virtio_net", "virtio_blk", "virtio_rng", // the machine
		"overlay", "fuse", "loop", // roots of workloads, their volumes
		"tun", "veth", // networks
		"nf_tables", "nft_ct", "nft_limit", "nft_connlimit", "nft_masq", "nft_chain_nat", // what may pass
	}
}

// maxModules bounds the list of an image, and of each line of it the length.
const maxModules = 256

// loadModules loads the modules that dir/order lists, one a line, in that order. One that this kernel has already is not an
// error.
func loadModules(dir string) error {
	f, err := os.Open(filepath.Join(dir, "order"))
	if err != nil {
		return fmt.Errorf("list of modules: %w", err)
	}
	defer f.Close()
	n := 0
	for sc := bufio.NewScanner(io.LimitReader(f, maxModules*64)); sc.Scan(); n++ {
		name := strings.TrimSpace(sc.Text())
		if name == "" || strings.ContainsAny(name, "/.") {
			return fmt.Errorf("list of modules: line %d is not a name", n+1)
		}
		if err := loadModule(filepath.Join(dir, name+".ko")); err != nil {
			return fmt.Errorf("module %s: %w", name, err)
		}
	}
	if n == 0 {
		return errors.New("list of modules: it is empty")
	}
	return nil
}

func loadModule(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	return nil
}
