package image

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/rootfs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// InUse returns the names of sheds by the digest of the image's manifest that they boot from. It
// fails if it can't be told what a shed boots from.
//
// The store calls it with its lock held, so that no image that Acquire returned can be let go of
// between a look at the sheds and the removal: it must not call the store.
type InUse func() (map[string][]string, error)

// Prune removes what no tag, shed or running operation needs: images, blobs, block images and
// partial downloads. With dryRun it only says what that is. An image of a shed that is damaged or gone is CodeConflict.
func (s *Store) Prune(ctx context.Context, inUse InUse, dryRun bool) (*shed.Removed, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	used, err := inUse()
	if err != nil {
		return nil, err
	}
	index, err := s.index()
	if err != nil {
		return nil, err
	}
	sw := newSweep(s, index)
	sw.keep(func(d v1.Descriptor) bool { return s.needed(d, used) })
	if err := sw.collect(used, nil); err != nil {
		return nil, err
	}
	if dryRun {
		return sw.removed, nil
	}
	return sw.apply(ctx)
}

// Remove removes a tag or, where name is a digest, an image with all its tags, and what nothing else needs. If
// sheds use the image, that is CodeConflict, or with force only the tags go.
func (s *Store) Remove(ctx context.Context, name string, force bool, inUse InUse) (*shed.Removed, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	desc, err := s.find(name)
	if err != nil {
		return nil, err
	}
	used, unknown := inUse()
	if unknown != nil && !force {
		return nil, unknown
	}
	if users := s.users(desc, used); len(users) > 0 && !force {
		return nil, shed.Errorf(shed.CodeConflict, "image %s is used by %s", name, strings.Join(users, ", ")).
			WithHint("delete what uses it first; with --force its tags go now, and the rest with the last shed and a prune")
	}
	index, err := s.index()
	if err != nil {
		return nil, err
	}
	sw := newSweep(s, index)
	target, tag := s.digest(desc), desc.Annotations[refName]
	one := tag != "" && sameTag(tag, name)
	sw.untag(func(d v1.Descriptor) bool { return s.digest(d) == target && (!one || d.Annotations[refName] == tag) })
	if unknown != nil { // all that is here may be what that shed needs
		return sw.apply(ctx)
	}
	own := newNeeds()
	for _, d := range sw.keep(func(d v1.Descriptor) bool { return s.digest(d) != target || s.needed(d, used) }) {
		if err := s.reach(own, d); err != nil && !useless(err) {
			return nil, err
		}
	}
	if err := sw.collect(used, own); err != nil && !force {
		return nil, err
	}
	return sw.apply(ctx)
}

// digest returns the digest of the image that an entry of the index stands for.
func (s *Store) digest(entry v1.Descriptor) v1.Hash {
	if chosen, err := s.choose(entry); err == nil {
		return chosen.Digest
	}
	return entry.Digest
}

// users returns what uses an image that an entry of the index leads to, sorted.
func (s *Store) users(entry v1.Descriptor, used map[string][]string) []string {
	needs := newNeeds()
	_ = s.reach(needs, entry) // as far as can be told: what uses it is looked at again by itself
	var names []string
	for h := range needs.manifests {
		names = append(names, used[h.String()]...)
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// needed says whether an entry of the index has a tag, or leads to an image that a shed or an operation under way needs.
func (s *Store) needed(entry v1.Descriptor, used map[string][]string) bool {
	if entry.Annotations[refName] != "" {
		return true
	}
	needs := newNeeds()
	_ = s.reach(needs, entry) // as far as can be told, like users
	for h := range needs.manifests {
		if len(used[h.String()]) > 0 || s.held[h] > 0 {
			return true
		}
	}
	return false
}

// needs are blobs by digest, and block images by diff ID and chain ID.
type needs struct {
	all       map[v1.Hash]struct{}
	manifests map[v1.Hash]struct{} // and indexes
}

func newNeeds() *needs {
	return &needs{all: map[v1.Hash]struct{}{}, manifests: map[v1.Hash]struct{}{}}
}

// reach adds what desc, of a manifest or of an index, leads to. On error it has added what it could
// find. What of an index isn't here is no error: many tools copy an index without all that it has.
func (s *Store) reach(n *needs, desc v1.Descriptor) error {
	if _, ok := n.manifests[desc.Digest]; ok {
		return nil
	}
	n.all[desc.Digest] = struct{}{}
	n.manifests[desc.Digest] = struct{}{}
	raw, err := s.readBlob(desc.Digest)
	if err != nil {
		return err
	}
	// Manifests of all kinds are made of these: what is no image is kept whole too.
	var node struct {
		Config    *v1.Descriptor  `json:"config"`
		Layers    []v1.Descriptor `json:"layers"`
		Blobs     []v1.Descriptor `json:"blobs"`
		Manifests []v1.Descriptor `json:"manifests"`
		Subject   *v1.Descriptor  `json:"subject"`
	}
	if err := json.Unmarshal(raw, &node); err != nil {
		return fmt.Errorf("%s is no manifest: %w: %w", s.blob(desc.Digest), errDamaged, err)
	}
	for _, d := range slices.Concat(node.Layers, node.Blobs) {
		n.all[d.Digest] = struct{}{}
	}
	if node.Config != nil {
		n.all[node.Config.Digest] = struct{}{}
		err = s.reachLayers(n, desc, *node.Config)
	}
	if node.Subject != nil {
		node.Manifests = append(node.Manifests, *node.Subject)
	}
	for _, d := range node.Manifests {
		if derr := s.reach(n, d); derr != nil && !errors.Is(derr, fs.ErrNotExist) {
			err = errors.Join(err, derr)
		}
	}
	return err
}

// reachLayers adds the block images of an image, also those that several of its layers are merged in.
func (s *Store) reachLayers(n *needs, manifest, config v1.Descriptor) error {
	if !manifest.MediaType.IsImage() || config.MediaType != "" && !config.MediaType.IsConfig() {
		return nil
	}
	raw, err := s.readBlob(config.Digest)
	if err != nil {
		return err
	}
	cfg, err := v1.ParseConfigFile(bytes.NewReader(raw))
	if err != nil {
		return fmt.Errorf("%s is no image configuration: %w: %w", s.blob(config.Digest), errDamaged, err)
	}
	for _, h := range blockImages(cfg.RootFS.DiffIDs) {
		n.all[h] = struct{}{}
	}
	return nil
}

// blockImages returns the IDs of the block images that layers, bottom first, may have: each has its own, and the lowest
// ones, however many, one together.
func blockImages(diffIDs []v1.Hash) []v1.Hash {
	chains := slices.Clone(diffIDs)
	for i := 1; i < len(chains); i++ {
		chains[i] = rootfs.ChainID(chains[i-1], diffIDs[i])
	}
	return append(chains, diffIDs...)
}

// reachUsed adds what the image with that digest leads to, all of which must be there to be read.
func (s *Store) reachUsed(n *needs, digest string) error {
	desc, err := s.unlisted(digest)
	if err != nil {
		return err
	}
	return s.reach(n, desc)
}

// useless says whether err is that of an image that nobody can use as it is: what it would lead to is nobody's.
func useless(err error) bool { return errors.Is(err, errDamaged) || errors.Is(err, fs.ErrNotExist) }

// sweep is a removal: what it takes away of the index, and then of the files. A kill in between leaves files that the next
// one finds.
type sweep struct {
	store   *Store
	index   *v1.IndexManifest
	changed bool // of the index
	files   []string
	removed *shed.Removed
}

func newSweep(s *Store, index *v1.IndexManifest) *sweep {
	return &sweep{store: s, index: index, removed: &shed.Removed{Items: []shed.RemovedItem{}}}
}

// add notes that a thing goes, and the file that it is, if it is one.
func (sw *sweep) add(kind, name, file string) {
	item := shed.RemovedItem{Kind: kind, Name: name}
	if file != "" {
		item.Size = rootfs.DiskUsage(file)
		sw.files = append(sw.files, file)
	}
	sw.removed.Items = append(sw.removed.Items, item)
	sw.removed.Freed += item.Size
}

// untag takes the tags off the entries of the index that are ours. Of those that
// are the same then, one stays.
func (sw *sweep) untag(ours func(v1.Descriptor) bool) {
	var entries, untagged []v1.Descriptor
	for _, d := range sw.index.Manifests {
		if !ours(d) {
			entries = append(entries, d)
			continue
		}
		if tag := d.Annotations[refName]; tag != "" {
			sw.add("tag", tag, "")
		}
		untagged = append(untagged, withTag(d, ""))
	}
	sw.index.Manifests, sw.changed = appendNew(entries, untagged), true
}

// keep takes all entries out of the index that are not to be kept, and returns them.
func (sw *sweep) keep(kept func(v1.Descriptor) bool) (gone []v1.Descriptor) {
	sw.index.Manifests = slices.DeleteFunc(sw.index.Manifests, func(d v1.Descriptor) bool {
		if kept(d) {
			return false
		}
		gone = append(gone, d)
		sw.changed = true
		sw.add("image", d.Digest.String(), "")
		return true
	})
	return gone
}

// collect finds the files that neither the index, nor a shed, nor an operation under way needs; if
// own is not nil, only of those that are its.
func (sw *sweep) collect(used map[string][]string, own *needs) error {
	s := sw.store
	live := newNeeds()
	// The sheds' come first: what is damaged of a shed's image must be noticed.
	for _, digest := range slices.Sorted(maps.Keys(used)) {
		if err := s.reachUsed(live, digest); err != nil {
			return shed.Errorf(shed.CodeConflict, "it can't be told what %s needs: image %s: %w", strings.Join(used[digest], ", "), digest, err).
				WithHint("get that image again (pull, load or build it), or delete the shed; nothing has been removed")
		}
	}
	for _, d := range sw.index.Manifests {
		if err := s.reach(live, d); err != nil && !useless(err) {
			return fmt.Errorf("image %s: %w", cmp.Or(d.Annotations[refName], d.Digest.String()), err)
		}
	}
	goes := func(h v1.Hash) bool {
		if own != nil {
			if _, ok := own.all[h]; !ok {
				return false
			}
		}
		_, ok := live.all[h]
		return !ok && s.held[h] == 0
	}
	blobs, err := filepath.Glob(filepath.Join(s.dir, "blobs", "*", "*"))
	if err != nil {
		return err
	}
	for _, path := range blobs { // sorted
		if h, err := v1.NewHash(filepath.Base(filepath.Dir(path)) + ":" + filepath.Base(path)); err == nil && goes(h) {
			sw.add("blob", h.String(), path)
		}
	}
	images, err := s.layers.List()
	if err != nil {
		return err
	}
	for _, img := range images {
		if goes(img.ID) {
			sw.add("block image", img.ID.String(), img.Path)
		}
	}
	if own != nil {
		return nil
	}
	return sw.collectPartial()
}

var digestInName = regexp.MustCompile("[0-9a-f]{64}")

// collectPartial finds what broken off downloads have left, which are named after the blob's digest.
func (sw *sweep) collectPartial() error {
	dir := sw.store.path(partialDir)
	files, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, f := range files {
		h := v1.Hash{Algorithm: "sha256", Hex: digestInName.FindString(f.Name())}
		if h.Hex != "" && sw.store.held[h] == 0 {
			sw.add("partial download", h.String(), filepath.Join(dir, f.Name()))
		}
	}
	return nil
}

// apply takes away what was found, and returns it.
func (sw *sweep) apply(ctx context.Context) (*shed.Removed, error) {
	if sw.changed {
		if err := sw.store.writeIndex(sw.index); err != nil {
			return nil, err
		}
	}
	dirs := map[string]struct{}{}
	for _, path := range sw.files {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		dirs[filepath.Dir(path)] = struct{}{}
	}
	for dir := range dirs {
		if err := rootfs.Sync(dir); err != nil {
			return nil, err
		}
	}
	return sw.removed, nil
}
