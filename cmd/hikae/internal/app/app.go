// Package app is what every verb of hikae stands on: which repository, host,
// secret and state directory a command line means, and how to open them.
//
// The order is the same everywhere: flag, then environment, then configuration
// file. Secrets come from files, from commands named in the configuration, or
// from the terminal without echo; they never appear in arguments, in the
// environment, in messages or in files of hikae.
package app

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"hikae/backup/esxi"
	"hikae/cmd/hikae/internal/config"
	"hikae/cmd/hikae/internal/ui"
	"hikae/repo"
)

// Sentinel errors, for exit codes and hints.
var (
	// ErrUsage says that the command line cannot be carried out as written.
	ErrUsage = errors.New("usage")
	// ErrNoHost says that the configuration has no host of that name.
	ErrNoHost = errors.New("host not in the configuration")
	// ErrNoRepository says that nothing tells which repository is meant.
	ErrNoRepository = errors.New("no repository named")
	// ErrNoPassphrase says that no passphrase was given and nobody can be asked.
	ErrNoPassphrase = errors.New("no passphrase")
)

// Usagef makes an error of kind ErrUsage; its text is the format alone.
func Usagef(format string, args ...any) error {
	return &usageError{fmt.Errorf(format, args...)}
}

type usageError struct{ err error }

func (e *usageError) Error() string        { return e.err.Error() }
func (e *usageError) Unwrap() error        { return e.err }
func (e *usageError) Is(target error) bool { return target == ErrUsage }

// Flags are the flags that every verb has.
type Flags struct {
	Repo           string
	PassphraseFile string
	KeyFile        string
	Config         string
	State          string
	Verbose        bool
}

// App is one call of the command.
type App struct {
	Flags   Flags
	UI      *ui.Printer
	Stdin   *os.File
	Getenv  func(string) string
	Clock   func() time.Time
	Version string       // of the program, as generations record it
	KDF     repo.KDF     // what new passphrases cost; the zero value is the default
	LogTime bool         // log lines go to a file, so they need the time
	Log     *slog.Logger // the daemon's, which Logger returns then

	cfg      *config.File
	stopping atomic.Pointer[string]
}

// Logger returns where libraries report what a person may want to know: above
// the progress, warnings only unless verbose.
func (a *App) Logger() *slog.Logger {
	if a.Log != nil {
		return a.Log
	}
	level := slog.LevelWarn
	if a.Flags.Verbose {
		level = slog.LevelDebug
	}
	return slog.New(slog.NewTextHandler(a.UI.Writer(), &slog.HandlerOptions{
		Level: level,
		ReplaceAttr: func(_ []string, at slog.Attr) slog.Attr {
			if at.Key == slog.TimeKey && !a.LogTime {
				return slog.Attr{} // a terminal and journald both know the time
			}
			return at
		},
	}))
}

// userConfig is the configuration file of the user.
func (a *App) userConfig() (string, error) {
	if dir := a.Getenv("XDG_CONFIG_HOME"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "hikae", "hikae.toml"), nil
	}
	home := a.Getenv("HOME")
	if home == "" {
		return "", errors.New("HOME is not set, so there is no place for a configuration file: use --config FILE")
	}
	return filepath.Join(home, ".config", "hikae", "hikae.toml"), nil
}

// systemConfig is read when the user has no file of their own.
const systemConfig = "/etc/hikae/hikae.toml"

// ConfigPath is the configuration file in use, or the one to be made when
// there is none yet.
func (a *App) ConfigPath() (string, error) {
	if a.Flags.Config != "" {
		return a.Flags.Config, nil
	}
	user, err := a.userConfig()
	if err == nil && config.Exists(user) {
		return user, nil
	}
	if config.Exists(systemConfig) {
		return systemConfig, nil
	}
	return user, err
}

// Config reads the configuration. No file at all is an empty configuration,
// unless --config names it.
func (a *App) Config() (*config.File, error) {
	if a.cfg != nil {
		return a.cfg, nil
	}
	path, err := a.ConfigPath()
	if err != nil {
		// Without a home there is no file; flags may say everything.
		a.cfg = &config.File{}
		return a.cfg, nil
	}
	f, err := config.Load(path)
	if errors.Is(err, fs.ErrNotExist) {
		if a.Flags.Config != "" {
			return nil, fmt.Errorf("%w: there is no file %s", config.ErrConfig, path)
		}
		f, err = &config.File{Path: path}, nil
	}
	if err != nil {
		return nil, err
	}
	a.cfg = f
	return f, nil
}

// Repository finds which repository is meant. The result has an absolute path.
func (a *App) Repository() (config.Repository, error) {
	f, err := a.Config()
	if err != nil {
		return config.Repository{}, err
	}
	r, err := a.pickRepository(f)
	if err != nil {
		return config.Repository{}, err
	}
	if r.Path, err = filepath.Abs(r.Path); err != nil {
		return config.Repository{}, fmt.Errorf("repository: %w", err)
	}
	pass, key := a.Flags.PassphraseFile, a.Flags.KeyFile
	from := "--passphrase-file and --key-file"
	if pass == "" && key == "" {
		pass, key = a.Getenv("HIKAE_PASSPHRASE_FILE"), a.Getenv("HIKAE_KEY_FILE")
		from = "HIKAE_PASSPHRASE_FILE and HIKAE_KEY_FILE"
	}
	switch {
	case pass != "" && key != "":
		return config.Repository{}, Usagef("%s are both given: keep one", from)
	case pass != "" || key != "":
		r.PassphraseFile, r.PassphraseCommand, r.KeyFile = pass, "", key
	}
	return r, nil
}

func (a *App) pickRepository(f *config.File) (config.Repository, error) {
	name := a.Flags.Repo
	if name == "" {
		name = a.Getenv("HIKAE_REPO")
	}
	if name != "" {
		if r, ok := f.Repository(name); ok {
			return r, nil
		}
		abs, err := filepath.Abs(name)
		if err != nil {
			return config.Repository{}, fmt.Errorf("repository: %w", err)
		}
		for _, r := range f.Repositories {
			if filepath.Clean(r.Path) == abs {
				return r, nil
			}
		}
		return config.Repository{Path: abs}, nil
	}
	switch len(f.Repositories) {
	case 0:
		return config.Repository{}, fmt.Errorf("%w: use --repo DIR, set HIKAE_REPO, or add a [[repository]] to %s", ErrNoRepository, orElse(f.Path, systemConfig))
	case 1:
		return f.Repositories[0], nil
	}
	var names []string
	for _, r := range f.Repositories {
		names = append(names, r.Name)
	}
	return config.Repository{}, fmt.Errorf("%w: %s has several (%s); choose one with --repo NAME", ErrNoRepository, f.Path, strings.Join(names, ", "))
}

func orElse(s, other string) string {
	if s == "" {
		return other
	}
	return s
}

// OpenRepository finds, unlocks and opens the repository that is meant.
func (a *App) OpenRepository(ctx context.Context) (*repo.Repository, error) {
	place, err := a.Repository()
	if err != nil {
		return nil, err
	}
	if err := NeedsRepository(place.Path); err != nil {
		return nil, err
	}
	key, err := a.Key(ctx, place)
	if err != nil {
		return nil, err
	}
	defer key.Wipe()
	r, _, err := a.OpenRepositoryWith(ctx, place.Path, key)
	return r, err
}

// NeedsRepository complains before a passphrase is asked for when there is
// nothing at path that it could open.
func NeedsRepository(path string) error {
	if _, err := os.Stat(filepath.Join(path, "config")); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("%s: %w", path, repo.ErrNotRepository)
		}
		return fmt.Errorf("open repository %s: %w", path, err)
	}
	return nil
}

// Hosts returns the configured hosts.
func (a *App) Hosts() ([]config.Host, error) {
	f, err := a.Config()
	if err != nil {
		return nil, err
	}
	return f.Hosts, nil
}

// Host returns the configured host called name.
func (a *App) Host(name string) (config.Host, error) {
	f, err := a.Config()
	if err != nil {
		return config.Host{}, err
	}
	h, ok := f.Host(name)
	if !ok {
		if len(f.Hosts) == 0 {
			return config.Host{}, fmt.Errorf("%w: %s has no hosts yet, so none called %q", ErrNoHost, f.Path, name)
		}
		var names []string
		for _, h := range f.Hosts {
			names = append(names, h.Name)
		}
		return config.Host{}, fmt.Errorf("%w: %s has no host called %q, but %s", ErrNoHost, f.Path, name, strings.Join(names, ", "))
	}
	return h, nil
}

// Connect logs in to the host called name.
func (a *App) Connect(ctx context.Context, name string) (*esxi.Host, error) {
	h, err := a.Host(name)
	if err != nil {
		return nil, err
	}
	return a.ConnectTo(ctx, h)
}

// ConnectTo logs in to a host.
func (a *App) ConnectTo(ctx context.Context, h config.Host) (*esxi.Host, error) {
	c := esxi.Config{
		Name: h.Name, Address: h.Address, User: h.User, Thumbprint: h.Thumbprint,
		Password: func() (string, error) {
			p, err := a.readSecret(ctx, "password of host "+h.Name, h.PasswordFile, h.PasswordCommand)
			return string(p), err
		},
		Logger: a.Logger(), Clock: a.Clock,
	}
	if h.SSH != "" {
		c.SSH = &esxi.SSHConfig{Address: h.SSH, Fingerprint: h.SSHFingerprint}
		if h.SSHKeyFile != "" {
			key, err := a.readSecretFile("SSH key of host "+h.Name, h.SSHKeyFile)
			if err != nil {
				return nil, err
			}
			defer clear(key)
			c.SSH.Key = key
		}
		if h.SSHKeyPassphraseFile != "" || h.SSHKeyPassphraseCommand != "" {
			c.SSH.Passphrase = func() (string, error) {
				p, err := a.readSecret(ctx, "passphrase of the SSH key of host "+h.Name, h.SSHKeyPassphraseFile, h.SSHKeyPassphraseCommand)
				return string(p), err
			}
		}
	}
	return esxi.Connect(ctx, c)
}

// StateDir makes and returns the directory for what hikae has to remember
// between runs, such as the journal of snapshots. Only its user can read it.
func (a *App) StateDir() (string, error) {
	dir := a.Flags.State
	if dir == "" {
		home := a.Getenv("HOME")
		switch base := a.Getenv("XDG_STATE_HOME"); {
		case filepath.IsAbs(base):
			dir = filepath.Join(base, "hikae")
		case os.Geteuid() == 0:
			dir = "/var/lib/hikae"
		case home != "":
			dir = filepath.Join(home, ".local", "state", "hikae")
		default:
			return "", errors.New("HOME is not set, so there is no place for hikae's state: use --state DIR")
		}
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", fmt.Errorf("state directory: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("state directory: %w", err)
	}
	return dir, nil
}

// Stopping says what hikae will be doing when it is asked to stop (Ctrl-C), for
// the message that the operator then sees.
func (a *App) Stopping(what string) { a.stopping.Store(&what) }

// WhenStopped is what Stopping said last.
func (a *App) WhenStopped() string {
	if s := a.stopping.Load(); s != nil {
		return *s
	}
	return "ending what was begun"
}
