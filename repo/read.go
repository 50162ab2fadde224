package repo

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"syscall"

	"hikae/repo/internal/block"
	"hikae/repo/internal/codec"
	"hikae/repo/internal/keys"
	"hikae/repo/internal/pack"
	"hikae/repo/internal/tree"
)

// reader is working memory for reading records.
type reader struct {
	pack.Scratch
	buf []byte // sealed bytes
}

// room returns a buffer of n bytes.
func (x *reader) room(n int) []byte {
	if cap(x.buf) < n {
		x.buf = make([]byte, n)
	}
	return x.buf[:n]
}

// rawSize is the plaintext size of a record of the kind.
func (r *Repository) rawSize(k block.Kind) int {
	if k.IsNode() {
		return tree.NodeSize
	}
	return r.config.BlockSize
}

// openPack lends an open pack; the caller releases it.
func (r *Repository) openPack(ctx context.Context, t pack.Type, h block.Handle) (*packEntry, error) {
	return r.packs.Get(ctx, packKey{t, h}, func(context.Context) (*pack.Pack, int64, error) {
		p, err := r.openFile(packKey{t, h})
		return p, 1, err
	})
}

// openFile opens a pack. A header that speaks of a newer format or epoch is damage, not
// news, when the file's own sum does not hold.
func (r *Repository) openFile(k packKey) (*pack.Pack, error) {
	p, err := pack.Open(r.fs, r.ring, r.config.id, k.typ, k.handle)
	if errors.Is(err, pack.ErrVersion) || errors.Is(err, keys.ErrNoEpoch) {
		good, serr := r.sumHolds(k.typ.Path(k.handle))
		if serr != nil {
			return nil, serr
		}
		if !good {
			return nil, fmt.Errorf("%w: its header is damaged (%s)", pack.ErrFormat, err.Error())
		}
	}
	return p, err
}

// sumHolds tells whether a file ends with the SHA-256 of what comes before.
func (r *Repository) sumHolds(name string) (bool, error) {
	f, err := r.fs.Open(name)
	if err != nil {
		return false, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return false, err
	}
	n := fi.Size() - sha256.Size
	if n < 0 {
		return false, nil
	}
	sum := sha256.New()
	if _, err := io.Copy(sum, io.NewSectionReader(f, 0, n)); err != nil {
		return false, err
	}
	var end [sha256.Size]byte
	if got, err := f.ReadAt(end[:], n); got < len(end) {
		return false, err
	}
	return bytes.Equal(sum.Sum(nil), end[:]), nil
}

// plausible refuses lengths that no honest record has, before memory is taken.
func (r *Repository) plausible(rec block.Record) error {
	if n, most := int(rec.Length), r.rawSize(rec.Kind)+pack.Overhead; n <= pack.Overhead || n > most {
		return fmt.Errorf("%w: a %v of %d bytes, at most %d are possible", pack.ErrFormat, rec.Kind, n, most)
	}
	return nil
}

// fetchAt reads a record from the one place it names.
func (r *Repository) fetchAt(ctx context.Context, t target) error {
	if err := r.plausible(t.rec); err != nil {
		return err
	}
	x := r.readers.Get().(*reader)
	defer r.readers.Put(x)
	sealed := x.room(int(t.rec.Length))
	e, err := r.fromPack(ctx, t.rec, sealed)
	if err != nil {
		return err
	}
	defer e.Release()
	return r.unsealTarget(e.Value(), x, t, sealed)
}

// fromPack fills b from a pack, beginning where a record lies, and lends the pack.
//
// A file that cannot be read is opened anew by whoever asks next, for on storage
// that went away and came back an open file may stay lost: NFS calls it stale, a
// file system in user space that was started again not connected. One that says so
// plainly is tried again at once.
func (r *Repository) fromPack(ctx context.Context, rec block.Record, b []byte) (*packEntry, error) {
	k := packKey{pack.TypeOf(rec.Kind), rec.Pack}
	for again := false; ; again = true {
		e, err := r.openPack(ctx, k.typ, k.handle)
		if err != nil {
			return nil, err
		}
		if err = e.Value().ReadSealed(b, int64(rec.Offset)); err == nil {
			return e, nil
		}
		e.Release()
		r.packs.Drop(k)
		if again || !errors.Is(err, syscall.ESTALE) && !errors.Is(err, syscall.ENOTCONN) {
			return nil, err
		}
	}
}

// unseal opens and decompresses a record into dst, which has its raw size.
func (r *Repository) unseal(p *pack.Pack, x *reader, rec block.Record, sealed, dst []byte) error {
	payload, err := p.Unseal(&x.Scratch, rec, len(dst), sealed)
	if err != nil {
		return err
	}
	return r.codec.Decompress(dst, rec.Kind, payload)
}

// unsealTarget is unseal, quicker for a target with room. After a failure the pack's
// file is opened anew by whoever asks next: somebody may have put a good one there.
func (r *Repository) unsealTarget(p *pack.Pack, x *reader, t target, sealed []byte) error {
	payload, err := p.Unseal(&x.Scratch, t.rec, len(t.dst), sealed)
	switch {
	case err != nil:
	case t.room:
		err = r.codec.DecompressRoomy(t.dst, t.rec.Kind, payload)
	default:
		err = r.codec.Decompress(t.dst, t.rec.Kind, payload)
	}
	if err != nil {
		r.packs.Drop(packKey{pack.TypeOf(t.rec.Kind), t.rec.Pack})
	}
	return err
}

// fetch fills dst with the plaintext of a record. The record's place is a hint;
// when it fails the index may know another one.
func (r *Repository) fetch(ctx context.Context, rec block.Record, dst []byte) error {
	return r.fetchTarget(ctx, target{rec: rec, dst: dst})
}

func (r *Repository) fetchTarget(ctx context.Context, t target) error {
	err := r.fetchAt(ctx, t)
	if err == nil || !pack.IsDamage(err) && !unreadable(err) {
		return r.readError(t.rec, err)
	}
	if r.elsewhere(ctx, t) {
		return nil
	}
	if cerr := ctx.Err(); cerr != nil {
		return cerr
	}
	return r.readError(t.rec, err)
}

// elsewhere looks for another place of the record, first in the index as it is
// known, then in segments that others may have published since.
func (r *Repository) elsewhere(ctx context.Context, t target) bool {
	rec := t.rec
	x, err := r.idx(ctx)
	if err != nil {
		r.log.Warn("no index to look for another copy", "pack", rec.Pack, "error", err)
		return false
	}
	tried := map[block.Location]bool{rec.Location: true}
	try := func(l block.Location) bool {
		if tried[l] || l.Kind.IsNode() != rec.Kind.IsNode() || l.Kind == block.Hole {
			return false
		}
		tried[l] = true
		return r.fetchAt(ctx, target{block.Record{ID: rec.ID, Location: l}, t.dst, t.room}) == nil
	}
	for again := false; ; again = true {
		found, err := x.Lookup(ctx, rec.ID, try)
		if found && err == nil {
			r.log.Debug("block found in another pack", "id", rec.ID, "missing", rec.Pack)
			return true
		}
		if again || err != nil || x.Reload(ctx) != nil {
			return false
		}
	}
}

// readError names what could not be read.
func (r *Repository) readError(rec block.Record, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded):
		return err
	case errors.Is(err, pack.ErrVersion):
		return fmt.Errorf("pack %v: %w: %w", rec.Pack, ErrVersion, err)
	case errors.Is(err, fs.ErrNotExist):
		err = errors.New("the pack is missing, and no other copy is known")
	case !pack.IsDamage(err) && !unreadable(err):
		return fmt.Errorf("read pack %v at %d: %w", rec.Pack, rec.Offset, err)
	}
	return &DamageError{Pack: rec.Pack, Offset: rec.Offset, Length: rec.Length, What: rec.Kind.String() + " " + rec.ID.String(), Err: err}
}

// readNode reads a tree node from storage.
func (r *Repository) readNode(ctx context.Context, rec block.Record) ([]byte, error) {
	if !rec.Kind.IsNode() {
		return nil, r.readError(rec, fmt.Errorf("%w: a %v where a node should be", pack.ErrFormat, rec.Kind))
	}
	node := make([]byte, tree.NodeSize)
	if err := r.fetch(ctx, rec, node); err != nil {
		return nil, err
	}
	if err := tree.Check(node); err != nil {
		return nil, r.readError(rec, fmt.Errorf("%w: %w", codec.ErrCorrupt, err))
	}
	return node, nil
}

// loadNode is readNode through the cache.
func (r *Repository) loadNode(ctx context.Context, rec block.Record) ([]byte, error) {
	e, err := r.nodes.Get(ctx, rec.ID, func(ctx context.Context) ([]byte, int64, error) {
		node, err := r.readNode(ctx, rec)
		return node, tree.NodeSize, err
	})
	if err != nil {
		return nil, err
	}
	defer e.Release() // nodes are never recycled
	return e.Value(), nil
}

// loader makes a Repository a tree.Loader without showing that to its users.
type loader struct{ *Repository }

func (l loader) Node(ctx context.Context, rec block.Record) ([]byte, error) {
	return l.loadNode(ctx, rec)
}

// loadBlock lends a block's plaintext from the cache; the caller releases it.
func (r *Repository) loadBlock(ctx context.Context, rec block.Record) (*blockEntry, error) {
	return r.blocks.Get(ctx, rec.ID, func(ctx context.Context) (*[]byte, int64, error) {
		b := r.buffers.Get().(*[]byte)
		if err := r.fetchTarget(ctx, target{rec, *b, true}); err != nil {
			r.buffers.Put(b)
			return nil, 0, err
		}
		return b, int64(len(*b)), nil
	})
}
