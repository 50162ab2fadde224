package fsx

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"strings"
	"syscall"
	"testing"

	"pgregory.net/rapid"
)

func rng(seed int) *rand.Rand { return rand.New(rand.NewPCG(uint64(seed), 1)) }

// outcomes collects what is found after many crashes of the same history.
func outcomes(t *testing.T, history func(m *Mem), look func(m *Mem) string) map[string]int {
	t.Helper()
	seen := map[string]int{}
	for seed := range 400 {
		m := NewMem()
		history(m)
		m.Crash(rng(seed))
		seen[look(m)]++
	}
	return seen
}

// exactly checks that all of want were seen and nothing else.
func exactly(t *testing.T, seen map[string]int, want ...string) {
	t.Helper()
	for _, w := range want {
		if seen[w] == 0 {
			t.Errorf("never found %q", w)
		}
		delete(seen, w)
	}
	for s, n := range seen {
		t.Errorf("found %q, %d times", s, n)
	}
}

func listing(m *Mem) string { return strings.Join(m.Files(), " ") }

func TestCrashNames(t *testing.T) {
	make1 := func(m *Mem) {
		must(t, MakeDir(m, "tmp"))
		must(t, MakeDir(m, "d"))
		f, err := m.Create("tmp/x")
		must(t, err)
		_, err = f.Write([]byte("all of it"))
		must(t, err)
		must(t, f.Sync())
		must(t, f.Close())
	}
	t.Run("a synced file in a directory that is not", func(t *testing.T) {
		exactly(t, outcomes(t, make1, listing), "", "tmp/x")
	})
	t.Run("published, nothing synced", func(t *testing.T) {
		exactly(t, outcomes(t, func(m *Mem) {
			make1(m)
			must(t, m.Publish("tmp/x", "d/x"))
		}, listing), "", "tmp/x", "d/x", "d/x tmp/x")
	})
	t.Run("published, the old name lasted", func(t *testing.T) {
		exactly(t, outcomes(t, func(m *Mem) {
			make1(m)
			must(t, m.SyncDir("tmp"))
			must(t, m.Publish("tmp/x", "d/x"))
		}, listing), "tmp/x", "d/x", "d/x tmp/x")
	})
	t.Run("published and synced", func(t *testing.T) {
		exactly(t, outcomes(t, func(m *Mem) {
			make1(m)
			must(t, m.SyncDir("tmp"))
			must(t, m.Publish("tmp/x", "d/x"))
			must(t, m.SyncDir("d"))
		}, listing), "d/x", "d/x tmp/x")
	})
	t.Run("WriteFile", func(t *testing.T) {
		seen := outcomes(t, func(m *Mem) {
			make1(m)
			must(t, WriteFile(m, "tmp/y", "d/y", []byte("whole")))
		}, func(m *Mem) string { return content(t, m, "d/y") })
		exactly(t, seen, "whole")
	})
	t.Run("removed", func(t *testing.T) {
		exactly(t, outcomes(t, func(m *Mem) {
			must(t, WriteFile(m, "t", "f", nil))
			must(t, m.SyncDir("."))
			must(t, m.Remove("f"))
		}, listing), "", "f")
	})
	t.Run("replaced, nothing synced", func(t *testing.T) {
		exactly(t, outcomes(t, func(m *Mem) {
			make1(m)
			must(t, m.Plant("d/x", []byte("old")))
			must(t, m.Replace("tmp/x", "d/x"))
		}, func(m *Mem) string { return content(t, m, "d/x") }), "old", "all of it")
	})
	t.Run("replaced and synced", func(t *testing.T) {
		exactly(t, outcomes(t, func(m *Mem) {
			make1(m)
			must(t, m.Plant("d/x", []byte("old")))
			must(t, ReplaceFile(m, "tmp/y", "d/x", []byte("new")))
		}, func(m *Mem) string { return content(t, m, "d/x") }), "new")
	})
	t.Run("a directory that was not synced", func(t *testing.T) {
		exactly(t, outcomes(t, func(m *Mem) {
			must(t, m.MkdirAll("a/b"))
			must(t, WriteFile(m, "a/b/t", "a/b/f", nil))
		}, listing), "", "a/b/f")
	})
}

func TestCrashBytes(t *testing.T) {
	old, more := bytes.Repeat([]byte("o"), 700), bytes.Repeat([]byte("n"), 5000)
	kinds := map[string]int{}
	for seed := range 400 {
		m := NewMem()
		f, err := m.Create("f")
		must(t, err)
		_, err = f.Write(old)
		must(t, err)
		must(t, f.Sync())
		must(t, m.SyncDir("."))
		_, err = f.Write(more)
		must(t, err)
		m.Crash(rng(seed))
		got := []byte(content(t, m, "f"))
		if !bytes.HasPrefix(got, old) {
			t.Fatal("synced bytes changed")
		}
		got = got[len(old):]
		switch {
		case len(got) == 0:
			kinds["none"]++
		case bytes.Equal(got, more):
			kinds["all"]++
		case bytes.HasPrefix(more, got):
			kinds["prefix"]++
		case bytes.Contains(got, []byte{0, 0, 0}):
			kinds["zeros"]++
		default:
			kinds["rubbish"]++
		}
	}
	exactly(t, kinds, "none", "all", "prefix", "zeros", "rubbish")
}

func TestCrashEndsHandles(t *testing.T) {
	m := NewMem()
	must(t, WriteFile(m, "t", "f", []byte("x")))
	r, err := m.Open("f")
	must(t, err)
	w, err := m.Append("f")
	must(t, err)
	held, err := m.Lock("l", true, false)
	must(t, err)
	waiting := make(chan error)
	go func() {
		_, err := m.Lock("l", true, true)
		waiting <- err
	}()
	m.Crash(rng(1))
	if err := <-waiting; err != nil { // it may have come after the crash
		mustBe(t, err, ErrCrashed)
	} else {
		t.Log("the waiter came late and got the lock")
	}
	_, err = io.ReadAll(r)
	mustBe(t, err, ErrCrashed)
	_, err = w.Write([]byte("y"))
	mustBe(t, err, ErrCrashed)
	mustBe(t, w.Sync(), ErrCrashed)
	must(t, held.Close()) // as a process that is gone: nothing to give back
	if got := content(t, m, "f"); got != "x" {
		t.Errorf("after the crash: %q", got)
	}
}

func TestMemCapacity(t *testing.T) {
	m := NewMem()
	m.SetCapacity(10)
	f, err := m.Create("f")
	must(t, err)
	n, err := f.Write(make([]byte, 12))
	if n != 10 {
		t.Errorf("wrote %d", n)
	}
	mustBe(t, err, syscall.ENOSPC)
	if n, err := m.Free(); n != 0 || err != nil {
		t.Error(n, err)
	}
	must(t, m.Publish("f", "g"))
	if n, _ := m.Free(); n != 0 {
		t.Errorf("%d free after publishing", n)
	}
	must(t, m.Remove("g"))
	if n, _ := m.Free(); n != 10 {
		t.Errorf("%d free after removing", n)
	}
	must(t, m.Plant("a/b", make([]byte, 4)))
	must(t, m.Plant("a/b", make([]byte, 6)))
	m.Crash(rng(1))
	if n, _ := m.Free(); n != 4 {
		t.Errorf("%d free after planting and a crash", n)
	}
}

// TestMemModel compares Mem with a map over random histories with crashes: what
// was synced is there unchanged, and nothing is there that never was.
func TestMemModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := NewMem()
		for _, d := range []string{"tmp", "a", "b"} {
			if err := MakeDir(m, d); err != nil {
				t.Fatal(err)
			}
		}
		lasting := map[string]string{} // must be found as it is
		maybe := map[string]string{}   // may be found, and then so or cut
		next := 0
		t.Repeat(map[string]func(*rapid.T){
			"write": func(t *rapid.T) {
				next++
				name := fmt.Sprintf("%s/%d", rapid.SampledFrom([]string{"a", "b"}).Draw(t, "dir"), next)
				text := strings.Repeat("x", rapid.IntRange(0, 3000).Draw(t, "size"))
				if err := WriteFile(m, fmt.Sprintf("tmp/%d", next), name, []byte(text)); err != nil {
					t.Fatal(err)
				}
				lasting[name] = text
			},
			"write without syncing": func(t *rapid.T) {
				next++
				name := fmt.Sprintf("a/%d", next)
				f, err := m.Create(name)
				if err != nil {
					t.Fatal(err)
				}
				_, _ = f.Write(make([]byte, 1000))
				maybe[name] = ""
			},
			"remove": func(t *rapid.T) {
				for name := range lasting {
					if err := m.Remove(name); err != nil {
						t.Fatal(err)
					}
					maybe[name] = lasting[name]
					delete(lasting, name)
					return
				}
			},
			"crash": func(t *rapid.T) {
				m.Crash(rng(rapid.Int().Draw(t, "seed")))
				for name := range maybe {
					if _, err := m.Stat(name); err == nil {
						if err := m.Remove(name); err != nil {
							t.Fatal(err)
						}
						if err := m.SyncDir("a"); err != nil {
							t.Fatal(err)
						}
						if err := m.SyncDir("b"); err != nil {
							t.Fatal(err)
						}
					}
					delete(maybe, name)
				}
			},
			"": func(t *rapid.T) {
				for name, want := range lasting {
					b, err := ReadFile(m, name, 1<<20)
					if err != nil || string(b) != want {
						t.Fatalf("%s: %d bytes, want %d, %v", name, len(b), len(want), err)
					}
				}
				for _, name := range m.Files() {
					_, l := lasting[name]
					_, u := maybe[name]
					if !l && !u && !strings.HasPrefix(name, "tmp/") {
						t.Fatalf("%s appeared from nowhere", name)
					}
				}
			},
		})
	})
}

func TestFaultyModes(t *testing.T) {
	setup := func(p Plan) (*Mem, *Faulty) {
		m := NewMem()
		f := NewFaulty(m)
		f.Plan(p)
		return m, f
	}
	write := func(f *Faulty) error { return WriteFile(f, "t", "x", []byte("0123456789")) }

	t.Run("count", func(t *testing.T) {
		_, f := setup(Plan{Ops: OpChanges})
		must(t, write(f))
		// create, write, sync, publish, sync of the directory
		if f.Count() != 5 || f.Fired() {
			t.Error(f.Count(), f.Fired())
		}
	})
	t.Run("every operation can fail once", func(t *testing.T) {
		for k := 1; k <= 5; k++ {
			for _, mode := range []Mode{FailOnce, FailAfter, ShortWrite} {
				m, f := setup(Plan{Ops: OpChanges, At: k, Mode: mode})
				mustBe(t, write(f), syscall.EIO)
				if !f.Fired() {
					t.Error("not fired")
				}
				for _, name := range m.Files() {
					if name == "x" && content(t, m, "x") != "0123456789" {
						t.Errorf("op %d, mode %d: half a file published", k, mode)
					}
				}
				if _, err := m.Stat("x"); err == nil && k < 4 {
					t.Errorf("op %d, mode %d: published", k, mode)
				}
			}
		}
	})
	t.Run("by name", func(t *testing.T) {
		_, f := setup(Plan{Ops: OpAny, Name: func(n string) bool { return n == "x" }, At: 1})
		mustBe(t, write(f), syscall.EIO)
		if f.Count() != 1 {
			t.Error(f.Count())
		}
	})
	t.Run("no space", func(t *testing.T) {
		m, f := setup(Plan{Ops: OpWrite, At: 1, Mode: NoSpace})
		mustBe(t, write(f), syscall.ENOSPC)
		mustBe(t, write(f), syscall.ENOSPC)
		if n, _ := f.Free(); n != 0 {
			t.Errorf("%d free", n)
		}
		if got := m.Files(); len(got) != 0 {
			t.Errorf("left: %v", got)
		}
		f.Heal()
		must(t, write(f))
	})
	t.Run("crash", func(t *testing.T) {
		m, f := setup(Plan{Ops: OpWrite, At: 1, Mode: CrashNow})
		mustBe(t, write(f), ErrCrashed)
		_, err := f.Open("t")
		mustBe(t, err, ErrCrashed)
		if got := content(t, m, "t"); got != "01234" {
			t.Errorf("half a write: %q", got)
		}
		m.Crash(rng(3))
		must(t, write(NewFaulty(m)))
	})
	t.Run("reads", func(t *testing.T) {
		_, f := setup(Plan{})
		must(t, write(f))
		f.Plan(Plan{Ops: OpRead, At: 1})
		_, err := ReadFile(f, "x", 100)
		mustBe(t, err, syscall.EIO)
		f.Plan(Plan{Ops: OpOpen, At: 1, Mode: FailAfter})
		_, err = f.Open("x")
		mustBe(t, err, syscall.EIO)
	})
	t.Run("a sync tried again", func(t *testing.T) {
		m, f := setup(Plan{Ops: OpSync, At: 1})
		x, err := f.Create("x")
		must(t, err)
		_, err = x.Write([]byte("lost"))
		must(t, err)
		mustBe(t, x.Sync(), syscall.EIO)
		mustBe(t, x.Sync(), syscall.EIO)
		if f.RetriedSyncs() != 1 {
			t.Error(f.RetriedSyncs())
		}
		must(t, m.SyncDir("."))
		lost := false
		for seed := range 10 {
			m.Crash(rng(seed))
			lost = lost || content(t, m, "x") != "lost"
		}
		if !lost {
			t.Error("bytes whose sync failed never got lost")
		}
	})
}

// TestReplaceFileAtEveryCrash: whatever the moment, the old file is there or the
// new one, and certainly the new one when ReplaceFile said so.
func TestReplaceFileAtEveryCrash(t *testing.T) {
	old, fresh := strings.Repeat("old", 1000), strings.Repeat("fresh", 1000)
	seen := map[string]int{}
	for k := 1; ; k++ {
		fired := false
		for seed := range 40 {
			m := NewMem()
			must(t, MakeDir(m, "tmp"))
			must(t, m.Plant("d/x", []byte(old)))
			f := NewFaulty(m)
			f.Plan(Plan{Ops: OpAny, At: k, Mode: CrashNow})
			err := ReplaceFile(f, "tmp/x", "d/x", []byte(fresh))
			fired = f.Fired()
			m.Crash(rng(seed))
			got := content(t, m, "d/x")
			seen[got]++
			if got != old && got != fresh || err == nil && got != fresh {
				t.Fatalf("crash at %d: %d bytes, after %v", k, len(got), err)
			}
		}
		if !fired {
			if k < 6 || seen[old] == 0 || seen[fresh] == 0 {
				t.Fatalf("only %d operations, %d old and %d new", k, seen[old], seen[fresh])
			}
			return
		}
	}
}

// TestWriteFileAtEveryCrash: whatever the moment, the file is there whole or not
// at all, and certainly when WriteFile said so.
func TestWriteFileAtEveryCrash(t *testing.T) {
	text := strings.Repeat("content", 1000)
	for k := 1; ; k++ {
		fired := false
		for seed := range 40 {
			m := NewMem()
			must(t, MakeDir(m, "tmp"))
			must(t, MakeDir(m, "d"))
			f := NewFaulty(m)
			f.Plan(Plan{Ops: OpAny, At: k, Mode: CrashNow})
			err := WriteFile(f, "tmp/x", "d/x", []byte(text))
			fired = f.Fired()
			m.Crash(rng(seed))
			b, rerr := ReadFile(m, "d/x", 1<<20)
			if err == nil && rerr != nil {
				t.Fatalf("crash at %d: written, then gone: %v", k, rerr)
			}
			if rerr == nil && string(b) != text {
				t.Fatalf("crash at %d: %d bytes under the final name", k, len(b))
			}
			if rerr != nil && !errors.Is(rerr, fs.ErrNotExist) {
				t.Fatal(rerr)
			}
		}
		if !fired {
			if k < 6 {
				t.Fatalf("only %d operations", k)
			}
			return
		}
	}
}
