// Package image keeps OCI images in an OCI layout on disk, builds them, and
// hands out what a shed boots from: an image's layers as block images, and its configuration.
package image

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/rootfs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sys/unix"
)

const (
	tempPrefix = ".tmp-"
	// maxJSON bounds what is read into memory: manifests, indexes and configurations, in bytes.
	maxJSON = 8 << 20
)

// Store is an OCI layout: blobs/, and index.json, whose annotations hold the
// tags. A manifest that lost its tag stays in the index, since sheds
// may use it by its digest. What other tools have put there is taken as it is; of an index for several
// platforms the image for this host counts.
//
// Everything in it is complete and synced when it appears. Methods may be called concurrently; only
// one Store may be open for a layout, while any process may read it.
type Store struct {
	dir    string
	layers *rootfs.Layers
	lock   *os.File // the directory, locked

	mu       sync.Mutex // held to change index.json and to remove anything, and to read what must not be removed meanwhile
	held     holds
	building chan struct{} // has an element while a preset is built
	ingests  ingests
}

// Open opens the layout in dir, which it makes if need be, and removes what
// killed processes left there. Block images come from and go to layers. Where another Store
// is open for the layout, in whichever process, it is a CodeConflict.
func Open(dir string, layers *rootfs.Layers) (*Store, error) {
	s := &Store{dir: dir, layers: layers, held: holds{}, building: make(chan struct{}, 1)}
	if err := s.open(); err != nil {
		s.Close()
		return nil, fmt.Errorf("opening the images: %w", err)
	}
	return s, nil
}

// Close gives the layout up. The store is of no use any more.
func (s *Store) Close() error { return s.lock.Close() }

func (s *Store) open() error {
	if err := os.MkdirAll(filepath.Join(s.dir, "blobs", "sha256"), 0o755); err != nil {
		return err
	}
	var err error
	if s.lock, err = os.Open(s.dir); err != nil {
		return err
	}
	err = unix.Flock(int(s.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return shed.Errorf(shed.CodeConflict, "another shed-server uses %s", s.dir).
			WithHint("stop it first, or give this one another images_dir")
	}
	if err != nil {
		return fmt.Errorf("locking %s: %w", s.dir, err)
	}
	left, err := filepath.Glob(filepath.Join(s.dir, tempPrefix+"*"))
	if err != nil {
		return err
	}
	for _, p := range left {
		if err := os.RemoveAll(p); err != nil {
			return fmt.Errorf("removing the leftover of a killed process: %w", err)
		}
	}
	if err := s.writeMissing("oci-layout", map[string]string{"imageLayoutVersion": "1.0.0"}); err != nil {
		return err
	}
	empty := v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex, Manifests: []v1.Descriptor{}}
	if err := s.writeMissing("index.json", empty); err != nil {
		return err
	}
	_, err = s.index()
	return err
}

// List returns all images, sorted by reference; those that have lost their tag come first. One that is damaged, that is
// none or that has none for this host has no platform and no layers, and Problem says why. It isn't checked whether
// layers have the content that they should. List leaves InUse empty, and tells no image that the configuration names from others.
func (s *Store) List(ctx context.Context) ([]*shed.Image, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	index, err := s.index()
	if err != nil {
		return nil, err
	}
	images := make([]*shed.Image, 0, len(index.Manifests))
	for _, desc := range index.Manifests {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		d, err := s.describe(desc)
		if err != nil {
			d = &shed.ImageDetail{Image: *newImage(desc)}
			d.Size = rootfs.DiskUsage(s.blob(desc.Digest))
			d.Problem = err.Error()
		}
		images = append(images, &d.Image)
	}
	slices.SortFunc(images, func(a, b *shed.Image) int {
		return cmp.Or(strings.Compare(a.Ref, b.Ref), strings.Compare(a.Digest, b.Digest))
	})
	return images, nil
}

// newImage is what desc alone says of an image.
func newImage(desc v1.Descriptor) *shed.Image {
	img := &shed.Image{
		Ref: desc.Annotations[refName], Digest: desc.Digest.String(), Source: shed.SourceUser, InUse: []string{}, Layers: []shed.Layer{},
	}
	if img.Ref == "" {
		img.Source = shed.SourceDangling
	}
	return img
}

// image describes the image that desc, of a manifest or of an index, points to.
func (s *Store) image(desc v1.Descriptor) (*shed.Image, error) {
	detail, err := s.detail(desc)
	if err != nil {
		return nil, err
	}
	return &detail.Image, nil
}

// detail describes the image that desc, of a manifest or of an index, points to.
func (s *Store) detail(desc v1.Descriptor) (*shed.ImageDetail, error) {
	name := cmp.Or(desc.Annotations[refName], desc.Digest.String())
	d, err := s.describe(desc)
	if err != nil && shed.ErrorHint(err) == "" {
		e := shed.Errorf(shed.ErrorCode(err), "image %s: %w", name, err)
		return nil, e.WithHint("pull, load or build it again; `shed image rm %s` removes it", name)
	}
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", name, err)
	}
	return d, nil
}

func (s *Store) describe(entry v1.Descriptor) (*shed.ImageDetail, error) {
	desc, err := s.choose(entry)
	if err != nil {
		return nil, err
	}
	manifest, cfg, err := s.manifest(desc.Digest, desc.MediaType)
	if err != nil {
		return nil, err
	}
	d := &shed.ImageDetail{Image: *newImage(entry), MediaType: string(desc.MediaType), Config: imageConfig(cfg.Config)}
	d.Digest = desc.Digest.String()
	d.CreatedAt = cfg.Created.Time
	if p := cfg.Platform(); p != nil {
		d.Platform = platformName(*p)
	}
	files := map[string]struct{}{s.blob(entry.Digest): {}, s.blob(desc.Digest): {}, s.blob(manifest.Config.Digest): {}}
	for i, l := range manifest.Layers {
		diffID := cfg.RootFS.DiffIDs[i]
		layer := shed.Layer{Digest: l.Digest.String(), DiffID: diffID.String(), Size: l.Size}
		files[s.blob(l.Digest)] = struct{}{}
		if path, ok := s.layers.Path(diffID); ok {
			layer.BlockImage = rootfs.DiskUsage(path)
			files[path] = struct{}{}
		}
		d.Layers = append(d.Layers, layer)
		if there, err := s.hasBlob(l); d.Problem == "" && (err != nil || !there) {
			d.Problem = fmt.Sprintf("the blob of layer %s is missing", l.Digest)
			if err != nil {
				d.Problem = fmt.Sprintf("the blob of layer %s: %v", l.Digest, err)
			}
		}
	}
	for path := range files {
		d.Size += rootfs.DiskUsage(path)
	}
	d.History = history(cfg.History, d.Layers)
	return d, nil
}

// Inspect returns all that is known of the image that name names, as Resolve takes it. It leaves InUse empty.
func (s *Store) Inspect(ctx context.Context, name string) (*shed.ImageDetail, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	desc, err := s.find(name)
	if err != nil {
		return nil, err
	}
	return s.detail(desc)
}

func imageConfig(c v1.Config) shed.ImageConfig {
	out := shed.ImageConfig{
		User: c.User, WorkingDir: c.WorkingDir, Env: c.Env, Entrypoint: c.Entrypoint, Cmd: c.Cmd, Labels: c.Labels,
	}
	for port := range c.ExposedPorts {
		out.ExposedPorts = append(out.ExposedPorts, port)
	}
	slices.Sort(out.ExposedPorts)
	return out
}

// history matches the steps with the layers that they made. A history that speaks of
// another number of layers than there are says nothing of which is whose.
func history(steps []v1.History, layers []shed.Layer) []shed.ImageHistory {
	made := 0
	for _, h := range steps {
		if !h.EmptyLayer {
			made++
		}
	}
	out := make([]shed.ImageHistory, 0, len(steps))
	next := 0
	for _, h := range steps {
		step := shed.ImageHistory{CreatedAt: h.Created.Time, CreatedBy: h.CreatedBy, Comment: h.Comment}
		if !h.EmptyLayer && made == len(layers) {
			step.Layer = &layers[next]
			next++
		}
		out = append(out, step)
	}
	return out
}

// manifest reads an image's manifest and configuration, which have the same number of layers.
func (s *Store) manifest(digest v1.Hash, mediaType types.MediaType) (*v1.Manifest, *v1.ConfigFile, error) {
	if !mediaType.IsImage() {
		return nil, nil, shed.Errorf(shed.CodeUnsupported, "its manifest is a %q, which is no image", mediaType)
	}
	raw, err := s.readBlob(digest)
	if err != nil {
		return nil, nil, err
	}
	manifest, err := v1.ParseManifest(bytes.NewReader(raw))
	if err != nil {
		return nil, nil, fmt.Errorf("%s is no manifest: %w: %w", s.blob(digest), errDamaged, err)
	}
	raw, err = s.readBlob(manifest.Config.Digest)
	if err != nil {
		return nil, nil, err
	}
	cfg, err := v1.ParseConfigFile(bytes.NewReader(raw))
	if err != nil {
		return nil, nil, fmt.Errorf("%s is no image configuration: %w: %w", s.blob(manifest.Config.Digest), errDamaged, err)
	}
	if len(manifest.Layers) != len(cfg.RootFS.DiffIDs) {
		return nil, nil, shed.Errorf(shed.CodeInvalid, "its manifest has %d layers, its configuration %d",
			len(manifest.Layers), len(cfg.RootFS.DiffIDs))
	}
	return manifest, cfg, nil
}

func (s *Store) path(name string) string { return filepath.Join(s.dir, name) }

func (s *Store) blob(digest v1.Hash) string {
	return filepath.Join(s.dir, "blobs", digest.Algorithm, digest.Hex)
}

// errDamaged is what reading a blob returns that is there and of no use.
var errDamaged = errors.New("damaged")

// readBlob returns the content of a manifest, an index or a configuration, and makes sure that it has that digest.
func (s *Store) readBlob(digest v1.Hash) ([]byte, error) {
	h, err := v1.Hasher(digest.Algorithm)
	if err != nil {
		return nil, fmt.Errorf("a digest is %w: %w", errDamaged, err)
	}
	f, err := os.Open(s.blob(digest))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxJSON+1))
	if err != nil {
		return nil, err
	}
	if len(b) > maxJSON {
		return nil, fmt.Errorf("%s has more than %d bytes: %w", f.Name(), maxJSON, errDamaged)
	}
	h.Write(b)
	if digest.Hex != hex.EncodeToString(h.Sum(nil)) {
		return nil, fmt.Errorf("%s is %w: its content does not have that digest", f.Name(), errDamaged)
	}
	return b, nil
}

// descriptor returns what points to a blob with that content.
func descriptor(content []byte, mediaType types.MediaType) v1.Descriptor {
	sum := sha256.Sum256(content)
	return v1.Descriptor{
		MediaType: mediaType, Size: int64(len(content)), Digest: v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(sum[:])},
	}
}

func (s *Store) writeMissing(name string, v any) error {
	if _, err := os.Lstat(s.path(name)); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return s.writeFile(s.path(name), b)
}

// writeFile makes a file of b at path, at once and durably.
func (s *Store) writeFile(path string, b []byte) error {
	f, err := s.createTemp()
	if err != nil {
		return err
	}
	if _, err := f.Write(b); err != nil {
		return errors.Join(rootfs.NoSpace(err, s.dir), f.Close(), os.Remove(f.Name()))
	}
	return rootfs.Commit(f, path, 0o644)
}

func (s *Store) createTemp() (*os.File, error) {
	f, err := os.CreateTemp(s.dir, tempPrefix)
	return f, rootfs.NoSpace(err, s.dir)
}
