package repo

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"time"

	"hikae/repo/internal/block"
	"hikae/repo/internal/fsx"
)

// A run of prune first condemns packs, by a file for each. When these last it lists the
// sessions that are open, and writes the list to a file of its own. Whoever is not in
// that list began later, and has seen that the packs are condemned.
const (
	condemnedMagic = "hikae condemned 1"
	runMagic       = "hikae run 1"
	runPrefix      = "run-"
	maxCondemned   = 4 << 10
	maxRunFile     = 4 << 20
)

// condemnation is the content of condemned/<handle>.
type condemnation struct {
	run  string // 16 hex
	time time.Time
}

func (c *condemnation) encode() []byte {
	return fmt.Appendf(nil, "%s\nrun %s\ntime %s\n", condemnedMagic, c.run, c.time.UTC().Format(time.RFC3339))
}

func parseCondemnation(b []byte) (*condemnation, error) {
	lines := strings.Split(string(b), "\n")
	if len(lines) != 4 || lines[0] != condemnedMagic || lines[3] != "" {
		return nil, errors.New("not a file of prune")
	}
	run, ok := strings.CutPrefix(lines[1], "run ")
	if _, err := block.ParseHandle(run); !ok || err != nil {
		return nil, errors.New("it names no run")
	}
	at, ok := strings.CutPrefix(lines[2], "time ")
	t, err := time.Parse(time.RFC3339, at)
	if !ok || err != nil {
		return nil, errors.New("it names no time")
	}
	return &condemnation{run: run, time: t}, nil
}

// pruneRun is the content of condemned/run-<run>.
type pruneRun struct {
	time     time.Time
	sessions []string // open after everything that the run condemned was
}

func (f *pruneRun) encode() []byte {
	b := fmt.Appendf(nil, "%s\ntime %s\n", runMagic, f.time.UTC().Format(time.RFC3339))
	for _, id := range f.sessions {
		b = fmt.Appendf(b, "session %s\n", id)
	}
	return append(b, "end\n"...)
}

func parseRun(b []byte) (*pruneRun, error) {
	lines := strings.Split(string(b), "\n")
	n := len(lines)
	if n < 4 || lines[0] != runMagic || lines[n-2] != "end" || lines[n-1] != "" {
		return nil, errors.New("not the file of a run of prune")
	}
	at, ok := strings.CutPrefix(lines[1], "time ")
	t, err := time.Parse(time.RFC3339, at)
	if !ok || err != nil {
		return nil, errors.New("it names no time")
	}
	f := &pruneRun{time: t}
	for _, line := range lines[2 : n-2] {
		id, ok := strings.CutPrefix(line, "session ")
		if _, err := block.ParseHandle(id); !ok || err != nil {
			return nil, errors.New("it names no session")
		}
		f.sessions = append(f.sessions, id)
	}
	return f, nil
}

// condemnedWaits tells whether whoever condemned the pack waits for the session before
// it deletes it. An open session is in the list of the run, or will be.
func (r *Repository) condemnedWaits(h block.Handle, session string) bool {
	b, err := fsx.ReadFile(r.fs, condemnedPath(h.String()), maxCondemned)
	if err != nil {
		return false
	}
	c, err := parseCondemnation(b)
	if err != nil {
		return false
	}
	b, err = fsx.ReadFile(r.fs, condemnedPath(runPrefix+c.run), maxRunFile)
	if errors.Is(err, fs.ErrNotExist) {
		return true
	}
	if err != nil {
		return false
	}
	f, err := parseRun(b)
	return err == nil && slices.Contains(f.sessions, session)
}

// readCondemned learns what earlier runs condemned.
func (p *pruner) readCondemned() error {
	p.condemned = make(map[string]*condemnation)
	p.runs = make(map[string]*pruneRun)
	list, err := p.r.fs.ReadDir(condemnedDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range list {
		if run, ok := strings.CutPrefix(e.Name(), runPrefix); ok {
			b, err := fsx.ReadFile(p.r.fs, condemnedPath(e.Name()), maxRunFile)
			if err != nil {
				return err
			}
			f, err := parseRun(b)
			if err != nil {
				return &DamageError{What: condemnedPath(e.Name()), Err: fmt.Errorf("%w; remove it, and its packs are condemned anew", err)}
			}
			p.runs[run] = f
			continue
		}
		if _, err := block.ParseHandle(e.Name()); err != nil {
			continue // the lock
		}
		b, err := fsx.ReadFile(p.r.fs, condemnedPath(e.Name()), maxCondemned)
		if err != nil {
			return err
		}
		c, err := parseCondemnation(b)
		if err != nil {
			// Since when and beside whom is not known. It counts as condemned; if it is
			// not needed this run lists the open sessions for it.
			c = &condemnation{}
		}
		p.condemned[e.Name()] = c
		if i, ok := p.handles[e.Name()]; ok {
			p.packs[i].condemned = true
		}
	}
	return nil
}

// decide says what is to become of each pack.
func (p *pruner) decide() *fate {
	f := &fate{}
	now := p.r.opt.Clock()
	for _, name := range p.condemnedNames() {
		c := p.condemned[name]
		i, there := p.handles[name]
		if !there {
			f.gone = append(f.gone, name)
			continue
		}
		k := p.packs[i]
		run := p.runs[c.run]
		switch {
		case k.inUse || k.live > 0 || k.damaged:
			f.release = append(f.release, name)
		case c.run == "":
			// Nobody can tell whom to wait for: condemned anew below.
			f.release = append(f.release, name)
			k.condemned = false
		case run == nil || now.Sub(run.time) < p.o.Grace:
			p.report.PacksKeptForGrace++
			p.report.BytesKept += k.size
		case slices.ContainsFunc(run.sessions, func(id string) bool { return p.open[id] }):
			p.report.PacksKeptForSessions++
			p.report.BytesKept += k.size
		default:
			f.remove = append(f.remove, k)
		}
	}
	var sparse []*prunePack
	for _, k := range p.packs {
		switch {
		case k.condemned || k.inUse || k.damaged:
		case k.live == 0:
			f.dead = append(f.dead, k)
		case k.live < k.records/2: // not of the size: a small pack is mostly its own frame for ever
			sparse = append(sparse, k)
		}
	}
	// The worst first: they give the most room for what has to be copied.
	slices.SortFunc(sparse, func(a, b *prunePack) int {
		return cmp.Or(cmp.Compare(float64(a.live)/float64(a.size), float64(b.live)/float64(b.size)), cmp.Compare(a.key.handle, b.key.handle))
	})
	budget := p.o.MaxRewrite
	if budget == 0 {
		budget = max(p.report.BytesTotal/10, minRewrite)
	}
	for _, k := range sparse {
		if k.live <= budget {
			budget -= k.live
			f.rewrite = append(f.rewrite, k)
		}
	}
	return f
}

func (p *pruner) condemnedNames() []string {
	names := make([]string, 0, len(p.condemned))
	for name := range p.condemned {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// tmp names an unfinished file of this run.
func (p *pruner) tmp() string { return tmpName(p.session.id, "condemned-"+randomName()) }

// adopt completes what a run began that was killed before it listed the sessions.
func (p *pruner) adopt() error {
	var orphans []string
	for name, c := range p.condemned {
		if _, there := p.handles[name]; there && c.run != "" && p.runs[c.run] == nil {
			orphans = append(orphans, c.run)
		}
	}
	if len(orphans) == 0 {
		return nil
	}
	slices.Sort(orphans)
	// What it condemned may not last yet.
	if err := p.r.fs.SyncDir(condemnedDir); err != nil {
		return err
	}
	for _, run := range slices.Compact(orphans) {
		if err := p.writeRun(run); err != nil {
			return err
		}
	}
	return nil
}

// writeRun lists the sessions that are open now. What the run condemned lasts.
func (p *pruner) writeRun(run string) error {
	open, err := p.openSessions(false)
	if err != nil {
		return err
	}
	f := &pruneRun{time: p.r.opt.Clock()}
	for id := range open {
		f.sessions = append(f.sessions, id)
	}
	slices.Sort(f.sessions)
	if err := fsx.WriteFile(p.r.fs, p.tmp(), condemnedPath(runPrefix+run), f.encode()); err != nil {
		return err
	}
	p.runs[run] = f
	return nil
}

// release takes back that packs were condemned.
func (p *pruner) release(names []string) error {
	for _, name := range names {
		if err := p.r.fs.Remove(condemnedPath(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		delete(p.condemned, name)
		if i, ok := p.handles[name]; ok && p.packs[i].live > 0 {
			p.report.PacksReleased++
		}
	}
	if len(names) == 0 {
		return nil
	}
	return p.r.fs.SyncDir(condemnedDir)
}

// condemn condemns dead packs, then those whose live records it has written anew,
// and at last lists who is open.
func (p *pruner) condemn(ctx context.Context, f *fate) error {
	run := randomName()
	n := 0
	condemn := func(list []*prunePack) error {
		for _, k := range list {
			if err := ctx.Err(); err != nil {
				return err
			}
			c := &condemnation{run: run, time: p.r.opt.Clock()}
			if err := fsx.WriteFile(p.r.fs, p.tmp(), condemnedPath(k.key.handle.String()), c.encode()); err != nil {
				return fmt.Errorf("condemn pack %v: %w", k.key.handle, err)
			}
			p.condemned[k.key.handle.String()] = c
			n++
			p.report.PacksCondemned++
			p.report.BytesCondemned += k.size
		}
		return nil
	}
	if err := condemn(f.dead); err != nil {
		return err
	}
	rewritten, err := p.rewrite(ctx, f.rewrite)
	if err != nil {
		return err
	}
	if err := condemn(rewritten); err != nil {
		return err
	}
	if n > 0 {
		if err := p.writeRun(run); err != nil {
			return err
		}
	}
	return p.dropRuns()
}

// dropRuns removes the lists of runs of which nothing is left.
func (p *pruner) dropRuns() error {
	needed := make(map[string]bool)
	for _, c := range p.condemned {
		needed[c.run] = true
	}
	removed := false
	for run := range p.runs {
		if needed[run] {
			continue
		}
		if err := p.r.fs.Remove(condemnedPath(runPrefix + run)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		removed = true
	}
	if !removed {
		return nil
	}
	return p.r.fs.SyncDir(condemnedDir)
}
