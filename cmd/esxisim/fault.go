package main

import (
	"net/http"
	"path/filepath"
	"strconv"

	"github.com/spf13/cobra"

	"hikae/backup/esxisim"
)

func absolute(name string) (string, error) { return filepath.Abs(name) }

func faultCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "fault",
		Short: "Make something go wrong",
		Long: `Make something go wrong. --count is how often (default once; below 0: until
"fault clear"), --skip how many occasions pass first.`,
		Args: exactArgs(0),
	}
	dial := controlFlag(cmd)
	inject := func(f *esxisim.Fault) func(*cobra.Command, []string) error {
		return func(cmd *cobra.Command, _ []string) error {
			c, err := dial()
			if err != nil {
				return err
			}
			return c.post(cmd, "/fault", f)
		}
	}
	add := func(use, short string, kind string, setup func(*cobra.Command, *esxisim.Fault), parse func([]string, *esxisim.Fault) error, args cobra.PositionalArgs) {
		f := &esxisim.Fault{Kind: kind}
		sub := &cobra.Command{Use: use, Short: short, Args: args}
		send := inject(f)
		sub.RunE = func(cmd *cobra.Command, args []string) error {
			if parse != nil {
				if err := parse(args, f); err != nil {
					return err
				}
			}
			return send(cmd, args)
		}
		if setup != nil {
			setup(sub, f)
		}
		cmd.AddCommand(sub)
	}
	count := func(cmd *cobra.Command, f *esxisim.Fault) {
		cmd.Flags().IntVar(&f.Count, "count", 1, "how often; below 0: until cleared")
		cmd.Flags().IntVar(&f.Skip, "skip", 0, "how many occasions pass first")
	}
	transfer := func(cmd *cobra.Command, f *esxisim.Fault) {
		count(cmd, f)
		cmd.Flags().StringVar(&f.Verb, "verb", "", "only GET, or only PUT")
		cmd.Flags().StringVar(&f.Path, "path", "", "only files whose path contains this")
	}
	var after string
	add("drop", "Cut the connection of a /folder transfer after some bytes", esxisim.FaultDrop, func(cmd *cobra.Command, f *esxisim.Fault) {
		transfer(cmd, f)
		cmd.Flags().StringVar(&after, "after", "0", "bytes of the body that pass first (K, M, G)")
	}, func(_ []string, f *esxisim.Fault) (err error) { f.After, err = parseSize(after); return err }, exactArgs(0))
	add("busy", "Answer /folder transfers 503", esxisim.FaultBusy, func(cmd *cobra.Command, f *esxisim.Fault) {
		transfer(cmd, f)
		cmd.Flags().IntVar(&f.Status, "status", http.StatusServiceUnavailable, "another status")
	}, nil, exactArgs(0))
	add("call METHOD", "Fail or delay a SOAP call, or lose its answer", esxisim.FaultCall, func(cmd *cobra.Command, f *esxisim.Fault) {
		count(cmd, f)
		cmd.Flags().StringVar(&f.Fault, "fault", "", "fault type, as TaskInProgress; empty: the call succeeds")
		cmd.Flags().StringVar(&f.Message, "message", "", "its text for people")
		cmd.Flags().DurationVar(&f.Delay, "delay", 0, "time that passes first")
		cmd.Flags().BoolVar(&f.InTask, "in-task", false, "the call's task fails or waits, not the call")
		cmd.Flags().BoolVar(&f.Lost, "lost", false, "carry the call out and cut the connection")
	}, func(args []string, f *esxisim.Fault) error { f.Method = args[0]; return nil }, exactArgs(1))
	add("space BYTES", "Leave the datastore so many free bytes (K, M, G, T)", esxisim.FaultSpace, nil,
		func(args []string, f *esxisim.Fault) (err error) { f.Free, err = parseSize(args[0]); return err }, exactArgs(1))
	add("expire", "End every session now", esxisim.FaultExpire, nil, nil, exactArgs(0))
	add("lie [VM DISK]", "Let change tracking miss the next guest write to a disk, or to every one", esxisim.FaultLie, nil,
		func(args []string, f *esxisim.Fault) (err error) {
			if len(args) == 0 {
				return nil
			}
			f.VM = args[0]
			if f.Disk, err = strconv.Atoi(args[1]); err != nil {
				return usage("a disk is a number, counted from 0")
			}
			return nil
		},
		func(_ *cobra.Command, args []string) error {
			if len(args) != 0 && len(args) != 2 {
				return usage("lie takes a VM and a disk, or nothing")
			}
			return nil
		})
	command := func(cmd *cobra.Command, f *esxisim.Fault) {
		count(cmd, f)
		cmd.Flags().StringVar(&f.Command, "command", "", "only commands whose line contains this")
	}
	add("ssh-refuse", "Close a new SSH connection at once", esxisim.FaultSSHRefuse, count, nil, exactArgs(0))
	var sshAfter string
	add("ssh-drop", "Cut the connection of an SSH session after some bytes", esxisim.FaultSSHDrop, func(cmd *cobra.Command, f *esxisim.Fault) {
		command(cmd, f)
		cmd.Flags().StringVar(&sshAfter, "after", "0", "bytes of the session, both ways, that pass first (K, M, G)")
	}, func(_ []string, f *esxisim.Fault) (err error) { f.After, err = parseSize(sshAfter); return err }, exactArgs(0))
	add("ssh-command TEXT", "Fail or delay a command whose line contains the text, or lose its answer", esxisim.FaultSSHCommand, func(cmd *cobra.Command, f *esxisim.Fault) {
		count(cmd, f)
		cmd.Flags().StringVar(&f.Fault, "fault", "", "fault type that it prints as vim-cmd does, as TaskInProgress")
		cmd.Flags().StringVar(&f.Message, "message", "", "what it prints instead of being carried out")
		cmd.Flags().IntVar(&f.Status, "status", 0, "its exit status, without being carried out")
		cmd.Flags().DurationVar(&f.Delay, "delay", 0, "time that passes first")
		cmd.Flags().BoolVar(&f.Lost, "lost", false, "carry it out and cut the connection")
	}, func(args []string, f *esxisim.Fault) error { f.Command = args[0]; return nil }, exactArgs(1))
	add("ssh-hang", "Let a command never answer", esxisim.FaultSSHHang, command, nil, exactArgs(0))
	cmd.AddCommand(&cobra.Command{
		Use: "clear", Short: "End all faults and the limit on space", Args: exactArgs(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := dial()
			if err != nil {
				return err
			}
			return c.print(cmd, http.MethodDelete, "/fault", nil, nil)
		},
	})
	return cmd
}
