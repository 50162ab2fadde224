package repo

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"strconv"
	"strings"
	"time"

	"hikae/repo/internal/fsx"
	"hikae/repo/internal/sealed"
)

// floorPrefix begins the names of files that keep sequence numbers from being given
// twice after the manifest that had the highest one was removed.
const floorPrefix = "floor-"

// Commit makes a generation of disks finished in this session. In this order: data
// packs, node packs, index segment; a last look at the packs of others that the
// disks point to; the manifest, which alone makes the generation. When Commit
// returns an error there is no generation, unless the very last step, making the
// manifest's name durable, failed.
//
// Commit fills Format, Sequence, Previous, and Time and Tool if they are empty. A
// second generation of a VM within one second is ErrExists.
func (s *Session) Commit(ctx context.Context, m Manifest) (Ref, error) {
	s.ending.Lock()
	defer s.ending.Unlock()
	ref, err := s.doCommit(ctx, m)
	if err != nil {
		return Ref{}, fmt.Errorf("commit a generation of %v: %w", m.VM, s.explain(err))
	}
	// The generation is there; tidying the index is a kindness to later sessions.
	if err := s.mergeIndex(ctx); err != nil && ctx.Err() == nil {
		s.r.log.Warn("the index could not be merged", "error", err)
	}
	return ref, nil
}

func (s *Session) doCommit(ctx context.Context, m Manifest) (Ref, error) {
	if m.Time.IsZero() {
		m.Time = s.r.opt.Clock()
	}
	m.Time = m.Time.UTC().Truncate(time.Second)
	m.Format = FormatVersion
	if m.Tool == "" {
		m.Tool = strings.TrimSpace("hikae " + s.r.opt.Version)
	}
	if m.Disks == nil {
		m.Disks = []DiskManifest{}
	}
	if err := m.validate(s.r.config.BlockSize); err != nil {
		return Ref{}, err
	}
	if err := s.ownDisks(&m); err != nil {
		return Ref{}, err
	}
	if err := s.data.Flush(ctx); err != nil {
		return Ref{}, err
	}
	if err := s.node.Flush(ctx); err != nil {
		return Ref{}, err
	}
	if err := s.flushIndex(ctx); err != nil {
		return Ref{}, err
	}
	if err := s.reuse.verify(ctx, s.id); err != nil {
		return Ref{}, err
	}
	return s.publishManifest(ctx, m)
}

// ownDisks refuses disks that did not come from this session: nobody has seen to
// it that their packs are there.
func (s *Session) ownDisks(m *Manifest) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return ErrClosed
	}
	if n := len(s.writers); n > 0 {
		return fmt.Errorf("%d disks are neither finished nor abandoned", n)
	}
	for i := range m.Disks {
		d := &m.Disks[i]
		root, err := d.root()
		if err != nil {
			return err
		}
		t, ok := s.roots[finished{root, d.Capacity}]
		if !ok {
			return fmt.Errorf("disk %d (%s) was not finished in this session", i, d.Name)
		}
		if t.DataBytes != d.DataBytes {
			return fmt.Errorf("disk %d (%s) has %d bytes of data, not %d", i, d.Name, t.DataBytes, d.DataBytes)
		}
	}
	return nil
}

// publishManifest gives the generation its number and name.
func (s *Session) publishManifest(ctx context.Context, m Manifest) (Ref, error) {
	r := s.r
	lock, err := r.lockGenerations(ctx)
	if err != nil {
		return Ref{}, err
	}
	defer lock.Close()
	dir := r.vmDir(m.VM)
	siblings, err := r.entries(dir, m.VM)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return Ref{}, err
	}
	for _, o := range siblings {
		if o.Time.Equal(m.Time) {
			return Ref{}, fmt.Errorf("a generation of that second, %v, %w", o, ErrExists)
		}
	}
	if m.Sequence, err = r.nextSequence(); err != nil {
		return Ref{}, err
	}
	m.Previous = ""
	if n := len(siblings); n > 0 {
		if m.Previous, err = r.manifestSum(siblings[n-1]); err != nil {
			return Ref{}, fmt.Errorf("the generation before: %w", err)
		}
	}
	if err := fsx.MakeDir(r.fs, dir); err != nil {
		return Ref{}, err
	}
	write := func(t sealed.Type, name string, v any) error {
		b, err := r.sealedFile(t, name, v)
		if err != nil {
			return err
		}
		if err := fsx.WriteFile(r.fs, tmpName(s.id, path.Base(name)+"-"+randomName()), name, b); err != nil {
			return err
		}
		s.stored.Add(int64(len(b)))
		s.parity.add(name)
		return nil
	}
	who := path.Join(dir, identityName)
	if _, err := r.fs.Stat(who); errors.Is(err, fs.ErrNotExist) {
		if err := write(sealed.Identity, who, identity{m.VM}); err != nil {
			return Ref{}, err
		}
	} else if err != nil {
		return Ref{}, err
	}
	if err := ctx.Err(); err != nil {
		return Ref{}, err
	}
	ref := Ref{VM: m.VM, Sequence: m.Sequence, Time: m.Time, Imported: m.Mode == ModeImport}
	return ref, write(sealed.Manifest, r.manifestPath(ref), &m)
}

// keepEpoch sees to it, once, that the keys under which we write last.
func (r *Repository) keepEpoch() error {
	if r.epochLasts.Load() {
		return nil
	}
	if err := r.ring.Sync(r.fs); err != nil {
		return fmt.Errorf("make the newest key epoch last: %w", err)
	}
	r.epochLasts.Store(true)
	return nil
}

// lockGenerations waits until no other process is committing.
func (r *Repository) lockGenerations(ctx context.Context) (io.Closer, error) {
	if err := r.keepEpoch(); err != nil {
		return nil, err
	}
	for wait := time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		lock, err := r.fs.Lock(path.Join(generationsDir, "lock"), true, false)
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

// nextSequence is one more than any generation has or ever had.
func (r *Repository) nextSequence() (uint64, error) {
	list, err := r.fs.ReadDir(generationsDir)
	if err != nil {
		return 0, err
	}
	var highest uint64
	for _, e := range list {
		if rest, ok := strings.CutPrefix(e.Name(), floorPrefix); ok {
			if n, err := strconv.ParseUint(rest, 10, 63); err == nil {
				highest = max(highest, n)
			}
		}
	}
	dirs, err := r.vmDirs()
	if err != nil {
		return 0, err
	}
	for _, dir := range dirs {
		refs, err := r.entries(dir, VMID{})
		if err != nil {
			return 0, err
		}
		if n := len(refs); n > 0 {
			highest = max(highest, refs[n-1].Sequence)
		}
	}
	return highest + 1, nil
}

// manifestSum is the SHA-256 of a generation's manifest file.
func (r *Repository) manifestSum(ref Ref) (string, error) {
	b, err := fsx.ReadFile(r.fs, r.manifestPath(ref), sealed.MaxFile)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:]), nil
}

// mergeIndex joins small segments while nobody else does.
func (s *Session) mergeIndex(ctx context.Context) error {
	r := s.r
	r.segMu.Lock()
	defer r.segMu.Unlock()
	r.segOwner = s.id
	return s.index.Merge(ctx)
}
