// Package placetest holds an implementation of volume.Place to what the interface promises: for the tests of whoever
// implements it. It tries what Snapshot, Restore and Collect rely on, not whether what was kept outlives a crash.
package placetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"sync"
	"testing"

	"holdfast/volume"
)

// name is one that a place is asked for.
func name(kind byte, i int) string { return fmt.Sprintf("%c-%064x", kind, i) }

// Run runs the tests. empty returns a place on which nothing is, another one each time.
func Run(t *testing.T, empty func(*testing.T) volume.Place) {
	for _, c := range []struct {
		name string
		test func(*testing.T, context.Context, volume.Place)
	}{
		{"what was put is there, and what was deleted is not", keeps},
		{"a name is put twice", twice},
		{"what is too long is not given", limits},
		{"all names with a prefix are listed, once", lists},
		{"a higher epoch shuts the lower ones out", fences},
		{"a commit knows its epoch without a fence", commitFences},
		{"a commit follows the newest or is none", follows},
		{"of commits at once one is made", races},
	} {
		t.Run(c.name, func(t *testing.T) { c.test(t, t.Context(), empty(t)) })
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func want(t *testing.T, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: %v, want %v", what, err, want)
	}
}

func keeps(t *testing.T, ctx context.Context, p volume.Place) {
	for i, size := range []int{0, 1, 4096, 51376, volume.Extent + 24} {
		data := bytes.Repeat([]byte{byte(i + 1)}, size)
		_, err := p.Get(ctx, name('x', i), size)
		want(t, "what is absent", err, fs.ErrNotExist)
		given := bytes.Clone(data)
		must(t, p.Put(ctx, name('x', i), given))
		clear(given) // it is the caller's again
		got, err := p.Get(ctx, name('x', i), size)
		if err != nil || !bytes.Equal(got, data) {
			t.Errorf("%d bytes: %d came back, %v", size, len(got), err)
		}
		clear(got)
		if again, err := p.Get(ctx, name('x', i), size); err != nil || !bytes.Equal(again, data) {
			t.Errorf("what was read is shared: %v", err)
		}
	}
	must(t, p.Delete(ctx, 0, name('x', 1)))
	_, err := p.Get(ctx, name('x', 1), 1)
	want(t, "what was deleted", err, fs.ErrNotExist)
	if err := p.Delete(ctx, 0, name('x', 1)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("delete again: %v", err)
	}
	if _, err := p.Get(ctx, name('x', 2), 4096); err != nil {
		t.Errorf("its neighbour: %v", err)
	}
}

func twice(t *testing.T, ctx context.Context, p volume.Place) {
	for range 2 {
		must(t, p.Put(ctx, name('x', 1), []byte("same")))
	}
	must(t, p.Delete(ctx, 0, name('x', 1)))
	must(t, p.Put(ctx, name('x', 1), []byte("same")))
	if b, err := p.Get(ctx, name('x', 1), 4); err != nil || string(b) != "same" {
		t.Errorf("put, deleted and put: %q %v", b, err)
	}
}

func limits(t *testing.T, ctx context.Context, p volume.Place) {
	must(t, p.Put(ctx, name('x', 1), make([]byte, 100)))
	if b, err := p.Get(ctx, name('x', 1), 99); err == nil || errors.Is(err, fs.ErrNotExist) || len(b) > 99 {
		t.Errorf("100 bytes with a limit of 99: %d, %v", len(b), err)
	}
}

func lists(t *testing.T, ctx context.Context, p volume.Place) {
	const n = 2500 // more than what a page of most stores has
	var all []string
	for i := range n {
		all = append(all, name('x', i))
		must(t, p.Put(ctx, all[i], nil))
	}
	must(t, p.Put(ctx, name('p', 1), nil))
	count := func(prefix string) (got []string) {
		for s, err := range p.List(ctx, prefix) {
			must(t, err)
			got = append(got, s)
		}
		slices.Sort(got)
		return got
	}
	if got := count("x-"); !slices.Equal(got, all) {
		t.Errorf("%d names of %d", len(got), n)
	}
	if got := count("p-"); len(got) != 1 || got[0] != name('p', 1) {
		t.Errorf("another prefix: %v", got)
	}
	if got := count("m-"); len(got) != 0 {
		t.Errorf("nothing: %v", got)
	}
	for s, err := range p.List(ctx, "x-") { // a caller may stop, and delete what it reads
		must(t, err)
		must(t, p.Delete(ctx, 0, s))
		if strings.HasSuffix(s, "7") {
			break
		}
	}
}

func fences(t *testing.T, ctx context.Context, p volume.Place) {
	must(t, p.Put(ctx, name('x', 1), nil))
	must(t, p.Put(ctx, name('m', 1), nil))
	must(t, p.Fence(ctx, 5))
	want(t, "fence of 4", p.Fence(ctx, 4), volume.ErrFenced)
	want(t, "delete of 4", p.Delete(ctx, 4, name('x', 1)), volume.ErrFenced)
	want(t, "commit of 4", p.Commit(ctx, 4, "", name('m', 1)), volume.ErrFenced)
	if _, err := p.Get(ctx, name('x', 1), 0); err != nil {
		t.Errorf("it was deleted all the same: %v", err)
	}
	if newest, err := p.Newest(ctx); err != nil || newest != "" {
		t.Errorf("it was committed all the same: %q %v", newest, err)
	}
	must(t, p.Fence(ctx, 5)) // the same may say it again
	must(t, p.Commit(ctx, 5, "", name('m', 1)))
	must(t, p.Delete(ctx, 5, name('x', 1)))
}

func commitFences(t *testing.T, ctx context.Context, p volume.Place) {
	must(t, p.Put(ctx, name('m', 1), nil))
	must(t, p.Commit(ctx, 3, "", name('m', 1)))
	want(t, "fence of 2 after a commit of 3", p.Fence(ctx, 2), volume.ErrFenced)
}

func follows(t *testing.T, ctx context.Context, p volume.Place) {
	for i := range 4 {
		must(t, p.Put(ctx, name('m', i), nil))
	}
	is := func(want string) {
		t.Helper()
		if got, err := p.Newest(ctx); err != nil || got != want {
			t.Errorf("the newest is %q, want %q: %v", got, want, err)
		}
	}
	is("")
	want(t, "after one that is not the newest", p.Commit(ctx, 1, name('m', 0), name('m', 1)), volume.ErrMoved)
	is("")
	must(t, p.Commit(ctx, 1, "", name('m', 1)))
	is(name('m', 1))
	want(t, "as the first, when there is one", p.Commit(ctx, 1, "", name('m', 2)), volume.ErrMoved)
	must(t, p.Commit(ctx, 1, name('m', 1), name('m', 2)))
	want(t, "after one that was the newest", p.Commit(ctx, 1, name('m', 1), name('m', 3)), volume.ErrMoved)
	is(name('m', 2))
}

func races(t *testing.T, ctx context.Context, p volume.Place) {
	old := ""
	for round := range 20 {
		var all sync.WaitGroup
		var won [4]bool
		for i := range won {
			n := name('m', round*len(won)+i)
			must(t, p.Put(ctx, n, nil))
			all.Go(func() {
				err := p.Commit(ctx, 1, old, n)
				if won[i] = err == nil; err != nil && !errors.Is(err, volume.ErrMoved) {
					t.Error(err)
				}
			})
		}
		all.Wait()
		newest, err := p.Newest(ctx)
		must(t, err)
		n := 0
		for i, w := range won {
			if w {
				if n++; newest != name('m', round*len(won)+i) {
					t.Errorf("round %d: %d won, and the newest is %q", round, i, newest)
				}
			}
		}
		if n != 1 {
			t.Fatalf("round %d: %d commits were made", round, n)
		}
		old = newest
	}
}
