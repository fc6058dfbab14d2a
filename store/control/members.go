package control

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"holdfast/disperse"
	"holdfast/store"
	"holdfast/store/location"
)

// MembersConfig configures Members.
type MembersConfig struct {
	Dir  string                                                   // of the front end: the list is in it, and directories with a relative path are
	Keys *store.Keys                                              // name the front end to locations
	Dial func(ctx context.Context, addr string) (net.Conn, error) // nil dials TCP
	Log  *slog.Logger                                             // nil discards
}

// Members are a store's locations as its front end reaches them, and the list of them in the front end's directory.
type Members struct {
	cfg MembersConfig
	log *slog.Logger

	changing sync.Mutex // one change at a time
	mu       sync.Mutex
	all      []*held
	removed  []Place
	left     []*held             // removed since the start: the store may still have something to delete there
	begun    func(*location.Dir) // has a directory seen to; nil before Run
}

type held struct {
	place  Place
	member store.Member
	open   io.Closer
}

// list is the file that says which the locations are: the command line's, and what commands made of them.
type list struct {
	Locations []string `json:"locations"`
	Removed   []string `json:"removed,omitempty"`
}

const (
	listFile     = "locations.json"
	maxList      = 1 << 20
	maxLocations = 1 << 10
)

func parseList(b []byte) (at, removed []Place, err error) {
	var l list
	if err := json.Unmarshal(b, &l); err != nil {
		return nil, nil, err
	}
	if len(l.Locations)+len(l.Removed) > maxLocations {
		return nil, nil, fmt.Errorf("%d locations, at most %d", len(l.Locations)+len(l.Removed), maxLocations)
	}
	seen := map[disperse.Place]bool{}
	for i, text := range slices.Concat(l.Locations, l.Removed) {
		p, err := ParsePlace(text)
		if err != nil {
			return nil, nil, fmt.Errorf("location %q: %w", text, err)
		}
		if seen[p.ID()] {
			return nil, nil, fmt.Errorf("location %q: it is there twice", text)
		}
		seen[p.ID()] = true
		if i < len(l.Locations) {
			at = append(at, p)
		} else {
			removed = append(removed, p)
		}
	}
	return at, removed, nil
}

// OpenMembers opens the locations that are in the list, and those named that are not. An address that is named is newer than
// the list's; one that a command has removed stays away. otherwise is taken where there is neither list nor name. It dials
// nobody, and writes nothing: Settle does, when a store runs with them.
func OpenMembers(cfg MembersConfig, named, otherwise []Place) (m *Members, err error) {
	m = &Members{cfg: cfg, log: cmp.Or(cfg.Log, slog.New(slog.DiscardHandler))}
	file := filepath.Join(cfg.Dir, listFile)
	b, err := readLimited(file, maxList)
	listed := err == nil
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, err
	}
	var at []Place
	if listed {
		if at, m.removed, err = parseList(b); err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
	}
	if !listed && len(named) == 0 {
		named = otherwise
	}
	same := func(p Place) func(Place) bool { return func(q Place) bool { return q.ID() == p.ID() } }
	for _, p := range named {
		i := slices.IndexFunc(at, same(p))
		switch {
		case slices.ContainsFunc(m.removed, same(p)):
			m.log.Warn("a location is named that was removed: it is not used, holdfast location add has it back", "location", p.String())
		case i < 0:
			at = append(at, p)
			if listed {
				m.log.Info("a location is named that is not in the list yet", "location", p.String())
			}
		case at[i].Farm != p.Farm:
			return nil, fmt.Errorf("location %s: it is named with farm %s, the store has it with %s: a location keeps its farm", p.URL(), p.Farm, at[i].Farm)
		default:
			at[i] = p
		}
	}
	if listed && len(named) > 0 {
		for _, p := range at {
			if !slices.ContainsFunc(named, same(p)) {
				m.log.Info("a location was added by a command, and is used though the command line does not name it", "location", p.String())
			}
		}
	}
	for _, p := range at {
		h, err := m.open(p)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("location %s: %w", p.URL(), err), m.Close())
		}
		m.all = append(m.all, h)
	}
	return m, nil
}

// path is where a directory is.
func (m *Members) path(p Place) string {
	if p.Path == "" || filepath.IsAbs(p.Path) {
		return p.Path
	}
	return filepath.Join(m.cfg.Dir, p.Path)
}

// open makes a member of a place.
func (m *Members) open(p Place) (*held, error) {
	h := &held{place: p, member: store.Member{ID: p.ID(), Farm: p.Farm}}
	if p.Path != "" {
		d, err := location.Open(location.Config{Path: m.path(p), Trusted: true, Log: m.log})
		if err != nil {
			return nil, err
		}
		h.member.Location, h.open = d.As(location.Read|location.Write|location.Delete), d
		return h, nil
	}
	cert, err := location.Certificate(m.cfg.Keys.TLS())
	if err != nil {
		return nil, err
	}
	c, err := location.NewClient(location.ClientConfig{Addr: p.Addr, Pin: p.Pin, Certificate: cert, Dial: m.cfg.Dial})
	if err != nil {
		return nil, err
	}
	h.member.Location, h.open = c, c
	return h, nil
}

// All are the members, for a store's configuration.
func (m *Members) All() (all []store.Member) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, h := range m.all {
		all = append(all, h.member)
	}
	return all
}

// Places are where they are.
func (m *Members) Places() (all []Place) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, h := range m.all {
		all = append(all, h.place)
	}
	return all
}

// Run sees to the directories until ctx ends, to those that are added meanwhile too.
func (m *Members) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	defer wg.Wait()
	m.mu.Lock()
	m.begun = func(d *location.Dir) {
		wg.Go(func() {
			if err := d.Run(ctx); err != nil {
				cancel(err)
			}
		})
	}
	for _, h := range m.all {
		m.begin(h)
	}
	m.mu.Unlock()
	<-ctx.Done()
	m.mu.Lock()
	m.begun = nil
	m.mu.Unlock()
	return context.Cause(ctx)
}

// begin has a directory seen to, if Run does that. Call it with mu held.
func (m *Members) begin(h *held) {
	if d, ok := h.open.(*location.Dir); ok && m.begun != nil {
		m.begun(d)
	}
}

// Close closes all that was opened. The store does not use it any more.
func (m *Members) Close() (err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, h := range slices.Concat(m.all, m.left) {
		err = errors.Join(err, h.open.Close())
	}
	m.all, m.left = nil, nil
	return err
}

// Settle writes the list when the store runs: those that the metadata says were removed are not in it, also where the list
// was lost that said so.
func (m *Members) Settle(st *store.Store) error {
	m.changing.Lock()
	defer m.changing.Unlock()
	m.mu.Lock()
	m.all = slices.DeleteFunc(slices.Clone(m.all), func(h *held) bool {
		if state, err := st.StateOf(h.place.ID()); err != nil || state != store.Removed {
			return false
		}
		m.log.Warn("a location is named that was removed: it is not used, holdfast location add has it back", "location", h.place.String())
		m.removed, m.left = append(m.removed, h.place), append(m.left, h)
		return true
	})
	m.mu.Unlock()
	return m.Save()
}

// Save writes the list. It is durable when Save returns.
func (m *Members) Save() error {
	m.mu.Lock()
	var l list
	for _, h := range m.all {
		l.Locations = append(l.Locations, h.place.String())
	}
	for _, p := range m.removed {
		l.Removed = append(l.Removed, p.String())
	}
	m.mu.Unlock()
	b, err := json.MarshalIndent(l, "", "  ")
	if err != nil {
		return err
	}
	file := filepath.Join(m.cfg.Dir, listFile)
	tmp, err := os.CreateTemp(m.cfg.Dir, ".locations-*") // 0600
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.Write(append(b, '\n'))
	if err := errors.Join(err, tmp.Sync(), tmp.Close()); err != nil {
		return fmt.Errorf("write %s: %w", file, err)
	}
	return errors.Join(os.Rename(tmp.Name(), file), store.SyncDir(m.cfg.Dir))
}

// Add has a store use one more location. The list has it before the store does: a store that knows a location which nobody
// can find is worse than a list with one too many.
func (m *Members) Add(ctx context.Context, st *store.Store, p Place) error {
	m.changing.Lock()
	defer m.changing.Unlock()
	for _, q := range m.Places() {
		if q.ID() == p.ID() {
			return fmt.Errorf("add location %s: the store has it: %w", p.URL(), store.ErrMemberThere)
		}
	}
	if p.Path != "" && !filepath.IsAbs(p.Path) {
		return fmt.Errorf("add location %s: the path is not absolute", p.Path)
	}
	h, again := m.takeBack(p)
	if !again {
		var err error
		if h, err = m.open(p); err != nil {
			return fmt.Errorf("add location %s: %w", p.URL(), err)
		}
	}
	m.mu.Lock()
	all, removed := m.all, m.removed
	m.all = append(slices.Clip(m.all), h)
	m.removed = slices.DeleteFunc(slices.Clone(m.removed), func(q Place) bool { return q.ID() == p.ID() })
	m.mu.Unlock()
	err := m.Save()
	if err == nil {
		err = st.Add(ctx, h.member)
	}
	m.mu.Lock()
	if err == nil {
		if !again {
			m.begin(h)
		}
		m.mu.Unlock()
		return nil
	}
	m.all, m.removed = all, removed
	if again {
		m.left = append(m.left, h)
	}
	m.mu.Unlock()
	if !again {
		err = errors.Join(err, h.open.Close())
	}
	return errors.Join(err, m.Save())
}

// takeBack is the one at a place that was removed since the start: it is open.
func (m *Members) takeBack(p Place) (*held, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i, h := range m.left {
		if h.place.ID() == p.ID() && h.place.Addr == p.Addr && m.path(h.place) == m.path(p) {
			h.place = p
			m.left = slices.Delete(m.left, i, i+1)
			return h, true
		}
	}
	return nil, false
}

// Remove has a store let go of a location. The list follows the store: one that it does not use may be in it.
func (m *Members) Remove(ctx context.Context, st *store.Store, id disperse.Place) error {
	m.changing.Lock()
	defer m.changing.Unlock()
	if err := st.Remove(ctx, id); err != nil {
		return err
	}
	m.mu.Lock()
	m.all = slices.DeleteFunc(slices.Clone(m.all), func(h *held) bool {
		if h.place.ID() == id {
			m.removed, m.left = append(m.removed, h.place), append(m.left, h)
			return true
		}
		return false
	})
	m.mu.Unlock()
	return m.Save()
}

func readLimited(file string, limit int64) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = fmt.Errorf("%s: larger than %d bytes", file, limit)
	}
	return b, err
}
