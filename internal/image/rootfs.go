package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"

	"github.com/charliek/shed"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// Rootfs makes sure that all layers of img have a block image, and returns the
// paths of these, bottom first, and the image's configuration. It reports
// the layers that it has to convert as phase "layer".
//
// An image for another architecture, or with layers that aren't tars, is CodeUnsupported.
func (s *Store) Rootfs(ctx context.Context, img *shed.Image, p shed.Progress) ([]string, v1.ConfigFile, error) {
	paths, cfg, err := s.rootfs(ctx, img, p)
	if err != nil {
		name := img.Ref
		if name == "" {
			name = img.Digest
		}
		return nil, v1.ConfigFile{}, fmt.Errorf("image %s: %w", name, err)
	}
	return paths, *cfg, nil
}

func (s *Store) rootfs(ctx context.Context, img *shed.Image, p shed.Progress) ([]string, *v1.ConfigFile, error) {
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
	for _, l := range manifest.Layers {
		if _, ok := decompressors[l.MediaType]; !ok {
			return nil, nil, shed.Errorf(shed.CodeUnsupported, "layer %s is a %q; a layer must be a tar, plain or compressed with gzip or zstd", l.Digest, l.MediaType)
		}
	}
	paths := make([]string, len(manifest.Layers))
	for i, l := range manifest.Layers {
		diffID := cfg.RootFS.DiffIDs[i]
		if path, ok := s.layers.Path(diffID); ok {
			paths[i] = path
			continue
		}
		done := p.Phase("layer", fmt.Sprintf("converting layer %d of %d", i+1, len(manifest.Layers)))
		if paths[i], err = s.convert(ctx, l, diffID, p); err != nil {
			return nil, nil, err
		}
		done()
	}
	return paths, cfg, nil
}

func (s *Store) convert(ctx context.Context, l v1.Descriptor, diffID v1.Hash, p shed.Progress) (string, error) {
	f, err := os.Open(s.blob(l.Digest))
	if err != nil {
		return "", fmt.Errorf("layer %s: %w", l.Digest, err)
	}
	defer f.Close()
	counted := &counter{r: f, report: func(n int64) {
		p.Report(shed.Event{Phase: "layer", Current: n, Total: l.Size, Unit: "bytes"})
	}}
	r, err := decompressors[l.MediaType](counted)
	if err != nil {
		return "", fmt.Errorf("layer %s: decompressing: %w", l.Digest, err)
	}
	_, path, err := s.layers.Convert(ctx, r, diffID)
	return path, errors.Join(err, r.Close())
}

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

// counter reports every few MB how much was read.
type counter struct {
	r              io.Reader
	n, reportedFor int64
	report         func(int64)
}

func (c *counter) Read(p []byte) (int, error) {
	const step = 4 << 20
	n, err := c.r.Read(p)
	c.n += int64(n)
	if at := c.n / step; at != c.reportedFor {
		c.reportedFor = at
		c.report(c.n)
	}
	return n, err
}
