package image

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"sync"
	"time"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/preset"
	"github.com/charliek/shed/internal/rootfs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// BuildPreset builds the named preset and gives it that tag; until then, the
// tag stays what it was. It reports phases "bootstrap", "packages", "layer" and "image".
//
// Presets are stacked: base; extensions upon it; full upon that. The bootstrapped system at the bottom is shared: base
// gets a new one, and the others take the newest that a preset image has, if there is one that was made in the same way.
//
// One is built at a time: another waits for its turn, as phase "wait". An unknown preset is CodeInvalid, and a host that
// lacks what it takes CodeUnsupported.
func (s *Store) BuildPreset(ctx context.Context, name string, p shed.Progress) (*shed.Image, error) {
	made, err := preset.Find(name)
	if err != nil {
		return nil, err
	}
	select {
	case s.building <- struct{}{}:
	default:
		done := p.Phase("wait", "waiting for the build of another preset")
		select {
		case s.building <- struct{}{}:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		done()
	}
	defer func() { <-s.building }()
	img, err := s.build(ctx, made, serialize(p))
	if err != nil {
		return nil, fmt.Errorf("building image %s: %w", name, err)
	}
	return img, nil
}

func (s *Store) build(ctx context.Context, made preset.Preset, p shed.Progress) (_ *shed.Image, err error) {
	suite, err := preset.HostSuite()
	if err != nil {
		return nil, err
	}
	added, err := s.newAddition()
	if err != nil {
		return nil, err
	}
	defer func() { err = added.end(err) }()
	b := &presetBuild{addition: added, preset: made, suite: suite, progress: p}
	if err := b.base(ctx); err != nil {
		return nil, err
	}
	for _, st := range made.Steps {
		if err := b.extend(ctx, st); err != nil {
			return nil, err
		}
	}
	desc, err := b.image()
	if err != nil {
		return nil, err
	}
	return s.image(withTag(desc, made.Name))
}

// presetBuild is the building of one preset.
type presetBuild struct {
	*addition
	preset   preset.Preset
	suite    string
	progress shed.Progress
	layers   []madeLayer // bottom first
}

// base makes the bootstrapped system the lowest layer, or takes one that is there.
func (b *presetBuild) base(ctx context.Context) error {
	if len(b.preset.Steps) > 0 {
		base, release := b.store.built(b.preset.Version(b.suite))
		b.keep(release)
		if base != nil {
			done := b.progress.Phase("bootstrap", fmt.Sprintf("using the system of image %s, made %s", base.name, base.history.Created.Format(time.DateTime)))
			b.layers = append(b.layers, base.madeLayer)
			done()
			return nil
		}
	}
	var blob *os.File
	var l madeLayer
	err := b.preset.Bootstrap(ctx, b.suite, b.progress, func(r io.Reader) (err error) {
		blob, l, err = b.layer(ctx, r)
		return err
	})
	if err != nil {
		if blob != nil {
			err = errors.Join(err, blob.Close(), os.Remove(blob.Name()))
		}
		return err
	}
	return b.commit(blob, l, b.preset.Comment(b.suite))
}

// extend makes the layer of a step upon those so far.
func (b *presetBuild) extend(ctx context.Context, st preset.Step) (err error) {
	var lower []preset.Layer
	for _, l := range b.layers {
		lower = append(lower, func(read func(io.Reader) error) error {
			return b.store.withLayer(l.desc, func(r io.Reader) error { return read(readerOf(ctx, r)) })
		})
	}
	scratch, err := b.store.createTemp()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, scratch.Close(), os.Remove(scratch.Name())) }()
	write, err := st.Make(ctx, b.suite, lower, scratch, b.progress)
	if err != nil {
		return rootfs.NoSpace(err, b.store.dir)
	}
	return b.add(ctx, st.Comment, write)
}

// versionLabel is the label with the version of the recipe of an image's lowest layer.
const versionLabel = "io.github.charliek.shed.base"

// built returns the preset image whose lowest layer was last made by that version of a recipe, and keeps it from
// being removed until release is called. It returns nil if there is none.
func (s *Store) built(version string) (img *baseImage, release func()) {
	release = func() {}
	for _, name := range preset.Names() {
		found, r, err := s.Acquire(name)
		if err != nil {
			continue // it isn't there, or is of no use
		}
		next, err := s.baseImage(found.Digest)
		if err != nil || next.version != version || img != nil && !next.history.Created.After(img.history.Created.Time) {
			r()
			continue
		}
		release()
		next.name, img, release = name, next, r
	}
	return img, release
}

// baseImage is the lowest layer of an image.
type baseImage struct {
	name, version string
	madeLayer
}

func (s *Store) baseImage(digest string) (*baseImage, error) {
	h, err := v1.NewHash(digest)
	if err != nil {
		return nil, err
	}
	manifest, cfg, err := s.manifest(h, types.OCIManifestSchema1)
	if err != nil {
		return nil, err
	}
	if err := checkLayers(manifest); err != nil {
		return nil, err
	}
	if len(manifest.Layers) == 0 || len(cfg.History) == 0 {
		return nil, shed.Errorf(shed.CodeInvalid, "it has no layers")
	}
	if _, err := os.Stat(s.blob(manifest.Layers[0].Digest)); err != nil {
		return nil, err
	}
	return &baseImage{
		version:   cfg.Config.Labels[versionLabel],
		madeLayer: madeLayer{desc: manifest.Layers[0], diffID: cfg.RootFS.DiffIDs[0], history: cfg.History[0]},
	}, nil
}

// withLayer calls f with the tar of the layer whose blob desc points to.
func (s *Store) withLayer(desc v1.Descriptor, f func(io.Reader) error) (err error) {
	r, err := s.unpackBlob(desc, nil, shed.Event{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	if err := f(bufio.NewReaderSize(r, 1<<20)); err != nil {
		return fmt.Errorf("layer %s: %w", desc.Digest, err)
	}
	return nil
}

// add makes the tar that write writes the next layer.
func (b *presetBuild) add(ctx context.Context, comment string, write func(io.Writer) error) error {
	done := b.progress.Phase("layer", "making the layer: "+comment)
	pr, pw := io.Pipe()
	written := make(chan struct{})
	go func() {
		defer close(written)
		buf := bufio.NewWriterSize(pw, 1<<20)
		err := write(buf)
		if err == nil {
			err = buf.Flush()
		}
		pw.CloseWithError(err)
	}()
	blob, l, err := b.layer(ctx, pr)
	pr.CloseWithError(err) // lets a blocked write go
	<-written
	if err != nil {
		return err
	}
	if err := b.commit(blob, l, comment); err != nil {
		return err
	}
	done()
	return nil
}

func (b *presetBuild) commit(blob *os.File, l madeLayer, comment string) error {
	if err := rootfs.Commit(blob, b.store.blob(l.desc.Digest), 0o644); err != nil {
		return err
	}
	l.history = v1.History{
		Created:   v1.Time{Time: time.Now().UTC().Truncate(time.Second)},
		CreatedBy: "shed image build " + b.preset.Name,
		Comment:   comment,
	}
	b.layers = append(b.layers, l)
	return nil
}

// image makes the layers an image and tags it.
func (b *presetBuild) image() (v1.Descriptor, error) {
	done := b.progress.Phase("image", "storing the image")
	now := time.Now().UTC().Truncate(time.Second)
	cfg := v1.ConfigFile{
		Architecture: runtime.GOARCH,
		OS:           "linux",
		Created:      v1.Time{Time: now},
		Config:       b.preset.Config,
		RootFS:       v1.RootFS{Type: "layers"},
	}
	cfg.Config.Labels = map[string]string{versionLabel: b.preset.Version(b.suite)}
	manifest := v1.Manifest{
		SchemaVersion: 2,
		MediaType:     types.OCIManifestSchema1,
		Annotations:   map[string]string{"org.opencontainers.image.created": now.Format(time.RFC3339)},
	}
	for _, l := range b.layers {
		cfg.RootFS.DiffIDs = append(cfg.RootFS.DiffIDs, l.diffID)
		cfg.History = append(cfg.History, l.history)
		manifest.Layers = append(manifest.Layers, l.desc)
	}
	var err error
	if manifest.Config, err = b.writeJSON(cfg, types.OCIConfigJSON); err != nil {
		return v1.Descriptor{}, err
	}
	desc, err := b.writeJSON(manifest, types.OCIManifestSchema1)
	if err != nil {
		return v1.Descriptor{}, err
	}
	desc.Platform = &v1.Platform{Architecture: runtime.GOARCH, OS: "linux"}
	if err := b.store.tag(desc, b.preset.Name); err != nil {
		return v1.Descriptor{}, err
	}
	done()
	return desc, nil
}

// serialize makes p fit for calls from several goroutines.
func serialize(p shed.Progress) shed.Progress {
	var mu sync.Mutex
	return func(e shed.Event) {
		mu.Lock()
		defer mu.Unlock()
		p.Report(e)
	}
}
