package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/charliek/shed"
	"github.com/spf13/cobra"
)

func newCreate(c *cli) *cobra.Command {
	var opts shed.CreateOptions
	var timeout time.Duration
	memory := binarySize{unit: 1 << 20, example: "2048 (in MB) or 4G"}
	upper := binarySize{unit: 1, example: "20G"}
	cmd := &cobra.Command{
		Use:     "create NAME",
		Short:   "Create a shed and start it",
		Example: "  shed create web --repo charliek/shed --cpus 4 --memory 8G",
		Args:    needs(false, "NAME"),
		RunE: c.action(func(ctx context.Context, args []string) error {
			client, name, err := c.resolve(args[0])
			if err != nil {
				return err
			}
			opts.Name, opts.MemoryMB, opts.UpperSize = name, int(memory.n), upper.n
			ctx, cancel := context.WithTimeout(ctx, timeout)
			defer cancel()
			report, end := c.progress("create " + name)
			sh, err := client.Create(ctx, opts, report)
			end()
			if errors.Is(err, context.DeadlineExceeded) {
				return shed.Errorf(shed.CodeInternal, "create %s: not done after %s, so it was undone", name, timeout).
					WithHint("allow more with --timeout")
			}
			if err != nil {
				return err
			}
			if c.json {
				return c.printJSON(sh)
			}
			c.message("%s is running; open a shell in it with: shed console %s", sh.Name, args[0])
			_, err = fmt.Fprintln(c.out, sh.Name)
			return err
		}),
	}
	cmd.PreRunE = func(cmd *cobra.Command, _ []string) error {
		if cmd.Flags().Changed("cpus") && opts.CPUs < 1 {
			return usageError(cmd, "--cpus %d: a shed has at least one", opts.CPUs)
		}
		return nil
	}
	f := cmd.Flags()
	f.StringVarP(&opts.Repo, "repo", "r", "", "clone this `URL or owner/repo` into the shed")
	f.StringVarP(&opts.Image, "image", "i", "", "`alias, tag, reference or digest` of the image (default: the server's)")
	f.StringVar(&opts.Backend, "backend", "", "firecracker, vz or qemu (default: the server's)")
	f.IntVar(&opts.CPUs, "cpus", 0, "`number` of CPUs (default: the server's)")
	f.Var(&memory, "memory", "memory in MB, or as 4G (default: the server's)")
	f.Var(&upper, "upper-size", "largest `size` of the shed's own disk, 1G to 1T (default 20G; it grows as it is used)")
	f.BoolVar(&opts.NoProvision, "no-provision", false, "don't run the repository's provisioning")
	f.DurationVar(&timeout, "timeout", 10*time.Minute, "give up and undo after this `time`")
	return cmd
}
