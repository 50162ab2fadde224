package history

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"

	"go.etcd.io/bbolt"
)

// Tx is one change of the history.
type Tx struct {
	db *DB
	tx *bbolt.Tx
}

// Update carries out one change: all that fn puts is on disk when Update
// returns nil, and none of it otherwise.
func (d *DB) Update(fn func(*Tx) error) error {
	err := d.guard(func() error {
		return d.db.Update(func(tx *bbolt.Tx) error { return fn(&Tx{db: d, tx: tx}) })
	})
	if err != nil {
		return fmt.Errorf("write the history: %w", err)
	}
	if d.o.Committed != nil {
		d.o.Committed()
	}
	return nil
}

func (t *Tx) put(bucket, key []byte, v any) error {
	text, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return t.tx.Bucket(bucket).Put(key, text)
}

// PutRun writes a run. A new one makes room by removing old ones.
func (t *Tx) PutRun(r Run) error {
	key := runKey(r.ID)
	runs := t.tx.Bucket(runsBucket)
	if runs.Get(key) == nil {
		if err := t.tx.Bucket(byJobBucket).Put(append(prefix(r.Job), key...), nil); err != nil {
			return err
		}
		if err := t.trim(r); err != nil {
			return err
		}
	}
	open := t.tx.Bucket(openBucket)
	var err error
	if Ended(r.State) && r.State != Interrupted {
		err = open.Delete(key)
	} else {
		err = open.Put(key, nil)
	}
	if err != nil {
		return err
	}
	return t.put(runsBucket, key, r)
}

// SeenTo takes an interrupted run off the list that Open returns.
func (t *Tx) SeenTo(id uint64) error { return t.tx.Bucket(openBucket).Delete(runKey(id)) }

// PutTask writes a task. Its run must have been put.
func (t *Tx) PutTask(task Task) error {
	key := taskKey(task.Run, task.N)
	tasks := t.tx.Bucket(tasksBucket)
	if task.VM != "" && tasks.Get(key) == nil {
		if err := t.tx.Bucket(byVMBucket).Put(append(prefix(vmName(task.Host, task.VM)), key...), nil); err != nil {
			return err
		}
	}
	return t.put(tasksBucket, key, task)
}

// PutJob writes what has to be known of a job.
func (t *Tx) PutJob(j Job) error { return t.put(jobsBucket, []byte(j.Name), j) }

// DeleteJob forgets what had to be known of a job; its runs stay.
func (t *Tx) DeleteJob(name string) error { return t.tx.Bucket(jobsBucket).Delete([]byte(name)) }

// PutVM writes what is known of a VM.
func (t *Tx) PutVM(v VM) error { return t.put(vmsBucket, []byte(vmName(v.Host, v.VM)), v) }

// DeleteVM forgets what is known of a VM; its tasks stay.
func (t *Tx) DeleteVM(host, vm string) error {
	return t.tx.Bucket(vmsBucket).Delete([]byte(vmName(host, vm)))
}

// PutNote keeps a few bytes under a name, for those who have to remember
// something of their own, such as what was notified.
func (t *Tx) PutNote(name string, value []byte) error {
	return t.tx.Bucket(notesBucket).Put([]byte(name), value)
}

// trimAtOnce bounds what one new run removes, so that a transaction stays
// small. It is more than one, so that the file shrinks when Keep does.
const trimAtOnce = 8

// trim removes the oldest runs that are too many or too old beside a new one.
func (t *Tx) trim(fresh Run) error {
	c := t.tx.Bucket(runsBucket).Cursor()
	last, _ := c.Last()
	if last == nil {
		return nil
	}
	newest := max(binary.BigEndian.Uint64(last), fresh.ID)
	limit := fresh.Queued.Add(-t.db.o.KeepFor)
	var gone []Run
	looked := 0
	for key, text := c.First(); key != nil && looked < 2*trimAtOnce && len(gone) < trimAtOnce; key, text = c.Next() {
		looked++
		if t.tx.Bucket(openBucket).Get(key) != nil || len(key) != 8 {
			continue
		}
		var r Run
		if json.Unmarshal(text, &r) != nil {
			r = Run{Queued: limit} // it goes by its number
		}
		r.ID = binary.BigEndian.Uint64(key)
		// Runs go oldest first, so their numbers count them.
		if newest-binary.BigEndian.Uint64(key) < uint64(t.db.o.Keep) && !r.Queued.Before(limit) {
			break
		}
		gone = append(gone, r)
	}
	for _, r := range gone {
		if err := t.remove(r); err != nil {
			return err
		}
	}
	return nil
}

// remove deletes a run, its tasks, and what points to them.
func (t *Tx) remove(r Run) error {
	key := runKey(r.ID)
	tasks := t.tx.Bucket(tasksBucket)
	var keys [][]byte
	c := tasks.Cursor()
	for k, text := c.Seek(key); k != nil && bytes.HasPrefix(k, key); k, text = c.Next() {
		k = bytes.Clone(k)
		keys = append(keys, k)
		var task Task
		if json.Unmarshal(text, &task) != nil || task.VM == "" {
			continue // what points to nothing is passed over
		}
		if err := t.tx.Bucket(byVMBucket).Delete(append(prefix(vmName(task.Host, task.VM)), k...)); err != nil {
			return err
		}
	}
	for _, k := range keys {
		if err := tasks.Delete(k); err != nil {
			return err
		}
	}
	if err := t.tx.Bucket(byJobBucket).Delete(append(prefix(r.Job), key...)); err != nil {
		return err
	}
	return t.tx.Bucket(runsBucket).Delete(key)
}
