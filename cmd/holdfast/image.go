package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"holdfast/machine"
	"holdfast/machine/image"

	"github.com/spf13/cobra"
)

func (a *app) imageCmd() *cobra.Command {
	cmd := group(&cobra.Command{Use: "image", Short: "Build, look into and boot what a node boots; sign the images of containers"})
	cmd.AddCommand(a.imageBuildCmd(), a.imageShowCmd(), a.imageRunCmd(), a.imageSignCmd(), a.imageRevokeCmd(), a.imageSignaturesCmd())
	return cmd
}

func (a *app) imageBuildCmd() *cobra.Command {
	var c image.Config
	var runsc string
	cmd := &cobra.Command{
		Use: "build", Short: "Build the image that a node boots: kernel, initramfs, manifest", Args: asUsed,
		Long:    "Build the image that a node boots. The kernel is the one Debian package whose digest is pinned in this program; it is\nfetched from a mirror and kept in a cache. The initramfs has this program, holdfast-runsc, kernel modules and the roots of\npublic certificate authorities, and nothing else: what was built is looked at, and refused if there is a shell, an\ninterpreter, a third executable or a setuid file in it. The same inputs give the same bytes.",
		Example: "  holdfast image build --out image\n  holdfast image build --out image --mirror http://ftp.de.debian.org --json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if c.Out == "" {
				return wrong(cmd, errors.New("--out is missing"))
			}
			self, err := os.Executable()
			if err != nil {
				return err
			}
			if runsc == "" {
				runsc = filepath.Join(filepath.Dir(self), "holdfast-runsc")
			}
			if c.Cache == "" {
				dir, err := os.UserCacheDir()
				if err != nil {
					return fmt.Errorf("%w: --cache names a directory", err)
				}
				c.Cache = filepath.Join(dir, "holdfast")
			}
			c.Holdfast, c.Runsc, c.Modules = self, runsc, machine.Modules()
			if !a.json {
				p := newProgress(cmd.ErrOrStderr())
				defer p.done()
				c.Progress = fetching(p)
			}
			m, err := image.Build(cmd.Context(), c)
			if err != nil {
				return err
			}
			if a.json {
				return printJSON(cmd.OutOrStdout(), m)
			}
			var total int64
			for _, f := range m.Files {
				total += f.Size
			}
			w := cmd.OutOrStdout()
			fmt.Fprintf(w, "Linux %s from Debian's %s %s, %d modules; %d entries, %s unpacked\n", m.Release, m.Pin.Package, m.Pin.Version, len(m.Modules), len(m.Files), mib(total))
			table(w,
				[]string{filepath.Join(c.Out, image.FileKernel), mib(m.Kernel.Size), "sha256:" + m.Kernel.SHA256.String()},
				[]string{filepath.Join(c.Out, image.FileInitramfs), mib(m.Initramfs.Size), "sha256:" + m.Initramfs.SHA256.String()})
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&c.Out, "out", "", "`directory` that gets the image; what it has of an older one is replaced")
	f.StringVar(&c.Mirror, "mirror", "", "`URL` of a Debian mirror (default http://deb.debian.org)")
	f.StringVar(&c.Package, "package", "", "the kernel's package as a `file`, instead of fetching it")
	f.StringVar(&c.Cache, "cache", "", "`directory` that keeps the fetched package (default holdfast in the user's cache directory)")
	f.StringVar(&runsc, "runsc", "", "`path` of holdfast-runsc (default beside holdfast)")
	return cmd
}

// fetching shows how far a fetch is, when it takes longer than a person waits without asking.
func fetching(p *progress) func(done, total int64) {
	every := 200 * time.Millisecond
	if p.tty == nil {
		every = 5 * time.Second
	}
	next := time.Now().Add(2 * time.Second)
	return func(done, total int64) {
		if now := time.Now(); now.After(next) {
			next = now.Add(every)
			p.say("fetching the kernel: %s of %s", mib(done), mib(total))
		}
	}
}

func (a *app) imageShowCmd() *cobra.Command {
	return &cobra.Command{
		Use: "show IMAGE", Short: "Show what is in an image, and fail if there is what must not be", Args: asUsed,
		Long:    "Show what is in an image, the directory that image build made, or in any initramfs, a file. Every file is looked at; what\nit is is not taken from its name or its mode. Of a directory the kernel and the initramfs must be those of its manifest.\nIt exits with 1 if there is something that must not be there.",
		Example: "  holdfast image show image\n  holdfast image show /boot/initrd.img --json",
		RunE: func(cmd *cobra.Command, args []string) error {
			r, err := image.Look(args[0])
			if err != nil {
				return err
			}
			if a.json {
				err = printJSON(cmd.OutOrStdout(), r)
			} else {
				showImage(cmd.OutOrStdout(), r)
			}
			if err == nil && len(r.Problems) > 0 {
				err = fmt.Errorf("%s has what an image must not have:\n  %s", args[0], strings.Join(r.Problems, "\n  "))
			}
			return err
		},
	}
}

func showImage(w io.Writer, r *image.Report) {
	rows := [][]string{{"MODE", "SIZE", "PATH"}}
	for _, e := range r.Entries {
		path := e.Path
		if e.Target != "" {
			path += " -> " + e.Target
		}
		rows = append(rows, []string{e.Mode.String(), fmt.Sprint(e.Size), printable([]byte(path))})
	}
	table(w, rows...)
	fmt.Fprintln(w)
	rows = nil
	if m := r.Manifest; m != nil {
		rows = append(rows, []string{"kernel", fmt.Sprintf("%s from Debian's %s %s", m.Release, m.Pin.Package, m.Pin.Version)})
	}
	for _, x := range []struct {
		what string
		have []image.Finding
	}{
		{"executables", r.Executables}, {"modules", r.Modules}, {"shells, interpreters, dynamic programs", r.Interpreters}, {"libraries", r.Libraries},
		{"setuid, setgid", r.Setuid}, {"devices, pipes, sockets", r.Special}, {"writable by everybody", r.Writable}, {"odd", r.Odd},
	} {
		rows = append(rows, []string{x.what, fmt.Sprint(len(x.have))})
	}
	table(w, rows...)
}
