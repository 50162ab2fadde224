package repo

import (
	"context"
	"fmt"
	"testing"
)

// BenchmarkParity is what parity costs a full backup, its session's end included: time
// and room, in one run. Without is the same as BenchmarkFull.
func BenchmarkParity(b *testing.B) {
	data := realData(b, benchSize)
	for _, percent := range []int{0, 3, 10} {
		b.Run(fmt.Sprint(percent), func(b *testing.B) {
			b.SetBytes(int64(len(data)))
			b.ReportAllocs()
			defer cpu(b, len(data))()
			for b.Loop() {
				b.StopTimer()
				dir := b.TempDir()
				if err := Init(context.Background(), dir, InitOptions{Passphrase: passphrase, KDF: cheap, Parity: percent}); err != nil {
					b.Fatal(err)
				}
				r, err := Open(context.Background(), dir, Passphrase(passphrase), Options{})
				if err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
				benchWrite(b, r, data, "", testClock(), nil)
				b.StopTimer()
				stats, err := r.physical(context.Background())
				if err != nil {
					b.Fatal(err)
				}
				b.ReportMetric(float64(stats.Parity)/float64(stats.Data+stats.Nodes), "parity/packs")
				_ = r.Close()
				b.StartTimer()
			}
		})
	}
}

// BenchmarkScrub is the speed of a scrub, and of making parity for what has none.
func BenchmarkScrub(b *testing.B) {
	data := realData(b, benchSize)
	r := benchRepo(b)
	benchWrite(b, r, data, "none", testClock(), nil)
	b.Run("scrub", func(b *testing.B) {
		for b.Loop() {
			report, err := Scrub(context.Background(), r.Dir(), ScrubOptions{})
			if err != nil || len(report.Problems) > 0 {
				b.Fatal(err)
			}
			b.SetBytes(report.BytesRead)
		}
	})
	b.Run("add-parity", func(b *testing.B) {
		b.SetBytes(int64(len(data)))
		for b.Loop() {
			report, err := AddParity(context.Background(), r.Dir(), ParityOptions{Percent: 3})
			if err != nil || len(report.Problems) > 0 {
				b.Fatal(err)
			}
			b.StopTimer()
			if err := walkStored(context.Background(), r.fs, func(f storedFile) error { return dropParity(r.fs, f.path) }, nil); err != nil {
				b.Fatal(err)
			}
			b.StartTimer()
		}
	})
}
