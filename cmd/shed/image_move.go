package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/api"
	"github.com/google/renameio/v2"
	"github.com/spf13/cobra"
)

func newImagePull(c *cli) *cobra.Command {
	var opts shed.PullOptions
	cmd := &cobra.Command{
		Use:     "pull REF",
		Short:   "Get an image from a registry",
		Args:    needs(false, "REF"),
		Example: "  shed image pull debian:12\n  shed image pull ghcr.io/owner/image@sha256:...",
		RunE: c.withServer(func(ctx context.Context, client *api.Client, args []string) error {
			opts.Ref = args[0]
			report, end := c.progress("pull " + args[0])
			img, err := client.Pull(ctx, opts, report)
			end()
			if err != nil {
				return err
			}
			return c.printImage(img, "pulled")
		}),
	}
	cmd.Flags().StringVar(&opts.Platform, "platform", "", "`OS/ARCH[/VARIANT]`, such as linux/arm64 (default: the server's own)")
	return cmd
}

func newImagePush(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:     "push NAME [TO]",
		Short:   "Copy an image to a registry",
		Example: "  shed image push ghcr.io/owner/image:1\n  shed image push base ghcr.io/owner/base:1",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 2 {
				return nil
			}
			return needs(false, "NAME")(cmd, args)
		},
		ValidArgsFunction: c.completeImages,
		RunE: c.withServer(func(ctx context.Context, client *api.Client, args []string) error {
			opts := shed.PushOptions{Image: args[0]}
			if len(args) == 2 {
				opts.To = args[1]
			}
			report, end := c.progress("push " + args[0])
			pushed, err := client.Push(ctx, opts, report)
			end()
			if err != nil {
				return err
			}
			if c.json {
				return c.printJSON(pushed)
			}
			return c.printLine(pushed.Ref + "@" + pushed.Digest)
		}),
	}
}

func newImageTag(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:               "tag NAME TAG",
		Short:             "Give an image one more tag",
		Args:              needs(false, "NAME", "TAG"),
		ValidArgsFunction: c.completeImages,
		RunE: c.withServer(func(ctx context.Context, client *api.Client, args []string) error {
			img, err := client.Tag(ctx, args[0], args[1])
			if err != nil {
				return err
			}
			if c.json {
				return c.printJSON(img)
			}
			return c.printLine(img.Ref)
		}),
	}
}

func newImageLoad(c *cli) *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:     "load",
		Short:   "Take in the images of an OCI archive, or of one by docker save",
		Args:    noArgs,
		Example: "  shed image load -i images.tar\n  docker save debian:12 | shed image load",
	}
	cmd.RunE = c.action(func(ctx context.Context, _ []string) error {
		if _, tty := terminal(c.in); file == "" && tty {
			return usageError(cmd, "%s needs --input FILE where stdin is a terminal", cmd.CommandPath())
		}
		client, err := c.connect()
		if err != nil {
			return err
		}
		images, err := c.load(ctx, client, file)
		if err != nil {
			return err
		}
		if c.json {
			return c.printJSON(images)
		}
		for _, img := range images {
			if err := c.printLine(imageName(img)); err != nil {
				return err
			}
		}
		return nil
	})
	cmd.Flags().StringVarP(&file, "input", "i", "", "read from `file` instead of stdin")
	return cmd
}

// load sends the archive in file, or in stdin if it is "".
func (c *cli) load(ctx context.Context, client *api.Client, file string) ([]*shed.Image, error) {
	archive, what := c.in, "load"
	if file != "" {
		f, err := os.Open(file)
		if err != nil {
			return nil, shed.Errorf(shed.CodeInvalid, "%w", err)
		}
		defer f.Close()
		archive, what = f, "load "+filepath.Base(file)
	}
	report, end := c.progress(what)
	defer end()
	if _, tty := terminal(c.err); !tty && c.verbose == 0 {
		report = withoutItems(report)
	}
	return client.Load(ctx, archive, report)
}

// withoutItems returns report without what is about a part of a phase: an archive has any number of layers, and a log
// has no use for each.
func withoutItems(report shed.Progress) shed.Progress {
	return func(e shed.Event) {
		if e.Item == "" {
			report(e)
		}
	}
}

func newImageSave(c *cli) *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:               "save NAME...",
		Short:             "Write images as an OCI archive",
		Args:              needs(true, "NAME"),
		Example:           "  shed image save -o images.tar base debian:12\n  shed image save base | ssh other shed image load",
		ValidArgsFunction: c.completeImages,
	}
	cmd.RunE = c.action(func(ctx context.Context, args []string) error {
		if file == "" {
			if err := refuseJSON(c, cmd, "its stdout is the archive, unless --output is given"); err != nil {
				return err
			}
			if _, tty := terminal(c.out); tty {
				return usageError(cmd, "%s needs --output FILE where stdout is a terminal", cmd.CommandPath())
			}
		}
		client, err := c.connect()
		if err != nil {
			return err
		}
		report, end := c.progress("save " + strings.Join(args, " "))
		counted := &countingWriter{report: func(n int64) {
			report(shed.Event{Phase: "save", Message: "writing", Current: n, Unit: "bytes"})
		}}
		save := func(w io.Writer) error {
			counted.w = w
			return client.Save(ctx, args, counted)
		}
		if file == "" {
			err = save(c.out)
		} else {
			err = writeFile(file, save)
		}
		end()
		if err != nil || file == "" {
			return err
		}
		if c.json {
			return c.printJSON(struct {
				File string `json:"file"`
				Size int64  `json:"size"` // bytes
			}{file, counted.n})
		}
		c.message("wrote %s to %s", byteSize(counted.n), file)
		return nil
	})
	cmd.Flags().StringVarP(&file, "output", "o", "", "write to `file` instead of stdout")
	return cmd
}

// writeFile has write make the file at path. It is there with all of its contents, or
// stays as it was; what is no regular file, such as a pipe, is written to as it is.
func writeFile(path string, write func(io.Writer) error) error {
	info, err := os.Stat(path)
	if err == nil && !info.Mode().IsRegular() {
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			return shed.Errorf(shed.CodeInvalid, "%w", err)
		}
		return errors.Join(write(f), f.Close())
	}
	if err == nil {
		path, err = filepath.EvalSymlinks(path)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return shed.Errorf(shed.CodeInvalid, "%w", err)
	}
	f, err := renameio.NewPendingFile(path, renameio.WithTempDir(filepath.Dir(path)), renameio.WithPermissions(0o644), renameio.WithExistingPermissions())
	if err != nil {
		return shed.Errorf(shed.CodeInvalid, "%s can't be written: %w", path, err)
	}
	defer f.Cleanup()
	if err := write(f); err != nil {
		return err
	}
	if err := f.CloseAtomicallyReplace(); err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return nil
}

// countingWriter reports how much was written, each time another MiB was.
type countingWriter struct {
	w           io.Writer
	report      func(n int64)
	n, reported int64
}

func (c *countingWriter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	if c.n += int64(n); c.n-c.reported >= 1<<20 {
		c.reported = c.n
		c.report(c.n)
	}
	return n, err
}
