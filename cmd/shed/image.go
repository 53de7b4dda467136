package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"
)

func newImage(c *cli) *cobra.Command {
	cmd := &cobra.Command{Use: "image", Short: "Build and list images"}
	asGroup(cmd)
	cmd.AddCommand(newImageBuild(c), newImageList(c))
	return cmd
}

func newImageBuild(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:     "build PRESET",
		Short:   "Build an image from a preset, such as base",
		Args:    needs(false, "PRESET"),
		Example: "  shed image build base",
		RunE: c.action(func(ctx context.Context, args []string) error {
			client, err := c.connect("")
			if err != nil {
				return err
			}
			report, end := c.progress("build " + args[0])
			img, err := client.BuildPreset(ctx, args[0], report)
			end()
			if err != nil {
				return err
			}
			if c.json {
				return c.printJSON(img)
			}
			c.message("built %s, %s", img.Digest, humanize.IBytes(uint64(max(img.Size, 0))))
			_, err = fmt.Fprintln(c.out, img.Ref)
			return err
		}),
	}
}

func newImageList(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   "List images",
		Args:    noArgs,
		RunE: c.action(func(ctx context.Context, _ []string) error {
			client, err := c.connect("")
			if err != nil {
				return err
			}
			images, err := client.Images(ctx)
			if err != nil {
				return err
			}
			if c.json {
				return c.printJSON(images)
			}
			rows := make([][]string, 0, len(images))
			for _, img := range images {
				rows = append(rows, []string{
					img.Ref, shortDigest(img.Digest), fmt.Sprint(len(img.Layers)), humanize.IBytes(uint64(max(img.Size, 0))),
					strings.Join(img.InUse, ","), humanize.Time(img.CreatedAt),
				})
			}
			if err := c.printTable([]string{"IMAGE", "DIGEST", "LAYERS", "SIZE", "USED BY", "CREATED"}, rows); err != nil {
				return err
			}
			if len(images) == 0 {
				c.message("There are no images. Build one with: shed image build base")
			}
			return nil
		}),
	}
}

// shortDigest keeps what people need to tell digests apart.
func shortDigest(digest string) string {
	const short = len("sha256:") + 12
	return digest[:min(len(digest), short)]
}
