//go:build linux

package engine

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/state"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// load puts an image of one file into the fixture's store and returns its digest.
func (f *fixture) load(t *testing.T, tag, content string) string {
	t.Helper()
	files := map[string][]byte{}
	marshal := func(v any) []byte {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	add := func(b []byte, mediaType types.MediaType) v1.Descriptor {
		digest, size, err := v1.SHA256(bytes.NewReader(b))
		if err != nil {
			t.Fatal(err)
		}
		files["blobs/sha256/"+digest.Hex] = b
		return v1.Descriptor{MediaType: mediaType, Size: size, Digest: digest}
	}
	layer := add(tarOf(t, map[string][]byte{"file": []byte(content)}), types.OCIUncompressedLayer)
	config := add(marshal(v1.ConfigFile{
		Architecture: runtime.GOARCH, OS: "linux", RootFS: v1.RootFS{Type: "layers", DiffIDs: []v1.Hash{layer.Digest}},
	}), types.OCIConfigJSON)
	manifest := add(marshal(v1.Manifest{
		SchemaVersion: 2, MediaType: types.OCIManifestSchema1, Config: config, Layers: []v1.Descriptor{layer},
	}), types.OCIManifestSchema1)
	manifest.Annotations = map[string]string{"org.opencontainers.image.ref.name": tag}
	files["index.json"] = marshal(v1.IndexManifest{SchemaVersion: 2, Manifests: []v1.Descriptor{manifest}})
	images, err := f.Images.Load(t.Context(), bytes.NewReader(tarOf(t, files)), nil)
	if err != nil || len(images) != 1 || images[0].Ref != tag {
		t.Fatalf("%+v, %v", images, err)
	}
	return images[0].Digest
}

func tarOf(t *testing.T, files map[string][]byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for name, content := range files {
		err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: int64(len(content)), Mode: 0o644})
		if err == nil {
			_, err = w.Write(content)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// shedOf gives the fixture a shed of an image.
func (f *fixture) shedOf(t *testing.T, name, digest string) {
	t.Helper()
	err := f.State.Create(state.Record{
		Phase: state.Ready, Name: name, Backend: "fake", Image: "base", ImageDigest: digest, Kernel: "k",
		CPUs: 1, MemoryMB: 512, UpperSize: 1 << 30, Workspace: home,
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestImagesSayWhatTheyAreFor(t *testing.T) {
	f := newFixture(t)
	b := f.Backends["fake"]
	aliased := f.load(t, "ghcr.io/owner/full:1", "full")
	pinned := f.load(t, "pinned", "pinned")
	b.Aliases = map[string]string{"full": "ghcr.io/owner/full:1", "pinned": "example.com/x@" + pinned}
	b.Image = "docker.io/library/base:latest"
	f.Backends["fake"] = b
	f.load(t, "base", "base")
	used := f.load(t, "mine", "mine")
	f.load(t, "mine", "mine, but newer")
	for _, name := range []string{"b", "a"} {
		f.shedOf(t, name, used)
	}
	e := f.engine(t)
	images, err := e.Images(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]shed.ImageSource{}
	for _, img := range images {
		got[img.Ref] = img.Source
		if want := img.Digest == used; want != (len(img.InUse) > 0) || want && !slices.Equal(img.InUse, []string{"a", "b"}) {
			t.Errorf("%s %s is used by %q", img.Ref, img.Digest, img.InUse)
		}
	}
	want := map[string]shed.ImageSource{
		"": shed.SourceDangling, "base": shed.SourceConfig, "ghcr.io/owner/full:1": shed.SourceConfig,
		"pinned": shed.SourceConfig, "mine": shed.SourceUser,
	}
	for ref, source := range want {
		if got[ref] != source {
			t.Errorf("%q has the source %q, want %q", ref, got[ref], source)
		}
	}
	detail, err := e.InspectImage(t.Context(), used)
	if err != nil || !slices.Equal(detail.InUse, []string{"a", "b"}) || detail.MediaType == "" {
		t.Errorf("%+v, %v", detail, err)
	}
	if img, err := e.Tag(t.Context(), aliased, "another"); err != nil || img.Source != shed.SourceUser {
		t.Errorf("%+v, %v", img, err)
	}
}

func TestPruneKeepsWhatShedsNeed(t *testing.T) {
	f := newFixture(t)
	stopped := f.load(t, "x", "stopped")
	stuck := f.load(t, "x", "stuck")
	outside := f.load(t, "x", "outside")
	gone := f.load(t, "x", "gone")
	tagged := f.load(t, "x", "tagged")
	f.shedOf(t, "stopped", stopped)
	e := f.engine(t)
	// One whose removal fails has a record still, and one is there that this server hasn't seen yet.
	e.sheds["stuck"] = newEntry(state.Record{Name: "stuck", ImageDigest: stuck}, shed.StatusDeleting)
	f.shedOf(t, "outside", outside)

	dry, err := e.PruneImages(t.Context(), true)
	if err != nil {
		t.Fatal(err)
	}
	got, err := e.PruneImages(t.Context(), false)
	if err != nil || len(got.Items) != len(dry.Items) || len(got.Items) == 0 || got.Items[0].Name != gone {
		t.Errorf("%+v, %v; a dry run said %+v", got, err, dry)
	}
	for _, digest := range []string{stopped, stuck, outside, tagged} {
		if img, err := f.Images.Resolve(digest); err != nil || img.Layers[0].BlockImage == 0 {
			t.Errorf("%s: %+v, %v", digest, img, err)
		}
	}
	if _, err := f.Images.Resolve(gone); shed.ErrorCode(err) != shed.CodeNoImage {
		t.Errorf("%s: %v", gone, err)
	}
	if _, err := e.RemoveImage(t.Context(), stopped, false); shed.ErrorCode(err) != shed.CodeConflict || !strings.Contains(err.Error(), "stopped") {
		t.Errorf("removing an image in use: %v", err)
	}
	if r, err := e.RemoveImage(t.Context(), "x", false); err != nil || len(r.Items) < 4 {
		t.Errorf("%+v, %v", r, err)
	}
	if _, err := f.Images.Resolve(stopped); err != nil {
		t.Error(err)
	}
}

// A shed whose record can't be read may need any image.
func TestPruneStopsAtADamagedRecord(t *testing.T) {
	for name, late := range map[string]bool{"at the start": false, "since": true} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			f.load(t, "x", "old")
			f.load(t, "x", "new")
			f.shedOf(t, "hurt", "sha256:abc")
			hurt := func() { write(t, f.State.Shed("hurt")+"/shed.json", "{") }
			if !late {
				hurt()
			}
			e := f.engine(t)
			if late { // and restarted since
				delete(e.sheds, "hurt")
				hurt()
			}
			for _, do := range []func() error{
				func() error { _, err := e.PruneImages(t.Context(), true); return err },
				func() error { _, err := e.PruneImages(t.Context(), false); return err },
				func() error { _, err := e.RemoveImage(t.Context(), "x", false); return err },
			} {
				err := do()
				if shed.ErrorCode(err) != shed.CodeConflict || !strings.Contains(err.Error(), `"hurt"`) || !strings.Contains(shed.ErrorHint(err), "shed delete hurt") {
					t.Errorf("%v, hint %q", err, shed.ErrorHint(err))
				}
			}
			if images, err := f.Images.List(t.Context()); err != nil || len(images) != 2 {
				t.Errorf("left are %v, %v", images, err)
			}
			if !late {
				if err := e.Delete(t.Context(), "hurt", nil); err != nil {
					t.Fatal(err)
				}
				if r, err := e.PruneImages(t.Context(), false); err != nil || len(r.Items) == 0 {
					t.Errorf("%+v, %v", r, err)
				}
			}
		})
	}
}

// While a create goes on, and before it has a record, nothing takes its image.
func TestCreateHoldsItsImage(t *testing.T) {
	f := newFixture(t)
	used := f.load(t, "base", "used")
	e := f.engine(t)
	looked := false
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	// A create waits for the kernel bundle before it writes the record.
	_, err := e.Create(&hookContext{Context: ctx, hook: func() {
		defer cancel()
		looked = true
		if exists(t, filepath.Join(f.State.Shed("new"), "shed.json")) {
			t.Error("there is a record already")
		}
		if r, err := e.RemoveImage(t.Context(), "base", false); err != nil || len(r.Items) != 1 {
			t.Errorf("%+v, %v", r, err)
		}
		if r, err := e.PruneImages(t.Context(), false); err != nil || len(r.Items) != 0 {
			t.Errorf("%+v, %v", r, err)
		}
		if _, err := f.Images.Resolve(used); err != nil {
			t.Error(err)
		}
	}}, shed.CreateOptions{Name: "new"}, nil)
	if !errors.Is(err, context.Canceled) || !looked {
		t.Fatalf("the create ended with %v", err)
	}
	// It has failed, and lets go.
	if r, err := e.PruneImages(t.Context(), false); err != nil || len(r.Items) == 0 {
		t.Errorf("%+v, %v", r, err)
	}
	if _, err := e.Create(t.Context(), shed.CreateOptions{Name: "new"}, nil); shed.ErrorCode(err) != shed.CodeNoImage {
		t.Errorf("got %v", err)
	}
}

// hookContext calls hook when somebody first asks how it ends.
type hookContext struct {
	context.Context
	once sync.Once
	hook func()
}

func (c *hookContext) Done() <-chan struct{} {
	c.once.Do(c.hook)
	return c.Context.Done()
}
