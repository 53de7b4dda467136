package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/rootfs"
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
	added, err := s.newAddition()
	if err != nil {
		return nil, err
	}
	defer func() { err = added.end(err) }()
	diffIDs := cfg.RootFS.DiffIDs
	added.hold(diffIDs...)
	blobs, release, err := s.layerBlobs(diffIDs)
	if err != nil {
		return nil, err
	}
	added.keep(release)
	manifest := v1.Manifest{SchemaVersion: 2, MediaType: types.OCIManifestSchema1, Layers: []v1.Descriptor{}}
	for i, diffID := range diffIDs {
		desc, ok := blobs[diffID]
		if !ok {
			done := p.Phase("layer", fmt.Sprintf("storing layer %d of %d", i+1, len(diffIDs)))
			if desc, err = added.take(ctx, diffID, open); err != nil {
				return nil, fmt.Errorf("layer %d of %d: %w", i+1, len(diffIDs), err)
			}
			done()
			blobs[diffID] = desc
		}
		manifest.Layers = append(manifest.Layers, desc)
	}
	if manifest.Config, err = added.write(config, types.OCIConfigJSON); err != nil {
		return nil, err
	}
	desc, err := added.writeJSON(manifest, types.OCIManifestSchema1)
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
func (a *addition) take(ctx context.Context, diffID v1.Hash, open func(ctx context.Context, diffID v1.Hash) io.ReadCloser) (v1.Descriptor, error) {
	r := open(ctx, diffID)
	blob, l, err := a.layer(ctx, r)
	if err = errors.Join(err, r.Close()); err != nil {
		return v1.Descriptor{}, err
	}
	if l.diffID != diffID {
		discardErr := errors.Join(blob.Close(), os.Remove(blob.Name()))
		return v1.Descriptor{}, errors.Join(shed.Errorf(shed.CodeInvalid, "its content has the diff ID %s, and should have %s", l.diffID, diffID), discardErr)
	}
	return l.desc, rootfs.Commit(blob, a.store.blob(l.desc.Digest), 0o644)
}

// layerBlobs returns what points to the blobs of those layers that images here have, by diff ID, and keeps the
// blobs from being removed until release is called.
func (s *Store) layerBlobs(diffIDs []v1.Hash) (blobs map[v1.Hash]v1.Descriptor, release func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	index, err := s.index()
	if err != nil {
		return nil, nil, err
	}
	blobs = map[v1.Hash]v1.Descriptor{}
	var digests []v1.Hash
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
			diffID := cfg.RootFS.DiffIDs[i]
			if _, found := blobs[diffID]; !found && slices.Contains(diffIDs, diffID) {
				blobs[diffID] = l
				digests = append(digests, l.Digest)
			}
		}
	}
	return blobs, s.holdLocked(digests), nil
}
