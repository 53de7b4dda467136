package main

import (
	"context"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/api"
	"github.com/spf13/cobra"
)

// presets are the images that servers know how to make.
var presets = []string{"base", "extensions", "full"}

// imageBuild is a command line of shed image build.
type imageBuild struct {
	dir       string // of the context
	file      string
	tag       string
	target    string
	buildArgs []string
	noCache   bool
	preset    string
	archive   string
}

func newImageBuild(c *cli) *cobra.Command {
	var b imageBuild
	cmd := &cobra.Command{
		Use:   "build DIRECTORY | PRESET",
		Short: "Build an image from a Dockerfile or a preset",
		Long: `Build an image from a directory with a Dockerfile, which is the build's context,
or from a preset: ` + strings.Join(presets, ", ") + `.

What .dockerignore names is not sent. PRESET is short for --preset PRESET.`,
		Example: `  shed image build base
  shed image build -t mine .
  shed image build -t mine -f docker/Dockerfile --build-arg VERSION=1.2 .`,
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			return presets, cobra.ShellCompDirectiveDefault
		},
	}
	cmd.Args = func(cmd *cobra.Command, args []string) error { return b.settle(cmd, args) }
	cmd.RunE = c.withServer(func(ctx context.Context, client *api.Client, _ []string) error {
		img, err := b.run(ctx, c, client)
		if err != nil {
			return err
		}
		return c.printImage(img, "built")
	})
	flags := cmd.Flags()
	flags.StringVarP(&b.file, "file", "f", "", "Dockerfile, also one outside the context; - is stdin (default DIRECTORY/Dockerfile)")
	flags.StringVarP(&b.tag, "tag", "t", "", "`tag` of the image")
	flags.StringArrayVar(&b.buildArgs, "build-arg", nil, "`K=V` for an ARG, or K with the value that it has here")
	flags.StringVar(&b.target, "target", "", "build the `stage` of that name (default: the last)")
	flags.BoolVar(&b.noCache, "no-cache", false, "take no step from an earlier build")
	flags.StringVar(&b.preset, "preset", "", "build the `preset` of that name")
	flags.StringVar(&b.archive, "from-oci-archive", "", "take the one image in `file`, and tag it")
	return cmd
}

// settle finds out what is to be built, and refuses what could be meant in two ways.
func (b *imageBuild) settle(cmd *cobra.Command, args []string) error {
	if len(args) > 1 {
		return usageError(cmd, "%s takes one directory or preset, got %q too", cmd.CommandPath(), args[1])
	}
	only := "" // flag of a Dockerfile
	for _, name := range []string{"file", "target", "build-arg", "no-cache"} {
		if cmd.Flags().Changed(name) {
			only = "--" + name
		}
	}
	if b.preset != "" || b.archive != "" {
		flag := "--preset"
		if b.preset == "" {
			flag = "--from-oci-archive"
		}
		switch {
		case len(args) > 0:
			return usageError(cmd, "%s takes no directory, got %q", flag, args[0])
		case only != "":
			return usageError(cmd, "%s is for Dockerfiles, and doesn't go with %s", only, flag)
		case b.preset != "" && b.archive != "":
			return usageError(cmd, "--preset doesn't go with --from-oci-archive")
		}
		return nil
	}
	if len(args) == 0 {
		return usageError(cmd, "%s needs a directory with a Dockerfile, or a preset: %s", cmd.CommandPath(), strings.Join(presets, ", "))
	}
	b.dir = args[0]
	info, err := os.Stat(b.dir)
	isDir := err == nil && info.IsDir()
	switch preset := slices.Contains(presets, b.dir); {
	case preset && only == "" && b.tag == "" && isDir:
		return shed.Errorf(shed.CodeInvalid, "%q is both a preset and a directory here", b.dir).
			WithHint("for the preset: %s --preset %s; for the directory: %s ./%s -t TAG", cmd.CommandPath(), b.dir, cmd.CommandPath(), b.dir)
	case preset && only == "" && b.tag == "":
		b.preset = b.dir
		return nil
	case preset && !isDir:
		return shed.Errorf(shed.CodeInvalid, "there is no directory %q", b.dir).
			WithHint("for the preset: %s --preset %s", cmd.CommandPath(), b.dir)
	case os.IsNotExist(err):
		return shed.Errorf(shed.CodeInvalid, "%q is neither a directory nor a preset", b.dir).
			WithHint("presets are %s", strings.Join(presets, ", "))
	case err != nil:
		return shed.Errorf(shed.CodeInvalid, "%w", err)
	case !isDir:
		return shed.Errorf(shed.CodeInvalid, "%s is no directory", b.dir).
			WithHint("for a Dockerfile: -f %s DIRECTORY; for an archive: --from-oci-archive %s", b.dir, b.dir)
	case b.tag == "":
		return usageError(cmd, "%s needs --tag for an image from a Dockerfile", cmd.CommandPath())
	}
	return nil
}

func (b *imageBuild) run(ctx context.Context, c *cli, client *api.Client) (*shed.Image, error) {
	var img *shed.Image
	var err error
	switch {
	case b.preset != "":
		report, end := c.progress("build " + b.preset)
		img, err = client.BuildPreset(ctx, b.preset, report)
		end()
	case b.archive != "":
		img, err = b.load(ctx, c, client)
	default:
		return b.build(ctx, c, client)
	}
	if err != nil || b.tag == "" {
		return img, err
	}
	return client.Tag(ctx, img.Digest, b.tag)
}

// load takes in an archive of one image.
func (b *imageBuild) load(ctx context.Context, c *cli, client *api.Client) (*shed.Image, error) {
	images, err := c.load(ctx, client, b.archive)
	if err != nil {
		return nil, err
	}
	if len(images) != 1 {
		var names []string
		for _, img := range images {
			names = append(names, imageName(img))
		}
		return nil, shed.Errorf(shed.CodeInvalid, "%s has %d images: %s", b.archive, len(images), strings.Join(names, ", ")).
			WithHint("they are here now; shed image tag gives one of them another tag")
	}
	return images[0], nil
}

// build sends the context and has the image built from its Dockerfile.
func (b *imageBuild) build(ctx context.Context, c *cli, client *api.Client) (*shed.Image, error) {
	opts := shed.BuildOptions{Tag: b.tag, Target: b.target, NoCache: b.noCache, Args: map[string]string{}}
	for _, arg := range b.buildArgs {
		key, value, ok := strings.Cut(arg, "=")
		if key == "" {
			return nil, shed.Errorf(shed.CodeInvalid, "--build-arg %q has no name", arg).WithHint("write NAME=VALUE")
		}
		if !ok {
			if value, ok = os.LookupEnv(key); !ok {
				continue
			}
		}
		opts.Args[key] = value
	}
	files, err := newBuildContext(b.dir, b.file, c.in)
	if err != nil {
		return nil, err
	}
	opts.Dockerfile = files.dockerfile
	r, w := io.Pipe()
	written := make(chan struct{})
	go func() {
		defer close(written)
		w.CloseWithError(files.write(ctx, w))
	}()
	report, end := c.progress("build " + b.tag)
	img, err := client.Build(ctx, opts, r, report)
	end()
	r.Close()
	<-written
	for _, what := range files.skipped {
		c.message("not sent: %s", what)
	}
	return img, err
}
