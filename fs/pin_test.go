package fs

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hikae/repo"
)

// Pin is a registration that nobody counts.
func (s *fakeSource) Pin(ctx context.Context) (io.Closer, error) {
	return io.NopCloser(nil), s.wait(ctx)
}

// pinned is a source whose registrations are counted.
type pinned struct {
	*fakeSource
	mu        sync.Mutex
	open, all int
	most      int // that were open at a time
	none      int // how often the last one was closed while another was to come
	refused   atomic.Bool
	stays     bool // nothing can be removed
}

func (s *pinned) Pin(ctx context.Context) (io.Closer, error) {
	if err := s.wait(ctx); err != nil {
		return nil, err
	}
	if s.refused.Load() {
		return nil, unix.ENOSPC
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open++
	s.all++
	s.most = max(s.most, s.open)
	return closer(func() error {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.open--; s.open == 0 {
			s.none++
		}
		if s.stays {
			return unix.EPERM
		}
		return nil
	}), nil
}

type closer func() error

func (c closer) Close() error { return c() }

func (s *pinned) counts() (open, all, most, none int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.open, s.all, s.most, s.none
}

// keeping starts what keeps a mount registered, without a mount.
func keeping(t *testing.T, src source, o Options) (*pins, *lockedLog, context.CancelFunc) {
	t.Helper()
	log := &lockedLog{}
	o.Logger = testLog(log)
	if err := o.setDefaults(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	tree := newTree(ctx, src, &o, func(uint64, unix.Errno) {})
	p := newPins(src, tree.cat, &o)
	go p.keep(ctx)
	return p, log, cancel
}

func TestPinsAreRenewed(t *testing.T) {
	src := &pinned{fakeSource: &fakeSource{gens: []fakeGeneration{{Host: "h", VM: "v", Sequence: 1, Time: testTime(1)}}}}
	p, _, cancel := keeping(t, src, Options{Renew: time.Millisecond})
	p.begun(time.Minute)
	if open, all, _, _ := src.counts(); open < 1 || all < 1 {
		t.Fatalf("%d of %d are open after the first", open, all)
	}
	eventually(t, "it is renewed", func() bool { _, all, _, _ := src.counts(); return all > 20 })
	cancel()
	p.ended(time.Minute)
	if open, _, most, none := src.counts(); open != 0 || most != 2 || none != 1 {
		t.Errorf("%d are open in the end, %d were at most, %d times there was none", open, most, none)
	}
}

// Where nothing can be removed each registration leaves its files.
func TestPinsOnAppendOnlyStorage(t *testing.T) {
	src := &pinned{fakeSource: &fakeSource{}, stays: true}
	p, _, cancel := keeping(t, src, Options{Renew: time.Millisecond})
	eventually(t, "the first one was replaced", func() bool { open, all, _, _ := src.counts(); return open == 1 && all == 2 })
	time.Sleep(20 * time.Millisecond)
	cancel()
	p.ended(time.Minute)
	if _, all, _, _ := src.counts(); all != 2 || p.every != appendOnlyRenew {
		t.Errorf("%d registrations, the next one after %v", all, p.every)
	}
}

// What was forgotten is no longer shown once the new registration counts.
func TestRenewalReadsTheNamesAgain(t *testing.T) {
	gens := []fakeGeneration{{Host: "h", VM: "v", Sequence: 1, Time: testTime(1)}, {Host: "h", VM: "v", Sequence: 2, Time: testTime(2)}}
	src := &pinned{fakeSource: &fakeSource{gens: gens}}
	p, _, cancel := keeping(t, src, Options{Renew: time.Millisecond, Refresh: time.Hour})
	defer func() { cancel(); p.ended(time.Minute) }()
	ctx := context.Background()
	g, err := p.cat.generation(ctx, 1)
	if err != nil {
		t.Fatal(err)
	}
	src.forget(1)
	_, before, _, _ := src.counts()
	// The one after the next began after the name was gone.
	eventually(t, "it is renewed", func() bool { _, all, _, _ := src.counts(); return all > before+2 })
	if got, err := p.cat.generations(ctx, g.vm); err != nil || len(got) != 1 || got[0].ref.sequence != 2 {
		t.Errorf("%v, %v", got, err)
	}
	if _, err := p.cat.generation(ctx, 1); !errors.Is(err, errGone) {
		t.Errorf("the one that was forgotten: %v", err)
	}
}

func TestPinsThatFail(t *testing.T) {
	src := &pinned{fakeSource: &fakeSource{gens: []fakeGeneration{{Host: "h", VM: "v", Sequence: 1, Time: testTime(1)}}}}
	src.refused.Store(true)
	p, log, cancel := keeping(t, src, Options{Renew: 20 * time.Millisecond})
	p.begun(time.Minute)
	eventually(t, "it says so", func() bool { return strings.Contains(log.String(), "not registered") })
	src.refused.Store(false)
	eventually(t, "it tries again", func() bool { return strings.Contains(log.String(), "registered as a reader again") })
	if _, err := p.cat.list(context.Background()); err != nil {
		t.Fatal(err)
	}
	// Names that cannot be read again leave the old registration in place.
	src.fakeSource.refused.Store(true)
	_, before, _, _ := src.counts()
	eventually(t, "it says so again", func() bool { return strings.Count(log.String(), "not registered") == 2 })
	src.fakeSource.refused.Store(false)
	eventually(t, "it goes on", func() bool { _, all, _, _ := src.counts(); return all > before+5 })
	cancel()
	p.ended(time.Minute)
	if s := log.String(); strings.Count(s, "not registered") != 2 || strings.Count(s, "reader again") != 2 {
		t.Errorf("each failure is told once: %s", s)
	}
	if open, _, _, none := src.counts(); open != 0 || none != 1 {
		t.Errorf("%d are open in the end, %d times there was none", open, none)
	}
}

// Storage that does not answer holds up neither the mount nor its end.
func TestPinsThatHang(t *testing.T) {
	for _, when := range []string{"at the first", "at a later one"} {
		t.Run(when, func(t *testing.T) {
			src := &pinned{fakeSource: &fakeSource{gens: []fakeGeneration{{Host: "h", VM: "v", Sequence: 1, Time: testTime(1)}}}}
			answers := make(chan struct{})
			if when == "at the first" {
				src.stuck.Store(&answers)
			}
			p, log, cancel := keeping(t, src, Options{Renew: time.Millisecond, Timeout: 10 * time.Millisecond})
			p.begun(10 * time.Millisecond)
			src.stuck.Store(&answers)
			eventually(t, "it waits", func() bool { return src.waiting.Load() == 1 })
			eventually(t, "it says so", func() bool { return strings.Contains(log.String(), "does not answer") })
			cancel()
			p.ended(10 * time.Millisecond)
			select {
			case <-p.done:
				t.Fatal("it did not hang: the test tests nothing")
			default:
			}
			src.stuck.Store(nil)
			close(answers)
			p.ended(time.Minute)
			if open, _, _, _ := src.counts(); open != 0 {
				t.Errorf("%d are open in the end", open)
			}
			if n := strings.Count(log.String(), "does not answer"); n != 1 {
				t.Errorf("it was told %d times", n)
			}
		})
	}
}

// A true mount keeps what somebody reads from being deleted, until it registers
// anew; then the room is freed.
func TestPinnedMount(t *testing.T) {
	needMount(t)
	ctx := context.Background()
	one, two := noise(1, 6<<20), noise(2, 2<<20)
	r := newRepo(t, one, two)
	refs, err := r.Refs(ctx, repo.VMID{Host: "esx1", Name: "web 01"})
	if err != nil || len(refs) != 2 {
		t.Fatal(refs, err)
	}
	prune := func() *repo.PruneReport {
		t.Helper()
		report, err := r.Prune(ctx, repo.PruneOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return report
	}
	mounted := func(renew time.Duration) (*Server, *lockedLog) {
		log := &lockedLog{}
		dir := mountDir(t)
		srv, err := Mount(ctx, r, dir, Options{Logger: testLog(log), Refresh: time.Millisecond, Renew: renew})
		if err != nil {
			t.Fatal(err)
		}
		dog := time.AfterFunc(time.Minute, func() { t.Error("the mount hangs"); detachFully(dir) })
		t.Cleanup(func() {
			dog.Stop()
			if err := srv.Unmount(); err != nil {
				t.Error(err)
				srv.Detach()
			}
			srv.Wait()
		})
		return srv, log
	}
	srv, log := mounted(time.Hour)
	f, err := os.Open(filepath.Join(srv.Dir(), "esx1/web 01", refs[0].Name(), "web01-flat.vmdk"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := r.Forget(ctx, refs[:1], repo.ForgetOptions{}); err != nil {
		t.Fatal(err)
	}
	if report := prune(); report.PacksCondemned == 0 {
		t.Fatalf("%+v", report)
	}
	for range 2 {
		if report := prune(); report.PacksDeleted != 0 || report.PacksKeptForSessions == 0 {
			t.Fatalf("while it is read: %+v", report)
		}
	}
	got := make([]byte, len(one))
	if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, one) {
		t.Fatalf("what was forgotten reads otherwise: %v\n%s", err, log)
	}
	// Nobody holds on for ever.
	f.Close()
	if err := srv.Unmount(); err != nil {
		t.Fatal(err)
	}
	srv.Wait()
	mounted(5 * time.Millisecond)
	if report := prune(); report.PacksDeleted == 0 {
		t.Fatalf("who came later does not count: %+v", report)
	}
	commit(t, r, testTime(5), noise(3, 1<<20))
	if err := r.Forget(ctx, refs[1:], repo.ForgetOptions{}); err != nil {
		t.Fatal(err)
	}
	if report := prune(); report.PacksCondemned == 0 {
		t.Fatalf("%+v", report)
	}
	eventually(t, "a mount that goes on lets go", func() bool { return prune().PacksDeleted > 0 })
}
