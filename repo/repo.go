package repo

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"hikae/repo/internal/block"
	"hikae/repo/internal/cache"
	"hikae/repo/internal/codec"
	"hikae/repo/internal/fsx"
	"hikae/repo/internal/index"
	"hikae/repo/internal/keys"
	"hikae/repo/internal/pack"
	"hikae/repo/internal/sealed"
)

// Secret opens a key slot. It prints as "[secret]".
type Secret = keys.Secret

// Passphrase is the secret that a person chose. The bytes count as they are: drop
// the line end of a file first.
func Passphrase(p []byte) Secret { return keys.Passphrase(p) }

// Options of Open; the zero value is good.
type Options struct {
	Clock           func() time.Time // nil is time.Now
	Logger          *slog.Logger     // nil is silence
	BlockCacheBytes int64            // plaintext blocks kept for readers; 0 is 32 MiB
	NodeCacheBytes  int64            // tree nodes kept; 0 is 24 MiB
	Workers         int              // goroutines that hash, compress and seal, or open; 0 is GOMAXPROCS
	Version         string           // of the program, for manifests
}

// maxOpenPacks bounds the file descriptors of a reader.
const maxOpenPacks = 128

// Repository is an open repository. It may be used by many goroutines.
type Repository struct {
	fs     fsx.FS
	dir    string
	config *config
	ring   *keys.Ring
	opt    Options
	log    *slog.Logger

	epochLasts atomic.Bool // the newest key epoch is sure to stay

	box     *sealed.Box
	codec   *codec.Decompressor
	hashers sync.Pool // of *hasher
	readers sync.Pool // of *reader
	buffers sync.Pool // of *[]byte, one block each, with codec.Slack to spare
	zeros   []byte    // lent out for holes

	packs  *cache.Cache[packKey, *pack.Pack]
	blocks *cache.Cache[block.ID, *[]byte]
	nodes  *cache.Cache[block.ID, []byte]

	// The index is opened by whoever needs it first: reading mostly does not.
	indexMu sync.Mutex
	index   *index.Index

	// segMu is held while a segment is written, segOwner being the session whose
	// temporary file that is; addMu makes a pack's records enter the index all
	// together, so that a segment holds all of a pack or nothing.
	segMu    sync.Mutex
	segOwner string
	addMu    sync.Mutex

	life       context.Context // ends with Close
	end        context.CancelFunc
	background sync.WaitGroup
	ahead      prefetcher
}

type packKey struct {
	typ    pack.Type
	handle block.Handle
}

// Open opens the repository in dir. It reads the config and the key files,
// nothing whose size depends on what is stored. A secret that opens no slot is
// ErrWrongPassphrase.
func Open(ctx context.Context, dir string, secret Secret, o Options) (*Repository, error) {
	fsys, err := openDir(dir)
	if err != nil {
		return nil, err
	}
	return openFS(ctx, fsys, dir, secret, o)
}

func openDir(dir string) (fsx.FS, error) {
	fsys, err := fsx.OS(dir)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return nil, fmt.Errorf("%s: %w: there is no such directory; make a repository with hikae init", dir, ErrNotRepository)
	}
	if err != nil {
		return nil, fmt.Errorf("open the repository: %w", err)
	}
	return fsys, nil
}

func openFS(ctx context.Context, fsys fsx.FS, dir string, secret Secret, o Options) (*Repository, error) {
	if o.Clock == nil {
		o.Clock = defaultClock
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.BlockCacheBytes <= 0 {
		o.BlockCacheBytes = 32 << 20
	}
	if o.NodeCacheBytes <= 0 {
		o.NodeCacheBytes = 24 << 20
	}
	if o.Workers <= 0 {
		o.Workers = runtime.GOMAXPROCS(0)
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	c, err := readConfig(fsys, dir)
	if err != nil {
		return nil, err
	}
	ring, slot, err := keys.Unlock(fsys, c.id, secret)
	freeAfter(slot.Params)
	switch {
	case errors.Is(err, keys.ErrWrongPassphrase):
		return nil, fmt.Errorf("%s: %w: %w", dir, ErrWrongPassphrase, err)
	case errors.Is(err, keys.ErrDamagedSlot):
		return nil, fmt.Errorf("%s: %w: %w", dir, ErrDamaged, err)
	case err != nil:
		return nil, fmt.Errorf("%s: %w", dir, err)
	}
	if err := c.verify(ring); err != nil {
		ring.Wipe()
		return nil, fmt.Errorf("%s: %w", dir, err)
	}
	r := &Repository{fs: fsys, dir: dir, config: c, ring: ring, opt: o, log: o.Logger}
	if r.box, err = sealed.New(ring, c.id); err != nil {
		return nil, err
	}
	if r.codec, err = codec.NewDecompressor(max(c.BlockSize, 64<<10)); err != nil {
		return nil, err
	}
	r.hashers.New = func() any { return newHasher(ring) }
	r.readers.New = func() any { return &reader{buf: make([]byte, 0, c.BlockSize+pack.Overhead)} }
	r.buffers.New = func() any {
		b := make([]byte, c.BlockSize, c.BlockSize+codec.Slack)
		return &b
	}
	byID := func(id block.ID) uint32 { return uint32(id[0]) | uint32(id[1])<<8 }
	r.packs = cache.New(maxOpenPacks, 8, func(k packKey) uint32 { return uint32(k.handle) ^ uint32(k.typ) },
		func(p *pack.Pack) { _ = p.Close() })
	r.blocks = cache.New(o.BlockCacheBytes, 8, byID, func(b *[]byte) { r.buffers.Put(b) })
	r.nodes = cache.New[block.ID, []byte](o.NodeCacheBytes, 8, byID, nil)
	r.zeros = make([]byte, 64<<10)
	r.life, r.end = context.WithCancel(context.Background())
	return r, nil
}

// Close ends the repository. Sessions must have been closed, and nothing may be
// reading.
func (r *Repository) Close() error {
	r.end()
	r.background.Wait()
	r.packs.Clear()
	r.blocks.Clear()
	r.nodes.Clear()
	r.indexMu.Lock()
	defer r.indexMu.Unlock()
	var err error
	if r.index != nil {
		err = r.index.Close()
		r.index = nil
	}
	r.box.Close()
	r.codec.Close()
	return err
}

// freeAfter gives the memory that Argon2id has filled back to the system, rather
// than let the collector grow into it.
func freeAfter(p keys.Params) {
	if p.MemoryKiB == 0 || p.MemoryKiB > 16<<10 {
		debug.FreeOSMemory()
	}
}

// BlockSize is the size of a block in bytes.
func (r *Repository) BlockSize() int { return r.config.BlockSize }

// ID is the repository's id: 32 hexadecimal digits.
func (r *Repository) ID() string { return r.config.ID }

// Dir is the directory as it was given to Open.
func (r *Repository) Dir() string { return r.dir }

// idx returns the index, opening it if nobody has yet.
func (r *Repository) idx(ctx context.Context) (*index.Index, error) {
	r.indexMu.Lock()
	defer r.indexMu.Unlock()
	if r.index != nil {
		return r.index, nil
	}
	if r.life.Err() != nil {
		return nil, ErrClosed
	}
	x, err := index.Open(ctx, r.fs, "index", r.ring, index.Options{
		Logger:   r.log,
		TempName: func() string { return tmpName(r.segOwner, "index-"+randomName()) },
	})
	if err != nil {
		return nil, err
	}
	r.index = x
	return x, nil
}

// storageError says what a person can do about storage that refuses a write.
func storageError(fsys fsx.FS, err error) error {
	var on *fs.PathError
	switch {
	case errors.Is(err, ErrReadOnly) || errors.Is(err, ErrAppendOnly):
		return err
	case errors.Is(err, fs.ErrPermission) && errors.As(err, &on) && on.Op == "remove":
		return fmt.Errorf("%w: %w", ErrAppendOnly, err)
	case errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT):
		room := "an unknown number of"
		if n, ferr := fsys.Free(); ferr == nil {
			room = fmt.Sprint(n >> 20)
		}
		return fmt.Errorf("no room left, %s MiB free; everything committed before is unhurt, make room and run again: %w", room, err)
	case errors.Is(err, syscall.EROFS) || errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w: %w", ErrReadOnly, err)
	}
	return err
}
