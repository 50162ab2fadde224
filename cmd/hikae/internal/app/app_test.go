package app

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"testing"

	"hikae/cmd/hikae/internal/config"
	"hikae/cmd/hikae/internal/ui"
)

// newApp is an App whose home and environment are the test's.
func newApp(t *testing.T, env map[string]string) (*App, string) {
	t.Helper()
	home := t.TempDir()
	return &App{
		UI: &ui.Printer{Out: &bytes.Buffer{}, Err: &bytes.Buffer{}},
		Getenv: func(name string) string {
			if v, ok := env[name]; ok {
				return v
			}
			if name == "HOME" {
				return home
			}
			return ""
		},
	}, home
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestRepositoryFlagThenEnvironmentThenFile(t *testing.T) {
	const text = `
[[repository]]
name = "main"
path = "/mnt/main"
passphrase_file = "/etc/pass-main"
[[repository]]
name = "second"
path = "/mnt/second"
passphrase_command = "pass second"
`
	main := config.Repository{Name: "main", Path: "/mnt/main", PassphraseFile: "/etc/pass-main"}
	second := config.Repository{Name: "second", Path: "/mnt/second", PassphraseCommand: "pass second"}
	for _, c := range []struct {
		name  string
		flags Flags
		env   map[string]string
		want  config.Repository
	}{
		{"by name", Flags{Repo: "second"}, nil, second},
		{"by its path, with what is configured for it", Flags{Repo: "/mnt/main/"}, nil, main},
		{"by another path", Flags{Repo: "/elsewhere"}, nil, config.Repository{Path: "/elsewhere"}},
		{"from the environment", Flags{}, map[string]string{"HIKAE_REPO": "main"}, main},
		{"the flag wins", Flags{Repo: "second"}, map[string]string{"HIKAE_REPO": "main"}, second},
		{
			"the passphrase from the environment",
			Flags{Repo: "second"},
			map[string]string{"HIKAE_PASSPHRASE_FILE": "/run/p"},
			config.Repository{Name: "second", Path: "/mnt/second", PassphraseFile: "/run/p"},
		},
		{
			"the passphrase flag wins",
			Flags{Repo: "main", PassphraseFile: "/tmp/p"},
			map[string]string{"HIKAE_PASSPHRASE_FILE": "/run/p"},
			config.Repository{Name: "main", Path: "/mnt/main", PassphraseFile: "/tmp/p"},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, home := newApp(t, c.env)
			a.Flags = c.flags
			write(t, filepath.Join(home, ".config/hikae/hikae.toml"), text)
			got, err := a.Repository()
			if err != nil {
				t.Fatal(err)
			}
			if got != c.want {
				t.Errorf("got %+v, want %+v", got, c.want)
			}
		})
	}
}

func TestStateDirIsPrivate(t *testing.T) {
	base := t.TempDir()
	a, _ := newApp(t, map[string]string{"XDG_STATE_HOME": base})
	dir, err := a.StateDir()
	if err != nil {
		t.Fatal(err)
	}
	if want := filepath.Join(base, "hikae"); dir != want {
		t.Errorf("state is in %s, want %s", dir, want)
	}
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("state directory: %v, %v", info.Mode(), err)
	}
	a.Flags.State = filepath.Join(base, "flag")
	if dir, _ := a.StateDir(); dir != a.Flags.State {
		t.Errorf("--state was not obeyed: %s", dir)
	}
}

func TestPassphraseOfACommandThatIsStopped(t *testing.T) {
	a, _ := newApp(t, nil)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if p, err := a.Passphrase(ctx, config.Repository{PassphraseCommand: "echo late"}); err == nil {
		t.Errorf("got %q", p)
	}
}
