package sched

import (
	"log/slog"
	"sync"
	"time"

	"hikae/repo"
	"hikae/sched/history"
)

// Types of events.
const (
	EventRunQueued     = "run-queued"
	EventRunStarted    = "run-started"
	EventRunEnded      = "run-ended"      // Run.State says how
	EventJobFailed     = "job-failed"     // a run failed, and the one before had not
	EventJobRecovered  = "job-recovered"  // a run went well, and the one before had failed
	EventSkipped       = "skipped"        // an occurrence, for the run before was still under way
	EventTaskStarted   = "task-started"   //
	EventTaskRetry     = "task-retry"     // it failed and is tried again
	EventTaskEnded     = "task-ended"     // Task.State says how
	EventVMStale       = "vm-stale"       // no good generation for too long
	EventVMUnprotected = "vm-unprotected" // in no job any more
	EventVMRecovered   = "vm-recovered"   // neither any more
	EventCleaned       = "cleaned"        // a snapshot that a dead run had left was removed
	EventInterrupted   = "interrupted"    // a run was found at the start that a kill or a power cut had ended
)

// Event is something that happened. It is sent after it was written into the
// history.
type Event struct {
	Time time.Time     `json:"time"`
	Type string        `json:"type"`
	Job  string        `json:"job,omitempty"`
	VM   *repo.VMID    `json:"vm,omitempty"`
	Run  *history.Run  `json:"run,omitempty"`
	Task *history.Task `json:"task,omitempty"`
	Text string        `json:"text"` // a sentence for people
}

// backlog is how many events wait for a subscriber that is busy. What is more
// than that is dropped, oldest first.
const backlog = 10000

// feed hands events to subscribers, to each in order and at its own pace.
type feed struct {
	log    *slog.Logger
	mu     sync.Mutex
	closed bool
	subs   map[*subscriber]struct{}
}

type subscriber struct {
	fn   func(Event)
	mu   sync.Mutex
	list []Event
	lost int
	wake chan struct{} // one place
	quit chan struct{}
	once sync.Once
	gone chan struct{} // closed when its goroutine has ended
}

// Subscribe has fn called for every event from now on, one after the other, by
// a goroutine of its own. What waits when Serve ends is delivered before it
// returns. cancel ends the subscription, waits for a call that is under way, and
// must not be called from within fn.
func (s *Scheduler) Subscribe(fn func(Event)) (cancel func()) {
	sub := &subscriber{fn: fn, wake: make(chan struct{}, 1), quit: make(chan struct{}), gone: make(chan struct{})}
	s.feed.mu.Lock()
	defer s.feed.mu.Unlock()
	if s.feed.closed {
		return func() {}
	}
	if s.feed.subs == nil {
		s.feed.subs = map[*subscriber]struct{}{}
	}
	s.feed.subs[sub] = struct{}{}
	go sub.pump(s.feed.log)
	return func() {
		s.feed.mu.Lock()
		delete(s.feed.subs, sub)
		s.feed.mu.Unlock()
		sub.clear()
		sub.end()
		<-sub.gone
	}
}

func (f *feed) send(e Event) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for sub := range f.subs {
		sub.put(e)
	}
}

// close ends all subscriptions once what waits is delivered, and waits for it.
func (f *feed) close() {
	f.mu.Lock()
	f.closed = true
	subs := f.subs
	f.subs = nil
	f.mu.Unlock()
	for sub := range subs {
		sub.end()
	}
	for sub := range subs {
		<-sub.gone
	}
}

func (u *subscriber) end() { u.once.Do(func() { close(u.quit) }) }

func (u *subscriber) clear() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.list = nil
}

func (u *subscriber) put(e Event) {
	u.mu.Lock()
	if len(u.list) == backlog {
		u.list = u.list[1:]
		u.lost++
	}
	u.list = append(u.list, e)
	u.mu.Unlock()
	select {
	case u.wake <- struct{}{}:
	default:
	}
}

func (u *subscriber) take() ([]Event, int) {
	u.mu.Lock()
	defer u.mu.Unlock()
	list, lost := u.list, u.lost
	u.list, u.lost = nil, 0
	return list, lost
}

func (u *subscriber) pump(log *slog.Logger) {
	defer close(u.gone)
	for ending := false; ; {
		list, lost := u.take()
		if lost > 0 {
			log.Error("a subscriber was too slow; events were lost", "lost", lost)
		}
		for _, e := range list {
			u.fn(e)
		}
		if len(list) > 0 {
			continue
		}
		if ending {
			return
		}
		select {
		case <-u.wake:
		case <-u.quit:
			ending = true
		}
	}
}
