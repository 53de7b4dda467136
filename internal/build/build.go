// Package build makes images from Dockerfiles. A build runs commands as root, from a file that may be
// anybody's: it runs in a shed of its own, by buildah, and can't touch the server.
package build

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"

	"github.com/charliek/shed"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

const (
	// Shed is the name of the shed that builds run in. It is one like any other: who deletes it loses
	// the build cache, and nothing else.
	Shed = "shed-builder"
	// preset is the image that it is made of.
	preset = "builder"

	upperSize = 100 << 30 // bytes: room for the cache
	// workDir is where a build has its files. What a build that was cut off has left there the next one removes.
	workDir = "/var/lib/containers/shed"

	maxDockerfile = 1 << 20 // bytes
	maxJSON       = 8 << 20 // bytes, of a manifest or configuration
)

// Images is what a build needs of the image store.
type Images interface {
	// Preset makes sure that there is an image of the preset.
	Preset(ctx context.Context, preset string, p shed.Progress) error

	// Base returns the image that ref names, which it pulls if it isn't here, and the digest of its configuration.
	Base(ctx context.Context, ref string, p shed.Progress) (*shed.Image, v1.Hash, error)

	Save(ctx context.Context, names []string, w io.Writer) error

	// Assemble makes an image of a configuration, kept byte for byte, and layers, and tags it. It calls open, to read the
	// uncompressed tar, for those layers only that no image here has.
	Assemble(ctx context.Context, config []byte, tag string,
		open func(ctx context.Context, diffID v1.Hash) io.ReadCloser, p shed.Progress) (*shed.Image, error)
}

// Builder builds images, one at a time.
type Builder struct {
	sheds  shed.Sheds
	images Images
	turn   chan struct{} // holds a token while nothing is built
}

// New returns a Builder whose shed is one of sheds.
func New(sheds shed.Sheds, images Images) *Builder {
	b := &Builder{sheds: sheds, images: images, turn: make(chan struct{}, 1)}
	b.turn <- struct{}{}
	return b
}

// Build builds an image as shed.Images says; it waits until no other build runs. It reports "wait", the phases of making
// and starting the shed, "context", "base", "build" and "layer".
func (b *Builder) Build(ctx context.Context, opts shed.BuildOptions, buildContext io.Reader, p shed.Progress) (img *shed.Image, err error) {
	select {
	case <-b.turn:
	default:
		done := p.Phase("wait", "waiting for another build")
		select {
		case <-b.turn:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		done()
	}
	defer func() { b.turn <- struct{}{} }()
	if opts.Dockerfile == "" {
		opts.Dockerfile = "Dockerfile"
	}
	if err := b.start(ctx, p); err != nil {
		return nil, fmt.Errorf("starting the shed that builds images: %w", err)
	}
	defer func() {
		// Running it costs memory, and starting it little.
		_, serr := b.sheds.Stop(context.WithoutCancel(ctx), Shed, nil)
		err = errors.Join(err, serr)
	}()
	img, err = b.build(run{ctx: ctx, sheds: b.sheds, dir: path.Join(workDir, rand.Text())}, opts, buildContext, p)
	if err == nil || ctx.Err() != nil {
		return img, err
	}
	if sh, gerr := b.sheds.Get(ctx, Shed); gerr != nil || sh.Status != shed.StatusRunning {
		return nil, shed.Errorf(shed.CodeConflict, "shed %q, which builds images, has been stopped: %w", Shed, err).WithHint("build again")
	}
	return nil, err
}

func (b *Builder) start(ctx context.Context, p shed.Progress) error {
	sh, err := b.sheds.Get(ctx, Shed)
	if shed.ErrorCode(err) == shed.CodeNotFound {
		if err := b.images.Preset(ctx, preset, p); err != nil {
			return err
		}
		_, err := b.sheds.Create(ctx, shed.CreateOptions{Name: Shed, Image: preset, UpperSize: upperSize}, p)
		return err
	}
	if err != nil {
		return err
	}
	if sh.Image != preset {
		return shed.Errorf(shed.CodeConflict, "shed %q is made of image %q, not of %q", Shed, sh.Image, preset).
			WithHint("delete it, and a build makes it again: shed delete %s", Shed)
	}
	_, err = b.sheds.Start(ctx, Shed, p)
	return err
}

func (b *Builder) build(r run, opts shed.BuildOptions, buildContext io.Reader, p shed.Progress) (*shed.Image, error) {
	contextDir := path.Join(r.dir, "context")
	if err := r.run(nil, nil, "sh", "-c", `rm -rf "$1" && mkdir -p "$2"`, "sh", workDir, contextDir); err != nil {
		return nil, err
	}
	sent := p.Phase("context", "sending the context")
	if err := r.run(p.Reader(buildContext, shed.Event{Phase: "context"}), nil, "tar", "-x", "--no-same-owner", "-C", contextDir); err != nil {
		return nil, fmt.Errorf("sending the context: %w", err)
	}
	sent()
	var dockerfile bytes.Buffer
	if err := r.read(path.Join(contextDir, path.Join("/", opts.Dockerfile)), maxDockerfile, &dockerfile); err != nil {
		return nil, shed.Errorf(shed.CodeInvalid, "the context has no file %s", opts.Dockerfile).
			WithHint("name the Dockerfile with -f")
	}
	g, err := parse(dockerfile.Bytes(), opts.Args)
	if err != nil {
		return nil, err
	}
	needed, err := g.bases(opts.Target)
	if err != nil {
		return nil, err
	}
	names := map[string]string{}
	for _, ref := range needed {
		if names[ref], err = b.sendBase(r, ref, p); err != nil {
			return nil, fmt.Errorf("image %s, which the Dockerfile builds on: %w", ref, err)
		}
	}
	name := resultName(opts.Tag)
	in, err := r.prepare(g, contextDir, names)
	if err != nil {
		return nil, err
	}
	if err := r.bud(opts, in, name, p); err != nil {
		return nil, err
	}
	return b.fetch(r, name, opts.Tag, p)
}

// resultName is the name that the image of a tag has in the builder. It keeps the image, and what it is made of, in the cache.
func resultName(tag string) string {
	sum := sha256.Sum256([]byte(tag))
	return "localhost/shed-result:" + hex.EncodeToString(sum[:16])
}

// sendBase makes sure that the builder has the image that ref names here, and returns its name there.
func (b *Builder) sendBase(r run, ref string, p shed.Progress) (name string, err error) {
	img, id, err := b.images.Base(r.ctx, ref, p)
	if err != nil {
		return "", err
	}
	name = "localhost/shed-base:" + id.Hex
	tag := []string{"buildah", "tag", id.Hex, name}
	if r.run(nil, nil, tag...) == nil {
		return name, nil // it has been sent before, or was built there
	}
	sent := p.Phase("base", "sending "+ref)
	pr, pw := io.Pipe()
	saved := make(chan struct{})
	go func() {
		defer close(saved)
		pw.CloseWithError(b.images.Save(r.ctx, []string{img.Digest}, pw))
	}()
	archive := path.Join(r.dir, "base.tar")
	err = r.write(p.Reader(pr, shed.Event{Phase: "base"}), archive)
	pr.CloseWithError(io.ErrClosedPipe) // lets a blocked Save go
	<-saved
	sent()
	if err != nil {
		return "", err
	}
	defer p.Phase("unpack", "unpacking "+ref+" in the builder")()
	if err := r.run(nil, nil, "sh", "-c", `buildah pull -q "oci-archive:$1" && rm "$1"`, "sh", archive); err != nil {
		return "", err
	}
	return name, r.run(nil, nil, tag...)
}

// fetch makes an image here of the builder's, and tags it. Only layers that aren't here yet come, uncompressed.
func (b *Builder) fetch(r run, name, tag string, p shed.Progress) (*shed.Image, error) {
	config, err := r.config(name)
	if err != nil {
		return nil, err
	}
	var layers bytes.Buffer
	if err := r.read(layersFile, maxJSON, &layers); err != nil {
		return nil, err
	}
	var known []storedLayer
	if err := json.Unmarshal(layers.Bytes(), &known); err != nil {
		return nil, fmt.Errorf("%s in shed %s: %w", layersFile, Shed, err)
	}
	ids := map[string]string{}
	for _, l := range known {
		ids[l.DiffID] = l.ID
	}
	return b.images.Assemble(r.ctx, config, tag, func(ctx context.Context, diffID v1.Hash) io.ReadCloser {
		return r.open(ctx, "containers-storage", "diff", "--uncompressed", ids[diffID.String()])
	}, p)
}

// layersFile lists the layers that the builder has.
const layersFile = "/var/lib/containers/storage/overlay-layers/layers.json"

// storedLayer is an entry there: see Layer in github.com/containers/storage.
type storedLayer struct {
	ID     string `json:"id"`
	DiffID string `json:"diff-digest"`
}
