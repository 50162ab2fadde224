package app

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"

	"golang.org/x/term"

	"hikae/cmd/hikae/internal/config"
)

// maxSecret bounds a passphrase or password, in bytes.
const maxSecret = 64 << 10

// Passphrase gets the passphrase of a repository: from its file, its command or
// the terminal. The caller clears it.
func (a *App) Passphrase(ctx context.Context, place config.Repository) ([]byte, error) {
	if place.PassphraseFile != "" || place.PassphraseCommand != "" {
		return a.readSecret(ctx, "passphrase", place.PassphraseFile, place.PassphraseCommand)
	}
	if err := a.canAsk("--passphrase-file FILE, or set HIKAE_PASSPHRASE_FILE"); err != nil {
		return nil, err
	}
	return a.ask(ctx, "passphrase of "+place.Path+": ")
}

// NewPassphrase gets the passphrase of a repository that is about to be made: on
// the terminal it is asked for twice. The caller clears it.
func (a *App) NewPassphrase(ctx context.Context, place config.Repository) ([]byte, error) {
	if place.PassphraseFile != "" || place.PassphraseCommand != "" {
		return a.Passphrase(ctx, place)
	}
	if err := a.canAsk("--passphrase-file FILE, or set HIKAE_PASSPHRASE_FILE"); err != nil {
		return nil, err
	}
	a.UI.Infof("The passphrase is the only key to %s. Whoever loses it loses every copy in it: keep it somewhere else as well.", place.Path)
	return a.askTwice(ctx)
}

// FurtherPassphrase gets one more passphrase, from a file or, when that is empty,
// from the terminal. The caller clears it.
func (a *App) FurtherPassphrase(ctx context.Context, file string) ([]byte, error) {
	if file != "" {
		return a.readSecret(ctx, "new passphrase", file, "")
	}
	if err := a.canAsk("--new-passphrase-file FILE"); err != nil {
		return nil, err
	}
	return a.askTwice(ctx)
}

// canAsk tells whether there is a terminal; instead is what to do without one.
func (a *App) canAsk(instead string) error {
	if a.Stdin == nil || !term.IsTerminal(int(a.Stdin.Fd())) {
		return fmt.Errorf("%w: there is no terminal to ask on; use %s", ErrNoPassphrase, instead)
	}
	return nil
}

func (a *App) askTwice(ctx context.Context) ([]byte, error) {
	first, err := a.ask(ctx, "new passphrase: ")
	if err != nil {
		return nil, err
	}
	second, err := a.ask(ctx, "again: ")
	if err != nil {
		return nil, err
	}
	defer clear(second)
	if !bytes.Equal(first, second) {
		clear(first)
		return nil, Usagef("the two passphrases differ; nothing was made")
	}
	return first, nil
}

// ask reads a line from the terminal without showing it.
func (a *App) ask(ctx context.Context, prompt string) ([]byte, error) {
	fd := int(a.Stdin.Fd())
	state, err := term.GetState(fd)
	if err != nil {
		return nil, fmt.Errorf("ask on the terminal: %w", err)
	}
	say, done := a.Prompt()
	defer done()
	fmt.Fprint(say, prompt)
	type answer struct {
		line []byte
		err  error
	}
	got := make(chan answer, 1)
	go func() {
		line, err := term.ReadPassword(fd)
		got <- answer{line, err}
	}()
	select {
	case <-ctx.Done():
		// The reader cannot be called off; without this the terminal would stay
		// mute after the program has ended.
		_ = term.Restore(fd, state)
		fmt.Fprintln(say)
		return nil, context.Cause(ctx)
	case r := <-got:
		fmt.Fprintln(say)
		if r.err != nil && !errors.Is(r.err, io.EOF) {
			return nil, fmt.Errorf("ask on the terminal: %w", r.err)
		}
		if len(r.line) == 0 {
			return nil, fmt.Errorf("%w: nothing was typed", ErrNoPassphrase)
		}
		return r.line, nil
	}
}

// Prompt returns where questions are written: the terminal, even when standard
// error goes to a file. They are asked even when quiet.
func (a *App) Prompt() (w io.Writer, done func()) {
	if !a.UI.Terminal() {
		if tty, err := os.OpenFile("/dev/tty", os.O_WRONLY, 0); err == nil {
			return tty, func() { _ = tty.Close() }
		}
	}
	return a.UI.Err, func() {}
}

// readSecret gets a secret from a file or from a command's output. One line
// break at its end does not belong to it.
func (a *App) readSecret(ctx context.Context, what, file, command string) ([]byte, error) {
	var secret []byte
	var from string
	if command != "" {
		from = "its command"
		cmd := exec.CommandContext(ctx, "/bin/sh", "-c", command)
		cmd.Stdin, cmd.Stderr = a.Stdin, os.Stderr
		out, err := cmd.Output()
		if err != nil {
			return nil, fmt.Errorf("%s: its command failed: %w", what, err)
		}
		secret = out
	} else {
		from = file
		b, err := a.readSecretFile(what, file)
		if err != nil {
			return nil, err
		}
		secret = b
	}
	secret = bytes.TrimSuffix(secret, []byte("\n"))
	secret = bytes.TrimSuffix(secret, []byte("\r"))
	switch {
	case len(secret) == 0:
		return nil, fmt.Errorf("%s: %s gives nothing", what, from)
	case len(secret) > maxSecret:
		return nil, fmt.Errorf("%s: %s gives more than %d bytes", what, from, maxSecret)
	case bytes.ContainsAny(secret, "\n\x00"):
		return nil, fmt.Errorf("%s: %s gives more than one line", what, from)
	}
	return secret, nil
}

func (a *App) readSecretFile(what, path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("%s: there is no file %s", what, path)
		}
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	// A pipe, as a shell makes for <(command), has a mode of its own.
	if mode := info.Mode(); mode.IsRegular() && mode.Perm()&0o077 != 0 {
		a.UI.Warnf("other users may read the %s in %s; run: chmod 600 %s", what, path, path)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxSecret+3))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	return b, nil
}
