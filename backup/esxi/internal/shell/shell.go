// Package shell puts command lines together for a POSIX shell on a host, so
// that no name, path or text can be anything but one argument.
package shell

import (
	"errors"
	"strings"
)

// ErrNUL means an argument with a zero byte in it, which no program on a host
// can be given.
var ErrNUL = errors.New("an argument contains a zero byte")

// Command is a command line that runs the first word with the others as its
// arguments, exactly as they are.
func Command(words ...string) (string, error) {
	quoted := make([]string, len(words))
	for i, w := range words {
		if strings.IndexByte(w, 0) >= 0 {
			return "", ErrNUL
		}
		quoted[i] = Quote(w)
	}
	return strings.Join(quoted, " "), nil
}

// Quote is s as one word of a POSIX shell. Within single quotes nothing has a
// meaning but the single quote itself (POSIX.1-2017, Shell Command Language,
// 2.2.2), which therefore stands outside, behind a backslash. Words of harmless
// characters alone are left bare, so that command lines stay readable in a
// host's shell log.
//
// Quoting does not keep a program from taking a leading dash for an option:
// paths are given absolute for that reason.
func Quote(s string) string {
	if s != "" && strings.Trim(s, harmless) == "" {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

const harmless = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./:,%+@"
