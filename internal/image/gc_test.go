package image

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/charliek/shed"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// unused is InUse where there are no sheds.
func unused() (map[string][]string, error) { return nil, nil }

// usedBy is InUse where one shed uses an image.
func usedBy(digest, name string) InUse {
	return func() (map[string][]string, error) { return map[string][]string{digest: {name}}, nil }
}

// tree lists all files of s.
func tree(t testing.TB, s *Store) []string {
	t.Helper()
	var files []string
	err := filepath.WalkDir(filepath.Dir(s.dir), func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			files = append(files, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func kinds(r *shed.Removed) string {
	var out []string
	for _, item := range r.Items {
		if len(out) == 0 || out[len(out)-1] != item.Kind {
			out = append(out, item.Kind)
		}
	}
	return strings.Join(out, ", ")
}

func ready(t testing.TB, s *Store, name string) *shed.Image {
	t.Helper()
	img, err := s.Resolve(name)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.Rootfs(t.Context(), img, nil); err != nil {
		t.Fatal(err)
	}
	return img
}

func gz(t testing.TB, name, content string) v1.Layer {
	t.Helper()
	return layerOf(t, types.OCILayer, tarOf(t, name, content))
}

func TestPrune(t *testing.T) {
	s := open(t, t.TempDir())
	shared := gz(t, "shared", "x")
	addImage(t, s, "tagged", shared, gz(t, "tagged", "x"))
	ready(t, s, "tagged")
	old := addImage(t, s, "moves", shared, gz(t, "old", "x"))
	ready(t, s, "moves")
	addImage(t, s, "moves", shared, gz(t, "new", "x"))
	ready(t, s, "moves")
	inUse := addImage(t, s, "moves2", shared, gz(t, "used", "x"))
	ready(t, s, "moves2")
	addImage(t, s, "moves2", shared, gz(t, "newer", "x"))
	ready(t, s, "moves2")
	addIndex(t, s, "many", indexOf(t, imageFor(t, foreignArch, gz(t, "foreign", "x")), imageFor(t, runtime.GOARCH, gz(t, "mine", "x"))))
	sure := tree(t, s)
	use := usedBy(digestOf(t, inUse).String(), "dev")

	// Nobody's: a blob, a partial download, and all that only the old image has.
	stray := descriptor([]byte("stray"), "")
	if err := s.writeFile(s.blob(stray.Digest), []byte("stray")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(s.path(partialDir), 0o755); err != nil {
		t.Fatal(err)
	}
	half := s.partial(stray.Digest)
	if err := os.WriteFile(half, make([]byte, 5000), 0o644); err != nil {
		t.Fatal(err)
	}
	all := tree(t, s)
	dry, err := s.Prune(t.Context(), use, true)
	if err != nil {
		t.Fatal(err)
	}
	if got := kinds(dry); got != "image, blob, block image, partial download" {
		t.Errorf("it would remove %s", got)
	}
	if now := tree(t, s); !slices.Equal(now, all) {
		t.Error("a dry run changes the files")
	}
	got, err := s.Prune(t.Context(), use, false)
	if err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(got) != fmt.Sprint(dry) {
		t.Errorf("it removes %+v, and a dry run said %+v", got, dry)
	}
	var sum int64
	for _, item := range got.Items {
		sum += item.Size
	}
	if sum != got.Freed || sum == 0 {
		t.Errorf("%d bytes are said to be freed, the items have %d", got.Freed, sum)
	}
	oldLayers, err := old.Layers()
	if err != nil {
		t.Fatal(err)
	}
	diffID, _ := oldLayers[1].DiffID()
	layer, _ := oldLayers[1].Digest()
	cfg, _ := old.ConfigName()
	gone := []string{s.blob(digestOf(t, old)), s.blob(cfg), s.blob(layer), strings.Replace(all[len(all)-1], filepath.Base(all[len(all)-1]), diffID.Hex+".img", 1)}
	want := slices.DeleteFunc(sure, func(path string) bool { return slices.Contains(gone, path) })
	if now := tree(t, s); !slices.Equal(now, want) {
		t.Errorf("left are\n%s\nwant\n%s", strings.Join(now, "\n"), strings.Join(want, "\n"))
	}
	for _, ref := range []string{"tagged", "moves", "moves2", "many", digestOf(t, inUse).String()} {
		ready(t, s, ref)
	}
	if again, err := s.Prune(t.Context(), use, false); err != nil || len(again.Items) != 0 || again.Items == nil {
		t.Errorf("a second prune removes %+v, %v", again, err)
	}
	// Without the shed its image goes too.
	if last, err := s.Prune(t.Context(), unused, false); err != nil || kinds(last) != "image, blob, block image" || len(last.Items) != 5 {
		t.Errorf("without the shed it removes %+v, %v", last, err)
	}
}

// An image that is in no index any more is a shed's all the same, and so is what an index without a tag leads to.
func TestPruneFollowsRecords(t *testing.T) {
	s := open(t, t.TempDir())
	img := digestOf(t, addImage(t, s, "x", gz(t, "f", "x")))
	ready(t, s, "x")
	mine := imageFor(t, runtime.GOARCH, gz(t, "mine", "x"))
	addIndex(t, s, "", indexOf(t, mine))
	index, err := s.index()
	if err != nil {
		t.Fatal(err)
	}
	index.Manifests = index.Manifests[1:]
	if err := s.writeIndex(index); err != nil {
		t.Fatal(err)
	}
	use := func() (map[string][]string, error) {
		return map[string][]string{img.String(): {"a"}, digestOf(t, mine).String(): {"b"}}, nil
	}
	if r, err := s.Prune(t.Context(), use, false); err != nil || len(r.Items) != 0 {
		t.Errorf("it removes %+v, %v", r, err)
	}
	ready(t, s, img.String())
	ready(t, s, digestOf(t, mine).String())

	// What an image only refers to may be anywhere.
	subject := descriptor([]byte("elsewhere"), types.OCIManifestSchema1)
	manifest, err := mine.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	manifest = manifest.DeepCopy()
	manifest.Subject = &subject
	raw, err := json.Marshal(manifest)
	if err != nil {
		t.Fatal(err)
	}
	desc := descriptor(raw, types.OCIManifestSchema1)
	if err := s.writeFile(s.blob(desc.Digest), raw); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Prune(t.Context(), usedBy(desc.Digest.String(), "c"), false); err != nil {
		t.Error(err)
	}
	ready(t, s, desc.Digest.String())
}

func TestPruneStops(t *testing.T) {
	for name, hurt := range map[string]func(s *Store, manifest, config v1.Hash) error{
		"missing":        func(s *Store, m, _ v1.Hash) error { return os.Remove(s.blob(m)) },
		"damaged":        func(s *Store, m, _ v1.Hash) error { return os.WriteFile(s.blob(m), []byte("{}"), 0o644) },
		"missing config": func(s *Store, _, c v1.Hash) error { return os.Remove(s.blob(c)) },
		"damaged config": func(s *Store, _, c v1.Hash) error { return os.WriteFile(s.blob(c), []byte("{}"), 0o644) },
	} {
		t.Run(name, func(t *testing.T) {
			s := open(t, t.TempDir())
			img := addImage(t, s, "x", gz(t, "f", "x"))
			addImage(t, s, "x", gz(t, "g", "x"))
			config, err := img.ConfigName()
			if err != nil {
				t.Fatal(err)
			}
			if err := hurt(s, digestOf(t, img), config); err != nil {
				t.Fatal(err)
			}
			before := tree(t, s)
			use := usedBy(digestOf(t, img).String(), "dev")
			for _, f := range []func() error{
				func() error { return second(s.Prune(t.Context(), use, true)) },
				func() error { return second(s.Prune(t.Context(), use, false)) },
				func() error { return second(s.Remove(t.Context(), "x", false, use)) },
			} {
				err := f()
				if shed.ErrorCode(err) != shed.CodeConflict || !strings.Contains(err.Error(), "dev") || shed.ErrorHint(err) == "" {
					t.Errorf("got %v", err)
				}
			}
			if now := tree(t, s); !slices.Equal(now, before) {
				t.Error("files have changed")
			}
			// With no shed it is like any other, and goes.
			if _, err := s.Prune(t.Context(), unused, false); err != nil {
				t.Error(err)
			}
			ready(t, s, "x")
		})
	}
	s := open(t, t.TempDir())
	addImage(t, s, "x", gz(t, "f", "x"))
	if _, err := s.Prune(t.Context(), func() (map[string][]string, error) { return nil, errors.New("no idea") }, false); err == nil {
		t.Error("it goes on without knowing what sheds need")
	}
}

func TestRemove(t *testing.T) {
	s := open(t, t.TempDir())
	shared := gz(t, "shared", "x")
	addImage(t, s, "stays", shared)
	stays := tree(t, s)
	img := digestOf(t, addImage(t, s, "one", shared, gz(t, "own", "x")))
	if err := s.tag(v1.Descriptor{MediaType: types.OCIManifestSchema1, Digest: img}, "two"); err != nil {
		t.Fatal(err)
	}
	stray := descriptor([]byte("stray"), "")
	if err := s.writeFile(s.blob(stray.Digest), []byte("stray")); err != nil {
		t.Fatal(err)
	}
	stays = append(stays, s.blob(stray.Digest)) // isn't its own
	slices.Sort(stays)

	for _, name := range []string{"nope", "", img.Hex[:11]} {
		if _, err := s.Remove(t.Context(), name, true, unused); shed.ErrorCode(err) != shed.CodeNoImage {
			t.Errorf("removing %q: %v", name, err)
		}
	}
	use := usedBy(img.String(), "dev")
	for _, name := range []string{"one", img.String(), "x@" + img.String()} {
		_, err := s.Remove(t.Context(), name, false, use)
		if shed.ErrorCode(err) != shed.CodeConflict || !strings.Contains(err.Error(), "dev") || shed.ErrorHint(err) == "" {
			t.Errorf("removing %s, which is in use: %v", name, err)
		}
	}
	r, err := s.Remove(t.Context(), "docker.io/library/one", false, unused)
	if err != nil || len(r.Items) != 1 || r.Items[0] != (shed.RemovedItem{Kind: "tag", Name: "one"}) {
		t.Fatalf("one of two tags: %+v, %v", r, err)
	}
	ready(t, s, "two")
	r, err = s.Remove(t.Context(), "two", false, unused)
	if err != nil || kinds(r) != "tag, image, blob, block image" || r.Freed == 0 {
		t.Fatalf("the last tag: %+v, %v", r, err)
	}
	now := slices.DeleteFunc(tree(t, s), func(path string) bool { return strings.HasSuffix(path, ".img") })
	if !slices.Equal(now, stays) {
		t.Errorf("left are\n%s\nwant\n%s", strings.Join(now, "\n"), strings.Join(stays, "\n"))
	}

	// By digest it goes with all its tags; with force, what a shed needs stays.
	img = digestOf(t, addImage(t, s, "one", shared, gz(t, "own", "x")))
	if _, err := s.Tag(t.Context(), "one", "two"); err != nil {
		t.Fatal(err)
	}
	use = usedBy(img.String(), "dev")
	if r, err = s.Remove(t.Context(), img.Hex[:12], true, use); err != nil || kinds(r) != "tag" || len(r.Items) != 2 {
		t.Fatalf("with force: %+v, %v", r, err)
	}
	ready(t, s, img.String())
	if list, _ := s.List(t.Context()); len(list) != 2 || list[0].Source != shed.SourceDangling {
		t.Errorf("listed are %v", list)
	}
	if r, err = s.Remove(t.Context(), img.String(), false, unused); err != nil || kinds(r) != "image, blob, block image" {
		t.Fatalf("without a tag: %+v, %v", r, err)
	}

	// Where it isn't known what sheds need, only a tag can go, and only by force.
	addImage(t, s, "one", shared, gz(t, "own", "x"))
	unknown := func() (map[string][]string, error) { return nil, shed.Errorf(shed.CodeConflict, "damaged") }
	if _, err := s.Remove(t.Context(), "one", false, unknown); shed.ErrorCode(err) != shed.CodeConflict {
		t.Errorf("got %v", err)
	}
	if r, err = s.Remove(t.Context(), "one", true, unknown); err != nil || kinds(r) != "tag" || len(r.Items) != 1 {
		t.Errorf("%+v, %v", r, err)
	}
	ready(t, s, img.String())
}

func TestRemoveIndex(t *testing.T) {
	s := open(t, t.TempDir())
	empty := tree(t, s)
	mine := imageFor(t, runtime.GOARCH, gz(t, "mine", "x"))
	addIndex(t, s, "many", indexOf(t, mine, imageFor(t, foreignArch, gz(t, "foreign", "x"))))
	addIndex(t, s, "others", indexOf(t, imageFor(t, foreignArch, gz(t, "foreign", "x"))))
	if _, err := s.Remove(t.Context(), "many", false, usedBy(digestOf(t, mine).String(), "dev")); shed.ErrorCode(err) != shed.CodeConflict {
		t.Errorf("an index with an image in use: %v", err)
	}
	if _, err := s.Remove(t.Context(), digestOf(t, mine).Hex[:14], false, unused); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Remove(t.Context(), "others", false, unused); err != nil {
		t.Fatal(err)
	}
	if now := tree(t, s); !slices.Equal(now, empty) {
		t.Errorf("left are %v", now)
	}
}

// A damaged image can be removed, and doesn't keep others from it.
func TestRemoveDamaged(t *testing.T) {
	s := open(t, t.TempDir())
	for _, tag := range []string{"a", "b"} {
		img := digestOf(t, addImage(t, s, tag, gz(t, tag, "x")))
		if err := os.WriteFile(s.blob(img), []byte("x"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, tag := range []string{"a", "b"} {
		if r, err := s.Remove(t.Context(), tag, false, unused); err != nil || kinds(r) != "tag, image, blob" {
			t.Errorf("%s: %+v, %v", tag, r, err)
		}
	}
	if _, err := s.Prune(t.Context(), unused, false); err != nil {
		t.Error(err)
	}
	if left, err := os.ReadDir(s.path("blobs/sha256")); err != nil || len(left) != 0 {
		t.Errorf("left are %v, %v", left, err)
	}
}

func TestHold(t *testing.T) {
	s := open(t, t.TempDir())
	addImage(t, s, "x", gz(t, "f", "x"))
	img, release, err := s.Acquire("x")
	if err != nil {
		t.Fatal(err)
	}
	ready(t, s, "x")
	all := tree(t, s)
	if r, err := s.Remove(t.Context(), "x", false, unused); err != nil || kinds(r) != "tag" {
		t.Errorf("%+v, %v", r, err)
	}
	if r, err := s.Prune(t.Context(), unused, false); err != nil || len(r.Items) != 0 {
		t.Errorf("a prune takes what is held: %+v, %v", r, err)
	}
	if now := tree(t, s); !slices.Equal(now, all) {
		t.Errorf("left are %v", now)
	}
	if _, _, err := s.Acquire("x"); shed.ErrorCode(err) != shed.CodeNoImage {
		t.Errorf("a tag that has gone: %v", err)
	}
	release()
	release()
	if len(s.held) != 0 {
		t.Errorf("held are %v", s.held)
	}
	if r, err := s.Prune(t.Context(), unused, false); err != nil || kinds(r) != "image, blob, block image" {
		t.Errorf("%+v, %v", r, err)
	}
	if _, _, err := s.Acquire(img.Digest); shed.ErrorCode(err) != shed.CodeNoImage {
		t.Errorf("an image that has gone: %v", err)
	}
	// A partial download that goes on is nobody's to remove.
	if err := os.Mkdir(s.path(partialDir), 0o755); err != nil {
		t.Fatal(err)
	}
	h := descriptor([]byte("x"), "").Digest
	if err := os.WriteFile(s.partial(h), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	defer s.hold(h)()
	if r, err := s.Prune(t.Context(), unused, false); err != nil || len(r.Items) != 0 {
		t.Errorf("%+v, %v", r, err)
	}
}
