// Package fs shows a repository as a read-only file system:
//
//	<mountpoint>/<host>/<vm>/<2026-11-22T02-00-00Z>/
//	        <disk>.vmdk, <disk>-flat.vmdk     each disk: descriptor and content
//	        <vm>.vmx, <vm>.nvram              the VM
//	        generation.json                   how the generation was made
//	        partitions/<disk>-p<N>.img        each partition of each disk, for mount -o ro,loop
//	        partitions/<disk>.img             a disk without a partition table
//	<mountpoint>/<host>/<vm>/latest -> 2026-11-22T02-00-00Z
//
// Names of hosts and VMs are shown as they are. What cannot be in a file's name
// is written as a per cent sign and two hexadecimal digits, upper case: a slash
// as %2F, a control character as %09, the names "." and ".." as %2E and %2E%2E; a
// per cent sign that would read as one of these as %25.
//
// What is promised to readers:
//
//   - A read returns the bytes of the guest's disk or an error, never anything
//     else and never less. Damage is an input/output error for those who read
//     the damaged part, and one line in the log that names generation, disk,
//     offset and pack.
//   - Contents never change, so the kernel keeps what it has read. New
//     generations appear and forgotten ones go within two seconds. A file that
//     is being read while its generation is forgotten gives right bytes or
//     errors; right bytes, whoever prunes, until the mount registers anew as a
//     reader (Options.Renew). A VM without generations may stay as an empty folder
//     for ten seconds.
//   - Inode numbers are the same in every mount of a repository, and file
//     handles given out by an NFS server stay valid when the server restarts.
//   - Holes are holes: SEEK_DATA, SEEK_HOLE and st_blocks come from the disk's
//     map without reading contents.
//   - Nobody waits for ever. When the storage of the repository does not answer,
//     readers get an error after Options.Timeout, can be interrupted before, and
//     go on when it is back.
//   - Memory is bounded, whatever is open: 1 MiB for each read in flight, of
//     which the kernel makes 32 at a time and as many more as there are readers
//     with direct I/O; 256 opened generations or 16 MiB of their small files; the
//     caches of the repository. Each generation that was listed costs its name.
//
// Concepts. A source is what is shown; the repository is one, tests have
// others. The catalog knows the names, the shelf keeps generations opened, the
// tree answers the kernel's requests from both. Nothing is kept of what the
// kernel knows: an inode number says by itself what it stands for. Requests
// that may wait for storage are watched by patience. Extended attributes in
// user.hikae.* tell where bytes come from, and user.hikae.verified-at when hikae
// verify last found all of the generation good.
package fs
