package fs

import (
	"math/rand/v2"
	"testing"
	"time"
)

// The detector must find every reader's place, whatever order the kernel's own
// reading ahead comes in, and leave random readers alone.
func TestStreams(t *testing.T) {
	now := testTime(1)
	newPace := func() *pace { return &pace{budget: 64 << 20, now: func() time.Time { return now }} }
	const size = 1 << 30
	t.Run("sequential", func(t *testing.T) {
		var st streams
		p := newPace()
		covered, late := int64(0), 0
		for off := int64(0); off < 256<<20; off += 128 << 10 {
			from, to := st.note(off, 128<<10, size, p)
			if to > from {
				if covered > 0 && from != covered {
					t.Fatalf("fetches %d to %d after %d", from, to, covered)
				}
				covered = to
			}
			if off > 1<<20 && covered < off+256<<10 {
				late++
			}
			if covered-off > maxWindow+2<<20 {
				t.Fatalf("%d ahead", covered-off)
			}
		}
		if late > 0 {
			t.Errorf("%d reads were not fetched ahead", late)
		}
		if covered-256<<20 < maxWindow/2 {
			t.Errorf("window has not grown: %d", covered-256<<20)
		}
	})
	t.Run("out of order", func(t *testing.T) {
		var st streams
		p := newPace()
		rng := rand.New(rand.NewPCG(1, 2))
		var fetched int64
		st.note(0, 4096, size, p)
		st.note(4096, 128<<10-4096, size, p)
		for base := int64(128 << 10); base < 64<<20; base += 512 << 10 {
			for _, i := range rng.Perm(4) {
				from, to := st.note(base+int64(i)*128<<10, 128<<10, size, p)
				fetched += to - from
			}
		}
		if fetched < 64<<20 || fetched > 64<<20+2*maxWindow {
			t.Errorf("fetched %d for 64 MiB", fetched)
		}
	})
	t.Run("random", func(t *testing.T) {
		var st streams
		p := newPace()
		rng := rand.New(rand.NewPCG(1, 2))
		var fetched int64
		for range 10000 {
			from, to := st.note(rng.Int64N(size/4096)*4096, 4096, size, p)
			fetched += to - from
		}
		if fetched > 8<<20 {
			t.Errorf("fetched %d for 40 MB of random reads", fetched)
		}
	})
	t.Run("three at once", func(t *testing.T) {
		var st streams
		p := newPace()
		var fetched [3]int64
		for i := range int64(200) {
			for r := range 3 {
				from, to := st.note(int64(r)*(300<<20)+i*128<<10, 128<<10, size, p)
				fetched[r] += to - from
			}
		}
		for r, n := range fetched {
			if n < 25<<20 {
				t.Errorf("reader %d: %d", r, n)
			}
		}
	})
	t.Run("end of the file", func(t *testing.T) {
		var st streams
		p := newPace()
		for off := int64(0); off < 3<<20; off += 128 << 10 {
			if from, to := st.note(off, 128<<10, 3<<20, p); to > 3<<20 || from > to {
				t.Fatalf("fetches %d to %d of %d", from, to, 3<<20)
			}
		}
	})
}

func TestPaceDividesTheBudget(t *testing.T) {
	now := testTime(1)
	p := &pace{budget: 32 << 20, now: func() time.Time { return now }}
	var s [16]stream
	if got := p.limit(&s[0]); got != maxWindow {
		t.Errorf("one stream: %d", got)
	}
	for i := range s {
		p.limit(&s[i])
	}
	if got := p.limit(&s[0]); got != 2<<20 {
		t.Errorf("sixteen streams: %d", got)
	}
	now = now.Add(time.Second)
	if got := p.limit(&s[0]); got != 2<<20 {
		t.Errorf("a second later, all of them counted still: %d", got)
	}
	now = now.Add(time.Second)
	if got := p.limit(&s[0]); got != maxWindow {
		t.Errorf("when the others are idle: %d", got)
	}
}
