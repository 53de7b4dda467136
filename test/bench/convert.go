//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/rootfs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"
)

// conversion measures a layer's way to a block image, from its tar in memory, in turn with the unpacking of that tar, and
// mkfs.erofs of what was unpacked. All rates are of the tar's bytes.
func (b *bench) conversion() error {
	tar := filepath.Join(b.dir, "layer.tar")
	size, err := b.writeLargest(tar)
	if err != nil {
		return err
	}
	erofs := !b.lacks("`mkfs.erofs` beside the conversion of a layer", "mkfs.erofs", "erofs-utils")
	layers, err := rootfs.OpenLayers(filepath.Join(b.dir, "converted"))
	if err != nil {
		return err
	}
	tree, image := filepath.Join(b.dir, "tree"), filepath.Join(b.dir, "erofs.img")
	var converts, tars, mkfss []time.Duration
	var ext4Size, erofsSize int64
	runs := min(b.runs, slowRuns)
	for range runs {
		d, path, err := convert(layers, tar)
		if err != nil {
			return err
		}
		converts = append(converts, d)
		ext4Size = rootfs.DiskUsage(path)
		if err := errors.Join(os.Remove(path), os.Mkdir(tree, 0o755)); err != nil {
			return err
		}
		unix.Sync()
		// Who isn't root can't make devices.
		_, d, err = timed(exec.Command("tar", "-xf", tar, "-C", tree, "--numeric-owner", "--xattrs", "--xattrs-include=*", "--anchored", "--exclude=./dev/*", "--exclude=dev/*"))
		if err != nil {
			return err
		}
		tars = append(tars, d)
		if erofs {
			unix.Sync()
			if _, d, err = timed(exec.Command("mkfs.erofs", "--quiet", image, tree)); err != nil {
				return err
			}
			mkfss = append(mkfss, d)
			erofsSize = rootfs.DiskUsage(image)
			if err := os.Remove(image); err != nil {
				return err
			}
		}
		if err := os.RemoveAll(tree); err != nil {
			return err
		}
	}
	beside := "`tar -x` of it, not synced: " + rate(size, mid(tars))
	if erofs {
		beside += fmt.Sprintf("; `mkfs.erofs`, uncompressed, of the unpacked directory: %s, %s", rate(size, mid(mkfss)), mb(erofsSize))
	}
	row(fmt.Sprintf("conversion of a layer, a tar of %s in memory, to a block image, hashed and synced; medians of %d", mb(size), runs),
		rate(size, mid(converts))+", "+mb(ext4Size), beside, "")
	return nil
}

func mb(n int64) string { return fmt.Sprintf("%.0f MB", float64(n)/1e6) }

// writeLargest writes the tar of the image's largest layer, and returns its bytes.
func (b *bench) writeLargest(path string) (n int64, err error) {
	img, err := b.stored(b.image)
	if err != nil {
		return 0, err
	}
	m, err := img.Manifest()
	if err != nil {
		return 0, err
	}
	if len(m.Layers) == 0 {
		return 0, fmt.Errorf("image %s has no layers", b.image)
	}
	largest := slices.MaxFunc(m.Layers, func(x, y v1.Descriptor) int { return int(x.Size - y.Size) })
	layer, err := img.LayerByDigest(largest.Digest)
	if err != nil {
		return 0, err
	}
	r, err := layer.Uncompressed()
	if err != nil {
		return 0, err
	}
	defer r.Close()
	f, err := os.Create(path)
	if err != nil {
		return 0, err
	}
	n, err = io.Copy(f, r)
	return n, errors.Join(err, f.Close())
}

// convert makes the block image of a tar that is in the page cache.
func convert(layers *rootfs.Layers, tar string) (time.Duration, string, error) {
	f, err := os.Open(tar)
	if err != nil {
		return 0, "", err
	}
	defer f.Close()
	if _, err := io.Copy(struct{ io.Writer }{io.Discard}, f); err != nil {
		return 0, "", err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return 0, "", err
	}
	unix.Sync()
	start := time.Now()
	_, path, err := layers.Convert(context.Background(), f, v1.Hash{})
	return time.Since(start), path, err
}

// disk compares what all presets take together with what the one with most layers takes alone.
func (b *bench) disk() error {
	all, full := map[string]bool{}, presets[len(presets)-1]
	var alone int64
	for _, preset := range presets {
		files, err := b.files(preset)
		if shed.ErrorCode(err) == shed.CodeNoImage {
			b.leaveOut("the disk of %s together: there is no image %s; run with -image %s, which builds them in minutes, or with the -cache of a server that has done `shed image build` of each",
				strings.Join(presets, ", "), preset, full)
			return nil
		}
		if err != nil {
			return err
		}
		if preset == full {
			alone = rootfs.DiskUsage(files...)
		}
		for _, f := range files {
			all[f] = true
		}
	}
	var together int64
	for f := range all {
		together += rootfs.DiskUsage(f)
	}
	row("disk of the images "+strings.Join(presets, ", ")+" together, blobs and block images", fmt.Sprintf("%.2f MB", float64(together)/1e6),
		fmt.Sprintf("`%s` alone: %.2f MB", full, float64(alone)/1e6), "")
	return nil
}

// files returns the blobs and block images of an image that is ready to boot.
func (b *bench) files(name string) ([]string, error) {
	img, err := b.stored(name)
	if err != nil {
		return nil, err
	}
	digest, err := img.Digest()
	if err != nil {
		return nil, err
	}
	m, err := img.Manifest()
	if err != nil {
		return nil, err
	}
	config, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	blob := func(h v1.Hash) string { return filepath.Join(b.state, "images", "blobs", h.Algorithm, h.Hex) }
	files := []string{blob(digest), blob(m.Config.Digest)}
	for _, l := range m.Layers {
		files = append(files, blob(l.Digest))
	}
	for _, h := range config.RootFS.DiffIDs {
		files = append(files, filepath.Join(b.state, "layers", h.Algorithm, h.Hex+".img"))
	}
	for _, f := range files {
		if _, err := os.Stat(f); err != nil {
			return nil, fmt.Errorf("image %s is not ready to boot: %w", name, err)
		}
	}
	return files, nil
}
