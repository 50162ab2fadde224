package repo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"

	"hikae/repo/internal/block"
	"hikae/repo/internal/fsx"
	"hikae/repo/internal/pack"
	"hikae/repo/internal/parity"
)

// MendOptions say what Mend looks at.
type MendOptions struct {
	// Packs are names of packs, 16 hexadecimal digits each, as problems name them.
	// None is all files: each is verified first, as Scrub does.
	Packs  []string
	Logger *slog.Logger // nil is silence
	// Progress, if not nil, is told of bytes of files looked at. It is called from
	// one goroutine.
	Progress func(done, total int64)
}

// MendedFile is a file that was damaged.
type MendedFile struct {
	Path  string `json:"path"`           // in the repository
	Pack  string `json:"pack,omitempty"` // if it is one
	Bytes int64  `json:"bytes"`          // that were damaged or missing, in whole sectors
}

// MendReport is what Mend found and did.
type MendReport struct {
	Files     int64        `json:"files"` // looked at
	BytesRead int64        `json:"bytes_read"`
	Mended    []MendedFile `json:"mended"`
	Problems  []Problem    `json:"problems"` // what is still damaged
}

// Mend brings damaged files back from their parity files, without keys: what is
// changed, missing, cut off or added. A file is replaced by what it was when it was
// made, proved by its SHA-256 and its header, or not at all; a crash leaves the one
// or the other. Files without parity, and damage beyond it, are left as they are and are
// in the report. It may run beside whatever else goes on in the repository.
func Mend(ctx context.Context, dir string, o MendOptions) (*MendReport, error) {
	fsys, c, err := openKeyless(dir)
	if err != nil {
		return nil, err
	}
	report, err := mendFS(ctx, fsys, c.id, o)
	if err != nil && ctx.Err() == nil {
		err = fmt.Errorf("mend: %w", storageError(fsys, err))
	}
	return report, err
}

func mendFS(ctx context.Context, fsys fsx.FS, id [16]byte, o MendOptions) (*MendReport, error) {
	m := &mender{
		o: o, up: &upkeep{fs: fsys}, id: id, prover: newProver(fsys, id),
		report: &MendReport{Mended: []MendedFile{}, Problems: []Problem{}},
	}
	if o.Logger == nil {
		m.o.Logger = slog.New(slog.DiscardHandler)
	}
	files, err := m.list(ctx)
	if err != nil {
		return nil, err
	}
	var done, total int64
	for _, f := range files {
		total += f.size
	}
	for _, f := range files {
		if err := m.file(ctx, f); err != nil {
			return m.report, err
		}
		done += f.size
		if o.Progress != nil {
			o.Progress(done, total)
		}
	}
	return m.report, nil
}

type mender struct {
	o      MendOptions
	up     *upkeep
	id     [16]byte
	prover *prover
	report *MendReport
}

// list finds the files to look at.
func (m *mender) list(ctx context.Context) ([]storedFile, error) {
	var files []storedFile
	if len(m.o.Packs) == 0 {
		err := walkStored(ctx, m.up.fs, func(f storedFile) error {
			files = append(files, f)
			return nil
		}, nil)
		return files, err
	}
	for _, name := range m.o.Packs {
		h, err := block.ParseHandle(name)
		if err != nil {
			return nil, err
		}
		found := false
		for _, t := range []pack.Type{pack.Data, pack.Node} {
			f := storedFile{path: t.Path(h), pack: packKey{t, h}, parity: -1}
			fi, err := m.up.fs.Stat(f.path)
			side, serr := m.up.fs.Stat(f.path + paritySuffix)
			for _, err := range []error{err, serr} {
				if err != nil && !errors.Is(err, fs.ErrNotExist) {
					return nil, err
				}
			}
			if err == nil {
				f.size = fi.Size()
			}
			if serr == nil {
				f.parity = side.Size()
			}
			if err == nil || serr == nil {
				files = append(files, f)
				found = true
			}
		}
		if !found {
			return nil, fmt.Errorf("pack %s: %w", name, ErrNotFound)
		}
	}
	return files, nil
}

// file mends a file if it is damaged.
func (m *mender) file(ctx context.Context, f storedFile) error {
	m.report.Files++
	n, err := m.prover.prove(ctx, f)
	m.report.BytesRead += n
	switch {
	case err == nil:
		return nil
	case errors.Is(err, fs.ErrNotExist) && len(m.o.Packs) == 0:
		return nil // deleted meanwhile
	case errors.Is(err, fs.ErrNotExist):
		err = f.damage(errors.New("the file is missing"))
	case !errors.Is(err, ErrDamaged):
		return err
	}
	whole, damage, merr := f.mend(ctx, m.up, m.id)
	switch {
	case merr == nil && whole:
		done := MendedFile{Path: f.path}
		for _, r := range damage {
			done.Bytes += r.Length
		}
		if f.kind == storedPack {
			done.Pack = f.pack.handle.String()
		}
		m.report.Mended = append(m.report.Mended, done)
		m.o.Logger.Info("mended from its parity file", "file", f.path, "bytes", done.Bytes)
		return nil
	case merr != nil && !errors.Is(merr, ErrDamaged):
		return merr
	case merr != nil:
		err = merr
	}
	s := scrubFile{storedFile: f}
	s.parity = -1 // it is of no use here
	m.report.Problems = append(m.report.Problems, s.problem(err))
	return nil
}

// mend brings a pack back from its sidecar, whatever is damaged, missing or added. true
// says that the pack's file is whole, mended or found so; false that it has no sidecar.
// An error that matches ErrDamaged says that the sidecar does not reach.
func (r *Repository) mend(ctx context.Context, k packKey) (bool, error) {
	f := storedFile{path: k.typ.Path(k.handle), pack: k}
	whole, _, err := f.mend(ctx, &upkeep{fs: r.fs}, r.config.id)
	r.packs.Drop(k) // it may be open, with the old bytes
	if err != nil && ctx.Err() == nil {
		err = storageError(r.fs, err)
	}
	return whole, err
}

// mend is Repository.mend for any file that has a sidecar, without keys. damage is
// what had to be mended, or would have.
func (f storedFile) mend(ctx context.Context, up *upkeep, id [16]byte) (whole bool, damage []parity.Range, err error) {
	side, err := readWhatCan(ctx, up.fs, f.path+paritySuffix)
	if side == nil || err != nil {
		return false, nil, err
	}
	old, err := readWhatCan(ctx, up.fs, f.path)
	if err != nil {
		return false, nil, err
	}
	mended, damage, err := parity.Mend(old, side)
	if err != nil {
		return false, damage, f.damage(err)
	}
	p := prover{fs: up.fs, id: id, buf: make([]byte, proofBuffer)}
	if _, err := p.read(ctx, f, bytes.NewReader(mended), int64(len(mended))); err != nil {
		return false, damage, f.damage(fmt.Errorf("what its parity file brings back is of no use: %w", err))
	}
	if bytes.Equal(old, mended) {
		return true, nil, nil
	}
	if err := up.replace(ctx, f.path, mended); err != nil {
		if errors.Is(err, errKept) {
			err = f.damage(fmt.Errorf("its parity file could mend it, but %w", err))
		}
		return false, damage, err
	}
	return true, damage, nil
}

// readWhatCan reads a file. What the disk cannot read any more is zeros; a file that is
// not there is nil.
func readWhatCan(ctx context.Context, fsys fsx.FS, name string) ([]byte, error) {
	file, err := fsys.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer file.Close()
	fi, err := file.Stat()
	if err != nil {
		return nil, err
	}
	b := make([]byte, min(fi.Size(), parity.MaxSize))
	for off := 0; off < len(b); {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		n, err := file.ReadAt(b[off:min(off+proofBuffer, len(b))], int64(off))
		off += n
		switch {
		case n > 0 || err == nil:
		case unreadable(err):
			// Sector by sector over what cannot be read.
			next := min(off/sector*sector+sector, len(b))
			if _, err := file.ReadAt(b[off:next], int64(off)); err != nil {
				clear(b[off:next])
			}
			off = next
		default:
			return b[:off], nil // it was cut short meanwhile
		}
	}
	return b, nil
}

// sector is what a disk loses at once, in bytes.
const sector = 4096
