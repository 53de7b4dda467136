package image

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"runtime"
	"slices"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/rootfs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// Load takes in all images of an OCI archive, or of one by docker save, which may be compressed with gzip or zstd, and
// makes those for this host ready to boot from. It returns an image for each tag, and one for an image
// without. On error there are none. Of an image for several platforms it takes the one for this host, or else the first
// that the archive has. Phases: "load", and those of Rootfs.
//
// Everything is checked against its digest. An archive that is damaged, or reaches out of itself, is CodeInvalid. A
// name in the archive that can't be a tag here is none.
//
// The layers of docker save are stored as they come, which is as plain tars: an archive that is loaded again makes the same
// image, and finds all of it here, which it wouldn't if our compressor had its say.
func (s *Store) Load(ctx context.Context, archive io.Reader, p shed.Progress) ([]*shed.Image, error) {
	done := p.Phase("load", "reading the archive")
	dir, err := os.MkdirTemp(s.dir, tempPrefix+"load-")
	if err != nil {
		return nil, rootfs.NoSpace(err, s.dir)
	}
	images, err := s.load(ctx, dir, archive, p, done)
	return images, errors.Join(err, os.RemoveAll(dir))
}

func (s *Store) load(ctx context.Context, dir string, archive io.Reader, p shed.Progress, done func()) ([]*shed.Image, error) {
	a, err := unpack(ctx, dir, p.Reader(archive, shed.Event{Phase: "load"}))
	if err != nil {
		return nil, err
	}
	images, err := a.images(ctx)
	if err != nil {
		return nil, err
	}
	done()
	return s.takeIn(ctx, images, p)
}

// inImage is an image of an archive.
type inImage struct {
	desc    v1.Descriptor // of the manifest
	blobs   []inFile      // layers and configuration, and the manifest unless that is ours
	raw     []byte        // the manifest, if it is ours
	diffIDs []v1.Hash
	host    bool // it is for this host
	tags    []string
}

// name returns a tag of the image, or "" where it has none.
func (img inImage) name() string {
	if len(img.tags) == 0 {
		return ""
	}
	return img.tags[0]
}

// images reads what images there are.
func (a *inArchive) images(ctx context.Context) ([]inImage, error) {
	var found []inImage
	var err error
	if f, ok := a.file("index.json"); ok {
		found, err = a.ociImages(f)
	} else if f, ok := a.file("manifest.json"); ok {
		found, err = a.dockerImages(ctx, f)
	} else {
		err = badArchive("it has neither index.json nor manifest.json, so it holds no images")
	}
	if err != nil {
		return nil, err
	}
	var images []inImage
	tagged := map[string]v1.Hash{}
	for _, img := range found {
		for _, tag := range img.tags {
			if other, ok := tagged[tag]; ok && other != img.desc.Digest {
				return nil, badArchive("it has two images with the tag %s", tag)
			}
			tagged[tag] = img.desc.Digest
		}
		if i := slices.IndexFunc(images, func(o inImage) bool { return o.desc.Digest == img.desc.Digest }); i >= 0 {
			images[i].tags = append(images[i].tags, img.tags...)
			continue
		}
		images = append(images, img)
	}
	for i := range images {
		slices.Sort(images[i].tags)
		images[i].tags = slices.Compact(images[i].tags)
	}
	if len(images) == 0 {
		return nil, badArchive("it has no images")
	}
	return images, nil
}

// tagsOf returns those of names that can be tags here, as they are here.
func tagsOf(names ...string) []string {
	var tags []string
	for _, name := range names {
		if tag, err := checkTag(name); err == nil {
			tags = append(tags, tag)
		}
	}
	return tags
}

func (a *inArchive) ociImages(indexFile inFile) ([]inImage, error) {
	var index v1.IndexManifest
	if err := indexFile.json("index.json", &index); err != nil {
		return nil, err
	}
	if len(index.Manifests) > maxImages {
		return nil, badArchive("it has %d images, and may have %d", len(index.Manifests), maxImages)
	}
	var images []inImage
	for _, desc := range index.Manifests {
		chosen, err := a.choose(desc)
		if err != nil {
			return nil, err
		}
		img, err := a.ociImage(chosen)
		if err != nil {
			return nil, err
		}
		name, ok := desc.Annotations[containerdName]
		if !ok {
			name = desc.Annotations[refName]
		}
		img.tags = tagsOf(name)
		images = append(images, img)
	}
	return images, nil
}

// choose returns the manifest that is taken of what desc points to: an image, or an index of images.
func (a *inArchive) choose(desc v1.Descriptor) (v1.Descriptor, error) {
	var candidates []v1.Descriptor
	if err := a.candidates(desc, map[v1.Hash]bool{}, &candidates); err != nil {
		return v1.Descriptor{}, err
	}
	if len(candidates) == 0 {
		return v1.Descriptor{}, badArchive("it has no image of the index %s", desc.Digest)
	}
	for _, d := range candidates {
		if d.Platform != nil && forHost(*d.Platform) {
			return d, nil
		}
	}
	return candidates[0], nil
}

// candidates finds the images that desc leads to. Those of an index that the archive hasn't are left out, and so is what
// tells of other images.
func (a *inArchive) candidates(desc v1.Descriptor, seen map[v1.Hash]bool, found *[]v1.Descriptor) error {
	if desc.MediaType.IsImage() {
		if desc.Platform == nil || desc.Platform.OS != "unknown" {
			*found = append(*found, desc)
		}
		return nil
	}
	if !desc.MediaType.IsIndex() {
		return badArchive("%s is a %q, which is no image", desc.Digest, desc.MediaType)
	}
	if seen[desc.Digest] {
		return nil
	}
	if seen[desc.Digest] = true; len(seen) > maxIndexes {
		return badArchive("it has more than %d indexes in one", maxIndexes)
	}
	f, err := a.blob(desc)
	if err != nil {
		return err
	}
	var index v1.IndexManifest
	if err := f.json("index "+desc.Digest.String(), &index); err != nil {
		return err
	}
	for _, d := range index.Manifests {
		_, here := a.file(blobPath(d.Digest))
		if !here || !d.MediaType.IsImage() && !d.MediaType.IsIndex() {
			continue
		}
		if len(*found) == maxImages {
			return badArchive("it has more than %d images in an index", maxImages)
		}
		if d.MediaType.IsImage() && d.Platform == nil {
			img, err := a.ociImage(d)
			if err != nil {
				return err
			}
			if img.host {
				d.Platform = &v1.Platform{OS: "linux", Architecture: runtime.GOARCH}
			}
		}
		if err := a.candidates(d, seen, found); err != nil {
			return err
		}
	}
	return nil
}

func (a *inArchive) ociImage(desc v1.Descriptor) (inImage, error) {
	img := inImage{desc: v1.Descriptor{MediaType: desc.MediaType, Size: desc.Size, Digest: desc.Digest}}
	f, err := a.blob(desc)
	if err != nil {
		return img, err
	}
	var manifest v1.Manifest
	if err := f.json("manifest "+desc.Digest.String(), &manifest); err != nil {
		return img, err
	}
	config, err := a.blob(manifest.Config)
	if err != nil {
		return img, err
	}
	if err := img.configure(config); err != nil {
		return img, err
	}
	if len(manifest.Layers) != len(img.diffIDs) {
		return img, badArchive("the manifest of image %s has %d layers, its configuration %d", desc.Digest, len(manifest.Layers), len(img.diffIDs))
	}
	for _, l := range manifest.Layers {
		layer, err := a.blob(l)
		if err != nil {
			return img, err
		}
		img.blobs = append(img.blobs, layer)
	}
	img.blobs = append(img.blobs, config, f)
	return img, nil
}

// configure reads the image's configuration.
func (img *inImage) configure(f inFile) error {
	var cfg v1.ConfigFile
	if err := f.json("configuration "+f.digest.String(), &cfg); err != nil {
		return err
	}
	img.diffIDs = cfg.RootFS.DiffIDs
	img.host = forHost(v1.Platform{OS: cfg.OS, Architecture: cfg.Architecture})
	img.desc.Platform = cfg.Platform()
	return nil
}

func (a *inArchive) dockerImages(ctx context.Context, manifest inFile) ([]inImage, error) {
	var entries []dockerImage
	if err := manifest.json("manifest.json", &entries); err != nil {
		return nil, err
	}
	if len(entries) > maxImages {
		return nil, badArchive("it has %d images, and may have %d", len(entries), maxImages)
	}
	var images []inImage
	for _, e := range entries {
		img, err := a.dockerImage(ctx, e)
		if err != nil {
			return nil, err
		}
		images = append(images, img)
	}
	return images, nil
}

// dockerImage makes a manifest for an image of docker save.
func (a *inArchive) dockerImage(ctx context.Context, e dockerImage) (inImage, error) {
	img := inImage{tags: tagsOf(e.RepoTags...)}
	config, ok := a.file(e.Config)
	if !ok {
		return img, badArchive("it has no %q, an image's configuration", e.Config)
	}
	if err := img.configure(config); err != nil {
		return img, err
	}
	if len(e.Layers) != len(img.diffIDs) {
		return img, badArchive("image %q has %d layers, its configuration %d", e.Config, len(e.Layers), len(img.diffIDs))
	}
	m := v1.Manifest{
		SchemaVersion: 2, MediaType: types.OCIManifestSchema1, Layers: []v1.Descriptor{},
		Config: v1.Descriptor{MediaType: types.OCIConfigJSON, Size: config.size, Digest: config.digest},
	}
	for i, name := range e.Layers {
		layer, ok := a.file(name)
		if !ok {
			return img, badArchive("it has no %q, a layer of image %q", name, e.Config)
		}
		l, err := a.asLayer(ctx, layer)
		if ctx.Err() != nil {
			return img, ctx.Err()
		}
		if err != nil {
			return img, badArchive("layer %q: %w", name, err)
		}
		if l.diffID != img.diffIDs[i] {
			return img, badArchive("layer %q has the content of another: its diff ID is %s, and should be %s", name, l.diffID, img.diffIDs[i])
		}
		m.Layers = append(m.Layers, v1.Descriptor{MediaType: l.mediaType, Size: layer.size, Digest: layer.digest})
		img.blobs = append(img.blobs, layer)
	}
	img.blobs = append(img.blobs, config)
	var err error
	if img.raw, err = json.Marshal(m); err != nil {
		return img, err
	}
	platform := img.desc.Platform
	img.desc = descriptor(img.raw, types.OCIManifestSchema1)
	img.desc.Platform = platform
	return img, nil
}

// takeIn makes images of an archive images of the store, all or none.
func (s *Store) takeIn(ctx context.Context, images []inImage, p shed.Progress) (_ []*shed.Image, err error) {
	added, err := s.newAddition()
	if err != nil {
		return nil, err
	}
	defer func() { err = added.end(err) }()
	for _, img := range images {
		added.hold(img.desc.Digest)
		for _, f := range img.blobs {
			added.hold(f.digest)
		}
		added.hold(blockImages(img.diffIDs)...)
	}
	var descs []v1.Descriptor
	var tags []string
	written := map[v1.Hash]bool{}
	for _, img := range images {
		if err := s.takeInBlobs(ctx, img, written); err != nil {
			return nil, err
		}
		if img.host {
			if _, _, err := s.Rootfs(ctx, &shed.Image{Digest: img.desc.Digest.String(), Ref: img.name()}, p); err != nil {
				return nil, err
			}
		}
		if len(img.tags) == 0 {
			img.tags = []string{""}
		}
		for _, tag := range img.tags {
			descs, tags = append(descs, img.desc), append(tags, tag)
		}
	}
	var out []*shed.Image
	for i, desc := range descs {
		img, err := s.image(withTag(desc, tags[i]))
		if err != nil {
			return nil, err
		}
		out = append(out, img)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, err := s.setTags(descs, tags); err != nil {
		return nil, err
	}
	return out, nil
}

// takeInBlobs moves an image's blobs to their place, over any damaged ones that are there, and its manifest last.
func (s *Store) takeInBlobs(ctx context.Context, img inImage, written map[v1.Hash]bool) error {
	for _, b := range img.blobs {
		if written[b.digest] {
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		f, err := os.OpenFile(b.path, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		if err := rootfs.Commit(f, s.blob(b.digest), 0o644); err != nil {
			return err
		}
		written[b.digest] = true
	}
	if img.raw == nil {
		return nil
	}
	return s.writeFile(s.blob(img.desc.Digest), img.raw)
}
