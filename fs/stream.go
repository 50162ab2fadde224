package fs

import (
	"sync"
	"sync/atomic"
	"time"
)

// A reader that goes through a disk in order is served from what was fetched
// before it asked. The kernel does that too, but only 128 KiB ahead unless told
// otherwise, which hides nothing when a block takes a millisecond.
const (
	minWindow   = 512 << 10
	maxWindow   = 16 << 20
	maxStep     = 8 << 20 // the most a repository fetches at a time
	streamSlack = 1 << 20 // the kernel's own reading ahead comes several requests at a time, in any order
	streamsEach = 4       // per open file: an NFS server or a loop device reads for many through one
)

// stream is one place where an open file is being read in order.
type stream struct {
	next   int64 // end of what was read
	edge   int64 // end of what was fetched ahead
	window int64 // how far to fetch ahead; 0 until a second read follows the first
	used   uint64
	second int64 // when it was last counted as active
}

// streams finds the streams in the reads of one open file. The lock is held for
// a few comparisons, never while anything is read.
type streams struct {
	mu    sync.Mutex
	s     [streamsEach]stream
	clock uint64
}

// note takes in a read of [off, off+n) and returns the area to fetch ahead,
// which is empty most of the time.
func (st *streams) note(off, n, size int64, pace *pace) (from, to int64) {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.clock++
	var s *stream
	for i := range st.s {
		c := &st.s[i]
		if c.used > 0 && (off == c.next || c.window > 0 && off > c.next-streamSlack && off < c.next+streamSlack) {
			s = c
			break
		}
	}
	if s == nil {
		s = &st.s[0]
		for i := range st.s {
			if st.s[i].used < s.used {
				s = &st.s[i]
			}
		}
		*s = stream{next: off + n, edge: off + n, used: st.clock}
		return 0, 0
	}
	s.used = st.clock
	s.next = max(s.next, off+n)
	limit := pace.limit(s)
	if s.window == 0 {
		s.window = minWindow
	}
	s.window = min(s.window, limit)
	// Fetch in large steps: whenever half of what lies ahead is used up.
	if s.edge >= size || s.edge > s.next+s.window/2 {
		return 0, 0
	}
	from = max(s.edge, s.next)
	to = min(s.next+s.window, from+maxStep, size)
	s.edge = max(s.edge, to)
	s.window = min(2*s.window, limit)
	return from, max(from, to)
}

// pace divides what may be fetched ahead among the active streams of a mount:
// more than fits into the cache would only push out what is needed next.
type pace struct {
	budget int64 // bytes, all streams together
	now    func() time.Time

	second atomic.Int64 // the current one
	count  atomic.Int64 // streams active in it
	before atomic.Int64 // and in the one before
}

// limit says how far a stream may fetch ahead, counting it as active.
func (p *pace) limit(s *stream) int64 {
	now := p.now().Unix()
	if last := p.second.Load(); last != now && p.second.CompareAndSwap(last, now) {
		n := p.count.Swap(0)
		if now-last > 1 { // nobody read for a while
			n = 0
		}
		p.before.Store(n)
	}
	if s.second != now {
		s.second = now
		p.count.Add(1)
	}
	active := max(p.count.Load(), p.before.Load(), 1)
	return max(minWindow, min(maxWindow, p.budget/active))
}
