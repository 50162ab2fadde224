package repo

import (
	"context"
	"log/slog"
	"strings"
	"sync"
	"testing"

	"hikae/repo/internal/fsx"
)

// logged is a log that a test can look into.
type logged struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// A reader that is always there, such as a mount, does not keep superseded segments
// for ever; it finds what was moved all the same, and nothing alarming is logged.
func TestPruneDropsSegmentsBesideReaders(t *testing.T) {
	ctx := context.Background()
	mem, r := newMem(t)
	ref, content := sparse(t, r)
	log := &logged{}
	reader, err := openFS(ctx, mem, "mem", Passphrase(passphrase), Options{
		Clock: testClock, Logger: slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelWarn})),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	d := openDisk(t, reader, ref)
	if _, err := reader.idx(ctx); err != nil { // it knows the segments as they are now
		t.Fatal(err)
	}
	pin := func() func() {
		t.Helper()
		p, err := reader.Pin(ctx)
		if err != nil {
			t.Fatal(err)
		}
		return func() { _ = p.Close() }
	}
	segments := func() (n int) {
		for _, name := range mem.Files() {
			if strings.HasPrefix(name, "index/") && !strings.HasSuffix(name, "lock") {
				n++
			}
		}
		return n
	}
	unpin := pin()
	for i := range 20 {
		without(t, r, mustBackup(t, r, VMID{"esx1", "more"}, 10+i, noise(uint64(100+i), 1)))
	}
	x, err := r.idx(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if len(x.Superseded()) == 0 {
		t.Fatal("nothing was superseded: the test tests nothing")
	}
	mustPrune(t, r, PruneOptions{}) // condemns and rewrites
	if n := len(x.Superseded()); n != 0 || segments() != len(x.Segments()) {
		t.Errorf("%d superseded segments of %d files are left beside a reader", n, segments())
	}
	young := pin() // as a mount does it: the new one first
	unpin()
	if report := mustPrune(t, r, PruneOptions{}); report.PacksDeleted == 0 {
		t.Fatalf("%+v", report)
	}
	young()
	same(t, d, content)
	if s := log.String(); s != "" {
		t.Errorf("a reader whose segments went complains: %s", s)
	}
	mustPrune(t, r, PruneOptions{})
	tidy(t, mem, r)
}

// A registration that cannot be made is an error, and leaves nothing.
func TestPinWithoutRoom(t *testing.T) {
	mem, _ := newMem(t)
	faulty := fsx.NewFaulty(mem)
	r := mustOpen(t, faulty)
	defer r.Close()
	for k := 1; ; k++ {
		faulty.Plan(fsx.Plan{Ops: fsx.OpChanges &^ fsx.OpRemove, Mode: fsx.FailOnce, At: k})
		p, err := r.Pin(context.Background())
		if !faulty.Fired() {
			if err != nil || k < 4 {
				t.Fatal(err, k)
			}
			_ = p.Close()
			break
		}
		if err == nil {
			t.Errorf("operation %d failed and nobody says so", k)
		}
	}
	for _, name := range mem.Files() {
		if strings.HasPrefix(name, sessionsDir+"/") {
			t.Errorf("%s was left behind", name)
		}
	}
}
