package backup

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"hikae/backup/esxi"
	"hikae/backup/vmdk"
	"hikae/backup/vmx"
	"hikae/repo"
)

// ImportOptions of Import. Repo, VM and Disks are required.
type ImportOptions struct {
	Repo  *repo.Repository
	VM    repo.VMID // the name under which the generation goes into the repository
	Disks []string  // one image per disk: raw, flat, a descriptor, a hosted sparse VMDK
	// VMX is a configuration file; without one the generation gets a minimal one,
	// enough to register and start a restored VM.
	VMX string
	// Time is the moment the images show. Zero: when the newest of the image
	// files was last modified, which is right for copies whose times were kept
	// and for snapshots of running systems alike; never later than now.
	Time time.Time
	// Changed names, for each disk, a file of the areas in which it differs from
	// the VM's newest generation; "" for a disk of which that is not known. See
	// ReadChanged for the format. Only these areas are read, and a sample of the
	// others.
	Changed []string
	// NoParent takes nothing from the VM's newest generation; blocks that the
	// repository has are still not stored twice.
	NoParent    bool
	Compression string // as repo.SessionOptions
	AuditBlocks int    // as Options.AuditBlocks, for disks with Changed
	Progress    func(Event)
	Logger      *slog.Logger
	Clock       func() time.Time
}

// importing is one run of Import.
type importing struct {
	ImportOptions
	worker
	now    func() time.Time
	began  time.Time
	parent *parent
	plans  []*diskPlan
	files  []repo.ManifestFile
	taken  time.Time
	res    Result
}

// Import makes a generation from disk images on this machine, such as other
// programs' backups: no host is needed. Images are compared with the VM's newest
// generation, so blocks that did not change cost nothing but reading.
func Import(ctx context.Context, o ImportOptions) (Result, error) {
	switch {
	case o.Repo == nil:
		return Result{}, errors.New("an import needs a repository")
	case len(o.Disks) == 0:
		return Result{}, errors.New("an import needs at least one disk image")
	case len(o.Changed) > 0 && len(o.Changed) != len(o.Disks):
		return Result{}, fmt.Errorf("%s with changed areas for %s: give one for each disk, or none",
			plural(len(o.Changed), "file"), plural(len(o.Disks), "disk"))
	}
	if err := o.VM.Validate(); err != nil {
		return Result{}, err
	}
	if o.AuditBlocks == 0 {
		o.AuditBlocks = defaultAudit
	}
	m := &importing{ImportOptions: o, now: orNow(o.Clock)}
	m.began = m.now()
	m.worker = worker{log: orDiscard(o.Logger).With("vm", o.VM.String()), meter: newMeter(o.Progress), auditBlocks: o.AuditBlocks}
	m.res = Result{Host: o.VM.Host, VM: o.VM.Name, Disks: []DiskResult{}}
	err := m.run(ctx)
	m.res.Seconds = m.now().Sub(m.began).Seconds()
	return m.res, err
}

func (m *importing) run(ctx context.Context) (err error) {
	m.meter.begin(PhaseCheck, 0, "")
	if !m.NoParent {
		var why string
		if m.parent, why, err = before(ctx, m.Repo, m.VM, lastStored); err != nil {
			return err
		}
		if why != "" {
			m.res.Warnings = append(m.res.Warnings, why)
		}
	}
	closeAll, err := m.open()
	defer closeAll()
	if err != nil {
		return err
	}
	if err := m.configure(); err != nil {
		return err
	}
	m.session, err = m.Repo.Begin(ctx, repo.SessionOptions{Compression: m.Compression})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.session.Close()) }()
	var toRead int64
	for _, p := range m.plans {
		if err := m.findLost(ctx, p, false); err != nil {
			return err
		}
		if err := m.plan(ctx, p, ""); err != nil {
			return err
		}
		toRead += total(p.areas)
	}
	m.meter.begin(PhaseRead, toRead, "")
	bufs := newPool(poolPieces)
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(disksAtOnce)
	for _, p := range m.plans {
		g.Go(func() error {
			if err := m.sample(gctx, p); err != nil {
				return err
			}
			return m.storeOrReplan(gctx, p, bufs, m.plan)
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return m.commit(ctx)
}

// open opens the images and gives them names.
func (m *importing) open() (closeAll func(), err error) {
	var open []*imageSource
	closeAll = func() {
		for _, i := range open {
			_ = i.Close() // only read
		}
	}
	names := newNames(m.VM.Name)
	for i, file := range m.Disks {
		info, err := os.Stat(file)
		if err != nil {
			return closeAll, err
		}
		image, err := vmdk.OpenImage(file)
		if err != nil {
			return closeAll, err
		}
		src := newImageSource(image, file, info.Size())
		open = append(open, src)
		m.modified(info)
		if d := image.Descriptor(); d != nil {
			for _, e := range d.Extents {
				if info, err := os.Stat(filepath.Join(filepath.Dir(file), filepath.Base(e.File))); err == nil {
					m.modified(info)
				}
			}
		}
		p := &diskPlan{
			disk:  esxi.Disk{Key: int32(2000 + i), Label: fmt.Sprintf("Hard disk %d", i+1), Capacity: image.Capacity(), Chain: []string{file}},
			block: int64(m.Repo.BlockSize()),
			src:   src,
		}
		n := m.inParent(i, file)
		if n >= 0 {
			p.before = &m.parent.manifest.Disks[n]
			p.disk.Key, p.name = p.before.Key, names.disk(p.before.Name)
			if p.parent, err = m.parent.gen.OpenDisk(n); err != nil {
				m.res.Warnings = append(m.res.Warnings,
					fmt.Sprintf("%s of the previous generation cannot be opened, nothing is taken from it: %s", p.disk.Label, oneLine(err)))
				p.parent, p.before = nil, nil
			}
		} else {
			p.name = names.disk(nameForImage(m.VM.Name, file, i))
		}
		m.describe(p, image)
		m.plans = append(m.plans, p)
	}
	if !m.Time.IsZero() {
		m.taken = m.Time
	} else if m.taken.After(m.began) {
		m.taken = m.began
	}
	return closeAll, nil
}

// modified keeps the time of the newest file.
func (m *importing) modified(info os.FileInfo) {
	if t := info.ModTime(); t.After(m.taken) {
		m.taken = t
	}
}

// inParent finds which disk of the previous generation an image continues: the
// one of its name, else the one in its place.
func (m *importing) inParent(i int, file string) int {
	if m.parent == nil {
		return -1
	}
	disks := m.parent.manifest.Disks
	want := nameForImage(m.VM.Name, file, i)
	for n, d := range disks {
		if strings.EqualFold(d.Name, want) {
			return n
		}
	}
	if i < len(disks) {
		return i
	}
	return -1
}

// nameForImage names a disk after its VMDK, or, for other images, after the VM
// the way ESXi does: web01, web01_1, …
func nameForImage(vm, file string, i int) string {
	if base, ok := strings.CutSuffix(filepath.Base(file), ".vmdk"); ok {
		return linkNumber.ReplaceAllString(strings.TrimSuffix(base, "-flat"), "")
	}
	if i == 0 {
		return vm
	}
	return fmt.Sprintf("%s_%d", vm, i)
}

// describe makes the disk's descriptor, from the image's own where it has one.
func (m *importing) describe(p *diskPlan, image *vmdk.Image) {
	d := image.Descriptor()
	if d != nil {
		p.disk.UUID = d.Value("ddb.uuid")
		p.disk.Adapter = d.Value("ddb.adapterType")
		p.descriptor = string(d.Standalone(p.name).Bytes())
		return
	}
	if p.before != nil && p.before.Capacity == p.disk.Capacity {
		if was, err := vmdk.ParseDescriptor([]byte(p.before.Descriptor)); err == nil {
			p.disk.UUID, p.disk.Adapter = p.before.UUID, p.before.Adapter
			p.descriptor = string(was.Standalone(p.name).Bytes())
			return
		}
	}
	p.disk.Adapter = "lsilogic"
	p.descriptor = string(vmdk.NewFlatDescriptor(p.name, p.disk.Capacity, p.disk.Adapter, true, "", contentID(p.disk.Capacity)).Bytes())
}

// contentID is any number that is not the one of a disk without content.
func contentID(capacity int64) uint32 {
	return uint32(capacity>>9)&0x7fffffff | 1
}

// configure takes or makes the VM's configuration.
func (m *importing) configure() error {
	base := cleanName(m.VM.Name, "vm")
	var config *vmx.File
	if m.VMX == "" {
		minimal := vmx.Minimal{Name: m.VM.Name}
		for _, p := range m.plans {
			minimal.Disks = append(minimal.Disks, p.name+".vmdk")
		}
		minimal.Adapter = m.plans[0].disk.Adapter
		config = vmx.New(minimal)
	} else {
		text, err := os.ReadFile(m.VMX)
		if err != nil {
			return err
		}
		if config, err = vmx.Parse(text); err != nil {
			return fmt.Errorf("%s: %w", m.VMX, err)
		}
		base = cleanName(strings.TrimSuffix(filepath.Base(m.VMX), ".vmx"), base)
		m.attach(config)
		if err := m.nvram(config, base); err != nil {
			return err
		}
	}
	m.files = append(m.files, repo.ManifestFile{Name: base + ".vmx", Data: config.Bytes()})
	return nil
}

// attach makes a given configuration name the imported disks: those of the same
// name first, the rest in order. Disks that were not imported are taken out.
func (m *importing) attach(config *vmx.File) {
	slots := config.Disks()
	taken := make([]bool, len(m.plans))
	at := make([]int, len(slots))
	for i, s := range slots {
		at[i] = -1
		for n := range m.plans {
			if at[i] < 0 && !taken[n] && nameForImage("", filepath.Base(s.File), i) == nameForImage(m.VM.Name, m.Disks[n], n) {
				at[i], taken[n] = n, true
			}
		}
	}
	for i, s := range slots {
		for n := range m.plans {
			if at[i] < 0 && !taken[n] {
				at[i], taken[n] = n, true
			}
		}
		if at[i] < 0 {
			m.res.Warnings = append(m.res.Warnings, fmt.Sprintf("%s attaches %s at %s, for which no image was given; a restored VM does not have it",
				m.VMX, s.File, s.Slot))
			config.RemoveDevice(s.Slot)
			continue
		}
		config.SetDisk(s.Slot, m.plans[at[i]].name+".vmdk")
	}
	for n, ok := range taken {
		if !ok {
			m.res.Warnings = append(m.res.Warnings, fmt.Sprintf("%s does not attach %s; its content is in the generation, a restored VM does not have it attached",
				m.VMX, m.Disks[n]))
		}
	}
}

// nvram takes the firmware settings beside a configuration, when they are there.
func (m *importing) nvram(config *vmx.File, base string) error {
	name, ok := config.Get("nvram")
	if !ok {
		return nil
	}
	f, err := os.Open(filepath.Join(filepath.Dir(m.VMX), filepath.Base(name)))
	if err != nil {
		return nil // copies often leave it out, and a VM starts without
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, nvramLimit))
	if err != nil {
		return err
	}
	config.Set("nvram", base+".nvram")
	m.files = append(m.files, repo.ManifestFile{Name: base + ".nvram", Data: data})
	return nil
}

// plan decides which areas of an image to read. Holes of the image are zeros by
// the word of the local file system, which is taken.
func (m *importing) plan(ctx context.Context, p *diskPlan, doubt string) error {
	if err := m.planAreas(ctx, p, doubt); err != nil {
		return err
	}
	p.tellHealed()
	return nil
}

func (m *importing) planAreas(ctx context.Context, p *diskPlan, doubt string) error {
	capacity := p.disk.Capacity
	p.mode, p.reason = repo.ModeImport, p.forsaken
	p.told, p.zeros, p.cover = false, true, nil
	if p.parent != nil && p.parent.Size() > capacity {
		p.parent = nil
		p.because("the disk is smaller than in the previous generation")
	}
	data, err := allocatedIn(ctx, p.src.(*imageSource).image, capacity)
	if err != nil {
		return err
	}
	data = roundOut(data, p.block, capacity)
	i := m.index(p)
	if i < len(m.Changed) && m.Changed[i] != "" && p.parent != nil && doubt == "" {
		changed, err := ReadChanged(m.Changed[i], capacity)
		if err != nil {
			return err
		}
		if old := p.parent.Size(); old < capacity { // what was added was never compared
			from := old / p.block * p.block
			changed = union(changed, []area{{Offset: from, Length: capacity - from}})
		}
		changed = roundOut(changed, p.block, capacity)
		p.cover = union(changed, p.lost)
		p.areas = intersect(p.cover, data)
		p.changed, p.zeros, p.told = total(changed), false, true
		p.because("changed areas were given")
		return nil
	}
	if doubt != "" {
		p.because(doubt)
	}
	if p.parent != nil {
		p.because("compared with generation " + m.parent.gen.Ref().Name())
	}
	p.areas, p.changed = data, total(data)
	return nil
}

func (m *importing) index(p *diskPlan) int {
	for i, q := range m.plans {
		if p == q {
			return i
		}
	}
	return -1
}

// sample tests the word of whoever made the list of changed areas; a lie makes
// the import read everything.
func (m *importing) sample(ctx context.Context, p *diskPlan) error {
	if !p.told || m.auditBlocks < 0 {
		return nil
	}
	lie, err := m.audit(ctx, p)
	if p.parent != nil && errors.Is(err, repo.ErrDamaged) {
		return m.aroundDamage(ctx, p, m.plan, err)
	}
	if err != nil || lie == "" {
		return err
	}
	m.log.Warn("the list of changed areas is wrong, reading everything", "disk", p.disk.Label, "found", lie)
	before := total(p.areas)
	err = m.plan(ctx, p, lie)
	m.meter.grow(total(p.areas) - before)
	return err
}

// commit makes the generation.
func (m *importing) commit(ctx context.Context) error {
	m.meter.begin(PhaseCommit, 0, "")
	man := repo.Manifest{
		VM: m.VM, Time: m.taken.UTC().Truncate(time.Second), Mode: repo.ModeImport,
		Consistency: repo.ConsistencyUnknown, Files: m.files,
	}
	for _, p := range m.plans {
		man.Disks = append(man.Disks, p.manifest())
		m.res.Disks = append(m.res.Disks, p.result())
	}
	_, man.Reason = overall(m.res.Disks)
	return m.res.commit(ctx, m.session, man, m.began, m.now)
}

// allocatedIn lists what may hold data in an image.
func allocatedIn(ctx context.Context, image *vmdk.Image, capacity int64) ([]area, error) {
	areas, err := image.Allocated(ctx)
	return tidy(areas, capacity), err
}

// imageSource is an image as the pipeline reads it. Images larger than half of
// this machine's memory leave the page cache again as they are read: they would
// push out everything else and not be there for a second reader all the same.
type imageSource struct {
	image *vmdk.Image
	file  *os.File // nil: leave the page cache alone
}

func newImageSource(image *vmdk.Image, name string, size int64) *imageSource {
	s := &imageSource{image: image}
	if size > memory()/2 {
		s.file, _ = os.Open(name) // only a courtesy
	}
	return s
}

func (s *imageSource) Close() error {
	if s.file != nil {
		s.file.Close()
	}
	return s.image.Close()
}

func (s *imageSource) ReadAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	n, err := s.image.ReadAtContext(ctx, p, off)
	forget(s.file, off, int64(n))
	return n, err
}

// lastStored is the parent of an import: whatever came into the repository last,
// in the order in which the operator brings old copies, whatever their times.
func lastStored(refs []repo.Ref) repo.Ref {
	return slices.MaxFunc(refs, func(a, b repo.Ref) int { return cmp.Compare(a.Sequence, b.Sequence) })
}
