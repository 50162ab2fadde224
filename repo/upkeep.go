package repo

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"path"
	"strings"
	"sync"
	"time"

	"hikae/repo/internal/fsx"
)

// upkeepName is the lock and, with a dash, the beginning of the unfinished files of
// those who write without keys and sessions: dates of verification, parity, mended
// packs. Who holds the lock is the only one of them that has an unfinished file.
const upkeepName = tmpDir + "/upkeep"

// upkeep writes files without a session.
type upkeep struct {
	fs fsx.FS

	mu    sync.Mutex
	swept bool
}

// write makes the file name by put, fsx.WriteFile or fsx.ReplaceFile.
func (u *upkeep) write(ctx context.Context, name string, b []byte, put func(fsys fsx.FS, tmp, name string, b []byte) error) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, dir := range []string{tmpDir, path.Dir(name)} {
		// Copies of a repository may lack its empty directories, old ones do.
		if _, err := u.fs.Stat(dir); errors.Is(err, fs.ErrNotExist) {
			if err := fsx.MakeDir(u.fs, dir); err != nil {
				return err
			}
		}
	}
	lock, err := waitForLock(ctx, u.fs, upkeepName)
	if err != nil {
		return err
	}
	defer lock.Close()
	if !u.swept {
		u.swept = true
		list, err := u.fs.ReadDir(tmpDir)
		if err != nil {
			return err
		}
		for _, e := range list {
			if p := path.Join(tmpDir, e.Name()); strings.HasPrefix(p, upkeepName+"-") {
				_ = u.fs.Remove(p) // where nothing can be removed it does no harm
			}
		}
	}
	return put(u.fs, upkeepName+"-"+randomName(), name, b)
}

// waitForLock waits until it has the exclusive lock.
func waitForLock(ctx context.Context, fsys fsx.FS, name string) (io.Closer, error) {
	for wait := time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		lock, err := fsys.Lock(name, true, false)
		if !errors.Is(err, fsx.ErrLocked) {
			return lock, err
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}
