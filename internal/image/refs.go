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
	"regexp"
	"runtime"
	"slices"
	"strings"

	"github.com/charliek/shed"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// Annotations of descriptors.
const (
	refName = "org.opencontainers.image.ref.name" // the tag
	// containerdName is the tag in archives by containerd and docker, whose refName is without the repository.
	containerdName = "io.containerd.image.name"
)

// minPrefix is how many hex digits of a digest can stand for it.
const minPrefix = 12

const (
	maxDepth   = 8  // of indexes in each other, at a registry
	maxIndexes = 64 // that one leads to, here and in an archive
)

// Resolve returns the image that ref names: a tag in any spelling, a digest of a manifest with or without
// "sha256:", NAME@sha256:..., whose name doesn't matter, or at least 12 hex digits that only one digest
// starts with. No such image is CodeNoImage, several are CodeInvalid.
//
// A whole digest names an image also after another tool took it out of the index, as skopeo(1)
// does when it moves a tag: sheds may use it.
func (s *Store) Resolve(ref string) (*shed.Image, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	desc, err := s.find(ref)
	if err != nil {
		if desc, uerr := s.unlisted(ref); uerr == nil && shed.ErrorCode(err) == shed.CodeNoImage {
			return s.image(desc)
		}
		return nil, err
	}
	return s.image(desc)
}

// find returns the entry of the index that ref names, and that of a tag rather than others.
func (s *Store) find(ref string) (v1.Descriptor, error) {
	index, err := s.index()
	if err != nil {
		return v1.Descriptor{}, err
	}
	var tags []string
	for _, desc := range index.Manifests {
		switch tag := desc.Annotations[refName]; tag {
		case "":
		case ref:
			return desc, nil
		default:
			tags = append(tags, tag)
		}
	}
	for _, desc := range index.Manifests {
		if tag := desc.Annotations[refName]; tag != "" && sameTag(tag, ref) {
			return desc, nil
		}
	}
	found := make(map[v1.Hash]v1.Descriptor)
	if prefix := digestPrefix(ref); prefix != "" {
		for _, desc := range index.Manifests {
			image := desc.Digest
			if chosen, err := s.choose(desc); err == nil {
				image = chosen.Digest
			}
			if !strings.HasPrefix(desc.Digest.Hex, prefix) && !strings.HasPrefix(image.Hex, prefix) {
				continue
			}
			if _, ok := found[image]; !ok || desc.Annotations[refName] != "" {
				found[image] = desc
			}
		}
	}
	switch len(found) {
	case 0:
		return v1.Descriptor{}, noImage(ref, tags)
	case 1:
		for _, desc := range found {
			return desc, nil
		}
	}
	return v1.Descriptor{}, shed.Errorf(shed.CodeInvalid, "%d images have a digest that starts with %q", len(found), ref).
		WithHint("give more digits of it")
}

var hexDigits = regexp.MustCompile(`^[0-9a-f]{12,}$`)

// digestPrefix returns the hex digits that ref gives of a digest, and "" if it is none.
func digestPrefix(ref string) string {
	if _, digest, ok := strings.Cut(ref, "@"); ok {
		h, err := v1.NewHash(digest)
		if err != nil {
			return ""
		}
		return h.Hex
	}
	if prefix := strings.TrimPrefix(ref, "sha256:"); hexDigits.MatchString(prefix) {
		return prefix
	}
	return ""
}

// sameTag says whether two references are spellings of the same.
func sameTag(a, b string) bool {
	if a == b {
		return true
	}
	fa, err := Familiar(a)
	if err != nil {
		return false
	}
	fb, err := Familiar(b)
	return err == nil && fa == fb
}

// unlisted returns what points to the image with the digest ref, whose manifest is here, whether or not the index has it.
func (s *Store) unlisted(ref string) (v1.Descriptor, error) {
	digest, err := v1.NewHash("sha256:" + digestPrefix(ref))
	if err != nil {
		return v1.Descriptor{}, err
	}
	raw, err := s.readBlob(digest)
	if err != nil {
		return v1.Descriptor{}, err
	}
	manifest, err := v1.ParseManifest(bytes.NewReader(raw))
	if err != nil || manifest.Config.Digest == (v1.Hash{}) {
		return v1.Descriptor{}, fmt.Errorf("%s is no manifest of an image", s.blob(digest))
	}
	return v1.Descriptor{MediaType: cmp.Or(manifest.MediaType, types.OCIManifestSchema1), Size: int64(len(raw)), Digest: digest}, nil
}

func noImage(ref string, tags []string) error {
	err := shed.Errorf(shed.CodeNoImage, "there is no image %q", ref)
	if len(tags) == 0 {
		return err.WithHint("no image here has a name: `shed image ls` shows what there is, and `shed image build base` makes what sheds have by default")
	}
	slices.Sort(tags)
	const most = 10
	more := ""
	if len(tags) > most {
		tags, more = tags[:most], ", ..."
	}
	return err.WithHint("there are: %s%s; `shed image build base` makes the base image", strings.Join(tags, ", "), more)
}

// choose returns what points to the manifest for this host: desc itself where that is no index.
func (s *Store) choose(desc v1.Descriptor) (v1.Descriptor, error) {
	if !desc.MediaType.IsIndex() {
		return desc, nil
	}
	var others []string
	chosen, err := s.chooseIn(desc, map[v1.Hash]bool{}, &others)
	if err != nil {
		return v1.Descriptor{}, err
	}
	if chosen == nil {
		return v1.Descriptor{}, shed.Errorf(shed.CodeUnsupported, "it has no image for linux/%s; it has %q", runtime.GOARCH, others)
	}
	return *chosen, nil
}

// chooseIn looks for the manifest for this host in an index, unless it was seen, and notes for what others there are.
func (s *Store) chooseIn(desc v1.Descriptor, seen map[v1.Hash]bool, others *[]string) (*v1.Descriptor, error) {
	if seen[desc.Digest] {
		return nil, nil
	}
	if seen[desc.Digest] = true; len(seen) > maxIndexes {
		return nil, shed.Errorf(shed.CodeUnsupported, "it has more than %d indexes in it", maxIndexes)
	}
	raw, err := s.readBlob(desc.Digest)
	if err != nil {
		return nil, err
	}
	index, err := v1.ParseIndexManifest(bytes.NewReader(raw))
	if err != nil {
		return nil, fmt.Errorf("%s is no index: %w: %w", s.blob(desc.Digest), errDamaged, err)
	}
	for _, d := range index.Manifests {
		switch {
		case d.MediaType.IsIndex():
			chosen, err := s.chooseIn(d, seen, others)
			if chosen != nil || err != nil && !errors.Is(err, fs.ErrNotExist) {
				return chosen, err
			}
		case d.MediaType.IsImage():
			p := d.Platform
			if p == nil {
				_, cfg, err := s.manifest(d.Digest, d.MediaType)
				if err != nil {
					continue // of another platform, perhaps, and left out of this copy of the index
				}
				p = &v1.Platform{OS: cfg.OS, Architecture: cfg.Architecture}
			}
			if forHost(*p) {
				return &d, nil
			}
			*others = append(*others, p.String())
		}
	}
	return nil, nil
}

// forHost says whether a machine on this host runs images for p.
func forHost(p v1.Platform) bool {
	return p.Architecture == runtime.GOARCH && (p.OS == "linux" || p.OS == "")
}

// checkTag returns the familiar form of a tag that an image is to get.
func checkTag(tag string) (string, error) {
	if strings.Contains(tag, "@") || strings.HasPrefix(tag, "sha256:") {
		return "", shed.Errorf(shed.CodeInvalid, "%q can't be a tag: it is a digest", tag).WithHint("write NAME or NAME:TAG")
	}
	return Familiar(tag)
}

// Tag gives the image that name names, as Resolve takes it, the tag, which it takes from the image that had
// it. A tag that is no reference is CodeInvalid.
func (s *Store) Tag(ctx context.Context, name, tag string) (*shed.Image, error) {
	tag, err := checkTag(tag)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	desc, err := s.find(name)
	if err != nil {
		return nil, err
	}
	if desc, err = s.setTags([]v1.Descriptor{desc}, []string{tag}); err != nil {
		return nil, err
	}
	return s.image(desc)
}

// tag makes name, in its familiar form, the tag of the manifest that desc points to, and of no other.
func (s *Store) tag(desc v1.Descriptor, name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, err := s.setTags([]v1.Descriptor{desc}, []string{name})
	return err
}

// setTags gives each of the manifests its tag, or makes sure that the index has it where that is "", all at once. It
// returns the last one's entry.
func (s *Store) setTags(descs []v1.Descriptor, tags []string) (v1.Descriptor, error) {
	index, err := s.index()
	if err != nil {
		return v1.Descriptor{}, err
	}
	var last v1.Descriptor
	for i, desc := range descs {
		last = setTag(index, desc, tags[i])
	}
	return last, s.writeIndex(index)
}

// setTag is setTags for one manifest, in index. What other tools have noted of the manifest stays.
func setTag(index *v1.IndexManifest, desc v1.Descriptor, tag string) v1.Descriptor {
	same := func(d v1.Descriptor) bool { return d.Digest == desc.Digest }
	at := slices.IndexFunc(index.Manifests, same)
	if at >= 0 {
		desc = index.Manifests[at]
	}
	if tag == "" {
		if at < 0 {
			desc = withTag(desc, "")
			index.Manifests = append(index.Manifests, desc)
		}
		return desc
	}
	entries := make([]v1.Descriptor, 0, len(index.Manifests)+1)
	var untagged []v1.Descriptor
	for _, d := range index.Manifests {
		switch {
		case d.Annotations[refName] != "" && sameTag(d.Annotations[refName], tag):
			untagged = append(untagged, withTag(d, ""))
		case d.Annotations[refName] == "" && same(d): // becomes the tagged one
		default:
			entries = append(entries, d)
		}
	}
	desc = withTag(desc, tag)
	index.Manifests = appendNew(append(entries, desc), untagged)
	return desc
}

// appendNew appends those of more whose digest no entry has yet.
func appendNew(entries, more []v1.Descriptor) []v1.Descriptor {
	for _, d := range more {
		if !slices.ContainsFunc(entries, func(o v1.Descriptor) bool { return o.Digest == d.Digest }) {
			entries = append(entries, d)
		}
	}
	return entries
}

// withTag returns a copy of desc with that tag and no other, or with none.
func withTag(desc v1.Descriptor, tag string) v1.Descriptor {
	annotations := map[string]string{}
	maps.Copy(annotations, desc.Annotations)
	delete(annotations, refName)
	delete(annotations, containerdName)
	if tag != "" {
		annotations[refName] = tag
	}
	desc.Annotations = annotations
	return desc
}

func (s *Store) index() (*v1.IndexManifest, error) {
	path := s.path("index.json")
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	index, err := v1.ParseIndexManifest(bytes.NewReader(b))
	if err != nil {
		return nil, fmt.Errorf("%s is damaged: %w", path, err)
	}
	return index, nil
}

func (s *Store) writeIndex(index *v1.IndexManifest) error {
	b, err := json.MarshalIndent(index, "", "  ")
	if err != nil {
		return err
	}
	return s.writeFile(s.path("index.json"), b)
}
