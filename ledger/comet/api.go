package comet

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	sm "github.com/cometbft/cometbft/state"
	"github.com/cometbft/cometbft/types"

	"holdfast/internal/canonical"
)

// Limits of the API.
const (
	maxStreams   = 128              // requests under way on one connection
	ratePerConn  = 1000             // requests a second on one connection
	burstPerConn = 2000             //
	bodyTime     = 10 * time.Second // to send a body
	readWait     = 5 * time.Second  // for a height that is about to come
	watchWait    = 25 * time.Second
	txWait       = 20 * time.Second
	answerTime   = 30 * time.Second // to take an answer
)

// tlsServer is the server's side: TLS 1.3, a post-quantum key exchange, HTTP/2.
func tlsServer(c tls.Certificate) *tls.Config {
	return &tls.Config{
		MinVersion:       tls.VersionTLS13,
		Certificates:     []tls.Certificate{c},
		CurvePreferences: []tls.CurveID{tls.X25519MLKEM768},
		NextProtos:       []string{"h2"},
		// A client may say who it is, to have a place of its own: whoever has no certificate is a stranger and welcome.
		ClientAuth: tls.RequestClientCert,
	}
}

// api answers clients from one replica.
type api struct {
	v      *Validator
	a      *app
	states sm.Store
	conns  *conns

	mu   sync.Mutex
	last *types.SignedHeader // a cache
	set  *types.ValidatorSet
}

// serve answers the API until ctx ends.
func (v *Validator) serve(ctx context.Context) error {
	a := v.replica()
	s := &api{v: v, a: a, states: sm.NewStore(a.disk.disk.table(tableState), sm.StoreOptions{}), conns: v.conns}
	mux := http.NewServeMux()
	mux.Handle("POST "+pathRead, s.handle(maxRequest, s.read))
	mux.Handle("POST "+pathWatch, s.handle(maxSmall, s.watch))
	mux.Handle("POST "+pathTx, s.handle(MaxTx, s.tx))
	mux.Handle("POST "+pathHeader, s.handle(maxSmall, s.header))
	mux.Handle("POST "+pathArchive, s.handle(maxSmall+MaxKey, s.archive))
	for pattern, h := range v.c.Handlers {
		mux.Handle(pattern, h)
	}
	var only http.Protocols
	only.SetHTTP2(true)
	srv := &http.Server{
		Handler:           s.conns.limit(mux),
		TLSConfig:         tlsServer(v.c.TLS),
		Protocols:         &only,
		ReadHeaderTimeout: bodyTime,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10,
		HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: maxStreams, SendPingTimeout: 30 * time.Second, PingTimeout: 10 * time.Second},
		ErrorLog:          slog.NewLogLogger(v.log.Handler(), slog.LevelDebug),
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ConnState:         s.conns.state,
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			_, p := peerOf(c)
			return context.WithValue(ctx, peerKey{}, p)
		},
	}
	failed := make(chan error, 1)
	go func() {
		failed <- srv.ServeTLS(&listener{v.c.API, s.conns}, "", "")
	}()
	ready := make(chan struct{})
	go func() {
		defer close(ready)
		if _, _, err := s.proven(ctx, 0, 0); err == nil {
			close(v.ready)
		}
	}()
	var err error
	select {
	case <-ctx.Done():
	case err = <-failed:
		failed <- nil
		err = fmt.Errorf("serve API on %s: %w", v.c.API.Addr(), err)
	}
	grace, cancel := context.WithTimeout(context.Background(), 500*time.Millisecond)
	defer cancel()
	if srv.Shutdown(grace) != nil {
		srv.Close()
	}
	<-failed
	if err == nil {
		<-ready
	}
	return err
}

// handle reads a bounded body, runs f, and writes what it returns. What the body and the answer take is held until the
// client has taken the answer.
func (s *api) handle(limit int64, f func(ctx context.Context, c *call, body []byte) (any, error)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rc := http.NewResponseController(w)
		p := r.Context().Value(peerKey{}).(*peer)
		size := limit
		if r.ContentLength >= 0 {
			size = min(size, r.ContentLength)
		}
		release, err := s.conns.hold(r.Context(), p, int(size))
		if err != nil {
			refuse(w, err)
			return
		}
		defer release()
		rc.SetReadDeadline(time.Now().Add(bodyTime))
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, limit))
		if err != nil {
			var large *http.MaxBytesError
			if errors.As(err, &large) {
				refuse(w, &failure{http.StatusRequestEntityTooLarge, kindRequest, err})
			} else {
				refuse(w, &failure{http.StatusBadRequest, kindRequest, err})
			}
			return
		}
		rc.SetReadDeadline(time.Time{})
		answer, release, err := s.answer(r.Context(), p, body, f)
		rc.SetWriteDeadline(time.Now().Add(answerTime))
		if err != nil {
			refuse(w, err)
			return
		}
		defer release()
		w.Header().Set("Content-Type", contentType)
		w.Write(answer)
	})
}

// call is a request that is being answered.
type call struct {
	share *share
	leave func() // gives back the place among those that work, nil without one
}

func (c *call) enter(ctx context.Context, places chan struct{}) error {
	select {
	case places <- struct{}{}:
		c.leave = func() { <-places }
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (c *call) end() {
	if c.leave != nil {
		c.leave()
	}
}

// answer runs f and encodes what it returns. The work is done when the bytes of the answer are held.
func (s *api) answer(ctx context.Context, p *peer, body []byte, f func(context.Context, *call, []byte) (any, error)) ([]byte, func(), error) {
	c := &call{share: s.conns.shareOf(p)}
	defer c.end()
	out, err := f(ctx, c, body)
	if err != nil {
		return nil, nil, err
	}
	answer := canonical.Encode(out)
	release, err := s.conns.hold(ctx, p, len(answer))
	return answer, release, err
}

// failure is a request that does not end well.
type failure struct {
	status int
	kind   string
	err    error
}

func (f *failure) Error() string { return f.err.Error() }

func refuse(w http.ResponseWriter, err error) {
	f := &failure{http.StatusInternalServerError, kindBusy, errors.New("internal error")} // details stay here
	errors.As(err, &f)
	w.Header().Set("Content-Type", contentType)
	w.WriteHeader(f.status)
	w.Write(canonical.Encode(problem{Kind: f.kind, Message: short(f.Error())}))
}

func malformed(err error) error { return &failure{http.StatusBadRequest, kindRequest, err} }

// proven waits until the state of minHeight or a later one is provable by a block of now, for as long as wait unless that
// is 0, and returns the newest provable state and its height.
func (s *api) proven(ctx context.Context, minHeight int64, wait time.Duration) (State, int64, error) {
	var late <-chan time.Time
	if wait > 0 {
		t := time.NewTimer(wait)
		defer t.Stop()
		late = t.C
	}
	for {
		s.a.mu.Lock()
		h, at, changed := s.a.proven, s.a.at, s.a.changed
		state := s.a.old[h]
		s.a.mu.Unlock()
		ok := h >= minHeight && h >= 0 && state != nil
		if ok && time.Since(at) < fresh {
			return state, h, nil
		}
		select {
		case <-changed:
		case <-late:
			if ok {
				return state, h, nil // the client decides whether it is too old
			}
			return nil, 0, &failure{http.StatusServiceUnavailable, kindBehind, fmt.Errorf("height %d is not provable yet, %d is", minHeight, h)}
		case <-ctx.Done():
			return nil, 0, &failure{http.StatusServiceUnavailable, kindBehind, errors.New("server stops")}
		}
	}
}

func (s *api) read(ctx context.Context, c *call, body []byte) (any, error) {
	var r readRequest
	err := decode(body, maxRequest, &r)
	if err == nil {
		err = r.check()
	}
	if err != nil {
		return nil, malformed(err)
	}
	state, h, err := s.proven(ctx, r.MinHeight, readWait)
	if err != nil {
		return nil, err
	}
	if err := c.enter(ctx, c.share.work); err != nil {
		return nil, err
	}
	out := readAnswer{Entries: make([]entry, 0, len(r.Keys))}
	size := 0
	for _, k := range r.Keys {
		v, p := state.Get(string(k))
		if size += len(v) + len(p); size > maxReadSize {
			return nil, &failure{http.StatusRequestEntityTooLarge, kindLarge, fmt.Errorf("answer has more than %d bytes, ask for fewer keys", maxReadSize)}
		}
		out.Entries = append(out.Entries, entry{Present: v != nil, Value: v, Proof: p})
	}
	out.Head, err = s.head(h+1, r.Validators)
	return out, err
}

// head returns the signed header of a height.
func (s *api) head(height int64, known []byte) (head, error) {
	s.mu.Lock()
	sh, set := s.last, s.set
	s.mu.Unlock()
	if sh == nil || sh.Height != height {
		s.v.mu.Lock()
		blocks := s.v.blocks
		s.v.mu.Unlock()
		m := blocks.LoadBlockMeta(height)
		c := blocks.LoadBlockCommit(height)
		if c == nil {
			c = blocks.LoadSeenCommit(height) // the tip
		}
		if m == nil || c == nil {
			return head{}, &failure{http.StatusGone, kindGone, fmt.Errorf("block %d is not kept", height)}
		}
		var err error
		if set, err = s.states.LoadValidators(height); err != nil {
			return head{}, &failure{http.StatusGone, kindGone, fmt.Errorf("validators of height %d are not kept", height)}
		}
		sh = &types.SignedHeader{Header: &m.Header, Commit: c}
		s.mu.Lock()
		if s.last == nil || s.last.Height < height {
			s.last, s.set = sh, set
		}
		s.mu.Unlock()
	}
	return encodeHead(sh, set, known)
}

func (s *api) header(ctx context.Context, c *call, body []byte) (any, error) {
	var r headerRequest
	if err := decode(body, maxSmall, &r); err != nil {
		return nil, malformed(err)
	}
	if r.Height < 0 {
		return nil, malformed(fmt.Errorf("height %d", r.Height))
	}
	_, h, err := s.proven(ctx, r.Height-1, readWait)
	if err != nil {
		return nil, err
	}
	if err := c.enter(ctx, c.share.work); err != nil {
		return nil, err
	}
	if r.Height == 0 {
		r.Height = h + 1
	}
	return s.head(r.Height, r.Validators)
}

func (s *api) watch(ctx context.Context, _ *call, body []byte) (any, error) {
	var r watchRequest
	if err := decode(body, maxSmall, &r); err != nil {
		return nil, malformed(err)
	}
	t := time.NewTimer(watchWait)
	defer t.Stop()
	for {
		s.a.mu.Lock()
		moved, proven, changed := s.a.moved, s.a.proven, s.a.changed
		s.a.mu.Unlock()
		if proven >= 0 && moved > r.After {
			return watchAnswer{Height: proven}, nil
		}
		select {
		case <-changed:
		case <-t.C:
			return watchAnswer{Height: r.After}, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (s *api) tx(ctx context.Context, c *call, body []byte) (any, error) {
	if err := c.enter(ctx, c.share.txs); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, txWait)
	defer cancel()
	r, err := s.v.Submit(ctx, body)
	switch {
	case errors.Is(err, ErrRefused):
		return nil, &failure{http.StatusUnprocessableEntity, kindRefused, errors.New(trimRefused(err))}
	case errors.Is(err, ErrUnavailable):
		return nil, &failure{http.StatusServiceUnavailable, kindBusy, err}
	case ctx.Err() != nil:
		return nil, &failure{http.StatusServiceUnavailable, kindPending, fmt.Errorf("transaction %x waits for a block", first(body))}
	case err != nil:
		return nil, err
	}
	return txAnswer{Height: r.Height, Code: r.Code, Log: r.Log}, nil
}

func first(tx []byte) []byte { h := sha256.Sum256(tx); return h[:8] }
