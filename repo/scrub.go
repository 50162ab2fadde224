package repo

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math"
	"path"
	"slices"
	"strings"
	"time"

	"hikae/repo/internal/fsx"
	"hikae/repo/internal/keys"
	"hikae/repo/internal/pack"
	"hikae/repo/internal/parity"
	"hikae/repo/internal/sealed"
)

// ScrubBudget says how much a scrub verifies; the zero value is everything. What is
// given more than once ends it by whichever comes first. The file that exceeds it is
// still verified, and at least one is.
type ScrubBudget struct {
	Percent float64       // of the bytes that are stored, above 0 to 100
	Bytes   int64         // bytes
	Time    time.Duration // since the first file was opened
}

// ScrubOptions say how Scrub goes about it. The zero value is good.
type ScrubOptions struct {
	Budget ScrubBudget
	Clock  func() time.Time // nil is time.Now
	Logger *slog.Logger     // nil is silence
	// Progress, if not nil, is told of bytes read, of those that the budget allows.
	// It is called from one goroutine.
	Progress func(done, total int64)
}

// ScrubReport is what Scrub found. Files are packs, index segments, manifests and the
// like; sizes are bytes, parity files included.
type ScrubReport struct {
	Packs          int64 `json:"packs"` // that were there
	PacksVerified  int64 `json:"packs_verified"`
	PacksNever     int64 `json:"packs_never_verified"` // that no scrub has verified yet
	Files          int64 `json:"files"`                // that were there, packs among them
	FilesVerified  int64 `json:"files_verified"`
	FilesNever     int64 `json:"files_never_verified"`
	ParityVerified int64 `json:"parity_verified"` // parity files
	Bytes          int64 `json:"bytes"`           // that were there
	BytesRead      int64 `json:"bytes_read"`
	Vanished       int64 `json:"vanished"` // files that were deleted meanwhile

	Oldest     *time.Time `json:"oldest_verified,omitempty"` // the longest ago that any verified file was
	Remembered bool       `json:"remembered"`                // the storage took the dates of this run
	Problems   []Problem  `json:"problems"`
}

const (
	remedyScrubbed = "hikae repair packs %v saves what can be saved of it; hikae check, with the passphrase, names the generations it hurts"
	remedyMendable = "hikae repair packs %v mends it from its parity file, if no more is damaged than that reaches; hikae check, with the passphrase, names the generations it hurts"
	remedySidecar  = "nothing else is hurt; hikae repair packs --parity makes the parity file anew"
	remedyMend     = "hikae repair packs mends it from its parity file; otherwise copy it back from another copy of the repository"
	// The same as what a check says of these files.
	remedyIdentity     = "the name is in the manifests as well; remove the file, and the next backup writes it again"
	remedyForgotten    = "copy the file back from another copy of the repository; it says which generations were forgotten on purpose"
	remedyVerification = "it says only that a generation was good; remove the file, and hikae verify makes another"

	remedySlot    = "make a new key slot and remove this one"
	remedyUpgrade = "a newer hikae wrote it; upgrade this one"
)

// maxUnreadable is how many files in a row may be unreadable before a scrub takes it
// that the storage is gone.
const maxUnreadable = 16

// Scrub verifies, without keys, that files are what was written: each ends with the
// SHA-256 of all bytes before. It begins with those that were never verified, oldest
// first, and goes on with those that were verified the longest ago. What was verified
// when is remembered in the repository, so that scrubs with a budget get through all of
// it in turn; what was proved so far is kept when ctx ends, and but for the last minute
// when the process is killed. Storage that takes no writes can be scrubbed as well, and
// then nothing is remembered. It changes nothing else. A file that is deleted
// meanwhile is no problem.
//
// Problems are in the report, which comes also with the error of a ctx that ended. That
// nobody tampered with the files only Check with ReadData can tell, for whoever can write
// can compute a SHA-256 too. Its memory is about 150 bytes for each file: 20 MB in a
// repository of 4 TiB.
func Scrub(ctx context.Context, dir string, o ScrubOptions) (*ScrubReport, error) {
	fsys, c, err := openKeyless(dir)
	if err != nil {
		return nil, err
	}
	return scrubFS(ctx, fsys, c.id, o)
}

// openKeyless opens a repository as far as that goes without keys. The config cannot
// be checked.
func openKeyless(dir string) (fsx.FS, *config, error) {
	fsys, err := openDir(dir)
	if err != nil {
		return nil, nil, err
	}
	c, err := readConfig(fsys, dir)
	return fsys, c, err
}

func scrubFS(ctx context.Context, fsys fsx.FS, id [16]byte, o ScrubOptions) (*ScrubReport, error) {
	if o.Clock == nil {
		o.Clock = defaultClock
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if b := o.Budget; b.Percent < 0 || b.Percent > 100 || math.IsNaN(b.Percent) || b.Bytes < 0 || b.Time < 0 {
		return nil, fmt.Errorf("scrub: a budget of %v %%, %d bytes, %v", b.Percent, b.Bytes, b.Time)
	}
	s := &scrubber{
		o: o, fs: fsys, prover: newProver(fsys, id), keeper: newDateKeeper(fsys, id, o.Clock),
		report: &ScrubReport{Problems: []Problem{}},
	}
	if err := s.run(ctx, id); err != nil {
		if ctx.Err() != nil {
			return s.report, ctx.Err()
		}
		return nil, fmt.Errorf("scrub: %w", err)
	}
	return s.report, nil
}

// scrubFile is a file to verify.
type scrubFile struct {
	storedFile
	date int64 // seconds since 1970; 0 is never
}

func (f *scrubFile) bytes() int64 { return f.size + max(0, f.parity) }

type scrubber struct {
	o      ScrubOptions
	fs     fsx.FS
	prover *prover
	keeper *dateKeeper
	report *ScrubReport
	files  []scrubFile
	bad    int // files in a row that cannot be read
}

func (s *scrubber) run(ctx context.Context, id [16]byte) error {
	began := s.o.Clock()
	known, _, err := readDates(ctx, s.fs, id, began)
	if err != nil {
		return err
	}
	err = walkStored(ctx, s.fs, func(f storedFile) error {
		s.files = append(s.files, scrubFile{f, known[dateKeyOf(f.path)]})
		return nil
	}, nil)
	if err != nil {
		return err
	}
	clear(known)
	for i := range s.files {
		s.report.Bytes += s.files[i].bytes()
	}
	slices.SortFunc(s.files, func(a, b scrubFile) int {
		if a.date == 0 && b.date == 0 {
			return cmp.Or(cmp.Compare(a.modified, b.modified), strings.Compare(a.path, b.path))
		}
		return cmp.Or(cmp.Compare(a.date, b.date), strings.Compare(a.path, b.path))
	})
	if _, err := keys.Slots(s.fs); errors.Is(err, keys.ErrDamagedSlot) && !errors.Is(err, fs.ErrPermission) {
		s.report.Problems = append(s.report.Problems, Problem{What: err.Error(), Remedy: remedySlot})
	}
	err = s.verify(ctx, began)
	s.sum()
	if kerr := s.keeper.end(ctx, s.live(began)); kerr == nil {
		s.report.Remembered = true
	} else {
		s.o.Logger.Warn("the repository takes no notes of what was verified when; the next scrub begins with the same files", "error", kerr)
	}
	return err
}

// live tells whose dates are worth keeping: files that are there, and such that others
// may have verified since they were listed.
func (s *scrubber) live(began time.Time) func(k dateKey, date int64) bool {
	there := make(map[dateKey]struct{}, len(s.files))
	for i := range s.files {
		there[dateKeyOf(s.files[i].path)] = struct{}{}
	}
	return func(k dateKey, date int64) bool {
		_, ok := there[k]
		return ok || date >= began.Unix()
	}
}

// allowed is how many bytes the budget allows.
func (s *scrubber) allowed() int64 {
	n := s.report.Bytes
	if b := s.o.Budget.Bytes; b > 0 {
		n = min(n, b)
	}
	if p := s.o.Budget.Percent; p > 0 {
		n = min(n, int64(math.Ceil(float64(s.report.Bytes)*p/100)))
	}
	return n
}

func (s *scrubber) verify(ctx context.Context, began time.Time) error {
	allowed, done := s.allowed(), int64(0)
	for i := range s.files {
		f := &s.files[i]
		if done >= allowed && allowed < s.report.Bytes || i > 0 && s.o.Budget.Time > 0 && s.o.Clock().Sub(began) >= s.o.Budget.Time {
			return nil
		}
		if err := s.file(ctx, f); err != nil {
			return err
		}
		done += f.bytes() // also of what was read twice, or went away
		if s.o.Progress != nil {
			s.o.Progress(min(done, allowed), allowed)
		}
	}
	return nil
}

// file verifies one file and its sidecar.
func (s *scrubber) file(ctx context.Context, f *scrubFile) error {
	n, err := s.prover.prove(ctx, f.storedFile)
	s.report.BytesRead += n
	if err == nil {
		f.date = max(1, s.o.Clock().Unix())
		s.keeper.proved(ctx, f.path)
		s.report.FilesVerified++
		if f.kind == storedPack {
			s.report.PacksVerified++
		}
		err = s.sidecar(ctx, f)
	}
	switch {
	case err == nil:
		s.bad = 0
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, fs.ErrNotExist):
		f.path = "" // it does not count
		s.report.Vanished++
		return nil
	case !errors.Is(err, ErrDamaged):
		return err
	}
	if s.bad++; !unreadable(err) {
		s.bad = 0
	}
	if s.bad >= maxUnreadable {
		return fmt.Errorf("%d files in a row cannot be read; is the storage there? %w", s.bad, err)
	}
	s.report.Problems = append(s.report.Problems, f.problem(err))
	return nil
}

// errSidecar says that a file is whole and its sidecar is not.
var errSidecar = errors.New("its parity file is of no use")

// sidecar verifies the sidecar of a file that is whole.
func (s *scrubber) sidecar(ctx context.Context, f *scrubFile) error {
	if f.parity < 0 {
		return nil
	}
	b, info, err := readSidecar(s.fs, f.path)
	s.report.BytesRead += int64(len(b))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = f.belongs(s.fs, info)
	}
	switch {
	case err == nil:
		s.report.ParityVerified++
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, parity.ErrSidecar) || isDamaged(err):
		return f.damage(fmt.Errorf("%w: %w", errSidecar, err))
	}
	return err
}

// problem turns damage into a finding.
func (f *scrubFile) problem(err error) Problem {
	p := Problem{What: err.Error()}
	if f.kind == storedPack {
		p.Pack = f.pack.handle.String()
	}
	switch {
	case errors.Is(err, errSidecar):
		p.Remedy = remedySidecar
	case errors.Is(err, pack.ErrVersion):
		p.Remedy = remedyUpgrade
	case f.kind == storedSegment:
		p.Remedy = remedyIndex
	case f.kind == storedPack && f.parity >= 0:
		p.Remedy = fmt.Sprintf(remedyMendable, f.pack.handle)
	case f.kind == storedPack:
		p.Remedy = fmt.Sprintf(remedyScrubbed, f.pack.handle)
	case f.parity >= 0:
		p.Remedy = remedyMend
	default:
		p.Remedy = map[sealed.Type]string{
			sealed.Manifest: remedyManifest, sealed.Identity: remedyIdentity,
			sealed.Forgotten: remedyForgotten, sealed.Verification: remedyVerification,
		}[sealedType(path.Base(f.path))]
	}
	return p
}

// sum counts what was verified when, now.
func (s *scrubber) sum() {
	var v Verified
	for i := range s.files {
		if f := &s.files[i]; f.path != "" {
			v.count(f.storedFile, f.date)
		}
	}
	s.report.Packs, s.report.PacksNever = v.Packs, v.PacksNever
	s.report.Files, s.report.FilesNever = v.Files, v.FilesNever
	if !v.Oldest.IsZero() {
		s.report.Oldest = &v.Oldest
	}
}
