package sched

import (
	"slices"

	"hikae/repo"
	"hikae/repo/retention"
	"hikae/sched/history"
)

// retain queues what comes after the backups of a run: forgetting what none of
// the VMs' jobs keeps.
func (s *Scheduler) retain(r *run) {
	if r.retained || r.ending != nil || r.plan.kind != KindBackup {
		return
	}
	r.retained = true
	vms := slices.Clone(r.before)
	for _, t := range r.tasks {
		if t.rec.Kind == history.TaskBackup && t.rec.State == history.OK {
			vms = append(vms, t.vm)
		}
	}
	var keep []RetainOptions
	for _, vm := range vms {
		if policies := s.policies(r.rec.Repository, vm); len(policies) > 0 {
			keep = append(keep, RetainOptions{Repository: r.rec.Repository, VM: vm, Policies: policies, Location: r.plan.loc})
		}
	}
	if len(keep) > 0 {
		s.newTask(r, history.TaskRetain, repo.VMID{}).keep = keep
	}
}

// policies are those of all jobs that back a VM up into a repository; none when
// one of them keeps everything.
func (s *Scheduler) policies(repository string, vm repo.VMID) []retention.Policy {
	var out []retention.Policy
	for _, j := range s.jobs {
		if j.kind != KindBackup || j.repository != repository || !j.match.match(vm) {
			continue
		}
		if j.Keep.Empty() {
			return nil
		}
		if !slices.Contains(out, j.Keep) {
			out = append(out, j.Keep)
		}
	}
	return out
}
