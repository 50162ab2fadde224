package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"hikae/backup"
	"hikae/cmd/hikae/internal/app"
	"hikae/cmd/hikae/internal/ui"
	"hikae/repo"
	"hikae/repo/guest"
	"hikae/repo/guest/parttable"
)

func newVerify(a *app.App) *cobra.Command {
	var quick bool
	cmd := &cobra.Command{
		Use:   "verify HOST/VM[@GENERATION]…",
		Short: "rehearse a restore: open everything, look into the disks, hash every block",
		Long: `Does to generations what a restore would, without a host. HOST/VM is the latest
generation of that VM.

Of each generation the configuration and the disks' descriptors are opened and
compared with the disks. In each disk the partition table is read, both copies of
a GPT, and in each partition what is there is recognised and its superblock
checked: ext2/3/4, XFS, btrfs, NTFS, FAT, exFAT, LVM, LUKS, swap and others. Then
every block is decrypted and hashed, holes left out; what several generations
share is read once. --quick leaves that out.

That a disk's content is not recognised is no fault, nor is a file system that
was in use when it was copied. When nothing is wrong, that is remembered, and
shown by hikae generations, hikae show and the mount.` + exitCodes(exitPassphrase, exitNotFound, exitDamaged, exitUnsound, exitSomeFailed),
		Example: `  hikae verify esx1/web01
  hikae verify esx1/web01@2026-11-22 esx1/db01 --quick`,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: completeGenerations(a),
		RunE:              func(cmd *cobra.Command, args []string) error { return runVerify(cmd.Context(), a, args, quick) },
	}
	cmd.Flags().BoolVar(&quick, "quick", false, "only files, partition tables and file systems; blocks are not read")
	jsonFlag(a, cmd)
	return cmd
}

// completeGenerations is completeGeneration for any number of them.
func completeGenerations(a *app.App) completer {
	one := completeGeneration(a)
	return func(cmd *cobra.Command, _ []string, word string) ([]string, cobra.ShellCompDirective) {
		return one(cmd, nil, word)
	}
}

func runVerify(ctx context.Context, a *app.App, args []string, quick bool) error {
	type wanted struct {
		vm       repo.VMID
		selector string
	}
	var want []wanted
	for _, arg := range args {
		w := wanted{selector: "latest"}
		var err error
		if strings.Contains(arg, "@") {
			w.vm, w.selector, err = parseGeneration(arg)
		} else {
			w.vm, err = parseVM(arg)
		}
		if err != nil {
			return err
		}
		want = append(want, w)
	}
	r, err := a.OpenRepository(ctx)
	if err != nil {
		return err
	}
	defer r.Close()
	a.Stopping("ending the verification; it changes nothing")
	var refs []repo.Ref
	for _, w := range want {
		ref, err := r.Resolve(ctx, w.vm, w.selector)
		if err != nil {
			return err
		}
		if !slices.Contains(refs, ref) {
			refs = append(refs, ref)
		}
	}
	var ended verifyError
	var item string
	progress := a.UI.Progress(a.Clock)
	rehearsal := backup.NewRehearsal(backup.RehearseOptions{
		Repo: r, Quick: quick, Logger: a.Logger(), Clock: a.Clock,
		Progress: func(done, total int64) { progress.Set(item, "verifying", done, total) },
	})
	var done []backup.Rehearsed
	for _, ref := range refs {
		item = ref.String()
		got, err := rehearsal.Run(ctx, ref)
		switch {
		case err != nil && ctx.Err() != nil:
			progress.Close()
			printVerified(a, done)
			return err
		case err != nil && len(refs) == 1:
			progress.Close()
			return err
		case err != nil:
			// One that cannot be read must not hide the others.
			a.UI.Errorf("%v", err)
			ended.failed++
		case got.Damaged():
			ended.damaged++
		case !got.OK:
			ended.unsound++
		}
		if a.UI.JSON {
			line := verifyLine{Rehearsed: got}
			if err != nil {
				line.Error = err.Error()
			}
			if err := a.UI.Object(line); err != nil {
				return err
			}
		}
		if err == nil {
			done = append(done, got)
		}
	}
	progress.Close()
	printVerified(a, done)
	if ended.failed+ended.damaged+ended.unsound > 0 {
		return &ended
	}
	return nil
}

// verifyLine is one generation in JSON.
type verifyLine struct {
	backup.Rehearsed
	Error string `json:"error,omitempty"`
}

func printVerified(a *app.App, all []backup.Rehearsed) {
	if a.UI.JSON {
		return
	}
	for i := range all {
		if i > 0 {
			a.UI.Printf("\n")
		}
		printRehearsed(a, &all[i])
	}
}

func printRehearsed(a *app.App, g *backup.Rehearsed) {
	a.UI.Printf("%s\n", ui.Clean(g.Host+"/"+g.VM+"@"+g.Generation))
	for i := range g.Disks {
		printRehearsedDisk(a, &g.Disks[i])
	}
	for _, p := range g.Problems {
		a.UI.Printf("  PROBLEM: %s\n", ui.Clean(problemText(p)))
		a.UI.Printf("    remedy: %s\n", ui.Clean(p.Remedy))
	}
	switch {
	case !g.OK:
		a.UI.Printf("  NOT GOOD: %s\n", count(len(g.Problems), "problem"))
	case g.Quick:
		a.UI.Printf("  no problems found; its blocks were not read (--quick)\n")
	case g.NotRemembered != "":
		a.UI.Printf("  good, in %s; that could not be remembered: %s\n", ui.Seconds(g.Seconds), ui.Clean(g.NotRemembered))
	default:
		a.UI.Printf("  good, in %s\n", ui.Seconds(g.Seconds))
	}
}

// problemText is a finding in one line.
func problemText(p backup.Finding) string {
	var b strings.Builder
	if p.Disk != "" {
		fmt.Fprintf(&b, "%s: ", p.Disk)
	}
	if p.Damage && p.Length > 0 {
		fmt.Fprintf(&b, "%s at byte %d ", ui.Size(p.Length), p.Offset)
	}
	b.WriteString(p.What)
	return b.String()
}

func printRehearsedDisk(a *app.App, d *backup.RehearsedDisk) {
	about := []string{ui.Size(d.BytesCapacity) + ", " + ui.Size(d.BytesData) + " of data"}
	switch d.Table.Kind {
	case parttable.GPT:
		about = append(about, "GPT")
	case parttable.MBR:
		about = append(about, "MBR")
	default:
		about = append(about, map[bool]string{true: "no partition table", false: "its partition table cannot be read"}[d.Err == nil])
	}
	if len(d.Table.Proved) > 0 {
		about = append(about, "proved: "+strings.Join(d.Table.Proved, ", "))
	}
	a.UI.Printf("  %s: %s\n", ui.Clean(d.Name), ui.Clean(strings.Join(about, "; ")))
	printNotes(a, "    ", d.Table.Notes)
	parts := d.Partitions
	if d.Whole != nil {
		parts = []guest.Partition{*d.Whole}
	}
	for _, p := range parts {
		printContent(a, p, d.Whole != nil)
	}
	if q := d.Proof; q != nil {
		took := time.Duration(d.Seconds * float64(time.Second))
		state := "all good"
		if q.BytesBad > 0 {
			state = ui.Size(q.BytesBad) + " of the disk cannot be read"
		}
		a.UI.Printf("    %d blocks, %s; %d read, %s, %s\n", q.Blocks, state, q.BlocksRead, ui.Size(q.BytesHashed), ui.Rate(q.BytesHashed, took))
		if q.MoreDamage {
			a.UI.Printf("    the list of problems is cut\n")
		}
	}
}

func printContent(a *app.App, p guest.Partition, whole bool) {
	c := p.Content
	var b strings.Builder
	switch {
	case whole:
		b.WriteString("whole disk: ")
	default:
		fmt.Fprintf(&b, "partition %d, %s at byte %d: ", p.Number, ui.Size(p.Length), p.Offset)
	}
	switch {
	case c.Kind == "" && p.Err != nil:
		b.WriteString("cannot be read")
	case c.Kind == "":
		b.WriteString("not recognised")
		if name := parttable.TypeName(p.Type); name != "" {
			fmt.Fprintf(&b, " (%s)", name)
		}
	default:
		b.WriteString(c.Kind)
		if c.Label != "" {
			fmt.Fprintf(&b, " %q", c.Label)
		}
		if c.Bytes > 0 {
			fmt.Fprintf(&b, ", %s", ui.Size(c.Bytes))
		}
	}
	if len(c.Proved) > 0 {
		b.WriteString("; proved: " + strings.Join(c.Proved, ", "))
	}
	a.UI.Printf("    %s\n", ui.Clean(b.String()))
	printNotes(a, "      ", c.Notes)
}

func printNotes(a *app.App, indent string, notes []string) {
	for _, n := range notes {
		a.UI.Printf("%snote: %s\n", indent, ui.Clean(n))
	}
}

// count is a number of things in words.
func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// errUnsound says that blocks are whole and what they hold is not.
var errUnsound = errors.New("a generation does not hold together")

// verifyError ends a verification that found problems. Damage counts most.
type verifyError struct{ failed, damaged, unsound int }

func (e *verifyError) Error() string {
	var parts []string
	if e.damaged > 0 {
		parts = append(parts, count(e.damaged, "generation")+" with damaged blocks or files")
	}
	if e.unsound > 0 {
		parts = append(parts, count(e.unsound, "generation")+" whose blocks are whole, but not what they hold")
	}
	if e.failed > 0 {
		parts = append(parts, count(e.failed, "generation")+" that could not be verified")
	}
	return strings.Join(parts, ", ")
}

func (e *verifyError) Is(target error) bool {
	switch {
	case e.damaged > 0:
		return target == errProblems
	case e.unsound > 0:
		return target == errUnsound
	}
	return target == errSomeFailed
}
