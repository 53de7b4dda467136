package main

import (
	"context"
	"strings"

	"github.com/charliek/shed"
	"github.com/spf13/cobra"
)

func newExec(c *cli) *cobra.Command {
	var command shed.Command
	var tty, interactive bool
	cmd := &cobra.Command{
		Use:   "exec [flags] NAME [--] CMD...",
		Short: "Run a command in a shed",
		Long: `Run a command in a shed, which is started if it is stopped.

The arguments reach the command as they are: no shell splits or expands them.
Flags for shed come before NAME. Stdin is passed on where it is no terminal,
or with -i. The exit code is the command's own, 128+N where signal N ended it,
2 where the command line is wrong, and 255 where shed itself failed.`,
		Example: `  shed exec web ls -la
  shed exec -t web htop
  shed exec web sh -c 'echo $HOME' < /dev/null`,
		Args:                  needs(true, "NAME", "CMD"),
		DisableFlagsInUseLine: true,
		ValidArgsFunction:     c.completeNames,
	}
	cmd.PreRunE = func(cmd *cobra.Command, args []string) error {
		if args[1] == "--" && len(args) == 2 {
			return usageError(cmd, "%s needs CMD", cmd.CommandPath())
		}
		if args[1] != "--" && strings.HasPrefix(args[1], "-") {
			return usageError(cmd, "%q comes after NAME, where the command begins: flags for shed come before NAME", args[1])
		}
		for _, kv := range command.Env {
			if k, _, ok := strings.Cut(kv, "="); !ok || k == "" {
				return usageError(cmd, "-e %q is not of the form K=V", kv)
			}
		}
		return refuseJSON(c, cmd, "stdout is the command's")
	}
	cmd.RunE = c.action(func(ctx context.Context, args []string) error {
		c.failure = exitExec
		command.Args = args[1:]
		if command.Args[0] == "--" {
			command.Args = command.Args[1:]
		}
		return c.runCommand(ctx, args[0], command, tty, interactive)
	})
	f := cmd.Flags()
	f.SetInterspersed(false)
	f.BoolVarP(&tty, "tty", "t", false, "run it in a terminal")
	f.BoolVarP(&interactive, "interactive", "i", false, "pass on stdin even if it is a terminal")
	f.StringVarP(&command.Dir, "workdir", "w", "", "`directory` to run it in (default: the shed's workspace)")
	f.StringArrayVarP(&command.Env, "env", "e", nil, "set a variable, as `K=V` (repeatable)")
	f.StringVarP(&command.User, "user", "u", "", "name or UID of the `user` to run it as (default shed)")
	return cmd
}
