package sched

import (
	"fmt"

	"hikae/sched/history"
)

// dirty is what has changed and is not in the history yet. A step of the
// scheduler writes all of it in one transaction, before it acts on it.
type dirty struct {
	runs   map[*run]bool
	tasks  map[*task]bool
	jobs   map[*job]bool
	vms    map[*vmState]bool
	gone   map[string]bool // jobs
	seenTo map[uint64]bool
	// others are records that nothing in memory stands for any more.
	others     []history.Run
	otherTasks []history.Task
}

func mark[K comparable](m *map[K]bool, k K) {
	if *m == nil {
		*m = map[K]bool{}
	}
	(*m)[k] = true
}

func (d *dirty) run(r *run)    { mark(&d.runs, r) }
func (d *dirty) task(t *task)  { mark(&d.tasks, t) }
func (d *dirty) job(j *job)    { mark(&d.jobs, j) }
func (d *dirty) vm(v *vmState) { mark(&d.vms, v) }

func (d *dirty) any() bool {
	return len(d.runs)+len(d.tasks)+len(d.jobs)+len(d.vms)+len(d.gone)+len(d.seenTo)+len(d.others)+len(d.otherTasks) > 0
}

func (d *dirty) write(tx *history.Tx) error {
	for name := range d.gone {
		if err := tx.DeleteJob(name); err != nil {
			return err
		}
	}
	for _, r := range d.others {
		if err := tx.PutRun(r); err != nil {
			return err
		}
	}
	for _, t := range d.otherTasks {
		if err := tx.PutTask(t); err != nil {
			return err
		}
	}
	for r := range d.runs {
		if err := tx.PutRun(r.rec); err != nil {
			return err
		}
	}
	for t := range d.tasks {
		if err := tx.PutTask(t.rec); err != nil {
			return err
		}
	}
	for j := range d.jobs {
		if err := tx.PutJob(j.state); err != nil {
			return err
		}
	}
	for v := range d.vms {
		if err := tx.PutVM(v.rec); err != nil {
			return err
		}
	}
	for id := range d.seenTo {
		if err := tx.SeenTo(id); err != nil {
			return err
		}
	}
	return nil
}

// flush writes what has changed. When that fails work goes on all the same: a
// backup is worth more than the record of it. What was not written is kept for
// the next time, and Status warns.
func (s *Scheduler) flush() {
	if !s.dirty.any() {
		return
	}
	if err := s.db.Update(s.dirty.write); err != nil {
		if s.storeErr == nil || s.storeErr.Error() != err.Error() {
			s.log.Error("the history cannot be written; after a restart it will not be known what ran", "error", err)
		}
		s.storeErr = fmt.Errorf("the history cannot be written: %w", err)
		return
	}
	if s.storeErr != nil {
		s.log.Info("the history can be written again")
		s.storeErr = nil
	}
	s.dirty = dirty{}
}
