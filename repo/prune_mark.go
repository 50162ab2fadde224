package repo

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"

	"hikae/repo/internal/block"
	"hikae/repo/internal/codec"
	"hikae/repo/internal/fsx"
	"hikae/repo/internal/pack"
	"hikae/repo/internal/sealed"
	"hikae/repo/internal/tree"
)

// maxMissing bounds how many blocks may be missing before prune gives up.
const maxMissing = 1 << 20

// listPacks lists all packs and their sizes.
func (p *pruner) listPacks(ctx context.Context) error {
	for _, t := range []pack.Type{pack.Data, pack.Node} {
		dirs, err := p.r.fs.ReadDir(t.Dir())
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		for _, d := range dirs {
			if err := ctx.Err(); err != nil {
				return err
			}
			if !d.IsDir() {
				continue
			}
			files, err := p.r.fs.ReadDir(path.Join(t.Dir(), d.Name()))
			if err != nil {
				return err
			}
			for _, f := range files {
				p.sidecars = p.sidecars || strings.HasSuffix(f.Name(), paritySuffix)
				h, err := block.ParseHandle(f.Name())
				if err != nil || t.Path(h) != path.Join(t.Dir(), d.Name(), f.Name()) {
					continue
				}
				fi, err := f.Info()
				if errors.Is(err, fs.ErrNotExist) {
					continue
				}
				if err != nil {
					return err
				}
				k := packKey{t, h}
				p.table[k] = int32(len(p.packs))
				p.handles[h.String()] = int32(len(p.packs))
				p.packs = append(p.packs, &prunePack{key: k, size: fi.Size()})
				p.report.Packs++
				p.report.BytesTotal += fi.Size()
			}
		}
	}
	return nil
}

// openSessions tells which sessions and readers are open, but for prune's own. With
// logs it also takes what their logs name for needed, and notes who reads only.
func (p *pruner) openSessions(logs bool) (map[string]bool, error) {
	open := make(map[string]bool)
	list, err := p.r.fs.ReadDir(sessionsDir)
	if errors.Is(err, fs.ErrNotExist) {
		return open, nil
	}
	if err != nil {
		return nil, err
	}
	for _, e := range list {
		id, ok := strings.CutSuffix(e.Name(), lockSuffix)
		if _, err := block.ParseHandle(id); !ok || err != nil || p.session != nil && id == p.session.id {
			continue
		}
		name := path.Join(sessionsDir, id)
		lock, err := p.r.fs.Lock(name+lockSuffix, true, false)
		if err == nil {
			_ = lock.Close() // it is dead, the next session takes it over
			continue
		}
		if !errors.Is(err, fsx.ErrLocked) {
			return nil, fmt.Errorf("find out whether session %s is open: %w", id, err)
		}
		open[id] = true
		if !logs {
			continue
		}
		b, err := fsx.ReadFile(p.r.fs, name, maxSessionLog)
		if errors.Is(err, fs.ErrNotExist) {
			continue // it has not made anything yet, or has just ended
		}
		if err != nil {
			return nil, fmt.Errorf("read what session %s needs: %w", id, err)
		}
		packs, _ := parseSessionLog(b)
		for _, k := range packs {
			if i, ok := p.table[k]; ok {
				p.packs[i].inUse = true
			}
		}
		for line := range strings.SplitSeq(string(b), "\n") {
			if line == pinLine {
				p.readers[id] = true
			}
			if m, ok := strings.CutPrefix(line, "parent "); ok && fs.ValidPath(m) && strings.HasPrefix(m, generationsDir+"/") {
				p.parents = append(p.parents, m)
			}
		}
	}
	return open, nil
}

// mark walks everything that generations reach.
func (p *pruner) mark(ctx context.Context) error {
	dirs, err := p.r.vmDirs()
	if err != nil {
		return err
	}
	names := p.parents
	for _, dir := range dirs {
		// Who forgot a generation may have died before that lasted. It must not come
		// back when what it needs is gone.
		if !p.o.DryRun {
			if err := p.r.fs.SyncDir(dir); err != nil {
				return err
			}
		}
		refs, err := p.r.entries(dir, VMID{})
		if err != nil {
			return err
		}
		for _, ref := range refs {
			names = append(names, path.Join(dir, ref.fileName()))
		}
	}
	slices.Sort(names)
	names = slices.Compact(names)
	for i, name := range names {
		if err := p.markManifest(ctx, name); err != nil {
			return fmt.Errorf("%w; nothing was deleted, hikae check tells more", err)
		}
		p.progress("mark", int64(i+1), int64(len(names)))
	}
	return p.refuse()
}

// refuse ends a prune that met generations of which not all nodes can be read: what these
// need is not known. It says what can be done.
func (p *pruner) refuse() error {
	if len(p.hurt) == 0 {
		return nil
	}
	const most = 20
	list := p.hurt
	more := ""
	if len(list) > most {
		more = fmt.Sprintf(" and %d more", len(list)-most)
		list = list[:most]
	}
	return fmt.Errorf("what these generations need is not known, for parts of their block trees are lost: %s%s; nothing was deleted. "+
		"Run hikae repair packs, back the VMs up again, and forget those that stay hurt (hikae forget HOST/VM@GENERATION): %w",
		strings.Join(list, ", "), more, p.cause)
}

func (p *pruner) markManifest(ctx context.Context, name string) error {
	var m Manifest
	err := p.r.readSealed(sealed.Manifest, name, &m)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // forgotten meanwhile; a session may only build on what it sees after it said so
	}
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if m.Format > FormatVersion {
		return fmt.Errorf("%s: %w (manifest version %d); upgrade hikae", name, ErrVersion, m.Format)
	}
	if err := m.validate(p.r.config.BlockSize); err != nil {
		return &DamageError{What: name, Err: err}
	}
	p.report.Generations++
	for i := range m.Disks {
		root, err := m.Disks[i].root()
		if err != nil {
			return &DamageError{What: name, Err: err}
		}
		err = p.walk(ctx, root, m.Disks[i].Levels)
		if errors.Is(err, ErrDamaged) {
			// Go on, to name all of them.
			p.hurt = append(p.hurt, Ref{VM: m.VM, Time: m.Time, Sequence: m.Sequence, Imported: m.Mode == ModeImport}.String())
			p.cause = cmp.Or(p.cause, err)
			break
		}
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

// walk marks a record and all below; level is that of the node, 0 for a block.
func (p *pruner) walk(ctx context.Context, rec block.Record, level int) error {
	if rec.IsHole() {
		return nil
	}
	if err := p.spoilt[rec.ID]; err != nil {
		return err
	}
	at, offset, ok, err := p.locate(ctx, rec)
	if err != nil {
		return err
	}
	if ok {
		if level == 0 {
			p.packs[at].reach(offset)
			return nil
		}
		// The offset begins a record, so the two name a node beyond doubt.
		key := uint64(at)<<32 | uint64(offset)
		if _, seen := p.walked[key]; seen {
			return nil
		}
		p.walked[key] = struct{}{}
		p.packs[at].reach(offset)
	} else {
		if level == 0 || p.strange[rec.ID] {
			return nil
		}
		p.strange[rec.ID] = true
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := p.walkNode(ctx, rec, level); err != nil {
		if errors.Is(err, ErrDamaged) {
			p.spoilt[rec.ID] = err // for the next generation that shares it
		}
		return err
	}
	return nil
}

func (p *pruner) walkNode(ctx context.Context, rec block.Record, level int) error {
	node, err := p.r.readNode(ctx, rec)
	if err != nil {
		return err
	}
	for i := range tree.Fan {
		e, err := tree.Entry(node, level, i)
		if err != nil {
			return p.r.readError(rec, fmt.Errorf("%w: %w", codec.ErrCorrupt, err))
		}
		if err := p.walk(ctx, e, level-1); err != nil {
			return err
		}
	}
	return nil
}

// locate finds the pack that has to stay for a record: the one it names, unless that
// is condemned or gone and the index knows another. It prefers what is not condemned,
// so that a pack that was rewritten is reached no more, though nodes name it; if only
// a condemned one has the record, that is reached and thereby released. ok is false
// if the pack is newer than the list of packs, or nowhere.
func (p *pruner) locate(ctx context.Context, rec block.Record) (at int32, offset uint32, ok bool, err error) {
	k := packKey{pack.TypeOf(rec.Kind), rec.Pack}
	at, ok = p.table[k]
	if ok && !p.packs[at].condemned {
		return at, rec.Offset, true, nil
	}
	offset = rec.Offset
	other := func() (bool, error) {
		return p.index.Lookup(ctx, rec.ID, func(l block.Location) bool {
			if l.Kind == block.Hole || l.Kind.IsNode() != rec.Kind.IsNode() {
				return false
			}
			i, there := p.table[packKey{pack.TypeOf(l.Kind), l.Pack}]
			switch {
			case there && !p.packs[i].condemned:
				at, offset, ok = i, l.Offset, true
				return true
			case there && !ok:
				at, offset, ok = i, l.Offset, true // better than nothing
			}
			return false
		})
	}
	if found, err := other(); found || err != nil || ok {
		return at, offset, ok, err
	}
	if _, err := p.r.fs.Stat(k.typ.Path(k.handle)); err == nil {
		return 0, 0, false, nil // made after we listed the packs
	} else if !errors.Is(err, fs.ErrNotExist) {
		return 0, 0, false, err
	}
	// Somebody may have merged segments under our feet.
	if err := p.index.Reload(ctx); err != nil {
		return 0, 0, false, err
	}
	if found, err := other(); found || err != nil || ok {
		return at, offset, ok, err
	}
	if !rec.Kind.IsNode() { // a node that is missing ends everything when it is read
		if len(p.missing) >= maxMissing {
			return 0, 0, false, &DamageError{Pack: rec.Pack, Offset: rec.Offset, Length: rec.Length, What: rec.Kind.String(), Err: errors.New("this and a million other blocks are missing")}
		}
		p.missing[rec.ID] = true
		p.short[k] = true
	}
	return 0, 0, false, nil
}

// reach notes a record. Repetitions are taken out before the list would grow.
func (k *prunePack) reach(offset uint32) {
	if n := len(k.reached); n > 0 && n == cap(k.reached) {
		k.sort()
		if n = len(k.reached); n > cap(k.reached)/4*3 {
			k.reached = slices.Grow(k.reached, n/2+1)
		}
	}
	k.reached = append(k.reached, offset)
	k.sorted = false
}

func (k *prunePack) sort() {
	if !k.sorted {
		slices.Sort(k.reached)
		k.reached = slices.Compact(k.reached)
		k.sorted = true
	}
}

// records reads a pack's footer.
func (p *pruner) records(k packKey) ([]block.Record, error) {
	f, err := p.r.openFile(k)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	return f.Records()
}

// measure finds out how much of each pack is alive. It also finds the blocks that
// the index did not: a damaged segment must not cost a pack.
func (p *pruner) measure(ctx context.Context) error {
	found := make(map[block.ID]bool)
	for n, k := range p.packs {
		if err := ctx.Err(); err != nil {
			return err
		}
		p.progress("measure", int64(n+1), int64(len(p.packs)))
		k.sort()
		switch {
		case k.inUse:
			p.report.BytesLive += k.size
			continue
		case len(k.reached) == 0 && len(p.missing) == 0:
			continue
		}
		records, err := p.records(k.key)
		if pack.IsDamage(err) {
			// It may be what somebody needs, or what can be mended.
			k.damaged = true
			p.report.PacksUnreadable++
			p.report.BytesLive += k.size
			p.r.log.Warn("a pack cannot be read and is left alone", "pack", k.key.handle, "error", err)
			continue
		}
		if err != nil {
			return fmt.Errorf("read the footer of pack %v: %w", k.key.handle, err)
		}
		hits := 0
		for _, rec := range records {
			if _, ok := slices.BinarySearch(k.reached, rec.Offset); ok {
				hits++
			}
			if p.missing[rec.ID] {
				found[rec.ID] = true
			}
			if k.isLive(rec, p.missing) {
				k.live += int64(rec.Length)
			}
		}
		if hits < len(k.reached) {
			return &DamageError{
				Pack: k.key.handle, What: "footer",
				Err: errors.New("a node points to a record that is not in it; nothing was deleted, hikae check tells more"),
			}
		}
		if k.records = sealedBytes(records); k.live > 0 {
			p.report.BytesLive += k.live + k.size - k.records
		}
	}
	p.report.BytesDead = p.report.BytesTotal - p.report.BytesLive
	p.report.BlocksMissing = int64(len(p.missing) - len(found))
	return nil
}

// isLive tells whether a record of the pack is needed; reached is sorted.
func (k *prunePack) isLive(rec block.Record, missing map[block.ID]bool) bool {
	_, ok := slices.BinarySearch(k.reached, rec.Offset)
	return ok || missing[rec.ID]
}

func sealedBytes(records []block.Record) (n int64) {
	for _, r := range records {
		n += int64(r.Length)
	}
	return n
}
