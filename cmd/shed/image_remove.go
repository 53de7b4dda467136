package main

import (
	"context"
	"strings"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/api"
	"github.com/spf13/cobra"
)

func newImageRemove(c *cli) *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:     "rm NAME...",
		Aliases: []string{"delete"},
		Short:   "Remove tags or, given digests, images with all their tags",
		Long: `Remove tags or, given digests, images with all their tags. What no other image
needs goes with them.

Images that sheds use stay. With --force they lose their tags, and the rest of
them goes with the last shed and a prune.`,
		Args:              needs(true, "NAME"),
		ValidArgsFunction: c.completeImages,
	}
	cmd.PreRunE = func(cmd *cobra.Command, args []string) error {
		return c.canAsk(cmd, force, "that would remove "+strings.Join(args, ", "))
	}
	cmd.RunE = c.withServer(func(ctx context.Context, client *api.Client, args []string) error {
		err := each(c, args, func(name string) error {
			_, err := client.InspectImage(ctx, name)
			return err
		})
		if err != nil {
			return err
		}
		if err := c.ask(force, "Remove "+strings.Join(args, ", ")+"?"); err != nil {
			return err
		}
		removed := &shed.Removed{Items: []shed.RemovedItem{}}
		err = each(c, args, func(name string) error {
			r, err := client.RemoveImage(ctx, name, force)
			if err != nil {
				return err
			}
			removed.Items = append(removed.Items, r.Items...)
			removed.Freed += r.Freed
			return nil
		})
		if c.json {
			if err != nil {
				return err
			}
			return c.printJSON(removed)
		}
		if len(removed.Items) > 0 {
			if perr := c.printRemoved(removed); perr != nil {
				return perr
			}
			c.message("freed %s", byteSize(removed.Freed))
		}
		return err
	})
	cmd.Flags().BoolVarP(&force, "force", "f", false, "don't ask, and untag what sheds use too")
	return cmd
}

func newImagePrune(c *cli) *cobra.Command {
	var force, dryRun bool
	cmd := &cobra.Command{
		Use:   "prune",
		Short: "Remove what no tag and no shed needs",
		Args:  noArgs,
	}
	cmd.PreRunE = func(cmd *cobra.Command, _ []string) error {
		return c.canAsk(cmd, force || dryRun, "see what would go with --dry-run")
	}
	cmd.RunE = c.withServer(func(ctx context.Context, client *api.Client, _ []string) error {
		removed, err := client.PruneImages(ctx, dryRun || !force)
		if err != nil {
			return err
		}
		if c.json {
			return c.printJSON(removed)
		}
		if len(removed.Items) == 0 {
			c.message("there is nothing to prune")
			return nil
		}
		if err := c.printRemoved(removed); err != nil {
			return err
		}
		if dryRun {
			c.message("that would free %s", byteSize(removed.Freed))
			return nil
		}
		if !force {
			if err := c.ask(false, "Remove all that and free "+byteSize(removed.Freed)+"?"); err != nil {
				return err
			}
			if removed, err = client.PruneImages(ctx, false); err != nil {
				return err
			}
		}
		c.message("freed %s", byteSize(removed.Freed))
		return nil
	})
	cmd.Flags().BoolVarP(&force, "force", "f", false, "don't ask")
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "only say what would go")
	return cmd
}

func (c *cli) printRemoved(removed *shed.Removed) error {
	rows := make([][]string, 0, len(removed.Items))
	for _, it := range removed.Items {
		size := ""
		if it.Size > 0 {
			size = byteSize(it.Size)
		}
		rows = append(rows, []string{it.Kind, it.Name, size})
	}
	return c.printTable([]string{"KIND", "NAME", "SIZE"}, rows)
}
