// Package history remembers what the scheduler did and has to know after a
// restart: runs and their tasks, where each job's schedules stand, and the
// newest good generation of every VM.
//
// It is one bbolt file. Each change is one transaction that is on disk when
// Update returns, so a process that is killed, or a machine that loses power,
// leaves the state after some transaction, never half of one. One process has
// the file at a time.
//
// The file cannot grow without bound: old runs go when there are more than
// Options.Keep of them or when they are older than Options.KeepFor. What is
// known of jobs and VMs stays.
//
// Records are JSON, in the file as for programs that read them over the
// daemon's socket. Their field names are a promise: fields may be added, none
// changes its meaning. Sizes are in bytes, times in UTC.
package history
