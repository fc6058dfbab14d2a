package volume

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Serve is the body of a volume server: it reads its order from in, shows the plain disk as a loop device until SIGTERM or
// the end of ctx, and lets go of it. It holds the device itself until in ends, by when the Manager has mounted it. It
// inherits the volume's lock as file descriptor 3.
//
// It lives in a mount namespace of its own, without the file system that lies on its disk: a server that is killed
// together with all who use the volume would otherwise be the last to leave the mount, and the kernel would wait in it,
// for ever, for the very server to write the rest.
func Serve(ctx context.Context, in io.Reader) error {
	// The key is in this process's memory: no core dump, no ptrace by others of the same user.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("volume server: %w", err)
	}
	unix.CloseOnExec(3)
	ctx, stop := signal.NotifyContext(ctx, unix.SIGTERM, unix.SIGINT)
	defer stop()
	var o order
	if err := json.NewDecoder(io.LimitReader(in, 1<<20)).Decode(&o); err != nil {
		return fmt.Errorf("volume server: read order: %w", err)
	}
	if err := leaveMounts(filepath.Dir(o.Run)); err != nil {
		return fmt.Errorf("volume server: %w", err)
	}
	if err := writeReport(o.Run, report{PID: os.Getpid()}); err != nil {
		return fmt.Errorf("volume server: %w", err)
	}
	s := &server{order: o}
	err := s.open()
	if err == nil {
		err = writeReport(o.Run, report{PID: os.Getpid(), Ready: true, Loop: s.loop})
	}
	if err != nil {
		err = fmt.Errorf("volume %s: %w", o.ID, err)
		return errors.Join(err, writeReport(o.Run, report{PID: os.Getpid(), Error: safe(err), Kind: kindOf(err)}), s.close())
	}
	go func() {
		io.Copy(io.Discard, in)
		s.dev.Close()
	}()
	<-ctx.Done()
	if err := s.close(); err != nil {
		return fmt.Errorf("volume %s: %w", o.ID, err)
	}
	return nil
}

type server struct {
	order
	disk    *tracked
	control *control
	fuse    *fuse.Server
	loop    string
	dev     *os.File // holds the device until the mount does
}

func (s *server) open() error {
	d, err := openImage(s.Image, s.ID, s.Key)
	if errors.Is(err, ErrLost) && s.Create {
		if err = untrack(tracking(s.Image)); err == nil {
			err = createImage(s.Image, s.ID, s.Size, s.Key)
		}
		if err == nil {
			d, err = openImage(s.Image, s.ID, s.Key)
		}
	}
	if err != nil {
		return err
	}
	if s.disk, err = track(d, tracking(s.Image), s.ID, s.Copies); err != nil {
		d.f.Close()
		return err
	}
	if s.control, err = listen(s.Run, s.disk, snapshotKeys(s.Key, s.ID).check()); err != nil {
		return fmt.Errorf("control: %w", err)
	}
	timeout := time.Hour // nothing changes but through this mount
	opts := &fs.Options{EntryTimeout: &timeout, AttrTimeout: &timeout, MountOptions: fuse.MountOptions{
		DirectMountStrict: true, FsName: "holdfast-volume", Name: "holdfast", MaxWrite: 1 << 20, MaxBackground: 64, DisableXAttrs: true,
		Options: []string{"default_permissions"},
	}}
	if s.fuse, err = fs.Mount(filepath.Join(s.Run, "fuse"), &root{disk: s.disk}, opts); err != nil {
		return fmt.Errorf("fuse: %w", err)
	}
	if s.loop, err = s.attach(); err != nil {
		return fmt.Errorf("loop device: %w", err)
	}
	return nil
}

// attach gives the plain disk a loop device that lets go of it by itself when the last user closes.
func (s *server) attach() (string, error) {
	plain, err := os.OpenFile(filepath.Join(s.Run, "fuse", "disk"), os.O_RDWR, 0)
	if err != nil {
		return "", err
	}
	defer plain.Close()
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return "", err
	}
	defer ctl.Close()
	for range 100 {
		n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return "", err
		}
		name := fmt.Sprintf("/dev/loop%d", n)
		if _, err := os.Stat(name); errors.Is(err, os.ErrNotExist) {
			if err := unix.Mknod(name, unix.S_IFBLK|0o600, int(unix.Mkdev(7, uint32(n)))); err != nil {
				return "", err
			}
		}
		dev, err := os.OpenFile(name, os.O_RDWR, 0)
		if err != nil {
			return "", err
		}
		cfg := unix.LoopConfig{Fd: uint32(plain.Fd()), Size: Sector}
		cfg.Info.Flags = unix.LO_FLAGS_AUTOCLEAR
		copy(cfg.Info.File_name[:], "holdfast volume")
		err = unix.IoctlLoopConfigure(int(dev.Fd()), &cfg)
		if errors.Is(err, unix.EBUSY) { // another took it
			dev.Close()
			continue
		}
		if err != nil {
			dev.Close()
			return "", err
		}
		s.dev = dev
		return name, nil
	}
	return "", errors.New("every free loop device was taken by another")
}

// close lets go of the disk, which nobody has mounted any more.
func (s *server) close() error {
	var errs []error
	if s.control != nil {
		s.control.close()
	}
	if s.disk != nil {
		errs = append(errs, s.disk.Sync())
	}
	if s.dev != nil {
		s.dev.Close() // a second time does no harm
	}
	if s.fuse != nil {
		for end := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			err := s.fuse.Unmount() // busy until the loop device has let go
			if err == nil {
				break
			}
			if time.Now().After(end) {
				if err := unix.Unmount(filepath.Join(s.Run, "fuse"), unix.MNT_DETACH); err != nil {
					errs = append(errs, fmt.Errorf("unmount plain disk: %w", err))
				}
				break
			}
		}
	}
	if s.disk != nil {
		errs = append(errs, s.disk.close(), s.disk.disk.f.Close())
	}
	return errors.Join(errs...)
}

// leaveMounts takes the volumes that others serve out of this process's own mount namespace, which began as a copy: they
// must not be held here when they are closed there.
func leaveMounts(dir string) error {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 5 || !strings.HasPrefix(f[4], dir+"/") {
			continue
		}
		if err := unix.Unmount(f[4], unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("leave %s: %w", f[4], err)
		}
	}
	return nil
}

// root is a directory with one file, the plain disk.
type root struct {
	fs.Inode
	disk *tracked
}

var _ fs.NodeOnAdder = (*root)(nil)

// OnAdd implements fs.NodeOnAdder.
func (r *root) OnAdd(ctx context.Context) {
	r.AddChild("disk", r.NewPersistentInode(ctx, &plain{disk: r.disk}, fs.StableAttr{Mode: unix.S_IFREG, Ino: 2}), false)
}

// plain is the disk's file.
type plain struct {
	fs.Inode
	disk *tracked
}

var (
	_ fs.NodeGetattrer = (*plain)(nil)
	_ fs.NodeOpener    = (*plain)(nil)
	_ fs.NodeReader    = (*plain)(nil)
	_ fs.NodeWriter    = (*plain)(nil)
	_ fs.NodeFsyncer   = (*plain)(nil)
	_ fs.NodeAllocater = (*plain)(nil)
	_ fs.NodeSetattrer = (*plain)(nil)
	_ fs.NodeStatfser  = (*plain)(nil)
)

func (p *plain) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode, out.Size, out.Blksize, out.Nlink = unix.S_IFREG|0o600, uint64(p.disk.size), Sector, 1
	out.Blocks = out.Size / 512
	return 0
}

// Statfs says the size of a block: a loop device discards in units of it, and a kernel that is told zero (6.1) refuses to discard.
func (p *plain) Statfs(_ context.Context, out *fuse.StatfsOut) syscall.Errno {
	out.Bsize, out.Frsize, out.NameLen = Sector, Sector, 255
	out.Blocks = uint64(p.disk.size / Sector)
	return 0
}

// Setattr changes nothing: the disk has the size that it has. Times do not matter.
func (p *plain) Setattr(ctx context.Context, f fs.FileHandle, in *fuse.SetAttrIn, out *fuse.AttrOut) syscall.Errno {
	if size, ok := in.GetSize(); ok && int64(size) != p.disk.size {
		return unix.EINVAL
	}
	return p.Getattr(ctx, f, out)
}

func (p *plain) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, fuse.FOPEN_KEEP_CACHE, 0
}

func (p *plain) Read(_ context.Context, _ fs.FileHandle, b []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	from := off / Sector * Sector
	to := min((off+int64(len(b))+Sector-1)/Sector*Sector, p.disk.size)
	if from >= p.disk.size || to <= from {
		return fuse.ReadResultData(nil), 0
	}
	buf := b
	if from != off || to != off+int64(len(b)) {
		buf = make([]byte, to-from)
	}
	if _, err := p.disk.ReadAt(buf, from); err != nil {
		return nil, fs.ToErrno(err)
	}
	end := min(off+int64(len(b)), p.disk.size)
	return fuse.ReadResultData(buf[off-from : end-from]), 0
}

func (p *plain) Write(_ context.Context, _ fs.FileHandle, b []byte, off int64) (uint32, syscall.Errno) {
	if off%Sector != 0 || len(b)%Sector != 0 {
		return 0, unix.EINVAL // a loop device with sectors of 4096 bytes writes nothing else
	}
	n, err := p.disk.WriteAt(b, off)
	if err != nil {
		return uint32(n), fs.ToErrno(err)
	}
	return uint32(n), 0
}

func (p *plain) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno {
	return fs.ToErrno(p.disk.Sync())
}

// Allocate punches holes for discards; nothing else is asked of a disk.
func (p *plain) Allocate(_ context.Context, _ fs.FileHandle, off, size uint64, mode uint32) syscall.Errno {
	if mode&unix.FALLOC_FL_PUNCH_HOLE == 0 && mode&unix.FALLOC_FL_ZERO_RANGE == 0 {
		return unix.EOPNOTSUPP
	}
	return fs.ToErrno(p.disk.Discard(int64(off), int64(size)))
}
