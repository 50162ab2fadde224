// Command hikaebench measures hikae on this machine: storing the successive
// states of a disk with and without known changed areas, the same through a
// simulated host, restoring, and reading through the mount. Beside it, when
// they are installed, it does the same work with restic, borg and kopia, in the
// same run, so that its figures are ratios and not claims about a machine.
//
// It drives the real programs as processes, as an operator would; only the
// ceilings (the pipeline with nothing written, the library without a mount)
// are measured in this process.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
)

// options is what the command line says.
type options struct {
	hikae, esxisim string // the programs to measure
	images         []string
	work           string // scratch folder; everything below it may be removed
	json           bool
	others         bool // measure restic, borg and kopia too, where installed
	drop           bool // drop the page cache before each step (root)
	seconds        int  // length of a random read measurement
	size           int64
	keep           bool
	reuse          bool // only the mount, of the repository that an earlier run kept in work
	rounds         int  // the best of so many is taken where a step is short
	serve          string
	direct         bool
}

func main() {
	var o options
	var images string
	flag.StringVar(&o.hikae, "hikae", "bin/hikae", "the hikae program")
	flag.StringVar(&o.esxisim, "esxisim", "bin/esxisim", "the esxisim program")
	flag.StringVar(&images, "images", os.Getenv("IMAGES"), "raw images, successive states of one disk, separated by spaces or commas (default: generated data)")
	flag.StringVar(&o.work, "work", "", "scratch folder on the disk to measure (default: a new folder in $TMPDIR)")
	flag.BoolVar(&o.json, "json", false, "print one JSON object per measurement instead of a table")
	flag.BoolVar(&o.others, "others", true, "measure restic, borg and kopia too, where installed")
	flag.BoolVar(&o.drop, "drop-caches", os.Geteuid() == 0, "drop the page cache before each step (needs root)")
	flag.IntVar(&o.seconds, "seconds", 8, "length of each random read measurement, in seconds")
	flag.Int64Var(&o.size, "size", 512, "MiB of data in a generated image")
	flag.BoolVar(&o.keep, "keep", false, "keep the scratch folder")
	flag.BoolVar(&o.reuse, "reuse", false, "measure only the mount, on the repository that an earlier run kept in -work")
	flag.IntVar(&o.rounds, "rounds", 3, "how often reading in sequence is measured; the best counts")
	flag.StringVar(&o.serve, "serve-memory", "", "used by hikaebench itself")
	flag.BoolVar(&o.direct, "direct", false, "used by hikaebench itself")
	flag.Parse()
	o.images = strings.FieldsFunc(images, func(r rune) bool { return r == ' ' || r == ',' })

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	do := run
	if o.serve != "" {
		do = serveMemory
	}
	if err := do(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "hikaebench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o options) (err error) {
	for _, p := range []*string{&o.hikae, &o.esxisim} {
		if *p, err = filepath.Abs(*p); err != nil {
			return err
		}
		if _, err := os.Stat(*p); err != nil {
			return fmt.Errorf("%s is not there; run `make build` first", *p)
		}
	}
	if o.work == "" {
		if o.work, err = os.MkdirTemp("", "hikaebench-"); err != nil {
			return err
		}
	} else if err := os.MkdirAll(o.work, 0o700); err != nil {
		return err
	}
	if !o.keep && !o.reuse {
		defer os.RemoveAll(o.work)
	}
	b := &bench{options: o, out: &table{json: o.json}}
	if len(b.images) == 0 && o.reuse {
		return errors.New("-reuse needs -images as well: what the first generation was made of")
	}
	if len(b.images) == 0 {
		say("generating %d MiB of data", o.size)
		if b.images, err = generate(filepath.Join(o.work, "images"), o.size<<20); err != nil {
			return err
		}
	}
	defer b.out.flush()
	steps := []func(context.Context) error{
		b.prepare, b.store, b.restore, b.mount, b.ceiling, b.simulated, b.rivals,
	}
	if o.reuse {
		b.images = b.images[:1]
		steps = []func(context.Context) error{b.prepare, b.mount}
	}
	for _, step := range steps {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return nil
}

func say(format string, args ...any) { fmt.Fprintf(os.Stderr, "# "+format+"\n", args...) }
