package main

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/api"
	"github.com/spf13/cobra"
)

func newImageInspect(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:               "inspect NAME...",
		Short:             "Say all that is known of images; with --json as a list",
		Args:              needs(true, "NAME"),
		ValidArgsFunction: c.completeImages,
		RunE: c.withServer(func(ctx context.Context, client *api.Client, args []string) error {
			var details []*shed.ImageDetail
			err := each(c, args, func(name string) error {
				detail, err := client.InspectImage(ctx, name)
				if err != nil {
					return err
				}
				details = append(details, detail)
				return nil
			})
			if c.json {
				if err != nil {
					return err
				}
				return c.printJSON(details)
			}
			for i, detail := range details {
				if i > 0 {
					fmt.Fprintln(c.out)
				}
				if perr := c.printDetail(detail); perr != nil {
					return perr
				}
			}
			return err
		}),
	}
}

// printDetail writes a block of "Key: value" lines; what an image doesn't say is left out.
func (c *cli) printDetail(d *shed.ImageDetail) error {
	w := tabwriter.NewWriter(c.out, 0, 0, 2, ' ', 0)
	field := func(key string, values ...string) {
		for _, value := range values {
			if value != "" {
				fmt.Fprintf(w, "%s\t%s\n", key, oneLine(value))
				key = ""
			}
		}
	}
	created := ""
	if !d.CreatedAt.IsZero() {
		created = fmt.Sprintf("%s (%s)", d.CreatedAt.UTC().Format(time.RFC3339), ago(d.CreatedAt))
	}
	var labels []string
	for _, key := range slices.Sorted(maps.Keys(d.Config.Labels)) {
		labels = append(labels, key+"="+d.Config.Labels[key])
	}
	var layers []string
	for _, l := range d.Layers {
		line := l.Digest + " " + byteSize(l.Size)
		if l.BlockImage > 0 {
			line += ", " + byteSize(l.BlockImage) + " on disk to boot from"
		}
		layers = append(layers, line)
	}
	field("Ref:", d.Ref)
	field("Digest:", d.Digest)
	field("Media type:", d.MediaType)
	field("Problem:", d.Problem)
	field("Source:", string(d.Source))
	field("Platform:", d.Platform)
	field("Size:", byteSize(d.Size))
	field("In use:", strings.Join(d.InUse, ", "))
	field("Created:", created)
	field("User:", d.Config.User)
	field("Directory:", d.Config.WorkingDir)
	field("Entrypoint:", argv(d.Config.Entrypoint))
	field("Command:", argv(d.Config.Cmd))
	field("Ports:", strings.Join(d.Config.ExposedPorts, ", "))
	field("Env:", d.Config.Env...)
	field("Labels:", labels...)
	field("Layers:", layers...)
	return w.Flush()
}

// argv shows where each argument begins and ends.
func argv(args []string) string {
	if len(args) == 0 {
		return ""
	}
	b, err := json.Marshal(args)
	if err != nil {
		return strings.Join(args, " ")
	}
	return string(b)
}

func newImageHistory(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:               "history NAME",
		Short:             "List the steps an image was made in, newest first",
		Args:              needs(false, "NAME"),
		ValidArgsFunction: c.completeImages,
		RunE: c.withServer(func(ctx context.Context, client *api.Client, args []string) error {
			detail, err := client.InspectImage(ctx, args[0])
			if err != nil {
				return err
			}
			slices.Reverse(detail.History)
			if c.json {
				return c.printJSON(detail.History)
			}
			return c.printHistory(detail.History)
		}),
	}
}

func (c *cli) printHistory(history []shed.ImageHistory) error {
	const createdBy = 1
	header := []string{"CREATED", "CREATED BY", "SIZE", "ON DISK", "COMMENT"}
	var rows [][]string
	for _, h := range history {
		size, disk := byteSize(0), ""
		if h.Layer != nil {
			size = byteSize(h.Layer.Size)
			if h.Layer.BlockImage > 0 {
				disk = byteSize(h.Layer.BlockImage)
			}
		}
		rows = append(rows, []string{ago(h.CreatedAt), oneLine(h.CreatedBy), size, disk, oneLine(h.Comment)})
	}
	return c.printFitted(header, rows, createdBy)
}
