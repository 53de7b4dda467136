package rootfs

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// MergeLayer is a layer that is to be merged with others.
type MergeLayer struct {
	DiffID v1.Hash
	// Open returns the layer's uncompressed tar. It is called twice.
	Open func() (io.ReadCloser, error)
}

// ChainID returns the ID, as OCI defines it, of the layers with the given diff IDs, bottom first,
// put upon each other. There must be at least one.
func ChainID(diffIDs ...v1.Hash) v1.Hash {
	chain := diffIDs[0]
	for _, id := range diffIDs[1:] {
		sum := sha256.Sum256([]byte(chain.String() + " " + id.String()))
		chain = v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(sum[:])}
	}
	return chain
}

// MergedPath returns the path of the block image of the layers with that chain ID,
// and whether Merge has made it.
func (l *Layers) MergedPath(chainID v1.Hash) (string, bool) {
	return findImage(l.chains, chainID)
}

// Merge makes one block image of layers, bottom first, and returns its path. The image is for the
// bottom of a stack: it holds no whiteouts. It is kept under the layers' chain ID; no layer is read if it is
// there already, and concurrent calls do the work once.
//
// What the image holds is what overlayfs makes of the layers when Convert has converted each, with
// two differences, since here the lower layers are known. A directory for which a layer has no entry keeps the
// metadata that it has below. And a hard link may lead to a file in a lower layer,
// as it is below that link's layer.
//
// Errors are as those of Convert.
func (l *Layers) Merge(ctx context.Context, layers []MergeLayer) (string, error) {
	if len(layers) == 0 {
		return "", invalid("there are no layers to merge")
	}
	ids := make([]v1.Hash, len(layers))
	for i, layer := range layers {
		if err := checkDiffID(layer.DiffID); err != nil {
			return "", err
		}
		ids[i] = layer.DiffID
	}
	path := imagePath(l.chains, ChainID(ids...))
	release, err := l.lock(ctx, path)
	if err != nil {
		return "", fmt.Errorf("merging %d layers: %w", len(layers), err)
	}
	defer release()
	if isFile(path) {
		return path, nil
	}
	if err := l.merge(ctx, layers, path); err != nil {
		return "", fmt.Errorf("merging %d layers: %w", len(layers), err)
	}
	return path, nil
}

func (l *Layers) merge(ctx context.Context, layers []MergeLayer, path string) error {
	merged, err := mergeTrees(ctx, layers)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(l.chains, tempPrefix+"chain-")
	if err != nil {
		return NoSpace(err, l.chains)
	}
	err = writeImage(f, maxImage, func(w io.Writer) error { return writeMerged(ctx, w, merged, layers) })
	if err != nil {
		discard(f)
		return NoSpace(err, l.chains)
	}
	return Commit(f, path, 0o444)
}

// mergeTrees returns which entries of which layers make up the merged image.
func mergeTrees(ctx context.Context, layers []MergeLayer) (*tree, error) {
	merged := newTree(0, nil)
	for i, layer := range layers {
		t := newTree(i, merged)
		err := layer.read(ctx, func(e entry, _ io.Reader) error {
			_, err := t.add(e)
			return err
		})
		if err == nil {
			err = t.settle()
		}
		if err == nil {
			err = merged.stack(t)
		}
		if err != nil {
			return nil, fmt.Errorf("layer %s: %w", layer.DiffID, err)
		}
	}
	return merged, nil
}

// writeMerged writes the tar of merged, whose files it takes from layers.
func writeMerged(ctx context.Context, dst io.Writer, merged *tree, layers []MergeLayer) error {
	names := make(map[origin]*node)
	merged.root.files(func(n *node) {
		// The name that is the way to the others is one of the shortest.
		if first := names[n.origin]; first != nil && first.depth <= n.depth {
			first.next, n.next = n, first.next
			return
		}
		n.next = names[n.origin]
		names[n.origin] = n
	})
	w := newTarWriter(dst)
	for i, layer := range layers {
		err := layer.read(ctx, func(e entry, body io.Reader) error {
			n := names[origin{i, e.index}]
			if n == nil || e.kind != entryFile {
				return nil
			}
			hdr := *e.hdr
			hdr.Name = n.path()
			if err := w.file(&hdr, body); err != nil {
				return err
			}
			for other := n.next; other != nil; other = other.next {
				if err := w.link(other.path(), hdr.Name); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("layer %s: %w", layer.DiffID, err)
		}
	}
	return w.finish(merged)
}

// read calls each for the layer's entries, and makes sure that its tar has its diff ID.
func (m MergeLayer) read(ctx context.Context, each func(entry, io.Reader) error) error {
	r, err := m.Open()
	if err != nil {
		return err
	}
	diffID, err := readLayer(ctx, r, maxImage, each)
	if cerr := r.Close(); err == nil {
		err = cerr
	}
	if err == nil && diffID != m.DiffID {
		err = errDiffID(diffID)
	}
	return err
}
