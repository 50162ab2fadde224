package index

import (
	"context"
	"errors"
	mrand "math/rand/v2"
	"sync"
	"testing"

	"hikae/repo/internal/block"
	"hikae/repo/internal/fsx"
)

// TestConcurrent has everybody at it at once; -race and the model judge.
func TestConcurrent(t *testing.T) {
	m, ring := newMem(t), newRing(t)
	x, err := Open(t.Context(), m, "index", ring, Options{CacheBytes: 1})
	must(t, err)
	defer x.Close()
	other := open(t, m, ring)
	const n = 3000
	addRange(x, 0, n)
	flush(t, x)
	var wg sync.WaitGroup
	stop := make(chan struct{})
	for g := range 4 {
		wg.Go(func() {
			r := mrand.New(mrand.NewPCG(1, uint64(g)))
			for {
				select {
				case <-stop:
					return
				default:
				}
				i := r.IntN(2 * n)
				var got []block.Location
				found, err := x.Lookup(t.Context(), idOf(i), func(l block.Location) bool {
					got = append(got, l)
					return true
				})
				if err != nil || i < n && !found || found && got[0] != rec(i).Location {
					t.Errorf("record %d: %v %v %v", i, found, got, err)
				}
			}
		})
	}
	for i := range 30 {
		addRange(x, n+i*20, n+i*20+20)
		flush(t, x)
		must(t, x.Merge(t.Context()))
		other.Add(rec(n + n + i))
		flush(t, other)
		must(t, x.Reload(t.Context()))
	}
	close(stop)
	wg.Wait()
	if d := x.Damaged(); len(d) != 0 {
		t.Error(d)
	}
	expect(t, x, 0, n+600)
}

// TestNoLockWhileReading: a read that hangs holds up nobody who does not need
// that page.
func TestNoLockWhileReading(t *testing.T) {
	m, ring := newMem(t), newRing(t)
	w := open(t, m, ring)
	addRange(w, 0, 100)
	flush(t, w)
	slow := &slowFS{FS: m, gate: make(chan struct{}), entered: make(chan struct{}, 8)}
	x := open(t, slow, ring)
	x.Add(rec(200))
	slow.on = true
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		if found, err := x.Lookup(t.Context(), idOf(5), nil); !found || err != nil {
			t.Error(found, err)
		}
	})
	<-slow.entered
	// One waits for the same page, and can stop waiting.
	wg.Go(func() {
		if _, err := x.Lookup(ctx, idOf(6), nil); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	// Others go on.
	if found, err := x.Lookup(t.Context(), idOf(200), nil); !found || err != nil {
		t.Error(found, err)
	}
	addRange(x, 300, 400)
	flush(t, x)
	x.Segments()
	cancel()
	close(slow.gate)
	wg.Wait()
	expect(t, x, 0, 100)
}

type slowFS struct {
	fsx.FS
	on            bool
	gate, entered chan struct{}
}

type slowFile struct {
	fsx.File
	s *slowFS
}

func (s *slowFS) Open(name string) (fsx.File, error) {
	f, err := s.FS.Open(name)
	if err != nil || !s.on {
		return f, err
	}
	return slowFile{f, s}, nil
}

func (f slowFile) ReadAt(p []byte, off int64) (int, error) {
	select {
	case f.s.entered <- struct{}{}:
	default:
	}
	<-f.s.gate
	return f.File.ReadAt(p, off)
}

// TestCacheBound: whatever is looked up, the cache stays within its pages and
// buffers are used again.
func TestCacheBound(t *testing.T) {
	m, ring := newMem(t), newRing(t)
	w := open(t, m, ring)
	const n = 8000
	for i := range 20 { // so many filter pages, and twice as many of records
		addRange(w, i*n/20, (i+1)*n/20)
		flush(t, w)
	}
	x, err := Open(t.Context(), m, "index", ring, Options{CacheBytes: 16 * pageSize})
	must(t, err)
	defer x.Close()
	expect(t, x, 0, n)
	if p := len(x.cache.pages); p > 16 || x.cache.filters.used.Len() > 14 || x.cache.record.used.Len() > 2 {
		t.Errorf("%d pages, %d filters, %d records", p, x.cache.filters.used.Len(), x.cache.record.used.Len())
	}
	for _, p := range x.cache.pages {
		if p.refs != 0 {
			t.Errorf("page %v has %d users", p.key, p.refs)
		}
	}
}

// TestMissCost: what is not there is found out from the filters, and those stay
// in memory.
func TestMissCost(t *testing.T) {
	m, ring := newMem(t), newRing(t)
	w := open(t, m, ring)
	const n, misses = 60000, 20000
	addRange(w, 0, n)
	flush(t, w)
	f := fsx.NewFaulty(m)
	x := open(t, f, ring)
	f.Plan(fsx.Plan{Ops: fsx.OpRead})
	for i := n; i < n+misses; i++ {
		if got := places(t, x, idOf(i)); len(got) != 0 {
			t.Fatal(got)
		}
	}
	// Five filter pages once, and pages of records for the filters' mistakes.
	if wrong := float64(f.Count()-5) / misses; wrong > 0.02 {
		t.Errorf("%.4f of the misses read a page of records", wrong)
	} else {
		t.Logf("%.4f of the misses read a page of records", wrong)
	}
}
