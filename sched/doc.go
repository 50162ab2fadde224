// Package sched runs jobs: it backs up VMs when they are due, applies what is to
// be kept, prunes and checks repositories, and remembers all of it in a history.
//
// A Scheduler is one goroutine that decides and any number that work. It knows
// what is to be done through the interface Work and what time it is through a
// clock that is given to it; package sched/work does the work for real.
//
// # When runs begin
//
// Schedules are those of package calendar. Every occurrence becomes a run
// exactly once, or is part of one, or is skipped and counted:
//
//   - A run is written into the history together with how far its schedule was
//     carried out, in one transaction, before anything of it begins. A process
//     that is killed finds it there, or finds it still due.
//   - What was due while nothing ran (the machine was off or asleep, the clock
//     was set forward) is made up for by one run of the job, whose Missed counts
//     the further occurrences. "every" counts from that run on.
//   - An occurrence that comes while a run of the job is queued or under way is
//     skipped: Skipped of that run counts it, and an event tells. It is not made
//     up for, so a job that is too slow for its interval does not run without a
//     pause.
//   - Two schedules of a job that are due at the same time are one occurrence.
//   - A clock that is set back by up to two hours brings nothing twice: nothing is
//     due until it is where it was. Set back further, it had been wrong before, and
//     what it comes by is due again, except the very occurrence that ran last. When it
//     then leaps forward to where it had been, the setting back was what was wrong, and
//     what had run by then does not run again. A machine without a battery for its
//     clock, which begins in the past at every start, is such a case.
//   - A schedule that is new counts from when it is first seen: the first run of
//     "every 6h" comes 6 hours later. One that leaves the configuration is forgotten.
//   - The wall clock is looked at once a minute at least, so setting it, or
//     waking from sleep, is noticed within a minute.
//
// A job "after" another is queued in the transaction that ends the other's
// run: when that went well (warnings included), or with "always" also when it
// failed or was cancelled, but not when it was interrupted, for then it is resumed.
//
// # What a run does
//
// A backup first asks its hosts for their VMs, then backs up each that its
// patterns name as a task of its own, then applies what is to be kept to those
// that went well. At most Options.PerHost VMs of a host and Options.Total of all
// are backed up at a time, and never one VM twice. A free place goes to the run
// with the fewest tasks under way; among those, to the one that has waited the
// longest since it last got one. A run that a person started counts as having
// waited an hour longer. So no run starves. Within a run, VMs that the run before
// did not back up come first, then those of the host with the most work left,
// the longest first.
//
// What fails for a reason that may pass is tried again after 1, 4, 16, then 30
// minutes, up to the job's retries. When it is the host that fails, its other VMs
// wait along, and the retries are the host's. See classes for which is which.
//
// Tasks begin only while the job's window is open. A run that is due outside waits
// for it. When it closes, what has not begun is skipped, and comes first in the
// next run; what has begun goes on to its end, or is stopped, as the job says.
// A run that a person starts "now" heeds no window.
//
// Prunes and checks of one repository come one after the other; backups into it
// go on beside them.
//
// # Endings
//
// When the context of Serve ends, what is under way is stopped, and Serve returns
// when all of it has: snapshots are removed, what was stored is reused. Those runs
// are interrupted, as are those that a kill or a power cut ended, and each is
// resumed at the next start by a run that leaves out the VMs that were done; or
// by a whole run, when the job was due meanwhile. After three interruptions in a
// row it waits until it is due. Before a host gets work at a start, snapshots
// that dead runs left there are removed.
//
// # VMs without a good generation
//
// A VM is stale when its newest good generation is older than StaleAfter allows;
// for a job that runs more rarely than that, when a third of it has passed since
// one was due. A VM that was backed up and is in no job any more is unprotected.
// Both are warnings of Status until they end, or until Dismiss, and events once.
package sched
