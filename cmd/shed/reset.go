package main

import (
	"context"

	"github.com/charliek/shed"
	"github.com/spf13/cobra"
)

func newReset(c *cli) *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:               "reset NAME...",
		Short:             "Wipe the disks of stopped sheds",
		Long:              "Wipe the disks of stopped sheds: all that was written in them is lost.\nTheir names, images and sizes stay. They boot with the server's current kernel from then on.",
		Args:              needs(true, "NAME"),
		ValidArgsFunction: c.completeNames,
	}
	cmd.PreRunE = func(cmd *cobra.Command, args []string) error { return c.canConfirm(cmd, force, args) }
	cmd.RunE = c.action(func(ctx context.Context, args []string) error {
		targets, err := c.targets(ctx, args)
		if err != nil {
			return err
		}
		if err := c.confirm(force, "Wipe the disk of", args); err != nil {
			return err
		}
		return c.change("reset", targets, func(t target, _ shed.Progress) (*shed.Shed, error) {
			return t.client.Reset(ctx, t.name)
		})
	})
	cmd.Flags().BoolVarP(&force, "force", "f", false, "don't ask")
	return cmd
}
