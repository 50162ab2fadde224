package fs

import (
	"bytes"
	"context"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hikae/repo"
)

// Readers of all kinds go on while generations come, go, and are pruned: whatever
// they get is right, or an error once their generation is forgotten.
func TestReadersBesideChange(t *testing.T) {
	needMount(t)
	ctx := context.Background()
	const size = 9<<20 + 4096
	images := map[int][]byte{} // by day
	for day := 1; day < 6; day++ {
		images[day] = noise(uint64(day), size)
		if day > 1 { // what both have, elsewhere
			copy(images[day][2<<20:], images[day-1][4<<20:7<<20])
		}
	}
	r := newRepo(t, images[1], images[2])
	// Another process would be the one that backs up and prunes.
	other, err := repo.Open(ctx, r.Dir(), repo.Passphrase(repoPass), repo.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	dir := mountDir(t)
	log := &lockedLog{}
	srv, err := Mount(ctx, r, dir, Options{Logger: testLog(log), Refresh: 5 * time.Millisecond, Renew: 50 * time.Millisecond, CacheBytes: 4 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := srv.Unmount(); err != nil {
			t.Error(err)
			srv.Detach()
		}
		srv.Wait()
	}()
	dog := time.AfterFunc(time.Minute, func() { t.Error("the mount hangs"); detachFully(dir) })
	defer dog.Stop()

	var mu sync.Mutex
	there := map[int]bool{1: true, 2: true} // by day; false once forgetting has begun
	var stop atomic.Bool
	var compared, lost atomic.Int64
	var readers sync.WaitGroup
	for g := range 5 {
		readers.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(g), 5))
			p := make([]byte, 1<<20)
			for !stop.Load() {
				mu.Lock()
				days := make([]int, 0, len(there))
				for day, is := range there {
					if is {
						days = append(days, day)
					}
				}
				mu.Unlock()
				day := days[rng.IntN(len(days))]
				want := images[day]
				f, err := os.Open(filepath.Join(dir, "esx1/web 01", baseName(day), "web01-flat.vmdk"))
				for i := 0; err == nil && i < 30 && !stop.Load(); i++ {
					off, n := int64(rng.IntN(size)), 4096
					if g%2 == 0 { // in order
						off, n = int64(i*200<<10), 200<<10
					}
					if i == 0 {
						unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED) // or the kernel would answer
					}
					n = int(min(int64(n), size-off))
					if _, err = f.ReadAt(p[:n], off); err == nil {
						compared.Add(1)
						if !bytes.Equal(p[:n], want[off:off+int64(n)]) {
							t.Errorf("generation of day %d at %d: other bytes", day, off)
						}
					}
				}
				if f != nil {
					f.Close()
				}
				if err != nil {
					lost.Add(1)
					mu.Lock()
					if there[day] {
						t.Errorf("generation of day %d: %v", day, err)
					}
					mu.Unlock()
				}
			}
		})
	}
	for day := 3; day < 6 && !t.Failed(); day++ {
		commit(t, other, testTime(day), images[day])
		eventually(t, "the new generation is there", func() bool {
			_, err := os.Stat(filepath.Join(dir, "esx1/web 01", baseName(day)))
			return err == nil
		})
		refs, err := other.Refs(ctx, repo.VMID{Host: "esx1", Name: "web 01"})
		if err != nil {
			t.Fatal(err)
		}
		mu.Lock()
		there[day] = true
		there[day-2] = false
		mu.Unlock()
		for _, ref := range refs {
			if ref.Time.Equal(testTime(day - 2)) {
				if err := other.Forget(ctx, []repo.Ref{ref}, repo.ForgetOptions{}); err != nil {
					t.Fatal(err)
				}
			}
		}
		if _, err := other.Prune(ctx, repo.PruneOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	stop.Store(true)
	readers.Wait()
	if compared.Load() == 0 {
		t.Error("nothing was compared")
	}
	t.Logf("%d reads compared, %d ended with their generation", compared.Load(), lost.Load())
	if t.Failed() {
		t.Logf("log: %s", log)
	}
}
