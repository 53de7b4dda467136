package rootfs

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/charliek/shed"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

func TestMerge(t *testing.T) {
	tmp := dir("tmp/")
	tmp.Mode, tmp.Uid = 0o1777, 5
	private := withXattr(dir("d/"), "user.layer", "1")
	private.Mode = 0o700
	s := stack{
		{tmp, withXattr(dir("d/"), "user.layer", "0"), file("d/gone", ""), file("d/a", "a of 0"), link("d/b", "d/a"), link("d/c", "d/a"),
			dir("opaque/"), file("opaque/gone", ""), file("becomes-dir", "x"), dir("becomes-file/"), file("becomes-file/gone", ""),
			symlink("symlink", "/etc"), dir("back/"), file("back/gone", "")},
		{private, file("d/.wh.gone", ""), file("d/a", "a of 1"), file("tmp/new", ""), file("opaque/"+opaqueMarker, ""), file("opaque/kept", ""),
			dir("becomes-dir/"), file("becomes-dir/f", ""), file("becomes-file", "y"), file("symlink/passwd", "x"), file(".wh.back", "")},
		{link("e", "d/b"), file("d/.wh.b", ""), dir("back/"), tar.Header{Typeflag: tar.TypeChar, Name: "d/a"}, link("f", "becomes-file")},
	}
	l := openLayers(t)
	layers := mergeLayers(t, s)
	img := merge(t, l, layers...)
	fsck(t, img)
	got := snapshotOf(t, img)
	for name, want := range map[string]string{
		"tmp":            "directory 1777 5:0",
		"tmp/new":        "regular 0644",
		"d":              "directory 0700 0:0",
		"d/c":            `"a of 0" [d/c e]`,
		"e":              `"a of 0" [d/c e]`,
		"f":              `"y" [becomes-file f]`,
		"becomes-file":   `"y" [becomes-file f]`,
		"becomes-dir":    "directory",
		"becomes-dir/f":  "regular",
		"opaque":         "directory",
		"opaque/kept":    "regular",
		"symlink":        "directory 0755 0:0",
		"symlink/passwd": "regular",
		"back":           "directory",
		".":              "directory 0755 0:0",
	} {
		if !strings.Contains(got[name], want) {
			t.Errorf("%s is %s, want %s", name, got[name], want)
		}
		delete(got, name)
	}
	if len(got) > 0 {
		t.Errorf("there is also %v", got)
	}
	if d := snapshotOf(t, img)["d"]; !strings.Contains(d, "map[user.layer:1]") {
		t.Errorf("d is %s, want the attributes of layer 1 alone", d)
	}
	if fi, err := os.Stat(img); err != nil || fi.Mode().Perm() != 0o444 {
		t.Errorf("the image has mode %v, %v, want 0444", fi.Mode(), err)
	}

	// The example is that of the specification, with digests for its letters.
	ab := sum([]byte(layers[0].DiffID.String() + " " + layers[1].DiffID.String()))
	abc := sum([]byte(ab.String() + " " + layers[2].DiffID.String()))
	if got := ChainID(layers[0].DiffID, layers[1].DiffID, layers[2].DiffID); got != abc {
		t.Errorf("the chain ID is %s, want %s", got, abc)
	}
	if got := ChainID(layers[0].DiffID); got != layers[0].DiffID {
		t.Errorf("the chain ID of one layer is %s, want its diff ID", got)
	}
	if got, ok := l.MergedPath(abc); !ok || got != img {
		t.Errorf("MergedPath says %s, %t, want %s", got, ok, img)
	}
	if _, ok := l.MergedPath(ab); ok {
		t.Error("MergedPath has what was never merged")
	}
	if p, ok := l.MergedPath(v1.Hash{Algorithm: "sha256", Hex: "../../../etc/passwd"}); ok {
		t.Errorf("something that is no ID has a path: %s", p)
	}
	if list, err := l.List(); err != nil || !slices.Equal(list, []BlockImage{{ID: abc, Path: img}}) {
		t.Errorf("List says %v, %v", list, err)
	}
	for i := range layers {
		layers[i].Open = func() (io.ReadCloser, error) { return nil, errors.New("must not be opened") }
	}
	if again := merge(t, l, layers...); again != img {
		t.Errorf("merging again gives %s, want %s", again, img)
	}
}

func TestMergeManyLayers(t *testing.T) {
	var layers []MergeLayer
	for i := range 200 {
		layers = append(layers, mergeLayer(layer(t, dir("d/"), file(fmt.Sprintf("d/%d", i), "x"), file(fmt.Sprintf("d/.wh.%d", i-2), ""))))
	}
	img := merge(t, openLayers(t), layers...)
	fsck(t, img)
	if got := snapshotOf(t, img); len(got) != 4 || got["d/198"] == "" || got["d/199"] == "" {
		t.Errorf("got %v, want d with 198 and 199", got)
	}
}

// counted counts how often a layer is opened and closed.
type counted struct {
	MergeLayer
	opened, closed atomic.Int32
}

func (c *counted) layer() MergeLayer {
	return MergeLayer{DiffID: c.DiffID, Open: func() (io.ReadCloser, error) {
		c.opened.Add(1)
		r, err := c.Open()
		return closer{r, func() error { c.closed.Add(1); return nil }}, err
	}}
}

type closer struct {
	io.Reader
	close func() error
}

func (c closer) Close() error { return c.close() }

func TestMergeConcurrently(t *testing.T) {
	l := openLayers(t)
	a := &counted{MergeLayer: mergeLayer(layer(t, file("a", "a")))}
	b := &counted{MergeLayer: mergeLayer(layer(t, file("b", "b")))}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if _, err := l.Merge(t.Context(), []MergeLayer{a.layer(), b.layer()}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for _, c := range []*counted{a, b} {
		if c.opened.Load() != 2 || c.closed.Load() != 2 {
			t.Errorf("a layer was opened %d times and closed %d times, want 2 and 2", c.opened.Load(), c.closed.Load())
		}
	}
}

func TestMergeRejects(t *testing.T) {
	good, other := layer(t, file("f", "x")), layer(t, file("f", "y"))
	failed := errors.New("connection reset")
	changing := func() MergeLayer {
		contents := [][]byte{good, other}
		return MergeLayer{DiffID: sum(good), Open: func() (io.ReadCloser, error) {
			b := contents[0]
			contents = contents[1:]
			return io.NopCloser(bytes.NewReader(b)), nil
		}}
	}
	for name, tc := range map[string]struct {
		layers []MergeLayer
		code   shed.Code
		want   string
	}{
		"none":          {nil, shed.CodeInvalid, "no layers"},
		"wrong diff ID": {[]MergeLayer{mergeLayer(good), {sum(other), mergeLayer(good).Open}}, shed.CodeInvalid, "the content is not what its diff ID says: it has " + sum(good).String()},
		"changes":       {[]MergeLayer{changing(), mergeLayer(other)}, shed.CodeInvalid, "the content is not what its diff ID says: it has " + sum(other).String()},
		"other hash":    {[]MergeLayer{{v1.Hash{Algorithm: "sha512", Hex: strings.Repeat("0", 128)}, nil}}, shed.CodeUnsupported, "only sha256"},
		"can't open":    {[]MergeLayer{mergeLayer(good), {sum(other), func() (io.ReadCloser, error) { return nil, failed }}}, shed.CodeInternal, sum(other).Hex + ": connection reset"},
		"link to removed": {mergeLayers(t, stack{{file("a", "")}, {file(".wh.a", "")}, {link("b", "a")}}), shed.CodeInvalid,
			"which does not precede it in its layer, and is in none below"},
		"link through a symlink": {mergeLayers(t, stack{{dir("d/"), file("d/f", ""), symlink("s", "d")}, {link("b", "s/f")}}), shed.CodeInvalid, "is in none below"},
		"link to a directory":    {mergeLayers(t, stack{{dir("d/")}, {link("b", "d")}}), shed.CodeInvalid, "hard link to the directory"},
	} {
		t.Run(name, func(t *testing.T) {
			l := openLayers(t)
			_, err := l.Merge(t.Context(), tc.layers)
			if err == nil || !strings.Contains(err.Error(), tc.want) || shed.ErrorCode(err) != tc.code {
				t.Errorf("got %v (%s), want %s with %q", err, shed.ErrorCode(err), tc.code, tc.want)
			}
			wantNothing(t, l)
		})
	}
}

func TestMergeCancelled(t *testing.T) {
	l := openLayers(t)
	ctx, cancel := context.WithCancel(t.Context())
	b := layer(t, file("f", strings.Repeat("x", 4<<20)))
	opened := 0
	_, err := l.Merge(ctx, []MergeLayer{{sum(b), func() (io.ReadCloser, error) {
		if opened++; opened == 2 {
			cancel()
		}
		return io.NopCloser(bytes.NewReader(b)), nil
	}}})
	if !errors.Is(err, context.Canceled) || opened != 2 {
		t.Errorf("got %v after %d times, want %v", err, opened, context.Canceled)
	}
	wantNothing(t, l)
}

// wantNothing checks that l has no image, no file that is left, and none that is elsewhere.
func wantNothing(t testing.TB, l *Layers) {
	t.Helper()
	top := filepath.Dir(filepath.Dir(l.dir))
	err := filepath.WalkDir(top, func(name string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() && (name == top || name == filepath.Dir(l.dir) || name == l.dir || name == filepath.Dir(l.chains) || name == l.chains) {
			return err
		}
		t.Errorf("%s should not be there", name)
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// A file's other names are links to one that takes the fewest steps.
func TestMergeLinksToShortName(t *testing.T) {
	layers := []MergeLayer{mergeLayer(layer(t, file("a/b/c/f", "x"), link("a/g", "a/b/c/f"), link("z", "a/b/c/f"), link("a/h", "z")))}
	merged, err := mergeTrees(t.Context(), layers)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := writeMerged(t.Context(), &out, merged, layers); err != nil {
		t.Fatal(err)
	}
	links := map[string]string{}
	for tr := tar.NewReader(&out); ; {
		hdr, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if hdr.Typeflag == tar.TypeLink {
			links[hdr.Name] = hdr.Linkname
		}
	}
	if want := map[string]string{"a/b/c/f": "z", "a/g": "z", "a/h": "z"}; !maps.Equal(links, want) {
		t.Errorf("the links are %v, want %v", links, want)
	}
}
