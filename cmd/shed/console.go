package main

import (
	"context"

	"github.com/charliek/shed"
	"github.com/spf13/cobra"
)

func newConsole(c *cli) *cobra.Command {
	cmd := &cobra.Command{
		Use:               "console NAME",
		Short:             "Open a login shell in a shed",
		Long:              "Open a login shell in a shed, which is started if it is stopped.\nThe shell ends with the connection. The exit code is its own, and 255 where shed itself failed.",
		Args:              needs(false, "NAME"),
		ValidArgsFunction: c.completeNames,
	}
	cmd.PreRunE = func(cmd *cobra.Command, args []string) error {
		return c.needsTerminal(cmd, args[0])
	}
	cmd.RunE = c.action(func(ctx context.Context, args []string) error {
		c.failure = exitExec
		return c.runCommand(ctx, args[0], shed.Command{Login: true}, true, true)
	})
	return cmd
}
