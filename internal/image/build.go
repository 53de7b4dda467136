package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"sync"
	"time"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/rootfs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"
)

// BuildPreset builds the named preset, "base", and gives it that tag; until then, the
// tag stays what it was. It reports phases "bootstrap", "layer" and "image".
//
// An unknown preset is CodeInvalid, another build under way CodeConflict, and a host that lacks what
// it takes CodeUnsupported.
func (s *Store) BuildPreset(ctx context.Context, preset string, p shed.Progress) (*shed.Image, error) {
	if preset != "base" {
		return nil, shed.Errorf(shed.CodeInvalid, "there is no preset %q", preset).WithHint("`shed image build base`")
	}
	if !s.building.TryLock() {
		return nil, shed.Errorf(shed.CodeConflict, "an image is being built already").WithHint("wait until it is done")
	}
	defer s.building.Unlock()
	desc, err := s.build(ctx, preset, p)
	if err != nil {
		return nil, fmt.Errorf("building image %s: %w", preset, err)
	}
	return s.image(desc)
}

func (s *Store) build(ctx context.Context, preset string, p shed.Progress) (v1.Descriptor, error) {
	now := time.Now().UTC().Truncate(time.Second)
	p = serialize(p)
	bootstrapped := p.Phase("bootstrap", "installing packages")
	b, err := startBootstrap(ctx, func(message string) {
		p.Report(shed.Event{Phase: "bootstrap", Message: message})
	})
	if err != nil {
		return v1.Descriptor{}, err
	}
	tar := &counter{r: b, report: func(n int64) {
		p.Report(shed.Event{Phase: "bootstrap", Current: n, Unit: "bytes"})
	}}
	blob, layerDesc, diffID, err := s.addLayer(ctx, tar)
	if err = errors.Join(err, b.stop(err)); err != nil {
		if ctx.Err() != nil {
			err = ctx.Err() // that the program died of it is no news
		}
		return v1.Descriptor{}, err
	}
	bootstrapped()

	stored := p.Phase("layer", "storing the layer")
	if err := rootfs.Commit(blob, s.blob(layerDesc.Digest), 0o644); err != nil {
		return v1.Descriptor{}, err
	}
	stored()

	finished := p.Phase("image", "storing the image")
	config, err := s.writeJSON(v1.ConfigFile{
		Architecture: runtime.GOARCH,
		OS:           "linux",
		Created:      v1.Time{Time: now},
		Config: v1.Config{
			Env: []string{
				"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
				"LANG=C.UTF-8",
			},
			Cmd:        []string{"/bin/bash"},
			User:       "shed",
			WorkingDir: "/home/shed",
		},
		RootFS: v1.RootFS{Type: "layers", DiffIDs: []v1.Hash{diffID}},
		History: []v1.History{{
			Created:   v1.Time{Time: now},
			CreatedBy: "shed image build " + preset,
			Comment:   b.description,
		}},
	}, types.OCIConfigJSON)
	if err != nil {
		return v1.Descriptor{}, err
	}
	manifest, err := s.writeJSON(v1.Manifest{
		SchemaVersion: 2,
		MediaType:     types.OCIManifestSchema1,
		Config:        config,
		Layers:        []v1.Descriptor{layerDesc},
		Annotations:   map[string]string{"org.opencontainers.image.created": now.Format(time.RFC3339)},
	}, types.OCIManifestSchema1)
	if err != nil {
		return v1.Descriptor{}, err
	}
	manifest.Platform = &v1.Platform{Architecture: runtime.GOARCH, OS: "linux"}
	if err := s.tag(manifest, preset); err != nil {
		return v1.Descriptor{}, err
	}
	finished()
	manifest.Annotations = map[string]string{refName: preset}
	return manifest, nil
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

// addLayer reads a layer's tar once, and makes of it the block image and a compressed
// blob, which it returns for the caller to commit.
func (s *Store) addLayer(ctx context.Context, tar io.Reader) (blob *os.File, desc v1.Descriptor, diffID v1.Hash, err error) {
	blob, err = s.createTemp()
	if err != nil {
		return nil, v1.Descriptor{}, v1.Hash{}, err
	}
	digest := sha256.New()
	compressor, err := zstd.NewWriter(io.MultiWriter(blob, digest), zstd.WithEncoderLevel(zstd.SpeedDefault))
	if err == nil {
		diffID, _, err = s.layers.Convert(ctx, io.TeeReader(tar, compressor), v1.Hash{})
		err = errors.Join(err, compressor.Close())
	}
	size, serr := blob.Seek(0, io.SeekEnd)
	if err = errors.Join(err, serr); err != nil {
		return nil, v1.Descriptor{}, v1.Hash{}, errors.Join(rootfs.NoSpace(err, s.dir), blob.Close(), os.Remove(blob.Name()))
	}
	return blob, v1.Descriptor{
		MediaType: types.OCILayerZStd,
		Size:      size,
		Digest:    v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(digest.Sum(nil))},
	}, diffID, nil
}
