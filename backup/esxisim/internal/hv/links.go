package hv

import (
	"context"
	"errors"
	"os"

	"hikae/backup/esxisim/internal/vdisk"
)

// A VM's disks are a tree of links: the configuration and every snapshot name
// one link each, and a link's parent stands in its descriptor. A link that is
// not named, and that exactly one other stands on, takes that one's content
// in; a link that is not named and that nothing stands on is deleted. That is
// all that is left to do when a snapshot has gone from the list.

// consolidate does it. Called under vm.mu.
func (vm *VM) consolidate(ctx context.Context) error {
	err := vm.mergeAll(ctx)
	vm.unmerged = err != nil
	if err == nil {
		vm.loose = nil
	}
	vm.follow()
	return err
}

func (vm *VM) mergeAll(ctx context.Context) error {
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		tree, err := vm.tree()
		if err != nil {
			return err
		}
		done := true
		for _, l := range tree.order {
			switch children := tree.children[l]; {
			case vm.named(l):
				continue
			case len(children) == 0:
				err = vm.deleteLink(l)
			case len(children) == 1 && len(tree.children[children[0]]) <= 1:
				err = vm.merge(ctx, tree, l, children[0])
			default:
				// Several links stand on it, or on its only child: it stays,
				// as the common ground of snapshots that are still there.
				continue
			}
			if err != nil {
				return err
			}
			done = false
			break // the tree is another one now
		}
		if done {
			return nil
		}
	}
}

// needsMerge tells whether a chain that runs has links no snapshot needs: the
// host stopped before it had merged them.
func (vm *VM) needsMerge() bool {
	for _, d := range vm.disks {
		links := d.seen().links
		for i := range links[:max(len(links)-1, 0)] {
			if !vm.named(vm.h.rel(links[i].Descriptor)) {
				return true
			}
		}
	}
	return false
}

type linkTree struct {
	order    []string // every link after its parent, so that merges keep the oldest names
	children map[string][]string
	parent   map[string]string
}

func (vm *VM) tree() (*linkTree, error) {
	t := &linkTree{children: map[string][]string{}, parent: map[string]string{}}
	var tops []string
	for _, d := range vm.disks {
		tops = append(tops, d.file)
	}
	for _, s := range vm.snaps {
		for _, d := range s.Disks {
			tops = append(tops, d.File)
		}
	}
	tops = append(tops, vm.loose...)
	for _, top := range tops {
		var chain []string
		for name := top; name != ""; {
			if _, known := t.parent[name]; known {
				break
			}
			d, err := vm.h.descriptor(name)
			if err != nil {
				if errors.Is(err, ErrNotFound) && name == top { // merged already, or a disk whose files are gone
					break
				}
				return nil, err
			}
			parent := vm.h.parentOf(name, d)
			t.parent[name] = parent
			if parent != "" {
				t.children[parent] = append(t.children[parent], name)
			}
			chain = append(chain, name)
			name = parent
		}
		for i := len(chain) - 1; i >= 0; i-- {
			t.order = append(t.order, chain[i])
		}
	}
	return t, nil
}

// merge takes the content of child into link.
func (vm *VM) merge(ctx context.Context, t *linkTree, link, child string) error {
	if fi, err := os.Stat(vm.extent(child)); err == nil && !vm.thick(link) && !vm.h.space.fits(allocated(fi)) {
		return fail(ErrNoSpace, link, "there is not enough space on the datastore to merge %s into %s", child, link)
	}
	do := func(d *disk, v *vdisk.Disk) error {
		i := linkIndex(v.Links(), vm.h.abs(link))
		if i < 0 {
			return fail(ErrInvalid, link, "%s is not in the chain of %s", link, child)
		}
		err := v.RemoveSnapshot(ctx, i, func([]vdisk.Link) error { return vm.renamed(child, link) })
		if d != nil {
			d.as.Store(see(v))
		}
		return err
	}
	for _, d := range vm.disks {
		if linkIndex(d.seen().links, vm.h.abs(child)) >= 0 {
			return vm.with(d, func(v *vdisk.Disk) error { return do(d, v) })
		}
	}
	// A branch no disk runs on: opened from its end.
	leaf := child
	for len(t.children[leaf]) > 0 {
		leaf = t.children[leaf][0]
	}
	v, err := vm.openDisk(leaf)
	if err != nil {
		return err
	}
	return errors.Join(do(nil, v), v.Close())
}

// renamed lets everything that named a link name the one that took it in.
func (vm *VM) renamed(from, to string) error {
	for _, d := range vm.disks {
		if d.file == from {
			d.file = to
			vm.x.SetDisk(d.place.Slot(), vm.diskName(to))
		}
	}
	for _, s := range vm.snaps {
		for i := range s.Disks {
			if s.Disks[i].File == from {
				s.Disks[i].File = to
				s.Config.SetDisk(s.Disks[i].Place.Slot(), vm.diskName(to))
			}
		}
	}
	return errors.Join(vm.writeVMX(), vm.writeVMSD())
}

// extent is the full path of a link's data.
func (vm *VM) extent(link string) string {
	d, err := vm.h.descriptor(link)
	if err != nil || len(linkFiles(link, d)) < 2 {
		return vm.h.abs(link)
	}
	return vm.h.abs(linkFiles(link, d)[1])
}

// thick tells whether a link has all its blocks already.
func (vm *VM) thick(link string) bool {
	name := vm.extent(link)
	fi, err := os.Stat(name)
	return err == nil && vm.h.charge(vm.h.rel(name), fi) >= fi.Size()
}
