package backup

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"hikae/backup/vmdk"
)

// ReadChanged reads a list of changed areas: a CSV file with one area a line,
//
//	start,length[,…]
//
// both in bytes. Further columns are left alone, also one that says that an area
// holds only zeros: what an area holds is read. Empty lines, lines that begin
// with # and a first line of column names are skipped. Areas may overlap and
// come in any order; one that begins behind the end of a disk of this capacity
// is an error, for then the list belongs to another disk.
func ReadChanged(file string, capacity int64) ([]vmdk.Area, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return parseChanged(f, file, capacity)
}

func parseChanged(r io.Reader, file string, capacity int64) ([]area, error) {
	var list []area
	lines := bufio.NewScanner(r)
	for n, first := 1, true; lines.Scan(); n++ {
		text := strings.TrimSpace(lines.Text())
		if text == "" || text[0] == '#' {
			continue
		}
		columns := strings.SplitN(text, ",", 3)
		if len(columns) < 2 {
			return nil, fmt.Errorf("%s, line %d: %q is not start,length", file, n, text)
		}
		start, err1 := strconv.ParseInt(strings.TrimSpace(columns[0]), 10, 64)
		length, err2 := strconv.ParseInt(strings.TrimSpace(columns[1]), 10, 64)
		if first && err1 != nil && err2 != nil && !errors.Is(err1, strconv.ErrRange) {
			first = false // names of columns
			continue
		}
		first = false
		if err1 != nil || err2 != nil || start < 0 || length < 0 {
			return nil, fmt.Errorf("%s, line %d: %q is not start,length in bytes", file, n, text)
		}
		if start >= capacity && length > 0 {
			return nil, fmt.Errorf("%s, line %d: an area at byte %d of a disk of %d bytes; the list is of another disk", file, n, start, capacity)
		}
		list = append(list, area{Offset: start, Length: min(length, math.MaxInt64-start)})
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return tidy(list, capacity), nil
}

// memory is this machine's, in bytes.
func memory() int64 {
	var s unix.Sysinfo_t
	if err := unix.Sysinfo(&s); err != nil {
		return math.MaxInt64
	}
	return int64(s.Totalram) * int64(s.Unit)
}

// forget takes a range of a file out of the page cache; nothing happens when f
// is nil or it cannot.
func forget(f *os.File, off, n int64) {
	if f != nil && n > 0 {
		_ = unix.Fadvise(int(f.Fd()), off, n, unix.FADV_DONTNEED)
	}
}

// publish gives a finished file its name, unless that is taken.
func publish(part, final string) error {
	err := unix.Renameat2(unix.AT_FDCWD, part, unix.AT_FDCWD, final, unix.RENAME_NOREPLACE)
	if !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOSYS) && !errors.Is(err, unix.ENOTSUP) {
		return err
	}
	// Network file systems without that flag: nobody else writes here while the
	// folder is locked.
	if _, err := os.Lstat(final); err == nil {
		return fs.ErrExist
	}
	return os.Rename(part, final)
}

// freeBytes is the room left for this user on a folder's file system.
func freeBytes(dir string) (int64, error) {
	var s unix.Statfs_t
	if err := unix.Statfs(dir, &s); err != nil {
		return 0, err
	}
	return int64(s.Bavail) * s.Bsize, nil
}

// allocated is what a file takes on its file system, in bytes.
func allocated(info os.FileInfo) int64 {
	if s, ok := info.Sys().(*syscall.Stat_t); ok {
		return s.Blocks * 512
	}
	return info.Size()
}
