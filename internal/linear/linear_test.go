package linear

import (
	"bytes"
	"context"
	"crypto/md5"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"testing"
	"time"
)

// memory is a store that does one thing after another. fault, if any, spoils it.
type memory struct {
	mu    sync.Mutex
	now   map[string][]byte
	then  map[string][]byte // the value before the last
	was   map[string][]byte // all, before the last change
	fault string
	wg    sync.WaitGroup // of what happens later
}

func newMemory(fault string) *memory {
	return &memory{now: map[string][]byte{}, then: map[string][]byte{}, was: map[string][]byte{}, fault: fault}
}

var errLost = errors.New("the answer was lost")

// is says, now and then, that a fault shows.
func (m *memory) is(fault string) bool { return m.fault == fault && rand.IntN(10) == 0 }

func (m *memory) Tag(b []byte) string { h := md5.Sum(b); return hex.EncodeToString(h[:]) }

func pause() { time.Sleep(time.Duration(rand.IntN(200)) * time.Microsecond) }

// later does f after the answer.
func (m *memory) later(f func()) {
	m.wg.Go(func() {
		time.Sleep(time.Duration(rand.IntN(3000)) * time.Microsecond)
		m.mu.Lock()
		defer m.mu.Unlock()
		f()
	})
}

func (m *memory) Get(_ context.Context, key string) ([]byte, string, error) {
	defer pause()
	pause()
	m.mu.Lock()
	defer m.mu.Unlock()
	b, ok := m.now[key]
	if old := m.then[key]; old != nil && m.is("serves stale reads") {
		b, ok = old, true
	}
	switch {
	case m.is("loses answers"):
		return nil, "", errLost
	case m.is("forgets for a moment"):
		return nil, "", ErrAbsent
	case !ok:
		return nil, "", ErrAbsent
	case m.is("tears bodies"):
		return b[:len(b)/2], m.Tag(b), nil
	case m.is("tells another's tag") && m.then[key] != nil:
		return b, m.Tag(m.then[key]), nil
	case m.is("flips a bit"):
		b = bytes.Clone(b)
		b[len(b)-1] ^= 1
		return b, m.Tag(b), nil
	}
	return b, m.Tag(b), nil
}

func (m *memory) set(key string, b []byte) {
	m.was = maps.Clone(m.now)
	if m.now[key] != nil {
		m.then[key] = m.now[key]
	}
	if m.now[key] = b; b == nil {
		delete(m.now, key)
	}
}

func (m *memory) Put(_ context.Context, key string, b []byte, when Condition) error {
	defer pause()
	pause()
	m.mu.Lock()
	defer m.mu.Unlock()
	old, ok := m.now[key]
	if when.Absent && ok || when.Match != "" && (!ok || m.Tag(old) != when.Match) {
		if m.is("ignores conditions") {
			m.set(key, b)
			return nil
		}
		return ErrCondition
	}
	switch {
	case when != (Condition{}) && m.is("refuses for nothing"):
		return ErrCondition
	case when != (Condition{}) && m.is("checks conditions too early"):
		m.mu.Unlock()
		time.Sleep(time.Millisecond)
		m.mu.Lock()
	case m.is("loses puts"):
		return nil
	case m.is("puts too late"):
		m.later(func() { m.set(key, b) })
		return nil
	case m.is("puts twice"):
		m.later(func() { m.set(key, b) })
	case m.is("refuses and puts") && when != (Condition{}):
		m.set(key, b)
		return ErrCondition
	case m.is("is down"):
		return ErrNothing
	case m.is("loses answers"):
		switch rand.IntN(3) {
		case 0: // it never happens
		case 1:
			m.set(key, b)
		case 2:
			m.later(func() {
				if old, ok := m.now[key]; !(when.Absent && ok || when.Match != "" && (!ok || m.Tag(old) != when.Match)) {
					m.set(key, b)
				}
			})
		}
		return errLost
	}
	m.set(key, b)
	return nil
}

func (m *memory) Delete(_ context.Context, key string) error {
	defer pause()
	pause()
	m.mu.Lock()
	defer m.mu.Unlock()
	old := m.now[key]
	switch {
	case m.is("loses deletes"):
		return nil
	case m.is("loses answers"):
		if rand.IntN(2) == 0 {
			m.later(func() { m.set(key, nil) })
		}
		return errLost
	}
	m.set(key, nil)
	if old != nil && m.is("undoes deletes") {
		m.later(func() { m.set(key, old) })
	}
	return nil
}

func (m *memory) List(_ context.Context, prefix string) (map[string]string, error) {
	defer pause()
	pause()
	m.mu.Lock()
	defer m.mu.Unlock()
	from := m.now
	switch {
	case m.is("lists late"):
		from = m.was
	case m.is("loses answers"):
		return nil, errLost
	}
	out := map[string]string{}
	half := m.is("lists in two steps")
	for k, b := range from {
		if strings.HasPrefix(k, prefix) && (!half || k[len(k)-1] < 'c') {
			out[k] = m.Tag(b)
		}
	}
	if half {
		m.mu.Unlock()
		time.Sleep(time.Millisecond)
		m.mu.Lock()
		for k, b := range m.now {
			if strings.HasPrefix(k, prefix) && k[len(k)-1] >= 'c' {
				out[k] = m.Tag(b)
			}
		}
	}
	return out, nil
}

// found plays rounds until one is wrong.
func found(t *testing.T, fault string, rounds int) error {
	for i := range rounds {
		m := newMemory(fault)
		h := Run(t.Context(), m, fmt.Sprintf("r%d/", i), Config{Seed: uint64(i), Sizes: []int{100, 5000}})
		m.wg.Wait()
		if err := h.Check(t.TempDir(), 20*time.Second); err != nil {
			pictured(t, err)
			return fmt.Errorf("round %d: %w", i, err)
		}
		if fault == "loses answers" && h.Unknown == 0 || fault == "is down" && h.Nothing == 0 || h.Refused == 0 || h.Done < 100 {
			t.Errorf("control: %+v", h)
		}
	}
	return nil
}

// pictured wants the picture that an error speaks of.
func pictured(t *testing.T, err error) {
	if _, page, ok := strings.Cut(err.Error(), "see "); ok {
		if b, err := os.ReadFile(page); err != nil || !bytes.Contains(b, []byte("<html")) {
			t.Errorf("no picture in %s: %v", page, err)
		}
	}
}

func TestEveryFaultIsFound(t *testing.T) {
	for _, fault := range []string{
		"serves stale reads", "forgets for a moment", "tears bodies", "tells another's tag", "flips a bit",
		"loses puts", "puts too late", "puts twice", "ignores conditions", "refuses for nothing", "refuses and puts", "checks conditions too early",
		"loses deletes", "undoes deletes", "lists late", "lists in two steps",
	} {
		t.Run(fault, func(t *testing.T) {
			t.Parallel()
			err := found(t, fault, 300)
			if err == nil {
				t.Fatal("300 rounds look right")
			}
			t.Log(err)
		})
	}
}

func TestWhatIsRightPasses(t *testing.T) {
	for _, way := range []string{"one after another", "loses answers", "is down"} {
		t.Run(way, func(t *testing.T) {
			t.Parallel()
			if err := found(t, way, 30); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestNothingKnownIsNoProof(t *testing.T) {
	h := Run(t.Context(), deaf{newMemory("")}, "p/", Config{Ops: 5})
	if err := h.Check(t.TempDir(), time.Second); err == nil || !strings.Contains(err.Error(), "too few") {
		t.Errorf("a store that never answers: %v", err)
	}
}

// deaf never answers.
type deaf struct{ *memory }

func (deaf) Get(context.Context, string) ([]byte, string, error)     { return nil, "", errLost }
func (deaf) Put(context.Context, string, []byte, Condition) error    { return errLost }
func (deaf) Delete(context.Context, string) error                    { return errLost }
func (deaf) List(context.Context, string) (map[string]string, error) { return nil, errLost }
