package backup

import (
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// writesAtOnce is how many pieces a copy writes at the same time: filling the page
// cache is work for a processor, and one alone is slower than reading a generation.
const writesAtOnce = 3

// writer writes pieces of one file, several at once and in no order. After the first
// failure it writes nothing more.
type writer struct {
	out     *os.File
	wrote   func(n int64) // called from any goroutine
	room    chan struct{}
	under   sync.WaitGroup
	written atomic.Int64

	mu    sync.Mutex
	begun int64 // where the last piece ends
	first error
	bad   int64 // the lowest offset of a piece that could not be written
}

// newWriter makes a writer for what comes at or after from.
func newWriter(out *os.File, from int64, wrote func(n int64)) *writer {
	return &writer{out: out, begun: from, wrote: wrote, room: make(chan struct{}, writesAtOnce)}
}

// write begins to write data at off, behind all pieces before, and calls release when
// that is over. It returns the first error of any write so far.
func (w *writer) write(data []byte, off int64, release func()) error {
	w.mu.Lock()
	err := w.first
	if err == nil {
		w.begun = off + int64(len(data))
	}
	w.mu.Unlock()
	if err != nil {
		release()
		return err
	}
	w.room <- struct{}{}
	w.under.Go(func() {
		defer func() { <-w.room }()
		defer release()
		if _, err := w.out.WriteAt(data, off); err != nil {
			w.fail(off, err)
			return
		}
		w.written.Add(int64(len(data)))
		w.wrote(int64(len(data)))
		// The disk begins at once rather than at the next sync, which would then
		// wait for all of it. Only a hint: not every file system takes it.
		_ = unix.SyncFileRange(int(w.out.Fd()), off, int64(len(data)), unix.SYNC_FILE_RANGE_WRITE)
	})
	return nil
}

func (w *writer) fail(off int64, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.first == nil {
		w.first, w.bad = err, off
	}
	w.bad = min(w.bad, off)
}

// wait waits for everything that was begun. It returns up to where all of it is written,
// and the first error of any write.
func (w *writer) wait() (done int64, err error) {
	w.under.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.first != nil {
		return min(w.bad, w.begun), w.first
	}
	return w.begun, nil
}
