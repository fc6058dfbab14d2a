package main

import (
	"context"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"holdfast/internal/confine"
	"holdfast/node"
	"holdfast/store"
	"holdfast/store/location"
	"holdfast/store/s3"
)

// runFront serves the buckets of a contract: what a node starts (node.Front). It ends when its input does, and when another
// front end has the store, which it says.
func runFront(ctx context.Context, in io.Reader, out io.Writer, listener *os.File) error {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return err
	}
	messages := json.NewDecoder(in)
	var first node.Front
	if err := messages.Decode(&first); err != nil {
		return fmt.Errorf("read what to serve: %w", err)
	}
	l, err := net.FileListener(listener)
	if err != nil {
		return err
	}
	listener.Close()
	defer l.Close()
	keys, err := store.ParseKeys(first.FrontEnd.Keys)
	if err != nil {
		return err
	}
	if first.User != 0 {
		held, err := confine.Self(confine.Policy{User: first.User, Dir: first.Dir, Connect: first.Ports, EndWithParent: true})
		if err != nil {
			return err
		}
		first.Dir = "/"
		if len(held.Lacks) > 0 {
			logger().Warn("the front end is confined in part", "lacks", held.Lacks)
		}
	}
	f := &frontEnd{cfg: first, keys: keys, places: first.Places}
	defer f.closeMembers()
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	go func() {
		defer stop()
		for {
			var m node.Front
			if err := messages.Decode(&m); err != nil {
				return
			}
			f.learn(m.Places)
		}
	}()
	st, err := f.open(ctx)
	if err != nil {
		return ended(ctx, err)
	}
	defer st.Close()
	logger().Info("the store is open", "locations", len(first.Places), "restored", f.restored)
	seed := keys.TLS()
	seal, err := hkdf.Key(sha256.New, seed[:], nil, "holdfast store s3 users", 32)
	if err != nil {
		return err
	}
	eg, ctx := errgroup.WithContext(ctx)
	socket := filepath.Join(first.Dir, "s3") // in a directory of its own user's alone
	cfg := s3.Config{Store: st, Listen: socket, Access: first.FrontEnd.Access, Secret: first.FrontEnd.Secret, Seal: [32]byte(seal), Log: logger()}
	var admin *s3.Admin
	cfg.Admin = func(a *s3.Admin) { admin = a }
	cfg.Ready = func() {
		eg.Go(func() error {
			if err := f.makeBuckets(ctx, admin); err != nil {
				return ended(ctx, err)
			}
			if first.User != 0 { // before the first byte of a workload's
				if err := confine.NoMoreListeners(); err != nil {
					return err
				}
			}
			return pass(ctx, l, socket)
		})
	}
	eg.Go(func() error { return ended(ctx, st.Run(ctx)) })
	eg.Go(func() error { return f.follow(ctx, st, out) })
	eg.Go(func() error {
		if err := s3.Run(ctx, cfg); err != nil {
			return err
		}
		return ctx.Err()
	})
	return ended(ctx, eg.Wait())
}

// frontEnd is one while it runs.
type frontEnd struct {
	cfg      node.Front
	keys     *store.Keys
	restored bool
	members  []store.Member

	mu     sync.Mutex
	places []node.Place
}

func (f *frontEnd) learn(places []node.Place) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.places = places
}

func (f *frontEnd) known() []node.Place {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.places
}

func (f *frontEnd) closeMembers() {
	for _, m := range f.members {
		m.Location.(io.Closer).Close()
	}
	f.members = nil
}

// open takes the store over from its locations, or begins it when these keep none. It tries until it can: locations serve a
// store some time after the ledger has it.
func (f *frontEnd) open(ctx context.Context) (*store.Store, error) {
	said := ""
	for {
		st, err := f.tryOpen(ctx)
		if err == nil || ctx.Err() != nil {
			return st, err
		}
		if s := err.Error(); s != said {
			said = s
			logger().Warn("the store is not open yet", "error", err)
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(time.Second):
		}
	}
}

func (f *frontEnd) tryOpen(ctx context.Context) (*store.Store, error) {
	places := f.known()
	st, err := f.openOver(ctx, places, true)
	if !errors.Is(err, store.ErrNoStore) {
		f.restored = err == nil
		return st, err
	}
	// A new one begins with locations that are all up, one a farm.
	up := slices.DeleteFunc(slices.Clone(places), func(p node.Place) bool { return !p.Up })
	farms := map[string]bool{}
	for _, p := range up {
		farms[p.Farm] = true
	}
	if n := node.ContractScheme().N; len(farms) < n {
		return nil, fmt.Errorf("%d farms have a location that is up, a new store needs %d", len(farms), n)
	}
	return f.openOver(ctx, up, false)
}

func (f *frontEnd) openOver(ctx context.Context, places []node.Place, restore bool) (*store.Store, error) {
	f.closeMembers()
	cert, err := location.Certificate(f.keys.TLS())
	if err != nil {
		return nil, err
	}
	for _, p := range places {
		m, err := p.Member(cert, nil)
		if err != nil {
			return nil, err
		}
		f.members = append(f.members, m)
	}
	return store.Open(ctx, store.Config{
		Dir: filepath.Join(f.cfg.Dir, "store"), Keys: f.keys, Members: f.members, Scheme: node.ContractScheme(), Restore: restore, Log: logger(),
	})
}

// makeBuckets tries until the store takes them.
func (f *frontEnd) makeBuckets(ctx context.Context, admin *s3.Admin) error {
	for _, b := range f.cfg.FrontEnd.Buckets {
		for {
			err := admin.EnsureBucket(b.Name, b.Versioning)
			if err == nil {
				break
			}
			logger().Warn("a bucket is not there yet", "error", err)
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(time.Second):
			}
		}
	}
	return nil
}

// follow adds locations that have come, and notices when another front end has the store.
func (f *frontEnd) follow(ctx context.Context, st *store.Store, out io.Writer) error {
	cert, err := location.Certificate(f.keys.TLS())
	if err != nil {
		return err
	}
	for {
		if err := st.View(ctx, func(store.Reader) error { return nil }); errors.Is(err, store.ErrOld) {
			fmt.Fprintln(out, node.FrontTaken)
			return err
		}
		for _, p := range f.known() {
			if !p.Up || slices.ContainsFunc(f.members, func(m store.Member) bool { return m.ID == p.ID }) {
				continue
			}
			m, err := p.Member(cert, nil)
			if err != nil {
				return err
			}
			if err := st.Add(ctx, m); err != nil && !errors.Is(err, store.ErrMemberThere) {
				m.Location.(io.Closer).Close()
				logger().Warn("a location is not added yet", "location", p.Node, "error", err)
				continue
			}
			f.members = append(f.members, m)
			logger().Info("a location was added", "location", p.Node)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Second):
		}
	}
}

// maxFrontConns bounds the connections of workloads to a front end.
const maxFrontConns = 1024

// pass hands connections on to the server's socket: it opens its listeners itself, and knows no descriptor.
func pass(ctx context.Context, l net.Listener, socket string) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	defer context.AfterFunc(ctx, func() { l.Close() })()
	places := make(chan struct{}, maxFrontConns)
	for {
		places <- struct{}{}
		c, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			return err
		}
		wg.Go(func() {
			defer func() { <-places }()
			defer c.Close()
			to, err := net.Dial("unix", socket)
			if err != nil {
				return
			}
			defer to.Close()
			defer context.AfterFunc(ctx, func() { c.Close(); to.Close() })()
			both := make(chan struct{}, 2)
			half := func(dst, src net.Conn) {
				io.Copy(dst, src)
				dst.(interface{ CloseWrite() error }).CloseWrite()
				both <- struct{}{}
			}
			go half(to, c)
			go half(c, to)
			<-both
			<-both
		})
	}
}
