package repo

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"slices"
	"sync"

	"hikae/repo/internal/block"
	"hikae/repo/internal/pack"
)

// flight knows the ids that a session is storing and whose packs are not
// published yet: equal blocks written at the same time are stored once. An id
// leaves when the index knows it.
type flight struct{ shards [64]flightShard }

type flightShard struct {
	mu  sync.Mutex
	ids map[block.ID]*landing
}

// landing is the place of a block that somebody is finding out.
type landing struct {
	done chan struct{}
	rec  block.Record
	err  error
}

// claim returns what is known of id; mine says that nobody is storing it, and the
// caller has to find its place and call land.
func (f *flight) claim(id block.ID) (l *landing, mine bool) {
	s := &f.shards[id[0]%64]
	s.mu.Lock()
	defer s.mu.Unlock()
	if l := s.ids[id]; l != nil {
		return l, false
	}
	if s.ids == nil {
		s.ids = make(map[block.ID]*landing)
	}
	l = &landing{done: make(chan struct{})}
	s.ids[id] = l
	return l, true
}

func (f *flight) forget(id block.ID) {
	s := &f.shards[id[0]%64]
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.ids, id)
}

func (l *landing) land(rec block.Record, err error) {
	l.rec, l.err = rec, err
	close(l.done)
}

// wait returns the place when it is known.
func (l *landing) wait(ctx context.Context) (block.Record, error) {
	select {
	case <-l.done:
		return l.rec, l.err
	case <-ctx.Done():
		return block.Record{}, context.Cause(ctx)
	}
}

// reuse judges packs that a session could point to. A pack counts only while its
// file is there and nobody has condemned it or found it damaged.
type reuse struct {
	r         *Repository
	mu        sync.RWMutex
	condemned map[string]bool
	lost      map[packKey]bool // marked in quarantine/
	rotten    map[packKey]bool // with records that this session could not read
	packs     map[packKey]bool // whether it may be pointed to
	present   map[packKey]bool // whether its file is there and not lost
	found     map[packKey]bool // of these, those the index led to
}

func (u *reuse) init(r *Repository) {
	u.r = r
	u.packs = make(map[packKey]bool)
	u.found = make(map[packKey]bool)
	u.present = make(map[packKey]bool)
	u.lost = make(map[packKey]bool)
	u.rotten = make(map[packKey]bool)
}

// condemnedDir holds an entry for every pack that collection means to delete,
// called as the pack.
const condemnedDir = "condemned"

func (u *reuse) loadCondemned() error {
	list, err := u.r.fs.ReadDir(condemnedDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	condemned := make(map[string]bool, len(list))
	for _, e := range list {
		condemned[e.Name()] = true
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.condemned = condemned
	return nil
}

// pack tells whether a pack may be pointed to. Storage is asked once a pack.
func (u *reuse) pack(t pack.Type, h block.Handle) bool {
	k := packKey{t, h}
	u.mu.RLock()
	good, ok := u.packs[k]
	rotten := u.rotten[k]
	u.mu.RUnlock()
	if ok || rotten {
		return good && !rotten
	}
	good = u.look(k) == nil
	u.mu.Lock()
	defer u.mu.Unlock()
	u.packs[k] = good
	return good
}

// loadLost learns which packs are marked as lost or damaged.
func (u *reuse) loadLost() error {
	marks, err := u.r.readQuarantine()
	if err != nil {
		return err
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	for k, q := range marks {
		if q.marked {
			u.lost[k] = true
		}
	}
	return nil
}

func (u *reuse) anyLost() bool {
	u.mu.RLock()
	defer u.mu.RUnlock()
	return len(u.lost) > 0
}

// distrust keeps the session from pointing to a pack anew. What a parent has in it counts
// as there, as long as it can be read.
func (u *reuse) distrust(k packKey) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.rotten[k] = true
}

// there tells whether a pack can be read, as far as anybody knows. Storage is asked
// once a pack.
func (u *reuse) there(k packKey) (bool, error) {
	u.mu.RLock()
	there, ok := u.present[k]
	lost := u.lost[k]
	u.mu.RUnlock()
	if ok || lost {
		return there && !lost, nil
	}
	_, err := u.r.fs.Stat(k.typ.Path(k.handle))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.present[k] = err == nil
	return err == nil, nil
}

var (
	errCondemned = errors.New("it is condemned")
	errLost      = errors.New("it was found damaged or missing")
)

func (u *reuse) look(k packKey) error {
	u.mu.RLock()
	condemned, lost := u.condemned[k.handle.String()], u.lost[k]
	u.mu.RUnlock()
	switch {
	case lost:
		return errLost
	case condemned:
		return errCondemned
	}
	_, err := u.r.fs.Stat(k.typ.Path(k.handle))
	return err
}

// indexed is pack for a pack that the index led to. A parent's packs are held by
// the parent, which the session's log names; these are held by nobody yet.
func (u *reuse) indexed(t pack.Type, h block.Handle) bool {
	if !u.pack(t, h) {
		return false
	}
	k := packKey{t, h}
	u.mu.RLock()
	known := u.found[k]
	u.mu.RUnlock()
	if !known {
		u.mu.Lock()
		u.found[k] = true
		u.mu.Unlock()
	}
	return true
}

// verify asks again about every pack that the index led to: the last thing before
// a commit. Packs condemned from now on stay until after this session, and so do
// those that were condemned by a run that knows of it.
func (u *reuse) verify(ctx context.Context, session string) error {
	if err := errors.Join(u.loadCondemned(), u.loadLost()); err != nil {
		return err
	}
	u.mu.RLock()
	found := slices.Collect(maps.Keys(u.found))
	u.mu.RUnlock()
	for _, k := range found {
		if err := ctx.Err(); err != nil {
			return err
		}
		err := u.look(k)
		if errors.Is(err, errCondemned) && u.r.condemnedWaits(k.handle, session) {
			_, err = u.r.fs.Stat(k.typ.Path(k.handle))
		}
		if err != nil {
			u.mu.Lock()
			u.packs[k] = false
			u.mu.Unlock()
			return fmt.Errorf("pack %s, which this backup reuses, went away meanwhile; run the backup again: %w",
				path.Base(k.typ.Path(k.handle)), err)
		}
	}
	return nil
}
