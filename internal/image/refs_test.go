package image

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/charliek/shed"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// skopeo runs skopeo(1), whose archives and layouts are those of others.
func skopeo(t testing.TB, args ...string) string {
	t.Helper()
	bin, err := exec.LookPath("skopeo")
	if err != nil {
		t.Fatal("skopeo is needed for this test: install it")
	}
	out, err := exec.CommandContext(t.Context(), bin, append([]string{"--insecure-policy", "--tmpdir", t.TempDir()}, args...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("skopeo %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// imageFor makes an image for an architecture.
func imageFor(t testing.TB, arch string, layers ...v1.Layer) v1.Image {
	t.Helper()
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	img, err := mutate.ConfigFile(img, &v1.ConfigFile{
		Architecture: arch, OS: "linux", RootFS: v1.RootFS{Type: "layers"}, Config: v1.Config{Env: []string{"ARCH=" + arch}},
	})
	for _, l := range layers {
		if err == nil {
			mediaType, _ := l.MediaType()
			img, err = mutate.Append(img, mutate.Addendum{Layer: l, MediaType: mediaType, History: v1.History{CreatedBy: "layer"}})
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// indexOf makes an index of images, and of an attestation as BuildKit makes them.
func indexOf(t testing.TB, images ...v1.Image) v1.ImageIndex {
	t.Helper()
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	attestation := imageFor(t, "unknown", layerOf(t, types.OCIUncompressedLayer, tarOf(t, "attested", "x")))
	index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: attestation, Descriptor: v1.Descriptor{
		Platform: &v1.Platform{OS: "unknown", Architecture: "unknown"},
	}})
	for _, img := range images {
		cfg, err := img.ConfigFile()
		if err != nil {
			t.Fatal(err)
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: cfg.Platform()}})
	}
	return index
}

// addIndex puts an index with all that it leads to into the layout of s.
func addIndex(t testing.TB, s *Store, tag string, index v1.ImageIndex) {
	t.Helper()
	path, err := layout.FromPath(s.dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := path.AppendIndex(index, layout.WithAnnotations(map[string]string{refName: tag, "org.example.note": "kept"})); err != nil {
		t.Fatal(err)
	}
}

const foreignArch = "s390x"

func TestResolveSpellings(t *testing.T) {
	s := open(t, t.TempDir())
	deb := digestOf(t, addImage(t, s, "debian", layerOf(t, types.OCILayer, tarOf(t, "f", "1"))))
	// Another tool writes tags as it was given them.
	node := digestOf(t, addImage(t, s, "docker.io/library/node:20", layerOf(t, types.OCILayer, tarOf(t, "f", "2"))))
	odd := digestOf(t, addImage(t, s, "An Odd Tag", layerOf(t, types.OCILayer, tarOf(t, "f", "3"))))
	for ref, want := range map[string]v1.Hash{
		"debian": deb, "debian:latest": deb, "docker.io/debian": deb, "docker.io/library/debian:latest": deb,
		"node:20": node, "docker.io/library/node:20": node, "library/node:20": node, "An Odd Tag": odd,
		"debian@" + deb.String(): deb, "whatever:12@" + node.String(): node,
	} {
		if img, err := s.Resolve(ref); err != nil || img.Digest != want.String() {
			t.Errorf("%s: %v, %v, want %s", ref, img, err, want)
		}
	}
	for _, ref := range []string{"debian:12", "node", "ghcr.io/library/debian", "debian@sha256:12", "debian@" + deb.Hex, "an odd tag", "@", "sha256:"} {
		if _, err := s.Resolve(ref); shed.ErrorCode(err) != shed.CodeNoImage {
			t.Errorf("%s: %v, want %s", ref, err, shed.CodeNoImage)
		}
	}
	// Taken from where it was in another spelling.
	if err := s.tag(v1.Descriptor{MediaType: types.OCIManifestSchema1, Digest: deb}, "node:20"); err != nil {
		t.Fatal(err)
	}
	list, err := s.List(t.Context())
	if err != nil || len(list) != 4 || list[0].Digest != node.String() || list[0].Source != shed.SourceDangling || list[1].Source != shed.SourceUser {
		t.Errorf("listed are %v, %v", list, err)
	}
}

func TestTag(t *testing.T) {
	s := open(t, t.TempDir())
	one := addImage(t, s, "one", layerOf(t, types.OCILayer, tarOf(t, "f", "1")))
	two := digestOf(t, addImage(t, s, "two", layerOf(t, types.OCILayer, tarOf(t, "f", "2"))))
	img, err := s.Tag(t.Context(), "one", "docker.io/library/more:latest")
	if err != nil || img.Ref != "more" || img.Digest != digestOf(t, one).String() || img.Source != shed.SourceUser {
		t.Fatalf("%+v, %v", img, err)
	}
	if img, err = s.Tag(t.Context(), two.Hex[:12], "more"); err != nil || img.Ref != "more" || img.Digest != two.String() {
		t.Fatalf("%+v, %v", img, err)
	}
	for ref, want := range map[string]string{"one": digestOf(t, one).String(), "two": two.String(), "more": two.String()} {
		if img, err := s.Resolve(ref); err != nil || img.Digest != want {
			t.Errorf("%s: %v, %v", ref, img, err)
		}
	}
	if list, _ := s.List(t.Context()); len(list) != 3 {
		t.Errorf("listed are %v", list)
	}
	for _, tag := range []string{"", "Upper", "a b", "x@" + two.String(), two.String(), two.Hex, "a:b:c", "-x"} {
		if _, err := s.Tag(t.Context(), "one", tag); shed.ErrorCode(err) != shed.CodeInvalid {
			t.Errorf("tag %q: %v, want %s", tag, err, shed.CodeInvalid)
		}
	}
	if _, err := s.Tag(t.Context(), "none", "x"); shed.ErrorCode(err) != shed.CodeNoImage {
		t.Errorf("tagging what isn't there: %v", err)
	}
}

// What skopeo puts into the layout, also an index for several platforms, is there as it is.
func TestSkopeoWrites(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	from := filepath.Join(t.TempDir(), "from")
	path, err := layout.Write(from, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	mine := imageFor(t, runtime.GOARCH, layerOf(t, types.OCILayer, tarOf(t, "f", "mine")))
	other := imageFor(t, foreignArch, layerOf(t, types.OCILayer, tarOf(t, "f", "other")))
	name := func(tag string) layout.Option { return layout.WithAnnotations(map[string]string{refName: tag}) }
	for _, err := range []error{
		path.AppendImage(mine, name("one")), path.AppendImage(other, name("foreign")),
		path.AppendIndex(indexOf(t, other, mine), name("many")),
		path.AppendIndex(indexOf(t, other), name("others")),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, tag := range []string{"one", "foreign", "many", "others"} {
		skopeo(t, "copy", "--all", "oci:"+from+":"+tag, "oci:"+s.dir+":"+tag)
	}
	s = reopen(t, s)
	list, err := s.List(t.Context())
	if err != nil || len(list) != 4 {
		t.Fatalf("listed are %v, %v", list, err)
	}
	for i, want := range []struct{ ref, platform, digest string }{
		{"foreign", "linux/" + foreignArch, digestOf(t, other).String()},
		{"many", "linux/" + runtime.GOARCH, digestOf(t, mine).String()},
		{"one", "linux/" + runtime.GOARCH, digestOf(t, mine).String()},
		{"others", "", ""},
	} {
		if got := list[i]; got.Ref != want.ref || got.Platform != want.platform || want.digest != "" && got.Digest != want.digest {
			t.Errorf("%s is listed as %+v", want.ref, got)
		}
	}
	if _, err := s.Resolve("others"); shed.ErrorCode(err) != shed.CodeUnsupported || !strings.Contains(err.Error(), "linux/"+foreignArch) {
		t.Errorf("an index of other platforms: %v", err)
	}
	img, err := s.Resolve(digestOf(t, mine).String())
	if err != nil || img.Ref == "" {
		t.Errorf("by the digest of one of an index: %v, %v", img, err)
	}
	if _, _, err := s.Rootfs(t.Context(), img, nil); err != nil {
		t.Error(err)
	}

	// A tag that skopeo moves leaves the manifest in the index of nobody, and it is found all the same.
	s = open(t, t.TempDir())
	skopeo(t, "copy", "oci:"+from+":one", "oci:"+s.dir+":x")
	skopeo(t, "copy", "--all", "oci:"+from+":foreign", "oci:"+s.dir+":x")
	if img, err := s.Resolve(digestOf(t, mine).String()); err != nil || img.Digest != digestOf(t, mine).String() {
		t.Errorf("what skopeo took out of the index: %v, %v", img, err)
	}
}

func TestAnnotationsAreKept(t *testing.T) {
	s := open(t, t.TempDir())
	mine := imageFor(t, runtime.GOARCH, layerOf(t, types.OCILayer, tarOf(t, "f", "mine")))
	addIndex(t, s, "many", indexOf(t, mine))
	index, err := s.index()
	if err != nil {
		t.Fatal(err)
	}
	index.Annotations = map[string]string{"org.example.all": "kept"}
	if err := s.writeIndex(index); err != nil {
		t.Fatal(err)
	}
	addImage(t, s, "other", layerOf(t, types.OCILayer, tarOf(t, "f", "x")))
	if _, err := s.Tag(t.Context(), "many", "again"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Tag(t.Context(), "other", "many"); err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(s.path("index.json"))
	if err != nil {
		t.Fatal(err)
	}
	var got struct {
		Annotations map[string]string
		Manifests   []v1.Descriptor
	}
	if err := json.Unmarshal(raw, &got); err != nil {
		t.Fatal(err)
	}
	if got.Annotations["org.example.all"] != "kept" || len(got.Manifests) != 3 {
		t.Errorf("index.json is %s", raw)
	}
	for _, d := range got.Manifests {
		if d.MediaType.IsIndex() && (d.Annotations["org.example.note"] != "kept" || d.Annotations[refName] != "again") {
			t.Errorf("its entry is %+v", d)
		}
	}
}

func TestInspect(t *testing.T) {
	s := open(t, t.TempDir())
	a, b := layerOf(t, types.OCILayer, tarOf(t, "a", "x")), layerOf(t, types.OCILayerZStd, tarOf(t, "b", "y"))
	img := imageFor(t, runtime.GOARCH, a)
	cfg, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	cfg = cfg.DeepCopy()
	when := time.Unix(1700000000, 0).UTC()
	cfg.Config = v1.Config{
		User: "node", WorkingDir: "/w", Env: []string{"A=b"}, Entrypoint: []string{"/e"}, Cmd: []string{"c"},
		ExposedPorts: map[string]struct{}{"80/tcp": {}, "443/tcp": {}}, Labels: map[string]string{"l": "v"},
	}
	cfg.History = append(cfg.History, v1.History{CreatedBy: "ENV A=b", EmptyLayer: true, Created: v1.Time{Time: when}, Comment: "note"})
	if img, err = mutate.ConfigFile(img, cfg); err != nil {
		t.Fatal(err)
	}
	if img, err = mutate.Append(img, mutate.Addendum{Layer: b, MediaType: types.OCILayerZStd, History: v1.History{CreatedBy: "RUN b"}}); err != nil {
		t.Fatal(err)
	}
	path, err := layout.FromPath(s.dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := path.WriteImage(img); err != nil {
		t.Fatal(err)
	}
	desc, err := partial.Descriptor(img)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.tag(*desc, "x"); err != nil {
		t.Fatal(err)
	}
	short, err := s.Resolve("x")
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.Rootfs(t.Context(), short, nil); err != nil {
		t.Fatal(err)
	}
	d, err := s.Inspect(t.Context(), "x")
	if err != nil {
		t.Fatal(err)
	}
	c := d.Config
	if d.Ref != "x" || d.MediaType != string(types.OCIManifestSchema1) || c.User != "node" || c.WorkingDir != "/w" || c.Env[0] != "A=b" ||
		c.Entrypoint[0] != "/e" || c.Cmd[0] != "c" || strings.Join(c.ExposedPorts, " ") != "443/tcp 80/tcp" || c.Labels["l"] != "v" {
		t.Errorf("%+v", d)
	}
	if len(d.History) != 3 || d.History[0].Layer == nil || d.History[1].Layer != nil || d.History[2].Layer == nil {
		t.Fatalf("its history is %+v", d.History)
	}
	if h := d.History[1]; h.CreatedBy != "ENV A=b" || h.Comment != "note" || !h.CreatedAt.Equal(when) {
		t.Errorf("its second step is %+v", h)
	}
	for i, l := range []v1.Layer{a, b} {
		got := d.History[2*i].Layer
		digest, _ := l.Digest()
		size, _ := l.Size()
		if got.Digest != digest.String() || got.Size != size || got.BlockImage == 0 {
			t.Errorf("layer %d is %+v", i, got)
		}
	}

	// A history that doesn't fit the layers says nothing of them.
	if h := history([]v1.History{{CreatedBy: "one"}, {CreatedBy: "two"}}, make([]shed.Layer, 1)); h[0].Layer != nil || h[1].Layer != nil {
		t.Errorf("%+v", h)
	}
}

func FuzzIndex(f *testing.F) {
	s := open(f, f.TempDir())
	addImage(f, s, "base", layerOf(f, types.OCILayer, tarOf(f, "f", "x")))
	addIndex(f, s, "many", indexOf(f, imageFor(f, runtime.GOARCH)))
	raw, err := os.ReadFile(s.path("index.json"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw)
	f.Add([]byte(`{"manifests": [{"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": "sha256:` + strings.Repeat("0", 64) + `"}]}`))
	f.Add([]byte(`{"manifests": [{}, {"annotations": {"org.opencontainers.image.ref.name": "x"}}]}`))
	f.Add([]byte(`null`))
	s.Close()
	f.Fuzz(func(t *testing.T, index []byte) {
		if err := os.WriteFile(s.path("index.json"), index, 0o644); err != nil {
			t.Fatal(err)
		}
		s, err := Open(s.dir, s.layers)
		if err != nil {
			return
		}
		defer s.Close()
		list, err := s.List(t.Context())
		if err != nil {
			t.Fatalf("it opens, and can't be listed: %v", err)
		}
		for _, img := range list {
			if img.Ref == "" {
				continue
			}
			if _, err := s.Resolve(img.Ref); shed.ErrorCode(err) == shed.CodeNoImage {
				t.Errorf("%q is listed, and not found", img.Ref)
			}
		}
		if _, err := s.Prune(t.Context(), unused, true); err != nil {
			t.Errorf("prune: %v", err)
		}
	})
}
