package sched

import (
	"context"
	"encoding/json"
	"errors"
	"time"

	"hikae/backup"
	"hikae/repo"
	"hikae/repo/retention"
)

// ErrProblems ends a check that found problems; its text counts them.
var ErrProblems = errors.New("problems found")

// Work is what a Scheduler has done by others. Its methods are called by many
// goroutines; each returns only when all it began has ended, soon after ctx has.
type Work interface {
	// VMs lists the VMs of a host.
	VMs(ctx context.Context, host string) ([]VM, error)
	// Backup backs up one VM. When Result.Generation is set there is a generation,
	// whatever the error is.
	Backup(ctx context.Context, o BackupOptions) (backup.Result, error)
	// Retain forgets the generations of a VM that none of the policies keeps.
	Retain(ctx context.Context, o RetainOptions) (forgotten int, err error)
	// Prune frees what no generation of a repository needs.
	Prune(ctx context.Context, o PruneOptions) (Report, error)
	// Check proves what is stored; problems are ErrProblems, with the report.
	Check(ctx context.Context, o CheckOptions) (Report, error)
	// Cleanup removes the snapshots that dead runs of this machine left on a host.
	Cleanup(ctx context.Context, host string) ([]backup.Cleaned, error)
	// Newest returns the newest generation of each VM in a repository; with an error
	// also, those that could be read.
	Newest(ctx context.Context, repository string) ([]repo.Ref, error)
}

// VM is a VM as its host lists it.
type VM struct {
	Name          string
	BytesCapacity int64 // of its disks; 0 when not known
}

// BackupOptions of Work.Backup.
type BackupOptions struct {
	Repository  string
	VM          repo.VMID
	Quiesce     bool
	Compression string
	RateLimit   int64 // bytes a second, at most; 0 is as fast as it goes
	// Progress is as backup.Options has it. It is never nil.
	Progress func(backup.Event)
}

// RetainOptions of Work.Retain.
type RetainOptions struct {
	Repository string
	VM         repo.VMID
	Policies   []retention.Policy // of all jobs that back the VM up into the repository; none is empty
	Location   *time.Location     // whose days, weeks and months count
}

// PruneOptions of Work.Prune.
type PruneOptions struct {
	Repository string
	Budget     PruneBudget
	// Progress is told what is done and how far: units of the phase. It is never nil.
	Progress func(phase string, done, total int64)
}

// CheckOptions of Work.Check.
type CheckOptions struct {
	Repository string
	Budget     CheckBudget
	Progress   func(phase string, done, total int64) // as PruneOptions has it
}

// Report is what a prune or a check came to.
type Report struct {
	Details   json.RawMessage // the repository's own report
	BytesRead int64
	Freed     int64 // bytes
	Warnings  []string
}
