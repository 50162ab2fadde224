package sched

import (
	"time"

	"hikae/repo/retention"
)

// Kind is what a job does.
type Kind string

// Kinds of jobs.
const (
	KindBackup Kind = "backup" // VMs into a repository; the default
	KindPrune  Kind = "prune"  // frees what no generation needs
	KindCheck  Kind = "check"  // proves what is stored
	// KindRehearse is reserved for restores that are rehearsed; no job can have it
	// yet.
	KindRehearse Kind = "rehearse"
)

// What becomes of a run at the end of its window.
const (
	WindowFinish = "finish" // what has begun goes on, nothing else begins; the default
	WindowStop   = "stop"   // what has begun is stopped, too
)

// How a check looks.
const (
	CheckScrub     = "scrub"     // reads files and proves them whole, as far as the budget goes; the default
	CheckStructure = "structure" // that all generations open and all they need is there
	CheckData      = "data"      // that, and opens every block
)

// Defaults of Job.
const (
	DefaultRetries = 3
	// MaxRetries bounds Job.Retries.
	MaxRetries = 20
)

// Job is a job as the configuration says it.
type Job struct {
	// Name is what the job is called: letters, digits, dots, dashes and
	// underscores, at most 63, beginning with a letter or digit.
	Name string
	Kind Kind // "" is KindBackup
	// VMs are patterns HOST/VM, with * and ?; those with ! before them exclude.
	// For backups only.
	VMs        []string
	Repository string // its name; "" when there is only one
	// Schedules are as package calendar reads them. None is "manual".
	Schedules []string
	TimeZone  string // of the IANA database, for example "Europe/Berlin"; "" is the machine's
	// Keep says which generations of its VMs stay; an empty policy keeps all. A VM
	// that several jobs back up into one repository keeps what any of them keeps.
	Keep retention.Policy
	// Window is when tasks of a run may begin, "22:00-06:00" in the job's time
	// zone; "" is always. WindowEnd is WindowFinish ("") or WindowStop.
	Window    string
	WindowEnd string

	Quiesce     bool   // ask guests to settle first
	Compression string // as repo.SessionOptions
	// RateLimit is how many bytes a second are read from a host for one VM, at
	// most; 0 is as fast as it goes.
	RateLimit int64
	// Retries is how often what failed for a reason that may pass is tried again
	// within a run; 0 is DefaultRetries, a negative number is none.
	Retries int
	// Timeout is how long one try at a VM (or a prune, or a check) may take; 0 is
	// as long as it takes.
	Timeout time.Duration
	// StaleAfter is for how long a VM may be without a good generation; 0 is
	// Options.StaleAfter, a negative number is for ever.
	StaleAfter time.Duration

	Prune PruneBudget // of KindPrune
	Check CheckBudget // of KindCheck
}

// PruneBudget says how much a prune may do; the zero value is good.
type PruneBudget struct {
	// MaxRewrite is as repo.PruneOptions has it: bytes, 0 for a tenth of the
	// repository, negative for none.
	MaxRewrite int64
	// Grace is how long packs stay condemned; 0 is repo.DefaultGrace, a negative
	// number is none.
	Grace time.Duration
}

// CheckBudget says how much a check looks at; the zero value scrubs everything.
type CheckBudget struct {
	How string // CheckScrub (""), CheckStructure or CheckData
	// Percent, Bytes and Time are for a scrub and as repo.ScrubBudget has them.
	Percent float64
	Bytes   int64
	Time    time.Duration
}

func (j *Job) kind() Kind {
	if j.Kind == "" {
		return KindBackup
	}
	return j.Kind
}

func (j *Job) retries() int {
	switch {
	case j.Retries == 0:
		return DefaultRetries
	case j.Retries < 0:
		return 0
	}
	return j.Retries
}
