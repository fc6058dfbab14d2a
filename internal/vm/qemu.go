// Package vm runs a machine of its own on this one: QEMU emulates it, boots the image of a node, and is plugged into the
// little internet of a grid that "holdfast up" made, and into nothing else. On that cable package vm does what a farm's
// router does: DHCP and router advertisements. It is a lab's; no machine of a real grid runs in it.
package vm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"holdfast/internal/box"

	"golang.org/x/sync/errgroup"
)

// Spec is a machine.
type Spec struct {
	QEMU        string // path of qemu-system-x86_64
	Kernel      string
	Initramfs   string
	CommandLine string
	Disk        string // a raw image, made when it is not there
	DiskSize    int64  // in bytes, of a disk that is made
	Memory      int64  // in bytes
	CPUs        int
	Uplink      box.Uplink
	Console     io.Writer // what the machine writes to its serial line; nothing can be said to it
}

// Run boots a machine and returns when it ends, or pulls its plug when ctx ends.
func Run(ctx context.Context, s Spec, top *box.Topology) error {
	if err := makeDisk(s.Disk, s.DiskSize); err != nil {
		return fmt.Errorf("disk of the machine: %w", err)
	}
	tap, err := top.Tap(s.Uplink)
	if err != nil {
		return err
	}
	defer tap.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var g errgroup.Group
	router, err := newRouter(top, s.Uplink)
	if err != nil {
		return err
	}
	g.Go(func() error { return router.run(ctx) })
	g.Go(func() error {
		defer cancel()
		return emulate(ctx, s, top, tap)
	})
	return g.Wait()
}

// makeDisk makes an empty disk of holes.
func makeDisk(path string, size int64) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return nil
	} else if err != nil {
		return err
	}
	return errors.Join(f.Truncate(size), f.Close())
}

// emulate is QEMU's life. The machine is emulated, not virtualised (TCG): that works on every machine, and the test grid has
// no need for speed.
func emulate(ctx context.Context, s Spec, top *box.Topology, tap *os.File) error {
	// The kernel's "parent died" goes by the thread that forked: it must live as long as this.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd := exec.CommandContext(ctx, s.QEMU, s.args(top)...)
	cmd.Env = []string{"PATH=/bin"}
	cmd.Dir = "/"
	cmd.ExtraFiles = []*os.File{tap}
	cmd.Stdout, cmd.Stderr = s.Console, s.Console
	cmd.WaitDelay = 5 * time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL}
	err := cmd.Run()
	if ctx.Err() != nil {
		return nil // its plug was pulled
	}
	if err != nil {
		return fmt.Errorf("qemu: %w", err)
	}
	return nil
}

func (s Spec) args(top *box.Topology) []string {
	return []string{
		"-nodefaults", "-no-user-config", "-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max",
		"-smp", strconv.Itoa(s.CPUs), "-m", strconv.FormatInt(s.Memory>>20, 10),
		"-kernel", s.Kernel, "-initrd", s.Initramfs, "-append", s.CommandLine,
		"-drive", "if=none,id=data,format=raw,discard=unmap,file=" + strings.ReplaceAll(s.Disk, ",", ",,"), "-device", "virtio-blk-pci,drive=data",
		"-netdev", "tap,id=net,fd=3", "-device", "virtio-net-pci,netdev=net,romfile=,mac=" + top.MAC(s.Uplink).String(),
		"-device", "virtio-rng-pci",
		"-display", "none", "-monitor", "none", "-serial", "stdio",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
	}
}
