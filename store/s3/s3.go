// Package s3 serves a dispersed store as S3: buckets, objects with their versions, locks and tags, uploads in parts, and
// users, over store.Objects. versitygw speaks the protocol (signatures, XML, access rules), this package is the backend and
// the users behind it. It keeps no state of its own but a cache: what it says is in the store's metadata, whose rows
// docs/formats/objects.md describes, and conditions are decided in the change that they are about. It never holds a body in
// memory, and decides nothing about shards.
package s3

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/oklog/ulid/v2"
	"github.com/versity/versitygw/auth"
	"github.com/versity/versitygw/backend"
	"github.com/versity/versitygw/debuglogger"
	"github.com/versity/versitygw/embedgw"
	"github.com/versity/versitygw/s3api"
	"github.com/versity/versitygw/s3api/middlewares"
	"github.com/versity/versitygw/s3err"

	"holdfast/store"
	"holdfast/store/location"
)

// Config configures a server.
type Config struct {
	Store  Store
	Listen string // host:port
	// Certificate and Key are files in PEM; without them there is no TLS.
	Certificate, Key string
	Reload           <-chan struct{} // has them read again
	Access, Secret   string          // of the account that may do everything
	Seal             [32]byte        // seals the secrets of other users
	// Admin is called with what changes users and policies, before anything is served; nil is nothing.
	Admin func(*Admin)
	// Expire ends uploads that were not completed; 0 means 7 days.
	Expire time.Duration
	// Keep is how long Undelete can bring back what was deleted or replaced; it takes the place that it took. 0 means not at all.
	Keep time.Duration
	// Patience is how long the server waits for a client that should send or take something; 0 means a minute.
	Patience time.Duration
	Region   string       // "" means us-east-1
	Ready    func()       // is called when the server listens; nil is nothing
	Log      *slog.Logger // nil discards
}

const (
	maxConnections = 8192
	maxRequests    = 4096
	maxParts       = 10000
)

// Run serves until ctx ends. versitygw allows one server a process.
func Run(ctx context.Context, cfg Config) error {
	cfg.Expire = cmp.Or(cfg.Expire, 7*24*time.Hour)
	b := newBackend(cfg.Store, cmp.Or(cfg.Log, slog.New(slog.DiscardHandler)))
	b.patience, b.spare = cmp.Or(cfg.Patience, time.Minute), cfg.Keep
	u, err := newUsers(b, auth.Account{Access: cfg.Access, Secret: cfg.Secret, Role: auth.RoleAdmin}, cfg.Seal)
	if err != nil {
		return fmt.Errorf("serve s3: %w", err)
	}
	if cfg.Admin != nil {
		cfg.Admin(&Admin{b, u})
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop()
	wg.Go(func() { b.runUpkeep(ctx, cfg.Expire) })
	served := make(chan error, 2)
	var server *s3api.S3ApiServer
	options := []s3api.Option{
		func(s *s3api.S3ApiServer) { server = s },
		s3api.WithOnListen(func() {
			if err := limitTimes(server, b.patience); err != nil {
				served <- err
				return
			}
			if cfg.Ready != nil {
				cfg.Ready()
			}
		}),
		s3api.WithMiddleware("/", endChunks),
		s3api.WithMiddleware("/", mendTrailers),
	}
	region := cmp.Or(cfg.Region, "us-east-1")
	options = append(options, b.lifecycleRoutes(u, middlewares.RootUserConfig{Access: cfg.Access, Secret: cfg.Secret}, region)...)
	serve := func() error {
		return embedgw.RunVersityGW(ctx, b, &embedgw.Config{
			RootUserAccess: cfg.Access, RootUserSecret: cfg.Secret, IAMService: u, Region: region, Ports: []string{cfg.Listen},
			CertFile: cfg.Certificate, KeyFile: cfg.Key, KeepAlive: true, Quiet: true, LogLevel: debuglogger.LevelSilent,
			MaxConnections: maxConnections, MaxRequests: maxRequests, MultipartMaxParts: maxParts,
			SigHup: cfg.Reload, S3Options: options,
		})
	}
	go func() { served <- serve() }()
	select {
	case err = <-served:
	case <-ctx.Done():
		// It waits 10 s for connections on which nothing was ever asked. What was asked is let to its end.
		err = b.idle(served)
	}
	if err != nil {
		return fmt.Errorf("serve s3: %w", err)
	}
	return nil
}

// idle returns when the server has ended, or nothing is under way: for three looks, since between the steps of a request there
// are moments when nothing seems to be.
func (b *objects) idle(served <-chan error) error {
	for quiet := 0; quiet < 3; {
		select {
		case err := <-served:
			return err
		case <-time.After(100 * time.Millisecond):
		}
		if quiet++; b.busy.Load() > 0 {
			quiet = 0
		}
	}
	return nil
}

// runUpkeep does every hour what time asks for.
func (b *objects) runUpkeep(ctx context.Context, expire time.Duration) {
	for {
		for _, u := range []struct {
			what string
			do   func() error
		}{
			{"uploads are not expired", func() error { return b.expire(b.now().Add(-expire)) }},
			{"lifecycle rules are not followed", func() error { return b.runRules(ctx, 50*time.Millisecond) }},
			{"what is locked is not yet held by locations", func() error { return b.renewHolds(ctx) }},
			{"what was deleted is not let go of", func() error { return b.empty(ctx, b.now().Add(-b.spare)) }},
		} {
			if err := u.do(); err != nil && ctx.Err() == nil {
				b.log.Warn(u.what, "error", err)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(time.Hour):
		}
	}
}

// objects is the backend of versitygw.
type objects struct {
	backend.BackendUnsupported // what no method here does
	store                      Store
	log                        *slog.Logger
	etags                      etags
	now                        func() time.Time
	patience                   time.Duration // 0 is for ever
	spare                      time.Duration // of what was deleted; 0 is not at all
	said                       sync.Map      // errors that were logged, by text
	busy                       atomic.Int64  // steps of requests, and bodies that are sent

	buckets struct {
		sync.RWMutex
		known   map[string]*bucket // never changed
		changes uint64
	}
}

var _ backend.Backend = (*objects)(nil)

func newBackend(s Store, log *slog.Logger) *objects {
	b := &objects{store: s, log: log, now: time.Now}
	b.buckets.known = map[string]*bucket{}
	return b
}

func (b *objects) String() string { return "holdfast" }
func (b *objects) Shutdown()      {}

// The context of a request says nothing about its client: fasthttp ends it with the server. What is under way then is let
// to its end.
func (b *objects) view(f func(store.Reader) error) error {
	b.busy.Add(1)
	defer b.busy.Add(-1)
	return b.answer(b.store.View(context.Background(), f))
}

func (b *objects) update(f func(store.Tx) error) error {
	b.busy.Add(1)
	defer b.busy.Add(-1)
	return b.answer(b.store.Update(context.Background(), f))
}

// answer makes what S3 says of an error. The front end looks at the type, and not at what an error wraps.
func (b *objects) answer(err error) error {
	if err == nil {
		return nil
	}
	var known s3err.S3Error
	switch {
	case errors.As(err, &known):
		if e, ok := known.(error); ok {
			return e
		}
	case errors.Is(err, store.ErrBusy):
		b.once("the store is busy", err)
		return s3err.GetAPIError(s3err.ErrSlowDown)
	case errors.Is(err, store.ErrOld):
		b.once("another front end has the store", err)
		return s3err.GetAPIError(s3err.ErrSlowDown)
	case errors.Is(err, location.ErrFull): // clients do not try 507 again
		b.once("locations are full", err)
		return s3err.GetAPIError(s3err.ErrNoSpaceLeftOnDevice)
	case errors.Is(err, location.ErrQuota):
		b.once("quotas at locations are used up", err)
		return s3err.GetAPIError(s3err.ErrQuotaExceeded)
	case errors.Is(err, store.ErrClass):
		return s3err.APIError{Code: "InvalidStorageClass", Description: "The storage class you specified is not valid.", HTTPStatusCode: http.StatusBadRequest}
	}
	b.log.Error("request failed", "error", err)
	return s3err.GetAPIError(s3err.ErrInternalError)
}

// once logs a condition at most once a minute.
func (b *objects) once(what string, err error) {
	if last, ok := b.said.Load(what); ok && b.now().Sub(last.(time.Time)) < time.Minute {
		return
	}
	b.said.Store(what, b.now())
	b.log.Warn(what, "error", err)
}

// errSlow is what a client gets that does not send what it said it would.
var errSlow = s3err.APIError{Code: "RequestTimeout", HTTPStatusCode: http.StatusBadRequest, Description: "Your socket connection to the server was not read from or written to within the timeout period. Idle connections will be closed."}

func str(p *string) string {
	if p == nil {
		return ""
	}
	return *p
}

// text is a pointer to a string, nil for "".
func text(s string) *string {
	if s == "" {
		return nil
	}
	return &s
}

// quoted is an ETag as it travels.
func quoted(etag string) *string {
	s := `"` + etag + `"`
	return &s
}

// next makes a version that is newer than last, whatever the clock says.
func (b *objects) next(last version) version {
	var v version
	rand.Read(v[:])
	if err := v.SetTime(ulid.Timestamp(b.now())); err == nil && v.Compare(last) > 0 {
		return v
	}
	v = last
	for i := len(v) - 1; i >= 0; i-- {
		if v[i]++; v[i] != 0 {
			break
		}
	}
	return v
}
