package esxi

import (
	"context"
	"math/rand/v2"
	"sync"
	"time"
)

// throttle admits a few data requests at a time and lets all of them wait
// together when the host says that it is busy. A host that answers 503 counts
// requests, so each requester backing off by itself would keep it busy.
type throttle struct {
	slots    chan struct{}
	now      func() time.Time
	pause    time.Duration
	longest  time.Duration
	mu       sync.Mutex
	level    int       // failures in a row, counted once a round
	round    uint64    // grows with every new pause
	shutTill time.Time // nobody starts before
}

func newThrottle(t tuning, now func() time.Time) *throttle {
	return &throttle{slots: make(chan struct{}, t.inFlight), now: now, pause: t.pause, longest: t.longest}
}

// enter waits for a slot and for the common pause to end. The round it returns
// goes back with good or bad; leave frees the slot.
func (t *throttle) enter(ctx context.Context) (round uint64, err error) {
	var waited uint64 // the round whose pause is over for us
	for {
		t.mu.Lock()
		wait, round := t.shutTill.Sub(t.now()), t.round
		t.mu.Unlock()
		if wait > 0 && waited != round {
			if err := sleep(ctx, wait); err != nil {
				return 0, err
			}
			waited = round
			continue
		}
		select {
		case t.slots <- struct{}{}:
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		}
		t.mu.Lock()
		still := t.round == round
		t.mu.Unlock()
		if still {
			return round, nil
		}
		<-t.slots // the pause began while we stood in the queue
	}
}

func (t *throttle) leave() { <-t.slots }

// bad reports that the host refused or dropped a request that began in round.
// Requests that began together make one step, not one each.
func (t *throttle) bad(round uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if round != t.round {
		return
	}
	t.round++
	t.level++
	t.shutTill = t.now().Add(jitter(t.pause, t.longest, t.level))
}

// good reports an answer; a host that answers again is asked at full speed.
func (t *throttle) good(round uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if round == t.round {
		t.level = 0
	}
}

// jitter is the pause after the n-th failure in a row: it doubles from first
// and stays under longest, and a random half of it keeps clients apart.
func jitter(first, longest time.Duration, n int) time.Duration {
	d := longest
	if n < 1 {
		n = 1
	}
	if n <= 20 && first<<(n-1) < longest {
		d = first << (n - 1)
	}
	return d/2 + time.Duration(rand.Int64N(int64(d/2)+1))
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
