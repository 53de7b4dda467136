//go:build linux

package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/image"
	"github.com/charliek/shed/internal/state"
)

func (e *Engine) Images(ctx context.Context) ([]*shed.Image, error) {
	images, err := e.Config.Images.List(ctx)
	if err != nil {
		return nil, err
	}
	e.annotate(images...)
	return images, nil
}

// annotate adds to images from the store what the store can't know: which sheds use them, and which the
// configuration names.
func (e *Engine) annotate(images ...*shed.Image) {
	configured := e.configuredImages()
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, img := range images {
		for name, en := range e.sheds {
			if en.rec.ImageDigest == img.Digest {
				img.InUse = append(img.InUse, name)
			}
		}
		slices.Sort(img.InUse)
		if configured[img.Ref] || configured[img.Digest] {
			img.Source = shed.SourceConfig
		}
	}
}

// configuredImages are the tags, as they are in the store, and digests of the images that the configuration names.
func (e *Engine) configuredImages() map[string]bool {
	configured := map[string]bool{}
	for _, ref := range ConfiguredImages(e.Backends, e.Version) {
		if _, digest, ok := strings.Cut(ref, "@"); ok {
			configured[digest] = true
		} else if tag, err := image.Familiar(ref); err == nil {
			configured[tag] = true
		}
	}
	return configured
}

// annotated is annotate for the result of a method of the store.
func (e *Engine) annotated(img *shed.Image, err error) (*shed.Image, error) {
	if err != nil {
		return nil, err
	}
	e.annotate(img)
	return img, nil
}

// imagesInUse returns the names of sheds by the digest of their image: of all that have a record, whatever
// goes on with them.
func (e *Engine) imagesInUse() (map[string][]string, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	// A record is written and removed while its shed is in the table, so with the mutex held the two fit together.
	records, damaged, err := e.State.Load()
	if err != nil {
		return nil, fmt.Errorf("reading the records: %w", err)
	}
	unknown := map[string]error{}
	for _, d := range damaged {
		unknown[d.Name] = d.Err
	}
	for name, en := range e.sheds {
		switch {
		case en.rec.ImageDigest != "":
			records = append(records, en.rec)
			delete(unknown, name)
		case en.status == shed.StatusCreating: // it holds its image until there is a record
			delete(unknown, name)
		case !slices.ContainsFunc(records, func(r state.Record) bool { return r.Name == name }):
			unknown[name] = errors.New(en.reason)
		}
	}
	if len(unknown) > 0 {
		name := slices.Min(slices.Collect(maps.Keys(unknown)))
		return nil, shed.Errorf(shed.CodeConflict, "it can't be told which image shed %q needs: %w", name, unknown[name]).
			WithHint("restore its shed.json from a backup and restart shed-server, or remove it: shed delete %s", name)
	}
	used := map[string][]string{}
	for _, rec := range records {
		if !slices.Contains(used[rec.ImageDigest], rec.Name) {
			used[rec.ImageDigest] = append(used[rec.ImageDigest], rec.Name)
		}
	}
	return used, nil
}

func (e *Engine) BuildPreset(ctx context.Context, preset string, p shed.Progress) (*shed.Image, error) {
	return e.annotated(e.Config.Images.BuildPreset(ctx, preset, p))
}

func (e *Engine) InspectImage(ctx context.Context, name string) (*shed.ImageDetail, error) {
	detail, err := e.Config.Images.Inspect(ctx, name)
	if err != nil {
		return nil, err
	}
	e.annotate(&detail.Image)
	return detail, nil
}

func (e *Engine) Pull(ctx context.Context, opts shed.PullOptions, p shed.Progress) (*shed.Image, error) {
	img, err := e.Config.Images.Pull(ctx, opts, p)
	if err != nil {
		return nil, err
	}
	if opts.Platform == "" {
		// Layers that have to be merged are now, not when the first shed is made of them. Meanwhile the tag may go.
		_, release, err := e.Config.Images.Acquire(img.Digest)
		if err != nil {
			return nil, err
		}
		defer release()
		most := e.Backends[e.DefaultBackend].maxLayers()
		if _, _, err := e.Config.Images.RootfsWithin(ctx, img, most, p); err != nil {
			return nil, err
		}
	}
	return e.annotated(img, nil)
}

func (e *Engine) Push(ctx context.Context, opts shed.PushOptions, p shed.Progress) (*shed.Pushed, error) {
	return e.Config.Images.Push(ctx, opts, p)
}

func (e *Engine) Save(ctx context.Context, names []string, w io.Writer) error {
	return e.Config.Images.Save(ctx, names, w)
}

func (e *Engine) Load(ctx context.Context, archive io.Reader, p shed.Progress) ([]*shed.Image, error) {
	images, err := e.Config.Images.Load(ctx, archive, p)
	if err != nil {
		return nil, err
	}
	e.annotate(images...)
	return images, nil
}

func (e *Engine) Tag(ctx context.Context, name, tag string) (*shed.Image, error) {
	return e.annotated(e.Config.Images.Tag(ctx, name, tag))
}

func (e *Engine) RemoveImage(ctx context.Context, name string, force bool) (*shed.Removed, error) {
	return e.Config.Images.Remove(ctx, name, force, e.imagesInUse)
}

func (e *Engine) PruneImages(ctx context.Context, dryRun bool) (*shed.Removed, error) {
	return e.Config.Images.Prune(ctx, e.imagesInUse, dryRun)
}
