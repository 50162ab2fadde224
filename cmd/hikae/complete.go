package main

import (
	"context"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"hikae/cmd/hikae/internal/app"
	"hikae/repo"
)

// Completion offers what can be found without asking anybody: hosts from the
// configuration, VMs and generations from the repository when its passphrase is
// in a file. It never prompts, never logs in to a host, and stays silent about
// errors.

type completer = func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective)

// completionTime bounds how long a shell waits.
const completionTime = 5 * time.Second

func completeHost(a *app.App) completer {
	return func(_ *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return hostNames(a, word, ""), cobra.ShellCompDirectiveNoFileComp
	}
}

func hostNames(a *app.App, word, suffix string) []string {
	var found []string
	hosts, _ := a.Hosts()
	for _, h := range hosts {
		if strings.HasPrefix(h.Name, word) {
			found = append(found, h.Name+suffix)
		}
	}
	return found
}

// completeBackupVM offers the VMs backed up before, and HOST/ for the others.
func completeBackupVM(a *app.App) completer {
	return func(_ *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
		found := storedVMs(a, word)
		if len(found) == 0 {
			return hostNames(a, word, "/"), cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveNoSpace
		}
		return found, cobra.ShellCompDirectiveNoFileComp
	}
}

// completeStoredVM offers the VMs in the repository.
func completeStoredVM(a *app.App) completer {
	return func(_ *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return storedVMs(a, word), cobra.ShellCompDirectiveNoFileComp
	}
}

// completeGeneration offers HOST/VM@ and then the generations of that VM, as
// the first argument; files after it.
func completeGeneration(a *app.App) completer {
	return func(_ *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveDefault
		}
		i := strings.LastIndexByte(word, '@')
		if i < 0 {
			found := storedVMs(a, word)
			for j := range found {
				found[j] += "@"
			}
			return found, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveNoSpace
		}
		var found []string
		withQuietRepository(a, func(ctx context.Context, r *repo.Repository) {
			vm, err := repo.ParseVMID(word[:i])
			if err != nil {
				return
			}
			refs, _ := r.Refs(ctx, vm)
			for _, ref := range refs {
				if strings.HasPrefix(ref.String(), word) {
					found = append(found, ref.String())
				}
			}
		})
		return append(found, word[:i]+"@latest"), cobra.ShellCompDirectiveNoFileComp
	}
}

func storedVMs(a *app.App, word string) []string {
	var found []string
	withQuietRepository(a, func(ctx context.Context, r *repo.Repository) {
		vms, _ := r.VMs(ctx)
		for _, vm := range vms {
			if strings.HasPrefix(vm.String(), word) {
				found = append(found, vm.String())
			}
		}
	})
	return found
}

// withQuietRepository opens the repository when that needs nobody's help.
func withQuietRepository(a *app.App, f func(context.Context, *repo.Repository)) {
	place, err := a.Repository()
	if err != nil || place.PassphraseFile == "" && place.KeyFile == "" {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), completionTime)
	defer cancel()
	r, err := a.OpenRepository(ctx)
	if err != nil {
		return
	}
	defer r.Close()
	f(ctx, r)
}
