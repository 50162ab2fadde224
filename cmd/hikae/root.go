package main

import (
	"strings"

	"github.com/spf13/cobra"

	"hikae/cmd/hikae/internal/app"
)

// Groups of verbs, in the order of help.
const (
	groupSetup  = "setup"
	groupBackup = "backup"
	groupLook   = "look"
	groupBack   = "back"
	groupKeep   = "keep"
	groupDaemon = "daemon"
)

// newRoot puts the verbs together.
func newRoot(a *app.App) *cobra.Command {
	root := &cobra.Command{
		Use:   "hikae",
		Short: "back up VMs of ESXi hosts into an encrypted, deduplicated repository",
		Long: `hikae backs up virtual machines of VMware ESXi hosts into an encrypted,
deduplicated repository, and gives them back: as a folder of ordinary files,
as copies, as VMs on a host.

A VM is written HOST/VM, one of its generations HOST/VM@GENERATION, where
GENERATION is a time as shown, the beginning of one, a sequence number, or
latest.`,
		Args:          cobra.NoArgs,
		SilenceErrors: true,
		SilenceUsage:  true,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	// The order of verbs in help is that of the road, not of the alphabet.
	cobra.EnableCommandSorting = false
	root.SetOut(a.UI.Out)
	root.SetErr(a.UI.Err)
	root.AddGroup(
		&cobra.Group{ID: groupSetup, Title: "To begin:"},
		&cobra.Group{ID: groupBackup, Title: "To make copies:"},
		&cobra.Group{ID: groupLook, Title: "To look at them:"},
		&cobra.Group{ID: groupBack, Title: "To have them back:"},
		&cobra.Group{ID: groupKeep, Title: "To let them go:"},
		&cobra.Group{ID: groupDaemon, Title: "To have it done by itself:"},
	)
	f := root.PersistentFlags()
	f.StringVar(&a.Flags.Repo, "repo", "", "the repository: a directory, or a name from the configuration (HIKAE_REPO)")
	f.StringVar(&a.Flags.PassphraseFile, "passphrase-file", "", "file with the repository's passphrase (HIKAE_PASSPHRASE_FILE)")
	f.StringVar(&a.Flags.KeyFile, "key-file", "", "key file that opens the repository instead of a passphrase (HIKAE_KEY_FILE)")
	f.StringVar(&a.Flags.Config, "config", "", "configuration file (default ~/.config/hikae/hikae.toml, then /etc/hikae/hikae.toml)")
	f.StringVar(&a.Flags.State, "state", "", "directory for what hikae remembers between runs (default ~/.local/state/hikae, as root /var/lib/hikae)")
	f.BoolVarP(&a.UI.Quiet, "quiet", "q", false, "no progress and no messages, only warnings and errors")
	f.BoolVarP(&a.Flags.Verbose, "verbose", "v", false, "say what is done in detail")

	add := func(group string, cmds ...*cobra.Command) {
		for _, c := range cmds {
			c.GroupID = group
			root.AddCommand(c)
		}
	}
	add(groupSetup, newInit(a), newKey(a), newHost(a), newVMs(a), newCBT(a))
	add(groupBackup, newBackup(a), newImport(a))
	add(groupLook, newGenerations(a), newShow(a), newStats(a), newCheck(a), newRepair(a), newVerify(a))
	add(groupKeep, newForget(a), newPrune(a), newHold(a), newRelease(a))
	add(groupBack, newMount(a), newUmount(a), newCopy(a), newRestore(a))
	add(groupDaemon, newDaemon(a), newConfig(a), newJobs(a), newStatus(a), newRun(a), newCancel(a), newHistory(a), newLog(a))
	root.AddCommand(newVersion(a))
	root.AddCommand(topics()...)
	return root
}

// jsonFlag gives a verb that prints data its --json.
func jsonFlag(a *app.App, cmd *cobra.Command) {
	cmd.Flags().BoolVar(&a.UI.JSON, "json", false, "print one JSON object per line")
}

// onRun calls begun when a verb begins its work. Until then everything that goes
// wrong is the command line's fault: unknown verbs and flags, missing flags, too
// many arguments.
func onRun(cmd *cobra.Command, begun func()) {
	if run := cmd.RunE; run != nil {
		cmd.RunE = func(c *cobra.Command, args []string) error {
			begun()
			return run(c, args)
		}
	}
	for _, c := range cmd.Commands() {
		onRun(c, begun)
	}
}

// topics are helps that belong to no verb.
func topics() []*cobra.Command {
	return []*cobra.Command{
		{
			Use:   "exit-codes",
			Short: "what the exit codes mean",
			Long: "hikae ends with one of these codes. A code never changes its meaning." +
				exitCodes(exitPassphrase, exitNotFound, exitDamaged, exitHost, exitNoRoom, exitSomeFailed, exitUnsound, exitNoDaemon, exitNoJob),
		},
		{
			Use:   "configuration",
			Short: "the configuration file and the environment",
			Long: strings.TrimSpace(`
The configuration is ~/.config/hikae/hikae.toml, or when there is none
/etc/hikae/hikae.toml, or the file given with --config:

  [[repository]]
  name = "main"
  path = "/mnt/nas/hikae"
  passphrase_file = "/etc/hikae/passphrase"      # or passphrase_command = "…",
                                                 # or key_file = "…"

  [[host]]
  name = "esx1"
  address = "192.0.2.7"                          # HOST or HOST:PORT
  user = "root"
  password_file = "/etc/hikae/esx1.password"     # or password_command = "…"
  thumbprint = "9F:2B:…"                         # SHA-256 of the certificate
  ssh = "192.0.2.7"                              # HOST or HOST:PORT; not needed
                                                 # where the licence allows changes
  ssh_fingerprint = "SHA256:…"                   # of the host's SSH key
  ssh_key_file = "/etc/hikae/esx1.key"           # or the password logs in; also
                                                 # ssh_key_passphrase_file/_command

  [[job]]                                        # for hikae daemon
  name = "nightly"
  vms = ["esx1/*", "!esx1/scratch*"]             # kind = "prune" or "check": none
  schedule = "daily 02:00"                       # every 6h; weekly sun 03:00;
                                                 # monthly last sun 03:00; after
                                                 # JOB; manual; a cron line; a list
  timezone = "Europe/Berlin"
  keep = { last = 4, daily = 14, monthly = 12 }
  window = "22:00-06:00"                         # also window_end, repository,
                                                 # quiesce, compression, rate_limit,
                                                 # retries, timeout, no_success_for,
                                                 # check, prune: contrib/hikae.toml

  [daemon]
  metrics = "127.0.0.1:9321"                     # also socket, state, per_host,
                                                 # total

hikae host add and hikae host remove write and cut [[host]] blocks and leave
the rest of the file as it is. Paths may begin with ~/; other relative ones
start at the file's directory. An unknown key is an error. A passphrase or
password is one line, in a file that only its owner can read, or what a
command prints (run by /bin/sh).

Flags come first, then the environment, then the file:

  HIKAE_REPO              the repository, as --repo
  HIKAE_PASSPHRASE_FILE   file with its passphrase, as --passphrase-file
  HIKAE_KEY_FILE          its key file, as --key-file
  XDG_CONFIG_HOME         instead of ~/.config
  XDG_STATE_HOME          instead of ~/.local/state`),
		},
	}
}
