// Package linear checks that a store of objects, used by many clients at once, answers as one would that does one thing
// after another, each at some moment between its call and its answer. It plays clients on a few keys, writes down what
// they asked and heard, and lets porcupine search for an order that explains it. What ended with an error may have
// happened, may happen later, or never: all three are explained. It is for tests, and no part of the program.
//
// Every body has a number of its own and shows it in each byte, so that a stale, a torn and a mixed answer differ.
package linear

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/anishathalye/porcupine"
)

// Objects is what is under test. Its calls may overlap.
type Objects interface {
	// Get returns an object's bytes and tag, or ErrAbsent.
	Get(ctx context.Context, key string) (body []byte, tag string, err error)
	// Put replaces an object if the condition holds, and returns ErrCondition if it did not.
	Put(ctx context.Context, key string, body []byte, when Condition) error
	// Delete removes an object, if it is there.
	Delete(ctx context.Context, key string) error
	// List returns the tags of all keys that begin with prefix, as they were at one moment.
	List(ctx context.Context, prefix string) (map[string]string, error)
	// Tag is the tag that an object of these bytes has.
	Tag(body []byte) string
}

// Condition is what must hold of an object that is put. The zero value always does.
type Condition struct {
	Absent bool   // there is none
	Match  string // there is one, and this is its tag
}

// Errors of Objects. A change that ends with any other may have happened, or happen yet.
var (
	ErrAbsent    = errors.New("object is not there")
	ErrCondition = errors.New("condition does not hold")
	// ErrNothing is for a change that certainly did not happen, and never will.
	ErrNothing = errors.New("nothing was done")
)

// maxKeys bounds the keys of a history.
const maxKeys = 8

// Config is how clients behave. The zero value is a quick one.
type Config struct {
	Clients int           // that work at the same time; 0 means 8
	Keys    int           // that they share, at most 8; 0 means 4
	Ops     int           // that each does; 0 means 40
	Sizes   []int         // of bodies, which take turns; nil means 100 bytes
	Timeout time.Duration // of one operation, after which its outcome is unknown; 0 means 10 s
	Seed    uint64        // of the choices
}

func (c *Config) fill() {
	set := func(p *int, n int) {
		if *p == 0 {
			*p = n
		}
	}
	set(&c.Clients, 8)
	set(&c.Keys, 4)
	set(&c.Ops, 40)
	c.Keys = min(c.Keys, maxKeys)
	if len(c.Sizes) == 0 {
		c.Sizes = []int{100}
	}
	if c.Timeout == 0 {
		c.Timeout = 10 * time.Second
	}
}

// kind of an operation.
type kind uint8

const (
	get kind = iota
	put
	del
	list
)

// state is the number of the body under each key, 0 where there is none.
type state [maxKeys]uint32

// input is what a client asked.
type input struct {
	kind   kind
	key    int
	body   uint32 // of a put
	absent bool   // put on condition that there is none
	match  uint32 // put on condition that this is there
}

// output is what it heard.
type output struct {
	unknown bool   // whether it happened
	refused bool   // the condition did not hold
	body    uint32 // of a get
	all     state  // of a list
}

// step is the specification: what may follow from a state.
func step(s state, in input, out output) (bool, state) {
	switch in.kind {
	case get:
		return s[in.key] == out.body, s
	case list:
		return s == out.all, s
	case del:
		s[in.key] = 0
		return true, s
	}
	holds := !in.absent && in.match == 0 || in.absent && s[in.key] == 0 || in.match != 0 && s[in.key] == in.match
	ok := out.unknown || holds != out.refused
	if holds {
		s[in.key] = in.body
	}
	return ok, s
}

// History is what clients asked and heard.
type History struct {
	Done, Unknown, Refused, Nothing int   // operations that ended well, with an unknown outcome, by their condition, without effect
	Last                            error // of those whose outcome is unknown

	ops    []porcupine.Operation
	broken []error // answers that no order explains
}

// round is a history in the making.
type round struct {
	Config
	o      Objects
	prefix string
	begin  time.Time
	next   atomic.Uint32 // number of the last body

	mu   sync.Mutex
	tags map[string]uint32 // number of the body by its tag
	h    History
}

// Run plays clients on keys that begin with prefix, where nothing may be yet, until each has done its operations or ctx
// ends.
func Run(ctx context.Context, o Objects, prefix string, c Config) *History {
	c.fill()
	r := &round{Config: c, o: o, prefix: prefix, begin: time.Now(), tags: map[string]uint32{}}
	var wg sync.WaitGroup
	for i := range c.Clients {
		wg.Go(func() { r.client(ctx, i, rand.New(rand.NewPCG(c.Seed, uint64(i)))) })
	}
	wg.Wait()
	// The last word: what is there when all have ended.
	for key := range c.Keys {
		r.ask(ctx, c.Clients, input{kind: get, key: key}, nil)
	}
	r.ask(ctx, c.Clients, input{kind: list}, nil)
	return &r.h
}

func (r *round) name(key int) string { return fmt.Sprintf("%s%c", r.prefix, 'a'+key) }

// body is the bytes with a number: as many as its turn has, and all of them its own.
func (r *round) body(n uint32) []byte {
	b := fmt.Appendf(nil, "%d %s\n", n, r.prefix)
	size := max(len(b), r.Sizes[int(n)%len(r.Sizes)])
	b = append(b, make([]byte, size-len(b))...)
	head := bytes.IndexByte(b, '\n') + 1
	rand.NewChaCha8([32]byte{byte(n), byte(n >> 8), byte(n >> 16), byte(n >> 24)}).Read(b[head:])
	return b
}

// make is a body that nobody has put yet.
func (r *round) make() (uint32, []byte) {
	n := r.next.Add(1)
	b := r.body(n)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.tags[r.o.Tag(b)] = n
	return n, b
}

// client does operations, one after another.
func (r *round) client(ctx context.Context, id int, rnd *rand.Rand) {
	var seen state // what it heard last of each key
	for n := 0; n < r.Ops && ctx.Err() == nil; {
		in := input{key: rnd.IntN(r.Keys)}
		var body []byte
		switch x := rnd.IntN(100); {
		case x < 35:
			in.kind = get
		case x < 45:
			in.kind = list
		case x < 57:
			in.kind = del
		default:
			in.kind = put
			in.body, body = r.make()
			switch {
			case x < 67:
				in.absent = true
			case x < 80:
				in.match = seen[in.key]
			}
		}
		out, err := r.ask(ctx, id, in, body)
		if errors.Is(err, ErrNothing) {
			continue
		}
		n++
		switch {
		case in.kind == get && err == nil:
			seen[in.key] = out.body
		case in.kind == put && err == nil && !out.refused:
			seen[in.key] = in.body
		}
	}
}

// ask does one operation and writes it down. After ErrNothing it has waited a little, since a server may be down.
func (r *round) ask(ctx context.Context, id int, in input, body []byte) (output, error) {
	call := time.Since(r.begin)
	opCtx, cancel := context.WithTimeout(ctx, r.Timeout)
	out, err := r.do(opCtx, in, body)
	cancel()
	back := time.Since(r.begin)
	r.note(func() {
		switch {
		case errors.Is(err, ErrNothing):
			r.h.Nothing++
			return
		case err != nil:
			r.h.Unknown++
			r.h.Last = err
			if in.kind == get || in.kind == list {
				return // a question without an answer says nothing
			}
			out.unknown, back = true, math.MaxInt64
		case out.refused:
			r.h.Refused++
		default:
			r.h.Done++
		}
		r.h.ops = append(r.h.ops, porcupine.Operation{ClientId: id, Input: in, Call: int64(call), Output: out, Return: int64(back)})
	})
	if errors.Is(err, ErrNothing) {
		select {
		case <-ctx.Done():
		case <-time.After(2 * time.Millisecond):
		}
	}
	return out, err
}

func (r *round) note(f func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f()
}

// broke notes an answer that is wrong in itself.
func (r *round) broke(format string, args ...any) {
	r.note(func() { r.h.broken = append(r.h.broken, fmt.Errorf(format, args...)) })
}

// number is the body that a tag names.
func (r *round) number(tag string) (n uint32, ok bool) {
	r.note(func() { n, ok = r.tags[tag] })
	return n, ok
}

// do asks, and translates the answer. Its error is one that leaves the outcome open, or ErrNothing.
func (r *round) do(ctx context.Context, in input, body []byte) (out output, err error) {
	switch in.kind {
	case get:
		b, tag, err := r.o.Get(ctx, r.name(in.key))
		switch {
		case errors.Is(err, ErrAbsent):
			return out, nil
		case err != nil:
			return out, err
		}
		n, ok := r.number(tag)
		switch {
		case !ok:
			r.broke("get %s: tag %q, which nobody put", r.name(in.key), tag)
		case !bytes.Equal(b, r.body(n)):
			r.broke("get %s: %d bytes %.30q are not those of tag %q, %d bytes %.30q", r.name(in.key), len(b), b, tag, len(r.body(n)), r.body(n))
		}
		out.body = n
		return out, nil
	case list:
		all, err := r.o.List(ctx, r.prefix)
		if err != nil {
			return out, err
		}
		for k := range r.Keys {
			tag, there := all[r.name(k)]
			if !there {
				continue
			}
			n, ok := r.number(tag)
			if !ok {
				r.broke("list: %s has tag %q, which nobody put", r.name(k), tag)
			}
			out.all[k] = n
			delete(all, r.name(k))
		}
		for name := range all {
			r.broke("list: %q, which nobody put", name)
		}
		return out, nil
	case del:
		return out, r.o.Delete(ctx, r.name(in.key))
	}
	when := Condition{Absent: in.absent}
	if in.match != 0 {
		when.Match = r.o.Tag(r.body(in.match))
	}
	err = r.o.Put(ctx, r.name(in.key), body, when)
	if errors.Is(err, ErrCondition) {
		if when == (Condition{}) {
			r.broke("put %s: refused by a condition that it did not have", r.name(in.key))
		}
		out.refused, err = true, nil
	}
	return out, err
}

// Check returns why no order explains the history, or that none was found in time. It writes a picture of a history that
// is wrong into dir ("" is the temporary one), as a page for a browser, and says where.
func (h *History) Check(dir string, limit time.Duration) error {
	if len(h.broken) > 0 {
		return fmt.Errorf("%d answers are wrong in themselves: %w", len(h.broken), h.broken[0])
	}
	if known := h.Done + h.Refused; known == 0 || known < h.Unknown {
		return fmt.Errorf("the outcomes of %d operations are known, of %d unknown: too few to say anything: %v", known, h.Unknown, h.Last)
	}
	model := porcupine.Model{
		Init: func() any { return state{} },
		Step: func(s, in, out any) (bool, any) { return step(s.(state), in.(input), out.(output)) },
		Hash: func(s any) uint64 {
			h := uint64(14695981039346656037) // FNV-1a over words
			for _, n := range s.(state) {
				h = (h ^ uint64(n)) * 1099511628211
			}
			return h
		},
		DescribeOperation: func(in, out any) string { return describe(in.(input), out.(output)) },
	}
	switch result, info := porcupine.CheckOperationsVerbose(model, h.ops, limit); result {
	case porcupine.Ok:
		return nil
	case porcupine.Unknown:
		return fmt.Errorf("%d operations, %d of unknown outcome: no order found in %v", len(h.ops), h.Unknown, limit)
	default:
		f, err := os.CreateTemp(dir, "linear-*.html")
		if err != nil {
			return err
		}
		defer f.Close()
		err = porcupine.Visualize(model, info, f)
		return errors.Join(fmt.Errorf("no order explains %d operations: see %s", len(h.ops), f.Name()), err)
	}
}

func describe(in input, out output) string {
	key := string(rune('a' + in.key))
	what := ""
	switch in.kind {
	case get:
		return fmt.Sprintf("get %s: %d", key, out.body)
	case list:
		return fmt.Sprintf("list: %v", out.all)
	case del:
		what = "delete " + key
	case put:
		what = fmt.Sprintf("put %s=%d", key, in.body)
		if in.absent {
			what += " if absent"
		}
		if in.match != 0 {
			what += fmt.Sprintf(" if %d", in.match)
		}
	}
	switch {
	case out.unknown:
		what += ": unknown"
	case out.refused:
		what += ": refused"
	}
	return what
}
