package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/charliek/shed"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// ConfigDigest returns the digest of an image's configuration, which other tools call the image's ID.
func (s *Store) ConfigDigest(img *shed.Image) (v1.Hash, error) {
	digest, err := v1.NewHash(img.Digest)
	if err != nil {
		return v1.Hash{}, shed.Errorf(shed.CodeInvalid, "the image's digest: %w", err)
	}
	manifest, _, err := s.manifest(digest, types.OCIManifestSchema1)
	if err != nil {
		return v1.Hash{}, fmt.Errorf("image %s: %w", img.Digest, err)
	}
	return manifest.Config.Digest, nil
}

// Assemble makes an image of a configuration, kept byte for byte, and its layers, and tags it. Of a layer
// that an image here has already it takes that blob. For the others it calls open, to read the
// uncompressed tar. It reports phase "layer".
func (s *Store) Assemble(ctx context.Context, config []byte, tag string, open func(ctx context.Context, diffID v1.Hash) io.ReadCloser, p shed.Progress) (img *shed.Image, err error) {
	tag, err = checkTag(tag)
	if err != nil {
		return nil, err
	}
	cfg, err := v1.ParseConfigFile(bytes.NewReader(config))
	if err != nil {
		return nil, shed.Errorf(shed.CodeInvalid, "the image's configuration: %w", err)
	}
	existed, err := s.existing(newNeeds())
	if err != nil {
		return nil, err
	}
	b := &presetBuild{store: s, progress: p, own: newNeeds(), existed: existed}
	defer func() {
		b.release()
		if err != nil {
			err = errors.Join(err, s.discard(b.own, b.existed))
		}
	}()
	manifest := v1.Manifest{SchemaVersion: 2, MediaType: types.OCIManifestSchema1, Layers: []v1.Descriptor{}}
	for i, diffID := range cfg.RootFS.DiffIDs {
		b.releases = append(b.releases, s.hold(diffID))
		desc, release, err := s.layerBlob(diffID)
		if err != nil {
			return nil, err
		}
		b.releases = append(b.releases, release)
		if desc.Size == 0 {
			done := p.Phase("layer", fmt.Sprintf("storing layer %d of %d", i+1, len(cfg.RootFS.DiffIDs)))
			if desc, err = b.take(ctx, diffID, open); err != nil {
				return nil, fmt.Errorf("layer %d of %d: %w", i+1, len(cfg.RootFS.DiffIDs), err)
			}
			done()
		}
		manifest.Layers = append(manifest.Layers, desc)
	}
	manifest.Config = descriptor(config, types.OCIConfigJSON)
	b.write(manifest.Config.Digest)
	if err := s.writeFile(s.blob(manifest.Config.Digest), config); err != nil {
		return nil, err
	}
	desc, err := b.writeJSON(manifest, types.OCIManifestSchema1)
	if err != nil {
		return nil, err
	}
	desc.Platform = cfg.Platform()
	if err := s.tag(desc, tag); err != nil {
		return nil, err
	}
	return s.image(withTag(desc, tag))
}

// take makes a layer of what open yields.
func (b *presetBuild) take(ctx context.Context, diffID v1.Hash, open func(ctx context.Context, diffID v1.Hash) io.ReadCloser) (v1.Descriptor, error) {
	r := open(ctx, diffID)
	blob, l, err := b.convert(ctx, r)
	if err = errors.Join(err, r.Close()); err != nil {
		return v1.Descriptor{}, err
	}
	if l.diffID != diffID {
		discardErr := errors.Join(blob.Close(), os.Remove(blob.Name()))
		return v1.Descriptor{}, errors.Join(shed.Errorf(shed.CodeInvalid, "its content has the diff ID %s, and should have %s", l.diffID, diffID), discardErr)
	}
	return l.desc, b.commit(blob, l, "")
}

// layerBlob returns what points to the blob of a layer that an image here has, and keeps the blob from being
// removed until release is called. Its size is 0 if no image has the layer.
func (s *Store) layerBlob(diffID v1.Hash) (desc v1.Descriptor, release func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	index, err := s.index()
	if err != nil {
		return desc, nil, err
	}
	for _, entry := range index.Manifests {
		chosen, err := s.choose(entry)
		if err != nil {
			continue // a damaged image, or one for another host, is no reason not to make another
		}
		manifest, cfg, err := s.manifest(chosen.Digest, chosen.MediaType)
		if err != nil {
			continue
		}
		for i, l := range manifest.Layers {
			if cfg.RootFS.DiffIDs[i] == diffID {
				return l, s.holdLocked([]v1.Hash{l.Digest}), nil
			}
		}
	}
	return desc, func() {}, nil
}
