package image

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/preset"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

func TestBuildPresetRefuses(t *testing.T) {
	s := open(t, t.TempDir())
	if _, err := s.BuildPreset(t.Context(), "nope", nil); shed.ErrorCode(err) != shed.CodeInvalid {
		t.Errorf("got %v, want %s", err, shed.CodeInvalid)
	}
}

func TestBuildPresetWaits(t *testing.T) {
	s := open(t, t.TempDir())
	s.building <- struct{}{}
	ctx, cancel := context.WithCancel(t.Context())
	_, err := s.BuildPreset(ctx, "base", func(e shed.Event) {
		if e.Phase != "wait" {
			t.Errorf("it didn't wait: %+v", e)
		}
		cancel()
	})
	if !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// fakeBuild starts the building of a preset whose lowest layer is the tar.
func fakeBuild(t *testing.T, s *Store, name string, base []byte) *presetBuild {
	t.Helper()
	made, err := preset.Find(name)
	if err != nil {
		t.Fatal(err)
	}
	added, err := s.newAddition()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { added.end(nil) })
	b := &presetBuild{addition: added, preset: made, suite: "sid"}
	blob, l, err := b.layer(t.Context(), bytes.NewReader(base))
	if err == nil {
		err = b.commit(blob, l, "fake")
	}
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func mustImage(t *testing.T, b *presetBuild, made time.Time) v1.Descriptor {
	t.Helper()
	b.layers[0].history.Created = v1.Time{Time: made}
	desc, err := b.image()
	if err != nil {
		t.Fatal(err)
	}
	b.end(nil)
	return desc
}

func TestBuilt(t *testing.T) {
	s := open(t, t.TempDir())
	base, err := preset.Find("base")
	if err != nil {
		t.Fatal(err)
	}
	version := base.Version("sid")
	if img, _ := s.built(version); img != nil {
		t.Fatalf("an empty store has %+v", img)
	}
	now := time.Now().UTC().Truncate(time.Second)
	mustImage(t, fakeBuild(t, s, "extensions", tarOf(t, "a", "1")), now)
	newest := fakeBuild(t, s, "full", tarOf(t, "a", "2"))
	mustImage(t, newest, now.Add(time.Hour))
	mustImage(t, fakeBuild(t, s, "base", tarOf(t, "a", "3")), now.Add(-time.Hour))
	mustImage(t, fakeBuild(t, s, "builder", tarOf(t, "a", "4")), now.Add(2*time.Hour))

	img, release := s.built(version)
	if img == nil || img.name != "full" || img.diffID != newest.layers[0].diffID || img.desc.Digest != newest.layers[0].desc.Digest {
		t.Fatalf("got %+v, want the layer of full", img)
	}
	if s.held[img.desc.Digest] != 1 || s.held[img.diffID] != 1 {
		t.Errorf("held are %v", s.held)
	}
	release()
	if len(s.held) != 0 {
		t.Errorf("still held are %v", s.held)
	}
	if img, _ := s.built(base.Version("other")); img != nil {
		t.Errorf("of another suite it has %+v", img)
	}
	if err := os.Remove(s.blob(newest.layers[0].desc.Digest)); err != nil {
		t.Fatal(err)
	}
	if img, release := s.built(version); img == nil || img.name != "extensions" {
		t.Errorf("without that one's blob it takes %+v", img)
	} else {
		release()
	}
}

// TestBuildDiscards has a build that fails leave nothing, and what was there before alone.
func TestBuildDiscards(t *testing.T) {
	s := open(t, t.TempDir())
	kept := mustImage(t, fakeBuild(t, s, "base", tarOf(t, "a", "1")), time.Now())
	before := files(t, filepath.Dir(s.dir))
	b := fakeBuild(t, s, "base", tarOf(t, "a", "2"))
	if len(files(t, filepath.Dir(s.dir))) != len(before)+2 {
		t.Fatal("no blob and no block image was written")
	}
	if _, err := s.Prune(t.Context(), func() (map[string][]string, error) { return nil, nil }, false); err != nil {
		t.Fatal(err)
	}
	if len(files(t, filepath.Dir(s.dir))) != len(before)+2 {
		t.Error("a prune removes what a build is making")
	}
	if err := b.end(errors.New("failed")); err == nil || err.Error() != "failed" {
		t.Fatalf("got %v", err)
	}
	if after := files(t, filepath.Dir(s.dir)); !slices.Equal(after, before) {
		t.Errorf("left are %q, want %q", after, before)
	}
	if _, err := s.image(kept); err != nil {
		t.Error(err)
	}
}

func files(t *testing.T, dir string) []string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			out = append(out, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}
