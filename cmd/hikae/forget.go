package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"hikae/cmd/hikae/internal/app"
	"hikae/cmd/hikae/internal/ui"
	"hikae/repo"
	"hikae/repo/retention"
)

type forgetOptions struct {
	last, hourly, daily, weekly, monthly, yearly keepCount

	within        string
	dryRun, force bool
}

// keepCount is a number of generations to keep, or "all".
type keepCount int

func (k *keepCount) Set(s string) error {
	if s == "all" {
		*k = retention.Unlimited
		return nil
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 0 {
		return errors.New("write a number, or all")
	}
	*k = keepCount(n)
	return nil
}

func (k *keepCount) String() string {
	if *k == retention.Unlimited {
		return "all"
	}
	return strconv.Itoa(int(*k))
}

func (*keepCount) Type() string { return "N" }

func (o *forgetOptions) policy() (p retention.Policy, err error) {
	p = retention.Policy{
		Last: int(o.last), Hourly: int(o.hourly), Daily: int(o.daily),
		Weekly: int(o.weekly), Monthly: int(o.monthly), Yearly: int(o.yearly),
	}
	if o.within != "" {
		if p.Within, err = retention.ParseSpan(o.within); err != nil {
			return p, app.Usagef("--keep-within: %w", err)
		}
	}
	return p, nil
}

func newForget(a *app.App) *cobra.Command {
	var o forgetOptions
	cmd := &cobra.Command{
		Use:   "forget [HOST/VM...] --keep-… | HOST/VM@GENERATION...",
		Short: "forget generations: by a rule, or by name",
		Long: `With --keep flags: forgets the generations of the VMs named, or of all VMs, that no
flag keeps, and says of each why it stays. A generation stays when any flag
keeps it. --keep-daily 7 keeps the newest generation of each of the last seven
days that have one; hours, ISO weeks, months and years likewise, in the time zone
of this machine. "all" as a number keeps one of every such period.

The newest good generation of a VM stays whatever the flags say, and so does one
that is held (hikae hold) or that a running backup builds on. One that cannot be
read neither counts nor goes. When a clock ran backwards, so that times and
sequence numbers contradict each other, nothing of that VM is forgotten.

With HOST/VM@GENERATION: forgets those, whatever their age; the newest good one
only with --force, a held one not at all.

--dry-run only says what would happen. What is forgotten cannot be brought back.
Forgetting makes no room by itself: the blocks stay until the repository is
pruned.` + exitCodes(exitPassphrase, exitNotFound, exitDamaged, exitSomeFailed),
		Example: `  hikae forget --keep-within 7d --keep-daily 30 --keep-monthly 12 --dry-run
  hikae forget esx1/web01@2026-11-22T02-00-00Z`,
		ValidArgsFunction: completeForget(a),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runForget(cmd.Context(), a, &o, args)
		},
	}
	f := cmd.Flags()
	f.Var(&o.last, "keep-last", "keep the last N generations")
	f.Var(&o.hourly, "keep-hourly", "keep one of each of the last N hours that have one")
	f.Var(&o.daily, "keep-daily", "keep one of each of the last N days")
	f.Var(&o.weekly, "keep-weekly", "keep one of each of the last N weeks")
	f.Var(&o.monthly, "keep-monthly", "keep one of each of the last N months")
	f.Var(&o.yearly, "keep-yearly", "keep one of each of the last N years")
	f.StringVar(&o.within, "keep-within", "", "keep all that is younger, for example 30d, 1y6m, 2w or 36h")
	f.BoolVar(&o.dryRun, "dry-run", false, "only say what would be forgotten")
	f.BoolVar(&o.force, "force", false, "forget the newest good generation, too, when it is named")
	jsonFlag(a, cmd)
	return cmd
}

// completeForget offers VMs, and generations after an @.
func completeForget(a *app.App) completer {
	generation := completeGeneration(a)
	return func(cmd *cobra.Command, _ []string, word string) ([]string, cobra.ShellCompDirective) {
		if strings.Contains(word, "@") {
			return generation(cmd, nil, word)
		}
		return storedVMs(a, word), cobra.ShellCompDirectiveNoFileComp
	}
}

// forgetLine is one generation in JSON.
type forgetLine struct {
	Host       string    `json:"host"`
	VM         string    `json:"vm"`
	Generation string    `json:"generation"`
	Sequence   uint64    `json:"sequence"`
	Time       time.Time `json:"time"`
	Keep       bool      `json:"keep"`
	Reasons    []string  `json:"reasons"`
	Forgotten  bool      `json:"forgotten"` // false when it would be, with --dry-run
}

func lineOf(ref repo.Ref) forgetLine {
	return forgetLine{
		Host: ref.VM.Host, VM: ref.VM.Name, Generation: ref.Name(), Sequence: ref.Sequence, Time: ref.Time.UTC(), Reasons: []string{},
	}
}

func runForget(ctx context.Context, a *app.App, o *forgetOptions, args []string) error {
	policy, err := o.policy()
	if err != nil {
		return err
	}
	named := 0
	for _, arg := range args {
		if strings.Contains(arg, "@") {
			named++
		}
	}
	switch {
	case named > 0 && (named < len(args) || !policy.Empty()):
		return app.Usagef("give either VMs and --keep flags, or generations (HOST/VM@GENERATION)")
	case named > 0:
		return runForgetNamed(ctx, a, o, args)
	case policy.Empty():
		return app.Usagef("say what to keep (--keep-last, --keep-daily, --keep-within …), or name generations: HOST/VM@GENERATION")
	case o.force:
		return app.Usagef("--force is for generations that are named")
	}
	var vms []repo.VMID
	for _, arg := range args {
		vm, err := parseVM(arg)
		if err != nil {
			return err
		}
		vms = append(vms, vm)
	}
	r, err := a.OpenRepository(ctx)
	if err != nil {
		return err
	}
	defer r.Close()
	if vms == nil {
		if vms, err = r.VMs(ctx); err != nil {
			return err
		}
	}
	forgotten, failed := 0, 0
	for i, vm := range vms {
		n, err := forgetVM(ctx, a, r, vm, policy, o.dryRun, i > 0)
		forgotten += n
		if err == nil {
			continue
		}
		if len(vms) == 1 || ctx.Err() != nil {
			return err
		}
		failed++
		a.UI.Errorf("%v: %v", vm, err)
	}
	sayForgotten(a, forgotten, o.dryRun)
	if failed > 0 {
		return fmt.Errorf("%w: %d of %d VMs", errSomeFailed, failed, len(vms))
	}
	return nil
}

// forgetVM applies the policy to one VM and returns how many generations went.
func forgetVM(ctx context.Context, a *app.App, r *repo.Repository, vm repo.VMID, policy retention.Policy, dryRun, gap bool) (int, error) {
	decided, err := decide(ctx, r, vm, policy, a.Clock())
	if err != nil {
		return 0, err
	}
	var gone []repo.Ref
	for _, d := range decided {
		if !d.keep {
			gone = append(gone, d.ref)
		}
	}
	if !dryRun {
		if err := r.Forget(ctx, gone, repo.ForgetOptions{}); err != nil {
			return 0, err
		}
	}
	tab := ui.NewTable("VM", "GENERATION", "", "REASONS")
	for _, d := range decided {
		if a.UI.JSON {
			line := lineOf(d.ref)
			line.Keep, line.Forgotten, line.Reasons = d.keep, !d.keep && !dryRun, append(line.Reasons, d.reasons...)
			if err := a.UI.Object(line); err != nil {
				return len(gone), err
			}
			continue
		}
		verb := "keep"
		if !d.keep {
			verb = "forget"
		}
		tab.Row(vm, d.ref.Name(), verb, strings.Join(d.reasons, ", "))
	}
	if gap {
		a.UI.Printf("\n")
	}
	a.UI.Print(tab)
	return len(gone), nil
}

// decision is what becomes of a generation.
type decision struct {
	ref     repo.Ref
	keep    bool
	reasons []string
}

// decide applies the policy to the generations of a VM, newest first.
func decide(ctx context.Context, r *repo.Repository, vm repo.VMID, policy retention.Policy, now time.Time) ([]decision, error) {
	refs, err := r.Refs(ctx, vm)
	if err != nil {
		return nil, err
	}
	held, err := r.Held(ctx, vm)
	if err != nil {
		return nil, err
	}
	used, err := r.InUse(ctx, refs)
	if err != nil {
		return nil, err
	}
	items := make([]retention.Item, 0, len(refs))
	bySequence := make(map[uint64]repo.Ref, len(refs))
	for _, ref := range refs {
		item := retention.Item{Time: ref.Time, Sequence: ref.Sequence, Held: held[ref.Sequence]}
		g, err := r.Generation(ctx, ref)
		switch {
		case errors.Is(err, repo.ErrDamaged):
			item.Incomplete = true
		case err != nil:
			return nil, err
		default:
			item.Imported = g.Manifest().Mode == repo.ModeImport
		}
		items = append(items, item)
		bySequence[ref.Sequence] = ref
	}
	decided, err := policy.Apply(items, now, now.Location())
	if err != nil {
		return nil, err
	}
	out := make([]decision, len(decided))
	for i, d := range decided {
		out[i] = decision{bySequence[d.Sequence], d.Keep, d.Reasons}
		if used[d.Sequence] {
			out[i].keep = true
			out[i].reasons = append(out[i].reasons, "a running backup builds on it")
		}
	}
	return out, nil
}

func runForgetNamed(ctx context.Context, a *app.App, o *forgetOptions, args []string) error {
	r, err := a.OpenRepository(ctx)
	if err != nil {
		return err
	}
	defer r.Close()
	refs, err := resolveRefs(ctx, r, args)
	if err != nil {
		return err
	}
	if !o.dryRun {
		if err := r.Forget(ctx, refs, repo.ForgetOptions{Force: o.force}); err != nil {
			return err
		}
	}
	for _, ref := range refs {
		if a.UI.JSON {
			line := lineOf(ref)
			line.Forgotten = !o.dryRun
			if err := a.UI.Object(line); err != nil {
				return err
			}
			continue
		}
		a.UI.Printf("%v: forget\n", ref)
	}
	sayForgotten(a, len(refs), o.dryRun)
	return nil
}

// resolveRefs finds the generations that arguments name; all of them, or none.
func resolveRefs(ctx context.Context, r *repo.Repository, args []string) ([]repo.Ref, error) {
	var refs []repo.Ref
	for _, arg := range args {
		vm, selector, err := parseGeneration(arg)
		if err != nil {
			return nil, err
		}
		ref, err := r.Resolve(ctx, vm, selector)
		if err != nil {
			return nil, err
		}
		refs = append(refs, ref)
	}
	return refs, nil
}

func sayForgotten(a *app.App, n int, dryRun bool) {
	count := fmt.Sprintf("%d generations", n)
	if n == 1 {
		count = "1 generation"
	}
	switch {
	case dryRun:
		a.UI.Infof("%s would be forgotten; nothing was changed", count)
	case n == 0:
		a.UI.Infof("nothing to forget")
	default:
		a.UI.Infof("%s forgotten; their blocks take room until hikae prune frees it", count)
	}
}

func newHold(a *app.App) *cobra.Command {
	return holdCommand(a, "hold", "keep generations from being forgotten",
		`Keeps generations from being forgotten, by rule or by name, until hikae release.
hikae generations shows which are held.`, (*repo.Repository).Hold)
}

func newRelease(a *app.App) *cobra.Command {
	return holdCommand(a, "release", "end a hold",
		`Ends what hikae hold began: rules count again for the generations named.`, (*repo.Repository).Release)
}

func holdCommand(a *app.App, name, short, long string, do func(*repo.Repository, context.Context, repo.Ref) error) *cobra.Command {
	return &cobra.Command{
		Use:               name + " HOST/VM@GENERATION...",
		Short:             short,
		Long:              long + exitCodes(exitPassphrase, exitNotFound),
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: completeGeneration(a),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			for _, arg := range args {
				if _, _, err := parseGeneration(arg); err != nil {
					return err
				}
			}
			r, err := a.OpenRepository(ctx)
			if err != nil {
				return err
			}
			defer r.Close()
			refs, err := resolveRefs(ctx, r, args)
			if err != nil {
				return err
			}
			for _, ref := range refs {
				if err := do(r, ctx, ref); err != nil {
					return err
				}
				a.UI.Infof("%v: %s", ref, name)
			}
			return nil
		},
	}
}
