package repo

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"sync"

	"hikae/repo/internal/fsx"
	"hikae/repo/internal/parity"
)

// MaxParity is the most parity that a repository may have, in per cent.
const MaxParity = parity.MaxPercent

// DefaultParity is how much AddParity makes when neither its options nor the
// repository say so, in per cent.
const DefaultParity = 3

// paritySuffix is what a sidecar's name has behind that of its file.
const paritySuffix = ".parity"

// readSidecar reads the sidecar of a file and proves that it is whole. A sidecar that
// is not comes with parity.ErrSidecar, and may be good enough for mending all the same.
func readSidecar(fsys fsx.FS, file string) ([]byte, parity.Info, error) {
	b, err := fsx.ReadFile(fsys, file+paritySuffix, parity.MaxSidecar)
	if errors.Is(err, fsx.ErrTooLarge) {
		return nil, parity.Info{}, fmt.Errorf("%w: %w", parity.ErrSidecar, err)
	}
	if err != nil {
		return nil, parity.Info{}, err
	}
	info, err := parity.Check(b)
	return b, info, err
}

// belongs proves that a sidecar was made for the file as it is.
func (f storedFile) belongs(fsys fsx.FS, info parity.Info) error {
	file, err := fsys.Open(f.path)
	if err != nil {
		return err
	}
	defer file.Close()
	fi, err := file.Stat()
	if err != nil {
		return err
	}
	var end [sha256.Size]byte
	if fi.Size() == info.Size {
		if n, err := file.ReadAt(end[:], info.Size-sha256.Size); n < len(end) {
			return err
		}
	}
	if fi.Size() != info.Size || !bytes.Equal(end[:], info.Sum[:]) {
		return fmt.Errorf("%w: it was made for another file", parity.ErrSidecar)
	}
	return nil
}

// buildSidecar makes the sidecar of a file. One that is damaged is parity.ErrFile.
func (f storedFile) buildSidecar(b *parity.Builder, fsys fsx.FS, percent int) ([]byte, error) {
	file, err := fsys.Open(f.path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	fi, err := file.Stat()
	if err != nil {
		return nil, err
	}
	return b.Build(file, fi.Size(), percent)
}

// sidecars makes parity files for what a session publishes, behind its back: nobody
// waits for them but the session's end, and a pack that is published while too many wait.
// Without one a file is as good as before, so an error costs parity and nothing else:
// AddParity makes later what is missing.
type sidecars struct {
	r       *Repository
	session string // owner of unfinished files
	percent int

	mu     sync.Mutex
	queue  chan string // nil until there is something to do
	closed bool
	done   chan struct{}
}

// sidecarsWaiting is how many files may wait for their parity: what was just written is
// read from the system's memory.
const sidecarsWaiting = 16

func (r *Repository) newSidecars(session string) *sidecars {
	return &sidecars{r: r, session: session, percent: r.config.parity()}
}

// add asks for the parity of a file that lasts.
func (s *sidecars) add(name string) {
	if s.percent == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	if s.queue == nil {
		s.queue, s.done = make(chan string, sidecarsWaiting), make(chan struct{})
		go s.work(s.queue)
	}
	s.queue <- name
}

// close waits until what was asked for is made.
func (s *sidecars) close() {
	s.mu.Lock()
	s.closed = true
	queue := s.queue
	s.queue = nil
	s.mu.Unlock()
	if queue != nil {
		close(queue)
		<-s.done
	}
}

func (s *sidecars) work(queue <-chan string) {
	defer close(s.done)
	failed := false
	var builder parity.Builder
	for name := range queue {
		if failed {
			continue
		}
		if err := s.make(&builder, name); err != nil {
			failed = !errors.Is(err, parity.ErrFile)
			s.r.log.Warn("no parity is made; hikae repair packs --parity makes it later", "file", name, "error", storageError(s.r.fs, err))
		}
	}
}

func (s *sidecars) make(builder *parity.Builder, name string) error {
	side := name + paritySuffix
	if _, err := s.r.fs.Stat(side); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	b, err := storedFile{path: name}.buildSidecar(builder, s.r.fs, s.percent)
	if err == nil {
		err = fsx.WriteFile(s.r.fs, tmpName(s.session, path.Base(side)+"-"+randomName()), side, b)
	}
	if errors.Is(err, fs.ErrExist) || errors.Is(err, fs.ErrNotExist) {
		return nil // somebody else made it, or deleted the file
	}
	return err
}

// dropParity removes the sidecar of a file that was removed.
func dropParity(fsys fsx.FS, file string) error {
	if err := fsys.Remove(file + paritySuffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// dropOrphans removes sidecars whose files are gone.
func dropOrphans(ctx context.Context, fsys fsx.FS) error {
	return walkStored(ctx, fsys, func(storedFile) error { return nil }, func(name string) error {
		// A file gets its name before its sidecar does, but both may be younger than
		// the beginning of the listing.
		if _, err := fsys.Stat(name); !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return dropParity(fsys, name)
	})
}
