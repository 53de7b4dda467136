package image

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/rootfs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// Rootfs makes sure that all layers of img have a block image, and returns the
// paths of these, bottom first, and the image's configuration. It reports
// the layers that it has to convert as phase "convert", with an item for each.
//
// An image for another architecture, or with layers that aren't tars, is CodeUnsupported.
func (s *Store) Rootfs(ctx context.Context, img *shed.Image, p shed.Progress) ([]string, v1.ConfigFile, error) {
	return s.RootfsWithin(ctx, img, 0, p)
}

// RootfsWithin is Rootfs with at most that many block images, or any number if most is 0: as many layers as need be, from
// the bottom up, become one. It reports that as phase "merge".
func (s *Store) RootfsWithin(ctx context.Context, img *shed.Image, most int, p shed.Progress) ([]string, v1.ConfigFile, error) {
	paths, cfg, err := s.rootfs(ctx, img, most, p)
	if err != nil {
		return nil, v1.ConfigFile{}, fmt.Errorf("image %s: %w", cmp.Or(img.Ref, img.Digest), err)
	}
	return paths, *cfg, nil
}

func (s *Store) rootfs(ctx context.Context, img *shed.Image, most int, p shed.Progress) ([]string, *v1.ConfigFile, error) {
	digest, err := v1.NewHash(img.Digest)
	if err != nil {
		return nil, nil, shed.Errorf(shed.CodeInvalid, "its digest: %w", err)
	}
	manifest, cfg, err := s.manifest(digest, types.OCIManifestSchema1)
	if err != nil {
		return nil, nil, err
	}
	if cfg.Architecture != "" && cfg.Architecture != runtime.GOARCH {
		return nil, nil, shed.Errorf(shed.CodeUnsupported, "it is for %s, and this server is %s", cfg.Architecture, runtime.GOARCH)
	}
	// All of them first: a layer of an unknown kind shouldn't cost the time that the others take.
	if err := checkLayers(manifest); err != nil {
		return nil, nil, err
	}
	layers, diffIDs := manifest.Layers, cfg.RootFS.DiffIDs
	var paths []string
	if n := len(layers) - most + 1; most > 0 && n > 1 {
		path, err := s.merge(ctx, layers[:n], diffIDs[:n], p)
		if err != nil {
			return nil, nil, err
		}
		paths = append(paths, path)
		layers, diffIDs = layers[n:], diffIDs[n:]
	}
	converted, err := s.convert(ctx, layers, diffIDs, p)
	if err != nil {
		return nil, nil, err
	}
	return append(paths, converted...), cfg, nil
}

// merge makes sure that the layers have a block image together, and returns its path.
func (s *Store) merge(ctx context.Context, layers []v1.Descriptor, diffIDs []v1.Hash, p shed.Progress) (string, error) {
	if path, ok := s.layers.MergedPath(rootfs.ChainID(diffIDs...)); ok {
		return path, nil
	}
	done := p.Phase("merge", fmt.Sprintf("merging the %d lowest layers", len(layers)))
	var before, total int64 // bytes of the blobs that were read, and of all, which are read twice
	var merged []rootfs.MergeLayer
	for i, l := range layers {
		total += 2 * l.Size
		merged = append(merged, rootfs.MergeLayer{DiffID: diffIDs[i], Open: func() (io.ReadCloser, error) {
			start := before
			before += l.Size
			return s.unpackBlob(l, p, shed.Event{Phase: "merge", Current: start, Total: total})
		}})
	}
	path, err := s.layers.Merge(ctx, merged)
	if err == nil {
		done()
	}
	return path, err
}

// convert makes sure that each of the layers has a block image, and returns their paths.
func (s *Store) convert(ctx context.Context, layers []v1.Descriptor, diffIDs []v1.Hash, p shed.Progress) ([]string, error) {
	paths := make([]string, len(layers))
	var missing []v1.Descriptor
	for i, l := range layers {
		var ok bool
		if paths[i], ok = s.layers.Path(diffIDs[i]); !ok {
			missing = append(missing, l)
		}
	}
	if len(missing) == 0 {
		return paths, nil
	}
	done := p.Phase("convert", "converting layers")
	progress := newMeter("convert", p, missing)
	for i, l := range layers {
		if _, ok := s.layers.Path(diffIDs[i]); ok { // an image can have a layer twice
			continue
		}
		path, err := s.convertLayer(ctx, l, diffIDs[i], progress)
		if err != nil {
			return nil, err
		}
		paths[i] = path
	}
	done()
	return paths, nil
}

func (s *Store) convertLayer(ctx context.Context, l v1.Descriptor, diffID v1.Hash, progress *meter) (string, error) {
	u, err := s.unpackBlob(l, func(e shed.Event) { progress.report(l, e.Current, true) }, shed.Event{})
	if err != nil {
		return "", err
	}
	_, path, err := s.layers.Convert(ctx, u, diffID)
	if err = errors.Join(err, u.Close()); err == nil {
		progress.done(l, "")
	}
	return path, err
}

// unpackBlob returns a reader of what is in a layer's blob. It reports to p, as e, how much of the blob was read.
func (s *Store) unpackBlob(l v1.Descriptor, p shed.Progress, e shed.Event) (*unpacker, error) {
	f, err := os.Open(s.blob(l.Digest))
	if err != nil {
		return nil, fmt.Errorf("layer %s: %w", l.Digest, err)
	}
	u, err := newUnpacker(l, f, p, e)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return u, nil
}

// maxLayer bounds what a layer may unpack to, in bytes. A few bytes can stand for any number of them.
const maxLayer = 128 << 30

// unpacker reads what is in a layer's blob, and tells what is wrong with the blob, which is CodeInvalid, from what
// is wrong with reading it.
type unpacker struct {
	blob    io.ReadCloser
	counted io.Reader // blob
	readErr error     // of blob
	r       io.ReadCloser
	left    int64 // bytes that it may yield
}

// newUnpacker unpacks blob, and reports to p, as e, how much of it was read. To close it closes blob.
func newUnpacker(l v1.Descriptor, blob io.ReadCloser, p shed.Progress, e shed.Event) (*unpacker, error) {
	u := &unpacker{blob: blob, counted: p.Reader(blob, e), left: maxLayer}
	r, err := decompressors[l.MediaType](readerFunc(u.readBlob))
	if err != nil {
		return nil, fmt.Errorf("layer %s: %w", l.Digest, u.explain(err))
	}
	u.r = r
	return u, nil
}

func (u *unpacker) readBlob(p []byte) (int, error) {
	n, err := u.counted.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		u.readErr = err
	}
	return n, err
}

func (u *unpacker) Read(p []byte) (int, error) {
	n, err := u.r.Read(p)
	if u.left -= int64(n); u.left < 0 {
		return 0, shed.Errorf(shed.CodeInvalid, "it unpacks to more than %d GiB", int64(maxLayer)>>30)
	}
	if err != nil && !errors.Is(err, io.EOF) {
		err = u.explain(err)
	}
	return n, err
}

func (u *unpacker) explain(err error) error {
	if u.readErr != nil {
		return u.readErr
	}
	return shed.Errorf(shed.CodeInvalid, "decompressing: %w", err)
}

func (u *unpacker) Close() error { return errors.Join(u.r.Close(), u.blob.Close()) }

const dockerZstdLayer types.MediaType = "application/vnd.docker.image.rootfs.diff.tar.zstd"

var decompressors = map[types.MediaType]func(io.Reader) (io.ReadCloser, error){
	types.OCIUncompressedLayer:    plain,
	types.DockerUncompressedLayer: plain,
	types.OCILayer:                gunzip,
	types.DockerLayer:             gunzip,
	types.OCILayerZStd:            unzstd,
	dockerZstdLayer:               unzstd,
}

func plain(r io.Reader) (io.ReadCloser, error) { return io.NopCloser(r), nil }

func gunzip(r io.Reader) (io.ReadCloser, error) { return gzip.NewReader(r) }

func unzstd(r io.Reader) (io.ReadCloser, error) {
	// What a window above this needs in memory is nothing that a layer could ask for.
	d, err := zstd.NewReader(r, zstd.WithDecoderMaxWindow(128<<20))
	if err != nil {
		return nil, err
	}
	return d.IOReadCloser(), nil
}
