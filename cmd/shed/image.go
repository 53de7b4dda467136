package main

import (
	"context"
	"strings"
	"time"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/api"
	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"
)

func newImage(c *cli) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "image",
		Short: "Build, move, inspect and remove images",
		Long: `Build, move, inspect and remove images.

NAME is a tag, a digest, or at least 12 digits of one.`,
	}
	asGroup(cmd)
	cmd.AddCommand(
		newImageBuild(c), newImageList(c), newImageInspect(c), newImageHistory(c), newImagePull(c), newImagePush(c),
		newImageSave(c), newImageLoad(c), newImageTag(c), newImageRemove(c), newImagePrune(c),
	)
	return cmd
}

func newImageList(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   "List images",
		Args:    noArgs,
		RunE: c.withServer(func(ctx context.Context, client *api.Client, _ []string) error {
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
					img.Ref, shortDigest(img.Digest), string(img.Source), byteSize(img.Size),
					strings.Join(img.InUse, ","), ago(img.CreatedAt),
				})
			}
			if err := c.printTable([]string{"REF", "DIGEST", "SOURCE", "SIZE", "IN USE", "CREATED"}, rows); err != nil {
				return err
			}
			if len(images) == 0 {
				c.message("There are no images. Build one with: shed image build base")
			}
			for _, img := range images {
				if img.Problem != "" {
					c.message("image %s: %s", imageName(img), img.Problem)
				}
			}
			return nil
		}),
	}
}

// printImage prints what an operation has made or got.
func (c *cli) printImage(img *shed.Image, what string) error {
	if c.json {
		return c.printJSON(img)
	}
	c.message("%s %s, %s", what, img.Digest, byteSize(img.Size))
	return c.printLine(imageName(img))
}

// imageName returns the name that img is called by.
func imageName(img *shed.Image) string {
	if img.Ref == "" {
		return img.Digest
	}
	return img.Ref
}

func byteSize(n int64) string { return humanize.IBytes(uint64(max(n, 0))) }

// ago says how long ago t was, if it is known.
func ago(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return humanize.Time(t)
}

// shortDigest keeps what people need to tell digests apart.
func shortDigest(digest string) string {
	const short = len("sha256:") + 12
	return digest[:min(len(digest), short)]
}
