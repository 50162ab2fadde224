// Package index answers one question for a repository of any size in little
// memory: where may the bytes of this id lie? It serves deduplication and finding
// blocks whose pack was rewritten; nothing that is stored can be read only
// through it, and all of it can be rebuilt from the packs' footers.
//
// Promises:
//
//   - memory is the fences (8 bytes a page of 341 entries, 0.75 MB at 32 million
//     entries), one bounded cache of pages, and what was added but not flushed;
//   - a lookup of an id that is not there costs one filter page in each segment,
//     and reads a page of records only when a filter errs, about once in 180;
//   - no lock is held while storage is read;
//   - files are written whole or not at all and never changed or deleted here;
//   - a damaged file costs deduplication and a warning, never an error in a
//     lookup and never a wrong place: what is not authentic is not believed.
//
// # Segments: index/<name>
//
// A segment is an immutable file of records sorted by id. Its name is the first
// 8 bytes of its salt in lower-case hexadecimal. Numbers are little endian.
// Offsets count from the start of the file.
//
//	header, 64 bytes
//	   0  8   magic "hikaeix\x01"
//	   8  2   format version, 1
//	  10  1   type, 3
//	  11  1   zero
//	  12  4   key epoch
//	  16  16  repository id
//	  32  32  salt, random
//	groups, back to back
//	footer, sealed
//	trailer, 56 bytes
//	   0  8   offset of the footer
//	   8  4   its sealed length
//	  12  4   zero
//	  16  8   magic "hikaeix\x01"
//	  24  32  SHA-256 of all bytes of the file before these
//
// A group is up to 38 pages of records and one filter page for them. A page of
// records holds 341 records of 48 bytes (id 32, pack 8, offset 4, length 3, kind
// 1), only the last page of the file fewer; sealed it has 16,384 bytes. Only the
// last group has fewer pages. All offsets follow from the number of entries: page
// p lies at 64 + (p div 38)·638,864 + (p mod 38)·16,384, a group's filter page
// behind its last page.
//
// Records are sorted by id. An id may occur more than once with different places,
// the newest first; no record occurs twice. Holes do not occur.
//
// A filter page is a Bloom filter over the n entries of its group in
// b = ⌈10n/512⌉ blocks of 64 bytes (254 blocks, 16,256 bytes, in a full group). An
// entry sets seven bits of one block. Read the bytes 8–15 and 16–23 of the id as
// numbers h and g: the block is ⌊h·b/2⁶⁴⌋; its bits are ⌊g/512^i⌋ mod 512 for
// i = 0…6, bit j being bit j mod 8 of byte j div 8.
//
// The footer's plaintext:
//
//	 0  8   entries, 1 … 341·2²⁰
//	 8  8   sequence
//	16  4   number of superseded segments s, at most 65,536
//	20  4   number of fences f, the number of pages of records
//	24  8s  names of superseded segments, ascending
//	    8f  fences: the first 8 bytes of each page's first id
//
// Pages and footer are sealed one by one with AES-256-GCM, ciphertext ‖ tag 16.
// Key: subkey of the epoch, label "index", salt the salt. Nonce: 4 zero bytes ‖
// offset, 8 bytes, big endian. Associated data: header 64 ‖ offset u64 ‖ what u8
// (1 records, 2 filter, 3 footer). The salt is fresh for each file and each offset
// sealed once, so no nonce recurs with a key; a page moved within a file or to
// another one does not open.
//
// Worked sizes: 1 entry makes 64 + 64 + 80 + 48 + 56 = 312 bytes; 341 entries
// 64 + 16,384 + 464 + 48 + 56 = 17,016; 32 million (93,842 pages in 2,470 groups)
// 1.58 GB, of which the filter is 40 MB.
//
// # Reading
//
// A segment named as superseded in any readable segment's footer is ignored. The
// others are asked newest first: by sequence descending. The sequence of a new
// segment is one more than the highest there is; a merged one takes the highest of
// its parts. Sequences order answers and nothing else, so two writers may take the
// same.
//
// # Writing
//
//  1. every pack that a segment names is published before the segment is;
//  2. a segment is written under another name, synced, published under its own,
//     and its directory synced;
//  3. a merged segment holds all records of those it supersedes, and names also
//     those that they name, as long as they exist: so a reader that begins with
//     the largest file need not open what is superseded;
//  4. a superseded segment may be deleted once its successor lasts. Writers do not;
//  5. who deleted packs leaves their records out of a merged segment.
//
// Merging joins segments of about the same size as soon as there are eight of
// them, so a record is copied about once for each power of eight in the number of
// records.
package index
