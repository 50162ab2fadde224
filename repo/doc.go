// Package repo keeps generations of virtual machines in a directory, encrypted
// and deduplicated. FORMAT.md beside this file says what the directory holds,
// byte by byte.
//
// A Repository is opened with a secret. Reading goes from a VMID over its Refs
// to a Generation and its Disks; a Disk is an io.ReaderAt with holes. Writing
// goes through a Session: a DiskWriter for each disk takes what changed
// against a parent disk, and Commit makes the generation. Until Commit returns
// there is no generation; once it returned the generation is whole and durable.
//
// Promises: nothing this package writes is ever changed or overwritten, but that a
// damaged file may be replaced by what it was (Mend), and the writing path deletes
// nothing but its own unfinished files. Every byte read is
// authenticated; what cannot be read or proved is an error that matches
// ErrDamaged and names pack and offset. Any number of processes may read and
// write one repository at a time. Memory is bounded by the options, whatever
// the size of disks or of the repository.
package repo
