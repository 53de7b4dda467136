//go:build linux

package engine

import (
	"context"
	"io"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/image"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// Build builds an image in a shed of its own: see internal/build.
func (e *Engine) Build(ctx context.Context, opts shed.BuildOptions, buildContext io.Reader, p shed.Progress) (*shed.Image, error) {
	if _, err := image.Familiar(opts.Tag); err != nil {
		return nil, err
	}
	return e.annotated(e.builder.Build(ctx, opts, buildContext, p))
}

// buildImages is what builds need of images.
type buildImages struct{ *Engine }

func (b buildImages) Preset(ctx context.Context, preset string, p shed.Progress) error {
	_, err := b.Config.Images.Resolve(preset)
	if shed.ErrorCode(err) == shed.CodeNoImage {
		_, err = b.Config.Images.BuildPreset(ctx, preset, p)
	}
	return err
}

func (b buildImages) Base(ctx context.Context, ref string, p shed.Progress) (*shed.Image, v1.Hash, error) {
	img, release, err := b.imageFor(ctx, b.Backends[b.DefaultBackend], ref, p)
	if err != nil {
		return nil, v1.Hash{}, err
	}
	defer release()
	id, err := b.Config.Images.ConfigDigest(img)
	return img, id, err
}

func (b buildImages) Assemble(ctx context.Context, config []byte, tag string, open func(ctx context.Context, diffID v1.Hash) io.ReadCloser, p shed.Progress) (*shed.Image, error) {
	return b.Config.Images.Assemble(ctx, config, tag, open, p)
}
