package image

import (
	"context"
	"fmt"
	"io"

	"github.com/charliek/shed"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
)

// Pull gets the image that opts.Ref names from its registry, makes its layers' block images while they
// come, and gives it the familiar form of that reference as its tag. Of an index, it takes the image for
// one platform, and it is that one's digest that the image then has.
//
// It reports phases "pull" and "convert", with an item for each layer. Pulls that need the same layers at the same time share
// the work. A pull that fails changes no tag; what it has got is kept, and the next one goes on from there.
//
// What the registry refuses, and one that can't be reached, is CodeRegistry; if there is no such image, or none for the
// platform, CodeNoImage; one that sheds can't use CodeUnsupported, and one that is not what it says it is CodeInvalid.
func (s *Store) Pull(ctx context.Context, opts shed.PullOptions, p shed.Progress) (*shed.Image, error) {
	img, err := s.pull(ctx, opts, patient, p)
	if err != nil {
		return nil, fmt.Errorf("pulling %s: %w", opts.Ref, err)
	}
	return img, nil
}

func (s *Store) pull(ctx context.Context, opts shed.PullOptions, patience patience, p shed.Progress) (*shed.Image, error) {
	ref, err := parseRef(opts.Ref)
	if err != nil {
		return nil, err
	}
	want, err := wantedPlatform(opts.Platform)
	if err != nil {
		return nil, err
	}
	p = serialize(p)
	pulled := p.Phase("pull", "pulling "+familiar(ref))
	r, err := dialRegistry(ctx, ref.Context(), transport.PullScope, patience)
	if err != nil {
		return nil, err
	}
	defer r.close()
	raw, m, mediaType, err := r.image(ctx, ref.Identifier(), want)
	if err != nil {
		return nil, err
	}
	desc := descriptor(raw, mediaType)
	release := s.hold(append(blobsOf(m), desc.Digest)...)
	defer release()
	cfg, err := s.pullConfig(ctx, r, m)
	if err != nil {
		return nil, err
	}
	if err := checkPlatform(cfg, want, opts.Platform); err != nil {
		return nil, err
	}
	releaseImages := s.hold(blockImages(cfg.RootFS.DiffIDs)...)
	defer releaseImages()

	if err := newIncoming(s, r, m, cfg, p, pulled).get(ctx); err != nil {
		return nil, err
	}
	if err := s.writeFile(s.blob(desc.Digest), raw); err != nil {
		return nil, err
	}
	desc.Platform = &v1.Platform{OS: cfg.OS, Architecture: cfg.Architecture, Variant: cfg.Variant}
	tag := familiar(ref)
	if err := s.tag(desc, tag); err != nil {
		return nil, err
	}
	return s.image(withTag(desc, tag))
}

// blobsOf returns the digests of an image's configuration and layers.
func blobsOf(m *v1.Manifest) []v1.Hash {
	hashes := []v1.Hash{m.Config.Digest}
	for _, l := range m.Layers {
		hashes = append(hashes, l.Digest)
	}
	return hashes
}

func (s *Store) pullConfig(ctx context.Context, r *registry, m *v1.Manifest) (*v1.ConfigFile, error) {
	if _, err := s.dropDamaged(ctx, m.Config); err != nil {
		return nil, err
	}
	open := func(ctx context.Context, offset int64) (io.ReadCloser, error) { return r.blob(ctx, m.Config, offset) }
	if err := s.ingest(ctx, m.Config, open, func(int64) {}); err != nil {
		return nil, fmt.Errorf("its configuration: %w", err)
	}
	raw, err := s.readBlob(m.Config.Digest)
	if err != nil {
		return nil, err
	}
	return parseConfig(raw, m)
}

// checkPlatform says whether an image is for the platform that was asked for, or by default for the host's.
func checkPlatform(cfg *v1.ConfigFile, want v1.Platform, asked string) error {
	has := v1.Platform{OS: cfg.OS, Architecture: cfg.Architecture, Variant: cfg.Variant}
	if has.OS == "" {
		has.OS = "linux"
	}
	if has.Architecture == "" || fits(has, want) {
		return nil
	}
	if asked != "" || has.OS != "linux" {
		return shed.Errorf(shed.CodeNoImage, "it is for %s, not for %s", platformName(has), want)
	}
	return shed.Errorf(shed.CodeUnsupported, "it is for %s, and this server is %s", platformName(has), want).
		WithHint("look for another tag of it; --platform %s pulls it anyhow, though no shed here can run it", platformName(has))
}
