package fs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

func TestEscapeName(t *testing.T) {
	for name, want := range map[string]string{
		"web01": "web01", "a b%c": "a b%c", "100%": "100%", "Büro – Server 1": "Büro – Server 1",
		"a%2fb": "a%2fb", "a%5cb%25": "a%5cb%2525", "a/b": "a%2Fb", "a%2Fb": "a%252Fb", "a%2F": "a%252F",
		".": "%2E", "..": "%2E%2E", "%2E": "%252E", "...": "...", "a\x00\n\x7f": "a%00%0A%7F", "": "%_", "%_": "%25_",
	} {
		if got := escapeName(name); got != want {
			t.Errorf("%q: got %q, want %q", name, got, want)
		}
	}
}

func TestEscapedNamesAreFileNamesAndDiffer(t *testing.T) {
	seen := map[string]string{}
	piece := rapid.SampledFrom([]string{"%", "2", "F", "E", "5", "0", "_", "~", ".", "/", "\x00", "\n", "a", "ü", strings.Repeat("/", 90)})
	rapid.Check(t, func(t *rapid.T) {
		name := strings.Join(rapid.SliceOfN(piece, 0, 6).Draw(t, "name"), "")
		got := escapeName(name)
		if got == "" || got == "." || got == ".." || len(got) > maxName || strings.ContainsAny(got, "/\x00") {
			t.Fatalf("%q gives %q", name, got)
		}
		if other, ok := seen[got]; ok && other != name {
			t.Fatalf("%q and %q both give %q", name, other, got)
		}
		seen[got] = name
	})
}

func quietLog() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

// testTree is a tree that no kernel talks to.
func testTree(t *testing.T, src *fakeSource, o Options) (*tree, *time.Time) {
	t.Helper()
	now := testTime(20)
	o.Clock = func() time.Time { return now }
	if o.Logger == nil {
		o.Logger = quietLog()
	}
	if err := o.setDefaults(); err != nil {
		t.Fatal(err)
	}
	base, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	return newTree(base, src, &o, func(uint64, unix.Errno) {}), &now
}

func (t *tree) walk(path string) (node, error) {
	ctx := context.Background()
	n, err := t.node(ctx, inoRoot)
	for _, name := range strings.Split(path, "/") {
		if err == nil && n.target != "" {
			up, _ := t.parent(ctx, n)
			n, err = t.child(ctx, up, n.target)
		}
		if err == nil && name != "" {
			n, err = t.child(ctx, n, name)
		}
	}
	return n, err
}

func TestEveryNodeIsFoundByItsNumber(t *testing.T) {
	tr, _ := testTree(t, &fakeSource{gens: oneVM()}, Options{})
	for _, path := range []string{
		"", "esx1", "esx1/web01", "esx1/db%091", "esx1/web01/latest", "esx1/web01/" + baseName(1),
		"esx1/web01/" + baseName(1) + "/web01.vmdk", "esx1/web01/" + baseName(1) + "/partitions",
		"esx1/web01/" + baseName(1) + "/partitions/web01.img",
	} {
		n, err := tr.walk(path)
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		// a fresh tree, as after a restart, knows nothing but the number
		fresh, _ := testTree(t, &fakeSource{gens: oneVM()}, Options{})
		got, err := fresh.node(context.Background(), n.ino)
		if err != nil || got.ino != n.ino || got.ident != n.ident || got.mode != n.mode || got.target != n.target {
			t.Errorf("%s: %#x is %+v, %v", path, n.ino, got, err)
		}
		up, err := fresh.parent(context.Background(), got)
		want, _ := tr.walk(path[:max(strings.LastIndex(path, "/"), 0)])
		if err != nil || up.ino != want.ino {
			t.Errorf("%s: parent is %#x, %v; want %#x", path, up.ino, err, want.ino)
		}
	}
	for _, ino := range []uint64{0, 2, kindHost << 60, kindVM<<60 | 5, inoInGeneration(77, 0), inoInGeneration(1, 900), inoInGeneration(1, placePartition|5), 9 << 60, ^uint64(0)} {
		if n, err := tr.node(context.Background(), ino); !errors.Is(err, errStale) {
			t.Errorf("%#x is %+v, %v; want stale", ino, n, err)
		}
	}
}

// A manifest copied to another VM's folder must not show one file's bytes under
// another's inode number.
func TestSequenceNumberShownTwice(t *testing.T) {
	var log strings.Builder
	gens := append(oneVM(), fakeGeneration{Host: "esx2", VM: "web01", Sequence: 2, Time: testTime(5)})
	tr, _ := testTree(t, &fakeSource{gens: gens}, Options{Logger: slog.New(slog.NewTextHandler(&log, nil))})
	if _, err := tr.walk("esx1/web01/" + baseName(2)); err != nil {
		t.Fatal(err)
	}
	if _, err := tr.walk("esx2/web01/" + baseName(5)); !errors.Is(err, errGone) {
		t.Errorf("the copy is shown: %v", err)
	}
	if _, err := tr.walk("esx2/web01/" + baseName(1)); err != nil {
		t.Error(err)
	}
	if !strings.Contains(log.String(), "sequence=2") {
		t.Errorf("not in the log: %s", log.String())
	}
}

func TestFilter(t *testing.T) {
	for _, c := range []struct {
		f    Filter
		want string
	}{
		{Filter{}, "esx1/db%091/1 esx1/web01/1 esx1/web01/2 esx2/web01/1"},
		{Filter{Hosts: []string{"esx2"}}, "esx2/web01/1"},
		{Filter{VMs: []string{"web01"}}, "esx1/web01/1 esx1/web01/2 esx2/web01/1"},
		{Filter{VMs: []string{"esx1/web01"}, Since: testTime(2)}, "esx1/web01/2"},
	} {
		tr, _ := testTree(t, &fakeSource{gens: oneVM()}, Options{Filter: c.f})
		var got []string
		hosts, err := tr.cat.list(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		for _, h := range hosts {
			for _, vm := range h.vms {
				gens, err := tr.cat.generations(context.Background(), vm)
				if err != nil {
					t.Fatal(err)
				}
				for _, g := range gens {
					got = append(got, fmt.Sprintf("%s/%s/%d", h.name, vm.name, g.ref.time.Day()))
				}
			}
		}
		if s := strings.Join(got, " "); s != c.want {
			t.Errorf("%+v shows %s, want %s", c.f, s, c.want)
		}
	}
}

// However often names are used, the repository is asked once in a while only,
// and a generation is opened once.
func TestRepositoryIsAskedSeldom(t *testing.T) {
	src := &fakeSource{gens: oneVM()}
	tr, now := testTree(t, src, Options{Refresh: time.Second})
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if _, err := tr.walk("esx1/web01/latest/../" + baseName(1) + "/web01.vmx"); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := src.lists.Load(); n > 4 { // two questions; a second round when one came between
		t.Errorf("%d lists", n)
	}
	if n := src.opens.Load(); n != 1 {
		t.Errorf("opened %d times", n)
	}
	before := src.lists.Load()
	*now = now.Add(2 * time.Second)
	if _, err := tr.walk("esx1/web01/" + baseName(1) + "/web01.vmx"); err != nil {
		t.Error(err)
	}
	if n := src.lists.Load() - before; n != 1 { // the VM's generations; its name is known
		t.Errorf("%d lists when they are old", n)
	}
	if n := src.opens.Load(); n != 1 {
		t.Errorf("opened %d times", n)
	}
}

func TestShelfIsBounded(t *testing.T) {
	src := &fakeSource{}
	for i := range 3 * shelfPlaces {
		src.add(fakeGeneration{Host: "h", VM: "v", Sequence: uint64(i + 1), Time: testTime(1).Add(time.Duration(i) * time.Hour), Files: map[string]string{"x": strings.Repeat("x", 100<<10)}})
	}
	tr, _ := testTree(t, src, Options{})
	vm, err := tr.walk("h/v")
	if err != nil {
		t.Fatal(err)
	}
	gens, err := tr.cat.generations(context.Background(), vm.vm)
	if err != nil || len(gens) != 3*shelfPlaces {
		t.Fatal(len(gens), err)
	}
	for range 2 {
		for _, g := range gens {
			if _, err := tr.shelf.open(context.Background(), g); err != nil {
				t.Fatal(err)
			}
		}
	}
	if len(tr.shelf.of) != tr.shelf.order.Len() || len(tr.shelf.of) > shelfPlaces || tr.shelf.weight > shelfWeight {
		t.Errorf("%d generations of %d bytes kept open", len(tr.shelf.of), tr.shelf.weight)
	}
	if len(tr.shelf.of) < 100 {
		t.Errorf("only %d kept", len(tr.shelf.of))
	}
}

func TestPatience(t *testing.T) {
	told := make(chan string, 10)
	p := newPatience(context.Background(), 80*time.Millisecond, 20*time.Millisecond, func(unique uint64, err error) {
		told <- fmt.Sprintf("%d %v", unique, unix.ErrnoName(toErrno(err)))
	})
	p.places = make(chan struct{}, 2)
	release := make(chan struct{})
	stuck := func(ctx context.Context) (int, error) { <-release; return 7, nil }
	open, closed := make(chan struct{}), make(chan struct{})
	close(closed)
	type result struct {
		v   int
		err error
	}
	results := make(chan result, 10)
	try1 := func(unique uint64, cancel chan struct{}, f func(context.Context) (int, error)) {
		v, err := try(p, unique, cancel, f)
		results <- result{v, err}
	}
	go try1(1, open, stuck)
	if got := <-told; got != "1 EIO" {
		t.Errorf("stuck: told %s", got)
	}
	go try1(2, closed, stuck)
	if got := <-told; got != "2 EINTR" {
		t.Errorf("interrupted: told %s", got)
	}
	// both places are taken now
	quick := func(context.Context) (int, error) { return 3, nil }
	go try1(3, open, quick)
	if got := <-told; got != "3 EIO" {
		t.Errorf("no place: told %s", got)
	}
	if r := <-results; r.v != 0 || !errors.Is(r.err, errStuck) {
		t.Errorf("no place: %+v", r)
	}
	// what comes late is not used, so that nothing is kept of it
	close(release)
	for range 2 {
		if r := <-results; r.v != 0 || r.err == nil {
			t.Errorf("late: %+v", r)
		}
	}
	// an interrupted request that is quick is finished
	try1(4, closed, quick)
	if r := <-results; r.v != 3 || r.err != nil {
		t.Errorf("quick and interrupted: %+v", r)
	}
	// its context ends when the kernel has been told
	try1(5, open, func(ctx context.Context) (int, error) { <-ctx.Done(); return 1, ctx.Err() })
	if r, got := <-results, <-told; !errors.Is(r.err, errStuck) || got != "5 EIO" {
		t.Errorf("context: %+v, told %s", r, got)
	}
	func() {
		defer func() { recover() }()
		try1(6, open, func(context.Context) (int, error) { panic("defect") })
	}()
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.list) != 0 || len(p.places) != 0 || len(told) != 0 {
		t.Errorf("%d requests, %d places, %d answers left", len(p.list), len(p.places), len(told))
	}
}

func TestReadRequests(t *testing.T) {
	spec := fakeDiskSpec{Name: "d", Size: 1<<20 + 100, Density: 256}
	src := &fakeSource{gens: []fakeGeneration{{Host: "h", VM: "v", Sequence: 1, Time: testTime(1), Disks: []fakeDiskSpec{spec}}}}
	tr, _ := testTree(t, src, Options{})
	n, err := tr.walk("h/v/latest/d-flat.vmdk")
	if err != nil {
		t.Fatal(err)
	}
	var out fuse.OpenOut
	if st := tr.Open(nil, &fuse.OpenIn{InHeader: fuse.InHeader{NodeId: n.ino}}, &out); !st.Ok() {
		t.Fatal(st)
	}
	buf := make([]byte, 100<<10)
	for _, c := range []struct {
		off, want int64
	}{{0, 100 << 10}, {12345, 100 << 10}, {1 << 20, 100}, {1<<20 + 100, 0}, {1 << 60, 0}} {
		r, st := tr.Read(nil, &fuse.ReadIn{Fh: out.Fh, Offset: uint64(c.off)}, buf)
		if !st.Ok() || int64(r.Size()) != c.want {
			t.Errorf("at %d: %v", c.off, st)
			continue
		}
		got, _ := r.Bytes(nil)
		want := make([]byte, c.want)
		spec.fill(want, c.off)
		if !bytes.Equal(got, want) {
			t.Errorf("at %d: wrong bytes", c.off)
		}
	}
	for what, in := range map[string]fuse.ReadIn{"unknown handle": {Fh: 99}, "negative": {Fh: out.Fh, Offset: 1 << 63}} {
		if _, st := tr.Read(nil, &in, buf); st.Ok() {
			t.Errorf("read of %s: %v", what, st)
		}
	}
	if st := tr.Open(nil, &fuse.OpenIn{InHeader: fuse.InHeader{NodeId: inoRoot}}, &out); st != fuse.EISDIR {
		t.Errorf("open of a folder: %v", st)
	}
	if st := tr.Open(nil, &fuse.OpenIn{InHeader: fuse.InHeader{NodeId: n.ino}, Flags: unix.O_RDWR}, &out); st != fuse.EROFS {
		t.Errorf("open for writing: %v", st)
	}
}

// A disk that answers short, or says that something does not exist, must never
// look like the end of a file.
func TestShortReadsAreErrors(t *testing.T) {
	for _, err := range []error{nil, io.EOF, errGone, unix.ENOENT, fmt.Errorf("x: %w", unix.ENOENT)} {
		c := &content{disk: &shownDisk{disk: shortDisk{err}}}
		if _, e := c.lend(context.Background(), 0, 10); toErrno(e) != unix.EIO {
			t.Errorf("%v is %v to the reader", err, toErrno(e))
		}
	}
}

type shortDisk struct{ err error }

func (shortDisk) Size() int64                                                 { return 100 }
func (d shortDisk) ReadAtContext(context.Context, []byte, int64) (int, error) { return 5, d.err }
func (d shortDisk) Lend(context.Context, int64, int64) (loan, error)          { return copied{{1, 2, 3}}, d.err }
func (shortDisk) NextData(context.Context, int64) (int64, int64, error)       { return 0, 100, nil }
func (shortDisk) Prefetch(int64, int64)                                       {}

func TestErrnos(t *testing.T) {
	for want, errs := range map[unix.Errno][]error{
		0:           {nil},
		unix.EIO:    {errDamaged, errStuck, errors.New("?"), fmt.Errorf("x: %w", unix.ESTALE), fmt.Errorf("x: %w", unix.ENXIO), io.EOF, io.ErrUnexpectedEOF, context.DeadlineExceeded},
		unix.ENOENT: {fmt.Errorf("x: %w", errGone)},
		unix.ESTALE: {fmt.Errorf("x: %w", errStale)},
		unix.EINTR:  {fmt.Errorf("x: %w", context.Canceled)},
		unix.ENXIO:  {unix.ENXIO},
		unix.EACCES: {fmt.Errorf("open: %w", unix.EACCES)},
		unix.ENFILE: {fmt.Errorf("open: %w", unix.EMFILE)},
	} {
		for _, err := range errs {
			if got := toErrno(err); got != want {
				t.Errorf("%v is %v, want %v", err, got, want)
			}
		}
	}
}

func TestComplaintsAreRare(t *testing.T) {
	var log strings.Builder
	now := testTime(1)
	c := complaints{log: slog.New(slog.NewTextHandler(&log, nil)), now: func() time.Time { return now }}
	for range 100 {
		c.about(errDamaged, "reading failed")
		c.about(errStuck, "reading failed")
		c.about(errGone, "lookup failed")
		c.about(nil, "lookup failed")
	}
	if n := strings.Count(log.String(), "\n"); n != 2 {
		t.Errorf("%d lines", n)
	}
	now = now.Add(complaintEvery)
	c.about(errDamaged, "reading failed")
	if n := strings.Count(log.String(), "\n"); n != 3 {
		t.Errorf("%d lines after a while", n)
	}
	for i := range 10 * maxComplaints {
		c.about(fmt.Errorf("%w at %d", errDamaged, i), "reading failed")
	}
	if len(c.seen) > maxComplaints {
		t.Errorf("%d complaints remembered", len(c.seen))
	}
}
