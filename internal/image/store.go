// Package image keeps OCI images in an OCI layout on disk, builds them, and
// hands out what a shed boots from: an image's layers as block images, and its configuration.
package image

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/rootfs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

const (
	refName    = "org.opencontainers.image.ref.name"
	tempPrefix = ".tmp-"
	// minPrefix is how many hex digits of a digest can stand for it.
	minPrefix = 12
)

// Store is an OCI layout: blobs/, and index.json, whose annotations hold the
// tags. A manifest that lost its tag stays in the index, since sheds
// may use it by its digest.
//
// Everything in it is complete and synced when it appears. Methods may be called concurrently; only
// one process may write to the layout, while any may read it.
type Store struct {
	dir    string
	layers *rootfs.Layers

	mu       sync.Mutex // held to change index.json
	building sync.Mutex // held during a build
}

// Open opens the layout in dir, which it makes if need be, and removes what
// killed processes left there. Block images come from and go to layers.
func Open(dir string, layers *rootfs.Layers) (*Store, error) {
	s := &Store{dir: dir, layers: layers}
	if err := s.open(); err != nil {
		return nil, fmt.Errorf("opening the images: %w", err)
	}
	return s, nil
}

func (s *Store) open() error {
	if err := os.MkdirAll(filepath.Join(s.dir, "blobs", "sha256"), 0o755); err != nil {
		return err
	}
	left, err := filepath.Glob(filepath.Join(s.dir, tempPrefix+"*"))
	if err != nil {
		return err
	}
	for _, p := range left {
		if err := os.Remove(p); err != nil {
			return fmt.Errorf("removing the leftover of a killed process: %w", err)
		}
	}
	if err := s.writeMissing("oci-layout", map[string]string{"imageLayoutVersion": "1.0.0"}); err != nil {
		return err
	}
	empty := v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex, Manifests: []v1.Descriptor{}}
	if err := s.writeMissing("index.json", empty); err != nil {
		return err
	}
	_, err = s.index()
	return err
}

// List returns all images, sorted by reference; those that have lost their tag come first. It leaves InUse empty.
func (s *Store) List(ctx context.Context) ([]*shed.Image, error) {
	index, err := s.index()
	if err != nil {
		return nil, err
	}
	images := make([]*shed.Image, 0, len(index.Manifests))
	for _, desc := range index.Manifests {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		img, err := s.image(desc)
		if err != nil {
			return nil, err
		}
		images = append(images, img)
	}
	slices.SortFunc(images, func(a, b *shed.Image) int {
		return strings.Compare(a.Ref+"\x00"+a.Digest, b.Ref+"\x00"+b.Digest)
	})
	return images, nil
}

// Resolve returns the image that ref names: a tag, a digest of a manifest with or without
// "sha256:", or at least 12 hex digits that only one digest starts with. No such image is CodeNoImage, several are CodeInvalid.
func (s *Store) Resolve(ref string) (*shed.Image, error) {
	index, err := s.index()
	if err != nil {
		return nil, err
	}
	var tags []string
	found := make(map[v1.Hash]v1.Descriptor)
	prefix := strings.TrimPrefix(ref, "sha256:")
	for _, desc := range index.Manifests {
		tag := desc.Annotations[refName]
		if tag == ref && tag != "" {
			return s.image(desc)
		}
		if tag != "" {
			tags = append(tags, tag)
		}
		if len(prefix) < minPrefix || !strings.HasPrefix(desc.Digest.Hex, prefix) {
			continue
		}
		if _, ok := found[desc.Digest]; !ok || tag != "" {
			found[desc.Digest] = desc
		}
	}
	switch len(found) {
	case 0:
		return nil, noImage(ref, tags)
	case 1:
		for _, desc := range found {
			return s.image(desc)
		}
	}
	return nil, shed.Errorf(shed.CodeInvalid, "%d images have a digest that starts with %q", len(found), ref).
		WithHint("give more digits of it")
}

func noImage(ref string, tags []string) error {
	err := shed.Errorf(shed.CodeNoImage, "there is no image %q", ref)
	if len(tags) == 0 {
		return err.WithHint("there are no images yet: `shed image build base` makes the first one")
	}
	slices.Sort(tags)
	const most = 10
	more := ""
	if len(tags) > most {
		tags, more = tags[:most], ", ..."
	}
	return err.WithHint("there are: %s%s; `shed image build base` makes the base image", strings.Join(tags, ", "), more)
}

// image describes the image whose manifest desc points to.
func (s *Store) image(desc v1.Descriptor) (*shed.Image, error) {
	name := desc.Annotations[refName]
	if name == "" {
		name = desc.Digest.String()
	}
	manifest, cfg, err := s.manifest(desc.Digest, desc.MediaType)
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", name, err)
	}
	img := &shed.Image{
		Ref:       desc.Annotations[refName],
		Digest:    desc.Digest.String(),
		InUse:     []string{},
		CreatedAt: cfg.Created.Time,
		Layers:    make([]shed.Layer, 0, len(manifest.Layers)),
	}
	files := map[string]struct{}{s.blob(desc.Digest): {}, s.blob(manifest.Config.Digest): {}}
	for i, l := range manifest.Layers {
		diffID := cfg.RootFS.DiffIDs[i]
		layer := shed.Layer{Digest: l.Digest.String(), DiffID: diffID.String(), Size: l.Size}
		files[s.blob(l.Digest)] = struct{}{}
		if path, ok := s.layers.Path(diffID); ok {
			layer.BlockImage = rootfs.DiskUsage(path)
			files[path] = struct{}{}
		}
		img.Layers = append(img.Layers, layer)
	}
	for path := range files {
		img.Size += rootfs.DiskUsage(path)
	}
	return img, nil
}

// manifest reads an image's manifest and configuration, which have the same number of layers.
func (s *Store) manifest(digest v1.Hash, mediaType types.MediaType) (*v1.Manifest, *v1.ConfigFile, error) {
	if !mediaType.IsImage() {
		return nil, nil, shed.Errorf(shed.CodeUnsupported, "its manifest is a %q, which is no image", mediaType)
	}
	raw, err := s.readBlob(digest)
	if err != nil {
		return nil, nil, err
	}
	manifest, err := v1.ParseManifest(bytes.NewReader(raw))
	if err != nil {
		return nil, nil, fmt.Errorf("%s is no manifest: %w", s.blob(digest), err)
	}
	raw, err = s.readBlob(manifest.Config.Digest)
	if err != nil {
		return nil, nil, err
	}
	cfg, err := v1.ParseConfigFile(bytes.NewReader(raw))
	if err != nil {
		return nil, nil, fmt.Errorf("%s is no image configuration: %w", s.blob(manifest.Config.Digest), err)
	}
	if len(manifest.Layers) != len(cfg.RootFS.DiffIDs) {
		return nil, nil, shed.Errorf(shed.CodeInvalid, "its manifest has %d layers, its configuration %d",
			len(manifest.Layers), len(cfg.RootFS.DiffIDs))
	}
	return manifest, cfg, nil
}

func (s *Store) path(name string) string { return filepath.Join(s.dir, name) }

func (s *Store) blob(digest v1.Hash) string {
	return filepath.Join(s.dir, "blobs", digest.Algorithm, digest.Hex)
}

// readBlob returns the content of a blob that fits into memory, and makes sure that it is that.
func (s *Store) readBlob(digest v1.Hash) ([]byte, error) {
	b, err := os.ReadFile(s.blob(digest))
	if err != nil {
		return nil, err
	}
	if sum := sha256.Sum256(b); digest.Hex != hex.EncodeToString(sum[:]) {
		return nil, fmt.Errorf("%s is damaged: its content does not have that digest", s.blob(digest))
	}
	return b, nil
}

// writeJSON makes v a blob and returns where it is.
func (s *Store) writeJSON(v any, mediaType types.MediaType) (v1.Descriptor, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return v1.Descriptor{}, err
	}
	sum := sha256.Sum256(b)
	digest := v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(sum[:])}
	if err := s.writeFile(s.blob(digest), b); err != nil {
		return v1.Descriptor{}, err
	}
	return v1.Descriptor{MediaType: mediaType, Size: int64(len(b)), Digest: digest}, nil
}

func (s *Store) writeMissing(name string, v any) error {
	if _, err := os.Lstat(s.path(name)); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return s.writeFile(s.path(name), b)
}

// writeFile makes a file of b at path, at once and durably.
func (s *Store) writeFile(path string, b []byte) error {
	f, err := s.createTemp()
	if err != nil {
		return err
	}
	if _, err := f.Write(b); err != nil {
		return errors.Join(rootfs.NoSpace(err, s.dir), f.Close(), os.Remove(f.Name()))
	}
	return rootfs.Commit(f, path, 0o644)
}

func (s *Store) createTemp() (*os.File, error) {
	f, err := os.CreateTemp(s.dir, tempPrefix)
	return f, rootfs.NoSpace(err, s.dir)
}

func (s *Store) index() (*v1.IndexManifest, error) {
	path := s.path("index.json")
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	index, err := v1.ParseIndexManifest(bytes.NewReader(b))
	if err != nil {
		return nil, fmt.Errorf("%s is damaged: %w", path, err)
	}
	return index, nil
}

// tag makes name the tag of the manifest that desc points to, and of no other.
func (s *Store) tag(desc v1.Descriptor, name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	index, err := s.index()
	if err != nil {
		return err
	}
	var untagged []v1.Descriptor
	manifests := slices.DeleteFunc(index.Manifests, func(d v1.Descriptor) bool {
		tag := d.Annotations[refName]
		if tag == name && d.Digest != desc.Digest {
			delete(d.Annotations, refName)
			untagged = append(untagged, d)
		}
		return tag == name || tag == "" && d.Digest == desc.Digest
	})
	desc.Annotations = map[string]string{refName: name}
	manifests = append(manifests, desc)
	for _, d := range untagged {
		if !slices.ContainsFunc(manifests, func(o v1.Descriptor) bool { return o.Digest == d.Digest }) {
			manifests = append(manifests, d)
		}
	}
	index.Manifests = manifests
	b, err := json.MarshalIndent(index, "", "  ")
	if err != nil {
		return err
	}
	return s.writeFile(s.path("index.json"), b)
}
