package repo

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"hikae/repo/internal/fsx"
	"hikae/repo/internal/keys"
)

// KDF is the cost of turning a passphrase into a key (Argon2id). The zero value
// is the default: 3 passes over 64 MiB in 4 threads.
type KDF struct {
	Time      uint32 // passes, 1 to 100
	MemoryKiB uint32 // 8 a thread to 1048576
	Threads   uint8  // 1 to 64
}

// InitOptions are the properties of a new repository.
type InitOptions struct {
	BlockSize  int              // bytes: 65536, 131072 or 262144; 0 is DefaultBlockSize. Fixed for ever
	Passphrase []byte           // opens the first key slot; must not be empty
	KDF        KDF              // cost of the first key slot
	Parity     int              // per cent of parity to make for what is written, 1 to MaxParity; 0 is none
	Clock      func() time.Time // nil is time.Now
}

// layout is the directories of a repository.
var layout = [...]string{"keys", "packs", "meta", "index", "generations", "condemned", "sessions", "quarantine", "verified", "tmp"}

// defaultClock is the only place where this package takes the time from the
// system.
func defaultClock() time.Time {
	return time.Now() //nolint:forbidigo // the default of every injected clock
}

// Init makes a repository in dir, which is made if it is not there and must be
// empty; what an interrupted Init left counts as nothing. A repository that is
// there already is ErrExists.
func Init(ctx context.Context, dir string, o InitOptions) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make the repository's directory: %w", err)
	}
	fsys, err := fsx.OS(dir)
	if err != nil {
		return fmt.Errorf("make the repository: %w", err)
	}
	return initFS(ctx, fsys, dir, o)
}

func initFS(ctx context.Context, fsys fsx.FS, dir string, o InitOptions) (err error) {
	if o.BlockSize == 0 {
		o.BlockSize = DefaultBlockSize
	}
	if !validBlockSize(o.BlockSize) {
		return fmt.Errorf("blocks of %d bytes: choose 65536, 131072 or 262144", o.BlockSize)
	}
	if o.Parity < 0 || o.Parity > MaxParity {
		return fmt.Errorf("%d %% of parity: choose 1 to %d, or none", o.Parity, MaxParity)
	}
	if len(o.Passphrase) == 0 {
		return errors.New("the passphrase is empty")
	}
	if o.Clock == nil {
		o.Clock = defaultClock
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("make a repository in %s: %w", dir, storageError(fsys, err))
		}
	}()
	if err := vacant(fsys); err != nil {
		return err
	}
	for _, d := range layout {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := fsx.MakeDir(fsys, d); err != nil {
			return err
		}
	}
	// Two at once would each take the other's slot for a leftover.
	lock, err := fsys.Lock("tmp/init", true, true)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := vacant(fsys); err != nil {
		return err
	}
	if err := sweep(fsys, "keys"); err != nil {
		return err
	}
	now := o.Clock()
	c, err := newConfig(o.BlockSize, o.Parity, now)
	if err != nil {
		return err
	}
	ring, err := keys.Create(rand.Reader, c.id)
	if err != nil {
		return err
	}
	defer ring.Wipe()
	secret := keys.Passphrase(o.Passphrase)
	defer secret.Wipe()
	if _, err := keys.AddSlot(fsys, ring, secret, "", now, keys.Params(o.KDF)); err != nil {
		return err
	}
	freeAfter(keys.Params(o.KDF))
	// From here on it is a repository.
	if err := fsx.WriteFile(fsys, tmpName("init", randomName()), configName, c.encode(ring)); err != nil {
		return err
	}
	_ = sweep(fsys, "tmp")
	return nil
}

// vacant tells whether a repository can be made in the directory.
func vacant(fsys fsx.FS) error {
	if _, err := fsys.Stat(configName); err == nil {
		return fmt.Errorf("a repository %w there", ErrExists)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	ours := make(map[string]bool, len(layout))
	for _, d := range layout {
		ours[d] = true
	}
	entries, err := fsys.ReadDir(".")
	if err != nil {
		return err
	}
	for _, e := range entries {
		switch {
		case e.Name() == "lost+found":
			continue // every fresh ext4 has one
		case !ours[e.Name()]:
			return fmt.Errorf("the directory is not empty: %q %w there", e.Name(), ErrExists)
		case e.Name() == "keys" || e.Name() == "tmp":
			continue // what an interrupted init leaves
		}
		inside, err := fsys.ReadDir(e.Name())
		if err != nil {
			return err
		}
		if len(inside) > 0 {
			return fmt.Errorf("the directory has no %s, but %s is not empty: a repository that lost its config? %w", configName, e.Name(), ErrExists)
		}
	}
	return nil
}

// sweep removes the files that an interrupted init left in a directory.
func sweep(fsys fsx.FS, dir string) error {
	entries, err := fsys.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := fsys.Remove(dir + "/" + e.Name()); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}
