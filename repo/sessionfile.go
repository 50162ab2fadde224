package repo

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"strings"
	"sync"

	"hikae/repo/internal/block"
	"hikae/repo/internal/fsx"
	"hikae/repo/internal/pack"
)

const (
	sessionsDir   = "sessions"
	tmpDir        = "tmp"
	lockSuffix    = ".lock"
	sessionMagic  = "hikae session 1"
	maxSessionLog = 64 << 20 // 2.6 million packs, 80 TiB
)

// tmpName is the name of an unfinished file; it tells whose it is.
func tmpName(owner, rest string) string { return tmpDir + "/" + owner + "-" + rest }

// sessionFile is how other processes see a session: a lock that the kernel gives
// back when the process dies, and beside it a log of lines, appended and synced,
// that say which packs are about to get their names and which generations the
// session builds on.
type sessionFile struct {
	r    *Repository
	id   string
	lock io.Closer

	mu  sync.Mutex
	log fsx.File
	err error // the first of log: after it nothing more is written there
}

func (r *Repository) newSessionFile() (*sessionFile, error) {
	f := &sessionFile{r: r}
	for {
		f.id = randomName()
		lock, err := r.fs.Lock(path.Join(sessionsDir, f.id+lockSuffix), true, false)
		if errors.Is(err, fsx.ErrLocked) {
			continue // somebody who found it before we had it takes it for dead
		}
		if err != nil {
			return nil, err
		}
		f.lock = lock
		break
	}
	var err error
	if f.log, err = r.fs.Append(path.Join(sessionsDir, f.id)); err == nil {
		if err = f.line(sessionMagic); err == nil {
			err = r.fs.SyncDir(sessionsDir)
		}
	}
	if err != nil {
		f.end()
		return nil, err
	}
	return f, nil
}

// line appends a line and makes it last.
func (f *sessionFile) line(text string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.log == nil {
		return ErrClosed
	}
	if f.err != nil {
		return f.err
	}
	_, err := f.log.Write([]byte(text + "\n"))
	if err == nil {
		err = f.log.Sync()
	}
	if err != nil {
		f.err = fmt.Errorf("write the session's log: %w", err)
	}
	return f.err
}

// pack notes a pack that is about to be published. Should we die before the index
// knows it, the next session will find it here.
func (f *sessionFile) pack(t pack.Type, h block.Handle) error {
	return f.line(t.Dir() + " " + h.String())
}

// parent notes a generation that must stay readable while the session lasts.
func (f *sessionFile) parent(manifest string) error { return f.line("parent " + manifest) }

// end removes the files. Where nothing can be removed a last line says that there
// is nothing left to take over.
func (f *sessionFile) end() { _ = f.leave() }

// leave is end, and says why the files stay if they do.
func (f *sessionFile) leave() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	var err error
	if f.log != nil {
		err = f.r.endSession(f.id, f.log)
		_ = f.log.Close()
		f.log = nil
	}
	err = errors.Join(err, f.r.fs.Remove(path.Join(sessionsDir, f.id+lockSuffix)))
	_ = f.lock.Close()
	return err
}

func (r *Repository) endSession(id string, log io.Writer) error {
	err := r.fs.Remove(path.Join(sessionsDir, id))
	if err != nil {
		_, _ = io.WriteString(log, "end\n")
	}
	return err
}

// parseSessionLog reads the packs of a session's log. Whatever is no whole line of
// ours was torn by a crash and counts for nothing. done says that the session took
// its leave.
func parseSessionLog(b []byte) (packs []packKey, done bool) {
	in := bufio.NewScanner(bytes.NewReader(b))
	for in.Scan() {
		word, rest, _ := strings.Cut(in.Text(), " ")
		for _, t := range []pack.Type{pack.Data, pack.Node} {
			if h, err := block.ParseHandle(rest); word == t.Dir() && err == nil {
				packs = append(packs, packKey{t, h})
			}
		}
		if in.Text() == "end" {
			done = true
		}
	}
	return packs, done
}

// recover takes over what dead sessions left.
func (r *Repository) recover(ctx context.Context, s *Session) error {
	list, err := r.fs.ReadDir(sessionsDir)
	if err != nil {
		return err
	}
	names := make(map[string]bool)
	for _, e := range list {
		id := strings.TrimSuffix(e.Name(), lockSuffix)
		if _, err := block.ParseHandle(id); err == nil && id != s.id {
			names[id] = true
		}
	}
	for id := range names {
		if err := r.recoverSession(ctx, s, id); err != nil {
			return fmt.Errorf("session %s: %w", id, err)
		}
	}
	return r.cleanTmp()
}

func (r *Repository) recoverSession(ctx context.Context, s *Session, id string) error {
	name := path.Join(sessionsDir, id)
	lock, err := r.fs.Lock(name+lockSuffix, true, false)
	if errors.Is(err, fsx.ErrLocked) || errors.Is(err, fs.ErrPermission) {
		return nil // alive, or somebody else is at it, or has to be
	}
	if err != nil {
		return err
	}
	defer lock.Close()
	// A lock that cannot be removed does no harm; without a log it means nothing.
	defer func() { _ = r.fs.Remove(name + lockSuffix) }()
	b, err := fsx.ReadFile(r.fs, name, maxSessionLog)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	packs, done := parseSessionLog(b)
	if !done {
		added := 0
		var failed error
		for _, k := range packs {
			n, err := r.adopt(ctx, s, k)
			added += n
			if err != nil {
				failed = err
				break
			}
		}
		if added > 0 {
			r.log.Info("took over packs of an interrupted session", "session", id, "records", added)
			// At once, whatever failed: nobody keeps these packs from being pruned.
			failed = errors.Join(failed, s.flushIndex(ctx))
		}
		if failed != nil {
			return failed
		}
	}
	log, err := r.fs.Append(name)
	if err != nil {
		return err
	}
	defer log.Close()
	if !done {
		_ = r.endSession(id, log)
	} else {
		_ = r.fs.Remove(name)
	}
	return nil
}

// adopt adds a pack's records to the index, unless they are there.
func (r *Repository) adopt(ctx context.Context, s *Session, k packKey) (int, error) {
	e, err := r.openPack(ctx, k.typ, k.handle)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil // it died before the pack had its name
	}
	var records []block.Record
	if err == nil {
		defer e.Release()
		records, err = e.Value().Records()
	}
	if pack.IsDamage(err) {
		r.log.Warn("damaged pack of an interrupted session", "pack", k.handle, "error", err)
		return 0, nil
	}
	if err != nil || len(records) == 0 {
		return 0, err
	}
	s.parity.add(k.typ.Path(k.handle))
	// A segment holds all records of a pack or none, so one stands for all.
	known, err := s.index.Lookup(ctx, records[0].ID, func(l block.Location) bool { return l == records[0].Location })
	if known || err != nil {
		return 0, err
	}
	// The session may have died before the pack's name lasted. Once the index knows it
	// backups point to it.
	if err := r.fs.SyncDir(k.typ.Subdir(k.handle)); err != nil {
		return 0, err
	}
	r.addMu.Lock()
	defer r.addMu.Unlock()
	for _, rec := range records {
		s.index.Add(rec)
	}
	return len(records), nil
}

// cleanTmp removes unfinished files whose session is no more. A session makes its
// lock before its first file: a file without a lock has no owner.
func (r *Repository) cleanTmp() error {
	list, err := r.fs.ReadDir(tmpDir)
	if err != nil {
		return err
	}
	dead := make(map[string]bool)
	for _, e := range list {
		id, _, _ := strings.Cut(e.Name(), "-")
		if _, err := block.ParseHandle(id); err != nil {
			continue
		}
		gone, ok := dead[id]
		if !ok {
			_, err := r.fs.Stat(path.Join(sessionsDir, id+lockSuffix))
			gone = errors.Is(err, fs.ErrNotExist)
			dead[id] = gone
		}
		if gone {
			_ = r.fs.Remove(path.Join(tmpDir, e.Name()))
		}
	}
	return nil
}
