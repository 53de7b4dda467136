package main

import (
	"context"
	"fmt"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/api"
	"github.com/spf13/cobra"
)

func newStart(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:               "start NAME...",
		Short:             "Start stopped sheds",
		Args:              needs(true, "NAME"),
		ValidArgsFunction: c.completeNames,
		RunE: c.action(func(ctx context.Context, args []string) error {
			return c.change("start", args, func(client *api.Client, name string, p shed.Progress) (*shed.Shed, error) {
				return client.Start(ctx, name, p)
			})
		}),
	}
}

// change runs f, the operation called verb, on every shed in refs, and prints what became of them.
func (c *cli) change(verb string, refs []string, f func(client *api.Client, name string, p shed.Progress) (*shed.Shed, error)) error {
	var sheds []*shed.Shed
	err := c.each(refs, func(client *api.Client, name string) error {
		report, end := c.progress(verb + " " + name)
		sh, err := f(client, name, report)
		end()
		if err != nil {
			return err
		}
		sheds = append(sheds, sh)
		if !c.json {
			_, err = fmt.Fprintln(c.out, name)
		}
		return err
	})
	if err == nil && c.json {
		err = c.printJSON(sheds)
	}
	return err
}
