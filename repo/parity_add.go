package repo

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"

	"hikae/repo/internal/fsx"
	"hikae/repo/internal/parity"
)

// ParityOptions say what parity AddParity makes.
type ParityOptions struct {
	// Percent is how much, 1 to MaxParity; 0 is what the repository was made with,
	// or DefaultParity.
	Percent int
	Logger  *slog.Logger // nil is silence
	// Progress, if not nil, is told of bytes of files looked at. It is called from
	// one goroutine.
	Progress func(done, total int64)
}

// ParityReport is what AddParity found and did.
type ParityReport struct {
	Percent     int       `json:"percent"`
	Files       int64     `json:"files"`        // packs, manifests and the like
	FilesBefore int64     `json:"files_before"` // of these: had parity enough
	FilesAdded  int64     `json:"files_added"`  // had none
	FilesMade   int64     `json:"files_made"`   // had too little, or a damaged parity file
	FilesLarge  int64     `json:"files_large"`  // are too large for it
	BytesParity int64     `json:"bytes_parity"` // sizes of parity files that were made
	Problems    []Problem `json:"problems"`     // damaged files, for which none can be made
}

// AddParity makes, without keys, parity files for packs, manifests and the like that
// have none, one that is damaged, or one with less than is asked for. It reads every
// file that needs one, and proves it while it does; what has parity already is not
// proved, that is what Scrub is for. Index segments get none, for they can be made anew
// from the packs. It may run beside whatever else goes on in the repository, and when it
// was interrupted the next one goes on. What is written later gets parity by itself only
// if the repository was made so (InitOptions.Parity).
func AddParity(ctx context.Context, dir string, o ParityOptions) (*ParityReport, error) {
	fsys, c, err := openKeyless(dir)
	if err != nil {
		return nil, err
	}
	if o.Percent == 0 {
		o.Percent = c.parity()
	}
	if o.Percent == 0 {
		o.Percent = DefaultParity
	}
	report, err := addParityFS(ctx, fsys, c.id, o)
	if err != nil && ctx.Err() == nil {
		err = fmt.Errorf("make parity: %w", storageError(fsys, err))
	}
	return report, err
}

func addParityFS(ctx context.Context, fsys fsx.FS, id [16]byte, o ParityOptions) (*ParityReport, error) {
	if o.Percent < 1 || o.Percent > MaxParity {
		return nil, fmt.Errorf("%d %% of parity: choose 1 to %d", o.Percent, MaxParity)
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	a := &parityAdder{
		o: o, up: &upkeep{fs: fsys}, prover: newProver(fsys, id),
		report: &ParityReport{Percent: o.Percent, Problems: []Problem{}},
	}
	var files []storedFile
	var done, total int64
	err := walkStored(ctx, fsys, func(f storedFile) error {
		if f.precious() {
			files = append(files, f)
			total += f.size
		}
		return nil
	}, nil)
	if err != nil {
		return nil, err
	}
	a.report.Files = int64(len(files))
	for _, f := range files {
		if err := ctx.Err(); err != nil {
			return a.report, err
		}
		if err := a.file(ctx, f); err != nil {
			return a.report, err
		}
		done += f.size
		if o.Progress != nil {
			o.Progress(done, total)
		}
	}
	return a.report, nil
}

type parityAdder struct {
	o      ParityOptions
	up     *upkeep
	prover *prover
	report *ParityReport

	builder parity.Builder
}

// file makes the sidecar of a file, if it needs one.
func (a *parityAdder) file(ctx context.Context, f storedFile) error {
	put, count := a.up.write, &a.report.FilesAdded
	if f.parity >= 0 {
		_, info, err := readSidecar(a.up.fs, f.path)
		if err == nil {
			err = f.belongs(a.up.fs, info)
		}
		switch {
		case err == nil && info.Parity >= parity.Shards(f.size, a.o.Percent):
			a.report.FilesBefore++
			return nil
		case errors.Is(err, fs.ErrNotExist):
			return nil // both were deleted meanwhile
		case err == nil || errors.Is(err, parity.ErrSidecar) || unreadable(err):
			put, count = a.up.replace, &a.report.FilesMade
		default:
			return err
		}
	}
	if f.size > parity.MaxSize {
		a.report.FilesLarge++
		a.o.Logger.Warn("too large for parity", "file", f.path, "bytes", f.size)
		return nil
	}
	b, err := f.buildSidecar(&a.builder, a.up.fs, a.o.Percent)
	if err == nil {
		err = put(ctx, f.path+paritySuffix, b)
	}
	switch {
	case err == nil:
		*count++
		a.report.BytesParity += int64(len(b))
		return nil
	case errors.Is(err, fs.ErrExist):
		a.report.FilesBefore++ // a session made it meanwhile
		return nil
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case errors.Is(err, errKept):
		a.report.Problems = append(a.report.Problems, Problem{
			What: fmt.Sprintf("the parity file of %s is damaged or has too little, and %v", f.path, err), Remedy: "remove it where that can be done",
		})
		return nil
	case b != nil || !errors.Is(err, parity.ErrFile) && !unreadable(err):
		return err
	}
	// Read once more: only what is wrong twice is damage.
	_, err = a.prover.prove(ctx, f)
	if errors.Is(err, ErrDamaged) {
		s := scrubFile{storedFile: f}
		a.report.Problems = append(a.report.Problems, s.problem(err))
		return nil
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = fmt.Errorf("%s could not be read, and then it could; run it again", f.path)
	}
	return err
}
