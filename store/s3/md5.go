package s3

import (
	"crypto/md5"
	"encoding"
	"encoding/binary"
	"hash"
	"runtime"
	"slices"
	"sync"
)

// lanes make the MD5 sums of bodies that come at once side by side: eight take about as long as one. For that each keeps
// some of its bytes until one of them has no room for more.
type lanes struct {
	mu   sync.Mutex
	open []*lane
	free [][]byte
}

const (
	laneMemory = 256 << 10
	mostLanes  = 64
)

// A lane is the sum of one body. It is a hash.Hash for one goroutine.
type lane struct {
	of    *lanes
	state [4]uint32
	size  uint64 // of what is in state
	held  []byte // what is not
	done  int    // bytes of held that are in state; only while lanes run
}

// hash returns a sum, and what ends it.
func (s *lanes) hash() (hash.Hash, func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !hasMD5x8 || len(s.open) == mostLanes {
		return md5.New(), func() {}
	}
	l := &lane{of: s}
	if n := len(s.free); n > 0 {
		l.held, s.free = s.free[n-1], s.free[:n-1]
	} else {
		l.held = make([]byte, 0, laneMemory)
	}
	l.Reset()
	s.open = append(s.open, l)
	return l, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if i := slices.Index(s.open, l); i >= 0 {
			s.open = slices.Delete(s.open, i, i+1)
			s.free = append(s.free, l.held[:0])
			l.held = nil
		}
	}
}

func (l *lane) Reset() {
	l.state, l.size, l.held = [4]uint32{0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476}, 0, l.held[:0]
}

func (l *lane) Size() int      { return md5.Size }
func (l *lane) BlockSize() int { return md5.BlockSize }

func (l *lane) Write(p []byte) (int, error) {
	l.of.mu.Lock()
	defer l.of.mu.Unlock()
	for rest := p; len(rest) > 0; {
		// Who is ahead lets others run, whose bytes then cost nothing.
		for range 4 {
			if len(l.held) < laneMemory || l.of.ready() >= min(len(l.of.open), 8) {
				break
			}
			l.of.mu.Unlock()
			runtime.Gosched()
			l.of.mu.Lock()
		}
		if len(l.held) == laneMemory {
			l.of.run(l)
		}
		n := min(len(rest), laneMemory-len(l.held))
		l.held = append(l.held, rest[:n]...)
		rest = rest[n:]
	}
	return len(p), nil
}

func (l *lane) Sum(b []byte) []byte {
	l.of.mu.Lock()
	defer l.of.mu.Unlock()
	l.of.run(l)
	return l.alone(l.held).Sum(b)
}

// alone is the package's sum of what is in state, and p.
func (l *lane) alone(p []byte) hash.Hash {
	// The form in which crypto/md5 saves itself: a mark, the state, a block's room, and the length.
	saved := append(make([]byte, 0, 4+16+64+8), "md5\x01"...)
	for _, w := range l.state {
		saved = binary.BigEndian.AppendUint32(saved, w)
	}
	saved = binary.BigEndian.AppendUint64(append(saved, make([]byte, md5.BlockSize)...), l.size)
	h := md5.New()
	if err := h.(encoding.BinaryUnmarshaler).UnmarshalBinary(saved); err != nil {
		panic(err) // TestLanes has seen that it takes it
	}
	h.Write(p)
	return h
}

// left is how many blocks of a lane are to be done.
func (l *lane) left() int { return (len(l.held) - l.done) / md5.BlockSize }

// ready is how many lanes have much to do.
func (s *lanes) ready() (n int) {
	for _, l := range s.open {
		if len(l.held) >= laneMemory/2 {
			n++
		}
	}
	return n
}

// run does all blocks of a lane, and what others have by then.
func (s *lanes) run(l *lane) {
	side := make([]*lane, 0, mostLanes)
	for _, o := range s.open {
		if o != l && o.left() > 0 {
			side = append(side, o)
		}
	}
	slices.SortFunc(side, func(a, b *lane) int { return b.left() - a.left() })
	side = append(side[:min(len(side), 7)], l)
	all := slices.Clone(side)
	for l.left() > 0 && len(side) > 1 {
		n := l.left()
		var state [4][8]uint32
		var at [8]*byte
		for i, o := range side {
			n = min(n, o.left())
			for j, w := range o.state {
				state[j][i] = w
			}
			at[i] = &o.held[o.done]
		}
		for i := len(side); i < len(at); i++ {
			at[i] = at[0]
		}
		md5x8(&state, &at, n)
		for i, o := range side {
			for j := range o.state {
				o.state[j] = state[j][i]
			}
			o.done += n * md5.BlockSize
			o.size += uint64(n * md5.BlockSize)
		}
		side = slices.DeleteFunc(side, func(o *lane) bool { return o.left() == 0 })
	}
	if n := l.left() * md5.BlockSize; n > 0 { // the others have no more
		saved, err := l.alone(l.held[l.done:][:n]).(encoding.BinaryMarshaler).MarshalBinary()
		if err != nil {
			panic(err) // it never is
		}
		for j := range l.state {
			l.state[j] = binary.BigEndian.Uint32(saved[4+4*j:])
		}
		l.done += n
		l.size += uint64(n)
	}
	for _, o := range all {
		o.held, o.done = o.held[:copy(o.held, o.held[o.done:])], 0
	}
}
