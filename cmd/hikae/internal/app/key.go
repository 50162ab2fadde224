package app

import (
	"context"
	"errors"
	"fmt"
	"regexp"

	"hikae/cmd/hikae/internal/config"
	"hikae/repo"
)

// Key is what opens a repository, as it was given: what a person or a file said
// for a passphrase, which may be a recovery code instead, or a key file's content.
type Key struct {
	File bool
	Text []byte
}

// Wipe overwrites the key.
func (k Key) Wipe() { clear(k.Text) }

// Encode writes the key for another process of hikae.
func (k Key) Encode() []byte {
	kind := byte('p')
	if k.File {
		kind = 'k'
	}
	return append([]byte{kind}, k.Text...)
}

// DecodeKey reads what Encode wrote.
func DecodeKey(b []byte) (Key, error) {
	if len(b) == 0 || b[0] != 'p' && b[0] != 'k' {
		return Key{}, errors.New("no key was handed over")
	}
	return Key{File: b[0] == 'k', Text: b[1:]}, nil
}

// Format keeps the key out of messages.
func (k Key) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte("[secret]")) }

// Key gets what opens the repository: its key file, or its passphrase or recovery
// code from a file, a command or the terminal. The caller wipes it.
func (a *App) Key(ctx context.Context, place config.Repository) (Key, error) {
	if place.KeyFile != "" {
		b, err := a.readSecretFile("key", place.KeyFile)
		return Key{File: true, Text: b}, err
	}
	p, err := a.Passphrase(ctx, place)
	return Key{Text: p}, err
}

// codeShape is what a recovery code looks like as it was printed.
var codeShape = regexp.MustCompile(`^[0-9A-Za-z]{5}(-[0-9A-Za-z]{5}){7}$`)

// OpenRepositoryWith opens the repository at path with a key at hand, and returns
// the secret that opened it. What reads as a recovery code is tried as one first:
// a passphrase can look like that, a mistyped code cannot.
func (a *App) OpenRepositoryWith(ctx context.Context, path string, key Key) (*repo.Repository, repo.Secret, error) {
	open := func(s repo.Secret) (*repo.Repository, repo.Secret, error) {
		r, err := repo.Open(ctx, path, s, repo.Options{Clock: a.Clock, Logger: a.Logger(), Version: a.Version})
		return r, s, err
	}
	if key.File {
		s, err := repo.KeyFile(key.Text)
		if err != nil {
			return nil, s, err
		}
		return open(s)
	}
	code, mistyped := repo.RecoveryCode(key.Text)
	if mistyped == nil {
		if r, s, err := open(code); !errors.Is(err, repo.ErrWrongPassphrase) {
			return r, s, err
		}
	}
	r, s, err := open(repo.Passphrase(key.Text))
	if errors.Is(err, repo.ErrWrongPassphrase) && mistyped != nil && codeShape.Match(key.Text) {
		err = fmt.Errorf("%w; if this is a recovery code: %w", err, mistyped)
	}
	return r, s, err
}
