//go:build linux

package engine

import (
	"context"

	"github.com/charliek/shed"
)

func (e *Engine) Images(ctx context.Context) ([]*shed.Image, error) {
	images, err := e.Config.Images.List(ctx)
	if err != nil {
		return nil, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, img := range images {
		for name, en := range e.sheds {
			if en.rec.ImageDigest == img.Digest {
				img.InUse = append(img.InUse, name)
			}
		}
	}
	return images, nil
}

func (e *Engine) BuildPreset(ctx context.Context, preset string, p shed.Progress) (*shed.Image, error) {
	return e.Config.Images.BuildPreset(ctx, preset, p)
}
