package main

import (
	"context"

	"github.com/charliek/shed"
	"github.com/spf13/cobra"
)

func newStart(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:               "start NAME...",
		Short:             "Start stopped sheds",
		Args:              needs(true, "NAME"),
		ValidArgsFunction: c.completeNames,
		RunE: c.action(func(ctx context.Context, args []string) error {
			targets, err := c.targets(ctx, args)
			if err != nil {
				return err
			}
			return c.change("start", targets, func(t target, p shed.Progress) (*shed.Shed, error) {
				return t.client.Start(ctx, t.name, p)
			})
		}),
	}
}

// change runs f, the operation called verb, on all targets, and prints what became of them.
func (c *cli) change(verb string, targets []target, f func(t target, p shed.Progress) (*shed.Shed, error)) error {
	var sheds []*shed.Shed
	err := each(c, targets, func(t target) error {
		report, end := c.progress(verb + " " + t.name)
		sh, err := f(t, report)
		end()
		if err != nil {
			return err
		}
		sheds = append(sheds, sh)
		if !c.json {
			err = c.printLine(t.name)
		}
		return err
	})
	if err == nil && c.json {
		err = c.printJSON(sheds)
	}
	return err
}
