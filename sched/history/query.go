package history

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
	"time"

	"go.etcd.io/bbolt"
)

// Query says which runs or tasks are wanted; the zero value is all of them.
type Query struct {
	Job  string // runs of this job
	Host string // with VM: runs, or tasks, of this VM
	VM   string
	// State is one that they must be in, such as Failed.
	State string
	// Since and Until are about when they were queued; Until is not among them.
	Since, Until time.Time
	// Before is where the next page begins: the Next of the page before.
	Before uint64
	Limit  int // of a page; 0 is 100
}

func (q Query) limit() int {
	if q.Limit <= 0 {
		return 100
	}
	return q.Limit
}

func (q Query) fits(state string, queued time.Time) bool {
	return (q.State == "" || q.State == state) &&
		(q.Since.IsZero() || !queued.Before(q.Since)) && (q.Until.IsZero() || queued.Before(q.Until))
}

// RunPage is a page of runs, newest first.
type RunPage struct {
	Runs []Run  `json:"runs"`
	Next uint64 `json:"next,omitempty"` // 0: there are no more
}

// TaskPage is a page of tasks, newest first.
type TaskPage struct {
	Tasks []Task `json:"tasks"`
	Next  uint64 `json:"next,omitempty"` // 0: there are no more
}

func (d *DB) view(fn func(tx *bbolt.Tx) error) error {
	return d.guard(func() error { return d.db.View(fn) })
}

// Run returns one run; ErrNotFound when there is none of that number.
func (d *DB) Run(id uint64) (Run, error) {
	var r Run
	err := d.view(func(tx *bbolt.Tx) error {
		text := tx.Bucket(runsBucket).Get(runKey(id))
		if text == nil {
			return fmt.Errorf("there is no run %d in the history: %w", id, ErrNotFound)
		}
		return d.decode(text, "a run", &r)
	})
	return r, err
}

// Tasks returns the tasks of a run in their order.
func (d *DB) Tasks(run uint64) ([]Task, error) {
	list := []Task{}
	err := d.view(func(tx *bbolt.Tx) error {
		key := runKey(run)
		c := tx.Bucket(tasksBucket).Cursor()
		for k, text := c.Seek(key); k != nil && bytes.HasPrefix(k, key); k, text = c.Next() {
			var t Task
			if err := d.decode(text, "a task", &t); err != nil {
				return err
			}
			list = append(list, t)
		}
		return nil
	})
	return list, err
}

// Open returns the runs that are queued or running, and those that were
// interrupted and not seen to (Tx.SeenTo), oldest first.
func (d *DB) Open() ([]Run, error) {
	var list []Run
	err := d.view(func(tx *bbolt.Tx) error {
		return tx.Bucket(openBucket).ForEach(func(k, _ []byte) error {
			text := tx.Bucket(runsBucket).Get(k)
			if text == nil {
				return nil
			}
			var r Run
			if err := d.decode(text, "a run", &r); err != nil {
				return err
			}
			list = append(list, r)
			return nil
		})
	})
	return list, err
}

// LastID is the number of the newest run; 0 when there is none.
func (d *DB) LastID() (uint64, error) {
	var id uint64
	err := d.view(func(tx *bbolt.Tx) error {
		if k, _ := tx.Bucket(runsBucket).Cursor().Last(); len(k) == 8 {
			id = binary.BigEndian.Uint64(k)
		}
		return nil
	})
	return id, err
}

// Runs returns a page of the runs that fit.
func (d *DB) Runs(q Query) (RunPage, error) {
	page := RunPage{Runs: []Run{}}
	err := d.view(func(tx *bbolt.Tx) error {
		runs := tx.Bucket(runsBucket)
		var damaged error
		var last uint64
		d.descend(tx, q, func(id uint64, _ []byte) bool {
			if id == last { // several tasks of one VM
				return true
			}
			last = id
			text := runs.Get(runKey(id))
			if text == nil {
				return true
			}
			var r Run
			if damaged = d.decode(text, "a run", &r); damaged != nil {
				return false
			}
			if q.Job != "" && r.Job != q.Job || !q.fits(r.State, r.Queued) {
				return true
			}
			if len(page.Runs) == q.limit() {
				page.Next = page.Runs[len(page.Runs)-1].ID
				return false
			}
			page.Runs = append(page.Runs, r)
			return true
		})
		return damaged
	})
	return page, err
}

// TasksOf returns a page of the tasks of the VM that q names. A page ends
// between runs, so it may have more than q.Limit tasks.
func (d *DB) TasksOf(q Query) (TaskPage, error) {
	page := TaskPage{Tasks: []Task{}}
	if q.VM == "" {
		return page, fmt.Errorf("no VM is named")
	}
	err := d.view(func(tx *bbolt.Tx) error {
		tasks := tx.Bucket(tasksBucket)
		var damaged error
		d.descend(tx, q, func(id uint64, key []byte) bool {
			text := tasks.Get(key)
			if text == nil {
				return true
			}
			var t Task
			if damaged = d.decode(text, "a task", &t); damaged != nil {
				return false
			}
			if q.Job != "" && t.Job != q.Job || !q.fits(t.State, t.Queued) {
				return true
			}
			if n := len(page.Tasks); n >= q.limit() && page.Tasks[n-1].Run != id {
				page.Next = page.Tasks[n-1].Run
				return false
			}
			page.Tasks = append(page.Tasks, t)
			return true
		})
		return damaged
	})
	return page, err
}

// descend calls fn for runs that may fit, newest first, by the index that
// leaves out most; for a VM, with the keys of its tasks.
func (d *DB) descend(tx *bbolt.Tx, q Query, fn func(id uint64, key []byte) bool) {
	bucket, begin, size := tx.Bucket(runsBucket), []byte(nil), 8
	switch {
	case q.VM != "":
		bucket, begin, size = tx.Bucket(byVMBucket), prefix(vmName(q.Host, q.VM)), 12
	case q.Job != "":
		bucket, begin = tx.Bucket(byJobBucket), prefix(q.Job)
	}
	before := q.Before
	if before == 0 {
		before = 1<<64 - 1
	}
	c := bucket.Cursor()
	key, _ := c.Seek(append(slices.Clone(begin), runKey(before)...))
	if key == nil {
		key, _ = c.Last()
	} else {
		key, _ = c.Prev()
	}
	for ; key != nil && bytes.HasPrefix(key, begin); key, _ = c.Prev() {
		id := key[len(begin):]
		if len(id) != size {
			continue // of another name that begins like this one
		}
		if !fn(binary.BigEndian.Uint64(id), id) {
			return
		}
	}
}

// Jobs returns what has to be known of jobs.
func (d *DB) Jobs() (map[string]Job, error) {
	jobs := map[string]Job{}
	err := d.view(func(tx *bbolt.Tx) error {
		return tx.Bucket(jobsBucket).ForEach(func(k, text []byte) error {
			var j Job
			if err := d.decode(text, "a job", &j); err != nil {
				return err
			}
			jobs[string(k)] = j
			return nil
		})
	})
	return jobs, err
}

// VMs returns what is known of VMs, sorted by host and name.
func (d *DB) VMs() ([]VM, error) {
	list := []VM{}
	err := d.view(func(tx *bbolt.Tx) error {
		return tx.Bucket(vmsBucket).ForEach(func(_, text []byte) error {
			var v VM
			if err := d.decode(text, "a VM", &v); err != nil {
				return err
			}
			list = append(list, v)
			return nil
		})
	})
	return list, err
}

// Note returns what PutNote kept; nil when there is nothing.
func (d *DB) Note(name string) ([]byte, error) {
	var value []byte
	err := d.view(func(tx *bbolt.Tx) error {
		value = bytes.Clone(tx.Bucket(notesBucket).Get([]byte(name)))
		return nil
	})
	return value, err
}
