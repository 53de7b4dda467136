package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"os"
	"slices"

	"github.com/charliek/shed/internal/rootfs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"
)

// addition is what an operation adds to the store: until the operation ends nothing of it is removed, and if that
// fails, all of it is.
type addition struct {
	store    *Store
	own      *needs          // what is written,
	existed  map[string]bool // and the files that were there before
	releases []func()        // of what is held
}

// madeLayer is a layer that has its blob and, unless that was removed, its block image.
type madeLayer struct {
	desc    v1.Descriptor
	diffID  v1.Hash
	history v1.History
}

// newAddition begins an addition. The caller must call end in the end.
func (s *Store) newAddition() (*addition, error) {
	images, err := s.layers.List()
	if err != nil {
		return nil, err
	}
	a := &addition{store: s, own: newNeeds(), existed: map[string]bool{}}
	for _, img := range images {
		a.existed[img.Path] = true
	}
	return a, nil
}

// hold notes that blobs or block images are being written, and keeps them from being removed.
func (a *addition) hold(hashes ...v1.Hash) {
	a.keep(a.store.hold(hashes...))
	for _, h := range hashes {
		if _, noted := a.own.all[h]; noted { // the file may be ours by now
			continue
		}
		if _, err := os.Lstat(a.store.blob(h)); err == nil {
			a.existed[a.store.blob(h)] = true
		}
		a.own.all[h] = struct{}{}
	}
}

// keep has release called at the end.
func (a *addition) keep(release func()) { a.releases = append(a.releases, release) }

// end ends the addition. If the operation failed with err, it takes away what was added, and returns err and what
// went wrong with that.
func (a *addition) end(err error) error {
	for _, release := range a.releases {
		release()
	}
	if err == nil {
		return nil
	}
	return errors.Join(err, a.discard())
}

// discard removes the files that were added and that nothing else needs. What no index led to before no shed can need.
func (a *addition) discard() error {
	s := a.store
	s.mu.Lock()
	defer s.mu.Unlock()
	index, err := s.index()
	if err != nil {
		return err
	}
	sw := newSweep(s, index)
	if err := sw.collect(nil, a.own); err != nil {
		return err
	}
	sw.files = slices.DeleteFunc(sw.files, func(path string) bool { return a.existed[path] })
	_, err = sw.apply(context.Background())
	return err
}

// layer reads a layer's tar once, and makes of it the block image and a compressed
// blob, which it returns for the caller to commit.
func (a *addition) layer(ctx context.Context, tar io.Reader) (*os.File, madeLayer, error) {
	s := a.store
	blob, err := s.createTemp()
	if err != nil {
		return nil, madeLayer{}, err
	}
	var diffID v1.Hash
	digest := sha256.New()
	compressor, err := zstd.NewWriter(io.MultiWriter(blob, digest), zstd.WithEncoderLevel(zstd.SpeedDefault))
	if err == nil {
		diffID, _, err = s.layers.ConvertNew(ctx, io.TeeReader(tar, compressor), func(id v1.Hash) { a.hold(id) })
		err = errors.Join(err, compressor.Close())
	}
	size, serr := blob.Seek(0, io.SeekEnd)
	if err = errors.Join(err, serr); err != nil {
		return nil, madeLayer{}, errors.Join(rootfs.NoSpace(err, s.dir), blob.Close(), os.Remove(blob.Name()))
	}
	l := madeLayer{diffID: diffID, desc: v1.Descriptor{
		MediaType: types.OCILayerZStd,
		Size:      size,
		Digest:    v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(digest.Sum(nil))},
	}}
	a.hold(l.desc.Digest)
	return blob, l, nil
}

// write makes content a blob, and returns what points to it.
func (a *addition) write(content []byte, mediaType types.MediaType) (v1.Descriptor, error) {
	desc := descriptor(content, mediaType)
	a.hold(desc.Digest)
	return desc, a.store.writeFile(a.store.blob(desc.Digest), content)
}

// writeJSON is write for v as JSON.
func (a *addition) writeJSON(v any, mediaType types.MediaType) (v1.Descriptor, error) {
	content, err := json.Marshal(v)
	if err != nil {
		return v1.Descriptor{}, err
	}
	return a.write(content, mediaType)
}
