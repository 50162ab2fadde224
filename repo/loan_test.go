package repo

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"hikae/repo/internal/fsx"
)

// gathered copies what is on loan, and gives it back.
func gathered(l *Loan) []byte {
	defer l.Return()
	return bytes.Join(l.Parts(), nil)
}

// What is lent is what the disk holds, however many borrow, prefetch and read at
// once from a cache that is much too small.
func TestLend(t *testing.T) {
	ctx := context.Background()
	_, r := newMem(t)
	want := [][]byte{image(1, 60*testBlock+777), image(2, 40*testBlock)}
	copy(want[1][3*testBlock:], want[0][9*testBlock:30*testBlock]) // blocks that both have
	var disks []*Disk
	for i, content := range want {
		ref, err := backup(ctx, r, testVM, testClock().AddDate(0, 0, i), content, nil, whole(content))
		if err != nil {
			t.Fatal(err)
		}
		disks = append(disks, openDisk(t, r, ref))
	}
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(g), 1))
			for range 400 {
				i := rng.IntN(len(disks))
				off := rng.IntN(len(want[i]))
				n := rng.IntN(min(len(want[i])-off, 20*testBlock>>rng.IntN(12)) + 1)
				switch rng.IntN(4) {
				case 0:
					disks[i].Prefetch(int64(off), int64(n))
				case 1:
					p := make([]byte, n)
					if _, err := disks[i].ReadAt(p, int64(off)); err != nil || !bytes.Equal(p, want[i][off:off+n]) {
						t.Errorf("read %d at %d of disk %d: %v", n, off, i, err)
						return
					}
				default:
					ctx, stop := context.WithCancel(ctx)
					early := rng.IntN(4) == 0
					if early {
						stop()
					}
					l, err := disks[i].Lend(ctx, int64(off), int64(n))
					stop()
					if err != nil && (!early || !errors.Is(err, context.Canceled)) {
						t.Errorf("lend %d at %d of disk %d: %v", n, off, i, err)
						return
					}
					if err == nil && !bytes.Equal(gathered(l), want[i][off:off+n]) {
						t.Errorf("lend %d at %d of disk %d: other bytes", n, off, i)
						return
					}
				}
			}
		})
	}
	wg.Wait()
	for _, c := range [][2]int64{{-1, 4}, {0, -1}, {0, int64(len(want[0])) + 1}, {int64(len(want[0])), 1}, {1 << 62, 1 << 62}} {
		if _, err := disks[0].Lend(ctx, c[0], c[1]); err == nil {
			t.Errorf("%d bytes at %d were lent", c[1], c[0])
		}
	}
}

// A damaged block is an error for those who ask for it, and no one else.
func TestLendDamaged(t *testing.T) {
	ctx := context.Background()
	mem, r := newMem(t)
	want := image(3, 30*testBlock)
	for at := 0; at < len(want); at += testBlock {
		want[at] = byte(at/testBlock) + 1 // no holes, no block twice
	}
	ref, err := backup(ctx, r, testVM, testClock(), want, nil, whole(want))
	if err != nil {
		t.Fatal(err)
	}
	d := openDisk(t, r, ref)
	rec, err := d.tree.Lookup(ctx, loader{r}, 7)
	if err != nil {
		t.Fatal(err)
	}
	name := packKey{1, rec.Pack}.typ.Path(rec.Pack)
	good, err := fsx.ReadFile(mem, name, 1<<30)
	if err != nil {
		t.Fatal(err)
	}
	bad := bytes.Clone(good)
	bad[rec.Offset+20] ^= 1
	if err := mem.Plant(name, bad); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		d.Prefetch(0, d.Size())
		if _, err := d.Lend(ctx, 5*testBlock, 5*testBlock); !errors.Is(err, ErrDamaged) {
			t.Fatalf("a stretch with a damaged block: %v", err)
		}
		for _, at := range []int64{0, 8 * testBlock} {
			l, err := d.Lend(ctx, at, 7*testBlock)
			if err != nil || !bytes.Equal(gathered(l), want[at:at+7*testBlock]) {
				t.Fatalf("beside a damaged block: %v", err)
			}
		}
	}
	// Somebody copies the good file back; whoever has the bad one open notices.
	if err := mem.Plant(name, good); err != nil {
		t.Fatal(err)
	}
	l, err := d.Lend(ctx, 0, d.Size())
	if err != nil || !bytes.Equal(gathered(l), want) {
		t.Fatalf("after the pack was put back: %v", err)
	}
}

// away is storage on a network: it can go away, and when it comes back, files that
// were open are lost.
type away struct {
	fsx.FS
	gone  atomic.Pointer[syscall.Errno]
	epoch atomic.Int64
}

type awayFile struct {
	fsx.File
	a    *away
	born int64
}

func (a *away) Open(name string) (fsx.File, error) {
	if e := a.gone.Load(); e != nil {
		return nil, *e
	}
	f, err := a.FS.Open(name)
	return &awayFile{f, a, a.epoch.Load()}, err
}

func (f *awayFile) ReadAt(p []byte, off int64) (int, error) {
	if e := f.a.gone.Load(); e != nil {
		return 0, *e
	}
	if f.born != f.a.epoch.Load() {
		return 0, syscall.ESTALE
	}
	return f.File.ReadAt(p, off)
}

func TestStorageThatComesBack(t *testing.T) {
	ctx := context.Background()
	for _, errno := range []syscall.Errno{syscall.EIO, syscall.ENOTCONN, syscall.ESTALE, syscall.EHOSTDOWN, syscall.ETIMEDOUT} {
		mem := fsx.NewMem()
		initMem(t, mem)
		store := &away{FS: mem}
		r := mustOpen(t, store)
		want := image(4, 50*testBlock)
		ref, err := backup(ctx, r, testVM, testClock(), want, nil, whole(want))
		if err != nil {
			t.Fatal(err)
		}
		d := openDisk(t, r, ref)
		same(t, d, want)
		store.gone.Store(&errno)
		r.blocks.Clear()
		if _, err := d.Lend(ctx, 0, d.Size()); err == nil {
			t.Fatalf("%v: read all the same", errno)
		}
		d.Prefetch(0, d.Size())
		if n, err := d.ReadAt(make([]byte, d.Size()), 0); err == nil {
			t.Fatalf("%v: read %d bytes all the same", errno, n)
		}
		store.epoch.Add(1)
		store.gone.Store(nil)
		l, err := d.Lend(ctx, 0, d.Size())
		if err != nil || !bytes.Equal(gathered(l), want) {
			t.Fatalf("after %v: %v", errno, err)
		}
		// Back before anybody noticed: nobody needs to.
		store.epoch.Add(1)
		r.blocks.Clear()
		same(t, d, want)
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
