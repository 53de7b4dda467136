package main

import (
	"bufio"
	"context"
	"fmt"
	"strings"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/api"
	"github.com/spf13/cobra"
)

func newDelete(c *cli) *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:               "delete NAME...",
		Short:             "Delete sheds and all that was written in them",
		Args:              needs(true, "NAME"),
		ValidArgsFunction: c.completeNames,
	}
	cmd.RunE = c.action(func(ctx context.Context, args []string) error {
		if err := c.confirm(cmd, force, "Delete", args); err != nil {
			return err
		}
		deleted := []string{}
		err := c.each(args, func(client *api.Client, name string) error {
			report, end := c.progress("delete " + name)
			err := client.Delete(ctx, name, report)
			end()
			if err != nil {
				return err
			}
			deleted = append(deleted, name)
			if !c.json {
				_, err = fmt.Fprintln(c.out, name)
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

// confirm asks whether to do what can't be undone to the sheds in refs. It
// returns an error where the answer isn't yes, or nobody can be asked.
func (c *cli) confirm(cmd *cobra.Command, force bool, what string, refs []string) error {
	if force {
		return nil
	}
	_, canRead := terminal(c.in)
	_, canAsk := terminal(c.err)
	if c.json || !canRead || !canAsk {
		return shed.Errorf(shed.CodeInvalid, "%s needs --force where it can't ask", cmd.CommandPath()).
			WithHint("what was written in %s will be lost", strings.Join(refs, ", "))
	}
	fmt.Fprintf(c.err, "%s %s? What was written there is lost. [y/N] ", what, printable(strings.Join(refs, ", ")))
	answer, err := bufio.NewReader(c.in).ReadString('\n')
	if err != nil && answer == "" {
		return fmt.Errorf("the answer can't be read: %w", err)
	}
	switch strings.ToLower(strings.TrimSpace(answer)) {
	case "y", "yes":
		return nil
	}
	c.message("nothing was done")
	return exitStatus(exitError)
}
