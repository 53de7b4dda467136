package image

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/charliek/shed"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// dockerImage is an image in the manifest.json of an archive by docker save.
type dockerImage struct {
	Config   string
	RepoTags []string
	Layers   []string
}

// Save writes the images that names name, as Resolve takes them, to w, as a tar of an OCI layout that docker load
// takes too. An image that is named by a tag has it there. The same images always make the same bytes.
//
// Errors before the first byte say that nothing can be written, later ones that w holds a part of an archive.
func (s *Store) Save(ctx context.Context, names []string, w io.Writer) error {
	a, release, err := s.archive(names)
	if err != nil {
		return err
	}
	defer release()
	if err := a.write(ctx, w); err != nil {
		return fmt.Errorf("saving %s: %w", strings.Join(names, ", "), err)
	}
	return nil
}

// outArchive is an archive that is going to be written.
type outArchive struct {
	store  *Store
	index  v1.IndexManifest
	docker []dockerImage
	blobs  map[v1.Hash]int64 // sizes
}

// archive settles what an archive of the named images has, and keeps that from being removed until release is called.
func (s *Store) archive(names []string) (a *outArchive, release func(), err error) {
	if len(names) == 0 {
		return nil, nil, shed.Errorf(shed.CodeInvalid, "no image is named to be saved")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	a = &outArchive{
		store: s, blobs: map[v1.Hash]int64{},
		index: v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex, Manifests: []v1.Descriptor{}},
	}
	for _, name := range names {
		entry, err := s.find(name)
		if err != nil {
			return nil, nil, err
		}
		if err := a.add(entry, name); err != nil {
			return nil, nil, fmt.Errorf("image %s: %w", name, err)
		}
	}
	return a, s.holdLocked(slices.Collect(maps.Keys(a.blobs))), nil
}

// add adds the image of an entry of the index.
func (a *outArchive) add(entry v1.Descriptor, name string) error {
	chosen, err := a.store.choose(entry)
	if err != nil {
		return err
	}
	manifest, cfg, err := a.store.manifest(chosen.Digest, chosen.MediaType)
	if err != nil {
		return err
	}
	docker := dockerImage{Config: blobPath(manifest.Config.Digest), RepoTags: []string{}, Layers: []string{}}
	for _, d := range append([]v1.Descriptor{chosen, manifest.Config}, manifest.Layers...) {
		fi, err := os.Stat(a.store.blob(d.Digest))
		if err != nil {
			return err
		}
		if fi.Size() != d.Size {
			return fmt.Errorf("%s is %w: it has %d bytes, and should have %d", a.store.blob(d.Digest), errDamaged, fi.Size(), d.Size)
		}
		a.blobs[d.Digest] = d.Size
	}
	for _, l := range manifest.Layers {
		docker.Layers = append(docker.Layers, blobPath(l.Digest))
	}
	desc := v1.Descriptor{MediaType: chosen.MediaType, Size: chosen.Size, Digest: chosen.Digest, Platform: cfg.Platform()}
	if tag := entry.Annotations[refName]; tag != "" && sameTag(tag, name) {
		desc.Annotations = map[string]string{refName: tag}
		if ref, err := parseRef(tag); err == nil {
			full := strings.Replace(ref.Name(), "index.docker.io/", dockerHub+"/", 1)
			desc.Annotations[containerdName] = full
			docker.RepoTags = append(docker.RepoTags, strings.TrimPrefix(strings.TrimPrefix(full, dockerHub+"/"), dockerHubLibrary))
		}
	}
	a.index.Manifests = append(a.index.Manifests, desc)
	same := func(d dockerImage) bool { return d.Config == docker.Config && slices.Equal(d.Layers, docker.Layers) }
	if i := slices.IndexFunc(a.docker, same); i >= 0 {
		a.docker[i].RepoTags = append(a.docker[i].RepoTags, docker.RepoTags...)
	} else {
		a.docker = append(a.docker, docker)
	}
	return nil
}

// blobPath returns where a blob is in an OCI layout.
func blobPath(h v1.Hash) string { return "blobs/" + h.Algorithm + "/" + h.Hex }

func (a *outArchive) write(ctx context.Context, w io.Writer) error {
	tw := tar.NewWriter(w)
	for _, f := range []struct {
		name string
		v    any
	}{
		{"oci-layout", map[string]string{"imageLayoutVersion": "1.0.0"}}, {"index.json", a.index}, {"manifest.json", a.docker},
	} {
		b, err := json.Marshal(f.v)
		if err != nil {
			return err
		}
		if err := writeEntry(tw, f.name, int64(len(b)), bytes.NewReader(b)); err != nil {
			return err
		}
	}
	digests := slices.SortedFunc(maps.Keys(a.blobs), func(a, b v1.Hash) int { return strings.Compare(a.String(), b.String()) })
	for _, digest := range digests {
		if err := a.writeBlob(ctx, tw, digest); err != nil {
			return err
		}
	}
	return tw.Close()
}

func (a *outArchive) writeBlob(ctx context.Context, tw *tar.Writer, digest v1.Hash) error {
	f, err := os.Open(a.store.blob(digest))
	if err != nil {
		return err
	}
	defer f.Close()
	h, err := v1.Hasher(digest.Algorithm)
	if err != nil {
		return err
	}
	size := a.blobs[digest]
	if err := writeEntry(tw, blobPath(digest), size, io.TeeReader(io.LimitReader(readerOf(ctx, f), size), h)); err != nil {
		return err
	}
	if hex.EncodeToString(h.Sum(nil)) != digest.Hex {
		return fmt.Errorf("%s is %w: its content does not have that digest", f.Name(), errDamaged)
	}
	return nil
}

func writeEntry(tw *tar.Writer, name string, size int64, r io.Reader) error {
	err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o644, ModTime: time.Unix(0, 0)})
	if err != nil {
		return err
	}
	_, err = io.Copy(tw, r)
	return err
}

// readerFunc is a reader that is a function.
type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// readerOf returns r until ctx is done: it looks at ctx between reads.
func readerOf(ctx context.Context, r io.Reader) io.Reader {
	return readerFunc(func(p []byte) (int, error) {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		return r.Read(p)
	})
}
