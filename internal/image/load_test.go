package image

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/charliek/shed"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

func compress(t testing.TB, kind string, content []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	var w io.WriteCloser = gzip.NewWriter(&b)
	if kind == "zstd" {
		enc, err := zstd.NewWriter(&b)
		if err != nil {
			t.Fatal(err)
		}
		w = enc
	}
	_, err := w.Write(content)
	if err = errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// entry is a file of a made up archive.
type entry struct {
	name    string
	content string
	link    string
	kind    byte // default: a file
}

func archiveOf(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		hdr := &tar.Header{Typeflag: tar.TypeReg, Name: e.name, Size: int64(len(e.content)), Linkname: e.link, Mode: 0o644}
		if e.kind != 0 {
			hdr.Typeflag = e.kind
		}
		if err := w.WriteHeader(hdr); err != nil {
			t.Fatal(err)
		}
		io.WriteString(w, e.content)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func marshal(t testing.TB, v any) string {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// entryOf is a blob of an archive, and what points to it.
func entryOf(content string, mediaType types.MediaType) (v1.Descriptor, entry) {
	d := descriptor([]byte(content), mediaType)
	return d, entry{name: blobPath(d.Digest), content: content}
}

// madeUp is an image in an archive, of one plain layer.
type madeUp struct {
	manifest, config, layer v1.Descriptor
	entries                 []entry // of layer, config and manifest
}

func makeUp(t testing.TB, arch, content string) madeUp {
	t.Helper()
	var m madeUp
	layer, e1 := entryOf(string(tarOf(t, "f", content)), types.OCIUncompressedLayer)
	config, e2 := entryOf(marshal(t, v1.ConfigFile{Architecture: arch, OS: "linux", RootFS: v1.RootFS{Type: "layers", DiffIDs: []v1.Hash{layer.Digest}}}), types.OCIConfigJSON)
	manifest, e3 := entryOf(marshal(t, v1.Manifest{
		SchemaVersion: 2, MediaType: types.OCIManifestSchema1, Config: config, Layers: []v1.Descriptor{layer},
	}), types.OCIManifestSchema1)
	m.layer, m.config, m.manifest, m.entries = layer, config, manifest, []entry{e1, e2, e3}
	return m
}

// index is the index.json of an archive.
func index(t testing.TB, descs ...v1.Descriptor) entry {
	return entry{name: "index.json", content: marshal(t, v1.IndexManifest{SchemaVersion: 2, Manifests: descs})}
}

// What is wrong with an archive is said, and leaves nothing.
func TestLoadRefuses(t *testing.T) {
	m := makeUp(t, runtime.GOARCH, "x")
	other := makeUp(t, runtime.GOARCH, "y")
	idx := index(t, withTag(m.manifest, "x"))
	all := append([]entry{idx}, m.entries...)
	with := func(extra ...entry) []entry { return append(slices.Clone(all), extra...) }
	docker := func(v any, extra ...entry) []entry {
		return append(extra, entry{name: "manifest.json", content: marshal(t, v)},
			entry{name: "c.json", content: m.entries[1].content}, entry{name: "l/layer.tar", content: m.entries[0].content})
	}
	nested := m.manifest
	var nest []entry
	for range maxIndexes + 1 {
		d, e := entryOf(marshal(t, v1.IndexManifest{SchemaVersion: 2, Manifests: []v1.Descriptor{nested}}), types.OCIImageIndex)
		nested, nest = d, append(nest, e)
	}
	brokenLayer, e1 := entryOf("no tar at all, but long enough: "+strings.Repeat("x", 2000), types.OCIUncompressedLayer)
	brokenConfig, e2 := entryOf(marshal(t, v1.ConfigFile{Architecture: runtime.GOARCH, OS: "linux", RootFS: v1.RootFS{Type: "layers", DiffIDs: []v1.Hash{m.layer.Digest, brokenLayer.Digest}}}), types.OCIConfigJSON)
	broken, e3 := entryOf(marshal(t, v1.Manifest{SchemaVersion: 2, Config: brokenConfig, Layers: []v1.Descriptor{m.layer, brokenLayer}}), types.OCIManifestSchema1)
	short := m.manifest
	short.Size--
	long, longEntry := entryOf(`{"a":"`+strings.Repeat("x", maxJSON)+`"}`, types.OCIManifestSchema1)
	artifact := m.manifest
	artifact.MediaType = "application/x-other"
	twoLayers, twoEntry := entryOf(marshal(t, v1.Manifest{SchemaVersion: 2, Config: m.config, Layers: []v1.Descriptor{m.layer, m.layer}}), types.OCIManifestSchema1)

	for name, tt := range map[string]struct {
		archive []byte
		says    string
	}{
		"nothing":                   {nil, "empty"},
		"no tar":                    {bytes.Repeat([]byte("x"), 2000), "tar"},
		"an empty tar":              {archiveOf(t), "neither index.json nor manifest.json"},
		"cut off":                   {archiveOf(t, all...)[:3000], "unexpected EOF"},
		"cut off gzip":              {compress(t, "gzip", archiveOf(t, all...))[:200], "unexpected EOF"},
		"bzip2":                     {[]byte("BZh91AY&SY"), "bzip2"},
		"xz":                        {[]byte("\xfd7zXZ\x00\x00"), "xz"},
		"up":                        {archiveOf(t, with(entry{name: "../x"})...), `"../x"`},
		"up inside":                 {archiveOf(t, with(entry{name: "a/../../x"})...), `"a/../../x"`},
		"absolute":                  {archiveOf(t, with(entry{name: "/etc/x"})...), `"/etc/x"`},
		"link outside":              {archiveOf(t, with(entry{name: "x", kind: tar.TypeSymlink, link: "../../etc/passwd"})...), "link"},
		"absolute link":             {archiveOf(t, with(entry{name: "x", kind: tar.TypeSymlink, link: "/etc/passwd"})...), "link"},
		"hard link outside":         {archiveOf(t, with(entry{name: "x", kind: tar.TypeLink, link: "../x"})...), "link"},
		"device":                    {archiveOf(t, with(entry{name: "x", kind: tar.TypeChar})...), "neither a file"},
		"a file twice":              {archiveOf(t, with(entry{name: "./index.json", content: "{}"})...), "twice"},
		"a link and a file":         {archiveOf(t, with(entry{name: "index.json", kind: tar.TypeSymlink, link: "x"})...), "twice"},
		"links in a circle":         {archiveOf(t, entry{name: "index.json", kind: tar.TypeSymlink, link: "a"}, entry{name: "a", kind: tar.TypeSymlink, link: "index.json"}), "neither index.json"},
		"no images":                 {archiveOf(t, index(t)), "no images"},
		"no JSON":                   {archiveOf(t, entry{name: "index.json", content: "x"}), "index.json"},
		"a huge index.json":         {archiveOf(t, entry{name: "index.json", content: strings.Repeat(" ", maxJSON+1)}), "bytes"},
		"a huge manifest":           {archiveOf(t, index(t, long), longEntry), "bytes"},
		"no manifest":               {archiveOf(t, idx), "no blob " + m.manifest.Digest.String()},
		"no config":                 {archiveOf(t, idx, m.entries[0], m.entries[2]), "no blob " + m.config.Digest.String()},
		"no layer":                  {archiveOf(t, idx, m.entries[1], m.entries[2]), "no blob " + m.layer.Digest.String()},
		"wrong content":             {archiveOf(t, idx, entry{name: m.entries[0].name, content: strings.ToUpper(m.entries[0].content)}, m.entries[1], m.entries[2]), "the content of another"},
		"wrong size":                {archiveOf(t, append([]entry{index(t, short)}, m.entries...)...), "bytes, and should have"},
		"layers don't fit":          {archiveOf(t, append([]entry{index(t, twoLayers), twoEntry}, m.entries...)...), "2 layers, its configuration 1"},
		"one tag for two":           {archiveOf(t, append(append([]entry{index(t, withTag(m.manifest, "x"), withTag(other.manifest, "docker.io/library/x"))}, m.entries...), other.entries...)...), "two images with the tag x"},
		"deep":                      {archiveOf(t, append(append([]entry{index(t, nested)}, m.entries...), nest...)...), "indexes"},
		"an index without images":   {archiveOf(t, append([]entry{index(t, nested)}, nest[len(nest)-1])...), "no image of the index"},
		"many images":               {archiveOf(t, append([]entry{index(t, slices.Repeat([]v1.Descriptor{m.manifest}, maxImages+1)...)}, m.entries...)...), "images, and may have"},
		"another kind":              {archiveOf(t, append([]entry{index(t, artifact)}, m.entries...)...), "application/x-other"},
		"a layer that is no tar":    {archiveOf(t, append([]entry{index(t, withTag(m.manifest, "x"), broken), e1, e2, e3}, m.entries...)...), "layer"},
		"docker: no config":         {archiveOf(t, docker([]dockerImage{{Config: "none.json"}})...), `"none.json"`},
		"docker: config outside":    {archiveOf(t, docker([]dockerImage{{Config: "../../etc/passwd"}})...), `"../../etc/passwd"`},
		"docker: no layer":          {archiveOf(t, docker([]dockerImage{{Config: "c.json", Layers: []string{"none/layer.tar"}}})...), `"none/layer.tar"`},
		"docker: layers don't fit":  {archiveOf(t, docker([]dockerImage{{Config: "c.json"}})...), "has 0 layers"},
		"docker: wrong layer":       {archiveOf(t, docker([]dockerImage{{Config: "c.json", Layers: []string{"x"}}}, entry{name: "x", content: "y"})...), "the content of another"},
		"docker: wrong packed":      {archiveOf(t, docker([]dockerImage{{Config: "c.json", Layers: []string{"x"}}}, entry{name: "x", content: string(compress(t, "gzip", []byte("y")))})...), "the content of another"},
		"docker: no images":         {archiveOf(t, docker([]dockerImage{})...), "no images"},
		"docker: many images":       {archiveOf(t, docker(make([]dockerImage, maxImages+1))...), "images, and may have"},
		"docker: another JSON":      {archiveOf(t, docker(map[string]string{})...), "manifest.json"},
		"docker: damaged, in gzip":  {archiveOf(t, docker([]dockerImage{{Config: "c.json", Layers: []string{"x"}}}, entry{name: "x", content: "\x1f\x8b\x08 no gzip"})...), `layer "x"`},
		"docker: a cut off archive": {archiveOf(t, docker([]dockerImage{{Config: "c.json", Layers: []string{"l/layer.tar"}}})...)[:1500], "unexpected EOF"},
	} {
		t.Run(name, func(t *testing.T) {
			s := open(t, t.TempDir())
			addImage(t, s, "x", gz(t, "mine", "x"))
			before := tree(t, s)
			images, err := s.Load(t.Context(), bytes.NewReader(tt.archive), nil)
			if shed.ErrorCode(err) != shed.CodeInvalid || !strings.Contains(err.Error(), tt.says) || images != nil {
				t.Errorf("got %v, %v (%s), want %s with %q", images, err, shed.ErrorCode(err), shed.CodeInvalid, tt.says)
			}
			if now := tree(t, s); !slices.Equal(now, before) {
				t.Errorf("left are %v", now)
			}
			if len(s.held) != 0 {
				t.Errorf("held are %v", s.held)
			}
		})
	}
}

func TestLoadPlatforms(t *testing.T) {
	mine, other, third := makeUp(t, runtime.GOARCH, "mine"), makeUp(t, foreignArch, "other"), makeUp(t, "mips", "third")
	on := func(d v1.Descriptor, arch string) v1.Descriptor {
		d.Platform = &v1.Platform{OS: "linux", Architecture: arch}
		return d
	}
	attestation := on(third.manifest, "unknown")
	attestation.Platform.OS = "unknown"
	for name, tt := range map[string]struct {
		descs []v1.Descriptor
		has   []entry
		want  v1.Descriptor
	}{
		"the host's":      {[]v1.Descriptor{attestation, on(other.manifest, foreignArch), on(mine.manifest, runtime.GOARCH)}, slices.Concat(mine.entries, other.entries, third.entries), mine.manifest},
		"without a word":  {[]v1.Descriptor{other.manifest, mine.manifest}, slices.Concat(mine.entries, other.entries), mine.manifest},
		"others only":     {[]v1.Descriptor{attestation, on(other.manifest, foreignArch), on(third.manifest, "mips")}, slices.Concat(other.entries, third.entries), other.manifest},
		"the host's gone": {[]v1.Descriptor{on(mine.manifest, runtime.GOARCH), on(third.manifest, "mips")}, third.entries, third.manifest},
	} {
		t.Run(name, func(t *testing.T) {
			many, e := entryOf(marshal(t, v1.IndexManifest{SchemaVersion: 2, Manifests: tt.descs}), types.OCIImageIndex)
			s := open(t, t.TempDir())
			images, err := s.Load(t.Context(), bytes.NewReader(archiveOf(t, append([]entry{index(t, withTag(many, "many")), e}, tt.has...)...)), nil)
			if err != nil || refsOf(images) != "many@"+tt.want.Digest.String() {
				t.Fatalf("%s, %v", refsOf(images), err)
			}
			if host := images[0].Platform == "linux/"+runtime.GOARCH; host != (images[0].Layers[0].BlockImage != 0) {
				t.Errorf("it is %+v", images[0])
			}
			if len(tree(t, s)) > 6 {
				t.Errorf("there are %v", tree(t, s))
			}
		})
	}
}

// docker save's archives of old have links for layers that are the same, which may come before what they lead to.
func TestLoadDockerLinks(t *testing.T) {
	m := makeUp(t, runtime.GOARCH, "x")
	config := marshal(t, v1.ConfigFile{Architecture: runtime.GOARCH, OS: "linux", RootFS: v1.RootFS{Type: "layers", DiffIDs: []v1.Hash{m.layer.Digest, m.layer.Digest, m.layer.Digest}}})
	archive := archiveOf(t,
		entry{name: "a", kind: tar.TypeDir}, entry{name: "a/VERSION", content: "1.0"},
		entry{name: "a/layer.tar", kind: tar.TypeSymlink, link: "../b/layer.tar"},
		entry{name: "b/layer.tar", content: m.entries[0].content},
		entry{name: "c/layer.tar", kind: tar.TypeLink, link: "b/layer.tar"},
		entry{name: "config.json", content: config},
		entry{name: "manifest.json", content: marshal(t, []dockerImage{{
			Config: "config.json", RepoTags: []string{"docker.io/library/app:latest", "<none>:<none>"},
			Layers: []string{"a/layer.tar", "b/layer.tar", "c/layer.tar"},
		}})},
		entry{name: "repositories", content: "{}"},
	)
	s := open(t, t.TempDir())
	images, err := s.Load(t.Context(), bytes.NewReader(archive), nil)
	if err != nil || len(images) != 1 || images[0].Ref != "app" || len(images[0].Layers) != 3 {
		t.Fatalf("%+v, %v", images, err)
	}
	ready(t, s, "app")
}

// docker's archives of today are OCI layouts whose refName has the tag alone.
func TestLoadDockerNames(t *testing.T) {
	m := makeUp(t, runtime.GOARCH, "x")
	d := m.manifest
	d.Annotations = map[string]string{refName: "12", containerdName: "docker.io/library/debian:12"}
	unnamed := m.manifest
	unnamed.Annotations = map[string]string{refName: "Not A Name"}
	s := open(t, t.TempDir())
	images, err := s.Load(t.Context(), bytes.NewReader(archiveOf(t, append([]entry{index(t, d, unnamed)}, m.entries...)...)), nil)
	if err != nil || refsOf(images) != "debian:12@"+m.manifest.Digest.String() {
		t.Errorf("%s, %v", refsOf(images), err)
	}
}

// A load that fails takes nothing away that was there, and heals what is damaged when it succeeds.
func TestLoadOverWhatIsThere(t *testing.T) {
	m := makeUp(t, runtime.GOARCH, "x")
	good := archiveOf(t, append([]entry{index(t, withTag(m.manifest, "x"))}, m.entries...)...)
	s := open(t, t.TempDir())
	if _, err := s.Load(t.Context(), bytes.NewReader(good), nil); err != nil {
		t.Fatal(err)
	}
	brokenLayer, e1 := entryOf("no tar"+strings.Repeat("x", 2000), types.OCIUncompressedLayer)
	if err := s.writeFile(s.blob(brokenLayer.Digest), []byte(e1.content)); err != nil { // of a pull that was broken off, say
		t.Fatal(err)
	}
	before := tree(t, s)
	config, e2 := entryOf(marshal(t, v1.ConfigFile{Architecture: runtime.GOARCH, OS: "linux", RootFS: v1.RootFS{Type: "layers", DiffIDs: []v1.Hash{m.layer.Digest, brokenLayer.Digest}}}), types.OCIConfigJSON)
	broken, e3 := entryOf(marshal(t, v1.Manifest{SchemaVersion: 2, Config: config, Layers: []v1.Descriptor{m.layer, brokenLayer}}), types.OCIManifestSchema1)
	if _, err := s.Load(t.Context(), bytes.NewReader(archiveOf(t, append([]entry{index(t, withTag(broken, "x")), e1, e2, e3}, m.entries...)...)), nil); err == nil {
		t.Fatal("a layer that is no tar was loaded")
	}
	if now := tree(t, s); !slices.Equal(now, before) {
		t.Errorf("there are %v, want %v", now, before)
	}
	if img := ready(t, s, "x"); img.Digest != m.manifest.Digest.String() {
		t.Errorf("x is %s", img.Digest)
	}
	if err := os.WriteFile(s.blob(m.config.Digest), []byte("damaged"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Load(t.Context(), bytes.NewReader(good), nil); err != nil {
		t.Fatal(err)
	}
	ready(t, s, "x")
}

func TestLoadBroken(t *testing.T) {
	m := makeUp(t, runtime.GOARCH, "x")
	archive := archiveOf(t, append([]entry{index(t, withTag(m.manifest, "x"))}, m.entries...)...)
	s := open(t, t.TempDir())
	before := tree(t, s)
	gone := errors.New("the client is gone")
	if _, err := s.Load(t.Context(), io.MultiReader(bytes.NewReader(archive[:2000]), errReader{gone}), nil); !errors.Is(err, gone) || shed.ErrorCode(err) == shed.CodeInvalid {
		t.Errorf("got %v", err)
	}
	for n := range 40 {
		_, err := s.Load(&endAfter{Context: t.Context(), n: n}, bytes.NewReader(archive), nil)
		if err == nil {
			if n < 4 {
				t.Errorf("it looked at its context only %d times", n)
			}
			return
		}
		if !errors.Is(err, context.Canceled) {
			t.Fatalf("got %v", err)
		}
		if now := tree(t, s); !slices.Equal(now, before) {
			t.Fatalf("cut off after %d, left are %v", n, now)
		}
	}
	t.Error("it never came to its end")
}

type errReader struct{ err error }

func (r errReader) Read([]byte) (int, error) { return 0, r.err }

func TestLimitRatio(t *testing.T) {
	zeros := readerFunc(func(p []byte) (int, error) { clear(p); return len(p), nil })
	in := int64(1000)
	of := func() int64 { return in }
	if n, err := io.Copy(io.Discard, limitRatio(zeros, of)); shed.ErrorCode(err) != shed.CodeInvalid || n < bombAllowed || n > 2*bombAllowed {
		t.Errorf("%d bytes, %v", n, err)
	}
	in = bombAllowed / 100
	const size = bombAllowed + bombAllowed/4
	if n, err := io.Copy(io.Discard, io.LimitReader(limitRatio(zeros, of), size)); err != nil || n != size {
		t.Errorf("%d bytes, %v", n, err)
	}
}

func FuzzLoad(f *testing.F) {
	m, other := makeUp(f, runtime.GOARCH, "x"), makeUp(f, foreignArch, "y")
	many, e := entryOf(marshal(f, v1.IndexManifest{SchemaVersion: 2, Manifests: []v1.Descriptor{m.manifest, other.manifest}}), types.OCIImageIndex)
	oci := archiveOf(f, append(append([]entry{index(f, withTag(m.manifest, "x"), many), e}, m.entries...), other.entries...)...)
	f.Add(oci)
	f.Add(compress(f, "gzip", oci))
	f.Add(compress(f, "zstd", oci))
	f.Add(archiveOf(f, entry{name: "c", content: m.entries[1].content}, entry{name: "l", content: m.entries[0].content},
		entry{name: "k", kind: tar.TypeSymlink, link: "l"},
		entry{name: "manifest.json", content: `[{"Config":"c","RepoTags":["x"],"Layers":["k"]}]`}))
	f.Fuzz(func(t *testing.T, archive []byte) {
		s := open(t, t.TempDir())
		before := tree(t, s)
		images, err := s.Load(t.Context(), bytes.NewReader(archive), nil)
		if err != nil {
			if code := shed.ErrorCode(err); code != shed.CodeInvalid && code != shed.CodeUnsupported {
				t.Errorf("%s: %v", code, err)
			}
			if now := tree(t, s); !slices.Equal(now, before) {
				t.Errorf("left are %v after %v", now, err)
			}
			return
		}
		for _, img := range images {
			if err := s.Save(t.Context(), []string{img.Digest}, io.Discard); err != nil {
				t.Errorf("what was loaded can't be saved: %v", err)
			}
		}
		if _, err := s.Prune(t.Context(), unused, true); err != nil {
			t.Error(err)
		}
	})
}
