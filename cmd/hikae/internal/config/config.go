// Package config reads hikae's configuration file and edits it without
// disturbing what a person wrote in it.
//
// The file is TOML. Every key is known or an error that names its line: a
// misspelled key must never be a setting silently not made. Secrets do not
// stand in the file; it names the files, or the commands, that give them.
// Paths that begin with ~/ mean the home directory, other relative paths
// start at the directory of the configuration file, so that a file works
// whatever directory the command is called from.
package config

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/BurntSushi/toml"

	"hikae/sched"
)

// ErrConfig marks every error about what a configuration file says.
var ErrConfig = errors.New("configuration")

// maxSize bounds a configuration file; a larger one is not one.
const maxSize = 4 << 20

// File is one configuration file, read and checked.
type File struct {
	// Path is where it was read from; empty when there is none.
	Path string `toml:"-"`

	Repositories []Repository `toml:"repository"`
	Hosts        []Host       `toml:"host"`
	Daemon       Daemon       `toml:"daemon"`
	// JobTables are the [[job]] blocks as they stand there; Jobs is what they say.
	JobTables []map[string]any `toml:"job"`
	Jobs      []sched.Job      `toml:"-"`
}

// Repository is a [[repository]] block.
type Repository struct {
	Name string `toml:"name"`
	Path string `toml:"path"`
	// At most one of these three tells what opens it; without any the passphrase
	// is asked for on the terminal.
	PassphraseFile    string `toml:"passphrase_file"`
	PassphraseCommand string `toml:"passphrase_command"`
	KeyFile           string `toml:"key_file"`
}

// Host is a [[host]] block: one ESXi host and how to log in to it.
type Host struct {
	Name string `toml:"name"`
	// Address is HOST or HOST:PORT of HTTPS; it may be empty where SSH is the only way.
	Address string `toml:"address"`
	User    string `toml:"user"`
	// Exactly one of these two tells the password.
	PasswordFile    string `toml:"password_file"`
	PasswordCommand string `toml:"password_command"`
	// Thumbprint is the SHA-256 of the host's certificate, colon separated
	// hexadecimal. Only this certificate is talked to.
	Thumbprint string `toml:"thumbprint"`

	// SSH is HOST or HOST:PORT of the host's shell; empty goes without.
	SSH string `toml:"ssh"`
	// SSHFingerprint is that of the host's SSH key, as ssh-keygen -l prints it. Only
	// this key is talked to.
	SSHFingerprint string `toml:"ssh_fingerprint"`
	// SSHKeyFile is a private key to log in with; without it the password does.
	SSHKeyFile string `toml:"ssh_key_file"`
	// At most one of these two tells the private key's passphrase.
	SSHKeyPassphraseFile    string `toml:"ssh_key_passphrase_file"`
	SSHKeyPassphraseCommand string `toml:"ssh_key_passphrase_command"`
}

// Load reads and checks the file at path. A missing file is fs.ErrNotExist.
func Load(path string) (*File, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	if info.Size() > maxSize {
		return nil, fmt.Errorf("%w: %s is %d bytes long: not a configuration file", ErrConfig, path, info.Size())
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	f, err := Parse(path, text)
	if err != nil {
		return nil, err
	}
	f.resolvePaths()
	return f, nil
}

// Parse checks text as the content of the file at path and returns it with
// its paths as written.
func Parse(path string, text []byte) (*File, error) {
	if !utf8.Valid(text) {
		return nil, fmt.Errorf("%w: %s is not UTF-8 text", ErrConfig, path)
	}
	f := &File{Path: path}
	md, err := toml.Decode(string(text), f)
	if err != nil {
		var pe toml.ParseError
		if errors.As(err, &pe) {
			return nil, fmt.Errorf("%w: %s:%d: %s", ErrConfig, path, pe.Position.Line, parseMessage(pe))
		}
		return nil, fmt.Errorf("%w: %s: %s", ErrConfig, path, strings.TrimPrefix(err.Error(), "toml: "))
	}
	lay := scan(text)
	for _, key := range md.Undecoded() {
		if key[0] == "job" {
			continue // validateJobs knows its keys
		}
		return nil, fmt.Errorf("%w: %s:%d: unknown key %s%s", ErrConfig, path, lay.lineOf(key), key, didYouMean(key))
	}
	return f, f.validate(lay)
}

func parseMessage(pe toml.ParseError) string {
	if pe.Message != "" {
		return pe.Message
	}
	return strings.TrimPrefix(pe.Error(), "toml: ")
}

// nameRule is what repositories and hosts may be called: the name appears in
// HOST/VM@GENERATION, in directory names and on command lines.
var nameRule = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)

// thumbprintRule allows what the tools that show thumbprints print: with
// colons or without, in either case.
var thumbprintRule = regexp.MustCompile(`^([0-9A-Fa-f]{2}:?){31}[0-9A-Fa-f]{2}$`)

// CheckName tells whether a repository or host may be called name.
func CheckName(name string) error {
	if !nameRule.MatchString(name) {
		return fmt.Errorf("%q cannot be a name: letters, digits, dots, dashes and underscores, at most 63, beginning with a letter or digit", name)
	}
	return nil
}

// CheckThumbprint tells whether s has the form of a SHA-256 thumbprint.
func CheckThumbprint(s string) error {
	if !thumbprintRule.MatchString(s) {
		return fmt.Errorf("%q is not a SHA-256 thumbprint: 32 pairs of hexadecimal digits", s)
	}
	return nil
}

// fingerprintRule is what ssh-keygen -l prints: base64 of 32 bytes, without padding.
var fingerprintRule = regexp.MustCompile(`^SHA256:[A-Za-z0-9+/]{43}$`)

// CheckFingerprint tells whether s has the form of an SSH key's fingerprint.
func CheckFingerprint(s string) error {
	if !fingerprintRule.MatchString(s) {
		return fmt.Errorf("%q is not the fingerprint of an SSH key: SHA256: and 43 letters, as ssh-keygen -l prints it", s)
	}
	return nil
}

func (f *File) validate(lay *layout) error {
	seen := map[string]bool{}
	for i, r := range f.Repositories {
		at := func(format string, args ...any) error {
			return fmt.Errorf("%w: %s:%d: %s", ErrConfig, f.Path, lay.headerLine("repository", i), fmt.Sprintf(format, args...))
		}
		if err := CheckName(r.Name); err != nil {
			return at("repository name: %v", err)
		}
		if seen[r.Name] {
			return at("two repositories are called %s", r.Name)
		}
		seen[r.Name] = true
		if r.Path == "" {
			return at("repository %s has no path", r.Name)
		}
		var ways []string
		for _, way := range []struct{ key, value string }{
			{"passphrase_file", r.PassphraseFile}, {"passphrase_command", r.PassphraseCommand}, {"key_file", r.KeyFile},
		} {
			if way.value != "" {
				ways = append(ways, way.key)
			}
		}
		if len(ways) > 1 {
			return at("repository %s has %s: keep one", r.Name, strings.Join(ways, " and "))
		}
	}
	seen = map[string]bool{}
	for i, h := range f.Hosts {
		at := func(format string, args ...any) error {
			return fmt.Errorf("%w: %s:%d: %s", ErrConfig, f.Path, lay.headerLine("host", i), fmt.Sprintf(format, args...))
		}
		if err := h.Check(); err != nil {
			return at("%v", err)
		}
		if seen[h.Name] {
			return at("two hosts are called %s", h.Name)
		}
		seen[h.Name] = true
	}
	if err := f.validateDaemon(lay); err != nil {
		return err
	}
	return f.validateJobs(lay)
}

// Check tells what is missing or wrong in a host's block.
func (h Host) Check() error {
	if err := CheckName(h.Name); err != nil {
		return fmt.Errorf("host name: %w", err)
	}
	for _, address := range []struct{ key, value string }{{"address", h.Address}, {"ssh", h.SSH}} {
		if strings.ContainsFunc(address.value, unicode.IsSpace) || strings.ContainsAny(address.value, "/@") {
			return fmt.Errorf("host %s: %s %q must be HOST or HOST:PORT", h.Name, address.key, address.value)
		}
	}
	switch {
	case h.Address == "" && h.SSH == "":
		return fmt.Errorf("host %s has no address", h.Name)
	case h.User == "":
		return fmt.Errorf("host %s has no user", h.Name)
	case h.PasswordFile == "" && h.PasswordCommand == "":
		return fmt.Errorf("host %s has no password_file", h.Name)
	case h.PasswordFile != "" && h.PasswordCommand != "":
		return fmt.Errorf("host %s has password_file and password_command: keep one", h.Name)
	case h.Address != "" && h.Thumbprint == "":
		return fmt.Errorf("host %s has no thumbprint", h.Name)
	}
	if h.Address != "" {
		if err := CheckThumbprint(h.Thumbprint); err != nil {
			return fmt.Errorf("host %s: %w", h.Name, err)
		}
	}
	return h.checkSSH()
}

func (h Host) checkSSH() error {
	if h.SSH == "" {
		for _, alone := range []struct{ key, value string }{
			{"ssh_fingerprint", h.SSHFingerprint},
			{"ssh_key_file", h.SSHKeyFile},
			{"ssh_key_passphrase_file", h.SSHKeyPassphraseFile},
			{"ssh_key_passphrase_command", h.SSHKeyPassphraseCommand},
		} {
			if alone.value != "" {
				return fmt.Errorf("host %s has %s and no ssh, the address it belongs to", h.Name, alone.key)
			}
		}
		return nil
	}
	switch {
	case h.SSHFingerprint == "":
		return fmt.Errorf("host %s has ssh and no ssh_fingerprint", h.Name)
	case h.SSHKeyFile == "" && (h.SSHKeyPassphraseFile != "" || h.SSHKeyPassphraseCommand != ""):
		return fmt.Errorf("host %s has a passphrase for an SSH key and no ssh_key_file", h.Name)
	case h.SSHKeyPassphraseFile != "" && h.SSHKeyPassphraseCommand != "":
		return fmt.Errorf("host %s has ssh_key_passphrase_file and ssh_key_passphrase_command: keep one", h.Name)
	}
	if err := CheckFingerprint(h.SSHFingerprint); err != nil {
		return fmt.Errorf("host %s: %w", h.Name, err)
	}
	return nil
}

// Host returns the host called name, or false.
func (f *File) Host(name string) (Host, bool) {
	for _, h := range f.Hosts {
		if h.Name == name {
			return h, true
		}
	}
	return Host{}, false
}

// Repository returns the repository called name, or false.
func (f *File) Repository(name string) (Repository, bool) {
	for _, r := range f.Repositories {
		if r.Name == name {
			return r, true
		}
	}
	return Repository{}, false
}

func (f *File) resolvePaths() {
	base, err := filepath.Abs(f.Path)
	if err != nil {
		base = f.Path
	}
	base = filepath.Dir(base)
	for i := range f.Repositories {
		r := &f.Repositories[i]
		r.Path = resolvePath(base, r.Path)
		r.PassphraseFile = resolvePath(base, r.PassphraseFile)
		r.KeyFile = resolvePath(base, r.KeyFile)
	}
	for i := range f.Hosts {
		h := &f.Hosts[i]
		h.PasswordFile = resolvePath(base, h.PasswordFile)
		h.SSHKeyFile = resolvePath(base, h.SSHKeyFile)
		h.SSHKeyPassphraseFile = resolvePath(base, h.SSHKeyPassphraseFile)
	}
	f.Daemon.State = resolvePath(base, f.Daemon.State)
	f.Daemon.Socket = resolvePath(base, f.Daemon.Socket)
}

func resolvePath(base, p string) string {
	switch {
	case p == "":
		return ""
	case p == "~" || strings.HasPrefix(p, "~/"):
		if home, err := os.UserHomeDir(); err == nil {
			return filepath.Join(home, p[1:])
		}
		return p
	case filepath.IsAbs(p):
		return p
	}
	return filepath.Join(base, p)
}

// known lists the keys of every table, for the hint after a misspelled one.
var known = map[string][]string{
	"":           {"repository", "host", "job", "daemon"},
	"repository": {"name", "path", "passphrase_file", "passphrase_command", "key_file"},
	"host": {
		"name", "address", "user", "password_file", "password_command", "thumbprint",
		"ssh", "ssh_fingerprint", "ssh_key_file", "ssh_key_passphrase_file", "ssh_key_passphrase_command",
	},
	"daemon": {"state", "socket", "metrics", "per_host", "total"},
	"job": {
		"name", "kind", "vms", "repository", "schedule", "timezone", "keep", "window", "window_end", "quiesce",
		"compression", "rate_limit", "retries", "timeout", "no_success_for", "check", "prune",
	},
	"job.keep":  {"last", "hourly", "daily", "weekly", "monthly", "yearly", "within"},
	"job.check": {"how", "percent", "bytes", "time"},
	"job.prune": {"max_rewrite", "grace"},
}

// didYouMean suggests the known key nearest to an unknown one.
func didYouMean(key toml.Key) string {
	table, last := strings.Join(key[:len(key)-1], "."), key[len(key)-1]
	best, bestDistance := "", 3
	for _, k := range known[table] {
		if d := distance(k, last); d < bestDistance {
			best, bestDistance = k, d
		}
	}
	if best != "" {
		return fmt.Sprintf(" (did you mean %s?)", best)
	}
	if keys := known[table]; len(keys) > 0 {
		return " (known here: " + strings.Join(keys, ", ") + ")"
	}
	return ""
}

// distance is the number of letters to insert, remove or replace.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		diagonal := row[0]
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			next := min(row[j]+1, row[j-1]+1, diagonal+cost)
			diagonal, row[j] = row[j], next
		}
	}
	return row[len(b)]
}

// Exists tells whether there is a file at path; a path that cannot be looked
// at counts, so that the reason is reported when it is read.
func Exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil || !errors.Is(err, fs.ErrNotExist)
}
