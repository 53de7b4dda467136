package image

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/charliek/shed"
	"github.com/charliek/shed/internal/rootfs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

func open(t testing.TB, dir string) *Store {
	t.Helper()
	layers, err := rootfs.OpenLayers(filepath.Join(dir, "layers"))
	if err != nil {
		t.Fatal(err)
	}
	s, err := Open(filepath.Join(dir, "images"), layers)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// reopen closes s and opens what it leaves.
func reopen(t testing.TB, s *Store) *Store {
	t.Helper()
	s.Close()
	return open(t, filepath.Dir(s.dir))
}

// What one server has open, another one must not change.
func TestOpenOnce(t *testing.T) {
	s := open(t, t.TempDir())
	_, err := Open(s.dir, s.layers)
	if shed.ErrorCode(err) != shed.CodeConflict || !strings.Contains(err.Error(), s.dir) {
		t.Errorf("opened again: %v; want a %s with %s", err, shed.CodeConflict, s.dir)
	}
	reopen(t, s)
}

func tarOf(t testing.TB, name, content string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: int64(len(content)), Mode: 0o644}); err != nil {
		t.Fatal(err)
	}
	io.WriteString(w, content)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// testLayer is a layer of tar with a blob of that media type.
type testLayer struct {
	v1.Layer
	diffID v1.Hash
}

func (l testLayer) DiffID() (v1.Hash, error) { return l.diffID, nil }

func layerOf(t testing.TB, mediaType types.MediaType, tar []byte) v1.Layer {
	t.Helper()
	var blob bytes.Buffer
	var w io.WriteCloser
	switch {
	case strings.HasSuffix(string(mediaType), "gzip"):
		w = gzip.NewWriter(&blob)
	case strings.HasSuffix(string(mediaType), "zstd"):
		enc, err := zstd.NewWriter(&blob)
		if err != nil {
			t.Fatal(err)
		}
		w = enc
	default:
		w = struct {
			io.Writer
			io.Closer
		}{&blob, io.NopCloser(nil)}
	}
	if _, err := w.Write(tar); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	diffID, _, err := v1.SHA256(bytes.NewReader(tar))
	if err != nil {
		t.Fatal(err)
	}
	return testLayer{static.NewLayer(blob.Bytes(), mediaType), diffID}
}

// addImage puts an image of these layers into s and gives it a tag, unless that is "".
func addImage(t testing.TB, s *Store, tag string, layers ...v1.Layer) v1.Image {
	t.Helper()
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	cfg, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	cfg = cfg.DeepCopy()
	cfg.Architecture, cfg.OS = runtime.GOARCH, "linux"
	cfg.Config.Env = []string{"LANG=C.UTF-8"}
	if img, err = mutate.ConfigFile(img, cfg); err != nil {
		t.Fatal(err)
	}
	for _, l := range layers {
		mediaType, err := l.MediaType()
		if err != nil {
			t.Fatal(err)
		}
		if img, err = mutate.Append(img, mutate.Addendum{Layer: l, MediaType: mediaType}); err != nil {
			t.Fatal(err)
		}
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
	if tag == "" {
		err = path.AppendDescriptor(*desc)
	} else {
		err = s.tag(*desc, tag)
	}
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func digestOf(t testing.TB, img v1.Image) v1.Hash {
	t.Helper()
	d, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestListAndResolve(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	if all, err := s.List(t.Context()); err != nil || len(all) != 0 {
		t.Errorf("a new store lists %v, %v", all, err)
	}
	if _, err := s.Resolve("base"); shed.ErrorCode(err) != shed.CodeNoImage || !strings.Contains(shed.ErrorHint(err), "shed image build base") {
		t.Errorf("base in a new store: %v, hint %q", err, shed.ErrorHint(err))
	}
	node := digestOf(t, addImage(t, s, "node", layerOf(t, types.OCILayer, tarOf(t, "node", "x"))))
	base := digestOf(t, addImage(t, s, "base", layerOf(t, types.OCILayer, tarOf(t, "base", "x"))))

	s = reopen(t, s)
	all, err := s.List(t.Context())
	if err != nil || len(all) != 2 || all[0].Ref != "base" || all[1].Ref != "node" {
		t.Fatalf("the store lists %v, %v", all, err)
	}
	for ref, want := range map[string]v1.Hash{
		"base": base, "node": node, base.String(): base, base.Hex: base,
		base.Hex[:12]: base, "sha256:" + node.Hex[:12]: node,
	} {
		img, err := s.Resolve(ref)
		if err != nil || img.Digest != want.String() {
			t.Errorf("%s resolves to %v, %v, want %s", ref, img, err, want)
		}
	}
	for _, ref := range []string{"", "bas", base.Hex[:11], "sha256:" + base.Hex[:11], base.Hex + "0", "sha256:" + strings.Repeat("0", 64)} {
		_, err := s.Resolve(ref)
		hint := shed.ErrorHint(err)
		if shed.ErrorCode(err) != shed.CodeNoImage || !strings.Contains(hint, "base, node") || !strings.Contains(hint, "shed image build base") {
			t.Errorf("%q gives %v, hint %q", ref, err, hint)
		}
	}
}

func TestResolveAmbiguous(t *testing.T) {
	s := open(t, t.TempDir())
	a, b := strings.Repeat("a", 64), strings.Repeat("a", 63)+"b"
	index := v1.IndexManifest{SchemaVersion: 2, Manifests: []v1.Descriptor{
		{MediaType: types.OCIManifestSchema1, Digest: v1.Hash{Algorithm: "sha256", Hex: a}},
		{MediaType: types.OCIManifestSchema1, Digest: v1.Hash{Algorithm: "sha256", Hex: b}},
	}}
	raw, err := json.Marshal(index)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(s.path("index.json"), raw, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Resolve(a[:20]); shed.ErrorCode(err) != shed.CodeInvalid || !strings.Contains(err.Error(), "2 images") {
		t.Errorf("an ambiguous prefix gives %v", err)
	}
}

// A tag that moves leaves the image that had it behind, for the sheds that use it.
func TestTagMoves(t *testing.T) {
	s := open(t, t.TempDir())
	first := addImage(t, s, "base", layerOf(t, types.OCILayer, tarOf(t, "f", "1")))
	second := addImage(t, s, "base", layerOf(t, types.OCILayer, tarOf(t, "f", "2")))
	want := func(refs ...string) {
		t.Helper()
		all, err := s.List(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, img := range all {
			got = append(got, img.Ref+"@"+img.Digest)
		}
		if strings.Join(got, " ") != strings.Join(refs, " ") {
			t.Errorf("the store has %q, want %q", got, refs)
		}
	}
	d1, d2 := digestOf(t, first).String(), digestOf(t, second).String()
	want("@"+d1, "base@"+d2)
	if img, err := s.Resolve(d1); err != nil || img.Ref != "" {
		t.Errorf("the old image resolves to %v, %v", img, err)
	}
	tag := func(img v1.Image, name string) {
		t.Helper()
		desc, err := partial.Descriptor(img)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.tag(*desc, name); err != nil {
			t.Fatal(err)
		}
	}
	tag(second, "base")
	want("@"+d1, "base@"+d2)
	tag(second, "other")
	tag(first, "base")
	want("base@"+d1, "other@"+d2)
}

func TestSize(t *testing.T) {
	s := open(t, t.TempDir())
	content := strings.Repeat("0123456789abcdef", 1<<16)
	plainLayer := layerOf(t, types.OCIUncompressedLayer, tarOf(t, "f", content))
	addImage(t, s, "x", plainLayer, plainLayer)
	before, err := s.Resolve("x")
	if err != nil {
		t.Fatal(err)
	}
	if before.Size < 1<<20 || before.Size > 3<<19 || before.Layers[0].BlockImage != 0 {
		t.Errorf("1 MB twice has %d bytes, %+v", before.Size, before.Layers)
	}
	paths, _, err := s.Rootfs(t.Context(), before, nil)
	if err != nil {
		t.Fatal(err)
	}
	after, err := s.Resolve("x")
	if err != nil {
		t.Fatal(err)
	}
	if used := rootfs.DiskUsage(paths[0]); after.Layers[0].BlockImage != used || after.Size != before.Size+used {
		t.Errorf("with a block image of %d bytes it has %d, %+v", used, after.Size, after.Layers)
	}
}

func TestOpenRemovesLeftovers(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	img := digestOf(t, addImage(t, s, "base", layerOf(t, types.OCILayer, tarOf(t, "f", "x"))))
	left := s.path(tempPrefix + "1234")
	if err := os.WriteFile(left, []byte("half a blob"), 0o600); err != nil {
		t.Fatal(err)
	}
	spool := s.path(tempPrefix + "load-5678") // of a load
	if err := os.MkdirAll(spool, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(spool, "0"), []byte("a file of an archive"), 0o600); err != nil {
		t.Fatal(err)
	}
	s = reopen(t, s)
	for _, path := range []string{left, spool} {
		if _, err := os.Lstat(path); !os.IsNotExist(err) {
			t.Errorf("%s is still there: %v", path, err)
		}
	}
	if got, err := s.Resolve("base"); err != nil || got.Digest != img.String() {
		t.Errorf("base is %v, %v", got, err)
	}
}

func TestDamage(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	img := addImage(t, s, "base", layerOf(t, types.OCILayer, tarOf(t, "f", "x")))
	blob := s.blob(digestOf(t, img))
	raw, err := os.ReadFile(blob)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(blob, bytes.Replace(raw, []byte("sha256"), []byte("sha257"), 1), 0o644); err != nil {
		t.Fatal(err)
	}
	other := digestOf(t, addImage(t, s, "other", layerOf(t, types.OCILayer, tarOf(t, "g", "x"))))
	for name, err := range map[string]error{
		"Resolve": second(s.Resolve("base")), "Inspect": second(s.Inspect(t.Context(), "base")),
		"Save": s.Save(t.Context(), []string{"base"}, io.Discard),
	} {
		if err == nil || !strings.Contains(err.Error(), blob) {
			t.Errorf("%s on a damaged manifest gives %v", name, err)
		}
	}
	list, err := s.List(t.Context())
	if err != nil || len(list) != 2 || list[1].Digest != other.String() || list[1].Platform != "linux/"+runtime.GOARCH {
		t.Fatalf("with a damaged manifest the store lists %v, %v", list, err)
	}
	if problem := blob + " is damaged: its content does not have that digest"; list[0].Problem != problem || list[1].Problem != "" {
		t.Errorf("the problems are %q and %q", list[0].Problem, list[1].Problem)
	}
	if odd := list[0]; odd.Ref != "base" || odd.Digest != digestOf(t, img).String() || odd.Platform != "" || len(odd.Layers) != 0 || odd.Size == 0 {
		t.Errorf("the damaged image is listed as %+v", odd)
	}
	// What a shed doesn't boot from is told too, and no reason not to say the rest.
	layer := list[1].Layers[0].Digest
	path := s.path("blobs/" + strings.Replace(layer, ":", "/", 1))
	for _, tt := range []struct {
		spoil func() error
		want  string
	}{
		{func() error { return os.Truncate(path, 1) }, "it has 1 bytes"},
		{func() error { return os.Remove(path) }, "the blob of layer " + layer + " is missing"},
	} {
		if err := tt.spoil(); err != nil {
			t.Fatal(err)
		}
		list, err := s.List(t.Context())
		d, ierr := s.Inspect(t.Context(), "other")
		if err != nil || ierr != nil || len(list[1].Layers) != 1 || !strings.Contains(list[1].Problem, tt.want) || d.Problem != list[1].Problem {
			t.Errorf("%+v, %v and %+v, %v; want the problem %q", list[1], err, d, ierr, tt.want)
		}
	}
	index := s.path("index.json")
	if err := os.WriteFile(index, []byte(`{"manifests": [`), 0o644); err != nil {
		t.Fatal(err)
	}
	s.Close()
	for name, err := range map[string]error{
		"Open": second(Open(s.dir, s.layers)), "List": second(s.List(t.Context())), "Resolve": second(s.Resolve("base")),
		"tag": s.tag(v1.Descriptor{}, "base"),
	} {
		if err == nil || !strings.Contains(err.Error(), index) {
			t.Errorf("%s on a damaged index gives %v", name, err)
		}
	}
	if raw, err := os.ReadFile(index); err != nil || string(raw) != `{"manifests": [` {
		t.Errorf("the damaged index was changed to %q, %v", raw, err)
	}
}

func second[T any](_ T, err error) error { return err }

func TestSkopeoReads(t *testing.T) {
	bin, err := exec.LookPath("skopeo")
	if err != nil {
		t.Fatal("skopeo is needed for this test: install it")
	}
	s := open(t, t.TempDir())
	addImage(t, s, "base", layerOf(t, types.OCILayer, tarOf(t, "f", "old")))
	img := addImage(t, s, "base",
		layerOf(t, types.OCILayer, tarOf(t, "f", "1")), layerOf(t, types.OCILayerZStd, tarOf(t, "f", "2")))
	out, err := exec.Command(bin, "inspect", "oci:"+s.dir+":base").CombinedOutput()
	if err != nil {
		t.Fatalf("skopeo: %v\n%s", err, out)
	}
	var got struct {
		Digest string
		Layers []string
	}
	if err := json.Unmarshal(out, &got); err != nil {
		t.Fatal(err)
	}
	if got.Digest != digestOf(t, img).String() || len(got.Layers) != 2 {
		t.Errorf("skopeo sees %+v", got)
	}
}
