package repo

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path"
	"strconv"
	"strings"
	"testing"
	"time"

	"hikae/repo/internal/fsx"
)

// The tests named TestTorture… do a bounded amount of work in go test. With
// HIKAE_TORTURE set to a duration they go on for that long, and sweeps try every
// operation (make torture). HIKAE_SEED makes the first walk that of a failure.

// tortureTime is how long to go on; 0 is the ordinary amount of work.
func tortureTime(t testing.TB) time.Duration {
	t.Helper()
	s := os.Getenv("HIKAE_TORTURE")
	if s == "" {
		return 0
	}
	d, err := time.ParseDuration(s)
	if err != nil || d <= 0 {
		t.Fatalf("HIKAE_TORTURE is %q: a duration such as 10m is wanted", s)
	}
	return d
}

// stride is every for ordinary tests, and 1 when all is to be tried.
func stride(t testing.TB, every int) int {
	if tortureTime(t) > 0 {
		return 1
	}
	return every
}

// seeds calls walk with a seed of its own as often as ordinary says, or for as long
// as the time lasts, and stops at the first failure.
func seeds(t *testing.T, ordinary int, walk func(t *testing.T, seed uint64)) {
	first := rand.Uint64()
	if s := os.Getenv("HIKAE_SEED"); s != "" {
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatalf("HIKAE_SEED is %q: a number is wanted", s)
		}
		first, ordinary = n, 1
	}
	long := tortureTime(t)
	began := time.Now()
	n := 0
	for ; n < ordinary || time.Since(began) < long; n++ {
		seed := first + uint64(n)
		if !t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) { walk(t, seed) }) {
			t.Fatalf("to see it again: HIKAE_SEED=%d go test -run '^%s$' ./repo", seed, t.Name())
		}
	}
	t.Logf("%d seeds from %d on", n, first)
}

// allPacks lists the packs that are there.
func allPacks(mem *fsx.Mem) (packs []string) {
	for _, name := range mem.Files() {
		if (strings.HasPrefix(name, "packs/") || strings.HasPrefix(name, "meta/")) && path.Ext(name) == "" {
			packs = append(packs, name)
		}
	}
	return packs
}
