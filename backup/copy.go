package backup

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"hikae/repo"
)

// CopyOptions of Copy. Generation and Dest are required.
type CopyOptions struct {
	Generation *repo.Generation
	Dest       string // a folder; made when it does not exist
	Progress   func(Event)
	Logger     *slog.Logger
	Clock      func() time.Time
}

// CopyResult is what a copy came to. Sizes are in bytes.
type CopyResult struct {
	Generation    string   `json:"generation"` // host/vm@time
	Dest          string   `json:"dest"`
	Files         []string `json:"files"`
	BytesCapacity int64    `json:"bytes_capacity"` // size of the files, holes included
	BytesData     int64    `json:"bytes_data"`     // of these, not holes
	BytesWritten  int64    `json:"bytes_written"`  // by this run
	BytesKept     int64    `json:"bytes_kept"`     // found finished from an earlier run
	Seconds       float64  `json:"seconds"`
}

// checkpointEvery is how much is written between two points from which a copy
// can go on, in bytes.
const checkpointEvery = 256 << 20

// partSuffix marks files that are not finished.
const partSuffix = ".part"

// copying is one run of Copy.
type copying struct {
	CopyOptions
	log   *slog.Logger
	meter *meter
	state *copyState
	files []repo.File
	bufs  *pool
	res   CopyResult
	since int64 // bytes written since the last checkpoint
	made  bool  // Dest was made by this run
	sick  bool  // a sync failed: what the file holds is not known any more
}

// Copy writes a generation's folder, the files that a mount shows, into Dest.
// Holes stay holes. Each file is written under its name with ".part" behind it
// and gets its own name when it is whole and on disk. A copy that was cut off,
// by Ctrl-C, a crash or a full disk, goes on where it stopped when Copy is called
// again: what stands in .hikae-copy.json was on disk by then, and a sample of it
// is compared with the generation all the same. Files that are not from this copy
// are never written over; ErrRefused names them. ErrNoRoom: Dest is too small or
// became full.
func Copy(ctx context.Context, o CopyOptions) (res CopyResult, err error) {
	now := orNow(o.Clock)
	began := now()
	c := &copying{CopyOptions: o, log: orDiscard(o.Logger), meter: newMeter(o.Progress), bufs: newPool(poolPieces)}
	c.res = CopyResult{Generation: o.Generation.Ref().String(), Dest: o.Dest}
	err = c.run(ctx)
	c.res.Seconds = now().Sub(began).Seconds()
	return c.res, err
}

func (c *copying) run(ctx context.Context) (err error) {
	c.meter.begin(PhaseCheck, 0, "")
	if c.files, err = c.Generation.Files(ctx); err != nil {
		return err
	}
	for _, f := range c.files {
		if f.Name == "" || f.Name != filepath.Base(f.Name) || f.Name == "." || f.Name == ".." || f.Name == copyStateName {
			return fmt.Errorf("the generation has a file called %q, which is no file name here: %w", f.Name, ErrRefused)
		}
		c.res.Files = append(c.res.Files, f.Name)
		c.res.BytesCapacity += f.Size
		c.res.BytesData += f.StoredBytes
	}
	_, err = os.Stat(c.Dest)
	c.made = errors.Is(err, fs.ErrNotExist)
	if err := os.MkdirAll(c.Dest, 0o700); err != nil {
		return err
	}
	if c.state, err = openCopyState(c.Dest, c.res.Generation, identity(c.Generation.Manifest())); err != nil {
		return err
	}
	defer c.state.close()
	if err := cmp.Or(c.refuse(), c.room()); err != nil {
		if c.made {
			os.Remove(c.Dest)
		}
		return err
	}
	c.meter.begin(PhaseRead, c.res.BytesData, "")
	for _, f := range c.files {
		err := c.copyFile(ctx, f)
		if errors.Is(err, syscall.ENOSPC) {
			return c.full(err)
		}
		if err != nil {
			return fmt.Errorf("copy %s: %w (what is written stays; the same command goes on from there)", f.Name, err)
		}
	}
	return c.state.finish()
}

// refuse lists the files in the way.
func (c *copying) refuse() error {
	var foreign []string
	for _, f := range c.files {
		for _, name := range []string{f.Name, f.Name + partSuffix} {
			path := filepath.Join(c.Dest, name)
			info, err := os.Lstat(path)
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return err
			}
			// A file that got its name just before the run was cut off may not
			// have been recorded as finished: its part is gone then.
			if ours := c.state.Files[f.Name] != nil && info.Mode().IsRegular() && info.Size() <= f.Size; !ours {
				foreign = append(foreign, name)
			}
		}
	}
	if len(foreign) > 0 {
		return fmt.Errorf("%s has %s, not from a copy of %s that was cut off; nothing is written over, choose another folder: %w",
			c.Dest, strings.Join(foreign, ", "), c.res.Generation, ErrRefused)
	}
	return nil
}

// room makes sure that what is still to be written fits.
func (c *copying) room() error {
	free, err := freeBytes(c.Dest)
	if err != nil {
		return nil // some file systems do not tell; the copy will
	}
	need := c.res.BytesData
	for _, f := range c.files {
		if info, err := os.Lstat(filepath.Join(c.Dest, f.Name)); err == nil {
			need -= min(f.StoredBytes, allocated(info))
		} else if info, err := os.Lstat(filepath.Join(c.Dest, f.Name+partSuffix)); err == nil {
			need -= min(f.StoredBytes, allocated(info))
		}
	}
	if need > free {
		return fmt.Errorf("%s has %s free and the copy of %s needs %s more; free some or choose another folder: %w",
			c.Dest, size(free), c.res.Generation, size(need), ErrNoRoom)
	}
	return nil
}

// full says where a copy stands that ran out of room.
func (c *copying) full(cause error) error {
	free, _ := freeBytes(c.Dest)
	done := c.res.BytesWritten + c.res.BytesKept
	return fmt.Errorf("%s is full (%s free) after %s of %s; make room for %s more and run the same command again, it goes on from there: %w: %w",
		c.Dest, size(free), size(done), size(c.res.BytesData), size(c.res.BytesData-done), ErrNoRoom, cause)
}

// copyFile brings one file to its end.
func (c *copying) copyFile(ctx context.Context, f repo.File) error {
	final, part := filepath.Join(c.Dest, f.Name), filepath.Join(c.Dest, f.Name+partSuffix)
	if info, err := os.Lstat(final); err == nil {
		if info.Size() != f.Size {
			return fmt.Errorf("it has %d bytes and should have %d: %w", info.Size(), f.Size, ErrRefused)
		}
		c.res.BytesKept += f.StoredBytes
		c.meter.add(f.Name, f.StoredBytes)
		return nil
	}
	if c.state.Files[f.Name] == nil {
		c.state.Files[f.Name] = &copyProgress{Size: f.Size}
		if err := c.state.save(); err != nil {
			return err
		}
	}
	out, err := os.OpenFile(part, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	if f.Disk == nil {
		err = writeSmall(out, f.Data)
		c.res.BytesWritten += int64(len(f.Data))
		c.meter.add(f.Name, int64(len(f.Data)))
	} else {
		err = c.copyDisk(ctx, f, out)
	}
	if err == nil {
		err = out.Sync()
	}
	if err == nil {
		err = os.Chtimes(part, f.ModTime, f.ModTime)
	}
	if err == nil {
		err = publish(part, final)
	}
	if err == nil {
		err = syncDir(c.Dest)
	}
	return err
}

func writeSmall(out *os.File, data []byte) error {
	if err := out.Truncate(0); err != nil {
		return err
	}
	_, err := out.WriteAt(data, 0)
	return err
}

// copyDisk writes a disk's data into a file of holes, from the last checkpoint
// on.
func (c *copying) copyDisk(ctx context.Context, f repo.File, out *os.File) error {
	from, err := c.resume(ctx, f, out)
	if err != nil {
		return err
	}
	// What lies behind the checkpoint may be torn: it becomes a hole again.
	if err := out.Truncate(from); err != nil {
		return err
	}
	if err := out.Truncate(f.Size); err != nil {
		return err
	}
	c.since = 0
	w := newWriter(out, from, func(n int64) { c.meter.add(f.Name, n) })
	var walkErr error
	todo := dataSteps(ctx, f.Disk, from, false, &walkErr)
	err = stream(ctx, f.Disk, todo, c.bufs, func(_ context.Context, s step, data []byte, release func()) error {
		if err := w.write(data, s.Offset, release); err != nil {
			return err
		}
		if c.since += s.Length; c.since < checkpointEvery {
			return nil
		}
		at, err := w.wait()
		if err != nil {
			return err
		}
		return c.checkpoint(f, out, at)
	})
	at, werr := w.wait()
	err = cmp.Or(werr, err)
	c.res.BytesWritten += w.written.Load()
	err = cmp.Or(walkErr, err)
	if errors.Is(err, context.Canceled) && ctx.Err() != nil {
		err = context.Cause(ctx) // what was cut off does not know why
	}
	if errors.Is(err, syscall.ENOSPC) {
		// The note of how far the copy is needs room too: give some back.
		at = max(from, (at-1)/pieceSize*pieceSize)
		_ = cmp.Or(out.Truncate(at), out.Truncate(f.Size))
	}
	if err != nil && !c.sick {
		// The next run need not do again what is good already.
		_ = c.checkpoint(f, out, at)
	}
	return err
}

// checkpoint makes what is written last, and notes how far that is.
func (c *copying) checkpoint(f repo.File, out *os.File, at int64) error {
	if err := out.Sync(); err != nil {
		c.sick = true // a second sync would succeed and prove nothing
		return err
	}
	if f.StoredBytes > memory()/2 { // it would push everything else out of the page cache
		forget(out, 0, at)
	}
	c.since = 0
	c.state.Files[f.Name].Done = at
	return c.state.save()
}

// resume tells from where a file has to be written: the last checkpoint, when
// the part is as it should be as far as a sample tells.
func (c *copying) resume(ctx context.Context, f repo.File, out *os.File) (int64, error) {
	done := c.state.Files[f.Name].Done
	info, err := out.Stat()
	if err != nil || done <= 0 || info.Size() != f.Size || done > f.Size {
		return 0, err
	}
	kept, good, err := sampled(ctx, f.Disk, out, done)
	if err != nil {
		return 0, err
	}
	if !good {
		c.log.Warn("what was copied before is not what it should be, starting the file again", "file", f.Name)
		return 0, nil
	}
	c.res.BytesKept += kept
	c.meter.add(f.Name, kept)
	return done, nil
}

// copySample is how many blocks a resumed copy compares.
const copySample = 32

// sampled compares blocks of the first done bytes of a file with a disk: some
// anywhere, the last ones always. kept is how much data these bytes hold.
func sampled(ctx context.Context, d *repo.Disk, out io.ReaderAt, done int64) (kept int64, good bool, err error) {
	var look []area
	var last area
	for s := range dataSteps(ctx, d, 0, false, &err) {
		if s.Offset >= done {
			break
		}
		s.Length = min(s.Length, done-s.Offset)
		kept += s.Length
		// Reservoir: each piece has the same chance.
		if n := kept / pieceSize; len(look) < copySample {
			look = append(look, s.area)
		} else if i := rand.Int64N(n + 1); i < copySample {
			look[i] = s.area
		}
		last = s.area
	}
	if err != nil {
		return 0, false, err
	}
	buf := make([]byte, pieceSize)
	for _, a := range append(look, last) {
		p := buf[:a.Length]
		if _, err := out.ReadAt(p, a.Offset); err != nil {
			return 0, false, nil // unreadable is as bad as wrong: it is written again
		}
		ok, err := d.Matches(ctx, a.Offset, p)
		if ctx.Err() != nil || errors.Is(err, repo.ErrDamaged) {
			return 0, false, err
		}
		if err != nil || !ok { // also a length that no checkpoint has
			return 0, false, nil
		}
	}
	return kept, true, nil
}
