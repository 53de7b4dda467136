package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
)

func newDelete(c *cli) *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:               "delete NAME...",
		Aliases:           []string{"rm"},
		Short:             "Delete sheds and all that was written in them",
		Long:              "Delete sheds and all that was written in them, which can't be undone.\nThose that run are ended first.",
		Args:              needs(true, "NAME"),
		ValidArgsFunction: c.completeNames,
	}
	cmd.PreRunE = func(cmd *cobra.Command, args []string) error { return c.canConfirm(cmd, force, args) }
	cmd.RunE = c.action(func(ctx context.Context, args []string) error {
		targets, err := c.targets(ctx, args)
		if err != nil {
			return err
		}
		if err := c.confirm(force, "Delete", args); err != nil {
			return err
		}
		deleted := []string{}
		err = each(c, targets, func(t target) error {
			report, end := c.progress("delete " + t.name)
			err := t.client.Delete(ctx, t.name, report)
			end()
			if err != nil {
				return err
			}
			c.updateSSHConfig(ctx, t, true)
			deleted = append(deleted, t.name)
			if !c.json {
				err = c.printLine(t.name)
			}
			return err
		})
		if err == nil && c.json {
			err = c.printJSON(struct {
				Deleted []string `json:"deleted"`
			}{deleted})
		}
		return err
	})
	cmd.Flags().BoolVarP(&force, "force", "f", false, "don't ask")
	return cmd
}

// canConfirm returns an error if nobody can be asked whether to do what can't be undone to the sheds in refs.
func (c *cli) canConfirm(cmd *cobra.Command, force bool, refs []string) error {
	return c.canAsk(cmd, force, fmt.Sprintf("what was written in %s will be lost", strings.Join(refs, ", ")))
}

// confirm asks whether to do that. It returns an error unless the answer is yes.
func (c *cli) confirm(force bool, what string, refs []string) error {
	return c.ask(force, fmt.Sprintf("%s %s? What was written there is lost.", what, strings.Join(refs, ", ")))
}
