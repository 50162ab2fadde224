package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"hikae/fs/ceiling"
	"hikae/repo"
)

const (
	stepSeq   = "mount: read in sequence, cold"
	stepFour  = "mount: four generations at once, cold"
	stepHoles = "mount: read holes, cold"
	stepWarm  = "mount: read again, warm"
	stepRand1 = "mount: random 4 KiB, cold, 1 job"
	stepRand4 = "mount: random 4 KiB, cold, 4 jobs"
)

// mount reads the first generation through the mount, in all the ways people
// do, and beside it what bounds that on this machine: a FUSE server with
// nothing to do, the library with no FUSE, a local file.
func (b *bench) mount(ctx context.Context) error {
	dir := b.path("mnt")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	b.dropCaches()
	begin := time.Now()
	hikae, err := startServer(b.hikaeCommand(ctx, "mount", dir, "--foreground"))
	if err != nil {
		return err
	}
	defer func() { _ = hikae.stop() }()
	flat := ""
	for flat == "" {
		if time.Since(begin) > time.Minute || ctx.Err() != nil {
			return errors.New("the mount did not come up within a minute")
		}
		time.Sleep(2 * time.Millisecond)
		flat, _ = theOne(filepath.Join(dir, "bench", "disk", stampName(0)), "-flat.vmdk")
	}
	b.out.add(row{Step: "mount: until the first generation is listed", Tool: "hikae", Seconds: time.Since(begin).Seconds()})
	for _, f := range []func(context.Context, string) error{b.inSequence, b.inParallel, b.again, b.atRandom} {
		if err := f(ctx, flat); err != nil {
			return err
		}
	}
	if err := hikae.stop(); err != nil {
		return fmt.Errorf("hikae mount: %w", err)
	}
	b.out.add(row{Step: "mount: peak memory of all that", Tool: "hikae", RSS: peak(hikae.cmd)})
	return nil
}

// readers measure a file that some tool shows: in sequence, then at random.
func (b *bench) readers(path string) []func(context.Context) (row, error) {
	return []func(context.Context) (row, error){
		func(ctx context.Context) (row, error) { return b.readSequence(ctx, path) },
		func(ctx context.Context) (row, error) { return b.readRandom(ctx, path, 1, stepRand1) },
		func(ctx context.Context) (row, error) { return b.readRandom(ctx, path, 4, stepRand4) },
	}
}

// contender is one of several that do the same, in turns.
type contender struct {
	tool, note string
	do         func(context.Context) (row, error)
}

// best measures all of them in turns, so that what disturbs the machine disturbs
// all, and adds and returns the fastest of each.
func (b *bench) best(ctx context.Context, all ...contender) ([]row, error) {
	rows := make([]row, len(all))
	for range b.rounds {
		for i, c := range all {
			r, err := c.do(ctx)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", c.tool, err)
			}
			if rows[i].Seconds == 0 || r.Seconds < rows[i].Seconds {
				rows[i] = r
			}
			rows[i].Tool, rows[i].Note = c.tool, c.note
		}
	}
	for _, r := range rows {
		b.out.add(r)
	}
	return rows, nil
}

// inSequence reads the whole disk, data and holes.
func (b *bench) inSequence(ctx context.Context, flat string) error {
	cached, stop, err := b.memory(ctx, false)
	if err != nil {
		return err
	}
	defer stop()
	direct, stop, err := b.memory(ctx, true)
	if err != nil {
		return err
	}
	defer stop()
	disk, stop, err := b.library(ctx)
	if err != nil {
		return err
	}
	defer stop()
	rows, err := b.best(ctx,
		contender{"hikae", "", func(ctx context.Context) (row, error) { return b.readSequence(ctx, flat) }},
		contender{"FUSE, one file in memory", "", func(ctx context.Context) (row, error) { return b.readSequence(ctx, cached) }},
		contender{"FUSE, direct I/O", "nothing stays in the page cache", func(ctx context.Context) (row, error) { return b.readSequence(ctx, direct) }},
		contender{"library, no mount", "all processors", func(ctx context.Context) (row, error) { return b.readLibrary(ctx, disk) }},
	)
	if err != nil {
		return err
	}
	// Where all processors are busy with either, a mount has to do both.
	b.out.add(row{
		Step: stepSeq, Tool: "library, then FUSE", Seconds: rows[1].Seconds + rows[3].Seconds, Bytes: rows[0].Bytes,
		Note: fmt.Sprintf("the sum; %d processors", runtime.GOMAXPROCS(0)),
	})
	hole := b.hole()
	if hole.length < 64*mib {
		return nil
	}
	stretch := func(path string) func(context.Context) (row, error) {
		return func(ctx context.Context) (row, error) {
			b.dropCaches()
			begin := time.Now()
			n, err := readStretch(ctx, path, hole.start, hole.length)
			return row{Step: stepHoles, Seconds: time.Since(begin).Seconds(), Bytes: n}, err
		}
	}
	_, err = b.best(ctx, contender{"hikae", "", stretch(flat)}, contender{"FUSE, one file in memory", "", stretch(cached)})
	return err
}

// hole is the first state's largest, 1 GiB at most.
func (b *bench) hole() area {
	var big area
	end := int64(0)
	for _, a := range append(b.states[0].data, area{b.states[0].size, 0}) {
		if a.start-end > big.length {
			big = area{end, a.start - end}
		}
		end = a.start + a.length
	}
	return area{big.start, min(big.length, 1024*mib)}
}

// inParallel reads a quarter of the disk from each of four generations at once:
// as much as one reader reads of one generation.
func (b *bench) inParallel(ctx context.Context, flat string) error {
	vm := filepath.Dir(filepath.Dir(flat))
	list, err := filepath.Glob(filepath.Join(vm, "20*", filepath.Base(flat)))
	if err != nil || len(list) == 0 {
		return fmt.Errorf("no generations below %s: %w", vm, err)
	}
	quarter := b.states[0].size / 4
	_, err = b.best(ctx, contender{"hikae", fmt.Sprintf("of %d generations", min(4, len(list))), func(ctx context.Context) (row, error) {
		b.dropCaches()
		begin := time.Now()
		var read atomic.Int64
		errs := make([]error, 4)
		var wg sync.WaitGroup
		for i := range errs {
			wg.Go(func() {
				n, err := readStretch(ctx, list[i%len(list)], int64(i)*quarter, quarter)
				read.Add(n)
				errs[i] = err
			})
		}
		wg.Wait()
		return row{Step: stepFour, Seconds: time.Since(begin).Seconds(), Bytes: read.Load()}, errors.Join(errs...)
	}}, contender{"hikae, one reader", "", func(ctx context.Context) (row, error) {
		r, err := b.readSequence(ctx, flat)
		r.Step = stepFour
		return r, err
	}})
	return err
}

// again reads what is in the page cache.
func (b *bench) again(ctx context.Context, flat string) error {
	length := min(b.states[0].size, 1024*mib)
	twice := func(path string) func(context.Context) (row, error) {
		return func(ctx context.Context) (row, error) {
			if _, err := readStretch(ctx, path, 0, length); err != nil {
				return row{}, err
			}
			begin := time.Now()
			n, err := readStretch(ctx, path, 0, length)
			return row{Step: stepWarm, Seconds: time.Since(begin).Seconds(), Bytes: n}, err
		}
	}
	cached, stop, err := b.memory(ctx, false)
	if err != nil {
		return err
	}
	defer stop()
	_, err = b.best(ctx,
		contender{"hikae", "", twice(flat)},
		contender{"FUSE, one file in memory", "", twice(cached)},
		contender{"a local file", "", twice(b.states[0].path)},
	)
	return err
}

func (b *bench) atRandom(ctx context.Context, flat string) error {
	cached, stop, err := b.memory(ctx, false)
	if err != nil {
		return err
	}
	defer stop()
	for tool, path := range map[string]string{"hikae": flat, "FUSE, one file in memory": cached} {
		for _, read := range b.readers(path)[1:] {
			r, err := read(ctx)
			if err != nil {
				return err
			}
			r.Tool = tool
			r.Note = fmt.Sprintf("p99 is %.1f × p50", r.P99/r.P50)
			b.out.add(r)
		}
	}
	return nil
}

// server is a process that ends when it is asked to.
type server struct {
	cmd  *exec.Cmd
	once sync.Once
	err  error
}

func startServer(cmd *exec.Cmd) (*server, error) {
	cmd.Stderr = os.Stderr
	return &server{cmd: cmd}, cmd.Start()
}

func (s *server) stop() error {
	s.once.Do(func() {
		_ = s.cmd.Process.Signal(syscall.SIGTERM)
		s.err = s.cmd.Wait()
	})
	return s.err
}

// memory serves a file as large as the disk out of memory, from another process
// as the mount is served.
func (b *bench) memory(ctx context.Context, direct bool) (path string, stop func(), err error) {
	dir, err := os.MkdirTemp(b.work, "memory-")
	if err != nil {
		return "", nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return "", nil, err
	}
	args := []string{"-serve-memory", dir, "-size", strconv.FormatInt(b.states[0].size/mib, 10)}
	if direct {
		args = append(args, "-direct")
	}
	cmd := exec.CommandContext(ctx, self, args...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	ready, err := cmd.StdoutPipe()
	if err != nil {
		return "", nil, err
	}
	s, err := startServer(cmd)
	if err != nil {
		return "", nil, err
	}
	stop = func() {
		if err := s.stop(); err != nil {
			say("the file in memory: %v", err)
		}
		os.Remove(dir)
	}
	if _, err := bufio.NewReader(ready).ReadString('\n'); err != nil {
		stop()
		return "", nil, fmt.Errorf("the file in memory: %w", err)
	}
	return filepath.Join(dir, ceiling.Name), stop, nil
}

// serveMemory is the other process.
func serveMemory(ctx context.Context, o options) error {
	s, err := ceiling.Mount(o.serve, ceiling.Options{Size: o.size * mib, Direct: o.direct})
	if err != nil {
		return err
	}
	fmt.Println("ready")
	<-ctx.Done()
	return s.Unmount()
}

// library opens the first generation's disk in this process.
func (b *bench) library(ctx context.Context) (disk *repo.Disk, stop func(), err error) {
	pass, err := os.ReadFile(b.pass)
	if err != nil {
		return nil, nil, err
	}
	r, err := repo.Open(ctx, b.repo, repo.Passphrase(bytes.TrimSpace(pass)), repo.Options{})
	if err != nil {
		return nil, nil, err
	}
	stop = func() { _ = r.Close() }
	ref, err := r.Resolve(ctx, repo.VMID{Host: "bench", Name: "disk"}, stampName(0))
	if err == nil {
		var g *repo.Generation
		if g, err = r.Generation(ctx, ref); err == nil {
			disk, err = g.OpenDisk(0)
		}
	}
	if err != nil {
		stop()
	}
	return disk, stop, err
}

// readLibrary reads a disk in parallel through the repository's own reader.
func (b *bench) readLibrary(ctx context.Context, disk *repo.Disk) (row, error) {
	b.dropCaches()
	var next, read atomic.Int64
	errs := make([]error, runtime.GOMAXPROCS(0))
	var wg sync.WaitGroup
	begin := time.Now()
	for i := range errs {
		wg.Go(func() {
			buf := make([]byte, mib)
			for ctx.Err() == nil {
				off := (next.Add(1) - 1) * mib
				if off >= disk.Size() {
					return
				}
				n, err := disk.ReadAtContext(ctx, buf[:min(mib, disk.Size()-off)], off)
				if err != nil && !errors.Is(err, io.EOF) {
					errs[i] = err
					return
				}
				read.Add(int64(n))
			}
		})
	}
	wg.Wait()
	return row{Step: stepSeq, Seconds: time.Since(begin).Seconds(), Bytes: read.Load()}, errors.Join(append(errs, ctx.Err())...)
}
