package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"hikae/cmd/hikae/internal/app"
	"hikae/cmd/hikae/internal/ui"
	"hikae/repo"
)

func newKey(a *app.App) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "key",
		Short: "what opens the repository: passphrases, key files, a recovery code",
		Long: `A repository opens with any of its keys: passphrases that people know, key files
for machines (--key-file), and a recovery code, printed and put away, which is
typed or given in a file where a passphrase is expected. Each has a slot of its
own, so that one can be taken away without the others.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newKeyList(a), newKeyAdd(a), newKeyRemove(a), newKeyChange(a), newKeyRotate(a))
	return cmd
}

func newKeyList(a *app.App) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "list",
		Short: "list the keys",
		Long: `Lists the key slots. Labels and kinds can be read by whoever reads the
repository's files; the keys themselves are shown nowhere.` + exitCodes(exitPassphrase, exitNotFound, exitDamaged),
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return runKeyList(cmd.Context(), a) },
	}
	jsonFlag(a, cmd)
	return cmd
}

func runKeyList(ctx context.Context, a *app.App) error {
	r, err := a.OpenRepository(ctx)
	if err != nil {
		return err
	}
	defer r.Close()
	slots, err := r.KeySlots(ctx)
	tab := ui.NewTable("ID", "KIND", "CREATED", ">EPOCH", "LABEL")
	for _, s := range slots {
		if a.UI.JSON {
			if err := a.UI.Object(s); err != nil {
				return err
			}
			continue
		}
		label := s.Label
		if !s.Vouched {
			label = strings.TrimSpace(label + " (not made by who has the keys, or left out of a rotation: remove it)")
		}
		tab.Row(s.ID, s.Kind, s.Created.Format(time.RFC3339), s.Epoch, label)
	}
	if tab.Len() > 0 {
		a.UI.Print(tab)
	}
	return err
}

// newKeyOptions are the flags that say what a new key is.
type newKeyOptions struct {
	passphraseFile, keyFile string
	recovery                bool
	label                   string
}

func (o *newKeyOptions) flags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&o.passphraseFile, "new-passphrase-file", "", "file with the new passphrase")
	f.StringVar(&o.keyFile, "new-key-file", "", "make this key file; it must not be there yet")
	f.BoolVar(&o.recovery, "recovery", false, "make a recovery code and print it, once")
	cmd.MarkFlagsMutuallyExclusive("new-passphrase-file", "new-key-file", "recovery")
}

// kind is the kind that the flags ask for; empty when they leave it open.
func (o *newKeyOptions) kind() string {
	switch {
	case o.keyFile != "":
		return repo.KeyKeyFile
	case o.recovery:
		return repo.KeyRecovery
	case o.passphraseFile != "":
		return repo.KeyPassphrase
	}
	return ""
}

// newSecret is a secret that is about to be added.
type newSecret struct {
	repo.Secret
	code string // of a recovery code, to be shown
	undo func() // takes back what was made for it
}

// make makes a new secret of a kind.
func (o *newKeyOptions) make(ctx context.Context, a *app.App, kind string) (newSecret, error) {
	switch kind {
	case repo.KeyRecovery:
		code, s := repo.NewRecoveryCode()
		return newSecret{s, code, func() {}}, nil
	case repo.KeyKeyFile:
		content, s := repo.NewKeyFile()
		defer clear(content)
		if err := writeKeyFile(o.keyFile, content); err != nil {
			return newSecret{}, err
		}
		return newSecret{s, "", func() { os.Remove(o.keyFile) }}, nil
	}
	p, err := a.FurtherPassphrase(ctx, o.passphraseFile)
	if err != nil {
		return newSecret{}, err
	}
	defer clear(p)
	return newSecret{repo.Passphrase(p), "", func() {}}, nil
}

// writeKeyFile makes a key file that lasts before the repository knows its key.
func writeKeyFile(path string, content []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return app.Usagef("there is a file %s already; name one that is to be made", path)
	}
	if err == nil {
		_, err = f.Write(content)
		err = errors.Join(err, f.Sync(), f.Close())
		if err == nil {
			var dir *os.File
			if dir, err = os.Open(filepath.Dir(path)); err == nil {
				_ = dir.Sync() // some file systems cannot
				err = dir.Close()
			}
		}
		if err != nil {
			os.Remove(path)
		}
	}
	if err != nil {
		return fmt.Errorf("make the key file: %w", err)
	}
	return nil
}

// say tells about a new slot, and shows a recovery code for the only time.
func (s newSecret) say(a *app.App, slot repo.KeySlot, what string) error {
	if a.UI.JSON {
		return a.UI.Object(struct {
			repo.KeySlot
			Code string `json:"recovery_code,omitempty"`
		}{slot, s.code})
	}
	a.UI.Printf("key %s (%s) %s\n", slot.ID, slot.Kind, what)
	if s.code != "" {
		a.UI.Printf("\n    %s\n\n", s.code)
		a.UI.Infof("This recovery code is shown only now. Write it down and keep it away from the repository: who has both reads everything.")
	}
	return nil
}

func newKeyAdd(a *app.App) *cobra.Command {
	var o newKeyOptions
	cmd := &cobra.Command{
		Use:   "add",
		Short: "add a passphrase, a key file or a recovery code",
		Long: `Adds a key. The repository is opened with one that it has (as every verb opens
it: --passphrase-file, --key-file, the configuration, or the terminal).

Without a flag a new passphrase is asked for. --new-key-file makes a file, only
for its owner to read, that opens the repository by --key-file FILE, HIKAE_KEY_FILE
or key_file in the configuration. --recovery prints a code on standard output.` +
			exitCodes(exitPassphrase, exitNotFound, exitNoRoom),
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return runKeyAdd(cmd.Context(), a, &o) },
	}
	o.flags(cmd)
	cmd.Flags().StringVar(&o.label, "label", "", "what to call it in key list; everybody can read that")
	jsonFlag(a, cmd)
	return cmd
}

func runKeyAdd(ctx context.Context, a *app.App, o *newKeyOptions) error {
	r, err := a.OpenRepository(ctx)
	if err != nil {
		return err
	}
	defer r.Close()
	s, err := o.make(ctx, a, o.kind())
	if err != nil {
		return err
	}
	defer s.Wipe()
	slot, err := r.AddKey(ctx, s.Secret, o.label, a.KDF)
	if err != nil {
		s.undo()
		return err
	}
	return s.say(a, slot, "added")
}

func newKeyRemove(a *app.App) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "remove ID",
		Short: "remove a key",
		Long: `Removes the key whose slot has that id, or the beginning of it, in key list. The
last one cannot be removed.

Who knows the key and has a copy of its slot (every copy of the repository has
one) still reads what was written until now. hikae key rotate, afterwards, shuts
them out of what is written from then on.` + exitCodes(exitPassphrase, exitNotFound),
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return runKeyRemove(cmd.Context(), a, args[0]) },
	}
	return cmd
}

func runKeyRemove(ctx context.Context, a *app.App, id string) error {
	r, err := a.OpenRepository(ctx)
	if err != nil {
		return err
	}
	defer r.Close()
	slots, err := r.KeySlots(ctx)
	if err != nil && !errors.Is(err, repo.ErrDamaged) {
		return err
	}
	full := id
	var found []string
	for _, s := range slots {
		if strings.HasPrefix(s.ID, strings.ToLower(id)) {
			found = append(found, s.ID)
		}
	}
	switch {
	case len(found) > 1:
		return fmt.Errorf("%q fits %s: %w", id, strings.Join(found, " and "), repo.ErrAmbiguous)
	case len(found) == 1:
		full = found[0]
	}
	if err := r.RemoveKey(ctx, full); err != nil {
		return err
	}
	a.UI.Infof("key %s removed; next, if somebody else knew it: hikae key rotate", full)
	return nil
}

func newKeyChange(a *app.App) *cobra.Command {
	var o newKeyOptions
	cmd := &cobra.Command{
		Use:   "change",
		Short: "replace the key that the repository is opened with",
		Long: `Replaces the key with which this command opens the repository by a new one of the
same kind: a new passphrase is asked for or comes from --new-passphrase-file; a
recovery code gives a new code; for a key file name the new one with
--new-key-file. The new key is there before the old one goes.

Who knew the old key and has a copy of the repository from before still reads
that copy, and until hikae key rotate also what is written later.` + exitCodes(exitPassphrase, exitNotFound, exitNoRoom),
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return runKeyChange(cmd.Context(), a, &o) },
	}
	o.flags(cmd)
	jsonFlag(a, cmd)
	return cmd
}

func runKeyChange(ctx context.Context, a *app.App, o *newKeyOptions) error {
	place, err := a.Repository()
	if err != nil {
		return err
	}
	if err := app.NeedsRepository(place.Path); err != nil {
		return err
	}
	key, err := a.Key(ctx, place)
	if err != nil {
		return err
	}
	defer key.Wipe()
	r, old, err := a.OpenRepositoryWith(ctx, place.Path, key)
	if err != nil {
		return err
	}
	defer r.Close()
	defer old.Wipe()
	kind := string(old.Kind())
	if k := o.kind(); k != "" && k != kind {
		return app.Usagef("the repository was opened with a %s, which only another one replaces; for a %s: hikae key add, then hikae key remove", kind, k)
	}
	if kind == repo.KeyKeyFile && o.keyFile == "" {
		return app.Usagef("name the key file to make with --new-key-file FILE")
	}
	s, err := o.make(ctx, a, kind)
	if err != nil {
		return err
	}
	defer s.Wipe()
	slot, err := r.ChangeKey(ctx, old, s.Secret, a.KDF)
	if err != nil && slot.ID == "" {
		s.undo()
		return err
	}
	return errors.Join(s.say(a, slot, "replaces the one before"), err)
}

func newKeyRotate(a *app.App) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "rotate",
		Short: "begin a new key epoch",
		Long: `Makes a new master key, under which everything is sealed that is written from now
on, and hands it to all keys in key list. What is stored stays as it is and
readable; blocks are still recognised, so nothing is stored twice.

Use it after hikae key remove or change, when somebody knew a key who should not
know what comes.

It protects what is written from now on against who knew a key that has been
removed, and against who learnt the master keys of before and can only read.
It does not protect what was written before: who could read that, and kept the
keys or a copy, still can. They can also still recognise known contents and
names by their ids, for these do not change. And it does not hold against one
who learnt the master keys and can WRITE to the storage, until each key that is
older than the rotation (see EPOCH in key list) has been replaced by hikae key
change: such a key believes any new epoch made by who had the one before.

Backups under way end under the old epoch. Mounts have to be made again to show
what is written under the new one.` + exitCodes(exitPassphrase, exitNotFound, exitDamaged, exitNoRoom),
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return runKeyRotate(cmd.Context(), a) },
	}
	jsonFlag(a, cmd)
	return cmd
}

func runKeyRotate(ctx context.Context, a *app.App) error {
	r, err := a.OpenRepository(ctx)
	if err != nil {
		return err
	}
	defer r.Close()
	all, err := r.KeySlots(ctx)
	if err != nil {
		return err
	}
	epoch, kept, err := r.RotateKeys(ctx)
	if err != nil {
		return err
	}
	for _, s := range all {
		if !s.Vouched {
			a.UI.Warnf("key %s was left out: it was not made by who has the keys; remove it", s.ID)
		}
	}
	if a.UI.JSON {
		return a.UI.Object(map[string]any{"epoch": epoch, "keys": kept})
	}
	a.UI.Printf("key epoch %d begun, for %d keys\n", epoch, len(kept))
	a.UI.Infof("Mounts have to be made again to show what is written from now on.")
	return nil
}
