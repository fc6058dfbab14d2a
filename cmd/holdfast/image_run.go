package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"holdfast/api"
	"holdfast/identity"
	"holdfast/internal/box"
	"holdfast/internal/grid"
	"holdfast/internal/vm"
	"holdfast/ledger"
	"holdfast/machine"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"
)

// vmFlags are the flags of image run.
type vmFlags struct {
	qemu, disk, size, memory, farm, name string
	cpus                                 int
}

func (a *app) imageRunCmd() *cobra.Command {
	var f vmFlags
	cmd := &cobra.Command{
		Use: "run DIR", Short: "Boot an image in an emulated machine on this grid", Args: asUsed,
		Long: "Boots what image build made in QEMU, as a machine on one of the farms of the grid that up runs here, and prints what\nit writes to its serial console until it is interrupted, which pulls its plug. It is emulated, so that it boots anywhere,\nten times slower than a machine. Its network is the grid's little internet and nothing else. When it waits to be admitted,\nits console says its ID: holdfast node approve ID admits it.",
		Example: "  holdfast image build --out image\n  holdfast image run image --qemu --disk vm-1.img\n  holdfast node list --pending                     # in another terminal\n" +
			"  holdfast node approve ID",
		RunE: func(cmd *cobra.Command, args []string) error { return a.imageRun(cmd, args[0], f) },
	}
	fl := cmd.Flags()
	fl.StringVar(&f.qemu, "qemu", "", "run it in QEMU; a `path` after = says which (default qemu-system-x86_64)")
	fl.Lookup("qemu").NoOptDefVal = "qemu-system-x86_64"
	fl.StringVar(&f.disk, "disk", "", "`file` that is the machine's disk, made when it is not there (default NAME.img)")
	fl.StringVar(&f.size, "size", "4GiB", "`bytes` of a disk that is made")
	fl.StringVar(&f.memory, "memory", "2GiB", "`bytes` of memory")
	fl.IntVar(&f.cpus, "cpus", 2, "`number` of processors")
	fl.StringVar(&f.farm, "farm", "farm-1", "`name` of the farm that it stands on")
	fl.StringVar(&f.name, "name", "vm-1", "`name` of the node, for people")
	return cmd
}

func (a *app) imageRun(cmd *cobra.Command, dir string, f vmFlags) error {
	if os.Geteuid() != 0 {
		return errors.New("image run makes a network interface: run it as root")
	}
	if f.qemu == "" {
		f.qemu = "qemu-system-x86_64"
	} else if strings.Contains(f.qemu, "/") {
		abs, err := filepath.Abs(f.qemu)
		if err != nil {
			return err
		}
		f.qemu = abs
	}
	s := vm.Spec{Kernel: filepath.Join(dir, "kernel"), Initramfs: filepath.Join(dir, "initramfs"), CPUs: f.cpus, Console: cmd.OutOrStdout()}
	for _, p := range []string{s.Kernel, s.Initramfs} {
		if _, err := os.Stat(p); err != nil {
			return fmt.Errorf("%s is no image: %w (holdfast image build --out %s makes one)", dir, err, dir)
		}
	}
	var err error
	if s.QEMU, err = exec.LookPath(f.qemu); err != nil {
		return fmt.Errorf("QEMU: %w (Debian's package is qemu-system-x86)", err)
	}
	if s.DiskSize, err = units.RAMInBytes(f.size); err != nil {
		return wrong(cmd, fmt.Errorf("--size: %w", err))
	}
	if s.Memory, err = units.RAMInBytes(f.memory); err != nil {
		return wrong(cmd, fmt.Errorf("--memory: %w", err))
	}
	if f.disk == "" {
		f.disk = f.name + ".img"
	}
	for _, p := range []*string{&s.Kernel, &s.Initramfs, &f.disk} { // QEMU is started in /
		if *p, err = filepath.Abs(*p); err != nil {
			return err
		}
	}
	s.Disk = f.disk
	running, err := box.Running(a.dir)
	if err != nil || running["internet"].PID == 0 {
		return fmt.Errorf("the grid in %s is not up: %s starts it", a.dir, a.self("up --detach"))
	}
	top := &box.Topology{Router: running["internet"]}
	o, segment, err := a.order(cmd.Context(), f)
	if err != nil {
		return err
	}
	words, err := o.Arguments()
	if err != nil {
		return err
	}
	s.CommandLine = machine.CommandLine() + " " + words
	if s.Uplink, err = top.Free(segment); err != nil {
		return err
	}
	return vm.Run(cmd.Context(), s, top)
}

// order is what a machine on a farm of this grid is told, with the segment that the farm is.
func (a *app) order(ctx context.Context, f vmFlags) (machine.Order, int, error) {
	c, _, err := a.connect()
	if err != nil {
		return machine.Order{}, 0, err
	}
	defer c.Close()
	farms, err := api.List[identity.FarmID, ledger.Farm](ctx, c, ledger.FarmsKey, ledger.FarmKey)
	if err != nil {
		return machine.Order{}, 0, err
	}
	var known []string
	for _, x := range farms {
		if x.Name == f.farm {
			segment, err := grid.Segment(x.Name)
			if err != nil {
				return machine.Order{}, 0, err
			}
			var from []string
			for _, v := range c.Genesis().Validators {
				from = append(from, v.Address)
			}
			return machine.Order{Grid: c.Grid().String(), From: strings.Join(from, ","), Farm: x.ID.String(), Name: f.name}, segment, nil
		}
		known = append(known, x.Name)
	}
	return machine.Order{}, 0, fmt.Errorf("there is no farm %q: there are %s", f.farm, strings.Join(known, ", "))
}
