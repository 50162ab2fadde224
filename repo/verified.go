package repo

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"time"

	"hikae/repo/internal/fsx"
)

// Verified says when the files of a repository were last proved whole by a scrub, or
// by a check that read all data. Files are packs, index segments, manifests and the
// like. The dates are notes for the operator: whoever can write can write them, too.
type Verified struct {
	Packs      int64     // that are there
	PacksNever int64     // of these: never verified
	Files      int64     // that are there, packs among them
	FilesNever int64     // of these: never verified
	Oldest     time.Time // the longest ago that any of the others was; zero if there are none
}

// Verified tells when what is stored was last verified. It lists all files.
func (r *Repository) Verified(ctx context.Context) (Verified, error) {
	v, err := verified(ctx, r.fs, r.config.id, r.opt.Clock())
	if err != nil {
		return v, fmt.Errorf("find out what was verified: %w", err)
	}
	return v, nil
}

func verified(ctx context.Context, fsys fsx.FS, id [16]byte, now time.Time) (Verified, error) {
	var v Verified
	dates, _, err := readDates(ctx, fsys, id, now)
	if err != nil {
		return v, err
	}
	err = walkStored(ctx, fsys, func(f storedFile) error {
		v.count(f, dates[dateKeyOf(f.path)])
		return nil
	}, nil)
	return v, err
}

// count adds a file that was verified at the time date, 0 for never.
func (v *Verified) count(f storedFile, date int64) {
	one := func(all, never *int64) {
		*all++
		if date == 0 {
			*never++
		}
	}
	one(&v.Files, &v.FilesNever)
	if f.kind == storedPack {
		one(&v.Packs, &v.PacksNever)
	}
	if at := time.Unix(date, 0).UTC(); date != 0 && (v.Oldest.IsZero() || at.Before(v.Oldest)) {
		v.Oldest = at
	}
}

// Files in verified/ hold dates of verification. Each run adds files of its own; when
// there are many they are merged, where storage lets us remove them.
const (
	verifiedDir   = "verified"
	verifiedMagic = "hikaevd\x01"
	verifiedHead  = 40
	dateEntry     = 16
	maxDates      = 1 << 22 // in a file
	mergeDatesAt  = 8       // files
)

// dateKey names a file by the first 8 bytes of the SHA-256 of its path: of millions of
// files two will hardly ever have the same.
type dateKey [8]byte

func dateKeyOf(path string) dateKey {
	sum := sha256.Sum256([]byte(path))
	return dateKey(sum[:8])
}

// dates are seconds since 1970, not 0.
type dates map[dateKey]int64

func encodeDates(id [16]byte, d dates) []byte {
	list := make([]dateKey, 0, len(d))
	for k := range d {
		list = append(list, k)
	}
	slices.SortFunc(list, func(a, b dateKey) int { return bytes.Compare(a[:], b[:]) })
	b := make([]byte, 0, verifiedHead+len(list)*dateEntry+sha256.Size)
	b = append(b, verifiedMagic...)
	b = binary.LittleEndian.AppendUint16(b, FormatVersion)
	b = append(b, make([]byte, 6)...)
	b = append(b, id[:]...)
	b = binary.LittleEndian.AppendUint64(b, uint64(len(list)))
	for _, k := range list {
		b = append(b, k[:]...)
		b = binary.LittleEndian.AppendUint64(b, uint64(d[k]))
	}
	sum := sha256.Sum256(b)
	return append(b, sum[:]...)
}

var errDates = errors.New("not a file of dates")

// decodeDates calls each for every date in a file.
func decodeDates(id [16]byte, b []byte, each func(k dateKey, date int64)) error {
	n := len(b) - sha256.Size
	if n < verifiedHead || string(b[:8]) != verifiedMagic {
		return errDates
	}
	if sum := sha256.Sum256(b[:n]); !bytes.Equal(sum[:], b[n:]) {
		return fmt.Errorf("%w: its SHA-256 is not the one at its end", errDates)
	}
	if v := binary.LittleEndian.Uint16(b[8:]); v > FormatVersion {
		return fmt.Errorf("%w (version %d)", ErrVersion, v)
	}
	if !bytes.Equal(b[16:32], id[:]) {
		return fmt.Errorf("%w of this repository", errDates)
	}
	if count := binary.LittleEndian.Uint64(b[32:]); count > maxDates || n != verifiedHead+int(count)*dateEntry {
		return fmt.Errorf("%w: %d bytes for %d dates", errDates, len(b), count)
	}
	for b = b[verifiedHead:n]; len(b) > 0; b = b[dateEntry:] {
		each(dateKey(b[:8]), int64(binary.LittleEndian.Uint64(b[8:])))
	}
	return nil
}

// readDates reads all dates. What lies more than a day ahead was noted under a wrong
// clock and counts for nothing, and so does a damaged file. files are those that were
// taken in, and may go when others have what is in them.
func readDates(ctx context.Context, fsys fsx.FS, id [16]byte, now time.Time) (all dates, files []string, err error) {
	latest := now.Add(24 * time.Hour).Unix()
	for range 4 {
		all, files = dates{}, nil
		var list []fs.DirEntry
		if list, err = fsys.ReadDir(verifiedDir); errors.Is(err, fs.ErrNotExist) {
			return all, nil, nil
		}
		if err != nil {
			return nil, nil, err
		}
		for _, e := range list {
			if b, herr := hex.DecodeString(e.Name()); herr != nil || len(b) != 8 || e.IsDir() {
				continue
			}
			if err := ctx.Err(); err != nil {
				return nil, nil, err
			}
			name := path.Join(verifiedDir, e.Name())
			var b []byte
			b, err = fsx.ReadFile(fsys, name, verifiedHead+maxDates*dateEntry+sha256.Size)
			if errors.Is(err, fs.ErrNotExist) {
				break // merged meanwhile: another file has its dates
			}
			if unreadable(err) {
				err = nil // perhaps only now
				continue
			}
			if err != nil && !errors.Is(err, fsx.ErrTooLarge) {
				return nil, nil, err
			}
			if err == nil {
				err = decodeDates(id, b, func(k dateKey, date int64) {
					if date > 0 && date <= latest {
						all[k] = max(all[k], date)
					}
				})
			}
			if !errors.Is(err, ErrVersion) {
				files = append(files, name)
			}
			err = nil
		}
		if err == nil {
			break
		}
	}
	return all, files, nil
}

// dateKeeper notes what was proved and writes it down now and then.
type dateKeeper struct {
	up     *upkeep
	id     [16]byte
	clock  func() time.Time
	fresh  dates     // not written yet
	wrote  time.Time // or began
	failed error     // why nothing can be written; then no more is tried
}

// keepEvery is how much of a run a kill may cost.
const keepEvery = time.Minute

func newDateKeeper(fsys fsx.FS, id [16]byte, clock func() time.Time) *dateKeeper {
	return &dateKeeper{up: &upkeep{fs: fsys}, id: id, clock: clock, fresh: dates{}, wrote: clock()}
}

// proved notes that the file was found whole now.
func (k *dateKeeper) proved(ctx context.Context, path string) {
	now := k.clock()
	k.fresh[dateKeyOf(path)] = max(1, now.Unix())
	if now.Sub(k.wrote) >= keepEvery || len(k.fresh) >= maxDates {
		k.flush(ctx)
	}
}

// flush writes what is new.
func (k *dateKeeper) flush(ctx context.Context) {
	k.wrote = k.clock()
	if len(k.fresh) == 0 || k.failed != nil {
		return
	}
	err := k.up.write(ctx, path.Join(verifiedDir, randomName()), encodeDates(k.id, k.fresh))
	if ctx.Err() != nil {
		return // the last flush, under another context, is still to come
	}
	k.failed = err
	k.fresh = dates{}
}

// end writes what is new, whether or not ctx has ended, and then merges. live tells
// which files are there; nil is all.
func (k *dateKeeper) end(ctx context.Context, live func(k dateKey, date int64) bool) error {
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	k.flush(last)
	if k.failed == nil {
		k.failed = last.Err()
	}
	if k.failed != nil {
		return k.failed
	}
	if ctx.Err() != nil {
		return nil
	}
	return k.merge(ctx, live)
}

// merge makes one file of many, if these can be removed: where they cannot, they stay,
// a few bytes for each file that was verified.
func (k *dateKeeper) merge(ctx context.Context, live func(k dateKey, date int64) bool) error {
	fsys := k.up.fs
	all, files, err := readDates(ctx, fsys, k.id, k.clock())
	if err != nil || len(files) < mergeDatesAt {
		return err
	}
	if !k.removable() {
		return nil
	}
	if live != nil {
		for key, date := range all {
			if !live(key, date) {
				delete(all, key)
			}
		}
	}
	for len(all) > 0 {
		part := all
		if len(all) > maxDates {
			part = dates{}
			for key, date := range all {
				part[key] = date
				if len(part) == maxDates {
					break
				}
			}
		}
		if err := k.up.write(ctx, path.Join(verifiedDir, randomName()), encodeDates(k.id, part)); err != nil {
			return err
		}
		for key := range part {
			delete(all, key)
		}
	}
	for _, name := range files {
		if err := fsys.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrPermission) {
			return err
		}
	}
	return fsys.SyncDir(verifiedDir)
}

// removable finds out whether files in verified/ can be removed, by an empty one. On
// append-only storage that one stays, and is the answer from then on.
func (k *dateKeeper) removable() bool {
	const probe = verifiedDir + "/probe"
	f, err := k.up.fs.Create(probe)
	if err == nil {
		err = f.Close()
	}
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return false
	}
	err = k.up.fs.Remove(probe)
	return err == nil || errors.Is(err, fs.ErrNotExist)
}
