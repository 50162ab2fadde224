package config

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
)

// AddHost appends h as a [[host]] block to the file at path, which is created
// (0600) when missing. Nothing else in the file changes.
func AddHost(path string, h Host) error {
	if err := h.Check(); err != nil {
		return fmt.Errorf("%w: %w", ErrConfig, err)
	}
	return edit(path, func(text []byte, f *File) ([]byte, *File, error) {
		if _, taken := f.Host(h.Name); taken {
			return nil, nil, fmt.Errorf("%w: %s has a host called %s already; remove it first or take another name", ErrConfig, path, h.Name)
		}
		want := *f
		want.Hosts = append(append([]Host(nil), f.Hosts...), h)
		return appendBlock(text, hostBlock(h)), &want, nil
	})
}

// RemoveHost cuts the [[host]] block called name out of the file at path, from
// its header to the next header. It reports whether there was one.
func RemoveHost(path, name string) (bool, error) {
	found := false
	err := edit(path, func(text []byte, f *File) ([]byte, *File, error) {
		index := -1
		for i, h := range f.Hosts {
			if h.Name == name {
				index = i
			}
		}
		if index < 0 {
			return text, f, nil
		}
		found = true
		cut, err := cutBlock(text, "host", index)
		if err != nil {
			return nil, nil, fmt.Errorf("%w: %s: %w", ErrConfig, path, err)
		}
		want := *f
		want.Hosts = append(append([]Host(nil), f.Hosts[:index]...), f.Hosts[index+1:]...)
		return cut, &want, nil
	})
	return found, err
}

// edit replaces the file by what change makes of it, in one step: a reader, or
// a crash, sees the old text or the new one. The new text is parsed and must
// say exactly what change promises, so that no edit can damage what a person
// wrote in a style this package does not expect.
func edit(path string, change func([]byte, *File) ([]byte, *File, error)) error {
	target, err := filepath.EvalSymlinks(path)
	if errors.Is(err, fs.ErrNotExist) {
		target, err = path, nil
	}
	if err != nil {
		return fmt.Errorf("edit configuration: %w", err)
	}
	mode := fs.FileMode(0o600)
	text, err := os.ReadFile(target)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return fmt.Errorf("edit configuration: %w", err)
	default:
		info, err := os.Stat(target)
		if err != nil {
			return fmt.Errorf("edit configuration: %w", err)
		}
		mode = info.Mode().Perm()
	}
	old, err := Parse(path, text)
	if err != nil {
		return err
	}
	next, want, err := change(text, old)
	if err != nil {
		return err
	}
	got, err := Parse(path, next)
	if err != nil || !sameMeaning(got, want) {
		return fmt.Errorf("%w: %s is written in a style that cannot be edited safely; change it by hand", ErrConfig, path)
	}
	return replaceFile(target, next, mode)
}

func sameMeaning(a, b *File) bool {
	x, y := *a, *b
	if len(x.Hosts) == 0 {
		x.Hosts = nil
	}
	if len(y.Hosts) == 0 {
		y.Hosts = nil
	}
	return reflect.DeepEqual(x, y)
}

// replaceFile writes text under a temporary name beside path and renames it.
func replaceFile(path string, text []byte, mode fs.FileMode) (err error) {
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("write configuration: %w", err)
	}
	tmp, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*")
	if err != nil {
		return fmt.Errorf("write configuration: %w", err)
	}
	defer func() {
		if err != nil {
			_ = tmp.Close()
			_ = os.Remove(tmp.Name())
			err = fmt.Errorf("write configuration: %w", err)
		}
	}()
	if _, err := tmp.Write(text); err != nil {
		return err
	}
	if err := tmp.Chmod(mode); err != nil {
		return err
	}
	if err := tmp.Sync(); err != nil {
		return err
	}
	if err := tmp.Close(); err != nil {
		return err
	}
	return os.Rename(tmp.Name(), path)
}

func appendBlock(text []byte, block string) []byte {
	out := append([]byte(nil), text...)
	if len(out) > 0 {
		if out[len(out)-1] != '\n' {
			out = append(out, '\n')
		}
		out = append(out, '\n')
	}
	return append(out, block...)
}

// cutBlock removes the index-th [[name]] block. Its bytes end where the next
// header begins, except for comments directly above that header: they speak
// of what follows.
func cutBlock(text []byte, name string, index int) ([]byte, error) {
	lay := scan(text)
	start, end, n := -1, len(text), 0
	for _, h := range lay.headers {
		if start >= 0 {
			// [host.sub] would belong to the block; this package knows none.
			end = h.start
			break
		}
		if h.array && h.name == name {
			if n == index {
				start = h.start
			}
			n++
		}
	}
	if start < 0 {
		return nil, fmt.Errorf("its %s blocks are not written as [[%s]]", name, name)
	}
	end = withoutTrailingComments(text, start, end)
	out := append([]byte(nil), text[:start]...)
	rest := text[end:]
	if len(rest) == 0 {
		// The blank line that separated the block goes with it.
		trimmed := strings.TrimRight(string(out), "\n")
		if trimmed == "" {
			return nil, nil
		}
		return []byte(trimmed + "\n"), nil
	}
	return append(out, rest...), nil
}

// withoutTrailingComments moves end back over the comments that stand before it
// and speak of what follows: those after the first blank line that follows the
// block's keys, or all of them when no blank line parts them from the keys. In
// doubt a comment stays.
func withoutTrailingComments(text []byte, start, end int) int {
	lines := strings.SplitAfter(string(text[start:end]), "\n")
	if lines[len(lines)-1] == "" {
		lines = lines[:len(lines)-1]
	}
	tail := len(lines) // where comments and blank lines begin
	keep := -1
	for i := len(lines) - 1; i > 0; i-- {
		line := strings.TrimSpace(lines[i])
		if line == "" {
			keep = i + 1 // the blank line itself goes with the block
		} else if !strings.HasPrefix(line, "#") {
			break
		}
		tail = i
	}
	if keep < 0 {
		keep = tail
	}
	for _, l := range lines[keep:] {
		end -= len(l)
	}
	return end
}

func hostBlock(h Host) string {
	var b strings.Builder
	b.WriteString("[[host]]\n")
	line := func(key, value string) {
		if value != "" {
			fmt.Fprintf(&b, "%s = %s\n", key, quote(value))
		}
	}
	line("name", h.Name)
	line("address", h.Address)
	line("user", h.User)
	line("password_file", h.PasswordFile)
	line("password_command", h.PasswordCommand)
	line("thumbprint", h.Thumbprint)
	line("ssh", h.SSH)
	line("ssh_fingerprint", h.SSHFingerprint)
	line("ssh_key_file", h.SSHKeyFile)
	line("ssh_key_passphrase_file", h.SSHKeyPassphraseFile)
	line("ssh_key_passphrase_command", h.SSHKeyPassphraseCommand)
	return b.String()
}

// RepositoryBlock returns a [[repository]] block as text, to show to a person.
func RepositoryBlock(r Repository) string {
	var b strings.Builder
	b.WriteString("[[repository]]\n")
	fmt.Fprintf(&b, "name = %s\npath = %s\n", quote(r.Name), quote(r.Path))
	if r.PassphraseFile != "" {
		fmt.Fprintf(&b, "passphrase_file = %s\n", quote(r.PassphraseFile))
	}
	return b.String()
}

// quote writes s as a TOML basic string.
func quote(s string) string {
	var b strings.Builder
	b.WriteByte('"')
	for _, r := range s {
		switch {
		case r == '"' || r == '\\':
			b.WriteByte('\\')
			b.WriteRune(r)
		case r < 0x20 || r == 0x7f:
			fmt.Fprintf(&b, `\u%04X`, r)
		default:
			b.WriteRune(r)
		}
	}
	b.WriteByte('"')
	return b.String()
}
