package history

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.etcd.io/bbolt"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		child()
		return
	}
	goleak.VerifyTestMain(m)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

var day = time.Date(2026, 5, 1, 2, 0, 0, 0, time.UTC)

// sample is a run with n tasks, one of a VM of its own and the others of web*.
func sample(id uint64, job string, n int) (Run, []Task) {
	at := day.Add(time.Duration(id) * time.Hour)
	r := Run{
		ID: id, Job: job, Kind: "backup", Repository: "main", State: OK, Trigger: BySchedule, Due: at, Queued: at,
		Started: at.Add(time.Second), Ended: at.Add(time.Minute), Seconds: 59, Tasks: n, TasksOK: n, Numbers: Numbers{BytesRead: 1 << 30},
	}
	var tasks []Task
	for i := range n {
		tasks = append(tasks, Task{
			Run: id, N: i + 1, Job: job, Kind: TaskBackup, Repository: "main", Host: "esx1", VM: fmt.Sprintf("web%02d", i), State: OK,
			Attempts: 1, Queued: at, Generation: "2026-05-01T02-00-00Z", Sequence: id, Mode: "incremental", Numbers: Numbers{BytesRead: 1 << 20},
			Disks:  []Disk{{Label: "Hard disk 1", Name: "web", Mode: "incremental", BytesCapacity: 40 << 30}},
			Events: []Event{{at, LevelInfo, "snapshot"}, {at, LevelInfo, "read"}, {at, LevelInfo, "commit"}},
		})
	}
	return r, tasks
}

func put(t testing.TB, d *DB, r Run, tasks []Task) {
	t.Helper()
	must(t, d.Update(func(tx *Tx) error {
		if err := tx.PutRun(r); err != nil {
			return err
		}
		for _, task := range tasks {
			if err := tx.PutTask(task); err != nil {
				return err
			}
		}
		return nil
	}))
}

func openTest(t testing.TB, path string, o Options) *DB {
	t.Helper()
	o.NoSync = true
	d, err := Open(path, o)
	must(t, err)
	t.Cleanup(func() { d.Close() })
	return d
}

func TestRoundTrip(t *testing.T) {
	path := filepath.Join(t.TempDir(), "history.db")
	d := openTest(t, path, Options{})
	r, tasks := sample(7, "nightly", 3)
	put(t, d, r, tasks)
	job := Job{Name: "nightly", Cursors: map[string]Cursor{"daily 02:00 | UTC": {At: day, Last: day}}, LastRun: 7}
	vm := VM{Host: "esx1", VM: "web00", FirstSeen: day, Good: map[string]Good{
		"nightly": {"nightly", "main", "x", 7, day}, "weekly": {"weekly", "main", "y", 5, day.Add(-time.Hour)},
	}}
	must(t, d.Update(func(tx *Tx) error {
		return errors.Join(tx.PutJob(job), tx.PutVM(vm), tx.PutNote("mail", []byte("sent")))
	}))
	must(t, d.Close())
	d = openTest(t, path, Options{})
	got, err := d.Run(7)
	must(t, err)
	gotTasks, err := d.Tasks(7)
	must(t, err)
	jobs, err := d.Jobs()
	must(t, err)
	vms, err := d.VMs()
	must(t, err)
	note, err := d.Note("mail")
	must(t, err)
	for _, diff := range []string{
		cmp.Diff(r, got), cmp.Diff(tasks, gotTasks), cmp.Diff(map[string]Job{"nightly": job}, jobs), cmp.Diff([]VM{vm}, vms), cmp.Diff("sent", string(note)),
	} {
		if diff != "" {
			t.Error(diff)
		}
	}
	if good, ok := vms[0].Newest(); !ok || good.Generation != "x" {
		t.Errorf("newest: %+v", good)
	}
	if _, err := d.Run(8); !errors.Is(err, ErrNotFound) {
		t.Errorf("a run that is not there: %v", err)
	}
	// All or nothing.
	boom := errors.New("boom")
	if err := d.Update(func(tx *Tx) error { _ = tx.PutJob(Job{Name: "x"}); return boom }); !errors.Is(err, boom) {
		t.Errorf("update: %v", err)
	}
	if jobs, _ := d.Jobs(); len(jobs) != 1 {
		t.Errorf("jobs: %v", jobs)
	}
}

// TestNames pins the names of fields, which programs read.
func TestNames(t *testing.T) {
	r, tasks := sample(7, "nightly", 1)
	r.Skipped, r.SkippedLast, r.Error, r.Warnings = 1, day, "e", []string{"w"}
	text, err := json.Marshal(r)
	must(t, err)
	want := `{"run":7,"job":"nightly","kind":"backup","repository":"main","state":"ok","trigger":"schedule","due":"2026-05-01T09:00:00Z","skipped":1,"skipped_last":"2026-05-01T02:00:00Z","queued":"2026-05-01T09:00:00Z","started":"2026-05-01T09:00:01Z","ended":"2026-05-01T09:01:00Z","seconds":59,"tasks":1,"tasks_ok":1,"tasks_failed":0,"tasks_skipped":0,"tasks_cancelled":0,"bytes_capacity":0,"bytes_changed":0,"bytes_read":1073741824,"bytes_healed":0,"bytes_audited":0,"bytes_stored":0,"bytes_freed":0,"forgotten":0,"error":"e","warnings":["w"]}`
	if string(text) != want {
		t.Errorf("run:\n got %s\nwant %s", text, want)
	}
	tasks[0].Error, tasks[0].ErrorKind, tasks[0].Events = "e", "other", tasks[0].Events[:1]
	text, err = json.Marshal(tasks[0])
	must(t, err)
	want = `{"run":7,"task":1,"job":"nightly","kind":"backup","repository":"main","host":"esx1","vm":"web00","state":"ok","attempts":1,"queued":"2026-05-01T09:00:00Z","seconds":0,"generation":"2026-05-01T02-00-00Z","sequence":7,"mode":"incremental","bytes_capacity":0,"bytes_changed":0,"bytes_read":1048576,"bytes_healed":0,"bytes_audited":0,"bytes_stored":0,"bytes_freed":0,"forgotten":0,"disks":[{"label":"Hard disk 1","name":"web","mode":"incremental","bytes_capacity":42949672960,"bytes_changed":0,"bytes_read":0,"bytes_healed":0,"bytes_audited":0,"bytes_new":0}],"error":"e","error_kind":"other","events":[{"time":"2026-05-01T09:00:00Z","level":"info","text":"snapshot"}]}`
	if string(text) != want {
		t.Errorf("task:\n got %s\nwant %s", text, want)
	}
}

func ids(page RunPage) (out []uint64) {
	for _, r := range page.Runs {
		out = append(out, r.ID)
	}
	return out
}

func TestQueries(t *testing.T) {
	d := openTest(t, filepath.Join(t.TempDir(), "h"), Options{})
	for id := uint64(1); id <= 20; id++ {
		job := []string{"a", "ab", "a b"}[id%3] // names that begin alike
		r, tasks := sample(id, job, 1+int(id%2))
		if id%5 == 0 {
			r.State = Failed
		}
		put(t, d, r, tasks)
	}
	for _, c := range []struct {
		q    Query
		want []uint64
		next uint64
	}{
		{Query{Limit: 3}, []uint64{20, 19, 18}, 18},
		{Query{Limit: 3, Before: 18}, []uint64{17, 16, 15}, 15},
		{Query{Limit: 3, Before: 4}, []uint64{3, 2, 1}, 0},
		{Query{Job: "a"}, []uint64{18, 15, 12, 9, 6, 3}, 0},
		{Query{Job: "a", Before: 12, Limit: 2}, []uint64{9, 6}, 6},
		{Query{Job: "ab", Limit: 2}, []uint64{19, 16}, 16},
		{Query{Job: "none"}, nil, 0},
		{Query{Host: "esx1", VM: "web01"}, []uint64{19, 17, 15, 13, 11, 9, 7, 5, 3, 1}, 0},
		{Query{Host: "esx1", VM: "web01", Job: "a"}, []uint64{15, 9, 3}, 0},
		{Query{Host: "esx1", VM: "web0"}, nil, 0},
		{Query{State: Failed}, []uint64{20, 15, 10, 5}, 0},
		{Query{Since: day.Add(17 * time.Hour), Until: day.Add(19 * time.Hour)}, []uint64{18, 17}, 0},
		{Query{Limit: 20}, []uint64{20, 19, 18, 17, 16, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1}, 0},
	} {
		page, err := d.Runs(c.q)
		must(t, err)
		if got := ids(page); !slices.Equal(got, c.want) || page.Next != c.next {
			t.Errorf("%+v: %v, next %d; want %v, %d", c.q, got, page.Next, c.want, c.next)
		}
	}
	var got []uint64
	for q := (Query{Host: "esx1", VM: "web01", Limit: 3}); ; {
		page, err := d.TasksOf(q)
		must(t, err)
		for _, task := range page.Tasks {
			got = append(got, task.Run)
		}
		if q.Before = page.Next; q.Before == 0 {
			break
		}
	}
	if !slices.Equal(got, []uint64{19, 17, 15, 13, 11, 9, 7, 5, 3, 1}) {
		t.Errorf("tasks of a VM, by pages: %v", got)
	}
}

// TestOpenRuns: what has not ended, and what was interrupted, is found at a start.
func TestOpenRuns(t *testing.T) {
	d := openTest(t, filepath.Join(t.TempDir(), "h"), Options{})
	for id, state := range []string{Queued, Running, OK, Interrupted, Failed, Interrupted} {
		r, _ := sample(uint64(id+1), "a", 0)
		r.State = Running
		put(t, d, r, nil)
		r.State = state
		put(t, d, r, nil)
	}
	must(t, d.Update(func(tx *Tx) error { return tx.SeenTo(6) }))
	list, err := d.Open()
	must(t, err)
	if got := ids(RunPage{Runs: list}); !slices.Equal(got, []uint64{1, 2, 4}) {
		t.Errorf("open: %v", got)
	}
	if id, err := d.LastID(); id != 6 || err != nil {
		t.Errorf("last: %d, %v", id, err)
	}
}

// TestTrim: the file keeps so many runs, or those of so long, with nothing left
// of the others; what is open stays.
func TestTrim(t *testing.T) {
	keys := func(d *DB) (n int) {
		must(t, d.view(func(tx *bbolt.Tx) error {
			for _, b := range [][]byte{runsBucket, tasksBucket, byJobBucket, byVMBucket} {
				n += tx.Bucket(b).Stats().KeyN
			}
			return nil
		}))
		return n
	}
	d := openTest(t, filepath.Join(t.TempDir(), "h"), Options{Keep: 10})
	for id := uint64(1); id <= 50; id++ {
		r, tasks := sample(id, "a", 2)
		if id == 5 {
			r.State = Running
		}
		put(t, d, r, tasks)
	}
	page, err := d.Runs(Query{})
	must(t, err)
	want := []uint64{50, 49, 48, 47, 46, 45, 44, 43, 42, 41, 5}
	if got := ids(page); !slices.Equal(got, want) {
		t.Errorf("by number: %v", got)
	}
	if n := keys(d); n != 11*(1+2+1+2) {
		t.Errorf("%d keys are left of 11 runs", n)
	}
	d = openTest(t, filepath.Join(t.TempDir(), "h"), Options{KeepFor: 10 * time.Hour})
	for id := uint64(1); id <= 50; id++ {
		r, tasks := sample(id, "a", 1)
		put(t, d, r, tasks)
	}
	if page, err = d.Runs(Query{}); err != nil || len(page.Runs) != 11 {
		t.Errorf("by age: %v, %v", ids(page), err)
	}
}

// TestInUse: one process at a time. flock is per open file, so a second Open of
// this process is as good as another's.
func TestInUse(t *testing.T) {
	path := filepath.Join(t.TempDir(), "history.db")
	openTest(t, path, Options{})
	_, err := Open(path, Options{SetAside: true})
	if !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), path+" is in use: another hikae daemon runs with this state directory; stop it first") {
		t.Errorf("%v", err)
	}
}

func TestVersion(t *testing.T) {
	path := filepath.Join(t.TempDir(), "history.db")
	d := openTest(t, path, Options{})
	set := func(v []byte) {
		must(t, d.db.Update(func(tx *bbolt.Tx) error { return tx.Bucket(metaBucket).Put(versionKey, v) }))
		must(t, d.Close())
	}
	set([]byte{0, 0, 0, 99})
	if _, err := Open(path, Options{SetAside: true}); !errors.Is(err, ErrVersion) {
		t.Errorf("a newer one: %v", err)
	}
	raw, err := bbolt.Open(path, 0o600, nil)
	must(t, err)
	d.db = raw
	set([]byte{1})
	if _, err := Open(path, Options{}); !errors.Is(err, ErrDamaged) {
		t.Errorf("no version: %v", err)
	}
}

// TestDamaged: files that are cut, overwritten or bent are errors, not panics;
// with SetAside a new history begins.
func TestDamaged(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "history.db")
	d := openTest(t, path, Options{})
	for id := uint64(1); id <= 60; id++ {
		r, tasks := sample(id, "a", 3)
		put(t, d, r, tasks)
	}
	must(t, d.Close())
	whole, err := os.ReadFile(path)
	must(t, err)
	rnd := rand.New(rand.NewPCG(1, 2))
	bad, late := 0, 0
	for n := range 150 {
		text := slices.Clone(whole)
		switch n % 3 {
		case 0:
			text = text[:rnd.IntN(len(text))]
		case 1:
			for range 20 {
				text[rnd.IntN(len(text))] ^= byte(1 + rnd.IntN(255))
			}
		default: // a page of something else
			at := rnd.IntN(len(text)/4096) * 4096
			copy(text[at:], whole[rnd.IntN(len(whole)/4096)*4096:][:4096])
		}
		name := filepath.Join(dir, fmt.Sprintf("bad%d.db", n))
		must(t, os.WriteFile(name, text, 0o600))
		d, err := Open(name, Options{NoSync: true, SetAside: n%2 == 0})
		if err != nil {
			if !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrVersion) {
				t.Errorf("opened: %v", err)
			}
			bad++
			continue
		}
		if d.Replaced() != "" {
			bad++
			must(t, os.Remove(d.Replaced()))
		}
		// Whatever comes, it comes as an error.
		_, e1 := d.Runs(Query{Limit: 1000})
		_, e2 := d.TasksOf(Query{Host: "esx1", VM: "web01", Limit: 1000})
		_, e3 := d.Open()
		_, e4 := d.Jobs()
		r, tasks := sample(99, "a", 3)
		e5 := d.Update(func(tx *Tx) error {
			for _, task := range tasks {
				if err := tx.PutTask(task); err != nil {
					return err
				}
			}
			return tx.PutRun(r)
		})
		if errors.Join(e1, e2, e3, e4, e5) != nil {
			bad++
		}
		broken := d.broken.Load() != nil
		must(t, d.Close())
		// What only showed later is put aside at the next start.
		if broken && d.Replaced() == "" {
			late++
			d, err := Open(name, Options{NoSync: true, SetAside: true})
			must(t, err)
			if page, err := d.Runs(Query{}); err != nil || d.Replaced() == "" || len(page.Runs) > 0 {
				t.Errorf("after damage: replaced %q, %v", d.Replaced(), err)
			}
			must(t, d.Close())
			if d, err = Open(name, Options{NoSync: true, SetAside: true}); err != nil || d.Replaced() != "" {
				t.Fatalf("the new one is put aside as well: %v", err)
			}
			must(t, d.Close())
		}
	}
	t.Logf("%d of 150 were noticed, %d of them late", bad, late)
	if bad < 60 || late == 0 {
		t.Errorf("only %d of 150 were noticed", bad)
	}
}

func TestAddEvent(t *testing.T) {
	var list []Event
	dropped := 0
	for i := range 500 {
		list, dropped = AddEvent(list, dropped, Event{Text: fmt.Sprint(i)})
	}
	if len(list) != MaxEvents || dropped != 400 || list[firstEvents-1].Text != "19" || list[firstEvents].Text != "420" || list[99].Text != "499" {
		t.Errorf("%d, %d dropped, %v", len(list), dropped, list)
	}
}

// TestTenThousand: the history of years opens at once and costs little memory.
// The limit in time is loose: what is tested is that nothing reads all of it.
func TestTenThousand(t *testing.T) {
	path := filepath.Join(t.TempDir(), "history.db")
	d := openTest(t, path, Options{})
	for id := uint64(1); id <= 10000; {
		must(t, d.Update(func(tx *Tx) error {
			for range 500 {
				r, tasks := sample(id, "a", 1)
				if err := tx.PutRun(r); err != nil {
					return err
				}
				for _, task := range tasks {
					if err := tx.PutTask(task); err != nil {
						return err
					}
				}
				id++
			}
			return nil
		}))
	}
	must(t, d.Close())
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	best, bestPage := time.Hour, time.Hour
	for range 5 {
		began := time.Now()
		d = openTest(t, path, Options{})
		_, err := d.Open()
		must(t, err)
		best = min(best, time.Since(began))
		began = time.Now()
		page, err := d.Runs(Query{Job: "a", Limit: 50})
		must(t, err)
		bestPage = min(bestPage, time.Since(began))
		if len(page.Runs) != 50 {
			t.Fatalf("%d runs", len(page.Runs))
		}
		must(t, d.Close())
	}
	d = openTest(t, path, Options{}) // it stays open while memory is looked at
	defer runtime.KeepAlive(d)
	runtime.GC()
	runtime.ReadMemStats(&after)
	grown := int64(after.HeapAlloc) - int64(before.HeapAlloc)
	info, err := os.Stat(path)
	must(t, err)
	t.Logf("opens in %v, a page in %v, %d KiB of heap, a file of %d MiB", best, bestPage, grown>>10, info.Size()>>20)
	if best > 500*time.Millisecond || bestPage > 500*time.Millisecond || grown > 4<<20 {
		t.Errorf("opens in %v, a page in %v, %d bytes of heap", best, bestPage, grown)
	}
}

// TestFull: no room left is an error, and the file is as it was.
func TestFull(t *testing.T) {
	path := filepath.Join(t.TempDir(), "history.db")
	d := openTest(t, path, Options{})
	var old unix.Rlimit
	must(t, unix.Getrlimit(unix.RLIMIT_FSIZE, &old))
	if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: 1 << 20, Max: old.Max}); err != nil {
		t.Fatal(err)
	}
	defer func() { must(t, unix.Setrlimit(unix.RLIMIT_FSIZE, &old)) }()
	var last uint64
	var failed error
	for id := uint64(1); id <= 5000 && failed == nil; id++ {
		r, tasks := sample(id, "a", 3)
		failed = d.Update(func(tx *Tx) error {
			for _, task := range tasks {
				if err := tx.PutTask(task); err != nil {
					return err
				}
			}
			return tx.PutRun(r)
		})
		if failed == nil {
			last = id
		}
	}
	if failed == nil {
		t.Fatal("the limit was not felt")
	}
	page, err := d.Runs(Query{Limit: 10000})
	must(t, err)
	if got := ids(page); uint64(len(got)) != last {
		t.Errorf("%d runs, %d were written", len(got), last)
	}
}
