package rootfs

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"

	"github.com/charliek/shed"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// maxImage bounds a block image, and the tar of a layer, in bytes. It costs nothing until it
// is used: a few blocks of group descriptors.
const maxImage = 128 << 30

// Layers is a directory of block images: one for each layer, by diff ID, and
// those of several layers merged, by chain ID. Its methods may be called
// concurrently; only one process may use the directory at a time.
type Layers struct {
	dir    string // of single layers
	chains string // of merged ones

	mu   sync.Mutex
	busy map[string]chan struct{} // images that are being made, by path; closed at the end
}

// OpenLayers opens the layers in dir, which it makes if need be, and removes what
// a killed conversion left there.
func OpenLayers(dir string) (*Layers, error) {
	l := &Layers{
		dir:    filepath.Join(dir, "sha256"),
		chains: filepath.Join(dir, "chain", "sha256"),
		busy:   make(map[string]chan struct{}),
	}
	for _, dir := range []string{l.dir, l.chains} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, fmt.Errorf("opening the layers: %w", err)
		}
		if err := removeTemps(dir); err != nil {
			return nil, fmt.Errorf("opening the layers: %w", err)
		}
	}
	return l, nil
}

// Path returns the path of the block image of the layer with that diff ID, and
// whether it has been made.
func (l *Layers) Path(diffID v1.Hash) (string, bool) {
	return findImage(l.dir, diffID)
}

// findImage returns the path of the block image with that ID in dir, and whether it is there.
func findImage(dir string, id v1.Hash) (string, bool) {
	if !isSHA256(id) {
		return "", false
	}
	path := imagePath(dir, id)
	return path, isFile(path)
}

func imagePath(dir string, id v1.Hash) string { return filepath.Join(dir, id.Hex+".img") }

func isFile(path string) bool {
	fi, err := os.Lstat(path)
	return err == nil && fi.Mode().IsRegular()
}

func isSHA256(h v1.Hash) bool {
	_, err := v1.NewHash(h.String())
	return err == nil && h.Algorithm == "sha256"
}

func checkDiffID(diffID v1.Hash) error {
	if !isSHA256(diffID) {
		return shed.Errorf(shed.CodeUnsupported, "layer %s: only sha256 diff IDs are supported", diffID)
	}
	return nil
}

// Convert makes the block image of the layer whose uncompressed tar r yields, and
// returns the layer's diff ID and the path of the image: a read-only ext4
// file system in which whiteouts are as overlayfs wants them.
//
// If declared is not zero, r must have that diff ID; then r is not read if the image
// is there already, and concurrent calls do the work once. Otherwise r is read to its
// end. Convert looks at ctx between reads; a read that blocks is r's to interrupt.
//
// A tar that is damaged, that reaches out of the layer, that ext4 can't hold or that is larger than
// 128 GiB is an error with CodeInvalid; a full disk is one with CodeNoSpace. Errors of r are wrapped.
//
// A directory that the layer has entries in but no entry for is made as
// root's, mode 0755, and as the topmost one it decides what the merged
// directory looks like. Layers made from file system differences always have
// such entries; an image is the same for every stack that its layer is in, so
// there is no lower layer to take them from.
//
// A hard link must follow its target in the same layer: that an image can't
// have one into another image is CodeInvalid here, and not for Merge.
//
// Every image has a directory lost+found, since e2fsck demands one. If a tar repeats an entry, the
// last one counts and what the earlier ones hold ends up in there.
func (l *Layers) Convert(ctx context.Context, r io.Reader, declared v1.Hash) (v1.Hash, string, error) {
	if declared != (v1.Hash{}) {
		if err := checkDiffID(declared); err != nil {
			return v1.Hash{}, "", err
		}
		release, err := l.lock(ctx, imagePath(l.dir, declared))
		if err != nil {
			return v1.Hash{}, "", fmt.Errorf("layer %s: %w", declared, err)
		}
		defer release()
		if path, ok := l.Path(declared); ok {
			return declared, path, nil
		}
	}
	diffID, path, err := l.convert(ctx, r, declared, func(v1.Hash) {})
	if err != nil {
		if declared != (v1.Hash{}) {
			err = fmt.Errorf("layer %s: %w", declared, err)
		}
		return v1.Hash{}, "", err
	}
	return diffID, path, nil
}

// ConvertNew is Convert for a tar whose diff ID nobody knows. It calls keep with that before the image appears, so
// that the image can be kept from being removed from its first moment on.
func (l *Layers) ConvertNew(ctx context.Context, r io.Reader, keep func(diffID v1.Hash)) (v1.Hash, string, error) {
	return l.convert(ctx, r, v1.Hash{}, keep)
}

// lock waits until no other call makes the image at path and keeps others from it until release is called.
func (l *Layers) lock(ctx context.Context, path string) (release func(), err error) {
	for {
		l.mu.Lock()
		other, busy := l.busy[path]
		if !busy {
			done := make(chan struct{})
			l.busy[path] = done
			l.mu.Unlock()
			return func() {
				l.mu.Lock()
				delete(l.busy, path)
				l.mu.Unlock()
				close(done)
			}, nil
		}
		l.mu.Unlock()
		select {
		case <-other:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (l *Layers) convert(ctx context.Context, r io.Reader, declared v1.Hash, keep func(v1.Hash)) (diffID v1.Hash, path string, err error) {
	f, err := os.CreateTemp(l.dir, tempPrefix+"layer-")
	if err != nil {
		return v1.Hash{}, "", NoSpace(err, l.dir)
	}
	diffID, err = writeLayer(ctx, f, r, maxImage)
	if err == nil && declared != (v1.Hash{}) && diffID != declared {
		err = errDiffID(diffID)
	}
	if err != nil {
		discard(f)
		return v1.Hash{}, "", NoSpace(err, l.dir)
	}
	keep(diffID)
	path = imagePath(l.dir, diffID)
	if err := Commit(f, path, 0o444); err != nil {
		return v1.Hash{}, "", err
	}
	return diffID, path, nil
}

// writeLayer writes to f the file system of the layer tar r, and returns the hash of all that r
// yielded. Neither may have more than limit bytes.
func writeLayer(ctx context.Context, f *os.File, r io.Reader, limit int64) (diffID v1.Hash, err error) {
	err = writeImage(f, limit, func(w io.Writer) (err error) {
		diffID, err = rewriteLayer(ctx, w, r, limit)
		return err
	})
	return diffID, err
}

func errDiffID(got v1.Hash) error {
	return shed.Errorf(shed.CodeInvalid, "the content is not what its diff ID says: it has %s", got).
		WithHint("the blob is damaged; get or build the image again")
}
