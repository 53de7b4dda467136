package image

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/charliek/shed"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

func TestAssemble(t *testing.T) {
	s := open(t, t.TempDir())
	old, new := tarOf(t, "a", "1"), tarOf(t, "b", "2")
	lowest := fakeBuild(t, s, "base", old)
	mustImage(t, lowest, time.Now())
	diffID, _, err := v1.SHA256(bytes.NewReader(new))
	if err != nil {
		t.Fatal(err)
	}
	config, err := json.Marshal(v1.ConfigFile{
		OS: "linux", RootFS: v1.RootFS{Type: "layers", DiffIDs: []v1.Hash{lowest.layers[0].diffID, diffID, diffID}},
	})
	if err != nil {
		t.Fatal(err)
	}
	before := files(t, filepath.Dir(s.dir))

	wrong := func(context.Context, v1.Hash) io.ReadCloser { return io.NopCloser(bytes.NewReader(tarOf(t, "c", "3"))) }
	if _, err := s.Assemble(t.Context(), config, "x", wrong, nil); shed.ErrorCode(err) != shed.CodeInvalid {
		t.Errorf("of another layer's content it gives %v", err)
	}
	if after := files(t, filepath.Dir(s.dir)); !slices.Equal(after, before) {
		t.Errorf("left are %q, want %q", after, before)
	}

	var opened []v1.Hash
	img, err := s.Assemble(t.Context(), config, "x", func(_ context.Context, id v1.Hash) io.ReadCloser {
		opened = append(opened, id)
		return io.NopCloser(bytes.NewReader(new))
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(opened, []v1.Hash{diffID}) {
		t.Errorf("it read %v, want the new layer once", opened)
	}
	var got []string
	for _, l := range img.Layers {
		got = append(got, l.DiffID)
	}
	if want := []string{lowest.layers[0].diffID.String(), diffID.String(), diffID.String()}; img.Ref != "x" || !slices.Equal(got, want) {
		t.Errorf("%q has the layers %q, want %q", img.Ref, got, want)
	}
	if img.Layers[0].Digest != lowest.layers[0].desc.Digest.String() {
		t.Errorf("the lowest layer's blob is %s, want that of base", img.Layers[0].Digest)
	}
	if id, err := s.ConfigDigest(img); err != nil || id != descriptor(config, "").Digest {
		t.Errorf("the configuration is %v, %v", id, err)
	}
	if len(s.held) != 0 {
		t.Errorf("still held are %v", s.held)
	}
	ready(t, s, img.Digest)
}
