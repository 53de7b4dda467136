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
	timeout := timeLimit(10 * time.Minute)
	memory := binarySize{unit: 1 << 20, example: "2048 (in MB) or 4G"}
	upper := binarySize{unit: 1, example: "20G"}
	cmd := &cobra.Command{
		Use:     "create NAME",
		Short:   "Create a shed and start it",
		Example: "  shed create web --repo charliek/shed --cpus 4 --memory 8G",
		Args:    needs(false, "NAME"),
		RunE: c.action(func(ctx context.Context, args []string) error {
			t, err := c.place(args[0])
			if err != nil {
				return err
			}
			opts.Name, opts.MemoryMB, opts.UpperSize = t.name, int(memory.n), upper.n
			ctx, cancel := context.WithTimeout(ctx, time.Duration(timeout))
			defer cancel()
			report, end := c.progress("create " + t.name)
			sh, err := t.client.Create(ctx, opts, report)
			end()
			switch {
			case errors.Is(err, context.DeadlineExceeded):
				return cutOff(ctx, t, "not done after "+timeout.String()).WithHint("allow more with --timeout")
			case errors.Is(err, context.Canceled):
				return cutOff(ctx, t, interrupted)
			case err != nil:
				return err
			}
			c.updateSSHConfig(ctx, t, false)
			if c.json {
				return c.printJSON(sh)
			}
			c.sayRunning(t, args[0])
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
	f.StringVarP(&opts.Repo, "repo", "r", "", "`repository` to clone into the shed: a URL, user@host:path or owner/repo")
	f.StringVarP(&opts.Image, "image", "i", "", "`image` to make it of: an alias, tag, reference or digest (default: the server's)")
	f.StringVar(&opts.Backend, "backend", "", "`name` of the machine monitor, one that the server has (default: the server's)")
	f.IntVar(&opts.CPUs, "cpus", 0, "`number` of CPUs (default: the server's)")
	f.Var(&memory, "memory", "memory in MB, or as 4G (default: the server's)")
	f.Var(&upper, "upper-size", "largest `size` of the shed's own disk, 1G to 1T (default 20G; it grows as it is used)")
	f.BoolVar(&opts.NoProvision, "no-provision", false, "don't clone the repository into the shed")
	f.Var(&timeout, "timeout", "give up and undo after this `time`, such as 90s or 10m")
	return cmd
}

// sayRunning says that t, which the user has called ref, runs, and where, if that isn't plain.
func (c *cli) sayRunning(t target, ref string) {
	where := ""
	if len(c.known.Config.Names()) > 1 {
		where, ref = " on "+t.server, t.server+"/"+t.name
	}
	c.message("%s is running%s; open a shell in it with: shed console %s", t.name, where, ref)
}

// undoTime is how long an answer to whether a create was undone is waited for.
const undoTime = 30 * time.Second

// cutOff says what has become of a create that this program gave up, because of why:
// the server undoes it when it sees that the caller has gone.
func cutOff(ctx context.Context, t target, why string) *shed.Error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTime)
	defer cancel()
	missing := false
	for {
		sh, err := t.client.Get(ctx, t.name)
		switch {
		case shed.ErrorCode(err) == shed.CodeNotFound && !missing:
			missing = true // or not begun yet: this request may have overtaken that one
		case shed.ErrorCode(err) == shed.CodeNotFound:
			return shed.Errorf(shed.CodeInternal, "create %s: %s, so it was undone: nothing of it is left", t.name, why)
		case err != nil:
			return shed.Errorf(shed.CodeInternal, "create %s: %s; whether it was undone is not known: %v", t.name, why, err).
				WithHint("`shed list` shows whether it is there")
		case sh.Status != shed.StatusCreating:
			return shed.Errorf(shed.CodeInternal, "create %s: %s; there is a shed of that name, which is %s", t.name, why, sh.Status).
				WithHint("shed delete %s removes it", t.name)
		}
		select {
		case <-time.After(undoPoll):
		case <-ctx.Done(): // the next Get says so
		}
	}
}

const undoPoll = 50 * time.Millisecond
