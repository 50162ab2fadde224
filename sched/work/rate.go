package work

import (
	"context"
	"time"

	"hikae/backup"
)

// limiter slows a backup down to so many bytes a second. It does so where the
// backup tells of bytes that it has read: while that call waits, the stream that
// made it takes nothing more, and reads only as far ahead as its buffers go.
type limiter struct {
	rate  float64
	clock func() time.Time
	phase string
	done  int64
	next  time.Time // when the bytes so far may have been read
}

// pause waits until the bytes that e tells of may have been read, or ctx ends.
// backup calls it from one goroutine at a time.
func (l *limiter) pause(ctx context.Context, e backup.Event) {
	if e.Phase != l.phase {
		l.phase, l.done = e.Phase, 0
	}
	n := e.Done - l.done
	l.done = e.Done
	if n <= 0 || e.Phase != backup.PhaseRead && e.Phase != backup.PhaseAudit {
		return
	}
	now := l.clock()
	if l.next.Before(now) {
		l.next = now // what was not used before is not made up for
	}
	took := time.Duration(float64(n) / l.rate * float64(time.Second))
	l.next = l.next.Add(took)
	wait := l.next.Sub(now)
	if wait > took+time.Minute { // the clock was set back
		l.next, wait = now.Add(took), took
	}
	t := time.NewTimer(wait)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
