package main

import (
	"context"
	"fmt"
	"text/tabwriter"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/api"
	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"
)

func newList(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List sheds",
		Args:    noArgs,
		RunE: c.withServer(func(ctx context.Context, client *api.Client, _ []string) error {
			sheds, err := client.List(ctx)
			if err != nil {
				return err
			}
			if c.json {
				return c.printJSON(sheds)
			}
			return c.printSheds(sheds)
		}),
	}
}

func (c *cli) printSheds(sheds []*shed.Shed) error {
	rows := make([][]string, 0, len(sheds))
	for _, sh := range sheds {
		rows = append(rows, []string{
			sh.Name, sh.Backend, string(sh.Status), sh.Image, fmt.Sprintf("%d/%s", sh.CPUs, memory(sh.MemoryMB)),
			byteSize(sh.DiskUsed), humanize.Time(sh.CreatedAt),
		})
	}
	if err := c.printTable([]string{"NAME", "BACKEND", "STATUS", "IMAGE", "CPU/MEM", "DISK", "CREATED"}, rows); err != nil {
		return err
	}
	if len(sheds) == 0 {
		c.message("There are no sheds. Create one with: shed create NAME")
	}
	for _, sh := range sheds {
		if sh.Reason != "" {
			c.message("%s is %s: %s", sh.Name, sh.Status, sh.Reason)
		}
	}
	return nil
}

func memory(mb int) string {
	if mb >= 1024 && mb%1024 == 0 {
		return fmt.Sprintf("%dG", mb/1024)
	}
	return fmt.Sprintf("%dM", mb)
}

// printTable writes aligned columns to stdout. An empty cell is a dash, so
// that columns can be counted.
func (c *cli) printTable(header []string, rows [][]string) error {
	w := tabwriter.NewWriter(c.out, 0, 0, 3, ' ', 0)
	for _, row := range append([][]string{header}, rows...) {
		for i, cell := range row {
			if cell == "" {
				cell = "-"
			}
			if i > 0 {
				fmt.Fprint(w, "\t")
			}
			fmt.Fprint(w, printable(cell))
		}
		fmt.Fprintln(w)
	}
	return w.Flush()
}
