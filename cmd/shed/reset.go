package main

import (
	"context"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/api"
	"github.com/spf13/cobra"
)

func newReset(c *cli) *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:               "reset NAME...",
		Short:             "Wipe the disks of stopped sheds",
		Long:              "Wipe the disks of stopped sheds: all that was written in them is lost.\nTheir names, images and mounts stay.",
		Args:              needs(true, "NAME"),
		ValidArgsFunction: c.completeNames,
	}
	cmd.RunE = c.action(func(ctx context.Context, args []string) error {
		if err := c.confirm(cmd, force, "Wipe the disk of", args); err != nil {
			return err
		}
		return c.change("reset", args, func(client *api.Client, name string, _ shed.Progress) (*shed.Shed, error) {
			return client.Reset(ctx, name)
		})
	})
	cmd.Flags().BoolVarP(&force, "force", "f", false, "don't ask")
	return cmd
}
