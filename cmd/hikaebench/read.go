package main

import (
	"context"
	"errors"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"time"
)

// readSequence reads the whole file cold, 1 MiB at a time, as cp does without
// looking for holes.
func (b *bench) readSequence(ctx context.Context, path string) (row, error) {
	b.dropCaches()
	begin := time.Now()
	n, err := readStretch(ctx, path, 0, math.MaxInt64)
	return row{Step: stepSeq, Seconds: time.Since(begin).Seconds(), Bytes: n}, err
}

// readStretch reads a part of a file, in order, until its end.
func readStretch(ctx context.Context, path string, off, length int64) (n int64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	if _, err := f.Seek(off, io.SeekStart); err != nil {
		return 0, err
	}
	buf := make([]byte, mib)
	for n < length && ctx.Err() == nil {
		k, err := f.Read(buf[:min(mib, length-n)])
		n += int64(k)
		if errors.Is(err, io.EOF) {
			return n, nil
		}
		if err != nil {
			return n, err
		}
	}
	return n, ctx.Err()
}

// readRandom reads 4 KiB at random places where the disk holds data, for as
// long as the options say.
func (b *bench) readRandom(ctx context.Context, path string, jobs int, step string) (row, error) {
	b.dropCaches()
	f, err := os.Open(path)
	if err != nil {
		return row{}, err
	}
	defer f.Close()
	areas := b.states[0].data
	pages := total(areas) / 4096
	if pages == 0 {
		return row{}, errors.New("the first state holds no data to read at random")
	}
	// starts[i] is how many pages lie before area i.
	starts := make([]int64, len(areas))
	for i := 1; i < len(areas); i++ {
		starts[i] = starts[i-1] + areas[i-1].length/4096
	}
	end := time.Now().Add(time.Duration(b.seconds) * time.Second)
	took := make([][]time.Duration, jobs)
	errs := make([]error, jobs)
	var wg sync.WaitGroup
	for j := range jobs {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(j), 7))
			buf := make([]byte, 4096)
			for now := time.Now(); now.Before(end) && ctx.Err() == nil; {
				page := rng.Int64N(pages)
				i, found := slices.BinarySearch(starts, page)
				if !found {
					i--
				}
				off := areas[i].start + min(page-starts[i], max(areas[i].length/4096-1, 0))*4096
				if _, err := f.ReadAt(buf, off); err != nil && !errors.Is(err, io.EOF) {
					errs[j] = err
					return
				}
				then := now
				now = time.Now()
				took[j] = append(took[j], now.Sub(then))
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return row{}, err
	}
	if ctx.Err() != nil {
		return row{}, ctx.Err()
	}
	all := slices.Concat(took...)
	slices.Sort(all)
	at := func(q float64) float64 {
		return float64(all[int(q*float64(len(all)-1))].Nanoseconds()) / 1e3
	}
	return row{Step: step, IOPS: float64(len(all)) / float64(b.seconds), P50: at(0.5), P99: at(0.99)}, nil
}
