package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"text/tabwriter"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/api"
	"github.com/dustin/go-humanize"
	"github.com/mattn/go-runewidth"
	"github.com/spf13/cobra"
	"golang.org/x/term"
)

func newList(c *cli) *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls", "ps"},
		Short:   "List sheds",
		Args:    noArgs,
	}
	cmd.PreRunE = func(cmd *cobra.Command, _ []string) error {
		if all && c.server != "" {
			return usageError(cmd, "--all means all servers, and --server one of them")
		}
		return nil
	}
	cmd.RunE = c.action(func(ctx context.Context, _ []string) error {
		if all {
			return c.listAll(ctx)
		}
		client, err := c.connect()
		if err != nil {
			return err
		}
		sheds, err := client.List(ctx)
		if err != nil {
			return err
		}
		if c.json {
			return c.printJSON(sheds)
		}
		if err := c.printTable(listHeader, rows(sheds)); err != nil {
			return err
		}
		if len(sheds) == 0 {
			c.message("%s", noSheds)
		}
		c.printReasons(sheds, "")
		return nil
	})
	cmd.Flags().BoolVarP(&all, "all", "a", false, "of all servers")
	return cmd
}

const noSheds = "There are no sheds. Create one with: shed create NAME"

var listHeader = []string{"NAME", "BACKEND", "STATUS", "IMAGE", "CPU/MEM", "DISK", "CREATED"}

func rows(sheds []*shed.Shed) [][]string {
	rows := make([][]string, 0, len(sheds))
	for _, sh := range sheds {
		rows = append(rows, []string{
			sh.Name, sh.Backend, string(sh.Status), sh.Image, fmt.Sprintf("%d/%s", sh.CPUs, memory(sh.MemoryMB)),
			byteSize(sh.DiskUsed), humanize.Time(sh.CreatedAt),
		})
	}
	return rows
}

// printReasons says why sheds are as they are. prefix stands before their names.
func (c *cli) printReasons(sheds []*shed.Shed, prefix string) {
	for _, sh := range sheds {
		if sh.Reason != "" {
			c.message("%s%s is %s: %s", prefix, sh.Name, sh.Status, sh.Reason)
		}
	}
}

// shedOf is a shed with the name of its server.
type shedOf struct {
	Server string `json:"server"`
	*shed.Shed
}

// offline is a server that gave no answer.
type offline struct {
	Server string      `json:"server"`
	Error  *shed.Error `json:"error"`
}

func newOffline(server string, err error) offline { return offline{server, errorDoc(err)} }

// listAll lists the sheds of all servers. One that is offline is a row too; it is no error.
func (c *cli) listAll(ctx context.Context) error {
	servers, err := c.servers()
	if err != nil {
		return err
	}
	answers, err := onAll(ctx, c, func(ctx context.Context, server string, _ *api.Client) ([]*shed.Shed, error) {
		return servers.List(ctx, server)
	})
	if err != nil {
		return err
	}
	if c.json {
		doc := struct {
			Sheds   []shedOf  `json:"sheds"`
			Offline []offline `json:"offline"`
		}{[]shedOf{}, []offline{}}
		for _, a := range answers {
			if a.err != nil {
				doc.Offline = append(doc.Offline, newOffline(a.server, a.err))
			}
			for _, sh := range a.value {
				doc.Sheds = append(doc.Sheds, shedOf{a.server, sh})
			}
		}
		return c.printJSON(doc)
	}
	var table [][]string
	empty := true
	for _, a := range answers {
		if a.err != nil {
			table = append(table, []string{"", a.server, "", statusOffline, "", "", "", ""})
		}
		for _, row := range rows(a.value) {
			empty = false
			table = append(table, append([]string{row[0], a.server}, row[1:]...))
		}
	}
	slices.SortStableFunc(table, func(a, b []string) int {
		if (a[0] == "") != (b[0] == "") { // servers that are offline come last
			return cmp.Compare(b[0], a[0])
		}
		return cmp.Compare(a[0], b[0])
	})
	if err := c.printTable(append([]string{"NAME", "SERVER"}, listHeader[1:]...), table); err != nil {
		return err
	}
	if empty {
		c.message("%s", noSheds)
	}
	for _, a := range answers {
		c.printReasons(a.value, a.server+"/")
		c.printOffline(a.server, a.err)
	}
	return nil
}

const statusOffline = "offline"

// printOffline says why a server is offline, if err isn't nil.
func (c *cli) printOffline(server string, err error) {
	if err == nil {
		return
	}
	c.message("%s is offline: %s", server, err)
	c.printHint(err)
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

// printFitted is printTable with one column cut to what a terminal has room for.
func (c *cli) printFitted(header []string, rows [][]string, column int) error {
	if fd, tty := terminal(c.out); tty {
		if width, _, err := term.GetSize(fd); err == nil {
			fitColumn(header, rows, column, width)
		}
	}
	return c.printTable(header, rows)
}

// fitColumn cuts a column of a table to what the others leave of width, if that is of any use.
func fitColumn(header []string, rows [][]string, column, width int) {
	left := width
	for i := range header {
		if i == column {
			continue
		}
		widest := runewidth.StringWidth(header[i])
		for _, row := range rows {
			widest = max(widest, runewidth.StringWidth(row[i]))
		}
		left -= widest
	}
	left -= 3 * (len(header) - 1)
	for _, row := range rows {
		row[column] = truncate(row[column], max(left, 20))
	}
}
