package fs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"time"
)

// defaultRenew is how long a mount stays registered as the same reader. What a
// prune condemned beside it is deleted by one that runs this much later; a
// shorter time would write to the storage more often for nothing.
const defaultRenew = 10 * time.Minute

// appendOnlyRenew is the same where files can be made and not removed.
const appendOnlyRenew = 24 * time.Hour

// pins keep the mount registered as a reader, so that what it shows is not
// deleted while it is shown. A registration that lasted as long as the mount
// would keep everything that was ever shown, so now and then a new one takes the
// place of the old one: first it is made, then the names are read again, so that
// all that is shown from then on is kept by the new one, then the old one ends.
// Whoever still reads what was forgotten before gets right bytes as long as they
// are there, and then errors.
//
// All of this writes to storage that may be full, or answer no more. The mount
// goes on without it, and its end does not wait for it for long.
type pins struct {
	src   source
	cat   *catalog
	every time.Duration
	late  time.Duration // when an attempt counts as failed, though it may still succeed
	log   *slog.Logger

	held   io.Closer
	failed bool          // the last attempt; that has been logged
	first  chan struct{} // closed after the first attempt
	done   chan struct{} // closed when nothing is held any more
}

func newPins(src source, cat *catalog, o *Options) *pins {
	return &pins{
		src: src, cat: cat, every: o.Renew, late: o.Timeout, log: o.Logger,
		first: make(chan struct{}), done: make(chan struct{}),
	}
}

// keep registers and renews until ctx ends.
func (p *pins) keep(ctx context.Context) {
	defer close(p.done)
	defer func() {
		if p.held != nil {
			p.close(p.held)
		}
	}()
	timer := time.NewTimer(p.every)
	defer timer.Stop()
	for first := true; ; first = false {
		good := p.attempt(ctx)
		wait := p.every
		if !good {
			wait = max(p.every/10, time.Millisecond)
		}
		if first {
			close(p.first)
		}
		timer.Reset(wait)
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
	}
}

// attempt renews once, and tells whether that went well. Storage that keeps it
// waiting keeps waiting this goroutine only.
func (p *pins) attempt(ctx context.Context) bool {
	slow := time.AfterFunc(p.late, func() {
		if ctx.Err() == nil {
			p.log.Warn("the storage of the repository does not answer, so this mount cannot register as a reader", "waited", p.late)
		}
	})
	defer slow.Stop()
	err := p.renew(ctx)
	switch {
	case ctx.Err() != nil:
		return false
	case err != nil && !p.failed:
		p.log.Warn("the mount is not registered as a reader: what is forgotten and pruned while somebody reads it becomes an error; trying again",
			"error", err)
	case err == nil && p.failed:
		p.log.Info("the mount is registered as a reader again")
	}
	p.failed = err != nil
	return err == nil
}

func (p *pins) renew(ctx context.Context) error {
	fresh, err := p.src.Pin(ctx)
	if err != nil {
		return err
	}
	if p.held != nil {
		if err := p.cat.renew(ctx); err != nil {
			p.close(fresh)
			return fmt.Errorf("read the names again: %w", err)
		}
		p.close(p.held)
	}
	p.held = fresh
	return nil
}

// close ends a registration. On append-only storage its files stay for good, so
// there shall not be many of them.
func (p *pins) close(c io.Closer) {
	err := c.Close()
	if errors.Is(err, fs.ErrPermission) {
		p.every = max(p.every, appendOnlyRenew)
	}
	if err != nil {
		p.log.Debug("end of a registration as a reader", "error", err)
	}
}

// begun returns after the first attempt, or after a while.
func (p *pins) begun(patience time.Duration) { await(p.first, patience) }

// ended returns when nothing is registered any more, or after a while.
func (p *pins) ended(patience time.Duration) { await(p.done, patience) }

func await(c <-chan struct{}, patience time.Duration) {
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-c:
	case <-timer.C:
	}
}

// renew reads all names that anybody has asked for again.
func (c *catalog) renew(ctx context.Context) error {
	if c.unread() {
		return nil
	}
	hosts, err := c.listAged(ctx, 0)
	if err != nil {
		return err
	}
	for _, h := range hosts {
		for _, vm := range h.vms {
			if !c.forgetAge(vm) {
				continue
			}
			if _, err := c.generations(ctx, vm); err != nil {
				return err
			}
		}
	}
	return nil
}

// unread tells whether nobody has asked for any name yet.
func (c *catalog) unread() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.at.IsZero()
}

// forgetAge makes a VM's generations be listed anew, if they ever were.
func (c *catalog) forgetAge(vm *vmDir) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	listed := !vm.at.IsZero()
	vm.at = time.Time{}
	return listed
}
