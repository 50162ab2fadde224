package repo

import (
	"context"
	"errors"
	"fmt"
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

// write makes the file name, which must not be there.
func (u *upkeep) write(ctx context.Context, name string, b []byte) error {
	return u.put(ctx, name, func(tmp string) error { return fsx.WriteFile(u.fs, tmp, name, b) })
}

// errKept says that storage does not let a file be replaced.
var errKept = errors.New("the storage does not let a file be replaced")

// replace makes the file name, in place of one that may be there. Where that cannot be
// it is errKept, and nothing large is left behind.
func (u *upkeep) replace(ctx context.Context, name string, b []byte) error {
	return u.put(ctx, name, func(tmp string) error {
		f, err := u.fs.Create(tmp)
		if err != nil {
			return err
		}
		if err := f.Close(); err != nil {
			return err
		}
		if err = u.fs.Remove(tmp); err == nil {
			err = fsx.ReplaceFile(u.fs, tmp, name, b)
		}
		if errors.Is(err, fs.ErrPermission) {
			return fmt.Errorf("%w: %w", errKept, err)
		}
		return err
	})
}

// put runs with a name for the unfinished file that it makes.
func (u *upkeep) put(ctx context.Context, name string, run func(tmp string) error) error {
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
	return run(upkeepName + "-" + randomName())
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
