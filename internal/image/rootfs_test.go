package image

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/charliek/shed"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

func TestRootfs(t *testing.T) {
	s := open(t, t.TempDir())
	kinds := []types.MediaType{
		types.OCIUncompressedLayer, types.OCILayer, types.OCILayerZStd,
		types.DockerUncompressedLayer, types.DockerLayer, dockerZstdLayer,
	}
	var img *shed.Image
	{
		var contents [][]byte
		for _, k := range kinds {
			contents = append(contents, tarOf(t, "kind", string(k)))
		}
		add := addImage(t, s, "all", layerOf(t, kinds[0], contents[0]), layerOf(t, kinds[1], contents[1]), layerOf(t, kinds[2], contents[2]),
			layerOf(t, kinds[3], contents[3]), layerOf(t, kinds[4], contents[4]), layerOf(t, kinds[5], contents[5]))
		var err error
		if img, err = s.Resolve(digestOf(t, add).String()); err != nil {
			t.Fatal(err)
		}
	}
	var events []shed.Event
	paths, cfg, err := s.Rootfs(t.Context(), img, func(e shed.Event) { events = append(events, e) })
	if err != nil {
		t.Fatal(err)
	}
	if len(cfg.Config.Env) != 1 || cfg.Config.Env[0] != "LANG=C.UTF-8" {
		t.Errorf("the configuration is %+v", cfg)
	}
	if len(paths) != len(kinds) {
		t.Fatalf("there are %d paths for %d layers", len(paths), len(kinds))
	}
	for i, k := range kinds {
		if out := debugfs(t, paths[i], "cat /kind"); !strings.HasSuffix(out, string(k)) {
			t.Errorf("layer %d holds %q, want %q", i, out, k)
		}
	}
	items := map[string]bool{}
	for i, e := range events {
		last := i == len(events)-1
		if e.Phase != "convert" || (e.Message == "converting layers") != (i == 0) || last != (e.Done && e.Item == "") {
			t.Errorf("event %d is %+v", i, e)
		}
		if e.Item != "" && e.Done && e.Total > 0 && e.Current == e.Total {
			items[e.Item] = true
		}
	}
	if len(items) != len(kinds) {
		t.Errorf("the layers %v were converted, want %d", items, len(kinds))
	}

	// The second time there is nothing to do, and no blob is needed.
	for _, l := range img.Layers {
		if err := os.Remove(filepath.Join(s.dir, "blobs", strings.Replace(l.Digest, ":", "/", 1))); err != nil {
			t.Fatal(err)
		}
	}
	again, _, err := s.Rootfs(t.Context(), img, func(e shed.Event) { t.Errorf("unexpected event %+v", e) })
	if err != nil || strings.Join(again, " ") != strings.Join(paths, " ") {
		t.Errorf("the second time gives %v, %v", again, err)
	}
}

func debugfs(t testing.TB, image, request string) string {
	t.Helper()
	bin, err := exec.LookPath("debugfs")
	if err != nil {
		if bin, err = exec.LookPath("/usr/sbin/debugfs"); err != nil {
			t.Fatal("debugfs is needed for this test: install e2fsprogs")
		}
	}
	out, err := exec.Command(bin, "-R", request, image).CombinedOutput()
	if err != nil {
		t.Fatalf("debugfs %s: %v\n%s", request, err, out)
	}
	return string(out)
}

func TestRootfsRefuses(t *testing.T) {
	good := layerOf(t, types.OCILayer, tarOf(t, "f", "x"))
	for name, tc := range map[string]struct {
		mediaType types.MediaType
		blob      []byte
		code      shed.Code
		want      string
	}{
		"unknown kind":   {"application/x-shed", tarOf(t, "g", "x"), shed.CodeUnsupported, `"application/x-shed"`},
		"damaged gzip":   {types.OCILayer, nil, shed.CodeInvalid, "decompressing"},
		"other content":  {types.OCIUncompressedLayer, tarOf(t, "g", "y"), shed.CodeInvalid, "not what its diff ID says"},
		"missing a blob": {types.OCIUncompressedLayer, nil, shed.CodeInternal, "no such file"},
	} {
		t.Run(name, func(t *testing.T) {
			s := open(t, t.TempDir())
			bad := layerOf(t, tc.mediaType, tarOf(t, "g", "x"))
			addImage(t, s, "bad", good, bad)
			digest, err := bad.Digest()
			if err != nil {
				t.Fatal(err)
			}
			switch {
			case name == "missing a blob":
				err = os.Remove(s.blob(digest))
			case tc.blob == nil:
				err = os.WriteFile(s.blob(digest), bytes.Repeat([]byte("x"), 100), 0o644)
			default:
				err = os.WriteFile(s.blob(digest), tc.blob, 0o644)
			}
			if err != nil {
				t.Fatal(err)
			}
			img, err := s.Resolve("bad")
			if err != nil {
				t.Fatal(err)
			}
			_, _, err = s.Rootfs(t.Context(), img, nil)
			if err == nil || !strings.Contains(err.Error(), tc.want) || !strings.Contains(err.Error(), "image bad") {
				t.Fatalf("got %v, want an error with %q", err, tc.want)
			}
			if code := shed.ErrorCode(err); code != tc.code {
				t.Errorf("its code is %s, want %s", code, tc.code)
			}
			if diffID, _ := bad.DiffID(); tc.code == shed.CodeInvalid {
				if _, ok := s.layers.Path(diffID); ok {
					t.Error("a damaged layer got a block image")
				}
			}
		})
	}
}

func TestRootfsWithin(t *testing.T) {
	s := open(t, t.TempDir())
	var layers []v1.Layer
	for i, k := range []types.MediaType{types.OCIUncompressedLayer, types.OCILayer, types.OCILayerZStd, types.OCILayer, types.OCILayer} {
		layers = append(layers, layerOf(t, k, tarOf(t, fmt.Sprint("f", i), noise(9<<20, byte(i)))))
	}
	addImage(t, s, "x", layers...)
	img, err := s.Resolve("x")
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		most   int
		merged []string // files in the lowest image
		paths  int
	}{
		{0, []string{"f0"}, 5}, {6, []string{"f0"}, 5}, {5, []string{"f0"}, 5},
		{4, []string{"f0", "f1"}, 4}, {2, []string{"f0", "f1", "f2", "f3"}, 2}, {1, []string{"f0", "f1", "f2", "f3", "f4"}, 1},
	} {
		var last shed.Event
		merges := 0
		paths, _, err := s.RootfsWithin(t.Context(), img, tc.most, func(e shed.Event) {
			if e.Phase == "merge" {
				if e.Current < last.Current && !e.Done || e.Current > e.Total {
					t.Errorf("%+v follows %+v", e, last)
				}
				if last = e; e.Done {
					last = shed.Event{}
					merges++
				}
			}
		})
		if err != nil || len(paths) != tc.paths || (merges == 1) != (tc.paths < 5) {
			t.Fatalf("within %d, it has %q after %d merges, %v", tc.most, paths, merges, err)
		}
		var files []string
		for _, f := range strings.Fields(debugfs(t, paths[0], "ls /")) {
			if strings.HasPrefix(f, "f") {
				files = append(files, f)
			}
		}
		if !slices.Equal(files, tc.merged) {
			t.Errorf("within %d, the lowest image holds %q, want %q", tc.most, files, tc.merged)
		}
		again, _, err := s.RootfsWithin(t.Context(), img, tc.most, func(e shed.Event) { t.Errorf("unexpected event %+v", e) })
		if err != nil || !slices.Equal(again, paths) {
			t.Errorf("within %d, the second time it has %q, %v", tc.most, again, err)
		}
	}
	digest, err := layers[1].Digest()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(s.blob(digest), []byte("damaged"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.RootfsWithin(t.Context(), img, 3, nil); shed.ErrorCode(err) != shed.CodeInvalid || !strings.Contains(err.Error(), "decompressing") {
		t.Errorf("a damaged blob gives %v", err)
	}
}
