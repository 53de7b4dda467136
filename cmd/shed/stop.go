package main

import (
	"context"

	"github.com/charliek/shed"
	"github.com/spf13/cobra"
)

func newStop(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:               "stop NAME...",
		Short:             "Shut sheds down",
		Long:              "Shut sheds down. What was written in them is kept.\nOne that does not end cleanly within 90 seconds is ended by force.",
		Args:              needs(true, "NAME"),
		ValidArgsFunction: c.completeNames,
		RunE: c.action(func(ctx context.Context, args []string) error {
			targets, err := c.targets(ctx, args)
			if err != nil {
				return err
			}
			return c.change("stop", targets, func(t target, p shed.Progress) (*shed.Shed, error) {
				return t.client.Stop(ctx, t.name, p)
			})
		}),
	}
}
