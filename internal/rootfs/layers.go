package rootfs

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"

	"github.com/Microsoft/hcsshim/ext4/tar2ext4"
	"github.com/charliek/shed"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// maxImage bounds a layer's block image, in bytes. It costs nothing until it
// is used: a few blocks of group descriptors.
const maxImage = 128 << 30

// Layers is a directory of block images, one for each layer, by diff ID. Its
// methods may be called concurrently; only one process may use the directory at a time.
type Layers struct {
	dir string

	mu   sync.Mutex
	busy map[v1.Hash]chan struct{} // conversions of declared diff IDs; closed at the end
}

// OpenLayers opens the layers in dir, which it makes if need be, and removes what
// a killed conversion left there.
func OpenLayers(dir string) (*Layers, error) {
	dir = filepath.Join(dir, "sha256")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("opening the layers: %w", err)
	}
	if err := removeTemps(dir); err != nil {
		return nil, fmt.Errorf("opening the layers: %w", err)
	}
	return &Layers{dir: dir, busy: make(map[v1.Hash]chan struct{})}, nil
}

// Path returns the path of the block image of the layer with that diff ID, and
// whether it has been made.
func (l *Layers) Path(diffID v1.Hash) (string, bool) {
	if !isSHA256(diffID) {
		return "", false
	}
	path := l.path(diffID)
	fi, err := os.Lstat(path)
	return path, err == nil && fi.Mode().IsRegular()
}

func (l *Layers) path(diffID v1.Hash) string {
	return filepath.Join(l.dir, diffID.Hex+".img")
}

func isSHA256(h v1.Hash) bool {
	_, err := v1.NewHash(h.String())
	return err == nil && h.Algorithm == "sha256"
}

// Convert makes the block image of the layer whose uncompressed tar r yields, and
// returns the layer's diff ID and the path of the image: a read-only ext4
// file system in which whiteouts are as overlayfs wants them.
//
// If declared is not zero, r must have that diff ID; then r is not read if the image
// is there already, and concurrent calls do the work once. Otherwise r is read to its
// end. Convert looks at ctx between reads; a read that blocks is r's to interrupt.
//
// A tar that is damaged, that reaches out of the layer, or that ext4 can't hold is an
// error with CodeInvalid; a full disk is one with CodeNoSpace. Errors of r are wrapped.
//
// A directory that the layer has entries in but no entry for is made as
// root's, mode 0755, and as the topmost one it decides what the merged
// directory looks like. Layers made from file system differences always have
// such entries; an image is the same for every stack that its layer is in, so
// there is no lower layer to take them from.
//
// Every image has a directory lost+found, since e2fsck demands one. If a tar repeats an entry, the
// last one counts and what the earlier ones hold ends up in there.
func (l *Layers) Convert(ctx context.Context, r io.Reader, declared v1.Hash) (v1.Hash, string, error) {
	if declared != (v1.Hash{}) {
		if !isSHA256(declared) {
			return v1.Hash{}, "", shed.Errorf(shed.CodeUnsupported, "layer %s: only sha256 diff IDs are supported", declared)
		}
		release, err := l.lock(ctx, declared)
		if err != nil {
			return v1.Hash{}, "", fmt.Errorf("layer %s: %w", declared, err)
		}
		defer release()
		if path, ok := l.Path(declared); ok {
			return declared, path, nil
		}
	}
	diffID, path, err := l.convert(ctx, r, declared)
	if err != nil {
		if declared != (v1.Hash{}) {
			err = fmt.Errorf("layer %s: %w", declared, err)
		}
		return v1.Hash{}, "", err
	}
	return diffID, path, nil
}

// lock waits until no other call converts diffID and keeps others from it until release is called.
func (l *Layers) lock(ctx context.Context, diffID v1.Hash) (release func(), err error) {
	for {
		l.mu.Lock()
		other, busy := l.busy[diffID]
		if !busy {
			done := make(chan struct{})
			l.busy[diffID] = done
			l.mu.Unlock()
			return func() {
				l.mu.Lock()
				delete(l.busy, diffID)
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

func (l *Layers) convert(ctx context.Context, r io.Reader, declared v1.Hash) (diffID v1.Hash, path string, err error) {
	f, err := os.CreateTemp(l.dir, tempPrefix+"layer-")
	if err != nil {
		return v1.Hash{}, "", NoSpace(err, l.dir)
	}
	diffID, err = writeImage(ctx, f, r, maxImage)
	if err == nil && declared != (v1.Hash{}) && diffID != declared {
		err = shed.Errorf(shed.CodeInvalid, "the content is not what its diff ID says: it has %s", diffID).
			WithHint("the blob is damaged; get or build the image again")
	}
	if err != nil {
		discard(f)
		return v1.Hash{}, "", NoSpace(err, l.dir)
	}
	path = l.path(diffID)
	if err := Commit(f, path, 0o444); err != nil {
		return v1.Hash{}, "", err
	}
	return diffID, path, nil
}

// writeImage writes the file system of the layer tar r to f, in at most limit
// bytes, and returns the hash of all that r yielded.
func writeImage(ctx context.Context, f *os.File, r io.Reader, limit int64) (v1.Hash, error) {
	hash := sha256.New()
	src := io.TeeReader(ctxReader{ctx, r}, hash)
	pr, pw := io.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := bufio.NewWriterSize(pw, 1<<20)
		err := rewriteTar(buf, bufio.NewReaderSize(src, 1<<20))
		if err == nil {
			err = buf.Flush()
		}
		pw.CloseWithError(err)
	}()

	out := &sparseWriter{f: f}
	err := tarToExt4(bufio.NewReaderSize(pr, 1<<20), out, limit)
	if err == nil {
		// The trailer of the tar ends the conversion; what is left of the stream counts too.
		_, err = io.Copy(io.Discard, pr)
	}
	pr.CloseWithError(err) // lets a blocked rewriteTar go
	<-done
	if err == nil {
		err = out.finish()
	}
	if err == nil {
		err = padInodeBitmaps(f)
	}
	if err != nil {
		return v1.Hash{}, err
	}
	return v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(hash.Sum(nil))}, nil
}

// tarToExt4 turns panics, with which the library reports some of what it can't convert, into errors.
func tarToExt4(r io.Reader, w io.ReadWriteSeeker, limit int64) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = shed.Errorf(shed.CodeInvalid, "converting to ext4: %v", p)
		}
	}()
	if err := tar2ext4.ConvertTarToExt4(r, w, tar2ext4.MaximumDiskSize(limit)); err != nil {
		return fmt.Errorf("converting to ext4: %w", err)
	}
	return nil
}

type ctxReader struct {
	ctx context.Context
	r   io.Reader
}

func (c ctxReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}
