package main

import (
	"context"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/api"
	"github.com/spf13/cobra"
)

func newStop(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:               "stop NAME...",
		Short:             "Shut sheds down",
		Args:              needs(true, "NAME"),
		ValidArgsFunction: c.completeNames,
		RunE: c.action(func(ctx context.Context, args []string) error {
			return c.change("stop", args, func(client *api.Client, name string, p shed.Progress) (*shed.Shed, error) {
				return client.Stop(ctx, name, p)
			})
		}),
	}
}
