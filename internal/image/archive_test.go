package image

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/charliek/shed"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

func save(t testing.TB, s *Store, names ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := s.Save(t.Context(), names, &b); err != nil {
		t.Fatal(err)
	}
	if len(s.held) != 0 {
		t.Errorf("after a save there are held %v", s.held)
	}
	return b.Bytes()
}

func archiveFile(t testing.TB, content []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "archive.tar")
	if err := os.WriteFile(path, content, 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// refsOf returns REF@DIGEST of images.
func refsOf(images []*shed.Image) string {
	var refs []string
	for _, img := range images {
		refs = append(refs, img.Ref+"@"+img.Digest)
	}
	slices.Sort(refs)
	return strings.Join(refs, " ")
}

func TestSaveAndLoad(t *testing.T) {
	s := open(t, t.TempDir())
	shared := gz(t, "shared", "x")
	one := digestOf(t, addImage(t, s, "one", shared, layerOf(t, types.OCILayerZStd, tarOf(t, "own", "x"))))
	two := digestOf(t, addImage(t, s, "ghcr.io/owner/two:1.0", shared))
	three := imageFor(t, runtime.GOARCH, gz(t, "three", "x"))
	addIndex(t, s, "three", indexOf(t, three, imageFor(t, foreignArch)))
	if _, err := s.Tag(t.Context(), "one", "uno"); err != nil {
		t.Fatal(err)
	}
	names := []string{"one", "uno", "ghcr.io/owner/two:1.0", "three"}
	archive := save(t, s, names...)
	if !bytes.Equal(archive, save(t, s, names...)) {
		t.Error("two archives of the same images differ")
	}
	want := refsOf([]*shed.Image{
		{Ref: "one", Digest: one.String()}, {Ref: "uno", Digest: one.String()},
		{Ref: "ghcr.io/owner/two:1.0", Digest: two.String()}, {Ref: "three", Digest: digestOf(t, three).String()},
	})
	for kind, content := range map[string][]byte{
		"plain": archive, "gzip": compress(t, "gzip", archive), "zstd": compress(t, "zstd", archive),
	} {
		other := open(t, t.TempDir())
		var events []string
		images, err := other.Load(t.Context(), bytes.NewReader(content), func(e shed.Event) {
			if e.Message != "" || e.Done {
				events = append(events, e.Phase)
			}
		})
		if err != nil || refsOf(images) != want {
			t.Fatalf("%s: %s, %v; want %s", kind, refsOf(images), err, want)
		}
		if len(events) < 2 || events[0] != "load" || events[1] != "load" {
			t.Errorf("phases: %q", events)
		}
		list, err := other.List(t.Context())
		if err != nil || refsOf(list) != want {
			t.Errorf("%s: listed are %s, %v", kind, refsOf(list), err)
		}
		for _, img := range list {
			for _, l := range img.Layers {
				if l.BlockImage == 0 {
					t.Errorf("%s: layer %s of %s has no block image", kind, l.Digest, img.Ref)
				}
			}
		}
		if len(other.held) != 0 {
			t.Errorf("held are %v", other.held)
		}
		if left, _ := filepath.Glob(other.path(tempPrefix + "*")); len(left) != 0 {
			t.Errorf("left are %v", left)
		}
		if r, err := other.Prune(t.Context(), unused, true); err != nil || len(r.Items) != 0 {
			t.Errorf("to be pruned are %+v, %v", r, err)
		}
		if !bytes.Equal(save(t, other, names...), archive) {
			t.Errorf("%s: saved again it is another archive", kind)
		}
	}

	// By digest it has no tag, and is loaded without one.
	other := open(t, t.TempDir())
	images, err := other.Load(t.Context(), bytes.NewReader(save(t, s, one.Hex[:12])), nil)
	if err != nil || len(images) != 1 || images[0].Ref != "" || images[0].Source != shed.SourceDangling || images[0].Digest != one.String() {
		t.Errorf("%+v, %v", images, err)
	}
	// A tag is taken from what has it, which stays.
	addImage(t, other, "one", gz(t, "other", "x"))
	if _, err := other.Load(t.Context(), bytes.NewReader(archive), nil); err != nil {
		t.Fatal(err)
	}
	if img, err := other.Resolve("one"); err != nil || img.Digest != one.String() {
		t.Errorf("%v, %v", img, err)
	}
	if list, _ := other.List(t.Context()); len(list) != 5 || list[0].Ref != "" {
		t.Errorf("listed are %s", refsOf(list))
	}
}

func TestSaveErrors(t *testing.T) {
	s := open(t, t.TempDir())
	layer := gz(t, "f", strings.Repeat("x", 100))
	addImage(t, s, "x", layer)
	digest, _ := layer.Digest()
	for _, tt := range []struct {
		names []string
		code  shed.Code
	}{{nil, shed.CodeInvalid}, {[]string{"x", "none"}, shed.CodeNoImage}} {
		var b bytes.Buffer
		if err := s.Save(t.Context(), tt.names, &b); shed.ErrorCode(err) != tt.code || b.Len() != 0 {
			t.Errorf("%q: %v, and %d bytes", tt.names, err, b.Len())
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Save(ctx, []string{"x"}, io.Discard); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	fi, err := os.Stat(s.blob(digest))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(s.blob(digest), make([]byte, fi.Size()), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := s.Save(t.Context(), []string{"x"}, io.Discard); err == nil || !strings.Contains(err.Error(), s.blob(digest)) {
		t.Errorf("a damaged layer: %v", err)
	}
	if err := os.Truncate(s.blob(digest), 3); err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := s.Save(t.Context(), []string{"x"}, &b); err == nil || !strings.Contains(err.Error(), s.blob(digest)) || b.Len() != 0 {
		t.Errorf("a short layer: %v, and %d bytes", err, b.Len())
	}
	if len(s.held) != 0 {
		t.Errorf("held are %v", s.held)
	}
}

// skopeo takes our archives, and we take its: in OCI's form and in docker's.
func TestSkopeoArchives(t *testing.T) {
	s := open(t, t.TempDir())
	one := addImage(t, s, "one", gz(t, "shared", "x"), gz(t, "own", "y"))
	two := digestOf(t, addImage(t, s, "ghcr.io/owner/two:1.0", gz(t, "shared", "x")))

	ours := archiveFile(t, save(t, s, "one"))
	dir := t.TempDir()
	skopeo(t, "copy", "oci-archive:"+ours, "oci:"+dir+":x")
	if out := skopeo(t, "inspect", "oci:"+dir+":x"); !strings.Contains(out, digestOf(t, one).String()) {
		t.Errorf("skopeo sees %s", out)
	}
	ours = archiveFile(t, save(t, s, "one", "ghcr.io/owner/two:1.0"))
	if out := skopeo(t, "inspect", "oci-archive:"+ours+":ghcr.io/owner/two:1.0"); !strings.Contains(out, two.String()) {
		t.Errorf("skopeo sees %s", out)
	}
	if out := skopeo(t, "inspect", "docker-archive:"+ours+":one:latest"); !strings.Contains(out, `"Architecture": "`+runtime.GOARCH) {
		t.Errorf("skopeo sees %s", out)
	}

	theirs := filepath.Join(t.TempDir(), "oci.tar")
	skopeo(t, "copy", "oci:"+s.dir+":one", "oci-archive:"+theirs+":docker.io/library/three:latest")
	f, err := os.Open(theirs)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	other := open(t, t.TempDir())
	images, err := other.Load(t.Context(), f, nil)
	if err != nil || refsOf(images) != "three@"+digestOf(t, one).String() {
		t.Errorf("%s, %v", refsOf(images), err)
	}

	docker := filepath.Join(t.TempDir(), "docker.tar")
	skopeo(t, "copy", "oci:"+s.dir+":one", "docker-archive:"+docker+":docker.io/library/four:1", "--additional-tag", "ghcr.io/owner/four:1")
	content, err := os.ReadFile(docker)
	if err != nil {
		t.Fatal(err)
	}
	links := 0
	for tr := tar.NewReader(bytes.NewReader(content)); ; {
		hdr, err := tr.Next()
		if err != nil {
			break
		}
		if hdr.Typeflag == tar.TypeSymlink {
			links++
		}
	}
	if links == 0 {
		t.Error("the archive has no links, which were to be tested")
	}
	images, err = other.Load(t.Context(), bytes.NewReader(content), nil)
	if err != nil || len(images) != 2 || images[0].Ref != "four:1" || images[1].Ref != "ghcr.io/owner/four:1" {
		t.Fatalf("%s, %v", refsOf(images), err)
	}
	ready(t, other, "four:1")
	again, err := other.Load(t.Context(), bytes.NewReader(content), nil)
	if err != nil || refsOf(again) != refsOf(images) {
		t.Errorf("loaded again: %s, %v, want %s", refsOf(again), err, refsOf(images))
	}
	for _, l := range images[0].Layers {
		if l.Digest != l.DiffID {
			t.Errorf("a layer is %+v", l)
		}
	}
	skopeo(t, "copy", "oci-archive:"+archiveFile(t, save(t, other, "four:1")), "oci:"+t.TempDir()+":x")
}

// crane(1) has its own docker archives, with compressed layers.
func TestCraneArchive(t *testing.T) {
	img := imageFor(t, runtime.GOARCH, gz(t, "f", "1"), layerOf(t, types.OCIUncompressedLayer, tarOf(t, "f", "2")))
	tag, err := name.NewTag("example.com/a/b:c")
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := tarball.Write(tag, img, &b); err != nil {
		t.Fatal(err)
	}
	s := open(t, t.TempDir())
	images, err := s.Load(t.Context(), bytes.NewReader(b.Bytes()), nil)
	if err != nil || len(images) != 1 || images[0].Ref != "example.com/a/b:c" {
		t.Fatalf("%s, %v", refsOf(images), err)
	}
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	for i, l := range layers {
		diffID, _ := l.DiffID()
		if got := images[0].Layers[i]; got.DiffID != diffID.String() || got.BlockImage == 0 {
			t.Errorf("layer %d is %+v", i, got)
		}
	}
	config, err := img.RawConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(s.blob(descriptor(config, "").Digest)); err != nil || !bytes.Equal(got, config) {
		t.Errorf("the configuration is %q, %v", got, err)
	}
}
