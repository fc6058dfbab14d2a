package control

import (
	"cmp"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"

	"holdfast/disperse"
	"holdfast/store"
	"holdfast/store/s3"
)

// Config configures Serve.
type Config struct {
	Listener net.Listener // of Listen; closed by Serve
	Store    *store.Store
	Members  *Members
	Admin    *s3.Admin
	Scheme   disperse.Scheme
	Classes  map[string]disperse.Scheme
	Keys     func() (*store.Keys, error) // reads the front end's file of keys again; nil: they are in no file
	Log      *slog.Logger                // nil discards
}

const (
	maxRequest = 64 << 10
	sayEvery   = 200 * time.Millisecond
	maxRate    = 1 << 40
	maxAudits  = 1 << 20
)

type server struct {
	Config
	log   *slog.Logger
	since time.Time
}

// errRequest is a request that is none.
var errRequest = errors.New("not a request")

// Serve answers until ctx ends, and what it was asked ends with it.
func Serve(ctx context.Context, cfg Config) error {
	s := &server{Config: cfg, log: cmp.Or(cfg.Log, slog.New(slog.DiscardHandler)), since: time.Now()}
	h := &http.Server{
		Handler: s.routes(), BaseContext: func(net.Listener) context.Context { return ctx }, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10,
		ErrorLog: slog.NewLogLogger(s.log.Handler(), slog.LevelWarn),
	}
	done := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(done)
		// Requests end with ctx, and say so.
		grace, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		if h.Shutdown(grace) != nil {
			h.Close()
		}
	})
	err := h.Serve(cfg.Listener)
	if !stop() {
		<-done
	}
	if ctx.Err() != nil {
		return nil
	}
	return fmt.Errorf("control socket: %w", err)
}

func (s *server) routes() http.Handler {
	m := http.NewServeMux()
	get := func(pattern string, f func(*http.Request) (any, error)) {
		m.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			v, err := f(r)
			answer(w, v, err)
		})
	}
	get("GET /v1/status", func(r *http.Request) (any, error) { return s.status(r.Context()) })
	get("GET /v1/users", func(*http.Request) (any, error) { return s.Admin.Users() })
	get("POST /v1/users", s.addUser)
	get("POST /v1/users/{name}/secret", s.setSecret)
	get("DELETE /v1/users/{name}", func(r *http.Request) (any, error) {
		s.log.Info("control: remove a user", "user", r.PathValue("name"))
		return struct{}{}, s.Admin.RemoveUser(r.PathValue("name"))
	})
	get("GET /v1/policies", func(*http.Request) (any, error) { return s.Admin.Buckets() })
	get("GET /v1/policies/{bucket}", func(r *http.Request) (any, error) {
		p, err := s.Admin.Policy(r.PathValue("bucket"))
		return json.RawMessage(p), err
	})
	get("PUT /v1/policies/{bucket}", func(r *http.Request) (any, error) {
		p, err := io.ReadAll(http.MaxBytesReader(nil, r.Body, maxRequest))
		if err != nil {
			return nil, fmt.Errorf("%w: %w", errRequest, err)
		}
		s.log.Info("control: set a policy", "bucket", r.PathValue("bucket"))
		return struct{}{}, s.Admin.SetPolicy(r.PathValue("bucket"), p)
	})
	get("DELETE /v1/policies/{bucket}", func(r *http.Request) (any, error) {
		s.log.Info("control: remove a policy", "bucket", r.PathValue("bucket"))
		return struct{}{}, s.Admin.RemovePolicy(r.PathValue("bucket"))
	})
	get("POST /v1/locations", s.addLocation)
	get("POST /v1/locations/{id}/undrain", func(r *http.Request) (any, error) {
		id, err := parseID(r.PathValue("id"))
		if err != nil {
			return nil, err
		}
		s.log.Info("control: undrain a location", "location", id)
		return struct{}{}, s.Store.Undrain(r.Context(), id)
	})
	m.HandleFunc("POST /v1/locations/{id}/drain", s.drain)
	m.HandleFunc("DELETE /v1/locations/{id}", s.remove)
	m.HandleFunc("POST /v1/scrub", s.scrub)
	m.HandleFunc("POST /v1/audit", s.audit)
	m.HandleFunc("POST /v1/repair", s.repair)
	m.HandleFunc("POST /v1/rotate", s.rotate)
	m.HandleFunc("POST /v1/undelete", s.undelete)
	return m
}

// statusOf is the HTTP status of an error.
func statusOf(err error) int {
	for _, x := range []struct {
		err    error
		status int
	}{
		{errRequest, http.StatusBadRequest}, {s3.ErrUser, http.StatusBadRequest}, {s3.ErrPolicy, http.StatusBadRequest},
		{s3.ErrNoUser, http.StatusNotFound}, {s3.ErrNoBucket, http.StatusNotFound}, {s3.ErrNoPolicy, http.StatusNotFound}, {store.ErrMember, http.StatusNotFound},
		{store.ErrNeeded, http.StatusConflict}, {store.ErrMemberThere, http.StatusConflict}, {store.ErrOld, http.StatusConflict}, {store.ErrKeys, http.StatusConflict},
		{store.ErrBusy, http.StatusServiceUnavailable},
	} {
		if errors.Is(err, x.err) {
			return x.status
		}
	}
	return http.StatusInternalServerError
}

// line is what an answer consists of. Only one field is there.
type line struct {
	Progress *Progress       `json:"progress,omitempty"`
	Result   json.RawMessage `json:"result,omitempty"`
	Error    string          `json:"error,omitempty"`
}

func answer(w http.ResponseWriter, v any, err error) {
	var l line
	if err == nil {
		l.Result, err = json.Marshal(v)
	}
	w.Header().Set("Content-Type", "application/json")
	if err != nil {
		l = line{Error: err.Error()}
		w.WriteHeader(statusOf(err))
	}
	json.NewEncoder(w).Encode(l)
}

func read[T any](r *http.Request) (v T, err error) {
	d := json.NewDecoder(http.MaxBytesReader(nil, r.Body, maxRequest))
	d.DisallowUnknownFields()
	if err := d.Decode(&v); err != nil {
		return v, fmt.Errorf("%w: %w", errRequest, err)
	}
	return v, nil
}

func checkRate(rate int) error {
	if rate < 0 || rate > maxRate {
		return fmt.Errorf("rate %d: %w", rate, errRequest)
	}
	return nil
}

// job answers what takes long: lines of progress, and one of the result. The client's going ends it.
func job(w http.ResponseWriter, r *http.Request, f func(ctx context.Context, say func(Progress)) (any, error)) {
	w.Header().Set("Content-Type", "application/x-ndjson")
	out := http.NewResponseController(w)
	e := json.NewEncoder(w)
	var mu sync.Mutex
	var last time.Time
	v, err := f(r.Context(), func(p Progress) {
		mu.Lock()
		defer mu.Unlock()
		if time.Since(last) < sayEvery {
			return
		}
		last = time.Now()
		e.Encode(line{Progress: &p})
		out.Flush()
	})
	var l line
	if err == nil {
		l.Result, err = json.Marshal(v)
	}
	if err != nil {
		l = line{Error: err.Error()}
	}
	mu.Lock()
	defer mu.Unlock()
	e.Encode(l)
}

func parseID(s string) (id disperse.Place, err error) {
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != len(id) {
		return id, fmt.Errorf("location %.40q: %w", s, errRequest)
	}
	return disperse.Place(b), nil
}

func (s *server) status(ctx context.Context) (*Status, error) {
	st, err := s.Store.Status(ctx)
	if err != nil {
		return nil, err
	}
	out := &Status{
		Scheme: s.Scheme.String(), Started: s.since.UTC(), Epoch: uint64(s.Store.Recovery().Epoch), KeyEpoch: uint32(s.Store.Keys().Epoch),
		Segments: st.Segments, Blocks: st.Blocks, Small: st.Small, Bytes: st.Bytes, Degraded: st.Degraded, Lost: st.Lost, OldKey: st.Old, Queue: st.Queue, Garbage: st.Garbage,
		Durable: map[string]map[string]int64{}, Locations: []Location{},
	}
	for name, c := range s.Classes {
		if out.Classes == nil {
			out.Classes = map[string]string{}
		}
		out.Classes[name] = c.String()
	}
	for c, by := range st.Durable {
		m := map[string]int64{}
		for d, n := range by {
			m[strconv.Itoa(d)] = n
		}
		out.Durable[c.String()] = m
	}
	places := map[disperse.Place]string{}
	for _, p := range s.Members.Places() {
		places[p.ID()] = p.URL()
	}
	for _, m := range st.Members {
		l := Location{
			ID: m.ID.String(), Farm: m.Farm, At: places[m.ID], State: m.State.String(), Answers: m.Answers, Why: m.Why, Down: m.Down.Seconds(), Full: m.Full, Lies: m.Lies,
			Shards: m.Shards, Bytes: m.Status.Bytes, Held: m.Status.Held, Rotten: m.Status.Rotten, Quota: m.Status.Quota.Bytes, Passed: m.Audits.Passed, Failed: m.Audits.Failed,
		}
		if at := m.Status.Scrubbed; !at.IsZero() {
			l.Scrubbed = &at
		}
		out.Locations = append(out.Locations, l)
	}
	return out, nil
}

func (s *server) addUser(r *http.Request) (any, error) {
	u, err := read[User](r)
	if err != nil {
		return nil, err
	}
	u.Secret = cmp.Or(u.Secret, s3.NewSecret())
	s.log.Info("control: add a user", "user", u.Access, "role", u.Role)
	return Credentials{u.Access, u.Secret}, s.Admin.AddUser(u.Access, u.Secret, u.Role)
}

func (s *server) setSecret(r *http.Request) (any, error) {
	x, err := read[Secret](r)
	if err != nil {
		return nil, err
	}
	x.Secret = cmp.Or(x.Secret, s3.NewSecret())
	s.log.Info("control: rotate a user's key", "user", r.PathValue("name"))
	return Credentials{r.PathValue("name"), x.Secret}, s.Admin.SetSecret(r.PathValue("name"), x.Secret)
}

func (s *server) addLocation(r *http.Request) (any, error) {
	x, err := read[at](r)
	if err != nil {
		return nil, err
	}
	p, err := ParsePlace(x.Location)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errRequest, err)
	}
	s.log.Info("control: add a location", "location", p.String())
	return Location{ID: p.ID().String(), Farm: p.Farm, At: p.URL(), State: store.Active.String(), Answers: true}, s.Members.Add(r.Context(), s.Store, p)
}

// asked reads a request whose answer takes long, and answers at once if it is none.
func asked[T any](w http.ResponseWriter, r *http.Request, rate func(T) int) (v T, ok bool) {
	v, err := read[T](r)
	if err == nil {
		err = checkRate(rate(v))
	}
	if err != nil {
		answer(w, nil, err)
	}
	return v, err == nil
}

func (s *server) scrub(w http.ResponseWriter, r *http.Request) {
	x, ok := asked(w, r, func(x Scrub) int { return x.Rate })
	if !ok {
		return
	}
	job(w, r, func(ctx context.Context, say func(Progress)) (any, error) {
		if x.Deep {
			st, err := s.Store.Status(ctx)
			if err != nil {
				return nil, err
			}
			about := int64(0)
			for _, m := range st.Members {
				about += m.Shards
			}
			sum, err := s.Store.Verify(ctx, x.Rate, func(v store.Verified) {
				say(Progress{fmt.Sprintf("read %d MiB", v.Bytes>>20), v.Shards, about, "shards"})
			})
			return Scrubbed{Deep: true, Shards: sum.Shards, Bytes: sum.Bytes, Missing: sum.Bad, Silent: sum.Silent}, err
		}
		sum, err := s.Store.ScrubAt(ctx, x.Rate, func(done, about int64) { say(Progress{"compare", done, about, "shards"}) })
		return Scrubbed{Shards: sum.Shards, Missing: sum.Missing, Orphans: sum.Orphans, Removed: sum.Removed, Silent: int64(sum.Silent)}, err
	})
}

func (s *server) audit(w http.ResponseWriter, r *http.Request) {
	x, ok := asked(w, r, func(x Audit) int { return x.Rate })
	if !ok {
		return
	}
	if x.Count < 1 || x.Count > maxAudits {
		answer(w, nil, fmt.Errorf("%d challenges, 1 to %d are possible: %w", x.Count, maxAudits, errRequest))
		return
	}
	job(w, r, func(ctx context.Context, say func(Progress)) (any, error) {
		var sum Audited
		begin := time.Now()
		for done := 0; done < x.Count; {
			n := min(16, x.Count-done)
			if x.Rate > 0 {
				n = min(n, x.Rate)
			}
			a, err := s.Store.Audit(ctx, n)
			sum.Passed, sum.Failed, sum.Silent = sum.Passed+a.Passed, sum.Failed+a.Failed, sum.Silent+a.Silent
			if err != nil || a == (store.Audited{}) { // there is nothing to be audited
				return sum, err
			}
			done += n
			say(Progress{"audit", int64(done), int64(x.Count), "challenges"})
			if x.Rate > 0 && done < x.Count {
				select {
				case <-ctx.Done():
					return sum, ctx.Err()
				case <-time.After(time.Duration(float64(done)/float64(x.Rate)*float64(time.Second)) - time.Since(begin)):
				}
			}
		}
		return sum, nil
	})
}

func (s *server) repair(w http.ResponseWriter, r *http.Request) {
	x, ok := asked(w, r, func(x Repair) int { return x.Rate })
	if !ok {
		return
	}
	job(w, r, func(ctx context.Context, say func(Progress)) (any, error) {
		st, err := s.Store.Status(ctx)
		if err != nil {
			return nil, err
		}
		sum, err := s.Store.RepairAt(ctx, x.Rate, func(r store.Repaired) {
			say(Progress{fmt.Sprintf("made %d shards, %d MiB", r.Shards, r.Bytes>>20), int64(r.Looked + r.Deferred), st.Queue, "segments"})
		})
		out := repaired(sum)
		if err == nil {
			if st, err = s.Store.Status(ctx); err == nil {
				out.Queue = st.Queue
			}
		}
		return out, err
	})
}

func (s *server) rotate(w http.ResponseWriter, r *http.Request) {
	job(w, r, func(ctx context.Context, say func(Progress)) (any, error) {
		if s.Keys == nil {
			return nil, fmt.Errorf("the keys of this front end are in no file: who gives them to it rotates them: %w", errRequest)
		}
		keys, err := s.Keys()
		if err != nil {
			return nil, err
		}
		if err := s.Store.Rotate(keys); err != nil {
			return nil, err
		}
		s.log.Info("control: keys are rotated", "epoch", keys.Epoch)
		st, err := s.Store.Status(ctx)
		if err != nil {
			return nil, err
		}
		out := Rotated{KeyEpoch: uint32(keys.Epoch)}
		for {
			n, left, err := s.Store.Rewrap(ctx, func(n, _ int) { say(Progress{"re-wrap", int64(out.Changed + n), st.Old, "segments"}) })
			if err != nil {
				return out, err
			}
			if out.Changed, out.Left = out.Changed+n, left; n == 0 || left == 0 {
				break
			}
		}
		say(Progress{"snapshot", 0, 0, "segments"})
		return out, s.Store.Snapshot(ctx)
	})
}

// empty has a location that shall go be made empty. What is left cannot be moved now.
func (s *server) empty(ctx context.Context, id disperse.Place, rate int, say func(Progress)) (out Moved, err error) {
	out.Location = id.String()
	// What heads name, and a snapshot, moves when a newer snapshot and some blocks are there: so a round may find nothing, and
	// the next one something.
	for idle := 0; ; {
		var state store.State
		out.Left, state, err = s.Store.Held(ctx, id)
		switch {
		case err != nil || out.Left == 0 || idle == 4:
			return out, err
		case state == store.Active:
			return out, fmt.Errorf("location %v: it is to be used again: %w", id, store.ErrNeeded)
		}
		total := int64(out.Left + out.Shards)
		did, err := s.Store.RepairAt(ctx, rate, func(r store.Repaired) {
			say(Progress{fmt.Sprintf("moved %d MiB", (out.Bytes+r.Bytes)>>20), int64(out.Shards + r.Shards), total, "shards"})
		})
		out.Shards, out.Bytes = out.Shards+did.Shards, out.Bytes+did.Bytes
		if err != nil {
			return out, err
		}
		if idle++; did.Shards > 0 {
			idle = 0
		} else if err := s.Store.Snapshot(ctx); err != nil {
			return out, err
		}
		if err := s.Store.Drain(ctx, id); err != nil {
			return out, err
		}
	}
}

func (s *server) drain(w http.ResponseWriter, r *http.Request) {
	x, ok := asked(w, r, func(x Repair) int { return x.Rate })
	if !ok {
		return
	}
	id, err := parseID(r.PathValue("id"))
	if err != nil {
		answer(w, nil, err)
		return
	}
	job(w, r, func(ctx context.Context, say func(Progress)) (any, error) {
		s.log.Info("control: drain a location", "location", id)
		if err := s.Store.Drain(ctx, id); err != nil {
			return nil, err
		}
		return s.empty(ctx, id, x.Rate, say)
	})
}

func (s *server) remove(w http.ResponseWriter, r *http.Request) {
	id, err := parseID(r.PathValue("id"))
	if err != nil {
		answer(w, nil, err)
		return
	}
	job(w, r, func(ctx context.Context, say func(Progress)) (any, error) {
		_, state, err := s.Store.Held(ctx, id)
		if err != nil {
			return nil, err
		}
		if state == store.Active {
			return nil, fmt.Errorf("remove location %v: drain it first: %w", id, store.ErrNeeded)
		}
		out := Moved{Location: id.String()}
		if state == store.Draining {
			if out, err = s.empty(ctx, id, 0, say); err != nil {
				return out, err
			}
		}
		s.log.Info("control: remove a location", "location", id)
		return out, s.Members.Remove(ctx, s.Store, id)
	})
}
