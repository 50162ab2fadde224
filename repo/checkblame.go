package repo

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path"
	"slices"

	"hikae/repo/internal/block"
	"hikae/repo/internal/tree"
)

// blame finds the generations that bad packs hurt, and turns them into problems.
func (c *checker) blame(ctx context.Context) error {
	if len(c.bad) == 0 {
		return nil
	}
	marks, err := c.r.readQuarantine()
	if err != nil {
		return err
	}
	problems := make(map[*badPack]*Problem, len(c.bad))
	for k, b := range c.bad {
		p := &Problem{What: b.err.Error(), Pack: k.handle.String(), Records: len(b.records), Remedy: fmt.Sprintf(remedyPack, k.handle)}
		if q := marks[k]; q != nil && q.marked {
			p.Remedy = remedyLost
		}
		offset := uint32(0)
		for o := range b.records {
			if offset == 0 || o < offset {
				offset = o
			}
		}
		p.Offset = int64(offset)
		if p.Records > 1 {
			p.What = fmt.Sprintf("%d records of pack %v, the first: %s", p.Records, k.handle, p.What)
		}
		problems[b] = p
	}
	if err := c.blameOn(ctx, problems); err != nil {
		return err
	}
	var list []Problem
	for _, p := range problems {
		list = append(list, *p)
	}
	slices.SortFunc(list, func(a, b Problem) int { return cmp.Compare(a.Pack, b.Pack) })
	c.report.Problems = append(c.report.Problems, list...)
	return nil
}

// blameOn notes in the problems, one for each bad pack, whom it hurts.
func (c *checker) blameOn(ctx context.Context, problems map[*badPack]*Problem) error {
	if len(problems) == 0 {
		return nil
	}
	v := &blamer{c: c, problems: problems, clean: make(map[block.ID]bool)}
	for _, g := range c.gens {
		v.generation = g.ref.String()
		for i := range g.manifest.Disks {
			d, err := g.OpenDisk(i)
			if err != nil {
				return err
			}
			v.disk, v.size = path.Base(g.manifest.Disks[i].Name), d.size
			if _, err := v.walk(ctx, d.tree.Root, d.tree.Levels, 0); err != nil {
				return err
			}
		}
	}
	return nil
}

type blamer struct {
	c          *checker
	problems   map[*badPack]*Problem
	clean      map[block.ID]bool // nodes below which nothing is bad
	generation string
	disk       string
	size       int64
}

// walk visits what may be bad; it says whether something was.
func (v *blamer) walk(ctx context.Context, rec block.Record, level int, base int64) (bool, error) {
	if rec.IsHole() || v.clean[rec.ID] {
		return false, nil
	}
	if err := ctx.Err(); err != nil {
		return false, err
	}
	if b := v.c.isBad(rec); b != nil {
		ok, err := v.c.readable(ctx, rec)
		if err != nil {
			return false, err
		}
		if !ok {
			v.note(v.problems[b], level, base)
			return true, nil
		}
	}
	if level == 0 {
		return false, nil
	}
	node, err := v.c.r.readNode(ctx, rec)
	if err != nil {
		if errors.Is(err, ErrDamaged) {
			return true, nil // its pack is in the report by another record
		}
		return false, err
	}
	hurt := false
	for i := range tree.Fan {
		e, err := tree.Entry(node, level, i)
		if err != nil {
			return true, nil
		}
		h, err := v.walk(ctx, e, level-1, base+int64(i)*tree.Span(level))
		if err != nil {
			return false, err
		}
		hurt = hurt || h
	}
	if !hurt {
		if len(v.clean) >= maxSeen {
			clear(v.clean)
		}
		v.clean[rec.ID] = true
	}
	return hurt, nil
}

// note adds an area to a problem, joining it to the one before if they touch.
func (v *blamer) note(p *Problem, level int, base int64) {
	bs := int64(v.c.r.config.BlockSize)
	a := Area{Generation: v.generation, Disk: v.disk, Offset: base * bs}
	a.Length = min(tree.Span(level+1)*bs, v.size-a.Offset)
	if n := len(p.Generations); n == 0 || p.Generations[n-1] != v.generation {
		p.Generations = append(p.Generations, v.generation)
	}
	if n := len(p.Areas); n > 0 {
		if last := &p.Areas[n-1]; last.Generation == a.Generation && last.Disk == a.Disk && last.Offset+last.Length == a.Offset && !p.MoreAreas {
			last.Length += a.Length
			return
		}
		if n == maxAreas {
			p.MoreAreas = true
			return
		}
	}
	p.Areas = append(p.Areas, a)
}

// readable tells whether a record that lies in a bad pack can be read all the same:
// from there, or from another pack.
func (c *checker) readable(ctx context.Context, rec block.Record) (bool, error) {
	err := c.r.fetch(ctx, rec, make([]byte, c.r.rawSize(rec.Kind)))
	if errors.Is(err, ErrDamaged) {
		return false, nil
	}
	return err == nil, err
}
