package cache

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
)

func id(k int) uint32 { return uint32(k) }

func TestLoadsOnceAndFreesOnce(t *testing.T) {
	var loads, frees atomic.Int64
	c := New(10, 2, id, func(*int) { frees.Add(1) })
	load := func(k int) func(context.Context) (*int, int64, error) {
		return func(context.Context) (*int, int64, error) {
			loads.Add(1)
			return &k, 1, nil
		}
	}
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(1, uint64(g)))
			for range 2000 {
				k := rng.IntN(40)
				e, err := c.Get(context.Background(), k, load(k))
				if err != nil || *e.Value() != k {
					t.Errorf("key %d: %v", k, err)
					return
				}
				if rng.IntN(50) == 0 {
					c.Drop(k)
				}
				e.Release()
			}
		})
	}
	wg.Wait()
	if kept := loads.Load() - frees.Load(); kept > 10 || kept < 1 {
		t.Fatalf("%d values kept, 10 is the limit", kept)
	}
	c.Clear()
	if loads.Load() != frees.Load() {
		t.Fatalf("%d loaded, %d freed", loads.Load(), frees.Load())
	}
}

func TestSingleFlight(t *testing.T) {
	c := New[int, int](10, 1, id, nil)
	inside, leave := make(chan struct{}), make(chan struct{})
	go func() {
		e, err := c.Get(context.Background(), 1, func(context.Context) (int, int64, error) {
			close(inside)
			<-leave
			return 7, 1, nil
		})
		if err == nil {
			e.Release()
		}
	}()
	<-inside
	done := make(chan int)
	for range 3 {
		go func() {
			e, err := c.Get(context.Background(), 1, func(context.Context) (int, int64, error) {
				return 0, 0, errors.New("loaded twice")
			})
			if err != nil {
				t.Error(err)
				done <- 0
				return
			}
			defer e.Release()
			done <- e.Value()
		}()
	}
	gone, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := c.Get(gone, 1, nil); !errors.Is(err, context.Canceled) {
		t.Fatalf("waiting with an ended context: %v", err)
	}
	close(leave)
	for range 3 {
		if v := <-done; v != 7 {
			t.Fatal(v)
		}
	}
}

func TestLeaderGivesUp(t *testing.T) {
	c := New[int, int](10, 1, id, nil)
	inside := make(chan struct{})
	ctx, cancel := context.WithCancel(context.Background())
	go c.Get(ctx, 1, func(ctx context.Context) (int, int64, error) {
		close(inside)
		<-ctx.Done()
		return 0, 0, ctx.Err()
	})
	<-inside
	got := make(chan int)
	go func() {
		e, err := c.Get(context.Background(), 1, func(context.Context) (int, int64, error) { return 5, 1, nil })
		if err != nil {
			t.Error(err)
			got <- 0
			return
		}
		defer e.Release()
		got <- e.Value()
	}()
	cancel()
	if v := <-got; v != 5 {
		t.Fatal("a waiter failed because the first one gave up")
	}
}

func TestErrorsAreNotKept(t *testing.T) {
	c := New(10, 1, id, func(int) {})
	boom := errors.New("boom")
	if _, err := c.Get(context.Background(), 1, func(context.Context) (int, int64, error) { return 0, 0, boom }); !errors.Is(err, boom) {
		t.Fatal(err)
	}
	if e, err := c.Lookup(context.Background(), 1); e != nil || err != nil {
		t.Fatal(e, err)
	}
	e, err := c.Get(context.Background(), 1, func(context.Context) (int, int64, error) { return 3, 1, nil })
	if err != nil {
		t.Fatal(err)
	}
	e.Release()
	if e, err = c.Lookup(context.Background(), 1); err != nil || e == nil || e.Value() != 3 {
		t.Fatal(e, err)
	}
	e.Release()
}

// A claim is a loan to everybody but the one who loads.
func TestClaim(t *testing.T) {
	ctx := context.Background()
	var freed []int
	c := New(1, 1, id, func(v int) { freed = append(freed, v) })
	e, mine := c.Claim(1, false)
	if !mine {
		t.Fatal("somebody else loads what nobody asked for")
	}
	other, mine := c.Claim(1, false)
	if mine {
		t.Fatal("two load the same")
	}
	stopped, stop := context.WithCancel(ctx)
	stop()
	third, _ := c.Claim(1, false)
	if err := third.Wait(stopped); !errors.Is(err, context.Canceled) {
		t.Fatalf("waiting with a context that ended: %v", err)
	}
	e.Keep(7, 1)
	if err := other.Wait(ctx); err != nil || other.Value() != 7 || e.Value() != 7 {
		t.Fatalf("%v, %d", err, other.Value())
	}
	// Out of the cache, but on loan twice.
	c.Drop(1)
	other.Release()
	if len(freed) > 0 {
		t.Fatal("freed while on loan")
	}
	e.Release()
	if len(freed) != 1 {
		t.Fatalf("freed %d times", len(freed))
	}
	// A failed load ends the others' loans; each can try for itself.
	e, _ = c.Claim(2, false)
	other, _ = c.Claim(2, false)
	e.Fail()
	if err := other.Wait(ctx); err == nil {
		t.Fatal("a value that nobody loaded")
	}
	if _, mine := c.Claim(2, false); !mine {
		t.Fatal("nobody may try again")
	}
}

// What is claimed without renewing leaves in the order in which it came.
func TestClaimRenews(t *testing.T) {
	for _, renew := range []bool{false, true} {
		c := New[int, int](2, 1, id, nil)
		for k := 1; k <= 2; k++ {
			e, _ := c.Claim(k, false)
			e.Keep(k, 1)
			e.Release()
		}
		e, _ := c.Claim(1, renew)
		if err := e.Wait(context.Background()); err != nil {
			t.Fatal(err)
		}
		e.Release()
		e, _ = c.Claim(3, false)
		e.Keep(3, 1)
		e.Release()
		if _, gone := c.Claim(1, false); gone == renew {
			t.Errorf("renewed %v, and gone %v", renew, gone)
		}
	}
}
