package main

import (
	"context"
	"errors"
	"io"

	"github.com/spf13/cobra"
)

func newLogs(c *cli) *cobra.Command {
	var follow bool
	cmd := &cobra.Command{
		Use:               "logs NAME",
		Short:             "Show the console and provisioning output of a shed",
		Args:              needs(false, "NAME"),
		ValidArgsFunction: c.completeNames,
	}
	cmd.RunE = c.action(func(ctx context.Context, args []string) error {
		if follow {
			if err := refuseJSON(c, cmd, "a log that goes on is no document"); err != nil {
				return err
			}
		}
		t, err := c.resolve(ctx, args[0])
		if err != nil {
			return err
		}
		logs, err := t.client.Logs(ctx, t.name, follow)
		if err != nil {
			return err
		}
		defer logs.Close()
		if c.json {
			text, err := io.ReadAll(logs)
			if err != nil {
				return err
			}
			return c.printJSON(struct {
				Name string `json:"name"`
				Logs string `json:"logs"`
			}{t.name, string(text)})
		}
		_, err = io.CopyBuffer(c.out, logs, make([]byte, copyBuffer))
		if follow && errors.Is(err, context.Canceled) {
			return nil // that is how following ends
		}
		return err
	})
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on with what comes")
	return cmd
}
